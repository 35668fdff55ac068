"""The messages of a secure sum have one form each, and bytes from anybody are a message or an error."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from client.training.secure_sum import Participant
from shared.errors import SecureSumError
from shared.secure_sum.messages import (
    Advert,
    Credential,
    Parcels,
    Roster,
    Setting,
    Shares,
    Survivors,
    Terms,
    signed_message,
)
from shared.secure_sum.strict_bytes import MAX_FIELD, Reader

KINDS = [Advert, Credential, Roster, Parcels, Shares, Survivors]
TAGS = [b"SSA1", b"SSC1", b"SSR1", b"SSP1", b"SSS1", b"SSV1"]

seats = st.integers(0, 2**32 - 1)
ascending = st.lists(seats, unique=True, max_size=6).map(sorted).map(tuple)
keys = st.binary(min_size=32, max_size=32)
fields = st.binary(max_size=40)
adverts = st.builds(Advert, seats, keys, keys, fields)
credentials = st.builds(Credential, st.text(st.characters(max_codepoint=127), max_size=40), fields)
items = st.dictionaries(seats, fields, max_size=5).map(lambda d: tuple(sorted(d.items())))


@st.composite
def rosters(draw):
    members = {advert.seat: (advert, draw(credentials)) for advert in draw(st.lists(adverts, max_size=4))}
    everybody = sorted({*members, *draw(ascending)})
    return Roster(tuple(everybody), tuple(members[seat] for seat in sorted(members)))


messages = st.one_of(
    adverts,
    credentials,
    rosters(),
    st.builds(Parcels, items),
    st.builds(Shares, items),
    st.builds(Survivors, ascending, ascending),
)


def read(kind, content: bytes):
    """A message whose bytes are these, or None: nothing else may happen."""
    code, message = "", None
    try:
        message = kind.from_bytes(content)
    except SecureSumError as error:
        code = error.code
    assert code == ("MALFORMED" if message is None else "")
    assert message is None or message.to_bytes() == content
    return message


@settings(max_examples=60, deadline=None)
@given(messages)
def test_a_message_comes_back_from_its_bytes(message):
    assert type(message).from_bytes(message.to_bytes()) == message
    for kind in KINDS:
        if kind is not type(message):
            assert read(kind, message.to_bytes()) is None


@settings(max_examples=120, deadline=None)
@given(messages, st.data())
def test_bytes_that_were_changed_are_another_message_or_none(message, data):
    content = message.to_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    changed = data.draw(
        st.sampled_from(
            [
                content[:at],
                content[:at] + content[at + 1 :],
                content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :],
                content + data.draw(st.binary(min_size=1, max_size=5)),
                content[:at] + content,
            ]
        )
    )
    if changed != content:
        assert read(type(message), changed) != message


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(range(len(KINDS))), st.binary(max_size=200), st.booleans())
@example(2, b"\xff" * 40, True)
@example(3, b"\xff\xff\xff\xff", True)
@example(5, b"\0\0\0\0\0\0\0\0\0", True)
def test_any_bytes_are_a_message_or_none(which, content, tagged):
    read(KINDS[which], TAGS[which] + content if tagged else content)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Survivors, b"SSV1" + (2).to_bytes(4) + bytes(8) + bytes(4)),  # a seat twice
        (Survivors, b"SSV1" + (2).to_bytes(4) + (2).to_bytes(4) + (1).to_bytes(4) + bytes(4)),  # descending
        (Shares, b"SSS1" + (2).to_bytes(4) + 2 * (bytes(4) + bytes(4))),
        (Shares, b"SSS1" + (1).to_bytes(4) + bytes(4) + (MAX_FIELD + 1).to_bytes(4) + bytes(MAX_FIELD + 1)),
        (Credential, b"SSC1" + (1).to_bytes(4) + b"\xe9" + bytes(4)),
        (Roster, b"SSR1" + bytes(4) + (1).to_bytes(4) + (79).to_bytes(4) + b"SSA1" + bytes(71)),
        (Parcels, b""),
    ],
)
def test_what_has_the_wrong_order_size_or_letters_is_no_message(kind, content):
    assert read(kind, content) is None


def test_a_count_is_believed_only_as_far_as_there_are_bytes():
    for tag in (b"SSP1", b"SSV1", b"SSR1"):
        reader = Reader(tag + (2**20).to_bytes(4), tag=tag)
        with pytest.raises(SecureSumError, match="more bytes"):
            reader.seats()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Advert(-1, bytes(32), bytes(32), b""),
        lambda: Advert(2**32, bytes(32), bytes(32), b""),
        lambda: Advert(0, bytes(31), bytes(32), b""),
        lambda: Advert(0, bytes(32), bytes(33), b""),
        lambda: Advert(0, bytes(32), bytes(32), bytes(MAX_FIELD + 1)),
        lambda: Credential("é", b""),
        lambda: Credential("a" * (MAX_FIELD + 1), b""),
        lambda: Parcels(((1, b""), (1, b""))),
        lambda: Shares(((2, b""), (1, b""))),
        lambda: Survivors((1, 1), ()),
        lambda: Survivors((), (3, 2)),
    ],
)
def test_a_message_that_could_not_be_read_cannot_be_made(make):
    with pytest.raises(SecureSumError, match=r"must .* faulty or hostile"):
        make()


# A device's state


@pytest.fixture(scope="module")
def states(sums):
    """The bytes of one device's state after every step."""
    whole = sums.WholeSum(range(5), Terms(3, 4, 3))
    taken = [whole.devices[2].to_bytes()]
    whole.advertise(range(5))
    whole.share(range(5))
    taken.append(whole.devices[2].to_bytes())
    whole.mask(sums.vectors_for(range(5)))
    taken.append(whole.devices[2].to_bytes())
    whole.unmask(range(5))
    return [*taken, whole.devices[2].to_bytes()]


