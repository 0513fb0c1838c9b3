"""Sources of pictures and labels: what is accepted, what is refused and how, and that the order is right."""
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from lnl_bench.data import sources as S
from lnl_bench.data.checks import BadInput


@pytest.fixture(autouse=True)
def kept_in(tmp_path, monkeypatch):
    monkeypatch.setenv("LNL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def paint(path, value=100, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], value if mode in "L1" else (value,) * len(mode)).save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "pets"
    for name, value in [("cat", 50), ("dog", 150)]:
        for i in range(3): paint(root / name / f"{i}.jpg", value + 10 * i)
    return root


@pytest.fixture
def jpeg_tree(tmp_path):
    "cifar10-jpeg in small: 20 training pictures whose grey value is ten times their index."
    root, rng = tmp_path / "cifar10-jpeg", np.random.default_rng(0)
    clean = rng.permutation(np.arange(20) % 10)
    for i, c in enumerate(clean):
        paint(root / "train" / S.CIFAR10_CLASSES[c] / f"{i:05d}.jpg", 10 * i, (32, 32))
    for c in S.CIFAR10_CLASSES: paint(root / "test" / c / "0000.jpg", 5, (32, 32))
    rows = [f"{i},{c},{(c + 1) % 10}" for i, c in enumerate(clean)]
    (root / "cifar10n.csv").write_text("index,clean,worse\n" + "\n".join(rows) + "\n")
    return root


def refuses(*words):
    "A context that expects `BadInput` whose message holds all `words`."
    class Expect:
        def __enter__(self): pass
        def __exit__(self, kind, error, trace):
            assert kind is not None, "accepted"
            if issubclass(kind, BadInput):
                for word in words: assert word in str(error), (word, str(error))
                return True
    return Expect()


# ---- reading pictures

def test_modes_become_eight_bit_rgb(tmp_path):
    grey16 = np.full((8, 8), 257 * 200, np.uint16)
    Image.fromarray(grey16).save(tmp_path / "deep.png")
    Image.fromarray(grey16).save(tmp_path / "deep.tif")
    modes = [("g.png", 200, "L"), ("b.png", 1, "1"), ("c.jpg", 55, "CMYK"), ("a.png", 200, "RGBA")]
    for file, value, mode in modes: paint(tmp_path / file, value, mode=mode)
    Image.new("P", (8, 8), 3).save(tmp_path / "p.png")
    for file in ("deep.png", "deep.tif", "g.png", "b.png", "c.jpg", "a.png", "p.png"):
        x = S.read_picture(tmp_path / file, (8, 8))
        assert x.shape == (3, 8, 8) and x.dtype == torch.uint8
    for file in ("deep.png", "deep.tif", "g.png", "a.png"):
        assert (S.read_picture(tmp_path / file, (8, 8)) == 200).all()
    cmyk = S.read_picture(tmp_path / "c.jpg", (8, 8)).float().mean()  # every ink at 55 of 255: a light grey
    assert 140 < cmyk < 180
    assert S.read_picture(tmp_path / "deep.png", (8, 8), channels=1).unique().tolist() == [200]


def test_floating_point_and_32_bit_pictures_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.full((4, 4), 10**6, np.int32)).save(tmp_path / "i.tif")
    with refuses("f.tif", "floating point"): S.read_picture(tmp_path / "f.tif", (4, 4))
    with refuses("i.tif", "32 bits"): S.read_picture(tmp_path / "i.tif", (4, 4))


