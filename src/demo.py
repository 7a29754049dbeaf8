"""Teacher, one-step student, evaluation and report: `python src/demo.py` (see conf/demo.yaml)."""

from flowanchor.programs.demo import main

if __name__ == "__main__":
    main()
