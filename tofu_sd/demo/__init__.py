"""The embedded text-to-image model: small, trained here, of Stable Diffusion's own classes, loaded without network."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
