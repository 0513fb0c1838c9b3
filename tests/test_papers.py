"The packaged tables of the papers: complete, equal to their source, and queried without guessing."
import csv
import itertools
import math
from pathlib import Path

import pandas as pd
import pytest

from lnl_bench.data.checks import BadInput
from lnl_bench.repro.papers import KEY, PAPERS, doubts, paper_index, paper_table, paper_value

ASSETS = Path(__file__).resolve().parents[1] / "lnl_bench" / "assets" / "tables"
TABLES = list(paper_index()[["paper", "table"]].itertuples(index=False, name=None))


def raw(paper, table):
    name = f"{paper}_{table}.csv" if table == "text" else f"{paper}_t{table}.csv"
    with open(ASSETS / name, encoding="utf-8", newline="") as f: return list(csv.DictReader(f))


def test_everything_is_there():
    printed = {(p, t): [r["value"] for r in raw(p, t) if r["value"]] for p, t in TABLES}
    assert sum(t != "text" for _, t in TABLES) == 35 and len(TABLES) == 38
    assert sum(map(len, printed.values())) == 1213 == paper_index()["numbers"].sum()
    assert {f.name for f in ASSETS.glob("*.csv")} == {"index.csv", "doubts.csv"} | {
        f"{p}_{t}.csv" if t == "text" else f"{p}_t{t}.csv" for p, t in TABLES}


def test_packaged_tables_are_the_shared_ones(repo):
    shared = repo.parent / "shared" / "tables"
    if not shared.is_dir(): pytest.skip("no tables beside the checkout")
    for file in shared.glob("*.csv"): assert (ASSETS / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(("paper", "table"), TABLES)
def test_numbers_are_the_printed_ones(paper, table):
    rows = raw(paper, table)
    frame = paper_table(paper, table)
    assert frame["printed"].tolist() == [r["value"] for r in rows]
    assert not frame.duplicated(list(KEY)).any()
    for row, (_, found) in zip(rows, frame.iterrows(), strict=True):
        for column in ("noise_rate", "value", "std"):
            wanted = float(row[column]) if row[column] else math.nan
            assert found[column] == wanted or math.isnan(wanted) and math.isnan(found[column])


@pytest.mark.parametrize(("paper", "table"), TABLES)
def test_every_row_has_a_key_of_its_own(paper, table):
    for row in itertools.islice(raw(paper, table), 0, None, 7):
        key = {c: row[c] or None for c in KEY}
        assert paper_value(paper, table, **key) == (float(row["value"]) if row["value"] else None)


def test_what_is_not_known_is_refused():
    cases = [(("dmpl", 1), {}, "Did you mean 'dmlp'"), (("dmlp", 10), {}, "accepted: 1, 2, 3"),
             (("mlnt", "text"), {}, "accepted: 1, 2, 3, 4"),
             (("dmlp", 3), {"methods": "mlnt"}, "Did you mean 'method'"),
             (("dmlp", 3), {"method": "mntl"}, "Did you mean 'mlnt'"),
             (("dmlp", 3), {"noise_rate": 0.5}, "accepted: None"),
             (("dmlp", 3), {"noise_rate": "half"}, "wrong type"), (("dmlp", 3), {}, "fits 16 rows"),
             (("dmlp", 1), {"method": "dmlp-naive", "dataset": "cifar10"},
              "noise_rate = 0.2, 0.5, 0.8, 0.9; stat = 'best', 'last'")]
    for place, key, message in cases:
        with pytest.raises(BadInput) as error: paper_value(*place, **key)
        assert message in str(error.value), (place, key)
    with pytest.raises(BadInput, match="famus"): doubts("famuz")


def test_tables_cannot_be_spoilt_by_a_reader():
    table = paper_table("dmlp", 1)
    table["value"] = 0.0
    assert paper_table("dmlp", 1)["value"].min() > 0
    assert pd.api.types.is_float_dtype(paper_table("mlnt", 4)["noise_rate"])


def test_doubts_name_what_exists():
    listed = set(doubts()[["paper", "table"]].itertuples(index=False, name=None))
    assert listed <= set(TABLES) | {(p, "figures") for p in PAPERS}
    assert set(doubts()["number"]) == set(range(1, 27))
    assert doubts("ieg", "text")["number"].tolist() == [18, 19] and doubts("mlnt", 3).empty
