"""Text to ids and back with a checkpoint's own tokenizer files; a user's text can never become a special token."""

from __future__ import annotations

import base64
import binascii
import unicodedata
from pathlib import Path

import tiktoken

from emu_cog.errors import CheckpointError
from emu_cog.prompt.tokens import EXTRA_COUNT, ROLES, TokenIds

RANKS_FILE = "emu3.tiktoken"
VISION_FILE = "emu3_vision_tokens.txt"
FILES = ((RANKS_FILE, VISION_FILE), ("unis.tiktoken", "unis_vision_tokens.txt"))
"""The two files under Emu3's names, and under Xiaomi-Robotics-U0's: in the two public repositories they are the same,
byte by byte."""
# How text is cut before byte-pair merging; from upstream's tokenization_emu3.py. Every digit stands alone.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_VISUAL_0 = "<|visual token 000000|>"


class Tokenizer:
    """A checkpoint's vocabulary: byte-pair text tokens, then special tokens, then visual tokens.

    `ids` holds the roles. The special tokens follow the byte-pair ranks without a gap, as in upstream's
    tokenizer: `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, `<|extra_0|>`..`<|extra_204|>`, then the lines
    of `emu3_vision_tokens.txt`.
    """

    def __init__(self, ranks: dict[bytes, int], vision_tokens: list[str]) -> None:
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        names += [f"<|extra_{i}|>" for i in range(EXTRA_COUNT)] + vision_tokens
        first = len(ranks)
        if sorted(ranks.values()) != list(range(first)):
            raise CheckpointError(f"{RANKS_FILE}: the ranks must run from 0 to {first - 1} without a gap")
        self._special = {name: first + i for i, name in enumerate(names)}
        self._bytes = {rank: token for token, rank in ranks.items()} | {i: n.encode() for n, i in self._special.items()}
        # Without special tokens: what a user types is always split and merged as plain text.
        self._encoding = tiktoken.Encoding("emu3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
        self.ids = self._token_ids(ranks, vision_tokens)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `emu3.tiktoken` and `emu3_vision_tokens.txt` from `folder`, or U0's two files; CheckpointError names
        what is wrong."""
        ranks, vision = file_names(folder)
        return cls(_read_ranks(folder / ranks), _read_vision_tokens(folder / vision))

    def _token_ids(self, ranks: dict[bytes, int], vision_tokens: list[str]) -> TokenIds:
        missing = [name for name in (*ROLES.values(), _VISUAL_0) if name not in self._special]
        missing += [c for c in "0123456789*" if c.encode() not in ranks]
        if missing:
            raise CheckpointError(f"the tokenizer files lack the token(s) {', '.join(missing[:5])}")
        visual = self._special[_VISUAL_0]
        count = _numbered(vision_tokens[vision_tokens.index(_VISUAL_0) :])
        if visual + count != max(self._special.values()) + 1:
            raise CheckpointError(f"{VISION_FILE}: the visual tokens must be numbered without a gap and come last")
        roles = {role: self._special[name] for role, name in ROLES.items()}
        digits = tuple(ranks[d.encode()] for d in "0123456789")
        return TokenIds(**roles, visual=visual, visual_count=count, digits=digits, star=ranks[b"*"])

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, NFC-normalised. `<|extra_204|>` and the like are plain characters here."""
        return self._encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token; a special token gives its written form, as upstream's decode does."""
        return self._bytes[token]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")


def file_names(folder: Path) -> tuple[str, str]:
    """The pair of FILES that `folder` holds; where it holds neither, the first."""
    return next((pair for pair in FILES if any((folder / name).exists() for name in pair)), FILES[0])


def _numbered(names: list[str]) -> int:
    """How many of `names` run `<|visual token 000000|>`, `<|visual token 000001|>` ... from the first on."""
    return next((i for i, name in enumerate(names) if name != f"<|visual token {i:06d}|>"), len(names))


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a checkpoint folder holds its tokenizer's {RANKS_FILE}") from None
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path} is damaged ({error}): each line must be a base64 token and its rank") from None


def _read_vision_tokens(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a checkpoint folder holds its tokenizer's {VISION_FILE}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged ({error}): it must be UTF-8 text, one token a line") from None
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path} is damaged: it names a token twice")
    return names
