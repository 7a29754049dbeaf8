"""`flowanchor PROGRAM ...`: one command in front of all programs.

It imports no library that takes time. A program takes the place of this process (`os.execv`), because Lightning starts
the other processes of a run by the command line of the first one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from flowanchor.base.quoting import in_quotes
from flowanchor.base.version import VERSION
from flowanchor.programs import options

DOCS = "docs/ of the repository"
WORDS = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


@dataclass(frozen=True)
class Program:
    """What `flowanchor NAME --help` says of a program, before anything is imported."""

    line: str
    examples: tuple[str, ...]
    settings: tuple[str, ...]  # those most used; with a comment of ours where the program's file has none
    place: str = ""  # the setting that words in front are, where they are paths
    several: bool = False
    docs: str = ""


PROGRAMS = {
    "train": Program(
        "Train a network; the same command resumes.",
        (
            "flowanchor train",
            "flowanchor train data=image_folder data.root=FOLDER data.size=32 data.num_classes=2",
            "flowanchor train experiment=digits_facm teacher.checkpoint=outputs/train/digits_teacher",
            "flowanchor train -m objective=facm,flow_matching seed=0,1     every combination, one after the other",
        ),
        ("name", "seed", "trainer.max_steps: steps of the optimizer", "data.batch_size: samples per process",
         "optimizer.lr: the rate", "trainer.devices: GPUs, or processes on a CPU", "compile", "threads"),
        docs="docs/configuration.md",
    ),
    "sample": Program(
        "Draw pictures with a trained network.",
        (
            "flowanchor sample outputs/train/NAME sampler.steps=2 num_samples=64",
            "flowanchor sample outputs/train/NAME classes=[3,7] out=pictures",
        ),
        ("num_samples", "classes", "prompt", "seed", "sampler.steps: steps of the sampler", "out", "trajectory", "npz"),
        "checkpoint",
        docs="docs/command.md",
    ),
    "eval": Program(
        "Measure quality: Frechet distance, precision, recall and others.",
        ("flowanchor eval outputs/train/NAME nfe=[1,2,4]",),
        ("nfe", "num_samples", "repeats", "reference", "seed", "batch_size"),
        "checkpoint",
        docs="docs/evaluation.md",
    ),
    "encode": Program(
        "Turn images into latents of a codec, and captions into embeddings, once.",
        ("flowanchor encode data=image_folder data.root=FOLDER codec=vavae codec.weights=vavae.pt out=LATENTS",),
        ("out", "batch_size"),
        docs="docs/data.md",
    ),
    "convert": Program(
        "Read released checkpoints; write one file, or a folder to publish.",
        (
            "flowanchor convert checkpoint=outputs/train/NAME output=model.safetensors",
            "flowanchor convert checkpoint=outputs/train/NAME output=FOLDER format=huggingface",
            "flowanchor convert inspect=FILE",
        ),
        ("checkpoint", "output", "format: of what is written", "ema_profile", "overwrite"),
        docs="docs/checkpoints.md",
    ),
    "report": Program(
        "Put training runs side by side: a table, curves, one page.",
        ("flowanchor report outputs/train", "flowanchor report outputs/train/a outputs/train/b title='Two runs'"),
        ("title", "name"),
        "runs",
        several=True,
    ),
    "demo": Program(
        "Train a teacher and a one-step student on digits, measure both, write a page.",
        ("flowanchor demo", "flowanchor demo quick=true"),
        ("quick", "seed"),
    ),
}  # fmt: skip
PLAY = "A page on this machine to draw with a model: steps, seeds, teacher and student."
MODULES = {"eval": "evaluate"}


# ------------------------------------------------------------------------------------------------------ the programs


def overrides(program: str, words: Sequence[str]) -> list[str]:
    """Words as a program takes them: paths in front become its setting, in Hydra's quotes."""
    entry = PROGRAMS[program]
    count = 0
    while entry.place and count < (len(words) if entry.several else 1) and words[count:] and is_place(words[count]):
        count += 1
    places, rest = list(words[:count]), list(words[count:])
    if not places:
        return rest
    quoted = [in_quotes(os.path.expanduser(place)) for place in places]
    value = quoted[0] if len(quoted) == 1 else f"[{','.join(quoted)}]"
    return [f"{entry.place}={value}", *rest]


