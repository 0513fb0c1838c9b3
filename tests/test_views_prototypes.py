"The plane of samples and prototypes: layouts, the process that makes them, figures against a run's arrays."
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.runs import open_run, save_arrays, write_json

go = pytest.importorskip("plotly.graph_objects")
from lnl_bench.views import prototypes as view  # noqa: E402
from lnl_bench.views.moments import read_moment  # noqa: E402


class Made:
    "A run directory with three epochs of features of some of its samples, and the arrays written to it."

    def __init__(self, path, classes, known=True, n=None, own=False, corrects=True):
        self.rng, self.classes, self.n = np.random.default_rng(classes), classes, n or max(120, 6 * classes)
        self.true, other = self.rng.integers(0, classes, (2, self.n))
        self.given = np.where(self.rng.random(self.n) < 0.4, other, self.true)
        self.position = np.sort(self.rng.permutation(self.n)[: self.n * 3 // 4])
        self.index = self.rng.permutation(10 * self.n)[: self.n]
        self.picture = self.rng.integers(0, 256, (len(self.position), 3, 6, 4), dtype=np.uint8)
        self.run = open_run(path, {"seed": classes}, {"stages": ["train"]})
        write_json(self.run.path / "task.json", {"class_names": [f"<class> {i}" for i in range(classes)]})
        truth = {"true": self.true} if known else {}
        save_arrays(self.run.path / "samples.npz", {"index": self.index, "given": self.given, **truth})
        save_arrays(self.run.path / "shown.npz", {"position": self.position, "picture": self.picture})
        homes = self.rng.normal(0, 1, (classes, 20))
        self.corrected, self.p_clean = np.where(self.rng.random(self.n) < 0.5, self.given, self.true), None
        for epoch in range(3): self.write(epoch, homes, own, corrects)

    def write(self, epoch, homes, own, corrects):
        noise = self.rng.normal(0, 0.5 - 0.03 * epoch, (len(self.position), 20))
        self.features = (homes[self.true[self.position]] + noise).astype(np.float16)
        self.p_clean = self.rng.random(self.n, dtype=np.float32)
        more = {"prototypes": homes.astype(np.float16)} if own else {}
        if corrects: more["corrected"] = self.corrected.astype(np.uint8)
        self.own = homes.astype(np.float16)
        self.run.save_snapshot("train", epoch, {"features": self.features, "p_clean": self.p_clean, **more})

    def flat(self):
        "A layout that needs no UMAP."
        return view.Layout(self.features[:, :2].astype(np.float32),
                           self.rng.normal(0, 1, (self.classes, 2)).astype(np.float32))


@pytest.fixture(params=[2, 10, 100])
def classes(request): return request.param


@pytest.fixture(params=[True, False], ids=["truth", "no-truth"])
def made(request, classes, tmp_path): return Made(tmp_path / "run", classes, request.param)


def samples(fig): return [t for t in fig.data if t.name != "prototypes"]


def moved(a, b):
    a, b = a - a.mean(0), b - b.mean(0)
    return np.sqrt(((a - b) ** 2).sum() / (a**2).sum())


@pytest.mark.parametrize("corrects", [True, False])
def test_prototypes_are_means_of_the_labels_now(classes, corrects, tmp_path):
    made = Made(tmp_path / "run", classes, corrects=corrects)
    features, prototypes = view.features_of(read_moment(made.run))
    now = (made.corrected if corrects else made.given)[made.position]
    for c in range(classes):
        of = features[now == c].astype(np.float64)
        if not len(of): assert np.isnan(prototypes[c]).all()
        else: np.testing.assert_allclose(prototypes[c], of.mean(0), atol=1e-5)


def test_a_methods_own_prototypes_are_taken(tmp_path):
    made = Made(tmp_path / "run", 10, own=True)
    moment = read_moment(made.run)
    assert np.array_equal(view.features_of(moment)[1], made.own)
    assert "the method's own" in view.prototypes_figure(moment, made.flat()).layout.title.subtitle.text
    save = dict(moment.arrays, prototypes=np.zeros((10, 7), np.float16))
    made.run.save_snapshot("train", 2, save)
    with pytest.raises(BadInput, match=r"accepted: \(10, 20\)"): view.features_of(read_moment(made.run))


def test_layouts_from_the_last_move_less_than_afresh(tmp_path):
    made = Made(tmp_path / "run", 10, n=600)
    first, second = (view.features_of(read_moment(made.run, n)) for n in (1, 2))
    start = view.embed(*first)
    on, afresh = view.embed(*second, start), view.embed(*second)
    assert np.array_equal(on.points, view.embed(*second, start).points)
    assert moved(start.points, on.points) < 0.6 * moved(start.points, afresh.points)
    assert np.isfinite(on.points).all() and np.isfinite(on.prototypes).all()


def test_layout_keeps_neighbours_as_umap_does(tmp_path):
    from sklearn.manifold import trustworthiness
    from umap import UMAP
    made = Made(tmp_path / "run", 10, n=400)
    x = made.features.astype(np.float32)
    ours = trustworthiness(x, view.placed(x, None), n_neighbors=10)
    theirs = trustworthiness(x, UMAP(random_state=0, n_jobs=1).fit_transform(x), n_neighbors=10)
    assert ours > theirs - 0.02 and ours > 0.85


@pytest.mark.parametrize("k", [0, 1, 2, 13, 14, 16, 40])
def test_few_samples_and_broken_features(k):
    rng = np.random.default_rng(k)
    x, c = rng.normal(0, 1, (k, 5)).astype(np.float16), rng.normal(0, 1, (3, 5)).astype(np.float16)
    c[1] = np.nan
    if k > 1: x[0, 2] = np.inf
    unknown, known = ((a, a[:3]) for a in (np.full((k + 3, 2), np.nan), rng.random((k + 3, 2))))
    for start in (None, (unknown[0][3:], unknown[1]), (known[0][3:], known[1])):
        layout = view.embed(x, c, start)
        lost = np.arange(k) == 0 if k > 1 else np.zeros(k, bool)
        assert (np.isnan(layout.points).all(1) == lost).all() and np.isnan(layout.prototypes[1]).all()
        assert np.isfinite(layout.points[~lost]).all() and np.isfinite(layout.prototypes[[0, 2]]).all()


def test_hover_data_are_the_arrays(made):
    moment, layout = read_moment(made.run), made.flat()
    fig = view.prototypes_figure(moment, layout, "given")
    seen = np.concatenate([t.customdata for t in samples(fig)])
    text = np.concatenate([np.array(t.text, object) for t in samples(fig)])[seen[:, 0].argsort()]
    xy = np.concatenate([np.stack([t.x, t.y], 1) for t in samples(fig)])[seen[:, 0].argsort()]
    seen = seen[seen[:, 0].argsort()]
    assert seen[:, 0].tolist() == list(range(len(made.position)))
    assert seen[:, 1].tolist() == made.position.tolist()
    assert np.array_equal(seen[:, 2], made.p_clean[made.position]) and np.array_equal(xy, layout.points)
    truth = moment.true is not None
    for place, at in enumerate(made.position):
        lines = [f"sample {made.index[at]}", f"given: &lt;class&gt; {made.given[at]}",
                 f"corrected: &lt;class&gt; {made.corrected[at]}"]
        assert text[place] == "<br>".join(lines + [f"true: &lt;class&gt; {made.true[at]}"] * truth)


@pytest.mark.parametrize("colour", ["given", "corrected", "true"])
def test_colours_are_the_labels(colour, classes, tmp_path):
    made = Made(tmp_path / "run", classes)
    layout, labels = made.flat(), getattr(made, colour)[made.position]
    fig = view.prototypes_figure(read_moment(made.run), layout, colour)
    if classes <= 12:
        assert [len(t.x) for t in samples(fig)] == np.bincount(labels, minlength=classes).tolist()
        assert len({(t.marker.color, t.marker.symbol) for t in samples(fig)}) == classes
    else:
        rank = np.argsort(np.argsort(layout.prototypes[:, 0]))
        assert np.allclose(samples(fig)[0].marker.color, rank[labels] / (classes - 1))
    assert len(fig.layout.annotations) == (classes if classes <= 24 else 0)
    fig = view.prototypes_figure(read_moment(made.run), layout, colour, highlight=1)
    others, mine = samples(fig)
    assert mine.customdata[:, 0].tolist() == np.flatnonzero(labels == 1).tolist()
    assert len(fig.layout.annotations) == 1
    assert len(others.x) + len(mine.x) == len(labels)


def test_other_colours(made):
    moment, layout = read_moment(made.run), made.flat()
    fig = view.prototypes_figure(moment, layout, "p_clean")
    assert np.array_equal(samples(fig)[0].marker.color, made.p_clean[made.position])
    if moment.true is None:
        for colour in ("true", "right"):
            with pytest.raises(BadInput, match="accepted: given, corrected, p_clean"):
                view.prototypes_figure(moment, layout, colour)
        assert "True labels are not known" in fig.layout.title.subtitle.text
        return
    right = (made.given == made.true)[made.position]
    fig = view.prototypes_figure(moment, layout, "right")
    assert [len(t.x) for t in samples(fig)] == [right.sum(), (~right).sum()]


def test_points_without_a_place_are_counted(tmp_path):
    made = Made(tmp_path / "run", 10)
    layout = made.flat()
    layout.points[[2, 5]], layout.prototypes[3] = np.nan, np.nan
    fig = view.prototypes_figure(read_moment(made.run), layout)
    note = fig.layout.title.subtitle.text.replace("<br>", " ")
    assert "2 samples with features that are not finite" in note and "1 classes have no prototype" in note
    assert sum(len(t.x) for t in samples(fig)) == len(made.position) - 2 and len(fig.layout.annotations) == 9


def test_saved_figures_are_small(tmp_path):
    made = Made(tmp_path / "run", 10, n=6000)
    fig = view.prototypes_figure(read_moment(made.run), made.flat())
    assert len(fig.to_json()) < 1_000_000


def test_thumbnails_escape_names_and_ids(made):
    moment = read_moment(made.run)
    at = made.position[4]
    (made.run.path / "labels.csv").write_text(f"index,id,given\n{made.index[at]},<img onerror=x>.png,a\n")
    page = view.thumbnail_html(moment, 4)
    assert "&lt;img onerror=x&gt;.png" in page and f"given: &lt;class&gt; {made.given[at]}" in page
    assert len(re.findall("<(?!br>)", page)) == 5 and f"clean probability: {made.p_clean[at]:.3f}" in page
    assert ("true: " in page) == (moment.true is not None)
    with pytest.raises(BadInput, match="place = -1"): view.thumbnail_html(moment, -1)


def test_moments_with_nothing_to_show_are_refused(tmp_path):
    made = Made(tmp_path / "run", 2)
    made.run.save_snapshot("train", 3, {"loss": np.zeros(made.n, np.float32)})
    with pytest.raises(BadInput, match="no features at train, epoch 4"):
        view.features_of(read_moment(made.run))
    assert view.shown_moment(made.run).number == 3
    for broken in ({"position": np.array([0, made.n]), "picture": made.picture[:2]},
                   {"position": made.position, "picture": made.picture[:2]}, {"picture": made.picture}):
        save_arrays(made.run.path / "shown.npz", broken)
        with pytest.raises(BadInput, match=r"shown\.npz"): view.shown_samples(read_moment(made.run))
    (made.run.path / "shown.npz").unlink()
    with pytest.raises(BadInput, match=r"shown\.npz"): view.features_of(read_moment(made.run, 1))


def wait(layouts, moment, seconds=150):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := layouts.request(moment)) is not None: return found
        time.sleep(0.02)
    raise AssertionError("no layout came")


def test_layouts_in_another_process(tmp_path):
    made = Made(tmp_path / "run", 2)
    moments, layouts = [read_moment(made.run, n) for n in (1, 2, 3)], view.Layouts()
    try:
        began = time.monotonic()
        assert layouts.request(moments[0]) is None and time.monotonic() - began < 1
        first = wait(layouts, moments[0])
        assert np.array_equal(first.points, view.embed(*view.features_of(moments[0])).points)
        made.run.set_status("running")  # beside a training it rests: the next does not begin at once
        layouts.due = time.monotonic() + 60
        assert layouts.request(moments[1]) is None and layouts.job is None
        made.run.set_status("finished")
        second = wait(layouts, moments[1])
        assert np.array_equal(second.points, view.embed(*view.features_of(moments[1]), first).points)
        layouts.request(moments[2])
        layouts.process.kill()
        with pytest.raises(BadInput, match="its process ended"): wait(layouts, moments[2])
    finally: layouts.close()
    assert layouts.process.poll() is not None and layouts.request(moments[1]) is second
    with pytest.raises(BadInput, match="closed"): layouts.request(read_moment(Made(tmp_path / "b", 2).run))


def test_share_of_the_processor(tmp_path, monkeypatch):
    from concurrent.futures import Future
    made = Made(tmp_path / "run", 2)
    monkeypatch.setattr(view, "started", lambda errors: subprocess.Popen([sys.executable, "-c", ""]))
    layouts, future = view.Layouts(), Future()
    future.set_result((3.0, tuple(made.flat())))
    layouts.job = (made.run.path, 1), future
    layouts.collect()
    assert 11.5 < layouts.due - time.monotonic() <= 12  # four times three seconds
    layouts.close()


@pytest.mark.parametrize("end", ["", "import os; os._exit(0)"], ids=["at the end", "without an end"])
def test_no_process_outlives_the_interpreter(end):
    code = ("from lnl_bench.views.prototypes import Layouts; x = Layouts();"
            f"print(x.process.pid, flush=True); {end}")
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    pid = int(out.stdout)
    assert out.stderr == "" or end
    while alive(pid) and time.monotonic() - began < 180: time.sleep(0.1)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f: return f.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError: return False
