"Methods with a table of labels: kernels against slow loops, steps against their formulas, tables that last."
import functools
import json
import math

import numpy as np
import pandas as pd
import pytest
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.contract import load_stage_state, make_method, stage_state
from lnl_bench.engine.mixture import fit_betas
from lnl_bench.engine.train import load_checkpoint, train
from lnl_bench.methods import elr, elr_plus, joint_optimisation, m_correction, pencil
from lnl_bench.methods.recipes import PRESETS, recipe

MODULES = elr, elr_plus, joint_optimisation, m_correction, pencil  # importing them registers their methods
SMALL = dict(net="cnn-digits", batch=32, rate=0.05)
METHODS = {
    "elr": dict(epochs=3),
    "elr-plus": dict(epochs=3, decay_steps=5, term_steps=4),
    "joint-optimisation": dict(epochs=3, begin=2, memory=2, retrain_epochs=2, retrain_rate=0.05),
    "pencil": dict(epochs=3, plain_until=1, labels_until=2, fine_rate=0.05, variant="released", alpha=0.1),
    "m-correction": dict(epochs=3, warmup=1),
}


small_task = functools.partial(tasks.digits_task, n=120)


def method_of(name, **changes): return make_method(name, SMALL | METHODS[name] | changes)


def fit(name, task, folder, **changes):
    return train(method_of(name, **changes), task, run_dir=folder / "run", progress="off")


def started(name, task=None, **changes):
    "A lab and the first stage of a method, started."
    return tasks.started(method_of(name, **changes).stages()[0], task or small_task())


def numbers(rows): return [v for row in rows for v in row.values() if isinstance(v, float)]


# --- kernels ---


def test_targets_and_term_by_loop():
    g = torch.Generator().manual_seed(0)
    t, p = torch.rand(7, 4, generator=g) / 4, torch.rand(7, 4, generator=g)
    new, term = elr.updated_targets(t, p, 0.9), elr.early_learning_term(p / 4, t)
    for i in range(7):
        total = sum(p[i].tolist())
        for c in range(4): assert math.isclose(new[i, c], 0.9 * t[i, c] + 0.1 * p[i, c] / total, rel_tol=1e-5)
        inner = sum((p[i, c] * t[i, c] / 4).item() for c in range(4))
        assert math.isclose(term[i], math.log(1 - inner), rel_tol=1e-4)


def test_the_term_stays_finite_however_sure_all_are():
    logits = torch.tensor([[500.0] + [0.0] * 99, [-500.0] + [0.0] * 99], requires_grad=True)
    p = elr.clipped_probabilities(logits)
    target = F.one_hot(torch.tensor([0, 1]), 100).float()
    loss = elr.early_learning_term(p, target)
    assert loss.isfinite().all() and loss.min() >= math.log(1e-4) - 1e-3
    loss.sum().backward()
    assert logits.grad.isfinite().all()


def test_the_gradient_of_the_label_variables_by_differences():
    g = torch.Generator().manual_seed(0)
    z, v = torch.randn(2, 3, 5, generator=g, dtype=torch.float64)
    given = torch.tensor([0, 1, 4])
    for how in ("softmax", "softmax twice"):
        def loss(v, how=how):  # in double precision, so without the library's per-sample loss
            log_f, log_y = z.log_softmax(1), v.log_softmax(1)
            held = F.cross_entropy(v if how == "softmax" else v.softmax(1), given)
            kl, entropy = (log_f.exp() * (log_f - log_y)).mean(), -(log_f.exp() * log_f).mean()
            return kl + 0.4 * held + 0.1 * entropy
        w = v.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(pencil.pencil_loss(z, w, given, 0.4, 0.1, how), w)
        for i, c in np.ndindex(3, 5):
            step = torch.zeros_like(v)
            step[i, c] = 1e-6
            slope = (loss(v + step) - loss(v - step)).item() / 2e-6
            assert math.isclose(found[i, c].item(), slope, abs_tol=1e-6)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("how, bound", [("softmax", 1.0), ("softmax twice", 2.0)])
def test_labels_change_from_the_stated_weight_on(classes, how, bound):
    "At equal shares of the two classes, the gradient tips towards the prediction below the bound only."
    sure, given = torch.zeros(1, classes), torch.tensor([1])
    sure[0, 0] = 40.0
    for factor in (0.95, 1.05):
        v = torch.full((1, classes), -30.0)
        v[0, :2] = 0.0
        v.requires_grad_(True)
        (g,) = torch.autograd.grad(pencil.pencil_loss(sure, v, given, factor * bound / classes, 0.0, how), v)
        assert (g[0, 0] < 0) == (factor < 1)


