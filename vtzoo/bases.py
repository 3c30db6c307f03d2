"""A backbone's own tensors, from wherever its card says they are; lazy, and without timm."""

from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path

from torch import Tensor

from vtzoo.errors import Network, NotFound, UsageError
from vtzoo.spec import BackboneCard
from vtzoo.tensors import Lazy, TensorFile
from vtzoo.zoo import Zoo


def weights_path(card: BackboneCard, zoo: Zoo | None = None) -> Path:
    """The file behind a card's `source`, fetched from the hub when it is not there yet.

    Raises:
        NotFound: the object or package resource is missing.
        Network: the hub can't be reached.
        UsageError: a source of an unknown kind.
    """
    kind, _, rest = card.source.partition(":")
    if kind == "object":
        return (zoo or Zoo.find()).object(rest.removeprefix("sha256:"))
    if kind == "package":
        package, _, resource = rest.partition("/")
        with as_file(files(package) / resource) as path:
            if not path.is_file():
                raise NotFound(f"package {package} carries no {resource}", "reinstall vtzoo")
            return path
    if kind == "hf-hub":
        return _fetch(*rest.partition("@")[::2])
    raise UsageError(
        f"'{card.name}' has no weights (source '{card.source}')", "vtzoo add backbone NAME --arch … --weights FILE"
    )


def open_base(card: BackboneCard, zoo: Zoo | None = None) -> Mapping[str, Tensor]:
    """The backbone's tensors by timm name, head left out; each is read when asked for."""
    source = TensorFile(weights_path(card, zoo))
    inside = tuple(h + "." for h in card.head)
    names = [n for n in source if n not in card.head and not (inside and n.startswith(inside))]
    shapes, dtypes = {n: source.shape(n) for n in names}, {n: source.dtype(n) for n in names}
    return Lazy({n: (lambda n=n: source[n]) for n in names}, shapes, dtypes)


def _fetch(repo: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(repo, "model.safetensors", revision=revision or None))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        why = str(error).strip().split("\n")[0]
        raise Network(
            f"{repo} could not be fetched from the hub: {why}",
            "connect, or: vtzoo add backbone NAME --arch ARCH --weights FILE",
        ) from error
