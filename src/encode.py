"""Encode images into latents: `python src/encode.py data.root=FOLDER codec=vavae codec.weights=FILE out=FOLDER`."""

from flowanchor.programs.commands import encode as main

if __name__ == "__main__":
    main()
