"""Parquet files of encoded pictures, in the layout of the Hugging Face hub, decoded once to uint8."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fedloom.data import cache
from fedloom.data.catalogue import Source
from fedloom.data.dataset import Column, Dataset, checked
from fedloom.errors import DataError, suggest
from fedloom.rng import Stream

Pixels = npt.NDArray[np.uint8]
_LABELS = ("label", "labels", "fine_label", "coarse_label", "character", "class", "target", "y")
_FORMAT = 2  # part of the cache key: count it up when decoding changes


class Layout(NamedTuple):
    """Which columns of the files mean what. `names` are class names from the hub's metadata, by column."""

    image: str
    label: str
    extra: tuple[str, ...]
    names: dict[str, list[str]]


def read(
    name: str,
    files: tuple[list[Path], list[Path]],
    source: Source | None,
    *,
    image_size: int | None,
    rows: int | None,
    cache_root: Path,
) -> Dataset:
    """The pool that training and test files hold; the second time it comes decoded from the cache. Raises DataError."""
    train, test = files
    key = _key(name, train + test, image_size, rows, source)
    stored = cache.load(cache_root, name, key)
    if stored is not None:
        return stored
    pool = _decode_pool(name, train, test, source, image_size, rows)
    cache.save(cache_root, key, checked(pool))
    return pool


def _decode_pool(
    name: str, train: list[Path], test: list[Path], source: Source | None, image_size: int | None, rows: int | None
) -> Dataset:
    layout = _layout(train[0], source)
    facts = [_facts(file, layout) for file in train + test]
    try:
        table = pa.concat_tables(facts, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"data={name}: the files' columns do not agree ({_line(error)})") from error
    if not table.num_rows:
        raise DataError(f"data={name}: {train[0]} has no rows")
    n_train = sum(_open(file).metadata.num_rows for file in train)
    labels, classes = _classes(name, table[layout.label], layout.names.get(layout.label), source)
    keep, n_train = choose_rows(name, labels >= 0, n_train, rows)
    encoded = _encoded(train + test, layout.image, keep)
    return Dataset(
        name=name,
        images=torch.from_numpy(decode(encoded, int(keep.sum()), image_size)),
        labels=torch.from_numpy(labels[keep]),
        n_train=n_train,
        classes=classes,
        columns={c: _column(table[c], layout.names.get(c))[keep] for c in layout.extra},
    )


def choose_rows(
    name: str, known: npt.NDArray[np.bool_], n_train: int, rows: int | None
) -> tuple[npt.NDArray[np.bool_], int]:
    """Which rows stay, and how many of them are training rows: all test rows, and `rows` training rows (None: all).

    The training rows are the first `rows` of one fixed permutation of them, from `Stream("rows", name)`, without
    regard to class; so a smaller choice lies within every larger one. They keep their order in the files.
    """
    candidates = np.flatnonzero(known[:n_train])
    if rows is None:
        return known, len(candidates)
    if not 0 < rows <= len(candidates):
        raise DataError(f"data.rows={rows}: '{name}' has {len(candidates)} training rows; allowed is 1 to that number")
    keep = known.copy()
    keep[:n_train] = False
    keep[candidates[Stream("rows", name).numpy.permutation(len(candidates))[:rows]]] = True
    return keep, rows


def decode(pictures: Iterable[tuple[str, bytes | None]], n: int, image_size: int | None) -> Pixels:
    """`n` encoded pictures, each with words for where it is, as (N, C, H, W) uint8; grey C = 1 unless one has colour.

    Without `image_size` all must have one size; with it they are resized (bilinear) to that edge. Raises DataError.
    """
    out: Pixels = np.empty((0, 0, 0, 0), np.uint8)
    for i, (where, pixels) in enumerate(_decoded(pictures, image_size)):
        if i == 0:
            out = np.empty((n, *pixels.shape), np.uint8)
        if pixels.shape[1:] != out.shape[2:]:
            sizes = f"{_edges(out.shape)} and, in {where}, {_edges(pixels.shape)}"
            raise DataError(f"pictures differ in size ({sizes}): choose one with data.image_size=N")
        if len(pixels) > out.shape[1]:
            out = np.repeat(out, 3, axis=1)
        out[i] = pixels
    if len(out) == 0:
        raise DataError("there are no pictures to read")
    return out


def _decoded(pictures: Iterable[tuple[str, bytes | None]], image_size: int | None) -> Iterator[tuple[str, Pixels]]:
    decode_one, rest = partial(_pixels, image_size), iter(pictures)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(rest, 1024)):
            # Threads gain from large pictures only: for small ones handing them over costs more than decoding.
            is_large = sum(len(encoded or b"") for _, encoded in chunk) > 16_384 * len(chunk)
            yield from zip(
                (where for where, _ in chunk), (pool.map if is_large else map)(decode_one, chunk), strict=True
            )


