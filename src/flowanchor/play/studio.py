"""The models that a page draws with, one drawing at a time."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import torch

from flowanchor.checkpoints.find import latest_checkpoint
from flowanchor.conditioning import Text
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.generation.opened import OpenedModel, load
from flowanchor.play import drawing
from flowanchor.play.choices import build, class_names, flow_choice, own_choice
from flowanchor.play.drawing import Drawing, Wish
from flowanchor.play.live import is_run
from flowanchor.play.quality import home_of

FLOW_FRAMES = 24  # steps of the way along the flow


class Studio:
    """A model, perhaps its teacher beside it, and the run that it comes from.

    Args:
        device, dtype, ema: of whatever is opened, as in `flowanchor.load`.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype | None = None, ema: str | None = None) -> None:
        self.device, self.dtype, self.ema = device, dtype, ema
        self.model: OpenedModel | None = None
        self.teacher: OpenedModel | None = None
        self.name = self.path = ""  # what it is called; what was typed
        self.home: Path | None = None  # where its evaluations lie
        self.run: Path | None = None  # the folder of its training, where it is one
        self._lock = threading.Lock()  # a network is asked by one drawing at a time

    def open(self, path: str, teacher: str | None = None) -> None:
        """Take another model, or the same one anew; where that fails, what was open stays open.

        A run that has saved nothing yet is opened without a model: it can be watched. Raises a `FlowAnchorError` for
        what cannot be drawn with.
        """
        folder = Path(path).expanduser()
        unborn = is_run(folder) and latest_checkpoint(folder) is None
        model = None if unborn else self._load(path, self.ema)
        beside = self._load(teacher, None) if teacher else None
        if model is not None:
            own_choice(model)  # something must be able to draw with it
            _check_still(model)
        if model is not None and beside is not None:
            _check_pair(model, beside)
        home = folder if model is None else home_of(Path(model.path))
        with self._lock:
            self.model, self.teacher, self.home = model, beside or self._kept_teacher(model), home
            self.path, self.name = path, home.resolve().name
            self.run = home if is_run(home) else None

    def _load(self, path: str, ema: str | None) -> OpenedModel:
        return load(path, ema=ema, device=self.device, dtype=self.dtype)

    def _kept_teacher(self, model: OpenedModel | None) -> OpenedModel | None:
        """The teacher so far, where it fits the new model."""
        try:
            if model is not None and self.teacher is not None:
                _check_pair(model, self.teacher)
        except ConfigError:
            return None
        return self.teacher

    def described(self) -> str:
        """One line about the model."""
        if self.model is None:
            return f"{self.name}: nothing saved yet"
        shape = " x ".join(map(str, self.model.backbone.sample_shape))
        known = self.model.backbone.conditioning.described()
        learned = "few-step model" if self.model.kind == "shortcut" else "flow model"
        weights = "raw weights" if self.model.ema == "none" else f"EMA {self.model.ema}"
        return f"{self.name}: {learned}, step {self.model.step:,}, {weights}, samples {shape}, {known}"

    def names(self) -> list[str]:
        """Of the model's classes."""
        return class_names(self.opened())

    def opened(self) -> OpenedModel:
        """The model; raises `CheckpointError` where nothing was saved yet."""
        if self.model is None:
            raise CheckpointError(f"{self.name or 'The run'} has saved no checkpoint yet: open it again later.")
        return self.model

    def draw(self, wish: Wish) -> Drawing:
        """See `drawing.draw`."""
        with self._lock:
            return drawing.draw(self.opened(), wish)

    def draw_teacher(self, wish: Wish, steps: int) -> Drawing:
        """The same noise and subjects, by the teacher's own sampler in so many steps."""
        if self.teacher is None:
            raise ConfigError("There is no teacher: start the page with flowanchor play CHECKPOINT TEACHER.")
        with self._lock:
            return drawing.draw(self.teacher, replace(wish, sampler=None, steps=steps, guidance=None))

    def way(self, wish: Wish, along_flow: bool) -> Drawing:
        """The way of one picture per subject from noise, in the steps wished for or along the flow in small ones."""
        with self._lock:
            model = self.opened()
            if along_flow:
                flow = flow_choice(model)
                if flow is None:
                    raise ConfigError("No sampler here follows this network's flow: watch its own steps.")
                wish = replace(wish, sampler=flow, steps=FLOW_FRAMES)
            return drawing.draw(model, replace(wish, each=1), keep=drawing.ROWS)

    def between(self, wish: Wish, other_seed: int) -> Drawing:
        """See `drawing.between`."""
        with self._lock:
            return drawing.between(self.opened(), wish, other_seed)


def _check_still(model: OpenedModel) -> None:
    shape = model.backbone.sample_shape
    if len(shape) == 4 and shape[1] > 1:
        raise ConfigError(f"{model.path} draws videos of {shape[1]} frames, and the page shows pictures.")
    build(model, own_choice(model), None, None)


def _check_pair(model: OpenedModel, teacher: OpenedModel) -> None:
    ours, theirs = model.backbone, teacher.backbone
    texts = [isinstance(network.conditioning, Text) for network in (ours, theirs)]
    same: list[tuple[str, object, object]] = [
        ("samples of shape", tuple(ours.sample_shape), tuple(theirs.sample_shape)),
        ("classes:", ours.conditioning.classes, theirs.conditioning.classes),
        ("prompts:", texts[0], texts[1]),
    ]
    for what, own, other in same:
        if own != other:
            raise ConfigError(
                f"The teacher {teacher.path} cannot stand beside {model.path} ({what} {other}, not {own}): give the "
                "one that it was distilled from."
            )
