"""Two zoos do what two dictionaries do, whatever is put, removed, renamed, swept, rebuilt, pushed, pulled and synced.

`VTZOO_EXAMPLES=1000 pytest -s tests/property/test_sharing_property.py` tries so many examples and prints how many steps that were.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vtzoo.catalogue import INDEX
from vtzoo.copies import copies
from vtzoo.errors import Conflict, NotFound
from vtzoo.files import safetensors_header, sha256
from vtzoo.fsck import look, rebuild
from vtzoo.leftovers import collect
from vtzoo.objects import held
from vtzoo.refs import Entry, Section
from vtzoo.sharing import pull, push, sync
from vtzoo.zoo import Zoo

EXAMPLES = int(os.environ.get("VTZOO_EXAMPLES", "15"))
STEPS: Counter[str] = Counter()
SAID = {"schema": 1, "method": "linear", "backbone": {"name": "b", "fingerprint": "f"}, "tasks": [{"name": "a"}]}
FILES = [safetensors_header([("x", "U8", (n,))], {"vtzoo": json.dumps(SAID)}) + b"x" * n for n in range(4)]
NAMES = st.sampled_from(["q", "q/b", "q/bc", "z"])
SIDES = st.sampled_from(["here", "there"])
Content = tuple[Section, frozenset[str]]


@pytest.fixture(scope="module", autouse=True)
def _told() -> Iterator[None]:
    """Print how many steps were taken."""
    yield
    if "VTZOO_EXAMPLES" in os.environ:
        print(f"\n{STEPS.pop('examples', 0)} examples, {sum(STEPS.values())} steps: {dict(sorted(STEPS.items()))}")


class SharingMachine(RuleBasedStateMachine):
    """`here` and `there`, each a zoo on the disk and a dictionary of name -> section and digests."""

    @initialize()
    def begin(self) -> None:
        """Two empty zoos."""
        STEPS["examples"] += 1
        self.folder = tempfile.TemporaryDirectory()
        self.zoos = {side: Zoo.init(Path(self.folder.name, side)) for side in ("here", "there")}
        self.models: dict[str, dict[str, Content]] = {"here": {}, "there": {}}

    def teardown(self) -> None:
        """Remove the folder."""
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @rule(
        side=SIDES,
        name=NAMES,
        section=st.sampled_from(["deltas", "models"]),
        which=st.sets(st.integers(0, 3), min_size=1, max_size=2),
    )
    def put(self, side: str, name: str, section: Section, which: set[int]) -> None:
        """A put works where the name is free, and over its own section's."""
        STEPS["put"] += 1
        zoo, model = self.zoos[side], self.models[side]
        chosen = sorted(which)[: 1 if section == "deltas" else 2]
        digests = [zoo.add_object(FILES[i]) for i in chosen]
        many = {"files": {f"f{i}.safetensors": d for i, d in enumerate(digests)}}
        facts = {"digest": digests[0]} if section == "deltas" else many
        if name in model and model[name][0] != section:
            with pytest.raises(Conflict):
                zoo.put(section, name, facts, replace=True)
        else:
            zoo.put(section, name, facts, replace=True)
            model[name] = (section, frozenset(digests))

    @rule(side=SIDES, which=st.integers(0, 3))
    def store(self, side: str, which: int) -> None:
        """An object of which nothing becomes: it stays until it is swept up."""
        STEPS["store"] += 1
        self.zoos[side].add_object(FILES[which])

    @rule(side=SIDES, name=NAMES)
    def get(self, side: str, name: str) -> None:
        """A name gives its content, whole; another one is NotFound."""
        STEPS["get"] += 1
        zoo, model = self.zoos[side], self.models[side]
        if name in model:
            assert all(sha256(zoo.object(digest)) == digest for digest in self._entry(side, name).objects)
        elif not [known for known in model if known.startswith(name)]:
            with pytest.raises(NotFound):
                zoo.resolve(name)

    @rule(side=SIDES, name=NAMES)
    def remove(self, side: str, name: str) -> None:
        """A remove works where the name is there."""
        STEPS["rm"] += 1
        if name in self.models[side]:
            self.zoos[side].remove(self._entry(side, name))
            del self.models[side][name]

    @rule(side=SIDES, name=NAMES, new=NAMES)
    def rename(self, side: str, name: str, new: str) -> None:
        """A rename works where the name is there and the new one is free."""
        STEPS["mv"] += 1
        model = self.models[side]
        if name not in model:
            return
        if new in model:
            with pytest.raises(Conflict):
                self.zoos[side].rename(self._entry(side, name), new)
        else:
            self.zoos[side].rename(self._entry(side, name), new)
            model[new] = model.pop(name)

    @rule(side=SIDES)
    def sweep(self, side: str) -> None:
        """Afterwards there are the objects of entries, and no others."""
        STEPS["gc"] += 1
        collect(self.zoos[side], grace_s=0)
        wanted = {digest for _, digests in self.models[side].values() for digest in digests}
        assert {digest for digest, _ in held(self.zoos[side].root)} == wanted

    @rule(side=SIDES, harm=st.sampled_from(["cut", "deleted", "none"]))
    def lose_the_index(self, side: str, harm: str) -> None:
        """An index that was cut or deleted comes back as it was, and loose deltas are listed again."""
        STEPS["fsck"] += 1
        zoo, path = self.zoos[side], self.zoos[side].root / INDEX
        if not copies(zoo.root):
            return
        if harm == "deleted":
            path.unlink()
        elif harm == "cut":
            path.write_bytes(path.read_bytes()[:-9])
        kept = {digest for _, digests in self.models[side].values() for digest in digests}
        loose = {digest for digest, _ in held(zoo.root)} - kept
        rebuild(zoo)
        self.models[side] |= {f"recovered/a-{d[:12]}": ("deltas", frozenset({d})) for d in loose}

    @rule(name=NAMES, force=st.booleans(), back=st.booleans())
    def move(self, name: str, force: bool, back: bool) -> None:
        """A push brings an entry over, a pull brings it back: refused where other content has the name, unless by force."""
        STEPS["pull" if back else "push"] += 1
        source, target = ("there", "here") if back else ("here", "there")
        ours, theirs = self.models[source], self.models[target]
        if name not in ours:
            return

        def act() -> None:
            (pull if back else push)([name], str(self.zoos["there"].root), zoo=self.zoos["here"], force=force)

        same = theirs.get(name) == ours[name]
        if name in theirs and not same and (not force or theirs[name][0] != ours[name][0]):
            with pytest.raises(Conflict):
                act()
        else:
            act()
            theirs[name] = ours[name]

    @rule()
    def sync(self) -> None:
        """Afterwards both have what either had; where they differed, each keeps its own."""
        STEPS["sync"] += 1
        sync(str(self.zoos["there"].root), zoo=self.zoos["here"])
        here, there = self.models["here"], self.models["there"]
        self.models = {"here": {**there, **here}, "there": {**here, **there}}

    def _entry(self, side: str, name: str) -> Entry:
        return next(e for e in self.zoos[side].entries() if e.name == name and not e.builtin)

    @invariant()
    def same_as_the_models(self) -> None:
        """Each zoo lists what its model has, all of it whole, and nothing is lost."""
        for side, model in self.models.items() if hasattr(self, "models") else ():
            zoo = self.zoos[side]
            own = {e.name: (e.section, e.objects) for e in zoo.entries() if not e.builtin}
            assert own == model
            assert all(sha256(zoo.object(d)) == d for _, digests in model.values() for d in digests)
            assert [f for f in look(zoo) if f.kind == "error"] == []


TestSharingMachine = SharingMachine.TestCase
TestSharingMachine.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
