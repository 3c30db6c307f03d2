"""ResNets of plain blocks: channels inside blocks and of each stage, and all blocks but the first of a stage.

Stages are as wide as the arguments say, all by one share; the stem stays, and with it the first stage of networks of basic blocks,
which has its channels.
"""

from collections.abc import Sequence
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from vtzoo.slimming._frame import Frame, Member, Sizes

STAGES = ("layer1", "layer2", "layer3", "layer4")
EIGHT = 8
"""Widths are multiples of it."""
NORM = ("weight", "bias", "running_mean", "running_var")


def frame(model: nn.Module) -> Frame | None:
    """What is known of a ResNet; None where it is no plain one."""
    if type(model) is not ResNet:
        return None
    rows = [[f"{stage}.{i}" for i in range(len(model.get_submodule(stage)))] for stage in STAGES]  # type: ignore[arg-type] - a Sequential
    blocks: dict[str, Any] = {name: model.get_submodule(name) for row in rows for name in row}
    if not all(map(_plain, blocks.values())):
        return None
    groups = [group for name, block in blocks.items() for group in _inside(name, block)]
    for i, row in enumerate(rows):
        if blocks[row[0]].downsample is not None:
            groups.append(_stage(blocks, row, rows[i + 1] if i + 1 < len(rows) else None))
    widths = [_planes(blocks[row[0]]) for row in rows]
    fixed = blocks[rows[0][0]].downsample is None

    def arguments(sizes: Sizes, gone: Sequence[str]) -> dict[str, Any]:
        own = [
            w if fixed and i == 0 else max(EIGHT, EIGHT * round(sizes.width * w / EIGHT)) for i, w in enumerate(widths)
        ]
        return {"channels": own, "layers": [len(row) - len(set(row) & set(gone)) for row in rows]}

    there = model.state_dict()  # without a classifier there is no fc
    taken = [[m for m in g if m.name in there] for g in groups if not (fixed and g[0].name.startswith(STAGES[0]))]
    spare = [name for row in rows for name in row[1:]]
    return Frame(groups={"width": taken}, rows=rows, spare=spare, steps=0, arguments=arguments)


def _plain(block: nn.Module) -> bool:
    """A block of convolutions, and of norms that know no groups of channels."""
    known = type(block) in (BasicBlock, Bottleneck)
    own: Any = block
    known = known and own.se is None and isinstance(own.aa, nn.Identity | type(None)) and own.conv2.groups == 1
    return known and isinstance(own.bn1, nn.BatchNorm2d)


def _planes(block: Any) -> int:
    """What timm's arguments call a block's channels: what it hands on, and not the width inside, which wide networks have at twice that."""
    last = block.conv3 if type(block) is Bottleneck else block.conv2
    return last.out_channels // block.expansion


def _inside(name: str, block: Any) -> list[list[Member]]:
    """Channels between a block's convolutions."""
    found: list[list[Member]] = []
    for i in (1, 2) if type(block) is Bottleneck else (1,):
        units = (getattr(block, f"conv{i}").out_channels,)
        found.append(
            [*_given(f"{name}.conv{i}", f"{name}.bn{i}", units), Member(f"{name}.conv{i + 1}.weight", 1, units)]
        )
    return found


def _given(conv: str, norm: str, units: tuple[int, ...]) -> list[Member]:
    return [Member(f"{conv}.weight", 0, units), *(Member(f"{norm}.{n}", 0, units) for n in NORM)]


def _stage(blocks: dict[str, Any], row: Sequence[str], after: Sequence[str] | None) -> list[Member]:
    """Channels that a stage hands from block to block, and on."""
    first = blocks[row[0]]
    last = 3 if type(first) is Bottleneck else 2
    units = (getattr(first, f"conv{last}").out_channels,)
    members = _given(*_shortcut(row[0], first), units)
    for name in row:
        members += _given(f"{name}.conv{last}", f"{name}.bn{last}", units)
    members += [Member(f"{name}.conv1.weight", 1, units) for name in row[1:]]
    if after is None:
        return [*members, Member("fc.weight", 1, units)]
    conv, _ = _shortcut(after[0], blocks[after[0]])
    return [*members, Member(f"{after[0]}.conv1.weight", 1, units), Member(f"{conv}.weight", 1, units)]


def _shortcut(name: str, block: Any) -> tuple[str, str]:
    """The convolution beside a stage's first block, and its norm."""
    place = next(n for n, m in block.downsample.named_children() if isinstance(m, nn.Conv2d))
    return f"{name}.downsample.{place}", f"{name}.downsample.{int(place) + 1}"
