"""The notebooks as people meet them: JupyterLab in a browser, Run All, and what is then to be seen.

Explore by default; BLIP2MGM_LAB=all opens all five stages one after the other.
BLIP2MGM_SHOTS=FOLDER keeps pictures of what the browser showed.
"""
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import PIPELINE, PYTHON, ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if not CHROMIUM: pytest.skip("no chromium on this machine to open JupyterLab in", allow_module_level=True)

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
STAGES = PIPELINE if os.environ.get("BLIP2MGM_LAB") == "all" else PIPELINE[:1]
NOTEBOOK = {s: next(ROOT.glob(f"nbs/?0_{s}.ipynb")).name for s in PIPELINE}
TOKEN = "a-token-for-the-test"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url):
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as r: return r.status == 200


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "`blip2mgm lab` in an empty folder, on a free port, with settings of its own; yields its folder and its address"
    home, work, port = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("work"), free_port()
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR")
    env = os.environ | {n: str(home / n.lower()) for n in names} | {"BLIP2MGM_ROOT": str(work), "OMP_NUM_THREADS": "1", "JUPYTER_TOKEN": TOKEN}
    news = home / "jupyterlab_settings_dir/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')
    main = "import sys; from blip2mgm.cli import main; sys.exit(main(sys.argv[1:]))"
    with open(home / "lab.log", "wb") as log:
        server = subprocess.Popen([PYTHON, "-c", main, "lab", "--", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0"],
                                  cwd=work, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while not answers(f"{url}/api/status?token={TOKEN}"):
            assert server.poll() is None and time.monotonic() < until, (home / "lab.log").read_text()
            time.sleep(0.3)
        yield work, url
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)


@pytest.fixture(scope="module")
def page(lab):
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def open_notebook(page, url, path, workspace):
    page.goto(f"{url}/lab/workspaces/{workspace}/tree/{path}?token={TOKEN}&reset")
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    page.locator("#jp-main-statusbar", has_text="| Idle").wait_for()
    page.evaluate("""() => { window.bars = 0; new MutationObserver(() => { window.bars = Math.max(window.bars, document.querySelectorAll('.jp-OutputArea progress').length) })
        .observe(document.body, {childList: true, subtree: true}) }""")


def run_all(page):
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells", exact=False).first.click()
    page.locator(".jp-Dialog button.jp-mod-accept").click()


def outputs(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and c.source.strip()]
    return [o for c in code for o in c.outputs], code


def idle(url):
    "Is every kernel of the server waiting for something to do?"
    with urllib.request.urlopen(f"{url}/api/kernels?token={TOKEN}", timeout=30) as r:
        return all(k["execution_state"] == "idle" for k in json.load(r))


def wait_until_run(url, page, path, seconds=900):
    "Wait for the last cell to have run, or one to have failed; returns all outputs and the code cells, as JupyterLab saved them"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        page.wait_for_timeout(1500)
        if not idle(url): continue
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1500)
        shown, code = outputs(path)
        if code[-1].execution_count or any(o.output_type == "error" for o in shown): return shown, code
    raise AssertionError("the notebook is still running")


def look(page, name):
    "Scroll through the notebook; what each screen holds is gathered, and kept as pictures if asked for"
    shots, seen = os.environ.get("BLIP2MGM_SHOTS"), {"images": 0, "tables": 0, "wide": [], "errors": 0}
    panel, i, more = page.locator(".jp-WindowedPanel-outer").first, 0, True
    panel.evaluate("e => { e.scrollTop = 0 }")
    while more and i < 60:
        page.wait_for_timeout(200)
        found = page.evaluate("""() => {
            const all = q => [...document.querySelectorAll('.jp-Notebook .jp-OutputArea ' + q)];
            const drawn = all('img').filter(e => e.complete && e.naturalWidth > 20);
            const wide = [...drawn, ...all('table')].filter(e => e.clientWidth > e.closest('.jp-OutputArea').clientWidth + 2);
            return {images: drawn.length, tables: all('table').length, wide: wide.map(e => e.tagName + ' ' + e.clientWidth + ' ' + (e.innerText || '').slice(0, 40)), errors: all('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]').length}}""")
        seen = {k: max(seen[k], found[k]) if k != "wide" else sorted({*seen[k], *found[k]}) for k in seen}
        if shots: Path(shots).mkdir(parents=True, exist_ok=True); page.screenshot(path=f"{shots}/{name}-{i:02d}.png")
        more, i = panel.evaluate("e => { const was = e.scrollTop; e.scrollTop += e.clientHeight - 60; return e.scrollTop > was + 1 }"), i + 1
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_run_all_in_the_browser(lab, page, stage):
    work, url = lab
    path = f"nbs/{NOTEBOOK[stage]}"
    fresh = nbformat.read(work / path, as_version=4)
    for c in fresh.cells:  # nothing that is seen below may come from the shipped outputs
        if c.cell_type == "code": c.outputs, c.execution_count = [], None
    nbformat.write(fresh, work / path)
    open_notebook(page, url, path, stage)
    run_all(page)
    shown, code = wait_until_run(url, page, work / path)
    bars = page.evaluate("window.bars")
    assert [f"{o.ename}: {o.evalue}" for o in shown if o.output_type == "error"] == []
    assert all(c.execution_count for c in code), "every cell ran"
    assert [o.text for o in shown if o.get("name") == "stderr"] == []
    kinds = [set(o.data) for o in shown if "data" in o]
    assert sum("image/png" in k for k in kinds) >= 2 and sum("text/html" in k for k in kinds) >= 4
    assert (work / "runs/smoke" / stage / "record.json").is_file(), "results go to the folder that Lab was opened in"
    seen = look(page, stage)
    if stage != "report": assert bars, "no progress bar was seen while it ran"
    print(stage, seen, bars)
    for kernel in json.load(urllib.request.urlopen(f"{url}/api/kernels?token={TOKEN}", timeout=30)):
        urllib.request.urlopen(urllib.request.Request(f"{url}/api/kernels/{kernel['id']}?token={TOKEN}", method="DELETE"), timeout=30)
    assert seen["images"] and seen["tables"] and not seen["errors"] and seen["wide"] == []


def test_without_the_token_nothing_is_shown(lab):
    _, url = lab
    with pytest.raises(urllib.error.HTTPError) as e: urllib.request.urlopen(f"{url}/api/contents", timeout=10)
    assert e.value.code == 403
