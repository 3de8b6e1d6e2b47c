"""A CLIP tokenizer with a vocabulary learned from a few texts."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer


def build_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Builds a CLIP tokenizer whose merges are learned from texts: each of their words is one token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator((text.lower() for text in texts), trainer)
    learned = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = sorted(alphabet)
    tokens = (
        symbols + [s + "</w>" for s in symbols] + [a + b for a, b in learned] + ["<|startoftext|>", "<|endoftext|>"]
    )
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=learned, pad_token="<|endoftext|>", model_max_length=77)
