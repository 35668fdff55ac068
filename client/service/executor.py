"""The resident executor: takes the SuperNode's tasks and answers them with what is installed here, in one process.

Flower would run the bundle of code that came with a message. Here it is not unpacked, looked at or imported: what a
server can send is numbers and the name of a policy, and who answers is ``client.app.answer``.
"""

import logging
import os
import resource
import threading
from collections.abc import Callable
from typing import Protocol

# Before flwr is imported, which reads it once. A SuperNode gives a part 30 s to arrive, or says it all again, for ever.
os.environ.setdefault("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", str(2**19))

# Before flwr is imported: it reads these once.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from flwr.app import Context, Message

from client.home.home import Home
from client.log import describe_error, note
from shared.errors import StoreError
from shared.flower.tasks import Task, TaskError

Answer = Callable[[Message, Context], Message]

_POLL_S = 0.5
# The limit holds whatever a campaign's settings ask torch for.
_THREADS = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LEAST_MEMORY_MB = 1024  # Python, Flower and torch take half of it before they do anything


class Taker(Protocol):
    """Where tasks come from."""

    def take(self) -> Task | None:
        """The next one, None where nothing waits; ``TaskError`` where nobody answers."""


def serve_tasks(
    tasks: Taker,
    home: Home,
    *,
    stop: threading.Event,
    answer: Answer | None = None,
    on_state: Callable[[bool], object] = bool,
) -> None:
    """Answer tasks until told to stop; a task that is being answered is answered first.

    Args:
        tasks: Where they come from.
        home: The owner's.
        stop: Set by another thread.
        answer: Instead of ``client.app.answer`` for this home; loaded, with torch, at the first task.
        on_state: Told true when an answer is begun, false when it was handed over.

    Guarantee:
        Whatever a server sends, its bundle is not opened and the loop goes on; every task gets an answer, a refusal
        or an error without text.
    """
    while not stop.is_set():
        try:
            task = tasks.take()
        except TaskError:  # it starts, or is being started again
            task = None
        if task is None:
            stop.wait(_POLL_S)
            continue
        on_state(True)
        try:
            answer = answer or answer_for(home)
            _serve(task, answer)
        except TaskError as error:
            note("undelivered", level=logging.WARNING, **describe_error(error))
        finally:
            task.close()
            on_state(False)


def _serve(task: Task, answer: Answer) -> None:
    try:
        reply = answer(task.message, task.context)
    except Exception as error:  # whatever it is, no text of it may leave the device
        note("refused", level=logging.ERROR, code="INTERNAL", **describe_error(error))
        task.fail()
        return
    task.answer(reply)


def answer_for(home: Home) -> Answer:
    """How the device of this home answers: with a noised update, or with the code of a refusal; loads torch."""
    from client.app import answer
    from client.training.device import OwnedDevice

    def respond(message: Message, context: Context) -> Message:
        return answer(message, context, find=lambda _: OwnedDevice(home))

    return respond


def limit_process(*, threads: int, nice: int, memory_mb: int | None) -> None:
    """Bound what this process may take of the device; call it before torch is loaded.

    Args:
        threads: Of a matrix product.
        nice: Added to the process's niceness.
        memory_mb: Of private memory, the libraries' own not counted; a round that needs more is refused as
            ``INTERNAL``, and burnt.

    Raises:
        StoreError: A value is impossible.
    """
    if not threads >= 1:
        raise StoreError(f"--threads must be at least 1, got {threads}.")
    if not 0 <= nice <= 19:
        raise StoreError(f"--nice must be from 0 to 19, got {nice}.")
    if memory_mb is not None and not memory_mb >= LEAST_MEMORY_MB:
        raise StoreError(f"--memory-mb must be at least {LEAST_MEMORY_MB}, got {memory_mb}; leave it out for no limit.")
    os.environ.update(dict.fromkeys(_THREADS, str(threads)))
    os.nice(nice)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the owner's text
    if memory_mb is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_mb << 20, memory_mb << 20))
