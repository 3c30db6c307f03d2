"""Round trips to folders, buckets, SSH and from web servers: what arrives is used, nothing is lost, nothing is sent twice."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import timm
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import save_file

from tests.e2e import sftp
from tests.e2e.buckets import Bucket, serving
from tests.e2e.flaky import flaky
from vtzoo import patience
from vtzoo.errors import Conflict, Corrupt, Network, NotFound, UsageError, VtzooError
from vtzoo.files import sha256
from vtzoo.leftovers import collect
from vtzoo.patience import Patience
from vtzoo.quarantine import FOLDER
from vtzoo.remotes import bucket as bucket_module
from vtzoo.remotes import open_remote, shown
from vtzoo.remotes.bucket import Bucket as Store
from vtzoo.remotes.folder import Folder
from vtzoo.sharing import Shared, pull, push, sync
from vtzoo.transfer import fetch
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.predict import predict
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

REF = "fashion/lora"
PUSHER = """
import sys
from vtzoo.sharing import push
from vtzoo.zoo import Zoo
zoo = Zoo(sys.argv[1])
for name in sorted(zoo.index()["models"]):
    push([name], sys.argv[2], zoo=zoo)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo with a tiny ViT and a trained delta."""
    root = tmp_path_factory.mktemp("trained")
    made = Zoo.init(root / "zoo")
    made.command = "vtzoo train --of-this-test"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), root / "tiny.safetensors")
    add_backbone(name="tiny", arch="test_vit", weights=root / "tiny.safetensors", zoo=made)
    recipe = {"epochs": 1, "limit": 20, "batch_size": 10, "eval_limit": 10}
    train(backbone="tiny", data="vtzoo:fashion", method="lora[rank=2]", name=REF, zoo=made, recipe=recipe)
    return made


@pytest.fixture
def zoo(trained: Zoo, tmp_path: Path) -> Zoo:
    """It, to do with as one likes."""
    shutil.copytree(trained.root, tmp_path / "zoo")
    return Zoo(tmp_path / "zoo")


@pytest.fixture(scope="module")
def _server() -> Iterator[Bucket]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def _network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback is no network; pauses are short."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(patience, "PATIENCE", Patience(tries=3, pause_s=0.01, stall_s=5))


@pytest.fixture
def bucket(_server: Bucket, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    """A server with an empty bucket named `zoos`, found as S3 is: by the environment."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": _server.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    if filesystem.exists("zoos"):
        filesystem.rm("zoos", recursive=True)
    filesystem.mkdir("zoos")
    _server.log.clear()
    return _server


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A picture."""
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.effect_noise((40, 40), 60).save(path)
    return path


def small(root: Path, *names: str) -> Zoo:
    """A zoo with files that no verb opens, each with its name as content."""
    made = Zoo.init(root, exist_ok=True)
    for name in names:
        content = (name * 100).encode()
        made.put("models", name, {"files": {"model.onnx": made.add_object(content)}, "size_bytes": len(content)})
    return made


def actions(done: Shared) -> dict[str, str]:
    """What became of each entry."""
    return {item.ref: item.action for item in done.entries}


def listing(folder: Path) -> set[str]:
    """All files below a folder but its lock."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def round_trip(zoo: Zoo, url: str, image: Path, folder: Path) -> tuple[Shared, Shared]:
    """Push, delete the first zoo, pull into a new one: the delta predicts there what it predicted here, and says the same of itself."""
    before = predict(ref=REF, images=[image], zoo=zoo)
    facts = zoo.resolve(REF).facts
    sent = push([REF], url, zoo=zoo)
    shutil.rmtree(zoo.root)
    new = Zoo.init(folder / "new")
    new.command = "vtzoo pull"
    got = pull([REF], url, zoo=new)
    assert predict(ref=REF, images=[image], zoo=new).predictions == before.predictions
    assert new.resolve(REF).facts == facts
    assert facts["command"] == "vtzoo train --of-this-test"
    assert not list((new.root / ".vtzoo" / "quarantine").iterdir())
    return sent, got


