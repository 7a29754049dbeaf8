"""An error is put down to a setting only where the failing call was given it, or the message names it."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from flowanchor.programs.launch import prepare
from flowanchor.programs.suspects import blame

INNOCENT = ["data.num_workers=0", "data.num_classes=0", "trainer.limit_val_batches=0", "seed=0"]


def composed(overrides):
    prepare()
    GlobalHydra.instance().clear()
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        return compose("train", overrides, return_hydra_config=True)


def raised(error, call):
    with pytest.raises(error) as found:
        call()
    return found.value


def broken_file():
    b"caf\xe9".decode()


def groups(num_channels, num_groups):
    raise ValueError(f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups})")


@pytest.mark.parametrize(
    "error",
    [
        raised(UnicodeDecodeError, broken_file),
        raised(ValueError, lambda: groups(16, 32)),
        raised(TypeError, lambda: len(3)),
        raised(ZeroDivisionError, lambda: 1 / 0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_differs_from_its_default_is_no_suspect(error):
    assert blame(error, INNOCENT, composed) is None


def optimise(lr, betas):
    return 0.0 <= lr


def test_what_the_failing_call_was_given_is():
    error = raised(TypeError, lambda: optimise(lr="fast", betas=()))
    said = blame(error, ["optimizer.lr=fast", *INNOCENT], composed)
    assert said.startswith("optimizer.lr=fast cannot be used here") and "the default is optimizer.lr=0.001" in said
    assert blame(error, ["ema.lr=fast", *INNOCENT], composed) is None or "num_workers" not in said


def test_what_the_message_names_is():
    def call():
        raise ValueError("You selected an invalid accelerator name: 'warp'")

    said = blame(raised(ValueError, call), ["trainer.accelerator=warp", *INNOCENT], composed)
    assert said.startswith("trainer.accelerator=warp cannot be used here")


def test_what_was_being_built_is():
    settings = {"backbone": {"_target_": "torch.nn.Linear", "in_features": -3, "out_features": 2}}
    cfg = composed([])
    error = raised(InstantiationException, lambda: instantiate({**settings}["backbone"]))
    assert cfg is not None and blame(error, INNOCENT, composed) is None
