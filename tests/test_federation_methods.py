"""Methods whose rounds differ, keep something on the device or have groups: two devices by hand, over the real wire."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from client.home.attributes import read_profile, write_profile
from client.personal.persona import choose_persona, declared_persona, weigh_personas
from client.training.site import open_workbench
from shared.config import (
    AdapterConfig,
    FederationConfig,
    ModelConfig,
    PersonaConfig,
    PersonalConfig,
    PrivacyConfig,
    Scenario,
    TrainingConfig,
)
from shared.errors import PrivacyError, ScenarioError
from shared.heads.adapter import load_shared, load_start, make_start, part_of, shared_parameters, trained_slots
from shared.heads.registry import make_head
from shared.heads.tasks import Scores
from shared.models.features import compute_hidden
from shared.privacy.accounting import epsilon
from shared.privacy.noise import SecureRandomness
from shared.privacy.promise import check_price
from shared.protocol.campaign import certify
from simulations.audit import stage
from sottovoce.cli import main

TEXTS = ("a small boat", "rain on the hills", "tea and cake", "an old song", "trains at night", "two dogs", "the sea")
SAID = ((0, 5.0), (1, 4.0), (2, 1.0)), ((3, 2.0), (4, 5.0), (5, 1.0))  # (text, rating) of each device


class World:
    """A campaign of two devices, and the same computed by hand with plain autograd."""

    def __init__(self, base, folder, *, name, blocks=1, rounds=2, trust="none", **tables):
        federation = {"server_optimizer": "momentum", "server_momentum": 0.0, "server_learning_rate": 0.5}
        self.scenario = Scenario(
            name=name,
            model=ModelConfig(head_blocks=blocks, base=str(base.folder)),
            adapter=AdapterConfig(rank=2, whitened_features=6),
            federation=FederationConfig(
                rounds=rounds, lora_learning_rate_factor=0.4, **(federation | tables.pop("federation", {}))
            ),
            training=TrainingConfig(learning_rate=0.3),
            privacy=PrivacyConfig(
                trust=trust, max_participations=rounds, denominator=2.0, delta=1e-3, **tables.pop("privacy", {})
            ),
            **tables,
        )
        self.head = make_head(base, self.scenario, public_texts=len(TEXTS))
        features = compute_hidden(base, base.tokenize(list(TEXTS), max_tokens=32), head_blocks=blocks)
        start = make_start(self.head, features, ridge=0.05, seed=3)
        self.campaign = stage.make_campaign(
            self.scenario,
            folder=folder,
            slots=trained_slots(self.head),
            start=start,
            clients=2,
            head_blocks=blocks,
            base=base,
            public_texts=TEXTS,
        )
        self.inputs = self.head.prepare(features)
        self.policy = self.campaign.policy

    def play(self, *, noise=None, randomness=None):
        bench = open_workbench(self.campaign)
        parts = [stage.Part(bench, *self.records(device), randomness=randomness) for device in (0, 1)]
        return stage.play(self.campaign, parts, noise=noise)

    def records(self, device):
        rows, ratings = zip(*SAID[device], strict=True)
        return self.inputs.select(rows), Scores(ratings)

    def losses(self, device, membership=None):
        features, targets = self.records(device)
        hidden, mask = features.batch(range(len(features)))
        if membership is not None:
            self.head.membership = membership
        return self.head(hidden, mask, targets.batch(np.arange(len(targets)), hidden.shape[1]))

    def gradients(self, device, names, membership=None):
        parameters = [self.named()[name] for name in names]
        found = torch.autograd.grad(self.losses(device, membership).sum(), parameters)
        return dict(zip(names, [gradient.numpy() for gradient in found], strict=True))

    def named(self):
        return {name.replace(".default.weight", ""): p for name, p in self.head.named_parameters()}

    def names_of(self, part):
        return [name for name in self.named() if part_of(name) == part]


def wire(name):
    """The hand's name -> the wire's: the tiny base has two blocks, the head the last."""
    return name.replace("blocks.0", "block.1")


def by_hand(world, arrays, turn, *, memberships=(None, None), denominator=2.0):
    """The next shared arrays: a step of each device from the same arrays, the mean change, the server's step."""
    load_shared(world.head, arrays)
    names = [name for part in turn for name in world.names_of(part)]
    both = [world.gradients(device, names, memberships[device]) for device in (0, 1)]
    after = dict(arrays)
    for name in names:
        change = -0.3 * (both[0][name] + both[1][name]) / denominator / 2
        rate = 0.5 * (0.4 if "lora_" in name else 1.0)
        after[wire(name)] = arrays[wire(name)] + rate * change
    return after


