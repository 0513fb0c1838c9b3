"Leaderboards against a slow reading of results.csv, doctored pages, results of several machines, bad input."

import csv
import hashlib
import json
import re
import shutil
from collections import defaultdict
from statistics import fmean, stdev
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_bad_input import files_below, lnl, refused

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.runs import Run, open_run
from lnl_bench.repro import leaderboard as L
from lnl_bench.repro import results as R
from lnl_bench.repro.statistics import paired
from lnl_bench.views.theme import SERIES

DIGITS = "digits, symmetric 0.8, 100 trusted images, preset laptop"


@pytest.fixture(scope="module")
def reports(repo): return repo / "reports"


@pytest.fixture(scope="module")
def table(reports): return L.with_records(R.read_results(reports / "results.csv"), reports / "runs", reports)


@pytest.fixture(scope="module")
def page(table): return L.leaderboard_page(table)


@pytest.fixture(scope="module")
def lists(table): return {L.section_name(key): (key, rows) for key, rows in L.sections(table)}


@pytest.fixture(scope="module")
def plain_rows(reports):
    with open(reports / "results.csv", newline="") as f: return list(csv.DictReader(f))


def tables_of(text):
    "Heading of a list -> its rows, each a dictionary by column."
    found = {}
    for part in text.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")]
        cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]
        found[part.splitlines()[0]] = [dict(zip(L.HEAD, c, strict=True)) for c in cells[1:]]
    return found


# --- the stored page ---


def test_the_stored_page_is_that_of_the_results(page, reports):
    assert (reports / "leaderboard.md").read_text() == page, (
        "lnl report --runs-dir reports/runs --site reports writes it anew")  # fmt: skip


def test_a_changed_number_is_found(page, table):
    doctored = re.sub(r"\d\d\.\d ±", "99.9 ±", page, count=1)
    assert doctored != page
    changed = table.copy()
    changed.loc[changed["last"].first_valid_index(), "last"] -= 0.05
    assert L.leaderboard_page(changed) != page
    assert L.leaderboard_page(table.iloc[1:]) != page, "a run that is not there any more"


def test_every_run_stands_once(page, plain_rows):
    links = re.findall(r"\((runs/[^)]+)\)", page)
    scored = [row for row in plain_rows if row["last"]]
    assert len(links) == len(set(links)) == len(scored)


def test_numbers_by_a_slow_reading(page, plain_rows):
    "Mean, deviation, n and order of each list from the file by the standard library alone."
    groups = defaultdict(lambda: defaultdict(list))
    for row in plain_rows:
        if not row["last"]: continue
        place = tuple(row[k] for k in ("dataset", "noise_type", "noise", "trusted", "preset"))
        groups[place][row["method"], row["variant"], row["oracle"]].append(100 * float(row["last"]))
    def text(v): return f"{fmean(v):.1f}" + (f" ± {stdev(v):.1f}" if len(v) > 1 else "")
    expected = sorted(sorted(map(text, g.values())) for g in groups.values())
    shown = tables_of(page)
    assert sorted(sorted(row["last"] for row in rows) for rows in shown.values()) == expected
    for rows in shown.values():
        means = [float(row["last"].split(" ")[0]) for row in rows]
        assert means == sorted(means, reverse=True) and [row[""] for row in rows] == [
            str(i) for i in range(1, len(rows) + 1)]  # fmt: skip


def test_links_lead_to_the_runs(page, reports):
    for name, rows in tables_of(page).items():
        for row in rows:
            found = re.findall(r"\[(\d+)\]\(([^)]+)\)", row["runs, by seed"])
            runs = [Run((reports / unquote(link)).parent) for _, link in found]
            assert len(runs) == int(row["n"]) and name.startswith(runs[0].about["task"]["name"] + ", ")
            assert [run.about["seed"] for run in runs] == [int(seed) for seed, _ in found]
            assert f"{100 * fmean(run.result['last'] for run in runs):.1f}" == row["last"].split(" ")[0]
            assert len({json.dumps(run.about["config"], sort_keys=True) for run in runs}) == 1, "one setting"


