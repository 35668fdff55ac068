"""What a fleet of any size would cost: a small model of measured unit costs, beside the real calibration and messages.

Noise, neighbours and bytes are computed by the functions that make policies and messages; only processor time and the
traffic of waiting devices are extrapolated, from the constants of ``UNITS``; ``docs/scale.md`` says how far.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.config import Scenario
from shared.errors import PrivacyError
from shared.flower.grid import round_trip_bytes
from shared.privacy.accounting import calibrate_noise
from shared.privacy.calibration import share_noise
from shared.privacy.noise import GRID_SIGMA
from shared.privacy.policy import SUM, SecureSum
from shared.protocol import wire
from simulations.campaigns import stage_bodies

_POLICY = "0" * 64


@dataclass(frozen=True)
class SumCost:
    """CPU-milliseconds of a part of a secure sum: ``fixed + neighbour k + value P + mask k P + member n``, for k
    neighbours, vectors of P numbers and n devices in the sum, whose seats are named to each of them.
    """

    fixed: float
    neighbour: float
    value: float
    mask: float
    member: float

    def ms(self, *, neighbours: int, values: int, members: int) -> float:
        """For one device."""
        of_values = (self.value + self.mask * neighbours) * values
        return self.fixed + self.neighbour * neighbours + of_values + self.member * members


@dataclass(frozen=True)
class UnitCosts:
    """Measured on one thread of one machine; a test derives them again from the files they are of.

    Attributes:
        reply_ms: CPU of the server for a device's request and reply of few numbers, at most: both ends of the messages
            in one process, gate and sum (``bench-scale.json``).
        waiting_cpu_s: CPU of the server for one more device that waits, a minute (``bench-waiting.json``).
        waiting_requests: Requests of a device that waits, a minute (``bench-waiting.json``).
        sum_device: A secure sum on a device, training aside (``bench-secure-sum.json``, as the two below).
        sum_survivor: The server's part for a device that stays; ``member`` is what real sums of a thousand and of ten
            thousand differ by (``bench-scale.json``), their neighbours aside.
        sum_dropout: The server's part for a device that is lost after it shared.
    """

    reply_ms: float
    waiting_cpu_s: float
    waiting_requests: float
    sum_device: SumCost
    sum_survivor: SumCost
    sum_dropout: SumCost


UNITS = UnitCosts(
    reply_ms=0.333,
    waiting_cpu_s=0.18,
    waiting_requests=23.0,
    sum_device=SumCost(7.33, 1.95, 1.09e-5, 4e-6, 0.0),
    sum_survivor=SumCost(0.0, 0.0285, 2.26e-6, 3.57e-8, 3.8e-4),
    sum_dropout=SumCost(0.19, 0.123, 2.64e-6, 3.55e-6, 0.0),
)


def fit_sum_cost(sums: Mapping[str, Mapping[str, Any]], terms: Mapping[str, Any], part: str) -> tuple[SumCost, float]:
    """The constants of one part from the file of ``sottovoce bench secure-sum``, none below zero.

    Args:
        sums: ``sums`` of the file: group -> values -> cell.
        terms: ``terms`` of the file.
        part: ``device``, ``survivor`` or ``dropout``.

    Returns:
        The constants but ``member``, by least squares of relative errors, and the largest relative error of a cell.
    """
    from scipy.optimize import nnls

    rows, seen = [], []
    for group, cells in sums.items():
        neighbours = terms[group]["neighbours"]
        for values, cell in cells.items():
            rows.append([1.0, neighbours, int(values), neighbours * int(values)])
            seen.append(_cell_ms(cell, part, devices=int(group)))
    design, wanted = np.array(rows), np.array(seen)
    scale = design.max(axis=0)
    found, _ = nnls(design / scale / wanted[:, None], np.ones(len(wanted)))
    constants = found / scale
    worst = float(np.max(np.abs(design @ constants / wanted - 1)))
    fixed, neighbour, value, mask = map(float, constants)
    return SumCost(fixed, neighbour, value, mask, 0.0), worst


def _cell_ms(cell: Mapping[str, Any], part: str, *, devices: int) -> float:
    if part == "device":
        return float(cell["device_ms"]["all"]["median"])
    server, lost = cell["server_ms"], cell["lost"]
    if part == "dropout":
        return float(server["dropout"]["median"])
    return float((server["all"] - lost * server["dropout"]["median"]) / (devices - lost))


def forecast(
    scenario: Scenario,
    *,
    clients: int,
    values: int,
    dropout: float = 0.05,
    waiting: int | None = None,
    units: UnitCosts = UNITS,
) -> dict[str, Any]:
    """What a campaign of so many devices would cost.

    Args:
        scenario: Its ``privacy``, ``federation`` (cohort, rounds, timeout) and ``training``; no data, no base.
        clients: Devices of the roster.
        values: Numbers that a device shares.
        dropout: Share of the devices asked that do not answer, in [0, 1).
        waiting: Devices connected at a time; by default as many as are asked, and a tenth more.
        units: What was measured.

    Returns:
        ``privacy``, ``device`` (a round), ``server`` (a round), ``round``, ``campaign``; the units are in the keys.

    Raises:
        PrivacyError: No noise reaches the target, or so few devices would stay that every round is void.
    """
    if not (clients >= 1 and values >= 1 and (waiting is None or waiting >= 0)):
        raise PrivacyError(
            f"clients and values must be at least 1 and waiting not below 0, got {clients}, {values} and {waiting}."
        )
    if not 0 <= dropout < 1:
        raise PrivacyError(f"the share of devices that drop out must be in [0, 1), got {dropout}.")
    federation, privacy = scenario.federation, scenario.privacy
    cohort = clients if federation.cohort_size == "all" else min(federation.cohort_size, clients)
    participations = -(-federation.rounds * cohort // clients)
    promised = privacy.model_copy(
        update={"max_participations": participations, "delta": min(privacy.delta, 1 / (10 * clients))}
    )
    scenario = scenario.model_copy(update={"privacy": promised})
    noise, terms = _noise(scenario, cohort=cohort, values=values)
    stay = math.floor(cohort * (1 - dropout) + 1e-9)
    _check_enough(scenario, terms, stay=stay, cohort=cohort)
    lost = cohort - stay
    down, up = _bytes(scenario, terms, cohort=cohort, values=values)
    sums = None
    server_s = cohort * units.reply_ms / 1000
    if terms is not None:
        members = cohort // terms.groups
        k = terms.terms.degree(members)
        size = {"neighbours": k, "values": values, "members": members}
        sums = {
            "neighbours": k,
            "threshold": terms.threshold,
            "min_survivors": terms.min_survivors,
            "groups": terms.groups,
            "device_cpu_ms": units.sum_device.ms(**size),
        }
        server_s += stay * units.sum_survivor.ms(**size) / 1000
        server_s += lost * units.sum_dropout.ms(**size) / 1000
    stages = 4 if terms is not None else 1
    waiting = round(1.1 * cohort) if waiting is None else waiting
    timeout_s = federation.round_timeout_s
    round_s = timeout_s if lost else None
    total = (down + up) * cohort
    return {
        "clients": clients,
        "cohort": cohort,
        "rounds": federation.rounds,
        "values": values,
        "dropout": dropout,
        "privacy": {
            "trust": promised.trust,
            "unit": promised.unit,
            "epsilon": promised.epsilon if promised.trust != "none" else None,
            "delta": promised.delta,
            "participations": participations,
            "noise_multiplier": noise,
            "noise_of_the_mean": _noise_of_the_mean(scenario, noise, cohort=cohort),
            "outweighed_by": _outweighed_by(scenario, noise, cohort=cohort, values=values),
        },
        "device": {"bytes_down": down, "bytes_up": up, "sum": sums},
        "server": {
            "cpu_s": server_s,
            "bytes": total,
            "held_bytes": total,
            "waiting": waiting,
            "waiting_requests_per_s": waiting * units.waiting_requests / 60,
            "waiting_cpus": waiting * units.waiting_cpu_s / 60,
        },
        "round": {
            "stages": stages,
            "everybody_answers": (1 - dropout) ** cohort,
            "seconds": round_s,
            "lost": lost,
            "all_over_median": slowest(stay),
            "four_fifths_over_median": slowest(stay, share=0.8),
        },
        "campaign": {
            "server_cpu_s": server_s * federation.rounds,
            "bytes": total * federation.rounds,
            "days": None if round_s is None else round_s * federation.rounds / 86400,
        },
    }


def slowest(count: int, *, share: float = 1.0, spread: float = 1.0) -> float:
    """How long so many devices take to answer, over what the one in the middle takes; the median of it.

    Args:
        count: Devices that answer.
        share: Of them that are waited for.
        spread: Standard deviation of the logarithm of the times, which are taken to be lognormal: an assumption.

    Example:
        >>> round(slowest(10_000), 1), round(slowest(10_000, share=0.8), 1)
        (45.2, 2.3)
    """
    from scipy.stats import beta, norm

    waited = max(1, math.ceil(share * count - 1e-9))
    quantile = beta.median(waited, count - waited + 1)  # of the waited-th of count uniform times
    return float(math.exp(spread * norm.ppf(quantile)))


def _noise(scenario: Scenario, *, cohort: int, values: int) -> tuple[float, SecureSum | None]:
    """The noise multiplier, and the terms of a secure sum, as a policy would have them."""
    privacy = scenario.privacy
    if privacy.trust == "none":
        return 0.0, None
    if privacy.trust == "distributed":
        return share_noise(
            privacy,
            cohort_size=cohort,
            size=values,
            groups=scenario.federation.groups,
            rounds=scenario.federation.rounds,
        )
    local = privacy.trust == "local"
    noise = calibrate_noise(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        sampling_rate=privacy.sampling_rate if local else 1.0,
        steps=scenario.training.steps if local else 1,
        max_participations=privacy.max_participations,
        coordinates=values,
        grid_sigma=GRID_SIGMA,
    )
    return noise, None


def _check_enough(scenario: Scenario, terms: SecureSum | None, *, stay: int, cohort: int) -> None:
    needed = terms.min_survivors * terms.groups if terms else math.ceil(scenario.federation.min_reply_share * cohort)
    if not stay >= max(needed, 1):
        raise PrivacyError(
            f"a round needs {needed} of {cohort} devices, with this dropout {stay} stay: every round would be void. "
            "Ask for fewer survivors (privacy.survivors, federation.min_reply_share), at the price of more noise."
        )


def _bytes(scenario: Scenario, terms: SecureSum | None, *, cohort: int, values: int) -> tuple[int, int]:
    """Bytes that a device receives and sends in a round: of real messages, envelopes included."""
    of_round: dict[str, Any] = {"round_number": 1, "policy_sha256": _POLICY}
    arrays = wire.pack_arrays({"output": np.zeros(values, np.float32)})
    sums = scenario.privacy.unit == "user" and scenario.privacy.trust != "none"
    dtype = np.uint32 if terms is not None else np.int64
    reply = {SUM: np.zeros(values, dtype)} if sums else {"output": np.zeros(values, np.float32)}
    bodies = stage_bodies(terms.terms, cohort // terms.groups) if terms is not None else []
    body = bodies.pop(2)[0] if bodies else b""
    pairs = [(wire.pack_request(arrays, body=body, **of_round), wire.pack_reply(reply, **of_round))]
    pairs += [(wire.pack_stage(down, **of_round), wire.pack_stage(up, **of_round)) for down, up in bodies]
    sizes = [round_trip_bytes(request, answer) for request, answer in pairs]
    return sum(down for down, _ in sizes), sum(up for _, up in sizes)


def _noise_of_the_mean(scenario: Scenario, noise: float, *, cohort: int) -> float:
    """Standard deviation of a number of the mean change, in clip norms, at the fewest devices that may stay."""
    if scenario.privacy.unit == "record":
        return noise * math.sqrt(scenario.training.steps / cohort) / scenario.privacy.denominator
    return noise * math.sqrt(_noises(scenario, cohort)) / cohort


def _outweighed_by(scenario: Scenario, noise: float, *, cohort: int, values: int) -> int:
    """Users, or records, whose clipped changes point the same way and are as long as a round's noise."""
    return math.ceil(noise * math.sqrt(values * _noises(scenario, cohort)))


