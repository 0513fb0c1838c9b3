"""The pages for playing with noise: figures against numbers computed directly, speed, ways to run."""

import json
import os
import subprocess
import sys
import time

import browser
import nbformat
import numpy as np
import pytest

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.runs import Run
from lnl_bench.views import explore_figures as figures
from lnl_bench.views.explore import Choice, Explorer, WatchSettings, page_settings, steps

PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
PAGES = ("noise", "memorisation", "small_loss", "trusted", "human")
SLOW = [pytest.param(p, marks=pytest.mark.slow) for p in PAGES]


class Page:
    "A page run in this process, as far as its code goes: `names` is what it defined."
    def __init__(self, path, folder, **parameters):
        self.names, self.seconds = {"__name__": "page"}, []
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        for cell in cells:
            began = time.perf_counter()
            exec(compile(cell.source, str(path), "exec"), self.names)
            if "parameters" in cell.metadata.get("tags", []): self.names.update(parameters)
            self.seconds.append(time.perf_counter() - began)

    def explorers(self):
        "The explorers by the name that the page gave them."
        return {k: v for k, v in self.names.items() if isinstance(v, Explorer)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("explore")


@pytest.fixture(scope="module")
def page(repo, folder):
    "Pages by name, each run once; their runs are shared by all tests of this file."
    made = {}

    def get(name):
        if name not in made:
            path = repo / "nbs" / "explore" / f"explore_{name}.ipynb"
            tells = "runs_dir: str" in path.read_text()
            made[name] = Page(path, folder, **({"runs_dir": str(folder / "runs")} if tells else {}))
        return made[name]

    return get


def text_of(fig): return f"{fig.layout.title.text} {fig.layout.title.subtitle.text}".replace("<br>", " ")


# ---- speed and refusals

@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SLOW)
def test_every_change_takes_less_than_a_second(page, name):
    for explorer in page(name).explorers().values():
        explorer.at()  # the first figure of a process loads what later ones find loaded
        for choice, about in explorer.choices.items():
            for value in about.values:
                began = time.process_time()
                fig = explorer.at(**{choice: value})
                assert time.process_time() - began < 1, (choice, value)
                assert fig.data and fig.layout.title.text and len(json.dumps(fig.to_plotly_json())) < 150_000


@pytest.mark.parametrize("name", ["noise", "human"])
def test_values_that_are_no_choice_are_refused(page, name):
    for explorer in page(name).explorers().values():
        choice = next(iter(explorer.choices))
        with pytest.raises(BadInput, match="accepted"): explorer.at(**{choice: "nonsense"})
        with pytest.raises(BadInput, match="nonsense"): explorer.at(nonsense=1)


def test_parameters_are_refused_before_any_work():
    assert page_settings({"seed": 4}, "seed").seed == 4
    for wrong in ({"sed": 4}, {"seed": "4"}, {"seed": -1}, {"runs_dir": "x"}):
        with pytest.raises(BadInput, match="accepted"): page_settings(wrong, "seed")


WATCH = "accepted: method, noise, epochs, seed, watched"


def test_the_watching_page_has_parameters_of_its_own():
    assert page_settings({"method": "mixup", "epochs": 3}, kind=WatchSettings).epochs == 3
    for wrong in ({"epoch": 3}, {"dataset": "digits"}, {"runs_dir": "x"}):
        with pytest.raises(BadInput, match=WATCH): page_settings(wrong, kind=WatchSettings)
    for wrong in ({"epochs": 0}, {"epochs": "3"}, {"seed": -1}, {"method": 1}, {"watched": None}):
        with pytest.raises(BadInput, match="accepted"): page_settings(wrong, kind=WatchSettings)


@pytest.mark.parametrize("wrong, words", [
    ({"epoch": 3}, WATCH), ({"method": "mixupp"}, "accepted: .*Did you mean 'mixup'"),
    ({"noise": "symmetric"}, "accepted: symmetric:RATE"), ({"noise": "symetric:0.4"}, "accepted: none, "),
    ({"watched": "runs/nowhere"}, "is no run directory")])
def test_the_watching_page_starts_nothing_it_was_not_asked_for(repo, tmp_path, monkeypatch, wrong, words):
    monkeypatch.chdir(tmp_path)
    path = repo / "nbs" / "explore" / "explore_watch.ipynb"
    with pytest.raises(BadInput, match=words): Page(path, tmp_path, **wrong)
    assert not list(tmp_path.iterdir()), "it began to work"


def test_choices_and_steps():
    assert steps(0, 1, 0.05)[3] == 0.15 and len(steps(0, 1, 0.05)) == 21
    with pytest.raises(BadInput): Choice(())
    with pytest.raises(BadInput): Choice((1, 2), 3)


