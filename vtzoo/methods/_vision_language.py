"""Shared by the methods that prompt both towers of a dual encoder from common tensors: vectors among the words, tokens beside the patches.

What is common hangs on the root, so that an image tower alone, without its text tower, can make its own prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from vtzoo import graft
from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._language import Slots, embedded, spoken
from vtzoo.methods._prompts import AXES, Prompt, counting, fits
from vtzoo.speech import said, slotted
from vtzoo.text_head import TextHead
from vtzoo.text_tower import BLOCKS, EMBEDDING

BEFORE, AFTER = "norm_pre", "norm"
"""Between which layers of the image tower the prompts stand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """Knobs of prompts in both towers.

    Attributes:
        init: words of which the first vectors are learned and the rest stays as it is; empty for random vectors.
        tokens: prompts in each tower.
    """

    init: str = "a photo of a"
    tokens: Annotated[int, Field(ge=1)] = 2


class Coupled(graft.Shared):
    """What both towers' prompts are made of; where there is no text tower, the image tower's prompts as they have become.

    Attributes:
        prompts: of the text tower, [depth, tokens, width of the text tower].
        ready: of the image tower, [depth, tokens, width of the trunk], in place of all else where there is no text tower.
    """

    prompts: nn.Parameter

    def __init__(self, sites: Sequence[Site], config: Any, *, alone: bool | None = None) -> None:
        super().__init__()
        facts, self.sites, self.config = sites[0].facts, tuple(sites), config
        self.alone = all(s.facts["role"] != "words" for s in sites) if alone is None else alone
        text, image, self.depth = (int(facts[k]) for k in ("text", "image", "depth"))
        if self.alone:
            tokens = next(s.facts["tokens"] for s in sites if s.facts["role"] == "come")
            self.ready = nn.Parameter(torch.zeros(self.depth, tokens, image))
        else:
            self.create(text, image)

    def create(self, text: int, image: int) -> None:
        """Make the tensors for towers of these widths."""
        raise NotImplementedError(f"{type(self).__name__}.create({text}, {image})")

    def text(self, level: int) -> Tensor:
        """The prompts of the text tower at a block, [tokens, width of the text tower]."""
        return self.prompts[level]

    def visual(self, level: int) -> Tensor:
        """Those of the image tower, [tokens, width of the trunk]."""
        raise NotImplementedError(f"{type(self).__name__}.visual({level})")

    def image(self, level: int) -> Tensor:
        """The same, made or ready."""
        return self.ready[level] if self.alone else self.visual(level)

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A file's tensors, or without a text tower what the image tower's prompts become with them."""
        if not self.alone or "ready" in tensors:
            return tensors
        whole = type(self)(self.sites, self.config, alone=False).eval()
        if {n: t.shape for n, t in whole.state_dict().items()} != {n: t.shape for n, t in tensors.items()}:
            return tensors  # which will be found not to fit
        whole.load_state_dict(tensors, assign=True)
        return {"ready": torch.stack([whole.visual(i) for i in range(self.depth)])}


class Graft(Prompt, Slots):
    """By its role: vectors among the words or in front of a text block; prompts where they come in, in front of a block, or their end."""

    def __init__(self, site: Site, config: object = None) -> None:  # noqa: ARG002 - the site knows
        super().__init__(site, int(site.facts["tokens"]), 0.0, own=False)
        self.role, self.level = str(site.facts["role"]), int(site.facts["level"])
        self.init = list(site.facts.get("init", ()))

    @torch.no_grad()
    def start(self, host: nn.Module, scores: graft.Scores) -> None:  # noqa: ARG002 - the interface
        """From the embeddings of words, where there are any."""
        if self.init:
            self.shared.prompts[0].copy_(embedded(host, self.init))

    def vectors(self) -> Tensor:
        """The first prompts of the text tower."""
        return self.shared.text(0)

    def enter(self, x: Tensor) -> Tensor:
        """Put the prompts in, or in the place of what became of those before."""
        if self.role == "words":
            return super().enter(x)
        if self.role in ("come", "text", "image"):
            own = (self.shared.text if self.role == "text" else self.shared.image)(self.level)
            rest = self.at if self.role == "come" else self.at + self.tokens
            return torch.cat([x[:, : self.at], own.to(x.dtype).expand(x.shape[0], -1, -1), x[:, rest:]], dim=1)
        return x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Put the vectors among the words; drop the prompts in the end."""
        if self.role == "words":
            return super().leave(x, y)
        return self.drop(y) if self.role == "go" else y


