"""Signatures of finished runs. Anyone with the public key can check who published the results, and that they have not been edited since.

`manifest.sig` contains a signature of the digest of the run's `manifest.json`, made with an Ed25519 or P-384 key.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from fedloom.errors import ConfigError, RunFolderError
from fedloom.experiment.manifest import MANIFEST, read_manifest

SIGNATURE = "manifest.sig"
CONTEXT = b"fedloom run "  # precedes the digest, so that the signature is not valid for anything else


class Signer:
    """Signs finished runs with one private key."""

    def __init__(self, file: str | Path) -> None:
        """Load the key. Raise ConfigError if the file contains no private key of a supported kind."""
        _require_extra("--sign")
        self._key = _load(Path(file), "private", "--sign")

    def sign(self, folder: Path) -> str:
        """Sign a finished run, and return the fingerprint of the key."""
        record = read_manifest(folder / MANIFEST)
        if record is None:
            raise RunFolderError(f"{folder} has no {MANIFEST}, so there is nothing to sign; finish the run first")
        message = CONTEXT + record["digest"].encode()
        signature = self._key.sign(message, *_scheme(self._key))
        public = _text(self._key.public_key())
        content = {"digest": record["digest"], "key": public, "signature": base64.b64encode(signature).decode()}
        (folder / SIGNATURE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return key_fingerprint(public)


def check_signature(folder: Path, digest: str, key: str | Path | None = None) -> str:
    """Check the signature of the manifest with this digest. Return the fingerprint of its key, or "" if there is no signature.

    `key` is a file with the only public key that is accepted.

    Raises:
        ConfigError: the 'cryptography' package is not installed, or the file contains no public key.
        RunFolderError: the signature is missing although `key` is passed, was made with another key, or does not match.
    """
    file = folder / SIGNATURE
    if key is None and not file.is_file():
        return ""
    _require_extra("signatures")
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    wanted = _text(_load(Path(key), "public", "--key")) if key is not None else None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        public = str(content["key"])
        verifier: Any = load_ssh_public_key(public.encode())
        verifier.verify(base64.b64decode(content["signature"]), CONTEXT + digest.encode(), *_scheme(verifier))
    except FileNotFoundError:
        raise RunFolderError(f"{file} is missing, so the run is not signed") from None
    except InvalidSignature:
        raise RunFolderError(
            f"{file} does not match {MANIFEST}: the manifest was changed after it was signed"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, UnsupportedAlgorithm) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from None
    if wanted is not None and _text(verifier) != wanted:
        raise RunFolderError(f"{file} was made with another key ({key_fingerprint(public)}), not with {key}")
    return key_fingerprint(public)


def key_fingerprint(public: str) -> str:
    """Return the fingerprint of an OpenSSH public key, in the form that `ssh-keygen -l` shows."""
    import hashlib

    blob = base64.b64decode(public.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _require_extra(what: str) -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{what}: requires the package cryptography, which is not installed; pip install 'fedloom[flower]'"
        ) from None


def _load(file: Path, kind: str, option: str) -> Any:
    """Return the private or public key in an OpenSSH or PEM file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}={file}: cannot be read: {error.strerror}") from None
    is_pem = data.startswith(b"-----BEGIN") and not data.startswith(b"-----BEGIN OPENSSH")
    read: Any = getattr(serialization, f"load_{'pem' if is_pem else 'ssh'}_{kind}_key")
    try:
        key = read(data, None) if kind == "private" else read(data)
        _scheme(key)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        hint = "; remove its passphrase with ssh-keygen -p on a copy" if "assword" in str(error) else ""
        raise ConfigError(
            f"{option}={file}: must be an Ed25519 or P-384 {kind} key in OpenSSH or PEM format ({str(error).rstrip('.')}){hint}"
        ) from None
    return key


def _scheme(key: Any) -> tuple[Any, ...]:
    """Return the additional arguments of `key.sign` and `key.verify`. Raise TypeError for other kinds of keys."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
        return ()
    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) and key.curve.name == "secp384r1":
        return (ec.ECDSA(hashes.SHA384()),)
    raise TypeError(f"this is a {type(key).__name__}")


def _text(public: Any) -> str:
    """Return a public key in OpenSSH format."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    found: bytes = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return found.decode()
