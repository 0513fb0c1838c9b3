"FaMUS: layers and gates, what each strategy asks, the loss on gradients, hosts, and edges."

import copy
import dataclasses

import pytest
import tasks
import torch
import torch.nn.functional as F
from torch import nn

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.contract import load_stage_state, make_method, stage_state
from lnl_bench.engine.metagrad import TrainingPass, Trusted, VirtualStep, meta_gradient
from lnl_bench.engine.nets import make_net
from lnl_bench.methods.famus import (
    RELEASED_GATES,
    FaMUSL2RConfig,
    FaMUSMLCMatrixConfig,
    FaMUSMWNetConfig,
    SampledCorrectLoss,
    SampledLearnToReweight,
    SampledMetaWeight,
    SamplingConfig,
    gate_loss,
    last_layer_gradient,
    layers_of,
    pooled,
    strategy_of,
    switched,
)
from lnl_bench.methods.mw_net import MetaWeight, MWNetConfig

SMALL = dict(net="cnn-digits", epochs=3, batch=40, rate=0.05, trusted_batch=30, layers=3)
HOSTS = {"l2r": (SampledLearnToReweight, FaMUSL2RConfig), "mw-net": (SampledMetaWeight, FaMUSMWNetConfig),
         "mlc-matrix": (SampledCorrectLoss, FaMUSMLCMatrixConfig)}


def started(name="mw-net", task=None, **changes):
    stage, config = HOSTS[name]
    torch.manual_seed(0)
    own = {"plain_epochs": 0} if name == "mlc-matrix" else {}
    task = task or tasks.digits_task("symmetric:0.4", n=200, trusted=5)
    return tasks.started(stage(config(**SMALL | own | changes)), task)


def test_layers_are_modules_with_parameters_of_their_own():
    net = make_net("preact-resnet18", 10)
    layers = layers_of(net)
    assert sorted(k for names in layers.values() for k in names) == sorted(dict(net.named_parameters()))
    assert list(layers)[-1] == "head" and list(layers_of(net, 3)) == list(layers)[-3:]
    for p in net.body.parameters(): p.requires_grad_(False)
    assert list(layers_of(net)) == ["head"]
    assert layers_of(nn.Linear(3, 2)) == {"": ["weight", "bias"]}


def test_pooling_by_a_slow_loop():
    g = torch.randn(5, 3, 2, 2)
    means = torch.tensor([sum(g[i].flatten().tolist()) / 12 for i in range(5)])
    torch.testing.assert_close(pooled(g), (means - means.mean()) / means.std(correction=0))
    torch.testing.assert_close(pooled(g * 1e-8), pooled(g), rtol=1e-3, atol=1e-3)


def test_a_switch_draws_from_its_softmax_and_passes_the_soft_gradient():
    logits = torch.tensor([[1.0, 0.0]]).repeat(40_000, 1).requires_grad_()
    r = switched(logits, 2.0, torch.Generator().manual_seed(1))
    assert abs(r.mean().item() - torch.sigmoid(torch.tensor(-1.0)).item()) < 0.01
    (slope,) = torch.autograd.grad(r.sum(), logits)
    assert (slope[:, 1] > 0).all() and (slope[:, 1] <= 0.25 / 2.0 + 1e-6).all()


def test_sampled_is_the_exact_derivative_of_a_network_with_the_rest_frozen_in_the_virtual_step():
    "Double precision, against finite differences where only the chosen layers take the sample weights' step."
    torch.manual_seed(0)
    net = make_net("cnn-digits", 10, channels=1, size=8, seed=0).double()
    x, y = torch.randn(7, 1, 8, 8).double(), torch.randint(10, (7,))
    xt, yt = torch.randn(6, 1, 8, 8).double(), torch.randint(10, (6,))
    u, on = torch.rand(7).double().requires_grad_(), ["head.weight", "head.bias"]

    def loss_of(u): return lambda z: (u * F.cross_entropy(z, y, reduction="none")).mean()

    trusted = Trusted(xt, lambda z: F.cross_entropy(z, yt))
    found = meta_gradient(TrainingPass(net, x), loss_of(u), [u], trusted, VirtualStep(0.3), "sampled",
                          choose=lambda _: on).gradients[0]

    def after_step(weights):
        twin = copy.deepcopy(net)
        loss_of(u.detach())(twin(x)).backward()  # what all layers step by does not depend on the change
        base = {k: p.grad.clone() for k, p in twin.named_parameters()}
        twin.zero_grad()
        loss_of(weights)(twin(x)).backward()
        with torch.no_grad():
            for k, p in twin.named_parameters(): p.sub_(0.3 * (p.grad if k in on else base[k]))
            return F.cross_entropy(twin(xt), yt).item()

    for i in range(7):
        bump = torch.zeros(7).double()
        bump[i] = 1e-5
        numeric = (after_step(u.detach() + bump) - after_step(u.detach() - bump)) / 2e-5
        assert abs(numeric - found[i].item()) < 1e-5 * found.norm()


