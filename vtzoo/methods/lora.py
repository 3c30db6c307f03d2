"""LoRA: add a trainable low-rank matrix to frozen weights (Hu et al. 2021, arXiv:2106.09685, sec. 4.1).

    y = W x + b + scale * B A x                     fold:  W' = W + scale * B A,   scale = alpha / rank

    rs=true       scale = alpha / sqrt(rank)                                         rsLoRA, arXiv:2312.03732, eq. 3
    init=pissa    W' = W + scale * (B A - B0 A0), scale * B0 A0 = W's best at rank    PiSSA, arXiv:2404.02948, eq. 2-4
    dora=true     W' = m * V / |V|, V = W + scale * B A, |V| by rows                  DoRA, arXiv:2402.09353, eq. 5
    plus=16       B learns at 16 times the rate of A                                  LoRA+, arXiv:2402.12354, sec. 4
    dynamic=true  while training only the first b rows of A act, b = 1 … rank drawn   DyLoRA, arXiv:2210.07558, alg. 1

Shapes: linear A [rank, in], B [out, rank]; with a subset of a fused qkv A [parts, rank, in], B [parts, out/3, rank];
conv A [groups * rank, in/groups * kh * kw], B [out, rank], the product reshaped to [out, in/groups, kh, kw] per group;
m [out]. A starts Kaiming-uniform, B at zero, m at the rows' lengths. alpha defaults to rank (scale 1).
Folds: exactly.  Identity at init: yes.
Parameters: rank * (in + out) per linear, out more with dora (pissa keeps A0 and B0 beside them, untrained).
Departs from the paper: every linear of the blocks by default (the paper: q and v), since on small vision sets that is
the stronger choice; a convolution's weight is edited as it is read, so strides, groups, 'same' padding and weight
standardisation fold exactly. PiSSA leaves the backbone as it is and takes its first A and B away again. DoRA keeps |V|
out of the gradient (its sec. 4.3), and is plain LoRA where a convolution standardises its weight, which undoes a
row's length; a row of zeros has no direction, and stays undivided with m = 1. DyLoRA draws b in each layer, not once for all,
and scales as if at full rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.graft import Before, Scores, stored
from vtzoo.methods._increment import plus
from vtzoo.methods._sizes import check, sized

GROUP = "parameter/weight"
PAPER = "arXiv:2106.09685"
EMPTY = 1e-12  # a row that is shorter has no direction
RECIPE = {"tokens": {"lr": 2e-3, "weight_decay": 1e-4}, "maps": {"lr": 1e-3, "weight_decay": 1e-4}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        rank: width of the bottleneck; a site that can hold less (out or in per group) takes what it can hold.
        ranks: exceptions, each TARGET:RANK (a role, name or glob); the last that fits a site counts, and 0 leaves it out.
        alpha: scale is alpha / rank; None means rank.
        rs: divide by the root of the rank instead.
        dropout: on the branch's input while training (called linears only, without dora).
        targets: sites by role, name or glob.
        qkv: which of a fused qkv's three outputs are adapted.
        init: kaiming starts as the backbone by B = 0; pissa by taking the weight's first singular vectors away again.
        dora: learn the length of each row beside its direction.
        plus: factor of B's learning rate.
        dynamic: train every smaller rank too, by dropping the last rows of A at random.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    ranks: tuple[str, ...] = ()
    alpha: Annotated[float, Field(gt=0)] | None = None
    rs: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] = ("auto",)
    qkv: str = "qkv"
    init: Literal["kaiming", "pissa"] = "kaiming"
    dora: bool = False
    plus: Annotated[float, Field(gt=0)] = 1.0
    dynamic: bool = False

    def __post_init__(self) -> None:
        """Refuse a `qkv` that isn't a subset of its three letters, in order, and `ranks` that aren't TARGET:RANK."""
        if not self.qkv or "".join(c for c in "qkv" if c in self.qkv) != self.qkv:
            raise ValueError(f"qkv={self.qkv} is not a subset of 'qkv' such as qv")
        check("ranks", self.ranks, "rank")


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Linears and convolutions that the targets name.

    Raises:
        UsageError: a part of qkv where no layer's outputs are known to be q, k and v in this order.
    """
    found = sized(anatomy, anatomy.select(config.targets), "ranks", config.ranks, "rank")
    if config.qkv == "qkv":
        return found
    fused = [s.name for s in found if "fused" in s.facts]
    if strange := next((n for n in fused if not anatomy.value_last(n)), None):
        raise UsageError(
            f"qkv={config.qkv}: the outputs of {strange} are not [q, k, v] in this order (interleaved by head, or of uneven widths)",
            "leave qkv out: lora[rank=8] adapts all of them",
        )
    if not fused:
        raise UsageError(
            f"qkv={config.qkv}: none of the targeted layers is a fused qkv",
            "leave qkv out, or name layers in targets=…",
        )
    return found


def _empty(rows: Tensor) -> Tensor:
    """Which of the backbone's rows are zero, or next to it, and have no direction, [..., out]: DoRA leaves them undivided."""
    return torch.linalg.vector_norm(rows, dim=-1) < EMPTY


