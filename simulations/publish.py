"""Make, check and explain the campaign folder that the server and the devices of a deployment share.

The operator of a deployment has no user's records: of the scenario's data set only the public catalogue is read, and
of its users only how many there are, unless that is given.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.training.site import resident_base, resident_dataset, use_threads
from shared.assets import resolve
from shared.config import Scenario
from shared.datasets import Dataset, UserData
from shared.errors import PrivacyError, ScenarioError
from shared.privacy.accounting import MAX_EPSILON, epsilon
from shared.privacy.claims import TRUST, claim_of
from shared.privacy.policy import Policy
from shared.privacy.promise import check_price
from shared.protocol.campaign import Campaign, check_promise, verify_campaign, write_campaign
from shared.protocol.signing import fingerprint, sign_policy, signed_by
from simulations.campaigns import bytes_per_client_round, plan_campaigns

_MOST_CLIENTS = 10_000_000


def publish(scenario: Scenario, *, out: Path, clients: int | None = None, quiet: bool = False) -> Campaign:
    """Make the folder that the server and all devices of one campaign share.

    Args:
        scenario: The settings; its linear companion and further seeds, which serve comparisons, are left out.
        out: A new folder.
        clients: Size of the public roster; by default the number of users of the scenario's data set.
        quiet: No progress.

    Raises:
        SottovoceError: The folder exists, the scenario promises nothing, or it does not fit base, roster or privacy
            target. Nothing is written.
    """
    if os.path.lexists(out):
        raise ScenarioError(f"--out must be a new folder, {out} exists; a campaign is never overwritten.")
    if clients is not None and not 1 <= clients <= _MOST_CLIENTS:
        raise ScenarioError(f"--clients must be from 1 to {_MOST_CLIENTS:,}, got {clients}: the size of the roster.")
    if scenario.privacy.trust == "none":
        raise PrivacyError(
            "privacy.trust must be 'local', 'distributed' or 'central' for a campaign on devices, got 'none'; that is "
            "for simulations."
        )
    if scenario.poison.enabled:
        raise ScenarioError(
            f"poison.kind must be 'none' for a campaign on devices, got {scenario.poison.kind!r}: devices that lie are "
            "for simulations."
        )
    use_threads(scenario.performance.threads)
    for reference in (scenario.data.source, scenario.model.base):
        resolve(reference, quiet=quiet)
    dataset = resident_dataset(scenario.data)
    base = resident_base(scenario.model.base, scenario.performance.device)
    roster = _roster(dataset, clients or len(dataset.users))
    [plan] = plan_campaigns(_alone(scenario), base, roster, quiet=quiet)
    return write_campaign(out, plan.scenario, plan.policy, plan.start)


def _alone(scenario: Scenario) -> Scenario:
    """The scenario's own campaign, without what stands beside it for comparison."""
    linear = scenario.linear.model_copy(update={"enabled": False})
    evaluation = scenario.evaluation.model_copy(update={"seeds": 1})
    return scenario.model_copy(update={"linear": linear, "evaluation": evaluation})


def _roster(dataset: Dataset, clients: int) -> Dataset:
    """The public catalogue, and as many users as the roster has, without a record."""
    return replace(dataset, users=(UserData("", (), (), ()),) * clients)


def sign_campaign(folder: Path, key: Ed25519PrivateKey) -> Campaign:
    """Sign a campaign whose promise holds; an earlier signature is replaced.

    Raises:
        CampaignError, PrivacyError: As ``check_promise``; nothing is written.
    """
    check_promise(folder)
    sign_policy(folder, key)
    return verify_campaign(folder, trusted=key.public_key())


def describe(campaign: Campaign) -> dict[str, Any]:
    """Everything a campaign promises, costs and sends; its price is certified anew, whatever its policy states.

    Raises:
        PrivacyError: An impossible constant stands in the policy, or it has no finite price.
        CampaignError: The policy names a tensor that is not in the start.
    """
    policy = campaign.policy
    down, up = bytes_per_client_round(policy, campaign.start)
    return {
        "campaign": policy.campaign,
        "policy_sha256": policy.sha256,
        "signature": _describe_signature(campaign.folder),
        "price": _describe_price(policy),
        "per_device_and_round": {
            "parameters": policy.size,
            "bytes_down": down,
            "bytes_up": up,
        },
        "constants": policy.model_dump(mode="json"),
    }


