"The enhancement stage: real Data-Juicer runs in which no row is lost, no stale result is used, and nothing stays behind."
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

import blip2mgm.recipe as recipe_module
from blip2mgm.arms import ARMS, arm_lines, check_account, fates, lineage_rows, operator_table, rejections, trace, write_arm, write_lineage
from blip2mgm.changes import caption_sets, change_stats, mentions, shift_rows, with_scenes
from blip2mgm.core import ConfigError, UserError, project_root, read_json, read_jsonl, read_yaml, weights_dir, write_json
from blip2mgm.data import gate
from blip2mgm.formats import caption_of, text_of
from blip2mgm.enhance import EnhanceConfig
from blip2mgm.mapper import lately
from blip2mgm.recipe import CAPTIONER, MEMORY, SPACY, data_driven, dj_fingerprint, environment, filters_only, language_steps, operators, read_rows, resolve_recipe, result_file, run_recipe, what_failed, without_spacy

ROOT = project_root()
RECIPE = ROOT / "params/recipes/blip2_enhanced.yaml"
needs_weights = pytest.mark.skipif(not (weights_dir() / "blip2").is_dir(), reason="the small models are not there: make foundation")


@pytest.fixture(scope="module")
def recipe():
    return read_yaml(RECIPE)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from blip2mgm.world import ensure_world
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
    for wrong in ({"arms": ["blip3"]}, {"workers": 0}, {"mix": 1.5}, {"agreement": 1}, {"executor": "rey"}):
        with pytest.raises(ConfigError):
            EnhanceConfig(**wrong)


def test_resolved_recipe(recipe, tmp_path):
    before = json.dumps(recipe)
    made = resolve_recipe(recipe, tmp_path, captioner="some/hub-id", workers=1)
    assert json.dumps(recipe) == before
    assert dict(operators(made))["blip2_captioning_mapper"]["model"] == "some/hub-id"
    assert made["np"] == 1 and made["skip_op_error"] is False and made["use_cache"] is False
    assert all(Path(p).is_absolute() for p in made["custom_operator_paths"] + [made["dataset"]["configs"][0]["path"], made["export_path"]])


def kept_rows(folder): return read_rows(result_file(folder)).to_pylist()


@needs_weights
def test_every_row_is_accounted_for(run, gated, recipe):
    folder, lines = run
    counts = check_account(lines, gated.rows)
    assert counts["rejected"] == len(gated.rejected) == 7 and counts["kept"] > 0
    table = operator_table(recipe, lines)
    assert table[0]["before"] == len(gated.accepted) and table[-1]["after"] == counts["kept"] == len(kept_rows(folder))
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
@pytest.mark.parametrize("executor, batch", [("ray_partitioned", 1), *([("ray", 7)] if os.environ.get("BLIP2MGM_RAY") == "all" else [])])   # a minute each
def test_ray_makes_the_same(run, gated, world, recipe, tmp_path, executor, batch):
    "Both of Data-Juicer's executors on Ray, with other batch sizes, against the default one with 64"
    steps = [{name: p | ({"model_batch": batch, "batch_size": 8} if name == CAPTIONER else {})} for name, p in operators(recipe)]
    folder = run_recipe(gated.accepted, world, recipe | {"process": steps}, tmp_path / "dj", executor=executor)
    assert fates(gated.accepted, folder, recipe) + rejections(gated.rejected) == run[1]
    assert [r["id"] for r in kept_rows(folder)] == [r["id"] for r in kept_rows(run[0])]
    assert lately(tmp_path / MEMORY)[0] == len(gated.accepted)


def test_cluster_by_address(recipe, tmp_path):
    "Each machine remembers in a file of its own; the rest is as on this one"
    made = resolve_recipe(recipe, tmp_path / "dj", executor="ray_partitioned", address="10.0.0.1:6379", workers=3)
    assert made["ray_address"] == "10.0.0.1:6379" and made["partition"]["num_of_partitions"] == 3 and made["checkpoint"]["strategy"] == "every_op"
    assert dict(operators(made))[CAPTIONER]["store"] == str(tmp_path / "captions-{host}.sqlite")
    assert "executor_type" not in resolve_recipe(recipe, tmp_path / "dj")


