"""Recipes by name: what they hold, and who overrules whom."""

from dataclasses import asdict, fields

import pytest

from vtzoo import knobs, registry
from vtzoo.errors import NotFound, UsageError
from vtzoo.presets import HEADS, PRESETS, preset
from vtzoo.recipe import Recipe, read

LORA, SSF, VPT = (
    ("lora", "parameter/weight"),
    ("ssf", "parameter/weight-and-bias"),
    ("vpt-deep", "prompt/vision-driven"),
)
FULL, LINEAR = ("full", "fine-tuning/full"), ("linear", HEADS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_says_what_it_is(name: str) -> None:
    """Each holds knobs that exist, with values that are allowed, and states source, pixels' normalisation and selection."""
    found = preset(name)
    assert isinstance(knobs.decode(Recipe, {**found.knobs, **found.heads}, name), Recipe)
    assert found.about
    assert found.source
    assert "own mean" in found.normalisation
    assert "last epoch" in found.selection
    assert bool(found.checkpoint) == (name != "default")
    assert found.knobs.get("patience", 0) == 0


def test_rates_are_of_methods_that_there_are() -> None:
    """A learning rate stands for a method, a group or a group's first word; a name that is none would never be used."""
    cards = registry.cards("methods")
    known = {c.name for c in cards} | {c.group for c in cards} | {c.group.partition("/")[0] for c in cards}
    assert all(set(p.rates) <= known for p in PRESETS.values())
    assert HEADS in {c.group for c in cards}


def test_default_is_no_recipe() -> None:
    """Without a name every knob is what the record says."""
    assert read({}, [LORA]) == read({"preset": "default"}, [LORA]) == Recipe()


def test_methods_choose_the_rate() -> None:
    """A method has the recipe's rate for it, a stack the lowest; where one has none, the methods' own defaults decide."""
    rates = {
        stack: read({"preset": "vtab"}, stack).lr for stack in ((LORA,), (SSF,), (VPT,), (SSF, LORA), (SSF, LINEAR))
    }
    assert list(rates.values()) == [1e-3, 1e-2, 1e-2, 1e-3, 1e-2]
    assert read({"preset": "vtab"}, [FULL]).lr is None
    assert read({"preset": "vtab"}, [FULL, LORA]).lr is None


def test_heads_alone_keep_the_backbone_still() -> None:
    """Where nothing but a head is trained a recipe brings no stochastic depth, so that the backbone need run but once."""
    assert read({"preset": "vtab"}, [LORA]).drop_path == 0.1
    assert read({"preset": "vtab"}, [LINEAR]).drop_path == 0
    assert read({"preset": "vtab", "drop_path": "0.1"}, [LINEAR]).drop_path == 0.1


def test_the_user_overrules_the_recipe() -> None:
    """What was set stands, text or value; the rest is the recipe's."""
    found = read({"preset": "few-shot", "shots": "4", "lr": 0.1}, [LORA])
    own = {"shots": 4, "lr": 0.1}
    assert {f.name: v for f in fields(Recipe) if (v := own.get(f.name))} == own
    assert asdict(found) == {**asdict(read({"preset": "few-shot"}, [LORA])), **own}


def test_an_unknown_name_is_refused() -> None:
    """It says which there are, and which one was probably meant."""
    with pytest.raises(NotFound) as refused:
        read({"preset": "vtb"}, [LORA])
    assert refused.value.hint == f"did you mean vtab? known: {', '.join(sorted(PRESETS))}"
    with pytest.raises(NotFound, match="'vtb'"):
        knobs.decode(Recipe, {"preset": "vtb"}, "a sweep's recipe")
    with pytest.raises(UsageError, match="no knob 'epoch'"):
        read({"preset": "vtab", "epoch": 3}, [LORA])
