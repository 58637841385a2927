"""Folders of images: class folders, split folders, metadata files, domain folders, and the cache."""

import json
import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fedloom.config.settings import Settings
from fedloom.data import from_arrays, load, partition
from fedloom.data.preprocess import Given
from fedloom.deploy import rows as on_devices
from fedloom.errors import DataError


def picture(number, size=4):
    """Return an image that `number` identifies."""
    return Image.fromarray(np.full((size, size), number, np.uint8))


@pytest.fixture
def write(tmp_path):
    """Return a function that writes numbered images to paths below a folder, and text to the paths of text files."""

    def write(*paths, root="pictures", **texts):
        place = tmp_path / root
        for number, path in enumerate(paths):
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(place / path)
        for name, text in texts.items():
            place.mkdir(exist_ok=True)
            (place / name.replace("__", "/").replace("_", ".")).write_text(text, encoding="utf-8")
        return place

    return write


def numbers(pool):
    return pool.images[:, 0, 0, 0].tolist()


def labels(pool):
    return [pool.classes[i] for i in pool.labels]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_class_folders_are_walked_in_sorted_order(write, said):
    pool = load("mine", write("dog/b.png", "cat/z.PNG", "cat/a.bmp", "dog/a.gif", "emu/1.tiff"))
    assert (pool.name, pool.n_train, pool.classes) == ("mine", 5, ("cat", "dog", "emu"))
    assert (numbers(pool), labels(pool)) == ([2, 1, 3, 0, 4], ["cat", "cat", "dog", "dog", "emu"])
    assert said() == ["mine: 5 pictures in 3 classes"]


def test_the_order_does_not_depend_on_the_order_on_disk(write):
    paths = [f"{c}/{i}.png" for c in "ba" for i in (3, 10, 1)]
    pools = [load("mine", write(*order, root=r)) for order, r in ((paths, "a"), (paths[::-1], "b"))]
    assert numbers(pools[0]) == [5, 4, 3, 2, 1, 0]
    assert [5 - n for n in numbers(pools[1])] == numbers(pools[0])


def test_folders_below_the_classes_are_walked_and_said(write, said):
    pool = load("mine", write("cat/home/1.png", "cat/away/1.png", "dog/home/1.png"))
    assert (numbers(pool), labels(pool)) == ([1, 0, 2], ["cat", "cat", "dog"])
    assert said() == [
        "mine: 3 pictures in 2 classes; folders below the classes are ignored (domains need data.owner=folder)"
    ]


def test_hidden_files_and_other_files_are_skipped(write, said):
    place = write("cat/1.png", "cat/.2.png", ".trash/3.png", "__MACOSX/cat/4.png", "dog/5.png")
    (place / "cat/Thumbs.db").write_bytes(b"thumbs")
    (place / "cat/notes.txt").write_text("notes")
    (place / "empty").mkdir()
    assert numbers(load("mine", place)) == [0, 4]
    assert said() == ["mine: 2 pictures in 2 classes; no pictures in empty"]


def test_links_are_followed(write):
    place, other = write("cat/1.png"), write("1.png", "2.png", root="elsewhere")
    (place / "dog").symlink_to(other)
    assert labels(load("mine", place)) == ["cat", "dog", "dog"]
    (place / "dog/loop").symlink_to(place)
    with pytest.raises(DataError, match="is a link to a folder that contains it"):
        load("mine", place)


@pytest.mark.parametrize("train", ["train", "training", "Train"])
@pytest.mark.parametrize("test", ["test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"])
def test_the_words_for_splits(write, said, train, test):
    pool = load("mine", write(f"{test}/cat/1.png", f"{train}/dog/1.png", f"{train}/cat/1.png"))
    assert (pool.n_train, numbers(pool), labels(pool)) == (2, [2, 1, 0], ["cat", "dog", "cat"])
    assert said() == ["mine: 3 pictures in 2 classes, train 2, test 1"]


def test_validation_pictures_are_not_used_beside_a_test_split(write, said):
    pool = load("mine", write("train/cat/1.png", "val/cat/1.png", "val/emu/2.png", "test/cat/1.png"))
    assert (pool.n_train, numbers(pool), pool.classes) == (1, [0, 3], ("cat",))
    assert said() == ["mine: 2 pictures in 1 class, train 1, test 1; validation 2 not used"]


def test_a_class_may_be_called_like_a_split(write, said):
    assert load("mine", write("train/1.png", "plane/1.png")).classes == ("plane", "train")
    assert said() == ["mine: 2 pictures in 2 classes; 'train' is a class, not a split"]


def test_test_pictures_that_are_also_training_pictures_are_counted(write, said):
    place = write("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png")
    for name in ("5.bmp", "6.png"):
        picture(1).save(place / "test/cat" / name)
    notice = "mine: 2 test pictures with the same pixels as a training picture"
    load("mine", place)
    assert said()[1:] == [notice]
    load("mine", place)
    assert said()[3:] == [notice], "the notice does not depend on the cache"


