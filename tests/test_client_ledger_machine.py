"""The ledger against a plain reference, over random histories of owners, servers, crashes and copies (I1 to I9)."""

import json
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from client.ledger.log import Log
from shared.errors import LedgerError, RefusedError

POLICIES = st.sampled_from("pqr")
ROUNDS = st.integers(1, 6)
REQUESTS = st.sampled_from(["one request", "another request"])
CAP = 10
SELDOM = st.sampled_from([False, False, False, True])
WAYS = ("newest again", "recover", "with keystore", "lost")
SEAMS = st.sampled_from([*[None] * 9, "_begin", "_commit", "advance_anchor"])


class Killed(BaseException):
    """Stands for kill -9: nothing of the ledger's code handles it."""


@dataclass
class Campaign:
    """What is true of one campaign."""

    epsilon: int
    most: int
    until: date
    spent: dict[int, str] = field(default_factory=dict)
    released: dict[int, bytes] = field(default_factory=dict)
    burnt: set[int] = field(default_factory=set)
    lost: int = 0
    closed: str = ""

    @property
    def used(self):
        return len(self.spent) + self.lost


@dataclass
class Model:
    """What a ledger must say; every rule is written down again, in the plainest way."""

    latest: datetime
    reserved: int = 0
    paused: bool = False
    events: int = 1
    campaigns: dict[str, Campaign] = field(default_factory=dict)

    def refuses(self, policy, now):
        campaign = self.campaigns.get(policy)
        if campaign is None or campaign.closed or max(now, self.latest).date() > campaign.until:
            return "CONSENT"
        return "PAUSED" if self.paused else None

    def tell(self, policy, answered):
        """The server's count; the number of events it leads to."""
        campaign = self.campaigns[policy]
        lost = min(answered - len(campaign.released) - campaign.lost, campaign.most - campaign.used)
        campaign.lost += max(0, lost)
        return int(lost > 0)

    def answer(self, policy, number, request):
        """A code, a payload, or None for a new round."""
        campaign = self.campaigns[policy]
        if number in campaign.spent:
            if campaign.spent[number] != request:
                return "CONFLICT"
            if number not in campaign.released:
                return "BURNT"
            return campaign.released[number] if number == max(campaign.released) else "ROUND"
        if campaign.spent and number < max(campaign.spent):
            return "ROUND"
        return "BUDGET" if campaign.used >= campaign.most else None

    def crash(self):
        for campaign in self.campaigns.values():
            pending = set(campaign.spent) - set(campaign.released) - campaign.burnt
            campaign.burnt |= pending
            self.events += len(pending)

    def close(self, how):
        for campaign in self.campaigns.values():
            campaign.closed = campaign.closed or how


