"The enhancement stage: real Data-Juicer runs in which no row is lost, no stale result is used, and nothing stays behind."
import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import blip2mgm.enhance as enhance
from blip2mgm.core import ConfigError, UserError, project_root, read_json, read_jsonl, read_yaml, weights_dir
from blip2mgm.data import caption_of, gate, text_of
from blip2mgm.enhance import (ARMS, EnhanceConfig, caption_sets, change_stats, check_account, dj_fingerprint, fates, make_arms, mentions, operator_table,
                              operators, rejections, resolve_recipe, run_recipe, what_failed, with_scenes)

ROOT = project_root()
RECIPE = ROOT / "params/recipes/blip2_enhanced.yaml"
needs_weights = pytest.mark.skipif(not (weights_dir() / "blip2").is_dir(), reason="the small models are not there: make foundation")


@pytest.fixture(scope="module")
def recipe():
    return read_yaml(RECIPE)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from blip2mgm.pictures import ensure_world
    return Path(ensure_world(tmp_path_factory.mktemp("world"), "smoke"))


@pytest.fixture(scope="module")
def gated(world):
    found = gate(world / "captions.jsonl", world)
    small = [r for r in found.accepted if min(found.pictures[r["images"][0]][:2]) < 224][:2]
    found.accepted = small + [r for r in found.accepted if r not in small][:22]
    found.rows = len(found.accepted) + len(found.rejected)
    return found


@pytest.fixture(scope="module")
def run(world, gated, recipe, tmp_path_factory):
    "One real run; (folder, lineage)"
    folder = run_recipe(gated.accepted, world, recipe, tmp_path_factory.mktemp("run") / "dj")
    return folder, fates(gated.accepted, folder, recipe) + rejections(gated.rejected)


def test_recipe_is_the_studys(recipe):
    steps = operators(recipe)
    assert [name for name, _ in steps] == ["blip2_captioning_mapper", "words_num_filter", "word_repetition_filter", "image_shape_filter",
                                           "character_repetition_filter", "text_length_filter"]
    study = {"min_num": 6, "max_num": 60, "min_width": 224, "min_height": 224, "min_len": 20, "max_len": 300}
    assert {k: v for _, p in steps for k, v in p.items() if k in study} == study
    assert [p["max_ratio"] for _, p in steps if "max_ratio" in p] == [.3, .15]
    assert all(p["text_key"] == "caption" for name, p in steps if name.startswith(("word", "char", "text")))


def test_parameters_agree():
    cells = json.loads((ROOT / "nbs/20_enhance.ipynb").read_text())["cells"]
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    values = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(tagged[0]).body}
    assert values == EnhanceConfig().to_dict() == EnhanceConfig.load("params/smoke/enhance.yaml").to_dict()
    assert EnhanceConfig.load("params/demo/enhance.yaml").data == "pictures/demo"
    for wrong in ({"arms": ["blip2"]}, {"workers": 0}):
        with pytest.raises(ConfigError):
            EnhanceConfig(**wrong)


def test_resolved_recipe(recipe, tmp_path):
    before = json.dumps(recipe)
    made = resolve_recipe(recipe, tmp_path, captioner="some/hub-id", workers=1)
    assert json.dumps(recipe) == before
    assert dict(operators(made))["blip2_captioning_mapper"]["model"] == "some/hub-id"
    assert made["np"] == 1 and made["skip_op_error"] is False and made["use_cache"] is False
    assert all(Path(p).is_absolute() for p in made["custom_operator_paths"] + [made["dataset_path"], made["export_path"]])


@needs_weights
def test_every_row_is_accounted_for(run, gated, recipe):
    folder, lines = run
    counts = check_account(lines, gated.rows)
    assert counts["rejected"] == len(gated.rejected) == 7 and counts["kept"] > 0
    table = operator_table(recipe, lines)
    assert table[0]["before"] == len(gated.accepted) and table[-1]["after"] == counts["kept"] == len(read_jsonl(folder / "job/rows.jsonl"))
    assert all(a["after"] == b["before"] for a, b in zip(table, table[1:]))
    with pytest.raises(AssertionError):
        check_account(lines[1:], gated.rows)
    with pytest.raises(AssertionError):
        check_account(lines + lines[:1], gated.rows + 1)


@needs_weights
def test_verdicts_follow_the_thresholds(run, gated, world):
    images = {r["id"]: world / r["images"][0] for r in gated.accepted}
    for line in run[1]:
        if "caption_status" not in line:
            continue
        caption = line["final_caption"]
        count = sum(any(c.isalnum() for c in word) for word in caption.split())
        fair_words, large = 6 <= count <= 60, min(Image.open(images[line["id"]]).size) >= 224
        if line["by"] == "words_num_filter":
            assert not fair_words
        elif line["by"] == "image_shape_filter":
            assert fair_words and not large
        elif line["status"] == "kept":
            assert fair_words and large and 20 <= len(caption) <= 300 and line["stats"]["text_len"] == len(caption)
    assert any(line["by"] == "image_shape_filter" for line in run[1])


@needs_weights
def test_captions_are_the_captioners(run, gated, world):
    from blip2mgm.captioner import Captioner
    alone = Captioner(weights_dir() / "blip2", max_new_tokens=72, batch=5).caption([world / r["images"][0] for r in gated.accepted])
    written = {line["id"]: line["final_caption"] for line in run[1] if "caption_status" in line}
    assert [written[r["id"]] for r in gated.accepted] == [c.text for c in alone]


