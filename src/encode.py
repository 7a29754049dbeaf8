"""Encode images into latents: `python src/encode.py data.root=FOLDER codec=vavae codec.weights=FILE out=FOLDER`."""

from flowanchor.programs.encode import main

if __name__ == "__main__":
    main()
