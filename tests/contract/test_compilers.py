"""torch.compile, torch.export and activation checkpointing of a model with a delta: once per family with lora, per method once.

`make test` compiles lora on a few families only.
"""

import pytest
import torch

from tests import families
from tests.contract.cases import (
    A_FEW,
    FAMILIES,
    METHODS,
    STILL,
    SUPPORT,
    WORKS,
    bare,
    case,
    home,
    logits,
    marked,
    perturbed,
    relative,
)
from vtzoo.errors import UsageError
from vtzoo.graft import tensors_of
from vtzoo.live import attach

PAIRS = [marked("lora", f, f in A_FEW) for f in FAMILIES if SUPPORT["lora"][f] in WORKS]
PAIRS += [marked(m, home(m)) for m in METHODS if m != "lora"]
PAIRS += [marked("lora+ssf+bitfit", "beit")]
AGAIN = [marked(m, f) for m in ("convpass", "mona") for f in ("swin", "pvt")]
ALONG = ("dtl", "lst", "vit-adapter")  # side networks that blocks hand on: a block alone can't be computed again


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Each compilation starts from nothing."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("spec", "family"), PAIRS)
def test_compile_gives_the_same(spec: str, family: str, backend: str) -> None:
    """torch.compile (one graph) of the attached model gives the attached output; autograd is traced, too, in test-all alone, since that takes longer."""
    made = case(spec, family)
    model = attach(bare(family), made.delta)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert relative(made.live, logits(compiled, made.x)) <= 1e-12


@pytest.mark.parametrize(("spec", "family"), PAIRS)
def test_export_gives_the_same(spec: str, family: str) -> None:
    """torch.export of the attached model, with a dynamic batch, gives the attached output at another batch size."""
    made = case(spec, family)
    model = attach(bare(family), made.delta)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (families.batch(family, 3),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        assert relative(made.live, program.module()(made.x)) <= 1e-12


@pytest.mark.parametrize(("spec", "family"), [p for p in PAIRS if p.values[0] not in (*ALONG, *STILL)] + AGAIN)
def test_recomputed_blocks_have_the_same_gradients(spec: str, family: str) -> None:
    """With activation checkpointing every tensor's gradient is the same, dropout included."""
    grads = []
    for again in (False, True):
        model = perturbed(spec, family)
        model.set_grad_checkpointing(again)
        torch.manual_seed(0)
        model.train()(families.batch(family)).sum().backward()
        grads.append({n: p.grad for n, p in tensors_of(model).items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(g, grads[1][n], rtol=1e-9, atol=1e-12) for n, g in grads[0].items())


@pytest.mark.parametrize("spec", ALONG)
def test_networks_along_the_blocks_refuse_to_be_recomputed(spec: str) -> None:
    """The error says what to switch off."""
    model = perturbed(spec, "vit")
    model.set_grad_checkpointing()
    with pytest.raises(UsageError, match="called by itself") as caught:
        model.train()(families.batch("vit")).sum().backward()
    assert "checkpointing off" in (caught.value.hint or "")


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    """The default compiler, which generates code, gives the attached output of a stack too."""
    made = case("lora+ssf+bitfit", "vit")
    compiled = torch.compile(attach(bare("vit"), made.delta))
    assert relative(made.live, logits(compiled, made.x)) <= 1e-10
