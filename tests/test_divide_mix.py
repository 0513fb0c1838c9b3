"DivideMix: kernels against slow loops, one step against the paper's pseudo-code, and splits that are empty."
import functools
import itertools
import json
import math

import numpy as np
import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.contract import stage_state
from lnl_bench.engine.train import train
from lnl_bench.methods import divide_mix as D
from lnl_bench.methods.recipes import recipe

SMALL = dict(net="cnn-digits", epochs=3, warmup=1, batch=32, warmup_batch=32, rate=0.05, ramp=2.0)


small_task = functools.partial(tasks.digits_task, n=120)


def started(task=None, **changes):
    "A lab and a started stage that has judged the samples once."
    lab, stage = tasks.started(D.CoDivide(D.DivideMixConfig(**SMALL | changes)), task or small_task())
    stage.co_divide(lab)
    return lab, stage


def fit(task, folder, seed=0, **changes):
    return train(D.DivideMix.configured(SMALL | changes), task, runs_dir=folder, seed=seed, progress="off")


# --- kernels ---


def test_sharpened_targets_by_loop():
    g = torch.Generator().manual_seed(0)
    y, p = F.one_hot(torch.randint(4, (9,), generator=g), 4).float(), torch.rand(9, 4, generator=g).softmax(1)
    w, temperature = torch.rand(9, generator=g), 0.5
    for i, found in enumerate(D.co_refine(y, w, p, temperature)):
        bar = [w[i] * y[i, c] + (1 - w[i]) * p[i, c] for c in range(4)]
        total = sum(b ** (1 / temperature) for b in bar)
        torch.testing.assert_close(found, torch.stack([b ** (1 / temperature) / total for b in bar]))


def test_a_certain_label_stays_as_it_is():
    y = torch.eye(3)
    torch.testing.assert_close(D.co_refine(y, torch.ones(3), torch.full((3, 3), 1 / 3), 0.5), y)


@pytest.mark.parametrize("mixing", ["pair", "batch"])
def test_mixing_keeps_the_larger_part(mixing):
    g = torch.Generator().manual_seed(1)
    draws = [D.draw_mixing(64, 0.5, mixing, g) for _ in range(50)]
    assert all(0.5 <= r.min() and r.max() <= 1 for r, _ in draws)
    assert all(sorted(p.tolist()) == list(range(64)) for _, p in draws)
    assert len({r[0].item() for r, _ in draws}) > 40, "ratios are drawn anew"
    assert (draws[0][0].unique().numel() == 1) == (mixing == "batch")


def test_mixing_depends_on_its_own_stream_alone():
    def draw(numpy_seed, torch_seed):
        np.random.seed(numpy_seed)
        torch.manual_seed(torch_seed)
        return D.draw_mixing(8, 4.0, "pair", torch.Generator().manual_seed(7))
    for a, b in zip(draw(0, 0), draw(1, 1), strict=True): assert torch.equal(a, b)


def test_mixing_images_by_loop():
    g = torch.Generator().manual_seed(2)
    images, (ratios, partner) = torch.rand(6, 1, 3, 3, generator=g), D.draw_mixing(6, 4.0, "pair", g)
    mixed = D.mix_with(images, ratios, partner)
    for i in range(6):
        expected = ratios[i] * images[i] + (1 - ratios[i]) * images[partner[i]]
        torch.testing.assert_close(mixed[i], expected)


def test_losses_by_loop():
    g = torch.Generator().manual_seed(3)
    z = torch.randn(5, 3, generator=g, dtype=torch.double)
    q = torch.rand(5, 3, generator=g, dtype=torch.double).softmax(1)
    p = z.float().softmax(1).double()
    squares = [[(p[i, c] - q[i, c]) ** 2 for c in range(3)] for i in range(5)]
    assert math.isclose(D.unlabelled_loss(z, q), sum(map(sum, squares)) / 15, rel_tol=1e-5)
    assert math.isclose(D.unlabelled_loss(z, q, "sum"), sum(map(sum, squares)) / 5, rel_tol=1e-5)
    penalty = sum(math.log((1 / 3) / p[:, c].mean()) / 3 for c in range(3))
    assert math.isclose(D.prior_penalty(z), penalty, rel_tol=1e-4)
    assert D.prior_penalty(torch.zeros(4, 3)).abs() < 1e-6
    entropy = sum(p[i, c] * p[i, c].log() for i in range(5) for c in range(3)) / 5
    assert math.isclose(D.negative_entropy(z), entropy, rel_tol=1e-5)


