"""The documents on privacy: their numbers are recomputed, and the tests that they name exist."""

import math
import re
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest
import scipy.stats

from shared.heads.adapter import MAX_ABS_VALUE
from shared.privacy.accounting import DistributedMechanism, Mechanism, epsilon, epsilon_together, grid_excess
from shared.privacy.clipping import _ROUNDING_MARGIN
from shared.privacy.noise import GRID_SIGMA
from shared.privacy.promise import _COARSEST
from shared.protocol.wire import REFUSALS

ROOT = Path(__file__).parents[1]
PRIVACY, THREATS = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("privacy.md", "threat-model.md"))
DELTA, COORDINATES = 1e-5, 100_000


def table(name: str) -> list[list[str]]:
    """The cells of the rows of the table after its mark, header left out."""
    [found] = re.findall(rf"<!-- table: {name} -->\n\|.*\n\|[-|]+\n((?:\|.*\n)+)", PRIVACY)
    return [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in found.splitlines()]


def number(cell: str) -> float:
    return float(cell.removesuffix("%").strip()) / (100 if cell.endswith("%") else 1)


def unit(cell: str) -> float:
    """One unit of the last digit of a printed number."""
    exponent = Decimal(cell.removesuffix("%").strip()).as_tuple().exponent
    return 10.0 ** int(exponent) / (100 if cell.endswith("%") else 1)


def is_rounded(cell: str, value: float) -> bool:
    return abs(number(cell) - value) <= 0.5001 * unit(cell)


def is_rounded_up(cell: str, value: float) -> bool:
    return 0 <= number(cell) - value < unit(cell)


def mechanism(noise: str | float, rate: str, steps: str, rounds: str | int, size: int = COORDINATES) -> Mechanism:
    return Mechanism(float(noise), float(rate), int(steps), int(rounds), coordinates=size, grid_sigma=GRID_SIGMA)


def certifies(cell: str, target: float, *, delta: float = DELTA, setting: tuple[str, str, str]) -> bool:
    """Whether a noise multiplier is the smallest of its digits that keeps to the target."""

    def price(noise: Decimal) -> float:
        return epsilon(mechanism(float(noise), *setting), delta=delta, discretization=1e-3 * target)

    noise = Decimal(cell)
    return price(noise) <= target < price(noise - Decimal(str(unit(cell))))


@cache
def noise_table() -> dict[tuple[str, str, str], list[str]]:
    return {(rate, steps, rounds): noises for rate, steps, rounds, *noises in table("noise")}


def test_the_noise_table_has_every_setting():
    wanted = {(q, steps, rounds) for q in ("1", "0.1") for steps in ("1", "4") for rounds in ("5", "20", "50")}
    assert noise_table().keys() == wanted
    assert all(len(noises) == 4 for noises in noise_table().values())


@pytest.mark.parametrize("setting", list(noise_table()), ids=" ".join)
def test_the_noise_for_each_epsilon_is_the_smallest_of_its_digits(setting):
    for target, cell in zip((1.0, 2.0, 4.0, 8.0), noise_table()[setting], strict=True):
        assert certifies(cell, target, setting=setting), (target, cell)


def test_a_wrong_digit_in_the_noise_table_would_be_seen():
    for setting, cell in ((("1", "1", "20"), "2.69"), (("0.1", "4", "50"), "1.14")):
        wrong = Decimal(cell) + Decimal(str(unit(cell))), Decimal(cell) - Decimal(str(unit(cell)))
        assert not any(certifies(str(noise), 8.0, setting=setting) for noise in wrong)


def test_epsilon_round_by_round():
    rows = table("rounds")
    assert [row[:2] for row in rows] == [["1", "1"], ["0.1", "4"]]
    for rate, steps, noise, *cells in rows:
        assert noise == noise_table()[rate, steps, "20"][3]
        for k, cell in zip((1, 2, 5, 10, 15, 20), cells, strict=True):
            price = epsilon(mechanism(noise, rate, steps, k), delta=DELTA, discretization=1e-3)
            assert is_rounded_up(cell, price), (rate, k, price)
        assert number(cells[0]) > 8 / 20  # the first round is the dearest
        assert number(cells[3]) > 8 / 2


def test_what_epsilon_means():
    rows = table("meaning")
    assert [row[0] for row in rows] == ["1", "2", "4", "8"]
    for (target, factor, mu, found), noise in zip(rows, noise_table()["1", "1", "20"], strict=True):
        exact = math.sqrt(20) / float(noise)
        assert is_rounded(factor, math.exp(float(target)))
        assert is_rounded(mu, exact)
        assert is_rounded(found, scipy.stats.norm.cdf(scipy.stats.norm.ppf(0.01) + exact))


def test_delta_and_the_roster():
    rows = table("delta")
    assert len(rows) == 4
    for delta, clients, noise in rows:
        assert float(delta) == pytest.approx(1 / (10 * int(clients)), rel=1e-12, abs=0)
        assert certifies(noise, 8.0, delta=float(delta), setting=("1", "1", "20"))


