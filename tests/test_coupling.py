"DMLP's Figure 2 from runs: what the probe measures, what the figure shows, and what it refuses."

import numpy as np
import pytest
import tasks

from lnl_bench.data.checks import BadInput
from lnl_bench.data.sources import digits
from lnl_bench.data.task import subset, task_from_labels
from lnl_bench.engine.runs import open_run, save_arrays, write_json
from lnl_bench.engine.train import train
from lnl_bench.methods.catalogue import configured
from lnl_bench.repro.coupling import PANELS, STARTS, coupling_figure, look_of, panel_values, probe_accuracy


@pytest.fixture(scope="module")
def task(): return tasks.digits_task(n=200, trusted=3)


@pytest.fixture(scope="module")
def fit(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    def go(name, on=task, **changes):
        method = configured(name, on, "smoke", changes)
        return train(method, on, runs_dir=folder, preset="smoke", progress="off")
    return go


@pytest.fixture(scope="module")
def runs(fit):
    return {"MLC": fit("mlc"), "MLC, SimCLR": fit("mlc", representation="simclr"),
            "MSLC, fixed": fit("mslc", coupling="decoupled"),
            "MSLC, MoCo": fit("mslc", representation="moco", feature_epochs=1),
            "with DivideMix": fit("mslc-divide-mix")}


def by_hand(folder, features, true, given=None, shown=None):
    "A run of one epoch with these features (k, d) and true labels (n,), which are not known if given are."
    config = {"coupling": "coupled", "representation": "random"}
    run = open_run(folder, {"method": "mlc", "config": config}, {"stages": ["mlc"], "epochs": [1]})
    write_json(run.path / "task.json", {"class_names": list("abcd")})
    labels = {"index": np.arange(len(true)), "given": np.zeros(len(true), int) if given is None else given}
    save_arrays(run.path / "samples.npz", labels | ({"true": true} if given is None else {}))
    save_arrays(run.path / "shown.npz", {"position": np.arange(len(true)) if shown is None else shown})
    run.save_snapshot("mlc", 0, {} if features is None else {"features": features.astype(np.float16)})
    return run


TRUE = np.arange(300) // 3 % 4


def test_the_probe_is_right_where_features_say_the_class(tmp_path):
    epochs, found = probe_accuracy(by_hand(tmp_path / "a", np.eye(4)[TRUE], TRUE))
    assert epochs.tolist() == [1] and found.tolist() == [1]
    random = np.random.default_rng(0).normal(size=(300, 5))
    assert 0.1 < probe_accuracy(by_hand(tmp_path / "b", random, TRUE))[1][0] < 0.45


def test_the_probe_takes_the_labels_of_the_shown_samples(tmp_path):
    shown = np.arange(100, 300)
    assert probe_accuracy(by_hand(tmp_path / "a", np.eye(4)[TRUE[shown]], TRUE, shown=shown))[1] == 1
    moved = probe_accuracy(by_hand(tmp_path / "b", np.eye(4)[TRUE[shown - 5]], TRUE, shown=shown))[1]
    assert moved < 0.9


def test_features_that_are_no_numbers_do_not_count(tmp_path):
    broken = np.where(np.arange(300)[:, None] % 5, np.eye(4)[TRUE], np.nan)
    assert probe_accuracy(by_hand(tmp_path / "a", broken, TRUE))[1] == 1
    for k, features in enumerate((np.full((300, 2), np.nan), None)):
        epochs, found = probe_accuracy(by_hand(tmp_path / f"none-{k}", features, TRUE))
        assert len(epochs) == len(found) == 0


def test_without_true_labels_or_classes_there_is_no_probe(tmp_path):
    assert not len(probe_accuracy(by_hand(tmp_path / "a", np.eye(4)[TRUE], TRUE, given=TRUE))[0])
    assert not len(probe_accuracy(by_hand(tmp_path / "b", np.eye(4)[TRUE], 0 * TRUE))[0])


def test_the_figure_has_every_run_in_every_panel(runs):
    fig = coupling_figure(runs)
    assert [t.name for t in fig.data if t.showlegend] == list(runs)
    assert [(t.name, t.yaxis) for t in fig.data] == [(name, axis) for name in runs for axis in PANELS]
    for t in fig.data:
        x, y = panel_values(runs[t.name])[t.yaxis]
        assert np.array_equal(t.x, x) and np.allclose(t.y, y) and len(x)
    for axis, (title, _) in PANELS.items():
        assert fig.layout[f"yaxis{axis[1:]}"].title.text == title and "%" in title
    assert fig.layout.xaxis.title.text == "epoch" and fig.layout.title.text


def test_a_composition_goes_on_with_what_follows(runs):
    "Epochs count over both stages; the corrected labels of both and the accuracy are shown."
    x, y = panel_values(runs["with DivideMix"])["y3"]
    assert x.tolist() == [1, 2, 3, 4, 5, 6] and np.isfinite(y).all()


def test_start_coupling_and_method_can_be_told_apart(runs):
    looks = {name: look_of(run) for name, run in runs.items()}
    kept = {name: (v["line"]["color"], v["line"]["dash"], v["marker"]["symbol"]) for name, v in looks.items()}
    assert kept["MLC"] == (STARTS["random"], "solid", "circle")
    assert kept["MLC, SimCLR"] == (STARTS["simclr"], "solid", "circle")
    assert kept["MSLC, fixed"] == (STARTS["random"], "dash", "diamond-open")
    assert kept["MSLC, MoCo"] == (STARTS["moco"], "solid", "diamond-open")
    assert len(set(kept.values())) == len(runs)


def test_what_cannot_be_drawn_is_refused(runs, fit, tmp_path):
    with pytest.raises(BadInput, match="run of cross-entropy; accepted: of mlc or mslc"):
        coupling_figure({**runs, "other": fit("cross-entropy")})
    with pytest.raises(BadInput, match="would look the same"):
        coupling_figure({"one": runs["MLC"], "two": runs["MLC"]})
    with pytest.raises(BadInput, match="runs = {} cannot be shown"): coupling_figure({})
    with pytest.raises(BadInput, match="no label_accuracy to show"):
        coupling_figure({"none": by_hand(tmp_path / "none", np.eye(4)[TRUE], TRUE)})


def test_a_task_whose_truth_is_unknown_is_refused_by_name(fit):
    source = subset(digits(), 150, seed=0)
    first = [i for c in range(10) for i in (source.labels == c).nonzero()[:2, 0].tolist()]
    known = {i: int(source.labels[i]) for i in first}
    unknown = task_from_labels(source, source.labels, known)
    with pytest.raises(BadInput, match="no label_accuracy"): coupling_figure({"mine": fit("mlc", unknown)})
