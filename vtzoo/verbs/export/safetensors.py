"""Copy an artifact's own safetensors file out of the zoo."""

from pathlib import Path

from vtzoo.artifact import open_ref
from vtzoo.bases import weights_path
from vtzoo.errors import Conflict
from vtzoo.files import atomic_write, sha256
from vtzoo.results import Exported
from vtzoo.zoo import Zoo


def export_safetensors(*, ref: str, out: Path, zoo: Zoo | None = None) -> Exported:
    """Write a delta's, a model's or a backbone's tensors as one file.

    Raises:
        Conflict: the file exists.
    """
    zoo, out = zoo or Zoo.find(), Path(out)
    if out.exists():
        raise Conflict(f"{out} exists already", "choose another file name, or remove it")
    artifact = open_ref(ref, zoo)
    source = weights_path(artifact.card, zoo) if artifact.card else artifact.path
    assert source is not None  # only a backbone has no file of its own
    with atomic_write(out) as file, source.open("rb") as read:
        while chunk := read.read(1 << 20):
            file.write(chunk)
    return Exported(ref=artifact.ref, path=str(out), report={"sha256": sha256(out)})