def test_a_folder(zoo: Zoo, image: Path, tmp_path: Path) -> None:
    """By path or file://; the backbone goes with the delta; a folder that is not there becomes a zoo."""
    sent, got = round_trip(zoo, (tmp_path / "share").as_uri(), image, tmp_path)
    assert actions(sent) == {"tiny": "push", REF: "push"}
    assert actions(got) == {"tiny": "pull", REF: "pull"}
    held = [p for p in (tmp_path / "share" / ".vtzoo" / "objects").rglob("*") if p.is_file()]
    assert sent.moved_bytes == got.moved_bytes == sum(p.stat().st_size for p in held)
    assert all(sha256(p) == p.name for p in held)


def test_a_bucket(zoo: Zoo, bucket: Bucket, image: Path, tmp_path: Path) -> None:
    """What goes over the wire is the two objects, once, and a small index; the first zoo is not needed any more."""
    sent, got = round_trip(zoo, "s3://zoos/team/zoo", image, tmp_path)
    assert sorted(bucket.put("/objects/")) == sorted(i.size_bytes for i in sent.entries)
    assert sum(bucket.put("/objects/")) == sent.moved_bytes == got.moved_bytes
    assert len(bucket.put("zoo_index.yaml")) == 1
    bucket.log.clear()
    again = push([REF], "s3://zoos/team/zoo", zoo=Zoo(tmp_path / "new"))
    assert set(actions(again).values()) == {"none"}
    assert again.moved_bytes == 0
    assert not bucket.put()


def test_a_host_by_ssh(zoo: Zoo, image: Path, tmp_path: Path) -> None:
    """A folder by SFTP; a host that is not known is refused, and so is a wrong password."""
    with sftp.serving() as host:
        url = f"ssh://{sftp.USER}:open%20sesame@127.0.0.1:{host.port}{tmp_path}/far"
        with pytest.raises(Network, match="known_hosts"):
            push([REF], url, zoo=zoo)
        sftp.know(host, Path.home())
        with pytest.raises(VtzooError, match="may not be read") as caught:
            push([REF], url.replace("open", "close"), zoo=zoo)
        assert "sesame" not in str(caught.value)
        sent, got = round_trip(zoo, url, image, tmp_path)
        assert sent.moved_bytes == got.moved_bytes
        assert sent.remote == f"ssh://me@127.0.0.1:{host.port}{tmp_path}/far"
    assert listing(tmp_path / "far") == {
        "zoo_index.yaml",
        *(f for f in listing(tmp_path / "far") if "/objects/sha256/" in f and not f.endswith(".tmp")),
    }


def test_a_web_server(zoo: Zoo, image: Path, tmp_path: Path) -> None:
    """A zoo's folder behind any web server can be pulled from, and not be pushed to."""
    before = predict(ref=REF, images=[image], zoo=zoo)
    new = Zoo.init(tmp_path / "new")
    with flaky(zoo.root) as server:
        got = pull([REF], server.url + "/", zoo=new)
        assert got.moved_bytes == sum(a.sent for a in server.objects[2:])
        with pytest.raises(UsageError, match="only be read"):
            push([REF], server.url, zoo=new)
        assert actions(sync(server.url, zoo=new)) == {"tiny": "none", REF: "none"}
    assert predict(ref=REF, images=[image], zoo=new).predictions == before.predictions


def test_an_object_that_is_there_is_not_sent_again(bucket: Bucket, tmp_path: Path) -> None:
    """After a push that was stopped before the index, only the index is missing; one of another size is sent again."""
    import s3fs

    mine = small(tmp_path / "mine", "a", "b")
    push(["a"], "s3://zoos/x", zoo=mine)
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    filesystem.rm("zoos/x/zoo_index.yaml")
    bucket.log.clear()
    assert push(["a"], "s3://zoos/x", zoo=mine).moved_bytes == 0
    assert not bucket.put("/objects/")
    digest = mine.resolve("a").digest
    filesystem.pipe_file(f"zoos/x/.vtzoo/objects/sha256/{digest[:2]}/{digest}", b"cut")
    filesystem.rm("zoos/x/zoo_index.yaml")
    bucket.log.clear()
    push(["a"], "s3://zoos/x", zoo=mine)
    assert bucket.put("/objects/") == [100]