@needs_weights
def test_arms(run, gated, tmp_path):
    _, lines = run
    kept = [line for line in lines if line["status"] == "kept"]
    sizes = make_arms(tmp_path / "a", list(ARMS), gated.accepted, gated.rejected, lines, seed=1)
    make_arms(tmp_path / "b", list(ARMS), gated.accepted, gated.rejected, lines, seed=1)
    make_arms(tmp_path / "c", ["random"], gated.accepted, gated.rejected, lines, seed=2)
    text = {arm: (tmp_path / "a" / arm / "captions.jsonl").read_text() for arm in ARMS}
    assert sizes == {"raw": 24, "blip2_filtered": len(kept), "random": len(kept), "raw_again": 24}
    assert text == {arm: (tmp_path / "b" / arm / "captions.jsonl").read_text() for arm in ARMS} and text["raw"] == text["raw_again"]
    assert len(kept) in (0, 24) or (tmp_path / "c/random/captions.jsonl").read_text() != text["random"]
    rows = read_jsonl(tmp_path / "a/blip2_filtered/captions.jsonl")
    assert [(r["id"], r["text"]) for r in rows] == [(line["id"], text_of(line["final_caption"])) for line in kept]
    assert all(not Path(r["images"][0]).is_absolute() for arm in ARMS for r in read_jsonl(tmp_path / "a" / arm / "captions.jsonl"))
    for arm in ARMS:
        lineage = read_jsonl(tmp_path / "a" / arm / "lineage.jsonl")
        assert len(lineage) == gated.rows and sum(line["status"] == "kept" for line in lineage) == sizes[arm]
        assert all({"id", "status", "by", "raw_caption", "final_caption"} <= set(line) for line in lineage)


@needs_weights
def test_statistics(run, world):
    _, lines = run
    stats = change_stats(lines, seed=1)
    assert stats["raw"]["captions"] == 24 and set(stats) == set(caption_sets(lines))
    known = with_scenes(lines, read_jsonl(world / "truth.jsonl"))
    found = {name: mentions(*pairs) for name, pairs in known.items()}
    assert all(m["right"] <= min(m["there"], m["named"]) for kinds in found.values() for m in kinds.values())


@needs_weights
def test_unchanged_is_reused_and_changed_is_not(run, gated, world, recipe, tmp_path, monkeypatch):
    folder, rows, asked = run[0], gated.accepted, []
    monkeypatch.setattr(enhance, "dj_process", lambda *a: asked.append(a))
    assert run_recipe(rows, world, recipe, folder) == folder and not asked
    other = shutil.copytree(weights_dir() / "blip2", tmp_path / "blip2")
    base = dj_fingerprint(rows, world, recipe)
    assert dj_fingerprint(rows, world, recipe, str(other)) == base   # the same weights under another path
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert dj_fingerprint(rows, world, recipe, str(other)) != base   # one bit of them
    copy = shutil.copytree(folder, tmp_path / "dj")
    run_recipe(rows, world, recipe, copy, captioner=str(other))
    assert len(asked) == 1 and not (copy / "job/rows.jsonl").exists()
    tighter = recipe | {"process": [{name: p | ({"min_num": 7} if name == "words_num_filter" else {})} for name, p in operators(recipe)]}
    assert dj_fingerprint(rows, world, tighter) != base != dj_fingerprint(rows[:-1], world, recipe)
    moved = shutil.copytree(world, tmp_path / "world")
    assert dj_fingerprint(rows, moved, recipe) == base
    (moved / rows[0]["images"][0]).write_bytes((moved / rows[1]["images"][0]).read_bytes())
    assert dj_fingerprint(rows, moved, recipe) != base


@needs_weights
def test_mistyped_parameter_is_one_clear_error(gated, world, recipe, tmp_path):
    steps = [{name: {("min_wdth" if k == "min_width" else k): v for k, v in p.items()}} for name, p in operators(recipe)]
    with pytest.raises(UserError) as error:
        run_recipe(gated.accepted, world, recipe | {"process": steps}, tmp_path / "dj")
    assert "min_wdth" in str(error.value) and "min_width" in str(error.value) and "dj-process.log" in str(error.value)
    assert not (tmp_path / "dj").exists() and len(str(error.value)) < 3000


def test_reason_of_a_failure(tmp_path):
    log = tmp_path / "log"
    log.write_text("INFO fine\nTraceback (most recent call last):\n  File x\nValueError: first\n\nmore\ndata_juicer.core.X.PipelineConfigError: wrong:\n  why\n")
    assert what_failed(log) == "data_juicer.core.X.PipelineConfigError: wrong:\n  why"
    log.write_text("only\nthis")
    assert what_failed(log) == "only\nthis"


KILLED = """
import os, sys, time
from blip2mgm.enhance import start
p = start(["sh", "-c", f"sleep 61.7 & echo $$ > {sys.argv[1]}; sleep 61.7"], dict(os.environ))
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_a_killed_notebook(tmp_path, how):
    owner = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "pid"], stderr=subprocess.DEVNULL)
    for _ in range(400):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            break
        time.sleep(.05)
    group = int((tmp_path / "pid").read_text())
    os.killpg(group, 0)
    owner.send_signal(how)
    owner.wait(20)
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(.05)
    raise AssertionError("processes were left running")


@pytest.mark.skipif(not (ROOT / "blip2mgm/weights/blip2").is_dir(), reason="the small models are not there: make foundation")
def test_plain_dj_process_takes_the_recipe(world, gated, tmp_path):
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(json.dumps(r | {"images": [str(world / p) for p in r["images"]]}) + "\n" for r in gated.accepted[:6]))
    command = [sys.executable, Path(sys.executable).parent / "dj-process", "--config", RECIPE.relative_to(ROOT), "--dataset_path", rows,
               "--export_path", tmp_path / "out/rows.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=enhance.environment(2))
    assert done.returncode == 0, done.stderr[-3000:]
    for row in read_jsonl(tmp_path / "out/rows.jsonl"):
        assert row["caption_status"] == "ok" and caption_of(row["text"]) == row["caption"]
