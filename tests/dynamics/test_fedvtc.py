"""FedVTC: its statistics, its losses with known answers, what each phase changes, and what is sent."""

import logging
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fedloom import Batch, ClientData, FedVTC, Local, Nets, Round, Stream, Task, Turn, from_arrays, tree
from fedloom.inputs import InputSpec
from fedloom.method import Client, init_opts
from fedloom.methods import feature_statistics
from fedloom.models import arch
from fedloom.nets import read_weights
from fedloom.objectives import Classification
from fedloom.training.batches import Plan, Rows
from fedloom.training.context import ClientContext
from fedloom.training.gradients import Gradients
from fedloom.training.turn import fresh_modules, run_phases
from small import spied


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


P, Y = 6, 4
TASK = Task(
    n_clients=3, max_cohort=3, objective=Classification.numbered(Y), spec=InputSpec.plain((1, 8, 8)), width=P, rounds=5
)
COVARIANCES = ("pooled", "class", "full")
QUICK = {"finetune_steps": 3, "n_synthetic": 8}


class Setting(NamedTuple):
    """One client with examples of classes 0 and 1, and a downlink with prototypes of classes 0, 1 and 3."""

    method: FedVTC
    modules: dict
    client: Client
    rows: Rows
    down: dict

    @property
    def nets(self):
        return Nets(self.modules, **self.client.weights)

    def worked(self, phases, down=None):
        context = ClientContext(rows=self.rows, plan=Plan(10), task=TASK, rng=Stream(2))
        found = run_phases(
            phases, Gradients(self.modules), self.client, down or self.down, context, turn=Turn(1, 4, 24)
        )
        return found[0], found[2]

    def with_statistics(self):
        return self._replace(client=self.worked(self.method.phases()[1:2])[0])


DATA, ROUND = ClientData(24, torch.tensor([12.0, 12.0, 0.0, 0.0])), Round(0, 1, (), Stream(0))


def setting(model="resnet8", **options):
    method, choice = FedVTC(**QUICK, **options), arch(model, TASK.input_shape, Y, P)
    modules = fresh_modules(lambda: method.nets(choice, TASK), Stream(0))
    weights = read_weights(modules)
    opts = init_opts((*method.phases(), *method.adapt()), weights)
    client = Client(weights, method.init_memory(weights, TASK, DATA), opts)
    rows = Rows(Stream(0).normal((24, 1, 8, 8)), Stream(1).integers(2, (24,)))
    server = method.init_server(weights, TASK, ROUND)
    server["prototypes"], server["counts"] = Stream(3).normal((Y, P)), torch.tensor([5.0, 7.0, 0.0, 2.0])
    server["variance"] = server["variance"] + (0.5 * torch.eye(P) if method.covariance == "full" else 0.5)
    return Setting(method, modules, client, rows, method.downlink(server, (), ROUND).common)


def covariance_of(z, y, form):
    """Compute the covariance within classes with NumPy."""
    away = np.concatenate([z[y == c] - z[y == c].mean(0) for c in range(Y) if (y == c).any()])
    if form == "class":
        return np.stack([z[y == c].var(0) if (y == c).any() else np.zeros(z.shape[1]) for c in range(Y)])
    return away.T @ away / len(z) if form == "full" else (away**2).mean(0)


@pytest.mark.parametrize("form", COVARIANCES)
def test_a_clients_statistics_are_numpys(form):
    s = setting(covariance=form).with_statistics()
    z, y = s.nets.body(s.rows.x).numpy(), s.rows.y.numpy()
    sent, _ = s.method.uplink(s.client, s.client.weights, s.down, Turn(1, 4, 24))
    assert sent["counts"].tolist() == np.bincount(y, minlength=Y).tolist()
    np.testing.assert_allclose(sent["prototypes"], [z[y == c].mean(0) for c in (0, 1)], rtol=1e-10)
    np.testing.assert_allclose(sent["variance"], covariance_of(z, y, form), rtol=1e-8, atol=1e-12)


