"""Many linear probes at once: each is what a training of its own gives, and the best is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import vtzoo
from vtzoo import talk
from vtzoo.delta import Delta
from vtzoo.errors import UsageError, VtzooError
from vtzoo.results import Trained
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

RECIPE: dict[str, Any] = {
    "epochs": 4,
    "limit": 60,
    "eval_limit": 40,
    "batch_size": 20,
    "warmup_epochs": 0.5,
    "image_size": 64,
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo with a tiny ViT and a tiny net whose head has two classifiers."""
    folder = tmp_path_factory.mktemp("probes")
    made = Zoo.init(folder / "zoo")
    torch.manual_seed(0)
    for name, arch in (("tiny", "test_vit"), ("two-heads", "deit_tiny_distilled_patch16_224")):
        save_file(timm.create_model(arch, num_classes=0).state_dict(), folder / f"{name}.safetensors")
        add_backbone(name=name, arch=arch, weights=folder / f"{name}.safetensors", zoo=made)
    return made


def run(zoo: Zoo, name: str, method: str, backbone: str = "tiny", **recipe: Any) -> Trained:
    """Train on the embedded garments."""
    return train(
        backbone=backbone,
        data="vtzoo:fashion",
        method=method,
        name=f"fashion/{name}",
        zoo=zoo,
        recipe={**RECIPE, **recipe},
    )


def tensors(made: Trained) -> dict[str, torch.Tensor]:
    """Of a delta."""
    return dict(Delta.open(Path(made.path)).tensors)


@pytest.mark.parametrize(
    "recipe",
    [{}, {"label_smoothing": 0.1, "clip_norm": 0.05, "augment": "none", "class_weights": "bag:3|coat:0.5"}],
    ids=["plain", "more"],
)
def test_each_probe_is_what_it_would_be_alone(zoo: Zoo, recipe: dict[str, Any]) -> None:
    """The best of six has the weights, the rate, the decay and the score of a training with these alone."""
    name = f"many-{len(recipe)}"
    made = run(zoo, name, "linear[lr=[1e-4,3e-2,3e-3],weight_decay=[0.0,10.0]]", **recipe)
    probes = made.metrics["probes"]
    assert [(p["lr"], p["weight_decay"]) for p in probes] == [
        (lr, decay) for lr in (1e-4, 3e-2, 3e-3) for decay in (0.0, 10.0)
    ]
    best = max(probes, key=lambda p: (p["top1"], -p["val_loss"]))
    assert (made.recipe["lr"], made.recipe["weight_decay"]) == (best["lr"], best["weight_decay"])
    assert made.method == "linear"
    alone = run(zoo, f"alone-{len(recipe)}", "linear", lr=best["lr"], weight_decay=best["weight_decay"], **recipe)
    found, wanted = tensors(made), tensors(alone)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-4, atol=1e-6) for n in wanted)
    assert best["top1"] == pytest.approx(made.metrics["val"]["top1"], abs=1e-4)
    assert best["val_loss"] == pytest.approx(made.metrics["val"]["loss"], abs=1e-4)
    assert Delta.open(Path(made.path)).lineage["composed_by"].startswith("linear[lr=")


def test_decays_alone_take_the_probes_rate(zoo: Zoo) -> None:
    """Where only decays are listed, the rate is the method's own, or --lr."""
    assert {p["lr"] for p in run(zoo, "decays", "linear[weight_decay=[0.0,0.1]]").metrics["probes"]} == {1e-2}
    assert {p["lr"] for p in run(zoo, "rate", "linear[weight_decay=[0.0,0.1]]", lr=2e-3).metrics["probes"]} == {2e-3}


@pytest.mark.parametrize(
    ("method", "recipe", "said"),
    [
        ("lora+linear[lr=[1e-3,1e-2]]", {}, "nothing but heads"),
        ("linear[lr=[1e-3,1e-2]]", {"patience": 2}, "no patience=2"),
        ("linear[lr=[1e-3,1e-2]]", {"ema_decay": 0.9, "mixup": 0.1}, "no ema_decay=0.9, mixup=0.1"),
        ("linear[lr=[1e-3,1e-2]]", {"augment": "crop"}, "on kept features"),
        ("linear[lr=[1e-3,1e-2]]", {"cache": "off"}, "cache=off keeps none"),
        ("linear[lr=[1e-3,-1]]", {}, "lr"),
    ],
)
def test_what_probes_can_not_do_together_is_refused(zoo: Zoo, method: str, recipe: dict[str, Any], said: str) -> None:
    """A stack, what a probe alone would do otherwise, views without number: refused before an image is computed."""
    with pytest.raises(UsageError, match=said) as refusal:
        run(zoo, "refused", method, **recipe)
    assert refusal.value.hint


def test_a_head_of_two_layers_is_refused(zoo: Zoo) -> None:
    """Probes need one linear layer that gives what the network gives."""
    with pytest.raises(UsageError, match="no single linear layer"):
        run(zoo, "refused", "linear[lr=[1e-3,1e-2]]", backbone="two-heads")


def test_the_chosen_probe_is_told(zoo: Zoo) -> None:
    """A line in the log and a word to who watches, as a training of its own gives for its last epoch."""
    told: list[Any] = []
    made = train(
        backbone="tiny", data="vtzoo:fashion", method="linear[lr=[1e-4,1e-2]]", name="fashion/told", zoo=zoo, recipe=RECIPE, watch=told.append
    )  # fmt: skip
    (path,) = (zoo.root / ".vtzoo" / "logs").glob("fashion--told*.jsonl")
    _, record = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert told == [record]
    assert (record["epoch"], record["lr"]) == (RECIPE["epochs"], made.recipe["lr"])
    assert record in [{"epoch": 4, **p} for p in made.metrics["probes"]]


def test_views_of_a_random_augmentation_will_do(zoo: Zoo) -> None:
    """With so many views told, random crops have features, too."""
    assert len(run(zoo, "crops", "linear[lr=[1e-3,1e-2]]", augment="crop", views=2).metrics["probes"]) == 2


def test_probes_that_could_not_be_stored_are_not_to_be_resumed(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of a fault after the training names the command that works, which --resume does not."""
    said: list[str] = []

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(talk, "say", said.append)
    monkeypatch.setattr(Zoo, "add_object", full)
    with pytest.raises(OSError, match="No space"):
        run(zoo, "full", "linear[lr=[1e-3,1e-2]]")
    assert said[-1].endswith("the same command trains once more, on the kept features")


def test_probes_that_diverge_never_win(zoo: Zoo) -> None:
    """A rate that is far too high leaves the others alone; where all are, it is said as of a single training."""
    made = run(zoo, "wild", "linear[lr=[3e38,1e-3]]", clip_norm=0.0)
    assert made.recipe["lr"] == 1e-3
    with pytest.raises(VtzooError, match="all 2 probes is no longer finite"):
        run(zoo, "wilder", "linear[lr=[1e38,3e38]]", clip_norm=0.0)


def test_a_network_has_one_head() -> None:
    """Many probes on a live network are refused, as is an empty list."""
    model = timm.create_model("test_vit", num_classes=3)
    for spec, said in (("linear[lr=[1,2]]", "many probes"), ("linear[lr=[]]", "a list is empty")):
        with pytest.raises(UsageError, match=said):
            vtzoo.inject(model, spec)
