"""Bad input: one clear line, exit status 2, and nothing half-written."""

import errno
import io
import os
import resource
import subprocess
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lnl_bench.cli import main
from lnl_bench.data.checks import BadInput
from lnl_bench.data.noise import make_noise
from lnl_bench.data.sources import digits
from lnl_bench.data.task import make_task, read_label_csv
from lnl_bench.engine import runs
from lnl_bench.engine.train import load_checkpoint, train
from lnl_bench.methods.catalogue import configured
from lnl_bench.methods.cross_entropy import TrainOnLabels


def lnl_process(*arguments, cwd, **options):
    "The command in a process of its own, as a user runs it."
    command = [sys.executable, "-m", "lnl_bench", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 120, **options}
    return subprocess.run(command, cwd=cwd, **options)


def lnl(*arguments, cwd):
    "The same entry point in this process: no seconds for starting Python and torch at each of many refusals."
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["lnl", *map(str, arguments)])
        try: main()
        except SystemExit as e: code = e.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def refused(done, *words):
    "Exit status 2, one line that holds all `words`, no traceback."
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words: assert word in last, (word, last)


def files_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def pictures(tmp_path):
    "Two classes of six small pictures each, as sub-folders, with trusted.csv naming two of each."
    draw = np.random.default_rng(0)
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            pixels = draw.integers(0, 120, (16, 16, 3), dtype=np.uint8) + np.uint8(100 * c)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    rows = [(f"{name}/{i}.png", name) for name in ("cat", "dog") for i in (0, 1)]
    pd.DataFrame(rows, columns=["path", "label"]).to_csv(tmp_path / "trusted.csv", index=False)
    return tmp_path


PURIFY = ("purify", "linear-probe", "--images", "pictures", "--out", "out.csv", "--trusted", "trusted.csv",
          "--set", "representation=pixels")  # fmt: skip


def test_purify_works_on_the_good_folder(pictures):
    done = lnl(*PURIFY, cwd=pictures)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(pictures / "out.csv")
    assert len(table) == 8 and set(table["corrected"]) <= {"cat", "dog"}


@pytest.mark.parametrize("arguments, words", [
    (("train", "dmpl"), ("'dmpl'", "Did you mean 'dmlp'?")),
    (("train", "cross-entropy", "--noise", "symmetric:1.7"), ("1.7", "0 to 1")),
    (("train", "cross-entropy", "--noise", "symmetric:-0.1"), ("-0.1", "0 to 1")),
    (("train", "cross-entropy", "--noise", "symetric:0.4"), ("symetric", "symmetric")),
    (("train", "cross-entropy", "--set", "epocs=3"), ("'epocs'", "'epochs'")),
    (("train", "cross-entropy", "--set", "epochs=three"), ("'three'", "int")),
    (("train", "cross-entropy", "--set", "epochs=0"), ("epochs = 0", "1 to")),
    (("train", "cross-entropy", "--preset", "fast"), ("'fast'", "laptop")),
    (("train", "cross-entropy", "--data", "cifar10"), ("cifar10", "--download")),
    (("train", "cross-entropy", "--data", "no-such-folder"), ("no-such-folder", "digits")),
    (("train", "cross-entropy", "--data", "digits[5]"), ("5",)),
    (("train", "cross-entropy", "--data", "digits[many]"), ("digits[many]",)),
    (("train", "cross-entropy", "--device", "cuda:99"), ("cuda:99", "cpu")),
    (("train", "dmlp", "--trusted", "0"), ("dmlp", "trusted")),
    (("train", "dmlp", "--trusted", "500"), ("500", "at most 126")),
    (("repro", "dmlp", "-p", "nosie", "0.9"), ("'nosie'", "'noise'")),
    (("repro", "dmlp", "-p", "noise", "1.7"), ("1.7", "0 to 1")),
    (("repro", "dmlp", "-p", "noise", "abc"), ("'abc'", "float")),
    (("repro", "dmlp", "-p", "epochs", "2.5"), ("'2.5'", "int")),
    (("repro", "dmlp", "-p", "noise"), ("-p", "VALUE")),
    (("repro", "dlmp"), ("'dlmp'", "dmlp")),
    (("bench", "purfy"), ("'purfy'", "purify")),
    (("report", "--runs-dir", "nowhere"), ("nowhere",)),
])  # fmt: skip
def test_refused_before_any_work(arguments, words, tmp_path):
    refused(lnl(*arguments, cwd=tmp_path), *words)
    assert files_below(tmp_path) == []


def test_the_same_in_a_process_of_its_own(tmp_path):
    done = lnl_process("repro", "dmlp", "-p", "nosie", "0.9", cwd=tmp_path)
    refused(done, "'nosie'", "Did you mean 'noise'?")
    assert files_below(tmp_path) == []


