"""`flowanchor play CHECKPOINT [TEACHER]`: a page on this machine to draw with a model, or to watch it train."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
import tempfile
import threading
import warnings
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from flowanchor.errors import ConfigError, FlowAnchorError

INSTALL = 'The page needs a package more: pip install "flowanchor[play]".'


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("checkpoint")
@click.argument("teacher", required=False)
@click.option("--port", type=click.IntRange(0, 65535), help="Default: the first free one from 7860.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Another address lets other machines draw.")
@click.option("--open", "browser", is_flag=True, help="Open the page in a browser.")
@click.option("--device", help="cpu, cuda; default: cuda where there is one.")
@click.option("--dtype", help="bfloat16 or float16: large networks in half the memory.")
@click.option("--ema", help="Which averaged weights; default: the run's own, none: the raw ones.")
def main(checkpoint: str, teacher: str | None, port: int | None, host: str, browser: bool, **chosen: Any) -> None:
    """Draw with a model on a page of this machine; of a run in progress, watch its training.

    CHECKPOINT: a run folder, a .ckpt or .safetensors file, a published folder, or a model that comes with the package
    (digits). TEACHER: what it was distilled from, drawn beside it on the same noise.
    """
    try:
        _play(checkpoint, teacher, port, host, browser, **chosen)
    except FlowAnchorError as error:
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


def _play(
    checkpoint: str,
    teacher: str | None,
    port: int | None,
    host: str,
    browser: bool,
    device: str | None,
    dtype: str | None,
    ema: str | None,
) -> None:
    if find_spec("gradio") is None:
        raise ConfigError(INSTALL)
    at_home = _is_loopback(host)
    click.echo(f"Opening {checkpoint} ...")
    # Both take seconds to import; --help and a package that is missing do not wait for them.
    from flowanchor.play.studio import Studio
    from flowanchor.programs.checks import choose_device, choose_dtype

    studio = Studio(choose_device(device), choose_dtype(dtype), ema)
    studio.open(checkpoint, teacher)
    with tempfile.TemporaryDirectory(prefix="flowanchor-play-") as folder:
        # Read when gradio is imported: nobody is told that this page exists, and its pictures go when it does.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "shown")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of gradio, about its own code
        from flowanchor.play.page import CSS, build_page

        page = build_page(studio, Path(folder), may_open=at_home)
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port or None, share=False, prevent_thread_lock=True, quiet=True, css=CSS,
                footer_links=[], ssr_mode=False, show_error=False, allowed_paths=[folder],
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"No page could be opened at {host} ({error}): choose another --port.") from error
        click.echo(f"Drawing with {studio.described()}")
        if not at_home:
            click.echo(f"Note: whoever reaches {host} can draw with it. Without --host only this machine can.")
        click.echo(f"The page: {address}   (Ctrl-C ends it)")
        if browser:
            webbrowser.open(address)
        try:
            _wait()
        finally:
            page.close(verbose=False)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _wait() -> None:
    """Until Ctrl-C or SIGTERM, both of which are a good end."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(1):  # a wait without end is deaf to signals on some systems
        pass


if __name__ == "__main__":
    main()