def test_five_epochs_are_averaged_and_not_the_fifth_last():
    history = torch.arange(1.0, 6.0)[:, None].expand(5, 4)
    assert D.recent_mean(history, 5).tolist() == [3.0] * 4 and D.recent_mean(history, 3).tolist() == [2.0] * 4
    lab, stage = started(average=5)
    seen = [stage.loss.clone()]
    for k in range(6):
        stage.co_divide(lab)
        torch.nn.init.normal_(stage.nets[0].head.weight, generator=torch.Generator().manual_seed(k))
        newest = D.normalised(D.per_sample_loss(stage.look(lab, 0), stage._labels))
        seen.append(newest)
    stage.co_divide(lab)
    expected = torch.stack(seen[-1:-6:-1]).mean(0)
    torch.testing.assert_close(stage.loss[0], expected)
    assert stage.history.shape == (2, 5, lab.n) and stage.kept == 8


def test_normalised_losses():
    x = torch.tensor([2.0, 5.0, 3.0])
    assert D.normalised(x).tolist() == pytest.approx([0, 1, 1 / 3])
    assert D.normalised(torch.full((4,), 7.0)).tolist() == [0.0] * 4
    assert D.normalised(torch.full((2,), math.nan)).isnan().all()
    odd = D.normalised(torch.tensor([math.inf, 1.0, math.nan, 2.0]))
    assert odd[1] == 0 and odd[3] == 1 and not odd[[0, 2]].isfinite().any()


def test_splits():
    w = torch.tensor([0.2, 0.9, 0.5, 0.9, 0.0])
    def of(threshold, least): return [s.tolist() for s in D.split(w, threshold, least)]
    assert of(0.5, 2) == [[1, 3], [0, 2, 4]], "tau itself is not enough"
    assert of(0.9, 3) == [[1, 2, 3], [0, 4]] and of(0.9, 1) == [[1], [0, 2, 3, 4]]
    assert of(1.0, 99) == [[0, 1, 2, 3, 4], []] and of(0.95, 2) == [[1, 3], [0, 2, 4]]


def test_ramp():
    assert [D.ramp_up(50, t, 16) for t in (-1, 0, 8, 16, 17)] == [0, 0, 25, 50, 50]
    assert D.ramp_up(50, 0, 0) == 50


# --- one step and one epoch ---


def test_a_step_is_the_pseudo_code():
    "Targets and losses of one mixed batch, written sample by sample; BatchNorm does not couple them."
    lab, stage = started(guessing="running", batch=6)
    nets = [net.eval() for net in stage.nets]
    stage.nets[1].train = lambda mode=True: stage.nets[1]  # stays in evaluation mode while it learns
    x, u = lab.batch(torch.arange(6), ("weak",) * 2), lab.batch(torch.arange(50, 56), ("weak",) * 2)
    saved = lab.rng("mixup").get_state()
    found = stage.mixed_losses(lab, 1, x, u)
    lab.rng("mixup").set_state(saved)
    ratios, partner = D.draw_mixing(24, 4.0, "pair", lab.rng("mixup"))

    def p(net, image): return net(image[None])[0].softmax(0)
    def sharp(q): return q**2 / (q**2).sum()
    with torch.no_grad():
        images = [v[i] for b in (x, u) for v in b.views for i in range(6)]
        refined, guessed = [], []
        for i in range(6):
            w = stage.p_clean[0][x.index[i]]
            own = sum(p(nets[1], v[i]) for v in x.views) / 2
            refined.append(sharp(w * F.one_hot(lab.labels[x.index[i]], 10) + (1 - w) * own))
            guessed.append(sharp(sum(p(net, v[i]) for net in nets for v in u.views) / 4))
        targets = refined * 2 + guessed * 2
        probabilities, loss_x, loss_u = [], 0, 0
        for i, (r, j) in enumerate(zip(ratios, partner.tolist(), strict=True)):
            q = p(nets[1], r * images[i] + (1 - r) * images[j])
            t = r * targets[i] + (1 - r) * targets[j]
            probabilities.append(q)
            if i < 12: loss_x += -(t * q.log()).sum() / 12
            else: loss_u += (q - t).square().mean() / 12
        mean = torch.stack(probabilities).mean(0)
    torch.testing.assert_close(found[0], loss_x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], loss_u, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], -(10 * mean).log().mean(), atol=1e-5, rtol=1e-4)


