"""Steps of a merge by themselves, where papers say little: small tensors, equal deltas, several random steps, odd names."""

import math

import pytest
import timm
import torch

import vtzoo
from tests.contract.merge_cases import copies, random_deltas
from vtzoo.errors import UsageError
from vtzoo.merges._chain import algorithm, steps, written
from vtzoo.merges._depth import depths
from vtzoo.merges._whole import Whole, square_of

SHAPES = {"a.weight": (37, 11), "a.bias": (37,)}


def stepped(spec: str, vectors: list[dict[str, torch.Tensor]], coef: tuple[float, ...] = ()) -> dict[str, torch.Tensor]:
    """Task vectors through a chain."""
    shapes = {n: tuple(t.shape) for v in vectors for n, t in v.items()}
    fresh = [copies(v) for v in vectors]
    merged = algorithm(steps(spec), Whole(fresh, coef or (1.0,) * len(vectors), shapes))
    return {n: merged(n) for n in shapes}


@pytest.mark.parametrize("spec", ["dare+dare", "dare+della", "della+dare"])
def test_random_steps_draw_each_for_itself(spec):
    """Two steps that keep half keep a quarter together (a little more where the second prefers what is left), and the mean stays."""
    out = stepped(
        f"{spec}+task-arithmetic[scale=1]", [{"a.weight": torch.ones(400, 500) + 0.01 * torch.randn(400, 500)}]
    )["a.weight"]
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert (out != 0).float().mean().item() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("spec", ["knots+slerp", "core+slerp"])
def test_no_arc_between_coordinates(spec):
    """What looks at the backbone's own weights can't work in a space, and says which."""
    with pytest.raises(UsageError, match="slerp looks at the backbone's own weights"):
        steps(spec)


def test_the_hint_names_the_same_merge():
    """In the right order a chain has the merge that the hint shows."""
    with pytest.raises(UsageError) as caught:
        steps("svc+knots")
    assert "knots+ties+svc" in str(caught.value.hint)
    assert written(steps("knots+svc")) == "knots+ties+svc"


@pytest.mark.parametrize("count", [1, 2, 5, 9, 50, 100, 1000])
def test_breadcrumbs_leaves_something(count):
    """However few entries there are, and if all are of one size."""
    draw = torch.Generator().manual_seed(count)
    for values in (torch.randn(count, generator=draw), torch.randn(count, generator=draw).sign()):
        out = stepped("breadcrumbs+task-arithmetic[scale=1]", [{"a.bias": values}])["a.bias"]
        kept = out != 0
        assert kept.any()
        assert torch.equal(out[kept], values[kept])
    assert int(kept.sum()) == count  # all are equal: none is an outlier, none is small


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_sce_of_equal_deltas_is_the_delta(count):
    """Entries that don't differ are all alike: none is chosen before another."""
    value = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(stepped("sce", [{"a.weight": value}] * count)["a.weight"], value, rtol=1e-6)


def test_sce_sees_small_differences():
    """Of two deltas that differ by little, the entries are chosen that float64 chooses."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(40, 30, generator=draw)
    b = a + 1e-4 * torch.randn(40, 30, generator=draw)
    out = stepped("sce[density=0.1]", [{"a.weight": a}, {"a.weight": b}])["a.weight"]
    wanted = torch.stack([a, b]).double().var(0).flatten().topk(120).indices
    assert set(out.flatten().nonzero().flatten().tolist()) == set(wanted.tolist())


@pytest.mark.parametrize("spec", ["tsv", "iso-c", "iso-cts", "wudi"])
@pytest.mark.parametrize("space", ["core", "knots"])
def test_a_matrix_stays_one_in_a_space(spec, space):
    """Of joint rank 1 its coordinates are a row or a number, and still no average is taken."""
    draw = torch.Generator().manual_seed(0)
    one = {"a.weight": torch.randn(9, 1, generator=draw) @ torch.randn(1, 7, generator=draw)}
    other = {"b.weight": torch.randn(5, 6, generator=draw)}
    plain, inside = (stepped(s, [one, other])["a.weight"] for s in (spec, f"{space}+{spec}"))
    if not spec.startswith("iso"):  # whose mean goes over as many directions as the matrix has sides
        assert torch.allclose(plain, inside, atol=1e-5)
    assert inside.norm() > 0.9 * one["a.weight"].norm()


@pytest.mark.parametrize("count", [2, 5])
def test_tsv_of_equal_deltas_is_the_delta(count):
    """Directions that coincide add nothing that is in none of them."""
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(40, 4, generator=draw) @ torch.randn(4, 30, generator=draw)
    assert torch.allclose(stepped("tsv", [{"a.weight": value}] * count)["a.weight"], value, atol=1e-4)


def test_norms_of_large_tensors_are_finite():
    """A square that float32 can't hold is taken in float64."""
    value = torch.full((3, 5), 3e38)
    assert math.sqrt(square_of(value)) == pytest.approx(3e38 * math.sqrt(15), rel=1e-6)


