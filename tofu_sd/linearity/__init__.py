"""Functional linearity (ToFu, WACV 2024, Eq. 8): how straight the path of a layer's output is between two tokens.

Where it is low, the average of two tokens is far from both, and pruning is better; near 1, averaging loses little.
`python -m tofu_sd.linearity` measures it in every block of a model.
"""

from .curve import Curve
from .measurement import measure, measure_classifier, measure_split, measuring

__all__ = ["Curve", "measure", "measure_classifier", "measure_split", "measuring"]
