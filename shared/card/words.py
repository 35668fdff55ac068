"""What a privacy card says in words: labels, the claim in one sentence, and what it does not cover."""

LABELS = {
    "name": "Campaign",
    "task": "Purpose: what is learned",
    "scenario": "Settings named",
    "operator": "Operator: fingerprint of the key that signed",
    "policy_sha256": "Policy, SHA-256",
    "rounds": "Rounds of the campaign",
    "cohort_size": "Devices asked in a round",
    "unit": "Unit: what is hidden",
    "relation": "Neighbours: what is compared",
    "epsilon": "Epsilon, stated",
    "epsilon_certified": "Epsilon, as computed here",
    "odds": "e to the epsilon: odds change by at most this factor",
    "delta": "Delta: chance left for that to fail",
    "epsilon_of_two": "Epsilon of two changes",
    "delta_of_two": "Delta of two changes",
    "trust": "Trust",
    "trusted": "Who is trusted",
    "trust_terms": "Terms of that trust",
    "sampling": "Sampler",
    "accountant": "Accountant",
    "noise": "Where the noise comes from",
    "sentence": "The whole claim",
    "clip_norm": "Clip bound C",
    "noise_multiplier": "Noise multiplier (sigma over C)",
    "noise_stddev": "Standard deviation of the noise",
    "sampling_rate": "Sampling rate q",
    "steps": "Steps T in a round",
    "denominator": "Denominator B",
    "max_participations": "Rounds one device may join",
    "numbers": "Numbers in one change",
    "grid": "Grid of contributions and noise",
    "max_update_norm": "Longest change sent",
    "added_records": "Records added during the campaign",
    "reply_fields": "All that a reply may hold",
    "federation_method": "Shared part: method",
    "personal_method": "Private part: method",
    "technique": "Technique",
    "extensions": "Packages that are not ours",
    "neighbours": "Secure sum: neighbours of a device",
    "threshold": "Secure sum: neighbours who open a secret",
    "min_survivors": "Secure sum: contributions at least",
    "groups": "Secure sums of a round, each of as many devices and with the whole noise",
    "colluders": "Secure sum: colluding devices at most",
    "honest": "Secure sum: shares of noise that nobody knows",
    "consented": "Agreed on",
    "until": "Agreed until",
    "state": "State of the consent",
    "rounds_used": "Rounds spent",
    "rounds_left": "Rounds left",
    "rounds_released": "Rounds answered",
    "rounds_burnt": "Rounds spent, nothing sent",
    "rounds_pending": "Rounds at work",
    "rounds_lost": "Rounds counted again after a roll-back",
    "epsilon_spent": "Epsilon spent so far, at most",
    "epsilon_at_most": "Epsilon at the end, at most",
    "bytes_sent": "Bytes sent in answers",
    "reserved_epsilon": "All campaigns of this owner: epsilon reserved",
    "cap_epsilon": "All campaigns of this owner: cap of epsilon",
    "left_epsilon": "All campaigns of this owner: epsilon left",
    "reserved_delta": "All campaigns of this owner: delta reserved",
    "cap_delta": "All campaigns of this owner: cap of delta",
    "rounds_done": "Rounds done",
    "replies": "Replies used",
    "rejected": "Replies not used",
    "void": "Void rounds: nothing was opened",
    "enrolled": "Devices enrolled at this server, for all its campaigns",
    "revoked": "Devices revoked at this server, for all its campaigns",
    "asked_devices": "Devices asked at least once",
    "most_rounds": "Rounds of the device that was asked most",
    "epsilon_most": "Epsilon released by that device, at most",
    "median_rounds": "Rounds of the device in the middle",
    "epsilon_median": "Epsilon released by that one, at most",
    "bytes_up": "Bytes received",
    "bytes_down": "Bytes sent to devices",
    "simulated_devices": "Simulated devices",
    "keystore": "Where the keys are",
    "weak": "Keys lie beside the data",
    "rollback_detectable": "A restored older copy is noticed",
    "metric": "Metric",
    "personal": "Shared and private part",
    "federated": "Shared part alone",
    "local": "Private part alone, no federation",
    "worst_decile": "Worst tenth of users, shared and private part",
    "holdout_metric": "Metric on the operator's hold-out",
    "holdout_start": "Hold-out, before the first round",
    "holdout_last": "Hold-out, now",
}

