"The registry of printed numbers: complete, each with one rule, and every command one that exists today."

import functools
import json
import shlex
import subprocess
import sys
from collections import Counter

import pandas as pd
import pytest
import torch
import typer

from lnl_bench.cli import app, pairs
from lnl_bench.data.augment import VIEWS
from lnl_bench.data.checks import BadInput, build, parse
from lnl_bench.data.noise import parse_spec
from lnl_bench.data.sources import from_arrays, known_sources
from lnl_bench.data.task import long_tailed, make_task
from lnl_bench.engine.contract import REGISTRY, parse_settings
from lnl_bench.engine.nets import net_names
from lnl_bench.methods.catalogue import configured
from lnl_bench.methods.cross_entropy import schedule_parts
from lnl_bench.repro import cells as page
from lnl_bench.repro.bench import BENCHES
from lnl_bench.repro.bench_metagrad import MetagradBench
from lnl_bench.repro.papers import paper_index, paper_table

CELLS = page.registry()
COMMANDS = {c["command"]: c for c in CELLS if c["command"]}
TRAININGS = {text: c for text, c in COMMANDS.items() if c["ours"]}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def source(name, each):
    "CIFAR's classes with `each` images of every one, of four pixels."
    names = CIFAR10 if name == "cifar10" else tuple(map(str, range(100)))
    labels = torch.arange(len(names)).repeat_interleave(each)
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    known = dict(mean=(0.5,) * 3, std=(0.2,) * 3, labels_are_true=True)
    return from_arrays(images, labels, names, name=name, **known)


@functools.cache
def data_of(name):
    "A tail has the numbers of CIFAR, from which the trusted images have to come; otherwise fewer will do."
    base, _, factor = name.removesuffix("]").partition("[long-tail:")
    if not factor: return source(name, 600 if name == "cifar10" else 60)
    return long_tailed(source(base, 5000 if base == "cifar10" else 500), int(factor))


@functools.cache
def task_of(data, noise, trusted):
    "The task of a command; semantic noise, which takes a training, is left out."
    plain = "none" if noise.startswith("semantic") else noise
    return make_task(data_of(data), plain, trusted_per_class=trusted or None)


def arguments(command):
    "What the command line reads from a command: the subcommand and its parameters; fails where it refuses."
    program, name, *words = shlex.split(command)
    assert program == "lnl"
    return name, typer.main.get_command(app).commands[name].make_context(name, words).params


def test_every_printed_number_has_one_entry():
    printed = Counter()
    texts = ("dataset", "noise_type", "method", "variant", "metric", "stat")
    for place in paper_index()[["paper", "table"]].to_dict("records"):
        for row in paper_table(**place).dropna(subset="value").to_dict("records"):
            rate = None if pd.isna(row["noise_rate"]) else row["noise_rate"]
            printed[(*place.values(), rate, *(row[k] for k in texts), row["value"])] += 1
    keys = ("paper", "table", "noise_rate", *texts, "value")
    assert printed == Counter(tuple(c[k] for k in keys) for c in CELLS)
    assert printed.total() == 1213 and set(printed.values()) == {1}
    numbered = {(c["paper"], c["table"]) for c in CELLS if c["table"] != "text"}
    assert len(numbered) == 35


def test_an_entry_says_all_that_was_promised():
    wanted = {"paper", "table", "dataset", "noise_type", "noise_rate", "method", "variant", "metric", "stat",
              "value", "command", "preset_measured", "verdict", "why", "source", "certainty", "seeds",
              "statistic"}
    for cell in CELLS:
        assert wanted <= cell.keys()
        assert bool(cell["command"]) != bool(cell["why"])
        assert cell["source"] and cell["noise_source"] and cell["statistic_source"]
        assert page.certainty(cell) in page.CERTAINTIES and cell["verdict"] in page.VERDICTS


def test_every_rule_matches_something():
    rows = [{**c, "noise_rate": "" if c["noise_rate"] is None else f"{c['noise_rate']:g}"} for c in CELLS]
    for name in ("rules", "noise", "statistics"):
        used = {id(page.rule_of(name, row)) for row in rows}
        rules = [rule for paper in page.PAPERS for rule in page._rules_by_paper(name, paper)]
        idle = [rule for rule in rules if id(rule) not in used and rule["paper"] != "*"]
        assert rules and not idle, idle


def test_rules_name_methods_and_settings_that_exist():
    rules = page.cell_rules("rules").to_dict("records")
    for rule in rules:
        assert rule["ours"] or rule["why"] or rule["dataset"] in page.LACKING or only_lacking(rule), rule
        if rule["ours"] in REGISTRY: parse_settings(rule["ours"], page.settings_text(rule["settings"]))
        else: assert rule["ours"] in ("", "bench metagrad"), rule


def only_lacking(rule):
    "Whether all rows of a rule are on datasets without a source."
    places = ("paper", "table", "method", "variant")
    rows = [c for c in CELLS if all(page._fits(rule[k], c[k]) for k in places)]
    return rows and all(c["dataset"] in page.LACKING for c in rows)


