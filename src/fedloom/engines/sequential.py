"""The reference engine, which runs one client after another. Every other engine gives the same numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from fedloom.engines.base import Reply
from fedloom.engines.local import CohortMember, LocalEngine, note_client
from fedloom.errors import MethodError
from fedloom.training.turn import UpdateResult, client_update


class Sequential(LocalEngine):
    """Runs the clients of a cohort one by one, in this process."""

    def updates(self, number: int, members: Sequence[CohortMember]) -> Iterator[Reply]:
        """See `LocalEngine.updates`."""
        for member in members:
            yield self.update(number, member)

    def update(self, number: int, member: CohortMember) -> Reply:
        """Run the local update of one member of the cohort: load the client, train it, store it, and return its reply."""
        started, i = time.perf_counter(), member.client
        message, client = self.to_device(member.message), self.load(i)

        def work(channels_last: bool) -> UpdateResult:
            context = self.context(number, i, "train", channels_last)
            return client_update(self.problem.method, self.gradients_of(i), client, message, context, number=number)

        try:
            result = self.with_layout(i, work)
        except Exception as error:
            note_client(error, i, number)
            raise
        except SystemExit:  # it would end the whole run without a message
            raise MethodError(
                f"client {i}, round {number + 1}: the method exited Python; raise an error instead"
            ) from None
        return self.finish(member, result, started)
