"""Bring weights from a file, a folder or the Hugging Face Hub into the zoo: a backbone, or a fine-tuned checkpoint as a `full` delta."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from vtzoo import hub
from vtzoo.anatomy import Site, survey
from vtzoo.arrivals import check_fit, looked_at, readable
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_card, takes_size, timm_card
from vtzoo.classifier import head_names
from vtzoo.clip_card import PREFIX, clip_card
from vtzoo.delta import HEAD, Delta, Part, stored
from vtzoo.errors import NotFound, ShapeMismatch, UsageError
from vtzoo.files import sha256
from vtzoo.fingerprint import COUNTER, base_state
from vtzoo.graft import has_statistics
from vtzoo.lineage import record
from vtzoo.pickled import unpickled
from vtzoo.published import published
from vtzoo.results import Result
from vtzoo.spec import BackboneCard, Preprocess, Task, check_labels
from vtzoo.tied import aliases, tied
from vtzoo.zoo import Zoo


def add_backbone(
    *, name: str, arch: str, weights: Path, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
    input_size: tuple[int, int, int] | None = None, license: str = "", from_pickle: bool = False, zoo: Zoo | None = None,  # noqa: A002 - the field's word
) -> Result:  # fmt: skip
    """Keep a backbone: a timm architecture's weights from a safetensors file.

    Args:
        name: what to call it.
        arch: timm architecture, or `clip:NAME[.TAG]` of open_clip's list.
        weights: timm-named tensors, or open_clip's own of such a model; a classifier in it is kept but is no part of the backbone.
        mean: of the input in [0, 1] units, one per channel; timm's own for the architecture unless given.
        std: likewise.
        input_size: [3, height, width] in pixels; likewise.
        license: SPDX name.
        from_pickle: whether the file may be a pickle, which a process of its own then reads; see `vtzoo.pickled`.
        zoo: where to keep it.

    Raises:
        UsageError: mean, std or size that no RGB image can have.
        ShapeMismatch: tensors are missing, left over, or of another shape or kind than the architecture's at this size.
        Corrupt: a tensor of a type that isn't read here, or with NaN or infinity in it.
        Mismatch: a pickle without `from_pickle`; ShapeMismatch among them.
    """
    zoo = zoo or Zoo.find()
    zoo.check_free("backbones", name)
    card = clip_card(arch) if arch.startswith(PREFIX) else timm_card(arch)
    given = {k: v for k, v in {"mean": mean, "std": std, "input_size": input_size}.items() if v is not None}
    preprocess = replace(card.preprocess, **given)
    _check(preprocess)
    height, width = preprocess.input_size[1:]
    side = height if height == width else [height, width]
    args = {**card.model_args, **({"img_size": side} if input_size and takes_size(card) else {})}
    made = replace(card, name=name, license=license or card.license, preprocess=preprocess, model_args=args, source="")
    return _keep(zoo, made, weights, from_pickle=from_pickle)


def add_published(
    *, name: str, source: str, license: str = "", from_pickle: bool = False, zoo: Zoo | None = None,  # noqa: A002 - the field's word
) -> Result:  # fmt: skip
    """Keep a backbone as others publish it, whole: with its config.

    Of the hub, it is pinned to the commit that its revision means now; the weights stay in the hub's own cache, and are fetched again,
    and compared, where they are missing. Of a folder they are kept as they are, also under open_clip's names: so their digest is
    that of the published file, and they are read by our names each time.

    Args:
        name: what to call it.
        source: `[hf-hub:]org/name[@revision]`, `clip:NAME.TAG`, or a folder's path.
        license: SPDX name; the repository's own unless given.
        from_pickle: whether a folder's weights may be a pickle; see `vtzoo.pickled`.
        zoo: where to keep it.

    Raises:
        NotFound: no such repository, revision, model, folder or file.
        Network: it can't be fetched.
        Mismatch: it is a model of neither timm nor open_clip, or a pickle without `from_pickle`.
        ShapeMismatch: its weights are not those of its architecture.
        UsageError: open_clip is not installed, or the network has no form here.
    """
    zoo = zoo or Zoo.find()
    zoo.check_free("backbones", name)
    found = published(source)
    _check(found.card.preprocess)
    card, weights = replace(found.card, name=name, license=license or found.card.license), found.weights
    if not card.source:
        return _keep(zoo, card, weights, from_pickle=from_pickle)
    card = replace(card, license=card.license or hub.licence(card.source))
    _put(zoo, looked_at(card, weights), sha256(weights), weights)
    return Result(ref=name, path=str(weights))


def _keep(zoo: Zoo, card: BackboneCard, weights: Path, *, from_pickle: bool) -> Result:
    """Store a file and what is known of it."""
    with unpickled(weights, allowed=from_pickle) as file:
        made = looked_at(card, file)
        digest = zoo.add_object(file)
        _put(zoo, replace(made, source=f"object:sha256:{digest}"), digest, file)
    return Result(ref=card.name, path=str(zoo.object(digest)))


def _put(zoo: Zoo, card: BackboneCard, digest: str, weights: Path) -> None:
    zoo.put("backbones", card.name, {**card.json(), "digest": digest, "size_bytes": weights.stat().st_size})


def add_delta(
    *, name: str, backbone: str, weights: Path, classes: Path | None = None, from_pickle: bool = False, zoo: Zoo | None = None
) -> Result:  # fmt: skip
    """Keep a fine-tuned checkpoint as a `full` delta of its backbone; it must be complete.

    Args:
        name: what to call it; the part before the last "/" names its task.
        backbone: what it was fine-tuned from.
        weights: timm-named tensors of the same architecture, with its classifier.
        classes: a text file, one label a line, in the order of the classifier's rows.
        from_pickle: whether the file may be a pickle; see `vtzoo.pickled`.
        zoo: where to keep it.

    Raises:
        ShapeMismatch: not the backbone's architecture, or not complete.
        Mismatch: a pickle without `from_pickle`.
    """
    zoo = zoo or Zoo.find()
    zoo.check_free("deltas", name)
    card = resolved_card(backbone, zoo)
    if card.model_args.get("text"):
        said = f"'{card.name}' has a text tower, which a full delta does not hold"
        raise UsageError(said, "keep the checkpoint as a backbone: vtzoo add backbone NAME --from ./FOLDER")
    with unpickled(weights, allowed=from_pickle) as file:
        return _keep_delta(zoo, name, card, file, classes)


def _keep_delta(zoo: Zoo, name: str, card: BackboneCard, weights: Path, classes: Path | None) -> Result:
    """See `add_delta`."""
    model = build_card(card, zoo=zoo, num_classes=1)
    source = readable(weights)
    inside = tuple(h + "." for h in head_names(model))
    body = {n: source[n] for n in source if not n.startswith(inside)}
    head = {n: source[n] for n in source if n.startswith(inside)}
    check_fit(body, base_state(model), card.arch)
    anatomy = survey(model)
    owners = [_with_statistics(s, model) for s in anatomy.params(anatomy.parameter_names)]
    sites = tied(owners, aliases(model))
    kept = ("params", "buffers")
    tensors = {s.key(f"full.{p}"): body[s.key(p)].float() for s in sites for k in kept for p in s.facts.get(k, ())}
    task = Task(name=name.rpartition("/")[0] or name, classes=_labels(classes, head), preprocess=card.preprocess)
    tensors |= {f"{HEAD}{task.name}/{n}": t.float() for n, t in head.items()}
    delta = Delta(
        method="full", parts=(Part(method="full", graft="full", sites=sites),), backbone=getattr(model, "vtzoo_card"), tensors=tensors,  # noqa: B009 - set by build
        tasks=(task,) if head else (), lineage=record("add", [sha256(weights)]),
    )  # fmt: skip
    digest, size = stored(delta, zoo)
    zoo.put(
        "deltas", name,
        {"digest": digest, "size_bytes": size, "method": "full", "backbone": card.name, "fingerprint": delta.backbone.fingerprint, "license": card.license, "tasks": [t.name for t in delta.tasks], "metrics": {}},
    )  # fmt: skip
    return Result(ref=name, path=str(zoo.object(digest)))


def _with_statistics(site: Site, model: nn.Module) -> Site:
    """A norm's running statistics belong to a fine-tuned checkpoint as its weights do."""
    host = model.get_submodule(site.name)
    if not has_statistics(host):
        return site
    shapes = {n: list(t.shape) for n, t in host.named_buffers(recurse=False) if n != COUNTER}
    return replace(site, facts={**site.facts, "buffers": shapes})


