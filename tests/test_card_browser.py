"""Privacy cards in a real browser: silent, self-contained, readable on a phone, on paper and by keyboard."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shared.card.card import make_card
from shared.card.sources import PAGE
from simulations.card import folder_sources

KINDS = ("published", "experiment")
SIZES = {"desk": {"width": 1280, "height": 800}, "phone": {"width": 400, "height": 844}}


@pytest.fixture(scope="module")
def addresses(published: Any, cards: Any, invented: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of two cards: of a published campaign with audits, and of a simulation."""
    folder, campaign = tmp_path_factory.mktemp("cards"), published.campaign
    audits = [
        cards.audit(campaign.policy, folder / "own.json"),
        cards.audit(campaign.policy, folder / "other.json", code_sha256="0" * 64),
    ]
    run = cards.run_folder(folder / "run", campaign.folder, invented)
    made = {
        "published": folder_sources(campaign.folder, experiment=False, audits=audits, created=cards.CREATED),
        "experiment": folder_sources(run, experiment=True, audits=audits, created=cards.CREATED),
    }
    for kind, sources in made.items():
        make_card(sources, folder / kind)
    return {kind: (folder / kind / PAGE).as_uri() for kind in made}


@pytest.fixture(scope="module", params=KINDS)
def page(browser: Any, addresses: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A card; ``page.kind``, what it complained of, and what it asked for."""
    page = browser.new_page(viewport=SIZES["phone"], color_scheme="dark")
    page.kind, page.complaints, page.asked = request.param, [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto(addresses[page.kind])
    yield page
    page.close()


@pytest.mark.parametrize(
    ("size", "scheme"), [("phone", "dark"), ("phone", "light"), ("desk", "light"), ("desk", "dark")]
)
def test_is_readable_and_nothing_spills(page: Any, browsing: Any, size: str, scheme: str) -> None:
    page.set_viewport_size(SIZES[size])
    page.emulate_media(color_scheme=scheme, media="screen")
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = false)")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"card-{page.kind}-{size}-{scheme}.png", full_page=True)
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert page.evaluate(browsing.TEXT_SIZES) == []
        assert page.evaluate(browsing.CONTRASTS) == []
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    narrow = (
        "[...document.querySelectorAll('table.cells')].filter(t => t.scrollWidth > t.parentElement.clientWidth + 1)"
    )
    assert page.evaluate(f"{narrow}.length") == 0  # a number and its source are read without scrolling


def test_it_asks_for_nothing_and_runs_nothing(page: Any, addresses: dict[str, str]) -> None:
    assert page.complaints == []
    assert page.asked[0] == addresses[page.kind]
    assert all(address.startswith("data:") for address in page.asked[1:])
    assert page.evaluate("document.scripts.length") == 0
    policy = page.evaluate("document.querySelector('meta[http-equiv]').content")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_claim_and_three_gaps_are_seen_first(page: Any) -> None:
    page.set_viewport_size(SIZES["desk"])
    page.emulate_media(media="screen")
    page.evaluate("scrollTo(0, 0)")
    assert page.locator("#first-gaps li").count() == 3
    assert page.locator(".box .claim").bounding_box()["y"] < SIZES["desk"]["height"] * 0.6
    assert "NO POWER" in page.locator("#verdict").inner_text()
    assert page.locator(".box .claim .num").first.get_attribute("title").startswith("exp of policy.json#/epsilon")


def test_an_experiment_cannot_be_overlooked(page: Any) -> None:
    band = page.locator(".band")
    assert band.count() == (page.kind == "experiment")
    assert page.title().startswith("EXPERIMENT") == (page.kind == "experiment")
    if page.kind == "experiment":
        page.emulate_media(media="screen")
        page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
        assert abs(band.bounding_box()["y"]) <= 1  # it stays in sight
        page.emulate_media(media="print")
        marked = "getComputedStyle(document.querySelector('.experiment h2'), '::before').content"
        assert "EXPERIMENT" in page.evaluate(marked)
        page.emulate_media(media="screen")


def test_a_screen_reader_finds_its_way(page: Any, browsing: Any) -> None:
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.evaluate("document.documentElement.lang") == "en"
    tables = page.evaluate(
        "[...document.querySelectorAll('table')].map(table => [table.caption.textContent,"
        " table.closest('[role=region]').ariaLabel, [...table.querySelectorAll('th')].every(head => head.scope)])"
    )
    assert len(tables) >= 7
    assert all(caption and label == caption and scoped for caption, label, scoped in tables)
    assert page.evaluate(browsing.MOUSE_ONLY) == []
    assert page.evaluate(browsing.SCROLLED_BY_MOUSE_ONLY) == []
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = false)")
    for part in page.locator("summary").all():
        part.focus()
        page.keyboard.press("Enter")
    assert page.evaluate("[...document.querySelectorAll('details')].every(part => part.open)")
