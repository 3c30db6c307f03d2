"""Backbones of the Hugging Face Hub, from a server on loopback: what is fetched, what is remembered, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file, save_file

import vtzoo.hub
from tests.hub_server import Hub
from vtzoo import build, machine
from vtzoo.bases import weights_path
from vtzoo.errors import Corrupt, Mismatch, Network, NotFound, Resources, UsageError
from vtzoo.hub import fetch, pinned, place
from vtzoo.identity import CARD
from vtzoo.live import extract, inject
from vtzoo.spec import BackboneCard
from vtzoo.verbs.add import add_backbone, add_published
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

REPO = "lab/tiny"
SOURCE = f"hf-hub:{REPO}"
README = b"---\nlicense: cc-by-4.0\nlibrary_name: timm\n---\n# tiny\n"


def _config(arch: str = "test_vit", **more: Any) -> bytes:
    shown = {"input_size": [3, 160, 160], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    return json.dumps(
        {"architecture": arch, "num_classes": 7, "pretrained_cfg": {**shown, "crop_pct": 0.9}, **more}
    ).encode()


def _weights(path: Path, seed: int = 0) -> bytes:
    torch.manual_seed(seed)
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), path)
    return path.read_bytes()


@pytest.fixture
def commit(hub: Hub, tmp_path: Path) -> str:
    """The one commit of a timm model's repository."""
    files = {"config.json": _config(), "README.md": README, "model.safetensors": _weights(tmp_path / "w.safetensors")}
    return hub.add(REPO, files)


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """An empty zoo."""
    return Zoo.init(tmp_path / "zoo")


def _put(zoo: Zoo, source: str = SOURCE, **facts: str) -> BackboneCard:
    entry = zoo.put("backbones", "tiny", {"arch": "test_vit", "source": source, **facts})
    return BackboneCard.of("tiny", entry.facts)


def test_first_use_fetches_and_the_second_moves_no_byte(hub: Hub, commit: str, zoo: Zoo, said: list[str]) -> None:
    """The size is told before; of a branch only the commit is asked again, of a commit nothing."""
    _put(zoo)
    model = build("tiny", zoo=zoo)
    size = len(hub.repos[REPO].commits[commit]["model.safetensors"].data)
    assert hub.moved("/cdn/") == size
    assert said == [f"fetching {REPO}@{commit[:7]}, model.safetensors: {size / 1e6:.1f} MB"]
    again = build("tiny", zoo=zoo)
    assert hub.moved("/cdn/") == size
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    asked = len(hub.seen)
    weights_path(_put(Zoo.init(zoo.root.parent / "other"), f"{SOURCE}@{commit}"))
    assert len(hub.seen) == asked


def test_a_delta_remembers_the_commit(hub: Hub, commit: str, zoo: Zoo, tmp_path: Path) -> None:
    """What was trained on a branch stands on the weights that it had then, after the branch has moved on."""
    _put(zoo)
    model = build("tiny", zoo=zoo)
    first = model.blocks[0].attn.qkv.weight.clone()
    inject(model, "lora[rank=2]")
    delta = extract(model)
    assert delta.backbone.source == f"{SOURCE}@{commit}"
    assert "digest" not in delta.backbone.json()
    hub.add(REPO, {"model.safetensors": _weights(tmp_path / "new.safetensors", seed=1)})
    assert torch.equal(load_file(weights_path(delta.backbone, zoo))["blocks.0.attn.qkv.weight"], first)
    assert not torch.equal(build("tiny", zoo=zoo).blocks[0].attn.qkv.weight, first)
    assert getattr(build("tiny", zoo=zoo), CARD).source != delta.backbone.source


@pytest.mark.parametrize("known", [True, False], ids=["right", "wrong"])
def test_the_digest_of_an_entry_is_checked(hub: Hub, commit: str, zoo: Zoo, known: bool) -> None:
    """Weights of another digest are refused, when they arrive and when they are found in the cache."""
    digest = hub.repos[REPO].commits[commit]["model.safetensors"].sha256
    card = _put(zoo, digest=digest if known else "0" * 64)
    if known:
        assert weights_path(card, zoo) == weights_path(card, zoo)
        return
    for _ in range(2):
        with pytest.raises(Mismatch, match="is not the one that was known") as refused:
            weights_path(card, zoo)
    assert refused.value.exit_code == 4
    assert hub.moved("/cdn/") == len(hub.repos[REPO].commits[commit]["model.safetensors"].data)