def resized(image: Image.Image, image_size: int | None) -> Pixels:
    """One picture as (C, H, W) uint8, resized to a square when `image_size` is given. Raises DataError."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older Pillow gives PNG as I
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would cut it off at 255
    if image.mode in ("I", "F"):
        raise DataError("its pixels are numbers of 32 bits; save pictures with 8 or 16 bits")
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _pixels(image_size: int | None, picture: tuple[str, bytes | None]) -> Pixels:
    where, encoded = picture
    try:
        with Image.open(io.BytesIO(encoded or b"")) as image:
            return resized(image, image_size)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a picture that Pillow can read ({type(error).__name__})") from error


def _edges(shape: Sequence[int]) -> str:
    return f"{shape[-2]}x{shape[-1]}"


def _open(file: Path) -> pq.ParquetFile:
    with _reading(file):
        return pq.ParquetFile(file)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a parquet file that can be read ({_line(error)})") from error


def _line(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _key(name: str, files: list[Path], image_size: int | None, rows: int | None, source: Source | None) -> str:
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([_FORMAT, name, [str(files[0].parent), *facts], image_size, rows, repr(source)])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _layout(file: Path, source: Source | None) -> Layout:
    schema = _open(file).schema_arrow
    pictures = [field.name for field in schema if _is_picture(field.type)]
    if not pictures:
        raise DataError(f"{file}: no column of pictures (binary, or a struct with 'bytes'); it has {schema.names}")
    image = next((c for c in ("image", "img") if c in pictures), pictures[0])
    wanted = (source.label, *_LABELS) if source else _LABELS
    label = next((c for c in wanted if c in schema.names), None)
    if label is None:
        raise DataError(f"{file}: no label column; allowed names are {', '.join(_LABELS)}; it has {schema.names}")
    extra = tuple(f.name for f in schema if f.name not in (image, label) and _is_plain(f.type))
    return Layout(image, label, extra, _hub_names(schema))


def _is_picture(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_plain(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
        pa.types.is_string,
        pa.types.is_large_string,
    )
    return any(test(kind) for test in tests)


def _hub_names(schema: Any) -> dict[str, list[str]]:
    """Class names by column, from the metadata that the `datasets` library writes into the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {c: [str(n) for n in f["names"]] for c, f in features.items() if isinstance(f, dict) and f.get("names")}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _facts(file: Path, layout: Layout) -> Any:
    missing = {layout.image, layout.label, *layout.extra} - set((parquet := _open(file)).schema_arrow.names)
    if missing:
        raise DataError(f"{file}: column '{min(missing)}' is missing, though the first training file has it")
    with _reading(file):
        return parquet.read(columns=[layout.label, *layout.extra]).replace_schema_metadata(None)


def _column(values: Any, names: list[str] | None) -> Column:
    values = values.combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.null_count and pa.types.is_string(values.type):
        values = values.fill_null("")
    column: Column = values.to_numpy(zero_copy_only=False)
    if (
        names
        and np.issubdtype(column.dtype, np.integer)
        and len(column)
        and 0 <= column.min() <= column.max() < len(names)
    ):
        return np.asarray(names)[column]
    return column.astype(np.str_) if column.dtype == object else column


def _classes(
    name: str, values: Any, names: list[str] | None, source: Source | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels 0 .. Y-1 (-1: a class that is not wanted) and the names of the Y classes."""
    if values.null_count:
        raise DataError(f"data={name}: {values.null_count} rows have no label")
    column = _column(values, None)
    classes: tuple[str, ...]
    if np.issubdtype(column.dtype, np.integer):
        labels = column.astype(np.int64)
        expected = _expected(labels, names, source)
        if expected is None:
            found, labels = np.unique(labels, return_inverse=True)
            expected = tuple(str(value) for value in found)
        classes = expected
    elif column.dtype.kind == "U":
        found, labels = np.unique(column, return_inverse=True)
        classes = tuple(str(value) for value in found)
    else:
        raise DataError(f"data={name}: labels of type {column.dtype}; allowed are integers and strings")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(
            f"data={name}: labels run from {labels.min()} to {labels.max()}, allowed is 0 to {len(classes) - 1}"
        )
    return _only(name, labels.astype(np.int64), classes, source.only if source else None)


def _expected(labels: npt.NDArray[np.int64], names: list[str] | None, source: Source | None) -> tuple[str, ...] | None:
    """What integer labels 0 .. Y-1 are called, if that is known."""
    if names:
        return tuple(names)
    if source is None:
        return None
    if source.only:  # files without names that hold no more than the wanted classes hold just those
        return source.only if labels.max() < len(source.only) else None
    return source.classes or tuple(str(c) for c in range(source.n_classes))


def _only(
    name: str, labels: npt.NDArray[np.int64], classes: tuple[str, ...], only: tuple[str, ...] | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if only is None:
        return labels, classes
    for wanted in only:
        if wanted not in classes:
            raise DataError(f"data={name}: the files know no class '{wanted}'{suggest(wanted, classes)}")
    places = np.full(len(classes), -1, np.int64)
    places[[classes.index(wanted) for wanted in only]] = np.arange(len(only))
    return places[labels], only


def _encoded(files: list[Path], image: str, keep: npt.NDArray[np.bool_]) -> Iterator[tuple[str, bytes | None]]:
    """The kept pictures in order, read batch by batch: a data set may be larger than memory before it is resized."""
    start = 0
    for file in files:
        batches = _open(file).iter_batches(1024, columns=[image])
        while True:
            with _reading(file):
                batch = next(batches, None)
            if batch is None:
                break
            cells = batch.column(0)
            cells = cells.field("bytes") if pa.types.is_struct(cells.type) else cells
            for i in np.flatnonzero(keep[start : start + len(cells)]):
                yield f"{file.name}, row {start + i} of the pool", cells[int(i)].as_py()
            start += len(cells)
