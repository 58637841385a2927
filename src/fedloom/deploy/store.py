"""Client states on a node between rounds, in one safetensors file per client and committed round. Files are written atomically."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fedloom import tree
from fedloom.deploy.messages import Assignment
from fedloom.method import Client
from fedloom.wire.messages import decode, encode

SUFFIX = ".safetensors"


class NodeStore:
    """Client states by round. The label of a state is one plus the round that produced it; label 0 is the initial state.

    A client update in round r writes label r + 1. Older states are kept until the server no longer needs them. To discard an update that
    it did not accept, the server requests the label before it.
    """

    def __init__(self, blank: Callable[[int], Client], folder: Path) -> None:
        self._blank, self._folder = blank, folder
        self._members: Mapping[int, Assignment] = {}
        self._number = 0
        self.notes: list[str] = []
        """Notes for the server."""

    def turn_to(self, number: int, members: Iterable[Assignment]) -> None:
        """Prepare for a request for these clients in round `number`."""
        self._number, self._members, self.notes = number, {member.client: member for member in members}, []

    def get(self, i: int) -> Client:
        """Return the state with the requested label (see `Store.get`).

        If this state is missing, the client starts from its initial state, and a note is added.

        Raises:
            WireError: the file does not contain the state of this client.
        """
        base, blank = self._members[i].base, self._blank(i)
        file = self._file(i, base)
        if not base:
            return blank
        if not file.is_file():
            self.notes.append(
                f"client {i} starts from its initial state: its state after round {base} is not on this node ({self._found(i)})"
            )
            return blank
        template = blank._asdict()
        return Client(**tree.merge(template, decode(file.read_bytes(), expect=template)))

    def put(self, i: int, client: Client) -> None:
        """Commit the state after this round, and delete states that are no longer needed (see `Store.put`)."""
        file = self._file(i, self._number + 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.tmp")
        with draft.open("wb") as out:
            out.write(encode(client._asdict()))
            out.flush()
            os.fsync(out.fileno())
        draft.replace(file)
        for label in self.labels(i):
            if label < self._members[i].keep or label > self._number + 1:
                self._file(i, label).unlink(missing_ok=True)

    def changed(self) -> Iterable[int]:
        """See `Store.changed`."""
        return sorted(int(folder.name.removeprefix("client-")) for folder in self._folder.glob("client-*"))

    def labels(self, i: int) -> list[int]:
        """Return the labels of a client's stored states, in order."""
        return sorted(int(file.name.removesuffix(SUFFIX)) for file in self._file(i, 0).parent.glob(f"[0-9]*{SUFFIX}"))

    def _file(self, i: int, label: int) -> Path:
        return self._folder / f"client-{i}" / f"{label}{SUFFIX}"

    def _found(self, i: int) -> str:
        labels = self.labels(i)
        return f"it has states after rounds {', '.join(map(str, labels))}" if labels else "it has no states"
