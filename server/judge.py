"""Go or no-go: score every round's shared arrays on the operator's hold-out, write its line, stop what does harm."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from server.app import start_checkpoint
from server.checkpoint import Checkpoint, newest_checkpoint
from server.holdout import Examiner
from server.rounds import Round, Score, append_round, descent, note_begun, read_rounds
from shared.errors import CampaignError
from shared.protocol.campaign import Campaign


class NoGoError(CampaignError):
    """A campaign was stopped because its shared arrays got worse."""


@dataclass(frozen=True)
class Rule:
    """When arrays are not fit to go on from.

    The records are the same every time, so a difference between two scores is the arrays', not the sample's. It still
    holds the noise of the rounds: one may be unlucky, and the best so far may have been lucky. Hence a margin, and
    patience; healthy campaigns of MovieLens under epsilon 8 were seen up to 1.6 % above their best so far. The public
    start is among the scores: a model that is worse than no training at all is a no-go.

    Args:
        tolerance: How much worse than the best score so far is still fit, as a share of it; finite and >= 0.
        patience: Rounds running that must be worse by more; at least 1. A score that is not finite needs no second.

    Raises:
        CampaignError: A value is impossible.
    """

    tolerance: float = 0.02
    patience: int = 2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0 and self.patience >= 1):
            raise CampaignError(
                "a go or no-go needs a tolerance of at least 0 and a patience of at least 1 round, got "
                f"{self.tolerance} and {self.patience}; 0.02 and 2 are usual."
            )

    def objection(self, scores: Sequence[Score]) -> str | None:
        """Why the last of some scores is a no-go, in words; None where it is fit.

        Args:
            scores: Of the public start, where it has one, and of the rounds that led to these arrays, all on the same
                hold-out; at least one.

        Example:
            >>> curve = [1.0, 0.9, 0.95, 0.94]
            >>> scores = [Score(metric="rmse", value=x, records=9, holdout="a") for x in curve]
            >>> [Rule().objection(scores[: n + 1]) is None for n in range(4)]
            [True, True, True, False]
        """
        values = [math.inf if score.value is None else score.value for score in scores]
        if not math.isfinite(values[-1]):
            return f"{scores[-1].metric} is not finite"
        best = math.inf
        bad = []
        for value in values:
            bad.append(not value <= best * (1 + self.tolerance))
            best = min(best, value)
        if len(bad) < self.patience or not all(bad[-self.patience :]):
            return None
        running = f"{self.patience} rounds running" if self.patience > 1 else "this round"
        return (
            f"{scores[-1].metric} {values[-1]:.4g} is more than {self.tolerance:.1%} worse than the best so far, "
            f"{best:.4g}, {running}"
        )


class Judge:
    """Stands beside a campaign's rounds: scores, writes lines, and stops. It changes no array.

    Args:
        campaign: Its folder gets the lines.
        examiner: None: nothing is scored, and nothing stopped.
        rule: When to object.
        stop: Whether an objection ends the campaign.
        clock: The time, UTC.
    """

    def __init__(
        self,
        campaign: Campaign,
        examiner: Examiner | None,
        *,
        rule: Rule = Rule(),
        stop: bool = True,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._campaign, self._examiner, self._rule, self._stop, self._clock = campaign, examiner, rule, stop, clock
        self._last = start_checkpoint(campaign)
        self._since: float | None = None

    def begin(self) -> Round:
        """Take up a campaign where it stands, before its next round; call it as the one process that serves it.

        The line of the start, and that of a round whose line a kill left out, are written now; the newest arrays are
        scored anew where the hold-out is another.

        Returns:
            The line of the arrays the next round goes on from.

        Raises:
            NoGoError: They are a no-go, and nobody said to go on all the same.
        """
        folder = self._campaign.folder
        start = start_checkpoint(self._campaign)
        self._last = newest_checkpoint(folder / "checkpoints") or start
        for at in (start, self._last):
            self._catch_up(at)
        line = read_rounds(folder)[self._last.arrays_of]
        self._go_on_after(line)
        return line

    def on_round(self, checkpoint: Checkpoint) -> None:
        """Score a finished round and write its line.

        Raises:
            NoGoError: No further round should be asked for; the checkpoint is kept.
        """
        line = Round(
            round=checkpoint.round_number,
            after=self._last.arrays_of,
            time=self._now(),
            seconds=None if self._since is None else time.monotonic() - self._since,
            asked=sum(checkpoint.participations.values()) - sum(self._last.participations.values()),
            **_counts(checkpoint),
        )
        line = self._scored(line, checkpoint)
        self._last = checkpoint
        self._go_on_after(line)

    def _catch_up(self, at: Checkpoint) -> None:
        """Write the line of a checkpoint's arrays where there is none, or none with a score on this hold-out."""
        line = read_rounds(self._campaign.folder).get(at.arrays_of)
        if line is not None and (self._examiner is None or self._examiner.knows(line.score)):
            return
        if line is None:
            before = newest_checkpoint(self._campaign.folder / "checkpoints", before=at.arrays_of)
            counts = _counts(at if at.rolled_back_to is None else start_checkpoint(self._campaign))
            line = Round(
                round=at.arrays_of,
                after=None if at.arrays_of == 0 else before.arrays_of if before else 0,
                time=self._now(),
                seconds=None,
                asked=counts["accepted"] + sum(counts["rejected"].values()),
                **counts,
            )
        self._scored(line, at)

    def _scored(self, line: Round, checkpoint: Checkpoint) -> Round:
        """Score, judge and write a round."""
        if self._examiner is not None:
            score = self._examiner.score(checkpoint.arrays)
            before = [] if line.after is None else descent(read_rounds(self._campaign.folder), line.after)
            scores = [done.score for done in before if done.score and done.score.holdout == score.holdout]
            why = self._rule.objection([*scores, score])
            line = line.model_copy(update={"score": score, "go": why is None, "why": why})
        append_round(self._campaign.folder, line)
        return line

    def _go_on_after(self, line: Round) -> None:
        """Stop at a no-go; else note that devices may be asked in the next round."""
        done = self._last.round_number
        if line.go is False and self._stop:
            raise NoGoError(
                f"no-go after round {done}: {line.why}. Nobody is asked any more. Go back with sottovoce server "
                "rollback ROUND (sottovoce server status shows the scores), or go on all the same with --no-stop."
            )
        if done < self._campaign.policy.rounds:
            note_begun(self._campaign.folder, done + 1)
        self._since = time.monotonic()

    def _now(self) -> str:
        return self._clock().isoformat(timespec="seconds")


def _counts(checkpoint: Checkpoint) -> dict[str, Any]:
    latest = checkpoint.latest
    return {
        "accepted": latest.replies,
        "rejected": dict(latest.rejected),
        "bytes_up": latest.bytes_up,
        "bytes_down": latest.bytes_down,
    }
