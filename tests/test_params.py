"""Every parameter file against its dataclass and its notebook's parameters cell."""
import subprocess
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import yaml
from conftest import PIPELINE, PYTHON, ROOT, cells

from blip2mgm import cli
from blip2mgm.core import UserError

FILES = [f for p in cli.profiles().values() for f in sorted(p.glob("*.y*ml"))]
STAGES = [s for s in cli.stage_names()]
files = pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
stages = pytest.mark.parametrize("stage", STAGES)


def default(f): return f.default if f.default is not MISSING else f.default_factory()


@stages
def test_cell_and_dataclass_have_the_same_parameters_and_defaults(stage):
    cls = cli.config_class(stage)
    assert cli.cell_parameters(cli.notebook_of(stage)) == cls().to_dict()
    assert list(cli.cell_parameters(cli.notebook_of(stage))) == [f.name for f in fields(cls)], "in the same order"


@stages
def test_every_parameter_is_typed_and_explained(stage):
    source = next(s for s, tags in cells(cli.notebook_of(stage)) if "parameters" in tags)
    lines = [l for l in source.splitlines() if l.strip() and not l.startswith("#")]
    assert [l for l in lines if not (": " in l.split("=")[0] and "#" in l)] == []


@files
def test_file_is_read_without_complaint(file):
    step = cli.load_step(file)
    assert step.cfg.run == f"runs/{file.parent.name}", "every profile writes to a folder of its own"


@files
def test_file_lists_only_what_differs(file):
    said, usual = yaml.safe_load(file.read_text()) or {}, {f.name: default(f) for f in fields(cli.config_class(file.stem))}
    assert [k for k, v in said.items() if k not in ("run", "data") and v == usual[k]] == []


@pytest.mark.parametrize("stage", PIPELINE)
def test_the_defaults_are_the_smoke_profile(stage):
    if stage not in STAGES: pytest.skip(f"{stage} is not written yet")
    cls = cli.config_class(stage)
    assert cls.load(f"params/smoke/{stage}.yaml") == cls()


TO_FILL_IN = ("24gb", "80gb", "cluster", "offline")  # profiles that name models to be fetched first


@pytest.mark.parametrize("profile", list(cli.profiles()))
def test_profile_is_in_order(profile, monkeypatch):
    if profile in TO_FILL_IN:
        with pytest.raises(UserError) as e: cli.load_profile(profile)
        for line in str(e.value).splitlines(): assert f"params/{profile}/" in line and "models/" in line and "is not there" in line or "holds no gemma, clip, convnext: write the folder" in line
        monkeypatch.setattr(cli, "_model_problem", lambda steps: [])
    steps = cli.load_profile(profile)
    if profile in ("smoke", "demo") and not set(PIPELINE) - set(STAGES): assert [s.name for s in steps] == PIPELINE


CARDS = {"24gb": 24, "80gb": 80, "cluster": 80, "offline": 24}  # GB of each card


@pytest.mark.parametrize("profile", CARDS)
def test_profile_fits_its_card_by_the_forecast(profile):
    from blip2mgm.forecast import FULL, Plan, forecast
    from blip2mgm.jobs import TrainConfig

    cfg, said = TrainConfig.load(f"params/{profile}/train.yaml"), FULL | {"image_size_aux": 768}  # MGM-2B
    zero = int(Path(cfg.deepspeed).stem.removeprefix("zero")) if cfg.deepspeed else 0
    plan = Plan("lora", cfg.precision, cfg.micro_batch, cfg.max_length, 128, cfg.gradient_checkpointing, cfg.lora_r, zero, cfg.workers if zero else 1, cfg.feature_cache)
    room = 0.9 * CARDS[profile] * 1e9 / 2**30
    assert forecast(said, plan)["all"] < room
    assert forecast(said, replace(plan, tuning="projector"))["all"] < room


@pytest.mark.parametrize("recipe", sorted((ROOT / "params" / "recipes").glob("*.yaml")), ids=lambda f: f.stem)
def test_recipe_is_yaml_with_operators(recipe):
    found = yaml.safe_load(recipe.read_text())
    assert found["process"] and all(isinstance(op, dict) and len(op) == 1 for op in found["process"])


def test_configs_load_without_torch():
    script = f"import sys; from blip2mgm import cli; [cli.config_class(s) for s in {STAGES}]; print([m for m in ('torch', 'transformers', 'peft', 'pandas', 'matplotlib', 'data_juicer') if m in sys.modules])"
    assert subprocess.run([PYTHON, "-c", script], text=True, capture_output=True, check=True, cwd="/").stdout.strip() == "[]"
