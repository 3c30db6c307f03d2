"""NOAH: search for prompts, LoRA and adapters, a size for each block, under a budget (Zhang et al. 2022, arXiv:2206.04673).

    S* = argmax over S of accuracy(backbone + vpt-deep[n_1 … n_L] + lora[r_1 … r_L] + adapter[w_1 … w_L]),   |S*| <= budget

S gives each method a depth (the first blocks have it, the others do not) and each of these blocks a size. One supernet
holds the largest of all; a subnet is its first n prompts, first r rows of A and columns of B, first w units of the
adapters. Each training step trains a subnet drawn at random. An evolution then tries subnets with these weights on
held-out images: of each generation a half are mutants and a half children of the best so far, the rest is drawn anew.
What is left is the spec of a plain stack, which is then trained from scratch and is all that the delta knows.
Shapes: those of the stack's parts.
Folds: no: the stacks it finds hold prompts and adapters, which do not; with tokens=0 and widths=0 they are lora's, which do.
Identity at init: no.
Parameters: the budget at most; n * width + 2 * w * channels + w + channels per block, and r * (in + out) per linear.
Departs from the paper: LoRA is at every linear of a block, not at qkv alone; there are no prompts before the first block
beside its own, with their positions; drawn candidates are from the lower part of the choices as often as from all, so that
tight budgets are met; a mutation redraws sizes too, not depths alone (which is all that the code does); equal accuracies go
by the loss. Supernet and search are as short as the training of one delta, a quarter of the images is held out, and the
sizes are those of the published subnets, not {5, 10, 50, 100}. Where prompts do not fit (convolutions) they are left out.
Relied on: the authors' code for placements, depths, crossover by method and the evolution's probabilities.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from vtzoo import knobs, registry, talk
from vtzoo.anatomy import Anatomy, survey
from vtzoo.errors import UsageError
from vtzoo.installed import head_state
from vtzoo.methods._evolution import Space, evolve
from vtzoo.methods._supernet import Sizes, Supernet

GROUP = "prompt/vision-driven"
PAPER = "arXiv:2206.04673"
TRIAL = {"steps": 1, "population": 1, "generations": 1}

HELD = 4  # one of so many images of a class is held out
PARTS = {  # method: its knobs for the usual size and for exceptions, and those that are always the same
    "vpt-deep": ("tokens", "lengths", {}),
    "lora": ("rank", "ranks", {}),
    "adapter": ("rank", "ranks", {"placement": "intermediate", "drop_path": "0"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        budget: trained parameters at most, the head left out: 400000, 400k or 0.4M.
        tokens: lengths of a block's prompt to choose from; 0 means none.
        ranks: ranks of its LoRA.
        widths: widths of its adapter.
        depths: the fractions of the blocks, from the first on, that may have a method.
        steps: of the supernet's training, on 32 images each.
        population: subnets tried in each generation.
        generations: of the evolution, the one drawn at random included.
    """

    budget: Annotated[int, BeforeValidator(knobs.whole), Field(ge=1)] = 400_000
    tokens: tuple[Annotated[int, Field(ge=0)], ...] = (1, 5, 10)
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = (1, 5, 10)
    widths: tuple[Annotated[int, Field(ge=0)], ...] = (1, 5, 10)
    depths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.25, 0.5, 0.75, 1.0)
    steps: Annotated[int, Field(ge=1)] = 150
    population: Annotated[int, Field(ge=1)] = 16
    generations: Annotated[int, Field(ge=1)] = 4

    def __post_init__(self) -> None:
        """Refuse a search over nothing."""
        if not any((*self.tokens, *self.ranks, *self.widths)) or not self.depths:
            raise ValueError("there is nothing to search: give a size above 0, and a depth")

    def sizes(self, method: str) -> tuple[int, ...]:
        """Those of a method, in order."""
        return tuple(sorted({"vpt-deep": self.tokens, "lora": self.ranks, "adapter": self.widths}[method]))


