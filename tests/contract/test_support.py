"""The support table is what is measured."""

import pytest
import yaml

from scripts import make_support
from tests import families
from vtzoo import registry

PARTS = 4
"""`make test` measures a quarter of each row, another one for the next method; `make test-all` all of it."""
TABLE = yaml.safe_load(make_support.TARGET.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("method", "part"),
    [
        pytest.param(m, part, marks=() if part == i % PARTS else pytest.mark.slow)
        for i, m in enumerate(registry.names("methods"))
        for part in range(PARTS)
    ],
)
def test_table_is_measured(method: str, part: int) -> None:
    """Each row of the table is what running the method on every family gives now."""
    names = families.names()[part::PARTS]
    measured = {f: make_support.measure(method, f) for f in names}
    assert {f: TABLE.get(method, {}).get(f) for f in names} == measured, "run: python scripts/make_support.py"


def test_rows_have_every_family() -> None:
    """No row lacks a family, or has one that is gone."""
    assert all(sorted(row) == sorted(families.names()) for row in TABLE.values())


def test_table_is_canonical() -> None:
    """The file has the methods of the registry, no others, in the bytes that the script writes."""
    assert sorted(TABLE) == registry.names("methods")
    assert make_support.TARGET.read_text(encoding="utf-8") == make_support.dump(TABLE)


@pytest.mark.parametrize("method", registry.names("methods"))
def test_docstring_agrees_with_the_table(method: str) -> None:
    """A method whose "Folds:" line says it doesn't has no family on which it does, and the other way round."""
    line = registry.card("methods", method).folds.lower()
    cells = set(TABLE[method].values())
    assert ("folds" in cells) is not line.startswith("no")
    assert cells & {"folds", "live"}
