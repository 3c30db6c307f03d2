"""ProGrad: context that learns only what does not contradict zero-shot (Zhu et al. 2023, arXiv:2205.14865, eq. 6).

    g = d cross-entropy / d v,   h = d KL(zero-shot prediction || prediction) / d v
    the optimizer gets g where <g, h> >= 0, and g - weight <g, h> / <h, h> h where not

Shapes: v [count, width of the text tower], or [classes * count, width].  Folds: exactly, into a linear head over normalised features.
Identity at init: yes, of zero-shot with the template that it starts from; no with init= (random).
Parameters: count * width, times classes where each has its own.
Departs from the paper: it starts from "a photo of a", not from sixteen vectors of which the last are a template's words and the others zero;
the projection is of v alone (what else a stack trains has its plain gradient), and of the whole of v at once, as in the official code; both
gradients are of the loss before it is scaled for fp16; the zero-shot prediction is of the image as the network sees it now; an h of
no more than rounding, as where v is the template's own words, contradicts nothing (the code divides by its norm).
In several processes g and h are the means over the images of all, so that a step is the step of one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import parallel
from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import named_grafts
from vtzoo.methods._language import Context, place, prompted
from vtzoo.methods._language import Vectors as Graft
from vtzoo.own_loss import Own, Seen

GROUP = "prompt/language-driven"
PAPER = "arXiv:2205.14865"
FAMILIES = ("tokens", "maps")
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 5e-4}, "maps": {"lr": 2e-3, "weight_decay": 5e-4}}
ONE_LABEL = True
__all__ = ["FAMILIES", "GROUP", "ONE_LABEL", "PAPER", "RECIPE", "Config", "Graft", "head", "loss", "sites", "without"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Context):
    """Knobs; see `Context` for the others.

    Attributes:
        weight: how much of what contradicts zero-shot is taken off; 0 is CoOp.
        temperature: of both predictions that are compared.
    """

    weight: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """The token embedding of the text tower."""
    return (place(anatomy, config, "prograd"),)


def head(old: nn.Module, config: Config) -> nn.Module | None:
    """The text tower's classifier with the vectors in its prompts."""
    return prompted(old, config)


def loss(model: Any, config: Config) -> Own:
    """A loss of the plain one's value, whose gradient by the context is the projected one."""
    weight, bias = model.clip_head.zero_shot()
    own = [g for _, g in named_grafts(model) if isinstance(g, Graft)]

    def away(seen: Seen) -> Tensor:
        device, heat = seen.logits.device.type, config.temperature
        with torch.autocast(device, enabled=False):
            zero_shot = F.linear(seen.features.detach().to(weight.dtype), weight.to(device), bias.to(device))
            return F.cross_entropy(seen.logits.to(weight.dtype) / heat, (zero_shot / heat).softmax(-1)) * heat**2

    def projected(plain: Tensor, seen: Seen) -> Tensor:
        trained = [p for p in model.parameters() if p.requires_grad]
        plainly = torch.autograd.grad(plain, trained, retain_graph=True, allow_unused=True)
        grads = {p: g for p, g in zip(trained, plainly, strict=True) if g is not None}
        mine = [g.context for g in own]
        both = [*(grads[p] for p in mine), *torch.autograd.grad(away(seen), mine)]
        both = parallel.mean(both, len(seen.features))
        for p, g, h in zip(mine, both, both[len(mine) :], strict=False):
            grads[p] = without(g, h, config.weight)
        value = plain.detach()
        for p, g in grads.items():
            value = value + ((p - p.detach()) * g).sum()
        return value

    return projected


def without(g: Tensor, h: Tensor, weight: float) -> Tensor:
    """A gradient without what in it goes against another one, unless that is so small that rounding made it."""
    square = (h * h).sum()
    noise = torch.finfo(h.dtype).eps * (g * g).sum()
    return torch.where(square > noise, g - weight * ((g * h).sum() / square).clamp(max=0) * h, g)
