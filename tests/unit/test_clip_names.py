"""Names of open_clip's tensors: what becomes of them, and that nothing is read or dropped on the way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vtzoo.clip_names import converted
from vtzoo.errors import Corrupt, ShapeMismatch
from vtzoo.tensors import Lazy, TensorFile, dtype_of, pieces_of, shape_of, write

ARGS: dict[str, Any] = {"embed_dim": 3, "proj": "linear", "trunk_args": {}}


def _vit() -> dict[str, Tensor]:
    shapes = {
        "visual.class_embedding": (4,), "visual.positional_embedding": (5, 4), "visual.proj": (4, 3), "visual.conv1.weight": (4, 3, 2, 2),
        "visual.ln_pre.weight": (4,), "visual.ln_post.bias": (4,), "visual.transformer.resblocks.10.attn.in_proj_weight": (12, 4),
        "visual.transformer.resblocks.10.ln_2.bias": (4,), "visual.transformer.resblocks.10.mlp.c_proj.weight": (4, 16),
        "visual.transformer.resblocks.10.ls_1.gamma": (4,), "positional_embedding": (7, 6), "token_embedding.weight": (9, 6),
        "transformer.resblocks.0.attn.out_proj.bias": (6,), "transformer.resblocks.0.attn.in_proj_bias": (18,), "text_projection": (6, 3),
        "ln_final.weight": (6,), "logit_scale": (1,), "attn_mask": (7, 7), "context_length": (),
    }  # fmt: skip
    return {n: torch.randn(s) for n, s in shapes.items()}


def test_names_of_a_transformer() -> None:
    """The trunk by timm's names at the root, the text tower below text.; older files' masks and sizes are not weights."""
    stored = _vit()
    made = converted(stored, ARGS)
    assert set(made) == {
        "cls_token", "pos_embed", "image_proj.weight", "patch_embed.proj.weight", "norm_pre.weight", "norm.bias", "blocks.10.attn.qkv.weight",
        "blocks.10.norm2.bias", "blocks.10.mlp.fc2.weight", "blocks.10.ls1.gamma", "text.positional_embedding", "text.token_embedding.weight",
        "text.transformer.resblocks.0.attn.proj.bias", "text.transformer.resblocks.0.attn.qkv.bias", "text.text_projection",
        "text.ln_final.weight", "logit_scale",
    }  # fmt: skip
    assert all(tuple(made[n].shape) == shape_of(made, n) for n in made)
    assert torch.equal(made["image_proj.weight"], stored["visual.proj"].T)
    assert torch.equal(made["cls_token"][0, 0], stored["visual.class_embedding"])
    assert torch.equal(made["pos_embed"][0], stored["visual.positional_embedding"])
    assert torch.equal(made["text.text_projection"], stored["text_projection"])
    assert torch.equal(made["logit_scale"], stored["logit_scale"][0])


def test_a_file_of_our_names_is_given_as_it_is() -> None:
    """The same mapping, whatever the arguments say."""
    stored = {"blocks.0.attn.qkv.weight": torch.zeros(1), "image_proj.weight": torch.zeros(1)}
    assert converted(stored, ARGS) is stored


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """Names, shapes and dtypes come from the header; a part of a tensor is read as a part where its entries keep their order."""
    stored = {n: t.half() for n, t in _vit().items()}
    path = tmp_path / "f.safetensors"
    write(path, stored, {})
    read: list[str] = []
    file = TensorFile(path)
    spied = Lazy(
        {n: (lambda n=n: read.append(n) or file[n]) for n in file},
        {n: file.shape(n) for n in file},
        {n: file.dtype(n) for n in file},
        {n: file.pieces(n) for n in file},
    )
    made = converted(spied, ARGS)
    assert all(dtype_of(made, n) == torch.float16 and shape_of(made, n) is not None for n in made)
    assert not read
    part = pieces_of(made, "pos_embed")
    assert part is not None
    assert torch.equal(part(3, 9), stored["visual.positional_embedding"].flatten()[3:9])
    assert pieces_of(made, "image_proj.weight") is None
    assert made["cls_token"].shape == (1, 1, 4)
    assert read == ["visual.class_embedding"]


def test_a_convolution_without_a_norm_behind_it_gets_a_bias_of_zeros() -> None:
    """timm's network has one there; open_clip's has none."""
    stored = {n: t.half() for n, t in _vit().items() if "ln_pre" not in n}
    made = converted(stored, ARGS)
    assert torch.equal(made["patch_embed.proj.bias"], torch.zeros(4, dtype=torch.float16))
    assert (shape_of(made, "patch_embed.proj.bias"), dtype_of(made, "patch_embed.proj.bias")) == ((4,), torch.float16)


def test_a_norm_behind_the_pooling() -> None:
    """timm calls it fc_norm."""
    made = converted(_vit(), {**ARGS, "trunk_args": {"global_pool": "avg", "fc_norm": True}})
    assert "fc_norm.bias" in made
    assert "norm.bias" not in made


@pytest.mark.parametrize(
    ("name", "shape", "proj", "found"),
    [
        ("visual.trunk.head.weight", (3, 4), "linear-bias", "image_proj.weight"),
        ("visual.trunk.head.fc.weight", (3, 4), "linear-bias", "image_proj.weight"),
        ("visual.trunk.classifier.weight", (3, 4), "linear-bias", "image_proj.weight"),
        ("visual.trunk.head.fc.weight", (3, 4), "none", "head.fc.weight"),
        ("visual.head.proj.weight", (3, 4), "linear", "image_proj.weight"),
        ("visual.head.mlp.fc2.weight", (3, 4), "mlp", "image_proj.fc2.weight"),
        ("visual.trunk.stages.0.weight", (3, 4), "linear", "stages.0.weight"),
    ],
)
def test_names_of_a_timm_network(name: str, shape: tuple[int, ...], proj: str, found: str) -> None:
    """The trunk's own names; a classifier where it is the projection."""
    stored = {name: torch.zeros(shape), "text.ln_final.weight": torch.zeros(2)}
    made = converted(stored, {**ARGS, "proj": proj})
    assert set(made) == {found, "text.ln_final.weight"}


@pytest.mark.parametrize(
    ("more", "error", "why"),
    [
        ({"visual.blocks.0.weight": 1}, ShapeMismatch, "visual.blocks.0.weight"),
        ({"module.logit_scale": 1}, ShapeMismatch, "module.logit_scale"),
        ({"text_model.embeddings.weight": 1}, ShapeMismatch, "text_model"),
        ({"text.transformer.resblocks.0.attn.ln_q.weight": 1}, ShapeMismatch, "ln_q"),
        ({"text.ln_final.weight": 6}, Corrupt, "twice"),
    ],
)
def test_what_is_unknown_is_refused(more: dict[str, int], error: type[Exception], why: str) -> None:
    """A tensor that no such model has, and one that is there twice."""
    with pytest.raises(error, match=why):
        converted({**_vit(), **{n: torch.zeros(size) for n, size in more.items()}}, ARGS)


def test_a_trunk_without_a_projection_is_refused() -> None:
    """Where the classifier should be one and there is none of that width."""
    with pytest.raises(ShapeMismatch, match="no projection to 3 features"):
        converted({"visual.trunk.head.weight": torch.zeros(5, 4)}, {**ARGS, "proj": "linear-bias"})
