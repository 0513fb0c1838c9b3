"FaMUS with two networks: weighted losses, judges, gates and weighers of both networks, variants, edges."

import copy
import math

import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.contract import REGISTRY, load_stage_state, make_method, stage_state
from lnl_bench.engine.metagrad import TrainingPass, Trusted, through_logits
from lnl_bench.engine.nets import make_net
from lnl_bench.engine.runs import load_arrays
from lnl_bench.engine.train import Stopped, train
from lnl_bench.methods import famus
from lnl_bench.methods import famus_two as T
from lnl_bench.methods.catalogue import configured
from lnl_bench.methods.divide_mix import CoDivide, prior_penalty
from lnl_bench.methods.mw_net import batch_weights, make_weigher

SMALL = dict(net="cnn-digits", epochs=3, warmup=1, batch=32, warmup_batch=32, trusted_batch=24, rate=0.05,
             lambda_u=5.0, ramp=2.0, meta_rate=0.01, schedule="cosine")


def started(task=None, judged=True, **changes):
    "A lab and a started stage, which has judged the samples once."
    torch.manual_seed(0)
    stage, = make_method("famus", SMALL | changes).stages()
    lab, _ = tasks.started(stage, task or tasks.digits_task("symmetric:0.4"))
    if judged: stage.co_divide(lab)
    return lab, stage


def fit(folder, task=None, **changes):
    method = make_method("famus", SMALL | changes)
    return train(method, task or tasks.digits_task("symmetric:0.4"), runs_dir=folder, progress="off")


def drawn(N=14, n=8, dtype=torch.float64):
    "A mixed batch (N, 1, 8, 8) of random images with soft labels, n of it labelled."
    def soft(): return torch.rand(N, 10, dtype=dtype).softmax(1)
    return T.Mixed(torch.randn(N, 1, 8, 8, dtype=dtype), soft(), soft(), n)


# --- kernels ---


@pytest.mark.parametrize("squares", ["mean", "sum"])
def test_weighted_losses_by_a_slow_loop(squares):
    batch, z, v = drawn(9, 4), torch.randn(9, 10).double(), torch.rand(9).double()
    p, x, u = z.softmax(1), 0.0, 0.0
    for i in range(4): x += v[i] * -(batch.targets[i] * p[i].log()).sum()
    for i in range(4, 9):
        u += v[i] * (p[i] - batch.guesses[i]).square().sum() / (10 if squares == "mean" else 1)
    found = T.weighted_losses(z, v, batch, squares)
    torch.testing.assert_close(found[0], 9 / 4 * x)
    torch.testing.assert_close(found[1], 9 / 5 * u)


@pytest.mark.parametrize("weighting", ["paper", "normalised"])
@pytest.mark.parametrize("asked", ["all", "head"])
def test_the_meta_gradient_is_that_of_a_real_step(weighting, asked):
    "Against finite differences in double precision; layers that are not asked keep the old weigher's step."
    torch.manual_seed(1)
    net, rate, lambda_u = make_net("cnn-digits", 10, channels=1, size=8, seed=1).double(), 0.1, 4.0
    with torch.no_grad(): net.head.weight *= 20  # losses that differ
    batch, judges = drawn(), drawn(9, 9)
    config, weigher = T.FaMUSConfig(weighting=weighting), make_weigher(4, 2).double()
    trusted = Trusted(judges.images, lambda z: F.cross_entropy(z, judges.targets) + prior_penalty(z))
    def chosen(names): return [k for k in names if asked == "all" or k.startswith("head")]
    first = TrainingPass(net, batch.images)
    found = T.judged_gradient(weigher, first, batch, trusted, rate, lambda_u, config, choose=chosen)

    def gradients(weigher):
        twin = copy.deepcopy(net)
        T.training_loss(twin(batch.images), weigher, batch, lambda_u, config).backward()
        return {k: p.grad for k, p in twin.named_parameters()}

    base = gradients(weigher)

    def judged_after(weigher):
        twin, new = copy.deepcopy(net), gradients(weigher)
        on = set(chosen(new))
        with torch.no_grad():
            for k, p in twin.named_parameters(): p.sub_(rate * (new if k in on else base)[k])
            return trusted.loss(twin(judges.images)).item()

    for (name, p), gradient in zip(weigher.named_parameters(), found.gradients, strict=True):
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                moved = copy.deepcopy(weigher)
                with torch.no_grad(): moved.get_parameter(name).view(-1)[i] += sign * 1e-5
                ends.append(judged_after(moved))
            numeric = (ends[0] - ends[1]) / 2e-5
            assert abs(numeric - gradient.view(-1)[i].item()) < 2e-5 * found.norm, (name, i)