def test_rows_that_no_rule_or_two_rules_know_are_refused(monkeypatch):
    row = {k: CELLS[0][k] for k in page.PLACE} | {"noise_rate": "0.2"}
    with pytest.raises(LookupError, match="0 rows of rules.csv"):
        page.rule_of("rules", row | {"method": "gold"})
    twice = page._rules_by_paper("rules", "dmlp") * 2
    monkeypatch.setattr(page, "_rules_by_paper", lambda name, paper: twice)
    with pytest.raises(LookupError, match="2 rows of rules.csv.*cross-entropy"): page.rule_of("rules", row)


NOTES = {"own method": ("own",), "own ablation": ("own", "rerun"), "IEG authors' extension": ("own",),
         "reported from": ("quoted",), "dagger: reported by": ("quoted",), "numbers from": ("quoted",),
         "best result from its own paper": ("quoted",), "reproduced by authors": ("rerun",),
         "run by authors": ("rerun",), "run by IEG authors": ("rerun",), "trained by IEG authors": ("rerun",)}


def test_whose_numbers_agree_with_the_notes_of_the_tables():
    notes = {}
    for place in paper_index()[["paper", "table"]].to_dict("records"):
        for row in paper_table(**place).to_dict("records"):
            rate = None if pd.isna(row["noise_rate"]) else row["noise_rate"]
            key = (*place.values(), rate, *(row[k] for k in page.KEY if k != "noise_rate"))
            notes[key] = row["source_note"]
    said = Counter()
    for cell in CELLS:
        rest = (cell[k] for k in page.KEY if k != "noise_rate")
        key = (cell["paper"], cell["table"], cell["noise_rate"], *rest)
        for words, whose in NOTES.items():
            if words not in notes[key]: continue
            said[words] += 1
            assert cell["whose"] in whose, (words, cell)
    assert said.keys() == NOTES.keys()


def test_own_methods_are_those_of_the_index():
    index = paper_index().set_index(["paper", "table"])["own"]
    for cell in CELLS:
        if cell["whose"] == "own": assert cell["method"] in index[cell["paper"], cell["table"]], cell


def test_nothing_is_said_to_lack_a_source_that_has_one():
    known = {row["name"] for row in known_sources("data")}
    assert {name.partition("[")[0] for name, _ in page.SOURCES.values()} <= known
    assert not known & page.LACKING.keys() and not page.SOURCES.keys() & page.LACKING.keys()
    single = {c["dataset"] for c in CELLS if "+" not in c["dataset"]}
    assert single == page.SOURCES.keys() | page.LACKING.keys()


def test_methods_said_not_to_be_built_are_not():
    missing = [c for c in CELLS if "is not built" in (c["why"] or "") and "network" not in c["why"]]
    for name in {c["method"] for c in missing} - {"mw-net+famus"}: assert name not in REGISTRY, name
    assert not any(name.startswith("densenet") for name in net_names())


@pytest.mark.parametrize("method", sorted({c["ours"]["method"] for c in TRAININGS.values()}))
def test_commands_are_accepted_up_to_the_training(method):
    for command, cell in TRAININGS.items():
        if cell["ours"]["method"] != method: continue
        name, given = arguments(command)
        assert (name, given["method"], given["preset"], given["seed"]) == ("train", method, "paper", 0)
        task = task_of(given["data"], given["noise"], given["trusted"])
        kind, value = parse_spec(given["noise"])
        if kind == "semantic": assert 0 < value[0] < 1 and value[1] in net_names()
        changes = parse_settings(method, pairs(given["settings"], "--set"))
        chosen = configured(method, task, "paper", changes)
        chosen.check(task)
        assert chosen.stages()
        for setting, value in changes.items():
            last = setting.rpartition(".")[2]
            if last in ("view", "policy"): assert value in VIEWS
            if last == "schedule": schedule_parts(value)
        for part in [m.describe() for m in getattr(chosen, "methods", (chosen,))]:
            assert {part.get("net", "cnn9"), part.get("feature_net", "cnn9")} <= set(net_names())


def test_an_entry_is_configured_as_its_command():  # every tenth, and what is long-tailed
    tails = [c for c in TRAININGS.values() if c["noise_type"] == "imbalance"]
    some = list(TRAININGS.values())[::10] + tails[:3]
    for cell in some:
        a = cell["ours"]
        task = task_of(a["data"], a["noise"], a["trusted"])
        settings = parse_settings(a["method"], a["settings"])
        if a["noise"].startswith("semantic"): continue
        wanted = configured(a["method"], task, "paper", settings).describe()
        assert page.configuration(cell).describe() == wanted, cell["command"]


def test_bench_commands_are_accepted():
    benches = [command for command, cell in COMMANDS.items() if not cell["ours"]]
    assert benches
    for command in benches:
        name, given = arguments(command)
        assert name == "bench" and given["name"] in BENCHES
        config = build(MetagradBench, parse(MetagradBench, pairs(given["settings"], "--set")))
        assert set(config.nets.split(",")) <= set(net_names())


