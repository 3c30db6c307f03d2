import os
from pathlib import Path

import pytest

from vtzoo import refs
from vtzoo.errors import Corrupt, NotFound, UsageError
from vtzoo.refs import Entry

A, B, C = "a1" * 32, "a1b2" * 16, "c3" * 32
LEGAL = [
    "a", "0", "fashion/lora", "vit_base_patch16_224.augreg_in21k", "a-b_c.d/e", "x" * 96, f"{'x' * 96}/{'y' * 96}",
    "console", "com", "nullable/aux-head", "a.b.c", "lpt", "com10",
]  # fmt: skip
ILLEGAL = [
    "", "/", "a/", "/a", "a//b", ".", "..", "../a", "a/../b", "a..b", "./a", ".hidden", "-a", "_a", "a.", "a./b",
    "A", "fashion/LoRA", "a b", "a\tb", "a\n", "a\0b", "a\\b", "a:b", "c:a", "a@b", "~", "~root", "a*",
    "ä", "\u0430", "a\u202eb",
    "con", "nul", "aux/x", "x/prn", "com1", "lpt9.txt", "nul.tar.gz", "com0", "x" * 97, "/".join(["x" * 90] * 3),
    "w.safetensors", "a/w.safetensors", "https://x/y", "%2e%2e", "a%2fb", "$home", "`id`", "a;b", "a|b",
    "'", '"', "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_legal_names_come_back_unchanged(name: str) -> None:
    """Names of timm and of tasks are legal, and none of them reads as a path."""
    assert refs.check_name(name) == name
    assert not refs.is_path(name)


@pytest.mark.parametrize("name", ILLEGAL)
def test_hostile_names_are_refused_in_two_plain_lines(name: str) -> None:
    """What could leave a folder, hide, confuse a shell or be a Windows device is UsageError, shown without tricks."""
    with pytest.raises(UsageError) as caught:
        refs.check_name(name)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200
    assert caught.value.hint


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "a",
        A.upper(),
        A[:-1],
        A + "0",
        f"sha256:{A}",
        A[:-1] + "g",
        f"{A}\n",
        f"../{A}",
        "../" * 20 + "abcd",
        "0" * 63 + "\u0660",
    ],
)
def test_hostile_digests_are_refused(digest: str) -> None:
    """A digest is 64 lower-case hex digits and nothing else, whatever the file system would make of it."""
    assert refs.check_digest(A) == A
    with pytest.raises(UsageError, match="is no sha256"):
        refs.check_digest(digest)


@pytest.mark.parametrize("member", ["model.safetensors", "config.json", "README.md", "a/b/c.txt", "_x"])
def test_plain_file_names_of_a_model_are_legal(member: str) -> None:
    """The files of a timm folder are legal."""
    assert refs.check_member(member) == member


@pytest.mark.parametrize(
    "member",
    ["", "..", "../x", "a/../x", "/etc/passwd", "a//b", "a\\b", "C:x", ".ssh/config", "nul", "a/CON.txt", "x\n", "x."],
)
def test_file_names_that_leave_the_folder_are_refused(member: str) -> None:
    """A model from a stranger's index can't name a file outside its folder."""
    with pytest.raises(UsageError, match="no legal file name"):
        refs.check_member(member)


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("../a", True), ("..\\a", True), ("../../a", True), (".../a", False), ("..", False),
        ("./a", True), (".\\a", True), ("/a", True), ("\\\\host\\a", True), ("~/a", True), ("~", True), ("C:\\a", True),
        ("d:a", True), ("a.safetensors", True), ("a/b.safetensors", True), ("a", False), ("a/b", False),
        ("fashion/lora", False), ("a@sha256:ab12", False), ("a.safetensors.bak", False), ("", False),
        ("hf-hub:a/b", False),
    ],
)  # fmt: skip
def test_a_ref_is_a_path_only_by_its_looks(ref: str, expected: bool) -> None:
    """Only './', '../', '/', '~', a drive or '.safetensors' make a path; what is on the disk never decides."""
    assert refs.is_path(ref) is expected


def test_path_refs_expand_home_and_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home folder; a path to nothing is NotFound."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.safetensors").write_bytes(b"")
    assert refs.as_path("~/w.safetensors") == tmp_path / "w.safetensors"
    with pytest.raises(NotFound, match=r"\./nothing"):
        refs.as_path("./nothing")


ENTRIES = [
    Entry("backbones", "vit-s16", {}, builtin=True),
    Entry("backbones", "vit-s16-dino", {}, builtin=True),
    Entry("backbones", "shared", {"source": f"object:sha256:{C}"}),
    Entry("deltas", "fashion/lora", {"digest": A}),
    Entry("deltas", "fashion/lora-wide", {"digest": B}),
    Entry("deltas", "emoji/ssf", {"digest": C}),
    Entry("models", "student", {"files": {"model.safetensors": B, "config.json": A}}),
]


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("fashion/lora", "fashion/lora"),
        ("fashion/lora-", "fashion/lora-wide"),
        ("e", "emoji/ssf"),
        ("stu", "student"),
        ("vit-s16", "vit-s16"),
        (f"fashion/lora@sha256:{A}", "fashion/lora"),
        ("fashion@sha256:a1b2", "fashion/lora-wide"),
        ("student@sha256:a1b2", "student"),
        ("shared@sha256:c3c3", "shared"),
    ],
)
def test_resolve_takes_exact_names_unique_prefixes_and_digests(ref: str, name: str) -> None:
    """An exact name wins over longer ones, a unique prefix is enough, a digest narrows a prefix."""
    assert refs.resolve(ref, ENTRIES).name == name


