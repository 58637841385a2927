"""Joining a federation, on the node's own device: create a key and a request, and apply the operator's answer.

The private key is created here and never leaves the device. If the command is repeated, the files of a request that was not answered yet
are used again.
"""

from __future__ import annotations

import getpass
import secrets
import sys
from pathlib import Path
from typing import NamedTuple

import tomli_w
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedloom.deploy import texts
from fedloom.deploy.certificates import (
    NAME,
    fingerprint_of,
    new_node_key,
    new_request,
    node_key_bytes,
    read_request,
    replace_file,
    write_new,
)
from fedloom.deploy.files import MAX_FILE, JoinFile, NodeFile, read_file
from fedloom.deploy.folder import make_empty
from fedloom.deploy.services import private_files
from fedloom.errors import ConfigError

KEY, NEXT = "node.key", "node.key.next"
RUNTIME_PORT = 9094


class JoinRequest(NamedTuple):
    """A request for the operator of the server, and the fingerprint that the owner compares with the operator's."""

    file: Path
    fingerprint: str


def request_to_join(folder: Path, name: str) -> JoinRequest:
    """Create a node's key and request in a new folder.

    Raises:
        ConfigError: the folder contains other files, or the name is not allowed.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name}: must have at most 63 lower-case letters, digits and hyphens, and start with a letter or digit"
        )
    if (folder / "node.toml").is_file():
        raise ConfigError(f"{folder} is already a node's folder; for a new key, use: fedloom deploy rotate {folder}")
    if not (folder / KEY).is_file():
        make_empty(folder)
    return _request(folder, name, KEY)


def request_new_key(folder: Path) -> JoinRequest:
    """Create a new key and request for a node that has joined. The old key is used until the answer is applied."""
    return _request(folder, read_file(folder / "node.toml", NodeFile, "a node's folder").name, NEXT)


def _request(folder: Path, name: str, key_file: str) -> JoinRequest:
    with private_files():
        if not (folder / key_file).is_file():
            write_new(folder / key_file, node_key_bytes(new_node_key())[0])
        if not (folder / "runtime.secret").is_file():
            write_new(folder / "runtime.secret", secrets.token_hex(32))
        key, file = _load(folder / key_file), folder / f"{name}.csr"
        others = [other.name for other in folder.glob("*.csr") if other != file]
        if others:
            raise ConfigError(f"{folder}: already has the request {others[0]}; use its name, or another folder")
        if not file.is_file() or read_request(file.read_bytes()).key != key.public_key():
            replace_file(file, new_request(key, name))
    return JoinRequest(file, fingerprint_of(key.public_key()))


class Joined(NamedTuple):
    """The settings of a node that has joined, and whether the answer only replaced its key."""

    node: NodeFile
    is_renewal: bool


def finish(folder: Path, answer: Path, authority: str | None) -> Joined:
    """Apply the operator's answer: write the node's certificate and settings, or use its new key from now on.

    Args:
        folder: the folder with the node's key.
        answer: the file from the operator.
        authority: the fingerprint of the federation's authority, from the operator.

    Raises:
        ConfigError: the answer is not for a key of this node or not from this authority, or a file has other content.
    """
    given = _read_answer(answer)
    mine = next((name for name in (NEXT, KEY) if _is_for(folder / name, given)), None)
    if mine is None:
        raise ConfigError(f"{answer} is not the answer to this node's request; {folder} has another key")
    ca, certificate = _certificates(given, answer)
    _compare(ca, authority)
    _check_chain(ca, certificate, given, answer)
    node = NodeFile(name=given.name, server=given.server, runtime_port=RUNTIME_PORT, clients=given.clients)
    with private_files():
        _write_once(folder / "ca.crt", given.authority)
        renewal = (folder / "node.toml").is_file()
        if renewal:
            node = _keep(folder, node)
            replace_file(folder / "node.crt", given.certificate)
            if mine == NEXT:
                (folder / NEXT).replace(folder / KEY)
        else:
            replace_file(folder / "node.crt", given.certificate)
            unit = texts.node_unit(given.name, folder.resolve(), sys.executable, getpass.getuser())
            replace_file(folder / "fedloom-node.service", unit)
            write_new(folder / "node.toml", texts.NODE + tomli_w.dumps(node.model_dump(exclude_none=True)))  # last
        (folder / f"{given.name}.csr").unlink(missing_ok=True)
    return Joined(node, renewal)


def _read_answer(file: Path) -> JoinFile:
    if file.is_file() and file.stat().st_size > 4 * MAX_FILE:
        raise ConfigError(f"{file} is not an operator's answer: it has more than {4 * MAX_FILE} bytes")
    if not file.is_file():
        raise ConfigError(f"{file}: file not found; the operator of the server creates it with fedloom deploy admit")
    return read_file(file, JoinFile, "an operator's answer")


def _certificates(given: JoinFile, answer: Path) -> tuple[x509.Certificate, x509.Certificate]:
    try:
        texts_ = (given.authority.encode(), given.certificate.encode())
        ca, own = (x509.load_pem_x509_certificate(text) for text in texts_)
    except ValueError:
        raise ConfigError(f"{answer} has no valid certificates; ask the operator for the file again") from None
    return ca, own


def _compare(ca: x509.Certificate, authority: str | None) -> None:
    """Raise ConfigError if the owner did not pass the fingerprint of the authority."""
    key = ca.public_key()
    own = fingerprint_of(key) if isinstance(key, EllipticCurvePublicKey) else "no ECDSA key"
    if authority is None:
        raise ConfigError(
            f"the answer is from the authority {own}; "
            f"confirm it with the operator of the server, then repeat the command with --authority {own}"
        )
    if authority.strip() != own:
        raise ConfigError(
            f"--authority {authority}: the answer is from {own}; so it is not from your federation's operator"
        )


def _check_chain(ca: x509.Certificate, certificate: x509.Certificate, given: JoinFile, answer: Path) -> None:
    """Raise ConfigError if the node's certificate is not signed by the authority, or has another name."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(f"{answer}: the node's certificate is not signed by the authority") from None
    if certificate.subject.rfc4514_string() != f"CN={given.name}":
        raise ConfigError(f"{answer}: the certificate is not for {given.name}")


def _is_for(key: Path, given: JoinFile) -> bool:
    """Return whether the certificate of an answer is for a private key."""
    try:
        certificate = x509.load_pem_x509_certificate(given.certificate.encode())
        return key.is_file() and certificate.public_key() == _load(key).public_key()
    except ValueError:
        return False


def _keep(folder: Path, node: NodeFile) -> NodeFile:
    """Return the node's settings unchanged. Raise ConfigError if the answer is for another node."""
    own = read_file(folder / "node.toml", NodeFile, "a node's folder")
    for key in ("name", "server", "clients"):
        if getattr(own, key) != getattr(node, key):
            raise ConfigError(
                f"{folder / 'node.toml'}: {key} is {getattr(own, key)}, but the answer has {getattr(node, key)}; change it there first"
            )
    return own


def _load(file: Path) -> EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} is not a node's private key ({error})") from None
    assert isinstance(key, EllipticCurvePrivateKey)
    return key


def _write_once(path: Path, content: str) -> None:
    """Write a file. Raise ConfigError if it exists with other content."""
    if not path.is_file():
        write_new(path, content)
    elif path.read_text(encoding="utf-8") != content:
        raise ConfigError(f"{path} is from another authority; this node belongs to another federation")
