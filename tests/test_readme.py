"""What README.md tells people to type exists and works."""
import re
import shlex
import subprocess

import pytest
import readme
from conftest import PIPELINE, ROOT, TOOLS

from blip2mgm import cli

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
WRITTEN = not set(PIPELINE) - set(cli.stage_names())


def test_readme_is_the_index_notebook():
    assert README == readme.text(), "run `make readme`"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.M))))
def test_make_targets_exist(target):
    assert target in TARGETS


def test_help_names_every_target():
    text = subprocess.run(["make", "-s", "help"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert {"demo", "test", "lab", "foundation", "export", "readme", "clean"} <= set(re.findall(r"^  ([a-z]+) ", text, re.M))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "blip2mgm" in c and "papermill" not in c])
def test_blip2mgm_commands_are_understood(command, capsys):
    args = cli.parser().parse_args(shlex.split(command)[1:])
    if getattr(args, "profile", "params/mine") != "params/mine": assert cli.main(["check", args.profile]) == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if "papermill" in c])
def test_papermill_commands_run(command, tmp_path):
    words = shlex.split(command)[1:]
    words = [str(ROOT / w) if w.startswith(("nbs/", "params/")) else w for w in words]
    subprocess.run([str(TOOLS / "papermill"), *words, "-p", "run", str(tmp_path / "run"), "--no-progress-bar"], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "out.ipynb").is_file()


@pytest.mark.skipif(not WRITTEN, reason="the stages are not all written yet")
@pytest.mark.parametrize("block", [b for kind, b in BLOCKS if kind == "python"])
def test_python_examples_run(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(block, {})


def test_files_the_readme_links_to_exist():
    if not WRITTEN: pytest.skip("the stages are not all written yet")
    assert [l for l in re.findall(r"\]\(([^)#]+)\)", README) if not l.startswith("http") and not (ROOT / l).exists()] == []
