"""Prompts by hand: the papers' attentions, blocks and nets written out with explicit matrices, beside vtzoo's.

Where vtzoo adds keys and values alone, or runs queries on their own, the reference puts the prompts into the sequence, as
the papers do, and drops what becomes of them.
"""

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.nn import functional as F

from tests import families
from tests.contract.cases import bare, case, fresh, logits, perturbed, relative
from tests.parity import rewrites
from vtzoo.errors import UsageError
from vtzoo.graft import tensors_of
from vtzoo.live import attach, extract, inject


def own(delta, site: str) -> dict[str, Tensor]:
    """A delta's tensors at one site, by their short names."""
    return {
        n.rpartition(".")[2]: t for n, t in delta.tensors.items() if n.rpartition(".")[0].rpartition(".")[0] == site
    }


def with_head(family: str, delta, **changes) -> nn.Module:
    """A bare net with the delta's classifier."""
    model = bare(family, **changes)
    model.load_state_dict(rewrites.head(delta), strict=False)
    return model


def heads(x: Tensor, count: int) -> Tensor:
    """[batch, n, heads * d] -> [batch, heads, n, d]."""
    batch, n, _ = x.shape
    return x.reshape(batch, n, count, -1).permute(0, 2, 1, 3)


def projected(attn: nn.Module, x: Tensor) -> Tensor:
    """Queries, keys and values in a row."""
    bias = attn.qkv.bias
    if bias is None and getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    return F.linear(x, attn.qkv.weight, bias)


def by_hand(attn: nn.Module, x: Tensor, *, prompts=None, key=None, value=None, mask=None, warm=1.0, unseen=0) -> Tensor:
    """One attention, step by step.

    Args:
        attn: of a ViT, BEiT, Swin or Swin V2.
        x: [batch, n, width].
        prompts: tokens put in front and dropped afterwards, without relative position or mask.
        key: of a key prompt, [heads, m, d].
        value: likewise.
        mask: of windows.
        warm: temperature.
        unseen: how many tokens in front ask, but are not looked at.
    """
    count, front = attn.num_heads, 0 if prompts is None else len(prompts)
    if prompts is not None:
        x = torch.cat([prompts.expand(len(x), -1, -1), x], dim=1)
    q, k, v = (heads(t, count) for t in projected(attn, x).chunk(3, -1))
    n, further = q.shape[2], 0 if key is None else key.shape[1]
    if further:
        k = torch.cat([key.expand(len(x), -1, -1, -1), k], dim=2)
        v = torch.cat([value.expand(len(x), -1, -1, -1), v], dim=2)
    cosine = hasattr(attn, "logit_scale")
    if cosine:
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        scores = (q @ k.mT) * attn.logit_scale.clamp(max=math.log(100)).exp()
    else:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores / warm
    area = n - front
    bias = torch.zeros(count, area, area, dtype=x.dtype)
    if cosine:
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, count)
        bias = 16 * torch.sigmoid(table[attn.relative_position_index.view(-1)].view(area, area, count)).permute(2, 0, 1)
    elif getattr(attn, "relative_position_bias_table", None) is not None:
        table = attn.relative_position_bias_table[attn.relative_position_index.view(-1)]
        bias = table.view(area, area, count).permute(2, 0, 1)
    scores[:, :, front:, further + front :] += bias
    if mask is not None:
        windows = len(mask)
        for i in range(len(x)):
            scores[i, :, front:, further + front :] += mask[i % windows]
    scores[..., further : further + unseen] = -torch.inf
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.linear(y, attn.proj.weight, attn.proj.bias)[:, front:]


def block_by_hand(block: nn.Module, x: Tensor, **knobs) -> Tensor:
    """A block of the tiny ViT."""
    x = x + by_hand(block.attn, block.norm1(x), **knobs)
    return x + block.mlp(block.norm2(x))


def start_of(model: nn.Module, x: Tensor) -> Tensor:
    """The sequence that enters the tiny ViT's blocks."""
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), model.patch_embed(x)], dim=1)
    return x + model.pos_embed


def insert(x: Tensor, prompt: Tensor) -> Tensor:
    """Prompts behind the class token."""
    return torch.cat([x[:, :1], prompt.expand(len(x), -1, -1), x[:, 1:]], dim=1)


@pytest.mark.parametrize("family", ["beit", "swin", "swinv2"])
@torch.no_grad()
def test_vpt_deep_in_windows(family: str, agree) -> None:
    """VPT's own way: prompts in front of each window's tokens, through the norm, bias and mask padded with zeros."""
    made = case("vpt-deep", family)
    model = with_head(family, made.delta)
    _rewrite(model, family, made.delta, lambda here, _norm: {"prompts": here["prompt"]})
    wanted = logits(model, made.x)
    assert relative(made.bare, wanted) > 1e-4
    agree(f"vpt-deep on {family}", "rewrite", attached=relative(wanted, made.live))


