"""Folders that PEFT loads, and PEFT's folders as deltas: the same logits in float64 both ways, and what is refused."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from tests import families
from vtzoo.anatomy import survey
from vtzoo.delta import Delta
from vtzoo.errors import Corrupt, DeadTarget, Mismatch, NotFound, ShapeMismatch
from vtzoo.graft import tensors_of
from vtzoo.identity import card_on
from vtzoo.installed import head_state
from vtzoo.interop import peft as P
from vtzoo.interop._parts import Origin, assemble
from vtzoo.live import attach, extract, inject
from vtzoo.spec import Task

peft = pytest.importorskip("peft")

SAME = [  # tensors come back bit for bit
    ("lora[rank=3,alpha=5]", "vit"),
    ("lora[rank=3]", "swin"),
    ("lora[rank=3,rs=true,alpha=2]", "vit"),
    ("lora[rank=3,alpha=5,ranks=fc1:2|proj:5]", "vit"),
    ("lora[rank=3,ranks=fc1:2]", "vit"),
    ("lora[rank=12,alpha=5]", "resnet"),  # more than some of its layers hold
    ("lora[rank=3,dora=true]", "vit"),
    ("lora[rank=3,dora=true,alpha=5]", "resnet"),
    ("loha[rank=2,alpha=5]", "vit"),
    ("loha[rank=2,alpha=2]", "regnet"),
    ("lokr[rank=3,alpha=5]", "vit"),
    ("lokr[rank=1,alpha=2,decompose_both=true]", "resnet"),
    ("lokr[rank=2,alpha=3,factor=3]", "swin"),
    ("ia3[outputs=proj,inputs=fc2]", "vit"),
    ("ia3", "pvt"),
    ("ia3", "regnet"),
    ("oft[block=8]", "vit"),
    ("oft[block=15,share=true]", "swin"),
    ("oft[block=8,eps=0.0625]", "vit"),
    ("boft[block=8,factors=2]", "vit"),
    ("vera[rank=3,seed=2]", "vit"),
    ("norm", "vit"),
    ("norm", "resnet"),
]
CHANGED = [  # the same function in other tensors
    ("lora[rank=3,alpha=5,init=pissa]", "vit"),
    ("lora[rank=3,alpha=5,qkv=qv,targets=qkv]", "vit"),
    ("lora[rank=3,alpha=5,qkv=kv]", "vit"),
    ("lora[rank=2,rs=true,init=pissa,qkv=qv]", "swin"),
    ("lora[rank=3,dora=true,qkv=qv,targets=qkv]", "vit"),
    ("ia3", "vit"),
    ("shira[fraction=0.05,seed=4]", "vit"),
    ("shira[fraction=0.1,mask=magnitude,targets=qkv]", "vit"),
]
WRITTEN = {  # PEFT's own configs, other ways of saying the same
    "ends of names": ("vit", lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["qkv", "fc1"], modules_to_save=["head"])),
    "expression": ("vit", lambda: peft.LoraConfig(r=4, target_modules=r".*\.(proj|fc2)")),
    "no head": ("swin", lambda: peft.LoraConfig(r=2, target_modules=["qkv"])),
    "rank above all": ("vit", lambda: peft.LoraConfig(r=40, lora_alpha=3, target_modules=["qkv", "proj"])),
    "patterns": ("vit", lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["qkv", "fc1"], rank_pattern={r"blocks\.1.*fc1": 7, "qkv": 2}, alpha_pattern={"0.mlp.fc1": 11})),
    "rs patterns": ("vit", lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=["qkv", "fc1"], alpha_pattern={"fc1": 3})),
    "gaussian": ("resnet", lambda: peft.LoraConfig(r=4, target_modules=["conv2"], init_lora_weights="gaussian", use_dora=True)),
    "loha": ("vit", lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=["qkv", "fc1"], rank_pattern={"fc1": 2}, alpha_pattern={"qkv": 3})),
    "lokr": ("vit", lambda: peft.LoKrConfig(r=4, alpha=6, target_modules=["qkv", "fc1"], decompose_factor=4)),
    "ia3": ("vit", lambda: peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"])),
    "oft": ("vit", lambda: peft.OFTConfig(oft_block_size=8, target_modules=["qkv"], use_cayley_neumann=False)),
    "boft": ("vit", lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["fc2"])),
    "vera": ("vit", lambda: peft.VeraConfig(r=5, target_modules=["qkv", "fc1"])),
    "shira": ("vit", lambda: peft.ShiraConfig(r=2, target_modules=["qkv", "fc1"], random_seed=3)),
    "norms": ("vit", lambda: peft.LNTuningConfig(target_modules=["norm1", "norm2"])),
    "batch norms": ("resnet", lambda: peft.LNTuningConfig(target_modules=["bn1"])),
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # PEFT's, at norms
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]


class _Blocks:
    """What PEFT's extension for CUDA does: [n, d, h, h] -> [n, d h, d h]."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*row) for row in blocks])]


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's BOFT wants to compile an extension."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: _Blocks)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def _ours(spec: str, family: str) -> tuple[nn.Module, Delta]:
    model = inject(families.build(family), spec, batches=families.labelled(family))
    families.perturb(tensors_of(model), scale=0.2)
    families.perturb(head_state(model))
    return model.eval(), extract(model)


