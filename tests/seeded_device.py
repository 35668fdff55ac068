"""A device whose noise a test draws from seeds: HOME INVITATION SEED CAMPAIGN SEAT. Its replies are stamped."""

import sys
from functools import partial
from pathlib import Path

from client.app import answer
from client.home.home import open_home
from client.service.join import join, read_invitation
from client.training.device import OwnedDevice
from shared.privacy.noise import SeededRandomness


def main(home_folder: str, invitation: str, seed: str, campaign: str, seat: str) -> None:
    home = open_home(Path(home_folder))

    def randomness(_, round_number):
        return SeededRandomness(seed=int(seed), campaign=campaign, device=int(seat), round_number=round_number)

    seeded = partial(answer, find=lambda _: OwnedDevice(home, randomness=randomness))
    join(home, read_invitation(invitation, ca=None, home=home.folder), answer=seeded)


if __name__ == "__main__":
    main(*sys.argv[1:])
