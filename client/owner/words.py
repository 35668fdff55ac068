"""Words for what an owner is asked and told; each function makes lines of what client/owner/owner.py found."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.datasets.folder import REASONS

if TYPE_CHECKING:
    from client.owner.consent import Offer

NOT_DETECTABLE = (
    "roll-back not detectable: whoever puts an older backup of this home back, by mistake too, puts the keys back with "
    "it, and the device forgets what it spent since. A server that remembers this device's replies corrects the count."
)
CAPS = (
    "The caps hold for the sum of all campaigns and for ever: epsilon bounds how much better than by guessing anybody "
    "can tell whether what a campaign hides was there, one record or all that you contributed (by a factor of at most "
    "e^epsilon in the odds); delta is the chance left for that to fail. They cannot be raised later."
)


def plain(text: object) -> str:
    """A text from outside on one line, without what a terminal would act on.

    Example:
        >>> plain("films" + chr(27) + "[2J")
        'films\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def key_lines(name: str, *, weak: bool, detects: bool) -> list[str]:
    """Where the keys are, and whether a restored backup can be noticed."""
    strength = "weak: whoever reads the home's folder reads the keys, and your records with them" if weak else "strong"
    rollback = "a restored backup of this home is noticed: the keyring remembers how far the ledger had come"
    return [f"keys: {plain(name)} ({strength})", rollback if detects else NOT_DETECTABLE]


_HIDES = {
    "record": "one record (nobody can tell whether it was there); not what many of your records have in common, nor "
    "that you take part",
    "user": "all that this device contributes (with it or with zeros instead, what others see is alike within epsilon; "
    "with two different contributions, within about twice that); not that you take part",
}
_ADDED = {
    "next-round": "one that you add is used from the next round on",
    "next-campaign": "one that you add after the first round is not used in this campaign",
}
_ARRAYS = {
    "local": "the noised change of the shared numbers",
    "central": "the clipped change of the shared numbers WITHOUT noise",
    "distributed": "the clipped change of the shared numbers with a share of the noise, masked",
}
_FIELDS = {
    "config.body": "one-time keys, and sealed shares of them for other devices",
    "config.policy": "the policy's hash",
    "config.round": "the round",
}


def _trust_lines(offer: "Offer") -> list[str]:
    """Whom an owner trusts, and with what."""
    if offer.trust == "local":
        return ["trusts: nobody; the noise that hides is added on this device"]
    if offer.trust == "central":
        return [
            "trusts: THE SERVER. It sees this device's change WITHOUT noise, and promises to add the noise to the sum "
            "of all and to use and show nothing else. Epsilon says nothing of what the server learns"
        ]
    if offer.trust == "distributed" and offer.secure_sum is not None:
        terms = offer.secure_sum
        members = f"a round's {offer.cohort_size} devices"
        if terms.groups > 1:
            members = f"the {offer.cohort_size // terms.groups} devices of its group in a round"
        return [
            "trusts: the server to keep to the protocol, and its operator to enrol no device of its own invention; of "
            f"{members}, at most {terms.colluders} tell it their noise, and of this "
            f"device's {terms.neighbours} neighbours fewer than {terms.threshold} tell it their shares",
            "the server sees: a masked vector, which alone looks like random numbers, and the sum of at least "
            f"{terms.min_survivors} devices with the noise of all of them. With fewer the round is void: spent, and "
            "nothing is opened",
        ]
    return [f"trusts: {plain(offer.trust)}, which this version has no words for; do not agree"]


def offer_lines(offer: "Offer") -> list[str]:
    """What a campaign asks, in plain words."""
    most = offer.payload_bytes * offer.max_participations
    summed = offer.trust == "distributed"
    adds = "keys and shares of a secure sum add some thousand" if summed else "the message adds some hundred"
    return [
        f"campaign: {plain(offer.campaign)} ({plain(offer.task)}), policy {offer.policy[:12]}",
        f"signed by key: {offer.operator}",
        f"hides: {_HIDES.get(offer.unit, plain(offer.unit))}",
        *_trust_lines(offer),
        f"price: epsilon {offer.epsilon:g}, delta {offer.delta:g} for all of it, reserved now and never given back",
        f"rounds: this device joins at most {offer.max_participations} of {offer.rounds}",
        f"your records: {_ADDED.get(offer.added_records, plain(offer.added_records))}; one that is gone is used in no "
        "later round",
        f"leaves the device: {'; '.join(_field_words(offer))}; no text, no count, no score",
        f"how much: {offer.numbers:,} numbers, {offer.payload_bytes:,} bytes a round (as history counts them; {adds}), "
        f"at most {most:,} in all",
        *(f"needs an installed package: {plain(extension)}" for extension in offer.extensions),
        f"until: {offer.until} (UTC)",
        f"left of your caps afterwards: epsilon {offer.left_epsilon:g}, delta {offer.left_delta:g}",
    ]


def _field_words(offer: "Offer") -> list[str]:
    words = _FIELDS | {"arrays": _ARRAYS.get(offer.trust, plain(offer.trust))}
    return [words.get(name, plain(name)) for name in offer.reply_fields]


def status_lines(found: Mapping[str, Any]) -> list[str]:
    """The status of a home, in plain words."""
    keys, epsilon, delta, data = found["keys"], found["epsilon"], found["delta"], found["data"]
    return [
        f"home: {plain(found['home'])}",
        "PAUSED: takes part in nothing; sottovoce client resume" if found["paused"] else "not paused",
        f"spent: epsilon {epsilon['reserved']:g} of {epsilon['cap']:g} and delta {delta['reserved']:g} of "
        f"{delta['cap']:g} are reserved, for all campaigns and for ever",
        f"left: epsilon {epsilon['left']:g}, delta {delta['left']:g}",
        *(line for campaign in found["campaigns"] for line in _campaign_lines(campaign)),
        *([] if found["campaigns"] else ["campaigns: none was ever agreed to; nothing can leave the device"]),
        *_data_lines(data),
        *(source_lines(found["source"]) if found["source"] else []),
        *(["a deletion was cut: run sottovoce client forget again"] if found["forget_was_cut"] else []),
        *key_lines(keys["where"], weak=keys["weak"], detects=keys["rollback_detectable"]),
    ]


