"""One contract for all registered methods: it trains, repeats and resumes to the bit, exports every label."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import tasks
import torch

from lnl_bench.engine.contract import REGISTRY
from lnl_bench.engine.runs import Run
from lnl_bench.engine.train import Stopped, load_checkpoint, train
from lnl_bench.methods.catalogue import configured

METHODS = sorted(REGISTRY)
CLASSIFIERS = [name for name in METHODS if REGISTRY[name].family != "representation"]


def each(names):
    "A parameter for each method; its tests run in one process, which trains it once for all of them."
    return pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in names])


@pytest.fixture(scope="module")
def task(): return tasks.digits_task(n=400, trusted=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("contract")


def fit(name, task, folder, where, **options):
    options = {"preset": "smoke", "progress": "off", "cache_dir": folder / "cache", **options}
    return train(configured(name, task, "smoke"), task, run_dir=folder / where, **options)


@pytest.fixture(scope="module")
def finished(task, folder):
    runs = {}

    def get(name):
        if name not in runs: runs[name] = fit(name, task, folder, f"{name}-first")
        return runs[name]

    return get


@pytest.fixture(scope="module")
def batches(task, folder, finished):
    "How often a run of a method looks for requests, with the features that an earlier run left in the cache."
    counts = {}

    def get(name):
        if name not in counts:
            polls = []
            finished(name)
            fit(name, task, folder, f"{name}-count", poll=lambda: polls.append(0))
            counts[name] = len(polls)
        return counts[name]

    return get


def content(run: Run):
    "What must be equal in equal runs: metrics, labels, and every tensor of the final state."
    labels = run.path / "labels.csv"
    return (run.path / "metrics.jsonl").read_bytes(), labels.read_bytes() if labels.exists() else b""


def assert_same_tensors(a, b, path="state"):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a: assert_same_tensors(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)): assert_same_tensors(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor): assert torch.equal(a, b), path
    else: assert a == b or (a != a and b != b), path


@each(METHODS)
def test_trains_with_finite_numbers(name, finished):
    run = finished(name)
    assert run.finished and run.status()["state"] == "finished"
    rows = run.metrics.read()[0]
    assert rows, "no epoch was recorded"
    for row in rows:
        for key, value in row.items():
            assert isinstance(value, (str, int)) or math.isfinite(value), (key, value)
    def refuse(constant): pytest.fail(f"result.json holds {constant}")
    json.loads((run.path / "result.json").read_text(), parse_constant=refuse)


@each(METHODS)
def test_same_seed_same_bits(name, finished, task, folder):
    again = fit(name, task, folder, f"{name}-again", cache_dir=folder / "cache-again")
    assert content(again) == content(finished(name))
    assert_same_tensors(load_checkpoint(again)["stage"], load_checkpoint(finished(name))["stage"])


# The probe draws no random number.
@each([n for n in METHODS if n != "linear-probe"])
def test_other_seed_other_bits(name, finished, task, folder):
    assert content(fit(name, task, folder, f"{name}-seed1", seed=1)) != content(finished(name))


@each(METHODS)
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_stopped_and_resumed_equals_uninterrupted(name, part, finished, batches, task, folder):
    whole, stop_at, seen = finished(name), max(1, int(part * batches(name))), []

    def stop():
        seen.append(0)
        if len(seen) == stop_at: raise Stopped

    where = f"{name}-stopped-{part}"
    assert not fit(name, task, folder, where, poll=stop).finished
    run = fit(name, task, folder, where)
    assert run.finished and content(run) == content(whole)
    assert_same_tensors(load_checkpoint(run)["stage"], load_checkpoint(whole)["stage"])


@pytest.fixture(autouse=True)
def poll_at_every_batch(monkeypatch):
    "The trainer looks for requests at most every 0.2 s; here before every batch: a stop may fall anywhere."
    import lnl_bench.engine.train as t

    class Clock:
        now = 0.0
        def monotonic(self):
            Clock.now += 1.0
            return Clock.now
        def __getattr__(self, name): return getattr(real, name)

    real = t.time
    monkeypatch.setattr(t, "time", Clock())


@each(CLASSIFIERS)
def test_exports_a_label_for_every_training_sample(name, finished, task):
    table = pd.read_csv(finished(name).path / "labels.csv", dtype={"id": str, "given": str, "corrected": str})
    assert list(table.columns) == ["index", "id", "given", "corrected", "confidence", "p_clean"]
    assert table["index"].tolist() == task.train_index.tolist()
    assert table["given"].tolist() == [task.class_names[c] for c in task.given.tolist()]
    assert set(table["corrected"]) <= set(task.class_names)
    assert table[["confidence", "p_clean"]].stack().between(0, 1 + 1e-6).all()


@each(CLASSIFIERS)
def test_bfloat16_stays_near(name, finished, task, folder):
    half = fit(name, task, folder, f"{name}-bf16", precision="bfloat16", cache_dir=folder / "cache-bf16")
    for key in ("best", "label_accuracy_after"):
        a, b = half.result[key], finished(name).result[key]
        if a is not None: assert abs(a - b) < 0.15, (key, a, b)


def test_compiled_stays_near(finished, task, folder):
    compiled = fit("cross-entropy", task, folder, "ce-compiled", compile="on")
    a, b = compiled.series("loss"), finished("cross-entropy").series("loss")
    np.testing.assert_allclose(a, b, rtol=1e-3)
    assert compiled.result["passes"] == finished("cross-entropy").result["passes"]


@each(METHODS)
def test_a_method_that_needs_trusted_samples_says_so(name):
    bare = tasks.digits_task(n=200)
    method = configured(name, bare, "smoke")
    if "trusted set" in REGISTRY[name].needs:
        with pytest.raises(ValueError, match="needs a trusted set"): method.check(bare)
    else: method.check(bare)


def test_methods_cannot_reach_the_truth(task):
    from lnl_bench.engine.lab import Lab
    lab = Lab(task)
    truth = task._truth[task.train_index]
    assert not torch.equal(lab.labels, truth)
    for holder in (lab, lab.task):
        for name in dir(holder):
            if name.startswith("__"): continue
            value = getattr(holder, name)
            if isinstance(value, torch.Tensor) and value.shape in (truth.shape, task._truth.shape):
                assert not torch.equal(value.cpu(), truth) and not torch.equal(value.cpu(), task._truth), name
