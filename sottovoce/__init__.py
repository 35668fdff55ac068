"""Federated, differentially private, on-device personalisation of language models: the public Python API.

    import sottovoce
    summary = sottovoce.simulate("simulations/scenarios/movielens.toml", out="runs/first")

The heavy packages are imported by the call that needs them, so a device that only predicts never loads torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import client
import server
import shared
import simulations

if TYPE_CHECKING:
    from client.runtime.generation import Generator
    from client.runtime.runtime import PersonalHead

__version__ = "0.1.0"
__all__ = ["__version__", "open_generator", "open_head", "simulate"]

# The folders are the packages, and their names are common: another wheel may have put a `client` of its own first.
_HERE = Path(__file__).resolve().parent.parent
for _package in (client, server, shared, simulations):
    if Path(str(_package.__file__)).resolve().parent.parent != _HERE:
        raise ImportError(
            f"package {_package.__name__!r} must be the one beside {_HERE / 'sottovoce'}, got {_package.__file__}; "
            "install Sottovoce in an environment of its own."
        )


def simulate(
    scenario: str | Path, *, out: str | Path, overrides: tuple[str, ...] = (), quiet: bool = False, resume: bool = False
) -> dict[str, Any]:
    """Run a scenario from its data to its report; the same as the command ``sottovoce simulate``.

    Args:
        scenario: Path of a scenario file.
        out: The run folder; must not exist, unless ``resume``.
        overrides: Settings laid over the file, such as ``("privacy.epsilon=3",)``.
        quiet: No progress on stderr.
        resume: Go on with the interrupted run in ``out``.

    Returns:
        The content of the run's ``summary.json``.

    Raises:
        shared.errors.SottovoceError: Anything that is the caller's to mend.
    """
    from shared.config import load_scenario
    from simulations.run import simulate as run

    settings = load_scenario(Path(scenario), overrides)
    return run(settings, out=Path(out), command="sottovoce.simulate", quiet=quiet, resume=resume)


def open_head(folder: str | Path, *, base: str | Path | None = None) -> "PersonalHead":
    """Open a personal head for predictions on this device; needs the base install only.

    Raises:
        shared.errors.HeadError: The head is damaged, incomplete or made for another base.
    """
    from client.runtime.runtime import open_head as open_

    return open_(Path(folder), base=None if base is None else Path(base))


def open_generator(folder: str | Path, *, base: str | Path | None = None) -> "Generator":
    """Open a personal language model, or the bare base, on this device; needs the base install only.

    Raises:
        shared.errors.HeadError: The head is damaged, incomplete or made for another base.
    """
    from client.runtime.generation import open_generator as open_

    return open_(Path(folder), base=None if base is None else Path(base))
