"""Every refusal as a message, a hint and an exit code; what is not a refusal keeps its traceback."""

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import typer

from vtzoo.errors import VtzooError, did_you_mean

from ._argv import GLOBALS

INTERRUPTED = 130
_RESOURCES = 7
_OS_CODES = {
    errno.ENOSPC: _RESOURCES,
    errno.EDQUOT: _RESOURCES,
    errno.ENOMEM: _RESOURCES,
    errno.EMFILE: _RESOURCES,
    errno.EACCES: 1,
    errno.EPERM: 1,
    errno.EROFS: 1,
    errno.ENAMETOOLONG: 2,
}
_OS_HINTS = {
    _RESOURCES: "free some space, or choose another place with --zoo or --out",
    1: "check who may write there, or choose another place with --zoo or --out",
    2: "choose a shorter name",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an error tells the user."""

    message: str
    hint: str
    exit_code: int


def interrupted() -> Refusal:
    """Say that Ctrl-C was pressed where nothing had to be kept."""
    return Refusal("interrupted", "nothing was added to the zoo; run it again when ready", INTERRUPTED)


def explain(error: BaseException) -> Refusal | None:
    """Turn an exception into a refusal; None when it is a bug whose traceback is wanted."""
    if isinstance(error, VtzooError):
        return Refusal(str(error), error.hint or "vtzoo --help", error.exit_code)
    if isinstance(error, typer.TyperException):
        return _usage(error)
    if isinstance(error, KeyboardInterrupt):
        return interrupted()
    if _out_of_memory(error):
        hint = "lower --batch-size or --image-size, or choose a smaller backbone"
        return Refusal(f"out of memory ({_first_line(error)})", hint, _RESOURCES)
    if isinstance(error, OSError) and error.errno in _OS_CODES:
        code = _OS_CODES[error.errno]
        where = f": {error.filename}" if error.filename else ""
        return Refusal(f"{(error.strerror or str(error)).lower()}{where}", _OS_HINTS[code], code)
    return None


def _out_of_memory(error: BaseException) -> bool:
    """Recognise Python's, torch's and its allocator's ways of saying it, without importing torch."""
    names = {c.__name__ for c in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _usage(error: typer.TyperException) -> Refusal:
    """Typer's own usage errors, in the house's two lines."""
    ctx: Any = getattr(error, "ctx", None)
    message = _lower_first(error.format_message().rstrip("."))
    if ctx is None:
        return Refusal(message, "vtzoo --help", error.exit_code)
    hint = f"{ctx.command_path} --help"
    commands: dict[str, Any] = getattr(ctx.command, "commands", {})
    option = getattr(error, "option_name", "")
    if message.startswith("no such option"):
        message, hint = f"no such option: {option}", _suggest(option, [*_options(ctx), *GLOBALS], hint)
    elif message.startswith("no such command"):
        word = message.split("'")[1]
        message, hint = f"no such command: {word}", _suggest(word, commands, hint)
    elif message == "missing command":
        hint = f"one of {', '.join(commands)} ({hint})"
    return Refusal(message + _seen(error), hint, error.exit_code)


def _seen(error: BaseException) -> str:
    """The value that pydantic refused on Typer's behalf."""
    errors: Any = getattr(error.__cause__, "errors", None)
    return f", not {errors()[0]['input']!r}" if errors is not None else ""


def _options(ctx: Any) -> list[str]:
    return [name for param in ctx.command.params for name in param.opts if name.startswith("-")]


def _suggest(word: str, known: Iterable[str], otherwise: str) -> str:
    nearest = did_you_mean(word, known)
    return f"{nearest} ({otherwise})" if nearest.startswith("did you mean") else otherwise


def _lower_first(words: str) -> str:
    return words[:1].lower() + words[1:]
