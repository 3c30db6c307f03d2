"""What scripts/make_clip.py holds out, says of a drawing, and writes for open_clip."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
INDEX = """\
  1 a licence
bird n 1 1 @ 1 0 00000002
sparrow n 2 1 @ 2 0 00000003 00000004
hammer n 1 1 @ 1 0 00000004
"""
DATA = """\
  1 a licence
00000001 05 n 01 animal 0 000 | a living thing; it moves
00000002 05 n 01 bird 0 001 @ 00000001 n 0000 | has feathers
00000003 05 n 02 sparrow 0 house_sparrow 0 001 @ 00000002 n 0000 | a small bird; "a sparrow"
00000004 06 n 01 hammer 0 000 | a tool
"""


@pytest.fixture
def scripts(monkeypatch):
    """The scripts' folder on the path, as when one of them is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def wordnet(tmp_path, monkeypatch, scripts):
    """Four nouns in WordNet's files; of the held-out kinds only birds."""
    (tmp_path / "index.noun").write_text(INDEX)
    (tmp_path / "data.noun").write_text(DATA)
    for part in ("verb", "adj"):
        (tmp_path / f"index.{part}").write_text("  1 a licence\nred_hot a 1 0 1 0 00000009\n")
    held = scripts("_heldout")
    monkeypatch.setattr(held, "ROOTS", {"bird": 1})
    return tmp_path, held


@pytest.mark.parametrize(
    ("kind", "names", "tags", "held"),
    [
        ("emoji/animal-bird", ("eagle",), (), True),
        ("clipart/animals/birds/penguin", ("tux",), (), True),
        ("stamps/household", ("small bird house",), (), True),
        ("furniture/garden", ("house",), ("bird",), True),
        ("flashcards/food", ("fat sparrows",), (), True),
        ("clipart/tools", ("hammer",), ("steel",), False),
        ("emoji/tool", ("birdcage",), (), False),
    ],
)
def test_held_out_kinds(wordnet, scripts, kind, names, tags, held):
    """A drawing is held out by its folder, a word said of it, or what WordNet says its name is a kind of."""
    folder, module = wordnet
    pair = scripts("_pairs").Pair(Path("x.png"), "x.png", names, kind, tags)
    assert module.is_held(pair, module.Nouns.read(folder)) is held


def test_every_word_of_the_roots_is_a_kind(wordnet):
    """What a phrase is a kind of is found by its last word, in the singular, by the commonest sense, up to the top."""
    nouns = wordnet[1].Nouns.read(wordnet[0])
    assert nouns.kinds("old sparrows") == {"00000003", "00000002", "00000001"}
    assert nouns.kinds("nothing known") == set()


def test_lexicon_reads_lemmas_and_glosses(wordnet, scripts):
    """Lemmas come once, without underscores; a gloss without its examples."""
    lemmas, glosses = scripts("_captions").lexicon(wordnet[0])
    assert lemmas == ["animal", "bird", "sparrow", "house sparrow", "hammer", "red hot"]
    assert glosses[2] == "sparrow, a small bird"


def test_names_are_half_of_what_is_said(scripts):
    """Names stand as often as keywords and kind together, so that a phrase drawn is as often a name as not."""
    pair = scripts("_pairs").Pair(Path("x.png"), "x.png", ("saw", "hand saw"), "clipart/tools", ("steel", "wood"))
    said = scripts("_captions").said(pair)
    assert sum(text in pair.names for text in said) == 4
    assert set(said) - set(pair.names) == {"steel", "wood", "tools", "saw, tools"}


def test_drawings_of_each_package_get_their_names(scripts, tmp_path):
    """Titles, descriptions, properties and file names become plain words; numbers at the end and series are left out."""
    pairs, image = scripts("_pairs"), Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    for name in (
        "png/tools/saw_02.png",
        "png/tools/ax_1.png",
        "stamps/town/church.png",
        "cards/jobs/vet.jpg",
        "f/a/sofa.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    (tmp_path / "svg/tools").mkdir(parents=True)
    (tmp_path / "svg/tools/saw_02.svg").write_text("<dc:title>Hand_Saw 3</dc:title><rdf:li>Steel</rdf:li>")
    (tmp_path / "svg/tools/ax_1.svg").write_text("<dc:title>Icon theme</dc:title>")
    (tmp_path / "stamps/town/church.txt").write_text("A white church.\nde.utf8=Kirche\n")
    (tmp_path / "f/PluginFurnitureCatalog.properties").write_text(
        "name#1=Red sofa\ncategory#1=Living room\nicon#1=/a/sofa.png\n"
    )
    found = [
        *pairs.clipart(tmp_path / "png", tmp_path / "svg"), *pairs.stamps(tmp_path / "stamps"),
        *pairs.flashcards(tmp_path / "cards"), *pairs.furniture(tmp_path / "f"),
    ]  # fmt: skip
    assert [(pair.kind, pair.names, pair.tags) for pair in found] == [
        ("clipart/tools", ("ax",), ()),
        ("clipart/tools", ("hand saw",), ("steel",)),
        ("stamps/town", ("white church", "church"), ()),
        ("flashcards/jobs", ("vet",), ()),
        ("furniture/living room", ("red sofa",), ()),
    ]


def test_least_squares_finds_the_map(scripts):
    """Without a ridge the map that made the targets comes back, with one it shrinks; targets are seen from their mean."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 7, generator=generator, dtype=torch.float64)
    made = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    solve = scripts("_image_tower").least_squares
    weight, bias = solve(x, x @ made.T + 5, 0.0)
    torch.testing.assert_close(weight, made)
    torch.testing.assert_close((x @ weight.T + bias).mean(0), torch.zeros(3, dtype=torch.float64))
    assert solve(x, x @ made.T, 1.0)[0].norm() < 0.8 * made.norm()


def test_contrast_is_the_clip_loss_where_all_differ(scripts):
    """It equals open_clip's for different phrases, and two drawings that say the same share the answer."""
    loss = pytest.importorskip("open_clip").ClipLoss()
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(5, 64, generator=generator), dim=-1)
    text = torch.nn.functional.normalize(torch.randn(5, 64, generator=generator), dim=-1)
    contrast = scripts("_image_tower").contrast
    torch.testing.assert_close(contrast(9 * image @ text.T, text), loss(image, text, torch.tensor(9.0)))
    twice = text[[0, 0, 2, 3, 4]]
    logits = 9 * image @ twice.T
    swapped = logits[[1, 0, 2, 3, 4]]
    torch.testing.assert_close(contrast(logits, twice), contrast(swapped, twice))


