"""What the documentation site says of commands and settings, made from the program itself, and what it may load.

A page asks for it by a mark of its own line: ``<!-- commands -->`` or ``<!-- settings -->``. MkDocs calls
``on_page_markdown`` (``hooks`` in ``mkdocs.yml``); on the pages as they lie in the repository the mark shows nothing.
Once all is built, ``on_post_build`` reads every page and stylesheet: one that would load something from elsewhere is an
error.
"""

import argparse
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

from mkdocs.exceptions import PluginError
from pydantic import BaseModel

from shared.config import Scenario
from sottovoce import cli

_WIDTH = 100  # characters of a line of help


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is generated where a page asks for it; MkDocs' event of the same name."""
    for mark, make in MARKS.items():
        line = f"<!-- {mark} -->"
        if line in markdown:
            markdown = markdown.replace(line, make())
    return markdown


def on_post_build(config: Any, **_: Any) -> None:
    """Refuse a site whose pages load anything from another host; MkDocs' event of the same name.

    Raises:
        mkdocs.exceptions.PluginError: The message names what is loaded, and where.
    """
    site = Path(config["site_dir"])
    found = {str(path.relative_to(site)): loads for path in sorted(site.rglob("*.*")) if (loads := loaded(path))}
    if found:
        raise PluginError(f"the site must load nothing from elsewhere, got {found}.")


def loaded(path: Path) -> list[str]:
    """What a page or stylesheet makes a browser fetch from another host; links that a reader may follow are none."""
    if path.suffix not in (".html", ".css"):
        return []
    text = path.read_text(encoding="utf-8")
    reader = _Loads()
    if path.suffix == ".html":
        reader.feed(text)
    text = "".join(reader.styles) if path.suffix == ".html" else text
    inside = re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s;]+)""", text)
    return [*reader.found, *inside]


class _Loads(HTMLParser):
    """Collects what tags fetch, and the text of styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.styles: list[str] = []
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        for name, value in attrs:
            if name == "style":
                self.styles.append(value or "")
            fetched = name in ("src", "srcset", "data", "poster", "xlink:href") or (name == "href" and tag != "a")
            if fetched and re.search(r"(?:^|[\s,])(?:https?:)?//", value or ""):
                self.found.append(f"<{tag} {name}={value}>")
            if name == "class" and "mermaid" in (value or "").split():
                self.found.append(f"<{tag} class={value}>")  # the theme would fetch a library to draw it

    def handle_data(self, data: str) -> None:
        if self._style:
            self.styles.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._style = False


def commands() -> str:
    """Every command with its help, as Markdown; a heading each."""
    return "\n".join(
        f"## `sottovoce {' '.join(words)}`\n\n```text\n{_help(parser)}\n```\n"
        for words, parser in leaves(cli._parser())
    )


def leaves(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """The words of every command that does something, and its parser."""
    children = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not children:
        yield words, parser
    for action in children:
        for name, child in action.choices.items():
            yield from leaves(child, (*words, name))


def _help(parser: argparse.ArgumentParser) -> str:
    kind = cast(type[argparse.HelpFormatter], parser.formatter_class)
    parser.formatter_class = functools.partial(kind, width=_WIDTH)  # whatever terminal this is built in
    said = parser.format_help().rstrip().replace(str(Path.home()), "~")
    # Descriptions are left to the terminal to break, for the examples below them.
    return "\n".join(line if line.startswith(" ") else textwrap.fill(line, _WIDTH) for line in said.splitlines())


def settings() -> str:
    """Every setting of a scenario with its values, its default and the word on why, as Markdown; a table each."""
    out = ["## The scenario itself\n", _table("", Scenario)]
    for name, field in Scenario.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            out += [f"## `[{name}]`\n", f"{inspect.cleandoc(kind.__doc__ or '')}\n", _table(f"{name}.", kind)]
    return "\n".join(out)


def _table(prefix: str, model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    words = _comments(model)
    rows = ["| Setting | Values | Default | |", "|---|---|---|---|"]
    for name, found in schema["properties"].items():
        if "$ref" in found or "allOf" in found or (found.get("type") == "object" and "$defs" in schema):
            continue  # a table of its own
        default = f"`{json.dumps(found['default'])}`" if "default" in found else "must be given"
        rows.append(f"| `{prefix}{name}` | {_values(found)} | {default} | {words.get(name, '')} |")
    return "\n".join(rows) + "\n"


def _values(found: dict[str, Any]) -> str:
    """The values a setting may have, in a few words."""
    if "anyOf" in found:
        return " or ".join(_values(each) for each in found["anyOf"] if each.get("type") != "null")
    if "const" in found:
        return f"`{json.dumps(found['const'])}`"
    if "enum" in found:
        return ", ".join(f"`{json.dumps(each)}`" for each in found["enum"])
    if found.get("type") == "array":
        return "a list"
    said = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false"}
    kind = said.get(found.get("type", ""), "a table")
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {found[key]:g}" for key, sign in signs.items() if key in found]
    return " ".join([kind, ", ".join(limits)]).strip()


def _comments(model: type[BaseModel]) -> dict[str, str]:
    """The comment after each field, where the source has one on its line."""
    source = inspect.getsource(model)
    found = re.findall(r"^    (\w+):.*?  # (.*)$", source, re.MULTILINE)
    return {name: words.replace("|", "\\|").replace("<", "&lt;") for name, words in found}


MARKS: dict[str, Callable[[], str]] = {"commands": commands, "settings": settings}
