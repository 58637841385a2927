"""Engines that wrap another engine: `debug` checks the contract, and `bytes` encodes every message as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from fedloom import tree
from fedloom.engines.base import Engine, Reply, Score, ScoreRequest
from fedloom.engines.forwarding import ForwardingEngine
from fedloom.errors import MethodError
from fedloom.method import Client, Downlink
from fedloom.models.own_state import REMEDY, attributes, changed_attribute
from fedloom.nets import read_weights
from fedloom.training.turn import Modules
from fedloom.tree import Tree
from fedloom.wire.messages import Meter, decode, encode
from fedloom.wire.transforms import is_coded


class Wrapper(ForwardingEngine):
    """An engine that delegates everything to another engine."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner.problem, inner)

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """See `Engine.train`."""
        return self.inner.train(number, cohort, down)

    def busy(self) -> frozenset[int]:
        """See `Engine.busy`."""
        return self.inner.busy()

    def asked(self, cohort: Sequence[int]) -> Sequence[int]:
        """See `Engine.asked`."""
        return self.inner.asked(cohort)

    def score(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
    ) -> list[dict[str, Score]]:
        """See `Engine.score`."""
        return self.inner.score(number, down, clients, asks)

    def score_server(self, down: Downlink) -> Score:
        """See `Engine.score_server`."""
        return self.inner.score_server(down)

    def modules(self) -> Sequence[Modules]:
        """See `Engine.modules`."""
        return self.inner.modules()

    def close(self) -> None:
        """See `Engine.close`."""
        self.inner.close()


class Bytes(Wrapper):
    """Encodes every message as bytes and decodes it, as on a network. The counted size is checked against the actual size."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        self.meter = Meter()

    def _through(self, message: Tree, **fields: int) -> Tree:
        data = encode(message, **fields)
        counted = sum(self.meter.sizes(message).values())
        if len(data) != counted:
            raise MethodError(f"a message of {len(data)} bytes was counted as {counted} bytes")
        return tree.merge(
            message, decode(data, expect=message)
        )  # branches without tensors are not sent; the receiver restores them

    def _down(self, number: int, clients: Sequence[int], down: Downlink) -> Downlink:
        whole = [self._through(down.to(s), round=number, client=i, examples=0) for s, i in enumerate(clients)]
        return Downlink(each=whole)

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """See `Engine.train`."""
        replies = self.inner.train(number, cohort, self._down(number, cohort, down))
        return [
            replace(r, uplink=self._through(r.uplink, round=number, client=r.client, examples=r.examples))
            for r in replies
        ]

    def score(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
    ) -> list[dict[str, Score]]:
        """See `Engine.score`."""
        return self.inner.score(
            number, Downlink(self._through(down.common, round=number, client=0, examples=0)), clients, asks
        )


class Debug(Wrapper):
    """Checks the contract.

    The rules are: inputs never change, clients outside the cohort do not change, structures stay the same, private nets are not sent, all
    numbers are finite, modules keep no state outside their tensors, and scoring changes no client.
    """

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        initial = (read_weights(self.problem.modules(arch)) for arch in range(len(self.problem.archs)))
        self._public = [tree.structure(self.problem.method.travelling(weights)).keys() for weights in initial]

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """Run local updates as described in `Engine.train`.

        Raise MethodError, which names the client, round and tensor, if a rule is broken.
        """
        before = self._copies()
        sent = [tree.clone(down.to(slot)) for slot in range(len(cohort))]
        with self._watched_modules(f"round {number}"):
            replies = self.inner.train(number, cohort, down)
        for slot, copy in enumerate(sent):
            if not tree.equal(copy, down.to(slot)):
                raise MethodError(f"round {number}: the downlink of slot {slot} was changed in place")
        for i, copy in before.items():
            self._check_client(number, i, copy, self.inner.client(i), i in cohort)
        for reply in replies:
            self._check_uplink(number, reply)
            if reply.diverged:
                form = tree.structure(before[reply.client]).get(reply.diverged)
                shape = f" (shape {form[0]})" if form else ""
                raise MethodError(
                    f"round {number}, client {reply.client} keeps '{reply.diverged}'{shape}, which is not finite"
                )
        return replies

    def score(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
    ) -> list[dict[str, Score]]:
        """Score clients as described in `Engine.score`. Raise MethodError if scoring changes a client or the downlink."""
        before, sent = self._copies(), tree.clone(down.common)
        with self._watched_modules(f"scoring after {number} rounds"):
            scores = self.inner.score(number, down, clients, asks)
        if not tree.equal(sent, down.common):
            raise MethodError(f"scoring after {number} rounds changes the downlink in place")
        for i, copy in before.items():
            if not tree.equal(copy, self.inner.client(i)._asdict()):
                raise MethodError(f"scoring after {number} rounds changes the state of client {i}")
        return scores

    def _copies(self) -> dict[int, Tree]:
        return {i: tree.clone(self.inner.client(i)._asdict()) for i in range(self.problem.task.n_clients)}

    @contextmanager
    def _watched_modules(self, where: str) -> Iterator[None]:
        """Raise MethodError if nets keep state in Python attributes, which all clients would share."""
        nets = [(net, module) for mine in self.inner.modules() for net, module in mine.items()]
        before = [attributes(module) for _, module in nets]
        yield
        for (net, module), mine in zip(nets, before, strict=True):
            changed = changed_attribute(mine, attributes(module))
            if changed:
                raise MethodError(
                    f"{where}: net '{net}' keeps '{changed}' ({type(module).__name__}) between calls; {REMEDY}"
                )

    def _check_client(self, number: int, i: int, before: Tree, after: Client, worked: bool) -> None:
        now = after._asdict()
        if not worked and not tree.equal(before, now):
            raise MethodError(f"round {number}: client {i} was not in the cohort, but it changed")
        changed = set(tree.structure(before).items()) ^ set(tree.structure(now).items())
        if changed:
            raise MethodError(
                f"round {number}, client {i}: the structure of its state changed at '{min(path for path, _ in changed)}'"
            )

    def _check_uplink(self, number: int, reply: Reply) -> None:
        public = self._public[self.problem.arch_of[reply.client]]
        sent = tree.structure(reply.uplink.get("weights", {})).keys()
        leaked = {path for path in sent if path not in public and not is_coded(path, public)}
        if leaked:
            name = min(leaked).partition("/")[2]
            raise MethodError(f"round {number}, client {reply.client}: the private tensor '{name}' is in the uplink")
        _check_finite(reply.uplink, f"round {number}, client {reply.client} sends")


def _check_finite(values: Tree, where: str) -> None:
    path = tree.not_finite(values)
    if path:
        shape = tree.structure(values)[path][0]
        raise MethodError(f"{where} '{path}' (shape {shape}), which is not finite")
