"""First weights from another network: what each way takes over, what stays, and what is refused."""

from typing import Any

import pytest
import timm
import torch
from timm.models import beit, swin_transformer, vision_transformer
from torch import Tensor, nn

import vtzoo
from tests import families
from tests.contract.init_cases import DIMS, TWICE, VIT, WIDER, apart, bits, refused
from vtzoo import talk
from vtzoo.axes import IN, OUT, Axis
from vtzoo.errors import NotFound, ShapeMismatch, UsageError
from vtzoo.initial import planned, started
from vtzoo.inits._plan import Plan
from vtzoo.inits.net2net import net2net
from vtzoo.sketch import Sketch, state_of


def paper(weight: Tensor, shape: torch.Size) -> Tensor:
    """Uniform element selection as the paper's authors have it, written anew."""
    for dim, (many, few) in enumerate(zip(weight.shape, shape, strict=True)):
        step = torch.arange(few) * (many // few)
        weight = weight.index_select(dim, step if many % few == 0 else torch.linspace(0, many - 1, few).round().long())
    return weight


@pytest.mark.parametrize(
    ("name", "large"), [("vit", VIT), ("vit", {"embed_dim": 80, "num_heads": 2}), ("convnext", DIMS)]
)
def test_uniform_selection_is_the_papers(name: str, large: dict[str, Any]) -> None:
    """Tensor by tensor, but for attention, which is taken apart into heads, and the head, whose classes go by label."""
    source, student = families.build(name, seed=5, **large), families.build(name)
    given, taken = state_of(source), state_of(started(student, source, "weight-selection"))
    plain = [n for n in taken if "attn" not in n]
    assert all(torch.equal(taken[n], paper(given[n], taken[n].shape)) for n in plain)
    assert len(plain) > 15


def test_heads_stay_whole() -> None:
    """Of queries, keys and values each the first and third of four heads, and their columns where they leave."""
    source, student = families.build("vit", seed=5, **VIT), families.build("vit")
    given, taken = state_of(source), state_of(started(student, source, "weight-selection"))
    heads = given["blocks.0.attn.qkv.weight"].reshape(3, 4, 16, 64)
    assert torch.equal(taken["blocks.0.attn.qkv.weight"].reshape(3, 2, 16, 32), heads[:, ::2, :, ::2])
    out = given["blocks.0.attn.proj.weight"].reshape(64, 4, 16)
    assert torch.equal(taken["blocks.0.attn.proj.weight"].reshape(32, 2, 16), out[::2, ::2])


@pytest.mark.parametrize(("layers", "wanted"), [("first", (0, 1)), ("uniform", (0, 2))])
@pytest.mark.parametrize("elements", ["first", "uniform"])
def test_which_layers_and_elements(layers: str, wanted: tuple[int, int], elements: str) -> None:
    """The knobs choose blocks and channels."""
    source, student = families.build("vit", seed=5, depth=4, **VIT), families.build("vit")
    given = state_of(source)
    taken = state_of(started(student, source, f"weight-selection[layers={layers},elements={elements}]"))
    for block, other in enumerate(wanted):
        bias = given[f"blocks.{other}.mlp.fc2.bias"]
        chosen = bias[:32] if elements == "first" else bias[::2]
        assert torch.equal(taken[f"blocks.{block}.mlp.fc2.bias"], chosen)


def test_statistics_and_counters_of_norms_are_selected() -> None:
    """BatchNorm's running mean and variance like its weight, and how many batches it saw; depthwise kernels by channel."""
    source, student = families.build("efficientnet", seed=5, **TWICE), families.build("efficientnet")
    given = state_of(source)
    given["bn1.num_batches_tracked"].fill_(7)
    taken = state_of(started(student, source, "weight-selection"))
    for name in ("bn1.weight", "bn1.running_mean", "bn1.running_var"):
        assert torch.equal(taken[name], given[name][::2])
    assert torch.equal(taken["blocks.0.0.conv_dw.weight"], given["blocks.0.0.conv_dw.weight"][::2])
    assert taken["bn1.num_batches_tracked"] == 7


def test_new_blocks_learn() -> None:
    """What is zero in a new block gets a gradient, and so does the rest of it after the first step."""
    student = started(families.build("vit", seed=5, depth=3), families.build("vit"), "net2net")
    block = student.blocks[2]  # type: ignore[index]
    student(families.batch("vit")).square().sum().backward()
    zero = {n for n, p in block.named_parameters() if not p.any()}
    assert zero == {f"{m}.{p}" for m in ("attn.proj", "mlp.fc2") for p in ("weight", "bias")}
    assert all(p.grad is not None and p.grad.any() for n, p in block.named_parameters() if n in zero)
    with torch.no_grad():
        for p in block.parameters():
            p.sub_(0.1 * p.grad)
    student.zero_grad()
    student(families.batch("vit")).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in block.named_parameters())


