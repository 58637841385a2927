"""A model of a client's connection, which gives the time that a round's messages take."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from fedloom.errors import ConfigError, suggest


class Network(NamedTuple):
    """A connection with a fixed rate in each direction, a fixed latency and no other traffic."""

    name: str
    up: float  # in Mbit/s, with 10^6 bits
    down: float
    latency: float  # in ms, one way, for each message

    def seconds(self, up_bytes: float, down_bytes: float) -> float:
        """Return the time in seconds for a downlink followed by an uplink. An empty message is not sent and takes no time."""
        bits = 8 * up_bytes / self.up + 8 * down_bytes / self.down
        return bits / 1e6 + self.latency / 1e3 * ((up_bytes > 0) + (down_bytes > 0))


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "4g": Network("4g", up=5, down=20, latency=60),
        "wifi": Network("wifi", up=20, down=50, latency=20),
        "lan": Network("lan", up=1000, down=1000, latency=1),
    }
)
"""These are assumptions, not measurements. docs/edge.md states their sources."""


def networks(text: str) -> list[Network]:
    """Return networks from known names such as `4g,lan`, or from UP/DOWN/LATENCY in Mbit/s, Mbit/s and ms, such as `2/10/80`.

    Raises:
        ConfigError: a word is neither a known network nor UP/DOWN/LATENCY.
    """
    return [_network(word.strip()) for word in text.split(",")]


def _network(word: str) -> Network:
    if word in NETWORKS:
        return NETWORKS[word]
    try:
        up, down, latency = (float(part) for part in word.split("/"))
    except ValueError:
        hint = suggest(word, NETWORKS)
        raise ConfigError(
            f"network={word}: must be a known network, or UP/DOWN/LATENCY in Mbit/s, Mbit/s, ms, such as 5/20/60{hint}"
        ) from None
    if not (0 < up < float("inf") and 0 < down < float("inf") and 0 <= latency < float("inf")):
        raise ConfigError(f"network={word}: rates must be above 0 and the latency at least 0")
    return Network(word, up, down, latency)
