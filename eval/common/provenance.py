"""Where a figure comes from: command, commit, device, packages, hashes of weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from .files import without_paths

PACKAGES = ("tofu-sd", "torch", "diffusers", "transformers", "accelerate", "tomesd", "deepcache", "lpips",
            "torchmetrics", "torch-fidelity", "torchvision", "pytorch-msssim", "numpy", "pillow")  # fmt: skip


def version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The device in words: 'cuda: NVIDIA H200', 'cpu: Intel Xeon, 2 threads'."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu: {_cpu_name()}, {threads} thread{'s' * (threads != 1)}"
    return device.type


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def pipeline_name(pipe: Any) -> str:
    """Classes of the pipeline and its scheduler, and a hash of all settings, weights and vocabularies.

    `tokenizers_hash` covers how prompts are split into tokens.
    """
    sha = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        config = getattr(part, "config", None)
        settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else dict(config or {})
        public = sorted((key, str(value)) for key, value in settings.items() if key[0] != "_")
        sha.update(f"{name} {type(part).__name__} {public}".encode())
        if isinstance(part, nn.Module):
            sha.update(weights_hash(part).encode())
        elif hasattr(part, "get_vocab"):
            sha.update(str(sorted(part.get_vocab().items())).encode())
    return f"{type(pipe).__name__}, {type(pipe.scheduler).__name__}, {sha.hexdigest()[:12]}"


def tokenizers_hash(pipe: Any) -> str:
    """Hash of how a pipeline tokenizes prompts."""
    parts = [
        (name, tokenizer_hash(part)) for name, part in sorted(pipe.components.items()) if hasattr(part, "get_vocab")
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer: vocabulary, rules, maximal length."""
    content: dict[str, Any] = {"length": tokenizer.model_max_length, "special": sorted(tokenizer.all_special_ids)}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        # padding and truncation are those of the last call
        content["rules"] = {name: rule for name, rule in whole.items() if name not in ("padding", "truncation")}
    else:
        content["words"] = sorted(tokenizer.get_vocab().items())
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(file).read_bytes() for file in tokenizer.save_vocabulary(folder)]
            content["files"] = [hashlib.sha256(file).hexdigest() for file in files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def weights_hash(model: nn.Module) -> str:
    """The first digits of the SHA-256 of a model's weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:8]


def attention_name(pipe: Any) -> str:
    """Classes of the denoiser's attention processors: they decide the last bits of an image, and its time."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    processors = getattr(denoiser, "attn_processors", {})
    return ", ".join(sorted({type(processor).__name__ for processor in processors.values()}))


def git_commit() -> str | None:
    """The commit of this checkout, with '+changes' where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    if (
        _git(here, "ls-files", "--error-unmatch", "__init__.py") is None
    ):  # installed: a repository around it is another one
        return None
    commit = _git(here, "rev-parse", "--short=12", "HEAD")
    return commit and commit + "+changes" * bool(_git(here, "status", "--porcelain", "--untracked-files=no"))


def _git(where: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(where), *command], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _portable(argument: str) -> str:
    """An argument without the folders of this machine: of an absolute path its last part, which may have spaces."""
    return PurePath(argument).name if PurePath(argument).is_absolute() else without_paths(argument)


def process_mib() -> int | None:
    """Peak memory of this process in MiB, whatever it did; None where it is unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10


def runtime(device: torch.device) -> dict[str, str]:
    """What a device's kernels depend on besides torch: driver and CUDA versions, or CPU instructions."""
    if device.type == "cpu":
        return {"instructions": torch.backends.cpu.get_cpu_capability()}
    if device.type != "cuda":
        return {}
    from torch.utils import collect_env

    try:
        driver = collect_env.get_nvidia_driver_version(collect_env.run)  # type: ignore[no-untyped-call]
    except OSError:
        driver = None
    versions = {"driver": driver, "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    return {name: str(value) for name, value in versions.items() if value}


@cache
def environment() -> str | None:
    """torch's own report of the machine, its drivers and packages; None where it fails.

    Without folders and clock frequencies, so that all runs on a machine report the same.
    """
    from torch.utils import collect_env

    try:
        report: str = collect_env.get_pretty_env_info()  # type: ignore[no-untyped-call]
    except Exception:  # it calls many programs; the run does not need them
        return None
    lines = without_paths(report).strip().splitlines()
    return "\n".join(line for line in lines if "MHz" not in line and "ClockSpeed" not in line)


def deduplicate_environments(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The environment reports of runs by their hashes. Replaces the reports in `runs` by the hashes."""
    reports = {}
    for run in runs:
        if report := run.get("environment"):
            run["environment"] = hashlib.sha256(report.encode()).hexdigest()[:8]
            reports[run["environment"]] = report
    return reports


def now() -> str:
    """The moment, to the second, in UTC (ISO 8601)."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def begin(program: str, argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Metadata of a run that begins now. program: the module that runs with `argv`."""
    return {
        "command": shlex.join(["python", "-m", program, *map(_portable, argv)]),
        "commit": git_commit(),
        "device": device_name(device),
        "runtime": runtime(device),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": {name: found for name in PACKAGES if (found := version(name)) is not None},
        "started": now(),
    }
