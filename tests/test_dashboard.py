"""The owner's page: who is let in, what it shows, and that its forms do what the commands do and nothing else."""

import asyncio
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import date
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from client.dashboard.beside import NO_HEAD, Compared, Numbers, open_beside
from client.dashboard.guard import Session
from client.dashboard.parts import POLICY
from client.dashboard.server import build_page
from client.dashboard.trial import numbers_page
from client.home.home import open_home
from client.owner.owner import history, set_paused, status
from client.owner.verify import open_home_base, open_personal
from client.runtime.generation import Generator
from client.serve.models import open_models
from client.serve.server import build_app
from client.service.control import serve_control
from client.service.join import Service
from shared.errors import HeadError, StoreError
from sottovoce.cli import main


@pytest.fixture(scope="module")
def prepared(homes, published, tiny_fleet, dashboards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    base = homes.sign_base(tiny_fleet, published, folder / "base")
    dashboards.lived_in(folder / "home", homes, published, base=base)
    return folder


@pytest.fixture
def home(prepared, homes, tmp_path):
    """A copy of a home that answered two rounds and has two versions of a private head."""
    return open_home(Path(shutil.copytree(prepared / "home", tmp_path / "home")), clock=homes.clock)


@pytest.fixture
def page(home, dashboards):
    with dashboards.entered(home) as page:
        yield page


@pytest.fixture(scope="module")
def words(tiny_llama, tiny_lm_fleet, tiny_texts, dashboards, tmp_path_factory):
    made = dashboards.in_words(
        tmp_path_factory.mktemp("words"), llama=tiny_llama, fleet=tiny_lm_fleet, texts=tiny_texts
    )
    return SimpleNamespace(home=made.home, base=made.base, beside=open_beside(made.home, made.base))


def seen(response):
    """The words of a page, one line."""
    assert response.status_code == 200, response.text
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", response.text, flags=re.DOTALL)).split())


# who is let in


def test_the_link_opens_once_and_only_its_browser_comes_back(page):
    session = page.session
    assert "What this device does" in page.http.get(session.path()).text
    with httpx.Client(transport=page.http._transport, base_url=page.origin) as other:
        assert other.get(session.path()).status_code == 403
        stolen = other.get(session.link)
        assert stolen.status_code == 403
        assert "set-cookie" not in stolen.headers
        assert other.get(session.path(), headers={"cookie": "sottovoce=" + "x" * 43}).status_code == 403
        assert other.get(session.path(), headers={"cookie": f"sottovoce={session.cookie}"}).status_code == 200
    assert page.http.get(session.link).status_code == 200  # its own browser may come by the link again


def test_a_link_is_not_used_up_by_who_does_not_open_it(home, dashboards):
    session = Session("127.0.0.1:8123")
    with httpx.Client(
        transport=dashboards.InProcess(build_page(home, session)), base_url="http://127.0.0.1:8123"
    ) as http:
        assert http.head(session.link).status_code == 403
        assert http.get(session.link[:-1] + "-").status_code == 403
        assert http.post(session.link).status_code == 403
        assert not session.opened
        response = http.get(session.link)
        assert response.status_code == 200
        cookie = response.headers["set-cookie"]
        assert f"Path={session.path()}" in cookie  # no server on another port is sent it
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8123"},
        {"host": "localhost:8123"},
        {"host": "127.0.0.1"},
        {"host": "127.0.0.1:9000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"cookie": ""},
    ],
)
def test_no_other_name_and_no_other_page_sees_anything(page, headers):
    response = page.http.get(page.session.path(), headers=headers)
    assert response.status_code == 403
    assert "Spent and left" not in response.text
    assert page.session.form not in response.text


