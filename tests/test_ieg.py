"IEG: its kernels, its losses by hand, its switches, what lambda says of mislabelled samples, edges."

import copy
import dataclasses

import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.task import truth_of
from lnl_bench.engine.metagrad import ENGINES, TrainingPass, Trusted, step_of
from lnl_bench.engine.nets import make_net
from lnl_bench.methods.ieg import (
    Distil,
    IEGConfig,
    coefficients,
    consistency,
    guess,
    restarting_rate,
    sized,
)

SMALL = IEGConfig(net="cnn-digits", epochs=3, batch=40, rate=0.05, schedule="cosine", trusted_batch=30,
                  decay=0.9, consistency=1.0, unlabelled=1.0)


def started(task=None, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **changes)
    return tasks.started(Distil(config), task or tasks.digits_task("symmetric:0.4", n=200, trusted=5))


def test_the_guess_is_sharper_than_the_mean_and_keeps_its_order():
    p = [torch.rand(6, 5).softmax(1) for _ in range(3)]
    g, mean = guess(p, 0.5), sum(p) / 3
    torch.testing.assert_close(g, mean**2 / (mean**2).sum(1, keepdim=True))
    assert torch.equal(g.argsort(1), mean.argsort(1)) and (g.amax(1) >= mean.amax(1)).all()


def test_rates_restart_lower_and_last_longer():
    starts = [0, 1, 2.5, 4.75, 8.125]
    assert [restarting_rate(1.0, e) for e in starts] == pytest.approx([1, 0.9, 0.81, 0.729, 0.6561])
    for begin, end in zip(starts, starts[1:], strict=False):
        peak = restarting_rate(1.0, begin)
        assert restarting_rate(1.0, (begin + end) / 2) == pytest.approx(peak / 2)
        assert restarting_rate(1.0, end - 1e-6) < 1e-6


def test_consistency_and_size():
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    by_hand = sum((a[i].softmax(0) * (a[i].log_softmax(0) - b[i].log_softmax(0))).sum() for i in range(5)) / 5
    torch.testing.assert_close(consistency(a, b), by_hand)
    assert consistency(a, a).abs() < 1e-6
    torch.testing.assert_close(sized(a, "released"), a / (a**2).mean() ** 0.5)
    assert torch.equal(sized(torch.zeros(2, 3), "released"), torch.zeros(2, 3))


@pytest.mark.parametrize("engine", ENGINES)
def test_both_coefficients_come_from_one_product(engine):
    "Engines agree, and the direction's passes are spent once for weights and labels together."
    torch.manual_seed(1)
    net = make_net("cnn-digits", 10, channels=1, size=8, seed=1)
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=0.01)
    x, xt, yt = torch.randn(12, 1, 8, 8), torch.randn(9, 1, 8, 8), torch.randint(10, (9,))
    given, g = F.one_hot(torch.randint(10, (12,)), 10).float(), torch.rand(12, 10).softmax(1)
    trusted = Trusted(xt, lambda z: F.cross_entropy(z, yt))
    how = (given, g, trusted, step_of(sgd, net), 0.9)
    omega, chosen, meta = coefficients(TrainingPass(net, x), *how, engine)
    _, _, reference = coefficients(TrainingPass(net, x), *how, "reverse")
    for ours, theirs in zip(meta.gradients, reference.gradients, strict=True):
        assert (ours - theirs).norm() < (0.02 if engine == "difference" else 1e-4) * theirs.norm()
    assert torch.equal(chosen, (meta.gradients[1] < 0).float())
    useful = (-meta.gradients[0]).clamp_min(0)
    torch.testing.assert_close(omega, useful / (useful.sum() + 1e-5))
    unseen = {"forward": {"backward": 12}, "difference": {}, "reverse": {"forward": 12, "backward": 24}}
    assert meta.passes == unseen[engine]


def test_no_weight_where_nothing_helps():
    net = make_net("cnn-digits", 10, channels=1, size=8, seed=1)
    x, given = torch.randn(4, 1, 8, 8), F.one_hot(torch.arange(4), 10).float()
    trusted = Trusted(x, lambda z: z.sum() * 0)
    step = step_of(torch.optim.SGD(net.parameters(), 0.1), net)
    omega, chosen, _ = coefficients(TrainingPass(net, x), given, given, trusted, step)
    assert omega.tolist() == [0.0] * 4 and chosen.tolist() == [0.0] * 4


