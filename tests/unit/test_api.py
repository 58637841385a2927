"""The Python interface: users' modules, arrays and methods, and models to keep."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fedloom
from fedloom.errors import UsageError
from fedloom.experiment.loop import Experiment
from fedloom.losses import cross_entropy
from fedloom.rng import Stream


def arrays(n=120, dim=5, n_classes=3):
    """Return three clusters that a linear model can separate."""
    y = np.arange(n) % n_classes
    x = Stream(0).normal((n, dim)).double().numpy() + 3 * np.eye(n_classes, dim)[y]
    return x, y


class Net(nn.Module):
    """A user's module with a BatchNorm."""

    def __init__(self, input_shape, n_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), 8), nn.BatchNorm1d(8), nn.ReLU())
        self.last = nn.Linear(8, n_classes)

    def forward(self, x):
        return self.last(self.layers(x))


@dataclass(frozen=True)
class Shrunken(fedloom.FedAvg):
    """FedAvg with a pull towards zero."""

    pull: float = 0.1

    def loss(self, nets, batch, down, memory):
        size = sum(p.square().sum() for p in nets.params.values())
        return cross_entropy(nets.model(batch.x), batch.y) + self.pull * size


@pytest.fixture
def run(tmp_path):
    made = 0

    def go(method="fedavg", **settings):
        nonlocal made
        made += 1
        chosen = {
            "data": {"name": "digits", "rows": 240}, "model": "mlp", "clients": 3, "rounds": 2, "batch_size": 16,
            "partition": {"name": "iid"}, "engine": {"name": "sequential", "threads": 1}, "progress": False, "out": tmp_path / f"api{made}",
        }  # fmt: skip
        return fedloom.run(method, **(chosen | settings))

    return go


def scores(run):
    """Compute the personal accuracy from the models that the run returns."""
    right = rows = 0
    for i in range(run.federation.n_clients):
        x, y = run.federation.test(i)
        logits = run.model(i)(x)
        right, rows = right + int((logits.argmax(1) == y).sum()), rows + len(y)
    return right / rows


@pytest.mark.parametrize("method", ["fedavg", "fedavg_ft", "local", "fedmr", "fedrir", "scaffold", "centralised"])
def test_the_models_predict_with_the_accuracy_that_was_reported(run, method):
    done = run(method, model="fedmr_cnn", partition={"name": "dirichlet", "alpha": 0.5})
    assert done.summary["personal_accuracy"]["final"] == scores(done)


def test_models_in_float64_accept_the_federations_examples(run):
    done = run(precision="fp64")
    assert done.summary["personal_accuracy"]["final"] == scores(done)


def test_a_model_is_a_plain_module(run):
    model = run("fedavg", model="resnet8").model(1)
    x = torch.randn(3, 1, 8, 8)
    assert not model.training
    assert model(x).shape == (3, 10)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == set(nn.ModuleDict({"nets": model.nets}).state_dict())


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_own_arrays_and_an_own_module(run, precision):
    x, y = arrays()
    done = run(
        data=fedloom.from_arrays(x, y, name="clouds"), model=Net, rounds=6, precision=precision, **{"method.lr": 0.2}
    )
    assert done.summary["data"] == "clouds"
    assert done.summary["model"] == "Net"
    assert done.summary["personal_accuracy"]["final"] > 0.8


def test_user_features_are_used_unchanged(run):
    x, y = arrays()
    federation = run(data=fedloom.from_arrays(x, y), model=Net, rounds=1).federation
    train, _ = federation.train(0)
    np.testing.assert_allclose(train.numpy(), x[federation.partition.train[0]], rtol=1e-6)


def test_an_instance_brings_its_initial_weights(run):
    torch.manual_seed(5)
    net = Net((1, 8, 8), 10)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    tiny = run(fedloom.FedAvg(lr=1e-12), model=net, rounds=1)
    kept = tiny.model(0).nets["model"].state_dict()
    torch.testing.assert_close(kept["head.weight"], before["last.weight"])
    assert all(
        torch.equal(p, before[name]) for name, p in net.state_dict().items()
    )  # the caller's module is not changed


def test_a_users_method_runs_like_a_registered_one(run):
    plain, pulled = run(fedloom.FedAvg()), run(Shrunken(pull=0.5))
    assert pulled.summary["method"] == "Shrunken"
    size = {k: sum(float(p.norm()) for p in done.model(0).parameters()) for k, done in (("a", plain), ("b", pulled))}
    assert size["b"] < size["a"]


