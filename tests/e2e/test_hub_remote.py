"""hf://org/name as a remote, from a server on loopback that speaks the hub's API: what a repository holds, what goes over the wire."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from PIL import Image
from safetensors.torch import save_file

from tests.hub_server import PART_BYTES, Hub
from vtzoo import patience
from vtzoo.catalogue import INDEX, Index
from vtzoo.errors import Corrupt, Network, NotFound, UsageError
from vtzoo.files import safetensors_header, sha256, sha256_bytes
from vtzoo.remotes import object_path, open_remote
from vtzoo.remotes.hub import Repository, connect
from vtzoo.sharing import pull, push
from vtzoo.verbs.add import add_backbone, add_published
from vtzoo.verbs.predict import predict
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # the hub's library, of its own uploads
REPO, REF = "lab/zoo", "fashion/lora"
URL = f"hf://{REPO}"
HEADER_BYTES = 20_000
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


def test_other_bytes_in_an_objects_place_are_replaced(hub: Hub, tmp_path: Path) -> None:
    """Somebody has put another file where an object belongs: it is not taken for that."""
    digest, _ = _file(tmp_path, LARGE)
    hub.add(REPO, {object_path(digest): LARGE[::-1]})
    _pushed(tmp_path)
    assert b"".join(_remote().stream(digest, 0, len(LARGE))) == LARGE


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


@pytest.mark.parametrize(
    ("start", "end"), [(0, 10), (5, 300_000), (len(LARGE) - 7, len(LARGE)), (len(LARGE) - 7, 10**9)]
)
def test_a_range_moves_only_itself(hub: Hub, tmp_path: Path, start: int, end: int) -> None:
    """What is fetched later spares what came before."""
    _, digest = _pushed(tmp_path)
    remote = _remote()
    remote.index()
    before = hub.moved("/cdn/")
    assert b"".join(remote.stream(digest, start, end)) == LARGE[start:end]
    assert hub.moved("/cdn/") - before == len(LARGE[start:end])


def test_a_stream_that_breaks_is_worth_another_try(hub: Hub, tmp_path: Path) -> None:
    """A cut connection gives all that came, then a network's failure."""
    _, digest = _pushed(tmp_path)
    remote = _remote()
    remote.index()
    hub.fault = lambda data: data[:700_000]
    came: list[bytes] = []
    with pytest.raises(patience.Dropped):
        came.extend(remote.stream(digest, 0, len(LARGE)))
    assert b"".join(came) == LARGE[:700_000]


@pytest.mark.parametrize("url", ["hf://lab", "hf://lab/../x", "hf://lab/zoo/deep", "hf://lab/zoo@../x"])
def test_what_names_no_repository(url: str) -> None:
    """A URL that could mean another place is refused before anything is asked."""
    with pytest.raises(UsageError, match="names no repository") as refused:
        connect(url)
    assert refused.value.hint.startswith("write hf://org/name")


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
    assert (said["license"], said["datasets"], said["tags"]) == ("mit", ["mnist"], ["vtzoo", "timm", "lora", "mine"])
    assert card.text.count("| second |") == card.text.count("# My zoo") == card.text.count("Thanks to all.") == 1


def test_objects_are_plain_files_of_the_repository(hub: Hub, tmp_path: Path) -> None:
    """The hub's library alone fetches an object by the digest that the index names."""
    _, digest = _pushed(tmp_path)
    index = yaml.safe_load(Path(hf_hub_download(REPO, INDEX)).read_text())
    assert index["deltas"]["fashion"]["digest"] == digest
    assert Path(hf_hub_download(REPO, object_path(digest))).read_bytes() == LARGE


def test_a_snapshot_is_a_zoo(hub: Hub, trained: Zoo, tmp_path: Path) -> None:
    """The hub's library alone fetches a repository into a folder, which vtzoo opens as it is.

    In the library's cache a snapshot's files are links out of it, which a zoo's are not.
    """
    push([REF], URL, zoo=Zoo(trained.root))
    with pytest.raises(Corrupt, match="is a symbolic link"):
        Zoo(snapshot_download(REPO)).object(trained.resolve(REF).digest)
    zoo = Zoo(snapshot_download(REPO, local_dir=tmp_path / "snapshot"))
    assert sha256(zoo.object(zoo.resolve(REF).digest)) == zoo.resolve(REF).digest == trained.resolve(REF).digest
    assert {e.name for e in zoo.entries() if not e.builtin} == {REF, "tiny"}