@pytest.mark.filterwarnings("ignore:Precision loss")  # two methods with equal scores
def test_marks_are_those_of_a_paired_t_test(lists):
    checked = {"not told apart": 0, "apart": 0}
    for _, rows in lists.values():
        order, _ = L.ranked(rows)
        for entry in order[1:]:
            sides = [e["rows"].set_index("seed")["last"].sort_index() for e in (entry, order[0])]
            if len(sides[0]) < 2: continue
            with np.errstate(all="ignore"): p = stats.ttest_rel(*sides).pvalue
            mark = L.told_apart(entry["less_first"])  # p is NaN where there is no difference at all
            assert mark == ("apart" if p < 0.05 else "not told apart"), entry["name"]
            assert entry["less_first"]["mean"] == pytest.approx(100 * (sides[0] - sides[1]).mean())
            checked[mark] += 1
    assert min(checked.values()) > 20, checked


def test_what_was_told_is_marked(page, plain_rows):
    told = [row["method"] for rows in tables_of(page).values() for row in rows]
    expected = {(r["dataset"], r["noise_type"], r["noise"], r["method"], r["variant"]) for r in plain_rows
                if r["last"] and r["oracle"] != "none"}  # fmt: skip
    assert sum("(told the " in name for name in told) == len(expected) > 5


def test_methods_that_only_correct_labels_are_named_not_ranked(lists):
    order, unranked = L.ranked(lists[DIGITS][1])
    assert "DMLP, IPC alone" in unranked and not {e["name"] for e in order} & set(unranked)
    assert "only correct labels: DMLP; " in L.section_text(*lists[DIGITS])


# --- settings, seeds, scores that are missing ---


def copied_records(reports, folder, rows):
    "The records of these rows, copied."
    for link in rows["record"]:
        source = (reports / unquote(link)).parent
        shutil.copytree(source, folder / source.name)


def test_two_settings_of_a_method_are_never_averaged(table, reports, tmp_path):
    rows = table[(table["dataset"] == "digits") & (table["method"] == "mixup") & (table["noise"] == 0.8)]
    copied_records(reports, tmp_path / "runs", rows)
    both = [R.result_row(run) for run in R.finished_runs(tmp_path / "runs")]
    for path in (tmp_path / "runs").glob("*/run.json"):
        about = json.loads(path.read_text())
        before, about["config"]["rate"] = about["config"]["rate"], 0.5
        shutil.copytree(path.parent, tmp_path / "changed" / path.parent.name)
        (tmp_path / "changed" / path.parent.name / "run.json").write_text(json.dumps(about))
    both += [R.result_row(run) | {"last": 0.5} for run in R.finished_runs(tmp_path / "changed")]
    R.merge_results(tmp_path / "results.csv", both)
    found = L.with_records(R.read_results(tmp_path / "results.csv"), tmp_path, tmp_path)
    order, _ = L.ranked(found)
    assert [e["name"] for e in order] == [f"mixup [rate={rate}]" for rate in (before, 0.5)]
    assert order[1]["scores"]["last"]["mean"] == 50
    assert order[0]["scores"]["last"]["mean"] == pytest.approx(100 * rows["last"].mean())


def test_without_records_settings_cannot_be_told_apart_and_that_is_refused(table, tmp_path):
    "The same method twice for each seed, known only from the file: nothing may be averaged in silence."
    rows = table[(table["dataset"] == "digits") & (table["noise"] == 0.8)].iloc[:6]
    more = rows.assign(**{R.KEY: "x" + rows[R.KEY], "last": 0.5})
    bare = pd.concat([rows, more]).drop(columns=["record", "settings", "split"])
    with pytest.raises(BadInput, match="two runs with"):
        L.ranked(L.with_records(bare, tmp_path, tmp_path))


def test_a_score_that_some_seeds_lack(lists):
    key, rows = lists[DIGITS]
    rows = rows[rows["method"].isin(["l2r", "mixup"])].copy()
    rows.loc[rows.index[rows["method"] == "l2r"][0], "selected_by_trusted"] = np.nan
    rows.loc[rows.index[rows["method"] == "mixup"][1:], "last"] = np.nan
    shown = {row["method"]: row for row in tables_of("\n" + L.section_text(key, rows))[DIGITS]}
    assert shown["L2R"]["chosen by trusted"].endswith(" (2)") and shown["L2R"]["n"] == "3"
    assert shown["mixup"]["last"].endswith(" (1)") and shown["mixup"]["95 % interval"] == "–"
    assert shown["mixup"]["less the first"].endswith("one pair")