def _describe_signature(folder: Path) -> dict[str, str | None]:
    try:
        key = signed_by(folder)
    except PrivacyError as error:
        return {"state": "invalid", "key": None, "problem": str(error)}
    if key is None:
        return {"state": "none", "key": None, "problem": None}
    return {"state": "valid", "key": fingerprint(key), "problem": None}


def _describe_price(policy: Policy) -> dict[str, Any] | None:
    """None where nothing is promised."""
    if policy.trust == "none" or policy.delta is None:
        return None
    mechanism, delta = policy.mechanism, policy.delta
    if not math.isfinite(epsilon(mechanism, delta=delta)):
        raise PrivacyError(
            f"a policy's constants must have a price, noise_multiplier {policy.noise_multiplier:g} in "
            f"{mechanism.releases} noisy steps has none below {MAX_EPSILON:g}; do not take part."
        )
    claim = claim_of(policy, noise="secure")
    after = {k: epsilon(replace(mechanism, max_participations=k), delta=delta) for k in _milestones(policy)}
    return {
        "unit": claim.unit,
        "relation": claim.relation,
        "trust": claim.trust,
        "trust_terms": claim.terms,
        "epsilon": claim.epsilon,
        "stated_epsilon": policy.epsilon,
        "kept": _keeps(policy),
        "delta": delta,
        "accountant": claim.accountant,
        "sampling": claim.sampling,
        "epsilon_after_rounds": {str(k): value for k, value in after.items()},
    }


def _keeps(policy: Policy) -> bool:
    try:
        check_price(policy)
    except PrivacyError:
        return False
    return True


def _milestones(policy: Policy) -> list[int]:
    """1, 2, 3, ... 10, 20, 50, 100, ... and the last round a device may join."""
    steps = [*range(1, 10), *(k * 10**power for power in range(1, 6) for k in (1, 2, 5))]
    last = policy.max_participations
    return [*(k for k in steps if k < last), last]


# What each constant means to a reader who has not seen the equations.
WORDS = {
    "protocol": "version of the messages",
    "campaign": "its name",
    "trust": "who is trusted; local = nobody, distributed = a server that keeps to the protocol, central = the server",
    "unit": "what the guarantee hides: one record, or all that a user contributes",
    "relation": "what two data sets differ in that nobody can tell apart",
    "epsilon": "stated limit on what the whole campaign reveals about one unit; smaller is more private",
    "delta": "chance left for that limit to fail",
    "clip_norm": "longest step that one record can cause; at unit user, longest change that one device can cause",
    "noise_multiplier": "noise on every step, or at unit user on every round's sum, as a multiple of clip_norm",
    "grid": "what is contributed is rounded to multiples of it, and so is the noise",
    "sampling_rate": "chance that a record enters a step; 1 = all do",
    "steps": "steps a device takes in a round; at unit record, each is noised",
    "denominator": "what a step is divided by at unit record; never a count of records",
    "record_exponent": "at unit user a sum over n records is divided by n to this power",
    "secure_sum": "under trust distributed: neighbours of a device, how many of them open its keys, contributions a "
    "sum must have, devices whose noise may be known, and log2 of one device's noise in steps of the grid; all of one "
    "sum, where groups of the cohort have one each",
    "max_participations": "rounds one device may join",
    "added_records": "from when on a device uses a record that it gets during the campaign",
    "max_update_norm": "longest change a device may send, before masks",
    "learning_rate": "of the steps on a device",
    "rounds": "rounds of the campaign",
    "cohort_size": "devices asked in a round",
    "reply_fields": "all that a device's answer may hold",
    "federation_method": "how the shared part is trained and averaged",
    "personal_method": "what a device adds for itself; it never leaves",
    "technique": "how the head is adapted",
    "head_blocks": "blocks of the base model in the head",
    "settings_sha256": "hash of the settings that server and devices share",
    "base_sha256": "hash of the base model",
    "start_sha256": "hash of the public start",
    "public_texts_sha256": "hash of the texts taken to be public",
    "slots": "tensors that may travel, with their shapes",
    "turns": "parts of them that a round changes, round by round and over again; none: all of them",
    "private": "tensors a device trains in the same steps and keeps, with their shapes",
    "choice_epsilon": "what a device's choice of its persona by its records costs, once, out of epsilon",
    "extensions": "choices from packages that are not ours",
}


_SENT = {
    "local": "the noised change",
    "central": "the clipped change, WITHOUT noise,",
    "distributed": "the masked change, with a share of the noise,",
    "none": "the change, WITHOUT noise,",
}
_SUM_MESSAGES = "and before and after it one-time keys, and sealed shares of them for other devices"


