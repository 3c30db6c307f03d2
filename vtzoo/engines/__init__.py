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

from vtzoo.errors import VtzooError

T = TypeVar("T")
Watch = Callable[[Mapping[str, Any]], None]
Work = Callable[[T, Watch], None]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an item has no result: a refusal in two lines, or a bug's traceback."""

    message: str
    hint: str = ""
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """From what was raised."""
        if isinstance(error, VtzooError):
            return cls(error.message, error.hint)
        return cls(f"{type(error).__name__}: {error}", traceback="".join(traceback.format_exception(error)))
