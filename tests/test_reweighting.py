"""L2R and MW-Net: their kernels, their edges, and what their weights say of clean and mislabelled samples."""

import copy
import functools

import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.checks import BadInput
from lnl_bench.data.sources import digits
from lnl_bench.data.task import subset, task_from_labels, truth_of
from lnl_bench.engine.contract import load_stage_state, stage_state
from lnl_bench.engine.lab import Lab
from lnl_bench.engine.metagrad import ENGINES, TrainingPass, Trusted, VirtualStep
from lnl_bench.engine.metrics import noise_detection
from lnl_bench.engine.nets import make_net
from lnl_bench.methods.l2r import L2RConfig, LearnToReweight, clipped_weights, example_weights, look_ahead
from lnl_bench.methods.mw_net import (
    MetaWeight,
    MWNetConfig,
    Weigher,
    batch_weights,
    make_weigher,
    weigher_gradient,
    weight_curve,
)

SMALL = dict(net="cnn-digits", epochs=4, batch=50, rate=0.05, trusted_batch=30, schedule="cosine")
STAGES = {"l2r": (LearnToReweight, L2RConfig), "mw-net": (MetaWeight, MWNetConfig)}


small_task = functools.partial(tasks.digits_task, noise="symmetric:0.4", n=400, trusted=5)


def started(name, task=None, **settings):
    "A lab and a started stage."
    stage, config = STAGES[name]
    torch.manual_seed(0)
    return tasks.started(stage(config(**SMALL | settings)), task or small_task())


def test_clipped_weights():
    w = clipped_weights(torch.tensor([-4.0, 0.0, 3.0, -12.0]))
    assert w.tolist() == [0.25, 0.0, 0.0, 0.75]
    for none in ([0.0, 0.0], [1.0, 2.0]): assert clipped_weights(torch.tensor(none)).tolist() == [0.0, 0.0]


def test_batch_weights():
    v = torch.rand(7, dtype=torch.float64)
    torch.testing.assert_close(batch_weights(v), v / 7)
    torch.testing.assert_close(batch_weights(v, "normalised"), v / v.sum())
    assert batch_weights(0 * v, "normalised").tolist() == [0.0] * 7


