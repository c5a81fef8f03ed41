"""The package's one logger."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("emu_cog")


def log_to_stderr() -> None:
    """Write the log to stderr, where a server's logs are read from. A second call changes nothing."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