def test_the_derivative_by_a_weight_is_what_the_page_says():
    torch.manual_seed(2)
    net, batch = make_net("cnn-digits", 10, channels=1, size=8, seed=2).double().eval(), drawn(6, 4)
    v = torch.rand(6).double().requires_grad_()
    direction = {k: torch.randn_like(p) for k, p in net.named_parameters()}  # gain * the judges' gradient
    _, tangent = torch.func.jvp(
        lambda w: torch.func.functional_call(net, w, (batch.images,)),
        ({k: p.detach() for k, p in net.named_parameters()},), (direction,))
    def loss(z): return (lambda x, u: x + 3.0 * u)(*T.weighted_losses(z, v, batch))
    found, = through_logits(loss, net(batch.images), tangent, [v])
    for i in range(6):
        z = net(batch.images[i:i + 1])
        if i < 4: one = 6 / 4 * F.cross_entropy(z, batch.targets[i:i + 1])
        else: one = 3.0 * 6 / 2 * (z.softmax(1) - batch.guesses[i]).square().mean()
        slopes = torch.autograd.grad(one, list(net.parameters()))
        products = [(d * g).sum() for d, g in zip(direction.values(), slopes, strict=True)]
        torch.testing.assert_close(found[i], sum(products))


@pytest.mark.parametrize("matched", ["means", "means and deviations"])
def test_the_distance_of_gradients_by_a_slow_loop(matched):
    mine, theirs = ((torch.randn(5, 7), torch.randn(5)) for _ in range(2))
    if matched == "means": slow = sum((mine[0][c].mean() - theirs[0][c].mean()) ** 2 for c in range(5))
    else:
        rows = [(mine[0][c], theirs[0][c], 5) for c in range(5)] + [(mine[1], theirs[1], 1)]
        slow = sum(((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2) / k for a, b, k in rows)
    torch.testing.assert_close(T.gradient_distance(mine, theirs, matched), slow)


def test_the_weigher_is_taught_by_judges_and_by_the_distance():
    "Its gradient is the meta-gradient with lambda_g = 0, and another one otherwise."
    seen = {}
    for lambda_g in (0.0, 0.1, 10.0):
        lab, stage = started(lambda_g=lambda_g, strategy="last:99", weighting="normalised")
        x, u, judge = (lab.batch(torch.arange(i, i + 8), stage.batch_views) for i in (0, 20, 40))
        _, meta = stage.one_step(lab, 0, x, u, judge, 2.0)
        steps = [p.grad.clone() for p in stage.weighers[0].parameters()]
        same = [torch.equal(a, b) for a, b in zip(steps, meta.gradients, strict=True)]
        assert all(same) if not lambda_g else not any(same)
        seen[lambda_g] = [torch.cat([g.flatten() for g in found]) for found in (steps, meta.gradients)]
    for lambda_g in (0.1, 10.0): torch.testing.assert_close(seen[lambda_g][1], seen[0.0][1])
    extra = {k: step - meta for k, (step, meta) in seen.items()}
    near = 1e-3 * extra[10.0].norm().item()
    torch.testing.assert_close(extra[10.0], 100 * extra[0.1], rtol=1e-2, atol=near)


# --- who learns from whom ---


def test_each_network_has_the_other_ones_split_and_judges():
    lab, stage = started()
    stage.p_clean[0] = (torch.arange(lab.n) < 50).float()
    stage.p_clean[1] = (torch.arange(lab.n) >= 90).float()
    assert stage.parts(0)[0].tolist() == stage.pseudo_clean(0).tolist() == list(range(90, lab.n))
    assert stage.parts(1)[0].tolist() == stage.pseudo_clean(1).tolist() == list(range(50))
    _, own = started(judges_by="own network")
    own.p_clean.copy_(stage.p_clean)
    assert own.pseudo_clean(0).tolist() == list(range(50)) and own.parts(0)[0].tolist()[0] == 90
    stage.config = T.FaMUSConfig(**SMALL, meta_threshold=1.0)
    assert len(stage.pseudo_clean(0)) == 24


def test_judges_are_pseudo_clean_and_nothing_else(monkeypatch):
    lab, stage = started()
    seen, trusted = set(), T.WeighDivided.trusted
    def spy(self, lab, k, batch):
        seen.update(batch.index.tolist())
        return trusted(self, lab, k, batch)
    monkeypatch.setattr(T.WeighDivided, "trusted", spy)
    stage.learn(lab, 0, since=0)
    assert seen and seen <= set(stage.pseudo_clean(0).tolist())


def test_one_network_learns_at_a_time_with_its_own_weigher_and_gates():
    lab, stage = started()
    def state(k): return copy.deepcopy([m[k].state_dict() for m in (stage.nets, stage.weighers, stage.gates)])
    def same(a, b): return [all(torch.equal(p[k], q[k]) for k in p) for p, q in zip(a, b, strict=True)]
    before = [state(k) for k in (0, 1)]
    stage.learn(lab, 0, since=0)
    assert same(before[0], state(0)) == [False] * 3 and same(before[1], state(1)) == [True] * 3
    assert not stage.weight[0].eq(1).all() and stage.weight[1].eq(1).all()
    stage.learn(lab, 1, since=0)
    assert same(before[1], state(1)) == [False] * 3 and not stage.weight[1].eq(1).all()


def test_with_equal_weights_the_step_is_divide_mix():
    "A weigher that cannot tell losses apart, on one batch: the loss is DivideMix's of the same mixed batch."
    lab, stage = started(weighting="normalised", strategy="last:99")
    for p in stage.weighers.parameters(): torch.nn.init.zeros_(p)
    x, u = (lab.batch(torch.arange(i, i + 8), stage.batch_views) for i in (0, 20))
    mixed, z = stage.mixed(lab, 0, x, u), torch.randn(32, 10)
    weights = batch_weights(stage.weighers[0](torch.rand(32)), "normalised")
    loss_x, loss_u = T.weighted_losses(z, weights, mixed)
    torch.testing.assert_close(loss_x, F.cross_entropy(z[:16], mixed.targets[:16]))
    torch.testing.assert_close(loss_u, (z[16:].softmax(1) - mixed.guesses[16:]).square().mean())


def test_refined_labels_and_guesses_by_a_slow_loop(monkeypatch):
    "With ratios of one nothing is mixed."
    monkeypatch.setattr(T, "draw_mixing", lambda n, *_: (torch.ones(n), torch.arange(n).flip(0)))
    lab, stage = started(guessing="running")
    x, u = (lab.batch(torch.arange(i, i + 6), ("none", "none")) for i in (0, 20))
    for batch in (x, u): stage.p_clean[1, batch.index] = torch.linspace(0, 1, 6)
    mixed = stage.mixed(lab, 0, x, u)
    assert mixed.labelled == 12 and torch.equal(mixed.images, torch.cat((*x.views, *u.views)))
    for place, batch in ((0, x), (12, u)):
        with torch.no_grad(): own, other = (net.eval()(batch.images).softmax(1) for net in stage.nets)
        for i, w in enumerate(torch.linspace(0, 1, 6)):
            mixture, mean = w * F.one_hot(batch.labels[i], 10) + (1 - w) * own[i], (own[i] + other[i]) / 2
            for at in (place + i, place + 6 + i):  # both views
                torch.testing.assert_close(mixed.targets[at], mixture**2 / (mixture**2).sum())
                torch.testing.assert_close(mixed.guesses[at], mean**2 / (mean**2).sum())


def test_all_of_a_batch_is_mixed_with_the_same_partners(monkeypatch):
    monkeypatch.setattr(T, "draw_mixing", lambda n, *_: (torch.full((n,), 0.75), torch.arange(n).flip(0)))
    lab, stage = started()
    x, u = (lab.batch(torch.arange(i, i + 4), ("none", "none")) for i in (0, 20))
    mixed, images = stage.mixed(lab, 0, x, u), torch.cat((*x.views, *u.views))
    torch.testing.assert_close(mixed.images, 0.75 * images + 0.25 * images.flip(0))
    for labels in (mixed.targets, mixed.guesses):  # l' a + (1 - l') b and l' b + (1 - l') a add up to a + b
        whole = (labels[:8] + labels.flip(0)[:8])
        torch.testing.assert_close(whole.sum(1), torch.full((8,), 2.0))
    assert not torch.equal(mixed.targets, mixed.guesses)


def test_weights_are_noted_of_the_sample_whose_view_it_was():
    lab, stage = started()
    x, u = lab.batch(torch.tensor([3, 1]), ("none",) * 2), lab.batch(torch.tensor([7]), ("none",) * 2)
    relative = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5, 1.5])  # 3, 1, 3, 1, 7, 7
    means = stage.note_weights(1, x, u, relative, 4)
    assert stage.weight[1, [3, 1, 7]].tolist() == [2.0, 3.0, 1.0] and [m.item() for m in means] == [2.5, 1.0]
    assert stage.note_weights(1, x, None, relative[:4], 4)[1] == 0


