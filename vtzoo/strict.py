"""JSON of strangers, read with limits: what a header, a config or an archive says of itself.

A text has at most LIMIT_BYTES, is nested at most DEPTH_LIMIT deep and says nothing twice, so that what it becomes stays below some 200 MB
(an empty object in a list costs 72 bytes and takes 3) and every function that walks through it comes back.
"""

import json
from typing import Any, cast

LIMIT_BYTES = 8 << 20
"""Of a safetensors header, or a JSON document: 60,000 tensors, or every label of ImageNet-21k several times. The format itself allows 100 MB."""
DEPTH_LIMIT = 32


def loads(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: too large, not UTF-8, no JSON, a key twice, or nested too deeply; the reason starts with a verb.
    """
    if len(text) > LIMIT_BYTES:
        raise ValueError(f"has {len(text)} bytes (the limit is {LIMIT_BYTES})")
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON ({error.msg.lower()} at byte {error.pos})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    _check_depth(value, DEPTH_LIMIT)
    return value


def record(text: str | bytes) -> dict[str, Any]:
    """Likewise, of a text that must be an object.

    Raises:
        ValueError: likewise, or it is none.
    """
    value = loads(text)
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")  # noqa: TRY004 - damaged data, as all that is caught with it
    return cast("dict[str, Any]", value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"says '{twice[:80]}' twice")
    return table


def _check_depth(value: Any, left: int) -> None:
    if not isinstance(value, dict | list):
        return
    if not left:
        raise ValueError("is nested too deeply")
    inner = cast("dict[str, Any]", value).values() if isinstance(value, dict) else cast("list[Any]", value)
    for part in inner:
        _check_depth(part, left - 1)
