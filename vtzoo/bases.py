"""A backbone's own tensors, from wherever its card says they are; lazy, and without timm."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from torch import Tensor

from vtzoo import hub
from vtzoo.clip_config import ARCH, WEIGHTS
from vtzoo.clip_names import converted
from vtzoo.errors import Network, NotFound, UsageError, WrongBackbone
from vtzoo.fingerprint import fingerprint
from vtzoo.refs import check_member, shown
from vtzoo.spec import BackboneCard, plain
from vtzoo.tensors import TensorFile, view
from vtzoo.zoo import Zoo

PLAIN = "model.safetensors"


def weights_path(card: BackboneCard, zoo: Zoo | None = None) -> Path:
    """The file behind a card's `source`, fetched from the hub when it is not there yet.

    Raises:
        NotFound: the object or package resource is missing.
        Network: the hub can't be reached.
        Mismatch: what it has is not of the card's digest.
        UsageError: a source of an unknown kind, or a package that isn't vtzoo's own.
    """
    kind, _, rest = card.source.partition(":")
    if kind == "object":
        return (zoo or Zoo.find()).object(rest.removeprefix("sha256:"))
    if kind == "package":
        package, _, resource = rest.partition("/")
        if package.partition(".")[0] != "vtzoo":
            raise UsageError(
                f"the source {shown(card.source)} would import a package, which runs it",
                "add the weights from their file",
            )
        check_member(resource)
        with as_file(files(package) / resource) as path:
            if not path.is_file():
                raise NotFound(f"package {package} carries no {resource}", "reinstall vtzoo")
            return path
    if kind == "hf-hub":
        return _fetched(card)
    raise UsageError(
        f"'{card.name}' has no weights (source '{card.source}')", "vtzoo add backbone NAME --arch … --weights FILE"
    )


def _fetched(card: BackboneCard) -> Path:
    """A card's file of the hub; of a dual encoder open_clip's, else, where it has no text tower, the one of a timm folder.

    Raises:
        NotFound: there is none; where the weights are a pickle, the hint says how they come in.
    """
    if card.arch != ARCH:
        return hub.fetch(card.source, PLAIN, card.digest)
    try:
        return hub.fetch(card.source, WEIGHTS, card.digest)
    except (NotFound, Network) as error:
        if not card.model_args.get("text"):
            return hub.fetch(card.source, PLAIN, card.digest)
        if isinstance(error, Network):
            raise
        hint = "download its weights, then: vtzoo add backbone NAME --arch clip:MODEL.TAG --weights FILE --from-pickle"
        raise NotFound(error.message, hint) from error


def tensors_of(path: Path, card: BackboneCard) -> Mapping[str, Tensor]:
    """The tensors of a card's file by our names, a head among them; each is read when asked for.

    Raises:
        ShapeMismatch: a dual encoder's file holds what none has.
    """
    return converted(TensorFile(path), card.model_args) if card.arch == ARCH else TensorFile(path)


def open_base(card: BackboneCard, zoo: Zoo | None = None) -> Mapping[str, Tensor]:
    """The backbone's tensors by timm name, head left out; each is read when asked for.

    Raises:
        WrongBackbone: the weights are no longer those that the card, or the delta that brought it, was made with.
    """
    path = checked_path(card, zoo)
    return without_head(tensors_of(path, card), card.head)


def checked_path(card: BackboneCard, zoo: Zoo | None = None) -> Path:
    """The file behind a card, its tensors compared with the card's fingerprint where it has one.

    Raises:
        WrongBackbone: they differ.
    """
    path = weights_path(card, zoo)
    if card.fingerprint and (seen := file_fingerprint(path, card)) != card.fingerprint:
        raise WrongBackbone(
            f"the weights behind {card.source} are not those that '{card.name or card.arch}' was known by "
            f"({seen[:19]}…, not {card.fingerprint[:19]}…)",
            "bring the old weights back: vtzoo add backbone NAME --arch ARCH --weights FILE",
        )
    return path


def file_fingerprint(path: Path, card: BackboneCard) -> str:
    """The fingerprint of a card's weights file, read once per process for as long as the file stays as it is."""
    facts = path.stat()
    args = json.dumps(plain(card.model_args), sort_keys=True) if card.arch == ARCH else ""
    return _file_fingerprint(path, facts.st_size, facts.st_mtime_ns, card.head, args)


@cache
def _file_fingerprint(path: Path, size: int, changed: int, head: tuple[str, ...], args: str) -> str:  # noqa: ARG001 - part of the key
    """`args`: a dual encoder's, which say how its file's names are read."""
    stored = TensorFile(path)
    return fingerprint(without_head(converted(stored, json.loads(args)) if args else stored, head))


def without_head(source: Mapping[str, Tensor], head: tuple[str, ...]) -> Mapping[str, Tensor]:
    """A file's tensors, those of the head left out; `head` names modules or tensors."""
    inside = tuple(h + "." for h in head)
    return view(source, {n: n for n in source if n not in head and not (inside and n.startswith(inside))})