def test_paths_without_the_secret_step_are_nothing(page):
    for path in ("/", "/pause", f"/{page.session.place[:-1]}/", f"/{page.session.place}", "//" + page.session.place):
        assert page.http.get(path).status_code == 404
    assert page.http.get(page.session.path("nothing")).status_code in (404, 405)
    assert page.post("nothing").status_code == 404
    assert page.http.get(page.session.path("pause")).status_code == 405  # a link changes nothing


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({"origin": None}, {}),
        ({"origin": "null"}, {}),
        ({"origin": "http://evil.example"}, {}),
        ({"origin": "http://127.0.0.1:9000"}, {}),
        ({"sec-fetch-site": "same-site"}, {}),
        ({}, {"form": None}),
        ({}, {"form": ""}),
        ({}, {"form": "x" * 43}),
        ({"content-type": "text/plain"}, {}),
        ({"content-type": "multipart/form-data; boundary=x"}, {}),
    ],
)
def test_only_a_form_of_this_page_changes_anything(page, home, headers, fields):
    data = {"form": page.session.form} | fields
    sent = {"origin": page.origin, "content-type": "application/x-www-form-urlencoded"} | headers
    body = "&".join(f"{name}={value}" for name, value in data.items() if value is not None)
    response = page.http.post(
        page.session.path("pause"), content=body, headers={k: v for k, v in sent.items() if v is not None}
    )
    assert response.status_code == 403
    assert not status(home)["paused"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"form=%FF&x=1", 403),
        (b"\xff\xfe", 403),
        (b"form", 403),
        (b"&".join(b"a%d=1" % n for n in range(40)), 403),
        (b"form=TOKEN&form=TOKEN", 403),
        (b"a" * (2**20 + 1), 413),
    ],
)
def test_bytes_that_are_no_form_change_nothing(page, home, body, code):
    body = body.replace(b"TOKEN", page.session.form.encode())
    headers = {"origin": page.origin, "content-type": "application/x-www-form-urlencoded"}
    assert page.http.post(page.session.path("pause"), content=body, headers=headers).status_code == code
    assert not status(home)["paused"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=200)
    | st.lists(st.sampled_from(["form=", "TOKEN", "&", "=", "%", "%0", "sure=yes", "confirm=forget", "\r\n", ";"])).map(
        lambda parts: "".join(parts).encode()
    ),
    action=st.sampled_from(["pause", "withdraw", "rollback", "forget", "try", "..%2f", "%00", "\u00e9"]),
    kind=st.sampled_from(["application/x-www-form-urlencoded", "application/x-www-form-urlencoded; charset=x", ""]),
)
def test_any_bytes_are_a_form_or_refused_in_words(page, body, action, kind):
    headers = {"origin": page.origin, "content-type": kind}
    body = body.replace(b"TOKEN", page.session.form.encode())
    response = page.http.post(page.session.path(action), content=body, headers=headers)
    assert response.status_code in (303, 400, 403, 404, 405)
    assert "traceback" not in response.text.lower()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.text(st.characters(codec="utf-8"), max_size=40),
    cookie=st.binary(max_size=60),
    host=st.sampled_from([b"127.0.0.1:8123", b"127.0.0.1:8123.evil.example", b"127.0.0.1:8123@evil", b"", b"\xff"]),
)
def test_whatever_is_asked_without_the_cookie_is_refused(home, path, cookie, host):
    session, answers = Session("127.0.0.1:8123"), []
    scope = {
        "type": "http",
        "method": "GET",
        "path": session.path(path),
        "headers": [(b"host", host), (b"cookie", cookie)],
    }

    async def send(message):
        answers.append(message)

    asyncio.run(build_page(home, session)(scope, None, send))
    assert answers[0]["status"] == 403
    assert not session.opened


def test_every_answer_forbids_to_load_run_frame_or_keep_anything(page):
    answers = [
        page.http.get(page.session.path()),
        page.http.get("/"),
        page.http.get(page.session.path(), headers={"host": "evil.example"}),
        page.http.get(page.session.path("nothing")),
        page.post("pause", form="wrong"),
        page.http.get(page.session.link),
    ]
    for response in answers:
        assert response.headers["content-security-policy"] == POLICY
        assert "script" not in POLICY  # none may run
        assert "default-src 'none'" in POLICY
        assert "unsafe" not in POLICY
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["referrer-policy"] == "same-origin"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        assert "<script" not in response.text
        assert not re.search(
            r"https?://|\bon[a-z]+=|style=", re.sub(r"<style>.*</style>", "", response.text, flags=re.S)
        )


# what it shows


def test_it_shows_what_status_and_history_say(page, home):
    found, said = status(home), seen(page.http.get(page.session.path()))
    epsilon, [campaign] = found["epsilon"], found["campaigns"]
    assert f"spent {epsilon['reserved']:g} of {epsilon['cap']:g} left {epsilon['left']:g}" in said
    assert f"rounds {campaign['rounds_used']} of {campaign['rounds_allowed']} used left 0" in said
    assert f"Until {campaign['until']} (UTC)" in said
    assert campaign["policy"][:12] in said
    assert "Every round you allowed is used" in said
    assert "Version 2" in said
    assert "in use" in said
    releases = [event for event in history(home) if event["event"] == "release"]
    assert len(releases) == 2
    assert all(f"{event['size_bytes']:,}" in said and event["sha256"] in said for event in releases)
    share = re.search(r'class="used" width="([0-9.]+)"', page.http.get(page.session.path()).text)[1]
    assert float(share) == pytest.approx(100 * epsilon["reserved"] / epsilon["cap"], abs=1e-3)