def close(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-4, atol=2e-6, err_msg=name)


def test_rolora_takes_turns_exactly(tiny_base, tmp_path):
    world = World(tiny_base, tmp_path, name="rolora", rounds=4, federation={"method": "rolora"})
    played = world.play()
    arrays = played.arrays[0]
    for number, turn in enumerate((("lora_B", "output"), ("lora_A", "output")) * 2, start=1):
        sent = played.update(number, 0)
        assert {part_of(name) for name in sent} == set(turn)
        arrays = by_hand(world, arrays, turn)
        close(played.arrays[number], arrays)
        arrays = played.arrays[number]
    [a] = [name for name in arrays if name.endswith("lora_A")][:1]
    assert np.array_equal(played.arrays[0][a], played.arrays[3][a])  # below an output and a B of zero nothing learns
    assert not np.array_equal(played.arrays[3][a], played.arrays[4][a])
    down, up = len(played.requests[1, 0]), len(played.replies[1, 0])
    assert up < down  # half of LoRA stays at home


def test_fedper_trains_an_output_of_each_device_and_shares_the_rest(tiny_base, tmp_path):
    world = World(
        tiny_base, tmp_path, name="fedper", federation={"method": "fedavg"}, personal=PersonalConfig(method="fedper")
    )
    assert not [name for name, _ in world.policy.slots if part_of(name) == "output"]
    assert [name for name, _ in world.policy.private] == ["output.weight"]
    played, own = world.play(), [np.zeros((1, 7), np.float32)] * 2
    for number in (1, 2):
        arrays, both, after = played.arrays[number - 1], [], dict(played.arrays[number - 1])
        names = [*world.names_of("lora_A"), *world.names_of("lora_B")]
        for device in (0, 1):
            load_shared(world.head, arrays)
            world.head.output.weight.data = torch.from_numpy(own[device].copy())
            both.append(world.gradients(device, [*names, "output.weight"]))
            own[device] = own[device] - 0.3 * both[-1]["output.weight"] / 2
        for name in names:
            after[wire(name)] = arrays[wire(name)] - 0.2 * 0.3 * (both[0][name] + both[1][name]) / 4
        close(played.arrays[number], after)
    assert not all(np.array_equal(played.arrays[1][name], played.arrays[2][name]) for name in after)
    assert not np.array_equal(own[0], own[1])


def test_fedsa_lora_shares_a_and_keeps_b_and_the_output_of_each_device(tiny_base, tmp_path):
    federation, personal = {"method": "fedavg"}, PersonalConfig(method="fedsa-lora")
    world = World(tiny_base, tmp_path, name="fedsa", rounds=3, federation=federation, personal=personal)
    shared, kept = world.names_of("lora_A"), [*world.names_of("lora_B"), "output.weight"]
    parameters = {n.replace(".default.weight", ""): each for n, each in world.head.named_parameters()}
    own = [{name: np.zeros(parameters[name].shape, np.float32) for name in kept} for _ in (0, 1)]
    played = world.play()
    for number in (1, 2, 3):
        arrays, both, after = played.arrays[number - 1], [], dict(played.arrays[number - 1])
        for device in (0, 1):
            load_shared(world.head, arrays)
            for name, array in own[device].items():
                parameters[name].data = torch.from_numpy(array.copy())
            both.append(world.gradients(device, [*shared, *kept]))
            own[device] = {name: array - 0.3 * both[-1][name] / 2 for name, array in own[device].items()}
        for name in shared:
            after[wire(name)] = arrays[wire(name)] - 0.2 * 0.3 * (both[0][name] + both[1][name]) / 4
        close(played.arrays[number], after)
    assert not all(np.array_equal(played.arrays[2][name], played.arrays[3][name]) for name in after)
    assert not any(np.array_equal(own[0][name], own[1][name]) for name in kept)


