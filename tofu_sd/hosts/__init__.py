"""The model libraries and programs whose models can be patched. `Host` says what each must provide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..patching.host import Argument, ArgumentNames, Host

if TYPE_CHECKING:  # the type checker compares these modules with the protocol; they are imported when they are needed
    from . import diffusers_unet, ldm, timm

    HOSTS: tuple[Host, ...] = (diffusers_unet, ldm, timm)

__all__ = ["Argument", "ArgumentNames", "Host"]
