"""FedRIR: what each stage trains, what is sent, and what is masked."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from fedloom import (
    Batch,
    Client,
    ConfigError,
    FedAvg,
    FedRIR,
    Interleave,
    Stream,
    Task,
    Train,
    Turn,
    from_arrays,
    losses,
    tree,
)
from fedloom.inputs import InputSpec
from fedloom.method import init_opts, trains_of
from fedloom.models import arch
from fedloom.nets import Nets, read_weights
from fedloom.objectives import Classification
from fedloom.training.batches import Plan, Rows
from fedloom.training.context import ClientContext
from fedloom.training.gradients import Gradients
from fedloom.training.turn import fresh_modules, run_phases
from small import spied


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


TASK = Task(
    n_clients=4,
    max_cohort=4,
    objective=Classification.numbered(10),
    spec=InputSpec.plain((1, 8, 8)),
    width=16,
    rounds=5,
)


def made(method, model="fedrir_cnn"):
    """Return the modules, and a client after its first sweep."""
    choice = arch(model, TASK.input_shape, TASK.n_classes, 16)
    modules = fresh_modules(lambda: method.nets(choice, TASK), Stream(0))
    weights = read_weights(modules)
    return modules, Client(weights, {}, init_opts(method.phases(), weights))


def rows():
    return Rows(Stream(0).normal((20, 1, 8, 8)), Stream(1).integers(10, (20,)))


def worked(method, phases):
    """Return the names of the nets whose parameters some phases change, and of those whose buffers they change."""
    modules, client = made(method)
    context = ClientContext(rows=rows(), plan=Plan(10), task=TASK, rng=Stream(2))
    after, _, logs = run_phases(phases, Gradients(modules), client, {}, context, turn=Turn(0, 4, 20))
    changed = [
        {name.partition(".")[0] for name, t in part.items() if not torch.equal(t, client.weights[kind][name])}
        for kind, part in after.weights.items()
    ]
    return changed, logs


def test_the_first_stage_touches_csfe_and_generator_alone():
    (params, buffers), logs = worked(FedRIR(), FedRIR().phases()[:1])
    assert params == {"csfe", "generator"}
    assert buffers == {"csfe"}
    assert logs["mcsl.loss"] == pytest.approx(logs["mcsl.reconstruction"] + FedRIR().kl_weight * logs["mcsl.kl"])


@pytest.mark.parametrize("mode", ["vclub", "vclub_sampled", "released"])
def test_the_second_stage_leaves_csfe_and_generator_alone(mode):
    method = FedRIR(idm_mode=mode)
    (params, buffers), _ = worked(method, method.phases()[1:])
    assert params == {"gfe", "head", "idm"}
    assert buffers == {"gfe"}


def test_only_the_supervised_csfe_learns_from_labels():
    method = FedRIR(mcsl="supervised")
    (params, _), _ = worked(method, method.phases())
    assert params == {"gfe", "csfe", "head", "idm"}


@pytest.mark.parametrize("mode", ["vclub", "vclub_sampled"])
def test_the_information_term_reaches_gfe_but_not_q_and_is_clamped(mode):
    method = FedRIR(idm_mode=mode, idm_weight=1.0)
    modules, client = made(method)
    params = {name: p.clone().requires_grad_() for name, p in client.weights["params"].items()}
    classify = next(t for t in trains_of(method.phases()) if "head" in t.params)
    seen = []
    for seed in range(6):
        batch = Batch(Stream(seed).normal((8, 1, 8, 8)), Stream(seed, "y").integers(10, (8,)))
        batch = batch._replace(draws=classify.draw(batch, TASK, Stream(seed)) if classify.draw else {})
        nets = Nets(modules, params, client.weights["buffers"])
        loss, logs = classify.loss(nets, batch, {}, {})
        assert logs["information"] >= 0
        assert loss.item() == pytest.approx((logs["cross_entropy"] + logs["information"]).item())
        grads = torch.autograd.grad(logs["information"], list(params.values()), allow_unused=True, retain_graph=True)
        by_net = {}
        for name, grad in zip(params, grads, strict=True):
            size = 0.0 if grad is None else float(grad.abs().sum())
            by_net[name.partition(".")[0]] = by_net.get(name.partition(".")[0], 0.0) + size
        assert by_net["idm"] == by_net["csfe"] == by_net["head"] == by_net["generator"] == 0
        assert (by_net["gfe"] > 0) == (logs["information"] > 0)
        seen.append(logs["information"].item())
    assert max(seen) > 0


def test_fitting_q_reaches_nothing_but_q():
    (both,) = [phase for phase in FedRIR().phases() if isinstance(phase, Interleave)]
    (params, buffers), _ = worked(FedRIR(), (replace(both, members=both.members[:1]),))
    assert params == {"idm"}
    assert buffers == set()


@pytest.mark.parametrize("mode", ["vclub", "vclub_sampled"])
@pytest.mark.parametrize("mcsl", ["masked", "supervised"])
def test_features_are_computed_once_for_both_steps_of_a_batch(mcsl, mode):
    """Weights equal those of two forward passes, and running statistics are updated once per batch."""
    method = FedRIR(mcsl=mcsl, idm_mode=mode)
    (both,) = [phase for phase in method.phases() if isinstance(phase, Interleave)]

    def twice(loss, detached):
        def inner(nets, batch, down, memory):
            seen = method.features(nets, batch.x)
            seen = {name: value.detach() for name, value in seen.items()} if detached else seen
            return loss(nets, batch._replace(precomputed=seen), down, memory)

        return inner

    fit_q, classify = both.members
    apart = (
        replace(fit_q, loss=twice(fit_q.loss, True), train_mode=(*classify.modes, "idm")),
        replace(classify, loss=twice(classify.loss, False)),
    )
    found = []
    for phase in (both, replace(both, members=apart, precompute=None)):
        modules, client = made(method, "fedrir_cnn")
        context = ClientContext(rows=rows(), plan=Plan(5), task=TASK, rng=Stream(2))
        after, steps, logs = run_phases((phase,), Gradients(modules), client, {}, context, turn=Turn(0, 4, 20))
        assert steps == {"idm": 4, "classify": 4}
        found.append((after, logs))
    (once, logs), (again, expected) = found
    assert logs == pytest.approx(expected, rel=1e-9)
    for name, value in once.weights["params"].items():
        torch.testing.assert_close(value, again.weights["params"][name], rtol=1e-9, atol=1e-12)
    tracked = [after.weights["buffers"]["gfe.norm1.num_batches_tracked"].item() for after, _ in found]
    assert tracked == [4, 8]


def test_every_step_with_the_bound_is_preceded_by_a_step_of_q():
    method = FedRIR(idm_mode="vclub")
    (both,) = [phase for phase in method.phases() if isinstance(phase, Interleave)]
    assert [member.params for member in both.members] == [("idm",), ("gfe", "head")]


@pytest.mark.parametrize("buffers", ["private", "shared"])
def test_nothing_but_gfe_travels(experiment, buffers):
    run = experiment(FedRIR(buffers=buffers), model="fedrir_cnn", rounds=1, width=16, **{"data.rows": 120})
    rounds = spied(run)
    run.run()
    for message in [*rounds[0].sent, *(reply.uplink for reply in rounds[0].replies)]:
        assert set(message) == {"weights"}
        names = [name for part in message["weights"].values() for name in part]
        assert names
        assert all(name.startswith("gfe.") for name in names)
        assert bool(message["weights"]["buffers"]) == (buffers == "shared")


@dataclass(frozen=True)
class Perfed(FedAvg):
    """FedAvg in which the body is sent, and the head, Adam's moments and the running statistics are kept."""

    optimizer: Any = "adam"
    lr: float = 5e-4
    buffers: Any = "private"
    shared: ClassVar[tuple[str, ...]] = ("model:body",)

    def phases(self):
        (train,) = super().phases()
        return (replace(train, name="classify", keep_state=True),)


