"""The same federations for comparison, run in the way of most research code: modules, DataLoaders, loops over clients.

The code follows the structure of PFLlib (Zhang et al., JMLR 2025) and of the papers' released code, but is rewritten. Every client has a
list of (x, y) pairs, its own copy of the model and a torch optimiser. Each round copies the global parameters to every client, trains the
clients of the cohort one after another, and averages parameters in Python. It then evaluates every client with the training batch size and
with the bookkeeping for AUC, and computes the loss on the whole training split. Inputs are NCHW. A client's compressed file is read
whenever the client trains or is evaluated.

FedRIR and FedMR follow their released code where it differs from PFLlib. Examples stay in memory. FedRIR evaluates the losses of both
stages on all training examples, and no AUC. FedMR evaluates the test examples and all training examples every tenth round. Here, it
evaluates the test examples in every round, as fedloom does, and a tenth of the time for the training examples is counted.

`fedloom bench` runs this file with `rival=benchmarks/pfllib_style.py:make`.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import label_binarize
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedloom.accelerator import torch_threads
from fedloom.engines import Problem
from fedloom.methods import FedMR, FedRIR
from fedloom.tools.bench import Rival, Times

Pairs = list[tuple[Tensor, Tensor]]
FEDMR_EVAL_BATCH, FEDMR_EVAL_EVERY = 128, 10


def make(problem: Problem, threads: int) -> Rival:
    """Return the loop for the problem's method: FedRIR, FedMR, or FedAvg for all other methods that share the whole `model`."""
    if isinstance(problem.method, FedRIR):
        return FedRIRLoop(problem, threads)
    return FedMRLoop(problem, threads) if isinstance(problem.method, FedMR) else FedAvgLoop(problem, threads)


class Client:
    """The data, nets and optimisers of one client."""

    def __init__(self, problem: Problem, i: int, nets: nn.ModuleDict, folder: Path) -> None:
        self.files = {split: folder / f"{split}-{i}.npz" for split in ("train", "test")}
        self.n_train = problem.data.n_train(i)
        for split, file in self.files.items():
            x, y = getattr(problem.data, split)(i)
            np.savez_compressed(file, x=x.numpy(), y=y.numpy())
        self.plan, self.epochs = problem.plan, problem.method.local_epochs
        self.n_classes = problem.task.n_classes
        self.nets = copy.deepcopy(nets)
        self.ce = nn.CrossEntropyLoss()

    def pairs(self, split: str) -> Pairs:
        """Return the examples of `train` or `test`."""
        with np.load(self.files[split]) as rows:
            return _pairs(torch.tensor(rows["x"]), torch.tensor(rows["y"]))

    def train_loader(self) -> DataLoader:
        """Return shuffled batches. A client with fewer examples than a batch uses one batch of all its examples, as in fedloom."""
        size = min(self.plan.batch_size, self.n_train)
        return DataLoader(self.pairs("train"), size, shuffle=True, drop_last=self.plan.drop_last)

    def test_loader(self) -> DataLoader:
        """Return the test split in batches of the training batch size."""
        return DataLoader(self.pairs("test"), self.plan.batch_size, shuffle=True)

    def logits(self, x: Tensor) -> Tensor:
        """Return the personal prediction (B, Y)."""
        return self.nets["model"](x)

    @torch.no_grad()
    def accuracy(self) -> tuple[int, int]:
        """Return the number of correct predictions and the number of test examples."""
        self.nets.eval()
        right = rows = 0
        for x, y in self.test_loader():
            right += int((self.logits(x).argmax(1) == y).sum())
            rows += len(y)
        return right, rows

    @torch.no_grad()
    def test_metrics(self) -> tuple[int, int, float]:
        """Return the number of correct predictions, the number of test examples, and the micro-averaged AUC."""
        self.nets.eval()
        right, scores, truth = 0, [], []
        for x, y in self.test_loader():
            output = self.logits(x)
            right += int((output.argmax(1) == y).sum())
            scores.append(output.numpy())
            truth.append(label_binarize(y.numpy(), classes=np.arange(self.n_classes)))
        labels = np.concatenate(truth)
        return right, len(labels), roc_auc_score(labels, np.concatenate(scores), average="micro")

    @torch.no_grad()
    def train_loss(self) -> tuple[float, int]:
        """Return the summed cross-entropy over the training split, and its number of examples."""
        self.nets.eval()
        total, rows = 0.0, 0
        for x, y in self.train_loader():
            total += float(self.ce(self.logits(x), y)) * len(y)
            rows += len(y)
        return total, rows


