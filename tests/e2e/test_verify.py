"""Verifying and signing the zoo's entries, by their commands."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vtzoo.errors import Corrupt, UsageError
from vtzoo.files import safetensors_header
from vtzoo.soundness import look
from vtzoo.tensors import write
from vtzoo.verbs.rename import rename_task
from vtzoo.verbs.sign import sign
from vtzoo.verbs.verify import verify
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main


@pytest.fixture
def key(tmp_path: Path) -> dict[str, Path]:
    """A private key and its public half."""
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    from cryptography.hazmat.primitives import serialization as s

    made, own = ec.generate_private_key(ec.SECP384R1()), {n: tmp_path / f"key.{n}" for n in ("pem", "pub")}
    own["pem"].write_bytes(made.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    own["pub"].write_bytes(made.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return own


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_found_in_every_dtype(
    zoo: Zoo, tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    """The last of many, beyond the first chunk that is read; extreme but finite ones are fine."""
    info, path = torch.finfo(dtype), tmp_path / "w.safetensors"
    numbers = torch.full((3 << 20,), info.max, dtype=dtype)
    numbers[:3] = torch.tensor([info.min, info.tiny, 0.0], dtype=dtype)
    write(path, {"i": torch.arange(3), "w": numbers}, {})
    assert not look(zoo, "w.safetensors", zoo.add_object(path)).wrong
    numbers[-1] = value
    raw = numbers.view(torch.uint8).numpy().tobytes()
    code = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    path.write_bytes(safetensors_header([("w", code, (3 << 20,))], {}) + raw)
    assert look(zoo, "w.safetensors", zoo.add_object(path)).wrong == ("w.safetensors: w holds NaN or infinity",)


def test_what_is_wrong_is_said_by_entry(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 4 and a row for what is wrong, the other entries sound; with --json both in one document."""
    good = zoo.add_object(safetensors_header([("w", "F32", (1,))], {}) + struct.pack("<f", 1))
    zoo.put("models", "good", {"files": {"model.safetensors": good}, "size_bytes": zoo.object(good).stat().st_size})
    bad = zoo.add_object(b"hello")
    zoo.put("models", "bad", {"files": {"model.onnx": bad}})
    place = zoo.object(bad)
    place.chmod(0o644)
    place.write_bytes(b"hellO")
    assert main(["--zoo", str(zoo.root), "--json", "verify"]) == 4
    out, err = capsys.readouterr()
    rows = {r["name"]: r["wrong"] for r in json.loads(out)["rows"]}
    assert (rows["good"], rows["tiny"]) == ([], [])
    assert [w.partition(":")[0] for w in rows["bad"]] == [
        "model.onnx is damaged",
        "model.onnx can be written to (mode 644, not 444)",
    ]
    assert "1 of 3 entries can't be trusted, the first is 'bad'" in err
    assert main(["--zoo", str(zoo.root), "verify", "good", "tiny"]) == 0
    assert "2 entries, 2 files" in capsys.readouterr().out


def test_a_catalogues_entry_has_nothing_here(zoo: Zoo) -> None:
    """It is no fault, and it is not counted as read."""
    found = verify("tf_efficientnet_lite0", zoo=zoo)
    assert (found.rows[0]["here"], found.rows[0]["wrong"], found.report["objects"]) == (False, [], 0)


def test_signed_entries_verify_until_something_changes(zoo: Zoo, key: dict[str, Path]) -> None:
    """Signed, renamed, signed anew: verified; another licence in the index: not; the old signature goes when a new one comes."""
    sign("tiny", key=key["pem"], zoo=zoo)
    first = zoo.resolve("tiny").facts["signature"].removeprefix("sha256:")
    zoo.rename(zoo.resolve("tiny"), "small")
    report = verify(require_signed=True, public_key=key["pub"], zoo=zoo).report
    assert (report["signed"], report["wrong"]) == (1, 0)
    sign("small", key=key["pem"], zoo=zoo)
    assert not (zoo.root / ".vtzoo" / "objects" / "sha256" / first[:2] / first).exists()
    entry = zoo.resolve("small")
    zoo.put("backbones", "small", {**entry.facts, "license": "mit"}, replace=True)
    (row,) = verify(public_key=key["pub"], zoo=zoo).rows
    assert "its facts or files are others now" in row["wrong"][0]
    assert not verify(zoo=zoo).rows[0]["wrong"]


