"The captioner: right against generate, the same in any batch and order, patient with bad pictures, and loadable by Data-Juicer."
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import numpy as np
from PIL import Image, ImageFile
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, Blip2QFormerConfig, Blip2VisionConfig, BlipConfig, BlipForConditionalGeneration,
                          BlipProcessor, BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig,
                          InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor, InstructBlipQFormerConfig, InstructBlipVisionConfig,
                          OPTConfig, PreTrainedTokenizerFast, T5Config)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2mgm.captioner import Captioner
from blip2mgm.core import UserError, project_root
from blip2mgm.formats import text_of
from blip2mgm.mapper import Memory, deciders, remembered, with_captions
from blip2mgm.speaker import ask, load_model, opening, pixels, read_picture, search, see, shrink, speak, speech_model, stop_tokens, weights_hash

torch.set_num_threads(1)
WORDS = ["<pad>", "</s>", "<s>", "<unk>", "<image>", "\n"] + [f"w{i}" for i in range(60)]


def tokenizer():
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   additional_special_tokens=["<image>"])


def language(kind):
    if kind == "opt":
        return OPTConfig(vocab_size=66, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, dropout=0.,
                         max_position_embeddings=96, bos_token_id=2, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False)
    return T5Config(vocab_size=66, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=1,
                    pad_token_id=0, bos_token_id=2, dropout_rate=0., tie_word_embeddings=False)


SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def lively(model):
    "Weights so large that captions differ from picture to picture"
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, .35)
        for name in ("query_tokens", "language_projection"):
            if (part := getattr(model, name, None)) is not None:
                getattr(part, "weight", part).normal_()
    return model.eval()


