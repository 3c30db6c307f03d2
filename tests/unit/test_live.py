"""live.py: inject, attach, extract, detach."""

import re
from pathlib import Path

import pytest
import timm
import torch

from tests import families
from tests.contract.cases import relative
from vtzoo.errors import Conflict, NotFound, ShapeMismatch, UsageError, WrongBackbone
from vtzoo.fingerprint import fingerprint_of
from vtzoo.graft import tensors_of
from vtzoo.identity import CARD, LOADED, check_backbone
from vtzoo.installed import head_state, installed, set_head
from vtzoo.live import attach, detach, extract, inject, trainable
from vtzoo.spec import BackboneCard, Task

TASK = Task(name="t", classes=tuple("abcde"))


def _delta(spec: str = "lora", family: str = "vit", tasks=(TASK,)):
    model = inject(families.build(family), spec)
    families.perturb({**tensors_of(model), **head_state(model)})
    return extract(model, tasks=tasks)


def test_seed_decides_the_fresh_values() -> None:
    """The same seed gives the same delta, another another; the global random state stays as it was."""
    models = [families.build("vit") for _ in range(3)]
    state = torch.random.get_rng_state()
    one, same, other = (tensors_of(inject(m, "lora", seed=s)) for m, s in zip(models, (3, 3, 4), strict=True))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_attach_leaves_the_random_state_alone() -> None:
    """Attaching draws nothing that a caller would notice."""
    delta = _delta("lora+ssf")
    model = families.build("vit")
    state = torch.random.get_rng_state()
    attach(model, delta)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_second_delta_is_refused() -> None:
    """A model carries one delta (or one stack) at a time."""
    model = inject(families.build("vit"), "lora")
    with pytest.raises(Conflict, match="already"):
        inject(model, "ssf")
    with pytest.raises(Conflict):
        attach(model, _delta())
    assert installed(model).spec == "lora"


def test_same_method_twice_is_numbered() -> None:
    """Two parts of one method have names of their own."""
    model = inject(families.build("vit"), "lora[targets=qkv]+lora[targets=qkv|proj,rank=2]")
    grafts = {n.split(".")[-2] for n in tensors_of(model)}
    assert grafts == {"lora", "lora_2"}


@pytest.mark.parametrize(
    ("spec", "error"),
    [("loar", NotFound), ("lora[rnk=3]", UsageError), ("lora[targets=nowhere]", UsageError), ("", UsageError)],
)
def test_failed_inject_leaves_the_model_alone(spec: str, error: type[Exception]) -> None:
    """Unknown methods, knobs and targets are refused before anything is touched."""
    model = families.build("vit")
    with pytest.raises(error):
        inject(model, spec)
    assert installed(model) is None
    assert all(p.requires_grad for p in model.parameters())
    assert not tensors_of(model)


def test_extract_needs_a_delta() -> None:
    """A bare model has nothing to extract."""
    with pytest.raises(UsageError, match="no delta"):
        extract(families.build("vit"))


def test_extract_copies() -> None:
    """An extracted delta does not follow the model."""
    model = inject(families.build("vit"), "lora")
    delta = extract(model)
    kept = {n: t.clone() for n, t in delta.tensors.items()}
    with torch.no_grad():
        for value in trainable(model).values():
            value.add_(1.0)
    assert all(torch.equal(kept[n], t) for n, t in delta.tensors.items())
    assert not any(t.requires_grad for t in delta.tensors.values())


def test_head_of_the_task_is_built() -> None:
    """Attach gives the model the task's own number of classes, and detach the old head back."""
    model = families.build("vit", classes=3)
    old = model.head
    attach(model, _delta())
    assert (model.num_classes, model.head.out_features) == (5, 5)
    detach(model)
    assert model.num_classes == 3
    assert model.head is old