def test_the_history_page_has_every_event(page, home):
    said = seen(page.http.get(page.session.path("history")))
    assert "agreed: tiny" in said
    assert all(event["sha256"] in said for event in history(home) if event["event"] == "release")


def test_the_newest_reply_is_downloaded_byte_for_byte(page, home, homes, published):
    first, newest = [event for event in history(home) if event["event"] == "release"]
    path = page.session.path(f"sent/{newest['policy']}/{newest['round']}")
    got = page.http.get(f"{path}/bytes")
    assert hashlib.sha256(got.content).hexdigest() == newest["sha256"]
    assert len(got.content) == newest["size_bytes"]
    assert 'filename="tiny-seed-3-round-2.safetensors"' in got.headers["content-disposition"]
    code, again = homes.ask(home, published.campaign, round_number=2, answered=1)  # what the server gets
    assert code is None
    for name, array in homes.update_in(again, published.campaign).items():
        np.testing.assert_array_equal(load(got.content)[name], array)
    said = seen(page.http.get(path))
    for name, array in load(got.content).items():
        assert f"{name} Shape {' × '.join(map(str, array.shape))}" in said
        assert f"{array.reshape(-1)[0]:.4g}" in said
    for number in (first["round"], 99):
        response = page.http.get(page.session.path(f"sent/{newest['policy']}/{number}/bytes"))
        assert response.status_code == 404
    assert page.http.get(page.session.path(f"sent/{'0' * 64}/2/bytes")).status_code == 404


def test_what_left_without_noise_is_said_to_be_kept_nowhere(homes, hiding_users, dashboards, tmp_path):
    home = homes.make_home(tmp_path / "home", hiding_users["central"])
    assert homes.ask(home, hiding_users["central"].campaign)[0] is None
    with dashboards.entered(home) as page:
        said = seen(page.http.get(page.session.path()))
        assert "not kept: they were not noised" in said
        assert "NOT FROM THE SERVER" in said
        [release] = [event for event in history(home) if event["event"] == "release"]
        assert page.http.get(page.session.path(f"sent/{release['policy']}/1/bytes")).status_code == 404


def test_what_left_under_masks_is_shown_as_the_integers_it_is(homes, hiding_users, dashboards, tmp_path):
    home, published = homes.make_home(tmp_path / "home", hiding_users["distributed"]), hiding_users["distributed"]
    masked = {"sum": np.array([0, 4294967295, 7], dtype=np.uint32)}
    policy = published.campaign.policy.sha256
    with home.ledger() as ledger:
        ledger.spend(policy=policy, round_number=1, request_sha256="0" * 64, answered=0)
        ledger.release(policy=policy, round_number=1, payload=save(masked))
    with dashboards.entered(home) as page:
        said = seen(page.http.get(page.session.path(f"sent/{policy}/1")))
        assert "sum Shape 3 Type uint32 From … to 0 … 4,294,967,295 The first numbers 0, 4,294,967,295, 7" in said


def test_names_from_outside_are_words_and_nothing_else(homes, dashboards, tmp_path):
    home = homes.make_home(tmp_path / "home")
    dashboards.agree_on_paper(home, policy="ab" * 32, campaign='<img src=x onerror="x()">\x1b[2J</p>')
    with dashboards.entered(home) as page:
        for path in ("", "history"):
            text = page.http.get(page.session.path(path)).text
            assert "<img" not in text
            assert "\x1b" not in text
            assert "&lt;img src=x onerror=" in text


def test_a_home_where_nothing_happened(homes, dashboards, tmp_path):
    with dashboards.entered(homes.make_home(tmp_path / "home")) as page:
        said = seen(page.http.get(page.session.path()))
    for words in ("You never agreed to a campaign", "Nothing has left this device", "You have no private head yet"):
        assert words in said


def test_a_running_service_is_seen(page, home):
    assert "Service: none runs now" in seen(page.http.get(page.session.path()))
    with serve_control(home.folder, Service(home)):
        assert re.search(
            r"Service: starting, since [0-9T:+-]+ \(pid [0-9]+\)", seen(page.http.get(page.session.path()))
        )


