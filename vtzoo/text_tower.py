"""The text tower of a dual encoder: open_clip's transformer over token ids, its attention in plain linears, and its tokenizer.

open_clip keeps queries, keys and values in one parameter that `nn.MultiheadAttention` reads and never calls. Here they are linears that
are called, so that every method for linears acts on them; the numbers are the same.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.clip_config import check_tokenizer
from vtzoo.errors import Mismatch, UsageError

EMBEDDING, BLOCKS = "text.token_embedding", "text.transformer.resblocks"
"""Where token ids become vectors, and the numbered blocks behind, in a dual encoder."""
ENDS = ("argmax", "eos")
"""Ways to pool that look at one token alone, so that under a causal mask what stands behind it makes no difference."""
ACTS = {"gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh"), "silu": nn.SiLU, "relu": nn.ReLU}


MOST = {"context_length": 1 << 12, "layers": 1 << 9, "width": 1 << 14}
"""What no text tower has more of: a card may come from elsewhere, and a mask has as many numbers as the context's square."""


class Attention(nn.Module):
    """Multi-head self-attention, called as open_clip calls `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(
        self, x: Tensor, _keys: Tensor, _values: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[batch, n, width] -> the same; queries, keys and values are of `x`.

        Args:
            x: the tokens.
            need_weights: must be False.
            attn_mask: added to the products, [n, n], of a longer text perhaps, or [batch * heads, n, n].
        """
        assert not need_weights
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if attn_mask is not None:
            whole = attn_mask.ndim == 3
            attn_mask = attn_mask.reshape(batch, self.heads, count, count) if whole else attn_mask[:count, :count]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(y.transpose(1, 2).reshape(batch, count, width)), None


def build_text(config: Mapping[str, Any], embed_dim: int) -> nn.Module:
    """A text tower: token ids [n, length] -> embeddings [n, embed_dim], not normalised; shorter sequences than its context, too.

    Args:
        config: what open_clip's `TextTransformer` takes; `act` and `eps` stand for its layers.
        embed_dim: width of what it gives.

    Raises:
        UsageError: open_clip is not installed, or doesn't take this.
    """
    own = dict(config)
    if large := [k for k, most in MOST.items() if isinstance(own.get(k), int) and own[k] > most]:
        raise UsageError(f"there is no text tower with {large[0]}={own[large[0]]}", f"{MOST[large[0]]} at most")
    act, eps = own.pop("act", "gelu"), own.pop("eps", 1e-5)
    made = _open_clip().transformer.TextTransformer
    try:
        layer = _quick_gelu() if act == "quick_gelu" else ACTS[act]
        tower = made(output_dim=embed_dim, act_layer=layer, norm_layer=partial(nn.LayerNorm, eps=eps), **own)
    except (TypeError, AssertionError, KeyError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UsageError(
            f"there is no text tower of {own}: {error}", "take the arguments of an open_clip model"
        ) from error
    for block in tower.transformer.resblocks:
        block.attn = _unfused(block.attn)
    return tower


def causal(tower: Any) -> bool:
    """Whether what stands behind the end of a text makes no difference, so that it may be cut off."""
    return tower.attn_mask is not None and tower.pool_type in ENDS and tower.cls_emb is None


def tokenizer(model_args: Mapping[str, Any]) -> Any:
    """Texts -> token ids [n, length], as open_clip's tokenizers do it; called with `context_length`.

    Raises:
        Mismatch: the hub's can't be fetched.
        UsageError: open_clip, or what a hub's tokenizer needs, is not installed.
    """
    _open_clip()
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    name, context = str(model_args.get("tokenizer", "")), model_args["text"].get("context_length", 77)
    more = dict(model_args.get("tokenizer_args", {}))
    check_tokenizer(name, more)
    if not name:
        return SimpleTokenizer(context_length=context, **more)
    try:
        return HFTokenizer(name, context_length=context, **more)
    except (ImportError, ValueError) as error:  # transformers says by the latter, too, what it lacks
        why = str(error).strip().splitlines()[:1]
        raise UsageError(
            f"the tokenizer {name} can't be made: {' '.join(why)}", "pip install transformers sentencepiece"
        ) from error
    except OSError as error:
        why = str(error).splitlines()[0]
        raise Mismatch(f"the tokenizer {name} can't be fetched: {why}", "repeat it with a network") from error


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UsageError("a text tower needs open_clip", "pip install 'vtzoo[clip]'") from error
    return open_clip


def _quick_gelu() -> type[nn.Module]:
    return cast("type[nn.Module]", _open_clip().transformer.QuickGELU)


def _unfused(old: nn.MultiheadAttention) -> nn.Module:
    if not isinstance(old, nn.MultiheadAttention):
        raise UsageError(f"the text tower's attention is a {type(old).__name__}", "use a model with a plain text tower")
    new = Attention(old.embed_dim, old.num_heads)
    named = dict(old.named_parameters())
    pairs = {"in_proj_weight": new.qkv.weight, "in_proj_bias": new.qkv.bias}
    pairs |= {"out_proj.weight": new.proj.weight, "out_proj.bias": new.proj.bias}
    for name, place in pairs.items():
        place.data = named[name].data
    return new
