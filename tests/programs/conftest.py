"""A toy program with its own little configuration, run the way a user runs one: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import os
import signal
import sys
import time
from pathlib import Path

import hydra
from flowanchor.errors import ConfigError
from flowanchor.programs.launch import program

class Net:
    def __init__(self, depth, width):
        self.depth, self.width = depth, width
        if depth < 0:
            raise ConfigError("backbone.depth=-1 is negative: choose a depth of at least 1.")

class OfRanks(BaseException):  # as torch.distributed.checkpoint wraps what each rank raised
    failures = {0: (OSError(28, "No space left on device"), None)}

def inner(width):
    return Net(1, wrong=2)  # a TypeError that is not the user's

@program("toy", config_path=str(Path(__file__).parent / "conf"))
def main(cfg):
    folder = hydra.core.hydra_config.HydraConfig.get().runtime.output_dir
    print("FOLDER", folder)
    print("RUN_DIR", hydra.core.hydra_config.HydraConfig.get().run.dir)
    print("FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR"))
    print("ALLOCATOR", os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    if cfg.fail == "config":
        raise ConfigError("batch_size=0 is\\n too small: choose at least 1.")
    if cfg.fail == "bug":
        raise RuntimeError("a defect")
    if cfg.fail == "interrupt":
        raise KeyboardInterrupt
    if str(cfg.fail).startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, cfg.fail))
        time.sleep(cfg.pause)
    if cfg.fail == "ranks":
        raise OfRanks
    if cfg.fail == "disk":
        Path(folder, "program.log", "below").write_text("x")
    net = hydra.utils.instantiate(cfg.backbone)
    print("NET", net.depth, net.width, cfg.objective.shortcut.power, cfg.checkpoint if cfg.needs_checkpoint else "")
    return float(net.depth)

if __name__ == "__main__":
    main()
"""

CONF = {
    "toy.yaml": """
defaults:
  - _self_
  - hydra: default
  - backbone: small
  - objective: facm
  - optional experiment: null
name: null
debug: false
fail: null
seed: 0
needs_checkpoint: false
pause: 60
checkpoint: ???
trainer:
  max_steps: 10
  precision: 32
""",
    "backbone/small.yaml": "{_target_: __main__.Net, depth: 2, width: 8}",
    "backbone/large.yaml": "{_target_: __main__.Net, depth: 9, width: '${data.channels}'}",
    "backbone/broken.yaml": "{_target_: nowhere.to.be.Found, depth: 9}",
    "backbone/short.yaml": "{_target_: __main__.Net, depth: 9}",
    "backbone/defect.yaml": "{_target_: __main__.inner, width: 9}",
    "objective/facm.yaml": "defaults:\n  - shortcut: consistency\n",
    "objective/shortcut/consistency.yaml": "power: 0.5\n",
    "objective/shortcut/other.yaml": "power: 1.0\n",
}


SET_BY_PROGRAMS = ("HYDRA_FULL_ERROR", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class Toy:
    """Runs the toy program in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "program.py").write_text(PROGRAM)
        conf = {**CONF, "hydra/default.yaml": (ROOT / "conf" / "hydra" / "default.yaml").read_text()}
        for name, text in conf.items():
            path = folder / "conf" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run([sys.executable, "program.py", *arguments], **environment)

    def run(self, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in SET_BY_PROGRAMS}
        paths = [str(ROOT / "src"), environment.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            words,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            env={**inherited, **environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        )

    def sentence(self, *arguments: str, **environment: str) -> str:
        """What a failing command prints on stderr: one line, and exit code 1."""
        done = self(*arguments, **environment)
        assert done.returncode == 1, done
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr
        return lines[0].removeprefix("Error: ")


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    return Toy(tmp_path)


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that evaluate often: the plot of quality against calls is not drawn."""
    monkeypatch.setattr("flowanchor.programs.evaluate.quality_plot", lambda report, path: None)
