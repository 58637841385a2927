"""The reference engine: one client after another, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fedloom import tree
from fedloom.accelerator import HOST, ON_HOST, Place
from fedloom.engines.base import Ask, Engine, Problem, Reply, Score
from fedloom.engines.scoring import Scorer, common_part, none, score_of
from fedloom.engines.stores import MappedStore, MemoryStore, Store
from fedloom.engines.transfer import DeviceStore, Mover, moved
from fedloom.errors import DataError
from fedloom.method import Client, Downlink, Method, Predictor, Turn
from fedloom.nets import read_weights
from fedloom.training.batches import Rows, laid_out
from fedloom.training.choose import Convolutions
from fedloom.training.context import ClientContext
from fedloom.training.gradients import Gradients
from fedloom.training.sweeps import predict
from fedloom.training.turn import Modules, UpdateResult, client_update, run_phases
from fedloom.tree import Tree, Weights

T = TypeVar("T")


class Member(NamedTuple):
    """One member of a cohort, and what it is sent."""

    slot: int  # its place in the cohort
    client: int
    message: Tree


class Sequential(Engine):
    """One client after another. Every other engine must give the same numbers.

    On a device of `place` clients take their turns there, on rows that are kept there if its budget allows; whatever goes out, messages
    and clients alike, is on the host.
    """

    def __init__(self, problem: Problem, place: Place = ON_HOST, convolutions: Convolutions | None = None) -> None:
        """`convolutions`: how those of several lanes are computed."""
        super().__init__(problem)
        self._device = device = place.device
        modules = [problem.modules(arch) for arch in range(len(problem.archs))]
        self._initial: list[Weights] = [read_weights(mine) for mine in modules]
        self._initial_here: list[Weights] = [moved(weights, device) for weights in self._initial]
        for module in (module for mine in modules for module in mine.values()):
            module.to(device)
        self._gradients = [
            Gradients(mine, bf16=problem.bf16, device=device, convolutions=convolutions) for mine in modules
        ]
        pictures = len(problem.task.input_shape) == 3
        lasts = pictures and (device == HOST or problem.bf16)  # on a GPU it is the tensor cores that like channels last
        # until an architecture refuses it
        self._channels_last = [lasts and any(p.ndim == 4 for p in own["params"].values()) for own in self._initial]
        self._blanks: dict[tuple[int, torch.dtype], Client] = {}  # clients that never took part, where all are alike
        self._to_device = Mover(device)
        fits = device != HOST and problem.data.n_bytes <= place.budget
        self.data = problem.data.on(device) if fits else problem.data
        room = place.budget - (problem.data.n_bytes if fits else 0)
        self.store: Store = MemoryStore(self._blank) if device == HOST else DeviceStore(self._blank, device, room)

    def share(self, folder: Path) -> None:
        """Keep clients in mapped files in `folder` from now on, where several processes can work on them."""
        self.keep_in(lambda blank: MappedStore(blank, folder, self.problem.arch_of))

    def keep_in(self, make: Callable[[Callable[[int], Client]], Store]) -> None:
        """Keep clients in another store from now on; `make` gets what makes a client that has never taken part."""
        self.store = make(self._blank)

    def initial(self, arch: int) -> Weights:
        """The initial weights of an architecture."""
        return self._initial[arch]

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """See `Engine.train`."""
        self._to_device = Mover(self._device)  # knows the tensors of one round
        members = [Member(slot, i, down.to(slot)) for slot, i in enumerate(cohort)]
        return sorted(self.turns(number, members), key=lambda reply: reply.slot)

    def turns(self, number: int, members: Sequence[Member]) -> Iterator[Reply]:
        """The turns of some members of the cohort, in any order."""
        for slot, i, message in members:
            yield self.turn(number, i, slot, message)

    def turn(self, number: int, i: int, slot: int, message: Tree) -> Reply:
        """One client's turn; it is member `slot` of the cohort."""
        p, started = self.problem, time.perf_counter()
        message = self._to_device(message)

        def work(channels_last: bool) -> UpdateResult:
            site = self._site(number, i, "train", channels_last)
            return client_update(p.method, self._gradients_of(i), self._whole(i), message, site, number=number)

        try:
            done = self._laid_out(i, work)
        except Exception as error:
            error.add_note(f"client {i}, round {number}")
            raise
        return self._kept(i, slot, done, started)

    def _kept(self, i: int, slot: int, done: UpdateResult, started: float) -> Reply:
        """Client `i`'s reply, after a turn that began at `started`. The client is kept, unless it diverged: it would never recover."""
        uplink = moved(done.uplink, HOST)
        client = done.client._replace(weights=self.problem.kept(done.client.weights))
        diverged = tree.not_finite({"uplink": done.uplink, **client._asdict()})
        if not diverged:
            self.store.put(i, client)
        turn, logs, by_phase, seconds = done.turn, done.logs, done.seconds, time.perf_counter() - started
        return Reply(i, slot, uplink, turn.examples, turn.steps, logs, seconds, by_phase, diverged, not diverged)

    def _laid_out(self, i: int, work: Callable[[bool], T]) -> T:
        """Do a piece of work with channels last (1.2 to 1.7 times faster on a CPU), or without if the client's model cannot."""
        arch = self.problem.arch_of[i]
        if self._channels_last[arch]:
            try:
                return work(True)
            except RuntimeError as error:
                if "view size is not compatible" not in str(error):  # the model calls .view() on a convolution's output
                    raise
                self._channels_last[arch] = False
        return work(False)

    def _site(
        self, number: int, i: int, purpose: str, channels_last: bool, own: tuple[Tensor, Tensor] | None = None
    ) -> ClientContext:
        """Where client `i` works; its `own` rows are looked up unless they are given."""
        p, (x, y) = self.problem, own or self.data.train(i)
        if not len(y):
            raise DataError(
                f"client {i} has no training rows; raise partition.min_examples or choose another partition"
            )
        augment = p.data.augmented if p.data.augments else None
        rows = Rows(laid_out({"x": x}, channels_last)["x"], y, augment, self._device)
        plan = p.plan_of(i) if purpose == "train" else p.plan
        return ClientContext(rows=rows, plan=plan, task=p.task, rng=p.stream(number, i, purpose), codec=p.codec)

    def score(self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[Ask]) -> list[dict[str, Score]]:
        """See `Engine.score`."""
        return self.score_part(number, down, clients, asks, (0, 1))

    def score_part(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[Ask], part: tuple[int, int]
    ) -> list[dict[str, Score]]:
        """`score`, on the k-th of n pieces of the common rows, `part=(k, n)`."""
        message = moved(down.common, self._device)
        scorers = [self._scorer(ask, message, part) for ask in asks]
        same = self._received(clients[0], message) if self.problem.one_model and len(clients) else None
        for i in clients:
            fitted = self._whole(i) if any(ask.fitted for ask in asks) else None
            received = same or self._adapted(number, message, i)
            for ask, scorer in zip(asks, scorers, strict=True):
                scorer.add(i, fitted if ask.fitted and fitted else received)
        found = {ask.name: scorer.scores() for ask, scorer in zip(asks, scorers, strict=True)}
        return [{name: scores[i] for name, scores in found.items()} for i in clients]

    def _scorer(self, ask: Ask, message: Tree, part: tuple[int, int] = (0, 1)) -> Scorer:
        """Scores clients' personal predictors."""
        predictor = self.problem.method.predictors()["personal"]

        def logits(i: int, client: Client, x: Tensor) -> Tensor:
            return self._predict(predictor, i, client, x, message)

        return Scorer(ask, self.data, logits, part)

    def _predict(self, predictor: Predictor, i: int, client: Client, x: Tensor, message: Tree) -> Tensor:
        gradients = self._gradients_of(i)

        def work(channels_last: bool) -> Tensor:
            inputs = laid_out({"x": x}, channels_last)["x"]
            return predict(predictor, gradients, client, inputs, message)

        return self._laid_out(i, work)

    def score_server(self, down: Downlink) -> Score:
        """See `Engine.score_server`."""
        return self.score_server_part(down, (0, 1))

    def score_server_part(self, down: Downlink, part: tuple[int, int]) -> Score:
        """`score_server`, on the k-th of n pieces of the common rows.

        The weights are the server's own: the downlink merged into a new client of the first architecture, past any `receive` of the method,
        which says what a client makes of them.
        """
        p, message = self.problem, moved(down.common, self._device)
        x, y = common_part(self.data, part)
        if not len(y):
            return none(p.task.n_classes)
        blank = p.initial(0, self._initial[p.arch_of[0]])
        blank = Client(**moved(blank._asdict(), self._device))
        server = blank._replace(weights=Method.receive(p.method, blank.weights, message, blank.memory))
        logits = self._predict(p.method.predictors()["server"], 0, server, x, message)
        return score_of(logits, y, p.task.n_classes)

    def personal(self, number: int, down: Downlink, i: int) -> tuple[Modules, Client, Tree]:
        """See `Engine.personal`."""
        client = self._adapted(number, moved(down.common, self._device), i)
        return self.problem.modules(self.problem.arch_of[i]), Client(**moved(client._asdict(), HOST)), down.common

    def modules(self) -> Sequence[Modules]:
        """See `Engine.modules`."""
        return [gradients.modules for gradients in self._gradients]

    def client(self, i: int) -> Client:
        """See `Engine.client`."""
        return Client(**moved(self.store.get(i)._asdict(), HOST))

    def changed(self) -> Iterable[int]:
        """See `Engine.changed`."""
        return self.store.changed()

    def restore(self, i: int, client: Client) -> None:
        """See `Engine.restore`."""
        self.store.put(i, client)

    def _gradients_of(self, i: int) -> Gradients:
        return self._gradients[self.problem.arch_of[i]]

    def _blank(self, i: int) -> Client:
        p, arch = self.problem, self.problem.arch_of[i]
        key = arch, torch.get_default_dtype()
        if key in self._blanks:
            return self._blanks[key]
        client = p.initial(i, self._initial[arch])
        client = client._replace(weights=p.kept(client.weights))
        if p.same_init:
            self._blanks[key] = client
        return client

    def _whole(self, i: int) -> Client:
        """Client `i` with all its tensors: what it does not keep is as it was initially, until `receive` replaces it."""
        client = Client(**moved(self.store.get(i)._asdict(), self._device))
        return client._replace(weights=tree.merge(self._initial_here[self.problem.arch_of[i]], client.weights))

    def _received(self, i: int, message: Tree) -> Client:
        client = self._whole(i)
        return client._replace(weights=self.problem.method.receive(client.weights, message, client.memory))

    def _adapted(self, number: int, message: Tree, i: int) -> Client:
        p, client = self.problem, self._received(i, message)
        if not p.method.adapt():
            return client

        def work(channels_last: bool) -> Client:
            site = self._site(number, i, "adapt", channels_last)
            turn = Turn(number, p.task.rounds - 1, len(site.rows.y))
            scale = p.method.lr_scale(max(number - 1, 0))  # that of the last round
            return run_phases(
                p.method.adapt(), self._gradients_of(i), client, message, site, turn=turn, lr_scale=scale
            )[0]

        return self._laid_out(i, work)


class Backed(Engine):
    """An engine whose workers are elsewhere: `_local` holds the clients, and answers whatever is asked of one of them."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._local = Sequential(problem)

    def personal(self, number: int, down: Downlink, i: int) -> tuple[Modules, Client, Tree]:
        """See `Engine.personal`."""
        return self._local.personal(number, down, i)

    def client(self, i: int) -> Client:
        """See `Engine.client`."""
        return self._local.client(i)

    def changed(self) -> Iterable[int]:
        """See `Engine.changed`."""
        return self._local.changed()

    def restore(self, i: int, client: Client) -> None:
        """See `Engine.restore`."""
        self._local.restore(i, client)
