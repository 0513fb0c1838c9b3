"The losses of a moment against numbers from its arrays, with and without truth, for 2, 10 and 100 classes."

import numpy as np
import pytest
from scipy.stats import beta, ks_2samp, norm
from sklearn.metrics import roc_auc_score

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.runs import open_run, save_arrays, write_json
from lnl_bench.views import losses
from lnl_bench.views.moments import read_moment

N = 4000


class Made:
    "A run of one snapshot, and the arrays that were written to it."

    def __init__(self, path, classes, known, loss=None, **extras):
        rng = np.random.default_rng(classes)
        self.classes, self.known = classes, known
        self.true = rng.integers(0, classes, N)
        self.given = np.where(rng.random(N) < 0.4, rng.integers(0, classes, N), self.true)
        right = self.given == self.true
        heaps = np.where(right, rng.normal(0.5, 0.3, N), rng.normal(2.5, 0.6, N))
        self.loss = np.abs(heaps).astype(np.float32)
        if loss is not None: self.loss = loss(self.loss)
        self.run = open_run(path, {"seed": 0}, {"stages": ["train"]})
        write_json(path / "task.json", {"class_names": [f"class {c}" for c in range(classes)]})
        truth = {"true": self.true} if known else {}
        save_arrays(path / "samples.npz", {"index": np.arange(N), "given": self.given, **truth})
        more = {f"extra.{k}": np.asarray(v) for k, v in extras.items()}
        self.run.save_snapshot("train", 0, {"loss": self.loss, **more})

    @property
    def moment(self): return read_moment(self.run)


@pytest.fixture(params=[True, False], ids=["truth", "no-truth"])
def known(request): return request.param


@pytest.mark.parametrize("classes", [2, 10])
def test_histograms_hold_each_sample_once(tmp_path, classes, known):
    made = Made(tmp_path / "run", classes, known)
    edges = losses.bin_edges(made.loss)
    bars = [t for t in losses.losses_figure(made.moment).data if t.type == "bar"]
    assert len(bars) == classes * (2 if known else 1)
    for c in range(classes):
        mine = [t for t in bars if t.xaxis == f"x{c + 1 if c else ''}"]
        heaps = {"samples": made.given == c} if not known else {
            "clean": (made.given == c) & (made.true == c),
            "mislabelled": (made.given == c) & (made.true != c)}
        assert {t.name for t in mine} == heaps.keys()
        for trace in mine:
            direct = np.histogram(np.minimum(made.loss[heaps[trace.name]], edges[-1]), edges)[0]
            assert (trace.y == direct).all() and np.allclose(trace.x, (edges[1:] + edges[:-1]) / 2)


@pytest.mark.parametrize("classes", [2, 10])
def test_captions_print_auc_and_distance(tmp_path, classes, known):
    made = Made(tmp_path / "run", classes, known)
    captions = [a.text for a in losses.losses_figure(made.moment).layout.annotations]
    assert len(captions) == classes
    for c, text in enumerate(captions):
        mine = made.given == c
        distance = ks_2samp(made.loss[mine], made.loss).statistic
        assert f"<b>class {c}</b>" in text and f"KS {distance:.2f}" in text
        auc = roc_auc_score((made.given != made.true)[mine], made.loss[mine])
        assert (f"AUC {auc:.2f}" in text) == known


def test_many_classes_are_rows_of_a_map(tmp_path, known):
    made = Made(tmp_path / "run", 100, known)
    figure = losses.losses_figure(made.moment)
    (heat,) = figure.data
    distances = [ks_2samp(made.loss[made.given == c], made.loss).statistic for c in range(100)]
    order = np.argsort(-np.array(distances), kind="stable")
    assert [int(name.split()[1]) for name in heat.y[:3]] == order[:3].tolist()
    edges = losses.bin_edges(made.loss)
    direct = np.histogram(np.minimum(made.loss[made.given == order[0]], edges[-1]), edges)[0]
    assert np.allclose(heat.z[0], direct / direct.sum())
    assert len(losses.losses_figure(made.moment, 57).data) >= 1