@torch.no_grad()
def test_vpt_deep_is_one_function(agree) -> None:
    """On a ViT the prompts in the sequence give what the same prompts as keys and values do."""
    made = case("vpt-deep", "vit")
    model, x = with_head("vit", made.delta), start_of(bare("vit"), made.x)
    for i, block in enumerate(model.blocks):
        prompt = own(made.delta, f"blocks.{i}")["prompt"]
        x = x + by_hand(block.attn, block.norm1(x), prompts=block.norm1(prompt))
        x = x + block.mlp(block.norm2(x))
    wanted = model.head(model.norm(x)[:, 0])
    agree("vpt-deep on vit", "rewrite", attached=relative(wanted, made.live))


@torch.no_grad()
def test_vpt_deep_behind_a_smaller_map(agree) -> None:
    """In PVT the prompts are keys and values beside those of the reduced map."""
    made = case("vpt-deep", "pvt")
    model = with_head("pvt", made.delta)
    for site, here in rewrites.sites(made.delta):
        attn, norm = model.get_submodule(site.name), model.get_submodule(site.name[: -len("attn")] + "norm1")

        prompts = norm(here["prompt"])

        def run(x: Tensor, size, attn=attn, prompts=prompts) -> Tensor:
            seen = x
            if attn.sr is not None:
                seen = attn.norm(attn.sr(x.mT.reshape(len(x), -1, *size)).flatten(2).mT)
            seen = torch.cat([prompts.expand(len(x), -1, -1), seen], dim=1)
            q = heads(attn.q(x), attn.num_heads)
            k, v = (heads(t, attn.num_heads) for t in attn.kv(seen).chunk(2, -1))
            y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
            return attn.proj(y.transpose(1, 2).flatten(2))

        attn.forward = run
    wanted = logits(model, made.x)
    assert relative(made.bare, wanted) > 1e-4
    agree("vpt-deep on pvt", "rewrite", attached=relative(wanted, made.live))


@pytest.mark.parametrize("family", ["vit", "beit", "swin"])
@pytest.mark.parametrize("knobs", ["", "[share=false,keys=2,prune_tokens=0.5,prune_segments=0.3,segments=8]"])
@torch.no_grad()
def test_e2vpt(family: str, knobs: str, agree) -> None:
    """Masked prompts in front of the tokens, and keys and values that belong to no token."""
    made = case(f"e2vpt{knobs}", family)
    model = with_head(family, made.delta)
    config = made.delta.parts[0].config
    common = {n.rpartition(".")[2]: t for n, t in made.delta.tensors.items() if n.startswith("e2vpt.")}
    tokens, segments = common["token_mask"].clone(), common["segment_mask"].clone()
    tokens[tokens.abs().argsort()[: round(config.prune_tokens * len(tokens))]] = 0
    for row in segments:
        row[row.abs().argsort()[: len(row) - round((1 - config.prune_segments) * len(row))]] = 0
    assert (tokens == 0).sum() == (5 if knobs else 0)
    assert ((segments == 0).sum(1) == (2 if knobs else 0)).all()

    def change(here, _norm):
        width = here["prompt"].shape[1]
        cuts = [s for t in segments for s in t for _ in range(math.ceil(width / len(t)))]
        mask = tokens[:, None] * torch.stack(cuts).reshape(len(tokens), -1)[:, :width]
        return {"prompts": here["prompt"] * mask, "key": here["keys"], "value": here.get("values", here["keys"])}

    _rewrite(model, family, made.delta, change)
    wanted = logits(model, made.x)
    assert relative(made.bare, wanted) > 1e-4
    agree(f"e2vpt{knobs} on {family}", "rewrite", attached=relative(wanted, made.live))


def _rewrite(model: nn.Module, family: str, delta, change) -> None:
    """Every attention of the delta's sites runs by hand."""
    for site, here in rewrites.sites(delta):
        if not site.name:
            continue
        attn, block = model.get_submodule(site.name), model.get_submodule(site.name.rpartition(".")[0])
        knobs = change(here, block.norm1)
        if family != "swinv2":
            knobs["prompts"] = block.norm1(knobs["prompts"])

        def run(x: Tensor, mask=None, attn=attn, knobs=knobs, **_: object) -> Tensor:
            return by_hand(attn, x, mask=mask, **knobs)

        attn.forward = run


