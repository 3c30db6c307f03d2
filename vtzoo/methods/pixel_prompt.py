"""Pixel prompt: a trainable picture added to every image (Bahng et al. 2022, arXiv:2203.17274).

    x' = x + P,   P non-zero on a border (padding), in a corner (patch) or everywhere (full)

    fold:  pos_embed' = pos_embed + E * P,   E = the patch embedding's kernel

Shapes: padding up, down [3, size, width], left, right [3, height - 2 size, size]; patch [3, size, size]; full [3,
height, width], in normalised pixels.
Folds: only when position embeddings are added to the output of a plain patch embedding, as in ViT and EVA-02: a shift
that differs from place to place has no other tensor to go to; on a ViT that takes images of any size, exactly at its own.
Identity at init: yes (std=1, the paper's, does not).
Parameters: padding 6 * size * (height + width - 2 * size); patch 3 * size^2; full 3 * height * width.
Departs from the paper: starts at zero; the border is 30 pixels at 224 and in proportion elsewhere; images of another
size than the backbone's own get the prompt resized.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import NotFoldable, UsageError
from vtzoo.folding import Folded, reason
from vtzoo.probing import input_size
from vtzoo.spec import plain
from vtzoo.tensors import working

GROUP = "prompt/vision-driven"
PAPER = "arXiv:2203.17274"
RECIPE = {"tokens": {"lr": 5e-3, "weight_decay": 0.0}, "maps": {"lr": 1e-2, "weight_decay": 0.0}}
HOW = ("stride", "padding", "dilation", "groups")
AXES = 3  # of position embeddings: batch, tokens, width


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        kind: a border, a square in the upper left corner, or the whole picture.
        size: width of the border or side of the square in pixels; None is 30 at 224, in proportion.
        std: spread of the pixels at the start.
    """

    kind: Literal["padding", "patch", "full"] = "padding"
    size: Annotated[int, Field(ge=1)] | None = None
    std: Annotated[float, Field(ge=0)] = 0.0


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The layer that takes the image, with the picture's size."""
    stem, model = anatomy.stem, anatomy.model
    seen = anatomy.seen[stem]
    layers = {n: m for n, m in anatomy.modules.items() if "weight" in graft.own_parameters(m) and n in anatomy.seen}
    if sum(anatomy.seen[n].x == seen.x for n in layers) > 1:
        raise UsageError("several layers of this backbone take the image side by side", "use another method")
    image = list(seen.x[1:])
    if tuple(image) == input_size(model):  # not one that the model merely would take
        image = list(input_size(model, most=None))
    size = config.size if config.size is not None else max(1, round(min(image[1:]) * 30 / 224))
    most = {"padding": (min(image[1:]) - 1) // 2, "patch": min(image[1:]), "full": size}[config.kind]
    if size > most:
        raise UsageError(
            f"size={size} is too much for images of {image[1]} x {image[2]} pixels",
            f"at most {most} for kind={config.kind}",
        )
    return [anatomy.module(stem, image=image, size=size, **_fold_facts(anatomy, stem))]


def _fold_facts(anatomy: Anatomy, stem: str) -> dict[str, object]:
    """The geometry of a patch embedding whose output has position embeddings added, or nothing."""
    model, conv = anatomy.model, anatomy.modules[stem]
    embed, positions = anatomy.modules.get("patch_embed"), graft.own_parameters(model).get("pos_embed")
    if type(conv) is not nn.Conv2d or stem != "patch_embed.proj" or positions is None or positions.ndim != AXES:
        return {}
    patches = anatomy.seen[stem].y[2] * anatomy.seen[stem].y[3]
    extra = positions.shape[1] - patches
    bare = isinstance(getattr(embed, "norm", nn.Identity()), nn.Identity) and positions.shape[2] == conv.out_channels
    if not bare or extra not in {0, anatomy.prefix}:
        return {}
    return {k: plain(getattr(conv, k)) for k in HOW}


class Graft(graft.Graft):
    """The picture, on the stem."""

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.image: tuple[int, int, int] = tuple(site.facts["image"])
        channels, height, width = self.image
        size = self.size = int(site.facts["size"])
        bar, post = (size, width), (height - 2 * size, size)
        shapes = {
            "padding": {"up": bar, "down": bar, "left": post, "right": post},
            "patch": {"patch": (size, size)},
            "full": {"full": (height, width)},
        }[config.kind]
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(channels, *shape).normal_(0.0, config.std)))

    def picture(self) -> Tensor:
        """P, [channels, height, width]."""
        own = graft.own_parameters(self)
        if "full" in own:
            return own["full"]
        _, height, width = self.image
        if "patch" in own:
            return F.pad(own["patch"], (0, width - self.size, 0, height - self.size))
        middle = F.pad(own["left"], (0, width - self.size)) + F.pad(own["right"], (width - self.size, 0))
        return torch.cat([own["up"], middle, own["down"]], dim=1)

    def enter(self, x: Tensor) -> Tensor:
        """Add the picture to every image."""
        picture = self.picture()[None]
        if x.shape[-2:] != picture.shape[-2:]:
            picture = F.interpolate(picture, x.shape[-2:], mode="bilinear", align_corners=False)
        return x + picture


def fold(base: Folded, delta: Mapping[str, Mapping[str, Tensor]], sites: Sequence[Site], config: Config) -> Folded:
    """What the patch embedding makes of the picture goes into the position embeddings."""
    (site,) = sites
    if "stride" not in site.facts:
        raise NotFoldable(
            f"pixel-prompt: {reason('pixel-prompt')}", "keep it as a delta, or export onnx, which runs it attached"
        )

    @torch.no_grad()
    def positions() -> Tensor:
        own, old, weight = delta[site.name], base["pos_embed"], base[site.key("weight")]
        kind = working(old, weight, *own.values())
        with torch.device("meta"):
            child = Graft(site, config)
        child.load_state_dict({k: v.to(kind) for k, v in own.items()}, assign=True)
        how = {k: site.facts[k] for k in HOW}
        tokens = F.conv2d(child.picture()[None], weight.to(kind), None, **how).flatten(2).mT
        start = old.shape[1] - tokens.shape[1]
        return torch.cat([old[:, :start].to(kind), old[:, start:].to(kind) + tokens], dim=1)

    return Folded(base, {"pos_embed": positions})