def is_place(word: str) -> bool:
    """Whether a word is a path, or the name of a model, and no setting or option."""
    if not word or word.startswith("-") or (word.startswith("~") and not word.startswith("~/")):
        return False
    return "=" not in word or Path(word).exists()


def start(module: str, words: Sequence[str]) -> None:
    """Become `python -m module words`."""
    sys.stdout.flush()
    # Typed as a command, nobody's folder is searched for modules; as `python -m flowanchor`, this one is.
    apart = ["-P"] if sys.version_info >= (3, 11) and Path(sys.argv[0]).name != "__main__.py" else []
    os.execv(sys.executable, [sys.executable, *apart, "-m", module, *words])


def run(program: str, words: Sequence[str]) -> None:
    """Tell about a program, or become it."""
    if any(word in ("-h", "--help") for word in words):
        click.echo(about(program), nl=False)
        return
    start("flowanchor.programs", [program, *overrides(program, words)])


def about(program: str) -> str:
    """Examples, the settings most used, groups: what a newcomer needs first."""
    entry, known = PROGRAMS[program], options.settings(program)
    where = {"checkpoint": "CHECKPOINT ", "runs": "FOLDER ... "}.get(entry.place, "")
    lines = [f"Usage: flowanchor {program} {where}[KEY=VALUE ...]", "", f"  {entry.line}", ""]
    lines += [f"  {example}" for example in entry.examples]
    lines += ["", "Settings most used (all of them: --cfg job; what an option has: flowanchor list GROUP):"]
    rows = []
    for setting in entry.settings:
        name, _, told = setting.partition(": ")
        default, comment = known.get(name, ("", ""))
        rows.append((f"{name}={default}" if default else name, told or comment))
    lines += _table(rows)
    choices = options.chosen_groups(program)
    if choices:
        lines += ["", "Groups of options, as group=option:"]
        lines += _table(
            [(f"{group}={default}" if default else group, told) for group, (default, told) in choices.items()]
        )
    lines += ["", f"More: {entry.docs or DOCS}. Hydra's own options, such as -m for sweeps: --hydra-help."]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[tuple[str, str]], indent: str = "  ") -> list[str]:
    width = min(30, max((len(name) for name, _ in rows), default=0))
    return [f"{indent}{name:<{width}}  {told}".rstrip() for name, told in rows]


# ------------------------------------------------------------------------------------------------------- completion


