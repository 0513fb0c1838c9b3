"Semantic noise: the clean part, the network behind the labels, what is kept of it, and refusals."

import csv
import dataclasses
import json
import threading
import time

import filelock
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lnl_bench.cli import app
from lnl_bench.data.checks import BadInput
from lnl_bench.data.noise import Noise, make_noise, transition_matrix
from lnl_bench.data.sources import digits, from_arrays
from lnl_bench.data.task import make_task, subset, truth_of
from lnl_bench.engine.train import train
from lnl_bench.methods.cross_entropy import CrossEntropy, TrainOnLabels
from lnl_bench.repro import semantic_noise as sn
from lnl_bench.repro.experiment import Parameters, Where, build_task, check_noise, noise_on
from lnl_bench.repro.results import result_row

SOURCE = subset(digits(), 400, seed=0)
QUICK = dict(epochs=6, progress="off", device="cpu")


def quick(share=0.2, seed=0, **more): return sn.weak_labels(SOURCE, share, seed, **QUICK | more)


def kept(folder): return sorted(folder.rglob("*.npz"))


def never(*_, **__): raise AssertionError("a network was trained")


# ---- the part


@pytest.mark.parametrize("share", [0.05, 0.2, 0.29, 0.9])
def test_the_part_is_a_stratified_share(share):
    source = digits()
    part = sn.clean_part(source, share, seed=1)
    counts, sizes = torch.bincount(source.labels[part]), torch.bincount(source.labels)
    assert len(part) == len(set(part.tolist())) == int(share * 1297)
    assert ((counts - share * sizes).abs() <= 1).all()
    assert torch.equal(part, part.sort().values) and torch.equal(part, sn.clean_part(source, share, seed=1))
    assert not torch.equal(part, sn.clean_part(source, share, seed=2))


def test_the_network_sees_only_the_labels_of_the_part():
    part = sn.clean_part(SOURCE, 0.2, seed=0)
    hidden = torch.ones(400, dtype=torch.bool).index_fill(0, part, False)
    seen = sn.part_task(SOURCE, part).visible()
    assert (seen.labels[hidden] == -1).all() and torch.equal(seen.labels[part], SOURCE.labels[part])
    changed = SOURCE.labels.clone()
    changed[hidden] = (changed[hidden] + 3) % 10  # what it cannot see must not matter
    other = dataclasses.replace(SOURCE, labels=changed)
    config = sn.training(SOURCE, epochs=3)
    one, two = (sn.predicted_labels(s, part, config, 0, "cpu", "off") for s in (SOURCE, other))
    assert torch.equal(one, two)


# ---- the labels


def test_the_part_keeps_its_labels_and_the_rate_is_that_of_the_rest():
    given, part = quick(), sn.clean_part(SOURCE, 0.2, seed=0)
    wrong = [i for i in range(400) if given[i] != SOURCE.labels[i]]
    assert given.dtype == torch.int64 and 0 < len(wrong) < 320 and not set(wrong) & set(part.tolist())
    made = sn._as_noise(given, SOURCE, 0.2, 0, sn.training(SOURCE, epochs=6))
    assert made.identity["realised"] == len(wrong) / 400 and made.identity["nominal"] is None
    for c in range(10):
        mine = given[SOURCE.labels == c].tolist()
        assert made.identity["matrix"][c] == [mine.count(j) / len(mine) for j in range(10)]


def test_the_seed_decides_the_labels_to_the_bit():
    torch.manual_seed(123)  # the caller's random state is neither used nor changed
    before = torch.get_rng_state()
    first = quick()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(quick(), first)
    for other in (dict(seed=1), dict(share=0.25), dict(epochs=7), dict(net="cnn-small")):
        assert not torch.equal(quick(**other), first), other


def test_predictions_are_those_of_the_same_training_by_the_engine(tmp_path):
    "The loop around runs, with its checkpoints and export, ends at the same network."
    part, config = sn.clean_part(SOURCE, 0.2, seed=0), sn.training(SOURCE, epochs=5)
    ours = sn.predicted_labels(SOURCE, part, config, seed=7, device="cpu", progress="off")
    how = dict(seed=7, device="cpu", precision="float32", progress="off", runs_dir=tmp_path)
    run = train(CrossEntropy(config), sn.part_task(SOURCE, part), **how)
    with open(run.path / "labels.csv") as file: rows = list(csv.DictReader(file))
    assert [int(r["index"]) for r in rows] == part.tolist()
    assert [int(r["corrected"]) for r in rows] == ours[part].tolist()


