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
from lnl_bench.views.moments import read_moment  # noqa: E402

STAGES = ["warm-up", "train"]
EPOCHS = [("warm-up", 0), ("warm-up", 1), ("train", 0), ("train", 1), ("train", 2)]


class Made:
    "A run directory and the arrays that were written to it."

    def __init__(self, path, classes, known, soft=False, kind="corrected"):
        rng, n = np.random.default_rng(classes), 12 * classes
        self.classes, self.known, self.kind = classes, known, kind
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
                                   {self.kind: corrected, "loss": np.zeros(len(given), np.float32)})
            row = {"label_accuracy": float((corrected == self.true).mean())}
            if not self.known or self.kind == "prediction": row = {}
            self.run.metrics.append({"stage": stage, "epoch": epoch, "test_accuracy": accuracy, **row})
            self.run.clock.append({"stage": stage, "epoch": epoch, "images_per_second": 1234.5})


@pytest.fixture(params=[2, 10, 100])
def classes(request): return request.param


@pytest.fixture(params=[True, False], ids=["truth", "no-truth"])
def made(request, classes, tmp_path): return Made(tmp_path / "run", classes, request.param)


def note_of(fig): return (fig.layout.title.subtitle.text or "").replace("<br>", " ")


def says_unknown(fig): return "True labels are not known" in note_of(fig)


def says_predictions(fig): return "network's predictions" in note_of(fig)


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


def shares(rows, columns, classes):
    "The share of each column's class in each row's, one cell after the other."
    def row(i):
        mine = columns[rows == i]
        return np.bincount(mine, minlength=classes) / len(mine) if len(mine) else np.full(classes, np.nan)
    return np.array([row(i) for i in range(classes)])


@pytest.mark.parametrize("number", [1, 3, 5])
def test_any_epoch_is_replayed(made, number):
    moment, after = read_moment(made.run, number), made.corrected[number - 1]
    counts = np.zeros((made.classes,) * 2, int)
    np.add.at(counts, (made.given, after), 1)
    fig = labels.confusion_figure(moment)
    assert (fig.data[0].customdata[..., 0] == counts).all() and moment.title in fig.layout.title.text
    reference = made.true if made.known else None
    of = labels.per_class_figure(moment).data[2].y
    assert np.array_equal(of, np.float32(labels.per_class(after, reference, made.classes)), equal_nan=True)
    bars = labels.confusion_figure(moment, 1).data
    assert len(bars) == 1 + made.known
    top = sorted(counts[1])[::-1][:20]
    assert sum(t.y.astype(int) for t in bars).tolist() == [c for c in top if c]
    if made.known:
        right = np.sum((made.given == 1) & (after == made.true) & np.isin(after, np.argsort(-counts[1])[:20]))
        assert bars[0].y.sum() == right


@pytest.mark.parametrize("number", [1, 5])
def test_transition_comparison(made, number):
    moment, after = read_moment(made.run, number), made.corrected[number - 1]
    estimated, realised = shares(after, made.given, made.classes), shares(made.true, made.given, made.classes)
    fig = labels.transition_comparison_figure(moment)
    assert says_unknown(fig) != made.known and not says_predictions(fig)
    assert np.allclose(fig.data[0].z, estimated, equal_nan=True)
    assert len(fig.data) == 1 + made.known
    if not made.known: return
    gap = np.abs(estimated - realised)
    assert np.allclose(fig.data[1].z, realised, equal_nan=True)
    assert f"largest {np.nanmax(gap):.3f}" in note_of(fig) and f"mean {np.nanmean(gap):.4f}" in note_of(fig)
    one = labels.transition_comparison_figure(moment, 1)
    assert [t.name for t in one.data] == ["estimated", "realised"]
    assert np.isclose(one.data[0].y[list(one.data[0].x).index("class 1")], estimated[1, 1])


def test_a_recorded_transition_goes_first(made):
    recorded = np.full((made.classes,) * 2, 1 / made.classes, np.float32)
    made.run.save_snapshot("train", 3, {"corrected": made.corrected[0], "extra.transition": recorded})
    fig = labels.transition_comparison_figure(read_moment(made.run, 6))
    assert (fig.data[0].z == recorded).all() and "as the method records it" in note_of(fig)
    made.run.save_snapshot("train", 4, {"extra.transition": np.eye(made.classes + 1)})
    with pytest.raises(BadInput, match="transition matrix at train, epoch 5 has shape"):
        labels.transition_comparison_figure(read_moment(made.run, 7))


def class_values(made, values, c):
    "The share of the class that is right, or without truth still as given."
    of = made.true if made.known else made.given
    return np.float32(np.mean(values[of == c] == c)) if (of == c).any() else np.nan


