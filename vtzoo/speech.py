"""What a dual encoder is told: class names and templates as token ids, and the places for learned vectors among them.

A place for context vector k is the negative id -(k + 1): whoever hangs on the token embedding puts its vector there.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vtzoo.delta import is_linear
from vtzoo.errors import UsageError, did_you_mean
from vtzoo.refs import shown
from vtzoo.spec import saying
from vtzoo.tensors import view

if TYPE_CHECKING:
    from vtzoo.delta import Delta, Part

TEXT, SCALES = "text.", ("logit_scale", "logit_bias")
"""How the names of the text tower's modules start, and what logits are scaled by."""
TEMPLATE = "a photo of a {}."
Position = Literal["end", "middle", "front"]


def can_speak(model: Any) -> bool:
    """Whether a network has a text tower."""
    return getattr(model, "text", None) is not None and hasattr(model, "speak")


def speaks(part: "Part") -> bool:
    """Whether a part of a delta acts on the text tower."""
    return any(site.name.startswith(TEXT) for site in part.sites)


def tells_all(part: "Part") -> bool:
    """Whether a part's classifier holds all that the text tower has to say to it, although it is no linear one."""
    return getattr(part.module, "TELLS_ALL", False)


def heard(model: Any, delta: "Delta", *, headless: bool = False) -> "Delta":
    """A delta as far as it concerns a network: all of it, or without what acts on the text tower where there is none.

    Args:
        model: any network.
        delta: of it.
        headless: no classifier is wanted, so that the text tower, where there is one, is not asked either.

    Raises:
        UsageError: its classifier runs the text tower.
    """
    if (can_speak(model) and not headless) or not any(map(speaks, delta.parts)):
        return delta
    parts = list["Part"]()
    for whole in delta.parts:
        part = replace(whole, sites=tuple(s for s in whole.sites if not s.name.startswith(TEXT)))
        if part.sites or not whole.sites or tells_all(whole):
            parts.append(part)
        elif (
            not headless
            and hasattr(whole.module, "head")
            and not all(is_linear(delta.head(t.name)) for t in delta.tasks)
        ):
            raise UsageError(
                f"{whole.method} runs the text tower for each image, and this network has none",
                "attach it to the whole dual encoder",
            )
    gone = tuple(f"{p.graft}." for p in delta.parts if p.graft not in {left.graft for left in parts})
    names = [n for n in delta.tensors if not n.startswith((TEXT, *gone))]
    return delta.with_(parts=tuple(parts), tensors=view(delta.tensors, {n: n for n in names}))


