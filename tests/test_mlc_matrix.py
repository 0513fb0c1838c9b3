"MLC of Wang, Hu and Hu: the matrix, its gradient, the step through it, and edges."

import copy
import dataclasses

import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.engine.metagrad import TrainingPass, Trusted
from lnl_bench.engine.nets import make_net
from lnl_bench.methods.mlc_matrix import CorrectLoss, MLCMatrixConfig, matrix_gradient, moved_matrix

SMALL = MLCMatrixConfig(net="cnn-digits", epochs=3, plain_epochs=1, batch=40, rate=0.05, corrected_rate=1e-3,
                        virtual_rate=2e-3, trusted_batch=30, matrix_rate=10.0)


def started(task=None, **changes):
    torch.manual_seed(0)
    task = task or tasks.digits_task("pair-flip:0.35", n=200, trusted=5)
    return tasks.started(CorrectLoss(dataclasses.replace(SMALL, **changes)), task)


def test_the_matrix_by_a_slow_loop():
    gradient, rate = torch.randn(5, 5), 0.8
    found = moved_matrix(gradient, rate)
    for j in range(5):
        column = [max((i == j) - rate * gradient[i, j].item(), 0) for i in range(5)]
        for i in range(5): assert found[i, j] == pytest.approx(column[i] / (sum(column) or 1), abs=1e-6)


@pytest.mark.parametrize("engine", ["forward", "difference"])
def test_engines_agree(engine):
    torch.manual_seed(1)
    net = make_net("cnn-digits", 10, channels=1, size=8, seed=1)
    x, y = torch.randn(12, 1, 8, 8), torch.randint(10, (12,))
    xt, yt = torch.randn(9, 1, 8, 8), torch.arange(9)
    trusted = Trusted(xt, lambda z: F.cross_entropy(z, yt))
    ours, theirs = (matrix_gradient(TrainingPass(net, x), y, trusted, 0.01, e) for e in (engine, "reverse"))
    limit = 1e-3 if engine == "forward" else 0.03
    assert (ours.gradients[0] - theirs.gradients[0]).norm() < limit * theirs.norm


def test_one_corrected_step_by_hand():
    lab, stage = started(momentum=0.0, weight_decay=0.0, view="none")
    stage._plain = False
    stage.net.train()
    batch, before = lab.batch(torch.arange(20), ("none",)), copy.deepcopy(stage.net)
    stage.optimiser.param_groups[0]["lr"] = 1e-3
    state = lab.rng("trusted").get_state()
    stage.one_step(lab, batch, {})
    lab.rng("trusted").set_state(state)
    meta = matrix_gradient(TrainingPass(before, batch.images), batch.labels, stage.trusted_batch(lab), 2e-3)
    matrix = moved_matrix(meta.gradients[0], 10.0)
    F.cross_entropy(before(batch.images) @ matrix, batch.labels, reduction="sum").backward()
    for a, p in zip(stage.net.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, p - 1e-3 * p.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stage.matrix, 0.9 * torch.eye(10) + 0.1 * matrix)


def test_plain_epochs_come_first_at_their_rate():
    lab, stage = started()
    row = stage.epoch(lab, 0)
    assert row["rate"] == 0.05 and row["diagonal"] == 1.0 and "meta_norm" not in row
    assert lab.passes == {"forward": lab.n, "backward": lab.n}
    row = stage.epoch(lab, 1)
    assert row["rate"] == 1e-3 and row["diagonal"] < 1.0 and row["meta_norm"] > 0


def test_the_matrix_points_the_way_that_labels_were_flipped():
    task = tasks.digits_task("pair-flip:0.35", n=800, trusted=10)
    lab, stage = started(task, plain_epochs=4, epochs=8, batch=50, trusted_batch=100)
    for e in range(8): stage.epoch(lab, e)
    k = torch.arange(10)
    assert stage.matrix[k, (k + 1) % 10].mean() > 3 * stage.matrix[(k + 1) % 10, k].mean()
    torch.testing.assert_close(stage.matrix.sum(0), torch.ones(10), rtol=0, atol=1e-3)


EDGES = {"batch of one": dict(batch=1), "one trusted": dict(trusted_batch=1),
         "many trusted": dict(trusted_batch=300), "difference": dict(engine="difference"),
         "rebuilt": dict(engine="reverse", graph="rebuilt"), "no plain epochs": dict(plain_epochs=0),
         "all plain": dict(plain_epochs=9), "identity": dict(matrix_rate=0.0)}


@pytest.mark.parametrize("edge", EDGES)
def test_edges_train_with_finite_numbers(edge):
    lab, stage = started(tasks.digits_task("symmetric:0.4", n=70, trusted=2), **EDGES[edge])
    for e in range(2):
        row = stage.epoch(lab, e)
        assert tasks.finite(row), row
    for v in stage.samples(lab).values(): assert v.shape == (lab.n,) and v.float().isfinite().all()


@pytest.mark.parametrize("edge", tasks.EDGES)
def test_tasks_at_the_edge(edge):
    lab, stage = started(tasks.edge_task(edge, trusted=1))
    for e in range(2): assert tasks.finite(stage.epoch(lab, e))
