"""Measure the share of a local update that convolutions and matrix products take. A faster engine can only save the rest.

python benchmarks/kernels.py [WORKLOAD ...]      one thread, four local updates, with torch's profiler
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from fedloom.config.settings import make_settings
from fedloom.experiment.loop import GivenObjects
from fedloom.tools.bench import WORKLOADS, Stepped, dataset_for

SCALES: Mapping[str, float] = MappingProxyType(
    {"w1": 0.1, "w1-100": 0.1, "w2": 0.08, "w3": 0.05, "w4": 0.3, "w4-mlp": 1.0}
)
KERNELS = ("mkldnn_convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
TURNS = 4


def shares(name: str) -> dict[str, float]:
    """Return the share of every operator in the time of a few local updates."""
    with tempfile.TemporaryDirectory() as folder:
        scale = SCALES[name]
        values = WORKLOADS[name].values(scale) | {"engine": {"name": "sequential"}, "out": Path(folder) / "run"}
        run = Stepped(make_settings(values), GivenObjects(dataset=dataset_for(WORKLOADS[name], scale)))
        cohort = run.next_cohort()[:TURNS]
        down = run.hooks.downlink(run.server, 0, cohort)
        for number in range(2):
            run.engine.train(number, cohort, down)
        with torch.profiler.profile() as profile:
            run.engine.train(2, cohort, down)
    events = profile.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    return {event.key.removeprefix("aten::"): event.self_cpu_time_total / whole for event in events}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for workload in sys.argv[1:] or SCALES:
        found = shares(workload)
        largest = sorted(found, key=lambda name: -found[name])[:6]
        rest = ", ".join(f"{name} {100 * found[name]:.0f}" for name in largest)
        print(f"{workload}: {100 * sum(found.get(name, 0) for name in KERNELS):.0f} % in kernels ({rest})", flush=True)
