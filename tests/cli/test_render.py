"""What is printed: strict JSON, aligned columns, talk on stderr only."""

import json

import pytest

from vtzoo import talk
from vtzoo_cli import _render, _results
from vtzoo_cli._blocks import Line, Table, Tree, indented, markdown, number, plain, size


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that are not finite become null, tuples lists, keys text; any JSON reader takes it."""
    _render.document({1: float("nan"), "a": (float("inf"), "ü"), "b": {"c": -0.5}})
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail) == {"1": None, "a": [None, "ü"], "b": {"c": -0.5}}
    assert text.isascii()


def test_talk_and_progress_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """The library's talk is printed on stderr, and passes silently with quiet; items pass through either way."""
    _render.setup(quiet=False, color=True)
    talk.say("training")
    assert list(talk.track([1, 2], "steps", 2)) == [1, 2]
    assert capsys.readouterr() == ("", "training\n")
    _render.setup(quiet=True, color=True)
    talk.say("training")
    assert list(talk.track([1, 2], "steps", 2)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_tables_as_text() -> None:
    """Columns are aligned, numbers to the right, without trailing blanks."""
    table = Table(("name", "size"), [("a", "1 B"), ("long", "22 B")], right=frozenset({"size"}))
    assert plain(table) == ["name  size", "a      1 B", "long  22 B"]
    assert markdown(Table(("a|b",), [("x|y",)])) == ["| a|b |", "| --- |", "| x\\|y |"]


def test_tables_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """rich draws the table, and takes square brackets as they are."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _render.blocks([Line("first"), Table(("method",), [("lora[rank=8]",)])])
    out = capsys.readouterr().out
    assert "first" in out
    assert "lora[rank=8]" in out


def test_trees(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blanks a level in pipes and files; rich draws branches on a terminal, and takes square brackets as they are."""
    tree = Tree("both", [Tree("lora[rank=8]", [Tree("data")]), Tree("ssf")])
    assert indented(tree) == ["both", "  lora[rank=8]", "    data", "  ssf"]
    _render.blocks([tree])
    assert capsys.readouterr().out == "both\n  lora[rank=8]\n    data\n  ssf\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _render.blocks([tree])
    drawn = capsys.readouterr().out
    assert "lora[rank=8]" in drawn
    assert "└── ssf" in drawn


@pytest.mark.parametrize(
    ("count", "as_size", "as_number"),
    [
        (0, "0 B", "0"),
        (999, "999 B", "999"),
        (1500, "1.5 kB", "1.5 k"),
        (22_100_000, "22.1 MB", "22.1 M"),
        (None, "", ""),
    ],
)
def test_sizes(count: int | None, as_size: str, as_number: str) -> None:
    """Bytes and counts are scaled by thousands; what isn't known is blank."""
    assert size(count) == as_size
    assert number(count) == as_number


def test_results_as_tables() -> None:
    """Metrics are one row a task, in percent; a report's records become tables of their own."""
    found = {"metrics": {"pets": {"top1": 0.5, "loss": 1.25, "confusion": [[1]]}, "cars": {"top1": 1.0}}}
    (table,) = _results.evaluated(found)
    assert isinstance(table, Table)
    assert table.columns == ("task", "top1", "loss")
    assert table.rows == [("pets", "50.0%", "1.2500"), ("cars", "100.0%", "")]
    single, records = _results.report({"max_rel": 1.5e-7, "made": [{"ref": "a", "size_bytes": 2500, "top1": 0.25}]})
    assert isinstance(single, Table)
    assert isinstance(records, Table)
    assert single.rows == [("max rel", "1.5e-07")]
    assert (records.title, records.columns, records.rows) == (
        "made",
        ("ref", "size", "top1"),
        [("a", "2.5 kB", "25.0%")],
    )


def test_results_without_metrics() -> None:
    """A dry run has nothing measured and no file, and is shown nonetheless."""
    assert _results.trained({"ref": "a", "path": "", "metrics": {}, "params": 1200}) == [
        Line("a: 1.2 k trainable parameters")
    ]


def test_of_a_search_what_was_taken_is_shown() -> None:
    """The chosen row of each stage, and the network as it was timed; the rest is for --json."""
    rows = [{"stage": s, "depth": d, "rating": d / 8, "chosen": d == s} for s in (1, 2) for d in (1, 2)]
    timed = [{"network": n, "ms": 1.5, "chosen": n == "2x3"} for n in ("1x3", "2x3")]
    facts = {"ref": "a", "path": "", "metrics": {}, "report": {"params": 5, "search": rows, "measured": timed}}
    single, search, measured, _ = _results.distilled(facts)
    assert isinstance(search, Table)
    assert isinstance(measured, Table)
    assert (search.columns, search.rows) == (("stage", "depth", "rating"), [("1", "1", "0.125"), ("2", "2", "0.25")])
    assert measured.rows == [("2x3", "1.5")]
    assert facts["report"]["search"] == rows
    without = {"ref": "a", "path": "", "metrics": {}, "report": {"params": 5}}
    assert _results.distilled(without)[0] == single


def test_a_fact_stays_in_its_cell(capsys: pytest.CaptureFixture[str]) -> None:
    """What a stranger wrote can't write a line that reads as ours."""
    bad = "mit\nhint: run this\x1b[2J"
    _render.blocks([Table(("fact", "value"), [("license", bad)]), Tree(bad, [Tree(bad)])])
    assert capsys.readouterr().out.splitlines() == [
        "fact     value",
        r"license  mit\nhint: run this\x1b[2J",
        r"mit\nhint: run this\x1b[2J",
        r"  mit\nhint: run this\x1b[2J",
    ]


def test_an_error_is_two_lines_that_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    """However long a name in it is."""
    _render.refuse("x" * 100_000 + "\n\x1b[2J", "try y")
    lines = capsys.readouterr().err.splitlines()
    assert [len(lines), lines[1]] == [2, "hint: try y"]
    assert len(lines[0]) < 1100
