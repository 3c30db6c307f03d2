"""What trainings start from: a zoo with a tiny network, and what is said while they go on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.hub_server import Hub, serving, use
from vtzoo import talk
from vtzoo.verbs.add import add_backbone
from vtzoo.zoo import Zoo


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """A zoo with a tiny ViT, called `tiny`."""
    made = Zoo.init(tmp_path / "zoo")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "tiny.safetensors")
    add_backbone(name="tiny", arch="test_vit", weights=tmp_path / "tiny.safetensors", zoo=made)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said while it trains."""
    lines: list[str] = []
    monkeypatch.setattr(talk, "say", lines.append)
    return lines


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, which the hub's library asks in this test."""
    from huggingface_hub import close_session

    with serving() as made:
        use(made, tmp_path / "hub-cache", monkeypatch)
        yield made
        close_session()
