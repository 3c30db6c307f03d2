"""The side networks against networks written out by hand, and what they promise of memory and of interrupted forwards."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import families
from tests.contract.cases import bare, case, fresh, logits, relative
from tests.parity.rewrites import head
from vtzoo.errors import UsageError
from vtzoo.graft import tensors_of
from vtzoo.live import attach, detach, inject
from vtzoo.methods._side import aligned, placed
from vtzoo.methods.vit_adapter import pyramid


def _below(tensors, prefix):
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}


def _plain(family, delta):
    """The bare backbone with the task's classifier."""
    model = bare(family)
    model.load_state_dict(head(delta), strict=False)
    return model


def _linear(x, own, name):
    return F.linear(x, own[f"{name}.weight"], own.get(f"{name}.bias"))


def _norm(x, own, name):
    return F.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])


def _attend(q, k, v, heads):
    """softmax(q k / sqrt(e)) v, head by head."""
    parts = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        parts.append(torch.softmax(a @ b.mT / a.shape[-1] ** 0.5, -1) @ c)
    return torch.cat(parts, -1)


def _tokens(model, x):
    """What a ViT's or BEiT's first block is given."""
    x = model.patch_embed(x)
    if hasattr(model, "_pos_embed"):
        return model.norm_pre(model.patch_drop(model._pos_embed(x)))
    x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], 1)
    return model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)


@torch.no_grad()
def _compare(spec, family, reference):
    """How far the attached output is from the reference's."""
    made = case(spec, family)
    wanted = reference(_plain(family, made.delta), made.x, made.delta.tensors)
    assert relative(made.bare, wanted) > 1e-4
    return relative(wanted, made.live)


# ------------------------------------------------------------------------------------------------------- side-tuning


@pytest.mark.parametrize("family", ["vit", "beit", "resnet", "swin"])
def test_side_tuning(agree, family: str) -> None:
    """alpha B + (1 - alpha) S, S four convolutions with group norms and ReLU, their mean and a linear layer."""

    def reference(model, x, tensors):
        own = _below(tensors, "side_tuning")
        features, s = model.forward_features(x), x
        for i, (stride, padding) in enumerate(((4, 2), (2, 1), (2, 1), (1, 1))):
            s = F.conv2d(s, own[f"net.{i}.0.weight"], None, stride, padding)
            s = F.relu(F.group_norm(s, 2, own[f"net.{i}.1.weight"], own[f"net.{i}.1.bias"]))
        s = _linear(s.flatten(2).mean(-1), own, "out")
        places = {"resnet": s[:, :, None, None], "swin": s[:, None, None]}.get(family, s[:, None])
        alpha = 1 / (1 + torch.exp(-own["a"]))
        return model.forward_head(alpha * features + (1 - alpha) * places)

    agree("side-tuning", f"rewrite, {family}", attached=_compare("side-tuning[width=4,alpha=0.3]", family, reference))


def test_side_tuning_starts_where_it_says() -> None:
    """alpha starts at the knob's share."""
    tensors = tensors_of(fresh("side-tuning[alpha=0.3]", "vit"))
    assert torch.sigmoid(tensors["side_tuning.a"]).item() == pytest.approx(0.3)


# ---------------------------------------------------------------------------------------------------------------- lst


def _ladder(runs, tensors, heads):
    """What each run of blocks of one shape gives: runs hold (block, its input, its output), channels last."""
    given = []
    for run in runs:
        h = None
        for name, x, y in run:
            own = _below(tensors, f"{name}.lst")
            z = _linear(y, own, "down")
            if "first.weight" in own:
                h = _linear(x, own, "first")
            if "gate" in own:
                mu = torch.sigmoid(own["gate"] / 0.1)
                z = mu * h + (1 - mu) * z
            if "mix.conv.weight" in own:
                weight, bias = own["mix.conv.weight"], own["mix.conv.bias"]
                z = z + F.conv2d(z.movedim(-1, 1), weight, bias, padding=3, groups=z.shape[-1]).movedim(1, -1)
            else:
                q, k, v = _linear(_norm(z, own, "mix.norm"), own, "mix.qkv").chunk(3, -1)
                z = z + _linear(_attend(q, k, v, heads), own, "mix.proj")
            h = z + _linear(F.gelu(_linear(_norm(z, own, "mlp.0"), own, "mlp.1")), own, "mlp.3")
        given.append(_linear(_norm(h, own, "out.norm"), own, "out.up"))
    return given


