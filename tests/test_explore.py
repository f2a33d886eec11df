"The exploration: its numbers, one pass in bounded memory, resuming, sampling, near-duplicates, leakage; odd rows and captions do not stop it."
import io
import json
import random
from base64 import b64encode

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance

from blip2mgm import survey as module
from blip2mgm.cli import main
from blip2mgm.core import ConfigError, UserError
from blip2mgm.data import Picture, decode, gate
from blip2mgm.formats import as_lines, text_of, write_dj
from blip2mgm.explore import ExploreConfig, conclusion, diversity_table, measures, plot_alike, plot_flags, plot_gallery, plot_images, plot_lengths, plot_saturation, plot_words, preview, share_interval
from blip2mgm.corpus import corpus_of
from blip2mgm.pictures import draw, make_scene
from blip2mgm.survey import Pictures, Seen, alike, analyse, close_pairs, count_rows, explore, fingerprint, image_stats, leakage, measure
from blip2mgm.tasks import Question

CAPTIONS = ["stock photo", "a red bus on the road to the $2 sign_x^2", "a <b>bold</b> caption with { braces } and $ signs"]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, size in enumerate([(402, 370), (200, 300), (600, 600)]):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8), "uint8"))
        coarse.resize(size, Image.Resampling.BICUBIC).save(tmp_path / f"{i}.jpg")
    Image.open(tmp_path / "0.jpg").resize((300, 280)).save(tmp_path / "0again.jpg", quality=60)
    rows = [{"id": i, "text": text_of(c), "images": [f"{i}.jpg"]} for i, c in enumerate(CAPTIONS)]
    write_dj(tmp_path / "captions.jsonl", [*rows, {"id": 9, "text": None, "images": ["0.jpg"]}, "no row", rows[1], {"id": 5, "text": text_of("a red bus on the road to the $2 sign_x^2!"), "images": ["0again.jpg"]}])
    return tmp_path


def test_numbers(folder):
    found = explore(folder / "captions.jsonl", folder, folder=folder / "out")
    a = analyse(found)
    assert a["rows"] == {"in": 7, "accepted": 4, "rejected": 3} and a["rejected_by"] == {"null text": 1, "not a row": 1, "duplicate id": 1}
    assert a["complete"] == {"id": 1, "text": pytest.approx(5 / 6), "images": 1}
    assert a["captions"]["too_short"] == a["captions"]["boilerplate"] == 1 / 4 and a["phrases"] == [("stock photo", 1)]
    assert a["images"]["sizes"] == pytest.approx({"medium": 1 / 2, "small": 1 / 4, "large": 1 / 4}) and a["images"]["width"]["min"] == 200
    assert a["similar_pictures"]["alike"] == 2 and a["similar_captions"]["alike"] == 2
    json.dumps(a, allow_nan=False)
    text = " ".join(conclusion(a))
    assert "4 are sound" in text and "3 were refused" in text and len(measures(a)) > 20 and len(diversity_table(a)) == 9
    rows = pq.read_table(folder / "out" / "rows.parquet").to_pylist()
    assert [r["status"] for r in rows] == ["accepted"] * 3 + ["rejected"] * 3 + ["accepted"] and rows[1]["words"] == 12 and rows[2]["size"] == "large"
    rejected = [json.loads(line) for line in (folder / "out" / "rejected.jsonl").open()]
    assert [r["reason"] for r in rejected] == ["null text", "not a row: str 'no row'", "duplicate id: '1'"] and rejected[2]["images"] == ["1.jpg"]
    assert not list((folder / "out").glob(".batches*"))


def test_a_gates_result_gives_the_same(folder):
    a, b = analyse(explore(folder / "captions.jsonl", folder, depth="shape")), analyse(gate(folder / "captions.jsonl", folder))
    for key in ("rows", "rejected_by", "complete", "captions", "most_frequent"): assert a[key] == b[key], key
    assert a["images"]["width"] == b["images"]["width"]


