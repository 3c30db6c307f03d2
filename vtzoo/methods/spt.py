"""SPT: spend a budget of parameters where the loss depends on them most (He et al. 2023, arXiv:2303.08566, sec. 3).

    W' = W + B A                    where many entries of W are among the most sensitive
    p'[i] = p[i] + d[j], i = at[j]  elsewhere: the most sensitive entries of weights, biases and norms, directly

Scores are squared gradients of a supervised contrast on the caller's images: see `vtzoo.sensitivity`. Taken in order of
score, entries cost a parameter each; once a matrix has 1/ratio as many as its A and B would have, these stand in their
stead. What this leaves of the budget goes to the most sensitive entries outside those matrices.
Shapes: A [rank, in], B [out, rank]; conv A [groups, rank, in/groups * kh * kw], B [groups, out/groups, rank]; d [count],
at [count] (whole numbers, kept and not trained). A starts Kaiming-uniform, B and d at zero.
Folds: exactly.  Identity at init: yes.
Parameters: the budget, or as much of it as there are entries to tune; and a place beside each d.
Departs from the paper: the gradients are those of a contrast, not of the task's loss with a fresh head; the budget is met
exactly, where the authors' code takes the nearest of a sweep; a fused qkv is one matrix; norms and biases are never tuned
whole; the class token stays frozen; the LoRA branch has no drop-path. That a matrix needs 1/ratio of its LoRA's
parameters, and that the patch embedding stays frozen, follows that code (github.com/ziplab/SPT).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft, knobs
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.graft import Before, Scores
from vtzoo.methods._sparse import added, largest

GROUP = "parameter/weight-and-bias"
PAPER = "arXiv:2303.08566"
RECIPE = {"tokens": {"lr": 4e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}
Place = tuple[str, str]  # a site's name and a parameter's


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        budget: trained parameters (400k and 0.4M will do); below 1 a fraction of the backbone's.
        rank: of the LoRA in a matrix with many sensitive entries; 0 has none, entries alone.
        ratio: how many times fewer of them than the LoRA has parameters call for it.
        targets: matrices by role, name or glob; norms take part whatever they are.
    """

    budget: Annotated[float, BeforeValidator(knobs.whole), Field(gt=0)] = 0.005
    rank: Annotated[int, Field(ge=0)] = 8
    ratio: Annotated[float, Field(ge=1)] = 10.0
    targets: tuple[str, ...] = ("auto",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Modules that get a LoRA (`rank` in their facts), or some entries of whose parameters are trained (`counts`).

    Raises:
        UsageError: there are no images to tell by, or the budget buys nothing.
    """
    layers = anatomy.select(config.targets)
    owners = [*layers, *anatomy.norms]
    scores = {(s.name, p): anatomy.scores[s.key(p)] for s in owners for p in ("weight", "bias")[: 1 + s.bias]}
    total = sum(anatomy.model.get_parameter(n).numel() for n in anatomy.parameter_names)
    budget = int(config.budget if config.budget >= 1 else config.budget * total)
    costs = {(s.name, "weight"): _cost(s, config) for s in layers if config.rank}
    costs = {p: cost for p, cost in costs.items() if cost < scores[p].numel()}
    low = _low_rank(scores, costs, budget, config.ratio)
    counts = _entries({p: s for p, s in scores.items() if p not in low}, budget - sum(costs[p] for p in low))
    if not low and not counts:
        raise UsageError(f"budget={config.budget:g} buys none of {total} parameters", "raise it, or give other images")
    found: list[Site] = []
    for site in owners:
        own = {p: counts[site.name, p] for p in ("weight", "bias") if (site.name, p) in counts}
        rank = {"rank": _rank(site, config)} if (site.name, "weight") in low else {}
        if own or rank:
            found.append(replace(site, facts={**site.facts, **rank, "counts": own}))
    return found


def _low_rank(scores: Mapping[Place, Tensor], costs: Mapping[Place, int], budget: int, ratio: float) -> set[Place]:
    """The matrices that get a LoRA, when entries are bought in order of score as long as the budget lasts.

    Of a matrix only as many entries matter as call for the LoRA: the last of these brings what it still costs.
    """
    needed = {p: math.ceil(costs[p] / ratio) if p in costs else min(s.numel(), budget) for p, s in scores.items()}
    values = torch.cat([s.flatten().topk(needed[p]).values for p, s in scores.items()])
    prices = torch.ones(len(values), dtype=torch.int64)
    last = dict(zip(scores, (torch.tensor(list(needed.values())).cumsum(0) - 1).tolist(), strict=True))
    for place, cost in costs.items():
        prices[last[place]] += cost - needed[place]
    order = values.cpu().argsort(descending=True, stable=True)
    bought = torch.zeros(len(values), dtype=torch.bool)
    bought[order[prices[order].cumsum(0) <= budget]] = True
    return {p for p in costs if bought[last[p]]}


def _entries(scores: Mapping[Place, Tensor], budget: int) -> dict[Place, int]:
    """How many entries of each parameter are among the `budget` most sensitive; those without any gradient don't count."""
    if not scores:
        return {}
    values = torch.cat([s.flatten() for s in scores.values()])
    chosen = values.topk(min(budget, int((values > 0).sum()))).indices
    ends = torch.tensor([s.numel() for s in scores.values()], device=chosen.device).cumsum(0)
    counts = torch.bincount(torch.bucketize(chosen, ends, right=True), minlength=len(scores)).tolist()
    return {p: n for p, n in zip(scores, counts, strict=True) if n}


def _rank(site: Site, config: Config) -> int:
    """A LoRA's rank: what the site can hold, at most."""
    return min(config.rank, site.shape[0] // site.facts.get("groups", 1), math.prod(site.shape[1:]))


def _cost(site: Site, config: Config) -> int:
    """A LoRA's parameters."""
    return _rank(site, config) * (site.shape[0] + site.facts.get("groups", 1) * math.prod(site.shape[1:]))


class Graft(graft.Graft):
    """A low-rank branch, or chosen entries of a weight; and chosen entries of a bias."""

    def __init__(self, site: Site, config: Config) -> None:  # noqa: ARG002 - the site knows
        super().__init__()
        rank, self.counts = int(site.facts.get("rank", 0)), dict[str, int](site.facts["counts"])
        self.calls = bool(rank) and site.kind == "linear" and site.called
        self.edits = ("weight",) * bool(rank) + tuple(self.counts)
        groups, fan_in = int(site.facts.get("groups", 1)), math.prod(site.shape[1:])
        lead = (groups,) if groups > 1 else ()
        self.A = nn.Parameter(torch.zeros(*lead, rank, fan_in)) if rank else None
        self.B = nn.Parameter(torch.zeros(*lead, site.shape[0] // groups, rank)) if rank else None
        if self.A is not None:
            nn.init.uniform_(self.A, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        for name, count in self.counts.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(count)))
            self.register_buffer(f"{name}_at", torch.zeros(count, dtype=torch.int32))

    def start(self, host: nn.Module, scores: Scores) -> None:  # noqa: ARG002 - the interface
        """Choose the entries."""
        for name, count in self.counts.items():
            self.get_buffer(f"{name}_at").copy_(largest(scores(name).flatten(), count))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch and the change of the bias, [..., in] -> [..., out]."""
        assert self.A is not None  # or it would be read
        assert self.B is not None
        y = y + F.linear(F.linear(x, self.A), self.B)
        return y + self._changed("bias", y.new_zeros(y.shape[-1])) if "bias" in self.counts else y

    def read(self, name: str, before: Before) -> Tensor:
        """The weight or bias with its change."""
        value = before[name]
        if name == "weight" and self.A is not None and self.B is not None:
            return value + (self.B @ self.A).to(value.dtype).reshape(value.shape)
        return self._changed(name, value)

    def _changed(self, name: str, value: Tensor) -> Tensor:
        return added(value, self.get_buffer(f"{name}_at"), self.get_parameter(name))
