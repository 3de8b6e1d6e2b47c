"""Attention over one sequence of text and image tokens, in which only image tokens are merged.

Softmax compares image keys with text keys. A survivor that stands for n image tokens needs log(n), or the text gains
weight; text keys get 0. Queries, keys and values of the text are never changed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .token_map import SizeClasses


def change_image(x: Tensor, start: int, n: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a change to the image tokens of a sequence, and copies all others: [B, H, S, d] -> [B, H, S', d].

    Args:
        x: [B, H, S, d], queries, keys, values or outputs of attention.
        start: position of the first image token.
        n: number of image tokens.
        change: takes the image tokens [B, n, H d] to [B, n', H d].
    """
    B, H, S, d = x.shape
    flat = x.transpose(1, 2).reshape(B, S, H * d)
    before, image, after = torch.split(flat, [start, n, S - start - n], dim=1)
    return torch.cat([before, change(image), after], dim=1).view(B, -1, H, d).transpose(1, 2)


def joint_log_size(log_size: Tensor, start: int, keys: int) -> Tensor:
    """Returns log(n_i) of all keys of a sequence: 0 for those that are no image tokens.

    Args:
        log_size: [B, K], of the image's survivors.
        start: position of the first of them.
        keys: number of all keys.
    """
    return F.pad(log_size, (start, keys - start - log_size.shape[1]))


def joint_classes(classes: SizeClasses | None, start: int, keys: int) -> SizeClasses | None:
    """Returns how many keys of a sequence stand for how many tokens each; None where that is not known.

    Args:
        classes: of the image's survivors.
        start: position of the first of them.
        keys: number of all keys.
    """
    if classes is None:
        return None
    after = keys - start - sum(count for count, _ in classes)
    return tuple(part for part in ((start, 1), *classes, (after, 1)) if part[0])
