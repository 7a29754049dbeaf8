"""The page. What it draws and reads stands in the files beside it; here is what is where, and who listens to whom."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from flowanchor.conditioning import Text
from flowanchor.errors import ConfigError, FlowAnchorError
from flowanchor.play import pictures
from flowanchor.play.choices import can_be_guided, choices
from flowanchor.play.drawing import Drawing, Wish
from flowanchor.play.live import Glance, fingerprint, glance, picture
from flowanchor.play.quality import quality
from flowanchor.play.studio import Studio

T = TypeVar("T")

EVERY = 3.0  # seconds between two looks at a run
SMALL = 64  # images up to this side are drawn four of a kind, larger ones one
TEACHER_STEPS = 50  # at most
CSS = ".pix img {image-rendering: pixelated;} footer {display: none !important;}"
LATEST = "the latest"


def build_page(studio: Studio, folder: Path, may_open: bool = True) -> gr.Blocks:
    """The page of a studio that has opened something.

    Args:
        folder: for pictures to download; whoever starts the page removes it.
        may_open: whether the page may ask for other checkpoints: any path of this machine.
    """
    page = gr.Blocks(title=f"flowanchor: {studio.name}", analytics_enabled=False, delete_cache=(600, 3600))
    with page:
        title = gr.Markdown(_heading(studio), elem_id="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                controls = _Controls(studio, may_open)
            with gr.Column(scale=5, min_width=320):
                with gr.Tab("Draw", id="draw"):
                    shown = _Drawn(studio)
                with gr.Tab("Noise to picture", id="way"):
                    way = _Way()
                with gr.Tab("Between two seeds", id="between"):
                    middle = _Between()
                with gr.Tab("Quality", id="quality"):
                    curve = gr.Image(
                        _quality(studio), label="quality", show_label=False, format="png", interactive=False,
                        elem_id="quality", buttons=["fullscreen"], visible=_quality(studio) is not None,
                    )  # fmt: skip
                    missing = gr.Markdown(_no_quality(studio), elem_id="no-quality")
                if studio.run is not None:
                    with gr.Tab("Training", id="training"):
                        _watch(studio.run)
        drawn = [shown.image, shown.cost, shown.file, shown.teacher, shown.teacher_cost]
        wished = [*controls.wish, shown.teacher_steps]

        @telling
        def draw(*values: Any) -> list[Any]:
            *own, teacher_steps = values
            wish = controls.read(own)
            drawing = studio.draw(wish)
            grids = [pictures.grid(drawing, studio.names())]
            beside: list[Any] = [None, ""]
            if studio.teacher is not None:
                other = studio.draw_teacher(wish, int(teacher_steps))
                grids.append(pictures.grid(other, studio.names()))
                beside = [grids[1], f"Teacher: {other.cost()}"]
            titles = [drawing.cost(), *([beside[1]] if len(grids) > 1 else [])]
            kept = grids[0] if len(grids) == 1 else pictures.side_by_side(grids, titles)
            path = _save(folder, kept, drawing, studio)
            return [grids[0], drawing.cost(), gr.update(value=str(path), interactive=True), *beside]

        @telling
        def follow(along: str, *values: Any) -> list[Any]:
            drawing = studio.way(controls.read(values), along == way.FLOW)
            last = len(drawing.frames) - 1
            text = f"{last} steps of {drawing.sampler}; 0 is noise, {last} the picture"
            return [drawing, gr.update(maximum=last, value=last), pictures.frame(drawing, last), text]

        @telling
        def walk(other: float, *values: Any) -> list[Any]:
            wish = controls.read(values)
            drawing = studio.between(wish, _whole(other, "The second seed"))
            text = f"From seed {wish.seed} to seed {int(other)}: {drawing.cost()}"
            return [pictures.grid(drawing, studio.names()), text]

        @telling
        def reopen(path: str) -> list[Any]:
            studio.open((path or "").strip())
            found = _quality(studio)
            return [
                _heading(studio),
                *controls.updates(),
                gr.update(value=found, visible=found is not None),
                _no_quality(studio),
            ]

        sliders = (controls.steps, controls.guidance, controls.each, shown.teacher_steps)
        asking = [controls.draw.click, controls.classes.input, controls.seed.submit, *(one.release for one in sliders)]
        busy: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": shown.image}
        gr.on(asking, draw, wished, drawn, **busy)
        if studio.model is not None and not isinstance(studio.model.backbone.conditioning, Text):
            page.load(draw, wished, drawn, **busy)
        controls.dice.click(_dice, None, controls.seed).then(draw, wished, drawn, **busy)
        controls.sampler.input(controls.steps_of, controls.sampler, controls.steps).then(draw, wished, drawn, **busy)
        way.start.click(follow, [way.along, *controls.wish], [way.drawing, way.stop, way.image, way.text])
        way.stop.change(_stop_at, [way.drawing, way.stop], way.image, show_progress="hidden")
        middle.start.click(walk, [middle.other, *controls.wish], [middle.image, middle.text])
        if may_open:
            changed = [title, *controls.changing(), curve, missing]
            # Hidden, or an error would be written over everything that would have changed.
            opened = controls.open.click(reopen, controls.path, changed, show_progress="hidden")
            opened.success(draw, wished, drawn, **busy)
    return page


def telling(function: Callable[..., T]) -> Callable[..., T]:
    """A listener whose errors a user can act on are told on the page."""

    @wraps(function)
    def listener(*values: Any) -> T:
        try:
            return function(*values)
        except FlowAnchorError as error:
            raise gr.Error(str(error), duration=20, print_exception=False) from error

    return listener


class _Controls:
    """What is asked for, in the left column."""

    def __init__(self, studio: Studio, may_open: bool) -> None:
        self.studio = studio
        if may_open:
            with gr.Accordion("Model", open=studio.model is None):
                self.path = gr.Textbox(studio.path, label="Run folder, checkpoint or shipped name", elem_id="path")
                self.open = gr.Button("Open", size="sm", elem_id="open")
        values = self._values()
        self.classes = gr.Dropdown(elem_id="classes", label="Classes (none: the first ten)", multiselect=True,
                                   **values["classes"])  # fmt: skip
        self.prompts = gr.Textbox(elem_id="prompts", label="Prompts, one a line", lines=3, **values["prompts"])
        self.negative = gr.Textbox(elem_id="negative", label="Negative prompt", **values["negative"])
        with gr.Row():
            self.seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed", min_width=100)
            self.dice = gr.Button("Another seed", size="sm", min_width=100, elem_id="dice")
        self.sampler = gr.Dropdown(elem_id="sampler", label="Sampler", **values["sampler"])
        self.steps = gr.Slider(elem_id="steps", minimum=1, step=1, **values["steps"])
        self.guidance = gr.Slider(elem_id="guidance", label="Guidance (1: none)", minimum=0, maximum=8, step=0.1,
                                  **values["guidance"])  # fmt: skip
        self.each = gr.Slider(elem_id="each", label="Pictures of each", minimum=1, maximum=16, step=1, **values["each"])
        self.draw = gr.Button("Draw", variant="primary", elem_id="go")

    @property
    def wish(self) -> list[Any]:
        """The components that `read` reads."""
        return [self.seed, self.each, self.classes, self.prompts, self.negative, self.sampler, self.steps,
                self.guidance]  # fmt: skip

    def read(self, values: Any) -> Wish:
        """What the components say."""
        seed, each, classes, prompts, negative, sampler, steps, guidance = values
        lines = tuple(line.strip() for line in (prompts or "").splitlines() if line.strip())
        guided = self.studio.model is not None and can_be_guided(self.studio.model)
        return Wish(
            seed=_whole(seed, "The seed"),
            each=int(each),
            classes=tuple(int(number) for number in classes or ()),
            prompts=lines,
            negative=(negative or "").strip() or None,
            sampler=sampler,
            steps=_whole(steps, "The number of steps"),
            guidance=float(guidance) if guided else None,
        )

    def changing(self) -> list[Any]:
        """The components that another model changes."""
        return [self.classes, self.prompts, self.negative, self.sampler, self.steps, self.guidance, self.each]

    def updates(self) -> list[Any]:
        """Their values for the model that is open now."""
        return [gr.update(**values) for values in self._values().values()]

    def steps_of(self, sampler: str) -> Any:
        """The slider of a sampler that was chosen."""
        choice = choices(self.studio.opened())[sampler]
        return gr.update(maximum=choice.most, value=choice.steps, label=_steps_label(choice.kind))

    def _values(self) -> dict[str, dict[str, Any]]:
        model = self.studio.model
        if model is None:
            hidden: dict[str, Any] = {"visible": False}
            empty = ("classes", "prompts", "negative", "sampler", "steps", "guidance", "each")
            return {name: hidden for name in empty}
        offered, texts = choices(model), isinstance(model.backbone.conditioning, Text)
        names, first = self.studio.names(), next(iter(offered.values()))
        numbered = [(name, number) for number, name in enumerate(names)]
        scale = float((model.config.get("sampler") or {}).get("guidance_scale") or 1.0)
        guided = can_be_guided(model)
        many = max(model.backbone.sample_shape[-2:]) <= SMALL and not texts
        return {
            "classes": {"choices": numbered, "value": [], "visible": bool(names)},
            "prompts": {"visible": texts},
            "negative": {"visible": texts},
            "sampler": {"choices": list(offered), "value": next(iter(offered)), "visible": True},
            "steps": {"maximum": first.most, "value": first.steps, "label": _steps_label(first.kind), "visible": True},
            "guidance": {"value": scale, "visible": guided},
            "each": {"value": 4 if many else 1, "visible": True},
        }


class _Drawn:
    """The drawing, and the teacher's beside it."""

    def __init__(self, studio: Studio) -> None:
        beside = studio.teacher is not None
        with gr.Row():
            with gr.Column(min_width=300):
                self.cost = gr.Markdown(elem_id="cost")
                self.image = _image("drawing")
            with gr.Column(min_width=300, visible=beside):
                self.teacher_cost = gr.Markdown(elem_id="teacher-cost")
                self.teacher = _image("teacher")
                first = next(iter(choices(studio.teacher).values())) if studio.teacher is not None else None
                self.teacher_steps = gr.Slider(
                    1, TEACHER_STEPS, min(first.steps, TEACHER_STEPS) if first else 1, step=1, label="Teacher's steps",
                    elem_id="teacher-steps",
                )  # fmt: skip
        self.file = gr.DownloadButton("Download as PNG", size="sm", interactive=False, elem_id="download")


