"""Compare two artifacts: what they say of themselves, and their tensors."""

from vtzoo.apart import apart, whole
from vtzoo.artifact import open_ref
from vtzoo.facts import compared
from vtzoo.formats import metadata
from vtzoo.lineage import origin
from vtzoo.refs import EXPORTS, as_path, is_path
from vtzoo.results import Compared
from vtzoo.zoo import Zoo


def diff(*, a: str, b: str, zoo: Zoo | None = None) -> Compared:
    """Compare two deltas, two models, or one with the other.

    Args:
        a: a name, or a file.
        b: likewise.
        zoo: where to look.

    Returns:
        `facts`: a row for each that either says; `tensors`: by what they were compared, why by nothing better, one row a tensor with
        the largest difference first, and the same of all together (see `vtzoo.apart`).

    Raises:
        NotFound: nothing of that name.
        Corrupt: a file is damaged.
    """
    zoo = zoo or Zoo.find()
    one, two = (open_ref(ref, zoo, exports=True) for ref in (a, b))
    origins = [origin(zoo, r, metadata(as_path(r)) if _exported(r) else None) for r in (a, b)]
    found = apart(one, two)
    rows = sorted(found.rows, key=lambda r: (-r["difference"], r["tensor"]))
    tensors = {
        "by": found.by, "because": found.because, "whole": whole(rows) if rows else None, "rows": rows,
        "only_a": list(found.only[0]), "only_b": list(found.only[1]),
    }  # fmt: skip
    same = bool(one.digest) and one.digest == two.digest
    return Compared(a=one.ref, b=two.ref, same=same, facts=compared(*origins), tensors=tensors)


def _exported(ref: str) -> bool:
    return is_path(ref) and as_path(ref).suffix in EXPORTS
