"""What asks a training to stop, and what is only the same request once more."""

import signal

import pytest

from vtzoo import stopping
from vtzoo.stopping import stoppable


def test_a_signal_that_is_handed_on_is_no_second_one() -> None:
    """`timeout` and schedulers send SIGTERM to a group and to its first process, which asks the others again: the step is finished."""
    with stoppable() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stopped()


@pytest.mark.parametrize(("number", "echo"), [(signal.SIGINT, stopping.ECHO), (signal.SIGTERM, 0.0)])
def test_the_second_one_stops_at_once(number: signal.Signals, echo: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Ctrl-C are two requests, as are two SIGTERM with time between them; handlers are as before."""
    monkeypatch.setattr(stopping, "ECHO", echo)
    before = signal.getsignal(number)

    def twice() -> None:
        with stoppable():
            signal.raise_signal(number)
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(number) is before
