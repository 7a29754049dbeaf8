"""Teacher, one-step student, evaluation and report: `python src/demo.py` (see conf/demo.yaml)."""

from flowanchor.programs.commands import demo as main

if __name__ == "__main__":
    main()
