"""What a dual encoder is told: names and templates as token ids, and the places for learned vectors among them."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests import families
from tests.unit.spoken import VIT
from vtzoo.errors import Corrupt, UsageError
from vtzoo.spec import Task
from vtzoo.speech import named, prompts, said, sets, slotted, spelled, tokens
from vtzoo.text_tower import tokenizer

CONTEXT = 20


@pytest.fixture(scope="module")
def tokenize() -> Any:
    """open_clip's own tokenizer."""
    model: Any = families.build("dual")
    return model.tokenize


def test_prompts_are_each_name_in_each_template(tokenize: Any) -> None:
    """The ids are those that the tokenizer gives for the texts themselves."""
    ids = prompts(tokenize, ["cat", "emu"], ["a {}.", "the {}"], CONTEXT)
    wanted = tokenize(["a cat.", "the cat", "a emu.", "the emu"], context_length=CONTEXT)
    assert torch.equal(ids, wanted.reshape(2, 2, CONTEXT))


@pytest.mark.parametrize(
    ("words", "templates", "match"),
    [
        (["cat", " "], ["a {}."], "class 2 has an empty name"),
        (["cat", "Cat "], ["a {}."], "the same text to this model"),
        (["cat", "dog"], ["a photo"], "no one place for a name"),
        (["cat", "dog"], ["{} or {}"], "no one place for a name"),
        (["cat", "very " * 30 + "long"], ["a {}."], "tokens or more, and the text tower reads 20"),
    ],
)
def test_bad_names_and_templates_are_refused(tokenize: Any, words: list[str], templates: list[str], match: str) -> None:
    """An empty name, two names that are the same tokens, one that is too long, a template without a place for it."""
    with pytest.raises(UsageError, match=match):
        prompts(tokenize, words, templates, CONTEXT)


def test_the_longest_text_that_fits_is_taken(tokenize: Any) -> None:
    """As many tokens as the context has, start and end among them; one more is refused."""
    assert tokens(tokenize, ["cat " * (CONTEXT - 2)], CONTEXT)[0, -1] == tokens(tokenize, ["cat"], CONTEXT)[0].max()
    with pytest.raises(UsageError, match="has 21 tokens or more"):
        tokens(tokenize, ["cat " * (CONTEXT - 1)], CONTEXT)


def test_other_braces_are_text(tokenize: Any) -> None:
    """Of a template, which may come with a file from elsewhere, the place for the name is all that is filled in."""
    found = prompts(tokenize, ["cat {0}"], ["{} {:>9999999999} {"], CONTEXT)[0]
    assert torch.equal(found, tokenize(["cat {0} {:>9999999999} {"], context_length=CONTEXT))


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_places_stand_around_the_name(tokenize: Any, position: Any) -> None:
    """Vectors are numbered from the left: all before the name, half of them, or none; a name may hold the mark itself."""
    rows = slotted(tokenize, ["cat", "x ray"], 3, position, CONTEXT)[:, 0]
    names = tokenize(["cat", "x ray"], context_length=CONTEXT)
    before = {"end": 3, "middle": 1, "front": 0}[position]
    for row, name in zip(rows.tolist(), names.tolist(), strict=True):
        own = name[1 : name.index(49407)]
        wanted = [49406, *(-1 - i for i in range(before)), *own, *(-1 - i for i in range(before, 3))]
        assert row[: len(wanted)] == wanted


def test_classes_may_have_vectors_of_their_own(tokenize: Any) -> None:
    """They are numbered class by class, and no two classes share one."""
    ids = slotted(tokenize, ["cat", "emu"], 2, "end", CONTEXT, own=True)
    assert ids[:, 0, 1:3].tolist() == [[-1, -2], [-3, -4]]


def test_said_is_the_text_alone(tokenize: Any) -> None:
    """The ids between start and end."""
    ids = tokenize(["a photo of a"], context_length=CONTEXT)[0].tolist()
    assert said(tokenize, "a photo of a", CONTEXT).tolist() == ids[1 : ids.index(49407)]


KINDS = {
    "siglip": ({"clean": "canonicalize"}, True),
    "bert": ({}, False),
    "clips": ({"tokenizer_mode": "clips"}, False),
}
"""Tokenizers of the hub as their texts are: their arguments, and whether what fills up is what ends a text, and nothing starts it."""