@pytest.mark.parametrize("strategy, count", [("last:2", 2), ("random:3", 3), ("last:99", 9)])
def test_strategies_ask_so_many_layers(strategy, count):
    lab, stage = started(strategy=strategy)
    assert len(stage._layers) == 9
    row = stage.epoch(lab, 0)
    assert row["active_layers"] == pytest.approx(count)
    if strategy == "last:2": assert stage.active.tolist() == [0] * 7 + [1] * 2
    if strategy == "random:3": assert (stage.active > 0).sum() > 3


def test_all_layers_are_the_host_itself():
    "Without the loss on gradients, asking every layer gives MW-Net's own first epoch."
    lab, stage = started(strategy="last:99", lambda_g=0.0)
    row = stage.epoch(lab, 0)
    torch.manual_seed(0)
    host = {k: v for k, v in SMALL.items() if k != "layers"}
    task = tasks.digits_task("symmetric:0.4", n=200, trusted=5)
    lab, plain = tasks.started(MetaWeight(MWNetConfig(**host)), task)
    expected = plain.epoch(lab, 0)
    for key in ("loss", "trusted_loss", "mean_weight"):
        assert row[key] == pytest.approx(expected[key], rel=1e-4)


def test_gates_settle_at_k():
    lab, stage = started(task=tasks.digits_task("symmetric:0.4", n=600, trusted=5), batch=20, layers=3)
    rows = [stage.epoch(lab, e) for e in range(3)]
    assert abs(rows[-1]["active_layers"] - 3) < 1.2 and stage.active.max() <= 1


def test_gates_learn_from_the_count_alone():
    "Without its loss they do not move, for none of the other losses depends on them."
    lab, stage = started(lambda_r=0.0)
    before = copy.deepcopy(stage.gates.state_dict())
    stage.epoch(lab, 0)
    for k, v in stage.gates.state_dict().items(): assert torch.equal(before[k], v)


def test_the_loss_on_gradients_by_hand():
    h, y, w, z = torch.randn(6, 5), torch.randint(3, (6,)), torch.rand(6), torch.randn(6, 3)
    slow = sum(w[i] * h[i].mean() * (z[i].softmax(0) - F.one_hot(y[i], 3)) for i in range(6))
    torch.testing.assert_close(last_layer_gradient(w, z, F.one_hot(y, 3), h.mean(1)), slow)
    rows = {}
    for weight in (0.0, 100.0):
        lab, stage = started(strategy="last:9", lambda_g=weight)
        stage.epoch(lab, 0)
        rows[weight] = torch.cat([p.detach().flatten() for p in stage.weigher.parameters()])
    assert not torch.allclose(rows[0.0], rows[100.0], atol=1e-4), "it teaches the weigher"


def test_the_rows_of_table_3_are_settings():
    "The count loss holds the number of layers that count; the loss on gradients teaches the weigher."
    active = {}
    for weight in (0.1, 0.0):
        lab, stage = started(task=tasks.digits_task("symmetric:0.4", n=600, trusted=5), batch=20, layers=2,
                             lambda_r=weight)
        active[weight] = [stage.epoch(lab, e)["active_layers"] for e in range(3)][-1]
    assert abs(active[0.1] - 2) < 1 and active[0.0] > active[0.1] + 1.2
    for weight in (0.0, 0.1):
        lab, stage = started(lambda_g=weight, strategy="last:1")
        stage.net.train()
        batch = lab.batch(torch.arange(40))
        first = TrainingPass(stage.net, batch.images)
        _, meta = stage.weigh(lab, batch, first, {**stage._sampler.options, "note": stage.noted})
        told = [p.grad for p in stage.weigher.parameters()]
        same = [torch.equal(a, b) for a, b in zip(told, meta.gradients, strict=True)]
        assert all(same) if not weight else not any(same)


