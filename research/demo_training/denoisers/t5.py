"""A small T5 encoder and its tokenizer."""

from __future__ import annotations

import string
from collections.abc import Iterable

from transformers import T5Config, T5EncoderModel, T5TokenizerFast


def build_t5_tokenizer(texts: Iterable[str]) -> T5TokenizerFast:
    """Builds a T5 tokenizer with one token for each word of the texts; other words are read letter by letter."""
    words = sorted({f"▁{word}" for text in texts for word in text.split()})
    letters = sorted({"▁", *string.ascii_letters, *string.digits, *string.punctuation})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # log-probabilities: the most probable split of a known word is the word itself
    vocab = special + [(word, -1.0) for word in words] + [(letter, -10.0) for letter in letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def build_t5_encoder(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    """Builds an encoder of T5 version 1.1 with 2 layers.

    Args:
        tokenizer: its tokenizer.
        width: channels of its states.
    """
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,  # dropout draws from the global random state, and a resumed training would differ
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