def test_an_object_a_name_and_words_mean_the_same(run):
    by_object = run(fedloom.FedProx(mu=0.3, lr=0.1))
    by_name = run("fedprox", **{"method.mu": 0.3, "method.lr": 0.1})
    pd.testing.assert_frame_equal(untimed(by_object.metrics), untimed(by_name.metrics))


def untimed(table):
    return table.drop(columns=[c for c in table if "seconds" in c])


def test_a_run_shows_its_numbers_and_its_folder(run):
    done = run()
    assert done.metrics["round"].tolist() == [1, 2]
    assert set(done.clients["client"]) == {0, 1, 2}
    assert (done.folder / "summary.json").is_file()
    assert str(done.folder) in repr(done)
    assert f"{done.summary['personal_accuracy']['final']:.4f}" in repr(done)


def test_the_same_seed_gives_the_same_run_and_another_another(run):
    first, again, other = run(seed=3), run(seed=3), run(seed=4)
    pd.testing.assert_frame_equal(untimed(first.metrics), untimed(again.metrics))
    assert not untimed(first.metrics).equals(untimed(other.metrics))


def test_a_run_leaves_torch_as_it_was(run):
    dtype, threads, state = torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state()
    run("fedavg_ft", precision="fp64")
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
    assert torch.equal(state, torch.random.get_rng_state())


def test_scoring_more_often_or_otherwise_changes_no_training(run):
    settings = {"model": "resnet8", "rounds": 2}
    plain = run("fedavg_ft", **settings)
    watched = run("fedavg_ft", **settings, eval={"fitted": True, "general_every": 1, "clients": 2})
    assert watched.metrics["personal_accuracy_fitted"].notna().all()
    assert watched.metrics["general_accuracy"].notna().all()
    assert plain.metrics["server_accuracy"].equals(watched.metrics["server_accuracy"])
    assert plain.metrics["train.loss"].equals(watched.metrics["train.loss"])


