"""Pushes, pulls and syncs killed by -9 at every touch of the file system: both zoos open, and what they list is whole."""

import subprocess
import sys
from pathlib import Path

import pytest

from vtzoo.files import sha256
from vtzoo.zoo import Zoo

# Forks, so that every try starts from the same state in milliseconds; the fork is killed at its n-th touch of a file
# below the folder, whatever it is (open, rename, unlink, mkdir, chmod …): Python's audit events tell.
PROBE = """
import os, shutil, signal, sys
from pathlib import Path
from vtzoo import sharing
from vtzoo.files import sha256
from vtzoo.moves import entries_of
from vtzoo.remotes.folder import Folder
from vtzoo.zoo import Zoo

root, verb = Path(sys.argv[1]), sys.argv[2]
acts = {
    "push": lambda mine, theirs: sharing.push(["a", "b"], theirs, zoo=mine),
    "pull": lambda mine, theirs: sharing.pull([], theirs, zoo=mine),
    "force": lambda mine, theirs: sharing.pull(["both"], theirs, zoo=mine, force=True),
    "sync": lambda mine, theirs: sharing.sync(theirs, zoo=mine),
}

def killed_at(n, folder):
    left = n
    def hook(event, args):
        nonlocal left
        if event == "open" or event.startswith(("os.", "shutil.")):
            if any(str(folder) in str(a) for a in args):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
    return hook

def check(zoo):
    for entry in entries_of(Folder(zoo).index()[0]):
        for digest in entry.objects:
            assert sha256(zoo.object(digest)) == digest, entry

points, before = 0, {name: {e.name for e in entries_of(Folder(Zoo(root / name)).index()[0])} for name in ("mine", "theirs")}
while True:
    work = root / f"try-{points}"
    shutil.copytree(root / "mine", work / "mine")
    shutil.copytree(root / "theirs", work / "theirs")
    pid = os.fork()
    if not pid:
        sys.addaudithook(killed_at(points + 1, work))
        acts[verb](Zoo(work / "mine"), str(work / "theirs"))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    zoos = Zoo(work / "mine"), Zoo(work / "theirs")
    for zoo in zoos:
        check(zoo)
        assert {e.name for e in entries_of(Folder(zoo).index()[0])} >= before[zoo.root.name]
    acts[verb](zoos[0], str(zoos[1].root))  # done again, it ends well
    for zoo in zoos:
        check(zoo)
        assert not list((zoo.root / ".vtzoo").glob("quarantine/*"))
    shutil.rmtree(work)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    points += 1
print(points)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize(
    "verb", ["force", *(pytest.param(v, marks=pytest.mark.slow) for v in ("push", "pull", "sync"))]
)
def test_killed_anywhere(verb: str, tmp_path: Path) -> None:
    """Nothing listed is missing or damaged, nothing that was listed is gone, and the same command then ends well."""
    for name, own, shared in (("mine", "ab", b"mine"), ("theirs", "cd", b"theirs")):
        made = Zoo.init(tmp_path / name)
        for entry in own:
            content = entry.encode() * 5000
            made.put("models", entry, {"files": {"model.onnx": made.add_object(content)}, "size_bytes": 5000})
        made.put("models", "both", {"files": {"model.onnx": made.add_object(shared)}, "size_bytes": len(shared)})
    if verb == "pull":
        Zoo(tmp_path / "mine").remove(Zoo(tmp_path / "mine").resolve("both"))
    line = [sys.executable, "-c", PROBE, str(tmp_path), verb]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    print(verb, ran.stdout.strip(), "points")
    assert int(ran.stdout) > 20
    assert all(sha256(p) == p.name for p in (tmp_path / "theirs").rglob("objects/sha256/*/*"))
