"""The owner's page in a real browser: by clicks, by keys, on a phone, in the dark; it loads nothing from anywhere."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from client.dashboard.beside import open_beside
from client.home.home import Home, open_home
from client.owner.owner import history, status
from client.runtime.generation import Generator

SIZES = {"desk": {"width": 1280, "height": 800}, "phone": {"width": 360, "height": 780}}
TEXTS = (
    "Heat (1995). Action\nA rather long title of a film that nobody has ever seen, in two parts (1996). Crime, Drama"
)


@pytest.fixture(scope="module")
def prepared(homes: Any, published: Any, tiny_fleet: Path, dashboards: Any, tmp_path_factory: Any) -> Path:
    """A home that answered two rounds, agreed to two more campaigns and has two private heads, and its base."""
    folder: Path = tmp_path_factory.mktemp("prepared")
    base = homes.sign_base(tiny_fleet, published, folder / "base")
    home = dashboards.lived_in(folder / "home", homes, published, base=base)
    long = "a-campaign-with-a-very-long-name-and-without-any-space-in-it-of-the-third-quarter"
    dashboards.agree_on_paper(home, policy="ab" * 32, campaign=long)
    dashboards.agree_on_paper(home, policy="cd" * 32, campaign="Notes & answers")
    return folder


@pytest.fixture
def home(prepared: Path, homes: Any, tmp_path: Path) -> Home:
    """A copy to be changed."""
    return open_home(Path(shutil.copytree(prepared / "home", tmp_path / "home")), clock=homes.clock)


@contextmanager
def opened(browser: Any, session: Any, **settings: Any) -> Iterator[Any]:
    """The page, by its link; what it complained of, and what it asked for."""
    context = browser.new_context(**({"viewport": SIZES["desk"]} | settings))
    page = context.new_page()
    page.complaints, page.asked = [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto(session.link)
    page.wait_for_url(f"http://{session.host}{session.path()}")
    yield page
    context.close()


@pytest.fixture
def page(browser: Any, home: Home, prepared: Path, dashboards: Any) -> Iterator[Any]:
    """The page over a copy of the home."""
    with (
        dashboards.served(home, beside=open_beside(home, prepared / "base")) as session,
        opened(browser, session) as page,
    ):
        page.session, page.origin = session, f"http://{session.host}"
        yield page


def shoot(page: Any, name: str) -> None:
    """A screenshot, where somebody wants to look."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def go(page: Any, to: str = "") -> None:
    page.goto(f"{page.origin}{page.session.path(to)}")


def ask_both(page: Any) -> None:
    go(page)
    page.fill("#asked", TEXTS)
    page.click("text=Ask both")


@pytest.mark.parametrize(
    ("size", "scheme"), [("phone", "dark"), ("phone", "light"), ("desk", "light"), ("desk", "dark")]
)
def test_is_readable_and_nothing_spills(page: Any, home: Home, browsing: Any, size: str, scheme: str) -> None:
    page.set_viewport_size(SIZES[size])
    page.emulate_media(color_scheme=scheme)
    newest = [event for event in history(home) if event["event"] == "release"][-1]
    places = {
        "first": lambda: go(page),
        "history": lambda: go(page, "history"),
        "bytes": lambda: go(page, f"sent/{newest['policy']}/{newest['round']}"),
        "both": lambda: ask_both(page),
        "nothing": lambda: go(page, "receipts/none"),
    }
    for name, visit in places.items():
        visit()
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        shoot(page, f"dashboard-{name}-{size}-{scheme}")
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) <= 0, name
        assert page.evaluate(browsing.TEXT_SIZES) == [], name
        assert page.evaluate(browsing.CONTRASTS) == [], name
        if size == "phone":  # nothing is cut off, not even inside a box that scrolls
            cut = "[...document.querySelectorAll('.scroll')].filter(b => b.scrollWidth > b.clientWidth + 1).length"
            assert page.evaluate(cut) == 0, name
            small = "[...document.querySelectorAll('button, summary, select, input[type=text]')]"
            assert page.evaluate(f"{small}.filter(e => e.getBoundingClientRect().height < 44).length") == 0, name


def test_it_asks_for_nothing_and_runs_nothing(page: Any) -> None:
    ask_both(page)
    go(page, "history")
    assert page.complaints == []
    assert all(url.startswith((page.origin, "data:")) for url in page.asked)
    assert page.evaluate("document.scripts.length") == 0
    assert page.evaluate("document.cookie") == ""  # no script could read it


