"""Soft tokens: where they stand, that noise covers them, and that a device computes what torch does."""

import itertools
import json
import math
from datetime import UTC, datetime

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.numpy import load, save
from transformers import LlamaForCausalLM

import shared.models.features
from client.export.fleet import export_fleet
from client.export.language_model import build_lm_head
from client.export.private_head import head_logits, language_parts
from client.export.soft_prompt import check_soft_export, soft_prefix
from client.personal.finetune import fine_tune
from client.runtime.artifact import ADAPTER, MANIFEST, describe_contents, manifest_bytes
from client.runtime.generation import open_generator
from client.training.optimizer import PolicyOptimizer
from shared.config import AdapterConfig, PersonalConfig, Scenario, load_scenario
from shared.errors import HeadError, ScenarioError
from shared.heads.adapter import load_shared, make_start, read_start, shared_parameters, shared_slots
from shared.heads.lora import FEDERATION_METHODS, part_of, trained_parts
from shared.heads.output import pooled_features
from shared.heads.registry import make_head
from shared.models.features import Features, compute_hidden, micro_batches
from shared.privacy.clipping import clipped_sum
from shared.privacy.noise import SeededRandomness
from simulations.run import simulate

SOFT = "prompt.embedding.weight"
ALONE = {"technique": "prompt-tuning", "prompt_tokens": 3}
NOTHING = {"features": Features([]), "targets": []}
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def scenario(*, task="generation", blocks="all", tokens=3, method="ffa-lora", personal="none", **adapter):
    return Scenario.model_validate(
        {
            "name": "soft",
            "task": {"name": task},
            "model": {"head_blocks": blocks, "max_tokens": 64},
            "adapter": {"rank": 2, "targets": TARGETS if task == "generation" else ("output.dense",)}
            | {"whitened_features": 8, "prompt_tokens": tokens}
            | adapter,
            "federation": {"method": method},
            "personal": {"method": personal},
        }
    )


