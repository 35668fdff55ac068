"""The folder of one server: its settings, certificates, keys, register of devices, campaigns and invitation.

server.json               address and port that devices call
ca.crt server.crt         who signed the server's certificate, and that certificate; public
operator.pub              the key that signs campaigns; public
keys/                     ca.key server.key operator executor.secret; secret, without a passphrase
devices.json              the register (server/register.py)
campaigns/NAME/           settings, policy, start, signature; the server adds checkpoints and rounds
invitation/               what goes to the owner of a device; public
state/ live.json lock     of ``server run``
"""

import ipaddress
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from server.certificates import new_authority, new_certificate
from server.register import REGISTER_FILE, empty_register
from shared.errors import ServerError
from shared.files import flush_folder, private_folder, write_atomically, write_private
from shared.protocol.signing import SIGNATURE_FILE, new_key, public_key_path

DEFAULT_PORT = 9092
CAMPAIGN_FILES = ("scenario.json", "policy.json", "start.safetensors", SIGNATURE_FILE)
_SECRET_BYTES = 64
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"


def check_address(address: str) -> str:
    """The one spelling of a DNS name or an IP address.

    Raises:
        ValueError: It is neither.

    Example:
        >>> check_address("FL.Example.org"), check_address("192.0.2.7")
        ('fl.example.org', '192.0.2.7')
    """
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        name = address.lower()
    last = name.rpartition(".")[2]
    if len(name) > 253 or not re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", name) or last.isdigit():
        raise ValueError("it is neither a DNS name nor an IP address")
    return name


class ServerSettings(BaseModel):
    """Where devices find a server; public."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    address: Annotated[str, AfterValidator(check_address)]
    port: Annotated[int, Field(ge=1, le=65535)] = DEFAULT_PORT


@dataclass(frozen=True)
class ServerFolder:
    """A server's folder and where everything lies in it."""

    folder: Path
    settings: ServerSettings

    @property
    def ca_certificate(self) -> Path:
        """Of the authority that devices trust."""
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """Signs certificates."""
        return self.folder / "keys" / "ca.key"

    @property
    def certificate(self) -> Path:
        """Of the server, signed by the authority."""
        return self.folder / "server.crt"

    @property
    def certificate_key(self) -> Path:
        """Proves that a server is the certificate's."""
        return self.folder / "keys" / "server.key"

    @property
    def operator_public(self) -> Path:
        """Of the key that signs campaigns."""
        return self.folder / "operator.pub"

    @property
    def operator_key(self) -> Path:
        """Signs campaigns."""
        return self.folder / "keys" / "operator"

    @property
    def executor_secret(self) -> Path:
        """Known to whoever may take a task from the SuperLink; raw bytes."""
        return self.folder / "keys" / "executor.secret"

    @property
    def register(self) -> Path:
        """Of the devices."""
        return self.folder / REGISTER_FILE

    @property
    def campaigns(self) -> Path:
        """One folder a campaign."""
        return self.folder / "campaigns"

    @property
    def invitation(self) -> Path:
        """What the owner of a device is given."""
        return self.folder / "invitation"

    @property
    def state(self) -> Path:
        """What Flower keeps."""
        return self.folder / "state"

    @property
    def live(self) -> Path:
        """Written by a running server every few seconds."""
        return self.folder / "live.json"

    @property
    def lock(self) -> Path:
        """Held by a running server."""
        return self.folder / "lock"


def create_server(folder: Path, *, address: str, port: int = DEFAULT_PORT) -> ServerFolder:
    """Make the folder of a server, whole or not at all.

    Args:
        folder: Must not exist yet.
        address: DNS name or IP address that devices call; the certificate is for it.
        port: That devices call.

    Raises:
        ServerError: The folder exists, or address or port is none.
        OSError: The disk is full, or the place cannot be written.

    Guarantee:
        Everything secret is readable by its owner only, whatever the umask.
    """
    if os.path.lexists(folder):
        raise ServerError(f"a new server must be a new folder, {folder} exists; name another with --server.")
    settings = _checked(address=address, port=port)
    private_folder(folder.parent)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _fill(ServerFolder(temporary, settings))
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_folder(folder.parent)
    return open_server(folder)


