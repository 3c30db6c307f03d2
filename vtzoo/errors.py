"""What can go wrong, one tree; each leaf knows its exit code.

    VtzooError 1
      x UsageError 2
      x NotFound 3
      x Mismatch 4   (WrongBackbone, ShapeMismatch, DeadTarget, NotFoldable, FoldError,
                    NotExportable, ExportMismatch)
      x Corrupt 4
      x Conflict 5
      x Network 6
      x Resources 7
      x Interrupted 130

A message says what happened and what was seen; the hint says what to type next. Both are one line.
"""

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 5
"""How many names a hint lists before it says '…'."""


class VtzooError(Exception):
    """The root of every refusal; `str()` gives the message, `.hint` the next thing to type."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(VtzooError):
    """A word, knob or value that can't be understood."""

    exit_code = 2


class NotFound(VtzooError):
    """A name, file or folder that isn't there."""

    exit_code = 3


class Mismatch(VtzooError):
    """Two things that don't belong together, or a verification that failed."""

    exit_code = 4


class WrongBackbone(Mismatch):
    """A delta meets weights it was not trained on."""


class ShapeMismatch(Mismatch):
    """A tensor has another shape than its place."""


class DeadTarget(Mismatch):
    """A graft would never run: its site is neither called nor read."""


class NotFoldable(Mismatch):
    """This delta has no exact form in plain weights."""


class FoldError(Mismatch):
    """Folded and attached outputs differ by more than the tolerance."""


class NotExportable(Mismatch):
    """This network has no form in the other format."""


class ExportMismatch(Mismatch):
    """Exported and live outputs differ by more than the tolerance."""


class Corrupt(VtzooError):
    """A file is damaged or is not what its name says."""

    exit_code = 4


class Conflict(VtzooError):
    """The name exists already, or the zoo is locked."""

    exit_code = 5


class Network(VtzooError):
    """Something had to be fetched and could not be."""

    exit_code = 6


class Resources(VtzooError):
    """Out of memory or disk."""

    exit_code = 7


class Interrupted(VtzooError):
    """Stopped by the user, after a checkpoint was written."""

    exit_code = 130


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a name that was mistyped: the nearest known ones, else the first few."""
    names = sorted(known)
    close = get_close_matches(word, names, n=3, cutoff=0.5) or [n for n in names if word and word in n][:3]
    if close:
        return f"did you mean {' or '.join(close)}?"
    if not names:
        return ""
    return f"known: {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}"