def test_without_links_the_digest_is_that_of_the_content(
    hub: Hub, commit: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a system has no links, the cache's file bears no digest in its name."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    blob = hub.repos[REPO].commits[commit]["model.safetensors"]
    for _ in range(2):
        assert not weights_path(_put(zoo, digest=blob.sha256), zoo).is_symlink()
        zoo.remove(zoo.resolve("tiny"))
    with pytest.raises(Mismatch):
        weights_path(_put(zoo, digest="0" * 64), zoo)


def test_bytes_that_were_flipped_are_noticed(hub: Hub, commit: str, zoo: Zoo) -> None:
    """A damaged file is refused and does not stay in the cache; the next try has the whole one."""
    card = _put(zoo)
    hub.fault = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(Corrupt, match="arrived damaged"):
        weights_path(card, zoo)
    hub.fault = None
    assert weights_path(card, zoo).read_bytes() == hub.repos[REPO].commits[commit]["model.safetensors"].data


@pytest.mark.parametrize("links", [True, False])
def test_a_branch_that_moves_on_meanwhile(
    hub: Hub, commit: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Between the question and the download there is a new commit: its file is taken for what it is, not for a damaged one."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    new = _weights(tmp_path / "new.safetensors", seed=1)
    ask = vtzoo.hub.told

    def told(*args: str) -> Any:
        said = ask(*args)
        hub.add(REPO, {"model.safetensors": new})
        return said

    monkeypatch.setattr(vtzoo.hub, "told", told)
    path = weights_path(_put(zoo), zoo)
    assert path.read_bytes() == new
    assert path.parent.name == hub.repos[REPO].refs["main"] != commit


def test_a_download_that_is_cut_is_told(
    hub: Hub, commit: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When no more bytes come, however often, it is a network's failure, and nothing is left that is taken for whole."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fault = lambda data: data[: len(data) // 2]
    with pytest.raises(Network, match=f"{REPO} could not be fetched") as refused:
        weights_path(_put(zoo), zoo)
    assert refused.value.exit_code == 6
    assert not list((tmp_path / "hub-cache").rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (f"{SOURCE}@v9", NotFound, "has no revision 'v9'"),
        (f"{SOURCE}@{'1' * 40}", NotFound, "has no revision"),
        ("hf-hub:lab/nothing", NotFound, "no repository lab/nothing"),
        ("hf-hub:lab/empty", NotFound, "no such file: model.safetensors"),
        ("hf-hub:lab/gated", Network, "is gated"),
        ("hf-hub:lab/../up", UsageError, "names no repository"),
        ("hf-hub:nobody", UsageError, "names no repository"),
        ("hf-hub:lab/tiny@", UsageError, "names no repository"),
        ("hf-hub:lab/tiny@../../x", UsageError, "names no repository"),
    ],
)
def test_refusals_say_what_to_do(
    hub: Hub, commit: str, zoo: Zoo, source: str, error: type[Exception], said: str
) -> None:
    """A revision, a repository or a file that is not there, one that is closed, and what is no name at all."""
    hub.add("lab/empty", {"config.json": b"{}"})
    hub.add("lab/gated", {"model.safetensors": b"x"})
    hub.repos["lab/gated"].gated = True
    with pytest.raises(error, match=said) as refused:
        weights_path(_put(zoo, source), zoo)
    assert refused.value.hint


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-Etag"])
@pytest.mark.parametrize("value", ["", "../../../up", "a/b"])
def test_headers_that_would_become_paths(
    hub: Hub, commit: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch, header: str, value: str
) -> None:
    """A server whose commit or etag is none is no hub; nothing is written."""
    answer = hub.RequestHandlerClass._file
    monkeypatch.setattr(
        hub.RequestHandlerClass, "_file", lambda self, data, said: answer(self, data, {**said, header: value})
    )
    with pytest.raises(Network, match="no hub"):
        weights_path(_put(zoo), zoo)
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_offline_takes_what_was_fetched_and_asks_nobody(
    hub: Hub, commit: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VTZOO_OFFLINE: refused while it is not in the cache, used afterwards, by branch and by commit; no request is made."""
    card = _put(zoo)
    monkeypatch.setenv("VTZOO_OFFLINE", "1")
    with pytest.raises(Network, match="offline") as refused:
        weights_path(card, zoo)
    assert (refused.value.exit_code, hub.seen) == (6, [])
    assert "vtzoo add backbone" in refused.value.hint
    monkeypatch.delenv("VTZOO_OFFLINE")
    path = weights_path(card, zoo)
    asked = len(hub.seen)
    monkeypatch.setenv("VTZOO_OFFLINE", "yes")
    assert weights_path(card, zoo) == path == fetch(f"{SOURCE}@{commit}", "model.safetensors")
    assert len(hub.seen) == asked


def test_a_hub_that_is_away(hub: Hub, commit: str, zoo: Zoo, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at once while nothing is there; afterwards what was fetched last is used, and that is told."""
    card = _put(zoo)
    here = constants.HUGGINGFACE_CO_URL_TEMPLATE
    away = here.replace(str(hub.server_port), "9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", away)
    with pytest.raises(Network, match="can't be reached"):
        weights_path(card, zoo)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here)
    path = weights_path(card, zoo)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", away)
    assert weights_path(card, zoo) == path
    assert said[-1] == f"the hub can't be reached: {REPO} is taken as it was fetched last"


def test_a_full_disk_is_told_before_a_byte_is_fetched(
    hub: Hub, commit: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size that was announced is compared with what the disk has left."""
    monkeypatch.setattr(machine, "free_bytes", lambda _: 1000)
    with pytest.raises(Resources, match="has 1,000 bytes left") as refused:
        weights_path(_put(zoo), zoo)
    assert "HF_HUB_CACHE" in refused.value.hint
    assert not hub.moved("/cdn/")


def test_a_wrong_token(hub: Hub, commit: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told what to do, also where reading takes none."""
    hub.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(Network, match=r"401.*Invalid credentials") as refused:
        weights_path(_put(zoo), zoo)
    assert "hf auth login" in refused.value.hint


def test_a_cache_that_takes_no_files(
    hub: Hub, commit: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that can't hold the cache is named."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match=r"can't write .*cache: not a directory"):
        weights_path(_put(zoo), zoo)


def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: Hub, commit: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_TOKEN is sent to the endpoint, not to the storage that it redirects to."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    weights_path(_put(zoo), zoo)
    told = {(s.host.partition(":")[0], s.authorization) for s in hub.seen}
    assert told == {("127.0.0.1", "Bearer hf_secret"), ("localhost", "")}


def test_add_from_the_hub(hub: Hub, commit: str, zoo: Zoo, tmp_path: Path) -> None:
    """The entry has the commit, the digest and the fingerprint, and what the repository's config and card say."""
    add_published(name="tiny", source=REPO, zoo=zoo)
    add_backbone(name="file", arch="test_vit", weights=tmp_path / "w.safetensors", zoo=zoo)
    facts, file = zoo.resolve("tiny").facts, zoo.resolve("file").facts
    assert facts["source"] == f"{SOURCE}@{commit}"
    assert {facts[k] == file[k] for k in ("digest", "fingerprint", "head", "params", "features", "size_bytes")} == {
        True
    }
    assert (facts["license"], facts["crop_pct"], facts["mean"]) == ("cc-by-4.0", 0.9, [0.4, 0.5, 0.6])
    assert not zoo.resolve("tiny").objects
    hub.add(REPO, {"model.safetensors": _weights(tmp_path / "new.safetensors", seed=1)})
    assert (
        build("tiny", zoo=zoo)
        .blocks[0]
        .attn.qkv.weight.equal(load_file(tmp_path / "w.safetensors")["blocks.0.attn.qkv.weight"])
    )


@pytest.mark.parametrize(
    ("config", "weights", "error"),
    [
        (b'{"model_type": "bert"}', False, Mismatch), (_config("no_such_net"), True, NotFound), (_config("test_resnet"), True, Mismatch),
        (_config(model_args={"checkpoint_path": "x.pth"}), False, Mismatch), (_config(model_args={"pretrained": True}), False, Mismatch),
    ],
    ids=["not timm", "unknown", "other weights", "a file", "twice"],
)  # fmt: skip
def test_what_is_no_timm_model_is_not_added(
    hub: Hub, commit: str, zoo: Zoo, config: bytes, weights: bool, error: type[Exception]
) -> None:
    """A config of another library, or one that would load a file, is seen before weights are fetched; weights of another network are looked at."""
    hub.add(REPO, {"config.json": config})
    with pytest.raises(error):
        add_published(name="tiny", source=SOURCE, zoo=zoo)
    assert "tiny" not in {e.name for e in zoo.entries("backbones")}
    assert bool(hub.moved("/cdn/")) == weights


def test_the_command_line(hub: Hub, commit: str, zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    """`add backbone --from`, and the refusals of what does not go with it or is missing."""
    where = ["--zoo", str(zoo.root)]
    assert main([*where, "add", "backbone", "tiny", "--from", SOURCE]) == 0
    assert "added tiny" in capsys.readouterr().out
    assert main([*where, "add", "backbone", "b", "--from", SOURCE, "--arch", "test_vit"]) == 2
    assert "--from and --arch don't go together" in capsys.readouterr().err
    assert main([*where, "add", "backbone", "b", "--arch", "test_vit"]) == 2
    assert "--weights is missing" in capsys.readouterr().err


def test_offline_on_the_command_line(hub: Hub, commit: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--offline` keeps a command off the network: exit code 6, and no request."""
    for name in machine.OFFLINE:
        monkeypatch.setenv(name, "")  # taken back when the test is over
    assert main(["--offline", "--zoo", str(zoo.root), "add", "backbone", "tiny", "--from", SOURCE]) == 6
    assert not hub.seen


def test_others_share_the_cache(hub: Hub, commit: str, zoo: Zoo) -> None:
    """What another program fetched by the hub's library is not fetched again."""
    path = hf_hub_download(REPO, "model.safetensors")
    moved = hub.moved("/cdn/")
    assert weights_path(_put(zoo), zoo) == Path(path)
    assert hub.moved("/cdn/") == moved


def test_names() -> None:
    """What a source says, and how a file of the cache pins it."""
    assert place("hf-hub:timm/vit.a1") == place("timm/vit.a1") == ("timm/vit.a1", "")
    assert place("hf-hub:a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    file = Path("hub") / "snapshots" / ("a" * 40) / "model.safetensors"
    assert pinned("hf-hub:a/b@main", file) == f"hf-hub:a/b@{'a' * 40}"
    assert pinned("object:sha256:00", file) == "object:sha256:00"
