"""The head of a causal language model: the whole model's numbers, response-only losses, and exact private steps."""

import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import shared.heads.causal
from client.training.train import make_trainable, train_shared
from shared.config import AdapterConfig, FederationConfig, ModelConfig, Scenario, TaskConfig
from shared.errors import ScenarioError
from shared.heads.adapter import load_start, make_start, read_shared, shared_parameters, trained_slots
from shared.heads.causal import CausalHead
from shared.heads.registry import make_head
from shared.heads.tasks import IGNORE, Labels, encode_dialogues
from shared.models.features import Features, compute_hidden
from shared.models.model import load_base
from shared.privacy.noise import GRID_SIGMA
from shared.privacy.policy import Policy

PAIRS = [
    ("how are you ?", "i am well ."),
    ("tea ?", "yes , i like tea more than rain and trains ."),
    ("who are you", "nobody ."),
    ("a very long question about boats and hills and songs and cake and dogs and trains and rain", "i do not know ."),
    ("", "hello there !"),
]


def settings(*, blocks=1, method="ffa-lora", max_tokens=128):
    return Scenario(
        name="tiny",
        task=TaskConfig(name="generation", template="<|im_start|>{text}<|im_end|>"),
        model=ModelConfig(head_blocks=blocks, max_tokens=max_tokens),
        adapter=AdapterConfig(rank=2, targets=("mlp.down_proj", "self_attn.q_proj")),
        federation=FederationConfig(method=method),
    )


@pytest.fixture(scope="module")
def llama(tiny, tmp_path_factory):
    return load_base(tiny.tiny_llama(tmp_path_factory.mktemp("llama"), layers=3))


class Silent:
    """Every record and no noise."""

    def bernoulli(self, probability, count):
        return np.ones(count, dtype=bool)

    def gaussian_integers(self, count):
        return np.zeros(count, dtype=np.int64)


class Setting:
    """A head away from its start, with features and labels of the pairs."""

    def __init__(self, base, *, blocks=1, method="ffa-lora", shift=0.3):
        self.base, self.scenario = base, settings(blocks=blocks, method=method)
        self.encoded = encode_dialogues(base, PAIRS, self.scenario)
        self.features = compute_hidden(base, self.encoded.token_ids, head_blocks=blocks)
        self.labels = Labels(self.encoded.labels)
        self.head = make_head(base, self.scenario)
        self.public = make_start(self.head, Features([]), ridge=0.0, seed=1)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in shared_parameters(self.head).values():
                parameter += shift * torch.randn(parameter.shape, generator=generator)
        self.start = read_shared(self.head)

    def batch(self, rows):
        hidden, mask = self.features.batch(rows)
        return hidden, mask, self.labels.batch(np.asarray(rows), hidden.shape[1])

    def update(self, rows=(0, 1, 2, 3, 4), *, micro_batch=1024, **changes):
        head = make_head(self.base, self.scenario)
        load_start(head, self.public)
        constants = {
            "protocol": 1, "campaign": "c", "trust": "local", "unit": "record", "relation": "add-or-remove-one",
            "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.5, "noise_multiplier": 2.0, "sampling_rate": 1.0, "steps": 1,
            "denominator": 4.0, "max_participations": 5, "max_update_norm": 1e9, "learning_rate": 0.7, "rounds": 5,
            "cohort_size": 2, "federation_method": "ffa-lora", "personal_method": "none", "head_blocks": 1,
            "settings_sha256": "h", "base_sha256": "b", "start_sha256": "s", "public_texts_sha256": "p",
            "technique": "lora", "reply_fields": ("arrays", "config.policy", "config.round"),
            "slots": tuple((slot.name, slot.shape) for slot in trained_slots(head)),
        }  # fmt: skip
        constants |= changes
        policy = Policy(**constants, grid=constants["noise_multiplier"] * constants["clip_norm"] / GRID_SIGMA)
        update = train_shared(
            make_trainable(head, policy),
            self.start,
            self.features.select(list(rows)),
            Labels([self.encoded.labels[row] for row in rows]),
            policy=policy,
            micro_batch=micro_batch,
            randomness=Silent(),
        )
        return np.concatenate([array.ravel() for array in update.values()]).astype(np.float64)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_every_cut_gives_the_logits_of_the_whole_model(llama, blocks):
    setting = Setting(llama, blocks=blocks, shift=0.0)
    whole = LlamaForCausalLM.from_pretrained(llama.folder, dtype=torch.float32)
    for row, ids in enumerate(setting.encoded.token_ids):
        hidden, mask, _ = setting.batch([row, 3])  # padded to another's length
        with torch.no_grad():
            found = setting.head.states(hidden, mask)[0, : len(ids)] @ llama.family.vocabulary(llama.model).T
            wanted = whole(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_the_loss_is_the_mean_over_the_response_alone(llama):
    setting = Setting(llama, shift=0.0)
    whole = LlamaForCausalLM.from_pretrained(llama.folder, dtype=torch.float32)
    found = setting.head(*setting.batch(range(len(PAIRS)))).detach()
    for row, (_, answer) in enumerate(PAIRS):
        response = [*llama.tokenizer.encode(answer, add_special_tokens=False).ids, llama.eos_id]
        ids = setting.encoded.token_ids[row] + [llama.eos_id]
        with torch.no_grad():
            logits = whole(torch.tensor([ids])).logits[0]
        predicted = logits[-len(response) - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(predicted, torch.tensor(response))
        assert found[row] == pytest.approx(float(wanted), rel=1e-4)


def test_the_end_is_learnt_though_padding_has_its_id(llama):
    assert llama.eos_id == 2
    assert json.loads((llama.folder / "config.json").read_text())["pad_token_id"] == 2
    for labels in Setting(llama).encoded.labels:
        assert labels[-1] == llama.eos_id
        assert (labels[: len(labels) - 1] != llama.eos_id).all()
    padded = Setting(llama).batch([0, 3])[2]
    assert (padded == llama.eos_id).sum() == 2  # one end a response, none in the padding


def test_a_long_prompt_is_cut_in_its_middle_and_the_response_stays(llama):
    [long] = [pair for pair in PAIRS if len(pair[0]) > 50]
    scenario = settings(max_tokens=32)
    encoded = encode_dialogues(llama, [long], scenario)
    [ids], [labels] = encoded.token_ids, encoded.labels
    assert len(ids) == len(labels) == 32
    assert ids[0] == llama.tokenizer.token_to_id("<|im_start|>")
    kept = llama.tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label == IGNORE])
    assert kept.endswith("and rain")
    assert llama.tokenizer.decode([label for label in labels if label != IGNORE]) == "i do not know ."


