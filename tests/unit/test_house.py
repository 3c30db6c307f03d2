"""The sizes that DESIGN gives files and functions, and that a new method is one new file.

`VTZOO_SHOW=1 pytest tests/unit/test_house.py` prints the largest.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(p for d in ("vtzoo", "cli") for p in (ROOT / d).rglob("*.py"))
FILE_LINES, FUNCTION_LINES, MEDIAN_LINES = 400, 60, 10
TOY = '''"""Toy: add a trained number to a linear's bias (made for a test).

    b' = b + t

Shapes: one number.  Folds: exactly.  Identity at init: yes.  Parameters: 1 per site.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Before
from vtzoo.graft import Graft as Base

GROUP = "parameter/bias"
PAPER = "arXiv:2106.10199"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """None."""


class Graft(Base):
    """One number."""

    edits = ("bias",)
    calls = False

    def __init__(self, site: Site, config: Config) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(1))

    def read(self, name: str, before: Before) -> Tensor:
        return before[name] + self.t


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Every linear with a bias."""
    return [s for s in anatomy.linears if s.bias]
'''
USE = """
import timm, torch
from vtzoo import registry
from vtzoo.live import detach, inject, trainable
assert "toy" in registry.names("methods")
model = timm.create_model("test_vit", num_classes=3).eval()
x = torch.randn(1, 3, 160, 160)
bare = model(x)
inject(model, "toy+lora[rank=2]")
assert torch.equal(model(x), bare)
toy = [p for n, p in trainable(model).items() if n.endswith(".toy.t")]
model(x).sum().backward()
assert toy and all(p.grad is not None for p in toy)
torch.nn.init.ones_(toy[0])
assert not torch.equal(model(x), bare)
assert torch.equal(detach(model)(x), bare)
"""


def functions() -> dict[str, int]:
    """Lines of every function, its own inner ones included, by file and name."""
    found: dict[str, int] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    return found


def test_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """Files of 400 lines at the very most, functions of 60 with a median of 10."""
    files = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    lines = functions()
    if os.environ.get("VTZOO_SHOW"):
        with capsys.disabled():
            print(f"\n{len(files)} files, {sum(files.values())} lines, median {median(files.values())}")
            for name, size in sorted(files.items(), key=lambda i: -i[1])[:10]:
                print(f"{size:5} {name}")
            print(f"{len(lines)} functions, median {median(lines.values())}")
            for name, size in sorted(lines.items(), key=lambda i: -i[1])[:10]:
                print(f"{size:5} {name}")
    assert max(files.values()) <= FILE_LINES
    assert max(lines.values()) <= FUNCTION_LINES
    assert median(lines.values()) <= MEDIAN_LINES


def test_a_new_method_is_one_file(tmp_path: Path) -> None:
    """Dropped into the folder, a method is listed, stacks, trains and comes off; no other file is touched."""
    shutil.copytree(ROOT / "vtzoo", tmp_path / "vtzoo", ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    (tmp_path / "vtzoo" / "methods" / "toy.py").write_text(TOY)
    ran = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
