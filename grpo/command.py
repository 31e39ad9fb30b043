"""A command of the package: absl flags, positional arguments, and mistakes told in one line."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

# What a user can mend; anything else is a bug of ours and keeps its traceback.
_EXPECTED = (ValueError, TypeError, OSError, FloatingPointError)


def run(
    command: Callable[..., None],
    *positional: str,
    usage: str,
    expected: tuple[type[BaseException], ...] = _EXPECTED,
) -> None:
    """Parses the command line and calls `command` with the values of the positional arguments.

    Flags must be defined before.

    Args:
      command: reads its flags itself.
      positional: names of the arguments, for messages.
      usage: what --help and mistakes show.
      expected: errors that are told in one line.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(f"error: {error}\n{usage}")

    def start(argv: Sequence[str]) -> None:
        values = argv[1:]
        if len(values) != len(positional):
            given = " ".join(values) or "nothing"
            sys.exit(f"error: expected {' '.join(positional)}, got {given}\n{usage}")
        verbose = flags.FLAGS.verbosity > 0
        if flags.FLAGS.verbosity == 0:  # what app.run makes of the default
            logging.set_verbosity(logging.WARNING)
        try:
            command(*values)
        except expected as error:
            if verbose:
                raise
            sys.exit(f"error: {error}\n(--verbosity=1 shows where it was raised)")

    app.run(start, flags_parser=parse)
