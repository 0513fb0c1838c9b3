"CPC: kernels against slow loops, the order of its pseudo-code, and what must not disturb the networks."
import dataclasses
import json
import math

import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.contract import REGISTRY, stage_state
from lnl_bench.engine.mixture import fit_gaussians
from lnl_bench.engine.train import train
from lnl_bench.methods import cpc as C
from lnl_bench.methods.divide_mix import CoDivide, DivideMixConfig
from lnl_bench.methods.recipes import PRESETS, recipe

HOST = dict(net="cnn-digits", epochs=4, warmup=1, batch=32, warmup_batch=32, rate=0.05, ramp=2.0)
SMALL = HOST | dict(dimension=8, wait=0.25, prototype_rate=0.05)
NAMES = ("cpc", "cpc-agn", "cpc-awr", "cpc-contrast", "gmm-agn", "gmm-awr")


def started(task=None, **changes):
    return tasks.started(C.CleanByPrototypes(C.CPCConfig(**SMALL | changes)), task or tasks.digits_task())


def judged(**changes):
    "A lab, a stage whose mixtures have judged the samples, and what each network showed."
    lab, stage = started(**changes)
    stage.warm_up(lab)
    looks, stage.kept = [stage.look(lab, k) for k in (0, 1)], 1
    for k in (0, 1): stage.judge(k, looks[k][0])
    return lab, stage, looks


def drawn(n=40, k=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, k, generator=g, dtype=torch.double)
    labels, clean = torch.randint(k, (n,), generator=g), torch.rand(n, generator=g) < 0.6
    return scores, labels, clean, torch.rand(n, k, generator=g).softmax(1)


# --- kernels ---


def slow_loss(scores, labels, clean, p, alpha):
    "Eqs. (2) to (5), sample by sample."
    def s(i, k): return 1 / (1 + math.exp(-scores[i, k]))
    n, classes = scores.shape
    inside, outside = [i for i in range(n) if clean[i]], [i for i in range(n) if not clean[i]]
    l_x = l_u = l_p = 0.0
    for i in inside:
        for k in range(classes):
            y = labels[i]
            l_x -= (math.log(s(i, k)) if k == y else math.log(1 - s(i, k)) / classes) / len(inside)
    for i in outside: l_u -= math.log(1 - s(i, labels[i])) / len(outside)
    joined = []
    for i in outside:
        k = int(p[i].argmax())
        peers = [float(p[j, k]) for j in inside if labels[j] == k]
        if peers and p[i, k] > sum(peers) / len(peers): joined.append((i, k))
    for i, k in joined: l_p -= math.log(s(i, k)) / len(joined)
    return l_x + l_u + alpha * l_p, [i for i, _ in joined]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_loss_of_the_prototypes_by_loop(seed, alpha):
    scores, labels, clean, p = drawn(seed=seed)
    if seed == 4: clean &= labels != p.mean(0).argmax()  # a class without clean samples
    by_loop, joined = slow_loss(scores, labels, clean, p, alpha)
    joins = C.confident(p, labels, clean)
    assert joins.nonzero()[:, 0].tolist() == joined and len(joined) > 0
    found = C.prototype_loss(scores, labels, clean, p.argmax(1), joins, alpha)
    assert math.isclose(found, by_loop, rel_tol=1e-6)


def test_the_signs_are_those_of_the_text():
    "Descent on L_X draws to the own class and away from the others, on L_U away from the label's."
    scores = torch.zeros(1, 3, requires_grad=True)
    y = torch.tensor([1])
    assert (-torch.autograd.grad(C.clean_terms(scores, y).sum(), scores)[0]).sign().tolist() == [[-1, 1, -1]]
    assert (-torch.autograd.grad(C.noisy_terms(scores, y).sum(), scores)[0]).sign().tolist() == [[0, -1, 0]]
    found = C.prototype_loss(scores, torch.tensor([0]), torch.tensor([False]), y, torch.tensor([True]), 1.0)
    assert (-torch.autograd.grad(found, scores)[0]).sign().tolist() == [[-1, 1, 0]]


def test_gradient_by_finite_differences():
    scores, labels, clean, p = drawn(6, 3)
    scores.requires_grad_()
    def loss(s): return C.prototype_loss(s, labels, clean, p.argmax(1), ~clean, 0.7)
    assert torch.autograd.gradcheck(loss, scores)


def test_far_scores_stay_finite():
    scores, y = torch.tensor([[500.0, -500.0], [-500.0, 500.0]]), torch.tensor([0, 0])
    assert C.clean_terms(scores, y).tolist() == [0.0, 750.0]
    assert C.noisy_terms(scores, y).tolist() == [500.0, 0.0]
    assert C.divergence(torch.tensor([1.0, 0.0]), torch.tensor([-500.0, -500.0])).tolist() == [500.0, 0.0]


