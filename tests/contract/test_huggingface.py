"""Hugging Face models with fedloom's adapters and with those of peft. Run with `pytest -m hf` if transformers and peft are installed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from contract import assert_close, assert_same, left_by
from fedloom import ConfigError, from_arrays
from fedloom.inputs import Field, InputSpec
from fedloom.models import arch, merge_adapters
from fedloom.objectives import Language
from fedloom.rng import Stream
from fedloom.wire.messages import Meter

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("default")]  # warnings of these libraries are theirs
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

V, T, N, Y = 50, 8, 60, 3
N_FULL_HEAD = 16 * Y + Y


def config(dropout=0.0):
    return transformers.BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=T,
        num_labels=Y,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def bert(dropout=0.0):
    torch.manual_seed(3)
    return transformers.BertForSequenceClassification(config(dropout)).eval()


def with_peft():
    lora = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, r=2, target_modules=["query", "value"])
    return peft.get_peft_model(bert(), lora)


def texts(masked=True):
    ids = 1 + (Stream(1).uniform((N, T)).numpy() * (V - 1)).astype(np.int64)
    mask = (np.arange(T)[None, :] <= (np.arange(N) % T)[:, None]).astype(np.int64)
    x = {"input_ids": ids * mask, "attention_mask": mask} if masked else {"input_ids": ids}
    return from_arrays(x, np.arange(N) % Y, name="texts", kind="token", vocabulary=V)


@pytest.fixture
def run(experiment):
    def go(module, method="fedavg", masked=True, **settings):
        chosen = {"model": "own", "data": "texts", "partition": "iid", "clients": 3, **settings}
        return experiment(method, dataset=texts(masked), module=module, **chosen)

    return go


def message(tensors):
    """Return the size of a message with these parameters, in bytes."""
    params = {f"model.{name}": tensor.double() for name, tensor in tensors.items()}
    return sum(Meter().sizes({"weights": {"params": params, "buffers": {}}}).values())


def trainable(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("module", "settings"), [(bert, {}), (bert, {"model.lora": 2}), (with_peft, {})])
def test_every_engine_gives_the_same_numbers(run, module, settings, masked, caplog):
    reference = left_by(run(module(), masked=masked, **settings))
    for engine in ("processes", "vectorised"):
        ended = left_by(run(module(), masked=masked, engine=engine, **settings))
        (assert_close if engine == "vectorised" else assert_same)(ended, reference)
    assert ("one after another" in caplog.text) == masked  # BERT looks at the values of the mask


@pytest.mark.parametrize(("module", "settings"), [(bert, {"model.lora": 2}), (with_peft, {})])
def test_only_adapters_and_head_are_trained_and_sent(run, module, settings):
    done = run(module(), **settings)
    model = done.problem.modules(0)["model"]
    mine = trainable(model)
    if module is with_peft:
        assert sum(p.numel() for p in mine.values()) == 2 * 2 * (16 + 16) + N_FULL_HEAD
    else:
        n_layers = 4 * (16 + 16) + 2 * (16 + 32) + (16 + 16)  # attention, perceptron, pooler
        assert sum(p.numel() for p in mine.values()) == 2 * n_layers + N_FULL_HEAD
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    done.run()
    assert done.ledger.total("uplink") == 2 * 3 * message(mine)
    after = dict(done.personal_model(0).nets.model.named_parameters())
    for name, value in before.items():
        assert torch.equal(value.double(), after[name]) == (name not in mine), name


def test_a_model_with_adapters_starts_as_the_base(run):
    module = bert().double()
    done = run(module, **{"model.lora": 2})
    x = done.data.train(0)[0]
    expected = module(**x).logits
    made = done.problem.modules(0)["model"].double().eval()
    assert torch.equal(made(**x), expected)


def test_a_merged_model_is_a_plain_one_again(run, tmp_path):
    done = run(bert(), **{"model.lora": 2})
    done.run()
    model, x = done.personal_model(1), done.data.test(1)[0]
    expected = model(x)
    parts = merge_adapters(model).nets["model"]
    personal = parts.body
    personal.classifier = parts.head
    personal.save_pretrained(tmp_path / "personal")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "personal", dtype=torch.float64)
    torch.testing.assert_close(again.eval()(**x).logits, expected)


def test_a_base_is_loaded_from_a_saved_model(run, tmp_path):
    bert().save_pretrained(tmp_path)
    file = str(tmp_path / "model.safetensors")

    def net():
        return transformers.BertForSequenceClassification(config())

    with pytest.raises(ConfigError, match="of net is random"):
        run(net, **{"model.lora": 2})
    model = run(net, **{"model.lora": 2, "model.weights": file}).problem.modules(0)["model"]
    layer = model.body.bert.encoder.layer[0].output.dense
    expected = load_file(file)["bert.encoder.layer.0.output.dense.weight"]
    assert torch.equal(layer.weight.to(expected.dtype), expected)


def test_dropout_is_said_to_prevent_lanes(run, caplog):
    run(bert(0.1), engine="vectorised").run()
    assert "clients run one after another, because they cannot be vectorised" in caplog.text


def gpt(tied):
    sizes = {"vocab_size": V, "n_positions": T, "n_embd": 16, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    chosen = transformers.GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)
    return transformers.GPT2LMHeadModel(chosen)


def test_gpt2_needs_untied_weights_and_pefts_adapters():
    spec = InputSpec((Field(name="input_ids", shape=(T,), kind="token", levels=(V,)),))
    task = Language(names=(), vocabulary=V)
    assert arch(gpt(tied=False), spec, task).model().head.weight.shape == (V, 16)
    with pytest.raises(ConfigError, match="tied weights are not supported"):
        arch(gpt(tied=True), spec, task)
    with pytest.raises(ConfigError, match=r"has no nn\.Linear to adapt"):
        arch(gpt(tied=False), spec, task, options={"lora": 2})


def test_a_language_model_learns_next_tokens(experiment):
    ids = np.arange(N * T).reshape(N, T) % 7 + 1
    data = from_arrays({"input_ids": ids}, ids % 7 + 1, name="texts", task="language", kind="token", vocabulary=V)
    module = gpt(tied=False)
    run = experiment(
        dataset=data,
        module=module,
        model="own",
        data="texts",
        clients=2,
        rounds=6,
        **{"partition": "iid", "method.lr": 0.5},
    )
    run.run()
    assert run.rows[-1]["personal_accuracy"] > 0.9


def test_the_pages_examples_run(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "huggingface.md"
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        exec(compile(block, str(page), "exec"), space)
    sent = [space[name].summary["uplink_bytes"] for name in ("run", "adapted", "with_peft")]
    assert sent[0] > 3 * sent[1] > 3 * sent[2] > 0
    assert (tmp_path / "personal" / "model.safetensors").is_file()
