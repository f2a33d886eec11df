"""README.md is nbs/index.ipynb as Markdown, README.zh.md the same in Chinese: `python tests/readme.py` writes both.

The Chinese page is docs/README.zh.in.md with its code, tables of numbers and the verdict's numbers filled in from README.md.
"""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX, FIGURE = ROOT / "nbs" / "index.ipynb", ROOT / "runs/demo/report/difference.png"
VERDICT = (r"With the captions of (\w+) the model scores ([\d.]+%) on (\w+), with those of (\w+) ([\d.]+%): a difference of (\S+) points, "
           r"95% interval (\S+) to (\S+) \((\d+) seeds, ([\d,]+) questions on ([\d,]+) pictures\)\. Verdict: better, because .+? in ([\d.]+%) of")
MEASURED = r"Measured with `make demo` on (\d+) cores of an (.+?), (\d+) GiB, (.+?), installation not counted: ([\d.]+) minutes"


def text() -> str:
    "The notebook as it stands, with the code of cells tagged `remove-input` left out"
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import TagRemovePreprocessor

    exporter = MarkdownExporter()
    exporter.register_preprocessor(TagRemovePreprocessor(remove_input_tags={"remove-input"}), enabled=True)
    body = exporter.from_filename(str(INDEX))[0]
    body = re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", body).replace("](../", "](")  # links start from the folder of the README
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def tables(page: str) -> list[list[str]]:
    "The lines of each table below its head"
    return [m[0].splitlines()[2:] for m in re.finditer(r"(?:^\|.*\n)+", page, re.M)]


def chinese(page: str) -> str:
    "The page in Chinese, with code, times and the verdict taken from the English one"
    code, (verdict, measured) = re.findall(r"^```.*?^```$", page, re.M | re.S), (re.search(p, page) for p in (VERDICT, MEASURED))
    filled = (ROOT / "docs/README.zh.in.md").read_text(encoding="utf-8")
    for i, block in enumerate(code, 1): filled = filled.replace(f"[[code {i}]]", block)
    filled = filled.replace("[[times]]", "\n".join(tables(page)[0]) if measured else "")
    for name, found in (("verdict", verdict), ("measured", measured)):
        line = next(l for l in filled.splitlines() if l.startswith(f"[[{name}]]"))
        said = line.removeprefix(f"[[{name}]]").strip()
        for i, value in enumerate(found.groups() if found else (), 1): said = said.replace(f"[{i}]", value.replace("no GPU", "无 GPU"))
        filled = filled.replace(line, said if found else next((l for l in page.splitlines() if l.startswith("**Result")), ""))
    return filled


def small_figure():
    "The demo's main figure, small enough to be kept"
    from PIL import Image

    if not FIGURE.is_file(): return
    picture = Image.open(FIGURE).convert("RGB")
    picture.resize((900, round(900 * picture.height / picture.width)), Image.LANCZOS).quantize(64).save(ROOT / "docs/result.png", optimize=True)


if __name__ == "__main__":
    tool = Path(sys.executable).parent
    run = [sys.executable, "-m", "nbconvert", "--log-level=ERROR", "--to=notebook", "--execute", "--inplace"]
    subprocess.run([*run, str(INDEX)], check=True)
    subprocess.run([str(tool / "nbdev_clean"), "--fname", str(INDEX)], check=True, cwd=ROOT)
    small_figure()
    (ROOT / "README.md").write_text(text(), encoding="utf-8")
    (ROOT / "README.zh.md").write_text(chinese(text()), encoding="utf-8")