@pytest.mark.parametrize("damage", ["empty", "half", "text"])
def test_a_corrupt_file_is_named(tree, damage):
    file = tree / "dog" / "1.jpg"
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "half": whole[:len(whole) // 2], "text": b"not a picture"}[damage])
    with refuses(str(file), "cannot be read as a picture", *(["0 bytes"] if damage == "empty" else [])):
        S.image_folder(tree)


def test_scaling_crops_the_centre(tmp_path):
    x = np.zeros((40, 100, 3), np.uint8)
    x[:, 30:70] = 255
    Image.fromarray(x).save(tmp_path / "wide.png")
    small = S.read_picture(tmp_path / "wide.png", (10, 10)).float()
    assert small.shape == (3, 10, 10) and small[:, :, 2:-2].min() == 255
    assert S.read_picture(tmp_path / "wide.png", (20, 50)).shape == (3, 20, 50)


def test_file_images_equal_tensor_images(tree):
    paths = sorted(map(str, tree.rglob("*.jpg")))
    files = S.FileImages(paths, 8)
    index = torch.tensor([5, 0, 0])
    memory = S.in_memory(files)
    assert torch.equal(files.take(index), memory.take(index)) and files.digest() == memory.digest()
    assert files.take(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 8, 8)
    assert memory.to("cpu").digest() == memory.digest() and files.to("cpu").take(index).device.type == "cpu"
    for bad in (0, -1, "8", (8,), True, None):
        with refuses("size = "): S.FileImages(paths, bad)
    with refuses("channels = 2"): S.FileImages(paths, 8, channels=2)
    with refuses("fit = 'stretch'"): S.FileImages(paths, 8, fit="stretch")


def test_digest_is_of_shape_and_pixels():
    x = torch.arange(24, dtype=torch.uint8)
    a, b = S.TensorImages(x.reshape(2, 3, 2, 2)), S.TensorImages(x.reshape(2, 1, 4, 3))
    assert a.digest() == hashlib.sha256(b"(2, 3, 2, 2)" + bytes(range(24))).hexdigest() != b.digest()


# ---- digits

def test_digits_never_change():
    a, b = S.digits(), S.digits()
    assert (len(a.images), len(a.test_images)) == (1297, 500)
    assert a.images.digest() == b.images.digest()
    assert a.images.digest() == "045a990b744e3dc326a45380b07a23df319c5cc7a60b60efa9dc0c501e831041"
    assert a.test_images.digest() == "26cf1d5fd0b5d81a767a9ef49c277033ad038e6d9c9ede50cec644755ddf0dbd"
    assert len(set(a.ids)) == 1297 and a.licence.startswith("CC BY 4.0") and a.labels_are_true
    assert (a.pad, a.flip, a.num_classes) == (1, False, 10)


def test_both_representations():
    text, page = repr(S.digits()), S.digits()._repr_html_()
    for word in ("digits", "1,297 training, 500 test", "1 x 8 x 8", "CC BY 4.0", "true"):
        assert word in text and word in page
    assert page.startswith("<table>") and "<table>" not in text


# ---- CIFAR through torchvision, with small files in the place of the real ones

@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    "torchvision's CIFAR10 with four pictures: an archive in `tmp_path/web`, and checksums to match."
    kind, web = torchvision.datasets.CIFAR10, tmp_path / "web"
    web.mkdir()
    x, md5 = np.arange(4 * 3072).reshape(4, 3072) % 256, {}
    names = list(S.CIFAR10_CLASSES)
    with tarfile.open(web / kind.filename, "w:gz") as tar:
        for file, entry in [("data_batch_1", {"data": x.astype(np.uint8), "labels": [3, 1, 0, 9]}),
                            ("test_batch", {"data": x[:2].astype(np.uint8), "labels": [0, 1]}),
                            ("batches.meta", {"label_names": names})]:
            content = pickle.dumps(entry)
            md5[file] = hashlib.md5(content).hexdigest()
            info = tarfile.TarInfo(f"{kind.base_folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((web / kind.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
    return web / kind.filename


def test_cifar_missing_says_where_and_how(small_cifar, tmp_path):
    with refuses("cifar10 is missing", str(tmp_path / "d"), "download=True", "--download", "-python.tar.gz"):
        S.load_source("cifar10", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_cifar_without_a_connection(small_cifar, tmp_path):
    with refuses("could not be fetched", "127.0.0.1:9", "Without a connection"):
        S.load_source("cifar10", tmp_path / "d", download=True)


def test_cifar_from_a_copied_archive_and_altered_files(small_cifar, tmp_path, capsys):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / small_cifar.name).write_bytes(small_cifar.read_bytes())
    source = S.load_source("cifar10", folder)
    assert source.labels.tolist() == [3, 1, 0, 9] and source.images.shape == (4, 3, 32, 32)
    assert source.images.take(torch.tensor([0])).flatten().tolist() == (np.arange(3072) % 256).tolist()
    assert "Krizhevsky" in source.licence and capsys.readouterr().out == ""
    (folder / small_cifar.name).unlink()
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"altered")
    with refuses("cifar10 is incomplete or altered"): S.load_source("cifar10", folder)


def test_cifar_truncated_archive_is_refused(small_cifar, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / small_cifar.name).write_bytes(small_cifar.read_bytes()[:-50])
    with refuses(str(folder / small_cifar.name), "truncated or altered", "MD5"):
        S.load_source("cifar10", folder)
    assert [p.name for p in folder.iterdir()] == [small_cifar.name]


# ---- folders

def test_a_flat_folder(tree):
    source = S.image_folder(tree)
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.ids[:2] == ("cat/0.jpg", "cat/1.jpg") and source.name == "pets"
    assert not source.labels_are_true
    assert (source.pad, source.flip, source.test_images) == (1, True, None)
    means = source.images.take(torch.arange(6)).float().mean((1, 2, 3))
    assert (means - torch.tensor([50, 60, 70, 150, 160, 170])).abs().max() < 2


@pytest.mark.parametrize("held", ["test", "val"])
def test_a_split_folder(tree, tmp_path, held):
    root = tmp_path / "split"
    root.mkdir()
    tree.rename(root / "train")
    paint(root / held / "dog" / "x.png")
    source = S.image_folder(root)
    assert source.test_labels.tolist() == [1] and len(source.images) == 6
    assert source.ids[0] == "train/cat/0.jpg"
    paint(root / held / "cow" / "x.png")
    with refuses("cow", "cat, dog"): S.image_folder(root)
    paint(root / "extra" / "cow" / "x.png")
    with refuses("extra", "test or val"): S.image_folder(root)


def test_an_empty_test_folder_is_refused(tree, tmp_path):
    root = tmp_path / "split"
    (root / "test").mkdir(parents=True)
    tree.rename(root / "train")
    with refuses("test holds no class folders"): S.image_folder(root)


def test_unicode_and_spaces(tmp_path):
    root = tmp_path / "我的 照片"
    for name in ("Bär & Co", "日本 犬"): paint(root / name / "ein Bild, \"neu\".png")
    source = S.image_folder(root)
    assert source.class_names == ("Bär & Co", "日本 犬") and source.name == "我的 照片"
    assert "Bär &amp; Co" in source._repr_html_()


def test_side_files_and_hidden_files(tree):
    for name in ("labels.csv", "README.txt", ".hidden"): (tree / name).touch()
    for name in (".DS_Store", "Thumbs.db"): (tree / "cat" / name).touch()
    (tree / ".git").mkdir()
    assert len(S.image_folder(tree).images) == 6
    (tree / "cat" / "labels.csv").touch()
    with refuses(str(tree / "cat" / "labels.csv"), "is no picture"): S.image_folder(tree)
    (tree / "cat" / "labels.csv").unlink()
    (tree / "cat" / "more").mkdir()
    with refuses(str(tree / "cat" / "more")): S.image_folder(tree)
    (tree / "cat" / "more").rmdir()
    paint(tree / "stray.jpg")
    with refuses("stray.jpg lies outside the class folders"): S.image_folder(tree)


def test_empty_folder_one_class_empty_class_no_folder(tmp_path, tree):
    (tmp_path / "none").mkdir()
    with refuses("none has 0 class folders"): S.image_folder(tmp_path / "none")
    paint(tmp_path / "one" / "cat" / "a.png")
    with refuses("one has 1 class folders", "2 or more"): S.image_folder(tmp_path / "one")
    (tree / "cow").mkdir()
    with refuses("cow holds no pictures"): S.image_folder(tree)
    with refuses("is no folder"): S.image_folder(tmp_path / "nowhere")


def test_links_that_leave_the_folder(tree, tmp_path):
    outside = paint(tmp_path / "secret" / "a.jpg")
    (tree / "cat" / "link.jpg").symlink_to(outside)
    with refuses("link.jpg leads out of", "secret"): S.image_folder(tree)
    (tree / "cat" / "link.jpg").unlink()
    (tree / "cow").symlink_to(outside.parent, target_is_directory=True)
    with refuses("cow leads out of"): S.image_folder(tree)
    (tree / "cow").unlink()
    (tree / "cat" / "same.jpg").symlink_to(tree / "cat" / "0.jpg")  # a link inside the folder is fine
    assert len(S.image_folder(tree).images) == 7
    (tree / "cat" / "broken.jpg").symlink_to(tree / "cat" / "gone.jpg")
    with refuses("broken.jpg is no picture"): S.image_folder(tree)


def test_pictures_of_several_sizes(tree):
    paint(tree / "dog" / "9.jpg", size=(9, 8))
    with refuses("9.jpg has 8 x 9 pixels", "8 x 8", "pass size=S"): S.image_folder(tree)
    assert S.image_folder(tree, size=4).images.shape == (7, 3, 4, 4)
    assert S.load_source(tree, size=6).images.shape == (7, 3, 6, 6)


def test_big_folders_stay_in_files_and_are_checked_first(tree, monkeypatch):
    monkeypatch.setattr(S, "IN_MEMORY", 100)
    small = S.image_folder(tree)
    assert isinstance(small.images, S.FileImages)
    monkeypatch.undo()
    assert S.image_folder(tree).images.digest() == small.images.digest()
    monkeypatch.setattr(S, "IN_MEMORY", 100)
    paint(tree / "dog" / "9.jpg", size=(9, 8))
    with refuses("9.jpg has 8 x 9"): S.image_folder(tree)
    (tree / "dog" / "9.jpg").write_bytes(b"")
    with refuses("9.jpg", "0 bytes"): S.image_folder(tree, size=8)


# ---- the cache

def test_cache_holds_follows_changes_and_survives_damage(tree, kept_in, monkeypatch):
    monkeypatch.setattr(S, "CACHE_FROM", 1)
    decoded = []
    real = S._decode
    monkeypatch.setattr(S, "_decode", lambda images: decoded.append(len(images)) or real(images))
    first = S.image_folder(tree).images.digest()
    assert S.image_folder(tree).images.digest() == first and decoded == [6]
    kept, = (kept_in / "pictures").iterdir()
    paint(tree / "cat" / "0.jpg", 250)
    os.utime(tree / "cat" / "0.jpg", (5, 5))
    second = S.image_folder(tree).images.digest()
    assert second != first and decoded == [6, 6]
    for file in (kept_in / "pictures").iterdir(): file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="damaged"): assert S.image_folder(tree).images.digest() == second
    for file in (kept_in / "pictures").iterdir():
        with open(file, "wb") as out: np.save(out, np.array([{"code": 1}], dtype=object), allow_pickle=True)
    with pytest.warns(UserWarning, match="damaged"): assert S.image_folder(tree).images.digest() == second
    for file in (kept_in / "pictures").iterdir(): np.save(file, np.zeros((1, 2), np.uint8))
    assert S.image_folder(tree).images.digest() == second
    assert all(p.suffix == ".npy" and not p.name.startswith(".") for p in (kept_in / "pictures").iterdir())
    assert sorted(p.name for p in tree.rglob("*.npy")) == []  # nothing lies next to the user's files


