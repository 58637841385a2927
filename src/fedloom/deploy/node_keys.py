"""The public keys of a federation's nodes, which the server stores as OpenSSH files in one folder.

`NAME.pub` is the key of a node, and `NAME.previous.pub` is the key that it replaced. The comment in a file can limit the validity of the
key: `until=2027-12-01T10:00:00+00:00`. The proxy, the server and `fedloom deploy run` all read the keys with this module.
"""

from __future__ import annotations

import sys
import time
from base64 import b64decode
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from fedloom.errors import ConfigError

PREVIOUS = ".previous"  # suffix of a node's name in the file name of its previous key
UNTIL = "until="
WINDOW_S = (-5.0, 305.0)  # permitted age of a signed timestamp in seconds, the same as in Flower
REMEMBERED_S = WINDOW_S[1] - WINDOW_S[0] + 1.0  # time for which a signed request could be replayed
MAX_REMEMBERED = 2**16  # maximum number of requests of one key within that time, 210 per second
REREAD_S = 1.0  # minimum interval between two checks of the folder


class NodeKey(NamedTuple):
    """A public key, the node to which it belongs, and the end of its validity."""

    node: str
    public: ec.EllipticCurvePublicKey
    until: datetime | None
    file: Path

    @property
    def pem(self) -> bytes:
        """The key as PEM, in the form used in the headers of Flower's requests."""
        return self.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def is_previous(self) -> bool:
        """Whether the node has a newer key."""
        return self.file.stem.endswith(PREVIOUS)

    def is_valid(self, now: datetime | None = None) -> bool:
        """Return whether the key has not expired."""
        return self.until is None or (now or datetime.now(UTC)) < self.until


def read_key(file: Path) -> NodeKey:
    """Return the public key in a file. Raise ConfigError if the file contains no key, or OSError if it cannot be read."""
    content = file.read_bytes()
    try:
        public = load_ssh_public_key(content)
        comment = content.decode("utf-8").split(maxsplit=2)[2:]
        words = comment[0].split() if comment else []
        until = [datetime.fromisoformat(word.removeprefix(UNTIL)) for word in words if word.startswith(UNTIL)]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{file} is not a public key in OpenSSH format ({error})") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or any(end.tzinfo is None for end in until):
        raise ConfigError(f"{file} is not an ECDSA key, or the end of its validity has no time zone")
    return NodeKey(file.stem.removesuffix(PREVIOUS), public, min(until, default=None), file)


def key_line(public: bytes, until: datetime | None = None) -> bytes:
    """Return the content of a key file. `public` is the key in OpenSSH format, without a comment."""
    end = f" {UNTIL}{until.isoformat(timespec='seconds')}" if until else ""
    return b" ".join(public.split()[:2]) + end.encode() + b"\n"


class Refused(NamedTuple):
    """A request that is not forwarded, and the reason for the refusal."""

    reason: str
    status: int = 412


STRANGER = Refused("its key is not among this federation's keys")


class KeyRing:
    """The valid keys in a folder and the recent requests that they signed. The folder is read again when its files change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: object = None
        self._looked = 0.0
        self._requests: dict[bytes, dict[bytes, float]] = {}
        self.keys: dict[bytes, NodeKey] = {}  # keys by their PEM text

    def refresh(self) -> None:
        """Read the keys again if a file has changed. A file without a key is reported and ignored."""
        if self._looked and time.monotonic() - self._looked < REREAD_S:
            return
        self._looked = time.monotonic()
        try:
            seen = [(file, file.stat().st_mtime_ns) for file in sorted(self._folder.glob("*.pub"))]
        except FileNotFoundError:  # removed in the meantime
            return
        if seen != self._seen:
            found = {key.pem: key for file, _ in seen if (key := _read_or_report(file))}
            self._seen, self.keys = seen, found
            self._requests = {pem: requests for pem, requests in self._requests.items() if pem in found}

    def signer(self, headers: Mapping[str, str]) -> bytes | Refused:
        """Return the key of the node that signed a request recently, or the reason why the request is refused.

        With an unknown key, the signature is not checked. Each signature is accepted only once.
        """
        self.refresh()
        try:
            pem = b64decode(headers["flwr-public-key"], validate=True)
            text = headers["flwr-timestamp"]
            if (key := self.keys.get(pem)) is None:
                return STRANGER
            if not key.is_valid():
                return Refused(f"its key expired on {key.until:%Y-%m-%d}; join again, or rotate the key")
            age = (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
            if not WINDOW_S[0] < age < WINDOW_S[1]:
                return Refused("its clock differs from the server's by more than five minutes")
            signature = b64decode(headers["flwr-signature"], validate=True)
            key.public.verify(signature, text.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        except (KeyError, ValueError, TypeError, InvalidSignature):
            return Refused("its signature is not valid")
        return self._once(pem, text, signature)

    def _once(self, pem: bytes, text: str, signature: bytes) -> bytes | Refused:
        """Return the key, unless this request was seen before or the key has signed too many requests.

        Only r of a signature (r, s) is compared, because anyone can derive the valid signature (r, n - s) from it.
        """
        now, requests = time.monotonic(), self._requests.setdefault(pem, {})
        while requests and now - next(iter(requests.values())) > REMEMBERED_S:
            del requests[next(iter(requests))]
        token = blake2b(f"{text} {decode_dss_signature(signature)[0]}".encode(), digest_size=16).digest()
        if token in requests:
            return Refused("the request was sent before", 401)
        if len(requests) >= MAX_REMEMBERED:
            return Refused("too many requests", 503)
        requests[token] = now
        return pem


def _read_or_report(file: Path) -> NodeKey | None:
    try:
        return read_key(file)
    except FileNotFoundError:  # removed in the meantime
        return None
    except (OSError, ConfigError) as error:
        print(f"ignored: {error}", file=sys.stderr, flush=True)
        return None
