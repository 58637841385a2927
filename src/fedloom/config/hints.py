"""Remedies for unknown keys and values that users often type: terms of papers and other tools, and keys without their table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from fedloom.errors import did_you_mean, normal, suggest

SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("learningrate", "eta", "locallr", "clientlr"), "method.lr"),
        **dict.fromkeys(("epoch", "epochs", "e", "localepoch", "localsteps", "localiterations"), "method.local_epochs"),
        **dict.fromkeys(("optim", "opt", "localoptimizer", "optimiser"), "method.optimizer"),
        **dict.fromkeys(("wd", "l2"), "method.weight_decay"),
        **dict.fromkeys(("scheduler", "lrscheduler", "lrschedule"), "schedule"),
        **dict.fromkeys(("milestones", "lrsteps"), "schedule.at"),
        **dict.fromkeys(("warmuprounds", "warmupepochs"), "schedule.warmup"),
        **dict.fromkeys(("earlystopping", "earlystop", "earlystoppingpatience"), "stop.patience"),
        **dict.fromkeys(("b", "bs", "batch", "localbatchsize", "localbs"), "batch_size"),
        **dict.fromkeys(("k", "n", "client", "numclients", "nclients", "numusers", "users", "numnodes"), "clients"),
        **dict.fromkeys(("t", "round", "numrounds", "nrounds", "globalrounds", "commrounds", "iterations"), "rounds"),
        **dict.fromkeys(("c", "frac", "fraction", "fractionfit", "joinratio", "samplingrate"), "participation"),
        **dict.fromkeys(("clientsperround", "numsampled", "sampled", "s"), "cohort"),
        **dict.fromkeys(("dataset", "datasets"), "data"),
        **dict.fromkeys(("datadir", "dataroot", "datapath", "root"), "data.path"),
        **dict.fromkeys(("noniid", "iid", "split", "splitter", "scheme"), "partition"),
        **dict.fromkeys(("beta", "concentration", "dirichletalpha", "diralpha"), "partition.alpha"),
        **dict.fromkeys(("arch", "net", "network", "backbone"), "model"),
        **dict.fromkeys(("proxy", "proxymodel", "meme", "mentee"), "common_model"),
        **dict.fromkeys(("algorithm", "algo", "strategy", "methods"), "method"),
        **dict.fromkeys(("gpu", "cuda", "gpuid", "deviceid"), "engine.device"),
        **dict.fromkeys(("jobs", "nproc", "numworkers", "processes"), "engine.workers"),
        **dict.fromkeys(("seeds", "randomseed", "rng"), "seed"),
        **dict.fromkeys(("output", "outputdir", "outdir", "logdir", "savedir", "folder"), "out"),
        **dict.fromkeys(("evalevery", "evalgap", "evalinterval", "testevery"), "eval_every"),
        **dict.fromkeys(("amp", "dtype", "fp16", "half"), "precision"),
        **dict.fromkeys(("compress", "compression", "compressor", "quantize"), "uplink"),
        **dict.fromkeys(("name", "runname"), "label"),
        **dict.fromkeys(("tracker", "wandb", "tensorboard"), "log"),
        **dict.fromkeys(("resume", "quiet", "json", "sign"), "--"),  # options, not keys
    }
)
"""Alternative names of settings, in the form of `fedloom.errors.normal`."""
VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "partition": {
            **dict.fromkeys(("noniid", "dir", "lda", "skewed", "labelskew"), "partition=dirichlet"),
            **dict.fromkeys(("shard", "shards", "sharding", "pat", "classes"), "partition=pathological"),
            **dict.fromkeys(("random", "uniform", "homogeneous"), "partition=iid"),
        },
        "engine": {
            **dict.fromkeys(("gpu", "cuda", "cuda:0"), "engine.device=cuda"),
            **dict.fromkeys(("mp", "multiprocessing", "parallel", "process"), "engine=processes"),
            **dict.fromkeys(("cpu", "serial", "single", "loop"), "engine=sequential"),
            **dict.fromkeys(("vmap", "batched"), "engine=vectorised"),
        },
        "engine.device": dict.fromkeys(("gpu", "0", "true"), "engine.device=cuda"),
        "precision": {
            **dict.fromkeys(("half", "fp16", "float16", "16", "amp", "mixed", "bfloat16"), "precision=bf16"),
            **dict.fromkeys(("single", "float", "float32", "32"), "precision=fp32"),
            **dict.fromkeys(("double", "float64", "64"), "precision=fp64"),
        },
        "schedule": {
            **dict.fromkeys(("cosineannealing", "cos"), "schedule=cosine"),
            **dict.fromkeys(("multistep", "steplr"), "schedule=step"),
            **dict.fromkeys(("none", "fixed"), "schedule=constant"),
        },
        "participation": dict.fromkeys(("all", "full"), "participation=1.0"),
    }
)
"""Remedies for values, by key. The values have the form of `fedloom.errors.normal`."""
DIRICHLET = re.compile(r"(?:dir|dirichlet|lda)\W*(\d*\.?\d+)\W*")


def near_keys(key: str, known: Iterable[str]) -> str:
    """Return the settings that a user may have meant by an unknown key, in the form of `suggest`.

    `known` contains the keys of the table in which the key was looked up.
    """
    table, _, last = key.rpartition(".")
    own = list(known)
    hint = suggest(last, own)
    found = meant(last)
    inside = [name.removeprefix(f"{table}.") for name in found if table and name.startswith(f"{table}.")]
    if inside and inside[0] in own:
        return did_you_mean(inside[:1])
    if found == ["--"]:
        return f" (did you mean the option '--{normal(last)}'?)"
    if (table and "did you mean" in hint) or not found:
        return hint
    return did_you_mean(found)


def meant(word: str) -> list[str]:
    """Return the full names of the settings that are called `word` in their table, in any spelling, or that have `word` as a synonym."""
    plain = normal(word)
    same = [name for name in _all_keys() if plain == normal(name)]
    if same or plain in SYNONYMS:
        return same or [SYNONYMS[plain]]
    return [name for name in _all_keys() if plain == normal(name.rpartition(".")[2])]


def instead(key: str, text: str) -> str:
    """Return the correct form of `key=text`, or "" if the value is not one of the words that users often mistake for values."""
    if key == "partition" and (found := DIRICHLET.fullmatch(text.lower())):
        return f"partition=dirichlet partition.alpha={found[1]}"
    return VALUES.get(key, {}).get(normal(text), "")


def as_number(value: Any) -> str:
    """Return a hint for text such as `50%` or `0,1`, which is not a number, or ""."""
    if isinstance(value, str) and (percent := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*%", value)):
        return f"; write {float(percent[1]) / 100:g}"
    if isinstance(value, str) and re.fullmatch(r"\d{1,9},\d{1,9}", value):
        return f"; write {value.replace(',', '.')}"
    return ""


def _all_keys() -> Iterator[str]:
    """Yield all settings with their tables, and all hyper-parameters of registered methods."""
    from fedloom.config.settings import Section, Settings  # `settings` imports this module

    for name, field in Settings.model_fields.items():
        yield name
        if isinstance(field.default, Section):
            yield from (f"{name}.{key}" for key in type(field.default).model_fields if key != "name")
    yield from _hyper_parameters()


def _hyper_parameters() -> Iterator[str]:
    from fedloom.methods import source_facts
    from fedloom.methods.registry import METHODS

    facts = (source_facts.class_facts(origin) for origin in METHODS.origins.values())
    yield from dict.fromkeys(f"method.{name}" for found in facts for name in found.types)
