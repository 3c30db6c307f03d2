"""Whatever stops a program between two changes of the disk, the zoo opens, lists nothing that is missing, and lost nothing.

Every job is broken at each of its changes of the disk in turn, by kill -9, by a full disk, by a failing one, and by a
write of which half arrives (some of it marked slow). `VTZOO_SHOW=1 pytest -s tests/e2e/test_crashes.py` prints how many
points were tried.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import CRASHED, DONE, FAULTS, REFUSED, Boundaries, Fault, broken
from vtzoo.files import atomic_write, safetensors_header, sha256, writing
from vtzoo.fsck import look, rebuild
from vtzoo.leftovers import collect, leftovers
from vtzoo.objects import held
from vtzoo.sharing import pull, push
from vtzoo.zoo import Zoo

TRIED: dict[str, int] = {}


def weights(name: str, size: int = 3 << 20) -> bytes:
    """A small sound delta."""
    said = {"schema": 1, "method": "linear", "backbone": {"name": "b", "fingerprint": "f"}, "tasks": [{"name": "a"}]}
    data = name.encode().ljust(size, b".")[:size]
    return safetensors_header([("x", "U8", (size,))], {"vtzoo": json.dumps(said)}) + data


@pytest.fixture(scope="module", autouse=True)
def _told() -> Iterator[None]:
    """Print how many points were tried."""
    yield
    if os.environ.get("VTZOO_SHOW"):
        print("\n" + "\n".join(f"{count:6,} {job}" for job, count in TRIED.items()))
        print(f"{sum(TRIED.values()):6,} points in all")


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """A zoo with two deltas, a model that shares an object with one, and a loose object; beside it another zoo with one delta."""
    home = tmp_path / "home"
    made = Zoo.init(home / "zoo")
    (home / "new.safetensors").write_bytes(weights("new"))
    shared = made.add_object(weights("one", 1000))
    made.put("deltas", "one", {"digest": shared, "tasks": ["a"]})
    made.put("deltas", "two", {"digest": made.add_object(weights("two", 1000)), "tasks": ["b"]})
    made.put("models", "three", {"files": {"model.safetensors": shared, "config.json": made.add_object(b"{}")}})
    made.add_object(weights("loose", 1000))
    other = Zoo.init(home / "other")
    other.put("deltas", "far", {"digest": other.add_object(weights("far", 3 << 20)), "tasks": ["d"]})
    return made


def add(zoo: Zoo) -> None:
    """Store a file and publish it."""
    source = zoo.root.parent / "new.safetensors"
    zoo.put("deltas", "new", {"digest": zoo.add_object(source), "tasks": ["c"]})


def put_over(zoo: Zoo) -> None:
    """Publish another file under a name that was taken."""
    zoo.put("deltas", "two", {"digest": zoo.add_object(weights("other", 2000)), "tasks": ["b"]}, replace=True)


def adopt(zoo: Zoo) -> None:
    """Publish a file that was written on the zoo's own disk, as merges do."""
    path = zoo.root / ".vtzoo" / "incoming" / "merge"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        file.write(weights("merge", 2000))
    digest = sha256(path)
    zoo.adopt(path, digest)
    zoo.put("deltas", "merge", {"digest": digest, "tasks": ["a", "b"]})


def rename(zoo: Zoo) -> None:
    """Give an entry another name."""
    zoo.rename(zoo.resolve("one"), "uno")


def remove(zoo: Zoo) -> None:
    """Remove an entry with its object."""
    zoo.remove(zoo.resolve("two"))


def sweep(zoo: Zoo) -> None:
    """Sweep up the loose object."""
    collect(zoo, grace_s=0)


def again(zoo: Zoo) -> None:
    """Make the index again."""
    rebuild(zoo)


def pulled(zoo: Zoo) -> None:
    """Bring an entry of the other zoo here."""
    pull(["far"], str(zoo.root.with_name("other")), zoo=zoo)


def pushed(zoo: Zoo) -> None:
    """Likewise, from over there."""
    push(["far"], str(zoo.root), zoo=Zoo(zoo.root.with_name("other")))


def begin(zoo: Zoo) -> None:
    """Make a new zoo and put something in."""
    made = Zoo.init(zoo.root.parent / "zoo" / "inner", exist_ok=True)
    made.put("deltas", "x", {"digest": made.add_object(b"x")}, replace=True)


JOBS: tuple[Callable[[Zoo], None], ...] = (add, put_over, adopt, rename, remove, sweep, again, begin, pulled, pushed)