def test_truncated_archive(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        payload = os.urandom(50_000)
        info = tarfile.TarInfo("cifar10-jpeg/train/cat/00000.jpg")
        info.size = len(payload)
        tar.addfile(info, io.BytesIO(payload))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar10-jpeg.tar.xz").write_bytes(buffer.getvalue()[:20_000])
    refused(lnl("train", "cross-entropy", "--data", "cifar10-jpeg", cwd=tmp_path), "cifar10-jpeg.tar.xz")
    assert files_below(tmp_path) == ["data/cifar10-jpeg.tar.xz"]


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_corrupt_image(pictures, damage):
    path = pictures / "pictures" / "dog" / "3.png"
    path.write_bytes({"cut": path.read_bytes()[:60], "empty": b"", "text": b"not a picture"}[damage])
    before = files_below(pictures)
    refused(lnl(*PURIFY, cwd=pictures), "dog/3.png")
    assert files_below(pictures) == before


def test_label_csv_with_an_unknown_class_in_trusted(pictures):
    (pictures / "trusted.csv").write_text("path,label\ncat/0.png,cat\ndog/0.png,wolf\n")
    before = files_below(pictures)
    refused(lnl(*PURIFY, cwd=pictures), "'wolf'", "cat")
    assert files_below(pictures) == before


def test_label_csv_with_a_missing_file(pictures):
    (pictures / "labels.csv").write_text("path,label\ncat/0.png,cat\ndog/77.png,dog\n")
    refused(lnl(*PURIFY, "--labels", "labels.csv", cwd=pictures), "dog/77.png")


def test_label_csv_with_a_missing_index(tmp_path):
    source = digits()
    labels = [source.class_names[c] for c in source.labels[:1000].tolist()]
    pd.DataFrame({"index": range(1000), "label": labels}).to_csv(tmp_path / "l.csv", index=False)
    with pytest.raises(BadInput, match=r"no label for .*297"): read_label_csv(tmp_path / "l.csv", source)


def test_class_without_trusted_sample(pictures):
    (pictures / "trusted.csv").write_text("path,label\ncat/0.png,cat\ncat/1.png,cat\n")
    before = files_below(pictures)
    refused(lnl(*PURIFY, cwd=pictures), "'dog'")
    assert files_below(pictures) == before


def test_output_folder_is_missing(pictures):
    command = [a if a != "out.csv" else "nowhere/out.csv" for a in PURIFY]
    refused(lnl(*command, cwd=pictures), "nowhere/out.csv")


def test_run_directory_of_another_configuration(tmp_path):
    task = make_task(digits(), "symmetric:0.5", trusted_per_class=5, seed=0)
    method = configured("cross-entropy", task, "smoke")
    run = train(method, task, run_dir=tmp_path / "run", preset="smoke", progress="off")
    before = {f: (run.path / f).read_bytes() for f in files_below(run.path)}
    with pytest.raises(BadInput, match="seed: 0 -> 1"):
        train(method, task, run_dir=run.path, preset="smoke", seed=1)
    other = make_task(digits(), "symmetric:0.6", trusted_per_class=5, seed=0)
    with pytest.raises(BadInput, match="nominal: 0.5 -> 0.6"):
        train(method, other, run_dir=run.path, preset="smoke")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="holds other files"):
        train(method, task, run_dir=tmp_path / "mine", preset="smoke")
    assert {f: (run.path / f).read_bytes() for f in files_below(run.path)} == before
    assert files_below(tmp_path / "mine") == ["thesis.txt"]


def test_two_processes_on_one_run(tmp_path):
    task = make_task(digits(), "symmetric:0.5", trusted_per_class=5, seed=0)
    method = configured("cross-entropy", task, "smoke")
    options = dict(run_dir=tmp_path / "run", preset="smoke", progress="off")

    class Watched(TrainOnLabels):
        def epoch(self, lab, epoch):
            with pytest.raises(BadInput, match="being written by another process"):
                train(method, task, **options)
            return super().epoch(lab, epoch)

    class Second(type(method)):
        def stages(self): return [Watched(self.config)]

    assert train(Second(method.config), task, **options).finished


def test_disk_full_while_writing_a_checkpoint(tmp_path, monkeypatch):
    "The third checkpoint meets a full disk: a clear refusal; the run goes on from the second one."
    noise = make_noise("symmetric:0.5", digits().labels, 10, seed=0)
    task = make_task(digits(), noise, trusted_per_class=5, seed=0)
    method = configured("cross-entropy", task, "smoke", {"epochs": 4})
    whole = train(method, task, run_dir=tmp_path / "whole", preset="smoke", progress="off")
    real, count = os.fsync, []

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2].startswith(".checkpoint.pt"):
            count.append(0)
            if len(count) == 3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match=r"checkpoint\.pt could not be written: No space left on device"):
        train(method, task, run_dir=tmp_path / "run", preset="smoke", progress="off")
    run = runs.Run(tmp_path / "run")
    assert load_checkpoint(run)["epoch"] == 2
    assert run.status()["state"] == "failed" and "No space left" in run.status()["message"]
    assert not [f for f in files_below(run.path) if f.startswith(".checkpoint")]
    monkeypatch.undo()
    train(method, task, run_dir=run.path, preset="smoke", progress="off")
    for name in ("metrics.jsonl", "labels.csv"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_disk_full_at_the_command_line(tmp_path):
    "A real failing write: the process may not make files above 200 kB, so no checkpoint fits."
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    command = ("train", "cross-entropy", "--noise", "symmetric:0.5", "--preset", "smoke")
    done = lnl_process(*command, cwd=tmp_path, preexec_fn=limit)
    refused(done, "checkpoint.pt could not be written")
    assert not [f for f in files_below(tmp_path) if "checkpoint" in f]
