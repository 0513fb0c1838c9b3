"""Pages and stored results agree: a number on a page that no run backs makes this fail."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from lnl_bench.engine.runs import Run
from lnl_bench.repro.results import KEY, fill_blocks, result_row, stored
from lnl_bench.repro.statistics import BY

PAGES = ("README.md", "reports/README.md", "reports/meta-learning.md")


@pytest.fixture(scope="module")
def results(repo): return pd.read_csv(repo / "reports" / "results.csv")


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page, repo, results):
    text = (repo / page).read_text()
    assert re.search(r"<!-- results:", text)
    assert fill_blocks(text, results, (repo / page).parent) == text


def test_a_changed_number_is_found(repo, results):
    text = (repo / "README.md").read_text()
    doctored = re.sub(r"\d\d\.\d ±", "99.9 ±", text, count=1)
    assert doctored != text and fill_blocks(doctored, results, repo) == text


def test_every_row_has_its_record(repo, results):
    kept = (repo / "reports" / "runs").glob("*/result.json")
    rows = {found[KEY]: found for found in (result_row(Run(p.parent)) for p in kept)}
    assert set(results[KEY]) == set(rows), "results.csv and reports/runs hold the same runs"
    for row in results.to_dict("records"):
        for name, value in rows[row[KEY]].items():
            if value in (None, ""): assert pd.isna(row[name]), name
            elif isinstance(value, (int, float)): assert abs(row[name] - value) < 1e-9, name
            else: assert str(row[name]) == str(value), name


def test_runs_that_are_averaged_have_the_same_settings(repo):
    "A table's row is over seeds alone: what else was changed would need a row of its own."
    groups = {}
    for kept in (repo / "reports" / "runs").glob("*/result.json"):
        run = Run(kept.parent)
        row = result_row(run)
        groups.setdefault(tuple(str(row[k]) for k in BY), []).append(run)
    assert len(groups) > 200
    for name, runs in groups.items():
        assert all(run.about["config"] == runs[0].about["config"] for run in runs), name
        seeds = [run.about["seed"] for run in runs]
        assert len(set(seeds)) == len(seeds), name


def test_provenance_is_whole(results):
    for name in ("dataset", "noise_type", "noise_hash", "method", "preset", "seed",
                 "device", "torch", "lnl_bench", "commit", "started"):  # fmt: skip
        assert results[name].notna().all(), name
    assert not results["commit"].str.endswith("-dirty").any(), "measured on committed code"


def test_speed_claims_hold_in_the_stored_measurement(repo):
    rows = json.loads((repo / "reports" / "bench_purify.json").read_text())
    by_name = {row["name"]: row for row in rows}
    assert by_name["IPC epoch, solved anew, d=512"]["ratio"] >= 4
    assert by_name["IPC epoch, solved anew, d=2048"]["ratio"] >= 25
    assert by_name["100 epochs of IPC and EAC, d=512"]["seconds"] < 40
    assert by_name["100 epochs of IPC and EAC, d=2048"]["seconds"] < 60


def test_watching_costs_what_the_pages_say(repo):
    rows = {row["name"]: row for row in json.loads((repo / "reports" / "bench_views.json").read_text())}
    assert rows["recording, together"]["ratio"] <= 1.02 and rows["attached"]["ratio"] <= 1.05
    told = rows["attached"]["detail"]
    painted, seconds = map(int, re.search(r"painted (\d+) times in about (\d+) s", told).groups())
    assert painted / seconds >= 1.7, "about twice a second"
    assert rows["one update of a figure"]["seconds"] < 0.01
    assert float(re.search(r"grew by ([\d.]+) MB", rows["memory after 1,000 updates"]["detail"])[1]) < 5
    size = rows["replay an epoch of a run of 300"]["detail"]
    megabytes, files = re.search(r"(\d+) MB in (\d+) files", size).groups()
    assert int(megabytes) < 150 and int(files) < 150
    told = (repo / "README.md").read_text()
    percent = re.search(r"a browser on the same two cores (\d+) %", " ".join(told.split()))
    assert abs(int(percent[1]) - 100 * (rows["attached, with a browser"]["ratio"] - 1)) <= 1


def mean(results, method, noise, column, correction=None):
    "The mean of a column over the seeds of one method on digits; three seeds, or the test fails."
    wanted = {"dataset": "digits", "noise_type": "symmetric", "preset": "laptop", "noise": noise}
    wanted["method"] = method
    rows = results[[all(row[k] == v for k, v in wanted.items()) for row in results.to_dict("records")]]
    if correction: rows = rows[rows["variant"].str.contains(f"correction={correction};", regex=False)]
    assert sorted(rows["seed"]) == [0, 1, 2], (method, noise, correction)
    return 100 * rows[column].mean()


def test_a_step_is_made_of_passes(repo):
    rows = {row["name"]: row for row in json.loads((repo / "reports" / "bench_step.json").read_text())}
    outside = [row["ratio"] for name, row in rows.items() if name.endswith("outside passes")]
    assert len(outside) > 40 and max(outside) < 0.15, "every method, every kind of epoch"
    counted = [row["detail"] for name, row in rows.items() if name.endswith(": epoch")]
    assert len(counted) > 40
    for text in counted: assert "by hand" not in text or "as measured" in text or "measured -" in text, text


def cleaners(repo, noise):
    "Mean AUC over three seeds by epoch (from 0) of CPC's four cleaners, from the records."
    kept, areas = (repo / "reports" / "runs").glob(f"digits-uneven-symmetric-{noise}-*"), {}
    for run in map(Run, kept): areas.setdefault(run.about["method"], []).append(run.series("noise_auc"))
    names = ("gmm-agn", "gmm-awr", "cpc-agn", "cpc-awr")
    assert {m: len(a) for m, a in areas.items()} == dict.fromkeys(names, 3)
    return {m: pd.DataFrame(a).mean() for m, a in areas.items()}


def test_cleaners_do_what_the_page_says(repo):
    half, most = cleaners(repo, 0.5), cleaners(repo, 0.8)
    for kind, first in (("agn", 0.954), ("awr", 0.976)):
        assert round(half[f"cpc-{kind}"][10], 3) == round(half[f"gmm-{kind}"][10], 3) == first
        assert half[f"cpc-{kind}"].iloc[-1] < half[f"gmm-{kind}"].iloc[-1] + 0.001
    assert all((m[12:] > 0.98).all() for m in half.values())
    ends = {"cpc-agn": 0.956, "gmm-agn": 0.937, "cpc-awr": 0.979, "gmm-awr": 0.925}
    assert {m: round(a.iloc[-1], 3) for m, a in most.items()} == ends


def test_prototypes_lead_to_better_networks_at_80_percent(results):
    rows = results[(results["dataset"] == "digits-uneven") & (results["noise"] == 0.8)]
    last = rows.groupby("method")["last"].mean()
    assert last.idxmax() == "cpc-awr" and last["gmm-awr"] > last["gmm-agn"]
    for kind in ("agn", "awr"): assert last[f"cpc-{kind}"] > last[f"gmm-{kind}"]


def test_dmlp_on_digits_does_what_the_pages_say(results):
    both = {n: mean(results, "dmlp", n, "label_accuracy_after", "ipc+eac") for n in (0.2, 0.5, 0.8, 0.9)}
    assert both[0.9] >= 88
    assert mean(results, "dmlp-naive", 0.9, "last") - mean(results, "cross-entropy", 0.9, "last") >= 25
    assert mean(results, "dmlp-naive", 0.9, "best") - mean(results, "cross-entropy", 0.9, "best") >= 25
    for n in (0.5, 0.8): assert both[n] > mean(results, "linear-probe", n, "label_accuracy_after")
    for n in both:
        for alone in ("ipc", "eac"): assert both[n] > mean(results, "dmlp", n, "label_accuracy_after", alone)


def test_sampled_gradients_vary_as_the_page_says(repo):
    rows = pd.read_csv(repo / "reports" / "meta_gradients.csv")
    rows, found = rows.query("epoch > 0 and trained_by == 'famus-mw-net'"), {}
    for column in ("variance", "relative_variance"):
        wide = rows.pivot_table(index=["seed", "epoch"], columns="asked", values=column)
        found[column] = np.exp(np.log(wide.div(wide["forward"], axis=0)).mean()).round(2)
    assert found["variance"]["gates"] == 0.51 and found["relative_variance"]["gates"] == 0.98
    assert found["relative_variance"]["random 4 layers"] == 1.23
    assert round(rows[rows["asked"] == "gates"]["cosine_of_a_batch"].mean(), 2) == 0.87


def test_lambda_comes_apart_in_the_stored_runs(repo):
    runs = stored(repo / "reports" / "runs", "digits", "symmetric:0.4", "ieg", variant="paper")
    assert [run.about["seed"] for run in runs] == [0, 1, 2]
    clean, wrong = (pd.DataFrame([r.series(f"p_clean_of_{k}") for r in runs]).mean()
                    for k in ("clean", "mislabelled"))
    assert clean.min() > 0.8 and round(clean.iloc[-1], 2) == 0.91 and round(wrong.iloc[-1], 2) == 0.1


@pytest.mark.parametrize("net", ["preact-resnet18", "wrn-28-2"])
def test_meta_gradients_cost_what_the_pages_say(net, repo):
    rows = json.loads((repo / "reports" / "bench_metagrad.json").read_text())
    rows = [row for row in rows if row["name"].startswith(net)]
    by_name = {row["name"].partition(": ")[2]: row for row in rows}
    held = {name: row["held_bytes"] / by_name["reverse"]["held_bytes"] for name, row in by_name.items()}
    assert by_name["forward"]["of_reverse"] <= 0.75 and by_name["forward"]["ratio"] <= 4.0
    assert by_name["difference"]["of_reverse"] <= 0.6 and by_name["difference"]["ratio"] <= 3.2
    assert held["forward"] <= 0.9 and held["forward, graph rebuilt"] <= 0.65
    assert by_name["forward, graph rebuilt"]["of_reverse"] <= 0.85
    for strategy, most in (("gates", 0.62), ("last 4 layers", 0.6)):
        assert by_name[f"FaMUS, {strategy}"]["of_reverse"] <= most
    assert by_name["forward"]["distance"] < 1e-5
    assert by_name["difference"]["distance"] < 0.02 and by_name["difference"]["cosine"] > 0.999


def last_of(rows, method, part):
    "Mean and sd over three seeds of the last accuracy on digits at symmetric 0.4, as a page prints them."
    rows = rows[(rows["dataset"] == "digits") & (rows["noise_type"] == "symmetric") & (rows["noise"] == 0.4)]
    rows = rows[(rows["method"] == method) & rows["variant"].str.contains(part, regex=False)]
    assert sorted(rows["seed"]) == [0, 1, 2], (method, part)
    return f"{100 * rows['last'].mean():.1f} ± {100 * rows['last'].std():.1f}"


VARIANTS = [
    ("mw-net", "variant=paper", "93.8 ± 0.7"), ("mw-net", "variant=normalised", "97.8 ± 0.4"),
    ("l2r", "variant=released", "98.0 ± 0.7"), ("ieg", "variant=released", "98.5 ± 0.8"),
    ("mlc", "variant=paper", "74.7 ± 4.3"), ("mslc", "variant=released", "97.9 ± 0.6"),
    ("mlc", "variant=released; coupling", "96.5 ± 1.1"),
    ("mslc", "variant=paper; coupling", "97.0 ± 0.6"),
    ("mlnt", "order=second", "97.5 ± 0.4"), ("mlnt", "order=first", "97.9 ± 0.4"),
    ("famus-mw-net", "strategy=last:4", "96.7 ± 2.7"), ("famus-mw-net", "strategy=gates", "97.4 ± 1.2"),
    ("famus-mw-net", "strategy=random:4", "97.5 ± 1.3"),
    ("mlc", "representation=simclr; coupling=coupled", "95.9 ± 0.5"),
    ("mlc", "representation=simclr; coupling=decoupled", "92.0 ± 1.6"),
    ("mslc", "representation=simclr; coupling=coupled", "97.7 ± 0.2"),
    ("mslc", "representation=simclr; coupling=decoupled", "95.1 ± 0.5")]


@pytest.mark.parametrize("method, part, printed", VARIANTS)
def test_variants_end_where_the_page_says(method, part, printed, results, repo):
    text = (repo / "reports" / "meta-learning.md").read_text().partition("### Variants")[2]
    assert last_of(results, method, part) == printed and printed in text


def ends_of(repo, method, noise, *names):
    "By name of a metric, its last values in the stored runs of seeds 0 to 2 on digits, with two digits."
    runs = stored(repo / "reports" / "runs", "digits", noise, method)
    runs = [run for run in runs if method != "mw-net" or run.about["config"]["variant"] == "normalised"]
    assert [run.about["seed"] for run in runs] == [0, 1, 2]
    return [[round(run.series(name)[-1], 2) for run in runs] for name in names]


def test_what_the_page_says_of_weights_and_labels(repo):
    names = ("weight_of_clean", "weight_of_mislabelled")
    clean, wrong = ends_of(repo, "mw-net", "asymmetric:0.4", *names)
    assert (min(clean), max(clean), min(wrong), max(wrong)) == (0.88, 0.91, 1.37, 1.46)
    clean, wrong = ends_of(repo, "famus-mw-net", "asymmetric:0.4", *names)
    assert (min(clean), max(clean), min(wrong), max(wrong)) == (0.95, 0.97, 1.13, 1.21)
    (areas,) = ends_of(repo, "mw-net", "asymmetric:0.4", "noise_auc")
    assert (min(areas), max(areas)) == (0.08, 0.12)
    (right,) = ends_of(repo, "mslc", "symmetric:0.8", "label_accuracy")
    assert right == [0.29, 0.65, 0.57]
    runs = stored(repo / "reports" / "runs", "digits", "symmetric:0.8", "mslc")
    assert sorted(round(run.series("test_accuracy")[15], 2) for run in runs) == [0.51, 0.62, 0.65]
    runs = stored(repo / "reports" / "runs", "digits", "asymmetric:0.4", "mlnt")
    third = [run.series("test_accuracy")[-15:] for run in runs]
    assert {round(max(a), 2) for a in third} <= {0.93, 0.94, 0.95}
    assert sorted(round(a[-1], 2) for a in third) == [0.78, 0.83, 0.84]


def test_orders_take_the_passes_that_the_page_says(results):
    rows = results.query("method == 'mlnt' and dataset == 'digits' and noise == 0.4")
    rows = rows[rows["noise_type"] == "symmetric"]
    passes = (rows["sample_forwards"] + 2 * rows["sample_backwards"]).groupby(rows["variant"]).mean()
    first, second = (passes[passes.index.str.contains(f"order={o}")].item() for o in ("first", "second"))
    assert round(first / second, 2) == 0.77


def test_equal_time_is_from_stored_runs(repo):
    rows = pd.read_csv(repo / "reports" / "equal_time.csv")
    kept = [result_row(Run(p.parent)) for p in (repo / "reports" / "equal_time").glob("*/result.json")]
    assert sorted((r[KEY], r["last"]) for r in kept) == sorted(zip(rows[KEY], rows["last"], strict=True))
    for epochs in (12, 18): assert last_of(rows[rows["epochs"] == epochs], "mw-net", "") == "97.7 ± 0.8"
