"Figures against numbers computed from a run's arrays, with and without truth, for 2, 10 and 100 classes."
import json
import subprocess
import sys

import numpy as np
import pytest

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.runs import Run, open_run, save_arrays, write_json

go = pytest.importorskip("plotly.graph_objects")
from lnl_bench.views import labels, noise, progress, theme  # noqa: E402

STAGES = ["warm-up", "train"]
EPOCHS = [("warm-up", 0), ("warm-up", 1), ("train", 0), ("train", 1), ("train", 2)]


class Made:
    "A run directory and the arrays that were written to it."

    def __init__(self, path, classes, known, soft=False):
        rng, n = np.random.default_rng(classes), 12 * classes
        self.classes, self.known = classes, known
        self.true, other = rng.integers(0, classes, (2, n))
        self.given = np.where(rng.random(n) < 0.4, other, self.true)
        self.corrected = [np.where(rng.random(n) < 0.7 - 0.1 * e, self.given, rng.permutation(self.true))
                          for e in range(len(EPOCHS))]
        self.accuracy = [0.5, 0.7, 0.9, 0.9, 0.8]
        self.matrix = np.zeros((classes, classes))
        np.add.at(self.matrix, (self.true, self.given), 1)
        self.matrix /= self.matrix.sum(1, keepdims=True)
        self.run = open_run(path, {"seed": classes}, {"stages": STAGES})
        self.write(np.eye(classes, dtype=np.float32)[self.given] if soft else self.given)

    def write(self, given):
        rate = float((self.given != self.true).mean()) if self.known else None
        about = dict(convention="by hand", nominal=0.4, realised=rate, matrix=self.matrix.tolist()
                     if self.known else None)
        names = [f"class {i}" for i in range(self.classes)]
        write_json(self.run.path / "task.json", {"class_names": names, "noise": about})
        truth = {"true": self.true} if self.known else {}
        save_arrays(self.run.path / "samples.npz",
                    {"index": np.arange(len(self.given)), "given": given, **truth})
        for (stage, epoch), corrected, accuracy in zip(EPOCHS, self.corrected, self.accuracy, strict=True):
            self.run.save_snapshot(stage, epoch,
                                   {"corrected": corrected, "loss": np.zeros(len(given), np.float32)})
            row = {"label_accuracy": float((corrected == self.true).mean())} if self.known else {}
            self.run.metrics.append({"stage": stage, "epoch": epoch, "test_accuracy": accuracy, **row})
            self.run.clock.append({"stage": stage, "epoch": epoch, "images_per_second": 1234.5})


@pytest.fixture(params=[2, 10, 100])
def classes(request): return request.param


@pytest.fixture(params=[True, False], ids=["truth", "no-truth"])
def made(request, classes, tmp_path): return Made(tmp_path / "run", classes, request.param)


def says_unknown(fig):
    note = (fig.layout.title.subtitle.text or "").replace("<br>", " ")
    return "True labels are not known" in note


def heights(fig): return [s.y0 for s in fig.layout.shapes if s.y0 == s.y1]


def test_transition(made):
    fig = noise.transition_figure(made.run)
    assert "by hand" in fig.layout.title.text and says_unknown(fig) != made.known
    if not made.known:
        assert fig.data[0].y.tolist() == np.bincount(made.given, minlength=made.classes).tolist()
        return
    assert f"realised {np.mean(made.given != made.true):.1%}" in fig.layout.title.text
    assert np.array_equal(fig.data[0].z, made.matrix.astype(np.float32))
    assert (fig.data[0].text is not None) == (made.classes <= 12)
    if made.classes == 10: assert fig.data[0].text[3][3] == f"{made.matrix[3, 3]:.2f}"


def test_label_accuracy(made):
    fig = labels.label_accuracy_figure(made.run)
    assert fig.data[0].x.tolist() == [1, 2, 3, 4, 5] and says_unknown(fig) != made.known
    reference = made.true if made.known else made.given
    assert fig.data[0].y.tolist() == [np.float32(np.mean(c == reference)) for c in made.corrected]
    assert heights(fig) == ([np.mean(made.given == made.true)] if made.known else [])