def make(folder, kind, size=48, seed=0):
    "A random model of one of the families, whose captions end here and there"
    torch.manual_seed(seed)
    pictures = BlipImageProcessorPil(size={"height": size, "width": size})
    if kind == "blip":
        text = BlipTextConfig(**SIZES, vocab_size=66, encoder_hidden_size=32, max_position_embeddings=96, bos_token_id=2, eos_token_id=1, sep_token_id=1, pad_token_id=0,
                              hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
        config = BlipConfig(text_config=text.to_dict(), vision_config=BlipVisionConfig(**SIZES, image_size=size, patch_size=16).to_dict())
        model, processor = BlipForConditionalGeneration(config), BlipProcessor(pictures, tokenizer())
    else:
        instruct = kind.startswith("instruct")
        kinds = (InstructBlipVisionConfig, InstructBlipQFormerConfig, InstructBlipConfig, InstructBlipForConditionalGeneration) if instruct else (
            Blip2VisionConfig, Blip2QFormerConfig, Blip2Config, Blip2ForConditionalGeneration)
        vision = kinds[0](**SIZES, image_size=size, patch_size=16)
        qformer = kinds[1](**SIZES, vocab_size=66, cross_attention_frequency=1, encoder_hidden_size=32)
        lm = language(kind.removeprefix("instruct-"))
        model = kinds[3](kinds[2](vision_config=vision, qformer_config=qformer, text_config=lm, num_query_tokens=4, image_token_index=4))
        processor = InstructBlipProcessor(pictures, tokenizer(), tokenizer(), num_query_tokens=4) if instruct else Blip2Processor(pictures, tokenizer(), num_query_tokens=4)
        model.generation_config.update(eos_token_id=1, pad_token_id=0, bos_token_id=2, decoder_start_token_id=0 if kind.endswith("t5") else None)
    lively(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "opt", "opt", seed=2)


@pytest.fixture(scope="module", params=["opt", "t5", "instruct-opt", "instruct-t5", "blip"])
def folder(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("pictures"), random.Random(0)
    paths = []
    for i in range(40):
        size = rng.randint(30, 300), rng.randint(30, 300)
        noise = np.random.default_rng(i).normal(128, 80, size[::-1]).clip(0, 255).astype("uint8")   # the same in every run
        image = Image.fromarray(noise).convert("RGB")
        image.paste((rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)), (0, 0, rng.randint(10, 200), rng.randint(10, 200)))
        paths.append(place / f"{i}.jpg")
        image.save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def broken(pictures):
    place, data = pictures[0].parent, pictures[0].read_bytes()
    (place / "cut.jpg").write_bytes(data[:len(data) // 2])
    (place / "empty.jpg").write_bytes(b"")
    (place / "page.jpg").write_bytes(b"<html>404</html>")
    Image.new("1", (12_000, 8_000)).save(place / "bomb.png")   # 96 million pixels in 12 kB
    return [place / "cut.jpg", place / "empty.jpg", place / "page.jpg", place / "bomb.png", place / "missing.jpg", place]


def begin(model, processor, pictures, prompt="w7 w8"):
    px, asked = pixels([shrink(read_picture(p), processor) for p in pictures], processor), ask(model, processor, prompt)
    with torch.inference_mode():
        return px, asked, opening(model, see(model, px, asked), asked)


def theirs(model, px, asked, stops, **how):
    "What the model's own `generate` says, without the prompt"
    n, more = len(px), {"qformer_input_ids": asked.qformer.repeat(len(px), 1)} if asked.qformer is not None else {}
    blip = model.config.model_type == "blip"
    ids = torch.cat([asked.ids, torch.tensor([[1]])], 1) if blip else asked.ids   # BLIP's own code takes the last token off
    ends = {} if blip else {"eos_token_id": sorted(stops)}
    if blip: model.config.text_config.sep_token_id = max(stops)   # it takes one only
    with torch.no_grad():
        out = model.generate(pixel_values=px, input_ids=ids.repeat(n, 1), max_new_tokens=20, do_sample=False, **ends, **how, **more)
    return out[:, 1 if speech_model(model).config.is_encoder_decoder else asked.ids.shape[1]:].tolist()


def padded(said, like): return [s + [0] * (len(t) - len(s)) for s, t in zip(said, like)]


def test_equals_generate(folder, pictures):
    model, processor = load_model(folder)
    px, asked, start = begin(model, processor, pictures[:9])
    endless, _ = speak(model, start, set(), 20)
    blip = model.config.model_type == "blip"
    stops = {endless[0][6]} if blip else {1, endless[0][6], endless[1][11]}   # so that captions end at different steps
    said, _ = speak(model, begin(model, processor, pictures[:9])[2], stops, 20)
    expected = theirs(model, px, asked, stops, num_beams=1)
    assert padded(said, expected) == expected
    assert len({len(s) for s in said}) > 1 and len({tuple(s) for s in endless}) > 2


def test_beams_equal_generate(folder, pictures):
    model, processor = load_model(folder)
    px, asked, start = begin(model, processor, pictures[:3])
    expected = theirs(model, px, asked, {1}, num_beams=3)
    found = search(model, start, {1}, 20, 3)
    assert [f[:20] for f in found] == [[t for k, t in enumerate(e) if 1 not in e[:k]] for e in expected]
    both = search(model, begin(model, processor, pictures[:3])[2], {1}, 20, 3, 2)
    assert len(both) == 6 and both[::2] == found


def test_pixels_equal_the_processors(opt, pictures):
    _, processor = load_model(opt)
    images = [read_picture(p) for p in pictures[:8]] + [Image.new("RGB", (1, 1)), Image.new("RGB", (48, 48), "red")]
    theirs = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert (pixels([shrink(i, processor) for i in images], processor) - theirs).abs().max() < 1e-5


SEVERAL = {"prompts": ["w7 {caption}", ""], "seed": 5, "candidates": 2}


def compare(folder, pictures, batches, **how):
    names, texts = [p.stem for p in pictures], [" ".join(["w9"] * (i % 3)) for i in range(len(pictures))]
    def write(batch, order): return Captioner(folder, batch=batch, max_new_tokens=16, **how).caption(*([what[i] for i in order] for what in (pictures, names, texts)))
    order, alone = random.Random(1).sample(range(len(pictures)), len(pictures)), write(1, range(len(pictures)))
    for batch in batches:
        mixed = write(batch, order)
        assert [mixed[order.index(i)][:3] for i in range(len(pictures))] == [c[:3] for c in alone]
    assert {c.status for c in alone} <= {"ok", "cut"} and len({c.text for c in alone}) > len(pictures) / 4


@pytest.mark.parametrize("how", [{}, {"seed": 5, "temperature": .4}, {"prompts": ["w7 w8"]}, SEVERAL])
def test_same_caption_in_any_company(opt, pictures, how):
    compare(opt, pictures[:16] if how is SEVERAL else pictures, (7, 32), **how)


def test_same_caption_in_any_company_by_every_family(folder, pictures):
    compare(folder, pictures[:6], (4,), **SEVERAL)


def test_beams_in_any_company(opt, pictures):
    def write(batch): return Captioner(opt, batch=batch, max_new_tokens=12, beams=3, candidates=2).caption(pictures[:12])
    assert write(1) == write(7) and len({c.text for c in write(7)}) > 3


def test_samples_hang_on_name_and_seed(opt, pictures):
    def write(names, seed=1, **how): return [c.text for c in Captioner(opt, seed=seed, max_new_tokens=12, **how).caption([pictures[0]] * 6, names)]
    assert len(set(write(["a"] * 6))) == 1
    assert len(set(write(list("abcdef")))) > 3
    assert write(["a"] * 6, seed=2) != write(["a"] * 6)
    assert len(set(write(list("abcdef"), candidates=3, keep="random"))) > 3


def test_several_candidates(opt, pictures):
    best = Captioner(opt, seed=1, candidates=4, max_new_tokens=12).caption(pictures[:8])
    for c in best:
        assert len(c.drafts) == 4 and c.text == max(c.drafts, key=lambda d: d.score).text
    everything = Captioner(opt, seed=1, candidates=4, keep="all", max_new_tokens=12).caption(pictures[:8])
    assert [[d.text for d in c.drafts] for c in everything] == [[d.text for d in c.drafts] for c in best]
    fewer = Captioner(opt, seed=1, candidates=2, keep="all", max_new_tokens=12).caption(pictures[:8])
    assert [c.drafts[:2] for c in everything] == [c.drafts for c in fewer]   # a further candidate changes none
    chance = Captioner(opt, seed=1, candidates=4, keep="random", max_new_tokens=12).caption(pictures[:8])
    assert all(c.text in [d.text for d in b.drafts] for c, b in zip(chance, best)) and [c.text for c in chance] != [c.text for c in best]


@pytest.mark.parametrize("how, problem", [({"candidates": 2}, "give a seed"), ({"keep": "bset"}, "best"), ({"beams": 2, "seed": 1}, "exclude"), ({"batch": 0}, "at least 1")])
def test_refuses_what_cannot_be(opt, how, problem):
    with pytest.raises(UserError, match=problem):
        Captioner(opt, **how)


def test_clip_scores_candidates(opt, pictures, tmp_path):
    text = CLIPTextConfig(**SIZES, vocab_size=66, max_position_embeddings=24, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    clip = lively(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=CLIPVisionConfig(**SIZES, image_size=32, patch_size=16).to_dict(), projection_dim=16)))
    clip.save_pretrained(tmp_path)
    words = tokenizer()
    words.model_max_length = 24
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32), words).save_pretrained(tmp_path)
    how = dict(seed=1, candidates=3, max_new_tokens=12, scorer=str(tmp_path))
    alone, together = (Captioner(opt, batch=b, **how).caption(pictures[:8]) for b in (1, 8))
    assert [c.text for c in alone] == [c.text for c in together]
    d = together[0].drafts[0]
    _, processor = load_model(opt)
    from transformers import AutoProcessor
    inputs = AutoProcessor.from_pretrained(tmp_path)(text=[d.text], images=[read_picture(pictures[0])], return_tensors="pt")
    with torch.no_grad():
        out = clip(**inputs)
    assert d.score == pytest.approx(100 * float(out.image_embeds @ out.text_embeds.T), abs=.01)
    with pytest.raises(UserError, match="not a CLIP"):
        Captioner(opt, scorer=str(opt))


class Small(Captioner):
    "A captioner whose memory holds few pictures"
    room, tried = 5, ()

    def drafts(self, jobs, view, prompt):
        self.tried += (len(jobs),)
        if len(jobs) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return super().drafts(jobs, view, prompt)


def test_too_little_memory_halves_the_batch(opt, pictures, broken):
    wanted, small = Captioner(opt, max_new_tokens=12).caption(pictures[:30] + broken[:1]), Small(opt, max_new_tokens=12, batch=24)
    assert small.caption(pictures[:30] + broken[:1]) == wanted
    assert small.tried[:3] == (24, 12, 6) and set(small.tried[3:]) <= {3} and small.fits == 3   # and it stays so
    small.room = 0
    with pytest.raises(UserError, match="does not suffice for one picture"):
        small.caption(pictures[:3])


def test_memory(opt, pictures, broken, tmp_path):
    "What was written is not written again, unless something changed that decides it"
    images, names, texts = pictures[:6], list("abcdef"), ["w1"] * 6
    def run(captioner, images=images, names=names, texts=texts):
        asked = []
        real = captioner.caption
        captioner.caption = lambda ims, *more: asked.extend(ims) or real(ims, *more)
        found = remembered(captioner, Memory(tmp_path / "m.sqlite"), images, names, texts)
        assert found == real(images, names, texts)
        return len(asked)
    greedy, sampling = dict(max_new_tokens=12), dict(max_new_tokens=12, seed=1)
    assert [run(Captioner(opt, **greedy), images[:4], names[:4], texts[:4]), run(Captioner(opt, **greedy)), run(Captioner(opt, **greedy, batch=2))] == [4, 2, 0]
    assert run(Captioner(opt, **greedy), names=list("ghijkl"), texts=["w2"] * 6) == 0       # neither decides a greedy caption
    assert run(Captioner(opt, max_new_tokens=11)) == 6
    assert [run(Captioner(opt, **sampling)), run(Captioner(opt, **sampling)), run(Captioner(opt, **sampling), names=list("abcdex"))] == [6, 0, 1]
    asks = dict(max_new_tokens=12, prompts=["{caption}"])
    assert [run(Captioner(opt, **asks)), run(Captioner(opt, **asks), texts=["w1"] * 5 + ["w2"])] == [6, 1]
    assert [run(Captioner(opt, **greedy), [broken[0], pictures[0]], ["a", "b"], ["", ""]) for _ in range(2)] == [1, 1]   # an error is not remembered
    other = make(tmp_path / "other", "opt", seed=5)
    assert deciders(Captioner(other, **greedy)) != deciders(Captioner(opt, **greedy))
    shutil.copy(opt / "model.safetensors", other / "model.safetensors")
    assert run(Captioner(other, **greedy)) == 0                                              # the same weights under another path


