"""How every program starts: Hydra composes the configuration, and what a user did wrong is told in one sentence.

    @program("train")
    def main(cfg: DictConfig) -> float | None: ...

`main()` then reads the command line. `HYDRA_FULL_ERROR=1` or `debug=true` shows the traceback instead of the sentence.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

import flowanchor
from flowanchor.base.causes import unwrapped
from flowanchor.base.moved import use_current_names
from flowanchor.base.paths import from_here
from flowanchor.base.processes import is_first
from flowanchor.base.rank_zero import is_first as speaks_for_all
from flowanchor.base.signals import Interrupted, current, end_now, listening, name_of, say
from flowanchor.base.start import LAUNCHER, launcher
from flowanchor.programs import slurm
from flowanchor.programs.composing import composed_once
from flowanchor.programs.folders import register_resolvers
from flowanchor.programs.messages import explain
from flowanchor.programs.plugin_path import register_plugin_path
from flowanchor.programs.texts import quoted

T = TypeVar("T")
Task = Callable[[DictConfig], T]

FULL_ERROR = "HYDRA_FULL_ERROR"
CONFIG_PATH = "pkg://flowanchor.conf"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the user's own settings, by either name
CHILDREN = 20.0  # seconds that the other processes of a run, which have all saved, have for their end

# Warnings of libraries that no user can do anything about: about their own code, or about what is meant to be so.
LIBRARY_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"`torch\.jit\.\w+` is deprecated",
    r"Found \d+ module\(s\) in eval mode",  # the frozen teacher
    r"Your `IterableDataset` has `__len__` defined",  # its workers share the batches (data=webdataset)
    r"Total length of `list` across ranks is zero",  # data without held-out samples
    r"Checkpoint directory .* exists and is not empty",  # that is how a run resumes
    r"Mismatch dtype between input and weight",  # norms keep float32 beside bfloat16
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # steps count, not epochs
)


def prepare() -> None:
    """Register the resolvers and the search path of plugin packages: for programs, and for `hydra.compose` anywhere."""
    register_resolvers()
    register_plugin_path()


def program(
    config_name: str, config_path: str = CONFIG_PATH, unfinished: str = "", doing: str = ""
) -> Callable[[Task[T]], Callable[[], None]]:
    """Turn `main(cfg)` into a command-line program that composes `config_name`.yaml of `config_path`.

    The program returns None: what `main` returns is for sweepers (`-m`), and a console script would take it for an
    exit code. Exit codes: 0, 1 for an error, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.

    Args:
        unfinished: ends the sentence `Stopped by SIGNAL ...` where `main` has said nothing else about its state.
        doing: begins the line, before the folder, that is printed at once, as libraries take seconds to import.
    """

    def decorate(main: Task[T]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            prepare()
            _let_memory_grow()
            for stream in (sys.stdout, sys.stderr):  # a console of another encoding shows what it lacks as its number
                with suppress(AttributeError, ValueError):
                    stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
            sys.argv[1:] = quoted(sys.argv[1:])
            _check_command_line(sys.argv[1:])
            for message in LIBRARY_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            own = os.environ.get(FULL_ERROR)
            show_traceback = own == "1" or _debug_requested(sys.argv[1:])

            @functools.wraps(main)
            def task(cfg: DictConfig) -> T:
                # Child processes see what the user had set, not what we set below. A job of a cluster begins here.
                with (
                    listening(slurm.notices()) as listener,
                    _environment(FULL_ERROR, own),
                    _environment(LAUNCHER, launcher()),
                ):
                    listener.state = unfinished
                    _fix_run_folder()
                    _announce(doing)
                    try:
                        use_current_names(cfg)  # of plugin packages that were written for an older version
                        return main(cfg)
                    except Interrupted as stop:
                        _stop(stop)
                        raise
                    except BaseException as raised:
                        error = unwrapped(raised)
                        if not isinstance(error, Exception):
                            raise
                        if not (show_traceback or cfg.get("debug", False)):
                            # A sweeper must see the error; a single run ends here, before Hydra adds its own lines.
                            if HydraConfig.get().mode == RunMode.MULTIRUN:
                                _tell_failed_job(error, config_name, config_path)
                            else:
                                _exit_with(error, config_name, config_path)
                        if error is raised:
                            raise
                        raise error from error.__cause__  # its wrapper holds the tracebacks of all ranks

            start = hydra.main(version_base="1.3", config_path=config_path, config_name=config_name)(task)
            with listening(slurm.notices()):
                try:
                    # Hydra hands its errors over instead of printing them.
                    with composed_once(), _environment(FULL_ERROR, "1"):
                        start()
                    _leave_process_group()
                except Interrupted as stop:
                    _stop(stop)
                    raise
                except KeyboardInterrupt:
                    if is_first():
                        say(f"Stopped by {name_of(signal.SIGINT)}.")
                    sys.exit(130)
                except Exception as error:
                    if not show_traceback:
                        _exit_with(error, config_name, config_path)
                    raise

        return run

    return decorate


def _let_memory_grow() -> None:
    """Have CUDA's allocator extend its blocks in place, unless the user has settings for it.

    Steps need tensors of many sizes in turn; in blocks of fixed sizes a share of the card lies idle between them. Read
    by PyTorch when it first allocates on a GPU, so it is set before anything does, for child processes as well.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[1]] = "expandable_segments:True"