def test_a_damaged_file_is_not_sent(bucket: Bucket, tmp_path: Path) -> None:
    """What is not what its name says stays here."""
    mine = small(tmp_path / "mine", "a")
    path = mine.object(mine.resolve("a").digest)
    path.chmod(0o644)
    path.write_bytes(b"b" * 100)
    with pytest.raises(Corrupt, match="damaged"):
        push(["a"], "s3://zoos/x", zoo=mine)
    assert not bucket.put()


def test_an_index_that_moved_on_is_not_written_over(bucket: Bucket, tmp_path: Path) -> None:
    """Of two who read the same version, one writes; the other is told, by the server's own comparison."""
    first, second = open_remote("s3://zoos/cas"), open_remote("s3://zoos/cas")
    empty, token = first.index()
    assert token == ""
    empty.sections["models"]["a"] = {"files": {"model.onnx": "a" * 64}}
    assert first.publish(empty, token)
    assert not second.publish(empty, "")
    index, token = second.index()
    index.sections["models"]["b"] = {"files": {"model.onnx": "b" * 64}}
    assert second.publish(index, token)
    assert not first.publish(index, token)
    assert [a.status for a in bucket.log if a.method == "PUT"] == [200, 412, 200, 412]
    assert sorted(first.index()[0].sections["models"]) == ["a", "b"]


