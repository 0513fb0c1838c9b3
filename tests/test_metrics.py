"Metrics against slow loops and scikit-learn, and what they refuse."
import json
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from lnl_bench.data.checks import BadInput
from lnl_bench.engine import metrics as M


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    given, corrected, true = rng.integers(0, 4, (3, 300))
    return given, np.where(rng.random(300) < 0.6, true, corrected), true


def plain(value):
    "Only Python's own types, so that json can write it."
    if isinstance(value, dict): return all(map(plain, value.values()))
    if isinstance(value, list): return all(map(plain, value))
    return type(value) in (int, float, str)


@pytest.mark.parametrize("kind", [list, np.asarray, torch.as_tensor, lambda v: np.asarray(v, np.uint8)])
def test_every_kind_of_array(kind, labels):
    given, corrected, true = (kind(v) for v in labels)
    g, c, t = labels
    assert M.accuracy(corrected, true) == reference.accuracy_score(t, c)
    assert M.confusion(given, corrected, 4) == reference.confusion_matrix(g, c).tolist()
    report = M.label_accuracy(corrected, true, 4)
    assert np.allclose(report["per_class"], reference.recall_score(t, c, average=None))
    results = [report, M.repair_counts(given, corrected, true), M.noise_detection(g * 0.2, g == t)]
    assert all(map(plain, results)) and json.dumps(results)


def test_soft_labels_on_a_graph():
    soft = torch.eye(3)[[0, 1, 2, 2]].requires_grad_()
    assert M.label_accuracy(soft, torch.tensor([0, 1, 2, 0]), 3)["overall"] == 0.75
    assert M.confusion([0, 0, 0, 0], soft, 3)[0] == [1, 1, 2]


def test_repair_counts_by_loop(labels):
    given, corrected, true = labels
    names = ("changed", "repaired", "broken", "moved_wrong", "kept_wrong", "kept_right")
    loop = dict.fromkeys(names, 0)
    for g, c, t in zip(*labels, strict=True):
        if g == c: loop["kept_right" if g == t else "kept_wrong"] += 1
        else:
            loop["changed"] += 1
            loop["repaired" if c == t else "broken" if g == t else "moved_wrong"] += 1
    counts = M.repair_counts(given, corrected, true)
    assert counts == loop and all(counts.values())
    gain = (counts["repaired"] - counts["broken"]) / len(true)
    assert M.accuracy(corrected, true) == pytest.approx(M.accuracy(given, true) + gain)


@pytest.mark.parametrize("levels", [2, 10, 10**9])
def test_noise_detection_against_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    clean = rng.random(400) < 0.6
    p = rng.integers(0, levels, 400) / levels * 0.7 + 0.3 * clean * rng.random(400)
    report = M.noise_detection(torch.tensor(p), torch.tensor(clean), 0.4)
    assert report["auc"] == pytest.approx(reference.roc_auc_score(clean, p), abs=1e-12)
    expected = reference.precision_recall_fscore_support(~clean, p <= 0.4, average="binary")[:3]
    assert [report[k] for k in ("precision", "recall", "f1")] == pytest.approx(list(expected))
    assert report["reason"] == ""


def test_noise_detection_says_why_it_is_undefined():
    clean_only = M.noise_detection([0.9, 0.2], [True, True])
    assert math.isnan(clean_only["auc"]) and math.isnan(clean_only["recall"])
    assert clean_only["precision"] == 0.0 and clean_only["reason"] == "no sample is noisy"
    noisy_only = M.noise_detection([0.9, 0.2], [0, 0])
    assert math.isnan(noisy_only["auc"]) and noisy_only["recall"] == 0.5
    assert noisy_only["reason"] == "no sample is clean"
    unflagged = M.noise_detection([0.9, 0.8], [True, False])
    assert math.isnan(unflagged["precision"]) and unflagged["f1"] == 0.0
    assert unflagged["reason"] == "none is flagged"


