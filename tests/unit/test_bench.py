"""`fedloom bench`: the workloads and measurements, and whether the loop used for comparison computes the same numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fedloom import tree
from fedloom.cli import main
from fedloom.config.settings import make_settings
from fedloom.errors import ConfigError, WorkerError
from fedloom.experiment.loop import GivenObjects
from fedloom.methods.registry import load_object
from fedloom.tools.bench import WORKLOADS, Stepped, Workload, dataset_for, machine_roof, measure, train_flop, workload

RIVAL = Path(__file__).parents[2] / "benchmarks" / "pfllib_style.py"
SMALL = {
    "method": {"name": "fedavg"},
    "model": {"name": "mlp", "hidden": 8},
    "clients": 4,
    "cohort": 2,
    "batch_size": 100,
    "partition": {"name": "iid"},
}


def small(**settings) -> Workload:
    return Workload(title="tiny", data="mnist", input_shape=(1, 28, 28), rows=(140, 20), settings=SMALL | settings)


@pytest.fixture(autouse=True)
def synthetic(monkeypatch):
    monkeypatch.delenv("FEDLOOM_DATA", raising=False)
    monkeypatch.setattr("fedloom.cli.benching.machine_roof", lambda **how: machine_roof(seconds=0.05, **how))


def stepped(work: Workload, folder: Path) -> Stepped:
    values = work.values(1.0) | {"engine": {"name": "sequential"}, "out": folder, "rounds": 9, "checkpoint_every": 0}
    return Stepped(make_settings(values), GivenObjects(dataset=dataset_for(work, 1.0)))


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_has_valid_settings_and_rows_in_proportion(name):
    work = workload(name)
    settings = make_settings(work.values(0.02))
    assert settings.clients == round(work.settings["clients"] * (0.02 if work.by_clients else 1))
    data = dataset_for(work, 0.02)
    assert (data.n_train, data.n_rows - data.n_train) == tuple(round(n * 0.02) for n in work.rows)
    assert data.input_shape == work.input_shape


SLOW = """
import os
from pathlib import Path
from fedloom.tools.bench import Times

class Slow:
    def __init__(self, problem, threads):
        self.place = Path(__file__).parent
        (self.place / "process").write_text(f"{os.getpid()} {problem.task.n_clients}")

    def round(self, cohort):
        with (self.place / "cohorts").open("a") as file:
            print(*cohort, file=file)
        return Times(100.0, 10.0, 1.0)
