"GCE, mixup, forward correction, co-teaching and CDR: kernels against slow loops, edges, costs."
import functools
import math

import numpy as np
import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.lab import Batch
from lnl_bench.engine.train import train
from lnl_bench.methods import cdr, co_teaching, forward_correction, gce, mixup
from lnl_bench.methods.cross_entropy import learning_rate, per_sample_loss
from lnl_bench.methods.recipes import PRESETS, recipe

SMALL = dict(net="cnn-digits", epochs=2, batch=16)
METHODS = {
    "gce": (gce.GCE, dict(rate=0.05, prune_from=1)),
    "mixup": (mixup.Mixup, dict(rate=0.05)),
    "forward-correction": (forward_correction.ForwardCorrection, dict(rate=0.05, first_epochs=1)),
    "co-teaching": (co_teaching.CoTeaching, dict(gradual=1)),
    "co-teaching-plus": (co_teaching.CoTeachingPlus, dict(gradual=1, warmup=1)),
    "cdr": (cdr.CDR, dict(rate=0.05)),
}


def method(name, **changes):
    cls, settings = METHODS[name]
    return cls(cls.Config(**SMALL | settings | changes))


small_task = functools.partial(tasks.digits_task, n=97)


def fit(name, task, folder, **changes):
    return train(method(name, **changes), task, runs_dir=folder, progress="off", device="cpu")


def drawn(*shape, seed=0, kind=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=kind)


# --- learning rates ---


def test_drops_fall_on_the_epochs_that_papers_name():
    for epochs, schedule, drops in ((120, "step:1/3,2/3", (40, 80)), (150, "step:8/15,4/5", (80, 120)),
                                    (200, "step:1/5,2/5", (40, 80)), (300, "step", (150,))):
        rates = [learning_rate(schedule, 1.0, e / epochs) for e in range(epochs)]
        assert [e for e in range(1, epochs) if rates[e] < rates[e - 1] * 0.5] == list(drops)


def test_linear_decay_is_the_released_plan_of_co_teaching():
    plan = [1.0] * 80 + [(200 - i) / 120 for i in range(80, 200)]
    np.testing.assert_allclose([learning_rate("linear:2/5", 1.0, e / 200) for e in range(200)], plan)


@pytest.mark.parametrize("schedule", ["", "step:2", "step:-1/2", "step:nan", "cosine:0.5", "linear:0,0.5"])
def test_unreadable_schedules_are_refused(schedule):
    with pytest.raises(BadInput, match="schedule"): mixup.MixupConfig(schedule=schedule)


# --- generalised cross-entropy ---


def test_lq_by_loop_for_hard_and_soft_labels():
    logits, q = drawn(5, 4), 0.7
    soft, hard = drawn(5, 4, seed=1).softmax(1), torch.tensor([0, 1, 2, 3, 0])
    p = logits.softmax(1)
    for i, found in enumerate(gce.lq_loss(logits, hard, q).tolist()):
        assert found == pytest.approx((1 - p[i, hard[i]].item() ** q) / q, rel=1e-5)
    for i, found in enumerate(gce.lq_loss(logits, soft, q).tolist()):
        expected = sum(soft[i, c].item() * (1 - p[i, c].item() ** q) / q for c in range(4))
        assert found == pytest.approx(expected, rel=1e-5)


def test_lq_gradient_by_finite_differences():
    logits, labels, h = drawn(3, 4).float(), torch.tensor([0, 3, 1]), 1e-2
    x = logits.clone().requires_grad_()
    gradient, = torch.autograd.grad(gce.lq_loss(x, labels, 0.4).sum(), x)
    for i in range(3):
        for c in range(4):
            step = torch.zeros_like(logits)
            step[i, c] = h
            up, down = (gce.lq_loss(logits + s * step, labels, 0.4).sum() for s in (1, -1))
            assert gradient[i, c].item() == pytest.approx(((up - down) / (2 * h)).item(), abs=1e-3)


def test_weights_change_only_when_it_is_time(tmp_path):
    run = fit("gce", small_task(), tmp_path, epochs=7, prune_from=2, prune_every=3, k=0.12)
    kept = run.series("kept")
    assert kept[:2] == [1.0, 1.0] and kept[2] == kept[3] == kept[4] < 1 and kept[5] == kept[6]
    n = run.about["task"]["n"]
    assert run.result["passes"] == {"forward": (7 + 2) * n, "backward": 7 * n}


def test_a_plain_run_never_weighs(tmp_path):
    run = fit("gce", small_task(), tmp_path, variant="plain", prune_from=0)
    assert run.series("kept") == [1.0, 1.0]


# --- mixup ---


