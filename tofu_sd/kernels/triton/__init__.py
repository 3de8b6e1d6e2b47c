"""Triton kernels of the expensive steps, with one or two launches each.

`reference` defines what they compute; `can_run` says where they run. Sums are float32 and deterministic.
"""

from .build_map import build_map as build_map
from .map_of_groups import map_of_groups as map_of_groups
from .merge import merge as merge
from .nearest import nearest_dst as nearest_dst
from .pairs import pair_up as pair_up
from .take import take as take
