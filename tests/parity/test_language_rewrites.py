"""What the papers' formulas come to where the answer is known: so that a rewrite is more than a second opinion."""

import pytest
import torch
from torch import nn

from tests.contract.cases import relative
from tests.parity import language_rewrites as r
from tests.parity.clip_case import CONFIGS, EYE, JOINT, NAMES, TEMPLATE, WIDTH, images, made, random, say

WORDS = {"end": "a photo of a {}.", "middle": "a photo {} of a.", "front": "{} a photo of a."}


@pytest.fixture(scope="module")
def t():
    """Zero-shot classes."""
    return r.class_features(made(), say, NAMES, [TEMPLATE])


@pytest.fixture(scope="module")
def words():
    """The vectors of "a photo of a"."""
    return r.embed(made(), say(["a photo of a"]))[0, 1:5]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_towers(kind: str) -> None:
    """Without prompts both towers and the logits are what open_clip gives."""
    model, ids = made(kind), say(list(NAMES))
    assert relative(model.encode_image(images()), r.see(model, images())[:, 0]) < 1e-12
    assert relative(model.encode_text(ids), r.read(model, r.embed(model, ids), ids)) < 1e-12
    assert relative(model.get_logits(images(), ids)[0], r.zero_shot(model, say, images(), NAMES, ["{}"])) < 1e-12


@pytest.mark.parametrize("position", sorted(WORDS))
def test_context_of_words(position: str, words) -> None:
    """Context that is the vectors of words gives the logits of those words; so does each class's own copy of it."""
    wanted = r.zero_shot(made(), say, images(), NAMES, [WORDS[position]])
    for ctx in (words, words.expand(len(NAMES), -1, -1)):
        assert relative(wanted, r.coop(made(), say, images(), NAMES, ctx, position)) < 1e-12
    assert relative(wanted, r.coop(made(), say, images(), NAMES, words + random(4, WIDTH, scale=0.1), position)) > 1e-3


def test_images_that_say_nothing(words) -> None:
    """CoCoOp whose second layer is zero is CoOp."""
    w1, b1 = random(3, JOINT), random(3)
    for end, differs in ((torch.zeros(WIDTH, 3).double(), False), (random(WIDTH, 3), True)):
        found = r.cocoop(made(), say, images(), NAMES, words, w1, b1, end, torch.zeros(WIDTH).double())
        assert (relative(r.coop(made(), say, images(), NAMES, words), found) > 1e-3) is differs


def test_loss_without_distance(t) -> None:
    """KgCoOp's loss is the cross-entropy where the texts are the known ones, and grows by the weight at right angles."""
    logits, labels = random(3, len(NAMES)), torch.tensor([0, 2, 1])
    plain = r.kgcoop(logits, labels, 3 * t, t, 8.0)
    assert abs(plain - nn.functional.cross_entropy(logits, labels)) < 1e-12
    across = torch.linalg.qr(random(8, 8)).Q
    assert abs(r.kgcoop(logits, labels, across[:4], across[4:], 8.0) - plain - 8) < 1e-12


def test_gradients_that_agree_and_disagree(words) -> None:
    """ProGrad's gradient is the own one beside a teacher of the labels, and at right angles to a contrary teacher's."""
    ctx = words.clone().requires_grad_()
    logits = r.coop(made(), say, images(), NAMES, ctx)
    labels, other = logits.topk(2).indices.T
    right, wrong = (50 * nn.functional.one_hot(c, len(NAMES)).double() for c in (labels, other))
    own, away = (
        torch.autograd.grad(nn.functional.cross_entropy(logits, c), ctx, retain_graph=True)[0] for c in (labels, other)
    )
    assert relative(own, r.prograd(logits, labels, right, ctx)) < 1e-12
    assert (own * away).sum() < 0
    found = r.prograd(logits, labels, wrong, ctx)
    assert abs((found * away).sum()) < 1e-12 * own.norm() * away.norm()
    assert relative(own, found) > 1e-3


def test_features_left_alone(t) -> None:
    """Zero-shot is what adapters without a share, caches without a weight and residuals of zero give; APE may be Tip-Adapter."""
    model, labels = made(), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    keys = r.unit(random(8, JOINT))
    wanted = r.zero_shot(model, say, images(), NAMES, [TEMPLATE])
    assert relative(wanted, r.clip_adapter(model, images(), t, random(6, JOINT), random(JOINT, 6), 0.0)) < 1e-12
    assert relative(wanted, r.tip_adapter(model, images(), t, keys, labels, 0.0, 5.5)) < 1e-12
    assert relative(wanted, r.task_residual(model, images(), t, torch.zeros_like(t))) < 1e-12
    tip = r.tip_adapter(model, images(), t, keys, labels, 1.0, 5.5)
    assert relative(tip, r.ape(model, images(), t, keys, labels, torch.arange(JOINT), 1.0, 5.5, 0.0)) < 1e-12
    kept = r.ape_channels(t, keys, labels, 9)
    start = r.ape_trained(model, images(), t, keys, labels, kept, t.new_zeros(4, 9), t.new_ones(8), 1.0, 5.5)
    assert relative(tip, start) < 1e-12
    assert len(set(kept.tolist())) == 9
    assert relative(tip, r.ape(model, images(), t, keys, labels, kept, 1.0, 5.5, 0.1)) > 1e-3


