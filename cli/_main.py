"""The program's entry: arguments in, exit code out; refusals become two lines on stderr."""

import atexit
import gc
import os
import platform
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

import typer

import vtzoo
from vtzoo import machine

from . import _render
from ._argv import Globals, split
from ._errors import INTERRUPTED, explain, interrupted
from ._session import Session


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit code.

    An exception that is not a refusal is a bug: it passes through, and Python prints its traceback (exit code 1).
    """
    # torch makes very many objects that stay: few rounds over them while it is imported
    gc.set_threshold(100_000, 20, 20)
    if argv is not None:
        return _status(list(argv))
    _mind_termination()
    leave = _Leave()
    atexit.register(leave)
    leave.status = _status(sys.argv[1:])
    return leave.status


class _Leave:
    """The last thing that is done at the exit: go, since taking torch apart object by object takes longer than many a command."""

    status = 1

    def __call__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or its reader has gone
                stream.flush()
        os._exit(self.status)  # threads have been waited for, and what was registered since for the exit has run


def _status(words: list[str]) -> int:
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
    said = split(words)
    _render.setup(quiet="--quiet" in said.flags or not machine.first(), color="--no-color" not in said.flags)
    if "--offline" in said.flags:
        os.environ[machine.OFFLINE[0]] = "1"
    if machine.offline():
        os.environ[machine.OFFLINE[1]] = "1"  # read when the hub's library is loaded; timm uses that, too
    if "--quiet" in said.flags or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "--version" in said.flags:
        return _version(said)
    from ._app import build

    session = Session(zoo_path=said.zoo, json="--json" in said.flags, command=shlex.join(["vtzoo", *words]))
    rest = said.rest if words else ("--help",)
    app = build(help_option=bool({"-h", "--help"} & set(rest)))
    try:
        status = app(rest, prog_name="vtzoo", standalone_mode=False, obj=session)
    except typer.Abort as stop:  # what Typer makes of an EOFError, ours or a bug's
        raise (stop.__cause__ or KeyboardInterrupt) from None
    if status == INTERRUPTED:  # what Typer makes of Ctrl-C
        stopped = interrupted()
        _render.refuse(stopped.message, stopped.hint)
    return int(status or 0)


def _version(said: Globals) -> int:
    if "--json" in said.flags:
        _render.document({"name": "vtzoo", "version": vtzoo.__version__, "python": platform.python_version()})
    else:
        _render.text(f"vtzoo {vtzoo.__version__}")
    return 0


def _mind_termination() -> None:
    """`kill` is Ctrl-C: what is half-written is taken away on the way out."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


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
