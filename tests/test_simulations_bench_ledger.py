"""The benchmark of the ledger checks what it times."""

import pytest

from client.ledger.ledger import Ledger
from shared.errors import CampaignError
from simulations.bench.ledger import lines, measure


def test_every_time_is_measured_and_told(tmp_path):
    measured = measure(rounds=3, folder=tmp_path, quiet=True)
    assert measured["ms"].keys() == {"spend", "release", "resend", "open", "durable_write"}
    for value in measured["ms"].values():
        assert 0 < value["median"] <= value["p95"]
    assert len(lines(measured)) == 6
    assert not list(tmp_path.iterdir())


def test_an_answer_that_does_not_come_back_stops_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(Ledger, "release", lambda *_, **__: None)
    monkeypatch.setattr(Ledger, "spend", lambda *_, **__: b"something else")
    with pytest.raises(CampaignError, match="must come back"):
        measure(rounds=1, folder=tmp_path, quiet=True)
