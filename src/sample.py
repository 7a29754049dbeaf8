"""Draw images: `python src/sample.py checkpoint=PATH sampler.steps=2 num_samples=64` (see conf/sample.yaml)."""

from flowanchor.programs.commands import sample as main

if __name__ == "__main__":
    main()
