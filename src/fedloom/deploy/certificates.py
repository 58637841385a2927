"""Keys and certificates of a deployed federation: a certificate authority, the server's TLS certificate, and one key per node.

All keys are ECDSA P-384. The authority signs the certificate of the server, and the certificates of nodes that join by a request. Nodes
authenticate with their private keys; the server has the public keys. Each of these files is readable only by its owner.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.errors import ConfigError
from fedloom.experiment.signing import key_fingerprint

AUTHORITY_DAYS, DAYS = 3650, 365  # validity in days of the authority's certificate, and of certificates that it signs
WARN = timedelta(days=30)  # time before a certificate expires at which warnings begin
SKEW = timedelta(days=1)  # tolerated clock error of devices


NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Identity(NamedTuple):
    """A private key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def new_authority(name: str = "fedloom federation") -> Identity:
    """Create a self-signed certificate authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        key_cert_sign=True, crl_sign=True, digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    return Identity(key, builder.sign(key, hashes.SHA384()))


def new_server(authority: Identity, hosts: Sequence[str]) -> Identity:
    """Create a server's key and certificate, valid for the given host names and IP addresses."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    builder = _builder(subject, authority.certificate.subject, key.public_key())
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(names, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(issuer, critical=False)
    return Identity(key, builder.sign(authority.key, hashes.SHA384()))


def new_node_key() -> ec.EllipticCurvePrivateKey:
    """Create a node's private key."""
    return ec.generate_private_key(ec.SECP384R1())


def new_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Return a node's request to join (PEM), signed with its key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    return builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)


class NodeRequest(NamedTuple):
    """The name and the public key of a node that wants to join."""

    name: str
    key: ec.EllipticCurvePublicKey


def read_request(content: bytes) -> NodeRequest:
    """Return the name and the key of a request. Raise ValueError if it is not a valid request that is signed with its own key."""
    request = x509.load_pem_x509_csr(content)
    key, names = request.public_key(), request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("its key is not ECDSA P-384")
    if not request.is_signature_valid:
        raise ValueError("its signature is not valid")
    name = str(names[0].value) if len(names) == 1 else ""
    if not NAME.fullmatch(name):
        raise ValueError("its name must have at most 63 lower-case letters, digits and hyphens")
    return NodeRequest(name, key)


def new_node(authority: Identity, request: NodeRequest) -> x509.Certificate:
    """Return a certificate for a node that joins."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, request.name)])
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=False, crl_sign=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = _builder(subject, authority.certificate.subject, request.key)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    builder = builder.add_extension(issuer, critical=False)
    return builder.sign(authority.key, hashes.SHA384())


def read_authority(folder: Path) -> Identity:
    """Return the authority whose key and certificate are in a folder. Raise ConfigError if they are missing or do not match."""
    try:
        key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: {error.strerror}; give the folder with the authority's key with --authority"
        ) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{folder}: ca.key or ca.crt cannot be read ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{folder}: ca.key is not the key of ca.crt")
    return Identity(key, certificate)


def fingerprint_of(key: ec.EllipticCurvePublicKey) -> str:
    """Return the fingerprint of a public key, in the form that `ssh-keygen -l` shows."""
    return key_fingerprint(openssh(key).decode())


def openssh(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key in OpenSSH format, without a comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def expiry(file: Path, remedy: str, now: datetime | None = None) -> str:
    """Return a warning if a certificate expires soon, or "". Raise ConfigError if it has expired.

    `remedy` is the command that renews the certificate.
    """
    until, now = x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc, now or datetime.now(UTC)
    if now >= until:
        raise ConfigError(f"{file} expired on {until:%Y-%m-%d}; renew it with: {remedy}")
    return f"{file} expires on {until:%Y-%m-%d}; renew it with: {remedy}" if until - now < WARN else ""


def certificate_bytes(identity: Identity) -> bytes:
    """Return the certificate as PEM."""
    return identity.certificate.public_bytes(Encoding.PEM)


def key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the private key as PEM (PKCS 8), for a TLS server."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def node_key_bytes(key: ec.EllipticCurvePrivateKey) -> tuple[bytes, bytes]:
    """Return a node's private and public key in OpenSSH format, which Flower reads."""
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, openssh(key.public_key()) + b"\n"


def write_new(path: Path, content: bytes | str) -> None:
    """Write a new file that only its owner can read.

    Raises:
        FileExistsError: the file exists; it is not overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a file atomically that only its owner can read. An existing file is replaced."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)
    write_new(draft, content)
    draft.replace(path)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int = DAYS
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - SKEW).not_valid_after(now + timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