class LedgerMachine(RuleBasedStateMachine):
    """One device; ``truth`` is what really left it, whatever its ledger remembers."""

    ledgers = None  # set by the test
    reached: Counter

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        self.home = self.folder / "home"
        self.keystore = self.ledgers.MemoryKeystore()
        self.clock = self.ledgers.Clock()
        self.ledger = self.ledgers.begin(self.home, self.keystore, self.clock, cap_epsilon=CAP)
        self.model = Model(latest=self.clock.now)
        self.copies = []
        self.truth: dict[str, set[bytes]] = {policy: set() for policy in "pqr"}
        self.highest = 0
        self.lied_about = set()
        self.payloads = 0
        self.got = None
        self.reopens = False

    def teardown(self):
        self.ledger.close()
        shutil.rmtree(self.folder)

    # what happens

    @initialize(most=st.integers(2, 4))
    def first_consents(self, most):
        for policy, epsilon in (("p", 1), ("q", 3)):
            self.consent(policy, epsilon, most, 400, None)
        self.copied()

    @rule(policy=POLICIES, epsilon=st.integers(1, 8), most=st.integers(1, 4), days=st.integers(-1, 800), seam=SEAMS)
    def consent(self, policy, epsilon, most, days, seam):
        until = self.clock.now.date() + timedelta(days=days)
        allowed = (
            policy not in self.model.campaigns
            and self.model.reserved + epsilon <= CAP
            and max(self.clock.now, self.model.latest).date() <= until
        )
        terms = {"epsilon": float(epsilon), "max_participations": most, "until": until}
        refusal = None if allowed else LedgerError
        if self.call(lambda: self.ledgers.agree(self.ledger, policy, **terms), seam, refusal):
            self.model.campaigns[policy] = Campaign(epsilon, most, until)
            self.model.reserved += epsilon
            self.recorded()

    @rule(policy=POLICIES, seam=SEAMS, really=SELDOM)
    def withdraw(self, policy, seam, really):
        if not really:
            return
        campaign = self.model.campaigns.get(policy)
        changes = campaign is not None and campaign.closed != "withdrawn"
        if self.call(lambda: self.ledger.withdraw(policy), seam, None if campaign else LedgerError, writes=changes):
            campaign.closed = "withdrawn"
            self.recorded(witness=False)

    @rule(policy=POLICIES, number=ROUNDS, request=REQUESTS, seam=SEAMS, lie=st.sampled_from([0, 0, 0, 0, -1, 1]))
    def request(self, policy, number, request, seam, lie):
        """A server asks; it says how many answers it has, which is right but for a lie now and then."""
        self.ask(policy, number, request, max(0, len(self.truth[policy]) + lie), seam)

    @rule(policy=POLICIES, seam=SEAMS)
    def next_round(self, policy, seam):
        """An honest server goes on."""
        campaign = self.model.campaigns.get(policy)
        number = max(campaign.spent, default=0) + 1 if campaign else 1
        self.ask(policy, number, "one request", len(self.truth[policy]), seam)

    @rule(policy=POLICIES)
    def whole_round(self, policy):
        self.next_round(policy, None)
        self.finish_what_is_pending(policy)
        self.repeat(policy)

    @rule(policy=POLICIES)
    def repeat(self, policy):
        """The answer did not arrive, and the server asks again."""
        campaign = self.model.campaigns.get(policy)
        if campaign and campaign.released:
            number = max(campaign.released)
            self.ask(policy, number, campaign.spent[number], len(self.truth[policy]), None)

    @rule(policy=POLICIES, number=ROUNDS, seam=SEAMS)
    def release(self, policy, number, seam):
        self.finish(policy, number, seam)

    @rule(policy=POLICIES)
    def finish_what_is_pending(self, policy):
        campaign = self.model.campaigns.get(policy)
        if campaign:
            for number in sorted(set(campaign.spent) - set(campaign.released) - campaign.burnt):
                self.finish(policy, number, None)

    @rule(pause=st.sampled_from([True, False, False]), seam=SEAMS)
    def pause(self, pause, seam):
        call = self.ledger.pause if pause else self.ledger.resume
        if self.call(call, seam, None, writes=pause is not self.model.paused):
            self.model.paused = pause
            self.recorded(witness=False)

    @rule(seam=SEAMS, really=SELDOM)
    def forget(self, seam, really):
        if really and self.call(lambda: self.ledger.forgotten({"files": 1}), seam, None):
            self.model.close("withdrawn")
            self.recorded(witness=False)

    @rule(days=st.sampled_from([1, 1, 1, 1, 200, -1, -1, -400, -3650, 3650]))
    def clock_jumps(self, days):
        if 1980 < (self.clock.now + timedelta(days=days)).year < 2080:
            self.clock.jump(days=days)

    @rule()
    def killed(self):
        self.ledger._log.connection.close()
        self.open_after_crash()

    @rule()
    def copied(self):
        self.ledger.close()
        self.copies.append(((self.home / "ledger.db").read_bytes(), dict(self.keystore.entries), deepcopy(self.model)))
        self.open_after_crash()

    @rule(data=st.data(), way=st.sampled_from(WAYS), really=SELDOM)
    def put_back(self, data, way, really):
        """An older copy comes back, or the file is lost."""
        if not really:
            return
        copy, entries, model = data.draw(st.sampled_from(self.copies))
        self.ledger.close()
        path = self.home / "ledger.db"
        newest = path.read_bytes()
        path.write_bytes(copy)
        anchor = json.loads(self.keystore.read("anchor"))
        self.reached[way] += 1
        if way == "lost":
            path.unlink()
            self.refuses_to_open("LEDGER")
            self.recover(Model(latest=self.clock.now, reserved=self.model.reserved, events=2))
        elif way == "with keystore":
            self.keystore.entries = dict(entries)
            self.model, self.highest = deepcopy(model), 0
            self.open_after_crash()
        elif anchor["mac"] in macs(path):  # as new, or newer
            self.model = deepcopy(model)
            self.open_after_crash()
        else:
            self.refuses_to_open("ROLLBACK" if seq(path) < anchor["seq"] else "LEDGER")
            if way == "newest again":
                path.write_bytes(newest)
                self.open_after_crash()
            else:
                old = deepcopy(model)
                old.reserved = max(old.reserved, self.model.reserved)
                old.close("ended")
                old.events += 1
                self.recover(old)

    # how it is done

    def ask(self, policy, number, request, answered, seam):
        if answered < len(self.truth[policy]):
            self.lied_about.add(policy)
        refusal = self.model.refuses(policy, self.clock.now)
        if refusal:
            self.reached[refusal] += 1
            self.call(self.spender(policy, number, request, answered), seam, refusal)
            return
        after = deepcopy(self.model)
        told = after.tell(policy, answered)
        expected = after.answer(policy, number, request)
        spends = expected is None
        result = expected if isinstance(expected, str) else None
        writes = bool(told or spends)
        spend = self.spender(policy, number, request, answered)
        if self.call(spend, seam, result, writes=writes, refused_but_told=told > 0):
            if spends:
                after.campaigns[policy].spent[number] = request
            self.model = after
            self.recorded(told + spends, witness=spends)
        self.reached[result or ("repeat" if not spends else "spend")] += 1
        if isinstance(expected, bytes) and seam is None:
            assert self.got == expected
        elif spends and seam is None:
            assert self.got is None

    def spender(self, policy, number, request, answered):
        def spend():
            self.got = self.ledgers.spend(self.ledger, number, policy=policy, request=request, answered=answered)

        return spend

    def finish(self, policy, number, seam):
        campaign = self.model.campaigns.get(policy)
        refusal = self.model.refuses(policy, self.clock.now)
        if not refusal and number in campaign.burnt:
            refusal = "BURNT"
        elif not refusal and (number not in campaign.spent or number in campaign.released):
            refusal = LedgerError
        self.payloads += 1
        payload = b"answer %d" % self.payloads
        release = {"policy": policy, "round_number": number, "payload": payload}
        if self.call(lambda: self.ledger.release(**release), seam, refusal):
            campaign.released[number] = payload
            self.truth[policy].add(payload)  # it is sent at once, or sent again after the crash
            if policy not in self.lied_about:  # then no copy put back makes room for one answer more
                assert len(self.truth[policy]) <= campaign.most
            self.recorded()

    def call(self, action, seam, refusal, *, writes=True, refused_but_told=False):
        """Do it, killed at a seam or not; whether what it writes is on disk afterwards."""
        will_write = writes and (refusal is None or refused_but_told)
        if seam == "_begin" or (seam and will_write):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Log, seam, lambda _: (_ for _ in ()).throw(Killed()))
                with pytest.raises(Killed):
                    action()
                self.ledger._log.connection.close()
            self.reached[f"killed at {seam}"] += 1
            self.reopens = True
            return will_write and seam == "advance_anchor"
        if refusal is None:
            action()
        elif refusal is LedgerError:
            with pytest.raises(LedgerError):
                action()
        else:
            with pytest.raises(RefusedError) as caught:
                action()
            assert caught.value.code == refusal
        return will_write

    def recorded(self, events=1, *, witness=True):
        self.model.events += events
        if witness:  # of the time: what was agreed to, spent or released
            self.model.latest = max(self.model.latest, self.clock.now)

    def open_after_crash(self):
        self.ledger = self.ledgers.reopen(self.home, self.keystore, self.clock)
        self.model.crash()

    def refuses_to_open(self, code):
        with pytest.raises(LedgerError) as caught:
            self.ledgers.reopen(self.home, self.keystore, self.clock)
        assert caught.value.code == code

    def recover(self, model):
        self.ledger = self.ledgers.recover(self.home, self.keystore, self.clock, cap_epsilon=CAP)
        self.model = model
        self.model.crash()

    # what always holds

    @invariant()
    def the_ledger_says_what_is_true(self):
        if self.reopens:
            self.reopens = False
            self.open_after_crash()
        found = {each.consent.policy: each for each in self.ledger.consents()}
        assert found.keys() == self.model.campaigns.keys()
        for policy, campaign in self.model.campaigns.items():
            each = found[policy]
            counts = (each.spent, each.released, each.burnt, each.lost)
            assert counts == (campaign.used, len(campaign.released), len(campaign.burnt), campaign.lost), policy
            assert each.spent == each.released + each.burnt + each.pending + each.lost <= campaign.most
        totals = self.ledger.totals()
        assert (totals.epsilon, totals.paused) == (self.model.reserved, self.model.paused)
        assert len(self.ledger.history()) == self.model.events
        assert totals.epsilon >= self.highest  # but where a copy came back with its keystore: no device can see that
        self.highest = totals.epsilon


def macs(path):
    return [mac.hex() for (mac,) in rows(path, "SELECT mac FROM event")]


def seq(path):
    return rows(path, "SELECT max(seq) FROM event")[0][0]


def rows(path, statement):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


def check(ledgers, *, examples, steps):
    class Machine(LedgerMachine):
        pass

    Machine.ledgers, Machine.reached = ledgers, Counter()
    limits = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=limits)
    return Machine.reached


def test_the_ledger_agrees_with_a_plain_reference_over_random_histories(ledgers):
    reached = check(ledgers, examples=40, steps=50)
    assert reached.keys() >= {"spend", "repeat", "CONSENT", "ROUND"}  # a machine that never gets there proves nothing


@pytest.mark.slow
def test_the_ledger_agrees_with_a_plain_reference_over_many_random_histories(ledgers):
    reached = check(ledgers, examples=150, steps=60)
    refusals = {"CONSENT", "PAUSED", "CONFLICT", "BURNT", "ROUND", "BUDGET"}
    faults = {"killed at _begin", "killed at _commit", "killed at advance_anchor", *WAYS}
    assert reached.keys() >= {"spend", "repeat"} | refusals | faults
