"""The files of --model: a pipeline's folder and the variant of its weights; anything else is refused with advice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from .. import EvalError
from ..common.files import listed, read_json

INDEX = "model_index.json"
HALF = "fp16"  # the variant that is used where there are no plain weights
SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[A-Za-z]\w*))?(?:-\d+-of-\d+)?"
    r"\.(?:safetensors|bin)"
)
UNUSED = ("safety_checker", "feature_extractor")  # components that no evaluation loads
TAKES = f"--model takes a folder with {INDEX}, as save_pretrained of a diffusers pipeline writes it, or a hub id"


def check_path(model: str) -> None:
    """EvalError for a path that is not the folder of a pipeline, with what it is and what to do."""
    path = Path(model)
    if not model.strip():
        raise EvalError(f"--model is {model!r}; {TAKES}")
    if path.is_file():
        raise EvalError(_cannot(path, _of_file(path)))
    if path.is_dir() and not (path / INDEX).exists():
        raise EvalError(_cannot(path, _of_folder(path)))
    if not path.exists() and path.suffix in SINGLE:
        raise EvalError(_cannot(path, f"there is no such file; {TAKES}"))
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():  # diffusers replaces missing values by defaults, which are another schedule
        config = read_json(scheduler)
        if not isinstance(config, dict) or "_class_name" not in config:
            raise EvalError(_cannot(path, "scheduler/scheduler_config.json has no '_class_name'; download it again"))


def _cannot(path: Path, why: str) -> str:
    return f"cannot load the model {path.name or str(path)!r}: {why}"


def _of_file(path: Path) -> str:
    """What a single file is, and how to convert it to a folder."""
    if path.suffix not in SINGLE:
        return f"it is a file; {TAKES}"
    keys: Sequence[str] = ()
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
        except (SafetensorError, OSError) as error:
            return f"it is not a complete safetensors file ({error}); download it again"
        if any(mark in key for key in keys for mark in ("lora_", ".lora.", "hada_w", "lokr_")):
            return _lora()
        if not any(key.startswith(("model.diffusion_model.", "cond_stage_model.", "conditioner.")) for key in keys):
            return f"it is a file of weights ({listed(keys, 2) or 'none'}), but not of a whole model; {TAKES}"
    kind = "StableDiffusionXLPipeline" if any(key.startswith("conditioner.") for key in keys) else None
    return (
        "it is a single-file checkpoint; write a folder once with diffusers' "
        f"{kind or 'StableDiffusionPipeline'}.from_single_file({path.name!r}).save_pretrained('FOLDER') and give "
        f"--model FOLDER{'' if keys else ' (StableDiffusionXLPipeline for SDXL)'}"
    )


def _lora() -> str:
    return (
        "it is a LoRA, which changes a model; load that model in diffusers, call load_lora_weights and fuse_lora, "
        "save_pretrained('FOLDER') and give --model FOLDER"
    )


def _of_folder(path: Path) -> str:
    """What a folder without an index is."""
    inside = sorted(path.iterdir())
    if not inside:
        return f"the folder is empty; {TAKES}"
    names = {entry.name for entry in inside}
    if names & {"adapter_config.json", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"}:
        return _lora()
    for pattern in (f"*/{INDEX}", f"snapshots/*/{INDEX}"):
        if found := sorted(path.glob(pattern)):
            return f"it has no {INDEX}, and its folder {found[0].parent.name!r} has one: give that folder"
    config = read_json(path / "config.json")
    if isinstance(config, dict):
        kind = config.get("_class_name") or (config.get("architectures") or ["a model"])[0]
        return f"it holds one component ({kind}) and no {INDEX}; give the folder of the whole pipeline, above it"
    single = [entry for entry in inside if entry.suffix in (".safetensors", ".ckpt") and entry.is_file()]
    if single:
        return f"it has no {INDEX}; {single[0].name}: {_of_file(single[0])}"
    return f"the folder has no {INDEX}; {TAKES}"


def local_folder(model: str) -> Path | None:
    """The folder of a model on this machine: the given one, or the cached copy of the hub's."""
    if Path(model).is_dir():
        return Path(model)
    try:
        found = try_to_load_from_cache(model, INDEX)
    except ValueError:  # not an id of the hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def pick_variant(folder: Path, requested: str | None) -> str | None:
    """The variant of the weights to load: the requested one, else the plain ones, else fp16 where it is the only one.

    EvalError for a variant that no component has: diffusers would silently use the plain weights.
    """
    index = read_json(folder / INDEX)
    names = [name for name in index if name not in UNUSED] if isinstance(index, dict) else []
    found = {name: variants for name in names if (variants := _variants((folder / name).glob("*")))}
    available = sorted({variant or "plain" for variants in found.values() for variant in variants})
    if requested is not None:
        if found and requested not in available:
            raise EvalError(f"--variant is {requested!r}; the weights of {folder.name} are {' and '.join(available)}")
        return requested
    without = [name for name, variants in found.items() if None not in variants]
    if not without:
        return None
    if not all(HALF in found[name] for name in without):
        raise EvalError(
            f"{folder.name}: {listed(without)} has no plain weights; give --variant: {' or '.join(available)}"
        )
    return HALF


def _variants(files: Iterable[Path]) -> set[Any]:
    """The variants of a component's weights; None stands for plain ones."""
    return {found["variant"] for file in files if (found := WEIGHTS.fullmatch(file.name))}
