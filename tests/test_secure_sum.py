"""A secure sum is exact or void, and shows the server the sum alone."""

import hashlib
import hmac
import itertools
import os

import numpy as np
import pytest
import scipy.stats as st
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import example, given, settings
from hypothesis import strategies as hy

import client.training.secure_sum
import server.secure_sum
from client.training.secure_sum import Participant
from shared.errors import SecureSumError
from shared.secure_sum import masks, shamir
from shared.secure_sum.graph import make_graph
from shared.secure_sum.messages import Advert, Credential, Parcels, Roster, Setting, Shares, Survivors, Terms

LEVEL = 1e-3
POWER = 1e-6
FIVE = Terms(threshold=3, neighbours=4, min_survivors=3)
RFC_8439 = [  # appendix A.1: key, counter, key stream
    (
        bytes(32),
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\1",
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        b"\0\xff" + bytes(30),
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
]


def uniform(words: np.ndarray) -> float:
    """p-value of the smallest of four chi-square tests, one a byte of the words."""
    cells = words.astype("<u4").view(np.uint8).reshape(-1, 4)
    return min(st.chisquare(np.bincount(cells[:, i], minlength=256)).pvalue for i in range(4))


def reference_hkdf(secret: bytes, info: bytes) -> bytes:
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\1", "sha256")


# T1


def expected(whole, terms, lost):
    """Survivors of a sum that must succeed, or None: the stages once more, as plain sets."""
    advertised = set(whole.seats) - lost[0]
    shared = advertised - lost[1]
    masked = shared - lost[2]
    answered = masked - lost[3]
    graph = whole.server._graph

    def starved(present):
        return any(len(present & set(graph[seat])) < terms.threshold for seat in shared)

    if len(advertised) < terms.min_survivors or terms.degree(len(advertised)) < terms.threshold:
        return None
    if len(shared) < terms.min_survivors or len(masked) < terms.min_survivors:
        return None
    return None if any(starved(present) for present in (shared, masked, answered)) else masked


@hy.composite
def dropping_sums(draw):
    seats = draw(hy.lists(hy.integers(0, 2**32 - 1), min_size=3, max_size=9, unique=True))
    count = len(seats)
    neighbours = draw(hy.sampled_from([count - 1, *range(2, count - 1, 2)]))
    threshold = draw(hy.integers(neighbours // 2 + 1, neighbours))
    stage = draw(hy.lists(hy.integers(0, 11), min_size=count, max_size=count))  # most stay
    lost = [{s for s, at in zip(seats, stage, strict=True) if at == i} for i in range(4)]
    return seats, Terms(threshold, neighbours, draw(hy.integers(2, count))), lost, draw(hy.integers(1, 5))


@pytest.mark.fault("R21")
@settings(max_examples=50, deadline=None)
@example(([0, 1, 2], Terms(2, 2, 2), [set(), set(), set(), {0, 1, 2}], 1), 0)
@example(([0, 1, 2], Terms(2, 2, 2), [set(), set(), {0, 1, 2}, set()], 1), 0)
@given(dropping_sums(), hy.integers(0, 2**16))
def test_t1_the_sum_is_exact_whoever_drops_out_or_there_is_none(sums, drawn, seed):
    seats, terms, lost, coordinates = drawn
    whole = sums.WholeSum(seats, terms, coordinates=coordinates, seed=seed)
    vectors = sums.vectors_for(seats, coordinates=coordinates, seed=seed)
    try:
        total, code = whole.run(vectors, lost=lost), ""
    except SecureSumError as error:
        total, code = None, error.code
    survivors = expected(whole, terms, lost)
    if survivors is None:
        assert code == "TOO_FEW"
    else:
        assert code == ""
        assert survivors == whole.server.survivors
        assert total.tolist() == sums.added(vectors[seat] for seat in survivors).tolist()


@pytest.mark.fault("R21")
@pytest.mark.parametrize("neighbours", [14, 9, 6])
def test_t1_somebody_drops_out_at_every_stage(sums, neighbours):
    whole = sums.WholeSum(range(100, 115), Terms((neighbours + 1) // 2 + 1, neighbours, 9), seed=3)
    vectors = sums.vectors_for(range(100, 115))
    total = whole.run(vectors, lost=[{103}, {114}, {100}, {107}])
    survivors = set(range(100, 115)) - {100, 103, 114}
    assert whole.server.survivors == survivors
    assert total.tolist() == sums.added(vectors[seat] for seat in survivors).tolist()


# T2


def masked_by(sums, vector, *, name=""):
    """What the device on seat 2 of five sends for a vector, the keys given by a name."""
    whole = sums.WholeSum(range(5), FIVE, coordinates=len(vector), name=name)
    whole.advertise(range(5))
    whole.share(range(5))
    return whole.devices[2].mask(vector, whole.server.parcels_for(2))


def test_t2_a_masked_vector_is_uniform_and_its_masks_do_not_depend_on_the_input(sums):
    count = 2**16
    zeros, other = np.zeros(count, dtype=np.int64), np.arange(count, dtype=np.int64) - 100
    first, second = masked_by(sums, zeros), masked_by(sums, other)
    assert uniform(first) > LEVEL
    assert uniform(second) > LEVEL
    assert (second - first).tolist() == other.astype(np.uint32).tolist()
    assert uniform(masked_by(sums, other, name="other keys") - first) > LEVEL
    assert uniform(other.astype(np.uint32)) < POWER
    assert uniform(first & 0x7FFFFFFF) < POWER  # one bit short of the ring


def test_t2_every_mask_is_uniform_over_its_keys():
    context = Setting("0" * 64, 1, 1).context([1])
    words = [masks.own_mask(os.urandom(32), seat=1, context=context, count=1)[0] for _ in range(4096)]
    assert st.kstest(np.array(words) / 2**32, "uniform").pvalue > 1e-9  # keys nobody chose: fails once in 10^9 runs


def test_a_masked_vector_holds_a_mask_of_its_own_and_one_with_every_neighbour(sums):
    """None of them alone, nor all but one, unmasks it."""
    whole = sums.WholeSum(range(5), FIVE, coordinates=64)
    whole.advertise(range(5))
    whole.share(range(5))
    _, mask, seed = client.training.secure_sum._parts(whole.devices[2]._secrets)
    own, context = whole.devices[2].advert, whole.setting.context(range(5))
    parts = [masks.own_mask(seed, seat=2, context=context, count=64)]
    for other in (0, 1, 3, 4):
        pair = masks.pair_mask(
            masks.load_key(mask), own, whole.devices[other].advert, context=context, count=64
        ) * np.uint32(1)
        parts.append(pair if other > 2 else -pair)
    masked = whole.devices[2].mask(np.zeros(64, dtype=np.int64), whole.server.parcels_for(2))
    assert not (masked - sum(parts)).any()
    for subset in itertools.chain.from_iterable(itertools.combinations(parts, size) for size in range(5)):
        rest = masked - sum(subset, start=np.zeros(64, dtype=np.uint32))
        assert (rest > 2**16).mean() > 0.9


# T3


def test_t3_fewer_shares_than_the_threshold_give_nothing_back(sums):
    secret, seats = os.urandom(32), range(40, 50)
    shares = shamir.split(secret, seats=seats, threshold=6, entropy=os.urandom)
    for chosen in itertools.combinations(seats, 6):
        assert shamir.join({seat: shares[seat] for seat in chosen}, threshold=6) == secret
    few = {seat: shares[seat] for seat in range(40, 45)}
    sums.refused("TOO_FEW", shamir.join, few, threshold=6)
    sums.refused("UNMASK", shamir.join, few, threshold=5)
    sums.refused("UNMASK", shamir.join, {**few, 45: shares[46]}, threshold=6)
    wrong = (int.from_bytes(shares[45]) ^ 1).to_bytes(66)
    sums.refused("UNMASK", shamir.join, {**few, 45: wrong}, threshold=6)


def test_t3_with_one_share_less_every_secret_is_as_likely():
    """For any other secret there is one last share with which the rest give that one."""
    shares = shamir.split(b"\1" * 32, seats=range(4), threshold=4, entropy=os.urandom)
    other = b"\2" * 32
    points = {seat + 1: int.from_bytes(shares[seat]) for seat in range(3)}
    points[0] = int.from_bytes(other + hashlib.sha256(other).digest())
    last = 0
    for x, y in points.items():
        for z in points:
            if z != x:
                y = y * (4 - z) * pow(x - z, -1, shamir.PRIME) % shamir.PRIME
        last += y
    few = {seat: shares[seat] for seat in range(3)}
    assert shamir.join({**few, 3: (last % shamir.PRIME).to_bytes(66)}, threshold=4) == other


def test_t3_one_share_is_uniform_whatever_the_secret():
    entropy = np.random.default_rng(5).bytes
    drawn = [shamir.split(bytes(32), seats=[6, 7], threshold=2, entropy=entropy)[7] for _ in range(8192)]
    for position in (1, 33, 65):
        assert st.chisquare(np.bincount([share[position] for share in drawn], minlength=256)).pvalue > LEVEL


def test_coefficients_are_521_bits_and_never_the_prime_itself():
    stream = iter([b"\xff" * 66, b"\xff" * 65 + b"\x7f", b"\x80" + bytes(65)])
    assert shamir._draw(lambda size: next(stream)[:size]) == shamir.PRIME - 1
    assert shamir._draw(lambda size: next(stream)[:size]) == 2**520


def test_the_field_is_one():
    assert pow(3, shamir.PRIME - 1, shamir.PRIME) == 1
    residue = 4  # Lucas-Lehmer
    for _ in range(521 - 2):
        residue = (residue * residue - 2) % shamir.PRIME
    assert residue == 0
    assert shamir.is_share(bytes(66))
    assert not shamir.is_share(shamir.PRIME.to_bytes(66))
    assert not shamir.is_share(bytes(65))


@pytest.mark.parametrize(("seats", "threshold"), [([1, 1], 1), ([1], 2), ([1, 2], 0), ([-1, 2], 1)])
def test_impossible_shares_are_refused(seats, threshold):
    with pytest.raises(ValueError, match="split needs"):
        shamir.split(bytes(32), seats=seats, threshold=threshold, entropy=os.urandom)


# T4


def view_of_everybody_but_two(sums, monkeypatch, vectors, *, shift, lost=()):
    """All that the server and three colluders hold or see in a sum of five; ``shift`` moves the mask of the two."""

    def pair_mask(private, own, other, *, context, count):
        pair = masks.pair_mask(private, own, other, context=context, count=count)
        return pair - shift.astype(np.uint32) if {own.seat, other.seat} == {1, 3} else pair

    def served(private, own, other, *, context, count):
        assert {own.seat, other.seat} != {1, 3}  # never reconstructed
        return masks.pair_mask(private, own, other, context=context, count=count)

    monkeypatch.setattr(client.training.secure_sum, "pair_mask", pair_mask)
    monkeypatch.setattr(server.secure_sum, "pair_mask", served)
    whole, view = sums.WholeSum(range(5), Terms(4 - len(lost), 4, 2)), []

    def look():
        view.extend(whole.devices[seat].to_bytes() for seat in (0, 2, 4))

    whole.advertise(range(5))
    look()
    whole.share(range(5))
    look()
    whole.mask({seat: vectors[seat] for seat in range(5) if seat not in lost})
    look()
    total = whole.unmask([seat for seat in range(5) if seat not in lost])
    for _ in (1, 3):
        assert len([c for c in (0, 2, 4) if c not in lost]) < whole.terms.threshold
        with pytest.raises(SecureSumError):  # the colluders' shares of a key that nobody asks for
            shamir.join({c: bytes(66) for c in (0, 2, 4) if c not in lost}, threshold=whole.terms.threshold)
    return [*whole.seen, *view, total.tobytes()]


@pytest.mark.parametrize("lost", [(), (4,)])
def test_t4_how_two_honest_devices_split_their_sum_is_hidden_from_all_others(sums, monkeypatch, lost):
    """A shift from one to the other and a mask of the two that makes up for it, as likely as before, change no byte."""
    vectors, shift = sums.vectors_for(range(5)), np.array([1, -77, 2**30])
    moved = {**vectors, 1: wrapped(vectors[1] + shift), 3: wrapped(vectors[3] - shift)}
    seen = view_of_everybody_but_two(sums, monkeypatch, vectors, shift=0 * shift, lost=lost)
    assert view_of_everybody_but_two(sums, monkeypatch, moved, shift=shift, lost=lost) == seen
    assert view_of_everybody_but_two(sums, monkeypatch, moved, shift=0 * shift, lost=lost) != seen
    other = {**moved, 3: vectors[3]}
    assert view_of_everybody_but_two(sums, monkeypatch, other, shift=shift, lost=lost) != seen


def wrapped(vector: np.ndarray) -> np.ndarray:
    return vector.astype(np.uint32).astype(np.int32).astype(np.int64)


# T5, and the other refusals of a list of survivors


@pytest.fixture
def masked(sums):
    """A sum of ten whose seat 9 dropped out before it sent a vector."""
    whole = sums.WholeSum(range(10), sums.TEN)
    whole.advertise(range(10))
    whole.share(range(10))
    whole.mask({seat: vector for seat, vector in sums.vectors_for(range(10)).items() if seat != 9})
    return whole


@pytest.mark.fault("R21")
def test_t5_nobody_is_unmasked_as_alive_and_dead(sums, masked):
    for alive, dead in (((*range(10),), (9,)), ((*range(9),), (8, 9)), ((*range(9),), (*range(10),))):
        sums.refused("UNMASK", masked.devices[3].unmask, Survivors(alive, dead))
    assert len(masked.devices[3].unmask(Survivors((*range(9),), (9,))).items) == 9


@pytest.mark.fault("R21")
@pytest.mark.parametrize(
    ("alive", "dead", "code"),
    [
        ((*range(9), 10), (9,), "UNMASK"),  # a stranger
        ((*range(9),), (9, 77), "UNMASK"),
        ((*range(9),), (), "UNMASK"),  # somebody left out
        ((*range(8),), (9,), "UNMASK"),
        ((0, 1, 2, *range(4, 10)), (3,), "UNMASK"),  # this device itself
        ((*range(7),), (7, 8, 9), "TOO_FEW"),
        ((), (*range(10),), "UNMASK"),
    ],
)
def test_a_device_unmasks_nobody_for_a_list_that_is_wrong_or_short(sums, masked, alive, dead, code):
    sums.refused(code, masked.devices[3].unmask, Survivors(alive, dead))


@pytest.mark.fault("R21")
def test_a_device_with_too_few_surviving_neighbours_unmasks_nobody(sums):
    terms = Terms(threshold=4, neighbours=4, min_survivors=8)
    whole = sums.WholeSum(range(10), terms)
    whole.advertise(range(10))
    whole.share(range(10))
    whole.mask(sums.vectors_for(range(10)))
    near = whole.server._graph[0]
    alive = tuple(seat for seat in range(10) if seat != near[0])
    sums.refused("TOO_FEW", whole.devices[0].unmask, Survivors(alive, near[:1]))
    far = tuple(seat for seat in range(1, 10) if seat not in near)
    for count in (3, 5):  # 7 survivors, 5 survivors, all neighbours among them
        alive = tuple(seat for seat in range(10) if seat not in far[:count])
        sums.refused("TOO_FEW", whole.devices[0].unmask, Survivors(alive, far[:count]))
    whole.devices[0].unmask(Survivors(tuple(range(10)), ()))


@pytest.mark.fault("R21")
def test_a_second_unmasking_is_refused(sums, masked):
    survivors = masked.server.survivors_for(0)
    masked.devices[0].unmask(survivors)
    sums.refused("STAGE", masked.devices[0].unmask, survivors)
    again = Participant.from_bytes(masked.devices[0].to_bytes())
    sums.refused("STAGE", again.unmask, survivors)
    assert again._held == {}


# T6, and the other refusals of parcels


def shared_parcels(sums, **changes):
    """A sum after its shares, and what everybody sent to whom; the same keys whatever is changed."""
    settings = {"seats": range(10), "terms": sums.TEN, **changes}
    whole = sums.WholeSum(settings.pop("seats"), settings.pop("terms"), **settings)
    whole.advertise(whole.seats)
    whole.share(whole.seats)
    return whole


def test_t6_a_parcel_of_another_sum_receiver_or_sender_is_refused(sums):
    vector = sums.vectors_for([0])[0]
    honest = shared_parcels(sums)
    wrong = [
        shared_parcels(sums, round_number=2).server.parcels_for(0),
        shared_parcels(sums, policy="cd" * 32).server.parcels_for(0),
        shared_parcels(sums, seats=[*range(9), 10]).server.parcels_for(0),
        Parcels(tuple((seat, honest.server._parcels[seat][1 if seat != 1 else 2]) for seat in range(1, 10))),
    ]
    wrong[2] = Parcels((*wrong[2].items[:-1], (9, wrong[2].items[-1][1])))
    good = dict(honest.server.parcels_for(0).items)
    wrong.append(Parcels(tuple((seat, good[seat % 9 + 1]) for seat in range(1, 10))))
    for parcels in wrong:
        sums.refused("PARCELS", honest.devices[0].mask, vector, parcels)
        for (seat, taken), (_, own) in zip(parcels.items, sorted(good.items()), strict=True):
            assert taken != own
            mixed = Parcels(tuple(sorted({**good, seat: taken}.items())))
            sums.refused("PARCELS", honest.devices[0].mask, vector, mixed)
    assert honest.devices[0].mask(vector, Parcels(tuple(sorted(good.items())))).shape == (3,)


def test_a_parcel_that_was_changed_or_is_a_strangers_is_refused(sums):
    whole, vector = shared_parcels(sums), sums.vectors_for([0])[0]
    good = whole.server.parcels_for(0)
    (seat, parcel), *rest = good.items
    for changed in (b"", parcel[:20], parcel[:-1], parcel + b"\0", parcel[:-1] + bytes([parcel[-1] ^ 1])):
        sums.refused("PARCELS", whole.devices[0].mask, vector, Parcels(((seat, changed), *rest)))
    sums.refused("PARCELS", whole.devices[0].mask, vector, Parcels((*good.items, (77, parcel))))
    sums.refused("TOO_FEW", whole.devices[0].mask, vector, Parcels(good.items[:6]))
    assert whole.devices[0].mask(vector, Parcels(good.items[:7])).shape == (3,)


def test_a_parcel_that_holds_no_shares_is_refused(sums):
    whole = shared_parcels(sums)
    sender, receiver = whole.devices[1], whole.devices[0]
    private = masks.load_key(entropy_key(sums, 1))
    for content in (bytes(131), bytes(133), shamir.PRIME.to_bytes(66) + bytes(66)):
        forged = masks.seal(
            content,
            private,
            sender=sender.advert,
            receiver=receiver.advert,
            context=whole.setting.context(range(10)),
            nonce=bytes(12),
        )
        parcels = Parcels(((1, forged), *whole.server.parcels_for(0).items[1:]))
        sums.refused("PARCELS", receiver.mask, sums.vectors_for([0])[0], parcels)


def entropy_key(sums, seat):
    """The cipher key that a device of this name made."""
    return sums.entropy_of(f" {seat}")(96)[:32]


# Rosters


def roster_changes(roster):
    """(what, roster) that seat 0 must refuse."""
    (own, credential), *others = roster.members
    other = others[0][0]
    fresh = masks.public_bytes(masks.load_key(b"\7" * 32))

    def members(*adverts):
        return tuple((advert, credential) for advert in adverts)

    rest = [advert for advert, _ in others]
    yield "own key", Roster(roster.seats, members(Advert(0, fresh, own.mask_key, own.signature), *rest))
    yield "own signature", Roster(roster.seats, members(Advert(0, own.cipher_key, own.mask_key, b"x"), *rest))
    yield "own entry missing", Roster(roster.seats, members(*rest))
    yield "a neighbour less", Roster(roster.seats, members(own, *rest[:-1]))
    yield (
        "a key twice",
        Roster(roster.seats, members(own, Advert(1, rest[1].cipher_key, other.mask_key, b""), *rest[1:])),
    )
    yield (
        "one key for both",
        Roster(roster.seats, members(own, Advert(1, other.mask_key, other.mask_key, b""), *rest[1:])),
    )
    yield (
        "this device's key",
        Roster(roster.seats, members(own, Advert(1, other.cipher_key, own.mask_key, b""), *rest[1:])),
    )
    yield "too few seats", Roster(roster.seats[:7], members(own, *rest[:6]))
    yield "a neighbour without a point", Roster(roster.seats, members(own, Advert(1, bytes(32), fresh, b""), *rest[1:]))


def test_a_roster_that_was_changed_is_refused(sums):
    whole = sums.WholeSum(range(10), sums.TEN)
    whole.advertise(range(10))
    good = whole.server.roster_for(0)
    for what, roster in roster_changes(good):
        with pytest.raises(SecureSumError) as caught:
            whole.devices[0].share(roster, verify=sums.trusting)
        assert caught.value.code == "ROSTER", what
    assert len(whole.devices[0].share(good, verify=sums.trusting).items) == 9


@pytest.mark.fault("R21")
def test_a_roster_below_the_minimum_is_refused_by_the_device_too(sums):
    """The server has laxer terms than the policy."""
    strict, lax = (sums.WholeSum(range(7), Terms(3, 4, least)) for least in (8, 7))
    lax.advertise(range(7))
    sums.refused("ROSTER", strict.devices[0].share, lax.server.roster_for(0), verify=sums.trusting)
    assert len(lax.devices[0].share(lax.server.roster_for(0), verify=sums.trusting).items) == 4


def test_a_seat_that_is_there_twice_is_refused(sums):
    whole = sums.WholeSum(range(10), sums.TEN)
    whole.advertise(range(10))
    roster = whole.server.roster_for(0)
    sums.refused("MALFORMED", Roster, (0, 0, *range(2, 10)), roster.members)
    sums.refused("MALFORMED", Roster, roster.seats, (roster.members[0], *roster.members[:-1]))
    sums.refused("MALFORMED", Roster, roster.seats[:5], roster.members)


def test_every_signature_of_a_roster_is_checked_before_a_share_is_made(sums):
    whole = sums.WholeSum(range(10), sums.TEN)
    whole.advertise(range(10))
    roster, checked = whole.server.roster_for(4), []

    def verify(seat, credential, message, signature):
        checked.append((seat, credential, message, signature))
        if seat == 7:
            raise SecureSumError("not certified", code="ROSTER")

    sums.refused("ROSTER", whole.devices[4].share, roster, verify=verify)
    assert [seat for seat, *_ in checked] == list(range(8))
    assert checked[3][1] == Credential("key 3", b"certificate")
    assert checked[3][3] == b"signed"
    assert len({message for _, _, message, _ in checked}) == 8
    whole.devices[4].share(roster, verify=sums.trusting)


def test_a_signature_is_bound_to_campaign_round_length_seat_and_keys():
    signed = set()
    for setting in (Setting("0" * 64, 1, 5), Setting("1" * 64, 1, 5), Setting("0" * 64, 2, 5), Setting("0" * 64, 1, 6)):
        for seat, name in ((0, b"a"), (1, b"a"), (0, b"b")):
            entropy = np.random.default_rng(list(name)).bytes
            participant = Participant.begin(
                setting, seat=seat, terms=FIVE, sign=lambda m: hashlib.sha256(m).digest(), entropy=entropy
            )
            signed.add(participant.advert.signature)
    assert len(signed) == 12


@pytest.mark.parametrize(("threshold", "neighbours"), [(2, 4), (4, 8), (0, 0), (5, 4), (49, 99)])
def test_a_threshold_of_half_the_neighbours_or_less_is_refused(threshold, neighbours):
    with pytest.raises(ValueError, match="more than half"):
        Terms(threshold, neighbours, 2)


def test_a_threshold_that_is_half_of_the_neighbours_a_device_is_given_is_refused(sums):
    """Three neighbours cannot be had by nine devices, so they get four."""
    whole = sums.WholeSum(range(9), Terms(threshold=2, neighbours=3, min_survivors=2))
    whole.advertise(range(9))
    sums.refused("ROSTER", whole.devices[0].share, whole.server.roster_for(0), verify=sums.trusting)


def test_a_sum_of_one_is_no_sum():
    with pytest.raises(ValueError, match="at least 2"):
        Terms(3, 4, 1)


# T7


def test_t7_a_sum_wraps_at_the_ends_of_the_ring(sums):
    low, high = -(2**31), 2**31 - 1
    rows = [[low, low, high, -5, 0], [low, 0, high, 2, high], [0, -1, 1, 1, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    vectors = dict(enumerate(np.array(rows, dtype=np.int64)))
    total = sums.WholeSum(range(5), FIVE, coordinates=5).run(vectors)
    assert total.tolist() == [1, 2**31 - 1, 2**32 - 1, 2**32 - 1, 2**31]
    assert total.astype(np.int32).tolist() == [1, high, -1, -1, low]


# T8


@pytest.mark.parametrize(("key", "counter", "expected"), RFC_8439)
def test_t8_masks_are_the_key_stream_of_rfc_8439(key, counter, expected):
    words = masks.stream(key, 16 * (counter + 1))
    assert words.dtype == np.uint32
    assert words[16 * counter :].astype("<u4").tobytes().hex() == expected
    assert masks.stream(key, 5).tolist() == masks.stream(key, 70)[:5].tolist()


def test_t8_keys_are_those_of_rfc_5869():
    extracted = hmac.digest(bytes(32), b"\x0b" * 22, "sha256")  # its test case 3
    assert hmac.digest(extracted, b"\1", "sha256").hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    )
    derived = masks.derive(b"\5" * 32, purpose=b"test", context=b"c" * 32)
    assert derived == reference_hkdf(b"\5" * 32, b"sottovoce secure sum 1 key" + b"c" * 32 + b"test")


def test_masks_are_what_their_definition_says():
    """Written out from RFC 7748 and RFC 8439 keys, so that a change of format does not go unseen."""
    first, second = (masks.load_key(bytes([n]) * 32) for n in (1, 2))
    adverts = [Advert(n, masks.public_bytes(key), masks.public_bytes(key), b"") for n, key in ((8, first), (3, second))]
    shared, context = first.exchange(second.public_key()), b"c" * 32
    seats = (3).to_bytes(4) + (8).to_bytes(4)
    info = b"sottovoce secure sum 1 key" + context + b"pair mask" + seats + adverts[1].mask_key + adverts[0].mask_key
    pair = masks.stream(reference_hkdf(shared, info), 4).tolist()
    assert masks.pair_mask(first, adverts[0], adverts[1], context=context, count=4).tolist() == pair
    assert masks.pair_mask(second, adverts[1], adverts[0], context=context, count=4).tolist() == pair

    info = b"sottovoce secure sum 1 key" + context + b"own mask" + (8).to_bytes(4)
    own = masks.stream(reference_hkdf(b"s" * 32, info), 4).tolist()
    assert masks.own_mask(b"s" * 32, seat=8, context=context, count=4).tolist() == own


def test_a_parcel_is_what_its_definition_says():
    first, second = (masks.load_key(bytes([n]) * 32) for n in (1, 2))
    sender, receiver = (Advert(n, masks.public_bytes(key), bytes(32), b"") for n, key in ((8, first), (3, second)))
    context, nonce, seats = b"c" * 32, b"n" * 12, (8).to_bytes(4) + (3).to_bytes(4)
    parcel = masks.seal(b"shares", first, sender=sender, receiver=receiver, context=context, nonce=nonce)
    info = b"sottovoce secure sum 1 key" + context + b"parcel" + seats + sender.cipher_key + receiver.cipher_key
    key = reference_hkdf(first.exchange(second.public_key()), info)
    assert parcel == nonce + ChaCha20Poly1305(key).encrypt(nonce, b"shares", context + seats)
    assert masks.unseal(parcel, second, sender=sender, receiver=receiver, context=context) == b"shares"


# T9


def test_t9_no_key_is_ever_used_for_two_things(sums, monkeypatch):
    """The same secrets in another round, campaign, roster or length give other keys, and other ones to every pair."""
    uses: dict[bytes, set[tuple[bytes, bytes]]] = {}

    def derive(secret, *, purpose, context):
        key = derive.original(secret, purpose=purpose, context=context)
        uses.setdefault(key, set()).add((purpose, context))
        return key

    derive.original = masks.derive
    monkeypatch.setattr(masks, "derive", derive)
    changes = [{}, {"round_number": 2}, {"policy": "cd" * 32}, {"coordinates": 4}, {"seats": range(6)}]
    for change in changes:
        whole = sums.WholeSum(change.pop("seats", range(5)), FIVE, **change)
        whole.run(sums.vectors_for(whole.seats, coordinates=whole.setting.coordinates))
    assert all(len(used) == 1 for used in uses.values())
    five, six = 5 + 5 * 4 + 5 * 4 // 2, 6 + 6 * 4 + 6 * 4 // 2  # own masks, parcels, pairs
    assert len(uses) == 4 * five + six


def test_t9_every_round_has_keys_of_its_own():
    made = [
        Participant.begin(Setting("0" * 64, n, 1), seat=0, terms=FIVE, sign=lambda m: b"").advert for n in range(1, 30)
    ]
    assert len({key for advert in made for key in (advert.cipher_key, advert.mask_key)}) == 58


# T10


@pytest.mark.parametrize(
    "vector",
    [
        np.array([0.0, 1.0, np.nan]),
        np.array([0.0, np.inf, 1.0]),
        np.zeros(3),
        np.zeros(3, dtype=np.int32),
        np.zeros(3, dtype=np.uint64),
        np.zeros(3, dtype=object),
        np.zeros(3, dtype=">i8"),
        np.zeros(2, dtype=np.int64),
        np.zeros((1, 3), dtype=np.int64),
        np.array([0, 0, 2**31]),
        np.array([0, -(2**31) - 1, 0]),
        np.array([2**63 - 1, 0, 0]),
        [0, 0, 0],
    ],
)
def test_t10_a_vector_that_is_not_of_integers_within_the_ring_is_refused(sums, vector):
    whole = shared_parcels(sums, seats=range(5), terms=FIVE)
    with pytest.raises(ValueError, match="a vector must be"):
        whole.devices[0].mask(vector, whole.server.parcels_for(0))
    assert whole.devices[0].mask(np.array([0, 2**31 - 1, -(2**31)]), whole.server.parcels_for(0)).shape == (3,)


# A device's state


def test_what_is_left_after_masking_cannot_mask_again(sums):
    whole = shared_parcels(sums, seats=range(5), terms=FIVE)
    vectors, parcels = sums.vectors_for(range(5)), whole.server.parcels_for(0)
    made = sums.entropy_of(" 0")(96)
    secrets = [made[i : i + 32] for i in (0, 32, 64)]
    assert all(secret in whole.devices[0].to_bytes() for secret in secrets)
    whole.devices[0].mask(vectors[0], parcels)
    for vector in (vectors[0], vectors[1]):
        sums.refused("STAGE", whole.devices[0].mask, vector, parcels)
        sums.refused("STAGE", Participant.from_bytes(whole.devices[0].to_bytes()).mask, vector, parcels)
    held = repr(vars(whole.devices[0])).encode() + whole.devices[0].to_bytes()
    assert not any(secret in held or repr(secret).encode() in held for secret in secrets)


def test_stages_out_of_order_are_refused(sums):
    whole = sums.WholeSum(range(5), FIVE)
    vectors, survivors = sums.vectors_for(range(5)), Survivors(tuple(range(5)), ())
    device = whole.devices[0]
    sums.refused("STAGE", device.mask, vectors[0], Parcels(()))
    sums.refused("STAGE", device.unmask, survivors)
    whole.advertise(range(5))
    roster = whole.server.roster_for(0)
    for seat in range(5):
        whole.server.add_parcels(seat, whole.devices[seat].share(whole.server.roster_for(seat), verify=sums.trusting))
    whole.server.close_parcels()
    sums.refused("STAGE", device.share, roster, verify=sums.trusting)
    sums.refused("STAGE", device.unmask, survivors)
    device.mask(vectors[0], whole.server.parcels_for(0))
    sums.refused("STAGE", device.share, roster, verify=sums.trusting)
    device.unmask(survivors)
    for step in (lambda: device.share(roster, verify=sums.trusting), lambda: device.unmask(survivors)):
        sums.refused("STAGE", step)


# What the server sees


def test_the_server_sees_no_vector_and_can_make_out_the_sum_of_the_survivors_alone(sums):
    """Seat 5 drops out, and its vector arrives late; all shares were handed out as they should be."""
    count, seats = 4096, range(6)
    whole = sums.WholeSum(seats, Terms(threshold=4, neighbours=5, min_survivors=5), coordinates=count)
    generator = np.random.default_rng(1)
    vectors = {seat: generator.integers(-1000, 1000, count) for seat in seats}  # small: a mask that is left shows
    whole.advertise(seats)
    whole.share(seats)
    late = whole.devices[5].mask(vectors[5], whole.server.parcels_for(5))
    whole.mask({seat: vectors[seat] for seat in range(5)})
    arrived = {seat: np.frombuffer(whole.seen[-5 + seat], dtype=np.uint32) for seat in range(5)}
    total = whole.unmask(range(5))
    assert total.tolist() == sums.added(vectors[seat] for seat in range(5)).tolist()

    seen = b"".join([*whole.seen, late.tobytes()])
    for vector in vectors.values():
        for kind in (np.int64, np.int32, ">i4", np.float32):
            assert vector[:8].astype(kind).tobytes() not in seen

    shares, context = whole.server._shares, whole.setting.context(seats)
    seeds = {seat: shamir.join(shares[seat], threshold=4) for seat in range(5)}
    key = masks.load_key(shamir.join(shares[5], threshold=4))  # its masks' key, and of its seed there is no share
    adverts = {seat: whole.devices[seat].advert for seat in seats}
    assert masks.public_bytes(key) == adverts[5].mask_key
    pairs = {seat: masks.pair_mask(key, adverts[5], adverts[seat], context=context, count=count) for seat in range(5)}
    rest = {
        seat: arrived[seat] - masks.own_mask(seeds[seat], seat=seat, context=context, count=count) - pairs[seat]
        for seat in range(5)
    }
    for size in range(1, 5):
        for chosen in itertools.combinations(range(5), size):
            assert uniform(sum(rest[seat] for seat in chosen)) > LEVEL / 100  # 30 sums, 4 bytes each
    assert sum(rest.values()).tolist() == total.tolist()
    assert uniform(total) < POWER
    assert uniform(late + sum(pairs.values())) > LEVEL


# The server's half


@pytest.mark.fault("R21")
def test_the_server_gives_nothing_to_unmask_below_the_minimum(sums):
    whole = sums.WholeSum(range(10), sums.TEN)
    vectors = sums.vectors_for(range(10))
    whole.advertise(range(10))
    whole.share(range(10))
    whole.mask({seat: vectors[seat] for seat in range(7)})
    for _ in range(2):
        sums.refused("TOO_FEW", whole.server.survivors_for, 0)
        sums.refused("STAGE", whole.server.total)
        sums.refused("STAGE", whole.server.add_shares, 0, Shares(()))
    whole.mask({7: vectors[7]})
    assert whole.server.survivors_for(0) == Survivors(tuple(range(8)), (8, 9))
    sums.refused("STAGE", whole.server.add_masked, 8, np.zeros(3, dtype=np.uint32))
    sums.refused("STAGE", whole.server.survivors_for, 8)
    assert whole.unmask(range(8)).tolist() == sums.added(vectors[seat] for seat in range(8)).tolist()


@pytest.mark.fault("R21")
def test_the_server_gives_nothing_to_unmask_where_one_device_lost_its_neighbours(sums):
    """Though survivors are more than enough."""
    whole = sums.WholeSum(range(10), Terms(threshold=4, neighbours=4, min_survivors=2))
    whole.advertise(range(10))
    whole.share(range(10))
    whole.mask({seat: vector for seat, vector in sums.vectors_for(range(10)).items() if seat != 9})
    sums.refused("TOO_FEW", whole.server.survivors_for, 0)
    whole = sums.WholeSum(range(10), Terms(threshold=4, neighbours=4, min_survivors=2))
    whole.advertise(range(10))
    sums.refused("TOO_FEW", whole.share, range(9))


@pytest.mark.fault("R21")
def test_a_stage_with_too_few_ends_the_round(sums):
    whole = sums.WholeSum(range(10), sums.TEN)
    sums.refused("TOO_FEW", whole.advertise, range(7))
    whole = sums.WholeSum(range(10), sums.TEN)
    whole.advertise(range(10))
    sums.refused("TOO_FEW", whole.share, range(7))


def test_the_server_leaves_out_whom_it_cannot_use(sums):
    whole = sums.WholeSum(range(10), sums.TEN)
    adverts = {seat: device.advert for seat, device in whole.devices.items()}
    add = whole.server.add_advert
    add(0, adverts[0])
    sums.refused("ROSTER", add, 0, adverts[0])
    sums.refused("ROSTER", add, 1, adverts[2])
    sums.refused("ROSTER", add, 77, Advert(77, adverts[1].cipher_key, adverts[1].mask_key, b""))
    sums.refused("ROSTER", add, 1, Advert(1, adverts[0].mask_key, adverts[1].mask_key, b""))
    sums.refused("ROSTER", add, 1, Advert(1, adverts[1].mask_key, adverts[1].mask_key, b""))
    for seat in range(1, 10):
        add(seat, adverts[seat])
    sums.refused("STAGE", whole.server.roster_for, 0)
    whole.server.close_adverts()
    sums.refused("STAGE", add, 1, adverts[1])
    parcels = whole.devices[0].share(whole.server.roster_for(0), verify=sums.trusting)
    sums.refused("PARCELS", whole.server.add_parcels, 0, Parcels(parcels.items[:-1]))
    sums.refused("STAGE", whole.server.add_parcels, 77, parcels)
    whole.server.add_parcels(0, parcels)
    sums.refused("PARCELS", whole.server.add_parcels, 0, parcels)
    whole.share(range(1, 10))
    for wrong in (np.zeros(3), np.zeros(2, dtype=np.uint32), np.zeros(3, dtype=np.int32), b"123"):
        sums.refused("MALFORMED", whole.server.add_masked, 0, wrong)
    vectors = sums.vectors_for(range(10))
    whole.mask(vectors)
    sums.refused("STAGE", whole.server.add_masked, 0, np.zeros(3, dtype=np.uint32))
    shares = whole.devices[0].unmask(whole.server.survivors_for(0))
    for wrong in (shares.items[:-1], ((1, bytes(65)), *shares.items[1:]), ((1, b"\xff" * 66), *shares.items[1:])):
        sums.refused("UNMASK", whole.server.add_shares, 0, Shares(wrong))
    whole.server.add_shares(0, shares)
    sums.refused("UNMASK", whole.server.add_shares, 0, shares)
    assert whole.unmask(range(1, 10)).tolist() == sums.added(vectors.values()).tolist()


@pytest.mark.fault("R21")
def test_a_wrong_share_voids_the_sum(sums, masked):
    """Of a survivor's seed, of the key of one that dropped out; or a right share of a key that is not its."""
    for wrong in (5, 9):
        whole = Copy(masked)
        shares = dict(whole.devices[0].unmask(whole.server.survivors_for(0)).items)
        shares[wrong] = (int.from_bytes(shares[wrong]) ^ 2).to_bytes(66)
        whole.server.add_shares(0, Shares(tuple(shares.items())))
        for seat in range(1, 9):
            whole.server.add_shares(seat, whole.devices[seat].unmask(whole.server.survivors_for(seat)))
        sums.refused("UNMASK", whole.server.total)


def test_a_device_that_shared_another_key_than_it_advertised_voids_the_sum(sums, monkeypatch):
    whole = sums.WholeSum(range(10), sums.TEN)
    whole.advertise(range(10))
    honest = shamir.split

    def split(secret, **named):
        return honest(secret if split.calls else bytes(32), **named)

    monkeypatch.setattr(client.training.secure_sum, "split", split)
    for split.calls, seat in enumerate([9, *range(9)]):
        whole.server.add_parcels(seat, whole.devices[seat].share(whole.server.roster_for(seat), verify=sums.trusting))
    whole.server.close_parcels()
    whole.mask({seat: vector for seat, vector in sums.vectors_for(range(10)).items() if seat != 9})
    sums.refused("UNMASK", whole.unmask, range(9))


class Copy:
    """A sum as it stands, to go on from twice."""

    def __init__(self, whole):
        import copy

        self.server = copy.deepcopy(whole.server)
        self.devices = {seat: Participant.from_bytes(device.to_bytes()) for seat, device in whole.devices.items()}


def test_graphs_are_regular_and_symmetric(sums):
    for count, degree in ((30, 4), (31, 10), (7, 6), (2, 1)):
        seats = [3 * seat + 1 for seat in range(count)]
        graph = make_graph(seats, degree, np.random.default_rng(count))
        assert graph.keys() == set(seats)
        for seat, neighbours in graph.items():
            assert len(set(neighbours)) == degree
            assert seat not in neighbours
            assert list(neighbours) == sorted(neighbours)
            assert all(seat in graph[other] for other in neighbours)
    assert make_graph(range(30), 4, np.random.default_rng(1)) != make_graph(range(30), 4, np.random.default_rng(2))
