"""How long to bear with a connection: some tries, a growing and jittered pause between them, an end to all silence."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from vtzoo.errors import Network

T = TypeVar("T")


class Dropped(Network):
    """A connection that broke or fell silent: worth another try."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Bounds of what is borne.

    Attributes:
        tries: how often in a row something may fail.
        pause_s: before the second try; doubled before each further one up to `longest_s`, times a draw from [0.5, 1].
        stall_s: how long a connection may be silent.
        least_bytes_s: what it must bring in a second, on average over `stall_s`.
    """

    tries: int = 5
    pause_s: float = 0.5
    longest_s: float = 30.0
    stall_s: float = 30.0
    least_bytes_s: int = 1024

    def pause(self, failures: int) -> None:
        """Wait after so many failures in a row."""
        time.sleep(min(self.pause_s * 2 ** (failures - 1), self.longest_s) * random.uniform(0.5, 1))

    def watched(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Pass pieces on, as long as they come fast enough.

        Raises:
            Dropped: they drip.
        """
        since, came = time.monotonic(), 0
        for piece in pieces:
            yield piece
            came += len(piece)
            if (took := time.monotonic() - since) > self.stall_s:
                if came < self.least_bytes_s * took:
                    raise Dropped(f"only {came} bytes came in {took:.0f} s", "try again later")
                since, came = time.monotonic(), 0


PATIENCE = Patience()


def patiently(act: Callable[[], T]) -> T:
    """Do something until it works; what is not a dropped connection passes through.

    Raises:
        Dropped: it failed too often; the message has the last reason.
    """
    for failures in range(1, PATIENCE.tries):
        try:
            return act()
        except Dropped:
            PATIENCE.pause(failures)
    return act()
