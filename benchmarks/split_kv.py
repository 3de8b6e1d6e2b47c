"""Keys and values reduced differently, with queries by MLERP: which of the two decides what an average gains or loses.

`python -m eval.run --method benchmarks/split_kv.py:keys-pruned,benchmarks/split_kv.py:values-pruned`; the other one is
averaged. Not a setting of the library: one of the two would have to be reduced after its projection, at an extra cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

from torch import Tensor

import tofu_sd
from eval.methods.registry import register_method
from tofu_sd import recipes
from tofu_sd.core.reductions import Reduction, mean, prune
from tofu_sd.core.token_map import TokenMap
from tofu_sd.patching.block_state import BlockState
from tofu_sd.patching.patch import patch_of, states_of


@contextmanager
def split(pipe: Any, ratio: float, keys: Reduction, values: Reduction) -> Iterator[Any]:
    """Inside, queries are reduced by MLERP, keys and values by two other reductions, with log n on the keys."""
    unet = getattr(pipe, "unet", pipe)
    own: list[tuple[Any, str]] = []
    config = tofu_sd.TokenFusionConfig.of(recipes.ASYMMETRIC, ratio=ratio, min_tokens=0)  # the same on any machine
    with tofu_sd.patched(pipe, config):
        patch = patch_of(unet)
        assert patch is not None
        try:
            for name, state in states_of(patch).items():
                to_v = unet.get_submodule(f"{name}.attn1.to_v")
                reduce, project = _reduce_three(state, to_v.forward, keys, values)
                state.queries_and_keys, to_v.forward = reduce, project  # type: ignore[method-assign]
                own += [(state, "queries_and_keys"), (to_v, "forward")]
            yield pipe
        finally:
            for owner, attribute in own:
                delattr(owner, attribute)


def _reduce_three(
    state: BlockState, project: Callable[[Tensor], Tensor], keys: Reduction, values: Reduction
) -> tuple[Callable[[Tensor, TokenMap], tuple[Tensor, Tensor]], Callable[[Tensor], Tensor]]:
    """Returns (a block's reductions of queries and keys, its projection of values, which ignores the keys' tokens)."""
    waiting: list[Tensor] = []

    def reduce(x: Tensor, map: TokenMap) -> tuple[Tensor, Tensor]:
        waiting.append(values(x, map))
        return state.reduce(x, map), keys(x, map)

    def project_values(x: Tensor) -> Tensor:
        return project(waiting.pop() if waiting else x)

    return reduce, project_values


for _name, _reductions in (("keys-pruned", (prune, mean)), ("values-pruned", (mean, prune))):
    _apply = partial(split, keys=_reductions[0], values=_reductions[1])
    register_method(_name, takes_ratio=True)(update_wrapper(_apply, split))
