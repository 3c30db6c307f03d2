"""Ways to run many runs; a file each: processes of this machine, or a Ray cluster.

An engine is a function `run(work, todo, …)` that calls `work(item, watch)` for every item, each in a process of its own,
and yields (item, failure) as they end, in any order; a failure is None where all went well. `work` hands a record of each
epoch to `watch`. A process that dies (killed, out of memory) is started again, so `work` must take up what an earlier try
of the same item has left.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vtzoo.errors import Interrupted, VtzooError

T = TypeVar("T")
MOST = 10_000
"""Characters of a message or traceback: more might not pass through a pipe that nobody reads yet."""
Watch = Callable[[Mapping[str, Any]], None]
Work = Callable[[T, Watch], None]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an item has no result: a refusal in two lines, or a bug's traceback; `stopped` by somebody's signal."""

    message: str
    hint: str = ""
    traceback: str = ""
    stopped: bool = False

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """From what was raised."""
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        if isinstance(error, VtzooError):
            return cls(error.message, error.hint, stopped=stopped)
        told = "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__}: {error}"[:MOST], traceback=told[-MOST:], stopped=stopped)