@pytest.mark.parametrize("which", ["clean", "noisy"])
def test_an_empty_set_adds_nothing(which):
    scores, labels, _, p = drawn(7, 3)
    clean = torch.full((7,), which == "clean")
    terms = C.clean_terms if which == "clean" else C.noisy_terms
    found = C.prototype_loss(scores, labels, clean, p.argmax(1), C.confident(p, labels, clean), 1.0)
    torch.testing.assert_close(found, terms(scores, labels).mean())


def test_mixtures_by_class_one_at_a_time():
    g = torch.Generator().manual_seed(3)
    labels, losses = torch.randint(4, (200,), generator=g), torch.rand(200, generator=g)
    labels[labels == 3] = 2
    labels[7] = 3  # alone in its class
    common = fit_gaussians(losses[None]).posterior(losses[None])[0]
    mixtures, p = C.class_aware(losses, labels, 5, common)
    for k in range(3):
        own = losses[labels == k]
        fit = fit_gaussians(own[None])
        torch.testing.assert_close(p[labels == k], fit.posterior(own[None])[0])
        torch.testing.assert_close(mixtures.means[k], fit.means[0])
    assert p[7] == common[7] and mixtures.means.isfinite().all()
    assert C.class_aware(losses, labels, 5, common, min_class=201)[1].equal(common)
    whole = C.class_aware(losses, labels, 5, common, min_gap=1.0)[1]
    assert (whole[labels != 3] == 1).all()


def test_start_at_class_means_by_loop():
    g = torch.Generator().manual_seed(1)
    cleaner = C.Cleaner(6, 4, 3, "linear", g)
    drawn_first = cleaner.prototypes.detach().clone()
    x, y = torch.randn(20, 6, generator=g), torch.arange(20) % 2
    clean = torch.arange(20) < 15
    C.start_at_means(cleaner, x, y, clean)
    with torch.no_grad():
        means = [torch.stack([cleaner.project(x[i]) for i in range(15) if y[i] == k]).mean(0) for k in (0, 1)]
    for k in (0, 1):
        away = means[k] - (means[0] + means[1]) / 2
        torch.testing.assert_close(cleaner.prototypes[k].detach(), away / away.norm())
    assert torch.equal(cleaner.prototypes[2], drawn_first[2])


def test_targets_of_the_contrast_by_loop():
    scores, labels, _, p = drawn(60, 4)
    p[::3] = F.one_hot(labels.roll(1), 4)[::3] * 0.96 + 0.01
    scores[::3] = 4 * p[::3]
    targets, used = C.contrast_targets(p, scores, labels)
    kinds = set()
    for i in range(60):
        q = [(p[i, k] + scores[i].exp()[k] / scores[i].exp().sum()) / 2 for k in range(4)]
        if max(q) > 0.8: expected = (q.index(max(q)), True)
        else: expected = (labels[i], q[labels[i]] > 1 / 4)
        kinds.add((bool(max(q) > 0.8), bool(expected[1])))
        assert (targets[i], used[i]) == expected
    assert len(kinds) == 3


def test_divergence_is_that_of_two_coins():
    g = torch.Generator().manual_seed(2)
    a, logit = torch.rand(9, generator=g), torch.randn(9, generator=g)
    coins = torch.distributions.Bernoulli(a), torch.distributions.Bernoulli(logits=logit)
    torch.testing.assert_close(C.divergence(a, logit), torch.distributions.kl_divergence(*coins))


# --- lessons and epochs ---


def test_lessons_leave_the_networks_and_their_randomness_alone(tmp_path):
    "With the mixture dividing, the networks are DivideMix's to the bit."
    task = tasks.digits_task()
    settings = SMALL | dict(split="mixture", mixture="agnostic", lessons=3)
    ours, theirs = C.CleanByPrototypes(C.CPCConfig(**settings)), CoDivide(DivideMixConfig(**HOST))
    labs = []
    for stage in (ours, theirs):
        labs.append(tasks.started(stage, task)[0])
        for epoch in range(4): numbers = stage.epoch(labs[-1], epoch)
    assert "loss_c" not in numbers and labs[0].passes == labs[1].passes
    for a, b in zip(ours.nets.parameters(), theirs.nets.parameters(), strict=True): assert torch.equal(a, b)
    assert torch.equal(ours.p_clean, theirs.p_clean) and torch.equal(ours.corrected, theirs.corrected)


