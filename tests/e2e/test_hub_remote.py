"""hf://org/name as a remote, from a server on loopback that speaks the hub's API: what a repository holds, what goes over the wire."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, hf_hub_download

from tests.hub_server import PART_BYTES, Hub
from vtzoo.catalogue import INDEX, Index
from vtzoo.errors import Network, NotFound, UsageError
from vtzoo.files import sha256_bytes
from vtzoo.remotes import object_path, open_remote
from vtzoo.remotes.hub import Repository

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's library, of its own uploads
REPO = "lab/zoo"
URL = f"hf://{REPO}"
LARGE = bytes(range(256)) * 9000  # more than two parts of an upload
SMALL = b'{"architecture": "test_vit"}'


def _remote(url: str = URL) -> Repository:
    found = open_remote(url)
    assert isinstance(found, Repository)
    return found


def _file(folder: Path, data: bytes) -> tuple[str, Path]:
    path = folder / sha256_bytes(data)
    path.write_bytes(data)
    return path.name, path


def _index(**deltas: Mapping[str, Any]) -> Index:
    made = Index()
    made.sections["deltas"] = {name: dict(facts) for name, facts in deltas.items()}
    return made


def _pushed(folder: Path, name: str = "fashion", data: bytes = LARGE, **facts: Any) -> tuple[Repository, str]:
    """Add one delta of these bytes to what is there."""
    remote = _remote()
    index, token = remote.index()
    digest, path = _file(folder, data)
    remote.upload(digest, path)
    index.sections["deltas"][name] = {"digest": digest, "size_bytes": len(data), "method": "lora[rank=8]", **facts}
    assert remote.publish(index, token)
    return remote, digest


def test_a_push_is_one_commit(hub: Hub, tmp_path: Path) -> None:
    """Objects, index and README come together; large ones went to the storage in parts before, and are checked there."""
    _, digest = _pushed(tmp_path)
    assert len(hub.asked("/commit/")) == 1
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2  # the first is the hub's own
    tree = repo.commits[repo.refs["main"]]
    assert set(tree) == {".gitattributes", INDEX, "README.md", object_path(digest)}
    assert tree[object_path(digest)].data == LARGE
    assert [a.rpartition("/")[2] for a in hub.asked("/lfs/")] == ["batch", "1", "2", "3", "complete"]
    assert hub.asked("/verify") == [f"POST /{REPO}/verify"]
    assert max(s.received for s in hub.seen if "/lfs/" in s.path) == PART_BYTES


def test_what_is_there_is_not_sent_again(hub: Hub, tmp_path: Path) -> None:
    """A second entry of the same bytes, from another process's view, sends index and README only; so does a lost commit's object."""
    _pushed(tmp_path)
    sent = hub.moved("/lfs/")
    _pushed(tmp_path, "again")
    assert hub.moved("/lfs/") == sent
    assert set(_remote().index()[0].sections["deltas"]) == {"fashion", "again"}


def test_a_stale_parent_is_refused_and_the_next_try_loses_nobody(hub: Hub, tmp_path: Path) -> None:
    """Somebody commits between reading and writing: `publish` says so, and after reading again both entries are there."""
    _pushed(tmp_path)
    remote = _remote()
    index, token = remote.index()
    digest, path = _file(tmp_path, SMALL)
    hub.before_commit = lambda: _pushed(tmp_path, "rival", b"\0rival") and None
    remote.upload(digest, path)
    index.sections["deltas"]["mine"] = {"digest": digest}
    assert not remote.publish(index, token)
    assert [s.status for s in hub.seen if "/commit/" in s.path][-1] == 412
    index, token = remote.index()
    remote.upload(digest, path)
    index.sections["deltas"]["mine"] = {"digest": digest}
    assert remote.publish(index, token)
    assert set(_remote().index()[0].sections["deltas"]) == {"fashion", "rival", "mine"}
    assert b"".join(_remote().stream(digest, 0, 100)) == SMALL


def test_two_make_the_repository_at_once(hub: Hub, tmp_path: Path) -> None:
    """Both find none; the second is told that somebody was faster."""
    first, second = _remote(), _remote()
    (_, token), (index, other) = first.index(), second.index()
    assert token == other == ""
    assert first.publish(_index(a={"digest": "0" * 64}), token)
    index.sections["deltas"]["b"] = {"digest": "1" * 64}
    assert not second.publish(index, other)


def test_all_of_a_pull_is_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    """After the index was read, a newer commit changes nothing of what is read with it."""
    _, digest = _pushed(tmp_path)
    remote = _remote()
    _, token = remote.index()
    tree = hub.repos[REPO].commits[token]
    hub.repos[REPO].commit({p: b for p, b in tree.items() if p != object_path(digest)})
    assert remote.size(digest) == len(LARGE)
    assert b"".join(remote.stream(digest, 0, len(LARGE))) == LARGE
    later = _remote()
    later.index()
    with pytest.raises(NotFound, match="has no object"):
        later.size(digest)
    with pytest.raises(NotFound):
        list(later.stream(digest, 0, 10))


def test_a_pinned_revision_is_read_only(hub: Hub, tmp_path: Path) -> None:
    """hf://org/name@COMMIT gives the entries of then, and takes none."""
    remote, _ = _pushed(tmp_path)
    _, old = remote.index()
    _pushed(tmp_path, "newer")
    pinned = _remote(f"{URL}@{old}")
    assert pinned.read_only
    index, token = pinned.index()
    assert (set(index.sections["deltas"]), token) == ({"fashion"}, old)
    with pytest.raises(UsageError, match="is a commit"):
        pinned.publish(index, token)