def test_what_is_not_on_the_page_is_forbidden_to_it(page: Any) -> None:
    go(page)
    tried = """async () => {
      const image = new Image(), style = document.createElement('style'), script = document.createElement('script');
      const loads = new Promise(done => {
        image.onload = () => done('loaded'); image.onerror = () => done('refused');
      });
      image.src = location.origin + '/x.png';
      style.textContent = 'main { display: none }';
      script.textContent = 'window.ran = true';
      document.head.append(style, script);
      const fetched = await fetch(location.href).then(() => 'loaded', () => 'refused');
      return [await loads, fetched, getComputedStyle(document.querySelector('main')).display, window.ran === true];
    }"""
    assert page.evaluate(tried) == ["refused", "refused", "block", False]


def test_by_clicks(page: Any, home: Home) -> None:
    page.click("button:text-is('Pause')")
    assert "Paused: nothing leaves" in page.inner_text("[role=status]")
    assert page.inner_text(".state .word") == "Paused"
    assert status(home)["paused"]
    page.reload()
    assert page.locator("[role=status]").count() == 0  # said once
    page.click("button:text-is('Resume')")
    assert not status(home)["paused"]
    page.click("[aria-label='Use version 1']")
    assert home.heads().current() == 1
    page.click("text=All 2 replies")
    assert page.locator("table tbody tr").count() == 2
    page.click("text=Back")
    page.click("text=Look at the bytes")
    with page.expect_download() as download:
        page.click("text=Download the very bytes")
    newest = [event for event in history(home) if event["event"] == "release"][-1]
    assert Path(download.value.path()).stat().st_size == newest["size_bytes"]
    page.click("text=Back")
    card = page.locator("article", has_text="Notes & answers")
    card.locator("summary").click()
    card.locator("button").click()
    assert status(home)["campaigns"][2]["state"] == "in force"  # the box was not ticked: the browser itself refuses
    card.locator("input[type=checkbox]").check()
    card.locator("button").click()
    assert "Withdrawn: Notes & answers" in page.inner_text("[role=status]")
    assert [campaign["state"] for campaign in status(home)["campaigns"]] == ["exhausted", "in force", "withdrawn"]


def test_both_models_by_clicks(page: Any) -> None:
    ask_both(page)
    rows = page.locator("tbody tr").all_inner_texts()
    assert len(rows) == 2
    assert all("3.00" in row for row in rows)
    assert page.input_value("#asked") == TEXTS
    page.click("text=Back")
    assert page.url.endswith(page.session.path() + "#try")
    assert page.input_value("#asked") == ""


def test_by_keys_alone(page: Any, home: Home, browsing: Any) -> None:
    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            at = page.evaluate(browsing.FOCUS)
            if at["at"] < 0:
                continue  # from the last one it goes on to the browser's own, then to the first
            assert at["outline"] != "none", at
            assert at["width"] >= 2, at
            if page.evaluate("wanted => document.activeElement.matches(wanted)", selector):
                return
        raise AssertionError(selector)

    tab_to("form[action$=pause] button")
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=status]")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "status"  # a screen reader reads it
    assert status(home)["paused"]
    tab_to("#forget summary")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("forgett")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#confirm').validity.patternMismatch")
    assert len(home.records().read()) == 12
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Forgotten: the keys first")
    assert not (home.folder / "campaigns").exists()
    shoot(page, "dashboard-forgotten")
    tab_to("#forget a[download]")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert json.loads(Path(download.value.path()).read_text())["deleted"]["records"] == 12
    tab_to("#asked")
    page.keyboard.type("Heat (1995)")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=No private head answers")


def test_a_screen_reader_finds_its_way(page: Any, browsing: Any) -> None:
    for name in ("", "history"):
        go(page, name)
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
        assert (levels[0], levels.count(1)) == (1, 1)
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert page.evaluate("document.documentElement.lang") == "en"
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        unnamed = """[...document.querySelectorAll('input:not([type=hidden]), textarea, select')]
          .filter(field => !field.labels.length).length"""
        assert page.evaluate(unnamed) == 0
        assert page.evaluate("[...document.querySelectorAll('svg')].every(bar => bar.getAttribute('aria-label'))")
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
        assert len(ids) == len(set(ids))
        buttons = page.evaluate(
            "[...document.querySelectorAll('button')].map(button => button.ariaLabel || button.textContent)"
        )
        assert len(buttons) == len(set(buttons))
        assert page.evaluate(browsing.MOUSE_ONLY) == []
        assert page.evaluate(browsing.SCROLLED_BY_MOUSE_ONLY) == []


