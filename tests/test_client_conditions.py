"""Conditions of a schedule over an invented machine: when each holds, what it refuses, and that it fails closed."""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.service.conditions import CONDITIONS, Surroundings, ask_program, check_setting, unmet
from shared.errors import ScenarioError

ZONE = timezone(timedelta(hours=2))
NOON = datetime(2026, 11, 23, 12, 0, tzinfo=ZONE)


def at(hour, minute=0):
    return Surroundings(now=NOON.replace(hour=hour, minute=minute))


def holds(name, setting, seen):
    return unmet({name: setting}, seen) == {}


@pytest.mark.parametrize(
    ("setting", "inside", "outside"),
    [
        ("08:00-09:30", [(8, 0), (9, 29)], [(7, 59), (9, 30), (23, 0)]),
        ("22:00-06:00", [(22, 0), (23, 59), (0, 0), (5, 59)], [(6, 0), (12, 0), (21, 59)]),
        ("22:00-00:00", [(22, 0), (23, 59)], [(0, 0), (21, 59)]),
        ("00:00-06:00, 12:00-13:00", [(0, 0), (12, 30)], [(6, 0), (13, 0)]),
    ],
)
def test_a_window_is_half_open_and_may_go_over_midnight(setting, inside, outside):
    assert all(holds("window", setting, at(*clock)) for clock in inside)
    assert not any(holds("window", setting, at(*clock)) for clock in outside)


def test_a_window_is_of_local_time_and_names_its_next_begin():
    seen = Surroundings(now=datetime(2026, 11, 23, 20, 30, tzinfo=UTC).astimezone(ZONE))
    assert holds("window", "22:00-06:00", seen)
    reasons = unmet({"window": "01:00-02:00,20:00-21:00"}, at(12))
    assert reasons == {"window": "it is 12:00, the next span begins at 20:00"}
    assert "begins at 01:00" in unmet({"window": "01:00-02:00,20:00-21:00"}, at(22))["window"]


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_a_span_and_its_opposite_cover_the_day_once(start, end, now):
    def clock(minute):
        return f"{minute // 60:02}:{minute % 60:02}"

    seen = at(now // 60, now % 60)
    if start == end:
        assert "another time" in unmet({"window": f"{clock(start)}-{clock(end)}"}, seen)["window"]
    else:
        assert holds("window", f"{clock(start)}-{clock(end)}", seen) != holds(
            "window", f"{clock(end)}-{clock(start)}", seen
        )


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        ("window", "", "HH:MM-HH:MM"),
        ("window", "22-6", "HH:MM-HH:MM"),
        ("window", "24:00-06:00", "HH:MM-HH:MM"),
        ("window", "22:00-06:60", "HH:MM-HH:MM"),
        ("window", "٢٢:00-06:00", "HH:MM-HH:MM"),
        ("window", "06:00-06:00", "another time"),
        ("power", "battery", "must be mains"),
        ("idle", "0", "1 to 1440 minutes"),
        ("idle", "-5", "1 to 1440 minutes"),
        ("idle", "1441", "1 to 1440 minutes"),
        ("idle", "²", "1 to 1440 minutes"),
        ("idle", "ten", "1 to 1440 minutes"),
        ("network", "", "names of interfaces"),
        ("network", "eth0;reboot", "names of interfaces"),
        ("network", "a-very-long-interface-name", "names of interfaces"),
    ],
)
def test_an_impossible_setting_is_refused_and_holds_nowhere(name, setting, words):
    with pytest.raises(ValueError, match=words):
        check_setting(name, setting, at(12))
    assert words in unmet({name: setting}, at(12))[name]


def supplies(root, **found):
    for name, values in found.items():
        folder = root / "sys/class/power_supply" / name
        folder.mkdir(parents=True)
        for key, value in values.items():
            (folder / key).write_text(f"{value}\n")
    return Surroundings(now=NOON, root=root)


BATTERY = {"type": "Battery", "status": "Discharging"}


