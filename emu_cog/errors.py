"""The two errors that a caller is meant to read."""

from __future__ import annotations


class InputError(ValueError):
    """The caller's input can't be used. The message says what was given, what is accepted and what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint folder lacks something or holds something wrong. The message names the file or key."""
