"""noah: subnets beside the stacks they stand for, the evolution beside an exhaustive search, and the way through `train`."""

import itertools
from random import Random

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests import families
from tests.contract.cases import logits, relative
from vtzoo import knobs, registry, talk
from vtzoo.anatomy import survey
from vtzoo.costs import planned
from vtzoo.delta import Delta
from vtzoo.errors import UsageError
from vtzoo.fit import checkpoint_path
from vtzoo.graft import tensors_of
from vtzoo.installed import head_state, installed
from vtzoo.live import attach, detach, inject, trainable
from vtzoo.methods import noah
from vtzoo.methods._evolution import Space, evolve
from vtzoo.methods._supernet import Supernet
from vtzoo.verbs import train as verb
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

QUICK = "steps=4,population=4,generations=2"
SIZES = noah.Config(tokens=(0, 2, 5), ranks=(0, 1, 3), widths=(0, 2, 4))
FAMILIES = ("vit", "vit-reg", "eva02", "beit", "swin", "swinv2", "mixer", "resnet", "nfnet", "regnet")


def _supernet(family: str) -> Supernet:
    """Of random values; its head too."""
    model = families.build(family)
    anatomy = survey(model)
    net = Supernet(model, noah.largest(anatomy, SIZES), anatomy, 0)
    families.perturb(tensors_of(net.net))
    families.perturb(head_state(net.net), seed=2)
    return net


def _space(net: Supernet) -> Space:
    return Space.of([(SIZES.sizes(rows[0].method), len(rows)) for rows in net.rows], SIZES.depths)


def _candidates(net: Supernet) -> list:
    """Some at random, the whole, and one with a method less."""
    space, rng = _space(net), Random(1)
    whole = tuple((sizes[-1],) * n for sizes, n in zip(space.sizes, space.blocks, strict=True))
    return [*(space.draw(rng) for _ in range(6)), whole, (*whole[:-1], (0,) * len(whole[-1]))]


@torch.no_grad()
def _stack(net: Supernet, sizes, family: str) -> nn.Module:
    """The stack that a subnet stands for, with the supernet's weights."""
    model = inject(families.build(family), noah.spec(net, sizes))
    cut = {}
    for rows, own in zip(net.rows, sizes, strict=True):
        for row, size in zip(rows, own, strict=True):
            cut |= row.cut(size)
    for name, value in tensors_of(model).items():
        value.copy_(cut[name])
    for name, value in head_state(model).items():
        value.copy_(head_state(net.net)[name])
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subnet_is_the_stack_at_its_sizes(family: str, agree) -> None:
    """Slices of the shared tensors give what a stack of these sizes gives with the same weights, and count as many."""
    net, x = _supernet(family), families.batch(family)
    worst = 0.0
    for sizes in [c for c in _candidates(net) if any(map(any, c))]:
        model = _stack(net, sizes, family)
        with torch.no_grad():
            worst = max(worst, relative(logits(model, x), net.run(sizes, x)))
        trained = sum(p.numel() for p in trainable(model).values()) - sum(t.numel() for t in head_state(model).values())
        assert net.count(sizes) == trained
    agree(f"noah on {family}", "the emitted stack", 0.0 if family == "vit" else 1e-12, attached=worst)


@pytest.mark.parametrize("family", ["vit", "eva02", "resnet"])
def test_gradients_reach_the_shared_tensors(family: str) -> None:
    """A subnet trains its slices alone: the first units of the shared tensors and no others, none where a size is 0."""
    net, x = _supernet(family), families.batch(family)
    sizes = [[2 if i == 0 else 0 for i in range(len(rows))] for rows in net.rows]
    net.run(sizes, x).square().sum().backward()
    for rows, (size, *_) in zip(net.rows, sizes, strict=True):
        for number, row in enumerate(rows):
            for name, value in ((n, v) for _, g, _ in row.grafts for n, v in g.named_parameters()):
                if number:
                    assert value.grad is None or not value.grad.any()
                elif (
                    axis := {"prompt": 0, "A": -2, "B": -1, "down": 0, "down_bias": 0, "up": 1}.get(name)
                ) is not None:
                    used = min(size, value.shape[axis])
                    assert value.grad.narrow(axis, 0, used).any()
                    assert not value.grad.narrow(axis, used, value.shape[axis] - used).any()


def test_absent_everywhere_is_the_backbone() -> None:
    """With every size 0 a supernet is the backbone with its head."""
    net, x, model = _supernet("vit"), families.batch("vit"), families.build("vit")
    model.load_state_dict({n: t.detach() for n, t in head_state(net.net).items()}, strict=False)
    with torch.no_grad():
        assert torch.equal(net.run([[0] * len(rows) for rows in net.rows], x), model(x))


