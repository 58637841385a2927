"""Trees: structure and arithmetic."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom import tree

keys = st.text(st.characters(exclude_characters="/", exclude_categories=("Cs",)), min_size=1, max_size=4)
numbers = st.floats(-100, 100)
tensors = st.lists(numbers, max_size=3).map(lambda values: torch.tensor(values, dtype=torch.float64))
scalars = numbers.map(lambda value: torch.tensor(value, dtype=torch.float64))
trees = st.dictionaries(
    keys,
    st.recursive(tensors | scalars, lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=8),
    min_size=1,
    max_size=3,
)


def sample() -> tree.Tree:
    return {"a": {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(3.0)}, "b": torch.tensor([[4.0]])}


@given(trees)
def test_unflatten_inverts_flatten(some):
    assert list(tree.flatten(tree.unflatten(dict(tree.flatten(some))))) == list(tree.flatten(some))
    assert tree.equal(tree.unflatten(dict(tree.flatten(some))), some)


@given(st.lists(scalars, min_size=3, max_size=3), trees)
def test_unstack_inverts_stack(factors, some):
    several = [tree.map_tree(lambda leaf, f=factor: leaf * f, some) for factor in factors]
    stacked = tree.stack(several)
    assert all(leaf.shape[0] == 3 for leaf in tree.leaves(stacked))
    for back, was in zip(tree.unstack(stacked), several, strict=True):
        assert tree.equal(back, was)


@given(trees)
def test_functions_leave_their_inputs_alone(some):
    before = tree.clone(some)
    tree.add(some, some, 2.0)
    tree.sub(some, some)
    tree.dot(some, some)
    tree.mean([some, some])
    tree.merge(some, {"new": torch.zeros(1)})
    tree.zeros_like(some)
    assert tree.equal(before, some)


def test_flatten_joins_keys_in_the_order_of_the_dictionaries():
    assert [path for path, _ in tree.flatten(sample())] == ["a/x", "a/y", "b"]


def test_the_mean_is_weighted_and_summed_in_the_order_given():
    trees_ = [{"w": torch.tensor([value], dtype=torch.float32)} for value in (1e8, 1.0, -1e8)]
    shares = [0.5, 0.25, 0.25]
    in_order = torch.tensor([1e8], dtype=torch.float32) * 0.5
    for value, share in ((1.0, 0.25), (-1e8, 0.25)):
        in_order = in_order + share * torch.tensor([value], dtype=torch.float32)
    assert torch.equal(tree.mean(trees_, shares)["w"], in_order)


def test_the_mean_of_two_numbers():
    found = tree.mean([{"w": torch.tensor(1.0)}, {"w": torch.tensor(5.0)}], [0.75, 0.25])
    assert found["w"].item() == 2.0
    assert tree.mean([{"w": torch.tensor(1.0)}, {"w": torch.tensor(5.0)}])["w"].item() == 3.0


def test_the_mean_of_one_tree_is_that_tree():
    assert tree.equal(tree.mean([sample()]), sample())


def test_the_mean_rounds_counters():
    counters = [{"n": torch.tensor(value)} for value in (2, 2**53 - 1, 5)]
    assert tree.mean(counters[::2])["n"].item() == 4  # 3.5 rounds to even
    assert tree.mean(counters[:1])["n"].dtype == torch.int64
    assert tree.mean([counters[1]])["n"].item() == 2**53 - 1


def test_the_mean_refuses_invalid_inputs():
    with pytest.raises(ValueError, match="at least one tree"):
        tree.mean([])
    with pytest.raises(ValueError, match="1 trees but 2 shares"):
        tree.mean([sample()], [0.5, 0.5])


def test_merge_replaces_and_adds_without_copying():
    over = {"a": {"y": torch.tensor(9.0)}, "c": torch.tensor(1.0)}
    base = sample()
    merged = tree.merge(base, over)
    assert [path for path, _ in tree.flatten(merged)] == ["a/x", "a/y", "b", "c"]
    assert merged["a"]["y"] is over["a"]["y"]
    assert merged["a"]["x"] is base["a"]["x"]
    assert base["a"]["y"].item() == 3.0
    assert "c" not in base


def test_clone_shares_no_memory():
    base = sample()
    copy = tree.clone(base)
    copy["a"]["x"].zero_()
    assert base["a"]["x"].tolist() == [1.0, 2.0]


def test_arithmetic_by_hand():
    a, b = sample(), tree.map_tree(torch.ones_like, sample())
    assert tree.add(a, b, 2.0)["a"]["x"].tolist() == [3.0, 4.0]
    assert tree.sub(a, b)["b"].tolist() == [[3.0]]
    assert tree.dot(a, b).item() == 10.0
    assert tree.dot(a, b).ndim == 0
    assert tree.n_bytes(a) == 16


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"w": torch.tensor([1.0, float("nan")])}, True),
        ({"w": torch.tensor([1.0, 0.0])}, False),  # NaN is not 0
        ({"w": torch.tensor([1.0, float("inf")])}, False),
        ({"w": torch.tensor([[1.0, float("nan")]])}, False),
        ({"w": torch.tensor([1.0, float("nan")], dtype=torch.float64)}, False),
        ({"v": torch.tensor([1.0, float("nan")])}, False),
    ],
)
def test_equal_compares_structure_and_numbers(other, same):
    assert tree.equal({"w": torch.tensor([1.0, float("nan")])}, other) is same


def test_equal_distinguishes_infinity_from_the_largest_number():
    assert not tree.equal({"w": torch.tensor(float("inf"))}, {"w": torch.tensor(torch.finfo().max)})


def test_equal_ignores_the_order_of_keys():
    assert tree.equal(sample(), dict(reversed(sample().items())))


def test_the_mean_cosine_of_vectors_with_known_angles():
    half = {"a": {"w": torch.tensor([[1.0, 0.0]])}, "b": torch.tensor([0.0])}
    other = {"a": {"w": torch.tensor([[3.0, 0.0]])}, "b": torch.tensor([3.0])}  # at 45 degrees
    against = {"a": {"w": torch.tensor([[-2.0, 0.0]])}, "b": torch.tensor([0.0])}
    assert tree.mean_cosine([half, other]) == pytest.approx(0.5**0.5)
    assert tree.mean_cosine([half, other, against]) == pytest.approx(-1 / 3)
    assert tree.mean_cosine([half, tree.zeros_like(half)]) == 0


def test_copy_shared_copies_leaves_that_share_memory():
    uplink = {"w": torch.arange(6.0), "b": torch.ones(2)}
    server = {"w": uplink["w"][2:4], "slots": {"0": uplink["b"]}, "own": torch.zeros(2)}
    before, after = tree.clone(server), tree.copy_shared(server, [uplink])
    assert after["own"] is server["own"]
    for leaf in uplink.values():
        leaf.fill_(7)
    assert tree.equal(after, before)
    assert not tree.equal(server, before)


def test_counters_stay_integers_when_a_fraction_is_added():
    found = tree.add({"n": torch.tensor(3)}, {"n": torch.tensor(5)}, 0.7)
    assert (found["n"].dtype, found["n"].item()) == (torch.int64, 6)  # 6.5 to the even integer
    assert tree.not_tensor({"a": torch.zeros(1), "b": {"c": 3}}) == "'b/c' is an int"
