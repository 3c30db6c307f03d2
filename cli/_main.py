"""The program's entry: arguments in, exit code out; refusals become two lines on stderr."""

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TextIO

import typer

from . import _render
from ._argv import hoist
from ._errors import INTERRUPTED, explain, interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit code.

    An exception that is not a refusal is a bug: it passes through, and Python prints its traceback (exit code 1).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _never_fail_on_a_character(sys.stdout, sys.stderr)
    try:
        status = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_left()
    except (Exception, KeyboardInterrupt) as error:
        refusal = explain(error)
        if refusal is None:
            raise
        _render.refuse(refusal.message, refusal.hint)
        return refusal.exit_code
    return status


def _run(words: list[str]) -> int:
    from vtzoo_cli._app import app

    line = shlex.join(["vtzoo", *words])
    try:
        status = app(hoist(words) or ["--help"], prog_name="vtzoo", standalone_mode=False, obj=line)
    except typer.Abort as stop:
        raise (stop.__cause__ or KeyboardInterrupt) from None
    if status == INTERRUPTED:  # what Typer makes of Ctrl-C
        stopped = interrupted()
        _render.refuse(stopped.message, stopped.hint)
    return int(status or 0)


def _never_fail_on_a_character(*streams: TextIO) -> None:
    """A name that the terminal's encoding lacks is shown escaped."""
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _reader_left() -> int:
    """`vtzoo ls | head`: stop quietly; nothing is left for Python's own flush at exit to fail on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