def test_a_cache_that_cannot_be_written_costs_a_warning(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(S, "CACHE_FROM", 1)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="are not kept"):
        assert len(S.image_folder(tree, cache_dir=tmp_path / "file").images) == 6


# ---- the CIFAR-10N order

def test_training_pictures_are_in_the_order_of_the_index(jpeg_tree):
    source = S.image_folder(jpeg_tree)
    means = source.images.take(torch.arange(20)).float().mean((1, 2, 3))
    assert (means - 10 * torch.arange(20)).abs().max() < 2
    assert [int(Path(i).stem) for i in source.ids] == list(range(20)) and source.labels_are_true
    assert (source.name, source.pad, source.flip) == ("cifar10-jpeg", 4, True)
    assert source.mean == (0.4914, 0.4822, 0.4465)
    assert "CC BY-NC 4.0" in source.licence and "Krizhevsky" in source.licence
    answers = S.human_labels(jpeg_tree / "cifar10n.csv", "worse", source)
    assert torch.equal(answers, (source.labels + 1) % 10)


def test_a_missing_index_is_refused(jpeg_tree):
    next((jpeg_tree / "train").rglob("00007.jpg")).unlink()
    (jpeg_tree / "train" / "cat").mkdir(exist_ok=True)
    with refuses("picture 7 is missing"): S.image_folder(jpeg_tree)


