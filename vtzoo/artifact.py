"""Open whatever a ref means (a delta, a backbone, a folded model, a student) and make it run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vtzoo.backbone import build_card, card_of, config_json, create
from vtzoo.bases import open_base
from vtzoo.delta import HEAD, Delta, is_linear
from vtzoo.documents import document
from vtzoo.errors import Corrupt, NotFoldable, NotFound, ShapeMismatch, UsageError
from vtzoo.files import sha256
from vtzoo.fingerprint import COUNTER, base_state
from vtzoo.folding import Folded, fold, grounded, imaging
from vtzoo.formats import beside, opened
from vtzoo.installed import head_state
from vtzoo.lineage import CONFIG, WEIGHTS
from vtzoo.live import attach
from vtzoo.merges._checks import complete, told
from vtzoo.objects import workroom
from vtzoo.onnx.run import open_onnx
from vtzoo.refs import EXPORTS, is_path
from vtzoo.spec import SIDE_LIMIT, BackboneCard, Preprocess, Task, chosen
from vtzoo.speech import speaks, tells_all
from vtzoo.tensors import TensorFile, prefixed, shape_of, write
from vtzoo.zoo import Zoo

HEADS, EXPORT = "heads.safetensors", "model"
"""More names of a model's files: of a student's heads, and of exported ones, with their suffixes."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One of four: a delta, a bare backbone's card, a plain model's files, or an exported file.

    Attributes:
        ref: its name in the zoo, or the path.
        digest: of the file with its tensors, 64 hex digits, whether or not that is in the zoo; "" for a backbone.
        path: that file; None for a backbone.
        exported: the files by suffix, first the one that names the rest.
    """

    ref: str
    zoo: Zoo
    digest: str = ""
    path: Path | None = None
    delta: Delta | None = None
    card: BackboneCard | None = None
    files: Mapping[str, Path] | None = None
    exported: Mapping[str, Path] | None = None

    @property
    def name(self) -> str:
        """What others say of it: a path by its last part."""
        return Path(self.ref).name if is_path(self.ref) else self.ref

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Those that it has a head for."""
        if self.delta is not None:
            return self.delta.tasks
        return described(self.files)[1] if self.files is not None else ()

    def task(self, name: str | None) -> Task | None:
        """One of them by name; without a name the only one; None for "" and where there is none.

        Raises:
            NotFound: no such task, or several and none named.
        """
        if name == "" or (name is None and not self.tasks):
            return None
        return chosen(self.tasks, name, "this delta" if self.delta is not None else f"'{self.ref}'")


@dataclass(frozen=True, kw_only=True)
class Live:
    """A model ready to run, with what its outputs mean."""

    model: nn.Module
    card: BackboneCard
    task: Task | None
    preprocess: Preprocess


def open_ref(ref: str, zoo: Zoo | None = None, *, exports: bool = False) -> Artifact:
    """Find and open what a ref means.

    Args:
        ref: a name or a path.
        zoo: where to look.
        exports: whether the caller only runs the model, and so takes an exported file, too.

    Raises:
        NotFound: nothing of that name.
        UsageError: the ref is ambiguous, or an export and no `exports`.
        Corrupt: the file is damaged.
    """
    zoo = zoo or Zoo.find()
    if is_path(ref):
        path = Path(ref).expanduser()
        return _exported_path(ref, path, zoo, exports=exports) if path.suffix in EXPORTS else _from_path(path, zoo)
    entry = zoo.resolve(ref)
    if entry.section == "backbones":
        return Artifact(ref=entry.name, zoo=zoo, card=BackboneCard.of(entry.name, entry.facts))
    if entry.section == "deltas":
        digest = _hex(entry.facts["digest"])
        path = zoo.object(digest)
        return Artifact(ref=entry.name, zoo=zoo, digest=digest, path=path, delta=Delta.open(path))
    files = {name: zoo.object(_hex(digest)) for name, digest in entry.facts["files"].items()}
    if WEIGHTS not in files or CONFIG not in files:
        return _exported(entry.name, {s: files[EXPORT + s] for s in _suffixes(files)}, zoo, exports=exports)
    digest = _hex(entry.facts["files"][WEIGHTS])
    return Artifact(ref=entry.name, zoo=zoo, digest=digest, path=files[WEIGHTS], files=files)


