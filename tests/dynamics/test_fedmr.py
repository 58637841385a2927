"""FedMR's recombination: invariants and units."""

from dataclasses import replace

import pytest
import torch

from fedloom import ConfigError, FedMR, Round, Stream, tree
from fedloom.method import Arrival
from fedloom.models import arch
from fedloom.nets import block_of, layer_of, read_weights

N_SLOTS = 5
UNITS = ("layer", "tensor", "block", "segment")


@pytest.fixture(scope="module")
def weights():
    return read_weights({"model": arch("resnet8", (1, 8, 8), 10).model()})


def models(weights):
    """Return models. All numbers of model i are i."""
    return [tree.map_tree(lambda leaf, i=i: torch.full_like(leaf, i), weights) for i in range(N_SLOTS)]


def recombined(method, weights, number=0, members=range(N_SLOTS)):
    members = list(members)
    every = models(weights)
    server = {"slots": tree.stack([tree.map_tree(lambda leaf: torch.full_like(leaf, -1), weights)] * N_SLOTS)}
    arrivals = tuple(Arrival(10 + slot, slot, 1 / len(members)) for slot in members)
    round = Round(number, 20, arrivals, Stream(0, "server", number))
    return method.aggregate(server, [{"weights": every[slot]} for slot in members], round)["slots"]


def origins(slots):
    """Return, for every tensor, the model from which each slot's copy came."""
    found = {}
    for path, leaf in tree.flatten(slots):
        flat = leaf.reshape(N_SLOTS, -1)
        assert bool((flat == flat[:, :1]).all())  # a tensor is never a mixture
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
def test_tensors_of_a_unit_stay_together_and_units_are_shuffled_separately(weights, unit, owner):
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
    assert counts.min() > 150  # 200 expected, standard deviation 13
    assert counts.max() < 250


def test_the_first_stage_fills_all_slots_with_the_mean(weights):
    slots = recombined(FedMR(first_stage_rounds=3), weights, number=2)
    assert all(bool((leaf == 2).all()) for leaf in tree.leaves(slots))
    assert set(origins(recombined(FedMR(first_stage_rounds=3), weights, number=3)).values()) != {(2,) * N_SLOTS}


def test_a_lost_clients_slot_goes_into_the_recombination_as_it_is(weights):
    found = origins(recombined(FedMR(), weights, members=[0, 1, 3, 4]))
    assert {tuple(sorted(o)) for o in found.values()} == {(-1, 0, 1, 3, 4)}


def test_a_model_takes_its_own_place_and_not_that_of_a_lost_client(weights):
    every = models(weights)
    server = {"slots": tree.stack([tree.map_tree(lambda leaf: leaf + 10, model) for model in every])}
    members = (0, 1, 3, 4)
    arrivals = tuple(Arrival(10 + slot, slot, 0.25) for slot in members)
    after = FedMR().aggregate(server, [{"weights": every[i]} for i in members], Round(0, 20, arrivals, Stream(0)))
    assert {tuple(sorted(o)) for o in origins(after["slots"]).values()} == {(0, 1, 3, 4, 12)}


def test_each_member_gets_the_slot_of_its_place(weights):
    method = FedMR()
    server = {"slots": tree.stack(models(weights))}
    down = method.downlink(server, [7, 3, 9], Round(0, 20, (), Stream(0)))
    for slot in range(3):
        assert tree.equal(down.to(slot)["weights"], models(weights)[slot])


def test_the_logs_are_the_similarity_of_returned_models_and_updates():
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


def exchanged(method, weights, n=N_SLOTS, seed=0):
    uplinks = [{"weights": model} for model in models(weights)[:n]]
    return [uplink["weights"] for uplink in method.exchange(uplinks, Stream("exchange", seed))]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("n", [2, 3, N_SLOTS])
def test_after_a_secure_exchange_the_server_sees_no_clients_whole_model(weights, unit, n):
    method = FedMR(unit=unit, secure=True)
    assert method.exchanges
    for seed in range(20):
        seen = exchanged(method, weights, n, seed)
        assert tree.structure(tree.stack(seen)) == tree.structure(tree.stack(models(weights)[:n]))
        for piece in method.units(weights):
            owners = [{float(v) for kind, name in piece for v in model[kind][name].unique()} for model in seen]
            assert all(len(owner) == 1 for owner in owners)  # a unit comes whole from one client
            assert {owner for each in owners for owner in each} == set(range(n))  # each client's unit is there once
        for model in seen:
            assert len({float(v) for leaf in tree.leaves(model) for v in leaf.unique()}) > 1


def test_two_clients_with_two_units_can_still_hide(weights):
    small = {"params": {"a.w": torch.zeros(1), "b.w": torch.zeros(1)}, "buffers": {}}
    for seed in range(50):
        for model in exchanged(FedMR(secure=True), small, 2, seed):
            assert float(model["params"]["a.w"]) != float(model["params"]["b.w"])
    for uplinks, unit in ((models(small)[:1], "layer"), (models(small), "segment")):
        with pytest.raises(ConfigError, match="needs at least two clients and two units"):
            FedMR(unit=unit, segment=1.0, secure=True).exchange([{"weights": m} for m in uplinks], Stream(0))


