"""Nothing untrusted gets out of its place: not into a page, not out of its folder, not into memory, not into a record."""
import base64
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT
from PIL import Image

from blip2mgm import enhance, own
from blip2mgm.core import UserError, inside
from blip2mgm.data import gate
from blip2mgm.formats import text_of
from blip2mgm.show import show_table

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg/onload=alert(3)>${7*7}{{7*7}}"


class Live(HTMLParser):
    "Elements and attributes that would do something"
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "iframe", "object", "embed", "svg") or any(k.startswith("on") for k, _ in attrs): self.found.append((tag, attrs))


def live(text): return [(tag, attrs) for tag, attrs in Live(text).found if "alert" in str(attrs) or tag in ("iframe", "object", "embed")] + re.findall(r"<script>alert", text)


def picture(format="PNG", size=(8, 8)):
    Image.new("RGB", size, "red").save(out := io.BytesIO(), format)
    return out.getvalue()


# Pages
def test_tables_escape():
    assert live(show_table([{EVIL: EVIL}])._repr_html_()) == [] and "&lt;script&gt;" in show_table([{"a": EVIL}])._repr_html_()


def test_the_gate_and_its_reasons_escape(tmp_path):
    found = gate([{"id": EVIL, "text": text_of(EVIL), "images": [EVIL]}], tmp_path)
    assert live(found._repr_html_()) == []


def test_the_page_of_a_notebook_escapes_what_was_printed(tmp_path):
    import nbformat
    from blip2mgm.runner import write_page
    output = [nbformat.v4.new_output("stream", name="stdout", text=EVIL), nbformat.v4.new_output("execute_result", {"text/plain": EVIL}),
              nbformat.v4.new_output("error", ename=EVIL, evalue=EVIL, traceback=[EVIL]), nbformat.v4.new_output("execute_result", {"text/html": show_table([{"a": EVIL}])._repr_html_()})]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(repr(EVIL), outputs=output)])
    (tmp_path / "a.ipynb").write_text(nbformat.writes(nb))
    text = write_page(tmp_path / "a.ipynb", tmp_path / "a.html").read_text()
    assert live(text) == [] and text.count("&lt;script&gt;alert") >= 4


def test_every_module_that_writes_html_escapes():
    "Each f-string with a tag and a value in it stands in a module that knows html.escape"
    odd = []
    for path in sorted((ROOT / "blip2mgm").glob("*.py")):
        text = path.read_text()
        if re.search(r"""f["'][^"'\n]*<(td|tr|p|span|div|th|li|a|code|figure|img|details|summary)\b[^"'\n]*\{""", text) and "escape(" not in text: odd.append(path.name)
    assert odd == []


# Paths
@pytest.mark.parametrize("path", ["../a", "/etc/passwd", "a/../../b", "link/passwd", "a\0b", "..", "~root/../../../etc/passwd"])
def test_no_path_leads_out(tmp_path, path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/link").symlink_to("/etc")
    try: found = inside(tmp_path / "d", path)
    except UserError: return
    assert found.is_relative_to((tmp_path / "d").resolve())


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(picture())
    (folder / "good.png").write_bytes(picture())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "away").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    return folder


def test_init_takes_nothing_from_outside_and_writes_nothing_there(photos, tmp_path):
    names = ["good.png", "../secret.png", "link.png", "away/secret.png", "pipe.png", str(tmp_path / "secret.png"), "./x/../good.png"]
    (photos / "captions.jsonl").write_text("".join(json.dumps({"id": str(i), "text": text_of("a bus"), "images": [n]}) + "\n" for i, n in enumerate(names)))
    before = {p.name for p in tmp_path.iterdir()} | {p.name for p in photos.iterdir()}
    source = own.find_source(photos)
    found, _ = own.judged(source)
    assert [r["id"] for r in found.accepted] == ["0"] and len(found.rejected) == 6
    kept = own._keep(found.accepted[0], 0, source.root, tmp_path / "made", "png")
    assert kept["images"] == ["pictures/good.png"]
    assert {p.name for p in tmp_path.iterdir()} | {p.name for p in photos.iterdir()} == before | {"made"}


