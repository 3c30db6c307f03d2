"""Recipes from the name to the artifact: what a delta keeps of them, what they change, and that they resume exactly."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from vtzoo import data as D
from vtzoo import talk
from vtzoo.delta import Delta
from vtzoo.errors import Interrupted, UsageError
from vtzoo.results import Trained
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

SMALL: dict[str, Any] = {"epochs": 2, "limit": 40, "batch_size": 20, "image_size": 64, "eval_limit": 30}


def run(zoo: Zoo, name: str, method: str = "lora[rank=2]", *, resume: bool = False, **recipe: Any) -> Trained:
    """Train on the embedded garments."""
    asked = {**SMALL, **recipe}
    return train(backbone="tiny", data="vtzoo:fashion", method=method, name=name, zoo=zoo, recipe=asked, resume=resume)


def tensors(made: Trained) -> dict[str, torch.Tensor]:
    """Of a delta."""
    return dict(Delta.open(Path(made.path)).tensors)


def test_a_delta_keeps_its_recipe(zoo: Zoo, said: list[str]) -> None:
    """The header names the recipe and has its knobs and framing; the backbone's facts say nothing of how it was trained."""
    made = run(zoo, "fashion/a", preset="vtab")
    delta = Delta.open(Path(made.path))
    assert {k: delta.recipe[k] for k in ("preset", "lr", "drop_path", "epochs")} == {
        "preset": "vtab", "lr": 1e-3, "drop_path": 0.1, "epochs": 2,
    }  # fmt: skip
    assert (delta.task().preprocess.crop_mode, delta.task().preprocess.crop_pct) == ("squash", 1.0)
    assert "drop_path_rate" not in delta.backbone.model_args
    assert (
        "recipe vtab is published for vit_base_patch16_224.orig_in21k; on tiny its numbers are not to be compared"
        in said
    )
    whole = run(zoo, "fashion/b", preset="vtab", eval_limit=0).metrics["val"]
    found = evaluate(ref="fashion/a", data="vtzoo:fashion", split="val", zoo=zoo).metrics["fashion"]
    assert found["top1"] == pytest.approx(whole["top1"], abs=1e-4)


def test_the_default_recipe_is_the_same_training(zoo: Zoo, said: list[str]) -> None:
    """Its name changes nothing, not even the digest."""
    assert run(zoo, "fashion/a").digest == run(zoo, "fashion/b", preset="default").digest
    assert not any("published" in line for line in said)


def test_a_whole_picture_is_seen(zoo: Zoo) -> None:
    """squash shows the picture from edge to edge, whatever the checkpoint crops; so trained numbers differ."""
    own, squashed = (tensors(run(zoo, f"fashion/{f}", "linear", framing=f)) for f in ("own", "squash"))
    assert not torch.equal(own["@head/fashion/head.weight"], squashed["@head/fashion/head.weight"])


