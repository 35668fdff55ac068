"""What an owner states of themself, for declared personas and for prompts; sealed like the records, and never sent."""

import json
from collections.abc import Mapping

from client.home.home import Home
from shared.errors import StoreError

_NAME = "profile"
_MOST = 32  # attributes, and characters of a name
_LONGEST = 400  # characters of a value: the lines of a persona


def read_profile(home: Home) -> dict[str, str]:
    """Attribute -> value, as the owner stated them; nothing where nothing was stated.

    Raises:
        StoreError: The vault cannot be opened.
    """
    if not (home.folder / "vault").exists():
        return {}
    vault = home.vault()
    stated: dict[str, str] = json.loads(vault.open(_NAME)) if vault.names(_NAME) else {}
    return stated


def write_profile(home: Home, profile: Mapping[str, str]) -> None:
    """Keep what an owner states in place of what was stated before; with nothing stated, nothing is kept.

    Raises:
        StoreError: Too many or too long attributes, one without a name, or the vault cannot be opened.
    """
    for name, value in profile.items():
        if not (0 < len(name) <= _MOST and 0 < len(value) <= _LONGEST and (name + value).isprintable()):
            raise StoreError(
                f"an attribute must read name=value, 1 to {_MOST} printable characters and 1 to {_LONGEST}, got "
                f"{name[:_MOST]!r}."
            )
    if len(profile) > _MOST:
        raise StoreError(f"a profile must have at most {_MOST} attributes, got {len(profile)}.")
    vault = home.vault()
    if profile:
        vault.seal(_NAME, json.dumps(profile).encode())
    elif vault.names(_NAME):
        vault.delete(_NAME)
