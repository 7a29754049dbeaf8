"""Runs the page and writes down every host name that its process looks up, as an argument of ours says."""

from __future__ import annotations

import sys

lookups = open(sys.argv.pop(1), "a", buffering=1)


def hook(event, arguments):
    if event == "socket.getaddrinfo":
        lookups.write(f"{arguments[0]}\n")
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        lookups.write(f"{arguments[1][0]}\n")


sys.addaudithook(hook)

from flowanchor.programs.play import main  # noqa: E402

main()
