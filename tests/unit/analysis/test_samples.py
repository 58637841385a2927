"""Samples from generators, compared with images of known similarity."""

import pytest
import torch

from fedloom import FedRIR, Stream
from fedloom.analysis import samples
from fedloom.analysis.subject import Subject

REAL = Stream("images").uniform((30, 1, 8, 8))


def test_likeness_of_equal_and_of_shifted_images():
    same = samples.likeness(REAL, REAL.clone())
    assert torch.allclose(same.ssim, torch.ones(30))
    assert same.psnr.tolist() == [100.0] * 30
    grey = torch.full((3, 1, 8, 8), 0.5)
    assert torch.allclose(samples.likeness(grey, grey + 0.1).psnr, torch.full((3,), 20.0), atol=1e-4)  # -10 log10 0.1^2


def test_a_copied_training_image_is_found():
    made = torch.cat([REAL[7:8], Stream("others").uniform((5, 1, 8, 8))])
    found = samples.pairs(made, REAL)
    assert torch.equal(found.nearest[0], REAL[7])
    assert found.psnr[0] == 100
    assert found.psnr[1:].max() < 20
    assert samples.deciles_of(found.ssim)["max"] == pytest.approx(1.0)


def test_spread_counts_from_the_least_to_the_greatest():
    found = samples.deciles_of(torch.arange(101.0))
    assert (found["mean"], found["max"], found["n"]) == (50.0, 100.0, 101)
    assert found["deciles"] == pytest.approx([10.0 * k for k in range(11)])


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Train the classifier for a shorter time."""
    monkeypatch.setattr(samples, "CLASSIFIER_STEPS", 150)


@pytest.fixture
def vtc(experiment):
    run = experiment("fedvtc", rounds=2, precision="fp32", width=12, **{"data.rows": 400, "partition": {"name": "iid"}})
    run.run()
    return Subject(run)


def test_fedvtc_generates_every_class_equally_often(vtc):
    made = samples.made_by(vtc, 1)
    assert torch.bincount(made.labels).tolist() == [samples.PER_CLASS] * 10
    assert made.images.shape == (100, 1, 8, 8)
    assert made.sources is None
    again = samples.made_by(vtc, 1)
    assert torch.equal(made.images, again.images)
    assert not torch.equal(made.images, samples.made_by(vtc, 2).images)


def test_fedvtc_before_any_prototype_makes_nothing(experiment):
    assert samples.made_by(Subject(experiment("fedvtc", precision="fp32")), 0) is None


def test_fedrir_reconstructs_its_own_test_images(experiment):
    subject = Subject(experiment("fedrir", precision="fp32"))
    made = samples.made_by(subject, 2)
    x, y = subject.data.test(2)
    assert made.images.shape == made.sources.shape
    assert all(any(torch.equal(source, row) for row in x) for source in made.sources)
    assert int(torch.bincount(made.labels).max()) <= samples.PER_CLASS
    assert set(made.labels.tolist()) == set(y.tolist())
    assert samples.made_by(Subject(experiment(FedRIR(mcsl="off"), precision="fp32")), 2) is None
    assert samples.made_by(Subject(experiment("fedavg", precision="fp32")), 2) is None


def test_the_classifier_knows_real_images(vtc):
    judge = samples.classifier(vtc)
    assert judge.accuracy > 0.8
    x, y = vtc.data.common()
    assert float((judge.predict(x) == y).float().mean()) == pytest.approx(judge.accuracy, abs=1e-6)


def test_findings_compare_as_many_held_out_images(vtc):
    found = samples.measure_generators(vtc, [0, 1])
    made, held_out = found.numbers["made"], found.numbers["held_out"]
    assert made["ssim"]["n"] == held_out["ssim"]["n"] == vtc.data.n_test(0) + vtc.data.n_test(1)
    assert held_out["psnr_db"]["mean"] > made["psnr_db"]["mean"]  # two rounds do not give good images
    judged = found.numbers["classifier"]
    assert judged["accuracy_not_held"] is None  # every client holds every class
    assert judged["accuracy"] == pytest.approx(sum(judged["by_class"]) / 10)
    assert [sheet.client for sheet in found.sheets] == [0, 1]


@pytest.mark.parametrize("normalise", ["half", "standard", "own", "none"])
def test_pictures_undo_the_normalisation(experiment, normalise):
    data = Subject(experiment("fedavg", precision="fp32", **{"data.normalise": normalise})).data
    chosen = data.partition.train[0][:2]
    x, _ = data.rows(chosen)
    stored = data.dataset.images[chosen].float() / 255
    assert torch.allclose(data.pictures(x, 0), stored, atol=1e-5)
    assert float(data.pictures(x * 100, 0).max()) <= 1
