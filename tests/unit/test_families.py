"""The tiny backbones that the tests stand on."""

import pytest
import torch

from tests import families


@pytest.mark.parametrize("family", families.names())
def test_build_is_fresh_and_repeatable(family: str) -> None:
    """Two builds have the same bits and share no tensor; changing one leaves the other, and the next, alone."""
    one, two = families.build(family), families.build(family)
    x = families.batch(family)
    with torch.no_grad():
        y = one(x)
        assert torch.equal(y, two(x))
        places = {t.data_ptr() for t in one.state_dict().values()}
        assert not places & {t.data_ptr() for t in two.state_dict().values() if t.numel()}
        assert not {id(m) for m in one.modules()} & {id(m) for m in two.modules()}
        for value in one.parameters():
            value.zero_()
        one.train()
        assert torch.equal(y, two(x))
        assert torch.equal(y, families.build(family)(x))


@pytest.mark.parametrize("family", families.names())
def test_nothing_is_at_its_start(family: str) -> None:
    """No parameter is all zeros or all ones, images and classes make a difference, and other seeds other nets."""
    model = families.build(family)
    assert all(p.unique().numel() > 1 or p.numel() == 1 for p in model.parameters())
    assert all(b.unique().numel() > 1 for n, b in model.named_buffers() if "running" in n)
    with torch.no_grad():
        y = model(families.batch(family))
        assert not torch.allclose(y[0], y[1], rtol=1e-3)
        assert not torch.allclose(y, families.build(family, seed=1)(families.batch(family)), rtol=1e-3)


@pytest.mark.parametrize("family", families.names())
def test_deeper_and_larger_differ_as_said(family: str) -> None:
    """The deeper net has more parameters; the larger takes larger images, with the same weights where shapes agree."""
    facts = families.FAMILIES[family]
    small, deep = families.build(family), families.build(family, **facts.deeper)
    assert sum(p.numel() for p in deep.parameters()) > sum(p.numel() for p in small.parameters())
    if facts.larger:
        large = families.build(family, **facts.larger).state_dict()
        same = {n: t for n, t in small.state_dict().items() if t.is_floating_point() and t.shape == large[n].shape}
        assert len(same) > len(large) / 2
        assert all(
            torch.equal(t, large[n])
            for n, t in same.items()
            if "running" not in n and n in dict(small.named_parameters())
        )