def test_noise_tells_copies_apart() -> None:
    """Without it copies are equal; with it all but the first of each differ, by the seed, and the function a little."""
    small, x = families.build("vit"), families.batch("vit")
    name = "blocks.0.mlp.fc1.weight"

    def grown(spec: str) -> tuple[Tensor, float]:
        student = started(families.build("vit", seed=5, mlp_ratio=8.0), small, spec)
        return state_of(student)[name], apart(small(x), student(x))

    (plain, none), (noisy, some), (again, _), (other, _) = (
        grown(f"net2net[noise={n},seed={s}]") for n, s in ((0, 0), (0.01, 0), (0.01, 0), (0.01, 1))
    )
    assert torch.equal(plain[::2], plain[1::2])
    assert torch.equal(noisy[::2], plain[::2])
    assert bool((noisy[1::2] != plain[1::2]).all())
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, other)
    assert none < 1e-13 < some < 0.05


def fna_paper(value: Tensor, shape: torch.Size) -> Tensor:
    """FNA's mapping of a kernel as its authors have it, written anew; for a target that is not wider."""
    grown = torch.zeros(shape, dtype=value.dtype)
    least = [min(a, b) for a, b in zip(value.shape, shape, strict=True)]
    at = [0, 0, *((n - m) // 2 for n, m in zip(shape[2:], least[2:], strict=True))]
    of = [0, 0, *((n - m) // 2 for n, m in zip(value.shape[2:], least[2:], strict=True))]
    into, out = (tuple(slice(o, o + m) for o, m in zip(off, least, strict=True)) for off in (at, of))
    grown[into] = value[out]
    return grown


@pytest.mark.parametrize(("here", "there"), [(3, 7), (7, 3)])
def test_fna_maps_kernels_widths_and_depths(here: int, there: int) -> None:
    """The middle of larger kernels, zeros around smaller ones, the first channels, and the last block for those that are more."""
    args = {"num_classes": 5}
    source = timm.create_model("test_convnext", kernel_sizes=there, dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), **args)
    student = timm.create_model("test_convnext", kernel_sizes=here, dims=(8, 16, 24, 32), depths=(1, 1, 3, 1), **args)
    given, taken = state_of(source), state_of(started(student, source, "fna"))
    last = "stages.2.blocks.{}.conv_dw.weight"
    for block, other in ((0, 0), (1, 1), (2, 1)):
        wanted = taken[last.format(block)]
        assert torch.equal(wanted, fna_paper(given[last.format(other)], wanted.shape))
    assert torch.equal(taken["stages.0.blocks.0.mlp.fc1.weight"], given["stages.0.blocks.0.mlp.fc1.weight"][:32, :8])


def test_fna_leaves_new_channels_alive() -> None:
    """They give by the student's own weights and are summed with zeros, so that the first step moves the zeros."""
    source, student = families.build("resnet"), families.build("resnet", seed=5, **WIDER["resnet"])
    before = bits(student)
    taken = state_of(started(student, source, "fna"))
    given, own = state_of(source)["layer1.1.conv2.weight"], before["layer1.1.conv2.weight"]
    weight = taken["layer1.1.conv2.weight"]
    assert torch.equal(weight[:8, :8], given)
    assert not weight[:8, 8:].any()
    assert torch.equal(weight[8:], own[8:])
    student(families.batch("resnet")).square().sum().backward()
    assert student.get_parameter("layer1.1.conv2.weight").grad[:8, 8:].any()  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "loading", "changes"),
    [
        ("vit", vision_transformer, {"img_size": (48, 64)}),
        ("vit-reg", vision_transformer, {"img_size": (48, 64), "patch_size": 16}),
        ("beit", beit, {"img_size": (48, 64)}),
        ("swin", swin_transformer, {"img_size": 64, "window_size": 8}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_resize_is_what_timm_does_when_it_loads(name: str, loading: Any, changes: dict[str, Any]) -> None:
    """Positions, patches and windows, value by value."""
    source = families.build(name, dtype=torch.float32, img_size=32)  # timm takes every stored grid to be square
    student = families.build(name, seed=5, dtype=torch.float32, **changes)
    wanted = loading.checkpoint_filter_fn({n: t.clone() for n, t in source.state_dict().items()}, student)
    taken = state_of(started(student, source, "resize"))
    assert all(torch.equal(taken[n], wanted[n]) for n in taken)
    assert any(taken[n].shape != t.shape for n, t in source.state_dict().items())


def test_resize_of_equal_sizes_is_exact() -> None:
    """Every tensor is the source's, and a window that is not square is resampled, too."""
    for name in ("vit", "beit", "resnet"):
        source = families.build(name)
        student = started(families.build(name, seed=5), source, "resize")
        assert torch.equal(student(families.batch(name)), source(families.batch(name)))
    wide = started(families.build("beit", seed=5, img_size=(24, 48)), families.build("beit"), "resize")
    table = state_of(wide)["blocks.0.attn.relative_position_bias_table"]
    assert table.shape[0] == 5 * 11 + 3
    assert torch.equal(table[-3:], state_of(families.build("beit"))["blocks.0.attn.relative_position_bias_table"][-3:])


def test_image_channels() -> None:
    """One channel has the sum of three kernels, and six halves of them twice, so that a grey image gives what it gave."""
    source, x = timm.create_model("test_resnet", num_classes=5).double().eval(), torch.randn(2, 1, 64, 64).double()
    for channels, image in ((1, x), (6, x.expand(-1, 6, -1, -1))):
        student = timm.create_model("test_resnet", num_classes=5, in_chans=channels).double().eval()
        assert apart(source(x.expand(-1, 3, -1, -1)), started(student, source, "resize")(image)) < 1e-6


@pytest.mark.parametrize("spec", ["resize", "weight-selection", "net2net", "fna"])
def test_classes_go_by_their_labels(spec: str) -> None:
    """Shared labels keep their rows, in the student's order; new ones stay fresh."""
    source, student = families.build("vit"), families.build("vit", seed=5, classes=3)
    own, given = bits(student), state_of(source)
    started(student, source, spec, labels=("d", "new", "a"), source_labels=tuple("abcde"))
    for part in ("head.weight", "head.bias"):
        rows = state_of(student)[part]
        assert torch.equal(rows[0], given[part][3])
        assert torch.equal(rows[1], own[part][1])
        assert torch.equal(rows[2], given[part][0])
    ours, theirs = student(families.batch("vit"))[:, [0, 2]], source(families.batch("vit"))[:, [3, 0]]
    assert apart(theirs, ours) < 1e-13


def test_heads_of_other_classes_stay_fresh() -> None:
    """No label in common, and nothing is taken over; that is said."""
    said: list[str] = []
    talk.install(said.append, lambda items, _label, _total: items)
    try:
        student = families.build("vit", seed=5)
        own = bits(student)
        started(
            student, families.build("vit"), "resize", name="pets", labels=tuple("vwxyz"), source_labels=tuple("abcde")
        )
    finally:
        talk.install(lambda _: None, lambda items, _label, _total: items)
    assert torch.equal(state_of(student)["head.weight"], own["head.weight"])
    assert said == ["30 of 32 tensors from pets, 2 fresh: head.weight, head.bias"]


@pytest.mark.parametrize(
    "labels", [("ab", "abcde"), ("abcdefg", "abcde"), ("abcde", "a"), ("abcde", ""), ("", "abcde")], ids="-".join
)
def test_a_head_of_another_number_of_classes_than_labels_stays_fresh(labels: tuple[str, str]) -> None:
    """Nobody knows which rows are whose; the network is taken over all the same."""
    student, source = families.build("vit", seed=5), families.build("vit")
    own = bits(student)
    for spec in ("resize", "net2net"):
        taken = state_of(started(student, source, spec, labels=tuple(labels[0]), source_labels=tuple(labels[1])))
        assert torch.equal(taken["head.weight"], own["head.weight"])
        assert torch.equal(taken["norm.weight"], state_of(source)["norm.weight"])


def test_a_backbone_without_a_head_gives_to_one_with_a_head() -> None:
    """Features are compared where there are no classes in common."""
    source, student = families.build("vit", classes=0), families.build("vit", seed=5, **VIT)
    started(student, source, "net2net")
    wanted = source(families.batch("vit"))
    features = student.forward_head(student.forward_features(families.batch("vit")), pre_logits=True)  # type: ignore[operator]
    assert apart(wanted, features[:, ::2]) < 1e-13


def test_registers_and_layer_scales_that_the_source_lacks_are_fresh() -> None:
    """The student keeps its own, and a position for a token more is zero."""
    source = families.build("vit-gap")
    student = families.build("vit", seed=5, init_values=0.1)
    own = bits(student)
    taken = state_of(started(student, source, "resize", labels=tuple("abcde"), source_labels=()))
    for name in ("cls_token", "blocks.0.ls1.gamma"):
        assert torch.equal(taken[name], own[name])
    assert not taken["pos_embed"][:, 0].any()
    assert torch.equal(taken["pos_embed"][:, 1:], state_of(source)["pos_embed"])


def test_a_class_token_that_the_student_lacks_is_left_out() -> None:
    """Its place goes with it; those of the patches stay, and are resampled where the grid is another."""
    source = families.build("vit")
    for size in ((24, 32), (48, 64)):
        taken = state_of(started(families.build("vit-gap", seed=5, img_size=size), source, "resize"))["pos_embed"]
        grid = families.build("vit-gap", seed=7, img_size=(24, 32))
        with torch.no_grad():
            grid.get_parameter("pos_embed").copy_(state_of(source)["pos_embed"][:, 1:])
        wanted = started(families.build("vit-gap", seed=5, img_size=size), grid, "resize")
        assert torch.equal(taken, state_of(wanted)["pos_embed"])


@pytest.mark.parametrize(
    ("spec", "changes", "said"),
    [
        ("weight-selection", VIT, "32 channels in the source and 64 in the student: there are too few to select"),
        ("weight-selection", {"depth": 3}, "2 blocks in the source and 3 in the student: there are too few"),
        ("net2net", {"embed_dim": 16, "num_heads": 1}, "some would be lost"),
        ("net2net", {"depth": 1}, "2 blocks in the source and 1 in the student, which would lose some"),
        ("net2net", {"embed_dim": 48, "num_heads": 3}, "the statistics of norms would be others"),
        ("net2net", {"embed_dim": 64, "num_heads": 2}, "attention scales by a head's width"),
        ("net2net", {"img_size": (48, 64)}, r"pos_embed is \[1, 13, 32\] there and \[1, 49, 32\] here"),
        ("net2net", {"patch_size": 4, "img_size": (12, 16)}, r"patch_embed.proj.weight is \[32, 3, 8, 8\] there"),
        ("net2net", {"init_values": 0.1}, "would give other outputs than the source"),
        ("net2net", {"act_layer": nn.ReLU}, "would give other outputs than the source"),
        ("resize", VIT, "this way changes no widths"),
        ("resize", {"num_heads": 4}, "3 x 2 x 16 channels in the source and 3 x 4 x 8 in the student"),
        ("resize", {"depth": 3}, "this way changes no depth"),
    ],
)  # fmt: skip
def test_what_a_way_can_not_do_is_refused(spec: str, changes: dict[str, Any], said: str) -> None:
    """With what was seen, and the student's weights as they were."""
    refusal = refused(families.build("vit", seed=5, **changes), families.build("vit"), spec, said)
    assert refusal.exit_code == 4


@pytest.mark.parametrize("spec", ["weight-selection", "net2net", "fna", "resize"])
@pytest.mark.parametrize(
    ("here", "there"), [("vit", "convnext"), ("vit", "swin"), ("resnet", "convnext"), ("mixer", "vit")]
)
def test_other_families_are_refused(spec: str, here: str, there: str) -> None:
    """Other stages, or other layers in their blocks."""
    refused(families.build(here), families.build(there), spec, "can't start from this")


def test_blocks_in_another_order_are_refused() -> None:
    """Every block of the source must be found again, in its order; here the second is not."""

    def sketch(*layers: str) -> Sketch:
        names = [f"blocks.{i}" for i in range(len(layers))]
        axes = {f"{n}.{x}.weight": (Axis(OUT, (2,)), Axis(IN, (2,))) for n, x in zip(names, layers, strict=True)}
        return Sketch(name="Net", axes=axes, rows=(tuple(names),), normalised=frozenset())

    for here, said in (
        ("acb", "around blocks.2 and blocks.2 are in another order"),
        ("axy", "only one of blocks.1 and blocks.1 has b.weight, x.weight"),
    ):
        plan = Plan(source=sketch(*"abb"), target=sketch(*here), classes=(), silent=lambda _: {})
        with pytest.raises(ShapeMismatch, match=said):
            net2net({}, {}, plan)


def test_a_source_of_another_input_size_is_refused() -> None:
    """Where no tensor tells it, it comes out when both run."""
    student, source = families.build("swin", seed=5, img_size=64), families.build("swin")
    refused(student, source, "net2net", "does not run on the student's images of 64x64 pixels")


def test_a_real_network_grows_and_gives() -> None:
    """The embedded backbone with two blocks more is the same function; of a delta on it nothing is taken."""
    source = vtzoo.build("vit_embedded_64", num_classes=0)
    card = source.vtzoo_card
    args = {**card.model_args, "num_classes": 4}  # type: ignore[union-attr]
    student = timm.create_model(card.arch, **{**args, "depth": 10}).eval()
    x = torch.randn(2, 3, 64, 64)
    started(student, source, "net2net")
    with torch.no_grad():
        wanted = source(x)
        assert torch.equal(student.forward_head(student.forward_features(x), pre_logits=True), wanted)
    vtzoo.inject(source, "lora[rank=2]")
    taken = state_of(started(timm.create_model(card.arch, **args), source, "resize"))
    assert sum(n.startswith("blocks.") for n in taken) == 8 * 12
    assert all(torch.equal(taken[n], t) for n, t in state_of(source).items())


def test_bottlenecks_are_no_basic_blocks() -> None:
    """One class of networks, two kinds of blocks."""
    source = timm.create_model("resnet10t", num_classes=5)
    student = timm.create_model("resnet14t", num_classes=5)
    refused(student, source, "fna", "has conv3.weight")


def test_networks_without_anything_in_common_are_refused() -> None:
    """Neither has numbered blocks, and no tensor of one has a like in the other."""
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5)
    student, source = (nn.Sequential() for _ in layers)
    for model, name, layer in zip((student, source), "ab", layers, strict=True):
        model.add_module(name, layer)
    for spec in ("weight-selection", "net2net", "fna", "resize"):
        refused(student, source, spec, "nothing in common")


def test_standardised_convolutions_can_not_be_widened() -> None:
    """Their weights have no scale that could be shared out, which comes out when both functions are compared."""
    refused(
        families.build("nfnet", seed=5, width_factor=1.0),
        families.build("nfnet"),
        "net2net",
        "would give other outputs",
    )


def test_unknown_ways_and_knobs() -> None:
    """They are not found, with the nearest one."""
    student = families.build("vit")
    assert "net2net" in refused(student, student, "net2net2", "no init is called", NotFound).hint
    refused(student, student, "weight-selection[layer=first]", "no knob 'layer'", UsageError)
    refused(student, student, "net2net[noise=-1]", "noise", UsageError)


def test_the_ways_are_functions_of_tensors() -> None:
    """They change neither mapping, and share no memory with the source."""
    small, large = families.build("vit"), families.build("vit", seed=5, depth=3, **VIT)
    before = bits(small), bits(large)
    made = net2net(state_of(small), state_of(large), planned(large, small))
    assert all(
        torch.equal(b[n], t) for b, m in zip(before, (small, large), strict=True) for n, t in m.state_dict().items()
    )
    same = net2net(state_of(small), state_of(small), planned(small, small))
    for value in same.values():
        value.add_(1)
    assert all(torch.equal(before[0][n], t) for n, t in small.state_dict().items())
    assert set(made) == set(large.state_dict())


def test_a_student_stays_in_its_mode() -> None:
    """Looking at it runs images through it, which nothing afterwards shows."""
    student = families.build("resnet", seed=5).train()
    started(student, families.build("resnet"), "net2net")
    assert all(m.training for m in student.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
