"""One thread, no network, and not a word from the libraries."""

import logging
import os
from typing import NoReturn
from urllib.error import URLError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's own functions are decorated when it is first imported

import diffusers
import pytest


def _no_download(*_: object, **__: object) -> NoReturn:
    raise URLError("tests need no network")


torch.hub.download_url_to_file = _no_download  # of LPIPS's nets and Inception, which HF_HUB_OFFLINE does not stop
torch.set_num_threads(1)
diffusers.logging.set_verbosity_error()
logging.getLogger("tofu_sd").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _same_numbers_whatever_ran_before() -> None:
    torch.manual_seed(0)