def test_without_the_csv_it_is_any_folder(jpeg_tree):
    (jpeg_tree / "cifar10n.csv").unlink()
    source = S.image_folder(jpeg_tree, name="mine")
    assert source.name == "mine" and not source.labels_are_true
    assert source.labels.tolist() == sorted(source.labels.tolist())


# ---- human labels

def rewrite(csv, change):
    csv.write_text("\n".join(change(csv.read_text().splitlines())) + "\n")


@pytest.mark.parametrize("change, words", [
    (lambda r: [r[0], *r[:0:-1]], None),  # rows in another order are fine, the index says where they belong
    (lambda r: r[:-1], ("19 rows for 20",)),
    (lambda r: [*r[:-1], r[1]], ("index 0 occurs twice",)),
    (lambda r: [*r[:-1], "99,0,0"], ("index '99'", "0 to 19")),
    (lambda r: [*r[:-1], "x,0,0"], ("index 'x'",)),
    (lambda r: [*r[:-1], r[-1][:-1] + "12"], ("column worse", "'12' is no class")),
    (lambda r: [*r[:-1], r[-1] + ",4"], ("line 21", "not 3 values")),
    (lambda r: ["index,worse", *(",".join(x.split(",")[::2]) for x in r[1:])], ("needed", "clean")),
    (lambda r: [r[0], *(f"{i},{x.split(',', 1)[1]}" for i, x in enumerate(r[2:] + r[1:2]))],
     ("index 0", "the clean label is", "disagree")),
])
def test_human_labels(jpeg_tree, change, words):
    source, csv = S.image_folder(jpeg_tree), jpeg_tree / "cifar10n.csv"
    rewrite(csv, change)
    if words is None: assert torch.equal(S.human_labels(csv, "worse", source), (source.labels + 1) % 10)
    else:
        with refuses("cifar10n.csv", *words): S.human_labels(csv, "worse", source)


