"""The parts of a block-wise search: the space, what teachers show, ratings, costs, and the choice."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError

from vtzoo import knobs
from vtzoo.crops import normalised
from vtzoo.dna import Dna
from vtzoo.dna._choice import check_affordable, chosen
from vtzoo.dna._costs import Bench, Cost, counted
from vtzoo.dna._shown import Shown, _form, _places
from vtzoo.dna._space import ARCH, STAGES, Space
from vtzoo.dna._supernet import rated, supernet, trained
from vtzoo.dna._told import typed
from vtzoo.errors import UsageError
from vtzoo.outputs import shapes
from vtzoo.probing import work
from vtzoo.recipe import Recipe
from vtzoo.spec import Preprocess
from vtzoo.student import build_student
from vtzoo.zoo import Zoo

SPACE = Space(8, (1, 2), (3, 7))
SHAPE = Preprocess(input_size=(3, 32, 32))
MIXED = ((2, 3), (1, 7), (2, 7), (1, 3))


def _shown(network: Any, count: int = 320, held: int = 64) -> Shown:
    """What a ConvNeXt of the space's own widths shows of noise."""
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, *SHAPE.input_size), dtype=torch.uint8, generator=draw)
    with torch.inference_mode():
        _, maps = network.eval().forward_intermediates(normalised(pixels, SHAPE))
    sizes = [(m.shape[2], m.shape[3]) for m in maps]
    return Shown(pixels, [(m / m.std()).half() for m in maps], count - held, sizes, SHAPE)


