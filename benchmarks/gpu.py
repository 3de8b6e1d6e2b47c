"""All figures that wait for a GPU, in one command meant to end within nine minutes: `python -m benchmarks.gpu`.

Writes benchmarks/results/bench-cuda.json, for the tables of docs/performance.md, and proportional-cuda.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CASES = "sd15-512,sd15-768,sd15-1024,sdxl-1024,sdxl-2048"
METHODS = "tomesd,tome,tofu,tofu-fast,tofu+p,faithful,kv:tome+p"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--device", default="cuda")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--case", default=CASES)
    p.add_argument("--rounds", default="10")
    p.add_argument("--minutes", default="7", help="begin nothing new after so many")
    o = p.parse_args()
    on = ["--device", o.device, "--dtype", o.dtype]
    told = python(
        "benchmarks.proportional", *on, "--rounds", o.rounds, "--most", "20000" if o.device == "cuda" else "5000"
    )
    (RESULTS / f"proportional-{o.device}.md").write_text(told)
    python("eval.bench", *on, "--case", o.case, "--method", METHODS, "--compile", "no,default", "--rounds", o.rounds,
           "--minutes", o.minutes, "--out", str(RESULTS / f"bench-{o.device}.json"))  # fmt: skip


def python(module: str, *arguments: str) -> str:
    """What a module of this project prints."""
    run = [sys.executable, "-m", module, *arguments]
    return subprocess.run(run, cwd=RESULTS.parents[1], check=True, text=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    main()
