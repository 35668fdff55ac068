"""Time a device's ledger: what one round costs on this disk, beside the floor of a single durable write.

Figures are wall time, because the disk is what is waited for; spend, release and floor are interleaved. First every
payload released is asked for again, and must come back as it was.
"""

import os
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import platformdirs

from client.ledger.ledger import Ledger, create_ledger, open_ledger
from client.vault.keystore import file_keystore
from shared.errors import CampaignError
from shared.progress import progress

_PAYLOAD_BYTES = 64 * 1024  # about what the shared tensors of the demo weigh
_POLICY = "0" * 64


def measure(*, rounds: int = 200, folder: Path | None = None, quiet: bool = False) -> dict[str, Any]:
    """Measure spend, release, resending and opening of a ledger with the file keystore.

    Args:
        rounds: How many rounds are taken.
        folder: Where the ledger is written, which decides what is measured; by default the user's cache, because the
            folder for temporary files is often kept in memory.
        quiet: Show no progress.

    Returns:
        ``ms.<spend|release|resend|open|durable_write>.<median|p95>``, ``payload_bytes``, ``rounds``, machine and
        versions.

    Raises:
        CampaignError: What was released did not come back, or was counted wrongly.
    """
    disk = folder or platformdirs.user_cache_path("sottovoce", ensure_exists=True)
    with tempfile.TemporaryDirectory(dir=disk) as name:
        return _measure(Path(name), rounds=rounds, quiet=quiet)


def _measure(folder: Path, *, rounds: int, quiet: bool) -> dict[str, Any]:
    keystore, path = file_keystore(folder), folder / "ledger.db"
    payload = random.Random(0).randbytes(_PAYLOAD_BYTES)
    times: dict[str, list[float]] = {name: [] for name in ("spend", "release", "resend", "open", "durable_write")}
    with create_ledger(path, keystore=keystore, cap_epsilon=8.0, cap_delta=1e-5, clock=_now) as ledger:
        ledger.consent(
            policy=_POLICY,
            campaign="bench",
            epsilon=8.0,
            delta=1e-5,
            max_participations=rounds,
            until=date.max,
            operator="bench",
        )
        with progress(total=rounds, description="bench ledger", unit="round", quiet=quiet) as bar:
            for number in range(1, rounds + 1):
                _round(ledger, number, payload, folder / "floor", times)
                bar.update(1)
    for _ in range(min(rounds, 20)):
        times["open"].append(_timed(lambda: open_ledger(path, keystore=keystore, clock=_now).close()))
    with open_ledger(path, keystore=keystore, clock=_now) as ledger:
        [standing] = ledger.consents()
        if (standing.spent, standing.released) != (rounds, rounds):
            raise CampaignError(f"{rounds} rounds must be counted, got {standing.spent} and {standing.released}.")
    return {
        "mode": "wall time, file keystore",
        "rounds": rounds,
        "payload_bytes": _PAYLOAD_BYTES,
        "ms": {name: _summary(values) for name, values in times.items()},
        "machine": {"platform": f"{platform.system()} {platform.machine()}", "python": platform.python_version()},
        "versions": {"sqlite": sqlite3.sqlite_version},
    }


def _round(ledger: Ledger, number: int, payload: bytes, floor: Path, times: dict[str, list[float]]) -> None:
    def spend() -> bytes | None:
        return ledger.spend(policy=_POLICY, round_number=number, request_sha256="0" * 64, answered=number - 1)

    times["spend"].append(_timed(spend))
    times["release"].append(_timed(lambda: ledger.release(policy=_POLICY, round_number=number, payload=payload)))
    if spend() != payload:
        raise CampaignError(f"the answer of round {number} must come back as it was released, it did not.")
    times["resend"].append(_timed(spend))
    times["durable_write"].append(_timed(lambda: _append(floor, b"0" * 4096)))


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p95": ordered[-(-95 * len(ordered) // 100) - 1]}


def _now() -> datetime:
    return datetime.now(UTC)


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['rounds']} rounds, answers of {measured['payload_bytes'] // 1024} KiB"]
    out += [f"  {name:<44} {v['median']:9.2f} ms  p95 {v['p95']:.2f}" for name, v in measured["ms"].items()]
    return out