@pytest.mark.parametrize(
    ("ref", "section", "refusal", "message", "hint"),
    [
        ("fashion/", None, UsageError, "could be fashion/lora, fashion/lora-wide", "in full, for example fashion/lora"),
        ("fashion/lroa", None, NotFound, "no entry is called 'fashion/lroa'", "did you mean fashion/lora"),
        ("Fashion/LoRA", None, NotFound, "no entry is called", "did you mean fashion/lora"),
        (
            "fashion/lora",
            "backbones",
            NotFound,
            "no backbone is called",
            "one of the deltas; a backbone is wanted here",
        ),
        ("fash", "backbones", NotFound, "no backbone is called", "known: shared, vit-s16"),
        ("fashion/lora@sha256:ffff", None, NotFound, "no entry", "other content: fashion/lora@sha256:a1a1a1a1a1a1"),
        ("fashion/lora@sha256:", None, UsageError, "is no ref", "name@sha256:ab12"),
        ("fashion/lora@sha256:a1b", None, UsageError, "is no ref", "4 to 64 hex digits"),
        ("fashion/lora@md5:abcd", None, UsageError, "is no ref", "sha256:"),
        ("fashion/lora@", None, UsageError, "is no ref", "sha256:"),
        ("", None, UsageError, "empty", "vtzoo ls"),
        ("./fashion", None, UsageError, "is a path", "vtzoo ls"),
        ("../fashion", None, UsageError, "is a path", "vtzoo ls"),
        ("..", None, NotFound, "no entry", "./.."),
        ("x\n\x1b[2J", None, NotFound, r"\n\x1b[2J", ""),
    ],
)
def test_resolve_refuses_with_the_next_thing_to_type(
    ref: str, section: refs.Section | None, refusal: type[Exception], message: str, hint: str
) -> None:
    """Several, none, another kind or another content: each says what was seen and what to type."""
    with pytest.raises(refusal) as caught:
        refs.resolve(ref, ENTRIES, section)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_a_name_near_nothing_lists_five() -> None:
    """Where no name is near, the hint gives a first few and says that there are more."""
    with pytest.raises(NotFound) as caught:
        refs.resolve("zzz", [Entry("backbones", f"n{i:02}", {}) for i in range(9)], "backbones")
    assert caught.value.hint == "known: n00, n01, n02, n03, n04 …"


def test_resolve_lists_no_more_than_a_line() -> None:
    """A prefix of very many names lists eight and counts the rest."""
    with pytest.raises(UsageError, match="n07 and 92 more"):
        refs.resolve("n", [Entry("deltas", f"n{i:02}", {"digest": A}) for i in range(100)])


def test_resolve_prefers_own_over_builtin() -> None:
    """A delta named like a backbone of a newer catalogue is still found by its name."""
    own = Entry("deltas", "vit-s16", {"digest": A})
    assert refs.resolve("vit-s16", [*ENTRIES, own]) is own
    assert refs.resolve("vit-s16", [*ENTRIES, own], "backbones").builtin


def test_resolve_tells_equal_names_apart_by_digest() -> None:
    """After a merge in git two sections may hold one name: the refusal gives the refs that tell them apart."""
    both = [Entry("deltas", "x", {"digest": A}), Entry("models", "x", {"files": {"model.safetensors": C}})]
    with pytest.raises(UsageError) as caught:
        refs.resolve("x", both)
    assert "x@sha256:a1a1a1a1a1a1 (deltas), x@sha256:c3c3c3c3c3c3 (models)" in caught.value.message
    assert refs.resolve("x@sha256:c3c3", both).section == "models"


def test_objects_and_digest_of_each_kind() -> None:
    """A delta keeps its file, a model all its files, a backbone the object it was added from; a hub source nothing."""
    assert {e.name: e.objects for e in ENTRIES if e.objects} == {
        "shared": {C}, "fashion/lora": {A}, "fashion/lora-wide": {B}, "emoji/ssf": {C}, "student": {A, B},
    }  # fmt: skip
    assert Entry("models", "m", {"files": {"b.onnx": B, "a.json": A}}).digest == A
    packaged = Entry("backbones", "p", {"source": "package:x/y", "digest": A})
    assert (packaged.objects, packaged.digest) == (frozenset(), A)


