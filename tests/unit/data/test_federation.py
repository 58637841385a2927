"""The conversion of stored examples to inputs: normalisation, augmentation and pooling."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.data import Federation, Partition, from_arrays, load, partition
from fedloom.data.augment import AUGMENTS
from fedloom.data.preprocess import Preprocess
from fedloom.errors import DataError
from fedloom.objectives import Classification
from fedloom.rng import Stream


@pytest.fixture
def made(pool):
    return partition(pool, 5, alpha=1.0, valid=0.1)


@pytest.fixture
def ramp():
    """Return three clients with images (3, 16, 16) whose pixels encode their row and column."""
    column = torch.arange(16).expand(16, 16)
    picture = torch.stack([10 * column, 10 * column.T, torch.full((16, 16), 255)]).to(torch.uint8)
    return from_arrays(picture.repeat(12, 1, 1, 1), torch.arange(12) % 2, name="ramp")


def test_splits_are_those_of_the_partition(pool, made):
    federation = Federation(pool, made)
    assert (federation.name, federation.n_clients, federation.n_classes) == ("pool", 5, 10)
    assert federation.input_shape == (1, 2, 2)
    for split in ("train", "valid", "test"):
        for i, rows in enumerate(getattr(made, split)):
            x, y = getattr(federation, split)(i)
            assert getattr(federation, f"n_{split}")(i) == len(rows) == len(x)
            assert torch.equal(y, pool.labels[rows])
            torch.testing.assert_close(x, pool.images[rows] / 127.5 - 1)
            assert x.is_contiguous()
            assert x.dtype == torch.get_default_dtype()


def test_the_common_set_is_made_once(pool, made):
    federation = Federation(pool, made)
    x, y = federation.common()
    assert torch.equal(y, pool.labels[made.common])
    assert federation.common()[0] is x


def test_inputs_follow_the_default_dtype(pool, made):
    federation = Federation(pool, made)
    federation.common()
    torch.set_default_dtype(torch.float64)
    try:
        assert federation.train(0)[0].dtype == federation.common()[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_standard_normalisation_uses_the_pools_training_examples(made):
    rng = np.random.default_rng(0)
    x = (rng.integers(0, 100, (800, 3, 4, 4)) + np.array([0, 50, 150])[:, None, None]).astype(np.uint8)
    x[600:] = 255
    pool = from_arrays(x[:600], np.arange(600) % 10, x[600:], np.arange(200) % 10)
    inputs, _ = Federation(pool, made, normalise="standard").rows(np.arange(600))
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_own_normalisation_uses_each_clients_training_examples():
    x = np.array([[0, 5], [2, 5], [8, 5], [100, 0.1], [104, 0.1], [90, 0.1], [51, 8]])
    pool = from_arrays(x[:6], [0, 1, 0, 1, 0, 1], x[6:], [1], name="two")
    rows = [np.array(part, np.int64) for part in ([0, 1], [3, 4], [], [], [2], [5], [6])]
    made = Partition(train=tuple(rows[:2]), valid=tuple(rows[2:4]), test=tuple(rows[4:6]), common=rows[6], scheme={})
    data = Federation(pool, made, normalise="own")
    assert data.train(0)[0].tolist() == [[-1, 0], [1, 0]]  # mean 1, standard deviation 1; a constant becomes 0
    assert data.test(0)[0].tolist() == [[7, 0]]
    torch.testing.assert_close(data.train(1)[0], torch.tensor([[-1.0, 0], [1, 0]]))
    torch.testing.assert_close(data.test(1)[0], torch.tensor([[-6.0, 0]]))
    together = data.train_of([0, 1])
    assert all(torch.equal(together[i][0], data.train(i)[0]) for i in (0, 1))
    pooled = x[:6].mean(0), x[:6].std(0)
    torch.testing.assert_close(data.common()[0].numpy(), ((x[6:] - pooled[0]) / pooled[1]).astype(np.float32))
    assert data.preprocess.prepared(torch.tensor([[102.0, 0.1]]), 1).tolist() == [[0, 0]]
    stored = Preprocess.parse(data.preprocess.text(), "file")
    assert torch.equal(stored.prepared(pool.images[:2], 0), data.train(0)[0])
    torch.testing.assert_close(stored.prepared(pool.images[6:]), data.common()[0])
    assert data.normalisation(0)[""] == ([1, 5], [1, 1])
    again = pickle.loads(pickle.dumps(data, protocol=5))
    assert torch.equal(again.test(1)[0], data.test(1)[0])
    assert torch.equal(data.on(torch.device("cpu")).test(1)[0], data.test(1)[0])


def test_own_normalisation_of_images_is_by_channel(pool, made):
    data = Federation(pool, made, normalise="own")
    x, _ = data.train(3)
    torch.testing.assert_close(x.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(correction=0), torch.tensor(1.0))
    with pytest.raises(DataError, match=r"data\.augment=crop-flip: pads with black"):
        Federation(pool, made, normalise="own", augment="crop-flip")
    shared = replace(made, test=(made.test[0],) * 5)
    with pytest.raises(DataError, match="is in the test splits of two clients"):
        Federation(pool, shared, normalise="own")


def test_user_features_are_not_normalised_unless_asked():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 0.0]) + 5
    pool = from_arrays(x, torch.arange(40) % 2)
    made = partition(pool, 2, scheme="iid")
    assert torch.equal(Federation(pool, made).rows(np.arange(40))[0], x)
    scaled = Federation(pool, made, normalise="standard").rows(np.arange(40))[0]
    torch.testing.assert_close(scaled.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(DataError, match="needs images"):
        Federation(pool, made, augment="flip")


def test_none_leaves_pictures_between_0_and_1(pool, made):
    x, _ = Federation(pool, made, normalise="none").rows(np.arange(800))
    assert (x.min().item(), x.max().item()) == pytest.approx((0, 1))


def test_pooled_moves_all_training_examples_to_client_0(pool, made):
    federation = Federation(pool, made)
    pooled = federation.pooled()
    assert pooled.n_train(0) == sum(federation.n_train(i) for i in range(5))
    assert [pooled.n_train(i) for i in range(1, 5)] == [0] * 4
    assert torch.equal(pooled.test(3)[0], federation.test(3)[0])
    assert federation.n_train(0) == len(made.train[0])
    assert pooled.train(4)[0].shape == (0, 1, 2, 2)


def test_partitions_and_settings_that_do_not_fit_are_refused(pool, made):
    beyond = replace(made, common=np.array([800]))
    with pytest.raises(DataError, match="example numbers 0 to 800, but data=pool has 0 to 799"):
        Federation(pool, beyond)
    with pytest.raises(DataError, match="every client needs"):
        Federation(pool, Partition(train=made.train, valid=(), test=made.test, common=made.common, scheme={}))
    with pytest.raises(DataError, match=r"data\.normalise=halff.*'half'"):
        Federation(pool, made, normalise="halff")
    with pytest.raises(DataError, match=r"data\.augment=flop.*'flip'"):
        Federation(pool, made, augment="flop")
    with pytest.raises(DataError, match="labels run from"):
        Federation(replace(pool, objective=Classification(names=("one",))), made)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_augmentation_follows_its_stream_and_leaves_its_input(ramp, augment):
    federation = Federation(ramp, partition(ramp, 1, scheme="iid"), augment=augment)
    x, _ = federation.rows(np.arange(12))
    before = x.clone()
    once, twice = federation.augmented(x, Stream(1)), federation.augmented(x, Stream(1))
    assert torch.equal(once, twice)
    assert torch.equal(x, before)
    assert once.shape == x.shape
    other = federation.augmented(x, Stream(2))
    assert torch.equal(once, other) == (augment in ("none", "resized-crop-flip-once"))


def test_flips_mirror_about_half_of_the_pictures(ramp):
    federation = Federation(ramp, partition(ramp, 1, scheme="iid"), augment="flip")
    x = federation.rows(np.zeros(200, np.int64))[0]
    mirrored = (federation.augmented(x, Stream(0)) == x.flip(3)).all(dim=(1, 2, 3))
    kept = (federation.augmented(x, Stream(0)) == x).all(dim=(1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 70 < mirrored.sum() < 130


@pytest.mark.parametrize("normalise", ["half", "standard"])
def test_crops_shift_by_up_to_four_pixels_over_black(ramp, normalise):
    federation = Federation(ramp, partition(ramp, 1, scheme="iid"), normalise=normalise, augment="crop-flip")
    x = federation.rows(np.zeros(300, np.int64))[0]
    out = federation.augmented(x, Stream(0))
    mean, std = federation.normalisation(0)[""]
    white = x[0, 2, 0, 0]
    inside = out[:, 2] == white
    torch.testing.assert_close(out[:, 2][~inside], torch.full_like(out[:, 2][~inside], -mean[2] / std[2]))
    for rows in (inside.any(2).sum(1), inside.any(1).sum(1)):
        assert (rows.min(), rows.max()) == (12, 16)
    # inside, it is the shifted image: neighbours still differ by one step
    step = (x[0, 0, 0, 1] - x[0, 0, 0, 0]).abs()
    moved = (out[:, 0, :, 1:] - out[:, 0, :, :-1]).abs()[inside[:, :, 1:] & inside[:, :, :-1]]
    torch.testing.assert_close(moved, step.expand_as(moved))


def test_resized_crops_are_windows_of_at_least_three_quarters(ramp):
    federation = Federation(ramp, partition(ramp, 1, scheme="iid"), normalise="none", augment="resized-crop-flip")
    x = federation.rows(np.zeros(400, np.int64))[0]
    out = federation.augmented(x, Stream(0)) * 25.5  # channel 0 holds the column, channel 1 the row of each pixel
    inner = out[:, :, 2:-2, 2:-2]
    width = (inner[:, 0, :, -1] - inner[:, 0, :, 0]).mean(1).abs() / 11
    height = (inner[:, 1, -1, :] - inner[:, 1, 0, :]).mean(1) / 11
    area = width * height
    assert 0.7 < area.min() < 0.8
    assert 0.97 < area.max() < 1.001
    ratio = width / height
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert (out.min() >= 0) & (out[:, :2].max() <= 15.001)


def test_once_changes_every_row_at_load_and_never_again(ramp):
    made = partition(ramp, 1, scheme="iid")
    plain, once = (Federation(ramp, made, augment=a) for a in ("none", "resized-crop-flip-once"))
    assert once.dataset.images.dtype == torch.uint8
    for split in ("train", "test"):
        x, changed = getattr(plain, split)(0)[0], getattr(once, split)(0)[0]
        assert (x != changed).flatten(1).any(1).all()
    assert torch.equal(Federation(ramp, made, augment="resized-crop-flip-once").train(0)[0], once.train(0)[0])
    assert torch.equal(ramp.images[0, 0, 0], torch.arange(0, 160, 10).to(torch.uint8))


def test_digits_end_to_end():
    digits = load("digits")
    federation = Federation(digits, partition(digits, 10))
    assert sum(federation.n_train(i) + federation.n_test(i) for i in range(10)) == 1797
    x, y = federation.train(0)
    assert x.shape[1:] == (1, 8, 8)
    assert (x.min().item(), x.max().item()) == pytest.approx((-1, 1))
    assert y.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("normalise", ["half", "standard", "own", "none"])
def test_nothing_that_a_federation_does_writes_into_its_pool(dtype, normalise):
    """Normalisation must not write to the pool itself, which may share memory with a user's array."""
    x = (torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    pool = from_arrays(x, torch.arange(40) % 4)
    before = pool.images.clone()
    augment = "crop-flip" if dtype == torch.uint8 and normalise != "own" else "none"
    federation = Federation(pool, partition(pool, 2, scheme="iid"), normalise=normalise, augment=augment)
    rows, _ = federation.train(0)
    federation.augmented(rows, Stream(0))
    federation.common()
    federation.pictures(rows, 0)
    assert torch.equal(pool.images, before)
    if normalise == "standard":
        every = torch.cat([federation.train(i)[0] for i in range(2)] + [federation.test(i)[0] for i in range(2)])
        torch.testing.assert_close(
            every.double().std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=1e-4, atol=1e-4
        )


def test_large_unnormalised_features_are_logged(caplog):
    pool = from_arrays(np.full((8, 2), 300.0) * np.arange(8)[:, None], np.arange(8) % 2)
    dealt = partition(pool, 2, scheme="iid", min_examples=2)
    Federation(pool, dealt, normalise="none")
    assert not caplog.text
    Federation(pool, dealt)
    assert "inputs range from 0 to 2100 and are not scaled; to scale them, set data.normalise=standard" in caplog.text


def test_pictures_and_numbers_together_have_their_own_defaults():
    images, ages = np.full((4, 1, 8, 8), 255, np.uint8), np.array([[1.0], [2.0], [3.0], [4.0]])
    data = from_arrays({"image": images, "age": ages}, np.array([0, 1, 0, 1]))
    made = partition(data, 1, scheme="iid", min_examples=2)
    x, _ = Federation(data, made).rows(np.arange(4))
    assert x["image"].mean().item() == pytest.approx(1.0)  # half: white is 1
    assert x["age"][:, 0].tolist() == [1.0, 2.0, 3.0, 4.0]
    x, _ = Federation(data, made, normalise="standard").rows(np.arange(4))
    assert x["age"].mean().item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match=r"data.augment=flip: needs images, but inputs are image: picture"):
        Federation(data, made, augment="flip")
