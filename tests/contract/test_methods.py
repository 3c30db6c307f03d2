"""The invariants of every method on every family of backbones that it claims."""

import copy
import pickle
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import families
from tests.contract.cases import (
    SUPPORT,
    TASK,
    bare,
    by_family,
    case,
    everything,
    fresh,
    identity,
    logits,
    pairs,
    refusals,
    relative,
    stacks,
)
from vtzoo import knobs, registry
from vtzoo.anatomy import survey
from vtzoo.classifier import head_names
from vtzoo.delta import Delta
from vtzoo.errors import Mismatch, NotFoldable, ShapeMismatch, UsageError
from vtzoo.fingerprint import base_state, fingerprint_of
from vtzoo.folding import Folded, fold, task_vector
from vtzoo.graft import tensors_of
from vtzoo.identity import CARD, LOADED
from vtzoo.installed import head_state
from vtzoo.live import attach, detach, extract, inject, trainable
from vtzoo.methods._protocol import prepares
from vtzoo.sensitivity import scores
from vtzoo.text_head import Spoken

# Shifts that the net itself undoes, so that their gradient is zero by nature: a key's bias moves all logits of a query
# alike and softmax takes that away (CaiT's class attention, normalised keys; elsewhere the key is a third
# of a fused tensor, or has no bias), as it does with what CaiT adds to each head's logits; a Mixer's token MLP adds one
# number to all channels of a token, which the next LayerNorm takes away.
UNDONE = (
    "blocks_token_only.*.attn.k",
    "blocks.*.attn.proj_l",
    "blocks.*.attn.key.norm",
    "blocks.*.attn.k_norm",
    "blocks.*.mlp_tokens.fc2",
)
SHIFTS = ("bias", "beta", "E")

each = pytest.mark.parametrize(("spec", "family"), pairs())
every = pytest.mark.parametrize(("spec", "family"), everything())


@every
def test_base_keeps_its_names_and_bits(spec: str, family: str) -> None:
    """After inject the backbone's tensors have the same names and bits, and its fingerprint is the same."""
    model = bare(family)
    before = {n: t.clone() for n, t in base_state(model).items()}
    mark = fingerprint_of(model)
    inject(model, spec, batches=families.labelled(family))
    after = base_state(model)
    assert list(after) == list(before)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert fingerprint_of(model) == mark


@every
def test_only_delta_and_head_train(spec: str, family: str) -> None:
    """What requires gradients is exactly what the delta holds, and the head where no text tower makes it."""
    model = fresh(spec, family)
    parameters = dict(model.named_parameters())
    wanted = {n for n in tensors_of(model) if n in parameters} | set(head_state(model)) & set(parameters)
    assert set(trainable(model)) == wanted
    own = isinstance(model.get_classifier(), Spoken) or any(hasattr(m, "head") for m in _modules(spec))
    assert own or set(head_state(model)) <= set(trainable(model))
    assert wanted or any(map(prepares, _modules(spec)))


@every
def test_identity_at_the_start(spec: str, family: str) -> None:
    """A fresh delta changes nothing where the docstring says yes, little where nearly, and does where it says no.

    What is looked at are the features, or, where before and after a text tower makes the classifier, the logits.
    """
    model, x = bare(family), families.batch(family)
    said, before, answers = model.get_classifier(), _features(model, x), logits(model, x)
    inject(model, spec, batches=families.labelled(family))
    spoken = isinstance(said, Spoken) and isinstance(model.get_classifier(), Spoken)
    moved = relative(answers, logits(model, x)) if spoken else relative(before, _features(model, x))
    low, high = {"yes": (0.0, 1e-12), "nearly": (1e-9, 0.1), "no": (1e-9, 10.0)}[identity(spec)]
    assert low <= moved <= high


