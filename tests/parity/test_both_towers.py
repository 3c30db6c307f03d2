"""Prompts in both towers: how they start, how many numbers they are, and which image towers take them (their formulas: test_vision_language)."""

from collections.abc import Sequence

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.contract.cases import TASK, bare, case, fresh, logits, relative
from vtzoo.errors import ShapeMismatch, UsageError
from vtzoo.graft import tensors_of
from vtzoo.live import attach, detach, extract, inject

NAMES = "abcde"


def texts(model: nn.Module, prompts: Sequence[Tensor], words: str) -> Tensor:
    """Text features [classes, width]: vectors in the place of the words' first tokens, and in front of the first blocks."""
    tower = model.text
    ids = model.tokenize([f"{words} {n}." for n in NAMES], context_length=20)
    count = len(prompts[0])
    x = tower.token_embedding(ids)
    x = (
        torch.cat([x[:, :1], prompts[0].expand(len(ids), -1, -1), x[:, 1 + count :]], dim=1)
        + tower.positional_embedding
    )
    for i, block in enumerate(tower.transformer.resblocks):
        if 0 < i < len(prompts):
            x = torch.cat([x[:, :1], prompts[i].expand(len(ids), -1, -1), x[:, 1 + count :]], dim=1)
        x = block(x, attn_mask=tower.attn_mask)
    x = tower.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ tower.text_projection
    return x / x.norm(dim=-1, keepdim=True)


NARROW = {"embed_dim": 32, "num_heads": 2}


def _dual(trunk: str, *, layers: int, **args: int) -> nn.Module:
    """A narrow dual encoder that knows two names."""
    text = {"width": 16, "heads": 2, "layers": layers, "context_length": 20}
    return timm.create_model("clip", trunk=trunk, trunk_args=args, embed_dim=20, text=text).speak(["a", "b"])


@torch.no_grad()
def test_starts() -> None:
    """The first text prompts are the words' embeddings, so that the text tower says at first what it would say without them."""
    for spec, method in (("maple[depth=1]", "maple"), ("vl-prompt[depth=1]", "vl_prompt")):
        model = fresh(spec, "dual")
        zero = texts(bare("dual"), [bare("dual").text.token_embedding.weight[[320, 1125]]], "a photo of a")
        weight = model.get_classifier().layer()[0] / model.logit_scale.exp()
        assert relative(zero, weight) < 1e-12
        deviation = float(getattr(fresh(f"{method.replace('_', '-')}[init=,tokens=9]", "dual"), method).prompts.std())
        assert 0.016 < deviation < 0.024


def test_couplings_start_as_linear_layers() -> None:
    """As in the authors' code: all couplings but the first are copies of one, uniform in +- 1 / sqrt(width)."""
    weight = inject(
        _dual("vit_base_patch32_clip_224", layers=3, img_size=32, patch_size=16, depth=3, **NARROW), "maple"
    ).maple.weight
    assert weight.shape == (3, 32, 16)
    assert torch.equal(weight[1], weight[2])
    assert not torch.equal(weight[0], weight[1])
    assert 0.24 < float(weight.detach().abs().max()) <= 0.25


W, V, L = 16, 32, 2  # widths of the text tower and the trunk, blocks
COUNTS = {
    "maple": L * 2 * W + L * (W + 1) * V,
    "maple[tokens=4,depth=1]": 4 * W + (W + 1) * V,
    "vl-prompt": L * (2 * W + 2 * V),
    "vl-prompt[tokens=1,vision=5,depth=1]": W + 5 * V,
    "upt": 2 * 4 * W + (4 * W * W + 4 * W) + 2 * 2 * W + 2 * (W * W + W) + (W + 1) * V,
}


@pytest.mark.parametrize("spec", sorted(COUNTS))
def test_counts(spec: str) -> None:
    """As many numbers as the papers' formulas say (MaPLe's on CLIP's ViT-B/16: 9 * 2 * 512 + 9 * 513 * 768)."""
    assert extract(fresh(spec, "dual")).size == COUNTS[spec]


