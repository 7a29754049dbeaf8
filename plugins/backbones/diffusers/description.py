"""What must be said of a transformer of diffusers so that it is walked block by block (docs/add_a_diffusers_model.md).

A description names things of the stock class and holds no weights; it is a class that an option of
`backbone/description` names, and is found by the name of the stock class. Times are ours: `t = 0` noise, `t = 1` data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, ClassVar, cast

from torch import Tensor

from flowanchor.base.plain import bare
from flowanchor.base.registry import current_name, registered
from flowanchor.errors import ConfigError
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline

PAGE = "docs/add_a_diffusers_model.md"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # layers of attention to the sample, by the ends of their names


class Description(ABC):
    """How one class of diffusers is walked.

    Attributes:
        stock: its name in diffusers.
        blocks: names of its lists of blocks, in the order in which they are run.
        streams: parameters of a block that are tokens, in the order in which they are joined to one sequence; the
            sample's own last.
        out: the streams in the order in which a block returns them; None where it returns one tensor.
        carried: what depends on the time: parameters of the first block, or names in `kept`.
        kept: name -> (a child that is called before the blocks, which of its outputs, or None for a tensor): what
            blocks are not given, and `head` or a later list needs.
        renames: list of blocks -> {its parameter: name of the value}, where they differ from those of the first list;
            `joined` stands for the whole sequence.
        lead: lists of blocks that the stock forward runs on the sample's tokens before it joins the text to them.
        ends: children that `head` calls.
        last: its last layer.
        time: the module that embeds the time; its first argument is a table of sinusoids [B, n], or the time.
        sinusoids: whether it is the table.
        sign: -1 where the network predicts noise minus data, 1 where it is data minus noise.
        frames: whether samples are videos [C, f, h, w].
        usual: height and width of a sample where nothing else is said (before them frames, of a video).
        size_steps: of which height and width must be multiples.
        masks_padding: whether blocks make a mask of the condition's padding and of nothing else, even where there is
            none: then they are run without it.
        targets: ends of the names of the layers in `blocks` that adapters stand beside unless others are chosen.
        pipeline: what draws by it in diffusers and reads LoRA files; None: nothing does both.
        longest: tokens that the network reads of each field of the condition that is a sequence. Fields without a mask
            (`mask` beside `tokens`) are filled up to it with zeros.
    """

    stock: ClassVar[str]
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    streams: ClassVar[tuple[str, ...]] = ("hidden_states",)
    out: ClassVar[tuple[str, ...] | None] = None
    carried: ClassVar[tuple[str, ...]]
    kept: ClassVar[Mapping[str, tuple[str, int | None]]] = {}
    renames: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    lead: ClassVar[tuple[str, ...]] = ()
    ends: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out")
    last: ClassVar[str] = "proj_out"
    time: ClassVar[str]
    sinusoids: ClassVar[bool] = True
    sign: ClassVar[int] = -1
    frames: ClassVar[bool] = False
    usual: ClassVar[tuple[int, ...]] = (128, 128)
    size_steps: ClassVar[tuple[int, int]] = (1, 1)
    masks_padding: ClassVar[bool] = False
    targets: ClassVar[tuple[str, ...]] = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
    pipeline: ClassVar[Pipeline | None] = None
    longest: ClassVar[Mapping[str, int]] = {"tokens": 512}

    @abstractmethod
    def channels(self, config: Any) -> int:
        """Channels of a sample; `config`: the stock network's."""

    @abstractmethod
    def null(self, config: Any) -> Any:
        """The condition of one sample without text, a named tuple whose sequences have one token each."""

    @abstractmethod
    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: Any) -> dict[str, Any]:
        """x [B, C, *], t [B], condition -> what the stock `forward` is called with."""

    @abstractmethod
    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        """The sample's tokens [B, N, D] after the last block -> what the stock `forward` returns, as [B, C, *] =
        `shape`. `values`: what blocks are called with, and what was kept, by name."""

    def level(self, config: Any, t: Tensor) -> Tensor:
        """Times [B] -> what is embedded, as a share of 1,000 timesteps [B]: here the noise level."""
        return 1 - t

    def speed(self, config: Any) -> float:
        """How much `level` changes where t does by 1."""
        level = cast(Any, self.level)  # of plain numbers: a step that is planned has tensors without values
        return abs(float(level(config, 1.0) - level(config, 0.0)))

    def drawn_by(self, config: Any) -> Pipeline | None:
        """`pipeline`, where its class depends on the network's settings."""
        return self.pipeline

    def asked(self, config: Any) -> str:
        """The argument of `pipeline` by which it asks this network once per step, and tells it what training did."""
        return "" if self.pipeline is None else self.pipeline.unguided

    def check(self, config: Any) -> None:  # noqa: B027 - most classes have one form
        """Raise `ConfigError` for a form of the stock network that this description does not know."""


class Joint(Description):
    """Text and sample as two streams of each block, the text first."""

    streams = ("encoder_hidden_states", "hidden_states")
    out: ClassVar[tuple[str, ...] | None] = ("encoder_hidden_states", "hidden_states")
    carried = ("temb",)
    targets: ClassVar[tuple[str, ...]] = (
        *ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2",
        "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip


def description_of(stock: str) -> Description:
    """The description of a class of diffusers; raises `ConfigError` where nobody has written one."""
    found = _descriptions(registered("backbone.description")).get(stock)
    if found is None:
        raise ConfigError(
            f"Nothing describes how {bare(stock)} is walked block by block: write its description, about 20 lines "
            f"({PAGE}), or use one of {', '.join(sorted(_descriptions(registered('backbone.description'))))}."
        )
    return found()


def is_described(stock: str) -> bool:
    """Whether `description_of` knows a class."""
    return stock in _descriptions(registered("backbone.description"))


@lru_cache(maxsize=4)
def _descriptions(names: frozenset[str]) -> dict[str, type[Description]]:
    """Stock class -> description, of the options' classes; flowanchor's own win."""
    found: dict[str, type[Description]] = {}
    for name in sorted(map(current_name, names), key=lambda name: (not name.startswith("flowanchor."), name)):
        module, _, own = name.rpartition(".")
        made = getattr(import_module(module), own)
        found.setdefault(made.stock, made)
    return found
