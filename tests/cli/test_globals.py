"""Global options, on both sides of the verb."""

import json
from pathlib import Path

import pytest

import vtzoo as library
from vtzoo.errors import UsageError
from vtzoo.zoo import Zoo
from vtzoo_cli._argv import split


@pytest.mark.parametrize(
    "words",
    [
        ("--json", "--zoo", "ZOO", "ls", "deltas"),
        ("ls", "deltas", "--json", "--zoo", "ZOO"),
        ("ls", "--zoo=ZOO", "deltas", "--json"),
        ("--zoo=ZOO", "ls", "--json", "deltas", "--quiet", "--no-color"),
    ],
)
def test_both_sides_of_the_verb(vtzoo, zoo: Zoo, words: tuple[str, ...]) -> None:
    """A global option means the same before and after the verb, with its value apart or after an equals sign."""
    ran = vtzoo(*(w.replace("ZOO", str(zoo.root)) for w in words))
    assert ran.code == 0
    assert [e["name"] for e in json.loads(ran.out)] == ["pets/lora"]


def test_words_after_two_dashes_are_left_alone() -> None:
    """What follows `--` belongs to the verb, whatever it looks like."""
    said = split(["predict", "ref", "--json", "--", "--zoo", "--json"])
    assert said.rest == ("predict", "ref", "--", "--zoo", "--json")
    assert said.flags == {"--json"}
    assert said.zoo is None


def test_zoo_wants_a_value() -> None:
    """`--zoo` at the end, or before another option, is refused rather than taking the next word for a folder."""
    for words in (["ls", "--zoo"], ["--zoo", "--json", "ls"]):
        with pytest.raises(UsageError, match="--zoo needs a value"):
            split(words)


def test_a_flag_takes_no_value(vtzoo) -> None:
    """`--json=yes` is refused, in two lines, with exit code 2."""
    ran = vtzoo("ls", "--json=yes")
    assert ran.code == 2
    assert ran.out == ""
    assert ran.lines == ["error: option --json takes no value", "hint: write --json alone"]


def test_version(vtzoo) -> None:
    """`--version` prints the version, and with `--json` one document, on either side of a verb."""
    assert vtzoo("--version").out == f"vtzoo {library.__version__}\n"
    assert json.loads(vtzoo("ls", "--version", "--json").out)["version"] == library.__version__


def test_environment_names_the_zoo(vtzoo, zoo: Zoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """$VTZOO_ZOO is used where `--zoo` is not given, and `--zoo` wins over it."""
    monkeypatch.setenv("VTZOO_ZOO", str(zoo.root))
    assert len(json.loads(vtzoo("ls", "deltas", "--json").out)) == 1
    other = Zoo.init(tmp_path / "other")
    assert json.loads(vtzoo("ls", "deltas", "--json", "--zoo", other.root).out) == []


def test_no_words_give_help(vtzoo) -> None:
    """`vtzoo` alone prints the help, all verbs in it."""
    ran = vtzoo()
    assert ran.code == 0
    assert "Usage: vtzoo" in ran.out
    assert "--zoo DIR" in ran.out
    assert ran.err == ""
