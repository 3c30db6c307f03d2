"""Processes of this machine: one for each item, forked from a server that has loaded the heavy packages once.

A process of its own keeps a run's peak memory apart from the others', and a run that is killed takes nothing with it.
Children do not see the terminal's Ctrl-C: the parent asks them to stop, once, and waits for their checkpoints. When the
parent is gone, they ask themselves.
"""

import multiprocessing as mp
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from vtzoo.engines import Failure, T, Work


@dataclass
class _Try:
    """A process at work on an item."""

    item: Any
    process: Any
    answer: Connection
    count: int
    place: int


def run(
    work: Work[T], todo: Sequence[T], *, jobs: int, retries: int, preload: Sequence[str] = (), cards: Sequence[str] = ()
) -> Iterator[tuple[T, Failure | None]]:
    """Run every item, `jobs` at a time; see the package for the contract.

    Args:
        work: a function that can be found by its name; the items can be pickled.
        todo: what to run it on, in this order.
        jobs: processes at once.
        retries: how often an item whose process died is tried again.
        preload: modules that the processes have loaded when they start.
        cards: GPUs, as CUDA_VISIBLE_DEVICES names them; each process sees one, those that run at once different ones while they last.
    """
    context: Any = mp.get_context("spawn" if os.name == "nt" else "forkserver")
    if preload and os.name != "nt":
        context.set_forkserver_preload(list(preload))
    waiting = deque((item, 0) for item in todo)
    running: list[_Try] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                place = min(set(range(jobs)) - {t.place for t in running})
                card = cards[place % len(cards)] if cards else ""
                running.append(_started(context, work, *waiting.popleft(), place, card))
            ready = set(wait([t.process.sentinel for t in running]))
            for done in [t for t in running if t.process.sentinel in ready]:
                running.remove(done)
                ended, failure = _ended(done)
                if not ended and done.count < retries:
                    waiting.appendleft((done.item, done.count + 1))
                else:
                    yield done.item, failure
    finally:
        _stop(running)


def _started(context: Any, work: Work[T], item: T, count: int, place: int, card: str) -> _Try:
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, item, theirs, card))
    process.start()
    theirs.close()
    return _Try(item, process, answer, count, place)


def _ended(done: _Try) -> tuple[bool, Failure | None]:
    """Whether the work came to an end of its own, and how; who was told to stop by somebody else did not."""
    done.process.join()
    code = done.process.exitcode
    with suppress(EOFError, OSError), done.answer:  # it has said nothing, or half of it
        failure: Failure | None = done.answer.recv()
        return not (failure and failure.stopped), failure
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return False, Failure(f"its process {how}", "is there memory enough? try fewer --jobs")


def _stop(running: Sequence[_Try]) -> None:
    """Ask all to stop, and wait until they have."""
    for one in running:
        with suppress(ProcessLookupError):
            os.kill(one.process.pid, signal.SIGTERM)
    for one in running:
        one.process.join()


def _child(work: Work[T], item: T, answer: Connection, card: str) -> None:
    """What a process does."""
    if card:
        os.environ["CUDA_VISIBLE_DEVICES"] = card  # CUDA has not been asked for anything yet
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        threading.Thread(target=_watch, daemon=True).start()
        work(item, _unwatched)
        failure = None
    except BaseException as error:  # noqa: BLE001 - whatever it was, the parent tells it
        failure = Failure.of(error)
    with suppress(BrokenPipeError):  # nobody is there to be told
        answer.send(failure)


def _watch() -> None:
    """Stop when the parent is gone."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _unwatched(record: Mapping[str, Any]) -> None:
    """Nobody here stops a run before its end."""
