"""Changes to PFLlib that remove a difference with a known cause, and initial weights of nets other than the model."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from weights import ROUNDS, TRAIN, Arrays, chosen, parameters, start_clients

from fedloom.experiment.loop import Experiment
from fedloom.method import Batch
from fedloom.methods import per_fedavg
from fedloom.training.fast import step_cache


def prototypes_after_training(server: Any) -> None:
    """Let PFLlib's clients compute prototypes with the trained model, by the method that the released code does not call."""
    for client in server.clients:
        train = client.train
        client.train = lambda client=client, train=train: (train(), client.collect_protos())


def heads_as_sent(server: Any) -> None:
    """Let PFLlib combine the heads that clients have sent, in the order of their statistics, and keep weights below 0.001."""
    receive = server.receive_models

    def receive_copies() -> None:
        receive()
        server.uploaded_heads = copy.deepcopy(server.uploaded_heads)

    server.receive_models = receive_copies
    module = sys.modules[type(server).__module__]
    module.random = types.SimpleNamespace(sample=lambda population, k: list(population)[:k])
    exec(inspect.getsource(module.solve_quadratic).replace("eps = 1e-3", "eps = 0"), vars(module))


def constant_teachers(server: Any) -> None:
    """Let PFLlib's clients use the mean KL divergence over examples, with a constant teacher."""
    for client in server.clients:
        client.KL = lambda student, teacher: F.kl_div(student, teacher.detach(), reduction="batchmean")


def policies_and_contexts(run: Experiment, server: Any) -> None:
    """Start PFLlib's FedCP from our policy, and from the context of the initial head."""
    start_clients(run, server, "policy", "model.gate.cs")
    for client in server.clients:
        client.set_head_g(client.model.head_g)


def softmax_policy(server: Any) -> None:
    """Remove the Gumbel noise of PFLlib's policy."""
    module = sys.modules[type(server).__module__]
    module.F = types.SimpleNamespace(gumbel_softmax=lambda x, dim, **_: x.softmax(dim))


def embeddings_and_layers(run: Experiment, server: Any) -> None:
    """Start PFLlib's GPFL from our embeddings and our conditional layer."""
    start_clients(run, server, "classes", "GCE")
    start_clients(run, server, "valve", "CoV")


def contexts_of_received_embeddings(server: Any) -> None:
    """Let PFLlib's clients compute contexts from the received embeddings, and a mean distance over examples."""
    module = sys.modules[type(server.clients[0]).__module__]
    shim = types.ModuleType("torch")
    shim.__dict__.update(vars(torch), norm=lambda x, _: x.norm(dim=1).mean())
    module.torch = shim
    for client in server.clients:
        receive = client.set_GCE

        def receive_twice(GCE: nn.Module, receive: Callable[[nn.Module], None] = receive) -> None:
            receive(GCE)
            receive(GCE)  # now from the received embeddings

        client.set_GCE = receive_twice
        receive_twice(client.GCE)


def edited(method: Callable[..., Any], *changes: tuple[str, str]) -> Callable[..., Any]:
    """Return a method of PFLlib with changes to its source code."""
    source = textwrap.dedent(inspect.getsource(method))
    for old, new in changes:
        if old not in source:
            raise SystemExit(f"{method.__qualname__} of PFLlib has changed: it does not contain '{old}'")
        source = source.replace(old, new)
    names = dict(vars(sys.modules[method.__module__]))
    exec(source, names)
    return names[method.__name__]  # type: ignore[no-any-return]


def edit_training(server: Any, *changes: tuple[str, str]) -> None:
    """Change the source code of the training of PFLlib's clients."""
    train = edited(type(server.clients[0]).train, *changes)
    for client in server.clients:
        client.train = functools.partial(train, client)


def squared_pull(server: Any) -> None:
    """Let PFLlib's FedAMP minimise half the squared distance."""
    changes = ("p.data.view(-1)", "p.view(-1)"), ("torch.norm(gm-pm, p=2)", "(gm - pm).square().sum()")
    edit_training(server, *changes)


def squared_regularisation(server: Any) -> None:
    """Let PFLlib's FedDyn add half the squared distance."""
    change = ("torch.norm(v1 - self.global_model_vector, 2)", "(v1 - self.global_model_vector).square().sum()")
    edit_training(server, change)


def our_start_of_feddyn(run: Experiment) -> Sequence[Arrays]:
    """Return x, the model from which clients start, which corresponds to PFLlib's global model."""
    return [chosen(run.hooks.downlink(run.server, ROUNDS, [0]).to(0)["weights"]["params"], "model")]