def _seen(model, names, x):
    """Inputs and outputs of blocks, and the features."""
    found, handles = {}, []
    for name in names:
        handles.append(
            model.get_submodule(name).register_forward_hook(
                lambda _m, args, y, name=name: found.__setitem__(name, (args[0].clone(), y.clone()))
            )
        )
    features = model.forward_features(x)
    for handle in handles:
        handle.remove()
    return found, features


@pytest.mark.parametrize("family", ["vit", "beit", "vit-gap"])
@pytest.mark.parametrize("join", ["add", "replace"])
def test_lst(agree, family: str, join: str) -> None:
    """A ladder of transformer blocks, gated by sigmoid(a / 0.1), added to the features or in their place."""

    def reference(model, x, tensors):
        seen, features = _seen(model, ("blocks.0", "blocks.1"), x)
        (given,) = _ladder([[(n, *seen[n]) for n in seen]], tensors, 2)
        return model.forward_head(features + given if join == "add" else given)

    spec = f"lst[reduction=2,heads=6,join={join}]"
    agree("lst", f"rewrite, {family}, {join}", attached=_compare(spec, family, reference))


def test_lst_on_maps(agree) -> None:
    """On a ResNet a new ladder begins with every shape, and all are added, by their means where places differ."""

    def reference(model, x, tensors):
        runs = [["layer1.0", "layer1.1"], ["layer2.0"], ["layer3.0"], ["layer4.0"]]
        seen, features = _seen(model, [n for run in runs for n in run], x)
        last = {n: tuple(t.movedim(1, -1) for t in pair) for n, pair in seen.items()}
        *means, whole = _ladder([[(n, *last[n]) for n in run] for run in runs], tensors, 1)
        shift = sum(m.mean((1, 2)) for m in means)
        return model.forward_head(features + shift[:, :, None, None] + whole.movedim(-1, 1))

    agree("lst", "rewrite, resnet", attached=_compare("lst[reduction=2]", "resnet", reference))


def test_lst_in_windows(agree) -> None:
    """On a Swin, whose maps have their channels last, each stage has a ladder that begins at its input."""

    def reference(model, x, tensors):
        runs = [["layers.0.blocks.0", "layers.0.blocks.1"], ["layers.1.blocks.0"]]
        seen, features = _seen(model, [n for run in runs for n in run], x)
        mean, whole = _ladder([[(n, *seen[n]) for n in run] for run in runs], tensors, 1)
        return model.forward_head(features + mean.mean((1, 2), keepdim=True) + whole)

    agree("lst", "rewrite, swin", attached=_compare("lst[reduction=2]", "swin", reference))


def _saved(spec: str, depth: int) -> tuple[int, list[bool]]:
    """How many numbers autograd keeps for a training step, and whether each block's output asks for gradients."""
    model = inject(families.build("vit", depth=depth), spec).train()
    kept, asks = [], []

    def pack(t):
        if not isinstance(t, nn.Parameter):
            kept.append(t.numel())
        return t

    for block in model.blocks:
        block.register_forward_hook(lambda _m, _a, y: asks.append(y.requires_grad))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(families.batch("vit")).sum().backward()
    return sum(kept), asks


def test_lst_needs_no_backpropagation_through_the_blocks() -> None:
    """No block's output asks for gradients, and autograd keeps less for each block than with adapters inside."""
    growth = {}
    for spec in ("lst", "adapter"):
        (small, _), (large, asks) = _saved(spec, 2), _saved(spec, 4)
        growth[spec] = large - small
        assert asks == [spec == "adapter"] * 4
    assert growth["lst"] < 0.5 * growth["adapter"]


