"""What may be combined: rule P1 over methods, technique, unit and trust; and the packages a policy names for them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.config import AGGREGATION_NEEDS, PERSONAL_NAMES, Scenario
from shared.datasets import READERS
from shared.errors import CampaignError, PrivacyError, ScenarioError
from shared.heads.lora import FEDERATION_METHODS, TECHNIQUES
from shared.registry import KINDS, check_name, extension, lookup

if TYPE_CHECKING:
    from shared.privacy.policy import Policy

_FAMILY = KINDS["families"]
PROMISES = (("record", "local"), ("user", "distributed"), ("user", "central"))  # unit and trust that have a mechanism

# Rule P1. At user level a device's whole change is clipped, whatever it read, and nothing else leaves: any method may
# be combined. At record level the shared step reads base, public start, shared tensors, policy, raw records and those
# private tensors that are trained in that very step, clipped and noised with the shared ones (``PRIVATE_PARTS``); never
# a tensor trained without noise on the same records. A federation method is data (``FederationMethod``) and cannot read
# more, a technique adds trainable factors of the shared tensors and nothing else (``inject``); a personal method says
# of itself whether what it fits after the federation is read. Ours never is, and a server has no client code to ask.


@dataclass(frozen=True)
class Choices:
    """What must fit together for a guarantee to hold (rule P1)."""

    federation_method: str
    personal_method: str
    technique: str
    unit: str
    trust: str


def choices(source: "Scenario | Policy") -> Choices:
    """What a scenario, or a policy, combines."""
    if isinstance(source, Scenario):
        privacy = source.privacy
        return Choices(
            source.federation.method, source.personal.method, source.adapter.technique, privacy.unit, privacy.trust
        )
    return Choices(source.federation_method, source.personal_method, source.technique, source.unit, source.trust)


def check_compatible(chosen: Choices) -> None:
    """The one check of rule P1: no shared, accounted step may read what was trained without noise on the same records.

    Raises:
        ScenarioError: A method or technique is known to nobody.
        PrivacyError: A private part would reach back into the shared step, or the unit is one without a mechanism; the
            message names what is allowed.
    """
    check_name("federation_methods", chosen.federation_method, FEDERATION_METHODS)
    check_name("techniques", chosen.technique, TECHNIQUES)
    reads = read_by_shared_step(chosen.personal_method)
    if chosen.trust == "none":
        return
    if (chosen.unit, chosen.trust) not in PROMISES:
        allowed = ", ".join(f"unit {unit!r} under trust {trust!r}" for unit, trust in PROMISES)
        raise PrivacyError(
            f"a guarantee for unit {chosen.unit!r} under trust {chosen.trust!r} has no mechanism; allowed: {allowed}."
        )
    if chosen.unit == "record" and reads is not False:
        raise PrivacyError(
            f"personal.method = {chosen.personal_method!r} with federation.method = {chosen.federation_method!r} and "
            f"adapter.technique = {chosen.technique!r} is not private at unit {chosen.unit!r}; allowed personal "
            f"methods here: {list(PERSONAL_NAMES)}, or one that declares read_by_shared_step = False."
        )


def check_aggregation(scenario: Scenario, *, cohort_size: int) -> None:
    """A rule that withstands liars must see what each device sent, or the means of groups; and enough of them.

    Args:
        scenario: The settings.
        cohort_size: Devices asked in a round.

    Raises:
        PrivacyError: The trust lets the server see one sum alone, and the noise is that sum's.
        ScenarioError: There are groups and no use for them, they are of unequal size, or the rule needs more vectors.
    """
    federation, trust = scenario.federation, scenario.privacy.trust
    rule, groups = federation.aggregation, federation.groups
    if groups > 1 and (trust != "distributed" or rule == "mean"):
        raise ScenarioError(
            "federation.groups must be 1 unless privacy.trust = 'distributed' and federation.aggregation is not "
            f"'mean', got {groups} groups with trust {trust!r} and aggregation {rule!r}."
        )
    if rule == "mean":
        return
    if trust == "central" or (trust == "distributed" and groups == 1):
        raise PrivacyError(
            f"federation.aggregation = {rule!r} needs replies that may be seen one by one, under privacy.trust = "
            f"{trust!r} only a noised sum may; allowed here: 'mean'"
            + (", or any with federation.groups > 1." if trust == "distributed" else "; all under 'local' and 'none'.")
        )
    if cohort_size % groups:
        raise ScenarioError(
            f"federation.cohort_size must be a multiple of federation.groups, got {cohort_size} and {groups}."
        )
    liars = liars_among(scenario, cohort_size=cohort_size)
    vectors = groups if groups > 1 else cohort_size
    factor, more = AGGREGATION_NEEDS.get(rule, (0, 1))
    if vectors < factor * liars + more:
        raise ScenarioError(
            f"federation.aggregation = {rule!r} needs {factor * liars + more} {'groups' if groups > 1 else 'devices'} "
            f"a round to withstand {liars} liars (federation.malicious_share = {federation.malicious_share:g} of "
            f"{cohort_size} devices), got {vectors}; lower the share, or use more."
        )


def liars_among(scenario: Scenario, *, cohort_size: int) -> int:
    """How many of a round's devices, and so of its groups, a rule is to withstand."""
    return math.ceil(scenario.federation.malicious_share * cohort_size - 1e-9)


