"""Building a backbone: its name, its size, which classifier it starts with, and what runs on it afterwards."""

import math
from pathlib import Path

import pytest
import timm
import torch

from vtzoo import build, extract, inject
from vtzoo.artifact import go_live, load_plain, open_ref
from vtzoo.backbone import card_of, set_depth
from vtzoo.bases import weights_path
from vtzoo.errors import NotFound, ShapeMismatch, UsageError
from vtzoo.prefix import find
from vtzoo.tensors import TensorFile

NAME = "tf_efficientnet_lite0"


def test_a_fresh_head_starts_near_zero() -> None:
    """The first loss over ten classes is that of a guess, log 10, whatever range timm would have drawn from."""
    model = build(NAME, num_classes=10)
    logits = model(torch.randn(4, 3, 64, 64))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    assert abs(loss.item() - math.log(10)) < 0.5


def test_a_head_that_the_weights_bring_stays() -> None:
    """With as many classes as the file's classifier has, it is the file's."""
    stored = TensorFile(weights_path(card_of(NAME, None)))
    model = build(NAME, num_classes=1000)
    assert torch.equal(model.get_submodule("classifier").weight, stored["classifier.weight"].float())


def test_as_many_classes_as_the_architecture_was_made_for() -> None:
    """Weights without a classifier, 1,000 classes: timm alone would look for the classifier in them."""
    model = build("vit_embedded_64", num_classes=1000)
    assert model.get_submodule("head").weight.shape == (1000, 192)
    assert model.get_submodule("head").weight.abs().max() < 0.1
    assert torch.equal(model.get_parameter("pos_embed"), build("vit_embedded_64").get_parameter("pos_embed"))


def test_weights_of_another_shape_are_refused() -> None:
    """One position's embedding would be spread over all of them without a word."""
    model = build("vit_embedded_64")
    state = {n: t[:, :1] if n == "pos_embed" else t for n, t in model.state_dict().items()}
    with pytest.raises(ShapeMismatch, match=r"pos_embed is \[1, 1, 192\]"):
        load_plain(model, state)


def test_a_delta_at_another_input_size_runs_as_saved(tmp_path: Path) -> None:
    """Built, injected and extracted by hand at 32 px: size and resized tensors travel along, attached and folded."""
    model = build("vit_embedded_64", img_size=32, num_classes=3)
    inject(model, "lora[rank=2]")
    torch.nn.init.normal_(model.get_parameter("blocks.0.mlp.fc1.lora.B"))
    path, x = tmp_path / "small.safetensors", torch.randn(2, 3, 32, 32)
    extract(model, task="x", classes=["a", "b", "c"]).save(path)
    live = go_live(open_ref(str(path)))
    assert live.preprocess.input_size == (3, 32, 32)
    folded = go_live(open_ref(str(path)), plain=True).model(x)
    with torch.inference_mode():
        expected = model.eval()(x)
        assert torch.equal(live.model(x), expected)
        assert (folded - expected).abs().max() < 1e-5


def test_a_folder_that_timm_wrote_runs(tmp_path: Path) -> None:
    """`save_for_hf` repeats the number of classes among the model's arguments."""
    model = timm.create_model("test_resnet", num_classes=4).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    live = go_live(open_ref(str(tmp_path)))
    x = torch.randn(1, 3, 64, 64)
    assert live.task is not None
    assert len(live.task.classes) == 4
    with torch.inference_mode():
        assert torch.equal(live.model(x), model(x))


def test_an_unknown_tag_is_named_with_those_that_exist() -> None:
    """A mistyped tag of a known architecture is a person's error, answered with the nearest real one."""
    with pytest.raises(NotFound, match=r"no weights 'augreg_in1k_' of vit_tiny_patch16_224") as caught:
        card_of("vit_tiny_patch16_224.augreg_in1k_")
    assert "vit_tiny_patch16_224.augreg_in21k" in (caught.value.hint or "")


def test_stochastic_depth_is_what_was_asked_for() -> None:
    """A Swin brings its own and is stilled, so that what is frozen in it is the same in every step; where there is none it is said."""
    args: dict[str, object] = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 4}
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **args)
    swin.requires_grad_(requires_grad=False).get_classifier().requires_grad_()
    own = find(swin)
    assert own is not None
    assert not own.last
    set_depth(swin, 0)
    cut = find(swin)
    assert cut is not None
    assert cut.last
    set_depth(timm.create_model("test_vit", drop_path_rate=0.1), 0.1)
    with pytest.raises(UsageError, match="no stochastic depth"):
        set_depth(timm.create_model("test_vit"), 0.1)