def test_recent_predictions_are_averaged_in_half_precision():
    p = torch.rand(10, 6, 5, generator=torch.Generator().manual_seed(0)).softmax(2)
    mean = joint_optimisation.mean_labels(p.half(), "soft")
    torch.testing.assert_close(mean, sum(p) / 10, atol=1e-3, rtol=0)
    assert torch.equal(joint_optimisation.mean_labels(p.half(), "hard").sum(1), torch.ones(6))


# --- one step ---


def test_a_step_of_elr_against_autograd_on_a_copy():
    lab, stage = started("elr", view="none")
    other_lab, other = started("elr", view="none")
    batch = lab.batch(torch.arange(32), ("none",))
    logits = stage.net.train()(batch.images)
    p = logits.softmax(1)
    t = 0.3 * (p / p.sum(1, keepdim=True)).detach()
    loss = F.cross_entropy(logits, batch.labels) + 3 * (1 - (p * t).sum(1)).log().mean()
    loss.backward()
    other.net.train()
    other.set_rate(0.05)
    other.learn(other_lab, batch)
    for a, b in zip(stage.net.parameters(), other.net.parameters(), strict=True):
        moved = a - 0.05 * (a.grad + stage.config.weight_decay * a)
        torch.testing.assert_close(b, moved, atol=2e-5, rtol=1e-3)


def test_each_network_learns_from_the_average_of_the_other():
    lab, stage = started("elr-plus", view="none")
    batch = lab.batch(torch.arange(32), ("none",))
    for k in (0, 1):
        with torch.no_grad(): p = stage.averages[1 - k].train()(batch.images).softmax(1)
        before = [w.clone() for w in stage.averages[1 - k].parameters()]
        stage.learn(lab, k, batch, 1)
        torch.testing.assert_close(stage.tables[k, :32], 0.3 * p)
        for a, b in zip(before, stage.averages[1 - k].parameters(), strict=True): assert torch.equal(a, b)


def test_averages_follow_the_stated_decay():
    lab, stage = started("elr-plus", decay_steps=4, decay=0.9)
    expected = [w.clone() for w in stage.averages[0].parameters()]
    for step in range(1, 6):
        stage.learn(lab, 0, lab.batch(torch.arange(32)), step)
        kept = 0.9 * math.exp(-5 * (1 - min(step + 1, 4) / 4) ** 2)
        expected = [kept * e + (1 - kept) * w for e, w in
                    zip(expected, stage.nets[0].parameters(), strict=True)]
    for e, w in zip(expected, stage.averages[0].parameters(), strict=True): torch.testing.assert_close(w, e)


def test_losses_are_judged_by_the_mixture_of_the_epoch_before():
    lab, stage = started("m-correction")
    stage.epoch(lab, 0)
    expected = fit_betas(stage.loss[None])
    stage.epoch(lab, 1)
    for a, b in ((stage._mixture.a, expected.a), (stage._mixture.b, expected.b)): assert torch.equal(a, b)


def test_plain_mixup_until_the_warm_up_ends():
    lab, stage = started("m-correction", warmup=2)
    stage.epoch(lab, 0)
    assert stage._mixture is None and lab.passes == {"forward": 2 * lab.n, "backward": lab.n}
    assert stage.extras(lab)["mixture_means"].shape == (1, 2)


# --- tables ---


@pytest.mark.parametrize("name", METHODS)
def test_the_export_is_what_the_table_says(name, tmp_path):
    task = small_task()
    run = fit(name, task, tmp_path)
    labels = pd.read_csv(run.path / "labels.csv", dtype={"corrected": str})
    results = load_checkpoint(run)["lab"]["results"]
    soft = [r["soft"] for r in results.values() if r][-1]
    torch.testing.assert_close(soft.sum(1), torch.ones(len(soft)))
    names = [task.class_names[c] for c in soft.argmax(1).tolist()]
    assert labels["corrected"].tolist() == names
    p = soft[torch.arange(len(soft)), task.given]
    np.testing.assert_allclose(labels["p_clean"], p, atol=1e-5)
    json.dumps(run.result, allow_nan=False)


