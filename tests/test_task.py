"Tasks: what is in them, what a method may see of them, and what is refused."
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lnl_bench.data import task as lt
from lnl_bench.data.checks import BadInput, fingerprint
from lnl_bench.data.noise import make_noise, own_labels
from lnl_bench.data.sources import FileImages, Source, TensorImages, digits, from_arrays

SOURCE = digits()
N, C = 1297, 10
NOISE = make_noise("symmetric:0.4", SOURCE.labels, C, 0, source=SOURCE)
SUSPECT = dataclasses.replace(SOURCE, labels_are_true=False)


def task(**how): return lt.make_task(SOURCE, NOISE, **how)


def write(path, *rows): path.write_text("\n".join(rows) + "\n"); return path


def test_noise_is_drawn_on_all_samples_and_the_trusted_ones_leave():
    whole, split = task(), task(trusted_per_class=10)
    assert (whole.n, split.n, len(split.trusted_index)) == (N, N - 100, 100)
    assert torch.equal(whole.given, NOISE.labels)
    assert torch.equal(split.given, NOISE.labels[split.train_index])
    assert torch.equal(split.trusted_labels, SOURCE.labels[split.trusted_index])
    assert (split.labels[split.trusted_index] == -1).all() and split.labels.shape == (N,)
    assert sorted(split.train_index.tolist() + split.trusted_index.tolist()) == list(range(N))
    assert torch.equal(lt.truth_of(split), SOURCE.labels[split.train_index])


@pytest.mark.parametrize("how, counts", [(dict(trusted_per_class=7), {7}), (dict(trusted_size=70), {7}),
                                         (dict(trusted_size=0), {0}), (dict(), {0})])
def test_balanced_counts(how, counts):
    assert set(torch.bincount(task(**how).trusted_labels, minlength=C).tolist()) == counts


def test_random_protocol_draws_from_all_samples():
    split = task(trusted_size=200, protocol="random")
    counts = torch.bincount(split.trusted_labels, minlength=C)
    assert counts.sum() == 200 and counts.min() >= 1 and len(set(counts.tolist())) > 1


def test_seeds_of_noise_and_split_are_apart():
    a, b, again = (task(trusted_per_class=10, seed=s) for s in (0, 1, 0))
    assert torch.equal(a.trusted_index, again.trusted_index) and a.identity() == again.identity()
    assert not torch.equal(a.trusted_index, b.trusted_index) and a.noise == b.noise
    assert task(seed=0).identity() == task(seed=1).identity()  # no trusted set: no split to seed
    drawn = lt.make_task(SOURCE, "symmetric:0.4", seed=5)
    assert drawn.noise == make_noise("symmetric:0.4", SOURCE.labels, C, 5, source=SOURCE).identity


def test_the_split_does_not_depend_on_the_noise():
    other = make_noise("pair-flip:0.3", SOURCE.labels, C, 9)
    split = lt.make_task(SOURCE, other, trusted_per_class=10).trusted_index
    assert torch.equal(task(trusted_per_class=10).trusted_index, split)


@pytest.mark.parametrize("how, text", [
    (dict(trusted_per_class=500), "class '0' has 128 samples"), (dict(trusted_size=2000), "class '0'"),
    (dict(trusted_size=2000, protocol="random"), "trusted_size = 2000 .* 0 to 1296"),
    (dict(trusted_size=N, protocol="random"), "0 to 1296"), (dict(trusted_size=105), "multiple of 10"),
    (dict(trusted_size=5, protocol="random"), "class '.' has no trusted sample.*'balanced'"),
    (dict(trusted_size=-10), "trusted_size = -10"), (dict(trusted_per_class=-1), "trusted_size = -10"),
    (dict(trusted_per_class=1, trusted_size=10), "trusted_per_class alone"),
    (dict(trusted_per_class=1, protocol="random"), "trusted_per_class alone"),
    (dict(trusted_size=100, protocol="stratified"), "accepted: balanced, random")])
def test_impossible_trusted_sets_are_refused(how, text):
    with pytest.raises(BadInput, match=text): task(**how)


def test_a_class_with_too_few_samples_is_named():
    labels = np.array([0] * 30 + [1] * 30 + [2] * 3)
    few = from_arrays(np.zeros((63, 4, 4), np.uint8), labels, ["cat", "dog", "okapi"], labels_are_true=True)
    with pytest.raises(BadInput, match="class 'okapi' has 3 samples.*at most 3"):
        lt.make_task(few, "none", trusted_per_class=4)
    assert lt.make_task(few, "none", trusted_per_class=3).n == 54


