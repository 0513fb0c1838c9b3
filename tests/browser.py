"""JupyterLab in a real browser, for tests: a server of its own, and words for what a reader does.

    with Server(folder) as server, Lab(server) as lab:
        lab.open("page.ipynb")
        lab.run_all()
        lab.button("Pause").click()

Everything that is started carries one environment variable, and a guard process ends whatever carries it
as soon as the test process is gone, however that went.
"""

import base64
import contextlib
import json
import os
import re
import secrets
import select
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np

MARK = "LNL_BROWSER_TEST"  # environment variable of every process that a server started
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ("--no-sandbox --disable-gpu --enable-unsafe-swiftshader --disable-quic --no-first-run "
             "--disable-background-networking --disable-component-update --disable-sync").split()
NO_OUTSIDE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
SIZE = {"width": 1280, "height": 800}
OVERRIDES = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
             "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}
FLAGS = ("--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", "--ServerApp.open_browser=False",
         "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly", "--allow-root")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def why_no_browser() -> str:
    "Why no browser test can run here, or nothing."
    try:
        from playwright.sync_api import sync_playwright
    except ImportError: return "playwright is not installed (pip install playwright)"
    if any(map(shutil.which, BROWSERS)): return ""
    with sync_playwright() as p:
        if Path(p.chromium.executable_path).exists(): return ""
    names = ", ".join(BROWSERS)
    return f"no browser: none of {names} is there, nor playwright's own (playwright install chromium)"


# ---- processes

def marked(mark: str) -> list:
    "The processes that carry `mark` in their environment, dead children apart."
    import psutil
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark: found.append(process)
    return found


def end(processes, seconds: float = 5) -> None:
    "Ask processes to end, then make them."
    import psutil
    for process in processes:
        with contextlib.suppress(psutil.Error): process.terminate()
    for process in psutil.wait_procs(processes, seconds)[1]:
        with contextlib.suppress(psutil.Error): process.kill()
    psutil.wait_procs(processes, seconds)