def _check(preprocess: Preprocess) -> None:
    """Refuse what can't be done to an RGB image; three numbers each, so that a forgotten one is not guessed."""
    size = preprocess.input_size
    if len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise UsageError(f"the input size {_said(size)} is none", "give whole pixels: --input-size 224, or 3,224,288")
    if size[0] != 3:
        raise UsageError(f"an input of {size[0]} channels: images are read as RGB", "use a network of 3 channels")
    for what, values, zero in (("mean", preprocess.mean, True), ("std", preprocess.std, False)):
        if len(values) != 3 or not all(0 <= v <= 1 and (v or zero) for v in values):
            wanted = f"three numbers from 0 to 1{'' if zero else ', none 0'} (red, green, blue)"
            raise UsageError(f"the {what} {_said(values)} is not {wanted}", f"for example --{what} 0.5,0.5,0.5")


def _said(values: tuple[float, ...]) -> str:
    return ",".join(f"{v:g}" for v in values)


def _labels(path: Path | None, head: Mapping[str, Tensor]) -> tuple[str, ...]:
    rows = next((int(t.shape[0]) for t in head.values() if t.ndim > 1), 0)
    if path is None:
        return tuple(str(i) for i in range(rows))
    if not path.is_file():
        raise NotFound(f"no file {path}", "give a text file with one class a line")
    labels = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(labels) != rows:
        raise ShapeMismatch(
            f"{path} has {len(labels)} classes, the classifier {rows}",
            "write one class a line, in the classifier's order",
        )
    check_labels(labels)
    return labels
