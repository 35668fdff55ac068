"""The ServerApp of ``flwr run .``: a whole simulation over the devices Flower's own engine has brought to life.

Flower's run config names the scenario and its overrides and nothing else; ``pyproject.toml`` holds the defaults.
"""

import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from shared.config import load_scenario
from shared.errors import ScenarioError
from simulations.run import simulate

app = ServerApp()

_SCENARIOS = Path(__file__).parent / "scenarios"


def find_scenario(name: str) -> Path:
    """A scenario file by its path, or a shipped one by its name.

    Raises:
        ScenarioError: Neither a file nor the name of a shipped scenario.
    """
    for path in (Path(name), _SCENARIOS / f"{name}.toml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in _SCENARIOS.glob("*.toml")))
    raise ScenarioError(f"scenario must be a file or one of {shipped}; got {name!r}.")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario of the run config; the devices look for its campaigns below ``out``."""
    settings = {key: str(context.run_config[key]) for key in ("scenario", "overrides", "out")}
    scenario = load_scenario(find_scenario(settings["scenario"]), tuple(shlex.split(settings["overrides"])))
    simulate(scenario, out=Path(settings["out"]), command="flwr run", quiet=True, grid=grid)
