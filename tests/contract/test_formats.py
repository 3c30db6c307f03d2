"""Every family, and attached deltas, compute the same as PT2, OpenVINO and ExecuTorch, at every batch size.

`make test` translates a few; `make test-all` every family in each, and every method on one family in PT2 and OpenVINO.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests import families
from tests.contract.cases import FAMILIES, METHODS, case, home, marked
from vtzoo import formats
from vtzoo.errors import NotExportable
from vtzoo.live import attach
from vtzoo.onnx.describe import Description, written
from vtzoo.onnx.verify import differences, judge
from vtzoo.spec import Preprocess

FORMS = ("pt2", "openvino", "executorch")
QUICK = {("pt2", "swinv2"), ("openvino", "beit"), ("executorch", "resnet"), ("pt2", "lora"), ("openvino", "vpt-deep")}
SOLVING = ("boft", "oft")
"""What solves equations in its forward pass, for which OpenVINO's way through ONNX has no operator."""


@pytest.mark.parametrize(("form", "family"), [marked(f, x, (f, x) in QUICK) for f in FORMS for x in FAMILIES])
def test_a_family_gives_the_same(form: str, family: str, tmp_path: Path) -> None:
    """Batch sizes 1, 2 and 5 of random images, in float32."""
    _same(families.build(family, dtype=torch.float32), form, family, tmp_path)


@pytest.mark.parametrize(
    ("form", "spec"), [marked(f, m, (f, m) in QUICK) for f in ("pt2", "openvino") for m in METHODS]
)
def test_an_attached_delta_gives_the_same(form: str, spec: str, tmp_path: Path) -> None:
    """Of every method, on a ViT where it goes on one, else on a ResNet; what can't be translated is refused with the exporter's reason."""
    family = home(spec)
    model = attach(families.build(family), case(spec, family).delta).float()
    if form == "openvino" and spec in SOLVING:
        with pytest.raises(NotExportable, match="linalg_solve"):
            _same(model, form, family, tmp_path)
        return
    _same(model, form, family, tmp_path)


def _same(model: nn.Module, form: str, family: str, folder: Path) -> None:
    size = (3, *families.FAMILIES[family].size)
    shape = Preprocess(input_size=size)
    said = written(Description(task=None, preprocess=shape))
    content = formats.of(form).write(model, shape, size, said, embedded=False, dynamic_size=False)
    files = {suffix: folder / f"m{suffix}" for suffix in content}
    for suffix, data in content.items():
        files[suffix].write_bytes(data)
    runtime, description = formats.opened(form, files)
    assert description.preprocess == shape
    batches = [families.batch(family, n, dtype=torch.float32) for n in (1, 2, 5)]
    judge(differences(model, runtime, batches), "float32", 1e-4, "", form)
