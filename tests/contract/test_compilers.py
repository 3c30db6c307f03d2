"""torch.compile and torch.export of a model with a delta on it: once per family with lora, once per method."""

import pytest
import torch

from tests import families
from tests.contract.cases import FAMILIES, METHODS, SUPPORT, WORKS, bare, case, logits, relative
from vtzoo.live import attach

PAIRS = [("lora", f) for f in FAMILIES if SUPPORT["lora"][f] in WORKS]
PAIRS += [(m, "vit" if SUPPORT[m]["vit"] in WORKS else "resnet") for m in METHODS if m != "lora"]
PAIRS += [("lora+ssf+bitfit", "beit")]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Each compilation starts from nothing."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("spec", "family"), PAIRS)
def test_compile_gives_the_same(spec: str, family: str) -> None:
    """torch.compile (aot_eager, one graph) of the attached model gives the attached output."""
    made = case(spec, family)
    model = attach(bare(family), made.delta)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
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


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    """The default compiler, which generates code, gives the attached output of a stack too."""
    made = case("lora+ssf+bitfit", "vit")
    compiled = torch.compile(attach(bare("vit"), made.delta))
    assert relative(made.live, logits(compiled, made.x)) <= 1e-10
