"""What exports share: whether there is place for them, where the model comes from (names, digests, licence, versions), its entry in the zoo."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtzoo.artifact import EXPORT, Artifact
from vtzoo.errors import Conflict, NotFound, UsageError
from vtzoo.formats import beside
from vtzoo.lineage import record, versions
from vtzoo.machine import check_writable
from vtzoo.onnx.convert import check_opset
from vtzoo.onnx.run import require
from vtzoo.refs import EXPORTS
from vtzoo.spec import BackboneCard
from vtzoo.zoo import Zoo

PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime")


def ready(out: Path, opset: int) -> None:
    """Refuse what can't be before anything is loaded.

    Raises:
        UsageError: no such operator set, a package is missing, or a name that nobody would take for such a file.
        NotFound: the folder does not exist.
        Conflict: the file exists.
        VtzooError: nothing can be written there.
    """
    check_opset(opset)
    require()
    check_place(out, "onnx")


def check_place(out: Path, form: str) -> None:
    """Refuse a place where no file can be written, or none that anybody would know.

    Raises:
        Conflict: the file exists, or one that belongs to it.
        UsageError: the name has another suffix.
        NotFound: the folder does not exist.
        VtzooError: nothing can be written there.
    """
    for file in beside(out, form).values():
        if file.exists():
            raise Conflict(f"{file} exists already", "choose another file name, or remove it")
    suffix = next(suffix for suffix, kind in EXPORTS.items() if kind == form)
    if out.suffix != suffix:
        said = f"{out} does not end in {suffix}, by which predict and eval know such files"
        raise UsageError(said, f"call it {out.with_suffix(suffix)}")
    if not out.parent.is_dir():
        raise NotFound(f"{out.parent} does not exist", f"make it: mkdir -p {out.parent}")
    check_writable(out.parent, out)


def origin(
    artifact: Artifact, card: BackboneCard, *, precision: str, folded: bool, packages: Sequence[str] = PACKAGES
) -> dict[str, Any]:
    """What the metadata say of it: the artifact's own digest, its parents' (of a merge, the deltas'), and the backbone's fingerprint."""
    delta = artifact.delta
    return {
        "ref": artifact.name,
        "digest": artifact.digest,
        "method": delta.method if delta else "",
        "parents": list(delta.lineage.get("parents", ())) if delta else [],
        "backbone": card.name,
        "fingerprint": card.fingerprint,
        "license": card.license,
        "precision": precision,
        "folded": folded,
        "versions": versions(packages),
    }


def keep(
    zoo: Zoo, name: str, content: Mapping[str, bytes], card: BackboneCard, tasks: Sequence[str], parents: Sequence[str], report: Mapping[str, Any]
) -> None:  # fmt: skip
    """Keep an exported file in the zoo, or those that belong together, by suffix; `parents` are digests, "" of a backbone."""
    files = {EXPORT + suffix: zoo.add_object(data) for suffix, data in content.items()}
    zoo.put(
        "models", name,
        {
            "kind": "export", "files": files, "size_bytes": sum(map(len, content.values())), "arch": card.arch,
            "license": card.license, "tasks": list(tasks), "metrics": {"max_rel": report["max_rel"]},
            "lineage": record("export", parents, precision=report["precision"]),
        },
    )  # fmt: skip
