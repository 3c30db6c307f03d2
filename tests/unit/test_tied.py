"""Tensors of several names: CoaT's blocks share their convolutions."""

import pytest
import timm
import torch
from torch import nn

import vtzoo
from tests import families
from vtzoo.delta import Delta
from vtzoo.fingerprint import fingerprint_of
from vtzoo.folding import fold, task_vector
from vtzoo.graft import tensors_of
from vtzoo.live import attach, extract, inject
from vtzoo.tied import aliases

X = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def coat() -> nn.Module:
    """A small CoaT whose weights are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("coat_lite_tiny", num_classes=3, img_size=64).double().eval()


def made(spec: str) -> tuple[Delta, torch.Tensor]:
    """A delta, and what the network gives with it."""
    model = inject(coat(), spec)
    families.perturb(tensors_of(model))
    with torch.no_grad():
        return extract(model.eval(), task=spec.partition("[")[0], classes=("a", "b", "c")), model(X)


def test_names_of_one_tensor() -> None:
    """Each further name is told under the first; most networks have none."""
    found = aliases(coat())
    assert "serial_blocks1.0.cpe.proj.weight" in found["cpe1.proj.weight"]
    assert not aliases(families.build("vit"))


@pytest.mark.parametrize("spec", ["ssf", "bitfit", "full", "lora[targets=conv]", "ssf+lora"])
@torch.no_grad()
def test_a_fold_writes_every_name(spec: str) -> None:
    """Loaded by a plain network it gives what the delta gives attached, and the fingerprint is the bare network's."""
    delta, wanted = made(spec)
    assert delta.backbone.fingerprint == fingerprint_of(coat())
    plain = coat()
    plain.load_state_dict(dict(fold(coat().state_dict(), delta)))
    assert torch.allclose(plain(X), wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(coat()(X), wanted, rtol=1e-4)


@torch.no_grad()
def test_a_merge_counts_them_once() -> None:
    """Its task vectors have first names alone; attached and folded the merge is one function."""
    base, deltas = coat().state_dict(), [made("ssf")[0], made("bitfit")[0]]
    assert not {n for more in aliases(coat()).values() for n in more} & set(task_vector(base, deltas[0]))
    merged = vtzoo.merge(deltas, "task-arithmetic[scale=0.5]", base=base)
    plain = coat()
    plain.load_state_dict(dict(fold(base, merged, task="ssf")))
    assert torch.allclose(plain(X), attach(coat(), merged, task="ssf")(X), rtol=1e-6, atol=1e-9)
