"""What may import what: the library without notebook tools, views without torch, and one direction only."""

import ast
import importlib.util
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lnl_bench"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
NOTEBOOK_TOOLS = ("jupyterlab", "papermill", "plotly", "ipywidgets", "anywidget", "umap", "nbdev", "execnb",
                  "fastcore", "IPython")  # fmt: skip
# PIL comes with torchvision, scipy with scikit-learn, filelock with torch.
BASE = ("torch", "torchvision", "numpy", "pandas", "sklearn", "PIL", "scipy", "filelock")

# What a layer may import besides itself. Modules outside folders (cli, __main__) stand on top of all.
LAYERS = {
    "data": (),
    "engine": ("data",),
    "methods": ("data", "engine"),
    "views": ("data.checks", "engine.runs"),
    "repro": ("data", "engine", "methods", "views", "watch"),  # watch: runs that are another process
}
LIBRARY = ("data", "engine", "methods")

BLOCKER = """
import importlib, sys
blocked = set({blocked!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked: raise ImportError(f"{{name}} is blocked here", name=name)
sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    try: importlib.import_module(name)
    except ImportError as e: sys.exit(f"{{name}}: {{e}}")
assert not blocked & {{n.partition(".")[0] for n in sys.modules}}
"""


def modules() -> dict[str, Path]:
    "Dotted name within the package → file, of every module; a package's __init__ goes by the package's name."
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = modules()


def layer(name: str) -> str: return name.partition(".")[0]


def in_layers(*layers: str) -> list[str]: return [name for name in MODULES if layer(name) in layers]


def import_with(blocked, names):
    "Import `names` of the package in a fresh process where the packages `blocked` cannot be found."
    code = BLOCKER.format(blocked=tuple(blocked), modules=[f"{PACKAGE}.{name}" for name in names])
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)


def imported(name: str, tree: ast.AST) -> list[str]:
    "Absolute dotted names that `tree`, the module `name`, imports anywhere; relative imports are resolved."
    package = f"{PACKAGE}.{name}"
    if MODULES[name].name != "__init__.py": package = package.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from ..data import noise` imports data.noise; `from ..data.noise import f` only data.noise.
            found += [full if full.removeprefix(f"{PACKAGE}.") in MODULES else base
                      for full in (f"{base}.{alias.name}" for alias in node.names)]  # fmt: skip
    return found


def parsed(name: str) -> ast.Module: return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def inside(name: str, tree: ast.AST | None = None) -> set[str]:
    "Which modules of the package the module `name` imports, without the package's own name."
    names = imported(name, tree or parsed(name))
    return {n.removeprefix(f"{PACKAGE}.") for n in names if n.startswith(f"{PACKAGE}.")} & MODULES.keys()


def allowed(name: str, target: str) -> bool:
    "Whether module `name` may import module `target`."
    own, other = layer(name), layer(target)
    if own not in LAYERS: return True
    return own == other or target in LAYERS[own] or other in LAYERS[own]


# --- by running ---


def test_library_imports_without_notebook_tools():
    done = import_with(NOTEBOOK_TOOLS, in_layers(*LIBRARY))
    assert done.returncode == 0, done.stderr


def test_views_import_without_torch():
    done = import_with(("torch", "torchvision"), [*in_layers("views"), "engine.runs"])
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks():
    done = import_with(["json"], ["data.checks"])
    assert done.returncode == 1 and "lnl_bench.data.checks: json is blocked here" in done.stderr


# --- by reading ---


def test_there_is_something_to_check():
    assert {"data", "engine"} <= {layer(n) for n in MODULES}


def test_every_folder_is_a_known_layer():
    assert {layer(n) for n in MODULES if "." in n} <= LAYERS.keys()


@pytest.mark.parametrize("name", [n for n in MODULES if n and layer(n) in LAYERS])
def test_imports_run_one_way(name):
    wrong = sorted(target for target in inside(name) if not allowed(name, target))
    assert not wrong, f"{name} may import {LAYERS[layer(name)]} and its own folder, but imports {wrong}"


def test_no_cycles():
    TopologicalSorter({n: inside(n) - {n} for n in MODULES if n}).prepare()


@pytest.mark.parametrize("name", in_layers(*LIBRARY))
def test_library_needs_only_the_base_at_import(name):
    found = {n.partition(".")[0] for n in imported(name, top_level(parsed(name)))}
    wrong = found - set(BASE) - set(sys.stdlib_module_names) - {PACKAGE}
    assert not wrong, f"{name} imports {sorted(wrong)} at its top; accepted there: {', '.join(BASE)}"


def top_level(tree: ast.Module) -> ast.Module:
    "`tree` without the bodies of functions, whose imports happen only when they are called."
    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node): return ast.Pass()

        visit_AsyncFunctionDef = visit_FunctionDef

    return Cut().visit(tree)


@pytest.mark.parametrize("name, source, wrong", [
    ("data.checks", "from ..engine import runs", {"engine.runs"}),
    ("data.checks", "def f():\n    from lnl_bench.engine.runs import Run", {"engine.runs"}),
    ("views.losses", "from ..engine.runs import Run", set()),
    ("views.losses", "import lnl_bench.data.noise", {"data.noise"}),
    ("methods.dmlp", "from ..data.checks import Config", set()),
    ("cli", "from .engine.runs import Run", set()),
])  # fmt: skip
def test_the_reading_finds_what_it_should(monkeypatch, name, source, wrong):
    for module in (name, "data.noise", "engine.runs"): monkeypatch.setitem(MODULES, module, Path("x.py"))
    assert {t for t in inside(name, ast.parse(source)) if not allowed(name, t)} == wrong
