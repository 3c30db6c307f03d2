"""The frozen prefix: the rest on its features is the whole network, and where that can't be there is no cut."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vtzoo
from tests import families
from vtzoo import data as D
from vtzoo import prefix
from vtzoo.spec import Preprocess


def size(name: str) -> tuple[int, ...]:
    """Of a family's images."""
    return (3, *families.FAMILIES[name].size)


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of everything that is trained."""
    model.zero_grad()
    F.cross_entropy(run(), torch.arange(2)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("method", ["linear", "partial"])
@pytest.mark.parametrize("name", families.names())
def test_the_rest_on_features_is_the_network(name: str, method: str) -> None:
    """Logits and gradients of every family are the network's own, bit for bit, and most of it need not run."""
    still = {"drop_path_rate": 0.0} if "swin" in name else {}  # Swin's blocks are left out at random by default
    model = vtzoo.inject(families.build(name, **still), method).train()
    found = prefix.find(model, size(name))
    assert found is not None
    assert prefix.share(model, found) > (0.3 if method == "linear" else 0.03)
    x = families.batch(name)
    features = found.features(model, x)
    assert features.shape == (len(x), *found.shape)
    whole, rest = (gradients(model, run) for run in (lambda: model(x), lambda: found.rest(model, features.clone())))
    assert whole.keys() == rest.keys()
    assert all(torch.equal(whole[n], rest[n]) for n in whole)
    assert torch.equal(model.eval()(x), found.rest(model, features.clone()))
    assert not [n for n, m in model.named_modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("spec", ["pixel-prompt", "vpt-shallow", "full"])
def test_what_acts_on_the_pixels_leaves_nothing_before_it(spec: str) -> None:
    """A method that changes the input, the tokens or everything has no frozen prefix."""
    model = vtzoo.inject(families.build("vit"), spec)
    found = prefix.find(model, size("vit"))
    assert found is None or prefix.share(model, found) < 0.2


def test_late_sites_cut_late() -> None:
    """Sites in the last block leave all blocks before it out, whether the method's layers are called or read."""
    for name in ("vit", "beit"):
        model = vtzoo.inject(families.build(name), "lora[rank=2,targets=blocks.1.*]")
        found = prefix.find(model, size(name))
        assert found is not None
        assert found.cut == "blocks.1"
        assert "blocks.0" in found.stubs


def test_what_is_not_worth_while_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too little lies before the first change, one forward pass is all that is spent."""
    model = vtzoo.inject(families.build("vit"), "bitfit")
    runs = list[int]()
    monkeypatch.setattr(
        type(model), "forward", lambda self, x: (runs.append(1), self.head(self.forward_features(x)[:, 0]))[1]
    )
    assert prefix.find(model, size("vit"), least=0.1) is None
    assert runs == [1]
    assert prefix.find(vtzoo.inject(families.build("vit"), "linear"), size("vit"), least=0.1) is not None


def test_views_travel_to_other_processes() -> None:
    """Their transforms can be pickled, as workers of a loader want it."""
    for augment in ("none", "flip", "crop"):
        views = D.Views(augment, 0, 2)  # type: ignore[arg-type] - one of its words
        for view in range(views.count):
            assert pickle.loads(pickle.dumps(views.transform(Preprocess(input_size=(3, 32, 32)), view)[0]))


class Around(nn.Module):
    """A network whose last layer sees what goes around the one before it."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.stem, self.drop, self.side, self.head = (
            nn.Linear(12, 8),
            nn.Dropout(drop),
            nn.Linear(12, 8),
            nn.Linear(8, 2),
        )
        for part in (self.stem, self.side):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = x.flatten(1)
        return self.head(self.drop(self.stem(x))) + self.head.bias * self.side(x).sum(1, keepdim=True)


def test_a_way_around_the_cut_is_noticed() -> None:
    """Where the features don't hold all that the rest needs, there is no cut, however the modules are ordered."""
    assert prefix.find(Around(), (3, 2, 2)) is None


@pytest.mark.parametrize(("drop", "cut"), [(0.0, "head"), (0.5, "drop")])
def test_what_is_random_in_training_is_not_kept(drop: float, cut: str) -> None:
    """Dropout that draws anew in each step stays behind the cut."""

    class Straight(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.drop(self.stem(x.flatten(1))))

    found = prefix.find(Straight(drop), (3, 2, 2))
    assert found is not None
    assert found.cut == cut


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_blocks_left_out_at_random_are_not_kept(name: str) -> None:
    """Stochastic depth makes another network of each step, so that nothing from there on is kept."""
    model = vtzoo.inject(families.build(name, drop_path_rate=0.5), "linear")
    found = prefix.find(model, size(name))
    assert found is None or not any("layers" in n for n in found.stubs)


def test_finding_it_changes_nothing() -> None:
    """Modes, weights, random state and hooks are afterwards what they were."""
    model = vtzoo.inject(families.build("efficientnet"), "linear").train()
    modes = {n: m.training for n, m in model.named_modules()}
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    prefix.find(model, size("efficientnet"))
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("augment", "most", "area"), [("none", 0, 0), ("flip", 0, 0), ("flip", 3, 0), ("crop", 2, 0.05), ("strong", 3, 0)]
)
def test_views_are_what_the_loader_shows(augment: D.Augment, most: int, area: float) -> None:
    """The view that an epoch is said to see of an image is the one that its loader gives, and no other."""
    images, shape = D.open_data("vtzoo:fashion", split="val"), Preprocess(input_size=(3, 32, 32))
    images, views = images.limit(8), D.Views(augment, 5, most, area)
    own: list[list[Tensor]] = []
    for view in range(views.count):
        transform, seed = views.transform(shape, view)
        own.append([x for x, _ in D.Seeded(images, transform, seed)])  # type: ignore[attr-defined] - indexable
    seen = set[int]()
    for epoch in range(4):
        transform = D.transforms(shape, train=True, augment=augment, crop_area=area)
        loader = D.loader(images, transform, batch_size=3, seed=5, epoch=epoch, views=most)
        shown = torch.cat([x for x, _ in loader])
        for x, index in zip(shown, D.order(len(images), 5, epoch), strict=True):
            assert torch.equal(x, own[views(epoch, index)][index])
            seen.add(views(epoch, index))
    assert seen == set(range(views.count))