def test_each_network_learns_from_the_other_ones_split(monkeypatch):
    lab, stage = started(batch=8)
    stage.p_clean[0] = (torch.arange(lab.n) < 30).float()
    stage.p_clean[1] = (torch.arange(lab.n) >= 90).float()
    seen = []
    original = D.CoDivide.mixed_losses
    def spy(self, lab, k, x, u):
        seen.append((k, x.index, u.index))
        return original(self, lab, k, x, u)
    monkeypatch.setattr(D.CoDivide, "mixed_losses", spy)
    for k in (0, 1): stage.learn(lab, k, 0)
    for k, x, u in seen:
        assert (stage.p_clean[1 - k][x] == 1).all() and (stage.p_clean[1 - k][u] == 0).all()
    for k, labelled in ((0, range(90, lab.n)), (1, range(30))):
        passed = torch.cat([x for j, x, _ in seen if j == k])
        assert sorted(passed.tolist()) == list(labelled), "every labelled sample once"


def test_both_splits_are_made_before_either_network_learns(monkeypatch):
    order = []
    for name in ("judge", "learn"):
        original = getattr(D.CoDivide, name)
        def spy(self, *args, name=name, original=original):
            order.append((name, args[0] if name == "judge" else args[1]))
            return original(self, *args)
        monkeypatch.setattr(D.CoDivide, name, spy)
    lab, stage = tasks.started(D.CoDivide(D.DivideMixConfig(**SMALL)), small_task())
    stage.epoch(lab, 1)
    assert order == [("judge", 0), ("judge", 1), ("learn", 0), ("learn", 1)]


def test_passes_of_an_epoch():
    lab, stage = started(batch=16)
    stage.p_clean[:] = (torch.arange(lab.n) < 50).float()
    lab.passes.update(forward=0, backward=0)
    stage.co_divide(lab)
    assert lab.passes == {"forward": 2 * lab.n, "backward": 0}
    stage.p_clean[:] = (torch.arange(lab.n) < 50).float()
    lab.passes.update(forward=0, backward=0)
    stage.learn(lab, 0, 0)
    x, u = 50, 4 * 16  # the unlabelled cycle goes on as long as there are labelled batches
    assert lab.passes == {"forward": 2 * (2 * x + 3 * u), "backward": 2 * (x + u)}


def test_guessing_leaves_gradients_and_the_other_network_alone():
    lab, stage = started()
    other = {k: v.clone() for k, v in stage.nets[1].state_dict().items()}
    stage.learn(lab, 0, 1)
    assert all(torch.equal(v, other[k]) for k, v in stage.nets[1].state_dict().items())
    assert all(p.grad is None for p in stage.nets[1].parameters())


def test_the_networks_start_apart():
    lab, stage = started()
    a, b = (net.state_dict()["head.weight"] for net in stage.nets)
    assert not torch.equal(a, b)


def test_records_come_from_memory():
    lab, stage = started()
    streams = {k: g.get_state() for k, g in lab._generators.items()}
    before, passes = stage_state(stage), dict(lab.passes)
    samples, extras = stage.samples(lab), stage.extras(lab)
    assert {"loss", "p_clean", "prediction", "corrected", "confidence"} == set(samples)
    assert all(v.shape == (lab.n,) for v in samples.values())
    assert extras["mixture_means"].shape == (1, 2) and extras["threshold"] == 0.5
    assert extras["mixture_means"][0, 0] <= extras["mixture_means"][0, 1]
    assert lab.passes == passes and stage_state(stage).keys() == before.keys()
    assert all(torch.equal(g.get_state(), streams[k]) for k, g in lab._generators.items())
    assert stage.features(lab).shape == (lab.n, stage.nets[0].feature_dim)
    assert stage.features(lab).abs().sum() > 0


# --- edges, each trained through ---


@pytest.mark.parametrize("changes", [dict(threshold=0.0), dict(threshold=1.0), dict(warmup=0), dict(views=1),
                                     dict(forwarded="labelled", lambda_u=0.0), dict(mixing="batch"),
                                     dict(average=5),
                                     dict(guessing="running"), dict(squares="sum"),
                                     dict(batch=1000, warmup_batch=1000),
                                     dict(warmup_penalty="negative entropy", lambda_u=0.0), dict(warmup=3)],
                         ids=lambda c: next(iter(c)) + str(next(iter(c.values()))))
