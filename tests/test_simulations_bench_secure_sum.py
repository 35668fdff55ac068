"""The benchmark of the secure sum checks what it times."""

import json

import numpy as np
import pytest

from client.training.secure_sum import Participant
from shared.errors import CampaignError
from simulations.bench.secure_sum import STAGES, lines, measure
from sottovoce.cli import main


def test_every_stage_is_timed_every_byte_counted_and_the_sum_exact():
    measured = measure(rounds=2, counts=(40,), groups=(5, 10), quiet=True)
    for group in ("5", "10"):
        one = measured["sums"][group]["40"]
        assert one["device_ms"].keys() == {*STAGES, "all"}
        assert 0 < one["device_ms"]["all"]["low"] <= one["device_ms"]["all"]["high"]
        assert one["server_ms"]["survivor"]["low"] > 0
        assert one["bytes"]["up"] > one["bytes"]["vector"] == 160
        assert one["bytes"]["down"] > 3 * 132
    assert measured["sums"]["10"]["40"]["lost"] == 2
    assert measured["terms"]["10"] == {"threshold": 7, "neighbours": 9, "min_survivors": 8}
    assert len(lines(measured)) == 7
    json.dumps(measured)


def test_a_sum_that_is_not_exact_stops_the_benchmark(monkeypatch):
    honest = Participant.mask
    monkeypatch.setattr(Participant, "mask", lambda self, vector, parcels: honest(self, vector, parcels) + np.uint32(1))
    with pytest.raises(CampaignError, match="must be exact"):
        measure(rounds=1, counts=(10,), groups=(5,), quiet=True)


def test_the_command_runs_it(capsys, monkeypatch):
    monkeypatch.setattr("simulations.bench.secure_sum.measure", lambda *, rounds, quiet: {"rounds": rounds})
    assert main(["bench", "secure-sum", "--rounds", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rounds": 3}
