"""Check that the notebooks and the library are one thing, and that the notebooks are fit to be committed.

    python tests/check_notebooks.py [--root FOLDER] [--only export clean parameters outputs]

One line per fault, each naming the notebook and what puts it right; exit status 1 if any. The checks:

export      the library is what the notebooks export, and nothing else
clean       cleaning changes nothing, no widget state is kept, every cell has its own id, under 200 kB
parameters  pages in nbs/repro keep the cell tag that papermill looks for
outputs     outputs only on the pages where people read them
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from execnb.nbio import dict2nb, nb2str
from fastcore.xtras import Config
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parents[1]
SIZE_LIMIT = 200_000
WIDGET_OUTPUTS = tuple(f"application/vnd.jupyter.widget-{kind}+json" for kind in ("view", "state"))
READ_BY_PEOPLE = ("index.ipynb", "explore/*.ipynb", "lessons/*.ipynb", "repro/*.ipynb")
# Every other file of the library comes out of a notebook.
WRITTEN_BY_HAND = ("__init__.py", "__main__.py")


def settings(root: Path) -> Config: return Config(root, "settings.ini", save=False)


def is_hidden(path: Path) -> bool: return any(part[0] in "._" for part in path.parts)


def notebooks(root: Path) -> list[Path]:
    "The project's notebooks in a fixed order; hidden files and folders are none of it, as for nbdev."
    folder = root / settings(root)["nbs_path"]
    return sorted(p for p in folder.rglob("*.ipynb") if not is_hidden(p.relative_to(folder)))


def sources(folder: Path) -> dict[str, str]:
    "Path within `folder` → text, of every Python file."
    files = sorted(folder.rglob("*.py"))
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in files}


def read(path: Path) -> dict: return json.loads(path.read_text(encoding="utf-8"))


def text_of(cell: dict) -> str: return "".join(cell["source"])


# --- export ---


def export_into(root: Path, target: Path) -> Path:
    "Export a copy of the notebooks of `root` under `target`; returns the exported library's folder."
    cfg = settings(root)
    shutil.copyfile(root / "settings.ini", target / "settings.ini")
    skip = shutil.ignore_patterns(".*", "__pycache__", "runs")
    shutil.copytree(root / cfg["nbs_path"], target / cfg["nbs_path"], ignore=skip)
    # nbdev keeps a version that it finds in the package's __init__, so the copy starts from the real one.
    library = target / cfg["lib_path"]
    library.mkdir()
    init = root / cfg["lib_path"] / "__init__.py"
    if init.exists(): shutil.copyfile(init, library / "__init__.py")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev exports nothing where it is set
    code = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"
    done = subprocess.run([sys.executable, "-c", code], cwd=target, env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"the notebooks cannot be exported:\n{done.stdout}{done.stderr}")
    return library


def origin(lines: list[str], at: int) -> str:
    "The notebook and cell that line `at` of an exported file came from."
    marks = [line for line in lines[: at + 1] if line.startswith("# %% ")]
    if not marks or marks[-1].startswith("# %% auto"): return "the head of the file"
    path, _, cell = marks[-1].removeprefix("# %% ").rpartition(" #")
    return f"{path.replace('../', '')}, cell {cell}"


def difference(name: str, expected: str, found: str) -> str:
    "Where two versions of one exported file part: file, line, cell, and both lines."
    want, have = expected.splitlines(), found.splitlines()
    same = (a == b for a, b in zip(want, have, strict=False))
    at = next((i for i, equal in enumerate(same) if not equal), min(len(want), len(have)))
    exported, has = (repr(lines[at]) if at < len(lines) else "nothing" for lines in (want, have))
    where = origin(want if at < len(want) else have, at)
    return f"{name}, line {at + 1}: not what {where} exports: {exported} became {has}. Run `make export`."


def check_export(root: Path) -> list[str]:
    "Faults where the library is not what the notebooks export."
    library = root / settings(root)["lib_path"]
    with tempfile.TemporaryDirectory() as tmp: expected = sources(export_into(root, Path(tmp)))
    found, faults = sources(library), []
    for name in expected.keys() - found.keys():
        faults.append(f"{library.name}/{name}: missing; a notebook exports it. Run `make export`.")
    for name in found.keys() - expected.keys():
        if Path(name).name in WRITTEN_BY_HAND: continue
        faults.append(f"{library.name}/{name}: no notebook exports it. Write one, or delete the file.")
    for name in expected.keys() & found.keys():
        if expected[name] == found[name]: continue
        faults.append(difference(f"{library.name}/{name}", expected[name], found[name]))
    return sorted(faults)


# --- clean ---


def cleaned(nb: dict, cfg: Config) -> str:
    "The text that `nbdev_clean` writes for notebook `nb`."
    nb = dict2nb(copy.deepcopy(nb))
    keys = {k: cfg.get(k, "").split() for k in ("allowed_metadata_keys", "allowed_cell_metadata_keys")}
    clean_nb(nb, clear_all=cfg.get("clear_all") == "True", clean_ids=cfg.get("clean_ids") != "False", **keys)
    return nb2str(nb)


def untidy_cells(nb: dict, cfg: Config) -> list[str]:
    "Which cells cleaning would change."
    after = json.loads(cleaned(nb, cfg))["cells"]
    return [c.get("id", f"number {i}") for i, c in enumerate(nb["cells"]) if c != after[i]]


def check_ids(nb: dict) -> list[str]:
    "Faults in the cells' ids: nbdev would give a cell without one a new random id at each export."
    counts = Counter(c.get("id") for c in nb["cells"])
    faults = [f"cell id {i!r} stands {n} times" for i, n in counts.items() if i is not None and n > 1]
    if counts[None]: faults.append(f"{counts[None]} cell(s) without an id; run `make clean-notebooks`")
    return faults


def has_widget(nb: dict) -> bool:
    "Whether a notebook keeps widget state: megabytes that no one can see without a kernel."
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    return "widgets" in nb["metadata"] or any(k in o.get("data", {}) for o in outputs for k in WIDGET_OUTPUTS)


def check_clean(path: Path, nb: dict, cfg: Config) -> list[str]:
    "Faults that would make a notebook's changes hard to read or its file heavy."
    faults, size = check_ids(nb), path.stat().st_size
    if size >= SIZE_LIMIT: faults.append(f"{size:,} bytes; accepted: under {SIZE_LIMIT:,}. Show less")
    if has_widget(nb): faults.append("widget state is saved; show a static figure instead")
    if not faults and cleaned(nb, cfg) != path.read_text(encoding="utf-8"):
        where = ", ".join(untidy_cells(nb, cfg)) or "none; the notebook's own metadata or layout"
        faults.append(f"cleaning changes it (cells: {where}); run `make clean-notebooks`")
    return faults


# --- parameters and outputs ---


def check_parameters(path: Path, nb: dict, cfg: Config) -> list[str]:
    "Faults of a page in nbs/repro: without its tag papermill silently runs the defaults."
    if path.parent.name != "repro" or any("#| default_exp" in text_of(c) for c in nb["cells"]): return []
    if not path.name.startswith("repro_"):
        return ["neither a module (`#| default_exp`) nor named repro_*.ipynb, so no command would find it"]
    tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1: return [f"{len(tagged)} cells tagged `parameters`; accepted: exactly one"]
    return [] if tagged[0]["cell_type"] == "code" else ["the cell tagged `parameters` is not a code cell"]


def check_outputs(path: Path, nb: dict, cfg: Config) -> list[str]:
    "Faults of a page that is read as code but carries outputs."
    folder = Path(cfg.config_path) / cfg["nbs_path"]
    if any(path == folder / p or path.relative_to(folder).match(p) for p in READ_BY_PEOPLE): return []
    with_outputs = [c.get("id", "?") for c in nb["cells"] if c.get("outputs")]
    if not with_outputs: return []
    where = ", ".join(with_outputs)
    return [f"outputs in cells {where}; accepted only in {', '.join(READ_BY_PEOPLE)}. Clear them"]


PER_NOTEBOOK = {"clean": check_clean, "parameters": check_parameters, "outputs": check_outputs}
CHECKS = ("export", *PER_NOTEBOOK)


def faults_of(root: Path, only=CHECKS) -> list[str]:
    "All faults of the project under `root`, one text each."
    root = Path(root).resolve()
    cfg, faults = settings(root), check_export(root) if "export" in only else []
    for path in notebooks(root):
        nb, name = read(path), path.relative_to(root).as_posix()
        found = [f for check in only if check in PER_NOTEBOOK for f in PER_NOTEBOOK[check](path, nb, cfg)]
        faults += [f"{name}: {fault}" for fault in found]
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the notebooks against the library and for tidiness.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help="which checks to make")
    args = parser.parse_args()
    faults = faults_of(args.root, args.only)
    for fault in faults: print(fault)
    print(f"{len(notebooks(args.root))} notebooks checked ({', '.join(args.only)}): {len(faults)} fault(s)")
    return bool(faults)


if __name__ == "__main__": sys.exit(main())