def test_lst_starts_as_the_paper_says() -> None:
    """Gates start at a half; the way out at zero where it is added, and not where it stands alone."""
    added, alone = (tensors_of(fresh(f"lst[join={j}]", "vit")) for j in ("add", "replace"))
    gates = [t for n, t in added.items() if n.endswith("gate")]
    assert len(gates) == 2
    assert all(torch.sigmoid(t / 0.1).item() == 0.5 for t in gates)
    assert added["blocks.1.lst.out.up.weight"].abs().max() == 0
    assert alone["blocks.1.lst.out.up.weight"].abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------- dtl


def _part(x, own):
    return x @ own["A"].mT @ own["B"].mT


def _swish(h, beta):
    return h / (1 + torch.exp(-beta * h))


@pytest.mark.parametrize("family", ["vit", "beit"])
def test_dtl(agree, family: str) -> None:
    """The first half of the blocks feeds the sum, the second gets swish of it back."""

    def reference(model, x, tensors):
        x, h = _tokens(model, x), 0
        for i, block in enumerate(model.blocks):
            h = h + _part(x, _below(tensors, f"blocks.{i}.dtl"))
            x = block(x) + (_swish(h, 2) if i >= len(model.blocks) // 2 else 0)
        return model.forward_head(model.norm(x))

    agree("dtl", f"rewrite, {family}", attached=_compare("dtl[rank=3,beta=2]", family, reference))


def test_dtl_plus(agree) -> None:
    """A depthwise convolution over the patches follows swish; five class and register tokens pass by it."""

    def reference(model, x, tensors):
        x, h, kernel = _tokens(model, x), 0, tensors["dtl.fusion.0.weight"]
        for i, block in enumerate(model.blocks):
            h = h + _part(x, _below(tensors, f"blocks.{i}.dtl"))
            z = _swish(h, 2)
            patches = z[:, 5:].reshape(-1, 3, 4, 32).permute(0, 3, 1, 2)
            patches = F.conv2d(patches, kernel, padding=1, groups=32).permute(0, 2, 3, 1).reshape(-1, 12, 32)
            x = block(x) + torch.cat([z[:, :5], patches], 1)
        return model.forward_head(model.norm(x))

    agree("dtl", "rewrite, vit-reg", attached=_compare("dtl[fusion=3,rank=3,start=0,beta=2]", "vit-reg", reference))


def test_dtl_on_maps(agree) -> None:
    """On a ResNet only blocks that keep their shape take part, here the second of the first layer."""

    def reference(model, x, tensors):
        own, kernel = _below(tensors, "layer1.1.dtl"), tensors["dtl.fusion.0.weight"]
        assert sum(n.endswith("dtl.A") for n in tensors) == 1

        def add(_module, args, y):
            h = _part(x_in[0].movedim(1, -1), own).movedim(-1, 1)
            return y + F.conv2d(_swish(h, 2), kernel, padding=1, groups=h.shape[1])

        x_in = []
        block = model.get_submodule("layer1.1")
        block.register_forward_pre_hook(lambda _m, args: x_in.append(args[0].clone()))
        block.register_forward_hook(add)
        return model(x)

    spec = "dtl[fusion=3,rank=3,start=0,beta=2]"
    agree("dtl", "rewrite, resnet", attached=_compare(spec, "resnet", reference))


def test_dtl_begins_anew_with_every_stage(agree) -> None:
    """On a Swin the sum of one stage does not reach the next; with start=0.5 the second block is the first to get it."""

    def reference(model, x, tensors):
        x, a = model.patch_embed(x), _below(tensors, "layers.0.blocks.0.dtl")
        b, c = _below(tensors, "layers.0.blocks.1.dtl"), _below(tensors, "layers.1.blocks.0.dtl")
        first, second = model.layers
        h = _part(x, a)
        x = first.blocks[0](x)
        h = h + _part(x, b)
        x = second.downsample(first.blocks[1](x) + _swish(h, 2))
        x = second.blocks[0](x) + _swish(_part(x, c), 2)
        return model.forward_head(model.norm(x))

    agree("dtl", "rewrite, swin", attached=_compare("dtl[rank=3,beta=2]", "swin", reference))


def test_dtl_leaves_out_what_reaches_no_later_block() -> None:
    """The early stages of a CAFormer hold nothing."""
    names = {n.partition(".blocks")[0] for n in tensors_of(fresh("dtl", "metaformer"))}
    assert names == {"stages.2", "stages.3"}


def test_dtl_starts_as_the_paper_says() -> None:
    """A is Kaiming-uniform, within 1 / sqrt(channels) and filling it; B is zero."""
    tensors = tensors_of(fresh("dtl[rank=64]", "vit"))
    a, b = tensors["blocks.0.dtl.A"], tensors["blocks.0.dtl.B"]
    assert 0.95 < a.abs().max() * 32**0.5 <= 1
    assert b.abs().max() == 0


def test_dtl_does_not_backpropagate_through_the_early_blocks() -> None:
    """No output before the first block that gets the sum asks for gradients."""
    _, asks = _saved("dtl", 4)
    assert asks == [False, False, True, True]


# -------------------------------------------------------------------------------------------------------- vit-adapter


def _cross(x, other, own, heads):
    x, other = _norm(x, own, "norm"), _norm(other, own, "norm_other")
    return _linear(_attend(_linear(x, own, "q"), _linear(other, own, "k"), _linear(other, own, "v"), heads), own, "o")


def _levels(c, width):
    """Tokens as maps of 6 x 8, 3 x 4 and 1 x 2 places."""
    c2, c3, c4 = c.split([48, 12, 2], 1)
    shapes = ((c2, 6, 8), (c3, 3, 4), (c4, 1, 2))
    return [t.transpose(1, 2).reshape(-1, width, h, w) for t, h, w in shapes]


def _prior(x, own):
    """c1 and the tokens of the other levels, for 24 x 32 pixels and patches of 8."""

    def conv(t, name, stride):
        t = F.conv2d(t, own[f"{name}.0.weight"], None, stride, 1)
        return F.relu(F.group_norm(t, 2, own[f"{name}.1.weight"], own[f"{name}.1.bias"]))

    t = F.max_pool2d(conv(conv(conv(x, "stem.0", 2), "stem.1", 1), "stem.2", 1), 3, 2, 1)
    maps = [t]
    for i in range(3):
        maps.append(conv(maps[-1], f"steps.{i}", 2))
    sizes = ((12, 16), (6, 8), (3, 4), (1, 2))
    maps = [F.conv2d(m, own[f"out.{i}.weight"], own[f"out.{i}.bias"]) for i, m in enumerate(maps)]
    maps = [F.interpolate(m, s, mode="bilinear") if m.shape[2:] != s else m for m, s in zip(maps, sizes, strict=True)]
    return maps[0], torch.cat([m.flatten(2).mT + own["levels"][i] for i, m in enumerate(maps[1:])], 1)


def _extract(c, x, own, heads, width):
    c = c + _cross(c, x, _below(own, "attention"), heads)
    hidden = _linear(_norm(c, own, "norm"), own, "fc1")
    maps = _levels(hidden, width // 4)
    maps = [F.conv2d(m, own["conv.weight"], own["conv.bias"], padding=1, groups=width // 4) for m in maps]
    return c + _linear(F.gelu(torch.cat([m.flatten(2).mT for m in maps], 1)), own, "fc2")


def _adapted(model, x, tensors, cuts, heads):
    """The features before the classifier's vector is added, and the four maps."""
    shared = _below(tensors, "vit_adapter")
    first, c = _prior(x, shared)
    x = _tokens(model, x)
    for i, block in enumerate(model.blocks):
        own = _below(tensors, f"blocks.{i}.vit_adapter")
        if i in cuts:
            injected = own["gamma"] * _cross(x[:, 1:], c, _below(own, "inject"), heads)
            x = torch.cat([x[:, :1], x[:, 1:] + injected], 1)
        x = block(x)
        if i + 1 in cuts:
            for j in range(3 if i + 1 == cuts[-1] else 1):
                c = _extract(c, x[:, 1:], _below(own, f"extract.{j}"), heads, 32)
    c2, c3, c4 = _levels(c, 32)
    up = F.conv_transpose2d(c2, shared["neck.up.weight"], shared["neck.up.bias"], stride=2)
    maps = []
    for i, m in enumerate((first + up, c2, c3, c4)):
        patches = x[:, 1:].mT.reshape(-1, 32, 3, 4)
        if m.shape[2:] != (3, 4):
            patches = F.interpolate(patches, m.shape[2:], mode="bilinear")
        maps.append(_norm((m + patches).movedim(1, -1), shared, f"neck.norms.{i}").movedim(-1, 1))
    return model.norm(x), maps


@pytest.mark.parametrize("family", ["vit", "beit"])
@pytest.mark.parametrize(("groups", "cuts"), [(4, (0, 1, 2)), (1, (0, 2))])
def test_vit_adapter(agree, family: str, groups: int, cuts: tuple[int, ...]) -> None:
    """Convolutions, injectors, extractors and four maps, whose means are added to the features; heads divide the width."""

    def reference(model, x, tensors):
        features, maps = _adapted(model, x, tensors, cuts, 2)
        vector = sum(m.flatten(2).mean(-1) for m in maps)
        return model.forward_head(features + _linear(vector, _below(tensors, "vit_adapter"), "up")[:, None])

    spec = f"vit-adapter[groups={groups},ratio=0.5,conv=6]"
    agree("vit-adapter", f"rewrite, {family}, {groups} groups", attached=_compare(spec, family, reference))


def test_pyramid_gives_the_dense_features(agree) -> None:
    """Four maps at 4, 2, 1 and 1/2 times the grid of patches, which carry gradients; nothing is left behind."""
    spec = "vit-adapter[groups=4,ratio=0.5,conv=6]"
    made = case(spec, "vit")
    model = attach(bare("vit"), made.delta)
    found = pyramid(model, made.x)
    assert [tuple(m.shape) for m in found] == [(2, 32, 12, 16), (2, 32, 6, 8), (2, 32, 3, 4), (2, 32, 1, 2)]
    with torch.no_grad():
        _, maps = _adapted(_plain("vit", made.delta), made.x, made.delta.tensors, (0, 1, 2), 2)
    differences = {f"f{i + 1}": relative(a, b.detach()) for i, (a, b) in enumerate(zip(maps, found, strict=True))}
    agree("vit-adapter", "rewrite, pyramid", **differences)
    assert all(m.requires_grad for m in pyramid(inject(bare("vit"), "vit-adapter").train(), made.x))
    assert torch.equal(logits(model, made.x), made.live)
    with pytest.raises(UsageError, match="carries no vit-adapter"):
        pyramid(bare("vit"), made.x)


# -------------------------------------------------------------------------------------------------------- their state

SPECS = ("side-tuning[width=4]", "lst", "dtl", "vit-adapter[conv=6]")


def _held(model):
    return [m.held for m in model.modules() if hasattr(m, "held")]


@pytest.mark.parametrize("family", ["vit", "beit"])
@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_left_after_a_forward(spec: str, family: str) -> None:
    """Whether in training or evaluation; features alone are enough, and a classifier may be asked twice."""
    made = case(spec, family)
    model = attach(bare(family), made.delta)
    model.train()(made.x).sum().backward()
    assert _held(model) == [{}]
    with torch.no_grad():
        features = model.eval().forward_features(made.x)
        assert _held(model) == [{}]
        assert torch.equal(model.forward_head(features), model.forward_head(features))
    assert torch.equal(logits(model, made.x), made.live)


@pytest.mark.parametrize("spec", SPECS)
def test_an_interrupted_forward_leaves_no_trace(spec: str) -> None:
    """After an error in the middle, the next forward, copies and pickles give the right output; detach the bare one."""
    made = case(spec, "vit")
    model = attach(bare("vit"), made.delta).train()

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = model.blocks[1].attn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(made.x[:1])
    handle.remove()
    assert any(_held(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert _held(other) == [{}]
        assert torch.equal(logits(other, made.x), made.live)
    assert torch.equal(logits(model, made.x), made.live)
    assert _held(model) == [{}]
    detach(model)
    assert torch.equal(model.forward_features(made.x), bare("vit").forward_features(made.x))


@pytest.mark.parametrize(
    ("spec", "family", "place"),
    [
        *((s, "vit", "blocks.1") for s in [*SPECS, "vqt"]),
        ("mona", "vit", "blocks.1.attn.proj"),
        *((s, "swin", "layers.0.blocks.1.attn.proj") for s in ("mona", "convpass", "conv-adapter")),
    ],
)
def test_forwards_side_by_side_do_not_mix(spec: str, family: str, place: str) -> None:
    """Two threads that wait for each other in the middle of the network, or of a block, get each its own output."""
    made = case(spec, family)
    model = attach(bare(family), made.delta)
    images = [made.x[:1], made.x[1:]]
    wanted = [logits(model, x) for x in images]
    barrier, found = threading.Barrier(2, timeout=30), [None, None]

    def meet(*_):
        barrier.wait()

    handle = model.get_submodule(place).register_forward_pre_hook(meet)

    def run(i):
        with torch.no_grad():
            found[i] = model(images[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_block_by_itself_says_what_is_missing() -> None:
    """A block in the middle of a ladder can't run alone."""
    made = case("lst", "vit")
    model = attach(bare("vit"), made.delta)
    with pytest.raises(UsageError, match="by itself"):
        model.blocks[1](torch.zeros(1, 13, 32, dtype=torch.float64))


# ------------------------------------------------------------------------------------------- beside prompts of others


def test_prompts_that_come_or_go_are_told_apart() -> None:
    """Behind the first two tokens: dropped where they went, zeros where they came."""
    tokens, more = torch.arange(1.0, 6.0).reshape(1, 5, 1), torch.zeros(1, 8, 1)
    longer = aligned(tokens, more, 2)
    assert longer.flatten().tolist() == [1, 2, 0, 0, 0, 3, 4, 5]
    assert torch.equal(aligned(longer, tokens, 2), tokens)
    assert aligned(tokens, tokens, 2) is tokens


def test_what_has_other_places_is_added_by_its_mean() -> None:
    """Place by place where places agree, else by the mean; further images are left out."""
    v, like = torch.randn(4, 3, 5, 2), torch.zeros(4, 2, 3, 5)
    assert torch.equal(placed(v, like, 1), v.movedim(-1, 1))
    assert torch.equal(placed(v, like[:2], 1), v[:2].movedim(-1, 1))
    mean = placed(v, torch.zeros(4, 2, 7, 7), 1)
    assert torch.allclose(mean, v.mean((1, 2))[:, :, None, None])
    assert torch.equal(placed(v[:, 0, 0], torch.zeros(4, 9, 2), -1), v[:, 0, 0][:, None])


@pytest.mark.parametrize("prompts", ["vpt-deep", "vpt-shallow"])
@pytest.mark.parametrize("spec", SPECS)
def test_side_networks_train_beside_prompts(spec: str, prompts: str) -> None:
    """In either order both get gradients."""
    for stack in (f"{spec}+{prompts}", f"{prompts}+{spec}"):
        model = attach(bare("vit"), case(stack, "vit").delta)
        model(families.batch("vit")).square().sum().backward()
        assert all(t.grad is not None and t.grad.abs().max() > 0 for t in tensors_of(model).values()), stack


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("spec", "family", "said"),
    [
        ("dtl[fusion=3]", "hiera", "do not lie row by row"),
        ("dtl[fusion=3]", "pvt", "as many as an image gives"),
        ("dtl[fusion=2]", "vit", "has no centre"),
        ("vit-adapter", "swin", "no plain transformer"),
        ("vit-adapter", "hiera", "no plain transformer"),
        ("vit-adapter", "pvt", "no plain transformer"),
    ],
)
def test_refusals(spec: str, family: str, said: str) -> None:
    """What does not fit is refused in words."""
    with pytest.raises(UsageError, match=said):
        inject(bare(family), spec)