def test_a_small_spread_far_from_zero_is_not_lost_in_float32():
    torch.set_default_dtype(torch.float32)
    s = setting("mlp")
    offset = {**s.client.weights["params"]}
    (name,) = [n for n in offset if n.startswith("body.") and n.endswith(".bias") and offset[n].shape == (P,)]
    offset[name] = offset[name] + 1000
    s = s._replace(client=s.client._replace(weights={"params": offset, "buffers": {}})).with_statistics()
    z, y = s.nets.body(s.rows.x).double().numpy(), s.rows.y.numpy()
    sent, _ = s.method.uplink(s.client, s.client.weights, s.down, Turn(1, 4, 24))
    assert sent["variance"].dtype == torch.float32
    np.testing.assert_allclose(sent["variance"], covariance_of(z, y, "pooled"), rtol=1e-4)


@pytest.mark.parametrize("form", COVARIANCES)
def test_the_servers_variance_is_that_of_all_examples_around_the_global_means(experiment, form):
    run = experiment(FedVTC(covariance=form, **QUICK), rounds=1, width=P)
    run.run()
    z, y = [], []
    for i in range(4):
        nets = Nets(run.problem.modules(0), **run.engine.client(i).weights)
        z.append(nets.body(run.data.train(i)[0]).numpy())
        y.append(run.data.train(i)[1].numpy())
    z, y = np.concatenate(z), np.concatenate(y)
    away = z - np.stack([z[y == c].mean(0) for c in range(10)])[y]
    expected = {
        "pooled": (away**2).mean(0),
        "full": away.T @ away / len(z),
        "class": np.stack([(away[y == c] ** 2).mean(0) for c in range(10)]),
    }
    np.testing.assert_allclose(run.server["variance"], expected[form], rtol=1e-9, atol=1e-12)


def test_a_uniform_mean_has_the_variance_of_equally_weighted_clients():
    inside, local = torch.tensor([[2.0], [4.0]]), torch.tensor([[[1.0]], [[5.0]]])
    alike = feature_statistics.total_variance(inside, local, torch.tensor([[3.0]]), torch.ones(2, 1), "pooled")
    by_rows = feature_statistics.total_variance(
        inside, local, torch.tensor([[2.0]]), torch.tensor([[3.0], [1.0]]), "pooled"
    )
    assert alike.tolist() == [3.0 + 4.0]
    assert by_rows.tolist() == [2.5 + 3.0]


def test_a_class_that_no_client_holds_keeps_its_statistics(experiment):
    run = experiment(FedVTC(covariance="class", **QUICK), cohort=1, rounds=3, width=P)
    rounds, servers = spied(run), [run.server]
    run.run(lambda *_: servers.append(run.server))
    known = torch.zeros(10, dtype=torch.bool)
    for turns, (before, after) in zip(rounds, pairwise(servers), strict=True):
        (reply,) = turns.replies
        held = run.data.train(reply.client)[1].bincount(minlength=10) > 0
        assert not held.all()
        for key in ("prototypes", "counts", "variance"):
            assert torch.equal(before[key][~held], after[key][~held])
        known |= held
        assert torch.equal(after["counts"] > 0, known)


@pytest.mark.parametrize("form", COVARIANCES)
def test_the_kl_is_that_of_two_normal_distributions(form):
    s = setting(covariance=form)
    z, y = Stream(5).normal((7, P)), torch.tensor([0, 1, 3, 0, 1, 3, 2])
    spread = 0.2 + Stream(6).uniform((7, P))
    sigma = feature_statistics.deviations(s.down["spread"], y, form).expand(7, P)
    each = torch.distributions.kl_divergence(
        torch.distributions.Normal(z, spread), torch.distributions.Normal(s.down["prototypes"][y], sigma)
    ).mean(1)
    assert s.method.kl(z, spread, y, s.down).item() == pytest.approx(
        each[:6].sum().item() / 7
    )  # class 2 has no prototype
    equal = s.method.kl(s.down["prototypes"][y], sigma, y, s.down)
    assert equal.item() == pytest.approx(0, abs=1e-14)