def test_human_labels_by_name_and_unknown_column(jpeg_tree):
    source = S.image_folder(jpeg_tree)
    named = [f"{i},{source.class_names[c]},cat" for i, c in enumerate(source.labels.tolist())]
    (jpeg_tree / "n.csv").write_text("\ufeffindex,clean,worse\r\n" + "\r\n".join(named), encoding="utf-8")
    assert set(S.human_labels(jpeg_tree / "n.csv", "worse", source).tolist()) == {3}
    with refuses("column = 'worst'", "Did you mean 'worse'"):
        S.human_labels(jpeg_tree / "n.csv", "worst", source)
    with refuses("gone.csv"): S.human_labels(jpeg_tree / "gone.csv", "worse", source)


# ---- CSV and arrays

def test_csv_in_its_own_order(tree, tmp_path):
    (tree / "my.csv").write_text("label,path,note\n10,dog/1.jpg,\n9,cat/0.jpg,x\n10,dog/0.jpg,\n")
    source = S.load_source(tree / "my.csv")
    assert source.class_names == ("9", "10") and source.labels.tolist() == [1, 0, 1] and source.name == "my"
    assert source.ids == ("dog/1.jpg", "cat/0.jpg", "dog/0.jpg") and not source.labels_are_true
    (tmp_path / "else.csv").write_text((tree / "my.csv").read_text())
    assert S.csv_images(tmp_path / "else.csv", root=tree).images.digest() == source.images.digest()


@pytest.mark.parametrize("text, words", [
    ("path,class\ncat/0.jpg,a\n", ("columns path, class", "needed", "label")),
    ("", ("(none)",)),
    ("path,label,label\ncat/0.jpg,a,b\n", ("once each",)),
    ("path,label\ncat/0.jpg,a\ncat/7.jpg,b\n", ("row 1", "7.jpg is no file")),
    ("path,label\ncat/0.jpg,a\n,b\n", ("row 1", "is no file")),
    ("path,label\ncat/0.jpg,a\ncat,b\n", ("row 1", "is no file")),
    ("path,label\ncat/0.jpg,a\n../secret.jpg,b\n", ("leads out of",)),
    ("path,label\ncat/0.jpg,a\n/etc/hostname,b\n", ("leads out of",)),
    ("path,label\ncat/0.jpg,a\ncat/link.jpg,b\n", ("leads out of",)),
    ("path,label\ncat/0.jpg,a\ncat/../cat/0.jpg,b\n", ("row 1", "row 0 already")),
    ("path,label\ncat/0.jpg,a\ncat/1.jpg,\n", ("row 1", "label is empty")),
    ("path,label\ncat/0.jpg,a\ncat/1.jpg\n", ("line 3", "not 2 values")),
    ("path,label\ncat/0.jpg,a\n", ("names 1 classes",)),
    ("path,label\n", ("names 0 classes",)),
    ("path,label\ncat/0.jpg,\"a\n", ("CSV",)),
])
def test_csv_refusals(tree, text, words):
    paint(tree.parent / "secret.jpg")
    (tree / "cat" / "link.jpg").symlink_to(tree.parent / "secret.jpg")
    (tree / "my.csv").write_text(text)
    with refuses(*words): S.csv_images(tree / "my.csv")