def large(folder, n=4500):
    rng = random.Random(1)
    for i in range(3): Image.effect_noise((60 + i, 50), 60).save(folder / f"small{i}.jpg")
    text = lambda: " ".join(rng.choices("red blue bus sign road tree on the by near".split(), k=rng.randint(3, 12)))
    rows = [{"id": f"r{i}", "text": text_of(text()), "images": [f"small{i % 3}.jpg"]} for i in range(n)]
    rows[1234]["text"], rows[4000]["id"] = None, "r7"
    return write_dj(folder / "large.jsonl", rows)


def plain(a): return json.loads(json.dumps(a))


def test_processes_threads_and_resuming_give_the_same(folder, monkeypatch):
    source = large(folder)
    one = explore(source, folder, workers=1, folder=folder / "one")
    assert (one.rows, one.accepted) == (4500, 4498)
    seen, work = [], module.look_at_rows
    def stops(*args):
        seen.append(1)
        if len(seen) == 4: raise KeyboardInterrupt
        return work(*args)
    monkeypatch.setattr(module, "look_at_rows", stops)
    with pytest.raises(KeyboardInterrupt): explore(source, folder, workers=1, folder=folder / "two")
    assert not (folder / "two" / "rows.parquet").exists() and len(list((folder / "two").glob(".batches-*/*.json"))) == 3
    two = explore(source, folder, workers=1, folder=folder / "two")
    assert len(seen) == 6, "three of five batches were not looked at again"
    monkeypatch.undo()
    three = explore(source, folder, workers=2)
    assert plain(analyse(one)) == plain(analyse(two)) == plain(analyse(three))
    for name in ("rows.parquet", "rejected.jsonl"): assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()


def test_sample(folder):
    source = large(folder)
    a, b, c = (explore(source, folder, "text", sample=500, seed=s) for s in (0, 0, 1))
    assert (a.rows, a.of) == (500, 4500) and analyse(a) == analyse(b) != analyse(c)
    whole, shown = analyse(explore(source, folder, "text")), measures(analyse(a))
    assert any("[" in r["value"] for r in shown) and not any("[" in r["value"] for r in measures(whole))
    low, high = share_interval(analyse(a)["captions"]["too_short"], 500, 4500)
    assert low < whole["captions"]["too_short"] < high and count_rows(source) == 4500


def test_charts_take_any_text(folder):
    found = explore(folder / "captions.jsonl", folder)
    a, odd = analyse(found), corpus_of(["$\\frac$ broken formula", "", "a bus", "word " * 900])
    for fig in (plot_lengths(odd), plot_words(odd), plot_images(found.pictures), plot_gallery(found), plot_flags(a), plot_saturation({"a": a["saturation"], "b": []}),
                plot_alike(folder / "captions.jsonl", folder, a["similar_pictures"]["pairs"])):
        fig.savefig(io.BytesIO(), format="png")


def test_nothing_to_measure():
    empty = analyse(gate([], "."))
    assert conclusion(empty)[1] == "There is nothing to measure." and measures(empty)
    for fig in (plot_lengths(corpus_of([])), plot_words(corpus_of([])), plot_images(Pictures()), plot_flags(empty), plot_saturation({"a": []})): fig.savefig(io.BytesIO(), format="png")


def test_sharpness_is_counted_by_three_digits():
    pictures = Pictures()
    pictures.add([(k, str(k), Picture(9, 9, "PNG", "L", 9, 1.0, x)) for k, x in enumerate((0.404, 7.2, 42.04, 523.4, 1284.0, 123456.0))])
    assert sorted(pictures.sharpness) == [0.4, 7.2, 42, 523, 1280, 20_000]


def test_size_classes():
    stats = image_stats([Picture(224, 5000, "PNG", "P", 1), Picture(223, 5000, "PNG", "P", 1), Picture(1024, 2000, "JPEG", "RGB", 1)])
    assert set(stats["sizes"]) == {"small", "medium", "very large"}


