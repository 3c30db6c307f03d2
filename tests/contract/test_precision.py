"""bf16 as training runs it (autocast over float32 weights): every method, where it fits."""

import pytest
import torch
from torch import Tensor, nn

from tests import families
from tests.contract.cases import METHODS, STILL, SUPPORT, WORKS, logits, relative
from vtzoo.attention import PlainAttention
from vtzoo.graft import hosts
from vtzoo.live import inject, trainable

PAIRS = [(m, f) for m in METHODS if m not in STILL for f in ("vit", "resnet", "swinv2") if SUPPORT[m][f] in WORKS]


def build(family: str) -> nn.Module:
    """A tiny backbone in float32."""
    return families.build(family, dtype=torch.float32)


def dtypes(model: nn.Module, names: list[str], x: Tensor) -> dict[str, torch.dtype]:
    """Of the tensors that some modules give under autocast."""
    found: dict[str, torch.dtype] = {}
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda _m, _x, y, n=n: found.update({n: y.dtype} if isinstance(y, Tensor) else {})
        )
        for n in names
    ]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), PlainAttention():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("spec", "family"), PAIRS)
def test_bf16_runs_and_trains(spec: str, family: str) -> None:
    """Grafts keep the types of what flows, the output is float32's up to rounding, and what is trained gets gradients."""
    x = families.batch(family).float()
    model = inject(build(family), spec, batches=families.labelled(family, dtype=torch.float32))
    expected = logits(model, x)
    names = [n for n, _ in hosts(model) if n]
    assert dtypes(model, names, x).items() <= dtypes(build(family), names, x).items()
    with torch.autocast("cpu", torch.bfloat16), PlainAttention():
        assert relative(expected, logits(model, x).float()) <= 0.1
        loss = model.train()(x).float().square().sum()
    loss.backward()
    grads = [p.grad for p in trainable(model).values() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)
