"""Steps that are recorded and replayed. A stand-in for CUDA graphs repeats the work in the same memory."""

import itertools
import logging

import pytest
import torch

from fedloom import tree
from fedloom.training.fast import step_cache
from fedloom.training.fast.cuda_graph import Recording
from fedloom.training.fast.step_cache import ReplayRules

SETTINGS = {"clients": 3, "cohort": 3, "rounds": 3, "batch_size": 16, "data.rows": 150, "model.hidden": 8}


class Recorder:
    """Counts recordings and replays."""

    def __init__(self):
        self.recorded = self.played = 0

    def __call__(self, work):
        grads, logs = work()
        self.recorded += 1

        def play():
            self.played += 1
            with torch.enable_grad():
                now = work()
            for mine, theirs in zip((grads, logs), now, strict=True):
                for name, value in mine.items():
                    value.copy_(theirs[name])

        return play, (grads, logs)


@pytest.fixture
def recorder(monkeypatch):
    """Record steps from the second step of a kind on, and treat every replay as faster."""
    recorder, seconds = Recorder(), itertools.cycle([1.0, 0.0])
    make = ReplayRules(lambda step, inputs: Recording(step, inputs, recorder), float("inf"), 16)
    monkeypatch.setattr(step_cache, "replay_rules", lambda *_: make)
    monkeypatch.setattr(step_cache, "TRIALS", 2)
    monkeypatch.setattr(step_cache, "shortest_s", lambda *_: next(seconds))
    return recorder


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
@pytest.mark.parametrize(
    ("method", "model"),
    [("fedavg", "mlp"), ("scaffold", "mlp"), ("fedrir", "mlp"), ("fedbn", "fedrir_cnn")],
)
def test_a_recorded_step_is_the_step(experiment, request, method, model, engine):
    settings = {**SETTINGS, "method": method, "model": model, "engine": engine}
    if model != "mlp":
        del settings["model.hidden"]
        settings["width"] = 16
    plain = experiment(**settings)
    plain.run()
    recorder = request.getfixturevalue("recorder")
    recorded = experiment(**settings)
    recorded.run()
    assert recorder.recorded > 0
    assert recorder.played > recorder.recorded  # each is replayed once for timing
    assert tree.equal(plain.server, recorded.server)
    assert all(tree.equal(plain.engine.client(i)._asdict(), recorded.engine.client(i)._asdict()) for i in range(3))
    logs = [[{k: v for k, v in row.items() if "loss" in k} for row in run.rows] for run in (plain, recorded)]
    assert logs[0] == logs[1]
    assert all(logs[0])


def test_inputs_that_did_not_change_are_not_copied_again(monkeypatch):
    recorder, copied = Recorder(), []
    inputs = {"w": torch.ones(3), "x": torch.ones(3), "down": torch.ones(3), "buffers": {}}
    play = Recording(lambda i: ({"w": i["w"] * i["x"] + i["down"]}, {"loss": i["x"].sum()}), inputs, recorder)
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, what: (copied.append(len(what)), copy(to, what)))
    now = {"w": torch.full((3,), 2.0), "x": torch.full((3,), 5.0), "down": torch.zeros(3), "buffers": {}}
    first = play(now)[1]["loss"]
    now["w"].add_(1)  # in place, like an optimiser
    now["x"] = torch.full((3,), 7.0)
    grads, logs = play(now)
    assert copied == [3, 2]
    assert grads["w"].tolist() == [21.0] * 3
    assert (float(first), float(logs["loss"])) == (15.0, 21.0)  # logged values do not change


@pytest.mark.parametrize(
    ("flaw", "reason"), [("stale", "a replay gave different bits"), ("refused", "RuntimeError: not while recording")]
)
def test_a_recording_that_fails_is_one_line_and_changes_nothing(
    experiment, recorder, monkeypatch, caplog, flaw, reason
):
    def flawed(work):
        if flaw == "refused":
            raise RuntimeError("not while recording\nand more")
        return lambda: None, work()  # never replayed

    make = ReplayRules(lambda step, inputs: Recording(step, inputs, flawed), float("inf"), 16)
    monkeypatch.setattr(step_cache, "replay_rules", lambda *_: make)
    monkeypatch.setattr(step_cache, "HOST", torch.device("meta"))  # on the host nothing is said
    run = experiment("fedavg", **SETTINGS)
    with caplog.at_level(logging.WARNING):
        run.run()
    lines = {record.getMessage() for record in caplog.records}
    assert lines == {f"one kind of step runs as written, without a CUDA graph: {reason}"}
    monkeypatch.undo()
    plain = experiment("fedavg", **SETTINGS)
    plain.run()
    assert tree.equal(plain.server, run.server)
