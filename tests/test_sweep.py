"""Sweeps: a real grid through papermill, killed, interrupted, twice at once, on a full disk; refusals."""

import contextlib
import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import psutil
import pytest
from typer.testing import CliRunner

from lnl_bench.cli import app, find_notebook
from lnl_bench.data.checks import BadInput
from lnl_bench.engine.runs import Run, alive
from lnl_bench.repro import sweep as page_of_sweeps
from lnl_bench.repro.experiment import Parameters, SeedsParameters, read_parameters
from lnl_bench.repro.job import is_done, owner_of
from lnl_bench.repro.sweep import ROOM, Tally, check_store, plan, reproducible

pytestmark = pytest.mark.xdist_group("sweep")  # one worker makes what they are compared with, once

# One cheap training. Every execution that comes to the end leaves a line in the folder above the store.
TRAIN = """
from pathlib import Path
from lnl_bench.repro.experiment import Experiment, build_task
from lnl_bench.repro.sweep import resolved
p = resolved(Path("{page}"), {{k: v for k, v in globals().items() if k in {names}}})
experiment = Experiment("tiny", p)
experiment.run("cross-entropy", "cross-entropy")
experiment.finished()
with open("executed.txt", "a") as f: f.write(f"{{p.noise}} {{p.seed}} {{p.note}}\\n")
"""
TOLD = dict(dataset="digits[300]", noise=0.4, noise_type="symmetric", seed=0, preset="smoke", epochs=8,
            trusted=10, method="all", data_dir="data", runs_dir="runs", note="")
GRID = ["--grid", "noise=0.2,0.5", "--grid", "seed=0,1"]
# No training: what a cell can do to the process that runs it.
END = """
import os, sys
print("going to", how)
if how == "raise": raise ValueError("raised on purpose")
if how == "die": os._exit(9)
"""


def write_page(path, source, **told):
    parameters = "\n".join(f"{k} = {v!r}" for k, v in told.items())
    cells = [nbformat.v4.new_code_cell(text) for text in (parameters, source)]
    cells[0].metadata["tags"] = ["parameters"]
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "tiny.ipynb"
    return write_page(path, TRAIN.format(page=path, names=set(TOLD)), **TOLD)


