"""Every dependency of a device has a wheel for 64-bit Arm Linux, by the metadata that pip resolves with."""

import json
from pathlib import Path

import pytest

MEASURED = Path(__file__).parents[1] / "docs" / "measurements"
GUIDE = (MEASURED.parent / "deploy.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
def test_the_tables_are_whole_and_the_guide_quotes_them(wheels, machine):
    found = json.loads((MEASURED / f"wheels-{machine}.json").read_text(encoding="utf-8"))
    assert found["machine"] == machine
    for name, extras in wheels.INSTALLS.items():
        rows = found["installs"][name]["wheels"]
        assert all(wheels.fits(row["wheel"], machine) and row["bytes"] > 0 for row in rows)
        assert found["installs"][name]["total"] == wheels.summary(rows)
        needed = {wheels.canonical(requirement) for requirement in wheels.requirements(extras)}
        assert needed <= {wheels.canonical(row["name"]) for row in rows}
        total = found["installs"][name]["total"]
        assert f"{total['wheels_without_cuda']} wheels, {total['bytes_without_cuda'] / 1e6:.0f} MB" in GUIDE


def test_a_wheel_of_another_machine_does_not_fit(wheels):
    assert wheels.fits("a-1-py3-none-any.whl", "aarch64")
    assert wheels.fits("a-1-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl", "aarch64")
    assert not wheels.fits("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", "aarch64")
    assert not wheels.fits("a-1.tar.gz", "aarch64")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pip_finds_a_wheel_of_everything_for_arm(wheels):
    try:
        wheels.wheels(["numpy"], "aarch64")
    except wheels.NoWheelError:
        pytest.skip("pip reaches no index")
    with pytest.raises(wheels.NoWheelError, match="no-such-package-of-sottovoce"):
        wheels.wheels(["no-such-package-of-sottovoce"], "aarch64")
    rows = wheels.wheels(wheels.requirements(("train",)), "aarch64")
    assert len(rows) > 50
    assert all(wheels.fits(str(row["wheel"]), "aarch64") for row in rows)
