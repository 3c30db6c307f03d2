"""Pulls from a server that fails in every way end in a verified file or a clear error, in bounded time."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.e2e import flaky as F
from tests.e2e.flaky import Flaky, flaky
from vtzoo import patience, talk, transfer
from vtzoo.errors import Corrupt, Network, NotFound, Resources, VtzooError
from vtzoo.files import safetensors_header, sha256
from vtzoo.patience import Patience
from vtzoo.quarantine import FOLDER
from vtzoo.sharing import pull
from vtzoo.zoo import Zoo

SIZE = 3_000_000
SLACK = 500_000  # what a broken connection may lose: one read of a socket (256 KiB), twice what is read at once (64 KiB), and what is under way


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses and stalls, small ranges, and the network (of loopback) allowed."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(patience, "PATIENCE", Patience(tries=4, pause_s=0.01, stall_s=0.25))
    monkeypatch.setattr(transfer, "RANGE_BYTES", 256 << 10)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo with one file of 3 MB."""
    made = Zoo.init(tmp_path_factory.mktemp("theirs"))
    header = safetensors_header([("a.lora.A", "U8", (SIZE,))], {"vtzoo": "{}"})
    digest = made.add_object(header + random.Random(0).randbytes(SIZE))
    made.put("deltas", "big", {"digest": digest, "size_bytes": len(header) + SIZE, "method": "lora"})
    return made


@pytest.fixture
def server(theirs: Zoo) -> Iterator[Flaky]:
    """It, behind a server."""
    with flaky(theirs.root) as running:
        yield running


