"""Checks of uplinks before aggregation, and uplinks that arrive in a later round."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedloom import tree
from fedloom.engines import Problem, Reply
from fedloom.errors import DivergedError, WireError
from fedloom.experiment.uplink_forms import UplinkForm, UplinkForms
from fedloom.method import Downlink
from fedloom.nets import without_negative_variances
from fedloom.tree import Tree
from fedloom.wire.messages import check_structure


@dataclass(frozen=True, kw_only=True)
class LateUplink:
    """An uplink in flight, which the server receives in a later round."""

    client: int
    slot: int  # the client's position in its cohort
    examples: int
    sent: int  # the round of its downlink
    message: Tree  # the uplink, with weights as differences from those of the downlink


class UplinkCheck:
    """Decodes uplinks and rejects those that cannot be aggregated."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._forms = problem, UplinkForms(problem)

    def opened(self, number: int, reply: Reply, down: Downlink) -> Tree:
        """Decode the uplink of a reply to the downlink of round `number`.

        Raises:
            WireError: the uplink cannot be aggregated; the message states the reason.
        """
        if reply.examples < 1:
            raise WireError(f"examples={reply.examples}: must be at least 1")
        received = down.to(reply.slot)
        form = self._forms.of(number, reply.client, received)
        self._check_form(reply.uplink, form)
        # a device may have omitted branches without tensors
        whole = tree.merge(form.travels, reply.uplink)
        uplink = self._problem.codec.opened(whole, received)
        checked = reply.is_finite and not self._problem.codec.uplink
        broken = "" if checked else tree.not_finite(uplink) or reply.diverged
        if broken:
            raise WireError(f"'{broken}' is not finite")
        return uplink

    def _check_form(self, uplink: Tree, form: UplinkForm) -> None:
        got, want = tree.structure(uplink), dict(form.structure)
        if got.keys() != want.keys():
            check_structure(dict.fromkeys(got), dict.fromkeys(want))
        for path, length in self._problem.method.ragged(uplink).items():
            for ragged in want.keys() & {path, f"{path}/int8"}:
                shape, dtype = want[ragged]
                want[ragged] = (length, *shape[1:]), dtype
        check_structure(got, want)

    def rebased(self, number: int, late: LateUplink, down: Downlink) -> Tree:
        """Return a late uplink as if its client had started from this round's downlink.

        The differences in the uplink are added to the current weights.
        """
        template = self._forms.of(number, late.client, down.common).uplink
        message = tree.merge(template, late.message)  # a checkpoint does not keep branches without tensors
        weights = tree.map_tree(torch.add, message["weights"], down.common["weights"])
        return {**message, "weights": without_negative_variances(weights)}


def late_uplink(number: int, reply: Reply, down: Downlink) -> LateUplink:
    """Convert a reply to the downlink of round `number` into an uplink in flight."""
    received = down.to(reply.slot)["weights"]
    gained = tree.map_tree(torch.sub, reply.uplink["weights"], received)
    rest = tree.clone({name: part for name, part in reply.uplink.items() if name != "weights"})
    return LateUplink(
        client=reply.client, slot=reply.slot, examples=reply.examples, sent=number, message={**rest, "weights": gained}
    )


def require_finite(server: Tree, number: int, last: int) -> None:
    """Raise DivergedError if the server's state after round `number` is not finite.

    `last` is the number of rounds in the checkpoint, or 0 if there is no checkpoint.
    """
    broken = tree.not_finite(server)
    if broken:
        kept = f"the checkpoint of round {last} is unchanged" if last else "no checkpoint has been written yet"
        raise DivergedError(
            f"round {number + 1}: the server's '{broken}' is not finite after aggregation; {kept}; try a smaller method.lr"
        )