def test_a_longer_look_at_more_images_leaves_fewer_wrong():
    rates = [(quick(share, epochs=20) != SOURCE.labels).float().mean().item() for share in (0.1, 0.6)]
    assert rates[1] < rates[0] / 2


def test_the_usual_network_is_chosen_by_size():
    def of(size, channels=3):
        x = torch.zeros(4, channels, size, size, dtype=torch.uint8)
        return from_arrays(x, [0, 1, 0, 1], labels_are_true=True)
    assert [sn.training(of(s)).net for s in (8, 15, 16, 32)] == ["cnn-digits"] * 2 + ["cnn-small"] * 2
    assert sn.training(of(32), "vgg13").net == "vgg13" and sn.training(of(32, 1), "vgg13").epochs == sn.EPOCHS


# ---- kept


def test_it_is_trained_once_and_read_afterwards(tmp_path, monkeypatch):
    first = sn.semantic_noise(SOURCE, 0.2, 0, runs_dir=tmp_path, **QUICK)
    assert torch.equal(first.labels, quick())
    assert [first.identity] == [Noise.load(p).identity for p in kept(tmp_path)]
    told = {"kind": "semantic", "spec": "semantic:0.2:cnn-digits", "share": 0.2, "net": "cnn-digits",
            "epochs": 6, "seed": 0, "nominal": None, "clean": 80, "size": 400, "dataset": "digits[400]"}
    assert {k: first.identity[k] for k in told} == told
    matrix = transition_matrix(SOURCE.labels, first.labels, 10)
    assert np.allclose(first.identity["matrix"], matrix) and "0.2 of all" in first.identity["convention"]
    monkeypatch.setattr(sn, "weak_labels", never)
    again = sn.semantic_noise(SOURCE, 0.2, 0, runs_dir=tmp_path, **QUICK)
    assert again.identity == first.identity and torch.equal(again.labels, first.labels)
    task = make_task(SOURCE, again, trusted_per_class=3)
    assert (truth_of(task) == SOURCE.labels[task.train_index]).all()
    for other in (dict(share=0.25), dict(seed=1), dict(epochs=7), dict(net="cnn-small")):
        asked = dict(share=0.2, seed=0, runs_dir=tmp_path) | QUICK | other
        with pytest.raises(AssertionError, match="was trained"): sn.semantic_noise(SOURCE, **asked)
    relabelled = dataclasses.replace(SOURCE, labels=SOURCE.labels.flip(0))
    with pytest.raises(AssertionError, match="was trained"):
        sn.semantic_noise(relabelled, 0.2, 0, runs_dir=tmp_path, **QUICK)


def test_a_damaged_file_is_refused(tmp_path):
    sn.semantic_noise(SOURCE, 0.2, 0, runs_dir=tmp_path, **QUICK)
    file, = kept(tmp_path)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BadInput, match=file.name):
        sn.semantic_noise(SOURCE, 0.2, 0, runs_dir=tmp_path, **QUICK)


def test_stopped_it_leaves_nothing_and_begins_anew(tmp_path, monkeypatch):
    epoch = TrainOnLabels.epoch

    def interrupted(self, lab, number):
        if number == 3: raise KeyboardInterrupt
        return epoch(self, lab, number)

    monkeypatch.setattr(TrainOnLabels, "epoch", interrupted)
    with pytest.raises(KeyboardInterrupt): sn.semantic_noise(SOURCE, 0.2, 0, runs_dir=tmp_path, **QUICK)
    assert not kept(tmp_path)
    monkeypatch.setattr(TrainOnLabels, "epoch", epoch)
    made = sn.semantic_noise(SOURCE, 0.2, 0, runs_dir=tmp_path, **QUICK)
    assert torch.equal(made.labels, quick())