@pytest.mark.parametrize(
    ("personal", "shared", "kept"),
    [
        ("fedsa-lora", {"lora_A"}, {"lora_B", "output"}),
        ("fedbabu", {"lora_A", "lora_B"}, set()),
        ("user-embedding", {"lora_A", "lora_B", "output", "factors", "user"}, {"offset"}),
    ],
)
def test_what_is_shared_and_what_is_kept(tiny_base, tmp_path, personal, shared, kept):
    world = World(
        tiny_base, tmp_path, name="kept", rounds=3, federation={"method": "fedavg"},
        personal=PersonalConfig(method=personal, dimensions=3),
    )  # fmt: skip
    assert {part_of(name) for name, _ in world.policy.slots} == shared
    assert {part_of(name) for name, _ in world.policy.private} == kept
    played = world.play()
    moved = {name for name, array in played.arrays[-1].items() if not np.array_equal(array, played.arrays[0][name])}
    assert {part_of(name) for name in moved} == shared
    if personal == "fedbabu":
        assert world.campaign.start["output.weight"].std() > 0
        close(played.arrays[1], by_hand(world, played.arrays[0], ("lora_A", "lora_B")))


def test_a_kept_tensor_is_noised_with_the_shared_ones_and_never_travels(tiny_base, tmp_path):
    world = World(
        tiny_base, tmp_path, name="noised", trust="local", privacy={"epsilon": 8.0},
        federation={"method": "fedavg"}, personal=PersonalConfig(method="fedper"),
    )  # fmt: skip
    policy, size = world.policy, sum(math.prod(shape) for _, shape in world.policy.slots)
    assert policy.trained == size + 7 == policy.mechanism.coordinates
    assert epsilon(policy.mechanism, delta=policy.delta) <= policy.epsilon
    check_price(policy)
    played = world.play()
    assert "output.weight" not in played.update(1, 0)
    states = sorted((world.campaign.folder / "devices" / "0").glob("*.safetensors"))
    assert len(states) == 2
    silent = stage.play(  # a device without a record: what it keeps is noise, of the size that is priced
        world.campaign, [stage.Part(open_workbench(world.campaign), world.inputs.select([]), Scores([]))] * 2
    )
    spread = 0.3 * policy.noise_multiplier * policy.clip_norm / policy.denominator
    sent = np.concatenate([array.ravel() for array in silent.update(1, 0).values()])
    kept = load(sorted((world.campaign.folder / "devices" / "0").glob("*.safetensors"))[0].read_bytes())[
        "output.weight"
    ]
    assert sent.std() == pytest.approx(spread, rel=0.15)
    assert np.abs(kept).max() > 0.2 * spread
    assert kept.std() == pytest.approx(spread, rel=0.9)


def test_ifca_moves_the_persona_of_least_loss_and_no_other(tiny_base, tmp_path):
    world = World(
        tiny_base, tmp_path, name="ifca", blocks=0, federation={"method": "ifca"},
        persona=PersonaConfig(count=3, spread=0.4, loss_bound=100.0),
    )  # fmt: skip
    assert [name for name, _ in world.policy.slots] == ["persona.weight"]
    played = world.play()
    for number in (1, 2):
        arrays = played.arrays[number - 1]
        load_shared(world.head, arrays)
        single = torch.eye(3)
        totals = [[float(world.losses(device, single[k]).sum().detach()) for k in range(3)] for device in (0, 1)]
        chosen = [int(np.argmin(each)) for each in totals]
        after = by_hand(world, arrays, ("persona",), memberships=[single[k] for k in chosen])
        close(played.arrays[number], after)
        rest = [k for k in range(3) if k not in chosen]
        assert np.array_equal(played.arrays[number]["persona.weight"][rest], arrays["persona.weight"][rest])


def test_personas_add_up_with_the_shared_output(tiny_base, tmp_path):
    world = World(
        tiny_base, tmp_path, name="sum", federation={"method": "fedavg"}, persona=PersonaConfig(count=2, spread=0.4)
    )
    assert {part_of(name) for name, _ in world.policy.slots} == {"lora_A", "lora_B", "output", "persona"}
    load_start(world.head, world.campaign.start)
    load_shared(world.head, world.play().arrays[-1])
    world.head.membership = torch.tensor([0.25, 0.75])
    hidden, mask = world.inputs.batch(range(len(TEXTS)))
    with torch.no_grad():
        x = world.head.projected(hidden, mask)
        wanted = 3.0 + x @ (world.head.output.weight[0] + torch.tensor([0.25, 0.75]) @ world.head.persona.weight)
        assert torch.allclose(world.head.predict(hidden, mask), wanted, atol=1e-5)
        pooled = world.head.features(hidden, mask).numpy()
    np.testing.assert_allclose(world.head.apply_output(pooled, world.head.output_layer()), wanted, atol=1e-4)


