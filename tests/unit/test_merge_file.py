"""A merge written in YAML, ours and mergekit's."""

import pytest

from vtzoo.errors import UsageError
from vtzoo.merge_file import Asked, read

OURS = """
method: ties[density=0.2]
name: both
layers: blocks.0-5:0.3
deltas:
  - fashion/lora
  - ref: emoji/ssf
    coef: 0.5
"""
THEIRS = """
merge_method: ties
base_model: ./base
dtype: float32
models:
  - model: ./base
  - model: fashion/lora
    parameters: {weight: 1.0}
  - model: emoji/ssf
    parameters: {weight: 0.5}
parameters: {density: 0.2, lambda: 0.7}
"""


def test_our_own() -> None:
    """Names or mappings, in order; what isn't said has its usual value."""
    assert read(OURS, "m.yaml") == Asked(
        refs=("fashion/lora", "emoji/ssf"),
        method="ties[density=0.2]",
        coef=(1.0, 0.5),
        layers="blocks.0-5:0.3",
        name="both",
    )
    asked = read("{method: regmean, deltas: [{ref: a, data: vtzoo:fashion}, {ref: b, data: ./b}]}", "m.yaml")
    assert asked.data == ("vtzoo:fashion", "./b")


def test_mergekits() -> None:
    """Its words for our knobs; TIES trims tensor by tensor there, with the density and lambda of 1 where none is given."""
    asked = read(THEIRS, "m.yaml")
    assert asked == Asked(
        refs=("fashion/lora", "emoji/ssf"), method="ties[scope=tensor,scale=0.7,density=0.2]", coef=(1.0, 0.5)
    )
    assert (
        read("{merge_method: task_arithmetic, models: [{model: a}, {model: b}]}", "m").method
        == "task-arithmetic[scale=1]"
    )
    assert read("{merge_method: model_stock, models: [{model: a}, {model: b}]}", "m").coef is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: [", "no YAML"),
        ("{method: regmean, deltas: [{ref: a, data: ./a}, b]}", "b has no data: and others have"),
        ("- a", "no mapping"),
        ("{method: ties, refs: [a]}", "no knob 'refs'"),
        ("{method: ties}", "deltas"),
        ("{method: ties, deltas: [1]}", "is no delta"),
        ("{method: ties, deltas: [{ref: a, weight: 1}]}", "no knob 'weight'"),
        (THEIRS.replace("ties", "dare_ties"), "mergekit's 'dare_ties' is not the same here"),
        ("{merge_method: ties}", "no list of models"),
        ("{merge_method: ties, models: [a, {model: b}]}", "no list of models"),
        (THEIRS.replace("dtype", "tokenizer_source"), "'tokenizer_source' has no meaning"),
        (THEIRS.replace("weight: 0.5", "weight: [0.1, 0.5]"), "weight is given by layer"),
        (THEIRS.replace("weight: 0.5", "density: 0.5"), "density differs"),
        (THEIRS.replace("lambda: 0.7", "normalize: false"), "normalize: false is not how ties"),
        (THEIRS.replace("lambda: 0.7", "gamma: 0.7"), "ties has no 'gamma' here"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    """Each with the file's name, and what to write instead."""
    with pytest.raises(UsageError, match=r"m\.yaml") as caught:
        read(text, "m.yaml")
    assert said in str(caught.value)
    assert caught.value.hint
