"""Ray Tune: each item a trial on a cluster, or on this machine as one.

The cluster is the one that `address` or $RAY_ADDRESS names, else one that runs here, else one is started. Every node sees the zoo under
the same path and has this package installed. A trial whose process or node died is started again; what it has left in the zoo it takes
up. With ASHA, trials that lag behind are stopped; they make no delta.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from shutil import rmtree
from threading import Thread
from typing import Any

from vtzoo.engines import Failure, T, Work
from vtzoo.errors import UsageError
from vtzoo.standings import score
from vtzoo.sweep_file import Engine

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}
SCORE = "score"
"""What ASHA compares: top-1, or mAP."""


def check() -> None:
    """Refuse before anything is prepared.

    Raises:
        UsageError: Ray is missing.
    """
    if find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray", "pip install 'vtzoo[ray]'")


def run(
    work: Work[T], todo: Sequence[T], *, asked: Engine, groups: Sequence[str], retries: int, folder: Path
) -> Iterator[tuple[T, Failure | None]]:
    """Run every item as a trial; see the package for the contract.

    Args:
        work: (item, watch); it calls watch with a record after each epoch: `epoch`, and `top1` or `map` where ASHA is to compare.
        todo: what to run it on; can be pickled.
        asked: processors, GPUs and stopping of trials.
        groups: of each item; those of one group are compared with each other when lagging ones are stopped.
        retries: how often a trial that died is started again.
        folder: for Ray's own records while it works, seen by all nodes.

    Raises:
        UsageError: there is no such cluster.
    """
    os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
    import ray
    from ray import tune

    def trial(config: dict[str, Any]) -> None:  # Ray keeps it by value
        failure = _tried(work, items[config["index"]], tune.report)
        if failure is not None:
            tune.report({"failure": [failure.message, failure.hint, failure.traceback]})

    items, ended = list(todo), Queue[int | None]()
    started = _connected(ray, asked.address)
    try:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": asked.cpus, "gpu": asked.gpus}),
            param_space={"index": tune.grid_search(list(range(len(items))))},
            tune_config=tune.TuneConfig(scheduler=_scheduler(asked, groups)),
            run_config=tune.RunConfig(
                name="trials", storage_path=str(folder.absolute()), verbose=0, callbacks=[_bell(tune, ended)],
                failure_config=tune.FailureConfig(max_failures=retries),
            ),
        )  # fmt: skip
        fitted = _aside(tuner.fit)
        fitted.add_done_callback(lambda _: ended.put(None))
        told = set[int]()
        while (index := ended.get()) is not None:
            told.add(index)
            yield items[index], None
        for result in fitted.result():
            index = int((result.config or {})["index"])
            if index not in told:
                yield items[index], _failure(result)
    finally:  # also in the middle, by Ctrl-C
        if started:
            ray.shutdown()
        rmtree(folder, ignore_errors=True)


def _aside(do: Callable[[], Any]) -> "Future[Any]":
    """Do something in a thread that nobody waits for at the exit: without its cluster Tune waits a minute for it."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(do())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            found.set_exception(error)

    Thread(target=run, daemon=True).start()
    return found


def _tried(work: Work[T], item: T, report: Callable[[dict[str, Any]], None]) -> Failure | None:
    """What is raised would come out the same again: it is told, and not tried again."""

    def watch(record: Mapping[str, Any]) -> None:
        if (own := score(record)) is not None:
            report({"epoch": record["epoch"], SCORE: own})

    try:
        work(item, watch)
    except Exception as error:  # noqa: BLE001 - whatever it was, the driver tells it
        return Failure.of(error)
    return None


def _connected(ray: Any, address: str) -> bool:
    """Join or start a cluster; whether it was this call that did.

    Raises:
        UsageError: there is none at this address.
    """
    if ray.is_initialized():
        return False
    try:
        ray.init(address=address or None, include_dashboard=None, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster answers at '{address}' ({error})", "ray start --head, or leave address out"
        ) from error
    return True


def _scheduler(asked: Engine, groups: Sequence[str]) -> Any:
    """ASHA among the trials of a group: what is hard in one task is no worse than what is easy in another."""
    asha = asked.asha
    if asha is None:
        return None
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    def one() -> Any:
        return ASHAScheduler(
            time_attr="epoch", metric=SCORE, mode="max", max_t=10**6, grace_period=asha.grace_epochs,
            reduction_factor=asha.reduction,
        )  # fmt: skip

    own = {group: one() for group in groups}

    class ByGroup(FIFOScheduler):
        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            own[groups[int(trial.config["index"])]].on_trial_add(tune_controller, trial)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            return own[groups[int(trial.config["index"])]].on_trial_result(tune_controller, trial, result)

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            if SCORE in result:
                own[groups[int(trial.config["index"])]].on_trial_complete(tune_controller, trial, result)

        def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
            own[groups[int(trial.config["index"])]].on_trial_remove(tune_controller, trial)

    return ByGroup()


def _bell(tune: Any, ended: "Queue[int | None]") -> Any:
    """Rings when a trial has come to its end without a failure."""

    class Bell(tune.Callback):
        def __init__(self, ended: Any) -> None:
            self.ended = ended

        def __getstate__(self) -> dict[str, Any]:  # Ray keeps a copy on disk, and locks can't be kept
            return {}

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:  # noqa: ARG002 - Ray's names
            if "failure" not in (trial.last_result or {}):
                self.ended.put(trial.config["index"])

    return Bell(ended)


def _failure(result: Any) -> Failure | None:
    if result.error is not None:
        return Failure(str(result.error).strip().splitlines()[-1], "see that its node is well, and repeat the command")
    told = (result.metrics or {}).get("failure")
    return Failure(*told) if told else None
