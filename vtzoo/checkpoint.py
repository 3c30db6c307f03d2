"""A folded model as what it is beside its backbone: a `full` delta, lazily, its tensors read from the folder's own file."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vtzoo.artifact import CONFIG, WEIGHTS, described
from vtzoo.backbone import card_of
from vtzoo.bases import open_base
from vtzoo.delta import BASE, HEAD, Delta, Part
from vtzoo.documents import document
from vtzoo.errors import NotFound, ShapeMismatch, WrongBackbone
from vtzoo.fingerprint import COUNTER
from vtzoo.folding import grounded
from vtzoo.merging import FULL, sites_of
from vtzoo.spec import BackboneCard, Task
from vtzoo.tensors import Lazy, TensorFile, shape_of
from vtzoo.zoo import Zoo

STATISTICS = ("running_mean", "running_var")


def folded_delta(files: Mapping[str, Path], zoo: Zoo, like: Delta | None = None) -> Delta:
    """The delta that a folded model is.

    Args:
        files: its config and weights.
        zoo: has the backbone that the config names.
        like: another delta of this backbone, whose resized tensors it shares.

    Raises:
        NotFound: the config names no backbone, or one that isn't there.
        WrongBackbone: it was folded from other weights.
        ShapeMismatch: its tensors aren't the backbone's.
    """
    source, (_, tasks) = TensorFile(files[WEIGHTS]), described(files)
    said = document(files[CONFIG]).get("vtzoo", {})
    name = said.get("backbone", "")
    if not name:
        raise NotFound(
            f"{files[CONFIG]} names no backbone",
            "vtzoo add delta NAME --backbone REF --weights FILE makes a delta of it",
        )
    kin = like if like is not None and like.backbone.name == name else None
    card = kin.backbone if kin else card_of(name, zoo)
    if said.get("fingerprint", card.fingerprint) != card.fingerprint:
        raise WrongBackbone(
            f"{files[WEIGHTS]} was folded from other weights than '{name}' has here ({said['fingerprint'][:19]}…, not {card.fingerprint[:19]}…)",
            "merge models that were folded from one backbone",
        )
    bare = Delta(
        method=FULL,
        parts=(),
        backbone=card,
        tensors={n: kin.tensors[n] for n in kin.tensors if n.startswith(BASE)} if kin else {},
    )
    ground = grounded(open_base(card, zoo), bare)
    shapes = {n: ground.shape(n) for n in ground if not n.endswith(COUNTER)}
    head = _head(source, card, shapes)
    for tensor, shape in shapes.items():
        seen = source.shape(tensor) if tensor in source else None
        if seen != shape:
            what = "is missing" if seen is None else f"is {list(seen)}"
            raise ShapeMismatch(
                f"{files[WEIGHTS]}: {tensor} {what} where {name} has {list(shape)}",
                "merge the delta that it was folded from instead",
            )
    return _delta(source, bare, shapes, head, next(iter(tasks), None))


def _head(source: TensorFile, card: BackboneCard, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The classifier's tensors.

    Raises:
        ShapeMismatch: the network has other tensors of its own.
    """
    spare = [n for n in source if n not in shapes and not n.endswith(COUNTER)]
    inside = tuple(h + "." for h in card.head)
    if strange := [n for n in spare if n not in card.head and not (inside and n.startswith(inside))]:
        raise ShapeMismatch(
            f"{source.path} has {strange[0]}, which {card.name} doesn't: folding changed the architecture",
            "merge deltas that keep the backbone's shapes",
        )
    return spare


def _delta(
    source: TensorFile, bare: Delta, shapes: Mapping[str, tuple[int, ...]], head: list[str], task: Task | None
) -> Delta:
    sites = sites_of(shapes, frozenset(n for n in shapes if n.rpartition(".")[2] in STATISTICS))
    places = {
        f"{s.key(FULL)}.{p}": s.key(p) for s in sites for kind in ("params", "buffers") for p in s.facts.get(kind, ())
    }
    tasks = (task,) if task and head else ()
    places |= {f"{HEAD}{t.name}/{n}": n for t in tasks for n in head}

    def make(name: str) -> Tensor:
        return source[name].float()

    makers = {p: (lambda n=n: make(n)) for p, n in places.items()}
    pieces = {p: source.pieces(n) for p, n in places.items()}
    more = {n: (lambda n=n: bare.tensors[n]) for n in bare.tensors}
    sizes = {p: source.shape(n) for p, n in places.items()} | {n: shape_of(bare.tensors, n) for n in more}
    return bare.with_(
        parts=(Part(method=FULL, graft=FULL, sites=tuple(sites)),), tensors=Lazy(makers | more, sizes, pieces=pieces), tasks=tasks,
        lineage={"verb": "fold"},
    )  # fmt: skip
