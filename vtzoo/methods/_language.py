"""Shared by the methods that teach a dual encoder's text tower: learned vectors among the tokens of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.speech import Position, said, slotted
from vtzoo.text_head import TextHead
from vtzoo.text_tower import EMBEDDING

RANDOM = 16
"""Vectors of a context that starts at random, and their deviation."""
STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Knobs of where a learned context starts.

    Attributes:
        init: words whose tokens it starts from; empty for random vectors.
        context: how many vectors; as many as the words have tokens, or 16, unless given.
    """

    init: str = "a photo of a"
    context: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.init and self.context is not None:
            raise ValueError("context counts random vectors: leave init empty (init=), or context out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Context(Words):
    """Knobs of a learned context; see `Words` for the others.

    Attributes:
        per_class: each class has vectors of its own.
        position: of the class's name: behind them, in their middle, or before them.
    """

    per_class: bool = False
    position: Position = "end"


def spoken(anatomy: Anatomy, method: str) -> TextHead:
    """The classifier that a text tower makes of class names.

    Raises:
        UsageError: there is no text tower, or it was told no names.
    """
    model: Any = anatomy.model
    if getattr(model, "text", None) is None:
        raise UsageError(
            f"{method} teaches a text tower, and this {type(model).__name__} has none", "use a clip: backbone"
        )
    if not isinstance(model.clip_head, TextHead):
        raise UsageError(f"{method} needs the classes' names", "call model.speak([names…]) first")
    return model.clip_head


def words_of(model: Any, config: Words) -> list[int]:
    """The token ids that a context starts from."""
    return said(model.tokenize, config.init, model.text.context_length).tolist() if config.init else []


def place(anatomy: Anatomy, config: Words, method: str) -> Site:
    """The token embedding, with what a context needs to know."""
    head = spoken(anatomy, method)
    model: Any = anatomy.model
    ids = words_of(model, config)
    facts = {
        "width": model.text.token_embedding.embedding_dim,
        "init": ids,
        "count": len(ids) or config.context or RANDOM,
    }
    own = isinstance(config, Context) and config.per_class
    return Site(name=EMBEDDING, kind="params", facts={**facts, "classes": head.out_features if own else 0})


def prompted(old: nn.Module, config: Context) -> TextHead | None:
    """The classifier with places for the vectors in its prompts; None where no text tower makes it."""
    return old.prompted(slots(old, config)) if isinstance(old, TextHead) else None


def slots(old: TextHead, config: Words) -> Tensor:
    """The prompts of a classifier's words, with places for the vectors: [classes, 1, context]."""
    model: Any = old.model
    count = len(words_of(model, config)) or config.context or RANDOM
    position, own = (config.position, config.per_class) if isinstance(config, Context) else ("end", False)
    return slotted(model.tokenize, old.words, count, position, model.text.context_length, own=own)


class Slots(graft.Graft):
    """On the token embedding: vectors in the places that negative ids name."""

    def enter(self, x: Tensor) -> Tensor:
        """Ids that the embedding knows."""
        return x.clamp(min=0)

    def vectors(self) -> Tensor:
        """What stands in the places, [vectors, width]."""
        raise NotImplementedError(type(self).__name__)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """[n, length] ids, [n, length, width] -> with the vectors in their places."""
        found = self.vectors()[(-1 - x).clamp(min=0)]
        return torch.where((x < 0)[..., None], found.to(y.dtype), y)


class Vectors(Slots):
    """Learned vectors [count, width], or [classes * count, width], in the places that negative ids name."""

    def __init__(self, site: Site, config: object = None) -> None:  # noqa: ARG002 - the site says it all
        super().__init__()
        facts = site.facts
        self.init, self.repeats = list(facts["init"]), max(1, facts["classes"])
        self.context = nn.Parameter(torch.empty(self.repeats * facts["count"], facts["width"]).normal_(std=STD))

    @torch.no_grad()
    def start(self, host: nn.Module, scores: graft.Scores) -> None:  # noqa: ARG002 - the interface
        """From the embeddings of words, where there are any."""
        if self.init:
            self.context.copy_(embedded(host, self.init).repeat(self.repeats, 1))

    def vectors(self) -> Tensor:
        """The context."""
        return self.context


def embedded(host: nn.Module, ids: Sequence[int]) -> Tensor:
    """What a token embedding makes of ids, [ids, width]."""
    weight = graft.stored(host, "weight")
    return weight[torch.tensor(ids, device=weight.device)]
