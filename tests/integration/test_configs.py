"""Every option of every config group composes and builds; those of digits train a batch (test_recipes: the others)."""

from __future__ import annotations

from functools import cache
from itertools import chain, zip_longest
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from flowanchor.checkpoints.formats import formats
from flowanchor.errors import FlowAnchorError
from flowanchor.programs.launch import prepare

CONF = Path(__file__).parents[2] / "conf"
PROGRAMS = sorted(path.stem for path in CONF.glob("*.yaml"))
OPTIONS = [
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in sorted(CONF.rglob("*.yaml"))
    if path.parent != CONF and path.parent.name not in ("hydra", "metric", "format")
]
MANY = ("experiment", "debugging", "launcher", "hparams_search")  # options that set other groups, or Hydra's
ALONE = [option for option in OPTIONS if option.partition("=")[0] in MANY]
BESIDE = {"backbone/description": ("backbone=diffusers",)}  # groups of an option that is not the default
# Composing is what takes long here. Those that are within another group come when that has its default again.
AFTER = {"objective/": "objective", "jvp/": "jvp", "backbone/": "backbone"}
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def _rounds() -> list[list[str]]:
    """Every option of the other groups once, next to those of as many groups as can be chosen at once."""
    groups: dict[str, list[list[str]]] = {}
    for option in OPTIONS:
        group = option.partition("=")[0]
        if group not in MANY:
            groups.setdefault(group, []).append([*BESIDE.get(group, ()), option])
    for group, choices in groups.items():
        outer = next((outer for inner, outer in AFTER.items() if group.startswith(inner)), None)
        choices[:0] = [[] for _ in groups.get(outer, ())]
    return [[*chain(*found)] for found in zip_longest(*groups.values(), fillvalue=())]


ROUNDS = _rounds()


def round_of(option: str) -> list[str]:
    return next(options for options in ROUNDS if option in options) if option not in ALONE else [option]


@cache
def compose_job(program: str, *overrides: str):
    """A configuration, which tests only read."""
    prepare()
    GlobalHydra.instance().clear()
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        cfg = compose(program, overrides=list(overrides), return_hydra_config=True)
    cfg.hydra.runtime.output_dir = "outputs/test"
    cfg.hydra.job.num = 0
    return cfg


def chosen(option: str) -> tuple[str, ...]:
    """What is typed to choose an option."""
    return (*BESIDE.get(option.partition("=")[0], ()), option)


def resolved(cfg):
    """Everything resolves, but for what asks Hydra for the run folder while a program runs."""
    for key, value in cfg.items():
        if key not in ("hydra", "callbacks", "logger") and OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True)


def test_the_config_folder_is_found():
    assert PROGRAMS and "objective=facm" in OPTIONS and "objective/interval=expanded" in OPTIONS
    assert {*ALONE, *chain(*ROUNDS)} == set(OPTIONS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_composes(program):
    resolved(compose_job(program))


@pytest.mark.parametrize("option", ALONE)
def test_every_option_of_many_groups_composes(option):
    resolved(compose_job("train", option))


@pytest.mark.parametrize("options", ROUNDS, ids=" ".join)
def test_options_of_different_groups_compose_together(options):
    resolved(compose_job("train", *options))


@pytest.mark.slow
@pytest.mark.parametrize("option", sorted(set(OPTIONS) - set(ALONE)))
def test_every_option_composes(option):
    """By itself, beside what is the default."""
    resolved(compose_job("train", *chosen(option)))


@pytest.mark.parametrize(
    "group", sorted({o.partition("=")[0] for o in OPTIONS} - {"callbacks", "logger", "experiment", "debugging"})
)
def test_every_option_builds(group):
    """Everything instantiates; an option that needs a file or a folder of the user's says which setting to add."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    for option in [o for o in OPTIONS if o.partition("=")[0] == group]:
        node = OmegaConf.select(compose_job("train", *round_of(option)), group.replace("/", "."))
        if "_target_" not in (node or {}):
            continue  # an option without an object of its own: none, strategy=auto, sampler=from_checkpoint
        try:
            assert instantiate(node, _convert_="all") is not None, option
        except InstantiationException as error:
            assert isinstance(error.__cause__, FlowAnchorError) and "add " in str(error.__cause__), option


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "format").glob("*.yaml")))
def test_every_format_of_weights_builds(name):
    """By its option, for writing; without arguments, for reading, under the name that its option has."""
    from hydra.utils import instantiate

    made = instantiate(compose_job("convert", f"format={name}", "codec=sd_vae").format, _convert_="all")
    assert made.name == name and made.suffix is not None and type(made)().name == name
    assert name in [one.name for one in formats()]


def test_every_experiment_is_known():
    assert {"digits_teacher", "digits_facm"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.startswith("digits")])
def test_every_experiment_of_digits_trains_a_batch(experiment, command, tiny):
    overrides = [f"experiment={experiment}"]
    cfg = compose_job("train", *overrides)
    if cfg.teacher._target_.endswith("CheckpointVelocity"):
        command("train", *tiny, "objective=flow_matching", "trainer.max_steps=1", "name=teacher", "callbacks=default",
                "trainer.limit_val_batches=0", "ema=none")  # fmt: skip
        overrides.append("teacher.checkpoint=outputs/train/teacher")
    folder = command("train", *tiny, *overrides, "trainer.fast_dev_run=true")
    assert (folder / "outputs" / "train").exists()
