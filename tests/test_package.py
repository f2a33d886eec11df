"""What an installer gets: the archive, the wheel, and a run from an empty folder with nothing but the wheel."""
import os
import re
import subprocess
import zipfile
from email.parser import Parser

import package
import pytest
from conftest import PYTHON, ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("blip2mgm", "nbs", "params", "tests", "docs", "pyproject.toml", "settings.ini", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists(): (source / name).symlink_to(ROOT / name)
    return package.build(out, source)[1]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "The unpacked wheel, first on the path of what runs in an empty folder"
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    zipfile.ZipFile(wheel).extractall(site)
    env = {k: v for k, v in os.environ.items() if not k.startswith("BLIP2MGM")} | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def call(*words):
        main = "import sys; from blip2mgm.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run([PYTHON, "-c", main, *words], cwd=empty, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    call.site, call.empty, call.env = site, empty, env
    return call


def test_the_wheel_holds_all_that_a_run_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    want = {f"blip2mgm/{p.relative_to(ROOT).as_posix()}" for g in ("nbs/[1-7]0_*.ipynb", "nbs/index.ipynb", "params/**/*.*") for p in ROOT.glob(g)}
    want |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "blip2mgm").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert len(want) > 100 and want <= names
    assert {n for n in names if not n.startswith("blip2mgm-")} == want, "and nothing else"


def test_the_wheel_says_which_pythons_and_packages_it_needs(wheel):
    said = Parser().parsestr(next(zipfile.ZipFile(wheel).read(n).decode() for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA")))
    assert set(said["Requires-Python"].split(",")) == {">=3.10", "<3.13"}
    needs = {re.match(r"[\w-]+", n)[0] for n in said.get_all("Requires-Dist") if "extra ==" not in n}
    assert {"torch", "transformers", "py-data-juicer", "aiohttp", "ray", "papermill", "jupyterlab"} <= needs


def test_it_runs_in_an_empty_folder(installed):
    assert "usage: blip2mgm" in installed("--help")
    assert "all parameters are in order" in installed("check", "smoke")
    assert not list(installed.empty.iterdir()), "looking leaves nothing behind"
    assert "done in" in installed("run", "smoke", "--only", "explore")
    assert (installed.empty / "runs/smoke/explore/record.json").is_file() and [p.name for p in installed.empty.iterdir()] == ["runs"]
    assert "unchanged, kept" in installed("run", "smoke", "--only", "explore")


def test_its_recipes_models_and_notebooks_are_found(installed):
    code = """if 1:
        import blip2mgm, pathlib
        from blip2mgm.core import resolve, weights_dir
        from blip2mgm.recipe import model_path
        site = pathlib.Path(blip2mgm.__file__).parent
        assert weights_dir() == site / "weights" and pathlib.Path(model_path("blip2mgm/weights/blip2")) == site / "weights/blip2"
        assert resolve("params/recipes/basic.yaml") == site / "params/recipes/basic.yaml" and resolve("blip2mgm/mapper.py") == site / "mapper.py"
        assert resolve("runs/x") == pathlib.Path.cwd() / "runs/x" and resolve("weights") == pathlib.Path.cwd() / "weights"
        from blip2mgm.cli import lab_command
        lab_command()
        assert pathlib.Path("nbs/30_train.ipynb").is_file() and resolve("params/demo") == pathlib.Path.cwd() / "params/demo"
        """
    done = subprocess.run([PYTHON, "-c", code], cwd=installed.empty, env=installed.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [re.fullmatch(r"([\w.-]+)==([\w.]+)(?: ; (.+))?", l).groups() for l in lines if not l.startswith("#")]


def test_the_lock_holds_every_pin_and_no_place():
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.M)
    canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    have = {(canonical(n), v) for n, v, _ in locked()}
    assert [p for p in pins if (canonical(p[0]), p[1]) not in have] == [] and ("torch", "2.13.0") in have
    assert not re.search(r"https?:|file:|index|/", (ROOT / "requirements.lock").read_text())


def test_this_environment_is_the_locked_one():
    from importlib.metadata import PackageNotFoundError, version
    from packaging.markers import Marker

    odd = {}
    for name, want, marker in locked():
        if marker and not Marker(marker).evaluate(): continue
        try: have = version(name).split("+")[0]
        except PackageNotFoundError: continue  # parts for GPUs and other systems
        if have != want: odd[name] = (have, want)
    assert odd == {}, "make lock, or install again"


def test_the_container_file_installs_the_locked_set():
    text = (ROOT / "Containerfile").read_text()
    assert "requirements.lock" in text and re.search(r"^USER \w+", text, re.M) and "EXPOSE" not in text
