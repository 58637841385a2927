"""Clients between rounds, in memory that processes share."""

import torch

from fedloom import tree
from fedloom.engines.stores import MappedStore, Slab
from fedloom.method import Client

KINDS = (0, 1, 0, 0, 1)


def kept(i, value):
    """Return a client's state: the parameters of its kind, and a counter in memory."""
    shape = (3,) if KINDS[i] == 0 else (2, 500_000)
    weights = {"params": {"head": torch.full(shape, float(value))}, "buffers": {}}
    return Client(weights, {"seen": torch.tensor(int(value))}, {}, {})


def blank(i):
    return kept(i, -1)


def test_every_process_sees_what_was_stored_and_blanks_of_the_others(tmp_path):
    mine, theirs = (MappedStore(blank, tmp_path, KINDS) for _ in range(2))
    assert list(mine.changed()) == []
    for i in (4, 0, 2):
        mine.put(i, kept(i, 10 + i))
    mine.put(0, kept(0, 7))
    assert list(theirs.changed()) == [0, 2, 4]
    for i, value in enumerate((7, -1, 12, -1, 14)):
        assert tree.equal(theirs.get(i)._asdict(), kept(i, value)._asdict())


def test_a_client_may_be_stored_under_other_names_of_its_own_tensors(tmp_path):
    store = MappedStore(
        lambda _: Client({"params": {"a": torch.zeros(2), "b": torch.ones(2)}, "buffers": {}}, {}, {}, {}),
        tmp_path,
        (0,),
    )
    store.put(0, store.get(0))
    params = store.get(0).weights["params"]
    swapped = {"params": {"a": params["b"], "b": params["a"]}, "buffers": {}}
    store.put(0, store.get(0)._replace(weights=swapped))
    assert store.get(0).weights["params"]["a"].tolist() == [1, 1]
    assert store.get(0).weights["params"]["b"].tolist() == [0, 0]


def test_clients_that_were_never_stored_take_no_space(tmp_path):
    store = MappedStore(lambda _: blank(1), tmp_path, [0] * 1000)  # 4 GB, if all were stored
    store.put(999, kept(1, 3))
    used = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
    assert 4_000_000 <= used < 20_000_000
    assert tree.equal(store.get(999)._asdict(), kept(1, 3)._asdict())


def test_a_client_that_keeps_nothing_is_not_stored(tmp_path):
    nothing = Client({"params": {}, "buffers": {}}, {}, {}, {})
    store = MappedStore(lambda _: nothing, tmp_path, (0, 0))
    store.put(1, nothing)
    assert list(store.changed()) == []
    assert store.get(1) == nothing


def test_a_file_that_is_enlarged_keeps_every_byte(tmp_path):
    """Two workers open the file of client states for the first time at about the same time. One of them may already have written to it."""
    Slab(tmp_path / "clients", 8).data.fill_(7)
    assert Slab(tmp_path / "clients", 16).data.tolist() == [7] * 8 + [0] * 8
