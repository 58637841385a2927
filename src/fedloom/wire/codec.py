"""Transforms of messages at the server and at clients, and the values that a client has not sent yet.

An uplink sends weights as differences from the weights in the downlink, which both the server and the client have. Differences are small,
so rounding them loses little. Most of them are near 0, so it is sufficient to send a few of them. The client keeps the values that `topk`
omits from an uplink, and adds them to its next uplink (error feedback, Stich et al., NeurIPS 2018).
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
    """The transforms of one experiment, for the server and for clients."""

    uplink: Chains = {}
    downlink: Chains = {}

    def only(self, uplink: Tree) -> Codec:
        """Return the codec with only those uplink transforms whose part is in `uplink`, because the final exchange may omit parts."""
        return self._replace(uplink={part: chain for part, chain in self.uplink.items() if part in uplink})

    # server

    def send(self, down: Downlink) -> Downlink:
        """Return a downlink in its encoded form."""
        return _each(down, lambda message: _packed(message, self.downlink)) if self.downlink else down

    def check_downlink(self, down: Downlink) -> None:
        """Raise ConfigError if a downlink that is not empty lacks a part that has a transform."""
        messages = (down.common, *(down.each or ())) if self.downlink else ()
        parts = {part for message in messages for part in message if tree.leaves(message)}
        for part in self.downlink.keys() - parts if parts else ():
            raise ConfigError(_no_part("downlink", part, sorted(parts)))

    def arrived(self, sent: Downlink) -> Downlink:
        """Return the downlink that clients decode from an encoded downlink."""
        return _each(sent, self.received) if self.downlink else sent

    def through(self, down: Downlink) -> Downlink:
        """Return a downlink after encoding and decoding, as clients would receive it."""
        return self.arrived(self.send(down))

    def opened(self, uplink: Tree, received: Tree) -> Tree:
        """Return a decoded uplink, without the values that its transforms discarded.

        `received` is the downlink as the client decoded it.
        """
        opened = dict(uplink)
        for part in self.uplink.keys() & uplink.keys():
            known = _known(received, part)
            values = self.uplink[part].decode(_flat(uplink[part]), known)
            moved = {path: leaf + known[path] if path in known else leaf for path, leaf in values.items()}
            opened[part] = _rebuilt(moved, uplink[part], _flat(received.get(part, {})))
        if WEIGHTS in self.uplink and WEIGHTS in opened:
            opened[WEIGHTS] = without_negative_variances(opened[WEIGHTS])
        return opened

    # client

    def unsent(self, travelling: Weights) -> Tree:
        """Return the initial residuals of a client, which are zeros for the parts whose transforms use error feedback."""
        zeros = _rebuilt({path: torch.zeros_like(leaf) for path, leaf in _floating(travelling).items()}, {}, {})
        return {part: zeros for part, chain in self.uplink.items() if chain.remembers}

    def received(self, message: Tree) -> Tree:
        """Return a decoded message at a client."""
        opened = dict(message)
        for part in self.downlink.keys() & message.keys():
            values = self.downlink[part].decode(_flat(message[part]), {})
            opened[part] = _rebuilt(values, message[part], {})
        return opened

    def reply(self, uplink: Tree, received: Tree, unsent: Tree, rng: Stream) -> tuple[Tree, Tree]:
        """Return an encoded uplink, and the values that are still unsent."""
        sent, left = dict(uplink), dict(unsent)
        for part, chain in self.uplink.items():
            if part not in uplink and tree.leaves(uplink):
                raise ConfigError(_no_part("uplink", part, list(uplink)))
            values = _floating(uplink.get(part, {}))
            if not values:
                continue
            known, before = _known(received, part), _flat(unsent.get(part, {}))
            if chain.on_differences and not (values.keys() == known.keys() == (before or known).keys()):
                raise MethodError("uplink: topk and gaussian need uplinks that have the same weights as the downlink")
            moved = {path: leaf - known[path] if path in known else leaf for path, leaf in values.items()}
            coded, after = chain.encode(moved, before, rng)
            after = {path: _to_keep(path, leaf) for path, leaf in after.items()}
            rest = {path: leaf for path, leaf in _flat(uplink[part]).items() if path not in values}
            sent[part] = _rebuilt({**coded, **rest}, uplink[part], {})
            left |= {part: _rebuilt(after, {}, {})} if chain.remembers else {}
        return sent, left


PLAIN = Codec()


def _each(down: Downlink, change: Callable[[Tree], Tree]) -> Downlink:
    return Downlink(change(down.common), None if down.each is None else [change(message) for message in down.each])


def _no_part(way: str, part: str, parts: Sequence[str]) -> str:
    example = next((name for name in parts if name != COUNTS), parts[0])
    return f"{way}: {way}s have no part '{part}', only {', '.join(parts)}; choose one of these, as in {example}/fp16"


def _packed(message: Tree, chains: Chains) -> Tree:
    packed = dict(message)
    for part in chains.keys() & message.keys():
        values = _floating(message[part])
        coded, _ = chains[part].encode(values, {}, Stream())
        rest = {path: leaf for path, leaf in _flat(message[part]).items() if path not in values}
        packed[part] = _rebuilt({**coded, **rest}, message[part], {})
    return packed


def _to_keep(path: str, unsent: Tensor) -> Tensor:
    """Return the values to send later. For buffers, they are zeros, because every client update measures running statistics again."""
    return torch.zeros_like(unsent) if path.startswith("/buffers/") else unsent


def _flat(part: Tree | Tensor) -> Flat:
    return dict(tree.flatten({"": part}))


def _floating(part: Tree | Tensor) -> Flat:
    """Return the tensors that transforms encode, sorted by path, because the receiver's dictionaries may have another order."""
    wide = torch.get_default_dtype()
    return {path: leaf for path, leaf in sorted(_flat(part).items(), key=_path) if leaf.dtype is wide}


def _path(named: tuple[str, Tensor]) -> str:
    return named[0]


def _known(received: Tree, part: str) -> Flat:
    """Return the values of an uplink's part that both sides know before it is sent."""
    return _floating(received.get(WEIGHTS, {})) if part == WEIGHTS else {}


def _rebuilt(flat: Flat, like: Tree | Tensor, order: Flat) -> Tree:
    """Return tensors as a part, in the order of `order`, with the empty branches of `like`."""
    grown = tree.unflatten({**{path: flat[path] for path in order if path in flat}, **flat})

    def grow(into: Tree, branch: Tree) -> None:
        for name, value in branch.items():
            if isinstance(value, dict) and name != TOPK and isinstance(into.setdefault(name, {}), dict):
                grow(into[name], value)

    grow(grown, {"": like})
    part: Tree = grown.get("", {})
    return part