def test_recorded_gaussians_are_drawn_as_recorded(tmp_path):
    weights, means, scales = [[0.6, 0.4]], [[0.5, 2.5]], [[0.3, 0.6]]
    made = Made(tmp_path / "run", 10, True, mixture_weights=weights, mixture_means=means,
                mixture_scales=scales, threshold=0.5)
    figure = losses.losses_figure(made.moment, "all")
    assert "recorded" in figure.layout.title.subtitle.text
    (line,) = [t for t in figure.data if t.type == "scatter"]
    x, width = line.x[:-3], losses.bin_edges(made.loss)[1] - losses.bin_edges(made.loss)[0]
    direct = 0.6 * norm.pdf(x, 0.5, 0.3) + 0.4 * norm.pdf(x, 2.5, 0.6)
    assert np.allclose(line.y[:-3], direct * N * width, rtol=1e-3, atol=1e-3)
    clean = 0.6 * norm.pdf(line.x[-1], 0.5, 0.3) / (0.6 * norm.pdf(line.x[-1], 0.5, 0.3)
                                                  + 0.4 * norm.pdf(line.x[-1], 2.5, 0.6))
    assert abs(clean - 0.5) < 0.05  # the threshold is where both are equally likely


def test_recorded_betas_are_drawn_on_the_losses(tmp_path):
    made = Made(tmp_path / "run", 10, True, mixture_weights=[[0.7, 0.3]], mixture_a=[[2, 6]],
                mixture_b=[[8, 3]], mixture_range=[0.0, 4.0])
    figure = losses.losses_figure(made.moment, "all")
    (line,) = [t for t in figure.data if t.type == "scatter"]
    x, width = np.array(line.x[:-3]), losses.bin_edges(made.loss)[1] - losses.bin_edges(made.loss)[0]
    direct = (0.7 * beta.pdf(x / 4, 2, 8) + 0.3 * beta.pdf(x / 4, 6, 3)) / 4
    inside = (x > 0.05) & (x < 3.95)
    assert np.allclose(line.y[:-3][inside], (direct * N * width)[inside], rtol=1e-3)


def test_losses_that_are_no_numbers_are_counted(tmp_path, known):
    def broken(loss):
        loss[:7], loss[7] = np.nan, np.inf
        return loss
    made = Made(tmp_path / "run", 10, known, loss=broken)
    figure = losses.losses_figure(made.moment)
    assert "8 losses are NaN or infinite and not drawn" in figure.layout.title.subtitle.text
    assert sum(t.y.sum() for t in figure.data if t.type == "bar") == N - 8


def test_what_cannot_be_drawn_is_refused(tmp_path):
    made = Made(tmp_path / "run", 10, True, loss=lambda x: np.full_like(x, np.nan))
    with pytest.raises(BadInput, match="all 4,000 losses"): losses.losses_figure(made.moment)
    other = Made(tmp_path / "b", 10, True)
    with pytest.raises(BadInput, match="class"): losses.losses_figure(other.moment, 10)
    made.run.save_snapshot("train", 1, {"prediction": made.given})
    with pytest.raises(BadInput, match="no per-sample loss"): losses.losses_figure(made.moment)


@pytest.mark.parametrize("loss", [np.zeros_like, np.ones_like, lambda x: x * 0 + (np.arange(N) < 3)],
                         ids=["zero", "one", "two-values"])
def test_heaps_without_width_have_no_mixture(tmp_path, loss):
    made = Made(tmp_path / "run", 10, True, loss=loss)
    figure = losses.losses_figure(made.moment)
    assert sum(t.y.sum() for t in figure.data if t.type == "bar") == N
    for trace in figure.data:
        if trace.type == "scatter": assert np.isfinite(np.delete(trace.y, -3)).all()
