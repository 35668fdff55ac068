"""What a home's service is doing, in words for its owner."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.owner.words import plain


def service_line(home: Path) -> str | None:
    """What the home's service is doing, for ``status``; None where none runs."""
    from shared.errors import StoreError

    try:
        from client.service.control import control_client

        with control_client(home) as client:
            if client is None:
                return None
            service = client.status()["service"]
    except ImportError:  # the base install has no grpc, and no service
        return None
    except StoreError as error:
        return f"service: {error}"
    return f"service: {service['state']}, since {service['since']} (pid {service['pid']:.0f}){_waiting_for(service)}"


def _waiting_for(service: Mapping[str, Any]) -> str:
    """Why a service is away, or when it tries again."""
    if service["unmet"]:
        return "; " + "; ".join(f"{plain(name)}: {plain(reason)}" for name, reason in service["unmet"].items())
    if service["retry"]:
        return f"; failed {service['retry']['failures']:.0f} times, tries again in {service['retry']['in_s']:.0f} s"
    return ""