def prompted(old: nn.Module, config: Prompts) -> TextHead | None:
    """The classifier with places for the vectors in its prompts, in front of what else the words say; None where no text tower makes it.

    Raises:
        UsageError: there are fewer words than vectors.
    """
    return old.prompted(_ids(old, config)) if isinstance(old, TextHead) else None


def places(anatomy: Anatomy, config: Prompts, method: str, *, depth: int = 1, images: int = 0) -> list[Site]:
    """Where prompts come in, go on and go out in both towers.

    Args:
        anatomy: of the dual encoder.
        config: of the text tower's prompts.
        method: whose they are.
        depth: so many blocks of each tower have prompts of their own.
        images: prompts in the image tower; as many as in the text tower for 0.

    Raises:
        UsageError: there is no text tower that was told names, or the image tower takes no further tokens.
    """
    head = spoken(anatomy, method)
    model: Any = anatomy.model
    image = _trunk(anatomy, method)
    texts = [f"{BLOCKS}.{i}" for i in range(len(model.text.transformer.resblocks))]
    depth = min(depth, len(texts), len(image) - 2)
    widths = {"text": int(model.text.token_embedding.embedding_dim), "image": image[0].shape[-1], "depth": depth}
    at = int((_ids(head, config)[0, 0] == -1).nonzero()[0])

    def site(name: str, role: str, level: int = 0, **more: Any) -> Site:
        text = role in ("words", "text")
        kind, shape = ("params", ()) if text else ("module", anatomy.seen[name].y[1:])
        place = (
            {"prefix": at, "tokens": config.tokens}
            if text
            else {"prefix": anatomy.prefix, "tokens": images or config.tokens}
        )
        return Site(name=name, kind=kind, shape=shape, facts={"role": role, "level": level, **place, **widths, **more})

    first, *blocks, last = (s.name for s in image)
    own = range(1, depth)
    inside = [
        site(n, "image" if i in own else "pass", i)
        for i, n in enumerate(blocks)
        if i in own or counting(anatomy.modules[n])
    ]
    seen = [site(first, "come"), *inside, site(last, "go")]
    _check(anatomy, seen, method)
    words = _words(model, config)[: config.tokens]
    return [site(EMBEDDING, "words", init=words), *(site(texts[i], "text", i) for i in own), *seen]


def _words(model: Any, config: Prompts) -> list[int]:
    """The token ids that prompts start with, of which the first are learned."""
    if not config.init:
        return []
    ids = said(model.tokenize, config.init, model.text.context_length).tolist()
    if len(ids) < config.tokens:
        raise UsageError(
            f"tokens={config.tokens}, and '{config.init}' has {len(ids)}",
            f"{len(ids)} at most, or random vectors: init=",
        )
    return ids


def _ids(head: TextHead, config: Prompts) -> Tensor:
    """Each class's prompt, [classes, 1, context]: places for the vectors, the words behind them, the name."""
    words = _words(head.model, config)
    count = len(words) or config.tokens
    ids = slotted(head.model.tokenize, head.words, count, "end", head.model.text.context_length)
    for k in range(config.tokens, count):
        ids[ids == -1 - k] = words[k]
    return ids


def _trunk(anatomy: Anatomy, method: str) -> list[Site]:
    """The image tower's layer before its blocks, these, and the layer behind them.

    Raises:
        UsageError: no one sequence of tokens passes them.
    """
    seen = anatomy.seen
    names = [BEFORE, *(b.name for b in anatomy.blocks), AFTER]
    if not all(n in seen and len(seen[n].x) == AXES and seen[n].x == seen[n].y == seen[BEFORE].y for n in names):
        raise _unfit(anatomy, method)
    return [anatomy.module(n) for n in names]


def _check(anatomy: Anatomy, sites: Sequence[Site], method: str) -> None:
    """Try the prompts in the image tower.

    Raises:
        UsageError: its blocks take a fixed number of tokens.
    """
    like = next(anatomy.model.parameters())
    shared = Coupled(sites, None).to(like.device, like.dtype)

    def trial(site: Site, _: object) -> Graft:
        child = Graft(site)
        child.share(shared)
        return child

    if not fits(anatomy, sites, trial, None):
        raise _unfit(anatomy, method)


def _unfit(anatomy: Anatomy, method: str) -> UsageError:
    return UsageError(
        f"{method} puts tokens beside the patches, and {type(anatomy.model).__name__} does not take one sequence of any length through all its blocks",
        "use coop, which leaves the image tower alone",
    )
