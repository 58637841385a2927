"""Compare fedloom's methods with PFLlib's, weight by weight.

    git clone https://github.com/TsingZ0/PFLlib && pip install h5py cvxpy
    python benchmarks/verify/pfllib.py --clone PFLlib                  all methods
    python benchmarks/verify/pfllib.py --clone PFLlib scaffold ditto   some of them

Both train the same four clients with the same initial weights for three rounds, on full batches and in float64, so that no random draw is
left. The result is the largest relative difference of the weights that each of them holds at the end, on the server and on the clients.
PFLlib's servers and clients run as they are in the clone: the script replaces only what evaluates and saves, and the reader of data files,
which would convert inputs to float32. Some differences have a known cause, which `Case.switch` removes in PFLlib's code or in ours.

The results are in `benchmarks/results/verify-pfllib.json`, and the page docs/verification.md shows them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import functools
import importlib
import inspect
import io
import json
import random
import subprocess
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom.config.settings import make_settings
from fedloom.experiment.loop import Experiment
from fedloom.experiment.environment import environment
from fedloom.nets import read_weights

RESULTS = Path(__file__).parents[1] / "results" / "verify-pfllib.json"
CLIENTS, TRAIN, VALID, TEST, ROUNDS, HIDDEN, LR = 4, 40, 8, 10, 3, 20, 0.1
EQUAL = 1e-6  # the largest relative difference that counts as equal

Arrays = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method in both tools."""

    server: str
    """PFLlib's server, as module:Class."""
    ours: Mapping[str, Any] = field(default_factory=dict)
    """fedloom's hyper-parameters."""
    rounds: int = ROUNDS
    """Number of our rounds."""
    theirs: Mapping[str, Any] = field(default_factory=dict)
    """PFLlib's arguments."""
    split: bool = True
    """Whether PFLlib divides the model into a base and a head."""
    parts: Mapping[str, tuple[Callable[[Experiment], Sequence[Arrays]], Callable[[Any], Sequence[Arrays]]]]
    """What is compared: by name, a function of our run and one of PFLlib's server, which return one list of tensors per model."""
    starts: Callable[[Experiment, Any], None] | None = None
    """Copies initial weights beyond the model's from our run to PFLlib's server."""
    valid: bool = False
    """Whether our clients hold out the validation examples that PFLlib holds out."""
    switch: Callable[[Any], None] | None = None
    """Changes PFLlib's server so that a difference with a known cause disappears."""
    cause: str = ""
    """The cause, with the place in PFLlib's code."""


# what is compared


def our_server(net: str = "model") -> Callable[[Experiment], Sequence[Arrays]]:
    """Return the server's parameters of one net."""
    return lambda run: [chosen(run.server["weights"]["params"], net)]


def our_clients(net: str = "model") -> Callable[[Experiment], Sequence[Arrays]]:
    """Return each client's parameters of one net."""
    return lambda run: [chosen(run.engine.client(i).weights["params"], net) for i in range(CLIENTS)]


def chosen(params: Mapping[str, Tensor], net: str) -> Arrays:
    """Return the tensors of a net, or of a part of it such as `model:body`, in the order of the modules.

    Some methods have the nets `body` and `head` instead of `model`.
    """
    prefix = net.replace(":", ".") + "."
    if not any(name.startswith("model.") for name in params):
        prefix = prefix.removeprefix("model.")
    return [tensor.detach().clone() for name, tensor in params.items() if name.startswith(prefix)]


def their_server(part: str = "") -> Callable[[Any], Sequence[Arrays]]:
    """Return the parameters of PFLlib's global model, or of one of its attributes."""
    return lambda server: [parameters(getattr(server.global_model, part) if part else server.global_model)]


def their_clients(path: str = "model") -> Callable[[Any], Sequence[Arrays]]:
    """Return the parameters of an attribute of each of PFLlib's clients, such as `model.head`."""
    return lambda server: [parameters(attribute(client, path)) for client in server.clients]


def attribute(client: Any, path: str) -> Any:
    """Return an attribute of an attribute, such as `model.head`."""
    return functools.reduce(getattr, path.split("."), client)


