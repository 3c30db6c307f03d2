"""The pickles of `heavy` once more, with --from-pickle: each starts a process of its own."""

from functools import partial

from tests.hostile.heavy import PICKLES, _pickle
from tests.hostile.light import Case

CASES = {f"pickle: {k}": Case(partial(_pickle, make, True), 4) for k, make in PICKLES.items()}