class _Way:
    """From noise to picture."""

    OWN, FLOW = "the steps chosen on the left", "the flow, in small steps"

    def __init__(self) -> None:
        self.along = gr.Radio([self.OWN, self.FLOW], value=self.FLOW, label="Follow", elem_id="along")
        self.start = gr.Button("Follow one picture of each from its noise", size="sm", elem_id="follow")
        self.stop = gr.Slider(0, 1, 0, step=1, label="Step", elem_id="stop")
        self.text = gr.Markdown(elem_id="way-text")
        self.image = _image("frame")
        self.drawing = gr.State(None)


class _Between:
    """From one seed to another."""

    def __init__(self) -> None:
        self.other = gr.Number(1, precision=0, minimum=0, label="To the seed", elem_id="other-seed")
        self.start = gr.Button("Walk from the seed on the left to this one", size="sm", elem_id="walk")
        self.text = gr.Markdown(elem_id="between-cost")
        self.image = _image("between")


def _watch(run: Path) -> None:
    """A run that trains: its state, losses, scores and pictures, looked at again and again."""
    state = gr.Markdown(elem_id="state")
    losses = gr.Image(show_label=False, format="png", interactive=False, elem_id="losses", buttons=[])
    scores = gr.Dataframe(headers=["score", "at", "value"], interactive=False, elem_id="scores", wrap=True)
    which = gr.Dropdown([LATEST], value=LATEST, label="Samples of", elem_id="which")
    samples = _image("samples")
    seen = gr.State(())

    @telling
    def look(before: tuple[object, ...], chosen: str) -> list[Any]:
        print_, now = fingerprint(run), glance(run)
        if [*print_, chosen] == list(before):
            return [now.state, *[gr.skip()] * 4, before]
        figure = now.losses()
        return [
            now.state,
            None if figure is None else pictures.of_figure(figure),
            [list(row) for row in now.scores],
            gr.update(choices=[LATEST, *(path.stem for path in reversed(now.pictures))]),
            _sample_grid(now, chosen),
            (*print_, chosen),
        ]

    outputs = [state, losses, scores, which, samples, seen]
    gr.Timer(EVERY).tick(look, [seen, which], outputs, show_progress="hidden")
    which.input(look, [seen, which], outputs, show_progress="hidden")


