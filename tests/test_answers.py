"Answers are kept as they come, belong to what gave them, and are the same however they were asked."
import json, os, re, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest
from blip2mgm.answers import Item, Store, answer_key, append, decoding, share, stored_row, told
from blip2mgm.asking import Reply, engine_hash
from blip2mgm.core import UserError, read_json, read_jsonl
from blip2mgm.evaluate import Asked, evaluate_model
from blip2mgm.models import open_model

ME = dict(weights="w", adapter="a", processor="p", engine="e")

def row(key, text): return stored_row(Item(key, "textvqa", 1, "q", "pic"), text, Reply([1], ended=True), ME, "m", decoding(8))

@pytest.mark.parametrize("change", [dict(weights="x"), dict(adapter=None), dict(processor="x"), dict(engine="x")])
def test_another_model_never_finds_an_answer(change):
    assert answer_key(ME, "pic", "q", decoding(8)) != answer_key(ME | change, "pic", "q", decoding(8))

@pytest.mark.parametrize("picture,prompt,n", [("other", "q", 8), (None, "q", 8), ("pic", "q?", 8), ("pic", "q", 9)])
def test_another_question_never_finds_an_answer(picture, prompt, n):
    assert answer_key(ME, "pic", "q", decoding(8)) != answer_key(ME, picture, prompt, decoding(n))

@pytest.mark.parametrize("cut", [1, 30, 200])
def test_half_a_line_is_asked_again(tmp_path, cut):
    append(Store(tmp_path), [row("k1", "one"), row("k2", "two")])
    whole = (tmp_path/"said.jsonl").read_bytes()
    (tmp_path/"said.jsonl").write_bytes(whole[:-cut])
    store = Store(tmp_path)
    assert "k1" in store and "k2" not in store
    append(store, [row("k2", "two")])
    assert (tmp_path/"said.jsonl").read_bytes() == whole

def test_lines_are_only_added_and_a_touched_one_is_not_believed(tmp_path):
    append(Store(tmp_path), [row("k1", "one")]); before = (tmp_path/"said.jsonl").read_bytes()
    append(Store(tmp_path, "0of2"), [row("k2", "two")]); append(Store(tmp_path), [row("k3", "three")])
    assert (tmp_path/"said.jsonl").read_bytes().startswith(before) and sorted(Store(tmp_path).rows) == ["k1", "k2", "k3"]
    (tmp_path/"said.jsonl").write_bytes(before.replace(b'"text": "one"', b'"text": "uno"'))
    assert sorted(Store(tmp_path).rows) == ["k2"]

def test_failed_and_cut_off_are_told():
    store = {"f": stored_row(Item("f", "t", 1, "q", "p"), None, Reply(failed="broken"), ME, "m", {}), "c": stored_row(Item("c", "t", 1, "q", "p"), "so", Reply([1]), ME, "m", {})}
    assert told(store, "f")[0] is None and told(store, "f")[1].failed == "broken" and not told(store, "f")[1].ended
    assert told(store, "c")[0] == "so" and not told(store, "c")[1].ended

def test_the_engine_does_not_hold_what_scores_or_draws():
    from blip2mgm.asking import ENGINE
    assert not {"scorers", "tasks", "looking", "evaluate", "answers"} & set(ENGINE) and engine_hash() == engine_hash()

@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    "A small MGM in the original layout with its tokenizer, and a picture world."
    import shutil
    from blip2mgm.core import weights_dir
    from blip2mgm.mgm import save_original
    from blip2mgm.world import ensure_world
    from blip2mgm.jobs import TrainConfig, base_model
    root = tmp_path_factory.mktemp("own")
    m, _ = base_model(TrainConfig())
    conv = m.convnext.config
    save_original(m, root/"merged", {**m.gemma.config.to_dict(), "model_type": "mgm_gemma", "rope_theta": 10000.0, "hidden_act": m.config.hidden_act, "image_size_aux": m.config.image_size_aux,
                  "towers": dict(clip=m.clip.config.to_dict(), convnext=dict(dims=conv.hidden_sizes, depths=conv.depths), lr=m.config.image_size)})
    for f in (weights_dir()/"mgm"/"gemma").glob("tokenizer*"): shutil.copy(f, root/"merged")
    return root, ensure_world(root/"world", "smoke")

def own(merged, out, **k): return Asked(str(merged[0]/"merged"), merged[0]/out, merged[1], **dict(tasks=["textvqa", "mmbench"], pictures=3, max_new_tokens=4) | k)

# In another batch a probability may differ in its last digit, and with it the hash of the file it stands in; all else is the same to the byte.
LAST_DIGITS = re.compile(rb'"options": \{"A[^}]*\}|"answers_sha256": "\w+"')

def files(folder): return {p.relative_to(folder).as_posix(): LAST_DIGITS.sub(b"", p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("said")}

def chances(folder): return [v for r in read_jsonl(folder/"mmbench/answers.jsonl") for v in r["metadata"]["options"].values()]

def test_batches_and_interruptions_change_nothing(merged):
    scores = evaluate_model(own(merged, "alone"))
    assert [s["task"] for s in scores] == ["textvqa", "mmbench"] and read_json(merged[0]/"alone/scores.json")["never_looking"]
    evaluate_model(own(merged, "one", batch_size=1))
    assert files(merged[0]/"one") == files(merged[0]/"alone") and chances(merged[0]/"one") == pytest.approx(chances(merged[0]/"alone"), abs=3e-5)
    said = merged[0]/"one"/"said.jsonl"
    lines = said.read_bytes().split(b"\n")
    said.write_bytes(b"\n".join(lines[:len(lines) // 2]) + b"\n" + lines[-2][:50])               # killed half-way through a write
    evaluate_model(own(merged, "one", batch_size=5))
    assert files(merged[0]/"one") == files(merged[0]/"alone")
    time = said.stat().st_mtime_ns
    evaluate_model(own(merged, "one"))
    assert said.stat().st_mtime_ns == time                                                       # nothing was asked

def test_two_processes_give_the_same_files(merged):
    if not (merged[0]/"alone").is_dir(): evaluate_model(own(merged, "alone"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", sys.executable, "-c", "import sys; from blip2mgm.cli import main; sys.exit(main())", "evaluate", str(merged[0]/"merged"),
               "--data", str(merged[1]), "--pictures", "3", "--max-new-tokens", "4", "--out", str(merged[0]/"both")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (merged[0]/"both").glob("said*")) == ["said.0of2.jsonl", "said.1of2.jsonl"]
    assert files(merged[0]/"both") == files(merged[0]/"alone")

@pytest.mark.parametrize("name,message", [("no/where/here", "no model folder"), ("nowhere", "no model folder"), ("params/demo", "it is no model")])
def test_a_name_that_is_no_model(name, message):
    with pytest.raises(UserError, match=message): open_model(name)

def test_shares_hold_everything_once():
    items = [Item(str(i), "t", i, f"q{i}", f"p{i // 4}" if i % 3 else None) for i in range(40)]
    parts = [share(items, 3, k) for k in range(3)]
    assert sorted(i.question_id for p in parts for i in p) == list(range(40)) and share(items, 1, 0) == items
