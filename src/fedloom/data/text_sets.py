"""Data sets of texts: classification, regression or multi-label classification, and blocks of consecutive tokens (language)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom.data.dataset import Column, Dataset, validated
from fedloom.data.layouts import SPLIT_WORDS, Request, TextOptions, find_texts
from fedloom.data.preprocess import TokenInput
from fedloom.data.subset import choose_rows
from fedloom.data.text import BLOCK, END, TextCoder, kind_and_case, packed, stream, text_coder
from fedloom.errors import DataError
from fedloom.objectives import Classification, Language

log = logging.getLogger(__name__)

MOST_BYTES = 64 * 2**20  # maximum size of a text file
Texts = Sequence[Sequence[str]]


def coded_texts(
    texts: Texts, n_train: int, options: TextOptions, coder: TextCoder | None = None, name: str = ""
) -> tuple[Tensor, TokenInput]:
    """Return token ids (N, T), and a description of how texts become token ids.

    Without a `coder`, the vocabulary is that of the first `n_train` texts. `name` is the name of the input if there are other inputs.
    """
    if coder is None:
        tokens, case = kind_and_case(options, "words")
        train = [stream(parts, tokens, case) for parts in texts[:n_train]]
        coder = text_coder(train, options, default="words", length=options.length)
    return coder.stored(texts), _part(coder, name)


def _part(coder: TextCoder, name: str = "") -> TokenInput:
    return TokenInput(name=name, shape=(coder.length,), vocabulary=coder.size, text=coder)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents of a language task. `owners` are their owners, if known; `is_test` marks the official test documents."""

    texts: Texts
    owners: Sequence[str] | None
    is_test: npt.NDArray[np.bool_]


def language_set(
    name: str, documents: Documents, options: TextOptions, *, rows: int | None, coder: TextCoder | None = None
) -> Dataset:
    """Return blocks of T tokens and, as targets, the next token at every position.

    If `coder` is set, it contains the rules by which texts become ids, and `options` have no effect. The documents of an owner are joined
    by the token `end`, and cut into blocks of T + 1 tokens that do not overlap. Without official test documents, the last quarter of each
    owner's blocks is for testing. Without owners, no blocks are for testing. The owner is in the column `client`.
    """
    if coder is not None:
        options = TextOptions(text=coder.columns, tokens=coder.tokens, case=coder.case, length=coder.length)
    length = options.length or BLOCK
    blocks, owner_of, tests = _blocks(documents, options, length)
    order = np.concatenate([np.flatnonzero(~tests), np.flatnonzero(tests)])
    n_train = int((~tests).sum())
    if not n_train:
        raise DataError(f"data={name}: the training texts are too short for a block of two tokens")
    if coder is None:
        coder = text_coder([blocks[i] for i in order[:n_train]], options, default="bytes", length=length + 1)
        coder = coder.model_copy(update={"length": length})
    keep, n_train = choose_rows(name, np.ones(len(order), dtype=bool), n_train, rows)
    ids = [coder.numbered(blocks[i]) for i in order[keep]]
    columns: dict[str, Column] = {"client": np.array(owner_of)[order[keep]]} if documents.owners is not None else {}
    pool = Dataset.described(
        name=name,
        inputs=packed([row[:-1] for row in ids], length, coder.size),
        targets=_next_tokens(ids, length),
        n_train=n_train,
        objective=Language(vocabulary=coder.size),
        parts=(_part(coder),),
        columns=columns,
    )
    owned = f" of {len(set(columns['client'].tolist())):,} clients" if columns else ""
    log.warning(
        "%s: %s blocks of %d %s%s, train %s, test %s",
        name,
        f"{len(ids):,}",
        length,
        coder.tokens,
        owned,
        f"{n_train:,}",
        f"{len(ids) - n_train:,}",
    )
    return validated(pool)


