"Adapters: what is trained, what is saved, and what is refused."
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2mgm.adapters import KINDS, attach, base_hash, check_folder, check_round_trip, load, lora_layers, merge, move_ranks, plan_ranks, reseed, save, trainable_table, trained
from blip2mgm.core import UserError
from blip2mgm.mgm import load_original

GOLDEN = Path(__file__).parent / "goldens" / "mgm"


@pytest.fixture(scope="module")
def batch():
    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(GOLDEN / "inputs.safetensors").items()}


def base():
    return load_original(GOLDEN)


def tuned(batch, seed=0, steps=2, dropout=0.1, kind="lora"):
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    model = attach(base(), r=4, alpha=8, dropout=dropout, seed=seed, kind=kind).train()
    plan_ranks(model, steps)
    opt = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        reseed(model, seed, step)
        opt.zero_grad()
        model(**batch).loss.backward()
        opt.step()
        move_ranks(model, step)
    return model.eval()


@pytest.fixture(scope="module")
def saved(batch, tmp_path_factory):
    model = tuned(batch)
    return model, save(model, tmp_path_factory.mktemp("adapter"))


def copy(folder, to):
    for f in folder.iterdir():
        (to / f.name).write_bytes(f.read_bytes())
    return to


def test_only_the_language_model_has_an_adapter():
    model = attach(base())
    assert len(lora_layers(model)) == 2 * 7
    assert not any("lora" in n for part in (model.clip, model.convnext) for n, _ in part.named_parameters())
    rows = {r["part"]: r["trained"] for r in trainable_table(model).rows}
    assert rows["language model"] == rows["CLIP"] == rows["ConvNeXt"] == 0
    assert all(rows[p] > 0 for p in ("LoRA", "mining", "projector"))


def test_a_fresh_adapter_changes_nothing(batch):
    with torch.no_grad():
        assert torch.equal(attach(base())(**batch).logits, base()(**batch).logits)