class FedAvgLoop:
    """FedAvg as in PFLlib."""

    shared = "model"

    def __init__(self, problem: Problem, threads: int) -> None:
        self.problem, self.threads = problem, threads
        nets = nn.ModuleDict(problem.modules(0)).requires_grad_(True)
        self.folder = Path(tempfile.mkdtemp(prefix="pfllib-style-"))
        weakref.finalize(self, shutil.rmtree, self.folder)
        self.clients = [self.client(i, nets) for i in range(problem.task.n_clients)]
        self.server = copy.deepcopy(nets[self.shared])

    def client(self, i: int, nets: nn.ModuleDict) -> Client:
        """Return a client with its optimiser."""
        client = Client(self.problem, i, nets, self.folder)
        client.optimizer = torch.optim.SGD(client.nets.parameters(), lr=self.problem.method.lr)
        return client

    def round(self, cohort: Sequence[int]) -> Times:
        """Run one round as described in `fedloom.tools.bench.Rival`."""
        with torch_threads(self.threads):
            started = time.perf_counter()
            for client in self.clients:
                _copy_into(client.nets[self.shared], self.server.parameters())
            for i in cohort:
                self.train(self.clients[i])
            self.aggregate([self.clients[i] for i in cohort])
            trained = time.perf_counter()
            self.score()
            scored = time.perf_counter()
            self.evaluate()
            evaluated = time.perf_counter()
        # Scoring alone is timed for the comparison of equal work. The tool itself scores as part of its evaluation.
        return Times(trained - started, scored - trained, max(evaluated - scored - (scored - trained), 0.0))

    def train(self, client: Client) -> None:
        """Train the cohort."""
        client.nets.train()
        for _ in range(client.epochs):
            for x, y in client.train_loader():
                loss = client.ce(client.logits(x), y)
                client.optimizer.zero_grad()
                loss.backward()
                client.optimizer.step()

    def aggregate(self, clients: Sequence[Client]) -> None:
        """Average the models by numbers of examples, parameter by parameter."""
        rows = sum(client.n_train for client in clients)
        self.server = copy.deepcopy(clients[0].nets[self.shared])
        for parameter in self.server.parameters():
            parameter.data.zero_()
        for client in clients:
            share = client.n_train / rows
            for mean, own in zip(self.server.parameters(), client.nets[self.shared].parameters(), strict=True):
                mean.data += own.data.clone() * share

    def score(self) -> float:
        """Return only the test accuracy."""
        found = [client.accuracy() for client in self.clients]
        return sum(right for right, _ in found) / sum(rows for _, rows in found)

    def evaluate(self) -> tuple[float, float, float]:
        """Return the test accuracy, AUC (for FedRIR, the cross-entropy on the test examples), and training loss over all clients."""
        test = [client.test_metrics() for client in self.clients]
        loss = [client.train_loss() for client in self.clients]
        rows = sum(n for _, n, _ in test)
        third = sum(a * n for _, n, a in test) / rows
        return sum(r for r, _, _ in test) / rows, third, sum(s for s, _ in loss) / sum(n for _, n in loss)


