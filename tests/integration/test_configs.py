"""Every option of every config group composes and builds; every experiment trains a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from flowanchor.programs.launch import prepare

CONF = Path(__file__).parents[2] / "conf"
PROGRAMS = sorted(path.stem for path in CONF.glob("*.yaml"))
OPTIONS = [
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in sorted(CONF.rglob("*.yaml"))
    if path.parent != CONF and path.parent.name not in ("hydra", "metric")
]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def compose_job(program: str, overrides: list[str]):
    prepare()
    GlobalHydra.instance().clear()
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        cfg = compose(program, overrides=overrides, return_hydra_config=True)
    cfg.hydra.runtime.output_dir = "outputs/test"
    cfg.hydra.job.num = 0
    return cfg


def resolved(cfg):
    """Everything resolves (the parts that Hydra fills at run time aside)."""
    plain = {k: v for k, v in cfg.items() if k != "hydra"}
    return {
        key: OmegaConf.to_container(value, resolve=True)
        for key, value in plain.items()
        if OmegaConf.is_config(value) and key != "callbacks" and key != "logger"
    }


def test_the_config_folder_is_found():
    assert PROGRAMS and "objective=facm" in OPTIONS and "objective/interval=expanded" in OPTIONS


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_composes(program):
    resolved(compose_job(program, []))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option):
    override = f"+{option}" if option.startswith(("experiment", "debugging")) and False else option
    resolved(compose_job("train", [override]))


@pytest.mark.parametrize(
    "group", sorted({o.partition("=")[0] for o in OPTIONS} - {"callbacks", "logger", "experiment", "debugging"})
)
def test_every_option_builds(group, tmp_path):
    """Instantiates what needs neither files nor several processes."""
    from hydra.utils import instantiate

    for option in [o for o in OPTIONS if o.partition("=")[0] == group]:
        cfg = compose_job("train", [option, "trainer.fast_dev_run=true"])
        node = OmegaConf.select(cfg, group.replace("/", "."))
        if option in ("teacher=checkpoint",) or "_target_" not in (node or {}):
            continue  # built from a file by tests of its own, or an option without an object
        assert instantiate(node) is not None, option


def test_every_experiment_is_known():
    assert {"digits_teacher", "digits_facm"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_a_batch(experiment, command, tiny):
    overrides = [f"experiment={experiment}"]
    cfg = compose_job("train", overrides)
    if cfg.teacher._target_.endswith("CheckpointVelocity"):
        command("train", *tiny, "objective=flow_matching", "trainer.max_steps=1", "name=teacher", "callbacks=default",
                "trainer.limit_val_batches=0", "ema=none")  # fmt: skip
        overrides.append("teacher.checkpoint=outputs/train/teacher")
    folder = command("train", *tiny, *overrides, "trainer.fast_dev_run=true")
    assert (folder / "outputs" / "train").exists()
