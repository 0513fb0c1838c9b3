"Means and bands over seeds against numbers computed directly from the runs."

import numpy as np
import pytest

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.runs import open_run
from lnl_bench.views.seeds import over_seeds, seeds_figure


def made(path, values, stages=("train",)):
    run = open_run(path, {"path": path.name}, {"stages": list(stages)})
    for stage, epoch, value in values:
        run.metrics.append({"stage": stage, "epoch": epoch} | ({} if value is None else {"auc": value}))
    return run


@pytest.fixture
def runs(tmp_path):
    values = np.random.default_rng(0).random((3, 5))
    return values, [made(tmp_path / str(i), [("train", e, v) for e, v in enumerate(row)])
                    for i, row in enumerate(values)]


def test_lines_and_bands_are_mean_and_deviation(runs):
    values, runs = runs
    band, line = seeds_figure({"a": runs}, "auc", "Title", "AUC").data
    assert np.allclose(line.y, values.mean(0)) and list(line.x) == [1, 2, 3, 4, 5]
    low, high = values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1)
    assert np.allclose(band.y, [*low, *high[::-1]])
    assert np.allclose(line.customdata[:, 1], 3)


def test_gaps_and_numbers_that_are_none_are_left_out(tmp_path):
    rows = {"a": (None, 0.5, float("nan")), "b": (None, 0.7, 0.9)}
    places = (("warm", 0), ("train", 0), ("train", 1))
    a, b = (made(tmp_path / k, [(*p, v) for p, v in zip(places, values, strict=True)], ("warm", "train"))
            for k, values in rows.items())
    table = over_seeds([a, b], "auc")
    assert table["epoch"].tolist() == [2, 3] and table["n"].tolist() == [2, 1]
    assert np.allclose(table["mean"], [0.6, 0.9]) and np.isnan(table["sd"][1])


def test_one_run_has_no_band(runs):
    figure = seeds_figure({"a": runs[1][:1], "b": runs[1]}, "auc", "Title", "AUC")
    assert [t.name for t in figure.data] == ["a", None, "b"]
    assert "a: 1, b: 3" in figure.layout.title.subtitle.text


def test_many_groups_differ_in_colour_or_dash(runs):
    figure = seeds_figure({str(i): runs[1][:1] for i in range(12)}, "auc", "Title", "AUC")
    assert len({(t.line.color, t.line.dash) for t in figure.data}) == 12


def test_what_cannot_be_drawn_is_refused(runs):
    with pytest.raises(BadInput, match="name -> runs"): seeds_figure({"a": []}, "auc", "", "")
    with pytest.raises(BadInput, match="no loss to show"): seeds_figure({"a": runs[1]}, "loss", "", "")