def test_without_matching_the_generator_is_the_limit_of_a_small_weight():
    """Matching is skipped, and all other draws and gradients are the same."""
    without, hardly = (setting(matching_weight=weight) for weight in (0.0, 1e-12))
    (none, logs), (limit, seen) = (s.worked(s.method.phases()[2:3]) for s in (without, hardly))
    for mine, its in zip(tree.leaves(none.weights), tree.leaves(limit.weights), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-9)
    assert logs["generator.reconstruction"] == pytest.approx(seen["generator.reconstruction"])
    assert "generator.matching" in seen
    assert "generator.matching" not in logs


@pytest.mark.parametrize("matching", ["mean", "mahalanobis", "real", "cycle"])
def test_the_matching_is_zero_where_it_should_be_and_only_there(matching):
    s = setting(matching=matching)
    labels, y = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 3, 3])
    targets = s.down["prototypes"][labels]
    z = s.down["prototypes"][y]
    assert s.method.match(targets, targets, labels, z, y, s.down).item() == pytest.approx(0, abs=1e-14)
    assert s.method.match(targets + 1, targets, labels, z, y, s.down) > 0.1
    nothing = s.down | {"counts": torch.zeros(Y)}
    assert s.method.match(targets + 1, targets, labels, z, y, nothing) == 0


def test_the_matching_of_means_forgives_what_averages_out():
    labels = torch.tensor([0, 0, 1, 1])
    around = torch.tensor([1.0, -1.0, 2.0, -2.0])[:, None].expand(4, P)
    for matching, zero in (("mean", True), ("mahalanobis", False)):
        s = setting(matching=matching)
        made = s.down["prototypes"][labels] + around
        found = s.method.match(made, made, labels, made, labels, s.down).item()
        assert (found == pytest.approx(0, abs=1e-14)) == zero


