"""Inputs that nobody thought of: rows, parameters and files made by chance, and files that were damaged by chance."""
import gzip
import io
import json
import random
import tarfile
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from blip2mgm import cli, scorers
from blip2mgm.core import ConfigError, UserError, as_kind, plain_json, read_json, read_jsonl, read_yaml, write_json, write_jsonl
from blip2mgm.data import gate
from blip2mgm.formats import as_lines, as_row, caption_of, count_images, iter_rows, parse_line, plain_rows, text_of, write_dj
from blip2mgm.own import Source, rows_of, shortened

few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
text = st.text(max_size=40)
value = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_subnormal=False) | text | st.binary(max_size=8),
                     lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=6)
row = st.dictionaries(st.sampled_from(["id", "text", "images", "image", "conversations", "caption", "reason"]) | text, value | st.just("a.png") | st.just(["a.png"]), max_size=6)
good = st.fixed_dictionaries({"id": text, "text": text.map(text_of), "images": st.just(["a.png"])})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    return folder


@few
@given(text)
def test_a_caption_comes_back_from_its_text(caption):
    plain = caption_of(caption)
    assert caption_of(text_of(plain)) == caption_of(plain) and count_images(text_of(caption)) == 1


@few
@given(st.lists(row | value | good, max_size=8))
def test_rows_in_are_accepted_plus_rejected(root, rows):
    found = gate(rows, root, threads=1)
    assert found.rows == len(rows) == len(found.accepted) + len(found.rejected)
    assert all(isinstance(r["reason"], str) and r["reason"] for r in found.rejected)
    assert all(r in rows for r in found.accepted), "as they came"


@few
@given(st.lists(row | good, max_size=6))
def test_what_is_written_is_read_again(root, rows):
    path = write_dj(root / "rows.jsonl", rows)
    found = list(iter_rows(path))
    assert len(found) == len(rows)
    assert all(problem or isinstance(r, dict) for r, problem in found)


@few
@given(st.binary(max_size=60))
def test_a_line_is_a_value_or_has_a_reason(line):
    found, problem = parse_line(line, 1)
    assert isinstance(problem, str) and (problem or json.dumps(found) is not None)


@few
@given(st.lists(good | row.map(lambda r: {k: v for k, v in r.items() if not isinstance(v, bytes)}), max_size=6))
def test_the_quick_reader_says_what_the_strict_one_says(rows):
    lines = [json.dumps(plain_json(r), default=repr).encode() for r in rows if "\\u0000" not in json.dumps(r, default=repr)]
    for line, quick in zip(lines, plain_rows(as_lines(lines), 1)):
        if quick is None: continue
        strict, problem = parse_line(line, 1)
        assert not problem and (strict["id"], strict["text"], strict["images"]) == quick


@few
@given(row | value, st.integers(0, 99))
def test_any_row_has_a_form(r, number):
    found = as_row(r, number)
    assert found is r or {"id", "text", "images"} <= found.keys()


NORMALISERS = [scorers.textvqa_normalise, scorers.vqa_normalise, scorers.gqa_normalise, scorers.vqa_human]


@pytest.mark.parametrize("normalise", NORMALISERS, ids=lambda f: f.__name__)
@few
@given(st.text(max_size=60))
def test_normalisers_take_any_text_and_give_one(normalise, answer):
    assert isinstance(normalise(answer), str)
    assert normalise(answer) == normalise(answer)


@few
@given(st.text(max_size=60), st.lists(st.text(max_size=20), min_size=10, max_size=10))
def test_scores_stay_between_nothing_and_all(answer, answers):
    for score in (scorers.textvqa_accuracy(answer, tuple(answers)), scorers.vqa_accuracy(answer, tuple(answers))): assert 0 <= score <= 1
    assert scorers.textvqa_accuracy(answers[0], (answers[0],) * 10) == 1 or not scorers.textvqa_normalise(answers[0])


@few
@given(st.text(max_size=60), st.dictionaries(st.sampled_from("ABCD"), st.text(min_size=1, max_size=9), min_size=2))
def test_a_letter_is_one_of_the_options_or_none(answer, options):
    assert scorers.option_letter(answer, options) in {*options, None, ""}


@few
@given(st.text(max_size=300))
def test_an_option_is_one_short_line(caption):
    short = shortened(caption)
    assert len(short.split()) <= 26 and short == " ".join(short.split())