@pytest.mark.parametrize("method", ["fedavg", "ffa-lora"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_one_step_is_the_clipped_sum_of_single_gradients(llama, blocks, method):
    setting = Setting(llama, blocks=blocks, method=method)
    gradients = []
    for row in range(len(PAIRS)):
        loss = setting.head(*setting.batch([row])).sum()
        found = torch.autograd.grad(loss, list(shared_parameters(setting.head).values()))
        gradients.append(torch.cat([g.flatten() for g in found]).double().numpy())
    norms = np.linalg.norm(gradients, axis=1)
    clip = float(np.median(norms))
    wanted = -(0.7 / 4.0) * sum(g * min(1.0, clip / n) for g, n in zip(gradients, norms, strict=True))
    np.testing.assert_allclose(setting.update(clip_norm=clip), wanted, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(setting.update(clip_norm=clip, micro_batch=8), wanted, rtol=2e-4, atol=1e-6)


def test_one_dialogue_moves_the_step_by_at_most_the_clip_norm(llama):
    setting = Setting(llama)
    whole = setting.update(clip_norm=0.01)
    for left_out in range(len(PAIRS)):
        part = setting.update([row for row in range(len(PAIRS)) if row != left_out], clip_norm=0.01)
        moved = np.linalg.norm(whole - part) * 4.0 / 0.7
        assert 0.009 <= moved <= 0.01 * (1 + 1e-4)


def test_a_batchs_mean_would_break_the_bound_and_would_be_seen(llama, monkeypatch):
    """The trap of the usual loss: a mean over the batch's tokens lets one record scale another's gradient."""

    def batch_mean(head, hidden, mask, labels):
        nll, owner = head.token_losses(hidden, mask, labels)
        return torch.zeros(len(labels)).index_add(0, owner, nll) / (labels != IGNORE).sum()

    setting = Setting(llama)
    monkeypatch.setattr(CausalHead, "forward", batch_mean)
    monkeypatch.setattr("shared.models.features._MAX_PADDING", 100.0)  # all in one batch
    whole, part = setting.update(clip_norm=1e3), setting.update([0, 1, 2, 3], clip_norm=1e3)
    monkeypatch.undo()
    single = setting.update([4], clip_norm=1e3)
    assert np.linalg.norm(whole - part - single) > 0.1 * np.linalg.norm(single)
    together, apart = setting.update(clip_norm=1e3), setting.update([0, 1, 2, 3], clip_norm=1e3)
    np.testing.assert_allclose(together - apart, single, rtol=1e-3, atol=1e-5)


class Largest(TorchDispatchMode):
    """The size of the largest tensor made."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return made


def test_the_full_logits_are_never_in_memory(llama, monkeypatch):
    setting = Setting(llama)
    hidden, mask, labels = setting.batch([1])
    vocabulary = len(llama.family.vocabulary(llama.model))
    reference = setting.head(hidden, mask, labels)
    tokens = int((labels != IGNORE).sum())
    sizes = {}
    for chunk in (4, 1000):
        monkeypatch.setattr(shared.heads.causal, "_CHUNK_TOKENS", chunk)
        with Largest() as largest:
            losses = setting.head(hidden, mask, labels)
            losses.sum().backward()
        torch.testing.assert_close(losses, reference)
        sizes[chunk] = largest.size
    assert sizes[4] < tokens * vocabulary <= sizes[1000]


def test_scores_count_the_likeliest_tokens(llama):
    setting = Setting(llama)
    hidden, mask, labels = setting.batch(range(len(PAIRS)))
    nll, hit, owner = setting.head.token_scores(hidden, mask, labels)
    losses, rows = setting.head.token_losses(hidden, mask, labels)
    torch.testing.assert_close(nll, losses.detach())
    assert torch.equal(owner, rows)
    with torch.no_grad():
        logits = setting.head.states(hidden, mask) @ llama.family.vocabulary(llama.model).T
    asked = labels != IGNORE
    assert torch.equal(hit, (logits.argmax(2) == labels)[asked])


def test_an_encoder_predicts_no_tokens_and_a_linear_head_trains_nothing(tiny_base, llama):
    with pytest.raises(ScenarioError, match="needs a base that predicts tokens"):
        make_head(tiny_base, settings())
    with pytest.raises(ScenarioError, match=r"model\.head_blocks must be at least 1"):
        make_head(llama, settings(blocks=0))
