import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from vtzoo import signing
from vtzoo.errors import Mismatch, NotFound, UsageError
from vtzoo.refs import Entry, objects_of

pytest.importorskip("model_signing")
D, E = "ab" * 32, "cd" * 32
FACTS = {
    "digest": D,
    "method": "lora",
    "fingerprint": f"sha256:{E}",
    "tasks": ["pets"],
    "created": "2026-01-01",
    "command": "vtzoo train",
}
ENTRY = Entry("deltas", "pets/lora", FACTS)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two pairs of keys, as a user's openssl would make them."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    place, made = tmp_path_factory.mktemp("keys"), {}
    for name in ("one", "two"):
        key = ec.generate_private_key(ec.SECP256R1())
        made[name], made[f"{name}.pub"] = place / f"{name}.pem", place / f"{name}.pub"
        made[name].write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
        made[f"{name}.pub"].write_bytes(
            key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        )
    key = ec.generate_private_key(ec.SECP256R1())
    made["locked"], made["rsa"] = place / "locked.pem", place / "rsa.pem"
    made["locked"].write_bytes(
        key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"x"))
    )
    other = rsa.generate_private_key(65537, 2048)
    made["rsa"].write_bytes(other.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    return made


@pytest.fixture(scope="module")
def signature(keys: dict[str, Path]) -> bytes:
    """Of the entry above."""
    return signing.sign(ENTRY, keys["one"])


def _signed(**changes: object) -> Entry:
    return replace(ENTRY, facts={**FACTS, "signature": f"sha256:{E}", **changes})


def test_what_was_signed_verifies_wherever_it_goes(keys: dict[str, Path], signature: bytes) -> None:
    """Under another name, at another time, by another command: the same content."""
    wanted = signing.policy(require_signed=True, public_key=keys["one.pub"])
    for entry in (_signed(), replace(_signed(created="2027-01-01", command=""), name="other")):
        assert signing.check(entry, {E: signature}.__getitem__, wanted)
    assert objects_of("deltas", _signed().facts) == {D, E}


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": E}, {"method": "ssf"}, {"tasks": ["dogs"]}, {"fingerprint": f"sha256:{D}"}, {"license": "mit"}, {"metrics": {"top1": 1.0}}, {"files": {"config.json": D}},
    ],
)  # fmt: skip
def test_a_signature_put_beside_other_facts_does_not_verify(
    keys: dict[str, Path], signature: bytes, changes: dict[str, object]
) -> None:
    """A fact that is changed, added or taken from another entry is Mismatch."""
    with pytest.raises(Mismatch, match="its facts or files are others now"):
        signing.check(_signed(**changes), lambda _: signature, signing.Policy(public_key=keys["one.pub"]))


def test_another_section_does_not_verify(keys: dict[str, Path], signature: bytes) -> None:
    """A delta's signature is no backbone's."""
    with pytest.raises(Mismatch):
        signing.check(
            replace(_signed(), section="models"), lambda _: signature, signing.Policy(public_key=keys["one.pub"])
        )


@pytest.mark.parametrize("odd", [b"", b"{}", b"[]", b"hello", b"\xff", b"[" * 100_000, b" " * (2 << 20)])
def test_what_is_no_signature_is_refused(keys: dict[str, Path], odd: bytes) -> None:
    """Whatever the object holds: Mismatch, and nothing on stdout."""
    with pytest.raises(Mismatch, match="pets/lora"):
        signing.check(_signed(), lambda _: odd, signing.Policy(public_key=keys["one.pub"]))


def test_keys_count_by_their_owners(keys: dict[str, Path], signature: bytes) -> None:
    """Another key than the signer's is Mismatch; without a signature an entry is refused only where one is required."""
    with pytest.raises(Mismatch, match=r"not what two\.pub signed"):
        signing.check(_signed(), lambda _: signature, signing.Policy(public_key=keys["two.pub"]))
    assert not signing.check(ENTRY, lambda _: b"", signing.Policy(public_key=keys["one.pub"]))
    with pytest.raises(Mismatch, match="'pets/lora' is not signed"):
        signing.check(ENTRY, lambda _: b"", signing.Policy(public_key=keys["one.pub"], required=True))
    assert not signing.check(_signed(), lambda _: b"", signing.Policy())


@pytest.mark.parametrize("name", ["locked", "rsa", "one.pub"])
def test_keys_that_cannot_sign_are_refused(keys: dict[str, Path], name: str) -> None:
    """An encrypted key, one of another kind, and a public one say so."""
    with pytest.raises(UsageError, match="can't sign"):
        signing.sign(ENTRY, keys[name])


def test_policy_is_asked_for_or_the_environments(keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """$VTZOO_REQUIRE_SIGNED and $VTZOO_PUBLIC_KEY stand where no option does; required without a key is UsageError."""
    assert signing.policy() == signing.Policy()
    monkeypatch.setenv(signing.REQUIRED, "1")
    with pytest.raises(UsageError, match="no key says whose"):
        signing.policy()
    monkeypatch.setenv(signing.PUBLIC_KEY, str(keys["one.pub"]))
    assert signing.policy() == signing.Policy(public_key=keys["one.pub"], required=True)
    monkeypatch.setenv(signing.REQUIRED, "0")
    assert not signing.policy().required
    with pytest.raises(NotFound, match="there is no key"):
        signing.policy(public_key=Path("nowhere.pub"))


def test_openssl_and_the_packages_own_program_agree(keys: dict[str, Path], signature: bytes, tmp_path: Path) -> None:
    """The signature is an ordinary one of model-signing over a folder with the statement."""
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "entry.json").write_bytes(signing.statement(ENTRY))
    (tmp_path / "s.json").write_bytes(signature)
    code = "import sys, model_signing as m; m.verifying.Config().use_elliptic_key_verifier(public_key=sys.argv[1]).verify(sys.argv[2], sys.argv[3])"
    import sys

    words = [sys.executable, "-c", code, str(keys["one.pub"]), str(tmp_path / "entry"), str(tmp_path / "s.json")]
    assert subprocess.run(words, check=False, capture_output=True).returncode == 0
    (tmp_path / "entry" / "entry.json").write_bytes(b"{}")
    assert subprocess.run(words, check=False, capture_output=True).returncode != 0
