"""Makes the models that come with the package (src/flowanchor/shipped), by the commands that stand in their cards.

    python benchmarks/shipped.py                   train, evaluate, publish; goes on where it stopped; 20 CPU minutes
    python benchmarks/shipped.py --only emoji      one of them, and what it is distilled from
    python benchmarks/shipped.py --again FOLDER    train once more into FOLDER and compare the weights bit for bit

A card's commands, versions and commit come from the records of its run, its figures from the evaluation's file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from flowanchor.checkpoints import read_checkpoint  # noqa: E402
from flowanchor.plugins.data.emoji import CREDITS  # noqa: E402

SHIPPED = ROOT / "src" / "flowanchor" / "shipped"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PACKAGES = ("torch", "lightning", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Model:
    """A model: what it is called, and what is typed for it, `{runs}` being the folder of runs."""

    name: str
    run: str
    training: str
    evaluation: str = ""  # none: it is trained for another, and does not come along
    about: str = ""
    data: str = (
        "E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository\n"
        "(CC BY 4.0), as scikit-learn has it."
    )


MODELS = (
    Model(
        "digits_teacher",
        "digits_teacher",
        "experiment=digits_teacher",
        "sampler=flow sampler.solver=euler nfe=[1,2,4,8,50] repeats=3",
        "The flow model that `digits` was distilled from, for comparing: `flowanchor play digits digits_teacher`.",
    ),
    Model(
        "digits",
        "digits_facm",
        "experiment=digits_facm teacher.checkpoint={runs}/digits_teacher",
        "nfe=[1,2,4,8] repeats=3",
        "Scikit-learn's handwritten digits, 8 x 8 pixels in ten classes, drawn in one or two network calls.",
    ),
    Model("emoji_teacher", "emoji_teacher", "experiment=emoji_teacher"),
    Model(
        "emoji",
        "emoji_facm",
        "experiment=emoji_facm teacher.checkpoint={runs}/emoji_teacher",
        "nfe=[1,2,4] repeats=3",
        "Emoji in colour, 16 x 16 pixels: faces, animal faces and hearts, drawn in one to four network calls.\n"
        "There are 94, 31 and 20 of them to train on: docs/emoji.md shows the nearest beside each sample. Distances\n"
        "to so few pictures, of which the classes have unequal shares, say little: compare them with each other only.",
        f"{CREDITS}.",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("outputs/train"), help="the folder of the runs")
    parser.add_argument("--only", help="the name of one model")
    parser.add_argument("--again", type=Path, help="train into this folder instead, and compare")
    chosen = parser.parse_args()
    runs = chosen.again or chosen.runs
    names = [model.name for model in MODELS]
    if chosen.only and chosen.only not in names:
        parser.error(f"--only {chosen.only}: choose one of {', '.join(names)}")
    for model in MODELS:
        if chosen.only and model.name not in (chosen.only, f"{chosen.only}_teacher"):
            continue
        run = runs / model.run
        if not trained(run):
            program("train", *typed(model, runs), f"hydra.run.dir={run}")
        if chosen.again:
            compare(run, chosen.runs / model.run)
            continue
        if not model.evaluation:
            continue
        report = run / "eval" / "metrics.json"
        program("eval", f"checkpoint={run}", *model.evaluation.split(), f"hydra.run.dir={report.parent}")
        publish(model, run, report)


def trained(run: Path) -> bool:
    """Whether a run has made all of its steps."""
    if not (run / "checkpoints" / "last.ckpt").is_file():
        return False
    wanted = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"]
    return bool(read_checkpoint(run)["flowanchor"]["step"] >= wanted)


def typed(model: Model, runs: Path) -> list[str]:
    return shlex.split(model.training.format(runs=runs))


def program(name: str, *words: str) -> None:
    command = [sys.executable, str(ROOT / "src" / f"{name}.py"), *words]
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, check=True, env=ENVIRONMENT)


def publish(model: Model, run: Path, report: Path) -> None:
    """The published folder, its card with what was typed, and the evaluation that the card and the page show."""
    output = SHIPPED / model.name
    program(
        "convert", f"checkpoint={run}", f"output={output}", "format=huggingface", f"metrics={report}",
        f"name={model.name}", "overwrite=true",
    )  # fmt: skip
    measured = json.loads(report.read_text())
    measured["settings"]["checkpoint"] = f"{model.run}/checkpoints/last.ckpt"  # not where it lay on some machine
    (output / "metrics.json").write_text(json.dumps(measured, indent=1) + "\n")
    card = output / "README.md"
    text = card.read_text().replace('flowanchor.load("path/of/this/folder")', f'flowanchor.load("{model.name}")')
    card.write_text(text.replace(f"# {model.name}\n", f"# {model.name}\n\n{model.about}\n", 1) + made_by(model, run))


def made_by(model: Model, run: Path) -> str:
    """The section of a card that says how to make the model again."""
    record = json.loads((run / "provenance.json").read_text())
    assert record["git_dirty"] is False, f"{run} was trained with changes that no commit has"
    trained = " ".join(typed(model, Path("outputs/train")))
    words = " ".join(record["overrides"])
    assert words.split()[0] == trained.split()[0], f"{run} was trained by {words}"
    versions = ", ".join(f"{name} {record['packages'][name]}" for name in PACKAGES)
    return f"""
Means over 3 independent sets of 1,000 images; `metrics.json` has their spread, the floor and all settings.

## Made by

```bash
python src/train.py {trained}
python src/eval.py checkpoint=outputs/train/{model.run} {model.evaluation}
```

Commit {record["git_revision"][:12]}, seed 0, one thread of a CPU ({record["platform"]}), Python {record["python"]},
{versions}.
`python benchmarks/shipped.py` does it all, and `--again FOLDER` trains once more and compares the weights.

## Credits

Data: {model.data} Method: FACM, arXiv 2507.03738. Weights: Apache-2.0, as the package.
"""


def compare(again: Path, before: Path) -> None:
    """Whether two runs ended with the same weights, all of them."""
    first, second = (read_checkpoint(run) for run in (before, again))
    sets = {"state_dict": (first["state_dict"], second["state_dict"])}
    sets |= {name: (weights, second["ema"][name]) for name, weights in first["ema"].items()}
    for name, (ours, theirs) in sets.items():
        differing = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        print(f"{again.name}, {name}: {len(ours)} tensors, {len(differing)} differ ({platform.machine()})", flush=True)
        if differing:
            sys.exit(1)


if __name__ == "__main__":
    main()