def test_the_seed_decides_the_first_values():
    first = [lora_layers(attach(base(), seed=s))[0].lora_A["default"].weight for s in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_attaching_leaves_the_random_numbers_alone():
    model = base()
    torch.manual_seed(7)
    want = torch.rand(1)
    torch.manual_seed(7)
    attach(model, seed=3)
    assert torch.equal(torch.rand(1), want)


def test_training_is_repeatable(batch):
    a, b = (tuned(batch).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_files(saved):
    _, folder = saved
    assert {f.name for f in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.safetensors", "config.json", "README.md", "probe.safetensors"}
    assert set(load_file(folder / "non_lora_trainables.safetensors")) == {n for n in load_file(GOLDEN / "weights.safetensors") if "vlm_uni" in n or "mm_projector" in n}
    assert "/tmp" not in "".join(f.read_text() for f in folder.iterdir() if f.suffix in (".json", ".md"))


def test_round_trip(saved, batch):
    model, folder = saved
    gaps = check_round_trip(model, folder, base, batch)
    assert gaps["reloaded"] == 0 and gaps["merged"] <= 1e-4


def test_peft_reads_it(saved):
    from peft import PeftModel

    model, folder = saved
    wrapped = PeftModel.from_pretrained(base().lm, folder)
    ours = model.lm.state_dict()
    assert all(torch.equal(t, ours[n]) for n, t in wrapped.state_dict().items() if "lora_" in n)


def test_the_base_is_untouched_by_training(saved):
    assert base_hash(saved[0]) == base_hash(base())


def test_merging_leaves_no_adapter(saved, batch):
    model = merge(load(base(), saved[1]))
    assert not any("lora" in n for n, _ in model.named_parameters())


def test_untrained_is_refused(tmp_path):
    with pytest.raises(UserError, match="equals its base"):
        save(attach(base()), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_not_finite_is_refused(tmp_path, batch):
    model = tuned(batch)
    with torch.no_grad():
        model.mm_projector[0].weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite.*mm_projector"):
        save(model, tmp_path)


def drop_tensor(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter_model.safetensors")


def other_rank(folder):
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "r": 8}))


@pytest.mark.parametrize("change,message", [
    (lambda d: (d / "adapter_config.json").unlink(), "no adapter_config.json"),
    (lambda d: (d / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    (lambda d: (d / "non_lora_trainables.safetensors").unlink(), "no non_lora_trainables"),
    (lambda d: (d / "config.json").unlink(), "no config.json"),
    (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 50), "can't be read"),
    (drop_tensor, "1 tensors missing"),
    (other_rank, "has shape"),
])
def test_broken_folders(saved, tmp_path, change, message):
    folder = copy(saved[1], tmp_path)
    change(folder)
    with pytest.raises(UserError, match=message):
        load(base(), folder)


def test_another_base_is_refused(saved):
    model = base()
    with torch.no_grad():
        model.lm.model.norm.weight[0] += 1
    with pytest.raises(UserError, match="other base weights"):
        load(model, saved[1])


def test_a_lost_projector_is_noticed(saved, tmp_path, batch):
    folder = copy(saved[1], tmp_path)
    save_file({n: t + 0.1 for n, t in load_file(folder / "non_lora_trainables.safetensors").items()}, folder / "non_lora_trainables.safetensors")
    with pytest.raises(UserError, match="answers otherwise"):
        check_round_trip(saved[0], folder, base, batch)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "lora"])
def test_other_kinds_go_the_same_way_round(batch, tmp_path, kind):
    model = tuned(batch, kind=kind)
    gaps = check_round_trip(model, save(model, tmp_path), base, batch)
    assert gaps["reloaded"] == 0 or kind in ("pissa", "adalora", "prefix") and gaps["reloaded"] < 1e-4, "these are saved as the plain LoRA they come to, or turned"
    assert len(check_folder(tmp_path, base)) == 5 - (kind == "prefix"), "a prefix can't be merged"
    with torch.no_grad():
        assert (model(**batch).logits - base()(**batch).logits).abs().max() > 0.05


def test_pissa_untrained_is_refused(tmp_path):
    with pytest.raises(UserError, match="equals its base"):
        save(attach(base(), kind="pissa"), tmp_path)


def test_four_bits_are_few(batch):
    pytest.importorskip("bitsandbytes")
    size = lambda m: sum(p.numel() * p.element_size() for n, p in m.lm.named_parameters() if "proj" in n and "lora" not in n)
    assert size(attach(base(), kind="qlora")) * 7 < size(base())


def test_qlora_without_its_library_is_one_clear_error(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="qlora needs bitsandbytes"):
        attach(base(), kind="qlora")


def test_an_adapter_in_the_original_s_layout(saved, tmp_path, batch):
    "Names with the wrapper's prefix, targets as a list, a config that knows no fingerprint"
    folder = copy(saved[1], tmp_path)
    rest = {f"base_model.model.{n}": t for n, t in load_file(folder / "non_lora_trainables.safetensors").items()}
    save_file(rest, folder / "non_lora_trainables.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": targets}))
    (folder / "config.json").write_text(json.dumps({"model_type": "mgm_gemma"}))
    with pytest.warns(UserWarning, match="taken on trust"), torch.no_grad():
        assert torch.equal(load(base(), folder)(**batch).logits, saved[0](**batch).logits)


def test_another_answer_than_when_trained_is_noticed(saved, tmp_path):
    folder = copy(saved[1], tmp_path)
    save_file({"logits": load_file(folder / "probe.safetensors")["logits"] + 0.1}, folder / "probe.safetensors")
    with pytest.raises(UserError, match="answers otherwise than when it was trained"):
        check_folder(folder, base)


def test_full_size_has_252_adapter_tensors():
    from blip2mgm.mgm import build

    full = dict(vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256)
    with torch.device("meta"):
        model = attach(build(full))
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert len(names) == 252 and all(n.startswith("lm.") for n in names)


def test_lean_training_equals_peft(batch):
    def gradients(lean):
        model = attach(base(), dropout=0.0).train()
        for layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1, generator=torch.Generator().manual_seed(1))
            if not lean:
                del layer.forward
        model(**batch).loss.backward()
        return [p.grad for p in trained(model).values()]

    for a, b in zip(gradients(True), gradients(False)):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= 1e-5
