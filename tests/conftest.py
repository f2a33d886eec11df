import json
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell hands that on to what it starts in the background
ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
TOOLS = Path(sys.executable).parent  # the console commands installed beside this Python
PIPELINE = ["explore", "enhance", "train", "evaluate", "report"]
os.environ["PATH"] = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"


def cells(notebook, kind="code"):
    "Sources and tags of a notebook's cells of one kind"
    found = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    return [("".join(c["source"]), c["metadata"].get("tags", [])) for c in found if c["cell_type"] == kind]


def pytest_collection_modifyitems(items):
    "The runs of the whole pipeline first: files are shared out among the processes in this order, and these take longest"
    items.sort(key=lambda item: item.path.stem != "test_pipeline")


@pytest.fixture
def project(tmp_path):
    "A small copy of the project's notebooks, package, parameters and settings to change at will"
    import shutil

    for name in ("nbs", "blip2mgm", "params"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("weights", "__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path
