"""Attention without the fused kernel: the same numbers, where it pays, and nothing else touched."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile

from vtzoo import attention, lean
from vtzoo.attention import AT_ONCE, LARGEST, PlainAttention
from vtzoo.fit import Plan, stepper
from vtzoo.recipe import Recipe

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value of two heads of 8."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(3, 2, tokens, 8, generator=generator).to(dtype) for _ in range(3)]


def ran(function: Any) -> set[str]:
    """Names of the operators that ran."""
    with profile() as seen:
        function()
    return {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("mask", ["none", "added", "boolean"])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_it_computes_attention(mask: str, scale: float | None) -> None:
    """Within bf16's precision of the exact result, masked and scaled or not."""
    query, key, value = inputs(11, torch.bfloat16)
    hidden = torch.rand(11, 11, generator=torch.Generator().manual_seed(1)) < 0.3
    hidden[3] = mask == "boolean"  # a query that may look nowhere
    masks = {"none": None, "added": hidden.to(torch.bfloat16) * -3, "boolean": ~hidden}
    exact = None if masks[mask] is None else masks[mask].double() if mask == "added" else masks[mask]
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), exact, scale=scale)
    with PlainAttention():
        found = F.scaled_dot_product_attention(query, key, value, masks[mask], scale=scale)
        named = F.scaled_dot_product_attention(query, key, value, attn_mask=masks[mask], scale=scale)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, named)
    assert (found.double() - expected).abs().max() < 0.03


def test_what_is_not_finite_stays_so() -> None:
    """A mask hides positions, not a training that has gone astray."""
    query, key, value = inputs(11, torch.bfloat16)
    query[0, 0, 0, 0] = torch.nan
    with PlainAttention():
        found = F.scaled_dot_product_attention(query, key, value, torch.ones(11, 11, dtype=torch.bool))
    assert found[0, 0, 0].isnan().all()


@pytest.mark.parametrize(
    ("tokens", "dtype", "options"),
    [
        (11, torch.float32, {}),
        (math.isqrt(AT_ONCE) + 1, torch.bfloat16, {}),
        (math.isqrt(LARGEST) + 1, torch.bfloat16, {"attn_mask": "zeros"}),
        (11, torch.bfloat16, {"is_causal": True}),
        (11, torch.bfloat16, {"enable_gqa": True}),
    ],
)
def test_the_rest_stays_as_it_is(tokens: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """fp32, long sequences and options that it doesn't know go to torch, bit for bit."""
    query, key, value = inputs(tokens, dtype)
    if "attn_mask" in options:
        options = {"attn_mask": torch.zeros(tokens, tokens, dtype=dtype)}
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    with PlainAttention():
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, **options), expected)


def test_few_queries_of_many_tokens_count_as_short() -> None:
    """What counts is the matrix: 4 queries of 1,000 tokens run no fused kernel."""
    query, (_, key, value) = inputs(4, torch.bfloat16)[0], inputs(1000, torch.bfloat16)

    def attend() -> None:
        with PlainAttention():
            F.scaled_dot_product_attention(query, key, value)

    assert FUSED not in ran(attend)


@pytest.mark.parametrize("masked", [False, True])
def test_keys_with_an_offset_lose_nothing(masked: bool) -> None:
    """Scores of 300 that differ by 10, as some blocks of DINOv2 have: as near to the exact result as the fused kernel, and its gradients."""
    query, key, value = inputs(50, torch.bfloat16)
    given = [t.requires_grad_() for t in (query * 4 + 8, key + 20, value)]
    mask = torch.zeros(50, 50, dtype=torch.bfloat16) if masked else None

    def wrong() -> list[float]:
        """Of the result and the three gradients, relative to float64's."""
        found = F.scaled_dot_product_attention(*given, mask)
        ours = [found, *torch.autograd.grad(found.float().square().sum(), given)]
        wide = [t.detach().double().requires_grad_() for t in given]
        exact = F.scaled_dot_product_attention(*wide)
        theirs = [exact, *torch.autograd.grad(exact.square().sum(), wide)]
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]

    fused = wrong()
    with PlainAttention():
        own = wrong()
    assert all(o < 2 * f + 0.01 for o, f in zip(own, fused, strict=True)), (own, fused)


