"""ViT-Adapter: convolutions beside a plain ViT, exchanging with it (Chen et al. 2023, arXiv:2205.08534, fig. 4).

    c = [c2, c3, c4] + levels,  c1 … c4 = convolutions of the image at 4, 8, 16 and 32 pixels a step
    injector:   x = x + gamma * attn(norm(x), norm(c))            x the patches, before each group of blocks
    extractor:  c = c + attn(norm(c), norm(x)),  c = c + fc2(gelu(dw(fc1(norm(c)))))      after it; twice more at the end
    maps:       f = norm([c1 + up(c2), c2, c3, c4] + x resized);  features + U sum_l mean(f_l)

`pyramid(model, images)` gives the four maps f to a detector or a segmenter; the last line is for a classifier alone.
Shapes: f_l [batch, width, h, w] at 4, 2, 1 and 1/2 times the grid of patches; gamma [width] zero; levels [3, width]
N(0, 1); U [width, width] zero; attention's q, k, v [ratio * width, width], o [width, ratio * width], k without a bias.
Folds: no: a second network looks at the pixels and attends to the tokens.  Identity at init: yes (gamma and U zero).
Parameters: with D width, a = ratio * D, e = D // 4, w = conv, n groups: attention A = 4 a D + 2 a + 5 D; n (A + D) +
(n + 2) (A + 2 e D + 11 e + 3 D) + 9 w in + 252 w^2 + 26 w + (11 w + 4) D + 5 D^2 + 13 D.
Departs from the paper: the backbone stays frozen; attention is plain, all queries to all keys, not deformable; group and
layer norms in place of synchronised batch norms, since a delta owns no statistics; class and register tokens stay, and
neither inject nor extract; maps are brought to the grid of patches where these aren't 16 pixels wide; one width and one
grid are asked for, so hierarchical transformers and images of another size are refused. Widths, groups of blocks and starts after the public code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._bottleneck import channels
from vtzoo.methods._side import Carrier, at, convolution, ending, joined, keeps, placed, raster, silent, whole

GROUP = "adapter/parallel"
PAPER = "arXiv:2205.08534"
FAMILIES = ("tokens",)
RECIPE = {"tokens": {"lr": 1e-3, "weight_decay": 5e-2}}
LEVELS = (2.0, 1.0, 0.5)  # of c2, c3, c4, in grids of patches


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        groups: of blocks, each with an injector before and an extractor after it.
        heads: of the attentions; as many as divide their width.
        ratio: width of the attentions over the backbone's.
        conv: channels of the first convolutions.
    """

    groups: Annotated[int, Field(ge=1)] = 4
    heads: Annotated[int, Field(ge=1)] = 6
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.25
    conv: Annotated[int, Field(ge=2, multiple_of=2)] = 64


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The layer that is given the pixels, the ends of each group of blocks, and the end of the features.

    Raises:
        UsageError: the blocks are not all on one grid of patches.
    """
    blocks = [b for b in whole(anatomy) if keeps(b)]
    grid = raster(anatomy, blocks[0]) if blocks else None
    if grid is None or len({b.shape for b in blocks}) > 1:
        raise UsageError(
            f"{type(anatomy.model).__name__} is no plain transformer with one width and one grid of patches",
            "use lst, dtl or side-tuning instead",
        )
    count = min(config.groups, len(blocks))
    cuts = [i * len(blocks) // count for i in range(count + 1)]
    found = [at(anatomy, anatomy.stem, role="stem", width=channels(blocks[0]))]
    for i, block in enumerate(blocks):
        extract = 0 if i + 1 not in cuts else 3 if i + 1 == len(blocks) else 1
        if i in cuts or extract:
            found.append(replace(block, facts={**block.facts, "inject": i in cuts, "extract": extract}))
    return [replace(s, facts={**s.facts, "grid": list(grid)}) for s in joined(found, ending(anatomy))]


def pyramid(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The dense features of a model that carries this method: four maps [batch, width, h, w], the finest first.

    Args:
        model: one that `inject` or `attach` prepared with vit-adapter.
        images: pixels [batch, 3, height, width] as the model takes them.

    Raises:
        UsageError: it carries no vit-adapter.
    """
    shared = next((m for m in model.modules() if isinstance(m, Shared)), None)
    if shared is None:
        raise UsageError("this model carries no vit-adapter", "vtzoo.attach(model, delta) first")
    maps: list[Tensor] = []

    def catch(_module: nn.Module, _args: Any, found: list[Tensor]) -> None:
        maps.extend(found)

    handle = shared.neck.register_forward_hook(catch)
    try:
        model.forward_features(images)  # type: ignore[operator] - a method of timm models
    finally:
        handle.remove()
    return maps