def test_a_ledger_that_cannot_be_used_is_said_and_its_buttons_are_gone(page, home):
    ledger = home.folder / "ledger.db"
    ledger.write_bytes(b"x" * len(ledger.read_bytes()))
    response = page.http.get(page.session.path())
    said = seen(response)
    assert "The ledger cannot be used" in said
    assert "sottovoce client recover" in said
    assert set(re.findall(r'action="[^"]*/([a-z]+)"', response.text)) == {"forget"}
    assert "must be" in seen(page.post("pause"))
    assert ledger.read_bytes() == b"x" * len(ledger.read_bytes())


# what its forms do


def test_pause_and_resume_hold_for_the_device(homes, published, dashboards, tmp_path):
    home = homes.make_home(tmp_path / "home", published)
    with dashboards.entered(home) as page:
        assert "Taking part" in seen(page.http.get(page.session.path()))
        said = seen(page.post("pause"))
        assert "Paused: nothing leaves this device until you resume" in said
        assert homes.ask(home, published.campaign)[0] == "PAUSED"
        assert "Paused: nothing leaves" not in seen(page.http.get(page.session.path()))  # said once
        assert "Resumed" in seen(page.post("resume"))
        assert homes.ask(home, published.campaign)[0] is None


def test_withdraw_wants_to_be_sure_and_is_for_ever(homes, published, dashboards, tmp_path):
    home = homes.make_home(tmp_path / "home", published)
    policy = published.campaign.policy.sha256
    with dashboards.entered(home) as page:
        assert "nothing was changed" in seen(page.post("withdraw", policy=policy))
        assert "nothing was changed" in seen(page.post("withdraw", policy=policy, sure="no"))
        assert status(home)["campaigns"][0]["state"] == "in force"
        said = seen(page.post("withdraw", policy=policy, sure="yes"))
        assert "Withdrawn: tiny" in said
        assert "Withdraw your consent" not in said
        assert homes.ask(home, published.campaign)[0] == "CONSENT"
        assert "must be named by" in seen(page.post("withdraw", policy="0000", sure="yes"))


def test_another_version_of_the_private_head_is_used(page, home):
    said = seen(page.post("rollback", version="1"))
    assert "Version 1 of your private head is in use, it was 2" in said
    assert home.heads().current() == 1
    for wrong in ("", "0", "-1", "99", "1e3", "x"):
        assert "must be" in seen(page.post("rollback", version=wrong))
    assert home.heads().current() == 1


def test_forget_wants_the_word_and_keeps_a_receipt(page, home):
    for wrong in ("", "yes", "forget it", "forge"):
        assert "nothing was changed" in seen(page.post("forget", confirm=wrong))
    assert len(home.records().read()) == 12
    said = seen(page.post("forget", confirm=" Forget "))
    assert "Forgotten: the keys first" in said
    assert "2 replies" in said
    assert not list((home.folder / "vault").glob("heads/*"))
    assert not (home.folder / "campaigns").exists()
    [name] = re.findall(r"[0-9T]{15}\.json", page.http.get(page.session.path()).text)[:1]
    receipt = page.http.get(page.session.path(f"receipts/{name}"))
    assert receipt.content == (home.folder / "receipts" / name).read_bytes()
    for other in ("begun.json", "begun.json.bak"):
        (home.folder / "receipts" / other).write_text("{}")
    for other in ("begun.json", "begun.json.bak", "..%2Fkeystore.json", "20300501T120001.json"):
        assert page.http.get(page.session.path(f"receipts/{other}")).status_code == 404
    newest = [event for event in history(home) if event["event"] == "release"][-1]
    assert page.http.get(page.session.path(f"sent/{newest['policy']}/2/bytes")).status_code == 404


def test_while_a_round_is_at_work_forget_says_so(page, home):
    with home.lock():
        assert "try again in a moment" in seen(page.post("forget", confirm="forget"))
    assert len(home.records().read()) == 12


# both models


def test_both_numbers_are_those_of_the_command(home, prepared, dashboards, capsys):
    beside = open_beside(home, prepared / "base")
    texts = ["Heat (1995). Action", "Fargo <1996>"]
    opened = open_personal(home, open_home_base(home, prepared / "base", kind="base"))
    assert opened.problem is None
    with dashboards.entered(home, beside=beside) as page:
        said = seen(page.post("try", asked="\r\n".join([texts[0], "", f"  {texts[1]} "])))
        for text, number in zip(texts, opened.model.predict(texts), strict=True):
            assert f"{text} Your model (version 2) {number:.2f} The base alone 3.00" in said
        assert page.post("try", asked=" \n").status_code == 400
        assert page.post("try", asked="x" * 20_001).status_code == 400
        assert page.post("try", asked="\n".join("x" * 21)).status_code == 400
        page.post("rollback", version="1")
        assert "(version 1)" in seen(page.post("try", asked=texts[0]))
        page.post("forget", confirm="forget")
        said = seen(page.post("try", asked=texts[0]))
        assert "No private head answers" in said
        assert f"{texts[0]} Your model – The base alone 3.00" in said


