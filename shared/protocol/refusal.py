"""The fixed codes of a refusal and the message that carries one; whoever only refuses loads no torch."""

from flwr.app import ConfigRecord, RecordDict

REFUSAL = "refusal"

# Why a device did not train. The text behind a code stays on the device.
REFUSALS = (
    "NO_HOME",  # neither a simulation nor a device with a ledger, keys and an owner's consent
    "NOT_A_SIMULATION",  # a question that only simulated devices answer
    "SCHEMA",  # a field is missing, unknown or of the wrong type
    "POLICY",  # the request names a policy this device does not know, or that does not keep what it states
    "CONSENT",  # the owner has not agreed to this policy, has withdrawn, or agreed until a day that has passed
    "PAUSED",  # the owner has paused, or the schedule sends the device away
    "ROUND",  # the round is outside the campaign, or before the last one taken part in
    "ARRAYS",  # names, shapes, bytes or values of the arrays
    "BUDGET",  # max_participations is spent
    "CONFLICT",  # this round was answered, to another request
    "BURNT",  # this round was spent and nothing was released: it is not trained again
    "BUSY",  # another process of this device is at work
    "LEDGER",  # the record of what was spent cannot be used
    "ROLLBACK",  # the record of what was spent is older than it was
    "STORE",  # keys or encrypted files cannot be used
    "ROSTER",  # of a secure sum: who takes part is not as agreed, not certified, or too few
    "PARCELS",  # of a secure sum: what the others sealed for this device is not theirs, or not of this round
    "UNMASK",  # of a secure sum: opening it would show more than the sum
    "STAGE",  # of a secure sum: this device is not at that stage of this round
    "NOT_FINITE",  # the noised state holds NaN or infinity
    "INTERNAL",  # anything else
)


def pack_refusal(code: str) -> RecordDict:
    """A device's answer when it did not train: one fixed code."""
    if code not in REFUSALS:
        code = "INTERNAL"
    return RecordDict({REFUSAL: ConfigRecord({"code": code})})