ATTACK = """<!doctype html><title>x</title><iframe name="inside"></iframe>
<form id="pause" method="post" action="{there}pause" target="inside"><input name="form" value="x"></form>
<img src="{there}"><img src="{origin}/favicon.ico">
<script>document.getElementById('pause').submit();
fetch("{there}", {{credentials: "include", mode: "no-cors"}}).then(() => 0, () => 0);</script>"""


def test_a_page_on_another_port_learns_and_changes_nothing(page: Any, home: Home) -> None:
    seen: list[str | None] = []

    class Attacker(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["cookie"])
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            there = f"{page.origin}{page.session.path()}"  # as if it had the secret step of the path, even
            self.wfile.write(ATTACK.format(there=there, origin=page.origin).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Attacker) as attacker:
        threading.Thread(target=attacker.serve_forever, daemon=True).start()
        other = page.context.new_page()
        answers: list[tuple[str, int]] = []
        requests: list[str] = []
        other.on("request", lambda request: requests.append(request.url))
        other.on("response", lambda response: answers.append((response.url, response.status)))
        other.goto(f"http://127.0.0.1:{attacker.server_port}/")
        other.wait_for_timeout(500)
        attacker.shutdown()
    assert seen
    assert set(seen) == {None}  # the cookie stays where it belongs, although cookies know no ports
    assert len([url for url in requests if url.startswith(page.origin)]) >= 3
    codes = [code for url, code in answers if url.startswith(page.origin)]  # of the form; of others not even a code
    assert codes
    assert set(codes) <= {403, 404}
    assert not status(home)["paused"]
    go(page)
    assert page.inner_text(".state .word") == "Taking part"


def test_under_another_name_it_answers_nothing(page: Any) -> None:
    port = page.session.host.partition(":")[2]
    response = page.goto(f"http://localhost:{port}{page.session.path()}")
    assert response.status == 403
    assert "answers under no other name" in page.inner_text("main")


def test_a_second_browser_is_told_that_the_link_was_used(page: Any, browser: Any) -> None:
    context = browser.new_context()
    other = context.new_page()
    assert other.goto(page.session.link).status == 403
    assert "If it was not you who opened it, end the program" in other.inner_text("main")
    context.close()


def test_both_answers_in_words_come_as_they_are_made(
    browser: Any,
    dashboards: Any,
    tiny_llama: Any,
    tiny_lm_fleet: Any,
    tiny_texts: Any,
    browsing: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    made = dashboards.in_words(tmp_path, llama=tiny_llama, fleet=tiny_lm_fleet, texts=tiny_texts)
    beside = open_beside(made.home, made.base)
    gate, real = threading.Semaphore(0), Generator.steps

    def steps(self: Generator, token_ids: Any, **settings: Any) -> Any:
        for step in real(self, token_ids, **settings, stop_at_eos=False):
            gate.acquire(timeout=20)
            yield step

    monkeypatch.setattr(Generator, "steps", steps)
    with dashboards.served(made.home, beside=beside) as session, opened(browser, session) as page:
        page.fill("#asked", "Hi")
        page.select_option("#length", "16")
        page.click("text=Ask both", no_wait_after=True)
        gate.release(8)
        page.wait_for_url("**/try", wait_until="commit")
        browsing.wait_until(page, "document.querySelector('#personal .answer') !== null")
        assert page.locator("#base").count() == 0  # the first half is read before the second is made
        gate.release(100)
        page.wait_for_selector("text=Ask again")
        assert "16 tokens" in page.inner_text("#personal")
        assert "16 tokens" in page.inner_text("#base")
        for size in SIZES:
            page.set_viewport_size(SIZES[size])
            shoot(page, f"dashboard-words-{size}")
            left, right = page.locator("#personal").bounding_box(), page.locator("#base").bounding_box()
            assert (left["y"] == right["y"]) == (size == "desk")  # side by side where there is room
        assert page.complaints == []
