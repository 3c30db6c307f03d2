"""What a delta needs of its backbone: the very weights it was made with, running statistics included."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families import perturb
from vtzoo import build, fold, merge
from vtzoo.artifact import go_live, open_ref
from vtzoo.bases import open_base
from vtzoo.delta import Delta
from vtzoo.errors import Corrupt, ShapeMismatch, UsageError, WrongBackbone
from vtzoo.graft import tensors_of
from vtzoo.installed import head_state
from vtzoo.live import attach, detach, extract, inject
from vtzoo.verbs.add import add_backbone, add_delta
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.merge import merge_refs
from vtzoo.zoo import Zoo

ARCH = "test_efficientnet"


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """A zoo with a ConvNet at random and two checkpoints of it, fine-tuned elsewhere."""
    made = Zoo.init(tmp_path / "zoo")
    torch.manual_seed(0)
    base = timm.create_model(ARCH, num_classes=0)
    save_file(base.state_dict(), tmp_path / "conv.safetensors")
    add_backbone(name="conv", arch=ARCH, weights=tmp_path / "conv.safetensors", zoo=made)
    for i, name in enumerate(("a", "b")):
        tuned = timm.create_model(ARCH, num_classes=3).train()
        tuned.load_state_dict(base.state_dict(), strict=False)
        tuned((i + 1) * torch.randn(4, 3, 64, 64))  # moves the running statistics
        save_file(tuned.state_dict(), tmp_path / f"{name}.safetensors")
        add_delta(name=f"{name}/full", backbone="conv", weights=tmp_path / f"{name}.safetensors", zoo=made)
    return made


def _scaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t * 1.2 if t.is_floating_point() else t for n, t in tensors.items()}


def _spoilt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.full_like(t, torch.nan) if t.ndim == 4 else t for n, t in tensors.items()}


def _cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t[1:] if t.ndim == 4 else t for n, t in tensors.items()}


def _less(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if t.ndim != 4}


def _swap(zoo: Zoo, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _scaled) -> None:
    """Put other weights behind the backbone's source, as a moved branch on a hub would."""
    weights = {n: t.contiguous() for n, t in change(load_file(tmp_path / "conv.safetensors")).items()}
    save_file(weights, tmp_path / "other.safetensors")
    digest = zoo.add_object(tmp_path / "other.safetensors")
    entry = zoo.resolve("conv", "backbones")
    zoo.put("backbones", "conv", {**entry.facts, "digest": digest, "source": f"object:sha256:{digest}"}, replace=True)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: torch.full_like(t, torch.nan), Corrupt, "NaN"),
        (lambda t: t.to(torch.float8_e4m3fn), Corrupt, "F8_E4M3"),
        (lambda t: t.to(torch.complex64), Corrupt, "C64"),
        (lambda t: t.to(torch.int32), ShapeMismatch, "int32"),
    ],
    ids=["nan", "float8", "complex", "integers"],
)
def test_weights_that_nothing_could_read_are_not_added(
    zoo: Zoo, tmp_path: Path, change: Callable[[Tensor], Tensor], error: type[Exception], said: str
) -> None:
    """One tensor of another type, or without a number in it, is found when the file comes in."""
    weights = load_file(tmp_path / "conv.safetensors")
    name = next(n for n in weights if n.endswith("weight"))
    save_file({**weights, name: change(weights[name])}, tmp_path / "bad.safetensors")
    with pytest.raises(error, match=said):
        add_backbone(name="bad", arch=ARCH, weights=tmp_path / "bad.safetensors", zoo=zoo)
    assert "bad" not in {e.name for e in zoo.entries("backbones")}


@pytest.mark.parametrize("change", [_scaled, _spoilt, _cut, _less])
def test_changed_weights_behind_a_source_are_noticed(
    zoo: Zoo, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """Attaching, folding and merging by ref, and building the entry, refuse weights that the fingerprint doesn't fit."""
    _swap(zoo, tmp_path, change)
    delta = Delta.open(zoo.object(zoo.resolve("a/full").digest))
    card = replace(delta.backbone, source=zoo.resolve("conv", "backbones").facts["source"])
    digest = delta.with_(backbone=card).save(tmp_path / "moved.safetensors")
    assert len(digest) == 64
    path = str(tmp_path / "moved.safetensors")
    with pytest.raises(WrongBackbone, match="not those"):
        go_live(open_ref(path, zoo))
    with pytest.raises(WrongBackbone, match="not those"):
        go_live(open_ref(path, zoo), plain=True)
    before = {p for p in zoo.root.rglob("*") if p.is_file()}
    for dry_run in (True, False):
        with pytest.raises(WrongBackbone, match="not those"):
            merge_refs(refs=[path], method="linear", name="m", zoo=zoo, dry_run=dry_run)
    assert {p for p in zoo.root.rglob("*") if p.is_file()} == before
    with pytest.raises(WrongBackbone, match="not those"):
        build("conv", zoo=zoo)


def test_changed_weights_in_memory_are_noticed(zoo: Zoo) -> None:
    """A built model whose weights were changed takes no delta; so do tensors given to fold and merge."""
    delta = Delta.open(zoo.object(zoo.resolve("a/full").digest))
    model = build("conv", zoo=zoo)
    attach(model, delta, task="")
    changed = build("conv", zoo=zoo)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.3)
    with pytest.raises(WrongBackbone):
        attach(changed, delta, task="")
    assert extract(inject(changed, "bitfit")).backbone.fingerprint != delta.backbone.fingerprint
    base = open_base(delta.backbone, zoo)
    wrong = {n: 2 * base[n] for n in base}
    for refused in (lambda: fold(wrong, delta), lambda: merge([delta], "linear", base=wrong)):
        with pytest.raises(WrongBackbone):
            refused()
    assert set(fold(base, delta)) >= set(base)
    fold(wrong, delta, check=False)