def test_per_class(made):
    fig = labels.per_class_figure(made.run)
    assert says_unknown(fig) != made.known and "train, epoch 3" in fig.layout.title.text
    for trace, values in zip(fig.data[1:], (made.given, made.corrected[-1]), strict=True):
        of = [np.mean(values[made.true == c] == c) if made.known else np.sum(values == c)
              for c in range(made.classes)]
        assert trace.y.tolist() == np.float32(of).tolist() and len(trace.x) == made.classes


def test_confusion(made):
    fig, after = labels.confusion_figure(made.run), made.corrected[-1]
    counts = np.zeros((made.classes,) * 2, int)
    np.add.at(counts, (made.given, after), 1)
    assert (fig.data[0].customdata[..., 0] == counts).all() and says_unknown(fig) != made.known
    assert np.allclose(fig.data[0].z, counts / counts.sum(1, keepdims=True).clip(1))
    assert f"{np.sum(made.given != after):,} of {len(after):,}" in fig.layout.title.subtitle.text
    assert fig.data[0].customdata.shape[-1] == 1 + made.known
    if made.known: assert fig.data[0].customdata[..., 1].sum() == np.sum(after == made.true)


def test_repair(made):
    fig, given, true = labels.repair_figure(made.run), made.given, made.true
    lines = {t.name: t.y.tolist() for t in fig.data}
    assert lines.pop("changed") == [np.sum(c != given) for c in made.corrected]
    assert says_unknown(fig) != made.known and set(lines) == ({"repaired", "broken"} if made.known else set())
    if not made.known: return
    assert lines["repaired"] == [np.sum((c == true) & (given != true)) for c in made.corrected]
    assert lines["broken"] == [np.sum((c != true) & (given == true)) for c in made.corrected]
    assert heights(fig) == [np.sum(given != true)]


def test_accuracy(made):
    fig = progress.accuracy_figure(made.run)
    assert fig.data[0].y.tolist() == np.float32(made.accuracy).tolist()
    assert [(t.x.tolist(), t.marker.symbol) for t in fig.data[1:]] == [([3], "star"), ([5], "square")]
    assert fig.data[0].customdata[2].tolist() == ["train", "0", "1,234"]
    assert [s.x0 for s in fig.layout.shapes] == [0.5, 2.5]
    assert progress.accuracy_figure(made.run, "train").data[0].x.tolist() == [1, 2, 3]


def test_saved_figures_are_small(made):
    figures = [noise.transition_figure, labels.confusion_figure, labels.per_class_figure,
               labels.repair_figure,
               labels.label_accuracy_figure, progress.accuracy_figure]
    for figure in figures: assert len(json.dumps(theme.bundle(figure(made.run)))) < 100_000, figure.__name__


def test_soft_labels_count_by_their_largest(tmp_path):
    made = Made(tmp_path / "soft", 10, True, soft=True)
    assert heights(labels.label_accuracy_figure(made.run)) == [np.mean(made.given == made.true)]


def test_several_runs_keep_their_colours(tmp_path):
    known, blind = Made(tmp_path / "a", 2, True), Made(tmp_path / "b", 2, False)
    runs = {"known": known.run, "blind": blind.run, "begun": open_run(tmp_path / "c", {})}
    fig = progress.accuracy_figure(runs)
    assert [t.line.color for t in fig.data[::3]] == list(theme.SERIES[:2])
    assert "No test accuracy yet: begun" in fig.layout.title.subtitle.text
    fig = labels.label_accuracy_figure({"known": known.run, "blind": blind.run})
    assert says_unknown(fig) and "blind" in fig.layout.title.subtitle.text
    assert [t.line.color for t in fig.data] == list(theme.SERIES[:2]) and len(fig.layout.shapes) == 1


