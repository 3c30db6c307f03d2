"""Dual encoders through the verbs: zero-shot, learned contexts, classes beyond those trained on, folds, merges and files without a text tower."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vtzoo.apart import apart
from vtzoo.artifact import go_live, open_ref
from vtzoo.backbone import build
from vtzoo.bases import file_fingerprint
from vtzoo.delta import Delta
from vtzoo.dual import ARCH
from vtzoo.errors import Mismatch, NotFound, UsageError
from vtzoo.live import attach
from vtzoo.spec import BackboneCard, Preprocess
from vtzoo.tensors import TensorFile
from vtzoo.verbs.distill import distill
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.sensitivity import sensitivity_of
from vtzoo.verbs.train import train
from vtzoo.verbs.zero_shot import zero_shot
from vtzoo.vocabulary import Naming
from vtzoo.zoo import Zoo

ARGS: dict[str, Any] = {
    "trunk": "vit_base_patch16_clip_224", "trunk_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "embed_dim": 24, "text": {"width": 32, "heads": 4, "layers": 2, "context_length": 20},
}  # fmt: skip
COLOURS = {"blue": "blue", "dark_red": "#800000", "green": "green", "yellow": "yellow"}
RECIPE: dict[str, Any] = {"epochs": 2, "batch_size": 8, "augment": "none", "warmup_epochs": 0}


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """A zoo with a tiny dual encoder at random, called `dual`."""
    made = Zoo.init(tmp_path / "zoo")
    torch.manual_seed(0)
    path = tmp_path / "dual.safetensors"
    save_file(timm.create_model(ARCH, **ARGS).state_dict(), path)
    card = BackboneCard(
        name="dual", arch=ARCH, source=f"object:{made.add_object(path)}", head=("clip_head",), model_args=ARGS,
        preprocess=Preprocess(input_size=(3, 32, 32)),
    )  # fmt: skip
    card = replace(card, fingerprint=file_fingerprint(path, card))
    made.put("backbones", "dual", card.json())
    return made


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Pictures of four colours."""
    for split, count in (("train", 8), ("val", 3), ("test", 4)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (32, 32), colour)
                image.paste("white", (i, i, i + 6 + len(split), i + 9))
                image.save(folder / f"{i}.png")
    return str(tmp_path / "data")


def trained(zoo: Zoo, data: str, method: str, name: str = "t/m", **recipe: Any) -> Path:
    """Train, and give the delta's file."""
    return Path(train(backbone="dual", data=data, method=method, name=name, zoo=zoo, recipe={**RECIPE, **recipe}).path)


def test_zero_shot_needs_no_images(zoo: Zoo) -> None:
    """Names and templates alone make a delta, which keeps both, a head of one layer, and no other tensor."""
    made = zero_shot(
        backbone="dual", name="t/zs", classes=["a_b", "c"], words={"c": "see"}, templates=["x {}", "the {}"], zoo=zoo
    )
    delta = Delta.open(Path(made.path))
    task = delta.task()
    assert (task.classes, task.words, task.templates) == (("a_b", "c"), ("a b", "see"), ("x {}", "the {}"))
    assert sorted(delta.tensors) == ["@head/t/clip_head.bias", "@head/t/clip_head.weight"]


def test_a_bare_dual_encoder_is_measured_by_names(zoo: Zoo, data: str) -> None:
    """`eval` of the backbone says what `zero-shot` says, and what the same delta says afterwards."""
    kept = zero_shot(backbone="dual", name="t/zs", data=data, zoo=zoo).metrics["test"]
    bare = evaluate(ref="dual", data=data, zoo=zoo).metrics["zero-shot"]
    again = evaluate(ref="t/zs", data=data, zoo=zoo).metrics["t"]
    for found in (bare, again):
        assert found["loss"] == pytest.approx(kept["loss"], abs=1e-4)
        assert found["images"] == 16
    with pytest.raises(UsageError, match="has no text tower"):
        zero_shot(backbone="vit_embedded_64", name="t/no", data=data, zoo=zoo)