def test_per_class_history(made):
    fig = labels.per_class_history_figure(made.run)
    assert says_unknown(fig) != made.known
    reference = made.true if made.known else made.given
    if made.classes <= 12:
        assert fig.data[0].y.tolist() == [np.float32(np.mean(c == reference)) for c in made.corrected]
        lines = {t.name.split(" (")[0]: t.y for t in fig.data[1:]}
    else:
        assert fig.data[0].type == "heatmap"
        lines = dict(zip(fig.data[0].y, fig.data[0].z, strict=True))
        assert (np.diff(fig.data[0].z[:, -1]) >= 0).all()
    for c in range(made.classes):
        wanted = [class_values(made, v, c) for v in made.corrected]
        assert np.allclose(lines[f"class {c}"], wanted, equal_nan=True)
    chosen = labels.per_class_history_figure(made.run, made.classes - 1)
    assert len(chosen.data) == 2
    assert np.allclose(chosen.data[1].y, [class_values(made, v, made.classes - 1) for v in made.corrected])
    with pytest.raises(BadInput, match="class = 100 is not known"):
        labels.per_class_history_figure(made.run, 100)


def test_changes_of_a_class(made):
    fig, mine = labels.repair_figure(made.run, 1), made.given == 1
    lines = {t.name: t.y.tolist() for t in fig.data}
    assert lines["changed"] == [np.sum(mine & (c != 1)) for c in made.corrected]
    if not made.known: return
    assert lines["repaired"] == [np.sum(mine & (c != 1) & (c == made.true)) for c in made.corrected]
    assert lines["broken"] == [np.sum(mine & (c != 1) & (made.true == 1)) for c in made.corrected]


@pytest.mark.parametrize("known", [True, False])
def test_predictions_stand_in_and_are_named(known, tmp_path):
    made = Made(tmp_path / "run", 10, known, kind="prediction")
    reference = made.true if known else made.given
    fig = labels.label_accuracy_figure(made.run)
    assert fig.data[0].y.tolist() == [np.float32(np.mean(c == reference)) for c in made.corrected]
    assert "predictions" in fig.data[0].name
    for show in labels.SHOWS:
        assert says_predictions(labels.labels_figure(made.run, read_moment(made.run, 2), None, show)), show
    assert says_predictions(labels.per_class_figure(made.run))
    counts = labels.confusion_figure(made.run).data[0].customdata[..., 0]
    assert counts.sum() == len(made.given) and np.trace(counts) == np.sum(made.corrected[-1] == made.given)


def test_a_stage_of_predictions_after_one_of_corrections(tmp_path):
    made = Made(tmp_path / "run", 2, True)
    made.run.save_snapshot("train", 2, {"prediction": made.true})
    fig = labels.label_accuracy_figure(made.run)
    assert [t.x.tolist() for t in fig.data] == [[1, 2, 3, 4, 5], [5]] and fig.data[1].y.tolist() == [1]
    assert "Stage train records no" in note_of(labels.per_class_history_figure(made.run))


def test_the_state_of_an_epoch_going_on(tmp_path):
    made = Made(tmp_path / "run", 10, True)
    made.run.save_live("train", 3, {"corrected": made.true.astype(np.uint8)})
    moment = read_moment(made.run)
    fig = labels.labels_figure(made.run, moment, None, "confusion")
    assert "going on" in fig.layout.title.text
    assert fig.data[0].customdata[..., 1].sum() == len(made.true)
    assert labels.labels_figure(made.run, moment).layout == labels.labels_figure(made.run, None).layout


def test_the_moment_is_marked(made):
    for show in labels.SHOWS[:3]:
        fig = labels.labels_figure(made.run, read_moment(made.run, 4), None, show)
        assert 4 in [s.x0 for s in fig.layout.shapes], show


@pytest.mark.parametrize("show", labels.SHOWS)
def test_labels_views_refuse_what_they_cannot_show(show, tmp_path):
    made = Made(tmp_path / "run", 2, True)
    for *_, path in made.run.snapshots(): save_arrays(path, {"loss": np.zeros(24)})
    made.run.metrics.cut(0)
    with pytest.raises(BadInput, match="to show"): labels.labels_figure(made.run, None, None, show)
    made.run.save_snapshot("train", 0, {"corrected": np.full(24, 7)})
    with pytest.raises(BadInput, match="do not fit 2 classes"):
        labels.labels_figure(made.run, read_moment(made.run, 3), None, show)


def test_a_changed_snapshot_is_read_again(tmp_path):
    made = Made(tmp_path / "run", 2, True)
    before = labels.label_history(made.run)
    made.run.save_snapshot("train", 2, {"corrected": made.true})
    after = labels.label_history(made.run)
    assert after[-1][2].right.sum() == len(made.true) != before[-1][2].right.sum()
    for *_, path in made.run.snapshots(): path.unlink()
    assert labels.label_history(made.run) == []


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


def panels(fig):
    "Values by name and axis of the curves of a progress figure."
    return {(t.name, t.yaxis): t.y for t in fig.data if t.showlegend is None}


