"""The privacy card of a simulation, marked EXPERIMENT, or of a campaign that was published and not begun."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from shared.card.sources import POLICY, SUMMARY, Place, Sources, campaign_files, gather
from shared.errors import DataError, PrivacyError
from shared.privacy.policy import read_policy
from shared.protocol.audits import FILE
from shared.protocol.signing import policy_sha256 as hash_policy
from simulations.report.results import read_run


def folder_sources(
    folder: Path,
    *,
    experiment: bool,
    campaign: str | None = None,
    audits: Sequence[Path] = (),
    created: datetime | None = None,
) -> Sources:
    """What a card quotes of a run's folder, or of a campaign's.

    Args:
        folder: As ``sottovoce simulate``, or ``sottovoce policy new``, wrote it.
        experiment: Whether the card is to be marked EXPERIMENT; a simulation has no other.
        campaign: Of a run with several: the name of its folder; by default the one that the summary is about.
        audits: Files of ``sottovoce audit``; a run's own is taken too.
        created: The time; by default now.

    Raises:
        PrivacyError: It is a simulation and ``experiment`` is not said, or the promise does not hold.
        CampaignError, DataError: A file is missing or damaged.
    """
    if (folder / POLICY).is_file():
        if not experiment and _simulated(folder):
            raise PrivacyError(_refusal(folder))
        place: Place = "experiment" if experiment else "campaign"
        return gather(campaign_files(folder, experiment=experiment)[1], place=place, audits=audits, created=created)
    if not (folder / SUMMARY).is_file():
        raise DataError(f"{folder} must be the folder of a run, or of a campaign; it holds neither.")
    if not experiment:
        raise PrivacyError(_refusal(folder))
    policy = read_run(folder).summary.privacy.model_extra or {}
    files = campaign_files(_campaign(folder, campaign, policy.get("policy_sha256")), experiment=True)[1]
    own = [folder / FILE] if (folder / FILE).is_file() else []
    if not campaign or read_policy(files[POLICY].decode()).sha256 == policy.get("policy_sha256"):
        files[SUMMARY] = (folder / SUMMARY).read_bytes()  # scores and counts are of no other campaign of the run
    return gather(files, place="experiment", audits=[*own, *audits], created=created)


def _refusal(folder: Path) -> str:
    return (
        f"{folder} is a simulation: its noise is seeded, it protects nobody and is promised to nobody. For a card that "
        "is marked so on every page, say --experiment."
    )


def _simulated(folder: Path) -> bool:
    """Whether a campaign's folder lies in a run, or was played by a simulation."""
    return (folder / "resumed.json").exists() or (folder.resolve().parent.parent / "run.json").exists()


def _campaign(run: Path, name: str | None, policy_sha256: str | None) -> Path:
    found = sorted(path.parent for path in (run / "campaigns").glob(f"*/{POLICY}"))
    chosen = [path for path in found if (path.name == name if name else hash_policy(path) == policy_sha256)]
    if len(chosen) != 1 and not name and len(found) == 1:
        chosen = found
    if len(chosen) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"--campaign must name one of the run's campaigns ({names}), got {name or 'none'}.")
    return chosen[0]
