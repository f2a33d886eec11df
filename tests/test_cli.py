"""The command line on a project of two small stages, made here."""
import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PYTHON

from blip2mgm import cli, core
from blip2mgm.runner import leftovers
from blip2mgm.core import Config

STAGE = """
from blip2mgm.core import write_json, read_json, UserError
from blip2mgm.show import track
from blip2mgm.stage import Stage
from types import SimpleNamespace
import os, time
cfg = SimpleNamespace(run=run, n=n)
cfg.to_dict = lambda: {"run": run, "n": n}
stage = Stage(NAME, cfg)
"""
ONE = ["run: str = 'runs/small'\nn: int = 1  # how many", "NAME = 'one'" + STAGE,
       "for i in track(range(n), 'counting'): time.sleep(float(os.environ.get('PAUSE', 0)))", "assert n < 90, 'too many'",
       "write_json(stage.dir/'n.json', n)\nstage.finish(['n.json'])"]
TWO = ["run: str = 'runs/small'\nn: int = 1", "NAME = 'two'" + STAGE, "one = read_json(stage.upstream('one')/'n.json')",
       "write_json(stage.dir/'sum.json', one + n)\nstage.finish(['sum.json'])"]


@dataclass
class OneConfig(Config):
    run: str = "runs/small"
    n: int = 1


class TwoConfig(OneConfig): pass


def write_notebook(path, sources, tag="parameters"):
    import nbformat

    cells = [nbformat.v4.new_code_cell(s) for s in sources]
    cells[0].metadata["tags"] = [tag]
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))


def install():
    "Let this process know the two stages"
    for name, cls in (("one", OneConfig), ("two", TwoConfig)):
        module = sys.modules[f"blip2mgm.{name}"] = types.ModuleType(f"blip2mgm.{name}")
        setattr(module, f"{name.title()}Config", cls)
    core.project_root.cache_clear()


