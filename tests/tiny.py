"""A random base model, small enough to build in code and to trace in seconds."""

import json
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from shared.model import Base, load_base

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
