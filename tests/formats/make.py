"""Write the files of a home and of a server as the checkout in the current folder writes them: make.py OUT.tar.gz.

Uses that checkout's own builders for tests, so it runs in every one that knows an owner's home: see README.md.
"""

import importlib.util
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path.cwd()))


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path("tests") / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(folder: Path) -> None:
    """``home``: four records, a consent, two rounds, a pause, two heads; ``checkpoints``: two rounds."""
    from server.aggregate import SERVER_OPTIMIZERS, OptimizerState
    from server.checkpoint import Checkpoint, Counts, save_checkpoint

    homes, tiny = _load("homes"), _load("tiny")
    work = folder.parent / "work"
    base = tiny.tiny_base(work / "base")
    data = tiny.tiny_movielens(work / "data")
    scenario = tiny.tiny_scenario(work, base=base.folder, data=data)
    published = homes.publish(scenario, work, overrides=("privacy.max_participations=3", "federation.cohort_size=2"))
    campaign = published.campaign
    home = homes.make_home(folder / "home")
    records = published.dataset.users[0].train
    home.records().add(records[:3])
    home.records().add(records[3:4])
    homes.consent(home, published)
    for number in (1, 2):
        answered = homes.ask(home, campaign, round_number=number, answered=number - 1)
        if (answered[0] if isinstance(answered, tuple) else None) is not None:
            raise SystemExit(f"round {number} was refused: {answered[0]}")
    with home.ledger() as ledger:
        ledger.pause()
    for number in (1, 2):
        about = {"created": "2030-05-01T12:00:00+00:00", "campaign": "tiny", "round": str(number)}
        home.heads().add({"manifest.json": b'{"n": %d}' % number, "adapter.safetensors": bytes([number]) * 40}, about)

    arrays = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    state = OptimizerState()
    update = {name: np.full(array.shape, 0.01) for name, array in arrays.items()}
    for number in (1, 2):
        step = SERVER_OPTIMIZERS["adam"]
        arrays, state = step(arrays, state, update, campaign.scenario.federation)
        counts = Counts(replies=2, rejected={"NORM": 1}, bytes_up=100, bytes_down=200)
        seats = {0: number, 1: 1}
        save_checkpoint(
            folder / "checkpoints",
            Checkpoint(number, campaign.policy.sha256, arrays, state, seats, seats, counts, counts),
        )


if __name__ == "__main__":
    [out] = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "made"
        make(made)
        with tarfile.open(out, "w:gz") as archive:
            for path in sorted(made.iterdir()):
                archive.add(path, arcname=path.name)