@pytest.mark.parametrize(
    ("section", "facts", "message"),
    [
        ("deltas", {}, "'digest' is missing"),
        ("deltas", {"digest": "../../x"}, "no sha256"),
        ("deltas", {"digest": 5}, "'digest' is 5"),
        ("deltas", {"digest": A, "size_bytes": -1}, "'size_bytes' is -1"),
        ("deltas", {"digest": A, "size_bytes": True}, "'size_bytes' is True"),
        ("deltas", {"digest": A, "tasks": "fashion"}, "'tasks' is 'fashion'"),
        ("models", {"files": {}}, "'files' is missing"),
        ("models", {"files": {"../x": A}}, "no legal file name"),
        ("models", {"files": {"x": "y"}}, "no sha256"),
        ("models", {"files": [A]}, "'files' is"),
        ("backbones", {"arch": "vit"}, "'source' is missing"),
        ("backbones", {"arch": "vit", "source": "object:sha256:/etc/passwd"}, "no sha256"),
        ("backbones", {"arch": "vit", "source": "hf-hub:a/b", "crop_pct": "0.9"}, "'crop_pct' is '0.9'"),
    ],
)
def test_facts_that_others_rely_on_are_checked(section: refs.Section, facts: dict, message: str) -> None:
    """Missing facts, wrong types, hostile digests and file names are refused, naming the fact."""
    with pytest.raises(UsageError) as caught:
        refs.check_facts(section, facts)
    assert message in caught.value.message


def test_unknown_sections_are_refused() -> None:
    """A mistyped section gets the nearest one."""
    assert refs.check_section("models") == "models"
    with pytest.raises(UsageError) as caught:
        refs.check_section("model")
    assert caught.value.hint.startswith("did you mean models")


@pytest.mark.parametrize(
    ("section", "facts", "message"),
    [
        ("models", {"files": {"a.json": A, "A.json": B}}, "'A.json' differs from another file by case alone"),
        ("models", {"files": {"a": A, "a/b": B}}, "'a/b' lies in another file"),
        ("models", {"files": {"a.json": 11}}, "the digest of 'a.json' is 11"),
        ("models", {"files": {"x" * 256: A}}, "256 characters is too long"),
        ("deltas", {"digest": A, "signature": A}, "'signature' is"),
        ("deltas", {"digest": A, "signature": "sha256:../x"}, "no sha256"),
        ("deltas", {"digest": A, "size_bytes": 2**63}, "'size_bytes' is"),
        ("deltas", {"digest": A, "size_bytes": 16**9000}, "'size_bytes' is a number without end"),
        ("backbones", {"arch": "a", "source": "s", "input_size": [3, 8]}, "'input_size' is [3, 8]"),
        ("backbones", {"arch": "a", "source": "s", "input_size": [3, 8, 1 << 17]}, "'input_size' is"),
        ("backbones", {"arch": "a", "source": "s", "mean": [float("nan")]}, "'mean' is [nan]"),
        ("backbones", {"arch": "a", "source": "s", "crop_pct": float("inf")}, "'crop_pct' is inf"),
        ("backbones", {"arch": "a", "source": "s", "head": [1]}, "'head' is [1]"),
    ],
)
def test_facts_that_would_mislead_others_are_refused(section: refs.Section, facts: dict, message: str) -> None:
    """Files that some systems take for one, numbers that no file has, texts where numbers stand."""
    with pytest.raises(UsageError) as caught:
        refs.check_facts(section, facts)
    assert message in caught.value.message


def test_a_place_is_contained_without_links(tmp_path: Path) -> None:
    """A file, or nothing yet, below a folder; the folder itself may be reached through a link, what lies in it may not."""
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "zoo").symlink_to(tmp_path / "real")
    zoo = tmp_path / "zoo"
    (zoo / "a" / "b").write_text("x")
    for path in (zoo / "a" / "b", zoo / "a" / "none", zoo / "no" / "folder" / "yet"):
        assert refs.check_contained(path, zoo) == path
    (zoo / "link").symlink_to(tmp_path / "real" / "a")
    (zoo / "a" / "dead").symlink_to("nowhere")
    for path in (zoo / "link" / "b", zoo / "a" / "dead", zoo / "a"):
        with pytest.raises(Corrupt, match=r"symbolic link|no ordinary file"):
            refs.check_contained(path, zoo)


def test_signatures_keep_their_objects() -> None:
    """An entry's signature lives as long as the entry."""
    assert refs.objects_of("deltas", {"digest": A, "signature": f"sha256:{B}"}) == {A, B}
    assert refs.objects_of("backbones", {"source": "hf-hub:a/b", "signature": f"sha256:{B}"}) == {B}


def test_a_file_that_goes_while_it_is_looked_at_is_contained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark of another writer, or an object that is removed, may be there at one moment and gone at the next."""
    path, looks = tmp_path / "x", list[Path]()
    path.touch()

    def late(place: Path) -> os.stat_result:
        looks.extend([place] * (place == path))
        if len(looks) > 1:
            path.unlink(missing_ok=True)
        return os.lstat(place)

    monkeypatch.setattr(Path, "lstat", late)
    assert refs.check_contained(path, tmp_path) == path
    path.unlink(missing_ok=True)
    assert refs.check_contained(path, tmp_path) == path
