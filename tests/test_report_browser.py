"""Report and comparison in a real browser: silent, self-contained, readable on a phone, usable by keyboard."""

import os
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from simulations.report.compare import read_runs, write_comparison
from simulations.report.report import write_report

PLOTS = {"report": 5, "comparison": 2}  # on the page
SIZES = {"desk": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
CONTROLS = "a[href], button, input, select, textarea, summary, [tabindex]"

TEXT_SIZES = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), small = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.getClientRects().length || element.closest('script')) continue;
    if (parseFloat(getComputedStyle(element).fontSize) < 12) small.push(walker.currentNode.data);
  }
  return small;
}"""
# WCAG 2: contrast of a text with what is painted behind it; 4.5 is level AA for text of this size.
CONTRASTS = """() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const element of document.querySelectorAll('main *')) {
    const svg = element instanceof SVGElement;
    const words = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (svg ? element.tagName !== 'text' : !words) continue;
    if (!element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(parse(svg ? style.fill : style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push([ratio, element.textContent]);
  }
  return poor;
}"""
FOCUS = f"""() => {{
  const element = document.activeElement, style = getComputedStyle(element);
  const all = [...document.querySelectorAll('{CONTROLS}')].filter(e => e.tabIndex >= 0
    && e.checkVisibility({{contentVisibilityAuto: true}}));
  return {{at: all.indexOf(element), of: all.length, outline: style.outlineStyle,
    width: parseFloat(style.outlineWidth)}};
}}"""
MOUSE_ONLY = f"""[...document.querySelectorAll('main *')].filter(e => getComputedStyle(e).cursor === 'pointer'
  && e.getClientRects().length && !e.closest('{CONTROLS}')).map(e => e.outerHTML)"""
SCROLLED_BY_MOUSE_ONLY = """[...document.querySelectorAll('main *')].filter(e => e.tabIndex < 0
  && e.scrollWidth > e.clientWidth + 1 && e.clientWidth && /auto|scroll/.test(getComputedStyle(e).overflowX))
  .map(e => e.outerHTML.slice(0, 80))"""
SPILT = """[...document.querySelectorAll('svg.main-svg, svg.main-svg text')].filter(mark => {
  const box = mark.getBoundingClientRect(), place = mark.closest('figure').getBoundingClientRect();
  return box.right > place.right + 1 || box.left < place.left - 1;
}).map(mark => mark.textContent)"""
COVERED = """[...document.querySelectorAll('figure')].filter(figure =>
  figure.querySelector('.legend').getBoundingClientRect().bottom
  > figure.querySelector('.nsewdrag').getBoundingClientRect().top + 1).map(figure => figure.textContent)"""
INK = "getComputedStyle(document.querySelector('.xtitle')).fill"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, invented: Any) -> dict[str, str]:
    """Addresses of a report, over several seeds, and of a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    first = invented.invented_run(folder / "strict", epsilon=2.0)
    second = invented.invented_run(
        folder / "loose-with-a-rather-long-name-of-its-folder", better_by=0.02, seeds=(1, 2, 3)
    )
    invented.add_membership(second, null=0.53)
    invented.add_answers(second)
    third = invented.invented_run(folder / "bare", epsilon=None, better_by=0.03)
    comparison = write_comparison(read_runs([first, second, third]), out=folder / "comparison.html")
    found = {"report": write_report(second), "comparison": comparison}
    return {kind: path.as_uri() for kind, path in found.items()}


def wait_until(page: Any, condition: str, argument: Any = None) -> None:
    """Wait for a condition in the page; playwright's own waiting evaluates strings there, which the page forbids."""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition, argument):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


@pytest.fixture(scope="module", params=PLOTS)
def opened(browser: Any, pages: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page whose plots are drawn; ``page.kind``, what it complained of, and what it asked for."""
    page = browser.new_page(viewport=SIZES["phone"], color_scheme="dark")
    page.kind, page.complaints, page.asked = request.param, [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto(pages[page.kind])
    wait_until(page, f"document.querySelectorAll('.js-plotly-plot .xaxislayer-above').length === {PLOTS[page.kind]}")
    yield page
    page.close()


@pytest.fixture
def page(opened: Any) -> Any:
    """The page as it was when it was opened, on a phone, in the dark."""
    opened.set_viewport_size(SIZES["phone"])
    opened.emulate_media(color_scheme="dark", reduced_motion="no-preference")
    opened.evaluate(
        """() => {
          document.querySelectorAll('details').forEach(part => part.open = false);
          document.querySelectorAll('.scroll').forEach(box => box.scrollLeft = 0);
          document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex');
          scrollTo(0, 0);
        }"""
    )
    return opened


@pytest.mark.parametrize(("size", "scheme"), [("phone", "dark"), ("desk", "light")])
def test_is_readable_and_nothing_spills(page: Any, size: str, scheme: str) -> None:
    before = page.evaluate(INK)
    page.set_viewport_size(SIZES[size])
    page.emulate_media(color_scheme=scheme)
    if scheme == "light":
        wait_until(page, f"before => {INK} !== before", before)  # the plots follow
    wait_until(
        page,
        "[...document.querySelectorAll('figure')].every(figure => Math.abs(figure.clientWidth"
        " - figure.querySelector('svg.main-svg').clientWidth) < 2)",
    )
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{page.kind}-{size}-{scheme}.png", full_page=True)
    assert page.evaluate(INK) == page.evaluate("getComputedStyle(document.body).color")
    assert page.evaluate(SPILT) == []
    assert page.evaluate(COVERED) == []
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert page.evaluate(TEXT_SIZES) == []
        assert page.evaluate(CONTRASTS) == []
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")


def test_plots_are_drawn_and_nothing_is_asked_for(page: Any, pages: dict[str, str]) -> None:
    drawn = page.evaluate(
        "[...document.querySelectorAll('figure')].map(figure =>"
        " [figure.querySelectorAll('svg.main-svg').length, figure.querySelectorAll('.trace').length])"
    )
    assert len(drawn) == PLOTS[page.kind]
    assert all(svgs >= 1 and traces >= 1 for svgs, traces in drawn)
    assert page.complaints == []
    assert page.asked[0] == pages[page.kind]
    assert all(address.startswith(("data:", "blob:")) for address in page.asked[1:])


def test_tab_reaches_every_control_in_order_and_shows_where(page: Any) -> None:
    seen = []
    while not seen or len(seen) < seen[-1]["of"]:
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUS))
    assert len(seen) >= 4
    assert [one["at"] for one in seen] == list(range(len(seen)))
    assert all(one["outline"] == "solid" and one["width"] >= 2 for one in seen)
    assert page.evaluate(MOUSE_ONLY) == []


def test_tables_scroll_and_parts_open_by_keyboard(page: Any) -> None:
    wide = page.evaluate(
        "[...document.querySelectorAll('.scroll')].findIndex(box =>"
        " box.checkVisibility({contentVisibilityAuto: true}) && box.scrollWidth > box.clientWidth + 20)"
    )
    page.locator(".scroll").nth(wide).focus()
    page.keyboard.press("ArrowRight")
    wait_until(page, "at => document.querySelectorAll('.scroll')[at].scrollLeft > 0", wide)
    for part in page.locator("summary").all():
        part.focus()
        page.keyboard.press("Enter")
    assert page.evaluate("[...document.querySelectorAll('details')].every(part => part.open)")
    assert page.evaluate(SCROLLED_BY_MOUSE_ONLY) == []


def test_a_screen_reader_finds_its_way(page: Any) -> None:
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.evaluate("document.documentElement.lang") == "en"
    outside = page.evaluate(
        "[...document.body.children].filter(e => e.tagName !== 'SCRIPT' && e.id !== 'js-plotly-tester')"
        ".map(e => e.tagName)"
    )
    assert outside == ["MAIN"]
    labels = page.evaluate("[...document.querySelectorAll('[role=img]')].map(image => image.ariaLabel)")
    assert len(labels) == PLOTS[page.kind]
    assert all(re.search(r"\d", label) for label in labels)  # numbers, not only a title
    tables = page.evaluate(
        "[...document.querySelectorAll('table')].map(table => [table.caption.textContent,"
        " table.closest('[role=region]').ariaLabel, [...table.querySelectorAll('th')].every(head => head.scope)])"
    )
    assert len(tables) >= 4
    assert all(caption and label == caption and scoped for caption, label, scoped in tables)


def test_reduced_motion_is_respected(page: Any) -> None:
    style = page.add_style_tag(content="main { transition: opacity 2s; animation: turn 2s; scroll-behavior: smooth }")
    asked = "['transitionDuration', 'animationName', 'scrollBehavior'].map(key => getComputedStyle(main)[key])"
    found = {}
    for wish in ("reduce", "no-preference"):
        page.emulate_media(reduced_motion=wish)
        found[wish] = page.evaluate(f"() => {{ const main = document.querySelector('main'); return {asked} }}")
    style.evaluate("style => style.remove()")
    assert found == {"reduce": ["0s", "none", "auto"], "no-preference": ["2s", "turn", "smooth"]}
