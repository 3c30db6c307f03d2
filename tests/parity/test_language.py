"""Zero-shot and the methods that teach the text tower, beside their formulas on the open_clip model of the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import families
from tests.contract.cases import logits, relative
from tests.parity import language_rewrites as r
from tests.parity.clip_case import CONFIGS, NAMES, TEMPLATE, images, made, say
from tests.parity.dual_case import dual, folded, taught
from vtzoo import own_loss
from vtzoo.graft import tensors_of
from vtzoo.installed import installed
from vtzoo.live import inject

TEMPLATES = [TEMPLATE, "a drawing of the {}."]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_zero_shot(kind: str, agree) -> None:
    """Several templates are averaged as the paper does it."""
    found = logits(dual(kind, TEMPLATES), images())
    wanted = r.zero_shot(made(kind), say, images(), NAMES, TEMPLATES)
    agree(f"zero-shot, {kind}", "open_clip", logits=relative(wanted, found))


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


def stepped(model: Any, labels: Tensor) -> tuple[float, Tensor]:
    """The loss that a method is trained on, and the context's gradient of it."""

    def plain(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    loss = own_loss.around(plain, model, installed(model).parts)(model, (images(), labels))
    loss.backward()
    (ctx,) = tensors_of(model).values()
    return loss.item(), ctx.grad


def context(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """A copy of a model's context to derive by, the classes and the logits that the rewrite makes of it."""
    (ctx,) = (t.detach().clone().requires_grad_() for t in tensors_of(model).values())
    t = r.read(made(), *r.learned(made(), say, ctx, NAMES))
    return ctx, t, r.compare(made(), made().encode_image(images()), t)


def test_kgcoop(agree) -> None:
    """Loss and gradient with the distance to the hand-written prompts, here of two templates."""
    model, labels = taught("kgcoop[weight=3]", templates=TEMPLATES)[0], torch.tensor([0, 2, 1])
    ctx, t, found = context(model)
    wanted = r.kgcoop(found, labels, t, r.class_features(made(), say, NAMES, TEMPLATES), 3.0)
    wanted.backward()
    loss, grad = stepped(model, labels)
    apart = relative(found.detach(), logits(folded(model), images()))
    agree("kgcoop", "rewrite", loss=abs(loss / wanted.item() - 1), gradient=relative(ctx.grad, grad), folded=apart)


@pytest.mark.parametrize("weight", [1.0, 0.8])
@pytest.mark.parametrize("contrary", [False, True])
def test_prograd(contrary: bool, weight: float, agree) -> None:
    """The gradient that the optimizer gets, where learning goes with zero-shot and where it goes against it."""
    spec = f"prograd[weight={weight},temperature=2]"
    model = taught(spec, templates=TEMPLATES)[0]
    ctx, _, found = context(model)
    known = r.zero_shot(made(), say, images(), NAMES, TEMPLATES)
    labels = found.argmax(1) if contrary else known.argmax(1)
    own = nn.functional.cross_entropy(found, labels)
    wanted, (plain,) = r.prograd(found, labels, known, ctx, weight, 2.0), torch.autograd.grad(own, ctx)
    assert (relative(plain, wanted) > 1e-3) is contrary
    loss, grad = stepped(model, labels)
    case = f"{spec}, {'against' if contrary else 'with'} zero-shot"
    agree(case, "rewrite", gradient=relative(wanted, grad), loss=abs(loss / own.item() - 1))


@pytest.mark.parametrize("rows", [256, 4])
def test_cocoop(rows: int, agree, monkeypatch) -> None:
    """Logits and gradients, all images' prompts read at once and one image's at a time."""
    monkeypatch.setattr("vtzoo.methods.cocoop.ROWS", rows)
    model: Any = taught("cocoop[reduction=4]")[0]
    families.perturb({n: p.detach() for n, p in model.clip_head.named_parameters()})
    own = [*tensors_of(model).values(), *model.clip_head.parameters()]
    copies = [t.detach().clone().requires_grad_() for t in own]
    labels = torch.tensor([0, 2, 1])
    wanted, found = r.cocoop(made(), say, images(), NAMES, *copies), model(images())
    for x in (wanted, found):
        nn.functional.cross_entropy(x, labels).backward()
    grads = max(relative(copy.grad, t.grad) for copy, t in zip(copies, own, strict=True))
    agree(f"cocoop, {rows} rows", "rewrite", logits=relative(wanted.detach(), found.detach()), gradients=grads)


@pytest.mark.parametrize("position", ["end", "middle"])
def test_plot(position: str, agree) -> None:
    """Logits and the context's gradient, which passes the plan by, with a set number of iterations."""
    spec = f"plot[prompts=2,context=3,position={position},iterations=4,tolerance=0]"
    model, labels = taught(spec)[0], torch.tensor([0, 2, 1])
    (ctx,) = tensors_of(model).values()
    again = ctx.detach().unflatten(0, (2, 3)).requires_grad_()
    wanted, found = r.plot(made(), say, images(), NAMES, again, position, rounds=4, close=0.0), model(images())
    for x in (wanted, found):
        nn.functional.cross_entropy(x, labels).backward()
    grad = relative(again.grad.flatten(0, 1), ctx.grad)
    agree(spec, "rewrite", logits=relative(wanted.detach(), found.detach()), gradient=grad)


def test_plot_ends(agree) -> None:
    """Iterations end for each image and class as the authors' do where there is one of each."""
    spec = "plot[prompts=2,context=3,entropy=0.05]"
    model, own = taught(spec)
    (ctx,) = (t.unflatten(0, (2, 3)) for t in own.values())
    each = [[r.plot(made(), say, x[None], [n], ctx, eps=0.05)[0, 0] for n in NAMES] for x in images()]
    agree(spec, "rewrite", logits=relative(torch.tensor(each, dtype=torch.float64), logits(model, images())))
