"""The README's Python, run as it stands."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from vtzoo import knobs, registry
from vtzoo_cli._app import build

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs" / "guides").glob("*.md"))]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build, inject, extract, save and attach: the model that comes back computes what the trained one did."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("...", "torch.nn.init.normal_(model.classifier.weight)"), {"torch": torch}, names)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(names["again"](x), names["model"].eval()(x))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_real(page: Path) -> None:
    """Every command line shown names a command and options that exist, and every method knobs that it has."""
    lines = re.findall(r"^\$ (vtzoo .*?)(?: {2,}#.*)?$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert lines
    for line in lines:
        command, words = typer.main.get_command(build()), shlex.split(line)[1:]
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        assert not hasattr(command, "commands"), line
        known = {o for p in command.params for o in p.opts}
        assert {w for w in words if w.startswith("-")} <= known, line
        specs = [words[i + 1] for i, w in enumerate(words) if w == "--method" and line.startswith("vtzoo train")]
        for part in (p for spec in specs for p in knobs.parse(spec)):
            knobs.decode(registry.load("methods", part.name).Config, part.knobs, part.name)
