"""Ctrl-C and `kill` while something is going on that first wants to bring its work to a safe place."""

import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from vtzoo import parallel
from vtzoo.machine import processes

ECHO = 2.0
"""Seconds in which a launcher hands on the signal that its processes had already, with it, from the terminal or from who stops the whole group."""


@contextmanager
def stoppable() -> Generator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM, in any process, into a request that is honoured after the step; the second one stops at once, unless it is an echo of the first."""
    asked: list[float] = []

    def note(number: int, _frame: Any) -> None:
        now = time.monotonic()
        handed_on = number == signal.SIGTERM or processes() > 1
        if asked and not (handed_on and now - asked[0] < ECHO):
            raise KeyboardInterrupt
        asked.append(now)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: parallel.anywhere(bool(asked))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
