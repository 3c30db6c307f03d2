"""Every hostile file is refused with the exit code that is documented, in two lines; nothing beside the zoo is touched; memory stays bounded.

`tests/hostile/run.py` types the command lines; the cases stand in `light.py` (before torch) and `heavy.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import light

ROOT = Path(__file__).parents[2]
LEAST, MEMORY_BYTES, SECONDS = 120, 300 * 10**6, 20


def _run(kind: str, folder: Path) -> dict[str, dict[str, Any]]:
    line = [sys.executable, str(Path(__file__).with_name("run.py")), kind, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, cwd=folder.parent)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return {row["name"]: row for row in map(json.loads, ran.stdout.splitlines())}


@pytest.fixture(scope="module")
def lightly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of the cases that need no torch."""
    return _run("light", tmp_path_factory.mktemp("light") / "cases")


@pytest.fixture(scope="module")
def heavily(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of the others."""
    return _run("heavy", tmp_path_factory.mktemp("heavy") / "cases")


def _check(rows: dict[str, dict[str, Any]], name: str, code: int) -> None:
    row = rows[name]
    assert row["code"] == code, (row["code"], row["err"])
    assert [line.partition(":")[0] for line in row["err"].splitlines()][-2:] == ["error", "hint"]
    assert row["err"].replace("\n", "").isprintable()
    assert len(row["err"]) < 1200
    assert row["same"]
    assert not row["left"]
    assert not row["sprung"]
    assert row["more"] < MEMORY_BYTES
    assert row["seconds"] < SECONDS


@pytest.mark.parametrize("name", light.CASES)
def test_refused_before_torch_is_loaded(lightly: dict[str, dict[str, Any]], name: str) -> None:
    """The documented exit code and two printable lines; the whole process stays below 300 MB, and what lies beside the zoo as it was."""
    _check(lightly, name, light.CASES[name].code)
    assert lightly[name]["peak"] < MEMORY_BYTES


def test_refused_by_what_runs_models(heavily: dict[str, dict[str, Any]]) -> None:
    """The same of deltas, models, exported files, pickles, adapters and zip files; a case takes less than 300 MB more than torch itself."""
    for name, row in heavily.items():
        try:
            _check(heavily, name, row["wanted"])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.slow
def test_pickles_run_nothing(tmp_path: Path) -> None:
    """With --from-pickle, too, what would run something, take memory without end or is no tensor is refused."""
    rows = _run("pickled", tmp_path / "cases")
    for name, row in rows.items():
        try:
            _check(rows, name, row["wanted"])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_the_corpus_is_large(
    lightly: dict[str, dict[str, Any]], heavily: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """At least 120 cases; how many of each kind there are is printed."""
    kinds: dict[str, int] = {}
    for name in (*lightly, *heavily):
        kinds[name.partition(":")[0]] = kinds.get(name.partition(":")[0], 0) + 1
    peak, more = max(r["peak"] for r in lightly.values()), max(r["more"] for r in heavily.values())
    with capsys.disabled():
        print(f"\nhostile cases: {sum(kinds.values())} ({', '.join(f'{n} {k}' for k, n in kinds.items())})")
        print(f"most memory: {peak / 1e6:.0f} MB in all without torch, {more / 1e6:.0f} MB beside torch")
    assert sum(kinds.values()) >= LEAST
