import dataclasses
import io
import pickle
import random
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtzoo import data
from vtzoo._images import Folder, Zip, decode
from vtzoo.errors import Corrupt, Mismatch, NotFound, UsageError, VtzooError
from vtzoo.spec import Preprocess

SMALL = Preprocess(input_size=(3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.875)


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """Four classes of the embedded garments as a folder with three splits."""
    with zipfile.ZipFile(Zip(_embedded("fashion")).path) as archive:
        names = [n for n in archive.namelist() if n.split("/")[1] in ("bag", "coat", "dress", "shirt")]
        archive.extractall(tmp_path / "garments", names)
    return tmp_path / "garments"


@pytest.fixture
def loose(unpacked: Path) -> Path:
    """The same garments in one level of classes."""
    root = unpacked.parent / "loose"
    for path in sorted(unpacked.rglob("*.png")):
        target = root / path.parent.name / f"{path.parent.parent.name}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return root


def _embedded(name: str) -> Path:
    return Path(data.__file__).parent / "embedded" / "tasks" / f"{name}.zip"


@pytest.mark.parametrize("name", data.embedded_tasks())
def test_embedded_tasks_hold_every_class_in_three_splits_that_share_no_picture(name: str) -> None:
    """Each embedded task opens offline, decodes, and no picture stands in two splits."""
    splits = {s: data.open_data(f"vtzoo:{name}", split=s) for s in data.SPLITS}
    assert len({images.classes for images in splits.values()}) == 1
    pixels: list[bytes] = []
    packed = Zip(_embedded(name))
    for images in splits.values():
        assert set(images.labels) == set(range(len(images.classes)))
        sample = range(0, len(images), 5)
        assert all(images[i][0].mode == "RGB" for i in sample)
        pixels += [packed.read(p) for p in images.paths]
    assert len(pixels) == len(set(pixels))


def test_a_folder_with_splits_gives_the_images_and_labels_that_lie_there(unpacked: Path) -> None:
    """Labels count the sorted class folders; pixels are the files' own."""
    images = data.open_data(unpacked, split="test")
    assert images.classes == ("bag", "coat", "dress", "shirt")
    assert len(images) == 160
    for i in (0, 70, 159):
        image, label = images[i]
        assert images.paths[i].split("/")[1] == images.classes[label]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(unpacked / images.paths[i]).convert("RGB")))


def test_a_zip_reads_like_the_folder_it_was_packed_from(unpacked: Path) -> None:
    """Same paths, labels, digest and pixels."""
    packed = Path(shutil.make_archive(str(unpacked), "zip", unpacked))
    a, b = data.open_data(unpacked, split="val"), data.open_data(packed, split="val")
    assert (a.paths, a.labels, a.digest, a.classes) == (b.paths, b.labels, b.digest, b.classes)
    assert a[3][0].tobytes() == b[3][0].tobytes()


def test_one_level_of_classes_is_split_80_10_10_by_name_alone(loose: Path) -> None:
    """The splits share nothing, cover everything, and don't move when images are added."""
    before = {s: set(data.open_data(loose, split=s).paths) for s in data.SPLITS}
    assert sum(map(len, before.values())) == len(set().union(*before.values())) == 440
    assert 0.72 < len(before["train"]) / 440 < 0.88
    assert min(len(before["val"]), len(before["test"])) > 20
    Image.new("RGB", (9, 9)).save(loose / "bag" / "new.png")
    assert all(before[s] <= set(data.open_data(loose, split=s).paths) for s in data.SPLITS)


def test_without_a_val_folder_a_tenth_of_train_is_held_out(unpacked: Path) -> None:
    """Train and val are then disjoint and test is untouched."""
    shutil.rmtree(unpacked / "val")
    train, val = (set(data.open_data(unpacked, split=s).paths) for s in ("train", "val"))
    assert not train & val
    assert len(train | val) == 240
    assert 8 <= len(val) <= 45
    assert len(data.open_data(unpacked, split="test")) == 160


def test_unlabelled_images_may_lie_anywhere(tmp_path: Path) -> None:
    """Any tree will do; labels are -1, there are no classes, and 2 % are held out."""
    for i in range(120):
        path = tmp_path / str(i % 3) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    train, val = (data.open_data(tmp_path, split=s, labelled=False) for s in ("train", "val"))
    assert set(train.labels) == {-1}
    assert train.classes == ()
    assert len(train) + len(val) == 120
    assert len(train) > 100
    with pytest.raises(NotFound):
        data.open_data(tmp_path, split="test", labelled=False)