def test_without_a_head_or_a_base_it_says_so(homes, published, prepared, dashboards, tmp_path):
    home = homes.make_home(tmp_path / "home", published)
    with dashboards.entered(home) as page:
        assert "sottovoce client dashboard --base DIR" in seen(page.http.get(page.session.path()))
        assert page.post("try", asked="x").status_code == 404
    with dashboards.entered(home, beside=open_beside(home, prepared / "base")) as page:
        assert NO_HEAD in seen(page.post("try", asked="x"))


def test_a_base_nobody_signed_is_not_opened(home, tiny_fleet):
    with pytest.raises(HeadError, match="not signed"):
        open_beside(home, tiny_fleet)


def numbers(task, labels=()):
    """What ``numbers_page`` needs to know of a base."""
    base = SimpleNamespace(labels=labels, low=-1e6, high=1e6)
    return Numbers(None, base, task=task)


def test_scores_are_ranked_and_labels_named():
    session = Session("127.0.0.1:1")
    compared = Compared(("a", "b", "c"), np.array([0.1, 2.0, -1.0]), np.zeros(3), None, 4)
    shown = numbers_page(session, numbers("ranking"), compared, asked="a\nb\nc")
    assert re.findall(r'<th scope="row">(.)</th>', shown) == ["b", "a", "c"]
    likely = np.array([[0.2, 0.7, 0.1]])
    compared = Compared(("a",), likely, np.full((1, 3), 1 / 3), None, 1)
    shown = numbers_page(session, numbers("tagging", ("X", "<Y>", "Z")), compared, asked="a")
    assert "<b>&lt;Y&gt;</b> 70%" in shown
    assert "X 20%, Z 10%" in shown


def test_both_answers_in_words_are_those_of_the_endpoint(words, dashboards):
    endpoint = build_app(open_models(words.home, words.base), token="t" * 43)
    headers, wanted = {"authorization": f"Bearer {'t' * 43}"}, {}
    with httpx.Client(
        transport=dashboards.InProcess(endpoint), base_url="http://127.0.0.1", headers=headers
    ) as endpoint:
        for name in ("personal", "base"):
            said = [{"role": "user", "content": "Hi"}]
            body = {"model": name, "messages": said, "temperature": 0, "max_tokens": 16}
            found = endpoint.post("/v1/chat/completions", json=body).json()
            wanted[name] = found["choices"][0]["message"]["content"]
    with dashboards.entered(words.home, beside=words.beside) as page:
        response = page.post("try", asked="Hi", length="16")
        assert response.headers["content-type"].startswith("text/html")
        said = re.findall(r'<p class="answer">(.*?)</p>', response.text, flags=re.DOTALL)
        assert [unescape(one) for one in said] == [wanted["personal"], wanted["base"]]
        assert wanted["personal"] != wanted["base"]
        assert "personal@2" in response.text
        for wrong in ("", "17", "-1", "1e9"):
            assert page.post("try", asked="Hi", length=wrong).status_code == 400
        long = page.post("try", asked="x " * 300, length="16")
        assert long.status_code == 400
        assert "shorten" in long.text


def test_words_of_a_model_cannot_leave_their_place(words, dashboards, monkeypatch):
    monkeypatch.setattr("client.dashboard.trial.read_pieces", lambda answer: iter(["</p><b>x", "<script>y"]))
    with dashboards.entered(words.home, beside=words.beside) as page:
        text = page.post("try", asked="</textarea><script>z</script>", length="16").text
    assert "<script" not in text
    assert "<b>x" not in text
    assert text.count("</textarea>") == 1


def test_a_failure_midway_is_said_in_its_place(words, dashboards, monkeypatch):
    def fail(self, token_ids, **settings):
        raise HeadError("logits must be finite, got NaN or infinity; export the head again.")
        yield

    monkeypatch.setattr(Generator, "steps", fail)
    with dashboards.entered(words.home, beside=words.beside) as page:
        said = seen(page.post("try", asked="Hi", length="16"))
    assert said.count("logits must be finite") == 2