def spoken(
    model: Any, labels: Sequence[str], words: Mapping[str, str], templates: Sequence[str], every: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tell a dual encoder its classes; gives the names and templates that it was told, none where it has no text tower.

    Args:
        model: any network.
        labels: of the classes.
        words: names by label, of those that are not the label with spaces.
        templates: "a photo of a {}." where there are none.
        every: labels that `words` may be of, where there are more than these.

    Raises:
        UsageError: names or templates that are no good, or are of no use to this network.
    """
    if not can_speak(model):
        if words or templates:
            raise UsageError("this backbone has no text tower to tell names", "leave --words and --template out")
        return (), ()
    said = named(labels, words, every)
    model.speak(said, templates)
    return said, model.clip_head.templates


def named(labels: Sequence[str], words: Mapping[str, str], every: Sequence[str] = ()) -> tuple[str, ...]:
    """Each class's name: its label with spaces, or what is said of it; of `every` class something may be said.

    Raises:
        UsageError: something is said of a class that there isn't.
    """
    if unknown := sorted(set(words) - set(every or labels)):
        raise UsageError(f"'{unknown[0]}' has a name, and is no class here", did_you_mean(unknown[0], every or labels))
    return tuple(words.get(label, saying(label)) for label in labels)


def check_templates(templates: Sequence[str]) -> None:
    """Refuse templates without a place for a class name.

    Raises:
        UsageError: says which.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(
                f"the template {shown(template)} has no one place for a name",
                f"write it like {TEMPLATE!r}, or name a set: simple, openai",
            )


def tokens(tokenize: Any, texts: Sequence[str], context: int) -> Tensor:
    """Token ids [texts, context].

    Raises:
        UsageError: a text is longer than that.
    """
    found: Tensor = tokenize(list(texts), context_length=context)
    rest = int(tokenize([""], context_length=2 * context)[0, -2])  # the last may be a mark
    whole = (tokenize(list(texts), context_length=2 * context) != rest).sum(1)
    for text, own, count in zip(texts, (found != rest).sum(1), whole, strict=True):
        if own != count:
            raise UsageError(
                f"{shown(text)} has {int(count)} tokens or more, and the text tower reads {context}",
                "shorten the class's name, or the words around it",
            )
    return found


def sets() -> dict[str, tuple[str, ...]]:
    """Sets of templates by name: those that open_clip measures with."""
    from open_clip import zero_shot_metadata as known

    found = {"simple": known.SIMPLE_IMAGENET_TEMPLATES, "openai": known.OPENAI_IMAGENET_TEMPLATES}
    return {name: tuple(template("{}") for template in own) for name, own in found.items()}


def spelled(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates, each name of a set among them as what is in it, and "a photo of a {}." where there are none.

    Raises:
        UsageError: one has no place for a name, and is no set's name.
    """
    found = [own for t in templates for own in (sets().get(t, (t,)) if "{" not in t else (t,))]
    check_templates(found)
    return tuple(dict.fromkeys(found)) or (TEMPLATE,)


def prompts(tokenize: Any, words: Sequence[str], templates: Sequence[str], context: int) -> Tensor:
    """Each class's name in each template, [classes, templates, context].

    Raises:
        UsageError: an empty name, two that are the same tokens, one that is too long, or a template without a place for it.
    """
    check_templates(templates)
    if empty := [i for i, word in enumerate(words) if not word.strip()]:
        raise UsageError(f"class {empty[0] + 1} has an empty name", "give it words: --words FILE")
    ids = tokens(tokenize, [t.replace("{}", w) for w in words for t in templates], context)
    ids = ids.reshape(len(words), len(templates), context)
    rows = [tuple(row) for row in ids[:, 0].tolist()]
    if twice := [i for i, count in ((rows.index(r), c) for r, c in Counter(rows).items()) if count > 1]:
        same = [w for w, row in zip(words, rows, strict=True) if row == rows[twice[0]]]
        raise UsageError(
            f"{' and '.join(map(shown, same))} are the same text to this model", "give one other words: --words FILE"
        )
    return ids


def slotted(
    tokenize: Any, words: Sequence[str], count: int, position: Position, context: int, own: bool = False
) -> Tensor:
    """Prompts of learned vectors around each class's name, ending in a full stop: [classes, 1, context] (CoOp's three positions).

    Args:
        tokenize: see `tokens`.
        words: class names.
        count: vectors in a prompt.
        position: of the name: behind the vectors, between two halves, or before them.
        context: tokens that the tower reads.
        own: each class has vectors of its own, numbered class by class.

    Raises:
        UsageError: as `prompts`.
    """
    first = {"end": count, "middle": count // 2, "front": 0}[position]
    before, after = " ".join(["X"] * first), " ".join(["X"] * (count - first))
    ids = prompts(tokenize, words, [f"{before} {{}} {after}.".strip() if after else f"{before} {{}}."], context)
    mark = _mark(tokenize, context)
    for i, row in enumerate(ids[:, 0]):
        places = (row == mark).nonzero().flatten()
        places = torch.cat([places[:first], places[len(places) - (count - first) :]])  # a name may have the mark, too
        row[places] = -1 - torch.arange(count) - (i * count if own else 0)
    return ids


def said(tokenize: Any, text: str, context: int) -> Tensor:
    """The token ids of a text alone, without the marks of start and end."""
    mark = _mark(tokenize, context)
    one, more = (tokenize([t], context_length=context)[0] for t in ("X", f"X {text}"))
    at = int((one == mark).nonzero()[0])
    rest = tokenize([""], context_length=context)[0, -2]  # the last may be a mark
    grown = int((more != rest).sum()) - int((one != rest).sum())
    return more[at + 1 : at + 1 + grown]


def _mark(tokenize: Any, context: int) -> int:
    """The id of the word that stands for a learned vector until it is put in.

    Raises:
        UsageError: the tokenizer has none.
    """
    one, two = (Counter(tokenize([t], context_length=context)[0].tolist()) for t in ("X", "X X"))
    found = [k for k in one if one[k] == 1 and two[k] == 2]
    if len(found) != 1:
        raise UsageError("this tokenizer cuts X into several tokens", "learned context is not supported for it")
    return found[0]