def lines(found: dict[str, Any]) -> list[str]:
    """What a campaign costs and sends, for a reader. What its maker wrote is quoted: it may hold anything."""
    constants, sent = found["constants"], found["per_device_and_round"]
    at_most = constants["max_participations"]
    return [
        f"campaign {json.dumps(found['campaign'])}: {constants['rounds']} rounds, {constants['cohort_size']} devices "
        f"asked in each; one device joins at most {at_most}",
        f"policy {found['policy_sha256']}",
        f"signature: {_signature_words(found['signature'])}",
        "what it costs:",
        *(f"  {line}" for line in _price_lines(found["price"])),
        "what a device sends:",
        f"  in each round it joins {sent['bytes_up']:,} bytes: {_SENT[constants['trust']]} of {sent['parameters']:,} "
        f"shared numbers (tensors: {len(constants['slots'])}), the round and the policy's hash",
        *([f"  {_SUM_MESSAGES}"] if constants["secure_sum"] else []),
        f"  at most {at_most * sent['bytes_up']:,} bytes of that in all; no text, no target, no count, no loss; "
        "a refusal is one fixed code",
        f"  it receives {sent['bytes_down']:,} bytes in each",
    ]


def constant_lines(found: dict[str, Any]) -> list[str]:
    """Every constant of the policy, and epsilon round by round."""
    named = {name: json.dumps(value) for name, value in found["constants"].items() if name != "campaign"}
    width = max(len(name) for name in named)
    out = ["constants:"]
    out += [f"  {name:{width}}  {value}  ({WORDS.get(name, 'no words for it here')})" for name, value in named.items()]
    if found["price"]:
        rows = [f"{k} {_up(value)}" for k, value in found["price"]["epsilon_after_rounds"].items()]
        out += ["rounds a device has joined, and the epsilon it has spent by then:", f"  {' · '.join(rows)}"]
    return out


def _signature_words(signature: dict[str, str | None]) -> str:
    if signature["state"] == "none":
        return "none yet; sottovoce policy sign DIR --key FILE makes one"
    if signature["state"] == "invalid":
        return f"INVALID: {signature['problem']}"
    return f"by key {signature['key']}; whether that is the operator's: sottovoce policy verify DIR --key PUB"


_SEEN = {
    "local": "all that one device ever sends in this campaign",
    "distributed": "all that a server that keeps to the protocol, and everybody else, ever sees of one device",
    "central": "all that everybody but the server ever sees of one device",
}
_HIDDEN = {
    "record": "whether any one record was there",
    "user": "whether a device contributed, and so all it contributed",
}
_NOT_HIDDEN = {
    "local": "what many records of a user have in common, and that the device takes part",
    "distributed": "that the device takes part, and in which rounds",
    "central": "anything from the server, which sees every device's change without noise; from others, that the device "
    "takes part",
}


def _price_lines(price: dict[str, Any] | None) -> list[str]:
    if price is None:
        return ["NOT PRIVATE: nothing is promised"]
    promise = f"(epsilon = {_up(price['epsilon'])}, delta = {price['delta']:g})"
    return [
        f"{price['unit']}-level {promise}-differential privacy for {_SEEN[price['trust']]}",
        f"stated: epsilon = {price['stated_epsilon']}; "
        + ("kept" if price["kept"] else "NOT KEPT by these constants: do not take part"),
        f"hidden: {_HIDDEN[price['unit']]} ({price['relation']})",
        f"trusted: {TRUST[price['trust']]}" + (f" ({price['trust_terms']})" if price["trust_terms"] else ""),
        f"not hidden: {_NOT_HIDDEN[price['trust']]}",
        f"sampling: {price['sampling']}; accountant: {price['accountant']}",
    ]


def _up(value: float) -> str:
    """Three digits after the point, never below the value."""
    return f"{math.ceil(value * 1000) / 1000:g}"


def checked_lines(campaign: Campaign) -> list[str]:
    """What ``verify_campaign`` has found to hold."""
    policy = campaign.policy
    price = _describe_price(policy)
    return [
        f"policy {policy.sha256} of campaign {json.dumps(policy.campaign)}",
        "settings and public start are the ones it names",
        *(_price_lines(price)[:2]),
        f"methods may be combined (rule P1): {policy.federation_method}, {policy.personal_method}, {policy.technique}",
        f"to be compared where it is loaded: base model {policy.base_sha256}",
    ]
