"""The parts of a privacy card that hold numbers: campaign, claim, constants, what was spent and sent, keys, scores."""

from collections.abc import Iterator

from shared.card.cells import Cell, computed, price, quoted
from shared.card.sources import LEDGER, MADE, POLICY, SERVER, SUMMARY, Sources
from shared.privacy.policy import Policy
from shared.protocol.signing import SIGNATURE_FILE

Section = dict[str, Cell]
_CONSTANTS = (
    *("clip_norm", "noise_multiplier", "sampling_rate", "steps", "denominator", "max_participations"),
    *("max_update_norm", "added_records", "reply_fields", "federation_method", "personal_method", "technique"),
    "extensions",
)
_TERMS = ("neighbours", "threshold", "min_survivors", "colluders")


def campaign_of(sources: Sources) -> Section:
    """Which campaign it is, and whose."""
    found = {
        "name": quoted(sources, f"{POLICY}#/campaign"),
        "task": quoted(sources, "scenario.json#/task/name"),
        "scenario": quoted(sources, "scenario.json#/name"),
        "rounds": quoted(sources, f"{POLICY}#/rounds"),
        "cohort_size": quoted(sources, f"{POLICY}#/cohort_size"),
        "policy_sha256": computed(sources, "policy.sha256", f"{POLICY}#"),
    }
    if SIGNATURE_FILE in sources:
        found["operator"] = computed(sources, "signing.fingerprint", f"{SIGNATURE_FILE}#/key")
    return found


def promise_of(sources: Sources, policy: Policy) -> Section:
    """What is claimed, in every field a claim must state."""
    claimed = (f"{POLICY}#", f"{MADE}#/place")
    found = {
        "sentence": computed(sources, "claims.sentence", *claimed),
        "trust": quoted(sources, f"{POLICY}#/trust"),
        "trusted": computed(sources, "claims.trusted", f"{POLICY}#/trust"),
    }
    if policy.trust == "none":
        return found
    both = (f"{POLICY}#/epsilon", f"{POLICY}#/delta")
    found |= {
        "unit": quoted(sources, f"{POLICY}#/unit"),
        "relation": computed(sources, "claims.relation", *claimed),
        "epsilon": quoted(sources, both[0]),
        "epsilon_certified": price(sources, f"{POLICY}#/max_participations"),
        "odds": computed(sources, "exp", both[0]),
        "delta": quoted(sources, both[1]),
        "epsilon_of_two": computed(sources, "group.epsilon", both[0]),
        "delta_of_two": computed(sources, "group.delta", *both),
        "sampling": computed(sources, "claims.sampling", *claimed),
        "accountant": computed(sources, "claims.accountant", *claimed),
        "noise": computed(sources, "claims.noise", f"{MADE}#/place"),
    }
    if policy.secure_sum:
        found["trust_terms"] = computed(sources, "claims.terms", *claimed)
    return found


def constants_of(sources: Sources, policy: Policy) -> Section:
    """The constants the claim rests on."""
    found = {name: quoted(sources, f"{POLICY}#/{name}") for name in _CONSTANTS}
    found["numbers"] = computed(sources, "policy.size", f"{POLICY}#/slots")
    if policy.trust == "none":
        return found
    found["noise_stddev"] = computed(sources, "product", f"{POLICY}#/noise_multiplier", f"{POLICY}#/clip_norm")
    found["grid"] = quoted(sources, f"{POLICY}#/grid")
    if policy.secure_sum:
        terms = f"{POLICY}#/secure_sum"
        found |= {name: quoted(sources, f"{terms}/{name}") for name in _TERMS}
        found["honest"] = computed(sources, "difference", f"{terms}/min_survivors", f"{terms}/colluders")
        if policy.secure_sum.groups > 1:
            found["groups"] = quoted(sources, f"{terms}/groups")
    return found