def test_what_becomes_infinite_blames_the_coefficients():
    """Not the files."""
    base, deltas = random_deltas(2, SHAPES)
    merged = vtzoo.merge(deltas, "task-arithmetic[scale=1e38]", base=base, coef=(1e38, 1))
    with pytest.raises(UsageError, match="infinite"):
        merged.tensors[next(n for n in merged.tensors if ".full." in n)]


@pytest.mark.parametrize(
    ("arch", "first", "last"),
    [
        ("regnetx_002", "s1.b1.conv1.conv.weight", "s4.b7.conv3.conv.weight"),
        ("resnet18", "layer1.0.conv1.weight", "layer4.1.bn2.bias"),
        ("vit_base_patch16_clip_224", "blocks.0.attn.qkv.weight", "blocks.11.mlp.fc2.bias"),
        ("convnext_tiny", "stages.0.blocks.0.gamma", "stages.3.blocks.2.gamma"),
        ("tf_efficientnet_lite0", "blocks.0.0.bn1.weight", "blocks.6.0.bn3.weight"),
    ],
)
def test_depth_goes_from_the_first_block_to_the_last(arch, first, last):
    """In the order of the network: 0 before the first block, 1 behind the last one."""
    with torch.device("meta"):
        names = [n for n, _ in timm.create_model(arch, num_classes=0).named_parameters()]
    found = depths(names)
    assert (found[first], found[last], found[names[0]], found[names[-1]]) == (0, 1, 0, 1)
    assert arch == "densenet121" or sorted(found.values()) == [
        found[n] for n in names
    ]  # whose transitions follow the layers


def test_no_depth_without_blocks():
    """LiNeS refuses where names tell nothing."""
    with pytest.raises(UsageError, match="goes by depth"):
        stepped("lines", [{"a.weight": torch.ones(3, 4)}])


@pytest.mark.parametrize("spec", ["regmean", "fisher", "karcher"])
def test_no_mean_over_a_negative_share(spec):
    """Negative weights are refused before anything is read."""
    base, deltas = random_deltas(2, SHAPES)
    with pytest.raises(UsageError, match=r"coefficients 1, -1"):
        vtzoo.merge(deltas, spec, base=base, coef=(1, -1), evidence=[{}, {}])


def test_inputs_without_energy_are_averaged():
    """RegMean's weights of inputs that hardly occur stay of the tasks' own size."""
    draw = torch.Generator().manual_seed(0)
    vectors, grams = [], []
    for _ in range(2):
        vectors.append({"a.weight": torch.randn(20, 16, generator=draw)})
        rows = torch.randn(50, 16, generator=draw) * torch.logspace(0, -8, 16)
        grams.append({"a.weight": rows.T @ rows})
    whole = Whole([copies(v) for v in vectors], (1.0, 1.0), {"a.weight": (20, 16)}, evidence=grams)
    usual, bare = (algorithm(steps(s), whole)("a.weight") for s in ("regmean", "regmean[ridge=1e-6]"))
    mean = (vectors[0]["a.weight"] + vectors[1]["a.weight"]) / 2
    assert torch.allclose(usual[:, -8:], mean[:, -8:], atol=0.5)
    assert usual.abs().max() < 0.1 * bare.abs().max()


def test_della_keeps_its_share_of_rows_of_one():
    """A row of one entry is kept with the mean probability."""
    out = stepped("della+task-arithmetic[scale=1]", [{"a.weight": torch.ones(20000, 1)}])["a.weight"]
    assert (out != 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