def parameters(module: nn.Module) -> Arrays:
    """Return a module's parameters."""
    return [p.detach().clone() for p in module.parameters()]


def start_clients(run: Experiment, server: Any, net: str, path: str) -> None:
    """Give an attribute of PFLlib's clients the initial weights of one of our nets."""
    weights = chosen(read_weights(run.problem.modules(0))["params"], net)
    for client in server.clients:
        with torch.no_grad():
            for p, tensor in zip(attribute(client, path).parameters(), weights, strict=True):
                p.copy_(tensor)


def prototypes_after_training(server: Any) -> None:
    """Let PFLlib's clients compute prototypes with the trained model, by the method that the released code leaves out."""
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


def squared_pull(server: Any) -> None:
    """Let PFLlib's FedAMP minimise half the squared distance."""
    changes = ("p.data.view(-1)", "p.view(-1)"), ("torch.norm(gm-pm, p=2)", "(gm - pm).square().sum()")
    train = edited(type(server.clients[0]).train, *changes)
    for client in server.clients:
        client.train = functools.partial(train, client)


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
    """Give PFLlib's server a head of its own."""
    server.head = copy.deepcopy(server.head)
    server.opt_h = torch.optim.SGD(server.head.parameters(), lr=server.server_learning_rate)


def their_head(server: Any) -> Sequence[Arrays]:
    """Return the parameters of the head that PFLlib's server trains."""
    return [parameters(server.head)]


SERVER = (our_server(), their_server())
CLIENT = (our_clients(), their_clients())
BODY = (our_server("model:body"), their_server())
HEADS = (our_clients("model:head"), their_clients("model.head"))

