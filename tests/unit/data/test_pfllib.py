"""PFLlib's folders, and pickles that contain more than arrays."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from fedloom.data import Federation, load, partition
from fedloom.data.pfllib import read_object
from fedloom.errors import DataError


def write(file, content):
    """Write a file as PFLlib does, with `np.savez_compressed` of a dictionary, which NumPy pickles."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, data=content)


def write_pickle(file, pickled):
    """Write an .npz file with an object array whose pickle is `pickled`."""
    np.savez(file, data=np.array({}, dtype=object))
    with zipfile.ZipFile(file) as archive:
        header = archive.read("data.npy").split(b"\n", 1)[0] + b"\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.npy", header + pickled)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, sizes in (("train", (5, 3, 4)), ("test", (2, 1, 2))):
        for i, n in enumerate(sizes):
            x = rng.standard_normal((n, 1, 4, 4)).astype(np.float32)
            write(tmp_path / split / f"{i}.npz", {"x": np.asfortranarray(x), "y": rng.integers(0, 3, n)})
    (tmp_path / "config.json").write_text(json.dumps({"num_clients": 3, "num_classes": 4}))
    return tmp_path


def original(file):
    return np.load(file, allow_pickle=True)["data"].item()


def test_a_folder_gives_back_every_clients_own_split(folder):
    pool = load("pfllib", folder)
    assert (pool.n_train, pool.n_rows, pool.n_classes) == (12, 17, 4)
    federation = Federation(pool, partition(pool, scheme="own"))
    for i in range(3):
        for split in ("train", "test"):
            x, y = getattr(federation, split)(i)
            expected = original(folder / split / f"{i}.npz")
            assert torch.equal(x, torch.from_numpy(expected["x"]))
            assert y.tolist() == expected["y"].tolist()
    assert len(federation.common()[1]) == 5
    with pytest.raises(DataError, match="its own split for 3 clients"):
        partition(pool, 4, scheme="own")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_kind_of_plain_content_is_read(tmp_path, protocol):
    x, y = np.arange(12.0).reshape(2, 6).astype(">f4"), np.array([1, 0], np.uint8)
    content = np.array({"x": x, "y": y, "note": ("a", 1.5, None, np.float64(2))}, dtype=object)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_pickle(tmp_path / split / "0.npz", pickle.dumps(content, protocol=protocol))
    pool = load("pfllib", tmp_path)
    assert torch.equal(pool.images[:2], torch.arange(12.0).reshape(2, 6))
    assert pool.labels.tolist() == [1, 0, 1, 0]


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(folder):
    mark = folder / "mark"
    write(folder / "train" / "1.npz", {"x": Bomb(mark), "y": np.zeros(1, np.int64)})
    with pytest.raises(DataError, match=r"1\.npz: refused: it contains .*mkdir"):
        load("pfllib", folder)
    assert not mark.exists()
    original(folder / "train" / "1.npz")
    assert mark.exists(), "the pickle does run code where it is trusted"


@pytest.mark.parametrize(
    "pickled",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy._core.multiarray\nfrombuffer\n.",
        b"(lp0\nh\x00a.",
        b"garbage",
        b"",
        b"cnumpy\nndarray\n.",
        pickle.dumps(2 + 3j),
        # a dtype that claims to be objects, with raw bytes for pointers
        pickle.dumps(np.array([{}], dtype=object)).replace(b"O8", b"V8"),
    ],
)
def test_hostile_or_damaged_files_end_in_an_error(folder, pickled):
    write_pickle(folder / "train" / "0.npz", pickled)
    with pytest.raises(DataError, match=r"0\.npz"):
        load("pfllib", folder)


def test_a_pickle_cannot_change_how_the_next_one_is_read(tmp_path):
    file = tmp_path / "0.npz"
    sets_an_attribute = b"cnumpy.core.multiarray\nscalar\n(N}S'built'\nc_codecs\nencode\nstb."
    write_pickle(file, sets_an_attribute)
    with pytest.raises(DataError):
        read_object(file)
    write(file, {"scalar": np.float32(2)})
    assert read_object(file) == {"scalar": 2.0}


def test_files_of_another_form_are_named(folder):
    (folder / "test" / "2.npz").write_bytes(b"not a zip file")
    with pytest.raises(DataError, match=r"2\.npz: not an \.npz file"):
        load("pfllib", folder)
    np.savez(folder / "test" / "2.npz", data=np.zeros(3))
    with pytest.raises(DataError, match="found an array of float64"):
        load("pfllib", folder)
    write(folder / "test" / "2.npz", {"x": [1, 2], "y": np.zeros(2)})
    with pytest.raises(DataError, match="must be arrays"):
        load("pfllib", folder)
    (folder / "test" / "2.npz").unlink()
    with pytest.raises(DataError, match=r"3 clients in train/, but 2 in test/"):
        load("pfllib", folder)
    (folder / "train" / "1.npz").unlink()
    with pytest.raises(DataError, match="without gaps"):
        load("pfllib", folder)


def test_pfllib_needs_a_path_and_nothing_else(folder):
    for settings in ({}, {"path": folder, "rows": 3}, {"path": folder, "image_size": 8}):
        with pytest.raises(DataError, match="data=pfllib: needs"):
            load("pfllib", **settings)
