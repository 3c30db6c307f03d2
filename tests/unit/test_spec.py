"""spec.py: the records that files, index and code share."""

import json

from vtzoo.spec import BackboneCard, Preprocess, Task, plain

OWN = Preprocess(
    input_size=(3, 64, 48),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.1),
    interpolation="bilinear",
    crop_pct=0.9,
    crop_mode="squash",
)


def test_preprocess_reads_a_timm_config() -> None:
    """Known fields are taken, lists become tuples, None and unknown keys are passed over."""
    got = Preprocess.of({"input_size": [3, 64, 48], "mean": [0.5, 0.4, 0.3], "crop_pct": None, "url": "x"})
    assert got == Preprocess(input_size=(3, 64, 48), mean=(0.5, 0.4, 0.3))


def test_records_survive_json() -> None:
    """A task and a backbone come back equal from their JSON."""
    task = Task(name="t", classes=("a", "b"), preprocess=OWN)
    assert Task.of(json.loads(json.dumps(task.json()))) == task
    card = BackboneCard(
        name="n", arch="a", source="s", license="l", fingerprint="f", head=("h",), params=3, features=2, preprocess=OWN,
        model_args={"img_size": [64, 48]}, good_for="all",
    )  # fmt: skip
    facts = json.loads(json.dumps(card.json()))
    assert BackboneCard.of("n", facts) == card
    assert BackboneCard.of("n", {**facts, "someone": "else's"}) == card


def test_json_is_flat() -> None:
    """The name stands beside the record, preprocessing inside it, as the index and headers have it."""
    facts = BackboneCard(name="n", arch="a", preprocess=OWN).json()
    assert "name" not in facts
    assert facts["input_size"] == [3, 64, 48]
    assert Task(name="t", classes=("a",)).json()["interpolation"] == "bicubic"


def test_plain_goes_all_the_way_down() -> None:
    """Tuples become lists inside lists and mappings, keys become text."""
    assert plain({1: ({"a": (1, 2)},)}) == {"1": [{"a": [1, 2]}]}
