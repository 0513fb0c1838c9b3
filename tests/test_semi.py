"""The semi-supervised comparators: their kernels, their edges, and that no noisy label is ever read."""

import dataclasses
import functools
import io
import math

import numpy as np
import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.contract import REGISTRY, load_stage_state, make_method, stage_state
from lnl_bench.engine.nets import make_net
from lnl_bench.engine.train import load_checkpoint, train
from lnl_bench.methods import fix_match, mean_teacher, mix_match, semi, uda

NAMES = ("mean-teacher", "mix-match", "mix-match-kl", "fix-match", "uda")
SMALL = dict(net="cnn-digits", iterations=6, block=3, batch=10, ratio=2, rate=0.05, decay=0.5)


small_task = functools.partial(tasks.digits_task, n=200, trusted=3)


def started(name, task=None, **settings):
    "A lab and a started stage."
    lab, stage = tasks.started(make_method(name, SMALL | settings).stages()[0], task or small_task())
    stage.net.train()
    return lab, stage


def batches(lab, stage, m=20):
    return lab.draw_trusted(stage.config.batch, stage.config.view), lab.batch(torch.arange(m), stage._views)


def logits_of(shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


# --- the shared part ---

def test_the_rate_falls_along_seven_sixteenths_of_a_cosine_and_the_weight_rises():
    lab, stage = started("mean-teacher", iterations=8, block=8, lambda_u=50.0, ramp=0.5)
    seen = []
    stage.learn = lambda lab, x, u, progress: seen.append(
        (stage.optimiser.param_groups[0]["lr"], stage.optimiser.param_groups[1]["lr"],
         stage.weights(progress)["loss_u"])) or {"loss": torch.zeros(())}
    stage.epoch(lab, 0)
    for s, (first, second, weight) in enumerate(seen):
        assert first == second == 0.05 * math.cos(7 * math.pi * s / (16 * 8))
        assert math.isclose(weight, min(50 * s / 4, 50))


def test_blocks_cover_the_iterations_exactly():
    lab, stage = started("fix-match", iterations=7, block=3)
    assert stage.epochs == 3
    counted = []
    stage.learn = lambda lab, x, u, progress: counted.append(round(progress * 7)) or {"loss": torch.zeros(())}
    for epoch in range(stage.epochs): stage.epoch(lab, epoch)
    assert counted == list(range(7))


def test_the_average_follows_as_written_out_by_hand():
    net, average = (make_net("cnn-digits", 10, channels=1, size=8, seed=s) for s in (0, 1))
    old = {k: v.clone() for k, v in average.state_dict().items()}
    net(torch.randn(5, 1, 8, 8))
    semi.follow(average, net, 0.9)
    parameters = dict(net.named_parameters())
    for k, v in average.state_dict().items():
        expected = 0.9 * old[k] + 0.1 * parameters[k] if k in parameters else net.state_dict()[k]
        torch.testing.assert_close(v, expected.detach())


def test_batchnorm_and_biases_do_not_decay():
    net = make_net("preact-resnet18", 10, channels=3, size=8, seed=0)
    decayed, spared = semi.decay_groups(net, 0.1)
    spared_ids = {id(p) for p in spared["params"]}
    norms = [p for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    assert norms and {id(p) for p in norms} | {id(net.head.bias)} == spared_ids
    assert len(decayed["params"]) + len(spared["params"]) == len(list(net.parameters()))


def test_frozen_statistics_come_back_after_an_error():
    net = make_net("cnn-digits", 10, channels=1, size=8, seed=0)
    with pytest.raises(RuntimeError), semi.frozen_statistics(net): net(torch.randn(2, 3, 8, 8))
    before = [m.running_mean.clone() for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    net(torch.randn(4, 1, 8, 8))
    after = [m.running_mean for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- the kernels, against slow loops ---

def test_mean_teacher_loss_by_loop():
    z, t = logits_of((6, 4)), logits_of((6, 4), 1)
    total = 0.0
    for i in range(6):
        for c in range(4):
            p, q = math.exp(z[i, c]) / z[i].exp().sum(), math.exp(t[i, c]) / t[i].exp().sum()
            total += float(p - q) ** 2
    assert math.isclose(mean_teacher.consistency(z, t), total / 24, rel_tol=1e-5)


def test_mix_match_targets_by_loop():
    p, y = logits_of((3, 5, 4)).softmax(2), torch.tensor([2, 0])
    targets = mix_match.targets_of(y, p, 0.5)
    assert targets.shape == (2 + 15, 4) and targets[:2].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    for k in range(3):
        for i in range(5):
            guess = sum(p[j, i].numpy() for j in range(3)) / 3
            np.testing.assert_allclose(targets[2 + 5 * k + i], guess**2 / (guess**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("mixing", ["pair", "batch"])
def test_mix_match_terms_by_loop(mixing, monkeypatch):
    lab, stage = started("mix-match", mixing=mixing)
    x, u = batches(lab, stage)
    drawn = mix_match.draw_mixing(10 + 40, 0.5, mixing, torch.Generator().manual_seed(3))
    monkeypatch.setattr(mix_match, "draw_mixing", lambda *_: drawn)
    passed, net = [], stage.net
    net.register_forward_hook(lambda _, inputs, output: passed.append((inputs[0].clone(), output.detach())))
    terms = stage.terms(lab, x, u, 0.0)
    (guessed, first), (mixed, logits) = passed
    assert torch.equal(guessed, torch.cat(u.views))
    q = sum(first.softmax(1).split(20)) / 2
    q = q.square() / q.square().sum(1, keepdim=True)
    images, targets = torch.cat((x.images, *u.views)), torch.cat((F.one_hot(x.labels, 10).float(), q, q))
    supervised, squared = 0.0, 0.0
    for j, (ratio, other) in enumerate(zip(*drawn, strict=True)):
        torch.testing.assert_close(mixed[j], ratio * images[j] + (1 - ratio) * images[other])
        target = ratio * targets[j] + (1 - ratio) * targets[other]
        if j < 10: supervised -= (target * logits[j].log_softmax(0)).sum() / 10
        else: squared += (logits[j].softmax(0) - target).square().sum() / 400
    torch.testing.assert_close(terms["loss"], supervised)
    torch.testing.assert_close(terms["loss_u"], squared)


def test_divergence_by_loop_and_its_gradient():
    p = logits_of((5, 3)).softmax(1).double()
    z = logits_of((5, 3), 1).double().requires_grad_()
    loss, q = mix_match.divergence(p.float(), z), z.detach().softmax(1)
    by_loop = sum(float(p[i, c] * (p[i, c] / q[i, c]).log()) for i in range(5) for c in range(3)) / 5
    assert math.isclose(loss.item(), by_loop, rel_tol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], (q - p) / 5, rtol=1e-4, atol=1e-6)


def test_fix_match_loss_by_loop():
    z, w = logits_of((40, 3)), logits_of((40, 3), 1)
    total, taken = 0.0, 0
    for i in range(40):
        q = w[i].softmax(0)
        if q.max() >= 0.9:
            total, taken = total - z[i].log_softmax(0)[q.argmax()].item(), taken + 1
    assert 0 < taken < 40
    assert math.isclose(fix_match.hard_label_loss(z, w, 0.9), total / 40, rel_tol=1e-5)
    assert fix_match.confident(w, 0.9).sum() == taken


def test_uda_loss_by_loop_and_that_a_divergence_has_the_same_gradient():
    z, w = logits_of((40, 3)).requires_grad_(), logits_of((40, 3), 1)
    total, divergence = 0.0, 0.0
    for i in range(40):
        q, target = w[i].softmax(0), (w[i] / 0.4).softmax(0)
        if q.max() >= 0.8:
            total = total - (target * z[i].log_softmax(0)).sum() / 40
            divergence = divergence + (target * (target.log() - z[i].log_softmax(0))).sum() / 40
    loss = uda.soft_label_loss(z, w, 0.8, 0.4)
    torch.testing.assert_close(loss, total)
    ours, theirs = (torch.autograd.grad(v, z)[0] for v in (loss, divergence))
    torch.testing.assert_close(ours, theirs)


def test_uda_becomes_fix_match_as_the_temperature_falls():
    z, w = logits_of((20, 3)), logits_of((20, 3), 1)
    torch.testing.assert_close(uda.soft_label_loss(z, w, 0.7, 1e-3), fix_match.hard_label_loss(z, w, 0.7))


def test_training_signal_annealing():
    assert [round(uda.signal_threshold(s, 4, "linear"), 6) for s in (0, 0.5, 1)] == [0.25, 0.625, 1.0]
    assert uda.signal_threshold(0, 4, "log") == 0.25 and uda.signal_threshold(0.1, 4, "log") > 0.5
    assert uda.signal_threshold(0.1, 4, "exp") < 0.27 and uda.signal_threshold(0, 4, "none") == 1
    z, y = logits_of((30, 4)), torch.arange(30) % 4
    kept = [F.cross_entropy(z[i], y[i]).item() for i in range(30) if z[i].softmax(0)[y[i]] <= 0.4]
    assert 0 < len(kept) < 30
    assert math.isclose(uda.annealed_loss(z, y, 0.4), sum(kept) / len(kept), rel_tol=1e-5)
    sure = torch.full((3, 4), -50.0, requires_grad=True)
    loss = uda.annealed_loss(sure + 100 * torch.eye(4)[:3], torch.arange(3), 0.5)
    assert loss == 0 and torch.autograd.grad(loss, sure)[0].abs().sum() == 0


@pytest.mark.parametrize("annealing", ["linear", "log", "exp"])
def test_annealing_reaches_the_stage(annealing):
    lab, stage = started("uda", annealing=annealing)
    z, y = logits_of((30, 10)), torch.arange(30) % 10
    expected = uda.annealed_loss(z, y, uda.signal_threshold(0.3, 10, annealing))
    assert torch.equal(stage.labelled(z, y, 0.3), expected)


# --- the stages ---

# Sample-forwards and sample-backwards of an iteration with B = 10 and mu = 2.
PASSES = {"mean-teacher": (10 + 20 + 20, 30), "mix-match": (40 + 50, 50), "mix-match-kl": (40 + 50 + 20, 70),
          "fix-match": (50, 50), "uda": (50, 50)}


@pytest.mark.parametrize("name", NAMES)
def test_counted_passes(name):
    lab, stage = started(name)
    stage.epoch(lab, 0)
    forward, backward = PASSES[name]
    assert lab.passes == {"forward": 3 * forward, "backward": 3 * backward}


@pytest.mark.parametrize("name", ["fix-match", "uda"])
def test_weak_views_apart_cost_no_backward_pass(name):
    lab, stage = started(name, passes="apart", ratio=7, batch=10)
    stage.epoch(lab, 0)
    assert lab.passes == {"forward": 3 * 150, "backward": 3 * 80}


@pytest.mark.parametrize("passes", ["joint", "apart"])
def test_fix_match_gives_weak_views_no_gradient(passes):
    lab, stage = started("fix-match", passes=passes)
    x, u = batches(lab, stage)
    logits, weak, strong = stage.all_logits(lab, x, u)
    assert not weak.requires_grad and strong.requires_grad and logits.requires_grad
    assert logits.shape == (10, 10) and weak.shape == strong.shape == (20, 10)


@pytest.mark.parametrize("passes", ["joint", "apart"])
def test_fix_match_logits_belong_to_their_images(passes):
    lab, stage = started("fix-match", passes=passes)
    x, u = batches(lab, stage)
    stage.net.eval()  # each image by itself
    with torch.no_grad():
        got = stage.all_logits(lab, x, u)
        for mine, images in zip(got, (x.images, *u.views), strict=True):
            torch.testing.assert_close(mine, stage.net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mean-teacher", "mix-match", "mix-match-kl"])
def test_guessing_passes_leave_no_trace_in_batchnorm(name):
    lab, stage = started(name)
    x, u = batches(lab, stage)
    stage.terms(lab, x, u, 0.0)
    norm = next(m for m in stage.net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert norm.num_batches_tracked == 1, "one pass of the batch that is learned from"
    norm = next(m for m in stage.average.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert norm.num_batches_tracked == 0


def test_the_teacher_gets_no_gradient_and_looks_at_the_other_view():
    lab, stage = started("mean-teacher")
    x, u = batches(lab, stage)
    seen = []
    stage.average.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    stage.terms(lab, x, u, 0.0)["loss_u"].backward()
    (images, output), = seen
    assert torch.equal(images, u.views[1]) and not torch.equal(images, u.views[0])
    assert not output.requires_grad
    assert all(p.grad is None for p in stage.average.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_told_of_the_samples(name):
    lab, stage = started(name)
    stage.epoch(lab, 0)
    known, p = stage.samples(lab), lab.predict(stage.average).softmax(1)
    torch.testing.assert_close(known["p_clean"], p[torch.arange(lab.n), lab.labels])
    torch.testing.assert_close(known["confidence"], p.max(1).values)
    assert torch.equal(known["prediction"], p.argmax(1)) and torch.equal(known["corrected"], p.argmax(1))
    assert torch.equal(stage.predict(lab.batch(torch.arange(9), ("none",)).images).argmax(1), p[:9].argmax(1))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_weak_unlabelled_views(name):
    lab, stage = started(name)
    x, u = batches(lab, stage)
    stage.net.eval()
    with torch.no_grad():
        stage.terms(lab, x, u, 0.0)
        expected = stage.net.features(u.images)
    torch.testing.assert_close(stage.features(lab)[:20].float(), expected, rtol=2e-2, atol=2e-2)
    assert stage.features(lab)[20:].abs().sum() == 0


@pytest.mark.parametrize("name", NAMES)
def test_samples_changes_nothing(name):
    lab, stage = started(name)
    stage.epoch(lab, 0)
    before = lab.state()["generators"]
    stage.samples(lab), stage.features(lab), stage.extras(lab)
    assert all(torch.equal(before[k], v) for k, v in lab.state()["generators"].items())


# --- the noisy labels ---

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["permuted", "soft"])
def test_noisy_labels_are_never_read(name, kind, tmp_path):
    task = small_task()
    order = torch.randperm(task.n, generator=torch.Generator().manual_seed(5))
    other = task.given[order] if kind == "permuted" else F.one_hot(task.given[order], 10).float() * 0.5 + 0.05
    runs = [train(make_method(name, SMALL), t, run_dir=tmp_path / str(i), progress="off")
            for i, t in enumerate((task, task.relabel(other, by="nobody")))]
    first, second = (load_checkpoint(r)["stage"] for r in runs)
    assert not torch.equal(first.pop("p_clean"), second.pop("p_clean"))
    for part in ("net", "average"):
        for k, v in first.pop(part)["weights"].items():
            assert torch.equal(v, second[part]["weights"][k]), (part, k)
    for k in ("prediction", "confidence"): assert torch.equal(first[k], second[k])
    judged = ("noise_auc", "p_clean_of_clean", "p_clean_of_mislabelled")  # against the given labels
    rows = [[{k: v for k, v in row.items() if k not in judged} for row in r.metrics.read()[0]] for r in runs]
    assert rows[0] == rows[1]


# --- edges ---

@pytest.mark.parametrize("name", NAMES)
def test_one_trusted_image_a_class(name, tmp_path):
    run = train(make_method(name, SMALL), small_task(trusted=1), run_dir=tmp_path / "run", progress="off")
    assert run.finished and all(math.isfinite(v) for v in run.series("loss") + run.series("loss_u"))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_larger_than_the_trusted_set_and_than_the_training_set(name):
    lab, stage = started(name, small_task(n=120, trusted=2), batch=64, ratio=4)
    numbers = stage.epoch(lab, 0)  # 20 trusted images, 100 unlabelled ones for 256 places
    assert all(math.isfinite(v) for v in numbers.values())
    x = lab.draw_trusted(64)
    assert len(x) == 64 and set(x.labels.bincount().tolist()) <= {6, 7}


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one(name):
    lab, stage = started(name, batch=1, ratio=1)
    assert all(math.isfinite(v) for v in stage.epoch(lab, 0).values())


@pytest.mark.parametrize("name", ["fix-match", "uda"])
def test_a_threshold_that_is_never_reached_leaves_supervised_training(name):
    lab, stage = started(name, threshold=1.0)
    numbers = stage.epoch(lab, 0)
    assert numbers["loss_u"] == 0 and numbers["confident"] == 0 and numbers["loss"] > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in stage.net.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [2, 100])
def test_two_and_a_hundred_classes(name, classes):
    lab, stage = started(name, tasks.drawn_task(classes, 3 * classes + 8, trusted=1))
    assert all(math.isfinite(v) for v in stage.epoch(lab, 0).values())


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trips(name):
    lab, stage = started(name)
    stage.epoch(lab, 0)
    saved = {"stage": stage_state(stage), "lab": lab.state()}
    saved = torch.load(_bytes(saved), weights_only=True)
    first = stage.epoch(lab, 1)
    lab, stage = started(name)
    load_stage_state(stage, saved["stage"])
    lab.load_state(saved["lab"])
    assert stage.epoch(lab, 1) == first


def _bytes(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("name", NAMES)
def test_registered_with_what_it_needs(name):
    cls = REGISTRY[name]
    assert cls.family == "semi-supervised" and cls.needs == ("trusted set",) and cls.paper
    with pytest.raises(BadInput, match="needs a trusted set"):
        cls().check(tasks.digits_task("none", n=100))
    for f in dataclasses.fields(cls.Config): assert f.metadata["help"] and f.metadata["source"], f.name


@pytest.mark.parametrize("wrong", [{"threshold": 1.5}, {"passes": "both"}, {"ratio": 0}, {"block": 0}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))): make_method("fix-match", wrong)
