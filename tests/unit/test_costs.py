"""Costs of local updates: operations compared with closed forms and a whole update, memory with its actual use, and seconds by phase."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedloom import tree
from fedloom.config.settings import make_settings
from fedloom.engines import Sequential
from fedloom.engines.local import CohortMember
from fedloom.experiment.costs import Costs, Live, pieces
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.method import Sweep, Train
from fedloom.methods.registry import METHODS
from fedloom.optim import sgd
from fedloom.rng import Stream
from fedloom.training.batches import Plan, Rows
from fedloom.training.context import ClientContext
from fedloom.training.gradients import Gradients
from fedloom.training.turn import client_update

TINY = {"data": {"name": "digits", "rows": 120}, "clients": 2, "rounds": 2, "batch_size": 7}
TINY |= {"engine": {"name": "sequential"}, "partition": {"name": "dirichlet", "alpha": 1.0}}


def experiment(tmp_path, method, model=None, **settings):
    values = TINY | {"method": method, "model": model or {"name": "mlp", "hidden": 8}, "out": tmp_path / "run"}
    return Experiment(make_settings(values | settings))


def test_a_linear_model_takes_four_operations_a_row_and_weight(tmp_path):
    run = experiment(tmp_path, {"name": "fedavg"}, {"name": "logistic"})
    costs, n = Costs(run.problem), run.data.n_train(0)
    # forward 2 B in out, the same for the weights' gradient; no gradient flows into the inputs
    assert costs.flops(0, 0) == {"train": 4 * n * 64 * 10}


def test_hidden_layers_take_six(tmp_path):
    run = experiment(tmp_path, {"name": "fedavg", "local_epochs": 3})
    n = run.data.n_train(0)
    assert Costs(run.problem).flops(0, 0) == {"train": 3 * n * (4 * 64 * 8 + 6 * 8 * 10)}


@pytest.mark.parametrize("name", METHODS)
def test_three_small_steps_determine_the_cost_of_a_local_update(name, tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.training.fast.step_cache.TRIALS", 10**9)  # trying a replay is extra work, once
    run = experiment(tmp_path, {"name": name})
    costs = Costs(run.problem)
    message = costs.downlink.to(0)  # before counting starts, because a server may compute it
    with FlopCounterMode(display=False) as counter:
        Sequential(run.problem).update(0, CohortMember(0, 0, message))
    assert sum(costs.flops(0, 0).values()) == counter.get_total_flops() > 0


def test_terms_over_all_pairs_of_examples_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.training.fast.step_cache.TRIALS", 10**9)
    run = experiment(tmp_path, {"name": "fedrir", "idm_mode": "vclub"}, batch_size=30)
    costs = Costs(run.problem)
    with FlopCounterMode(display=False) as counter:
        Sequential(run.problem).update(0, CohortMember(0, 1, costs.downlink.to(0)))
    assert sum(costs.flops(1, 0).values()) == counter.get_total_flops()


def test_a_phase_that_is_switched_off_takes_nothing(tmp_path):
    run = experiment(tmp_path, {"name": "fedvtc", "finetune_every": 2})
    costs = Costs(run.problem)
    assert costs.flops(0, 0)["finetune"] == 0 < costs.flops(0, 1)["finetune"]
    assert costs.busiest(0).number == 1


def test_pieces_cover_all_examples():
    train = Train("fit", lambda *_: torch.zeros(()), ("model",), sgd(0.1), epochs=2)
    assert pieces(train, Plan(4), 11) == {4: 4, 3: 2}
    assert pieces(train, Plan(4, drop_last=True), 11) == {4: 4}
    assert pieces(Sweep("means", lambda *_: {}), Plan(4), 1100) == {512: 2, 76: 1}


def test_live_counts_what_is_there_at_once():
    given = torch.zeros(1000)
    with Live([given, given[:10]]) as live:
        assert live.now == 4000  # a view has no memory of its own
        first = given + 1
        del first
        second = given.view(10, 100) * 2
        assert live.now == 8000
    assert live.peak == 8000
    del second
    assert live.now == 4000


def test_phases_of_fedvtc_share_the_memory_of_the_largest(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.training.fast.step_cache.TRIALS", 10**9)
    run = experiment(tmp_path, {"name": "fedvtc"}, {"name": "fedavg_cnn"})
    costs, p = Costs(run.problem), run.problem
    by_phase, client, (x, y) = costs.peak_bytes(0), costs.received(0), p.data.train(0)
    gradients, down = Gradients(p.modules(0)), costs.downlink.to(0)
    with Live([x, y, *tree.leaves(client._asdict()), *tree.leaves(down)]) as live:
        start = live.now
        context = ClientContext(rows=Rows(x, y), plan=p.plan, task=p.task, rng=Stream(0))
        client_update(p.method, gradients, client, down, context, number=0)
    assert all(peak > start for peak in by_phase.values())
    # a whole local update also holds its initial weights and optimiser moments
    assert 0 <= live.peak - max(by_phase.values()) <= tree.n_bytes(client._asdict())
    assert live.peak - start < 0.7 * sum(peak - start for peak in by_phase.values())


def test_a_run_records_what_it_cost(tmp_path):
    run = experiment(tmp_path, {"name": "fedrir"})
    summary = run.run()
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    turns = pd.read_parquet(tmp_path / "run" / "clients.parquet").dropna(subset=["uplink_bytes"])
    phases = turns[["seconds.mcsl", "seconds.distil"]]
    assert (phases > 0).all(axis=None)
    assert (phases.sum(axis=1) < turns["seconds"]).all()
    assert summary["seconds_by_phase"] == pytest.approx(
        {"mcsl": phases["seconds.mcsl"].sum(), "distil": phases["seconds.distil"].sum()}
    )
    assert summary["flops_per_round"] == turns["flops"].sum() / 2
    weights = tree.n_bytes(Costs(run.problem).received(0).weights)
    assert summary["peak_client_bytes"] > 2 * weights  # Adam keeps two moments for the nets it trains


def test_lanes_share_the_time_of_a_phase(tmp_path):
    run = experiment(tmp_path, {"name": "fedavg"}, engine={"name": "vectorised"})
    run.run()
    turns = [row for row in run.client_rows if "seconds.train" in row]
    assert len(turns) == 4
    assert all(0 < row["seconds.train"] < row["seconds"] for row in turns)


def test_work_that_cannot_be_counted_does_not_end_a_run(tmp_path, caplog):
    from dataclasses import dataclass

    from fedloom import Method, Sweep

    @dataclass(frozen=True)
    class Whole(Method):
        def phases(self):
            return (Sweep("all", self.work),)

        def init_memory(self, weights, task, data):
            return {"all": {"n": torch.zeros(())}}

        def work(self, nets, batch, total, down, memory):
            if len(batch.y) < 10:
                raise ValueError("too few rows")
            return {"n": total["n"] + len(batch.y)}

    values = TINY | {"model": {"name": "mlp", "hidden": 8}, "out": tmp_path / "run"}
    summary = Experiment(make_settings(values), GivenObjects(method=Whole())).run()
    assert summary["flops_per_round"] is summary["peak_client_bytes"] is None
    assert "too few rows" in caplog.text


def test_a_run_in_double_precision_is_counted(experiment, caplog):
    summary = experiment("fedavg", model="fedmr_cnn", precision="fp64").run()
    assert summary["flops_per_round"] > 0
    assert summary["peak_client_bytes"] > 0
    assert not caplog.records