def _suffixes(files: Mapping[str, Path]) -> list[str]:
    """Of an entry's exported files, first that which tells their kind."""
    found = [name.removeprefix(EXPORT) for name in files if name.startswith(f"{EXPORT}.")]
    return sorted(found, key=lambda suffix: suffix not in EXPORTS)


def _exported_path(ref: str, path: Path, zoo: Zoo, *, exports: bool) -> Artifact:
    return _exported(ref, beside(path, EXPORTS[path.suffix]), zoo, exports=exports)


def _exported(ref: str, files: Mapping[str, Path], zoo: Zoo, *, exports: bool) -> Artifact:
    if not exports or not files or next(iter(files)) not in EXPORTS:
        hint = "use the model or delta that it was made from"
        raise UsageError(f"'{ref}' is an export, which only predict, eval and bench take", hint)
    path = next(iter(files.values()))
    return Artifact(ref=ref, zoo=zoo, digest=sha256(path), path=path, exported=files)


def as_delta(artifact: Artifact) -> Delta:
    """The delta.

    Raises:
        UsageError: it is something else.
    """
    if artifact.delta is None:
        raise UsageError(f"'{artifact.ref}' is no delta", "see them with: vtzoo ls deltas")
    return artifact.delta


def go_live(
    artifact: Artifact, task: str | None = None, *, plain: bool = False, model_args: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> Live:  # fmt: skip
    """Build and load.

    Args:
        artifact: what `open_ref` gives.
        task: whose head; may be left out where there is one; "" for none.
        plain: fold a delta into plain weights instead of attaching it.
        model_args: timm's, over those with which it was made; of an exported file they say nothing.
        whole: attach it to a dual encoder with its text tower, also where that has nothing more to say.

    Raises:
        NotFoldable: `plain`, and the delta has no such form.
        WrongBackbone: the backbone's weights are not those the delta was trained on.
        UsageError: timm's network doesn't take such arguments.
    """
    args = model_args or {}
    if artifact.delta is not None:
        return _live_delta(artifact.delta, artifact.zoo, task, plain=plain, model_args=args, whole=whole)
    if artifact.card is not None:
        return _live_backbone(artifact.card, artifact.zoo, args)
    if artifact.exported is not None:
        return _live_export(artifact.exported, task)
    assert artifact.files is not None
    return _live_files(artifact.files, artifact.task(task), args)


def simplest(
    artifact: Artifact, task: str | None = None, model_args: Mapping[str, Any] | None = None
) -> tuple[Live, str]:
    """A model in plain weights where it has such; else attached, and why."""
    if artifact.delta is None:
        return go_live(artifact, task, model_args=model_args), ""
    try:
        return go_live(artifact, task, plain=True, model_args=model_args), ""
    except NotFoldable as error:
        return go_live(artifact, task, model_args=model_args), error.message


def fold_artifact(delta: Delta, zoo: Zoo, task: str | None, factor: float = 1.0) -> Folded:
    """Fold a delta, whose tensors must be those that its header tells of, into its own backbone's file; streams, builds no model."""
    base = open_base(delta.backbone, zoo)
    complete(delta, "the delta", grounded(base, delta))
    return fold(base, delta, task=task, factor=factor, check=False)


def plain_model(delta: Delta, folded: Folded, classes: int, model_args: Mapping[str, Any] | None = None) -> nn.Module:
    """A stock timm model holding folded weights, or the backbone's own; of a dual encoder its image tower."""
    args = {**delta.backbone.model_args, **imaging(delta.backbone), **folded.all_args, **(model_args or {})}
    model = create(delta.backbone.arch, pretrained=False, num_classes=classes, **args)
    return load_plain(model, folded)


def load_plain(model: nn.Module, tensors: Mapping[str, Any]) -> nn.Module:
    """Load a complete state dict, refusing anything missing, left over or of another shape."""
    state = model.state_dict()
    lacking, spare = {n for n in set(state) - set(tensors) if not n.endswith(COUNTER)}, set(tensors) - set(state)
    if lacking or spare:
        raise ShapeMismatch(
            f"the weights lack {sorted(lacking)[:2]} and bring {sorted(spare)[:2]}",
            "is this the architecture they were made for?",
        )
    for name in tensors:
        if shape_of(tensors, name) != tuple(state[name].shape):
            raise ShapeMismatch(
                f"{name} is {list(shape_of(tensors, name))} in the weights, {list(state[name].shape)} in the model",
                "is this the architecture, input size and number of classes they were made for?",
            )
        state[name].copy_(tensors[name])
    return model.requires_grad_(requires_grad=False).eval()


def _live_delta(
    delta: Delta, zoo: Zoo, task: str | None, *, plain: bool, model_args: Mapping[str, Any], whole: bool
) -> Live:
    chosen = None if task == "" or (task is None and not delta.tasks) else delta.task(task)
    card = delta.backbone
    preprocess = chosen.preprocess if chosen else card.preprocess
    if plain:
        folded = fold_artifact(delta, zoo, "" if chosen is None else chosen.name)
        model = plain_model(delta, folded, len(chosen.classes) if chosen else 0, model_args)
        card = replace(card, model_args={**card.model_args, **folded.all_args, **model_args})
    else:
        told(delta, "the delta")  # before anything is made of such sizes
        known = bool(card.fingerprint)  # then building has compared it with the weights already
        silent = known and not (whole and chosen) and bool(card.model_args.get("text")) and _said(delta, chosen)
        args: dict[str, Any] = {**model_args, **({"text": False} if silent else {})}
        model = build_card(card, zoo=zoo, num_classes=len(chosen.classes) if chosen else 0, **args)
        card = replace(card, model_args={**card.model_args, "text": False}) if silent else card
        attach(model, delta, task="" if chosen is None else chosen.name, check=not known)
    return Live(model=model, card=card, task=chosen, preprocess=preprocess)


def _said(delta: Delta, task: Task | None) -> bool:
    """Whether a delta holds all that a text tower has to say: no part acts on it, or what that makes stands in the classifier."""
    speaking = [p for p in delta.parts if speaks(p)]
    return not speaking or task is None or is_linear(delta.head(task.name)) or any(map(tells_all, speaking))


def _live_backbone(card: BackboneCard, zoo: Zoo, model_args: Mapping[str, Any]) -> Live:
    model = build_card(card, zoo=zoo, **model_args)
    return Live(model=model, card=card, task=None, preprocess=card.preprocess)


def _live_export(files: Mapping[str, Path], task: str | None) -> Live:
    suffix, path = next(iter(files.items()))
    form = EXPORTS[suffix]
    model, said = open_onnx(path, task) if form == "onnx" else opened(form, files, task)
    card = BackboneCard(
        name=said.facts.get("backbone", ""), arch="", preprocess=said.preprocess, license=said.facts.get("license", "")
    )
    return Live(model=model, card=card, task=said.task, preprocess=said.preprocess)


def _live_files(files: Mapping[str, Path], task: Task | None, model_args: Mapping[str, Any]) -> Live:
    card, _ = described(files)
    args = {**card.model_args, **model_args}
    model = create(card.arch, pretrained=False, num_classes=len(task.classes) if task else 0, **args)
    head = prefixed(TensorFile(files[HEADS]), f"{HEAD}{task.name}/") if HEADS in files and task else {}
    load_plain(model, {**TensorFile(files[WEIGHTS]), **head})
    return Live(model=model, card=card, task=task, preprocess=card.preprocess)


def described(files: Mapping[str, Path]) -> tuple[BackboneCard, tuple[Task, ...]]:
    """What a plain model's config says: its network, and whose labels its classifier has, or each of its classifiers.

    Raises:
        Corrupt: it is no timm config.
    """
    config = document(files[CONFIG], "make the folder again")
    try:
        arch, shown, own = config["architecture"], config["pretrained_cfg"], config.get("vtzoo", {})
        labels = config.get("label_names") or _numbers(config.get("num_classes", 0))
        args = {k: v for k, v in config.get("model_args", {}).items() if k != "num_classes"}  # timm repeats it there
        heads = tuple(Task.of(facts) for facts in own.get("heads", ()))
        card = BackboneCard.of(arch, {"arch": arch, "model_args": args, "license": shown.get("license")})
        name, several = (own.get("tasks") or ["task"])[0], own.get("multilabel")
        one = Task.of({**shown, "name": name, "classes": labels, "multilabel": several})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{files[CONFIG]} is no timm config: {error}", "make the folder again") from error
    return replace(card, preprocess=one.preprocess), heads or ((one,) if labels else ())


def _numbers(count: int) -> list[str]:
    """Labels of a classifier that has none.

    Raises:
        ValueError: no classifier has so many.
    """
    if count > SIDE_LIMIT:
        raise ValueError(f"{count} classes")
    return [str(i) for i in range(count)]


def _from_path(path: Path, zoo: Zoo) -> Artifact:
    if path.is_dir():
        files = {n: path / n for n in (CONFIG, WEIGHTS)}
        if missing := [n for n, p in files.items() if not p.is_file()]:
            raise NotFound(f"{path} has no {missing[0]}", "give a folder that vtzoo fold or timm wrote")
        weights = files[WEIGHTS]
        files |= {HEADS: path / HEADS} if (path / HEADS).is_file() else {}
        return Artifact(ref=str(path), zoo=zoo, digest=sha256(weights), path=weights, files=files)
    return Artifact(ref=str(path), zoo=zoo, delta=Delta.open(path), digest=sha256(path), path=path)


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def store_model(
    zoo: Zoo, name: str, model: nn.Module, card: BackboneCard, *, kind: str, tasks: Sequence[Task], facts: Mapping[str, Any],
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> str:  # fmt: skip
    """Keep a plain model in the zoo as a timm folder's files; gives the weights' digest.

    Args:
        zoo: where.
        name: of the entry.
        model: with the one task's classifier; without any where there are several tasks or none.
        card: of its network.
        kind: "student".
        tasks: whose classifier it has.
        facts: for the index.
        heads: each task's classifier by timm's names, where there are several tasks.
    """
    own: dict[str, Any] = {"kind": kind, **facts.get("lineage", {}), "tasks": [t.name for t in tasks]}
    own |= {"heads": [t.json() for t in tasks]} if heads else {}
    with workroom(zoo.root) as folder:
        write_folder(folder, model, card, tasks[0].classes if tasks and not heads else (), own)
        if heads:
            named = {f"{HEAD}{task}/{n}": t for task, head in heads.items() for n, t in head.items()}
            write(folder / HEADS, named, {"format": "pt"})
        files = {path.name: zoo.add_object(path) for path in sorted(folder.iterdir())}
        size = sum(path.stat().st_size for path in folder.iterdir())
    shown = {
        "kind": kind,
        "files": files,
        "size_bytes": size,
        "arch": card.arch,
        "license": card.license,
        "tasks": [t.name for t in tasks],
    }
    zoo.put("models", name, {**shown, **facts})
    return files[WEIGHTS]


def write_folder(
    folder: Path, model: nn.Module, card: BackboneCard, classes: tuple[str, ...], own: Mapping[str, Any]
) -> None:
    """Write a model as plain timm reads it: its config, with what vtzoo says of it, and its weights."""
    config = {**config_json(model, card, classes, {}), "vtzoo": own}
    write(folder / WEIGHTS, {**base_state(model), **head_state(model)}, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def resolved_card(name: str, zoo: Zoo | None) -> BackboneCard:
    """A backbone's card by ref; a name that only timm knows counts too."""
    card = card_of(name, zoo)
    return replace(card, name=card.name or name)
