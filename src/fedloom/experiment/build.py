"""Build an experiment's objects from its settings: the data set, the federation, the architectures, and the problem for an engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedloom import accelerator, data, tree
from fedloom.config.settings import Named, Settings, check_cohort, with_scheme
from fedloom.data.preprocess import Given, Preprocess
from fedloom.engines import Engine, Problem, make_engine
from fedloom.errors import ConfigError, MethodError
from fedloom.experiment.arrivals import check_min_clients, slowdowns
from fedloom.experiment.exclusions import refuse_exclusions
from fedloom.experiment.private import cohort_size
from fedloom.experiment.schedule import lr_scales
from fedloom.inputs import Inputs, InputSpec, map_inputs
from fedloom.method import Architecture, Method, Task, Train, trains_of
from fedloom.methods.registry import load_object
from fedloom.models import Arch, arch
from fedloom.models.splitting import dry_run
from fedloom.nets import norm_layers, read_weights, select
from fedloom.objectives import Classification, Metric, Objective
from fedloom.training.batches import Plan
from fedloom.training.turn import ONE_VALUE, TOO_FEW
from fedloom.tree import Tree, Weights
from fedloom.wire.codec import Codec
from fedloom.wire.transforms import parse

log = logging.getLogger(__name__)


@contextmanager
def arithmetic(settings: Settings) -> Iterator[None]:
    """Use the precision and threads in the settings within the context. Raise ConfigError if the device in the settings does not exist."""
    device = accelerator.find(settings.engine.device)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if settings.precision == "fp64" else torch.float32)
    try:
        with (
            accelerator.torch_threads(settings.engine.threads),
            accelerator.exact(device, settings.precision == "tf32"),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


def make_dataset(settings: Settings, given: Given | None = None) -> data.Dataset:
    """Return the data set that the settings name.

    `given` is a description by which the data are read. Default: that in the file `data.preprocess`, if it is set.
    """
    d, p = settings.data, settings.partition
    if d.preprocess is not None and given is None:
        given = Given(preprocess=Preprocess.read(d.preprocess), where=f"data.preprocess={d.preprocess}")
    if given is not None and d.classes:
        raise ConfigError(
            f"data.classes={','.join(d.classes)}: {given.where} has the order of the classes; remove data.classes"
        )
    if given is not None and d.factor:
        raise ConfigError(
            f"data.factor={d.factor}: changes the images, so data.preprocess does not fit; remove one of them"
        )
    keys = {"label", "columns", "drop", "split", "missing", "missing_values", "decimal", "encoding"}
    table = data.TableOptions(**d.model_dump(include=keys), owner=p.column, by=p.by)
    options = d.model_dump(include={"image_size", "rows", "task", "owner", "features", "revision"})
    texts = data.TextOptions(**d.model_dump(include={"text", "tokens", "case", "vocabulary", "min_count", "length"}))
    pool = data.load(d.name, d.path, table=table, texts=texts, given=given, **options)
    pool = data.with_classes(pool, d.classes) if d.classes else pool
    return data.with_factor(pool, d.factor, d.factor_clients or FACTOR_CLIENTS) if d.factor else pool


def make_preprocess(settings: Settings, dataset: data.Dataset | None = None) -> Preprocess:
    """Return the description of how raw values become inputs, as a run with these settings writes it.

    Raise ConfigError if each client has its own scaling.
    """
    if settings.data.normalise == "own":
        raise ConfigError(
            "data.normalise=own: each client computes its own scaling; leave it out here, and set it for the run"
        )
    dataset = make_dataset(settings) if dataset is None else dataset
    train, none = np.arange(dataset.n_train), np.empty(0, np.int64)
    everything = data.Partition(train=(train,), valid=(none,), test=(none,), common=none, scheme={})
    return data.Federation(dataset, everything, normalise=settings.data.normalise).preprocess


def resolved(settings: Settings, dataset: data.Dataset) -> Settings:
    """Return the settings with the revision of data from the hub and, if no partition scheme is set, the scheme that fits the data.

    A scheme chosen in this way is logged, unless it is dirichlet.
    """
    if dataset.revision and settings.data.revision is None:
        log.warning("data.revision=%s: the newest one", dataset.revision)
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"revision": dataset.revision})})
    if settings.partition.name is not None:
        return settings
    if dataset.factor and not settings.partition.by:
        log.warning(
            "partition=natural partition.merge=false: chosen, because clients differ in a known factor, and test examples have no owner"
        )
        fraction = settings.partition.test_fraction
        given = {"merge": False, "test_fraction": FACTOR_TEST_FRACTION if fraction is None else fraction}
        settings = settings.model_copy(update={"partition": settings.partition.model_copy(update=given)})
        return _with_scheme(settings, "natural")
    scheme = "dirichlet" if settings.partition.by else data.default_scheme(dataset, settings.partition.merge)
    if scheme != "dirichlet":
        log.warning("partition=%s: chosen, because %s", scheme, WHY[scheme])
    return _with_scheme(settings, scheme)


def _with_scheme(settings: Settings, scheme: str) -> Settings:
    try:
        return with_scheme(settings, scheme)
    except ValueError as error:
        raise ConfigError(str(error)) from None


FACTOR_CLIENTS = 4  # default for data.factor_clients
FACTOR_TEST_FRACTION = 0.25  # fraction of each client's examples, with the client's own factor
WHY = {
    "own": "every owner's examples are already split in time",
    "natural": "a column names the owner of every example",
    "iid": "targets do not fall into groups",
}


def make_federation(settings: Settings, dataset: data.Dataset | None = None, given: Any = None) -> data.Federation:
    """Return the clients' examples: the partitioned data set. For `given`, see `data.given_partition`."""
    dataset = make_dataset(settings) if dataset is None else dataset
    settings = resolved(settings, dataset)
    p, valid, seed = settings.partition, settings.eval.valid, settings.seed
    if p.name == "given":
        if given is None:
            raise ConfigError("partition=given: the partition must be passed from Python, fedloom.run(partition=...)")
        keys = {"test_fraction", "merge", "min_examples"}
        partition = data.given_partition(given, dataset, valid=valid, seed=seed, **p.model_dump(include=keys))
        if settings.clients not in (None, partition.n_clients):
            raise ConfigError(
                f"clients={settings.clients}: the given partition has {partition.n_clients} clients; remove clients"
            )
    else:
        partition = data.partition(
            dataset,
            settings.clients,
            scheme=p.name or "dirichlet",
            valid=valid,
            seed=seed,
            **p.model_dump(exclude={"name"}),
        )
    return data.Federation(dataset, partition, normalise=settings.data.normalise, augment=settings.data.augment)