@every
def test_every_tensor_is_alive(spec: str, family: str, tmp_path) -> None:
    """After save and open every trained tensor of a delta receives a gradient, and moving one of some moves the output."""
    model = _reopened(spec, family, tmp_path)
    x = families.batch(family)
    weights = torch.randn(families.CLASSES, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    _backward((model(x) * weights).sum(), spec)
    tensors = tensors_of(model)
    grads = {n: 0.0 if t.grad is None else float(t.grad.abs().max()) for n, t in tensors.items() if t.requires_grad}
    floor = 1e-10 * max(grads.values(), default=0.0)
    assert {n for n, g in grads.items() if g <= floor} == _undone(tensors)
    _moves(model, x, 8)


@pytest.mark.slow
@every
def test_each_tensor_moves_the_output(spec: str, family: str, tmp_path) -> None:
    """After save and open moving any one tensor of a delta moves the output by more than a millionth."""
    _moves(_reopened(spec, family, tmp_path), families.batch(family), 10**6)


@every
def test_detach_gives_the_base_back(spec: str, family: str) -> None:
    """After detach values, classes of modules, attributes and requires_grad are what they were, bit for bit."""
    model = bare(family)
    next(iter(model.parameters())).requires_grad_(False)
    before = _portrait(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    inject(model, spec, batches=families.labelled(family))
    with torch.no_grad():
        for name, value in trainable(model).items():
            if name not in state:
                value.add_(1.0)
    detach(model)
    assert _portrait(model) == before
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[n], t) for n, t in state.items())


@every
def test_save_and_open_keep_every_bit(spec: str, family: str, tmp_path) -> None:
    """A saved delta comes back equal in tensors and facts, saving it again gives the same bytes, and it runs the same."""
    made = case(spec, family)
    first = made.delta.save(tmp_path / "a.safetensors")
    opened = Delta.open(tmp_path / "a.safetensors")
    assert sorted(opened.tensors) == sorted(made.delta.tensors)
    assert all(
        torch.equal(opened.tensors[n], t) and opened.tensors[n].dtype == t.dtype for n, t in made.delta.tensors.items()
    )
    assert opened.header() == made.delta.header()
    assert opened.save(tmp_path / "b.safetensors") == first
    model = attach(bare(family, classes=3), opened)
    assert torch.equal(logits(model, made.x), made.live)
    again = extract(model, tasks=[TASK])
    assert again.save(tmp_path / "b.safetensors") == first


@pytest.mark.parametrize(("spec", "family"), by_family())
def test_attach_refuses_other_weights(spec: str, family: str) -> None:
    """The same architecture with other weights is refused, and left as it was."""
    model = bare(family, seed=5)
    before = _portrait(model)
    with pytest.raises(Mismatch) as refusal:
        attach(model, case(spec, family).delta)
    assert refusal.value.hint
    assert _portrait(model) == before


@pytest.mark.parametrize(("spec", "family"), by_family())
def test_attach_refuses_another_depth(spec: str, family: str) -> None:
    """A deeper or shallower network is refused, by its fingerprint, and by its shapes where that is not asked."""
    deeper = families.FAMILIES[family].deeper
    with pytest.raises(Mismatch):
        attach(bare(family, **deeper), case(spec, family).delta)
    deep = extract(fresh(spec, family, **deeper))
    with pytest.raises(Mismatch):
        attach(bare(family), deep)
    modules = dict(bare(family).named_modules())
    if any(s.name not in modules for p in deep.parts for s in p.sites):
        with pytest.raises(ShapeMismatch):
            attach(bare(family), deep, check=False)