@pytest.mark.parametrize("method", ["linear", "task-arithmetic[scale=1]", "ties[density=1]"])
def test_running_statistics_are_averaged(zoo: Zoo, tmp_path: Path, method: str) -> None:
    """Whatever the algorithm, a merge's running statistics are the mean of the checkpoints', attached and folded."""
    merge_refs(refs=["a/full", "b/full"], method=method, name="both", zoo=zoo)
    live = go_live(open_ref("both", zoo), "a")
    a, b = (load_file(tmp_path / f"{n}.safetensors") for n in "ab")
    fold_ref(ref="both", task="a", out=tmp_path / "folded", zoo=zoo)
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    names = [n for n in a if n.endswith(("running_mean", "running_var"))]
    assert names
    for name in names:
        torch.testing.assert_close(folded[name], (a[name] + b[name]) / 2)
    assert live.model(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_a_subtracted_task_leaves_variances_positive(zoo: Zoo, tmp_path: Path) -> None:
    """Negative weights and large factors turn no running variance negative."""
    layers = "*:4"
    merge_refs(refs=["a/full", "b/full"], method="task-arithmetic", coef=(1, -1), layers=layers, name="less", zoo=zoo)
    fold_ref(ref="less", task="a", out=tmp_path / "folded", zoo=zoo)
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    assert min(t.min() for n, t in folded.items() if n.endswith("running_var")) > 0


def test_a_part_of_qkv_needs_q_k_and_v_in_order() -> None:
    """lora[qkv=v] moves the values only; where the layout is another, or there is no qkv, it is refused."""
    model = inject(timm.create_model("test_vit", num_classes=3), "lora[targets=qkv,qkv=v]")
    assert all(g.slices == [2] for g in (m.lora for m in model.modules() if hasattr(m, "lora")))
    for arch, why in (("tiny_vit_5m_224", "in this order"), ("test_efficientnet", "fused qkv")):
        with pytest.raises(UsageError, match=why):
            inject(timm.create_model(arch, num_classes=3), "lora[qkv=v]")


@pytest.mark.parametrize(
    "arch",
    ["efficientvit_m0", *(pytest.param(a, marks=pytest.mark.slow) for a in ("shvit_s1", "levit_128s", "volo_d1_224"))],
)
def test_heads_of_more_than_a_classifier(tmp_path: Path, arch: str) -> None:
    """Where `num_classes=0` takes a norm or a second classifier away too, they are the head's: kept, loaded, put back."""
    torch.manual_seed(0)
    x, source = torch.randn(2, 3, 224, 224), timm.create_model(arch, num_classes=3).train()
    source(x)  # moves the running statistics
    source.eval()
    perturb(dict(source.named_parameters()))
    save_file(source.state_dict(), tmp_path / "whole.safetensors")
    zoo = Zoo.init(tmp_path / "zoo")
    add_backbone(name="net", arch=arch, weights=tmp_path / "whole.safetensors", zoo=zoo)
    add_delta(name="task/full", backbone="net", weights=tmp_path / "whole.safetensors", zoo=zoo)

    def model() -> Any:
        return build("net", zoo=zoo, num_classes=3)

    with torch.no_grad():
        expected = source(x)
        assert torch.equal(model()(x), expected)
        assert torch.equal(go_live(open_ref("task/full", zoo)).model(x), expected)
        trained = inject(model(), "norm")
        perturb(tensors_of(trained))
        perturb(head_state(trained))
        other = attach(model(), extract(trained))
        assert torch.equal(other(x), trained(x))
        assert not torch.equal(other(x), expected)
        assert torch.equal(detach(other)(x), expected)
    headless = build("net", zoo=zoo)
    assert set(headless.state_dict()) == set(timm.create_model(arch, num_classes=0).state_dict())
    assert headless.vtzoo_card.fingerprint == model().vtzoo_card.fingerprint
