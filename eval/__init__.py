"""Speed and quality of token fusion against the baseline: `python -m eval.run --help`."""

import tofu_sd  # first: it handles Ctrl-C while the modules below are imported, which takes seconds  # noqa: F401


class EvalError(Exception):
    """Options or files that cannot be used. The message is one line for the user."""
