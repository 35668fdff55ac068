"""``sottovoce server run``: serve a campaign, say what every round gave, stop where the hold-out says so."""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from shared.errors import CampaignError, ServerError

if TYPE_CHECKING:
    from server.checkpoint import Checkpoint
    from server.folder import ServerFolder
    from server.judge import Judge
    from server.rounds import Round
    from shared.protocol.campaign import Campaign


def find_campaign(server: "ServerFolder", what: str | None) -> "Campaign":
    """The campaign of a server that a scenario file or a name means; by default the only one.

    Raises:
        ServerError: There is none, or several; or the scenario's file is not the one that was published.
        SottovoceError: The campaign is damaged, or not signed by this server's operator.
    """
    from shared.config import load_scenario
    from shared.privacy.policy import hash_settings
    from shared.protocol.campaign import verify_campaign
    from shared.protocol.signing import load_public

    known = sorted(path.name for path in server.campaigns.iterdir() if (path / "policy.json").is_file())
    scenario = load_scenario(Path(what)) if what and Path(what).is_file() else None
    name = scenario.name if scenario else what
    if name is None and len(known) == 1:
        [name] = known
    if name not in known:
        raise ServerError(
            f"a campaign of this server must be named ({', '.join(known) or 'it has none'}), got {what or 'none'}; add "
            "one with: sottovoce server init CAMPAIGN.toml"
        )
    campaign = verify_campaign(server.campaigns / str(name), trusted=load_public(server.operator_public))
    if scenario and hash_settings(scenario) != hash_settings(campaign.scenario):
        raise ServerError(
            f"{what} must hold the settings that were published and agreed to, they differ; give the campaign's name "
            f"({name}) to serve what was published, or publish the new settings under another name."
        )
    return campaign


def run(options: argparse.Namespace) -> int:
    """Serve until the campaign is done."""
    signal.signal(signal.SIGTERM, _interrupt)  # a service manager's way to stop is as clean as Ctrl-C
    from server.app import start_checkpoint
    from server.checkpoint import newest_checkpoint
    from server.cost import campaign_cost, cost_lines
    from server.rounds import read_rounds
    from server.service import serve
    from sottovoce.server_place import opened_server

    server = opened_server(options)
    campaign = find_campaign(server, options.campaign)
    judge = _judge(server, campaign, options)
    policy = campaign.policy
    _say(
        f"campaign {policy.campaign} ({policy.sha256[:12]}): {policy.rounds} rounds of {policy.cohort_size} devices",
        f"devices call {server.settings.address} port {server.settings.port}; nothing else is served there",
    )

    def on_round(checkpoint: "Checkpoint") -> None:
        line = read_rounds(campaign.folder).get(checkpoint.round_number)
        _say(round_line(checkpoint, line, rounds=policy.rounds))

    try:
        ended = serve(server, campaign, judge=judge, host=options.host, on_round=on_round, on_state=_say)
    except (CampaignError, KeyboardInterrupt):
        newest = newest_checkpoint(campaign.folder / "checkpoints") or start_checkpoint(campaign)
        _say(*cost_lines(campaign_cost(campaign, newest)))
        raise
    _say(f"done: {ended.round_number} rounds; the shared part is in {campaign.folder / 'checkpoints'}")
    return 0


def _judge(server: "ServerFolder", campaign: "Campaign", options: argparse.Namespace) -> "Judge":
    """Who scores the rounds: on the operator's hold-out, where one is named."""
    from server.holdout import Examiner, read_holdout
    from server.judge import Judge, Rule

    rule = Rule(tolerance=options.tolerance)
    if (options.holdout is None) != (options.holdout_format is None):
        raise ServerError("a hold-out needs both --holdout SOURCE and --holdout-format NAME, got one of them.")
    if (options.holdout is None) != options.no_holdout:
        raise ServerError(
            "a campaign is scored on records of yours, or blind because you say so: give --holdout SOURCE and "
            "--holdout-format NAME, or --no-holdout."
        )
    examiner = None
    if options.holdout is not None:
        columns = dict(pair.partition("=")[::2] for pair in options.holdout_columns.split(",") if pair)
        holdout = read_holdout(
            options.holdout_format,
            options.holdout,
            columns=columns,
            records=options.holdout_records,
            data=campaign.scenario.data,
        )
        examiner = Examiner(campaign, holdout, cache=server.state / "holdout")
        _say(f"every round is scored on {len(holdout.records):,} records of {holdout.source}")
    return Judge(campaign, examiner, rule=rule, stop=not options.no_stop)


def round_line(checkpoint: "Checkpoint", line: "Round | None", *, rounds: int) -> str:
    """What a round gave, for the operator."""
    counts = checkpoint.latest
    rejected = (
        ", ".join(f"{count} {code}" for code, count in sorted(counts.rejected.items()) if code != "VOID") or "none"
    )
    void = "VOID, nothing was opened or used; " if "VOID" in counts.rejected else ""
    said = (
        f"round {checkpoint.round_number} of {rounds}: {void}replies {counts.replies}, rejected {rejected}, "
        f"{counts.bytes_up:,} bytes up, {counts.bytes_down:,} down"
    )
    if line is None or line.score is None:
        return said
    value = "not finite" if line.score.value is None else f"{line.score.value:.4f}"
    return f"{said}; hold-out {line.score.metric} {value}: {'go' if line.go else 'no-go'}"


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True, file=sys.stdout)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt
