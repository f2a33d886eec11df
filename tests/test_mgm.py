"MGM against numbers of the published code, its loading errors, padding, generation and image grids."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from blip2mgm.core import UserError
from blip2mgm.inputs import IGNORE, collate, encode_conversation, encode_question, lowres, preprocess
from blip2mgm.language import NoLabels, splice
from blip2mgm.mgm import build, from_parts, load_original, save_original, stage1_parameters
from blip2mgm.published import original_name, our_name
from blip2mgm.vision import lowres_grid

GOLDEN = Path(__file__).parent / "goldens" / "mgm"
CASES = json.loads((GOLDEN / "conversations.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture(scope="module")
def inputs():
    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(GOLDEN / "inputs.safetensors").items()}


@pytest.fixture(scope="module")
def want():
    return load_file(GOLDEN / "outputs.safetensors")


@pytest.fixture
def model():
    return load_original(GOLDEN)


def gap(a, b):
    return (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item()


def test_eval_mode_logits_and_loss(model, inputs, want):
    assert not model.training
    with torch.no_grad():
        out = model(**inputs)
    assert gap(out.logits[:1], want["logits_s0"]) <= 1e-4
    assert gap(out.loss, want["loss"]) <= 1e-5
    assert out.labels.tolist() == want["spliced_labels"].tolist()


def test_loss_of_each_sample(model, inputs, want):
    with torch.no_grad():
        for i in range(3):
            one = {k: v[i : i + 1] for k, v in inputs.items()}
            assert gap(model(**one).loss, want["per_sample_loss"][i]) <= 1e-5


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_five_steps_of_stage_1(model, inputs, want, mode):
    model.train(mode)
    opt = torch.optim.AdamW(stage1_parameters(model).values(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = model(**inputs).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert gap(losses, want["stage1_adamw_losses"]) <= 1e-4


def test_logits_are_the_same_in_training_mode(model, inputs):
    with torch.no_grad():
        assert gap(model.train()(**inputs).logits, model.eval()(**inputs).logits) <= 1e-4


def test_features_instead_of_pictures(model, inputs):
    text = {k: inputs[k] for k in ("input_ids", "labels", "attention_mask")}
    with torch.no_grad():
        features = model.vision_features(inputs["images"], inputs["images_aux"])
        assert torch.equal(model(**text, features=features).logits, model(**inputs).logits)


def test_frozen_encoders_stay_in_eval_mode(model):
    model.train()
    assert model.training and not model.clip.training and not model.convnext.training
    assert not any(p.requires_grad for part in (model.clip, model.convnext) for p in part.parameters())


@pytest.mark.parametrize("name", CASES["cases"])
def test_conversation(tokenizer, name):
    c = CASES["cases"][name]
    got = encode_conversation(c["conversations"], tokenizer, c["has_image"], c["model_max_length"])
    assert {k: got[k] for k in ("prompt", "input_ids", "labels")} == {k: c[k] for k in ("prompt", "input_ids", "labels")}


def test_conversation_with_a_tokenizer_that_names_no_special_tokens(tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN / "tokenizer/tokenizer.json"))
    for c in CASES["cases"].values():
        assert encode_conversation(c["conversations"], bare, c["has_image"], c["model_max_length"])["labels"] == c["labels"]


@pytest.mark.parametrize("question", CASES["generation_prompts"])
def test_question(tokenizer, question):
    assert encode_question(question, tokenizer) == CASES["generation_prompts"][question]["ids"]


def test_speakers_must_take_turns(tokenizer):
    with pytest.raises(ValueError, match="turn 2"):
        encode_conversation([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], tokenizer, False, 128)


@pytest.mark.parametrize("name", "ab")
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_preprocessing(name, aspect):
    want = load_file(GOLDEN / "preprocess.safetensors")
    high = preprocess(GOLDEN / "img" / f"{name}.png", aspect, 128)
    assert gap(high[:, 60:68, 60:68], want[f"{name}.{aspect}.hr_crop8"]) <= 1e-3
    assert gap(lowres(high[None], 56)[0], want[f"{name}.{aspect}.lr"]) <= 1e-3


def test_all_names_both_ways():
    names = json.loads((GOLDEN / "mgm2b_state_dict_names.json").read_text())
    assert len(names) == 912
    assert all(original_name(our_name(n)) == n for n in names)


def test_a_masked_sample_raises(model, inputs):
    labels = inputs["labels"].clone()
    labels[1] = IGNORE
    for mode in (True, False):
        with pytest.raises(NoLabels) as e:
            model.train(mode)(**{**inputs, "labels": labels})
        assert e.value.samples == [1]


def test_a_sample_whose_labels_are_cut_off_raises(model, inputs):
    model.config.max_length = 20
    with pytest.raises(NoLabels):
        model(**inputs)


def test_sequences_are_cut_at_max_length(model, inputs):
    model.config.max_length = 20
    with torch.no_grad():
        assert model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.shape[1] == 20


def test_a_picture_must_be_given(model):
    with pytest.raises(ValueError, match="none was given"):
        model(input_ids=torch.tensor([[2, -200, 5]]))
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[2, 7, 5]])).logits.shape == (1, 3, 698)


def test_too_few_pictures(model, inputs):
    with pytest.raises(ValueError, match="more pictures"):
        model(**{**inputs, "images": inputs["images"][:2], "images_aux": inputs["images_aux"][:2]})


def test_padding_does_not_matter(model, inputs):
    model.config.max_length = 200
    longer = {k: torch.nn.functional.pad(inputs[k], (0, 5), value=v) for k, v in dict(input_ids=0, labels=IGNORE, attention_mask=0).items()}
    with torch.no_grad():
        assert gap(model(**{**inputs, **longer}).loss, model(**inputs).loss) <= 1e-5
        assert gap(model.train()(**{**inputs, **longer}).loss, model(**inputs).loss) <= 1e-5


def test_loss_in_pieces_adds_up(model, inputs):
    n = (inputs["labels"][:, 1:] != IGNORE).sum().item()
    with torch.no_grad():
        parts = [model(**{k: v[i : i + 1] for k, v in inputs.items()}, n_labels=n).loss.item() for i in range(3)]
        assert abs(sum(parts) - model(**inputs).loss.item()) <= 1e-5


def test_splice_left_and_two_pictures():
    ids = torch.tensor([[5, -200, -200, 6], [7, 8, 0, 0]])
    plan = splice(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), 2, side="left", n_pictures=3)
    assert plan.source.tolist() == [[0, 8, 9, 10, 11, 3], [14, 14, 14, 14, 4, 5]]
    assert plan.mask[1].tolist() == [False] * 4 + [True] * 2


def test_generation_in_a_batch_is_generation_alone(model, inputs):
    features = model.vision_features(inputs["images"], inputs["images_aux"])
    prompts = [[2, -200, 7, 8, 9, 10, 11], [2, 12], [2, -200, 5]]
    batch = model.generate(**collate(prompts, side="left"), features=features, max_new_tokens=8, stop_ids=[1])
    for i, p in enumerate(prompts):
        assert model.generate(torch.tensor([p]), features=features[[i]], max_new_tokens=8, stop_ids=[1])[0] == batch[i]


def test_generation_with_cache_is_the_plain_forward(model, inputs):
    features = model.vision_features(inputs["images"], inputs["images_aux"])[[0]]
    ids = [2, -200, 7, 8]
    new = model.generate(torch.tensor([ids]), features=features, max_new_tokens=4, stop_ids=[])[0]
    with torch.no_grad():
        for _ in range(4):
            ids.append(model(input_ids=torch.tensor([ids]), features=features).logits[0, -1].argmax().item())
    assert new == ids[4:]


def test_sharded_checkpoint(tmp_path, model):
    tensors = load_file(GOLDEN / "weights.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:40], "model-00002-of-00002.safetensors": names[40:]}
    for f, ns in parts.items():
        save_file({n: tensors[n] for n in ns}, tmp_path / f)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f for f, ns in parts.items() for n in ns}}))
    shutil.copy(GOLDEN / "config.json", tmp_path)
    again = load_original(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002"):
        load_original(tmp_path)


def test_saved_in_the_original_layout(tmp_path, model):
    save_original(model, tmp_path)
    ours, theirs = load_file(tmp_path / "weights.safetensors"), load_file(GOLDEN / "weights.safetensors")
    assert set(ours) == set(theirs) | {"lm_head.weight"} and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert torch.equal(ours["lm_head.weight"], theirs["model.embed_tokens.weight"])


@pytest.mark.parametrize("change,message", [
    (lambda d: (d / "weights.safetensors").unlink(), "no safetensors"),
    (lambda d: (d / "config.json").unlink(), "no config.json"),
    (lambda d: (d / "weights.safetensors").rename(d / "pytorch_model.bin"), "pickle"),
    (lambda d: save_file({k: v for k, v in load_file(GOLDEN / "weights.safetensors").items() if "norm.weight" not in k}, d / "weights.safetensors"), "missing"),
    (lambda d: (d / "config.json").write_text((GOLDEN / "config.json").read_text().replace('"image_grid": 1', '"image_grid": 0')), "image_grid"),
])
def test_broken_folders(tmp_path, change, message):
    for f in ("config.json", "weights.safetensors"):
        shutil.copy(GOLDEN / f, tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        load_original(tmp_path)


def test_other_precision(inputs, want):
    model = load_original(GOLDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        assert abs(model(**inputs).loss.item() - want["loss"].item()) < 0.05


def test_full_size_has_the_published_sizes():
    full = dict(vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256)
    with torch.device("meta"):
        big = build(full)
    count = lambda *heads: sum(p.numel() for n, p in big.named_parameters() if n.startswith(heads))
    assert [count(h) for h in ("lm", "clip", "convnext", "mm_projector", "vlm_uni")] == [2506172416, 303507456, 196227264, 6295552, 6963456]
    assert sum(p.numel() for p in stage1_parameters(big).values()) == 13259008


def with_grid(whole=True):
    "The golden weights as a model of large pictures"
    said = json.loads((GOLDEN / "config.json").read_text())
    hd = build(said | dict(image_grid=2, image_global=whole, image_size_aux=2 * said["image_size_aux"], tokenizer_model_max_length=400)).eval()
    hd.load_state_dict(load_original(GOLDEN).state_dict())
    return hd


@pytest.mark.parametrize("whole", [True, False])
def test_large_pictures_as_in_the_published_code(whole):
    "Written out view by view, in the published code's order: cells of the enlarged map, and for the whole the map at half its size"
    import torch.nn.functional as F

    from blip2mgm.vision import enlarge, windows

    hd, P = with_grid(whole), 16
    pictures = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    views = lowres_grid(pictures, 56, 2, whole)  # the cells, then the whole
    with torch.no_grad():
        clip = lambda x: hd.clip(pixel_values=x, output_hidden_states=True).hidden_states[-2][:, 1:]
        maps, x = [], hd.convnext.embeddings(pictures)
        for stage in hd.convnext.encoder.stages:
            x = stage(x)
            maps.append(x)
        fine = enlarge(maps)
        h = fine.shape[-1] // 2
        quarters = [fine[:, :, :h, :h], fine[:, :, :h, h:], fine[:, :, h:, :h], fine[:, :, h:, h:]]
        pairs = [(clip(views[:, i]), q) for i, q in enumerate(quarters)]
        if whole:
            pairs.insert(0, (clip(views[:, 4]), F.interpolate(fine, scale_factor=0.5, mode="bilinear", align_corners=False)))
        out = []
        for patches, map_ in pairs:
            win = windows(map_, P)
            q, k, v = hd.vlm_uni_query_projector(patches)[:, :, None], hd.vlm_uni_aux_projector(win), hd.vlm_uni_val_projector(win)
            out.append(patches + ((q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5).softmax(-1) @ v)[:, :, 0])
        want = hd.mm_projector(torch.cat(out, 1))
        assert hd.n_image_tokens == want.shape[1] == len(pairs) * P
        assert gap(hd.image_tokens(hd.vision_features(views, pictures)), want) <= 1e-4
        assert gap(hd.image_tokens(hd.vision_features(images_aux=pictures)), want) <= 1e-4


def test_large_pictures_train_and_answer(inputs):
    hd = with_grid()
    pictures = torch.randn(3, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    text = {k: inputs[k] for k in ("input_ids", "labels", "attention_mask")}
    out = hd.train()(**text, images=lowres_grid(pictures, 56, 2, True), images_aux=pictures)
    out.loss.backward()
    assert hd.mm_projector[0].weight.grad.abs().sum() > 0
    features, prompts = hd.eval().vision_features(images_aux=pictures), [[2, -200, 7, 8, 9], [2, 12], [2, -200, 5]]
    batch = hd.generate(**collate(prompts, side="left"), features=features, max_new_tokens=5, stop_ids=[1])
    assert batch == [hd.generate(torch.tensor([p]), features=features[[i]], max_new_tokens=5, stop_ids=[1])[0] for i, p in enumerate(prompts)]


def test_all_912_tensors_are_saved_and_loaded(tmp_path):
    "A model of the published depth and tiny width"
    said = dict(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=18, num_attention_heads=2, num_key_value_heads=1, head_dim=4, hidden_act="gelu",
                image_size_aux=96, towers=dict(convnext=dict(dims=[2, 4, 6, 8], depths=[3, 3, 27, 3]), clip=dict(
                    hidden_size=8, intermediate_size=8, num_hidden_layers=24, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=8)))
    torch.manual_seed(0)
    model = build(said)
    save_original(model, tmp_path)
    assert set(load_file(tmp_path / "weights.safetensors")) == set(json.loads((GOLDEN / "mgm2b_state_dict_names.json").read_text()))
    again = load_original(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_model_from_parts_is_saved_as_one_checkpoint(tmp_path, model, inputs):
    model.config.original = {}
    save_original(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_original(tmp_path)(**inputs).logits, model(**inputs).logits)


def test_convnext_with_open_clip_names(tmp_path, model):
    "As the hub holds it: names after visual.trunk., no config of transformers"
    theirs = {n.replace("model.vision_tower_aux.vision_", "visual.trunk."): t for n, t in load_file(GOLDEN / "weights.safetensors").items() if "vision_tower_aux" in n}
    save_file({**theirs, "text.positional_embedding": torch.zeros(2)}, tmp_path / "open_clip_model.safetensors")
    made = from_parts(model.lm, model.clip, tmp_path, image_size_aux=128)
    x = torch.randn(1, 3, 128, 128)
    assert all(gap(a, b) <= 1e-5 for a, b in zip(made.vision_features(images_aux=x).aux, model.vision_features(images_aux=x).aux))


def test_checkpointing_changes_nothing(model, inputs):
    grads = []
    for on in (False, True):
        model.checkpointing = on
        model.train().zero_grad()
        model(**inputs).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_importing_the_package_is_light():
    code = "import sys, blip2mgm; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
