"""Predictions of a run's models for new raw values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedloom.data.preprocess import TokenInput
from fedloom.data.text import END, PADDING, START, UNKNOWN, packed, stream
from fedloom.errors import ConfigError, UsageError, suggest
from fedloom.experiment.build import arithmetic
from fedloom.experiment.loop import Experiment
from fedloom.experiment.personal_model import PersonalModel
from fedloom.inputs import Inputs, map_inputs, n_examples
from fedloom.objectives import Classification, MultiLabel, Objective
from fedloom.rng import Stream

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

AT_ONCE = 512
SERVER = "server"


class Predictions:
    """The models of a run, by client, and their predictions.

    Args:
        experiment: the run, possibly without its data.
        with_data: a function that returns the run with its data. It is called for methods that adapt a model to the client's examples
            before it predicts.
    """

    def __init__(self, experiment: Experiment, with_data: Callable[[], Experiment]) -> None:
        self._experiment, self._with_data = experiment, with_data
        self._models: dict[tuple[int | None, bool], PersonalModel] = {}

    @property
    def objective(self) -> Objective:
        """The learning task."""
        return self._experiment.data.objective

    def model(self, client: int | str, adapt: bool = True) -> PersonalModel:
        """Return the model of a client, or that of the server. `adapt` states whether to run the method's `adapt` phases.

        Raises:
            UsageError: there is no such client, or the client's examples are required but missing.
        """
        i = self.number(client)
        adapt = adapt and i is not None and bool(self._experiment.method.adapt())
        if (i, adapt) not in self._models:
            experiment = self._read() if adapt else self._experiment
            model = experiment.server_model() if i is None else experiment.personal_model(i, adapt)
            self._models = {(i, adapt): model}  # only the latest one, because models can be large
        return self._models[i, adapt]

    def _read(self) -> Experiment:
        try:
            return self._with_data()
        except UsageError as error:
            name = type(self._experiment.method).__name__
            raise ConfigError(
                f"{name} adapts models to the clients' own examples before it predicts, but they cannot be read ({error}); "
                "or predict without this: adapt=False"
            ) from error

    def number(self, client: int | str) -> int | None:
        """Return the number of a client, which is identified by its number or by its owner's name. Return None for the server."""
        data = self._experiment.data
        owners, n = data.partition.owners, data.n_clients
        if client == SERVER and SERVER not in owners:
            return None
        if isinstance(client, str) and client not in owners:
            known = suggest(client, owners) if owners else f"; give a number from 0 to {n - 1}, or server"
            raise ConfigError(f"client={client}: no such client{known}")
        i = owners.index(client) if isinstance(client, str) else client
        if not isinstance(i, int | np.integer) or isinstance(i, bool) or not 0 <= i < n:
            names = f", or a name, such as {owners[0]}" if owners else ""
            raise ConfigError(f"client={client}: must be from 0 to {n - 1}{names}")
        return int(i)

    def outputs(self, client: int | str, inputs: Any, adapt: bool = True, batch: int = AT_ONCE) -> Tensor:
        """Return a model's outputs for raw inputs, such as logits (N, Y)."""
        if batch < 1:
            raise ConfigError(f"batch={batch}: must be at least 1")
        model = self.model(client, adapt)
        with arithmetic(self._experiment.settings):
            return self._computed(model, model.preprocess(inputs), batch)

    def predict(self, client: int | str, inputs: Any, adapt: bool = True, batch: int = AT_ONCE) -> npt.NDArray[Any]:
        """Return predictions in the form of the data (see `Run.predict`)."""
        return self.objective.answer(self.outputs(client, inputs, adapt, batch))

    def probabilities(self, client: int | str, inputs: Any, adapt: bool = True, batch: int = AT_ONCE) -> pd.DataFrame:
        """Return the probability of each class or label, with one row per example. Raise ConfigError for other tasks."""
        import pandas as pd

        objective = self.objective
        if not isinstance(objective, Classification | MultiLabel):
            raise ConfigError(f"probabilities: task={objective.task} has none; use predict")
        outputs = self.outputs(client, inputs, adapt, batch).double()
        found = outputs.softmax(1) if isinstance(objective, Classification) else outputs.sigmoid()
        return pd.DataFrame(found.numpy(), columns=list(objective.names))

    def score(self, client: int | str, data: Any, adapt: bool = True, batch: int = AT_ONCE) -> dict[str, float]:
        """Return the metrics on new examples, the primary one first (see `Run.score`)."""
        from fedloom.data.raw_targets import stored_examples

        preprocess = self._experiment.data.preprocess
        stored, targets = stored_examples(preprocess, data)
        model = self.model(client, adapt)
        with arithmetic(self._experiment.settings):
            outputs = self._computed(model, preprocess.prepared(stored, self.number(client)), batch)
        return self.objective.metrics(self.objective.scores(outputs, targets, [len(targets)])[0])

    def generate(self, client: int | str, text: str, *, n: int = 80, temperature: float = 0.0, seed: int = 0) -> str:
        """Return the text and its continuation (see `Run.generate`)."""
        part = self._experiment.data.preprocess.inputs[0]
        coder = part.text if isinstance(part, TokenInput) else None
        if self.objective.task != "language" or coder is None:
            raise ConfigError(
                "generate: needs a run with data.task=language on texts (data.text=COLUMN, or text files)"
            )
        if n < 1 or not 0 <= temperature < math.inf:
            raise ConfigError(
                f"generate: n={n}, temperature={temperature}: n must be at least 1, and temperature 0 or more"
            )
        model, rng = self.model(client), Stream(seed, "generate").numpy
        ids, found = coder.numbered(stream([text], coder.tokens, coder.case)) or [END], list[int]()
        with arithmetic(self._experiment.settings):
            for _ in range(n):
                window = [*ids, *found][-coder.length :]
                x = packed([window], coder.length, coder.size).to(torch.int64)
                logits = self._computed(model, x, 1)[0, len(window) - 1].double()
                logits[[PADDING, UNKNOWN, START]] = -math.inf
                chances = (logits / temperature).softmax(0).numpy() if temperature else None
                best = int(logits.argmax()) if chances is None else int(rng.choice(len(chances), p=chances))
                if best == END:
                    break
                found.append(best)
        return text + coder.text_of(found)

    def _computed(self, model: PersonalModel, x: Inputs, batch: int) -> Tensor:
        starts = range(0, n_examples(x), batch)
        with torch.inference_mode():
            return torch.cat([model(map_inputs(lambda v, k=k: v[k : k + batch], x)) for k in starts])