def make_archs(
    settings: Settings, spec: InputSpec, objective: Objective, example: Inputs, model: Any = None
) -> tuple[Arch, ...]:
    """Return the clients' architectures, in the order in which they are assigned.

    Args:
        example: two inputs for dry runs.
        model: a module class, function or instance instead of `settings.model`.
    """
    if settings.models and settings.model.options:
        key = min(settings.model.options)
        raise ConfigError(f"model.{key}: an option of `model`, but `models` replaces `model`; remove one of them")

    def made(choice: Named, given: Any = None) -> Arch:
        what = given if given is not None else load_object(choice.name, "model") if ":" in choice.name else choice.name
        return arch(what, spec, objective, settings.width, choice.options, example=example)

    names = [Named(name=name) for name in settings.models] or [settings.model]
    own = tuple(made(choice, model) for choice in names)
    if not settings.common_model.name:
        return own
    try:
        common = made(settings.common_model)
    except ConfigError as error:  # "model=...: ..."
        raise ConfigError(f"common_{error}") from None
    return tuple(replace(one, other=common) for one in own)


def make_problem(settings: Settings, method: Method, federation: data.Federation, model: Any = None) -> Problem:
    """Return the problem for an engine. Raise ConfigError if the method does not fit the architectures."""
    n = training_clients(settings, method, federation)
    archs = make_archs(settings, federation.spec, federation.objective, federation.example(), model)
    size = n if settings.privacy.on else cohort_size(settings, n)
    task = Task(
        n_clients=n,
        max_cohort=size,
        objective=federation.objective,
        spec=federation.spec,
        width=archs[0].features,
        rounds=settings.rounds,
        lr_scales=lr_scales(settings.schedule, settings.rounds),
    )
    problem = Problem(
        method=method,
        task=task,
        archs=archs,
        arch_of=tuple(i % len(archs) for i in range(federation.n_clients)),
        data=federation,
        plan=Plan(settings.batch_size, settings.drop_last),
        seed=settings.seed,
        same_init=settings.same_init,
        bf16=settings.precision == "bf16",
        codec=Codec(parse(settings.uplink, "uplink"), parse(settings.downlink, "downlink")),
        keep_fitted=settings.eval.fitted,
        slowdowns=slowdowns(settings, method, n) if settings.devices.stragglers == "partial" else (),
    )
    check_min_clients(settings, size)
    refuse_exclusions(settings, method, size)
    _check_target(settings.eval.target, task.objective.primary)
    _check_needs(settings.method.name, problem)
    if settings.eval.shared_head and (reason := no_shared_features(problem)):
        raise ConfigError(f"eval.shared_head=true: {reason}; remove eval.shared_head")
    _check_nets(problem)
    _check_single_examples(problem)
    _check_phases(method)
    _warn_different_starts(problem)
    _warn_without_validation(problem)
    if settings.common_model.name and "common_model" not in method.needed:
        log.warning("common_model=%s: has no effect with method=%s", settings.common_model.name, settings.method.name)
    return problem


