"""Copy a model out of the zoo as a plain timm folder."""

from pathlib import Path

from vtzoo.artifact import CONFIG, WEIGHTS, open_ref
from vtzoo.errors import UsageError
from vtzoo.files import atomic_dir, sha256
from vtzoo.results import Exported
from vtzoo.zoo import Zoo


def export_timm(*, ref: str, out: Path, zoo: Zoo | None = None) -> Exported:
    """Write a folded model or student as `config.json` and `model.safetensors`.

    Raises:
        UsageError: the ref is a delta or a backbone.
        Conflict: the folder exists.
    """
    zoo = zoo or Zoo.find()
    artifact = open_ref(ref, zoo)
    if artifact.files is None:
        raise UsageError(f"'{artifact.ref}' is not a plain model", f"fold it: vtzoo fold {artifact.ref} --out {out}")
    with atomic_dir(Path(out)) as folder:
        for name in (CONFIG, WEIGHTS):
            (folder / name).write_bytes(artifact.files[name].read_bytes())
    return Exported(ref=artifact.ref, path=str(out), report={"sha256": sha256(Path(out) / WEIGHTS)})
