"""The questions that a claim of differential privacy must answer, and a campaign's answers, for its privacy card."""

from collections.abc import Collection, Mapping

NIST = (
    "NIST Special Publication 800-226, Guidelines for Evaluating Differential Privacy Guarantees (March 2025, "
    "doi.org/10.6028/NIST.SP.800-226), has a claim examined from its epsilon down to how data are collected. The "
    "questions below follow its topics in our own words and order; they quote no section of it."
)

# Topic -> question, and answers with the cases in which each is said; "" is always. {name} stands for a cell.
QUESTIONS: Mapping[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "unit": (
        "What is protected: what is one unit of privacy?",
        (
            ("", "One {unit}. "),
            (
                "record",
                "A record is one training row. Over many records of one owner the guarantee fades, record by record; "
                "user level is not claimed.",
            ),
            ("user", "A user is one device of the roster; a person with two devices is two."),
        ),
    ),
    "neighbours": (
        "Which two data sets are compared?",
        (
            ("", "Compared: {relation}. "),
            ("record", "An edited record is two changes: "),
            ("user", "Two different contributions of one user are two changes: "),
            ("", "epsilon {epsilon_of_two}, delta {delta_of_two}."),
        ),
    ),
    "epsilon": (
        "How large is epsilon, and what does it mean here?",
        (
            (
                "",
                "{epsilon} stated, {epsilon_certified} computed here, for all {max_participations} rounds that one "
                "device may join. Seeing all of it changes the odds of a guess by a factor of at most {odds}. That is "
                "a bound, not a measurement.",
            ),
        ),
    ),
    "delta": (
        "How large is delta, and what does it mean here?",
        (("", "{delta}: beyond that factor, chances may differ by at most this. It is fixed and depends on no data."),),
    ),
    "trust": (
        "Whom must one trust: nobody (local), the server (central), or a protocol (distributed)?",
        (
            ("", "Trust {trust}: {trusted}. "),
            ("local", "Noise is added on the device; the claim rests on no other device and not on the server."),
            (
                "central",
                "The server sees each device's change and adds the noise. Whoever breaks into it sees the same.",
            ),
            (
                "distributed",
                "Each device adds a share of the noise, and a secure sum shows the server the total and nothing else: "
                "{trust_terms}.",
            ),
        ),
    ),
    "mechanism": (
        "What is released, how is one unit's part of it bounded, and how much noise is added?",
        (
            (
                "record",
                "In each step of a round (as many as {steps}) every record's gradient over {numbers} numbers is "
                "clipped to length {clip_norm}, and Gaussian noise of standard deviation {noise_stddev} is added to "
                "the sum. ",
            ),
            (
                "user",
                "A device's whole change of {numbers} numbers is clipped to length {clip_norm}; the sum of a round has "
                "Gaussian noise of standard deviation {noise_stddev}. ",
            ),
            ("", "Bound and noise are constants of the policy, never taken from data. Sampler: {sampling}."),
        ),
    ),
    "composition": (
        "What adds up over rounds, campaigns and devices, and who keeps count?",
        (
            ("", "Every round that a device joins is priced, {max_participations} at most, by {accountant}. "),
            (
                "device server campaign",
                "A device reserves the whole price when its owner agrees, and spends a round, durably, before it reads "
                "a record. Campaigns add up under the owner's caps; devices of one owner do not know of each other.",
            ),
            ("experiment", "A simulated device keeps its count in memory, and knows of no other campaign."),
        ),
    ),
    "post-processing": (
        "What is done with the noised result, and does that read the data again?",
        (
            ("", "The shared model is computed from noised values alone. "),
            (
                "record",
                "The private part reads the owner's records without noise, stays on the device and is read by no "
                "shared step.",
            ),
            (
                "user",
                "The private part stays on the device; what it may have changed in a contribution is clipped with the "
                "contribution.",
            ),
        ),
    ),
    "floating-point": (
        "Is the noise exact, or can floating point give values away?",
        (
            ("", "Contributions are rounded to whole multiples of {grid} after clipping and summed as integers. "),
            (
                "device server campaign",
                "The noise is a discrete Gaussian on the same grid, drawn exactly; what that costs is in the price. ",
            ),
            ("experiment", "A simulation's noise is a rounded float64 Gaussian; a device's would be drawn exactly. "),
            ("", "Floating point before the clip is not covered; see above."),
        ),
    ),
    "random-numbers": (
        "Where do the random numbers come from?",
        (
            ("", "Noise: {noise}"),
            ("device server campaign", ", under a new key for every round; the draw of records too"),
            ("", "."),
        ),
    ),
    "side-channels": (
        "What shows beside the result: time, sizes, refusals?",
        (
            (
                "",
                "A reply has a fixed size and holds only: {reply_fields}. No count, loss, norm or text; an error is "
                "one fixed code. Time, and the fact of taking part, are not hidden.",
            ),
        ),
    ),
    "data-collection": (
        "Where are the raw data, and who can reach them?",
        (
            ("experiment", "This simulation's records lie on the machine that ran it."),
            (
                "device server campaign",
                "Records stay on their owner's device, encrypted under keys of its keystore (a folder of the owner's "
                "own stays as it is); nobody collects a raw record. What a device sent is in its ledger.",
            ),
        ),
    ),
    "utility": (
        "How good is the result at this price?",
        (
            ("experiment", "The scores are above, where a run has any."),
            ("server", "Scores on the operator's hold-out are above, where there is one; devices send none."),
            (
                "device campaign",
                "Not known here: devices send no scores. The operator may score a hold-out, and a simulation tells "
                "beforehand.",
            ),
        ),
    ),
    "bias": (
        "Who is served worse?",
        (
            ("", "Clipping and noise cost those most who differ from the rest, or have few records. "),
            ("experiment", "The score of the worst tenth of users is above, where a run has one."),
            ("device server campaign", "A simulation reports the worst tenth of users; a deployment cannot see it."),
        ),
    ),
    "evidence": (
        "Has the claim been tested, and could the test have failed?",
        (
            (
                "audited",
                "Audits of this campaign are above, with their controls, the faults they found, and where they had no "
                "power. An attack that finds nothing is no proof.",
            ),
            ("unaudited", "No audit of this campaign and this code is part of this card."),
            ("", " The steps of the proof and their tests are in docs/privacy.md."),
        ),
    ),
}


def answer(topic: str, cases: Collection[str]) -> str:
    """The answer to one of ``QUESTIONS`` in these cases: unit, trust, place, and ``audited`` or ``unaudited``."""
    return "".join(text for case, text in QUESTIONS[topic][1] if not case or set(case.split()) & set(cases))
