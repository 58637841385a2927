"""The model of a connection, checked by hand."""

import pytest

from fedloom.errors import ConfigError
from fedloom.report.link_speeds import NETWORKS, Network, networks


def test_a_round_by_hand():
    # 10 MB up at 5 Mbit/s take 16 s, 10 MB down at 20 Mbit/s take 4 s, and two messages wait 60 ms each
    assert NETWORKS["4g"].seconds(10_000_000, 10_000_000) == pytest.approx(16 + 4 + 0.12)


def test_a_missing_message_takes_no_time():
    way = Network("", up=8, down=8, latency=100)
    assert way.seconds(0, 0) == 0
    assert way.seconds(1_000_000, 0) == pytest.approx(1.1)


def test_own_networks():
    known, own = networks("lan, 2/10/80")
    assert known is NETWORKS["lan"]
    assert own == Network("2/10/80", 2, 10, 80)


@pytest.mark.parametrize("word", ["5g", "1/2", "0/1/1", "1/2/-3", "a/b/c", "inf/1/1", "nan/1/1", ""])
def test_nonsense_is_refused(word):
    with pytest.raises(ConfigError, match="network="):
        networks(word)
