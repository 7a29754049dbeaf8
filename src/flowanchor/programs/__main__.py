"""`python -m flowanchor.programs train ...`: what the command `flowanchor` becomes."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from flowanchor.programs import commands

MODULES = {"eval": "evaluate"}
PROGRAMS = ("train", "sample", "eval", "encode", "convert", "report", "demo")


def main() -> None:
    """The first word names the program, the others are its own."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in PROGRAMS:
        print(f"Error: There is no program '{name}': use one of {', '.join(PROGRAMS)}.", file=sys.stderr)
        sys.exit(1)
    del sys.argv[1]
    module = MODULES.get(name, name)
    # Lightning starts the other processes of a run with the module that it finds here.
    sys.modules["__main__"].__spec__ = find_spec(f"flowanchor.programs.{module}")
    getattr(commands, module)()


if __name__ == "__main__":
    main()