def write_arms(folder, made, rows): return {arm: write_arm(folder / arm, rows, lines) for arm, lines in made.items()}


def test_filters_with_and_without_workers(gated, world, recipe, tmp_path, monkeypatch):
    "Data-Juicer's tracer would wait for ever here: its workers share one connection to a lock that was used before they were forked"
    only, found = filters_only(recipe | {"open_tracer": True}), {}
    for few in (1, 2000):
        monkeypatch.setattr(recipe_module, "FEW", few)
        made = resolve_recipe(only, tmp_path, rows=len(gated.accepted))
        assert not made["open_tracer"] and ["num_proc" in p for _, p in operators(made)] == [True, True, few > 1, True, True]
        found[few] = read_rows(result_file(run_recipe(gated.accepted, world, only, tmp_path / f"dj{few}"))).to_pylist()
    assert found[1] == found[2000] and found[1]


@needs_weights
def test_arms(run, gated, world, recipe, tmp_path):
    _, lines = run
    kept, rows = [line for line in lines if line["status"] == "kept"], gated.accepted
    only = filters_only(recipe)
    filtered = fates(rows, run_recipe(rows, world, only, tmp_path / "dj"), only) + rejections(gated.rejected)
    agreement = {str(r["id"]): float(i % 7) for i, r in enumerate(rows)}
    make = lambda seed: arm_lines(list(ARMS), rows, gated.rejected, lines, filtered, agreement, .5, seed)
    sizes = write_arms(tmp_path / "a", make(1), rows)
    write_arms(tmp_path / "b", make(1), rows), write_arms(tmp_path / "c", make(2), rows)
    text = {arm: (tmp_path / "a" / arm / "captions.jsonl").read_text() for arm in ARMS}
    fair = sum(line["status"] == "kept" for line in filtered)
    assert sizes == dict.fromkeys(ARMS, 24) | {"blip2_filtered": len(kept), "random": len(kept), "raw_filtered": fair} and 0 < fair < 24
    assert text == {arm: (tmp_path / "b" / arm / "captions.jsonl").read_text() for arm in ARMS} and text["raw"] == text["raw_again"]
    other = {arm: (tmp_path / "c" / arm / "captions.jsonl").read_text() for arm in ARMS}
    assert {arm for arm in ARMS if other[arm] != text[arm]} == {"mix", "shuffled"} | ({"random"} if 0 < len(kept) < 24 else set())
    for arm, found in make(1).items():
        lineage = read_jsonl(tmp_path / "a" / arm / "lineage.jsonl")
        assert len(lineage) == gated.rows and sum(line["status"] == "kept" for line in lineage) == sizes[arm]
        assert all({"id", "status", "by", "raw_caption", "final_caption"} <= set(line) for line in lineage)
        wanted = [(line["id"], text_of(line["final_caption"])) for line in found if line["status"] == "kept"]
        written = read_jsonl(tmp_path / "a" / arm / "captions.jsonl")
        assert [(r["id"], r["text"]) for r in written] == wanted and not any(Path(r["images"][0]).is_absolute() for r in written)


@needs_weights
def test_arms_hold_what_they_say(run, gated, recipe, tmp_path):
    _, lines = run
    rows, new = gated.accepted, {line["id"]: line["final_caption"] for line in run[1] if "caption_status" in line}
    raw = {str(r["id"]): caption_of(r["text"]) for r in rows}
    agreement = {i: float(k) for k, i in enumerate(raw)}
    made = arm_lines(["blip2", "mix", "worst_half", "shuffled"], rows, gated.rejected, lines, (), agreement, .5, 0)
    said = {arm: {line["id"]: line["final_caption"] for line in found if line["status"] == "kept"} for arm, found in made.items()}
    assert said["blip2"] == new
    assert all(said["mix"][i] in (raw[i], new[i]) for i in raw) and 4 <= sum(said["mix"][i] == new[i] for i in raw) <= 20
    assert said["worst_half"] == {i: new[i] if k < 12 else raw[i] for k, i in enumerate(raw)}
    assert sorted(said["shuffled"].values()) == sorted(raw.values()) and list(said["shuffled"].values()) != list(raw.values())
    fewer = arm_lines(["mix"], rows[1:], gated.rejected, lines[1:], (), agreement, .5, 0)["mix"]
    assert [line["final_caption"] for line in fewer] == [line["final_caption"] for line in made["mix"][1:]]   # a row's chance is its own


