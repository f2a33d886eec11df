"Answers are real, belong to their weights, survive a rerun, and are never invented."
import base64, csv, io, json
from pathlib import Path
import pytest, yaml
from PIL import Image, ImageDraw
from blip2mgm.core import ConfigError, UserError, read_json, read_jsonl, write_json, write_jsonl
from blip2mgm.evaluate import EvaluateConfig, ask_about, evaluate
from blip2mgm.scores import answer_gallery, browse_answers, choose, conclusion, plot_by_type, score_matrix, score_rows, type_rows
from blip2mgm.tasks import MMBENCH, TEXTVQA

FIELDS = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}

@pytest.mark.parametrize("bad,message", [(dict(tasks=["textvq"]), "there is no textvq; did you mean"), (dict(workers=0), "workers"), (dict(arms=[]), "at least one"), (dict(seeds="3"), "seeds")])
def test_config(bad, message):
    with pytest.raises((ConfigError, UserError), match=message): EvaluateConfig(**bad)

def jpeg(colour):
    im = Image.new("RGB", (90, 60), "gray"); ImageDraw.Draw(im).rectangle((20, 10, 50, 40), fill=colour)
    out = io.BytesIO(); im.save(out, "JPEG"); return out.getvalue()

def make_data(root: Path):
    "Three pictures, one of them broken; five questions, one of them in two rotations."
    (root/TEXTVQA["images"]).mkdir(parents=True); (root/"mmbench").mkdir()
    for name, data in dict(p1=jpeg("red"), p2=jpeg("blue"), p3=b"broken").items(): (root/TEXTVQA["images"]/f"{name}.jpg").write_bytes(data)
    ask = lambda i, q, p, a: dict(question_id=i, question=q, image_id=p, answers=[a] * 10, question_type=q.split()[1])
    rows = [ask(1, "what color is the square?", "p1", "red"), ask(2, "what color is the square?", "p2", "blue"), ask(3, "how many shapes are there?", "p1", "1"), ask(4, "what color is it?", "p3", "red")]
    (root/TEXTVQA["questions"]).write_text(json.dumps(dict(data=rows)))
    (root/TEXTVQA["ocr"]).write_text(json.dumps(dict(data=[])))
    cell = base64.b64encode(jpeg("red")).decode()
    turns = [dict(index=i, question="what color?", hint="", A=a, B=b, C="", D="", answer=t, category="color", image=cell, **{"l2-category": "x"}, split="dev") for i, a, b, t in ((9, "red", "blue", "A"), (1000009, "blue", "red", "B"))]
    with open(root/MMBENCH, "w", newline="") as f: w = csv.DictWriter(f, list(turns[0]), delimiter="\t"); w.writeheader(); w.writerows(turns)

def make_model(run: Path, arm: str, seed: int, change: float):
    "A model as training leaves it, with an adapter that was moved at random instead of trained."
    import torch
    from blip2mgm import adapters
    from blip2mgm.jobs import TrainConfig, base_model
    model = adapters.attach(base_model(TrainConfig())[0], seed=seed)
    torch.manual_seed(seed)
    for name, p in adapters.trained(model).items():
        if "lora_B" in name: p.data = torch.randn_like(p) * change
    adapters.save(model, run/"train"/arm/f"seed{seed}")
    write_json(run/"train"/arm/f"seed{seed}"/"done.json", {})

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from blip2mgm.jobs import TrainConfig
    root = tmp_path_factory.mktemp("world"); run = root/"run"
    make_data(root/"data"); make_model(run, "raw", 0, .05); make_model(run, "blip2_filtered", 0, .2)
    (run/"train"/"config.yaml").write_text(yaml.safe_dump(TrainConfig().to_dict()))
    cfg = EvaluateConfig(run=str(run), data=str(root/"data"), arms=["raw", "blip2_filtered"], seeds=1, max_new_tokens=3, tasks=["textvqa", "mmbench"], stage1_pictures=0, probe_pictures=1)
    return cfg, run/"evaluate", evaluate(cfg)

def test_every_question_has_a_row_in_the_published_form(world):
    cfg, folder, result = world
    assert result["new"] > 12 and [(s["arm"], s["task"], s["n"], s["n_rows"]) for s in result["scores"]] == [
        (a, t, n, r) for a in (*cfg.arms, "blind") for t, n, r in (("textvqa", 4, 4), ("mmbench", 1, 2))]
    for arm in cfg.arms:
        rows = read_jsonl(folder/arm/"seed0"/"textvqa"/"answers.jsonl")
        assert [r["question_id"] for r in rows] == [1, 2, 3, 4] and all(set(r) == FIELDS for r in rows)
        assert all(r["model_id"] == f"{arm}/seed0" and all(r["metadata"][k] for k in ("weights", "adapter", "processor", "engine", "prompt")) for r in rows)
    weights = {r["metadata"]["adapter"] for arm in cfg.arms for r in read_jsonl(folder/arm/"seed0"/"textvqa"/"answers.jsonl")}
    assert len(weights) == 2
    assert read_json(folder/"scores.json")["scores"] == result["scores"]

def test_a_broken_picture_is_a_failed_answer(world):
    _, folder, result = world
    assert all(s["outcomes"]["failed"] == (s["task"] == "textvqa" and s["arm"] != "blind") for s in result["scores"])   # blind, a picture cannot be broken
    last = read_jsonl(folder/"raw"/"seed0"/"textvqa"/"answers.jsonl")[-1]
    assert last["text"] == "" and last["metadata"]["outcome"] == "failed" and "Error" in last["metadata"]["failed"] and last["metadata"]["score"] == 0