@pytest.fixture
def small(tmp_path, monkeypatch):
    for folder in ("nbs", "params/small", "elsewhere"): (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    write_notebook(tmp_path / "nbs" / "10_one.ipynb", ONE)
    write_notebook(tmp_path / "nbs" / "20_two.ipynb", TWO)
    (tmp_path / "params" / "small" / "one.yaml").write_text("n: 3\n")
    (tmp_path / "params" / "small" / "two.yaml").write_text("n: 10\n")
    monkeypatch.setenv("BLIP2MGM_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path / "elsewhere")
    install()
    yield tmp_path
    for name in ("one", "two"): sys.modules.pop(f"blip2mgm.{name}", None)
    core.project_root.cache_clear()


def run(capsys, *args):
    status = cli.main(list(args))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_runs_keeps_and_runs_again_what_changed(small, capsys):
    status, out, err = run(capsys, "run", "small")
    assert (status, err) == (0, "") and "[1/2] one" in out and "[2/2] two" in out and out.count("done in") == 2
    assert core.read_json(small / "runs/small/two/sum.json") == 13
    assert (small / "runs/small/one/one.ipynb").is_file() and (small / "runs/small/one/one.html").is_file()
    assert run(capsys, "run", "small")[1].count("unchanged, kept") == 2
    assert "up to date" in run(capsys, "status", "small")[1]

    (small / "params/small/two.yaml").write_text("n: 20\n")
    assert "to run: config changed" in run(capsys, "status", "small")[1]
    out = run(capsys, "run", "small")[1]
    assert "one       unchanged" in out and "two       running (config changed)" in out
    assert core.read_json(small / "runs/small/two/sum.json") == 23

    write_notebook(small / "nbs/10_one.ipynb", [*ONE[:-1], ONE[-1].replace("'n.json', n", "'n.json', n + 1")])
    out = run(capsys, "run", "small")[1]
    assert "one       running (notebook changed)" in out and "two       running (one changed)" in out
    assert core.read_json(small / "runs/small/two/sum.json") == 24

    (small / "runs/small/two/sum.json").write_text("1")
    assert "running (sum.json is missing or was changed)" in run(capsys, "run", "small")[1]
    assert run(capsys, "run", "small", "--force")[1].count("asked to") == 2
    assert run(capsys, "run", "small", "--only", "two", "--force")[1].count("done in") == 1


def test_another_run_folder_is_taken_from_where_the_command_is_given(small, capsys):
    assert run(capsys, "run", "small", "--run", "mine")[0] == 0
    assert core.read_json(small / "elsewhere/mine/two/sum.json") == 13


def test_a_folder_of_ones_own(small, capsys):
    (small / "elsewhere/own").mkdir()
    (small / "elsewhere/own/one.yaml").write_text("run: runs/own\nn: 5\n")
    assert run(capsys, "run", "own")[0] == 0
    assert core.read_json(small / "runs/own/one/n.json") == 5


@pytest.mark.parametrize("file, text, says", [
    ("one.yaml", "nn: 3", 'params/small/one.yaml: unknown parameter "nn"; did you mean "n"?'),
    ("one.yaml", "n: three", "params/small/one.yaml: parameter n expects int, got 'three'"),
    ("one.yaml", "n: 3e4", "write 3.0e+4"),
    ("one.yaml", "run: runs/other", "disagree about run: one says runs/other, two says runs/small"),
    ("tow.yaml", "n: 3", 'params/small/tow.yaml belongs to no stage; did you mean "two"?'),
])
def test_nothing_runs_with_wrong_parameters(small, capsys, file, text, says):
    (small / "params/small" / file).write_text(text)
    for command in ("check", "run"):
        status, out, err = run(capsys, command, "small")
        assert status == 2 and says in err and "Traceback" not in err
    assert not (small / "runs").exists()


def test_all_problems_are_told_at_once(small, capsys):
    (small / "params/small/one.yaml").write_text("nn: 3\n")
    (small / "params/small/two.yaml").write_text("n: x\n")
    err = run(capsys, "check", "small")[2]
    assert "one.yaml" in err and "two.yaml" in err


def test_a_missing_file_of_an_earlier_stage(small, capsys):
    (small / "params/small/one.yaml").unlink()
    assert "two builds on one, and there is no params/small/one.yaml" in run(capsys, "run", "small")[2]


def test_a_notebook_that_lost_its_tag_is_refused(small, capsys):
    write_notebook(small / "nbs/20_two.ipynb", TWO, tag="hide-input")
    status, out, err = run(capsys, "run", "small")
    assert status == 2 and "20_two.ipynb has no cells tagged `parameters`" in err and not (small / "runs").exists()


def test_a_parameters_cell_that_differs_from_the_dataclass(small, capsys):
    write_notebook(small / "nbs/20_two.ipynb", [TWO[0] + "\nmore: int = 3", *TWO[1:]])
    assert "disagree about more" in run(capsys, "check", "small")[2]


@pytest.mark.parametrize("args, says", [
    (["run", "smal"], 'did you mean "small"?'),
    (["run", "small", "--only", "tow"], 'this profile has no stage tow; did you mean "two"?'),
    (["run", "small", "--only", "two"], "two needs the result of one, which is not finished"),
    (["clean", "small", "--yes"], "nothing to remove"),
])
def test_wrong_commands(small, capsys, args, says):
    status, _, err = run(capsys, *args)
    assert status == 2 and says in err and len(err.splitlines()) == 1


def test_a_failing_cell_is_named_and_the_run_goes_on_from_there(small, capsys):
    run(capsys, "run", "small")
    (small / "params/small/two.yaml").write_text("n: 5\n")
    write_notebook(small / "nbs/20_two.ipynb", [*TWO[:3], "1 / 0", TWO[3]])
    status, out, err = run(capsys, "run", "small")
    assert status == 1 and "the stage two failed in cell [5], `1 / 0`" in err and "ZeroDivisionError: division by zero" in err
    assert "runs/small/two/two.ipynb" in err and "blip2mgm run small" in err and "Traceback" not in err
    assert "ZeroDivisionError" in (small / "runs/small/two/two.ipynb").read_text()
    assert "Traceback" in run(capsys, "run", "small", "--debug")[2]
    write_notebook(small / "nbs/20_two.ipynb", TWO)
    out = run(capsys, "run", "small")[1]
    assert "one       unchanged" in out and core.read_json(small / "runs/small/two/sum.json") == 8


def test_an_error_of_the_users_making_is_told_as_it_is(small, capsys):
    write_notebook(small / "nbs/10_one.ipynb", [*ONE[:3], "raise UserError('the data folder is empty')"])
    err = run(capsys, "run", "small")[2]
    assert "\n  the data folder is empty\n" in err and "UserError:" not in err


def test_a_notebook_whose_process_dies(small, capsys):
    write_notebook(small / "nbs/10_one.ipynb", [*ONE[:3], "os._exit(1)"])
    status, _, err = run(capsys, "run", "small")
    assert status == 1 and "its process died" in err


def test_a_notebook_without_finish_does_not_count(small, capsys):
    write_notebook(small / "nbs/10_one.ipynb", ONE[:3])
    assert "without `stage.finish(...)`" in run(capsys, "run", "small")[2]


def test_clean_asks_and_spares_other_folders(small, capsys, monkeypatch):
    run(capsys, "run", "small")
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert "nothing was removed" in run(capsys, "clean", "small")[1] and (small / "runs/small").is_dir()
    assert "left alone" in run(capsys, "clean", "small", "--run", "..", "--yes")[2] and (small / "nbs").is_dir()
    assert run(capsys, "clean", "small", "--yes")[0] == 0 and not (small / "runs/small").exists()


DRIVER = "import sys; sys.path.insert(0, sys.argv[1]); import test_cli, blip2mgm.cli as c; test_cli.install(); sys.exit(c.main(['run', 'small']))"


def start(**env):
    return subprocess.Popen([PYTHON, "-c", DRIVER, str(Path(__file__).parent)], env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.parametrize("how, status", [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_stopped_and_started_again(small, capsys, how, status):
    process = start(PAUSE="30")
    until((small / "runs/small/one/config.yaml").is_file)
    if how == signal.SIGINT:
        assert "another `blip2mgm run` is at work" in run(capsys, "run", "small")[2]
    process.send_signal(how)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status and "Traceback" not in err
    if how != signal.SIGKILL: assert "the same command goes on from there" in err
    assert run(capsys, "run", "small")[0] == 0
    assert leftovers(small / "runs/small") == [] and core.read_json(small / "runs/small/two/sum.json") == 13


def test_progress_is_shown(small):
    process = start(PAUSE="0.5")
    out, err = process.communicate(timeout=60)
    assert "[1/2] one         counting" in out and err == ""


def test_help_is_quick_and_complete(capsys):
    start = time.monotonic()
    text = subprocess.run(["blip2mgm", "--help"], text=True, capture_output=True, check=True).stdout
    assert time.monotonic() - start < 3  # 0.4 s on a free machine
    for command in ("run", "check", "status", "list", "lab", "clean"):
        assert f"\n    {command} " in text
        assert "--debug" in subprocess.run(["blip2mgm", command, "--help"], text=True, capture_output=True, check=True).stdout


def test_version(capsys):
    with pytest.raises(SystemExit): cli.main(["--version"])
    assert capsys.readouterr().out.startswith("blip2mgm 0.")


def test_lab_stays_on_this_machine():
    command = cli.lab_command()
    assert "--ServerApp.ip=127.0.0.1" in command and not any("token=" in c and c.endswith("=") for c in command)


def test_the_kernel_is_this_python_whatever_is_registered(small, capsys, monkeypatch):
    spec = small / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "wrong", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(small / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(small / "jupyter"))
    assert run(capsys, "run", "small")[0] == 0