@needs_weights
def test_the_way_of_each_row(run, gated, recipe, tmp_path):
    _, lines = run
    made = arm_lines(["raw", "blip2_filtered"], gated.accepted, gated.rejected, lines)
    write_lineage(tmp_path / "enhance/lineage.parquet", lineage_rows(recipe, lines, made))
    names = [name for name, _ in operators(recipe)]
    for line in lines:
        if line["id"] is None or sum(other["id"] == line["id"] for other in lines) > 1: continue
        way = {step["step"]: step["what"] for step in trace(tmp_path, line["id"])}
        if "caption_status" not in line: assert way["gate"] == f"rejected: {line['by']}" and not set(names) & set(way); continue
        assert way["gate"] == "accepted" and way["new caption"] == line["final_caption"] and way["trained on in raw"] == line["raw_caption"]
        after = names.index(line["by"]) if line["by"] else len(names)
        assert [way[n] for n in names] == ["captioned"] + ["passed"] * (after - 1) + ["dropped"] * bool(line["by"]) + ["not reached"] * max(len(names) - after - 1, 0)
        assert ("trained on in blip2_filtered" in way) == (not line["by"])
    with pytest.raises(UserError, match="has no row nobody"): trace(tmp_path, "nobody")
    with pytest.raises(UserError, match="no enhancement yet"): trace(tmp_path / "x", "a")


@needs_weights
def test_statistics(run, world):
    _, lines = run
    stats = change_stats(lines, seed=1)
    assert stats["raw"]["captions"] == 24 and set(stats) == set(caption_sets(lines))
    for r in shift_rows(lines): assert r["low"] <= r["difference"] <= r["high"] and r["difference"] == pytest.approx(r["after"] - r["before"]) and 0 <= r["ks"] <= 1
    known = with_scenes(lines, read_jsonl(world / "truth.jsonl"))
    found = {name: mentions(*pairs) for name, pairs in known.items()}
    assert all(m["right"] <= min(m["there"], m["named"]) for kinds in found.values() for m in kinds.values())


@needs_weights
def test_unchanged_is_reused_and_changed_is_not(run, gated, world, recipe, tmp_path, monkeypatch):
    folder, rows, asked = run[0], gated.accepted, []
    monkeypatch.setattr(recipe_module, "dj_process", lambda *a: asked.append(a))
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
    assert len(asked) == 1 and not result_file(copy).exists()
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


ENHANCE = """
import json, sys
from pathlib import Path
from blip2mgm.recipe import run_recipe
rows, recipe = json.loads(Path(sys.argv[1]).read_text())
run_recipe(rows, sys.argv[2], recipe, sys.argv[3])
"""


@needs_weights
def test_killed_it_ends_in_the_same(run, gated, world, recipe, tmp_path):
    "Once as soon as the first captions are written, twice at random; then undisturbed"
    small = {"model_batch": 2, "batch_size": 4}
    recipe = recipe | {"process": [{name: p | (small if name == CAPTIONER else {})} for name, p in operators(recipe)]}
    (tmp_path / "task.json").write_text(json.dumps([gated.accepted, recipe]))
    for moment in (None, *random.sample(range(1, 9), 2)):
        started = time.monotonic()
        owner = subprocess.Popen([sys.executable, "-c", ENHANCE, tmp_path / "task.json", world, tmp_path / "dj"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while owner.poll() is None and (lately(tmp_path / MEMORY)[0] == 0 if moment is None else time.monotonic() < started + moment):
            time.sleep(.05)
        owner.kill()
        owner.wait()
    written = lately(tmp_path / MEMORY)[0]
    assert written > 0
    folder = run_recipe(gated.accepted, world, recipe, tmp_path / "dj")
    assert result_file(folder).read_bytes() == result_file(run[0]).read_bytes()
    assert lately(tmp_path / MEMORY)[0] == len(gated.accepted)   # a caption written again would have a new number
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".dj")] == []


