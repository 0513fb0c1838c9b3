"Statistics over seeds against hand-worked numbers, scipy and simulation; the rule of verdicts at its edges."

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lnl_bench.data.checks import BadInput
from lnl_bench.repro import results as R
from lnl_bench.repro import statistics as S

RNG = np.random.default_rng(0)


def rows(method, scores, **more):
    "A row for each score, of seed 0, 1, ...; all on the same noises."
    common = dict(dataset="digits", noise_type="symmetric", noise=0.4, trusted=100, train=1197,
                  preset="laptop", variant=np.nan, oracle="none")  # fmt: skip
    return pd.DataFrame([common | dict(method=method, seed=k, noise_hash=f"h{k}", last=s) | more
                         for k, s in enumerate(scores)])  # fmt: skip


# --- summary ---


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_summary_is_scipys(n):
    x = RNG.uniform(0, 1, n)
    found = S.summary(x)
    assert found["mean"] == pytest.approx(100 * sum(x) / n) and found["n"] == n
    assert found["sd"] == pytest.approx(100 * stats.tstd(x))
    low, high = stats.t.interval(0.95, n - 1, loc=100 * x.mean(), scale=100 * stats.sem(x))
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_summary_by_hand():
    "Standard deviation of 1, 2, 3 is 1; Student's 97.5 % quantile with 2 degrees of freedom is 4.302653."
    found = S.summary([0.01, 0.02, 0.03])
    assert found["sd"] == pytest.approx(1) and found["high"] - 2 == pytest.approx(4.302653 / math.sqrt(3))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_coverage(n):
    held = [f["low"] <= 50 <= f["high"] for f in map(S.summary, RNG.normal(0.5, 0.02, (3000, n)))]
    assert abs(np.mean(held) - 0.95) < 0.015


@pytest.mark.parametrize("empty", [[], [None], [math.nan, None], pd.Series([], dtype=float)])
def test_no_score_is_no_number(empty):
    found = S.summary(empty)
    assert found["n"] == 0 and all(math.isnan(found[k]) for k in ("mean", "sd", "low", "high"))


def test_missing_scores_are_left_out_and_counted():
    assert S.summary([0.5, None, 0.7, math.nan]) == S.summary([0.5, 0.7]) and S.summary([0.5, None])["n"] == 1


def test_zero_spread_is_a_point():
    found = S.summary([0.25, 0.25, 0.25])
    assert (found["mean"], found["sd"], found["low"], found["high"]) == (25, 0, 25, 25)


@pytest.mark.parametrize("bad, word", [([91.3], "91.3"), ([0.5, math.inf], "inf"), (["0.5"], "accepted"),
                                       ([-1.5], "-1.5")])  # fmt: skip
def test_summary_refuses(bad, word):
    with pytest.raises(BadInput, match=word): S.summary(bad)


# --- spread ---


def test_spread_counts_each_score_for_itself():
    table = rows("a", [0.5, 0.6, 0.7], best=0.8)
    table.loc[1, "best"] = np.nan
    found = S.spread(table, ("last", "best")).iloc[0]
    assert (found["n"], found["last_n"], found["best_n"]) == (3, 3, 2)
    assert found["last"] == pytest.approx(60) and found["last_sd"] == pytest.approx(10)
    assert found["best_sd"] == 0 and found["best_low"] == found["best_high"] == found["best"]


def test_spread_keeps_groups_apart():
    table = pd.concat([rows("a", [0.5, 0.6]), rows("b", [0.7]), rows("a", [0.1], oracle="noise rate")])
    found = S.spread(table, ("last",))
    assert sorted(zip(found["method"], found["oracle"], found["n"], strict=True)) == [
        ("a", "noise rate", 1), ("a", "none", 2), ("b", "none", 1)]  # fmt: skip


def test_spread_without_rows_or_columns():
    table = rows("a", [0.5])
    assert len(S.spread(table.iloc[:0], ("last",))) == 0 and "last_low" in S.spread(table.iloc[:0], ("last",))
    for wrong in (("lost",), ("best",)):
        with pytest.raises(BadInput, match=f"'{wrong[0]}'"): S.spread(table, wrong)


def test_gains_are_paired_differences(repo):
    "The tables of gains on the reports' pages are the paired comparison, method by method."
    table = R.read_results(repo / "reports" / "results.csv").query("dataset == 'digits' and noise == 0.8")
    plain, compared = table[table["method"] == "cross-entropy"], 0
    for row in R.gains(table, "cross-entropy").to_dict("records"):
        same = table["method"].eq(row["method"]) & table["oracle"].eq(row["oracle"])
        variant = table["variant"].isna() if pd.isna(row["variant"]) else table["variant"].eq(row["variant"])
        found = S.paired(table[same & variant], plain)
        assert found["n"] == row["n"]
        assert (found["mean"], found["sd"]) == pytest.approx((row["gain"], row["gain_sd"]))
        compared += 1
    assert compared > 20


# --- paired ---


def test_paired_is_scipys_paired_t():
    a, b = RNG.uniform(0.5, 0.9, (2, 4))
    found, direct = S.paired(rows("a", a), rows("b", b)), stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((100 * direct.low, 100 * direct.high))
    assert found["pairs"]["difference"].tolist() == pytest.approx(100 * (a - b))
    back = S.paired(rows("b", b), rows("a", a))
    assert back["mean"] == pytest.approx(-found["mean"]) and back["low"] == pytest.approx(-found["high"])