def complete(program: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Groups, their options and the program's own settings, from the names of files; a path where one is in front."""

    def answer(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        typed = list(ctx.params.get(parameter.name or "") or ())
        # Bash hands `group=opt` over as three words, other shells as one.
        group, equals, begun = incomplete.partition("=")
        prefix = f"{group}="
        if not equals and typed[-1:] == ["="]:
            group, equals, begun, prefix = (typed[-2] if len(typed) > 1 else ""), "=", incomplete, ""
        elif not equals and typed and typed[-1].endswith("="):
            group, equals, begun, prefix = typed[-1][:-1], "=", incomplete, ""
        if equals:
            names = [option.name for option in options.options() if option.group == group.lstrip("+")]
            return [CompletionItem(f"{prefix}{name}") for name in names if name.startswith(begun)]
        groups = [group for group in options.groups() if group.split("/")[0] in options.chosen_groups(program)]
        keys = dict.fromkeys([*groups, *options.settings(program)])
        found = [CompletionItem(f"{key}=") for key in keys if f"{key}=".startswith(incomplete)]
        if PROGRAMS[program].place and not typed and not found:
            return [CompletionItem(incomplete, type="file")]
        return found

    return answer


def complete_group(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Groups of options."""
    return [CompletionItem(group) for group in options.groups() if group.startswith(incomplete)]


# ------------------------------------------------------------------------------------------------------- the command


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="flowanchor PROGRAM --help says how to use one.  First steps: flowanchor demo quick=true",
)
@click.version_option(VERSION, "--version", prog_name="flowanchor", message="%(prog)s %(version)s")
def command() -> None:
    """Train, distil, measure and draw with flow models in one or two network calls."""


def _program(name: str) -> click.Command:
    words = click.Argument(["words"], nargs=-1, type=click.UNPROCESSED, shell_complete=complete(name))
    return click.Command(
        name, params=[words], add_help_option=False, context_settings=dict(WORDS), short_help=PROGRAMS[name].line,
        callback=lambda words: run(name, words),
    )  # fmt: skip


for _name in PROGRAMS:
    command.add_command(_program(_name))


@command.command(context_settings=dict(WORDS), add_help_option=False, short_help=PLAY)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def play(words: tuple[str, ...]) -> None:
    if find_spec("flowanchor.programs.play") is None or find_spec("gradio") is None:
        raise click.ClickException('The page needs more than the package: pip install "flowanchor[play]"')
    start("flowanchor.programs.play", words)


@command.command("list", short_help="What can be chosen: groups, options, experiments, plugin packages.")
@click.argument("group", required=False, shell_complete=complete_group)
def listed(group: str | None) -> None:
    """Groups and their options, one line each; GROUP: those of one, such as objective or objective/shortcut."""
    found = [
        option
        for option in options.options()
        if group is None or option.group == group or option.group.startswith(f"{group}/")
    ]
    if not found:
        close = get_close_matches(group or "", options.groups(), n=1, cutoff=0.5)
        advice = f"Did you mean '{close[0]}'?" if close else f"The groups: {', '.join(options.groups())}."
        raise click.ClickException(f"There is no group '{group}'. {advice}")
    told: dict[str, str] = {}
    for program in PROGRAMS:  # train.py's words count first
        for name, (_, comment) in options.chosen_groups(program).items():
            told.setdefault(name, comment)
    width = max(len(option.name) for option in found)
    previous = None
    for option in found:
        if option.group != previous:
            click.echo(("" if previous is None else "\n") + f"{option.group}=   {told.get(option.group, '')}".rstrip())
            previous = option.group
        origin = f" [{option.package}]" if option.package else ""
        click.echo(f"  {option.name:<{width}}  {option.line}{origin}".rstrip())
    if group is None:
        packages = options.packages()
        click.echo("\nPlugin packages:" + ("" if packages else " none is installed"))
        for name, line in packages.items():
            click.echo(f"  {name:<{width}}  {line}".rstrip())


@command.command(context_settings=dict(WORDS), short_help="What this machine has, and what a command line would need.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def check(words: tuple[str, ...]) -> None:
    """What this machine has: PyTorch, devices, kernels, extras, weights.

    `flowanchor check train KEY=VALUE ...`: what that training would need, without starting it.
    """
    if words and words[0] != "train":
        raise click.ClickException(f"'{words[0]}' cannot be checked: flowanchor check, or flowanchor check train ...")
    start("flowanchor.programs.check", words[1:] if not words else ["train", *words[1:]])


@command.command(short_help="The versions of flowanchor and of what it stands on.")
def version() -> None:
    """The versions of flowanchor, Python and the libraries that matter."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    click.echo(f"flowanchor {VERSION}")
    click.echo(f"Python {sys.version.split()[0]}")
    for name in ("torch", "lightning", "hydra-core", "diffusers"):
        try:
            click.echo(f"{name} {installed(name)}")
        except PackageNotFoundError:
            click.echo(f"{name} is not installed")


def main() -> Any:
    """The command line; errors are one sentence and exit code 1."""
    try:
        return command.main(prog_name="flowanchor", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        sys.exit(1)
    except click.Abort:
        sys.exit(130)