@pytest.mark.parametrize("model", ["mlp", "fedrir_cnn"])
def test_without_its_parts_it_is_fedper(experiment, model):
    settings = {"model": model, "rounds": 3, "data.rows": 160}
    bare, fedper = experiment(FedRIR(mcsl="off", idm_mode="none"), **settings), experiment(Perfed(), **settings)
    bare.run()
    fedper.run()
    for one, other in zip(bare.rows, fedper.rows, strict=True):
        for key in ("personal_accuracy", "personal_accuracy_std", "general_accuracy", "classify.loss"):
            assert one[key] == other[key], key
    renamed = {f"model.body.{name.removeprefix('gfe.')}": p for name, p in bare.server["weights"]["params"].items()}
    assert tree.equal({"p": renamed}, {"p": fedper.server["weights"]["params"]})


@pytest.mark.parametrize(("side", "patch", "n_patches"), [(8, 0, 16), (28, 0, 49), (32, 0, 64), (10, 4, 9), (8, 4, 4)])
@pytest.mark.parametrize("ratio", [0.6, 0.0, 0.5])
def test_the_number_of_masked_patches_is_exact(side, patch, n_patches, ratio):
    method, n = FedRIR(patch_size=patch, mask_ratio=ratio), 12
    batch = Batch(torch.ones(n, 3, side, side), torch.zeros(n, dtype=torch.int64))
    draws = method.draw_mask(batch, replace(TASK, spec=InputSpec.plain((3, side, side))), Stream(0))
    stays, edge = draws["stays"], patch or (4 if side >= 28 else 2)
    assert stays.shape == (n, 1, side, side)
    assert draws["noise"].shape == (n, TASK.width)
    n_masked = []
    for image in stays[:, 0]:
        patches = [p for band in image.split(edge, 0) for p in band.split(edge, 1)]
        assert len(patches) == n_patches
        assert all(bool((p == p[0, 0]).all()) for p in patches)  # whole patches
        n_masked.append(sum(int(p[0, 0] == 0) for p in patches))
    assert n_masked == [int(ratio * n_patches)] * n
    if ratio:
        assert len({tuple(image.flatten().tolist()) for image in stays}) > 1  # a different mask for every image