def test_one_prompt_is_matched_with_all_patches() -> None:
    """PLOT with one prompt is the mean of the patches' cosines; with two the same, its mean with itself."""
    model, ctx = made(), random(1, 3, WIDTH)
    text = r.unit(r.read(model, *r.learned(model, say, ctx[0], NAMES)))
    wanted = model.logit_scale.exp() * (r.unit(r.see(model, images())[:, 1:]) @ text.T).mean(1)
    assert relative(wanted, r.plot(model, say, images(), NAMES, ctx)) < 1e-12
    assert relative(wanted, r.plot(model, say, images(), NAMES, ctx.repeat(2, 1, 1))) < 1e-12
    assert relative(wanted, r.plot(model, say, images(), NAMES, random(2, 3, WIDTH))) > 1e-3


def test_deep_prompts_that_were_there(words) -> None:
    """A deep text prompt that is what the context had become changes nothing: under the causal mask it is the same for every class."""
    model = made()
    x = r.learned(model, say, words, NAMES)[0] + model.positional_embedding
    for block in model.transformer.resblocks[:2]:
        x = block(x, attn_mask=model.attn_mask)
    assert relative(x[0, 1:5], x[3, 1:5]) < 1e-12
    wanted = r.coop(model, say, images(), NAMES, words)
    assert relative(wanted, r.vl_prompt(model, say, images(), NAMES, words, {2: x[0, 1:5]}, None, {})) < 1e-12
    assert (
        relative(wanted, r.vl_prompt(model, say, images(), NAMES, words, {2: x[0, 1:5] + random(4, WIDTH)}, None, {}))
        > 1e-3
    )


def test_image_prompts_have_no_place(words) -> None:
    """Prompts in the image tower give the same in any order, in front of the first block and of deeper ones."""
    model, prompts = made(), random(2, 3, EYE)
    one, other = (
        r.vl_prompt(model, say, images(), NAMES, words, {}, p[0], {1: p[1]}) for p in (prompts, prompts.flip(1))
    )
    assert relative(one, other) < 1e-12
    assert relative(one, r.coop(model, say, images(), NAMES, words)) > 1e-3


@torch.no_grad()
def test_upt_is_a_transformer_layer() -> None:
    """UPT's map of prompts is PyTorch's attention, norms and linears in the authors' order."""
    mix, norms = nn.MultiheadAttention(WIDTH, 1, batch_first=True), [nn.LayerNorm(WIDTH) for _ in range(2)]
    own = nn.ModuleDict(
        {"norm1": norms[0], "norm2": norms[1], "linear1": nn.Linear(WIDTH, WIDTH), "linear2": nn.Linear(WIDTH, WIDTH)}
    )
    state = {n: random(*v.shape, seed=i) for i, (n, v) in enumerate((mix.state_dict() | own.state_dict()).items())}
    mix.double().load_state_dict(state, strict=False)
    own.double().load_state_dict(state, strict=False)
    u = random(6, WIDTH, seed=99)
    x = own["norm1"](u + mix(u[None], u[None], u[None])[0][0])
    wanted = x + own["linear2"](torch.relu(own["linear1"](own["norm2"](x))))
    assert relative(wanted, r.upt_prompts(u, state)) < 1e-12


def test_tpt_is_a_step_of_adamw(words) -> None:
    """TPT's context is PyTorch's AdamW after a step on the entropy of the surest views' mean."""
    views, model = images(20), made()
    ctx = nn.Parameter(words.clone())
    probable = r.coop(model, say, views, NAMES, ctx).softmax(-1)
    sure = torch.distributions.Categorical(probable).entropy().sort().indices[:2]
    torch.distributions.Categorical(probable[sure].mean(0)).entropy().backward()
    torch.optim.AdamW([ctx], lr=5e-3).step()
    found = r.tpt(lambda c: r.coop(model, say, views, NAMES, c), words)
    assert relative(words, found) > 1e-3
    assert (found - ctx).abs().max() < 1e-9  # AdamW's root is taken of numbers near its 1e-8