def test_progress(made):
    fig = progress.progress_figure(made.run)
    found = panels(fig)
    best = f"test: best {max(made.accuracy):.1%}, last {made.accuracy[-1]:.1%}"
    assert found[best, "y"].tolist() == np.float32(made.accuracy).tolist()
    assert found["images/s", "y3"].tolist() == [np.float32(1234.5)] * 5
    assert [(t.x.tolist(), t.marker.symbol) for t in fig.data[1:3]] == [([3], "star"), ([5], "square")]
    assert [s.x0 for s in fig.layout.shapes] == [0.5, 2.5]
    assert "no loss recorded" in [a.text for a in fig.layout.annotations]
    assert len(json.dumps(theme.bundle(fig))) < 20_000


def test_progress_of_one_epoch_without_a_test_set(tmp_path):
    run = open_run(tmp_path / "run", {}, {"stages": ["train"], "epochs": [3]})
    run.metrics.append({"stage": "train", "epoch": 0, "trusted_accuracy": 0.5, "train_accuracy": 0.25,
                        "loss": float("nan"), "other_loss": float("inf"), "rate": 0.1})
    run.clock.append({"stage": "train", "epoch": 0, "seconds": 4.0, "images_per_second": 10.0,
                      "peak_bytes": 2 * 10**9})
    fig = progress.progress_figure(run)
    found = panels(fig)
    assert found["trusted: best 50.0%, last 50.0%", "y"].tolist() == [0.5]
    assert found["train", "y"].tolist() == [0.25] and "chosen by trusted accuracy" in note_of(fig)
    assert np.isnan(found["loss", "y2"]).all() and np.isnan(found["other loss", "y2"]).all()
    assert "loss: 1 of 1 values are NaN or infinite" in note_of(fig) and "2.00 GB" in note_of(fig)
    assert found["learning rate (right)", "y4"].tolist() == [np.float32(0.1)]
    run.set_status("running", stage="train", epoch=0, epochs=3, message="")
    assert "1 of 3 epochs done; about 8 s left in this stage" in progress.status_line(run)


def test_time_left_is_the_median_of_five(tmp_path):
    run = open_run(tmp_path / "run", {}, {"stages": ["first", "second"], "epochs": [3, 10]})
    for stage, seconds in (("first", [100] * 3), ("second", [50, 1, 2, 3, 4, 90])):
        for epoch, s in enumerate(seconds):
            run.metrics.append({"stage": stage, "epoch": epoch, "loss": 1.0})
            run.clock.append({"stage": stage, "epoch": epoch, "seconds": s, "images_per_second": 1.0})
    assert progress.time_left(run, "second", 6) == 3 * 4 and progress.time_left(run, "first", 1) == 200
    run.set_status("running", stage="first", epoch=0, epochs=3, message="")
    assert "then 10 epochs of second" in progress.status_line(run)
    about = {k: v for k, v in run.about.items() if k != "epochs"}
    write_json(run.path / "run.json", about)
    assert progress.time_left(run, "second", 6) is None and "time left not known" in progress.status_line(run)


def test_status_line(tmp_path):
    run = Run(tmp_path / "run")
    assert progress.status_line(run) == "nothing yet: the run has not started (run)."
    run = open_run(run.path, {}, {"stages": ["train"], "epochs": [4]})
    assert progress.status_line(run).startswith("nothing yet")
    with pytest.raises(BadInput, match="no epoch to show"): progress.progress_figure(run)
    code = ("import sys, time; from lnl_bench.engine.runs import Run; r = Run(sys.argv[1]);"
            "r.set_status('running', stage='train', epoch=0, epochs=4, message=''); print(flush=True);"
            "time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code, run.path], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert progress.status_line(run).startswith(f"running (process {other.pid} on ")
        other.kill()
        other.wait()
    line = progress.status_line(run)
    assert line.startswith(f"killed: its process ({other.pid} on ") and "is gone. The same command" in line
    run.set_status("failed", stage="train", epoch=1, epochs=4, message="ValueError: no")
    assert progress.status_line(run).startswith("failed: ValueError: no. The same command continues it")
    write_json(run.path / "run.json", {**run.about, "format": 99})
    with pytest.raises(BadInput, match="run format 99"): progress.status_line(run)


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
           labels.repair_figure, labels.per_class_history_figure, progress.accuracy_figure,
           progress.progress_figure]


@pytest.mark.parametrize("figure", FIGURES)
def test_runs_with_nothing_to_show_are_refused(figure, tmp_path):
    with pytest.raises(BadInput, match="no run directory"): figure(Run(tmp_path / "missing"))
    (tmp_path / "foreign").mkdir()
    with pytest.raises(BadInput, match="no run directory"): figure(Run(tmp_path / "foreign"))
    with pytest.raises(BadInput): figure(open_run(tmp_path / "begun", {}))


@pytest.mark.parametrize("figure", FIGURES[1:6])
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
