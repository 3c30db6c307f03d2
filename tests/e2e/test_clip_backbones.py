"""Models of open_clip as backbones: from its list, a folder that it wrote, the hub (a server on loopback), and a pickle."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.hub_server import Hub
from vtzoo import build
from vtzoo.backbone import build_card, card_of, create
from vtzoo.bases import open_base
from vtzoo.clip_card import card_of_config, clip_card
from vtzoo.errors import Corrupt, Mismatch, NotFound, ShapeMismatch, UsageError
from vtzoo.files import sha256
from vtzoo.fingerprint import fingerprint
from vtzoo.identity import CARD
from vtzoo.live import extract, inject
from vtzoo.spec import BackboneCard
from vtzoo.verbs.add import add_backbone, add_delta, add_published
from vtzoo.verbs.fold import fold_ref
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

open_clip = pytest.importorskip("open_clip")

CONFIG: dict[str, Any] = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
REPO = "lab/CLIP-tiny"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model called Tiny-8 in open_clip's own list, with weights `lab` on the hub."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-8", CONFIG)
    tag = open_clip.pretrained._slpcfg(hf_hub=f"{REPO}/", quick_gelu=True)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-8", {"lab": tag})


@pytest.fixture
def theirs() -> nn.Module:
    """open_clip's own model."""
    return open_clip.create_model("Tiny-8", force_preprocess_cfg={"resize_mode": "longest"}).eval()


@pytest.fixture
def folder(theirs: nn.Module, tmp_path: Path) -> Path:
    """What open_clip writes of it, as safetensors and as a pickle."""
    where = tmp_path / "folder"
    where.mkdir()
    write_config = import_module("open_clip.push_to_hf_hub").save_config_for_hf  # a function has the module's name
    write_config(theirs, where / "open_clip_config.json", CONFIG)
    save_file(theirs.state_dict(), where / "open_clip_model.safetensors")
    torch.save(theirs.state_dict(), where / "open_clip_pytorch_model.bin")
    return where


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """An empty zoo."""
    return Zoo.init(tmp_path / "zoo")


def _close(mine: nn.Module, theirs: Any) -> bool:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return torch.allclose(mine(x), theirs.encode_image(x, normalize=True), atol=1e-6)


