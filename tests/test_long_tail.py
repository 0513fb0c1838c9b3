"Long tails: the dataset, the three losses, when classes are balanced, and edges."

import dataclasses

import pytest
import tasks
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from lnl_bench.cli import app
from lnl_bench.data.checks import BadInput
from lnl_bench.data.sources import digits
from lnl_bench.data.task import long_tailed, make_task
from lnl_bench.engine.contract import make_method
from lnl_bench.engine.train import train
from lnl_bench.methods.cross_entropy import per_sample_loss
from lnl_bench.methods.long_tail import (
    Balanced,
    BalancedFromTheStart,
    CosineHead,
    LongTailConfig,
    Margins,
    class_weights,
    focal_loss,
    margins,
)
from lnl_bench.repro.experiment import make_source

SMALL = LongTailConfig(net="cnn-digits", epochs=4, batch=32, rate=0.05, schedule="cosine", beta=0.99,
                       deferred=0.5)
STAGES = {"focal": Balanced, "cb-focal": BalancedFromTheStart, "ldam-drw": Margins}


def started(name, task=None, **changes):
    torch.manual_seed(0)
    task = task or make_task(long_tailed(digits(), 20), "none", seed=0)
    return tasks.started(STAGES[name](dataclasses.replace(SMALL, **changes)), task)


@pytest.mark.parametrize("factor", [1, 10, 50, 100])
def test_counts_fall_from_class_to_class(factor):
    source = digits()
    tail, before = long_tailed(source, factor), torch.bincount(source.labels)
    after = torch.bincount(tail.labels, minlength=10)
    assert after.tolist() == [int(before[c] * factor ** (-c / 9)) for c in range(10)]
    assert len(tail.images) == len(tail.labels) == len(tail.ids) == int(after.sum())
    place = {one: i for i, one in enumerate(source.ids)}
    assert torch.equal(source.labels[[place[one] for one in tail.ids]], tail.labels)
    assert tail.test_images is source.test_images


def test_a_tail_depends_on_its_seed_alone():
    a, b, c = (long_tailed(digits(), 20, seed) for seed in (0, 0, 1))
    assert a.ids == b.ids and a.ids != c.ids and torch.bincount(a.labels).equal(torch.bincount(c.labels))


@pytest.mark.parametrize("factor, message", [(0.9, "0.9"), (10_000, "leaves no image of class '5'")])
def test_factors_that_cannot_be(factor, message):
    with pytest.raises(BadInput, match=message): long_tailed(digits(), factor)


def test_a_tail_by_name():
    assert make_source("digits[long-tail:20]", "data").ids == long_tailed(digits(), 20, 0).ids
    for bad in ("digits[long-tail]", "digits[long-tail:x]", "digits[tail:5]", "digits[long-tail:5"):
        with pytest.raises(BadInput, match="long-tail:factor"): make_source(bad, "data")


def test_focal_loss_by_a_slow_loop():
    z, y = torch.randn(7, 4) * 5, torch.randint(4, (7,))
    for gamma in (0.0, 0.5, 2.0):
        slow = [-(1 - z[i].softmax(0)[y[i]]) ** gamma * z[i].log_softmax(0)[y[i]] for i in range(7)]
        torch.testing.assert_close(focal_loss(z, y, gamma), torch.stack(slow), rtol=1e-4, atol=1e-6)
    sure = torch.tensor([[80.0, 0.0]], requires_grad=True)
    focal_loss(sure, torch.tensor([0]), 0.5).sum().backward()
    assert sure.grad.isfinite().all(), "no infinite slope where the label is certain"


def test_class_weights_by_the_sum_of_a_series():
    "The effective number of n samples is 1 + beta + ... + beta^(n-1)."
    counts, beta = torch.tensor([40, 7, 1]), 0.9
    effective = torch.tensor([sum(beta**k for k in range(n)) for n in counts.tolist()])
    w = 1 / effective
    torch.testing.assert_close(class_weights(counts, beta), w / w.sum() * 3)


def test_margins_and_cosines():
    m = margins(torch.tensor([81.0, 16.0, 1.0]), 0.6)
    torch.testing.assert_close(m, torch.tensor([0.2, 0.3, 0.6]))
    head, x = CosineHead(5, 3, 20.0), torch.randn(4, 5)
    slow = torch.stack([torch.stack([20 * F.cosine_similarity(x[i], head.weight[c], dim=0) for c in range(3)])
                        for i in range(4)])
    torch.testing.assert_close(head(x), slow)


def test_each_loss_on_a_batch_by_hand():
    for name in STAGES:
        lab, stage = started(name)
        stage._now = 0.0
        batch = lab.batch(torch.arange(20), ("none",))
        logits, y = stage.net(batch.images), batch.labels
        found = stage.losses(logits, batch)
        weights = class_weights(lab.class_counts(), 0.99)
        if name == "ldam-drw":
            lowered = logits.clone()
            lowered[torch.arange(20), y] -= 30 * margins(lab.class_counts(), 0.5)[y]
            torch.testing.assert_close(found, per_sample_loss(lowered, y))
            stage._now = 0.5
            torch.testing.assert_close(stage.losses(logits, batch), per_sample_loss(lowered, y) * weights[y])
        else:
            balance = weights[y] if name == "cb-focal" else 1.0
            torch.testing.assert_close(found, focal_loss(logits, y, 1.0) * balance)


def test_balance_is_deferred():
    lab, stage = started("ldam-drw")
    seen = []
    for e in range(4):
        stage.epoch(lab, e)
        seen.append(stage.balance())
    assert seen == [False, False, True, True]


def test_the_rare_classes_gain(tmp_path):
    task, last = make_task(long_tailed(digits(), 20), "none", seed=0), {}
    for name in STAGES:
        method = make_method(name, dataclasses.asdict(SMALL) | {"epochs": 12})
        run = train(method, task, run_dir=tmp_path / name, progress="off")
        last[name] = run.series("test_accuracy")[-1]
    assert min(last["cb-focal"], last["ldam-drw"]) > last["focal"] + 0.03, last


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("edge", tasks.EDGES)
def test_edges_train_with_finite_numbers(name, edge):
    lab, stage = started(name, tasks.edge_task(edge))
    for e in (0, 3):
        assert tasks.finite(stage.epoch(lab, e))


def test_a_tail_from_the_command_line(tmp_path):
    where = ["--data", "digits[long-tail:10]", "--trusted", "2", "--runs-dir", str(tmp_path)]
    said = CliRunner().invoke(app, ["train", "cb-focal", "--preset", "smoke", *where])
    assert said.exit_code == 0, said.output
