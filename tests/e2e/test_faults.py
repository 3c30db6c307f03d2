"""Verb x fault through the command line: two lines, the documented exit code, and no new file anywhere.

`VTZOO_SHOW=1 pytest tests/e2e/test_faults.py` prints the table.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

ARCH = "test_vit"
RECIPE = {"epochs": 1, "limit": 40, "eval_limit": 40, "batch_size": 20, "lr": 1e-3, "warmup_epochs": 0.0}
TRAIN = "train --backbone tiny --name x/y --epochs 1"
DISTILL = "distill --student test_vit2 --name s --epochs 1"
FAULTS = {
    ("train", "image that is no image"): (f"{TRAIN} --data {{in}}/broken", 4, "broken"),
    ("train", "one class only"): (f"{TRAIN} --data {{in}}/single", 2, "class"),
    ("train", "empty folder"): (f"{TRAIN} --data {{in}}/empty", 2, "empty"),
    ("train", "unknown knob"): (f"{TRAIN} --data vtzoo:fashion --method lora[rnk=2]", 2, "rank"),
    ("train", "method does not fit"): (f"{TRAIN} --data vtzoo:fashion --method residual", 2, "residual"),
    ("train", "impossible image size"): (f"{TRAIN} --data vtzoo:fashion --image-size 50", 2, "50 pixels"),
    ("suggest", "impossible image size"): ("suggest --backbone tiny --budget 0.1 --image-size 50", 2, "50 pixels"),
    ("sensitivity", "impossible image size"): ("sensitivity tiny --data vtzoo:fashion --image-size 8", 2, "8 pixels"),
    ("distill", "impossible image size"): (
        "distill --student test_vit2[pretrained=false] --name s --teacher fashion/lora --data vtzoo:fashion --image-size 50",
        2,
        "50",
    ),
    ("train", "taken name"): (f"{TRAIN} --data vtzoo:fashion --name fashion/lora", 5, "fashion/lora"),
    ("train", "illegal name"): (f"{TRAIN} --data vtzoo:fashion --name ../x", 2, "../x"),
    ("eval", "unknown ref"): ("eval fashion/lorra --data vtzoo:fashion", 3, "fashion/lora"),
    ("eval", "other classes"): ("eval fashion/lora --data vtzoo:emoji", 4, "classes"),
    ("eval", "truncated delta"): ("eval {in}/cut.safetensors --data vtzoo:fashion", 4, "cut.safetensors"),
    ("eval", "not a safetensors file"): ("eval {in}/text.safetensors --data vtzoo:fashion", 4, "text.safetensors"),
    ("predict", "no such image"): ("predict fashion/lora {in}/none.png", 3, "none.png"),
    ("predict", "folder without images"): ("predict fashion/lora {in}/empty", 2, "no images"),
    ("predict", "text as image"): ("predict fashion/lora {in}/text.png", 4, "text.png"),
    ("merge", "another backbone"): ("merge fashion/lora fashion/other --method linear --name m", 4, "other"),
    ("merge", "one coefficient short"): ("merge fashion/lora emoji/ssf --method linear --name m --coef 1", 2, "coef"),
    ("merge", "unknown algorithm"): ("merge fashion/lora emoji/ssf --method tie --name m", 3, "ties"),
    ("merge", "no form in weights"): ("merge fashion/lora fashion/adapter --method linear --name m", 4, "adapter"),
    ("merge", "images that nobody looks at"): (
        "merge fashion/lora emoji/ssf --method ties --name m --data vtzoo:fashion --data vtzoo:emoji",
        2,
        "looks at no images",
    ),
    ("merge", "images of one task only"): (
        "merge fashion/lora emoji/ssf --method regmean --name m --data vtzoo:fashion",
        2,
        "1 times --data for 2 deltas",
    ),
    ("merge", "unknown images"): (
        "merge fashion/lora emoji/ssf --method fisher --name m --data vtzoo:fashion --data vtzoo:emojis",
        3,
        "emoji",
    ),
    ("merge", "images and coordinates"): (
        "merge fashion/lora emoji/ssf --method core+regmean --name m --data vtzoo:fashion --data vtzoo:emoji",
        2,
        "core",
    ),
    ("fold", "not foldable"): ("fold fashion/adapter --out out", 4, "adapter"),
    ("fold", "folder exists"): ("fold fashion/lora --out {in}/empty", 5, "empty"),
    ("fold", "half precision, a tolerance given"): (
        "fold fashion/lora --out out --dtype bfloat16 --tolerance 1e-6",
        4,
        "allowed 1.0e-06",
    ),
    ("fold", "unknown dtype"): ("fold fashion/lora --out out --dtype int3", 2, "int3"),
    ("distill", "teacher without head"): (f"{DISTILL} --teacher tiny --data vtzoo:fashion", 4, "head"),
    ("distill", "other classes"): (f"{DISTILL} --teacher fashion/lora --data vtzoo:emoji", 4, "classes"),
    ("distill", "unknown student"): (
        "distill --student tset_vit --name s --teacher fashion/lora --data vtzoo:fashion",
        3,
        "test_vit",
    ),
    ("export onnx", "unknown ref"): ("export onnx nothing x.onnx", 3, "nothing"),
    ("export onnx", "old operator set"): ("export onnx fashion/lora x.onnx --opset 16", 2, "17 to 23"),
    ("export onnx", "two precisions"): ("export onnx fashion/lora x.onnx --half --int8 dynamic", 2, "not both"),
    ("export onnx", "ranges of nothing"): ("export onnx fashion/lora x.onnx --int8 static", 2, "--data"),
    ("export onnx", "image that is no image"): (
        "export onnx fashion/lora x.onnx --int8 static --data {in}/broken",
        4,
        "1.png",
    ),
    ("export onnx", "folder without images"): (
        "export onnx fashion/lora x.onnx --int8 static --data {in}/empty",
        2,
        "no whole image",
    ),
    ("export onnx", "images twice"): ("export onnx fashion/lora x.onnx --data a --data b", 2, "has images once"),
    ("export onnx", "images of a task"): ("export onnx fashion/lora x.onnx --data a=b", 2, "has images once"),
    ("export onnx", "an export"): ("export onnx {in}/text.onnx x.onnx", 2, "is an export"),
    ("predict", "no ONNX file"): ("predict {in}/text.onnx {in}/whole.png", 4, "can't run"),
    ("predict", "ONNX that says nothing"): ("predict {in}/foreign.onnx {in}/whole.png", 4, "lacks vtzoo.input"),
    ("export onnx", "out of tolerance"): ("export onnx fashion/lora x.onnx --tolerance 0", 4, "differ"),
    ("export pt2", "another suffix"): ("export pt2 fashion/lora x.onnx", 2, "x.pt2"),
    ("export openvino", "out of tolerance"): ("export openvino fashion/lora x.xml --tolerance 0", 4, "differ"),
    ("export openvino", "weights are there"): ("export openvino fashion/lora {in}/taken.xml", 5, "taken.bin"),
    ("predict", "no PT2 file"): ("predict {in}/text.pt2 {in}/whole.png", 4, "torch can run"),
    ("predict", "OpenVINO without weights"): ("predict {in}/text.xml {in}/whole.png", 3, "text.bin"),
    ("predict", "no ExecuTorch file"): ("predict {in}/text.pte {in}/whole.png", 4, "can't run"),
    ("export peft", "no form in PEFT"): ("export peft fashion/adapter out", 4, "adapter"),
    ("export peft", "folder exists"): ("export peft fashion/lora {in}/empty", 5, "empty"),
    ("export peft", "a backbone, not a delta"): ("export peft tiny out", 2, "tiny"),
    ("import peft", "no such folder"): ("import peft {in}/none --backbone tiny --name n", 3, "none"),
    ("import peft", "no adapter in it"): ("import peft {in}/empty --backbone tiny --name n", 3, "adapter_config.json"),
    ("import peft", "a pickle"): ("import peft {in}/pickle --backbone tiny --name n", 4, "pickle"),
    ("import peft", "unknown backbone"): ("import peft {in}/empty --backbone tyni --name n", 3, "tiny"),
    ("import peft", "taken name"): ("import peft {in}/empty --backbone tiny --name fashion/lora", 5, "fashion/lora"),
    ("import lycoris", "no such file"): ("import lycoris {in}/none.safetensors --backbone tiny --name n", 3, "none"),
    ("import lycoris", "not a safetensors file"): (
        "import lycoris {in}/text.safetensors --backbone tiny --name n",
        4,
        "text.safetensors",
    ),
    ("import lycoris", "plain weights"): (
        "import lycoris {in}/tiny.safetensors --backbone tiny --name n",
        4,
        "no module",
    ),
    ("export timm", "a delta, not a model"): ("export timm fashion/adapter out", 2, "adapter"),
    ("add backbone", "another architecture"): (
        "add backbone n --arch test_resnet --weights {in}/tiny.safetensors",
        4,
        "test_resnet",
    ),
    **{
        ("add backbone", wrong): (f"add backbone n --arch test_vit --weights {{in}}/tiny.safetensors {wrong}", 2, said)
        for wrong, said in {
            "--std 0,0,0": "none 0",
            "--std nan,1,1": "nan,1,1",
            "--mean 0.5": "three numbers",
            "--mean 123,117,104": "from 0 to 1",
            "--input-size 0": "whole pixels",
            "--input-size 64.7": "not a size",
            "--input-size 1,28,28": "RGB",
        }.items()
    },
    ("add delta", "incomplete checkpoint"): (
        "add delta d --backbone tiny --weights {in}/part.safetensors",
        4,
        "complete",
    ),
    ("add delta", "labels miscounted"): (
        "add delta d --backbone tiny --weights {in}/tuned.safetensors --classes {in}/labels.txt",
        4,
        "labels.txt",
    ),
    ("show", "ambiguous prefix"): ("show fashion/", 2, "fashion/adapter"),
    ("mv", "no such task"): ("mv fashion/lora x --task fasion=y", 3, "fashion"),
    ("mv", "illegal task"): ("mv fashion/lora x --task fashion=../y", 2, "../y"),
    ("mv", "a task of a backbone"): ("mv tiny x --task fashion=y", 3, "delta"),
    ("rm", "backbone that is needed"): ("rm tiny", 5, "fashion/adapter, fashion/lora"),
    ("rm", "catalogue entry"): ("rm resnet50.a1_in1k", 2, "resnet50"),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Two tiny backbones of one architecture and four deltas."""
    root = tmp_path_factory.mktemp("faults")
    made = Zoo.init(root / "zoo")
    for name in ("tiny", "other"):
        torch.manual_seed(len(name))
        save_file(timm.create_model(ARCH, num_classes=0).state_dict(), root / f"{name}.safetensors")
        add_backbone(name=name, arch=ARCH, weights=root / f"{name}.safetensors", zoo=made)
    for name, method, backbone in (
        ("fashion/lora", "lora[rank=2]", "tiny"), ("emoji/ssf", "ssf", "tiny"),
        ("fashion/adapter", "adapter", "tiny"), ("fashion/other", "lora[rank=2]", "other"),
    ):  # fmt: skip
        train(backbone=backbone, data=f"vtzoo:{name.split('/')[0]}", method=method, name=name, zoo=made, recipe=RECIPE)
    return made


