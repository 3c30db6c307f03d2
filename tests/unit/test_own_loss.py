"""The loss that a method brings: what it sees, what it changes, and what it is refused for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.unit.spoken import LABELS, images, spoken
from vtzoo import own_loss
from vtzoo.errors import UsageError
from vtzoo.graft import tensors_of
from vtzoo.installed import installed
from vtzoo.live import inject, trainable
from vtzoo.prefix import find


def plain(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Smoothed cross-entropy, so that it can be told from the usual one."""
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


def sharp(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def taught(spec: str) -> Any:
    """A perturbed delta on a dual encoder, in training mode."""
    model = inject(spoken(), spec, seed=1)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for value in trainable(model).values():
            value.add_(torch.randn_like(value) * 0.1)
    return model.train()


def loss_of(model: nn.Module, loss: own_loss.Loss = plain) -> own_loss.Loss:
    """What it is trained on."""
    record = installed(model)
    assert record is not None
    return own_loss.around(loss, model, record.parts)


def grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of everything trained."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}


def test_a_stack_without_a_loss_keeps_the_plain_one() -> None:
    """Nothing is put around it."""
    assert loss_of(taught("coop")) is plain


def test_kgcoop_adds_the_distance() -> None:
    """Smoothed cross-entropy and 8 (1 - mean cosine between the classes' texts and those of the templates)."""
    model = taught("kgcoop")
    found = loss_of(model)(model, (images(), LABELS))
    near = F.cosine_similarity(model.clip_head.layer()[0], spoken().clip_head.layer()[0], dim=-1)
    assert 0.01 < (1 - near.mean()).item() < 1.5
    assert torch.allclose(found, plain(model, (images(), LABELS)) + 8 * (1 - near.mean()), rtol=1e-12)
    fresh = inject(spoken(), "kgcoop")
    assert abs(loss_of(fresh)(fresh, (images(), LABELS)) - plain(fresh, (images(), LABELS))).item() < 1e-10


def test_texts_are_read_once_in_a_step() -> None:
    """The distance is of the very texts that the logits are of; a second step reads them anew."""
    model, calls = taught("kgcoop"), []
    loss = loss_of(model)
    model.text.register_forward_hook(lambda *_: calls.append(1))
    first = loss(model, (images(), LABELS))
    with torch.no_grad():
        next(iter(tensors_of(model).values())).mul_(2)
    assert loss(model, (images(), LABELS)) != first
    assert len(calls) == 2


def test_prograd_takes_off_what_goes_against_zero_shot() -> None:
    """Value and the other parts' gradients are the plain loss's; the context's lacks its component against the general direction."""
    model = taught("prograd+ssf")
    context = next(p for n, p in trainable(model).items() if n.endswith("context"))
    zero_shot, batch = spoken().clip_head, (images(), LABELS)
    usual, found = plain(model, batch), loss_of(model)(model, batch)
    assert found.item() == usual.item()
    known = zero_shot(model.forward_head(model.forward_features(images()), pre_logits=True)).softmax(-1).detach()
    (h,) = torch.autograd.grad(F.kl_div(model(images()).log_softmax(-1), known, reduction="batchmean"), context)
    wanted, own = grads(model, usual), grads(model, found)
    name = next(n for n in wanted if n.endswith("context"))
    g = wanted.pop(name)
    assert (g * h).sum() < 0  # they disagree
    assert torch.allclose(own.pop(name), g - (g * h).sum() / (h * h).sum() * h, rtol=1e-9, atol=1e-14)
    assert wanted.keys() == own.keys()
    assert len(wanted) > 10
    assert all(torch.equal(own[n], wanted[n]) for n in wanted)


def test_prograd_keeps_what_agrees() -> None:
    """Labels that zero-shot gives itself: the gradient is the plain one's, as it is where it starts, with nothing to compare."""
    likely = spoken()(images()).argmax(-1)
    for model, labels in ((taught("prograd"), likely), (inject(spoken(), "prograd"), LABELS)):
        (own,), (wanted,) = (
            grads(model, loss(model, (images(), labels))).values() for loss in (loss_of(model, sharp), sharp)
        )
        assert torch.equal(own, wanted)


def test_weight_zero_is_coop() -> None:
    """Neither method changes the gradient then."""
    for spec in ("kgcoop[weight=0]", "prograd[weight=0]"):
        model = taught(spec)
        (own,), (wanted,) = (grads(model, loss(model, (images(), LABELS))).values() for loss in (loss_of(model), plain))
        assert torch.allclose(own, wanted, rtol=1e-12)


@pytest.mark.parametrize("spec", ["kgcoop", "prograd"])
def test_features_computed_once_give_the_same(spec: str) -> None:
    """The image tower's part is cut off before the classifier, and a step on kept features is the step on images."""
    model = taught(spec).float()
    x = images().float()
    prefix = find(model)
    assert prefix is not None
    assert (prefix.cut, prefix.last) == ("clip_head", True)
    features = prefix.features(model, x)
    kept = loss_of(model, lambda m, b: F.cross_entropy(prefix.rest(m, b[0]), b[1], label_smoothing=0.1))
    (own,), (wanted,) = (
        grads(model, loss(model, batch)).values()
        for loss, batch in ((kept, (features, LABELS)), (loss_of(model), (x, LABELS)))
    )
    assert torch.allclose(own, wanted, rtol=1e-5, atol=1e-7)


def test_places_are_not_kept_as_features() -> None:
    """PLOT is cut at the same module as the others, and given places there: what is kept of both is told apart."""
    pooled, placed = (find(inject(spoken(), spec)) for spec in ("kgcoop", "plot"))
    assert pooled is not None
    assert placed is not None
    assert (pooled.cut, pooled.size) == (placed.cut, placed.size)
    assert pooled.facts != placed.facts


def test_bf16_and_checkpointing_go_with_it() -> None:
    """Under autocast the gradient is near that of float32; blocks that are computed again change nothing, although it goes back twice."""
    from vtzoo import blocks

    model = taught("prograd+lora").float()
    batch = (images().float(), LABELS)
    loss = loss_of(model)
    wanted = grads(model, loss(model, batch))
    with blocks.manner(model, lambda: torch.autocast("cpu", enabled=False), again=True)():
        again = grads(model, loss(model, batch))
    assert all(torch.allclose(again[n], wanted[n], rtol=1e-4, atol=1e-7) for n in wanted)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model, batch)
    near = grads(model, value)
    name = next(n for n in wanted if n.endswith("context"))
    assert F.cosine_similarity(near[name].flatten(), wanted[name].flatten(), dim=0) > 0.98


def test_two_losses_are_refused() -> None:
    """Each would be trained on its own; that is said before anything is trained."""
    from vtzoo.delta import Part

    with pytest.raises(UsageError, match="kgcoop and prograd"):
        own_loss.check([Part(method=m, graft=m) for m in ("kgcoop", "prograd")], several=False)


def test_images_with_several_labels_are_refused_where_it_makes_no_sense() -> None:
    """ProGrad compares predictions of one class; the distance of KgCoOp goes with any loss."""
    from vtzoo.delta import Part

    own_loss.check([Part(method="kgcoop", graft="kgcoop")], several=True)
    with pytest.raises(UsageError, match="one class each"):
        own_loss.check([Part(method="prograd", graft="prograd")], several=True)