@pytest.mark.parametrize("form", COVARIANCES)
def test_latents_have_the_means_and_covariances_of_known_classes_alone(form):
    s = setting(covariance=form)
    n = 30_000
    draws = FedVTC(n_synthetic=n, covariance=form).draw_latents(Batch(s.rows.x, s.rows.y), TASK, Stream(4))
    labels, latents = s.method.latents(draws, s.down)
    assert labels.bincount(minlength=Y).tolist() == [n // 3, n // 3, 0, n // 3]
    for c in (0, 1, 3):
        torch.testing.assert_close(latents[labels == c].mean(0), s.down["prototypes"][c], rtol=0, atol=0.04)
        torch.testing.assert_close(
            latents[labels == c].T.cov(), (0.5 + 0.01 * (form == "full")) * torch.eye(P), rtol=0, atol=0.05
        )
    labels, latents = s.method.latents(draws, s.down | {"counts": torch.zeros(Y)})
    assert not labels.any()
    assert torch.isfinite(latents).all()


def parts_of(before, after):
    """Return the names of the nets whose parameters differ, and of those whose buffers differ."""
    return [
        {name.partition(".")[0] for name, t in part.items() if not torch.equal(t, before["weights"][kind][name])}
        for kind, part in after["weights"].items()
    ]


@pytest.mark.parametrize("options", [{}, {"learn_spread": True}, {"share_generator": True}])
def test_every_phase_touches_its_own_nets(options):
    s = setting(**options)
    fit, _, generator, _ = s.method.phases()
    (finetune,) = replace(s.method, finetune="end").adapt()

    def touched(at, phase):
        return parts_of(at.client._asdict(), at.worked([phase])[0]._asdict())

    assert touched(s, fit) == [{"body", "head"}, {"body"}]
    s = s.with_statistics()
    assert touched(s, generator) == [{"generator", "spread"} if "learn_spread" in options else {"generator"}, set()]
    assert touched(s, finetune) == [{"body", "head"}, set()]  # running statistics stay those of real images
    (head,) = FedVTC(finetune="end", finetune_part="head", **QUICK, **options).adapt()
    assert touched(s, head) == [{"head"}, set()]


def test_the_kl_has_a_gradient_only_if_the_spread_is_learnt():
    for learn in (False, True):
        s = setting(learn_spread=learn).with_statistics()
        params = {name: p.clone().requires_grad_() for name, p in s.client.weights["params"].items()}
        nets = Nets(s.modules, params, s.client.weights["buffers"])
        z, spread = s.nets.body(s.rows.x), s.method.own_spread(nets, s.rows.y, s.client.memory)
        kl = s.method.kl(z, spread, s.rows.y, s.down)
        assert kl.requires_grad == learn


@pytest.mark.parametrize("ready", ["no prototypes", "no turn yet"])
def test_without_statistics_fine_tuning_changes_nothing(ready):
    s = setting()
    (finetune,) = replace(s.method, finetune="end").adapt()
    if ready == "no prototypes":
        s = s.with_statistics()
        s = s._replace(down=s.down | {"counts": torch.zeros(Y), "prototypes": torch.zeros(Y, P)})
    after, _ = s.worked([finetune])
    assert tree.equal(after.weights, s.client.weights)


def test_fine_tuning_runs_in_every_nth_round_or_at_the_end(experiment):
    names = [[phase.name for phase in FedVTC(finetune=when).phases()] for when in ("every", "end", "never")]
    assert names == [["fit", "statistics", "generator", "finetune"], *[["fit", "statistics", "generator"]] * 2]
    assert [len(FedVTC(finetune=when).adapt()) for when in ("every", "end", "never")] == [0, 1, 0]
    run = experiment(FedVTC(finetune="every", finetune_every=2, **QUICK), rounds=4, width=P)
    run.run()
    steps = {row["round"]: "finetune.loss" in row for row in run.rows}
    assert steps == {1: False, 2: True, 3: False, 4: True}


@pytest.mark.parametrize("form", COVARIANCES)
def test_statistics_travel_and_no_weights(experiment, form):
    run = experiment(FedVTC(covariance=form, **QUICK), rounds=2, width=P, engine="debug+bytes+sequential")
    kinds = run.run()["bytes_by_kind"]
    held = sum(int((run.data.train(i)[1].bincount() > 0).sum()) for i in range(4))
    spread = {"pooled": P, "class": 10 * P, "full": P * P}[form]
    for way in ("uplink", "downlink"):
        assert "weights" not in kinds[way]
    assert kinds["uplink"]["prototypes"] == 2 * held * P * 8
    assert kinds["uplink"]["variance"] == 2 * 4 * spread * 8
    assert kinds["uplink"]["counts"] == 2 * 4 * 10 * 8


def test_a_shared_generator_travels_and_is_averaged(experiment):
    run = experiment(FedVTC(share_generator=True, **QUICK), rounds=2, width=P, engine="debug+bytes+sequential")
    run.run()
    assert {n.partition(".")[0] for part in run.server["weights"].values() for n in part} == {"generator"}
    n = [run.data.n_train(i) for i in range(4)]
    mean = tree.mean([run.method.travelling(run.engine.client(i).weights) for i in range(4)], [k / sum(n) for k in n])
    for name, p in mean["params"].items():
        torch.testing.assert_close(run.server["weights"]["params"][name], p, rtol=1e-12, atol=1e-14)


MIXED = {"models": ["fedrir_cnn", "fedavg_cnn", "vit_tiny"], "width": 16, "precision": "fp32"}


def test_several_architectures_learn_together(experiment):
    settings = {**MIXED, "rounds": 3, "engine": "debug+bytes+sequential", "data.rows": 240}
    run = experiment(FedVTC(finetune="every", **QUICK), **settings)
    run.run()
    first, last = run.rows[0], run.rows[-1]
    assert last["fit.cross_entropy"] < first["fit.cross_entropy"]
    assert last["generator.reconstruction"] < first["generator.reconstruction"]


@pytest.mark.parametrize("form", COVARIANCES)
def test_clients_with_one_class_and_clients_that_skip_rounds(experiment, form):
    y = np.repeat([0, 1, 2], 9)
    x = np.random.default_rng(0).standard_normal((27, 1, 8, 8))
    dataset = from_arrays(x, y, columns={"owner": y.astype(str)}, classes=["a", "b", "c", "never seen"])
    partition = {"name": "natural", "column": "owner", "min_examples": 2}
    method = FedVTC(covariance=form, finetune="every", learn_spread=True, **QUICK)
    settings = {"clients": 3, "cohort": 2, "rounds": 3, "width": P, "engine": "debug+sequential"}
    run = experiment(method, dataset=dataset, partition=partition, **settings)
    run.run()
    assert (run.server["counts"][:3] > 0).all()
    assert run.server["counts"][3] == 0
    assert run.rows[-1]["general_accuracy"] is not None


def test_fine_tuned_copies_are_thrown_away(experiment):
    runs = [experiment(FedVTC(finetune=when, **QUICK), rounds=2, width=P) for when in ("end", "never")]
    for run in runs:
        run.run()
    assert tree.equal(runs[0].server, runs[1].server)
    for i in range(4):
        assert tree.equal(runs[0].engine.client(i)._asdict(), runs[1].engine.client(i)._asdict())


@pytest.mark.parametrize(
    "options", [{"matching": "real"}, {"covariance": "full"}, {"covariance": "class", "learn_spread": True}]
)
def test_clients_can_be_lanes(experiment, caplog, options):
    method = FedVTC(finetune="every", pull="scaled", **QUICK, **options)
    settings = {"rounds": 2, "width": P, "model": "mlp"}
    loop, lanes = (experiment(method, engine=name, **settings) for name in ("sequential", "vectorised"))
    loop.run()
    with caplog.at_level(logging.WARNING):
        lanes.run()
    assert not caplog.records
    for path, leaf in tree.flatten(loop.server):
        torch.testing.assert_close(dict(tree.flatten(lanes.server))[path], leaf, rtol=1e-8, atol=1e-10)


def test_without_prototypes_and_fine_tuning_the_models_train_alone(experiment):
    alone = experiment(Local(), rounds=2, width=P, batch_size=1000)
    method = FedVTC(prototype_weight=0.0, finetune="never", optimizer="sgd", lr=Local().lr, **QUICK)
    run = experiment(method, rounds=2, width=P, batch_size=1000)
    alone.run()
    run.run()
    for one, other in zip(run.rows, alone.rows, strict=True):
        assert one["personal_accuracy"] == other["personal_accuracy"]
        assert one["general_accuracy"] == other["general_accuracy"]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("spread_floor", 0.0, "above 0"), ("kl_weight", -1.0, "at least 0"), ("finetune_steps", 0, "at least 1")],
)
def test_invalid_hyper_parameters_are_refused(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field}={value}: must be {allowed}"):
        FedVTC(**{field: value})


