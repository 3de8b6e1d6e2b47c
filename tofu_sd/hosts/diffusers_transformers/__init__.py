"""diffusers: diffusion transformers. One module describes each family; `host_of` chooses it by the model's class.

Written for diffusers 0.42.
"""

from __future__ import annotations

from .host import TransformerHost
from .registry import host_of

__all__ = ["TransformerHost", "host_of"]
