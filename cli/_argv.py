"""Global options stand before or after the verb, so they are taken out of the line before Typer reads it.

That also keeps lists quick. Typer decodes what it knows, given or not, with pydantic (its own `--help` included), and
loading pydantic costs a tenth of a second: the commands that only list leave it nothing to decode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtzoo.errors import UsageError

GLOBALS = {
    "--zoo": "Which zoo (default: $VTZOO_ZOO, the nearest folder upward, the user's own).",
    "--json": "Print one JSON document on stdout.",
    "--offline": "Ask no server: no remotes, no hub (so does the variable VTZOO_OFFLINE=1).",
    "--quiet": "No talk and no progress on stderr.",
    "--no-color": "No colours (so does the variable NO_COLOR).",
    "--version": "Print the version and stop.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Globals:
    """What the global options said, and the words that are left."""

    rest: tuple[str, ...]
    zoo: Path | None = None
    flags: frozenset[str] = frozenset()


def split(argv: Sequence[str]) -> Globals:
    """Take the global options out; what follows `--` is left alone.

    Raises:
        UsageError: `--zoo` has no value, or a flag has one.
    """
    words, rest = list(argv), list[str]()
    flags, zoo = set[str](), None
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            rest += [word, *words]
            break
        if name == "--zoo":
            zoo = Path(value if equals else _next(words))
        elif name in GLOBALS and equals:
            raise UsageError(f"option {name} takes no value", f"write {name} alone")
        elif name in GLOBALS:
            flags.add(name)
        else:
            rest.append(word)
    return Globals(rest=tuple(rest), zoo=zoo, flags=frozenset(flags))


def _next(words: list[str]) -> str:
    if not words or words[0].startswith("--"):
        raise UsageError("option --zoo needs a value", "write --zoo DIR")
    return words.pop(0)
