"""A trained delta shipped as ONNX in every form, run by predict, eval and by programs that know nothing of vtzoo."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vtzoo import data as D
from vtzoo.delta import Delta
from vtzoo.errors import Conflict, Corrupt, ExportMismatch, Mismatch, NotExportable, NotFound, Resources, UsageError
from vtzoo.results import Exported
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.export.timm import export_timm
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.predict import predict
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

VIT, CNN, CONVIT = "vit_embedded_64", "tf_efficientnet_lite0", "convit_tiny"
RECIPE = {"epochs": 2, "limit": 200, "eval_limit": 20, "batch_size": 20, "warmup_epochs": 0.5}
DATA = "vtzoo:fashion"
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"half": True},
    "int8 dynamic": {"int8": "dynamic"},
    "int8 static": {"int8": "static", "calibrate": 40},
}
ALONE = """
import json, sys
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
said = session.get_modelmeta().custom_metadata_map
wanted, classes = json.loads(said["vtzoo.input"]), json.loads(said["vtzoo.classes"])
assert (wanted["layout"], wanted["dtype"]) == ("NHWC", "uint8")
image = Image.open(sys.argv[2]).convert("RGB")
for step in wanted["steps"]:
    if step["op"] == "resize":
        short = step["shorter_side"]
        scale = {True: (short, int(short * image.height / image.width)), False: (int(short * image.width / image.height), short)}
        image = image.resize(scale[image.width <= image.height], getattr(Image.Resampling, step["interpolation"].upper()))
    if step["op"] == "center_crop":
        height, width = step["size"]
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
logits = session.run(None, {wanted["name"]: np.asarray(image)[None]})[0][0]
assert not {"torch", "timm", "vtzoo"} & set(sys.modules)
print(json.dumps([classes[int(logits.argmax())], [float(v) for v in logits]]))
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Two deltas of the embedded ViT: one that folds, one that doesn't."""
    made = Zoo.init(tmp_path_factory.mktemp("zoo") / "zoo")
    for name, method in (("fashion/lora", "lora[rank=4]"), ("fashion/adapter", "adapter")):
        limit = 200 if name == "fashion/lora" else 20
        train(backbone=VIT, data=DATA, method=method, name=name, zoo=made, recipe={**RECIPE, "limit": limit})
    return made


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test image, enlarged to sides that differ, so that resizing and cropping show."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    D.open_data(DATA, split="test")[3][0].resize((150, 90), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def shipped(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """fashion/lora in a form, its preprocessing in the graph; made once."""
    folder = tmp_path_factory.mktemp("shipped")

    @cache
    def make(form: str) -> Exported:
        out = folder / f"{form}.onnx"
        return export_onnx(ref="fashion/lora", out=out, embed_preprocess=True, data=DATA, zoo=zoo, **FORMS[form])

    return make


def quick(*forms: str) -> list[Any]:
    """All forms, of which only some are looked at in `make test`."""
    return [pytest.param(f, marks=() if f in forms else pytest.mark.slow) for f in FORMS]


@pytest.mark.parametrize("form", quick("float32", "int8 static"))
def test_each_form_answers_as_the_delta(shipped: Callable[[str], Exported], form: str) -> None:
    """The file passes its own tolerance at every batch size and says the same of nearly all images; the report has its size and time."""
    made = shipped(form)
    report = made.report
    assert report["precision"] == form
    assert [b["batch"] for b in report["batches"]] == [1, 2, 5, 16, 8]
    assert report["cosine"] >= 0.99
    assert report["top1_agreement"] >= 0.95
    assert report["size_bytes"] == Path(made.path).stat().st_size
    assert report["torch_ms"] > 0 < report["onnxruntime_ms"]
    assert report["verified_on"] == "128 images of vtzoo:fashion"
    assert report.get("calibrated_on") == ("40 images of vtzoo:fashion" if form == "int8 static" else None)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_eval_of_the_file_is_eval_of_the_delta(zoo: Zoo, shipped: Callable[[str], Exported], form: str) -> None:
    """Accuracy on the test split, through the same command."""
    refs = ("fashion/lora", shipped(form).path)
    ours, theirs = (evaluate(ref=r, data=DATA, zoo=zoo).metrics["fashion"] for r in refs)
    assert abs(ours["top1"] - theirs["top1"]) <= (0.02 if form.startswith("int8") else 0.003)
    assert ours["images"] == theirs["images"]


@pytest.mark.slow
def test_fewer_bits_are_fewer_bytes(shipped: Callable[[str], Exported]) -> None:
    """Half precision halves the file, int8 leaves less than two fifths of it."""
    sizes = {form: shipped(form).report["size_bytes"] for form in FORMS}
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert max(sizes["int8 dynamic"], sizes["int8 static"]) < 0.4 * sizes["float32"]


@pytest.mark.parametrize("form", quick("float32", "int8 static"))
def test_a_program_without_vtzoo_gets_the_same_class(
    zoo: Zoo, shipped: Callable[[str], Exported], photo: Path, form: str
) -> None:
    """onnxruntime, numpy and pillow, and what the file says of itself, are enough for predict's own answer."""
    out = shipped(form).path
    ran = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, out, str(photo)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    label, logits = json.loads(ran.stdout)
    alone = torch.tensor(logits).softmax(-1)
    found = predict(ref=out, images=photo, top=10, zoo=zoo).predictions[0]["top"]
    assert found[0]["class"] == label
    assert found[0]["probability"] == pytest.approx(float(alone.max()), abs=2e-6)  # the very pixels
    if not form.startswith("int8"):
        ours = predict(ref="fashion/lora", images=photo, zoo=zoo).predictions[0]["top"][0]
        assert ours["class"] == label
        assert ours["probability"] == pytest.approx(found[0]["probability"], abs=2e-3)