@each
def test_attach_refuses_another_image_size(spec: str, family: str) -> None:
    """The same weights at another input size are refused where the delta's places change shape, and run where not."""
    larger = families.FAMILIES[family].larger
    made = case(spec, family)
    if larger is None:
        twice = families.batch(family, size=tuple(2 * s for s in families.FAMILIES[family].size))
        assert torch.isfinite(logits(attach(bare(family), made.delta), twice)).all()
        return
    model = bare(family, **larger)
    model.__dict__.update(
        {CARD: made.delta.backbone, LOADED: fingerprint_of(model)}
    )  # as `build` leaves it at this size
    anatomy = survey(model, rate=lambda: scores(bare(family), families.labelled(family)))
    sites = {(p.graft, s.name): s for p in made.delta.parts for s in p.module.sites(anatomy, p.config)}
    same = all(
        (now := sites.get((p.graft, s.name))) is not None
        and now.shape == s.shape
        and now.facts.get("params") == s.facts.get("params")
        for p in made.delta.parts
        for s in p.sites
    )
    if same:
        attach(model, made.delta)
    else:
        with pytest.raises(ShapeMismatch, match="shape"):
            attach(model, made.delta)


@pytest.mark.parametrize(("spec", "family"), everything(stacks_on=families.names()))
def test_fold_equals_attach(spec: str, family: str) -> None:
    """Folded into plain weights the network gives the attached output (float64 and float32), or says why it can't.

    Either way neither the base nor the delta changes.
    """
    made = case(spec, family)
    base = bare(family).state_dict()
    kept = {n: t.clone() for n, t in [*base.items(), *made.delta.tensors.items()]}
    try:
        folded = fold(base, made.delta)
        tensors = dict(folded)
    except NotFoldable as refusal:
        method, _, why = str(refusal).partition(": ")
        assert method in spec
        assert len(why) > 10
        assert why in " ".join(registry.card("methods", method).doc.split())
        return
    finally:
        assert all(torch.equal(kept[n], t) for n, t in [*base.items(), *made.delta.tensors.items()])
    assert relative(made.live, _plain(family, tensors, folded.all_args, made.x)) <= 1e-10
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {n: folded.shape(n) for n in folded}
    if not folded.all_args:
        _factors_are_the_difference(task_vector(base, made.delta))
    half = {n: t.float() if t.is_floating_point() else t for n, t in base.items()}
    small = made.delta.with_(tensors={n: t.float() for n, t in made.delta.tensors.items()})
    folded = fold(half, small, check=False)
    x = made.x.float()
    live = logits(attach(families.build(family, dtype=torch.float32), small), x)
    assert relative(live, _plain(family, dict(folded), folded.all_args, x)) <= 1e-5


def _factors_are_the_difference(vector: Folded) -> None:
    """Where a delta gives two thin matrices for a tensor, their product is what it changes."""
    for name in vector:
        if (pair := vector.factors(name)) is not None:
            left, right = pair
            assert relative(left @ right, vector[name].flatten(1)) <= 1e-10, name


@pytest.mark.parametrize(("first", "second"), stacks())
def test_any_two_stack(first: str, second: str) -> None:
    """Every ordered pair of methods stacks, comes back from its delta bit for bit, and folds if both do."""
    if all(hasattr(module, "head") for module in _modules(f"{first}+{second}")):
        pytest.skip("one head per model: its refusal is tested in tests/unit/test_live.py")
    made = case(f"{first}+{second}", "vit")
    assert torch.equal(logits(attach(bare("vit"), made.delta), made.x), made.live)
    base = bare("vit").state_dict()
    if "live" in (SUPPORT[first]["vit"], SUPPORT[second]["vit"]):
        with pytest.raises(NotFoldable):
            fold(base, made.delta)
        return
    folded = fold(base, made.delta)
    assert relative(made.live, _plain("vit", dict(folded), folded.all_args, made.x)) <= 1e-10


@each
def test_copies_run_the_same(spec: str, family: str) -> None:
    """deepcopy and pickle give the same output, and what they give is a model of its own."""
    made = case(spec, family)
    model = attach(bare(family), made.delta)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, made.x), made.live)
        with torch.no_grad():
            for value in (trainable(other) or head_state(other)).values():
                value.zero_()
        assert not torch.equal(logits(other, made.x), made.live)
        assert torch.equal(logits(model, made.x), made.live)
        detach(other)
        assert fingerprint_of(other) == made.delta.backbone.fingerprint