def moved_head(base, settings, *, public=None, seed=3):
    """A head away from its public start: LoRA's B is not zero, and soft tokens are nobody's words."""
    head = make_head(base, settings).eval()
    make_start(head, public or Features([]), ridge=0.05, seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if part_of(name) in ("lora_A", "lora_B", "prompt"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return head


# Where they stand


def test_soft_tokens_come_first_count_as_positions_and_are_read_nowhere(tiny_causal, tiny_llama):
    """As transformers computes the same embeddings; behind the text, or without positions, would be another model."""
    head = moved_head(tiny_causal, scenario(**ALONE))
    whole = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids = tiny_causal.tokenizer.encode("Heat (1995). Action, Crime").ids
    embedded, soft = whole.model.embed_tokens(torch.tensor([ids])), head.soft_states(1)
    found = head_logits(head, tiny_causal, np.array([ids]))[0]

    def said(states, positions=None):
        with torch.no_grad():
            return whole(inputs_embeds=torch.cat(states, dim=1), position_ids=positions).logits[0].numpy()

    np.testing.assert_allclose(found, said([soft, embedded])[3:], atol=1e-4)
    unplaced = torch.tensor([[0, 0, 0, *range(len(ids))]])
    for other in (said([embedded, soft])[:-3], said([embedded]), said([soft, embedded], unplaced)[3:]):
        assert np.abs(found - other).max() > 0.05


def test_an_encoder_pools_its_text_alone(tiny_base, tiny_texts):
    features = compute_hidden(tiny_base, tiny_base.tokenize(tiny_texts[:4], max_tokens=32), head_blocks=1)
    head = moved_head(tiny_base, scenario(task="rating", blocks=1), public=features)
    found = pooled_features(head, features)
    for row, pooled in enumerate(found):
        hidden, _ = features.batch([row])
        both = torch.cat([head.soft_states(1), hidden], dim=1)
        with torch.no_grad():
            out = head.blocks[0](both)[0, 3:].mean(0)
        np.testing.assert_allclose(pooled, torch.nn.functional.normalize(out, dim=0).numpy(), atol=1e-5)
    head.prompt = None
    assert np.abs(pooled_features(head, features) - found).max() > 0.01


def test_soft_tokens_begin_as_drawn_words_of_the_size_of_what_stands_there(tiny_causal, tiny_base, tiny_texts):
    for blocks in ("all", 1):
        settings = scenario(blocks=blocks, tokens=5)
        head = make_head(tiny_causal, settings)
        start = make_start(head, Features([]), ridge=0.05, seed=1)
        assert np.abs(start[SOFT]).max() <= math.sqrt(64)  # far from the bound of what may be shared
        assert 0.5 < np.sqrt(np.mean(start[SOFT] ** 2)) < 1.5
        ids = torch.randint(4, 200, (1, 64), generator=torch.Generator().manual_seed(9))
        hidden = tiny_causal.backbone(ids, torch.ones_like(ids, dtype=torch.bool), head_blocks=len(head.blocks))
        ratio = head.soft_states(1).detach().square().mean() / hidden.square().mean()
        assert 0.4 < float(ratio) < 2.5
        torch.manual_seed(77)  # the public seed decides, and no other
        again, other = (make_start(make_head(tiny_causal, settings), Features([]), ridge=0.05, seed=s) for s in (1, 2))
        assert np.array_equal(again[SOFT], start[SOFT])
        assert not np.array_equal(other[SOFT], start[SOFT])
    # an encoder is whitened as it starts, its soft tokens in place
    head = make_head(tiny_base, scenario(task="rating", blocks=1))
    features = compute_hidden(tiny_base, tiny_base.tokenize(tiny_texts, max_tokens=32), head_blocks=1)
    make_start(head, features, ridge=0.05, seed=1)
    np.testing.assert_allclose(head.mean.detach().numpy(), pooled_features(head, features).mean(0), atol=1e-5)


def test_without_soft_tokens_nothing_of_a_start_changes(tiny_causal):
    plain, soft = (
        make_start(make_head(tiny_causal, scenario(tokens=n)), Features([]), ridge=0.05, seed=1) for n in (0, 3)
    )
    assert set(soft) - set(plain) == {SOFT, "prompt_scale"}
    assert all(np.array_equal(soft[name], plain[name]) for name in plain)


# What trains


@pytest.mark.parametrize("method", [name for name in FEDERATION_METHODS if name != "ifca"])
def test_every_federation_method_trains_them_in_every_turn(tiny_causal, method):
    settings = scenario(method=method)
    assert all("prompt" in turn for turn in trained_parts(settings).turns)
    head = make_head(tiny_causal, settings)
    slots = {slot.name: slot for slot in shared_slots(head)}
    assert (slots[SOFT].shape, slots[SOFT].scope) == ((3, 32), "global")
    assert "prompt_scale" not in slots
    alone = make_head(tiny_causal, scenario(method=method, **ALONE))
    assert [slot.name for slot in shared_slots(alone)] == [SOFT]
    assert not [name for name, _ in alone.named_parameters() if "lora_" in name]
    assert not [name for name in trained_parts(scenario(method=method, tokens=0)).shared if name == "prompt"]


@pytest.mark.parametrize("task", ["language", "rating"])
@pytest.mark.parametrize("alone", [False, True])
def test_each_record_has_its_own_gradient_of_them(steps, tiny_causal, tiny_base, tiny_texts, monkeypatch, task, alone):
    """Opacus' against autograd, record by record; batched with others, padded."""
    monkeypatch.setattr(shared.models.features, "_MAX_PADDING", 1e9)
    more = ALONE if alone else {"prompt_tokens": 3}
    setting = (
        steps.language(tiny_causal, method="fedavg", **more)
        if task == "language"
        else steps.rating(tiny_base, tiny_texts[:5], method="fedavg", **more)
    )
    policy, seen = setting.policy(), steps.Sums(monkeypatch)
    wanted = [np.stack(column) for column in zip(*map(setting.gradients, range(len(setting))), strict=True)]
    names = list(shared_parameters(setting.head))
    [order] = micro_batches(np.arange(len(setting)), setting.features.lengths, 1024)
    setting.train(policy)
    found = [x.numpy() for x in seen.per_sample[-1]]
    assert len(found) == len(names)
    for name, f, w in zip(names, found, wanted, strict=True):
        assert all(np.abs(row).max() > 0 for row in w)
        np.testing.assert_allclose(f, w[order], atol=1e-4 * np.abs(w).max(), err_msg=name)
    soft = wanted[names.index(SOFT)]
    assert all(not np.allclose(soft[0], other, rtol=0.1) for other in soft[1:])  # a mean of all would not do


class ClipsEachTensor(PolicyOptimizer):
    def _clip_waiting(self):
        sums = [clipped_sum([x], clip_norm=self.max_grad_norm, grid=self._grid)[0] for x in self.grad_samples]
        for parameter, clipped in zip(self.params, sums, strict=True):
            parameter.summed_grad, parameter.grad_sample = clipped, None
        self._waiting = 0


def test_soft_tokens_and_lora_are_clipped_as_one_vector(steps, tiny_causal, monkeypatch):
    setting = steps.language(tiny_causal, prompt_tokens=3)
    policy = setting.policy(clip_norm=0.002)

    def moves():
        whole = setting.train(policy)
        rest = (setting.train(policy, rows=[j for j in range(len(setting)) if j != i]) for i in range(len(setting)))
        return np.array([setting.moved(policy, whole, part) for part in rest]) / policy.clip_norm

    found = moves()
    assert (found <= 1 + 1e-4).all()
    assert (found >= 0.9).all()
    steps.use(monkeypatch, ClipsEachTensor)
    assert moves().max() > 1.3


def test_what_breaks_one_record_does_not_reach_the_others_through_them(steps, tiny_causal, monkeypatch):
    monkeypatch.setattr(shared.models.features, "_MAX_PADDING", 1e9)
    setting = steps.language(tiny_causal, **ALONE)
    policy = setting.policy(clip_norm=0.05)
    arrays = [setting.features.batch([i])[0][0].numpy().copy() for i in range(len(setting))]
    without = setting.train(policy, rows=[0, 1, 3, 4])
    arrays[2][-1] = math.nan
    assert setting.moved(policy, setting.train(policy, features=Features(arrays)), without) < 1e-4 * policy.clip_norm


def test_noise_of_the_policy_s_scale_covers_every_one_of_their_values(steps, tiny_causal):
    setting = steps.language(tiny_causal, technique="prompt-tuning", prompt_tokens=60)
    policy = setting.policy()
    updates = [
        setting.train(policy, randomness=SeededRandomness(seed=5, campaign="c", device=i, round_number=1), **NOTHING)[
            SOFT
        ].ravel()
        for i in range(3)
    ]
    values = np.concatenate(updates).astype(np.float64)
    assert values.size == 3 * 60 * 32
    scale = policy.learning_rate / policy.denominator * policy.clip_norm * policy.noise_multiplier
    assert scipy.stats.kstest(values, scipy.stats.norm(scale=scale).cdf).pvalue > 1e-4
    for wrong in (0.9, 1.1):
        assert scipy.stats.kstest(values, scipy.stats.norm(scale=wrong * scale).cdf).pvalue < 1e-4
    assert (np.stack(updates) != 0).all()


def test_a_private_copy_is_fine_tuned_and_the_shared_one_stays(steps, tiny_causal):
    setting = steps.language(tiny_causal, **ALONE)
    before = {name: array.copy() for name, array in setting.start.items()}
    personal = PersonalConfig(method="fine-tune", epochs=4, learning_rate=0.05)
    rows = np.random.default_rng(0)
    args = setting.features, setting.wrap(setting.targets)
    private = fine_tune(setting.head, setting.start, *args, personal=personal, generator=rows)
    assert list(private) == [SOFT]
    assert np.array_equal(setting.start[SOFT], before[SOFT])

    def loss(arrays):
        load_shared(setting.head, arrays)
        hidden, mask = setting.features.batch(range(len(setting)))
        labels = setting.wrap(setting.targets).batch(np.arange(len(setting)), hidden.shape[1])
        with torch.no_grad():
            return float(setting.head(hidden, mask, labels).mean())

    assert loss(private) < loss(setting.start) - 0.01


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"technique": "prompt-tuning", "tokens": 0}, "adapter.prompt_tokens must be at least 1"),
        ({"blocks": 0}, "model.head_blocks must be at least 1 with soft tokens"),
        ({"tokens": 65}, "at most the 128 positions of the base, got 129"),
        ({"technique": "prompt-tuning", "personal": "fedper"}, "trains .*output.*, which a head of task"),
        ({"technique": "prompt-tuning", "personal": "fedsa-lora"}, "trains .*lora_B.*, which a head of task"),
    ],
)
def test_what_cannot_be_is_refused(tiny_causal, changes, message):
    with pytest.raises(ScenarioError, match=message):
        make_head(tiny_causal, scenario(**changes))


