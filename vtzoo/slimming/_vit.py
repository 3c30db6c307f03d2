"""Vision transformers whose blocks are an attention and an MLP: hidden units, heads with the channels of the residual stream, blocks."""

from collections.abc import Sequence
from typing import Any

from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vtzoo.slimming._frame import Frame, Member, Sizes


def frame(model: nn.Module) -> Frame | None:
    """What is known of a transformer; None where it is no plain one."""
    if type(model) is not VisionTransformer or model.attn_pool is not None or not all(map(_plain, model.blocks)):
        return None
    blocks: Any = model.blocks
    heads, width = blocks[0].attn.num_heads, blocks[0].attn.head_dim
    inner = [_inner(model, i) for i in range(len(blocks))]
    taken = {(m.name, m.dim) for pair in inner for group in pair for m in group}
    state = model.state_dict()
    stream = [
        Member(n, d, (model.embed_dim,)) for n, t in state.items() for d in _stream(model, n, t) if (n, d) not in taken
    ]
    units = blocks[0].mlp.fc1.out_features

    def arguments(sizes: Sizes, gone: Sequence[str]) -> dict[str, Any]:
        few = round(sizes.width * heads)
        hidden = max(1, round(sizes.hidden * units))
        return {
            "depth": len(blocks) - len(gone),
            "num_heads": few,
            "embed_dim": few * width,
            "mlp_ratio": hidden / (few * width),
        }

    names = [f"blocks.{i}" for i in range(len(blocks))]
    groups = {"hidden": [hidden for hidden, _ in inner], "width": [*(own for _, own in inner), stream]}
    return Frame(groups=groups, rows=[names], spare=names[:], steps=heads, arguments=arguments)


def _plain(block: nn.Module) -> bool:
    return type(block) is Block and type(block.attn) is Attention and type(block.mlp) is Mlp and block.attn.gate is None


def _inner(model: VisionTransformer, i: int) -> tuple[list[Member], list[Member]]:
    """A block's hidden units, and its heads."""
    block: Any = model.blocks[i]
    state, at, mlp = model.state_dict(), f"blocks.{i}.attn.", f"blocks.{i}.mlp."
    row, units = (block.attn.num_heads, block.attn.head_dim), (block.mlp.fc1.out_features,)
    heads = [Member(at + n, 0, (3, *row), 1) for n in ("qkv.weight", "qkv.bias") if at + n in state]
    heads += [
        Member(at + "proj.weight", 1, row),
        *(Member(at + n, 0, row) for n in ("norm.weight", "norm.bias") if at + n in state),
    ]
    hidden = [
        Member(mlp + n, 0, units) for n in ("fc1.weight", "fc1.bias", "norm.weight", "norm.bias") if mlp + n in state
    ]
    return [*hidden, Member(mlp + "fc2.weight", 1, units)], heads


def _stream(model: VisionTransformer, name: str, tensor: Tensor) -> list[int]:
    """Dimensions of a tensor that are channels of the residual stream, if they aren't a block's own."""
    if name.startswith("patch_embed.proj"):
        return [0]
    if tensor.ndim == 3 or name.startswith(
        "head."
    ):  # tokens and positions [1, n, width]; the classifier [classes, width]
        return [tensor.ndim - 1] if tensor.ndim > 1 else []
    if ".q_norm." in name or ".k_norm." in name:
        return []
    return [d for d, n in enumerate(tensor.shape) if n == model.embed_dim or (".qkv." in name and d == 1)]
