"""Load a data set: embedded data, the user's own files, PFLlib's files, or a download from the hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from fedloom import lazy
from fedloom.data import hub, hub_repository, layouts, pfllib
from fedloom.data.catalogue import SOURCES, Source
from fedloom.data.dataset import Dataset
from fedloom.data.layouts import NO_TEXT, Request, TableOptions, TextOptions
from fedloom.data.preprocess import Given, PictureInput, array_part
from fedloom.errors import DataError


def load(
    name: str,
    path: str | Path | None = None,
    *,
    image_size: int | None = None,
    rows: int | None = None,
    task: str | None = None,
    owner: str | None = None,
    features: bool = False,
    revision: str | None = None,
    table: TableOptions | None = None,
    texts: TextOptions | None = None,
    given: Given | None = None,
    cache: str | Path | None = None,
) -> Dataset:
    """Return a data set as one pool of examples.

    Args:
        name: a name in `SOURCES`, "pfllib", "hub:OWNER/NAME[:CONFIG]" (see `hub_repository`), or any name for the user's own
            files; `-` and `_` are equivalent.
        path: a folder with `train.parquet` and, optionally, `test.parquet` (or the hub's `train-00000-of-00002.parquet` ...); a table
            (.csv, .tsv, also .gz, or .parquet) or a folder with `train.csv` and `test.csv`; an .npz file or a folder with `x.npy` and
            `y.npy`; a folder of images (see `picture_folders`), of IDX files or of LEAF's JSON files. By default, `$FEDLOOM_DATA`,
            the cache and the hub (extra `fedloom[hub]`) are searched in this order.
        image_size: the width and height in pixels to which images are resized.
        rows: number of training examples to keep. They are the first ones of a fixed permutation, `Stream("rows", name)`, which
            ignores classes. Their order in the files is kept, and all test examples are kept.
        task: the learning task of the user's own files. By default, it is derived from the label column of a table, and is
            classification otherwise. Other data sets have their own task.
        owner: with "folder", the upper folders of a folder of images are domains, which become the column `domain`.
        features: for `har`, load the published features instead of the signals.
        revision: for `hub:OWNER/NAME`, the commit of the files; default: the newest one.
        table: options for reading a table.
        texts: options for reading texts.
        given: an existing description of inputs and targets. It replaces the options that it determines.
        cache: folder for decoded images; default: `$FEDLOOM_CACHE`, else `~/.cache/fedloom`.

    Raises:
        DataError: a value is invalid, or the data are missing or malformed.
    """
    if image_size is not None and not 1 <= image_size <= 1024:
        raise DataError(f"data.image_size={image_size}: must be from 1 to 1024 (pixels)")
    if features and name.lower() != "har":
        raise DataError(f"data.features=true: applies only to data=har, not to data={name}")
    asked = Request(
        name=name,
        image_size=image_size,
        rows=rows,
        task=task,
        owner=owner,
        features=features,
        table=table or TableOptions(),
        texts=texts or NO_TEXT,
        given=given,
        cache=hub.cache_root(cache),
    )
    if given is not None:
        asked = _answered(asked, given)
    if not name.startswith(hub_repository.PREFIX):
        if revision is not None:
            raise DataError(f"data.revision={revision}: applies only to data=hub:OWNER/NAME; remove it")
        return _loaded(asked, path)
    if path is not None:
        raise DataError(
            f"data.path={path}: data={name} is downloaded from the hub; remove data.path, or use another name"
        )
    repository = hub_repository.parsed_repository(name)
    found = hub_repository.repository_files(repository, revision, asked.cache)
    asked = replace(asked, name=repository.file_name, names=found.names)
    return replace(_loaded(asked, found.place), revision=found.revision)


def _answered(asked: Request, given: Given) -> Request:
    """Return the request with the image size of `given`. Raise DataError if an option is set that `given` determines."""
    plain = {key: value for key, value in vars(asked.texts).items() if value not in (None, ())}
    options = {"image_size": asked.image_size, "task": asked.task, **plain}
    usual = TableOptions()
    options |= {
        key: value
        for key, value in vars(asked.table).items()
        if key not in ("owner", "by", "split", "drop") and value not in (getattr(usual, key), "drop")
    }
    if key := next((key for key, value in options.items() if value is not None), None):
        value = options[key]
        shown = ",".join(value) if isinstance(value, tuple) else value
        raise DataError(f"data.{key}={shown}: {given.where} says how the data are read; remove data.{key}")
    first = given.preprocess.inputs[0]
    size = first.shape[1] if isinstance(first, PictureInput) and first.resize else None
    return replace(asked, image_size=size)


def _loaded(asked: Request, path: str | Path | None) -> Dataset:
    """Return the data set that `load` describes, unless its name refers to a repository on the hub."""
    found = _read(asked, path)
    if asked.given is None:
        return found
    from fedloom.data.raw_targets import conformed

    return conformed(found, asked.given)


def _read(asked: Request, path: str | Path | None) -> Dataset:
    typed, name = asked.name, asked.name.lower().replace("_", "-")
    if not re.fullmatch(r"\w[\w.-]*", name):  # the name becomes part of file names
        own = f"; for your own files, write data=mine data.path={typed}" if Path(typed).exists() else ""
        raise DataError(f"data={typed}: a name may contain only letters, digits, '-', '_' and '.'{own}")
    asked, source = replace(asked, name=name), SOURCES.get(name)
    known = source is not None or name == "pfllib"
    if asked.given and not known:
        asked = replace(asked, task=asked.given.preprocess.objective.task)
    if known and asked.task not in (None, usual := source.task if source else "classification"):
        raise DataError(f"data.task={asked.task}: data={name} is a {usual} data set; remove data.task")
    if known or path is None:
        _refuse_owner(name, asked.owner)
    if known and asked.texts != NO_TEXT:
        _check_source_texts(name, source, asked.texts)
    if name == "pfllib":
        _refuse_options(name, asked.table)
        if path is None or asked.image_size is not None or asked.rows is not None:
            raise DataError("data=pfllib: needs data.path=FOLDER, and does not support data.image_size or data.rows")
        return pfllib.load_pfllib(path)
    if source and source.embedded and path is None:
        _refuse_options(name, asked.table)
        from fedloom.data import embedded

        return _resized(embedded.load_embedded(name, asked.image_size, asked.rows), asked.image_size)
    _check_texts(asked, path)
    if source is not None:
        found = _named(asked, source, path)
    else:
        found = _own_files(asked, Path(path).expanduser()) if path else _files(asked, path)
    return _resized(found, asked.image_size)


def _resized(pool: Dataset, image_size: int | None) -> Dataset:
    """Return the data set with a record that images of other sizes are resized."""
    return (
        pool if image_size is None else replace(pool, parts=tuple(array_part(f, resize=True) for f in pool.spec.fields))
    )


def _named(asked: Request, source: Source, path: str | Path | None) -> Dataset:
    """Return a known data set, from files in any layout in which it is published."""
    place = hub.local_folder(asked.name, asked.cache) if path is None else Path(path).expanduser()
    if place is not None and (layouts.find_idx(place) or layouts.find_leaf(place)):
        return _special(asked, place)
    if source.reader:
        _refuse_options(asked.name, None, asked.image_size)
        if not source.is_table:
            _refuse_options(asked.name, asked.table)
        if place is None or not place.is_dir():
            place = hub.fetched(asked.name, source, asked.cache, path)
        return lazy.resolve(source.reader)(asked, place)  # type: ignore[no-any-return]
    return _files(asked, path)


def _own_files(asked: Request, place: Path) -> Dataset:
    """Return the data set in the user's own file or folder, according to its layout."""
    if (arrays := layouts.find_arrays(place)) is not None:
        _refuse_options(asked.name, asked.table, asked.image_size)
        _refuse_text_columns(asked, place)
        from fedloom.data import array_files

        _refuse_owner(asked.name, asked.owner)
        return array_files.read_arrays(asked.name, arrays, task=asked.task, rows=asked.rows)
    if layouts.find_idx(place) or layouts.find_leaf(place):
        return _special(asked, place)
    if layouts.find_texts(place) and not place.is_dir():
        return _text_files(asked, place)
    tables = layouts.find_tables(place)
    if tables is None and layouts.find_texts(place) and not hub.split_files(place)[0]:
        return _text_files(asked, place)
    if tables is None:
        from fedloom.data import picture_folders  # Pillow is slow to import

        if picture_folders.is_picture_folder(place):
            return _pictures(asked, place)
    _refuse_owner(asked.name, asked.owner)
    return _files(asked, place, tables)


def _special(asked: Request, place: Path) -> Dataset:
    """Return the data set in a folder of LEAF's JSON files or of IDX files."""
    from fedloom.data import idx, leaf

    _refuse_text_columns(asked, place)
    is_idx = bool(layouts.find_idx(place))
    _refuse_options(asked.name, asked.table, asked.image_size if is_idx else None)
    _refuse_owner(asked.name, asked.owner)
    if asked.task not in (None, "classification"):
        raise DataError(f"data.task={asked.task}: {place} has classes; remove data.task")
    source = SOURCES.get(asked.name)
    classes = source.classes if source else None
    if is_idx:
        return idx.read_idx_folder(asked, place, source.files if source else "", classes)
    column = source.natural if source and source.natural else "client"
    return leaf.read_leaf(asked, place, classes=classes, column=column)


def _text_files(asked: Request, place: Path) -> Dataset:
    """Return the data set in text files."""
    from fedloom.data.text_sets import read_text_folder

    _refuse_options(asked.name, asked.table, asked.image_size)
    _refuse_owner(asked.name, asked.owner)
    _refuse_text_columns(asked, place)
    return read_text_folder(asked, place, asked.texts)


def _check_texts(asked: Request, path: str | Path | None) -> None:
    """Raise DataError if an option for texts is set, but the user's own data contain no texts."""
    if asked.texts == NO_TEXT or asked.name in SOURCES or asked.texts.text:
        return
    place = Path(path).expanduser() if path else None
    if not (place and (layouts.find_texts(place) or layouts.find_leaf(place))):
        raise DataError(
            f"{_first(asked.texts)}: applies to texts; set data.text=COLUMN for a table, or give text files (.txt)"
        )


def _check_source_texts(name: str, source: Source | None, texts: TextOptions) -> None:
    """Raise DataError if an option for texts is set that a known data set does not support."""
    if texts.text or source is None or not source.is_text:
        raise DataError(f"{_first(texts)}: does not apply to data={name}; remove it")


def _refuse_text_columns(asked: Request, place: Path) -> None:
    """Raise DataError if `data.text` is set, but the files are not a table."""
    if asked.texts.text:
        raise DataError(f"{_first(asked.texts)}: {place} is no table with columns of text; remove it")


def _first(texts: TextOptions) -> str:
    key, value = next((k, v) for k, v in vars(texts).items() if v not in (None, ()))
    return f"data.{key}={','.join(value) if isinstance(value, tuple) else value}"


def _pictures(asked: Request, place: Path) -> Dataset:
    """Return the data set in a folder of images."""
    from fedloom.data.picture_folders import read_pictures

    _refuse_text_columns(asked, place)
    _refuse_options(asked.name, asked.table)
    _refuse_texts(asked.task)
    return read_pictures(
        asked.name,
        place,
        where=f"data.path={place}",
        image_size=asked.image_size,
        cache_root=asked.cache,
        rows=asked.rows,
        task=asked.task or "classification",
        owner=asked.owner,
        needs_every_class=asked.given is None,
    )


def _refuse_owner(name: str, owner: str | None) -> None:
    """Raise DataError if `data.owner` is set, but the files are not a folder of images."""
    if owner is not None:
        raise DataError(
            f"data.owner={owner}: data={name} is not a folder of pictures of your own (data=mine data.path=FOLDER)"
        )


def _refuse_texts(task: str | None) -> None:
    """Raise DataError for task=language, which files of images do not support."""
    if task == "language":
        raise DataError("data.task=language: needs texts; set data.text=COLUMN for a table, or give text files (.txt)")


def _files(asked: Request, path: str | Path | None, files: layouts.Files | None = None) -> Dataset:
    """Return the data set in files of tables or images; default: the parquet files that `hub.find_files` finds."""
    name, source = asked.name, SOURCES.get(asked.name)
    files = files or hub.find_files(name, path, asked.cache)
    from fedloom.data import parquet  # pyarrow is slow to import

    if source or (files[0][0].suffix == ".parquet" and parquet.has_pictures(files[0][0])):
        _refuse_options(name, asked.table)
        _refuse_text_columns(asked, files[0][0])
        _refuse_texts(asked.task)
        return parquet.read_parquet(
            name,
            files,
            source,
            image_size=asked.image_size,
            rows=asked.rows,
            cache_root=asked.cache,
            task=asked.task or "classification",
            names=asked.names,
        )
    _refuse_options(name, None, asked.image_size)
    if asked.given is not None:
        from fedloom.data.described import described_table

        return described_table(asked, asked.given, files)
    from fedloom.data import tables  # pandas is slow to import

    return tables.read_table(
        name, files, asked.table, task=asked.task, rows=asked.rows, texts=asked.texts, names=asked.names
    )


def _refuse_options(name: str, table: TableOptions | None, image_size: int | None = None) -> None:
    """Raise DataError for options that the data set does not support."""
    if image_size is not None:
        raise DataError(f"data.image_size={image_size}: data={name} has no image files; remove it")
    for key, value in (vars(table) if table else {}).items():
        if key not in ("owner", "by") and value != getattr(TableOptions(), key):
            shown = ",".join(value) if isinstance(value, tuple) else value
            raise DataError(f"data.{key}={shown}: applies only to tables (.csv, .tsv, .parquet), not to data={name}")
