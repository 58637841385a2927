"""Texts as token ids of words, characters or bytes, with a vocabulary from training texts or from a file. Nothing is downloaded.

Ids 0 to 3 are special: padding, unknown, start and end. A text that is too long is cut off at its end; a text that is too short is padded
with 0.
"""

from __future__ import annotations

import functools
import html
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedloom.data.layouts import Case, TextOptions, Tokens
from fedloom.errors import DataError

log = logging.getLogger(__name__)

PADDING, UNKNOWN, START, END = range(4)
N_SPECIAL: Final = 4
VOCABULARY: Final = 10_000
LONGEST: Final = 256
BLOCK: Final = 80
"""Default number of tokens in a block of a language task."""

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[^\w\s]|_")
_SPACED = re.compile(r"(['.,()!?])")
_BLANKS = re.compile(r"<br />|[;:]")
Token = Annotated[str, Field(min_length=1, max_length=10_000)]


class TextCoder(BaseModel):
    """The conversion of texts to token ids.

    Attributes:
        columns: the table columns that contain the texts, which the token `end` joins; empty for texts that are not in a table.
        tokens: the kind of tokens.
        case: whether letters are converted to lower case.
        words: the words or characters with ids from 4; empty for bytes.
        length: number T of token ids of a text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    columns: tuple[Annotated[str, Field(max_length=1_000_000)], ...] = ()
    tokens: Tokens
    case: Case
    words: Annotated[tuple[Token, ...], Field(max_length=10_000_000)] = ()
    length: Annotated[int, Field(ge=1, le=1_000_000)]

    @property
    def size(self) -> int:
        """The number V of different ids."""
        return N_SPECIAL + (256 if self.tokens == "bytes" else len(self.words))

    def stored(self, texts: Iterable[Sequence[str]]) -> Tensor:
        """Return token ids (N, T). A text is a sequence of parts, which the token `end` joins."""
        return packed([self.ids(parts) for parts in texts], self.length, self.size)

    def ids(self, parts: Sequence[str]) -> list[int]:
        """Return the ids of a text, of any length. An empty text has one unknown token."""
        return self.numbered(stream(parts, self.tokens, self.case)) or [UNKNOWN]

    def numbered(self, tokens: Sequence[str | int]) -> list[int]:
        """Return the ids of tokens. Numbers are already ids."""
        places = self._places
        return [token if isinstance(token, int) else places.get(token, UNKNOWN) for token in tokens]

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text for token ids from 4, as the continuation of another text."""
        if self.tokens == "bytes":
            return bytes(i - N_SPECIAL for i in ids).decode("utf-8", "replace")
        words = [self.words[i - N_SPECIAL] for i in ids]
        return "".join(words) if self.tokens == "chars" else "".join(f" {word}" for word in words)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, start=N_SPECIAL)}


def stream(parts: Sequence[str], tokens: Tokens, case: Case) -> list[str | int]:
    """Return the tokens of a text, with the id `end` between its parts. Bytes are represented by their ids."""
    found = list[str | int]()
    for k, part in enumerate(parts):
        found += [END] if k else []
        if tokens == "bytes":
            found += [N_SPECIAL + byte for byte in _cased(part, case).encode("utf-8", "replace")]
        else:
            found += tokens_of(part, tokens, case)
    return found


def packed(rows: Sequence[Sequence[int]], length: int, size: int) -> Tensor:
    """Return rows of ids as one tensor (N, length), cut off at the end or padded with 0, in the smallest type for ids below `size`."""
    found = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        kept = row[:length]
        found[i, : len(kept)] = kept
    small = next(t for t in (torch.uint8, torch.int16, torch.int32) if size - 1 <= torch.iinfo(t).max)
    return torch.from_numpy(found).to(small)


def tokens_of(text: str, tokens: Tokens, case: Case) -> list[str]:
    """Return the words or characters of a text.

    With "words", a token is a sequence of letters (with apostrophes), a sequence of digits, or one other character. "basic-english"
    follows the rules of the torchtext tokenizer with this name.
    """
    if tokens == "chars":
        return list(_cased(text, case))
    if tokens == "basic-english":
        text = _SPACED.sub(r" \1 ", _BLANKS.sub(" ", _cased(text, case).replace('"', "")))
        return text.split()
    return _WORD.findall(_cased(unicodedata.normalize("NFKC", html.unescape(text)), case))


