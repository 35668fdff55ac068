"""The few exceptions a caller may catch; every message says what must hold, what we got, what to do."""

_MOST_LETTERS = 4000


class SottovoceError(Exception):
    """Base of every error that is the user's to mend: a command prints it on one line and exits with 2.

    Guarantee:
        Its words are few and hold nothing that a terminal would obey, whoever wrote what they quote.
    """

    def __str__(self) -> str:
        words = super().__str__()
        if len(words) > _MOST_LETTERS:
            words = f"{words[: _MOST_LETTERS - 1]}…"
        return "".join(letter if letter.isprintable() else "\ufffd" for letter in words.replace("\n", " "))


class ScenarioError(SottovoceError):
    """A scenario holds an unknown key, a wrong type, an impossible value or an impossible combination."""


class AssetError(SottovoceError):
    """A pinned model or data file could not be fetched, or is not the file that was pinned."""


class DataError(SottovoceError):
    """A data file cannot be read as its format says; the message names file and line."""


class PrivacyError(SottovoceError):
    """A guarantee would not hold: an incompatible policy, an unpriced mechanism, an impossible target."""


class CampaignError(SottovoceError):
    """A campaign cannot start or go on: too few replies, another policy, an unreadable checkpoint."""


class TooFewRepliesError(CampaignError):
    """A round got fewer good replies than it needs; it may be asked for again."""


class VoidRoundError(TooFewRepliesError):
    """Too few contributions to a secure sum: it was not opened, and its round's number is not asked for again."""


class ServerError(SottovoceError):
    """A server cannot be made, opened or run: a damaged folder or register, a wrong key, a port in use."""


class HeadError(SottovoceError):
    """A personal head cannot be exported or used: outputs differ, another base, a damaged file."""


class LedgerError(SottovoceError):
    """The record of what a device has spent cannot be used: nothing is trained and nothing is sent.

    Args:
        text: What must hold, what was found, what to do.
        code: What the server is told: ``LEDGER`` (missing, damaged, locked, full), or ``ROLLBACK``.
    """

    def __init__(self, text: str, *, code: str = "LEDGER") -> None:
        super().__init__(text)
        self.code = code


class StoreError(SottovoceError):
    """A device's keys or encrypted files cannot be read or written: a lost key, a damaged file, no room."""


class RefusedError(SottovoceError):
    """A device refuses a request; only the fixed ``code`` crosses the wire, never the text.

    Args:
        code: One of ``shared.protocol.refusal.REFUSALS``.
    """

    def __init__(self, code: str) -> None:
        super().__init__(f"the device refused the request: {code}")
        self.code = code


class SecureSumError(SottovoceError):
    """A secure sum stops, for a device or for the round; nothing of anybody is revealed by stopping.

    Args:
        text: What must hold, what was found, what to do.
        code: ``MALFORMED`` (not a message of the protocol), ``STAGE`` (out of order, or a second time), ``ROSTER``,
            ``PARCELS``, ``UNMASK`` (what the other side sent at that stage is refused), or ``TOO_FEW`` (devices).
    """

    def __init__(self, text: str, *, code: str) -> None:
        super().__init__(text)
        self.code = code