def _teacher() -> Any:
    """Of 1x7 in its second stage, with blocks that say as much as what passes them, and kernels that are empty in the middle."""
    torch.manual_seed(0)
    made = SPACE.network(((2, 3), (1, 7), (2, 3), (2, 3)), 0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.startswith("stages") and p.ndim > 1:
                p.copy_(1.5 * torch.randn_like(p) / p[0].numel() ** 0.5)
            if name.startswith("stages.1") and name.endswith("conv_dw.weight"):
                p[:, :, 2:5, 2:5] = 0
    return made


def test_the_teachers_own_choice_is_rated_best() -> None:
    """Of a teacher that is a network of the space, its own stage is found again: others that hold it are as good, the rest is far behind."""
    ratings = rated(trained(supernet(SPACE)[1], 1, images := _shown(_teacher()), 600, Recipe(seed=0)), 1, images)
    assert ratings[1, 7] <= 1.1 * min(ratings.values())
    assert min(ratings[1, 3], ratings[2, 3]) > 1.4 * ratings[1, 7]


def test_ratings_are_the_relative_loss() -> None:
    """|Y - Y'|_1 / (K std(Y)) over the images that are held out, in any batches, and no others; a perfect stage has 0."""
    torch.manual_seed(0)
    stage, images = supernet(SPACE)[1].eval(), _shown(_teacher(), count=60, held=40)
    found = rated(stage, 1, images)
    x, y = images.pair(1, images.held)
    with torch.inference_mode():
        for pick, out in stage(x):
            assert found[pick] == pytest.approx(((y - out).abs().sum() / (y.numel() * y.std())).item(), rel=1e-4)
    assert set(found) == set(SPACE.picks)
    with torch.inference_mode():
        own = torch.cat([dict(stage(m[None].float()))[1, 7] for m in images.maps[0]])
    perfect = Shown(images.pixels, [images.maps[0], own, *images.maps[2:]], images.trained, images.sizes, SHAPE)
    assert rated(stage, 1, perfect)[1, 7] < 1e-5 < rated(stage, 1, perfect)[1, 3]


def test_a_choice_is_the_networks_stage() -> None:
    """What a choice gives is what the stage of a stock network with the same numbers gives, of every depth and kernel."""
    torch.manual_seed(0)
    stages, x = supernet(SPACE), torch.randn(2, *SHAPE.input_size)
    for pick in SPACE.picks:
        net: Any = SPACE.network((pick,) * STAGES, 0).eval()
        inputs = [x, *net.forward_intermediates(x)[1][:-1]]
        for i, (stage, given) in enumerate(zip(stages, inputs, strict=True)):
            net.stages[i].downsample.load_state_dict(stage.entry[1].state_dict())
            net.stages[i].blocks.load_state_dict(stage.rows[str(pick[1])][: pick[0]].state_dict())
            before = stage.entry[0](given)
            with torch.inference_mode():
                assert torch.equal(dict(stage.eval()(given))[pick], net.stages[i](before))


def test_the_same_seed_gives_the_same_stage() -> None:
    """Training and ratings are functions of images, stage and seed."""
    images, found = _shown(_teacher(), count=40, held=8), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(rated(trained(supernet(SPACE)[3], 3, images, 3, Recipe(seed=seed)), 3, images))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kernel", [1, 3, 9])
def test_any_odd_kernel_keeps_the_size(kernel: int) -> None:
    """Stages are as large with one as with the other, from 32 pixels up, and of odd sizes."""
    for side in (32, 72):
        net = Space(8, (1,), (kernel,)).network(((1, kernel),) * STAGES, 3).eval()
        assert net(torch.randn(1, 3, side, side)).shape == (1, 3)
        found = shapes(net, (3, side, side), {"maps"}, STAGES).maps
        assert [m[1:] for m in found] == [(side >> i, side >> i) for i in (2, 3, 4, 5)]


def test_counts_add_up() -> None:
    """Parameters and multiply-adds of any network are its stages' sum and the rest, exactly, by torch's own count."""
    made = SPACE.network(SPACE.smallest, 0)
    bench = Bench(SPACE, 7, SHAPE, shapes(made, SHAPE.input_size, {"maps"}, STAGES))
    params, macs = counted(bench)
    for picks in (MIXED, SPACE.smallest, ((2, 7),) * STAGES):
        choice = tuple(SPACE.picks.index(p) for p in picks)
        assert (params.of(choice), macs.of(choice)) == work(SPACE.network(picks, 7), SHAPE.input_size)
    assert params.least == (0,) * STAGES


def test_a_network_can_be_typed(tmp_path: Any) -> None:
    """What a search finds is a student's name with arguments, of JSON, which plain timm takes."""
    text = typed(SPACE, MIXED)
    student = build_student(text, Zoo.init(tmp_path / "zoo"), 5, 64)
    assert student.card.model_args == {"depths": [2, 1, 2, 1], "kernel_sizes": [3, 7, 7, 3], "dims": [8, 16, 32, 64], "ls_init_value": 1.0}  # fmt: skip
    plain = timm.create_model(ARCH, num_classes=5, **student.card.model_args)
    plain.load_state_dict(student.model.state_dict())
    assert all((m.gamma == 1).all() for s in plain.stages for m in s.blocks)


@pytest.mark.parametrize("channels", [8, 24])
def test_channels_are_brought_to_the_students(channels: int) -> None:
    """The first principal components, each channel of the same variance, with all of them nothing lost but scale and place; of as many channels the map itself."""
    maps = (
        torch.randn(64, 16, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 17)[:, None, None] + 3
    )
    found = _form(maps, channels)(maps)
    assert found.shape == (64, channels, 4, 4)
    rows, own = (m.movedim(1, -1).flatten(0, 2) for m in (found, maps))
    assert torch.allclose(rows.var(0), torch.ones(channels), atol=1e-3)
    u, s, _ = torch.linalg.svd(own - own.mean(0), full_matrices=False)
    wanted = (u[:, :channels] * s[:channels].square()) @ u[:, :channels].T
    assert torch.allclose(
        rows @ rows.T * (wanted.trace() / rows.square().sum()), wanted, atol=1e-3 * wanted.max().item()
    )
    alike = _form(maps, 16)(maps)
    assert torch.allclose(alike * maps.std(), maps, atol=1e-4)


def test_no_image_is_rated_on_that_was_trained_on() -> None:
    """Of each lesson a fifth is held out, one view each; the others fill what room there is with views."""
    lessons: Any = [SimpleNamespace(images=range(n)) for n in (50, 10)]
    train, held = _places(lessons, 100, 3, seed=0)
    assert [sum(n == i for n, _, _ in held) for i in (0, 1)] == [10, 2]
    assert not {(n, i) for n, _, i in train} & {(n, i) for n, _, i in held}
    assert [sum(n == i for n, _, _ in train) for i in (0, 1)] == [40, 24]
    assert len(set(train)) == len(train)
    assert {v for _, v, _ in held} == {0}


def _costs(late: float) -> tuple[list[list[float]], dict[str, Cost], Any]:
    """Two choices of two stages; the better rated are slower, and whole networks take `late` more than their sums."""
    table = [[1.0, 2.0], [1.0, 3.0]]
    asked: list[tuple[int, ...]] = []

    def measure(choices: Sequence[tuple[int, ...]]) -> list[float]:
        asked.extend(choices)
        return [sum(row[c] for row, c in zip(table, choice, strict=True)) + late for choice in choices]

    return [[2.0, 1.0], [4.0, 1.0]], {"ms": Cost(table, 0.0)}, (measure, asked)


@pytest.mark.parametrize(
    ("late", "budget", "wanted"),
    [(0.0, 9.0, (1, 1)), (0.0, 4.5, (0, 1)), (0.7, 4.5, (1, 0)), (-1.0, 4.5, (1, 1)), (2.4, 4.5, (0, 0))],
)
def test_the_best_that_keeps_the_budget_as_measured_is_taken(late: float, budget: float, wanted: tuple) -> None:
    """Whole networks decide, however wrong sums are, and none is measured twice."""
    ratings, costs, (measure, asked) = _costs(late)
    choice, measured = chosen(ratings, costs, {"ms": budget}, measure)
    assert choice == wanted
    assert measured[choice] <= budget
    assert len(asked) == len(set(asked)) == len(measured)


def test_budgets_that_nothing_keeps_are_refused() -> None:
    """By sums before any training, with the least of each kind; and where whole networks turn out slower, as measured."""
    ratings, costs, (measure, _) = _costs(3.0)
    with pytest.raises(UsageError, match="5 ms, not 4") as refusal:
        chosen(ratings, costs, {"ms": 4.0}, measure)
    assert refusal.value.hint
    costs["parameters"] = Cost([[10.0, 20.0], [20.0, 10.0]], 5.0)
    with pytest.raises(UsageError, match=r"25\.00% of the parameters, not 20\.00%; 2 ms, not 9"):
        check_affordable(costs, {"parameters": 20.0, "ms": 9.0}, {"parameters": 100.0})
    with pytest.raises(UsageError, match="each alone"):
        check_affordable(costs, {"parameters": 25.0, "ms": 3.9}, {"parameters": 100.0})
    check_affordable(costs, {"parameters": 25.0, "ms": 4.0}, {"parameters": 100.0})


@pytest.mark.parametrize(
    "wish",
    [
        {}, {"width": "40"}, {"latency_ms": "0"}, {"params": "1.5"}, {"macs": "0.5", "kernels": "3|4"}, {"macs": "0.5", "depths": "0|1"},
        {"macs": "0.5", "width": "12"}, {"macs": "0.5", "depths": ""}, {"macs": "0.5", "stages": "4"}, {"macs": "0.5", "steps": "0"},
    ],
)  # fmt: skip
def test_wishes_that_are_none_are_refused(wish: dict[str, str]) -> None:
    """No budget, one out of range, kernels without a middle, stages without blocks, widths that are no multiple of 8, unknown names."""
    with pytest.raises((UsageError, ValidationError)):
        knobs.decode(Dna, wish, "dna")


def test_a_space_is_what_was_listed() -> None:
    """Each depth with each kernel, once, in order."""
    wish = knobs.decode(Dna, knobs.one("dna[latency_ms=2,depths=3|1,kernels=5|3|5]").knobs, "dna")
    assert isinstance(wish, Dna)
    assert wish.space.picks == [(1, 3), (1, 5), (3, 3), (3, 5)]
    assert len(Dna(macs=0.5).space.picks) ** STAGES == 6561
