"""``flwr run .`` with everything it starts kept together, cut off from the network, and stopped at the end.

Flower's command starts a SuperLink that stays for ever, under a folder and a port that all runs share, installs
packages from an index before a run and reports success for a run that failed. Here a run has a folder and a port of
its own, and ends with the status the SuperLink itself gives.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from shared.assets import resolve
from shared.config import Scenario, load_scenario
from shared.datasets import choose_users, read
from shared.errors import CampaignError, ScenarioError
from shared.flower.processes import PROGRAMS, die_with_parent, flower_environment, free_port, running

ROOT = Path(__file__).parent.parent
LOG_NAME = "flwr.log"

_START_S = 60.0
_STOP_S = 10.0
_MARK = "SOTTOVOCE_FLWR_RUN"  # in the environment of everything a run starts, so that all of it is found again
_ENDED = "finished:"


def flwr_run(
    scenario_file: Path, *, overrides: Sequence[str] = (), out: Path, quiet: bool = False, root: Path = ROOT
) -> Path:
    """Run a scenario through Flower's command line and wait for its end.

    Args:
        scenario_file: A scenario.
        overrides: As of ``load_scenario``.
        out: The run folder; must not exist.
        quiet: Do not show Flower's log.
        root: The source tree the bundle is built from.

    Returns:
        The report.

    Raises:
        SottovoceError: What a run through ``simulate`` would raise, or Flower could not do it; its log is then in
            ``out``.

    Guarantee:
        Whatever happens, no process it started is left, and no folder but ``out``.
    """
    scenario_file, out = scenario_file.resolve(), out.resolve()
    scenario = load_scenario(scenario_file, tuple(overrides))
    if out.exists():
        raise ScenarioError(f"{out} must be a new folder; it exists. Choose another with --out, or remove it.")
    if not (root / "pyproject.toml").is_file():
        raise CampaignError(
            f"flwr run needs the source tree with its pyproject.toml, got {root}. Use: sottovoce simulate"
        )
    data = scenario.data
    everybody = read(data.format, resolve(data.source, quiet=quiet), columns=data.columns, min_records=data.min_records)
    devices = len(choose_users(everybody, data.users, tuning_share=data.tuning_share).users)
    run_config = {"scenario": str(scenario_file), "overrides": shlex.join(overrides), "out": str(out)}
    with _home() as home, _terminated_as_interrupt():
        log = home / LOG_NAME
        try:
            status = _run(home, log, scenario, run_config=run_config, devices=devices, quiet=quiet, root=root)
        except BaseException:
            _keep(log, out)
            raise
        if status != f"{_ENDED}completed":
            _keep(log, out)
            raise CampaignError(
                f"{_reason(log) or f'the run must end as completed, got {status}.'} Log: {out / LOG_NAME}"
            )
    return out / "report.html"


def _run(
    home: Path,
    log: Path,
    scenario: Scenario,
    *,
    run_config: dict[str, str],
    devices: int,
    quiet: bool,
    root: Path,
) -> str:
    """Start a SuperLink, give it the run, wait; returns the run's real status."""
    settings = home / "run.toml"
    settings.write_text(
        "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in run_config.items()),
        encoding="utf-8",
    )
    federation = f"num-supernodes={devices} client-resources-num-cpus=1"
    if not scenario.performance.ray_address:
        federation += f" init-args-num-cpus={scenario.performance.workers or os.cpu_count()}"
    port = free_port()
    environment = _environment(home, port, scenario)
    with _superlink(home, port, environment, log=log):
        command = ["run", ".", "--stream", "--run-config", str(settings), "--federation-config", federation]
        _flwr(command, environment, log=log, cwd=root, show=not quiet)
        while True:
            status = _status(environment, cwd=root)
            if status is None or status.startswith(_ENDED):
                return status or "never started"
            time.sleep(1.0)  # the stream of its log broke off before the run


def _environment(home: Path, port: int, scenario: Scenario) -> dict[str, str]:
    """The environment of everything a run starts."""
    return flower_environment(home) | {
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "RAY_ADDRESS": scenario.performance.ray_address or "local",
        "RAY_TMPDIR": str(home),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": str(int(bool(scenario.performance.ray_address))),  # 0: loopback only
        _MARK: home.name,
    }


@contextmanager
def _home() -> Iterator[Path]:
    """A private folder for Flower and Ray; in /tmp, because the path of a socket must be short."""
    home = Path(tempfile.mkdtemp(prefix=f"sottovoce-flwr-{os.getpid()}-", dir="/tmp"))
    try:
        yield home
    finally:
        _stop_marked(home.name)
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Let SIGTERM clean up as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _superlink(home: Path, port: int, environment: dict[str, str], *, log: Path) -> Iterator[None]:
    """A SuperLink of our own, because the one ``flwr run`` starts belongs to nobody."""
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    with running(command, environment=environment, folder=home, log=log) as process:
        _wait_until_healthy(port, process)
        yield


def _wait_until_healthy(port: int, process: subprocess.Popen[bytes]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            opener.open(f"http://127.0.0.1:{port}/health", timeout=1.0).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise CampaignError(f"Flower's SuperLink must answer within {_START_S:.0f} s, got exit code {process.poll()}.")


def _flwr(command: list[str], environment: dict[str, str], *, log: Path, cwd: Path, show: bool) -> None:
    """Run a command of Flower's to its end, its output in the log; its exit code says nothing."""
    with (
        log.open("ab") as file,
        subprocess.Popen(
            [str(PROGRAMS / "flwr"), *command],
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                file.write(line)
                if show:
                    print(line.decode(errors="replace").rstrip(), file=sys.stderr)
        except BaseException:
            process.kill()
            raise


def _status(environment: dict[str, str], *, cwd: Path) -> str | None:
    """What the SuperLink says of its only run; None if it has none."""
    command = [str(PROGRAMS / "flwr"), "ls", "--format", "json"]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)
    try:
        runs = json.loads(done.stdout)["runs"]
        return str(runs[0]["status"]) if runs else None
    except (ValueError, KeyError) as error:
        raise CampaignError(f"flwr ls must list the run, got {done.stdout[-200:] + done.stderr[-200:]!r}.") from error


def _reason(log: Path) -> str | None:
    """What one of our own errors said in a log, the last one."""
    text = re.sub("\x1b\\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    said = re.findall(r"shared\.errors\.\w+: (.+)", text)
    return said[-1].strip() if said else None


def _keep(log: Path, out: Path) -> None:
    """Put the log of a failure into the run folder."""
    if log.is_file():
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, out / LOG_NAME)


def _stop_marked(mark: str) -> None:
    """End every process that carries the mark, wherever it has got to in the tree of processes."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _STOP_S
        for pid in marked(mark):
            try:
                os.kill(pid, ending)
            except ProcessLookupError:
                continue
        while marked(mark):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        else:
            return


def marked(mark: str) -> list[int]:
    """Processes that were started by the run of this mark."""
    entry = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if entry in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:  # another user's, or gone
                continue
    return found