def test_a_kept_export_runs_by_its_name(zoo: Zoo, photo: Path, tmp_path: Path) -> None:
    """predict and eval take the entry as they take the file; other verbs refuse it, and say what to use."""
    kept = export_onnx(ref="fashion/lora", out=tmp_path / "m.onnx", name="fashion/onnx", zoo=zoo)
    assert kept.ref == "fashion/onnx"
    by_name, by_path = (predict(ref=r, images=photo, zoo=zoo).predictions for r in ("fashion/onnx", kept.path))
    assert by_name == by_path
    assert evaluate(ref="fashion/onnx", data=DATA, zoo=zoo).metrics["fashion"]["images"] == 400
    facts = zoo.resolve("fashion/onnx").facts
    assert (facts["kind"], facts["tasks"]) == ("export", ["fashion"])
    for refused in (
        lambda: export_onnx(ref="fashion/onnx", out=tmp_path / "n.onnx", zoo=zoo),
        lambda: export_timm(ref="fashion/onnx", out=tmp_path / "n", zoo=zoo),
        lambda: fold_ref(ref=kept.path, out=tmp_path / "n", zoo=zoo),
    ):
        with pytest.raises(UsageError, match="is an export"):
            refused()
    with pytest.raises(NotFound, match="no task 'emoji'"):
        predict(ref="fashion/onnx", images=photo, task="emoji", zoo=zoo)
    with pytest.raises(NotFound) as caught:
        predict(ref="m.onnx", images=photo, zoo=zoo)
    assert "./m.onnx" in caught.value.hint
    with pytest.raises(Conflict):
        export_onnx(ref="fashion/lora", out=tmp_path / "m.onnx", zoo=zoo)


@pytest.mark.parametrize(
    "opset", [17, pytest.param(20, marks=pytest.mark.slow), pytest.param(23, marks=pytest.mark.slow)]
)
def test_an_operator_set_is_what_was_asked_for(zoo: Zoo, tmp_path: Path, opset: int) -> None:
    """Attached and verified at 17, which the exporter doesn't write, and at the newest."""
    export_onnx(ref="fashion/adapter", out=tmp_path / "m.onnx", opset=opset, zoo=zoo)
    made = onnx.load(tmp_path / "m.onnx")
    assert [o.version for o in made.opset_import if o.domain == ""] == [opset]


