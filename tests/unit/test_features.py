"""The classifiers on features: where they start, what trains, what they keep of images, and what becomes of it in a file and in a merge."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vtzoo
from tests import families
from tests.contract.cases import bare, logits, relative
from vtzoo import knobs
from vtzoo.delta import Delta, is_linear
from vtzoo.errors import NotFoldable, ShapeMismatch, UsageError
from vtzoo.folding import fold
from vtzoo.heads import classifier
from vtzoo.installed import head_state, set_head
from vtzoo.live import attach, extract, inject, trainable
from vtzoo.methods import _cache, ape
from vtzoo.spec import Task
from vtzoo.stage import logits as said_of

METHODS = ("clip-adapter", "task-residual", "tip-adapter", "tip-adapter-f", "ape", "ape[train=true]")
D, E, C = 32, 20, families.CLASSES


def images(family: str, count: int = 10) -> list[tuple[Tensor, Tensor]]:
    """Two batches of random images, of every class as many."""
    x, y = families.batch(family, count), torch.arange(count) % C
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def made(spec: str, family: str = "dual", count: int = 10) -> Any:
    """A network with such a classifier, as it starts."""
    return inject(bare(family), spec, batches=images(family, count))


def moved(spec: str, family: str = "dual", count: int = 10, task: str = "t") -> tuple[nn.Module, Delta]:
    """The same with other numbers, and its delta."""
    model = made(spec, family, count)
    families.perturb(dict(trainable(model)), seed=count)
    return model, extract(model, tasks=[Task(name=task, classes=tuple("abcde"))])


def features(family: str, x: Tensor) -> Tensor:
    """What comes to the classifier, normalised."""
    model: Any = bare(family)
    return F.normalize(model.forward_head(model.forward_features(x), pre_logits=True), dim=-1).detach()


@pytest.mark.parametrize("templates", [(), ("a {}.", "one {} of many")])
def test_a_task_residual_starts_as_zero_shot(templates: tuple[str, ...]) -> None:
    """With one template and with several the logits are those of the class names, and the text's length is the scale of the residual."""
    model: Any = bare("dual")
    model.speak(tuple("abcde"), templates)
    x, texts = families.batch("dual"), model.clip_head.texts().detach()
    before = logits(model, x)
    inject(model, "task-residual")
    assert relative(before, logits(model, x)) <= 1e-14
    assert torch.allclose(model.clip_head.text.norm(dim=-1), texts.norm(dim=-1).mean(1))
    assert bool(templates) or torch.allclose(model.clip_head.text, texts[:, 0])


