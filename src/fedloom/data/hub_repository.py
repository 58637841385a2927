"""Any data set on the Hugging Face hub, `data=hub:OWNER/NAME[:CONFIG]`: its parquet files, tables or images, at one revision.

Only data files are downloaded. Loading scripts are never run. The cache stores files by revision, which is the hash of a commit, so a run
with `data.revision` needs no network access after the first download.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

from fedloom.data.layouts import ClassNames
from fedloom.errors import DataError, first_line, suggest

PREFIX: Final = "hub:"
PICTURES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_TABLES: Final = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_LISTS: Final = ("metadata.csv", "metadata.jsonl")
_NAME = re.compile(r"hub:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository on the hub. If it contains several folders of files, `config` is the folder to read."""

    name: str
    config: str | None

    @property
    def shown(self) -> str:
        """The value of `data`."""
        return f"{PREFIX}{self.name}" + (f":{self.config}" if self.config else "")

    @property
    def mark(self) -> str:
        """The name of the file that indicates that all files have been downloaded. It contains the names of classes, as JSON."""
        return f".complete-{self.config}" if self.config else ".complete"

    @property
    def file_name(self) -> str:
        """The repository's name in the form used in file names."""
        return re.sub(r"[^a-z0-9.]+", "-", self.shown.lower())


def parsed_repository(name: str) -> Repository:
    """Return the repository that `hub:OWNER/NAME[:CONFIG]` names. Raise DataError if `name` has another form."""
    found = _NAME.fullmatch(name)
    if found is None or ".." in name:
        raise DataError(
            f"data={name}: must have the form hub:OWNER/NAME or hub:OWNER/NAME:CONFIG, such as hub:uoft-cs/cifar10"
        )
    return Repository(name=found["repository"], config=found["config"])


class Downloaded(NamedTuple):
    """The folder or file with the data, its revision, and the names of classes that the repository's card gives."""

    place: Path
    revision: str
    names: ClassNames


def repository_files(repository: Repository, revision: str | None, cache: Path) -> Downloaded:
    """Return where the data of a repository are. Files are downloaded unless they are in the cache.

    Raise DataError if the download fails, or if the repository contains no data files that can be read.
    """
    if revision is not None and not _COMMIT.fullmatch(revision):
        raise DataError(f"data.revision={revision}: must be the hash of a commit, 40 digits of 0-9 and a-f")
    home = cache / "hub" / repository.name.replace("/", "--")
    if revision is None or not (home / revision / repository.mark).exists():
        revision = _download(repository, revision, home)
    folder = home / revision
    return Downloaded(_place(repository, folder), revision, _known_names(folder / repository.mark))


def _known_names(mark: Path) -> ClassNames:
    """Return the names of classes in the mark of a download. Earlier versions wrote empty marks, for which there are no names."""
    try:
        content = json.loads(mark.read_text(encoding="utf-8") or "{}")
        return {str(column): tuple(map(str, names)) for column, names in content.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{mark}: is damaged ({first_line(error)}); remove its folder to download the data again"
        ) from None


