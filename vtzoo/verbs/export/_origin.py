"""Where an exported model comes from: names, digests, licence, versions."""

from importlib.metadata import version
from typing import Any

import vtzoo
from vtzoo.artifact import Artifact
from vtzoo.spec import BackboneCard

PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime")


def origin(artifact: Artifact, card: BackboneCard, *, precision: str, folded: bool) -> dict[str, Any]:
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
        "versions": {"vtzoo": vtzoo.__version__, **{p: version(p) for p in PACKAGES}},
    }