CASES: dict[str, Case] = {
    "fedavg": Case(server="serveravg:FedAvg", split=False, parts={"server": SERVER}),
    "local": Case(server="serverlocal:Local", split=False, parts={"clients": CLIENT}),
    "fedprox": Case(
        server="serverprox:FedProx", ours={"mu": 0.5}, theirs={"mu": 0.5}, split=False, parts={"server": SERVER}
    ),
    "scaffold": Case(server="serverscaffold:SCAFFOLD", split=False, parts={"server": SERVER}),
    "fedper": Case(server="serverper:FedPer", parts={"body": BODY, "heads": HEADS}),
    "fedrep": Case(
        server="serverrep:FedRep", ours={"head_epochs": 2}, theirs={"plocal_epochs": 2}, parts={"body": BODY, "heads": HEADS}
    ),
    "ditto": Case(
        server="serverditto:Ditto",
        ours={"mu": 0.5, "personal_epochs": 2},
        theirs={"mu": 0.5, "plocal_epochs": 2},
        split=False,
        parts={"server": SERVER, "personal": (our_clients("personal"), their_clients("model_per"))},
    ),
    "fedbabu": Case(
        server="serverbabu:FedBABU", theirs={"fine_tuning_epochs": 0}, parts={"body": BODY},
    ),
    "moon": Case(
        server="servermoon:MOON", ours={"mu": 1.0, "temperature": 0.5}, theirs={"mu": 1.0, "tau": 0.5}, parts={"server": SERVER}
    ),
    "fedproto": Case(
        server="serverproto:FedProto",
        ours={"local_epochs": 1, "prototype_mean": "uniform"},
        theirs={"local_epochs": 1, "lamda": 1.0},
        parts={"clients": CLIENT},
        switch=prototypes_after_training,
        cause="PFLlib averages features during training (clientproto.py, train); the paper and fedloom, with the trained model",
    ),
    "fedrod": Case(
        server="serverrod:FedROD",
        starts=lambda run, server: start_clients(run, server, "own", "head"),
        parts={"server": SERVER, "personal heads": (our_clients("own"), their_clients("head"))},
    ),
    "fedala": Case(
        server="serverala:FedALA",
        ours={"first_epochs": 11},  # PFLlib stops when the losses of ten epochs are close, here after eleven
        theirs={"rand_percent": 100, "layer_idx": 2, "eta": 1.0},
        split=False,
        parts={"server": SERVER, "clients": CLIENT},
    ),
    "feddbe": Case(
        server="serverdbe:FedDBE",
        ours={"kappa": 1.0, "mean_momentum": 1.0},
        theirs={"kl_weight": 1.0, "momentum": 1.0},
        rounds=ROUNDS + 1,  # our first round is PFLlib's initialization period
        parts={"server": SERVER},
    ),
    "lg_fedavg": Case(
        server="serverlg:LG_FedAvg",
        parts={"head": (our_server("model:head"), their_server()), "bodies": (our_clients("model:body"), their_clients("model.base"))},
    ),
    "pfedme": Case(
        server="serverpFedMe:pFedMe",
        ours={"mu": 1.0, "personal_lr": 0.05, "inner_steps": 3, "local_steps": 0, "weight_decay": 0.001},
        theirs={"lamda": 1.0, "p_learning_rate": 0.05, "K": 3, "beta": 1.0},
        split=False,
        parts={"server": SERVER},
    ),
    "fedpac": Case(
        server="serverpac:FedPAC",
        ours={"prototype_mean": "uniform", "head_lr": LR, "momentum": 0.0, "weight_decay": 0.0},
        theirs={"lamda": 1.0},
        parts={"body": BODY},
        switch=heads_as_sent,
        cause="PFLlib overwrites each client's head before it combines the next one's, draws the order of the heads anew, so that the "
        "statistics are those of other clients (serverpac.py, receive_models), and sets weights below 0.001 to 0 (solve_quadratic)",
    ),
    "fedamp": Case(
        server="serveramp:FedAMP",
        ours={"mu": 1.0, "alpha": 0.2, "sigma": 1.0},
        theirs={"lamda": 1.0, "alphaK": 0.2, "sigma": 1.0},
        split=False,
        switch=squared_pull,
        parts={"clients": CLIENT},
        cause="PFLlib computes the pull from `.data`, so it has no gradient, and from a distance that is not squared (clientamp.py, train)",
    ),
    "fedfomo": Case(
        server="serverfomo:FedFomo",
        ours={"candidates": CLIENTS - 1, "epsilon": 0.0},
        theirs={"M": CLIENTS, "batch_size": TRAIN - VALID},
        split=False,
        valid=True,
        switch=current_models,
        parts={"clients": CLIENT},
        cause="PFLlib compares candidates with the client's model before its last training (clientfomo.py, train)",
    ),
    "fedas": Case(
        server="serveras:FedAS",
        ours={"fisher_batch": 1000},
        switch=align_on_all_examples,
        parts={"body": (our_server("model:body"), their_server("base")), "heads": HEADS},
        cause="PFLlib aligns on batches of 16 without the last examples, and already in the first round (clientas.py, set_parameters)",
    ),
    "apfl": Case(
        server="serverapfl:APFL",
        ours={"alpha": 0.5},
        theirs={"alpha": 0.5},
        split=False,
        parts={"server": SERVER, "personal": (our_clients("personal"), their_clients("model_per"))},
        cause="PFLlib trains the personal model on its own gradient and mixes it after each local update (clientapfl.py, train)",
    ),
    "fml": Case(
        server="serverfml:FML",
        ours={"alpha": 0.5, "beta": 0.5},
        theirs={"alpha": 0.5, "beta": 0.5},
        split=False,
        starts=lambda run, server: start_clients(run, server, "personal", "model"),
        switch=constant_teachers,
        parts={"server": SERVER, "personal": (our_clients("personal"), their_clients())},
        cause="PFLlib divides the KL divergence by the number of classes, too, and lets gradients flow through the teachers (clientfml.py, train)",
    ),
    "fedgh": Case(
        server="servergh:FedGH",
        ours={"server_lr": 0.1, "server_batch": 1000},
        theirs={"server_learning_rate": 0.1},
        switch=separate_head,
        cause="In PFLlib, the server's head and client 0's head are one module, which client 0 trains, too (servergh.py, __init__)",
        parts={"head": (our_server("model:head"), their_head), "bodies": (our_clients("model:body"), their_clients("model.base"))},
    ),
    "fedcp": Case(
        server="servercp:FedCP",
        ours={"mmd_weight": 1.0},
        theirs={"lamda": 1.0},
        starts=policies_and_contexts,
        switch=softmax_policy,
        parts={
            "body": (our_server("model:body"), lambda server: [parameters(server.global_modules)]),
            "common head": (our_server("common"), lambda server: [parameters(server.head)]),
            "policy": (our_server("policy"), lambda server: [parameters(server.cs)]),
            "heads": (our_clients("model:head"), their_clients("model.model.head")),
        },
        cause="PFLlib adds Gumbel noise to the policy (servercp.py, ConditionalSelection) and starts from a random context",
    ),
    "gpfl": Case(
        server="servergpfl:GPFL",
        ours={"magnitude": 0.1, "embedding_decay": 0.1},
        theirs={"lamda": 0.1, "mu": 0.1},
        starts=embeddings_and_layers,
        switch=contexts_of_received_embeddings,
        parts={
            "body": BODY,
            "embeddings": (our_server("classes"), lambda server: [parameters(server.GCE)]),
            "heads": (our_clients("model:head"), their_clients("model.head")),
        },
        cause="PFLlib computes contexts from the client's own embeddings, and 0 in the first round (clientgpfl.py, set_GCE); its distance is "
        "the norm of the whole batch (train)",
    ),
}


