"""Transforms of messages: known results, residuals, and errors."""

import pytest
import torch

from fedloom import ConfigError, Downlink, Stream, WireError, tree
from fedloom.config.parsing import from_words
from fedloom.config.settings import make_settings
from fedloom.wire.codec import Codec
from fedloom.wire.messages import Meter, decode, encode
from fedloom.wire.transforms import TRANSFORMS, parse


def part(seed=0, scale=1.0):
    """Return weights with a counter buffer, in an order that differs from that of their names."""
    rng = Stream("part", seed)
    params = {"m.w": scale * rng.normal((7, 5)), "m.b": scale * rng.normal((5,))}
    return {"params": params, "buffers": {"m.running_mean": rng.normal((5,)), "m.seen": torch.tensor(3 + seed)}}


def codec(uplink=(), downlink=()):
    return Codec(parse(uplink, "uplink"), parse(downlink, "downlink"))


def sent_and_back(words, new, old, unsent=None, seed=0):
    """Send an uplink from weights `old` to weights `new`. Return it as sent, as received, and the residual."""
    wire, received = codec(words), {"weights": old}
    unsent = wire.unsent(old) if unsent is None else unsent
    sent, unsent = wire.reply({"weights": new, "n": torch.tensor([2.5])}, received, unsent, Stream("rng", seed))
    data = encode(sent, round=0, client=0, examples=0)
    assert len(data) == sum(Meter().sizes(sent).values())  # the counted size is the size sent
    arrived = wire.opened(tree.merge(sent, decode(data)), received)
    assert tree.equal(arrived, wire.opened(sent, received))
    assert tree.structure(arrived) == tree.structure({"weights": new, "n": torch.tensor([2.5])})
    assert list(arrived["weights"]["params"]) == list(old["params"])
    assert arrived["n"].item() == 2.5
    assert arrived["weights"]["buffers"]["m.seen"] == new["buffers"]["m.seen"]
    return sent["weights"], arrived["weights"], unsent


def gaps(a, b):
    """Return the largest difference of each tensor."""
    return {path: float((x - dict(tree.flatten(b))[path]).abs().max()) for path, x in tree.flatten(a)}


@pytest.mark.parametrize("words", [["int8"], ["topk:1.0", "int8"]])
def test_int8_is_off_by_half_a_step_at_most(words):
    old, new = part(0), part(1)
    sent, arrived, _ = sent_and_back(words, new, old)
    scales = [leaf for path, leaf in tree.flatten(sent) if path.endswith("/scale")]
    codes = [leaf for path, leaf in tree.flatten(sent) if path.endswith("/int8")]
    assert len(scales) == len(codes) == (3 if words == ["int8"] else 1)
    assert all(code.dtype is torch.int8 and code.abs().max() == 127 for code in codes)
    for gap in gaps(arrived, new).values():
        assert gap <= float(max(scales)) / 2 + 1e-6
    assert max(gaps(arrived, new).values()) > float(max(scales)) / 8  # it is coarse


def test_int8_of_zeros_and_of_nothing():
    old = {"params": {"w": torch.ones(3), "none": torch.ones(0, 2)}, "buffers": {}}
    wire = codec(["int8"])
    sent, _ = wire.reply({"weights": old}, {"weights": old}, {}, Stream(0))
    assert tree.equal(wire.opened(sent, {"weights": old}), {"weights": old})


@pytest.mark.parametrize(("name", "bits"), [("fp16", 11), ("bf16", 8)])
def test_halves_are_off_by_half_a_unit_of_the_difference(name, bits):
    old, new = part(0), tree.merge(part(0), {"params": part(1, 0.01)["params"]})
    moved = tree.sub(new["params"], old["params"])
    _, arrived, _ = sent_and_back([name], new, old)
    for path, gap in gaps(arrived["params"], new["params"]).items():
        assert gap <= float(moved[path].abs().max()) * 2.0**-bits + 1e-6