@pytest.mark.parametrize(
    ("spec", "family", "names"),
    [
        ("clip-adapter", "dual", {"down.weight", "up.weight"}),
        ("clip-adapter", "vit", {"down.weight", "up.weight", "weight", "bias"}),
        ("task-residual", "dual", {"residual"}),
        ("tip-adapter", "dual", set()),
        ("tip-adapter-f", "dual", {"keys"}),
        ("tip-adapter-f[head=linear]", "vit", {"keys"}),
        ("ape", "vit", set()),
        ("ape[train=true]", "dual", {"residual", "worth"}),
    ],
)
def test_gradient_reaches_what_is_trained_and_nothing_else(spec: str, family: str, names: set[str]) -> None:
    """After a backward pass what is said to be trained has a gradient, and no other tensor of the network."""
    model = made(spec, family)
    families.perturb(dict(trainable(model)))
    loss = F.cross_entropy(model(families.batch(family, 5)), torch.arange(5))
    place = "clip_head." if family == "dual" else "head."
    if names:
        loss.backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert found == set(trainable(model)) == {place + n for n in names}


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("clip-adapter", 2 * E * (E // 4)),
        ("clip-adapter[reduction=7]", 2 * E * (E // 7)),
        ("task-residual", C * E),
        ("tip-adapter", 0),
        ("tip-adapter-f", 10 * E),
        ("ape", 0),
        ("ape[train=true]", C * E // 2 + 10),
        ("ape[train=true,channels=3]", C * 3 + 10),
    ],
)
def test_trained_numbers(spec: str, count: int) -> None:
    """As many as the papers say, for ten images."""
    assert sum(p.numel() for p in trainable(made(spec)).values()) == count


@pytest.mark.parametrize("spec", METHODS)
def test_a_file_brings_as_many_images_as_it_has(spec: str, tmp_path) -> None:
    """Saved, opened and attached the outputs are the same bits, with the text tower and without; the number of images is the file's own."""
    x = families.batch("dual")
    live, delta = moved(spec, count=15)
    delta.save(tmp_path / "delta.safetensors")
    opened = Delta.open(tmp_path / "delta.safetensors")
    for args in ({}, {"text": False}):
        model = attach(bare("dual", classes=3, **args), opened, check=not args)
        assert torch.equal(logits(model, x), logits(live, x))


def test_a_file_whose_rows_differ_is_refused() -> None:
    """Keys of another number than the labels have no place."""
    _, delta = moved("tip-adapter-f")
    tensors = dict(delta.tensors)
    tensors["@head/t/clip_head.keys"] = torch.zeros(9, E, dtype=torch.float64)
    with pytest.raises(ShapeMismatch, match="keys"):
        attach(bare("dual"), delta.with_(tensors=tensors))


def test_a_task_residual_folds_into_one_layer() -> None:
    """The plain network without a text tower says what the attached one says."""
    x, (live, delta) = families.batch("dual"), moved("task-residual")
    folded = fold(bare("dual").state_dict(), delta)
    assert folded.all_args == {"text": False}
    plain = bare("dual", **folded.all_args)
    plain.load_state_dict(dict(folded))
    assert relative(logits(live, x), logits(plain, x)) <= 1e-12


@pytest.mark.parametrize("spec", [s for s in METHODS if s != "task-residual"])
def test_the_others_say_why_they_do_not_fold(spec: str) -> None:
    """And attached and any one layer would differ: the logits of a sum of features are not the sum of the logits."""
    live, delta = moved(spec)
    with pytest.raises(NotFoldable, match="headless"):
        fold(bare("dual").state_dict(), delta)
    head: Any = live.get_submodule("clip_head")
    with torch.no_grad():
        a, b, zero = head(torch.eye(E, dtype=torch.float64)[:3]).split(1)
        both = head(torch.eye(E, dtype=torch.float64)[:2].sum(0, keepdim=True))
        assert relative(a + b - zero, both) > 1e-3


def test_what_is_kept_of_images() -> None:
    """A prototype is its class's mean direction, a linear classifier the closed form's; without a word of the images they stand alone."""
    x, y = (torch.cat(part) for part in zip(*images("vit"), strict=True))
    unit = features("vit", x)
    model: Any = made("tip-adapter[alpha=0,scale=7]", "vit")
    means = torch.stack([unit[y == c].mean(0) for c in range(C)])
    assert relative(7 * unit @ F.normalize(means, dim=-1).T, logits(model, x)) <= 1e-12
    assert torch.equal(model.head.labels.long(), y)
    assert torch.allclose(model.head.keys, unit, atol=1e-12)
    weight, bias = classifier(unit.float(), y, C)
    assert torch.equal(made("tip-adapter[head=linear]", "vit").head.weight, weight.double())
    assert torch.equal(made("tip-adapter[head=linear]", "vit").head.bias, bias.double())


def test_on_a_dual_encoder_the_text_speaks_unless_told_otherwise() -> None:
    """Without a word of the images the logits are zero-shot's; head=prototype takes class means there, too."""
    x = families.batch("dual")
    assert relative(logits(bare("dual"), x), logits(made("tip-adapter[alpha=0]"), x)) <= 1e-12
    assert relative(logits(bare("dual"), x), logits(made("tip-adapter[alpha=0,head=prototype]"), x)) > 1e-2


def test_ape_chooses_channels_by_pairs_of_classes() -> None:
    """Of classes with one and with several images the criterion is the mean over all pairs of vectors of two classes."""
    generator = torch.Generator().manual_seed(0)
    texts, keys = (F.normalize(torch.randn(n, 12, generator=generator), dim=-1) for n in (3, 6))
    labels, config = torch.tensor([0, 1, 1, 2, 2, 2]), ape.Config(balance=0.4)
    sets = [torch.cat([texts[c : c + 1], keys[labels == c]]) for c in range(3)]
    pairs = [a * b for i, one in enumerate(sets) for j, two in enumerate(sets) if i != j for a in one for b in two]
    wanted = (0.4 * texts.var(dim=0) - 0.6 * torch.stack(pairs).mean(0)).topk(5).indices
    assert set(ape.chosen(texts, keys, labels, 5, config).tolist()) == set(wanted.tolist())


def test_ape_with_all_channels_and_equal_weights_is_tip_adapter() -> None:
    """gamma=0 weighs no image."""
    x = families.batch("dual")
    one, other = made(f"ape[channels={E},gamma=0,alpha=2,beta=3]"), made("tip-adapter[alpha=2,beta=3]")
    assert relative(logits(one, x), logits(other, x)) <= 1e-12


@pytest.mark.parametrize("spec", ["tip-adapter", "ape"])
def test_the_search_finds_the_best_of_its_grid(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No alpha, beta and gamma of the grid get more validation images right than those that it leaves in the head."""
    monkeypatch.setitem(_cache.SEARCHED, "beta", (0.1, 7.0, 4))
    monkeypatch.setitem(_cache.SEARCHED, "alpha", (0.1, 3.0, 3))
    monkeypatch.setattr(ape, "GAMMAS", (0.0, 1.0, 2))
    head: Any = made(spec, "vit", 40).get_submodule("head")
    x = torch.randn(60, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(60) % C

    def right() -> int:
        return int((head(x).argmax(-1) == y).sum())

    module, found = knobs.parse(spec)[0].name, dict[tuple[float, ...], int]()
    gammas = _cache.grid(*ape.GAMMAS) if module == "ape" else [math.nan]
    for beta in _cache.grid(0.1, 7.0, 4):
        for gamma in gammas:
            for alpha in _cache.grid(0.1, 3.0, 3):
                head.alpha.fill_(alpha)
                head.beta.fill_(beta)
                if module == "ape":
                    head.gamma.fill_(gamma)
                found[beta, gamma, alpha] = right()
    assert len(set(found.values())) > 1
    _cache.tune(head, None, x, y)
    assert right() == max(found.values())


@pytest.mark.parametrize("spec", ["tip-adapter", "task-residual", "ape[train=true]", "clip-adapter"])
def test_tasks_beside_each_other(spec: str, tmp_path) -> None:
    """A merge keeps each task's classifier, however many images it has; a task residual becomes a plain one."""
    x, both = families.batch("dual"), [moved(spec, count=n, task=t) for n, t in ((10, "one"), (15, "two"))]
    merged = vtzoo.merge([d for _, d in both], "linear", base=bare("dual").state_dict())
    merged.save(tmp_path / "merged.safetensors")
    merged = Delta.open(tmp_path / "merged.safetensors")
    assert is_linear(merged.head("one")) == (spec == "task-residual")
    model: Any = attach(bare("dual", text=False), merged, task="one", check=False)
    for task, (live, _) in zip(("one", "two"), both, strict=True):
        set_head(model, merged, task)
        wanted = logits(live, x)
        assert relative(wanted, logits(model, x)) <= 1e-6
        assert relative(wanted, said_of(merged, task, features("dual", x).float()).double()) <= 1e-4


@pytest.mark.parametrize(
    ("build", "batches", "message"),
    [
        ({}, None, "keeps features"),
        ({}, [], "no labelled images"),
        ({"classes": 0}, "some", "no linear classifier"),
    ],
)
def test_a_cache_without_images_or_classes_is_refused(build: dict[str, int], batches: Any, message: str) -> None:
    """And the network is as it was."""
    model = bare("vit", **build)
    before = list(model.state_dict())
    with pytest.raises(UsageError, match=message):
        inject(model, "tip-adapter", batches=images("vit") if batches == "some" else batches)
    assert list(model.state_dict()) == before


def test_images_are_looked_at_in_a_stack_after_all_is_hung() -> None:
    """The keys are what the network says with everything on it, whatever the order of the stack."""
    for spec in ("tip-adapter+ssf[init_std=0.5]", "ssf[init_std=0.5]+tip-adapter"):
        model: Any = inject(bare("vit"), spec, batches=images("vit"), seed=3)
        x = torch.cat([x for x, _ in images("vit")])
        with torch.no_grad():
            seen = F.normalize(model.forward_head(model.forward_features(x), pre_logits=True), dim=-1)
        assert torch.allclose(model.head.keys, seen, atol=1e-12)
        assert not torch.allclose(model.head.keys, features("vit", x), atol=1e-3)
        assert "head.labels" in head_state(model)
