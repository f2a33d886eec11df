"""The pages: links lead somewhere, commands are understood, both READMEs say the same, the reference builds."""
import re
import shlex
import shutil
import subprocess

import pytest
import readme
import yaml
from conftest import PYTHON, ROOT

from blip2mgm import cli
from blip2mgm.world import ensure_world

PAGES = [*sorted(p for p in (ROOT / "docs").glob("*.md") if ".in." not in p.name), *(ROOT / n for n in ("README.md", "README.zh.md", "CONTRIBUTING.md", "LOG.md", "CHANGELOG.md"))]
TEXT = {p: p.read_text(encoding="utf-8") for p in PAGES}
ENGLISH, CHINESE = ((ROOT / n).read_text(encoding="utf-8") for n in ("README.md", "README.zh.md"))
COMMANDS = sorted({line for text in TEXT.values() for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines() if re.match(r"(\.venv/bin/)?blip2mgm ", line)})
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@pages
def test_links_lead_somewhere(page):
    links = [l for l in re.findall(r"\]\(([^)#]+)\)", TEXT[page]) if not l.startswith("http")]
    assert [l for l in links if not (page.parent / l).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command): cli.parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "errors.md"], ids=lambda p: p.name)   # errors.md names what is not there
def test_parameter_files_and_make_targets_that_are_named_exist(page):
    files = re.findall(r"params/(?:smoke|demo|recipes|deepspeed|controls)/[\w.]+", TEXT[page])
    assert [f for f in files if not (ROOT / f).exists() and not f.endswith("mine.yaml")] == []
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z]+)`", TEXT[page])) <= targets


def test_the_way_to_a_profile_of_your_own_works(tmp_path):
    block = next(b for b in re.findall(r"```sh\n(.*?)```", (ROOT / "docs/own-data.md").read_text(), re.S) if "sed" in b)
    shutil.copytree(ROOT / "params", tmp_path / "params")
    data = ensure_world(tmp_path / "data", "smoke")
    lines = [l.replace("path/to/data", str(data)) for l in block.splitlines() if not l.startswith("blip2mgm")]
    subprocess.run("\n".join(lines), shell=True, cwd=tmp_path, check=True)
    steps = cli.load_profile(str(tmp_path / "params/mine"))
    assert {s.cfg.run for s in steps} == {"runs/mine"} and len(steps) == 5


def test_both_readmes_say_the_same():
    assert CHINESE == readme.chinese(ENGLISH), "run `make readme`"
    parts = lambda page: re.split(r"^## ", page, flags=re.M)
    blocks = lambda page: re.findall(r"^```.*?^```$", page, re.M | re.S)
    code = lambda page: sorted(c for c in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)) if c != "blip2mgm")
    numbers = lambda page: sorted(re.findall(r"(?<![\w.])[+-]?\d[\d,.]*\d%?|(?<![\w.])\d%?", re.sub(r"\]\([^)]*\)|`[^`\n]*`|```.*?```", " ", page, flags=re.S)))
    assert len(parts(ENGLISH)) == len(parts(CHINESE)) and blocks(ENGLISH) == blocks(CHINESE) and "[[" not in CHINESE
    for ours, theirs in zip(parts(ENGLISH)[1:], parts(CHINESE)[1:]): assert (code(ours), numbers(ours)) == (code(theirs), numbers(theirs)), ours[:40]
    assert set(numbers(parts(ENGLISH)[0])) == set(numbers(parts(CHINESE)[0]))


def test_the_readme_shows_the_result_first():
    assert ENGLISH.index("Result of the demo") < ENGLISH.index("docs/result.png") < ENGLISH.index("## Two commands")
    assert (ROOT / "docs/result.png").stat().st_size < 60_000
    order = ["Two commands", "Your own data", "On a 24 GB GPU", "On a cluster", "As a library"]
    assert re.findall(r"^## (.+)$", ENGLISH, re.M)[:5] == order


def test_the_citation_file_has_what_is_needed():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= said.keys() and said["license"] == "Apache-2.0"
    assert f'version = "{said["version"]}"' in (ROOT / "pyproject.toml").read_text() and all(a.keys() & {"name", "family-names"} for a in said["authors"])


def test_messages_in_the_troubleshooting_page_exist_in_the_code():
    code = "\n".join(p.read_text() for p in [*(ROOT / "blip2mgm").glob("*.py"), ROOT / "Makefile"])
    quoted = [p.strip() for q in re.findall(r'^\*\*"(.+?)"', TEXT[ROOT / "docs/troubleshooting.md"], re.M) for p in re.split(r"\.\.\.|;", q) if len(p.strip()) > 8]
    assert len(quoted) > 8 and [q for q in quoted if q not in code and "lr expects" not in q] == []


def test_no_host_of_a_package_registry_is_named():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode: pytest.skip("not a git checkout")
    named = re.compile("|".join(("pypi" + r"\.org", "python" + "hosted", "conda" + r"\.anaconda")))
    texts = [ROOT / f for f in files.stdout.split("\0") if f and (ROOT / f).suffix in (".md", ".txt", ".lock", ".toml", ".ini", ".py", ".yaml", ".cff", "") and (ROOT / f).is_file()]
    assert [p.name for p in texts if named.search(p.read_text(errors="replace"))] == []


def test_the_reference_builds(tmp_path):
    done = subprocess.run([PYTHON, "-W", "ignore", "-m", "pdoc", "blip2mgm.core", "blip2mgm.show", "blip2mgm.runner", "--docformat", "markdown", "-o", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "blip2mgm/core.html").read_text()
    assert "atomic_path" in page and "all or nothing" in page
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=.https?:", page), "it reads without a network"
    assert "_docs/" in (ROOT / ".gitignore").read_text()