@pytest.mark.parametrize("stage", cli.stage_names())
@few
@given(values=st.dictionaries(text, value, max_size=3), data=st.data())
def test_parameters_are_taken_or_refused_with_a_reason(stage, values, data):
    cls = cli.config_class(stage)
    name = data.draw(st.sampled_from([f.name for f in fields(cls)]))
    try: cfg = cls.from_dict({**values, name: data.draw(value)}, source="file")
    except ConfigError as e: assert str(e).startswith("file: ")
    else: assert not values and {k: as_kind(getattr(cfg, k), kind) for k, kind in cls.kinds().items()} == cfg.to_dict()


@few
@given(st.binary(max_size=80) | st.text(max_size=60).map(str.encode))
def test_a_parameter_file_is_a_mapping_or_refused(root, content):
    path = root / "x.yaml"
    path.write_bytes(content)
    try: assert isinstance(read_yaml(path), dict)
    except ConfigError as e: assert "x.yaml" in str(e) and "\n" not in str(e).strip()


@few
@given(value.filter(lambda v: not isinstance(v, bytes)))
def test_json_holds_what_it_is_given(root, v):
    try: text = json.dumps(plain_json(v))
    except (TypeError, ValueError): return  # bytes somewhere inside
    if "\\ud8" in text or any(f"\\ud{c}" in text for c in "9abcdef"): return
    assert read_json(write_json(root / "v.json", v)) == json.loads(text)
    assert read_jsonl(write_jsonl(root / "v.jsonl", [v, v])) == [json.loads(text)] * 2


# Files damaged by chance
def tar_of(rows):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as tar:
        for name, data in rows:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def whole():
    "A good file of every format"
    png = io.BytesIO()
    Image.effect_noise((12, 9), 60).save(png, "PNG")
    rows = [{"id": f"r{i}", "text": text_of(f"a bus {i}"), "images": ["a.png"]} for i in range(40)]
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    pq.write_table(pa.Table.from_pylist([{"caption": "a bus", "image": {"bytes": png.getvalue(), "path": "a.png"}}] * 20), table := pa.BufferOutputStream())
    shard = tar_of([(f"{i}.{kind}", data) for i in range(9) for kind, data in (("png", png.getvalue()), ("txt", b"a bus"), ("json", b'{"n": 1}'))])
    return {"a.jsonl": lines, "a.json": json.dumps(rows, indent=1).encode(), "a.jsonl.gz": gzip.compress(lines), "a.jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
            "a.tsv": b"caption\timage\n" + b"a bus\ta.png\n" * 40, "a.csv": b"image,caption\n" + b'a.png,"a, bus"\n' * 40, "a.parquet": table.getvalue().to_pybytes(), "a.tar": shard,
            "a.tar.gz": gzip.compress(shard), "a.tar.zst": pa.compress(shard, codec="zstd", asbytes=True)}


def damaged(data, rng):
    how = rng.randrange(5)
    at = rng.randrange(len(data))
    if how == 0: return data[:at]
    if how == 1: return data[:at] + rng.randbytes(rng.randrange(1, 30)) + data[at:]
    if how == 2: return rng.randbytes(rng.randrange(200))
    if how == 3: return data[:at] + data[min(at + rng.randrange(1, 60), len(data)):]
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 9)): changed[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("name", whole())
def test_a_damaged_file_costs_rows_or_says_so(name, tmp_path):
    "Each of 60 damaged files: every row that was read is accepted or rejected, or one UserError names the file"
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    data, rng, outcomes = whole()[name], random.Random(name), set()
    for _ in range(60):
        (tmp_path / name).write_bytes(damaged(data, rng))
        try:
            found = gate(tmp_path / name, tmp_path, threads=1)
            outcomes.add("read")
            assert found.rows == len(found.accepted) + len(found.rejected) == sum(1 for _ in iter_rows(tmp_path / name))
        except UserError as e:
            outcomes.add("refused")
            assert name in str(e), e
    assert outcomes


@pytest.mark.parametrize("name", ["captions.json", "captions.csv", "captions.jsonl"])
def test_init_takes_any_file_or_says_why_not(name, tmp_path):
    rng = random.Random(name)
    for _ in range(40):
        (tmp_path / name).write_bytes(damaged(whole()["a" + Path(name).suffix], rng))
        try: rows = rows_of(Source(tmp_path / name, tmp_path, ""))
        except UserError as e: assert name in str(e)
        else: assert all(isinstance(p, str) for _, p in rows)
