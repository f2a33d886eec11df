"Training: samples and their order, the two stages, resuming, repeating, and what stops it."
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blip2mgm.core import ConfigError, UserError, read_json, read_jsonl
from blip2mgm.stage import Stage
from blip2mgm.health import not_finite
from blip2mgm.loop import gradients, lr_factor, pieces
from blip2mgm.samples import FeatureStore, count_labels, encode_rows, sample_order
from blip2mgm.jobs import TrainConfig, base_model, load_trained
from blip2mgm.train import conclusion, results_table, seeds_of, train

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "goldens" / "mgm"
WORDS = ["a red circle", "two cars and a dog", "the sea", "a blue car on the left", "the letter", "five apples", "a small dog", "the street"]


def make_parts(folder):
    "Random parts of the true architecture, as small as they can be."
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel, GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    GemmaForCausalLM(GemmaConfig(vocab_size=698, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                 head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.1)).save_pretrained(folder / "gemma")
    shutil.copytree(GOLDEN / "tokenizer", folder / "gemma", dirs_exist_ok=True)
    CLIPVisionModel(CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8)).save_pretrained(folder / "clip")
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1])).save_pretrained(folder / "convnext")


def make_data(folder):
    "Pictures, instructions and a finished enhancement with two arms, in the layout of a run."
    from PIL import Image

    (folder / "data/images").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (30 + 5 * i, 40), (20 * i, 100, 255 - 30 * i)).save(folder / f"data/images/{i}.png")
    rows = [dict(id=f"c{i}", text=f"<__dj__image>\n{w} <|__dj__eoc|>", images=[f"images/{i}.png"]) for i, w in enumerate(WORDS)]
    talk = lambda w: [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": w}]
    instructions = [dict(id=f"i{i}", image=f"images/{i}.png", conversations=talk(w)) for i, w in enumerate(WORDS)]
    instructions[3]["conversations"][1]["value"] = "a <eos> b"  # no label is left of it
    (folder / "data/instructions.json").write_text(json.dumps(instructions))
    for arm, keep in dict(raw=rows, random=rows[::2]).items():
        (folder / f"enhance/arms/{arm}").mkdir(parents=True)
        (folder / f"enhance/arms/{arm}/captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in keep))


def config(folder, **more):
    small = dict(run=str(folder), data=str(folder / "data"), model=str(folder / "parts"), arms=["raw", "random"], seeds=1, workers=1, max_length=128,
                 stage1_samples=8, stage1_batch=4, stage2_batch=4, micro_batch=3, lora_r=2, lora_alpha=4)
    return TrainConfig(**{**small, **more})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained run: folder and result"
    folder = tmp_path_factory.mktemp("run")
    make_parts(folder / "parts")
    make_data(folder)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("BLIP2MGM_WEIGHTS", str(folder / "parts"))
        Stage("enhance", config(folder)).finish(["arms"])
        yield folder, train(config(folder))


def tensors(folder, arm="raw", seed=0):
    return [(folder / "train" / arm / f"seed{seed}" / f).read_bytes() for f in ("adapter_model.safetensors", "non_lora_trainables.safetensors")]


# ---------------------------------------------------------------- pieces


def test_learning_rate():
    rates = [lr_factor(i, 100, 0.03) for i in range(100)]
    assert rates[:3] == [1 / 3, 2 / 3, 1.0] and max(rates) == 1 and rates[-1] < 0.001
    assert lr_factor(0, 1, 0.03) == 1 and all(a >= b for a, b in zip(rates[3:], rates[4:]))


def test_arms_share_their_order():
    ids = [f"c{i}" for i in range(50)]
    some = ids[::3]
    order = [ids[i] for i in sample_order(ids, 50, 0, 1)]
    assert [x for x in order if x in some] == [some[i] for i in sample_order(some, len(some), 0, 1)]
    assert order != [ids[i] for i in sample_order(ids, 50, 1, 1)] and sorted(order) == sorted(ids)


def test_a_short_arm_goes_round_again():
    order = sample_order(list("abc"), 8, 0, 1)
    assert [sorted(order[i : i + 3]) for i in (0, 3)] == [[0, 1, 2]] * 2 and len(order) == 8


def test_pieces_hold_every_sample_once():
    batch = [dict(input_ids=[0] * n) for n in (9, 3, 7, 1, 5)]
    found = [len(s["input_ids"]) for p in pieces(batch, 2) for s in p]
    assert found == [1, 3, 5, 7, 9] and max(map(len, pieces(batch, 2))) == 2


def test_labels_beyond_the_limit_do_not_count():
    assert count_labels([2, -200, 7, 8], [-100, -100, 7, 8], 36, 38) == 1
    assert count_labels([2, -200, 7, 8], [-100, -100, 7, 8], 36, 37) == 0


def test_seeds():
    assert seeds_of("raw", 2) == [0, 1] and seeds_of("raw_again", 2) == [100, 101]


@pytest.mark.parametrize("wrong", [dict(seeds=0), dict(stage1_lr=0.0), dict(lora_dropout=1.0), dict(arms=[]), dict(arms=["raw", "raw"]), dict(stage2_samples=-1), dict(seeds=1.5),
                                   dict(schedule="step"), dict(precision="int8"), dict(on_bad="average"), dict(patience=2)])
def test_wrong_parameters(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_importing_is_light():
    code = "import sys; from blip2mgm.train import TrainConfig; TrainConfig(); assert not {'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- a run


def test_files(run):
    folder = run[0] / "train"
    for arm in ("raw", "random"):
        have = {str(f.relative_to(folder / arm / "seed0")) for f in (folder / arm / "seed0").rglob("*") if f.is_file()}
        assert have == {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.safetensors", "config.json", "README.md", "finetuning.log", "result.json", "probe.safetensors",
                        "done.json", "stage1/steps.jsonl", "stage1/steps.tfevents", "stage1/projector.safetensors", "stage1/done.json", "stage2/steps.jsonl", "stage2/steps.tfevents"}
    assert read_json(folder / "record.json")["rows"]["left_out"] == {"raw": 0, "random": 0, "instructions": 1}


def test_step_log(run):
    for stage, n in ((1, 8), (2, 7)):
        rows = read_jsonl(run[0] / f"train/raw/seed0/stage{stage}/steps.jsonl")
        assert [r["step"] for r in rows] == [0, 1] and sum(r["samples"] for r in rows) == n
        assert all(math.isfinite(r[k]) for r in rows for k in ("loss", "grad_norm", "lr", "tokens", "seconds", "largest_logit"))
        assert all(r["update_ratio"][p] > 0 and r["grad_norms"][p] > 0 for r in rows[1:] for p in (["LoRA"] if stage == 2 else []) + ["mining", "projector"])


def test_arms_begin_alike(run):
    "Stage 1 starts from the same weights: on captions two arms share, the first loss would be the same; the projectors then part"
    a, b = ((run[0] / f"train/{arm}/seed0/stage1/projector.safetensors").read_bytes() for arm in ("raw", "random"))
    assert a != b and base_hash_of(run, "raw") == base_hash_of(run, "random")


def base_hash_of(run, arm):
    return read_json(run[0] / f"train/{arm}/seed0/config.json")["base_hash"]


def test_round_trip_was_checked(run):
    assert all(r["round_trip"]["reloaded"] == 0 for r in run[1].results)


def test_loading(run):
    import torch

    model, tokenizer = load_trained(run[0], "raw", 0)
    one, _ = load_trained(run[0], "raw", 0, stage=1)
    step0, _ = base_model(config(run[0]))
    ids = dict(input_ids=torch.tensor([tokenizer("a red circle")["input_ids"]]))
    with torch.no_grad():
        logits = [m(**ids).logits for m in (model, one, step0)]
    assert not torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[2])
    assert not torch.equal(one.mm_projector[0].weight, step0.mm_projector[0].weight)
    with pytest.raises(UserError, match="not trained with seed 7"):
        load_trained(run[0], "raw", 7)


def test_features_are_what_the_encoders_see(run):
    from blip2mgm.inputs import preprocess

    model, _ = base_model(config(run[0]))
    for aspect in ("square", "pad"):
        store = FeatureStore(run[0] / "train/features" / aspect)
        want = model.vision_features(images_aux=preprocess(run[0] / "data/images/2.png", aspect, 48)[None])
        got = store(["images/2.png"])
        for a, b in zip([got.clip, *got.aux], [want.clip, *want.aux]):
            assert (a - b).abs().max() <= 1e-3 * max(b.abs().max(), 1)


def test_tables_and_words(run):
    assert "raw" in repr(results_table(run[1])) and "2 adapters" in conclusion(run[1])


def test_without_the_feature_cache(run, tmp_path):
    "Looking at the pictures anew in each step gives the same losses, and stores nothing"
    from dataclasses import asdict, replace

    from blip2mgm.jobs import train_arm
    from blip2mgm.train import make_features

    cfg, job = config(run[0], feature_cache=False), run[1].jobs[0]
    pictures = {s: read_json(Path(job.features[s], "features.json"))["pictures"] for s in (1, 2)}
    features = {s: str(make_features(cfg, run[0] / "data", pictures[s], a, tmp_path / a, None)) for s, a in ((1, "square"), (2, "pad"))}
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["features.json"] * 2
    train_arm(asdict(replace(job, cfg=cfg, folder=str(tmp_path / "train"), features=features)))
    losses = lambda place: [r["loss"] for s in (1, 2) for r in read_jsonl(place / f"stage{s}/steps.jsonl")]
    assert all(abs(a - b) < 1e-4 for a, b in zip(losses(tmp_path / "train"), losses(run[0] / "train/raw/seed0"), strict=True))


def test_tensorboard_reads_every_step(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = run[0] / "train/raw/seed0/stage2"
    board = EventAccumulator(str(place / "steps.tfevents")).Reload()
    rows = read_jsonl(place / "steps.jsonl")
    assert {"loss", "lr", "grad_norms/LoRA", "update_ratio/projector"} <= set(board.Tags()["scalars"])
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(r["step"], pytest.approx(r["loss"])) for r in rows]


def test_a_second_call_trains_nothing(run):
    times = lambda: {f: f.stat().st_mtime_ns for f in (run[0] / "train").glob("*/seed0/**/*") if f.is_file()}
    before = times()
    again = train(config(run[0]))
    assert times() == before
    assert again.outlook == run[1].outlook and again.outlook["trainings"] == len(again.jobs) and again.preflight == run[1].preflight


def alone(run, to, **more):
    "The run's first job once more in this process, with other parameters, into another folder"
    from dataclasses import asdict, replace

    from blip2mgm.jobs import train_arm
    from blip2mgm.train import job_fingerprints

    job = run[1].jobs[0]
    cfg = config(run[0], **more)
    return train_arm(asdict(replace(job, cfg=cfg, folder=str(to / "train/raw/seed0"), fingerprints=job_fingerprints(cfg, job.arm, job.seed, run[1].ready, []))))


def test_a_repeated_run_is_the_same(run, tmp_path):
    alone(run, tmp_path)
    assert tensors(tmp_path) == tensors(run[0])


def test_interrupted_after_stage_1(run, tmp_path):
    "With stage 1 done and stage 2 half written, only stage 2 is trained, and the result is the same"
    shutil.copytree(run[0], tmp_path / "run", symlinks=True)
    here = tmp_path / "run"
    cfg = config(run[0], arms=["raw"])
    place = here / "train/raw/seed0"
    stage1 = (place / "stage1/projector.safetensors").stat().st_mtime_ns
    (place / "done.json").unlink()
    (place / "adapter_model.safetensors").write_bytes(b"half")
    shutil.rmtree(here / "parts")
    os.symlink(run[0] / "parts", here / "parts")
    train(TrainConfig(**{**cfg.to_dict(), "run": str(here), "data": str(run[0] / "data")}))
    assert tensors(here) == tensors(run[0])
    assert (place / "stage1/projector.safetensors").stat().st_mtime_ns == stage1


@pytest.mark.parametrize("steps", [1, 3])
def test_killed_inside_a_stage(run, tmp_path, steps, monkeypatch):
    "Ended after the first or the third of four steps (two a stage), and taken up by a process that knows only the folder"
    from dataclasses import asdict, replace

    from blip2mgm import loop
    from blip2mgm.jobs import train_arm

    job = replace(run[1].jobs[0], cfg=config(run[0], checkpoint_every=1), folder=str(tmp_path / "train/raw/seed0"))
    taken, step = [], loop.Run.step

    def few(self):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(step(self))

    with monkeypatch.context() as m:
        m.setattr(loop.Run, "step", few)
        with pytest.raises(KeyboardInterrupt):
            train_arm(asdict(job))
    left = [p.parent.name for p in tmp_path.rglob("checkpoint-*.safetensors")]
    assert left and set(left) == {"stage1" if steps < 2 else "stage2"}
    monkeypatch.setattr(loop.Run, "step", lambda self: (taken.append(step(self))))
    train_arm(asdict(job))
    assert len(taken) == 4, "no step was taken twice"
    assert tensors(tmp_path) == tensors(run[0]) and not list(tmp_path.rglob("checkpoint-*"))


def test_several_processes_give_the_adapter_of_one(run, tmp_path, monkeypatch):
    """One process is ended after two of four steps; two processes with ZeRO-3, which share every weight, go on from its checkpoint
    and end where one process would have. Without dropout, whose bits differ from process to process."""
    import threading
    from dataclasses import asdict, replace

    import torch
    from safetensors.torch import load_file

    from blip2mgm import loop
    from blip2mgm.parallel import launch
    from blip2mgm.jobs import is_done, train_arm

    shared = json.loads((ROOT / "params/deepspeed/zero3.json").read_text())
    shared["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or tensors as small as these would not be shared out
    (tmp_path / "zero3.json").write_text(json.dumps(shared))
    same = dict(lora_dropout=0.0, checkpoint_every=1, stage2_batch=3)  # 7 rows: the last batch holds one, so one process is left without
    one, two = (replace(run[1].jobs[0], cfg=config(run[0], **same, **more), folder=str(tmp_path / to / "raw/seed0"))
                for to, more in dict(one={}, two=dict(deepspeed=str(tmp_path / "zero3.json"), workers=2)).items())
    train_arm(asdict(one))

    taken, step = [], loop.Run.step

    def few(self):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(step(self))

    with monkeypatch.context() as m:
        m.setattr(loop.Run, "step", few)
        with pytest.raises(KeyboardInterrupt):
            train_arm(asdict(replace(one, folder=two.folder)))
    launch(asdict(two), threading.Event())

    folders = [Path(j.folder) for j in (one, two)]
    assert is_done(two, 2) and not list(folders[1].rglob("checkpoint-*")) and not (folders[1] / "processes.log").exists()
    rows = [[r for s in (1, 2) for r in read_jsonl(f / f"stage{s}/steps.jsonl")] for f in folders]
    assert len(rows[0]) == 5 and all(abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4 for a, b in zip(*rows, strict=True))
    for name in ("adapter_model", "non_lora_trainables"):
        a, b = (load_file(f / f"{name}.safetensors") for f in folders)
        assert a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)


def test_what_several_processes_say_when_they_fail(run, tmp_path, monkeypatch):
    "The message of the first is the message of the training; a file that cannot be used is refused before anything starts"
    from blip2mgm import parallel

    monkeypatch.setattr(parallel, "command", lambda *args: [sys.executable, "-c", "print('x\\nblip2mgm: raw seed 0: no disk'); raise SystemExit(1)"])
    import threading

    with pytest.raises(UserError, match="^raw seed 0: no disk$"):
        parallel.launch(dict(folder=str(tmp_path), cfg=dict(workers=2)), threading.Event())
    (tmp_path / "z.json").write_text(json.dumps(dict(zero_optimization=dict(stage=2), bf16=dict(enabled=True))))
    with pytest.raises(ConfigError, match="sets bf16: leave it out"):
        config(run[0], deepspeed=str(tmp_path / "z.json"))


def test_checking_and_merging_from_the_command_line(run, tmp_path, capsys):
    import torch

    from blip2mgm.cli import main
    from blip2mgm.mgm import load_original

    folder = run[0] / "train/raw/seed0"
    assert main(["check-adapter", str(folder)]) == 0 and "a sound adapter" in capsys.readouterr().out
    assert main(["merge-adapter", str(folder), str(tmp_path / "one")]) == 0
    ids = dict(input_ids=torch.tensor([[2, 7, 5, 9]]))
    with torch.no_grad():
        gap = (load_original(tmp_path / "one")(**ids).logits - load_trained(run[0], "raw", 0)[0](**ids).logits).abs().max()
    assert gap <= 1e-4 and (tmp_path / "one/tokenizer.json").is_file()
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken/non_lora_trainables.safetensors").unlink()
    assert main(["check-adapter", str(tmp_path / "broken")]) == 2 and "no non_lora_trainables" in capsys.readouterr().err
    assert main(["merge-adapter", str(folder), str(tmp_path / "one")]) == 2 and "not empty" in capsys.readouterr().err


def test_other_recipes_train(run, tmp_path):
    "Everything that is off by default, at once"
    result = alone(run, tmp_path, schedule="linear", grouped=True, precision="bf16", gradient_checkpointing=True, held_out=2, patience=5, checkpoint_every=1, adapter="dora")
    rows = read_jsonl(tmp_path / "train/raw/seed0/stage2/steps.jsonl")
    assert result["stage2"]["samples"] == 5 and all(math.isfinite(r["validation"]) for r in rows)
    assert read_json(tmp_path / "train/raw/seed0/adapter_config.json")["use_dora"]


def test_a_changed_parameter_trains_again(run, tmp_path):
    from blip2mgm.train import job_fingerprints

    job, ready = run[1].jobs[0], run[1].ready
    now, other = (job_fingerprints(config(run[0], **more), job.arm, job.seed, ready, []) for more in ({}, dict(lora_lr=1e-3)))
    assert now[1] == other[1] and now[2] != other[2], "stage 1 stands, stage 2 does not"
    alone(run, tmp_path, lora_lr=1e-3)
    assert tensors(tmp_path) != tensors(run[0])


# ---------------------------------------------------------------- what stops it


def test_a_loss_that_is_no_number_names_the_samples(run):
    cfg = config(run[0])
    model, _ = base_model(cfg)
    samples = read_jsonl(run[1].jobs[0].samples[1])[:3]
    store = FeatureStore(run[1].jobs[0].features[1])

    class Broken:
        def __call__(self, pictures):
            f = store(pictures)
            for i, p in enumerate(pictures):
                if p == samples[1]["image"]:
                    f.clip[i] = math.nan
            return f

    for p in model.lm.parameters():
        p.requires_grad_(False)
    loss, _, _ = gradients(model.train(), samples, Broken(), 2)
    fault = not_finite(model, samples, Broken(), "stage 1, step 0", loss, 1.0)
    assert f"stage 1, step 0: the loss is not finite; it comes from samples {samples[1]['id']}, first seen in" in fault.evidence
    assert not_finite(model, samples, store, "stage 1, step 0", 1.0, 1.0) is None


def test_pieces_give_the_batch_s_gradient(run):
    import torch

    model, _ = base_model(config(run[0]))
    samples, store = read_jsonl(run[1].jobs[0].samples[2]), FeatureStore(run[1].jobs[0].features[2])
    found = []
    for size in (1, 3, 8):
        model.train().zero_grad()
        loss, _, _ = gradients(model, samples, store, size)
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for loss, grad in found[1:]:
        assert abs(loss - found[0][0]) <= 1e-5 and (grad - found[0][1]).abs().max() <= 1e-5


def test_missing_things_are_named(run, tmp_path):
    with pytest.raises(UserError, match="made no arm blip2_filtered; it made: random, raw"):
        train(config(run[0], arms=["blip2_filtered"]))
    with pytest.raises(UserError, match="enhance"):
        (tmp_path / "data").mkdir()
        train(config(tmp_path))
    with pytest.raises(UserError, match="holds no gemma"):
        base_model(config(run[0], model=str(tmp_path)))
    with pytest.raises(UserError, match="holds no training"):
        load_trained(tmp_path / "nothing", "raw", 0)


def test_rows_that_teach_nothing(run):
    _, tokenizer = base_model(config(run[0]))
    rows = [dict(id=i, image="a", conversations=[{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": v}]) for i, v in enumerate(("", "a dog"))]
    samples, left_out = encode_rows(rows, tokenizer, 9, 128)
    assert left_out == ["0"] and [s["id"] for s in samples] == ["1"]
