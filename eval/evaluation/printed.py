"""Runs an evaluation from the arguments of a command line and prints its results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from rich.console import Console

from ..common.files import to_json
from ..reporting import tables
from .execute import run
from .options import parse
from .plan import RunResult


def run_and_print(argv: Sequence[str]) -> int:
    """Runs an evaluation and prints its table.

    Returns:
        0, or 1 under --strict if something was skipped, or images are flat or NaN.

    Raises:
        EvalError: options that cannot be fulfilled.
        KeyboardInterrupt: after Ctrl-C; the table of what was complete is then printed.
    """
    options = parse(argv)
    # whatever a library prints must not end up between the results
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        result = run(options, argv)
    if options.json:
        _print_json(result)
    elif result.results:
        tables.terminal(result.results, Console(width=None if sys.stdout.isatty() else 120))
    elif result.planned:
        print("\n".join(tables.planned(result.planned)))
    if result.results:
        print(f"report: {result.out / 'report.html'}", file=sys.stderr)
    if result.interrupted:
        raise KeyboardInterrupt
    if result.sample_hint and (result.results or result.planned):
        print(result.sample_hint, file=sys.stderr)
    return int(options.strict and result.incomplete)


def _print_json(result: RunResult) -> None:
    stage = None if result.num_generated is None else {"out": str(result.out), "generated": result.num_generated}
    content = result.results or result.planned or stage
    print(to_json(content) if content else "", end="")