def test_fingerprints_are_those_of_the_imagehash_library():
    known = ["840877ae5167fa8d", "d4012b7e795629d6", "8080007f2a7eff7d", "aa2aaa007f87557e", "8f80fd802a7faa55", "84ee80aa8055ff7d"]   # ImageHash 4.3.2, Pillow 13
    pictures = [Image.fromarray((np.add.outer(np.arange(97) * (k + 1) % 251, np.arange(131) * (2 * k + 3) % 197) % 256).astype("uint8")) for k in range(6)]
    far = [(fingerprint(p) ^ int(h, 16)).bit_count() for p, h in zip(pictures, known)]
    assert sum(far) <= 2 and measure(pictures[0])[2] == fingerprint(pictures[0])


@pytest.mark.parametrize("near", [0, 2, 4, 8])
def test_close_pairs_are_all_pairs(near):
    rng = np.random.default_rng(near)
    hashes = rng.integers(0, 2**64, 300, np.uint64)
    for i in range(100): hashes[200 + i] = hashes[i] ^ np.uint64(sum(1 << int(b) for b in rng.choice(64, i % 12, replace=False)))
    brute = {(i, int(j)) for i in range(300) for j in np.flatnonzero(np.bitwise_count(hashes[i] ^ hashes[i + 1:]) <= near) + i + 1}
    assert {tuple(p) for p in close_pairs(hashes, near)[0].tolist()} == brute


def test_alike_counts_files_and_not_rows():
    pictures = Pictures()
    same = Picture(9, 9, "PNG", "L", 9, 1.0, 1.0, 7)
    pictures.add([(0, "a", same), (1, "a", same), (2, "b", same._replace(hash=2**63 + 2**40)), (3, "c", same._replace(hash=6))])
    assert {k: alike(pictures)[k] for k in ("files", "alike", "groups")} == {"files": 3, "alike": 3, "groups": 1}
    assert alike(pictures, 1)["alike"] == 2 and alike(Pictures())["files"] == 0


def test_examples_of_alike_files_come_in_the_order_of_the_rows():
    pictures, same = Pictures(), Picture(9, 9, "PNG", "L", 9, 1.0, 1.0, 7)
    pictures.add([(row, path, same) for row, path in enumerate((30, 20, 10))])   # numbers as paths: Python's hash of a text is another in each run
    assert alike(pictures)["pairs"] == [(0, 1, 0), (0, 2, 0)]


def test_copies_look_alike_and_flat_drawings_do_not(tmp_path):
    "Copies saved anew, shrunk, brighter or as PNG are found, in another order of files too; drawings with the same fingerprint and other things in them are not."
    rng, pictures, seen = random.Random(3), Pictures(), []
    scenes = [draw(make_scene(rng), rng, (200, 180)) for _ in range(300)]
    copies = [lambda im: im, lambda im: im.resize((100, 90)), lambda im: ImageEnhance.Brightness(im).enhance(0.92), lambda im: im.crop((1, 1, 199, 179))]
    for k, im in enumerate([*scenes, *(copies[k % 4](im) for k, im in enumerate(scenes[:40]))]):
        im.save(buffer := io.BytesIO(), "PNG" if k % 8 == 4 else "JPEG", quality=40 + k % 50)
        seen.append((k, str(k), decode(buffer.getvalue(), measure=measure)))
    pictures.add(rng.sample(seen, len(seen)))
    found, hashes = alike(pictures), np.array([p.hash for _, _, p in seen[:300]], np.uint64)
    assert len(close_pairs(hashes)[0]) > 10 and 34 <= found["groups"] <= 44 and found["largest"] <= 3 and found["alike"] <= 90
    assert sum(abs(a - b) == 300 for a, b, _ in found["pairs"]) >= 0.9 * len(found["pairs"])