def test_a_command_that_does_not_exist_would_be_found():
    with pytest.raises(Exception, match="No such option: --trustd"): arguments("lnl train ieg --trustd 10")
    with pytest.raises(KeyError): arguments("lnl tran ieg")


def test_trusted_images_of_a_tail_without_a_command_cannot_be_drawn():
    for factor in (100, 50):
        tail = data_of(f"cifar100[long-tail:{factor}]")
        smallest = int(torch.bincount(tail.labels).min())
        assert smallest in (5, 10)
        if smallest < 10:
            with pytest.raises(BadInput): make_task(tail, "none", trusted_per_class=10)
        else:  # the rarest class is gone
            assert not (make_task(tail, "none", trusted_per_class=10).given == 99).any()


def test_asymmetric_noise_has_no_matrix_by_rate():
    changes = {"variant": "given", "matrix": "asymmetric:0.4"}
    task = task_of("cifar10", "none", 0)
    with pytest.raises(BadInput, match="not defined by its rate"):
        configured("forward-correction", task, "paper", changes).check(task)


def test_at_least_85_percent_of_what_the_authors_made_is_reached():
    share = page.reach(CELLS)
    assert share.loc["all", "datasets with a source, %"] >= 85
    made = [c for c in CELLS if c["whose"] in ("own", "rerun")]
    assert share.loc["all", "all datasets"] == f"{sum(bool(c['command']) for c in made)} of {len(made)}"
    assert page.table_summary(CELLS)["numbers"].sum() == 1213
    assert page.unreached(CELLS)["numbers"].sum() == sum(c["command"] is None for c in CELLS)


def test_convention_of_each_papers_noise():
    rows = {("dmlp", "cross-entropy", "symmetric"): "symmetric",
            ("dmlp", "co-teaching", "symmetric"): "symmetric-excl",
            ("mlnt", "mlnt-student", "asymmetric"): "asymmetric",
            ("famus", "divide-mix", "symmetric"): "symmetric-excl",
            ("cpc", "cpc", "symmetric"): "symmetric", ("ieg", "ieg", "semantic"): "semantic"}
    for (paper, method, kind), ours in rows.items():
        found = {parse_spec(c["ours"]["noise"])[0] for c in TRAININGS.values()
                 if (c["paper"], c["method"], c["noise_type"]) == (paper, method, kind)}
        assert found == {ours}, (paper, method, kind)


@pytest.mark.parametrize("lasts, said", [
    ([0.928, 0.93, 0.932], "reproduced"), ([0.80, 0.801, 0.802], "not reproduced"),
    ([0.90, 0.93, 0.96], "undecided"), ([0.93], "one seed")])
def test_comparable_runs_are_judged_by_their_interval(lasts, said):
    entry = next(c for c in TRAININGS.values() if c["method"] == "dmlp-naive" and c["statistic"] == "last")
    a, n = entry["ours"] | {}, 10
    entry = entry | {"value": 93.0, "std": None}
    row = {"method": a["method"], "noise_type": "symmetric", "noise": entry["noise_rate"], "variant": "",
           "dataset": a["data"], "preset": "paper", "trusted": a["trusted"] * n}
    rows = [row | {"configuration": str(k), "last": last} for k, last in enumerate(lasts)]
    settings = {str(k): page.configuration(entry).describe() for k in range(len(lasts))}
    assert page.standing(entry, page.measured_rows(pd.DataFrame(rows)), settings)["verdict"] == said


def test_stored_digits_runs_are_named_and_never_comparable(repo):
    file = repo / "reports" / "results.csv"
    found = page.registry(results=file)
    table = pd.read_csv(file)
    measured = [c for c in found if c["preset_measured"]]
    assert measured and {c["measured_on"].partition("[")[0] for c in measured} <= {"digits", "cifar10-jpeg"}
    for cell in measured[::40]:
        kind, rate = page.noise_key(cell["ours"]["noise"])
        rows = table[(table["method"] == cell["ours"]["method"]) & (table["noise_type"] == kind)]
        assert cell["preset_measured"] in set(rows.loc[rows["noise"] == rate, "preset"])
    if not (table["dataset"].isin(["cifar10", "cifar100"])).any():
        assert {c["verdict"] for c in found} == {"not comparable", "not measured"}
    assert {c["verdict"] for c in found if c["command"] is None} == {"not measured"}


def test_refusals(tmp_path):
    with pytest.raises(BadInput, match="Did you mean 'mlnt'"): page.registry("mlmt")
    with pytest.raises(BadInput, match=r"accepted: one that `lnl report` wrote"):
        page.registry(results=tmp_path / "no.csv")


def test_the_command_lists_all_of_it(repo, tmp_path):
    run = [sys.executable, "-m", "lnl_bench", "cells"]
    done = subprocess.run([*run, "--json"], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 1213
    done = subprocess.run([*run, "--paper", "cpc"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "186 printed numbers" in done.stdout and "dmlp" not in done.stdout