def test_methods_without_a_common_seed(lists):
    rows = lists[DIGITS][1]
    apart = pd.concat([rows[(rows["method"] == "l2r") & (rows["seed"] == 0)],
                       rows[(rows["method"] == "mixup") & (rows["seed"] == 1)]])  # fmt: skip
    order, _ = L.ranked(apart)
    assert order[1]["less_first"]["n"] == 0 and L.told_apart(order[1]["less_first"]) == "no pair"


# --- compute ---


def test_cost_by_hand(lists):
    rows = lists[DIGITS][1]
    plain = rows[rows["method"] == "cross-entropy"]
    assert (L.plain_epochs(plain) == plain["epochs"]).all(), "each image forward and backward, each epoch"
    one = rows[rows["method"] == "mw-net"].iloc[:1]
    f, b, n = (int(one.iloc[0][k]) for k in ("sample_forwards", "sample_backwards", "train"))
    assert L.plain_epochs(one).item() == pytest.approx((f + 2 * b) / n / 3)


def test_nothing_cheaper_is_better_than_the_frontier(lists):
    points = L.compute_points(lists[DIGITS][1])
    points = points[points["given"] != L.GIVEN[2]]
    best = set(L.frontier(points)["name"])
    for p in points.itertuples():
        beaten = [q for q in points.itertuples() if q.cost <= p.cost and q.accuracy > p.accuracy]
        assert (p.name in best) <= (not beaten)
    assert 2 <= len(best) < len(points) and len(points) > 20


@pytest.mark.parametrize("unit", ["passes", "minutes"])
def test_the_figure_says_what_it_shows(lists, unit):
    key, rows = lists[DIGITS]
    fig = L.compute_figure(key, rows, unit)
    assert DIGITS in " ".join(fig.layout.title.text.split("<br>"))
    assert ("minutes" if unit == "minutes" else "plain training") in fig.layout.xaxis.title.text
    assert fig.layout.yaxis.title.text.endswith("(%)") and fig.layout.xaxis.type == "log"
    note = " ".join(fig.layout.title.subtitle.text.split("<br>"))
    assert ("x86_64, 1 thread, float32" in note) == (unit == "minutes")
    assert fig.layout.showlegend and [t.name for t in fig.data[1:]] == list(L.GIVEN)
    assert [t.marker.color for t in fig.data[1:]] == list(SERIES[:3]), "told apart by the colour-blind"
    assert len({t.marker.symbol for t in fig.data[1:]}) == 3
    points = L.compute_points(rows, unit)
    drawn = sorted((x, y) for t in fig.data[1:] for x, y in zip(t.x, t.y, strict=True))
    assert drawn == sorted(zip(*(points[points["cost"] > 0][c] for c in ("cost", "accuracy")), strict=True))


def test_times_of_another_machine_are_left_out(lists):
    key, rows = lists[DIGITS]
    other = rows[rows["method"] == "mixup"].assign(method="elsewhere", device="H200", seconds=1.0, threads=8)
    both = pd.concat([rows, other])
    assert "elsewhere" in set(L.compute_points(both)["name"])
    assert L.compute_points(both, "minutes").equals(L.compute_points(rows, "minutes"))
    with pytest.raises(BadInput, match="'hours'"): L.compute_points(rows, "hours")


def test_a_figure_without_passes_is_refused(lists):
    key, rows = lists[DIGITS]
    probe = rows[rows["method"] == "linear-probe"]
    with pytest.raises(BadInput, match="no run trained a network"): L.compute_figure(key, probe)


# --- the site ---


def digests(folder):
    "A digest of each file: of megabytes that differ, pytest would look for the difference for minutes."
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def small(reports, tmp_path_factory):
    "A folder with the results and records of two lists."
    folder = tmp_path_factory.mktemp("small")
    table = pd.read_csv(reports / "results.csv", dtype=str, keep_default_na=False)
    table[table["dataset"] == "digits-uneven"].to_csv(folder / "results.csv", index=False)
    for run in (reports / "runs").glob("digits-uneven-*"): shutil.copytree(run, folder / "runs" / run.name)
    return folder


