"""The log file of a service: bounded, the owner's alone, and nothing lost when others rotate it."""

import logging
import os
import shutil

import pytest

from client.service.log_file import LogFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "service.log"


def write(log, *lines):
    for line in lines:
        log.emit(logging.makeLogRecord({"msg": line}))


def every_line(path):
    names = [path, *sorted(path.parent.glob(f"{path.name}.*"))]
    return [line for name in reversed(names) for line in name.read_text().splitlines()]


def test_what_is_written_is_bounded_and_the_newest_is_kept(path):
    lines = [f"line {number:03}" for number in range(200)]  # 9 bytes each
    with LogFile(path, limit_bytes=100, kept=3) as log:
        write(log, *lines)
    names = sorted(found.name for found in path.parent.iterdir())
    assert names == ["service.log", "service.log.1", "service.log.2", "service.log.3"]
    assert all(found.stat().st_size <= 100 for found in path.parent.iterdir())
    kept = every_line(path)
    assert kept == lines[-len(kept) :]
    assert len(kept) > 33
    with LogFile(path, limit_bytes=100, kept=3) as log:  # started again, it goes on in the same file
        write(log, "after")
    assert every_line(path)[-2:] == [lines[-1], "after"]


def test_only_its_owner_reads_it(path):
    before = os.umask(0)
    try:
        with LogFile(path, limit_bytes=20, kept=1) as log:
            write(log, "x" * 15, "y" * 15)
    finally:
        os.umask(before)
    assert [found.stat().st_mode & 0o777 for found in path.parent.iterdir()] == [0o600, 0o600]
    path.chmod(0o644)
    with LogFile(path):
        assert path.stat().st_mode & 0o777 == 0o600


def test_logrotate_moves_it_away_or_cuts_it_and_no_line_is_lost(path):
    with LogFile(path) as log:
        write(log, "one")
        path.rename(path.with_suffix(".old"))  # logrotate, and its `create` not yet done
        write(log, "two")
        path.unlink()
        path.touch()  # its `create`
        write(log, "three")
        assert path.read_text() == "three\n"
        shutil.copy(path, path.with_suffix(".copy"))  # its `copytruncate`
        os.truncate(path, 0)
        write(log, "four")
    assert path.read_text() == "four\n"
    assert path.with_suffix(".old").read_text() == "one\n"


def test_a_line_is_cut_at_the_bound_and_odd_text_is_written(path):
    with LogFile(path, limit_bytes=50) as log:
        write(log, "a" * 500, "\udcff")
    assert all(found.stat().st_size <= 50 for found in path.parent.iterdir())
    assert path.read_text() == "?\n"


def test_a_disk_that_takes_nothing_stops_nobody(path, monkeypatch):
    with LogFile(path) as log:
        with monkeypatch.context() as full:
            full.setattr("os.write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            write(log, "lost")
        path.unlink()
        with monkeypatch.context() as full:
            full.setattr("os.open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            write(log, "lost")
        write(log, "kept")
    assert path.read_text() == "kept\n"


def test_a_link_or_a_pipe_in_its_place_is_refused(path):
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(OSError, match="symbolic links"):
        LogFile(path)
    assert not path.with_name("elsewhere").exists()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="No such device"):
        LogFile(path)
