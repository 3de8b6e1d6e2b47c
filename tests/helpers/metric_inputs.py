"""Random inputs of metrics, packages that may be missing, and a property of every metric of single images."""

from __future__ import annotations

import pytest
import torch

from eval.metrics import registry as metrics


def import_or_skip(module):
    """Imports a module that may be missing or broken: torchvision's mismatch is a RuntimeError, not an ImportError."""
    try:
        return __import__(module, fromlist=["_"])
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"{module} cannot be imported here: {error}")


def random_images(n=2, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def random_features(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def fid_metric(weights):
    """Returns FID with the Inception weights of a file."""
    [metric] = metrics.build_metrics(
        "fid", metrics.Nets(inception=weights), size=64, prompts=[], device=torch.device("cpu")
    )
    return metric


def is_independent_of_other_images(measure, *of):
    """Whether an image's value is the same alone and among others, in any order. of: arguments of `compute`."""
    alone = torch.cat([measure.compute(*(each[i : i + 1] for each in of)) for i in range(len(of[0]))])
    turned = [each.flip(0) if isinstance(each, torch.Tensor) else each[::-1] for each in of]
    return torch.allclose(alone, measure.compute(*turned).flip(0), rtol=1e-5, atol=1e-6)
