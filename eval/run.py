"""Evaluates methods: `python -m eval.run --method tofu`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .common.cli import command
from .evaluation.printed import run_and_print


@command(resumes=True)
def main(argv: Sequence[str]) -> int:
    """Runs an evaluation; the exit codes are those of `run_and_print`."""
    return run_and_print(argv)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
