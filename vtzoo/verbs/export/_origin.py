"""What exports share: whether there is place for them, where the model comes from (names, digests, licence, versions), its entry in the zoo."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vtzoo
from vtzoo.artifact import EXPORT, Artifact
from vtzoo.errors import Conflict
from vtzoo.onnx.convert import check_opset
from vtzoo.onnx.run import require
from vtzoo.spec import BackboneCard
from vtzoo.zoo import Zoo

PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime")


def ready(out: Path, opset: int) -> None:
    """Refuse what can't be before anything is loaded.

    Raises:
        UsageError: no such operator set, or a package is missing.
        Conflict: the file exists.
    """
    check_opset(opset)
    require()
    check_free(out)


def check_free(out: Path) -> None:
    """Refuse to write over a file.

    Raises:
        Conflict: it exists.
    """
    if out.exists():
        raise Conflict(f"{out} exists already", "choose another file name, or remove it")


def origin(
    artifact: Artifact, card: BackboneCard, *, precision: str, folded: bool, packages: Sequence[str] = PACKAGES
) -> dict[str, Any]:
    """What the metadata say of it: the artifact's own digest, its parents' (of a merge, the deltas'), and the backbone's fingerprint."""
    delta = artifact.delta
    return {
        "ref": artifact.ref,
        "digest": artifact.digest,
        "method": delta.method if delta else "",
        "parents": list(delta.lineage.get("parents", ())) if delta else [],
        "backbone": card.name,
        "fingerprint": card.fingerprint,
        "license": card.license,
        "precision": precision,
        "folded": folded,
        "versions": {"vtzoo": vtzoo.__version__, **{p: version(p) for p in packages}},
    }


def keep(
    zoo: Zoo, name: str, content: Mapping[str, bytes], arch: str, tasks: Sequence[str], parents: Sequence[str], report: Mapping[str, Any]
) -> None:  # fmt: skip
    """Keep an exported file in the zoo, or those that belong together, by suffix."""
    files = {EXPORT + suffix: zoo.add_object(data) for suffix, data in content.items()}
    zoo.put(
        "models", name,
        {
            "kind": "export", "files": files, "size_bytes": sum(map(len, content.values())), "arch": arch,
            "tasks": list(tasks), "metrics": {"max_rel": report["max_rel"]},
            "lineage": {"verb": "export", "parents": [f"sha256:{p}" for p in parents], "precision": report["precision"]},
        },
    )  # fmt: skip