def test_training_improves_every_size() -> None:
    """After some steps the smallest, the largest and drawn subnets all fit the images better than before; the rest is frozen."""
    net = _supernet("vit")
    x, y = families.batch("vit", 12), torch.arange(12) % 3
    trained = set(trainable(net.net))
    frozen = {n: p.clone() for n, p in net.net.named_parameters() if n not in trained}
    before = [net.score(c, x, y)[1] for c in _candidates(net)]
    space, rng = _space(net), Random(0)
    net.fit(lambda: space.draw(rng), x, y, 40, 0)
    after = [net.score(c, x, y)[1] for c in _candidates(net)]
    assert all(b < a for b, a in zip(before, after, strict=True))
    assert all(torch.equal(frozen[n], p) for n, p in net.net.named_parameters() if n in frozen)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_parts_learn_at_the_rates_of_their_methods(family: str) -> None:
    """Prompts, LoRA and adapters each at their own recipe's rate, the head at the probe's; nothing is left out."""
    net = _supernet(family)
    kind = "tokens" if family == "vit" else "maps"
    rates = {id(p): g["lr"] for g in net._groups() for p in g["params"]}
    assert len(rates) == len(trainable(net.net))
    for name, parameter in trainable(net.net).items():
        method = next((m for m in ("vpt-deep", "lora", "adapter") if f".{m.replace('-', '_')}." in name), "linear")
        assert rates[id(parameter)] == registry.load("methods", method).RECIPE[kind]["lr"], name


# ------------------------------------------------------------------------------------------------------- the evolution

TINY = Space.of([((0, 1, 2), 2), ((3, 1), 3)], (0.4, 1.0))


def _all(space: Space) -> set:
    """Every candidate of a space, by brute force."""
    by_method = []
    for sizes, depths, count in zip(space.sizes, space.depths, space.blocks, strict=True):
        by_method.append(
            {(*c, *(0,) * (count - depth)) for depth in depths for c in itertools.product(sizes, repeat=depth)}
        )
    return set(itertools.product(*by_method))


def _cost(one) -> int:
    return sum(7 * s + i for own in one for i, s in enumerate(own) if s)


@pytest.mark.parametrize("budget", [10, 30, 1000])
def test_the_evolution_finds_the_best_of_a_tiny_space(budget: int) -> None:
    """With as many tries as there are candidates it finds the best within the budget, and tries nothing above it."""
    space = {c for c in _all(TINY) if _cost(c) <= budget}
    value = {c: Random(repr(c)).random() for c in sorted(_all(TINY))}  # no order to climb along
    tried = evolve(TINY, lambda c: _cost(c) <= budget, value.__getitem__, 10, 12, Random(0))
    assert set(tried) <= space
    assert max(tried, key=tried.__getitem__) == max(space, key=value.__getitem__)


def test_the_evolution_climbs() -> None:
    """Where good sizes make good candidates it does better than ten times as many draws."""
    space = Space.of([((1, 2, 3, 4), 12), ((1, 2, 3, 4), 12)], (0.25, 0.5, 0.75, 1.0))
    wanted = space.draw(Random(5))

    def near(one) -> int:
        return -sum(abs(a - b) for x, y in zip(one, wanted, strict=True) for a, b in zip(x, y, strict=True))

    rng = Random(2)
    found = max(evolve(space, lambda _: True, near, 20, 20, Random(0)).values())
    assert found > max(near(space.draw(rng, 1 - rng.random())) for _ in range(4000))


def test_every_move_stays_in_the_space() -> None:
    """Drawn, mutated and crossed candidates have allowed depths and sizes; all of them can be reached by drawing."""
    space, rng = _all(TINY), Random(0)
    drawn = [TINY.draw(rng, 1 - rng.random()) for _ in range(4000)]
    assert set(drawn) == space
    assert TINY.smallest() in space
    for one, other in itertools.pairwise(drawn[:500]):
        assert TINY.child(rng, one, other) in {(a, b) for a in (one[0], other[0]) for b in (one[1], other[1])}
        assert TINY.mutant(rng, one) in space
    assert {TINY.mutant(rng, drawn[0]) for _ in range(200)} - {drawn[0]}


def test_the_smallest_is_the_least_that_is_something() -> None:
    """The least of every choice; where that is nothing, the first block's smallest."""
    assert Space.of([((5, 2), 4), ((0, 3), 2)], (0.5, 1)).smallest() == ((2, 2, 0, 0), (0, 0))
    assert Space.of([((0, 3, 9), 2)], (1,)).smallest() == ((3, 0),)


