"""Estimate the time that a run would take on devices, for computing and for sending, from its recorded costs."""

from __future__ import annotations

import decimal
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from rich.table import Table

from fedloom.errors import ConfigError
from fedloom.report import units
from fedloom.report.groups import group, series, shared_primary
from fedloom.report.link_speeds import Network
from fedloom.report.read import RunRecord
from fedloom.report.tables import EMPTY, Cell, Grid, drawn

COMMON_DIGITS = 3  # number of significant digits of a common target that is not in percent


class Waiting(NamedTuple):
    """Assumptions about the devices."""

    networks: Sequence[Network]
    slowdown: float = 1.0  # factor by which devices compute more slowly than this machine
    gflops: float | None = None  # their GFLOP/s; time is then counted operations / GFLOP/s, not measured seconds
    target: float | None = None  # a value of the primary metric, as stored; for None, see `common_target`


def elapsed(record: RunRecord, network: Network, waiting: Waiting) -> pd.Series[float]:
    """Return the time in seconds from the start of the run to the end of each round. It is empty if the run has no client times.

    All clients work in parallel, and the server waits for the last one. A round therefore takes as long as the slowest client's downlink,
    local update and uplink. The server's work and the evaluation are assumed to take no time.
    """
    work, factor = ("seconds", waiting.slowdown) if waiting.gflops is None else ("flops", 1e-9 / waiting.gflops)
    if record.clients is None or not {"uplink_bytes", "downlink_bytes", work} <= set(record.clients.columns):
        return pd.Series(dtype="float64")
    turns = record.clients.dropna(subset=["uplink_bytes", work])
    sizes = zip(turns["uplink_bytes"], turns["downlink_bytes"], strict=True)
    sending = [network.seconds(up, down) for up, down in sizes]
    waits = turns[work] * factor + sending
    rounds: pd.Series[float] = waits.groupby(turns["round"]).max().sort_index().cumsum()
    return rounds


def common_target(records: Sequence[RunRecord]) -> float:
    """Return a value of the personal metric that every run reaches: the worst of the runs' best values, rounded.

    Percentages are rounded to an integer, and other values to three significant digits, both in the direction that is easier to reach.
    """
    primary = shared_primary(records)
    worst = primary.worst(primary.best(_values(record)) for record in records)
    if primary.percent:
        rounded = math.ceil(100 * worst - 1e-9) if primary.is_lower_better else math.floor(100 * worst + 1e-9)
        return rounded / 100
    easier = decimal.ROUND_CEILING if primary.is_lower_better else decimal.ROUND_FLOOR
    return float(decimal.Context(prec=COMMON_DIGITS, rounding=easier).create_decimal(repr(float(worst))))


def round_of_target(record: RunRecord, target: float) -> int | None:
    """Return the first evaluated round that reaches the target, or None."""
    values = _values(record)
    there = values[record.primary.sign * (values - target) >= 0]
    return int(there.index[0]) if len(there) else None


def _values(record: RunRecord) -> pd.Series[float]:
    return series(record, record.primary.measure("personal"))


def waiting_table(records: Sequence[RunRecord], waiting: Waiting) -> Table:
    """Return `waiting_grid` as a table for the terminal."""
    return drawn(waiting_grid(records, waiting))


def waiting_grid(records: Sequence[RunRecord], waiting: Waiting) -> Grid:
    """Return each method's time to the target on each network, as a mean over seeds. A dash means that a seed never reaches the target.

    Raises:
        ConfigError: a run has no scores or no client times.
        UsageError: the runs have different primary metrics.
    """
    primary = shared_primary(records)
    counted = [record for g in group(records) for record in g.counted]
    for record in counted:
        lacking = _lacking(record, waiting)
        if lacking:
            raise ConfigError(f"network: times cannot be estimated, because {record.name} has {lacking}")
    target = common_target(counted) if waiting.target is None else waiting.target
    rows = []
    for g in group(records):
        rounds = [round_of_target(record, target) for record in g.counted]
        known = [number for number in rounds if number is not None]
        if len(known) < len(rounds):
            rows.append((Cell(g.label), *[EMPTY] * (3 + len(waiting.networks))))
            continue
        pairs = list(zip(g.counted, known, strict=True))
        rows.append((Cell(g.label), *_cells(pairs, waiting)))
    headers = (
        "Method",
        "\nround",
        "bytes a client\nand round",
        "\ncomputing",
        *(f"\n{w.name}" for w in waiting.networks),
    )
    return Grid(
        title=f"Time to {primary.target(target)}",
        headers=headers,
        rows=tuple(rows),
        caption=_caption(waiting),
    )


def _lacking(record: RunRecord, waiting: Waiting) -> str:
    """Return a message that names the data that a run lacks for the estimate, or ""."""
    if not len(_values(record)):
        return f"no {record.primary.name} yet"
    if len(elapsed(record, waiting.networks[0], waiting)):
        return ""
    if waiting.gflops is not None and len(elapsed(record, waiting.networks[0], waiting._replace(gflops=None))):
        return "no operation counts, which gflops needs (use slowdown, which needs only measured seconds)"
    return "no seconds and bytes in clients.parquet"


def _cells(pairs: Sequence[tuple[RunRecord, int]], waiting: Waiting) -> list[Cell]:
    mean = statistics.fmean
    sizes = [_bytes_per_turn(record) for record, _ in pairs]
    still = Network("", math.inf, math.inf, 0.0)
    computing = mean(_at(elapsed(record, still, waiting), number) for record, number in pairs)
    cells = [Cell(f"{mean(n for _, n in pairs):.3g}"), Cell(units.size(mean(sizes))), Cell(units.duration(computing))]
    for network in waiting.networks:
        whole = mean(_at(elapsed(record, network, waiting), number) for record, number in pairs)
        cells.append(Cell(units.duration(whole), whole))
    return cells


def _at(times: pd.Series[float], number: int) -> float:
    before = times[times.index <= number]
    return float(before.iloc[-1]) if len(before) else 0.0  # no client has trained yet


def _bytes_per_turn(record: RunRecord) -> float:
    """Return the mean number of bytes per client and round, for uplink and downlink together."""
    clients = record.clients
    assert clients is not None  # checked in `waiting_grid`
    return float((clients["uplink_bytes"] + clients["downlink_bytes"]).mean())


def _caption(waiting: Waiting) -> str:
    ways = "; ".join(f"{w.name} {w.up:g} Mbit/s up, {w.down:g} down, {w.latency:g} ms" for w in waiting.networks)
    here = (
        f"take {waiting.slowdown:g} times the measured time"
        if waiting.gflops is None
        else f"compute at {waiting.gflops:g} GFLOP/s"
    )
    return f"Assumed: {ways}; devices {here}; a round waits for its slowest client."
