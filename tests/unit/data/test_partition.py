"""The assignment of examples to clients: properties of the schemes, splits and files."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.data import Partition, default_scheme, from_arrays, given_partition, load, partition
from fedloom.errors import DataError

DEALT = {
    "iid": {},
    "dirichlet": {"alpha": 0.3},
    "pathological": {"classes_per_client": 2},
    "extended": {"classes_per_client": 3, "alpha": 1.0},
    "quantity": {"alpha": 1.0},
}


def everything(made):
    return np.concatenate([*made.train, *made.valid, *made.test])


@pytest.mark.parametrize("scheme", DEALT)
@settings(max_examples=15, deadline=None)
@given(clients=st.integers(5, 12), seed=st.integers(0, 10**6), valid=st.sampled_from([0.0, 0.1]))
def test_every_row_goes_to_exactly_one_split_of_one_client(scheme, clients, seed, valid):
    rng = np.random.default_rng(seed)
    pool = from_arrays(
        np.zeros((900, 1)), rng.permutation(np.arange(900) % 10), np.zeros((100, 1)), np.arange(100) % 10
    )
    chosen = DEALT[scheme] | ({"classes_per_client": 10} if scheme == "pathological" and 2 * clients % 10 else {})
    made = partition(pool, clients, scheme=scheme, seed=seed, valid=valid, min_examples=4, **chosen)
    assert made.n_clients == clients
    assert np.array_equal(np.sort(everything(made)), np.arange(1000))
    assert np.array_equal(made.common, np.sort(np.concatenate(made.test)))
    for train, held_out, test in zip(made.train, made.valid, made.test, strict=True):
        n = len(train) + len(held_out) + len(test)
        assert n >= 4
        assert len(train) >= 1
        assert len(test) == -(-n // 4)
        assert (len(held_out) > 0) == (valid > 0 and len(train) + len(held_out) > 1)
        assert all(np.array_equal(part, np.sort(part)) and part.dtype == np.int64 for part in (train, held_out, test))
    assert (
        partition(pool, clients, scheme=scheme, seed=seed, valid=valid, min_examples=4, **chosen).hash() == made.hash()
    )
    assert partition(pool, clients, scheme=scheme, seed=seed + 1, min_examples=4, **chosen).hash() != made.hash()


def test_seeds_and_schemes_are_recorded_and_hashes_are_pinned():
    made = partition(load("digits"), 10)
    assert made.scheme == {
        "name": "dirichlet", "data": "digits", "n_train": 1797, "n_rows": 1797,
        "clients": 10, "min_examples": 10, "alpha": 0.1,
        "merge": True, "test_fraction": 0.25, "valid": 0.0, "seed": 0,
    }  # fmt: skip
    assert made.hash() == "3353a9190e9fea16ca192e40b47fa64b"


def test_iid_sizes_differ_by_one_at_most(pool):
    made = partition(pool, 7, scheme="iid")
    sizes = [len(a) + len(b) for a, b in zip(made.train, made.test, strict=True)]
    assert max(sizes) - min(sizes) <= 1


def test_a_small_alpha_means_skew_and_a_large_one_means_none(pool):
    def largest_share(alpha):
        counts = partition(pool, 5, alpha=alpha).counts(pool.labels, 10)
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()

    assert largest_share(0.05) > 0.3
    assert largest_share(1000.0) < 0.2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_dirichlet_is_capped(seed):
    """A client that holds N/K examples gets no more classes, so it can exceed the cap at most by the examples of one class."""
    labels = np.repeat(np.arange(10), 60)
    made = partition(from_arrays(np.zeros((600, 1)), labels), 6, alpha=0.1, seed=seed, min_examples=2)
    dealt = [np.concatenate(parts) for parts in zip(made.train, made.test, strict=True)]
    counts = np.stack([np.bincount(labels[rows], minlength=10) for rows in dealt])
    before = np.cumsum(counts, axis=1) - counts
    assert (counts[before >= 100] == 0).all()
    assert counts.sum(axis=1).max() < 160


@pytest.mark.parametrize("balance", [True, False])
def test_pathological_deals_classes_in_turn(pool, balance):
    made = partition(pool, 20, scheme="pathological", classes_per_client=2, balance=balance, min_examples=2)
    counts = made.counts(pool.labels, 10) + made.counts(pool.labels, 10, "test")
    assert (counts > 0).sum(axis=1).max() <= 2
    for c in range(10):
        holders = np.flatnonzero(counts[:, c])
        assert set(holders) <= set(range(4 * (c // 2), 4 * (c // 2) + 4))
    sizes = counts[:4, 0]
    assert (sizes.max() - sizes.min() <= 3) == balance


def test_pathological_refuses_to_leave_classes_over(pool):
    with pytest.raises(DataError, match="covers 8 of 10 classes"):
        partition(pool, 7, scheme="pathological", classes_per_client=2)


def test_extended_gives_every_client_its_number_of_classes(pool):
    made = partition(pool, 10, scheme="extended", classes_per_client=3, alpha=100.0)
    counts = made.counts(pool.labels, 10) + made.counts(pool.labels, 10, "test")
    assert ((counts > 0).sum(axis=1) == 3).all()
    assert ((counts > 0).sum(axis=0) == 3).all()
    with pytest.raises(DataError, match="covers 2 of 10 classes"):
        partition(pool, 2, scheme="extended", classes_per_client=1)


def test_natural_makes_a_client_of_every_value(pool):
    made = partition(pool, scheme="natural", column="writer", min_examples=50)
    for train, test in zip(made.train, made.test, strict=True):
        assert len(set(pool.columns["writer"][np.concatenate([train, test])])) == 1
    values, sizes = np.unique(pool.columns["writer"], return_counts=True)
    assert made.n_clients == (sizes >= 50).sum() < len(values)
    few = partition(pool, 2, scheme="natural", column="writer")
    assert sorted(len(a) + len(b) for a, b in zip(few.train, few.test, strict=True)) == sorted(sizes)[-2:]
    with pytest.raises(DataError, match="set clients to at most 8"):
        partition(pool, 9, scheme="natural", column="writer", min_examples=2)
    with pytest.raises(DataError, match="has the columns: writer"):
        partition(pool, scheme="natural", column="wrtier")
    by_default = partition(pool, 2, scheme="natural")
    assert [rows.tolist() for rows in by_default.train] == [rows.tolist() for rows in few.train]


def test_without_merging_the_official_test_set_is_the_common_set(pool):
    made = partition(pool, 5, merge=False, alpha=1.0)
    assert np.array_equal(made.common, np.arange(600, 800))
    assert all(len(rows) == 0 for rows in made.test)
    assert np.array_equal(np.sort(everything(made)), np.arange(600))
    own = partition(pool, 5, merge=False, alpha=1.0, test_fraction=0.5)
    assert np.array_equal(own.common, np.arange(600, 800))
    assert all(len(rows) for rows in own.test)


def test_someone_must_be_tested():
    with pytest.raises(DataError, match=r"test_fraction=0\.0.*no other test set"):
        partition(load("digits"), 5, merge=False)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"clients": 60, "alpha": 0.01}, "no draw gave each client"),
        ({"clients": 40, "scheme": "quantity", "alpha": 0.05}, "a larger partition.alpha"),
        ({"clients": 5, "scheme": "pathological", "balance": True, "min_examples": 159}, "no draw"),
        ({"clients": 81}, "clients=81: 800 examples"),
        ({"clients": 0}, "clients=0"),
        ({}, "clients: must be given"),
        ({"clients": 5, "scheme": "dirichelt"}, "did you mean 'dirichlet'"),
        ({"clients": 5, "alpha": 0.0}, r"partition\.alpha=0\.0"),
        ({"clients": 5, "alpha": float("nan")}, r"partition\.alpha=nan"),
        ({"clients": 5, "scheme": "pathological", "classes_per_client": 11}, "must be from 1 to 10"),
        ({"clients": 5, "min_examples": 1}, r"partition\.min_examples=1"),
        ({"clients": 5, "test_fraction": 1.0}, r"partition\.test_fraction=1\.0"),
        ({"clients": 5, "valid": 1.0}, r"partition\.valid=1\.0"),
        ({"scheme": "file"}, r"partition\.path=FILE"),
    ],
)
def test_impossible_plans_end_in_an_error_that_says_what_to_change(pool, chosen, message):
    with pytest.raises(DataError, match=message):
        partition(pool, **chosen)


def test_a_partition_survives_its_file(pool, tmp_path):
    made = partition(pool, 5, valid=0.2, alpha=1.0)
    made.save(tmp_path / "partition.json")
    assert [file.name for file in tmp_path.iterdir()] == ["partition.json"]
    back = Partition.load(tmp_path / "partition.json", pool.n_rows)
    assert (back.hash(), back.scheme) == (made.hash(), made.scheme)
    assert all(map(np.array_equal, back.valid, made.valid))
    again = partition(pool, 5, scheme="file", path=tmp_path / "partition.json")
    assert again.hash() == made.hash()
    with pytest.raises(DataError, match="is for 5 clients"):
        partition(pool, 4, scheme="file", path=tmp_path / "partition.json")


def test_a_partition_fits_its_own_data_only(pool, tmp_path):
    partition(pool, 5).save(tmp_path / "p.json")
    other = replace(pool, name="other")
    cut = replace(pool, n_train=pool.n_train - 1)  # as `data.rows` does
    for dataset, told in ((other, "with data="), (cut, "with n_train=")):
        with pytest.raises(DataError, match=f"it was made for a data set {told}"):
            partition(dataset, 5, scheme="file", path=tmp_path / "p.json")


def test_an_own_split_needs_test_examples(pool):
    train = replace(pool, n_train=pool.n_rows, columns={"client": np.arange(pool.n_rows) % 3})
    with pytest.raises(DataError, match=r"partition=own: data=.* has no test examples"):
        partition(train, scheme="own")


def test_a_foreign_file_needs_training_examples_only(pool, tmp_path):
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps({"train": [[5, 3], [7]]}))
    made = partition(pool, scheme="file", path=file)
    assert made.train[0].tolist() == [3, 5]
    assert np.array_equal(made.common, np.arange(600, 800))
    file.write_text(json.dumps({"train": [[5, 3], [7]], "test": [[1, 2], [2]]}))
    assert partition(pool, scheme="file", path=file).common.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "cannot be read as JSON"),
        ([1], "'train' must be"),
        ({"train": []}, "'train' must be"),
        ({"train": [[0, 800]]}, r"train\[0\] has example number 800; numbers must be from 0 to 799"),
        ({"train": [[-1]]}, "has example number -1"),
        ({"train": [[0.5]]}, "integers"),
        ({"train": [[True]]}, "integers"),
        ({"train": [[1, 1]]}, "has example number 1 twice"),
        ({"train": [[1], [1]]}, "example 1 is in two"),
        ({"train": [[1]], "valid": [[1]]}, "example 1 is in two"),
        ({"train": [[1], [2]], "test": [[3]]}, "one list for each of the 2 clients"),
        ({"train": [[1], [2]], "test": [[2], [3]]}, "example 2 is in both"),
        ({"train": [[1]], "common": [1]}, "example 1 is in both"),
        ({"train": [[1]], "hash": "0" * 32}, "hash does not match"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, content, message):
    file = tmp_path / "theirs.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message):
        Partition.load(file, 800, 600)
    with pytest.raises(DataError, match="cannot be read"):
        Partition.load(tmp_path / "absent.json", 800)


def test_counts_are_per_client_and_class(pool):
    made = partition(pool, 5, alpha=1.0)
    counts = made.counts(pool.labels, 12)
    assert counts.shape == (5, 12)
    assert counts.sum(axis=1).tolist() == [len(rows) for rows in made.train]
    assert counts[2, 4] == (pool.labels.numpy()[made.train[2]] == 4).sum()
    with pytest.raises(DataError, match="split='tset'"):
        made.counts(pool.labels, 10, "tset")


def test_owners_that_are_left_out_are_counted(caplog):
    owners = ["a"] * 20 + ["b"] * 20 + ["c"] * 3 + ["d"] * 4
    pool = from_arrays(np.zeros((47, 2), np.float32), np.arange(47) % 2, columns={"owner": owners})
    assert partition(pool, scheme="natural", column="owner").n_clients == 2
    assert (
        "left out 2 of 4 owners, with 7 examples, because each has fewer than partition.min_examples=10" in caplog.text
    )


def regression(n=200):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 2)).astype(np.float32)
    site = rng.integers(0, 4, n).astype(str)
    return from_arrays(x, 100 * x[:, 0], task="regression", columns={"site": site})


def test_numbers_are_divided_by_quantile_bins():
    data = regression()
    skewed = partition(data, 4, alpha=0.05, bins=4, min_examples=5)
    groups = data.strata(4)
    assert len(groups.names) == 4
    counts = skewed.counts(groups.of, 4)
    assert (counts.max(1) / counts.sum(1)).mean() > 0.7


def test_a_column_may_take_the_place_of_classes():
    data = regression()
    made = partition(data, 4, scheme="pathological", classes_per_client=1, by="site", min_examples=5)
    sites = [set(data.columns["site"][rows]) for rows in made.train]
    assert [len(mine) for mine in sites] == [1, 1, 1, 1]
    assert made.scheme["by"] == "site"
    with pytest.raises(DataError, match=r"partition\.by=sit: no such column"):
        partition(data, 4, by="sit")
    bare = from_arrays(np.zeros((40, 2)), np.arange(40), name="bare", task="regression")
    with pytest.raises(DataError, match=r"partition\.by=sit: data=bare has no columns; remove it"):
        partition(bare, 4, by="sit")


def test_a_repaired_draw_moves_examples_and_says_how_many(caplog):
    data = regression()
    made = partition(data, 12, alpha=0.01, min_examples=12, repair=True)
    sizes = [len(a) + len(b) for a, b in zip(made.train, made.test, strict=True)]
    assert (min(sizes), sum(sizes)) == (12, 200)
    assert "moved" in caplog.text


def test_the_default_scheme_follows_from_the_data():
    tokens = np.ones((30, 4), np.int64)
    assert default_scheme(from_arrays(np.zeros((30, 2)), np.arange(30) % 2)) == "dirichlet"
    assert default_scheme(from_arrays(tokens, tokens, task="language")) == "iid"
    assert default_scheme(from_arrays(np.zeros((30, 2)), np.ones(30), task="regression")) == "iid"
    owners = {"owner": np.arange(30) % 3}
    assert default_scheme(from_arrays(tokens, tokens, task="language", columns=owners)) == "natural"
    numbered = from_arrays(tokens, tokens, task="language", columns={"id": np.arange(len(tokens))})
    assert default_scheme(numbered) == "iid"
    with pytest.raises(DataError, match="choose another column or partition"):
        partition(numbered, 2, scheme="natural", column="id")
    with pytest.raises(DataError, match="next tokens have no classes to skew; use partition=natural, iid or quantity"):
        partition(from_arrays(tokens, tokens, task="language"), 3)


def test_owners_keep_their_names(tmp_path):
    data = regression()
    made = partition(data, scheme="natural", column="site")
    assert made.owners == ("0", "1", "2", "3")
    made.save(tmp_path / "p.json")
    assert Partition.load(tmp_path / "p.json", data.n_rows).owners == made.owners


def test_a_partition_may_be_given():
    data = regression(40)
    by_number = given_partition([range(10), range(10, 40)], data, test_fraction=0.5)
    assert [len(rows) for rows in by_number.train] == [5, 15]
    by_owner = given_partition(["b"] * 10 + ["a"] * 30, data, test_fraction=0.5)
    assert (by_owner.owners, [len(rows) for rows in by_owner.train]) == (("a", "b"), [15, 5])
    assert given_partition(by_owner, data) is by_owner
    for wrong, message in (
        ([range(10), range(5, 15)], "belongs to two clients"),
        ([range(10), range(30, 41)], "they must be from 0 to 39"),
        (["a"] * 39, "39 owners for 40 examples"),
        ([range(3), []], "at least one example"),
    ):
        with pytest.raises(DataError, match=message):
            given_partition(wrong, data)


@pytest.mark.parametrize("scheme", ["dirichlet", "pathological", "extended"])
def test_a_floor_gives_every_client_examples_of_every_class(scheme):
    data = load("digits")
    without, made = (partition(data, 10, scheme=scheme, class_floor=n) for n in (0, 5))
    counts, before = (p.counts(data.labels, 10) for p in (made, without))
    assert counts.min() >= 5 > before.min()
    assert (counts.sum(0) == before.sum(0)).all()
    assert all(np.array_equal(a, b) for a, b in zip(made.test, without.test, strict=True))
    assert sorted(np.concatenate(made.train)) == sorted(np.concatenate(without.train))
    assert made.hash() == partition(data, 10, scheme=scheme, class_floor=5).hash() != without.hash()
    assert (before[before > counts] > 5).all(), "only clients with enough give examples away"


def test_a_floor_that_is_too_high_is_refused():
    with pytest.raises(
        DataError, match=r"partition.class_floor=50: 6 clients need 300 training examples of each class"
    ):
        partition(load("digits"), 6, class_floor=50)