def test_what_a_pair_must_share():
    a, b = rows("a", [0.5, 0.6]), rows("b", [0.7, 0.8])
    assert S.paired(a, b)["n"] == 2
    for column, value in dict(noise_hash="x", trusted=50, train=1, preset="gpu", seed=9, dataset="d",
                              noise_type="human", noise=0.5).items():  # fmt: skip
        changed = b.copy()
        changed.loc[1, column] = value
        found = S.paired(a, changed)
        assert found["n"] == 1 and found["unpaired"] == (1, 1), column
        assert found["mean"] == pytest.approx(-20) and math.isnan(found["low"])


def test_noise_without_a_rate_pairs():
    a, b = (rows(m, [0.5, 0.6], noise_type="human", noise=np.nan) for m in "ab")
    assert S.paired(a, b)["n"] == 2


def test_unpaired_rows_are_told():
    a, b = rows("a", [0.5, 0.6, math.nan]), rows("b", [0.4])
    found = S.paired(a, b)
    assert found["n"] == 1 and found["unpaired"] == (2, 0)
    none = S.paired(a, b.assign(noise_hash="other"))
    assert none["n"] == 0 and none["unpaired"] == (3, 1) and math.isnan(none["mean"])
    assert S.paired(a.iloc[:0], b)["n"] == 0


def test_a_row_with_two_partners_is_refused():
    a = rows("a", [0.5, 0.6])
    with pytest.raises(BadInput, match="seed 0.*accepted: one method, one setting"):
        S.paired(pd.concat([a, a]), rows("b", [0.4]))
    with pytest.raises(BadInput, match="noise_hash"): S.paired(a.drop(columns="noise_hash"), a)


# --- verdicts ---


def slow_verdict(scores, paper, printed):
    "The rule as the page says it, by points of both ranges on a fine grid in place of comparisons of ends."
    scores = [100 * s for s in scores if s is not None and not math.isnan(s)]
    if not scores: return "not measured"
    if len(scores) == 1: return "one seed"
    b = 1.0 if printed is None else max(printed, 0.05)
    half = stats.t.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / math.sqrt(len(scores))
    mid = np.mean(scores) - paper
    inside = [abs(x) <= b + 1e-9 for x in np.linspace(mid - half, mid + half, 2001)]
    if all(inside): return "reproduced"
    return "undecided" if any(inside) else "not reproduced"


def test_verdicts_follow_the_rule():
    seen = []
    for offset, sd, printed in product((0, 0.3, 0.9, 1.5, 4, -4), (0.0, 0.002, 0.01), (None, 0.0, 0.3, 3.0)):
        scores = 0.9 + offset / 100 + sd * np.array([-1, 0, 1])
        found = S.verdict(S.summary(scores), 90.0, printed)
        assert found["verdict"] == slow_verdict(scores, 90.0, printed), (offset, sd, printed)
        seen.append(found["verdict"])
    assert set(seen) == {"reproduced", "not reproduced", "undecided"}


@pytest.mark.parametrize("scores, printed, expected", [
    ([0.91, 0.91, 0.91], None, "reproduced"), ([0.89, 0.89], None, "reproduced"),
    ([0.9101, 0.9101], None, "not reproduced"), ([0.911, 0.911], 1.1, "reproduced"),
    ([0.9], None, "one seed"), ([0.1], None, "one seed"), ([0.9, None], None, "one seed"),
    ([], None, "not measured"), ([math.nan], 0.3, "not measured"), ([0.9, 0.9], math.nan, "reproduced"),
    ([0.9004, 0.9004], 0.0, "reproduced"), ([0.901, 0.901], 0.0, "not reproduced"),
    ([0.8, 1.0], None, "undecided")])  # fmt: skip
def test_edges(scores, printed, expected):
    found = S.verdict(S.summary(scores), 90.0, printed)
    assert found["verdict"] == expected in S.VERDICTS and found["why"]


def test_what_a_verdict_tells():
    found = S.verdict(S.summary([0.90, 0.91, 0.92]), 90.0, 3)
    assert found["difference"] == pytest.approx(1) and (found["band"], found["n"]) == (3, 3)
    assert found["why"] == "+1.0 points, 95 % interval -1.5 to +3.5, 3 seeds; band ±3"
    assert found["verdict"] == "undecided"


def test_a_true_difference_beyond_the_band_is_rarely_called_reproduced():
    "On the edge of the band the interval lies inside in at most 2.5 % of triples."
    for sd in (0.001, 0.004, 0.02):
        draws = RNG.normal(0.91, sd, (2000, 3))
        share = np.mean([S.verdict(S.summary(d), 90.0)["verdict"] == "reproduced" for d in draws])
        assert share <= 0.035, sd
        draws = RNG.normal(0.90, sd, (2000, 3))
        wrong = np.mean([S.verdict(S.summary(d), 90.0)["verdict"] == "not reproduced" for d in draws])
        assert wrong <= 0.06, sd


@pytest.mark.parametrize("paper, printed, word", [
    (math.nan, None, "nan"), (910, None, "910"), (-1, None, "-1"), (90, -0.1, "-0.1"), (90, math.inf, "inf")])
def test_verdict_refuses(paper, printed, word):
    with pytest.raises(BadInput, match=word): S.verdict(S.summary([0.9, 0.91]), paper, printed)
