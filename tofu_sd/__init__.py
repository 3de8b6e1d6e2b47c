"""Token Fusion for Stable Diffusion: similar tokens are merged before self-attention and unmerged after it.

import tofu_sd
tofu_sd.apply_patch(pipe, ratio=0.5)
"""

from . import interrupts

if interrupts.is_command():  # before imports that take seconds
    interrupts.guard()

# isort: split
from . import demo, recipes
from .api import apply_patch, patched, record_maps, remove_patch, summary
from .config import TokenFusionConfig
from .core.token_map import draw_merge_map

__all__ = [
    "TokenFusionConfig",
    "__version__",
    "apply_patch",
    "demo",
    "draw_merge_map",
    "patched",
    "recipes",
    "record_maps",
    "remove_patch",
    "summary",
]
__version__ = "0.1.0"
