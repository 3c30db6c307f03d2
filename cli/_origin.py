"""What a ref's artifact says of itself, exported files among them, which only their runtimes read."""

from pathlib import Path
from typing import TYPE_CHECKING

from vtzoo.refs import EXPORTS, as_path, is_path

if TYPE_CHECKING:
    from vtzoo.lineage import Origin
    from vtzoo.zoo import Zoo


def origin_of(zoo: "Zoo", ref: str) -> "Origin":
    """Find and read it; loads a runtime for an exported file's path alone."""
    from vtzoo.lineage import origin

    if not is_path(ref) or Path(ref).suffix not in EXPORTS:
        return origin(zoo, ref)
    from vtzoo.formats import metadata

    return origin(zoo, ref, metadata(as_path(ref)))
