"""A merge kept as a LoRA: each matrix as B A, cut to a rank; everything else as it is in plain weights.

    D = U S V'   ->   B = U sqrt(S) [out, rank],  A = sqrt(S) V' [rank, in]         the nearest to D of this rank

Without a rank a matrix gets the sum of its deltas' ranks, which loses nothing where the merge adds LoRAs up.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vtzoo import knobs
from vtzoo.anatomy import Site
from vtzoo.delta import Delta, Part
from vtzoo.errors import NotFoldable, UsageError
from vtzoo.merges._spectral import sides
from vtzoo.merges._whole import is_matrix
from vtzoo.rebuilt import skeleton
from vtzoo.speech import TEXT
from vtzoo.tensors import WORKERS, one_thread
from vtzoo.tied import further

LORA = "lora"


@dataclass(eq=False)
class Kept:
    """The matrices of a merge as pairs of thin ones.

    Attributes:
        part: the `lora` part of the artifact.
        makers: what computes its tensors.
        shapes: of them.
        lost: squared L2 norm of what was cut off each matrix that was computed, and of the whole matrix.
    """

    part: Part
    makers: Mapping[str, Callable[[], Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    lost: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    @property
    def error(self) -> float:
        """The L2 norm of all that was cut off, over that of all matrices."""
        cut, all_ = (sum(pair[i] for pair in self.lost.values()) for i in (0, 1))
        return (cut / all_) ** 0.5 if all_ else 0.0


def rank_asked(spec: str) -> int | None:
    """Read `lora` or `lora[rank=16]`; the rank, None where none is given.

    Raises:
        UsageError: anything else.
    """
    part = knobs.one(spec)
    rank = str(part.knobs.get("rank", ""))
    if part.name != LORA or set(part.knobs) - {"rank"}:
        raise UsageError(f"a merge can't be kept as '{spec}'", "lora, or lora[rank=16]")
    if rank and not (rank.isdecimal() and int(rank)):
        raise UsageError(f"a rank of {rank} keeps nothing", "for example --keep lora[rank=16]")
    return int(rank) if rank else None


def low_rank(
    deltas: Sequence[Delta], names: Mapping[str, tuple[int, ...]], vector: Callable[[str], Tensor], rank: int | None
) -> Kept:
    """Plan the thin matrices.

    Args:
        deltas: those that are merged.
        names: every tensor of the merge, and its shape.
        vector: gives a tensor of the merged task vector.
        rank: of every matrix, or what its shape holds; None for the sum of the deltas' own.

    Raises:
        NotFoldable: no rank was given, and a delta is no LoRA where a matrix is.
    """
    several = {
        n for d in deltas for p in d.parts for n in further(p.sites)
    }  # names of one tensor: it stays in one piece
    found = [n for n in sorted(names) if is_matrix(n, names[n]) and n not in several]
    own = _ranks(deltas) if rank is None else {}
    makers: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    sites: list[Site] = []
    kept = Kept(Part(method=LORA, graft=LORA), makers, shapes)
    halves = _halves(vector, kept)
    for name in found:
        size = sides(names[name])
        most = min(*size, own[name] if rank is None else rank)
        module = name.removesuffix(".weight")
        kind = "linear" if len(names[name]) == 2 else "conv"
        site = Site(name=module, kind=kind, shape=names[name], called=False, facts={"rank": most})
        sites.append(site)
        for half, shape in (("A", (most, size[1])), ("B", (size[0], most))):
            place = f"{site.key(LORA)}.{half}"
            makers[place], shapes[place] = (lambda n=name, m=most, h=half: halves(n, m)[h]), shape
    kept.part = replace(kept.part, knobs={"rank": max((s.facts["rank"] for s in sites), default=1)}, sites=tuple(sites))
    return kept


def _halves(vector: Callable[[str], Tensor], kept: Kept) -> Callable[[str, int], dict[str, Tensor]]:
    lock = Lock()

    @lru_cache(maxsize=2 * WORKERS)  # A and B of a matrix are written one after the other
    @torch.no_grad()
    @one_thread()
    def cut(name: str, rank: int) -> dict[str, Tensor]:
        matrix = vector(name).double().flatten(1)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        root = values[:rank].sqrt()
        with lock:
            kept.lost[name] = float(values[rank:].square().sum()), float(values.square().sum())
        return {"A": (root[:, None] * right[:rank]).float(), "B": (left[:, :rank] * root).float()}

    return cut


def _ranks(deltas: Sequence[Delta]) -> dict[str, int]:
    """The sum of the ranks of LoRAs, by the name of the matrix.

    Raises:
        NotFoldable: another method changes a matrix.
    """
    found: dict[str, int] = {}
    for delta in deltas:
        for part in delta.parts:
            if hasattr(part.module, "head"):
                continue
            config = part.config
            for site in (s for s in part.sites if not s.name.startswith(TEXT)):
                graft: Any = skeleton(part.module, site, config)
                if "weight" not in getattr(graft, "edits", ()):
                    continue
                name = site.key("weight")
                shape = site.shape or tuple(site.facts.get("params", {}).get("weight", ()))
                if not is_matrix(name, shape):
                    continue
                if part.method != LORA or getattr(part.config, "dora", False):
                    raise NotFoldable(
                        f"{part.method} changes {name}, and has no rank to keep", "give one: --keep lora[rank=16]"
                    )
                lead = math.prod(graft.A.shape[:-2])  # parts of a fused qkv, or groups
                found[name] = found.get(name, 0) + lead * int(graft.A.shape[-2])
    return found
