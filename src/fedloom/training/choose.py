"""Choose the form in which steps are computed. All decisions about forms are made in this module."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from fedloom.accelerator import HOST
from fedloom.training.fast.convolutions import ConvolutionForm, Convolutions
from fedloom.training.fast.gram_layer import GramChoice, GramStepRunner
from fedloom.training.fast.step_cache import kind_of, step_cache_for
from fedloom.training.steps import StepRunner, TrainJob

__all__ = ["ConvolutionForm", "Convolutions", "FastForms"]


class FastForms:
    """The faster forms of a step that may be used with one architecture's modules."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        bf16: bool,
        device: torch.device,
        convolutions: Convolutions | None,
        as_written: bool,
    ) -> None:
        """Store the arguments; see `Gradients`."""
        stateful = any(True for module in modules.values() for _ in module.buffers())
        self._cache = None if as_written else step_cache_for(device, stateful)
        self._gram = None if as_written or bf16 or device != HOST else GramChoice(modules)
        self._convolutions = convolutions

    def runner(self, job: TrainJob, *, same_bits: bool = False) -> StepRunner:
        """Return the fastest available runner for the steps of a job.

        Args:
            same_bits: whether to exclude forms whose rounding differs from that of the loss as written.
        """
        gram = None if same_bits or self._gram is None else self._gram.replacement(job)
        step = job.plain(gram)
        if self._cache:
            kind = kind_of(job.train, job.work), job.layout, gram
            step = self._cache.cached(step, kind, stacked=job.stacked_step is not None)
        return GramStepRunner(job, gram, step) if gram else StepRunner(job.names, step)

    def over_lanes(self, n_lanes: int) -> AbstractContextManager[object]:
        """Return the context in which a loss is mapped over stacked clients."""
        return self._convolutions.of(n_lanes) if self._convolutions else nullcontext()
