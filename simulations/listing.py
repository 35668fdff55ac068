"""Everything a scenario may name, built in or installed, with where it comes from: ``sottovoce list``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from client.personal.personalize import PERSONAL_METHODS, PersonalMethod
from client.service.conditions import CONDITIONS
from server.robust import AGGREGATORS
from shared.config import TaskConfig
from shared.datasets import READERS
from shared.errors import ScenarioError
from shared.heads.lora import FEDERATION_METHODS, TECHNIQUES, FederationMethod
from shared.metrics.language import LANGUAGE_METRICS, NEXT_UTTERANCE
from shared.metrics.preference import PREFERENCE_METRICS
from shared.metrics.ratings import METRICS
from shared.metrics.text import JUDGES, TEXT_METRICS
from shared.models.model import FAMILIES, Family
from shared.registry import BUILT_IN, describe, lookup, names, origin

SCENARIOS = Path(__file__).parent / "scenarios"
TASKS = {  # what each is; which there are, TaskConfig says
    "rating": "a number on a public scale, from a text",
    "tagging": "one of a public list of labels, for a text",
    "ranking": "which text of a public catalogue a user likes",
    "generation": "the next utterance, from what was said before",
    "preference": "which of two answers a user likes better",
}
Entries = list[dict[str, str]]


def list_choices() -> dict[str, Entries]:
    """Name, description and origin of every choice, by kind.

    An installed package that is broken is listed with what is wrong with it, and the rest with it.
    """
    return {
        "federation_methods": _registered("federation_methods", FEDERATION_METHODS, FederationMethod),
        "personal_methods": _registered("personal_methods", PERSONAL_METHODS, PersonalMethod),
        "techniques": _registered("techniques", TECHNIQUES, Callable),
        "formats": _registered("readers", READERS, Callable),
        "metrics": _of_responses() + _registered("metrics", METRICS, Callable),
        "tasks": [_entry(name, TASKS.get(name, "")) for name in get_args(TaskConfig.model_fields["name"].annotation)],
        "judges": _registered("judges", JUDGES, Callable),
        "scenarios": [_entry(path.stem, _first_comment(path)) for path in _scenarios()],
        "families": _registered("families", FAMILIES, Family),
        "aggregators": _registered("aggregators", AGGREGATORS, Callable),
        "conditions": _registered("conditions", CONDITIONS, Callable),
    }


def lines(choices: Mapping[str, Entries]) -> list[str]:
    """The same for a reader."""
    width = max(len(entry["name"]) for entries in choices.values() for entry in entries)
    out = []
    for kind, entries in choices.items():
        out.append(f"{kind.replace('_', ' ')}:")
        for entry in entries:
            where = "" if entry["origin"] == BUILT_IN else f"  [{entry['origin']}]"
            out.append(f"  {entry['name']:<{width}}  {entry['description']}{where}".rstrip())
    return out


def _of_responses() -> Entries:
    """Metrics of the tasks about answers; those they share with ratings are listed there."""
    known = {**LANGUAGE_METRICS, **NEXT_UTTERANCE, **TEXT_METRICS, **PREFERENCE_METRICS}
    return [_entry(name, each.description) for name, each in known.items() if name not in METRICS]


def _registered(kind: str, built_in: Mapping[str, Any], form: Any) -> Entries:
    return [_describe(kind, name, built_in, form) for name in names(kind, built_in)]


def _describe(kind: str, name: str, built_in: Mapping[str, Any], form: Any) -> dict[str, str]:
    where = "unusable"
    try:
        where = origin(kind, name, built_in)
        return _entry(name, describe(lookup(kind, name, built_in, form)), where)
    except ScenarioError as error:
        return _entry(name, f"cannot be used: {error}", where)


def _entry(name: str, description: str, where: str = BUILT_IN) -> dict[str, str]:
    return {"name": name, "description": description, "origin": where}


def _scenarios() -> list[Path]:
    return sorted(SCENARIOS.glob("*.toml"), key=lambda path: path.stem)


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