def trained(zoo: Zoo, *, resume: bool = True) -> None:
    """Train a delta of which all epochs are done: measure and publish it."""
    from vtzoo.verbs.train import train

    recipe = {"epochs": 1, "limit": 40, "eval_limit": 40, "batch_size": 20, "lr": 1e-3, "warmup_epochs": 0.0}
    train(
        backbone="tiny",
        data="vtzoo:fashion",
        method="lora[rank=2]",
        name="fashion/lora",
        zoo=zoo,
        recipe=recipe,
        resume=resume,
    )


def state(zoo: Zoo) -> dict[str, Any]:
    """What the zoo lists: names with the digests of their objects."""
    return {e.name: e.objects for e in zoo.entries() if not e.builtin}


def check_sound(zoo: Zoo) -> None:
    """All that is listed is there, whole."""
    for digests in state(zoo).values():
        for digest in digests:
            assert sha256(zoo.object(digest)) == digest
    assert [f for f in look(zoo) if f.kind == "error"] == []


def each_point(
    job: Callable[[Zoo], Any],
    before: Zoo,
    fault: Fault,
    every: int = 1,
    arm: Callable[[Boundaries], None] | None = None,
) -> Iterator[tuple[int, Zoo]]:
    """Break the job at each of its changes of the disk, every time on a fresh copy; gives how it ended, and the copy."""
    home, at = before.root.parent, 1
    while True:
        place = home.parent / f"{home.name}-{fault}-{at}"
        shutil.copytree(home, place, symlinks=True)
        work = Zoo(place / before.root.name)

        def run(boundaries: Boundaries, work: Zoo = work) -> object:
            if arm is not None:
                arm(boundaries)
            return job(work)

        status, reached = broken(run, at, fault)
        if not reached:
            assert status == DONE
            return
        TRIED[job.__name__] = TRIED.get(job.__name__, 0) + 1
        yield status, work
        shutil.rmtree(place)
        at += every


@pytest.mark.parametrize(
    "fault", ["kill", "ENOSPC", *(pytest.param(f, marks=pytest.mark.slow) for f in ("EIO", "short"))]
)
@pytest.mark.parametrize("job", JOBS, ids=lambda j: j.__name__)
def test_a_zoo_survives_a_fault_at_every_change_of_the_disk(job: Callable[[Zoo], None], fault: Fault, zoo: Zoo) -> None:
    """Before or after, nothing between; what was half-written is swept up, and the job done again ends as it should."""
    old = state(zoo)
    wanted = Zoo(shutil.copytree(zoo.root.parent, zoo.root.parent.with_name("wanted")) / "zoo")
    job(wanted)
    for status, work in each_point(job, zoo, fault):
        assert status != CRASHED
        assert status in ((-9,) if fault == "kill" else (DONE, REFUSED))
        check_sound(work)
        assert state(work) in (old, state(wanted))
        if status == DONE:
            assert state(work) == state(wanted)
        if state(work) == old:
            job(work)
        assert state(work) == state(wanted)
        collect(work, grace_s=0)
        kept = set().union(*state(work).values())
        assert {digest for digest, _ in held(work.root)} == kept
        assert leftovers(work) == []


@pytest.mark.parametrize(
    ("fault", "every"), [("kill", 9), *(pytest.param(f, 1, marks=pytest.mark.slow) for f in FAULTS)]
)
def test_a_trained_delta_is_published_or_still_to_be(fault: Fault, every: int, tmp_path: Path) -> None:
    """From the end of training on, broken at each change of the disk: the checkpoint is there until the delta is."""
    import timm
    import torch
    from safetensors.torch import save_file

    from vtzoo.verbs import train as module
    from vtzoo.verbs.add import add_backbone

    torch.manual_seed(0)
    (tmp_path / "home").mkdir()
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "home" / "w.safetensors")
    zoo = Zoo.init(tmp_path / "home" / "zoo")
    add_backbone(name="tiny", arch="test_vit", weights=tmp_path / "home" / "w.safetensors", zoo=zoo)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    def arm(boundaries: Boundaries) -> None:
        """Count from the moment at which the delta is to be kept; this process ends with the job."""
        keep, boundaries.armed = module._keep, False

        def armed(*given: Any) -> Any:
            boundaries.armed = True
            return keep(*given)

        module._keep = armed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_keep", stopped)
        with pytest.raises(KeyboardInterrupt):
            trained(zoo, resume=False)
    for status, work in each_point(trained, zoo, fault, every, arm):
        assert status in ((-9,) if fault == "kill" else (DONE, REFUSED))
        check_sound(work)
        if "fashion/lora" not in state(work):
            trained(work)
        check_sound(work)
        assert set(state(work)) == {"tiny", "fashion/lora"}
        collect(work, grace_s=0)
        assert leftovers(work) == []
