"""The licence of a backbone goes wherever its weights go, and is shown."""

import json
from pathlib import Path

import onnxruntime
import pytest

from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.distill import distill
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.export.timm import export_timm
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

LICENSE, QUICK = "cc-by-nc-4.0", {"epochs": 1, "limit": 20, "batch_size": 10, "image_size": 32}


def test_along_the_whole_chain(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Backbone, delta, merge, folded model, student and ONNX: in each file, in the index, in `ls` and in `show`."""
    add_backbone(name="grey", arch="test_vit", weights=tmp_path / "tiny.safetensors", license=LICENSE, zoo=zoo)
    for task in ("emoji", "clipart"):
        train(
            backbone="grey",
            data=f"vtzoo:{task}",
            method="lora[rank=1]",
            name=f"{task}/a",
            zoo=zoo,
            recipe={**QUICK, "eval_limit": 20},
        )
    merge_refs(refs=["emoji/a", "clipart/a"], method="linear", name="both", zoo=zoo)
    fold_ref(ref="both", out=tmp_path / "folded", task="emoji", name="emoji/folded", zoo=zoo)
    distill(
        teachers=["emoji/a"],
        student="test_vit[depth=1]",
        data="vtzoo:emoji",
        name="emoji/student",
        zoo=zoo,
        recipe=QUICK,
        views=1,
    )
    export_onnx(ref="both", task="emoji", out=tmp_path / "m.onnx", name="emoji/onnx", zoo=zoo)
    export_timm(ref="emoji/student", out=tmp_path / "student", zoo=zoo)

    made = ["emoji/a", "clipart/a", "both", "emoji/folded", "emoji/student", "emoji/onnx"]
    assert {n: zoo.resolve(n).facts["license"] for n in made} == dict.fromkeys(made, LICENSE)
    for folder in ("folded", "student"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["pretrained_cfg"]["license"] == LICENSE
    said = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_modelmeta().custom_metadata_map
    assert said["vtzoo.license"] == LICENSE
    for words in (["ls", "deltas"], ["ls", "models"], *(["show", n] for n in ("grey", *made))):
        capsys.readouterr()
        assert main(["--zoo", str(zoo.root), *words]) == 0
        assert LICENSE in capsys.readouterr().out, words


def test_older_indexes_leave_it_to_the_file(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has no licence in the index is shown with that of its header or config."""
    train(
        backbone="tiny",
        data="vtzoo:emoji",
        method="lora[rank=1]",
        name="emoji/a",
        zoo=zoo,
        recipe={**QUICK, "eval_limit": 20},
    )
    fold_ref(ref="emoji/a", out=tmp_path / "folded", name="emoji/folded", zoo=zoo)
    for name in ("emoji/a", "emoji/folded"):
        entry = zoo.resolve(name)
        facts = {k: v for k, v in entry.facts.items() if k != "license"}
        zoo.put(entry.section, name, facts, replace=True)
        capsys.readouterr()
        assert main(["--zoo", str(zoo.root), "--json", "show", name]) == 0
        assert json.loads(capsys.readouterr().out)["license"] == "apache-2.0"
