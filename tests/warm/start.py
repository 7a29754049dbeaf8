"""A server that is what `sys.executable` starts in tests: forks of one process that has imported the slow libraries.

Starting an interpreter that imports PyTorch, Lightning and Hydra costs ten seconds of a processor, a fork next to
nothing. So the tests' `sys.executable` (tests/conftest.py) is a small program (tests/warm/python.py) that asks this
server for a fork, whose search path, environment, streams, signals and exit are those of an interpreter of its own;
whatever that starts by its own `sys.executable`, as launchers do, comes from here too. Nothing of this project is
imported before the fork: every job may have another copy of it. Nothing is computed before the fork either: threads
would be lost. Tests that look at a fresh interpreter itself are marked `cold`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import inspect
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOW = (
    "diffusers.models.transformers.transformer_wan", "einops", "einops._torch_specific", "hydra", "lightning",
    "matplotlib.backends.backend_agg", "optuna", "safetensors.torch", "sklearn.datasets", "torch", "torchvision",
    "torch._decomp.decompositions_for_jvp", "torch._inductor.compile_fx", "torch.distributed.checkpoint",
    "torch.distributed.run",
)  # fmt: skip

# What libraries look at while they are imported: a job with others than the server's needs an interpreter of its own.
AT_IMPORT = (
    "HF_", "HOME", "LD_", "MPL", "PYTHON", "TORCHINDUCTOR_", "TORCH_COMPILE", "TORCH_LOGS", "TRANSFORMERS_", "TRITON_",
    "XDG_",
)  # fmt: skip
LATER = ("PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR")  # which Lightning sets where it is imported, in the tests too

FILE = "FLOWANCHOR_CPU_SECONDS"  # names the file of `pytest --cpu-seconds`; every process of the tests inherits it


def note(seconds: float, test: str) -> None:
    """What a test, or a process of its, took of a processor: one line, whole also where several processes write."""
    if FILE in os.environ:
        with open(os.environ[FILE], "a") as file:
            file.write(f"{seconds:.3f} {test}\n")


def spent() -> float:
    """Seconds of a processor: this process and those that it waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


