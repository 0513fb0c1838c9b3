"Noise generators against their definitions, specifications, and the saved artefact."
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from lnl_bench.data import noise as ln
from lnl_bench.data.checks import BadInput
from lnl_bench.data.sources import digits

SOURCE = digits()
LABELS, C, N = SOURCE.labels, 10, 1297
MANY = torch.arange(10).repeat(5000)[torch.randperm(50_000, generator=torch.Generator().manual_seed(0))]
RATES = (0.0, 0.1, 0.2, 0.4, 0.45, 0.5, 0.8, 0.9, 1.0)
SIMPLE = {"symmetric": ln.symmetric, "symmetric-excl": ln.symmetric_excl, "pair-flip": ln.pair_flip,
          "asymmetric-block": ln.asymmetric_block,
          "asymmetric": lambda *a: ln.asymmetric(*a, dataset="cifar10")}
# The coarse label of each fine class as CIFAR-100's own files give it, apart from the names in the library.
COARSE = [4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11,
          6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5,
          5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
          10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13,
          16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13]


def wrong(given, true=LABELS): return int((given != true).sum())


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", SIMPLE)
def test_realised_matrix_is_the_definition(kind, rate):
    T = ln.definition(kind, rate, C, "cifar10")
    seen = ln.transition_matrix(MANY, SIMPLE[kind](MANY, rate, C, 7), C)
    assert ((seen - T).abs() <= 5 * (T * (1 - T) / 5000).sqrt() + 1e-9).all()
    assert T.sum(1).tolist() == pytest.approx([1] * C) == seen.sum(1).tolist()


@pytest.mark.parametrize("rate", RATES)
def test_symmetric_excl_makes_exactly_the_redrawn_labels_wrong(rate):
    for labels in (LABELS, MANY):
        expected = math.floor(rate * len(labels) + 1e-9)
        assert wrong(ln.symmetric_excl(labels, rate, C, 3), labels) == expected


@pytest.mark.parametrize("rate", RATES)
def test_symmetric_keeps_one_in_c_of_the_redrawn_labels(rate):
    p, redrawn = 9 / 10, int(rate * len(MANY))
    count = wrong(ln.symmetric(MANY, rate, C, 3), MANY)
    assert count <= redrawn and abs(count - p * redrawn) <= 5 * math.sqrt(redrawn * p * (1 - p))


def test_symmetric_draws_every_class_also_the_last():
    given = ln.symmetric(torch.zeros(5000, dtype=torch.int64), 1.0, C, 0)
    assert (torch.bincount(given, minlength=C) > 5000 / C - 5 * math.sqrt(5000 * 0.09)).all()


def test_ninety_percent_without_the_true_class_holds_no_information():
    assert ln.definition("symmetric-excl", 0.9, 10).flatten().tolist() == pytest.approx([0.1] * 100)
    assert ln.definition("symmetric", 0.9, 10).diagonal().tolist() == pytest.approx([0.19] * 10)


@pytest.mark.parametrize("rate", RATES)
def test_asymmetric_flips_exactly_round_of_each_mapped_class(rate):
    for dataset, lists in ln.SIMILAR.items():
        given = ln.asymmetric(LABELS, rate, C, 0, dataset)
        for c in range(C):
            of_class = given[LABELS == c]
            flipped = of_class[of_class != c]
            assert len(flipped) == (round(rate * len(of_class)) if c in lists else 0)
            assert set(flipped.tolist()) <= set(lists.get(c, []))


def test_cifar10_map_is_the_one_all_papers_use():
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    pairs = {(names[a], names[b]) for a, (b,) in ln.SIMILAR["cifar10"].items()}
    others = {("truck", "automobile"), ("bird", "airplane"), ("deer", "horse")}
    assert pairs == others | {("cat", "dog"), ("dog", "cat")}


def test_superclasses_agree_with_the_coarse_labels_of_cifar100():
    assert ln.fine_to_coarse() == COARSE
    assert list(ln.SUPERCLASSES) == sorted(ln.SUPERCLASSES)
    names = [fine for group in ln.SUPERCLASSES.values() for fine in group.split()]
    assert len(names) == len(set(names)) == 100


def test_cifar100_asymmetric_stays_in_the_superclass_and_reaches_all_four_others():
    true = torch.arange(100).repeat(500)
    given = ln.asymmetric(true, 0.4, 100, 0, "cifar100")
    coarse = torch.tensor(COARSE)
    assert torch.equal(coarse[given], coarse[true])
    T = ln.transition_matrix(true, given, 100)
    assert ((T > 0).sum(1) == 5).all() and T.diagonal().tolist() == pytest.approx([0.6] * 100)


