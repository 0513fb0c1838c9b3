"Weights over the epochs and a learned curve, against numbers computed from a run's arrays."
import json
import os

import numpy as np
import pytest

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.runs import Run, open_run, save_arrays, write_json

go = pytest.importorskip("plotly.graph_objects")
from lnl_bench.views import lambdas as view  # noqa: E402
from lnl_bench.views.moments import read_moment  # noqa: E402
from lnl_bench.views.theme import bundle  # noqa: E402

EPOCHS = [("warm-up", 0), ("train", 0), ("train", 1), ("train", 2)]


class Made:
    "A run directory with weights, losses and a learned curve, and the arrays written to it."

    def __init__(self, path, classes, known=True, name="weight", broken=0):
        rng, self.n = np.random.default_rng(classes), 20 * classes
        self.true, other = rng.integers(0, classes, (2, self.n))
        self.given = np.where(rng.random(self.n) < 0.4, other, self.true)
        self.clean = self.given == self.true
        self.values = rng.random((len(EPOCHS), self.n), dtype=np.float32)
        self.loss = rng.gamma(2, 1, self.n).astype(np.float32)
        self.values[:, :broken] = self.loss[:broken] = np.nan
        self.x = np.linspace(0, 5, 30)
        self.run = open_run(path, {"seed": classes}, {"stages": ["warm-up", "train"]})
        write_json(self.run.path / "task.json", {"class_names": [f"class {i}" for i in range(classes)]})
        truth = {"true": self.true} if known else {}
        save_arrays(self.run.path / "samples.npz", {"index": np.arange(self.n), "given": self.given, **truth})
        curve = {"extra.curve_loss": self.x, "extra.curve_weight": np.exp(-self.x)}
        for (stage, epoch), values in zip(EPOCHS, self.values, strict=True):
            self.run.save_snapshot(stage, epoch, {name: values, "loss": self.loss, **curve})


@pytest.fixture(params=[2, 10, 100])
def classes(request): return request.param


@pytest.fixture(params=[True, False], ids=["truth", "no-truth"])
def made(request, classes, tmp_path): return Made(tmp_path / "run", classes, request.param, broken=3)


def note(fig): return fig.layout.title.subtitle.text.replace("<br>", " ")


def known(made): return "true" in made.run.samples()


def groups_of(made):
    if known(made): return {"clean": made.clean, "mislabelled": ~made.clean}
    return {"samples": np.ones(made.n, bool)}


def test_means_and_bands(made):
    fig = view.lambda_figure(made.run)
    groups = groups_of(made)
    lines = {t.name: t for t in fig.data}
    assert len(fig.data) == 2 * len(groups) and ("not known" in note(fig)) != known(made)
    for name, which in groups.items():
        part, line = made.values[:, which], lines[f"{name}: mean"]
        low, high = np.nanpercentile(part, [10, 90], axis=1)
        assert line.x.tolist() == [1, 2, 3, 4]
        np.testing.assert_allclose(line.y, np.nanmean(part.astype(np.float64), axis=1), rtol=1e-6)
        np.testing.assert_allclose(line.customdata, np.stack([low, high], 1), rtol=1e-6)
        edge = lines[f"{name}: 10th to 90th percentile"]
        np.testing.assert_allclose(edge.y, np.concatenate([low, high[::-1]]), rtol=1e-6)
    assert "12 values are NaN or infinite" in note(fig)
    assert [s.x0 for s in fig.layout.shapes] == [0.5, 1.5]


def test_a_samples_own_path(made):
    for sample in (0, 7):
        own = view.lambda_figure(made.run, sample=sample).data[-1]
        assert np.array_equal(own.y, made.values[:, sample], equal_nan=True)
        assert own.name.startswith(f"position {sample}, given class {made.given[sample]}")
        assert (f"true class {made.true[sample]}" in own.name) == known(made)
    for wrong in (-1, made.n):
        with pytest.raises(BadInput, match=f"sample = {wrong}"): view.lambda_figure(made.run, sample=wrong)


def test_clean_probability_stands_in_and_says_so(tmp_path):
    made = Made(tmp_path / "run", 10, name="p_clean")
    fig = view.lambda_figure(made.run)
    assert "records no weight" in note(fig) and fig.layout.yaxis.title.text.startswith("clean probability")
    assert np.allclose(fig.data[1].y, made.values[:, made.clean].mean(1))
    assert "records no weight" not in note(view.lambda_figure(made.run, name="p_clean"))
    assert "weight or λ" in view.lambda_figure(Made(tmp_path / "b", 2).run).layout.yaxis.title.text
    with pytest.raises(BadInput, match="no per-sample confidence"):
        view.lambda_figure(made.run, name="confidence")


