"""ECE, its interval, entropy and NLL against numpy by hand; the temperature of logits of known scale."""

import math

import numpy as np
import pytest
import torch
from questpress.pipeline.errors import JobError
from questpress.pipeline.evaluation import calibration
from questpress.pipeline.evaluation.calibration import HIGHEST, LOWEST, Likelihood, Sigmoid, Softmax, bin_of
from questpress.pipeline.runs.scores import Calibration, Temperature


def likelihood_of(labels: np.ndarray) -> Likelihood:
    return Softmax() if labels.ndim == 1 else Sigmoid()


def measure(logits: np.ndarray, labels: np.ndarray, temperature: float | None = None) -> Calibration | None:
    return calibration.measure(logits, labels, likelihood_of(labels), temperature)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> Temperature:
    return calibration.fit_temperature(logits, labels, likelihood_of(labels))


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def calibrated(n: int, classes: int = 5, scale: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [n,classes], and labels drawn with their probabilities."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((n, classes))
    draws = rng.random((n, 1))
    labels = (softmax(logits).cumsum(1) < draws).sum(1).clip(max=classes - 1)
    return logits.astype(np.float32), labels


def calibrated_multi_label(n: int, classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((n, classes)) - 1
    shown = rng.random((n, classes)) < 1 / (1 + np.exp(-logits))
    return logits.astype(np.float32), shown.astype(np.float32)


def ece_by_hand(confidence: np.ndarray, correct: np.ndarray) -> float:
    total = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if i == 0:
            inside |= confidence == 0
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def test_ece_entropy_and_nll_are_those_computed_by_hand():
    logits, labels = calibrated(400)
    p = softmax(logits.astype(np.float64))
    measured = measure(logits, labels)
    assert measured is not None and measured.n == 400
    correct = (p.argmax(1) == labels).astype(float)
    assert measured.ece == pytest.approx(100 * ece_by_hand(p.max(1), correct), abs=1e-9)
    assert measured.entropy == pytest.approx(float(-(p * np.log(p)).sum(1).mean()))
    assert measured.nll == pytest.approx(float(-np.log(p[np.arange(400), labels]).mean()))
    assert measured.confidence == pytest.approx(100 * p.max(1).mean())
    assert measured.accuracy == pytest.approx(100 * correct.mean())
    assert measured.before is None and measured.temperature is None


def test_ece_is_torchmetrics_multiclass_calibration_error():
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = calibrated(500, classes=7)
    measured = measure(logits, labels)
    theirs = multiclass_calibration_error(
        torch.from_numpy(logits).softmax(1), torch.from_numpy(labels), num_classes=7, n_bins=15, norm="l1"
    )
    assert measured is not None and measured.ece == pytest.approx(100 * float(theirs), abs=1e-4)


def test_confidence_on_an_edge_is_in_the_lower_bin():
    edges = torch.linspace(0, 1, 16, dtype=torch.float64).numpy()
    assert bin_of(edges).tolist() == [0, *range(15)]
    assert bin_of(np.nextafter(edges[:-1], 1)).tolist() == list(range(15))


def test_probabilities_of_exactly_1_and_0_have_their_bins():
    logits = np.array([[200.0, 0.0], [0.0, 200.0], [200.0, 0.0]], dtype=np.float32)
    measured = measure(logits, np.array([0, 1, 1]))
    assert measured is not None
    assert [part.n for part in measured.bins] == [0] * 14 + [3]
    assert measured.bins[-1].confidence == 100 and measured.bins[0].confidence is None
    assert measured.ece == pytest.approx(100 / 3) and measured.nll == pytest.approx(200 / 3)
    zeros = measure(np.full((4, 2), -800.0, dtype=np.float32), np.array([[0, 0]] * 3 + [[0, 1]]))
    assert zeros is not None and zeros.bins[0].n == 8 and zeros.ece == pytest.approx(100 / 8)


def test_ece_is_the_sum_over_bins():
    for logits, labels in (calibrated(300), calibrated_multi_label(200)):
        measured = measure(logits, labels)
        assert measured is not None
        n = sum(part.n for part in measured.bins)
        assert n == measured.n * (logits.shape[1] if labels.ndim == 2 else 1)
        gaps = [part.n / n * abs(part.accuracy - part.confidence) for part in measured.bins if part.n]
        assert measured.ece == pytest.approx(sum(gaps), abs=1e-9)
        for i, part in enumerate(measured.bins):
            assert (part.low, part.high) == pytest.approx((100 * i / 15, 100 * (i + 1) / 15))
            assert part.n == 0 or part.low <= part.confidence <= part.high + 1e-9


def test_multi_label_calibration_counts_each_class():
    from torchmetrics.functional.classification import binary_calibration_error

    logits, shown = calibrated_multi_label(300)
    shown = shown.astype(np.float64)
    measured = measure(logits, shown)
    assert measured is not None and measured.n == 300
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert measured.ece == pytest.approx(100 * ece_by_hand(p.ravel(), shown.ravel()), abs=1e-9)
    theirs = binary_calibration_error(torch.from_numpy(p), torch.from_numpy(shown).long(), n_bins=15)
    assert measured.ece == pytest.approx(100 * float(theirs), abs=1e-9)
    assert measured.nll == pytest.approx(-(shown * np.log(p) + (1 - shown) * np.log(1 - p)).mean(), rel=1e-6)
    assert measured.entropy == pytest.approx(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean(), rel=1e-6)


def test_interval_of_a_calibrated_network_reaches_0():
    logits, labels = calibrated(1000)
    fair, bold = measure(logits, labels), measure(2.5 * logits, labels)
    assert fair is not None and bold is not None
    assert fair.ece_low == 0 and fair.ece <= fair.ece_high < 2 * fair.ece + 1
    assert fair.gap_low < 0 < fair.gap_high
    assert 5 < bold.ece_low < bold.ece < bold.ece_high
    assert bold.gap_low > 5


def test_interval_narrows_with_the_images_and_is_the_same_every_time():
    few, many = (measure(2.5 * logits, labels) for logits, labels in (calibrated(200), calibrated(5000)))
    assert few is not None and many is not None
    assert many.ece_high - many.ece_low < 0.4 * (few.ece_high - few.ece_low)
    assert measure(2.5 * calibrated(200)[0], calibrated(200)[1]) == few


def test_interval_covers_the_true_ece():
    sharp = 2.0
    logits, labels = calibrated(100_000, seed=99)
    true = measure(sharp * logits, labels)
    assert true is not None
    held = 0
    for seed in range(20):
        logits, labels = calibrated(500, seed=seed)
        measured = measure(sharp * logits, labels)
        assert measured is not None
        held += measured.ece_low <= true.ece <= measured.ece_high
    assert held >= 17


def test_single_image_and_non_finite_logits_are_handled():
    single = measure(np.array([[3.0, 1.0]], dtype=np.float32), np.array([0]))
    assert single is not None and single.n == 1 and single.ece_low <= single.ece <= single.ece_high
    assert measure(np.array([[np.nan, 1.0]], dtype=np.float32), np.array([0])) is None


def test_before_is_the_same_without_the_temperature():
    logits, labels = calibrated(300)
    measured = measure(logits / np.float32(2), labels, temperature=2.0)
    plain = measure(logits, labels)
    assert measured is not None and measured.before is not None and plain is not None
    assert measured.temperature == 2 and measured.before.temperature is None
    assert measured.before.ece == pytest.approx(plain.ece, abs=1e-6)
    assert measured.accuracy == plain.accuracy


def test_teachers_are_averaged_by_probability():
    a, b = calibrated(50, seed=1)[0], calibrated(50, seed=2)[0]
    assert np.allclose(
        softmax(Softmax().ensemble([a, b])), (softmax(a.astype(float)) + softmax(b.astype(float))) / 2
    )
    a, b = calibrated_multi_label(50, seed=1)[0], calibrated_multi_label(50, seed=2)[0]
    p, q, mean = (1 / (1 + np.exp(-x.astype(float))) for x in (a, b, Sigmoid().ensemble([a, b])))
    assert np.allclose(mean, (p + q) / 2)
    assert Softmax().ensemble([a]) is a


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("kind", [calibrated, calibrated_multi_label])
def test_temperature_recovers_a_known_scale(kind, factor):
    logits, labels = kind(20_000)
    fit = fit_temperature((factor * logits).astype(np.float32), labels)
    assert fit.value == pytest.approx(factor, rel=0.03)
    assert fit.low is not None and fit.high is not None
    assert fit.low < fit.value < fit.high and 0.9 * factor < fit.low and fit.high < 1.1 * factor
    assert fit.note is None and fit.n == 20_000
    assert fit.nll_after <= fit.nll_before


def test_fitted_temperature_has_the_least_nll_of_all():
    for logits, labels in (calibrated(150, seed=3), calibrated_multi_label(150, seed=3)):
        logits = 3 * logits
        fit = fit_temperature(logits, labels)

        def nll(t: float, logits: np.ndarray = logits, labels: np.ndarray = labels) -> float:
            measured = measure(logits / np.float64(t), labels)
            assert measured is not None
            return measured.nll

        assert fit.nll_before == pytest.approx(nll(1)) and fit.nll_after == pytest.approx(nll(fit.value))
        assert fit.nll_after < min(nll(fit.value * 1.01), nll(fit.value / 1.01))


def test_temperature_interval_covers_the_true_value():
    held = 0
    for seed in range(60):
        logits, labels = calibrated(300, seed=seed)
        fit = fit_temperature(2 * logits, labels)
        assert fit.low is not None and fit.high is not None
        held += fit.low <= 2 <= fit.high
    assert held >= 52


def test_logits_are_processed_in_chunks(monkeypatch):
    logits, labels = calibrated(500)
    whole = fit_temperature(2 * logits, labels)
    monkeypatch.setattr("questpress.pipeline.evaluation.calibration.CHUNK", 64)
    parts = fit_temperature(2 * logits, labels)
    assert parts.value == pytest.approx(whole.value, rel=1e-9)
    assert parts.high == pytest.approx(whole.high, rel=1e-9)


def test_temperature_is_clipped_and_reported():
    logits, _ = calibrated(100)
    all_correct = fit_temperature(logits, logits.argmax(1))
    assert all_correct.value == pytest.approx(LOWEST) and all_correct.note is not None
    assert f"{LOWEST:g}" in all_correct.note and all_correct.low is None
    contrary = fit_temperature(logits, logits.argmin(1))
    assert contrary.value == pytest.approx(HIGHEST) and f"{HIGHEST:g}" in str(contrary.note)


def test_logits_that_are_all_alike_keep_temperature_1():
    fit = fit_temperature(np.full((9, 4), 3.0, dtype=np.float32), np.arange(9) % 4)
    assert fit.value == 1 and fit.note is not None and fit.nll_after == pytest.approx(math.log(4))
    assert fit_temperature(np.zeros((9, 4), dtype=np.float32), np.ones((9, 4))).value == 1


def test_temperature_needs_finite_logits():
    with pytest.raises(JobError, match="val"):
        fit_temperature(np.empty((0, 3), dtype=np.float32), np.empty(0, dtype=np.int64))
    with pytest.raises(JobError, match="finite"):
        fit_temperature(np.array([[np.inf, 0.0]], dtype=np.float32), np.array([0]))