# ------------------------------------------------------------------------------------------------------------- compose


def _found(spec: str, family: str = "vit", **how) -> str:
    record = installed(inject(families.build(family), spec, batches=families.labelled(family), **how))
    return record.spec


@pytest.mark.parametrize(
    ("family", "budget"), [("vit", 700), ("vit", 1500), ("vit", 10**6), ("resnet", 900), ("swin", 2000)]
)
def test_the_budget_is_kept(family: str, budget: int) -> None:
    """The stack that is hung has at most the budget's parameters, the head left out."""
    model = inject(families.build(family), f"noah[budget={budget},{QUICK}]", batches=families.labelled(family))
    assert 0 < sum(t.numel() for t in tensors_of(model).values()) <= budget
    assert {p.method for p in installed(model).parts} <= {"vpt-deep", "lora", "adapter"}


def test_the_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that were tried the stack is the one with the highest score."""
    scored = []

    def score(net: Supernet, sizes, *_held) -> tuple[int, float]:
        scored.append(net.count(sizes))
        return 1, float(scored[-1] % 97)

    monkeypatch.setattr(Supernet, "score", score)
    model = inject(families.build("vit"), f"noah[{QUICK}]", batches=families.labelled("vit"))
    count = sum(t.numel() for t in tensors_of(model).values())
    assert count in scored
    assert count % 97 == max(n % 97 for n in scored)


def test_the_search_repeats_and_leaves_no_trace() -> None:
    """The same seed gives the same stack and values, another seed another; model and random numbers stay as they were."""
    model = families.build("vit")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    config = knobs.decode(noah.Config, {"steps": 4, "population": 4, "generations": 2, "tokens": 0}, "noah")
    noah.compose(model, config, families.labelled("vit"), 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert installed(model) is None
    inject(model, f"noah[{QUICK}]", batches=families.labelled("vit"))
    other = inject(families.build("vit"), f"noah[{QUICK}]", batches=families.labelled("vit"))
    assert installed(model).spec == installed(other).spec
    assert all(torch.equal(t, tensors_of(other)[n]) for n, t in tensors_of(model).items())
    assert len({_found(f"noah[{QUICK}]", seed=s) for s in range(4)}) > 1
    detach(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_stack_with_noah_in_it() -> None:
    """Other parts stay where they are, and a loader is read once for all."""
    read = []

    def batches():
        read.append(1)
        yield from families.labelled("vit")

    model = inject(families.build("vit"), f"ssf+noah[{QUICK}]+gps", batches=batches())
    methods = [p.method for p in installed(model).parts]
    assert (methods[0], methods[-1], read) == ("ssf", "gps", [1])
    assert set(methods[1:-1]) <= {"vpt-deep", "lora", "adapter"}
    assert "noah" not in installed(model).spec


def test_only_what_fits_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without attention prompts are left out, which is said; a choice of nothing but 0 leaves a method out too."""
    said = []
    monkeypatch.setattr(talk, "say", said.append)
    assert "vpt-deep" not in _found(f"noah[{QUICK}]", "resnet")
    assert said[0].startswith("noah leaves vpt-deep out: no block of this ResNet has a plain attention as its own part")
    assert said[-1].startswith("noah tried 8 stacks within 400,000 parameters")
    assert {p.name for p in knobs.parse(_found(f"noah[{QUICK},tokens=0,widths=0]"))} == {"lora"}


def test_halves_hold_out_of_every_class() -> None:
    """A quarter of the images is held out, of each class alike, however they are ordered; none is in both."""
    x, y = torch.arange(48.0)[:, None], torch.arange(48) % 4
    (train, train_y), (held, held_y) = noah.halves([(x[:20], y[:20]), (x[20:], y[20:])])
    assert sorted([*train[:, 0].tolist(), *held[:, 0].tolist()]) == list(range(48))
    assert held_y.bincount().tolist() == [3, 3, 3, 3]
    assert train_y.bincount().tolist() == [9, 9, 9, 9]
    assert torch.equal(y[held[:, 0].long()], held_y)