class Graft(graft.Graft):
    """A low-rank branch beside a linear, or inside a weight that is read."""

    edits = ("weight",)
    A0: Tensor
    B0: Tensor

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.calls = site.kind == "linear" and site.called and not config.dora
        self.shape, groups = site.shape, int(site.facts.get("groups", 1))
        wanted = int(site.facts.get("rank", config.rank))
        alpha = config.alpha or wanted
        self.scale = alpha / (math.sqrt(wanted) if config.rs else wanted)
        self.dropout, self.dynamic, self.rates = config.dropout, config.dynamic, {"B": config.plus}
        self.undecayed = ("m",)
        self.slices = (
            [i for i, c in enumerate("qkv") if c in config.qkv] if "fused" in site.facts and config.qkv != "qkv" else []
        )
        out, fan_in = site.shape[0] // (3 if self.slices else groups), math.prod(site.shape[1:])
        self.rank = min(wanted, out, fan_in)
        lead = (len(self.slices),) if self.slices else (groups,) if groups > 1 else ()
        self.A, self.B = (nn.Parameter(torch.zeros(*lead, *s)) for s in ((self.rank, fan_in), (out, self.rank)))
        lengths = config.dora and "standardised" not in site.facts
        self.m = nn.Parameter(torch.ones(*lead, out)) if lengths else None
        self.first = config.init == "pissa"
        self.adds = not (self.m is not None or self.dropout or self.dynamic or self.first)
        if self.first:
            self.register_buffer("A0", torch.zeros_like(self.A))
            self.register_buffer("B0", torch.zeros_like(self.B))
        nn.init.uniform_(self.A, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    @torch.no_grad()
    def start(self, host: nn.Module, scores: Scores) -> None:  # noqa: ARG002 - the interface
        """m from the lengths of the host's rows; A and B from its first singular vectors."""
        rows = self._rows(stored(host, "weight"))
        if self.m is not None:
            self.m.copy_(torch.where(_empty(rows), 1.0, torch.linalg.vector_norm(rows, dim=-1)))
        if self.first:
            u, s, v = torch.linalg.svd(rows.cpu().double(), full_matrices=False)
            root = (s[..., : self.rank] / self.scale).sqrt()
            for name, value in (
                ("A", root[..., None] * v[..., : self.rank, :]),
                ("B", u[..., : self.rank] * root[..., None, :]),
            ):
                getattr(self, name).copy_(value)
                getattr(self, f"{name}0").copy_(value)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the branch, [..., in] -> [..., out]."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if not self.slices:
            return self._added(x, y, ...)
        parts = list(y.chunk(3, dim=-1))
        for i, part in enumerate(self.slices):
            parts[part] = self._added(x, parts[part], i)
        return torch.cat(parts, dim=-1)

    def read(self, name: str, before: Before) -> Tensor:
        """The weight with the product added."""
        weight = before[name]
        rows = self._rows(weight) + self._product().to(weight.dtype)
        if self.m is not None:
            length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).detach()
            length = torch.where(_empty(self._rows(before.base(name)))[..., None], 1.0, length)
            rows = self.m[..., None].to(weight.dtype) * rows / length
        if not self.slices:
            return rows.reshape(self.shape)
        parts = list(weight.chunk(3))
        for i, part in enumerate(self.slices):
            parts[part] = rows[i]
        return torch.cat(parts)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002 - the one that it edits
        """scale * B and A, those of PiSSA and of a fused qkv's parts side by side; None with lengths, or groups."""
        if self.m is not None or (self.A.ndim > 2 and not self.slices):
            return None
        left, right = self.scale * self.B, self.A
        if self.first:
            left, right = torch.cat([left, -self.scale * self.B0], -1), torch.cat([right, self.A0], -2)
        if not self.slices:
            return left, right
        rank, blocks = right.shape[-2], torch.block_diag(*left).split(left.shape[-2])
        own = dict(zip(self.slices, blocks, strict=True))
        none = left.new_zeros(left.shape[-2], rank * len(self.slices))
        return torch.cat([own.get(i, none) for i in range(3)]), right.flatten(0, 1)

    def _added(self, x: Tensor, y: Tensor, part: Any) -> Tensor:
        """y + scale * (B A - B0 A0) x for one part of a fused qkv, or for all of the layer (...)."""
        hidden, B = F.linear(x, self._live(self.A[part])), self.B[part]
        if not self.first:
            return plus(y, hidden, B, self.scale)
        first = F.linear(F.linear(x, self.A0[part]), self.B0[part])
        return y + self.scale * (F.linear(hidden, B) - first)  # not in two sums: it must start at zero, bit for bit

    def _product(self) -> Tensor:
        """scale * (B A - B0 A0), [..., out, in]."""
        product = self.B @ self._live(self.A)
        return self.scale * (product - self.B0 @ self.A0 if self.first else product)

    def _live(self, A: Tensor) -> Tensor:
        """The rows of A that act in this step."""
        if not (self.dynamic and self.training):
            return A
        last = torch.randint(self.rank, (1,), device=A.device)
        return A * (torch.arange(self.rank, device=A.device) <= last).to(A.dtype)[:, None]

    def _rows(self, weight: Tensor) -> Tensor:
        """The adapted part of a weight as matrices, [..., out, in]."""
        if self.slices:
            return weight.unflatten(0, (3, -1))[self.slices]
        return weight.reshape(*self.B.shape[:-1], -1)
