"""UMT5, which encodes the prompts of Wan."""

from __future__ import annotations

from pathlib import Path

from flowanchor.text.frozen import FrozenEncoder


class UMT5(FrozenEncoder):
    """UMT5's encoder as Wan's pipeline uses it: prompts cleaned, filled up to 512 tokens under a mask, and cut again.

    Args:
        weights: the folder `text_encoder/` of a pipeline, or the pipeline's own, whose `tokenizer/` is then used too.
        tokenizer: folder of the tokenizer; None: see above, else that of the weights.
        max_length: tokens; 512 as released.
        dtype: of the network; bfloat16 as released (11 GB).
    """

    def __init__(
        self,
        weights: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 512,
        dtype: str = "bfloat16",
    ) -> None:
        folder = None if not weights else Path(weights).expanduser()
        if folder is not None and (folder / "text_encoder").is_dir():
            folder, tokenizer = folder / "text_encoder", tokenizer or str(folder / "tokenizer")
        elif folder is not None and not tokenizer and (folder.parent / "tokenizer").is_dir():
            tokenizer = str(folder.parent / "tokenizer")
        super().__init__(
            "umt5", folder, tokenizer, "UMT5EncoderModel", max_length, padded=True, cleaned=True, dtype=dtype
        )
