"""The records that files, index and code share; plain frozen dataclasses, JSON in and out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from vtzoo.errors import NotFound, UsageError, did_you_mean

AND = " AND "
"""Between licences that hold together, as SPDX writes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """How pixels become input: size in pixels [channels, height, width], mean and std in [0, 1] units."""

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Preprocess":
        """Read the fields it knows from an index entry, a header or a timm config."""
        known = {f.name: facts[f.name] for f in fields(cls) if facts.get(f.name) is not None}
        for key in ("input_size", "mean", "std"):
            if key in known:
                known[key] = tuple(known[key])
        return cls(**known)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task's labels and preprocessing; what is needed to use its head.

    `multilabel`: an image may bear several labels or none, each with a probability of its own.
    """

    name: str
    classes: tuple[str, ...]
    preprocess: Preprocess = field(default_factory=Preprocess)
    multilabel: bool = False

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Task":
        """From the JSON of a delta's header."""
        own: dict[str, Any] = {"classes": tuple(facts["classes"]), "multilabel": bool(facts.get("multilabel"))}
        return cls(name=facts["name"], preprocess=Preprocess.of(facts), **own)

    def json(self) -> dict[str, Any]:
        """Flat JSON, as DESIGN's header has it: name, classes, input_size, mean, std and so on."""
        several = {"multilabel": True} if self.multilabel else {}
        return {"name": self.name, "classes": list(self.classes), **several, **plain(asdict(self.preprocess))}


def chosen(tasks: Sequence[Task], name: str | None, who: str) -> Task:
    """A task by name; without a name the only one.

    Raises:
        NotFound: no such task, or several and none named.
    """
    known = [t.name for t in tasks]
    if name is None and len(known) == 1:
        return tasks[0]
    if name is None:
        raise NotFound(
            f"{who} has {len(known)} tasks: {', '.join(known)}",
            f"choose one with --task {known[0] if known else 'NAME'}",
        )
    if name not in known:
        raise NotFound(f"{who} has no task '{name}'", did_you_mean(name, known))
    return tasks[known.index(name)]


def check_labels(classes: Sequence[str]) -> None:
    """Refuse labels of which one stands twice: no image could be told to be of the second one.

    Raises:
        UsageError: says which.
    """
    twice = [label for label, count in Counter(classes).items() if count > 1]
    if twice:
        raise UsageError(
            f"the label '{twice[0]}' stands {classes.count(twice[0])} times", "name each output by a label of its own"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneCard:
    """What must be known of a backbone to rebuild, recognise and use it.

    `digest`: the sha256 of its file, where an entry of the zoo tells it; what a delta carries has the fingerprint instead.
    """

    name: str
    arch: str
    source: str = ""
    license: str = ""
    fingerprint: str = ""
    head: tuple[str, ...] = ()
    params: int = 0
    features: int = 0
    preprocess: Preprocess = field(default_factory=Preprocess)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    good_for: str = ""
    digest: str = ""

    @classmethod
    def of(cls, name: str, facts: Mapping[str, Any]) -> "BackboneCard":
        """From an index entry or a header; unknown keys are left alone."""
        own = {f.name: facts[f.name] for f in fields(cls) if f.name in facts and f.name not in ("name", "preprocess")}
        own["head"] = tuple(own.get("head", ()))
        return cls(name=name, preprocess=Preprocess.of(facts), **own)

    def json(self) -> dict[str, Any]:
        """Flat JSON, the form the index and headers hold."""
        facts = plain(asdict(self))
        return {**{k: v for k, v in facts.items() if k not in ("name", "preprocess", "digest")}, **facts["preprocess"]}


def plain(value: Any) -> Any:
    """Tuples to lists, all the way down: the same value after a trip through JSON or YAML."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def as_map(value: Any) -> dict[str, Any]:
    """A map that someone else wrote; empty where it is none."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """A list that someone else wrote; empty where it is none."""
    return cast("list[Any]", value) if isinstance(value, list) else []