def test_domain_folders_become_clients(write, said):
    paths = [f"{domain}/{c}/{i}.png" for domain in ("web", "amazon") for c in ("mug", "bike") for i in range(3)]
    pool = load("mine", write(*paths), owner="folder")
    assert (pool.classes, pool.columns["domain"].tolist()) == (("bike", "mug"), ["amazon"] * 6 + ["web"] * 6)
    assert labels(pool) == (["bike"] * 3 + ["mug"] * 3) * 2
    assert said() == ["mine: 12 pictures in 2 classes and 2 domains"]
    made = partition(pool, None, scheme="natural", min_examples=2)
    assert made.owners == ("amazon", "web")


def test_domain_folders_in_splits(write, said):
    pool = load("mine", write("train/a/cat/1.png", "train/b/cat/1.png", "test/b/cat/1.png"), owner="folder")
    assert (pool.n_train, pool.columns["domain"].tolist()) == (2, ["a", "b", "b"])
    assert said() == ["mine: 3 pictures in 1 class and 2 domains, train 2, test 1"]


def test_metadata_win_over_folders(write, said):
    csv = "\ufefffile_name,label,who\ncat/1.png,10,ann\n2.png,9,\ncat/3.png,10,bob\n"
    pool = load("mine", write("cat/1.png", "2.png", "cat/3.png", "dog/4.png", metadata_csv=csv))
    assert (numbers(pool), labels(pool), pool.classes) == ([1, 0, 2], ["9", "10", "10"], ("9", "10"))
    assert pool.columns["who"].tolist() == ["", "ann", "bob"]
    assert said() == ["mine: 3 pictures in 2 classes; 1 picture not listed in metadata.csv and left out"]


def test_metadata_in_split_folders(write):
    rows = [json.dumps({"file_name": f"{i}.png", "species": "ab"[i % 2]}) + "\n\n" for i in range(3)]
    files = {"train__metadata_jsonl": rows[0] + rows[1], "test__metadata_jsonl": rows[2]}
    pool = load("mine", write("train/0.png", "train/1.png", "test/2.png", **files))
    assert (pool.n_train, numbers(pool), labels(pool)) == (2, [0, 1, 2], ["a", "b", "a"])


def test_metadata_at_the_top_of_split_folders_with_domains(write):
    csv = "file_name,label\ntrain/web/1.png,a\ntest/web/2.png,a\ntrain/amazon/3.png,a\n"
    place = write("train/web/1.png", "test/web/2.png", "train/amazon/3.png", metadata_csv=csv)
    pool = load("mine", place, owner="folder")
    assert (pool.n_train, pool.columns["domain"].tolist()) == (2, ["amazon", "web", "web"])


def test_regression_from_metadata(write, said):
    csv = "file_name,age,who,weight\ntrain/1.png,10,ann,2.5\ntrain/2.png,30,bob,1e1\ntest/3.png,25,ann,-1\n"
    place = write("train/1.png", "train/2.png", "test/3.png", metadata_csv=csv)
    pool = load("mine", place, task="regression")
    assert (pool.objective.names, pool.objective.mean, pool.objective.std) == (
        ("age", "weight"),
        (20.0, 6.25),
        (10.0, 3.75),
    )
    assert torch.allclose(pool.targets, torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.5, -7.25 / 3.75]]))
    assert pool.columns["who"].tolist() == ["ann", "bob", "ann"]
    assert said() == ["mine: 3 pictures with 2 targets (age, weight), train 2, test 1"]


def test_a_column_called_label_is_the_only_target(write):
    csv = "file_name,weight,label\n1.png,7,1\n2.png,8,3\n"
    pool = load("mine", write("1.png", "2.png", metadata_csv=csv), task="regression")
    assert (pool.objective.names, pool.targets.tolist()) == (("label",), [[-1.0], [1.0]])
    assert pool.columns["weight"].tolist() == ["7", "8"]


def test_multilabel_from_metadata(write, said):
    csv = "file_name,smiles,age,young\n1.png,1,30,0\n2.png,0,1,1\n"
    pool = load("mine", write("1.png", "2.png", metadata_csv=csv), task="multilabel")
    assert (pool.objective.names, pool.targets.tolist()) == (("smiles", "young"), [[1, 0], [0, 1]])
    assert pool.columns["age"].tolist() == ["30", "1"]
    assert said() == ["mine: 2 pictures with 2 labels (smiles, young)"]


def test_lists_of_labels_in_metadata(write):
    jsonl = '{"file_name": "1.png", "label": [1, 0, 0]}\n{"file_name": "2.png", "label": [1, 0, 1]}\n'
    pool = load("mine", write("1.png", "2.png", metadata_jsonl=jsonl), task="multilabel")
    assert pool.targets.tolist() == [[1, 0, 0], [1, 0, 1]]


