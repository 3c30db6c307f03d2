"""Factors by tensor name, as typed after `--layers`."""

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from vtzoo.errors import UsageError, did_you_mean


def factors_of(layers: str | None, names: Sequence[str]) -> dict[str, float]:
    """Read factors by tensor name: "blocks.0-5:0.3,*norm*:0".

    A pattern stands for the beginning of a name, part by part between the dots; a part may be a range of numbers (0-5)
    or hold `*` and `?`. A pattern with `*` may also match the whole name. The last that matches a name decides.

    Raises:
        UsageError: not PATTERN:NUMBER, or a pattern that matches none of the names.
    """
    found: dict[str, float] = {}
    for item in layers.split(",") if layers else ():
        pattern, factor = _read(item)
        hits = [n for n in names if _matches(pattern, n)]
        if not hits:
            known = {start for n in names for start in _starts(n)}
            raise UsageError(f"'{pattern}' matches no tensor that these deltas touch", did_you_mean(pattern, known))
        found.update(dict.fromkeys(hits, factor))
    return found


def _read(item: str) -> tuple[str, float]:
    pattern, _, number = item.strip().rpartition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not pattern or not math.isfinite(factor):
        raise UsageError(f"'{item}' is not PATTERN:NUMBER", "for example --layers blocks.0-5:0.3,blocks.6-11:1")
    return pattern, factor


def _matches(pattern: str, name: str) -> bool:
    wanted, parts = pattern.split("."), name.split(".")
    if len(wanted) <= len(parts) and all(_same(w, p) for w, p in zip(wanted, parts, strict=False)):
        return True
    return "*" in pattern and fnmatchcase(name, pattern)


def _same(wanted: str, part: str) -> bool:
    if span := re.fullmatch(r"(\d+)-(\d+)", wanted):
        return part.isdigit() and int(span[1]) <= int(part) <= int(span[2])
    return fnmatchcase(part, wanted)


def _starts(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
