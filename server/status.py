"""What an operator may know of a server: rounds, replies, refusals, bytes, scores, cost, and who is there now.

Nothing here touches a file: a server may be running. Nothing comes from a user's data, but what the replies' sum did to
the shared arrays.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.app import start_checkpoint
from server.checkpoint import newest_checkpoint, put_aside
from server.cost import Cost, campaign_cost, cost_lines
from server.folder import ServerFolder
from server.lock import is_served
from server.register import read_register
from server.rounds import Round, descent, read_rounds
from shared.errors import SottovoceError
from shared.protocol.campaign import Campaign, read_campaign

_VOID = "VOID"  # under the rejected: a round of which nothing was used
_BARS = "▁▂▃▄▅▆▇█"


def status(server: ServerFolder) -> dict[str, Any]:
    """Everything that is known, as plain data.

    Args:
        server: The server's folder.

    Raises:
        ServerError: The register is damaged.
    """
    devices = read_register(server.folder)
    return {
        "server": str(server.folder),
        "address": server.settings.address,
        "port": server.settings.port,
        "devices": {
            "enrolled": sum(device.revoked is None for device in devices),
            "revoked": sum(device.revoked is not None for device in devices),
        },
        "live": _live(server),
        "campaigns": [_campaign(folder.parent) for folder in sorted(server.campaigns.glob("[!.]*/policy.json"))],
    }


def _live(server: ServerFolder) -> dict[str, Any]:
    """``state`` is ``running``, ``stopped`` or ``killed``: what a killed server wrote last is not what is."""
    running = is_served(server)
    try:
        written = json.loads(server.live.read_bytes())
        written = written if isinstance(written, dict) else {}
    except (OSError, ValueError, RecursionError):
        written = {}
    state = "running" if running else "killed" if written else "stopped"
    return {"state": state, "written": written or None}


def _campaign(folder: Path) -> dict[str, Any]:
    try:
        return _describe(read_campaign(folder))
    except SottovoceError as error:  # one damaged campaign must not hide the others
        return {"name": folder.name, "problem": str(error)}


def _describe(campaign: Campaign) -> dict[str, Any]:
    folder, policy = campaign.folder, campaign.policy
    newest = newest_checkpoint(folder / "checkpoints")
    at = newest or start_checkpoint(campaign)
    rounds = read_rounds(folder)
    line = descent(rounds, at.arrays_of)
    return {
        "name": folder.name,
        "campaign": policy.campaign,
        "policy_sha256": policy.sha256,
        "problem": None,
        "round": at.round_number,
        "rounds": policy.rounds,
        "rolled_back_to": at.rolled_back_to,
        "put_aside": put_aside(folder / "checkpoints"),
        "cohort": policy.cohort_size,
        "replies": at.total.replies,
        "rejected": {code: count for code, count in at.total.rejected.items() if code != _VOID},
        "void": at.total.rejected.get(_VOID, 0),
        "unit": policy.unit,
        "trust": policy.trust,
        "bytes_up": at.total.bytes_up,
        "bytes_down": at.total.bytes_down,
        "holdout": _scores(line),
        "cost": asdict(campaign_cost(campaign, at)),
        "history": [done.model_dump(mode="json") for done in rounds.values()],
    }


def _scores(line: list[Round]) -> dict[str, Any] | None:
    """The curve of the rounds that led to the arrays of today, on the hold-out of the last of them."""
    scored = [done for done in line if done.score]
    if not scored or scored[-1].score is None:
        return None
    last = scored[-1].score
    same = [(done, done.score) for done in scored if done.score and done.score.holdout == last.holdout]
    curve = [(done.round, score.value) for done, score in same]
    finite = [(value, number) for number, value in curve if value is not None]
    best = min(finite) if finite else None
    return {
        "metric": last.metric,
        "records": last.records,
        "start": curve[0][1] if curve[0][0] == 0 else None,
        "best": best[0] if best else None,
        "best_round": best[1] if best else None,
        "last": last.value,
        "last_round": same[-1][0].round,
        "go": same[-1][0].go,
        "why": same[-1][0].why,
        "curve": curve,
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """The same for a reader."""
    devices = found["devices"]
    said = [
        f"server {found['server']}: {found['address']} port {found['port']}",
        f"devices: {devices['enrolled']} enrolled, {devices['revoked']} revoked",
        *_live_lines(found["live"]),
    ]
    for campaign in found["campaigns"]:
        said += ["", *_campaign_lines(campaign)]
    if not found["campaigns"]:
        said.append("no campaign; add one: sottovoce server init CAMPAIGN.toml")
    return said


def _live_lines(live: Mapping[str, Any]) -> list[str]:
    written = live["written"]
    if live["state"] == "stopped":
        return ["not running; start: sottovoce server run"]
    if live["state"] == "killed":
        heard = written.get("time")
        return [f"not running: it ended without a word, last heard of {heard}; start: sottovoce server run"]
    if written is None:
        return ["starting, or rolling back"]
    there = [device for device in written.get("devices", []) if device.get("online")]
    front = written.get("front", {})
    said = [
        f"running since {written.get('since')} (pid {written.get('pid')}): campaign {written.get('campaign')}, "
        f"round {written.get('round')}, at {written.get('time')}",
        f"live: {len(there)} of {len(written.get('devices', []))} devices, a round asks {written.get('cohort')}",
    ]
    said += ["  " + ", ".join(str(device.get("name")) for device in there)] if there else []
    if front:
        said.append(
            f"front: {front.get('requests', 0):,} requests, {front.get('refused', 0):,} refused, "
            f"{front.get('bytes_in', 0):,} bytes in, {front.get('bytes_out', 0):,} out"
        )
    return said + ([f"PROBLEM: {written['problem']}"] if written.get("problem") else [])


def _campaign_lines(found: Mapping[str, Any]) -> list[str]:
    if found["problem"]:
        return [f"campaign {found['name']}: DAMAGED: {found['problem']}"]
    rejected = sorted(found["rejected"].items(), key=lambda item: (-item[1], item[0]))
    back = f", rolled back to round {found['rolled_back_to']}" if found["rolled_back_to"] is not None else ""
    return [
        f"campaign {found['name']} (policy {found['policy_sha256'][:16]}): round {found['round']} of "
        f"{found['rounds']}{back}; hides one {found['unit']}, trust {found['trust']}",
        f"  replies: {found['replies']} used, {sum(found['rejected'].values())} not"
        + (f" ({', '.join(f'{code} {count}' for code, count in rejected)})" if rejected else ""),
        *_void_lines(found["void"]),
        *_aside_lines(found["put_aside"]),
        f"  bytes: {found['bytes_up']:,} up, {found['bytes_down']:,} down",
        *_score_lines(found["holdout"]),
        *(f"  {line}" for line in cost_lines(Cost(**found["cost"]))),
    ]


def _void_lines(count: int) -> list[str]:
    words = "too few devices stayed, so no sum was opened and the arrays stayed; what they cost stays spent"
    return [f"  void rounds: {count} ({words})"] if count else []


def _aside_lines(names: list[str]) -> list[str]:
    words = "not as saved; put aside, an earlier one was gone on from. Look after the disk"
    return [f"  DAMAGED checkpoints: {', '.join(names)} ({words})"] if names else []


def _score_lines(scores: Mapping[str, Any] | None) -> list[str]:
    if scores is None:
        return ["  hold-out: none; nobody knows whether the arrays get better"]
    start, best, last = (_number(scores[name]) for name in ("start", "best", "last"))
    go = "go" if scores["go"] else f"NO-GO: {scores['why']}"
    return [
        f"  hold-out {scores['metric']} ({scores['records']} records, less is better): start {start}, best {best} "
        f"(round {scores['best_round']}), now {last}  {_bars([value for _, value in scores['curve']])}",
        f"  {go}",
    ]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _bars(values: list[float | None]) -> str:
    """A curve in a line; a value that is not finite is a cross."""
    finite = [value for value in values if value is not None]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    step = (high - low) / (len(_BARS) - 1) or math.inf
    return "".join("x" if value is None else _BARS[round((value - low) / step)] for value in values)
