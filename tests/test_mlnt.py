"MLNT: its synthetic labels, its meta-gradient, its trainings one after the other, and their edges."

import copy
import dataclasses

import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.contract import load_stage_state, stage_state
from lnl_bench.engine.nets import make_net
from lnl_bench.methods.mlnt import (
    MLNT,
    FindNeighbours,
    MLNTConfig,
    Tolerant,
    divergence,
    meta_loss_gradient,
    phase,
    transferred_labels,
)

SMALL = MLNTConfig(net="cnn-digits", epochs=2, pretrain_epochs=1, batch=40, rate=0.05, rounds=2, synthetic=2,
                   meta_ramp=0, early_epochs=0, decay=0.9, threshold=0.02)


def started(training=1, task=None, **changes):
    "A lab in which the neighbours' training is over, and a training started in it."
    config = dataclasses.replace(SMALL, **changes)
    torch.manual_seed(0)
    lab, first = tasks.started(FindNeighbours(config), task or tasks.digits_task())
    first.epoch(lab, 0)
    lab.publish(first.name, first.result(lab))
    for k in range(1, training + 1):
        stage = Tolerant(config, k)
        stage.start(lab)
        if k < training:
            stage.epoch(lab, 0)
            lab.publish(stage.name, stage.result(lab))
    return lab, stage


def generator(seed=0): return torch.Generator().manual_seed(seed)


def test_labels_come_from_the_nearest():
    "Two far clusters: whatever is transferred comes from the own cluster, and rho labels are replaced."
    torch.manual_seed(0)
    features = torch.cat((torch.randn(15, 3), torch.randn(15, 3) + 100))
    labels = torch.arange(30)  # all different, so each label names its giver
    sets = transferred_labels(labels, features, 40, 12, 10, generator())
    assert sets.shape == (40, 30) and ((sets != labels).sum(1) == 12).all()
    assert ((sets // 15) == (labels // 15)).all()
    by_hand = torch.cdist(features, features).argsort(1)[:, 1:11]
    for row in sets:
        for i in (row != labels).nonzero()[:, 0]: assert row[i] in by_hand[i]


def test_all_neighbours_are_given_alike():
    features, labels = torch.arange(12.0)[:, None], torch.arange(12)
    sets = transferred_labels(labels, features, 6000, 12, 3, generator())
    counts = torch.bincount(sets[:, 0], minlength=12)  # neighbours of 0 are 1, 2 and 3
    assert counts[4:].sum() == 0 and counts[0] == 0
    assert (counts[1:4] / 6000 - 1 / 3).abs().max() < 0.03


@pytest.mark.parametrize("B, near, replaced", [(1, 10, 1), (2, 10, 2), (3, 1, 0)])
def test_transfer_in_small_batches(B, near, replaced):
    labels = torch.arange(B)
    sets = transferred_labels(labels, torch.rand(B, 2), 5, replaced, near, generator())
    assert ((sets != labels).sum(1) == (0 if B == 1 else replaced)).all()


def test_divergence_by_hand():
    logits, s = torch.randn(5, 4), torch.rand(5, 4).softmax(1)
    expected = sum((s[i] * (s[i] / logits[i].softmax(0)).log()).sum() for i in range(5)) / 5
    torch.testing.assert_close(divergence(logits, s), expected)
    assert divergence(logits, logits.softmax(1)).abs() < 1e-6


@pytest.mark.parametrize("bench_net", ["cnn-digits", "plain"])
def test_second_order_by_finite_differences(bench_net):
    "Through real steps of real copies, in double precision; with BatchNorm and without."
    torch.manual_seed(1)
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 12), torch.nn.Tanh(),
                                torch.nn.Linear(12, 10))
    net = (plain if bench_net == "plain" else make_net("cnn-digits", 10, channels=1, size=8, seed=1)).double()
    x, sets = torch.randn(9, 1, 8, 8).double(), torch.randint(10, (2, 9))
    s = torch.randn(9, 10).double().softmax(1)

    def meta_loss(net):
        total = 0.0
        for labels in sets:
            twin = copy.deepcopy(net)
            F.cross_entropy(twin(x), labels).backward()
            torch.optim.SGD(twin.parameters(), 0.4).step()
            with torch.no_grad(): total += (s * (s.log() - twin(x).log_softmax(1))).sum(1).mean().item()
        return total / len(sets)

    found, loss = meta_loss_gradient(net, x, sets, s, 0.4, "second")
    torch.testing.assert_close(loss.item(), meta_loss(net), rtol=1e-6, atol=0)
    direction = {k: torch.randn_like(v) for k, v in found.items()}
    ends = []
    for sign in (1e-7, -1e-7):
        twin = copy.deepcopy(net)
        with torch.no_grad(): [p.add_(direction[k], alpha=sign) for k, p in twin.named_parameters()]
        ends.append(meta_loss(twin))
    numeric, ours = (ends[0] - ends[1]) / 2e-7, sum((found[k] * direction[k]).sum() for k in found).item()
    assert abs(numeric - ours) < 2e-3 * abs(ours), (numeric, ours)


