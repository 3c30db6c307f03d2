"""Put a delta that was made here into the zoo, with what its making took of this machine."""

from collections.abc import Mapping

from vtzoo import machine
from vtzoo.delta import Delta, stored
from vtzoo.results import leading
from vtzoo.zoo import Zoo


def kept(delta: Delta, zoo: Zoo, name: str, cost: Mapping[str, float | None]) -> str:
    """Store and list it; gives its digest.

    Args:
        delta: of one task, with its metrics.
        zoo: where.
        name: of the entry.
        cost: seconds and cpu_seconds.

    Raises:
        Conflict: the name exists.
        Resources: the disk is full.
    """
    digest, size = stored(delta, zoo)
    measured = delta.metrics.get("test") or delta.metrics.get("val") or {}
    zoo.put(
        "deltas", name,
        {
            "digest": digest, "size_bytes": size, "method": delta.method, "backbone": delta.backbone.name,
            "fingerprint": delta.backbone.fingerprint, "license": delta.backbone.license, "tasks": [t.name for t in delta.tasks],
            "metrics": leading(measured) if measured else {}, **cost, "peak_bytes": machine.peak_bytes(), "machine": machine.told(),
        },
    )  # fmt: skip
    return digest
