"""The cockpit in a real browser, on real trainings that are processes of their own."""

import base64
import io
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image

from lnl_bench.engine.runs import Run, load_arrays
from lnl_bench.views.losses import bin_edges

pytestmark = [pytest.mark.browser, pytest.mark.timeout(280), pytest.mark.xdist_group("browser")]

TRAIN = [sys.executable, "-m", "lnl_bench", "train"]
# Where pictures of the views are kept; a person looks at them.
SHOTS = os.environ.get("LNL_SCREENSHOTS")


def train(server, method, run_dir, *more):
    "Start a training outside of JupyterLab, and wait until it has an epoch."
    process = server.start(*TRAIN, method, "--noise", "symmetric:0.4", "--set", "epochs=5000", *more,
                           "--run-dir", run_dir)
    run = Run(server.notebooks / run_dir)
    until = time.monotonic() + 120
    while not run.snapshots() if (run.path / "run.json").exists() else True:
        assert process.poll() is None and time.monotonic() < until, "the training did not begin"
        time.sleep(0.1)
    return process, run


@pytest.fixture(scope="module")
def kept(server):
    "A finished run of eight epochs."
    process = server.start(*TRAIN, "cross-entropy", "--noise", "symmetric:0.4", "--set", "epochs=8",
                           "--run-dir", "runs/kept")
    assert process.wait(120) == 0
    return Run(server.notebooks / "runs/kept")


def watch(server, lab, run_dir):
    "Open a new notebook with the cockpit of a run."
    code = f'from lnl_bench.views.cockpit import cockpit\ncockpit("{run_dir}")'
    lab.open(server.write(f"watch{time.monotonic_ns()}.ipynb", code), simple=True)
    lab.run_all()
    lab.idle(90)
    lab.plot()


def shot(lab, name):
    "Keep a picture where somebody asked for pictures."
    if SHOTS: lab.screenshot(Path(SHOTS) / f"{name}.png")


def title(lab) -> str:
    "The title of the figure, with its note."
    return lab.page.evaluate("""() => {
        const t = document.querySelector('.js-plotly-plot').layout.title || {};
        return (t.text || '') + ' | ' + ((t.subtitle || {}).text || ''); }""")


def test_each_view_follows_the_training(lab, server):
    process, run = train(server, "mw-net", "runs/follow")
    watch(server, lab, "runs/follow")
    lab.changes(3, 60)
    assert "Losses by given class" in title(lab)
    shot(lab, "losses")
    for tab, words, seconds in (("Progress", "Progress", 60), ("Weights", "Weight or λ over epochs", 60),
                                ("Labels", "abel", 60), ("Prototypes", "class prototypes", 150)):
        lab.tab(tab).click()
        lab.wait(lambda w=words: w in title(lab), seconds, f"the view {tab}: {title(lab)}")
        lab.changes(3, seconds)
        assert not lab.external and not lab.page_errors and not lab.tracebacks(), tab
        shot(lab, tab.lower())
    lab.theme(dark=True)
    shot(lab, "prototypes-dark")
    assert process.poll() is None, "the training ended while it was watched"
    process.kill()


def lonely(lab) -> list[dict]:
    "Points of the prototypes view that no other is near: customdata, name of the trace, and their pixels."
    return lab.page.evaluate("""() => {
        const graph = document.querySelector('.js-plotly-plot'), box = graph.getBoundingClientRect();
        const {xaxis, yaxis} = graph._fullLayout;
        const points = graph.data.flatMap((trace) => Array.from(trace.x, (x, i) => ({
            about: Array.from(trace.customdata[i]), name: trace.name,
            x: box.left + xaxis._offset + xaxis.l2p(x),
            y: box.top + yaxis._offset + yaxis.l2p(trace.y[i])})));
        const seen = (p) => graph.contains(document.elementFromPoint(p.x, p.y));
        const far = (p, q) => Math.hypot(p.x - q.x, p.y - q.y) > 10 || p.name === q.name && p.x === q.x;
        return points.filter((p) => seen(p) && points.every((q) => far(p, q)));
    }""")


def point_at(lab, point):
    "Move the pointer onto a point as a hand does."
    lab.page.mouse.move(point["x"] - 20, point["y"] - 20)
    lab.page.mouse.move(point["x"], point["y"], steps=5)