def test_noise_for_other_labels_is_refused():
    for labels in (SOURCE.labels.flip(0), SOURCE.labels[:100]):
        elsewhere = make_noise("symmetric:0.4", labels, C, 0)
        with pytest.raises(BadInput, match="accepted"): lt.make_task(SOURCE, elsewhere)
    elsewhere = make_noise("none", SOURCE.labels, 11, 0)
    with pytest.raises(BadInput, match="11 classes"): lt.make_task(SOURCE, elsewhere)


def test_suspect_labels_are_used_as_they_are_and_never_trusted():
    plain = lt.make_task(SUSPECT, "none")
    assert lt.truth_of(plain) is None and plain.noise["realised"] is None and plain.noise["kind"] == "own"
    assert "not known" in repr(plain)
    with pytest.raises(BadInput, match="labels_are_true"): lt.make_task(SUSPECT, "symmetric:0.4")
    with pytest.raises(BadInput, match="labels_are_true"): lt.make_task(SUSPECT, NOISE)
    with pytest.raises(BadInput, match="read_trusted_csv"): lt.make_task(SUSPECT, "none", trusted_per_class=1)
    assert lt.make_task(SUSPECT, own_labels(NOISE.labels, C)).n == N


def reachable(thing, seen=None):
    "Everything that attributes, mappings and sequences lead to from `thing`, private names included."
    seen = {} if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, int, float, type(None), torch.device)): return seen
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor): return seen
    parts = [getattr(thing, name) for name in dir(thing) if not name.startswith("__")]
    if isinstance(thing, dict): parts += thing.values()
    if isinstance(thing, (tuple, list)): parts += thing
    for part in parts:
        if not callable(part): reachable(part, seen)
    return seen


@pytest.mark.parametrize("how", [dict(), dict(trusted_per_class=10)])
def test_no_attribute_leads_from_the_visible_part_to_truth_or_test_labels(how):
    whole = task(**how)
    parts = reachable(whole.visible())
    tensors = [t for t in parts.values() if isinstance(t, torch.Tensor)]
    hidden = [whole._truth, lt.truth_of(whole), whole.test_labels]
    assert len(tensors) >= 5
    assert not any(t.shape == h.shape and torch.equal(t.cpu(), h) for t in tensors for h in hidden)
    storages = {h.untyped_storage().data_ptr() for h in (*hidden, SOURCE.labels, whole.labels)}
    assert not storages & {t.untyped_storage().data_ptr() for t in tensors}
    assert not any(isinstance(part, (lt.Task, Source)) for part in parts.values())
    names = {name for part in parts.values() for name in dir(part) if not name.startswith("__")}
    assert not {n for n in names if "truth" in n or "test" in n or n in ("noise", "realised", "ids")}
    assert any(part is whole._truth for part in reachable(whole).values())  # the walk finds what can be found


def test_the_visible_part_has_what_a_method_needs():
    whole = task(trusted_per_class=10)
    seen = whole.visible()
    names = "images labels train_index trusted_index trusted_labels class_names mean std pad flip"
    assert [f.name for f in dataclasses.fields(seen)] == names.split()
    assert (seen.n, seen.num_classes, seen.images) == (whole.n, C, whole.images)
    assert torch.equal(seen.given, whole.given)


def test_writing_into_the_visible_part_changes_nothing():
    whole = task(trusted_per_class=10)
    before, seen = whole.identity(), whole.visible()
    for tensor in (seen.labels, seen.train_index, seen.trusted_index, seen.trusted_labels): tensor.zero_()
    assert whole.identity() == before
    with pytest.raises(dataclasses.FrozenInstanceError): seen.labels = None
    with pytest.raises(dataclasses.FrozenInstanceError): whole.labels = None


@pytest.mark.parametrize("soft", [False, True])
def test_relabel_gives_a_new_task_and_leaves_the_old_one(soft):
    old = task(trusted_per_class=10)
    before, truth = old.identity(), lt.truth_of(old)
    kept = truth.clone()
    labels = torch.eye(C, dtype=torch.float64)[truth] * 0.9 + 0.01 if soft else truth
    new = old.relabel(labels, by="an oracle")
    assert old.identity() == before and new.history == ("an oracle",)
    assert new.labels.shape == (N, C)[: 1 + soft]
    assert new.given.dtype == (torch.float32 if soft else torch.int64)
    assert torch.allclose(new.given, labels.to(new.given.dtype))
    trusted_rows = new.labels[new.trusted_index]
    assert trusted_rows.isnan().all() if soft else (trusted_rows == -1).all()
    labels[:] = 0
    assert not (new.given == 0).all()
    assert new.identity() != before and torch.equal(lt.truth_of(new), kept)
    assert new.relabel(kept, by="again").history == ("an oracle", "again")
    assert "an oracle" in repr(new) and ("soft" in repr(new)) is soft