def guard(mark: str, command: list[str]) -> None:
    "Run the server until standard input closes, which happens when the test process ends in whatever way."
    server = subprocess.Popen(command, env={**os.environ, MARK: mark}, stdin=subprocess.DEVNULL)
    while server.poll() is None:
        if select.select([sys.stdin], [], [], 0.2)[0] and not sys.stdin.buffer.read1(): break
    server.terminate()  # Jupyter ends its kernels in good order
    with contextlib.suppress(subprocess.TimeoutExpired): server.wait(10)
    while left := marked(mark): end(left)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    "A JupyterLab server on `folder`, with settings, kernels and runtime files of its own."
    def __init__(self, folder, seconds: float = 60):
        self.folder, self.seconds = Path(folder), seconds
        self.notebooks = self.folder / "notebooks"
        self.mark = self.token = secrets.token_hex(16)
        self.port = free_port()
        self.url, self.log = f"http://127.0.0.1:{self.port}", self.folder / "server.log"

    def _environment(self) -> dict:
        "The present environment without anything of a Jupyter outside, and with folders of its own."
        foreign = ("JUPYTER", "JPY_", "IPYTHON", "PYTEST_")
        own = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
            own[f"JUPYTER_{name}"] = str(self.folder / name.lower())
        own |= {"JUPYTER_PREFER_ENV_PATH": "1", "IPYTHONDIR": str(self.folder / "ipython")}
        return own | dict.fromkeys(THREADS, "1")

    def __enter__(self):
        settings = self.folder / "config_dir" / "labconfig" / "default_setting_overrides.json"
        for path in (settings.parent, self.notebooks): path.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(OVERRIDES))
        lab = [sys.executable, "-m", "jupyterlab", *FLAGS, f"--ServerApp.port={self.port}",
               f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.notebooks}"]
        with open(self.log, "wb") as log:
            self.guard = subprocess.Popen(
                [sys.executable, __file__, self.mark, *lab], env=self._environment(), cwd=self.folder,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try: self._await()
        except BaseException:
            self.close()
            raise
        return self

    def _await(self) -> None:
        "Wait until the server answers; RuntimeError with its log where it does not."
        until = time.monotonic() + self.seconds
        while time.monotonic() < until and self.guard.poll() is None:
            with contextlib.suppress(OSError):
                self.ask("status")
                return
            time.sleep(0.1)
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text()[-3000:]}")

    def ask(self, path: str, method: str = "GET"):
        "The server's own answer to a request below /api/, as Python."
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method)
        request.add_header("Authorization", f"token {self.token}")
        with urllib.request.urlopen(request, timeout=30) as answer: text = answer.read()
        return json.loads(text) if text else None

    def start(self, *command, **options) -> subprocess.Popen:
        "A process beside the notebooks, such as training from a terminal; ended at the latest with the page."
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        options = {"cwd": self.notebooks, "env": {**self._environment(), MARK: self.mark}, **quiet} | options
        return subprocess.Popen([str(c) for c in command], **options)

    def write(self, name: str, *cells: str) -> str:
        "A notebook of these code cells in the server's folder."
        from nbformat import write
        from nbformat.v4 import new_code_cell, new_notebook
        kernel = {"name": "python3", "display_name": "Python 3"}  # without one, JupyterLab asks
        page = new_notebook(cells=[new_code_cell(c) for c in cells], metadata={"kernelspec": kernel})
        write(page, self.notebooks / name)
        return name

    def processes(self) -> list:
        "Everything that runs because of this server, itself apart: kernels, what they started, browsers."
        return [p for p in marked(self.mark) if "jupyterlab" not in p.cmdline()]

    def end_kernels(self) -> None:
        "End all kernels, then whatever they left running."
        for kernel in self.ask("kernels"):
            with contextlib.suppress(urllib.error.HTTPError): self.ask(f"kernels/{kernel['id']}", "DELETE")
        end(self.processes())

    def close(self) -> None:
        "End the server and everything started by it, for certain."
        self.guard.stdin.close()
        try: self.guard.wait(40)
        except subprocess.TimeoutExpired: self.guard.kill()
        while left := marked(self.mark): end(left)

    def __exit__(self, *_): self.close()


# ---- what plotly shows

def plain(value, limit: int):
    "Plotly's data in plain lists: {bdata, dtype} decoded, or {'length': n} above `limit` numbers."
    if isinstance(value, list): return [plain(v, limit) for v in value]
    if not isinstance(value, dict): return value
    if not {"bdata", "dtype"} <= value.keys(): return {k: plain(v, limit) for k, v in value.items()}
    array = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
    if array.size > limit: return {"length": int(array.size)}
    shape = [int(n) for n in str(value.get("shape", array.size)).split(",")]
    return array.reshape(shape).tolist()


# A typed array becomes {bdata, dtype}, exact and compact, whatever notebook or widget it came from.
READ = """(graph) => {
    const names = {Float64Array: 'f8', Float32Array: 'f4', Int32Array: 'i4', Uint32Array: 'u4',
                   Int16Array: 'i2', Uint16Array: 'u2', Int8Array: 'i1', Uint8Array: 'u1',
                   Uint8ClampedArray: 'u1'};
    const bytes = (a) => {
        const b = new Uint8Array(a.buffer, a.byteOffset, a.byteLength);
        let text = '';
        for (let i = 0; i < b.length; i += 32768) text += String.fromCharCode(...b.subarray(i, i + 32768));
        return btoa(text);
    };
    return JSON.stringify(graph.data, (key, value) => ArrayBuffer.isView(value)
        ? {bdata: bytes(value), dtype: names[value.constructor.name]}
        : key.startsWith('_') ? undefined : value);
}"""


# ---- the page

