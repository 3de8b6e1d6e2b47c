"""All figures that wait for a GPU, in one command: `python -m benchmarks.gpu`, about six minutes on an H200.

Writes benchmarks/results/bench-cuda*.json, which docs/performance.md speaks of, and proportional-cuda.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
METHODS = "tomesd,tofu,tofu-fast,faithful,kv:tome+p,tofu-max,deepcache,deepcache:tofu-fast"
RUNS = {  # what is asked for in each, and after how many minutes nothing new is begun
    "bench-cuda.json": ["--case", "sd15-512,sd15-1024,sdxl-1024,sdxl-2048", "--method", METHODS, "--minutes", "3"],
    "bench-cuda-batch.json": ["--case", "sd15-512", "--batch", "16", "--method", METHODS, "--minutes", "1"],
    "bench-cuda-graphs.json": ["--case", "sd15-512,sd15-1024", "--scope", "attention", "--compile", "reduce-overhead",
                               "--method", "tofu,tofu-fast,faithful", "--minutes", "2"],
}  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--rounds", default="10")
    o = p.parse_args()
    on = ["--device", "cuda", "--dtype", o.dtype, "--rounds", o.rounds]
    for name, asked in RUNS.items():
        python("eval.bench", *on, *asked, "--out", str(RESULTS / name))
    (RESULTS / "proportional-cuda.md").write_text(python("benchmarks.proportional", *on))


def python(module: str, *arguments: str) -> str:
    """What a module of this project prints."""
    run = [sys.executable, "-m", module, *arguments]
    return subprocess.run(run, cwd=RESULTS.parents[1], check=True, text=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    main()