def test_points_of_the_prototypes_answer_the_pointer(lab, server):
    process = server.start(*TRAIN, "m-correction", "--noise", "symmetric:0.4", "--set", "epochs=6",
                           "--run-dir", "runs/pointed")
    assert process.wait(150) == 0
    run, logged = Run(server.notebooks / "runs/pointed"), len(server.log.read_text())
    arrays, samples = load_arrays(run.snapshots()[-1][2]), run.samples()
    watch(server, lab, "runs/pointed")
    lab.tab("Prototypes").click()
    lab.wait(lambda: "class prototypes" in title(lab), 120, "the layout")
    card = lab.panel.locator(".widget-tab .widget-html")
    assert "Point at a sample" in card.inner_text()
    lab.page.wait_for_timeout(1000)
    points, top = lonely(lab), lab.plot().bounding_box()
    dots = sorted((p for p in points if p["name"] != "prototypes"),  # wrong labels and corrected ones first
                  key=lambda p: -len({int(samples[k][int(p["about"][1])]) for k in ("given", "true")}))
    for point in (*dots[:2], dots[-1]):
        place, at = map(int, point["about"][:2])
        point_at(lab, point)
        lab.wait(lambda n=at: f"position in training order: {n}" in card.inner_text(), 10, f"sample {at}")
        said = re.split(r"\s*\n\s*", card.inner_text().strip())
        assert re.fullmatch(rf"sample {samples['index'][at]}( \(\d+\))?", said[0])
        assert said[1:5] == [f"given: {samples['given'][at]}", f"corrected: {arrays['corrected'][at]}",
                             f"true: {samples['true'][at]}",
                             f"clean probability: {arrays['p_clean'][at]:.3f}"]
        assert ("✗ its label is wrong now" in said) == (arrays["corrected"][at] != samples["true"][at])
        png = base64.b64decode(card.locator("img").get_attribute("src").partition(",")[2])
        picture = load_arrays(run.path / "shown.npz")["picture"][place, 0]
        assert (np.asarray(Image.open(io.BytesIO(png)).convert("L")) == picture).all()
        assert lab.plot().bounding_box() == top, "the figure moved away under the pointer"
    shot(lab, "pointed")
    lab.page.mouse.down()
    lab.page.mouse.up()
    number = lab.panel.locator(".widget-tab input[type=number]:visible")
    lab.wait(lambda: number.input_value() == str(at), 10, "the sample that was clicked")
    lab.wait(lambda: f"followed: position {at}" in lab.plot().inner_text(), 10, "the arrow to it")
    shot(lab, "followed")
    for diamond in [p for p in points if p["name"] == "prototypes"][:1]:  # is no sample, and changes nothing
        point_at(lab, diamond)
        lab.page.wait_for_timeout(1000)
        assert len(card.inner_text()) > 20 and "Traceback" not in server.log.read_text()[logged:]
    lab.tab("Weights").click()
    lab.wait(lambda: any(t["name"].startswith(f"position {at}, given {samples['given'][at]}")
                         for t in lab.plot_data()), 20, "its path")
    path = next(t["y"] for t in lab.plot_data() if t["name"].startswith(f"position {at},"))
    assert np.allclose(path, [load_arrays(p)["p_clean"][at] for *_, p in run.snapshots()])
    shot(lab, "followed-weights")
    assert not lab.external and not lab.page_errors and not lab.tracebacks()


def test_buttons_steer_a_process_outside(lab, server):
    process, run = train(server, "cross-entropy", "runs/steer")
    watch(server, lab, "runs/steer")
    lab.button("Pause").click()
    asked = time.monotonic()
    lab.wait(lambda: run.status()["state"] == "paused", 2, "the pause")
    print(f"paused {time.monotonic() - asked:.2f} s after the click")
    before = run.metrics.size()
    lab.page.wait_for_timeout(2000)
    assert run.metrics.size() == before
    lab.wait(lambda: "paused" in lab.text(), 5, "the word paused")
    lab.button("Resume").click()
    lab.wait(lambda: run.metrics.size() > before, 10, "an epoch after the pause")
    lab.button("Stop").click()
    lab.wait(lambda: process.poll() is not None, 20, "the end")
    assert process.returncode == 0 and run.status()["state"] == "stopped"
    assert (run.path / "checkpoint.pt").exists() and not run.finished
    lab.wait(lambda: "stopped" in lab.text() and not lab.button("Stop").is_enabled(), 10, "the word stopped")