def test_a_technique_that_trains_nothing_is_refused_still(install_package, tiny_causal):
    install_package("ext", "def mine(blocks, adapter):\n    pass\n", {"techniques": {"mine": "mine"}})
    with pytest.raises(ScenarioError, match="must add peft's LoRA layers"):
        make_head(tiny_causal, scenario(tokens=0, technique="mine"))


def test_what_has_no_way_to_a_device_is_said_before_anybody_trains(tiny_causal, tmp_path):
    for wrong in (scenario(blocks=1), scenario(task="rating", blocks="all")):
        with pytest.raises(ScenarioError, match=r"model.head_blocks = 'all', got .* Set export.users = 0"):
            check_soft_export(wrong)
    check_soft_export(scenario())
    check_soft_export(scenario(blocks=1, tokens=0))
    with pytest.raises(HeadError, match="got 1 of 2 blocks"):
        soft_prefix(moved_head(tiny_causal, scenario(blocks=1)))
    settings = scenario(blocks=1)
    head = make_head(tiny_causal, settings)
    with pytest.raises(ScenarioError, match=r"model.head_blocks = 'all'"):
        export_fleet(tiny_causal, head, settings, tmp_path / "base", probe_texts=[])


def test_a_linear_companion_has_none():
    companion = scenario(task="rating", blocks=1, **ALONE).linear_campaign()
    assert (companion.adapter.prompt_tokens, companion.adapter.technique) == (0, "lora")
    assert AdapterConfig().prompt_tokens == 0


