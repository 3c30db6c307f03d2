"""Options that several commands share, each declared once; and the training recipe that they add up to."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vtzoo.errors import Corrupt, NotFound, UsageError
from vtzoo.presets import PRESETS, preset

_NAMED = re.compile(r"([^=/\\]+)=(.+)")
Ref = Annotated[
    str, typer.Argument(metavar="REF", help="An entry of the zoo: its name, a unique prefix, name@sha256:…, or a file.")
]
Name = Annotated[str, typer.Option("--name", metavar="NAME", help="What to call the result in the zoo.")]
Keep = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Also keep the result in the zoo under this name.")
]
Data = Annotated[
    str,
    typer.Option(
        "--data", metavar="DATA", help="A folder of images by class, vtzoo:NAME, or a name timm reads (hfds/…, wds/…)."
    ),
]
Task = Annotated[str | None, typer.Option("--task", metavar="TASK", help="Whose head to use, where there are several.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count broken images instead of stopping at the first.")]
RequireSigned = Annotated[
    bool, typer.Option("--require-signed", help="An entry must be signed ($VTZOO_REQUIRE_SIGNED=1).")
]
PublicKey = Annotated[
    Path | None, typer.Option("--public-key", metavar="FILE", help="Compare signatures ($VTZOO_PUBLIC_KEY).")
]
FromPickle = Annotated[
    bool, typer.Option("--from-pickle", help="Read a pickle (.pth, .bin), its tensors alone, in a process of its own.")
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track", metavar="TRACKER", help="Also log to tensorboard, trackio, wandb or mlflow; may be repeated."
    ),
]
Words = Annotated[
    Path | None,
    typer.Option("--words", metavar="FILE", help="What a text tower is told of classes: YAML, label: its name."),
]
Templates = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="TEXT", help="Around each name, such as 'a photo of a {}.'; may be repeated."),
]
TestTime = Annotated[
    str | None,
    typer.Option(
        "--test-time", metavar="SPEC", help="Tune prompts on each image alone: tpt[views=64,steps=1,lr=0.005]."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this name.")]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE.yaml", help="A recipe: training knobs by name.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One training knob; may be given several times.")
]
Preset = Annotated[str | None, typer.Option("--recipe", metavar="NAME", help=f"Knobs by name: {', '.join(PRESETS)}.")]
Epochs = Annotated[int | None, typer.Option("--epochs", metavar="N", help="Passes over the training images.")]
LearningRate = Annotated[
    float | None, typer.Option("--lr", metavar="X", help="Peak learning rate (default: by method).")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Images per step.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Of initial values, order and augmentation.")]
Precision = Annotated[
    str | None, typer.Option("--precision", metavar="fp32|bf16|fp16", help="Number format of the forward pass.")
]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", metavar="PIXELS", help="Side of the input, if not the backbone's own.")
]


def recipe(config: Path | None, sets: Iterable[str] | None, **flags: Any) -> dict[str, Any]:
    """Put a recipe together: the file, over it `--set`, over it the flags that were given.

    Raises:
        NotFound: no such file.
        UsageError: a `--set` without `=`, or a file that is no mapping.
    """
    knobs = _read(config) if config is not None else {}
    for item in sets or ():
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set '{item}' is not key=value", "for example --set mixup=0.2")
        knobs[key.strip().replace("-", "_")] = value.strip()
    return {**knobs, **{k: v for k, v in flags.items() if v is not None}}


def words(path: Path | None) -> dict[str, str]:
    """Class names by label from a YAML file.

    Raises:
        NotFound: no such file.
        UsageError: it is no mapping of labels to texts.
    """
    if path is None:
        return {}
    from vtzoo.yaml_file import mapping

    found = mapping(text(path), str(path), "write lines such as cat: a tabby cat")
    if bad := [k for k, v in found.items() if not isinstance(v, str)]:
        raise UsageError(f"{path}: the name of {bad[0]} is no text", "write one line for each class: label: its name")
    return {str(k): v for k, v in found.items()}


def by_task(given: list[str]) -> str | dict[str, str]:
    """Images by task; the text alone where no task stands before it.

    Raises:
        UsageError: several, and one of them without a task, or one task twice.
    """
    named = {text: _NAMED.fullmatch(text) for text in given}
    if len(given) == 1 and (not (found := named[given[0]]) or Path(given[0]).exists()):
        return given[0]
    if bare := [text for text, match in named.items() if not match]:
        raise UsageError(f"--data {bare[0]} says no task", "write --data fashion=DATA --data emoji=DATA")
    found = {match[1]: match[2] for match in named.values() if match}
    if len(found) < len(given):
        raise UsageError("--data gives one task twice", "give each task once, with all of its images")
    return found


def numbers(text: str | None, what: str) -> tuple[float, ...] | None:
    """Split `0.5,0.5,0.5` into numbers.

    Raises:
        UsageError: something in it is no number.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{what} '{text}' is not a list of numbers", f"for example {what} 0.5,0.5,0.5") from None


def amount(text: str, what: str) -> float:
    """Read a count that may end in k or M: 300000, 300k, 0.3M.

    Raises:
        UsageError: it is no number above zero.
    """
    unit = {"k": 1e3, "m": 1e6}.get(text[-1:].lower(), 1.0)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{what} '{text}' is no number above zero", f"for example {what} 0.3M")
    return round(value, 6)


def check_spec(kind: Literal["methods", "merges", "losses", "inits"], spec: str) -> None:
    """Refuse a spec that doesn't parse or names nothing, before a verb loads torch.

    Raises:
        UsageError: not the grammar.
        NotFound: no such method, merge, loss or init.
    """
    from vtzoo import knobs, registry

    parts = [part for _, part in knobs.weighted(spec)] if kind == "losses" else knobs.parse(spec)
    for part in parts:
        registry.card(kind, part.name)


def check_preset(knobs: Mapping[str, Any]) -> None:
    """Refuse a recipe's name that is none, before a verb loads torch.

    Raises:
        NotFound: no such recipe.
    """
    preset(str(knobs.get("preset", "default")))


def text(path: Path) -> str:
    """A YAML file's text.

    Raises:
        NotFound: no such file.
        Corrupt: it is no text.
        UsageError: it is larger than such files are.
    """
    from vtzoo.yaml_file import LIMIT_BYTES

    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
        if len(data) > LIMIT_BYTES:
            raise UsageError(f"{path} has more than {LIMIT_BYTES} bytes", "is it the file that was meant?")
        return data.decode()
    except (FileNotFoundError, IsADirectoryError):
        raise NotFound(f"there is no file {path}", "write one, and give it as --config FILE.yaml") from None
    except UnicodeDecodeError as error:
        raise Corrupt(f"{path} is not text: {error}", "write YAML") from None


def _read(path: Path) -> dict[str, Any]:
    from vtzoo.yaml_file import mapping

    content = mapping(text(path), str(path), "write lines such as epochs: 10")
    return {str(k).replace("-", "_"): v for k, v in content.items()}