def _write(delta: Delta, family: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    head = dict(delta.head("task")) if delta.tasks else {}
    config, tensors = P.pack(delta, survey(families.build(family)), head)
    P.save(folder, config, tensors, delta.header())
    return config


def _read(folder: Path, family: str) -> Delta:
    bare = families.build(family)
    read = P.load(folder, survey(bare))
    task = Task(name="task", classes=tuple(map(str, range(families.CLASSES)))) if read.head else None
    return assemble(read.pieces, read.head, Origin(card=card_on(bare), task=task))


@torch.no_grad()
def _logits(delta: Delta, family: str) -> Tensor:
    return attach(families.build(family), delta, task=None if delta.tasks else "")(families.batch(family))


@torch.no_grad()
def _pefts(folder: Path, family: str) -> Tensor:
    return peft.PeftModel.from_pretrained(families.build(family), folder).eval()(families.batch(family))


@pytest.mark.parametrize(("spec", "family"), [*SAME, *CHANGED])
def test_there_and_back(spec: str, family: str, tmp_path: Path, agree) -> None:
    """PEFT loads the folder without a warning and gives our logits; read back it is the delta, its tensors bit for bit or as a function."""
    model, delta = _ours(spec, family)
    x = families.batch(family)
    with torch.no_grad():
        live, plain = model(x), families.build(family)(x)
    assert _difference(live, plain) > 1e-3
    config = _write(delta, family, tmp_path / "out")
    back = _read(tmp_path / "out", family)
    agree(spec, f"PEFT's folder, {family}", 1e-12, theirs=_difference(live, _pefts(tmp_path / "out", family)), back=_difference(live, _logits(back, family)))  # fmt: skip
    if (spec, family) not in SAME:
        return
    assert {n: t.tolist() for n, t in back.tensors.items()} == {n: t.tolist() for n, t in delta.tensors.items()}
    assert back.parts[0].method == delta.parts[0].method
    again = _write(back, family, tmp_path / "again")
    assert again == config
    one, two = (load_file(tmp_path / d / P.WEIGHTS) for d in ("out", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_boft_of_pefts_without_its_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agree) -> None:
    """Where PEFT can't compile its kernel it makes one factor and leaves another count in the config: the tensors tell."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["fc2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(families.build("vit"), config).double()
    families.perturb({n: p.data for n, p in model.named_parameters() if p.requires_grad}, scale=0.2)
    model.eval().save_pretrained(tmp_path / "theirs")
    delta = _read(tmp_path / "theirs", "vit")
    assert delta.parts[0].config.factors == 1
    with torch.no_grad():
        wanted = model(families.batch("vit"))
    agree("boft, no kernel", "PEFT's folder, vit", 1e-12, read=_difference(wanted, _logits(delta, "vit")))


def test_dora_without_direction_is_refused() -> None:
    """A row of zeros has another length in PEFT's DoRA than in ours."""
    model = families.build("vit")
    model.blocks[0].mlp.fc1.weight.data[3] = 0
    delta = extract(inject(model, "lora[rank=2,dora=true]"))
    with pytest.raises(Mismatch, match=r"blocks\.0\.mlp\.fc1 has a row of zeros"):
        P.pack(delta, survey(model), {})


@pytest.mark.parametrize("case", WRITTEN)
def test_pefts_own_folder(case: str, tmp_path: Path, agree) -> None:
    """What PEFT saves is read, gives its logits, and written again still does."""
    family, config = WRITTEN[case]
    model = peft.get_peft_model(families.build(family), config()).double()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    families.perturb({n: p.data for n, p in trained.items()}, scale=0.2)
    model.eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = model(families.batch(family))
    delta = _read(tmp_path / "theirs", family)
    assert bool(delta.tasks) == bool(config().modules_to_save)
    if len(delta.parts) > 1:
        agree(f"{case}: {delta.method}", f"PEFT's folder, {family}", 1e-12, read=_difference(wanted, _logits(delta, family)))  # fmt: skip
        with pytest.raises(Mismatch, match="a stack of 2 parts"):
            P.pack(delta, survey(families.build(family)), {})
        return
    _write(delta, family, tmp_path / "ours")
    read, theirs = _logits(delta, family), _pefts(tmp_path / "ours", family)
    agree(f"{case}: {delta.method}", f"PEFT's folder, {family}", 1e-12, read=_difference(wanted, read), theirs=_difference(wanted, theirs))  # fmt: skip


GIVEN = [
    ("lora+bitfit", "vit", "a stack of 2 parts"),
    ("ssf", "vit", "PEFT has no form of ssf"),
    ("fourierft", "vit", "PEFT draws the places"),
    ("lora[targets=conv]", "nfnet", "standardises its weight, and PEFT adds outside"),
    ("lora[targets=conv]", "regnet", "a convolution with groups"),
    ("lora[targets=spatial]", "efficientnet", "Conv2dSame for a plain convolution"),
    ("loha[targets=spatial]", "efficientnet", "Conv2dSame for a plain convolution"),
    ("oft[targets=conv2]", "resnet", "PEFT turns the patches"),
    ("vera", "resnet", "PEFT has VERA for linears only"),
    ("boft[block=8,factors=3]", "swin", "PEFT's BOFT has the same everywhere"),
    ("shira[fraction=0.9]", "vit", "too small for PEFT's SHiRA"),
]


@pytest.mark.parametrize(("spec", "family", "said"), GIVEN)
def test_what_peft_cant_hold(spec: str, family: str, said: str) -> None:
    """A refusal names the reason and another way."""
    delta = extract(inject(families.build(family), spec))
    with pytest.raises(Mismatch, match=said) as caught:
        P.pack(delta, survey(families.build(family)), {})
    assert caught.value.hint


@pytest.mark.parametrize("family", ["beit", "eva02", "swinv2", "dinov3"])
def test_where_peft_is_dead(family: str, tmp_path: Path) -> None:
    """A layer that is read and never called is refused both ways: PEFT's adapter has no effect there."""
    delta = extract(inject(families.build(family), "lora[targets=qkv]"))
    with pytest.raises(DeadTarget, match="qkv is read and never called"):
        P.pack(delta, survey(families.build(family)), {})
    peft.get_peft_model(families.build(family), peft.LoraConfig(target_modules=["qkv"])).save_pretrained(tmp_path / "a")
    with pytest.raises(DeadTarget, match="qkv is read and never called, so an adapter there has no effect in PEFT"):
        _read(tmp_path / "a", family)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "ADALORA"}, "type ADALORA is not read here"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changed the base's weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights=olora changed"),
    ({"init_lora_weights": "corda"}, "init_lora_weights=corda changed"),
    ({"init_lora_weights": "eva"}, "init_lora_weights=eva changed"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga changed"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights=loftq changed"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not read here"),
    ({"bias": "all"}, "bias=all is not read here"),
    ({"lora_bias": True}, "lora_bias=True is not read here"),
    ({"something_new": 3}, "something_new=3 is not read here"),
    ({"use_dora": True}, "lacks its magnitudes"),
    ({"r": 5}, r"lora_A is \[4, 32\] in the file, \[5, 32\] by its config"),
    ({"target_modules": ["qkv", "fc1"]}, "lacks tensors of blocks.0.mlp.fc1"),
]


@pytest.mark.parametrize(("change", "said"), SETTINGS)
def test_settings_that_change_the_function(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """A config that asks for what isn't read, or is not the tensors', is refused."""
    _saved(tmp_path / "a")
    path = tmp_path / "a" / P.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Mismatch, match=said):
        _read(tmp_path / "a", "vit")


def test_settings_without_effect(tmp_path: Path) -> None:
    """The least that PEFT takes is enough, and new keys that ask for nothing do no harm."""
    _saved(tmp_path / "a")
    (tmp_path / "a" / P.CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "target_modules": ["qkv"], "r": 4, "new": None, "newer": {}})
    )
    assert _read(tmp_path / "a", "vit").method == "lora[rank=4,alpha=8,targets=qkv]"