@pytest.mark.parametrize(("start", "end"), [(0, 10), (5, 300_000), (len(LARGE) - 7, len(LARGE)), (len(LARGE) - 7, 10**9)])
def test_a_range_moves_only_itself(hub: Hub, tmp_path: Path, start: int, end: int) -> None:
    """What is fetched later spares what came before."""
    _, digest = _pushed(tmp_path)
    remote = _remote()
    remote.index()
    before = hub.moved("/cdn/")
    assert b"".join(remote.stream(digest, start, end)) == LARGE[start:end]
    assert hub.moved("/cdn/") - before == len(LARGE[start:end])


def test_a_stream_that_breaks_is_worth_another_try(hub: Hub, tmp_path: Path) -> None:
    """A cut connection gives what came, then a network's failure."""
    from vtzoo.patience import Dropped

    _, digest = _pushed(tmp_path)
    remote = _remote()
    remote.index()
    hub.fault = lambda data: data[: len(data) // 2]
    came = b""
    with pytest.raises(Dropped):
        for piece in remote.stream(digest, 0, len(LARGE)):
            came += piece
    assert LARGE.startswith(came)


@pytest.mark.parametrize("url", ["hf://lab", "hf://lab/../x", "hf://lab/zoo/deep", "hf://lab/zoo@../x"])
def test_what_names_no_repository(url: str) -> None:
    """A URL that could mean another place is refused before anything is asked."""
    with pytest.raises(UsageError, match="names no repository"):
        from vtzoo.remotes.hub import connect

        connect(url)


def test_without_the_right_to_write(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing or wrong token is told with what to do; nothing is left there. The right one writes."""
    hub.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(Network, match="401") as refused:
        _pushed(tmp_path)
    assert "hf auth login" in refused.value.hint
    assert not hub.repos
    monkeypatch.setenv("HF_TOKEN", hub.token)
    _pushed(tmp_path)
    assert hub.repos


def test_an_unknown_revision(hub: Hub, tmp_path: Path) -> None:
    """A branch that the repository lacks is not taken for an empty zoo."""
    _pushed(tmp_path)
    with pytest.raises(NotFound, match="no revision 'dev'"):
        _remote(f"{URL}@dev").index()


def test_the_readme_is_a_model_card(hub: Hub, tmp_path: Path) -> None:
    """Its front matter is read by the hub's library: licence, base model, tags and each entry's metrics."""
    facts = {"backbone": "vit_small_patch16_224.dino", "tasks": ["fashion"], "metrics": {"top1": 0.91}}
    _pushed(tmp_path, "fashion/lora", **facts)
    card = ModelCard(hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]["README.md"].data.decode())
    said = card.data.to_dict()
    assert {k: said[k] for k in ("license", "library_name", "pipeline_tag", "base_model", "metrics")} == {
        "license": "apache-2.0",
        "library_name": "vtzoo",
        "pipeline_tag": "image-classification",
        "base_model": ["timm/vit_small_patch16_224.dino"],
        "metrics": ["accuracy"],
    }
    assert said["tags"] == ["vtzoo", "timm", "lora"]
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("fashion", "accuracy", 0.91)
    assert f"$ vtzoo pull fashion/lora {URL}" in card.text
    assert "| fashion/lora | lora[rank=8] | vit_small_patch16_224.dino | fashion | 91.0% |" in card.text


def test_people_may_write_in_the_readme(hub: Hub, tmp_path: Path) -> None:
    """Their text, their licence and their keys stay; the table and the metrics are made anew."""
    _pushed(tmp_path)
    tree = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]
    text = tree["README.md"].data.decode()
    front, _, rest = text.removeprefix("---\n").partition("---\n")
    head = {**yaml.safe_load(front), "license": "mit", "datasets": ["mnist"], "tags": ["mine"]}
    written = f"---\n{yaml.safe_dump(head)}---\n{rest.replace('# lab/zoo', '# My zoo')}\nThanks to all.\n"
    hub.add(REPO, {"README.md": written.encode()})
    _pushed(tmp_path, "second", SMALL)
    card = ModelCard(hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]["README.md"].data.decode())
    said = card.data.to_dict()
    assert (said["license"], said["datasets"], said["tags"][0]) == ("mit", ["mnist"], "mine")
    assert card.text.count("| second |") == card.text.count("# My zoo") == card.text.count("Thanks to all.") == 1


def test_objects_are_plain_files_of_the_repository(hub: Hub, tmp_path: Path) -> None:
    """The hub's library alone fetches an object by the digest that the index names."""
    _, digest = _pushed(tmp_path)
    index = yaml.safe_load(Path(hf_hub_download(REPO, INDEX)).read_text())
    assert index["deltas"]["fashion"]["digest"] == digest
    assert Path(hf_hub_download(REPO, object_path(digest))).read_bytes() == LARGE


def test_a_repository_without_an_index_is_an_empty_zoo(hub: Hub, tmp_path: Path) -> None:
    """What else it holds stays."""
    hub.add(REPO, {"notes.txt": b"mine"})
    index, token = _remote().index()
    assert not any(index.sections.values())
    assert token == hub.repos[REPO].refs["main"]
    _pushed(tmp_path)
    assert "notes.txt" in hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]