@pytest.mark.parametrize("ref", ["fashion/lora", pytest.param("fashion/adapter", marks=pytest.mark.slow)])
def test_other_image_sizes(zoo: Zoo, tmp_path: Path, ref: str) -> None:
    """With --dynamic-size the file is verified at a second size, and takes any that the network does."""
    report = export_onnx(ref=ref, out=tmp_path / "m.onnx", dynamic_size=True, embed_preprocess=True, zoo=zoo).report
    assert len({b["size"] for b in report["batches"]}) == 2
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": np.zeros((3, 128, 96, 3), np.uint8)})[0].shape == (3, 10)


def test_a_network_of_one_size(zoo: Zoo, tmp_path: Path) -> None:
    """ConViT takes its own size only, which is said before anything is translated."""
    torch.manual_seed(0)
    save_file(timm.create_model(CONVIT, num_classes=0).state_dict(), tmp_path / "convit.safetensors")
    add_backbone(name="convit", arch=CONVIT, weights=tmp_path / "convit.safetensors", zoo=zoo)
    with pytest.raises(NotExportable, match=r"takes no images of 256x240 pixels: Input height") as caught:
        export_onnx(ref="convit", out=tmp_path / "m.onnx", dynamic_size=True, zoo=zoo)
    assert "--dynamic-size" in caught.value.hint


def test_what_the_file_says_of_itself(zoo: Zoo, shipped: Callable[[str], Exported]) -> None:
    """Digests, licence and versions of what it was made from, ONNX's own words for images, and nothing of this machine."""
    path = shipped("float32").path
    said = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
    card = Delta.open(zoo.object(zoo.resolve("fashion/lora").facts["digest"])).backbone
    assert said["vtzoo.digest"] == zoo.resolve("fashion/lora").facts["digest"]
    assert (said["vtzoo.fingerprint"], said["vtzoo.license"]) == (card.fingerprint, card.license)
    assert json.loads(said["vtzoo.versions"])["torch"] == version("torch")
    assert said["Image.NominalPixelRange"] == "NominalRange_0_255"
    assert onnx.load(path).graph.input[0].type.denotation == "IMAGE"
    assert str(Path(timm.__file__).parent).encode() not in Path(path).read_bytes()


@pytest.mark.slow
def test_layers_that_cost_too_much_stay_float(zoo: Zoo, tmp_path: Path) -> None:
    """At a tolerance that all layers in int8 miss, the costliest few stay float, by name, and the rest pass."""
    loose = export_onnx(ref="fashion/lora", out=tmp_path / "a.onnx", data=DATA, zoo=zoo, **FORMS["int8 static"]).report
    assert "in_float" not in loose
    strict = export_onnx(
        ref="fashion/lora", out=tmp_path / "b.onnx", data=DATA, tolerance=(1 - loose["cosine"]) * 0.8, zoo=zoo, **FORMS["int8 static"]
    ).report  # fmt: skip
    assert 1 <= len(strict["in_float"]) < 12
    assert strict["cosine"] > loose["cosine"]
    assert strict["size_bytes"] > loose["size_bytes"]