def _noises(scenario: Scenario, cohort: int) -> int:
    """How many independent noises, each enough for a whole promise, are in the sum of a round."""
    if scenario.privacy.unit == "record":
        return cohort
    return scenario.federation.groups if scenario.privacy.trust == "distributed" else 1


def lines(found: dict[str, Any]) -> list[str]:
    """The forecast for a reader."""
    privacy, device, server, campaign = (found[part] for part in ("privacy", "device", "server", "campaign"))
    unit = f"{privacy['unit']}s"
    out = [
        f"{found['clients']:,} devices, {found['cohort']:,} asked a round, {found['rounds']} rounds, "
        f"{found['values']:,} shared numbers, {found['dropout']:.0%} drop out",
        f"  each device takes part {privacy['participations']} times",
    ]
    if privacy["epsilon"] is not None:
        out += [
            f"  epsilon {privacy['epsilon']:g} at delta {privacy['delta']:.2g} for {unit}, trust {privacy['trust']}: "
            f"noise multiplier {privacy['noise_multiplier']:.3g}",
            f"  noise of a round: {privacy['noise_of_the_mean']:.2e} clip norms a number, as long as "
            f"{privacy['outweighed_by']:,} {unit} that agree",
        ]
    out.append(f"  a device, a round: {device['bytes_down']:,} bytes down, {device['bytes_up']:,} up")
    if device["sum"]:
        each = device["sum"]
        out.append(
            f"  its secure sum: {each['neighbours']} neighbours, threshold {each['threshold']}, "
            f"{each['min_survivors']:,} must stay, {each['device_cpu_ms'] / 1000:.2f} CPU-s"
        )
    out += [
        f"  the server, a round: {server['cpu_s']:,.1f} CPU-s, {server['bytes'] / 1e9:,.2f} GB",
        f"  {server['waiting']:,} devices waiting: {server['waiting_requests_per_s']:,.0f} requests a second, about "
        f"{server['waiting_cpus']:,.0f} processors",
        f"  the campaign: {campaign['server_cpu_s'] / 3600:,.2f} CPU-h, {campaign['bytes'] / 1e12:,.3f} TB",
    ]
    if campaign["days"] is not None:
        out.append(
            f"  a round ends at its timeout, for {found['round']['lost']:,} devices do not answer: "
            f"{found['round']['seconds']:g} s in each stage that loses one, {campaign['days']:.1f} days or more in all"
        )
    return out
