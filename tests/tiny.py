"""A random base model, small enough to build in code and to trace in seconds."""

import json
import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from shared.models.model import Base, load_base

TEXTS = (
    "Fargo (1996). Crime, Drama, Thriller",
    "Toy Story (1995). Animation, Children's, Comedy",
    "Heat (1995). Action, Crime, Thriller",
    "Alien (1979). Action, Horror, Sci-Fi, Thriller",
    "Babe (1995). Children's, Comedy, Drama",
    "M (1931). Crime, Film-Noir, Thriller",
    "Seven (1995). Crime, Thriller",
    "Get Shorty (1995). Action, Comedy, Drama",
    "Dr. Strangelove or: How I Learned to Stop Worrying and Love the Bomb (1963). Sci-Fi, War",
    "Casablanca (1942). Drama, Romance, War",
    "Brazil (1985). Sci-Fi",
    "Die Hard (1988). Action, Thriller",
    "Big Night (1996). Drama",
    "Psycho (1960). Horror, Romance, Thriller",
    "Gandhi (1982). Drama",
    "Amadeus (1984). Drama, Mystery",
    "Raging Bull (1980). Drama",
    "The Wrong Trousers (1993). Animation, Comedy",
    "Carrie (1976). Horror",
    "Evita (1996). Drama, Musical",
    "Jaws",
    "",
)
_WORDS = ("crime", "drama", "thriller", "comedy", "action", "horror", "war", "the", "sci", "fi", "children")


def tiny_base(folder: Path, *, layers: int = 2, seed: int = 0) -> Base:
    """Build a BERT of width 32, mean-pooled and normalised, save it in the hub's layout and load it."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS, *characters, *(f"##{c}" for c in characters)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,  # the usual 0.02 would leave the blocks nearly without effect
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [{"type": "sentence_transformers.models.Normalize"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    return load_base(folder)


def tiny_llama(folder: Path, *, layers: int = 2, seed: int = 0) -> Path:
    """Write a causal LM of width 32 in the hub's layout: grouped heads, tied embeddings, byte-level BPE, pad = eos."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ("er", "in", "Ġt", "Ġth")
    vocabulary = {token: i for i, token in enumerate((*special, *alphabet, *merged))}
    merges = [("e", "r"), ("i", "n"), ("Ġ", "t"), ("Ġt", "h")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,  # onnxruntime's fused attention takes multiples of 16
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,  # as in SmolLM2
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_movielens(folder: Path, *, users: int = 12, films: int = 40, seed: int = 0) -> Path:
    """Write an invented data set in the layout of MovieLens 100k: every user has a taste for some genres."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    genres = ("Action", "Comedy", "Crime", "Drama", "Horror", "War")
    chosen = {film: draw.sample(genres, draw.randint(1, 3)) for film in range(1, films + 1)}
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    items += [f"{film}\tFilm number {film}\t{1950 + film}\t{' '.join(kinds)}" for film, kinds in chosen.items()]
    ratings = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(1, users + 1):
        likes = set(draw.sample(genres, 3))
        for film in draw.sample(sorted(chosen), draw.randint(12, 24)):
            stars = min(5, max(1, 2 + len(likes & set(chosen[film])) + draw.choice((0, 0, 1))))
            ratings.append(f"{user}\t{film}\t{stars}\t{draw.randint(1, 10_000)}")
    (folder / "ml-100k.item").write_text("\n".join(items) + "\n", encoding="utf-8")
    (folder / "ml-100k.inter").write_text("\n".join(ratings) + "\n", encoding="utf-8")
    return folder


def tiny_scenario(folder: Path, *, base: Path, data: Path, body: str = "") -> Path:
    """Write a scenario that runs in seconds on the two above; ``body`` is more TOML."""
    path = folder / "tiny.toml"
    path.write_text(
        f'''
name = "tiny"
seed = 3
model.base = "{base}"
data.source = "{data}"
adapter.rank = 2
adapter.whitened_features = 8
federation.rounds = 3
federation.cohort_size = 4
privacy.max_participations = 1
privacy.delta = 1e-4
evaluation.bootstrap_resamples = 50
export.users = 2
{body}
''',
        encoding="utf-8",
    )
    return path


def tiny_dialogues(folder: Path, *, personas: int = 6, dialogues: int = 18, seed: int = 0) -> Path:
    """Write invented dialogues in the layout of ConvAI2: every persona has words of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    words = ("tea", "rain", "books", "dogs", "trains", "songs", "cake", "hills", "boats")
    favourites = [draw.sample(words, 3) for _ in range(personas)]
    lines = []
    for dialogue in range(dialogues):
        mine = favourites[dialogue % personas]
        lines += [f"{i} your persona: i like {word} ." for i, word in enumerate(mine, start=1)]
        turns = draw.randint(2, 4)
        said = [
            f"do you like {' or '.join(draw.sample(words, 2))} ?\ti like {draw.choice(mine)} the most ."
            for _ in range(turns)
        ]
        lines += [f"{i} {turn}" for i, turn in enumerate(said, start=len(mine) + 1)]
    (folder / "valid_self_original_no_cands.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def tiny_generation(folder: Path, *, base: Path, data: Path, body: str = "") -> Path:
    """Write a scenario of next utterances that runs in seconds on a tiny Llama; ``body`` is more TOML."""
    path = folder / "tiny-generation.toml"
    path.write_text(
        f'''
name = "tiny-generation"
seed = 3
data.format = "convai2"
data.source = "{data}"
task.name = "generation"
task.template = "<|im_start|>{{text}}<|im_end|>"
model.base = "{base}"
model.max_tokens = 48
adapter.rank = 2
adapter.targets = ["mlp.down_proj", "self_attn.q_proj"]
federation.rounds = 2
federation.cohort_size = 2
privacy.max_participations = 1
privacy.delta = 1e-3
linear.enabled = false
evaluation.bootstrap_resamples = 50
export.users = 1
{body}
''',
        encoding="utf-8",
    )
    return path
