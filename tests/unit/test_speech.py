"""What a dual encoder is told: names and templates as token ids, and the places for learned vectors among them."""

from typing import Any

import pytest
import torch

from tests import families
from vtzoo.errors import Corrupt, UsageError
from vtzoo.spec import Task
from vtzoo.speech import named, prompts, said, sets, slotted, spelled, tokens

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