class Shared(Carrier):
    """The convolutions of the image, and what makes the four maps."""

    def __init__(self, sites: Sequence[Site], config: Config) -> None:
        super().__init__()
        facts = sites[0].facts
        width, w = facts["width"], config.conv
        self.grid: list[int] = facts["grid"]
        sizes = ((facts["x"][0], w, 2), (w, w, 1), (w, w, 1)), ((w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 4 * w, 2))
        first, steps = ([convolution(into, out, 3, stride, 1) for into, out, stride in part] for part in sizes)
        self.stem, self.steps = nn.Sequential(*first, nn.MaxPool2d(3, stride=2, padding=1)), nn.ModuleList(steps)
        self.out = nn.ModuleList([nn.Conv2d(c, width, 1) for c in (w, 2 * w, 4 * w, 4 * w)])
        self.levels = nn.Parameter(torch.randn(len(LEVELS), width))
        self.neck = Neck(width, self.grid)
        self.up = silent(width, width)

    def prior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """c1 as a map and c as tokens, of the pixels."""
        found = [self.stem(x)]
        for step in self.steps:
            found.append(step(found[-1]))
        first, *rest = [
            _resize(out(m), self.grid, times) for out, m, times in zip(self.out, found, (4.0, *LEVELS), strict=True)
        ]
        tokens = [m.flatten(2).mT + level for m, level in zip(rest, self.levels, strict=True)]
        return first, torch.cat(tokens, dim=1)


def _size(grid: Sequence[int], times: float) -> tuple[int, int]:
    return max(1, int(grid[0] * times)), max(1, int(grid[1] * times))


def _resize(x: Tensor, grid: Sequence[int], times: float) -> Tensor:
    """A map at so many times the grid of patches."""
    size = _size(grid, times)
    return x if tuple(x.shape[2:]) == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _maps(c: Tensor, grid: Sequence[int]) -> list[Tensor]:
    """Tokens [batch, n, width] of the three levels as maps."""
    sizes = [_size(grid, times) for times in LEVELS]
    return [p.unflatten(2, s) for p, s in zip(c.mT.split([h * w for h, w in sizes], 2), sizes, strict=True)]


class Neck(nn.Module):
    """From c1, c and the patches to the four maps."""

    def __init__(self, width: int, grid: list[int]) -> None:
        super().__init__()
        self.grid, self.up = grid, nn.ConvTranspose2d(width, width, 2, 2)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])

    def forward(self, first: Tensor, c: Tensor, x: Tensor) -> list[Tensor]:
        """[batch, width, h, w] at 4, 2, 1 and 1/2 times the grid of patches."""
        c2, c3, c4 = _maps(c, self.grid)
        x = x.mT.unflatten(2, self.grid)
        whole = [
            m + _resize(x, self.grid, t) for m, t in zip((first + self.up(c2), c2, c3, c4), (4.0, *LEVELS), strict=True)
        ]
        return [norm(m.movedim(1, -1)).movedim(-1, 1) for norm, m in zip(self.norms, whole, strict=True)]


class Attention(nn.Module):
    """From queries to other tokens, both normalised."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        inner = max(1, int(config.ratio * width))
        self.heads = math.gcd(config.heads, inner)
        self.norm, self.norm_other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=b) for b in (True, False, True))
        self.o = nn.Linear(inner, width)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """[batch, n, width], [batch, m, width] -> [batch, n, width]."""
        x, other = self.norm(x), self.norm_other(other)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), self.k(other), self.v(other)))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Extractor(nn.Module):
    """c takes from the patches, then each level mixes with its neighbours."""

    def __init__(self, width: int, grid: list[int], config: Config) -> None:
        super().__init__()
        hidden = max(1, width // 4)
        self.grid, self.attention, self.norm = grid, Attention(width, config), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        """[batch, n, width] -> the same."""
        c = c + self.attention(c, x)
        maps = [self.conv(m).flatten(2).mT for m in _maps(self.fc1(self.norm(c)), self.grid)]
        return c + self.fc2(F.gelu(torch.cat(maps, dim=1)))


def _as_many(held: tuple[Tensor, Tensor, Any], x: Tensor) -> tuple[Tensor, Tensor, Any]:
    """c1 and c for as many images as x has, should another method have put copies behind them."""
    first, c, patches = held
    if x.shape[0] == c.shape[0]:
        return held
    times = x.shape[0] // c.shape[0]
    return first.repeat(times, 1, 1, 1), c.repeat(times, 1, 1), patches


class Graft(graft.Graft):
    """What happens at one site: the convolutions, an injector, extractors, the way out."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        facts = site.facts
        self.axis, self.stem, self.end = facts["axis"], facts.get("role") == "stem", "end" in facts
        self.count = math.prod(facts["grid"])
        self.inject = Attention(channels(site), config) if facts.get("inject") else None
        self.gamma = nn.Parameter(torch.zeros(channels(site))) if self.inject is not None else None
        self.extract = nn.ModuleList(
            [Extractor(channels(site), facts["grid"], config) for _ in range(facts.get("extract", 0))]
        )

    def enter(self, x: Tensor) -> Tensor:
        """Begin with the pixels, or inject into the patches."""
        if self.stem:
            self.shared.put((*self.shared.prior(x), None))
        if self.inject is None:
            return x
        held = _as_many(self.shared.take(), x)
        self.shared.put(held)
        patches, c = x[:, -self.count :], held[1]
        return torch.cat([x[:, : -self.count], patches + self.gamma * self.inject(patches, c)], dim=1)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Extract from the patches; at the end add what the maps say of the whole image."""
        if len(self.extract):
            first, c, _ = _as_many(self.shared.take(), y)
            patches = y[:, -self.count :]
            for extractor in self.extract:
                c = extractor(c, patches)
            self.shared.put((first, c, patches))
        if not self.end:
            return y
        maps = self.shared.neck(*self.shared.take())
        return y + placed(self.shared.up(sum(m.mean((2, 3)) for m in maps)), y, self.axis)
