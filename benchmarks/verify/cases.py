"""The methods that are compared with PFLlib, with their settings in both tools."""

from __future__ import annotations

import switches as s
import torch
from weights import (
    CLIENTS,
    LR,
    ROUNDS,
    TRAIN,
    VALID,
    Case,
    our_clients,
    our_server,
    parameters,
    start_clients,
    their_clients,
    their_server,
)

SERVER = (our_server(), their_server())
CLIENT = (our_clients(), their_clients())
BODY = (our_server("model:body"), their_server())
HEADS = (our_clients("model:head"), their_clients("model.head"))

CASES: dict[str, Case] = {
    "fedavg": Case(server="serveravg:FedAvg", split=False, parts={"server": SERVER}),
    "local": Case(server="serverlocal:Local", split=False, parts={"clients": CLIENT}),
    "fedprox": Case(
        server="serverprox:FedProx", ours={"mu": 0.5}, theirs={"mu": 0.5}, split=False, parts={"server": SERVER}
    ),
    "scaffold": Case(server="serverscaffold:SCAFFOLD", split=False, parts={"server": SERVER}),
    "fedper": Case(server="serverper:FedPer", parts={"body": BODY, "heads": HEADS}),
    "fedrep": Case(
        server="serverrep:FedRep",
        ours={"head_epochs": 2},
        theirs={"plocal_epochs": 2},
        parts={"body": BODY, "heads": HEADS},
    ),
    "ditto": Case(
        server="serverditto:Ditto",
        ours={"mu": 0.5, "personal_epochs": 2},
        theirs={"mu": 0.5, "plocal_epochs": 2},
        split=False,
        parts={"server": SERVER, "personal": (our_clients("personal"), their_clients("model_per"))},
    ),
    "fedbabu": Case(
        server="serverbabu:FedBABU",
        theirs={"fine_tuning_epochs": 0},
        parts={"body": BODY},
    ),
    "moon": Case(
        server="servermoon:MOON",
        ours={"mu": 1.0, "temperature": 0.5},
        theirs={"mu": 1.0, "tau": 0.5},
        parts={"server": SERVER},
    ),
    "fedproto": Case(
        server="serverproto:FedProto",
        ours={"local_epochs": 1, "prototype_mean": "uniform"},
        theirs={"local_epochs": 1, "lamda": 1.0},
        parts={"clients": CLIENT},
        switch=s.prototypes_after_training,
        cause="PFLlib averages features during training (clientproto.py, train); the paper and fedloom, with the trained model",
    ),
    "fedrod": Case(
        server="serverrod:FedROD",
        starts=lambda run, server: start_clients(run, server, "own", "head"),
        parts={"server": SERVER, "personal heads": (our_clients("own"), their_clients("head"))},
    ),
    "fedala": Case(
        server="serverala:FedALA",
        ours={"first_epochs": 11},  # PFLlib stops when the losses of ten epochs are close, here after eleven
        theirs={"rand_percent": 100, "layer_idx": 2, "eta": 1.0},
        split=False,
        parts={"server": SERVER, "clients": CLIENT},
    ),
    "feddbe": Case(
        server="serverdbe:FedDBE",
        ours={"kappa": 1.0, "mean_momentum": 1.0},
        theirs={"kl_weight": 1.0, "momentum": 1.0},
        rounds=ROUNDS + 1,  # our first round is PFLlib's initialization period
        parts={"server": SERVER},
    ),
    "lg_fedavg": Case(
        server="serverlg:LG_FedAvg",
        parts={
            "head": (our_server("model:head"), their_server()),
            "bodies": (our_clients("model:body"), their_clients("model.base")),
        },
    ),
    "pfedme": Case(
        server="serverpFedMe:pFedMe",
        ours={"mu": 1.0, "personal_lr": 0.05, "inner_steps": 3, "local_steps": 0, "weight_decay": 0.001},
        theirs={"lamda": 1.0, "p_learning_rate": 0.05, "K": 3, "beta": 1.0},
        split=False,
        parts={"server": SERVER},
    ),
    "fedpac": Case(
        server="serverpac:FedPAC",
        ours={"prototype_mean": "uniform", "head_lr": LR, "momentum": 0.0, "weight_decay": 0.0},
        theirs={"lamda": 1.0},
        parts={"body": BODY},
        switch=s.heads_as_sent,
        cause="PFLlib overwrites each client's head before it combines the next one's, draws the order of the heads anew, so that the "
        "statistics are those of other clients (serverpac.py, receive_models), and sets weights below 0.001 to 0 (solve_quadratic)",
    ),
    "fedamp": Case(
        server="serveramp:FedAMP",
        ours={"mu": 1.0, "alpha": 0.2, "sigma": 1.0},
        theirs={"lamda": 1.0, "alphaK": 0.2, "sigma": 1.0},
        split=False,
        switch=s.squared_pull,
        parts={"clients": CLIENT},
        cause="PFLlib computes the pull from `.data`, so it has no gradient, and from a distance that is not squared (clientamp.py, train)",
    ),
    "fedfomo": Case(
        server="serverfomo:FedFomo",
        ours={"candidates": CLIENTS - 1, "epsilon": 0.0},
        theirs={"M": CLIENTS, "batch_size": TRAIN - VALID},
        split=False,
        valid=True,
        switch=s.current_models,
        parts={"clients": CLIENT},
        cause="PFLlib compares candidates with the client's model before its last training (clientfomo.py, train)",
    ),
    "fedas": Case(
        server="serveras:FedAS",
        ours={"fisher_batch": 1000},
        switch=s.align_on_all_examples,
        parts={"body": (our_server("model:body"), their_server("base")), "heads": HEADS},
        cause="PFLlib aligns on batches of 16 without the last examples, and already in the first round (clientas.py, set_parameters)",
    ),
    "apfl": Case(
        server="serverapfl:APFL",
        ours={"alpha": 0.5},
        theirs={"alpha": 0.5},
        split=False,
        parts={"server": SERVER, "personal": (our_clients("personal"), their_clients("model_per"))},
        cause="PFLlib trains the personal model on its own gradient and mixes it after each local update (clientapfl.py, train)",
    ),
    "fml": Case(
        server="serverfml:FML",
        ours={"alpha": 0.5, "beta": 0.5},
        theirs={"alpha": 0.5, "beta": 0.5},
        split=False,
        starts=lambda run, server: start_clients(run, server, "personal", "model"),
        switch=s.constant_teachers,
        parts={"server": SERVER, "personal": (our_clients("personal"), their_clients())},
        cause="PFLlib also divides the KL divergence by the number of classes, and lets gradients flow through the teachers "
        "(clientfml.py, train)",
    ),
    "fedgh": Case(
        server="servergh:FedGH",
        ours={"server_lr": 0.1, "server_batch": 1000},
        theirs={"server_learning_rate": 0.1},
        switch=s.separate_head,
        cause="In PFLlib, the server's head and client 0's head are one module, which client 0 trains, too (servergh.py, __init__)",
        parts={
            "head": (our_server("model:head"), s.their_head),
            "bodies": (our_clients("model:body"), their_clients("model.base")),
        },
    ),
    "fedcp": Case(
        server="servercp:FedCP",
        ours={"mmd_weight": 1.0},
        theirs={"lamda": 1.0},
        starts=s.policies_and_contexts,
        switch=s.softmax_policy,
        parts={
            "body": (our_server("model:body"), lambda server: [parameters(server.global_modules)]),
            "common head": (our_server("common"), lambda server: [parameters(server.head)]),
            "policy": (our_server("policy"), lambda server: [parameters(server.cs)]),
            "heads": (our_clients("model:head"), their_clients("model.model.head")),
        },
        cause="PFLlib adds Gumbel noise to the policy (servercp.py, ConditionalSelection) and starts from a random context",
    ),
    "gpfl": Case(
        server="servergpfl:GPFL",
        ours={"magnitude": 0.1, "embedding_decay": 0.1},
        theirs={"lamda": 0.1, "mu": 0.1},
        starts=s.embeddings_and_layers,
        switch=s.contexts_of_received_embeddings,
        parts={
            "body": BODY,
            "embeddings": (our_server("classes"), lambda server: [parameters(server.GCE)]),
            "heads": (our_clients("model:head"), their_clients("model.head")),
        },
        cause="PFLlib computes contexts from the client's own embeddings, and 0 in the first round (clientgpfl.py, set_GCE). "
        "Its distance is the norm of the whole batch (train)",
    ),
    "feddyn": Case(
        server="serverdyn:FedDyn",
        ours={"alpha": 0.1},
        theirs={"alpha": 0.1},
        split=False,
        switch=s.squared_regularisation,
        parts={"server": (s.our_start_of_feddyn, their_server())},
        cause="PFLlib's distance is not squared (clientdyn.py, train)",
    ),
    "fedntd": Case(
        server="serverntd:FedNTD",
        ours={"beta": 1.0, "temperature": 2.0},
        theirs={"beta": 1.0, "tau": 2.0},
        split=False,
        parts={"server": SERVER},
    ),
    "fedlc": Case(
        server="serverlc:FedLC",
        switch=s.own_calibration,
        parts={"server": SERVER},
        cause="PFLlib computes the margins from the numbers of examples of all clients together (serverlc.py, __init__)",
    ),
    "fedcross": Case(
        server="servercross:FedCross",
        ours={"alpha": 0.9, "momentum": 0.0},
        theirs={"fedcross_alpha": 0.9},
        split=False,
        switch=s.similarity_of_whole_models,
        parts={"server": SERVER},
        cause="PFLlib adds the cosines of pairs of tensors (servercross.py, calculate_similarity), and sends the models in a random order",
    ),
    "fedkd": Case(
        server="serverkd:FedKD",
        ours={"energy_start": 1.0, "energy_end": 1.0},
        theirs={"mentee_learning_rate": LR},
        starts=s.mentors_and_maps,
        switch=s.constant_teachers_of_fedkd,
        parts={
            "mentee": (our_server(), lambda server: [[torch.from_numpy(p) for p in server.global_model.values()]]),
            "mentors": (our_clients("personal"), their_clients()),
        },
        cause="PFLlib lets gradients flow through the teachers and the divisor and divides the KL divergence by the number of classes "
        "(clientkd.py, train); it compresses weights, not their changes, and a matrix that needs all singular values becomes 0 "
        "(decomposition), so the compression is off here",
    ),
    "fedbn": Case(
        server="serverbn:FedBN",
        split=False,
        norm=True,
        parts={
            "server": (
                our_server(),
                lambda server: [[*parameters(server.global_model.linear), *parameters(server.global_model.fc)]],
            ),
            "norms": (our_clients(), their_clients("model.bn")),
        },
    ),
    "per_fedavg": Case(
        server="serverperavg:PerAvg",
        ours={"inner_lr": LR},
        theirs={"batch_size": TRAIN // 2},
        split=False,
        watch=s.batches_of_per_fedavg,
        switch=s.our_halves_once,
        parts={"server": SERVER},
        cause="PFLlib trains every client twice in a round (serverperavg.py, train)",
    ),
}
