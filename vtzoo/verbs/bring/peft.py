"""Bring PEFT's adapter folder into the zoo as a delta."""

from pathlib import Path

from vtzoo.files import sha256
from vtzoo.interop import peft
from vtzoo.lineage import record
from vtzoo.pickled import unpickled
from vtzoo.results import Result
from vtzoo.verbs.bring._keep import bare, check_beside, keep
from vtzoo.zoo import Zoo


def import_peft(
    *, folder: Path, backbone: str, name: str, task: str | None = None, classes: Path | None = None, from_pickle: bool = False, zoo: Zoo | None = None
) -> Result:  # fmt: skip
    """Keep what PEFT's `save_pretrained` wrote as a delta of its backbone.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        backbone: what it was trained on; PEFT's own files do not say which weights those are.
        name: what to call it; the part before the last "/" names its task.
        task: what to call its task instead.
        classes: labels, one a line, in the order of the head's rows; those of `vtzoo.json` unless given, else numbers.
        from_pickle: whether the tensors may be a pickle, `adapter_model.bin`; see `vtzoo.pickled`.
        zoo: where to keep it.

    Raises:
        NotFound: no such folder.
        Corrupt: a damaged file.
        Mismatch: PEFT's adapter had no effect on some layer or another than merged, changed the base, or is of a kind that isn't
            read here, or is a pickle without `from_pickle`; DeadTarget, ShapeMismatch, WrongBackbone among them.
    """
    zoo, folder = zoo or Zoo.find(), Path(folder)
    zoo.check_free("deltas", name)
    _, card, anatomy = bare(backbone, zoo)
    beside = peft.beside(folder)
    check_beside(beside, card)  # first: on another backbone its tensors find no place
    weights = peft.weights_of(folder)
    with unpickled(weights, allowed=from_pickle) as file:
        read = peft.load(folder, anatomy, file)
        lineage = record("import", [sha256(weights)], format="peft", peft_type=read.peft_type)
        return keep(
            zoo, name, read.pieces, read.head, card, task=task, classes=classes, beside=beside, lineage=lineage,
        )  # fmt: skip