def test_odd_shapes_are_answered_as_torch_does() -> None:
    """Values for all images alike, no queries, no keys, a scale of nothing, no images, types that differ."""
    query, key, value = inputs(9, torch.bfloat16)
    cases: list[tuple[Tensor, Tensor, Tensor, dict[str, float]]] = [
        (query, key, value[:1], {}), (query, key, value[0], {}), (query[:, :, :0], key, value, {}), (query, key[:, :, :0], value[:, :, :0], {}),
        (query, key, value, {"scale": 0.0}), (query[:0], key[:0], value[:0], {}), (query[:1], key, value, {}),
    ]  # fmt: skip
    for *given, options in cases:
        expected = F.scaled_dot_product_attention(*given, **options)
        with PlainAttention():
            found = F.scaled_dot_product_attention(*given, **options)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=0.02, equal_nan=True)
    with PlainAttention(), pytest.raises(RuntimeError, match="same dtype"):
        F.scaled_dot_product_attention(query, key.float(), value)


@pytest.mark.parametrize("at_once", [AT_ONCE, 2 * 11 * 7], ids=["all heads", "two heads at a time"])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_gradients_are_those_of_attention(scale: float | None, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within bf16's precision of float64's; 3 images of 3 heads, more keys than queries, views of one tensor that is read otherwise, too."""
    monkeypatch.setattr(attention, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(3, 11, 2, 3, 8, generator=generator).to(torch.bfloat16).requires_grad_()
    query = torch.randn(3, 7, 3, 8, generator=generator).to(torch.bfloat16).requires_grad_()
    into = torch.randn(3, 3, 7, 8, generator=generator).to(torch.bfloat16)

    def attend(query: Tensor, both: Tensor) -> Tensor:
        key, value = both.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, scale=scale)

    with PlainAttention():
        found = attend(query, both)
    exact = attend(query.double(), both.double())
    assert (found.double() - exact).abs().max() < 0.03
    for ours, expected in zip(
        torch.autograd.grad(found, (query, both), into),
        torch.autograd.grad(exact, (query, both), into.double()),
        strict=True,
    ):
        assert (ours.double() - expected.double()).norm() < 0.02 * expected.double().norm()


def test_no_matrix_is_kept() -> None:
    """Of 200 tokens nothing is saved but query, key and value; where gradients of gradients are wanted, all that they need."""
    inputs_ = [t.requires_grad_() for t in inputs(200, torch.bfloat16)]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with PlainAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = F.scaled_dot_product_attention(*inputs_)
        assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in inputs_)
        with lean.off():
            twice = F.scaled_dot_product_attention(*inputs_)
    assert torch.allclose(found, twice, atol=0.01)
    (first,) = torch.autograd.grad(twice.float().sum(), inputs_[0], create_graph=True)
    assert torch.autograd.grad(first.float().square().sum(), inputs_[1])[0].isfinite().all()


@pytest.mark.parametrize(("precision", "fused"), [("bf16", False), ("fp32", True)])
def test_training_uses_it(precision: str, fused: bool) -> None:
    """A step of a ViT in bf16 runs no fused kernel, forward or backward; in fp32 it does."""
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    plan = Plan(
        model=model, loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), steps=1,
        batches=lambda *_: [(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]))],
        recipe=Recipe(epochs=1, lr=0.01, weight_decay=0.0, precision=precision, device="cpu"),
    )  # fmt: skip
    (batch,) = plan.batches(0, 0)
    step = stepper(plan)
    seen = ran(lambda: step(batch))
    assert ({FUSED, f"{FUSED}_backward"} <= seen) == fused
    assert (FUSED in seen) == fused
