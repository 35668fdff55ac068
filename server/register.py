"""The register of a server's devices: who may take part, with which key, in which seat.

A device keeps its seat for ever, and so does a revoked one: seats, names and keys are never given twice.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import ServerError
from shared.files import locked_folder, write_private
from shared.protocol.enrolment import check_public_key

REGISTER_FILE = "devices.json"
_FORMAT: Literal["sottovoce devices 1"] = "sottovoce devices 1"
_MAX_KEY_BYTES = 4096
_CERTIFICATE_BYTES = 64


def _check_certificate(text: str) -> str:
    raw = base64.b64decode(text, validate=True)
    if len(raw) != _CERTIFICATE_BYTES or base64.b64encode(raw).decode() != text:
        raise ValueError("it is no signature in canonical base64")
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Device(_Strict):
    """An entry of the register.

    Attributes:
        name: What the operator calls it.
        public_key: OpenSSH line without a comment.
        seat: 0, 1, 2, …; what the rounds know it by.
        enrolled: When.
        revoked: When, or None while it may take part.
        certificate: The operator's, of seat and key, in base64 (``server.credentials``); None until it is made.
    """

    name: Annotated[str, Field(pattern=r"\A[A-Za-z0-9._-]{1,64}\z")]
    public_key: Annotated[str, AfterValidator(check_public_key)]
    seat: Annotated[int, Field(ge=0)]
    enrolled: AwareDatetime
    revoked: AwareDatetime | None = None
    certificate: Annotated[str, AfterValidator(_check_certificate)] | None = None


class _Register(_Strict):
    format: Literal["sottovoce devices 1"] = _FORMAT
    devices: tuple[Device, ...] = ()

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        if [device.seat for device in self.devices] != list(range(len(self.devices))):
            raise ValueError("seats must be 0, 1, 2, … in order")
        for field in ("name", "public_key"):
            if len({getattr(device, field) for device in self.devices}) != len(self.devices):
                raise ValueError(f"a {field} stands in it twice")
        return self


def empty_register() -> bytes:
    """The file of a server without devices."""
    return _as_file(_Register())


def read_register(folder: Path) -> tuple[Device, ...]:
    """Every device that was ever enrolled, by seat; see ``Device.revoked``.

    Args:
        folder: Of the server.

    Raises:
        ServerError: The register is missing or damaged.
    """
    path = folder / REGISTER_FILE
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text, object_pairs_hook=_unique)  # pydantic would take the last of two
        return _Register.model_validate_json(text).devices
    except FileNotFoundError:
        raise ServerError(f"{path} must hold the register of devices, it is missing; restore a backup.") from None
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, wrong["loc"])) or "the whole"
        raise ServerError(f"{path} must be a register, it is damaged: {place}: {wrong['msg']}.") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON that all readers understand alike"
        raise ServerError(f"{path} must be a readable register: {reason}.") from None


def enrol(folder: Path, public_key: str | Path, name: str, *, now: datetime) -> Device:
    """Enter a device, in the next free seat.

    Args:
        folder: Of the server.
        public_key: File of the device's public key, or its one line.
        name: 1 to 64 letters, digits, dots, hyphens and underscores; never given twice.
        now: The time.

    Raises:
        ServerError: Name or key is none or is known already, or the register is damaged; nothing is written.

    Guarantee:
        However many enrol at once, each device has a seat of its own, and none is lost.
    """
    line = _read_key(public_key)

    def add(devices: tuple[Device, ...]) -> tuple[tuple[Device, ...], Device]:
        _check_new(devices, line, name)
        try:
            device = Device(name=name, public_key=line, seat=len(devices), enrolled=_whole(now))
        except ValidationError:
            raise ServerError(
                f"--name must be 1 to 64 of letters, digits, '.', '_' and '-', got {name!r}; example: --name kitchen."
            ) from None
        return (*devices, device), device

    return _change(folder, add)


def revoke(folder: Path, name: str, *, now: datetime) -> Device:
    """Shut a device out for ever; its key cannot be enrolled again, and its seat stays empty.

    Raises:
        ServerError: No such device, or it is revoked already, or the register is damaged; nothing is written.
    """

    def end(devices: tuple[Device, ...]) -> tuple[tuple[Device, ...], Device]:
        for device in devices:
            if device.name == name:
                break
        else:
            raise ServerError(f"no device is called {name!r}; sottovoce server devices lists them.")
        if device.revoked:
            raise ServerError(f"device {name!r} must not be revoked twice, it was on {device.revoked:%Y-%m-%d}.")
        ended = device.model_copy(update={"revoked": _whole(now)})
        return (*devices[: device.seat], ended, *devices[device.seat + 1 :]), ended

    return _change(folder, end)


def fill_certificates(folder: Path, certify: Callable[[Device], bytes]) -> tuple[Device, ...]:
    """Give a certificate to every device that has none and is not revoked.

    Args:
        folder: Of the server.
        certify: Makes the certificate of a device.

    Returns:
        Every device, as ``read_register``.

    Raises:
        ServerError: The register is damaged; nothing is written.
    """
    with locked_folder(folder):
        before = read_register(folder)
        after = tuple(
            device if device.certificate or device.revoked else _with_certificate(device, certify(device))
            for device in before
        )
        if after != before:
            write_private(folder / REGISTER_FILE, _as_file(_Register(devices=after)))
    return after


def _with_certificate(device: Device, certificate: bytes) -> Device:
    return device.model_copy(update={"certificate": base64.b64encode(certificate).decode()})


def key_fingerprint(public_key: str) -> str:
    """A device key's fingerprint as ``ssh-keygen -l`` shows it, to be compared with what the device's owner sees."""
    digest = hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _change(folder: Path, change: Callable[[tuple[Device, ...]], tuple[tuple[Device, ...], Device]]) -> Device:
    with locked_folder(folder):
        devices, changed = change(read_register(folder))
        write_private(folder / REGISTER_FILE, _as_file(_Register(devices=devices)))
    return changed


def _as_file(register: _Register) -> bytes:
    return (register.model_dump_json(indent=2) + "\n").encode()


def _read_key(public_key: str | Path) -> str:
    text = str(public_key)
    if isinstance(public_key, Path) or not text.startswith("ecdsa-"):
        try:
            with Path(public_key).open("rb") as file:
                text = file.read(_MAX_KEY_BYTES).decode()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ServerError(f"a device's public key must be readable: {reason} ({public_key}).") from None
    try:
        return check_public_key(text)
    except ValueError as error:
        raise ServerError(
            f"a device is enrolled by its public key: {error}; ask its owner for the device.pub that "
            "'sottovoce client init' made."
        ) from None


def _check_new(devices: tuple[Device, ...], line: str, name: str) -> None:
    for device in devices:
        if device.public_key == line:
            state = "revoked for ever" if device.revoked else "enrolled already"
            raise ServerError(f"this key is {state}, as device {device.name!r}; a device that returns needs a new key.")
        if device.name == name:
            raise ServerError(f"a device is called {name!r} already, seat {device.seat}; a name is never given twice.")


def _whole(now: datetime) -> datetime:
    return now.replace(microsecond=0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands in it twice")
    return content
