"""Where an owner's home lies; loaded by every command, so it loads nothing."""

from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

if TYPE_CHECKING:
    from client.home.home import Home


def default_home() -> Path:
    """Where a home lies unless ``--home`` says otherwise."""
    return platformdirs.user_data_path("sottovoce") / "home"


def open_owner_home(folder: Path | None) -> "Home":
    """The home that ``--home`` names, or the default one."""
    from client.home.home import open_home

    return open_home(folder or default_home())
