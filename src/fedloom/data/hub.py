"""Find the parquet files of a data set in a given folder, `$FEDLOOM_DATA`, the cache, or the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fedloom.data.catalogue import SOURCES, Source
from fedloom.data.layouts import TEST_NAMES, find_idx, find_leaf, other_file
from fedloom.errors import DataError, first_line, suggest

_SHARD = re.compile(r"-(\d+)-of-(\d+)\b")


def cache_root(cache: str | Path | None = None) -> Path:
    """Return the cache folder: `cache` if set, else `$FEDLOOM_CACHE`, else `~/.cache/fedloom`."""
    return Path(cache or os.environ.get("FEDLOOM_CACHE") or "~/.cache/fedloom").expanduser()


def find_files(name: str, path: str | Path | None, cache: Path) -> tuple[list[Path], list[Path]]:
    """Return the training and test files of a data set. Download them if they are not on this machine.

    If `path` is set, only that folder is searched. Otherwise, `$FEDLOOM_DATA/<name>`, `<cache>/<name>` and the hub are searched in this
    order. Raise DataError if no files are found.
    """
    if path is not None:
        folder = Path(path).expanduser()
        if folder.is_file():
            raise DataError(
                f"data.path={path}: is a file, and data={name} is a known data set; use another name: data=mine"
            )
        if not folder.is_dir():
            raise DataError(f"data.path={path}: folder does not exist")
        if not (files := split_files(folder))[0]:
            own = "; nor train.csv, x.npy, folders of pictures, .txt files, IDX files or LEAF's train/*.json"
            known = f"; for your own files, use another name (data=mine), not data={name}"
            known += f"; for data={name}, {get}" if name in SOURCES and (get := SOURCES[name].get) else ""
            hint = known if name in SOURCES else own
            other = "" if name in SOURCES else other_file(folder)
            raise DataError(
                f"data.path={path}: has neither train.parquet nor train-00000-of-00001.parquet{hint}{other}"
            )
        return files
    if (found := local_folder(name, cache)) is not None:
        return split_files(found)
    source = SOURCES.get(name)
    if source is None:
        raise DataError(f"data={name}: unknown data set; {_place(name)}{suggest(name, SOURCES)}")
    return split_files(_download(name, source, cache / (source.folder or name), _folders(name, cache)[0]))


def _place(name: str) -> str:
    """Return advice for the name of an unknown data set, which may be the path of a file or folder."""
    if Path(name).exists():
        return f"for your own files, write data=mine data.path={name}"
    return "give its folder with data.path=FOLDER"


def local_folder(name: str, cache: Path) -> Path | None:
    """Return the folder in `$FEDLOOM_DATA` or the cache that contains the files of the data set, or None."""
    return next((folder for folder in _folders(name, cache) if folder.is_dir() and _has_files(name, folder)), None)


def _has_files(name: str, folder: Path) -> bool:
    """Return whether a folder contains files of the data set."""
    reads_others = name in SOURCES and SOURCES[name].reader and any(folder.iterdir())
    return bool(reads_others or split_files(folder)[0] or find_idx(folder) or find_leaf(folder))


def fetched(name: str, source: Source, cache: Path, path: str | Path | None) -> Path:
    """Download a data set that is not on this machine, and return its folder. Raise DataError if this is not possible."""
    if path is not None:
        what = "is a file; give its folder" if Path(path).expanduser().is_file() else "folder does not exist"
        raise DataError(f"data.path={path}: {what}")
    return _download(name, source, cache / (source.folder or name), _folders(name, cache)[0])


def _folders(name: str, cache: Path) -> list[Path]:
    return [root / alias for root in _roots(cache) for alias in _aliases(name, SOURCES.get(name))]


def split_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the training and test files of a folder: `train.parquet` or shards `train-*.parquet`, also one folder level below.

    Without a `test` split, the `valid` or `validation` split is the test set. Raise DataError if a shard is missing.
    """
    places = [place for place in (folder, *sorted(folder.iterdir())) if place.is_dir() and _shards(place, "train")]
    if len(places) > 1 and places[0] != folder:
        names = ", ".join(place.name for place in places)
        raise DataError(
            f"data.path={folder}: several of its folders have training files ({names}); set data.path to one of them"
        )
    if not places:
        return [], []
    tests = (_shards(places[0], split) for split in TEST_NAMES)
    return _shards(places[0], "train"), next((files for files in tests if files), [])


def _shards(folder: Path, split: str) -> list[Path]:
    whole = folder / f"{split}.parquet"
    if whole.is_file():
        return [whole]
    files = sorted(folder.glob(f"{split}-*.parquet"))
    expected = {int(found[2]) for file in files if (found := _SHARD.search(file.name))}
    if expected and expected != {len(files)}:
        raise DataError(
            f"{folder}: only {len(files)} of {max(expected)} files {split}-*.parquet were found; add the missing ones"
        )
    return files


def _roots(cache: Path) -> list[Path]:
    shared = os.environ.get("FEDLOOM_DATA")
    return [Path(shared).expanduser(), cache] if shared else [cache]


def _aliases(name: str, source: Source | None) -> list[str]:
    names = [name, source.folder] if source and source.folder else [name]
    return list(dict.fromkeys(alias for n in names if n for alias in (n, n.replace("-", "_"), n.replace("_", "-"))))


def _download(name: str, source: Source, target: Path, first: Path) -> Path:
    places = " or ".join(str(folder) for folder in dict.fromkeys((first, target)))
    wanted_files = source.get or "put train.parquet (and test.parquet)"
    advice = f"{wanted_files} into {places}, or give a folder with data.path=FOLDER"
    if source.hub is None:
        raise DataError(f"data={name}: not found, and it has no known hub repository; {advice}")
    partial = target.with_name(target.name + ".part")
    try:
        from huggingface_hub import snapshot_download

        # The folder gets its final name when it is complete. An interrupted download continues in the partial folder.
        wanted = [source.files] if source.files else []
        wanted = wanted or [f"{source.hub_folder}/{split}*.parquet" for split in ("train", *TEST_NAMES)]
        snapshot_download(repo_id=source.hub, repo_type="dataset", allow_patterns=wanted, local_dir=partial)
        if not (any(partial.glob(source.files)) if source.files else split_files(partial)[0]):
            raise DataError(f"data={name}: hub repository {source.hub} no longer has {wanted[0]}; {advice}")
        partial.replace(target)
    except ImportError:
        raise DataError(f"data={name}: not found; {advice}, or `pip install fedloom[hub]` to download it") from None
    except DataError:
        raise
    except Exception as error:  # the hub's client raises many kinds of errors when offline
        raise DataError(f"data={name}: download of {source.hub} failed ({first_line(error)}); {advice}") from error
    return target
