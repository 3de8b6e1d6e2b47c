"""AUTOMATIC1111, Forge, reForge and SD.Next load this file where the repository is in their extensions/."""

from modules import script_callbacks

from tofu_sd.hosts.webui import TokenFusionScript, add_axes

__all__ = ["TokenFusionScript"]  # by which the programs find it

script_callbacks.on_before_ui(add_axes)
