"""How deep in a network a tensor lies, told by the numbers in its name."""

import re
from collections.abc import Iterable

_ENTRY = re.compile(r"stem|patch_embed|conv_stem")
_EXIT = re.compile(r"norm|fc_norm|final|head|conv_head|bn2\.|pre_logits|global_pool")


def depths(names: Iterable[str]) -> dict[str, float]:
    """Depth of each tensor from 0 (the first block, and all before it) to 1 (the last one, and all behind it).

    A block is `blocks.3`, `layers.0.blocks.1`, `layer1.0`: a name up to its first numbers.
    """
    blocks = {name: _block(name) for name in names}
    order = {b: i for i, b in enumerate(sorted({b for b in blocks.values() if b}, key=_natural))}
    last = max(len(order) - 1, 1)
    return {n: order[b] / last if b else float(bool(_EXIT.match(n))) for n, b in blocks.items()}


def _block(name: str) -> str:
    parts = name.split(".")
    found = 0
    for i, part in enumerate(parts):
        if part.isdigit() and (not found or i <= found or (i == found + 1 and parts[found] == "blocks")):
            found = i + 1
    return "" if _ENTRY.match(name) else ".".join(parts[:found])


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name) if p]