@pytest.mark.parametrize("bad", [
    torch.zeros(N - 1, dtype=torch.int64), torch.full((N,), C), torch.full((N,), -1), torch.zeros(N),
    torch.zeros(N, dtype=torch.bool), torch.zeros(N, C, dtype=torch.int64), torch.zeros(N, C),
    torch.full((N, C), 0.2), torch.full((N, C), float("nan")), torch.full((N, C), float("inf")),
    torch.full((N, C - 1), 1 / (C - 1)),
    torch.tensor([[2.0, -1.0] + [0.0] * 8]).repeat(N, 1), torch.tensor(1.0), torch.zeros(N, C, 1)])
def test_labels_that_cannot_be_used_are_refused(bad):
    with pytest.raises(BadInput, match="accepted"): task().relabel(bad, by="a mistake")


def test_relabelling_must_say_by_whom():
    for by in ("", None):
        with pytest.raises(BadInput, match="by = "): task().relabel(task().given, by=by)


def test_identity_is_plain_and_tells_tasks_apart():
    base = task(trusted_per_class=10)
    json.dumps(base.identity(), allow_nan=False)
    assert "matrix" not in base.identity()["noise"] and "matrix" in base.noise
    others = [task(), task(trusted_per_class=5), task(trusted_per_class=10, seed=1),
              base.relabel(base.given, by="x"),
              lt.make_task(SOURCE, "symmetric:0.5", trusted_per_class=10), dataclasses.replace(base, pad=2),
              dataclasses.replace(base, name="other"),
              dataclasses.replace(base, test_labels=base.test_labels.flip(0)),
              dataclasses.replace(base, images=TensorImages(SOURCE.images.take(torch.arange(N)).flip(3)))]
    assert len({fingerprint(t.identity()) for t in [base, *others]}) == 1 + len(others)


def test_a_task_says_convention_rate_sizes_and_trusted_set():
    parts = ("digits", "1,197", "500", "10 classes", "true class in the draw: nominal 0.40, realised 0.36",
             "of 1,297 labels wrong", "100 labels, balanced", "split seed 0", "as given")
    for text in (repr(task(trusted_per_class=10)), task(trusted_per_class=10)._repr_markdown_()):
        assert not [part for part in parts if part not in text]


def test_label_files_by_id_path_and_index(tmp_path):
    names = NOISE.labels.tolist()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    for key, of in (("id", SOURCE.ids), ("path", ["./" + i for i in SOURCE.ids]), ("index", range(N))):
        file = write(tmp_path / f"{key}.csv", f"{key},label", *(f"{of[i]},{names[i]}" for i in order))
        assert torch.equal(lt.read_label_csv(file, SOURCE), NOISE.labels)
    file = write(tmp_path / "c.csv", "id,given,corrected", *(f"{SOURCE.ids[i]},0,{names[i]}" for i in order))
    assert torch.equal(lt.read_label_csv(file, SOURCE, column="corrected"), NOISE.labels)


def test_labels_by_class_name_or_number(tmp_path):
    pets = from_arrays(np.zeros((3, 4, 4), np.uint8), [0, 1, 1], ["cat", "dog"])
    named = write(tmp_path / "n.csv", "index,label", "0,dog", "1,cat", "2,dog")
    numbered = write(tmp_path / "m.csv", "index,label", "0,1", "1,0", "2,1")
    assert lt.read_label_csv(named, pets).tolist() == lt.read_label_csv(numbered, pets).tolist() == [1, 0, 1]


@pytest.mark.parametrize("rows, text", [
    (["index,label", "0,cat", "1,dog"], "no label for '2'"),
    (["index,label", "0,cat", "1,dog", "2,dgo"], "'dgo'"),
    (["index,label", "0,cat", "1,dog", "1,dog", "2,cat"], "'1' has several labels"),
    (["index,label", "0,cat", "1,dog", "3,cat"], "'3' is not known"),
    (["index,label", "0,cat", "1,dog", "x,cat"], "'x' is not known"),
    (["label", "cat", "dog", "cat"], "'id', 'path', 'index'"), (["index,class", "0,cat"], "label"),
    (["id,label", "../../etc/passwd,cat"], "is not known"), (["index,label", "0,cat,dog"], "line"),
    ([""], "columns")])
def test_bad_label_files_are_refused(rows, text, tmp_path):
    pets = from_arrays(np.zeros((3, 4, 4), np.uint8), [0, 1, 1], ["cat", "dog"])
    with pytest.raises(BadInput, match=text): lt.read_label_csv(write(tmp_path / "l.csv", *rows), pets)
    with pytest.raises(BadInput, match="cannot be read"): lt.read_label_csv(tmp_path / "missing.csv", pets)
    with pytest.raises(BadInput, match="cannot be read"):
        (tmp_path / "b.csv").write_bytes(b"index,label\n0,\xff\xfe")
        lt.read_label_csv(tmp_path / "b.csv", pets)