def test_csv_of_another_encoding(tree):
    (tree / "my.csv").write_bytes("path,label\ncat/0.jpg,Bär\n".encode("latin-1"))
    with refuses("my.csv cannot be read"): S.csv_images(tree / "my.csv")


def test_arrays():
    x = np.random.default_rng(0).integers(0, 256, (6, 9, 8, 3), dtype=np.uint8)
    a = S.from_arrays(x, [0, 1, 2] * 2, ["a", "b", "c"], x[:2], torch.tensor([0, 2]), name="mine", flip=False)
    assert a.images.digest() == S.from_arrays(x.transpose(0, 3, 1, 2), [0, 1, 2] * 2).images.digest()
    assert (a.name, a.pad, a.flip, a.test_labels.tolist()) == ("mine", 1, False, [0, 2])
    assert S.from_arrays(x, ["b", "a"] * 3, ["a", "b"]).labels.tolist() == [1, 0] * 3
    assert S.from_arrays(x[..., 0], [0, 1] * 3).images.shape == (6, 1, 9, 8)


@pytest.mark.parametrize("images, labels, more, words", [
    ((6, 8, 8, 3), [0, 1] * 2, {}, ("(4,)", "6 pictures")),
    ((6, 8, 8, 3), [0, 5] * 3, dict(class_names=["a", "b"]), ("label 1 = 5", "0 to 1")),
    ((6, 8, 8, 3), [0, -1] * 3, {}, ("label 1 = -1",)),
    ((6, 8, 8, 3), [0.0, 1.0] * 3, {}, ("float64",)),
    ((6, 8, 8, 3), ["a", "x"] * 3, dict(class_names=["a", "b"]), ("'x' is no class",)),
    ((6, 8, 8, 3), [0] * 6, {}, ("1 class",)),
    ((6, 8, 8, 3), [0, 1] * 3, dict(class_names=["a", "a"]), ("one name",)),
    ((6, 8, 8, 3), [0, 1] * 3, dict(flipp=True), ("'flipp'", "Did you mean 'flip'")),
    ((6, 8, 8, 3), [0, 1] * 3, dict(test_labels=[0]), ("test_images and test_labels",)),
    ((6, 8, 8, 3), [0, 1] * 3, dict(ids=("a",) * 6), ("ids",)),
    ((6, 8, 8, 3), [0, 1] * 3, dict(std=(1, 1, 0)), ("std",)),
    ((6, 8, 8, 4), [0, 1] * 3, {}, ("cannot be used",)),
    ((6, 3, 8, 3), [0, 1] * 3, {}, ("either axis",)),
    ((6, 8), [0, 1] * 3, {}, ("cannot be used",)),
    ((0, 8, 8, 3), np.zeros(0, int), {}, ("0 class",)),
])
def test_array_refusals(images, labels, more, words):
    with refuses(*words): S.from_arrays(np.zeros(images, np.uint8), labels, **more)


def test_array_types_and_test_shape():
    x = np.zeros((4, 8, 8, 3), np.uint8)
    with refuses("float32"): S.from_arrays(x.astype(np.float32), [0, 1] * 2)
    with refuses("test pictures have shape"):
        S.from_arrays(x, [0, 1] * 2, test_images=x[:, :4], test_labels=[0, 1] * 2)


# ---- archives and names

def pack(folder, file):
    with tarfile.open(file, "w:xz") as tar: tar.add(folder, arcname=folder.name)
    return file


