"""Find files by their layout: tables, arrays, IDX files and LEAF's JSON files. This module does not read the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedloom.errors import DataError

if TYPE_CHECKING:
    from fedloom.data.preprocess import Given

TEXT_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
ARRAYS = (".npz", ".npy")
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "valid", "valid": "valid", "dev": "valid", "val": "valid",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Names of splits in folders and columns, in upper or lower case, and the split that each name means."""
TEST_NAMES = ("test", "valid", "validation")
"""Names of test files, in order of preference."""

Files = tuple[list[Path], list[Path]]
"""Training files and test files."""
ClassNames = Mapping[str, tuple[str, ...]]
"""For each column of class numbers, the names of the classes 0, 1, ..."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Options for reading a table. See the settings `data.*` with the same names.

    `owner` is the column that names the owner of each example (`partition.column`). `by` is a column to keep for the partition
    (`partition.by`).
    """

    label: str | None = None
    columns: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    split: str | None = None
    missing: Literal["refuse", "drop", "fill"] = "refuse"
    missing_values: tuple[str, ...] = ()
    decimal: Literal[".", ","] | None = None
    encoding: str | None = None
    owner: str | None = None
    by: str | None = None


Tokens = Literal["words", "chars", "bytes", "basic-english"]
Case = Literal["lower", "keep"]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options for converting texts to tokens. See the settings `data.*` with the same names."""

    text: tuple[str, ...] = ()
    tokens: Tokens | None = None
    case: Case | None = None
    vocabulary: int | Path | None = None
    min_count: int | None = None
    length: int | None = None


NO_TEXT = TextOptions()


@dataclass(frozen=True, kw_only=True)
class Request:
    """A description of what to load; see `fedloom.data.load`. `names` contains the class names from the hub."""

    name: str
    image_size: int | None = None
    rows: int | None = None
    task: str | None = None
    owner: str | None = None
    features: bool = False
    table: TableOptions = TableOptions()
    texts: TextOptions = NO_TEXT
    names: ClassNames = field(default_factory=dict)
    given: Given | None = None
    cache: Path


def find_tables(place: Path) -> Files | None:
    """Return the files of a table: `place` itself, or train.csv and test.csv in a folder. Return None for other folders.

    `hub.split_files` finds parquet files in a folder.
    """
    if place.is_dir():
        found = _beside(place, "train")
        return (found, _tests(place)) if found else None
    known = (*TEXT_TABLES, ".parquet")
    if not place.name.lower().endswith(known):
        if place.is_file():
            raise DataError(f"data.path={place}: unknown kind of file; use {', '.join(known)}, .npz, .txt or a folder")
        return None
    _check_exists(place)
    whole = place.name.lower().startswith("train.")
    if place.suffix == ".parquet":
        test = place.with_name("test.parquet")
        return [place], [test] if whole and test.is_file() else []
    return [place], _tests(place.parent) if whole else []


def find_arrays(place: Path) -> Path | None:
    """Return an .npz file, or a folder with x.npy and y.npy. Return None if `place` is neither."""
    if place.is_dir():
        return place if (place / "x.npy").is_file() else None
    if place.suffix.lower() == ".npz":
        _check_exists(place)
        return place
    if place.suffix.lower() == ".npy":
        raise DataError(
            f"data.path={place}: one array is not enough; give a folder with x.npy and y.npy, or an .npz file"
        )
    return None


def find_idx(folder: Path, prefix: str = "") -> list[Path]:
    """Return the IDX files of images in a folder whose names start with `prefix`."""
    return sorted(file for file in folder.glob(f"{prefix}*idx3-ubyte*") if file.suffix in ("", ".gz", ".idx3-ubyte"))


def find_leaf(folder: Path) -> dict[str, list[Path]]:
    """Return LEAF's JSON files by split (`train` and `test`, or `all_data`), or nothing if the folder has another layout."""
    for root in (folder, folder / "data"):
        found = {name: sorted((root / name).glob("*.json")) for name in ("train", "test", "all_data")}
        if found["train"]:
            return {name: found[name] for name in ("train", "test") if found[name]}
        if found["all_data"]:
            return {"train": found["all_data"]}
    return {}


def find_texts(place: Path) -> list[Path]:
    """Return `place` if it is a .txt file, or the sorted .txt files below a folder if they are more than half of its files.

    Hidden files and folders are ignored.
    """
    if place.is_file():
        return [place] if place.suffix.lower() == ".txt" else []
    found, n_others = list[Path](), 0
    for file in place.rglob("*") if place.is_dir() else ():
        if file.is_file() and not any(p.startswith((".", "__MACOSX")) for p in file.relative_to(place).parts):
            found += [file] if file.suffix.lower() == ".txt" else []
            n_others += file.suffix.lower() != ".txt"
    return sorted(found) if len(found) > n_others else []


def other_file(folder: Path) -> str:
    """Return a hint for a message that names a file in a folder that can be read by itself, or "" if there is none."""
    known = (*TEXT_TABLES, ".parquet", ".npz")
    found = next((file for file in sorted(folder.iterdir()) if file.name.lower().endswith(known)), None)
    return f"; to read {found.name}, set data.path={found}" if found else ""


def _check_exists(place: Path) -> None:
    if not place.is_file():
        raise DataError(f"data.path={place}: file does not exist")


def _tests(folder: Path) -> list[Path]:
    return next((found for name in TEST_NAMES if (found := _beside(folder, name))), [])


def _beside(folder: Path, stem: str) -> list[Path]:
    """Return the table in text form for a split in a folder, if there is one. Raise DataError if there are several."""
    found = [folder / (stem + suffix) for suffix in TEXT_TABLES if (folder / (stem + suffix)).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} has both {found[0].name} and {found[1].name}; remove one of them")
    return found