# The device


class Exported:
    """A head on the fleet's base, its files, and what torch says."""

    def __init__(self, base, fleet, texts, **changes):
        self.base, self.fleet, self.texts = base, fleet, texts
        self.head = moved_head(base, scenario(**changes))

    def parts(self, **changes):
        found = language_parts(self.head, self.base, scenario()) | {"base_sha256": "ab" * 32}
        created = datetime(2026, 1, 2, tzinfo=UTC)
        rest = {"user": "ann", "privacy": {}, "probe_texts": self.texts, "created": created}
        return found | {"base_folder": self.fleet} | rest | changes

    def greedy(self, ids, count):
        ids = list(ids)
        for _ in range(count):
            ids.append(int(head_logits(self.head, self.base, np.array([ids]))[0, -1].argmax()))
        return ids[-count:]


@pytest.fixture(scope="module", params=["with LoRA", "alone"])
def exported(request, tiny_causal, tiny_lm_fleet, tiny_texts):
    return Exported(tiny_causal, tiny_lm_fleet, tiny_texts, **(ALONE if request.param == "alone" else {}))


def test_a_device_answers_as_torch_does_from_the_cache_of_soft_tokens(exported):
    files = build_lm_head(**exported.parts())
    head, bare = open_generator(files, base=exported.fleet), open_generator(exported.fleet)
    assert head.room == bare.room - 3 == 125
    for prompt in ("Heat", "no probe: Blade Runner (1982). Sci-Fi, Thriller"):
        ids = head.base.tokens(prompt)
        np.testing.assert_allclose(
            head.logits(ids), head_logits(exported.head, exported.base, np.array([ids]))[0], atol=1e-4
        )
        found = head.generate(prompt, max_new_tokens=16, stop_at_eos=False)
        assert list(found.token_ids) == exported.greedy(ids, 16)
        assert np.abs(head.logits(ids) - bare.logits(ids)).max() > 0.05
    assert json.loads(files[MANIFEST])["parity"]["max_abs"] <= 1e-4
    with pytest.raises(HeadError, match="must fit the model's 125 tokens"):
        head.logits([5] * 126)
    assert head.logits([5] * 125).shape[0] == 125


