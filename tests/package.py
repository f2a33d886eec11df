"""The source archive, and the wheel made from it: `python tests/package.py FOLDER`. Nothing is fetched."""
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOOK = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"


def hook(name: str, source, out):
    "One step of building, as an installer would call it, in a process of its own"
    done = subprocess.run([sys.executable, "-c", HOOK, name, str(out)], cwd=source, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr}")


def build(out, source=ROOT) -> tuple[Path, Path]:
    "Source archive and wheel in the folder `out`; the wheel is made from the archive, not from the checkout"
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    hook("build_sdist", source, out)
    archive = max(out.glob("*.tar.gz"), key=os.path.getmtime)
    with tempfile.TemporaryDirectory() as tmp:
        with tarfile.open(archive) as packed: packed.extractall(tmp, filter="data")
        hook("build_wheel", Path(tmp) / archive.name.removesuffix(".tar.gz"), out)
    return archive, max(out.glob("*.whl"), key=os.path.getmtime)


if __name__ == "__main__":
    build(sys.argv[1])
