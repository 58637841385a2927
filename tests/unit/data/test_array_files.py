"""The user's own arrays in .npz and .npy files."""

import numpy as np
import pytest
import torch

from fedloom.data import TableOptions, from_arrays, load
from fedloom.errors import DataError

X = np.array([[1.5, 2], [3, 4], [5, 6], [7, 8]])
Y = np.array([0, 1, 1, 0])


def saved(folder, **arrays):
    np.savez(folder / "mine.npz", **arrays)
    return folder / "mine.npz"


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ("x_train", "y_train"),
        ("X_train", "y_train"),
        ("x", "y"),
        ("X", "y"),
        ("data", "target"),
        ("data", "labels"),
        ("images", "labels"),
    ],
)
def test_names_of_arrays(tmp_path, x, y):
    pool = load("mine", saved(tmp_path, **{x: X, y: Y}))
    assert torch.equal(pool.images.double(), torch.from_numpy(X))
    assert (pool.name, pool.n_train, pool.labels.tolist()) == ("mine", 4, Y.tolist())


@pytest.mark.parametrize(
    "names", ["x_train y_train x_test y_test", "x y x_test y_test", "train_images train_labels test_images test_labels"]
)
def test_test_examples(tmp_path, names, caplog):
    pool = load("mine", saved(tmp_path, **dict(zip(names.split(), (X, Y, X[:1] + 1, Y[:1]), strict=True))))
    assert (pool.n_train, pool.n_rows) == (4, 5)
    assert pool.images[4].tolist() == [2.5, 3]
    assert "mine.npz: number (2,); 2 classes; 4 train + 1 test" in caplog.text


def test_validation_examples_are_used_for_training_and_labels_are_squeezed(tmp_path, caplog):
    pictures, labels = np.arange(4 * 9, dtype=np.uint8).reshape(4, 3, 3), Y[:, None].astype(np.uint8)
    names = {
        f"{split}_{what}": values
        for split in ("train", "val", "test")
        for what, values in (("images", pictures), ("labels", labels))
    }
    pool = load("mine", saved(tmp_path, **names))
    assert (pool.n_train, pool.n_rows, pool.input_shape) == (8, 12, (1, 3, 3))
    assert pool.labels.tolist() == [0, 1, 1, 0] * 3
    assert "4 validation examples are used for training" in caplog.text
    assert "used as images with one channel" in caplog.text


def test_an_alpha_channel_is_dropped(caplog):
    rgba = np.arange(2 * 5 * 6 * 4, dtype=np.uint8).reshape(2, 5, 6, 4)
    assert np.array_equal(from_arrays(rgba, [0, 1]).images.numpy(), rgba[..., :3].transpose(0, 3, 1, 2))
    assert "alpha) is dropped" in caplog.text
    first = rgba.transpose(0, 3, 1, 2)
    assert np.array_equal(from_arrays(first, [0, 1]).images.numpy(), first[:, :3])


def test_a_folder_of_npy_files(tmp_path):
    for name, values in {"x": X, "y": Y, "x_test": X[:1], "y_test": Y[:1], "client": np.array(list("aabbc"))}.items():
        np.save(tmp_path / f"{name}.npy", values)
    pool = load("mine", tmp_path)
    assert (pool.n_train, pool.n_rows) == (4, 5)
    assert pool.columns["client"].tolist() == list("aabbc")
    with pytest.raises(DataError, match=r"one array is not enough; give a folder with x\.npy and y\.npy"):
        load("mine", tmp_path / "x.npy")


def test_rows_owners_and_unused_arrays(tmp_path, caplog):
    file = saved(tmp_path, x=X, y=Y, owner=np.array([5, 5, 6, 6]), notes=np.zeros(3))
    pool = load("mine", file, rows=2)
    kept = [X.tolist().index(row) for row in pool.images.tolist()]
    assert pool.labels.tolist() == Y[kept].tolist()
    assert pool.columns["owner"].tolist() == np.array([5, 5, 6, 6])[kept].tolist()
    assert "the arrays notes are not used" in caplog.text


def test_other_tasks(tmp_path):
    assert load("mine", saved(tmp_path, x=X, y=Y + 0.5), task="regression").objective.mean == (1.0,)
    assert load("mine", saved(tmp_path, x=X, y=np.eye(4, dtype=int)), task="multilabel").objective.n_outputs == 4
    ids = np.array([[1, 2, 3], [2, 2, 0]])
    assert load("mine", saved(tmp_path, x=ids, y=ids), task="language").spec.fields[0].levels == (4,)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"inputs": X, "outputs": Y},
            "has the arrays inputs, outputs; name inputs and labels in one of these ways: x_train, y_train; x, y",
        ),
        (
            {"x": X, "y": np.array(["a", None, "b", "a"], dtype=object)},
            "it contains Python objects, which are not read",
        ),
        ({"x": X, "y": Y[:3]}, r"'x' has shape \(4, 2\) and 'y' \(3,\); give one label per input"),
        ({"x": X, "y": Y + 1}, r"mine\.npz: labels run from 1 to 2.*x is 'x'"),
        ({"x": X, "y": Y, "x_test": X}, "x_test and y_test must be given together"),
        ({"x": X * np.nan, "y": Y}, "contains NaN or infinite values"),
        ({"x": X, "y": Y, "client": Y[:2]}, r"'client' has shape \(2,\); it must be \(4,\)"),
        ({"x": np.float64(1), "y": Y}, r"'x' has shape \(\)"),
    ],
)
def test_refusals(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message) as error:
        load("mine", saved(tmp_path, **arrays))
    assert "\n" not in str(error.value)


def test_damaged_files_and_options_that_do_not_fit(tmp_path):
    file = saved(tmp_path, x=X, y=Y)
    with pytest.raises(DataError, match=r"data\.label=y: applies only to tables"):
        load("mine", file, table=TableOptions(label="y"))
    with pytest.raises(DataError, match="image_size=8: data=mine has no image files"):
        load("mine", file, image_size=8)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"mine\.npz cannot be read as arrays"):
        load("mine", file)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"mine\.npz cannot be read as arrays"):
        load("mine", file)
    with file.open("wb") as stream:
        np.save(stream, X)
    with pytest.raises(DataError, match="has one array without a name"):
        load("mine", file)
    with pytest.raises(DataError, match=r"none\.npz: file does not exist"):
        load("mine", tmp_path / "none.npz")


def test_files_are_not_changed_by_training_on_them(tmp_path):
    file = saved(tmp_path, x=X, y=Y)
    before = file.read_bytes()
    load("mine", file).images.add_(1)
    assert file.read_bytes() == before
    assert load("mine", file).images[0].tolist() == [1.5, 2]
