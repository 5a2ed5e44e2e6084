"""Training a probe on fixed features: it learns, repeats itself, keeps its randomness to itself, and names bad input."""

import pytest
import torch
import torch.nn.functional as F

from vjepa.probe import AttentiveClassifier, accuracy, fit_probe

CLASSES, TOKENS, WIDTH = 3, 6, 16


def problem(count, seed):
    """One token of each clip, at a random place, holds its class: what a mean over tokens hides, attention finds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    features = 0.5 * torch.randn(count, TOKENS, WIDTH, generator=generator)
    place = torch.randint(TOKENS, (count,), generator=generator)
    features[torch.arange(count), place] += 6 * F.one_hot(labels, WIDTH)
    return features, labels


def fit(features, labels, **changes):
    options = {"num_classes": CLASSES, "num_heads": 2, "epochs": 15, "batch_size": 16, "lr": 1e-2}
    return fit_probe(features, labels, **{**options, **changes})


@pytest.fixture(scope="module")
def fitted():
    return fit(*problem(96, 0))


def test_learns_a_separable_problem_and_generalises(fitted):
    assert fitted.train_accuracy == 1.0
    assert accuracy(fitted.probe, *problem(60, 1)) >= 0.95
    assert len(fitted.losses) == 15
    assert fitted.losses[0] > 0.5
    assert fitted.losses[-1] < 0.05
    assert not fitted.probe.training


def test_labels_that_features_do_not_tell_are_not_predicted():
    generator = torch.Generator().manual_seed(2)
    train, test = (torch.randn(n, TOKENS, WIDTH, generator=generator) for n in (96, 300))
    probe = fit(train, torch.arange(96) % CLASSES, epochs=3).probe
    # chance is 1/3; of 300 guesses one standard deviation is 0.027
    assert accuracy(probe, test, torch.arange(300) % CLASSES) == pytest.approx(1 / CLASSES, abs=0.1)


def test_the_same_seed_gives_the_same_probe_and_another_one_another(fitted):
    torch.manual_seed(77)  # the global generator must not matter
    again, other = fit(*problem(96, 0)), fit(*problem(96, 0), seed=1)
    ours, theirs = fitted.probe.state_dict(), again.probe.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.losses == fitted.losses
    assert other.losses != fitted.losses


def test_the_global_generator_and_the_features_are_left_alone():
    features, labels = problem(12, 0)
    before, copy = torch.random.get_rng_state(), features.clone()
    fit(features, labels, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(features, copy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the generator of a GPU needs a CUDA device")
def test_the_generators_of_gpus_are_left_alone():
    features, labels = problem(12, 0)
    before = torch.cuda.get_rng_state()
    fit(features.cuda(), labels.cuda(), epochs=1)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_progress_is_told_after_each_epoch():
    told = []
    result = fit(*problem(12, 0), epochs=3, on_epoch=lambda epoch, loss: told.append((epoch, loss)))
    assert told == list(enumerate(result.losses, start=1))


def test_options_reach_the_probe():
    features, labels = problem(5, 0)
    probe = fit(features.double(), labels, epochs=1, batch_size=2, depth=2, mlp_ratio=1.5, num_classes=7).probe
    assert probe.linear.out_features == 7
    assert len(probe.pooler.blocks) == 1
    assert probe.pooler.blocks[0].mlp.fc1.out_features == 24
    assert next(probe.parameters()).dtype == torch.float32


def test_weight_decay_pulls_on_matrices_alone():
    """With features of zero no gradient reaches the value matrix, so that only decay moves it, and nothing its bias."""
    features, labels = torch.zeros(6, 2, WIDTH), torch.arange(6) % CLASSES
    still, pulled = (
        fit(features, labels, epochs=4, weight_decay=decay).probe.pooler.cross_attention_block.xattn.kv
        for decay in (0, 0.5)
    )
    assert float(pulled.weight.detach().norm()) < 0.999 * float(still.weight.detach().norm())
    assert torch.equal(pulled.bias[:WIDTH], still.bias[:WIDTH])


def test_accuracy_counts_what_is_right():
    probe = AttentiveClassifier(8, 2, num_classes=CLASSES)
    with torch.no_grad():
        probe.linear.weight.zero_()
        probe.linear.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # always says 1
    features, labels = torch.randn(7, 2, 8), torch.tensor([1, 0, 1, 1, 2, 0, 1])
    assert accuracy(probe, features, labels) == accuracy(probe, features, labels, batch_size=2) == 4 / 7


FEATURES, LABELS = problem(6, 0)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"features": FEATURES[0]}, ValueError, r"features must be floating \[N, L, D\].*got torch.float32 \[6, 16\]"),
        ({"features": FEATURES[:0], "labels": LABELS[:0]}, ValueError, "N at least 1"),
        ({"features": FEATURES.long()}, ValueError, "features must be floating"),
        ({"features": [FEATURES]}, TypeError, "features must be a tensor, got list"),
        ({"features": FEATURES * float("nan")}, ValueError, "features must be finite, got NaN"),
        ({"labels": LABELS[:5]}, ValueError, r"labels must be int64 \[6\] on cpu, got torch.int64 \[5\]"),
        ({"labels": LABELS.float()}, ValueError, r"labels must be int64 \[6\]"),
        ({"labels": LABELS.to("meta")}, ValueError, r"labels must be int64 \[6\] on cpu, got .* on meta"),
        ({"labels": LABELS + 1}, ValueError, r"labels must be within 0\.\.2, got 1\.\.3"),
        ({"labels": LABELS - 1}, ValueError, r"labels must be within 0\.\.2, got -1\.\.1"),
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2, got 1"),
        ({"num_heads": 3}, ValueError, "embed_dim must be a multiple of num_heads=3, got 16"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, ValueError, r"lr must be a finite number above 0, got 0\.0"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must be a finite number of at least 0, got -0\.1"),
        ({"seed": None}, TypeError, "seed must be an int, got None"),
    ],
)
def test_bad_arguments_are_named(change, error, sentence):
    with pytest.raises(error, match=sentence):
        fit(**{"features": FEATURES, "labels": LABELS, **change})


def test_accuracy_refuses_the_same():
    with pytest.raises(ValueError, match=r"labels must be within 0\.\.1, got 0\.\.2"):
        accuracy(AttentiveClassifier(WIDTH, 2, num_classes=2), FEATURES, LABELS)