def test_every_setting_trains_on(changes, tmp_path):
    run = fit(small_task(), tmp_path, **changes)
    rows = run.metrics.read()[0]
    assert len(rows) == 3 and all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    share = run.series("labelled")[-1]
    if changes.get("threshold") == 0.0: assert share > 0.9
    if changes.get("threshold") == 1.0: assert 0 < share <= 32 / 120
    json.dumps(run.result, allow_nan=False)


@pytest.mark.parametrize("noise", ["none", "symmetric:0", "symmetric:1", "pair-flip:1"])
def test_noise_rates_at_the_ends(noise, tmp_path):
    run = fit(small_task(noise), tmp_path)
    assert run.finished and all(map(math.isfinite, run.series("loss")))


def test_last_batches_of_one(tmp_path):
    task = small_task(n=150)
    n = len(task.train_index)
    lab, stage = started(task, batch=16)
    stage.p_clean[:] = (torch.arange(n) < 17).float()
    for k in (0, 1): assert all(map(math.isfinite, stage.learn(lab, k, 1).values()))
    stage.p_clean[:] = (torch.arange(n) < n - 1).float()
    assert all(map(math.isfinite, stage.learn(lab, 0, 1).values())), "one unlabelled sample"


@pytest.mark.parametrize("classes", [2, 100])
def test_two_and_a_hundred_classes(classes):
    lab, stage = started(tasks.drawn_task(classes))
    for epoch in range(3): assert all(map(math.isfinite, stage.epoch(lab, epoch).values()))


def test_soft_labels_that_are_one_hot_change_nothing():
    task = small_task()
    a, b = (started(t)[1] for t in (task, tasks.one_hot(task)))
    torch.testing.assert_close(a.p_clean, b.p_clean, atol=1e-5, rtol=0)
    assert torch.equal(a.corrected, b.corrected)


def test_a_network_that_has_diverged_is_named():
    lab, stage = started()
    torch.nn.init.constant_(stage.nets[1].head.weight, math.nan)
    with pytest.raises(BadInput, match="no loss of network 2 is finite: rate = 0.05"): stage.co_divide(lab)


def test_a_half_that_is_left_out_cannot_be_weighed():
    with pytest.raises(BadInput, match="lambda_u = 25.0 .* accepted: lambda_u = 0"):
        D.DivideMix.configured({"forwarded": "labelled"}).check(small_task())


def test_released_choices_can_be_overruled():
    config = D.DivideMix.configured({"variant": "released", "epochs": 7}).config
    assert (config.epochs, config.batch, config.mixing) == (7, 64, "batch")
    with pytest.raises(BadInput, match="variant = 'official'"):
        D.DivideMix.configured({"variant": "official"})


# --- the paper's settings ---


PAPER = {("cifar10", "symmetric"): (0, 25, 25, 50), ("cifar100", "symmetric"): (25, 150, 150, 150)}


@pytest.mark.parametrize("where, rate", list(itertools.product(PAPER, range(4))))
def test_settings_of_the_appendix(where, rate):
    dataset, kind = where
    noise = (0.2, 0.5, 0.8, 0.9)[rate]
    for name in (dataset, f"{dataset}-jpeg", f"{dataset}[5000]"):
        config = D.DivideMix.configured(recipe("divide-mix", name, kind, noise, "paper")).config
        assert config.lambda_u == PAPER[where][rate] and config.warmup == (10 if dataset == "cifar10" else 30)
        assert (config.threshold, config.average) == ((0.6, 5) if noise == 0.9 else (0.5, 1))
        assert (config.epochs, config.temperature, config.alpha, config.views) == (300, 0.5, 4.0, 2)
        assert config.warmup_penalty == "none" and config.oracle == "noise rate"


@pytest.mark.parametrize("dataset", ["cifar10", "cifar10-jpeg", "cifar100"])
def test_settings_for_asymmetric_noise(dataset):
    config = D.DivideMix.configured(recipe("divide-mix", dataset, "asymmetric", 0.4, "paper")).config
    assert config.lambda_u == 0 and config.warmup_penalty == "negative entropy"
    assert config.oracle == "noise type"


@pytest.mark.parametrize("preset", ["smoke", "laptop", "gpu"])
def test_other_presets_do_not_know_the_noise(preset):
    recipes = [recipe("divide-mix", d, kind, rate, preset) for d in ("digits",)
               for kind, rate in (("symmetric", 0.2), ("symmetric", 0.9), ("asymmetric", 0.4),
                                  ("none", None))]
    assert all(r == recipes[0] for r in recipes)
