"""Train a run: `python src/train.py backbone=lightningdit objective=facm` (see conf/train.yaml)."""

from flowanchor.programs.commands import train as main

if __name__ == "__main__":
    main()
