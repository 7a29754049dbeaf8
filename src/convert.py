"""Convert a checkpoint: `python src/convert.py consolidate checkpoint=RUN output=FILE.safetensors`."""

from flowanchor.programs.commands import convert as main

if __name__ == "__main__":
    main()
