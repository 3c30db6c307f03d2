"""Bring an adapter in LyCORIS' form into the zoo as a delta."""

from pathlib import Path

from vtzoo.files import sha256
from vtzoo.interop import lycoris
from vtzoo.lineage import record
from vtzoo.pickled import unpickled
from vtzoo.results import Result
from vtzoo.verbs.bring._keep import bare, keep
from vtzoo.zoo import Zoo


def import_lycoris(
    *, file: Path, backbone: str, name: str, from_pickle: bool = False, zoo: Zoo | None = None
) -> Result:  # fmt: skip
    """Keep what LyCORIS or kohya's scripts wrote as a delta of its backbone, without a head, which such files do not hold.

    Args:
        file: safetensors.
        backbone: what it was trained on; the file does not say which weights those are.
        name: what to call it.
        from_pickle: whether the file may be a pickle; see `vtzoo.pickled`.
        zoo: where to keep it.

    Raises:
        NotFound: no such file.
        Corrupt: a damaged file.
        Mismatch: the adapter had no effect on some layer or is of a kind that isn't read here, or a pickle without
            `from_pickle`; DeadTarget and ShapeMismatch among them.
    """
    zoo, file = zoo or Zoo.find(), Path(file)
    zoo.check_free("deltas", name)
    _, card, anatomy = bare(backbone, zoo)
    with unpickled(file, allowed=from_pickle) as plain:
        pieces = lycoris.load(plain, anatomy)
        lineage = record("import", [sha256(file)], format="lycoris")
        return keep(zoo, name, pieces, {}, card, task=None, classes=None, beside={}, lineage=lineage)
