"""What may still be tuned of a dual encoder's classifier: the prompts that a delta has learned, or its templates' words."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Site
from vtzoo.classifier import head_names
from vtzoo.errors import UsageError
from vtzoo.folding import is_linear
from vtzoo.installed import head_state, installed
from vtzoo.methods._language import Vectors
from vtzoo.spec import Task
from vtzoo.speech import TEXT, can_speak, said
from vtzoo.text_head import TextHead
from vtzoo.text_tower import EMBEDDING

ALIKE = 1e-3
"""How far a stored classifier may be from what the text tower makes, relative to its largest number, and still be that."""


def tunable(model: Any, task: Task) -> tuple[list[nn.Parameter], bool]:
    """The prompts, and whether there are some beside the patches, too, so that an image's features depend on them.

    Where a delta has learned none, vectors are hung in the place of the templates' words in front of the name; they start as those.

    Args:
        model: a dual encoder with the classifier of its task.
        task: with its names and templates.

    Raises:
        UsageError: the classifier is not what the text tower makes of the names, or no template has words in front of the name.
    """
    if type(model.get_classifier()) is not TextHead and not says_words(model, task):
        raise UsageError(
            f"the classifier of '{task.name}' has learned more than words, and only words are tuned here",
            "use a delta of coop, maple or zero-shot",
        )
    prompts, deep = _learned(model)
    return prompts or [_words(model)], deep


def says_words(model: Any, task: Task) -> bool:
    """Whether a dual encoder's plain classifier is what its text tower makes of the task's names; then that one takes its place."""
    stored = {n: t.detach() for n, t in head_state(model).items()}
    weight = next((t for n, t in stored.items() if n.endswith(".weight")), None)
    if can_speak(model) and weight is not None and is_linear(stored):
        model.speak(task.spoken, task.templates)
        with torch.no_grad():
            made = model.get_classifier().layer()[0]
        return bool((weight.to(made) - made).abs().max() <= ALIKE * made.abs().max())
    return False


def _learned(model: nn.Module) -> tuple[list[nn.Parameter], bool]:
    """The prompts of the methods that put some among words, and whether these put some beside patches, too."""
    record = installed(model)
    parts = [p for p in (record.parts if record else ()) if any(s.name == EMBEDDING for s in p.sites)]
    inside = tuple(f"{name}." for p in parts for name in (p.graft, *(s.key(p.graft) for s in p.sites)))
    deep = any(not s.name.startswith(TEXT) for p in parts for s in p.sites)
    return [p for n, p in model.named_parameters() if inside and n.startswith(inside)], deep


def _words(model: Any) -> nn.Parameter:
    """Hang vectors in the place of the templates' words in front of the name; they start as those."""
    head: TextHead = model.get_classifier()
    ids, words = _slotted(head)
    host = model.get_submodule(EMBEDDING)
    facts = {"width": host.embedding_dim, "init": words, "count": len(words), "classes": 0}
    child = Vectors(Site(name=EMBEDDING, kind="params", facts=facts)).to(host.weight.device, host.weight.dtype)
    child.start(host, lambda _: host.weight)
    graft.graft(host, "words", child)
    model.set_submodule(head_names(model)[0], head.prompted(ids))
    return child.context


def _slotted(head: TextHead) -> tuple[Tensor, list[int]]:
    """The prompts' ids with places for vectors, and the ids that stood there.

    Raises:
        UsageError: no template has words in front of the name.
    """
    ids, found = head.ids.clone(), list[int]()
    for t, template in enumerate(head.templates):
        before = template.partition("{}")[0].strip()
        words = said(head.model.tokenize, before, head.model.text.context_length).tolist() if before else []
        at = _place(ids[:, t], words)
        if words and at is not None:
            ids[:, t, at : at + len(words)] = -1 - len(found) - torch.arange(len(words), device=ids.device)
            found += words
    if not found:
        raise UsageError(
            f"the template '{head.templates[0]}' has no words in front of the name to tune",
            "make the delta with another --template",
        )
    return ids, found


def _place(rows: Tensor, words: Sequence[int]) -> int | None:
    """Where the words begin in all rows [classes, length] alike."""
    wanted = torch.tensor(words, device=rows.device, dtype=rows.dtype)
    starts = range(rows.shape[1] - len(words) + 1)
    return next((i for i in starts if bool((rows[:, i : i + len(words)] == wanted).all())), None)
