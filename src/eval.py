"""Evaluate a checkpoint: `python src/eval.py checkpoint=outputs/train/NAME nfe=[1,2,4]` (see conf/eval.yaml)."""

from flowanchor.programs.commands import evaluate as main

if __name__ == "__main__":
    main()