# options with known answers


@pytest.mark.parametrize("form", COVARIANCES)
def test_the_scaled_distance_is_in_units_of_sigma(form):
    s = setting(covariance=form, pull="scaled")
    z, y = Stream(5).normal((6, P)), torch.tensor([0, 1, 3, 0, 1, 3])
    variance = 0.5 + 0.01 * (form == "full")  # for `full`, the square of the floor is added
    expected = ((z - s.down["prototypes"][y]) ** 2 / (2 * variance)).mean(1)
    torch.testing.assert_close(s.method.distance(z, y, s.down), expected)


def test_the_generators_loss_is_the_weighted_sum_of_its_terms():
    s = setting(kl_weight=0.3, matching_weight=2.0).with_statistics()
    batch = Batch(s.rows.x, s.rows.y)
    batch = batch._replace(draws=s.method.draw_latents(batch, TASK, Stream(7)))
    loss, logs = s.method.generator_loss(s.nets, batch, s.down, s.client.memory)
    assert loss.item() == pytest.approx((logs["reconstruction"] + 0.3 * logs["kl"] + 2 * logs["matching"]).item())
    assert min(logs["kl"], logs["matching"]) > 0


def test_real_examples_have_the_same_weight_as_synthetic_ones_or_none():
    found = {}
    for mix in (True, False):
        s = setting(finetune_mix=mix).with_statistics()
        batch = Batch(s.rows.x, s.rows.y, s.method.draw_latents(Batch(s.rows.x, s.rows.y), TASK, Stream(7)))
        labels, latents = s.method.latents(batch.draws, s.down)
        errors = [
            torch.nn.functional.cross_entropy(s.nets.head(s.nets.body(x)), y).item()
            for x, y in ((s.nets.generator(latents), labels), (s.rows.x, s.rows.y))
        ]
        loss = s.method.finetune_loss(s.nets, batch, s.down, s.client.memory).item()
        assert loss == pytest.approx(sum(errors) / 2 if mix else errors[0])
        found[mix] = loss
    assert found[True] != pytest.approx(found[False])