def _blocks(
    documents: Documents, options: TextOptions, length: int
) -> tuple[list[list[str | int]], list[str], npt.NDArray[np.bool_]]:
    """Return blocks of at most `length` + 1 tokens, their owners, and whether they are for testing."""
    tokens, case = kind_and_case(options, "bytes")
    streams = dict[tuple[str, bool], list[str | int]]()
    owners = documents.owners or [""] * len(documents.texts)
    for parts, owner, is_test in zip(documents.texts, owners, documents.is_test.tolist(), strict=True):
        joined = streams.setdefault((owner, is_test), [])
        joined += [END] if joined else []
        joined += stream(parts, tokens, case)
    is_split = documents.owners is not None and not documents.is_test.any()
    found, owner_of, tests = list[list[str | int]](), list[str](), list[bool]()
    for (owner, is_test), text in streams.items():
        blocks = [text[k : k + length + 1] for k in range(0, len(text) - 1, length + 1)]
        n_test = max(1, len(blocks) // 4) if is_split and len(blocks) > 1 else 0
        found += blocks
        owner_of += [owner] * len(blocks)
        tests += [is_test or k >= len(blocks) - n_test for k in range(len(blocks))]
    return found, owner_of, np.array(tests, bool)


def _next_tokens(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    found = np.full((len(rows), length), -100, np.int64)
    for i, row in enumerate(rows):
        found[i, : len(row) - 1] = row[1:]
    return torch.from_numpy(found)


def read_text_folder(asked: Request, place: Path, options: TextOptions) -> Dataset:
    """Return the data set in text files (.txt): one file, or a folder with split folders and class folders or owner folders.

    For `data.task=language`, the upper folders are owners, or the files are if there are no folders. For other tasks, the folders are
    classes. Raise DataError if the layout matches neither, or if a file cannot be read.
    """
    files, coder = find_texts(place), asked.given.preprocess.coder if asked.given else None
    inner, is_test = _splits(place, files)
    if asked.task == "language":
        owners = None if len(files) == 1 else [parts[0] if len(parts) > 1 else Path(parts[0]).stem for parts in inner]
        return language_set(
            asked.name,
            Documents(texts=[(read_text(file),) for file in files], owners=owners, is_test=is_test),
            options,
            rows=asked.rows,
            coder=coder,
        )
    if asked.task not in (None, "classification"):
        raise DataError(
            f"data.task={asked.task}: {place} has folders of text; put the targets into a table, and set data.text"
        )
    if shallow := ["/".join(parts) for parts in inner if len(parts) < 2]:
        raise DataError(
            f"{place}: '{shallow[0]}' is not in a class folder (CLASS/FILE.txt); for blocks of text, set data.task=language"
        )
    order = np.concatenate([np.flatnonzero(~is_test), np.flatnonzero(is_test)])
    keep, n_train = choose_rows(asked.name, np.ones(len(order), dtype=bool), int((~is_test).sum()), asked.rows)
    chosen = order[keep].tolist()
    labels = [inner[i][0] for i in chosen]
    classes = tuple(sorted(set(labels)))
    ids, part = coded_texts([(read_text(files[i]),) for i in chosen], n_train, options, coder)
    places = {name: i for i, name in enumerate(classes)}
    pool = Dataset.described(
        name=asked.name,
        inputs=ids,
        targets=torch.tensor([places[label] for label in labels]),
        n_train=n_train,
        objective=Classification(names=classes),
        parts=(part,),
    )
    return tell(pool)


def tell(pool: Dataset) -> Dataset:
    """Log how the texts were interpreted."""
    part: Any = pool.parts[0]
    n_test = pool.n_rows - pool.n_train
    log.warning(
        "%s: %s texts as %d %s of %s different, %s, train %s%s",
        pool.name,
        f"{pool.n_rows:,}",
        part.text.length,
        part.text.tokens,
        f"{part.vocabulary:,}",
        f"{pool.n_classes} classes" if pool.objective.task == "classification" else pool.objective.task,
        f"{pool.n_train:,}",
        f", test {n_test:,}" if n_test else "",
    )
    return validated(pool)


def _splits(place: Path, files: Sequence[Path]) -> tuple[list[tuple[str, ...]], npt.NDArray[np.bool_]]:
    """Return the paths of the files relative to their split folders, and whether they are test files."""
    root = place if place.is_dir() else place.parent
    inner = [file.relative_to(root).parts for file in files]
    tops = {parts[0] if len(parts) > 1 else "" for parts in inner}
    named = {top for top in tops if top.lower() in SPLIT_WORDS}
    if not named or named != tops:
        return inner, np.zeros(len(files), dtype=bool)
    splits = [SPLIT_WORDS[parts[0].lower()] for parts in inner]
    if "train" not in splits:
        raise DataError(f"{place} has no training texts; add a folder 'train'")
    held = "test" if "test" in splits else "valid"
    return [parts[1:] for parts in inner], np.array([split == held for split in splits])


def read_text(file: Path) -> str:
    """Return the text in a file. Raise DataError if the file is too large or not UTF-8."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise DataError(f"{file} is larger than {MOST_BYTES // 2**20} MiB; divide it")
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text ({error})") from None