KILLED = """
import os, sys, time
from blip2mgm.recipe import start
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
    owner.wait(120)
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(2))
    assert done.returncode == 0, done.stderr[-3000:]
    for row in read_jsonl(tmp_path / "out/rows.jsonl"):
        assert row["caption_status"] == "ok" and caption_of(row["text"]) == row["caption"]


VALID = """
import json, sys
from data_juicer.config import init_configs
from data_juicer.ops import load_ops
found = []
for path in sys.argv[3:]:
    sys.modules.pop("mapper", None)   # Data-Juicer refuses to load a file of operators twice
    found.append([op._name for op in load_ops(init_configs(["--config", path, "--export_path", sys.argv[2]]).process)])
json.dump(found, open(sys.argv[1], "w"))   # Data-Juicer takes standard output for its log
"""


@needs_weights
def test_data_juicer_accepts_every_recipe(tmp_path):
    paths = sorted((ROOT / "params/recipes").glob("*.yaml"))
    assert {p.stem for p in paths} == {"basic", "blip2_enhanced", "blip2_enhanced_30k", "data_driven", "mix", "simplified"}
    done = subprocess.run([sys.executable, "-c", VALID, tmp_path / "found", tmp_path / "out/rows.jsonl", *paths], cwd=ROOT, capture_output=True, text=True, env=environment(2))
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_json(tmp_path / "found") == [[op for op, _ in operators(read_yaml(p))] for p in paths]


def test_basic_recipe_in_plain_dj_process(world, gated, tmp_path):
    "Its thresholds allow for the special tokens: it keeps what the filters alone keep of the captions"
    rows, texts = gated.accepted[:6], ["one two three four five words", "one two three four words", "a " * 60, "a " * 61, "six words and a hundred letters" + "x" * 270, "six words and few more letters"]
    rows = [r | {"text": text_of(t.strip()), "images": [str(world / gated.accepted[-1]["images"][0])]} for r, t in zip(rows, texts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = [sys.executable, Path(sys.executable).parent / "dj-process", "--config", ROOT / "params/recipes/basic.yaml", "--dataset_path", tmp_path / "in.jsonl", "--export_path", tmp_path / "out/rows.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r["id"] for r in read_jsonl(tmp_path / "out/rows.jsonl")] == [rows[0]["id"], rows[5]["id"]]


@pytest.fixture
def feelings(tmp_path):
    "A classifier of two words, with random weights"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast
    made = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "happy": 2, "sad": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_input_names=["input_ids", "attention_mask"]).save_pretrained(tmp_path / "feelings")
    config = DistilBertConfig(vocab_size=4, dim=16, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=32, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "feelings")
    return tmp_path / "feelings"


def explored(folder):
    "What the exploration leaves, for thresholds that let everything pass"
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.table({"status": ["accepted"] * 2, "words": [1, 99], "characters": [1, 400], "width": [1, 900], "height": [1, 900]}), folder / "rows.parquet")
    return folder


def test_sentiment_from_a_local_model(world, gated, feelings, tmp_path):
    "A recipe with the operator runs in plain dj-process, and its label reaches the lineage"
    rows = [r | {"caption": caption_of(r["text"]), "images": [str(world / r["images"][0])]} for r in gated.accepted[:4]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = data_driven(explored(tmp_path), tmp_path / "recipe.yaml", ROOT / "params/recipes/basic.yaml", str(feelings))
    (tmp_path / "job").mkdir()
    command = [sys.executable, Path(sys.executable).parent / "dj-process", "--config", made, "--dataset_path", tmp_path / "in.jsonl", "--export_path", result_file(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(2))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = fates(rows, tmp_path, read_yaml(made))
    assert all(line["status"] == "kept" and line["stats"]["query_sentiment_label"] in ("negative", "positive") and 0.5 <= line["stats"]["query_sentiment_label_score"] <= 1 for line in lines)


def small_spacy(folder):
    "The archive that Data-Juicer looks for, with a tagger and a parser that know six words"
    import tarfile
    import spacy
    from spacy.training import Example
    nlp, name = spacy.blank("en"), SPACY.removesuffix(".tar.gz")
    for pipe, how in (("tagger", {}), ("morphologizer", {}), ("parser", {"min_action_freq": 1})):
        nlp.add_pipe(pipe, config=how)
    known = [("a red bus", "DT JJ NN", "DET ADJ NOUN", [2, 2, 2], "det amod ROOT"), ("very quickly", "RB RB", "ADV ADV", [1, 1], "advmod ROOT")]
    examples = [Example.from_dict(nlp.make_doc(text), {"words": text.split(), "tags": tags.split(), "pos": kinds.split(), "heads": heads, "deps": deps.split()}) for text, tags, kinds, heads, deps in known]
    nlp.initialize(lambda: examples)
    for _ in range(20):
        nlp.update(examples)
    nlp.to_disk(folder / "made")
    with tarfile.open(folder / SPACY, "w:gz") as archive:
        archive.add(folder / "made", f"{name}/en_core_web_md/{name}")


def test_entities_from_a_local_model(world, gated, tmp_path, monkeypatch):
    "A recipe with the operator runs in plain dj-process: a caption that names nothing is dropped, and the lineage knows by what"
    pytest.importorskip("spacy"), pytest.importorskip("spacy_pkuseg")
    small_spacy(tmp_path)
    monkeypatch.setenv("DATA_JUICER_EXTERNAL_MODELS_HOME", str(tmp_path))
    rows = [{"id": i, "text": text_of(c), "caption": c, "images": [str(world / gated.accepted[-1]["images"][0])]} for i, c in enumerate(["a red bus", "very quickly"])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r | {"id": str(r["id"])}) + "\n" for r in rows))
    recipe = {"project_name": "entities", "process": [yaml.safe_load(language_steps())[0]], "np": 1, "skip_op_error": False, "strict_preflight": False}
    write_json(tmp_path / "recipe.yaml", resolve_recipe(recipe, tmp_path, rows=2))
    done = subprocess.run([sys.executable, Path(sys.executable).parent / "dj-process", "--config", tmp_path / "recipe.yaml"], capture_output=True, text=True, env=environment(1))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(line["by"], line["stats"]) for line in fates(rows, tmp_path, recipe)] == [("", {"num_dependency_edges": 2}), ("text_entity_dependency_filter", {"num_dependency_edges": []})]


def test_what_has_no_model_is_left_out_and_says_so(tmp_path, monkeypatch):
    made = data_driven(explored(tmp_path), tmp_path / "recipe.yaml", sentiment=str(tmp_path / "nowhere"))
    assert f"query_sentiment_detection_mapper is left out: {tmp_path}/nowhere is not a folder with a model" in made.read_text()
    assert f"text_entity_dependency_filter is left out: {without_spacy()}" in made.read_text()
    assert [n for n, _ in operators(read_yaml(made))] == [n for n, _ in operators(read_yaml(ROOT / "params/recipes/data_driven.yaml"))]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert without_spacy().startswith("en_core_web_md")
    (tmp_path / SPACY).touch()
    monkeypatch.setenv("DATA_JUICER_EXTERNAL_MODELS_HOME", str(tmp_path))
    assert without_spacy() == "" and "- text_entity_dependency_filter" in language_steps()


def test_recipes_share_the_studys_thresholds(recipe):
    wanted = {k: v for _, p in operators(recipe) for k, v in p.items() if k.startswith(("min_", "max_")) and "tokens" not in k}
    for name in ("blip2_enhanced_30k", "mix"):
        found = {k: v for _, p in operators(read_yaml(ROOT / f"params/recipes/{name}.yaml")) for k, v in p.items() if k.startswith(("min_", "max_")) and "tokens" not in k}
        assert found == wanted