def test_a_state_comes_back_from_its_bytes(states):
    assert len(set(states)) == 4
    for state in states:
        assert Participant.from_bytes(state).to_bytes() == state


def test_a_state_that_masks_has_its_secrets_and_one_that_has_masked_has_none(states):
    at = 4 + 40 + 12 + 3  # the stage's last byte, after tag, setting and terms
    for state, stage in zip(states, (1, 2, 3, 4), strict=True):
        assert state[at] == stage
        for other in {1, 2, 3, 4} - {stage}:
            same_side = (stage < 3) == (other < 3)
            assert (read(Participant, state[:at] + bytes([other]) + state[at + 1 :]) is not None) == same_side


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.data())
def test_bytes_that_were_changed_are_a_state_or_none(states, which, data):
    content = states[which]
    at = data.draw(st.integers(0, len(content) - 1))
    value = data.draw(st.integers(0, 255))
    for changed in (content[:at], content[:at] + bytes([value]) + content[at + 1 :], content + bytes([value])):
        read(Participant, changed)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_state_or_none(content):
    read(Participant, content)
    read(Participant, b"SSD1" + content)


# What a sum is about


def test_a_context_is_of_campaign_round_length_and_roster():
    setting = Setting("0" * 64, 1, 5)
    contexts = {
        setting.context([1, 2]),
        setting.context([1, 3]),
        setting.context([1, 2, 3]),
        Setting("1" * 64, 1, 5).context([1, 2]),
        Setting("0" * 64, 2, 5).context([1, 2]),
        Setting("0" * 64, 1, 6).context([1, 2]),
    }
    assert len(contexts) == 6
    assert setting.context([2, 1]) == setting.context([1, 2])
    assert {len(context) for context in contexts} == {32}
    assert len(signed_message(setting, 1, bytes(32), bytes(32))) == len(
        signed_message(setting, 9, bytes(32), bytes(32))
    )


@pytest.mark.parametrize(
    "values",
    [
        ("0" * 63, 1, 1),
        ("0" * 64 + "\n", 1, 1),
        ("G" * 64, 1, 1),
        ("A" * 64, 1, 1),
        ("0" * 64, 0, 1),
        ("0" * 64, 2**32, 1),
        ("0" * 64, 1, 0),
        ("0" * 64, 1, 2**28 + 1),
    ],
)
def test_a_sum_about_nothing_possible_is_refused(values):
    with pytest.raises(ValueError, match="must be"):
        Setting(*values)