def _saved(folder: Path, **more: Any) -> dict[str, Tensor]:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["qkv"], modules_to_save=["head"], **more)
    peft.get_peft_model(families.build("vit"), config).save_pretrained(folder)
    return load_file(folder / P.WEIGHTS)


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    """Missing, left-over and misshapen tensors, damage, text: each says what was seen."""
    tensors = _saved(tmp_path / "a")
    weights, config = tmp_path / "a" / P.WEIGHTS, tmp_path / "a" / P.CONFIG
    first = "base_model.model.blocks.0.attn.qkv"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({f"{first}.base_layer.bias": torch.zeros(96)}, "holds .*base_layer.bias, for which there is no place"),
        (
            {"base_model.model.blocks.9.attn.qkv.lora_A.weight": torch.zeros(4, 32)},
            r"no linear or convolution 'blocks\.9\.attn\.qkv'",
        ),
        ({f"{first}.lora_B.weight": torch.zeros(95, 4)}, r"lora_B is \[95, 4\] in the file, \[96, 4\]"),
    ]
    for change, said in cases:
        save_file({**tensors, **change}, weights)
        with pytest.raises(ShapeMismatch, match=said):
            _read(tmp_path / "a", "vit")
    for lost in (f"{first}.lora_A.weight", f"{first}.lora_"):
        save_file({n: t for n, t in tensors.items() if not n.startswith(lost)}, weights)
        with pytest.raises(ShapeMismatch, match=r"complete|lacks tensors of blocks\.0\.attn\.qkv"):
            _read(tmp_path / "a", "vit")
    save_file({n: t for n, t in tensors.items() if ".head." not in n}, weights)
    with pytest.raises(ShapeMismatch, match="lacks the head, which its config names"):
        _read(tmp_path / "a", "vit")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(Corrupt, match=P.WEIGHTS):
        _read(tmp_path / "a", "vit")
    weights.rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(Corrupt, match=P.PICKLED):
        _read(tmp_path / "a", "vit")
    (tmp_path / "a" / "adapter_model.bin").unlink()
    with pytest.raises(NotFound, match=f"has no {P.WEIGHTS}"):
        _read(tmp_path / "a", "vit")
    for text in ("{", "[]"):
        config.write_text(text)
        with pytest.raises(Corrupt, match="no JSON"):
            _read(tmp_path / "a", "vit")
    with pytest.raises(NotFound, match="no file"):
        _read(tmp_path / "b", "vit")