@pytest.mark.parametrize("method", ["coop", "lora[rank=2,targets=qkv|text.qkv]+coop[init=,context=3,position=middle]"])
def test_what_was_trained_needs_no_text_tower(zoo: Zoo, data: str, method: str, tmp_path: Path) -> None:
    """Predicting loads the image tower alone, a fold is it and a linear head, and both are what the text tower says."""
    path = trained(zoo, data, method)
    artifact, x = open_ref(str(path), zoo), torch.randn(4, 3, 32, 32)
    plain, whole = go_live(artifact), go_live(artifact, whole=True)
    assert plain.model.text is None
    assert whole.model.text is not None
    with torch.no_grad():
        assert torch.allclose(plain.model(x), whole.model(x), rtol=1e-5, atol=1e-6)
    report = fold_ref(ref="t/m", out=tmp_path / "plain", zoo=zoo).report
    assert report["max_rel"] < 1e-6
    assert not [n for n in TensorFile(tmp_path / "plain" / "model.safetensors") if n.startswith(("text.", "logit_"))]
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["architecture"] == ARCH
    assert config["model_args"]["text"] is False
    with torch.no_grad():
        loaded = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
        assert torch.allclose(loaded(x), whole.model(x), rtol=1e-5, atol=1e-6)


def test_an_onnx_file_has_no_text_tower(zoo: Zoo, data: str, tmp_path: Path) -> None:
    """A folded CoOp classifier is verified with onnxruntime, and none of its numbers are the text tower's."""
    trained(zoo, data, "coop")
    out = tmp_path / "coop.onnx"
    report = export_onnx(ref="t/m", out=out, zoo=zoo).report
    assert report["folded"]
    assert report["max_rel"] < 1e-5
    numbers = sum(torch.Size(t.dims).numel() for t in onnx.load(out).graph.initializer)
    model = timm.create_model(ARCH, **{**ARGS, "text": False}, num_classes=len(COLOURS))
    assert numbers < 1.2 * sum(p.numel() for p in model.parameters())
    assert out.stat().st_size < 4 * 49408 * 32  # the token embedding alone


def test_merges_keep_what_the_texts_made(zoo: Zoo, data: str) -> None:
    """A merge of a zero-shot classifier, a context and LoRAs in both towers has every task's head, and the image tower's changes alone."""
    zero_shot(backbone="dual", name="zs/a", data=data, zoo=zoo)
    trained(zoo, data, "coop", "coop/a")
    trained(zoo, data, "lora[rank=2,targets=qkv|text.qkv]", "lora/a")
    merge_refs(refs=["zs/a", "coop/a", "lora/a"], method="linear", name="all", zoo=zoo)
    merged = open_ref("all", zoo)
    assert merged.delta is not None
    assert not [n for n in merged.delta.tensors if n.startswith("text.")]
    for name in ("zs", "coop", "lora"):
        alone = open_ref(f"{name}/a", zoo).delta
        assert alone is not None
        for key, value in alone.head(name).items():
            assert torch.equal(merged.delta.head(name)[key], value)
        evaluate(ref="all", data=data, task=name, zoo=zoo)


def test_base_to_new(zoo: Zoo, data: str) -> None:
    """Trained on the first half of the classes, a context is measured on both halves, and their harmonic mean is told."""
    trained(zoo, data, "coop", classes="base")
    found = evaluate(ref="t/m", data=data, zoo=zoo, base_to_new=True).metrics
    base, new = found["t"]["top1"], found["new classes"]["top1"]
    assert found["t"]["images"] == found["new classes"]["images"] == 8
    assert found["harmonic mean"]["top1"] == pytest.approx(2 * base * new / (base + new) if base * new else 0)
    trained(zoo, data, "coop", "t/all")
    with pytest.raises(Mismatch, match="knows the classes that are to be new to it"):
        evaluate(ref="t/all", data=data, zoo=zoo, base_to_new=True)
    with pytest.raises(UsageError, match="both halves are measured"):
        evaluate(ref="t/m", data=data, zoo=zoo, base_to_new=True, classes="new")