def own_calibration(server: Any) -> None:
    """Let each of PFLlib's clients compute the margins from its own examples."""
    for client in server.clients:
        client.calibration = (client.sample_per_class**-0.25).tile(TRAIN, 1)


def similarity_of_whole_models(server: Any) -> None:
    """Let PFLlib's FedCross compare whole models, and send model i to client i."""

    def similarity() -> tuple[list[list[float]], float]:
        flat = torch.stack([torch.cat([p.flatten() for p in parameters(model)]) for model in server.w_locals])
        return F.cosine_similarity(flat[:, None], flat, dim=2).tolist(), 0.0

    server.calculate_similarity = similarity
    server.select_clients = lambda: server.clients


def mentors_and_maps(run: Experiment, server: Any) -> None:
    """Start PFLlib's FedKD from our mentors and maps."""
    start_clients(run, server, "personal", "model")
    start_clients(run, server, "map", "W_h")


def constant_teachers_of_fedkd(server: Any) -> None:
    """Let mentor and mentee of PFLlib's FedKD treat each other as constants, and send the mentee without compression."""
    constant_teachers(server)
    changes = (
        ("/ (CE_loss + CE_loss_g)", "/ (CE_loss + CE_loss_g).detach()"),
        ("L_h = self.MSE(rep, self.W_h(rep_g))", "L_h = self.MSE(rep, self.W_h(rep_g).detach())"),
        ("L_h_g = self.MSE(rep, self.W_h(rep_g))", "L_h_g = self.MSE(rep.detach(), self.W_h(rep_g))"),
    )
    edit_training(server, *changes)

    def whole(owner: Any) -> None:
        model = owner.global_model
        named = (
            model.items() if isinstance(model, dict) else ((n, p.detach().numpy()) for n, p in model.named_parameters())
        )
        owner.compressed_param = {name: value.copy() for name, value in named}

    for owner in (server, *server.clients):
        owner.decomposition = functools.partial(whole, owner)


@contextlib.contextmanager
def batches_of_per_fedavg() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record the batches that our clients divide into halves, in the order of clients and steps."""
    seen: list[tuple[Tensor, Tensor]] = []
    parts, short = per_fedavg.parts, step_cache.SHORT_S

    def noted(batch: Batch, n: int) -> list[Batch]:
        if len(batch.y) == TRAIN:  # operations are counted with fewer examples
            seen.append((batch.x.clone(), batch.y.clone()))
        return parts(batch, n)

    per_fedavg.parts, step_cache.SHORT_S = noted, 0.0  # a replayed step would not call it
    try:
        yield seen
    finally:
        per_fedavg.parts, step_cache.SHORT_S = parts, short


class Recorded:
    """A loader that returns one recorded batch per pass."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.rest = iter(batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield next(self.rest)


def our_halves_once(server: Any) -> None:
    """Let PFLlib's Per-FedAvg train once per round, on the halves of our batches."""
    server.train = functools.partial(
        edited(type(server).train, ("client.train()\n            client.train()", "client.train()")), server
    )
    n_steps = len(server.seen) // (ROUNDS * len(server.clients))
    for i, client in enumerate(server.clients):
        turns = [(number * len(server.clients) + i) * n_steps for number in range(ROUNDS)]
        loader = Recorded([batch for start in turns for batch in server.seen[start : start + n_steps]])
        client.load_train_data = lambda *_, loader=loader: loader


def current_models(server: Any) -> None:
    """Let PFLlib's FedFomo compare candidates with a client's current model."""
    for client in server.clients:
        train = client.train

        def train_from_current(client: Any = client, train: Callable[[], None] = train) -> None:
            client.old_model = copy.deepcopy(client.model)
            train()

        client.train = train_from_current


def align_on_all_examples(server: Any) -> None:
    """Let PFLlib's FedAS align on full batches, from the second round."""
    send = server.send_selected_models
    server.send_selected_models = lambda selected, number: send(selected, number) if number else None
    for client in server.clients:
        client.load_train_data = functools.partial(full_batches, client.load_train_data)


def full_batches(load: Callable[[], Any], batch_size: int = 0) -> Any:
    """Return PFLlib's batches of the usual size."""
    return load()


def separate_head(server: Any) -> None:
    """Give PFLlib's server a separate head."""
    server.head = copy.deepcopy(server.head)
    server.opt_h = torch.optim.SGD(server.head.parameters(), lr=server.server_learning_rate)


def their_head(server: Any) -> Sequence[Arrays]:
    """Return the parameters of the head that PFLlib's server trains."""
    return [parameters(server.head)]
