"The report: planted effects are found, equal arms are not told apart, and a file that was touched stops it by name."
import json
import random
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

from blip2mgm.core import UserError, data_fingerprint, file_hash, read_json, write_json, write_jsonl
from blip2mgm.stage import machine, result_hash, versions
from blip2mgm.data import gate
from blip2mgm.formats import caption_of, text_of
from blip2mgm.enhance import EnhanceConfig
from blip2mgm.answers import keep_answers
from blip2mgm.asking import Reply
from blip2mgm.evaluate import EvaluateConfig, ask_about
from blip2mgm.explore import analyse
from blip2mgm.world import ensure_world
from blip2mgm.findings import Artefacts, arm_scores, compare_arms, flip_rows, flipped_answers, pick_flips, training_rows
from blip2mgm.page import banner, gallery, md_table, page_of, report_md, tables_of
from blip2mgm.report import build, finish_comparison, publish, save_figures, write_comparison
from blip2mgm.verdict import above_blind, plot_scores, plot_verdict, verdict_of
from blip2mgm.plan import ReportConfig, freeze_plan
from blip2mgm.runs import compare_runs, history
from blip2mgm.tasks import never_looking
from blip2mgm.jobs import TrainConfig

RATES = {"raw": 0.45, "blip2_filtered": 0.75, "random": 0.45, "raw_again": 0.45}
ASKED = ["textvqa", "mmbench"]
CONFIGS = {"enhance": EnhanceConfig, "train": TrainConfig, "evaluate": lambda: EvaluateConfig(tasks=ASKED)}
EVIL = "<script>alert('no')</script>"


def keep_record(run, stage, upstream=()):
    "A record as a finished stage leaves it."
    files = sorted(f for f in (run / stage).rglob("*") if f.is_file())
    write_json(run / stage / "record.json", {
        "stage": stage, "outputs": {f.relative_to(run / stage).as_posix(): file_hash(f) for f in files}, "data": data_fingerprint(run / "data"), "code": "0" * 64,
        "upstream": {u: result_hash(read_json(run / u / "record.json")) for u in upstream}, "versions": versions(), "machine": machine(), "seconds": 1.0,
        "start": "2025-01-01T00:00:00+00:00", "peak_memory_mib": 100.0, "config": CONFIGS[stage]().to_dict() if stage in CONFIGS else {}})


def say(rng, q, rate):
    "A right or a wrong answer."
    if rng.random() < rate: return q.answers[0] if q.options else max(set(q.answers), key=q.answers.count)
    return rng.choice([k for k in "ABCD" if k not in q.answers]) if q.options else EVIL