def test_other_classes_by_their_names(zoo: Zoo, data: str, tmp_path: Path) -> None:
    """A context says what it makes of the classes of other data; what has learned its own classes refuses."""
    other = tmp_path / "other" / "test"
    for name in ("red", "white", "black"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), name).save(other / name / "a.png")
    trained(zoo, data, "coop")
    found = evaluate(ref="t/m", data=str(other.parent), zoo=zoo, naming=Naming()).metrics["t"]
    assert found["images"] == 3
    with pytest.raises(Mismatch):
        evaluate(ref="t/m", data=str(other.parent), zoo=zoo)
    for name, method in (("t/own", "coop[per_class=true]"), ("t/linear", "linear")):
        trained(zoo, data, method, name)
        with pytest.raises(UsageError, match="has learned its own classes"):
            evaluate(ref=name, data=str(other.parent), zoo=zoo, naming=Naming())


def test_image_features_are_kept_where_only_texts_are_taught(zoo: Zoo, data: str) -> None:
    """The image tower runs once for each image, and what is trained is bit for bit what it is without that."""
    first = dict(Delta.open(trained(zoo, data, "coop", epochs=4)).tensors)
    assert list((zoo.root / ".vtzoo" / "features").iterdir())
    again = dict(Delta.open(trained(zoo, data, "coop", "t/off", epochs=4, cache="off")).tensors)
    assert torch.equal(first["text.token_embedding.coop.context"], again["text.token_embedding.coop.context"])


def test_names_are_of_no_use_to_other_backbones(zoo: Zoo, data: str) -> None:
    """They are refused where no text tower hears them."""
    with pytest.raises(UsageError, match="no text tower to tell names"):
        train(backbone="vit_embedded_64", data=data, name="t/x", zoo=zoo, templates=["a {}."], recipe=RECIPE)


@pytest.mark.parametrize(
    "method",
    ["task-residual", "ape", *(pytest.param(m, marks=pytest.mark.slow) for m in ("clip-adapter", "tip-adapter-f"))],
)
def test_classifiers_on_features_need_no_text_tower(zoo: Zoo, data: str, method: str, tmp_path: Path) -> None:
    """What the texts said is in the delta's head: without the tower, and in onnxruntime, it says the same; a task residual as one layer."""
    artifact, x = open_ref(str(trained(zoo, data, method)), zoo), torch.randn(4, 3, 32, 32)
    plain, whole = go_live(artifact), go_live(artifact, whole=True)
    assert plain.model.text is None
    with torch.no_grad():
        assert torch.allclose(plain.model(x), whole.model(x), rtol=1e-5, atol=1e-5)
    report = export_onnx(ref="t/m", out=tmp_path / "m.onnx", zoo=zoo).report
    assert report["folded"] == (method == "task-residual")
    assert report["max_rel"] < 1e-5


def test_a_task_residual_starts_as_zero_shot(zoo: Zoo, data: str) -> None:
    """Before the first step it measures what zero-shot does; trained, it is merged with a zero-shot classifier, each a plain layer."""
    kept = zero_shot(backbone="dual", name="zs/a", data=data, zoo=zoo).metrics["test"]
    trained(zoo, data, "task-residual", "start/a", epochs=0)
    assert evaluate(ref="start/a", data=data, zoo=zoo).metrics["start"]["loss"] == pytest.approx(kept["loss"], abs=1e-4)
    trained(zoo, data, "task-residual", "residual/a")
    found = evaluate(ref="residual/a", data=data, zoo=zoo).metrics["residual"]
    merge_refs(refs=["zs/a", "residual/a"], method="linear", name="both", zoo=zoo)
    again = evaluate(ref="both", data=data, task="residual", zoo=zoo).metrics["residual"]
    assert again["loss"] == pytest.approx(found["loss"], abs=1e-4)


