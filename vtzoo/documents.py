"""JSON files that anybody may have written, read as maps within the limits of `strict`."""

from pathlib import Path
from typing import Any

from vtzoo import strict
from vtzoo.errors import Corrupt
from vtzoo.files import reading


def document(path: Path, hint: str = "fetch it again") -> dict[str, Any]:
    """What a file says.

    Args:
        path: where.
        hint: what to do about a damaged one.

    Raises:
        NotFound: no such file.
        Corrupt: too large, no JSON object, a key twice, or nested too deeply.
    """
    with reading(path), path.open("rb") as file:
        text = file.read(strict.LIMIT_BYTES + 1)
    try:
        return strict.record(text)
    except ValueError as error:
        raise Corrupt(f"{path} {error}", hint) from error