def test_copies_are_found_among_thousands_with_one_fingerprint():
    "A line of the same fingerprint is far longer than the window; a copy stands beside its like in it."
    rng, pictures = np.random.default_rng(4), Pictures()
    looks = (rng.uniform(20, 235, (3000, 1, 1, 3)) + rng.uniform(-20, 20, (3000, 12, 12, 3))).astype(np.uint8)
    looks = np.concatenate([looks, looks[:100] + rng.integers(0, 2, (100, 12, 12, 3), np.uint8)])
    pictures.add([(k, str(k), Picture(9, 9, "PNG", "RGB", 9, 1.0, 1.0, 7, b64encode(look.tobytes()).decode())) for k, look in enumerate(looks)])
    found = alike(pictures)
    assert 95 <= found["groups"] <= 100 and found["largest"] == 2 and found["not_compared"] > 0.9


def test_leakage(folder):
    found = explore(folder / "captions.jsonl", folder)
    ask = lambda i, image, text: Question(i, str(i), image, text, text, "other", ("x",), {"x": ""})
    buffer = io.BytesIO()
    Image.open(folder / "2.jpg").resize((500, 480)).save(buffer, "JPEG")
    Image.effect_noise((90, 90), 90).save(folder / "fresh.png")
    seen = leakage(found, [ask(1, buffer.getvalue(), CAPTIONS[1]), ask(2, folder / "fresh.png", "what is it?"), ask(3, b"broken", "what is it?")])
    assert (seen["pictures"], seen["pictures_seen"], seen["questions"], seen["questions_seen"]) == (2, 1, 2, 1)
    assert seen["examples"][0]["row"] == 2 and seen["texts"][0]["row"] in (1, 6)


def test_ids_seen_before():
    seen, rng, before = Seen(), random.Random(0), set()
    for _ in range(60):
        ids = [str(rng.randrange(3000)) for _ in range(rng.randrange(100))]
        expected = []
        for i in ids: expected.append(i in before); before.add(i)
        assert seen.again(ids) == expected
    assert len(seen.parts) < 8


def test_preview(folder, capsys):
    assert main(["explore", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "rows accepted" in said and "4 of 7" in said and "4 are sound" in said
    assert main(["explore", str(folder / "captions.jsonl"), "--root", str(folder / "out"), "--depth", "text"]) == 2
    assert "not a folder" in capsys.readouterr().err
    (folder / "elsewhere").mkdir()
    assert "--root" in preview(folder / "captions.jsonl", folder / "elsewhere", "shape")
    with pytest.raises(UserError, match="not there"): preview(folder / "none")


@pytest.mark.parametrize("bad", [{"top": 0}, {"depth": "deep"}, {"near": 9}, {"overlap": 0.1}, {"sample": -1}])
def test_config(bad):
    with pytest.raises(ConfigError): ExploreConfig(**bad)


@pytest.mark.parametrize("depth", ["text", "shape", "full"])
def test_rows_in_the_usual_form_are_judged_as_all_others(folder, monkeypatch, depth):
    "A batch of usual rows takes a shorter way, which says the same; one odd row, and the whole batch takes the longer one."
    rng, captions = random.Random(2), [*CAPTIONS, "\u00e9t\u00e9 au lac", "(a bus)", "\u200b", "\u2003 .", "a\x1eb", "  spaces  ", "< a"]
    row = lambda i: json.dumps({"id": f"r{i}", "text": text_of(rng.choice(captions)), "images": [rng.choice(["0.jpg", "none.jpg", "../0.jpg", ""])], "more": i}).encode()
    batch = as_lines(map(row, range(60)))
    batches = [batch, *(batch[i:i + 1] for i in range(60))]
    short = [module.look_at_rows(rows, True, folder, depth) for rows in batches]
    monkeypatch.setattr(module, "_usual", lambda lines: None)
    monkeypatch.setattr(module, "plain_rows", lambda lines: [None] * len(lines))
    as_text = lambda found: [[x.decode() if isinstance(x, bytes) else x for x in column] for column in found.values()]
    assert [repr(as_text(found)) for found in short] == [repr(as_text(module.look_at_rows(rows, True, folder, depth))) for rows in batches]