def test_a_secure_round_deploys_the_same_model(experiment):
    runs = [experiment("fedmr", rounds=1, **{"method.secure": secure, "method.lr": 0.1}) for secure in (False, True)]
    plain, secure = (run.run() and run for run in runs)
    deployed = [run.hooks.deploy(run.server, run.done).common for run in (plain, secure)]
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13) or a, *deployed)
    one, other = plain.ledger.kinds, secure.ledger.kinds
    for way in ("uplink", "downlink"):
        whole = sum(one["uplink"].values())
        assert other[way] == {**one[way], "exchange": whole}  # every model once more up and once more down
    assert secure.client_rows[0]["uplink_bytes"] == 2 * plain.client_rows[0]["uplink_bytes"]
    assert "server.update_cosine" in plain.rows[0]
    assert "server.update_cosine" not in secure.rows[0]


@pytest.mark.parametrize("devices", [{}, {"devices.dropout": 0.3}])
@pytest.mark.parametrize("sick", [None, 1])
def test_in_a_secure_round_the_server_receives_what_clients_exchanged(experiment, monkeypatch, devices, sick):
    """Each unit comes from an accepted uplink, in another client's model. No unit comes from a lost or rejected client."""
    settings = {"clients": 6, "rounds": 1, "method.lr": 0.1, **devices}
    run = experiment("fedmr", **settings, **{"method.secure": True})
    replies, received, train = [], [], run.engine.train

    def watched(number, cohort, down):
        for reply in train(number, cohort, down):
            broken = tree.map_tree(lambda t: t * float("nan"), reply.uplink) if reply.client == sick else reply.uplink
            replies.append(replace(reply, uplink=broken, is_finite=False))
        return replies

    aggregate = type(run.method).aggregate

    def seen(method, server, uplinks, round):
        received.extend(uplink["weights"] for uplink in uplinks)
        return aggregate(method, server, uplinks, round)

    monkeypatch.setattr(run.engine, "train", watched)
    monkeypatch.setattr(type(run.method), "aggregate", seen)
    run.run()
    sent = [reply.uplink["weights"] for reply in replies if reply.client != sick]
    assert (len(sent) < 6) == bool(devices or sick)
    assert len(received) == len(sent)
    assert not any(tree.equal(whole, own) for whole in received for own in sent)
    for (path, _), *_ in zip(tree.flatten(sent[0]), strict=False):
        mine, theirs = ([dict(tree.flatten(model))[path] for model in models] for models in (sent, received))
        assert all(any(torch.equal(t, m) for m in mine) for t in theirs)
        assert sum(t.double().sum() for t in theirs) == pytest.approx(float(sum(m.double().sum() for m in mine)))


def test_a_secure_exchange_and_differences_do_not_go_together(experiment):
    with pytest.raises(ConfigError, match="uplink=int8: fedmr lets clients exchange parts of uplinks"):
        experiment("fedmr", uplink="int8", **{"method.secure": True})


def test_patience_ends_the_first_stage_when_similarity_stops_rising():
    method = FedMR(first_stage_rounds=10, first_stage_patience=2)
    flat = {"params": {"a.w": torch.zeros(2), "b.w": torch.zeros(2)}, "buffers": {}}
    server = {
        "slots": tree.stack([flat] * 2),
        "stage": {"best": torch.tensor(-1.0).double(), "rounds": torch.tensor(0)},
    }
    arrivals = tuple(Arrival(i, i, 0.5) for i in (0, 1))
    stages = []
    for number, angle in enumerate([1.0, 0.5, 0.7, 0.4, 0.4, 0.6, 0.1, 0.1]):  # angle between the two returned models
        stages.append(method.averages(server, number))
        ends = [torch.tensor([1.0, 0.0]), torch.stack([torch.tensor(angle).cos(), torch.tensor(angle).sin()])]
        models = [{"params": {"a.w": end, "b.w": torch.zeros(2)}, "buffers": {}} for end in ends]
        round = Round(number, 20, arrivals, Stream(0, number))
        server = method.aggregate(server, [{"weights": model} for model in models], round)
    assert stages == [True] * 6 + [False] * 2  # most similar in round 3, not more in rounds 4 and 5


def test_patience_lasts_over_rounds_and_is_logged(experiment):
    settings = {"method.first_stage_rounds": 4, "method.first_stage_patience": 1}
    run = experiment("fedmr", rounds=6, **settings)
    run.run()
    logged = [row["server.first_stage"] for row in run.rows]
    assert logged == sorted(logged, reverse=True)
    assert logged[0] == 1
    assert logged[4:] == [0, 0]
    with pytest.raises(ConfigError, match="first_stage_patience=3: must be at most first_stage_rounds"):
        experiment("fedmr", **{"method.first_stage_patience": 3})
