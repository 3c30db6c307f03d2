"""What each process of test_parallel.py does with every method: a few steps with the frozen network whole, and with a share of it.

torchrun --nproc-per-node 2 tests/e2e/sharded.py FAMILY OUT
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from tests import families
from tests.contract.cases import METHODS, STILL, works
from tests.e2e.curves import watched
from vtzoo import parallel
from vtzoo.devices import accelerator
from vtzoo.fit import Batch, Plan, fit
from vtzoo.live import extract, inject
from vtzoo.recipe import Recipe

STEPS, SIZE = 4, 6


def losses(method: str, family: str, how: str) -> list[float]:
    """Of each step; what is trained must come out whole."""
    model, generator = families.build(family).float(), torch.Generator().manual_seed(1)
    shape = (STEPS, SIZE, 3, *families.FAMILIES[family].size)
    x, y = torch.randn(shape, generator=generator), torch.randint(5, (STEPS, SIZE), generator=generator)
    inject(model, method, seed=0, batches=[(x[0], y[0])])
    own = parallel.own(range(SIZE))

    def batches(_epoch: int, start: int) -> list[Batch]:
        return [(x[i][own], y[i][own]) for i in range(start, STEPS)]

    seen: dict[str, list[float]] = {"losses": [], "images": []}
    recipe = Recipe(epochs=1, lr=1e-3, parallel=how)
    with watched(seen, stop_at=0):
        fit(
            Plan(
                model=model,
                loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
                batches=batches,
                steps=STEPS,
                recipe=recipe,
            )
        )
    assert all(type(t) is torch.Tensor for t in extract(model).tensors.values())
    return seen["losses"]


def main(family: str, out: Path) -> None:
    """Every method that works there, both ways; the first process writes."""
    accelerator(Recipe())
    names = [m for m in METHODS if works(m, family) and m not in STILL]
    found = {m: [losses(m, family, how) for how in ("ddp", "fsdp")] for m in names}
    if parallel.rank() == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