# The claim in one plain sentence, by trust; {name} stands for a cell of the card.
_PRICE = (
    "by a factor of at most {odds} (epsilon {epsilon}), except for a chance of {delta}. The smaller the "
    "factor, the stronger the promise; one in the thousands promises little by itself."
)
CLAIM = {
    "local": "For whoever sees everything that a device ever sends in this campaign, the server included, the odds of "
    "a guess whether one record was on it change " + _PRICE,
    "distributed": "For whoever sees what this campaign gives out, a server that follows the protocol included, the "
    "odds of a guess whether one user contributed, or zeros, change " + _PRICE,
    "central": "For whoever sees what this campaign gives out, anybody but the server, the odds of a guess whether one "
    "user contributed, or zeros, change " + _PRICE,
    "none": "NOT PRIVATE: nothing limits what a device's messages reveal about the records behind them.",
}

Gap = dict[str, str]

SEEDED: Gap = {
    "what": "everything: the noise is seeded",
    "why": "Whoever has the folder of this simulation can compute its noise and take it away. The epsilon is what a "
    "deployment with these settings would spend.",
}
NOTHING: Gap = {"what": "everything", "why": "No noise is added and nothing is promised."}
_OF_TRUST: dict[str, tuple[Gap, ...]] = {
    "central": (
        {
            "what": "the server",
            "why": "It sees every device's change without noise and only promises to add it to the sum. Epsilon says "
            "nothing of what the server learns.",
        },
    ),
    "distributed": (
        {
            "what": "a server that breaks the protocol",
            "why": "One that lies to devices, enrols devices of its own invention, or has more colluders than the "
            "terms allow, may see more than the sum. Nothing on a device can check that.",
        },
    ),
    "local": (),
    "none": (),
}
_OF_UNIT: dict[str, Gap] = {
    "record": {
        "what": "what many records have in common, and taking part",
        "why": "One record is hidden. A trait that many records of an owner share is not; nor is that the device takes "
        "part, when, in which rounds, with which refusal, and how long it takes.",
    },
    "user": {
        "what": "taking part, and its side channels",
        "why": "Who is on the roster, which rounds a device joins, when it drops out and how long it takes is seen. A "
        "device that leaves because of what is in its records tells that.",
    },
}
_HEAD: Gap = {
    "what": "the private head",
    "why": "It is fitted without noise, never leaves the device and holds personal data: whoever reads it, or sees "
    "enough of its answers, reads its owner.",
}
_ALWAYS: tuple[Gap, ...] = (
    {
        "what": "a ledger that was lost, a home made anew, several devices of one owner",
        "why": "The price is counted per ledger. A new home with the same records begins at nothing, and a record on "
        "two devices pays on both: their owner must add them up.",
    },
    {
        "what": "what others learn from the model's outputs about people in general",
        "why": "The shared model is made to show what is common to many. That may tell about an owner who is like the "
        "others, also one who took no part.",
    },
    {
        "what": "choices made on users' records",
        "why": "Settings that were tried out on the campaign's own users, such as the clip bound or the learning rate, "
        "are releases that this epsilon does not hold.",
    },
    {
        "what": "floating point before the clip",
        "why": "The proof begins at a record's gradient, or at user level at a device's change: it is clipped, rounded "
        "to a grid and summed in integers, exactly. That a gradient does not depend on other records rests on the "
        "device taking them one by one, and on the machine computing the same bits from the same numbers.",
    },
    {
        "what": "what is public by assumption",
        "why": "The texts of the catalogue, the scale, the roster and every setting are taken to be public; nothing "
        "protects them.",
    },
    {
        "what": "other campaigns on the same records",
        "why": "Each has its own epsilon. They add up, under the owner's caps, on one device only.",
    },
    {
        "what": "other code, the operating system, whoever is logged in as the owner",
        "why": "The claim is about this package's code as installed. Other programs, memory, backups and a copied "
        "running machine are outside.",
    },
)


def gaps(*, unit: str, trust: str, experiment: bool) -> list[Gap]:
    """What a claim does not cover, the most important first."""
    if trust == "none":
        return [NOTHING, _HEAD, *_ALWAYS]
    own = [*([SEEDED] if experiment else []), *_OF_TRUST[trust], _OF_UNIT[unit], _HEAD]
    return [*own, *_ALWAYS]


LAW = (
    "EDPB Opinion 28/2024 (17 December 2024) calls a model that was trained on personal data anonymous only if the "
    "likelihood of extracting them, directly or by query, is insignificant, and names tests and documentation as "
    "evidence. This card is documentation of that kind. It is no legal advice."
)
