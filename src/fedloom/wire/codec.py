"""Transforms at both ends of the wire: of messages as trees, and of what waits at a client.

Weights go up as differences from the weights that came down, which both ends know: they are small, so rounding them costs little, and
most of them are near 0, so that a few stand for nearly all. Whatever an uplink with `topk` leaves out stays with the client and is
added to its next one (error feedback, Stich et al., NeurIPS 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom import tree
from fedloom.errors import ConfigError, MethodError
from fedloom.method import Downlink
from fedloom.nets import without_negative_variances
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights
from fedloom.wire.transforms import COUNTS, TOPK, WEIGHTS, Chains, Flat


class Codec(NamedTuple):
    """The transforms of one experiment, at both ends of the wire."""

    uplink: Chains = {}
    downlink: Chains = {}

    # server

    def send(self, down: Downlink) -> Downlink:
        """A downlink as it travels."""
        return _each(down, lambda message: _packed(message, self.downlink)) if self.downlink else down

    def check_downlink(self, down: Downlink) -> None:
        """Raise ConfigError where downlinks that hold anything lack a part that is to be transformed."""
        messages = (down.common, *(down.each or ())) if self.downlink else ()
        parts = {part for message in messages for part in message if tree.leaves(message)}
        for part in self.downlink.keys() - parts if parts else ():
            raise ConfigError(_no_part("downlink", part, sorted(parts)))

    def arrived(self, sent: Downlink) -> Downlink:
        """What the clients have of a downlink that was sent."""
        return _each(sent, self.received) if self.downlink else sent

    def through(self, down: Downlink) -> Downlink:
        """What the clients would have of a downlink."""
        return self.arrived(self.send(down))

    def opened(self, uplink: Tree, received: Tree) -> Tree:
        """An uplink as the method wrote it, or nearly; `received` is what its client had of the downlink."""
        opened = dict(uplink)
        for part in self.uplink.keys() & uplink.keys():
            known = _known(received, part)
            values = self.uplink[part].decode(_flat(uplink[part]), known)
            moved = {path: leaf + known[path] if path in known else leaf for path, leaf in values.items()}
            opened[part] = _regrown(moved, uplink[part], _flat(received.get(part, {})))
        if WEIGHTS in self.uplink and WEIGHTS in opened:
            opened[WEIGHTS] = without_negative_variances(opened[WEIGHTS])
        return opened

    # client

    def unsent(self, travelling: Weights) -> Tree:
        """What a client that has never taken part has not sent: zeros, for the parts that remember."""
        zeros = _regrown({path: torch.zeros_like(leaf) for path, leaf in _floating(travelling).items()}, {}, {})
        return {part: zeros for part, chain in self.uplink.items() if chain.remembers}

    def received(self, message: Tree) -> Tree:
        """What a client makes of a message that was sent."""
        opened = dict(message)
        for part in self.downlink.keys() & message.keys():
            values = self.downlink[part].decode(_flat(message[part]), {})
            opened[part] = _regrown(values, message[part], {})
        return opened

    def reply(self, uplink: Tree, received: Tree, unsent: Tree, rng: Stream) -> tuple[Tree, Tree]:
        """An uplink as it travels, and what of it is still unsent."""
        sent, left = dict(uplink), dict(unsent)
        for part, chain in self.uplink.items():
            if part not in uplink and tree.leaves(uplink):
                raise ConfigError(_no_part("uplink", part, list(uplink)))
            values = _floating(uplink.get(part, {}))
            if not values:
                continue
            known, before = _known(received, part), _flat(unsent.get(part, {}))
            if chain.on_differences and not (values.keys() == known.keys() == (before or known).keys()):
                raise MethodError("uplink: topk and gaussian need uplinks with the weights that the downlink has")
            moved = {path: leaf - known[path] if path in known else leaf for path, leaf in values.items()}
            coded, after = chain.encode(moved, before, rng)
            after = {path: _waits(path, leaf) for path, leaf in after.items()}
            rest = {path: leaf for path, leaf in _flat(uplink[part]).items() if path not in values}
            sent[part] = _regrown({**coded, **rest}, uplink[part], {})
            left |= {part: _regrown(after, {}, {})} if chain.remembers else {}
        return sent, left


PLAIN = Codec()


def _each(down: Downlink, change: Callable[[Tree], Tree]) -> Downlink:
    return Downlink(change(down.common), None if down.each is None else [change(message) for message in down.each])


def _no_part(way: str, part: str, parts: Sequence[str]) -> str:
    example = next((name for name in parts if name != COUNTS), parts[0])
    return f"{way}: these {way}s have no part '{part}', only {', '.join(parts)}; name one, as in {example}/fp16"


def _packed(message: Tree, chains: Chains) -> Tree:
    packed = dict(message)
    for part in chains.keys() & message.keys():
        values = _floating(message[part])
        coded, _ = chains[part].encode(values, {}, Stream())
        rest = {path: leaf for path, leaf in _flat(message[part]).items() if path not in values}
        packed[part] = _regrown({**coded, **rest}, message[part], {})
    return packed


def _waits(path: str, unsent: Tensor) -> Tensor:
    """What is to be sent later: of parameters, for running statistics are measured anew in every turn, not moved by a step."""
    return torch.zeros_like(unsent) if path.startswith("/buffers/") else unsent


def _flat(part: Tree | Tensor) -> Flat:
    return dict(tree.flatten({"": part}))


def _floating(part: Tree | Tensor) -> Flat:
    """The tensors of a part that transforms work on, in the order of their paths: the other end's dictionaries may have another."""
    wide = torch.get_default_dtype()
    return {path: leaf for path, leaf in sorted(_flat(part).items(), key=_path) if leaf.dtype is wide}


def _path(named: tuple[str, Tensor]) -> str:
    return named[0]


def _known(received: Tree, part: str) -> Flat:
    """What both ends know of an uplink's part before it is sent."""
    return _floating(received.get(WEIGHTS, {})) if part == WEIGHTS else {}


def _regrown(flat: Flat, like: Tree | Tensor, order: Flat) -> Tree:
    """The tensors as a part, in the order of those paths in `order` that it has, with the branches of `like` that hold no tensors."""
    grown = tree.unflatten({**{path: flat[path] for path in order if path in flat}, **flat})

    def grow(into: Tree, branch: Tree) -> None:
        for name, value in branch.items():
            if isinstance(value, dict) and name != TOPK and isinstance(into.setdefault(name, {}), dict):
                grow(into[name], value)

    grow(grown, {"": like})
    part: Tree = grown.get("", {})
    return part
