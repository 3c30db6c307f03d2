"""Where a training's curve goes while it trains: a file of JSON lines always, and the trackers that accelerate knows."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

from vtzoo import talk
from vtzoo.errors import UsageError, VtzooError, did_you_mean
from vtzoo.files import atomic_text, writing

PROJECT = "vtzoo"
NAMED = {"mlflow": "run_name", "trackio": "name", "wandb": "name"}
"""How a tracker wants to be told what one run of a project is called; the others take the run's name as the project's."""


def check(trackers: Sequence[str]) -> None:
    """Refuse trackers that can't be used, before anything is computed.

    Raises:
        UsageError: accelerate doesn't know it, or its package is missing.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(f"no tracker is called '{name}'", did_you_mean(name, LOGGER_TYPE_TO_CLASS))
        if name not in {str(t) for t in get_available_trackers()}:
            raise UsageError(f"the tracker {name} is not installed", f"pip install {name}")


class Log:
    """A training's records, epoch by epoch, in a file and with trackers.

    Args:
        path: of the file; a run that goes on adds to it.
        name: of the run.
        facts: what it is trained with.
        trackers: names that `check` has let pass.
        fresh: start the file anew.
    """

    def __init__(
        self, path: Path, name: str, facts: Mapping[str, Any], trackers: Sequence[str], *, fresh: bool
    ) -> None:
        self.path, self.name, self.facts = path, name, facts
        self.fresh = fresh or not path.exists()
        if self.fresh:  # what a tracker has written beside it is of another run of that name
            rmtree(path.parent / _plain(name), ignore_errors=True)
        self.trackers = [_started(t, name, path.parent, facts) for t in trackers]

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Note an epoch; the first one of a fresh run starts the file."""
        if self.fresh:
            self._write([record])
        else:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
        self.fresh = False
        self._tell("log", {k: v for k, v in record.items() if k != "epoch"}, step=record["epoch"])

    def finish(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the whole history, in which no epoch is missing or twice, whatever was killed; close the trackers."""
        self._write(history)
        self._tell("finish")

    def _tell(self, what: str, *args: Any, **named: Any) -> None:
        """Tell all trackers; one that fails is told no more: a training does not end because a server is gone."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, what)(*args, **named)
            except Exception as error:  # noqa: BLE001 - other people's code, and often a network
                self.trackers.remove(tracker)
                talk.say(
                    f"warning: the tracker {tracker.name} failed ({error}); the training goes on, and {self.path} has its curve"
                )

    def _write(self, history: Sequence[Mapping[str, Any]]) -> None:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        head = _line({"name": self.name, **self.facts})
        atomic_text(self.path, head + "".join(_line(r) for r in history))


def both(
    first: Callable[[Mapping[str, Any]], None], second: Callable[[Mapping[str, Any]], None] | None
) -> Callable[[Mapping[str, Any]], None]:
    """Tell two."""

    def tell(record: Mapping[str, Any]) -> None:
        first(record)
        if second is not None:
            second(record)

    return tell


def _started(tracker: str, name: str, folder: Path, facts: Mapping[str, Any]) -> Any:
    """A tracker that has been told what is trained.

    Raises:
        VtzooError: it failed; nothing is trained yet.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[tracker]
    named = {NAMED[tracker]: name} if tracker in NAMED else {}
    place = [str(folder)] if kind.requires_logging_directory else []
    try:
        made = kind(PROJECT if named else _plain(name), *place, **named)
        made.start()
        made.store_init_configuration(
            {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in facts.items()}
        )
    except Exception as error:
        raise VtzooError(
            f"the tracker {tracker} does not start: {error}", f"see that it works, or leave out --track {tracker}"
        ) from error
    return made


def _plain(name: str) -> str:
    return name.replace("/", "--")


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"
