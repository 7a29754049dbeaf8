"""`python -m flowanchor train ...`: the programs without their scripts, also for `torchrun -m flowanchor train ...`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

PROGRAMS = ("train", "sample", "eval", "encode", "convert", "report", "demo")
MODULES = {"eval": "evaluate"}


def main() -> None:
    """The first word names the program, the others are its own."""
    from flowanchor import __version__
    from flowanchor.programs import commands

    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"flowanchor {__version__}")
        return
    if name not in PROGRAMS:
        known = ", ".join(PROGRAMS)
        asked = name in ("-h", "--help")
        text = f"python -m flowanchor PROGRAM KEY=VALUE ...; the programs: {known}. PROGRAM --help lists its options."
        print(
            text if asked else f"Error: There is no program '{name}': use one of {known}.",
            file=None if asked else sys.stderr,
        )
        sys.exit(0 if asked else 1)
    del sys.argv[1]
    # Lightning starts the other processes of a run with the module that it finds here.
    sys.modules["__main__"].__spec__ = find_spec(f"flowanchor.programs.{MODULES.get(name, name)}")
    getattr(commands, MODULES.get(name, name))()


if __name__ == "__main__":
    main()