def test_replay_shows_the_numbers_of_that_epoch(lab, server, kept):
    watch(server, lab, "runs/kept")
    for epoch in (2, 5):
        lab.slider("Epoch", epoch)
        lab.wait(lambda e=epoch: f"epoch {e} |" in title(lab), 20, f"epoch {epoch}")
        losses = load_arrays(kept.snapshots()[epoch - 1][2])["loss"]
        given, edges = kept.samples()["given"], bin_edges(losses)
        bars = [t for t in lab.plot_data() if t["type"] == "bar"]
        assert len(bars) == 20
        for c in range(10):
            direct = np.histogram(np.minimum(losses[given == c], edges[-1]), edges)[0]
            assert (np.add(bars[2 * c]["y"], bars[2 * c + 1]["y"]) == direct).all(), (epoch, c)
    lab.dropdown("Class").select_option("3")
    lab.wait(lambda: "Losses of 3 at train, epoch 5" in title(lab), 20, "one class large")
    shot(lab, "one-class")


def test_a_view_leaves_no_trace_on_the_next(lab, server, kept):
    words = {"Losses": "Losses", "Weights": "over epochs", "Labels": "Label", "Progress": "Progress"}
    watch(server, lab, "runs/kept")
    places, first, size = [], ("Weights", "Labels", "Losses"), ("l", "r", "t", "w")
    for tab in (*first, "Progress", "Weights", "Progress", "Labels", "Progress", "Losses"):
        lab.tab(tab).click()
        lab.wait(lambda t=tab: words[t] in title(lab), 20, tab)
        lab.page.wait_for_timeout(1000)
        drawn = lab.plot().evaluate("(g, size) => size.map((k) => g._fullLayout._size[k])", size)
        places.append((tab, *drawn))
    assert len({p[0] for p in places}) == 4 == len(set(places)), places


def test_a_killed_process_is_shown_as_such(lab, server):
    process, run = train(server, "cross-entropy", "runs/killed")
    watch(server, lab, "runs/killed")
    lab.wait(lambda: "running" in lab.text(), 10, "the word running")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    gone = re.compile(r"killed: its process \(\d+ on .*\) is gone")
    lab.wait(lambda: gone.search(lab.text()), 10, "the word killed")
    assert not lab.button("Pause").is_enabled()
    shot(lab, "killed")
    shutil.rmtree(run.path)  # and a directory that is deleted while somebody watches
    lab.wait(lambda: "Nothing to show" in title(lab), 10, "the message")
    assert "is no run directory" in title(lab) and not lab.tracebacks()


def test_closing_and_restarting_harm_nobody(lab, server):
    lab.open(server.write("start.ipynb", """
from lnl_bench.watch import start
from lnl_bench.views.cockpit import cockpit
run = start(["cross-entropy", "--set", "epochs=5000"], "runs/own")
cockpit(run)
"""), simple=True)
    lab.run_all()
    lab.idle(90)
    run = Run(server.notebooks / "runs/own")
    lab.plot()
    lab.begin("kernelmenu:restart")
    lab.page.locator(".jp-Dialog button.jp-mod-accept").click()
    lab.idle(60, check=False)
    size = run.metrics.size()
    lab.wait(lambda: run.metrics.size() > size, 20, "an epoch after the kernel was restarted")
    lab.page.close()
    size, until = run.metrics.size(), time.monotonic() + 20
    while run.metrics.size() == size and time.monotonic() < until: time.sleep(0.1)
    assert run.metrics.size() > size and run.status()["state"] == "running"
    run.request("stop")
    while run.status()["state"] == "running" and time.monotonic() < until + 20: time.sleep(0.1)
    assert run.status()["state"] == "stopped"


def test_lnl_watch_opens_a_cockpit_that_is_already_there(server, kept):
    process = server.start(sys.executable, "-m", "lnl_bench", "watch", "runs/kept", "--no-browser",
                           stdout=-1, text=True)
    address = process.stdout.readline().strip()
    assert address.startswith("http://"), address
    with browser.Lab(server) as lab:
        lab.page.goto(address)
        drawn = lab.page.locator(".js-plotly-plot .main-svg").first
        try: drawn.wait_for(state="attached", timeout=90_000)
        finally: shot(lab, "lnl-watch-opened")
        lab.wait(lambda: "Losses by given class" in title(lab), 20, "the losses")
        lab.page.locator(".widget-tab .lm-TabBar-tab").get_by_text("Progress", exact=True).click()
        lab.wait(lambda: "Progress" in title(lab), 20, "a kernel that answers")
        shot(lab, "lnl-watch")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