def test_a_task_of_ones_own_labels(tmp_path):
    picked = lt.trusted_split(SOURCE, 20, "balanced", 0)
    rows = (f"{i},{SOURCE.labels[i]}" for i in picked.flip(0).tolist())
    trusted = lt.read_trusted_csv(write(tmp_path / "t.csv", "index,label", *rows), SUSPECT)
    assert torch.equal(trusted[0], picked) and torch.equal(trusted[1], SOURCE.labels[picked])
    own = lt.task_from_labels(SUSPECT, NOISE.labels, trusted)
    assert (own.n, len(own.trusted_index), lt.truth_of(own)) == (N - 20, 20, None)
    assert own.split["protocol"] == "own"
    as_mapping = dict(zip(trusted[0].tolist(), trusted[1].tolist(), strict=True))
    assert lt.task_from_labels(SUSPECT, NOISE.labels, as_mapping).identity() == own.identity()
    known = lt.task_from_labels(SUSPECT, NOISE.labels, trusted, truth=SOURCE.labels)
    assert torch.equal(lt.truth_of(known), SOURCE.labels[known.train_index])
    assert known.noise["realised"] == NOISE.identity["realised"]
    for none in (None, {}): assert lt.task_from_labels(SUSPECT, NOISE.labels, none).n == N


@pytest.mark.parametrize("trusted, text", [
    ({N: 0}, "1297 is no sample"), ({-1: 0}, "-1 is no sample"), (([1, 1], [0, 0]), "1 different"),
    ({1: C}, "10 is not a class"),
    (([1, 2], [0]), "2 trusted samples .* 1 labels"), ({1: 0}, "class '1' has no trusted sample"),
    ((torch.arange(N), SOURCE.labels), "fewer than 1297")])
def test_trusted_samples_that_cannot_be_are_refused(trusted, text):
    with pytest.raises(BadInput, match=text): lt.task_from_labels(SUSPECT, NOISE.labels, trusted)


def test_labels_of_another_length_are_refused():
    with pytest.raises(BadInput, match="1296 labels for 1297 images"):
        lt.task_from_labels(SUSPECT, NOISE.labels[1:])
    with pytest.raises(BadInput, match="accepted: one each"):
        lt.task_from_labels(SUSPECT, NOISE.labels, truth=SOURCE.labels[1:])


@pytest.mark.parametrize("n", [10, 11, 300, 1296, N])
def test_subsets_keep_the_shares_and_say_what_they_are(n):
    part = lt.subset(SOURCE, n, seed=0)
    assert part.name == f"digits[{n}]" and len(part.images) == len(part.labels) == len(part.ids) == n
    counts, whole = torch.bincount(part.labels, minlength=C), torch.bincount(SOURCE.labels, minlength=C)
    assert counts.sum() == n and (counts - whole * n / N).abs().max() < 1
    where = torch.tensor([SOURCE.ids.index(i) for i in part.ids])
    assert torch.equal(part.labels, SOURCE.labels[where])
    assert torch.equal(part.images.take(torch.arange(n)), SOURCE.images.take(where))
    assert part.test_images is SOURCE.test_images and len(SOURCE.images) == N
    assert lt.subset(SOURCE, n, seed=0).ids == part.ids


def test_subsets_of_impossible_size_are_refused_and_seeds_differ():
    for n in (0, 9, N + 1, -5):
        with pytest.raises(BadInput, match=f"subset size = {n} .*10 to 1297"): lt.subset(SOURCE, n)
    assert lt.subset(SOURCE, 300, seed=0).ids != lt.subset(SOURCE, 300, seed=1).ids


def test_a_subset_of_files_stays_files(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for i, path in enumerate(paths): Image.fromarray(np.full((6, 6), 20 * i, np.uint8)).save(path)
    images = FileImages(paths, 6, channels=1)
    whole = Source("files", images, torch.arange(12) % 2, None, None, ("a", "b"), tuple(map(str, range(12))),
                   (0.5,), (0.5,))
    part = lt.subset(whole, 6)
    assert isinstance(part.images, FileImages) and part.images.shape == (6, 1, 6, 6)
    where = torch.tensor([int(i) for i in part.ids])
    assert torch.equal(part.images.take(torch.arange(6)), images.take(where))
    plain = lt.make_task(part, "none")
    assert "no test set" in repr(plain) and plain.identity()["test_images"] is None