@each
def test_training_mode_keeps_batch_statistics(spec: str, family: str) -> None:
    """model.train() and a training step leave every buffer of the backbone as it was."""
    model = fresh(spec, family).train()
    before = {n: b.clone() for n, b in model.named_buffers() if n not in tensors_of(model)}
    _backward(model(families.batch(family)).sum(), spec)
    after = dict(model.named_buffers())
    assert all(torch.equal(after[n], b) for n, b in before.items())
    norms = [m for m in model.modules() if getattr(m, "running_var", None) is not None]
    assert not any(m.training for m in norms)
    detach(model).train()
    assert all(m.training for m in norms)


@pytest.mark.parametrize(("spec", "family"), refusals())
def test_refusal_says_why(spec: str, family: str) -> None:
    """A method that does not fit a family refuses at inject with a reason and a hint, and leaves the model as it was."""
    model = bare(family)
    before = _portrait(model)
    with pytest.raises((UsageError, Mismatch)) as refusal:
        inject(model, spec, batches=families.labelled(family))
    assert len(str(refusal.value)) > 10
    assert refusal.value.hint
    assert _portrait(model) == before


def _reopened(spec: str, family: str, folder: Path) -> nn.Module:
    """A perturbed delta, saved, opened and attached to a fresh backbone."""
    path = folder / "delta.safetensors"
    case(spec, family).delta.save(path)
    return attach(bare(family), Delta.open(path))


def _backward(loss: torch.Tensor, spec: str) -> None:
    """A backward pass, unless a method has nothing to train."""
    if loss.requires_grad or not any(map(prepares, _modules(spec))):
        loss.backward()


def _modules(spec: str) -> list[Any]:
    """The modules of a stack's methods."""
    return [registry.load("methods", part.name) for part in knobs.parse(spec)]


def _undone(tensors: Iterable[str]) -> set[str]:
    """Those that the net itself undoes."""
    return {n for n in tensors if n.rpartition(".")[2] in SHIFTS and any(fnmatchcase(n, f"{u}.*") for u in UNDONE)}


@torch.no_grad()
def _moves(model: nn.Module, x: torch.Tensor, count: int) -> None:
    """Assert that moving a tensor moves the output, for `count` of them spread over the delta; whole numbers choose places.

    One that acts by whether its entries are large (Bi-LoRA's) may have to go far, one way or the other.
    """
    tensors, y = tensors_of(model), logits(model, x)
    alive = sorted({n for n, t in tensors.items() if t.is_floating_point()} - _undone(tensors))
    for name in alive[:: max(1, len(alive) // count)]:
        kept = tensors[name].clone()
        moved = 0.0
        for scale in (0.1, 10.0, -10.0):
            if not moved > 1e-6:
                families.perturb({name: tensors[name]}, seed=4, scale=scale)
                moved = relative(y, logits(model, x))
                tensors[name].copy_(kept)
        assert moved > 1e-6, name


def _features(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Pooled features: what a fresh head, of whatever kind, would see."""
    with torch.no_grad():
        return model.forward_head(model.forward_features(x), pre_logits=True)


def _plain(family: str, tensors: dict, args: dict, x: torch.Tensor) -> torch.Tensor:
    """The output of a plain backbone with folded tensors."""
    kind = next(t.dtype for t in tensors.values() if t.is_floating_point())
    model = families.build(family, dtype=kind, **args)
    model.load_state_dict(tensors)
    return logits(model, x)


def _portrait(model: nn.Module) -> dict:
    """Everything about a model but its values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = {
        n: (type(m), sorted(m.__dict__), m.training, [len(m.__dict__[h]) for h in hooks])
        for n, m in model.named_modules()
    }
    parameters = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    return {
        "modules": modules,
        "parameters": parameters,
        "classes": getattr(model, "num_classes", None),
        "head": head_names(model),
    }