def test_no_gradient_reaches_the_networks():
    lab, stage, looks = judged()
    for p in stage.nets.parameters(): p.grad = None
    before, cleaners = ([p.detach().clone() for p in m.parameters()] for m in (stage.nets, stage.cleaners))
    stage.clean(lab, looks)
    assert all(p.grad is None for p in stage.nets.parameters())
    assert all(torch.equal(p, b) for p, b in zip(stage.nets.parameters(), before, strict=True))
    assert all(not torch.equal(p, b) for p, b in zip(stage.cleaners.parameters(), cleaners, strict=True))


@pytest.mark.parametrize("k", [0, 1])
def test_a_cleaner_learns_from_the_other_networks_mixture(k):
    lab, stage, looks = judged()
    stage.believed[k] = 1.0
    stage.believed[1 - k] = (torch.arange(lab.n) < 50).float()
    p, everything = looks[k][0].softmax(1), torch.arange(lab.n)
    scores = stage.cleaners[k](looks[k][1])
    clean = everything < 50
    joins = C.confident(p, lab.labels, clean)
    expected = C.prototype_loss(scores, lab.labels, clean, p.argmax(1), joins, stage.config.guess_weight)
    torch.testing.assert_close(stage.lesson_loss(k, p)(scores, everything), expected)


@pytest.mark.parametrize("scored", ["after", "before"])
def test_scores_belong_to_the_prototypes_before_or_after_the_lessons(scored):
    lab, stage, looks = judged(scored=scored)
    def score(k):
        with torch.no_grad(): return stage.cleaners[k](looks[k][1])[torch.arange(lab.n), lab.labels]
    before = score(1)
    stage.clean(lab, looks)
    torch.testing.assert_close(stage.score[1], before if scored == "before" else score(1))


@pytest.mark.parametrize("split, mixture, wait, by_prototypes", [
    ("prototypes", "aware", 0.25, [False, True, True]), ("prototypes", "agnostic", 0.5, [False, False, True]),
    ("prototypes", "aware", 0.0, [True] * 3), ("prototypes", "none", 0.5, [True] * 3),
    ("mixture", "aware", 0.0, [False] * 3), ("prototypes", "aware", 1.0, [False] * 3)])
def test_who_divides_when(split, mixture, wait, by_prototypes):
    lab, stage = started(split=split, mixture=mixture, wait=wait)
    stage.epoch(lab, 0)
    assert stage.extras(lab) == {} and stage.features(lab) is stage.seen.values
    for epoch, prototypes in enumerate(by_prototypes, 1):
        numbers = stage.epoch(lab, epoch)
        assert torch.equal(stage.p_clean, stage.score.sigmoid() if prototypes else stage.believed)
        assert 0 <= numbers["agreement"] <= 1 and numbers["divergence"] >= 0
        assert math.isfinite(numbers["loss_c"])


def test_the_paper_waits_five_percent():
    assert C.waiting(C.CPCConfig().wait, 100, "aware") == 5 and C.waiting(0.1, 450, "agnostic") == 45


def test_the_rate_of_the_lessons_falls_with_the_networks():
    lab, stage = started()
    for epoch, rate in ((1, 0.05), (2, 0.005)):
        stage.epoch(lab, epoch)
        for teacher in (stage.teacher1, stage.teacher2):
            assert teacher.param_groups[0]["lr"] == pytest.approx(rate)


def test_records_come_from_memory():
    lab, stage = started()
    for epoch in (0, 1, 2): stage.epoch(lab, epoch)
    streams = {k: g.get_state() for k, g in lab._generators.items()}
    passes = dict(lab.passes)
    samples, extras, features = stage.samples(lab), stage.extras(lab), stage.features(lab)
    assert {"loss", "p_clean", "prediction", "corrected", "confidence"} == set(samples)
    assert extras["mixture_means"].shape == (10, 2) and extras["threshold"] == 0.5
    assert extras["prototypes"].shape == (10, 8) and features.shape == (lab.n, 8)
    assert lab.passes == passes
    assert all(torch.equal(g.get_state(), streams[k]) for k, g in lab._generators.items())
    assert {"cleaners", "teacher1", "teacher2", "believed", "score", "embedded"} <= set(stage_state(stage))


def test_features_and_prototypes_share_a_space():
    lab, stage, looks = judged()
    stage.clean(lab, looks)
    scores = stage.embedded.float() @ stage.cleaners[0].prototypes.detach().T
    with torch.no_grad(): exact = stage.cleaners[0](looks[0][1])
    torch.testing.assert_close(scores, exact, atol=0.05, rtol=0.02)


# --- edges, each trained through ---


def fit(task, folder, name="cpc", **changes):
    settings = {k: v for k, v in (SMALL | changes).items() if k not in REGISTRY[name].fixed}
    return train(REGISTRY[name].configured(settings), task, runs_dir=folder, progress="off")


