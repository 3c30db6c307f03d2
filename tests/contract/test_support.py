"""The support table is what is measured."""

import pytest
import yaml

from scripts import make_support
from tests import families
from vtzoo import registry

TABLE = yaml.safe_load(make_support.TARGET.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", registry.names("methods"))
def test_table_is_measured(method: str) -> None:
    """Each row of the table is what running the method on every family gives now."""
    measured = {f: make_support.measure(method, f) for f in families.names()}
    assert TABLE.get(method) == measured, "run: python scripts/make_support.py"


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
