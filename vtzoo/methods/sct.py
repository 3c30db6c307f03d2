"""SCT: tune the few channels that a task's images excite most (Zhao et al. 2023, arXiv:2309.08513).

    y[at] += K y[at] + k        fold:  W'[at] = (I + K) W[at],  b'[at] = (I + K) b[at] + k

`at` are the channels of the largest class-aware importance, the mean over classes of a channel's length over all
images and positions of a class.
Shapes: K [n, n], k [n] (stored as `bias`), n = fraction * channels; at the last layer of each block's MLP, where there
is none at the last convolution of each block. K starts truncated N(0, 0.02), k at zero.
Folds: exactly.  Identity at init: no (K starts as in the paper, which moves a ViT-B's salient channels by a fifth).
Parameters: n * n + n per site, n less where the layer has no bias.
Departs from the paper: of its places this is the one that folds, behind the MLP; behind the attention, where the
authors' code (github.com/zhaohengyuan1/SCT) stands by default, it acts on the residual sum. Channels are chosen by
what the adapted layer gives, class token included; their code looks at the block's output without it. Where a layer
has no bias k is left out (a fold may not add tensors). A grouped convolution is refused, and so is one that
standardises its weight, which undoes a row's scale.
"""

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
from vtzoo.graft import Before, Scores
from vtzoo.methods._bottleneck import MLP
from vtzoo.probing import evaluating

GROUP = "adapter/sequential"
PAPER = "arXiv:2309.08513"
RECIPE = {"tokens": {"lr": 4e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        fraction: of a layer's channels that are tuned.
        targets: layers by role, name or glob; auto is the last of each MLP, or the last convolution of each block.
    """

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.125
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions; with their salient channels, where there are images to tell by.

    Raises:
        UsageError: a layer whose channels can't be mixed.
    """
    found: dict[str, Site] = {}
    for target in config.targets:
        found |= {s.name: s for s in (_auto(anatomy) if target == "auto" else anatomy.select([target]))}
    for site in found.values():
        if (reason := _why_not(site)) is not None:
            raise UsageError(f"{site.name} {reason}", "name other layers in targets=…")
    if anatomy.batches is None:
        return list(found.values())
    marks = _importance(anatomy, list(found.values()))
    return [replace(s, facts={**s.facts, "at": _largest(marks[n], config.fraction)}) for n, s in found.items()]


def _auto(anatomy: Anatomy) -> list[Site]:
    """The last layer of each MLP, or the last of each block's convolutions that gives the block's own shape."""
    layers = {s.name: s for s in [*anatomy.linears, *anatomy.convs]}
    near = [s for s in layers.values() if s.called and "blocks" in anatomy.roles(s)]
    found = [s for s in near if s.last == "fc2" and s.name.split(".")[-2] in MLP]
    if found:
        return found
    for block in anatomy.blocks:
        shape = anatomy.seen[block.name].y
        inside = [
            n for n in anatomy.seen if n in layers and n.startswith(f"{block.name}.") and anatomy.seen[n].y == shape
        ]
        found += [layers[n] for n in inside if "downsample" not in n][-1:]
    if not found:
        raise UsageError(
            "this backbone has no numbered blocks whose last layers could be tuned", "name layers in targets=…"
        )
    return found


def _why_not(site: Site) -> str | None:
    """Why a layer's channels can't be mixed, in words that follow its name."""
    if site.facts.get("groups", 1) > 1:
        return "is grouped: with its channels mixed it would fold into a dense kernel"
    if "standardised" in site.facts:
        return "standardises its weight, which undoes a channel's scale"
    return None if site.called else "is read and never called, so its channels' activations can't be seen"


@torch.no_grad()
def _importance(anatomy: Anatomy, layers: Sequence[Site]) -> dict[str, Tensor]:
    """Per layer the class-aware importance of each channel, over the anatomy's images."""
    found: dict[str, list[Tensor]] = {s.name: [] for s in layers}
    labels: list[Tensor] = []

    def note(site: Site) -> Any:
        def hook(_module: nn.Module, _args: Any, y: Tensor) -> None:
            y = y if site.kind == "linear" else y.movedim(1, -1)
            found[site.name].append(y.cpu().double().square().reshape(len(labels[-1]), -1, y.shape[-1]).sum(1))

        return hook

    like = next(anatomy.model.parameters())
    handles = [anatomy.modules[s.name].register_forward_hook(note(s)) for s in layers]
    try:
        with evaluating(anatomy.model), torch.random.fork_rng(devices=[]):  # loaders draw a seed
            for images, classes in anatomy.batches or ():
                labels.append(classes.to(like.device))
                anatomy.model(images.to(like.device, like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    every = torch.cat(labels)
    rows = {n: torch.cat(f) for n, f in found.items()}
    return {n: torch.stack([r[every == c].sum(0).sqrt() for c in every.unique()]).mean(0) for n, r in rows.items()}


def _largest(marks: Tensor, fraction: float) -> list[int]:
    """The places of the largest, in order; one at least."""
    return sorted(marks.topk(max(1, round(fraction * len(marks)))).indices.tolist())


class Graft(graft.Graft):
    """A small linear layer over a few of a layer's channels."""

    at: Tensor

    def __init__(self, site: Site, config: Config) -> None:  # noqa: ARG002 - the interface
        super().__init__()
        self.calls = site.kind == "linear"
        self.edits = ("weight", "bias") if site.bias else ("weight",)
        at: list[int] = site.facts.get("at", [])
        self.register_buffer("at", torch.tensor(at, dtype=torch.int64), persistent=False)
        self.K = nn.Parameter(torch.empty(len(at), len(at)))
        self.bias = nn.Parameter(torch.zeros(len(at))) if site.bias else None
        nn.init.trunc_normal_(self.K, std=0.02)

    def start(self, host: nn.Module, scores: Scores) -> None:  # noqa: ARG002 - the interface
        """Refuse a start without channels."""
        if not len(self.at):
            raise UsageError(
                "sct chooses channels by activations, and there are no images to take them on",
                "vtzoo.inject(model, spec, batches=[(images, labels), …]); vtzoo train hands over its own",
            )

    def leave(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Tune the salient channels, [..., out] -> [..., out]."""
        return y.index_add(-1, self.at, F.linear(y[..., self.at], self.K, self.bias))

    def read(self, name: str, before: Before) -> Tensor:
        """The salient rows of the weight or bias tuned."""
        value = before[name]
        change = self.K @ value[self.at].flatten(1).to(self.K.dtype) if name == "weight" else self.K @ value[self.at]
        change = change + self.bias if name == "bias" and self.bias is not None else change
        return value.index_add(0, self.at, change.to(value.dtype).reshape(-1, *value.shape[1:]))