def start(page, *arguments, cwd):
    command = [sys.executable, "-m", "lnl_bench", "sweep", str(page), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    "Wait for a sweep; returns exit status, standard output, standard error."
    out, error = process.communicate(timeout=500)
    return process.returncode, out, error


def run(page, *arguments, cwd): return finish(start(page, *arguments, cwd=cwd))


@pytest.fixture
def run_here(monkeypatch):
    "The same from this process, which saves its start: the jobs are processes of their own in any case."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def get(page, *arguments, cwd):
        monkeypatch.chdir(cwd)
        result = CliRunner().invoke(app, ["sweep", str(page), *map(str, arguments)])
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result.exit_code, result.stdout, result.stderr

    return get


def results(folder):
    return pd.read_csv(folder / "runs" / "results.csv")


def executed(folder):
    path = folder / "executed.txt"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    "A sweep of 2 x 2, two jobs at a time, never interrupted: its folder, what it printed, its seconds."
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    done = run(tiny, *GRID, "--jobs", 2, cwd=folder)
    assert done[0] == 0, done[2][-3000:]
    return folder, done, time.monotonic() - began


# --- a sweep that nothing disturbs ---


def test_a_grid_leaves_an_executed_page_per_combination_and_one_results_file(whole):
    folder, (_, out, error), _ = whole
    assert out.strip() == "runs/results.csv" and "4 jobs: 4 done (0 of them before), 0 failed." in error
    assert "4 done, 0 running, 0 failed, 0 left" in error and "to go" in error and "\r" not in error
    pages = sorted((folder / "runs" / "repro").glob("tiny-*/tiny.ipynb"))
    assert len(pages) == 4 and len({p.parent for p in pages}) == 4
    for page in pages:
        outputs = [o for c in nbformat.read(page, 4).cells for o in c.get("outputs", [])]
        assert not [o for o in outputs if o.output_type == "error"]
    table = results(folder)
    assert sorted(zip(table["noise"], table["seed"], strict=True)) == [(0.2, 0), (0.2, 1), (0.5, 0), (0.5, 1)]
    assert (table["threads"] == 1).all() and (table["epochs"] == TOLD["epochs"]).all()
    records = [json.loads(p.read_text()) for p in (folder / "runs" / "sweep").glob("*/record.json")]
    assert {r["state"] for r in records} == {"done"} and len({r["fingerprint"] for r in records}) == 4
    assert all(r["parameters"].keys() == TOLD.keys() and r["code"]["lnl_bench"] for r in records)


def test_started_again_it_runs_nothing(tiny, whole, run_here):
    folder = whole[0]
    files = [*(folder / "runs" / "repro").glob("*/tiny.ipynb"), *(folder / "runs").glob("*/metrics.jsonl")]
    before, table = {p: p.stat().st_mtime_ns for p in files}, (folder / "runs" / "results.csv").read_bytes()
    status, out, _ = run_here(tiny, *GRID, "--jobs", 2, "--json", cwd=folder)
    told = json.loads(out)
    assert status == 0 and told["before"] == 4 and {j["state"] for j in told["jobs"]} == {"done"}
    assert {p: p.stat().st_mtime_ns for p in files} == before and len(executed(folder)) == 4
    assert (folder / "runs" / "results.csv").read_bytes() == table


def test_results_hold_what_the_runs_hold_and_nothing_else(whole, tmp_path):
    "A row of a run that is gone, or of another store, does not stay."
    folder = whole[0]
    store = tmp_path / "runs"
    store.symlink_to(folder / "runs")
    good = (store / "results.csv").read_bytes()
    (store / "results.csv").write_bytes(good.replace(b"symmetric", b"asymmetric") + b"rubbish")
    assert len(page_of_sweeps.collect(store)) == 4 and (store / "results.csv").read_bytes() == good


def test_another_page_parameter_or_code_is_another_job(tiny, whole, monkeypatch, tmp_path):
    monkeypatch.chdir(whole[0])
    def jobs(page=tiny, **fixed): return plan(page, {"noise": "0.2,0.5", "seed": "0,1"}, fixed)
    assert all(is_done(j) and owner_of(j) is None for j in jobs())
    assert not any(is_done(j) for j in jobs(trusted="9"))
    moved = tmp_path / "tiny.ipynb"
    moved.write_bytes(tiny.read_bytes())
    assert all(map(is_done, jobs(moved)))
    changed = write_page(moved, TRAIN.format(page=moved, names=set(TOLD)) + "# changed", **TOLD)
    assert not any(map(is_done, jobs(changed)))
    monkeypatch.setattr(page_of_sweeps, "code_version", lambda: {"lnl_bench": "another"})
    assert not any(map(is_done, jobs()))


@pytest.mark.parametrize("name", ["dmlp", "cpc_t3"])
def test_the_parameters_of_a_page_are_those_of_its_own_cell(name):
    "So `lnl repro` and a sweep look for a page's results where the page puts them."
    notebook = find_notebook(name)
    (cell,) = [c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", [])]
    namespace: dict = {}
    exec(cell.source, namespace)
    told = {k: v for k, v in namespace.items() if not k.startswith("_")} | {"noise": 0.8}
    page = read_parameters(told, name, SeedsParameters if "seeds" in told else Parameters)
    assert dataclasses.asdict(page_of_sweeps.resolved(notebook, {"noise": 0.8})) == dataclasses.asdict(page)


# --- failures ---


@pytest.mark.timeout(600)
def test_a_failure_does_not_stop_the_rest_and_is_reported_with_its_log(tmp_path, run_here):
    page = write_page(tmp_path / "end.ipynb", END, how="end", runs_dir="runs")
    status, _, error = run_here(page, "--grid", "how=raise,die,end", "--jobs", 2, cwd=tmp_path)
    assert status == 1 and "3 jobs: 1 done (0 of them before), 2 failed." in error, error
    lines = [line.strip() for line in error.splitlines()]
    raised, died = (next(i for i, x in enumerate(lines) if x.startswith(f"failed: how={how}: "))
                    for how in ("raise", "die"))  # fmt: skip
    assert lines[raised] == "failed: how=raise: ValueError: raised on purpose"
    assert "Kernel died" in lines[died]
    for at in (raised, died):
        log, notebook = (tmp_path / lines[at + i].partition(": ")[2] for i in (1, 2))
        assert "Traceback" in log.read_text() and notebook.is_file()
    assert "going to raise" in (tmp_path / lines[raised + 1].partition(": ")[2]).read_text()
    assert "results: none" in error
    left = [j.parameters["how"] for j in plan(page, {"how": "raise,die,end"}, {}) if not is_done(j)]
    assert left == ["raise", "die"], "what failed is tried again, and nothing else"


# --- interruptions ---


def kill_all(process):
    "SIGKILL a sweep, its jobs and their kernels at the same moment."
    everyone = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError): os.kill(one.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(alive(one.pid) for one in everyone))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_any_moment_then_two_sweeps_at_once_end_as_if_nothing_had_been(tiny, whole, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    moment = random.Random(seed).uniform(0.2, 1) * whole[2] / 2  # half as many jobs
    message, command = f"killed after {moment:.2f} s (seed {seed})", ("--grid", "seed=0,1", "-p", "noise=0.2")
    process = start(tiny, *command, "--jobs", 2, cwd=tmp_path)
    with contextlib.suppress(subprocess.TimeoutExpired): process.wait(timeout=moment)
    if process.poll() is None: kill_all(process)
    else: process.communicate()
    before = executed(tmp_path)
    records = list((tmp_path / "runs" / "sweep").glob("*/record.json"))
    both = [start(tiny, *command, cwd=tmp_path) for _ in range(2)]
    for status, _, error in [finish(p) for p in both]:
        assert status == 0 and "2 jobs: 2 done" in error, f"{message}\n{error[-3000:]}"
    expected = reproducible(results(whole[0])).query("noise == 0.2").reset_index(drop=True)
    assert len(expected) == 2
    pd.testing.assert_frame_equal(reproducible(results(tmp_path)), expected, check_exact=True, obj=message)
    assert len(executed(tmp_path)) - len(before) == 2 - len(records), f"each job once; {message}"
    for run_json in (tmp_path / "runs").glob("*/run.json"):
        assert len(Run(run_json.parent).clock.read()[0]) == TOLD["epochs"], f"no epoch twice; {message}"
    assert len(list((tmp_path / "runs" / "repro").glob("tiny-*/tiny.ipynb"))) == 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["Ctrl-C", "killed alone"])
def test_jobs_end_with_the_sweep_and_go_on_with_the_next(how, tiny, tmp_path):
    "Trainings stop within the epoch. In both cases no process is left, and nothing is lost but an epoch."
    command = ("--grid", "seed=0", "-p", "noise", "0.2", "-p", "epochs", "30" if how == "Ctrl-C" else "400")
    process = start(tiny, *command, cwd=tmp_path)
    def epochs(): return sum(p.read_text().count("\n") for p in (tmp_path / "runs").glob("*/metrics.jsonl"))
    wait_for(lambda: epochs() >= 2 or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2, "a job and its kernel"
    process.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
    status, _, error = finish(process)
    if how == "Ctrl-C":
        assert status == 130 and "interrupted; the same command goes on" in error, error
        assert not any(alive(one.pid) for one in family), "it waits for its jobs"
    wait_for(lambda: not any(alive(one.pid) for one in family), 30)
    (path,) = (tmp_path / "runs").glob("*/run.json")
    stopped = Run(path.parent)
    assert stopped.status()["state"] == "stopped" and not stopped.finished
    assert (stopped.path / "checkpoint.pt").exists()
    assert not list((tmp_path / "runs" / "sweep").glob("*/record.json"))
    if how != "Ctrl-C": return
    had = epochs()
    status, _, error = run(tiny, *command, cwd=tmp_path)
    assert status == 0 and "1 job: 1 done (0 of them before)" in error and stopped.finished, error[-3000:]
    assert 2 <= had < 30 == len(stopped.clock.read()[0]) == epochs()


@pytest.mark.timeout(600)
def test_two_jobs_that_need_the_same_run_train_it_once(tiny, whole, tmp_path, run_here):
    status, _, error = run_here(tiny, "--grid", "note=a,b", "-p", "noise=0.2", "--jobs", 2, cwd=tmp_path)
    assert status == 0 and executed(tmp_path) == ["0.2 0 a", "0.2 0 b"], error[-3000:]
    (path,) = (tmp_path / "runs").glob("*/run.json")
    assert len(Run(path.parent).clock.read()[0]) == TOLD["epochs"]
    alone = reproducible(results(whole[0])).query("noise == 0.2 and seed == 0").reset_index(drop=True)
    pd.testing.assert_frame_equal(reproducible(results(tmp_path)), alone, check_exact=True)


# --- refusals ---


def refused(*arguments):
    result = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    assert isinstance(result.exception, BadInput), result
    return str(result.exception)


@pytest.mark.parametrize("arguments, words", [
    (["dmlp", "--grid", "nosie=0.2,0.5"], ("'nosie'", "noise_type", "Did you mean 'noise'?")),
    (["dmlp", "--grid", "noise=0.2,much"], ("'much'", "float")),
    (["dmlp", "--grid", "seed=1.5"], ("'1.5'", "int")),
    (["dmlp", "--grid", "noise=0.2,1.7"], ("1.7", "0 to 1")),
    (["dmlp", "--grid", "noise=0.2,,0.5"], ("''", "float")),
    (["dmlp", "--grid", "noise"], ("'noise'", "NAME=VALUE")),
    (["dmlp", "--grid", "noise=0.2,0.20"], ("0.2", "twice")),
    (["dmlp", "--grid", "seed=0", "--grid", "seed=1"], ("'seed=1'", "once")),
    (["dmlp", "--grid", "seed=0", "-p", "seed=1"], ("seed", "--grid and by -p")),
    (["dmlp", "--grid", "preset=smoke,quick"], ("'quick'", "laptop")),
    (["dmlp", "-p", "method=cpc"], ("'cpc'", "dmlp")), (["dmlp", "-p", "nosie=1"], ("'nosie'",)),
    (["dmlp", "--grid", "runs_dir=a,b"], ("runs_dir", "one store")),
    (["dmlp", "--jobs", "0"], ("jobs = 0", "1 to")), (["dlmp"], ("'dlmp'", "Did you mean 'dmlp'?")),
    (["pages/mine.ipynb"], ("pages/mine.ipynb", "does not exist")),
])  # fmt: skip
def test_bad_input_is_refused_before_any_work(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(*arguments)
    for word in words: assert word in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, words", [
    ("not JSON", "no readable JSON"), ("[]", "no notebook"), ('{"cells": []}', "0 cells tagged"),
])  # fmt: skip
def test_what_is_no_page_is_refused(text, words, tmp_path):
    (tmp_path / "mine.ipynb").write_text(text)
    assert words in refused(tmp_path / "mine.ipynb")


def test_a_page_without_a_store_or_with_a_parameter_that_is_no_scalar_is_refused(tmp_path):
    assert "no parameter runs_dir" in refused(write_page(tmp_path / "a.ipynb", "", seed=0))
    page = write_page(tmp_path / "b.ipynb", "", rates=[0.2, 0.5], runs_dir="runs")
    assert "rates = [0.2, 0.5]" in refused(page)


def test_refused_at_the_command_line_with_exit_status_2(tmp_path):
    status, out, error = run("dmlp", "--grid", "nosie=0.2,0.5", cwd=tmp_path)
    assert status == 2 and out == "" and error.startswith("lnl: setting = 'nosie'") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- stores that cannot be written ---


@contextlib.contextmanager
def mounted(folder, options):
    "A small file system of its own at `folder`; the test is skipped where none can be mounted."
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try: yield folder
    finally: subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_store_is_refused_before_any_work(tiny, tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        message = refused(tiny, "-p", f"runs_dir={disk}/runs")
    assert "Read-only file system" in message and "accepted" in message


def test_a_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    def full(handle): raise OSError(28, os.strerror(28))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="No space left on device"): check_store(tmp_path)
    assert not list((tmp_path / "sweep").iterdir())


@pytest.mark.timeout(600)
def test_a_disk_that_fills_up_loses_nothing(tiny, whole, tmp_path, run_here):
    "Refused while it is full; a job that fills it fails with the reason; with room again the sweep goes on."
    command = ("--grid", "seed=0", "-p", "noise=0.2", "-p", f"runs_dir={tmp_path}/disk/runs")
    with mounted(tmp_path / "disk", "size=8m") as disk:
        filler = disk / "filler"
        with open(filler, "wb", buffering=0) as f, contextlib.suppress(OSError):
            while f.write(bytes(4096)) == 4096: pass
        assert "No space left on device" in refused(tiny, *command)
        os.truncate(filler, filler.stat().st_size - ROOM - (64 << 10))  # a run has about twice as much
        status, _, error = run_here(tiny, *command, cwd=tmp_path)
        assert status == 1 and "1 failed" in error and "No space left on device" in error, error[-3000:]
        filler.unlink()
        status, _, error = run_here(tiny, *command, cwd=tmp_path)
        assert status == 0 and "1 done (0 of them before)" in error, error[-3000:]
        found = reproducible(pd.read_csv(disk / "runs" / "results.csv"))
    alone = reproducible(results(whole[0])).query("noise == 0.2 and seed == 0").reset_index(drop=True)
    pd.testing.assert_frame_equal(found, alone, check_exact=True)


# --- progress ---


def test_progress_is_one_line_on_a_terminal_and_lines_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self): return True

    for out, starts in ((Terminal(), "\r"), (io.StringIO(), "")):
        tally = Tally(3, 2, out, before=1)
        tally.say([1.0])
        tally.ended({"state": "failed", "seconds": 4.0})
        tally.say([2.0])
        tally.say([2.0])
        tally.end()
        texts = [t.strip() for t in out.getvalue().split("\r" if starts else "\n") if t.strip()]
        assert texts == ["1 done, 1 running, 0 failed, 1 left",
                         "1 done, 1 running, 1 failed, 0 left | about 0:02 to go"]  # fmt: skip
        assert out.getvalue().count("\n") == (1 if starts else 2)