def test_phases_follow_their_steps_and_learning_rates():
    method = FedVTC(generator_epochs=3, generator_lr=0.02, finetune_steps=7, finetune_lr=0.3, lr=0.01)
    _, _, generator, finetune = method.phases()
    assert (generator.epochs, finetune.steps) == (3, 7)
    assert first_step(generator) == pytest.approx(0.02, rel=1e-6)  # Adam's first step equals its learning rate
    assert first_step(finetune) == pytest.approx(0.3)
    assert first_step(FedVTC(lr=0.01).phases()[3]) == pytest.approx(0.01)
    names = [
        set(dict(made.named_parameters()))
        for made in (setting().modules["generator"], setting(generator_form="conv").modules["generator"])
    ]
    assert names[0] != names[1]


def first_step(phase):
    """Return the size of the first step of the phase's optimiser for gradient 1."""
    params = {"p": torch.zeros(1)}
    phase.optimizer.step({"p": torch.ones(1)}, phase.optimizer.init(params), params, 1.0)
    return -params["p"].item()


@pytest.mark.parametrize("n", [Y, 2 * Y - 1, 32])
def test_every_known_class_is_among_the_synthetic_examples(n):
    method = FedVTC(n_synthetic=n)
    every = torch.ones(Y, dtype=torch.bool)
    for seed in range(50):
        draws = method.draw_latents(Batch(torch.zeros(2, 1, 8, 8), torch.zeros(2)), TASK, Stream(seed))
        assert feature_statistics.among(every, draws["class_choice"]).unique().tolist() == list(range(Y))


def test_a_covariance_that_was_rounded_still_has_a_factor():
    features = Stream(1).normal((40, 2)) @ Stream(2).normal((2, 30)) * 9
    exact = features.T @ features / 40
    step = exact.abs().max() / 127
    rounded = (exact / step).round() * step
    assert torch.linalg.eigvalsh(rounded)[0] < -0.01
    factor = feature_statistics.standard_deviations(rounded, 0.1, "full")
    assert torch.equal(factor, factor.tril())
    assert torch.isfinite(factor).all()
    torch.testing.assert_close(factor @ factor.T, exact, rtol=0, atol=40 * float(step))


def test_deviations_of_a_covariance_are_those_of_its_factor():
    features = Stream(1).normal((40, P))
    variance = features.T @ features / 40
    labels = torch.tensor([0, 1])
    through = feature_statistics.deviations(
        feature_statistics.standard_deviations(variance, 0.1, "full"), labels, "full"
    )
    torch.testing.assert_close(feature_statistics.own_deviations(variance, 0.1, labels, "full"), through)


# options of the generator


