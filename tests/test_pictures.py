"The picture world: real formats, separate splits, the same world from the same seed"
import base64, csv, io, json

import pytest
from PIL import Image

from blip2mgm import pictures as P, world as W


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return W.ensure_world(tmp_path_factory.mktemp("world") / "data", "smoke")


def jsonl(path): return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_seed_gives_the_same_files(world, tmp_path):
    again = W.ensure_world(tmp_path / "data", "smoke")
    for f in sorted(p.relative_to(world) for p in world.rglob("*") if p.is_file()):
        assert (world / f).read_bytes() == (again / f).read_bytes(), f


def test_splits_share_no_scene_and_novel_pairs_stay_in_evaluation(world):
    seen = {}
    for t in jsonl(world / "truth.jsonl"):
        scene = P.scene_from(t["scene"])
        assert P.split_of(scene) == t["split"]
        if t["split"] != "evaluation": assert not {(x.color, x.shape) for x in scene.things} & P.NOVEL
        seen.setdefault(t["split"], set()).add(scene)
    assert set(seen) == {"captions", "instructions", "evaluation"}


def test_evaluation_asks_about_novel_compositions(world):
    scenes = [P.scene_from(t["scene"]) for t in jsonl(world / "truth.jsonl") if t["split"] == "evaluation"]
    assert sum(bool({(x.color, x.shape) for x in s.things} & P.NOVEL) for s in scenes) == len(range(0, len(scenes), 3))


def test_broken_rows_are_as_many_as_asked(world):
    bad = 0
    for row in jsonl(world / "captions.jsonl"):
        text, path = row["text"], world / row["images"][0]
        try:
            with Image.open(path) as im: im.load()
            ok = text is not None and text.count("<__dj__image>") == 1 and world in path.resolve().parents
        except OSError: ok = False
        bad += not ok
    assert bad == W.PRESETS["smoke"].broken


def test_textvqa_has_ten_answers_and_pictures(world):
    data = json.loads((world / "textvqa/TextVQA_0.5.1_val.json").read_text())["data"]
    ocr = {r["image_id"]: r["ocr_tokens"] for r in json.loads((world / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json").read_text())["data"]}
    for q in data:
        assert len(q["answers"]) == 10 and q["image_id"] in ocr
        with Image.open(world / f"textvqa/train_images/{q['image_id']}.jpg") as im: assert im.size == (q["image_width"], q["image_height"])
    assert len({q["question_id"] for q in data}) == len(data)


def test_mmbench_rotations_name_the_same_option(world):
    with open(world / "mmbench/mmbench_dev_20230712.tsv") as f: rows = list(csv.DictReader(f, delimiter="\t"))
    groups = {}
    for r in rows: groups.setdefault(int(r["index"]) % 1_000_000, []).append(r)
    for g in groups.values():
        assert len({r[r["answer"]] for r in g}) == 1 and len({r["answer"] for r in g}) == len(g)
        assert len(g) == sum(bool(g[0][l]) for l in "ABCD")
    Image.open(io.BytesIO(base64.b64decode(rows[0]["image"]))).load()


def test_a_half_drawn_world_is_drawn_again(tmp_path):
    part = tmp_path / "data.part"; part.mkdir(); (part / "rubbish").write_text("x")
    root = W.ensure_world(tmp_path / "data", "smoke")
    assert not part.exists() and not (root / "rubbish").exists()


@pytest.mark.parametrize("text, attribute", [
    ("a picture of one shape on a plain pink background: at the top left a small blue ring", "color"),
    ("a picture of one shape on a plain pink background: at the center a small red ring", "color"),
    ("a picture of one shape on a plain pink background: at the top left a small red star", "shape"),
    ("", "count")])
def test_a_wrong_caption_scores_nothing_on_what_it_got_wrong(text, attribute):
    scene = P.Scene("scene", "pink", "plain", (P.Thing(0, 0, "ring", "red", "small"),))
    assert P.score_captions([text], [scene])[attribute]["share"] == 0
