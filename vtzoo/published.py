"""Whole backbones as others publish them: a repository of the hub, a model of open_clip's list, or a folder on the disk.

source = ["hf-hub:"] org "/" name ["@" revision] | "clip:" NAME "." TAG | path
"""

from dataclasses import dataclass, replace
from pathlib import Path

from vtzoo import clip_config, hub
from vtzoo.artifact import CONFIG, WEIGHTS, described
from vtzoo.bases import weights_path
from vtzoo.clip_card import PREFIX, card_of_file, clip_card
from vtzoo.errors import Corrupt, Mismatch, NotFound
from vtzoo.refs import expanded, is_path
from vtzoo.spec import BackboneCard

PICKLED = "open_clip_pytorch_model.bin"
"""What open_clip wrote before it wrote safetensors."""


@dataclass(frozen=True, slots=True)
class Published:
    """A backbone's card, without what its weights say, and the file that they are in; of a folder the card has no source."""

    card: BackboneCard
    weights: Path


def published(source: str) -> Published:
    """Find a backbone, and fetch it where it must be; a branch of the hub becomes the commit that it is now.

    Raises:
        NotFound: no such repository, revision, model, folder or file.
        Network: it can't be fetched.
        Mismatch: it is neither timm's nor open_clip's.
        UsageError: open_clip is not installed, or the network has no form here.
    """
    if source.startswith(PREFIX):
        card = clip_card(source)
        weights = weights_path(card)
        return Published(replace(card, source=hub.pinned(card.source, weights)), weights)
    return _folder(expanded(source)) if is_path(source) else _repository(hub.SOURCE + source.removeprefix(hub.SOURCE))


def _repository(source: str) -> Published:
    """A timm model of the hub, or where it is none, a model of open_clip."""
    try:
        config = hub.fetch(source, CONFIG)
        card, _ = described({CONFIG: config})
    except (NotFound, Corrupt) as error:
        return _open_clip_repository(source, error)
    source = hub.pinned(source, config)
    if card.arch == clip_config.ARCH and card.model_args.get("text"):  # its file goes by open_clip's name on the hub
        said = f"{source} holds a dual encoder as a timm folder"
        raise Mismatch(said, "fetch it, and give the folder: vtzoo add backbone NAME --from ./FOLDER")
    return Published(replace(card, source=source), hub.fetch(source, WEIGHTS))


def _open_clip_repository(source: str, no_timm: NotFound | Corrupt) -> Published:
    try:
        config = hub.fetch(source, clip_config.CONFIG)
    except NotFound as error:
        if isinstance(no_timm, NotFound):
            raise no_timm from error
        said = f"{source} is no model of timm or open_clip: {no_timm.message}"
        raise Mismatch(said, "see huggingface.co/timm for such") from error
    card = replace(card_of_file(config), source=hub.pinned(source, config))
    return Published(card, weights_path(card))


def _folder(folder: Path) -> Published:
    """A folder that open_clip or timm wrote."""
    if (config := folder / clip_config.CONFIG).is_file():
        safe, pickled = folder / clip_config.WEIGHTS, folder / PICKLED
        return Published(card_of_file(config), pickled if pickled.is_file() and not safe.is_file() else safe)
    if not (folder / CONFIG).is_file():
        said = f"{folder} has neither {clip_config.CONFIG} nor {CONFIG}"
        raise NotFound(said, "give a folder that open_clip, timm or vtzoo fold wrote")
    card, _ = described({CONFIG: folder / CONFIG})
    return Published(card, folder / WEIGHTS)
