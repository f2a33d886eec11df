"The shipped small models: what their record says, measured again on a few pictures; and that the making runs"
import json

import pytest

from blip2mgm import foundation as F
from blip2mgm.core import weights_dir

WANTED = dict(color=.95, shape=.95, word=.90, number=.85)


@pytest.fixture(scope="module")
def record(): return json.loads((weights_dir() / "record.json").read_text())


@pytest.mark.parametrize("pictures", ["held out", "novel compositions"])
@pytest.mark.parametrize("attribute", WANTED)
def test_the_record_meets_the_bar(record, pictures, attribute):
    assert record["blip2_captions"][pictures][attribute]["share"] >= WANTED[attribute]


@pytest.mark.parametrize("question", ["read color", "read shape", "read existence", "read letter", "seen color", "seen shape", "seen existence", "seen count", "read relation", "seen relation", "seen letter"])
def test_gemma_looks_up_what_it_is_asked(record, question):
    accuracy = next(p for p in record["parts"] if p["part"] == "gemma")["accuracy"]
    assert accuracy[question] >= .9


def test_captions_are_as_good_as_the_record_says(record):
    now = F.measure_blip2(weights_dir() / "blip2", 60, 1)["held out"]
    for a in ("color", "shape"): assert abs(now[a]["share"] - record["blip2_captions"]["held out"][a]["share"]) < .05


def test_weights_are_small_and_safe():
    files = [f for f in weights_dir().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 20e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".md"}


def test_parts_are_made_once(tmp_path):
    cfg = F.FoundationConfig(pictures=12, held_out=8, batch=4, conv_steps=1, clip_steps=1, vit_steps=1, qformer_steps=1, gemma_steps=1)
    first = {p: F.make_part(p, cfg, tmp_path) for p in F.PARTS}
    stamps = {p: (tmp_path / p / "model.safetensors").stat().st_mtime_ns for p in F.PARTS}
    assert {p: F.make_part(p, cfg, tmp_path) for p in F.PARTS} == first
    assert stamps == {p: (tmp_path / p / "model.safetensors").stat().st_mtime_ns for p in F.PARTS}


def test_a_part_is_made_again_only_if_its_own_steps_change(tmp_path):
    small = dict(pictures=12, held_out=8, batch=4, conv_steps=1, clip_steps=1)
    F.make_part("convnext", F.FoundationConfig(**small), tmp_path)
    stamp = (tmp_path / "convnext/model.safetensors").stat().st_mtime_ns
    F.make_part("convnext", F.FoundationConfig(**small, gemma_steps=9), tmp_path)
    assert (tmp_path / "convnext/model.safetensors").stat().st_mtime_ns == stamp
    F.make_part("convnext", F.FoundationConfig(**(small | dict(conv_steps=2))), tmp_path)
    assert (tmp_path / "convnext/model.safetensors").stat().st_mtime_ns != stamp


def test_the_tokenizer_gives_back_what_it_was_given():
    tok = F.make_tokenizer()
    for text in ("a large red star, number 42", "What is it?\nA. red\nB. 7", "Zebra's tail (long): 100%"):
        assert tok.decode(tok(text, add_special_tokens=False)["input_ids"]) == text
    assert tok("red")["input_ids"][0] == tok.bos_token_id == 2
