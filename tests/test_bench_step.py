"""The bench of steps: its counts against formulas of their own, and its clock against time that is known."""

import dataclasses
import math
import time

import pytest
import torch
from typer.testing import CliRunner

from lnl_bench.cli import app
from lnl_bench.data.checks import BadInput
from lnl_bench.engine.contract import REGISTRY, Method, register
from lnl_bench.engine.lab import Lab
from lnl_bench.engine.train import Progress
from lnl_bench.methods.cross_entropy import CrossEntropyConfig, TrainOnLabels
from lnl_bench.methods.divide_mix import CoDivide
from lnl_bench.repro import bench_step
from lnl_bench.repro.bench_step import (
    LIMIT,
    Measured,
    PassClock,
    StepBench,
    measure,
    method_for,
    patterned_task,
    phases_of,
    rows_of,
)

SMALL = StepBench(net="cnn-small", size=8, samples=90, trusted=20, batch=12, device="cpu",
                  precision="float32", threads=1)  # fmt: skip
TRAINED = [n for n in bench_step.chosen("all") if bench_step.plan_of(n)]


@pytest.fixture(scope="module")
def task(): return patterned_task(SMALL.samples, SMALL.trusted, SMALL.size)


@pytest.fixture(autouse=True)
def one_thread():
    with bench_step.on_threads(1): yield


def spent(name, task, folder, config=SMALL):
    return list(Measured(method_for(name, config, task), task, config, folder).all_epochs())


def test_cross_entropy_is_one_pass_each_way(task, tmp_path):
    (only,) = spent("cross-entropy", task, tmp_path)
    assert (only.forward, only.backward, only.steps) == (90, 90, math.ceil(90 / 12))
    assert only.per_image == (1.0, 1.0) and only.uncounted == 0


def test_divide_mix_counts_follow_from_its_split(task, tmp_path, monkeypatch):
    sizes, parts = [], CoDivide.parts

    def spied(self, k):
        labelled, unlabelled = parts(self, k)
        sizes.append((len(labelled), len(unlabelled)))
        return labelled, unlabelled

    monkeypatch.setattr(CoDivide, "parts", spied)
    warm, main = spent("divide-mix", task, tmp_path)
    assert (warm.forward, warm.backward) == (180, 180)
    assert len(sizes) == 2 and all(n and u for n, u in sizes), sizes
    forward, backward = 2 * 90, 0  # both networks look at every image
    for n, u in sizes:
        assert n + u == 90
        drawn = math.ceil(n / 12) * min(12, u)
        forward += 2 * n + 2 * 2 * drawn  # guesses: two views; of unlabelled images by both networks
        forward += 2 * (n + drawn)
        backward += 2 * (n + drawn)
    assert (main.forward, main.backward) == (forward, backward)
    assert main.steps == sum(math.ceil(n / 12) for n, _ in sizes)
    assert main.facts.p == pytest.approx(sum(n for n, _ in sizes) / 180)


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_costs_what_is_expected_or_says_why(name, task, tmp_path):
    method = method_for(name, SMALL, task)
    assert len(phases_of(method)) == sum(s.epochs for s in method.stages())
    for row in spent(name, task, tmp_path):
        text = bench_step.compared(row)
        assert row.cost and "no reason known" not in text, text
        assert 0 < row.passes < row.seconds["whole"] and row.outside > 0


SLEPT = dict.fromkeys(("forward", "backward", "outside"), 0.0)


def sleep(seconds, where):
    "Sleep, and note how long it really was: on a busy machine longer than asked for."
    began = time.perf_counter()
    time.sleep(seconds)
    SLEPT[where] += time.perf_counter() - began


@pytest.fixture(autouse=True)
def awake(): SLEPT.update(dict.fromkeys(SLEPT, 0.0))


class Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        sleep(0.01, "forward")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        sleep(0.02, "backward")
        return gradient


class Sleeper(torch.nn.Module):
    "10 ms forwards, 20 ms backwards."
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x): return Nap.apply(self.linear(x))


def clocked(task):
    lab = Lab(task)
    clock = PassClock(lab)
    net = lab.place(Sleeper())
    return lab, clock, net, torch.optim.SGD(net.parameters(), 0.1)