def test_campaigns_together():
    noise = noise_table()["1", "1", "20"][3]
    rows = table("together")
    assert [row[0] for row in rows] == ["1", "2", "4"]
    for count, reserved_epsilon, reserved_delta, together in rows:
        campaigns = [mechanism(noise, "1", "1", 20)] * int(count)
        assert float(reserved_epsilon) == 8 * int(count)
        assert float(reserved_delta) == pytest.approx(DELTA * int(count))
        assert is_rounded_up(together, epsilon_together(campaigns, delta=float(reserved_delta)))


def test_a_filter_would_stop_early():
    """One Gaussian release of noise z costs alpha / 2 z^2 in Rényi divergence of order alpha."""
    rows, orders = table("filter"), [1 + step / 100 for step in range(1, 10_000)]
    assert [row[0] for row in rows] == ["1", "2", "4", "8"]
    for (target, noise, allowed), wanted in zip(rows, noise_table()["1", "1", "20"], strict=True):
        assert noise == wanted
        found = max(
            (float(target) - math.log(1 - 1 / a) + math.log(DELTA * a) / (a - 1)) * 2 * float(noise) ** 2 / a
            for a in orders
        )
        assert int(allowed) == int(found)


def test_the_constants_of_the_proof_are_those_of_the_code():
    assert _ROUNDING_MARGIN == 1e-5
    assert _COARSEST / 2 == 0.01  # of C, half a cell's diagonal
    assert MAX_ABS_VALUE == 16
    assert math.exp(5e-5) * (1 - 1e-4 + 1e-5) < 1
    fine = mechanism(2.69, "1", "1", 20)
    noises = COORDINATES * 20
    t_squared = 2 * (8 + math.log(4 * noises / (1e-5 * DELTA)))
    wanted = noises * (t_squared + 1) / (24 * GRID_SIGMA**2)
    assert grid_excess(fine, epsilon=8.0, delta=DELTA) == pytest.approx(wanted)
    sizes = [int(share * 5e-5 * 24 * GRID_SIGMA**2 / 20) for share in (0.999, 1.001)]  # M / 24 s^2 around its limit
    below, above = (grid_excess(mechanism(2.69, "1", "1", 20, n), epsilon=8.0, delta=DELTA) for n in sizes)
    assert below < math.inf == above


def test_signal_against_noise():
    noise, rows = float(noise_table()["1", "1", "20"][3]), table("signal")
    assert len(rows) == 9
    for numbers, devices, records in rows:
        assert int(records) == math.ceil(noise * math.sqrt(int(numbers) * int(devices)))


def test_noise_of_users():
    rows = table("users")
    assert [row[0] for row in rows] == ["1", "2", "4", "8"]
    for (target, central, shared, *users), same in zip(rows, noise_table()["1", "1", "20"], strict=True):
        assert central == same

        def price(noise: Decimal) -> float:
            return epsilon(DistributedMechanism(float(noise), 20, 2000, shares=70, share_sigma=2.0**16), delta=DELTA)

        noise = Decimal(shared)
        assert price(noise) <= float(target) < price(noise - Decimal(str(unit(shared))))
        assert 1.06 < float(shared) / float(central) < 1.09
        assert [int(cell) for cell in users] == [math.ceil(float(shared) * math.sqrt(d)) for d in (385, 2000)]


def test_what_the_grid_costs():
    assert GRID_SIGMA == 2**24
    rows = table("grid")
    assert len(rows) == 4
    for target, rate, steps, rounds, numbers, noise, excess, share in rows:
        column = ("1", "2", "4", "8").index(target)
        assert noise == noise_table()[rate, steps, rounds][column]
        found = grid_excess(mechanism(noise, rate, steps, rounds, int(numbers)), epsilon=float(target), delta=DELTA)
        assert is_rounded(excess, found)
        assert is_rounded(share, float(noise) * math.sqrt(int(numbers)) / 2 / GRID_SIGMA)


def test_every_test_that_is_named_exists():
    defined = set(re.findall(r"^ *def (test_\w+)\(", _all_tests(), re.MULTILINE))
    files = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    for document in (PRIVACY, THREATS):
        named = set(re.findall(r"\btest_\w+", document))
        assert len(named) > 20
        assert named <= defined | files, sorted(named - defined - files)
    assert "…" not in "".join(re.findall(r"`[^`\n]*`", PRIVACY + THREATS))  # a name is written out


def _all_tests() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py")))


def test_every_promise_of_the_ledger_has_a_test():
    rows = re.findall(r"^\| (I\d+) \|.*\| (.*) \|$", PRIVACY, re.MULTILINE)
    assert [name for name, _ in rows] == [f"I{number}" for number in range(1, 12)]
    assert all("`test_" in tests for _, tests in rows)


def test_every_code_of_a_refusal_is_explained_once():
    assert re.findall(r"^\| `([A-Z_]+)` \|", THREATS, re.MULTILINE) == list(REFUSALS)


def test_every_adversary_is_there():
    assert re.findall(r"^## (A\d)", THREATS, re.MULTILINE) == [f"A{number}" for number in range(1, 9)]