def check_prompt(scenario: Scenario, chosen: Choices) -> None:
    """Rule P7 for what stands before prompts: in training it puts one record, or what is stated, into many examples.

    Args:
        scenario: Of the campaign.
        chosen: Unit and trust that count: a device's are those of the policy.

    Raises:
        ScenarioError: The task has no prompts, or an attack would compare unlike ones.
        PrivacyError: Records are to be protected, and the shared step would read such prompts.
    """
    prompt = scenario.prompt
    if not prompt.used:
        return
    if scenario.task.name != "generation":
        raise ScenarioError(f"[prompt] is for task.name = 'generation', got {scenario.task.name!r}; drop it.")
    if prompt.training and chosen.trust != "none" and chosen.unit != "user":
        raise PrivacyError(
            f"prompt.training must be false at privacy.unit = {chosen.unit!r}, got true: one record would stand in "
            "many examples, and no noise for one covers it. Set privacy.unit = 'user', or false: profiles are then for "
            "prediction alone."
        )
    if prompt.training and scenario.attack.held_out:
        raise ScenarioError(
            "attack.membership must be false where prompt.training is true: held-out records stand before no prompt, "
            "and would be told by that alone."
        )


def read_by_shared_step(personal_method: str) -> object:
    """What a personal method declares; only ``False`` means that shared training never reads what it fits."""
    if check_name("personal_methods", personal_method, PERSONAL_NAMES) is None:
        return False
    return getattr(lookup("personal_methods", personal_method, {}, object), "read_by_shared_step", None)


def priced_choice(scenario: Scenario) -> bool:
    """Whether a device's persona is chosen by its records where single records are protected: that has a price.

    At user level the choice is hidden with the rest of a contribution: those of other personas are zeros in one vector
    that is clipped and noised as a whole. What a user declares is no function of records.
    """
    privacy, persona = scenario.privacy, scenario.persona
    return persona.count > 0 and persona.choice == "loss" and (privacy.unit, privacy.trust) == ("record", "local")


def extensions(scenario: Scenario) -> tuple[str, ...]:
    """Every choice of a scenario that is not built in, with its package: ``personal method 'x' of PACKAGE VERSION``."""
    chosen = (
        ("federation_methods", scenario.federation.method, FEDERATION_METHODS),
        ("personal_methods", scenario.personal.method, PERSONAL_NAMES),
        ("techniques", scenario.adapter.technique, TECHNIQUES),
        ("readers", scenario.data.format, READERS),
        ("aggregators", scenario.federation.aggregation, AGGREGATION_NEEDS),
    )
    found = [extension(kind, name, own) for kind, name, own in chosen]
    return tuple(each for each in found if each)


def check_extensions(policy: "Policy", scenario: Scenario) -> None:
    """Raise ``CampaignError`` unless this machine has exactly the packages a policy names for its scenario."""
    _compare_packages([each for each in policy.extensions if not each.startswith(_FAMILY)], extensions(scenario))


def check_family(policy: "Policy", base_extension: str | None) -> None:
    """The same for the package of the base's model family, which is known once the base is loaded."""
    named = [each for each in policy.extensions if each.startswith(_FAMILY)]
    _compare_packages(named, (base_extension,) if base_extension else ())


def _compare_packages(named: Sequence[str], found: Sequence[str]) -> None:
    if list(named) != list(found):
        wanted = json.dumps(", ".join(named))[1:-1]  # its maker's words may hold control characters
        raise CampaignError(
            f"the policy names {wanted or 'no extension'}; here is "
            f"{', '.join(found) or 'none'}. Install what the policy names."
        )