class WarmStart:
    """In the process that runs the tests: the program to start, and the server, begun when it is first asked."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="warm"))
        self.server: subprocess.Popen[bytes] | None = None
        self.python = self.folder / "python"
        self.python.write_text(f"#!{sys.executable} -IS\n" + Path(__file__).with_name("python.py").read_text())
        self.python.chmod(0o755)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.folder / "socket"))
        self.listener.listen(100)
        self.asked, self._asking = os.pipe()
        threading.Thread(target=self._begin, args=(sys.executable,), daemon=True).start()

    def _begin(self, executable: str) -> None:
        ready = select.select([self.listener, self.asked], [], [])[0]
        if self.asked not in ready:
            number = self.listener.fileno()
            command = [executable, __file__, str(number), str(self.python)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            # Pipes, as the streams of most jobs are: whether one can seek is asked once, when an interpreter begins.
            self.server = subprocess.Popen(
                command, env=environment, pass_fds=[number],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip

    def begin(self) -> None:
        """Before anybody asks: a program that wants nothing."""
        with socket.socket(socket.AF_UNIX) as nobody:
            nobody.connect(str(self.folder / "socket"))

    def close(self) -> None:
        os.write(self._asking, b".")
        if self.server is not None:
            self.server.kill()
            sys.stderr.write(self.server.communicate()[1].decode(errors="replace"))
        shutil.rmtree(self.folder, ignore_errors=True)  # a fork may still be writing there


# ------------------------------------------------------------------------------------------------------- in the server


def serve(listener: socket.socket, executable: str) -> None:
    """Returns in each fork, when its job is done, and in the server, when the tests have ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests, which end it
    before = dict(os.environ)
    given = sensitive(before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about its own code
        for name in SLOW:
            importlib.import_module(name)
    importlib.import_module("cheaper").make_cheaper()  # the files beside this one
    warm_configs = importlib.import_module("warm_configs")
    warm_configs.compose_once()
    warm_configs.know_all()
    inspect.getmodule(compile("", "no file", "exec"))  # which looks at every module once, and remembers
    gc.freeze()
    imports_set = {name: value for name, value in os.environ.items() if name not in before}
    note(spent(), "(the warm start)")
    waiting: dict[int, tuple[int, str, socket.socket]] = {}  # a process's descriptor -> number, test, whom to tell
    tests = os.getppid()
    while os.getppid() == tests:
        asking = {connection: number for number, (_, _, connection) in waiting.items() if connection.fileno() >= 0}
        for ready in select.select([listener, *waiting, *asking], [], [], 5.0)[0]:
            if ready is listener:
                connection, _ = listener.accept()
                header, streams, _, _ = socket.recv_fds(connection, 8, 3, socket.MSG_WAITALL)
                content = connection.recv(*struct.unpack("q", header), socket.MSG_WAITALL) if header else b"{}"
                job = json.loads(content)
                if not job or sensitive(job["environment"]) != given:
                    tell(connection, 0)
                    connection.close()
                elif (child := os.fork()) == 0:
                    for number, (_, _, other) in waiting.items():
                        os.close(number)
                        other.close()
                    connection.close()
                    listener.close()
                    job["environment"] = imports_set | job["environment"]
                    become(job, streams, executable)
                    return  # and end as any interpreter does
                else:
                    with contextlib.suppress(OSError):  # it was faster
                        os.setpgid(child, child)
                    test = job["environment"].get("PYTEST_CURRENT_TEST", "(nobody)")
                    waiting[os.pidfd_open(child)] = child, test, connection
                    tell(connection, child)
                for stream in streams:
                    os.close(stream)
            elif ready in waiting:
                child, test, connection = waiting.pop(ready)
                os.close(ready)
                _, status, used = os.wait4(child, 0)
                tell(connection, os.waitstatus_to_exitcode(status))
                note(used.ru_utime + used.ru_stime, test)
                connection.close()
            elif asking[ready] in waiting and not ready.recv(1):  # whoever asked was killed, and so is the job
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(waiting[asking[ready]][0], signal.SIGKILL)
                ready.close()


def sensitive(environment: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(AT_IMPORT) and key not in LATER}


def tell(connection: socket.socket, number: int) -> None:
    try:
        connection.sendall(struct.pack("q", number))
    except OSError:
        pass  # whoever asked was killed, and closed it


def become(job: dict[str, Any], streams: list[int], executable: str) -> None:
    """Run a job in this process."""
    os.setpgid(0, 0)
    os.getppid = parent_of(job["process"])
    for number, ignored in job["signals"].items():
        usual = signal.default_int_handler if int(number) == signal.SIGINT else signal.SIG_DFL
        signal.signal(int(number), signal.SIG_IGN if ignored else usual)
    for source, target in zip(streams, (0, 1, 2), strict=True):
        os.dup2(source, target)
        os.close(source)
    os.chdir(job["folder"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(job["environment"])
    time.tzset()
    tempfile.tempdir = None
    sys.executable = executable
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # what the libraries would take apart at exit
    if sys.dont_write_bytecode:  # nothing beside the sources, then, but the next fork need not compile them again
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(executable).with_name("bytecode"))
    options, words = job["options"], job["words"]
    if "-u" in options:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    if "-W" in options:
        warnings.simplefilter("ignore")
        sys.warnoptions.append("ignore")
    ahead = [path for path in job["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    own = [path for path in sys.path[1:] if path not in paths]
    importlib.invalidate_caches()
    sys.modules["warm_configs"].forget_plugins([os.getcwd(), *ahead])
    kind, *rest = words
    if kind == "-m":
        sys.path[:] = [os.getcwd(), *ahead, *own]
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-c":
        sys.path[:] = ["", *ahead, *own]
        sys.argv = ["-c", *rest[1:]]
        code = compile(rest[0], "<string>", "exec")
    else:
        main.__file__ = os.path.abspath(kind)
        sys.path[:] = [os.path.dirname(main.__file__), *ahead, *own]
        sys.argv = words
        code = compile(Path(kind).read_bytes(), main.__file__, "exec")
    exec(code, main.__dict__)


def parent_of(asking: int) -> Callable[[], int]:
    """`os.getppid`: in this process, the parent of the program that asked for it."""
    own, getppid = os.getpid(), os.getppid

    def parent() -> int:
        if os.getpid() != own:
            return getppid()
        try:
            return int(Path(f"/proc/{asking}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return 1

    return parent


def end() -> None:
    """The last function at exit: not to take apart all that was imported, which costs more than most jobs do."""
    if ended is not None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass  # nobody reads it any more
        os._exit(ended)


ended: int | None = None

if __name__ == "__main__":
    atexit.register(end)  # first, so that it is the last one called
    try:
        serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
        ended = 0
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        ended = 0 if error.code is None else error.code & 0xFF if isinstance(error.code, int) else 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        ended = 1
