"""Repositories on the hub: the files that are downloaded, the revision, and configurations."""

import sys
from types import SimpleNamespace

import pytest

from fedloom.config.settings import make_settings
from fedloom.data import TableOptions, TextOptions, load
from fedloom.data.hub_repository import file_name_of
from fedloom.errors import DataError
from fedloom.experiment.build import make_dataset, resolved

SHA, OLD = "a" * 40, "b" * 40
CSV = "age,smokes,label\n31,yes,a\n25,no,b\n44,yes,a\n27,no,b\n"


@pytest.fixture
def repository(monkeypatch):
    """Return a hub with one repository: a function that sets its files (content, or a function that writes), and the list of downloads."""
    files, downloads, card = {}, [], {}

    class HfApi:
        def dataset_info(self, name, *, revision):
            if not files:
                raise ConnectionError("no route\nto the hub")
            siblings = [SimpleNamespace(rfilename=file) for file in files]
            return SimpleNamespace(sha=revision or SHA, siblings=siblings, card_data=card)

    def snapshot_download(*, repo_id, repo_type, revision, allow_patterns, local_dir):
        downloads.append((repo_id, repo_type, revision, tuple(allow_patterns)))
        for name in allow_patterns:
            file = local_dir / name
            file.parent.mkdir(parents=True, exist_ok=True)
            content = files[name]
            content(file) if callable(content) else file.write_text(content)

    module = SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return SimpleNamespace(files=files, downloads=downloads, card=card)


def test_the_revision_is_kept_and_needs_no_network_again(repository):
    repository.files |= {"people.csv": CSV, "README.md": "# people", "load.py": "raise SystemExit"}
    pool = load("hub:Some_Owner/People")
    assert (pool.name, pool.revision, pool.n_rows, pool.classes) == ("hub-some-owner-people", SHA, 4, ("a", "b"))
    assert repository.downloads == [("Some_Owner/People", "dataset", SHA, ("people.csv",))]
    repository.files.clear()  # offline
    assert load("hub:Some_Owner/People", revision=SHA).n_rows == 4
    with pytest.raises(DataError, match=rf"download failed \(no route\); downloaded are data\.revision={SHA}"):
        load("hub:Some_Owner/People")
    with pytest.raises(DataError, match="download failed"):
        load("hub:Some_Owner/People", revision=OLD)


def test_a_run_writes_the_revision_into_its_settings(repository):
    repository.files["people.csv"] = CSV
    settings = make_settings(
        {"data": {"name": "hub:o/people", "label": "smokes", "columns": "age"}, "partition": {"name": "iid"}}
    )
    found = resolved(settings, make_dataset(settings))
    assert found.data.revision == SHA
    assert resolved(found, make_dataset(found)) == found
    assert file_name_of("hub:o/people:b") == "hub-o-people-b"
    assert file_name_of("digits") == "digits"


def test_parquet_images_pictures_and_text(repository, write_parquet, grey):
    from PIL import Image

    def parquet(file):
        write_parquet(file, grey(4), [0, 1, 0, 1])

    repository.files |= {
        "data/train-00000-of-00001.parquet": parquet,
        "data/test-00000-of-00001.parquet": parquet,
        "x.csv": CSV,
    }
    assert (load("hub:o/images").n_train, load("hub:o/images").n_rows) == (4, 8)
    assert repository.downloads[0][3] == ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")
    repository.files.clear()
    for name in ("train/cat/1.png", "train/dog/1.png", "test/dog/2.png"):
        repository.files[name] = lambda file: Image.fromarray(grey(1)[0]).save(file)
    pool = load("hub:o/pictures")
    assert (pool.n_train, pool.n_rows, pool.classes) == (2, 3, ("cat", "dog"))


NUMBERED = "text,label\n" + "".join(f"{word} news,{i % 2}\n" for i, word in enumerate("abcdef"))


def info(*names, config="default"):
    """Return a card's description of a column of classes."""
    kind = {"class_label": {"names": {str(i): name for i, name in enumerate(names)}}}
    features = [{"name": "text", "dtype": "string"}, {"name": "label", "dtype": kind}]
    return {"config_name": config, "features": features}


@pytest.mark.parametrize("is_list", [False, True])
def test_classes_of_a_table_have_the_names_of_the_card(repository, is_list):
    repository.files["news.csv"] = NUMBERED
    repository.card["dataset_info"] = [info("World", "Sports")] if is_list else info("World", "Sports")
    options = {"table": TableOptions(label="label"), "texts": TextOptions(text=("text",), tokens="chars")}
    pool = load("hub:o/news", **options)
    assert (pool.classes, pool.labels.tolist()) == (("World", "Sports"), [0, 1] * 3)
    repository.files.clear()  # offline
    assert load("hub:o/news", revision=SHA, **options).classes == ("World", "Sports")


def test_classes_of_a_configuration_and_of_parquet_files(repository, write_parquet, grey):
    repository.files |= {"a/train.csv": NUMBERED, "b/train.csv": NUMBERED}
    repository.card["dataset_info"] = [info("x", "y", config="a"), info("y", "z", config="b")]
    texts = TextOptions(text=("text",), tokens="chars")
    assert [load(f"hub:o/news:{c}", texts=texts).classes for c in "ab"] == [("x", "y"), ("y", "z")]
    repository.files.clear()
    repository.card["dataset_info"] = info("cat", "dog")
    repository.files["train.parquet"] = lambda file: write_parquet(file, grey(2), [1, 0])
    assert load("hub:o/pictures").classes == ("cat", "dog")


@pytest.mark.parametrize(
    "card", [{}, {"dataset_info": 3}, {"dataset_info": {"features": [{"x": 1}]}}, {"dataset_info": info()}]
)
def test_cards_without_names_leave_the_numbers(repository, card):
    repository.files["news.csv"] = NUMBERED
    repository.card.update(card)
    assert load("hub:o/news", texts=TextOptions(text=("text",), tokens="chars")).classes == ("0", "1")


def test_configurations_are_folders(repository):
    repository.files |= {"b/train.csv": CSV, "b/test.csv": CSV, "a/train.csv": CSV.replace("label", "kind")}
    with pytest.raises(DataError, match=r"has several configurations \(a, b\); name one: hub:o/two:b"):
        load("hub:o/two")
    with pytest.raises(DataError, match="has no configuration 'c'"):
        load("hub:o/two:c")
    assert load("hub:o/two:b").n_rows == 8
    assert load("hub:o/two:a", table=TableOptions(label="kind")).n_rows == 4  # the same revision
    assert load("hub:o/two:b", revision=SHA).n_rows == 8
    assert len(repository.downloads) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hub:o/people", {"features": True}, "data.features=true: applies only to data=har, not to data=hub:o/people"),
        ("hub:people", {}, "must have the form hub:OWNER/NAME"),
        ("hub:o/../x", {}, "must have the form"),
        ("hub:o/n:../x", {}, "must have the form"),
        ("hub:o/n", {"revision": "main"}, r"data\.revision=main: must be the hash of a commit"),
        ("hub:o/n", {"path": "x"}, r"data\.path=x: data=hub:o/n is downloaded from the hub"),
        ("digits", {"revision": SHA}, "applies only to data=hub:OWNER/NAME"),
        ("hub:o/script", {}, r"has no parquet files, tables or pictures; its script script\.py is not run"),
    ],
)
def test_refusals(repository, name, options, message):
    repository.files |= {"script.py": "x", "README.md": "y"}
    with pytest.raises(DataError, match=message):
        load(name, **options)


def test_without_the_extra_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"pip install fedloom\[hub\]"):
        load("hub:o/n")