def test_a_folder_of_open_clip(folder: Path, theirs: nn.Module, zoo: Zoo) -> None:
    """The file is kept as it is and read by our names; what the config says of images is kept, too."""
    add_published(name="tiny", source=str(folder), license="mit", zoo=zoo)
    facts = zoo.resolve("tiny").facts
    assert facts["digest"] == sha256(folder / "open_clip_model.safetensors")
    assert facts["source"] == f"object:sha256:{facts['digest']}"
    assert (facts["arch"], facts["features"], facts["license"], facts["crop_mode"]) == ("clip", 20, "mit", "border")
    assert facts["params"] == sum(p.numel() for p in theirs.parameters())
    model = build("tiny", zoo=zoo)
    assert _close(model, theirs)
    base = open_base(BackboneCard.of("tiny", facts), zoo)
    assert facts["fingerprint"] == fingerprint(base) == getattr(model, CARD).fingerprint
    assert torch.equal(base["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight)


@pytest.fixture
def folded(folder: Path, zoo: Zoo, tmp_path: Path) -> Path:
    """A delta on it, folded: an image classifier in a timm folder."""
    add_published(name="tiny", source=str(folder), zoo=zoo)
    model = build("tiny", zoo=zoo)
    inject(model, "lora[rank=2]")
    extract(model).save(tmp_path / "delta.safetensors")
    fold_ref(ref=str(tmp_path / "delta.safetensors"), out=tmp_path / "folded", headless=True, zoo=zoo)
    return tmp_path / "folded"


def test_the_licence_is_not_that_of_its_image_towers_twin(folded: Path, zoo: Zoo) -> None:
    """timm states one for its own weights of the same network; where none was told, a folded model says none."""
    said = json.loads((folded / "config.json").read_text())
    assert "license" not in said["pretrained_cfg"]
    add_published(name="again", source=str(folded), zoo=zoo)
    assert (zoo.resolve("again").facts["license"], zoo.resolve("again").facts["features"]) == ("", 20)
    assert torch.equal(build("again", zoo=zoo).pos_embed, build("tiny", zoo=zoo).pos_embed)


def test_a_folded_one_of_the_hub(hub: Hub, folded: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm folder of an image classifier is fetched by timm's names, offline from the cache; one with a text tower is no such."""
    files = {p.name: p.read_bytes() for p in folded.iterdir()}
    hub.add("lab/folded", files)
    add_published(name="again", source="lab/folded", zoo=zoo)
    monkeypatch.setenv("VTZOO_OFFLINE", "1")
    assert torch.equal(build("again", zoo=zoo).pos_embed, build("tiny", zoo=zoo).pos_embed)
    monkeypatch.delenv("VTZOO_OFFLINE")
    said = json.loads(files["config.json"])
    said["model_args"] = zoo.resolve("tiny").facts["model_args"]
    hub.add("lab/whole", {**files, "config.json": json.dumps(said).encode()})
    with pytest.raises(Mismatch, match="a dual encoder as a timm folder"):
        add_published(name="whole", source="lab/whole", zoo=zoo)


def test_a_delta_on_it(folder: Path, zoo: Zoo) -> None:
    """What is trained on it stands on its fingerprint and its arguments."""
    add_published(name="tiny", source=str(folder), zoo=zoo)
    model = build("tiny", zoo=zoo)
    inject(model, "lora[rank=2]")
    delta = extract(model)
    assert delta.backbone.fingerprint == zoo.resolve("tiny").facts["fingerprint"]
    assert delta.backbone.model_args == zoo.resolve("tiny").facts["model_args"]
    assert {name.partition(".")[0] for name in delta.tensors} == {"blocks"}


def test_a_repository_of_open_clip(hub: Hub, folder: Path, theirs: nn.Module, zoo: Zoo) -> None:
    """A config.json of another library does not hide open_clip's; the entry is pinned, and fetched once."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".safetensors")}
    commit = hub.add(
        REPO, {**files, "config.json": b'{"architectures": ["CLIPModel"]}', "README.md": b"---\nlicense: mit\n---\n"}
    )
    add_published(name="tiny", source=f"hf-hub:{REPO}", zoo=zoo)
    facts = zoo.resolve("tiny").facts
    assert (facts["source"], facts["license"]) == (f"hf-hub:{REPO}@{commit}", "mit")
    moved = hub.moved("/cdn/")
    assert _close(build("tiny", zoo=zoo), theirs)
    assert hub.moved("/cdn/") == moved == (folder / "open_clip_model.safetensors").stat().st_size


def test_a_model_of_the_list(hub: Hub, folder: Path, theirs: nn.Module, zoo: Zoo) -> None:
    """`clip:NAME.TAG` is a backbone without any entry; what is made with it remembers the commit; kept as an entry, it is pinned."""
    commit = hub.add(REPO, {"open_clip_model.safetensors": (folder / "open_clip_model.safetensors").read_bytes()})
    model = build("clip:Tiny-8.lab", zoo=zoo)
    card = getattr(model, CARD)
    assert (card.name, card.source) == ("clip:Tiny-8.lab", f"hf-hub:{REPO}@{commit}")
    assert (card.preprocess.crop_mode, card.preprocess.mean) == ("squash", (0.5, 0.5, 0.5))
    assert card.model_args["text"]["act"] == card.model_args["trunk_args"]["act_layer"] == "quick_gelu"
    assert not _close(model, theirs)  # whose activations are others
    assert fingerprint(open_base(card, zoo)) == card.fingerprint
    silent = build("clip:Tiny-8.lab", zoo=zoo, text=False)
    again = build_card(getattr(silent, CARD), zoo=zoo)
    assert torch.equal(again.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    add_published(name="tiny", source="clip:Tiny-8.lab", zoo=zoo)
    assert zoo.resolve("tiny").facts["source"] == card.source
    assert zoo.resolve("tiny").facts["fingerprint"] == card.fingerprint


def test_weights_that_are_a_pickle(hub: Hub, folder: Path, theirs: nn.Module, zoo: Zoo) -> None:
    """Where a repository has no other, it is said how they come in; they come in by --from-pickle alone."""
    pickled = folder / "open_clip_pytorch_model.bin"
    hub.add(REPO, {pickled.name: pickled.read_bytes()})
    with pytest.raises(NotFound) as refused:
        build("clip:Tiny-8.lab", zoo=zoo)
    assert "--arch clip:MODEL.TAG --weights FILE --from-pickle" in refused.value.hint
    assert not hub.moved("/cdn/")
    with pytest.raises(Mismatch, match="pickle"):
        add_backbone(name="tiny", arch="clip:Tiny-8", weights=pickled, zoo=zoo)
    add_backbone(name="tiny", arch="clip:Tiny-8", weights=pickled, from_pickle=True, zoo=zoo)
    assert _close(build("tiny", zoo=zoo), theirs)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(Mismatch, match="pickle"):
        add_published(name="folder", source=str(folder), zoo=zoo)


def test_without_a_tag_it_is_random(zoo: Zoo) -> None:
    """The network is known, and there is nothing to load."""
    assert build("clip:Tiny-8", zoo=zoo, pretrained=False).embed_dim == 20
    with pytest.raises(UsageError, match="has no weights"):
        build("clip:Tiny-8", zoo=zoo)


@pytest.mark.parametrize(
    ("name", "quick", "crop", "source"),
    [
        ("ViT-B-32.openai", True, "center", "hf-hub:timm/vit_base_patch32_clip_224.openai"),
        ("ViT-B-32.laion2b_s34b_b79k", False, "center", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("ViT-B/16.dfn2b", True, "center", "hf-hub:apple/DFN2B-CLIP-ViT-B-16"),
        ("ViT-B-16-SigLIP2.webli", False, "squash", "hf-hub:timm/ViT-B-16-SigLIP2"),
        ("ViTamin-S.datacomp1b", False, "center", "hf-hub:jienengchen/ViTamin-S"),
    ],
)
def test_what_a_tag_says(name: str, quick: bool, crop: str, source: str) -> None:
    """QuickGELU and the crop are the weights', not the config's; "/" in a name is open_clip's "-"."""
    card = clip_card(f"clip:{name}")
    assert (card.model_args["text"].get("act") == "quick_gelu") == quick
    assert (card.preprocess.crop_mode, card.source) == (crop, source)


@pytest.mark.parametrize(
    ("ref", "hint"),
    [("clip:ViT-B-23", "ViT-B-32"), ("clip:ViT-B-32.opnai", "openai"), ("clip:ViT-S-16.x", "leave the tag out")],
)
def test_unknown_names_and_tags(ref: str, hint: str) -> None:
    """The nearest is named."""
    with pytest.raises(NotFound) as refused:
        card_of(ref)
    assert hint in refused.value.hint


def test_without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UsageError, match="need open_clip") as refused:
        card_of("clip:ViT-B-32")
    assert refused.value.hint == "pip install 'vtzoo[clip]'"


def test_what_is_no_such_folder(folder: Path, zoo: Zoo, tmp_path: Path) -> None:
    """No config, one that says nothing, images that can't be made ready, weights of another model."""
    with pytest.raises(NotFound, match=r"neither open_clip_config\.json nor config\.json"):
        add_published(name="a", source=str(tmp_path), zoo=zoo)
    config = folder / "open_clip_config.json"
    said = json.loads(config.read_text())
    for changed, error in (
        ({"preprocess_cfg": {}}, Corrupt),
        ({**said, "preprocess_cfg": {"resize_mode": "tile"}}, UsageError),
        ({**said, "preprocess_cfg": {"mean": "grey"}}, Corrupt),
        ({**said, "model_cfg": {**CONFIG, "embed_dim": 24}}, ShapeMismatch),
        ({**said, "model_cfg": {**CONFIG, "vision_cfg": {"timm_model_name": "test_vit"}}}, ShapeMismatch),
    ):
        config.write_text(json.dumps(changed))
        with pytest.raises(error):
            add_published(name="a", source=str(folder), zoo=zoo)
    assert not [e for e in zoo.entries("backbones") if not e.builtin]


@pytest.mark.parametrize(
    "args", [{"trunk": "hf-hub:lab/other"}, {"trunk": "clip"}, {"trunk_args": {"checkpoint_path": "x.pth"}}]
)
def test_a_card_of_a_stranger_loads_nothing(args: dict[str, Any]) -> None:
    """An image tower that timm would fetch, or arguments that read a file, are refused where a network is built, and in a file."""
    made = {**card_of_config(CONFIG, {}).model_args, **args}
    with pytest.raises(UsageError):
        create("clip", **made)
    if "trunk_args" in args:
        with pytest.raises(Corrupt, match="reads files"):
            BackboneCard.of("x", {"arch": "clip", "model_args": made})


def test_a_checkpoint_with_a_text_tower_is_no_delta(folder: Path, zoo: Zoo) -> None:
    """A full delta would leave the text tower out without a word."""
    add_published(name="tiny", source=str(folder), zoo=zoo)
    with pytest.raises(UsageError, match="text tower"):
        add_delta(name="a/full", backbone="tiny", weights=folder / "open_clip_model.safetensors", zoo=zoo)


def test_the_command_line(
    folder: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder and a file, each in one line."""
    where = ["--zoo", str(zoo.root)]
    monkeypatch.chdir(folder.parent)
    assert main([*where, "add", "backbone", "a", "--from", "./folder"]) == 0
    weights = ["--weights", "folder/open_clip_model.safetensors"]
    assert main([*where, "add", "backbone", "b", "--arch", "clip:Tiny-8", *weights, "--license", "mit"]) == 0
    assert main([*where, "add", "backbone", "c", "--arch", "clip:Tiny-9", *weights]) == 3
    assert "did you mean Tiny-8" in capsys.readouterr().err
    assert main([*where, "ls", "backbones"]) == 0
    assert zoo.resolve("a").facts["digest"] == zoo.resolve("b").facts["digest"]
