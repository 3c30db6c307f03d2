"""What all tests share: one thread, no network, no touch of the user's own zoo, the same seeds each time."""

import os
import random
import signal
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as a shell starts jobs in the background; ours get Ctrl-C all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)
NETWORK = "VTZOO_TEST_NET"
if not os.environ.get(NETWORK):
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--golden` stores what the golden tests find instead of comparing."""
    parser.addoption("--golden", action="store_true", help="write stored texts anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine can't do, with the reason printed."""
    for item in items:
        if item.get_closest_marker("net") and not os.environ.get(NETWORK):
            item.add_marker(pytest.mark.skip(reason=f"needs the network: set {NETWORK}=1"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Draw the same random numbers in every run, also where only one test is run; torch only if it is loaded."""
    random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)


@pytest.fixture(autouse=True)
def _own_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test off the zoo and the data folder of whoever runs it."""
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    for name in ("HOME", "USERPROFILE", "XDG_DATA_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(home))
    for name in ("VTZOO_ZOO", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
