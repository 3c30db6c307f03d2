"""A trained delta shipped as PT2, OpenVINO and ExecuTorch, run by predict and eval, and by programs that know nothing of vtzoo."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from vtzoo import data as D
from vtzoo import formats
from vtzoo.errors import Conflict, Corrupt, ExportMismatch, Mismatch, NotFound, UsageError
from vtzoo.verbs.bench import bench
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.export.program import export_program
from vtzoo.verbs.predict import predict
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

SUFFIXES = {"pt2": ".pt2", "openvino": ".xml", "executorch": ".pte"}
DATA = "vtzoo:fashion"
RECIPE = {"epochs": 1, "image_size": 32, "limit": 60, "eval_limit": 20, "batch_size": 20}
RUNS = {
    "pt2": """
import torch
said = {"vtzoo.json": ""}
network = torch.export.load(path, extra_files=said).module()
said = json.loads(said["vtzoo.json"])
run = lambda images: network(torch.from_numpy(images)).detach().numpy()
""",
    "openvino": """
import openvino
model = openvino.Core().read_model(path)
said = {"vtzoo." + key: model.get_rt_info(["vtzoo", key]).value for key in ("input", "classes")}
compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
run = lambda images: compiled([images])[0]
""",
    "executorch": """
import torch
from executorch.runtime import Runtime
program = Runtime.get().load_program(path)
said = json.loads(bytes(program.load_method("vtzoo").execute([])[0].numpy()))
forward = program.load_method("forward")
run = lambda images: forward.execute([torch.from_numpy(images)])[0].numpy()
""",
}
ALONE = """
import json, sys
import numpy as np
from PIL import Image
path = sys.argv[1]
{run}
wanted, classes = json.loads(said["vtzoo.input"]), json.loads(said["vtzoo.classes"])
assert (wanted["layout"], wanted["dtype"]) == ("NHWC", "uint8")
images = np.stack([np.asarray(Image.open(name).convert("RGB")) for name in sys.argv[2:]])
assert list(images.shape[1:]) == [*wanted["size"][1:], 3]
assert not {{"timm", "vtzoo"}} & set(sys.modules)
print(json.dumps([classes[i] for i in run(images).argmax(-1)]))
"""


def _ship(zoo: Zoo, form: str, out: Path, **wish: Any) -> Any:
    return export_program(form=form, ref="fashion/lora", out=out.with_suffix(SUFFIXES[form]), zoo=zoo, **wish)


@pytest.fixture
def tuned(zoo: Zoo) -> Zoo:
    """The tiny ViT's zoo with a delta that folds."""
    train(backbone="tiny", data=DATA, method="lora[rank=2]", name="fashion/lora", zoo=zoo, recipe=RECIPE)
    return zoo


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A test image."""
    path = tmp_path / "photo.png"
    D.open_data(DATA, split="test")[3][0].save(path)
    return path


@pytest.mark.parametrize("form", SUFFIXES)
def test_the_file_answers_as_the_delta(tuned: Zoo, tmp_path: Path, photo: Path, form: str) -> None:
    """Verified at three batch sizes on images; kept by name; eval, predict and bench run the name and the file, more images at once than it takes, too."""
    made = _ship(tuned, form, tmp_path / "m", data=DATA, name="fashion/shipped")
    assert [b["batch"] for b in made.report["batches"]][:3] == [1, 2, 5]
    assert made.report["max_rel"] < 1e-4
    assert made.report["verified_on"] == "128 images of vtzoo:fashion"
    assert made.report[f"{form}_ms"] > 0
    files = list(tmp_path.glob("m.*"))
    assert {p.suffix for p in files} == set(formats.of(form).PARTS)
    assert made.report["size_bytes"] == sum(p.stat().st_size for p in files)
    ours = evaluate(ref="fashion/lora", data=DATA, zoo=tuned).metrics["fashion"]
    for ref in (made.path, "fashion/shipped"):
        theirs = evaluate(ref=ref, data=DATA, zoo=tuned).metrics["fashion"]
        assert (theirs["images"], theirs["top1"]) == (ours["images"], pytest.approx(ours["top1"], abs=0.0026))
    assert bench(ref=made.path, batches=(3,), zoo=tuned).report["times"][0]["form"] == form
    with pytest.raises(UsageError, match="has no form 'torch'"):
        bench(ref=made.path, forms=("torch",), zoo=tuned)
    with pytest.raises(NotFound, match="no task 'emoji'"):
        predict(ref=made.path, images=photo, task="emoji", zoo=tuned)
    with pytest.raises(UsageError, match="is an export"):
        export_onnx(ref=made.path, out=tmp_path / "n.onnx", zoo=tuned)


@pytest.mark.parametrize("form", SUFFIXES)
def test_a_program_without_vtzoo_gets_the_same_classes(tuned: Zoo, tmp_path: Path, form: str) -> None:
    """The runtime, numpy and pillow, and what the file says of itself; pictures in, normalised inside."""
    made = _ship(tuned, form, tmp_path / "m", embed_preprocess=True)
    images = D.open_data(DATA, split="test")
    (tmp_path / "in").mkdir()
    for i in range(5):
        images[i * 7][0].convert("RGB").resize((32, 32)).save(tmp_path / "in" / f"{i}.png")
    paths = sorted((tmp_path / "in").iterdir())
    code = ALONE.format(run=RUNS[form])
    ran = subprocess.run(
        [sys.executable, "-I", "-c", code, made.path, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    for ref in (made.path, "fashion/lora"):
        found = predict(ref=ref, images=tmp_path / "in", zoo=tuned).predictions
        assert [p["top"][0]["class"] for p in found] == json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["pt2", "openvino"])
def test_other_image_sizes(tuned: Zoo, tmp_path: Path, form: str) -> None:
    """With dynamic_size a second size is verified."""
    report = _ship(tuned, form, tmp_path / "m", dynamic_size=True).report
    assert len({b["size"] for b in report["batches"]}) == 2


def test_half_precision_is_half_the_file(tuned: Zoo, tmp_path: Path) -> None:
    """OpenVINO's weights in float16; what the delta says is nearly kept."""
    whole, half = (_ship(tuned, "openvino", tmp_path / str(h), half=h) for h in (False, True))
    sizes = [Path(m.path).with_suffix(".bin").stat().st_size for m in (whole, half)]
    assert sizes[1] < 0.55 * sizes[0]
    assert half.report["precision"] == "float16"
    assert 1 - half.report["cosine"] < 1e-3


