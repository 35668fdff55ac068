"""What a waiting device costs: the arithmetic, of processes that are made up; no server is started."""

import pytest

from shared.errors import CampaignError
from simulations.bench import waiting
from simulations.bench.seen_processes import Seen


def seen(pid, *, rss_mib, cpu_s):
    return Seen(pid, rss_mib=rss_mib, pss_mib=0.0, peak_mib=0.0, cpu_s=cpu_s)


def test_time_and_requests_are_of_a_minute_and_children_are_one_program():
    before = [seen(10, rss_mib=90.0, cpu_s=5.0), seen(11, rss_mib=1.0, cpu_s=2.0)]
    after = [
        seen(10, rss_mib=100.0, cpu_s=5.5),
        seen(11, rss_mib=30.0, cpu_s=4.0),
        seen(12, rss_mib=20.0, cpu_s=0.25),  # began meanwhile: all its time counts
    ]
    assert waiting._while_waiting(before, after, requests=30, minutes=0.5) == {
        "cpu_s_per_minute": {"supervisor": 1.0, "superlink": 4.5},
        "rss_mib": {"supervisor": 100.0, "superlink": 50.0},
        "requests_per_minute": 60.0,
    }


@pytest.mark.parametrize("devices", [(2, 8), (8, 2)])
def test_a_device_more_costs_the_difference_over_the_devices(devices, monkeypatch):
    def of_size(size, *, seconds):
        assert seconds == 10
        return {
            "cpu_s_per_minute": {"supervisor": 1.0 + 0.25 * size, "superlink": 7.0 + 0.5 * size},
            "rss_mib": {"supervisor": 100.0, "superlink": 80.0 + 2.0 * size},
            "requests_per_minute": 3.0 + 20.0 * size,
        }

    monkeypatch.setattr(waiting, "_of_size", of_size)
    found = waiting.measure(rounds=10, devices=devices, quiet=True)
    assert found["per_device"] == {
        "cpu_s_per_minute": {"supervisor": 0.25, "superlink": 0.5},
        "rss_mib": {"supervisor": 0.0, "superlink": 2.0},
        "requests_per_minute": 20.0,
    }
    assert list(found["sizes"]) == ["2", "8"]
    said = waiting.lines(found)
    assert [line.split(" supervisor")[0].strip() for line in said[1:]] == ["2 devices", "8 devices", "one device more"]
    assert "superlink  0.500 CPU-s a minute    2.00 MiB, 20.0 requests a minute" in said[-1]


@pytest.mark.parametrize(("rounds", "devices"), [(9, (2, 8)), (10, (3, 3)), (10, (0, 2)), (float("nan"), (2, 8))])
def test_sizes_that_have_no_difference_are_refused(rounds, devices, monkeypatch):
    monkeypatch.setattr(waiting, "_of_size", lambda *_, **__: pytest.fail("nothing must start"))
    with pytest.raises(CampaignError, match="two numbers of devices must wait for at least 10 s"):
        waiting.measure(rounds=rounds, devices=devices, quiet=True)