def test_halves_of_a_number_beyond_their_range_are_refused():
    old = {"params": {"w": torch.zeros(1)}, "buffers": {}}
    new = {"params": {"w": torch.tensor([1e6])}, "buffers": {}}
    with pytest.raises(ConfigError, match="'params/w' has a number above 65504"):
        codec(["fp16"]).reply({"weights": new}, {"weights": old}, {}, Stream(0))
    _, arrived, _ = sent_and_back(
        ["bf16"], {**new, "buffers": {"m.seen": torch.tensor(1)}}, {**old, "buffers": {"m.seen": torch.tensor(1)}}
    )
    assert arrived["params"]["w"].item() == pytest.approx(1e6, rel=0.01)


@pytest.mark.parametrize(("fraction", "k"), [(1.0, 45), (0.5, 22), (0.1, 4), (0.001, 1)])
def test_topk_sends_exactly_k_and_they_are_the_largest(fraction, k):
    old, new = part(0), part(1)
    sent, arrived, unsent = sent_and_back([f"topk:{fraction}"], new, old)
    values, places = sent["topk"]["values"], sent["topk"]["indices"]
    assert values.shape == places.shape == (k,)
    assert places.dtype is torch.int32
    assert bool((places.diff() > 0).all())
    left = torch.cat([leaf.flatten() for leaf in tree.leaves(unsent["weights"]["params"])])
    moved = arrived["buffers"]["m.running_mean"] != old["buffers"]["m.running_mean"]
    assert int((left == 0).sum()) == k - int(moved.sum())
    assert values.abs().min() >= left.abs().max()
    assert not unsent["weights"]["buffers"]["m.running_mean"].any()  # buffers are measured again in every local update
    back = tree.add(arrived["params"], unsent["weights"]["params"])
    assert max(gaps(back, new["params"]).values()) < 1e-6


@pytest.mark.parametrize("words", [["topk:0.1"], ["topk:0.05", "int8"], ["topk:0.2", "fp16"]])
def test_over_many_rounds_sent_plus_residual_is_the_total(float64, words):
    total, arrived_total, unsent = tree.zeros_like(part()["params"]), tree.zeros_like(part()["params"]), None
    for number in range(30):
        old, new = part(number), part(number + 100)
        _, arrived, unsent = sent_and_back(words, new, old, unsent)
        total = tree.add(total, tree.sub(new["params"], old["params"]))
        arrived_total = tree.add(arrived_total, tree.sub(arrived["params"], old["params"]))
    assert max(gaps(tree.add(arrived_total, unsent["weights"]["params"]), total).values()) < 1e-10
    assert max(gaps(arrived_total, total).values()) > 0.1


def test_noise_is_clipped_first_and_follows_from_the_stream():
    old, new = part(0), part(1)
    _, clipped, _ = sent_and_back(["gaussian:0.5:0"], new, old)
    floating = [{"params": w["params"], "mean": w["buffers"]["m.running_mean"]} for w in (clipped, old)]
    moved = tree.sub(*floating)
    assert float(tree.dot(moved, moved)) ** 0.5 == pytest.approx(0.5, rel=1e-5)
    _, free, _ = sent_and_back(["gaussian:1e6:0"], new, old)
    assert max(gaps(free["params"], new["params"]).values()) < 1e-6
    big = {"params": {"w": torch.zeros(10_000)}, "buffers": {"m.seen": torch.tensor(0)}}
    noisy = [sent_and_back(["gaussian:2.0:0.3"], big, big, seed=seed)[1]["params"]["w"] for seed in (0, 0, 1)]
    assert float(noisy[0].std()) == pytest.approx(0.6, rel=0.05)
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


def test_downlinks_arrive_coarser_for_all_and_for_each():
    wire = codec(downlink=["int8"])
    down = Downlink(
        {"weights": part(0), "n": torch.tensor([0.1])}, [{"weights": {"params": part(k)["params"]}} for k in (1, 2)]
    )
    arrived = wire.arrived(wire.send(down))
    for slot in (0, 1):
        whole, exact = arrived.to(slot), down.to(slot)
        assert tree.structure(whole) == tree.structure(exact)
        assert tree.equal(whole, wire.received(wire.send(down).to(slot)))
        assert 0 < max(gaps(whole["weights"]["params"], exact["weights"]["params"]).values()) < 0.02
        assert whole["n"] == exact["n"]