def seeds_of(arm): return [100, 101, 102] if arm == "raw_again" else [0, 1, 2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder as the stages leave it, with made-up answers."
    run = tmp_path_factory.mktemp("run")
    root = ensure_world(run / "data", "smoke", 1)
    gated = gate(root / "captions.jsonl", root)
    write_json(run / "explore/analysis_results.json", analyse(gated))
    keep_record(run, "explore")
    for arm in RATES:
        rows = gated.accepted if arm.startswith("raw") else gated.accepted[::2]
        if arm == "blip2_filtered": rows = [r | {"text": text_of(f"a picture of two shapes: at the top a red circle {EVIL}")} for r in rows]
        write_jsonl(run / f"enhance/arms/{arm}/captions.jsonl", rows)
        write_jsonl(run / f"enhance/arms/{arm}/lineage.jsonl", [{"id": r["id"], "status": "kept", "raw_caption": caption_of(g["text"]), "final_caption": caption_of(r["text"])} for r, g in zip(rows, gated.accepted[::2])])
    write_json(run / "enhance/summary.json", {"rows": {"in": gated.rows, "kept": gated.rows // 2}, "operators": [{"operator": "words_num_filter", "before": 9, "after": 5, "dropped": 4}],
                                              "in_place": {"BLIP-2, kept": {"color": {"right": 1, "n": 2, "share": 0.5}}},
                                              "mentions": {"raw": {"colors": {"there": 9, "named": 4, "right": 2}, "numbers": {"there": 0, "named": 0, "right": 0}}}})
    keep_record(run, "enhance")
    for arm in RATES:
        for seed in seeds_of(arm):
            for stage in (1, 2):
                write_jsonl(run / f"train/{arm}/seed{seed}/stage{stage}/steps.jsonl", [{"step": i, "loss": 3 / (i + 1), "grad_norm": 1.0, "samples": 8, "seconds": i / 2} for i in range(20)])
    keep_record(run, "train", ["enhance"])
    asked, scores = ask_about(root, EvaluateConfig(run=str(run), tasks=ASKED)), []
    for arm, rate in RATES.items():
        for seed in seeds_of(arm):
            rng = random.Random(f"{arm} {seed}")
            for task, qs in asked.items():
                said = [say(rng, q, rate) for q in qs]
                scores.append(keep_answers(run / f"evaluate/{arm}/seed{seed}/{task}", task, qs, said, [Reply(ended=True)] * len(qs), {"weights": "w"}, {"arm": arm, "seed": seed}))
    blind = {task: never_looking(task, qs) for task, qs in asked.items()}
    write_json(run / "evaluate/scores.json", {"scores": scores, "never_looking": blind})
    keep_record(run, "evaluate", ["train"])
    return run


@pytest.fixture(scope="module")
def cfg(run): return ReportConfig(run=str(run), flips=6)


@pytest.fixture(scope="module")
def built(run, cfg):
    art = Artefacts(run)
    out, tables, compared, logs = build(art, cfg, run / "data")
    flipped = [f for task in ("textvqa", "mmbench") for f in flipped_answers(art, tables, task, cfg, 3)]
    return finish_comparison(out, art, cfg, flipped), tables, compared, logs


def test_a_planted_effect_is_found_and_its_controls_are_quiet(built):
    out, _, compared, _ = built
    assert out["verdict"] == out["verdicts"]["textvqa"] == "better" and out["trusted"] and out["headline"] == "Yes: the model answers TextVQA better"
    assert "Verdict: better, because" in out["sentence"] and out["samples"] == {1: [160], 2: [160]} and "\n" not in out["sentence"]
    assert {c["verdict"] for c in out["comparisons"] if c["arm"] != "blip2_filtered"} <= {"inconclusive", "equivalent"}
    assert [c.arm for c in compared] == ["blip2_filtered"] * 2 + ["random"] * 2 + ["raw_again"] * 2 and [c.family for c in compared] == [1, 3, 3, 3, 2, 2]
    told = {t["check"]: t["ok"] for t in out["checks"]}
    assert told == {"A/A": True, "shuffled captions": None, "looks at pictures": None, "learned": True, "seeds": True, "equal training": True, "planned": False}


def test_what_was_not_run_is_said(built):
    out = built[0]
    assert {m for r in out["split"] for m in r["missing"]} == {"raw_filtered", "blip2"} and any("raw_filtered" in s and "shuffled" in s for s in out["next"])
    assert [r for r in tables_of(out)["parts of the effect"] if r["verdict"] == "not in this run: no arm raw_filtered"]
    assert {c.get("planned") for c in tables_of(out)["differences"]} == {"exploratory", None} and not out["plan"]["frozen"]


def test_conclusions_name_parts_of_the_report(built):
    from conftest import ROOT, cells
    heads = re.findall(r"(?m)^## (.+)$", "\n".join(s for s, _ in cells(ROOT / "nbs/50_report.ipynb", "markdown")))
    assert len(built[0]["conclusions"]) >= 6 and all(c["at"] in heads for c in built[0]["conclusions"])


def test_the_claims_are_measured(built):
    claims = {c["claim"]: c for c in built[0]["claims"]}
    longer = next(c for k, c in claims.items() if "longer" in k)
    assert longer["holds"] in ("in direction", "yes", "no") and longer["value"] > 0 and "pictures" in longer["measured fairly"]
    assert all(c["from"] for c in claims.values()) and any("same answers" in k for k in claims) and any("kept" in k for k in claims)


def test_numbers_are_those_of_the_answer_files(run, built):
    out = built[0]
    for s in out["scores"]:
        files = [read_json(run / f"evaluate/{s['arm']}/seed{k}/{s['task']}/scores.json")["overall"] for k in s["seeds"]]
        assert s["per_seed"] == pytest.approx(files) and s["value"] == pytest.approx(sum(files) / 3)
    for c in out["comparisons"]:
        means = [next(s["value"] for s in out["scores"] if (s["task"], s["arm"]) == (c["task"], arm)) for arm in (c["arm"], "raw")]
        assert c["value"] == pytest.approx(means[0] - means[1]) and c["low"] <= c["value"] <= c["high"]
    assert out["seeds"] == {arm: seeds_of(arm) for arm in RATES}


def test_every_number_names_files_and_every_file_has_its_hash(run, built):
    out = built[0]
    for name, was in out["files"].items():
        if not name.startswith("blip2mgm/"): assert file_hash(run / name) == was
    for part in ("comparisons", "scores", "blind", "by_type", "flips", "data", "training", "captioner", "mentions", "shown", "left_out", "opinions", "claims", "machine_claims", "machine_cost", "answers", "reached", "words", "foundation"):
        for row in out[part]: assert row["from"] and all(name in out["files"] for name in row["from"]), part
    for stage in ("explore", "enhance", "train", "evaluate"): assert f"{stage}/record.json" in out["files"]
    json.dumps(out, allow_nan=False)


@pytest.mark.parametrize("name", ["explore/analysis_results.json", "enhance/summary.json", "enhance/arms/random/captions.jsonl", "train/raw/seed1/stage2/steps.jsonl",
                                  "evaluate/scores.json", "evaluate/blip2_filtered/seed2/mmbench/answers.jsonl"])
def test_a_file_that_was_touched_or_is_gone_stops_the_report_by_its_name(run, cfg, name):
    path = run / name
    before = path.read_bytes()
    try:
        path.write_bytes(before + b" ")
        with pytest.raises(UserError, match=f"{re.escape(name)} was changed"): build(Artefacts(run), cfg, run / "data")
        path.unlink()
        with pytest.raises(UserError, match=f"{re.escape(name)} is missing"): Artefacts(run).path(name)
    finally: path.write_bytes(before)


def changed_record(run, stage, change):
    path = run / stage / "record.json"
    before = path.read_text()
    write_json(path, change(json.loads(before)))
    return lambda: path.write_text(before)


@pytest.mark.parametrize("stage, change, message", [
    ("train", lambda r: r | {"outputs": r["outputs"] | {"more": "0" * 64}}, "evaluate was made from another result of train"),
    ("enhance", lambda r: r | {"data": "other"}, "enhance saw other data"),
    ("enhance", lambda r: r | {"outputs": r["outputs"] | {"arms/raw_again/captions.jsonl": "0" * 64}}, "train was made from another result|not those of raw"),
    ("evaluate", lambda r: r | {"outputs": {k: v for k, v in r["outputs"].items() if "raw/seed1" not in k}}, "with the same number of seeds"),
])
def test_results_that_do_not_belong_together_are_refused(run, cfg, stage, change, message):
    restore = changed_record(run, stage, change)
    try:
        with pytest.raises(UserError, match=message): build(Artefacts(run), cfg, run / "data")
    finally: restore()


def test_an_unfinished_stage_is_named(run, cfg):
    (run / "train/record.json").rename(run / "train/away.json")
    try:
        with pytest.raises(UserError, match="train is not finished"): build(Artefacts(run), cfg, run / "data")
    finally: (run / "train/away.json").rename(run / "train/record.json")


def table(rng, rate, seeds=3, n=240, seed_sd=0.02):
    chance = np.clip(rate + rng.normal(0, seed_sd, (seeds, 1)) + np.random.default_rng(7).uniform(-0.2, 0.2, n), 0, 1)
    return {"seeds": list(range(seeds)), "units": list(range(n)), "clusters": [i // 4 for i in range(n)], "kinds": ["k"] * n, "scores": (rng.random((seeds, n)) < chance).astype(float).tolist(), "from": ["x"]}


def judged(tables, cfg=ReportConfig(endpoint="t"), blind=0.0, **kw): return verdict_of(compare_arms(tables, cfg), arm_scores(tables, 0.95), {k: blind for k, _ in tables}, cfg, **kw)


def test_arms_with_the_same_data_are_rarely_told_apart():
    said = [judged({("t", arm): table(np.random.default_rng([i, j]), 0.5) for j, arm in enumerate(RATES)}) for i in range(60)]
    assert sum(v["trusted"] for v in said) >= 53 and sum(v["verdict"] in ("inconclusive", "equivalent") for v in said) >= 53


def test_a_control_that_differs_is_said_loudly():
    rng = np.random.default_rng(0)
    v = judged({("t", arm): table(rng, 0.8 if arm == "raw_again" else 0.4) for arm in RATES})
    assert not v["trusted"] and v["headline"] == "Not to be trusted" and v["sentence"].startswith("This run is not to be trusted: raw_again")
    assert "&#9888;" in banner(v).page and "raw_again" in v["warnings"][0]
    harmless = judged({("t", arm): table(rng, 0.4) for arm in (*RATES, "shuffled")})
    assert not harmless["trusted"] and "shuffled" in harmless["sentence"]
    hurt = judged({("t", arm): table(rng, 0.1 if arm == "shuffled" else 0.6) for arm in (*RATES, "shuffled")})
    assert hurt["trusted"] and next(t["ok"] for t in hurt["checks"] if t["check"] == "shuffled captions")


def test_without_control_or_with_one_seed_the_report_says_so():
    rng = np.random.default_rng(0)
    tables = {("t", arm): table(rng, r, seeds=1) for arm, r in (("raw", 0.2), ("blip2_filtered", 0.9))}
    v = judged(tables, warnings=["something else"], planned=False)
    ok = {t["check"]: t["ok"] for t in v["checks"]}
    assert v["verdict"] == "inconclusive" and ok["A/A"] is None and ok["seeds"] is False and ok["planned"] is False and "something else" in v["sentence"]
    with pytest.raises(UserError, match="no answers of other to t"): judged(tables, ReportConfig(arm="other", endpoint="t"))
    with pytest.raises(UserError, match="no answers of blip2_filtered to nothing"): judged(tables, ReportConfig(endpoint="nothing"))


def test_models_that_learned_nothing_are_no_finding():
    rng = np.random.default_rng(0)
    v = judged({("t", arm): table(rng, -1) for arm in RATES}, blind=0.4)   # every answer wrong
    assert "not shown that the models learned the task" in v["sentence"] and not next(t["ok"] for t in v["checks"] if t["check"] == "learned")


def test_a_score_a_hair_above_guessing_is_not_learned():
    tables = {("t", arm): table(np.random.default_rng(i), 0.5) for i, arm in enumerate(RATES)}
    scores = arm_scores(tables, 0.95)
    raw = next(s for s in scores if s["arm"] == "raw")
    for line, learned in ((raw["low"] - .001, True), (raw["low"] + .001, False), (raw["value"] - .001, False)):
        assert above_blind(scores, {"t": line}, "t", ("raw",)) is learned


def frozen(run, **kw):
    configs = {k: c() for k, c in CONFIGS.items()} | {"report": ReportConfig(**kw)}
    plan = freeze_plan(run, configs)
    return plan


def test_the_plan(run, tmp_path):
    import shutil
    mine = shutil.copytree(run, tmp_path / "run")
    cfg, go = ReportConfig(run=str(mine)), lambda **kw: build(Artefacts(mine), ReportConfig(run=str(mine), **kw), mine / "data")[0]
    frozen(mine)
    with pytest.raises(UserError, match=r"plan.json was frozen after the training had begun"): go()
    record = read_json(mine / "train/record.json") | {"start": "2999-01-01T00:00:00+00:00"}
    write_json(mine / "train/record.json", record)
    out = go()
    assert out["plan"]["frozen"] and all(r["as planned"] for r in out["plan"]["rows"] if r["what"] not in ("arms", "tasks", "seeds")) and "plan.json" in [f for f in out["plan"]["from"]]
    assert {t["check"]: t["ok"] for t in out["checks"]}["planned"] and {c["planned"] for c in out["comparisons"]} == {True}
    other = go(smallest=0.05)                                              # another question than was frozen
    assert not {t["check"]: t["ok"] for t in other["checks"]}["planned"] and {c["planned"] for c in other["comparisons"]} == {False}
    assert frozen(mine, smallest=0.05)["replaces"][0]["question"]["smallest"] == 0.02
    write_json(mine / "plan.json", read_json(mine / "plan.json") | {"frozen": "1999"})
    with pytest.raises(UserError, match="plan.json was changed"): go()
    (mine / "plan.json").unlink()
    frozen(mine)
    write_json(mine / "train/record.json", record | {"config": record["config"] | {"seeds": 7}})
    with pytest.raises(UserError, match="train comes from another plan .*seeds was planned as 2, and is 7"): go()


def test_flips_take_no_side(built):
    rows = [{"unit": i, "kind": "k", "gained": i % 4, "lost": 0} for i in range(20)] + [{"unit": 20 + i, "kind": "k", "gained": 0, "lost": 1} for i in range(5)]
    ways = [way for _, way in pick_flips(rows, 8, 0)]
    assert ways.count("gained") == ways.count("lost") == 4 and pick_flips([], 8, 0) == []
    assert [r["gained"] for r, way in pick_flips(rows, 8, 0) if way == "gained"] == [3] * 4
    for f in built[0]["shown"]: assert f["base"] != f["arm"] and f["seeds"] <= f["of"] == 3
    moved = flip_rows(built[1], "mmbench", "blip2_filtered", "raw")
    net = sum(r["gained"] - r["lost"] for r in moved) / len(moved) / 3
    assert net == pytest.approx(next(c["value"] for c in built[0]["comparisons"] if (c["arm"], c["task"]) == ("blip2_filtered", "mmbench")))


def test_numbers_that_are_none_do_not_stop_the_tables():
    rows = training_rows({"raw": {0: {1: [{"loss": None, "grad_norm": float("nan")}]}}})
    assert rows[0]["first_loss"] is None and rows[0]["steps_without_number"] == 1


def test_page_is_self_contained_and_strangers_text_is_escaped(run, cfg, built, tmp_path):
    out, _, compared, _ = built
    root = run / "data"
    questions = {(t, q.id): q for t, qs in ask_about(root, EvaluateConfig(run=str(run), tasks=ASKED)).items() for q in qs}
    cards, bits = gallery(out["shown"], questions, "raw", "blip2_filtered"), nbformat.v4
    assert "data:image/jpeg;base64," in cards.page and EVIL not in cards.page and "&lt;script&gt;" in cards.page
    shown = [bits.new_output("display_data", {"text/html": x._repr_html_(), "text/plain": repr(x)}) for x in (banner(out), cards)]
    cells = [bits.new_markdown_cell("# Made of"), bits.new_code_cell("secret = 1", outputs=[bits.new_output("stream", text="left behind")]), bits.new_markdown_cell("# The report"),
             bits.new_code_cell("banner(out)", outputs=shown), bits.new_markdown_cell("## Data"), bits.new_code_cell("x = 1")]
    nbformat.write(bits.new_notebook(cells=cells), tmp_path / "report.ipynb")
    page = page_of(tmp_path / "report.ipynb", "Title & more")
    assert not re.search(r"<(script|link|iframe|object)\b", page) and not re.search(r"""(src|href)=["']?(https?:)?//""", page) and "default-src 'none'" in page
    assert "banner(out)" not in page and "secret" not in page and "left behind" not in page and 'href="#data">Data' in page and "Title &amp; more" in page
    with pytest.raises(UserError, match="no cell with the heading"): page_of(_without_heading(tmp_path), "x")


def _without_heading(folder):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Other")]), folder / "other.ipynb")
    return folder / "other.ipynb"


def test_files_of_the_report(built, tmp_path):
    out = built[0]
    write_comparison(out, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Yes: the model") and (tmp_path / "report/tables/differences.csv").read_text().startswith("task,arm,") and "](report/difference.png)" in text and "](difference.png)" in (tmp_path / "report/report.md").read_text()
    assert read_json(tmp_path / "comparison.json")["sentence"] == out["sentence"] and EVIL not in text
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# The report")])
    nbformat.write(notebook, tmp_path / "done.ipynb")
    assert publish(tmp_path, tmp_path / "done.ipynb") == tmp_path / "report.html" and (tmp_path / "report.ipynb").is_file()
    assert report_md(read_json(tmp_path / "comparison.json")) == text   # the text follows from the file alone


def test_tables_of_the_captioner(built):
    shown = tables_of(built[0])
    assert [r for r in shown["captioner"] if r["BLIP-2, kept (this run)"] == "50.0% of 2"] and [r["right, of those named"] for r in shown["things named"]] == ["50.0% of 4", "none"]
    assert shown["foundation"] and tables_of(built[0] | {"captioner": []})["captioner"][0]["named rightly"].startswith("not known")


def test_runs_are_compared_and_listed(run, cfg, built, tmp_path, capsys):
    import shutil
    one = shutil.copytree(run, tmp_path / "one")
    (one / "report").mkdir()
    write_comparison(built[0], one)
    (one / "report/config.yaml").write_text("run: x\n")
    with pytest.raises(UserError, match="no finished report"): compare_runs([str(one), str(run)])
    keep_record(one, "report", [])
    two = shutil.copytree(one, tmp_path / "two")
    rows = compare_runs([str(one), str(two)])
    assert [r["verdict"] for r in rows] == ["(compared with)", "equivalent"] * 2 and rows[1]["difference to the first"].strip("+") == "0.0"
    rows = compare_runs([str(one), str(two)], "random")
    assert {r["arm"] for r in rows} == {"random"}
    listed = history(tmp_path)
    assert [r["verdict"] for r in listed] == ["better", "better"] and listed[0]["question"] == "blip2_filtered - raw, TextVQA" and listed[0]["seeds"] == 3
    from blip2mgm.cli import main
    assert main(["history", str(tmp_path)]) == 0 and "blip2_filtered - raw, TextVQA" in capsys.readouterr().out
    assert main(["compare", str(one), str(two)]) == 0 and "equivalent" in capsys.readouterr().out
    write_json(two / "evaluate/record.json", read_json(two / "evaluate/record.json") | {"data": "other"})
    with pytest.raises(UserError, match="two was asked about other data"): compare_runs([str(one), str(two)])
    (one / "report/comparison.json").write_text("{}")
    with pytest.raises(UserError, match="comparison.json was changed"): compare_runs([str(one), str(two)])


def test_markdown_tables_escape():
    assert md_table([]).startswith("| (nothing) |")
    assert md_table([{"a": "x|y\n<b>", "b": 1234, "c": None}]).splitlines()[-1] == r"| x\|y \<b\> | 1,234 |  |"


def test_figures_draw(built, cfg, tmp_path):
    out, _, compared, _ = built
    same = compare_arms({("t", arm): table(np.random.default_rng(0), 0.5) for arm in RATES}, cfg)   # no difference at all
    draw = lambda: {"a": plot_verdict(compared, cfg), "b": plot_scores(out["scores"], {b["task"]: b["overall"] for b in out["blind"]}), "c": plot_verdict(same, cfg)}
    first = {n: file_hash(tmp_path / n) for n in save_figures(draw(), tmp_path)}
    assert len(first) == 6 and first == {n: file_hash(tmp_path / n) for n in save_figures(draw(), tmp_path)}