def test_what_cannot_be_combined_says_so(tiny_base):
    def head(**tables):
        return make_head(tiny_base, Scenario(name="wrong", **tables), public_texts=7)

    for wrong, says in (
        ({"personal": PersonalConfig(method="fedsa-lora")}, "must share something in every round"),
        ({"federation": FederationConfig(method="ifca")}, "persona.count must be at least 2"),
        ({"persona": PersonaConfig(count=1)}, "persona.count must be at least 2"),
        (
            {"model": ModelConfig(head_blocks=0), "federation": FederationConfig(method="fedavg"),
             "personal": PersonalConfig(method="fedper")},
            "head_blocks must be at least 1",
        ),
    ):  # fmt: skip
        with pytest.raises(ScenarioError, match=says):
            head(**wrong)


class Priced:
    """What ``choose_persona`` reads of a policy."""

    def __init__(self, choice_epsilon):
        self.choice_epsilon = choice_epsilon


@pytest.mark.parametrize("cost", [0.5, 2.0])
def test_a_priced_choice_is_as_private_as_it_says(cost):
    """Its exact law, with and without one record, and that of the draws."""
    draw, bound = np.random.default_rng(1), 2.0

    class Spelled:
        """Takes the k-th branch, and notes its probability."""

        def __init__(self, k):
            self.k, self.at, self.probability = k, -1, 1.0

        def bernoulli(self, probability, count):
            self.at += 1
            self.probability *= probability if self.at == self.k else 1 - probability
            return np.array([self.at == self.k])

    def law(losses, epsilon=cost):
        found = []
        for k in range(losses.shape[1]):
            branch = Spelled(k)
            assert choose_persona(losses, policy=Priced(epsilon), bound=bound, randomness=branch) == k
            found.append(branch.probability)
        return np.array(found)

    worst = 0.0
    for _ in range(300):
        losses = draw.uniform(0, 4, size=(5, 3))
        losses[0] = draw.choice([0.0, 9.0, math.nan], size=3)
        whole, without = law(losses), law(losses[1:])
        assert whole.sum() == pytest.approx(1)
        worst = max(worst, float(np.abs(np.log(whole / without)).max()))
    assert worst <= cost + 1e-9
    assert worst > 0.5 * cost  # the bound is no idle one: half the price would not do
    counts = np.bincount(
        [choose_persona(losses, policy=Priced(cost), bound=bound, randomness=SecureRandomness()) for _ in range(4000)],
        minlength=3,
    )
    assert np.abs(counts / 4000 - law(losses)).max() < 0.04
    assert choose_persona(losses, policy=Priced(None), bound=bound, randomness=SecureRandomness()) == np.argmin(
        np.clip(np.nan_to_num(losses, nan=bound), 0, bound).sum(0)
    )


def test_a_choice_by_losses_is_paid_for_at_unit_record_and_hidden_at_unit_user(tiny_base, tmp_path):
    ifca = {"federation": {"method": "ifca"}, "blocks": 0}
    by_loss = PersonaConfig(count=2, epsilon=2.0)
    priced = World(tiny_base, tmp_path, name="priced", trust="local", persona=by_loss, **ifca).policy
    free = World(
        tiny_base, tmp_path, name="declared", trust="local", **ifca,
        persona=PersonaConfig(count=2, choice="declared", attribute="a", values=(("x",), ("y",))),
    ).policy  # fmt: skip
    assert (priced.choice_epsilon, free.choice_epsilon) == (2.0, None)
    assert priced.noise_multiplier > free.noise_multiplier
    for policy in (priced, free):
        check_price(policy)
        assert epsilon(policy.mechanism, delta=policy.delta) == pytest.approx(8.0, rel=3e-3)
    with pytest.raises(PrivacyError, match="they give"):
        check_price(priced.model_copy(update={"noise_multiplier": free.noise_multiplier, "grid": free.grid}))
    user = World(
        tiny_base, tmp_path, name="hidden", trust="central", persona=by_loss, privacy={"unit": "user"}, **ifca
    ).policy
    assert user.choice_epsilon is None
    with pytest.raises(PrivacyError, match=r"persona\.epsilon must be below"):
        World(tiny_base, tmp_path, name="dear", trust="local", persona=PersonaConfig(count=2, epsilon=8.0), **ifca)


