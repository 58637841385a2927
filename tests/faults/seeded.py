"""Faults that the tests must catch: small changes after which the code still runs, but its numbers are wrong.

Each fault replaces one piece of text, which must occur exactly once in `src/`. Modules are not named, so they may be moved. `catch.py`
applies the faults one at a time to a copy and runs the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """One change. `only` restricts the nearest tests to those that a pytest -k expression selects."""

    name: str
    old: str
    new: str
    only: str = ""


class Area(NamedTuple):
    """Faults with the same nearest tests."""

    tests: tuple[str, ...]
    faults: tuple[Fault, ...]


AREAS = (
    Area(
        ("tests/dynamics/test_quadratics.py", "tests/dynamics/test_plain.py"),
        (
            Fault(
                "SCAFFOLD's correction has the wrong sign",
                'tree.sub(down["control"], memory["control"])',
                'tree.sub(memory["control"], down["control"])',
                "scaffold",
            ),
            Fault(
                "SCAFFOLD's control variates ignore the decay of the learning rate",
                "* self.lr * turn.lr_scale",
                "* self.lr",
                "scaffold",
            ),
            Fault(
                "SCAFFOLD's server moves c as if every client had taken part",
                'mean["control"], len(uplinks) / round.n_clients)',
                'mean["control"], 1.0)',
                "scaffold",
            ),
            Fault(
                "FedProx's term has mu in place of mu / 2",
                'self.mu / 2 * losses.squared_distance(nets.params, down["weights"]',
                'self.mu * losses.squared_distance(nets.params, down["weights"]',
            ),
            Fault(
                "FedAvg takes the mean over clients, not over examples",
                'return {"weights": tree.mean([up["weights"] for up in uplinks], round.shares)}',
                'return {"weights": tree.mean([up["weights"] for up in uplinks])}',
            ),
            Fault("every client of a mean has the first one's weight", "alpha=weight)", "alpha=weights[0])"),
            Fault("the learning rate does not decay", "return method.lr_decay**number * planned", "return planned"),
        ),
    ),
    Area(
        ("tests/dynamics/test_fedmr.py",),
        (
            Fault(
                "FedMR shuffles whole models",
                "return _shuffled(slots, pieces, [rng.permutation(n) for _ in pieces])",
                "return _shuffled(slots, pieces, [rng.permutation(n)] * len(pieces))",
            ),
            Fault(
                "FedMR shuffles its first unit only",
                "return _shuffled(slots, pieces, [rng.permutation(n) for _ in pieces])",
                "return _shuffled(slots, pieces, [rng.permutation(n), *[torch.arange(n)] * (len(pieces) - 1)])",
            ),
            Fault(
                "FedMR puts models into the first slots when a client is lost",
                "slots[arrival.slot] = model",
                "slots[round.arrivals.index(arrival)] = model",
                "place",
            ),
        ),
    ),
    Area(
        ("tests/dynamics/test_fedproto.py", "tests/dynamics/test_fedvtc.py"),
        (
            Fault(
                "FedProto's prototypes count clients, not rows",
                'return counts if self.prototype_mean == "weighted" else (counts > 0)',
                "return (counts > 0)",
            ),
            Fault(
                "FedProto predicts classes that have no prototype",
                "torch.where(known, -distance, torch.finfo(features.dtype).min)",
                "-distance",
            ),
            Fault(
                "FedProto pulls rows whose class has no prototype",
                "(known * self.distance(features, batch.y, down)).mean()",
                "self.distance(features, batch.y, down).mean()",
            ),
            Fault(
                "FedVTC's variance lacks the variance between clients",
                '"ky,kp->p", shares, inside) + torch.einsum("ky,kyp->p", shares, away.square())',
                '"ky,kp->p", shares, inside)',
            ),
            Fault(
                "FedVTC fine-tunes one round early",
                "(turn.number + 1) % self.finetune_every == 0",
                "turn.number % self.finetune_every == 0",
            ),
            Fault(
                "FedVTC's latents ignore their classes' prototypes",
                'return labels, down["prototypes"][labels] + away',
                "return labels, away",
            ),
        ),
    ),
    Area(
        ("tests/dynamics/test_fedrir.py", "tests/unit/test_losses.py"),
        (
            Fault(
                "FedRIR's KL term has the wrong sign",
                "return reconstruction + self.kl_weight * kl",
                "return reconstruction - self.kl_weight * kl",
            ),
            Fault(
                "FedRIR masks the patches that should stay",
                "rank >= int(self.mask_ratio * rows * columns)",
                "rank < int(self.mask_ratio * rows * columns)",
            ),
            Fault(
                "FedRIR's head, a private net, is in the uplink",
                'ClassVar[tuple[str, ...]] = ("gfe",)',
                'ClassVar[tuple[str, ...]] = ("gfe", "head")',
            ),
            Fault("vCLUB has the wrong sign", "(rest - own) / (2 *", "(own - rest) / (2 *"),
        ),
    ),
    Area(
        (
            "tests/dynamics/test_shared_parts.py",
            "tests/dynamics/test_ditto.py",
            "tests/dynamics/test_fedasam.py",
            "tests/unit/test_nets.py",
        ),
        (
            Fault("FedRep trains the body before the head", "return head, body", "return body, head"),
            Fault(
                "FedBABU trains the common head",
                '(Train("train", self.loss, ("model:body",)',
                '(Train("train", self.loss, ("model",)',
            ),
            Fault(
                "FedBN keeps nothing but the weights of its normalisation layers",
                "layer_of(name) in norms if",
                'name.endswith(".weight") and layer_of(name) in norms if',
            ),
            Fault(
                "Ditto pushes the personal model away",
                'error + self.mu / 2 * losses.squared_distance(nets.renamed("personal", "model"), received)',
                'error - self.mu / 2 * losses.squared_distance(nets.renamed("personal", "model"), received)',
            ),
            Fault("FedASAM climbs down", "nets.params[name] + e[name]", "nets.params[name] - e[name]"),
        ),
    ),
    Area(
        ("tests/unit/test_training.py", "tests/unit/test_optim.py", "tests/dynamics/test_plain.py"),
        (
            Fault("momentum is lost", "torch._foreach_mul_(velocity, momentum)", "torch._foreach_mul_(velocity, 0.0)"),
            Fault(
                "weight decay lets weights grow",
                "add(moves, values, alpha=weight_decay)",
                "add(moves, values, alpha=-weight_decay)",
            ),
            Fault("Adam's mean is not corrected for its start", "-lr * scale / (1 - beta1**n)", "-lr * scale"),
            Fault(
                "a turn has one epoch too many",
                "for _ in range(epochs):\n            order =",
                "for _ in range(epochs + 1):\n            order =",
            ),
            Fault("an incomplete last batch is dropped", "elif rest and not self.drop_last:", "elif False:"),
            Fault(
                "a sweep begins with the statistics of the round before",
                "tree.zeros_like(client.memory[phase.name])",
                "client.memory[phase.name]",
            ),
            Fault(
                "kept optimiser states start afresh",
                "{member.train.name: member.state for member in members if member.train.keep_state}",
                "{}",
            ),
            Fault(
                "nets that should be in evaluation mode are in training mode",
                "return self.train_mode if self.train_mode is not None else",
                "return self.train_mode or",
            ),
        ),
    ),
    Area(
        (
            "tests/contract/test_experiment.py",
            "tests/contract/test_engines.py",
        ),
        (
            Fault(
                "all batches of all clients are augmented alike",
                'rows.batches(order, rng.child("augment"))',
                'rows.batches(order, Stream("augment"))',
                "draws_of_its_own",
            ),
            Fault(
                "clients share their streams",
                "return Stream(self.seed, purpose, number, client)",
                "return Stream(self.seed, purpose, number)",
                "draws_of_its_own",
            ),
            Fault(
                "rounds share their streams",
                "return Stream(self.seed, purpose, number, client)",
                "return Stream(self.seed, purpose, client)",
                "draws_of_its_own",
            ),
            Fault(
                "phases share their streams",
                "replace(context, rng=context.rng.child(phase.name))",
                "context",
                "draws_of_its_own",
            ),
            Fault(
                "the cohort is the same in every round",
                'Stream(self.settings.seed, "cohort", number)',
                'Stream(self.settings.seed, "cohort")',
                "stays_in_its_range",
            ),
            Fault(
                "the server draws the same in every round",
                "n, rng = self.task.n_clients, Stream(self.seed, purpose, number)",
                "n, rng = self.task.n_clients, Stream(self.seed, purpose)",
                "server_draws",
            ),
            Fault(
                "dropout is the same for all clients and rounds",
                "generator.manual_seed(rng.torch_seed())",
                "generator.manual_seed(0)",
                "dropout",
            ),
        ),
    ),
    Area(
        ("tests/contract/test_engines.py", "tests/unit/test_state.py"),
        (
            Fault(
                "a worker that opens the file of client states zeroes its first byte",
                "        _enlarge(path, self.n_bytes)\n",
                "",
                "enlarged",
            ),
            Fault(
                "lanes walk through the padding of shorter clients",
                "phase_batches(phase, lane.context.plan, lane.context.rows, lane.context.rng) for lane in self.here",
                "phase_batches(phase, lane.context.plan, max((one.context.rows for one in self.here), key=lambda rows: len(rows.y)),"
                " lane.context.rng) for lane in self.here",
                "fedavg and mlp and vectorised",
            ),
            Fault(
                "all lanes draw from the first one's stream",
                "[self._streams[k] for k in at.subset.lanes]",
                "[self._streams[0] for _ in at.subset.lanes]",
                "Meta and mlp and vectorised",
            ),
            Fault(
                "a lane's optimiser state is that of the first lane",
                "{member.train.name: mine(member.state) for member in self.members if member.train.keep_state}",
                "{m.train.name: tree.map_tree(lambda x: x[0].clone(), m.state) for m in self.members if m.train.keep_state}",
                "Perfed and vectorised",
            ),
            Fault(
                "the first shard of the common rows is scored by every worker",
                "return map_inputs(lambda values: values.tensor_split(n)[k], x), y.tensor_split(n)[k]",
                "return map_inputs(lambda values: values.tensor_split(n)[0], x), y.tensor_split(n)[0]",
                "fedavg and mlp and processes",
            ),
            Fault(
                "the scores of a client's shards are not added up",
                "sum_scores([found[i][name], score]) if name in found[i] else score",
                "score",
                "fedper and mlp and processes",
            ),
            Fault("a client's state is not stored", "if not diverged:", "if diverged:", "fedper or memory"),
            Fault(
                "workers' replies come in the order in which they end",
                "# type: ignore[arg-type]\n        return sorted(replies, key=lambda reply: reply.slot)",
                "\n        return replies",
                "fedavg and processes",
            ),
            Fault(
                "all uplinks lie in one file",
                'slabs.put(f"up-{reply.slot}"',
                'slabs.put("up"',
                "fedavg and mlp and processes",
            ),
            Fault(
                "the server's state is a view of the last uplinks",
                "self.server = tree.copy_shared(server, uplinks)",
                "self.server = server",
                "keeps",
            ),
            Fault(
                "clients with different models share a score",
                "all(p == q and x is y for",
                "all(p == q for",
                "local and mlp",
            ),
            Fault(
                "running statistics are averaged although they are private",
                'select(weights, self.shared, buffers=self.buffers == "shared")',
                "select(weights, self.shared)",
                "private",
            ),
        ),
    ),
    Area(
        ("tests/contract/test_joining.py", "tests/contract/test_lost_and_late.py"),
        (
            Fault(
                "a newcomer trains what travels",
                "without(method.phases(), blank.weights, method.travelling(blank.weights))",
                "method.phases()",
                "newcomer",
            ),
            Fault(
                "late uplinks count in full",
                "weight if age == 0 else weight / math.sqrt(1 + age)",
                "weight",
                "late",
            ),
            Fault(
                "uplinks with numbers that are not finite are taken in",
                'broken = "" if checked else',
                'broken = "" if True else',
                "bad_uplink or diverge",
            ),
            Fault("a slow device does all of its steps", "int(n_steps // self.slowdown)", "n_steps", "partial or half"),
        ),
    ),
    Area(
        ("tests/unit/test_wire.py", "tests/unit/test_transforms.py", "tests/contract/test_engines.py"),
        (
            Fault(
                "headers are not counted", '{"header": whole - sum(kinds.values())}', "{}", "meter or bytes_reported"
            ),
            Fault(
                "a tensor of another type is accepted",
                "if form != want[path]:",
                "if form[0] != want[path][0]:",
                "unexpected or type",
            ),
            Fault(
                "a tensor that has the right name and the wrong form is accepted",
                "if got == want:",
                "if got.keys() == want.keys():",
                "unexpected or type",
            ),
            Fault(
                "what topk leaves out is lost",
                "{path: leaf - arrived[path] for path, leaf in due.items()}",
                "{path: torch.zeros_like(leaf) for path, leaf in due.items()}",
                "rounds or topk",
            ),
            Fault("int8 rounds down", "steps.round()", "steps.floor()", "int8"),
            Fault(
                "the int8 scale of an empty tensor has another type",
                "leaf.new_zeros((), dtype=torch.float32)",
                "torch.zeros(())",
                "fedproto-prototypes",
            ),
            Fault(
                "noise does not grow with the clip",
                "deviation = self.noise * self.clip",
                "deviation = self.noise",
                "noise",
            ),
            Fault(
                "short differences are stretched to the clip",
                "(self.clip / norm).clamp(max=1.0)",
                "(self.clip / norm)",
                "noise",
            ),
        ),
    ),
    Area(
        ("tests/contract/test_damage.py", "tests/unit/test_lock.py"),
        (
            Fault("hashes of a checkpoint's files are not compared", "elif hash_of(data) != wanted[1]:", "elif False:"),
            Fault(
                "unexpected files of a checkpoint are accepted", "there - manifest", "set() - manifest", "99 or foreign"
            ),
            Fault("edited rows are accepted", "elif found != wanted:", "elif False:", "metric or table or number"),
            Fault(
                "edited settings are accepted",
                "if before == after:\n            continue\n        allowed",
                "if True:\n            continue\n        allowed",
                "batch",
            ),
            Fault("a resumed run takes no lock", "    folder.lock()\n    try:", "    try:", "two_cannot"),
            Fault("a forked process releases the lock", "if os.getpid() != pid:", "if False:", "forked"),
        ),
    ),
    Area(
        ("tests/contract/test_worker_faults.py",),
        (
            Fault(
                "workers outlive a killed experiment",
                "ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)",
                "pass",
                "end_with",
            ),
            Fault("a lost client keeps what it learnt", "self.restore(i, self._before[i])", "pass", "hangs"),
        ),
    ),
    Area(
        ("tests/contract/test_resume.py", "tests/contract/test_lost_and_late.py"),
        (
            Fault(
                "a checkpoint brings back no optimiser states",
                '_restored(template, client, f"client',
                '_restored(template, {**client, "opts": template["opts"]}, f"client',
                "taken_up",
            ),
            Fault(
                "a checkpoint does not hold the costs so far",
                '{"round": experiment.done, **experiment.ledger.state(), **experiment.intake.state()}',
                '{"round": experiment.done, **experiment.intake.state()}',
                "taken_up",
            ),
            Fault(
                "a resumed run repeats a round",
                '_checked_round(experiment, folder, state["round"])',
                '_checked_round(experiment, folder, max(state["round"] - 1, 0))',
                "taken_up",
            ),
            Fault(
                "uplinks under way are not in the checkpoint",
                "{i: late.message for i, late in experiment.intake.flights.items()}",
                "{}",
                "taken_up",
            ),
            Fault(
                "lines of rounds that are done again stay",
                "self.folder.keep_rows(self.done)",
                "self.folder.keep_rows(self.settings.rounds)",
                "again or once",
            ),
        ),
    ),
    Area(
        (
            "tests/unit/data/test_partition.py",
            "tests/unit/data/test_federation.py",
            "tests/contract/test_experiment.py",
        ),
        (
            Fault("test rows are trained on", "train.append(kept)", "train.append(np.sort(rows))"),
            Fault("inputs are divided by the root mean square", "(squares / n - mean.square())", "(squares / n)"),
            Fault(
                "the partition does not depend on the seed",
                'Stream(seed, "partition", scheme)',
                'Stream(0, "partition", scheme)',
            ),
            Fault(
                "half as many test rows as asked for",
                "math.ceil(len(rows) * fraction - 1e-9)",
                "math.ceil(len(rows) * fraction / 2 - 1e-9)",
            ),
            Fault(
                "validation rows are tested on",
                "return self.rows(self.partition.valid[i])",
                "return self.rows(self.partition.test[i])",
            ),
        ),
    ),
    Area(
        (
            "tests/unit/test_metrics.py",
            "tests/unit/test_training.py",
            "tests/unit/report",
            "tests/contract/test_experiment.py",
        ),
        (
            Fault(
                "accuracy is the mean over clients, not over examples",
                "name: number(total.pop(objective.primary.name)),",
                "name: number(float(each.mean()) + 0 * total.pop(objective.primary.name)),",
            ),
            Fault(
                "clients without rows count as 0",
                "each = np.array([objective.value(score) for score in scores if score.n_rows])",
                "each = np.nan_to_num([objective.value(score) for score in scores])",
            ),
            Fault("the mean of the last ten is that of the first ten", "np.mean(series[-10:])", "np.mean(series[:10])"),
            Fault("the best round on test is shown as the final one", '"final": series[-1],', '"final": max(series),'),
            Fault(
                "the report shows the best round of an unfinished run",
                'primary.best(values) if statistic == "best_on_test" else values.iloc[-1]',
                "primary.best(values)",
            ),
            Fault(
                "the largest value is the best, also if lower is better",
                "min(values) if self.is_lower_better else max(values)",
                "max(values)",
            ),
            Fault(
                "a positive difference is a larger value, also if lower is better",
                "primary.sign * primary.scale * differences",
                "primary.scale * differences",
            ),
            Fault(
                "a target is reached from below, also if lower is better",
                "record.primary.sign * (values - target) >= 0",
                "values >= target",
            ),
            Fault(
                "the round is chosen by the largest validation value, also if lower is better",
                "(primary.sign * valid).idxmax()",
                "valid.idxmax()",
            ),
            Fault(
                "a common target is rounded to the side that is harder to reach",
                "decimal.ROUND_CEILING if primary.is_lower_better else decimal.ROUND_FLOOR",
                "decimal.ROUND_FLOOR if primary.is_lower_better else decimal.ROUND_CEILING",
            ),
            Fault(
                "the worst tenth is the smallest, also if lower is better",
                'return ordered if metric.better == "higher" else ordered[::-1]',
                "return ordered",
            ),
            Fault("intervals use the deviation of the population", "points.std(ddof=1)", "points.std()"),
            Fault(
                "rows without a finite logit count as right",
                "(outputs.argmax(1) == labels) & outputs.isfinite().all(1)",
                "(outputs.argmax(1) == labels)",
            ),
            Fault(
                "logs are not weighted by examples",
                "weights=[r.examples for r in having]",
                "weights=[1 for r in having]",
            ),
            Fault(
                "general accuracy is that of a client's own rows",
                'ScoreRequest("general", "common")',
                'ScoreRequest("general", "test")',
                "general",
            ),
        ),
    ),
    Area(
        ("tests/unit/test_privacy.py", "tests/contract/test_private_runs.py"),
        (
            Fault(
                "a private sum is divided by the number of clients that arrived",
                "* noise) / self.expected",
                "* noise) / max(uplinks.n, 1)",
            ),
            Fault(
                "clients are not clipped",
                "kept = 1 / ratios[group].clamp(min=1.0)",
                "kept = torch.ones_like(ratios[group])",
            ),
            Fault("adaptive clipping moves away from the quantile", "-RATE * (within", "RATE * (within"),
            Fault("the noise is for one group only", "self._deviation * math.sqrt(len(bounds))", "self._deviation"),
            Fault("all rounds have the same noise", 'round.rng.child("privacy")', 'Stream(0, "privacy")'),
            Fault(
                "known cohorts are those of the average client",
                "epsilon_known(max(self._turns))",
                "epsilon_known(sum(self._turns) // len(self._turns))",
            ),
        ),
    ),
    Area(
        ("tests/unit/test_combining.py",),
        (
            Fault(
                "Krum adds up the distances to all others",
                "[:, : len(among) - hostile - 2]",
                "[:, : len(among) - 1]",
            ),
            Fault("only the smallest values are trimmed", "[cut : n - cut]", "[cut:]"),
            Fault(
                "the geometric median starts at the mean",
                "a = torch.zeros(len(inner), dtype=inner.dtype)\n    scale",
                "a = torch.full((len(inner),), 1 / (len(inner) - 1), dtype=inner.dtype)\n    scale",
            ),
            Fault(
                "a class with noise instead of examples has a prototype",
                "(weights >= 0.5) & (counts >= 0.5)",
                "weights != 0",
            ),
        ),
    ),
)


def sources(root: Path = ROOT) -> dict[Path, str]:
    """Return the text of every module."""
    return {path: path.read_text(encoding="utf-8") for path in sorted((root / "src").rglob("*.py"))}


def found(fault: Fault, texts: dict[Path, str]) -> list[Path]:
    """Return the modules that contain the text that the fault replaces, once for each occurrence."""
    return [path for path, text in texts.items() for _ in range(text.count(fault.old))]
