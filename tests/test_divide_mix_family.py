"AugDesc, C2D, DivideMix with a trusted set: what each changes in DivideMix; chains with DMLP."
import dataclasses
import functools
import itertools
import math

import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.contract import REGISTRY, chain, load_stage_state, make_method, stage_state
from lnl_bench.engine.lab import Lab
from lnl_bench.engine.pretrain import features_of
from lnl_bench.engine.train import Stopped, train
from lnl_bench.methods import aug_desc as A
from lnl_bench.methods import c2d as C
from lnl_bench.methods import divide_mix as D
from lnl_bench.methods import divide_mix_trusted as T
from lnl_bench.methods.catalogue import configured
from lnl_bench.methods.recipes import recipe

SMALL = dict(net="cnn-digits", epochs=3, warmup=1, batch=32, warmup_batch=32, rate=0.05, ramp=2.0)
FEATURES = dict(feature_net="cnn-digits", feature_epochs=1, feature_batch=64, feature_rate=0.02)
METHODS = {"aug-desc-divide-mix": {}, "c2d-divide-mix": FEATURES, "divide-mix-trusted": {}}


small_task = functools.partial(tasks.digits_task, trusted=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return tmp_path_factory.mktemp("cache")


def started(name, cache, task=None, judged=True, **changes):
    "A lab and a started stage, which has judged the samples once."
    stage, = make_method(name, SMALL | METHODS[name] | changes).stages()
    lab, _ = tasks.started(stage, task or small_task(), cache_dir=cache)
    if judged: stage.co_divide(getattr(stage, "_wide", lab))
    return lab, stage


def fit(name, folder, cache, task=None, **changes):
    method = make_method(name, SMALL | METHODS[name] | changes)
    return train(method, task or small_task(), runs_dir=folder, cache_dir=cache, progress="off")


# --- all of them ---


@pytest.mark.parametrize("name", METHODS)
def test_records_come_from_memory(name, cache):
    lab, stage = started(name, cache)
    streams = {k: g.get_state() for k, g in lab._generators.items()}
    before, passes = {k: repr(v) for k, v in stage_state(stage).items()}, dict(lab.passes)
    samples, extras = stage.samples(lab), stage.extras(lab)
    assert set(samples) == {"loss", "p_clean", "prediction", "corrected", "confidence"}
    assert all(v.shape == (lab.n,) for v in samples.values())
    assert extras["mixture_means"].shape == (1, 2) and 0 < extras["threshold"] < 1
    assert stage.features(lab).shape == (len(lab.shown), stage.nets[0].feature_dim)
    assert lab.passes == passes and {k: repr(v) for k, v in stage_state(stage).items()} == before
    assert all(torch.equal(g.get_state(), streams[k]) for k, g in lab._generators.items())


@pytest.mark.parametrize("name", METHODS)
def test_state_round_trips(name, cache):
    lab, stage = started(name, cache)
    state = {k: v for k, v in stage_state(stage).items()}
    _, other = started(name, cache, judged=False)
    load_stage_state(other, state)
    for k in ("loss", "p_clean", "history", "corrected"):
        assert torch.equal(getattr(stage, k), getattr(other, k)), k
    for a, b in zip(stage.nets.parameters(), other.nets.parameters(), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("changes", [dict(threshold=0.0), dict(threshold=1.0), dict(warmup=0), dict(views=1),
                                     dict(forwarded="labelled", lambda_u=0.0), dict(average=5),
                                     dict(guessing="running"), dict(batch=1000, warmup_batch=1000),
                                     dict(variant="released", epochs=3, batch=32)],
                         ids=lambda c: next(iter(c)) + str(next(iter(c.values()))))
def test_every_setting_trains_on(name, changes, tmp_path, cache):
    run = fit(name, tmp_path, cache, **changes)
    rows = run.metrics.read()[0]
    assert len(rows) == 3 and all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("noise", ["none", "symmetric:1"])
def test_noise_rates_at_the_ends(name, noise, tmp_path, cache):
    run = fit(name, tmp_path, cache, small_task(noise))
    assert run.finished and all(map(math.isfinite, run.series("loss")))


@pytest.mark.parametrize("name", METHODS)
def test_released_choices_can_be_overruled(name):
    method = make_method(name, METHODS[name] | {"net": "cnn-digits", "variant": "released", "alpha": 2.0})
    assert (method.config.mixing, method.config.alpha) == ("batch", 2.0)
    assert make_method(name, METHODS[name] | {"net": "cnn-digits"}).config.mixing == "pair"


# --- AugDesc ---


def test_each_purpose_has_its_view(cache, monkeypatch):
    seen = []
    original = Lab.view
    def spy(lab, name, rows):
        seen.append((name, len(rows)))
        return original(lab, name, rows)
    monkeypatch.setattr(Lab, "view", spy)
    lab, stage = started("aug-desc-divide-mix", cache, judged=False, warmup_view="strong", loss_view="none",
                         guess_view="weak-reflect", view="randaugment", batch=64)
    stage.epoch(lab, 0)
    assert {name for name, _ in seen} == {"strong"} and sum(n for _, n in seen) == 2 * lab.n
    seen.clear()
    stage.epoch(lab, 1)
    names = [name for name, _ in seen]
    assert names.count("randaugment") == names.count("weak-reflect") > 0 and set(names[:2]) == {"none"}
    assert sum(n for name, n in seen if name == "none") == 2 * lab.n


def test_with_equal_views_it_is_divide_mix_with_fresh_views_for_targets(cache):
    "Same networks, split and targets as DivideMix where images do not change from view to view."
    plain = dict(view="none", guessing="running")
    same = plain | dict(guess_view="none", loss_view="none", warmup_view="none")
    lab, stage = started("aug-desc-divide-mix", cache, **same)
    other_lab = Lab(small_task(), cache_dir=cache)
    other = D.CoDivide(D.DivideMixConfig(**SMALL | plain))
    other.start(other_lab)
    other.co_divide(other_lab)
    for epoch in range(3):
        a, b = stage.epoch(lab, epoch), other.epoch(other_lab, epoch)
        assert a == pytest.approx(b, rel=1e-4), epoch
    assert torch.equal(stage.corrected, other.corrected)


def test_a_batch_without_unlabelled_images(cache):
    lab, stage = started("aug-desc-divide-mix", cache)
    x = lab.batch(torch.arange(6), stage.batch_views)
    assert len(stage.targets(lab, 0, x, None)) == 1 and A.looked_at(None, 2) is None
    assert stage.mixed_losses(lab, 0, x, None)[1] == 0


PRESETS = {("cifar10", "symmetric", 0.2): (0, 300, 150), ("cifar10", "symmetric", 0.5): (25, 300, 150),
           ("cifar10", "symmetric", 0.8): (25, 350, 200), ("cifar10", "symmetric", 0.9): (50, 350, 250),
           ("cifar10", "asymmetric", 0.4): (0, 350, 250), ("cifar100", "symmetric", 0.2): (25, 400, 300),
           ("cifar100", "symmetric", 0.5): (150, 400, 300), ("cifar100", "symmetric", 0.8): (150, 400, 300),
           ("cifar100", "symmetric", 0.9): (150, 400, 300), ("clothing1m", "human", None): (0, 80, 40)}


@pytest.mark.parametrize("where", PRESETS, ids=lambda w: "-".join(map(str, w)))
def test_aug_desc_has_its_presets(where):
    c = make_method("aug-desc-divide-mix", recipe("aug-desc-divide-mix", *where, "paper")).config
    weight, epochs, switch = PRESETS[where]
    assert (c.lambda_u, c.epochs) == (weight, epochs)
    rates = [D.learning_rate(c.schedule, c.rate, epoch / c.epochs) for epoch in (switch - 1, switch)]
    assert rates == pytest.approx([c.rate, c.rate / 10])
    assert (c.threshold, c.average) == ((0.6, 5) if where[2] == 0.9 else (0.5, 1))
    assert c.warmup == {"cifar10": 10, "cifar100": 30, "clothing1m": 1}[where[0]]
    assert (c.view, c.guess_view, c.loss_view, c.warmup_view) == ("strong", "weak", "weak", "weak")
    assert (c.warmup_penalty == "none") == (where[1] == "symmetric")


# --- C2D ---


def test_both_networks_start_from_the_encoder(cache):
    lab, stage = started("c2d-divide-mix", cache, judged=False)
    expected = features_of(lab, stage.config).net.body.state_dict()
    for net in stage.nets:
        for name, value in net.body.state_dict().items(): assert torch.equal(value, expected[name]), name
        assert all(p.requires_grad for p in net.parameters())
    heads = [net.head.weight for net in stage.nets]
    assert not torch.equal(*heads)


def test_an_untrained_start_is_another_one(cache):
    bodies = [started("c2d-divide-mix", cache, judged=False, representation=r)[1].nets[0].body.state_dict()
              for r in ("simclr", "moco", "random")]
    weights = [next(v for v in body.values() if v.ndim == 4) for body in bodies]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(weights, 2))


def test_features_are_those_of_dmlp(cache):
    lab = Lab(small_task(), cache_dir=cache)
    dmlp = make_method("dmlp", FEATURES)
    c2d = make_method("c2d-divide-mix", {"net": "cnn-digits"} | FEATURES)
    assert features_of(lab, dmlp.config).key == features_of(lab, c2d.config).key


def test_pixels_and_another_network_are_refused():
    with pytest.raises(BadInput, match="representation = 'pixels'"):
        make_method("c2d-divide-mix", {"representation": "pixels"})
    with pytest.raises(BadInput, match="net = 'cnn-small' cannot start .* 'resnet18'"):
        make_method("c2d-divide-mix", {"net": "cnn-small"})


def test_clipping_is_of_the_warm_up_alone(cache, monkeypatch):
    calls = []
    original = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *a: calls.append(a[1]) or original(*a))
    lab, stage = started("c2d-divide-mix", cache, judged=False, clip=0.25)
    stage.epoch(lab, 0)
    assert calls == [0.25] * (2 * math.ceil(lab.n / 32))
    calls.clear()
    stage.epoch(lab, 1)
    assert not calls


