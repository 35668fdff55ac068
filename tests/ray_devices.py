"""Devices for the tests of engine ray; a module of its own because its workers must be able to import it.

What a device does is asked for in the request: ``do`` is one of the names below.
"""

import os
import time
from functools import lru_cache

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from shared.flower.grid import answer_seat, in_simulation

app = ClientApp()
app.query("seat")(answer_seat)


@lru_cache
def resident() -> list[str]:
    """What a worker loads once."""
    return []


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do what is asked, then tell about this worker."""
    wanted = message.content["ask"]["do"]
    if wanted == "die":
        os._exit(1)
    if wanted == "fail":
        raise ValueError("the device could not")
    if wanted == "hang":
        time.sleep(3600)
    resident().append("message")
    seen = int(context.state.config_records["seen"]["count"]) + 1 if "seen" in context.state else 1
    context.state["seen"] = ConfigRecord({"count": seen})
    about = {
        "pid": os.getpid(),
        "loads": resident.cache_info().misses,
        "messages": len(resident()),
        "seen": seen,
        "simulation": in_simulation(context),
        "campaigns": str(context.run_config.get("campaigns")),
        "seat": int(context.node_config["partition-id"]),
    }
    return Message(RecordDict({"about": ConfigRecord(about)}), reply_to=message)