def test_names_of_all_classes_serve_each_half(zoo: Zoo, data: str) -> None:
    """One list of names is good for a training on half of the classes and for measuring both; names and templates are said of each half."""
    words = {"dark_red": "maroon", "yellow": "lemon"}
    train(
        backbone="dual",
        data=data,
        method="coop",
        name="t/m",
        zoo=zoo,
        recipe={**RECIPE, "classes": "base"},
        words=words,
    )
    assert Delta.open(open_ref("t/m", zoo).path or "").task().words == ("blue", "maroon")
    plain = evaluate(ref="t/m", data=data, zoo=zoo, base_to_new=True).metrics
    told = evaluate(ref="t/m", data=data, zoo=zoo, base_to_new=True, naming=Naming(words)).metrics
    assert told["t"]["loss"] == pytest.approx(plain["t"]["loss"], abs=1e-4)
    assert told["new classes"]["loss"] != pytest.approx(plain["new classes"]["loss"], abs=1e-4)
    odd = Naming(words, ["{} stuff {x}"])
    both = evaluate(ref="dual", data=data, zoo=zoo, base_to_new=True, naming=odd).metrics["new classes"]
    new = evaluate(ref="dual", data=data, zoo=zoo, classes="new", naming=odd).metrics["zero-shot"]
    assert both["loss"] == pytest.approx(new["loss"], abs=1e-4)
    with pytest.raises(UsageError, match="'red' has a name, and is no class here"):
        evaluate(ref="t/m", data=data, zoo=zoo, base_to_new=True, naming=Naming({"red": "red"}))


def test_an_open_vocabulary_has_the_deltas_own_names(zoo: Zoo, data: str) -> None:
    """Of a class that a delta knows its names are said again, and those of the task that is meant."""
    zero_shot(backbone="dual", name="a/zs", data=data, words={"blue": "sea"}, zoo=zoo)
    zero_shot(backbone="dual", name="b/zs", data=data, templates=["a drawing of a {}."], zoo=zoo)
    merge_refs(refs=["a/zs", "b/zs"], method="linear", name="both", zoo=zoo)
    for task in ("a", "b"):
        alone = evaluate(ref=f"{task}/zs", data=data, zoo=zoo).metrics[task]["loss"]
        found = evaluate(ref="both", data=data, task=task, zoo=zoo, naming=Naming()).metrics
        assert {name: m["loss"] for name, m in found.items()} == {
            name: pytest.approx(alone, abs=1e-4) for name in (task, f"{task}/zs (alone)")
        }
    with pytest.raises(NotFound, match="has 2 tasks"):
        evaluate(ref="both", data=data, zoo=zoo, naming=Naming())


def test_a_merge_has_no_learned_words_for_other_classes(zoo: Zoo, data: str) -> None:
    """Of a context a merge has the classifier alone, and refuses other classes rather than to name them without it."""
    trained(zoo, data, "coop", "t/coop")
    zero_shot(backbone="dual", name="zs/a", data=data, zoo=zoo)
    merge_refs(refs=["t/coop", "zs/a"], method="linear", name="both", zoo=zoo)
    with pytest.raises(UsageError, match="'both' has learned its own classes"):
        evaluate(ref="both", data=data, task="t", zoo=zoo, naming=Naming())


@pytest.mark.parametrize("method", ["cocoop", "lora[rank=2,targets=qkv|text.qkv]+coop"])
def test_without_a_classifier_nobody_asks_the_text_tower(zoo: Zoo, data: str, method: str, tmp_path: Path) -> None:
    """A headless fold gives the normalised features of the image tower as it is tuned, whatever the texts were taught."""
    path = trained(zoo, data, method)
    assert fold_ref(ref="t/m", out=tmp_path / "plain", headless=True, zoo=zoo).report["max_rel"] < 1e-6
    model, x = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    whole = build("dual", zoo=zoo, num_classes=3)
    attach(whole, path, task="")
    with torch.no_grad():
        assert torch.allclose(model(x), whole.forward_head(whole.forward_features(x), pre_logits=True), atol=1e-6)