def test_the_clock_tells_known_times(task):
    lab, clock, net, optimiser = clocked(task)
    began = time.perf_counter()
    with clock.running():
        for _ in range(5):
            sleep(0.03, "outside")
            lab.step(net(torch.randn(3, 4)).sum(), optimiser)
    total, told = time.perf_counter() - began, clock.seconds()
    assert told["whole"] == pytest.approx(total, abs=0.02)
    for name in ("forward", "backward"): assert 0 <= told[name] - SLEPT[name] < 0.05, (name, told, SLEPT)
    outside = told["whole"] - told["forward"] - told["backward"] - told["optimiser"]
    assert 0 <= outside - SLEPT["outside"] < 0.05, (told, SLEPT)


@pytest.mark.parametrize("way", ["backward", "torch.autograd.grad", "functional", "forward mode"])
def test_every_way_through_a_network_is_timed(way, task):
    lab, clock, net, _ = clocked(task)
    x, weights = torch.randn(3, 4), dict(net.named_parameters())
    with clock.running():
        if way == "backward": net(x).sum().backward()
        elif way == "torch.autograd.grad": torch.autograd.grad(net(x).sum(), list(weights.values()))
        elif way == "functional":
            leaves = {k: w.detach().requires_grad_() for k, w in weights.items()}
            loss = torch.func.functional_call(net, leaves, (x,)).sum()
            torch.autograd.grad(loss, list(leaves.values()))
        else:
            with torch.autograd.forward_ad.dual_level(), torch.no_grad():
                plain = Sleeper()  # its own function has no forward-mode rule
                plain.forward = lambda x: (time.sleep(0.01), plain.linear(x))[1]
                net = lab.place(plain)
                dual = {k: torch.autograd.forward_ad.make_dual(w.detach(), torch.ones_like(w))
                        for k, w in net.named_parameters()}  # fmt: skip
                torch.func.functional_call(net, dual, (x,))
    told = clock.seconds()
    assert told["forward"] >= 0.01 and clock.seen == 3
    assert (told["backward"] >= 0.02) == (way != "forward mode")


def test_what_is_no_pass_is_outside(task):
    lab, clock, net, _ = clocked(task)
    other = Sleeper()  # not placed by the engine
    optimiser = torch.optim.SGD(other.parameters(), 0.1)
    with clock.running():
        other(torch.randn(3, 4)).sum().backward()
        optimiser.step()
    told = clock.seconds()
    assert told["forward"] == told["backward"] == told["optimiser"] == 0 and told["whole"] >= 0.03


def test_what_is_hooked_before_a_step_is_outside(task):
    lab, clock, net, optimiser = clocked(task)
    optimiser.register_step_pre_hook(lambda *_: time.sleep(0.05))
    with clock.running():
        for _ in range(3): lab.step(net(torch.randn(3, 4)).sum(), optimiser)
    assert clock.seconds()["optimiser"] < 0.04
    assert sum(kind == "optimiser" for kind, *_ in clock.spans) == 3


def test_everything_is_put_back(task):
    kept = torch.autograd.backward, torch.autograd.grad
    lab, clock, net, optimiser = clocked(task)
    with pytest.raises(KeyboardInterrupt), clock.running(): raise KeyboardInterrupt
    assert (torch.autograd.backward, torch.autograd.grad) == kept
    lab.step(net(torch.randn(3, 4)).sum(), optimiser)
    assert id(optimiser) not in clock.optimisers


class Idle(TrainOnLabels):
    def learn(self, lab, batch):
        sleep(0.05, "outside")
        super().learn(lab, batch)


class Looking(TrainOnLabels):
    def learn(self, lab, batch):
        with torch.no_grad(): self.net(batch.images)
        super().learn(lab, batch)


@pytest.fixture
def registered():
    before = dict(REGISTRY)

    def add(name, stage):
        @register(name, "baseline", "none")
        class Added(Method):
            Config = CrossEntropyConfig
            def stages(self): return [stage(self.config)]

    yield add
    REGISTRY.clear()
    REGISTRY.update(before)