def _check_target(target: float | None, metric: Metric) -> None:
    """Raise ConfigError if `eval.target` is not a possible value of the primary metric."""
    if target is not None and target <= 0 and not metric.percent:
        raise ConfigError(f"eval.target={target:g}: must be above 0")
    if target is None or not metric.percent or 0 < target <= 1:
        return
    remedy = f"for {target:g} %, set {target / 100:g}" if 1 < target <= 100 else "set a fraction, such as 0.8"
    raise ConfigError(
        f"eval.target={target:g}: must be above 0 and at most 1, because {metric.name} is a fraction; {remedy}"
    )


def _check_needs(name: str, problem: Problem) -> None:
    """Raise ConfigError if the data or a model does not meet one of the method's requirements."""
    task, needs, remedy = problem.task, problem.method.needed, problem.method.remedy
    classes = isinstance(task.objective, Classification)
    pictures = task.spec.is_single and len(task.spec.shape) == 3 and not task.spec.fields[0].is_integer
    for need, there, what in (
        ("classes", classes, f"needs classes, but data={problem.data.name} is {task.objective.task}"),
        ("pictures", pictures, f"needs images (C, H, W), but inputs are {task.spec}"),
    ):
        if need in needs and not there:
            raise ConfigError(f"method={name}: {what}; {remedy}use another method, such as fedavg or fedper")
    for choice in every_arch(problem):
        if needs & {"head", "vector"} and not choice.has_head:
            n = task.objective.n_outputs
            raise ConfigError(
                f"method={name}: needs a model with a linear head, but model={choice.name} has no nn.Linear with {n} outputs; "
                "give it one as .head, or use a method such as fedavg"
            )
        if "vector" in needs and not choice.has_vector:
            raise ConfigError(
                f"method={name}: needs one feature vector per example, but model={choice.name} has one per position; "
                "use a method such as fedavg or fedper"
            )


def every_arch(problem: Problem) -> tuple[Architecture, ...]:
    """Return the clients' architectures and, if the method needs it, the architecture that they have in common."""
    common = tuple(choice.common for choice in problem.archs[:1]) if "common_model" in problem.method.needed else ()
    return (*problem.archs, *common)


def no_shared_features(problem: Problem) -> str:
    """Return the reason why `eval.shared_head` cannot fit a classifier on shared features, or ""."""
    name, objective = type(problem.method).__name__, problem.task.objective
    if problem.method.shared_features() is None:
        return f"clients of {name} share no body whose features could be used"
    if not isinstance(objective, Classification):
        return f"needs classes, but data={problem.data.name} is {objective.task}"
    lacking = next((choice.name for choice in every_arch(problem) if not choice.has_vector), None)
    return f"model={lacking} has no body with one feature vector per example" if lacking else ""


def training_clients(settings: Settings, method: Method, federation: data.Federation) -> int:
    """Return the number of clients that train, which are all clients except those that join afterwards."""
    joining = settings.join.clients
    if joining and method.pooled:
        name = settings.method.name
        raise ConfigError(
            f"join.clients={joining}: {name} pools all examples in one place, so no client can join; leave join.clients at 0"
        )
    try:
        check_cohort(settings, federation.n_clients)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return federation.n_clients - joining