def test_every_new_knob_resumes_exactly(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Balanced epochs, weights, folds, rates by depth and stochastic depth: stopped in an epoch and resumed, the same digest."""
    recipe: dict[str, Any] = {
        "sampling": "balanced", "class_weights": "balanced", "folds": 3, "fold": 1, "shots": 5, "layer_decay": 0.7, "drop_path": 0.2,
        "epochs": 3,
    }  # fmt: skip
    whole = run(zoo, "fashion/a", **recipe)
    track = talk.track

    def pressed(steps: Any, what: str, count: int) -> Any:
        for i, step in enumerate(track(steps, what, count)):
            if what.startswith("epoch 2") and i == 1:
                signal.raise_signal(signal.SIGINT)
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(talk, "track", pressed)
        with pytest.raises(Interrupted, match="in epoch 2"):
            run(zoo, "fashion/b", **recipe)
    assert run(zoo, "fashion/b", resume=True, **recipe).digest == whole.digest


def test_a_knob_acts(zoo: Zoo) -> None:
    """Another way to sample, stochastic depth and slower low layers each give another delta."""
    knobs: list[dict[str, Any]] = [{}, {"sampling": "balanced"}, {"drop_path": 0.5}, {"layer_decay": 0.5}]
    found = [tensors(run(zoo, f"fashion/{i}", epochs=1, limit=33, **k)) for i, k in enumerate(knobs)]
    name = next(n for n in found[0] if n.endswith(".B"))
    assert not any(torch.equal(found[0][name], other[name]) for other in found[1:])


def test_a_class_without_weight_is_not_learned(zoo: Zoo) -> None:
    """Where a single class counts, it is all that is ever predicted."""
    classes = D.open_data("vtzoo:fashion", split="train").classes
    silent = "|".join(f"{c}:0" for c in classes[1:])
    run(zoo, "fashion/a", "linear", class_weights=silent, lr=0.1, epochs=5)
    confusion = evaluate(ref="fashion/a", data="vtzoo:fashion", split="val", zoo=zoo).metrics["fashion"]["confusion"]
    assert all(sum(row[1:]) == 0 for row in confusion)


def test_balanced_epochs_on_kept_features(zoo: Zoo, said: list[str]) -> None:
    """The same images come in the same order from the features as from the images themselves."""
    kept, plain = (run(zoo, f"fashion/{c}", "linear", sampling="balanced", cache=c, epochs=6) for c in ("auto", "off"))
    assert any(line.startswith("all before head") for line in said)
    ours, theirs = tensors(kept), tensors(plain)
    assert all(torch.allclose(ours[n], theirs[n], rtol=1e-5, atol=1e-6) for n in theirs)


def test_mixed_images_count_as_their_classes_do(zoo: Zoo) -> None:
    """Images that are mixed of two classes count by their shares of both: with all weights 2 as much as twice the images."""
    classes = D.open_data("vtzoo:fashion", split="train").classes
    recipe: dict[str, Any] = {
        "mixup": 0.5,
        "optimizer": "sgd",
        "clip_norm": 0.0,
        "weight_decay": 0.0,
        "label_smoothing": 0.1,
    }
    twice = "|".join(f"{c}:2" for c in classes)
    heavy = tensors(run(zoo, "fashion/a", "linear", lr=0.01, class_weights=twice, **recipe))
    quick = tensors(run(zoo, "fashion/b", "linear", lr=0.02, **recipe))
    assert all(torch.allclose(heavy[n], quick[n], rtol=1e-4, atol=1e-6) for n in quick)


def test_probes_together_under_a_recipe(zoo: Zoo) -> None:
    """What the probes say themselves stands over the recipe's weight decay; the rest is the recipe's."""
    made = run(zoo, "fashion/a", "linear[weight_decay=[0.0,0.1]]", preset="vtab")
    assert [p["weight_decay"] for p in made.metrics["probes"]] == [0.0, 0.1]
    assert made.recipe["warmup_epochs"] == 10


def test_probes_together_refuse_stochastic_depth(zoo: Zoo) -> None:
    """Probes that are trained side by side see kept features, which a random network doesn't have."""
    with pytest.raises(UsageError, match="drop_path"):
        run(zoo, "fashion/a", "linear[lr=[1e-3,1e-2]]", drop_path=0.1)


def test_only_what_is_asked_for_is_measured(zoo: Zoo) -> None:
    """A search leaves the test images alone; where nothing is chosen no time goes into validation; nothing at all is refused."""
    assert set(run(zoo, "t/val", "linear", eval_on="val").metrics) == {"seconds", "epochs", "val"}
    assert set(run(zoo, "t/test", "linear", eval_on="test").metrics) == {"seconds", "epochs", "test"}
    with pytest.raises(UsageError, match="is left to measure"):
        run(zoo, "t/none", "linear", eval_on="val", train_on="train+val")
    with pytest.raises(UsageError, match="patience looks at validation images"):
        run(zoo, "t/none", "linear", eval_on="test", patience=1)
    with pytest.raises(UsageError, match="chosen on validation images"):
        run(zoo, "t/none", "linear[lr=[1e-3,1e-2]]", eval_on="test")
