"""The README's Python, run as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build, inject, extract, save and attach: the model that comes back computes what the trained one did."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("...", "torch.nn.init.normal_(model.classifier.weight)"), {"torch": torch}, names)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(names["again"](x), names["model"].eval()(x))