def test_bad_pictures_mark_themselves_only(opt, pictures, broken, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)   # as Data-Juicer leaves it
    captioner = Captioner(opt, max_new_tokens=12, batch=8)
    good = captioner.caption(pictures[:10])
    mixed = captioner.caption(pictures[:5] + broken + pictures[5:10])
    assert mixed[:5] + mixed[11:] == good
    assert all(c.status.startswith("error: ") and c.text == "" and str(broken[0].parent) not in c.status for c in mixed[5:11])
    assert captioner.caption(broken)[0].status.startswith("error") and captioner.caption([]) == []


def test_limit_and_end(opt, pictures):
    captions = Captioner(opt, max_new_tokens=9).caption(pictures)
    assert {c.status for c in captions} == {"ok", "cut"}
    assert all(c.tokens == 9 for c in captions if c.status == "cut") and all(c.tokens <= 9 for c in captions)
    assert all("</s>" not in c.text and "\n" not in c.text and c.text == c.text.strip() for c in captions)


def test_picture_is_seen(opt, pictures):
    assert len({c.text for c in Captioner(opt, max_new_tokens=12).caption(pictures)}) > 10
    with pytest.raises(ValueError, match="5 image placeholders for 4"):
        ask(*load_model(opt), "w1 <image> w2")


