"""Test setup: one thread, no network, no output of libraries."""

import logging
import os
from typing import NoReturn
from urllib.error import URLError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton decorates its own functions at its first import

import diffusers
import pytest


def _no_download(*_: object, **__: object) -> NoReturn:
    raise URLError("tests need no network")


torch.hub.download_url_to_file = _no_download  # LPIPS and Inception downloads ignore HF_HUB_OFFLINE
torch.set_num_threads(1)
diffusers.logging.set_verbosity_error()
logging.getLogger("tofu_sd").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    torch.manual_seed(0)
