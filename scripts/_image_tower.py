"""The image tower: a frozen trunk, its projection to the words' space by ridge regression, and the temperature."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

SIDE = 128
RIDGE = 3.0
SCALES = torch.logspace(0.5, 2, 31).tolist()  # 3 to 100, the largest that CLIP allows


@torch.inference_mode()
def pooled(trunk: nn.Module, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
    """The trunk's features [n, d] of square drawings, whole, each value brought from 0..255 to -1..1."""
    rows: list[Tensor] = []
    for start in range(0, len(images), batch_size):
        part = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images[start : start + batch_size]]
        x = torch.from_numpy(np.stack([np.asarray(image) for image in part])).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            rows.append(trunk((x / 127.5 - 1).contiguous(memory_format=torch.channels_last)).float())
    return torch.cat(rows)


def least_squares(x: Tensor, y: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Weight [k, d] and bias [k] that bring features x [n, d] nearest to y [n, k], both seen from their means.

    (X'X + ridge * mean(diag X'X) * I) W' = X'Y with centred X and Y.
    """
    mean, x = x.mean(0), x - x.mean(0)
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(0))).T.contiguous()
    return weight, -weight @ mean


def contrast(logits: Tensor, said: Tensor) -> Tensor:
    """CLIP's loss of logits [b, b] where rows of `said` [b, k], of length 1, that are (nearly) equal share an answer."""
    same = (said @ said.T > 0.95).float()
    same = same / same.sum(1, keepdim=True)
    both = (same * log_softmax(logits, 1)).sum() + (same * log_softmax(logits.T, 1)).sum()
    return -both / (2 * len(said))


def best_scale(image: Tensor, text: Tensor, batch_size: int = 512) -> float:
    """What CLIP's loss over the pairs of features [n, k] wants their cosines multiplied by."""
    parts = torch.randperm(len(image), generator=torch.Generator().manual_seed(0)).split(batch_size)
    image, text = normalize(image, dim=-1), normalize(text, dim=-1)
    cosines = [(image[rows] @ text[rows].T, text[rows]) for rows in parts]
    return min(SCALES, key=lambda scale: sum(float(contrast(scale * c, said)) * len(said) for c, said in cosines))