def test_the_lock_holds_a_second_push_back(tmp_path: Path) -> None:
    """Where renames are the only means: of two who read the same version and write at the same time, one is told to read again."""

    class Slow(LocalFileSystem):
        def pipe_file(self, path: str, value: bytes, **options: object) -> None:
            time.sleep(0.05 if b"first" in value else 0.5)
            super().pipe_file(path, value)

    stores = [
        Store(lambda: Slow(skip_instance_cache=True), str(tmp_path / "far"), "far", folders=True, matches=False)
        for _ in range(2)
    ]
    ready, told = Barrier(2), dict[str, bool]()

    def run(store: Store, name: str) -> None:
        index, token = store.index()
        index.sections["models"][name] = {"files": {"model.onnx": "a" * 64}}
        ready.wait()
        told[name] = store.publish(index, token)

    threads = [Thread(target=run, args=pair) for pair in zip(stores, ("first", "second"), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told.values()) == [False, True]
    assert list(stores[0].index()[0].sections["models"]) == [name for name, done in told.items() if done]
    assert listing(tmp_path / "far") == {"zoo_index.yaml"}


def test_a_lock_that_was_left_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push that was killed holds the others back for a while only."""
    monkeypatch.setattr(bucket_module, "_LOCK_S", 0.3)
    (tmp_path / "far" / ".vtzoo" / "pushing").mkdir(parents=True)
    store = Store(LocalFileSystem, str(tmp_path / "far"), "far", folders=True, matches=False)
    assert store.publish(*store.index())
    assert not (tmp_path / "far" / ".vtzoo" / "pushing").exists()


def test_a_folder_that_changed_is_read_again(tmp_path: Path) -> None:
    """What another has put under a name meanwhile is not put back."""
    theirs = small(tmp_path / "theirs", "a")
    remote = open_remote(str(theirs.root))
    index, token = remote.index()
    other = theirs.add_object(b"other")
    theirs.put("models", "a", {"files": {"model.onnx": other}}, replace=True)
    assert not remote.publish(index, token)
    assert theirs.resolve("a").digest == other


def test_only_what_was_seen_in_a_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another puts under a name after the index was compared is not written over."""
    theirs = small(tmp_path / "theirs", "a")
    remote = Folder(theirs)
    index, token = remote.index()
    index.sections["models"]["a"] = {"files": {"model.onnx": theirs.add_object(b"mine")}}
    other, put = theirs.add_object(b"other"), theirs.put

    def late(*args: Any, **kwargs: Any) -> object:
        monkeypatch.setattr(theirs, "put", put)
        put("models", "a", {"files": {"model.onnx": other}}, replace=True)
        return put(*args, **kwargs)

    monkeypatch.setattr(theirs, "put", late)
    assert not remote.publish(index, token)
    assert theirs.resolve("a").digest == other


def test_an_upload_that_breaks_leaves_nothing_taken_for_whole(tmp_path: Path) -> None:
    """Where files are renamed into place: half a file is under no digest, and is taken away."""

    class Breaking(LocalFileSystem):
        def put_file(self, lpath: str, rpath: str, **options: object) -> None:
            Path(rpath).write_bytes(Path(lpath).read_bytes()[:50])
            raise ConnectionResetError("reset by peer")

    mine = small(tmp_path / "mine", "a")
    digest = mine.resolve("a").digest
    store = Store(lambda: Breaking(skip_instance_cache=True), str(tmp_path / "far"), "far", folders=True, matches=False)
    with pytest.raises(Network):
        store.upload(digest, mine.object(digest))
    assert not listing(tmp_path / "far")


@pytest.mark.parametrize(
    "kind", ["folder", pytest.param("s3", marks=pytest.mark.slow), pytest.param("locked", marks=pytest.mark.slow)]
)
def test_two_pushers_at_once_lose_nothing(kind: str, bucket: Bucket, tmp_path: Path) -> None:
    """Two processes of eight entries each to one remote: sixteen entries."""
    names = [f"m{i}" for i in range(16)]
    zoos = [small(tmp_path / "one", *names[::2]), small(tmp_path / "two", *names[1::2])]
    url = {"s3": "s3://zoos/both", "folder": str(tmp_path / "both"), "locked": f"locked:{tmp_path / 'both'}"}[kind]
    source = PUSHER if kind != "locked" else LOCKED + PUSHER
    pushing = [subprocess.Popen([sys.executable, "-c", source, str(z.root), url]) for z in zoos]
    assert [p.wait(60) for p in pushing] == [0, 0]
    there = open_remote(url.removeprefix("locked:"))
    assert sorted(there.index()[0].sections["models"]) == sorted(names)
    new = Zoo.init(tmp_path / "new")
    assert len(pull([], url.removeprefix("locked:"), zoo=new).entries) == 16
    if kind == "locked":
        assert not [p for p in (tmp_path / "both").rglob("*") if p.name.endswith(".tmp") or p.name == "pushing"]


LOCKED = """
import fsspec
from vtzoo import sharing
from vtzoo.remotes.bucket import Bucket
sharing.open_remote = lambda url: Bucket(lambda: fsspec.filesystem("file"), url.removeprefix("locked:"), url, folders=True, matches=False)
"""


def test_names_and_contents(tmp_path: Path) -> None:
    """The same content is up to date; a name with other content is refused, or --as, or --force; of several refs there is no --as."""
    mine, theirs = small(tmp_path / "mine", "a", "b"), small(tmp_path / "theirs", "b")
    url = str(theirs.root)
    content = theirs.add_object(b"other")
    theirs.put("models", "a", {"files": {"model.onnx": content}, "size_bytes": 5})
    before = listing(theirs.root)
    with pytest.raises(Conflict, match="'a'") as caught:
        push(["a", "b"], url, zoo=mine)
    assert "--as" in caught.value.hint
    assert "--force" in caught.value.hint
    assert listing(theirs.root) == before
    assert actions(push(["b"], url, zoo=mine)) == {"b": "none"}
    assert actions(push(["a"], url, zoo=mine, name="mine/a")) == {"mine/a": "push"}
    assert theirs.resolve("mine/a").digest == mine.resolve("a").digest
    with pytest.raises(UsageError, match="one entry"):
        pull(["a", "b"], url, zoo=mine, name="c")
    assert actions(pull(["a"], url, zoo=mine, force=True)) == {"a": "pull"}
    assert mine.resolve("a").digest == content
    with pytest.raises(NotFound):
        pull(["nothing"], url, zoo=mine)
    with pytest.raises(NotFound, match="no entry"):
        pull(["a@sha256:0000"], url, zoo=mine)
    new = Zoo.init(tmp_path / "new")
    assert actions(pull([f"mi@sha256:{theirs.resolve('mine/a').digest[:8]}"], url, zoo=new)) == {"mine/a": "pull"}


def test_a_signature_may_be_larger_than_what_it_signs(tmp_path: Path) -> None:
    """It is bounded by itself, not by the entry's size, on its way there and back."""
    mine, there, here = small(tmp_path / "mine", "a"), str(tmp_path / "there"), small(tmp_path / "here")
    signed = {**mine.resolve("a").facts, "signature": f"sha256:{mine.add_object(b's' * 2000)}"}
    mine.put("models", "a", signed, replace=True)
    assert actions(push(["a"], there, zoo=mine)) == {"a": "push"}
    assert actions(pull(["a"], there, zoo=here)) == {"a": "pull"}
    assert here.resolve("a").facts == signed


def test_a_signature_is_brought_to_what_is_there_already(tmp_path: Path) -> None:
    """Signed after it was pushed, an entry is pushed and pulled again, and then is up to date; facts that differ go with --force alone."""
    mine, there, here = small(tmp_path / "mine", "a"), str(tmp_path / "there"), small(tmp_path / "here", "a")
    push(["a"], there, zoo=mine)
    signed = {**mine.resolve("a").facts, "signature": f"sha256:{mine.add_object(b's' * 2000)}"}
    mine.put("models", "a", signed, replace=True)
    for action in ("push", "none"):
        assert actions(push(["a"], there, zoo=mine)) == {"a": action}
    for action in ("pull", "none"):
        assert actions(pull(["a"], there, zoo=here)) == {"a": action}
    assert here.resolve("a").facts == signed
    mine.put("models", "a", {**mine.resolve("a").facts, "note": "new"}, replace=True)
    assert actions(push(["a"], there, zoo=mine)) == {"a": "none"}
    assert actions(push(["a"], there, zoo=mine, force=True)) == {"a": "push"}
    assert Zoo(there).resolve("a").facts["note"] == "new"


def test_what_was_lost_is_brought_again(zoo: Zoo, tmp_path: Path) -> None:
    """An entry that is listed, but whose file has gone, is not up to date, neither here nor there."""
    share = str(tmp_path / "share")
    push([REF], share, zoo=zoo)
    facts = zoo.resolve(REF).facts
    for lost, again, action in ((zoo, pull, "pull"), (Zoo(share), push, "push")):
        path = lost.object(facts["digest"])
        path.chmod(0o644)
        path.unlink()
        assert actions(again([REF], share, zoo=zoo)) == {REF: action}
        assert sha256(path) == path.name
        assert lost.resolve(REF).facts == facts


def test_weights_of_a_package_do_not_travel(tmp_path: Path) -> None:
    """An entry from elsewhere names no module of this machine."""
    theirs = Zoo.init(tmp_path / "theirs")
    theirs.put("backbones", "x", {"arch": "test_vit", "source": "package:antigravity/x.safetensors"})
    with pytest.raises(Corrupt, match="does not travel"):
        pull(["x"], str(theirs.root), zoo=Zoo.init(tmp_path / "new"))


def test_a_catalogue_is_not_written_to(bucket: Bucket, tmp_path: Path) -> None:
    """A remote that is marked so is refused before anything is sent."""
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file("zoos/cat/zoo_index.yaml", b"schema: 1\ncatalogue: true\n")
    bucket.log.clear()
    with pytest.raises(UsageError, match="catalogue"):
        push(["a"], "s3://zoos/cat", zoo=small(tmp_path / "mine", "a"))
    assert not bucket.put()


def test_without_the_backbone(zoo: Zoo, tmp_path: Path) -> None:
    """Left out when asked to; one that is there under another name will do."""
    push([REF], str(tmp_path / "a"), zoo=zoo, backbone=False)
    assert not Zoo(tmp_path / "a").index()["backbones"]
    push(["tiny"], str(tmp_path / "b"), zoo=zoo, name="small")
    assert actions(push([REF], str(tmp_path / "b"), zoo=zoo)) == {REF: "push"}


def test_a_backbone_that_comes_along_replaces_none(zoo: Zoo, tmp_path: Path) -> None:
    """Forced or not, a delta does not put its backbone in the place of another of that name; beside it, under a new name, it can stand."""
    here = Zoo.init(tmp_path / "here")
    mine = here.add_object(b"mine")
    here.put("backbones", "tiny", {"arch": "test_vit", "source": f"object:sha256:{mine}"})
    for force in (False, True):
        with pytest.raises(Conflict, match="'tiny'") as caught:
            pull([REF], str(zoo.root), zoo=here, force=force)
        assert "by itself first, with --as NAME" in caught.value.hint
    assert actions(pull(["tiny"], str(zoo.root), zoo=here, name="theirs/tiny")) == {"theirs/tiny": "pull"}
    assert actions(pull([REF], str(zoo.root), zoo=here)) == {REF: "pull"}
    assert here.object(mine).read_bytes() == b"mine"


def test_sync_gives_each_side_what_it_lacks(tmp_path: Path) -> None:
    """Conflicts are listed, not resolved; a dry run moves nothing; a second one has nothing to do."""
    url = str(tmp_path / "share")
    mine, other = small(tmp_path / "mine", "a", "both"), small(tmp_path / "other", "b", "both")
    for made, content in ((mine, b"this"), (other, b"that")):
        made.put("models", "clash", {"files": {"model.onnx": made.add_object(content)}, "size_bytes": 4})
    push(["b", "both", "clash"], url, zoo=other)
    before = listing(tmp_path / "share")
    wanted = {"a": "push", "b": "pull", "both": "none", "clash": "conflict"}
    would = sync(url, zoo=mine, dry_run=True)
    assert actions(would) == wanted
    assert sum(i.size_bytes for i in would.entries) == 200
    assert listing(tmp_path / "share") == before
    assert "b" not in mine.index()["models"]
    done = sync(url, zoo=mine)
    assert actions(done) == wanted
    assert done.moved_bytes == 200
    assert set(actions(sync(url, zoo=mine)).values()) == {"none", "conflict"}
    assert sorted(mine.index()["models"]) == ["a", "b", "both", "clash"]


@pytest.mark.parametrize("how", ["--offline", "VTZOO_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_asks_no_server(
    how: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 6, before anything is opened; a folder is no network."""
    mine = small(tmp_path / "mine", "a")
    monkeypatch.setenv("VTZOO_OFFLINE", "1" if how == "VTZOO_OFFLINE" else "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if how == "HF_HUB_OFFLINE" else "")
    more = ["--offline"] if how == "--offline" else []
    for url in ("s3://zoos/x", "https://127.0.0.1:1/x", "ssh://127.0.0.1:1/x", "hf://org/name"):
        assert main(["push", "a", url, "--zoo", str(mine.root), *more]) == 6
        assert "offline" in capsys.readouterr().err
    assert not bucket.log
    assert main(["push", "a", str(tmp_path / "share"), "--zoo", str(mine.root), *more]) == 0


def test_the_command_line(bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON document, or a table; --all, and what can't be meant."""
    mine, new = small(tmp_path / "mine", "a", "b"), Zoo.init(tmp_path / "new")
    at = ("--zoo", str(mine.root))
    assert main(["push", "a", "b", "s3://zoos/cli", *at, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["moved_bytes"] == 200
    assert found["remote"] == "s3://zoos/cli"
    assert [e["action"] for e in found["entries"]] == ["push", "push"]
    assert main(["ls", "s3://zoos/cli", "--json"]) == 0
    assert [e["name"] for e in json.loads(capsys.readouterr().out)] == ["a", "b"]
    assert main(["show", "a", "s3://zoos/cli", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == 100
    assert main(["pull", "--all", "s3://zoos/cli", "--zoo", str(new.root), "--dry-run"]) == 0
    assert "200 B would move" in capsys.readouterr().out
    assert main(["pull", "--all", "s3://zoos/cli", "--zoo", str(new.root)]) == 0
    assert "fetched" in capsys.readouterr().out
    assert main(["sync", "s3://zoos/cli", "--zoo", str(new.root)]) == 0
    capsys.readouterr()
    assert main(["ls", str(new.root), "--json"]) == 0
    assert [e["name"] for e in json.loads(capsys.readouterr().out)] == ["a", "b"]
    for words in (
        ["pull", "s3://zoos/cli"],
        ["pull", "a", "s3://zoos/cli", "--all"],
        ["push", "a", "s4://zoos/x"],
        ["push", "a"],
    ):
        assert main([*words, *at]) == 2
        assert capsys.readouterr().err.count("\n") == 2


def test_what_came_before_is_not_gone_on_with_through_a_link(tmp_path: Path) -> None:
    """A part in quarantine that is a link leads a stranger's zoo out of itself: it is fetched anew, beside it."""
    there, here = small(tmp_path / "there", "a"), small(tmp_path / "here")
    digest = there.resolve("a").digest
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    (here.root / FOLDER).mkdir()
    (here.root / FOLDER / f"{digest}.part").symlink_to(mine)
    pull(["a"], str(there.root), zoo=here)
    assert mine.read_bytes() == b"mine"
    assert not here.object(digest).is_symlink()
    assert sha256(here.object(digest)) == digest


def test_what_came_days_ago_is_young_when_it_is_fetched(tmp_path: Path) -> None:
    """An object of no entry: gc leaves it until the entry that it is fetched for is there."""
    there, here = small(tmp_path / "there", "a"), small(tmp_path / "here")
    digest = there.resolve("a").digest
    path = here.object(here.add_object(there.object(digest)))
    os.utime(path, (1e9, 1e9))
    assert fetch(open_remote(str(there.root)), digest, here) == 0
    assert collect(here) == []
    assert collect(here, grace_s=0)


def test_what_no_remote_is(tmp_path: Path, bucket: Bucket) -> None:
    """A folder of other things, a bucket that is not there, a catalogue's entry: each refused."""
    mine = small(tmp_path / "mine", "a")
    with pytest.raises(NotFound, match="zoo_index"):
        push(["a"], str(tmp_path), zoo=mine)
    for url in ("s3://zoos/nothing", str(tmp_path / "nothing")):
        with pytest.raises(NotFound, match="zoo_index"):
            pull([], url, zoo=mine)
    with pytest.raises(NotFound):
        push(["a"], "s3://nothing/x", zoo=mine)
    with pytest.raises(UsageError, match="catalogue"):
        push(["tf_efficientnet_lite0"], str(tmp_path / "share"), zoo=mine)
    with pytest.raises(Network):
        pull([], "http://127.0.0.1:1/x", zoo=mine)


def test_what_is_meant_otherwise_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL with too few slashes, a place in scp's form, another host's file URL, a user who isn't there, an entry without a remote."""
    monkeypatch.chdir(tmp_path)
    mine = small(tmp_path / "mine", "a", "b/c")
    for text in ("s3:/bucket/zoo", "host:/srv/zoo", "me@host:zoo", "file://mnt/zoo", "b/c"):
        with pytest.raises(UsageError):
            push(["a"], text, zoo=mine)
    with pytest.raises(NotFound, match="does not exist"):
        push(["a"], "~nobody-of-this-name/zoo", zoo=mine)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    for text in ("./b/c", "./s3:/x", f"file:{tmp_path}/there", f"file://localhost{tmp_path}/there"):
        push(["a"], text, zoo=mine)
    assert small(Path("s3:", "x")).resolve("a").facts == small(Path("there")).resolve("a").facts


def test_passwords_are_not_shown() -> None:
    """Nor what stands in a query."""
    assert shown("https://me:secret@host:8/zoo/?token=secret#secret") == "https://me@host:8/zoo"


def test_missing_credentials_are_told(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that wants a key ends at once, and says so."""
    mine = small(tmp_path / "mine", "a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(VtzooError, match="may not be read or written"):
        push(["a"], "s3://zoos/x", zoo=mine)
    assert not bucket.log
