"""The tuning study: its parameter files, data, model and decisions."""
import math
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT

from blip2mgm import overhead as O
from blip2mgm.core import UserError, read_json, write_json
from blip2mgm.instructblip import DESCRIBE, LIST, add_lora, encode, listing, load_instructblip, answers_of, see, foundation_pictures
from blip2mgm.search import Place, START, TREE, branch, propose, run_one
from blip2mgm.trials import RunConfig, begin, load_data, take_step, tune_run
from blip2mgm.tune import TuneConfig, study_runs

RUNS = sorted((ROOT / "params/study/original").glob("*.yaml"))
STUDY = {  # lr, batch, samples, rank, alpha, precision, warmup, clip as the study noted them
    "1": (5e-6, 2, 20, 4, 8, "half", 0, 0), "2": (5e-6, 8, 400, 8, 16, "fp32", 0, 0), "3": (1e-3, 4, 400, 16, 32, "fp32", 0, 0),
    "4": (2e-4, 4, 400, 16, 32, "fp32", 200, 1), "5": (2e-4, 8, 100, 16, 32, "fp32", 0, 0), "5b": (2e-4, 16, 2500, 16, 32, "fp32", 0, 0)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    return Place(str(O.ensure_overhead(folder / "world", dict(train=16, validation=8, test=8))), str(folder / "runs"))


@pytest.fixture(scope="module")
def data(place): return load_data(place.root, place.folder)


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f.stem)
def test_the_runs_are_the_studys(file):
    c = RunConfig.load(file)
    assert (c.lr, c.batch, c.samples, c.r, c.alpha, c.precision, c.warmup, c.clip) == STUDY[file.stem] and c.reported
    said, usual = yaml.safe_load(file.read_text()), RunConfig().to_dict()
    assert [k for k, v in said.items() if v == usual[k]] == []


def test_the_demo_runs_all_of_them_and_the_five_stages_none():
    cfg = TuneConfig.load("params/study/tune.yaml")
    assert sorted(study_runs(cfg, 2500)) == sorted(STUDY) and cfg.seeds >= 3
    assert not (ROOT / "params/demo/tune.yaml").exists() and not (ROOT / "params/smoke/tune.yaml").exists()


def test_no_site_is_in_two_splits():
    import random
    seen = {s: {O.caption(O.make_site(random.Random(f"{s}{i}"), s)) for i in range(300)} for s in O.SPLITS}
    assert not set.intersection(seen["train"], seen["test"]) and not set.intersection(seen["foundation"], seen["validation"])


def test_shipped_model_is_the_one_in_its_record_and_knows_its_lessons():
    from blip2mgm.core import file_hash, weights_dir
    record = read_json(weights_dir() / "instructblip/record.json")
    assert file_hash(weights_dir() / "instructblip/model.safetensors") == record["weights"]
    model, processor = load_instructblip()
    sites, files = foundation_pictures(24, 99)
    said = answers_of(model, processor, see(model, processor, files), [LIST] * 24)
    right = sum(a.split(",")[0] == s.land for a, s in zip(said, sites))
    assert right >= 22


def test_missing_placeholders_are_noticed(data):
    config = type(data.config)(**{**data.config.to_dict(), "image_token_index": 7})
    good = encode(data.processor, data.config, data.sets["test"].seen[:1], [DESCRIBE], ["a red plane"])
    assert (good.ids == data.config.image_token_index).sum() == data.config.num_query_tokens
    with pytest.raises(UserError, match="knows no word"): encode(data.processor, data.config, data.sets["test"].seen[:1], [DESCRIBE], ["zzz qqq"])


def test_picture_changes_the_answer(data):
    t = begin(data, RunConfig(), 1); t.model.eval(); b = data.sets["test"].batch([0])
    with torch.no_grad(): gap = (t.model(**b).logits - t.model(**{**b, "pixel_values": data.sets["test"].seen[1:2]}).logits).abs().max()
    assert gap > 1e-3


def test_float16_throughout_fails_after_one_step_and_scaled_float16_does_not(data, tmp_path):
    few = dict(epochs=1, samples=12, batch=2, warmup=0, lr=5e-6)
    half = tune_run(data, RunConfig(precision="half", **few), tmp_path / "half")
    assert all(p.isnan().any() for n, p in half.model.named_parameters() if "lora_A" in n)
    assert math.isfinite(half.rows[0]["loss"]) and half.events[0].step == 1 and branch(half.rows, 99).name == "not finite"
    t = begin(data, RunConfig(precision="fp16", **few), 6); t.scale = 2.0**40
    row = take_step(t, 0, data.sets["train"].batch(torch.arange(2)))
    assert math.isfinite(row["grad_norm"]) and t.scale < 2.0**40 and not t.events


def test_a_run_is_done_once_and_never_under_other_settings(place):
    cfg = RunConfig(epochs=1, samples=8, warmup=1, lr=1e-3)
    run_one(place, cfg)
    summary = place.of(cfg) / "summary.json"
    before = summary.stat().st_mtime_ns
    run_one(place, cfg)
    assert summary.stat().st_mtime_ns == before
    assert len({place.of(replace(cfg, seed=1)), place.of(cfg), place.of(replace(cfg, lr=2e-3))}) == 3 and place.of(replace(cfg, reported="x")) == place.of(cfg)


def test_recommended_start_is_what_the_search_tries_first():
    import optuna
    assert propose(optuna.trial.FixedTrial(START), RunConfig()) == RunConfig(warmup=99)


def test_every_branch_leads_somewhere_else():
    for name, (_, change) in TREE.items():
        c = RunConfig(precision="half", clip=0.0)
        assert change(c) != c, name


def test_rsicap_rows_are_checked(tmp_path):
    (tmp_path / "images").mkdir()
    for row, said in (({"filename": "no.jpg", "text_output": "a"}, "not in images"), ({"filename": "../x", "text_output": "a"}, "leads out"), ({"text_output": "a"}, "lacks")):
        write_json(tmp_path / "train.json", {"annotations": [row]})
        with pytest.raises(UserError, match=said): O.read_rsicap(tmp_path, "train")