def _stop(stop: Interrupted) -> None:
    """Tell why the program ends, once, and leave what it shares with others."""
    if stop.done:
        return
    stop.done, listener = True, current()
    notice = stop.signum in slurm.notices()
    submitter = listener.previous.get(stop.signum)  # submitit has its own way of requeueing
    if notice and not callable(submitter):
        listener.tell(f"{stop.sentence.rstrip('.')}, {slurm.requeue()}.")
    listener.tell(stop.sentence)
    for child in listener.children:
        try:
            child.wait(timeout=CHILDREN)
        except subprocess.TimeoutExpired:
            child.kill()
    if notice and callable(submitter):
        submitter(stop.signum, None)
    if stop.together:
        _leave_process_group()
    elif _process_group() is not None:  # which other processes may not have left
        end_now(128 + stop.signum)


def _process_group() -> Any:
    distributed = sys.modules.get("torch.distributed")
    several = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if several else None


def _leave_process_group() -> None:
    """End the process group's threads: those that meet the interpreter's end can abort a process that is done."""
    distributed = _process_group()
    if distributed is not None:
        gc.collect()  # sharded networks hold the group
        distributed.destroy_process_group()


def _exit_with(error: Exception, config_name: str, config_path: str) -> None:
    """Print the sentence for an error that a user can act on and exit; return for any other error."""
    GlobalHydra.instance().clear()
    sentence = explain(error, config_name, config_path, sys.argv[1:])
    if sentence is not None:
        sys.stdout.flush()
        print(f"Error: {sentence}", file=sys.stderr)
        sys.exit(1)
    say("flowanchor did not expect this error: please report it, with the command and all that follows.")


def _tell_failed_job(error: Exception, config_name: str, config_path: str) -> None:
    """Say at once, on the screen and in the job's log, why a job of a sweep failed; the others go on."""
    job, overrides = HydraConfig.get().job, HydraConfig.get().overrides.task
    hydra_state = GlobalHydra.instance().hydra
    sentence = explain(error, config_name, config_path, list(overrides))
    GlobalHydra.instance().hydra = hydra_state  # what explains it composes anew
    logging.getLogger("flowanchor").error(
        f"Job {job.num} failed ({' '.join(overrides)}): {sentence or f'{type(error).__name__}: {error}'}"
    )


def _announce(doing: str) -> None:
    """One line about what begins and where, by the first process."""
    if doing and speaks_for_all():
        print(f"{doing} {from_here(HydraConfig.get().runtime.output_dir)}", flush=True)


def _check_command_line(arguments: list[str]) -> None:
    """Exit with a sentence where Hydra's own parser would print its usage and exit with code 2."""
    parser = get_args_parser()
    if "--version" in arguments:  # Hydra would tell its own
        print(f"flowanchor {flowanchor.__version__}")
        sys.exit(0)

    def refuse(message: str) -> NoReturn:
        print(
            f"Error: Cannot read the command line ({message}): write Hydra's options, such as -m, first, and every "
            "setting as key=value without dashes.",
            file=sys.stderr,
        )
        sys.exit(1)

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)


def _debug_requested(arguments: list[str]) -> bool:
    return any(argument.lower() in ("debug=true", "+debug=true", "++debug=true") for argument in arguments)


def _fix_run_folder() -> None:
    """Write the run folder into Hydra's own record as a plain path.

    Lightning starts its other processes with `hydra.run.dir` of that record, where `name` can no longer be looked up.
    """
    record: Any = HydraConfig.get()
    if record.mode == RunMode.RUN:
        with read_write(record), open_dict(record):
            record.run.dir = record.runtime.output_dir


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    _set(name, value)
    try:
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