def _check_phases(method: Method) -> None:
    """Raise MethodError if two phases have the same name, because names identify optimiser states, random streams and logs."""
    for phases in (method.phases(), method.adapt()):
        names = [train.name for train in trains_of(phases)]
        names += [phase.name for phase in phases if not isinstance(phase, Train)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise MethodError(f"{type(method).__name__}: two phases are called '{min(twice)}'; rename one")


def _check_nets(problem: Problem) -> None:
    """Raise an error unless the nets that are shared or trained exist, and all clients have the same shared nets."""
    method, forms = problem.method, []
    name, trains = type(method).__name__, trains_of((*method.phases(), *method.adapt()))
    for place, choice in enumerate(problem.archs):
        weights = read_weights(problem.modules(place))
        if method.shared:
            prefix = f"model={choice.name}: {name} shares {', '.join(method.shared)}, but here"
            forms.append(tree.structure(_part(weights, method.shared, prefix)))
            _warn_without_norms(method, weights, choice.name)
        for train in trains:
            prefix = f"model={choice.name}: {name} trains {', '.join(train.params)}, but"
            if not _part(weights, train.params, prefix)["params"]:
                raise ConfigError(f"{prefix} all of it is frozen (requires_grad=False)")
    if any(form != forms[0] for form in forms):
        names = ", ".join(choice.name for choice in problem.archs)
        remedy = "; set common_model to one architecture for all" if "common_model" in method.needed else ""
        raise ConfigError(
            f"models={names}: {type(method).__name__} shares {', '.join(method.shared)}, which must be the same for all clients{remedy}"
        )


def _check_single_examples(problem: Problem) -> None:
    """Raise ConfigError if a client's model cannot train on one example (BatchNorm), but one of its batches has only one example."""
    data = problem.data
    for i in range(data.n_clients):
        if not (data.n_train(i) == 1 or (problem.plan.batch_size == 1 and data.n_train(i))):
            continue
        choice = problem.archs[problem.arch_of[i]]
        try:
            with torch.random.fork_rng(devices=[]):
                dry_run(choice.model().to(torch.get_default_dtype()), map_inputs(lambda x: x[:1], data.example()), True)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            why = (
                "has one training example"
                if data.n_train(i) == 1
                else "trains on batches of one example (batch_size=1)"
            )
            raise ConfigError(f"client {i} {why}, and model={choice.name}: {TOO_FEW}") from None


def _warn_different_starts(problem: Problem) -> None:
    """Log one line if clients have different initial weights that are neither sent nor trained (FedBABU's heads)."""
    method = problem.method
    if problem.same_init or not method.shared:
        return
    params = read_weights(problem.modules(0))
    moving = set(select(params, method.shared)["params"])
    moving |= {n for train in trains_of(method.phases()) for n in select(params, train.params)["params"]}
    if fixed := [name for name in params["params"] if name not in moving]:
        message = "same_init=false: each client keeps its own random '%s', which %s neither sends nor trains; set same_init=true"
        log.warning(message, fixed[0], type(method).__name__)


def _warn_without_validation(problem: Problem) -> None:
    """Log one line if a method visits validation examples (FedFomo) and some clients have none."""
    if not problem.uses_valid:
        return
    n = problem.task.n_clients
    if without := sum(not problem.data.n_valid(i) for i in range(n)):
        message = "%s: %d of %d clients have no validation examples, and use their training examples instead; set eval.valid=0.2"
        log.warning(message, type(problem.method).__name__, without, n)


def _warn_without_norms(method: Method, weights: Weights, model: str) -> None:
    """Log one line if a method treats normalisation layers separately (FedBN), but the model has none."""
    if any(pattern.endswith("norm") for pattern in method.shared) and not norm_layers(weights):
        message = (
            "model=%s has no normalisation layer, so %s does the same as FedAvg; try a model with one, such as resnet8"
        )
        log.warning(message, model, type(method).__name__)


def _part(weights: Weights, patterns: Sequence[str], prefix: str) -> Weights:
    """Return the weights that the patterns match. Raise ConfigError, with a message that starts with `prefix`, if one matches nothing."""
    try:
        return select(weights, patterns)
    except MethodError as error:
        raise ConfigError(f"{prefix} {error}") from None


def engine_for(settings: Settings, place: accelerator.DeviceBudget, problem: Problem) -> Engine:
    """Return the engine that the settings name."""
    e = settings.engine
    return make_engine(
        e.name,
        problem,
        workers=e.workers,
        lanes=e.lanes,
        address=e.address,
        deadline_s=e.deadline_s,
        place=place,
        convolutions=e.convolutions,
    )


def initial_weights(problem: Problem) -> Weights:
    """Return a client's initial weights, for the server's initial state."""
    return read_weights(problem.modules(0))


def buffers_policy(server: Tree, weights: Weights) -> str | None:
    """Return whether running statistics are sent ("shared") or stay with the client ("private"), or None if there are none.

    `server` is the server's state, which contains the statistics if they are sent.
    """
    if not weights["buffers"]:
        return None
    return "shared" if any("/buffers/" in f"/{path}" for path in tree.structure(server)) else "private"