@pytest.mark.parametrize("spec", ["gated-vpt", "gated-vpt[tokens=2,gate=0.5]"])
@torch.no_grad()
def test_gated_vpt(spec: str, agree) -> None:
    """The paper's loop: each block's prompts are a mixture of what came in and what came out, at a temperature of its own."""
    made = case(spec, "vit")
    model, last = with_head("vit", made.delta), 1
    prompt = own(made.delta, "norm_pre")["prompt"]
    x, n = insert(start_of(model, made.x), prompt), len(prompt)
    for i, block in enumerate(model.blocks):
        before = x[:, 1 : 1 + n]
        x = block_by_hand(block, x, warm=own(made.delta, f"blocks.{i}.attn")["temperature"])
        if i < last:
            gate = own(made.delta, f"blocks.{i}")["gate"].sigmoid()
            x = torch.cat([x[:, :1], gate * x[:, 1 : 1 + n] + (1 - gate) * before, x[:, 1 + n :]], dim=1)
    wanted = model.head(model.norm(x)[:, 0])
    assert relative(made.bare, wanted) > 1e-4
    agree(spec, "rewrite", attached=relative(wanted, made.live))


def test_gates_start_nearly_closed() -> None:
    """Gates at minus the knob, temperatures at 1, the prompts within VPT's bound."""
    model = fresh("gated-vpt[tokens=40,gate=3]", "vit")
    tensors = {n: t.detach() for n, t in tensors_of(model).items()}
    assert tensors["blocks.0.gated_vpt.gate"].item() == -3
    assert tensors["blocks.1.attn.gated_vpt.temperature"].item() == 1
    bound = math.sqrt(6 / (3 * 8 * 8 + 32))
    prompt = tensors["norm_pre.gated_vpt.prompt"]
    assert 0.95 * bound < prompt.abs().max() <= bound
    assert abs(prompt.std() - bound / math.sqrt(3)) < 0.1 * bound


@torch.no_grad()
def test_temperature_has_limits() -> None:
    """Below 0.01 and above 10 a temperature acts as the limit does."""
    model, x = fresh("gated-vpt[tokens=2]", "vit"), families.batch("vit")
    value = tensors_of(model)["blocks.0.attn.gated_vpt.temperature"]
    for limit, beyond in ((0.01, -1.0), (10.0, 25.0)):
        value.fill_(limit)
        at = logits(model, x)
        value.fill_(beyond)
        assert torch.equal(logits(model, x), at)


@pytest.mark.parametrize("spec", ["vqt", "vqt[tokens=3]"])
@torch.no_grad()
def test_vqt(spec: str, agree) -> None:
    """Queries in front of the sequence that no other token sees; what they find, summed behind the last norm."""
    made = case(spec, "vit")
    model = with_head("vit", made.delta)
    x, found = start_of(model, made.x), 0
    for i, block in enumerate(model.blocks):
        here = own(made.delta, f"blocks.{i}")
        n = len(here["prompt"])
        both = torch.cat([here["prompt"].expand(len(x), -1, -1), x], dim=1)
        both = block_by_hand(block, both, unseen=n)
        z, x = both[:, :n], both[:, n:]
        found = found + (here["weight"] * z / (z.square().mean(-1, keepdim=True) + 2e-16).sqrt()).sum(1)
    features = logits(bare("vit", classes=0), made.x)
    assert relative(features, model.norm(x)[:, 0]) < 1e-12
    wanted = model.head(features + found)
    assert relative(made.bare, wanted) > 1e-4
    agree(spec, "rewrite", attached=relative(wanted, made.live))


@pytest.mark.parametrize("family", ["vit", "beit", "eva02", "dinov3", "deit3"])
def test_vqt_leaves_the_backbone_alone(family: str) -> None:
    """No block's input has a gradient, the last block gives what it gives without the method, bit for bit, and nothing stays."""
    model, plain, x = perturbed("vqt", family), bare(family), families.batch(family)
    seen: dict[str, Tensor] = {}
    model.blocks[-1].register_forward_hook(lambda _m, args, y: seen.update(x=args[0], y=y))
    plain.blocks[-1].register_forward_hook(lambda _m, _args, y: seen.update(plain=y))
    with torch.no_grad():  # as in the frozen one, or torch takes another kernel
        plain(x)
    model(x).sum().backward()
    assert not seen["x"].requires_grad
    assert not seen["y"].requires_grad
    assert torch.equal(seen["y"], seen["plain"])
    assert all(t.grad.abs().max() > 0 for t in tensors_of(model).values())
    assert model.vqt.found == {}


