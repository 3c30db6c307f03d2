"""Views of images: pure functions of the images, a place and a number."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from vtzoo._images import Images
from vtzoo.crops import Crops, Rendered, labels_of, normalised, rendered
from vtzoo.spec import Preprocess

SIZE = (90, 60)


def _images(count: int = 6, mark: str = "a", labels: Sequence[int] | None = None) -> Images:
    """Smooth pictures, each of another colour gradient."""

    def load(name: str) -> Image.Image:
        i = int(name[1:])
        x, y = np.meshgrid(np.linspace(0, 255, SIZE[0]), np.linspace(0, 255, SIZE[1]))
        return Image.fromarray(np.stack([x, y, np.full_like(x, 40 * i)], -1).astype(np.uint8))

    paths = tuple(f"{mark}{i}" for i in range(count))
    return Images(
        ("cat", "dog", "cow"),
        paths,
        tuple(labels or [i % 3 for i in range(count)]),
        identity=lambda names: names,
        load=load,
    )


def test_a_view_is_a_function_of_images_place_and_number() -> None:
    """Asked again, in another order and one by one, it is the same; another number, place or set of images gives another part."""
    images, crops = _images(), Crops()
    at_once = rendered(images, crops, 3, [0, 2, 5], (16, 16))
    assert torch.equal(at_once.flip(0), rendered(_images(), crops, 3, [5, 2, 0], (16, 16)))
    parts = {crops.part(i, v, n, SIZE) for i in (images, _images(mark="b")) for v in range(3) for n in range(4)}
    assert len(parts) == 24


def test_both_sides_see_the_same_part() -> None:
    """At half the size a view is the larger one made smaller, whatever the shape."""
    sizes = [(64, 48), (32, 24)]
    for large, small in (Rendered(_images(), Crops(), v, [0, 1, 2, 3], sizes)[n] for v in range(3) for n in range(4)):
        shrunk = torch.nn.functional.interpolate(large[None].float(), (32, 24), mode="area")[0]
        assert (shrunk - small.float()).abs().mean() < 2


@pytest.mark.parametrize("area", [0.05, 0.35, 1.0])
def test_a_random_part_lies_in_the_picture_and_has_its_share(area: float) -> None:
    """No part leaves the picture or is smaller than the least share; of shapes that never fit the central square is shown."""
    crops, images = Crops(area=area), _images()
    for n in range(200):
        (left, top, right, bottom), _ = crops.part(images, 0, n, SIZE)
        assert 0 <= left < right <= SIZE[0] + 1e-9
        assert 0 <= top < bottom <= SIZE[1] + 1e-9
        share = (right - left) * (bottom - top) / (SIZE[0] * SIZE[1])
        assert share >= min(area, min(SIZE) / max(SIZE)) - 1e-9


def test_half_of_the_views_are_mirrored_unless_nothing_is_done() -> None:
    """flip and crop mirror about half of the views, none shows the central square as it is."""
    images = _images()
    for augment, most in (("none", 0), ("flip", 0.6), ("crop", 0.6)):
        mirrored = [Crops(augment=augment).part(images, 0, n, SIZE)[1] for n in range(300)]
        assert most - 0.2 <= sum(mirrored) / 300 <= most
    assert Crops(augment="none").part(images, 0, 0, SIZE) == ((15.0, 0.0, 75.0, 60.0), False)
    plain, turned = (rendered(images, Crops(augment="flip"), v, [0], (8, 8))[0] for v in _views_of(images))
    assert torch.equal(plain, turned.flip(-1))
    flip = Crops(augment="flip")
    assert all(len({flip.part(images, v, n, SIZE)[1] for v in (2, 3)}) == 2 for n in range(6))
    assert [c.distinct(4) for c in (Crops(augment="none"), flip, Crops(), Crops(augment="none", mixup=1.0))] == [
        1,
        2,
        4,
        4,
    ]


def _views_of(images: Images) -> list[int]:
    """The first view that is as it is, and the first that is mirrored."""
    crops = Crops(augment="flip")
    return [next(v for v in range(64) if crops.part(images, v, 0, SIZE)[1] is m) for m in (False, True)]


def test_mixed_images_and_labels_have_the_same_shares() -> None:
    """What is shown is the two images' views in the drawn shares, to rounding; the labels are their classes in these shares."""
    images, crops = _images(), Crops(mixup=1.0)
    plain = Crops()
    for n in range(6):
        other, share = crops.mix(images, 1, n)
        assert 0.5 <= share <= 1
        own, theirs = (rendered(images, plain, 1, [i], (16, 16))[0].float() for i in (n, other))
        assert (
            rendered(images, crops, 1, [n], (16, 16))[0].float() - share * own - (1 - share) * theirs
        ).abs().max() <= 0.5 + 1e-4
        label = labels_of(images, crops, 1, [n])[0]
        wanted = torch.zeros(3)
        wanted[images.labels[n]] += share
        wanted[images.labels[other]] += 1 - share
        assert torch.allclose(label, wanted)
    assert labels_of(images, plain, 1, [4, 5]).tolist() == [1, 2]
    assert labels_of(_images(labels=[-1] * 6), crops, 1, [0]).tolist() == [-1]


def test_pixels_become_input() -> None:
    """0 to 255 become 0 to 1, less the mean, over the deviation."""
    shape = Preprocess(input_size=(3, 4, 4), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    x = normalised(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), shape)
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([2.5, 2.0, 1.75]))