def test_what_is_not_sound_is_not_signed(zoo: Zoo, key: dict[str, Path]) -> None:
    """A damaged file, and the catalogue's entries, which aren't the user's to sign."""
    place = zoo.object(zoo.resolve("tiny").digest)
    place.chmod(0o644)
    with pytest.raises(Corrupt, match=r"'tiny' is not signed: .* can be written to"):
        sign("tiny", key=key["pem"], zoo=zoo)
    with pytest.raises(UsageError, match="built-in catalogue"):
        sign("tf_efficientnet_lite0", key=key["pem"], zoo=zoo)


def test_a_task_renamed_is_another_content(zoo: Zoo, key: dict[str, Path], make_delta: Callable[[str], str]) -> None:
    """mv --task writes another file: what was signed before is no longer there."""
    make_delta("pets/lora")
    sign("pets/lora", key=key["pem"], zoo=zoo)
    assert not verify("pets/lora", require_signed=True, public_key=key["pub"], zoo=zoo).report["wrong"]
    rename_task(ref="pets/lora", old="pets", new="animals", zoo=zoo)
    assert verify("pets/lora", public_key=key["pub"], zoo=zoo).report["wrong"] == 1


@pytest.fixture
def make_delta(zoo: Zoo, tmp_path: Path) -> Callable[[str], str]:
    """Keeps a delta of `tiny` under a name."""
    import vtzoo

    def make(name: str) -> str:
        model = vtzoo.build("tiny", zoo=zoo, num_classes=2)
        vtzoo.inject(model, "lora[rank=1]")
        delta = vtzoo.extract(model, task="pets", classes=["cat", "dog"])
        digest = delta.save(tmp_path / "d.safetensors")
        zoo.add_object(tmp_path / "d.safetensors")
        zoo.put("deltas", name, {"digest": digest, "method": delta.method, "backbone": "tiny", "tasks": ["pets"]})
        return name

    return make


@pytest.mark.slow
def test_reading_is_about_as_fast_as_hashing(zoo: Zoo, tmp_path: Path) -> None:
    """Looking at every number takes less time than the digest alone takes, so both at once less than three times that."""
    import hashlib

    write(tmp_path / "w.safetensors", {"w": torch.ones(64 << 20)}, {})
    digest = zoo.add_object(tmp_path / "w.safetensors")
    start = time.perf_counter()
    with zoo.object(digest).open("rb") as file:
        hashlib.file_digest(file, "sha256")
    alone = time.perf_counter() - start
    start = time.perf_counter()
    assert not look(zoo, "w.safetensors", digest).wrong
    assert time.perf_counter() - start < 3 * alone


def test_a_signature_travels_and_is_asked_for(
    zoo: Zoo, key: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is signed comes with its signature and verifies there; what isn't is refused before a byte of it is fetched."""
    other = Zoo.init(tmp_path / "other")
    words = [
        "--zoo",
        str(other.root),
        "pull",
        "tiny",
        str(zoo.root),
        "--require-signed",
        "--public-key",
        str(key["pub"]),
    ]
    assert main(words) == 4
    assert "'tiny' is not signed" in capsys.readouterr().err
    assert not list((other.root / ".vtzoo").rglob("objects/*/*/*"))
    sign("tiny", key=key["pem"], zoo=zoo)
    assert main(words) == 0
    assert verify("tiny", require_signed=True, public_key=key["pub"], zoo=other).report["signed"] == 1
    assert main(words) == 0  # up to date
    assert main(["--zoo", str(other.root), "fsck"]) == 0
    entry = other.resolve("tiny")
    other.put("backbones", "tiny", {**entry.facts, "license": "mit"}, replace=True)
    assert main(words) == 4  # what is here keeps its facts, and they are not those that were signed
    other.put("backbones", "tiny", {k: v for k, v in entry.facts.items() if k != "signature"}, replace=True)
    assert main(words) == 0  # the signature of the very facts comes along
    assert verify("tiny", require_signed=True, public_key=key["pub"], zoo=other).report["signed"] == 1