@pytest.fixture(scope="module")
def given(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and files of which each has one thing wrong with it."""
    root = tmp_path_factory.mktemp("given")
    for split in ("train", "val"):
        for kind in ("a", "b"):
            (root / "broken" / split / kind).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(root / "broken" / split / kind / f"{i}.png")
        shutil.copytree(root / "broken" / split / "a", root / "single" / split / "a")
    (root / "broken" / "train" / "a" / "1.png").write_bytes(b"not a picture")
    (root / "empty").mkdir()
    delta = zoo.object(zoo.resolve("fashion/lora").facts["digest"]).read_bytes()
    (root / "cut.safetensors").write_bytes(delta[:-100])
    (root / "text.safetensors").write_text("hello")
    (root / "text.png").write_text("hello")
    for suffix in ("onnx", "pt2", "xml", "pte"):
        (root / f"text.{suffix}").write_text("hello")
    (root / "taken.bin").write_text("hello")
    Image.new("RGB", (32, 32)).save(root / "whole.png")
    ports = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", ports[:1], ports[1:])
    sets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=sets, ir_version=8), root / "foreign.onnx")
    tuned = timm.create_model(ARCH, num_classes=4).state_dict()
    save_file(tuned, root / "tuned.safetensors")
    save_file({n: tuned[n] for n in list(tuned)[:-4]}, root / "part.safetensors")
    save_file(timm.create_model(ARCH, num_classes=0).state_dict(), root / "tiny.safetensors")
    (root / "labels.txt").write_text("one\ntwo\n")
    (root / "pickle").mkdir()
    (root / "pickle" / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["qkv"]}')
    (root / "pickle" / "adapter_model.bin").write_bytes(b"")
    return root


@pytest.mark.parametrize(("verb", "fault"), FAULTS)
def test_a_fault_is_two_lines_and_leaves_nothing(
    verb: str, fault: str, zoo: Zoo, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What was seen and what to do, the exit code, and the same files as before in zoo, working and temporary folder."""
    line, code, said = FAULTS[verb, fault]
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = _files(zoo.root)
    got = main([*line.replace("{in}", str(given)).split(), "--zoo", str(zoo.root), "--quiet"])
    out, err = capsys.readouterr()
    lines = err.splitlines()
    _show(capsys, verb, fault, got, lines)
    assert (got, out) == (code, "")
    assert [w.split(":")[0] for w in lines] == ["error", "hint"]
    assert said in err
    assert _files(zoo.root) == before
    assert _files(here) == _files(temporary) == {}


FULL = {
    "train": "train --backbone tiny --data vtzoo:fashion --method full --name x/y --epochs 1 --set limit=40 --batch-size 20",
    "merge": "merge fashion/lora emoji/ssf --method linear --name m",
    "fold": "fold fashion/lora --out out",
    "distill": "distill --teacher fashion/lora --student test_vit2 --data vtzoo:fashion --name s --epochs 1 --set limit=40 --views 1",
    "export onnx": "export onnx fashion/lora out.onnx",
    "export pt2": "export pt2 fashion/lora out.pt2",
    "export openvino": "export openvino fashion/lora out.xml",
    "export peft": "export peft fashion/lora out",
    "add backbone": "add backbone n --arch test_vit --weights {in}/tiny.safetensors",
    "add delta": "add delta d --backbone tiny --weights {in}/tuned.safetensors",
}
ROOM = 60_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, 32 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root on Linux")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("verb", FULL)
def test_a_full_disk_leaves_nothing(
    verb: str, zoo: Zoo, given: Path, disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zoo and output on a disk with a few pages left: exit code 7, and every file is what it was."""
    shutil.copytree(zoo.root, disk / "zoo")
    monkeypatch.chdir(disk)
    with (disk / "filler").open("wb") as filler:
        filler.write(bytes(shutil.disk_usage(disk).free - ROOM))
    before = _files(disk)
    got = main([*FULL[verb].replace("{in}", str(given)).split(), "--zoo", str(disk / "zoo"), "--quiet"])
    lines = capsys.readouterr().err.splitlines()
    _show(capsys, verb, "full disk", got, lines)
    assert got == 7, lines
    assert [w.split(":")[0] for w in lines] == ["error", "hint"]
    assert _files(disk) == before


def _show(capsys: pytest.CaptureFixture[str], verb: str, fault: str, code: int, lines: list[str]) -> None:
    if os.environ.get("VTZOO_SHOW"):
        with capsys.disabled():
            print(f"{verb:13}| {fault:24}| {code} | {' / '.join(lines)}")


def _files(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}