def test_nothing_asked_is_logged(words, dashboards, monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG", logger="sottovoce")
    with dashboards.entered(words.home, beside=words.beside) as page:
        page.post("try", asked="mysecret", length="16")

        def fail(*_, **__):
            raise RuntimeError("mysecret")

        monkeypatch.setattr("client.dashboard.beside.prepare", fail)
        response = page.post("try", asked="mysecret", length="16")
        assert response.status_code == 500
        assert "mysecret" not in response.text
    written = caplog.text + "".join(capfd.readouterr())
    assert "mysecret" not in written
    assert page.session.place not in written
    assert '"code": "PAGE"' in written
    assert "RuntimeError" in written


# the command


def test_the_command_serves_without_the_training_packages(words, tmp_path):
    root = Path(__file__).parents[1]
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'onnx', 'flwr', 'peft', 'opacus'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), flush=True))\n"
        "sys.modules['grpc'] = None\n"  # of the [train] install
        "from sottovoce.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "error"}
    command = ["client", "dashboard", "--home", str(words.home.folder), "--base", str(words.base)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *command], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            link = process.stdout.readline().removeprefix("your page: ").strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+/[\w-]{22}/enter/[\w-]{43}", link)
            assert "once" in process.stdout.readline()
            with httpx.Client(trust_env=False, follow_redirects=True) as http:
                opened = http.get(link)
                there = re.search(r'url=([^"]+)"', opened.text)[1]
                origin = link[: link.index("/", 8)]
                page = http.get(origin + there)
                assert "What this device does" in page.text
                form = re.search(r'name="form" value="([^"]+)"', page.text)[1]
                asked = {"form": form, "asked": "Hi", "length": "16"}
                answered = http.post(f"{origin}{there}try", data=asked, headers={"origin": origin})
                assert answered.text.count('<p class="answer">') == 2
                paused = http.post(f"{origin}{there}pause", data={"form": form}, headers={"origin": origin})
                assert "Paused" in paused.text
            assert status(words.home)["paused"]
            set_paused(words.home, False)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert process.stdout.read() == "[]\n"
        finally:
            process.kill()


def test_the_command_refuses_in_one_line(home, tiny_fleet, tmp_path, capsys):
    for words, match in (
        (("--home", str(tmp_path / "none")), "must hold a home"),
        (("--home", str(home.folder), "--base", str(tiny_fleet)), "not signed"),
        (("--home", str(home.folder), "--base", str(tmp_path)), "must hold a fleet's base"),
        (("--home", str(home.folder), "--port", "70000"), "between 0 and 65535"),
    ):
        assert main(["client", "dashboard", *words]) == 2
        error = capsys.readouterr().err
        assert match in error, error
        assert error.count("\n") == 1


def test_bytes_that_changed_in_the_outbox_are_not_shown(home):
    policy = history(home)[-1]["policy"]
    with home.ledger() as ledger:
        assert ledger.kept_replies() == {(policy, 2)}
        assert ledger.kept_reply(policy=policy, round_number=2) is not None
        assert ledger.kept_reply(policy=policy, round_number=1) is None
        assert ledger.kept_reply(policy="other", round_number=2) is None
        ledger._log.connection.execute("UPDATE outbox SET payload = ?", (b"other",))
        with pytest.raises(Exception, match="its bytes have changed"):
            ledger.kept_reply(policy=policy, round_number=2)


def test_until_today_and_yesterday(homes, published, dashboards, tmp_path):
    home = homes.make_home(tmp_path / "home")
    with home.ledger() as ledger:
        ledger.consent(
            policy="ab" * 32,
            campaign="films",
            epsilon=0.5,
            delta=1e-6,
            max_participations=3,
            until=date(2030, 5, 1),
            operator="f" * 64,
        )
    with dashboards.entered(home) as page:
        assert "Until 2030-05-01 (UTC) " in seen(page.http.get(page.session.path()))
    later = open_home(home.folder, clock=lambda: homes.clock().replace(day=2))
    with dashboards.entered(later) as page:
        said = seen(page.http.get(page.session.path()))
        assert "Until 2030-05-01 (UTC), but it is over" in said
        assert "Withdraw your consent" not in said
        assert "No consent is in force" in said


def test_a_store_error_is_named(home, dashboards, monkeypatch):
    def fail(*_):
        raise StoreError("the disk must have room, it has none.")

    monkeypatch.setattr("client.dashboard.server.set_paused", fail)
    with dashboards.entered(home) as page:
        assert "The disk must have room, it has none." in seen(page.post("pause"))
