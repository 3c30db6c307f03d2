"""Classifiers that keep images, through the verbs: made without an epoch, searched and measured."""

from pathlib import Path

import pytest
import torch

from vtzoo.delta import Delta
from vtzoo.errors import UsageError
from vtzoo.methods._cache import SEARCHED, grid
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

RECIPE = {"shots": 3, "eval_limit": 40, "batch_size": 20, "image_size": 64, "epochs": 2}


def test_nothing_is_trained_and_all_is_kept(zoo: Zoo, said: list[str]) -> None:
    """No epoch is run, every training image is a key, and eval says what train measured."""
    made = train(
        backbone="tiny",
        data="vtzoo:fashion",
        method="ape",
        name="fashion/ape",
        zoo=zoo,
        recipe={**RECIPE, "eval_limit": 0},
    )
    assert (made.params, made.metrics["epochs"], made.recipe["epochs"]) == (0, 0, 0)
    assert "fashion/ape: ape on tiny, nothing to train, 30 images" in said
    delta = Delta.open(Path(made.path))
    assert torch.bincount(dict(delta.head("fashion"))["head.labels"]).tolist() == [3] * 10
    seen = evaluate(ref="fashion/ape", data="vtzoo:fashion", zoo=zoo).metrics["fashion"]
    assert seen["top1"] == pytest.approx(made.metrics["test"]["top1"])


def test_the_search_is_by_the_validation_images(zoo: Zoo, said: list[str]) -> None:
    """It says what it found, measures no fewer right than without, and keeps its numbers in the file; without validation images it is refused first."""
    found = {}
    for spec in ("tip-adapter-f", "tip-adapter-f[search=true]"):
        made = train(
            backbone="tiny", data="vtzoo:fashion", method=spec, name=f"fashion/{len(found)}", zoo=zoo, recipe=RECIPE
        )
        found[spec] = (made, dict(Delta.open(Path(made.path)).head("fashion")))
    (plain, own), (searched, other) = found.values()
    assert torch.equal(own["head.keys"], other["head.keys"])
    assert searched.metrics["val"]["top1"] >= plain.metrics["val"]["top1"]
    right = round(searched.metrics["val"]["top1"] * 40)
    assert [
        line.endswith(f": {right} of 40 validation images are right") for line in said if line.startswith("alpha")
    ] == [True]
    assert float(other["head.alpha"]) in [pytest.approx(alpha) for alpha in grid(*SEARCHED["alpha"])]
    assert (plain.metrics["epochs"], float(own["head.alpha"]), float(own["head.beta"])) == (2, 1.0, 5.5)
    with pytest.raises(UsageError, match="validation images"):
        train(
            backbone="tiny", data="vtzoo:fashion", method="tip-adapter[search=true]", name="fashion/none", zoo=zoo,
            recipe={**RECIPE, "eval_on": "test"},
        )  # fmt: skip


def test_a_dry_run_tells_what_would_be_kept(zoo: Zoo) -> None:
    """Of what trains nothing there are no steps to foretell; of keys that are trained it counts the numbers."""
    for spec, params in (("tip-adapter", 0), ("tip-adapter-f", 30 * 64)):
        told = train(
            backbone="tiny", data="vtzoo:fashion", method=spec, name="fashion/x", zoo=zoo, recipe=RECIPE, dry_run=True
        )
        assert told.params == params
        assert bool(told.plan) == bool(params)