SETTINGS = [dict(mixture="agnostic"), dict(mixture="none"), dict(split="mixture"), dict(first="means"),
            dict(first="means", mixture="none"), dict(projector="two layers"), dict(lessons=3),
            dict(wait=0.0),
            dict(scored="before"), dict(guess_weight=0.0), dict(min_gap=0.3), dict(min_class=1000),
            dict(threshold=1.0), dict(threshold=0.0), dict(warmup=0), dict(average=3), dict(dimension=1),
            dict(batch=1000), dict(view="none", views=1)]


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_every_setting_trains_on(changes, tmp_path):
    run = fit(tasks.digits_task(), tmp_path, **changes)
    rows = run.metrics.read()[0]
    assert len(rows) == 4 and all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    json.dumps(run.result, allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", ["none", "symmetric:1", "asymmetric:0.4"])
def test_noise_of_every_kind(name, noise, tmp_path):
    run = fit(tasks.digits_task(noise), tmp_path, name)
    assert run.finished and all(map(math.isfinite, run.series("loss")))


@pytest.mark.parametrize("classes", [2, 100])
def test_two_and_a_hundred_classes(classes):
    lab, stage = started(tasks.drawn_task(classes))
    for epoch in range(4): assert all(map(math.isfinite, stage.epoch(lab, epoch).values()))


def test_a_class_without_clean_samples():
    lab, stage, looks = judged()
    stage.believed[:] = (lab.labels != 3).float()
    assert math.isfinite(stage.clean(lab, looks)) and stage.score.isfinite().all()
    p = looks[0][0].softmax(1)
    assert not C.confident(p, lab.labels, lab.labels != 3)[p.argmax(1) == 3].any()


def test_soft_labels_that_are_one_hot_change_nothing():
    task, stages = tasks.digits_task(), []
    for t in (task, tasks.one_hot(task)):
        lab, stage = started(t)
        stage.co_divide(lab)
        stages.append(stage)
    torch.testing.assert_close(stages[0].score, stages[1].score, atol=1e-4, rtol=1e-4)


# --- names and recipes ---


def test_names_fix_what_they_stand_for():
    found = [REGISTRY[name].configured({}).config.mixture for name in NAMES]
    assert found == ["aware", "agnostic", "aware", "none", "agnostic", "aware"]
    with pytest.raises(BadInput, match="mixture = 'none' is not known; accepted: aware"):
        REGISTRY["cpc-awr"].configured({"mixture": "none"})
    with pytest.raises(BadInput, match="accepted: aware, agnostic"):
        REGISTRY["cpc"].configured({"split": "mixture", "mixture": "none"}).check(tasks.digits_task())


def test_settings_of_the_paper():
    def config(dataset, noise_type="symmetric", noise=0.5, name="cpc"):
        return REGISTRY[name].configured(recipe(name, dataset, noise_type, noise, "paper")).config
    for dataset, lambdas in (("cifar10", (0, 25, 25, 50)), ("cifar100", (25, 150, 150, 150))):
        for noise, lambda_u in zip((0.2, 0.5, 0.8, 0.9), lambdas, strict=True):
            c = config(dataset, noise=noise)
            assert (c.lambda_u, c.epochs, c.warmup, c.rate, c.batch) == (lambda_u, 450, 10, 0.02, 128)
            assert (c.mixture, c.threshold, c.oracle) == ("aware", 0.5, "noise rate")
            assert c.wait == (0.1 if (dataset, noise) == ("cifar100", 0.9) else 0.05)
    asym = config("cifar10", "asymmetric", 0.4)
    assert (asym.mixture, asym.lambda_u, asym.oracle, asym.guess_weight) == ("agnostic", 0, "noise type", 0)
    assert config("cifar10", "asymmetric", 0.4, "cpc-awr").mixture == "aware"
    clothing, web = config("clothing1m", "real", None), config("webvision-mini", "real", None)
    assert (clothing.mixture, clothing.epochs, clothing.threshold) == ("agnostic", 80, 0.7)
    assert (web.mixture, web.epochs, web.rate, web.threshold) == ("aware", 100, 0.01, 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_other_presets_do_not_know_the_noise(name):
    for preset in set(PRESETS) - {"paper"}:
        kinds = (("symmetric", 0.2), ("asymmetric", 0.4))
        found = [recipe(name, "digits", *noise, preset) for noise in kinds]
        assert found[0] == found[1] and found[0]["net"] == "cnn-digits" and "oracle" not in found[0]
        REGISTRY[name].configured(found[0])


def test_every_setting_of_its_own_has_a_source():
    inherited = {f.name for f in dataclasses.fields(DivideMixConfig)}
    assert all(f.metadata["source"] for f in dataclasses.fields(C.CPCConfig) if f.name not in inherited)
