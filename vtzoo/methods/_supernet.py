"""A stack of methods at its largest, run at any smaller sizes by slices of its tensors, so that all sizes share them."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vtzoo import registry, talk
from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Graft, named_grafts
from vtzoo.installed import installed
from vtzoo.live import inject, trainable
from vtzoo.methods._prompts import Prompt
from vtzoo.methods._protocol import recipe

Sizes = Sequence[Sequence[int]]  # by method and block; 0 where there is none
DECAY, CLIP, BATCH = 1e-4, 1.0, 32
WARM = 10  # one of so many steps, the first, warms up
CUTS: Mapping[str, Mapping[str, int]] = {
    "vpt-deep": {"prompt": 0},
    "lora": {"A": -2, "B": -1},
    "adapter": {"down": 0, "down_bias": 0, "up": 1},
}
"""Along which axis a tensor has the method's size."""


@dataclass(frozen=True)
class Row:
    """The grafts of one method in one block."""

    method: str
    block: str
    sites: tuple[Site, ...]
    grafts: tuple[tuple[str, Graft, nn.Module], ...]  # the prefix of its tensors' names, and its host

    def cut(self, size: int) -> dict[str, Tensor]:
        """Their tensors at a size; at 0 such that they change nothing."""
        axes, found = CUTS[self.method], dict[str, Tensor]()
        for prefix, child, _ in self.grafts:
            for name, value in child.named_parameters():
                if name in axes:
                    found[prefix + name] = value.narrow(axes[name], 0, min(size, value.shape[axes[name]]))
                else:
                    found[prefix + name] = value if size else torch.zeros_like(value)
        return found

    def count(self, size: int) -> int:
        """Of trained numbers at a size."""
        return sum(t.numel() for t in self.cut(size).values()) if size else 0

    def resize(self, size: int) -> None:
        """Have those that count tokens count so many."""
        for _, child, host in self.grafts:
            if isinstance(child, Prompt):
                child.release(host)
                child.tokens = size
                child.bind(host)


class Supernet:
    """A copy of a model with a stack on it, each of its methods in `CUTS`.

    Attributes:
        rows: by method, in the stack's order, one for each block that has sites of it.
    """

    def __init__(self, model: nn.Module, spec: str, anatomy: Anatomy, seed: int) -> None:
        self.net, self.kind = inject(copy.deepcopy(model), spec, seed=seed), anatomy.kind
        record = installed(self.net)
        assert record is not None
        known = dict(named_grafts(self.net))
        self.rows: list[list[Row]] = []
        for part in record.parts:
            rows: list[Row] = []
            for block in anatomy.blocks:
                sites = tuple(s for s in part.sites if f"{s.name}.".startswith(f"{block.name}."))
                prefixes = [f"{s.key(part.graft)}." for s in sites]
                hung = [(p, known[p], self.net.get_submodule(s.name)) for p, s in zip(prefixes, sites, strict=True)]
                rows += [Row(part.method, block.name, sites, tuple(hung))] if sites else []
            self.rows.append(rows)

    def run(self, sizes: Sizes, x: Tensor) -> Tensor:
        """The logits of a subnet."""
        tensors: dict[str, Tensor] = {}
        for rows, own in zip(self.rows, sizes, strict=True):
            for row, size in zip(rows, own, strict=True):
                row.resize(size)
                tensors |= row.cut(size)
        return functional_call(self.net, tensors, (x,), tie_weights=False)

    def count(self, sizes: Sizes) -> int:
        """Of a subnet's trained numbers, the head left out."""
        pairs = ((r, s) for rows, own in zip(self.rows, sizes, strict=True) for r, s in zip(rows, own, strict=True))
        return sum(row.count(size) for row, size in pairs)

    def fit(self, draw: Callable[[], Sizes], x: Tensor, y: Tensor, steps: int, seed: int) -> None:
        """Train all sizes together: in each step those that are drawn."""
        parameters = list(trainable(self.net).values())
        optimizer = torch.optim.AdamW(self._groups(), weight_decay=DECAY)
        warm = max(1, steps // WARM)
        rate = lambda i: min(1.0, (i + 1) / warm) * 0.5 * (1 + math.cos(math.pi * i / max(1, steps)))  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        self.net.train()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            places = torch.cat([torch.randperm(len(y)) for _ in range(1 + steps * BATCH // len(y))])
            for step in talk.track(range(steps), "supernet", steps):
                chosen = places[step * BATCH : (step + 1) * BATCH]
                loss = F.cross_entropy(self.run(draw(), self._moved(x[chosen])), y[chosen].to(self._like.device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                schedule.step()
        self.net.eval()

    def _groups(self) -> list[dict[str, Any]]:
        """Each method's tensors at its own learning rate, the head at the linear probe's, as a training of the stack would."""
        methods = {prefix: row.method for rows in self.rows for row in rows for prefix, _, _ in row.grafts}
        rates = {m: recipe(registry.load("methods", m), self.kind)["lr"] for m in {"linear", *methods.values()}}
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in trainable(self.net).items():
            method = next((m for prefix, m in methods.items() if name.startswith(prefix)), "linear")
            groups.setdefault(rates[method], []).append(parameter)
        return [{"params": own, "lr": lr} for lr, own in groups.items()]

    @torch.no_grad()
    def score(self, sizes: Sizes, x: Tensor, y: Tensor) -> tuple[int, float]:
        """How good a subnet is on labelled images: how many are right, then the negative of the summed loss."""
        logits = torch.cat([self.run(sizes, self._moved(part)).float().cpu() for part in x.split(BATCH)])
        loss = F.cross_entropy(logits, y, reduction="sum").item()
        return int((logits.argmax(-1) == y).sum()), -loss if math.isfinite(loss) else -math.inf

    @property
    def _like(self) -> Any:
        return next(self.net.parameters())

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self._like.device, self._like.dtype)
