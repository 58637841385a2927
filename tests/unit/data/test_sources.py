"""Loading by name: embedded data, folders, shards, metadata, the cache and the hub."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.data import SOURCES, load
from fedloom.data.embedded import DIGITS
from fedloom.errors import DataError


def test_digits_are_embedded():
    digits = load("digits")
    assert tuple(digits.images.shape) == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    assert digits.images.max() == 255
    assert digits.n_train == digits.n_rows
    assert digits.classes == tuple("0123456789")


def test_the_embedded_digits_are_those_of_scikit_learn():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    ours = load("digits")
    pixels = np.rint(theirs.images * (255 / 16)).astype(np.uint8)
    assert torch.equal(ours.images, torch.from_numpy(pixels)[:, None])
    assert torch.equal(ours.labels, torch.from_numpy(theirs.target.astype(np.int64)))


def test_the_embedded_digits_name_their_source_and_licence():
    text = DIGITS.with_suffix(".txt").read_text(encoding="utf-8")
    assert "UCI Machine Learning Repository" in text
    assert "CC BY 4.0" in text


def test_data_rows_selects_a_fixed_nested_subset():
    whole, many, few = load("digits"), load("digits", rows=200), load("digits", rows=50)
    assert (few.n_train, few.n_rows) == (50, 50)
    assert torch.equal(few.images, load("digits", rows=50).images)
    keys = [{picture.numpy().tobytes() for picture in pool.images} for pool in (few, many, whole)]
    assert keys[0] < keys[1] < keys[2]
    with pytest.raises(DataError, match=r"data\.rows=1798.*1797"):
        load("digits", rows=1798)


def test_image_size_resizes():
    assert load("digits", rows=3, image_size=28).input_shape == (1, 28, 28)
    with pytest.raises(DataError, match=r"data\.image_size=0"):
        load("digits", image_size=0)


def test_a_folder_holds_train_and_test(tmp_path, write_parquet, grey):
    pictures = grey(7)
    write_parquet(tmp_path / "train.parquet", pictures[:5], [3, 1, 1, 7, 3], writer=list("abcab"))
    write_parquet(tmp_path / "test.parquet", pictures[5:], [7, 9], writer=["b", "z"])
    pool = load("mine", tmp_path)
    assert (pool.name, pool.n_train, pool.n_rows, pool.input_shape) == ("mine", 5, 7, (1, 8, 8))
    assert np.array_equal(pool.images[:, 0].numpy(), np.stack(pictures))
    assert pool.classes == ("1", "3", "7", "9")
    assert pool.labels.tolist() == [1, 0, 0, 2, 1, 2, 3]
    assert pool.columns["writer"].tolist() == list("abcabbz")


def test_shards_in_a_folder_of_the_hub_keep_their_order(tmp_path, write_parquet, grey):
    pictures = grey(4)
    for i in range(2):
        file = tmp_path / "data" / f"train-0000{i}-of-00002-abc.parquet"
        write_parquet(file, pictures[2 * i : 2 * i + 2], [i, i])
    pool = load("mine", tmp_path)
    assert np.array_equal(pool.images[:, 0].numpy(), np.stack(pictures))
    file.unlink()
    with pytest.raises(DataError, match="1 of 2 files"):
        load("mine", tmp_path)


def test_class_names_come_from_the_metadata_of_the_hub(tmp_path, write_parquet, grey):
    names = {"label": ["cat", "dog", "emu"], "domain": ["photo", "sketch"]}
    write_parquet(tmp_path / "train.parquet", grey(3), [2, 0, 2], names=names, domain=[1, 0, 1])
    pool = load("mine", tmp_path)
    assert pool.classes == ("cat", "dog", "emu")
    assert pool.labels.tolist() == [2, 0, 2]
    assert pool.columns["domain"].tolist() == ["sketch", "photo", "sketch"]


def test_labels_may_be_words_and_pictures_plain_bytes(tmp_path, write_parquet, grey):
    write_parquet(tmp_path / "train.parquet", grey(3), ["dog", "cat", "dog"], plain=True, image="img", label="target")
    pool = load("mine", tmp_path)
    assert (pool.classes, pool.labels.tolist()) == (("cat", "dog"), [1, 0, 1])


def test_one_coloured_picture_makes_the_pool_coloured(tmp_path, write_parquet, grey):
    pictures = grey(3)
    colour = np.stack(grey(3), axis=2)
    write_parquet(tmp_path / "train.parquet", [*pictures, colour], [0, 1, 2, 3])
    pool = load("mine", tmp_path)
    assert pool.input_shape == (3, 8, 8)
    assert np.array_equal(pool.images[3].numpy(), colour.transpose(2, 0, 1))
    assert all(np.array_equal(pool.images[1, c].numpy(), pictures[1]) for c in range(3))


def test_pictures_of_several_sizes_need_an_image_size(tmp_path, write_parquet, grey):
    write_parquet(tmp_path / "train.parquet", [*grey(1, 8), *grey(1, 12)], [0, 1])
    with pytest.raises(DataError, match=r"8x8 and, in train\.parquet, row 1 of the pool, 12x12.*data\.image_size"):
        load("mine", tmp_path)
    assert load("mine", tmp_path, image_size=6).input_shape == (1, 6, 6)


def test_only_the_wanted_classes_of_domainnet(tmp_path, write_parquet, grey):
    only = SOURCES["domainnet10"].only
    names = {"label": ["aircraft", *reversed(only)]}
    write_parquet(tmp_path / "domainnet" / "train.parquet", grey(3), [0, 10, 1], names=names, domain=["a", "b", "c"])
    pool = load("domainnet10", tmp_path / "domainnet")
    assert pool.classes == only
    assert pool.labels.tolist() == [0, 9]
    assert (pool.n_train, pool.columns["domain"].tolist()) == (2, ["b", "c"])


def test_fine_and_coarse_labels_share_the_files(tmp_path, write_parquet, grey, monkeypatch):
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    write_parquet(tmp_path / "cifar100" / "train.parquet", grey(2), [99, 5], label="fine_label", coarse_label=[19, 2])
    assert load("cifar100").labels.tolist() == [99, 5]
    coarse = load("cifar100_coarse")
    assert (coarse.labels.tolist(), coarse.n_classes) == ([19, 2], 20)


@pytest.mark.parametrize("folder", ["fashion-mnist", "fashion_mnist"])
def test_the_environment_names_a_folder_of_folders(tmp_path, write_parquet, grey, monkeypatch, folder):
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    write_parquet(tmp_path / folder / "train.parquet", grey(2), [9, 0])
    assert load("fashion_mnist").classes[9] == "Ankle boot"


def test_decoded_pictures_are_cached_until_the_files_or_the_settings_change(tmp_path, write_parquet, grey, own_cache):
    file = write_parquet(tmp_path / "train.parquet", grey(4), [0, 1, 0, 1], writer=list("abca"), age=[1, 2, 3, 4])
    first = load("mine", tmp_path)
    (stored,) = (own_cache / "decoded").iterdir()
    before = stored.stat().st_mtime_ns
    again = load("mine", tmp_path)
    assert stored.stat().st_mtime_ns == before
    assert torch.equal(first.images, again.images)
    assert (again.classes, again.n_train) == (first.classes, first.n_train)
    assert all(np.array_equal(first.columns[c], again.columns[c]) for c in ("writer", "age"))
    load("mine", tmp_path, rows=2)
    assert len(list((own_cache / "decoded").iterdir())) == 2
    changed = grey(4)
    write_parquet(file, changed, [0, 1, 0, 1])
    os.utime(file, ns=(1, 1))
    assert np.array_equal(load("mine", tmp_path).images[:, 0].numpy(), np.stack(changed))


@pytest.mark.parametrize("content", [b"", b"garbage" * 50])
def test_a_corrupt_cache_is_built_again(tmp_path, write_parquet, grey, own_cache, content):
    write_parquet(tmp_path / "train.parquet", grey(2), [0, 1])
    first = load("mine", tmp_path)
    (stored,) = (own_cache / "decoded").iterdir()
    stored.write_bytes(content)
    assert torch.equal(load("mine", tmp_path).images, first.images)
    assert stored.stat().st_size > len(content)


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, write_parquet, grey):
    write_parquet(tmp_path / "train.parquet", grey(2), [0, 1])
    (tmp_path / "file").write_text("in the way")
    assert load("mine", tmp_path, cache=tmp_path / "file" / "cache").n_rows == 2


def test_a_folder_without_files_says_what_belongs_there(tmp_path):
    with pytest.raises(DataError, match="folder does not exist"):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"neither train\.parquet"):
        load("mnist", tmp_path)


def test_invalid_files_are_refused(tmp_path, write_parquet, grey):
    file = tmp_path / "train.parquet"
    file.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="cannot be read as a parquet file"):
        load("mine", tmp_path)
    write_parquet(file, grey(2), [0, 1], label="colour")
    with pytest.raises(DataError, match="no label column"):
        load("mine", tmp_path)
    write_parquet(file, [b"not a picture"], [0])
    with pytest.raises(DataError, match="row 0 of the pool: Pillow cannot read this image"):
        load("mine", tmp_path)
    for labels in ([0.5, 1.5], [[0, 1], [1, 1]]):
        write_parquet(file, grey(2), labels)
        with pytest.raises(DataError, match=r"must be integers or strings \(data.task=regression for numbers"):
            load("mine", tmp_path)
    write_parquet(file, grey(2), [0, 10])
    with pytest.raises(DataError, match="labels run from 0 to 10; they must be from 0 to 9"):
        load("mnist", tmp_path)


def test_files_that_are_damaged_or_do_not_agree(tmp_path, write_parquet, grey):
    file = tmp_path / "train.parquet"
    write_parquet(file, [], [])
    with pytest.raises(DataError, match=r"train\.parquet has no rows"):
        load("mine", tmp_path)
    write_parquet(file, grey(2), [0, 1])
    write_parquet(tmp_path / "test.parquet", grey(2), ["a", "b"])
    with pytest.raises(DataError, match="the files have different columns"):
        load("mine", tmp_path)
    write_parquet(tmp_path / "test.parquet", grey(2), [0, 1])
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])  # the footer is unchanged
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as a parquet file"):
        load("mine", tmp_path)


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16)])
def test_sixteen_bits_of_grey_become_eight(tmp_path, write_parquet, kind, dtype):
    levels = np.array([[0, 255, 256, 1000], [32768, 40000, 65280, 65535]], dtype)
    write_parquet(tmp_path / "train.parquet", [levels], [0], kind=kind)
    assert load("mine", tmp_path).images[0, 0].tolist() == [[0, 0, 1, 3], [128, 156, 255, 255]]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused(tmp_path, write_parquet, dtype):
    write_parquet(tmp_path / "train.parquet", [np.ones((2, 2), dtype)], [0], kind="TIFF")
    with pytest.raises(DataError, match="row 0 of the pool: its pixels have 32 bits; save it with 8 or 16"):
        load("mine", tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "a/b", "", ".."])
def test_a_name_is_not_a_path(tmp_path, write_parquet, grey, name):
    write_parquet(tmp_path / "train.parquet", grey(2), [0, 1])
    with pytest.raises(DataError, match="a name may contain only"):
        load(name, tmp_path)


def test_an_unknown_name_suggests_a_known_one():
    with pytest.raises(DataError, match="did you mean 'cifar10'"):
        load("cifar-10")


def test_without_hub_and_files_the_message_names_the_folders(monkeypatch, own_cache, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load("mnist")
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path / "mnist"), str(own_cache / "mnist"), "train.parquet", "data.path", "fedloom[hub]"):
        assert part in message
    with pytest.raises(DataError, match="no known hub repository"):
        load("office_caltech10")


def test_a_download_is_kept_and_not_repeated(monkeypatch, own_cache, write_parquet, grey):
    asked = []

    def snapshot_download(*, repo_id, repo_type, allow_patterns, local_dir):
        asked.append((repo_id, repo_type, allow_patterns))
        write_parquet(local_dir / "plain_text" / "train-00000-of-00001.parquet", grey(3), [0, 9, 1], image="img")
        write_parquet(local_dir / "plain_text" / "test-00000-of-00001.parquet", grey(1), [2], image="img")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    pool = load("cifar10")
    assert (pool.n_train, pool.n_rows, pool.classes[9]) == (3, 4, "truck")
    load("cifar10", rows=2)
    assert [(repository, kind) for repository, kind, _ in asked] == [("uoft-cs/cifar10", "dataset")]
    assert "plain_text/train*.parquet" in asked[0][2]
    assert sorted(entry.name for entry in own_cache.iterdir()) == ["cifar10", "decoded"]


def test_a_download_that_fails_or_breaks_off_ends_in_one_line(monkeypatch, own_cache, write_parquet, grey):
    def snapshot_download(*, local_dir, **_):
        write_parquet(local_dir / "mnist" / "train-00000-of-00001.parquet", grey(1), [0])
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(DataError, match=r"download of ylecun/mnist failed \(no route\); put train\.parquet"):
        load("mnist")
    assert not (own_cache / "mnist").exists()


def test_coloured_digits_tell_the_class_by_a_code_of_each_client():
    pool = load("coloured-digits")
    assert (pool.n_rows, pool.n_train, pool.input_shape) == (1797, 1400, (3, 8, 8))
    owners, colours = pool.columns["client"], pool.columns["colour"]
    assert sorted(set(owners[: pool.n_train])) == ["0", "1", "2", "3"]
    assert set(owners[pool.n_train :]) == {""}
    labels = pool.labels.numpy()
    codes = []
    for client in "0123":
        mine = owners == client
        assert mine.sum() == 350
        usual = [np.bincount(colours[mine & (labels == y)], minlength=10).argmax() for y in range(10)]
        assert sorted(usual) == list(range(10)), "a code is a permutation"
        assert 0.85 < (colours[mine] == np.array(usual)[labels[mine]]).mean() < 0.95
        codes.append(tuple(usual))
    assert len(set(codes)) == 4
    tested = colours[pool.n_train :]
    assert np.bincount(tested, minlength=10).min() > 20, "the colours of test examples are random"


def test_coloured_digits_are_white_ink_on_their_colour_and_always_the_same():
    pool = load("coloured-digits")
    corner = pool.images[:, :, 0, 0].double()  # hardly ever inked
    hue = corner[pool.columns["colour"] == 0]
    assert torch.equal(hue.median(0).values, torch.tensor([200.0, 0.0, 0.0]).double())
    assert torch.equal(load("coloured-digits").images, pool.images)
    ink = load("digits").images.double().amax((1, 2, 3)) / 255
    brightest = pool.images.double().amax((1, 2, 3))
    torch.testing.assert_close(brightest.sort().values, (200 + 55 * ink).sort().values, rtol=0, atol=1)