# our side


@contextlib.contextmanager
def federation() -> Iterator[Path]:
    """Write a partition of the digits into four clients of equal size and different classes, and return the folder."""
    from fedloom.data import load

    labels = load("digits").labels.numpy()
    order = np.argsort(labels[: 2 * CLIENTS * (TRAIN + TEST)], kind="stable")[:: 2]
    blocks = np.array_split(order, 2 * CLIENTS)  # two blocks of neighbouring classes per client
    rows = [np.concatenate([blocks[i], blocks[i + CLIENTS]]) for i in range(CLIENTS)]
    rows = [np.random.default_rng(i).permutation(mine) for i, mine in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        for name, n_valid in (("dealt", 0), ("valid", VALID)):
            splits = {"train": slice(TRAIN - n_valid), "valid": slice(TRAIN - n_valid, TRAIN), "test": slice(TRAIN, None)}
            dealt = {split: [mine[part].tolist() for mine in rows] for split, part in splits.items()}
            Path(folder, f"{name}.json").write_text(json.dumps(dealt))
        yield Path(folder)


def our_run(name: str, case: Case, folder: Path) -> Experiment:
    """Return our run, before its first round."""
    settings = {
        "method": {"name": name, "lr": LR, "local_epochs": 2, **case.ours},
        "model": {"name": "mlp", "hidden": HIDDEN},
        "data": {"name": "digits"},
        "partition": {"name": "file", "path": str(folder / ("valid.json" if case.valid else "dealt.json"))},
        "engine": {"name": "sequential", "threads": 1},
        "rounds": case.rounds,
        "batch_size": TRAIN,
        "precision": "fp64",
        "out": str(folder / name),
    }
    return Experiment(make_settings(settings))


# PFLlib's side


class Net(nn.Module):
    """Our MLP with the attribute names that PFLlib expects."""

    def __init__(self, weights: Arrays) -> None:
        super().__init__()
        self.linear, self.fc = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, 10)
        with torch.no_grad():
            for p, tensor in zip(self.parameters(), weights, strict=True):
                p.copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 10)."""
        return self.fc(torch.relu(self.linear(x.flatten(1))))


def defaults(system: Path) -> dict[str, Any]:
    """Return the defaults of PFLlib's arguments, read from main.py, which itself imports torchvision."""
    parser = argparse.ArgumentParser()
    for node in ast.walk(ast.parse((system / "main.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parser.add_argument":
            exec(ast.unparse(node), {"parser": parser})
    return vars(parser.parse_args([]))


def their_run(case: Case, run: Experiment, system: Path) -> Any:
    """Return PFLlib's server with its clients, before the first round."""
    data = {
        (i, is_train): [pair for split in splits for pair in zip(*getattr(run.data, split)(i), strict=True)]
        for i in range(CLIENTS)
        for is_train, splits in ((True, ("train", *(["valid"] if case.valid else []))), (False, ("test",)))
    }
    reader = importlib.import_module("utils.data_utils")
    reader.read_client_data = lambda _, i, is_train=True, few_shot=0: data[i, is_train]
    base = importlib.import_module("flcore.servers.serverbase")
    for name in ("save_results", "save_global_model"):
        setattr(base.Server, name, lambda *_: None)
    module, cls = case.server.split(":")
    servers = importlib.import_module(f"flcore.servers.{module}")
    values = defaults(system) | {
        "device": "cpu", "dataset": "digits", "num_clients": CLIENTS, "global_rounds": ROUNDS - 1, "batch_size": TRAIN,
        "local_epochs": 2, "local_learning_rate": LR, "feature_dim": HIDDEN, **case.theirs,
    }  # fmt: skip
    args = types.SimpleNamespace(**values)
    weights = read_weights(run.problem.modules(0))["params"]
    args.model = Net(chosen(weights, "model"))
    if case.split:
        args.head = copy.deepcopy(args.model.fc)
        args.model.fc = nn.Identity()
        args.model = importlib.import_module("flcore.trainmodel.models").BaseHeadSplit(args.model, args.head)
    server = getattr(servers, cls)(args, 0)
    for name in ("evaluate", "evaluate_personalized", "evaluate_one_step", "avg_generalization_metrics"):
        setattr(server, name, lambda *_, **__: None)
    server.rs_test_acc = server.rs_test_acc_per = [0]
    return server


def difference(ours: Sequence[Arrays], theirs: Sequence[Arrays]) -> float:
    """Return the largest relative difference of two lists of models: of the norms, tensor by tensor."""
    if [[x.shape for x in model] for model in ours] != [[x.shape for x in model] for model in theirs]:
        shapes = [[list(x.shape) for x in models[0]] for models in (ours, theirs)]
        raise SystemExit(f"the two tools hold different tensors: {len(ours)} x {shapes[0]}, {len(theirs)} x {shapes[1]}")
    pairs = [(x, y) for one, other in zip(ours, theirs, strict=True) for x, y in zip(one, other, strict=True)]
    return max(float((x - y).norm() / y.norm().clamp(min=1e-300)) for x, y in pairs)


def compare(name: str, case: Case, folder: Path, system: Path) -> dict[str, Any]:
    """Run a method in both tools, and return the differences of their weights."""
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng():
        run = our_run(name, case, folder)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            server = their_run(case, run, system)
            if case.starts:
                case.starts(run, server)
            if case.switch:
                case.switch(server)
            start = parameters(server.clients[0].model)
            server.train()
    run.run()
    moved = difference([start], [parameters(server.clients[0].model)])
    found = {what: difference(ours(run), theirs(server)) for what, (ours, theirs) in case.parts.items()}
    return {"moved": moved, "differences": found, "equal": max(found.values()) < EQUAL, "cause": case.cause}


def main() -> None:
    """Compare the methods, print the differences, and save them if all methods were compared."""
    parser = argparse.ArgumentParser(description="Compare fedloom's methods with PFLlib's, weight by weight.")
    parser.add_argument("methods", nargs="*", choices=[*CASES, []], metavar="METHOD")
    parser.add_argument("--clone", required=True, help="path of a clone of PFLlib")
    given = parser.parse_args()
    system = Path(given.clone).resolve() / "system"
    if not (system / "main.py").is_file():
        raise SystemExit(f"--clone {given.clone}: there is no system/main.py; clone https://github.com/TsingZ0/PFLlib")
    sys.path.insert(0, str(system))
    results = {}
    with federation() as folder:
        for name in given.methods or CASES:
            results[name] = compare(name, CASES[name], folder, system)
            shown = ", ".join(f"{what} {value:.1e}" for what, value in results[name]["differences"].items())
            print(f"{name:12}{'equal' if results[name]['equal'] else 'differs':9}{shown}", flush=True)
    if not given.methods:
        commit = subprocess.run(["git", "-C", given.clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        facts = {"peer": "PFLlib", "commit": commit.stdout.strip(), "rounds": ROUNDS, "environment": environment()}
        RESULTS.write_text(json.dumps({**facts, "methods": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