def compose(model: nn.Module, config: Config, batches: Iterable[tuple[Tensor, Tensor]] | None, seed: int) -> str:
    """The spec of the best stack within the budget; the model stays as it is.

    Raises:
        UsageError: there are no images or no classifier to choose by, or the budget is smaller than any stack.
    """
    if batches is None:
        raise UsageError(
            "noah chooses by training, and there are no images to train on",
            "vtzoo.inject(model, spec, batches=[(images, labels), …]); vtzoo train hands over its own",
        )
    if not head_state(model):
        raise UsageError("noah chooses by a classifier, and this model has none", "build it with num_classes=N")
    train, held = halves(batches)
    anatomy = survey(model)
    net = Supernet(model, largest(anatomy, config), anatomy, seed)
    space = Space.of([(config.sizes(rows[0].method), len(rows)) for rows in net.rows], config.depths)
    if (least := net.count(space.smallest())) > config.budget:
        raise UsageError(
            f"the smallest stack of these sizes has {least} parameters, and the budget is {config.budget}",
            "raise the budget, or allow smaller sizes",
        )
    rng = Random(seed)
    net.fit(lambda: space.draw(rng), *train, config.steps, seed)
    tried = evolve(
        space, lambda c: 0 < net.count(c) <= config.budget, lambda c: net.score(c, *held), config.population, config.generations, rng
    )  # fmt: skip
    if not tried:
        raise UsageError(f"no stack of {config.budget} parameters or fewer was found", "raise the budget")
    best = max(tried, key=tried.__getitem__)
    found = spec(net, best)
    talk.say(
        f"noah tried {len(tried)} stacks within {config.budget:,} parameters; the best has {net.count(best):,} and gets "
        f"{tried[best][0]} of {len(held[1])} held-out images right: {found}"
    )
    return found


def halves(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels to train on, and those held out, of every class alike.

    Raises:
        UsageError: there are too few.
    """
    pairs = list(batches)
    x, y = (torch.cat([p[i].cpu() for p in pairs]) if pairs else torch.empty(0) for i in (0, 1))
    if len(y) < HELD:
        raise UsageError(f"noah holds out one of {HELD} images, and there are {len(y)}", "give more images")
    order = y.argsort(stable=True)
    held = torch.zeros(len(y), dtype=torch.bool)
    held[order[HELD - 1 :: HELD]] = True
    return (x[~held], y[~held]), (x[held], y[held])


def largest(anatomy: Anatomy, config: Config) -> str:
    """The stack with every method that fits at its largest size in every block.

    Raises:
        UsageError: none fits, and why.
    """
    parts: list[str] = []
    reason = UsageError("this backbone has no numbered blocks to search", "use lora or ssf instead")
    for method, (knob, _, fixed) in PARTS.items():
        size = max(config.sizes(method), default=0)
        module = registry.load("methods", method)
        try:
            sites = module.sites(anatomy, knobs.decode(module.Config, {knob: size, **fixed}, method)) if size else ()
        except UsageError as refusal:
            talk.say(f"noah leaves {method} out: {refusal}")
            reason = refusal
            continue
        inside = [s for s in sites if any(f"{s.name}.".startswith(f"{b.name}.") for b in anatomy.blocks)]
        parts += [str(knobs.Part(method, {knob: str(size), **fixed}))] if inside else []
    if not parts:
        raise reason
    return "+".join(parts)


def spec(net: Supernet, sizes: Sizes) -> str:
    """A subnet as a stack: for each method the size that most blocks have, and exceptions."""
    parts: list[str] = []
    for rows, own in zip(net.rows, sizes, strict=True):
        method = rows[0].method
        knob, exceptions, fixed = PARTS[method]
        usual, _ = Counter(s for s in own if s).most_common(1)[0] if any(own) else (0, 0)
        items = [
            f"{target}:{size}"
            for row, size in zip(rows, own, strict=True)
            for target in ([f"{row.block}.*"] if method == "lora" else [s.name for s in row.sites])
            if size != usual
        ]
        found = {knob: str(usual), **({exceptions: items} if items else {}), **fixed}
        parts += [str(knobs.Part(method, found))] if usual else []
    return "+".join(parts)
