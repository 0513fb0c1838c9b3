"The cockpit without a browser: runs in every state, half-written ones, newer ones, and ones that vanish."

import json
import shutil
import time

import numpy as np
import pytest

from lnl_bench.engine.runs import FORMAT, Run, open_run, save_arrays, write_json
from lnl_bench.views.cockpit import Cockpit, cockpit


def make(path, classes=10, epochs=3, known=True):
    rng, n = np.random.default_rng(0), 20 * classes
    run = open_run(path, {"method": "by hand"}, {"stages": ["train"], "epochs": [9]})
    true = np.arange(n) % classes
    given = np.where(rng.random(n) < 0.3, rng.integers(0, classes, n), true)
    write_json(path / "task.json", {"class_names": [f"class {c}" for c in range(classes)]})
    truth = {"true": true} if known else {}
    save_arrays(path / "samples.npz", {"index": np.arange(n), "given": given, **truth})
    for epoch in range(epochs): add(run, epoch, n)
    run.set_status("running", stage="train", epoch=epochs - 1, epochs=9)
    return run


def add(run, epoch, n, **arrays):
    "One more epoch."
    rng = np.random.default_rng(epoch)
    run.save_snapshot("train", epoch, {"loss": rng.random(n).astype(np.float32),
                                       "prediction": rng.integers(0, 2, n).astype(np.uint8), **arrays})
    run.metrics.append({"stage": "train", "epoch": epoch, "loss": 1.0, "test_accuracy": 0.5})
    run.clock.append({"stage": "train", "epoch": epoch, "seconds": 1.0, "images_per_second": 200.0})


@pytest.fixture
def seats():
    "Opens cockpits and closes them afterwards."
    opened = []

    def seat(run):
        opened.append(Cockpit(run, every=0.05))
        return opened[-1]

    yield seat
    for one in opened: one.close()


