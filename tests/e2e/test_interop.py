"""Out to PEFT and back through the command line, labels and all; files from elsewhere; what is refused leaves nothing."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vtzoo.artifact import go_live, open_ref
from vtzoo.delta import Delta
from vtzoo.errors import Conflict, Corrupt, ExportMismatch, Mismatch, ShapeMismatch, UsageError, WrongBackbone
from vtzoo.interop import peft as format_
from vtzoo.tensors import write
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.bring.lycoris import import_lycoris
from vtzoo.verbs.bring.peft import import_peft
from vtzoo.verbs.export.peft import export_peft
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

peft = pytest.importorskip("peft")
ARCH = "test_vit"
RECIPE = {"epochs": 1, "limit": 40, "eval_limit": 40, "batch_size": 20, "lr": 1e-2, "warmup_epochs": 0.0}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Two tiny backbones of one architecture and three deltas."""
    root = tmp_path_factory.mktemp("zoo")
    made = Zoo.init(root / "zoo")
    for name in ("tiny", "other"):
        torch.manual_seed(len(name))
        save_file(timm.create_model(ARCH, num_classes=0).state_dict(), root / f"{name}.safetensors")
        add_backbone(name=name, arch=ARCH, weights=root / f"{name}.safetensors", zoo=made)
    for name, method in (
        ("fashion/lora", "lora[rank=2]"),
        ("emoji/dora", "lora[rank=2,dora=true,qkv=qv,targets=qkv]"),
        ("emoji/ssf", "ssf"),
    ):
        train(backbone="tiny", data=f"vtzoo:{name.split('/')[0]}", method=method, name=name, zoo=made, recipe=RECIPE)
    return made


def _delta(zoo: Zoo, name: str) -> Delta:
    return Delta.open(zoo.object(zoo.resolve(name).facts["digest"]))


@pytest.mark.parametrize("ref", ["fashion/lora", "emoji/dora"])
@torch.no_grad()
def test_peft_loads_what_is_written(zoo: Zoo, ref: str, tmp_path: Path) -> None:
    """On the same timm net PEFT's model gives the attached delta's logits; the report says what was checked."""
    report = export_peft(ref=ref, out=tmp_path / "out", zoo=zoo).report
    assert report["max_rel"] <= 1e-6
    assert report["peft_type"] == "LORA"
    live = go_live(open_ref(ref, zoo))
    base = go_live(open_ref("tiny", zoo)).model
    base.reset_classifier(len(live.task.classes))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    x = torch.randn(3, *live.preprocess.input_size)
    a, b = live.model(x), theirs(x)
    assert float((a - b).abs().max() / a.abs().max()) < 1e-5
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "vtzoo.json",
    }
    with pytest.raises(Conflict):
        export_peft(ref=ref, out=tmp_path / "out", zoo=zoo)


