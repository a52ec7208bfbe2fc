"""Ends of simulations by a signal: at the next turn, at once by a second one, and not by one that nohup ignores."""

from __future__ import annotations

import signal

import pytest

from outstation.workbench.cli.simulated import deferred_exit


def test_a_signal_waits_for_the_end_of_the_turn_and_a_second_one_does_not() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with deferred_exit() as leave:
        leave()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit) as at_the_turn:
            leave()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert at_the_turn.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_the_process_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_exit() as leave:
            signal.raise_signal(signal.SIGHUP)
            leave()
    finally:
        signal.signal(signal.SIGHUP, before)
