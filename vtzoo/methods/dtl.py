"""DTL: a thin side network that sums low-rank outputs of all blocks (Fu et al. 2023, arXiv:2312.07856, fig. 2).

    h_i = h_{i-1} + B_i A_i x_i               x_i what block i is given, h before the first block 0
    x_{i+1} = block_i(x_i) + swish(h_i)       in the later blocks; swish(h) = h * sigmoid(beta * h)

fusion=3 is DTL+: a depthwise convolution over the patches, one for all blocks, comes after swish.
Shapes: A_i [rank, channels] Kaiming-uniform, B_i [channels, rank] zero, no bias; fusion [channels, 1, fusion, fusion].
Folds: no: the side network runs beside the blocks and has a swish in it.  Identity at init: yes.
Parameters: 2 * rank * channels per block; with fusion, fusion^2 * channels for all.
Departs from the paper: where channels or places change along the way (Swin, convolutional networks) h starts anew, as in
the public code for Swin, with a fusion of its own; blocks that change the shape are passed over, and so are those whose h
would reach no later block. Class and register tokens pass by the fusion, as in that code; DTL+ is refused where tokens
don't lie row by row (Hiera) or come in any number (PVT, CAFormer), and where it is not, takes images of one size only. That code classifies by the mean of the patches; here
the backbone's own pooling stays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._bottleneck import channels
from vtzoo.methods._side import SEQUENCE, Carrier, aligned, at, keeps, raster

GROUP = "adapter/parallel"
PAPER = "arXiv:2312.07856"
RECIPE = {"tokens": {"lr": 4e-3, "weight_decay": 5e-2}, "maps": {"lr": 1e-3, "weight_decay": 5e-2}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: of each block's output to the side network.
        start: the part of the blocks that only feeds it; those after it get its sum back.
        beta: sharpness of swish; at 100 nearly a ReLU.
        fusion: side of DTL+'s depthwise kernel, odd; 0 for none.
    """

    rank: Annotated[int, Field(ge=1)] = 2
    start: Annotated[float, Field(ge=0, lt=1)] = 0.5
    beta: Annotated[float, Field(gt=0)] = 100.0
    fusion: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        """Refuse a kernel without a centre."""
        if self.fusion and self.fusion % 2 == 0:
            raise ValueError(f"fusion={self.fusion} has no centre; use an odd number such as 3, or 0")


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The blocks that keep their shape, from the first whose sum comes back.

    Raises:
        UsageError: there are none; or DTL+ where tokens don't lie row by row.
    """
    seen = anatomy.seen
    found = [s for s in (at(anatomy, b.name) for b in anatomy.blocks) if keeps(s) and seen[s.name].calls == 1]
    if not found:
        raise UsageError("no block of this backbone keeps the shape of its input", "use adapter or lora instead")
    late = {s.name for s in found[int(config.start * len(found)) :]}
    order = {b.name: i for i, b in enumerate(anatomy.blocks)}
    runs = [[found[0]]]
    for before, now in pairwise(found):
        together = before.shape == now.shape and order[now.name] == order[before.name] + 1
        runs[-1].append(now) if together else runs.append([now])
    facts = [
        (s, {"run": i, "first": s is run[0], "adds": s.name in late, "last": s is run[-1]})
        for i, run in enumerate(r for r in runs if r[-1].name in late)
        for s in run
    ]
    return [replace(s, facts={**s.facts, **more, **_grid(anatomy, s, config)}) for s, more in facts]


def _grid(anatomy: Anatomy, site: Site, config: Config) -> dict[str, Any]:
    """Where the patches of a sequence lie, for DTL+."""
    if not config.fusion or len(site.shape) + 1 != SEQUENCE:
        return {}
    grid = raster(anatomy, site)
    if grid is None:
        raise UsageError(
            f"fusion={config.fusion}: the tokens of {site.name} do not lie row by row, or are as many as an image gives",
            "leave fusion out",
        )
    return {"grid": list(grid)}


class Shared(Carrier):
    """The sum on its way, and DTL+'s kernels."""

    def __init__(self, sites: Sequence[Site], config: Config) -> None:
        super().__init__()
        widths = {str(s.facts["run"]): channels(s) for s in sites} if config.fusion else {}
        self.fusion = nn.ModuleDict(
            {n: nn.Conv2d(c, c, config.fusion, padding="same", groups=c, bias=False) for n, c in widths.items()}
        )


class Graft(graft.Graft):
    """One block's low-rank output, and the sum's way back."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        facts = site.facts
        self.axis, self.before = facts["axis"], facts["before"]
        self.run, self.grid = str(facts["run"]), facts.get("grid")
        self.first, self.adds, self.last = facts["first"], facts["adds"], facts["last"]
        self.beta, self.fused = config.beta, bool(config.fusion)
        self.A = nn.Parameter(torch.empty(config.rank, channels(site)))
        self.B = nn.Parameter(torch.zeros(channels(site), config.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def enter(self, x: Tensor) -> Tensor:
        """Add this block's part to the sum."""
        part = F.linear(F.linear(x.movedim(self.axis, -1), self.A), self.B)
        self.shared.put(part if self.first else aligned(self.shared.take(), part, self.before) + part)
        return x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Add the sum to the output of a later block."""
        if not self.adds:
            return y
        h = self.shared.take()
        if not self.last:
            self.shared.put(h)
        h = aligned(h, y.movedim(self.axis, -1), self.before)
        z = h * torch.sigmoid(self.beta * h)
        return y + (self._fuse(z) if self.fused else z).movedim(-1, self.axis)

    def _fuse(self, z: Tensor) -> Tensor:
        """The depthwise convolution of a map [batch, h, w, channels] or of a sequence's patches."""
        conv = self.shared.fusion[self.run]
        if self.grid is None:
            return conv(z.movedim(-1, 1)).movedim(1, -1)
        rows, columns = self.grid
        tokens, patches = z[:, : -rows * columns], z[:, -rows * columns :].movedim(-1, 1)
        return torch.cat([tokens, conv(patches.unflatten(-1, (rows, columns))).flatten(2).movedim(1, -1)], dim=1)