@torch.no_grad()
def test_pooled_without_prompts(agree) -> None:
    """Where attention pools over all patches (SigLIP), it pools over patches alone: what became of prompts is dropped before."""
    model = (
        inject(_dual("vit_base_patch16_siglip_224", layers=2, img_size=32, depth=2, **NARROW), "maple").double().eval()
    )
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, shared = model(x), model.maple
    prompts = [shared.image(i) for i in range(2)]
    weight, _ = model.get_classifier().layer()
    detach(model)
    y = torch.cat([model.patch_embed(x) + model.pos_embed, prompts[0].expand(2, -1, -1)], dim=1)
    y = model.blocks[1](torch.cat([model.blocks[0](y)[:, :-2], prompts[1].expand(2, -1, -1)], dim=1))
    wanted = F.normalize(model.image_proj(model.attn_pool(model.norm(y)[:, :-2])), dim=-1) @ weight.T
    agree("maple", "rewrite, siglip", attached=relative(wanted, found))


@pytest.mark.parametrize("spec", ["maple", "upt", "vl-prompt"])
def test_without_the_text_tower(spec: str) -> None:
    """An image tower alone computes the same, holds its own prompts and nothing of the text tower's width; a delta that lacks a tensor is refused."""
    made = case(spec, "dual")
    model = attach(bare("dual", text=False), made.delta, check=False)
    assert relative(made.live, logits(model, made.x)) < 1e-12
    assert [n.rpartition(".")[2] for n in tensors_of(model)] == ["ready"]
    again = attach(bare("dual", text=False), extract(model, tasks=[TASK]), check=False)
    assert torch.equal(logits(again, made.x), logits(model, made.x))
    first = min(n for n in made.delta.tensors if not n.startswith("@"))
    lacking = made.delta.with_(tensors={n: t for n, t in made.delta.tensors.items() if n != first})
    with pytest.raises(ShapeMismatch):
        attach(bare("dual", text=False), lacking, check=False)


def test_rotary_positions_leave_prompts_alone() -> None:
    """EVA's attentions count prompts among the tokens that they don't rotate, in every block, for as long as these are there."""
    model = _dual("eva02_base_patch16_clip_224", layers=3, img_size=32, depth=3, **NARROW)
    before = [b.attn.num_prefix_tokens for b in model.blocks]
    inject(model, "vl-prompt[vision=3,depth=2]")
    assert [b.attn.num_prefix_tokens for b in model.blocks] == [n + 3 for n in before]
    assert {s.name for s in extract(model).parts[0].sites if s.facts["role"] == "pass"} == {"blocks.0", "blocks.2"}
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    detach(model)
    assert [b.attn.num_prefix_tokens for b in model.blocks] == before


def test_more_vectors_than_words() -> None:
    """Words that are too few for the vectors that shall start from them are refused."""
    with pytest.raises(UsageError, match="tokens=5, and 'a photo of a' has 4"):
        inject(bare("dual"), "maple[tokens=5]")


@pytest.mark.parametrize(
    ("trunk", "args"), [("test_resnet", {}), ("beit_base_patch16_224", {"img_size": 32, "depth": 1, **NARROW})]
)
def test_trunks_that_take_no_tokens(trunk: str, args: dict[str, int]) -> None:
    """Where the image tower has no sequence, or one of a fixed length, prompts beside the patches are refused, and why."""
    model = _dual(trunk, layers=1, **args)
    for method in ("maple", "upt", "vl-prompt"):
        with pytest.raises(UsageError, match=f"{method} puts tokens beside the patches"):
            inject(model, method)


@pytest.mark.parametrize("second", ["vpt-deep", "gated-vpt", "vpt-shallow"])
def test_prompts_behind_those_of_both_towers_are_refused(second: str) -> None:
    """They would stand in the places of the others; the other way round each has its own."""
    with pytest.raises(UsageError, match=f"{second} would put its prompts in the places of maple's"):
        inject(bare("dual"), f"maple+{second}")
    assert inject(bare("dual"), "vpt-deep+maple")(torch.zeros(1, 3, 24, 32, dtype=torch.float64)).shape == (1, 5)