def _sample_grid(now: Glance, chosen: str) -> Any:
    """The grid that was chosen; what is shown stays where it is being written just now."""
    wanted = [path for path in now.pictures if chosen in (path.stem, LATEST)]
    found = picture(wanted[-1]) if wanted else None
    return gr.skip() if found is None else found


def _image(name: str) -> gr.Image:
    return gr.Image(
        show_label=False, format="png", interactive=False, elem_id=name, elem_classes="pix", buttons=["fullscreen"]
    )


def _stop_at(drawing: Drawing | None, stop: float) -> Any:
    return gr.skip() if drawing is None else pictures.frame(drawing, int(stop))


def _dice() -> int:
    return random.randrange(10_000)


def _whole(value: Any, name: str) -> int:
    if value is None or value != int(value):
        raise ConfigError(f"{name} must be a whole number.")
    return int(value)


def _steps_label(kind: str) -> str:
    return "Steps (jumps)" if kind == "shortcut" else "Steps along the flow"


def _heading(studio: Studio) -> str:
    more = "" if studio.teacher is None else " Beside it: its teacher, on the same noise."
    name, colon, rest = studio.described().partition(":")
    return f"**{name}**{colon}{rest}.{more}"


def _quality(studio: Studio) -> Any:
    figure = None if studio.home is None else quality(studio.home)
    return None if figure is None else pictures.of_figure(figure)


def _no_quality(studio: Studio) -> str:
    if studio.home is not None and quality(studio.home) is not None:
        return ""
    return f"Nothing was measured yet: `python src/eval.py checkpoint={studio.home or 'RUN'} nfe=[1,2,4]`"


def _save(folder: Path, image: Any, drawing: Drawing, studio: Studio) -> Path:
    """A file of its own for each drawing, with a name that says what it is."""
    model = studio.opened()
    place = Path(tempfile.mkdtemp(dir=folder))
    path = place / f"{studio.name}_seed{drawing.wish.seed}_{drawing.sampler}{drawing.wish.steps or ''}.png"
    path.write_bytes(pictures.as_png(image, drawing, model.digest))
    return path
