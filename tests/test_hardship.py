"""A run among hardships: each ends in one message that says what to do, with the notebook kept as far as it got, and the run goes on when the cause is gone."""
import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT
from test_cli import DRIVER, ONE, TWO, run, small, start, until, write_notebook  # noqa: F401

from blip2mgm import core
from blip2mgm.runner import failure

FAULTS = {
    "a package that is missing": ("import no_such_package", ["the package no_such_package is not installed in", "pip install -r requirements.txt"]),
    "a full disk": ("open('/dev/full', 'w').write('x' * 10000)", ["No space left on device", "make room there", "what was complete is kept"]),
    "a folder that is read-only": ("raise OSError(30, 'Read-only file system', '/data/x')", ["cannot write in /data/x", "read-only", "--run"]),
    "no permission": ("raise PermissionError(13, 'Permission denied', '/data/x')", ["no permission to read or write in /data/x"]),
    "a model folder that is missing": ("raise UserError('the model folder models/x holds no gemma')", ["the model folder models/x holds no gemma"]),
    "the GPU's memory used up": ("class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')", ["halve micro_batch", "params/24gb"]),
    "the memory used up": ("bytearray(1 << 60)", ["the memory is used up", "fewer workers"]),
}


def what_papermill_says(code):
    "The error that papermill raises for a cell with this code"
    import traceback
    from papermill.exceptions import PapermillExecutionError
    try: exec(code, {"UserError": core.UserError})
    except Exception as e: return PapermillExecutionError(5, 5, code, type(e).__name__, str(e), traceback.format_exc().splitlines())


@pytest.mark.parametrize("fault", FAULTS)
def test_one_message_that_says_what_to_do(tmp_path, fault):
    code, words = FAULTS[fault]
    said = str(failure("two", what_papermill_says(code), tmp_path / "two.ipynb", "blip2mgm run small"))
    assert [w for w in words if w not in said] == [], said
    assert said.startswith("the stage two failed in cell [5]") and "Traceback" not in said and "to go on from there: blip2mgm run small" in said


def test_the_notebook_is_kept_and_the_run_goes_on(small, capsys):
    code, words = FAULTS["a full disk"]
    write_notebook(small / "nbs/20_two.ipynb", [*TWO[:3], code, TWO[3]])
    status, out, err = run(capsys, "run", "small")
    assert status == 1 and [w for w in words if w not in err] == [], err
    assert err.startswith("blip2mgm: the stage two failed") and "Traceback" not in err
    assert "one = read_json" in (small / "runs/small/two/two.ipynb").read_text()
    write_notebook(small / "nbs/20_two.ipynb", TWO)
    status, out, _ = run(capsys, "run", "small")
    assert status == 0 and "one       unchanged" in out and core.read_json(small / "runs/small/two/sum.json") == 13


def test_a_disk_that_fills_while_the_notebook_is_kept(small, capsys, monkeypatch):
    from papermill.iorw import LocalHandler
    write, times = LocalHandler.write, []

    def full(self, buf, path):
        times.append(path)
        if len(times) == 4: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(self, buf, path)

    monkeypatch.setattr(LocalHandler, "write", full)
    status, _, err = run(capsys, "run", "small")
    assert status == 1 and "the disk is full" in err and "its process died" not in err and "Traceback" not in err
    assert (small / "runs/small/one/one.ipynb").is_file()
    monkeypatch.setattr(LocalHandler, "write", write)
    assert run(capsys, "run", "small")[0] == 0


@pytest.mark.parametrize("at", [1, 3])
def test_a_full_disk_takes_nothing_that_was_complete(small, capsys, monkeypatch, at):
    "The disk is full at the first, second ... file that the command line itself writes; whatever was finished still stands"
    assert run(capsys, "run", "small")[0] == 0
    before = {s: (small / f"runs/small/{s}/record.json").read_bytes() for s in ("one", "two")}
    (small / "params/small/two.yaml").write_text("n: 20\n")
    replace, times = os.replace, []

    def full(a, b):
        times.append(b)
        if len(times) == at: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(b))
        return replace(a, b)

    monkeypatch.setattr(os, "replace", full)
    status, _, err = run(capsys, "run", "small")
    monkeypatch.setattr(os, "replace", replace)
    assert (small / "runs/small/one/record.json").read_bytes() == before["one"]
    assert status == 0 or "the disk is full" in err
    assert not list((small / "runs").rglob("*.part"))
    status, out, _ = run(capsys, "run", "small")
    assert status == 0 and "one       unchanged" in out and core.read_json(small / "runs/small/two/sum.json") == 23


