"""Which wheels a device of another machine would install, and how many bytes they are, from package metadata alone.

    python tests/wheels.py aarch64 --json docs/measurements/wheels-aarch64.json

pip resolves, with its own configuration, as on that machine: wheels only, of manylinux up to glibc 2.28, markers read
for that machine. Nothing is built, run or installed. It ends with 1 and pip's word for it where a wheel is missing.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTALLS = {"base": (), "train": ("train",)}
_ACCELERATOR = ("nvidia-", "cuda-", "triton")  # what a CUDA build of torch asks for and a CPU build does not
# pip reads the markers of dependencies for the machine it runs on, whatever --platform says; sizes are in no report.
_PIP = """\
import json, platform, sys
machine, report, *arguments = sys.argv[1:]
platform.machine = lambda: machine
from pip._internal.commands import create_command
command = create_command("install")
arguments += ["--dry-run", "--report", report]
if code := command.main(arguments):
    sys.exit(code)
with open(report) as file:
    found = json.load(file)["install"]
session = command._build_session(command.parse_args(arguments)[0])
wheels = []
for wheel in found:
    url = wheel["download_info"]["url"]
    answer = session.head(url, headers={"Accept-Encoding": "identity"}, allow_redirects=True)
    answer.raise_for_status()
    wheels.append([wheel["metadata"]["name"], wheel["metadata"]["version"], url, int(answer.headers["Content-Length"])])
with open(report, "w") as file:
    json.dump(wheels, file)
"""


class NoWheelError(Exception):
    """Something that is needed has no wheel for the machine."""


def requirements(extras: tuple[str, ...]) -> list[str]:
    """What the project asks for, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + [one for extra in extras for one in project["optional-dependencies"][extra]]


def wheels(needed: list[str], machine: str) -> list[dict[str, str | int]]:
    """The wheels that pip would install on a machine: name, version, file and bytes, sorted by name.

    Raises:
        NoWheelError: pip finds no set of wheels; says what it said.
    """
    options = ["--quiet", "--ignore-installed", "--only-binary=:all:", "--implementation=cp"]
    options += [f"--python-version={sys.version_info.major}.{sys.version_info.minor}"]
    options += [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(28, 16, -1)]
    options += [f"--platform=manylinux2014_{machine}"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-c", _PIP, machine, str(report), *options, *needed]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoWheelError("\n".join(line for line in done.stderr.splitlines() if "WARNING" not in line))
        found = json.loads(report.read_text())
    rows = [
        {"name": name, "version": version, "wheel": url.rpartition("/")[2].replace("%2B", "+"), "bytes": size}
        for name, version, url, size in found
    ]
    return sorted(rows, key=lambda row: row["name"].lower())


def fits(wheel: str, machine: str) -> bool:
    """Whether a file is a wheel for the machine, or one for any."""
    return wheel.endswith(f"_{machine}.whl") or wheel.endswith("-none-any.whl")


def canonical(requirement: str) -> str:
    """The name in a requirement, as indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def summary(rows: list[dict[str, str | int]]) -> dict[str, int]:
    """How many there are and their bytes, with and without what only a CUDA build of torch needs."""
    rest = [row for row in rows if not str(row["name"]).lower().startswith(_ACCELERATOR)]
    return {
        "wheels": len(rows),
        "bytes": sum(int(row["bytes"]) for row in rows),
        "wheels_without_cuda": len(rest),
        "bytes_without_cuda": sum(int(row["bytes"]) for row in rest),
    }


def main() -> int:
    """Print the table of each install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", choices=("aarch64", "x86_64"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there too")
    options = parser.parse_args()
    tables = {
        "machine": options.machine,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "installs": {},
    }
    for name, extras in INSTALLS.items():
        try:
            rows = wheels(requirements(extras), options.machine)
        except NoWheelError as error:
            print(f"{name} install, {options.machine}: a wheel is missing\n{error}", file=sys.stderr)
            return 1
        wrong = [row["wheel"] for row in rows if not fits(str(row["wheel"]), options.machine)]
        if wrong:
            print(f"{name} install: not for {options.machine}: {', '.join(map(str, wrong))}", file=sys.stderr)
            return 1
        tables["installs"][name] = {"total": summary(rows), "wheels": rows}
        for row in rows:
            print(f"{row['name']:32} {row['version']:14} {row['bytes']:>13,}  {row['wheel']}")
        print(f"{name} install, {options.machine}: " + json.dumps(summary(rows)) + "\n")
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