def test_asymmetric_block_is_not_the_superclass_noise():
    true = torch.arange(100).repeat(50)
    given = ln.asymmetric_block(true, 0.4, 100, 0)
    coarse = torch.tensor(COARSE)
    assert torch.equal(given // 5, true // 5) and not torch.equal(coarse[given], coarse[true])
    with pytest.raises(BadInput, match="12 .*multiple of 5"): ln.asymmetric_block(LABELS, 0.4, 12, 0)


def test_pair_flip_is_cyclic():
    given = ln.pair_flip(LABELS, 1.0, C, 0)
    assert torch.equal(given, (LABELS + 1) % C)


GENERATORS = SIMPLE | {
    "matrix": lambda y, r, c, s: ln.from_matrix(y, ln.definition("symmetric", r, c), c, s),
    "instance": lambda y, r, c, s: ln.instance_dependent(y, r, c, s, SOURCE.images)}


@pytest.mark.parametrize("kind", GENERATORS)
def test_equal_seeds_give_equal_bits_and_different_seeds_do_not(kind):
    make, before = GENERATORS[kind], LABELS.clone()
    assert torch.equal(make(LABELS, 0.4, C, 5), make(LABELS, 0.4, C, 5))
    assert not torch.equal(make(LABELS, 0.4, C, 5), make(LABELS, 0.4, C, 6))
    assert torch.equal(LABELS, before)


@pytest.mark.parametrize("kind", GENERATORS)
def test_rate_zero_changes_nothing_and_bad_rates_are_refused(kind):
    assert torch.equal(GENERATORS[kind](LABELS, 0.0, C, 1), LABELS)
    assert GENERATORS[kind](LABELS, 1.0, C, 1).shape == (N,)
    if kind != "matrix":
        for rate in (-0.1, 1.1, math.nan):
            with pytest.raises(BadInput, match="from 0 to 1"): GENERATORS[kind](LABELS, rate, C, 1)


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(0), np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = ln.make_noise("instance:0.4", LABELS, C, 0, source=SOURCE).identity["hash"]
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    torch.manual_seed(99), np.random.seed(99)
    assert ln.make_noise("instance:0.4", LABELS, C, 0, source=SOURCE).identity["hash"] == first


@pytest.mark.parametrize("kind, expected", [
    ("symmetric", [2, 6, 8, 3, 2, 7, 6, 1, 4, 9, 9, 1, 2, 3, 4, 5, 9, 7, 0, 9]),
    ("symmetric-excl", [3, 7, 0, 3, 7, 2, 6, 9, 2, 9, 9, 1, 2, 3, 4, 5, 5, 7, 9, 9]),
    ("pair-flip", [0, 2, 2, 3, 5, 5, 7, 8, 9, 9, 1, 1, 3, 4, 4, 6, 6, 7, 8, 0])])
def test_published_noise_stays_what_it_is(kind, expected):
    "A change of these numbers makes every seed mean other noise: results would no longer belong together."
    assert SIMPLE[kind](torch.arange(10).repeat(2), 0.5, 10, 0).tolist() == expected


def test_instance_probabilities_against_a_slow_loop():
    rng = np.random.default_rng(0)
    x, W, q = rng.standard_normal((4, 6)), rng.standard_normal((6, 3)), np.array([0.1, 0.4, 0.9, 0.0])
    P = ln.instance_probabilities(torch.from_numpy(x), torch.from_numpy(W), 1, torch.from_numpy(q)).numpy()
    for i in range(4):
        weight = [0 if j == 1 else math.exp(sum(x[i, k] * W[k, j] for k in range(6))) for j in range(3)]
        expected = [1 - q[i] if j == 1 else q[i] * weight[j] / sum(weight) for j in range(3)]
        assert P[i] == pytest.approx(expected)


def test_instance_noise_does_not_depend_on_how_it_is_blocked():
    pixels = SOURCE.images.take(torch.arange(N))
    once = ln.instance_dependent(LABELS, 0.4, C, 0, pixels)
    assert torch.equal(once, ln.instance_dependent(LABELS, 0.4, C, 0, SOURCE.images))
    assert torch.equal(once, ln.instance_dependent(LABELS, 0.4, C, 0, pixels.flatten(1).float()))
    with pytest.raises(BadInput, match="10 images for 1297 labels"):
        ln.instance_dependent(LABELS, 0.4, C, 0, pixels[:10])


def test_labels_that_are_no_classes_are_refused():
    for bad, text in (([0, -1], "-1 is not a class"), ([10], "10 is not a class"), ([0.5], "whole number"),
                      ([[0, 1]], "whole number"), ([True], "whole number")):
        with pytest.raises(BadInput, match=text): ln.checked_labels(torch.tensor(bad), C)
    with pytest.raises(BadInput, match="num_classes = 1"): ln.checked_labels([0], 1)


@pytest.mark.parametrize("spec, text", [
    ("symetric:0.4", "Did you mean 'symmetric'"), ("flip2:0.4", "what MW-Net call so is 'matrix'"),
    ("symmetric", "accepted: symmetric:RATE"), ("symmetric:", "accepted: symmetric:RATE"),
    ("symmetric:x", "has no rate"),
    ("symmetric:-0.1", "from 0 to 1"), ("symmetric:1.01", "from 0 to 1"), ("symmetric:nan", "from 0 to 1"),
    ("symmetric:inf", "from 0 to 1"), ("none:0.2", "accepted: 'none'"), ("human", "accepted: human:COLUMN"),
    ("matrix", "accepted: matrix:FILE"), ("", "accepted: none"), ("0.4", "accepted: none")])
def test_bad_specs_are_refused_with_what_is_accepted(spec, text):
    with pytest.raises(BadInput) as refusal: ln.parse_spec(spec)
    message = str(refusal.value)
    assert text in message and (spec.split(":")[0] in message or "noise rate" in message)


def test_every_alias_leads_to_a_kind():
    for row in ln.aliases(): assert row["ours"].split(":")[0] in ln.KINDS and row["who"]
    assert {row["ours"] for row in ln.aliases("symmetric")} == {"symmetric", "symmetric-excl"}
    assert ln.aliases("PairFlip")[0]["ours"] == "pair-flip" and ln.aliases("no such name") == []


def test_asymmetric_without_a_map_says_what_is_accepted():
    with pytest.raises(BadInput, match="'pets'.*cifar10, cifar100, digits.*pair-flip:RATE.*matrix:FILE.csv"):
        ln.make_noise("asymmetric:0.4", LABELS, C, 0, dataset="pets")
    with pytest.raises(BadInput, match="with 7 classes"): ln.similar_classes("cifar10", 7)
    assert ln.similar_classes("cifar10-jpeg[5000]", 10) == ln.similar_classes("cifar10", 10)


@pytest.mark.filterwarnings("ignore:loadtxt")
def test_matrix_files(tmp_path):
    T, file = ln.flip_matrix(C, 0.4, 2, seed=0), tmp_path / "t.csv"
    np.savetxt(file, T.numpy(), delimiter=",")
    noise = ln.make_noise(f"matrix:{file}", MANY, C, 0)
    seen = torch.tensor(noise.identity["matrix"])
    assert ((seen - T).abs() <= 5 * (T * (1 - T) / 5000).sqrt() + 1e-9).all()
    assert noise.spec == "matrix:t.csv" and noise.identity["nominal"] == pytest.approx(0.4)
    assert str(tmp_path) not in json.dumps(noise.identity)
    for text in ("a,b\nc,d", "0.5,0.6\n0,1", "1,0,0\n0,1,0", "nan,1\n0,1", "2,-1\n0,1", ""):
        file.write_text(text)
        with pytest.raises(BadInput, match="accepted"): ln.read_matrix(file, 2)
    with pytest.raises(BadInput, match="missing.csv"): ln.read_matrix(tmp_path / "missing.csv", 2)


def test_human_labels_come_from_a_file(tmp_path):
    given, file = ln.pair_flip(LABELS, 0.3, C, 1), tmp_path / "human.csv"
    rows = [f"{i},{a},{b}" for i, (a, b) in enumerate(zip(LABELS.tolist(), given.tolist(), strict=True))]
    file.write_text("\n".join(["index,clean,worse", *rows]))
    noise = ln.make_noise("human:worse", LABELS, C, 0, human_csv=file, source=SOURCE)
    assert torch.equal(noise.labels, given)
    assert noise.identity["nominal"] is None and noise.spec == "human:worse"
    assert "human labels: worse: realised 0.30" in repr(noise)
    with pytest.raises(BadInput, match="human_csv"): ln.make_noise("human:worse", LABELS, C, 0, source=SOURCE)
    with pytest.raises(BadInput, match="'best'"):
        ln.make_noise("human:best", LABELS, C, 0, human_csv=file, source=SOURCE)


@pytest.mark.parametrize("spec", ["none", "symmetric:0.4", "symmetric-excl:0.4", "asymmetric:0.4",
                                  "asymmetric-block:0.4", "pair-flip:0.4", "instance:0.4"])
def test_the_identity_says_what_was_made(spec, tmp_path):
    noise = ln.make_noise(spec, LABELS, C, 11, source=SOURCE)
    identity = noise.identity
    assert (noise.spec, identity["seed"], identity["size"], identity["num_classes"]) == (spec, 11, N, C)
    assert identity["realised"] == wrong(noise.labels) / N
    assert identity["matrix"] == ln.transition_matrix(LABELS, noise.labels, C).tolist()
    assert identity["convention"] in repr(noise)
    assert f"{wrong(noise.labels):,} of 1,297 labels wrong" in repr(noise)
    assert identity["convention"] in noise._repr_markdown_()
    json.dumps(identity, allow_nan=False)
    loaded = ln.Noise.load(noise.save(tmp_path / "n.npz"), true=LABELS)
    assert torch.equal(loaded.labels, noise.labels) and loaded.labels.dtype == torch.int64
    assert loaded.identity == identity


def test_the_hash_tells_noises_apart():
    specs = ["none", "symmetric:0.4", "symmetric:0.5", "symmetric-excl:0.4", "pair-flip:0.4"]
    hashes = {ln.make_noise(spec, LABELS, C, seed).identity["hash"] for spec in specs for seed in (0, 1)}
    assert len(hashes) == 10
    assert ln.make_noise("symmetric:0.4", LABELS, C, 0).identity["hash"] in hashes


def test_a_tampered_file_is_refused(tmp_path):
    noise, file = ln.make_noise("symmetric:0.4", LABELS, C, 0), tmp_path / "n.npz"
    changed = noise.labels.clone()
    changed[0] = (changed[0] + 1) % C
    for bad in (dataclasses.replace(noise, labels=changed),
                dataclasses.replace(noise, identity=noise.identity | dict(seed=1)),
                dataclasses.replace(noise, identity=noise.identity | dict(realised=0.4)),
                dataclasses.replace(noise, labels=noise.labels.int())):
        bad.save(file)
        with pytest.raises(BadInput, match="hash does not match"): ln.Noise.load(file)


def test_a_file_for_other_labels_is_refused(tmp_path):
    file = ln.make_noise("symmetric:0.4", LABELS, C, 0).save(tmp_path / "n.npz")
    with pytest.raises(BadInput, match="claimed share of wrong"): ln.Noise.load(file, true=LABELS.flip(0))
    with pytest.raises(BadInput, match="accepted: one each"): ln.Noise.load(file, true=LABELS[:-1])


def test_files_that_are_no_noise_are_refused(tmp_path):
    file, noise = tmp_path / "n.npz", ln.make_noise("none", LABELS, C, 0)
    for content in (b"", b"PK\x03\x04 nothing", b"labels"):
        file.write_bytes(content)
        with pytest.raises(BadInput, match="cannot be read"): ln.Noise.load(file)
    np.savez(file, labels=np.array([{"a": 1}], dtype=object), identity=np.array("{}"))  # would need a pickle
    with pytest.raises(BadInput, match="cannot be read"): ln.Noise.load(file)
    for identity in ("[]", "{}", "not json"):
        np.savez(file, labels=noise.labels.numpy(), identity=np.array(identity))
        with pytest.raises(BadInput, match="cannot be read"): ln.Noise.load(file)
    whole = noise.save(file).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="cannot be read"): ln.Noise.load(file)
    with pytest.raises(BadInput, match="missing.npz"): ln.Noise.load(tmp_path / "missing.npz")
    with pytest.raises(BadInput, match="ending in .npz"): noise.save(tmp_path / "n.json")


def test_saving_leaves_no_trace_of_a_failure(tmp_path, monkeypatch):
    noise = ln.make_noise("none", LABELS, C, 0)
    noise.save(tmp_path / "n.npz")
    before = (tmp_path / "n.npz").read_bytes()
    monkeypatch.setattr(ln.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): ln.make_noise("symmetric:0.4", LABELS, C, 0).save(tmp_path / "n.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["n.npz"] and (tmp_path / "n.npz").read_bytes() == before


def test_a_claimed_rate_is_verified():
    given = ln.symmetric_excl(LABELS, 0.24, C, 0)
    with pytest.raises(BadInput, match="= 0.400, but 0.240 are wrong"):
        ln.own_labels(given, C, truth=LABELS, claimed=0.4)
    with pytest.raises(BadInput, match="truth"): ln.own_labels(given, C, claimed=0.4)
    assert ln.own_labels(given, C).identity["realised"] is None
    assert ln.own_labels(given, C, truth=LABELS, claimed=0.24).identity["nominal"] == 0.24
