"""The two errors that a caller is meant to read."""

from __future__ import annotations

import re

_HIDDEN = "***"
_SECRETS = (
    # A password may wrongly hold a slash, which is why the second form reaches further than a valid URL's.
    re.compile(r"""(?<=://)(?:[^\s'"/?#]*|[^\s'"/@]*:[^\s'"]*)(?=@)"""),
    re.compile(r"""(?<![^\s'"])[^\s'"/:@]+:[^\s'"/@]+(?=@)"""),  # user:token@host, without a scheme
    re.compile(r"""(?<=\?)[\w.~%-]+=[^\s'"<>]*(?<![:,;.])"""),  # a query: signed URLs carry their key there
    re.compile(r"(?i)(?<=authorization)\b[^\n]*|(?<=\bbearer)\s[^\n]*"),
    re.compile(r"(?<=\bBasic )[A-Za-z0-9+/]{8,}=*"),
    re.compile(r"(?<=\bhf_)[A-Za-z0-9]{8,}"),
)


def redacted(text: str, *secrets: str | None) -> str:
    """`text` without `secrets` and without what looks like one: tokens, passwords and queries of URLs."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, _HIDDEN)
    for pattern in _SECRETS:
        text = pattern.sub(_HIDDEN, text)
    return text


class InputError(ValueError):
    """The caller's input can't be used. The message says what was given, what is accepted and what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint folder lacks something or holds something wrong. The message names the file or key.

    Messages may quote a URL or a transport's error, so every one is redacted.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))
