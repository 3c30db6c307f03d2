"""Frozen weights kept in bf16 while a network is trained in it: the same numbers, and every bit back afterwards."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import families
from tests.contract.cases import FAMILIES, METHODS, STILL, SUPPORT, WORKS, home, marked
from vtzoo import fit as loop
from vtzoo import machine
from vtzoo.attention import PlainAttention
from vtzoo.errors import VtzooError
from vtzoo.fit import Plan, fit
from vtzoo.graft import tensors_of
from vtzoo.installed import head_state
from vtzoo.live import inject
from vtzoo.narrow import narrow
from vtzoo.recipe import Recipe

QUICK = ("vit", "beit", "convnext", "resnet", "nfnet")
PAIRS = [marked("lora[rank=2]", f, f in QUICK) for f in FAMILIES if SUPPORT["lora"][f] in WORKS]
PAIRS += [marked(m, home(m), m in ("ssf", "vpt-deep")) for m in METHODS if m not in STILL]
PAIRS += [marked("bitfit+lora[rank=2]", "vit"), marked("lora[dora=true,targets=qkv]+adapter", "vit")]


@contextmanager
def bf16() -> Generator[None]:
    """As training runs it."""
    with torch.autocast("cpu", torch.bfloat16), PlainAttention():
        yield


def built(spec: str, family: str) -> nn.Module:
    """In float32, with a delta that acts."""
    model = families.build(family, dtype=torch.float32)
    inject(model, spec, batches=families.labelled(family, dtype=torch.float32))
    families.perturb(tensors_of(model))
    families.perturb(head_state(model), seed=2)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of everything trained, and the outputs."""
    model.train().zero_grad()
    torch.manual_seed(0)
    with bf16():
        y = model(x)
    y.float().square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"": y.detach()}


def size(model: nn.Module) -> int:
    """Bytes of all weights."""
    return sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(("spec", "family"), PAIRS)
def test_it_changes_no_bit(spec: str, family: str) -> None:
    """Outputs and gradients are those of autocast, and afterwards every weight is as it was, in its place in memory."""
    model, x = built(spec, family), families.batch(family).float()
    plain, before, whole = gradients(model, x), {n: p.clone() for n, p in model.named_parameters()}, size(model)
    widen = narrow(model, torch.bfloat16, bf16)
    if family == "vit" and spec in ("lora[rank=2]", "ssf", "vpt-deep"):
        assert size(model) < 0.7 * whole
    found = gradients(model, x)
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[n], found[n]) for n in plain)
    widen()
    after = dict(model.named_parameters())
    assert all(torch.equal(before[n], p) and p.dtype == before[n].dtype for n, p in after.items())
    assert all(before[n].stride() == p.stride() for n, p in after.items())


def test_what_is_trained_or_read_elsewhere_keeps_its_bits() -> None:
    """The head, the delta, norms, a weight that a method edits, and one that is read and never called stay in float32."""
    model = built("lora[rank=2,targets=qkv]+partial[targets=blocks.1.mlp.fc2]", "beit")
    widen = narrow(model, torch.bfloat16, bf16)
    narrowed = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    widen()
    inside = ("attn.proj", "mlp.fc1", "mlp.fc2")
    wanted = {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in inside} - {"blocks.1.mlp.fc2.weight"}
    assert narrowed == wanted | {"patch_embed.proj.weight"}


def test_a_network_that_would_give_other_numbers_is_left_alone() -> None:
    """A module that asks for its weight's type computes otherwise with another one, which is tried and undone."""

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3 * 96 * 96, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.lin(x.flatten(1))
            return y + (self.lin.weight.dtype == torch.bfloat16)

    model = Asking().requires_grad_(False)
    before = model.lin.weight.clone()
    narrow(model, torch.bfloat16, bf16)()
    assert torch.equal(model.lin.weight, before)
    narrow(model, torch.bfloat16, bf16)
    assert model.lin.weight.dtype == torch.float32


def test_a_full_disk_leaves_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is rounded away could not wait there."""
    model = built("lora[rank=2]", "vit")
    monkeypatch.setattr(machine, "free_bytes", lambda _: 1000)
    narrow(model, torch.bfloat16, nullcontext)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def trained(recipe: dict[str, Any], fails: bool = False) -> tuple[nn.Module, set[torch.dtype]]:
    """After four steps in bf16, and the types in which a frozen weight was while it trained; a loss of infinity ends it where it `fails`."""
    model, seen, x = built("lora[rank=2]", "vit"), set[torch.dtype](), families.batch("vit", 4).float()

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        seen.add(model.get_parameter("blocks.0.mlp.fc1.weight").dtype)
        return model(batch[0]).float().square().mean() * (float("inf") if fails else 1)

    chosen = Recipe(epochs=2, lr=1e-2, weight_decay=0.0, precision="bf16", device="cpu", **recipe)
    fit(Plan(model=model, loss=loss, batches=lambda _, start: [(x,)] * (2 - start), steps=2, recipe=chosen))
    return model, seen


@pytest.mark.parametrize("recipe", [{}, {"ema_decay": 0.5, "checkpointing": True}], ids=str)
def test_training_gives_the_same_network(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained with narrow weights or with wide ones every tensor is the same afterwards, bit for bit."""
    model, seen = trained(recipe)
    monkeypatch.setattr(loop, "narrow", lambda *_: lambda: None)
    plain, wide = trained(recipe)
    assert (seen, wide) == ({torch.bfloat16}, {torch.float32})
    after = plain.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in model.state_dict().items())


def test_weights_come_back_when_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is no number ends the training; the network has its bits all the same."""
    kept: list[nn.Module] = []
    build = families.build
    monkeypatch.setattr(families, "build", lambda *a, **k: kept.append(build(*a, **k)) or kept[-1])
    with pytest.raises(VtzooError, match="the loss is"):
        trained({}, fails=True)
    wanted = dict(build("vit", dtype=torch.float32).named_parameters())
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(kept[0].get_parameter(name), wanted[name])
