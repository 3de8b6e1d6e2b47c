"""Functional linearity (ToFu, WACV 2024, Eq. 8): how straight the path of a layer's output is between two tokens.

Where it is low, the average of two tokens is far from both, and pruning is better; near 1, averaging loses little.
`python -m tofu_sd.linearity` measures it in every block of a model.
"""

from __future__ import annotations

from collections.abc import Sequence

from .curve import Curve
from .measurement import measure, measure_classifier, measure_split, measuring

__all__ = ["Curve", "main", "measure", "measure_classifier", "measure_split", "measuring"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line with these arguments. Returns 0, or 2 after an error."""
    from .__main__ import main as run  # Python warns if `-m` runs a module that is already imported

    return run(argv)
