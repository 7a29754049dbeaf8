"""What a pipeline of diffusers does with a LoRA file and with a grid of noise levels: facts of diffusers 0.42."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pipeline:
    """The pipeline of a class of transformers.

    Args:
        name: its class.
        loader: the class in `diffusers.loaders` by which it reads LoRA files.
        unguided: the argument by which it asks the network once per step.
        uniform: whether it gives its scheduler the uniform noise levels `1, ..., 1 / N` itself; otherwise the scheduler
            draws a line from its largest level to its smallest, which is next to nothing.
        takes_levels: whether a call can name the levels (`sigmas=`).
        prefix: of the names in a LoRA file that diffusers and ComfyUI both read.
        renames: parts of such names: diffusers' -> ComfyUI's, where it knows no others; empty: it knows diffusers'.
    """

    name: str
    loader: str
    unguided: str = "guidance_scale=1"
    uniform: bool = True
    takes_levels: bool = True
    prefix: str = "transformer."
    renames: tuple[tuple[str, str], ...] = ()

    def exported(self, layer: str) -> str | None:
        """The name of a layer in a LoRA file; None where there is none that is read."""
        if not self.renames:
            return f"{self.prefix}{layer}"
        found = next(((ours, theirs) for ours, theirs in self.renames if layer.endswith(f".{ours}")), None)
        return None if found is None else f"{self.prefix}{layer.removesuffix(found[0])}{found[1]}"


# Wan's own names: ComfyUI knows no others, and diffusers reads them too.
WAN = Pipeline(
    "WanPipeline", "WanLoraLoaderMixin", uniform=False, takes_levels=False, prefix="diffusion_model.",
    renames=(
        ("attn1.to_q", "self_attn.q"), ("attn1.to_k", "self_attn.k"), ("attn1.to_v", "self_attn.v"),
        ("attn1.to_out.0", "self_attn.o"), ("attn2.to_q", "cross_attn.q"), ("attn2.to_k", "cross_attn.k"),
        ("attn2.to_v", "cross_attn.v"), ("attn2.to_out.0", "cross_attn.o"), ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
    ),
)  # fmt: skip