def test_l2r_weights_are_the_products_of_gradients():
    torch.manual_seed(2)
    net = make_net("cnn-digits", 10, channels=1, size=8, seed=0).double().eval()
    x, xt = torch.randn(6, 1, 8, 8).double(), torch.randn(4, 1, 8, 8).double()
    y, yt = torch.randint(10, (6,)), torch.randint(10, (4,))

    def gradient(images, labels):
        loss = F.cross_entropy(net(images), labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    v = gradient(xt, yt)
    size = torch.cat([p.detach().flatten() for p in net.parameters()])
    single = torch.stack([gradient(x[i:i + 1], y[i:i + 1]) for i in range(6)])
    for variant, direction in (("paper", v), ("released", v + 0.1 * size)):
        step, decay = look_ahead(L2RConfig(variant=variant, weight_decay=0.1), 0.3)
        trusted = Trusted(xt, lambda z: F.cross_entropy(z, yt), decay=decay)
        for engine in ENGINES:
            w, meta = example_weights(TrainingPass(net, x), y, trusted, step, engine)
            torch.testing.assert_close(meta.gradients[0], -0.3 * single @ direction, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(w, clipped_weights(-single @ direction), rtol=1e-3, atol=1e-6)
    step, decay = look_ahead(L2RConfig(variant="ieg", weight_decay=0.1), 0.3)
    assert step == VirtualStep(0.1, weight_decay=0.1) and decay == 0.1


@pytest.mark.parametrize("variant", ["paper", "normalised"])
def test_weigher_gradient_by_finite_differences(variant):
    torch.manual_seed(0)
    net = make_net("cnn-digits", 10, channels=1, size=8, seed=1).double()
    weigher = make_weigher(4, 3).double()
    x, xt = torch.randn(10, 1, 8, 8).double(), torch.randn(7, 1, 8, 8).double()
    y, yt = torch.randint(10, (10,)), torch.randint(10, (7,))

    def stepped(weigher):
        twin = copy.deepcopy(net)
        losses = F.cross_entropy(twin(x), y, reduction="none")
        v = weigher(losses.detach())
        ((v * losses).mean() if variant == "paper" else (v * losses).sum() / v.sum()).backward()
        torch.optim.SGD(twin.parameters(), 0.2).step()
        return F.cross_entropy(twin(xt), yt).item()

    trusted = Trusted(xt, lambda z: F.cross_entropy(z, yt))
    meta = weigher_gradient(weigher, TrainingPass(net, x), y, trusted, 0.2, variant)
    for k, g in enumerate(meta.gradients):
        ends = []
        for sign in (1e-5, -1e-5):
            moved = copy.deepcopy(weigher)
            with torch.no_grad(): list(moved.parameters())[k].view(-1)[0] += sign
            ends.append(stepped(moved))
        assert abs((ends[0] - ends[1]) / 2e-5 - g.view(-1)[0].item()) < 1e-5 * meta.norm


def test_the_curve_spans_the_losses_seen_and_draws_nothing():
    state = torch.get_rng_state()
    curve = weight_curve(Weigher(3), torch.tensor([1.0, 0.2, 4.0]), points=9)
    assert curve["curve_loss"][0] == torch.tensor(0.2) and curve["curve_loss"][-1] == 4.0
    assert (curve["curve_loss"].diff() > 0).all() and not curve["curve_weight"].requires_grad
    make_weigher(5, 0)
    torch.manual_seed(0); Weigher(3)
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    make_weigher(5, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_all_weights_zero_in_a_batch(monkeypatch):
    "The step has loss zero: without momentum and weight decay nothing moves."
    lab, stage = started("l2r", momentum=0.0, weight_decay=0.0)
    monkeypatch.setattr("lnl_bench.methods.l2r.clipped_weights", torch.zeros_like)
    before = [p.clone() for p in stage.net.parameters()]
    row = stage.epoch(lab, 0)
    assert row["zero_weights"] == 1.0 and row["mean_weight"] == 0.0 and row["loss"] > 0
    for a, b in zip(before, stage.net.parameters(), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("edge", [
    dict(trusted=1), dict(trusted=1, trusted_batch=500), dict(noise="none"), dict(trusted_batch=3),
    dict(engine="difference"), dict(engine="reverse", graph="rebuilt"), dict(batchnorm="running"),
    dict(batch=7)])
def test_edges_train_with_finite_numbers(name, edge):
    kept = {k: v for k, v in edge.items() if k not in ("trusted", "noise")}
    task = small_task(n=150, **{k: v for k, v in edge.items() if k not in kept})
    lab, stage = started(name, task, **kept)
    row = stage.epoch(lab, 0)
    assert all(torch.tensor(float(v)).isfinite() for v in row.values()), row
    assert ("meta_error" in row) == (edge.get("engine") == "difference")
    for v in stage.samples(lab).values(): assert v.shape == (lab.n,) and v.float().isfinite().all()
    assert (stage.weight >= 0).all()


@pytest.mark.parametrize("name", STAGES)
def test_a_network_without_batch_norm(name, monkeypatch):
    from torch import nn

    from lnl_bench.engine.nets import Net
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
    monkeypatch.setattr(Lab, "net", lambda lab, *_: lab.place(Net(copy.deepcopy(body), 32, 10)))
    lab, stage = started(name, rate=0.2)
    rows = [stage.epoch(lab, e) for e in range(4)]
    assert rows[-1]["trusted_loss"] < rows[0]["trusted_loss"]


@pytest.mark.parametrize("name", STAGES)
def test_soft_labels(name):
    task = small_task()
    rows = [stage.epoch(lab, 0) for lab, stage in (started(name, t) for t in (task, tasks.one_hot(task)))]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-3)


@pytest.mark.parametrize("name", STAGES)
def test_without_trusted_images_it_stops_with_a_message(name):
    from lnl_bench.engine.contract import REGISTRY
    source = subset(digits(), 100, seed=0)
    with pytest.raises(BadInput, match="needs a trusted set"):
        REGISTRY[name]().check(task_from_labels(source, source.labels))


@pytest.mark.parametrize("name", STAGES)
def test_engines_take_the_same_path(name):
    rows = {}
    for engine in ENGINES:
        lab, stage = started(name, engine=engine)
        rows[engine] = stage.epoch(lab, 0)
    for key in ("loss", "trusted_loss"):
        assert rows["forward"][key] == pytest.approx(rows["reverse"][key], rel=1e-3)
        assert rows["difference"][key] == pytest.approx(rows["reverse"][key], rel=0.05)


@pytest.mark.parametrize("name", STAGES)
def test_passes_are_those_of_the_cost_table(name):
    "A step of L2R: 3 forward and 3 backward, for its virtual step needs none; of MW-Net: 3 and 4."
    lab, stage = started(name, small_task(n=250), trusted_batch=50)
    stage.epoch(lab, 0)
    trusted = 50 * -(-lab.n // 50)
    assert lab.passes["forward"] == 2 * lab.n + trusted
    assert lab.passes["backward"] == (2 if name == "l2r" else 3) * lab.n + trusted


@pytest.mark.parametrize("name", STAGES)
def test_weights_and_weigher_are_state_and_come_back(name):
    lab, stage = started(name)
    stage.epoch(lab, 0)
    state = copy.deepcopy(stage_state(stage))
    assert {"weight", "loss", "p_clean", "prediction"} <= state.keys()
    assert name != "mw-net" or {"weigher", "meta_optimiser"} <= state.keys()
    _, other = started(name)
    load_stage_state(other, state)
    for k, v in stage.samples(lab).items(): assert torch.equal(v, other.samples(lab)[k]), k
    for k, v in stage.extras(lab).items(): assert torch.equal(v, other.extras(lab)[k]), k


@pytest.mark.parametrize("name", STAGES)
def test_records_come_from_memory_and_change_nothing(name):
    lab, stage = started(name)
    for _ in zip(range(2), lab.batches(size=50), strict=False): pass
    before, passes = copy.deepcopy((stage_state(stage), torch.get_rng_state())), dict(lab.passes)
    stage.samples(lab), stage.extras(lab), stage.features(lab)
    assert torch.equal(before[1], torch.get_rng_state()) and passes == lab.passes
    for k in ("weight", "loss"): assert torch.equal(before[0][k], stage_state(stage)[k])


def test_mislabelled_samples_end_with_the_smaller_weights():
    task = small_task(n=500, trusted=10)
    lab, stage = started("l2r", task, epochs=6, rate=0.1, trusted_batch=50)
    for e in range(6): stage.epoch(lab, e)
    clean = task.visible().given == truth_of(task)
    assert stage.weight[clean].mean() > 1.3 * stage.weight[~clean].mean()
    assert noise_detection(stage.p_clean, clean)["auc"] > 0.8


@pytest.mark.parametrize("plain", [200, 0])
def test_the_curve_falls_once_a_network_memorises_and_rises_before(plain):
    "Four clouds of points with 40 % wrong labels; the weigher joins after `plain` steps of cross-entropy."
    torch.manual_seed(2)
    centres, true = torch.randn(4, 8), torch.randint(4, (400,))
    wrong, yt = torch.rand(400) < 0.4, torch.arange(40) % 4
    x, xt = (centres[t] + 0.7 * torch.randn(len(t), 8) for t in (true, yt))
    y = torch.where(wrong, (true + torch.randint(1, 4, (400,))) % 4, true)
    net = torch.nn.Sequential(torch.nn.Linear(8, 128), torch.nn.ReLU(), torch.nn.Linear(128, 4))
    weigher, trusted = make_weigher(100, 2), Trusted(xt, lambda z: F.cross_entropy(z, yt))
    sgd, adam = torch.optim.SGD(net.parameters(), 0.1, 0.9), torch.optim.Adam(weigher.parameters(), 0.01)
    for step in range(plain + (100 if plain else 20)):
        i = torch.randint(400, (50,))
        first = TrainingPass(net, x[i])
        losses, v = F.cross_entropy(first.logits, y[i], reduction="none"), torch.ones(50)
        if step >= plain:
            meta = weigher_gradient(weigher, first, y[i], trusted, 0.1)
            for p, g in zip(weigher.parameters(), meta.gradients, strict=True): p.grad = g
            adam.step()
            v = weigher(losses.detach()).detach()
        sgd.zero_grad()
        (batch_weights(v) * losses).sum().backward()
        sgd.step()
    v = weigher(F.cross_entropy(net(x), y, reduction="none")).detach()
    curve = weigher(torch.tensor([0.1, 1.0, 2.0, 4.0])).tolist()
    if plain:
        assert curve[0] > curve[1] > curve[2] > curve[3] and v[~wrong].mean() > v[wrong].mean() + 0.3
        assert noise_detection(v, ~wrong)["auc"] > 0.9
    else: assert curve[0] < curve[1] < curve[2] < curve[3]
