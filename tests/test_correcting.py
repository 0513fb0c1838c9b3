"MLC and MSLC: correctors, their gradients, what is coupled and what is not, and edges."

import copy

import pytest
import tasks
import torch
import torch.nn.functional as F
from torch import nn

from lnl_bench.data.task import truth_of
from lnl_bench.engine.contract import load_stage_state, stage_state
from lnl_bench.engine.metagrad import ENGINES, TrainingPass, Trusted, VirtualStep
from lnl_bench.engine.nets import make_net
from lnl_bench.methods.mlc import CorrectLabels, MLCConfig, corrector_gradient, make_corrector, soft_loss
from lnl_bench.methods.mslc import MixLabels, MSLCConfig, hardened, mixed_labels, mixing_gradient
from lnl_bench.methods.mw_net import make_weigher

SMALL = dict(net="cnn-digits", epochs=3, batch=40, rate=0.05, trusted_batch=30, schedule="cosine")
STAGES = {"mlc": (CorrectLabels, MLCConfig), "mslc": (MixLabels, MSLCConfig)}


def started(name, task=None, **changes):
    stage, config = STAGES[name]
    torch.manual_seed(0)
    changes = SMALL | ({"plain_epochs": 1} if name == "mslc" else {}) | changes
    task = task or tasks.digits_task("symmetric:0.4", n=200, trusted=5)
    return tasks.started(stage(config(**changes)), task)


def trained(name, upto=3, **changes):
    lab, stage = started(name, **changes)
    return lab, stage, [stage.epoch(lab, e) for e in range(upto)]


def test_soft_loss_is_a_mean_over_all_rows():
    z, soft, labels = torch.randn(5, 4), torch.rand(3, 4).softmax(1), torch.tensor([1, 2])
    rows = [-(soft[i] * z[i].log_softmax(0)).sum() for i in range(3)] + \
           [-z[3 + i].log_softmax(0)[labels[i]] for i in range(2)]
    torch.testing.assert_close(soft_loss(z, soft, labels), sum(rows) / 5)
    torch.testing.assert_close(soft_loss(z[:3], soft, labels[:0]), sum(rows[:3]) / 3)


