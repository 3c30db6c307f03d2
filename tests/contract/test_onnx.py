"""An attached delta as ONNX computes what it computes in torch, at every batch size.

`make test` translates a few pairs; `make test-all` every method on a family, and the basic methods on every family.
"""

import pytest
import torch

from tests import families
from tests.contract.cases import BASIC, FAMILIES, METHODS, SUPPORT, WORKS, case, home, marked
from vtzoo.errors import NotExportable
from vtzoo.live import attach
from vtzoo.onnx.convert import OPSET, convert
from vtzoo.onnx.describe import Description, written
from vtzoo.onnx.half import halved
from vtzoo.onnx.run import Runtime, session
from vtzoo.onnx.seal import seal
from vtzoo.onnx.verify import differences, judge
from vtzoo.spec import Preprocess

QUICK = {("lora", "beit"), ("vpt-deep", "vit"), ("adapter", "convnext")}
SOLVING = ("boft", "oft")
"""What solves equations in its forward pass, for which ONNX has no operator; folded these are plain weights."""
PAIRS = sorted(
    {(m, f) for m in BASIC for f in FAMILIES if SUPPORT[m].get(f) in WORKS}
    | {(m, home(m)) for m in METHODS if m not in SOLVING}
    | QUICK
)


@pytest.mark.parametrize(("spec", "family"), [marked(s, f, (s, f) in QUICK) for s, f in PAIRS])
def test_onnx_gives_the_same(spec: str, family: str) -> None:
    """Batch sizes 1, 2 and 5 of random images, in float32."""
    model = attach(families.build(family), case(spec, family).delta).float()
    _same(model, family, OPSET)


@pytest.mark.parametrize("spec", SOLVING)
def test_what_onnx_has_no_operator_for_is_refused(spec: str) -> None:
    """Attached, in two lines with the exporter's reason; of the same delta folded nothing is refused."""
    delta = case(spec, "vit").delta
    with pytest.raises(NotExportable, match="linalg_solve"):
        convert(attach(families.build("vit"), delta).float(), (3, *families.FAMILIES["vit"].size))
    assert SUPPORT[spec]["vit"] == "folds"


@pytest.mark.slow
@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_operator_sets_give_the_same(family: str, opset: int) -> None:
    """The oldest and the newest on every bare family."""
    _same(families.build(family, dtype=torch.float32), family, opset)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_nearly_the_same(family: str) -> None:
    """float16 inside, on every bare family."""
    _same(families.build(family, dtype=torch.float32), family, OPSET, half=True)


def _same(model: torch.nn.Module, family: str, opset: int, *, half: bool = False) -> None:
    size = (3, *families.FAMILIES[family].size)
    shape = Preprocess(input_size=size)
    graph = convert(model, size, opset=opset)
    assert [o.version for o in graph.opset_import if o.domain == ""] == [opset]
    content = seal(halved(graph) if half else graph, written(Description(task=None, preprocess=shape)))
    runtime = Runtime(session(content), shape, embedded=False)
    batches = [families.batch(family, n, dtype=torch.float32) for n in (1, 2, 5)]
    judge(differences(model, runtime, batches), "float16" if half else "float32", 1e-3 if half else 1e-4, "")