def test_a_device_takes_no_part_where_a_choice_by_records_is_not_priced(tiny_base, tmp_path):
    world = World(
        tiny_base, tmp_path, name="unpriced", trust="local", blocks=0, federation={"method": "ifca"},
        persona=PersonaConfig(count=2, epsilon=2.0),
    )  # fmt: skip
    certify(world.campaign)
    for cost in (None, 1.0):  # the rest of epsilon would then be right for the noise, and the choice free or cheap
        hidden = replace(world.campaign, policy=world.policy.model_copy(update={"choice_epsilon": cost}))
        check_price(hidden.policy)
        with pytest.raises(PrivacyError, match="must price the choice of a persona"):
            certify(hidden)


def test_a_choice_with_a_price_is_made_once(tiny_base, tmp_path, monkeypatch):
    world = World(
        tiny_base, tmp_path, name="once", blocks=0, rounds=3, trust="local", federation={"method": "ifca"},
        persona=PersonaConfig(count=2, epsilon=2.0),
    )  # fmt: skip
    import client.training.round_state

    made = []
    monkeypatch.setattr(client.training.round_state, "choose_persona", lambda *_, **__: made.append(1) or 1)
    world.play()
    assert len(made) == 2  # two devices, three rounds


@pytest.mark.parametrize("trust", ["local", "central"])
@pytest.mark.parametrize(("method", "personal"), [("rolora", "none"), ("rolora", "fedper"), ("fedavg", "fedsa-lora")])
def test_a_clipped_and_noised_turn_is_the_turn_clipped_and_noised(tiny_base, tmp_path, steps, trust, method, personal):
    """Record level and user level: without noise, and with a bound that nobody reaches, the same as by hand."""
    wide = {"clip_norm": 1e3, "unit": "record" if trust == "local" else "user"}
    world = World(
        tiny_base, tmp_path, name="turns", rounds=4, trust=trust, privacy=wide, federation={"method": method},
        personal=PersonalConfig(method=personal),
    )  # fmt: skip
    quiet = {"noise": lambda _: steps.Silent(), "randomness": lambda _: steps.Silent()}
    found = world.play(**quiet)
    plain = World(
        tiny_base, tmp_path, name="plain", rounds=4, federation={"method": method},
        personal=PersonalConfig(method=personal), privacy={"unit": wide["unit"]},
    )  # fmt: skip
    wanted = plain.play()
    for number in range(1, 5):
        for name, array in wanted.arrays[number].items():
            np.testing.assert_allclose(found.arrays[number][name], array, rtol=1e-3, atol=3e-5, err_msg=name)
    moved = [not np.array_equal(found.arrays[4][name], found.arrays[0][name]) for name in found.arrays[0]]
    assert all(moved)


def test_a_users_personas_fall_back_to_all_of_them():
    persona = PersonaConfig(count=3, shrinkage=5.0)
    losses = np.tile([0.2, 1.0, 1.0], (50, 1))
    alone = [weigh_personas(losses[:n], persona=persona)[0] for n in (0, 1, 5, 50)]
    assert alone[0] == pytest.approx(1 / 3)
    assert alone == sorted(alone)
    assert alone[1] == pytest.approx(1 / (1 + 2 * math.exp(-0.8 * 5 / 6)))
    assert declared_persona({"a": "y"}, PersonaConfig(attribute="a", values=(("x",), ("y", "z")))) == 1


def test_rolora_differs_from_training_all_at_once(tiny_base, tmp_path):
    """The means of the two differ; that of rolora is the mean of the products."""
    worlds = {
        method: World(tiny_base, tmp_path, name=method, rounds=2, federation={"method": method})
        for method in ("rolora", "fedavg", "ffa-lora")
    }
    last = {method: world.play().arrays[-1] for method, world in worlds.items()}
    head = worlds["rolora"].head
    assert list(last["rolora"]) == list(last["fedavg"]) == list(shared_parameters(head))
    assert any(not np.allclose(last["rolora"][name], last["fedavg"][name], atol=1e-6) for name in last["fedavg"])
    assert not any(name.endswith("lora_A") for name in last["ffa-lora"])


def sealed(home):
    [name] = home.vault().names("state/")
    return load(home.vault().open(name))