def test_there_and_back_through_the_command_line(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The delta that comes back has the tensors, labels, preprocessing, recipe and metrics of the one that went."""
    out, where = str(tmp_path / "out"), ["--zoo", str(zoo.root)]
    assert main(["export", "peft", "fashion/lora", out, *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["modules"] == len(_delta(zoo, "fashion/lora").parts[0].sites)
    assert main(["import", "peft", out, "--backbone", "tiny", "--name", "fashion/back", *where]) == 0
    assert "imported as fashion/back" in capsys.readouterr().out
    before, after = _delta(zoo, "fashion/lora"), _delta(zoo, "fashion/back")
    assert {n: t.tolist() for n, t in after.tensors.items()} == {n: t.tolist() for n, t in before.tensors.items()}
    assert (after.tasks, after.method, after.recipe, after.metrics) == (
        before.tasks,
        before.method,
        before.recipe,
        before.metrics,
    )
    assert after.lineage["verb"] == "import"
    assert zoo.resolve("fashion/back").facts["method"] == "lora[rank=2]"


def test_a_folder_from_elsewhere(zoo: Zoo, tmp_path: Path) -> None:
    """Without vtzoo.json labels come from a file, else they are numbers; the task from --task, else from the name."""
    base = go_live(open_ref("tiny", zoo)).model
    base.reset_classifier(3)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    (tmp_path / "labels.txt").write_text("a\nb\n\nc\n")
    given = {"folder": tmp_path / "theirs", "backbone": "tiny", "zoo": zoo}
    import_peft(**given, name="pets/one", classes=tmp_path / "labels.txt", task="cats")
    import_peft(**given, name="pets/two")
    assert [(t.name, t.classes) for n in ("one", "two") for t in _delta(zoo, f"pets/{n}").tasks] == [
        ("cats", ("a", "b", "c")),
        ("pets", ("0", "1", "2")),
    ]
    with pytest.raises(UsageError, match=r"\.\./x"):
        import_peft(**given, name="pets/three", task="../x")
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(ShapeMismatch, match=r"labels\.txt has 2 classes, the head 3"):
        import_peft(**given, name="pets/three", classes=tmp_path / "labels.txt")
    (tmp_path / "theirs" / "vtzoo.json").write_text('{"tasks": [{"name": "x"}]}')
    with pytest.raises(Corrupt, match=r"vtzoo\.json garbles its task"):
        import_peft(**given, name="pets/three")
    (tmp_path / "theirs" / "vtzoo.json").write_text('{"backbone": 3}')
    with pytest.raises(Corrupt, match=r"vtzoo\.json garbles its backbone"):
        import_peft(**given, name="pets/three")
    with pytest.raises(Conflict):
        import_peft(**given, name="pets/two")


def test_other_weights_are_noticed(zoo: Zoo, tmp_path: Path) -> None:
    """PEFT loads an adapter onto any weights of the right shapes; vtzoo.json knows which they were."""
    export_peft(ref="fashion/lora", out=tmp_path / "out", zoo=zoo)
    with pytest.raises(WrongBackbone, match=r"vtzoo\.json says it was made for tiny"):
        import_peft(folder=tmp_path / "out", backbone="other", name="fashion/other", zoo=zoo)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "third.safetensors")
    add_backbone(name="third", arch="test_resnet", weights=tmp_path / "third.safetensors", zoo=zoo)
    with pytest.raises(WrongBackbone, match=r"vtzoo\.json says it was made for tiny"):
        import_peft(folder=tmp_path / "out", backbone="third", name="fashion/other", zoo=zoo)


def test_numbers_that_break_the_network(zoo: Zoo, tmp_path: Path) -> None:
    """NaN in a file is refused before an entry is made."""
    export_peft(ref="fashion/lora", out=tmp_path / "out", zoo=zoo)
    path = tmp_path / "out" / format_.WEIGHTS
    tensors = load_file(path)
    next(t for n, t in tensors.items() if n.endswith("lora_B.weight"))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(Corrupt, match="NaN"):
        import_peft(folder=tmp_path / "out", backbone="tiny", name="fashion/nan", zoo=zoo)


def test_what_is_written_is_read_back(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a wrong number written, the folder would not appear."""

    def wrong(path: Path, tensors: dict[str, torch.Tensor], *rest: object) -> str:
        return write(path, {n: t * 1.01 if "lora_A" in n else t for n, t in tensors.items()}, *rest)

    monkeypatch.setattr(format_, "write", wrong)
    with pytest.raises(ExportMismatch, match="read back, the outputs differ"):
        export_peft(ref="fashion/lora", out=tmp_path / "out", zoo=zoo)
    assert not list(tmp_path.iterdir())


def test_one_task_of_a_merge(zoo: Zoo, tmp_path: Path) -> None:
    """What has no form in PEFT is refused, and so is a delta of many tasks without a task."""
    merge_refs(refs=["fashion/lora", "emoji/ssf"], method="linear", name="both", zoo=zoo)
    with pytest.raises(Mismatch, match="PEFT has no form of"):
        export_peft(ref="both", out=tmp_path / "out", task="emoji", zoo=zoo)
    with pytest.raises(Mismatch, match="PEFT has no form of ssf"):
        export_peft(ref="emoji/ssf", out=tmp_path / "out", zoo=zoo)
    assert not list(tmp_path.iterdir())


def test_a_lycoris_file(zoo: Zoo, tmp_path: Path) -> None:
    """A file without a head becomes a delta without a task, which folds and merges as any other."""
    site, width = "lycoris_blocks_0_attn_qkv", 64
    tensors = {
        f"{site}.lora_down.weight": torch.randn(2, width),
        f"{site}.lora_up.weight": torch.randn(3 * width, 2),
        f"{site}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    import_lycoris(file=tmp_path / "a.safetensors", backbone="tiny", name="style", zoo=zoo)
    delta = _delta(zoo, "style")
    assert delta.tasks == ()
    assert delta.method == "lora[rank=2,alpha=1,targets=blocks.0.attn.qkv]"
    assert delta.lineage["format"] == "lycoris"
    assert main(["fold", "style", "--out", str(tmp_path / "folded"), "--zoo", str(zoo.root), "--quiet"]) == 0
