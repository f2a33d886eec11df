"""The whole pipeline on the smoke profile: through the command line, again, interrupted, and by papermill alone."""
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import PIPELINE, ROOT, TOOLS

from blip2mgm.cli import stage_names
from blip2mgm.runner import leftovers
from blip2mgm.core import read_json, weights_dir
from blip2mgm.stage import record_of

if missing := [s for s in PIPELINE if s not in stage_names()]: pytest.skip(f"stages not written yet: {missing}", allow_module_level=True)
if not (weights_dir() / "blip2").is_dir(): pytest.skip("the shipped weights are not there yet", allow_module_level=True)


def blip2mgm(*args, cwd="/"):
    "Run the command line; its output, once it has ended well"
    done = subprocess.run([str(TOOLS / "blip2mgm"), *map(str, args)], cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run of the smoke profile, and what the command said"
    run = tmp_path_factory.mktemp("pipeline") / "run"
    return run, blip2mgm("run", "smoke", "--run", run)


@pytest.fixture
def copy(finished, tmp_path):
    "A copy of that run to spoil"
    return shutil.copytree(finished[0], tmp_path / "run", symlinks=True)


def findings(run):
    "What the comparison found, without when and where"
    def plain(x):
        if isinstance(x, dict): return {k: plain(v) for k, v in x.items() if not re.search("second|time|start|memory|machine|version|sha|hash|path|file", k)}
        return [plain(v) for v in x] if isinstance(x, list) else x
    return plain(json.loads((run / "comparison.json").read_text(encoding="utf-8").replace(str(run), "RUN")))


def test_every_stage_leaves_what_it_owes(finished):
    run, said = finished
    for stage in PIPELINE:
        folder = run / stage
        record = record_of(run, stage)
        assert record["seconds"] > 0 and record["peak_memory_mib"] > 0 and record["versions"]["torch"]
        assert all((folder / o).is_file() for o in record["outputs"])
        assert (folder / "config.yaml").is_file() and (folder / f"{stage}.ipynb").is_file() and (folder / f"{stage}.html").is_file()
        assert f"{stage:<9} done in" in said
    for name in ("report.html", "report.md", "report.ipynb", "comparison.json"): assert (run / name).stat().st_size > 500


def test_it_ends_with_the_verdict_and_the_report(finished):
    run, said = finished
    last = said.strip().splitlines()
    assert last[-1] == f"Report: {run}/report.html" and last[-2] == read_json(run / "comparison.json")["sentence"]


def test_nothing_is_left_behind(finished):
    run, _ = finished
    assert leftovers(run) == []
    assert [p for p in run.rglob("*") if p.name.endswith((".part", ".log")) and p.parent.name in PIPELINE] == []


def test_every_caption_is_accounted_for(finished):
    run, _ = finished
    given = sum(1 for line in (run / "data/captions.jsonl").open() if line.strip())
    for arm in ("raw", "blip2_filtered", "random", "raw_again"):
        rows = [json.loads(line) for line in (run / f"enhance/arms/{arm}/lineage.jsonl").open()]
        kept = sum(1 for line in (run / f"enhance/arms/{arm}/captions.jsonl").open() if line.strip())
        assert len(rows) == given and {r["status"] for r in rows} <= {"kept", "filtered", "rejected"}
        assert sum(r["status"] == "kept" for r in rows) == kept > 0


def test_pages_need_no_network(finished):
    run, _ = finished
    for page in [run / "report.html", *(run / s / f"{s}.html" for s in PIPELINE)]:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//", text) == [], page.name
        assert not re.search(r"@import\s+(?:url\()?[\"']?(?:https?:)?//", text), page.name


def test_again_it_does_nothing(finished):
    run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    start = time.monotonic()
    said = blip2mgm("run", "smoke", "--run", run)
    assert said.count("unchanged, kept") == len(PIPELINE) and "Report:" in said
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert time.monotonic() - start < 60


def test_killed_in_the_middle_it_comes_to_the_same(finished, copy):
    for stage in PIPELINE[2:]: shutil.rmtree(copy / stage)
    for name in ("report.html", "report.md", "report.ipynb", "comparison.json"): (copy / name).unlink()
    process = subprocess.Popen([str(TOOLS / "blip2mgm"), "run", "smoke", "--run", str(copy)], cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not list((copy / "train").rglob("done.json")) and process.poll() is None and time.monotonic() < until: time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert record_of(copy, "train") is None, "killed before the stage was over"
    said = blip2mgm("run", "smoke", "--run", copy)
    assert said.count("unchanged, kept") == 2 and leftovers(copy) == []
    assert findings(copy) == findings(finished[0])


def test_a_report_that_was_deleted_is_written_again(finished, copy):
    (copy / "report.html").unlink()
    said = blip2mgm("run", "smoke", "--run", copy)
    assert said.count("unchanged, kept") == len(PIPELINE) - 1 and "running (report.html is missing)" in said
    assert (copy / "report.html").is_file() and findings(copy) == findings(finished[0])


def test_papermill_alone_from_another_folder_gives_the_same(finished, copy, tmp_path):
    before = record_of(copy, "explore")["outputs"]
    shutil.rmtree(copy / "explore")
    command = [str(TOOLS / "papermill"), str(ROOT / "nbs/10_explore.ipynb"), "out.ipynb", "-f", str(ROOT / "params/smoke/explore.yaml"), "-p", "run", str(copy)]
    subprocess.run([*command, "--no-progress-bar"], cwd=tmp_path, check=True, capture_output=True)
    assert record_of(copy, "explore")["outputs"] == before
    assert blip2mgm("run", "smoke", "--run", copy).count("unchanged, kept") == len(PIPELINE)


def test_papermill_alone_refuses_a_misspelt_parameter(tmp_path):
    command = [str(TOOLS / "papermill"), str(ROOT / "nbs/30_train.ipynb"), "out.ipynb", "-p", "sedes", "3", "-p", "run", str(tmp_path / "run")]
    done = subprocess.run([*command, "--no-progress-bar"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1 and 'unknown parameter "sedes"; did you mean "seeds"?' in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