def test_thresholds_stay_inside():
    for w in (torch.rand(50), torch.tensor([0.0, 1.0]), torch.tensor([1e-7, 1.0])):
        for threshold in (0.0, 0.03, 0.5, 1.0):
            labelled, unlabelled = D.split(w, C.inside(threshold, w), 1)
            assert len(labelled) and len(unlabelled)
    assert C.inside(0.5, torch.tensor([0.1, 0.9])) == 0.5


def test_in_turn_uses_what_the_first_has_just_learnt(cache):
    lab, stage = started("c2d-divide-mix", cache, judging="in turn")
    weights = []
    original = stage.look
    def spy(lab, k):
        weights.append((k, stage.nets[0].head.weight.detach().clone()))
        return original(lab, k)
    stage.look = spy
    stage.divide_and_learn(lab, 0)
    assert [k for k, _ in weights] == [1, 0] and not torch.equal(weights[0][1], weights[1][1])
    assert torch.equal(stage.loss[0], stage.history[0, 0]) and stage.kept == 2


def test_iterations_reach_the_mixture(cache, monkeypatch):
    seen = []
    original = D.fit_gaussians
    monkeypatch.setattr(D, "fit_gaussians", lambda x, **o: seen.append(o["max_iter"]) or original(x, **o))
    started("c2d-divide-mix", cache)
    started("aug-desc-divide-mix", cache)
    assert seen == [200, 200, 10, 10]


