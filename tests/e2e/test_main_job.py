"""The main job on tiny networks and real images: every verb after the other, from one zoo."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file

from vtzoo import data as D
from vtzoo import talk
from vtzoo.artifact import go_live, open_ref
from vtzoo.delta import Delta
from vtzoo.errors import (
    Conflict,
    Corrupt,
    FoldError,
    Mismatch,
    NotFoldable,
    NotFound,
    Resources,
    UsageError,
    VtzooError,
)
from vtzoo.fit import checkpoint_path
from vtzoo.methods._supernet import Supernet
from vtzoo.verbs import fold as F
from vtzoo.verbs.add import add_backbone, add_delta
from vtzoo.verbs.distill import distill
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.export.safetensors import export_safetensors
from vtzoo.verbs.export.timm import export_timm
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.predict import predict
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

RECIPE = {"epochs": 2, "limit": 60, "batch_size": 20, "lr": 1e-3, "warmup_epochs": 0.5}
QUICK = {**RECIPE, "eval_limit": 40}
ARCH = "test_vit"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo with a tiny ViT, three deltas made by three methods on two tasks, and their merge."""
    root = tmp_path_factory.mktemp("zoo")
    made = Zoo.init(root / "zoo")
    torch.manual_seed(0)
    save_file(timm.create_model(ARCH, num_classes=0).state_dict(), root / "tiny.safetensors")
    add_backbone(name="tiny", arch=ARCH, weights=root / "tiny.safetensors", zoo=made)
    for name, method, recipe in (
        ("fashion/lora", "lora[rank=2]", RECIPE),
        ("emoji/ssf", "ssf", QUICK),
        ("fashion/vpt", "vpt-shallow[tokens=2]", QUICK),
    ):
        train(backbone="tiny", data=f"vtzoo:{name.split('/')[0]}", method=method, name=name, zoo=made, recipe=recipe)
    merge_refs(refs=["fashion/lora", "emoji/ssf"], method="linear", name="both", zoo=made)
    return made


@pytest.mark.parametrize(
    ("method", "asked", "rates"),
    [
        ("lora", {}, (2e-3, 1e-2)),
        ("lora", {"lr": 5e-4}, (5e-4, 5e-4)),
        ("lora", {"head_lr": 3e-3}, (2e-3, 3e-3)),
        ("mlp-head", {}, (3e-3, 3e-3)),
        ("lora+full", {}, (1e-4, 1e-2)),
    ],
)
def test_a_head_learns_at_the_probes_rate(zoo: Zoo, method: str, asked: dict[str, float], rates: object) -> None:
    """Unless a rate is asked for, or the method's head wants another."""
    plan = train(
        backbone="tiny", data="vtzoo:emoji", method=method, name="new/one", zoo=zoo, recipe=asked, dry_run=True
    )
    assert (plan.recipe["lr"], plan.recipe["head_lr"]) == rates


