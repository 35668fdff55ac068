"""What the fuzzer found, each as the input that showed it: an exception nobody thought of, or memory without end."""

import base64
import gzip
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client.ledger.book import read_anchor
from client.ledger.ledger import open_ledger
from client.owner.device_key import _read as read_device_key
from client.runtime.chat import compile_template, read_chat
from client.runtime.session import open_session
from client.service.join import read_invitation
from server.aggregate import OptimizerState
from server.certificates import new_authority, renew_certificate
from server.checkpoint import Checkpoint, Counts, _hash_state, load_checkpoint, save_checkpoint
from server.folder import create_server, open_server
from server.rounds import last_begun, note_begun, read_rounds
from server.status import status
from shared import datasets
from shared.config import load_scenario
from shared.datasets.folder import read_folder
from shared.errors import (
    AssetError,
    CampaignError,
    DataError,
    HeadError,
    LedgerError,
    ScenarioError,
    ServerError,
    SottovoceError,
    StoreError,
)
from shared.files import read_json_lines
from shared.models.gguf import RECORD, _verify
from shared.protocol.campaign import check_promise, read_resumed
from shared.protocol.enrolment import check_public_key
from simulations.fuzz.campaigns import SCENARIO, device_key, device_line, example
from simulations.fuzz.devices import _model

DEEP = b"[" * 3000 + b"]" * 3000


def test_no_message_is_long_or_holds_what_a_terminal_would_obey():
    words = str(SottovoceError(f"got \x1b[2J\r\n{'x' * 10_000}"))
    assert words.startswith("got \ufffd[2J\ufffd xxx")
    assert words.isprintable()
    assert len(words) == 4000


def test_a_rating_is_quoted_without_what_a_terminal_would_obey(tmp_path):
    (tmp_path / "movies.dat").write_text("1::Old (1971)::Drama\n", encoding="latin-1")
    (tmp_path / "ratings.dat").write_text("1::1::\x1b[2J::1\n", encoding="latin-1")
    with pytest.raises(DataError, match="line 1: rating must be a number, got '\ufffd"):
        datasets.read("movielens-1m", tmp_path)