C2D_PAPER = {("cifar10", "symmetric", 0.2): (0, 0.5, 1), ("cifar10", "symmetric", 0.9): (50, 0.5, 5),
             ("cifar100", "symmetric", 0.8): (500, 0.03, 1), ("cifar10", "asymmetric", 0.4): (0, 0.5, 1),
             ("cifar100", "asymmetric", 0.4): (150, 0.5, 1), ("cifar10-jpeg", "symmetric", 0.5): (25, 0.5, 1)}


@pytest.mark.parametrize("where", C2D_PAPER, ids=lambda w: "-".join(map(str, w)))
def test_c2d_has_its_published_settings(where):
    c = make_method("c2d-divide-mix", recipe("c2d-divide-mix", *where, "paper")).config
    assert (c.lambda_u, c.threshold, c.average) == C2D_PAPER[where]
    assert (c.epochs, c.warmup, c.net, c.feature_net) == (360, 5, "resnet18", "resnet18")
    assert (c.warmup_penalty == "none") == (where[1] == "symmetric") and c.oracle != "none"


# --- with a trusted set ---


def test_trusted_images_follow_with_their_labels():
    task = small_task()
    lab = Lab(task)
    wide, n = T.with_trusted(lab), lab.n
    assert wide.n == n + len(task.trusted_index) and lab.n == n and len(lab.labels) == n
    expected = lab.view("none", task.trusted_index)
    assert torch.equal(wide.batch(torch.arange(n, wide.n), ("none",)).images, expected)
    assert wide.labels[n:].tolist() == task.trusted_labels.tolist() and wide.passes is lab.passes
    soft = T.with_trusted(Lab(tasks.one_hot(task)))
    assert torch.equal(soft.labels.argmax(1), wide.labels)


