"""README.md is nbs/index.ipynb as Markdown: `python tests/readme.py` runs the notebook and writes it."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "nbs" / "index.ipynb"


def text() -> str:
    "The notebook as it stands, with the code of cells tagged `remove-input` left out"
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import TagRemovePreprocessor

    exporter = MarkdownExporter()
    exporter.register_preprocessor(TagRemovePreprocessor(remove_input_tags={"remove-input"}), enabled=True)
    body = exporter.from_filename(str(INDEX))[0]
    body = re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", body)  # links start from the folder of the README
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    tool = Path(sys.executable).parent
    run = [sys.executable, "-m", "nbconvert", "--log-level=ERROR", "--to=notebook", "--execute", "--inplace"]
    subprocess.run([*run, str(INDEX)], check=True)
    subprocess.run([str(tool / "nbdev_clean"), "--fname", str(INDEX)], check=True, cwd=ROOT)
    (ROOT / "README.md").write_text(text(), encoding="utf-8")
