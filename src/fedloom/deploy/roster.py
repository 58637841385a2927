"""The SuperLink's list of nodes, which is kept equal to the federation's keys while the server runs."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedloom.deploy.folder import Deployment
from fedloom.deploy.node_keys import KeyRing
from fedloom.deploy.runtime import patient


class Roster:
    """Registers the keys of admitted nodes with the SuperLink, and removes keys that were revoked or have expired."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._ring = KeyRing(deployment.server / "keys")
        self._done: frozenset[bytes] | None = None

    def update(self) -> list[str]:
        """Send the changes since the last call to the SuperLink. Return a line for each change.

        Raises:
                httpx.HTTPError: the SuperLink does not answer. Call this method again.
        """
        self._ring.refresh()
        wanted = frozenset(pem for pem, key in self._ring.keys.items() if key.is_valid())
        if wanted == self._done:
            return []
        with self._client() as client:
            lines = [*self._changes(client, wanted)]
        self._done = wanted
        return lines

    def _changes(self, client: ControlHttpClient, wanted: frozenset[bytes]) -> Iterator[str]:
        listed = {info.public_key: info for info in client.ListNodes(ListNodesRequest()).nodes_info}
        here = {pem for pem, info in listed.items() if info.status != NodeStatus.UNREGISTERED}
        for pem in sorted(wanted - here):
            node = self._ring.keys[pem].node
            if pem in listed:  # the SuperLink never registers a key twice
                yield f"{node}: its key was removed before, so it is accepted again only after a restart of the server"
                continue
            try:
                client.RegisterNode(RegisterNodeRequest(public_key=pem, name=node))
            except httpx.HTTPStatusError as error:
                yield f"{node}: its key could not be registered ({error.response.text[:200]})"
                continue
            yield f"{node}: registered"
        for pem in sorted(here - wanted):
            client.UnregisterNode(UnregisterNodeRequest(node_id=listed[pem].node_id))
            yield f"{listed[pem].name or 'a node'}: its key is no longer valid"

    def _client(self) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(
            server_address=self._deployment.superlink,
            insecure=False,
            root_certificates=(self._deployment.server / "ca.crt").read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            retry_invoker=patient(),
        )
