"""Checks that a loaded pipeline is complete and reads its prompts. Libraries load incomplete ones without an error."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import EvalError
from ..common.files import listed

PADDING = 0.01  # proportion of a vocabulary that encoders other than CLIP's may add to round it up
UNKNOWN = 0.5  # proportion of unknown tokens above which prompts mean nothing


@contextmanager
def missing_weights() -> Iterator[dict[str, list[str]]]:
    """Inside, loading a model records the weights that are in no file, by the component's name.

    diffusers and transformers initialize those at random and log it; neither reports it to the caller.
    """
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    found: dict[str, list[str]] = {}

    def recording(own: Callable[..., Any]) -> Any:
        def from_pretrained(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
            is_requested = options.pop("output_loading_info", False)
            model, info = own(cls, name, *args, output_loading_info=True, **options)
            missing = sorted(info["missing_keys"])
            if missing:
                found[str(options.get("subfolder") or Path(name).name)] = missing
            return (model, info) if is_requested else model

        return classmethod(from_pretrained)

    owners: tuple[Any, ...] = (ModelMixin, PreTrainedModel)
    before = [vars(owner)["from_pretrained"] for owner in owners]
    try:
        for owner, method in zip(owners, before, strict=True):
            owner.from_pretrained = recording(method.__func__)
        yield found
    finally:
        for owner, method in zip(owners, before, strict=True):
            owner.from_pretrained = method


def check_weights(missing: dict[str, list[str]]) -> None:
    """EvalError where weights of a component are in no file."""
    for name, keys in missing.items():
        raise EvalError(
            f"{len(keys)} weights of {name} are in no file ({listed(keys, 2)}) and would be random; download it again"
        )


def check_components(pipe: Any) -> None:
    """EvalError for a pipeline that lacks a component, has a damaged tokenizer, or needs an image as input."""
    optional = getattr(pipe, "_optional_components", ())
    for name, part in pipe.components.items():
        if part is None and name not in optional:
            raise EvalError(f"its {name} is missing from model_index.json; download it again")
    channels = getattr(getattr(pipe, "unet", None), "config", {}).get("in_channels")
    latent = getattr(getattr(pipe, "vae", None), "config", {}).get("latent_channels")
    if channels and latent and channels != latent:
        raise EvalError(
            f"its UNet takes {channels} channels and an image from text has {latent}: it is for inpainting or editing; "
            "give a text-to-image model"
        )
    if getattr(pipe, "config", {}).get("requires_aesthetics_score"):
        raise EvalError("it is a refiner, which needs an image; give a text-to-image model")
    for name, tokenizer in tokenizers(pipe):
        _check_vocabulary(name, tokenizer, getattr(pipe, name.replace("tokenizer", "text_encoder"), None))


def tokenizers(pipe: Any) -> list[tuple[str, Any]]:
    """The tokenizers of a pipeline by their names."""
    parts = getattr(pipe, "components", {})
    return [(name, part) for name, part in sorted(parts.items()) if hasattr(part, "get_vocab")]


def _check_vocabulary(name: str, tokenizer: Any, encoder: Any) -> None:
    """EvalError where a tokenizer does not match its text encoder, or lacks merges."""
    config = getattr(encoder, "config", None)
    expected, size = getattr(config, "vocab_size", None), len(tokenizer)
    clip = str(getattr(config, "model_type", "")).startswith("clip")
    again = f"files of its {name} are missing or of another model; download the folder {name!r} again"
    spare = 0 if clip else PADDING * size
    if isinstance(expected, int) and not size <= expected <= size + spare:
        encoder_name = name.replace("tokenizer", "text_encoder")
        raise EvalError(f"its {name} has {size} tokens and its {encoder_name} {expected}: {again}")
    most, limit = getattr(config, "max_position_embeddings", None), tokenizer.model_max_length
    if clip and isinstance(most, int) and limit > most:
        raise EvalError(f"its {name} reads up to {limit:.3g} tokens and its text encoder {most}: {again}")
    if clip and (found := _merges(tokenizer)) and found[0] < found[1]:
        raise EvalError(f"its {name} has {found[0]} merges of letters and needs {found[1]}: {again}")


def _merges(tokenizer: Any) -> tuple[int, int] | None:
    """(merges of a byte-pair encoding, tokens that only a merge can make); None for other tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        if whole["model"].get("type") != "BPE":
            return None
        vocabulary, merges = whole["model"]["vocab"], len(whole["model"]["merges"])
        special = {token["content"] for token in whole["added_tokens"]}
    elif hasattr(tokenizer, "bpe_ranks"):  # transformers before 5
        vocabulary, merges = tokenizer.encoder, len(tokenizer.bpe_ranks)
        special = set(tokenizer.all_special_tokens)
    else:
        return None
    return merges, sum(len(token.removesuffix("</w>")) > 1 for token in vocabulary if token not in special)


def check_prompts(pipe: Any, prompts: Sequence[str]) -> None:
    """EvalError where a tokenizer does not know most of the prompts, or reads two different ones as the same."""
    texts = list(dict.fromkeys(prompts))
    for name, tokenizer in tokenizers(pipe):
        ids = [tuple(row) for row in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]
        total = sum(map(len, ids))
        unknown = sum(row.count(tokenizer.unk_token_id) for row in ids)
        if total and unknown > UNKNOWN * total:
            raise EvalError(
                f"the {name} does not know {unknown} of {total} tokens of these prompts: its vocabulary is incomplete, "
                "or of another language; download the model again or give other --prompts"
            )
        seen: dict[tuple[int, ...], str] = {}
        for row, text in zip(ids, texts, strict=True):
            first = seen.setdefault(row, text)
            if _letters(first) != _letters(text):
                raise EvalError(
                    f"the {name} reads {_short(first)} and {_short(text)} as the same {len(row)} tokens, so that their "
                    "images would be of one prompt; download the model again or give other --prompts"
                )


def _letters(text: str) -> str:
    """The text as tokenizers see it: without case, spaces and differences in Unicode composition."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