def test_galleries_of_changed_captions_show_text_as_text(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    line = {"id": "a", "status": "filtered", "by": "text_length_filter", "raw_caption": "<script>1</script>", "final_caption": "<img src=x>", "stats": {"text_len": 7}}
    page = enhance.browse([line, {**line, "status": "rejected", "by": "bad JSON: <b>", "stats": None}], [{"id": "a", "images": ["a.png"]}], tmp_path)._repr_html_()
    assert "dropped by text length filter (1)" in page and "text len: 7" in page and "refused (1)" in page
    assert not any(tag in page for tag in ("<script", "<img src=x", "<b>"))


def test_a_shard_writes_no_file_and_follows_no_link(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in (("../../out.png", tarfile.REGTYPE, ""), ("/etc/out.png", tarfile.REGTYPE, ""), ("l.png", tarfile.SYMTYPE, "/etc/passwd"), ("h.png", tarfile.LNKTYPE, "/etc/passwd"),
                                   ("dev.png", tarfile.CHRTYPE, "")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            data = picture() if kind == tarfile.REGTYPE else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    before = sorted(p for p in tmp_path.rglob("*"))
    found = gate(tmp_path / "a.tar", tmp_path)
    assert found.rows == 5 == len(found.accepted) + len(found.rejected) and found.counts() == {"member is no plain file": 3, "null text": 2}
    assert sorted(p for p in tmp_path.rglob("*")) == before and "root:" not in repr(found.accepted + found.rejected)


# Bombs
def png_bomb(side=30000):
    "A PNG of a hundred kilobytes whose header says 900 million pixels"
    def chunk(kind, data): return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def test_a_picture_that_unpacks_to_too_much_is_refused(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_bomb())
    rows = [{"id": "a", "text": text_of("x"), "images": ["bomb.png"]}, {"id": "b", "text": text_of("x"), "images": [png_bomb()]},
            {"id": "c", "text": text_of("x"), "images": [base64.b64encode(png_bomb()).decode()]}]
    found = gate(rows, tmp_path)
    assert [r["reason"].split(":")[0] for r in found.rejected] == ["decompression bomb"] * 3


# Of this program alone: what getrusage says holds the memory of the process that started it.
MEASURE = "import re; print('peak', int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_gzip_that_unpacks_to_too_much_is_read_line_by_line(tmp_path):
    "700 MiB of one line in a small file: its row is refused, and memory stays below that"
    import gzip
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as f:
        for _ in range(700): f.write(b"x" * (1 << 20))
        f.write(b'\n{"id": "b"}\n')
    code = f"from blip2mgm.formats import iter_rows; print([p[:13] for _, p in iter_rows({str(tmp_path / 'a.jsonl.gz')!r})]); {MEASURE}"
    out = subprocess.run([PYTHON, "-c", code], text=True, capture_output=True, check=True).stdout
    assert "['line too long', '']" in out and int(out.split("peak ")[1]) < 650


# Code
SOURCES = sorted((ROOT / "blip2mgm").glob("*.py"))


@pytest.mark.parametrize("word", [r"\bpickle\.(load|loads|Unpickler)\b", r"\bimport pickle\b", r"trust_remote_code\s*=\s*True", r"\byaml\.(load\((?!.*_Loader)|unsafe_load|full_load)", r"\bos\.system\(",
                                  r"shell\s*=\s*True", r"\btorch\.load\((?![^)]*weights_only=True)", r"(?<![\w.])(eval|exec)\(", r"extractall\(", r"allow_pickle\s*=\s*True", r"joblib\.load", r"verify\s*=\s*False"])
def test_no_code_from_data(word):
    assert [f"{p.name}: {m[0]}" for p in SOURCES for m in re.finditer(word, p.read_text())] == []


def test_models_are_loaded_as_safetensors_only():
    for p in SOURCES:
        for call in re.findall(r"\b(?:AutoModel\w*|\w+ForConditionalGeneration|GemmaForCausalLM|CLIP\w*Model|cls)\.from_pretrained\([^\n]*", p.read_text()):
            assert "use_safetensors=True" in call or "Tokenizer" in call or "Processor" in call or "Config" in call, f"{p.name}: {call}"


# Secrets
def test_secrets_are_in_no_record(tmp_path):
    "A stage run with secrets in its environment and in the addresses around it leaves none of them behind"
    secrets = {"HF_TOKEN": "hf_SECRETSECRET", "WANDB_API_KEY": "wandbSECRET", "AWS_SECRET_ACCESS_KEY": "awsSECRET", "HTTPS_PROXY": "http://user:proxySECRET@127.0.0.1:9", "PIP_INDEX_URL": "https://u:pipSECRET@127.0.0.1/simple"}
    code = f"""
from dataclasses import dataclass
from blip2mgm.core import Config, write_json
from blip2mgm.stage import Stage
@dataclass
class C(Config):
    run: str = {str(tmp_path / 'run')!r}
s = Stage('adding', C())
repr(s), s._repr_html_()
write_json(s.dir/'a.json', 1)
s.finish(['a.json'])
print(repr(s))"""
    said = subprocess.run([PYTHON, "-c", code], text=True, capture_output=True, env=os.environ | secrets, check=True)
    left = said.stdout + said.stderr + "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert (tmp_path / "run/adding/record.json").is_file() and "SECRET" not in left


def test_the_environment_as_a_whole_is_written_nowhere():
    odd = [f"{p.name}: {line.strip()}" for p in SOURCES for line in p.read_text().splitlines() if re.search(r"(write_|json\.dump|print\()[^\n]*os\.environ(?!\.get|\[)", line)]
    assert odd == []
