"""Milliseconds of each step of fusing one 64 x 64 x 320 map of two samples, the size of Stable Diffusion 1.5 at 512 px.

`python -m benchmarks.steps [THREADS]`; `PYTHONPATH=CHECKOUT python benchmarks/steps.py` times another checkout.
"""

import sys
import time

import torch

from tofu_sd.core.matching import bipartite_soft_matching
from tofu_sd.core.partition import partition
from tofu_sd.core.reductions import mean, mlerp, prune, unmerge

torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
x = torch.randn(2, 4096, 320, generator=torch.Generator().manual_seed(0))
channels_first = x.mT.contiguous().mT  # as a block's input lies in memory
parts = partition(64, 64, 2, 2, x.device)
map = bipartite_soft_matching(x, parts, 2048)
fused = prune(x, map)
steps = {
    "matching": lambda: bipartite_soft_matching(x, parts, 2048),
    "matching, channels first": lambda: bipartite_soft_matching(channels_first, parts, 2048),
    "prune": lambda: prune(x, map),
    "mean": lambda: mean(x, map),
    "mlerp": lambda: mlerp(x, map),
    "unmerge": lambda: unmerge(fused, map),
}
times = {name: [] for name in steps}
with torch.no_grad():
    for turn in range(22):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn > 1:
                times[name].append(1000 * (time.perf_counter() - began))
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of 20")
for name, each in times.items():
    print(f"{name:26} {sorted(each)[10]:6.2f} ms")