def test_threshold_itself_is_flagged(): assert M.noise_detection([0.5, 0.6], [False, True])["recall"] == 1.0


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_by_loop(bins):
    rng = np.random.default_rng(0)
    prob, true = rng.dirichlet([0.3] * 5, 400), rng.integers(0, 5, 400)
    gaps = []
    for m in range(bins):
        inside = [i for i in range(400) if m / bins < prob[i].max() <= (m + 1) / bins]
        if not inside: continue
        right, sure = [prob[i].argmax() == true[i] for i in inside], [prob[i].max() for i in inside]
        gaps.append((len(inside) / 400, abs(np.mean(right) - np.mean(sure))))
    report = M.calibration(prob, true, bins)
    assert report["ece"] == pytest.approx(sum(s * g for s, g in gaps))
    assert report["mce"] == pytest.approx(max(g for _, g in gaps))
    assert sum(b["count"] for b in report["bins"]) == 400 and len(report["bins"]) == bins and plain(report)


def test_calibration_takes_bfloat16():
    prob = torch.softmax(torch.randn(64, 100, generator=torch.Generator().manual_seed(0)), 1).bfloat16()
    assert 0 <= M.calibration(prob, torch.zeros(64, dtype=torch.long))["ece"] <= 1
    one_hot = torch.eye(3)
    assert M.calibration(one_hot, [0, 1, 2])["ece"] == 0.0


def test_summarise_and_selected():
    series = list(np.arange(25) / 100)
    last10 = pytest.approx(sum(series[-10:]) / 10)
    assert M.summarise(series) == dict(best=0.24, best_epoch=24, last=0.24, last10=last10)
    assert M.summarise([0.3])["last10"] == 0.3
    assert M.summarise([0.1, 0.3, 0.3])["best_epoch"] == 1
    assert M.selected([1, 2, 3], torch.tensor([0.0, 9.0, 9.0])) == 2.0


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(3, 2, (2000, 4))
    reports = [M.mean_sd(row) for row in draws]
    assert abs(np.mean([r["low"] <= 3 <= r["high"] for r in reports]) - 0.95) < 0.015
    assert M.mean_sd([5.0, 5.0])["sd"] == 0.0
    single = M.mean_sd([4])
    assert single["mean"] == 4.0 and single["n"] == 1
    assert all(math.isnan(single[k]) for k in ("sd", "low", "high"))


@pytest.mark.parametrize("call", [
    lambda: M.accuracy([0, 1], [0, 1, 2]), lambda: M.accuracy([], []), lambda: M.accuracy([0.5], [0]),
    lambda: M.accuracy([0, -1], [0, 1]), lambda: M.accuracy(["a"], ["a"]), lambda: M.accuracy(1, 1),
    lambda: M.accuracy([[[1]]], [0]), lambda: M.label_accuracy([0, 5], [0, 1], 3),
    lambda: M.label_accuracy([0, 1], [0, 5], 3), lambda: M.label_accuracy([[math.nan, 1.0]], [0], 2),
    lambda: M.noise_detection([0.5], [True, False]),
    lambda: M.noise_detection([math.nan], [True]), lambda: M.noise_detection([0.5], [2]),
    lambda: M.calibration([[0.5, 0.2]], [0]), lambda: M.calibration([[3.0, -2.0]], [0]),
    lambda: M.calibration([0.5], [0]), lambda: M.calibration([[0.5, 0.5]], [2]),
    lambda: M.calibration([[0.5, 0.5]], [0], bins=0),
    lambda: M.confusion([0, 3], [0, 1], 3), lambda: M.repair_counts([0], [0, 1], [0, 1]),
    lambda: M.summarise([]), lambda: M.summarise([0.1, math.nan]),
    lambda: M.selected([1.0], [1.0, 2.0]), lambda: M.mean_sd([]),
    lambda: M.mean_sd([[1.0]])])
def test_refused(call):
    with pytest.raises(BadInput, match="accepted"): call()
