"""What a finished run adds to its study's table: every score, cold start, user and attack as rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.metrics.ratings import Interval
from shared.protocol.audits import FILE as AUDIT
from shared.protocol.audits import Audit, read_audit
from simulations.report.results import Privacy, RunFolder, Summary, read_run
from simulations.study.plan import Run

Row = dict[str, Any]
COLD, SCORE, USER, MEMBERSHIP = "cold-start", "score", "user", "membership"
_CURVES = ("federated", "personal", "local")


@dataclass(frozen=True)
class Spent:
    """Time of one run; None where it was interrupted and went on, so that nobody saw the whole."""

    wall_s: float | None
    cpu_s: float | None


def rows_of_run(folder: Path, run: Run, *, spent: Spent) -> list[Row]:
    """The rows of a finished run, columns as in ``simulations/study/store.py`` but those of its place in a study.

    Raises:
        DataError: The folder holds no finished run, or a damaged audit.
    """
    found = read_run(folder)
    audit = read_audit(folder / AUDIT) if (folder / AUDIT).is_file() else None
    common: Row = {
        "seed": run.seed,
        "part": run.scenario.data.scored,
        "wall_s": spent.wall_s,
        "cpu_s": spent.cpu_s,
        "clients": found.summary.federation.clients,
        "commit": found.run.commit,
        "created": found.run.created,
    }
    claims = {row: _claim(row, found.summary, audit) for row in found.summary.rows}
    rows = [*_scores(found), *_cold(found), *_users(found), *_membership(found)]
    return [common | claims.get(row.get("row", ""), claims_of_attack(found.summary, audit)) | row for row in rows]


def _scores(found: RunFolder) -> Iterator[Row]:
    for row, scores in found.summary.rows.items():
        for metric, score in scores.items():
            yield _row(found.summary, SCORE, row, metric, score)


def _cold(found: RunFolder) -> Iterator[Row]:
    cold = found.summary.cold_start
    for who, curve in cold.curves.items() if cold else ():
        for row in (name for name in _CURVES if name in curve.rows):
            for count, score in zip(cold.counts if cold else (), curve.rows[row], strict=True):
                yield _row(found.summary, COLD, row, found.summary.metric, score) | {"at": count, "who": who}


def _users(found: RunFolder) -> Iterator[Row]:
    for row, values in found.users.rows.items():
        for user, value in zip(found.users.users, values, strict=True):
            point = Interval(value, value, value)
            yield _row(found.summary, USER, row, found.users.metric, point) | {"who": user, "low": None, "high": None}


def _membership(found: RunFolder) -> Iterator[Row]:
    membership = found.summary.membership
    if membership is None:
        return
    for target, attack in (("records", membership.records), ("users", membership.users)):
        for whose, scores in attack.attacked.items() if attack else ():
            for name, score in scores.items():
                for metric, value in (("auc", score.auc), ("tpr", score.tpr)):
                    if value is not None:
                        yield _row(found.summary, MEMBERSHIP, f"{target} {whose} {name}", metric, value)


def _row(summary: Summary, kind: str, row: str, metric: str, score: Interval) -> Row:
    known = metric in summary.metrics
    return {
        "kind": kind,
        "row": row,
        "metric": metric,
        "primary": metric == summary.metric,
        "better": ("less" if summary.less_is_better(metric) else "more") if known else None,
        "value": score.value,
        "low": score.low,
        "high": score.high,
    }


def claims_of_attack(summary: Summary, audit: Audit | None) -> Row:
    """Of rows that are no row of the table: what is said of the scenario's own campaign."""
    return _claim("federated", summary, audit)


def _claim(row: str, summary: Summary, audit: Audit | None) -> Row:
    """What covers a row: campaign, method, claim, audit, bytes and participations."""
    claim = summary.claim_of(row)
    if claim is None:
        return {"campaign": "none"}
    if row.startswith("dp-statistics"):
        return {"campaign": "statistics", "method": "dp-statistics"} | _promised(claim)
    linear = row.endswith("-linear") and summary.privacy_linear is not None
    cost = (summary.cost_linear or {}) if linear else summary.cost
    found: Row = {
        "campaign": "linear" if linear else "main",
        "method": summary.federation.method,
        "personal_method": summary.federation.personal_method if row.startswith("personal") else None,
    }
    found |= _promised(claim) | _sent(cost, clients=summary.federation.clients)
    if audit is not None and not linear and claim.epsilon is not None:
        found |= {"audit_epsilon": lower_bound(audit), "audit_passed": audit.passed}
    return found


def _promised(claim: Privacy) -> Row:
    return {"trust": claim.trust, "unit": claim.unit, "epsilon": claim.epsilon, "delta": claim.delta}


def _sent(cost: Mapping[str, float | None], *, clients: int) -> Row:
    asked = cost.get("client_rounds") or 0.0
    up, down = (cost.get(f"bytes_{way}_per_client_round") for way in ("up", "down"))
    return {
        "bytes_up": None if up is None else up * asked,
        "bytes_down": None if down is None else down * asked,
        "participations": asked / clients,
    }


def lower_bound(audit: Audit) -> float | None:
    """Largest lower bound of an audit's levels that is about the claim itself; None where none has one.

    A level that attacked a copy of the campaign with the noise of another epsilon says nothing of this one, but L1
    attacks the claimed noise too and keeps that among its facts: by the bound for Gaussian noise where it applies, the
    sharper one, and by the one for any mechanism elsewhere.
    """
    bounds = []
    for level in audit.levels.values():
        if level.passed is None:  # no evidence
            continue
        claimed = level.facts.get("claimed")
        if isinstance(claimed, dict) and claimed.get("epsilon") == audit.epsilon_claimed:
            bounds.append((claimed.get("gaussian") or claimed).get("epsilon_lower"))
        elif level.epsilon_audited in (None, audit.epsilon_claimed):
            bounds.append(level.epsilon_lower)
    return max((bound for bound in bounds if bound is not None), default=None)