def test_orientation_in_exif_is_not_applied(write):
    place = write("cat/1.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 0).repeat(4, 1)).save(place / "cat/2.jpg", exif=exif)
    (place / "cat/1.png").unlink()
    pixels = load("mine", place).images[0, 0]
    assert pixels.shape == (8, 8)
    assert (int(pixels[7, 0]) < 9, int(pixels[0, 7]) > 246) == (True, True)


def test_some_training_pictures_are_kept(write, said):
    place = write(*[f"train/{i % 2}/{i}.png" for i in range(20)], "test/0/1.png")
    few, more = load("mine", place, rows=5), load("mine", place, rows=9)
    assert (few.n_train, few.n_rows) == (5, 6)
    assert set(numbers(few)) < set(numbers(more))
    assert said()[0] == "mine: 6 pictures in 2 classes, train 5, test 1"


def test_one_coloured_picture_makes_the_pool_coloured_and_sizes_may_be_set(write):
    place = write("cat/1.png", "dog/2.png")
    Image.new("RGB", (8, 6), (1, 2, 3)).save(place / "dog/3.png")
    with pytest.raises(DataError, match=r"4x4 and, in .*dog/3\.png, 6x8\); set one size with data\.image_size=N"):
        load("mine", place)
    pool = load("mine", place, image_size=5)
    assert pool.input_shape == (3, 5, 5)
    assert pool.images[2, :, 0, 0].tolist() == [1, 2, 3]


def test_decoded_pictures_are_cached_until_a_file_or_setting_changes(write, own_cache):
    place = write("cat/1.png", "dog/2.png", metadata_csv="file_name,label,who\ncat/1.png,x,a\ndog/2.png,y,b\n")

    def files():
        load("mine", place)
        return len(list(own_cache.rglob("*.safetensors")))

    first = load("mine", place)
    again = load("mine", place)
    assert files() == 1
    assert torch.equal(first.images, again.images)
    assert (again.classes, again.columns["who"].tolist()) == (("x", "y"), ["a", "b"])
    load("mine", place, image_size=3)
    assert files() == 2
    picture(99).save(place / "cat/1.png")
    os.utime(place / "cat/1.png", ns=(1, 1))
    assert numbers(load("mine", place)) == [99, 1]
    assert files() == 3
    (place / "metadata.csv").write_text("file_name,label,who\ncat/1.png,x,a\ndog/2.png,x,bob\n")
    assert load("mine", place).classes == ("x",)
    (place / "metadata.csv").unlink()
    assert load("mine", place).classes == ("cat", "dog")
    (place / "dog/2.png").rename(place / "cat/2.png")
    assert load("mine", place).classes == ("cat",)


def test_parquet_files_come_first(write, write_parquet, grey):
    place = write("cat/1.png")
    write_parquet(place / "train.parquet", grey(2), [0, 1])
    assert load("mine", place).classes == ("0", "1")
    with pytest.raises(DataError, match=r"data\.owner=folder: data=mine is not a folder of pictures"):
        load("mine", place, owner="folder")


def test_pictures_equal_the_same_arrays(write):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8), [0, 1, 0, 2, 1, 0]
    place = write("0/x.png")
    (place / "0/x.png").unlink()
    for i, (pixels, label) in enumerate(zip(x, y, strict=True)):
        (place / str(label)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(place / str(label) / f"{i}.png")
    order = np.argsort(y, kind="stable")
    pool, same = load("mine", place), from_arrays(x[order], np.array(y)[order], classes=["0", "1", "2"])
    assert torch.equal(pool.images, same.images)
    assert torch.equal(pool.labels, same.labels)


def test_devices_read_the_same_layouts_and_may_lack_classes(write):
    server = load("mine", write("cat/1.webp", "dog/2.png", "emu/3.png", root="server"))
    given, settings = Given(preprocess=server.preprocess(), where="p"), Settings()
    flat = on_devices._read(write("dog/1.png", "cat/2.webp", root="flat"), settings, given)
    assert (flat.n_train, flat.n_rows, flat.targets.tolist()) == (2, 2, [0, 1])
    split = on_devices._read(
        write("training/dog/1.png", "val/cat/2.png", "val/dog/3.png", root="split"), settings, given
    )
    assert (split.n_train, split.n_rows, split.targets.tolist()) == (1, 3, [1, 0, 1])
    assert torch.equal(
        split.images[:, 0], split.images[:, 2]
    )  # greyscale images become colour images, like those of the server
    csv = "file_name,label\n1.png,emu\n2.png,cat\n"
    assert on_devices._read(
        write("1.png", "2.png", root="listed", metadata_csv=csv), settings, given
    ).targets.tolist() == [2, 0]
    with pytest.raises(DataError, match=r"empty: has neither train\.parquet nor pictures in folders named by class"):
        on_devices._read(write(root="empty", notes_md="none"), settings, given)
