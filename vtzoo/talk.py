"""How the library speaks while it works: silent until someone installs a voice (the command line does)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Voice:
    say: Callable[[str], None] = lambda text: None  # noqa: ARG005 - the silent default
    track: Callable[[Iterable[object], str, int], Iterable[object]] = lambda items, label, total: items  # noqa: ARG005 - the silent default


_voice = _Voice()


def install(say: Callable[[str], None], track: Callable[[Iterable[object], str, int], Iterable[object]]) -> None:
    """Set where talk and progress go (for a command line: stderr)."""
    _voice.say, _voice.track = say, track


def say(text: str) -> None:
    """Tell the user one line."""
    _voice.say(text)


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Pass items through while showing how many of `total` are done."""
    yield from _voice.track(items, label, total)  # type: ignore[misc] - the voice gives back what it was given