def test_vqt_forgets_a_forward_that_failed() -> None:
    """What an interrupted forward left does not enter the next one."""
    made = case("vqt", "vit")
    model = attach(bare("vit"), made.delta)
    handle = model.blocks[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(made.x)
    assert model.vqt.found
    handle.remove()
    assert torch.equal(logits(model, made.x), made.live)


@pytest.mark.parametrize(
    ("spec", "depth"), [("sa2vp", 2), ("sa2vp[rank=3,scale=1]", 2), ("sa2vp[rank=5,scale=0.5]", 7)]
)
@torch.no_grad()
def test_sa2vp(spec: str, depth: int, agree) -> None:
    """The paper's two streams: both through every block, one looking at the other, patch by patch at its neighbours."""
    model = perturbed(spec, "vit", depth=depth)
    delta, images = extract(model, task="t"), families.batch("vit")
    live = logits(model, images)
    net, scale = with_head("vit", delta, depth=depth), delta.parts[0].config.scale
    here = own(delta, "patch_embed")
    x = start_of(net, images)
    p = torch.cat([net.cls_token[0], here["map"] @ here["up"].mT + here["up_bias"]]) + net.pos_embed
    p = p.expand(len(x), -1, -1)
    gives_to_prompts = {2: {0}, 7: {0, 2, 4}}[depth]
    for i, block in enumerate(net.blocks):
        here, turn = own(delta, f"blocks.{i}"), i in gives_to_prompts
        asks, other = (p, x) if turn else (x, p)
        fused = _look(block, asks, other, here)
        x, p = block_by_hand(block, x), block_by_hand(block, p)
        x, p = (x, p + scale * fused) if turn else (x + scale * fused, p)
    wanted = net.head(net.norm(x)[:, 0])
    assert relative(logits(bare("vit", depth=depth), images), wanted) > 1e-4
    agree(f"{spec} of {depth} blocks", "rewrite", attached=relative(wanted, live))


def _look(block: nn.Module, asks: Tensor, other: Tensor, here: dict[str, Tensor]) -> Tensor:
    """The cross attention of one block on a grid of 3 x 4, patch by patch, and its bottleneck."""
    attn = block.attn
    q = heads(projected(attn, block.norm1(asks)).chunk(3, -1)[0], attn.num_heads)
    k, v = (heads(t, attn.num_heads) for t in projected(attn, block.norm1(other)).chunk(3, -1)[1:])
    rows = []
    for i in range(13):
        row, column = divmod(i - 1, 4)
        near = [1 + r * 4 + c for r in range(3) for c in range(4) if max(abs(r - row), abs(c - column)) <= 1]
        seen = near if i else list(range(13))
        scores = q[:, :, [i]] @ k[:, :, seen].mT / math.sqrt(q.shape[-1])
        rows.append(scores.softmax(-1) @ v[:, :, seen])
    y = attn.proj(torch.cat(rows, dim=2).transpose(1, 2).flatten(2)) + asks
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    y = F.gelu((y * here["norm"] + here["norm_bias"]) @ here["down"].mT + here["down_bias"])
    return y @ here["up"].mT + here["up_bias"]


def test_sa2vp_starts_as_in_the_papers_code() -> None:
    """A narrow map, Xavier-uniform layers, biases near zero, the norm as the identity."""
    tensors = {n: t.detach() for n, t in tensors_of(fresh("sa2vp", "vit")).items()}
    assert abs(tensors["patch_embed.sa2vp.map"].std() - 0.02) < 0.004
    for name in ("patch_embed.sa2vp.up", "blocks.0.sa2vp.down", "blocks.1.sa2vp.up"):
        bound = math.sqrt(6 / (32 + 16))
        assert 0.95 * bound < tensors[name].abs().max() <= bound
        assert abs(tensors[name].std() - bound / math.sqrt(3)) < 0.1 * bound
    assert 0 < tensors["blocks.0.sa2vp.up_bias"].abs().max() < 1e-5
    assert (tensors["blocks.0.sa2vp.norm"] == 1).all()
    assert not tensors["blocks.0.sa2vp.norm_bias"].any()


def test_e2vpt_starts_as_in_the_papers_code() -> None:
    """Keys Kaiming-uniform over keys and head width, input prompts within VPT's bound, masks at 1."""
    tensors = {n: t.detach() for n, t in tensors_of(fresh("e2vpt[keys=20,tokens=30]", "vit")).items()}
    for name, bound in (("keys", math.sqrt(6 / (20 * 16))), ("prompt", math.sqrt(6 / (3 * 8 * 8 + 32)))):
        value = tensors[f"blocks.0.attn.e2vpt.{name}"]
        assert 0.95 * bound < value.abs().max() <= bound
        assert abs(value.std() - bound / math.sqrt(3)) < 0.1 * bound
    assert (tensors["e2vpt.token_mask"] == 1).all()
    assert (tensors["e2vpt.segment_mask"] == 1).all()


def test_pruned_masks_of_e2vpt_learn_as_if_they_were_kept() -> None:
    """A pruned entry's gradient is what it would be if nothing were pruned, its sign with it (straight through)."""
    pull = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads = []
    for pruned in (0.5, 0.0):
        model = fresh(f"e2vpt[tokens=4,prune_tokens={pruned},segments=4]", "vit")
        with torch.no_grad():
            model.e2vpt.token_mask.copy_(torch.tensor([1.0, -0.9, 0.2, -0.1]))
        (model.e2vpt.mask(32) * pull).sum().backward()
        grads.append(model.e2vpt.token_mask.grad)
    assert torch.equal(*grads)
    assert torch.allclose(grads[0], pull.sum(1))


def test_what_is_pruned_goes_on_learning() -> None:
    """A pruned prompt has no effect, yet its mask has a gradient and it comes back when it has outgrown another."""
    model, x = fresh("e2vpt[tokens=4,prune_tokens=0.5,segments=4]", "vit"), families.batch("vit")
    tensors = tensors_of(model)
    mask = tensors["e2vpt.token_mask"]
    with torch.no_grad():
        mask.copy_(torch.tensor([1.0, -0.9, 0.2, -0.1]))
    model(x).sum().backward()
    assert (mask.grad != 0).all()
    grad = tensors["blocks.0.attn.e2vpt.prompt"].grad
    assert (grad[:2] != 0).all()
    assert not grad[2:].any()
    before = logits(model, x)
    with torch.no_grad():
        tensors["blocks.0.attn.e2vpt.prompt"][2:] += 1
        assert torch.equal(logits(model, x), before)
        mask[2] = 0.95
        assert not torch.equal(logits(model, x), before)


@torch.no_grad()
def test_two_on_one_attention_add_up(agree) -> None:
    """Keys of one method and the temperature of another act in one attention, in whatever order they hang."""
    gap = {}
    for spec in ("e2vpt[keys=2]+gated-vpt[tokens=1]", "gated-vpt[tokens=1]+e2vpt[keys=2]"):
        model, x = perturbed(spec, "vit"), torch.randn(2, 13, 32, dtype=torch.float64)
        attn, block = model.blocks[0].attn, model.blocks[0]
        prompts = block.norm1(attn.e2vpt.prompts())
        knobs = {"key": attn.e2vpt.keys, "value": attn.e2vpt.keys, "warm": attn.gated_vpt.temperature}
        gap[spec.split("[")[0]] = relative(by_hand(attn, x, prompts=prompts, **knobs), attn(x))
    agree("e2vpt and gated-vpt", "rewrite", **gap)


@pytest.mark.parametrize(
    ("method", "family", "reason"),
    [
        ("e2vpt", "cait", "TalkingHeadAttn of Cait is not a plain softmax attention, so prompts don't fit"),
        ("e2vpt", "resnet", "no block of this ResNet has a plain attention as its own part"),
        ("vpt-deep", "hiera", "MaskUnitAttention of Hiera is not a plain softmax attention"),
        (
            "gated-vpt",
            "swin",
            "SwinTransformer does not take one sequence from a layer 'norm_pre' through all its blocks",
        ),
        ("gated-vpt", "beit", "Beit does not take one sequence from a layer 'norm_pre' through all its blocks"),
        ("vqt", "swin", "SwinTransformerBlock of SwinTransformer is not an attention over one sequence and an MLP"),
        ("vqt", "pvt", "is not an attention over one sequence and an MLP, each behind its norm, so query prompts"),
        ("sa2vp", "metaformer", "is not an attention over one sequence and an MLP, each behind its norm, so maps"),
    ],
)
def test_refusals_name_what_was_seen(method: str, family: str, reason: str) -> None:
    """The reason names the layer that is not what the maths needs."""
    with pytest.raises(UsageError, match=reason):
        inject(bare(family), method)


def test_a_block_with_norms_behind_is_refused() -> None:
    """A residual block whose norms follow its branches is another function: the probe's numbers say so."""
    args = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **args, block_fn=ResPostBlock, init_values=1.0).double()
    with pytest.raises(UsageError, match="ResPostBlock of VisionTransformer is not an attention over one sequence"):
        inject(model, "vqt")
