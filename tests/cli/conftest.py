"""Running the program: in this process, where only output and exit code matter, or as a process of its own."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vtzoo.zoo import Zoo
from vtzoo_cli._main import main


@dataclass(frozen=True)
class Ran:
    """What one run left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What stands on stderr, by line."""
        return self.err.splitlines()


Run = Callable[..., Ran]


@pytest.fixture
def vtzoo(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> Ran:
        code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python source in a fresh process, with arguments."""

    def run(source: str, *words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", source, *words]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)

    return run


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """A zoo with one delta (of one tensor) and one folded model."""
    from vtzoo.files import safetensors_header

    made = Zoo.init(tmp_path / "zoo")
    facts = '{"schema": 1, "method": "lora[rank=2]", "tasks": [{"name": "pets", "classes": ["cat", "dog"]}]}'
    delta = made.add_object(safetensors_header([("a.lora.A", "F32", (2, 3))], {"vtzoo": facts}) + bytes(24))
    weights = made.add_object(safetensors_header([("w", "F16", (2,))], {}) + bytes(4))
    common = {"tasks": ["pets"], "metrics": {"val": {"top1": 0.5}, "test": {"top1": 0.75}}}
    method = {"digest": delta, "size_bytes": 2048, "method": "lora[rank=2]", "backbone": "tf_efficientnet_lite0"}
    folded = {"files": {"model.safetensors": weights}, "size_bytes": 3_500_000, "kind": "folded", "arch": "test_vit"}
    made.put("deltas", "pets/lora", {**method, **common})
    made.put("models", "pets/folded", {**folded, "tasks": ["pets"]})
    return made