def terms_of(stage, lab, batch):
    "The terms of one step's loss, and what they were made of."
    c, seen = stage.config, {}
    given = stage._given[batch.index]
    logits, strong = stage.net(batch.images), stage.net(batch.views[1])
    seen["guessed"] = guess([z.softmax(1) for z in (logits, strong)], c.temperature)
    omega = torch.rand(len(batch))
    labels = torch.where(torch.rand(len(batch), 1) > 0.5, given, seen["guessed"])
    terms = stage.supervised(logits, given, seen["guessed"], labels, omega)
    return terms, seen | dict(given=given, logits=logits, omega=omega, labels=labels)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_supervised_losses_by_hand(variant):
    lab, stage = started(variant=variant)
    terms, s = terms_of(stage, lab, lab.batch(torch.arange(10), ("weak", "strong")))
    log_p, share = s["logits"].log_softmax(1), 2 if variant == "released" else 1
    mixture = 0.9 * s["given"] + 0.1 * s["guessed"]
    torch.testing.assert_close(terms["omega"], -(s["omega"] * (mixture * log_p).sum(1)).sum() / share)
    torch.testing.assert_close(terms["lambda"], -(s["labels"] * log_p).sum(1).mean() / share)


def test_trusted_images_anchor_the_mixture():
    "Each mixed image is at least half itself; unmixed, the first losses are those of the trusted images."
    lab, stage = started(anchored="as they are")
    batch, probe = lab.batch(torch.arange(8), ("none", "none")), lab.draw_trusted(5, "none")
    stage.net.eval()
    guessed = torch.rand(8, 10).softmax(1)
    found = stage.mixed(lab, batch, probe, guessed)
    torch.testing.assert_close(found["probe"], F.cross_entropy(stage.net(probe.images), probe.labels))
    torch.testing.assert_close(found["unlabelled"], F.cross_entropy(stage.net(batch.images), guessed))
    lab, stage = started()
    stage.net.eval()
    mixed = stage.mixed(lab, batch, probe, guessed)
    assert not torch.isclose(mixed["probe"], found["probe"])
    assert started(anchored="not at all")[1].mixed(lab, batch, probe, guessed) == {}


SWITCHES = [
    dict(labels="given"), dict(anchored="not at all"), dict(anchored="as they are"), dict(policy="weak"),
    dict(consistency=0.0), dict(copies=1), dict(copies=3), dict(variant="released"), dict(decay=0.0),
    dict(schedule="restarts"), dict(engine="reverse"), dict(engine="difference"), dict(batch=7),
    dict(batch=1), dict(trusted_batch=1), dict(trusted_batch=300), dict(batchnorm="running"),
    dict(graph="rebuilt")]


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_switches_and_edges_train_with_finite_numbers(changes):
    size = 60 if changes.get("batch") == 1 else 120
    lab, stage = started(tasks.digits_task("symmetric:0.4", n=size, trusted=2), **changes)
    row = stage.epoch(lab, 0)
    assert tasks.finite(row), row
    for v in stage.samples(lab).values(): assert v.shape == (lab.n,) and v.float().isfinite().all()
    assert set(stage.weight.unique().tolist()) <= {0.0, 1.0}
    assert stage.predict(lab.view("none", torch.arange(3))).shape == (3, 10)


@pytest.mark.parametrize("edge", tasks.EDGES)
def test_tasks_at_the_edge(edge):
    lab, stage = started(tasks.edge_task(edge, trusted=1))
    assert tasks.finite(stage.epoch(lab, 0))


def test_lambda_separates_as_in_figure_4():
    task = tasks.digits_task("symmetric:0.4", n=500, trusted=10)
    lab, stage = started(task, epochs=5)
    for e in range(5): stage.epoch(lab, e)
    clean = task.visible().given == truth_of(task)
    means = stage.weight[clean].mean(), stage.weight[~clean].mean()
    assert means[0] > means[1] + 0.3, means
    right = (stage.labels.argmax(1) == truth_of(task)).float().mean()
    assert right > clean.float().mean() + 0.1, "chosen labels are more often right than those given"


def test_the_average_predicts_and_follows():
    lab, stage = started(decay=0.5)
    before = copy.deepcopy(stage.average)
    stage.epoch(lab, 0)
    x = lab.view("none", torch.arange(4))
    assert torch.equal(stage.predict(x), stage.average.eval()(x))
    assert not torch.equal(before.eval()(x), stage.average(x))
    lab, stage = started(decay=0.0)
    assert torch.equal(stage.predict(x), stage.net.eval()(x))


def test_passes_are_those_of_the_algorithm():
    "A step on B images with B trusted ones: 7 B forward, 8 B backward, the derivative's own among them."
    lab, stage = started(tasks.digits_task("symmetric:0.4", n=130, trusted=5), batch=40, trusted_batch=40)
    assert lab.n == 80
    stage.epoch(lab, 0)
    assert lab.passes == {"forward": 7 * 80, "backward": 8 * 80}