class Lab:
    "One browser page with JupyterLab in it; `page` is playwright's, for everything that has no word here."
    def __init__(self, server: Server): self.server = server

    def __enter__(self):
        from playwright.sync_api import sync_playwright
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:  # closes what was opened, where a later step fails
            stack.callback(self.server.end_kernels)
            driver = stack.enter_context(sync_playwright())
            path = next(filter(None, map(shutil.which, BROWSERS)), None)
            browser = driver.chromium.launch(executable_path=path, args=[*ARGUMENTS, NO_OUTSIDE],
                                             env={**os.environ, MARK: self.server.mark})
            stack.callback(browser.close)
            self.context = browser.new_context(viewport=SIZE)
            self._stack = stack.pop_all()
        self.page_errors, self.console_errors, self.external = [], [], []
        self.context.on("request", lambda r: self._note(r.url))
        self.page = self._new_page()
        return self

    def __exit__(self, *_): self._stack.close()

    def _new_page(self):
        page = self.context.new_page()
        page.on("pageerror", lambda e: self.page_errors.append(str(e)))
        page.on("console", lambda m: self.console_errors.append(m.text) if m.type == "error" else None)
        page.on("websocket", lambda w: self._note(w.url))
        return page

    def _note(self, url: str) -> None:
        "Keep the address of a request that leaves this machine's server."
        address = urlsplit(url)
        if address.scheme in ("data", "blob", "about"): return
        if address.netloc != urlsplit(self.server.url).netloc: self.external.append(url)

    # -- notebooks

    def open(self, notebook, simple: bool = False, seconds: float = 60) -> None:
        "Show a notebook of the server's folder, in the whole JupyterLab or alone, and wait for its kernel."
        if self.page.is_closed(): self.page = self._new_page()
        path, view = quote(str(notebook)), "doc" if simple else "lab"
        self.page.goto(f"{self.server.url}/{view}/tree/{path}?token={self.server.token}&reset")
        self.panel = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        self.panel.locator(".jp-Cell").first.wait_for(timeout=seconds * 1000)
        self.idle(seconds)

    def run_all(self) -> None:
        "Restart the kernel and run all cells; returns when the first runs. `idle` waits for the last."
        # The observer sees the `[*]` even where the cells finish sooner than anyone could look.
        self.page.evaluate("""() => {
            window.lnlBegun = false;
            new MutationObserver((_, observer) => {
                const prompts = [...document.querySelectorAll('.jp-InputPrompt')];
                if (!prompts.some((p) => p.textContent.includes('*'))) return;
                window.lnlBegun = true;
                observer.disconnect();
            }).observe(document.body, {subtree: true, childList: true, characterData: true});
        }""")
        self.panel.locator('[data-command="notebook:restart-run-all"]').first.click()
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()
        self.page.wait_for_function("window.lnlBegun", timeout=60_000)

    def idle(self, seconds: float = 60, check: bool = True) -> None:
        "Wait until the kernel has nothing to do; AssertionError with the traceback where a cell failed."
        # Asked of JupyterLab itself: its light shows idle already while the kernel is being started.
        self.page.wait_for_function("""() => {
            const {sessionContext, node} = window.jupyterapp.shell.currentWidget ?? {};
            const kernel = sessionContext?.isReady && sessionContext.session?.kernel;
            const prompts = [...(node?.querySelectorAll('.jp-InputPrompt') ?? [])];
            return kernel && kernel.status === 'idle' && kernel.connectionStatus === 'connected'
                && !prompts.some((p) => p.textContent.includes('*'));
        }""", timeout=seconds * 1000)
        if check: assert not self.tracebacks(), "\n".join(self.tracebacks())

    def tracebacks(self) -> list[str]:
        "The text of every error that a cell shows."
        return self.panel.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()

    def text(self) -> str:
        "All that the notebook's outputs say."
        return "\n".join(self.panel.locator(".jp-OutputArea-output").all_inner_texts())

    def command(self, name: str, **arguments) -> None:
        "Run one of JupyterLab's own commands, such as `docmanager:save`."
        execute = "async ([n, a]) => { await window.jupyterapp.commands.execute(n, a); }"
        self.page.evaluate(execute, [name, arguments])

    def begin(self, name: str) -> None:
        "Start one of JupyterLab's commands; one that asks with a dialog would end only when it is answered."
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name); }", name)

    def save(self) -> None: self.command("docmanager:save")

    def theme(self, dark: bool) -> None:
        "Change JupyterLab's theme and wait until it shows."
        self.command("apputils:change-theme", theme="JupyterLab Dark" if dark else "JupyterLab Light")
        light = "false" if dark else "true"
        self.page.wait_for_function(f"document.body.dataset.jpThemeLight === '{light}'")

    def screenshot(self, path) -> Path:
        "What the window of 1280 x 800 shows, as PNG."
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)
        return Path(path)

    # -- controls: ipywidgets, found as a reader finds them

    def _control(self, kind: str, label: str):
        name = self.page.locator(".widget-label").get_by_text(label, exact=True)
        return self.panel.locator(f".jp-OutputArea .{kind}").filter(has=name).first

    def button(self, name: str):
        "A button by the text on it: `.click()`, `.is_enabled()`."
        text = re.compile(rf"^\s*{re.escape(name)}\s*$")  # the accessible name has the icon in it
        return self.panel.locator(".jp-OutputArea button").filter(has_text=text).first

    def dropdown(self, label: str):
        "A dropdown by its description: `.select_option('...')`, `.input_value()`."
        return self._control("widget-dropdown", label).locator("select")

    def tab(self, name: str):
        "One tab of a row of tabs by its title: `.click()`."
        return self.panel.locator(".jp-OutputArea .widget-tab .lm-TabBar-tab").filter(
            has=self.page.get_by_text(name, exact=True)).first

    def slider(self, label: str, to=None) -> str:
        "What a slider reads, after typing `to` into its number where that is given."
        number = self._control("widget-slider", label).locator(".widget-readout")
        if to is not None:
            number.fill(str(to))
            number.press("Enter")
        return number.inner_text()

    # -- figures

    def plot(self, which=0, seconds: float = 60):
        "A plotly figure by its place in the notebook or by words of its title; waits until it is drawn."
        plots = self.panel.locator(".js-plotly-plot")
        found = plots.nth(which) if isinstance(which, int) else plots.filter(has_text=which).first
        found.locator(".main-svg").first.wait_for(state="attached", timeout=seconds * 1000)
        return found

    def plot_data(self, which=0, limit: int = 20_000, seconds: float = 60) -> list[dict]:
        "The traces of a figure as the browser has them, in plain lists; longer arrays as {'length': n}."
        return plain(json.loads(self._read(which, seconds)), limit)

    def _read(self, which, seconds: float = 60) -> str:
        "The traces as text: two readings of one state are equal, also with NaN in them."
        return self.plot(which, seconds).evaluate(READ)

    def wait(self, condition, seconds: float = 60, what: str = ""):
        "What `condition()` returns as soon as that is true; AssertionError after `seconds`."
        until = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < until, f"not within {seconds} s: {what or condition}"
            self.page.wait_for_timeout(100)  # unlike time.sleep, this lets the page's events through
        return value

    def changes(self, count: int, seconds: float = 60, which=0) -> list:
        "The data of a figure, now and after each of `count` changes."
        seen = [self._read(which)]

        def changed():
            if (data := self._read(which)) != seen[-1]: seen.append(data)
            return len(seen) > count

        self.wait(changed, seconds, f"{count} changes of figure {which!r}")
        return [plain(json.loads(data), 20_000) for data in seen]

    def still(self, seconds: float = 2, which=0) -> bool:
        "Whether a figure's data is the same after `seconds`."
        before = self._read(which)
        self.page.wait_for_timeout(seconds * 1000)
        return self._read(which) == before


if __name__ == "__main__": guard(sys.argv[1], sys.argv[2:])
