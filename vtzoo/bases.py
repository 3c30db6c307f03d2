"""A backbone's own tensors, from wherever its card says they are; lazy, and without timm."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from torch import Tensor

from vtzoo import hub
from vtzoo.errors import NotFound, UsageError, WrongBackbone
from vtzoo.fingerprint import fingerprint
from vtzoo.refs import check_member, shown
from vtzoo.spec import BackboneCard
from vtzoo.tensors import Lazy, TensorFile
from vtzoo.zoo import Zoo


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
        return hub.fetch(card.source, "model.safetensors", card.digest)
    raise UsageError(
        f"'{card.name}' has no weights (source '{card.source}')", "vtzoo add backbone NAME --arch … --weights FILE"
    )


def open_base(card: BackboneCard, zoo: Zoo | None = None) -> Mapping[str, Tensor]:
    """The backbone's tensors by timm name, head left out; each is read when asked for.

    Raises:
        WrongBackbone: the weights are no longer those that the card, or the delta that brought it, was made with.
    """
    path = checked_path(card, zoo)
    return without_head(TensorFile(path), card.head)


def checked_path(card: BackboneCard, zoo: Zoo | None = None) -> Path:
    """The file behind a card, its tensors compared with the card's fingerprint where it has one.

    Raises:
        WrongBackbone: they differ.
    """
    path = weights_path(card, zoo)
    if card.fingerprint and (seen := file_fingerprint(path, card.head)) != card.fingerprint:
        raise WrongBackbone(
            f"the weights behind {card.source} are not those that '{card.name or card.arch}' was known by "
            f"({seen[:19]}…, not {card.fingerprint[:19]}…)",
            "bring the old weights back: vtzoo add backbone NAME --arch ARCH --weights FILE",
        )
    return path


def file_fingerprint(path: Path, head: tuple[str, ...]) -> str:
    """The fingerprint of a weights file, read once per process for as long as the file stays as it is."""
    facts = path.stat()
    return _file_fingerprint(path, facts.st_size, facts.st_mtime_ns, head)


@cache
def _file_fingerprint(path: Path, size: int, changed: int, head: tuple[str, ...]) -> str:  # noqa: ARG001 - part of the key
    return fingerprint(without_head(TensorFile(path), head))


def without_head(source: TensorFile, head: tuple[str, ...]) -> Mapping[str, Tensor]:
    """A file's tensors, those of the head left out; `head` names modules or tensors."""
    inside = tuple(h + "." for h in head)
    names = [n for n in source if n not in head and not (inside and n.startswith(inside))]
    shapes, dtypes = {n: source.shape(n) for n in names}, {n: source.dtype(n) for n in names}
    return Lazy({n: (lambda n=n: source[n]) for n in names}, shapes, dtypes, {n: source.pieces(n) for n in names})
