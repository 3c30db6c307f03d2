"""Zero-shot and the methods that teach the text tower, beside their formulas on the open_clip model of the same weights."""

import pytest
import torch
from torch import nn

from tests.contract.cases import logits, relative
from tests.parity import language_rewrites as r
from tests.parity.clip_case import CONFIGS, NAMES, TEMPLATE, images, made, say
from tests.parity.dual_case import dual, folded, taught
from vtzoo.graft import tensors_of
from vtzoo.live import inject

TEMPLATES = [TEMPLATE, "a drawing of the {}."]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_zero_shot(kind: str, agree) -> None:
    """Several templates are averaged as the paper does it."""
    found = logits(dual(kind, TEMPLATES), images())
    agree(
        f"zero-shot, {kind}",
        "open_clip",
        logits=relative(r.zero_shot(made(kind), say, images(), NAMES, TEMPLATES), found),
    )


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_coop(kind: str, position: str, per_class: bool, agree) -> None:
    """Shared and class-specific context in all three positions; five vectors, so that the halves differ."""
    spec = f"coop[init=,context=5,position={position},per_class={str(per_class).lower()}]"
    model, own = taught(spec, kind)
    (ctx,) = own.values()
    wanted = r.coop(made(kind), say, images(), NAMES, ctx.unflatten(0, (-1, 5)) if per_class else ctx, position)
    found = {"logits": logits(model, images()), "folded": logits(folded(model, kind), images())}
    agree(f"{spec}, {kind}", "rewrite", **{n: relative(wanted, x) for n, x in found.items()})


def test_coop_starts_as_words(agree) -> None:
    """Its own start is the zero-shot classifier."""
    found = logits(inject(dual(), "coop"), images())
    agree("coop", "zero-shot", logits=relative(r.zero_shot(made(), say, images(), NAMES, [TEMPLATE]), found))


def test_the_gradient_of_coop(agree) -> None:
    """The context's gradient of a loss is the rewrite's; nothing else has one."""
    model, own = taught("coop")
    (ctx,) = tensors_of(model).values()
    labels = torch.tensor([0, 2, 1])
    nn.functional.cross_entropy(model(images()), labels).backward()
    again = ctx.detach().clone().requires_grad_()
    nn.functional.cross_entropy(r.coop(made(), say, images(), NAMES, again), labels).backward()
    agree("coop", "rewrite", gradient=relative(again.grad, ctx.grad))
    assert [n for n, p in model.named_parameters() if p.grad is not None] == list(own)