def test_a_repository_without_an_index_is_an_empty_zoo(hub: Hub, tmp_path: Path) -> None:
    """What else it holds stays."""
    hub.add(REPO, {"notes.txt": b"mine"})
    index, token = _remote().index()
    assert not any(index.sections.values())
    assert token == hub.repos[REPO].refs["main"]
    _pushed(tmp_path)
    assert "notes.txt" in hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo with a tiny ViT and a delta trained on it."""
    root = tmp_path_factory.mktemp("trained")
    made = Zoo.init(root / "zoo")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), root / "tiny.safetensors")
    add_backbone(name="tiny", arch="test_vit", weights=root / "tiny.safetensors", license="mit", zoo=made)
    recipe = {"epochs": 1, "limit": 20, "batch_size": 10, "eval_limit": 10}
    train(backbone="tiny", data="vtzoo:fashion", method="lora[rank=2]", name=REF, zoo=made, recipe=recipe)
    return made


def _run(hub: Hub, cache: Path, *words: str) -> dict[str, Any]:
    """A command line as a process of its own, which knows the hub by its variables only."""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "VTZOO_OFFLINE")}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_x"}
    line = [sys.executable, "-m", "vtzoo_cli", "--json", *words]
    ran = subprocess.run(line, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_there_and_back_again(hub: Hub, trained: Zoo, tmp_path: Path) -> None:
    """A delta and its backbone are pushed, the zoo is deleted, and what is pulled into a new one predicts the same."""
    hub.token = "hf_x"
    zoo = Zoo(shutil.copytree(trained.root, tmp_path / "zoo"))
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30), "teal").save(image)
    before = predict(ref=REF, images=[image], zoo=zoo).predictions
    sizes = [zoo.object(zoo.resolve(name).digest).stat().st_size for name in ("tiny", REF)]
    cache = tmp_path / "cache"
    pushed = _run(hub, cache, "--zoo", str(zoo.root), "push", REF, URL)
    assert pushed["moved_bytes"] == sum(sizes)
    assert [len(hub.asked("/commit/")), hub.moved("/lfs/") > sum(sizes)] == [1, True]
    shutil.rmtree(zoo.root)
    seen = len(hub.seen)
    new = Zoo.init(tmp_path / "new")
    pulled = _run(hub, cache, "--zoo", str(new.root), "pull", REF, URL)
    assert pulled["moved_bytes"] == sum(sizes)
    came = sum(s.sent for s in hub.seen[seen:] if "/cdn/" in s.path)
    assert 0 <= came - sum(sizes) < HEADER_BYTES  # which backbone it stands on is read of the delta's header first
    assert {s.path.split("/resolve/")[1].split("/")[0] for s in hub.seen[seen:] if "/resolve/" in s.path} == {
        hub.repos[REPO].refs["main"]
    }
    assert predict(ref=REF, images=[image], zoo=new).predictions == before
    card = ModelCard(hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]["README.md"].data.decode())
    assert (card.data.license, card.data.eval_results[0].dataset_name) == ("mit", "fashion")


def test_a_push_that_was_outrun_is_made_again(hub: Hub, trained: Zoo, tmp_path: Path) -> None:
    """Two zoos push to one repository at once: the slower reads again, and sends no object twice."""
    zoo = Zoo(shutil.copytree(trained.root, tmp_path / "zoo"))
    push(["tiny"], URL, zoo=zoo)
    hub.before_commit = lambda: _pushed(tmp_path, "rival") and None
    sent = hub.moved("/lfs/")
    made = push([REF], URL, zoo=zoo)
    assert [i.action for i in made.entries if i.ref == REF] == ["push"]
    assert [s.status for s in hub.seen if "/commit/" in s.path] == [200, 200, 412, 200]
    index, _ = _remote().index()
    assert set(index.sections["deltas"]) == {"rival", REF}
    size = zoo.resolve(REF).facts["size_bytes"]
    assert sum(s.received for s in hub.seen if "/lfs/" in s.path and s.method == "PUT") < sent + 2 * size + len(LARGE)


def test_a_pull_goes_on_where_it_was_cut(
    hub: Hub, trained: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer ends half-way: every try fetches only what is missing yet."""
    monkeypatch.setattr(patience, "PATIENCE", replace(patience.PATIENCE, pause_s=0.0))
    push([REF], URL, zoo=Zoo(trained.root))
    new = Zoo.init(tmp_path / "new")
    hub.fault = lambda data: data[: max(len(data) // 2, 20_000)]
    moved = hub.moved("/cdn/")
    made = pull([REF], URL, zoo=new)
    assert made.moved_bytes == sum(e.facts["size_bytes"] for e in new.entries() if not e.builtin)
    assert 0 <= hub.moved("/cdn/") - moved - made.moved_bytes < HEADER_BYTES
    assert len(hub.asked("/cdn/")) > 4


def test_pull_of_what_is_not_there(hub: Hub, tmp_path: Path, said: list[str]) -> None:
    """No repository, or none of that name: not found, and it is told that the hub shows none."""
    with pytest.raises(NotFound):
        pull(["x"], URL, zoo=Zoo.init(tmp_path / "new"))
    assert f"the hub shows no repository {REPO}" in said[0]


def test_a_backbone_of_the_hub_is_not_pushed(hub: Hub, zoo: Zoo, tmp_path: Path) -> None:
    """A delta on it takes itself along, and the entry: who pulls it has the weights of the commit that it was made on from the hub."""
    shown = {"input_size": [3, 160, 160], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    config = json.dumps({"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": shown}).encode()
    hub.add("lab/tiny", {"config.json": config, "model.safetensors": (tmp_path / "tiny.safetensors").read_bytes()})
    add_published(name="hubbed", source="hf-hub:lab/tiny", zoo=zoo)
    train(
        backbone="hubbed",
        data="vtzoo:fashion",
        method="ssf",
        name=REF,
        zoo=zoo,
        recipe={"epochs": 1, "limit": 20, "eval_limit": 10},
    )
    assert zoo.object(zoo.resolve(REF).digest).stat().st_size == push([REF], URL, zoo=zoo).moved_bytes
    hub.add("lab/tiny", {"model.safetensors": b"something else"})
    new = Zoo.init(tmp_path / "new")
    pull([REF], URL, zoo=new)
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30), "teal").save(image)
    assert (
        predict(ref=REF, images=[image], zoo=new).predictions == predict(ref=REF, images=[image], zoo=zoo).predictions
    )


def test_a_portal_instead_of_a_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers every address with a page is told as such, not shown as a traceback."""
    monkeypatch.setattr(hub.RequestHandlerClass, "_route", lambda *_: ({}, b"<html>Please log in</html>"))
    with pytest.raises(Network, match="don't go together") as refused:
        _remote().index()
    assert "HF_ENDPOINT" in refused.value.hint


def test_an_answer_that_was_lost(hub: Hub, trained: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is made, but nobody says so: asked again, the push finds its entries there, and makes no second commit."""
    monkeypatch.setattr(patience, "PATIENCE", replace(patience.PATIENCE, pause_s=0.0))
    hub.silent = True
    push([REF], URL, zoo=Zoo(trained.root))
    assert not hub.silent
    assert len(hub.repos[REPO].commits) == 2
    assert set(_remote().index()[0].sections["deltas"]) == {REF}


def test_many_push_at_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four zoos push three entries each into a repository that is not there yet: all twelve are there."""
    monkeypatch.setattr(patience, "PATIENCE", replace(patience.PATIENCE, pause_s=0.02, longest_s=0.2))

    def work(who: int) -> None:
        zoo = Zoo.init(tmp_path / f"zoo-{who}")
        for n in range(3):
            digest = zoo.add_object(safetensors_header([], {"who": f"{who}.{n}"}))
            zoo.put("deltas", f"from-{who}/{n}", {"digest": digest})
            push([f"from-{who}/{n}"], URL, zoo=zoo)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    index, _ = _remote().index()
    assert set(index.sections["deltas"]) == {f"from-{who}/{n}" for who in range(4) for n in range(3)}
    assert all(_remote().size(facts["digest"]) for facts in index.sections["deltas"].values())
    outrun = sum(s.status == 412 for s in hub.seen)
    assert len([s for s in hub.seen if "/commit/" in s.path]) == 12 + outrun


def test_looking_into_a_repository(hub: Hub, trained: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    """`ls` and `show` with its URL, and a README row for each entry."""
    push([REF], URL, zoo=Zoo(trained.root))
    assert main(["ls", URL, "--json"]) == 0
    assert {e["name"] for e in json.loads(capsys.readouterr().out)} == {REF, "tiny"}
    assert main(["show", REF, URL]) == 0
    assert "lora[rank=2]" in capsys.readouterr().out


def test_a_push_that_was_stopped(hub: Hub, trained: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub goes away before the commit: nothing is listed there; the next push sends none of the large files again."""
    monkeypatch.setattr(patience, "PATIENCE", replace(patience.PATIENCE, pause_s=0.0))

    def away() -> None:
        hub.before_commit = away
        raise ConnectionError

    hub.before_commit = away
    with pytest.raises(Network):
        push([REF], URL, zoo=Zoo(trained.root))
    assert not any(_remote().index()[0].sections.values())
    sent = sum(s.received for s in hub.seen if s.method == "PUT")
    hub.before_commit = None
    push([REF], URL, zoo=Zoo(trained.root))
    assert sum(s.received for s in hub.seen if s.method == "PUT") == sent > 1_000_000
    assert set(_remote().index()[0].sections["deltas"]) == {REF}