def test_the_archive_is_unpacked_once_and_equals_the_folder(jpeg_tree, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    pack(jpeg_tree, data / "cifar10-jpeg.tar.xz")
    assert {r["name"]: r["present"] for r in S.known_sources(data)}["cifar10-jpeg"]
    a = S.load_source("cifar10-jpeg", data)
    assert sorted(p.name for p in data.iterdir()) == ["cifar10-jpeg", "cifar10-jpeg.tar.xz"]
    (data / "cifar10-jpeg.tar.xz").unlink()
    again, direct = S.load_source("cifar10-jpeg", data), S.image_folder(jpeg_tree)
    assert a.images.digest() == again.images.digest() == direct.images.digest()


def test_a_read_only_data_folder_stays_as_it_is(jpeg_tree, tmp_path, kept_in):
    data = tmp_path / "data"
    data.mkdir()
    pack(jpeg_tree, data / "cifar10-jpeg.tar.xz")
    data.chmod(0o555)
    try:
        for _ in range(2): assert len(S.load_source("cifar10-jpeg", data).images) == 20
        assert [p.name for p in data.iterdir()] == ["cifar10-jpeg.tar.xz"]
        assert len(list((kept_in / "unpacked").iterdir())) == 1
    finally: data.chmod(0o755)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_archive_leaves_nothing(jpeg_tree, tmp_path, share):
    data = tmp_path / "data"
    data.mkdir()
    whole = pack(jpeg_tree, data / "cifar10-jpeg.tar.xz").read_bytes()
    (data / "cifar10-jpeg.tar.xz").write_bytes(whole[:int(len(whole) * share)])
    with refuses(str(data / "cifar10-jpeg.tar.xz"), "cannot be unpacked"): S.load_source("cifar10-jpeg", data)
    assert [p.name for p in data.iterdir()] == ["cifar10-jpeg.tar.xz"]


def test_an_unsafe_archive_writes_nothing_outside(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "cifar10-jpeg.tar.xz", "w:xz") as tar:
        info = tarfile.TarInfo("cifar10-jpeg/../../../escaped.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    with refuses("cifar10-jpeg.tar.xz cannot be unpacked"): S.load_source("cifar10-jpeg", data)
    assert not list(tmp_path.rglob("escaped.txt")) and len(list(data.iterdir())) == 1


def test_an_archive_of_something_else(tree, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    pack(tree, data / "cifar10-jpeg.tar.xz")
    with refuses("does not hold exactly one folder named cifar10-jpeg"): S.load_source("cifar10-jpeg", data)


def test_known_sources_and_unknown_names(tmp_path):
    rows = S.known_sources(tmp_path / "nowhere")
    assert [r["name"] for r in rows] == ["digits", "digits-uneven", "cifar10", "cifar100", "cifar10-jpeg"]
    assert [r["present"] for r in rows] == [True, True, False, False, False]
    assert all(set(r) == {"name", "present", "how", "licence"} and r["how"] and r["licence"] for r in rows)
    assert "CC BY-NC 4.0" in rows[4]["licence"] and "Krizhevsky" in rows[2]["licence"]
    with refuses("data = 'digitz'", "Did you mean 'digits'?", "cifar100"): S.load_source("digitz", tmp_path)
    with refuses("size = 4"): S.load_source("digits", tmp_path, size=4)
    with refuses("cifar10-jpeg is missing", str(tmp_path)): S.load_source("cifar10-jpeg", tmp_path)


# ---- the real archive, its first hundred training pictures

def wanted(member):
    name = Path(member.name)
    return member.isfile() and (name.suffix == ".csv" or name.parts[1] == "train" and int(name.stem) < 100)


def test_the_first_hundred_of_the_real_archive(tmp_path, shared_data):
    root, archive = tmp_path / "cifar10-jpeg", shared_data / "cifar10-jpeg.tar.xz"
    if not archive.is_file(): pytest.skip(f"{archive} does not exist")
    with tarfile.open(archive) as tar: tar.extractall(tmp_path, [m for m in tar if wanted(m)])
    for c in S.CIFAR10_CLASSES: paint(root / "test" / c / "0.png", size=(32, 32))
    rewrite(root / "cifar10n.csv", lambda rows: rows[:101])
    source = S.image_folder(root)
    assert source.name == "cifar10-jpeg" and source.images.shape == (100, 3, 32, 32)
    rates = {c: (S.human_labels(root / "cifar10n.csv", c, source) != source.labels).float().mean().item()
             for c in ("clean", "aggre", "worse")}  # the clean column is checked row by row on the way
    assert rates["clean"] == 0 < rates["aggre"] < rates["worse"] < 0.6