def test_an_owners_device_keeps_its_part_sealed_from_round_to_round(homes, tiny_world, tmp_path):
    changes = (
        "federation.method=fedavg",
        "personal.method=fedper",
        "privacy.max_participations=2",
        "federation.cohort_size=2",
    )
    published = homes.publish(tiny_world(tmp_path), tmp_path / "fedper", overrides=changes)
    home = homes.make_home(tmp_path / "home", published)
    code, first = homes.ask(home, published.campaign)
    assert code is None
    assert "output.weight" not in homes.update_in(first, published.campaign)
    one = sealed(home)
    assert list(one) == ["output.weight"]
    assert np.abs(one["output.weight"]).max() > 0
    code, again = homes.ask(home, published.campaign)
    assert code is None
    assert again.content == first.content
    np.testing.assert_array_equal(sealed(home)["output.weight"], one["output.weight"])  # asked again, trained once
    assert homes.ask(home, published.campaign, round_number=2, answered=1)[0] is None
    two = sealed(home)["output.weight"]
    assert not np.array_equal(two, one["output.weight"])
    assert not [p for p in home.folder.rglob("*") if p.is_file() and two.tobytes() in p.read_bytes()]


PRICED = (
    "model.head_blocks=0",
    "federation.method=ifca",
    "federation.cohort_size=2",
    "persona.count=2",
    "persona.epsilon=2.0",
    "privacy.max_participations=3",
)


def test_a_choice_that_was_paid_for_and_is_lost_is_not_made_again(homes, tiny_world, tmp_path):
    published = homes.publish(tiny_world(tmp_path), tmp_path / "priced", overrides=PRICED)
    home = homes.make_home(tmp_path / "home", published)
    assert homes.ask(home, published.campaign)[0] is None
    assert list(sealed(home)) == ["persona"]
    assert homes.ask(home, published.campaign, round_number=2, answered=1)[0] is None
    [name] = home.vault().names("state/")
    home.vault().delete(name)
    assert homes.ask(home, published.campaign, round_number=3, answered=2)[0] == "STORE"


def test_a_choice_of_a_round_that_was_burnt_is_made_in_the_next(homes, tiny_world, tmp_path, monkeypatch):
    published = homes.publish(tiny_world(tmp_path), tmp_path / "priced", overrides=PRICED)
    home = homes.make_home(tmp_path / "home", published)
    with monkeypatch.context() as patch:
        patch.setattr("client.app.train_shared", None)
        assert homes.ask(home, published.campaign)[0] == "INTERNAL"
    assert homes.ask(home, published.campaign, round_number=2)[0] is None
    assert list(sealed(home)) == ["persona"]


def test_an_owner_states_a_profile_that_stays_in_the_vault(homes, tiny_world, tmp_path, capsys):
    home = homes.make_home(tmp_path / "home")
    place = ["--home", str(home.folder)]
    assert main(["client", "profile", *place, "--set", "gender=M", "--set", "age=25"]) == 0
    assert read_profile(home) == {"gender": "M", "age": "25"}
    assert not [path for path in home.folder.rglob("*") if path.is_file() and b"gender" in path.read_bytes()]
    assert main(["client", "profile", *place, "--set", "gender"]) == 2
    assert "must read name=value" in capsys.readouterr().err
    assert read_profile(home) == {"gender": "M", "age": "25"}
    assert main(["client", "profile", *place, "--clear"]) == 0
    assert read_profile(home) == {}


def test_an_owners_device_is_of_the_persona_it_states(homes, tiny_world, tmp_path, monkeypatch):
    changes = (
        "model.head_blocks=0", "federation.method=ifca", "persona.count=2", "persona.choice=declared",
        "persona.attribute=gender", 'persona.values=[["F"], ["M"]]', "federation.cohort_size=2",
    )  # fmt: skip
    published = homes.publish(tiny_world(tmp_path), tmp_path / "declared", overrides=changes)
    home = homes.make_home(tmp_path / "home", published)
    write_profile(home, {"gender": "M"})
    import client.app

    heads, real = [], client.app.train_shared
    monkeypatch.setattr(
        client.app, "train_shared", lambda module, *a, **k: heads.append(module) or real(module, *a, **k)
    )
    assert homes.ask(home, published.campaign)[0] is None
    assert heads[0]._module.membership.tolist() == [0.0, 1.0]
    reply = homes.update_in(homes.ask(home, published.campaign)[1], published.campaign)["persona.weight"]
    assert np.abs(reply).min() > 0  # noise on every row, as hides records; which row moved may still be seen