def test_images_are_reconstructed_from_prototypes_if_this_is_set():
    s = setting(latent="prototype", matching_weight=0.0).with_statistics()
    draws = s.method.draw_latents(Batch(s.rows.x, s.rows.y), TASK, Stream(4)) | {"noise": torch.zeros(24, P)}
    known = (s.down["counts"][s.rows.y] > 0)[:, None]
    means = torch.where(known, s.down["prototypes"][s.rows.y], s.nets.body(s.rows.x))
    _, logs = s.method.generator_loss(s.nets, Batch(s.rows.x, s.rows.y, draws), s.down, s.client.memory)
    expected = (s.nets.generator(means) - s.rows.x).square().mean()
    assert logs["reconstruction"].item() == pytest.approx(expected.item())
    nobody = s.down | {"counts": torch.zeros(Y)}
    assert torch.equal(s.method.centre(means, s.rows.y, nobody), means)  # without prototypes: the features


@pytest.mark.parametrize("learns", [False, True])
def test_reconstruction_and_kl_reach_the_body_only_if_it_learns(learns):
    s = setting(encoder_learns=learns).with_statistics()
    after, logs = s.worked([s.method.phases()[2]])
    touched = parts_of(s.client._asdict(), after._asdict())
    assert touched == [{"generator", "body"} if learns else {"generator"}, set()]
    assert ("generator.cross_entropy" in logs) == learns
    if not learns:
        return
    params = {name: p.clone().requires_grad_() for name, p in s.client.weights["params"].items()}
    nets = Nets(s.modules, params, s.client.weights["buffers"])
    batch = Batch(s.rows.x, s.rows.y)
    batch = batch._replace(draws=s.method.draw_latents(batch, TASK, Stream(4)))
    _, logs = s.method.generator_loss(nets, batch, s.down, s.client.memory)
    body = [p for name, p in params.items() if name.startswith("body.")]
    for term, reaches in (("reconstruction", True), ("kl", True), ("matching", False)):
        grads = torch.autograd.grad(logs[term], body, allow_unused=True, retain_graph=True)
        assert any(grad is not None and bool(grad.any()) for grad in grads) == reaches, term


def test_generators_are_shared_for_some_rounds_and_then_private(experiment):
    always, some = (
        experiment(
            FedVTC(share_generator=True, share_rounds=n, **QUICK), rounds=3, width=P, engine="debug+bytes+sequential"
        )
        for n in (0, 2)
    )
    rounds = spied(some)
    for run in (always, some):
        run.run()
    assert ["weights" in one.replies[0].uplink for one in rounds] == [True, True, False]
    assert ["weights" in one.down.common for one in rounds] == [True, True, False]
    kept, shared = (tree.n_bytes(run.server["weights"]) for run in (some, always))
    assert kept == shared
    sent = [run.ledger.kinds["uplink"]["weights"] for run in (some, always)]
    assert sent[0] * 3 == sent[1] * 2
    assert not tree.equal(some.engine.client(0).weights, some.engine.client(1).weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share_rounds": 2}, "needs share_generator=true"),
        ({"share_rounds": 2, "share_generator": True, "finetune": "end"}, "use finetune=every"),
        ({"control": "same-steps", "latent": "prototype"}, "leave out latent"),
        ({"control": "same-steps", "encoder_learns": True}, "leave out encoder_learns"),
    ],
)
def test_options_of_the_generator_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FedVTC(**options)


@pytest.mark.parametrize("options", [{"latent": "prototype"}, {"encoder_learns": True}])
def test_the_options_can_be_lanes(experiment, caplog, options):
    one, other = (
        experiment(FedVTC(**QUICK, **options), rounds=2, width=P, engine=engine)
        for engine in ("sequential", "vectorised")
    )
    for run in (one, other):
        run.run()
    assert "one after another" not in caplog.text
    for key in ("generator.reconstruction", "finetune.loss"):
        assert other.rows[-1][key] == pytest.approx(one.rows[-1][key], rel=1e-7)