def test_mixing_soft_labels_and_a_batch_of_one():
    y = drawn(3, 4).softmax(1).float()
    batch = Batch(torch.arange(3), (torch.rand(3, 1, 2, 2),), y)
    found = mixup.mixed(batch, torch.full((3,), 0.6), torch.tensor([2, 0, 1]), 4)
    torch.testing.assert_close(found.labels, 0.6 * y + 0.4 * y[[2, 0, 1]])
    one = Batch(torch.arange(1), (torch.rand(1, 1, 2, 2),), torch.tensor([3]))
    alone = mixup.mixed(one, torch.tensor([0.7]), torch.tensor([0]), 4)
    torch.testing.assert_close(alone.images, one.images)
    torch.testing.assert_close(alone.labels, torch.tensor([[0.0, 0, 0, 1]]))


# --- forward correction ---


def test_corrected_loss_by_loop_for_hard_and_soft_labels():
    logits, T, hard = drawn(5, 4), drawn(4, 4, seed=1).softmax(1), torch.tensor([0, 1, 2, 3, 0])
    p, q = logits.softmax(1), F.one_hot(hard, 4).double()
    expected = [-math.log(sum(T[i, hard[k]].item() * p[k, i].item() for i in range(4))) for k in range(5)]
    np.testing.assert_allclose(forward_correction.forward_loss(logits, hard, T), expected, rtol=1e-5)
    np.testing.assert_allclose(forward_correction.forward_loss(logits, q, T), expected, rtol=1e-5)


def test_estimate_and_truth_meet_in_the_second_stage(tmp_path):
    task = small_task("pair-flip:0.3")
    run = fit("forward-correction", task, tmp_path)
    T = torch.from_numpy(np.load(run.snapshots()[-1][2])["extra.transition"])
    assert T.shape == (10, 10) and torch.allclose(T.sum(1), torch.ones(10), atol=1e-5)
    n = task.n
    assert run.result["passes"] == {"forward": (1 + 2 + 1) * n, "backward": (1 + 2) * n}
    given = fit("forward-correction", task, tmp_path, variant="given", matrix="pair-flip:0.3")
    assert {r["stage"] for r in given.metrics.read()[0]} == {"train"}


@pytest.mark.parametrize("matrix, message", [
    ("", "CSV file"), ("nothing.csv", "nothing.csv"), ("symmetric:2", "out of range"),
    ("asymmetric:0.4", "its rate alone"), ("symmetric", "symmetric")])
def test_a_matrix_that_cannot_be_used_is_refused_before_any_work(matrix, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        fit("forward-correction", small_task(), tmp_path, variant="given", matrix=matrix)
    assert not list(tmp_path.rglob("run.json"))


def test_a_matrix_of_another_size_is_refused(tmp_path):
    (tmp_path / "T.csv").write_text("0.5,0.5\n0.5,0.5\n")
    with pytest.raises(BadInput, match="10 rows of 10"):
        fit("forward-correction", small_task(), tmp_path, variant="given", matrix=str(tmp_path / "T.csv"))


# --- co-teaching ---


def started(name, task=None, **changes):
    return tasks.started(method(name, **changes).stages()[-1], task or small_task())


def test_each_network_learns_what_the_other_chose():
    lab, stage = started("co-teaching")
    stage.keep, batch = 0.5, lab.batch(torch.arange(12), ("none",))
    nets = [lab.net("cnn-digits", role) for role in ("net", "net2")]
    losses = [per_sample_loss(net(batch.images), batch.labels) for net in nets]
    chosen = [values.argsort()[:6] for values in losses]
    assert chosen[0].tolist() != chosen[1].tolist()
    for net, own, theirs in zip(nets, losses, chosen[::-1], strict=True):
        lab.step(own[theirs].mean(), stage.optimiser_for(net))
    stage.learn(lab, batch)
    for net, found in zip(nets, (stage.net, stage.net2), strict=True):
        assert torch.equal(net.head.weight, found.head.weight)
    assert stage.weight[:12].nonzero()[:, 0].tolist() == sorted(chosen[1].tolist())


def test_agreement_gives_no_step():
    lab, stage = started("co-teaching-plus")
    stage.net2.load_state_dict(stage.net.state_dict())
    stage.late, before = True, stage.net.head.weight.clone()
    stage.learn(lab, lab.batch(torch.arange(8), ("none",)))
    assert torch.equal(stage.net.head.weight, before) and stage.weight[:8].sum() == 0


def test_released_variant_takes_the_loss_of_probabilities():
    lab, stage = started("co-teaching-plus", variant="released")
    logits, labels = [drawn(6, 10).float() * 5, drawn(6, 10, seed=1).float() * 5], torch.arange(6)
    before, _ = stage.choose(logits, labels)
    stage.late = True
    after, _ = stage.choose(logits, labels)
    for z, plain, released in zip(logits, before, after, strict=True):
        torch.testing.assert_close(plain, F.cross_entropy(z, labels, reduction="none"))
        torch.testing.assert_close(released, F.cross_entropy(z.softmax(1), labels, reduction="none"))
        assert math.log(1 + 9 / math.e) - 1e-4 < released.min() <= released.max() < math.log(9 + math.e)


def test_momentum_falls_with_the_rate():
    lab, stage = started("co-teaching")
    for rate, beta in ((0.001, 0.9), (0.0009, 0.1)):
        stage.set_rate(rate)
        for optimiser in (stage.optimiser, stage.optimiser2):
            group = optimiser.param_groups[0]
            assert (group["lr"], group["betas"]) == (rate, (beta, 0.999))


# --- CDR ---


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.75, 1.0])
def test_critical_weights_by_numpy(share):
    w, g = ([drawn(4, 3, 3, 3, seed=s), drawn(10, 6, seed=s + 1)] for s in (0, 2))
    scores = np.abs(np.concatenate([(a * b).flatten().numpy() for a, b in zip(w, g, strict=True)]))
    best = np.argsort(-scores)[:max(1, int(share * len(scores)))]
    found = torch.cat([m.flatten() for m in cdr.critical(w, g, share)]).nonzero()[:, 0]
    assert found.tolist() == sorted(best.tolist())


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_one_step_by_the_papers_rules(variant):
    "Without momentum: critical weights take a shortened gradient, all decay, BatchNorm learns on."
    c = dict(tau=0.4, momentum=0.0, rate=0.1, weight_decay=0.01, variant=variant)
    lab, stage = started("cdr", **c)
    batch = lab.batch(torch.arange(16), ("none",))
    names = [k for k, _ in stage.net.named_parameters()]
    before = {k: v.detach().clone() for k, v in stage.net.named_parameters()}
    loss = per_sample_loss(stage.net.train()(batch.images), batch.labels).mean()
    g = dict(zip(names, torch.autograd.grad(loss, stage.net.parameters()), strict=True))
    lab, stage = started("cdr", **c)
    stage.net.train()
    stage.learn(lab, batch)
    flat = torch.cat([(before[k] * g[k]).abs().flatten() for k in names if before[k].ndim > 1])
    least = flat.sort(descending=True).values[int(0.6 * len(flat)) - 1]
    for k, after in stage.net.named_parameters():
        w, step = before[k], g[k]
        if w.ndim > 1: step = 0.6 * step * ((w * g[k]).abs() >= least)
        if variant == "released": step = step + 0.01 * w
        elif w.ndim > 1: step = step + 0.01 * w.sign()
        torch.testing.assert_close(after, w - 0.1 * step, msg=k)