def test_a_larger_part_is_seen_once_and_a_smaller_one_comes_round():
    lab, stage = started(batch=10)
    stage.p_clean[1] = (torch.arange(lab.n) < 20).float()
    seen, one_step = {"x": [], "u": []}, T.WeighDivided.one_step
    def spy(lab, k, x, u, judge, lambda_u):
        seen["x"] += x.index.tolist()
        seen["u"] += u.index.tolist()
        return one_step(stage, lab, k, x, u, judge, lambda_u)
    stage.one_step = spy
    stage.learn(lab, 0, since=0)
    assert sorted(seen["u"]) == list(range(20, lab.n)) and len(seen["x"]) == 10 * math.ceil((lab.n - 20) / 10)


# --- gates ---


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_gates_learn_from_the_trusted_loss_as_the_virtual_step_is_written(variant, monkeypatch):
    "By autograd through w - alpha r g (on) and w - alpha (1 - r) g (off), for each gate."
    lab, stage = started(variant=variant, lambda_g=0.0, candidates=5)
    sampler, told, gate_loss = stage._samplers[0], {}, famus.gate_loss
    def spy(r, gains, *rest):
        told.update(r=r.detach().round(), gains=gains, gradients=sampler.gradients)
        return gate_loss(r, gains, *rest)
    monkeypatch.setattr(famus, "gate_loss", spy)
    x, u, judge = (lab.batch(torch.arange(i, i + 8), stage.batch_views) for i in (0, 20, 40))
    mixed, judges = stage.mixed(lab, 0, x, u), stage.trusted(lab, 0, judge)
    first = TrainingPass(stage.nets[0].train(), mixed.images)
    stage.teach(0, first, mixed, judges, 2.0)
    rate, g, r = stage.optimiser1.param_groups[0]["lr"], told["gradients"], told["r"].requires_grad_()
    ahead = {k: w.detach() - rate * g[k] for k, w in first.weights.items()}
    for i, names in enumerate(sampler.gated):
        scale = r[i] if r[i] > 0.5 else 1 - r[i]
        ahead |= {k: first.weights[k].detach() - rate * scale * g[k] for k in names}
    (slope,) = torch.autograd.grad(judges.at(stage.nets[0], ahead, first.amp), r)
    expected = torch.where(r > 0.5, 1, -1) * told["gains"]
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-6)
    assert slope.any() and len(slope) == (3 if variant == "released" else 5)