def test_the_command_writes_the_site_again_and_again(small, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copytree(small / "runs", tmp_path / "runs")
    done = lnl("report", "--runs-dir", "runs", "--out", "out/results.csv", "--site", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    once = digests(tmp_path / "out")
    assert set(once) == {"results.csv", "leaderboard.md", "compute.html"}
    assert once["results.csv"] == digests(small)["results.csv"]
    assert "(../runs/digits-uneven-" in (tmp_path / "out" / "leaderboard.md").read_text()
    lnl("report", "--runs-dir", "runs", "--out", "out/results.csv", "--site", "out", cwd=tmp_path)
    assert digests(tmp_path / "out") == once


def test_runs_that_are_not_finished_are_passed_over(small, tmp_path):
    shutil.copytree(small / "runs", tmp_path / "runs")
    stopped = open_run(tmp_path / "runs" / "stopped", {"method": "mixup", "seed": 0})
    stopped.set_status("stopped")
    first = next((tmp_path / "runs").glob("digits-uneven-*"))
    (first / "result.json").unlink()
    done = lnl("report", "--runs-dir", "runs", "--out", "results.csv", "--site", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "leaderboard.md").read_text()
    assert text.count("/run.json)") == 23 and first.name not in text


def test_the_site_needs_no_network(small, tmp_path):
    L.write_site(small / "results.csv", small / "runs", tmp_path)
    text = (tmp_path / "compute.html").read_text()
    loads = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[^>]{,80}", text)
    assert loads == [] and text.count('class="plotly-graph-div"') == 4 and "Accuracy against compute" in text


def test_results_of_two_machines_merge_to_the_same_bytes(small, tmp_path):
    rows = [R.result_row(run) for run in R.finished_runs(small / "runs")]
    here, there = rows[:15], rows[9:]
    written = []
    for name, parts in (("one", (here, there)), ("two", (there, here)), ("three", (rows[::-1],))):
        for part in parts: R.merge_results(tmp_path / f"{name}.csv", part)
        written.append(digests(tmp_path)[f"{name}.csv"])
    assert written == [digests(small)["results.csv"]] * 3


def test_files_merge_as_runs_do(small, tmp_path):
    "Rows that were read from another file write the same bytes as the runs themselves."
    table = R.read_results(small / "results.csv", dtype=str, keep_default_na=False)
    R.merge_results(tmp_path / "a.csv", table.iloc[::2].to_dict("records"))
    R.merge_results(tmp_path / "a.csv", table.iloc[1::2].to_dict("records"))
    assert (tmp_path / "a.csv").read_bytes() == (small / "results.csv").read_bytes()


def test_of_a_configuration_measured_twice_the_later_run_stays(small, tmp_path):
    rows = [R.result_row(run) for run in R.finished_runs(small / "runs")]
    again = [row | {"started": f"2027-01-0{i % 3 + 1}T00:00:00+00:00", "last": row["last"] - 0.1,
                    "device": "other"} for i, row in enumerate(rows[:6])]  # fmt: skip
    written = []
    for name, parts in (("one", (rows, again)), ("two", (again, rows)), ("three", (again + rows,))):
        for part in parts: found = R.merge_results(tmp_path / f"{name}.csv", part)
        written.append((tmp_path / f"{name}.csv").read_bytes())
    assert written[0] == written[1] == written[2] and len(found) == len(rows)
    assert (found["device"] == "other").sum() == 6
    kept = found.set_index(R.KEY)["last"]
    for row in again: assert kept[row[R.KEY]] == pytest.approx(row["last"])


def test_two_runs_that_began_in_the_same_second(small, tmp_path):
    row = R.result_row(R.finished_runs(small / "runs")[0])
    twin = row | {"device": "other", "last": 0.123, "seconds": 1.0}
    for name, parts in (("one", (row, twin)), ("two", (twin, row))):
        for part in parts: R.merge_results(tmp_path / f"{name}.csv", [part])
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_a_run_that_is_read_again_replaces_its_row(small, tmp_path):
    row = R.result_row(R.finished_runs(small / "runs")[0])
    for name in ("zz", "aa"): R.merge_results(tmp_path / "r.csv", [row | {"variant": name}])
    assert R.read_results(tmp_path / "r.csv")["variant"].tolist() == ["aa"]


def test_a_file_of_another_version_merges(small, tmp_path):
    "A column that one side lacks is empty there, in whatever order they are merged."
    rows = [R.result_row(run) for run in R.finished_runs(small / "runs")][:4]
    old = [{k: v for k, v in row.items() if k != "peak_bytes"} for row in rows[:2]]
    new = [row | {"zeta": 1, "extra": 2} for row in rows[2:]]
    written = []
    for name, parts in (("one", (old, new)), ("two", (new, old))):
        for part in parts: R.merge_results(tmp_path / f"{name}.csv", part)
        written.append((tmp_path / f"{name}.csv").read_text())
    assert written[0] == written[1] and written[0].splitlines()[0].endswith(",oracle,extra,zeta")


# --- bad input ---


@pytest.mark.parametrize("text, word", [
    ("", "holds no table"), ("\n", "holds no table"), ("configuration,dataset\n", "no column 'noise_type'"),
    ("a,b\n1,2\n", "no column 'configuration'"), ('a,b\n"1,2\n3,4,5\n', "holds no table")])
def test_a_damaged_file_is_refused(text, word, small, tmp_path):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(BadInput, match=word):
        L.write_site(tmp_path / "results.csv", small / "runs", tmp_path / "site")
    row = R.result_row(R.finished_runs(small / "runs")[0])
    with pytest.raises(BadInput, match=word): R.merge_results(tmp_path / "results.csv", [row])
    assert files_below(tmp_path) == ["results.csv"] and (tmp_path / "results.csv").read_text() == text


def test_a_file_without_rows_is_refused(small, tmp_path):
    header = (small / "results.csv").read_text().splitlines()[0]
    (tmp_path / "results.csv").write_text(header + "\n")
    with pytest.raises(BadInput, match="no rows"):
        L.write_site(tmp_path / "results.csv", small / "runs", tmp_path / "site")
    assert files_below(tmp_path) == ["results.csv"]


@pytest.mark.parametrize("column", ["last", "noise_hash", "trusted", "sample_backwards", "oracle"])
def test_a_missing_column_is_named(table, column, reports):
    with pytest.raises(BadInput, match=f"'{column}'"):
        L.with_records(table.drop(columns=["record", "settings", "split", column]), reports / "runs", reports)


def test_what_is_not_there_is_named(table, small, tmp_path):
    here = small / "results.csv"
    for word, call in {
            "'digit'.*Did you mean 'digits'": lambda: L.leaderboard_page(table, dataset="digit"),
            "'data'": lambda: L.leaderboard_page(table, data="digits"),
            "nowhere is no folder": lambda: L.write_site(here, tmp_path / "nowhere", tmp_path / "site"),
            "absent.csv does not exist": lambda: L.write_site(tmp_path / "absent.csv", tmp_path, tmp_path),
            "no rows": lambda: R.merge_results(tmp_path / "r.csv", [])}.items():  # fmt: skip
        with pytest.raises(BadInput, match=word): call()
    assert files_below(tmp_path) == []


def test_the_command_refuses_before_it_writes(small, tmp_path):
    (tmp_path / "results.csv").write_text("")
    done = lnl("report", "--runs-dir", small / "runs", "--out", "results.csv", "--site", "site", cwd=tmp_path)
    refused(done, "results.csv", "holds no table")
    assert files_below(tmp_path) == ["results.csv"]


def test_pairs_are_those_of_the_stored_noise(table):
    "No two runs of one seed and noise differ in their labels."
    some = table[(table["dataset"] == "digits") & (table["noise"] == 0.5)]
    for seed, rows in some.groupby("seed"): assert rows["noise_hash"].nunique() == 1, seed
    assert paired(some[some["method"] == "mixup"], some[some["method"] == "elr"])["unpaired"] == (0, 0)