def test_score_matrix(world):
    _, folder, _ = world
    m = score_matrix(folder, "raw", "textvqa")
    assert m["units"] == [1, 2, 3, 4] and m["clusters"] == ["p1", "p2", "p1", "p3"] and m["kinds"] == ["color", "color", "many", "color"] and len(m["scores"]) == 1
    assert score_matrix(folder, "raw", "mmbench")["units"] == [9]
    with pytest.raises(UserError, match="no answers"): score_matrix(folder, "nobody", "textvqa")

def test_seeds_asked_differently_are_refused(tmp_path):
    row = lambda i: dict(question_id=i, metadata=dict(unit=i, image_id="p", kind="k", score=1.))
    for seed, ids in ((0, [1, 2]), (1, [1, 3])): write_jsonl(tmp_path/"raw"/f"seed{seed}"/"textvqa"/"answers.jsonl", map(row, ids))
    with pytest.raises(UserError, match="not asked the same"): score_matrix(tmp_path, "raw", "textvqa")

def test_rerun_asks_only_what_changed(world):
    cfg, folder, before = world
    files = {p: p.read_bytes() for p in folder.rglob("answers.jsonl")}
    said = {p: p.stat().st_mtime_ns for p in folder.rglob("said.jsonl")}
    (folder/"raw"/"seed0"/"mmbench"/"answers.jsonl").write_text("")                 # touched: made anew from what was said
    again = evaluate(cfg)
    assert again["new"] == 0 and again["scores"] == before["scores"] and all(p.read_bytes() == b for p, b in files.items()) and all(p.stat().st_mtime_ns == t for p, t in said.items())
    lines = (folder/"raw"/"seed0"/"said.jsonl").read_bytes().split(b"\n")
    (folder/"raw"/"seed0"/"said.jsonl").write_bytes(b"\n".join(lines[:5]) + b"\n{")  # killed while writing: the rest is asked again
    repaired = evaluate(EvaluateConfig(**cfg.to_dict() | dict(workers=2)))
    assert repaired["new"] == len(lines) - 6 and repaired["scores"] == before["scores"] and all(p.read_bytes() == b for p, b in files.items())
    make_model(Path(cfg.run), "raw", 0, .3)                                         # trained anew: its old answers are not its own
    changed = evaluate(cfg)
    same = lambda s: [x for x in s["scores"] if x["arm"] not in ("raw", "blind")]
    assert changed["new"] > 10 and same(changed) == same(before)
    assert {s["decided_by"]["adapter"] for s in changed["scores"] if s["arm"] == "raw"}.isdisjoint(s["decided_by"]["adapter"] for s in before["scores"])

def test_scoring_anew_asks_nothing(world, monkeypatch):
    "Answers belong to what gave them; when a rule changes, only marks and scores do."
    import blip2mgm.evaluate, blip2mgm.tasks as tasks
    cfg, folder, _ = world
    before = evaluate(cfg)
    stricter = tasks.Task("textvqa", "accuracy", tasks.read_textvqa, lambda q, text: dict(score=.5, outcome="answered", read=text), tasks.write_answers)
    monkeypatch.setitem(tasks.TASKS, "textvqa", stricter)
    after = evaluate(cfg)
    assert after["new"] == 0 and {s["overall"] for s in after["scores"] if s["task"] == "textvqa"} == {.375, .5} and {s["overall"] for s in after["scores"] if s["task"] == "textvqa"} != {s["overall"] for s in before["scores"]}
    monkeypatch.undo(); evaluate(cfg)

def test_probes_and_blind(world):
    cfg, folder, result = world
    assert {r["n"] for r in result["probes"]} == {2, 1} and {r["pictures"] for r in result["probes"]} == {1}
    assert len(result["probes"]) == 2 * 2 * 23 and all(r["same"] == 1 for r in result["probes"] if r["kind"] == "clean")
    rows = read_jsonl(folder/"blind"/"seed0"/"mmbench"/"answers.jsonl")
    assert len(rows) == 2 and all(set(r["metadata"]["options"]) == {"A", "B"} for r in rows) and score_matrix(folder, "blind", "textvqa")["units"] == [1, 2, 3, 4]

def test_a_missing_model_is_named(world):
    cfg, *_ = world
    with pytest.raises(UserError, match="train random with seed 0"): evaluate(EvaluateConfig(**cfg.to_dict() | dict(arms=["raw", "random"])))

def test_whole_pictures_are_left_out(world):
    cfg, *_ = world
    asked = ask_about(Path(cfg.data), EvaluateConfig(**cfg.to_dict() | dict(pictures=1)))
    assert [q.id for q in asked["textvqa"]] == [1, 3] and len(asked["mmbench"]) == 2

def test_tables_and_figures(world):
    import matplotlib; matplotlib.use("agg")
    cfg, folder, result = world
    table = score_rows(result)
    assert table[0]["arm"] == "(never looking)" and len(table) == 8
    assert type_rows(result, "textvqa")[-1]["n"] == 4 and all(isinstance(s, str) for s in conclusion(result))
    answers = read_jsonl(folder/"raw"/"seed0"/"textvqa"/"answers.jsonl")
    assert len(choose(answers, 9)) == 4 and len(choose(answers, 3)) == 3
    asked = {"textvqa": ask_about(Path(cfg.data), cfg)["textvqa"]}
    hostile = {arm: {"textvqa": [a | {"text": "<script>alert(1)</script>"} if arm == "other" else a for a in answers]} for arm in ("raw", "other")}
    shown = browse_answers(asked, hostile)
    assert "other: &lt;script&gt;" in shown._repr_html_() and "<script" not in shown._repr_html_() and "raw: " in repr(shown) and 2 <= sum(map(len, shown.kinds.values())) <= 4
    assert plot_by_type(result, "textvqa").get_title("left") == "textvqa"
    assert len(answer_gallery(ask_about(Path(cfg.data), cfg)["textvqa"], answers, 4).axes) == 8