def test_gates_that_learn_from_the_count_are_not_told_of_the_trusted_loss():
    lab, stage = started(gates_learn="count", lambda_r=0.0)
    before = copy.deepcopy(stage.gates.state_dict())
    stage.learn(lab, 0, since=0)
    for k, v in stage.gates.state_dict().items(): assert torch.equal(before[k], v)


def test_the_released_gates():
    _, stage = started(variant="released")
    tensors = [k for k, _ in stage.nets[0].named_parameters()]
    sampler = stage._samplers[0]
    assert list(sampler.layers) == tensors[-15:] and [n[0] for n in sampler.gated] == tensors[-15:-2]
    assert all(len(gate.layers) == 5 for gate in sampler.gates)
    assert stage.gate_optimiser1.param_groups[0]["nesterov"] and stage.optimiser1.param_groups[0]["nesterov"]


def test_the_classifier_is_always_on_where_it_is_said_so():
    lab, stage = started(variant="released", epochs=3)
    stage.learn(lab, 0, since=0)
    assert stage.active[0, -2:].tolist() == [1, 1] and stage.active[0, :-2].max() <= 1
    with pytest.raises(BadInput, match="candidates = 2 .* leaves no layer"):
        started(variant="released", candidates=2)


def test_released_choices_can_be_overruled():
    assert make_method("famus", {"variant": "released"}).config.weighting == "normalised"
    assert make_method("famus", {"variant": "released", "weighting": "paper"}).config.weighting == "paper"
    assert make_method("famus").config.weighting == "paper"
    with pytest.raises(BadInput, match="schedule"): make_method("famus", {"schedule": "steps"})
    with pytest.raises(BadInput, match="engine"): make_method("famus", {"engine": "forward"})
    with pytest.raises(BadInput, match="lambda_u"):
        make_method("famus", {"forwarded": "labelled"}).check(tasks.digits_task())


