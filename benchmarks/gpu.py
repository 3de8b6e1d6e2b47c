"""All figures that wait for a GPU, in one command: `python -m benchmarks.gpu`, at most nine minutes.

Writes benchmarks/results/bench-cuda*.json, which docs/performance.md speaks of, proportional-cuda.md, and
kernels-cuda.txt: whether the kernels agree with their definition.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

START = time.monotonic()
RESULTS = Path(__file__).parent / "results"
CASES = "sd15-512,sd15-1024,sdxl-1024,sdxl-2048"
# asymmetric with groups of any size, of two sizes, of one size; keys and values only, in the same three ways
ATTENTION = (
    "tomesd,tofu,tofu-fast,faithful,asymmetric,asymmetric@matching=pairs@ratio=0.25,asymmetric@matching=pairs,"
    "kv:tome+p,kv:tome+p@matching=pairs@ratio=0.25,kv:tome@matching=pairs,kv:tome@matching=cells@ratio=0.75"
)
# the order in which they are wanted, as a minute may not suffice for all
TRANSFORMERS = (
    "sd3-medium-1024,flux1-1024,sd3-medium-2048,flux1-2048,sd3.5-medium-2048,qwen-image-2048,z-image-2048,"
    "pixart-sigma-2048,sd3.5-large-2048,sd3.5-medium-1024,qwen-image-1024,z-image-1024,pixart-sigma-1024,"
    "sd3.5-large-1024"
)
BLOCK = "tofu+p,tome+p@window=8,kv:tome+p@matching=cells@ratio=0.75,tome+p@matching=pairs"
STEP = "tofu,asymmetric,asymmetric@matching=pairs,deepcache,deepcache:asymmetric"
GRAPHS = "tofu,tofu-fast,faithful,asymmetric,asymmetric@matching=pairs"
RUNS = {  # what is asked for in each, and after how many minutes nothing new is begun: seven in all
    "bench-cuda-attention.json": ["--scope", "attention", "--case", CASES, "--method", ATTENTION, "--minutes", "2"],
    "bench-cuda-batch.json": ["--scope", "attention", "--case", CASES, "--batch", "16", "--method", ATTENTION,
                              "--minutes", "1"],
    "bench-cuda-transformers.json": ["--scope", "block", "--case", TRANSFORMERS, "--batch", "1", "--method", BLOCK,
                                     "--minutes", "1"],
    "bench-cuda-graphs.json": ["--scope", "attention", "--case", "sd15-512,sdxl-1024", "--compile", "reduce-overhead",
                               "--method", GRAPHS, "--minutes", "1"],
    "bench-cuda.json": ["--scope", "unet", "--case", CASES, "--method", STEP, "--minutes", "1"],
    "bench-cuda-default.json": ["--scope", "unet", "--case", CASES, "--method", "tofu@min_tokens=auto",
                                "--minutes", "1"],
}  # fmt: skip
LIMIT = 540  # seconds of all runs; one that is not done by then is ended, and its file stays as it was
CHECKS = ["tests/patching/test_cuda.py", "tests/core/test_kernels_triton.py"]


def main() -> int:
    """Returns 0, or 1 if anything failed. Each run is tried, whatever happened to the others."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--device", default="cuda", help="cpu to try the commands")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--rounds", default="10")
    p.add_argument("--out", type=Path, default=RESULTS)
    o = p.parse_args()
    on = ["--device", o.device, "--dtype", o.dtype, "--rounds", o.rounds]
    checked = python("pytest", "-q", *CHECKS)
    (o.out / "kernels-cuda.txt").write_text(checked.stdout)
    done = [checked]
    for name, asked in RUNS.items():
        done.append(python("eval.bench", *on, *asked, "--out", str(o.out / name)))
    done.append(python("benchmarks.proportional", *on))
    if not done[-1].returncode:  # else the earlier table stays
        (o.out / "proportional-cuda.md").write_text(done[-1].stdout)
    failed = [run for run in done if run.returncode]
    for run in failed:
        print(f"failed with {run.returncode}: {' '.join(run.args[1:])}", file=sys.stderr)
    return 1 if failed else 0


def python(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a module at the root of the checkout, until LIMIT seconds after the start of this program."""
    left = max(1, LIMIT - round(time.monotonic() - START))
    run = ["timeout", str(left), sys.executable, "-m", module, *arguments]
    return subprocess.run(run, cwd=RESULTS.parents[1], check=False, text=True, stdout=subprocess.PIPE)


if __name__ == "__main__":
    sys.exit(main())
