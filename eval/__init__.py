"""What token fusion costs and what it saves, against the full model: `python -m eval.run --help`."""


class EvalError(Exception):
    """Something that was asked for cannot be done. The message is one line for the user."""