def test_a_module_that_is_not_the_head(tmp_path: Path) -> None:
    """A whole module beside the head has no place in such a delta."""
    config = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head", "patch_embed.proj"])
    peft.get_peft_model(families.build("vit"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(Mismatch, match=r"patch_embed\.proj\.\w+ replaces a module that is not the head"):
        _read(tmp_path / "a", "vit")


def test_norms_whose_statistics_moved(tmp_path: Path) -> None:
    """PEFT trains a copy of a BatchNorm, statistics and all; norm keeps the backbone's."""
    model = peft.get_peft_model(families.build("resnet"), peft.LNTuningConfig(target_modules=["bn1"])).double()
    model.train()(families.batch("resnet"))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(Mismatch, match="running_mean is not the backbone's"):
        _read(tmp_path / "a", "resnet")


def test_a_config_as_peft_writes_it(tmp_path: Path) -> None:
    """Every key that PEFT writes stands in ours, in its order; names are whole and sorted."""
    _, delta = _ours("lora[rank=3,targets=qkv]", "vit")
    config = _write(delta, "vit", tmp_path / "ours")
    model = peft.get_peft_model(
        families.build("vit"), peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"])
    )
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / d / P.CONFIG).read_text() for d in ("ours", "theirs"))
    assert list(json.loads(ours)) == list(json.loads(theirs))
    assert config["target_modules"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert json.loads(ours)["auto_mapping"] == json.loads(theirs)["auto_mapping"]
    assert load_file(tmp_path / "ours" / P.WEIGHTS).keys() == load_file(tmp_path / "theirs" / P.WEIGHTS).keys()


@torch.no_grad()
def test_names_that_end_alike(tmp_path: Path) -> None:
    """PEFT takes a name for every name that ends with it: where others do, the targets are one expression; ranks likewise."""
    net = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(8, 8, 16, 16)).double().eval()
    families.randomise(net, torch.randn(4, 3, 64, 64, dtype=torch.float64))
    ours, theirs, back = (copy.deepcopy(net) for _ in range(3))
    inject(ours, "lora[rank=3,targets=conv1*|layer1.0.conv2,ranks=conv1*:2]")
    families.perturb(tensors_of(ours))
    delta, x = extract(ours), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    config, tensors = P.pack(delta, survey(net), dict(delta.head("task")))
    P.save(tmp_path, config, tensors, {})
    assert config["target_modules"] == r"conv1|layer1\.0\.conv2"
    assert config["rank_pattern"] == {"^conv1": 2}
    assert _difference(ours.eval()(x), peft.PeftModel.from_pretrained(theirs, tmp_path).eval()(x)) < 1e-12
    read = P.load(tmp_path, survey(back))
    made = assemble(read.pieces, read.head, Origin(card=card_on(back), task=delta.task()))
    assert made.parts[0].sites == delta.parts[0].sites
    assert _difference(ours(x), attach(back, made)(x)) < 1e-12
