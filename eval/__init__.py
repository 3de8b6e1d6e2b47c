"""What token fusion costs and what it saves, against the full model: `python -m eval.run --help`."""

from . import interrupts


class EvalError(Exception):
    """Something that was asked for cannot be done. The message is one line for the user."""


if interrupts.is_command():  # before the modules that take seconds to import
    interrupts.guard()
