"""Language and vision-language methods written out anew on a plain open_clip model, from the papers and their authors' code.

Shapes: images [b, 3, h, w]; names a list of C texts; ctx [m, w] or [C, m, w], context vectors of the text tower's width w; f [b, e] and
t [C, e], embeddings of images and classes; logits [b, C]. `say` is open_clip's tokenizer. Nothing here knows of vtzoo.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Deep = Mapping[int, Tensor]
"""Prompts that take the places of the first ones in front of these blocks."""


def unit(x: Tensor) -> Tensor:
    """Divided by its length."""
    return x / x.norm(dim=-1, keepdim=True)


def read(model: Any, x: Tensor, ids: Tensor, deep: Deep | None = None) -> Tensor:
    """CoOp's TextEncoder: embedded prompts [n, length, w] -> [n, e], taken where the text of `ids` ends; MaPLe's deep prompts on the way.

    SigLIP takes the last token, and has no mask.
    """
    tower = getattr(model, "text", model)
    x = x + tower.positional_embedding[: x.shape[1]]
    for i, block in enumerate(tower.transformer.resblocks):
        if i in (deep or {}):
            x = torch.cat([x[:, :1], deep[i].expand(len(x), -1, -1), x[:, 1 + len(deep[i]) :]], dim=1)
        x = block(x, attn_mask=tower.attn_mask)
    x = tower.ln_final(x)
    x = x[:, -1] if getattr(tower, "pool_type", "argmax") == "last" else x[torch.arange(len(x)), ids.argmax(-1)]
    return tower.text_projection(x) if callable(tower.text_projection) else x @ tower.text_projection


def embed(model: Any, ids: Tensor) -> Tensor:
    """Token ids -> the vectors that the text tower starts from."""
    return getattr(model, "text", model).token_embedding(ids)


def learned(model: Any, say: Any, ctx: Tensor, names: Sequence[str], position: str = "end") -> tuple[Tensor, Tensor]:
    """CoOp's PromptLearner: SOS, context and name, full stop, EOS, padding; and the ids with X for each context vector."""
    ctx = ctx.expand(len(names), -1, -1)
    m = ctx.shape[1]
    ids, cut = (
        say([" ".join(["X"] * m) + f" {name}." for name in names]),
        {"end": m, "middle": m // 2, "front": 0}[position],
    )
    rows = []
    for own, row, name in zip(ctx, embed(model, ids), names, strict=True):
        behind = 1 + m + len(say.encode(name))
        rows.append(torch.cat([row[:1], own[:cut], row[1 + m : behind], own[cut:], row[behind:]]))
    return torch.stack(rows), ids


def see(model: Any, images: Tensor, first: Tensor | None = None, deep: Deep | None = None) -> Tensor:
    """CLIP's VisionTransformer with MaPLe's prompts: all tokens, normed and projected [b, 1 + patches + prompts, e]."""
    eye = model.visual
    x = eye.conv1(images).flatten(2).mT
    x = torch.cat([eye.class_embedding.expand(len(x), 1, -1), x], dim=1) + eye.positional_embedding
    x = eye.ln_pre(x if first is None else torch.cat([x, first.expand(len(x), -1, -1)], dim=1))
    for i, block in enumerate(eye.transformer.resblocks):
        if i in (deep or {}):
            x = torch.cat([x[:, : -len(deep[i])], deep[i].expand(len(x), -1, -1)], dim=1)
        x = block(x)
    return eye.ln_post(x) @ eye.proj


def compare(model: Any, f: Tensor, t: Tensor) -> Tensor:
    """CLIP's logits of embeddings that need not be normalised."""
    bias = 0 if getattr(model, "logit_bias", None) is None else model.logit_bias
    return model.logit_scale.exp() * unit(f) @ unit(t).T + bias


def class_features(model: Any, say: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Zero-shot classifier [C, e]: each text normalised, their mean over the templates normalised again."""
    return unit(torch.stack([unit(model.encode_text(say([t.format(n) for t in templates]))).mean(0) for n in names]))


def zero_shot(model: Any, say: Any, images: Tensor, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """CLIP's logits by class names."""
    return compare(model, model.encode_image(images), class_features(model, say, names, templates))


def coop(model: Any, say: Any, images: Tensor, names: Sequence[str], ctx: Tensor, position: str = "end") -> Tensor:
    """CoOp (arXiv:2109.01134): classes by learned context, shared or each class's own."""
    return compare(model, model.encode_image(images), read(model, *learned(model, say, ctx, names, position)))


def kgcoop(logits: Tensor, labels: Tensor, t: Tensor, known: Tensor, weight: float) -> Tensor:
    """KgCoOp's loss (arXiv:2303.13283, the authors' code): cross-entropy + weight (1 - mean over classes of cos(t, zero-shot))."""
    return F.cross_entropy(logits, labels) + weight * (1 - (unit(t) * unit(known)).sum(1).mean())


def prograd(
    logits: Tensor, labels: Tensor, known: Tensor, ctx: Tensor, strength: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """ProGrad's gradient (arXiv:2205.14865): of the cross-entropy, without what goes against the zero-shot logits' own."""
    apart = (
        -(F.softmax(known / temperature, -1) * F.log_softmax(logits / temperature, -1)).sum(1).mean() * temperature**2
    )
    (general,) = torch.autograd.grad(apart, ctx, retain_graph=True)
    (own,) = torch.autograd.grad(F.cross_entropy(logits, labels), ctx, retain_graph=True)
    along = general / general.norm()
    against = (own * along).sum()
    return own - strength * against * along if against < 0 else own


def cocoop(
    model: Any,
    say: Any,
    images: Tensor,
    names: Sequence[str],
    ctx: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> Tensor:
    """CoCoOp (arXiv:2203.05557): each image moves all context vectors by meta(f)."""
    rows = []
    for f in unit(model.encode_image(images)):
        moved = ctx + F.linear(F.relu(F.linear(f, w1, b1)), w2, b2)
        rows.append(compare(model, f[None], read(model, *learned(model, say, moved, names))))
    return torch.cat(rows)


def clip_adapter(model: Any, images: Tensor, t: Tensor, down: Tensor, up: Tensor, ratio: float = 0.2) -> Tensor:
    """CLIP-Adapter (arXiv:2110.04544, the authors' code): ratio relu(up relu(down f)) + (1 - ratio) f, f not normalised."""
    f = model.encode_image(images)
    return compare(model, ratio * F.relu(F.relu(f @ down.T) @ up.T) + (1 - ratio) * f, t)


def tip_adapter(
    model: Any, images: Tensor, t: Tensor, keys: Tensor, labels: Tensor, alpha: float, beta: float
) -> Tensor:
    """Tip-Adapter (arXiv:2207.09519): zero-shot logits + alpha exp(-beta (1 - f keys')) onehot(labels); keys as they are."""
    f = unit(model.encode_image(images))
    return compare(model, f, t) + alpha * (-beta * (1 - f @ keys.T)).exp() @ F.one_hot(labels, len(t)).to(f)


def task_residual(model: Any, images: Tensor, t: Tensor, x: Tensor, alpha: float = 0.5) -> Tensor:
    """TaskRes (arXiv:2211.10277): classes t + alpha x, normalised after that."""
    return compare(model, model.encode_image(images), t + alpha * x)


def ape_channels(
    t: Tensor, keys: Tensor, labels: Tensor, count: int, similar: float = 0.7, spread: float = 0.3
) -> Tensor:
    """APE's choice (arXiv:2304.01195): small products between classes, large variance between texts; as many shots for each class."""
    sets = torch.stack([torch.cat([t[c : c + 1], keys[labels == c]]) for c in range(len(t))])
    pairs = [a[:, None] * b[None] for i, a in enumerate(sets) for j, b in enumerate(sets) if i != j]
    return (spread * t.var(dim=0) - similar * torch.stack(pairs).mean((0, 1, 2))).topk(count).indices


def ape(
    model: Any,
    images: Tensor,
    t: Tensor,
    keys: Tensor,
    labels: Tensor,
    kept: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
) -> Tensor:
    """APE, training-free: Tip-Adapter's affinities on the kept channels, each shot weighed by how far text puts it from its class."""
    f, onehot = unit(model.encode_image(images)), F.one_hot(labels, len(t)).to(t)
    small_f, small_keys, small_t = (unit(x[:, kept]) for x in (f, keys, t))
    says = (small_keys @ small_t.T).softmax(1)
    apart = (onehot * torch.log2((onehot + 1e-6) / (says + 1e-6))).sum(1, keepdim=True)
    near = (-beta * (1 - small_f @ small_keys.T)).exp()
    return compare(model, f, t) + alpha * near @ (onehot * (gamma * apart).exp())


def ape_trained(
    model: Any, images: Tensor, t: Tensor, keys: Tensor, labels: Tensor, kept: Tensor, x: Tensor, scores: Tensor, alpha: float,
    beta: float,
) -> Tensor:  # fmt: skip
    """APE-T: x [C, kept] is added to a class's text and shots, which are not normalised again; each shot has a learned score."""
    f, t, keys = unit(model.encode_image(images)), t.clone(), keys.clone()
    t[:, kept] += x
    keys[:, kept] += x[labels]
    near = (-beta * (1 - f @ keys.T)).exp()
    return model.logit_scale.exp() * f @ t.T + alpha * near @ (F.one_hot(labels, len(t)).to(t) * scores[:, None])


def plot(
    model: Any, say: Any, images: Tensor, names: Sequence[str], ctx: Tensor, position: str = "end", eps: float = 0.1, rounds: int = 100,
    close: float = 1e-2,
) -> Tensor:  # fmt: skip
    """PLOT (arXiv:2210.01253): patches and several prompts (ctx [n, m, w]) matched by optimal transport; its plan has no gradient."""
    texts = torch.stack([unit(read(model, *learned(model, say, own, names, position))) for own in ctx])
    alike = torch.einsum("bmd,ncd->bcmn", unit(see(model, images)[:, 1:]), texts)
    kernel = torch.exp(-(1 - alike.detach()) / eps)
    r, c = torch.ones_like(kernel[..., :, 0]), torch.ones_like(kernel[..., 0, :])
    for _ in range(rounds):
        last, r = r, 1 / r.shape[-1] / (kernel @ c[..., None])[..., 0]
        c = 1 / c.shape[-1] / (kernel.mT @ r[..., None])[..., 0]
        if (r - last).abs().mean() < close:
            break
    return model.logit_scale.exp() * (r[..., None] * kernel * c[..., None, :] * alike).sum((-2, -1))


def vl_prompt(
    model: Any,
    say: Any,
    images: Tensor,
    names: Sequence[str],
    ctx: Tensor,
    text: Deep,
    first: Tensor | None,
    image: Deep,
) -> Tensor:
    """Independent prompts in both towers (MaPLe's IVLP, arXiv:2210.03117): in front of the first blocks and of deeper ones."""
    x, ids = learned(model, say, ctx, names)
    return compare(model, see(model, images, first, image)[:, 0], read(model, x, ids, text))


def maple(
    model: Any,
    say: Any,
    images: Tensor,
    names: Sequence[str],
    prompts: Sequence[Tensor],
    maps: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """MaPLe (arXiv:2210.03117): the image tower's prompt of each depth is a linear map of the text tower's."""
    seen = [F.linear(p, weight, bias) for p, (weight, bias) in zip(prompts, maps, strict=True)]
    deep = [dict(enumerate(ps[1:], 1)) for ps in (prompts, seen)]
    return vl_prompt(model, say, images, names, prompts[0], deep[0], seen[0], deep[1])


def upt_prompts(u: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """UPT's prompts (arXiv:2210.07225): a small transformer layer over those of both towers, u [2m, w]; one head."""
    q, k, v = F.linear(u, own["in_proj_weight"], own["in_proj_bias"]).chunk(3, dim=-1)
    mixed = (q @ k.T / math.sqrt(u.shape[1])).softmax(-1) @ v
    x = u + F.linear(mixed, own["out_proj.weight"], own["out_proj.bias"])
    x = F.layer_norm(x, x.shape[-1:], own["norm1.weight"], own["norm1.bias"])
    y = F.layer_norm(x, x.shape[-1:], own["norm2.weight"], own["norm2.bias"])
    y = F.relu(F.linear(y, own["linear1.weight"], own["linear1.bias"]))
    return x + F.linear(y, own["linear2.weight"], own["linear2.bias"])


def upt(model: Any, say: Any, images: Tensor, names: Sequence[str], u: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """UPT: its first half is the text's context, its second, mapped to the image tower's width, prompts there."""
    text, image = upt_prompts(u, own).chunk(2)
    first = F.linear(image, own["mlp.weight"], own["mlp.bias"])
    return vl_prompt(model, say, images, names, text, {}, first, {})


def tpt(
    logits: Callable[[Tensor], Tensor], ctx: Tensor, rate: float = 5e-3, share: float = 0.1, decay: float = 0.01
) -> Tensor:
    """TPT (arXiv:2209.07511): context after AdamW's first step against the entropy of the mean over the surest views of one image."""
    ctx = ctx.detach().requires_grad_()
    logs = logits(ctx).log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    mean = logs[entropy.argsort()[: int(len(logs) * share)]].exp().mean(0)
    (slope,) = torch.autograd.grad(-(mean * mean.log()).sum(), ctx)
    return (ctx * (1 - rate * decay) - rate * slope / (slope.abs() + 1e-8)).detach()


@torch.no_grad()
def lora(
    layers: Mapping[str, nn.MultiheadAttention], a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: float
) -> None:
    """LoRA on the fused queries, keys and values of attentions, in place; CLIP-LoRA's scale (arXiv:2405.18541) is alpha / sqrt(rank)."""
    for name, layer in layers.items():
        layer.in_proj_weight += scale * b[name] @ a[name]
