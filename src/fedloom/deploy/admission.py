"""Admission to a federation, for the operator of the server: admit a node by its request, revoke it, and replace keys and certificates.

A request contains a node's name and public key; the private key never leaves the node. The operator and the node's owner compare the
fingerprint of the key. Every change is first written to the audit log. If a change was interrupted, the same command completes it. The
proxy and `fedloom deploy server` detect changed keys themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from fedloom.deploy.audit import AuditLog
from fedloom.deploy.certificates import (
    Identity,
    NodeRequest,
    certificate_bytes,
    fingerprint_of,
    key_bytes,
    new_node,
    new_server,
    openssh,
    read_authority,
    read_request,
    replace_file,
)
from fedloom.deploy.files import MAX_FILE, JoinFile, read_file, with_nodes
from fedloom.deploy.folder import LOOPBACK, REVOKED, Deployment, check_hosts
from fedloom.deploy.node_keys import PREVIOUS, NodeKey, key_line, read_key
from fedloom.deploy.services import private_files
from fedloom.errors import ConfigError, first_line
from fedloom.experiment.lock import FolderLock

OVERLAP = timedelta(hours=24)  # time for which a replaced key stays valid
ANSWER = """\
# Answer to the request of a node. On the node:
#   fedloom deploy join FOLDER --finish THIS_FILE --authority {authority}
# First, confirm the authority's fingerprint with the operator of the server.

"""


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A node that was admitted or received a new key: its name, clients, key, the answer for its owner, and whether it
    was already done.
    """

    name: str
    clients: Sequence[int]
    fingerprint: str
    authority: str
    answer: Path
    before: bool


def admit(
    path: Path, request: Path, clients: Sequence[int], given: str | None, authority: Path | None = None
) -> Admitted:
    """Admit a node to the federation in a folder, and write the answer next to its request.

    Args:
        path: the federation's folder.
        request: the node's request.
        clients: the numbers of the node's clients. The clients of a revoked node may be assigned to another node.
        given: the fingerprint that the node's owner sees.
        authority: folder with the authority's key; default: `authority` in the federation's folder.

    Raises:
        ConfigError: the request is not valid or has another fingerprint, or its name, its key or a client belongs to another node.
    """
    asked = _read(request)
    with _changing(path) as deployment:
        _compare(deployment, "admit", asked, given)
        before = _known(deployment, asked)
        active = {node: deployment.file.nodes[node] for node in deployment.active()}
        if asked.name in active and not before:
            raise ConfigError(
                f"{asked.name} is already admitted with another key; to replace the key, run: fedloom deploy rotate {path} {request}"
            )
        _check_clients(asked.name, clients, active)
        signer = _authority(deployment, authority)
        certificate, before = new_node(signer, asked), before and asked.name in active
        if not before:
            AuditLog.of(deployment.path).append("admit", asked.name, fingerprint_of(asked.key), clients=list(clients))
            line = key_line(openssh(asked.key), certificate.not_valid_after_utc)
            replace_file(deployment.public_key(asked.name), line)  # the file exists if this command was interrupted
            _write_nodes(deployment, _with_node(deployment.file.nodes, asked.name, clients))
        return _answer(Deployment(path), signer, certificate, request, before=before)


def rotate_node(path: Path, request: Path, given: str | None, authority: Path | None = None) -> Admitted:
    """Replace the key of a node by the key in its request. The old key stays valid for a day. See also `admit`.

    Raises:
        ConfigError: see `admit`; or the node is not admitted.
    """
    asked = _read(request)
    with _changing(path) as deployment:
        _compare(deployment, "rotate", asked, given)
        before = _known(deployment, asked)
        if asked.name not in deployment.active():
            raise ConfigError(f"{asked.name} is not admitted; to admit it, run: fedloom deploy admit {path} {request}")
        signer = _authority(deployment, authority)
        certificate = new_node(signer, asked)
        if not before:
            current, previous = read_key(deployment.public_key(asked.name)), _previous(deployment, asked.name)
            AuditLog.of(deployment.path).append(
                "rotate", asked.name, fingerprint_of(asked.key), replaced=fingerprint_of(current.public)
            )
            if previous.is_file() and read_key(previous).public != current.public:
                _retire(deployment, [previous])
            end = datetime.now(UTC) + OVERLAP
            end = end if current.until is None else min(end, current.until)
            replace_file(previous, key_line(openssh(current.public), end))
            replace_file(current.file, key_line(openssh(asked.key), certificate.not_valid_after_utc))
        return _answer(deployment, signer, certificate, request, before=before)