PROMISES = {
    ("record", "local"): "hides one record, from everybody",
    ("user", "distributed"): "hides all that you contribute, from a server that keeps to the protocol too",
    ("user", "central"): "hides all that you contribute, but NOT FROM THE SERVER, which sees it without noise",
}
STATES = {
    "in force": "in force",
    "exhausted": "every round allowed is used",
    "ended": "ended",
    "withdrawn": "withdrawn",
}


def _campaign_lines(campaign: Mapping[str, Any]) -> list[str]:
    others = {
        "sent": campaign["rounds_sent"],
        "burnt (spent, nothing sent)": campaign["rounds_burnt"],
        "at work, or cut by a crash": campaign["rounds_pending"],
        "lost with an older ledger, counted again": campaign["rounds_lost"],
    }
    return [
        f"campaign {campaign['policy'][:12]} {plain(campaign['campaign'])}: {STATES[campaign['state']]}, agreed "
        f"{campaign['consented'][:10]} until {campaign['until']}, signed by {plain(campaign['operator'])}",
        f"  reserved: epsilon {campaign['epsilon']:g}, delta {campaign['delta']:g}",
        *([f"  {PROMISES[promise]}"] if (promise := (campaign["unit"], campaign["trust"])) in PROMISES else []),
        f"  rounds: {campaign['rounds_used']} of {campaign['rounds_allowed']} used"
        + "".join(f", {count} {what}" for what, count in others.items() if count),
    ]


def _data_lines(data: Mapping[str, Any]) -> list[str]:
    if data["problem"]:
        return ["records and private heads: cannot be read"]
    records = f"records: {data['records']}, encrypted" if data["records"] else "records: none"
    if not data["heads"]:
        return [records, "private heads: none"]
    return [records, f"private heads: {len(data['heads'])} versions, current {data['current_head']}"]


_OF_USE = {
    "rating": "ratings",
    "tagging": "labels",
    "ranking": "rankings",
    "generation": "language models",
    "preference": "comparisons",
}


def source_lines(source: Mapping[str, Any]) -> list[str]:
    """A home's data folder, in counts."""
    place = f"data folder: {plain(source['path'])}" if source["path"] else "data folder"
    if source["problem"]:
        return [f"{place}: cannot be read"]
    columns = ", ".join(f"{field}={plain(column)}" for field, column in source["columns"].items())
    of_use = " and of ".join(_OF_USE[task] for task in source["tasks"])
    return [
        f"{place} ({source['format']}; {columns}), read only",
        f"  records there now: {source['records']}",
        *(f"  left out: {count} {REASONS[reason]}" for reason, count in source["skipped"].items()),
        f"  of use to campaigns of {of_use}"
        if of_use
        else "  of use to no campaign: ratings and labels need the column of target, language models that of response",
    ]


def history_lines(events: list[dict[str, Any]]) -> list[str]:
    """The history of a home, in plain words; a round is named when it ends."""
    ended = {(event["policy"], event["round"]) for event in events if event["event"] in ("release", "burn")}
    return [
        f"{event['at']}  {_event_words(event)}"
        for event in events
        if event["event"] != "spend" or (event["policy"], event["round"]) not in ended
    ]


def _event_words(event: Mapping[str, Any]) -> str:
    name = plain(event.get("campaign", ""))
    match event["event"]:
        case "release":
            size = f"{event['size_bytes']:,} bytes"
            return f"left the device: {name}, round {event['round']}, {size}, sha256 {event['sha256']}"
        case "burn":
            return f"burnt: {name}, round {event['round']}: spent, and nothing left the device"
        case "spend":
            return f"spent: {name}, round {event['round']}: at work, or cut by a crash"
        case "consent":
            until = f"until {event['until']}, {event['max_participations']} rounds"
            return f"agreed: {name}, epsilon {event['epsilon']:g}, delta {event['delta']:g}, {until}"
        case "withdraw":
            return f"withdrawn: {name}"
        case "forget":
            return f"forgot everything; receipt {plain(event.get('receipt', {}).get('file', ''))}"
        case "rebase" if "rounds" in event:
            return f"counted again: {event['rounds']} rounds of {name} that an older ledger no longer knew"
        case "rebase":
            return "recovered: every campaign until then is ended, what was spent stays spent"
        case "open":
            return "began"
        case other:
            return {"pause": "paused", "resume": "resumed"}.get(other, plain(other))


LOST_WITH_DATA = "every consent is withdrawn; what was spent stays spent; what left the device cannot be called back"


def loss_words(loss: Mapping[str, int]) -> str:
    """How many files of each kind a deletion would reach."""
    return ", ".join(f"{count} of {kind}" for kind, count in loss.items()) or "none is left"


def forgotten_lines(receipt: Mapping[str, Any]) -> list[str]:
    """What a deletion did, and what it could not reach."""
    left = receipt["left_the_device"]
    replies = sum(len(campaign["replies"]) for campaign in left["campaigns"])
    bound = left["bound"]
    return [
        "forgotten: the keys first, then everything sealed with them",
        f"left the device before and stays out: {replies} replies, together within epsilon "
        f"{bound['epsilon']:g}, delta {bound['delta']:g} (see: history)",
        *receipt["out_of_reach"],
    ]