# ---- numbers

@pytest.mark.parametrize("kind", ["symmetric", "symmetric-excl", "asymmetric", "pair-flip", "instance"])
def test_noise_page_shows_the_matrix_that_was_drawn(page, kind):
    names = page("noise").names
    fig = names["noises"].at(kind=kind, rate=0.5)
    _, made = names["noise_on"](names["source"], f"{kind}:0.5", 0, "digits", names["Where"]())
    true, matrix = names["true"], np.zeros((10, 10))
    np.add.at(matrix, (true, made.labels.numpy()), 1)
    assert np.allclose(fig.data[0].z, matrix / matrix.sum(1, keepdims=True))
    wrong = (made.labels.numpy() != true).mean()
    assert f"realised {wrong:.1%}" in text_of(fig)
    framed = sum(s.line.dash == "dash" for s in fig.layout.shapes)
    assert framed == (made.labels.numpy() != true)[names["fixed"]].sum()


def test_noise_page_counts_both_conventions(page):
    fig = page("noise").names["conventions"].at(rate=0.8, classes=2)
    marks = {t.name: t.y for t in fig.data if t.mode == "markers"}
    assert np.allclose(marks["symmetric-excl, as drawn"], np.linspace(0, 1, 11), atol=1e-3)
    assert np.allclose(marks["symmetric, as drawn"], np.linspace(0, 0.5, 11), atol=0.02)
    assert "40.0% of the labels are wrong, without it 80.0%" in text_of(fig)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memorisation_page_against_the_runs_own_arrays(page):
    names = page("memorisation").names
    run = names["runs"][0.4]
    samples, found = run.samples(), names["found"][0.4]
    for (_, epoch, path), at in zip(run.snapshots(), range(len(found["epoch"])), strict=True):
        predicted = np.load(path)["prediction"]
        wrong = samples["given"] != samples["true"]
        assert found["epoch"][at] == epoch + 1
        assert found["given class"][at] == (predicted == samples["given"])[wrong].mean()
        assert found["true class"][at] == (predicted == samples["true"])[wrong].mean()
        assert found["clean"][at] == (predicted == samples["given"])[~wrong].mean()
    assert found["given class"][-1] > 0.9, "it has not memorised"
    assert found["true class"].max() > 0.5 > 0.1 > found["true class"][-1], "no early learning"
    assert found["test"].max() > found["test"][-1] + 0.05
    bars = [t for t in names["memory"].at(rate=0.4, epoch=3).data if t.type == "bar"]
    assert np.isclose(sum(t.y[0] for t in bars), 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_small_loss_page_against_a_slow_loop(page):
    names = page("small_loss").names
    moment = names["read_moment"](names["runs"]["asymmetric:0.4"], 5)
    fig = names["splits"].at(noise="asymmetric:0.4", epoch=5)
    state = names["LossState"](moment)
    x = np.linspace(state.edges[0], state.edges[-1], 300)
    for k, scope in enumerate(("all", "class")):
        cuts = np.broadcast_to(state.mixture(x, scope)[1], 10)
        for c in range(10):
            rows = [i for i in range(len(moment.given)) if moment.given[i] == c]
            clean = [i for i in rows if moment.true[i] == c]
            kept = sum(not moment.arrays["loss"][i] > cuts[c] for i in clean) / len(clean)
            assert np.isclose(fig.data[k].y[c], kept)
            wrong = [i for i in rows if moment.true[i] != c]
            caught = [moment.arrays["loss"][i] > cuts[c] for i in wrong]
            shown = fig.data[2 + k].y[c]
            assert np.isclose(shown, np.mean(caught)) if wrong else np.isnan(shown)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trusted_page_against_the_runs_results(page, folder):
    names = page("trusted").names
    fig = names["purified"].at(noise=0.8)
    results = {}
    for path in (folder / "runs").glob("digits-symmetric-0.8-*/result.json"):
        run = Run(path.parent)
        row = results.setdefault((run.about["method"], run.task["trusted"] // 10), [])
        row.append(run.result["label_accuracy_after"])
    assert len(results) == 6 and all(len(v) == 3 for v in results.values())
    for trace in fig.data:
        for y, up, down, trusted in zip(trace.y, trace.error_y.array, trace.error_y.arrayminus, (1, 5, 10),
                                        strict=True):
            values = results[trace.name, trusted]
            assert np.allclose([y, y + up, y - down], [np.mean(values), max(values), min(values)])


def test_human_page_says_that_stand_ins_are_no_people(page):
    names = page("human").names
    assert "weak classifiers" in names["who"]
    given, true = names["answers"]["1 example"], names["true"]
    fig = names["compared"].at(annotator="1 example", against="symmetric-excl")
    assert "weak classifiers" in text_of(fig)
    assert np.allclose(fig.data[0].z.sum(1), 1) and np.isclose(fig.data[0].z[3, 3],
                                                               (given[true == 3] == 3).double().mean())
    drawn = names["synthetic"]("symmetric-excl", given)
    assert abs((drawn != true).double().mean() - (given != true).double().mean()) < 1 / len(true)


def test_people_where_their_answers_are(repo, shared_data, folder):
    path = repo / "nbs" / "explore" / "explore_human.ipynb"
    names = Page(path, folder, data_dir=str(shared_data)).names
    wrong = (names["answers"]["worse"] != names["true"]).double().mean().item()
    assert names["who"] == "people" and round(wrong, 3) == 0.402
    began = time.process_time()
    fig = names["compared"].at(annotator="worse", against="same matrix", show="by class")
    assert time.process_time() - began < 1 and len(fig.data) == 2


def test_shared_mistakes_of_annotators_who_look_at_the_class_only():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 5, 40_000)
    one, two = ((true + (rng.random(40_000) < 0.3) * rng.integers(1, 5, 40_000)) % 5 for _ in range(2))
    found = figures.shared_mistakes(one, two, true, 5)
    assert abs(found["both"] - 0.09) < 0.01 and abs(found["same"] - 0.25) < 0.02
    assert abs(found["both by class"] - 0.09) < 0.01 and abs(found["same by class"] - 0.25) < 0.01
    nobody = figures.shared_mistakes(true, true, true, 5)
    assert nobody["both"] == 0 and np.isnan(nobody["same"])


# ---- ways to run

def papermill(*arguments, cwd):
    "A page run where nobody can move a control."
    quiet = {k: v for k, v in os.environ.items() if k not in ("JPY_SESSION_NAME", "LNL_LIVE")}
    return subprocess.run([sys.executable, "-m", "papermill", *map(str, arguments)], cwd=cwd, timeout=280,
                          env=quiet, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["noise", "human"])
def test_papermill_leaves_static_figures_only(repo, folder, name):
    out = folder / f"{name}.ipynb"
    done = papermill(repo / "nbs" / "explore" / f"explore_{name}.ipynb", out, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [o for c in nbformat.read(out, as_version=4).cells for o in c.get("outputs", [])]
    data = [o["data"] for o in outputs if "data" in o]
    assert sum(PLOTLY in d for d in data) == 2 and not any(WIDGET in d for d in data)
    assert out.stat().st_size < 200_000


@pytest.mark.parametrize("name, unknown, accepted", [("noise", "rate", "accepted: dataset, seed, data_dir"),
                                                     ("watch", "epoch", WATCH)])
def test_papermill_refuses_an_unknown_parameter(repo, tmp_path, name, unknown, accepted):
    path = repo / "nbs" / "explore" / f"explore_{name}.ipynb"
    done = papermill(path, tmp_path / "no.ipynb", "-p", unknown, "3", cwd=tmp_path)
    assert done.returncode and unknown in done.stderr and accepted in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.browser
@pytest.mark.timeout(240)
@pytest.mark.xdist_group("browser")
def test_a_slider_changes_the_figure_in_jupyterlab(repo, tmp_path):
    if reason := browser.why_no_browser():
        if os.environ.get("LNL_REQUIRE_BROWSER") == "1": pytest.fail(reason)
        pytest.skip(reason)
    with browser.Server(tmp_path) as server, browser.Lab(server) as lab:
        source = repo / "nbs" / "explore" / "explore_noise.ipynb"
        (server.notebooks / "page.ipynb").write_text(source.read_text())
        lab.open("page.ipynb", simple=True)
        lab.run_all()
        lab.idle(150)
        before = lab.plot_data(0)
        lab.dropdown("noise").select_option("pair-flip")

        def other():  # nothing, as long as the figure is being drawn anew
            now = lab.plot_data(0)[0].get("z")
            return now != before[0]["z"] and now

        matrix = np.array(lab.wait(other, 30, "another matrix")).reshape(10, 10)
        assert (matrix > 0).sum() == 20 and np.allclose(matrix.diagonal(), 0.6, atol=0.01)
        lab.save()
        lab.page.wait_for_timeout(500)
        saved = (server.notebooks / "page.ipynb").read_text()
        assert "pair flip, class i to class i + 1" in saved and "_esm" not in saved
        assert not lab.external and not lab.page_errors and not lab.tracebacks()