def until(seat, true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, (seat.figure.layout.title, seat.message.value)
        time.sleep(0.02)


def shows(seat, *words):
    "Whether title and note hold these words."
    title = seat.figure.layout.title
    text = f"{title.text} {title.subtitle.text}".replace("<br>", " ")
    return all(w in text for w in words)


def test_waits_for_a_run_that_does_not_exist_yet(tmp_path, seats):
    seat = seats(Run(tmp_path / "run"))
    until(seat, lambda: shows(seat, "Nothing to show", "is no run directory"))
    make(tmp_path / "run", epochs=1)
    until(seat, lambda: shows(seat, "Losses by given class", "epoch 1"))
    assert not seat.message.value


def test_an_empty_directory_and_one_that_has_only_begun(tmp_path, seats):
    (tmp_path / "run").mkdir()
    seat = seats(Run(tmp_path / "run"))
    until(seat, lambda: shows(seat, "Nothing to show", "has no run.json"))
    run = open_run(tmp_path / "run", {"method": "by hand"}, {"stages": ["train"], "epochs": [9]})
    run.set_status("running", stage="train", epoch=0, epochs=9)
    until(seat, lambda: shows(seat, "Nothing to show", "samples.npz") or shows(seat, "does not exist"))
    assert not seat.message.value


@pytest.mark.parametrize("name, damage", [
    ("snapshots/train-0002.npz", b"PK half"), ("samples.npz", b""), ("task.json", b'{"class_na'),
    ("run.json", b"{"), ("status.json", b"")])
def test_half_written_files_give_a_message(tmp_path, seats, name, damage):
    run = make(tmp_path / "run")
    (run.path / name).write_bytes(damage)
    seat = seats(run)
    until(seat, lambda: shows(seat, "Nothing to show", name.split("/")[-1]))
    assert "Traceback" not in seat.message.value


def test_a_newer_format_gives_a_message(tmp_path, seats):
    run = make(tmp_path / "run")
    write_json(run.path / "run.json", {**run.about, "format": FORMAT + 1})
    seat = seats(run)
    until(seat, lambda: shows(seat, f"has run format {FORMAT + 1}", f"reads format {FORMAT}"))


def test_deleted_while_watched(tmp_path, seats):
    run = make(tmp_path / "run")
    seat = seats(run)
    until(seat, lambda: shows(seat, "epoch 3"))
    shutil.rmtree(run.path)
    until(seat, lambda: shows(seat, "Nothing to show"))
    seat.controls["stop"].click()  # nowhere to write it to
    assert "Traceback" not in seat.message.value
    make(tmp_path / "run", epochs=2)
    until(seat, lambda: shows(seat, "epoch 2"))


def test_losses_that_are_not_numbers(tmp_path, seats):
    run = make(tmp_path / "run")
    seat = seats(run)
    add(run, 3, 200, loss=np.full(200, np.nan, np.float32))
    until(seat, lambda: shows(seat, "all 200 losses", "NaN or infinite"))
    add(run, 4, 200, loss=np.where(np.arange(200) < 5, np.nan, 1.5).astype(np.float32))
    until(seat, lambda: shows(seat, "epoch 5", "5 losses are NaN"))


@pytest.mark.parametrize("classes, known", [(2, True), (100, True), (100, False)])
def test_every_view_of_few_and_many_classes(tmp_path, seats, classes, known):
    run = make(tmp_path / "run", classes, known=known)
    seat = seats(run)
    until(seat, lambda: shows(seat, "Losses by given class"))
    assert len(seat.controls["klass"].options) == classes + 1
    for tab, words in ((3, "abel"), (4, "Progress")):
        seat.tabs.selected_index = tab
        until(seat, lambda w=words: shows(seat, w))
    seat.tabs.selected_index, seat.controls["klass"].value = 0, classes - 1
    until(seat, lambda: shows(seat, f"Losses of class {classes - 1}"))
    for offer in ("per class", "changes", "confusion", "transition"):
        before = seat.painter.painted
        seat.tabs.selected_index, seat.offers["Labels"].value = 3, offer
        until(seat, lambda b=before: seat.painter.painted > b)
        assert not seat.message.value, seat.message.value


def test_a_fault_is_told_with_its_traceback_and_the_painter_goes_on(tmp_path, seats, monkeypatch):
    run = make(tmp_path / "run")
    seat = seats(run)
    until(seat, lambda: shows(seat, "epoch 3"))
    monkeypatch.setattr("lnl_bench.views.cockpit.picture", lambda *_: 1 / 0)
    add(run, 3, 200)
    until(seat, lambda: "ZeroDivisionError" in seat.message.value)
    monkeypatch.undo()
    add(run, 4, 200)
    until(seat, lambda: shows(seat, "epoch 5") and not seat.message.value)


def test_killed_is_told_and_buttons_rest(tmp_path, seats):
    run = make(tmp_path / "run")
    status = json.loads((run.path / "status.json").read_text())
    write_json(run.path / "status.json", {**status, "pid": 2**22 + 1})
    seat = seats(run)
    until(seat, lambda: "killed" in seat.headline.value)
    assert all(seat.controls[name].disabled for name in ("pause", "resume", "stop"))


def test_a_thousand_updates_keep_the_memory_flat(tmp_path, seats):
    import psutil

    run = make(tmp_path / "run")
    seat = seats(run)
    until(seat, lambda: shows(seat, "epoch 3"))
    seat.painter.close()  # from here on by hand, as fast as it goes
    rng, me = np.random.default_rng(0), psutil.Process()

    def update(count):
        for _ in range(count):
            run.save_live("train", 3, {"loss": rng.random(200).astype(np.float32)})
            seat.painter.once()
    update(150)
    before, painted = me.memory_info().rss, seat.painter.painted
    update(1000)
    assert seat.painter.painted - painted == 1000
    assert me.memory_info().rss - before < 20e6, f"grew by {(me.memory_info().rss - before) / 1e6:.1f} MB"


def test_without_a_browser_static_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LNL_LIVE", "0")
    assert cockpit(make(tmp_path / "run")) is None
    out = capsys.readouterr().out
    assert "Figure: Losses by given class" in out and "Prototypes: " in out and "Figure: Progress" in out