def _empty(root: Path) -> Path:
    shutil.rmtree(root)
    root.mkdir()
    return root


def _one_class(root: Path) -> Path:
    for path in root.glob("*/[!b]*"):
        shutil.rmtree(path)
    return root


def _no_classes(root: Path) -> Path:
    Image.new("RGB", (4, 4)).save(_empty(root) / "a.png")
    return root


def _differing(root: Path) -> Path:
    shutil.rmtree(root / "test" / "coat")
    return root


def _a_file(root: Path) -> Path:
    (root / "notes.txt").write_text("x")
    return root / "notes.txt"


def _not_a_zip(root: Path) -> Path:
    (root / "x.zip").write_text("x")
    return root / "x.zip"


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda root: root / "nowhere", NotFound, "no folder of images at"),
        (lambda _: "vtzoo:fashon", NotFound, "no embedded task is called 'fashon'"),
        (_empty, UsageError, "holds no images"),
        (_one_class, UsageError, "one class only (bag)"),
        (_no_classes, UsageError, "1 images but no class folders"),
        (_differing, UsageError, "don't have the same classes (coat)"),
        (_a_file, UsageError, "neither a folder"),
        (_not_a_zip, Corrupt, "can't be read as a zip"),
        (lambda _: "torch/nothing_of_the_kind", NotFound, "timm can't open"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_by_name(
    unpacked: Path, spoil: Callable[[Path], Path | str], error: type[VtzooError], words: str
) -> None:
    """Each fault has its class (and so its exit code), says what was seen and what to do."""
    with pytest.raises(error) as caught:
        data.open_data(spoil(unpacked), split="train")
    assert words in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_a_split_that_is_not_there_is_not_found(unpacked: Path) -> None:
    """The hint lists those that are."""
    shutil.rmtree(unpacked / "test")
    with pytest.raises(NotFound, match="no 'test' folder") as caught:
        data.open_data(unpacked, split="test")
    assert "train" in caught.value.hint


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_broken_image_is_named_or_left_out_and_counted(unpacked: Path, damage: str) -> None:
    """Reading it raises Corrupt with its path; with skip_bad it is in `skipped` and the digest differs."""
    victim = next((unpacked / "train" / "coat").glob("*.png"))
    whole = victim.read_bytes()
    victim.write_bytes({"empty": b"", "text": b"not an image", "cut": whole[: len(whole) // 2]}[damage])
    images = data.open_data(unpacked, split="train")
    place = images.paths.index(victim.relative_to(unpacked).as_posix())
    with pytest.raises(Corrupt, match=victim.name) as caught:
        images[place]
    assert "--skip-bad" in caught.value.hint
    kept = data.open_data(unpacked, split="train", skip_bad=True)
    assert kept.skipped == (images.paths[place],)
    assert len(kept) == len(images) - 1
    assert kept.digest != images.digest


def test_linked_folders_are_followed(unpacked: Path, tmp_path: Path) -> None:
    """Links to classes and whole splits hold what they point to, also when two point to one; a link back up ends."""
    linked, wanted = tmp_path / "linked", Folder(unpacked).names()
    (linked / "train").mkdir(parents=True)
    for kind in (unpacked / "train").iterdir():
        (linked / "train" / kind.name).symlink_to(kind)
    for split in ("val", "test"):
        (linked / split).symlink_to(unpacked / "test")
    (unpacked / "train" / "bag" / "up").symlink_to(linked / "train")
    (linked / "gone").symlink_to(tmp_path / "nowhere")
    found = Folder(linked).names()
    for split, source in (("train", "train"), ("val", "test"), ("test", "test")):
        below = sorted(n.removeprefix(split) for n in found if n.startswith(f"{split}/"))
        assert below == sorted(n.removeprefix(source) for n in wanted if n.startswith(f"{source}/"))
    assert len(data.open_data(linked, split="test")) == 160


def test_transparency_orientation_and_depth_become_plain_rgb() -> None:
    """Transparent pixels turn white, EXIF rotation is applied, 16-bit grey is scaled and not clipped."""

    def stored(image: Image.Image, kind: str = "png", **options: object) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return decode(buffer.getvalue(), "it")

    assert stored(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert stored(Image.new("RGB", (8, 4)), "jpeg", exif=exif).size == (4, 8)
    grey = Image.fromarray(np.full((2, 2), 32768, np.uint16))
    assert stored(grey).getpixel((0, 0)) == (128, 128, 128)


def test_limit_is_balanced_reproducible_and_nested(unpacked: Path) -> None:
    """Every class gets its share, the same seed the same images, and a larger limit contains the smaller."""
    images = data.open_data(unpacked, split="train")
    some, more = images.limit(42, seed=3), images.limit(90, seed=3)
    assert sorted(Counter(some.labels).values()) == [10, 10, 11, 11]
    assert some.paths == images.limit(42, seed=3).paths
    assert set(some.paths) < set(more.paths)
    assert set(some.paths) != set(images.limit(42, seed=4).paths)
    assert len(images.limit(0)) == len(images.limit(10**6)) == 240
    assert len({images.digest, some.digest, more.digest}) == 3


def test_aligned_counts_labels_in_the_tasks_order(unpacked: Path) -> None:
    """A head trained with another order of classes is scored by names, and unknown classes are refused."""
    images = data.open_data(unpacked, split="test")
    moved = images.aligned(("shirt", "hat", "bag", "coat", "dress"))
    assert [moved.classes[y] for y in moved.labels] == [images.classes[y] for y in images.labels]
    with pytest.raises(Mismatch, match="dress, shirt"):
        images.aligned(("bag", "coat"))


def test_evaluation_pixels_are_timms_own(unpacked: Path) -> None:
    """Size, crop and statistics are the backbone's: equal to timm's transform built from the same facts."""
    from timm.data import create_transform

    image = Image.effect_mandelbrot((80, 60), (-2, -1, 1, 1), 40).convert("RGB")
    theirs = create_transform((3, 32, 32), mean=SMALL.mean, std=SMALL.std, interpolation="bicubic", crop_pct=0.875)
    assert torch.equal(data.transforms(SMALL, train=False)(image), theirs(image))
    assert torch.equal(data.transforms(SMALL, train=True, augment="none")(image), theirs(image))
    flips = {float(data.transforms(SMALL, train=True, augment="flip")(image)[0, 5, 3]) for _ in range(30)}
    assert flips == {float(theirs(image)[0, 5, 3]), float(theirs(image)[0, 5, -4])}


@pytest.mark.parametrize(("area", "least", "most"), [(0.0, 0.35, 0.45), (0.08, 0.08, 0.2), (1.0, 1.0, 1.0)])
def test_random_crops_take_as_much_as_is_asked_for(area: float, least: float, most: float) -> None:
    """The smallest of many crops, measured by the steepness of a ramp of grey, is near the smallest that may be."""
    ramp = Image.linear_gradient("L").convert("RGB")  # a row brighter by 1/255 each
    shape = dataclasses.replace(SMALL, mean=(0.0,) * 3, std=(1.0,) * 3)
    crop = data.transforms(shape, train=True, augment="crop", crop_area=area)
    torch.manual_seed(0)
    random.seed(0)
    heights = [255 * float(x[0, 20, 0] - x[0, 12, 0]) * 4 for x in (crop(ramp) for _ in range(300))]
    areas = sorted((h / 256) ** 2 for h in heights)
    assert areas[0] >= least * 0.7  # crops are between 3:4 and 4:3, and their pixels whole numbers
    assert areas[0] <= most * 1.4


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "strong"])
def test_batches_depend_on_seed_epoch_and_place_alone(unpacked: Path, augment: data.Augment) -> None:
    """A resumed epoch goes on with the very batches it would have had, whatever else is drawn or run."""
    images = data.open_data(unpacked, split="val")
    transform = data.transforms(SMALL, train=True, augment=augment)

    def batches(epoch: int, start: int = 0, workers: int = 0) -> list[torch.Tensor]:
        made = data.loader(images, transform, batch_size=8, seed=5, epoch=epoch, start=start, workers=workers)
        return [x for x, _ in made]

    first = batches(2)
    random.random()
    torch.rand(3)
    resumed = batches(2, start=3)
    assert len(first) == 5
    assert torch.equal(torch.cat(first[3:]), torch.cat(resumed))
    assert not torch.equal(torch.cat(first), torch.cat(batches(3)))
    if augment == "strong":
        assert torch.equal(torch.cat(first), torch.cat(batches(2, workers=1)))


def test_augmenting_leaves_the_models_random_numbers_alone(unpacked: Path) -> None:
    """Dropout and mixup draw the same numbers whether images are read between them or not."""
    images = data.open_data(unpacked, split="val")
    torch.manual_seed(1)
    wanted = torch.rand(2)
    torch.manual_seed(1)
    ready = data.loader(images, data.transforms(SMALL, train=True, augment="strong"), batch_size=40, seed=0).dataset
    made = [torch.rand(1), ready[0] and torch.rand(1)]
    assert torch.equal(torch.cat(made), wanted)


def test_without_a_seed_the_order_is_as_stored(unpacked: Path) -> None:
    """Evaluation sees every image once, in order."""
    images = data.open_data(unpacked, split="val")
    labels = [int(y) for _, ys in data.loader(images, data.transforms(SMALL, train=False), batch_size=7) for y in ys]
    assert tuple(labels) == images.labels


def test_images_pickle_without_their_pixels(unpacked: Path) -> None:
    """Spawned workers get names, not the cache."""
    images = data.open_data("vtzoo:fashion", split="train")
    one = images[7][0].tobytes()
    text = pickle.dumps(images)
    assert len(text) < 100_000
    assert pickle.loads(text)[7][0].tobytes() == one


def test_timm_reads_what_its_names_say(unpacked: Path) -> None:
    """`torch/image_folder@DIR` gives the same classes, labels and pixels as the folder itself."""
    theirs = data.open_data(f"torch/image_folder@{unpacked}", split="test")
    ours = data.open_data(unpacked, split="test")
    assert (theirs.classes, theirs.labels) == (ours.classes, ours.labels)
    assert theirs[9][0].tobytes() == ours[9][0].tobytes()


def test_one_picture_is_read_or_refused_by_name(tmp_path: Path) -> None:
    """`open_image` gives RGB; a missing file, a folder and a text file are refused."""
    Image.new("L", (3, 5), 9).save(tmp_path / "a.png")
    assert data.open_image(tmp_path / "a.png").getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(NotFound, match=r"b\.png"):
        data.open_image(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("x")
    for bad in (tmp_path / "c.png", tmp_path):
        with pytest.raises(Corrupt, match=bad.name):
            data.open_image(bad)


def test_a_digest_stands_for_contents(tmp_path: Path) -> None:
    """Folders, and zips, with the same names and sizes and other pixels differ; a copy elsewhere doesn't."""
    for place, colour in (("a", "red"), ("b", "blue"), ("c", "red")):
        for kind in ("x", "y"):
            (tmp_path / place / "train" / kind).mkdir(parents=True)
            Image.new("RGB", (4, 4), colour).save(tmp_path / place / "train" / kind / "0.bmp")
            Image.new("RGB", (4, 4)).save(tmp_path / place / "train" / kind / "1.bmp")
    packed = [shutil.make_archive(str(tmp_path / f"packed-{n}"), "zip", tmp_path / n) for n in "abc"]
    for a, b, c in ([tmp_path / n for n in "abc"], packed):
        red, blue, copy = (data.open_data(place, split="train", labelled=False).digest for place in (a, b, c))
        assert red != blue
        assert red == copy


def test_a_digest_costs_nothing_until_it_is_asked_for(unpacked: Path) -> None:
    """Opening, limiting and labelling read no image; the digest does, and names a file that can't be read."""
    images = data.open_data(unpacked, split="train").limit(40)
    (unpacked / images.paths[0]).unlink()
    with pytest.raises(Corrupt, match=Path(images.paths[0]).name):
        _ = images.aligned(images.classes).digest


@pytest.mark.parametrize(
    "root", ["", "pipe:touch owned", "pipe:touch owned #/..", "https://x/'; touch owned '", "nowhere", "file"]
)
def test_shards_are_read_of_a_folder_alone(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset would give what else a name says to a shell, and a name may come with someone's zoo."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"")
    with pytest.raises(NotFound, match=r"wds/ reads a folder of shards|does not exist"):
        data.open_data(f"wds/shards@{root}", split="train")
    assert not Path("owned").exists()


def test_a_timm_data_set_is_told_apart_by_its_folder(unpacked: Path) -> None:
    """`torch/x@DIR`: another folder is another data set, and so are other images of the same one."""
    shutil.copytree(unpacked, unpacked.parent / "copy")
    images = data.open_data(f"torch/image_folder@{unpacked}", split="test")
    other = data.open_data(f"torch/image_folder@{unpacked.parent / 'copy'}", split="test")
    again = data.open_data(f"torch/image_folder@{unpacked}", split="test")
    assert len({images.digest, other.digest, images.take(range(5)).digest}) == 3
    assert images.digest == again.digest