@pytest.mark.parametrize("name", ["fp16", "int8"])
@pytest.mark.parametrize("boxed", [False, True])
def test_another_part_is_coded_as_it_is(name, boxed):
    wire, near = codec([f"prototypes/{name}"]), torch.tensor([[0.1, 3.0]])
    uplink = {"prototypes": {"a": {"b": near}} if boxed else near, "counts": torch.tensor([7.0])}
    sent, _ = wire.reply(uplink, {"prototypes": near + 1}, {}, Stream(0))
    assert sent["counts"].dtype is torch.float32
    assert tree.n_bytes({"p": sent["prototypes"]}) in (4, 6)
    arrived = wire.opened(tree.merge(sent, decode(encode(sent))), {"prototypes": near + 1})
    assert tree.structure(arrived) == tree.structure(uplink)
    assert float((tree.leaves(arrived)[0] - near).abs().max()) < 0.02


@pytest.mark.parametrize("words", [["int8"], ["topk:0.5", "int8"], ["fp16"]])
def test_a_variance_never_arrives_negative(words):
    old, new = part(0), part(1)
    old["buffers"]["m.running_var"] = torch.tensor([1.3, 1000.3, 300.0])
    new["buffers"]["m.running_var"] = torch.tensor([1e-4, 0.01, 1.0])
    arrived = sent_and_back(words, new, old)[1]["buffers"]["m.running_var"]
    assert (arrived >= 0).all()
    assert torch.isfinite(arrived).all()


def test_a_wrong_part_is_named():
    with pytest.raises(ConfigError, match="downlink: downlinks have no part 'weights', only prototypes; choose one"):
        codec(downlink=["fp16"]).check_downlink(Downlink({"prototypes": torch.ones(2)}))
    codec(downlink=["fp16"]).check_downlink(Downlink({}))  # nothing is sent
    codec(downlink=["fp16"]).check_downlink(Downlink({"n": torch.ones(1)}, [{"weights": part()}]))
    with pytest.raises(
        ConfigError, match="no part 'weights', only prototypes; choose one of these, as in prototypes/fp16"
    ):
        codec(["fp16"]).reply({"prototypes": torch.ones(2)}, {}, {}, Stream(0))


@pytest.mark.parametrize("places", [[0, 45], [-1, 3], [1, 2, 3]])
def test_places_that_do_not_exist_are_refused(places):
    wire, received = codec(["topk:0.05"]), {"weights": part(0)}
    sent, _ = wire.reply({"weights": part(1)}, received, wire.unsent(part(0)), Stream(0))
    assert sent["weights"]["topk"]["indices"].shape == (2,)
    sent["weights"]["topk"]["indices"] = torch.tensor(places, dtype=torch.int32)
    with pytest.raises(WireError, match="topk: the message must have 2 values, with indices from 0 to 44"):
        wire.opened(sent, received)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("uplink=topk:0", "uplink=topk:0: the FRACTION of topk:FRACTION must be above 0 and at most 1"),
        ("uplink=topk:2", "above 0 and at most 1"),
        ("uplink=topk:nan", "'topk:nan' is not of the form topk:FRACTION, such as topk:0.1"),
        ("uplink=topk", "'topk' is not of the form topk:FRACTION"),
        ("uplink=int9", "unknown transform 'int9' .did you mean 'int8'"),
        ("uplink=int8:4", "'int8:4' is not of the form int8$"),
        ("uplink=int8,topk:0.1", "the order must be gaussian, topk, then one of fp16, bf16, int8; each at most once"),
        ("uplink=fp16,int8", "each at most once"),
        ("uplink=gaussian:0:1", "CLIP must be above 0"),
        ("uplink=control/topk:0.1", "topk works only on differences of weights"),
        ("downlink=topk:0.1", "use uplink=topk:0.1"),
        ("uplink=counts/int8", "'counts/int8': counts cannot be transformed"),
        ("uplink=3", "uplink=3: must be a list"),
        ("uplink=[3]", "must be text"),
    ],
)  # fmt: skip
def test_invalid_input_is_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        make_settings(from_words([word]))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_example_in_the_list_works(name):
    kind = TRANSFORMS[name]
    for way in kind.ways:
        assert make_settings(from_words([f"{way}={kind.example}"])).model_dump()[way] == (kind.example,)
