"""Refusals: two lines on stderr, nothing on stdout, the documented exit code; bugs keep their traceback."""

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from vtzoo.errors import Conflict, Corrupt, Interrupted, Mismatch, Network, NotFound, Resources, UsageError, VtzooError
from vtzoo.presets import PRESETS
from vtzoo_cli import _cards
from vtzoo_cli._errors import explain

USAGE = [
    (("trian",), "no such command: trian", "did you mean train?"),
    (("train", "--epoch", "3"), "no such option: --epoch", "did you mean --epochs"),
    (("ls", "--jsn"), "no such option: --jsn", "did you mean --json"),
    (("add", "backbne"), "no such command: backbne", "did you mean backbone?"),
    (("add",), "missing command", "one of backbone, delta"),
    (("--json",), "missing command", "one of demo, init"),
    (("train",), "missing option '--backbone'", "vtzoo train --help"),
    (("eval",), "missing argument 'REF'", "vtzoo eval --help"),
    (("train", "--epochs", "x"), "invalid value for '--epochs': input should be a valid integer", "vtzoo train --help"),
    (("eval", "x", "--data", "d", "--split", "all"), "invalid value for '--split'", "vtzoo eval --help"),
    (("ls", "deltaz"), "no section is called 'deltaz'", "did you mean deltas"),
    (("ls", "deltas", "models"), "one name at most, not 2", "vtzoo ls --help"),
    (("train", "--backbone", "b", "--data", "d", "--name", "n", "--set", "lr"), "--set 'lr' is not key=value", "for"),
    (("train", "--backbone", "b", "--data", "d", "--name", "n", "--method", "lora["), "brackets do not match", "write"),
    (("merge", "a", "b", "--method", "ties", "--name", "n", "--coef", "1;2"), "--coef '1;2' is not a list", "for"),
    (("add", "backbone", "n", "--arch", "a", "--weights", "w", "--input-size", "1,2"), "--input-size '1,2'", "write"),
]
MISSING = [
    (("methods", "lorra"), "no method is called 'lorra'", "did you mean lora or"),
    (("merges", "tie"), "no merge is called 'tie'", "did you mean ties"),
    (("losses", "kdd"), "no loss is called 'kdd'", "did you mean kd or"),
    (("inits", "net2nt"), "no init is called 'net2nt'", "did you mean net2net?"),
    (
        ("show", "tf_eficientnet_lite0"),
        "no entry is called 'tf_eficientnet_lite0'",
        "did you mean tf_efficientnet_lite0",
    ),
    (("rm", "nothing-like-it"), "no entry is called 'nothing-like-it'", ""),
    (("eval", "nope", "--data", "d"), "no entry is called 'nope'", ""),
    (("eval", "./nope.safetensors", "--data", "d"), "'./nope.safetensors' does not exist", "check the path"),
    (("ls", "--zoo", "nowhere"), "nowhere has no zoo_index.yaml", "vtzoo init"),
    (("train", "--backbone", "b", "--data", "d", "--name", "n", "--method", "lorra"), "no method is called", "lora"),
    (("distill", "--teacher", "t", "--student", "s", "--data", "d", "--name", "n", "--loss", "kdd"), "no loss", "kd"),
    (("train", "--backbone", "b", "--data", "d", "--name", "n", "--config", "no.yaml"), "there is no file no.yaml", ""),
]


def _two_lines(ran, code: int, message: str, hint: str) -> None:
    assert ran.code == code
    assert ran.out == ""
    assert len(ran.lines) == 2
    error, advice = ran.lines
    assert error.startswith("error: ")
    assert advice.startswith("hint: ")
    assert message in error.lower() or message in error
    assert hint in advice
    assert advice != "hint: "


@pytest.mark.parametrize(("words", "message", "hint"), USAGE, ids=[" ".join(u[0]) for u in USAGE])
def test_usage_errors(vtzoo, words: tuple[str, ...], message: str, hint: str) -> None:
    """A line that can't be understood, Typer's own complaints included, is refused with exit code 2."""
    _two_lines(vtzoo(*words), 2, message, hint)


@pytest.mark.parametrize(("words", "message", "hint"), MISSING, ids=[" ".join(m[0]) for m in MISSING])
def test_missing_things(vtzoo, words: tuple[str, ...], message: str, hint: str) -> None:
    """What isn't there is refused with exit code 3, and the nearest name."""
    _two_lines(vtzoo(*words), 3, message, hint)


def test_refusals_with_json(vtzoo) -> None:
    """With `--json` a refusal leaves stdout empty too."""
    _two_lines(vtzoo("--json", "show", "nothing-like-it"), 3, "no entry", "")


@pytest.mark.parametrize(
    ("kind", "code"),
    [(VtzooError, 1), (UsageError, 2), (NotFound, 3), (Mismatch, 4), (Corrupt, 4), (Conflict, 5), (Network, 6),
     (Resources, 7), (Interrupted, 130)],
)  # fmt: skip
def test_every_kind_has_its_exit_code(
    vtzoo, monkeypatch: pytest.MonkeyPatch, kind: type[VtzooError], code: int
) -> None:
    """Each class of refusal ends with its own code; newlines in a message don't add lines; a hint is never empty."""
    _raising(monkeypatch, kind("first\nsecond"))
    _two_lines(vtzoo("methods"), code, "first second", "")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.ENOMEM])