def test_another_cache_is_not_written(exported):
    """Keys of other places, blocks or tokens, a cache without the LoRA at work in it, and none at all."""
    right, places = soft_prefix(exported.head), list(itertools.product((0, 1), ("key", "value")))
    assert right["prefix.0.key"].shape == (2, 3, 16)
    wrong = {
        "keys of others": right | {n: np.ascontiguousarray(a[:, ::-1]) for n, a in right.items() if n.endswith("key")},
        "swapped blocks": {f"prefix.{i}.{part}": right[f"prefix.{1 - i}.{part}"] for i, part in places},
        "zero": {name: np.zeros_like(array) for name, array in right.items()},
        "one less": {name: np.ascontiguousarray(array[:, :-1]) for name, array in right.items()},
        "none": {},
    }
    if exported.head.blocks[0].self_attn.v_proj.__class__.__name__ == "Linear":
        wrong |= {"of the start": soft_prefix(moved_head(exported.base, scenario(**ALONE), seed=4))}
    else:
        unadapted = moved_head(exported.base, scenario(**ALONE))
        load_shared(unadapted, {SOFT: read_start(exported.head)[SOFT]})
        wrong |= {"without LoRA": soft_prefix(unadapted)}
    for what, prefix in wrong.items():
        with pytest.raises(HeadError, match="torch") as caught:
            build_lm_head(**exported.parts(prefix=prefix))
        assert "nothing was written" in str(caught.value), what


def test_a_damaged_cache_is_not_opened(exported):
    files = build_lm_head(**exported.parts())
    tensors = load(files[ADAPTER])

    def opened(changed):
        content = save(changed)
        slots = [{"name": n, "shape": list(a.shape), "dtype": "float32"} for n, a in changed.items()]
        manifest = json.loads(files[MANIFEST]) | {"files": describe_contents({ADAPTER: content}), "slots": slots}
        return open_generator({ADAPTER: content, MANIFEST: manifest_bytes(manifest)}, base=exported.fleet)

    assert opened(tensors).room == 125
    rest = {name: array for name, array in tensors.items() if not name.startswith("prefix.")}
    soft = {name: array for name, array in tensors.items() if name.startswith("prefix.")}
    short = {name: np.ascontiguousarray(array[:, :2]) for name, array in soft.items()}
    long = {name: np.zeros((2, 128, 16), np.float32) for name in soft}
    for changed, message in (
        ({name: array for name, array in tensors.items() if name != "prefix.1.value"}, "wrong: prefix.1.value"),
        (tensors | {"prefix.2.key": tensors["prefix.1.key"]}, "wrong: prefix.2.key"),
        (tensors | {"prefix.1.key": short["prefix.1.key"]}, "must have shape"),
        (tensors | {"prefix.0.key": np.zeros((2, 0, 16), np.float32)}, "must have shape"),
        (tensors | {"prefix.0.key": np.zeros(6, np.float32)}, "must have shape"),
        (rest | long, "leave room"),
        (rest | short, "known answer|must answer|adapter"),
        (rest, "known answer|must answer|adapter"),
        (tensors | {"prefix.0.key": np.full((2, 3, 16), np.nan, np.float32)}, "finite"),
    ):
        with pytest.raises(HeadError, match=message):
            opened(changed)


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["prompt-tuning", "lora"])
def test_a_whole_simulation_trains_them_privately_and_exports_an_answering_head(tiny, tiny_llama, tmp_path, technique):
    body = f"model.head_blocks = 'all'\nadapter.technique = '{technique}'\nadapter.prompt_tokens = 4"
    body += "\npersonal.learning_rate = 0.05\npersonal.epochs = 3"
    file = tiny.tiny_generation(tmp_path, base=tiny_llama, data=tiny.tiny_dialogues(tmp_path / "data"), body=body)
    settings = load_scenario(file)
    summary = simulate(settings, out=tmp_path / "out", quiet=True)
    assert summary["privacy"]["epsilon"] <= 8.0
    assert summary["differences"]["personal - base"]["perplexity"]["high"] < 0
    assert [campaign.name for campaign in (tmp_path / "out" / "campaigns").iterdir()] == [technique]
    [written] = summary["heads"]
    assert written["parity_max_abs"] <= 1e-3
    head = open_generator(tmp_path / "out" / written["path"])
    assert head.room == head.base.max_tokens - 4
    assert bool(head.adapter) is (technique == "lora")
    assert bool(head.base.slots) is (technique == "lora")
    assert head.generate("tea ?", max_new_tokens=5).token_ids
