"""folding.py: writing a delta into plain weights."""

import pytest
import torch

from tests import families
from vtzoo.delta import Delta
from vtzoo.errors import NotFoldable, ShapeMismatch, WrongBackbone
from vtzoo.folding import Folded, fold, reason, task_vector
from vtzoo.graft import tensors_of
from vtzoo.installed import head_state
from vtzoo.live import extract, inject
from vtzoo.spec import Task

TASK = Task(name="t", classes=tuple("abcde"))


def _delta(spec: str, family: str = "vit", tasks: tuple[Task, ...] = (TASK,), **facts) -> Delta:
    model = inject(families.build(family), spec)
    families.perturb({**tensors_of(model), **head_state(model)})
    return extract(model, tasks=tasks, **facts)


class Counting(dict):
    """A base that counts how often each tensor is read."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.read = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return super().__getitem__(name)


def test_fold_is_lazy() -> None:
    """Making an unchecked fold reads nothing of the base; asking for one tensor reads what that one needs."""
    base = Counting(families.build("vit").state_dict())
    folded = fold(base, _delta("lora"), task="", check=False)
    assert not base.read
    folded["blocks.1.mlp.fc1.weight"]
    assert set(base.read) == {"blocks.1.mlp.fc1.weight"}
    folded["norm.weight"]
    assert base.read[-1] == "norm.weight"


def test_lora_fold_is_its_formula() -> None:
    """W' = W + alpha / rank B A, nothing else changes."""
    base = families.build("vit").state_dict()
    delta = _delta("lora[rank=2,alpha=6,targets=fc1]")
    folded = fold(base, delta, task="")
    site = "blocks.0.mlp.fc1"
    product = 3.0 * delta.tensors[f"{site}.lora.B"] @ delta.tensors[f"{site}.lora.A"]
    assert torch.allclose(folded[f"{site}.weight"], base[f"{site}.weight"] + product, rtol=0, atol=1e-14)
    assert folded.changed == {f"blocks.{i}.mlp.fc1.weight" for i in (0, 1)}
    assert folded["blocks.0.mlp.fc1.bias"] is base["blocks.0.mlp.fc1.bias"]


def test_head_follows_the_task() -> None:
    """The only task's head is put in; "" leaves the base's; several want a name."""
    base = families.build("vit").state_dict()
    delta = _delta("lora")
    assert torch.equal(fold(base, delta)["head.weight"], delta.head("t")["head.weight"])
    assert fold(base, delta, task="")["head.weight"] is base["head.weight"]
    two = delta.with_(tasks=(TASK, Task(name="u", classes=("p",))))
    assert fold(base, two)["head.weight"] is base["head.weight"]
    assert torch.equal(fold(base, two, task="t")["head.weight"], delta.head("t")["head.weight"])


def test_mlp_head_folds_without_its_head_only() -> None:
    """A head that is no linear layer is refused with the reason; headless it folds to the base."""
    base = families.build("vit").state_dict()
    delta = _delta("mlp-head")
    with pytest.raises(NotFoldable, match="not linear") as refusal:
        fold(base, delta)
    assert "headless" in refusal.value.hint
    assert all(t is base[n] for n, t in fold(base, delta, task="").items())


def test_refusal_comes_before_any_work() -> None:
    """A method that doesn't fold is refused at once, whatever stands beside it, with its own reason."""
    base = Counting(families.build("vit").state_dict())
    with pytest.raises(NotFoldable, match="adapter: no") as refusal:
        fold(base, _delta("lora+adapter"), check=False)
    assert reason("adapter") in str(refusal.value)
    assert not base.read


def test_other_architecture_is_refused() -> None:
    """A base that lacks a site's tensor is a ShapeMismatch that names it; with other values it is a WrongBackbone."""
    base = families.build("vit").state_dict()
    del base["blocks.1.mlp.fc1.weight"]
    with pytest.raises(ShapeMismatch, match=r"blocks\.1\.mlp\.fc1\.weight"):
        fold(base, _delta("lora"), check=False)
    with pytest.raises(WrongBackbone):
        fold(families.build("vit", seed=9).state_dict(), _delta("lora"))


def test_resized_tensors_come_from_the_delta() -> None:
    """Base tensors that travel in the delta stand under the fold, and are no part of the task vector."""
    other = torch.full((1, 13, 32), 2.0, dtype=torch.float64)
    delta = _delta("ssf")
    delta = delta.with_(tensors={**delta.tensors, "@base/pos_embed": other})
    base = families.build("vit").state_dict()
    assert torch.equal(fold(base, delta)["pos_embed"], other)
    assert "pos_embed" not in task_vector(base, delta)


