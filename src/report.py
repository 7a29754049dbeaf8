"""Runs side by side: `python src/report.py runs=outputs/multirun/NAME` (see conf/report.yaml)."""

from flowanchor.programs.commands import report as main

if __name__ == "__main__":
    main()