def test_what_gates_learn_from_by_hand():
    r, gains = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.5, 0.25, -1.0, 2.0])
    c = SamplingConfig(layers=1, lambda_r=0.3)
    assert gate_loss(r, gains, 2, c).item() == pytest.approx(0.3 * (2 + 2 - 1) ** 2 + gains.sum().item())
    last = SamplingConfig(layers=4, lambda_r=0.3, counted="last gate")
    assert gate_loss(r, gains, 2, last).item() == pytest.approx(0.3 * 16 + gains.sum().item())


@pytest.mark.parametrize("name", HOSTS)
def test_released_gates_in_front_of_every_host(name):
    lab, stage = started(name, **RELEASED_GATES)
    row = stage.epoch(lab, 0)
    names = [k for k, _ in stage.net.named_parameters()]  # 14, fewer than there might be
    assert list(stage._layers) == names and len(stage.gates) == len(names) - 2
    assert tasks.finite(row) and stage.active[-2:].tolist() == [1, 1] and stage.active.max() <= 1


def test_gates_that_learn_from_the_trusted_loss_alone_move():
    lab, stage = started(lambda_r=0.0, gates_learn="trusted loss and count")
    before = copy.deepcopy(stage.gates.state_dict())
    assert tasks.finite(stage.epoch(lab, 0))
    assert any(not torch.equal(before[k], v) for k, v in stage.gates.state_dict().items())


def test_no_layer_that_could_have_a_gate():
    with pytest.raises(BadInput, match="candidates = 1 .* accepted: more candidates"):
        started(candidates=1, always_on="head")


@pytest.mark.parametrize("text", ["", "gates:3", "last", "random:0", "last:-1", "first:2", "random:x"])
def test_strategies_that_are_none(text):
    with pytest.raises(BadInput, match="accepted: gates, last:N, random:N"): strategy_of(text)
    with pytest.raises(BadInput, match="strategy"): make_method("famus-mw-net", {"strategy": text})


def test_only_hosts_with_gates_take_the_engine():
    with pytest.raises(BadInput, match="engine"): make_method("mw-net", {"engine": "sampled"})
    with pytest.raises(BadInput, match="engine"): make_method("famus-mw-net", {"engine": "forward"})


CHANGES = [dict(batch=7), dict(batch=1), dict(trusted_batch=1), dict(strategy="random:1"), dict(candidates=2),
           dict(layers=99), dict(graph="rebuilt"), dict(batchnorm="running"), dict(net="preact-resnet32")]


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_edges_train_with_finite_numbers(name, changes):
    lab, stage = started(name, tasks.digits_task("symmetric:0.4", n=70, trusted=2), **changes)
    row = stage.epoch(lab, 0)
    assert tasks.finite(row), row
    for v in stage.samples(lab).values(): assert v.shape == (lab.n,) and v.float().isfinite().all()
    if "candidates" in changes: assert len(stage.active) == 2


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("classes", [2, 100])
def test_few_and_many_classes(name, classes):
    lab, stage = started(name, tasks.drawn_task(classes, n=4 * classes + 20, trusted=1))
    assert tasks.finite(stage.epoch(lab, 0))


def test_gates_are_state_and_come_back():
    lab, stage = started()
    stage.epoch(lab, 0)
    state = copy.deepcopy(stage_state(stage))
    assert {"gates", "gate_optimiser", "active", "weigher"} <= state.keys()
    _, other = started()
    load_stage_state(other, state)
    for a, b in zip(stage.gates.parameters(), other.gates.parameters(), strict=True): assert torch.equal(a, b)
    assert dataclasses.asdict(stage.config)["engine"] == "sampled"
