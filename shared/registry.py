"""Choices by name: the built-in ones of a plain dict, joined with those that installed packages register.

A package extends Sottovoce by entry points, one group a kind (``docs/extending.md``):

    [project.entry-points."sottovoce.readers"]
    diary = "my_package:read_diary"

Nothing of a package is imported before its name is asked for, and nothing that is broken is passed over in silence.
"""

import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from shared.errors import ScenarioError

KINDS = {
    "federation_methods": "federation method",
    "personal_methods": "personal method",
    "techniques": "technique",
    "families": "model family",
    "readers": "data format",
    "metrics": "metric",
    "judges": "judge",
    "aggregators": "aggregation rule",
    "conditions": "condition",
}
BUILT_IN = "built-in"
_T = TypeVar("_T")


def names(kind: str, built_in: Iterable[str]) -> tuple[str, ...]:
    """Every name of a kind: the built-in ones in their order, then the installed ones."""
    own = tuple(built_in)
    return own + tuple(sorted({entry.name for entry in _entries(kind)} - set(own)))


def check_name(kind: str, name: str, built_in: Iterable[str], *, setting: str = "") -> EntryPoint | None:
    """The entry point behind a name, None where it is built in; imports nothing of a package.

    Args:
        kind: A key of ``KINDS``.
        name: What a scenario says.
        built_in: The names that are ours.
        setting: How the scenario spells the choice, for the message.

    Raises:
        ScenarioError: Nobody registers the name, or more than one does.
    """
    own = tuple(built_in)
    found = [entry for entry in _entries(kind) if entry.name == name]
    if name in own and found:
        raise ScenarioError(
            f"{KINDS[kind]} {name!r} is built in, and {_package(found[0])} registers it too; uninstall that package."
        )
    if len(found) > 1:
        packages = " and ".join(_package(entry) for entry in found)
        raise ScenarioError(f"{KINDS[kind]} {name!r} must be registered once, got {packages}; uninstall one of them.")
    if name not in own and not found:
        raise ScenarioError(f"{setting or KINDS[kind]} must be {_one_of(names(kind, own))}, got {name!r}.")
    return found[0] if found else None


def lookup(kind: str, name: str, built_in: Mapping[str, _T], form: Any) -> _T:
    """What a name stands for.

    Args:
        kind: A key of ``KINDS``.
        name: What a scenario says.
        built_in: The ones that are ours.
        form: Class (or runtime protocol) that one from outside must be an instance of.

    Raises:
        ScenarioError: Nobody registers the name or more than one does, or what is registered cannot be imported or is
            not of the form.
    """
    entry = check_name(kind, name, built_in)
    if entry is None:
        return built_in[name]
    try:
        found = entry.load()
    except Exception as error:  # importing a package runs its code, which may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise ScenarioError(
            f"{KINDS[kind]} {name!r} of {_package(entry)} cannot be imported from {entry.value}: "
            f"{type(error).__name__}: {reason}. Mend or uninstall the package."
        ) from error
    if not isinstance(found, form):
        raise ScenarioError(
            f"{KINDS[kind]} {name!r} of {_package(entry)} must be a {form.__name__}, got {type(found).__name__} "
            f"from {entry.value}; see docs/extending.md."
        )
    checked: _T = found
    return checked


def origin(kind: str, name: str, built_in: Iterable[str]) -> str:
    """``built-in``, or the package a name comes from with its version.

    Raises:
        ScenarioError: Nobody registers the name, or more than one does.
    """
    entry = check_name(kind, name, built_in)
    return _package(entry) if entry else BUILT_IN


def extension(kind: str, name: str, built_in: Iterable[str]) -> str | None:
    """``model family 'x' of PACKAGE VERSION``; None for what is built in."""
    where = origin(kind, name, built_in)
    return None if where == BUILT_IN else f"{KINDS[kind]} {name!r} of {where}"


def describe(thing: object) -> str:
    """One line on a registered thing: its ``summary``, else the first line of its docstring."""
    text = getattr(thing, "summary", None) or getattr(thing, "__doc__", None) or ""
    return str(text).strip().partition("\n")[0]


def _entries(kind: str) -> tuple[EntryPoint, ...]:
    return _installed(f"sottovoce.{kind}", tuple(sys.path))


@lru_cache(maxsize=64)
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points of every package on the path, which is an argument because the answer depends on it."""
    del path
    return tuple(entry_points(group=group))


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a package without metadata"


def _one_of(choices: tuple[str, ...]) -> str:
    quoted = [repr(choice) for choice in choices]
    return " or ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))