def test_trusted_images_are_always_labelled_and_keep_their_label(cache, monkeypatch):
    lab, stage = started("divide-mix-trusted", cache, judged=False)
    seen, original = [], D.CoDivide.mixed_losses
    def spy(self, lab, k, x, u):
        seen.append((k, x.index, torch.empty(0) if u is None else u.index))
        return original(self, lab, k, x, u)
    monkeypatch.setattr(D.CoDivide, "mixed_losses", spy)
    for epoch in range(3):
        seen.clear()
        stage.epoch(lab, epoch)
        if epoch == 0: continue
        for k in (0, 1):
            x = torch.cat([x for which, x, _ in seen if which == k])
            u = torch.cat([u for which, _, u in seen if which == k])
            assert set(range(lab.n, stage._wide.n)) <= set(x.tolist()) and (u < lab.n).all()
    assert (stage.p_clean[:, lab.n:] == 1).all() and (stage.p_clean[:, :lab.n] < 1).any()
    assert torch.equal(stage.corrected[lab.n:], lab.task.trusted_labels)


def test_as_given_forgets_which_they_were(cache):
    lab, stage = started("divide-mix-trusted", cache, trusted="as given")
    other = started("divide-mix-trusted", cache)[1]
    assert torch.equal(stage.loss, other.loss)
    assert torch.equal(stage.p_clean[:, :lab.n], other.p_clean[:, :lab.n])
    assert (stage.p_clean[:, lab.n:] < 1).any()


def test_exports_are_of_the_training_samples(tmp_path, cache):
    task = small_task()
    run = fit("divide-mix-trusted", tmp_path, cache, task)
    lines = (run.path / "labels.csv").read_text().splitlines()
    assert len(lines) == 1 + task.n
    assert run.result["label_accuracy_before"] is not None


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8, 0.9])
def test_trusted_has_the_settings_of_divide_mix(rate):
    for dataset, preset in itertools.product(("digits", "cifar10", "cifar100"), ("laptop", "gpu", "paper")):
        where = (dataset, "symmetric", rate, preset)
        assert recipe("divide-mix-trusted", *where) == recipe("divide-mix", *where)


# --- chains ---


@pytest.fixture(scope="module")
def chained():
    "Chains of DMLP with the family, registered for this module."
    names = []
    for part in ("aug-desc-divide-mix", "c2d-divide-mix", "divide-mix-trusted"):
        names.append(f"dmlp-{part}-for-tests")
        chain(names[-1], "dmlp", part, "test")
    yield names
    for name in names: REGISTRY.pop(name)


@pytest.mark.parametrize("which", range(4))
def test_chains_of_dmlp_train_through(which, chained, tmp_path, cache):
    name, task = (["dmlp-divide-mix", *chained])[which], small_task(n=300)
    method = configured(name, task, "smoke")
    run = train(method, task, runs_dir=tmp_path, cache_dir=cache, preset="smoke", progress="off")
    rows = run.metrics.read()[0]
    last = make_method(name.removeprefix("dmlp-").removesuffix("-for-tests")).stages()[0].name
    assert run.finished and [r["stage"] for r in rows] == ["purify"] * 10 + [last] * 4
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    assert len((run.path / "labels.csv").read_text().splitlines()) == 1 + task.n
    assert run.result["best"] is not None and run.result["label_accuracy_after"] is not None


def test_the_second_stage_learns_from_purified_labels(cache):
    task = small_task(n=300)
    lab = Lab(task, cache_dir=cache)
    purify, divide = configured("dmlp-divide-mix", task, "smoke").stages()
    purify.start(lab)
    purify.epoch(lab, 0)
    purify.labels.copy_(F.one_hot((lab.labels + 1) % 10, 10).float())
    before = lab.labels.clone()
    lab.publish(purify.name, purify.result(lab))
    divide.start(lab)
    assert torch.equal(divide._labels.argmax(1), (before + 1) % 10)


def test_a_chain_stopped_in_its_second_stage_resumes_to_the_same_bits(tmp_path, cache):
    task = small_task(n=200)
    def go(where, poll=None):
        return train(configured("dmlp-divide-mix", task, "smoke"), task, run_dir=tmp_path / where, poll=poll,
                     cache_dir=cache, preset="smoke", progress="off")
    whole = go("whole")
    def stop():
        done = (tmp_path / "parts" / "metrics.jsonl")
        if done.exists() and len(done.read_text().splitlines()) == 12: raise Stopped
    assert not go("parts", stop).finished
    parts = go("parts")
    assert parts.finished
    for name in ("metrics.jsonl", "labels.csv"):
        assert (parts.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_settings_are_described():
    for cls in (A.AugDescConfig, C.C2DConfig, T.TrustedDivideMixConfig):
        for field in dataclasses.fields(cls): assert field.metadata["help"], (cls, field.name)
