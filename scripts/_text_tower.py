"""The text tower: a small open_clip transformer that learns a sentence encoder's embeddings of short phrases."""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

LOG = logging.getLogger("make_clip")
CONTEXT = 32


class Sentences:
    """all-MiniLM-L6-v2 as its card uses it: the mean over tokens of the last layer, of length 1."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def __call__(self, phrases: Sequence[str], batch_size: int = 512) -> Tensor:
        """Embeddings [n, 384]; phrases of like length share a batch."""
        order = sorted(range(len(phrases)), key=lambda i: len(phrases[i]))
        out = torch.empty(len(phrases), self.model.config.hidden_size)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer(
                [phrases[i] for i in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            out[rows] = normalize((hidden.float() * mask).sum(1) / mask.sum(1), dim=-1)
        return out


def directions(embeddings: Tensor, width: int) -> Tensor:
    """The `width` directions [d, width] in which embeddings vary most about zero."""
    return torch.linalg.eigh(embeddings.T @ embeddings)[1][:, -width:].flip(1)


def encode(tower: nn.Module, tokens: Tensor) -> Tensor:
    """The tower's output, computed up to the longest phrase only: causal attention doesn't see what stands behind."""
    length = int((tokens != 0).sum(1).max())
    mask = cast("Tensor", tower.attn_mask)
    tower.attn_mask = mask[:length, :length]
    try:
        return tower(tokens[:, :length])
    finally:
        tower.attn_mask = mask


def start_from(tower: nn.Module, sentences: Sentences, tokenizer: Any) -> None:
    """Give each token of the tower the teacher's embedding of its text, brought to the tower's width and scale."""
    texts = [tokenizer.decoder[i].replace("</w>", "") for i in range(len(tokenizer.decoder))]
    known = sentences(texts, 2048)
    known = known - known.mean(0)
    table: Any = tower.token_embedding
    rows = known @ directions(known, table.embedding_dim)
    with torch.no_grad():
        table.weight.copy_(rows * (0.02 / rows.std()))


def batches(lengths: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled batches of phrases of like length."""
    order = torch.randperm(len(lengths), generator=generator)
    chunks = order.split(size * 16)
    parts = [part for chunk in chunks for part in chunk[lengths[chunk].argsort(stable=True)].split(size)]
    yield from (parts[i] for i in torch.randperm(len(parts), generator=generator).tolist())


def distil(
    tower: nn.Module, tokens: Tensor, targets: Tensor, *, epochs: int, lr: float, batch_size: int = 512
) -> float:
    """Train the tower to point where the targets [n, d] point; gives the mean cosine of the last tenth."""
    generator = torch.Generator().manual_seed(0)
    lengths = (tokens != 0).sum(1)
    steps, done, seen = epochs * math.ceil(len(tokens) / batch_size), 0, list[float]()
    optimizer = torch.optim.AdamW(tower.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + epochs, pct_start=0.05)
    for _ in range(epochs):
        for rows in batches(lengths, batch_size, generator):
            with torch.autocast("cpu", torch.bfloat16):
                given = encode(tower, tokens[rows])
            cosine = cosine_similarity(given.float(), targets[rows], dim=-1).mean()
            optimizer.zero_grad(set_to_none=True)
            (1 - cosine).backward()
            nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            seen.append(cosine.item())
            if done % 100 == 0:
                LOG.info("text tower %d/%d: cosine %.4f", done, steps, sum(seen[-50:]) / 50)
    last = seen[-max(1, len(seen) // 10) :]
    return sum(last) / len(last)
