"""Token Fusion for Stable Diffusion: similar tokens are fused before self-attention and unfolded after it.

import tofu_sd
tofu_sd.apply_patch(pipe, ratio=0.5)
"""

from . import demo, recipes
from .api import apply_patch, patched, remove_patch, summary
from .policy import TokenFusion

__all__ = ["TokenFusion", "__version__", "apply_patch", "demo", "patched", "recipes", "remove_patch", "summary"]
__version__ = "0.1.0"