_FROM_LEDGER = {
    "consented": "consent/at",
    "until": "consent/until",
    "state": "state",
    "rounds_used": "rounds/spent",
    "rounds_released": "rounds/released",
    "rounds_burnt": "rounds/burnt",
    "rounds_pending": "rounds/pending",
    "rounds_lost": "rounds/lost",
}
_OF_OWNER = {
    **{f"{word}_epsilon": f"all_campaigns/epsilon/{word}" for word in ("reserved", "cap", "left")},
    **{f"{word}_delta": f"all_campaigns/delta/{word}" for word in ("reserved", "cap")},
}
_FROM_SERVER = (
    *("rounds_done", "replies", "void", "enrolled", "revoked", "asked_devices", "most_rounds", "median_rounds"),
    *("bytes_up", "bytes_down"),
)


def spent_of(sources: Sources, place: str, *, private: bool) -> Section:
    """What was spent as far as it is known at this place, and what is left."""
    limit = f"{POLICY}#/max_participations"
    most = {"epsilon_at_most": price(sources, limit)} if private else {}
    if place == "device":
        used = f"{LEDGER}#/rounds/spent"
        at_work = sources.at(f"{LEDGER}#/state") in ("in force", "paused", "exhausted")
        return {
            **{name: quoted(sources, f"{LEDGER}#/{path}") for name, path in _FROM_LEDGER.items()},
            **({"rounds_left": computed(sources, "difference", limit, used)} if at_work else {}),
            "epsilon_spent": price(sources, used),
            **most,
            "bytes_sent": computed(sources, "total.size_bytes", f"{LEDGER}#/releases"),
            **{name: quoted(sources, f"{LEDGER}#/{path}") for name, path in _OF_OWNER.items()},
        }
    if place == "server":
        return {
            **{name: quoted(sources, f"{SERVER}#/{name}") for name in _FROM_SERVER},
            "rejected": computed(sources, "total", f"{SERVER}#/rejected"),
            "epsilon_most": price(sources, f"{SERVER}#/most_rounds"),
            "epsilon_median": price(sources, f"{SERVER}#/median_rounds"),
            **most,
        }
    if place == "experiment" and SUMMARY in sources:
        paths = {"rounds_done": "rounds", "replies": "replies", "simulated_devices": "clients"}
        return {name: quoted(sources, f"{SUMMARY}#/federation/{path}") for name, path in paths.items()} | most
    return most


def releases_of(sources: Sources) -> list[Section]:
    """What left a device."""
    fields = ("round", "at", "size_bytes", "sha256")
    return [
        {field: quoted(sources, f"{LEDGER}#/releases/{i}/{field}") for field in fields}
        for i in _range(sources, f"{LEDGER}#/releases")
    ]


def keys_of(sources: Sources) -> Section:
    """Where a device's keys are."""
    if LEDGER not in sources:
        return {}
    paths = {"keystore": "where", "weak": "weak", "rollback_detectable": "rollback_detectable"}
    return {name: quoted(sources, f"{LEDGER}#/keys/{path}") for name, path in paths.items()}


def utility_of(sources: Sources) -> Section:
    """Scores, where somebody may know them: in a simulation, and on an operator's hold-out."""
    if SUMMARY in sources:
        metric, rows = sources.at(f"{SUMMARY}#/metric"), sources.at(f"{SUMMARY}#/rows")
        wanted = {row: (row, metric) for row in ("personal", "federated", "local")}
        wanted["worst_decile"] = ("personal", "worst_decile")
        found = {
            name: quoted(sources, f"{SUMMARY}#/rows/{row}/{score}/value")
            for name, (row, score) in wanted.items()
            if score in rows.get(row, {})
        }
        return {"metric": quoted(sources, f"{SUMMARY}#/metric")} | found
    if SERVER in sources and sources.at(f"{SERVER}#/holdout"):
        return {f"holdout_{name}": quoted(sources, f"{SERVER}#/holdout/{name}") for name in ("metric", "start", "last")}
    return {}


def stamps_of(sources: Sources) -> list[Cell]:
    """What a run is stamped with."""
    return [quoted(sources, f"{SUMMARY}#/stamps/{i}") for i in _range(sources, f"{SUMMARY}#/stamps")]


def _range(sources: Sources, pointer: str) -> Iterator[int]:
    """Positions in a list of a source; none where the source is not there."""
    return iter(range(len(sources.at(pointer)) if pointer.partition("#")[0] in sources else 0))
