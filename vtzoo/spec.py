"""The records that files, index and code share; plain frozen dataclasses, JSON in and out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from vtzoo.errors import Corrupt, NotFound, UsageError, did_you_mean
from vtzoo.refs import is_finite, shown

AND = " AND "
"""Between licences that hold together, as SPDX writes it."""
LOADING = frozenset(
    (
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "scriptable",
        "exportable",
        "no_jit",
    )
)
"""Arguments of timm's `create_model` that read files or say how it builds; what is left says what the network is."""
SIDE_LIMIT = 1 << 16
"""Of an image in pixels, and of any count among a network's arguments."""
WORDS_LIMIT = 1 << 20
"""Of the tokens that a text tower knows."""
_AGAIN = "fetch it or make it again"


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
        """Read the fields it knows from an index entry, a header or a timm config.

        Raises:
            Corrupt: no image can be prepared so.
        """
        known = {f.name: facts[f.name] for f in fields(cls) if facts.get(f.name) is not None}
        for key in ("input_size", "mean", "std"):
            if not isinstance(known.get(key, ()), list | tuple):
                raise Corrupt(f"'{key}' is {shown(known[key])}, a list is wanted", _AGAIN)
            known |= {key: tuple(known[key])} if key in known else {}
        made = cls(**known)
        sides, numbers = made.input_size, (*made.mean, *made.std, made.crop_pct)
        if len(sides) != 3 or not all(type(n) is int and 0 < n <= SIDE_LIMIT for n in sides):
            raise Corrupt(f"there are no images of {shown(list(sides))} (channels, height, width)", _AGAIN)
        if (
            not all(map(is_finite, numbers))
            or 0 in made.std
            or made.crop_pct <= 0
            or not made.mean
            or len(made.mean) != len(made.std)
        ):
            raise Corrupt(
                f"no image has a mean, deviation and crop of {shown([made.mean, made.std, made.crop_pct])}", _AGAIN
            )
        if not isinstance(made.interpolation, str) or not isinstance(made.crop_mode, str):
            raise Corrupt(f"no image is resized by {shown([made.interpolation, made.crop_mode])}", _AGAIN)
        return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task's labels and preprocessing; what is needed to use its head.

    `multilabel`: an image may bear several labels or none, each with a probability of its own. `words` and `templates` are what a text
    tower was told of the classes, in their order; empty where no text tower was asked.
    """

    name: str
    classes: tuple[str, ...]
    preprocess: Preprocess = field(default_factory=Preprocess)
    multilabel: bool = False
    words: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    @property
    def spoken(self) -> tuple[str, ...]:
        """The classes as a text says them: as they were told, else their labels with spaces for underscores and hyphens."""
        return self.words or tuple(map(saying, self.classes))

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Task":
        """From the JSON of a delta's header.

        Raises:
            Corrupt: its name or labels are none.
        """
        name, labels = facts["name"], facts["classes"]
        if not isinstance(name, str) or not 0 < len(name) <= 255:
            raise Corrupt(f"{shown(name)} is no task's name", _AGAIN)
        if not isinstance(labels, list | tuple) or not all(isinstance(label, str | int | float) for label in labels):
            raise Corrupt(f"the labels of '{name}' are {shown(labels)}, a list of texts is wanted", _AGAIN)
        own: dict[str, Any] = {"classes": tuple(labels), "multilabel": bool(facts.get("multilabel"))}
        for key in ("words", "templates"):
            texts = facts.get(key, ())
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise Corrupt(f"the {key} of '{name}' are {shown(texts)}, a list of texts is wanted", _AGAIN)
            own[key] = tuple(texts)
        if own["words"] and len(own["words"]) != len(labels):
            raise Corrupt(f"'{name}' has {len(labels)} labels and {len(own['words'])} names for them", _AGAIN)
        return cls(name=name, preprocess=Preprocess.of(facts), **own)

    def json(self) -> dict[str, Any]:
        """Flat JSON, as DESIGN's header has it: name, classes, input_size, mean, std and so on."""
        more: dict[str, Any] = {"multilabel": True} if self.multilabel else {}
        more |= {key: list(texts) for key in ("words", "templates") if (texts := getattr(self, key))}
        return {"name": self.name, "classes": list(self.classes), **more, **plain(asdict(self.preprocess))}


def saying(label: object) -> str:
    """A label as a text says it."""
    return " ".join(str(label).replace("_", " ").replace("-", " ").split())


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
        """From an index entry or a header; unknown keys are left alone.

        Raises:
            Corrupt: a field is of another kind, or its arguments could do more than build a network.
        """
        own = {f.name: facts[f.name] for f in fields(cls) if facts.get(f.name) is not None}
        own = {k: v for k, v in own.items() if k not in ("name", "preprocess")}
        for key, value in own.items():
            wanted = _KINDS.get(key, str)
            if not isinstance(value, wanted) or (key == "head" and not all(isinstance(v, str) for v in value)):
                raise Corrupt(f"the backbone's '{key}' is {shown(value)}", _AGAIN)
        check_args(own.get("model_args", {}))
        own["head"] = tuple(own.get("head", ()))
        return cls(name=name, preprocess=Preprocess.of(facts), **own)

    def json(self) -> dict[str, Any]:
        """Flat JSON, the form the index and headers hold."""
        facts = plain(asdict(self))
        return {**{k: v for k, v in facts.items() if k not in ("name", "preprocess", "digest")}, **facts["preprocess"]}


_KINDS: dict[str, Any] = {"head": (list, tuple), "model_args": dict, "params": int, "features": int}


def check_args(args: Mapping[str, Any], limit: int = SIDE_LIMIT) -> None:
    """Refuse arguments of a network, from a file that anybody may have written, which say where to load something, or sizes that no network has.

    Args:
        args: of it, or of a part of it.
        limit: of every number in them; within a part it is that of a vocabulary.

    Raises:
        Corrupt: says which.
    """
    if loading := sorted(LOADING & set(args)):
        raise Corrupt(
            f"the network's arguments have '{loading[0]}', which reads files", "use a file that vtzoo or timm wrote"
        )
    for key, value in args.items():
        if isinstance(value, Mapping):
            check_args(cast("Mapping[str, Any]", value), WORDS_LIMIT)
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= limit:
                raise Corrupt(f"the network's '{key}' is {shown(value)}", _AGAIN)


def plain(value: Any) -> Any:
    """Tuples to lists, all the way down: the same value after a trip through JSON or YAML."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def tidy(text: Any) -> str:
    """What someone else wrote, on one line, without what Markdown would take for its own."""
    return one_line(text).translate(str.maketrans("`|<>[]", "'/()()"))


def one_line(text: Any) -> str:
    """What someone else wrote, without line ends and what a terminal would take for an order."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def as_map(value: Any) -> dict[str, Any]:
    """A map that someone else wrote; empty where it is none."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """A list that someone else wrote; empty where it is none."""
    return cast("list[Any]", value) if isinstance(value, list) else []
