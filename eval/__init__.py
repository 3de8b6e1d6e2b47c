"""What token fusion costs and what it saves, against the full model: `python -m eval.run --help`."""

import tofu_sd  # first: it answers Ctrl-C while the modules below are imported, which takes seconds  # noqa: F401


class EvalError(Exception):
    """Something that was asked for cannot be done. The message is one line for the user."""