class FedRIRClient(Client):
    """A client with the nets gfe, csfe, generator, idm and head, and two Adam optimisers that persist. Examples stay in memory."""

    def __init__(self, problem: Problem, i: int, nets: nn.ModuleDict, folder: Path) -> None:
        super().__init__(problem, i, nets, folder)
        self.kept = {split: super(FedRIRClient, self).pairs(split) for split in self.files}
        self.method = problem.method
        n, lr = self.nets, problem.method.lr
        self.first = torch.optim.Adam([*n["csfe"].parameters(), *n["generator"].parameters()], lr=lr)
        second = [*n["gfe"].parameters(), *n["idm"].parameters(), *n["head"].parameters()]
        self.second = torch.optim.Adam(second, lr=lr)

    def pairs(self, split: str) -> Pairs:
        """Return the examples as described in `Client.pairs`."""
        return self.kept[split]

    def logits(self, x: Tensor) -> Tensor:
        """Return head([f_g, f_cs])."""
        specific = self.nets["csfe"](x).chunk(2, 1)[0]
        return self.nets["head"](torch.cat([self.nets["gfe"](x), specific], 1))

    @torch.no_grad()
    def test_metrics(self) -> tuple[int, int, float]:
        """Return the number of correct predictions, the number of test examples, and the mean cross-entropy."""
        self.nets.eval()
        right, loss = 0, 0.0
        for x, y in self.test_loader():
            output = self.logits(x)
            right += int((output.argmax(1) == y).sum())
            loss += float(self.ce(output, y)) * len(y)
        rows = len(self.pairs("test"))
        return right, rows, loss / rows

    @torch.no_grad()
    def train_loss(self) -> tuple[float, int]:
        """Return the losses of both stages, summed over the training split, and the number of its examples."""
        self.nets.eval()
        total, rows = 0.0, 0
        for x, y in self.train_loader():
            total += float(self.reconstruction(x, y) + self.classification(x, y)) * len(y)
            rows += len(y)
        return total, rows

    def reconstruction(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared error of the whole image, reconstructed from a masked image, and the KL divergence."""
        n, _, height, width = x.shape
        side = 4 if min(height, width) >= 28 else 2
        rows, columns = height // side, width // side
        n_masked = int(self.method.mask_ratio * rows * columns)
        stays = torch.ones(n, rows * columns)
        stays.scatter_(1, torch.rand(n, rows * columns).argsort(1)[:, :n_masked], 0.0)
        stays = stays.view(n, 1, rows, columns).repeat_interleave(side, 2).repeat_interleave(side, 3)
        mean, log_variance = self.nets["csfe"](x * stays).chunk(2, 1)
        image = self.nets["generator"](mean + torch.exp(log_variance / 2) * torch.randn_like(mean))
        kl = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(1).mean()
        return nn.functional.mse_loss(image, x) + self.method.kl_weight * kl

    def classification(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy and the information loss, as the released code computes them."""
        with torch.no_grad():
            specific = self.nets["csfe"](x).chunk(2, 1)[0]
        common = self.nets["gfe"](x)
        mean, log_variance = self.nets["idm"](common)
        information = ((mean - specific) ** 2 / log_variance.exp() + log_variance).sum(1).mean()
        logits = self.nets["head"](torch.cat([common, specific], 1))
        return self.ce(logits, y) + self.method.idm_weight * information


class FedRIRLoop(FedAvgLoop):
    """FedRIR's round as released: masked reconstruction, followed by classification with its information loss."""

    shared = "gfe"

    def client(self, i: int, nets: nn.ModuleDict) -> Client:
        """Return a client as described in `FedAvgLoop.client`."""
        return FedRIRClient(self.problem, i, nets, self.folder)

    def train(self, client: FedRIRClient) -> None:
        """Train both stages."""
        client.nets.train()
        for stage, optimizer in ((client.reconstruction, client.first), (client.classification, client.second)):
            for _ in range(client.epochs):
                for x, y in client.train_loader():
                    loss = stage(x, y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()


class FedMRLoop:
    """FedMR's round as released: K models in slots, a new SGD optimiser, and separate permutations for every entry of the state dict."""

    def __init__(self, problem: Problem, threads: int) -> None:
        self.problem, self.threads = problem, threads
        self.pairs = [_pairs(*problem.data.train(i)) for i in range(problem.task.n_clients)]
        self.test_pairs = _pairs(*problem.data.common())
        model = problem.modules(0)["model"].requires_grad_(True)
        self.slots = [copy.deepcopy(model.state_dict()) for _ in range(problem.task.max_cohort)]
        self.server = copy.deepcopy(model)
        self.ce = nn.CrossEntropyLoss()

    def round(self, cohort: Sequence[int]) -> Times:
        """Run one round as described in `fedloom.tools.bench.Rival`."""
        with torch_threads(self.threads):
            started = time.perf_counter()
            returned = [self.train(self.slots[slot], self.pairs[i]) for slot, i in enumerate(cohort)]
            mean = {key: sum(state[key].float() for state in returned) / len(returned) for key in returned[0]}
            self.server.load_state_dict(mean)
            self.slots = self.recombine(returned)
            trained = time.perf_counter()
            self.evaluate(self.test_pairs)
            scored = time.perf_counter()
            self.evaluate([pair for pairs in self.pairs for pair in pairs])
            evaluated = time.perf_counter()
        return Times(trained - started, scored - trained, (evaluated - scored) / FEDMR_EVAL_EVERY)

    def train(self, state: dict[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
        """Run one client's epochs on a copy of its slot."""
        plan, method = self.problem.plan, self.problem.method
        model = copy.deepcopy(self.server)
        model.load_state_dict(state)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=method.lr, momentum=method.momentum)
        loader = DataLoader(pairs, min(plan.batch_size, len(pairs)), shuffle=True, drop_last=plan.drop_last)
        for _ in range(method.local_epochs):
            for x, y in loader:
                model.zero_grad()
                loss = self.ce(model(x), y)
                loss.backward()
                optimizer.step()
        return copy.deepcopy(model.state_dict())

    def recombine(self, states: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Permute the models separately for every key."""
        mixed = [copy.deepcopy(state) for state in states]
        for key in states[0]:
            for slot, other in enumerate(torch.randperm(len(states)).tolist()):
                mixed[slot][key] = states[other][key]
        return mixed

    @torch.no_grad()
    def evaluate(self, pairs: Pairs) -> tuple[float, float]:
        """Return the accuracy and mean loss of the server's model."""
        self.server.eval()
        right, loss = 0, 0.0
        for x, y in DataLoader(pairs, FEDMR_EVAL_BATCH):
            logits = self.server(x)
            loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
            right += int((logits.argmax(1) == y).sum())
        return right / len(pairs), loss / len(pairs)


def _pairs(x: Tensor, y: Tensor) -> Pairs:
    return list(zip(x.contiguous(), y, strict=True))


def _copy_into(net: nn.Module, parameters: Iterable[Tensor]) -> None:
    for old, new in zip(net.parameters(), parameters, strict=True):
        old.data = new.data.clone()