def test_whoever_comes_second_waits_and_does_not_train(tmp_path, monkeypatch):
    made = sn.semantic_noise(SOURCE, 0.2, 0, runs_dir=tmp_path, **QUICK)
    file, = kept(tmp_path)
    content, found = file.read_bytes(), []
    file.unlink()
    monkeypatch.setattr(sn, "weak_labels", never)

    def second(): found.append(sn.semantic_noise(SOURCE, 0.2, 0, runs_dir=tmp_path, **QUICK))

    with filelock.FileLock(f"{file}.lock"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(1)
        assert thread.is_alive() and not found
        file.write_bytes(content)
    thread.join(timeout=30)
    assert found[0].identity == made.identity


def test_progress_is_shown(capsys):
    quick(progress="auto")
    assert "6/6 cnn-digits on 80 clean images, loss" in capsys.readouterr().err
    quick(progress="off")
    assert capsys.readouterr().err == ""


# ---- refusals


@pytest.mark.parametrize("given, words", [
    (dict(share=0), "share = 0"), (dict(share=1), "share = 1"), (dict(share=-0.1), "share = -0.1"),
    (dict(share=2), "share = 2"), (dict(share=float("nan")), "share = nan"),
    (dict(share=0.005), "none of class"), (dict(net="vgg-13"), "vgg13"),
    (dict(net="vgg13"), "size of images for net 'vgg13' = 8"), (dict(epochs=0), "epochs = 0"),
    (dict(device="cuda:99"), "cuda:99")])
def test_what_cannot_be_is_refused_before_any_training(given, words, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainOnLabels, "epoch", never)
    with pytest.raises(BadInput, match=words):
        sn.semantic_noise(SOURCE, **dict(share=0.2, seed=0, runs_dir=tmp_path) | QUICK | given)
    assert not kept(tmp_path)


def test_only_true_labels_are_learned_from(tmp_path):
    for wrong in (dict(labels_are_true=False), dict(open_set=True)):
        source = dataclasses.replace(SOURCE, **wrong)
        with pytest.raises(BadInput, match="no clean part"):
            sn.semantic_noise(source, 0.2, 0, runs_dir=tmp_path)


@pytest.mark.parametrize("spec", ["semantic:0.05", "semantic:0.05:vgg13"])
def test_labels_alone_do_not_make_it(spec):
    with pytest.raises(BadInput, match="lnl_bench.repro.semantic_noise.semantic_noise"):
        make_noise(spec, SOURCE.labels, 10, 0)
    with pytest.raises(BadInput, match="semantic_noise"): make_task(SOURCE, spec)


@pytest.mark.parametrize("spec", ["semantic", "semantic:", "semantic:x", "semantic:0", "semantic:1",
                                  "semantic:1.2", "semantic:0.05:", "semantic:nan"])
def test_a_spec_that_cannot_be_is_refused(spec, tmp_path):
    with pytest.raises(BadInput): noise_on(SOURCE, spec, 0, "digits", Where(runs_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_network_that_diverges_says_so(monkeypatch):
    training = sn.training
    monkeypatch.setattr(sn, "training", lambda *a: dataclasses.replace(training(*a), rate=1e30))
    with pytest.raises(BadInput, match="diverged"): quick()


# ---- by name


def test_from_the_command_line(tmp_path, monkeypatch):
    asked = ["train", "cross-entropy", "--data", "digits[300]", "--noise", "semantic:0.2",
             "--preset", "smoke", "--trusted", "2", "--runs-dir", str(tmp_path), "--json"]
    for wrong in (["--preset", "quick"], ["--trusted", "99"], ["--set", "rate=-1"], ["--device", "cuda:99"]):
        done = CliRunner().invoke(app, [*asked, *wrong])
        assert isinstance(done.exception, BadInput) and not kept(tmp_path), wrong
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    file, = (p for p in kept(tmp_path) if p.parent.name == "noise")
    noise = Noise.load(file)
    assert noise.spec == "semantic:0.2:cnn-digits" and noise.identity["size"] == 300
    monkeypatch.setattr(sn, "weak_labels", never)
    again = json.loads(CliRunner().invoke(app, [*asked[:1], "gce", *asked[2:]]).stdout)
    assert again["label_accuracy_before"] == found["label_accuracy_before"] < 1


def test_from_a_notebook(tmp_path):
    p = Parameters(dataset="digits[300]", noise_type="semantic", noise=0.2, trusted=2, runs_dir=str(tmp_path))
    task = build_task(p)
    assert task.noise["net"] == "cnn-digits" and task.noise["share"] == 0.2
    named = dataclasses.replace(p, noise_type="semantic:cnn-small")
    check_noise(named)
    assert build_task(named).noise["spec"] == "semantic:0.2:cnn-small"
    for wrong in (dict(noise=0.0), dict(noise=1.0)):
        with pytest.raises(BadInput, match="clean share"): check_noise(dataclasses.replace(p, **wrong))


def test_its_row_says_what_it_is(tmp_path):
    p = Parameters(dataset="digits[300]", noise_type="semantic", noise=0.2, runs_dir=str(tmp_path))
    task, config = build_task(p), sn.training(SOURCE, epochs=1)
    row = result_row(train(CrossEntropy(config), task, runs_dir=tmp_path, preset="smoke", progress="off"))
    assert row["noise_type"] == "semantic:0.2:cnn-digits" and row["noise"] is None
    assert row["realised_noise"] == task.noise["realised"]