def revoke(path: Path, name: str) -> list[str]:
    """Make the keys of a node invalid immediately. Return their fingerprints, or an empty list if the node was already revoked.

    Raises:
        ConfigError: the federation has no such node.
    """
    with _changing(path) as deployment:
        if name not in deployment.file.nodes:
            raise ConfigError(
                f"{name} is not a node of {path}; its nodes are {', '.join(deployment.file.nodes) or 'none'}"
            )
        files = [file for file in (deployment.public_key(name), _previous(deployment, name)) if file.is_file()]
        prints = [fingerprint_of(read_key(file).public) for file in files]
        for each in prints:
            AuditLog.of(deployment.path).append("revoke", name, each)
        _retire(deployment, reversed(files))  # the current key last, so that an interrupted command can be repeated
    return prints


def rotate_server(path: Path, hosts: Sequence[str] = (), authority: Path | None = None) -> Identity:
    """Replace the server's key and certificate.

    `hosts` contains the names and addresses of the server; default: those in the current certificate.
    """
    check_hosts(hosts)
    with _changing(path) as deployment:
        signer = _authority(deployment, authority)
        old = x509.load_pem_x509_certificate((deployment.server / "server.crt").read_bytes())
        names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        current = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
        first = [deployment.file.host] if deployment.file.host in current and not hosts else []
        made = new_server(signer, list(dict.fromkeys([*first, *(hosts or current), *LOOPBACK])))
        AuditLog.of(deployment.path).append(
            "rotate", "server", fingerprint_of(made.key.public_key()), replaced=fingerprint_of(_public(old))
        )
        replace_file(deployment.server / "server.key", key_bytes(made.key))
        replace_file(deployment.server / "server.crt", certificate_bytes(made))
    return made


@contextmanager
def _changing(path: Path) -> Iterator[Deployment]:
    """Lock the folder of a federation for a change, and read the folder."""
    with FolderLock(Deployment(path).server), private_files():
        yield Deployment(path)  # read again, because another command may have changed it before the lock


