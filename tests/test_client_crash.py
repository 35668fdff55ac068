"""kill -9 of a device at every place of a round: what was spent stays spent, what was released is sent again."""

import os
import signal

import numpy as np
import pytest

from client import app
from client.home.store import RecordStore
from client.ledger.ledger import Ledger
from client.ledger.log import Log
from client.training.optimizer import PolicyOptimizer
from shared.protocol import wire


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def after(function):
    def call(*arguments, **named):
        function(*arguments, **named)
        die()

    return call


# Where the device dies -> (rounds spent afterwards, what the same request is answered with).
PLACES = {
    "C0 before the ledger's transaction": ((Log, "_begin", die), 0, None),
    "C1 before its commit": ((Log, "_commit", die), 0, None),
    "C2 after the commit, before a record is read": ((RecordStore, "read", die), 1, "BURNT"),
    "C3 in the middle of the step": ((PolicyOptimizer, "step", die), 1, "BURNT"),
    "C3 after the step": ((app, "train_shared", after(app.train_shared)), 1, "BURNT"),
    "C4 before what was trained is released": ((Ledger, "release", die), 1, "BURNT"),
    "C5 after it was released": ((Ledger, "release", after(Ledger.release)), 1, None),
    "C6 before it is sent": ((wire, "pack_reply", die), 1, None),
    "C7 after it was sent": ((app, "train", after(app.train)), 1, None),
}


@pytest.mark.fault("R4")
@pytest.mark.parametrize("place", PLACES)
def test_a_killed_device_never_spends_less_nor_trains_twice(homes, published, tmp_path, monkeypatch, place):
    (owner, name, stand_in), spent, code = PLACES[place]
    home = homes.make_home(tmp_path / "home", published)
    campaign = published.campaign
    assert homes.ask(homes.make_home(tmp_path / "warm", published), campaign)[0] is None  # everything is loaded

    def ask_and_die():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, stand_in)
            homes.ask(home, campaign, client=app.train if name == "train" else app.app)

    assert killed(ask_and_die) == signal.SIGKILL
    answers = [homes.ask(home, campaign) for _ in range(2)]
    assert [found for found, _ in answers] == [code, code]
    with home.ledger() as ledger:
        [standing] = ledger.consents()
        released = {event.detail["sha256"] for event in ledger.history() if event.kind == "release"}
    assert standing.spent == max(spent, 1 if code is None else spent)
    assert len(released) == (1 if code is None else 0)
    if code is None:
        first, again = (homes.update_in(reply, campaign) for _, reply in answers)
        for slot, array in first.items():
            np.testing.assert_array_equal(array, again[slot])


def killed(work) -> int:
    """The signal that ended a copy of this process at work."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1


@pytest.mark.fault("R4")
def test_the_device_s_lock_dies_with_its_holder(homes, published, tmp_path):
    home = homes.make_home(tmp_path / "home", published)

    def hold_and_die():
        with home.lock():
            die()

    assert killed(hold_and_die) == signal.SIGKILL
    assert homes.ask(home, published.campaign)[0] is None