def test_prompts_become_register_tokens() -> None:
    """vpt-shallow folds into another architecture: it says the model_args, and has no task vector."""
    base = families.build("vit").state_dict()
    delta = _delta("vpt-shallow[tokens=3]")
    folded = fold(base, delta)
    assert folded.all_args == {"reg_tokens": 3}
    assert folded.shape("reg_token") == (1, 3, 32)
    assert folded.shape("pos_embed") == tuple(folded["pos_embed"].shape) == (1, 16, 32)
    with pytest.raises(NotFoldable, match="reg_tokens"):
        task_vector(base, delta)


def test_task_vector_is_folded_minus_base() -> None:
    """Only what the delta touches, lazily, in float32 for a half-precision base."""
    base = {n: t.half() if t.is_floating_point() else t for n, t in families.build("resnet").state_dict().items()}
    delta = _delta("lora+bitfit", "resnet")
    vector, folded = task_vector(base, delta), fold(base, delta, task="", check=False)
    assert set(vector) == folded.changed
    name = min(vector)
    assert vector[name].dtype is torch.float64  # the delta's own
    assert torch.equal(vector[name], folded[name] - base[name].double())


@pytest.mark.parametrize(
    ("spec", "family", "known"),
    [
        ("lora[rank=2]", "vit", True), ("lora[rank=2,qkv=qv]", "vit", True), ("lora[rank=2,init=pissa]", "vit", True),
        ("lora[rank=2]", "resnet", True), ("vera[rank=2]", "vit", True), ("lora[rank=2,dora=true]", "vit", False),
        ("full", "vit", False), ("lora[rank=2]+lora[rank=1]", "vit", False), ("lora[rank=2]+ssf", "vit", False),
    ],
)  # fmt: skip
def test_products_stay_factors(spec: str, family: str, known: bool) -> None:
    """What one part adds as a product of thin matrices is given as them, and what isn't one, or isn't alone, as None."""
    base = families.build(family).state_dict()
    vector = task_vector(base, _delta(spec, family))
    pairs = {n: vector.factors(n) for n in vector if vector[n].ndim > 1 and min(vector[n].flatten(1).shape) > 4}
    assert pairs
    for name, pair in pairs.items():
        assert (pair is not None) == known, name
        if pair is not None:
            left, right = pair
            assert left.shape[1] == right.shape[0] < min(left.shape[0], right.shape[1])
            assert torch.allclose(left @ right, vector[name].flatten(1), rtol=0, atol=1e-12)


def test_folded_is_a_mapping() -> None:
    """Names of the base first, new ones after; a plain one has the base's shapes and no arguments."""
    base = {"a": torch.ones(2), "b": torch.ones(3)}
    plain = Folded(base)
    assert (list(plain), len(plain), plain.all_args, plain.changed) == (["a", "b"], 2, {}, set())
    more = Folded(plain, {"c": lambda: torch.zeros(4), "a": lambda: torch.zeros(2)}, {"c": (4,)}, {"x": 1})
    assert (list(more), len(more), more.all_args, more.changed) == (["a", "b", "c"], 3, {"x": 1}, {"a", "c"})
    assert (more.shape("a"), more.shape("c")) == ((2,), (4,))
    assert Folded(more, {}, {}, {"y": 2}).all_args == {"x": 1, "y": 2}


@torch.no_grad()
def test_factor_goes_part_of_the_way() -> None:
    """factor=0.3 gives base + 0.3 * (folded - base) for every body tensor, and the whole head (WiSE-FT)."""
    delta = _delta("lora+bitfit+full[targets=pos_embed]")
    base = families.build("vit").state_dict()
    whole, part, none = (dict(fold(base, delta, factor=f)) for f in (1.0, 0.3, 0.0))
    for name, value in base.items():
        if name.startswith("head."):
            assert torch.equal(part[name], whole[name])
        else:
            assert torch.allclose(part[name], value + 0.3 * (whole[name] - value), rtol=1e-12, atol=1e-14)
            assert torch.allclose(none[name], value, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(part["pos_embed"], whole["pos_embed"])


def test_no_way_between_two_architectures() -> None:
    """A delta that folds into register tokens has no half, and says so."""
    delta = _delta("vpt-shallow")
    with pytest.raises(NotFoldable, match="changes the architecture"):
        fold(families.build("vit").state_dict(), delta, factor=0.5)