# --- all of them ---


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("noise", ["none", "symmetric:1.0"])
def test_noise_rates_0_and_1(name, noise, tmp_path):
    run = fit(name, small_task(noise), tmp_path)
    assert run.finished and all(math.isfinite(v) for v in run.series("loss"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("classes", [2, 100])
def test_two_and_a_hundred_classes(name, classes, tmp_path):
    run = fit(name, tasks.drawn_task(classes, 3 * classes, "symmetric:0.3"), tmp_path, batch=64)
    assert run.finished and all(math.isfinite(v) for v in run.series("loss"))


@pytest.mark.parametrize("name", METHODS)
def test_soft_labels_and_a_last_batch_of_one(name, tmp_path):
    task = small_task()
    assert task.n % SMALL["batch"] == 1
    soft = task.relabel(F.one_hot(task.given, 10).float() * 0.8 + 0.02, by="smoothed")
    run = fit(name, soft, tmp_path)
    assert run.finished and all(math.isfinite(v) for v in run.series("loss"))


@pytest.mark.parametrize("name, setting", [("cdr", "tau"), ("co-teaching", "forget"),
                                           ("co-teaching-plus", "forget")])
def test_something_is_kept_where_all_is_to_be_forgotten(name, setting, tmp_path):
    run = fit(name, small_task(), tmp_path, **{setting: 1.0})
    assert run.finished and all(math.isfinite(v) for v in run.series("loss"))


# --- recipes ---


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name, setting", [("cdr", "tau"), ("co-teaching", "forget"),
                                           ("co-teaching-plus", "forget")])
def test_recipes_that_know_the_noise_rate_say_so(name, setting, preset):
    for rate, expected in ((0.0, 0.0), (0.2, 0.2), (0.45, 0.45), (0.8, 0.8), (1.0, 0.9)):
        config = method(name, **recipe(name, "cifar10", "symmetric", rate, preset)).config
        assert (getattr(config, setting), config.oracle) == (expected, "noise rate")
    unknown = method(name, **recipe(name, "cifar10", "human", None, preset)).config
    assert (getattr(unknown, setting), unknown.oracle) == (0.2, "none")


@pytest.mark.parametrize("name", ["gce", "forward-correction"])
def test_recipes_of_the_others_do_not_know_the_noise(name):
    for preset in PRESETS:
        found = [recipe(name, "cifar10", *noise, preset) for noise in (("symmetric", 0.8), ("human", None))]
        assert found[0] == found[1]
