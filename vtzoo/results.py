"""What each verb gives back: small records, JSON by `dataclasses.asdict`; the command line prints nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """An artifact and where it is: its name in the zoo (empty when outside) and its path."""

    ref: str
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained(Result):
    """A delta made: metrics by split, the resolved recipe, trainable parameters, digest, and the stack of methods that it is.

    A dry run of a method that searches has an example of what it might find: `example`; of every method that trains it has a `plan`: steps,
    estimated seconds, peak memory, disk for features, and where the delta acts.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    params: int = 0
    digest: str = ""
    method: str = ""
    example: bool = False
    plan: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated(Result):
    """Metrics by task."""

    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted(Result):
    """The most probable classes by image and task."""

    predictions: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged(Result):
    """One delta out of many; the report names parents, coefficients and touched tensors."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Folded(Result):
    """A plain timm folder; the report has the largest differences, fold against attach."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distilled(Result):
    """A student; metrics of student and teacher on the validation data."""

    metrics: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported(Result):
    """A file for another runtime; the report has the verification by batch size."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed(Result):
    """How long a model takes here; the report has a row for each form and batch size."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensed(Result):
    """How much telling a task's classes apart depends on each layer of a backbone."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified(Result):
    """How many entries and objects were read, and a row an entry with what is wrong with it."""

    report: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggested(Result):
    """The methods that fit a backbone and a budget, with what they cost, and those that don't, with the reason."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept(Result):
    """Many trainings; the report counts runs, those done before and those made now, and has a row for each."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported(Result):
    """A page; the report has how the methods stand."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo(Result):
    """The whole main job's table."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Two artifacts side by side; `same` where they are one file. A row for each fact, and for each tensor."""

    a: str
    b: str
    same: bool
    facts: list[dict[str, Any]]
    tensors: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduced(Result):
    """A recorded command run again; `within` where the result is the recorded one, or no further from it than allowed."""

    within: bool
    report: dict[str, Any] = field(default_factory=dict)


def leading(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The number by which trainings are compared: top-1, or the mean average precision of several labels."""
    return {k: metrics[k] for k in ("top1", "map") if k in metrics}
