"Health: what a step log says, and faults found before a step."
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip2mgm.health import STUDY, blame, diagnose, first_bad_module, is_spike, not_finite
from blip2mgm.mgm import load_original

GOLDEN = Path(__file__).parent / "goldens" / "mgm"


def rows(losses, norm=1.0, **more):
    return [dict(step=i, loss=v, grad_norm=norm, lr=1e-3, **more) for i, v in enumerate(losses)]


def names(found):
    return [f.name for f in found]


def test_a_sound_course_gives_nothing():
    assert diagnose(rows([0.3 + 3 / (1 + i / 5) + 0.05 * (i % 3) for i in range(60)], update_ratio={"LoRA": 1e-3}, grad_norms={"LoRA": 0.5})) == []


def test_the_study_s_log_is_an_artefact():
    found = diagnose(STUDY, 256_000)
    assert names(found) == ["impossible loss"] and found[0].step == 1 and "12.45" in found[0].evidence


@pytest.mark.parametrize("losses,name", [
    ([4 - 0.1 * i for i in range(30)] + [3.0] * 20, "divergence"),
    ([3.0 + 0.01 * (i % 2) for i in range(40)], "plateau"),
    ([3 / (1 + i / 9) + (2 if i % 2 else 0) for i in range(60)], "oscillation"),
    ([3.0, math.nan, 2.0], "not finite"),
    ([3.0, None, 2.0], "not finite"),
])
def test_courses_that_are_not_well(losses, name):
    assert names(diagnose(rows(losses))) == [name]


def test_a_dead_part_and_overfitting_are_named():
    log = rows([3 / (1 + i / 9) for i in range(40)], update_ratio={"LoRA": 0.0, "projector": 1e-3}, grad_norms={"LoRA": 0.0, "projector": 0.1})
    for i in (9, 19, 29, 39):
        log[i]["validation"] = 2 + abs(i - 19) / 20
    assert names(diagnose(log)) == ["dead LoRA", "overfitting"]


def test_spikes_need_a_history():
    assert not is_spike(100.0, [1.0] * 9) and is_spike(3.1, [1.0] * 10) and not is_spike(2.9, [1.0] * 10)


@pytest.fixture
def setting():
    golden = {k: v.float() if v.is_floating_point() else v for k, v in load_file(GOLDEN / "inputs.safetensors").items()}
    model = load_original(GOLDEN)
    features = model.vision_features(golden["images"], golden["images_aux"])
    ids, labels = golden["input_ids"], golden["labels"]
    batch = [dict(id=f"s{i}", image=str(i), input_ids=ids[i].tolist(), labels=labels[i].tolist(), n_labels=int((labels[i] >= 0).sum())) for i in (0, 2)]
    return model, batch, lambda pictures: features[[int(p) for p in pictures]]


def test_the_first_bad_module_is_named(setting):
    model, batch, store = setting
    with torch.no_grad():
        model.lm.model.layers[0].self_attn.o_proj.weight[0, 0] = math.inf
    assert first_bad_module(model, batch, store) == "lm.model.layers.0.self_attn.o_proj"
    assert blame(model, batch, store) == ["s0", "s2"]
    fault = not_finite(model, batch, store, "here", math.nan, 1.0)
    assert "first seen in lm.model.layers.0.self_attn.o_proj" in fault.evidence


def test_a_bad_gradient_alone_is_named(setting):
    model, batch, store = setting
    for p in model.parameters():
        p.requires_grad_(False)
    model.mm_projector[0].weight.requires_grad_(True).grad = torch.full_like(model.mm_projector[0].weight, math.nan)
    assert "the gradient of mm_projector.0.weight" in not_finite(model, batch, store, "here", 1.0, math.nan).evidence