@pytest.fixture(params=KINDS)
def other(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small tokenizer as the hub has them, by open_clip's wrapper."""
    transformers, made = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    args, alone = KINDS[request.param]
    special = ["[PAD]", "[END]", "[CLS]", "[UNK]"]
    words = [*special, "a", "photo", "of", "cat", "x", "ray", "."]
    own = made.Tokenizer(made.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    own.normalizer, own.pre_tokenizer = made.normalizers.Lowercase(), made.pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[END]", 1)]
    single = "$A [END]" if alone else "[CLS] $A [END]"
    own.post_processor = made.processors.TemplateProcessing(single=single, special_tokens=ends)
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="[END]" if alone else "[PAD]", eos_token="[END]", bos_token="[CLS]", cls_token="[CLS]",
        unk_token="[UNK]",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    whole.save_pretrained("org/name")
    return tokenizer({"text": {"context_length": CONTEXT}, "tokenizer": "org/name", "tokenizer_args": args})


def test_other_tokenizers_are_read_as_well(other: Any) -> None:
    """With another start, end and filling than open_clip's own: ids, what is said, places, and where a text is too long."""
    ids = prompts(other, ["cat", "ray"], ["a photo of a {}."], CONTEXT)[:, 0]
    assert torch.equal(ids, other(["a photo of a cat.", "a photo of a ray."], context_length=CONTEXT))
    assert said(other, "a photo of a", CONTEXT).tolist() == [4, 5, 6, 4]
    (row,) = slotted(other, ["x ray"], 3, "middle", CONTEXT)[0].tolist()
    at = row.index(-1)
    assert row[at : at + 5] == [-1, 8, 9, -2, -3]
    most = CONTEXT - int((other([""], context_length=CONTEXT)[0] != other([""], context_length=CONTEXT)[0, -2]).sum())
    longest = most - (len(set(other([""], context_length=CONTEXT)[0].tolist())) == 1)
    tokens(other, ["cat " * longest], CONTEXT)
    with pytest.raises(UsageError, match="tokens or more"):
        tokens(other, ["cat " * (longest + 1)], CONTEXT)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("org/name", {"trust_remote_code": True}),
        ("org/name", {"cache_dir": "/tmp"}),
        ("org/name", {"clean": "all"}),
        ("/etc/passwd", {}),
        ("../name", {}),
        ("", {"bpe_path": "/etc/passwd"}),
    ],
)
def test_tokenizers_that_could_do_more_are_refused(name: str, args: dict[str, Any]) -> None:
    """What runs code of the hub or names a file, in a card from elsewhere or in a model's config."""
    with pytest.raises(UsageError, match=r"its tokenizer takes|is no name of a tokenizer"):
        timm.create_model("clip", **VIT, tokenizer=name, tokenizer_args=args)
    with pytest.raises(UsageError, match=r"its tokenizer takes|is no name of a tokenizer"):
        tokenizer({"text": {}, "tokenizer": name, "tokenizer_args": args})


def test_sets_of_templates_go_by_name() -> None:
    """Both of open_clip's have a place for a name in each; other words without a place are refused."""
    assert {n: len(t) for n, t in sets().items()} == {"simple": 7, "openai": 80}
    assert spelled(["simple", "a {}."]) == (*sets()["simple"], "a {}.")
    assert spelled([]) == ("a photo of a {}.",)
    with pytest.raises(UsageError, match="'sinple' has no one place for a name") as refused:
        spelled(["sinple"])
    assert "simple, openai" in refused.value.hint


def test_labels_become_names() -> None:
    """Underscores and hyphens are spaces unless something else is said; what is said of no class is refused."""
    assert named(["ice_cream", "t-shirt"], {"t-shirt": "a T-shirt"}) == ("ice cream", "a T-shirt")
    with pytest.raises(UsageError, match="'tshirt' has a name, and is no class here"):
        named(["t-shirt"], {"tshirt": "a T-shirt"})


def test_names_and_templates_travel_with_the_task() -> None:
    """They come back from its JSON; garbled ones are refused."""
    task = Task(name="t", classes=("a", "b"), words=("one", "two"), templates=("a {}.",))
    assert Task.of(task.json()) == task
    assert Task(name="t", classes=("a_b",)).spoken == ("a b",)
    for facts in ({"words": ["one"]}, {"words": "ab"}, {"templates": [1]}):
        with pytest.raises(Corrupt):
            Task.of({**task.json(), **facts})
