"""Copy a model out of the zoo as a plain timm folder."""

from pathlib import Path

from vtzoo.artifact import CONFIG, WEIGHTS, go_live, open_ref, write_folder
from vtzoo.errors import UsageError
from vtzoo.files import atomic_dir, sha256
from vtzoo.lineage import record
from vtzoo.results import Exported
from vtzoo.zoo import Zoo


def export_timm(*, ref: str, out: Path, task: str | None = None, zoo: Zoo | None = None) -> Exported:
    """Write a folded model or student as `config.json` and `model.safetensors`.

    Args:
        ref: a plain model.
        out: the folder to make.
        task: whose classifier, where there are several; "" for none.
        zoo: where to look.

    Raises:
        UsageError: the ref is a delta or a backbone.
        NotFound: there is no such task, or several and none chosen.
        Conflict: the folder exists.
    """
    zoo = zoo or Zoo.find()
    artifact = open_ref(ref, zoo)
    if artifact.files is None:
        raise UsageError(f"'{artifact.ref}' is not a plain model", f"fold it: vtzoo fold {artifact.ref} --out {out}")
    several = len(artifact.tasks) > 1
    chosen = artifact.task(task)
    with atomic_dir(Path(out)) as folder:
        if several:
            live, own = go_live(artifact, task), record("export", [artifact.digest])
            own["tasks"] = [chosen.name] if chosen else []
            write_folder(folder, live.model, live.card, chosen.classes if chosen else (), own)
        else:
            for name in (CONFIG, WEIGHTS):
                (folder / name).write_bytes(artifact.files[name].read_bytes())
    return Exported(ref=artifact.ref, path=str(out), report={"sha256": sha256(Path(out) / WEIGHTS)})
