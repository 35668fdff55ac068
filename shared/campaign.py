"""A campaign: one folder with everything server and devices must agree on before the first round.

scenario.json       the resolved settings
policy.json         the constants the guarantee rests on
start.safetensors   the public start: whitening, LoRA A, zeros elsewhere; its hash is in the policy
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file, save_file

from shared.adapter import Arrays, Head
from shared.config import Scenario, load_scenario
from shared.errors import CampaignError
from shared.model import Base
from shared.policy import Policy, hash_arrays, hash_head, read_policy


@dataclass(frozen=True)
class Campaign:
    """What is published before the first round; nothing in it is secret or computed from users' data."""

    folder: Path
    scenario: Scenario
    policy: Policy
    start: Arrays

    def new_head(self, base: Base) -> Head:
        """A head of this campaign, at its public start once ``load_start`` is called.

        Raises:
            CampaignError: The base is not the one the policy names.
        """
        if base.sha256 != self.policy.base_sha256:
            raise CampaignError(
                f"the base must be {self.policy.base_sha256[:12]}…, got {base.sha256[:12]}…; "
                "use the base the campaign was made with."
            )
        return make_head(base, self.scenario)


def make_head(base: Base, scenario: Scenario) -> Head:
    """The head a scenario describes on a base, its public tensors still zero."""
    return Head(
        base,
        blocks=base.head_blocks(scenario.model.head_blocks),
        adapter=scenario.adapter,
        method=scenario.federation.method,
        centre=scenario.task.centre,
    )


def write_campaign(folder: Path, scenario: Scenario, policy: Policy, start: Arrays) -> Campaign:
    """Publish a campaign in a new folder."""
    folder.mkdir(parents=True)
    (folder / "scenario.json").write_text(scenario.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "policy.json").write_text(policy.model_dump_json(indent=2) + "\n", encoding="utf-8")
    save_file(start, folder / "start.safetensors")
    return Campaign(folder, scenario, policy, start)


def read_campaign(folder: Path) -> Campaign:
    """Read a campaign and check that its start is the one its policy names.

    Raises:
        CampaignError: A file is missing, unreadable or not the one the policy names.
    """
    try:
        policy = read_policy((folder / "policy.json").read_text(encoding="utf-8"))
        arrays = load_file(folder / "start.safetensors")
    except OSError as error:
        raise CampaignError(f"{folder} must hold a campaign: {error.strerror} ({error.filename}).") from None
    start = dict(sorted(arrays.items()))
    if hash_arrays(start) != policy.start_sha256:
        raise CampaignError(f"{folder}/start.safetensors must be the start the policy names; it was altered.")
    scenario = load_scenario(folder / "scenario.json")
    if hash_head(scenario) != policy.head_sha256:
        raise CampaignError(f"{folder}/scenario.json must describe the head the policy names; it was altered.")
    return Campaign(folder, scenario, policy, start)
