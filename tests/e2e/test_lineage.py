"""From images to an ONNX file: what was made from what, run again, compared, and told in a card."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.e2e.chain import chain, ran
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain, made once; nobody writes there."""
    root = tmp_path_factory.mktemp("chain")
    chain(root)
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A zoo of the test's own; images stay where they were."""
    shutil.copytree(made / "zoo", tmp_path / "zoo")
    return tmp_path


def _asked(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, Any, str]:
    """Exit code, the JSON document, and stderr."""
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.strip() else None, err


def _kinds(found: dict[str, Any]) -> dict[str, str]:
    return {n["name"] or n.get("task", "") or n["kind"]: n["kind"] for n in found["nodes"]}


def test_the_whole_chain(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the export back to images and backbone, each link by a digest."""
    code, found, _ = _asked(capsys, "log", "pets/onnx", "--zoo", made / "zoo")
    assert code == 0
    assert _kinds(found) == {
        "pets/onnx": "export", "pets/small": "student", "pets/folded": "folded", "both": "merge", "pets/lora": "delta", "cars/ssf": "delta",
        "tiny": "backbone", "pets": "data", "data": "data",
    }  # fmt: skip
    links = {(e["from"], e["to"], e["as"]) for e in found["edges"]}
    assert ("models:pets/small", "models:pets/onnx", "parent") in links
    assert ("models:pets/folded", "models:pets/small", "parent") in links
    assert ("deltas:both", "models:pets/folded", "parent") in links
    assert {("deltas:pets/lora", "deltas:both", "parent"), ("backbones:tiny", "deltas:pets/lora", "backbone")} <= links
    assert sum(kind == "data" for _, _, kind in links) == 3


def test_every_verb_records_the_same_facts(made: Path) -> None:
    """verb, parents as sha256:…, versions; who trained says images and seed, and the machine stands beside."""
    from vtzoo.lineage import images, of_entry, parents

    zoo = Zoo(made / "zoo")
    names = ("pets/lora", "both", "pets/folded", "pets/small", "pets/onnx")
    found = {n: of_entry(zoo, zoo.resolve(n)) for n in names}
    for name, verb in zip(names, ("train", "merge", "fold", "distill", "export"), strict=True):
        lineage = found[name].lineage
        assert lineage["verb"] == verb
        assert {"vtzoo", "torch"} <= set(lineage["versions"])
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", p) for p in lineage["parents"])
        assert found[name].facts["command"].startswith("vtzoo ")
    assert parents(found["both"].lineage) == [zoo.resolve(n).digest for n in ("pets/lora", "cars/ssf")]
    assert [(i["task"], i["images"]) for i in images(found["pets/small"].lineage)] == [("pets", 16)]
    assert found["pets/lora"].lineage["seed"] == found["pets/small"].lineage["seed"] == 0
    assert all("Python" in found[n].facts["machine"] for n in ("pets/lora", "both", "pets/small"))


def test_a_parent_by_another_name_and_one_that_is_gone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links hold whatever a parent is called, even when its task was renamed; of one that was removed the digest is left."""
    at = ("--zoo", place / "zoo")
    digest = Zoo(place / "zoo").resolve("cars/ssf").digest
    assert ran(*at, "mv", "pets/lora", "animals/lora", "--task", "pets=animals") == 0
    assert ran(*at, "rm", "cars/ssf") == 0
    _, found, _ = _asked(capsys, "log", "both", *at)
    assert [e["from"] for e in found["edges"] if e["to"] == "deltas:both"] == [
        "backbones:tiny", "deltas:animals/lora", f"parent:{digest}",
    ]  # fmt: skip
    capsys.readouterr()
    assert ran(*at, "log", "both") == 0
    assert f"gone  sha256:{digest[:12]}  no longer here" in capsys.readouterr().out


def test_what_was_made_from_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --children the chain forward, too; as Mermaid each link is an arrow."""
    at = ("--zoo", made / "zoo")
    capsys.readouterr()
    assert ran(*at, "log", "cars/ssf", "--children") == 0
    below = capsys.readouterr().out.split("made from it:\n")[1].splitlines()
    assert [line.split("  ")[len(line) - len(line.lstrip()) >> 1] for line in below] == [
        "both", "pets/folded", "pets/small", "pets/onnx",
    ]  # fmt: skip
    assert ran(*at, "log", "cars/ssf", "--mermaid") == 0
    assert len(re.findall(r"n\d+ --> n\d+", capsys.readouterr().out)) == 2


def test_files_outside_a_zoo(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A delta's file, a folder and an exported file tell what they were made from by themselves."""
    at = ("--zoo", made / "zoo")
    delta = Zoo(made / "zoo").object(Zoo(made / "zoo").resolve("both").digest)
    shutil.copyfile(delta, made / "both.safetensors")
    for path, parent in (
        ("both.safetensors", "deltas:pets/lora"),
        ("folded", "deltas:both"),
        ("small.onnx", "models:pets/small"),
    ):
        code, found, _ = _asked(capsys, "log", made / path, *at)
        assert code == 0
        assert parent in [e["from"] for e in found["edges"] if e["to"] == found["root"]]


def test_a_delta_comes_out_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same line on the same images gives the same file; nothing is left in the zoo unless it is kept."""
    at, index = ("--zoo", place / "zoo"), (place / "zoo" / "zoo_index.yaml")
    before = index.read_bytes()
    for ref in ("pets/lora", "both", "pets/folded", "pets/small", "pets/onnx"):
        code, found, _ = _asked(capsys, "reproduce", ref, *at)
        assert (code, found["within"], found["report"]["same_digest"]) == (0, True, True), found
        assert found["report"]["versions"] == []
    assert index.read_bytes() == before
    assert [p.name for p in (place / "zoo" / ".vtzoo").glob("*scratch*")] == []
    assert _asked(capsys, "reproduce", "pets/lora", "--keep", "pets/again", *at)[0] == 0
    zoo = Zoo(place / "zoo")
    assert zoo.resolve("pets/again").digest == zoo.resolve("pets/lora").digest


def test_images_that_moved_and_other_images(place: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--data says where they are now; others are refused before anything is trained (exit code 4)."""
    at = ("--zoo", place / "zoo")
    shutil.copytree(made / "pets", place / "moved")
    assert _asked(capsys, "reproduce", "pets/lora", "--data", place / "moved", *at)[0] == 0
    next((place / "moved" / "train" / "cat").iterdir()).unlink()
    for ref in ("pets/lora", "pets/small"):
        code, found, err = _asked(capsys, "reproduce", ref, "--data", place / "moved", *at)
        assert (code, found) == (4, None)
        assert "it was made from sha256:" in err
        assert "loss" not in err
    assert _asked(capsys, "reproduce", "pets/lora", "--data", "a", "--data", "b", *at)[0] == 2


def test_parents_under_other_names_are_found_and_missing_ones_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merge runs again with the deltas that it was made of, whatever took their names; without one it is refused (3)."""
    at = ("--zoo", place / "zoo")
    assert ran(*at, "mv", "pets/lora", "pets/old") == 0
    assert ran(*at, "mv", "tiny", "small") == 0
    assert _asked(capsys, "reproduce", "both", *at)[1]["report"]["same_digest"]
    assert _asked(capsys, "reproduce", "cars/ssf", *at)[0] == 0
    assert ran(*at, "rm", "pets/old") == 0
    code, _, err = _asked(capsys, "reproduce", "both", *at)
    assert code == 3
    assert "no longer here" in err


def _recorded(place: Path, ref: str, command: str) -> None:
    """Write another command into the index, as whoever made that index could."""
    zoo = Zoo(place / "zoo")
    entry = zoo.resolve(ref)
    zoo.put(entry.section, entry.name, {**entry.facts, "command": command}, replace=True)


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf .", "vtzoo rm both", "vtzoo init elsewhere", "python -c 'print(1)'", "vtzoo export timm pets/folded elsewhere",
        "vtzoo train --backbone tiny --data pets --name a --dry-run", "vtzoo fold both --out elsewhere", "vtzoo train --nonsense", "vtzoo 'train", "vtzoo",
        "vtzoo train --help", "", "vtzoo mv both b", "vtzoo push both x", "vtzoo add delta a --backbone tiny --weights a.pth --from-pickle",
    ],
)  # fmt: skip
def test_a_line_that_makes_nothing_is_not_run(
    place: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index can't make vtzoo run what makes no entry (2): nothing is changed and no file written."""
    _recorded(place, "pets/lora", command)
    before = (place / "zoo" / "zoo_index.yaml").read_bytes()
    monkeypatch.chdir(place)
    code, found, err = _asked(capsys, "reproduce", "pets/lora", "--zoo", place / "zoo")
    assert (code, found) == (2, None)
    assert len(err.strip().splitlines()) == 2
    assert (place / "zoo" / "zoo_index.yaml").read_bytes() == before
    assert sorted(p.name for p in place.iterdir()) == ["zoo"]


def test_a_delta_that_was_trained_among_others(place: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep's line makes many: the delta's own header says what made it, and the user where the images are."""
    _recorded(place, "pets/lora", "vtzoo --quiet --zoo elsewhere sweep sweep.yaml")
    at = ("--zoo", place / "zoo")
    assert "--data DATA" in _asked(capsys, "reproduce", "pets/lora", *at)[2]
    code, found, _ = _asked(capsys, "reproduce", "pets/lora", "--data", made / "pets", *at)
    assert (code, found["report"]["same_digest"]) == (0, True)
    _recorded(place, "both", "vtzoo demo")
    assert _asked(capsys, "reproduce", "both", *at)[0] == 2


def test_images_that_are_gone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not found (3), and how to say where they are; something else that is missing is another matter."""
    command = Zoo(place / "zoo").resolve("pets/lora").facts["command"]
    _recorded(place, "pets/lora", re.sub(r"--data \S+", "--data ./nowhere", command))
    code, _, err = _asked(capsys, "reproduce", "pets/lora", "--zoo", place / "zoo")
    assert code == 3
    assert "--data DATA" in err
    command = Zoo(place / "zoo").resolve("pets/small").facts["command"]
    _recorded(place, "pets/small", re.sub(r"--student \S+", "--student nothing", command))
    code, _, err = _asked(capsys, "reproduce", "pets/small", "--zoo", place / "zoo")
    assert code == 3
    assert "--data DATA" not in err


def test_the_same_tensors_by_another_version(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A header that names another version makes another file of the same tensors: that passes whatever the tolerance."""
    from vtzoo.delta import Delta

    zoo = Zoo(place / "zoo")
    entry = zoo.resolve("both")
    delta = Delta.open(zoo.object(entry.digest))
    delta.with_(lineage={**delta.lineage, "versions": {"vtzoo": "0.0.1", "torch": "1.0"}}).save(
        place / "old.safetensors"
    )
    zoo.put("deltas", "both", {**entry.facts, "digest": zoo.add_object(place / "old.safetensors")}, replace=True)
    code, found, _ = _asked(capsys, "reproduce", "both", "--tolerance", "0", "--zoo", place / "zoo")
    assert (code, found["report"]["same_digest"], found["report"]["same_tensors"]) == (0, False, True)
    assert [v["what"] for v in found["report"]["versions"]] == ["vtzoo", "torch"]


def test_what_a_line_writes_beside_goes_nowhere(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever folder or page an index names, none is written, and another zoo is not touched."""
    monkeypatch.chdir(place)
    other = Zoo.init(place / "other")
    line = f"vtzoo fold both --task pets --out {place}/stolen --name pets/folded --zoo {other.root}"
    _recorded(place, "pets/folded", line)
    _recorded(place, "both", f"vtzoo merge pets/lora cars/ssf --method linear --name both --report {place}/page.html")
    for ref in ("pets/folded", "both"):
        assert _asked(capsys, "reproduce", ref, "--zoo", place / "zoo")[1]["report"]["same_digest"]
    _recorded(place, "pets/folded", "vtzoo fold both --task pets --out x/.. --name pets/folded")
    assert _asked(capsys, "reproduce", "pets/folded", "--zoo", place / "zoo")[1]["report"]["same_digest"]
    assert sorted(p.name for p in place.iterdir()) == ["other", "zoo"]
    assert other.index()["models"] == {}


def test_what_differs_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another recipe gives other tensors: 4 and how far they are; where metrics are near enough it passes, and versions are told."""
    at = ("--zoo", place / "zoo")
    entry = Zoo(place / "zoo").resolve("both")
    _recorded(place, "both", entry.facts["command"].replace("linear", "task-arithmetic[scale=0.1]"))
    code, found, err = _asked(capsys, "reproduce", "both", *at)
    assert (code, found["within"]) == (4, False)
    assert found["report"]["tensors"]["distance"] == pytest.approx(0.8, abs=0.01)  # 0.1 * sum in place of sum / 2
    assert "further from it" in err
    assert _asked(capsys, "reproduce", "both", "--tolerance", "0.9", *at)[0] == 0
    zoo = Zoo(place / "zoo")
    facts = zoo.resolve("pets/small").facts
    lineage = {**facts["lineage"], "versions": {**facts["lineage"]["versions"], "torch": "1.0"}}
    zoo.put("models", "pets/small", {**facts, "lineage": lineage, "machine": "another"}, replace=True)
    report = _asked(capsys, "reproduce", "pets/small", *at)[1]["report"]
    assert report["same_digest"]
    assert [(v["what"], v["recorded"]) for v in report["versions"]] == [("torch", "1.0"), ("machine", "another")]


def test_two_deltas_of_different_methods(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Knobs, data and classes by name; tensors by task vectors, the largest difference first, whole sums from the rows."""
    code, found, _ = _asked(capsys, "diff", "pets/lora", "cars/ssf", "--zoo", made / "zoo")
    assert code == 0
    facts = {f["what"]: (f["a"], f["b"]) for f in found["facts"] if not f["same"]}
    assert facts["method"] == ("lora[rank=2]", "ssf")
    assert facts["lora.rank"] == (2, None)
    assert facts["task pets.classes"] == (["cat", "dog"], None)
    assert facts["data"][0] != facts["data"][1]
    assert "backbone.fingerprint" in {f["what"] for f in found["facts"] if f["same"]}
    rows, whole = found["tensors"]["rows"], found["tensors"]["whole"]
    assert found["tensors"]["by"] == "task vectors"
    assert [r["difference"] for r in rows] == sorted((r["difference"] for r in rows), reverse=True)
    rows = [r for r in rows if not r["tensor"].startswith("@head/")]
    assert whole["difference"] ** 2 == pytest.approx(sum(r["difference"] ** 2 for r in rows))
    assert found["tensors"]["only_a"] == ["@head/pets/head.bias", "@head/pets/head.weight"]


def test_diff_of_models_and_of_strangers(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fold is the delta's weights; networks of different kinds have no tensors in common, and exported files none at all."""
    at = ("--zoo", made / "zoo")
    code, found, _ = _asked(capsys, "diff", "pets/folded", made / "folded", *at)
    assert (code, found["same"]) == (0, True)
    found = _asked(capsys, "diff", "pets/folded", "both", *at)[1]["tensors"]
    assert found["by"] == "weights"
    assert found["whole"]["distance"] < 1e-6
    found = _asked(capsys, "diff", "pets/folded", "pets/small", *at)[1]["tensors"]
    assert (found["by"], found["whole"]) == ("", None)
    found = _asked(capsys, "diff", "pets/onnx", "pets/small", *at)
    assert found[0] == 0
    assert "is an exported file" in found[1]["tensors"]["because"]


def test_diff_for_people(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of what differs; all of it with --all."""
    at = ("--zoo", made / "zoo")
    capsys.readouterr()
    assert ran(*at, "diff", "pets/lora", "both") == 0
    short = capsys.readouterr().out
    assert "all together" in short
    assert "compared by task vectors" in short
    assert ran(*at, "diff", "pets/lora", "both", "--all") == 0
    assert len(capsys.readouterr().out.splitlines()) > len(short.splitlines())


@pytest.mark.parametrize(
    "ref", ["pets/lora", "pets/small", *(pytest.param(n, marks=pytest.mark.slow) for n in ("pets/folded", "both"))]
)
def test_a_cards_own_lines_run(
    made: Path, ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a card shows for vtzoo, timm and onnxruntime is typed and run as it stands: all say the same of an image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VTZOO_ZOO", str(made / "zoo"))
    Image.open(made / "pets" / "val" / "cat" / "0.bmp").resize((48, 40)).save("image.png")
    assert main(["--quiet", "card", ref, "--out", "card.md"]) == 0
    text = Path("card.md").read_text(encoding="utf-8")
    answers = []
    for kind, lines in re.findall(r"```(console|python)\n(.*?)```", text, flags=re.DOTALL):
        if kind == "console":
            assert main(["--quiet", *lines.strip().removeprefix("$ vtzoo ").split()]) == 0
            continue
        capsys.readouterr()
        exec(lines, {})
        answers.append(capsys.readouterr().out.strip())
    assert len(answers) == 3
    assert set(answers) in ({"cat"}, {"dog"})


def test_a_card_says_what_is_recorded(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Method, backbone with its licence, data, classes, metrics with their split, lineage and paper; nothing that nobody knows."""
    code, found, _ = _asked(capsys, "card", "pets/lora", "--zoo", made / "zoo")
    assert code == 0
    text = found["card"]
    for said in (
        "`lora[rank=2]`",
        "`tiny`",
        "mit",
        "cat, dog",
        "| val |",
        "32 x 32 pixels",
        "arXiv:2106.09685",
        "seed 0",
        "## Lineage",
    ):
        assert said in text, said
    assert "None" not in text.partition("## Use")[0]
    card = _asked(capsys, "card", "pets/onnx", "--zoo", made / "zoo")[1]["card"]
    assert "With plain timm" not in card
    assert "mit" in card
    small = _asked(capsys, "card", "pets/small", "--zoo", made / "zoo")[1]["card"]
    assert small[small.index("| input |") : small.index("| sha256 |")] in card
    assert "on the backbone" not in card  # a student's network is another one


def test_a_cards_front_matter(made: Path, tmp_path: Path) -> None:
    """What is written to a file begins with what a hub reads: licence, tags, and metrics as `model-index`; the rest is what is printed."""
    assert ran("--zoo", made / "zoo", "card", "pets/lora", "--out", tmp_path / "README.md") == 0
    _, front, body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["license"], facts["library_name"]) == ("mit", "vtzoo")
    assert "lora" in facts["tags"]
    assert facts["model-index"][0]["results"][0]["metrics"][0]["type"] == "accuracy"
    assert body.lstrip().startswith("# pets/lora\n")


def test_a_card_is_not_written_over(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file exists: 5, and it stays as it was."""
    (tmp_path / "card.md").write_text("mine")
    code, _, err = _asked(capsys, "card", "both", "--out", tmp_path / "card.md", "--zoo", made / "zoo")
    assert (code, (tmp_path / "card.md").read_text()) == (5, "mine")
    assert "exists already" in err


@pytest.mark.parametrize("verb", ["log", "card", "reproduce"])
def test_nobody_of_that_name(made: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Not found (3)."""
    assert _asked(capsys, verb, "nobody", "--zoo", made / "zoo")[0] == 3


def test_a_graph_needs_no_torch(made: Path) -> None:
    """log and card read headers alone."""
    code = "import sys; from vtzoo_cli._main import main; main(sys.argv[1:]); assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    for words in (["log", "pets/onnx", "--children"], ["card", "pets/small"]):
        line = [sys.executable, "-c", code, *words, "--zoo", str(made / "zoo")]
        assert subprocess.run(line, capture_output=True, check=False).returncode == 0