def _card_names(card: Any, config: str | None) -> ClassNames:
    """Return the names of classes by column in the `dataset_info` of a repository's card. Return an empty dictionary if there are none.

    A column with classes is `{"name": COLUMN, "dtype": {"class_label": {"names": {"0": NAME, ...}}}}`.
    """
    try:
        infos = (card.to_dict() if hasattr(card, "to_dict") else card)["dataset_info"]
        infos = infos if isinstance(infos, list) else [infos]
        (info,) = [info for info in infos if config is None or info.get("config_name") == config]
        kinds = {str(feature["name"]): feature.get("dtype") for feature in info["features"]}
        named = {column: kind["class_label"]["names"] for column, kind in kinds.items() if isinstance(kind, dict)}
        return {
            column: tuple(str(names[key]) for key in sorted(names, key=int))
            if isinstance(names, dict)
            else tuple(map(str, names))
            for column, names in named.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _download(repository: Repository, revision: str | None, home: Path) -> str:
    """Download the data files of a revision (None means the newest revision), and return the revision."""
    try:
        from huggingface_hub import HfApi, snapshot_download

        info = HfApi().dataset_info(repository.name, revision=revision)
        sha, names = str(info.sha), [str(file.rfilename) for file in info.siblings or ()]
        if not _COMMIT.fullmatch(sha):
            raise DataError(
                f"data={repository.shown}: the hub returned the revision {sha!r}, which is not the hash of a commit"
            )
        folder = home / sha
        if not (folder / repository.mark).exists():
            wanted = _chosen(repository, names)
            partial = home / f"{sha}.part"
            snapshot_download(
                repo_id=repository.name, repo_type="dataset", revision=sha, allow_patterns=wanted, local_dir=partial
            )
            classes = _card_names(getattr(info, "card_data", None), repository.config)
            (partial / repository.mark).write_text(json.dumps(classes), encoding="utf-8")
            if folder.exists():  # from another configuration of this revision
                _merge(partial, folder)
            else:
                partial.replace(folder)
    except ImportError:
        raise DataError(f"data={repository.shown}: needs `pip install fedloom[hub]`") from None
    except DataError:
        raise
    except Exception as error:  # the hub's client raises many kinds of errors when offline
        kept = sorted(p.parent.name for p in home.glob(f"*/{repository.mark}") if not p.parent.name.endswith(".part"))
        hint = f"; downloaded are data.revision={', '.join(kept)}" if kept else ""
        raise DataError(f"data={repository.shown}: download failed ({first_line(error)}){hint}") from error
    return sha


def _merge(partial: Path, folder: Path) -> None:
    for file in sorted(path for path in partial.rglob("*") if path.is_file()):
        target = folder / file.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)


def _chosen(repository: Repository, names: Sequence[str]) -> list[str]:
    """Return the data files to download from the folder of the configuration: parquet files, else tables, else images."""
    kinds: tuple[tuple[str, ...], ...] = ((".parquet",), _TABLES, (*PICTURES, *_LISTS))
    files = [name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    for suffixes in kinds:
        found = [name for name in files if name.lower().endswith(suffixes)]
        if suffixes == _TABLES and all(PurePosixPath(name).name in _LISTS for name in found):
            continue
        if found:
            return _of_config(repository, found, is_table=suffixes != kinds[2])
    script = next((name for name in names if name.endswith(".py")), None)
    why = f"; its script {script} is not run" if script else ""
    raise DataError(
        f"data={repository.shown}: has no parquet files, tables or pictures{why}; download the data yourself (data.path)"
    )


def _of_config(repository: Repository, found: Sequence[str], *, is_table: bool) -> list[str]:
    config = repository.config
    folders = sorted({str(PurePosixPath(name).parent) for name in found}) if is_table else []
    if config:
        mine = [name for name in found if config in PurePosixPath(name).parts[:-1]]
        if not mine:
            raise DataError(f"data={repository.shown}: has no configuration '{config}'{suggest(config, folders)}")
        return mine
    if len(folders) > 1:
        raise DataError(
            f"data={repository.shown}: has several configurations ({', '.join(folders[:8])}); name one: {repository.shown}:{folders[-1]}"
        )
    return list(found)


def _place(repository: Repository, folder: Path) -> Path:
    """Return the folder with the data files, or the table if there is only one."""
    if repository.config:
        folders = [path for path in folder.rglob(repository.config) if path.is_dir()]
        folder = folders[0] if folders else folder
    tables = [file for file in sorted(folder.rglob("*")) if file.name.lower().endswith((*_TABLES, ".parquet"))]
    tables = [
        file
        for file in tables
        if file.name not in _LISTS and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    ]
    if not tables:
        return folder
    if len(tables) == 1 and not tables[0].name.startswith("train"):
        return tables[0]
    return tables[0].parent


def file_name_of(name: str) -> str:
    """Return the name of a data set in the form used in file names."""
    return parsed_repository(name).file_name if name.startswith(PREFIX) else name