def test_exported_labels_serve_where_there_are_no_snapshots(tmp_path):
    made = Made(tmp_path / "run", 2, True)
    for *_, path in made.run.snapshots(): path.unlink()
    with pytest.raises(BadInput, match="no corrected labels"): labels.per_class_figure(made.run)
    exported = made.corrected[1]
    rows = [f"{i},class {g},class {c}" for i, (g, c) in enumerate(zip(made.given, exported, strict=True))]
    (made.run.path / "labels.csv").write_text("\n".join(["index,given,corrected", *rows]))
    fig = labels.per_class_figure(made.run)
    assert "as exported" in fig.layout.title.text
    assert fig.data[2].y.tolist() == [np.float32(np.mean(exported[made.true == c] == c)) for c in (0, 1)]


FIGURES = [noise.transition_figure, labels.label_accuracy_figure, labels.per_class_figure,
           labels.confusion_figure,
           labels.repair_figure, progress.accuracy_figure]


@pytest.mark.parametrize("figure", FIGURES)
def test_runs_with_nothing_to_show_are_refused(figure, tmp_path):
    with pytest.raises(BadInput, match="no run directory"): figure(Run(tmp_path / "missing"))
    (tmp_path / "foreign").mkdir()
    with pytest.raises(BadInput, match="no run directory"): figure(Run(tmp_path / "foreign"))
    with pytest.raises(BadInput): figure(open_run(tmp_path / "begun", {}))


@pytest.mark.parametrize("figure", FIGURES[1:5])
def test_half_written_runs_are_refused(figure, tmp_path):
    run = open_run(tmp_path / "run", {})
    write_json(run.path / "task.json", {"class_names": ["a", "b"], "noise": {}})
    with pytest.raises(BadInput, match=r"samples\.npz"): figure(run)
    (run.path / "samples.npz").write_bytes(b"not an archive")
    with pytest.raises(BadInput, match=r"samples\.npz"): figure(run)
    save_arrays(run.path / "samples.npz", {"given": np.array([0, 1, 1])})
    with pytest.raises(BadInput, match="nothing yet"): figure(run)
    run.save_snapshot("train", 0, {"corrected": np.array([0, 1])})
    with pytest.raises(BadInput, match="2 rows of corrected; accepted: 3"): figure(run)


def test_half_a_line_of_metrics_is_not_shown(tmp_path):
    made = Made(tmp_path / "run", 2, True)
    with open(made.run.metrics.path, "ab") as f: f.write(b'{"stage": "train", "epoch": 3, "test_acc')
    assert len(progress.accuracy_figure(made.run).data[0].x) == 5


def test_names_of_users_are_printed_safely(tmp_path):
    made = Made(tmp_path / "run", 2, True)
    write_json(made.run.path / "task.json",
               {**made.run.task, "class_names": ["<a href='x'>", "<a href='x'>"]})
    names = noise.transition_figure(made.run).data[0].x
    assert len(set(names)) == 2 and not any("<" in n for n in names)


@pytest.mark.parametrize("channels", [1, 3])
def test_examples(channels):
    images = np.random.default_rng(0).integers(0, 256, (10, channels, 16, 12), dtype=np.uint8)
    fig = noise.examples_figure(images, [("a", "a" if i % 2 else "b") for i in range(10)], columns=4)
    pixels = np.asarray(fig.data[0].z)
    top, gap = 5, 1
    for i in range(10):
        tile = pixels[i // 4 * (16 + gap + top) + top:, i % 4 * (12 + 2 * gap) + gap:][:16, :12]
        assert (tile[..., :channels] == images[i].transpose(1, 2, 0)).all() and (tile[..., 3] == 255).all()
    assert len(fig.layout.shapes) == 5 and sum(a.text.startswith("✗") for a in fig.layout.annotations) == 5


def test_showing_makes_no_widget_and_needs_no_notebook():
    code = ("import sys, plotly.graph_objects as go; from lnl_bench.views import labels, progress, theme;"
            "theme.show(theme.layout(go.Figure(), 'A title'));"
            "print([m for m in ('torch', 'ipywidgets', 'anywidget') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "Figure: A title\n[]\n"