def _read(file: Path) -> NodeRequest:
    """Return the name and key of a request."""
    try:
        if file.stat().st_size > MAX_FILE:
            raise ValueError(f"it has more than {MAX_FILE} bytes")
        return read_request(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not a valid request of a node: {first_line(error)}") from None


def _compare(deployment: Deployment, action: str, asked: NodeRequest, given: str | None) -> None:
    """Raise ConfigError if the operator did not pass the fingerprint of the request's key. A wrong fingerprint is logged."""
    own = fingerprint_of(asked.key)
    if given is None:
        raise ConfigError(
            f"{asked.name}: the request has the fingerprint {own}; "
            f"confirm it with the owner of the node, then repeat the command with --fingerprint {own}"
        )
    if given.strip() != own:
        AuditLog.of(deployment.path).append(action, asked.name, own, refused=f"fingerprint {given[:60]}")
        raise ConfigError(f"--fingerprint {given}: the request has {own}; so it is not from the owner of {asked.name}")


def _known(deployment: Deployment, asked: NodeRequest) -> bool:
    """Return whether the key of a request is the current key of the node. Raise ConfigError if the key has another use."""
    for file in sorted((deployment.server / REVOKED).glob("*.pub")):
        if read_key(file).public == asked.key:
            raise ConfigError(
                f"{asked.name}: its key was revoked or replaced; make a new key in a new folder, "
                f"with fedloom deploy join FOLDER --name {asked.name}"
            )
    for key in _keys(deployment):
        if key.public == asked.key:
            if key.node != asked.name or key.is_previous:
                raise ConfigError(f"{asked.name}: its key is already in use, by {key.file.stem}")
            return True
    return False


def _keys(deployment: Deployment) -> list[NodeKey]:
    return [read_key(file) for file in sorted((deployment.server / "keys").glob("*.pub"))]


def _check_clients(name: str, clients: Sequence[int], active: dict[str, list[int]]) -> None:
    if not clients or len(set(clients)) < len(clients) or min(clients) < 0:
        raise ConfigError(f"--clients {','.join(map(str, clients))}: must be different numbers from 0")
    if name in active and sorted(active[name]) != sorted(clients):
        raise ConfigError(
            f"{name} is already admitted for clients {', '.join(map(str, active[name]))}; "
            "to change the clients, edit `nodes` in federation.toml and `clients` in the node's node.toml"
        )
    for node, its in active.items():
        if node != name and (taken := set(its) & set(clients)):
            raise ConfigError(
                f"--clients: client {min(taken)} is on {node}; revoke {node} first, or choose other clients"
            )


def _with_node(nodes: dict[str, list[int]], name: str, clients: Collection[int]) -> dict[str, list[int]]:
    """Return the nodes with a new node. Its clients are removed from their previous nodes, and nodes without clients are removed."""
    rest = {node: [i for i in its if i not in clients] for node, its in nodes.items() if node != name}
    return {node: its for node, its in rest.items() if its} | {name: sorted(clients)}


def _write_nodes(deployment: Deployment, nodes: dict[str, list[int]]) -> None:
    file = deployment.path / "federation.toml"
    replace_file(file, with_nodes(file.read_text(encoding="utf-8"), nodes))


def _authority(deployment: Deployment, folder: Path | None) -> Identity:
    found = read_authority(folder or deployment.path / "authority")
    if certificate_bytes(found) != (deployment.server / "ca.crt").read_bytes():
        raise ConfigError(f"{folder or deployment.path / 'authority'} is not the authority of {deployment.path}")
    return found


def _answer(
    deployment: Deployment, signer: Identity, certificate: x509.Certificate, request: Path, *, before: bool
) -> Admitted:
    """Write the answer for a node's owner next to the request. If the key is new, an earlier answer to the same node is replaced."""
    target, authority = request.with_suffix(".join"), fingerprint_of(_public(signer.certificate))
    name = certificate.subject.rfc4514_string().removeprefix("CN=")
    answer = JoinFile(
        name=name,
        server=deployment.file.address,
        clients=deployment.file.nodes[name],
        authority=certificate_bytes(signer).decode(),
        certificate=certificate.public_bytes(Encoding.PEM).decode(),
    )
    if target.exists() and read_file(target, JoinFile, "an answer to a node").name != name:
        raise ConfigError(f"{target} is an answer to another node; move it away")
    if not (before and target.is_file()):
        replace_file(target, ANSWER.format(authority=authority) + tomli_w.dumps(answer.model_dump()))
    return Admitted(
        name=name,
        clients=answer.clients,
        fingerprint=fingerprint_of(_public(certificate)),
        authority=authority,
        answer=target,
        before=before,
    )


def _previous(deployment: Deployment, name: str) -> Path:
    return deployment.public_key(f"{name}{PREVIOUS}")


def _retire(deployment: Deployment, files: Iterable[Path]) -> None:
    """Move keys to the folder of keys that are no longer valid."""
    for file in files:
        if file.is_file():
            key = read_key(file)
            folder = deployment.server / REVOKED
            folder.mkdir(mode=0o700, exist_ok=True)
            mark = hashlib.sha256(openssh(key.public)).hexdigest()[:16]
            file.replace(folder / f"{key.node}-{mark}.pub")


def _public(certificate: x509.Certificate) -> EllipticCurvePublicKey:
    key = certificate.public_key()
    assert isinstance(key, EllipticCurvePublicKey)
    return key
