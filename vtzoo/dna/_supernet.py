"""A stage in all its choices at once, trained to do what the teacher does between two depths, and how well each choice does it.

    loss of training    ||Y - Y'||^2 / K            K elements (Li et al. 2020, arXiv:1911.13053, as in changlin31/DNA)
    rating              |Y - Y'|_1 / (K std(Y))     the relative loss: stages compare, whatever the scale of what they give

Choices of one kernel share their blocks, those of all kernels what comes before the blocks.

Departs from the paper: in a step all depths of a kernel learn (a deeper one passes through what the others give, so this takes no more than the deepest), where it
draws one choice of many; kernels take turns in random order, so that all have learned in as many steps (as in FairNAS, Chu et al. 2019, arXiv:1907.01845).
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.dna._shown import Shown
from vtzoo.dna._space import STAGES, Pick, Space
from vtzoo.fit import Plan, fit
from vtzoo.recipe import Recipe

LR, WEIGHT_DECAY, WARM = 2e-3, 0.05, 0.05
BATCH = 32


class Stage(nn.Module):
    """One stage of a space, and of the first one the stem.

    Args:
        entry: what comes before the blocks of all choices.
        rows: the blocks, by the side of their kernels.
        depths: after how many of them something comes out.
    """

    def __init__(self, entry: nn.Module, rows: Mapping[int, nn.Sequential], depths: tuple[int, ...]) -> None:
        super().__init__()
        self.entry, self.depths = entry, depths
        self.rows = nn.ModuleDict({str(kernel): row for kernel, row in rows.items()})

    def forward(self, x: Tensor, only: int | None = None) -> Iterator[tuple[Pick, Tensor]]:
        """What each choice gives, [n, channels, height, width]; or those of one kernel, by its place among them."""
        first = self.entry(x)
        for kernel, row in list(self.rows.items())[slice(None) if only is None else slice(only, only + 1)]:
            out = first
            for depth, block in enumerate(row, 1):  # type: ignore[arg-type] - a Sequential
                out = block(out)
                if depth in self.depths:
                    yield (depth, int(kernel)), out


def supernet(space: Space) -> list[Stage]:
    """All stages, fresh."""
    nets: dict[int, Any] = {k: space.network(((max(space.depths), k),) * STAGES, 0) for k in space.kernels}
    first = nets[space.kernels[0]]
    found: list[Stage] = []
    for i in range(STAGES):
        before = first.stem if i == 0 else nn.Identity()
        entry = nn.Sequential(before, first.stages[i].downsample)
        found.append(Stage(entry, {k: net.stages[i].blocks for k, net in nets.items()}, space.depths))
    return found


def trained(stage: Stage, number: int, images: Shown, steps: int, recipe: Recipe) -> Stage:
    """Train a stage, in place; seed, precision and device are the recipe's.

    Raises:
        Interrupted: stopped by the user.
        VtzooError: the loss is no longer finite.
    """
    own = Recipe(
        epochs=1, lr=LR, weight_decay=WEIGHT_DECAY, warmup_epochs=WARM, seed=recipe.seed, precision=recipe.precision,
        device=recipe.device,
    )  # fmt: skip

    def batches(_epoch: int, _start: int) -> Iterator[tuple[Tensor, ...]]:
        draw, count, turns = random.Random(f"{recipe.seed}/{number}"), min(BATCH, images.trained), list[int]()
        for _ in range(steps):
            turns = turns or draw.sample(range(len(stage.rows)), len(stage.rows))
            places = draw.sample(range(images.trained), count)
            yield *images.pair(number, places), torch.tensor(turns.pop())

    fit(Plan(model=stage, loss=_loss, batches=batches, steps=steps, recipe=own))
    return stage


def _loss(stage: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean over the choices of one kernel."""
    x, wanted, turn = batch
    return torch.stack([F.mse_loss(out.float(), wanted) for _, out in stage(x, int(turn))]).mean()


@torch.inference_mode()
def rated(stage: Stage, number: int, images: Shown) -> dict[Pick, float]:
    """Each choice's relative loss on the images that were held out."""
    device = next(stage.parameters()).device
    apart: dict[Pick, float] = {}
    wanted: list[Tensor] = []
    stage.eval()
    for start in range(0, len(images.held), BATCH):
        x, target = images.pair(number, images.held[start : start + BATCH])
        wanted.append(target)
        for pick, out in stage(x.to(device)):
            apart[pick] = apart.get(pick, 0.0) + (out.float().cpu() - target).abs().sum(dtype=torch.float64).item()
    whole = torch.cat(wanted)
    return {pick: gap / (whole.numel() * whole.std().item()) for pick, gap in apart.items()}