# --- a run ---


def test_needs_no_trusted_set():
    assert REGISTRY["famus"].needs == ("two networks",) and REGISTRY["famus"].family == "meta-learning"
    make_method("famus").check(tasks.digits_task())


def test_what_views_need_is_recorded(tmp_path):
    run = fit(tmp_path)
    end = load_arrays(run.snapshots()[-1][2])
    n = len(end["p_clean"])
    for name in ("loss", "p_clean", "p_clean2", "weight", "weight2", "prediction", "corrected", "confidence"):
        assert end[name].shape == (n,), name
    assert end["extra.mixture_means"].shape == (1, 2) and end["extra.threshold"] == 0.5
    for name in ("curve_loss", "curve_weight", "curve_weight2"): assert end[f"extra.{name}"].shape == (50,)
    assert end["extra.active_layers"].shape == end["extra.active_layers2"].shape == (9,)
    told = ("loss", "loss_u", "mean_weight", "mean_weight_u", "trusted_loss", "meta_norm", "meta_variance",
            "active_layers", "labelled", "pseudo_clean", "rate")
    for row in run.metrics.read()[0][1:]: assert set(told) <= row.keys() and tasks.finite(
        {k: v for k, v in row.items() if isinstance(v, float)})
    stage = make_method("famus", SMALL).stages()[0]
    lab, _ = tasks.started(stage, tasks.digits_task())
    assert stage.extras(lab) == {} and stage.samples(lab)["weight"].eq(1).all(), "nothing before the mixture"