def test_questions_nested_without_end_take_no_memory(tmp_path):
    """Ijson's own reader of elements keeps the path to each level: 100 kB of brackets took 20 GB."""
    (tmp_path / "dev_questions.json").write_bytes(b"[" * 100_000)
    (tmp_path / "dev_outputs.json").write_text('{"task": "LaMP_4", "golds": [{"id": "1", "output": "a"}]}')
    code = """
import resource, sys
from pathlib import Path
from shared import datasets
from shared.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    datasets.read("lamp-4", Path(sys.argv[1]))
except DataError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""
    limit = (4 << 30, 4 << 30)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
        cwd=Path(__file__).parent.parent,
    )
    grown_kib, _, words = done.stdout.partition(" ")
    assert "must be a JSON array" in words, done.stderr
    assert int(grown_kib) < 64 * 1024


def test_a_parquet_file_whose_columns_have_no_names_in_utf8_is_left_out(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"Text": ["words"], "other": ["x"]}), path, store_schema=False)
    assert path.read_bytes().count(b"other") >= 2
    path.write_bytes(path.read_bytes().replace(b"other", b"oth\xff\xfe"))
    assert read_folder(tmp_path, format="parquet", columns={"text": "Text"}).skipped == {"file": 1}


@pytest.mark.parametrize("line", [DEEP, b'{"name": ' + DEEP + b"}"])
def test_a_speech_nested_without_end_is_refused(tmp_path, line):
    (tmp_path / "sotu.jsonl.gz").write_bytes(gzip.compress(line))
    with pytest.raises(DataError, match="line 1: must be JSON"):
        datasets.read("sotu", tmp_path)


def test_speeches_that_unpack_without_end_are_refused(tmp_path):
    (tmp_path / "sotu.jsonl.gz").write_bytes(gzip.compress(b" " * (65 * 2**20), 1))
    with pytest.raises(DataError, match="must unpack to at most"):
        datasets.read("sotu", tmp_path)


def compressed(line: str) -> str:
    """The same public key, its point said to be compressed."""
    kind, packed = line.split()
    raw = bytearray(base64.b64decode(packed))
    raw[-97] = 2  # where 4 says that both coordinates follow
    return f"{kind} {base64.b64encode(raw).decode()}"


def test_a_public_key_with_a_compressed_point_is_refused():
    assert check_public_key(device_line()) == device_line()
    with pytest.raises(ValueError, match="its key is damaged"):
        check_public_key(compressed(device_line()))


def test_a_device_key_with_a_compressed_point_is_refused(tmp_path):
    pem = device_key().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    lines = pem.split(b"\n")
    raw = base64.b64decode(b"".join(lines[1:-2])).replace(b"\x04" + point_bytes(), b"\x02" + point_bytes())
    (tmp_path / "device").write_bytes(lines[0] + b"\n" + base64.b64encode(raw) + b"\n" + lines[-2] + b"\n")
    with pytest.raises(StoreError, match="must be an ECDSA P-384 key"):
        read_device_key(tmp_path / "device")


def point_bytes() -> bytes:
    numbers = device_key().public_key().public_numbers()
    return numbers.x.to_bytes(48) + numbers.y.to_bytes(48)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 3000 + "]" * 3000])
def test_an_override_no_reader_of_toml_takes_is_refused(value):
    with pytest.raises(ScenarioError, match="seed must be"):
        load_scenario(SCENARIO, (f"seed={value}",))


@pytest.mark.parametrize(
    "content",
    [DEEP, b"\xff", b"[]", b'{"round": 1}', b'{"round": 1, "participations": {"x": 1}}',
     b'{"round": 1, "participations": {"0": null}}', b'{"round": 1.5, "participations": {}}'],
)  # fmt: skip
def test_a_damaged_note_of_an_interrupted_simulation_is_refused(tmp_path, content):
    (tmp_path / "resumed.json").write_bytes(content)
    with pytest.raises(CampaignError, match="it is damaged"):
        read_resumed(tmp_path)


@pytest.fixture(scope="module")
def authority():
    return new_authority()


def version_18(pem: bytes) -> bytes:
    """The same certificate, said to be of a version there is not."""
    lines = pem.decode().strip().splitlines()
    raw = base64.b64decode("".join(lines[1:-1])).replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x12", 1)
    return "\n".join([lines[0], base64.b64encode(raw).decode(), lines[-1], ""]).encode()


@pytest.mark.parametrize("damaged", ["server.json", "ca.crt"])
def test_a_hostile_invitation_is_refused(tmp_path, authority, damaged):
    files = {"server.json": b'{"address": "fl.example.org", "port": 9092}', "ca.crt": authority.certificate_pem}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert read_invitation(str(tmp_path), ca=None, home=tmp_path).port == 9092
    hostile = DEEP if damaged == "server.json" else version_18(files["ca.crt"])
    (tmp_path / damaged).write_bytes(hostile)
    with pytest.raises(StoreError):
        read_invitation(str(tmp_path), ca=None, home=tmp_path)


def test_a_damaged_authority_renews_nothing(tmp_path):
    server = create_server(tmp_path / "server", address="localhost")
    before = server.certificate.read_bytes()
    server.ca_certificate.write_bytes(version_18(server.ca_certificate.read_bytes()))
    with pytest.raises(ServerError, match="must be readable; restore a backup"):
        renew_certificate(open_server(server.folder))
    assert server.certificate.read_bytes() == before


def test_notes_of_a_server_nested_without_end_are_no_notes(tmp_path):
    server = create_server(tmp_path / "server", address="localhost")
    server.live.write_bytes(DEEP)
    assert status(server)["live"] == {"state": "stopped", "written": None}
    (tmp_path / "rounds.jsonl").write_bytes(DEEP + b'\n{"a": 1}\n')
    assert read_rounds(tmp_path) == {}
    assert read_json_lines(tmp_path / "rounds.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("content", [DEEP, b'{"round": 1e400}'])
def test_a_damaged_note_of_the_round_begun_is_refused_and_can_be_replaced(tmp_path, content):
    newest = SimpleNamespace(round_number=2)
    (tmp_path / "begun.json").write_bytes(content)
    with pytest.raises(CampaignError, match="it is damaged"):
        last_begun(tmp_path, newest)
    note_begun(tmp_path, 4)
    assert last_begun(tmp_path, newest) == 4


@pytest.mark.parametrize("change", [{"round": math.inf}, {"participations": {"0": math.inf}}, None])
def test_a_checkpoint_with_impossible_numbers_is_unreadable(tmp_path, change):
    saved = Checkpoint(
        round_number=3,
        policy_sha256="ab" * 32,
        arrays={"a": np.zeros(2, np.float32)},
        optimizer=OptimizerState(),
        participations={0: 1},
        answered={0: 1},
        latest=Counts(),
        total=Counts(),
        rolled_back_to=None,
    )
    place = save_checkpoint(tmp_path, saved)
    assert load_checkpoint(place).round_number == 3
    state = json.loads((place / "state.json").read_text())
    del state["state_sha256"]
    text = DEEP.decode()
    if change is not None:
        text = json.dumps(state | change | {"state_sha256": _hash_state(state | change)})
    (place / "state.json").write_text(text)
    with pytest.raises(CampaignError, match="must be a readable checkpoint"):
        load_checkpoint(place)


def test_a_model_that_names_things_in_no_text_is_refused_and_nothing_is_printed(capfd):
    assert open_session(_model(), threads=1).get_inputs()
    with pytest.raises(HeadError, match="must run on this onnxruntime"):
        open_session(_model().replace(b"input_ids", b"inp\xfft_ids", 1), threads=1)
    assert "EP Error" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "config",
    [DEEP, b'{"chat_template": [[1]]}', b'{"chat_template": [{"name": "default"}]}', b'{"chat_template": [1]}',
     b'{"chat_template": [{"name": [], "template": "x"}]}', b'{"chat_template": {"a": "b"}}', b'{"chat_template": 1}'],
)  # fmt: skip
def test_a_tokenizer_config_without_a_template_that_is_text_is_refused(tmp_path, config):
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(HeadError, match="must be JSON and text"):
        read_chat(tmp_path)


def test_a_template_nested_without_end_is_refused():
    with pytest.raises(HeadError, match="must be Jinja"):
        compile_template("{{ " + "[" * 3000 + "]" * 3000 + " }}")


def test_a_record_of_a_conversion_nested_without_end_is_refused(tmp_path):
    (tmp_path / RECORD).write_bytes(DEEP)
    with pytest.raises(AssetError, match="must list the converted files"):
        _verify(tmp_path)


def test_an_anchor_nested_without_end_stops_the_ledger():
    with pytest.raises(LedgerError, match="it is damaged"):
        read_anchor(DEEP)


def test_a_ledger_that_holds_no_text_is_damaged(tmp_path, ledgers):
    keystore = ledgers.keystore_of(tmp_path / "home")
    ledgers.begin(tmp_path / "home").close()
    path = tmp_path / "home" / "ledger.db"
    content = path.read_bytes()
    assert content.count(b"CREATE TABLE event") == 1
    path.write_bytes(content.replace(b"CREATE TABLE event", b"CREATE \xff\xfeBLE event"))
    with pytest.raises(LedgerError) as caught:
        open_ledger(path, keystore=keystore, clock=ledgers.Clock())
    assert caught.value.code == "LEDGER"


@pytest.mark.parametrize("name", ["", "nice\x1b[2K\rfree of cost", "x" * 301])
def test_a_campaign_whose_name_an_owner_could_misread_is_refused(tmp_path, name):
    campaign = example(tmp_path)
    assert check_promise(campaign.folder).policy == campaign.policy
    policy = campaign.policy.model_copy(update={"campaign": name})
    (campaign.folder / "policy.json").write_text(policy.model_dump_json(indent=2) + "\n")
    with pytest.raises(CampaignError, match="printable characters"):
        check_promise(campaign.folder)


def test_a_small_file_of_millions_of_empty_lines_is_not_read_to_its_end(tmp_path):
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"id,text\n" + b"\n" * 100_002, 1))
    with pytest.raises(DataError, match="line 100002: must not be the last of more than 100,000 empty lines"):
        datasets.read("csv", tmp_path, columns={"user": "id", "text": "text"})