def test_a_method_that_sleeps_is_shown_as_such(registered, task, tmp_path):
    registered("idle", Idle)
    (idle,), (plain,) = spent("idle", task, tmp_path / "a"), spent("cross-entropy", task, tmp_path / "b")
    assert 8 * 0.05 <= SLEPT["outside"] <= idle.outside < SLEPT["outside"] + plain.outside + 0.3
    assert rows_of(idle, plain, 0)[-1]["ratio"] > LIMIT


def test_a_method_that_wastes_passes_is_shown_as_such(registered, task, tmp_path, monkeypatch):
    registered("looking", Looking)
    (row,) = spent("looking", task, tmp_path)
    assert row.per_image == (2.0, 1.0) and row.cost == ""
    text = bench_step.compared(dataclasses.replace(row, cost="plain"))
    assert "+33.3%: no reason known" in text


def test_rows_and_progress(task, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    rows = measure(dataclasses.replace(SMALL, method="divide-mix"))
    assert all(r.keys() == {"name", "seconds", "ratio", "peak_bytes", "detail"} for r in rows)
    epochs = ["cross-entropy, training", "divide-mix, warm-up", "divide-mix, main"]
    assert [r["name"] for r in rows if r["name"].endswith("epoch")] == [f"{name}: epoch" for name in epochs]
    assert rows[0]["ratio"] == rows[1]["ratio"] == 1
    told = capsys.readouterr().err.splitlines()
    assert "first batches" in told[0] and "left" in told[0]
    done, _, total = told[-1].partition(" ")[0].partition("/")
    assert done == total and list(tmp_path.iterdir()) == []


def test_interrupted_it_leaves_nothing(task, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before, kept, seen = torch.get_num_threads(), torch.autograd.backward, []

    def interrupt(self, text, done=1):
        seen.append(text)
        if len(seen) == 4: raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupt)
    with pytest.raises(KeyboardInterrupt): measure(dataclasses.replace(SMALL, method="elr", threads=2))
    assert list(tmp_path.iterdir()) == [] and torch.get_num_threads() == before
    assert torch.autograd.backward is kept


@pytest.mark.parametrize("change, words", [
    (dict(method="divide-mx"), "divide-mix"),
    (dict(net="resnet-18"), "resnet18"),
    (dict(batch=512), "512"),
    (dict(device="gpu"), "cuda"),
    (dict(size=4), "4"),
])  # fmt: skip
def test_refused_before_any_work(change, words, monkeypatch):
    monkeypatch.setattr(bench_step, "warm", lambda *_: pytest.fail("work began"))
    with pytest.raises(BadInput, match=words): measure(StepBench(**change), "off")


@pytest.mark.parametrize("arguments, words", [
    (("purify", "--method", "divide-mix"), "'method' is not known"),
    (("step", "--method", "cdr", "--set", "method=elr"), "each name once"),
    (("step", "--method", "cdrr"), "Did you mean 'cdr'"),
    (("step", "--set", "preset=quick"), "laptop"),
])  # fmt: skip
def test_the_command_refuses(arguments, words):
    refusal = CliRunner().invoke(app, ["bench", *arguments]).exception
    assert isinstance(refusal, BadInput) and words in str(refusal)


def test_the_command_measures_a_method():
    small = ("net=cnn-small", "size=16", "samples=48", "trusted=20", "batch=16", "threads=1")
    options = [part for text in small for part in ("--set", text)]
    done = CliRunner().invoke(app, ["bench", "step", "--method", "cdr", *options, "--json"])
    assert done.exit_code == 0, done.output
    assert '"cdr, training: epoch"' in done.stdout


def test_stages_that_are_not_trained_have_no_share(task, tmp_path):
    row = spent("cross-entropy", task, tmp_path)[0]
    seconds = row.seconds | dict.fromkeys(("forward", "backward", "optimiser"), 0.0)
    none = dataclasses.replace(row, forward=0, backward=0, steps=0, seconds=seconds)
    assert [r["ratio"] for r in rows_of(none, row, 0)][-1] is None and len(rows_of(none, row, 0)) == 2