def test_a_fold_part_of_the_way_is_of_a_fold_that_is_right(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a factor the whole fold is compared with the delta before: one that loses a tensor is refused."""
    whole = F.fold_artifact

    def losing(*args: Any, **kwargs: Any) -> Any:
        found = whole(*args, **kwargs)  # the head lies above the backbone's tensors
        return replace(found, base=replace(found.base, makers=dict(list(found.base.makers.items())[1:])))

    monkeypatch.setattr(F, "fold_artifact", losing)
    with pytest.raises(FoldError, match="differ by"):
        fold_ref(ref="fashion/lora", out=tmp_path / "half", factor=0.5, zoo=zoo)
    assert not (tmp_path / "half").exists()


def test_a_factor_beyond_all_numbers(zoo: Zoo, tmp_path: Path) -> None:
    """The network overflows, which is said."""
    with pytest.raises(FoldError, match="NaN or infinity") as caught:
        fold_ref(ref="fashion/lora", out=tmp_path / "far", factor=1e38, zoo=zoo)
    assert "--factor" in caught.value.hint


def test_a_fold_part_of_the_way_says_so(zoo: Zoo, tmp_path: Path) -> None:
    """With a factor there is no delta to compare with, which the report says; config and entry keep the factor."""
    half = fold_ref(ref="fashion/lora", out=tmp_path / "half", factor=0.5, name="fashion/half", zoo=zoo)
    whole = fold_ref(ref="fashion/lora", out=tmp_path / "whole", name="fashion/whole", zoo=zoo)
    assert half.report["factor"] == 0.5
    assert "against the same weights before they were written" in half.report["verified_on"]
    assert "factor" not in whole.report
    assert "against" not in whole.report["verified_on"]
    for name, out, kept in (("fashion/half", "half", {"factor": 0.5}), ("fashion/whole", "whole", {})):
        lineage = zoo.resolve(name).facts["lineage"]
        shown = json.loads((tmp_path / out / "config.json").read_text())["vtzoo"]
        assert {k: v for k, v in lineage.items() if k == "factor"} == kept
        assert {k: v for k, v in shown.items() if k == "factor"} == kept
        assert shown["parents"] == lineage["parents"]
        assert shown["method"] == "lora[rank=2]"


def test_a_dry_run_does_not_search(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """noah trains a supernet of one step instead of those asked for, and says that the stack is an example."""
    steps, said, fit = [], [], Supernet.fit

    def counted(self, draw, x, y, count, seed):
        steps.append(count)
        fit(self, draw, x, y, count, seed)

    monkeypatch.setattr(Supernet, "fit", counted)
    monkeypatch.setattr(talk, "say", said.append)
    run = {"backbone": "tiny", "data": "vtzoo:emoji", "name": "new/one", "zoo": zoo, "dry_run": True}
    found = train(method="noah[steps=70]+bitfit", **run)
    assert found.example
    assert found.method.endswith("bitfit")
    assert "noah" not in found.method
    assert not train(method="bitfit", **run).example
    assert steps == [1]
    assert said[0] == "noah searches when it trains; what is said here is of a stack that it might find"
    assert "bitfit" in said[-1]


def test_training_keeps_what_it_was_made_of(zoo: Zoo) -> None:
    """A trained delta carries its task's labels, preprocessing, recipe, metrics and lineage, and the index shows them."""
    entry = zoo.resolve("fashion/lora")
    delta = Delta.open(zoo.object(entry.facts["digest"]))
    assert delta.task().classes == D.open_data("vtzoo:fashion", split="train").classes
    assert delta.task().preprocess == delta.backbone.preprocess
    assert delta.recipe["lr"] == 1e-3
    assert delta.lineage["images"] == 60
    assert {"val", "test"} <= set(delta.metrics)
    assert entry.facts["metrics"]["top1"] == delta.metrics["test"]["top1"]


def test_training_repeats_bit_for_bit(zoo: Zoo) -> None:
    """The same command gives the same file, byte for byte."""
    again = train(
        backbone="tiny", data="vtzoo:fashion", method="lora[rank=2]", name="fashion/again", zoo=zoo, recipe=RECIPE
    )
    assert again.digest == zoo.resolve("fashion/lora").facts["digest"]
    assert again.metrics["seconds"] > 0


def test_evaluation_agrees_with_training(zoo: Zoo) -> None:
    """What eval measures of a saved delta is what training measured before it was saved."""
    found = evaluate(ref="fashion/lora", data="vtzoo:fashion", zoo=zoo).metrics["fashion"]
    delta = Delta.open(zoo.object(zoo.resolve("fashion/lora").facts["digest"]))
    assert found["top1"] == pytest.approx(delta.metrics["test"]["top1"], abs=1e-4)
    assert sum(map(sum, found["confusion"])) == found["images"]


def test_merge_is_shown_beside_its_parents(zoo: Zoo) -> None:
    """A merge keeps both heads, and its evaluation reports each task beside the delta that brought it."""
    found = evaluate(ref="both", data="vtzoo:emoji", task="emoji", zoo=zoo).metrics
    assert set(found) == {"emoji", "emoji/ssf (alone)"}
    with pytest.raises(NotFound, match="2 tasks"):
        evaluate(ref="both", data="vtzoo:emoji", zoo=zoo)


def test_evaluation_says_what_it_measured(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many images of which split, whether a hash chose them, and that val stood in for a missing test: said and kept."""
    images, said = D.open_data("vtzoo:fashion", split="test"), list[str]()
    monkeypatch.setattr(talk, "say", said.append)
    for i in range(100):
        for place in ("flat", "parts/val"):
            path = tmp_path / place / images.classes[images.labels[i]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images[i][0].save(path)
    flat = evaluate(ref="fashion/lora", data=str(tmp_path / "flat"), zoo=zoo).metrics["fashion"]
    parts = evaluate(ref="fashion/lora", data=str(tmp_path / "parts"), zoo=zoo).metrics["fashion"]
    assert flat["split"] == "test"
    assert 0 < flat["images"] < 40
    assert (parts["split"], parts["images"]) == ("val", 100)
    assert said == [
        f"fashion/lora: {flat['images']} images of the test split (there are no split folders: a hash of each name chose them)",
        "fashion/lora: 100 images of the val split",
    ]


def test_prediction_takes_folders_and_single_paths(zoo: Zoo, tmp_path: Path) -> None:
    """A folder stands for the images below it by name, hidden ones passed over; one path needs no list; top is 1 or more."""
    image = D.open_data("vtzoo:fashion", split="test")[0][0]
    for name in ("b.png", "a/z.png", "a/.hidden.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name, format="png")
    found = predict(ref="fashion/lora", images=[str(tmp_path / "b.png"), str(tmp_path)], zoo=zoo).predictions
    assert [Path(p["image"]).relative_to(tmp_path).as_posix() for p in found] == ["b.png", "a/z.png", "b.png"]
    for one in (tmp_path / "b.png", str(tmp_path / "b.png")):
        assert predict(ref="fashion/lora", images=one, zoo=zoo).predictions == found[:1]
    for top in (0, -1):
        with pytest.raises(UsageError, match=f"top is {top}"):
            predict(ref="fashion/lora", images=str(tmp_path / "b.png"), top=top, zoo=zoo)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_merge_looks_at_each_tasks_images(zoo: Zoo, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on whose images are whose, says which they were, and leaves no more than the merge behind."""
    monkeypatch.setattr("vtzoo.merges._chain.IMAGES", 24)
    refs, data = ["fashion/lora", "emoji/ssf"], ["vtzoo:fashion", "vtzoo:emoji"]
    before = sorted((zoo.root / ".vtzoo").iterdir())
    made = merge_refs(refs=refs, method=method, name=f"{method}/own", data=data, zoo=zoo)
    crossed = merge_refs(refs=refs, method=method, name=f"{method}/crossed", data=data[::-1], zoo=zoo)
    again = merge_refs(refs=refs[::-1], method=method, name=f"{method}/again", data=data[::-1], zoo=zoo)
    own, other, turned = (Delta.open(m.path) for m in (made, crossed, again))
    assert any(not torch.equal(own.tensors[n], other.tensors[n]) for n in own.tensors)
    assert all(torch.equal(own.tensors[n], turned.tensors[n]) for n in own.tensors)
    images = [D.open_data(d, split="train", labelled=False).limit(24) for d in data]
    wanted = [(t, f"sha256:{i.digest}", 24) for t, i in zip(("fashion", "emoji"), images, strict=True)]
    assert [(i["task"], i["data"], i["images"]) for i in own.lineage["images"]] == wanted
    assert sorted((zoo.root / ".vtzoo").iterdir()) == before
    dry = merge_refs(refs=refs, method=method, name=f"{method}/dry", data=data, zoo=zoo, dry_run=True)
    assert dry.report["tensors"] == made.report["tensors"]


def test_a_merge_from_a_file_is_the_same_merge(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours and mergekit's words give the bytes that options give; what stands on the command line wins."""
    files = {
        "ours": "{method: 'ties[scope=tensor,density=0.3]', name: file/ours, deltas: [fashion/lora, {ref: emoji/ssf, coef: 0.5}]}",
        "theirs": """
            merge_method: ties
            models: [{model: fashion/lora}, {model: emoji/ssf, parameters: {weight: 0.5}}]
            parameters: {density: 0.3}
        """,
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    end = ["--zoo", str(zoo.root), "--quiet"]
    assert main(["merge", "--config", str(tmp_path / "ours.yaml"), *end]) == 0
    assert main(["merge", "-c", str(tmp_path / "theirs.yaml"), "--name", "file/theirs", *end]) == 0
    assert (
        main(["merge", "-c", str(tmp_path / "theirs.yaml"), "--method", "linear", "--name", "file/linear", *end]) == 0
    )
    wanted = [
        merge_refs(refs=["fashion/lora", "emoji/ssf"], method=m, coef=(1, 0.5), name=f"file/{i}", zoo=zoo)
        for i, m in enumerate(("ties[scope=tensor,density=0.3]", "linear"))
    ]
    made = [Delta.open(zoo.object(zoo.resolve(f"file/{n}").facts["digest"])) for n in ("ours", "theirs", "linear")]
    for delta, like in zip(made, (0, 0, 1), strict=True):
        same = Delta.open(wanted[like].path)
        assert all(torch.equal(delta.tensors[n], same.tensors[n]) for n in same.tensors)
    capsys.readouterr()
    assert main(["merge", "fashion/lora", "-c", str(tmp_path / "ours.yaml"), *end]) == 2
    assert "names deltas, and so does the command line" in capsys.readouterr().err
    assert main(["merge", "fashion/lora", "emoji/ssf", "--name", "x", *end]) == 2
    assert "no method given" in capsys.readouterr().err


def test_two_deltas_of_one_task_merge_after_mv(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    """`mv --task` renames entry and task, keeps tensors, date and accuracy, and what could not be merged merges."""
    train(backbone="tiny", data="vtzoo:fashion", method="bitfit", name="fashion/two", zoo=zoo, recipe=QUICK)
    before = zoo.resolve("fashion/two")
    old = Delta.open(zoo.object(before.digest))
    tensors = {n.replace("@head/fashion/", "@head/fashion-2/"): t for n, t in old.tensors.items()}
    with pytest.raises(Conflict) as caught:
        merge_refs(refs=["fashion/lora", "fashion/two"], method="linear", name="m", zoo=zoo)
    command = caught.value.hint.partition(": vtzoo ")[2].replace("REF NEW", "fashion/two fashion/moved")
    assert main([*command.split(), "--zoo", str(zoo.root)]) == 0
    assert "fashion/two is now fashion/moved" in capsys.readouterr().out
    after = zoo.resolve("fashion/moved")
    new = Delta.open(zoo.object(after.digest))
    assert {n: t.tolist() for n, t in new.tensors.items()} == {n: t.tolist() for n, t in tensors.items()}
    assert after.facts == {
        **before.facts,
        "command": "",  # none made it: not the one of `mv` either
        "digest": after.digest,
        "tasks": ["fashion-2"],
        "was": [before.digest],  # by which what was made from it is still known
        "size_bytes": after.facts["size_bytes"],
    }
    with pytest.raises(NotFound):
        zoo.object(before.digest)
    merge_refs(refs=["fashion/lora", "fashion/moved"], method="linear", name="fashion/merged", zoo=zoo)
    assert zoo.resolve("fashion/merged").facts["tasks"] == ["fashion", "fashion-2"]
    assert evaluate(ref="fashion/moved", data="vtzoo:fashion", zoo=zoo).metrics["fashion-2"]["images"] == 400
    assert main(["mv", "fashion/moved", "fashion/moved", "--task", "fashion-2=test", "--zoo", str(zoo.root)]) == 0
    assert "fashion/merged came from this delta as it was" in capsys.readouterr().err
    assert Delta.open(zoo.object(zoo.resolve("fashion/moved").digest)).metrics == old.metrics


@pytest.mark.parametrize("ref", ["fashion/lora", "fashion/vpt", "both"])
def test_fold_loads_in_plain_timm(zoo: Zoo, ref: str, tmp_path: Path) -> None:
    """The folded folder, loaded by timm alone, computes what the attached delta computes."""
    report = fold_ref(ref=ref, out=tmp_path / "out", task="fashion", zoo=zoo).report
    assert report["max_rel"] <= 1e-5
    live = go_live(open_ref(ref, zoo), "fashion")
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(3, *live.preprocess.input_size)
    with torch.no_grad():
        assert torch.allclose(live.model(x), plain(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(Conflict):
        fold_ref(ref=ref, out=tmp_path / "out", task="fashion", zoo=zoo)


def test_fold_obeys_a_given_tolerance(zoo: Zoo, tmp_path: Path) -> None:
    """In 16 bits the tolerance is looser unless one is given; what was allowed stands in the report."""
    for dtype, allowed in (("float32", 1e-5), ("float16", 5e-2), ("bfloat16", 5e-2)):
        report = fold_ref(ref="fashion/lora", out=tmp_path / dtype, dtype=dtype, zoo=zoo).report
        assert report["tolerance"] == allowed
    with pytest.raises(FoldError, match=r"allowed 1.0e-06") as caught:
        fold_ref(ref="fashion/lora", out=tmp_path / "strict", dtype="bfloat16", tolerance=1e-6, zoo=zoo)
    assert "--dtype float32" in caught.value.hint
    assert not (tmp_path / "strict").exists()


def test_what_does_not_fold_is_refused_and_leaves_nothing(zoo: Zoo, tmp_path: Path) -> None:
    """An adapter has an activation inside: fold says so and makes no folder; export runs it attached."""
    train(backbone="tiny", data="vtzoo:fashion", method="adapter", name="fashion/adapter", zoo=zoo, recipe=QUICK)
    with pytest.raises(NotFoldable):
        fold_ref(ref="fashion/adapter", out=tmp_path / "out", zoo=zoo)
    assert not list(tmp_path.iterdir())
    assert export_onnx(ref="fashion/adapter", out=tmp_path / "a.onnx", zoo=zoo).report["folded"] is False


def test_student_learns_exports_and_travels(zoo: Zoo, tmp_path: Path) -> None:
    """A distilled student is kept as a plain model that evaluates, predicts, exports and loads in timm."""
    made = distill(
        teachers=["fashion/lora"], student="test_efficientnet", data="vtzoo:fashion", loss="kd", name="fashion/small", zoo=zoo,
        recipe={**RECIPE, "image_size": 32}, views=2,
    )  # fmt: skip
    assert made.report["held_out_loss"] > 0
    found = evaluate(ref="fashion/small", data="vtzoo:fashion", zoo=zoo).metrics
    assert 0 <= found["fashion"]["top1"] <= 1
    export_timm(ref="fashion/small", out=tmp_path / "timm", zoo=zoo)
    assert timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).num_classes == 10
    image = tmp_path / "a.png"
    D.open_data("vtzoo:fashion", split="test")[0][0].save(image)
    top = predict(ref="fashion/small", images=[str(image)], top=3, zoo=zoo).predictions[0]["top"]
    assert len(top) == 3
    assert top[0]["probability"] >= top[1]["probability"]


def test_features_are_taught_without_labels(zoo: Zoo, tmp_path: Path) -> None:
    """The feature loss takes any folder of images and a bare backbone as teacher."""
    images = D.open_data("vtzoo:clipart", split="train")
    for i in range(40):
        images[i][0].save(tmp_path / f"{i}.png")
    recipe = {"epochs": 2, "batch_size": 10, "image_size": 32}
    made = distill(
        teachers=["tiny"],
        student="test_efficientnet",
        data=str(tmp_path),
        loss="feature",
        name="bare",
        zoo=zoo,
        recipe=recipe,
        views=1,
    )
    assert made.report["held_out_loss"] > 0


def test_onnx_says_what_it_is(zoo: Zoo, tmp_path: Path) -> None:
    """The ONNX file carries labels and preprocessing, takes any batch size and agrees with the live model."""
    shipped = export_onnx(ref="fashion/lora", out=tmp_path / "m.onnx", zoo=zoo)
    assert max(b["max_rel"] for b in shipped.report["batches"]) <= 1e-3
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    meta = session.get_modelmeta().custom_metadata_map
    assert "sneaker" in meta["vtzoo.classes"]
    assert "mean" in meta["vtzoo.input"]
    export_safetensors(ref="fashion/lora", out=tmp_path / "d.safetensors", zoo=zoo)
    assert Delta.open(tmp_path / "d.safetensors").method == "lora[rank=2]"


def test_a_fine_tuned_checkpoint_becomes_a_delta(zoo: Zoo, tmp_path: Path) -> None:
    """`add delta` keeps a whole checkpoint as a `full` delta that computes what the checkpoint does."""
    torch.manual_seed(3)
    tuned = timm.create_model(ARCH, num_classes=4).eval()
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    add_delta(name="four/full", backbone="tiny", weights=tmp_path / "tuned.safetensors", zoo=zoo)
    live = go_live(open_ref("four/full", zoo))
    x = torch.randn(2, *live.preprocess.input_size)
    with torch.no_grad():
        assert torch.allclose(live.model(x), tuned(x), atol=1e-6)


def test_a_backbone_of_another_shape_than_square(zoo: Zoo, tmp_path: Path) -> None:
    """A ViT for 64x96 pixels is added with both sides, trains and folds at that size."""
    wide = timm.create_model(ARCH, num_classes=0, img_size=(64, 96))
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    add_backbone(name="wide", arch=ARCH, weights=tmp_path / "wide.safetensors", input_size=(3, 64, 96), zoo=zoo)
    assert zoo.resolve("wide").facts["model_args"] == {"img_size": [64, 96]}
    train(backbone="wide", data="vtzoo:fashion", method="ssf", name="wide/ssf", zoo=zoo, recipe=QUICK)
    live = go_live(open_ref("wide/ssf", zoo))
    assert live.preprocess.input_size == (3, 64, 96)
    assert fold_ref(ref="wide/ssf", out=tmp_path / "folded", zoo=zoo).report["max_rel"] <= 1e-5


def test_a_convnet_checkpoint_keeps_its_statistics(zoo: Zoo, tmp_path: Path) -> None:
    """Fine-tuning elsewhere moves BatchNorm's running statistics; attached and folded, the delta computes what the file does."""
    arch = "test_efficientnet"
    save_file(timm.create_model(arch, num_classes=0).state_dict(), tmp_path / "conv.safetensors")
    add_backbone(name="conv", arch=arch, weights=tmp_path / "conv.safetensors", zoo=zoo)
    tuned = timm.create_model(arch, num_classes=4).train()
    x = torch.randn(4, 3, 160, 160)
    tuned(x)
    save_file(tuned.eval().state_dict(), tmp_path / "tuned.safetensors")
    add_delta(name="conv/full", backbone="conv", weights=tmp_path / "tuned.safetensors", zoo=zoo)
    live = go_live(open_ref("conv/full", zoo))
    folded = fold_ref(ref="conv/full", out=tmp_path / "folded", zoo=zoo)
    plain = timm.create_model(f"local-dir:{tmp_path / 'folded'}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(live.model(x), tuned(x))
        torch.testing.assert_close(plain(x), tuned(x))
    assert folded.report["max_rel"] <= 1e-5


BAD = {
    "unknown backbone": ({"backbone": "tinny"}, NotFound),
    "unknown method": ({"method": "loar"}, NotFound),
    "unknown knob": ({"method": "lora[rnk=2]"}, UsageError),
    "wrong type": ({"method": "lora[rank=two]"}, UsageError),
    "unknown target": ({"method": "lora[targets=qvk]"}, UsageError),
    "wrong recipe": ({"recipe": {"epochs": "many"}}, UsageError),
    "name exists": ({"name": "fashion/lora"}, Conflict),
    "illegal name": ({"name": "../x"}, UsageError),
    "no such data": ({"data": "nowhere/"}, NotFound),
    "no such task": ({"data": "vtzoo:fasion"}, NotFound),
    "nothing to resume": ({"resume": True}, NotFound),
    "mixing odd batches": ({"recipe": {**RECIPE, "mixup": 0.2, "batch_size": 15}}, UsageError),
    "mixing without a whole batch": ({"recipe": {**RECIPE, "cutmix": 0.2, "batch_size": 64}}, UsageError),
    "no half precision on a CPU": ({"recipe": {**RECIPE, "precision": "fp16", "device": "cpu"}}, UsageError),
    "unknown device": ({"recipe": {**RECIPE, "device": "banana"}}, UsageError),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused_and_leaves_nothing(zoo: Zoo, fault: str) -> None:
    """Each fault is its documented error with a hint, and the zoo's files are what they were."""
    changes, kind = BAD[fault]
    before = sorted(zoo.root.rglob("*"))
    given = {"backbone": "tiny", "data": "vtzoo:fashion", "method": "lora", "name": "x/y", "recipe": RECIPE, **changes}
    with pytest.raises(kind) as refusal:
        train(zoo=zoo, **given)
    assert refusal.value.hint
    assert sorted(zoo.root.rglob("*")) == before


def test_damaged_and_foreign_files_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    """A truncated delta is Corrupt, another architecture's weights a Mismatch, other data's classes a Mismatch."""
    source = zoo.object(zoo.resolve("fashion/lora").facts["digest"]).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(source[:-100])
    with pytest.raises(Corrupt):
        evaluate(ref=str(tmp_path / "cut.safetensors"), data="vtzoo:fashion", zoo=zoo)
    with pytest.raises(Mismatch):
        evaluate(ref="fashion/lora", data="vtzoo:emoji", zoo=zoo)
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(Mismatch):
        add_backbone(name="other", arch=ARCH, weights=tmp_path / "other.safetensors", zoo=zoo)
    assert issubclass(Mismatch, VtzooError)


@pytest.mark.slow
def test_interrupted_training_goes_on_where_it_stopped(zoo: Zoo) -> None:
    """Ctrl-C writes a checkpoint and exits with 130; --resume then gives the very tensors of an uninterrupted run."""
    recipe = {**QUICK, "epochs": 4, "limit": 80}
    whole = train(backbone="tiny", data="vtzoo:fashion", method="bitfit", name="run/whole", zoo=zoo, recipe=recipe)
    command = [
        sys.executable, "-m", "vtzoo_cli", "train", "--zoo", str(zoo.root), "--backbone", "tiny", "--data", "vtzoo:fashion", "--method", "bitfit",
        "--name", "run/parts", *(f"--set={k}={v}" for k, v in recipe.items()),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("epoch 2 "))
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(60) == 130, said
    assert "--resume" in said
    assert list((zoo.root / ".vtzoo" / "checkpoints").glob("run--parts*"))
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    a, b = Delta.open(zoo.object(zoo.resolve("run/parts").facts["digest"])), Delta.open(whole.path)
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in b.tensors)
    assert not list((zoo.root / ".vtzoo" / "checkpoints").glob("run--parts*"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the library says, line by line."""
    lines: list[str] = []
    monkeypatch.setattr(talk._voice, "say", lines.append)
    return lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of the emoji task as a folder with train, val and test."""
    images = D.open_data("vtzoo:emoji", split="train")
    for label in (0, 1):
        places = [i for i, y in enumerate(images.labels) if y == label][:16]
        for n, i in enumerate(places):
            split = "train" if n < 10 else "val" if n < 13 else "test"
            path = tmp_path / "images" / split / f"c{label}" / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images[i][0].save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("recipe", [{}, {"patience": 1, "ema_decay": 0.9}], ids=["plain", "patience and average"])
def test_a_fault_after_the_training_costs_no_step(
    zoo: Zoo, folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]
) -> None:
    """A broken test image, then a failing index: the trained weights stay, and --resume gives the delta of a smooth run."""
    given: dict[str, Any] = {
        "backbone": "tiny", "data": str(folder), "method": "bitfit", "zoo": zoo,
        "recipe": {"epochs": 2, "batch_size": 10, **recipe},
    }  # fmt: skip
    task = f"fault{len(recipe)}"
    whole, name = train(name=f"{task}/whole", **given), f"{task}/parts"
    kept = checkpoint_path(zoo.root, name, "delta")
    broken = folder / "test" / "c0" / "13.png"
    good = broken.read_bytes()
    broken.write_bytes(b"x" * len(good))
    with pytest.raises(Corrupt, match=r"13\.png"):
        train(name=name, **given)
    assert kept.is_file()
    assert "--resume" in said[-1]
    broken.write_bytes(good)
    with monkeypatch.context() as patch:
        patch.setattr(Zoo, "put", _full)
        with pytest.raises(Resources):
            train(name=name, resume=True, **given)
    assert kept.is_file()
    said.clear()
    assert train(name=name, resume=True, **given).digest == whole.digest
    assert not [line for line in said if line.startswith("epoch")]
    assert not kept.exists()


def _full(*_: object, **__: object) -> None:
    raise Resources("the disk is full", "make room")


def test_a_student_that_could_not_be_stored_is_not_lost(
    zoo: Zoo, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint, running statistics included, stays until it is stored; --resume then trains nothing."""
    given: dict[str, Any] = {
        "teachers": ["fashion/lora"], "student": "test_efficientnet", "data": "vtzoo:fashion", "loss": "kd", "zoo": zoo,
        "recipe": {**RECIPE, "image_size": 32}, "views": 1,
    }  # fmt: skip
    whole = distill(name="smooth", **given)
    with monkeypatch.context() as patch:
        patch.setattr(Zoo, "put", _full)
        with pytest.raises(Resources):
            distill(name="late", **given)
    said.clear()
    late = distill(name="late", resume=True, **given)
    assert Path(late.path).read_bytes() == Path(whole.path).read_bytes()
    assert not [line for line in said if line.startswith("epoch")]
    assert not checkpoint_path(zoo.root, "late", "student").exists()


def test_test_images_are_looked_at_first(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test split with classes of its own is refused before the first step."""
    opened = D.open_data

    def other(data: str, *, split: Any, **more: Any) -> D.Images:
        return opened("vtzoo:emoji" if split == "test" else data, split=split, **more)

    monkeypatch.setattr("vtzoo.verbs.train.D.open_data", other)
    monkeypatch.setattr("vtzoo.verbs.train.fit", lambda *_, **__: pytest.fail("trained before looking"))
    with pytest.raises(Mismatch, match="classes"):
        train(backbone="tiny", data="vtzoo:fashion", name="x/test", zoo=zoo, recipe=QUICK)


@pytest.mark.slow
def test_divergence_is_said(zoo: Zoo, said: list[str]) -> None:
    """A training loss far above guessing brings a warning with a hint; a sane one does not."""
    given: dict[str, Any] = {"backbone": "tiny", "data": "vtzoo:fashion", "method": "linear", "zoo": zoo}
    train(name="lr/sane", recipe=QUICK, **given)
    assert not [line for line in said if "warning" in line]
    train(name="lr/wild", recipe={**QUICK, "lr": 1e6}, **given)
    assert [line for line in said if "far above" in line and "try a lower --lr" in line]
