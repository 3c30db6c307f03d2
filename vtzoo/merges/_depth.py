"""How deep in a network a tensor lies, told by the numbers in its name.

That is right where blocks follow each other in the order of their numbers, as in nearly all of timm; networks of several
branches (HRNet, CoaT, DLA) have no one depth.
"""

import re
from collections.abc import Iterable

_ENTRY = re.compile(r"\w*stem\w*|patch_embed\w*|conv1|bn1")
_EXIT = re.compile(r"norm|fc_norm|norm_head|final\w*|head\w*|conv_head|bn2|norm5|pre_logits|global_pool")
_LAYER = re.compile(r"(conv|bn|norm|fc|linear|mlp|pool|act|ls|gamma|drop_path|downsample|se|attn)_?\d*")
_NUMBERED = re.compile(r"[A-Za-z_]*\d+")


def depths(names: Iterable[str]) -> dict[str, float]:
    """Depth of each tensor from 0 (the first block, and all before it) to 1 (the last one, and all behind it).

    A block is `blocks.3`, `layers.0.blocks.1`, `layer1.0`, `s1.b2`: a name up to the last of its first numbers. Where there are
    fewer than two blocks, nothing has a depth.
    """
    names = set(names)
    blocks = {name: _block(name.removeprefix("features.")) for name in names}  # the whole network, in DenseNet and VGG
    order = {b: i for i, b in enumerate(sorted({b for b in blocks.values() if b}, key=_natural))}
    if len(order) < 2:
        return {}
    late = any(
        n.startswith("stages.") for n in names
    )  # whose norm_pre follows the blocks; a CLIP ViT's comes before them
    last = len(order) - 1
    return {
        n: order[b] / last if b else float(_behind(n.removeprefix("features.").split(".")[0], late=late))
        for n, b in blocks.items()
    }


def _behind(first: str, *, late: bool) -> bool:
    return bool(_EXIT.fullmatch(first)) or (late and first == "norm_pre")


def _block(name: str) -> str:
    parts = name.split(".")
    if _ENTRY.fullmatch(parts[0]) or _EXIT.fullmatch(parts[0]):
        return ""
    found = 0
    for i, part in enumerate(parts[:-1]):
        near = not found or i == found or (i == found + 1 and parts[found] in ("blocks", "block"))
        named = bool(_NUMBERED.fullmatch(part)) and not _LAYER.fullmatch(part)
        if near and (part.isdigit() or (named and not (found and parts[found - 1].isdigit()))):
            found = i + 1
    return ".".join(parts[:found])


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name) if p]
