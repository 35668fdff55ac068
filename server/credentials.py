"""What shows the devices of a secure sum who the others are: the register's keys, certified by the operator.

``server enrol`` certifies a device; one that was enrolled by a version without certificates is certified when they are
first asked for. A revoked device gets none and is left out: the others cannot know that its certificate is void.
"""

import base64

from server.folder import ServerFolder
from server.register import Device, fill_certificates, read_register
from shared.errors import SecureSumError, ServerError
from shared.protocol.enrolment import certify_device, check_certificate
from shared.protocol.signing import load_private, load_public
from shared.secure_sum.messages import Credential


def certify_devices(server: ServerFolder) -> tuple[Device, ...]:
    """Certify every device that has no certificate and is not revoked; returns the whole register.

    Raises:
        ServerError: The register is damaged, or the operator's key is not the one devices know.
        PrivacyError: The operator's key cannot be read.
    """
    key = load_private(server.operator_key)
    if key.public_key() != load_public(server.operator_public):
        raise ServerError(
            f"{server.operator_public} must be the public half of {server.operator_key}, it is not: devices would "
            "refuse each other; restore both from one backup."
        )
    return fill_certificates(
        server.folder, lambda device: certify_device(key, seat=device.seat, public_key=device.public_key)
    )


def credentials(server: ServerFolder) -> dict[int, Credential]:
    """Key and certificate of every device that may take part, by seat; those that are missing are made.

    Args:
        server: The server's folder.

    Raises:
        ServerError: A certificate does not hold, the register is damaged, or as ``certify_devices``.
        PrivacyError: The operator's key cannot be read.

    Guarantee:
        Every device that agreed to a campaign of this server's operator accepts every one of them.
    """
    devices = read_register(server.folder)
    if any(device.certificate is None and device.revoked is None for device in devices):
        devices = certify_devices(server)
    operator, found = load_public(server.operator_public), {}
    for device in devices:
        if device.revoked is not None or device.certificate is None:
            continue
        certificate = base64.b64decode(device.certificate)
        try:
            check_certificate(operator, seat=device.seat, public_key=device.public_key, certificate=certificate)
        except SecureSumError:
            raise ServerError(
                f"{server.register} must hold certificates of this server's operator, that of device {device.name!r} "
                'is none; restore a backup, or remove its "certificate" to have it made anew.'
            ) from None
        found[device.seat] = Credential(device.public_key, certificate)
    return found