@pytest.mark.parametrize("form", SUFFIXES)
def test_what_is_wrong_is_refused(tuned: Zoo, tmp_path: Path, photo: Path, form: str) -> None:
    """Another suffix, a place that is taken, outputs that differ, a damaged or missing file; nothing is left but what was there."""
    suffix = SUFFIXES[form]
    with pytest.raises(UsageError) as caught:
        export_program(form=form, ref="fashion/lora", out=tmp_path / "m.bin", zoo=tuned)
    assert f"m{suffix}" in caught.value.hint
    taken = tmp_path / f"m{formats.of(form).PARTS[-1]}"
    taken.write_text("mine")
    with pytest.raises(Conflict):
        _ship(tuned, form, tmp_path / "m")
    assert taken.read_text() == "mine"
    with pytest.raises(ExportMismatch, match=f"{form}'s outputs differ"):
        _ship(tuned, form, tmp_path / "n", tolerance=-1.0)
    assert not list(tmp_path.glob("*n.*"))
    for part in formats.of(form).PARTS:
        (tmp_path / f"bad{part}").write_bytes(b"hello")
    with pytest.raises(Corrupt, match="can"):
        predict(ref=str(tmp_path / f"bad{suffix}"), images=photo, zoo=tuned)
    with pytest.raises(NotFound):
        predict(ref=str(tmp_path / f"none{suffix}"), images=photo, zoo=tuned)


def test_a_file_of_others_is_refused(tmp_path: Path, photo: Path, zoo: Zoo) -> None:
    """A program that torch wrote without vtzoo runs, but doesn't say what its outputs are."""
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),)), tmp_path / "m.pt2")
    with pytest.raises(Mismatch, match=r"lacks vtzoo.input and vtzoo.classes"):
        predict(ref=str(tmp_path / "m.pt2"), images=photo, zoo=zoo)


class _Trap:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import pathlib; pathlib.Path('sprung').touch()",))


def _with_pickle(archive: zipfile.ZipFile, name: str) -> bytes:
    content = archive.read(name)
    if name.endswith("model_weights_config.json"):
        config = json.loads(content)
        next(iter(config["config"].values()))["use_pickle"] = True
        return json.dumps(config).encode()
    return pickle.dumps(_Trap()) if name.endswith("weight_0") else content


def _with_inputs(archive: zipfile.ZipFile, name: str) -> bytes:
    return pickle.dumps(_Trap()) if "sample_inputs" in name else archive.read(name)


def _with_object(archive: zipfile.ZipFile, name: str) -> bytes:
    if not name.endswith("model_constants_config.json"):
        return archive.read(name)
    return json.dumps({"config": {"c": {"path_name": "opaque_obj_0", "use_pickle": False}}}).encode()


@pytest.mark.parametrize("change", [_with_pickle, _with_inputs, _with_object])
def test_nothing_is_unpickled(
    tuned: Zoo, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    """A PT2 archive in which something is pickled is refused before torch opens it: the trap doesn't spring, where torch alone would spring it."""
    made, bad = Path(_ship(tuned, "pt2", tmp_path / "m").path), tmp_path / "bad.pt2"
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(bad, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            target.writestr(name, change(source, name))
        target.writestr(f"{source.namelist()[0].partition('/')[0]}/data/constants/opaque_obj_0", pickle.dumps(_Trap()))
    with pytest.raises(Corrupt, match="could run anything"):
        predict(ref=str(bad), images=photo, zoo=tuned)
    assert not (tmp_path / "sprung").exists()


def test_times_in_other_runtimes(tuned: Zoo) -> None:
    """`bench` makes each form that is asked for."""
    rows = bench(ref="fashion/lora", batches=(2,), forms=("torch", *SUFFIXES), zoo=tuned).report["times"]
    assert [r["form"] for r in rows] == ["torch", *SUFFIXES]
