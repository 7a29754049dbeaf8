"""Runs readers on files that a stranger made, and watches: what is run, written or connected to, time, memory."""

from __future__ import annotations

import os
import random
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowanchor.errors import FlowAnchorError

scale = float(os.environ.get("FUZZ_SCALE", "1"))  # more of the same cases, where chance makes them
TRACE = Path("/tmp/flowanchor-was-here")  # what `Explosive` leaves behind
SECONDS = 10.0  # of a processor: the clock depends on what else a machine does
MEMORY = 1 << 30  # bytes beyond those that are taken already

RUNS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "pty.", "socket.", "ctypes.",
        "os.remove", "os.rename", "os.mkdir", "os.link", "os.symlink", "shutil.", "urllib.", "webbrowser.")  # fmt: skip

# How a reader, or what it calls, says that it did not get the memory which a file made it ask for.
STARVED = ("MemoryError", "more memory than there is", "allocate", "out of memory")


class Watch:
    """What happens in this process while it is armed; an audit hook stays for ever, so there is one."""

    def __init__(self) -> None:
        self.armed, self.seen, self.inside = False, [], ""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event.startswith(RUNS):
            self.seen.append((event, arguments))
        elif event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
            if writes and not str(path).startswith(self.inside):
                self.seen.append((event, arguments))
        elif event == "exec" and getattr(arguments[0], "co_filename", "<string>").startswith("<string>"):
            self.seen.append((event, arguments))

    @contextmanager
    def on(self, inside: Path) -> Iterator[None]:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
        limits = resource.getrlimit(resource.RLIMIT_AS)
        if pages is not None:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
        self.inside, self.armed, self.seen = str(inside), True, []
        try:
            yield
        finally:
            self.armed = False
            resource.setrlimit(resource.RLIMIT_AS, limits)


WATCH = Watch()


def attempt(read: Callable[[], Any], inside: Path, case: str) -> str | None:
    """Call a reader: None where it reads, else the sentence of its refusal; fails on anything else."""
    started, sentence = time.process_time(), None
    with WATCH.on(inside):
        try:
            read()
        except FlowAnchorError as error:
            sentence = str(error)
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:300]}") from error
    assert time.process_time() - started < SECONDS, f"{case} took {time.process_time() - started:.1f} s"
    assert not WATCH.seen, f"{case} did {WATCH.seen[:3]}"
    if sentence is not None:
        check_sentence(sentence, case)
    return sentence


def check_sentence(sentence: str, case: str) -> None:
    """One sentence, printable, of a length that can be read."""
    assert sentence.isprintable() and len(sentence) < 1200 and "Traceback" not in sentence, f"{case}: {sentence!r}"
    assert not any(word in sentence for word in STARVED), f"{case} asked for more than {MEMORY >> 20} MB: {sentence}"


def mutations(valid: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Damaged copies of a file, `count` times `scale`, each with a word on what was done to it."""
    draw = random.Random(f"{seed} {len(valid)}")
    for number in range(round(count * scale)):
        data = bytearray(valid)
        what = draw.choice(("flip", "flip", "cut", "number", "number", "zeros", "insert", "swap", "repeat"))
        at = min(draw.randrange(len(data)), draw.randrange(len(data)) if draw.random() < 0.5 else len(data))
        if what == "flip":
            for _ in range(draw.choice((1, 1, 3, 20))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif what == "cut":
            del data[at:]
        elif what == "number":  # sizes and offsets are such
            lie = draw.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, draw.randrange(1 << 32)))
            layout = draw.choice("<>") + draw.choice("IIHQ")
            packed = struct.pack(layout, lie % (1 << (8 * struct.calcsize(layout))))
            data[at : at + len(packed)] = packed
        elif what == "zeros":
            data[at : at + draw.randrange(1, 600)] = bytes(draw.randrange(1, 600))
        elif what == "insert":
            data[at:at] = draw.randbytes(draw.randrange(1, 300))
        elif what == "swap":
            other = draw.randrange(len(data))
            piece = bytes(data[at : at + 16])
            data[at : at + 16] = data[other : other + 16]
            data[other : other + 16] = piece
        else:
            data[at:at] = data[at : at + draw.randrange(1, 200)] * draw.randrange(1, 20)
        yield f"{what} {number}", bytes(data)


class Explosive:
    """Pickled, it runs a program where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {TRACE}",))


def attempt_all(
    path: Path, valid: bytes, cases: Iterable[tuple[str, bytes]], read: Callable[[], Any], count: int, seed: int
) -> None:
    """The whole file reads; every crafted and every damaged copy of it reads, or is told with its name."""
    path.write_bytes(valid)
    read()  # with what it imports
    assert attempt(read, path.parent, "whole") is None
    refused = 0
    for what, data in [*cases, *mutations(valid, count, seed)]:
        path.write_bytes(data)
        sentence = attempt(read, path.parent, f"{path.name}: {what}")
        assert sentence is None or path.name in sentence, f"{what}: {sentence}"
        refused += sentence is not None
    assert refused > 10 * min(scale, 1) and not TRACE.exists()