def _cased(text: str, case: Case) -> str:
    """Return the text, in lower case if requested, without the marks that lower-casing separates from letters."""
    if case == "keep":
        return text
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(c for c in lower if unicodedata.category(c) != "Mn")


def kind_and_case(options: TextOptions, default: Tokens) -> tuple[Tokens, Case]:
    """Return the kind of tokens, and whether letters are converted to lower case."""
    tokens = options.tokens or default
    return tokens, options.case or ("lower" if tokens in ("words", "basic-english") else "keep")


def text_coder(
    train: Sequence[Sequence[str | int]], options: TextOptions, *, default: Tokens, length: int | None
) -> TextCoder:
    """Return the coder for texts, with a vocabulary from training texts unless a file is given.

    Args:
        train: the tokens of the training texts (see `stream`).
        options: see `TextOptions`.
        default: the kind of tokens if none is set.
        length: number of ids of a text; None means the 95th percentile of the lengths of the training texts, but at most 256.

    Raises:
        DataError: an option does not apply to the kind of tokens, or the vocabulary file is malformed.
    """
    tokens, case = kind_and_case(options, default)
    words: tuple[str, ...] = ()
    if tokens == "bytes":
        for key in ("vocabulary", "min_count"):
            if getattr(options, key) is not None:
                raise DataError(f"data.{key}={getattr(options, key)}: data.tokens=bytes has 256 tokens; remove it")
    elif isinstance(options.vocabulary, Path):
        if options.min_count is not None:
            raise DataError(f"data.min_count={options.min_count}: does not apply to a vocabulary in a file; remove it")
        words = _read_words(options.vocabulary)
    else:
        words = _vocabulary(train, tokens, options)
        log.warning(
            "data.tokens=%s: the vocabulary of %s tokens is built from the training texts of all clients, so it can reveal words that only "
            "one client wrote; to avoid this, set data.vocabulary=FILE or data.tokens=bytes",
            tokens,
            f"{len(words):,}",
        )
    lengths = np.array([len(text) for text in train] or [1])
    chosen = length or int(min(max(np.ceil(np.percentile(lengths, 95)), 1), LONGEST))
    if n_cut := int((lengths > chosen).sum()):
        log.warning("data.length=%d: %s training texts are longer and are truncated", chosen, f"{n_cut:,}")
    return TextCoder(columns=options.text, tokens=tokens, case=case, words=words, length=chosen)


def _vocabulary(split: Sequence[Sequence[str | int]], tokens: Tokens, options: TextOptions) -> tuple[str, ...]:
    """Return words sorted by frequency, or characters sorted by code point."""
    most = options.vocabulary if isinstance(options.vocabulary, int) else VOCABULARY
    if most <= N_SPECIAL:
        raise DataError(f"data.vocabulary={most}: must be above {N_SPECIAL}, the number of special tokens")
    counts = Counter(token for part in split for token in part if isinstance(token, str))
    least = options.min_count or (1 if tokens == "chars" else 2)
    kept = sorted((token for token, n in counts.items() if n >= least), key=lambda token: (-counts[token], token))
    kept = kept[: most - N_SPECIAL]
    if not kept:
        raise DataError(
            f"data.min_count={least}: no token occurs that often in the training texts; set data.min_count=1"
        )
    return tuple(sorted(kept) if tokens == "chars" else kept)


def _read_words(file: Path) -> tuple[str, ...]:
    """Return the words in a file, one per line."""
    try:
        words = [line.strip() for line in file.expanduser().read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.vocabulary={file}: cannot be read as UTF-8 text ({error})") from None
    words = [word for word in words if word]
    if not words or len(set(words)) < len(words):
        twice = next((word for word, n in Counter(words).items() if n > 1), None)
        raise DataError(f"data.vocabulary={file}: " + (f"has '{twice}' twice; remove one" if twice else "has no words"))
    return tuple(words)
