"""Events for TensorBoard: read back from the files byte by byte, and by TensorBoard itself where it is installed."""

import builtins
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from simulations import events
from simulations.events import EventLog

pytest.importorskip("tensorboardX")


def scalars(folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(run, tag) -> its points, from the framing TensorBoard reads: length, its checksum, event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            header, (size, check) = data[:8], struct.unpack("<QI", data[:12])
            content = data[12 : 12 + size]
            assert check == masked_crc32c(header)
            assert struct.unpack("<I", data[12 + size : 16 + size]) == (masked_crc32c(content),)
            event = Event.FromString(content)
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    key = (str(path.parent.relative_to(folder)), value.tag)
                    found.setdefault(key, []).append((event.step, value.simple_value))
            data = data[16 + size :]
    return found


@pytest.fixture
def run_folder(tmp_path: Path, invented: Any) -> Path:
    return invented.invented_run(tmp_path / "run", seeds=(1, 2), users=3)


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_events(folder: Path, lines: list[dict[str, Any]], summary: dict[str, Any] | None = None) -> Path:
    log = EventLog(folder)
    for line in lines:
        log.add(line)
    if summary is not None:
        log.add_summary(summary)
    log.close()
    return folder


def test_every_line_is_read_back(run_folder: Path, tmp_path: Path) -> None:
    lines = journal(run_folder)
    found = scalars(write_events(tmp_path / "events", lines))
    assert {run for run, _ in found} == {f"{name}/seed-{seed}" for name in ("lora", "linear") for seed in (1, 2)}
    assert {tag for _, tag in found} == {
        "validation/federated",
        "validation/personal",
        "epsilon",
        "bytes_up",
        "bytes_down",
        "replies",
    }
    mine = [line for line in lines if (line["campaign"], line["seed"]) == ("linear", 2)]
    for tag, wanted in (
        ("validation/personal", [line["validation"]["personal"] for line in mine]),
        ("bytes_up", [line["bytes_up"] for line in mine]),
        ("epsilon", [line["epsilon"] for line in mine]),
    ):
        steps, values = zip(*found["linear/seed-2", tag], strict=True)
        assert list(steps) == [line["round"] for line in mine]
        assert values == pytest.approx(wanted)


def test_what_is_null_has_no_point(run_folder: Path, tmp_path: Path) -> None:
    lines = [
        line | {"epsilon": None, "validation": {"federated": 1.0, "personal": None}} for line in journal(run_folder)
    ]
    tags = {tag for _, tag in scalars(write_events(tmp_path / "events", lines))}
    assert tags == {"validation/federated", "bytes_up", "bytes_down", "replies"}


def test_the_rows_and_the_claim_are_read_back(run_folder: Path, tmp_path: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["rows"]["../out of here"] = summary["rows"]["local"]
    folder = write_events(tmp_path / "events", [], summary)
    found = scalars(folder)
    score = summary["rows"]["personal"]["rmse"]
    for tag, value in (("test/rmse", "value"), ("test/rmse/low", "low"), ("test/rmse/high", "high")):
        assert found["rows/personal", tag] == [(20, pytest.approx(score[value]))]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "events"}
    assert ("rows/-out-of-here", "test/rmse") in found
    [claim] = (folder / "rows").glob("events.*")
    assert summary["claim"].encode() in claim.read_bytes()


def test_lines_added_again_after_removing_the_folder_occur_once(run_folder: Path, tmp_path: Path) -> None:
    import shutil

    lines = journal(run_folder)
    write_events(tmp_path / "events", lines[:7])
    shutil.rmtree(tmp_path / "events")
    points = scalars(write_events(tmp_path / "events", lines))["lora/seed-1", "replies"]
    assert [step for step, _ in points] == list(range(0, 21, 2))


def test_a_line_is_on_disk_before_the_log_is_closed(run_folder: Path, tmp_path: Path) -> None:
    import time

    log = EventLog(tmp_path / "events")
    log.add(journal(run_folder)[0])
    until = time.monotonic() + 20
    while not scalars(tmp_path / "events") and time.monotonic() < until:
        time.sleep(0.1)
    assert scalars(tmp_path / "events")
    log.close()


def test_without_the_package_one_line_is_said_once(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "tensorboardX":
            raise ModuleNotFoundError("no", name=name)
        return real(name, *rest)

    events._writer_class.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", absent)
        summary = json.loads((run_folder / "summary.json").read_text())
        for _ in range(2):
            write_events(tmp_path / "events", journal(run_folder), summary)
    events._writer_class.cache_clear()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "pip install tensorboardX" in said[0]
    assert not (tmp_path / "events").exists()


def test_tensorboard_reads_them(run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the viewer is not installed")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    summary = json.loads((run_folder / "summary.json").read_text())
    write_events(tmp_path / "events", journal(run_folder), summary)
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "events")).Reload()
    points = runs.Scalars("lora/seed-1", "validation/personal")
    assert [point.step for point in points] == list(range(0, 21, 2))
    assert "rows/personal-linear" in runs.Runs()
    [claim] = runs.Tensors("rows", "claim/text_summary")
    assert claim.tensor_proto.string_val[0].decode() == summary["claim"]
