"""A memory in an exported head: the device predicts what a simulation does, and refuses what is broken."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from client.export.encoder import build_head
from client.personal.personalize import predict_user
from client.runtime.artifact import ADAPTER, MANIFEST, describe_contents
from client.runtime.memory import make_memory
from client.runtime.retrieval import Texts
from client.runtime.runtime import open_base, open_head
from shared.config import AdapterConfig, ModelConfig, PersonalConfig, Scenario, TaskConfig
from shared.errors import HeadError
from shared.heads.output import OutputLayer, pooled_features
from shared.heads.rating import RatingHead
from shared.models.features import compute_features

RATED = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
RETRIEVERS = ("dense", "bm25", "recency")


class World:
    """A head on the tiny base, a user's five ratings, and what is asked."""

    def __init__(self, base, texts):
        adapter = AdapterConfig(targets=("attention.output.dense", "output.dense"), whitened_features=8)
        scenario = Scenario(name="tiny", task=TaskConfig(), model=ModelConfig(head_blocks=1), adapter=adapter)
        self.head = RatingHead(base, scenario)
        torch.nn.init.normal_(self.head.mean, std=0.1, generator=torch.Generator().manual_seed(1))
        self.output = OutputLayer(np.random.default_rng(0).normal(size=base.hidden_size), 3.2)
        self.known, self.asked = texts[2:7], [*texts[5:9], "crime drama thriller"]
        self.probes = texts

    def look(self, texts):
        features = compute_features(self.head.base[0], texts, head_blocks=1, max_tokens=48)
        pooled = pooled_features(self.head, features)
        return Texts(pooled, pooled @ self.output.weight + self.output.bias, texts)

    @property
    def centre(self):
        return self.head.mean.detach().numpy()

    def wanted(self, personal):
        known, asked = self.look(self.known), self.look(self.asked)
        return np.clip(predict_user(known, RATED, asked, mean=self.centre, personal=personal), 1.0, 5.0)

    def files(self, fleet, personal):
        known = self.look(self.known)
        memory = make_memory(known.features, known.texts, RATED - known.shared, centre=self.centre, personal=personal)
        return build_head(
            base_folder=fleet,
            head=self.head,
            output=self.output,
            user="u1",
            privacy={"epsilon": 8.0},
            probe_texts=self.probes,
            created=datetime(2026, 1, 2, tzinfo=UTC),
            memory=memory,
        )


@pytest.fixture
def world(tiny_base, tiny_texts):
    return World(tiny_base, tiny_texts)


@pytest.fixture(scope="module")
def fleet(tiny_fleet):
    return open_base(tiny_fleet)


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_the_device_predicts_with_a_memory_what_the_simulation_does(world, fleet, retriever):
    personal = PersonalConfig(method="retrieval", retriever=retriever, neighbours=3, temperature=0.3, ridge=0.2)
    head = open_head(world.files(fleet, personal), base=fleet)
    np.testing.assert_allclose(head.predict(world.asked), world.wanted(personal), atol=2e-5)
    shared = np.clip(world.look(world.asked).shared, 1.0, 5.0)
    assert np.abs(head.predict(world.asked) - shared).max() > 0.04
    texts = any(text in json.dumps(head.manifest, ensure_ascii=False) for text in world.known)
    assert texts is (retriever == "bm25")  # where meanings are compared, no text is in the file


def test_no_records_are_no_memory(world):
    nothing = np.zeros((0, 4))
    assert make_memory(nothing, [], np.zeros(0), centre=np.zeros(4), personal=PersonalConfig()) is None


def test_words_need_every_text():
    personal = PersonalConfig(method="retrieval", retriever="bm25")
    with pytest.raises(HeadError, match="must have the text of every record"):
        make_memory(np.zeros((2, 4)), ["one"], np.zeros(2), centre=np.zeros(4), personal=personal)


def _altered(files, *, tensors=None, memory=None):
    manifest = json.loads(files[MANIFEST])
    content = files[ADAPTER]
    if tensors:
        changed = tensors(load(content))
        content = save(changed)
        manifest["slots"] = [{"name": n, "shape": list(a.shape), "dtype": "float32"} for n, a in changed.items()]
        manifest["files"] = describe_contents({ADAPTER: content})
    if memory:
        manifest["memory"] = memory(manifest["memory"])
    return {ADAPTER: content, MANIFEST: json.dumps(manifest).encode()}


def test_a_memory_that_is_not_whole_is_refused(world, fleet):
    files = world.files(fleet, PersonalConfig(method="retrieval", retriever="dense"))
    broken = (
        {"memory": lambda m: m | {"retriever": "recency"}},  # the keys of another retriever
        {"memory": lambda m: m | {"retriever": "bm25", "texts": []}},
        {"memory": lambda m: m | {"temperature": 0.0}},
        {"memory": lambda m: m | {"method": "ditto"}},
        {"memory": lambda m: {}},
        {"memory": lambda m: None},
        {"tensors": lambda t: {n: a for n, a in t.items() if n != "memory.keys"}},
        {"tensors": lambda t: t | {"memory.keys": t["memory.keys"][:, 1:]}},
        {"tensors": lambda t: t | {"memory.residuals": t["memory.residuals"][1:]}},
        {"tensors": lambda t: t | {"memory.more": t["memory.residuals"]}},
    )
    for change in broken:
        with pytest.raises(HeadError, match="cannot be used"):
            open_head(_altered(files, **change), base=fleet)
    open_head(_altered(files, memory=lambda m: m | {"neighbours": 1}), base=fleet)
