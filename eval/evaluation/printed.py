"""Runs an evaluation from the arguments of a command line and prints its results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from rich.console import Console

from ..common.files import to_json
from ..reporting import tables as table
from .execute import run
from .options import parse


def run_and_print(argv: Sequence[str]) -> int:
    """Runs the job. 0 if it is done, 2 if something that was asked for cannot be, 130 if it was interrupted.

    1 under --strict if something was skipped, or a picture is none.
    """
    options = parse(argv)
    # whatever a library prints must not end up between the results
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        outcome = run(options, argv)
    stage = None if outcome.drawn is None else {"out": str(outcome.out), "drawn": outcome.drawn}
    told = outcome.found or outcome.planned or stage
    if options.json:
        print(to_json(told) if told else "", end="")
    elif outcome.found:
        table.terminal(outcome.found, Console(width=None if sys.stdout.isatty() else 120))
    elif outcome.planned:
        print("\n".join(table.planned(outcome.planned)))
    if outcome.found:
        print(f"report: {outcome.out / 'report.html'}", file=sys.stderr)
    return int(options.strict and outcome.lacking)