@pytest.fixture
def mine(tmp_path: Path) -> Zoo:
    """An empty zoo."""
    return Zoo.init(tmp_path / "mine")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said meanwhile."""
    lines: list[str] = []
    monkeypatch.setattr(talk._voice, "say", lines.append)
    return lines


def whole(zoo: Zoo) -> bool:
    """Whether the file arrived, listed and right, and nothing else is left."""
    entry = zoo.resolve("big")
    return sha256(zoo.object(entry.digest)) == entry.digest and not list((zoo.root / FOLDER).iterdir())


def absent(zoo: Zoo) -> bool:
    """Whether nothing is listed and nothing is stored as an object."""
    return not zoo.index()["deltas"] and not [p for p in (zoo.root / ".vtzoo").rglob("objects/**/*") if p.is_file()]


def kept(zoo: Zoo) -> int:
    """Bytes in quarantine."""
    return sum(p.stat().st_size for p in (zoo.root / FOLDER).iterdir())


def test_an_honest_server_sends_every_byte_once(server: Flaky, mine: Zoo) -> None:
    """The header is looked at first, then one request brings the file; what is reported is what was sent for it."""
    done = pull(["big"], server.url, zoo=mine)
    assert whole(mine)
    assert [a.start for a in server.objects] == [0, 8, 0]  # a length and a header, to find the backbone; the file
    assert done.moved_bytes == server.objects[-1].sent == mine.object(mine.resolve("big").digest).stat().st_size


def test_cuts_are_resumed_with_the_missing_bytes_only(server: Flaky, mine: Zoo) -> None:
    """Three cuts: every request starts where the bytes ended."""
    server.faults.extend([F.honest, F.honest, F.cut(700_000), F.cut(900_000), F.cut(10)])
    pull(["big"], server.url, zoo=mine)
    assert whole(mine)
    starts = [a.start for a in server.objects[2:]]
    assert len(starts) == 4
    assert starts == sorted(starts)
    assert starts[1] > 700_000 - SLACK
    assert server.sent < SIZE + 2 * SLACK


def test_the_next_process_goes_on(server: Flaky, mine: Zoo) -> None:
    """A pull killed by -9 after 2 MB: the next one asks for the rest, and what is moved is the rest."""
    server.faults.extend([F.honest, F.honest, F.stall(2_000_000)])
    line = [sys.executable, "-m", "vtzoo_cli", "pull", "big", server.url, "--zoo", str(mine.root)]
    first = subprocess.Popen(line, env={**os.environ, "HF_HUB_OFFLINE": ""}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not ((mine.root / FOLDER).is_dir() and kept(mine) > 2_000_000 - SLACK) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert absent(mine)
    before = kept(mine)
    assert before > 2_000_000 - SLACK
    done = pull(["big"], server.url, zoo=mine)
    assert whole(mine)
    assert server.objects[-1].start == before
    assert done.moved_bytes == server.objects[-1].sent < SIZE - before + 1000


def test_a_flipped_bit_is_found_and_mended(server: Flaky, mine: Zoo, said: list[str]) -> None:
    """The range that differed is named, and fetched until it comes the same twice; the rest is only compared."""
    server.faults.extend([F.honest, F.honest, F.flip(1_000_000)])
    pull(["big"], server.url, zoo=mine)
    assert whole(mine)
    assert "bytes 786,432 to 1,048,575 differed" in said[-1]
    assert server.sent < 2 * SIZE + 2 * (256 << 10) + 1000


@pytest.mark.parametrize("flips", ["always there", "now here, now there"])
def test_damage_that_stays_is_refused_and_kept(server: Flaky, mine: Zoo, flips: str) -> None:
    """Exit code 4; the message says whether it was the same each time; nothing is listed, what came is in quarantine."""
    places = count(1_000_000)

    def flipped(answer: F.Answer) -> F.Answer:
        return F.flip(1_000_000 if flips == "always there" else next(places))(answer)

    server.always = flipped
    with pytest.raises(
        Corrupt, match="came the same twice" if flips == "always there" else "came differently"
    ) as caught:
        pull(["big"], server.url, zoo=mine)
    assert caught.value.exit_code == 4
    assert absent(mine)
    assert kept(mine) > SIZE
    server.always = F.honest
    pull(["big"], server.url, zoo=mine)
    assert whole(mine)


def test_silence_is_given_up(server: Flaky, mine: Zoo) -> None:
    """A server that stalls each time without a byte: a network error, soon; one that stalls later is resumed."""
    server.always = F.stall(0)
    began = time.monotonic()
    with pytest.raises(Network):
        pull(["big"], server.url, zoo=mine)
    assert time.monotonic() - began < 6
    server.always = F.stall(1_200_000)
    pull(["big"], server.url, zoo=mine)
    assert whole(mine)


def test_dripping_is_silence(server: Flaky, mine: Zoo) -> None:
    """A byte now and then keeps no connection alive."""
    server.faults.extend([F.honest, F.honest])
    pull(["big"], server.url, zoo=mine, dry_run=True)
    server.always = F.drip(0.02)
    began = time.monotonic()
    with pytest.raises(Network, match="bytes came in"):
        transfer.fetch(_remote(server), _digest(server), mine)
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "http://[bad"])
def test_redirects_elsewhere_are_refused(server: Flaky, mine: Zoo, to: str) -> None:
    """One try, exit code 6, nothing taken."""
    server.always = F.redirect(to)
    with pytest.raises(Network) as caught:
        pull(["big"], server.url, zoo=mine)
    assert caught.value.exit_code == 6
    assert len(server.objects) == 1
    assert absent(mine)


def test_a_redirect_within_http_is_followed(server: Flaky, mine: Zoo, theirs: Zoo) -> None:
    """To another server, ranges and all."""
    with flaky(theirs.root) as other:
        path = theirs.object(theirs.resolve("big").digest).relative_to(theirs.root).as_posix()
        server.always = F.redirect(f"{other.url}/{path}")
        pull(["big"], server.url, zoo=mine)
        assert whole(mine)
        assert other.sent > SIZE


def test_https_is_not_left(theirs: Zoo, mine: Zoo, server: Flaky, tmp_path: Path) -> None:
    """A certificate is asked for; a redirect from https to http is refused, exit code 6."""
    with flaky(theirs.root, F.certificate(tmp_path / "own.pem")) as safe:
        line = [sys.executable, "-m", "vtzoo_cli", "pull", "big", safe.url, "--zoo", str(mine.root)]
        known = {**os.environ, "SSL_CERT_FILE": str(tmp_path / "own.pem")}
        path = theirs.object(theirs.resolve("big").digest).relative_to(theirs.root).as_posix()
        safe.always = F.redirect(f"{server.url}/{path}")
        ran = subprocess.run(line, env=known, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 6
        assert "leads from https to http" in ran.stderr
        assert absent(mine)
        safe.always = F.honest
        ran = subprocess.run(line, env=known, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stderr
        assert whole(mine)
        with pytest.raises(Network):
            pull(["big"], safe.url, zoo=mine)


def test_a_server_without_ranges(server: Flaky, mine: Zoo) -> None:
    """It works; after a cut it sends all again, of which the missing bytes are taken; damage is found, too."""
    server.ranges = False
    server.faults.extend([F.honest, F.honest, F.cut(1_000_000), F.flip(2_000_000)])
    pull(["big"], server.url, zoo=mine)
    assert whole(mine)
    assert {a.start for a in server.objects} == {0}


def test_more_than_the_index_says_is_refused_before_the_first_byte(server: Flaky, mine: Zoo) -> None:
    """A size that is announced too large: exit code 4, no byte asked for."""
    server.announces = 10**12
    with pytest.raises(Corrupt, match="its index says"):
        pull(["big"], server.url, zoo=mine, backbone=False)
    assert not server.objects
    assert absent(mine)


def test_less_than_there_is_is_refused(server: Flaky, mine: Zoo) -> None:
    """A size that is announced too small ends with the wrong digest; once the server is honest, the rest is fetched."""
    server.announces = -1000
    with pytest.raises(Corrupt):
        pull(["big"], server.url, zoo=mine)
    assert absent(mine)
    server.announces = 0
    before = server.sent
    pull(["big"], server.url, zoo=mine)
    assert whole(mine)
    assert server.sent - before < 5000


def test_more_than_was_announced_is_not_read(server: Flaky, mine: Zoo) -> None:
    """A body that goes on and on: as many bytes as were announced are taken and verified."""
    server.always = F.longer(50_000_000)
    pull(["big"], server.url, zoo=mine)
    assert whole(mine)
    assert server.objects[-1].sent < 20_000_000


def test_a_disk_without_room_is_told_before_the_first_byte(theirs: Zoo, mine: Zoo, tmp_path: Path) -> None:
    """Index and server agree on more than the disk has: exit code 7."""
    large = Zoo.init(tmp_path / "large")
    digest = large.add_object(b"x" * 100)
    large.put("models", "large", {"files": {"model.onnx": digest}, "size_bytes": 10**16})
    with flaky(large.root) as server:
        server.announces = 10**16 - 100
        with pytest.raises(Resources):
            pull(["large"], server.url, zoo=mine)
        assert not server.objects


def test_errors_that_pass_and_errors_that_stay(server: Flaky, mine: Zoo) -> None:
    """Overload is waited for, a few times; what is missing or forbidden is said at once."""
    server.always = F.refuse(503)
    with pytest.raises(Network):
        transfer.fetch(_remote(server), _digest(server), mine)
    assert len(server.objects) == 4
    server.always = F.honest
    for status, error in ((404, NotFound), (403, VtzooError), (410, Network)):
        before = len(server.objects)
        server.faults.append(F.refuse(status))
        with pytest.raises(error):
            transfer.fetch(_remote(server), _digest(server), mine)
        assert len(server.objects) == before + 1
    server.faults.extend([F.refuse(503), F.refuse(429), F.cut(0)])
    transfer.fetch(_remote(server), _digest(server), mine)
    assert sha256(mine.object(_digest(server))) == _digest(server)


def test_two_at_once_never_write_the_same_file(server: Flaky, mine: Zoo) -> None:
    """Each has a file of its own; both end well, and nothing is left."""
    server.always = F.cut(800_000)
    failed: list[Exception] = []

    def run() -> None:
        try:
            transfer.fetch(_remote(server), _digest(server), Zoo(mine.root))
        except Exception as error:  # noqa: BLE001 - looked at by the test
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sha256(mine.object(_digest(server))) == _digest(server)
    assert not list((mine.root / FOLDER).iterdir())


def test_an_index_that_is_none(tmp_path: Path, mine: Zoo) -> None:
    """Garbage, traversal by digest or name, or nothing: refused, each with its code."""
    (tmp_path / "bad").mkdir()
    index = tmp_path / "bad" / "zoo_index.yaml"
    with flaky(tmp_path / "bad") as server:
        with pytest.raises(NotFound, match="has no zoo_index"):
            pull([], server.url, zoo=mine)
        for text in (
            "schema: 1\ndeltas: {x: {digest: '../../x'}}",
            f"schema: 1\ndeltas: {{'../x': {{digest: {'a' * 64}}}}}",
            "\0",
        ):
            index.write_text(text)
            with pytest.raises(Corrupt):
                pull([], server.url, zoo=mine)
    assert absent(mine)


def test_an_index_without_end(tmp_path: Path, mine: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than an index may have is read."""
    monkeypatch.setattr(patience, "PATIENCE", Patience(tries=1))
    (tmp_path / "bad").mkdir()
    with (tmp_path / "bad" / "zoo_index.yaml").open("wb") as file:
        file.truncate(110_000_000)
    with flaky(tmp_path / "bad") as server:
        with pytest.raises(Corrupt, match="more than 33554432 bytes"):
            pull([], server.url, zoo=mine)
        assert server.log[0].sent < 105_000_000


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(s, marks=pytest.mark.slow) for s in range(6, 40))])
def test_any_sequence_of_faults(server: Flaky, mine: Zoo, seed: int) -> None:
    """Six faults drawn at random: a verified file, or a refusal with nothing listed; then an honest server, and all is well."""
    draw = random.Random(seed)
    server.ranges = draw.random() < 0.8
    server.faults.extend(F.drawn(draw, SIZE) for _ in range(6))
    try:
        pull(["big"], server.url, zoo=mine)
    except VtzooError as error:
        assert error.hint
        assert absent(mine)
    else:
        assert whole(mine)
    server.faults.clear()
    pull(["big"], server.url, zoo=mine)
    assert whole(mine)


def _remote(server: Flaky) -> object:
    from vtzoo.remotes import open_remote

    return open_remote(server.url)


def _digest(server: Flaky) -> str:
    return Zoo(server.folder).resolve("big").digest
