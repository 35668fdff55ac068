"""A device's service whose answers say which process gave them; run by tests as a program: HOME HOST:PORT CA MARK."""

import math
import os
import sys
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

from client.home.home import open_home
from client.service.join import join, read_invitation

calls = 0


def answer(message: Message, context: Context) -> Message:
    """The pid, how often it answered, and whether a bundle's module was loaded; asked to, computes until woken."""
    global calls
    calls += 1
    config = message.content["config"]
    if config["sleep"]:
        (Path(sys.argv[1]) / "asleep").touch()
        while not (Path(sys.argv[1]) / "awake").exists():
            sum(math.sqrt(number) for number in range(100_000))
    told = {"pid": os.getpid(), "calls": calls, "hostile": "hostile_bundle" in sys.modules, "round": config["round"]}
    return Message(RecordDict({"config": ConfigRecord(told)}), reply_to=message)


if __name__ == "__main__":
    home = open_home(Path(sys.argv[1]))
    invitation = read_invitation(sys.argv[2], ca=Path(sys.argv[3]), home=home.folder)
    ended = join(home, invitation, answer=answer, on_state=lambda state: print(state, flush=True))
    os._exit(0 if ended else 7)