def test_a_full_disk(vtzoo, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A full disk, a quota and no memory end with 7, naming the file."""
    _raising(monkeypatch, OSError(code, os.strerror(code), "/data/x.bin"))
    _two_lines(vtzoo("methods"), 7, "/data/x.bin", "free some space")


def test_a_folder_that_may_not_be_written(vtzoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denied permission is the user's to mend: two lines, exit code 1."""
    _raising(monkeypatch, PermissionError(errno.EACCES, "Permission denied", "/root/x"))
    _two_lines(vtzoo("methods"), 1, "permission denied: /root/x", "check who may write there")


def test_out_of_memory(vtzoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's and torch's ways of running out of memory end with 7."""
    torch_like = type("OutOfMemoryError", (RuntimeError,), {})
    allocator = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    for error in (MemoryError(), torch_like("CUDA out of memory"), allocator):
        _raising(monkeypatch, error)
        _two_lines(vtzoo("methods"), 7, "out of memory", "--batch-size")


def test_bugs_are_not_explained() -> None:
    """An exception that is no refusal has no two lines."""
    for bug in (KeyError("x"), ValueError("x"), RuntimeError("x"), FileNotFoundError(errno.ENOENT, "x"), EOFError()):
        assert explain(bug) is None


@pytest.mark.parametrize(
    ("bug", "last"),
    [("KeyError('layer')", "KeyError: 'layer'"), ("EOFError('3 bytes of 4')", "EOFError: 3 bytes of 4")],
)
def test_bugs_keep_their_traceback(python, bug: str, last: str) -> None:
    """A bug ends with Python's own traceback and exit code 1, also where Typer would make something else of it."""
    ran = python(_program(f"raise {bug}"), "methods")
    assert ran.returncode == 1
    assert ran.stderr.lstrip().startswith("Traceback (most recent call last)")
    assert ran.stderr.rstrip().endswith(last)


@pytest.mark.skipif(os.name == "nt", reason="signals are sent the POSIX way")
def test_interrupt() -> None:
    """Ctrl-C ends with 130 and two lines, no traceback."""
    wait = "print('ready', file=sys.stderr, flush=True); import time; time.sleep(30)"
    line = [sys.executable, "-c", _program(wait), "methods"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "hint"]


@pytest.mark.skipif(os.name == "nt", reason="pipes break the POSIX way")
def test_a_reader_that_leaves() -> None:
    """`vtzoo ls | head` ends quietly."""
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "vtzoo_cli", "methods"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert ran.returncode == 1
    assert ran.stderr == ""


def test_recipe_files_that_hold_no_recipe(vtzoo, tmp_path) -> None:
    """What is no YAML, or a list, is a usage error (2), as in every file that people write."""
    line = ("train", "--backbone", "b", "--data", "d", "--name", "n", "--config")
    (tmp_path / "broken.yaml").write_text("a: [1, 2", encoding="utf-8")
    _two_lines(vtzoo(*line, tmp_path / "broken.yaml"), 2, "is no YAML", "epochs: 10")
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    _two_lines(vtzoo(*line, tmp_path / "list.yaml"), 2, "is no mapping", "epochs: 10")


def test_a_recipe_that_there_is_not(vtzoo) -> None:
    """A recipe's name that is none is not found (3), and the names that there are stand below, whichever way it was given."""
    line = ("train", "--backbone", "b", "--data", "d", "--name", "n")
    for words in (("--recipe", "vtb"), ("--set", "preset=vtb")):
        _two_lines(
            vtzoo(*line, *words),
            3,
            "no recipe is called 'vtb'",
            f"did you mean vtab? known: {', '.join(sorted(PRESETS))}",
        )


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def answer(*_args: object) -> None:
        raise error

    monkeypatch.setattr(_cards, "answer", answer)


def _program(body: str) -> str:
    """The program with one command's body replaced."""
    return textwrap.dedent(f"""
        import sys
        from vtzoo_cli import _cards, _main
        def answer(*args):
            {body}
        _cards.answer = answer
        sys.exit(_main.main())
    """)


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["show", "nothing-like-it"], 3), (["bug"], 1)])
def test_the_program_leaves_with_its_code_and_all_that_was_left_to_do(words: list[str], code: int) -> None:
    """What a command leaves for the exit is done and its output complete; only then the process goes, with the code it found."""
    script = textwrap.dedent(
        """
        import atexit, sys, threading, time
        import vtzoo_cli._main as program

        run = program._run

        def leaving(words):
            atexit.register(print, "kept")
            threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
            return run(words) if words != ["bug"] else 1 / 0

        program._run = leaving
        sys.exit(program.main())
        """
    )
    ran = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == code
    assert ran.stdout.splitlines()[-2:] == ["waited for", "kept"]
    assert ("ZeroDivisionError" in ran.stderr) == (words == ["bug"])