def test_temperature_is_the_best_for_the_pairs(scripts):
    """Pairs that fit want a large factor, pairs at random the least one there is."""
    module = scripts("_image_tower")
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(600, 16, generator=generator)
    noise = torch.randn(600, 16, generator=generator)
    assert module.best_scale(text + 0.1 * noise, text) > module.best_scale(text + noise, text) > 4
    assert module.best_scale(noise, text) == module.SCALES[0]


def test_the_text_tower_learns_where_the_targets_point(scripts):
    """A small tower turns to its targets, the same way each time."""
    open_clip = pytest.importorskip("open_clip")
    module = scripts("_text_tower")
    tokens = scripts("make_clip").tokenizer()([f"{size} {thing}" for size in "abcdefgh" for thing in ("dog", "car")])
    targets = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    ends: list[float] = []
    for _ in range(2):
        torch.manual_seed(0)
        tower = open_clip.transformer.TextTransformer(
            context_length=32, vocab_size=49408, width=32, heads=2, layers=1, output_dim=8
        )
        ends.append(module.distil(tower, tokens, targets, epochs=25, lr=1e-2, batch_size=8))
    assert ends[0] > 0.9
    assert ends[0] == ends[1]


def test_a_drawing_lies_in_the_middle_of_a_white_square(scripts):
    """Nothing is cut off and nothing enlarged; what is too large is made smaller."""
    square = scripts("_gather").square
    small = np.asarray(square(Image.new("RGB", (4, 2), "red"), 8))
    assert small.shape == (4, 4, 3)
    assert (small[1:3] == (255, 0, 0)).all()
    assert (small[[0, 3]] == 255).all()
    assert square(Image.new("RGB", (40, 20)), 8).size == (8, 8)


def test_splits_of_a_task_share_no_picture(scripts):
    """At most so many of a class and split are taken, and none that looks like one taken before, whatever its split."""
    chosen = scripts("make_tasks").chosen
    looks = [Image.new("RGB", (8, 8), (i * 40, 255 - i * 40, i * 20)) for i in range(5)]
    rows = [("train", "a", looks[0]), ("test", "a", looks[0]), ("train", "a", looks[1]), ("train", "a", looks[2])]
    rows += [("train", "b", looks[3]), ("val", "a", looks[4])]
    taken = [(split, label, number) for split, label, number, _ in chosen(rows, (2, 1, 1))]
    assert taken == [("train", "a", 0), ("train", "a", 1), ("train", "b", 0), ("val", "a", 0)]


def test_text_is_the_same_however_long_the_batch_is(scripts):
    """The tower computed up to the longest phrase gives what it gives for the whole context."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    tower = open_clip.transformer.TextTransformer(
        context_length=32, vocab_size=49408, width=32, heads=2, layers=1, output_dim=8
    )
    tokens = scripts("make_clip").tokenizer()(["a dog", "a drawing of a small red house"])
    torch.testing.assert_close(scripts("_text_tower").encode(tower, tokens), tower(tokens))
    assert tower.attn_mask.shape == (32, 32)


def test_open_clip_opens_what_is_written(scripts, tmp_path):
    """The folder is open_clip's own: same features by its loader, its tokenizer, the embedded trunk's preprocessing."""
    open_clip = pytest.importorskip("open_clip")
    make_clip = scripts("make_clip")
    torch.manual_seed(0)
    model = make_clip.built()
    make_clip.store(model, tmp_path / "clip")
    opened, _, look = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8))
    x = look(image)[None]
    assert x.shape == (1, 3, 128, 128)
    assert x.min() < -0.5
    with torch.inference_mode():
        assert torch.equal(opened.eval().encode_image(x), model.encode_image(x))
        tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")(["a small bird"])
        assert torch.equal(opened.encode_text(tokens), model.encode_text(tokens))
    assert json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())["model_cfg"] == make_clip.MODEL