@pytest.mark.parametrize("how", [{"method": "adamerging[steps=2]"}, {"method": "ties", "refit_heads": "expert"}])
def test_merges_that_look_at_images(zoo: Zoo, data: str, how: dict[str, Any]) -> None:
    """What a merge learns of images, or fits heads to, it learns of the image tower."""
    for name in ("a/m", "b/m"):
        trained(zoo, data, "lora[rank=2,targets=qkv|text.qkv]+coop", name)
    merge_refs(refs=["a/m", "b/m"], name="both", data=[data, data], zoo=zoo, **how)
    assert evaluate(ref="both", data=data, task="a", zoo=zoo).metrics["a"]["images"] == 16


def test_a_student_has_no_text_tower(zoo: Zoo, data: str) -> None:
    """A dual encoder as a student starts from its image tower's weights, and is kept as an image classifier."""
    trained(zoo, data, "coop")
    distill(teachers=["t/m"], student="dual", data=data, name="s", zoo=zoo, recipe={**RECIPE, "epochs": 1, "lr": 1e-9})
    student = open_ref("s", zoo)
    assert not [n for n in TensorFile(student.path or Path()) if n.startswith(("text.", "logit_"))]
    x, base = torch.randn(2, 3, 32, 32), build("dual", zoo=zoo)
    live = go_live(student).model
    with torch.no_grad():
        assert torch.allclose(live.forward_head(live.forward_features(x), pre_logits=True), base(x), atol=1e-4)


def test_layers_of_the_text_tower_depend_on_no_image(zoo: Zoo, data: str) -> None:
    """`sensitivity` tells of the image tower, the only one that images run through."""
    report = sensitivity_of(ref="dual", data=data, zoo=zoo).report
    assert report["sites"]
    assert all(s["score"] > 0 and not s["site"].startswith("text.") for s in report["sites"])


def test_several_labels_are_known_of_a_bare_dual_encoder(zoo: Zoo, data: str) -> None:
    """Nothing is tuned on images that may bear several labels, whether a delta says so or the images do."""
    for split in ("train", "val", "test"):
        rows = [f"{p.parent.name}/{p.name},{p.parent.name}|green" for p in sorted(Path(data, split).glob("*/*.png"))]
        Path(data, split, "metadata.csv").write_text("\n".join(["file_name,labels", *rows]), encoding="utf-8")
    with pytest.raises(UsageError, match="an image here has several"):
        evaluate(ref="dual", data=data, zoo=zoo, test_time="tpt[views=2]")


def test_a_fold_without_learned_words_builds_no_text_tower(
    zoo: Zoo, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing acts on the text tower it has nothing to prove, and open_clip is not needed."""
    zero_shot(backbone="dual", name="t/zs", data=data, zoo=zoo)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert fold_ref(ref="t/zs", out=tmp_path / "plain", zoo=zoo).report["max_rel"] < 1e-6
    with pytest.raises(UsageError, match="a text tower needs open_clip"):
        evaluate(ref="dual", data=data, zoo=zoo)


def test_contexts_are_compared_as_they_are_kept(zoo: Zoo, data: str) -> None:
    """`diff` of two contexts tells how far apart their vectors are, though neither changes the image tower."""
    for seed in (0, 1):
        trained(zoo, data, "coop", f"t/{seed}", seed=seed)
    found = apart(open_ref("t/0", zoo), open_ref("t/1", zoo))
    assert found.by == "tensors of the files"
    row = next(r for r in found.rows if r["tensor"] == "text.token_embedding.coop.context")
    assert row["difference"] > 0