"""


def test_measure_times_all_contestants_in_the_same_rounds(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    rivals = {"slow": f"{tmp_path / 'slow.py'}:Slow"}
    found = measure(small(), ["sequential", "vectorised:2"], scale=1.0, rounds=3, rivals=rivals)
    assert list(found["contestants"]) == ["sequential", "vectorised:2", "slow"]
    cohorts = (tmp_path / "cohorts").read_text().splitlines()
    assert len(cohorts) == 4  # one for the warm-up
    assert len(set(cohorts)) > 1
    process, n_clients = map(int, (tmp_path / "process").read_text().split())
    assert process != os.getpid()  # engines' process settings must not affect this process
    assert n_clients == 4
    slow, first = found["contestants"]["slow"], found["contestants"]["sequential"]
    assert slow["train_s"] == {"median": 100.0, "low": 100.0, "high": 100.0}
    assert slow["times_as_long"]["train"]["median"] == pytest.approx(100 / first["train_s"]["median"], rel=0.5)
    assert first["times_as_long"]["as_it_does"]["median"] == 1.0
    json.dumps(found)


def test_a_rival_whose_process_ends_is_named(tmp_path, capfd):
    (tmp_path / "broken.py").write_text("def make(problem, threads):\n    raise SystemExit('no such data here')\n")
    where = f"{tmp_path / 'broken.py'}:make"
    with pytest.raises(WorkerError, match=f"rival={where}: its process ended"):
        measure(small(), ["sequential"], scale=1.0, rounds=1, rivals={"broken": where})
    assert "no such data here" in capfd.readouterr().err


def test_flops_are_those_of_the_matrix_products(tmp_path):
    rows = 2 * 30  # two clients of 40 examples each, three quarters of them for training
    inner, last = 784 * 8, 8 * 10
    forward, for_weights, for_hidden = inner + last, inner + last, last
    assert train_flop(stepped(small(), tmp_path / "run")) == 2 * rows * (forward + for_weights + for_hidden)


def test_flops_leave_out_examples_that_drop_last_drops(tmp_path):
    whole, dropped = (
        train_flop(stepped(small(batch_size=20, drop_last=drop), tmp_path / str(drop))) for drop in (False, True)
    )
    assert dropped == pytest.approx(whole * 20 / 30)


def test_roof_grows_with_the_cores_and_leaves_the_threads_alone():
    before = torch.get_num_threads()
    assert machine_roof(8, seconds=0.1) > 2 * machine_roof(1, seconds=0.1) > 1e8
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("method", ["fedavg", "fedmr"])
def test_pfllib_style_loop_computes_what_the_engine_computes(method, tmp_path):
    # with full batches the order of examples does not matter
    mine = stepped(small(method={"name": method, "local_epochs": 1, "lr": 0.5}), tmp_path / "run")
    rival = load_object(f"{RIVAL}:make", "rival")(mine.problem, 1)
    for _ in range(2 if method == "fedavg" else 1):  # recombination draws its own permutations
        cohort = mine.next_cohort()
        times = rival.round(cohort), mine.round(cohort)
        assert all(t.train > 0 and t.score > 0 and t.extra >= 0 for t in times)
    server = mine.hooks.deploy(mine.server, mine.done).common["weights"]["params"]
    theirs = {f"model.{name}": p.detach() for name, p in rival.server.named_parameters()}
    assert theirs.keys() == server.keys()
    assert all(torch.allclose(theirs[name], p, atol=1e-6) for name, p in server.items())
    start = mine.problem.modules(0)["model"].state_dict()
    assert not torch.equal(theirs["model.head.weight"], start["head.weight"])


def test_pfllib_style_fedrir_trains_every_net_and_keeps_private_ones(tmp_path):
    work = small(
        method={"name": "fedrir", "idm_mode": "released"}, model={"name": "fedrir_cnn"}, width=16, clients=2, cohort=1
    )
    mine = stepped(work, tmp_path / "run")
    rival = load_object(f"{RIVAL}:make", "rival")(mine.problem, 1)
    before = tree.clone({i: dict(c.nets.state_dict()) for i, c in enumerate(rival.clients)})
    rival.round([1])
    moved = {
        i: {name.split(".")[0] for name, p in c.nets.named_parameters() if not torch.equal(p.detach(), before[i][name])}
        for i, c in enumerate(rival.clients)
    }
    assert moved == {0: set(), 1: {"gfe", "csfe", "generator", "idm", "head"}}
    assert all(torch.isfinite(p).all() for p in rival.server.parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["w9"], "unknown workload 'w9'"),
        (["w1", "scale=2"], "scale=2: must be above 0 and at most 1"),
        (["w1", "scale=much"], "scale=much: must be a number"),
        (["w1", "rounds=0"], "rounds=0: must be at least 1"),
        (["w1", "rounds=1.5"], "rounds=1.5: must be an integer"),
        (["w1", "engin=sequential"], "unknown key 'engin' (did you mean 'engine'?)"),
        (["w4-mlp", "scale=0.01", "engine=warp"], "there is no engine 'warp'"),
        (
            ["w4-mlp", "scale=0.01", "engine=sequential:8"],
            "engine.lanes=8: applies only to engine=processes and vectorised",
        ),
        (["w4-mlp", "scale=0.01", "engine=processes:"], "engine.lanes=: must be an integer"),
        (["w4-mlp", "scale=0.01", "engine=processes:many"], "engine.lanes=many: must be an integer"),
        (["w4-mlp", "scale=0.01", "precision=fp8"], "precision=fp8: must be one of"),
        (["w1", "rival=nowhere.py:make"], "rival=nowhere.py:make: there is no file nowhere.py"),
        (["w3", "scale=0.001"], "are too few to give each"),
        (["w1", "w3", "scale=0.001"], "are too few to give each"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_measured(words, message, capsys, monkeypatch):
    def measured(**_):
        raise AssertionError

    monkeypatch.setattr("fedloom.cli.benching.machine_roof", measured)
    assert main(["bench", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_scale_out_of_range_is_refused_from_python_too():
    with pytest.raises(ConfigError, match="scale=0"):
        measure(small(), ["sequential"], scale=0)


def test_command_prints_tables_or_json(capsys):
    words = ["bench", "w4-mlp", "scale=0.005", "rounds=1", "engine=sequential"]
    assert main([*words, f"rival={RIVAL}:make"]) == 0
    out = capsys.readouterr().out
    assert "sequential" in out
    assert "pfllib_style" in out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["torch"] == torch.__version__
    assert 0 < found["workloads"]["w4-mlp"]["contestants"]["sequential"]["share_of_roof"] < 1.5
