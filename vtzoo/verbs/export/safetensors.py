"""Copy an artifact's own safetensors file out of the zoo."""

from pathlib import Path

from vtzoo.artifact import HEADS, WEIGHTS, open_ref
from vtzoo.bases import weights_path
from vtzoo.errors import Conflict
from vtzoo.files import atomic_write, sha256
from vtzoo.results import Exported
from vtzoo.tensors import TensorFile, write
from vtzoo.zoo import Zoo


def export_safetensors(*, ref: str, out: Path, zoo: Zoo | None = None) -> Exported:
    """Write a delta's, a model's or a backbone's tensors as one file; several tasks' classifiers as `@head/TASK/…`.

    Raises:
        Conflict: the file exists.
    """
    zoo, out = zoo or Zoo.find(), Path(out)
    if out.exists():
        raise Conflict(f"{out} exists already", "choose another file name, or remove it")
    artifact = open_ref(ref, zoo)
    source = weights_path(artifact.card, zoo) if artifact.card else artifact.path
    assert source is not None  # only a backbone has no file of its own
    if artifact.files and HEADS in artifact.files:
        parts = [TensorFile(artifact.files[name]) for name in (WEIGHTS, HEADS)]
        write(out, {n: part[n] for part in parts for n in part}, {"format": "pt"})
    else:
        with atomic_write(out) as file, source.open("rb") as read:
            while chunk := read.read(1 << 20):
                file.write(chunk)
    return Exported(ref=artifact.ref, path=str(out), report={"sha256": sha256(out)})
