"""convpass, conv-adapter and mona beside the papers' formulas, written out anew with the maps put together by hand."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from tests import families
from tests.contract.cases import bare, case, logits, perturbed, relative
from tests.parity.rewrites import by_hooks, head, sites
from vtzoo.errors import UsageError
from vtzoo.graft import hosts, tensors_of
from vtzoo.live import attach, extract, inject

GRIDS = {
    "vit": (1, 3, 4),
    "vit-gap": (0, 3, 4),
    "dinov3": (5, 3, 4),
    "beit": (1, 3, 4),
    "pvt": None,
    "hybrid": (1, 2, 2),
}


def _as_map(tokens: Tensor, grid: tuple[int, int, int] | None) -> Tensor:
    """[n, patches, c] -> [n, c, h, w], place by place."""
    side = round(tokens.shape[1] ** 0.5)
    _, h, w = grid or (0, side, side)
    rows = [torch.stack([tokens[:, r * w + c] for c in range(w)], dim=-1) for r in range(h)]
    return torch.stack(rows, dim=-2)


def _as_tokens(maps: Tensor) -> Tensor:
    return torch.stack([maps[:, :, r, c] for r in range(maps.shape[2]) for c in range(maps.shape[3])], dim=1)


def _over(tokens: Tensor, grid: tuple[int, int, int] | None, f: Any) -> Tensor:
    """f over the map of patches, and over each token in front by itself."""
    first = grid[0] if grid else 0
    alone = [f(tokens[:, i, :, None, None])[:, None, :, 0, 0] for i in range(first)]
    return torch.cat([*alone, _as_tokens(f(_as_map(tokens[:, first:], grid)))], dim=1)


def _quick(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-1.702 * z))


def _bypass(x: Tensor, own: Any, over: Any, scale: float) -> Tensor:
    """Channels last."""
    hidden = _quick(x @ own["down"].T + own["down_bias"])
    hidden = _quick(over(hidden, lambda z: F.conv2d(z, own["kernel"], own["kernel_bias"], padding=1)))
    return scale * (hidden @ own["up"].T + own["up_bias"])


@pytest.mark.parametrize("family", sorted(GRIDS))
def test_convpass_over_tokens(family: str, agree) -> None:
    """Attention and MLP plus s * up(act(conv(act(down x)))), the class token and registers each a map of one place."""

    def hook(x, y, own, _site):
        return y + _bypass(x, own, lambda z, f: _over(z, GRIDS[family], f), 2.0) if own else y

    agree("convpass", f"rewrite, {family}", **by_hooks("convpass[rank=3,scale=2,dropout=0]", family, hook))


@pytest.mark.parametrize("family", ["resnet", "nfnet", "convnext", "convnextv2"])
def test_convpass_over_maps(family: str, agree) -> None:
    """Beside a block, or the MLP, of a convolutional network."""
    last = family == "convnext"  # its MLPs have channels last

    def hook(x, y, own, _site):
        x = x if last else x.permute(0, 2, 3, 1)
        added = _bypass(x, own, lambda z, f: f(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), 2.0)
        return y + (added if last else added.permute(0, 3, 1, 2))

    agree("convpass", f"rewrite, {family}", **by_hooks("convpass[rank=3,scale=2,dropout=0]", family, hook))


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_convpass_sees_the_whole_map_beside_windows(family: str, agree) -> None:
    """Swin's attention branch has the bypass of norm1's map (V2: of the block's), its MLP that of its tokens as a map."""
    made, model = case("convpass[rank=3,scale=2,dropout=0]", family), bare(family)
    for name, block in model.named_modules():
        if type(block).__name__ in ("SwinTransformerBlock", "SwinTransformerV2Block"):
            block.forward = _swin_block(block, dict(_own(made.delta, name, ("drop_path1", "mlp"))), family == "swinv2")
    model.load_state_dict(head(made.delta), strict=False)
    wanted = logits(model, made.x)
    assert relative(made.bare, wanted) > 1e-4
    agree("convpass", f"rewrite, {family}", attached=relative(wanted, made.live))


def _own(delta: Any, block: str, children: tuple[str, ...]) -> Any:
    every = {site.name: own for site, own in sites(delta)}
    return ((c, every[f"{block}.{c}" if c else block]) for c in children)


def _swin_block(block: nn.Module, own: dict[str, Any], second: bool) -> Any:
    def over(z: Tensor, f: Any) -> Tensor:
        return f(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def forward(x: Tensor) -> Tensor:
        if second:
            x = x + block.norm1(block._attn(x)) + _bypass(x, own["drop_path1"], over, 2.0)
            return x + block.norm2(block.mlp(x) + _bypass(x, own["mlp"], over, 2.0))
        z = block.norm1(x)
        x = x + block._attn(z) + _bypass(z, own["drop_path1"], over, 2.0)
        z = block.norm2(x)
        return x + block.mlp(z) + _bypass(z, own["mlp"], over, 2.0)

    return forward


def _mona(x: Tensor, own: Any, over: Any) -> Tensor:
    """Channels last: x and what the paper's adapter adds to it."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    z = (
        own["gamma"] * ((x - mean) / (variance + 1e-5).sqrt() * own["norm_weight"] + own["norm_bias"])
        + own["gammax"] * x
    )

    def filters(h: Tensor) -> Tensor:
        threes = [
            F.conv2d(h, own[f"filters.{i}.weight"], own[f"filters.{i}.bias"], padding=(1, 2, 3)[i], groups=h.shape[1])
            for i in range(3)
        ]
        h = h + (threes[0] + threes[1] + threes[2]) / 3
        return h + F.conv2d(h, own["mix.weight"], own["mix.bias"])

    hidden = F.gelu(over(z @ own["down"].T + own["down_bias"], filters))
    return x + hidden @ own["up"].T + own["up_bias"]


def _mona_tensors(family: str) -> dict[str, dict[str, Tensor]]:
    """By site; deeper names than rewrites.sites gives."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in case("mona[rank=5]", family).delta.tensors.items():
        site, mark, short = name.partition(".mona.")
        if mark:
            found.setdefault(site, {})[short] = value
    return found


def _mona_block(kind: str, block: nn.Module, first: Any, second: Any, grid: Any) -> Any:
    """The block's forward as the paper has it: an adapter behind each residual."""

    def over(z: Tensor, f: Any) -> Tensor:
        return f(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if z.ndim == 4 else _over(z, grid, f)

    def forward(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        if kind == "swin":
            x = _mona(x + block._attn(block.norm1(x)), first, over)
            return _mona(x + block.mlp(block.norm2(x)), second, over)
        if kind == "mixer":
            x = _mona(x + block.mlp_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2), first, over)
            return _mona(x + block.mlp_channels(block.norm2(x)), second, over)
        if kind == "beit":
            x = _mona(x + block.gamma_1 * block.attn(block.norm1(x), **named), first, over)
            return _mona(x + block.gamma_2 * block.mlp(block.norm2(x)), second, over)
        x = _mona(x + block.ls1(block.attn(block.norm1(x), **named)), first, over)
        return _mona(x + block.ls2(block.mlp(block.norm2(x))), second, over)

    return forward


MONA = {"vit": ("drop_path1", (1, 3, 4)), "clip": ("drop_path1", (1, 3, 4)), "beit": ("drop_path1", (1, 3, 4)),
        "swin": ("drop_path1", None), "mixer": ("drop_path", (0, 3, 4))}  # fmt: skip


@pytest.mark.parametrize("family", sorted(MONA))
def test_mona_follows_both_residuals(family: str, agree) -> None:
    """x + up(gelu(filters(down(scaled LN x)))) on the stream behind the attention and behind the MLP."""
    made, model, own = case("mona[rank=5]", family), bare(family), _mona_tensors(family)
    end, grid = MONA[family]
    blocks = [n for n in own if not n.endswith(f".{end}")]
    assert {f"{n}.{end}" for n in blocks} == set(own) - set(blocks)
    for name in blocks:
        block = model.get_submodule(name)
        block.forward = _mona_block(family, block, own[f"{name}.{end}"], own[name], grid)
    model.load_state_dict(head(made.delta), strict=False)
    wanted = logits(model, made.x)
    assert relative(made.bare, wanted) > 1e-4
    agree("mona", f"rewrite, {family}", attached=relative(wanted, made.live))


@pytest.mark.parametrize("family", ["resnet", "convnext", "maxvit"])
def test_mona_follows_blocks_of_maps(family: str, agree) -> None:
    """Behind every block of a convolutional network, strided or not."""
    own = _mona_tensors(family)

    def hook(_x, y, _own, site):
        over = lambda z, f: f(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # noqa: E731 - a formula
        return _mona(y.permute(0, 2, 3, 1), own[site.name], over).permute(0, 3, 1, 2)

    agree("mona", f"rewrite, {family}", **by_hooks("mona[rank=5]", family, hook))


def _conv_adapter(x: Tensor, own: Any, stride: Any, padding: Any, act: Any) -> Tensor:
    """On maps with channels first."""
    kernel = own["kernel"]
    hidden = act(F.conv2d(x, kernel, own["kernel_bias"], stride, padding, groups=kernel.shape[0]))
    pointwise = F.conv2d(hidden, own["up"][:, :, None, None], own["up_bias"])
    return own["alpha"][:, None, None] * pointwise


@pytest.mark.parametrize("family", ["resnet", "regnet", "nfnet", "efficientnet", "pvt", "maxvit"])
def test_conv_adapter_beside_convolutions(family: str, agree) -> None:
    """Each block's convolution plus alpha * (U act(K * x)), K with that one's kernel, stride and padding."""
    modules = dict(bare(family).named_modules())

    def hook(x, y, own, site):
        conv = modules[site.name]
        assert own["kernel"].shape == (max(x.shape[1] // 2, 1), 2, *conv.kernel_size)
        padding = conv.padding
        if type(conv).__name__ == "Conv2dSame":
            x, padding = pad_same(x, conv.kernel_size, conv.stride), 0
        return y + _conv_adapter(x, own, conv.stride, padding, F.silu)

    agree("conv-adapter", f"rewrite, {family}", **by_hooks("conv-adapter[reduce=2,act=silu]", family, hook))


def test_conv_adapter_beside_windows(agree) -> None:
    """In Swin from norm1's map to the end of the attention's branch, as the authors' code has it."""
    kept: dict[str, Tensor] = {}

    def hook(_x, y, own, site):
        block = site.name.rpartition(".")[0]
        if not own:
            kept[block] = y.permute(0, 3, 1, 2)
            return y
        return y + _conv_adapter(kept[block], own, 1, 2, F.gelu).permute(0, 2, 3, 1)

    agree("conv-adapter", "rewrite, swin", **by_hooks("conv-adapter[kernel=5,act=gelu]", "swin", hook))


@pytest.mark.parametrize("family", ["resnet", "swin", "efficientnet"])
def test_conv_adapter_beside_blocks(family: str, agree) -> None:
    """Each block plus the adapter of its input, strided as the block is."""
    last = family == "swin"

    def hook(x, y, own, _site):
        x = x.permute(0, 3, 1, 2) if last else x
        stride = -(-x.shape[2] // y.shape[1 if last else 2])
        added = _conv_adapter(x, own, stride, 1, F.relu)
        return y + (added.permute(0, 2, 3, 1) if last else added)

    agree("conv-adapter[at=residual]", f"rewrite, {family}", **by_hooks("conv-adapter[at=residual]", family, hook))


@pytest.mark.parametrize(("at", "family"), [("conv", "resnet"), ("conv", "efficientnet"), ("residual", "resnet")])
def test_conv_adapter_behind_its_part(at: str, family: str, agree) -> None:
    """Sequential: the part's output plus the adapter of that output."""

    def hook(_x, y, own, _site):
        return y + _conv_adapter(y, own, 1, own["kernel"].shape[2] // 2, F.relu)

    spec = f"conv-adapter[at={at},form=sequential,reduce=4]"
    agree(spec, f"rewrite, {family}", **by_hooks(spec, family, hook))


@pytest.mark.parametrize("spec", ["convpass[rank=3]", "mona[rank=5]"])
@pytest.mark.parametrize("size", [(32, 24), (48, 32), (24, 96)])
def test_other_image_sizes_have_other_maps(spec: str, size: tuple[int, int]) -> None:
    """With dynamic_img_size the map is the image's own, even where the count of patches is that of another one."""
    delta = extract(perturbed(spec, "vit"))
    dynamic = attach(bare("vit", dynamic_img_size=True), delta, check=False)
    fixed = bare("vit", img_size=size)
    state = {n: t for n, t in bare("vit", dynamic_img_size=True).state_dict().items() if n != "pos_embed"}
    fixed.load_state_dict(state, strict=False)
    with torch.no_grad():
        dynamic.pos_embed.zero_()
        fixed.pos_embed.zero_()
    inject(fixed, spec)
    places = tensors_of(fixed)
    with torch.no_grad():
        for name, value in tensors_of(dynamic).items():
            places[name].copy_(value)
    fixed.head.load_state_dict(dynamic.head.state_dict())
    x = families.batch("vit", size=size)
    assert relative(logits(fixed, x), logits(dynamic, x)) < 1e-12


@pytest.mark.parametrize("spec", ["convpass", "mona", "conv-adapter"])
def test_nothing_is_held_after_a_forward(spec: str) -> None:
    """What one graft keeps for another is taken within the forward."""
    model = perturbed(spec, "swin")
    logits(model, families.batch("swin"))
    graft = getattr(model, spec.replace("-", "_"))
    assert graft.held == {}
    assert any(host is model for _, host in hosts(model))


def test_starts() -> None:
    """Convpass: D Xavier-uniform, K the identity at its centre. Mona: D N(0, 0.02), gamma 1e-6. The last matrices zero."""
    tensors = tensors_of(inject(families.build("vit"), "convpass[rank=16]"))
    down, kernel = tensors["blocks.0.attn.convpass.down"], tensors["blocks.0.attn.convpass.kernel"]
    bound = (6 / (32 + 16)) ** 0.5
    assert 0.95 * bound < down.abs().max() <= bound
    assert torch.equal(kernel[:, :, 1, 1], torch.eye(16, dtype=kernel.dtype))
    assert kernel.sum() == 16
    assert not any(t.any() for n, t in tensors.items() if n.endswith(("up", "bias")))
    tensors = tensors_of(inject(families.build("vit"), "mona"))
    assert abs(tensors["blocks.0.mona.down"].std() - 0.02) < 0.002
    assert torch.allclose(tensors["blocks.0.mona.gamma"], torch.tensor(1e-6, dtype=torch.float64))
    assert torch.equal(tensors["blocks.0.mona.gammax"], torch.ones(32, dtype=torch.float64))
    assert not tensors["blocks.0.mona.up"].any()
    assert tensors["blocks.0.mona.filters.1.weight"].any()
    tensors = tensors_of(inject(families.build("resnet"), "conv-adapter"))
    assert torch.equal(tensors["layer3.0.conv2.conv_adapter.alpha"], torch.ones(16, dtype=torch.float64))
    assert not tensors["layer3.0.conv2.conv_adapter.up"].any()
    assert tensors["layer3.0.conv2.conv_adapter.kernel"].abs().max() <= (8 * 9) ** -0.5


@pytest.mark.parametrize(
    ("spec", "family", "words"),
    [
        ("convpass", "hiera", "tokens of blocks.0.attn are not a map row by row"),
        ("mona", "hiera", "not a map row by row"),
        ("convpass", "mobilevit", "transformer.0.attn are not a map row by row"),
        ("mona", "mobilevit", "not a map row by row"),
        ("conv-adapter", "vit", "carry sequences of tokens"),
        ("conv-adapter[at=residual]", "pvt", "carry sequences of tokens"),
        ("conv-adapter[kernel=4]", "resnet", "has no centre"),
    ],
)
def test_refusals(spec: str, family: str, words: str) -> None:
    """Sequences that are no map, parts that are not there, and kernels without a centre."""
    with pytest.raises(UsageError, match=words):
        inject(families.build(family), spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [("convpass", "as its own part"), ("adaptformer", "as its own part"), ("dtl", "keeps the shape of its input")],
)
def test_blocks_that_all_change_their_shape_are_refused(spec: str, words: str) -> None:
    """A MaxViT of one block a stage, whose attentions and MLPs lie deeper; with two blocks the second will do."""
    with pytest.raises(UsageError, match=words):
        inject(families.build("maxvit", depths=(1, 1)), spec)
    inject(families.build("maxvit", depths=(2, 2)), spec)


def test_a_lone_window_is_still_a_window() -> None:
    """Where Swin's window is the whole map the bypass stands as in its other blocks, not inside the attention."""
    model = inject(families.build("swin"), "convpass")
    names = {n for n, _ in hosts(model)}
    assert "layers.1.blocks.0.drop_path1" in names
    assert not any(n.endswith("attn") for n in names)


@pytest.mark.parametrize("front", [0, 1, 5])
def test_prompts_of_another_method_stand_in_front(front: int) -> None:
    """However many tokens stand before the patches each is a map of its own; so are all where there are no patches."""
    model = perturbed("convpass[rank=3]", "vit")
    logits(model, families.batch("vit"))
    graft = model.blocks[0].attn.convpass
    z = torch.randn(2, front + 12, 3, dtype=torch.float64)

    def f(maps: Tensor) -> Tensor:
        return F.conv2d(maps, graft.kernel, graft.kernel_bias, padding=1)

    with torch.no_grad():
        assert torch.allclose(graft.spread(z, f), _over(z, (front, 3, 4), f))
        few = z[:, :7]
        assert torch.allclose(
            graft.spread(few, f), torch.stack([f(few[:, i, :, None, None])[..., 0, 0] for i in range(7)], 1)
        )


@pytest.mark.parametrize("spec", ["vpt-deep+mona", "mona+vpt-deep", "e2vpt+mona", "convpass+vpt-deep"])
def test_no_part_sleeps_beside_prompts(spec: str) -> None:
    """With prompts in the sequence every adapter still acts: each of its tensors has a gradient."""
    model = perturbed(spec, "vit")
    weights = torch.randn(families.CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (model(families.batch("vit")) * weights).sum().backward()
    found = {n: t.grad for n, t in tensors_of(model).items() if ".mona." in n or ".convpass." in n}
    assert found
    assert all(g is not None and g.abs().max() > 0 for g in found.values())


@pytest.mark.parametrize("method", ["convpass", "mona"])
def test_a_map_of_positions_is_no_guide(method: str) -> None:
    """XCiT's positions pass a convolution of their own, once for all images: what tells rows is the patches' convolution."""
    model = timm.create_model("xcit_nano_12_p16_224", num_classes=3)
    part = extract(inject(model, method)).parts[0]
    assert {s.facts["guide"] for s in part.sites if s.facts.get("guide")} == {"patch_embed.proj.6.0"}
