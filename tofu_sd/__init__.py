"""Token Fusion for Stable Diffusion: similar tokens are fused before self-attention and unfolded after it.

import tofu_sd
tofu_sd.apply_patch(pipe, ratio=0.5)
"""

from . import interrupts

if interrupts.is_command():  # before the modules that take seconds to import
    interrupts.guard()

# isort: split
from . import demo, recipes
from .api import apply_patch, patched, remove_patch, summary, watch
from .config import TokenFusion
from .core.token_map import merge_map

__all__ = [
    "TokenFusion",
    "__version__",
    "apply_patch",
    "demo",
    "merge_map",
    "patched",
    "recipes",
    "remove_patch",
    "summary",
    "watch",
]
__version__ = "0.1.0"
