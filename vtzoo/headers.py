"""The JSON document in a delta's header, by the standard library alone."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from vtzoo import files, strict
from vtzoo.errors import Corrupt, Mismatch, VtzooError
from vtzoo.refs import shown

SCHEMA = 1


def read_header(path: Path) -> dict[str, Any]:
    """A delta's document.

    Raises:
        NotFound: no such file.
        Corrupt: damaged, or not a delta.
        Mismatch: written by a newer vtzoo.
    """
    text = files.header(path).metadata.get("vtzoo")
    if text is None:
        raise Corrupt(
            f"{path} is a safetensors file but no vtzoo delta",
            "add it with: vtzoo add delta NAME --backbone REF --weights FILE",
        )
    again = "make the delta again, or fetch it again"
    try:
        doc = strict.record(text)
    except ValueError as error:
        raise Corrupt(f"{path}: the delta's header {error}", again) from error
    schema = doc.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise Mismatch(f"{path} has schema {schema}, this vtzoo knows up to {SCHEMA}", "pip install -U vtzoo")
    if type(schema) is not int or schema < 1:
        raise Corrupt(f"{path}: the delta's schema is {shown(schema)}", again)
    return doc


def stands_on(path: Path) -> str:
    """The source of the backbone that a delta stands on; "" where its file can't be read or doesn't say it."""
    with suppress(VtzooError):
        return source_in(files.header(path).metadata)
    return ""


def source_in(metadata: Any) -> str:
    """Likewise, by the metadata of its file."""
    with suppress(ValueError, KeyError, TypeError):
        return str(strict.record(metadata["vtzoo"])["backbone"]["source"])
    return ""