def test_the_paper_takes_two_steps_and_the_released_code_one():
    "Against the same batch worked by hand with the kernel's gradient."
    for variant in ("paper", "released"):
        lab, stage = started(variant=variant, momentum=0.0, weight_decay=0.0, decay=0.5)
        stage.net.train(); stage.teacher.train()
        batch = lab.batch(torch.arange(20), ("none",))
        before, teacher = copy.deepcopy(stage.net), copy.deepcopy(stage.teacher)
        state = lab.rng("neighbours").get_state()
        stage.set_rate(0.1)
        stage.learn(lab, batch, 0.0)
        lab.rng("neighbours").set_state(state)
        sets = transferred_labels(batch.labels, stage._features[:20], 2, 10, 10, lab.rng("neighbours"))
        s = teacher(batch.images).softmax(1).detach()
        meta, _ = meta_loss_gradient(before, batch.images, sets, s, 0.2)
        twin = copy.deepcopy(before)
        with torch.no_grad():
            if variant == "paper": [p.sub_(meta[k], alpha=0.4) for k, p in twin.named_parameters()]
        F.cross_entropy(twin(batch.images), batch.labels).backward()
        for k, p in twin.named_parameters():
            extra = 0 if variant == "paper" else 0.4 / 10 * meta[k]
            torch.testing.assert_close(stage.net.get_parameter(k), p - 0.1 * (p.grad + extra),
                                       rtol=1e-4, atol=1e-6)
        kept, moved = (copy.deepcopy(before), stage.net) if variant == "paper" else (teacher, before)
        for k, p in stage.teacher.named_parameters():
            expected = (kept.get_parameter(k) + moved.get_parameter(k)) / 2
            torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6)


def test_ramps_and_decays():
    c = MLNTConfig()
    assert phase(c, 1, 5) == (0.1, 0.99, 0.5 * 5 / 120)
    assert phase(c, 2, 0) == (0.4, 0.999, 0.0), "the ramps are those of the first training"
    assert phase(dataclasses.replace(c, meta_ramp=0), 1, 0)[0] == 0.4


def test_the_mentor_leaves_samples_out():
    lab, stage = started(training=2, threshold=0.1)
    kept = stage.weight.bool()
    assert 0 < kept.sum() < lab.n
    with lab.uncounted(): p = lab.predict(stage._mentor).softmax(1)
    assert torch.equal(kept, p[torch.arange(lab.n), lab.labels] > 0.1)
    row = stage.epoch(lab, 0)
    assert row["kept"] == pytest.approx(kept.float().mean().item())
    assert torch.equal(stage.samples(lab)["weight"], kept.float())
    assert "weight" not in started()[1].samples(lab), "the first training has no mentor"


def test_what_is_left_out_moves_nothing():
    "With all samples of a batch left out, no meta step and no momentum, a step changes no weight."
    lab, stage = started(training=2, momentum=0.0, weight_decay=0.0, meta_rate=0.0)
    stage.weight.zero_()
    before = [p.clone() for p in stage.net.parameters()]
    row = stage.epoch(lab, 0)
    assert row["kept"] == 0 and row["loss"] > 0
    for a, b in zip(before, stage.net.parameters(), strict=True): assert torch.equal(a, b)


def test_a_threshold_that_leaves_nothing_stops_with_a_message():
    with pytest.raises(BadInput, match=r"threshold = 1.0 leaves no sample.*lower threshold"):
        started(training=2, threshold=1.0)


def test_the_best_on_trusted_images_becomes_the_mentor():
    task = tasks.digits_task(n=200, trusted=3)
    lab, stage = started(task=task, mentor="best on trusted")
    rows = [stage.epoch(lab, k) for k in range(2)]
    best = max(r[f"{who}_trusted"] for r in rows for who in ("teacher", "student"))
    assert stage.best_accuracy == best
    twin = make_net("cnn-digits", 10, channels=1, size=8)
    twin.load_state_dict(stage.result(lab)["weights"])
    right = lab.predict(twin, which="trusted").argmax(1) == task.trusted_labels
    assert right.float().mean().item() == pytest.approx(best)
    with pytest.raises(BadInput, match="'best on trusted' needs a trusted set"):
        MLNT(MLNTConfig(mentor="best on trusted")).check(tasks.digits_task())


def test_a_training_goes_on_from_its_state():
    lab, stage = started(training=2)
    stage.epoch(lab, 0)
    saved, streams = copy.deepcopy(stage_state(stage)), copy.deepcopy(lab.state())
    stage.epoch(lab, 1)
    again = Tolerant(stage.config, 2)
    again.start(lab)
    load_stage_state(again, saved)
    lab.load_state(streams)
    again.epoch(lab, 1)
    for a, b in zip(stage.net.parameters(), again.net.parameters(), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize("changes", [dict(batch=1), dict(batch=7), dict(order="second"), dict(replaced=0.0),
                                     dict(variant="released"), dict(predictor="student"), dict(neighbours=99),
                                     dict(synthetic=1), dict(meta_rate=0.0)])
def test_edges_train_with_finite_numbers(changes):
    size = 30 if changes.get("batch") == 1 else 120
    lab, stage = started(task=tasks.digits_task(n=size), **changes)
    row = stage.epoch(lab, 0)
    assert tasks.finite(row), row
    for v in stage.samples(lab).values(): assert v.shape == (lab.n,) and v.float().isfinite().all()
    assert stage.predict(lab.view("none", torch.arange(3))).shape == (3, 10)


@pytest.mark.parametrize("edge", tasks.EDGES)
def test_tasks_at_the_edge(edge):
    lab, stage = started(task=tasks.edge_task(edge), training=2, threshold=0.0)
    assert tasks.finite(stage.epoch(lab, 0))


def test_passes_are_those_of_the_algorithm():
    lab, stage = started(synthetic=3)
    before = dict(lab.passes)
    stage.epoch(lab, 0)
    spent = {k: (lab.passes[k] - before[k]) / lab.n for k in before}
    assert spent == {"forward": 3 + 3, "backward": 2 * 3 + 1}