def test_the_curve_is_told_on_the_scale_of_the_recorded_losses():
    lab, stage = started()
    with torch.no_grad(): logits = stage.look(lab, 0)
    raw = F.cross_entropy(logits, lab.labels, reduction="none")
    torch.testing.assert_close(stage.span[0], torch.stack((raw.min(), raw.max())))
    curve, i = stage.extras(lab), raw.argsort()[lab.n // 2]
    at = (stage.loss[0, i] * 49).round().long()
    with torch.no_grad():
        grid = stage.span[0, 0] + (stage.span[0, 1] - stage.span[0, 0]) * at / 49
        torch.testing.assert_close(curve["curve_weight"][at], stage.weighers[0](grid[None])[0])


def test_records_come_from_memory():
    lab, stage = started()
    stage.learn(lab, 0, since=0)
    streams, passes = {k: g.get_state() for k, g in lab._generators.items()}, dict(lab.passes)
    before = {k: repr(v) for k, v in stage_state(stage).items()}
    stage.samples(lab), stage.extras(lab)
    assert lab.passes == passes and {k: repr(v) for k, v in stage_state(stage).items()} == before
    assert all(torch.equal(g.get_state(), streams[k]) for k, g in lab._generators.items())


def test_state_comes_back():
    lab, stage = started()
    stage.epoch(lab, 1)
    state = copy.deepcopy(stage_state(stage))
    assert {"weighers", "gates", "gate_optimiser1", "gate_optimiser2", "meta_optimiser1", "meta_optimiser2",
            "active", "weight", "span"} <= state.keys()
    _, other = started(judged=False)
    load_stage_state(other, state)
    for name in ("weighers", "gates", "nets"):
        for a, b in zip(getattr(stage, name).parameters(), getattr(other, name).parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(other.active, stage.active) and torch.equal(other.weight, stage.weight)
    other._samplers[1].begin()
    assert not other.active[1].any() and torch.equal(other.active[0], stage.active[0])


@pytest.mark.parametrize("part", [0.4, 0.9])
def test_resumes_exactly_in_the_released_variant(part, tmp_path):
    task, own = tasks.digits_task("symmetric:0.4", n=120), SMALL | dict(variant="released")
    def run(where, **options):
        return train(make_method("famus", own), task, run_dir=tmp_path / where, progress="off", **options)
    whole, polls = run("whole"), []
    run("count", poll=lambda: polls.append(0))
    stop_at, seen = int(part * len(polls)), []
    def stop():
        seen.append(0)
        if len(seen) == stop_at: raise Stopped
    assert not run("stopped", poll=stop).finished
    again = run("stopped")
    for file in ("metrics.jsonl", "labels.csv"):
        assert (again.path / file).read_bytes() == (whole.path / file).read_bytes()


# --- edges ---

CHANGES = [dict(threshold=0.0), dict(threshold=1.0), dict(meta_threshold=1.0), dict(warmup=0), dict(views=1),
           dict(forwarded="labelled", lambda_u=0.0), dict(average=3), dict(guessing="running"),
           dict(squares="sum"), dict(batch=1000, warmup_batch=1000, trusted_batch=1000),
           dict(variant="released"), dict(judge_labels="given"), dict(judges_by="own network"),
           dict(mixing="pair"), dict(graph="rebuilt"), dict(batchnorm="running"), dict(strategy="random:2"),
           dict(strategy="last:1", lambda_g=0.0), dict(gates_learn="count"), dict(meta_optimiser="adam"),
           dict(layers=99), dict(lambda_r=0.0), dict(warmup_penalty="negative entropy"),
           dict(net="preact-resnet32")]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_setting_trains_on(changes):
    lab, stage = started(tasks.digits_task("symmetric:0.4", n=90), **changes)
    for epoch in (0, 1): row = stage.epoch(lab, epoch)
    assert tasks.finite(row), row
    for v in stage.samples(lab).values(): assert v.shape == (lab.n,) and v.float().isfinite().all()


@pytest.mark.parametrize("batch", [1, 2])
def test_batches_of_one(batch):
    sizes = dict(batch=batch, trusted_batch=1, views=batch)
    lab, stage = started(tasks.digits_task("symmetric:0.4", n=30), **sizes)
    assert tasks.finite(stage.epoch(lab, 1))


@pytest.mark.parametrize("edge", tasks.EDGES)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_edges_train_with_finite_numbers(edge, variant):
    lab, stage = started(tasks.edge_task(edge), variant=variant)
    for epoch in (0, 1): row = stage.epoch(lab, epoch)
    assert tasks.finite(row), row


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_no_pseudo_clean_sample_and_nothing_else(p, variant, monkeypatch):
    "The mixture finds all labels wrong, or all right."
    lab, stage = started(variant=variant)
    def judge(self, k, logits):
        mixture = CoDivide.judge(self, k, logits)
        self.p_clean[k] = p
        return mixture
    monkeypatch.setattr(T.WeighDivided, "judge", judge)
    row = stage.epoch(lab, 1)
    assert tasks.finite(row), row
    if not p: assert row["labelled"] == 32 / lab.n and row["pseudo_clean"] == 24 / lab.n
    if p: assert row["pseudo_clean"] == 1
    if p and variant == "paper": assert row["labelled"] == 1 and row["loss_u"] == 0 == row["mean_weight_u"]
    if p and variant == "released": assert row["labelled"] < 1, "cut, for there is no median to be above"


def test_a_rate_that_blows_up_says_what_to_change():
    lab, stage = started(judged=False, rate=1e12)
    with pytest.raises(BadInput, match="rate = .* too large"):
        for epoch in range(3): stage.epoch(lab, epoch)


@pytest.mark.parametrize("preset", ["smoke", "laptop", "gpu", "paper"])
def test_recipes(preset):
    for name in ("digits", "cifar10", "cifar100", "clothing1m", "webvision", "my-folder"):
        task = tasks.digits_task()
        object.__setattr__(task, "name", name)
        config = configured("famus", task, preset).config
        assert config.warmup < config.epochs and config.oracle == "none"
