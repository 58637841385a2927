"""FedMR's recombination: what it keeps, and what stays together."""

import pytest
import torch

from fedloom import FedMR, Round, Stream, tree
from fedloom.method import Arrival
from fedloom.models import arch
from fedloom.nets import block_of, layer_of, read_weights

N_SLOTS = 5
UNITS = ("layer", "tensor", "block", "segment")


@pytest.fixture(scope="module")
def weights():
    return read_weights({"model": arch("resnet8", (1, 8, 8), 10).model()})


def models(weights):
    """Model i holds nothing but the number i."""
    return [tree.map_tree(lambda leaf, i=i: torch.full_like(leaf, i), weights) for i in range(N_SLOTS)]


def recombined(method, weights, number=0, members=range(N_SLOTS)):
    members = list(members)
    every = models(weights)
    server = {"slots": tree.stack([tree.map_tree(lambda leaf: torch.full_like(leaf, -1), weights)] * N_SLOTS)}
    arrivals = tuple(Arrival(10 + slot, slot, 1 / len(members)) for slot in members)
    round = Round(number, 20, arrivals, Stream(0, "server", number))
    return method.aggregate(server, [{"weights": every[slot]} for slot in members], round)["slots"]


def origins(slots):
    """For every tensor, from which model each slot's copy came."""
    found = {}
    for path, leaf in tree.flatten(slots):
        flat = leaf.reshape(N_SLOTS, -1)
        assert bool((flat == flat[:, :1]).all())  # a tensor is never mixed from several
        found[path.partition("/")[2]] = tuple(flat[:, 0].long().tolist())
    return found


@pytest.mark.parametrize("unit", UNITS)
def test_the_multiset_of_tensors_and_the_mean_stay(weights, unit):
    slots = recombined(FedMR(unit=unit), weights)
    assert tree.structure(slots) == tree.structure(tree.stack(models(weights)))
    assert {tuple(sorted(o)) for o in origins(slots).values()} == {tuple(range(N_SLOTS))}
    for leaf in tree.leaves(tree.mean(tree.unstack(slots))):
        torch.testing.assert_close(leaf, torch.full_like(leaf, 2))


@pytest.mark.parametrize(("unit", "owner"), [("layer", layer_of), ("block", block_of), ("tensor", lambda name: name)])
def test_what_belongs_together_stays_together_and_the_rest_is_shuffled_on_its_own(weights, unit, owner):
    found = origins(recombined(FedMR(unit=unit), weights))
    by_unit = {}
    for name, came in found.items():
        by_unit.setdefault(owner(name), set()).add(came)
    assert {len(orders) for orders in by_unit.values()} == {1}
    assert len({next(iter(orders)) for orders in by_unit.values()}) > min(len(by_unit) // 2, 20) * 0.8


def test_segments_are_runs_of_tensors(weights):
    found = list(origins(recombined(FedMR(unit="segment", segment=0.25), weights)).values())
    assert 2 <= len(set(found)) <= 4
    one = list(origins(recombined(FedMR(unit="segment", segment=1.0), weights)).values())
    assert len(set(one)) == 1


def test_permutations_are_uniform(weights):
    small = {"params": {"model.head.bias": torch.zeros(1)}, "buffers": {}}
    method, counts = FedMR(), torch.zeros(N_SLOTS, N_SLOTS)
    for number in range(1000):
        came = origins(recombined(method, small, number))["model.head.bias"]
        counts[torch.arange(N_SLOTS), list(came)] += 1
    assert counts.min() > 150  # 200 expected, deviation 13
    assert counts.max() < 250


def test_the_first_stage_fills_all_slots_with_the_mean(weights):
    slots = recombined(FedMR(first_stage_rounds=3), weights, number=2)
    assert all(bool((leaf == 2).all()) for leaf in tree.leaves(slots))
    assert set(origins(recombined(FedMR(first_stage_rounds=3), weights, number=3)).values()) != {(2,) * N_SLOTS}


def test_a_lost_clients_slot_goes_into_the_recombination_as_it_is(weights):
    found = origins(recombined(FedMR(), weights, members=[0, 1, 3, 4]))
    assert {tuple(sorted(o)) for o in found.values()} == {(-1, 0, 1, 3, 4)}


def test_each_member_gets_the_slot_of_its_place(weights):
    method = FedMR()
    server = {"slots": tree.stack(models(weights))}
    down = method.downlink(server, [7, 3, 9])
    for slot in range(3):
        assert tree.equal(down.to(slot)["weights"], models(weights)[slot])


def test_the_log_tells_how_alike_the_returned_models_and_their_movements_are():
    slots = tree.stack([{"params": {"m.w": torch.tensor([float(k), 1.0])}, "buffers": {}} for k in range(3)])
    sent = tree.unstack(slots)
    arrivals = tuple(Arrival(10 + slot, slot, 0.5) for slot in (0, 2))
    step = {"params": {"m.w": torch.tensor([0.0, 1.0])}, "buffers": {}}
    uplinks = [{"weights": tree.add(sent[0], step, 1.0)}, {"weights": tree.add(sent[2], step, -1.0)}]  # (0, 2), (2, 0)
    logs = FedMR().server_logs({"slots": slots}, uplinks, Round(0, 20, arrivals, Stream(0)))
    assert logs == pytest.approx({"slot_cosine": 0.0, "update_cosine": -1.0})
    assert FedMR().server_logs({"slots": slots}, uplinks[:1], Round(0, 20, arrivals[:1], Stream(0))) == {}


def test_the_log_is_in_every_evaluated_row_and_the_first_round_starts_from_one_model(experiment):
    run = experiment("fedmr", rounds=4, eval_every=2, **{"method.lr": 1e-6})
    run.run()
    assert len(run.rows) == 2
    assert all(row["server.slot_cosine"] == pytest.approx(1, abs=1e-6) for row in run.rows)
    assert all(-1 < row["server.update_cosine"] < 1 for row in run.rows)