@pytest.mark.parametrize("name", METHODS)
def test_records_are_complete_and_asking_changes_nothing(name):
    lab, stage = started(name)
    for epoch in (0, 1):
        before = json.dumps({k: v.tolist() for k, v in stage.samples(lab).items()})
        state, random = stage_state(stage), lab.state()["generators"]
        told = stage.samples(lab)
        assert {"loss", "p_clean", "prediction", "corrected", "confidence"} <= told.keys()
        assert all(len(v) == lab.n for v in told.values()) and stage.features(lab) is not None
        stage.extras(lab)
        assert all(torch.equal(v, random[k]) for k, v in lab.state()["generators"].items())
        assert stage_state(stage).keys() == state.keys()
        assert json.dumps({k: v.tolist() for k, v in stage.samples(lab).items()}) == before
        stage.epoch(lab, epoch)


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_stage_goes_on_to_the_same_bits(name):
    lab, stage = started(name)
    stage.epoch(lab, 0)
    state = {k: v for k, v in torch.utils._pytree.tree_map(
        lambda v: v.clone() if isinstance(v, torch.Tensor) else v, stage_state(stage)).items()}
    random = torch.utils._pytree.tree_map(lambda v: v, lab.state())
    stage.epoch(lab, 1)
    other_lab, other = started(name)
    load_stage_state(other, state)
    other_lab.load_state(random)
    other.epoch(other_lab, 1)
    for k, v in stage.samples(lab).items(): assert torch.equal(v, other.samples(other_lab)[k]), k


# --- edges ---


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("noise", ["none", "symmetric:1"])
def test_noise_rates_at_the_ends(name, noise, tmp_path):
    run = fit(name, small_task(noise, n=100), tmp_path)
    assert run.finished and all(math.isfinite(row["loss"]) for row in run.metrics.read()[0])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("classes", [2, 100])
def test_two_and_a_hundred_classes(name, classes):
    lab, stage = started(name, tasks.drawn_task(classes))
    for epoch in range(3): assert all(map(math.isfinite, stage.epoch(lab, epoch).values()))


@pytest.mark.parametrize("name", METHODS)
def test_a_last_batch_of_one(name):
    task = small_task(n=150)
    n = len(task.train_index)
    lab, stage = started(name, task, batch=next(b for b in range(16, n) if n % b == 1))
    for epoch in range(3): assert all(map(math.isfinite, stage.epoch(lab, epoch).values()))


@pytest.mark.parametrize("name", METHODS)
def test_soft_labels_that_are_one_hot_change_nothing(name):
    task = small_task()
    a, b = (started(name, t) for t in (task, tasks.one_hot(task)))
    for lab, stage in (a, b): stage.epoch(lab, 0)
    torch.testing.assert_close(a[1].samples(a[0])["loss"], b[1].samples(b[0])["loss"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", ["M-DYR-S", "MD-DYR-SH"])
@pytest.mark.parametrize("how", [{}, dict(guessing="batch", posterior="table")])
def test_other_forms_train_on(form, how, tmp_path):
    run = fit("m-correction", small_task(), tmp_path, form=form, epochs=5, guided=1, cooling=3, **how)
    assert all(map(math.isfinite, numbers(run.metrics.read()[0])))


@pytest.mark.parametrize("changes", [dict(label_use="by targets"), dict(alpha=0.2)])
def test_other_choices_of_elr_plus_train_on(changes, tmp_path):
    run = fit("elr-plus", small_task(), tmp_path, **changes)
    assert all(map(math.isfinite, run.series("objective")))


def test_losses_that_diverge_are_named():
    lab, stage = started("m-correction")
    torch.nn.init.constant_(stage.net.head.weight, math.nan)
    with pytest.raises(BadInput, match="a loss is not finite: rate = 0.05 .* accepted: a smaller one"):
        stage.epoch(lab, 0)


def test_phases_that_do_not_follow_each_other_are_refused(tmp_path):
    with pytest.raises(BadInput, match="labels_until = 9, epochs = 3; accepted: plain_until <= labels_until"):
        fit("pencil", small_task(), tmp_path, labels_until=9)
    with pytest.raises(BadInput, match="variant = 'official'"): method_of("pencil", variant="official")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_recipes_hold_together(name, preset):
    task = small_task()
    for dataset in ("digits", "cifar10", "cifar10-jpeg[5000]", "cifar100", "folder"):
        for kind, rate in (("symmetric", 0.9), ("asymmetric", 0.4)):
            method = make_method(name, recipe(name, dataset, kind, rate, preset))
            method.check(task)
            if dataset == "digits": assert method.config.net == "cnn-digits"


def test_recipes_by_dataset_and_noise():
    def of(name, dataset, kind="symmetric", rate=0.5, preset="paper"):
        return make_method(name, recipe(name, dataset, kind, rate, preset)).config
    for name in ("elr", "elr-plus"):
        places = (("cifar10", "symmetric"), ("cifar10-jpeg[500]", "asymmetric"), ("cifar100", "symmetric"),
                  ("cifar100", "asymmetric"))
        found = [(c.beta, c.lambda_elr) for c in (of(name, *where) for where in places)]
        assert found == [(0.7, 3), (0.9, 1), (0.9, 7), (0.9, 7)]
    assert [of("m-correction", "cifar10", rate=r).form for r in (0.8, 0.9)] == ["M-DYR-H", "MD-DYR-SH"]
    assert of("joint-optimisation", "cifar10", "asymmetric").alpha == 0.8