def test_a_corrector_depends_on_its_seed_alone():
    state = torch.get_rng_state()
    a, b, c = (make_corrector(6, 3, 4, 5, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.embed.weight, b.embed.weight) and not torch.equal(a.embed.weight, c.embed.weight)


@pytest.mark.parametrize("name", STAGES)
def test_engines_agree_on_the_gradient(name):
    torch.manual_seed(1)
    net = make_net("cnn-digits", 10, channels=1, size=8, seed=1)
    x, xt, yt = torch.randn(12, 1, 8, 8), torch.randn(9, 1, 8, 8), torch.randint(10, (9,))
    given, past = F.one_hot(torch.randint(10, (12,)), 10).float(), torch.rand(12, 10).softmax(1)
    trusted, found = Trusted(xt, lambda z: F.cross_entropy(z, yt)), {}
    for engine in ENGINES:
        first = TrainingPass(net, x)
        if name == "mlc":
            corrector = make_corrector(net.feature_dim, 10, 4, 5, seed=0)
            what = (corrector, first, net.features(x).detach(), given, yt[:0])
            found[engine] = corrector_gradient(*what, trusted, VirtualStep(0.1), engine)
        else:
            weighers = nn.ModuleList(make_weigher(5, 0, role) for role in "ab")
            what = (weighers, first, given, past, first.value.softmax(1))
            found[engine] = mixing_gradient(*what, trusted, 0.1, engine)
    for engine, limit in (("forward", 1e-3), ("difference", 0.03)):
        for a, b in zip(found[engine].gradients, found["reverse"].gradients, strict=True):
            assert (a - b).norm() <= limit * found["reverse"].norm, engine


def test_mixed_labels_are_distributions_and_linear_in_the_loss():
    y, past, guess = (torch.rand(6, 4).softmax(1) for _ in range(3))
    a, b, z = torch.rand(6), torch.rand(6), torch.randn(6, 4)
    soft = mixed_labels(y, past, guess, a, b)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    l1, l2, l3 = (F.cross_entropy(z, t, reduction="none") for t in (y, past, guess))
    mixed = a * l1 + (1 - a) * (b * l2 + (1 - b) * l3)
    torch.testing.assert_close(F.cross_entropy(z, soft, reduction="none"), mixed)
    assert hardened(torch.tensor([[0.2, 0.5, 0.3]])).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("name", STAGES)
def test_decoupled_freezes_all_but_the_last_layer(name):
    lab, stage = started(name, plain_epochs=1, coupling="decoupled")
    stage.epoch(lab, 0)
    before = copy.deepcopy(stage.net.state_dict())
    stage.epoch(lab, 1)
    for k, v in stage.net.state_dict().items():
        assert torch.equal(before[k], v) == (not k.startswith("head.")), k
    lab, stage = started(name, plain_epochs=1)
    stage.epoch(lab, 0)
    before = copy.deepcopy(stage.net.state_dict())
    stage.epoch(lab, 1)
    assert not torch.equal(before["body.0.weight"], stage.net.state_dict()["body.0.weight"])


@pytest.mark.parametrize("name", STAGES)
def test_plain_epochs_are_plain(name):
    "No label is corrected, no meta-gradient taken, and the passes are those of plain training."
    lab, stage, (row,) = trained(name, 1, plain_epochs=1)
    assert row["corrected"] == 0 and "meta_norm" not in row
    assert lab.passes == {"forward": lab.n, "backward": lab.n}
    row = stage.epoch(lab, 1)
    assert row["meta_norm"] > 0 and torch.isfinite(torch.tensor(row["trusted_loss"]))


def test_the_first_past_label_is_the_mean_of_the_last_predictions():
    lab, stage = started("mslc", plain_epochs=3, memory=2)
    seen = []
    note = stage.note
    def spy(batch, logits, weights):
        seen.append((batch.index, logits.softmax(1)))
        note(batch, logits, weights)
    stage.note = spy
    for e in range(3): stage.epoch(lab, e)
    by_epoch = torch.zeros(3, lab.n, 10)
    batches = len(seen) // 3
    for i, (index, p) in enumerate(seen): by_epoch[i // batches, index] = p
    stage._plain = False
    stage.begin(lab)
    torch.testing.assert_close(stage.table, by_epoch[1:].mean(0), rtol=0, atol=1e-3)


def test_released_mlc_trains_on_half_of_the_trusted_images():
    lab, stage = started("mlc", variant="released")
    judges, taught = stage.draw(lab)
    assert len(judges.images) == 15 and len(taught) == 15
    assert started("mlc")[1].draw(lab)[1] is None
    seen = []
    forward = stage.net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    stage.epoch(lab, 0)
    forward.remove()
    assert seen[0] == 40 + 15


@pytest.mark.parametrize("variant, which", [("paper", -1), ("released", 0)])
def test_whether_labels_are_from_before_or_after_the_corrector_moved(variant, which):
    lab, stage = started("mlc", variant=variant, meta_rate=0.1)
    stage._plain, stage._frozen, said = False, [], []
    stage.net.train()
    stage.corrector.register_forward_hook(lambda *seen: said.append(seen[-1].detach()))
    stage.one_step(lab, lab.batch(torch.arange(20), ("none",)), {})
    assert torch.equal(stage.table[:20], said[which])
    assert variant == "released" or not torch.allclose(said[0], said[-1], atol=1e-3), "it moves"


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("changes", [
    dict(variant="released"), dict(coupling="decoupled"), dict(batch=7), dict(trusted_batch=1),
    dict(trusted_batch=300), dict(engine="difference"), dict(engine="reverse", graph="rebuilt"),
    dict(plain_epochs=0)], ids=str)
def test_edges_train_with_finite_numbers(name, changes):
    task = tasks.digits_task("symmetric:0.4", n=120, trusted=2)
    lab, stage, rows = trained(name, 2, task=task, **changes)
    for row in rows: assert tasks.finite(row), row
    for v in stage.samples(lab).values(): assert v.shape == (lab.n,) and v.float().isfinite().all()
    torch.testing.assert_close(stage.table.sum(1), torch.ones(lab.n), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("edge", tasks.EDGES)
def test_tasks_at_the_edge(name, edge):
    for row in trained(name, 2, task=tasks.edge_task(edge, trusted=1))[2]:
        assert tasks.finite(row)


@pytest.mark.parametrize("name", STAGES)
def test_correctors_are_state_and_come_back(name):
    lab, stage, _ = trained(name, 2)
    state = copy.deepcopy(stage_state(stage))
    _, other = started(name)
    load_stage_state(other, state)
    for k, v in stage.samples(lab).items(): assert torch.equal(v, other.samples(lab)[k]), k


@pytest.mark.parametrize("variant, gain", [("paper", 0.02), ("released", 0.1)])
def test_mslc_keeps_clean_labels_more_than_wrong_ones(variant, gain):
    "After plain training without augmentation, which learns some wrong labels by heart."
    task = tasks.digits_task("symmetric:0.4", n=600, trusted=10)
    config = dict(variant=variant, plain_epochs=10, meta_rate=0.01, trusted_batch=50, batch=50, view="none")
    lab, stage, _ = trained("mslc", 16, task=task, epochs=16, **config)
    clean, right = task.visible().given == truth_of(task), stage.table.argmax(1) == truth_of(task)
    assert right.float().mean() > clean.float().mean() + gain
    assert stage.part[clean].mean() > stage.part[~clean].mean()
