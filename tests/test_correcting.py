"MLC and MSLC: correctors, their gradients, what is coupled, where they start, compositions, and edges."

import copy
import itertools
import math
import types

import pandas as pd
import pytest
import tasks
import torch
import torch.nn.functional as F
from torch import nn

import lnl_bench.engine.train as trainer
from lnl_bench.data.checks import BadInput
from lnl_bench.data.task import truth_of
from lnl_bench.engine.contract import REGISTRY, load_stage_state, make_method, stage_state
from lnl_bench.engine.metagrad import ENGINES, TrainingPass, Trusted, VirtualStep
from lnl_bench.engine.nets import make_net
from lnl_bench.engine.pretrain import features_of
from lnl_bench.engine.train import Stopped, load_checkpoint, train
from lnl_bench.methods.catalogue import configured
from lnl_bench.methods.divide_mix import CoDivide
from lnl_bench.methods.mlc import CorrectLabels, MLCConfig, corrector_gradient, make_corrector, soft_loss
from lnl_bench.methods.mslc import MixLabels, MSLCConfig, hardened, mixed_labels, mixing_gradient
from lnl_bench.methods.mw_net import make_weigher
from lnl_bench.methods.recipes import recipe

SMALL = dict(net="cnn-digits", epochs=3, batch=40, rate=0.05, trusted_batch=30, schedule="cosine")
FEATURES = dict(feature_net="cnn-digits", feature_epochs=1, feature_batch=64, feature_rate=0.02)
STAGES = {"mlc": (CorrectLabels, MLCConfig), "mslc": (MixLabels, MSLCConfig)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return tmp_path_factory.mktemp("cache")


def started(name, task=None, cache=None, **changes):
    stage, config = STAGES[name]
    torch.manual_seed(0)
    changes = SMALL | ({"plain_epochs": 1} if name == "mslc" else {}) | changes
    task = task or tasks.digits_task("symmetric:0.4", n=200, trusted=5)
    return tasks.started(stage(config(**changes)), task, cache_dir=cache)


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


# --- where the network starts ---


def same(a, b): return {k: torch.equal(v, b[k]) for k, v in a.items()}


@pytest.mark.parametrize("representation", ["simclr", "moco"])
@pytest.mark.parametrize("name", STAGES)
def test_a_pre_trained_start_has_the_encoder_and_its_own_head(name, representation, cache):
    lab, stage = started(name, cache=cache, representation=representation, **FEATURES)
    encoder = features_of(lab, stage.config).net.body.state_dict()
    assert all(same(stage.net.body.state_dict(), encoder).values())
    assert all(p.requires_grad for p in stage.net.parameters()), "the stored one is frozen, a copy not"
    _, usual = started(name)
    assert same(usual.net.state_dict(), stage.net.state_dict())["head.weight"], "the head is drawn as ever"
    assert not any(same(usual.net.body.state_dict(), encoder)[k] for k, v in encoder.items() if v.ndim == 4)


@pytest.mark.parametrize("name", STAGES)
def test_training_does_not_change_the_store(name, cache):
    lab, stage = started(name, cache=cache, representation="simclr", plain_epochs=0, **FEATURES)
    before = copy.deepcopy(features_of(lab, stage.config).net.state_dict())
    stage.epoch(lab, 0)
    assert all(same(before, features_of(lab, stage.config).net.state_dict()).values())
    assert not same(before, stage.net.state_dict())["body.0.weight"]


@pytest.mark.parametrize("name", STAGES)
def test_a_random_start_asks_for_no_pre_training(name, tmp_path):
    started(name, cache=tmp_path / "cache", **FEATURES)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(BadInput, match="cache_dir = None"):
        started(name, representation="simclr", **FEATURES)


def test_both_share_one_pre_training_with_dmlp(tmp_path):
    for name in STAGES: lab, stage = started(name, cache=tmp_path, representation="simclr", **FEATURES)
    assert features_of(lab, make_method("dmlp", FEATURES).config).key == features_of(lab, stage.config).key
    for made in ("pretrain/*/result.json", "features/*/encoder.pt"):
        assert len(list(tmp_path.glob(made))) == 1, made


@pytest.mark.parametrize("name", STAGES)
def test_pre_training_is_needed_only_when_asked_for(name):
    assert REGISTRY[name].needs == make_method(name).needs == ("trusted set",)
    asked = make_method(name, SMALL | FEATURES | {"representation": "moco"})
    assert asked.needs == ("trusted set", "pre-training")
    chained = make_method(f"{name}-divide-mix")
    assert chained.needs == ("trusted set", "two networks"), "its own settings, without the recipe"
    assert configured(f"{name}-divide-mix", tasks.digits_task(trusted=5)).needs[1] == "pre-training"


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("values, says", [
    ({"representation": "simclr", "net": "cnn-small"}, "net = 'cnn-small' cannot start .*'cnn-digits'"),
    ({"representation": "moco", "net": "cnn-digits", "feature_net": "cnn9"}, "cannot start .*'cnn9'"),
    ({"representation": "pixels"}, "representation = 'pixels' is not known; accepted: random, simclr, moco"),
    ({"publish": "both"}, "publish = 'both' is not known; accepted: hard, soft")], ids=str)
def test_a_start_that_does_not_fit_is_refused(name, values, says):
    with pytest.raises(BadInput, match=says): make_method(name, SMALL | FEATURES | values)


@pytest.mark.parametrize("name", STAGES)
def test_a_network_of_another_kind_does_not_matter_from_random_weights(name):
    make_method(name, {"net": "cnn-small", "feature_net": "resnet50"})


@pytest.mark.parametrize("plain", [0, 1])
@pytest.mark.parametrize("name", STAGES)
def test_a_decoupled_pre_trained_body_is_frozen_when_correction_begins(name, plain, cache):
    how = dict(cache=cache, representation="simclr", plain_epochs=plain, **FEATURES)
    ends = {}
    for coupling in ("decoupled", "coupled"):
        lab, stage = started(name, coupling=coupling, **how)
        for e in range(plain): stage.epoch(lab, e)
        before = copy.deepcopy(stage.net.state_dict())
        if not plain: assert all(same(features_of(lab, stage.config).net.body.state_dict(),
                                      stage.net.body.state_dict()).values())
        for e in range(plain, 3): stage.epoch(lab, e)
        ends[coupling] = same(before, stage.net.state_dict())
    body = [k for k in before if k.startswith("body.")]
    assert all(ends["decoupled"][k] for k in body), "weights and running statistics, to the bit"
    assert not any(ends["coupled"][k] for k in body)
    assert not ends["decoupled"]["head.weight"] and not ends["coupled"]["head.weight"]


@pytest.fixture
def polls_always(monkeypatch):
    "The trainer looks for requests at most every 0.2 s; here at every batch."
    clock = types.SimpleNamespace(**vars(trainer.time))
    clock.monotonic = itertools.count().__next__
    monkeypatch.setattr(trainer, "time", clock)


@pytest.mark.parametrize("coupling", ["coupled", "decoupled"])
@pytest.mark.parametrize("name", STAGES)
def test_stopped_in_the_middle_it_ends_with_the_same_bits(name, coupling, tmp_path, cache, polls_always):
    "Between two epochs of correction and within one, from a pre-trained start."
    task = tasks.digits_task("symmetric:0.4", n=200, trusted=5)
    values = SMALL | FEATURES | dict(representation="simclr", coupling=coupling, plain_epochs=1)

    def go(where, poll=None):
        return train(make_method(name, values), task, run_dir=tmp_path / where, cache_dir=cache, poll=poll,
                     progress="off", precision="float32")

    started(name, task, cache, **values)  # features are in the store: all runs poll as often as each other
    polls = []
    whole = go("whole", lambda: polls.append(0))
    for stop_at in (len(polls) // 2, 3 * len(polls) // 4):
        left = iter([False] * (stop_at - 1) + [True])

        def stop(left=left):
            if next(left): raise Stopped

        where = f"stopped-{stop_at}"
        assert not go(where, stop).finished
        run = go(where)
        assert run.finished
        for file in ("metrics.jsonl", "labels.csv"):
            assert (run.path / file).read_bytes() == (whole.path / file).read_bytes(), file
        a, b = (load_checkpoint(r)["stage"]["net"]["weights"] for r in (run, whole))
        assert all(same(a, b).values())


@pytest.mark.parametrize("name", STAGES)
def test_a_fixed_body_has_a_rate_of_its_own(name, cache):
    how = dict(cache=cache, representation="simclr", plain_epochs=1, epochs=4, **FEATURES)
    told = {(coupling, rate): [row["rate"] for row in
                               trained(name, 3, coupling=coupling, decoupled_rate=rate, **how)[2]]
            for coupling in ("coupled", "decoupled") for rate in (0.0, 0.2)}
    plain = told["coupled", 0.0]
    assert told["coupled", 0.2] == told["decoupled", 0.0] == plain
    assert told["decoupled", 0.2][0] == plain[0], "in plain epochs nothing is fixed"
    assert told["decoupled", 0.2][1:] == pytest.approx([4 * rate for rate in plain[1:]])
    same_rate = trained(name, 2, coupling="decoupled", decoupled_rate=SMALL["rate"], **how)[1]
    usual = trained(name, 2, coupling="decoupled", **how)[1]
    assert all(same(same_rate.net.state_dict(), usual.net.state_dict()).values())
    with pytest.raises(BadInput, match="decoupled_rate = -0.1 is out of range"):
        make_method(name, {"decoupled_rate": -0.1})


# --- followed by DivideMix ---


@pytest.fixture
def handed_over(monkeypatch):
    "The labels (n, C) that DivideMix starts with."
    seen, start = [], CoDivide.start

    def spy(self, lab):
        start(self, lab)
        seen.append(self._labels.clone())

    monkeypatch.setattr(CoDivide, "start", spy)
    return seen


# In two epochs MSLC would change no label.
CORRECTS = {"mlc": {}, "mslc": dict(epochs=12, plain_epochs=8, view="none", variant="released", batch=32)}


@pytest.mark.parametrize("publish", ["hard", "soft"])
@pytest.mark.parametrize("name", STAGES)
def test_divide_mix_trains_on_the_corrected_labels(name, publish, tmp_path, cache, handed_over):
    task, chained = tasks.digits_task("symmetric:0.4", n=300, trusted=5), f"{name}-divide-mix"
    changes = {"publish": publish, "meta_rate": 0.1} | CORRECTS[name]
    method = configured(chained, task, "smoke", {f"{name}.{k}": v for k, v in changes.items()})
    where = dict(cache_dir=cache, progress="off", precision="float32")
    whole = train(method, task, run_dir=tmp_path / "whole", **where)
    alone = train(make_method(name, method.methods[0].describe()), task, run_dir=tmp_path / "alone", **where)
    tables = [pd.read_csv(run.path / "labels.csv") for run in (whole, alone)]
    assert (tables[0] == tables[1]).all(axis=None), "what is exported are the corrector's labels"
    corrected = torch.tensor([task.class_names.index(str(c)) for c in tables[1]["corrected"]])
    assert (corrected != task.given).float().mean() > 0.1, "some were corrected"
    (labels,) = handed_over
    soft = load_checkpoint(alone)["stage"]["table"]
    assert torch.equal(labels.argmax(1), corrected)
    assert torch.equal(labels, F.one_hot(corrected, 10).float() if publish == "hard" else soft)
    rows = whole.metrics.read()[0]
    assert [r["stage"] for r in rows] == [name] * method.methods[0].config.epochs + ["divide-mix"] * 4
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))


@pytest.mark.parametrize("name", STAGES)
def test_a_composition_starts_as_table_6_does(name):
    for preset, net in (("smoke", "cnn-small"), ("laptop", "cnn-small"), ("gpu", "resnet18"),
                        ("paper", "resnet18")):
        config = make_method(f"{name}-divide-mix", recipe(f"{name}-divide-mix", "cifar10", "symmetric", 0.5,
                                                          preset)).methods[0].config
        assert (config.representation, config.net, config.coupling) == ("simclr", net, "coupled")
        alone = make_method(name, recipe(name, "cifar10", "symmetric", 0.5, preset)).config
        assert alone.representation == "random"
        digits = recipe(f"{name}-divide-mix", "digits", "symmetric", 0.5, preset)
        assert digits[f"{name}.net"] == digits[f"{name}.feature_net"] == "cnn-digits"


def test_rows_of_a_composition_leave_the_others_alone():
    for name in ("dmlp-divide-mix", "dmlp-naive"):
        first, second = REGISTRY[name].parts
        parts = {f"{p}.{k}": v for p in (first, second) for k, v in recipe(p, "digits").items()}
        assert recipe(name, "digits") == parts