def test_hash_follows_the_content(opt, tmp_path):
    copy = shutil.copytree(opt, tmp_path / "elsewhere")
    (copy / "README.md").write_text("about it")
    assert weights_hash(copy) == weights_hash(opt)
    other = make(tmp_path / "other", "opt", seed=1)
    assert weights_hash(other) != weights_hash(opt)
    shutil.copy(other / "model.safetensors", copy / "model.safetensors")
    assert weights_hash(copy) != weights_hash(opt)


def test_refuses_what_writes_no_captions(tmp_path):
    OPTConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it is a opt model"):
        Captioner(tmp_path)
    with pytest.raises(UserError, match="cannot be used"):
        Captioner(tmp_path / "nowhere")


def test_text_with_captions():
    assert with_captions(text_of("old words"), ["new"]) == text_of("new")
    assert with_captions("no picture <|__dj__eoc|>", []) == "no picture <|__dj__eoc|>"


LOADED_BY_PATH = """
import pickle, sys
from data_juicer.config.config import load_custom_operators
from data_juicer.ops.base_op import OPERATORS
load_custom_operators([sys.argv[1]])
op = OPERATORS.modules["blip2_captioning_mapper"](model=sys.argv[2], max_new_tokens=12, accelerator="cpu")
assert pickle.loads(pickle.dumps(type(op))) is type(op) and type(op).__module__ == "blip2mgm.mapper"
done = op.process({"id": ["a", "b", "c"], "text": ["<__dj__image>\\nold <|__dj__eoc|>"] * 3, "images": [[sys.argv[3]], [sys.argv[4]], [sys.argv[3]] * 2]})
assert done["caption"][0] and done["caption"][1:] == ["", ""], done
assert done["text"][0] == f"<__dj__image>\\n{done['caption'][0]} <|__dj__eoc|>" and "old" in done["text"][1]
assert [s.split(":")[0] for s in done["caption_status"][1:]] == ["error", "error"] and done["caption_model"][0] == op.weights[:12]
several = type(op)(model=sys.argv[2], max_new_tokens=12, accelerator="cpu", candidates=2, seed=1, keep="all", share=.5)
rows = several.process({"id": list("abcdefgh"), "text": ["<__dj__image>\\nold <|__dj__eoc|>"] * 8, "images": [[sys.argv[3]]] * 8})
left = [i for i, s in zip(rows["id"], rows["caption_status"]) if s == "as it was"]
assert 0 < len(left) < 8 and sorted(rows["id"]) == sorted(left + [x for i in "abcdefgh" if i not in left for x in (i, i + "#1")]), rows["id"]
try: type(op)(model=sys.argv[2], max_new_token=12)
except TypeError as e: assert "max_new_token" in str(e)
else: raise SystemExit("a mistyped parameter was taken")
print("fine")
"""


def test_operator_loads_by_path(opt, pictures, broken):
    "As Data-Juicer does it: outside the package, and found again by worker processes through its name"
    path = project_root() / "blip2mgm" / "mapper.py"
    run = subprocess.run([sys.executable, "-c", LOADED_BY_PATH, path, opt, pictures[0], broken[0]], capture_output=True, text=True, cwd=opt)
    assert run.stdout.strip().endswith("fine"), run.stderr[-2000:]