@pytest.mark.slow
def test_a_convolutional_network(zoo: Zoo, tmp_path: Path) -> None:
    """Static int8 knows convolutions; dynamic doesn't, and is refused with what to use instead."""
    out, recipe = tmp_path / "m.onnx", {**RECIPE, "image_size": 64}
    train(backbone=CNN, data=DATA, method="linear", name="fashion/conv", zoo=zoo, recipe=recipe)
    with pytest.raises(NotExportable) as caught:
        export_onnx(ref="fashion/conv", out=out, int8="dynamic", zoo=zoo)
    assert "--int8 static" in caught.value.hint
    report = export_onnx(ref="fashion/conv", out=out, int8="static", calibrate=30, data=DATA, zoo=zoo).report
    assert report["cosine"] >= 0.99
    assert "conv_stem" in report["in_float"]  # all 50 layers at once are too far off
    assert report["size_bytes"] < 6_000_000


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an old operator set": ({"opset": 16}, UsageError, "17 to 23"),
    "no operator set": ({"opset": 0}, UsageError, "17 to 23"),
    "two precisions": ({"half": True, "int8": "dynamic"}, UsageError, "not both"),
    "static without images": ({"int8": "static"}, UsageError, "images to find ranges"),
    "calibrating nothing": ({"int8": "dynamic", "calibrate": 5}, UsageError, "5 images"),
    "no image": ({"int8": "static", "calibrate": 0, "data": DATA}, UsageError, "0 images"),
    "no such images": ({"data": "nowhere/"}, NotFound, "nowhere"),
    "images that are none": ({"data": "broken"}, Corrupt, "not a whole image"),
    "a folder without images": ({"data": "empty"}, UsageError, "no whole image"),
    "tolerance of half": ({"half": True, "tolerance": 0.0}, ExportMismatch, "float16 differ"),
    "tolerance of int8": ({"int8": "dynamic", "tolerance": 0.0}, ExportMismatch, "left in float"),
}


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow if "tolerance" in f else ()) for f in BAD])
def test_what_can_not_be_leaves_nothing(zoo: Zoo, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault is its documented error with a hint, and no file appears."""
    asked, kind, said = BAD[fault]
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "a" / "1.png").write_bytes(b"not a picture")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=said) as caught:
        export_onnx(ref="fashion/lora", out=tmp_path / "m.onnx", zoo=zoo, **asked)
    assert caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "empty"]


def test_a_place_that_takes_no_such_file_is_refused_at_once(zoo: Zoo, tmp_path: Path) -> None:
    """A folder that isn't there or takes nothing, and another ending: by the file's name, before the ref is even looked at."""
    for out, kind, said in (
        (tmp_path / "no" / "m.onnx", NotFound, "no does not exist"), (tmp_path / "m.bin", UsageError, "does not end in .onnx"),
        *([(Path("/proc/m.onnx"), UsageError, "/proc takes no new files")] if Path("/proc/self").is_dir() else []),
    ):  # fmt: skip
        with pytest.raises(kind, match=said) as caught:
            export_onnx(ref="nothing/here", out=out, zoo=zoo)
        assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_ours_or_not_whole(
    zoo: Zoo, shipped: Callable[[str], Exported], photo: Path, tmp_path: Path
) -> None:
    """Without metadata it is refused with what is missing; cut short or of other bytes it is Corrupt."""
    out = Path(shipped("float32").path)
    (tmp_path / "cut.onnx").write_bytes(out.read_bytes()[:-5000])
    (tmp_path / "text.onnx").write_text("hello")
    foreign = onnx.load(out)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    onnx.helper.set_model_props(foreign, {"vtzoo.input": "{", "vtzoo.classes": "[]"})
    onnx.save(foreign, tmp_path / "garbled.onnx")
    fewer = onnx.load(out)
    said = {p.key: p.value for p in fewer.metadata_props} | {"vtzoo.classes": '["a", "b"]'}
    onnx.helper.set_model_props(fewer, said)
    onnx.save(fewer, tmp_path / "fewer.onnx")
    for name, kind, match in (
        ("cut", Corrupt, "can't run"), ("text", Corrupt, "can't run"), ("foreign", Mismatch, "lacks vtzoo.input and vtzoo.classes"),
        ("garbled", Mismatch, "can't be read"), ("fewer", Mismatch, "gives 10 outputs, its metadata name 2 classes"), ("none", NotFound, "does not exist"),
    ):  # fmt: skip
        with pytest.raises(kind, match=match):
            predict(ref=str(tmp_path / f"{name}.onnx"), images=photo, zoo=zoo)


@pytest.mark.slow
def test_a_file_without_a_zoo_entry_when_the_index_fails(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the entry can't be stored, the file doesn't appear either."""

    def full(*_: object, **__: object) -> None:
        raise Resources("the disk is full", "make room")

    monkeypatch.setattr(Zoo, "put", full)
    with pytest.raises(Resources):
        export_onnx(ref="fashion/lora", out=tmp_path / "m.onnx", name="fashion/late", zoo=zoo)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bare_backbone(zoo: Zoo, photo: Path, tmp_path: Path) -> None:
    """It gives features, which predict refuses."""
    report = export_onnx(ref=VIT, out=tmp_path / "b.onnx", zoo=zoo).report
    assert "top1_agreement" not in report
    with pytest.raises(UsageError, match="no task's head"):
        predict(ref=str(tmp_path / "b.onnx"), images=photo, zoo=zoo)
