"""DoRA on weights with rows that have no direction, as EfficientNet-Lite0's depthwise kernels have."""

import pytest
import torch

from tests import families
from tests.contract.cases import relative
from vtzoo.folding import fold
from vtzoo.graft import tensors_of
from vtzoo.live import extract, inject


def test_an_empty_row_stays_undivided_in_a_stack() -> None:
    """What an earlier part adds to a row of zeros, however little, is not stretched to length 1; the fold agrees."""
    model, x = families.build("vit"), families.batch("vit")
    model.blocks[0].mlp.fc1.weight.data[3:8] = 0
    base = {n: t.clone() for n, t in model.state_dict().items()}
    inject(model, "lora[rank=2,targets=fc1]+lora[rank=2,dora=true,targets=fc1]").eval()
    tensors = tensors_of(model)
    with torch.no_grad():
        before = model(x)
        tensors["blocks.0.mlp.fc1.lora.B"].add_(1e-9)
        assert 0 < relative(before, model(x)) < 1e-6
    families.perturb(tensors)
    plain = families.build("vit")
    plain.load_state_dict(dict(fold(base, extract(model), task="task", check=False)))
    with torch.no_grad():
        assert relative(model(x), plain.eval()(x)) < 1e-12


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("row", [0.0, 1e-25])
def test_rows_of_zeros(init: str, row: float) -> None:
    """It starts as the backbone, is finite, alive in that row, and folds."""
    model, x = families.build("vit"), families.batch("vit")
    model.blocks[0].mlp.fc1.weight.data[3] *= row
    base = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        bare = model.eval()(x)
    inject(model, f"lora[rank=2,dora=true,init={init},targets=fc1]").eval()
    with torch.no_grad():
        assert relative(bare, model(x)) < 1e-12
    tensors = tensors_of(model)
    families.perturb(tensors)
    out = model(x)
    out.square().sum().backward()
    m = tensors["blocks.0.mlp.fc1.lora.m"]
    assert m.grad is not None
    assert m.grad.isfinite().all()
    assert m.grad[3] != 0
    plain = families.build("vit")
    plain.load_state_dict(dict(fold(base, extract(model), task="task", check=False)))
    with torch.no_grad():
        assert relative(out.detach(), plain.eval()(x)) < 1e-12