@pytest.mark.parametrize(
    ("found", "mains"),
    [
        ({}, True),
        ({"AC": {"type": "Mains", "online": 1}, "BAT0": BATTERY}, True),
        ({"AC": {"type": "Mains", "online": 0}, "BAT0": BATTERY}, False),
        ({"AC": {"type": "Mains", "online": 0}, "usb": {"type": "USB", "online": 1}, "BAT0": BATTERY}, True),
        ({"AC": {"type": "Mains", "online": 0}, "BAT0": {"type": "Battery", "status": "Full"}}, False),
        ({"BAT0": BATTERY}, False),
        ({"BAT0": {"type": "Battery", "status": "Charging"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Unknown"}}, False),
        ({"BAT0": {"type": "Battery"}}, False),
        ({"mouse": {"type": "Battery", "scope": "Device", "status": "Discharging"}}, True),
        ({"mouse": {"type": "Battery", "scope": "Device", "status": "Charging"}, "BAT0": BATTERY}, False),
        ({"odd": {"status": "Full"}}, False),
    ],
)
def test_mains_is_what_the_kernel_says_of_the_supplies(tmp_path, found, mains):
    (tmp_path / "sys/class/power_supply").mkdir(parents=True)
    assert holds("power", "mains", supplies(tmp_path, **found)) == mains


def test_a_machine_without_supplies_is_on_mains(tmp_path):
    assert holds("power", "mains", Surroundings(now=NOON, root=tmp_path))


def used(tmp_path, *, minutes_ago=None, hint=None, busy=0.0):
    (tmp_path / "dev/pts").mkdir(parents=True, exist_ok=True)
    if minutes_ago is not None:
        terminal = tmp_path / "dev/pts/0"
        terminal.touch()
        os.utime(terminal, (NOON.timestamp() - 60 * minutes_ago,) * 2)
    return Surroundings(now=NOON, others_busy=busy, root=tmp_path, ask=lambda _: hint)


def since(minutes_ago, *, idle="true"):
    return f"b {idle}\nt {int((NOON.timestamp() - 60 * minutes_ago) * 1e6)}\n"


def test_idle_is_no_input_and_little_work_of_others(tmp_path):
    assert holds("idle", "10", used(tmp_path))  # nobody is there
    assert holds("idle", "10", used(tmp_path, hint="b true\nt 0\n"))
    assert holds("idle", "10", used(tmp_path, minutes_ago=10))
    assert not holds("idle", "10", used(tmp_path, minutes_ago=9.9))
    assert not holds("idle", "10", used(tmp_path, minutes_ago=20, hint=since(0, idle="false")))
    assert not holds("idle", "10", used(tmp_path, minutes_ago=20, hint=since(5)))
    assert holds("idle", "10", used(tmp_path, minutes_ago=20, hint=since(11)))
    assert holds("idle", "10", used(tmp_path, minutes_ago=20, busy=0.24))
    assert "take 25%" in unmet({"idle": "10"}, used(tmp_path, minutes_ago=20, busy=0.25))["idle"]


def test_idleness_that_cannot_be_told_does_not_hold(tmp_path):
    assert not holds("idle", "10", used(tmp_path, minutes_ago=20, busy=None))
    assert not holds("idle", "10", used(tmp_path, minutes_ago=20, busy=float("nan")))
    assert not holds("idle", "10", Surroundings(now=NOON, others_busy=0.0, root=tmp_path / "none", ask=lambda _: None))


@pytest.mark.parametrize(
    ("said", "free"),
    [
        ("u 2\n", True),
        ("u 4\n", True),
        ("u 1\n", False),
        ("u 3\n", False),
        ("u 0\n", False),
        ("", False),
        (None, False),
    ],
)
def test_unmetered_is_what_network_manager_says(said, free):
    assert holds("network", "unmetered", Surroundings(now=NOON, ask=lambda _: said)) == free


V4 = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0102A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
"""
ZEROS = "0" * 32
V6 = f"""\
{ZEROS} 00 {ZEROS} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003    wlan0
{ZEROS} 00 {ZEROS} 00 {ZEROS} ffffffff 00000001 00000000 00200200       lo
"""


def routes(root, four=V4, six=""):
    (root / "proc/net").mkdir(parents=True, exist_ok=True)
    (root / "proc/net/route").write_text(four)
    (root / "proc/net/ipv6_route").write_text(six)
    return Surroundings(now=NOON, root=root)


def test_an_interface_is_the_one_that_leads_out(tmp_path):
    assert holds("network", "eth0", routes(tmp_path))
    assert holds("network", "wlan1, eth0", routes(tmp_path))
    assert unmet({"network": "wlan0"}, routes(tmp_path)) == {"network": "eth0 leads out"}
    assert unmet({"network": "eth0"}, routes(tmp_path, six=V6)) == {"network": "wlan0 leads out"}
    assert holds("network", "eth0,wlan0", routes(tmp_path, six=V6))
    assert unmet({"network": "eth0"}, routes(tmp_path, four=V4.splitlines()[0]))["network"] == "no network leads out"


def test_a_route_that_is_not_as_expected_does_not_hold(tmp_path):
    assert "cannot be told" in unmet({"network": "eth0"}, routes(tmp_path, four=V4 + "eth0 00000000\n"))["network"]


def test_conditions_of_this_machine_are_told_without_an_error():
    seen = Surroundings(now=datetime.now().astimezone(), others_busy=0.1)
    settings = {"window": "22:00-06:00", "power": "mains", "idle": "10", "network": "unmetered"}
    assert settings.keys() == CONDITIONS.keys()
    assert not [why for why in unmet(settings, seen).values() if "Error" in why]


def test_a_program_that_fails_is_absent_or_slow_says_nothing(monkeypatch):
    monkeypatch.setattr("client.service.conditions._ASK_S", 0.2)
    assert ask_program(["echo", "yes"]) == "yes\n"
    assert ask_program(["false"]) is None
    assert ask_program(["no-such-program-here"]) is None
    assert ask_program(["sleep", "5"]) is None
    assert ask_program(["printf", r"\377"]) is None


OUTSIDE = """
def when_told(setting, seen):
    if setting == "never":
        return "somebody said never"
    if setting == "strange":
        return True
    if setting == "wrong":
        raise ValueError("wrong is no setting")
    if setting == "broken":
        raise RuntimeError("a line of a diary")
"""


def test_a_condition_of_a_package_is_asked_and_a_broken_one_does_not_hold(install_package):
    install_package("ext_when", OUTSIDE, {"conditions": {"told": "when_told"}})
    assert holds("told", "yes", at(12))
    assert unmet({"told": "never"}, at(12)) == {"told": "somebody said never"}
    assert unmet({"told": "wrong"}, at(12)) == {"told": "wrong is no setting"}
    assert unmet({"told": "broken"}, at(12)) == {"told": "it cannot be told (RuntimeError)"}
    assert "must say None" in unmet({"told": "strange"}, at(12))["told"]
    assert "condition must be" in unmet({"absent": "x"}, at(12))["absent"]
    with pytest.raises(ScenarioError, match="'absent'"):
        check_setting("absent", "x", at(12))
    assert isinstance(CONDITIONS["window"], Callable)