@pytest.mark.parametrize(
    ("settings", "patches"), [({"mask_ratio": 0.05}, "16 patches of 2x2"), ({"patch_size": 8}, "1 patches of 8x8")]
)
def test_a_mask_that_masks_no_patch_is_refused(experiment, settings, patches):
    with pytest.raises(ConfigError, match=rf"masks none of an image's {patches} pixels"):
        experiment(FedRIR(**settings))


def test_a_method_that_masks_nothing_sees_everything(experiment):
    masked, unmasked = (FedRIR(mcsl=mode, mask_ratio=0.0) for mode in ("masked", "unmasked"))
    runs = [experiment(method, rounds=1, **{"data.rows": 120}) for method in (masked, unmasked)]
    for run in runs:
        run.run()
    assert tree.equal(runs[0].server, runs[1].server)


def test_an_input_that_is_not_an_image_is_named(experiment):
    data = from_arrays(torch.randn(80, 5).numpy(), (torch.arange(80) % 4).numpy())
    with pytest.raises(ConfigError, match=r"method=fedrir: needs images \(C, H, W\), but inputs are number \(5,\)"):
        experiment("fedrir", dataset=data)


def test_the_phases_have_names_of_their_own():
    for method in (FedRIR(), FedRIR(idm_mode="released"), FedRIR(mcsl="supervised"), FedRIR(mcsl="off")):
        names = [phase.name for phase in method.phases()] + [t.name for t in trains_of(method.phases())]
        trains = [t.name for t in trains_of(method.phases())]
        assert len(trains) == len(set(trains))
        assert names
    assert all(isinstance(t, Train) for t in trains_of(FedRIR().phases()))


# losses with known answers


