"""graft.py: hanging children on live modules and taking them off."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.errors import UsageError
from vtzoo.graft import (
    Before,
    Graft,
    freeze_statistics,
    graft,
    grafts,
    hosts,
    own_parameters,
    prune,
    stored,
    tensors_of,
    watching,
)


class Scale(Graft):
    """Multiplies what the host gives by `by`; in weight space if told so."""

    edits = ("weight", "bias")

    def __init__(self, by: float, *, calls: bool = True) -> None:
        super().__init__()
        self.by, self.calls = nn.Parameter(torch.tensor(by, dtype=torch.float64)), calls

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Scale the output."""
        return y * self.by

    def read(self, name: str, before: Before) -> Tensor:
        """Scale the parameter."""
        return before[name] * self.by


class Shift(Graft):
    """Adds `by` to the input and twice the input that it was given to the output."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by, dtype=torch.float64))

    def enter(self, x: Tensor) -> Tensor:
        """Shift."""
        return x + self.by

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Remember."""
        return y + 2 * x.sum(-1, keepdim=True)


class Reads(nn.Module):
    """Reads its linear's weight and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """As BEiT's attention does."""
        return F.linear(x, self.inner.weight, self.inner.bias)


def _linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def test_grafts_nest_in_the_order_written() -> None:
    """The first graft is innermost: call(i) = leave_i(x, call(i-1, enter_i(x)))."""
    host = _linear()
    f = copy.deepcopy(host)
    graft(host, "a", Shift(0.5))
    graft(host, "b", Scale(3.0))
    graft(host, "c", Shift(0.25))
    shifted = X + 0.25
    wanted = 3.0 * (f(shifted + 0.5) + 2 * shifted.sum(-1, keepdim=True)) + 2 * X.sum(-1, keepdim=True)
    assert torch.allclose(host(X), wanted)
    assert [type(g) for g in grafts(host)] == [Shift, Scale, Shift]


def test_prune_gives_the_class_back() -> None:
    """After prune the host is of its own class, with its own attributes, and gives its own output."""
    host = _linear()
    before, attributes = host(X), sorted(host.__dict__)
    graft(host, "a", Scale(3.0))
    assert type(host) is not nn.Linear
    assert isinstance(host, nn.Linear)
    prune(host)
    assert type(host) is nn.Linear
    assert sorted(host.__dict__) == attributes
    assert torch.equal(host(X), before)


def test_read_graft_reaches_who_only_reads() -> None:
    """A graft in weight space acts where the parameter is read; stored() still gives the bits of the base."""
    model = Reads().double()
    before, weight = model(X), model.inner.weight.detach().clone()
    graft(model.inner, "a", Scale(3.0, calls=False))
    assert torch.allclose(model(X), 3 * before)
    assert torch.equal(stored(model.inner, "weight"), weight)
    assert torch.equal(own_parameters(model.inner)["weight"], weight)
    assert torch.equal(model.state_dict()["inner.weight"], weight)


def test_called_graft_is_read_too_under_a_read_one() -> None:
    """Under a graft that is read, an earlier one is read as well, so that what runs is what folds."""
    host = _linear()
    f = copy.deepcopy(host)
    graft(host, "a", Scale(3.0))
    graft(host, "b", Scale(2.0, calls=False))
    assert not any(g.calls for g in grafts(host))
    assert torch.allclose(host(X), 6 * f(X))


def test_before_tells_base_from_earlier_parts() -> None:
    """A graft sees the value before it, and the backbone's own under .base()."""
    seen = {}

    class Look(Scale):
        def read(self, name: str, before: Before) -> Tensor:
            seen[name] = (before[name], before.base(name))
            return before[name]

    host = _linear()
    graft(host, "a", Scale(3.0, calls=False))
    graft(host, "b", Look(1.0, calls=False))
    host(X)
    now, base = seen["weight"]
    assert torch.allclose(now, 3 * base)
    assert torch.equal(base, stored(host, "weight"))


def test_containers_are_refused() -> None:
    """A Sequential would run the graft as a layer."""
    with pytest.raises(UsageError, match="Sequential"):
        graft(nn.Sequential(nn.Linear(3, 2)), "a", Scale(1.0))


def test_taken_name_is_refused() -> None:
    """A graft never hides an attribute of the host."""
    host = _linear()
    with pytest.raises(UsageError, match="weight"):
        graft(host, "weight", Scale(1.0))
    assert not grafts(host)
    assert type(host) is nn.Linear


def test_tensors_are_named_by_site_and_graft() -> None:
    """tensors_of names what grafts own `<site>.<graft>.<param>`, hosts lists their sites."""
    model = Reads().double()
    graft(model.inner, "a", Scale(3.0, calls=False))
    graft(model, "b", Shift(1.0))
    assert sorted(tensors_of(model)) == ["b.by", "inner.a.by"]
    assert sorted(n for n, _ in hosts(model)) == ["", "inner"]


def test_watching_sees_who_acts() -> None:
    """Inside the block every graft that runs or is read is noted; one that does neither is not."""
    model = Reads().double()
    called, read = Scale(1.0), Scale(1.0, calls=False)
    other = nn.Linear(3, 2).double()
    graft(other, "a", called)
    graft(model.inner, "a", read)
    with watching() as seen:
        model(X)
    assert seen == {id(read)}
    with watching() as seen:
        other(X)
    assert seen == {id(called)}


def test_grafted_host_pickles() -> None:
    """The class made on the fly survives pickle and deepcopy."""
    host = _linear()
    graft(host, "a", Scale(3.0, calls=False))
    for other in (pickle.loads(pickle.dumps(host)), copy.deepcopy(host)):
        assert torch.equal(other(X), host(X))
        prune(other)
        assert type(other) is nn.Linear
    assert len(grafts(host)) == 1


def test_bind_and_release_come_in_pairs() -> None:
    """A graft that changes an attribute of the host puts it back when it is taken off."""

    class Count(Shift):
        def bind(self, host: nn.Module) -> None:
            host.count += 1

        def release(self, host: nn.Module) -> None:
            host.count -= 1

    host = _linear()
    host.count = 4
    graft(host, "a", Count(1.0))
    graft(host, "b", Count(1.0))
    assert host.count == 6
    prune(host)
    assert host.count == 4


def test_frozen_statistics_ignore_training_mode() -> None:
    """A frozen BatchNorm stays in evaluation mode under train() until it is let go."""
    norm = nn.BatchNorm1d(3)
    freeze_statistics(norm)
    norm.train()
    norm(torch.randn(8, 3))
    assert not norm.training
    assert not norm.running_mean.any()
    freeze_statistics(norm, frozen=False)
    assert type(norm) is nn.BatchNorm1d
    assert norm.train().training