def test_a_finished_run_cannot_be_resumed(run):
    done = run()
    with pytest.raises(fedloom.RunFolderError, match="finished"):
        fedloom.resume(done.folder, progress=False)
    with pytest.raises(fedloom.RunFolderError, match="already"):
        run(out=done.folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounz": 3}, "rounz"),
        ({"model": "mlpp"}, "mlpp"),
        ({"method": "fedavgg"}, "fedavgg"),
        ({"data": "digitz"}, "digitz"),
        ({"engine": {"name": "fast"}}, "there is no engine 'fast'"),
        ({"clients": 2000}, "clients=2000"),
        ({"models": "mlp,logistic", "method": "fedavg"}, "must be the same for all clients"),
    ],
)
def test_mistakes_are_usage_errors(run, settings, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(fedloom.UsageError, match=words):
        run(**settings)


def test_clients_with_models_of_their_own(run):
    done = run("local", models="mlp,logistic", rounds=1)
    assert done.summary["model"] == "mlp,logistic"
    assert len(list(done.model(0).parameters())) == 4
    assert len(list(done.model(1).parameters())) == 2
    assert done.summary["personal_accuracy"]["final"] == scores(done)


def test_scoring_works_without_clients_test_examples(run):
    x, y = arrays()
    x_test, y_test = arrays(30)
    data = fedloom.from_arrays(x, y, x_test, y_test)
    done = run("fedavg", data=data, model="logistic", partition={"name": "iid", "merge": False})
    assert done.federation.n_test(0) == 0
    assert done.summary["personal_accuracy"]["final"] == done.summary["server_accuracy"]["final"]


def test_a_partition_file_must_contain_test_and_validation_examples(run, tmp_path):
    x, y = arrays(40)
    data = fedloom.from_arrays(x, y)
    halves = [list(range(10)), list(range(20, 30))]

    def go(**settings):
        partition = {"name": "file", "path": str(tmp_path / "p.json")}
        return run(data=data, model="logistic", clients=2, partition=partition, **settings)

    (tmp_path / "p.json").write_text(json.dumps({"train": halves}))
    with pytest.raises(UsageError, match="there are no test examples; add 'test' or 'common'"):
        go()
    (tmp_path / "p.json").write_text(json.dumps({"train": halves, "common": [10, 11]}))
    with pytest.raises(UsageError, match=r"eval.valid=0.2: the partition file .* has no validation examples"):
        go(eval={"valid": 0.2})
    assert "valid_accuracy" not in go().metrics
    (tmp_path / "p.json").write_text(json.dumps({"train": halves, "common": [10, 11], "valid": [[12, 13], [30]]}))
    assert go().metrics["valid_accuracy"].isin([0, 1 / 3, 2 / 3, 1]).all()


@pytest.mark.parametrize("setting", ["method.lr", "data.rows", "data.path", "data.label", "data.factor"])
def test_settings_of_what_was_given_as_an_object_are_refused(run, setting):
    x, y = arrays(40)
    with pytest.raises(UsageError, match=f"^{setting}: the .* given as an object"):
        run(fedloom.FedAvg(lr=0.1), data=fedloom.from_arrays(x, y), model="logistic", clients=2, **{setting: 1})


@pytest.mark.parametrize("partition", [{"name": "iid"}, {"name": "dirichlet", "alpha": 1.0}])
def test_scores_that_follow_from_others_are_those_one_would_measure(run, partition):
    done = run("fedavg", partition=partition)
    experiment = Experiment.reopen(done.folder)
    measured = experiment.engine.score_server(experiment.hooks.deploy(experiment.server, experiment.done))
    last = done.metrics.iloc[-1]
    assert experiment.problem.one_model
    assert last["server_accuracy"] == last["general_accuracy"] == measured["right"].sum() / measured.n_rows
    assert measured.n_rows == len(experiment.data.partition.common)


def test_equally_many_client_and_common_test_examples_may_differ(run):
    x, y = arrays(150)
    rows = fedloom.from_arrays(x[:120], y[:120], x[120:], (y[120:] + 1) % 3)  # the official test set has wrong labels
    for fraction in (0.25, 0.5):  # 30 test examples of the clients' own, as many as official ones; and 60
        dealt = {"name": "iid", "merge": False, "test_fraction": fraction}
        done = run("fedavg", data=rows, model="logistic", partition=dealt, rounds=4, **{"method.lr": 0.5})
        assert (done.metrics["server_accuracy"] < 0.2).all()
        assert done.metrics["personal_accuracy"].iloc[-1] > 0.8


@pytest.mark.parametrize("method", ["fedper", "fedavg_ft", "fedrir", "fedbn"])
def test_clients_with_something_of_their_own_do_not_predict_as_the_server(run, method):
    done = run(method, model="fedrir_cnn", width=16, rounds=1)
    assert not Experiment.reopen(done.folder).problem.one_model


def test_a_reopened_run_predicts_as_it_ended_and_stays_as_it_is(run):
    done = run("fedper")
    before = {file: file.read_bytes() for file in done.folder.rglob("*") if file.is_file()}
    again = Experiment.reopen(done.folder)
    x, _ = again.data.common()
    assert torch.equal(again.personal_model(1)(x), done.model(1)(x))
    assert {file: file.read_bytes() for file in done.folder.rglob("*") if file.is_file()} == before


def test_a_run_without_checkpoint_cannot_be_reopened(run):
    with pytest.raises(fedloom.RunFolderError, match="checkpoint"):
        Experiment.reopen(run(checkpoint_every=0).folder)


def test_a_run_on_devices_is_not_taken_for_one_whose_clients_are_here(run):
    done = run("fedper")
    (done.folder / "federation.json").write_text("{}")
    with pytest.raises(fedloom.RunFolderError, match="on devices"):
        Experiment.reopen(done.folder)
    (done.folder / "summary.json").unlink()
    with pytest.raises(fedloom.RunFolderError, match="fedloom deploy run --resume"):
        fedloom.resume(done.folder, progress=False)


def test_predictions_are_in_the_terms_of_the_data(run):
    done = run("fedper", data="diabetes", model="mlp", clients=3, rounds=2)
    stored = done.federation.dataset
    rows = done.federation.partition.test[1]
    said = done.predict(1, stored.images[rows].numpy())
    inside = done.federation.test(1)[0]
    expected = done.model(1)(inside)[:, 0].double() * stored.objective.std[0] + stored.objective.mean[0]
    assert said.tolist() == pytest.approx(expected.tolist())
    assert 25 < said.mean() < 346
    with pytest.raises(UsageError, match="client=3: must be from 0 to 2"):
        done.predict(3, stored.images[:1].numpy())
    with pytest.raises(UsageError, match=r"inputs: must be number .10,., as in training"):
        done.predict(0, stored.images[:1, :4].numpy())


def test_predictions_name_classes_and_owners(run):
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    names = np.where(x[:, 0] > 0, "yes", "no")
    owners = np.array(["ann", "bob", "eve"])[np.arange(60) % 3]
    data = fedloom.from_arrays(x, names, columns={"owner": owners})
    done = run("local", data=data, model="mlp", rounds=3, partition="natural")
    assert set(done.predict("eve", x[:1000])) <= {"yes", "no"}
    assert (done.predict("eve", x) == done.predict(2, x)).all()
    with pytest.raises(UsageError, match="client=adam: no such client"):
        done.predict("adam", x)
    with pytest.raises(UsageError, match="client=ann: no such client; give a number from 0 to 1, or server"):
        run("local", data=data, model="mlp", rounds=1, partition="iid", clients=2).predict("ann", x)


TABLE = "age,job,smokes,income\n" + "".join(
    f"{20 + 7 * i % 40},{('nurse', 'clerk', 'smith')[i % 3]},{('yes', 'no')[i % 2]},{('low', 'high')[i * i % 3 % 2]}\n"
    for i in range(60)
)


@pytest.fixture
def people(tmp_path):
    (tmp_path / "people.csv").write_text(TABLE)
    return tmp_path / "people.csv"


def test_a_finished_run_predicts_from_its_folder_without_the_data(run, people, tmp_path):
    data = fedloom.load_data(people, label="income")
    done = run("fedavg", data=data, model="table_mlp", partition="iid")
    for what in ((done.folder / "partition.json"), people):
        assert what.is_file()
    table = pd.read_csv(people)
    opened = fedloom.open(done.folder)
    assert opened.finished
    assert opened.settings == done.settings.model_copy(update={"engine": opened.settings.engine})
    for client in (0, 2, "server"):
        assert (opened.predict(client, people) == done.predict(client, people)).all()
    said = opened.predict(1, table.drop(columns="income"), batch=7)
    chances = opened.predict_proba(1, table)
    assert list(chances.columns) == ["high", "low"]
    assert chances.sum(axis=1).to_numpy() == pytest.approx(np.ones(60))
    assert (chances.idxmax(axis=1) == said).all()
    assert opened.score(1, people) == {"accuracy": pytest.approx(np.mean(said == table["income"]))}
    assert opened.predict(0, {"age": 33, "job": "nurse", "smokes": "no"}).shape == (1,)
    assert opened.metrics.shape == done.metrics.shape
    x = done.federation.rows([3])[0]
    model = opened.model(0)
    for name, values in model.preprocess(table.iloc[3:4]).items():
        assert torch.equal(values, x[name])
    for raw in (table.to_numpy()[:2, :1].astype(np.uint8), ["nurse"], {"numbers": torch.ones(1, 2, dtype=torch.uint8)}):
        with pytest.raises(UsageError, match=r"for raw values, use run\.predict"):
            model(raw)
    with pytest.raises(UsageError, match=r"not in its folder: data; open it in Python with the same objects"):
        opened.federation  # noqa: B018
    assert fedloom.open(done.folder, data=data).federation.n_clients == 3


def test_methods_that_adapt_need_the_data_or_to_be_told_not_to_adapt(run, people):
    data = fedloom.load_data(people, label="income")
    done = run("fedavg_ft", data=data, model="table_mlp", partition="iid")
    opened = fedloom.open(done.folder)
    with pytest.raises(UsageError, match=r"FedAvgFT adapts models .* adapt=False"):
        opened.predict(0, people)
    plain = opened.predict_proba(0, people, adapt=False)
    assert np.array_equal(plain, done.predict_proba(0, people, adapt=False))
    assert not np.array_equal(plain, done.predict_proba(0, people))
    whole = fedloom.open(done.folder, data=data)
    assert np.array_equal(whole.predict_proba(0, people), done.predict_proba(0, people))
    named = run("fedavg_ft", model="mlp")  # the data have a name, so they are found
    again = fedloom.open(named.folder)
    digits = fedloom.load_data("digits").images[:5]
    assert np.array_equal(again.predict_proba(1, digits), named.predict_proba(1, digits))


def test_the_servers_model_and_tasks_without_probabilities(run, people):
    done = run("local", data="diabetes", model="mlp")
    x = fedloom.load_data("diabetes").images[:2]
    with pytest.raises(UsageError, match="client=server: Local has no server model"):
        done.predict("server", x)
    with pytest.raises(UsageError, match="task=regression has none; use predict"):
        done.predict_proba(0, x)
    with pytest.raises(UsageError, match="batch=0: must be at least 1"):
        done.predict(0, x, batch=0)
    with pytest.raises(UsageError, match=r"unknown key 'data\.lable'"):
        fedloom.load_data(people, lable="income")
    with pytest.raises(UsageError, match="is not a run folder"):
        fedloom.open(people.parent)
    (done.folder / "preprocess.json").write_text("{}")
    with pytest.raises(UsageError, match=r"preprocess\.json (is not|has)"):
        fedloom.open(done.folder)


def test_a_comparison_in_python(people, tmp_path):
    data = fedloom.load_data(people, label="income")
    common = {"model": "table_mlp", "clients": 2, "rounds": 1, "partition": "iid", "progress": False}
    methods = {"fedavg": "fedavg", "near": fedloom.FedProx(mu=0.5)}
    found = fedloom.compare(methods, data=data, seeds=[0, 1], out=tmp_path / "c", **common)
    assert list(found.runs) == ["fedavg-seed0", "near-seed0", "fedavg-seed1", "near-seed1"]
    assert found.folder == tmp_path / "c"
    assert list(found.table.index) == ["fedavg", "near"]
    first = np.mean([found.runs[f"near-seed{s}"].summary["personal_accuracy"]["final"] for s in (0, 1)])
    assert found.table.loc["near", "personal final"] == pytest.approx(first)
    assert found.pairs.loc["near", "seeds"] == 2
    run = found.runs["near-seed1"]
    assert run.settings.method.options["mu"] == 0.5
    assert len(run.predict(1, people)) == 60
    assert run.federation.n_clients == 2
    for wrong, message in (
        (["fedavg", "fedavg"], "two methods have the same name"),
        (fedloom.FedAvg(), "must be a list of methods"),
        ([Shrunken()], "Shrunken is not registered"),
        (["fedawg"], "did you mean 'fedavg'"),
    ):
        with pytest.raises(UsageError, match=message):
            fedloom.compare(wrong, data=data, out=tmp_path / "d", **common)
    with pytest.raises(UsageError, match=r"method\.lr: a method was given as an object"):
        fedloom.compare(methods, data=data, **common, **{"method.lr": 0.02})
    named = fedloom.compare(["fedavg"], data=data, out=tmp_path / "e", **common, **{"method.lr": 0.02})
    assert named.runs["fedavg-seed0"].settings.method.options["lr"] == 0.02
    with pytest.raises(UsageError, match=r"pass seeds=\[\.\.\.\]"):
        fedloom.compare(["fedavg"], seed=1)
    assert not (tmp_path / "d").exists()


def test_texts_are_predicted_and_continued(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("ann", "bob"):
        (tmp_path / "texts" / f"{name}.txt").write_text("abcd " * 200)
    data = fedloom.load_data(tmp_path / "texts", task="language", length=12)
    common = {"progress": False, "engine": {"name": "sequential"}, "method.lr": 0.02, "method.optimizer": "adam"}
    run = fedloom.run("fedavg", data=data, model="lm_lstm", rounds=4, out=tmp_path / "lm", **common)
    opened = fedloom.open(run.folder)
    assert opened.generate("bob", "abcd ab", 8) == "abcd abcd abcd "
    drawn = opened.generate("server", "abcd", 20, temperature=3.0, seed=1)
    assert drawn == opened.generate("server", "abcd", 20, temperature=3.0, seed=1)
    assert drawn != opened.generate("server", "abcd", 20, temperature=3.0, seed=2)
    with pytest.raises(UsageError, match="n must be at least 1"):
        opened.generate("bob", "a", 0)
    rows = "".join(f"{'good nice fine' if i % 2 else 'bad sad poor'} {'abc'[i % 3]},{i % 2}\n" for i in range(80))
    (tmp_path / "reviews.csv").write_text("words,label\n" + rows)
    reviews = fedloom.load_data(tmp_path / "reviews.csv", text="words", label="label", tokens="words")
    run = fedloom.run("fedavg", data=reviews, model="text_mean", clients=2, rounds=4, out=tmp_path / "t", **common)
    assert fedloom.open(run.folder).predict(0, ["nice and fine", "how sad"]).tolist() == ["1", "0"]
    with pytest.raises(UsageError, match=r"needs a run with data\.task=language"):
        run.generate(0, "good")