REFUSED = {
    "noah[budget=20]": "the smallest stack of these sizes has [0-9]+ parameters, and the budget is 20",
    "noah[tokens=0,ranks=0,widths=0]": "there is nothing to search",
    "noah[depths=]": "there is nothing to search",
    "noah[budget=few]": "budget",
    "noah[budget=0.0000001M]": "budget",
    "noah[ranks=-1]": "ranks",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_refused_knobs(spec: str) -> None:
    """A budget below every stack, nothing to search, and numbers that are none."""
    with pytest.raises(UsageError, match=REFUSED[spec]) as refusal:
        _found(spec)
    assert refusal.value.hint


def test_refused_without_images_or_head() -> None:
    """It needs labelled images, more than a few, and a classifier; the model then carries nothing."""
    model = families.build("vit")
    for batches, words in ((None, "there are no images to train on"), ([], "and there are 0")):
        with pytest.raises(UsageError, match=words):
            inject(model, "noah", batches=batches)
    with pytest.raises(UsageError, match="this model has none"):
        inject(families.build("vit", num_classes=0), "noah", batches=families.labelled("vit"))
    assert installed(model) is None
    with pytest.raises(UsageError, match="can't be told beforehand") as refusal:
        planned(survey(model), "noah", {})
    assert "vtzoo train --method noah" in refusal.value.hint


@pytest.mark.parametrize(("text", "count"), [("400000", 400_000), ("0.1M", 100_000), ("2.5k", 2500), ("1m", 10**6)])
def test_budgets_as_people_write_them(text: str, count: int) -> None:
    """Plain, in thousands, in millions; stored as the number."""
    config = knobs.decode(noah.Config, {"budget": text}, "noah")
    assert config.budget == count
    assert knobs.decode(noah.Config, knobs.encode(config), "noah") == config


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lora[ranks=fc1]", "ranks=fc1 is not TARGET:RANK"),
        ("adapter[ranks=:3]", "ranks=:3 is not TARGET:RANK"),
        ("vpt-deep[lengths=blocks.0:x]", "lengths=blocks.0:x is not TARGET:TOKENS"),
        ("lora[ranks=*:0]", "leaves every site out"),
        ("vpt-deep[lengths=nowhere:3]", "target 'nowhere' names nothing"),
    ],
)
def test_refused_sizes(spec: str, words: str) -> None:
    """Exceptions that aren't a target and a number, that name nothing, or leave nothing."""
    with pytest.raises(UsageError) as refusal:
        inject(families.build("vit"), spec)
    assert words in str(refusal.value)


# --------------------------------------------------------------------------------------------------------------- train


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo with a tiny ViT."""
    root = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), root / "tiny.safetensors")
    made = Zoo.init(root / "zoo")
    add_backbone(name="tiny", arch="test_vit", weights=root / "tiny.safetensors", zoo=made)
    return made


def _train(zoo: Zoo, name: str, **how):
    recipe = {"epochs": 1, "limit": 40}
    return train(
        backbone="tiny", data="vtzoo:fashion", method=f"noah[budget=0.01M,{QUICK}]", name=name, zoo=zoo, recipe=recipe, **how
    )  # fmt: skip


@pytest.mark.slow
def test_train_keeps_the_stack_that_was_found(zoo: Zoo) -> None:
    """The delta is a plain stack's, within the budget, trained at its parts' rate; its lineage says what was searched."""
    made = _train(zoo, "fashion/noah")
    delta = Delta.open(made.path)
    methods = {p.method for p in delta.parts}
    assert methods == {p.name for p in knobs.parse(delta.method)} <= {"vpt-deep", "lora", "adapter"}
    assert 0 < delta.size <= 10_000
    assert delta.lineage["composed_by"] == f"noah[budget=0.01M,{QUICK}]"
    assert delta.recipe["lr"] == min(registry.load("methods", m).RECIPE["tokens"]["lr"] for m in methods)
    assert evaluate(ref="fashion/noah", data="vtzoo:fashion", zoo=zoo).metrics["fashion"]["images"]
    again = inject(timm.create_model("test_vit", num_classes=10), delta.method)
    assert sorted(tensors_of(again)) == sorted(n for n in delta.tensors if not n.startswith("@"))
    attach(detach(again), delta, check=False)


@pytest.mark.slow
def test_resume_searches_no_second_time(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is taken up again has the stack of its checkpoint, without a search, and gives what it would have given."""
    whole = _train(zoo, "fashion/whole")

    def fails(*_args: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(verb, "_keep", fails)
        with pytest.raises(OSError, match="no space"):
            _train(zoo, "fashion/resumed")
    checkpoint = checkpoint_path(zoo.root, "fashion/resumed", "delta")
    assert checkpoint.is_file()
    monkeypatch.setattr(noah, "compose", fails)
    resumed = Delta.open(_train(zoo, "fashion/resumed", resume=True).path)
    first = Delta.open(whole.path)
    assert resumed.method == first.method
    assert resumed.lineage == first.lineage
    assert all(torch.equal(t, first.tensors[n.replace("resumed", "whole")]) for n, t in resumed.tensors.items())