def test_heads_are_chosen_by_task() -> None:
    """Of several tasks one must be named; set_head changes to another; "" leaves the model's own."""
    one, two = _delta(), Task(name="u", classes=("p", "q"))
    head = {
        "@head/u/head.weight": torch.ones(2, 32, dtype=torch.float64),
        "@head/u/head.bias": torch.zeros(2, dtype=torch.float64),
    }
    both = one.with_(tasks=(TASK, two), tensors={**one.tensors, **head})
    with pytest.raises(NotFound, match="2 tasks"):
        attach(families.build("vit"), both)
    model = attach(families.build("vit"), both, task="t")
    set_head(model, both, "u")
    assert torch.equal(model.head.weight, head["@head/u/head.weight"])
    bare = families.build("vit", classes=7)
    own = bare.head
    assert attach(bare, both, task="").head is own


def test_set_head_needs_a_delta() -> None:
    """A bare model has no delta whose head to take."""
    with pytest.raises(UsageError):
        set_head(families.build("vit"), _delta(), "t")


@pytest.mark.parametrize("method", ["linear", "lora", "mlp-head"])
@pytest.mark.parametrize("lost", ["bias", "weight", ""])
def test_lost_head_is_refused(method: str, lost: str) -> None:
    """A head that is missing, whole or in part, is refused; it is never left at random values."""
    delta = _delta(method)
    kept = {n: t for n, t in delta.tensors.items() if not (n.startswith("@head/") and n.endswith(lost))}
    assert len(kept) < len(delta.tensors)
    with pytest.raises(ShapeMismatch, match="lacks head"):
        attach(families.build("vit"), delta.with_(tensors=kept))


def test_lost_and_foreign_tensors_are_refused() -> None:
    """A delta that lacks a tensor, has one too many, or one of another shape is refused, and the model left alone."""
    delta = _delta("lora[targets=qkv]", tasks=())
    name = "blocks.1.attn.qkv.lora.B"
    for tensors, word in (
        ({n: t for n, t in delta.tensors.items() if n != name}, "lacks"),
        ({**delta.tensors, "blocks.1.attn.qkv.lora.C": torch.ones(1)}, "no place"),
        ({**delta.tensors, name: torch.ones(3, 8)}, r"\[3, 8\]"),
    ):
        model = families.build("vit")
        with pytest.raises(ShapeMismatch, match=word):
            attach(model, delta.with_(tensors=tensors))
        assert installed(model) is None
        assert not tensors_of(model)


def test_wrong_backbone_names_both() -> None:
    """The refusal shows both fingerprints; check=False lets it pass."""
    delta, other = _delta(), families.build("vit", seed=9)
    with pytest.raises(WrongBackbone) as refusal:
        check_backbone(other, delta)
    assert str(refusal.value).count("sha256:") == 2
    assert attach(other, delta, check=False) is other


def test_card_on_the_model_stands_for_its_fingerprint() -> None:
    """What `build` left on the model is trusted as long as the tensors are those that were loaded, and no longer."""
    delta = _delta()
    model = families.build("vit", seed=9)
    model.__dict__[CARD] = BackboneCard(name="x", arch="y", fingerprint=delta.backbone.fingerprint)
    model.__dict__[LOADED] = fingerprint_of(model)  # at another input size, say
    check_backbone(model, delta)
    assert extract(inject(model, "bitfit")).backbone.fingerprint == delta.backbone.fingerprint
    detach(model)
    with torch.no_grad():
        model.norm.weight.mul_(1.2)
    with pytest.raises(WrongBackbone):
        check_backbone(model, delta)
    assert extract(inject(model, "bitfit")).backbone.fingerprint == fingerprint_of(model)