def open_server(folder: Path) -> ServerFolder:
    """Open the folder of a server.

    Raises:
        ServerError: There is none, a file is missing, others may read its secrets, or its settings are damaged.
    """
    path = folder / "server.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ServerError(
            f"{folder} must hold a server, but does not; make one with sottovoce server init --address HOST, or name "
            "its folder with --server."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ServerError(f"{path} must be readable: {reason}.") from None
    try:
        server = ServerFolder(folder, ServerSettings.model_validate_json(text))
    except ValidationError:
        raise ServerError(f"{path} must hold the server's address and port and nothing else; it was altered.") from None
    _check_files(server)
    return server


def add_invitation(server: ServerFolder, campaign_folder: Path) -> Path:
    """Put the public files of a signed campaign into the invitation; returns where they lie.

    Args:
        server: Whose invitation.
        campaign_folder: Its name is the campaign's.

    Raises:
        ServerError: A file is missing.
        OSError: The disk is full; a campaign is in the invitation whole or not at all.
    """
    place = server.invitation / "campaigns" / campaign_folder.name
    temporary = server.folder / f".invite-{campaign_folder.name}.{os.getpid()}"  # no invitation is ever half a one
    shutil.rmtree(temporary, ignore_errors=True)
    private_folder(temporary)
    try:
        for name in CAMPAIGN_FILES:
            write_atomically(temporary / name, (campaign_folder / name).read_bytes())
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)
    except FileNotFoundError as error:
        raise ServerError(f"a campaign must be whole and signed, {error.filename} is missing.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_folder(place.parent)
    return place


def _checked(*, address: str, port: int) -> ServerSettings:
    try:
        return ServerSettings(address=address, port=port)
    except ValidationError:
        raise ServerError(
            f"a server needs a DNS name or an IP address and a port from 1 to 65535, got {address!r} and {port!r}; "
            "example: --address fl.example.org --port 9092."
        ) from None


def _fill(server: ServerFolder) -> None:
    for folder in (server.ca_key.parent, server.campaigns, server.state, server.invitation / "campaigns"):
        private_folder(folder)
    authority = new_authority()
    certificate = new_certificate(authority, server.settings.address)
    write_private(server.ca_key, authority.key_pem)
    write_private(server.certificate_key, certificate.key_pem)
    write_private(server.executor_secret, secrets.token_bytes(_SECRET_BYTES))
    new_key(server.operator_key)
    public_key_path(server.operator_key).rename(server.operator_public)
    write_private(server.register, empty_register())
    write_atomically(server.ca_certificate, authority.certificate_pem)
    write_atomically(server.certificate, certificate.certificate_pem)
    settings = (server.settings.model_dump_json(indent=2) + "\n").encode()
    write_atomically(server.folder / "server.json", settings)
    write_atomically(server.invitation / "server.json", settings)
    for public in (server.ca_certificate, server.operator_public):
        write_atomically(server.invitation / public.name, public.read_bytes())


def _check_files(server: ServerFolder) -> None:
    secret = (server.certificate_key, server.operator_key, server.executor_secret)
    public = (server.ca_certificate, server.certificate, server.operator_public, server.register)
    for path in (*secret, *public):
        if not path.is_file():
            raise ServerError(f"{server.folder} must hold {path.name}, which is missing; restore the folder's backup.")
    kept = (server.ca_key,) if server.ca_key.exists() else ()  # only a renewal needs it; it may lie elsewhere
    for path in (*secret, *kept, server.ca_key.parent):
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise ServerError(f"{path} must be readable by its owner only, got mode {mode:o}; run: chmod go= {path}.")