@pytest.mark.parametrize("region", ["all", "masked"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_first_stage_rebuilds_the_whole_image_from_its_unmasked_part(reduction, region):
    method = FedRIR(rec_reduction=reduction, loss_region=region, kl_weight=0.3)
    modules, client = made(method)
    nets = Nets(modules, **client.weights)
    batch = Batch(rows().x, rows().y)
    batch = batch._replace(draws=method.draw_mask(batch, TASK, Stream(3)))
    stays, noise = batch.draws["stays"], batch.draws["noise"]
    assert set(stays.unique().tolist()) == {0.0, 1.0}
    mean, log_variance = nets.csfe(batch.x * stays).chunk(2, 1)
    error = (nets.generator(mean + (log_variance / 2).exp() * noise) - batch.x) ** 2
    counted = torch.ones_like(error) if region == "all" else (1 - stays).expand_as(error)
    expected = (error * counted).sum() / (counted.sum() if reduction == "mean" else len(batch.x))
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
    loss, logs = method.mcsl_loss(nets, batch, {}, {})
    assert logs["reconstruction"].item() == pytest.approx(expected.item())
    assert logs["kl"].item() == pytest.approx(kl.item())
    assert loss.item() == pytest.approx((expected + 0.3 * kl).item())
    hidden = batch._replace(x=batch.x + (1 - stays))  # masked pixels are hidden, but must be reconstructed
    other = method.mcsl_loss(nets, hidden, {}, {})[1]
    assert other["kl"].item() == logs["kl"].item()
    assert other["reconstruction"].item() != pytest.approx(logs["reconstruction"].item())


def test_without_masks_the_whole_image_is_seen():
    after = {}
    for name, method in {
        "masked": FedRIR(),
        "unmasked": FedRIR(mcsl="unmasked"),
        "nothing": FedRIR(mask_ratio=0.0),
    }.items():
        modules, client = made(method)
        context = ClientContext(rows=rows(), plan=Plan(10), task=TASK, rng=Stream(2))
        after[name] = run_phases(method.phases()[:1], Gradients(modules), client, {}, context, turn=Turn(0, 4, 20))[
            0
        ].weights
    assert tree.equal(after["unmasked"], after["nothing"])
    assert not tree.equal(after["masked"], after["unmasked"])


@pytest.mark.parametrize("mode", ["vclub", "released"])
def test_the_information_term_counts_as_its_weight_says(mode):
    method = FedRIR(idm_mode=mode, idm_weight=3.0)
    modules, client = made(method)
    nets = Nets(modules, **client.weights)
    x, y = rows().x, rows().y
    loss, logs = method.loss(nets, Batch(x, y), {}, {})
    assert logs["information"] > 0 or mode == "vclub"
    assert loss.item() == pytest.approx((logs["cross_entropy"] + 3 * logs["information"]).item())
    if mode == "released":
        mean, log_variance = nets.idm(nets.gfe(x))
        specific = nets.csfe(x).chunk(2, 1)[0]
        each = (specific - mean) ** 2 / log_variance.exp() + log_variance
        assert logs["information"].item() == pytest.approx(each.sum(1).mean().item())


def test_the_decorrelation_needs_no_q():
    method = FedRIR(idm_mode="decorrelated")
    assert "idm" not in method.nets(arch("mlp", TASK.input_shape, TASK.n_classes, 16), TASK)
    (params, buffers), _ = worked(method, method.phases()[1:])
    assert params == {"gfe", "head"}
    assert buffers == {"gfe"}


def test_the_decorrelation_reaches_gfe_alone_and_counts_as_its_weight_says():
    method = FedRIR(idm_mode="decorrelated", idm_weight=3.0, mcsl="supervised")  # csfe learns, but not from this term
    modules, client = made(method)
    params = {name: p.clone().requires_grad_() for name, p in client.weights["params"].items()}
    nets = Nets(modules, params, client.weights["buffers"])
    x, y = rows().x, rows().y
    loss, logs = method.loss(nets, Batch(x, y), {}, {})
    common, specific = nets.gfe(x), nets.csfe(x).chunk(2, 1)[0]
    away = [value - torch.stack([value[y == label].mean(0) for label in y]) for value in (common, specific)]
    covariance = away[0].T @ away[1] / len(x)
    expected = covariance.square().sum() / (16 * away[0].square().mean() * away[1].square().mean())
    assert logs["information"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert loss.item() == pytest.approx((logs["cross_entropy"] + 3 * logs["information"]).item())
    grads = torch.autograd.grad(logs["information"], list(params.values()), allow_unused=True)
    reached = {
        name.partition(".")[0]
        for name, grad in zip(params, grads, strict=True)
        if grad is not None and bool(grad.any())
    }
    assert reached == {"gfe"}


def test_moments_last_only_if_they_are_to():
    for keeps in (True, False):
        method = FedRIR(keep_optimizer=keeps)
        _, client = made(method)
        assert bool(client.opts) == keeps


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_whole_images_move_csfes_running_statistics_in_training_mode_alone(mode):
    method = FedRIR(csfe_mode=mode)
    (params, buffers), _ = worked(method, method.phases()[1:])
    assert params == {"gfe", "head", "idm"}
    assert buffers == ({"gfe", "csfe"} if mode == "training" else {"gfe"})


# options of the information term and of the posterior


def test_q_takes_its_steps_on_every_batch_and_the_classifier_one(experiment):
    run = experiment("fedrir", **{"method.q_steps": 3}, rounds=1)
    rounds = spied(run)
    run.run()
    for reply in rounds[0].replies:
        assert reply.steps["idm"] == 3 * reply.steps["classify"] == 3 * reply.steps["mcsl"]


def test_more_steps_fit_q_better():
    losses = []
    for n in (1, 8):
        _, logs = worked(replace(FedRIR(lr=1e-2), q_steps=n), replace(FedRIR(lr=1e-2), q_steps=n).phases()[1:])
        losses.append(logs["idm.loss"])
    assert losses[1] < losses[0]


def test_repeated_steps_are_the_same_in_lanes(experiment):
    settings = {"method.q_steps": 2, "method.idm_mode": "vclub_class", "method.standardise": True, "rounds": 1}
    one, other = (experiment("fedrir", **settings, engine=engine) for engine in ("sequential", "vectorised"))
    for run in (one, other):
        run.run()
    assert other.rows[-1]["idm.loss"] == pytest.approx(one.rows[-1]["idm.loss"], rel=1e-8)
    assert other.rows[-1]["classify.information"] == pytest.approx(one.rows[-1]["classify.information"], rel=1e-8)


def test_a_standardised_bound_does_not_depend_on_the_scale_of_f_cs():
    found = []
    for scale in (1e-3, 1.0):
        for method in (FedRIR(standardise=True), FedRIR(standardise=False)):
            modules, client = made(method)
            params = client.weights["params"]
            nets = Nets(modules, params, client.weights["buffers"])
            mean, specific = Stream(0).normal((20, 16)), Stream(1).normal((20, 16)) * scale
            found.append(method.information(nets, mean, specific, Batch(rows().x, rows().y)).item())
            loss = method.q_loss(nets, Batch(rows().x, rows().y, {}, {"f_g": mean, "f_cs": specific}), {}, {}).item()
            found.append(loss)
    assert found[:2] == pytest.approx(found[4:6])
    assert found[3] != pytest.approx(found[7], rel=1e-3)


def test_the_bound_within_classes_ignores_what_the_class_explains():
    y = torch.arange(20) % 2
    log_variance = torch.zeros(20, 4)
    by_class = torch.where(y[:, None] == 0, -3.0, 5.0).expand(20, 4)
    assert losses.vclub(by_class, log_variance, by_class).item() > 1
    assert losses.vclub_within(torch.zeros(20, 4), log_variance, by_class, y).item() == pytest.approx(0)
    noise = Stream(0).normal((20, 4))
    away = noise - torch.stack([noise[y == label].mean(0) for label in y])
    other = torch.stack([((away[i] - away[y == y[i]]) ** 2).mean(0) for i in range(20)])
    found = losses.vclub_within(away, log_variance, by_class + noise, y)  # q predicts every example exactly
    assert found.item() == pytest.approx((other / 2).mean().item())


def test_free_bits_stop_the_pull_on_a_small_kl():
    small, large = (torch.full((5, 3), value).requires_grad_() for value in (0.1, 2.0))
    for mean, is_pulled in ((small, False), (large, True)):
        kl = losses.gaussian_kl_by_feature(mean, torch.zeros(5, 3))
        kl.clamp(min=0.5).sum().backward()
        assert bool(mean.grad.any()) == is_pulled
    assert losses.gaussian_kl_by_feature(large, torch.zeros(5, 3)).sum().item() == pytest.approx(
        losses.gaussian_kl(large, torch.zeros(5, 3)).item()
    )
    method = FedRIR(free_bits=0.5)
    modules, client = made(method)
    nets = Nets(modules, client.weights["params"], client.weights["buffers"])
    batch = Batch(rows().x, rows().y, method.draw_mask(Batch(rows().x, rows().y), TASK, Stream(3)))
    loss, logs = method.mcsl_loss(nets, batch, {}, {})
    assert loss.item() >= logs["reconstruction"].item() + 0.1 * 16 * 0.5 - 1e-9


@pytest.mark.parametrize(
    "settings",
    [
        {"q_steps": 2, "idm_mode": "decorrelated"},
        {"standardise": True, "idm_mode": "none"},
        {"free_bits": 0.1, "mcsl": "supervised"},
    ],
)
def test_an_option_without_effect_is_refused(settings):
    with pytest.raises(ValueError, match="needs"):
        FedRIR(**settings)
