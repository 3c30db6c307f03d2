"""ConvNeXts: channels of each stage with four hidden units each, all by one share, and all blocks but the first of a stage."""

from collections.abc import Sequence
from typing import Any

from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import nn

from vtzoo.slimming._frame import Frame, Member, Sizes

EIGHT = 8
"""Widths are multiples of it."""


def frame(model: nn.Module) -> Frame | None:
    """What is known of a ConvNeXt; None where it is no plain one."""
    own: Any = model
    if type(model) is not ConvNeXt or len(own.stem) != 2 or not isinstance(own.head.pre_logits, nn.Identity):
        return None
    rows = [[f"stages.{i}.blocks.{k}" for k in range(len(stage.blocks))] for i, stage in enumerate(own.stages)]
    if not all(type(model.get_submodule(name)) is ConvNeXtBlock for row in rows for name in row):
        return None
    there = model.state_dict()
    widths = [stage.blocks[0].conv_dw.out_channels for stage in own.stages]
    groups = [_hidden(name, 4 * width) for row, width in zip(rows, widths, strict=True) for name in row]
    end = len(rows) - 1
    groups += [_stage(i, rows[i], widths[i], last=i == end) for i in range(end + 1)]

    def arguments(sizes: Sizes, gone: Sequence[str]) -> dict[str, Any]:
        return {
            "dims": [max(EIGHT, EIGHT * round(sizes.width * w / EIGHT)) for w in widths],
            "depths": [len(row) - len(set(row) & set(gone)) for row in rows],
        }

    taken = [
        [m for m in group if m.name in there] for group in groups
    ]  # biases, scales and a classifier may be missing
    spare = [name for row in rows for name in row[1:]]
    return Frame(groups={"width": taken}, rows=rows, spare=spare, steps=0, arguments=arguments)


def _hidden(block: str, units: int) -> list[Member]:
    names = ("fc1.weight", "fc1.bias", "grn.weight", "grn.bias")
    return [*(Member(f"{block}.mlp.{n}", 0, (units,)) for n in names), Member(f"{block}.mlp.fc2.weight", 1, (units,))]


def _stage(place: int, row: Sequence[str], width: int, *, last: bool) -> list[Member]:
    """Channels that a stage is given, hands from block to block, and on."""
    before = ("stem.0", "stem.1") if place == 0 else (f"stages.{place}.downsample.1",)
    inside = ("gamma", "conv_dw.weight", "conv_dw.bias", "norm.weight", "norm.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    norm, reader = ("head.norm", "head.fc") if last else (f"stages.{place + 1}.downsample.{i}" for i in (0, 1))
    names = [f"{layer}.{n}" for layer in (*before, norm) for n in ("weight", "bias")]
    names += [f"{block}.{n}" for block in row for n in inside]
    read = [f"{reader}.weight", *(f"{block}.mlp.fc1.weight" for block in row)]
    return [*(Member(n, 0, (width,)) for n in names), *(Member(n, 1, (width,)) for n in read)]
