"""Real parquet files in the hub's layout, if the machine has them."""

import numpy as np
import pytest

from fedloom.data import Federation, load, partition


@pytest.fixture
def real(shared_data, monkeypatch):
    def named(name, *, cache=None, **settings):
        monkeypatch.setenv("FEDLOOM_DATA", str(shared_data))
        if not (shared_data / name).is_dir():
            pytest.skip(f"no real data: {shared_data / name} is not a folder")
        return load(name, cache=cache, **settings)

    return named


def test_mnist(real):
    pool = real("mnist", rows=500)
    assert (pool.n_train, pool.n_rows, pool.input_shape, pool.n_classes) == (500, 10_500, (1, 28, 28), 10)
    assert pool.labels[500:].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert pool.images.float().mean() / 255 == pytest.approx(0.131, abs=0.003)


def test_cifar10(real):
    pool = real("cifar10", rows=300)
    assert (pool.n_train, pool.input_shape, pool.classes[9]) == (300, (3, 32, 32), "truck")
    assert pool.labels[300:].bincount().tolist() == [1000] * 10
    channels = (pool.images.float().mean((0, 2, 3)) / 255).tolist()
    assert channels == pytest.approx([0.494, 0.485, 0.451], abs=0.01)


def test_office_caltech_has_a_client_per_domain(real):
    pool = real("office_caltech10", image_size=64)
    assert pool.input_shape == (3, 64, 64)
    made = partition(pool, scheme="natural")
    assert [len(a) + len(b) for a, b in zip(made.train, made.test, strict=True)] == [958, 1123, 157, 295]
    federation = Federation(pool, made, augment="resized-crop-flip-once")
    assert federation.common()[0].shape == (len(made.common), 3, 64, 64)


def test_heart_disease_has_the_patients_of_flamby(real):
    pool = real("heart-disease")
    hospitals, patients = np.unique(pool.columns["hospital"], return_counts=True)
    assert (hospitals.tolist(), patients.tolist()) == (
        ["cleveland", "hungarian", "switzerland", "va"],
        [303, 261, 46, 130],
    )
    assert (pool.input_shape, pool.labels.bincount().tolist()) == ((13,), [357, 383])