def test_all_broken_and_one_sided(tmp_path):
    made = Made(tmp_path / "run", 2, broken=40)
    fig = view.lambda_figure(made.run)
    assert np.isnan(fig.data[1].y).all() and "160 values" in note(fig)
    assert view.split_spread(made.loss, made.true, made.true)["mislabelled"].broken == 0


def test_files_are_read_once(tmp_path, monkeypatch):
    made, read = Made(tmp_path / "run", 10), []
    load = view.load_arrays
    monkeypatch.setattr(view, "load_arrays", lambda path: read.append(path) or load(path))
    for _ in range(3): view.lambda_figure(made.run)
    assert len(read) == len(EPOCHS)
    path = made.run.snapshots()[-1][2]
    changed = dict(load(path), weight=np.ones(made.n, np.float32))
    made.run.save_snapshot("train", 2, changed)
    os.utime(path, ns=(1, 1))
    assert view.lambda_figure(made.run).data[1].y[-1] == 1 and len(read) == len(EPOCHS) + 1


def test_curve_above_the_losses(made):
    fig = view.curve_figure(read_moment(made.run))
    assert np.allclose(fig.data[0].x, made.x) and np.allclose(fig.data[0].y, np.exp(-made.x))
    groups = groups_of(made)
    finite = np.isfinite(made.loss)
    top = max(5, np.quantile(made.loss[finite], 0.995))
    for trace, (name, which) in zip(fig.data[1:], groups.items(), strict=True):
        losses = made.loss[which & finite]
        assert trace.name == f"{name} ({len(losses):,})" and trace.yaxis == "y2"
        counts = np.histogram(losses, np.linspace(0, top, 61))[0]
        assert np.allclose(trace.y[:-1] * len(losses), counts, atol=1.01) and np.isclose(trace.x[-1], top)
        assert np.isclose(trace.y[:-1].sum(), np.mean(losses <= top), atol=1e-6)
    beyond = (made.loss[finite] > top).sum()
    assert "3 losses are NaN" in note(fig) and (f"{beyond:,} losses above" in note(fig)) == bool(beyond)
    assert ("not told apart" in note(fig)) != known(made)


def test_curves_that_cannot_be_drawn(tmp_path):
    made = Made(tmp_path / "run", 2)
    def moment(**arrays):
        made.run.save_snapshot("train", 3, {k.replace("__", "."): v for k, v in arrays.items()})
        return read_moment(made.run)
    with pytest.raises(BadInput, match="no learned weighting curve at train, epoch 4"):
        view.curve_figure(moment(loss=made.loss))
    with pytest.raises(BadInput, match="as many weights"):
        view.curve_figure(moment(extra__curve_loss=np.zeros(3), extra__curve_weight=np.zeros(2)))
    alone = moment(extra__curve_loss=np.array([2.0, 1.0]), extra__curve_weight=np.array([0.2, 0.1]))
    fig = view.curve_figure(alone)
    assert fig.data[0].x.tolist() == [1, 2] and "no per-sample losses" in note(fig) and len(fig.data) == 1
    one = moment(extra__curve_loss=np.ones(1), extra__curve_weight=np.ones(1),
                 loss=np.full(made.n, np.nan, np.float32))
    assert "40 losses are NaN" in note(view.curve_figure(one))


def test_runs_with_nothing_to_show_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no run directory"): view.lambda_figure(Run(tmp_path / "missing"))
    run = open_run(tmp_path / "run", {})
    with pytest.raises(BadInput): view.lambda_figure(run)
    write_json(run.path / "task.json", {"class_names": ["a", "b"]})
    save_arrays(run.path / "samples.npz", {"given": np.array([0, 1, 1])})
    with pytest.raises(BadInput, match="no per-sample weight and no per-sample p_clean"):
        view.lambda_figure(run)
    run.save_snapshot("train", 0, {"weight": np.zeros(2, np.float32)})
    with pytest.raises(BadInput, match="accepted: 3, one a sample"): view.lambda_figure(run)
    (run.path / "snapshots" / "train-0000.npz").write_bytes(b"not an archive")
    with pytest.raises(BadInput, match="no readable arrays"): view.lambda_figure(run)


def test_saved_figures_are_small(made):
    for fig in (view.lambda_figure(made.run, 0), view.curve_figure(read_moment(made.run))):
        assert len(json.dumps(bundle(fig))) < 20_000