def test_the_head_comes_along_unasked(tmp_path: Path) -> None:
    """A trained head is never lost: extract keeps it under a name, save and attach (by path) bring it back."""
    model = inject(families.build("vit"), "lora")
    families.perturb({**tensors_of(model), **head_state(model)})
    x = torch.randn(2, 3, *families.build("vit").patch_embed.img_size, dtype=torch.float64)
    delta = extract(model, task="fruit", classes=("apple", "fig", "lime", "pear", "plum"))
    assert delta.tasks[0].name == "fruit"
    delta.save(tmp_path / "d.safetensors")
    back = attach(families.build("vit"), tmp_path / "d.safetensors")
    assert torch.equal(back(x), model.eval()(x))
    assert extract(model).tasks[0].classes == tuple("01234")
    assert not extract(model, tasks=()).tasks
    with pytest.raises(UsageError, match="2 classes for a head of 5"):
        extract(model, classes=("a", "b"))


def test_stacks_that_cannot_train_what_they_say_are_refused() -> None:
    """Two heads for one model, and a head method on a model without a head."""
    with pytest.raises(UsageError, match="both build the head"):
        inject(families.build("vit"), "mlp-head+mlp-head[hidden=8]")
    headless = families.build("vit", classes=0)
    with pytest.raises(UsageError, match="this model has none") as refusal:
        inject(headless, "linear")
    assert "num_classes" in refusal.value.hint
    assert installed(headless) is None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lora[targets=]", "lora: targets is empty"),
        ("glora[targets=[]]", "glora: targets is empty"),
        ("ssf+full[targets=]", "full: targets is empty"),
        ("ia3[outputs=,inputs=]", "ia3 has nothing to scale"),
        ("partial[blocks=1,targets=blocks.0.*]", "names nothing in the last 1 blocks"),
    ],
)
def test_a_method_without_a_place_is_refused(spec: str, said: str) -> None:
    """No place to act is no delta: the head alone would be trained, under the method's name."""
    model = families.build("vit")
    with pytest.raises(UsageError, match=re.escape(said)):
        inject(model, spec)
    assert installed(model) is None


def test_surgical_targets() -> None:
    """`full` and `partial` train just the parameters that are named: by layer, by role, by glob."""

    def trained(spec: str) -> set[str]:
        return {n for p in extract(inject(families.build("vit"), spec)).parts for s in p.sites for n in map(s.key, s.facts["params"])}  # fmt: skip

    assert trained("full[targets=norm2]") == {f"blocks.{i}.norm2.{p}" for i in (0, 1) for p in ("weight", "bias")}
    late = {f"blocks.1.norm{i}.{p}" for i in (1, 2) for p in ("weight", "bias")} | {"norm.weight", "norm.bias"}
    assert trained("partial[targets=norm]") == late
    assert trained("partial[blocks=2,targets=*.attn.qkv.bias]") == {f"blocks.{i}.attn.qkv.bias" for i in (0, 1)}


@pytest.mark.parametrize("arch", ["levit_128s", pytest.param("tiny_vit_5m_224", marks=pytest.mark.slow)])
def test_biases_that_attentions_keep_are_forgotten(arch: str) -> None:
    """What LeViT keeps of its attention biases in eval mode is neither the delta's afterwards nor the backbone's meanwhile."""
    model, x = timm.create_model(arch, num_classes=3).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(x)
        inject(model, "full[targets=*attention_biases]")
        families.perturb(tensors_of(model), scale=3.0)
        assert relative(before, model(x)) > 1e-3
        assert torch.equal(detach(model)(x), before)


def test_detach_puts_modes_back() -> None:
    """A model that was training is wholly in training mode again, its norms with statistics included."""
    model = families.build("resnet").train()
    detach(inject(model, "lora"))
    assert all(m.training for m in model.modules())


def test_detach_of_a_bare_model_does_nothing() -> None:
    """Detaching twice is harmless."""
    model = families.build("vit")
    assert detach(detach(model)) is model


def test_dtype_of_the_host_is_taken() -> None:
    """On a float16 backbone the delta is float16; a saved float64 one is cast as it is attached."""
    model = attach(families.build("vit", dtype=torch.float32), _delta(), check=False)
    assert {t.dtype for t in tensors_of(model).values()} == {torch.float32}
    assert {t.dtype for t in head_state(model).values()} == {torch.float32}
