"""A trained delta shipped as PT2, OpenVINO and ExecuTorch, run by predict and eval, and by programs that know nothing of vtzoo."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from vtzoo import data as D
from vtzoo import formats
from vtzoo.errors import Conflict, Corrupt, ExportMismatch, Mismatch, NotFound, UsageError
from vtzoo.onnx.describe import Description, written
from vtzoo.spec import Preprocess, Task
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


TRAP = "__import__('pathlib').Path('sprung').touch()"


def _with_pickle(records: dict[str, bytes]) -> None:
    config = json.loads(records[WEIGHTS])
    next(iter(config["config"].values()))["use_pickle"] = True
    records |= {WEIGHTS: json.dumps(config).encode(), "data/weights/weight_0": pickle.dumps(_Trap())}


def _with_inputs(records: dict[str, bytes]) -> None:
    records["data/sample_inputs/model.pt"] = pickle.dumps(_Trap())


def _with_object(records: dict[str, bytes]) -> None:
    config = json.dumps({"config": {"c": {"path_name": "opaque_obj_0", "use_pickle": False}}})
    records |= {"data/constants/model_constants_config.json": config.encode()}


def _with_code(records: dict[str, bytes]) -> None:
    records["data/constants/opaque_obj_0"] = pickle.dumps(_Trap())


def _with_another_case(records: dict[str, bytes]) -> None:
    records[WEIGHTS.replace("model", "MODEL")] = records[WEIGHTS]


def _edited(old: str, new: str, records: dict[str, bytes]) -> None:
    program = records["models/model.json"].decode()
    assert old in program
    records["models/model.json"] = program.replace(old, new, 1).encode()


WEIGHTS = "data/weights/model_weights_config.json"
SIZE = partial(_edited, '"expr_str": "', f'"expr_str": "{TRAP} or ')
NAME = partial(_edited, '"name": "linear', f'"name": "{TRAP}; linear')
CALL = partial(_edited, "torch.ops.aten.linear.default", "torch.os.system")
FILE = partial(_edited, "torch.ops.aten.linear.default", "torch.ops.aten.from_file.default")
SPEC = partial(_edited, '"type\\": \\"builtins.tuple', '"type\\": \\"collections.defaultdict')
CHANGES = (_with_pickle, _with_inputs, _with_object, _with_code, _with_another_case, SIZE, NAME, CALL, FILE, SPEC)


def _records(path: Path | io.BytesIO) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _packed(records: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """The records of an archive that runs."""
    shape = Preprocess(input_size=(3, 8, 8))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    said = written(Description(task=None, preprocess=shape))
    made = formats.of("pt2").write(network, shape, shape.input_size, said, embedded=False, dynamic_size=False)
    return _records(io.BytesIO(made[".pt2"]))


@pytest.fixture
def trapped(whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The same to be changed, where a trap that springs leaves a file in the current folder."""
    monkeypatch.chdir(tmp_path)
    return dict(whole)


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_of_a_stranger_is_run(trapped: dict[str, bytes], tmp_path: Path, change: Any) -> None:
    """What is pickled, and sizes, names, operators and types of arguments that are something else: refused, and no trap springs."""
    change(trapped)
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(_packed(trapped))
    with pytest.raises(Corrupt, match="could run anything"):
        formats.opened("pt2", {".pt2": bad})
    assert not Path("sprung").exists()


def test_guards_are_not_run(trapped: dict[str, bytes], tmp_path: Path) -> None:
    """They are source; torch alone would run this one."""
    program = json.loads(trapped["models/model.json"])
    trapped["models/model.json"] = json.dumps({**program, "guards_code": [f"{TRAP} is None"]}).encode()
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(_packed(trapped))
    network, _ = formats.opened("pt2", {".pt2": bad})
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    assert not Path("sprung").exists()
    torch.export.load(bad).module()(torch.zeros(1, 3, 8, 8))
    assert Path("sprung").exists()


def test_what_is_checked_is_what_torch_reads(trapped: dict[str, bytes], tmp_path: Path) -> None:
    """Of a zip with two lists of contents Python reads the last, torch the one whose place is written at the end."""
    good, harmless = _packed(trapped), trapped["models/model.json"]
    SIZE(trapped)
    evil, bad = _packed(trapped), tmp_path / "bad.pt2"
    (place,), (other,) = (struct.unpack("<I", packed[-6:-2]) for packed in (good, evil))
    bad.write_bytes(evil[:-22] + good[:place] + bytes(other - place) + good[place:-22] + evil[-22:])
    assert _records(bad)["models/model.json"] == harmless
    with pytest.raises(Corrupt, match="could run anything"):
        formats.opened("pt2", {".pt2": bad})
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("size", "classes", "error", "said"),
    [
        ((3, 8, 8), "abc", Mismatch, "gives 2 outputs, its metadata name 3"),
        ((3, 9, 8), "ab", Corrupt, "image of 3x9x8"),
    ],
)
def test_what_a_file_says_of_itself_is_tried(
    whole: dict[str, bytes], tmp_path: Path, size: tuple[int, int, int], classes: str, error: Any, said: str
) -> None:
    """Another number of classes than of outputs, or another image size, is refused where the file is opened."""
    shape = Preprocess(input_size=size)
    told = written(Description(task=Task(name="t", classes=tuple(classes), preprocess=shape), preprocess=shape))
    (tmp_path / "m.pt2").write_bytes(_packed({**whole, "extra/vtzoo.json": json.dumps(told).encode()}))
    with pytest.raises(error, match=said):
        formats.opened("pt2", {".pt2": tmp_path / "m.pt2"})


def test_a_backbone_is_no_parent(zoo: Zoo, tmp_path: Path) -> None:
    """An export of a bare backbone is kept without an empty digest among its parents."""
    export_program(form="pt2", ref="tiny", out=tmp_path / "m.pt2", zoo=zoo, name="bare")
    assert zoo.resolve("bare").facts["lineage"]["parents"] == []


def test_times_in_other_runtimes(tuned: Zoo) -> None:
    """`bench` makes each form that is asked for."""
    rows = bench(ref="fashion/lora", batches=(2,), forms=("torch", *SUFFIXES), zoo=tuned).report["times"]
    assert [r["form"] for r in rows] == ["torch", *SUFFIXES]