def test_papermill_by_hand_and_the_command_line_do_not_meet_in_one_stage(small, capsys):
    process = start(PAUSE="30")
    until((small / "runs/small/one/config.yaml").is_file)
    code = "import sys; from blip2mgm.stage import Stage; from types import SimpleNamespace as N; c = N(run=sys.argv[1]); c.to_dict = lambda: {}; Stage('one', c)"
    said = subprocess.run([PYTHON, "-c", code, str(small / "runs/small")], text=True, capture_output=True).stderr
    assert "another process is at work in" in said
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert run(capsys, "run", "small")[0] == 0


def test_many_runs_side_by_side_in_one_runs_folder(small):
    driver = DRIVER.replace("'small'])", "'small', '--run', sys.argv[2]])")
    folders = [small / f"runs/r{i}" for i in range(2)]
    work = [subprocess.Popen([PYTHON, "-c", driver, str(Path(__file__).parent), str(f)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for f in folders]
    assert [(p.communicate(timeout=120)[1], p.returncode) for p in work] == [("", 0)] * 2
    assert [core.read_json(f / "two/sum.json") for f in folders] == [13] * 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_really_read_only(small, capsys):
    (small / "locked").mkdir(mode=0o500)
    status, _, err = run(capsys, "run", "small", "--run", str(small / "locked" / "r"))
    assert status == 2 and "no permission to read or write" in err


# The example scripts
def script(name, *args, **env):
    return subprocess.run(["bash", str(ROOT / "examples" / name), *args], text=True, capture_output=True, env=os.environ | env, timeout=60)


def fake(tmp_path, body):
    command = tmp_path / "blip2mgm"
    command.write_text(f"#!/bin/bash\n{body}\n")
    command.chmod(0o755)
    return {"BLIP2MGM": str(command), "LOG": str(tmp_path / "a.log"), "SLURM_SUBMIT_DIR": str(tmp_path)}


def test_cron_keeps_a_log_and_is_silent_when_all_is_well(tmp_path):
    done = script("cron.sh", "demo", "--force", **fake(tmp_path, 'echo "ran $*"'))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and "ran run demo --force" in (tmp_path / "a.log").read_text()


def test_cron_says_what_failed(tmp_path):
    done = script("cron.sh", "demo", **fake(tmp_path, "echo 'blip2mgm: the disk is full' >&2; exit 1"))
    assert done.returncode == 1 and "ended with 1" in done.stderr and "the disk is full" in done.stderr


def test_slurm_runs_the_profile_of_its_task(tmp_path):
    env = fake(tmp_path, 'echo "ran $*"')
    assert script("slurm.sh", "demo", "controls", SLURM_ARRAY_TASK_ID="1", **env).stdout == "ran run controls\n"
    done = script("slurm.sh", "demo", SLURM_ARRAY_TASK_ID="4", **env)
    assert done.returncode == 2 and "no profile number 4" in done.stderr


def test_slurm_passes_the_signal_on_and_asks_to_be_queued_again(tmp_path):
    env = fake(tmp_path, "trap 'exit 130' TERM; touch started; for i in $(seq 200); do sleep 0.1; done")
    queue = tmp_path / "scontrol"
    queue.write_text(f"#!/bin/bash\necho $* > {tmp_path}/queued\n")
    queue.chmod(0o755)
    process = subprocess.Popen(["bash", str(ROOT / "examples/slurm.sh"), "demo"], env=os.environ | env | {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    until((tmp_path / "started").is_file)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130 and (tmp_path / "queued").read_text() == "requeue 7\n"
