"""Device selection and deterministic arithmetic on a CPU or a CUDA device. Only this module and `training/fast/cuda_graph.py` need a GPU.

All random numbers are drawn on the host, from the same streams as in a CPU run, and then moved to the device. Batches, masks, noise and
latents are therefore the same on the CPU and the device. The exception is modules with their own randomness (Dropout): they use the
device's generator, which is seeded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fedloom.errors import ConfigError

HOST = torch.device("cpu")
SHARE_OF_FREE = 0.5  # fraction of the free memory for data and client states; training steps use the rest


class DeviceBudget(NamedTuple):
    """A device for computations, and its memory budget."""

    device: torch.device = HOST
    budget: int = 0  # bytes of the device's memory that data and client states may use between local updates


ON_HOST = DeviceBudget()


def find(name: str) -> torch.device:
    """Return the device called `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: there is no such device.
    """
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        why = "" if torch.version.cuda else f" (this is torch {torch.__version__}, built without CUDA)"
        raise ConfigError(f"engine.device={name}: torch finds no CUDA device here{why}; use engine.device=cpu")
    n, index = torch.cuda.device_count(), device.index or 0
    if index >= n:
        raise ConfigError(f"engine.device={name}: no such device; use cuda:0 to cuda:{n - 1}")
    return torch.device("cuda", index)


def place(name: str, budget: int | None = None) -> DeviceBudget:
    """Return the device called `name` with a memory budget in bytes (default: half of its free memory).

    Raises:
        ConfigError: there is no such device.
    """
    device = find(name)
    return DeviceBudget(device, int(SHARE_OF_FREE * free_bytes(device)) if budget is None else budget)


def free_bytes(device: torch.device) -> int:
    """Return the number of bytes of a CUDA device's memory that are free, or reserved but not used by torch; 0 for any other device."""
    if device.type != "cuda":
        return 0
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def describe_device(device: torch.device) -> str:
    """Return a description of the device for the records of a run: name, memory and CUDA version."""
    if device.type != "cuda":
        return str(device)
    facts = torch.cuda.get_device_properties(device)
    memory = f"{facts.total_memory / 2**30:.0f} GiB"
    return f"{device}: {facts.name}, {memory}, CUDA {torch.version.cuda}"


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all queued work, so that times can be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shortest_s(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the shortest time of several repetitions, in seconds. A first untimed run lets libraries choose their algorithms."""
    work()
    times = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times)


def staged(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on the device. A copy from the host goes through pinned memory, so that it is asynchronous."""
    if x.device == device:
        return x
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=x.device == HOST)


def generators(device: torch.device) -> list[torch.Generator]:
    """Return the generators used by modules with their own randomness (Dropout)."""
    own = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *own]


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Use `n` threads for operations of torch on the CPU within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def exact(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Make a CUDA device the current device, and use `strict` arithmetic on it. Do nothing on the CPU."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # read when cuBLAS starts; without it, sums in cuBLAS may vary
    with torch.cuda.device(device), strict(tf32):
        yield


@contextmanager
def strict(tf32: bool) -> Iterator[None]:
    """Compute in full float32 precision (with `tf32`, compute products in TF32), so that equal inputs always give bit-identical results.

    A warning is issued for an operation without a deterministic form on the device.
    """
    cudnn, filled = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    products, on = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    warns, fills = torch.is_deterministic_algorithms_warn_only_enabled(), filled.fill_uninitialized_memory
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled.fill_uninitialized_memory = False
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.use_deterministic_algorithms(on, warn_only=warns)
        filled.fill_uninitialized_memory = fills
