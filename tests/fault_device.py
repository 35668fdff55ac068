"""A device's service that a test can stop in the middle of a step: HOLD SEAT SEED CAMPAIGN HOME INVITATION.

Where ``HOLD/SEAT-ROUND`` exists, the device waits after its first step of that round: it makes ``HOLD/SEAT-ROUND.held``
and goes on when the first file is gone. With a seed instead of ``-`` its noise is drawn from it; replies are stamped.
What runs is the typed command, ``sottovoce client join``.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import client.app
import client.service.executor
import client.service.supernode
from client.training.device import OwnedDevice
from client.training.optimizer import PolicyOptimizer
from shared.privacy.noise import SeededRandomness
from sottovoce.cli import main


def hold_in_steps(folder: Path, seat: str) -> None:
    """Wait after the first step of a round for which the folder says so."""
    current = ""
    spend, step = OwnedDevice.spend, PolicyOptimizer.step

    def spending(device, campaign, request):
        nonlocal current
        current = f"{seat}-{request.round_number}"
        return spend(device, campaign, request)

    def stepping(optimizer, closure=None):
        step(optimizer, closure)
        if (folder / current).exists():
            (folder / f"{current}.held").touch()
            while (folder / current).exists():
                time.sleep(0.05)

    OwnedDevice.spend, PolicyOptimizer.step = spending, stepping


def draw_from_seeds(seed: int, campaign: str, seat: int) -> None:
    """Have noise that a simulation, or the same device in another run, draws too."""

    def randomness(_, round_number):
        return SeededRandomness(seed=seed, campaign=campaign, device=seat, round_number=round_number)

    def answer_for(home):
        return partial(client.app.answer, find=lambda _: OwnedDevice(home, randomness=randomness))

    client.service.executor.answer_for = answer_for


if __name__ == "__main__":
    hold, seat, seed, campaign, home, invitation = sys.argv[1:]
    hold_in_steps(Path(hold), seat)
    if seed != "-":
        draw_from_seeds(int(seed), campaign, int(seat))
    if "WRONG_CLOCK" in os.environ:  # it is the whole device's
        client.service.supernode._KEPT += ("LD_PRELOAD", "WRONG_CLOCK")
    sys.exit(main(["client", "join", invitation, "--home", home, "--nice", "0"]))
