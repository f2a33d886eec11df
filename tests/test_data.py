"The data gate: every trap is found, no good row is lost, and rows in = accepted + rejected."
import gzip
import io
import json
import os
import random
import tarfile
from base64 import b64encode

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

from blip2mgm.core import UserError
from blip2mgm.data import _plain_jpeg, Bad, decode, gate, header, iter_gate, look_at, open_picture, Root, save_gate, strict_pillow
from blip2mgm.survey import explore
from blip2mgm.formats import (as_lines, caption_of, count_images, count_lines, count_parquet, iter_json, iter_rows, numbered_lines, parse_line, plain_rows, read_dj, read_llava,
                              text_of, write_dj, write_llava, write_parquet)
from blip2mgm.survey import batches


def picture(format="JPEG", size=(40, 30), mode="RGB", **kw):
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(buffer, format, **kw)
    return buffer.getvalue()


def animation(format="GIF"):
    frames, buffer = [Image.effect_noise((20, 20), 10 * i + 9) for i in range(4)], io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb():
    Image.new("1", (12_000, 8_000)).save(buffer := io.BytesIO(), "PNG")   # 96 million pixels in 12 kB
    return buffer.getvalue()


def upright():
    im, buffer = Image.new("RGB", (40, 20), "red"), io.BytesIO()
    exif = im.getexif()
    exif[0x112] = 6
    im.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


GOOD = {
    "good.jpg": picture(), "progressive.jpg": picture(progressive=True), "cmyk.jpg": picture(mode="CMYK"), "grey.jpg": picture(mode="L"),
    "exif.jpg": upright(), "good.png": picture("PNG"), "palette.png": picture("PNG", mode="P"), "alpha.png": picture("PNG", mode="LA"),
    "bit.png": picture("PNG", mode="1"), "deep.png": picture("PNG", mode="I;16"), "good.gif": picture("GIF"), "moving.gif": animation(),
    "moving.png": animation("PNG"), "good.webp": picture("WEBP"), "moving.webp": animation("WEBP"), "good.bmp": picture("BMP"),
    "good.tiff": picture("TIFF"), "good.ppm": picture("PPM"), "wrong_name.png": picture("JPEG"), "no_suffix": picture(), "one.jpg": picture(size=(1, 1)),
    "trailer.jpg": picture() + b"added by a phone", "a b's \u00fc.jpg": picture(), "deep/er/good.jpg": picture(),
}
DAMAGED = {f"cut{i}_{name}": data[:at] for name, data in GOOD.items() if not name.startswith("one") and len(data) > 200
           for i, at in enumerate((len(data) // 2, len(data) - len(data) // 10 - 30))}
NO_IMAGE = {"page.jpg": b"<html>404</html>", "text.jpg": b"hello", "zeros.jpg": bytes(5000), "noise.jpg": random.Random(0).randbytes(5000),
            "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    root = base / "root"
    for name, data in {**GOOD, **DAMAGED, **NO_IMAGE, "empty.jpg": b"", "bomb.png": bomb()}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (base / "secret.jpg").write_bytes(picture())
    (base / "root2").mkdir()
    (base / "root2" / "near.jpg").write_bytes(picture())   # a sibling whose name starts as the root's does
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    for name, target in {"link.jpg": root / "good.jpg", "relative.jpg": "good.jpg", "escape.jpg": base / "secret.jpg", "away": base,
                         "broken.jpg": "nowhere.jpg", "loop.jpg": "loop.jpg", "device.jpg": "/dev/zero"}.items():
        (root / name).symlink_to(target)
    return root


LAB = io.BytesIO()
Image.new("LAB", (8, 8), (200, 128, 128)).save(LAB, "TIFF")
GOOD |= {"lab.tiff": LAB.getvalue(), "deep.tiff": picture("TIFF", mode="I;16"), "fractions.tiff": picture("TIFF", mode="F"), "cmyk.tiff": picture("TIFF", mode="CMYK"),
         "clear.gif": picture("GIF", mode="P", transparency=0), "clear.png": picture("PNG", mode="P", transparency=b"\x00\x80"), "clear.webp": picture("WEBP", mode="RGBA")}


def row(id, *images, **kw):
    return {"id": id, "text": text_of("a bus", len(images)), "images": list(images), **kw}


def reason(row, root, **kw):
    result = gate([row], root, **kw)
    assert len(result.accepted) + len(result.rejected) == 1
    return result.rejected[0]["reason"] if result.rejected else ""


@pytest.mark.parametrize("name", [*GOOD, "link.jpg", "relative.jpg", "./good.jpg", "folder.jpg/../good.jpg"])
def test_good_pictures_pass(root, name):
    assert reason(row("a", name), root) == ""


@pytest.mark.parametrize("name, expected", [
    *((name, "truncated or damaged") for name in DAMAGED), *((name, "not an image") for name in NO_IMAGE),
    ("gone.jpg", "missing file"), ("broken.jpg", "missing file"), ("good.jpg/x.jpg", "missing file"), ("good.jpg ", "missing file"),
    ("C:\\good.jpg", "missing file"), ("https://example.org/a.jpg", "missing file"), ("~/good.jpg", "missing file"),
    ("empty.jpg", "empty file"), ("bomb.png", "decompression bomb"), ("folder.jpg", "not a file"), (".", "not a file"), ("pipe.jpg", "not a file"),
    ("../secret.jpg", "outside"), ("../root2/near.jpg", "outside"), ("/etc/passwd", "outside"), ("escape.jpg", "outside"), ("away/secret.jpg", "outside"),
    ("device.jpg", "outside"), ("a/../../secret.jpg", "outside"), ("../" * 60 + "etc/passwd", "outside"),
    ("loop.jpg", "unreadable"), ("a\0.jpg", "unreadable"), ("x" * 5000, "unreadable"),
    ("", "blank image path"), ("  ", "blank image path"), (None, "not a string"), (3, "not a string"), (["good.jpg"], "not a string"),
    ({"path": "gone.jpg", "bytes": None}, "missing file"), ({"path": None, "bytes": None}, "not a string"), ({"href": "good.jpg"}, "not a string"),
    (b"good.jpg", "not an image"), (b"", "empty file"), (picture()[:300], "truncated"), (b64encode(picture()[:300]).decode(), "truncated"),
    ("data:image/jpeg;base64,!!!", "bad base64"), ("data:image/jpeg;base64," + b64encode(b"<html>").decode(), "not an image"), ("data:", "empty file"),
    ("good.jpg?size=3", "missing file"), ("good.jpg\n", "missing file"), ("..", "outside"), ("/", "outside"), ("folder.jpg/", "not a file"), ("good.jpg/", "missing file"), ("good.jpg/.", "missing file"), ("good.jpg/../good.png", "missing file"),
    ("\udcff.jpg", "missing file"),
])
def test_bad_pictures_are_refused(root, name, expected):
    assert expected in reason(row("a", name), root)
    assert expected in reason(row("a", "good.jpg", name), root)   # one bad picture of several


def test_device_file(root):
    try: os.mknod(root / "null.jpg", 0o20666, os.makedev(1, 5))
    except PermissionError: pytest.skip("this user cannot make a device")
    assert "not a file" in reason(row("a", "null.jpg"), root)


@pytest.mark.parametrize("bad, expected", [
    (None, "not a row"), ("text", "not a row"), ([], "not a row"), (7, "not a row"), ({}, "no id"),
    (row(None, "good.jpg"), "no id"), (row(" ", "good.jpg"), "no id"), (row(["a"], "good.jpg"), "odd id"), (row(True, "good.jpg"), "odd id"),
    ({"id": "a", "images": ["good.jpg"]}, "missing field: text"), ({"id": "a", "text": text_of("a bus")}, "missing field: images"),
    (row("a", "good.jpg", text=None), "null text"), (row("a", "good.jpg", text=float("nan")), "null text"), (row("a", "good.jpg", text=7), "not a string"),
    (row("a", "good.jpg", text=["a bus"]), "not a string"), (row("a", "good.jpg", text=""), "blank text"), (row("a", "good.jpg", text=" \n\u200b"), "blank text"),
    (row("a", "good.jpg", text=text_of("")), "blank text"), (row("a", "good.jpg", text="<image>"), "blank text"),
    (row("a", "good.jpg", text="a bus"), "mismatch"), (row("a", "good.jpg", text="<image><image>a bus"), "mismatch"),
    (row("a", "good.jpg", text="<__dj__image><image>a bus"), "mismatch"), (row("a", text=text_of("a bus")), "mismatch"),
    (row("a", images=None, text=text_of("a bus")), "mismatch"), (row("a", images=[], text=text_of("a bus")), "mismatch"),
    (row("a", images=float("nan"), text=text_of("a bus")), "mismatch"), (row("a"), "no image"), (row("a", images="good.jpg"), "not a list"),
    (row("a", images={"0": "good.jpg"}), "not a list"), (row("a", "good.jpg", "good.jpg", text=text_of("a bus")), "mismatch"),
    (row("a", "good.jpg", text=text_of("half \ud800")), "cannot be written"), (row("a", "good.jpg", note={1, 2}), "cannot be written"),
    ({"id": "a", "image": "good.jpg", "conversations": []}, "conversations"), ({"id": "a", "image": "good.jpg", "conversations": ["hello"]}, "odd turn"),
    ({"id": "a", "image": "good.jpg", "conversations": [{"from": "human", "value": None}]}, "null turn"),
    ({"id": "a", "image": "gone.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}, "missing file"),
    ({"id": "a", "image": "good.jpg", "conversations": [{"from": "human", "value": "What?"}]}, "mismatch"),
])
def test_bad_rows_are_refused_whole(root, bad, expected):
    result = gate([bad], root)
    assert not result.accepted and expected in result.rejected[0]["reason"]
    kept = {k: v for k, v in result.rejected[0].items() if k != "reason"}
    assert repr(kept) == repr(bad if isinstance(bad, dict) else {"row": bad})


def test_objects_that_misbehave_cost_one_row(root):
    class Odd:
        def __repr__(self): raise RuntimeError("no")
    result = gate([row("a", "good.jpg", text=Odd()), row("b", "good.jpg")], root)
    assert len(result.rejected) == 1 and [r["id"] for r in result.accepted] == ["b"]


def test_good_rows_come_back_as_they_were(root):
    rows = [row("a", "good.jpg", source="web", reason="its own"), row(7, "good.png"), row("two", "good.jpg", "good.png"),
            row("llava", "good.jpg", text="<image>\na bus"), {"id": "talk", "conversations": [{"from": "human", "value": "hello"}]}]
    before = json.dumps(rows)
    result = gate(iter(rows), root)
    assert json.dumps(result.accepted) == before and not result.rejected
    assert result.pictures["good.jpg"][:4] == (40, 30, "JPEG", "RGB")


def test_a_reason_of_the_rows_own_is_not_overwritten(root):
    bad = row("a", "gone.jpg", reason="its own")
    assert gate([bad], root).rejected == [{"row": bad, "reason": "missing file: 'gone.jpg'"}]


def test_duplicates(root):
    rows = [row("a", "gone.jpg"), row("a", "good.jpg"), row("a", "good.png"), row(1, "good.jpg"), row("1", "good.jpg"), row("b", "good.jpg")]
    result = gate(rows, root)
    assert [r["id"] for r in result.accepted] == ["a", 1, "b"] and result.accepted[0]["images"] == ["good.jpg"]
    assert result.counts() == {"duplicate id": 2, "missing file": 1}


LINES = [b"\xef\xbb\xbf" + json.dumps(row("first", "good.jpg")).encode(), b"", b"   ", json.dumps(row("windows", "good.jpg")).encode() + b"\r",
         b'{"id": "cut", "text": "x', b"not json", b'{"id": "bytes", "text": "\xff\xfe"}', b"null", b"[1, 2]", b'{"id": NaN}', b'{"id": "x", "id": "y"}',
         b"{} {}", b'{"id": ' + b"9" * 5000 + b"}", b"[" * 100_000, json.dumps(row("separator", "good.jpg", note="\u2028")).encode(),
         json.dumps(row("\u00fc", "good.jpg"), ensure_ascii=False).encode()]


def test_lines_of_a_file(root, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(LINES))
    result = gate(tmp_path / "rows.jsonl", root)
    assert [r["id"] for r in result.accepted] == ["first", "windows", "separator", "\u00fc"]
    assert len(result.rejected) == 10 and result.rows == 14
    for wrong, number in zip(result.rejected[:3], (5, 6, 7)): assert f"line {number}" in wrong["reason"]
    assert result.rejected[0]["raw"] == '{"id": "cut", "text": "x' and "raw_base64" in result.rejected[2]
    accepted, rejected = save_gate(result, tmp_path / "gate")
    assert len(read_dj(accepted)) == 4 and len(read_dj(rejected)) == 10
    assert gate(str(accepted), root).accepted == result.accepted


def test_every_row_is_accounted_for(root):
    rng, names = random.Random(1), [*GOOD, *DAMAGED, *NO_IMAGE, "gone.jpg", "../secret.jpg", "pipe.jpg"]
    rows = [rng.choice([None, row(i, rng.choice(names)), row(i, rng.choice(names), text=rng.choice([None, "", "a bus"])), row(i % 50, rng.choice(names))])
            for i in range(700)]
    results = [gate(rows, root, threads=n) for n in (1, 4)]
    assert results[0].accepted == results[1].accepted and results[0].rejected == results[1].rejected
    assert [r for r, why, _ in iter_gate(rows, root, batch=7)] == rows


def test_other_settings_of_pillow_do_not_matter_and_stay(root, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "truncated" in reason(row("a", "cut0_good.jpg"), root) and reason(row("a", "good.jpg"), root) == ""
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True and Image.MAX_IMAGE_PIXELS == 10
    assert "bomb" in reason(row("a", "good.jpg"), root, max_pixels=1000) and reason(row("a", "bomb.png"), root, max_pixels=200_000_000) == ""


def test_what_is_no_source(root, tmp_path):
    for source, error in ((tmp_path / "none.jsonl", UserError), (tmp_path, UserError), (row("a", "good.jpg"), TypeError), (b"rows", TypeError)):
        with pytest.raises(error): gate(source, root)
    with pytest.raises(UserError): gate([], tmp_path / "no_folder")
    assert gate([], root).rows == 0


def test_root_behind_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert reason(row("a", "good.jpg"), tmp_path / "link") == "" and "outside" in reason(row("a", "../secret.jpg"), tmp_path / "link")


def test_result_shows_itself_and_is_escaped(root):
    result = gate([row("<script>", "<b>.jpg"), row("a", "good.jpg")], root)
    assert "missing file" in repr(result) and "<script>" not in result._repr_html_()


def test_captions_and_files(tmp_path):
    assert caption_of("<__dj__image>\na <|__dj__eoc|><image>\nb <|__dj__eoc|>") == "a b" and count_images("<image><__dj__image>") == 2
    rows = [row("\u00fc", "a.jpg"), row("x", "b.jpg", note="\ud800")]
    assert read_dj(write_dj(tmp_path / "new" / "rows.jsonl", rows)) == rows
    with pytest.raises(UserError, match="line 1"):
        (tmp_path / "bad.jsonl").write_text("{")
        read_dj(tmp_path / "bad.jsonl")
    (tmp_path / "bad.json").write_text('{"id": 1}')
    with pytest.raises(UserError, match="list"): read_llava(tmp_path / "bad.json")


def test_pictures_as_people_see_them():
    assert open_picture(io.BytesIO(upright())).size == (20, 40)
    for name, data in GOOD.items(): assert open_picture(io.BytesIO(data)).mode == "RGB", name


def test_every_cut_of_a_jpeg_is_found():
    data = picture(size=(24, 24))
    with strict_pillow():
        for at in range(40, len(data) - 1):
            with pytest.raises(Exception, match="truncated"): decode(data[:at])


def moving(format, **kw):
    frames, buffer = [Image.effect_noise((40, 30), 30 * i + 20).convert("RGB") for i in range(3)], io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], **kw)
    return buffer.getvalue()


def turned(how, format):
    im, buffer = Image.new("RGB", (40, 20), "red"), io.BytesIO()
    exif = im.getexif()
    exif[0x112] = how
    im.save(buffer, format, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("name, data, expected", [
    ("big.tiff", picture("TIFF", big_tiff=True), ""), ("group4.tiff", picture("TIFF", mode="1", compression="group4"), ""), ("plain.ppm", b"P3\n2 2\n255\n" + b"255 0 0 " * 4, ""),
    *((f"turned{k}.{f}", turned(k, f), "") for k in (5, 6, 7, 8) for f in ("JPEG", "PNG", "WEBP", "TIFF")), ("two.jpg", picture() + picture(), ""), ("two.mpo", moving("MPO"), ""),
    ("cut.webp", moving("WEBP")[:-900], "truncated"), ("cut.apng", moving("PNG")[:-900], "truncated"),
    ("lost_frame.apng", (lambda d: d[:d.rfind(b"fdAT") + 60] + d[-12:])(moving("PNG")), "truncated"), ("cut.tiff", moving("TIFF")[:-900], "truncated"),
    ("mail.png", picture("PNG").replace(b"\r\n", b"\n"), "not an image"), ("crc.png", (lambda d: d[:60] + bytes([d[60] ^ 255]) + d[61:])(picture("PNG")), "truncated"),
    ("bmw.jpg", b"BMW: a page that begins as a bitmap does", "not an image"), ("p5.jpg", b"P5 is a page", "not an image"),
    ("error.jpg", b"\xef\xbb\xbf\n<!DOCTYPE HTML><html>", "a web page"), ("paper.jpg", b"%PDF-1.7\n", "a PDF"), ("drawing.svg", b"<?xml version='1.0'?><svg/>", "XML"),
    ("phone.jpg", b"\0\0\0\x18ftypheic" + bytes(99), "HEIC"), ("film.jpg", b"\0\0\0\x18ftypmp42" + bytes(99), "a video"), ("icon.ico", picture("ICO"), "not an image"),
    ("lfs.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"), ("zip.jpg", b"PK\x03\x04" + bytes(99), "zip"),
])
def test_files_that_only_look_like_pictures_and_the_other_way_round(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    for whole in (True, False):
        try: seen = look_at(name, Root(tmp_path), whole=whole)
        except Bad as e: assert expected and expected in str(e), e
        else: assert not expected or not whole and expected == "truncated"
    if "turned" in name: assert seen[:2] == (20, 40) and open_picture(tmp_path / name).size == (20, 40)


def test_pictures_as_a_row_may_hold_them(root):
    data = picture()
    plain, urlsafe = b64encode(data).decode(), b64encode(data, b"-_").decode()
    for image in (plain.rstrip("="), urlsafe, urlsafe.rstrip("="), "\n".join(plain[i:i + 76] for i in range(0, len(plain), 76)), f"DATA:image/jpeg;base64,{plain}", f"data:image/jpeg;charset=utf-8;base64,{urlsafe}",
                  {"bytes": plain, "path": None}, {"bytes": data, "path": "x", "width": 40}, {"bytes": None, "path": "good.jpg", "sha": ""}, bytearray(data)):
        assert reason(row("a", image), root) == "", image
    for image, expected in ((plain[:len(plain) // 2 // 4 * 4], "truncated"), (plain[:101], "base64"), ({"bytes": [1, 2], "path": None}, "not a string"), ({}, "not a string"),
                            ("data:image/svg+xml,%3Csvg/%3E", "base64"), (f"data:image/jpeg;base64,{plain[:50]}*{plain[51:]}", "base64")):
        assert expected in reason(row("a", image), root), image


@pytest.mark.parametrize("image, expected", [
    ("line\nbreak.jpg", ""), ("back\\slash.jpg", ""), ("a%20c.jpg", ""), ("chain3.jpg", ""), ("./deep/../deep//er/good.jpg", ""), ("a%20b.jpg", "missing"), ("deep\\er\\good.jpg", "missing"),
    ("file:///good.jpg", "missing"), ("C:/x/good.jpg", "missing"), ("s3://b/k.jpg", "missing"), ("\ufeffgood.jpg", "missing"), (" good.jpg", "missing"), ("chain_out2.jpg", "outside"),
])
def test_odd_paths(root, image, expected):
    for name in ("line\nbreak.jpg", "back\\slash.jpg", "a%20c.jpg"): (root / name).write_bytes(GOOD["good.jpg"])
    for name, to in {"chain1.jpg": "good.jpg", "chain2.jpg": "chain1.jpg", "chain3.jpg": "chain2.jpg", "chain_out1.jpg": "../secret.jpg", "chain_out2.jpg": "chain_out1.jpg"}.items():
        if not (root / name).is_symlink(): (root / name).symlink_to(to)
    assert expected in reason(row("a", image), root) and bool(expected) == bool(reason(row("a", image), root))


@pytest.mark.parametrize("caption", ["\u0301", "\ufe0f", "\u202e\u202c", "\U000e0041", "\u00ad", "\0\0", "\u2800\u3164"])
def test_captions_that_show_nothing(root, caption):
    assert "blank" in reason(row("a", "good.jpg", text=text_of(caption)), root)


# formats

TSV = "a red bus\tgood.jpg\nonly one cell\n\ta.jpg\n"


def packed(path, data):
    "Writes bytes as they are, as .gz or as .zst, by the ending of the path"
    if path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as f: f.write(data)
    else: path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def tar_of(path, **files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_packed_files(root, tmp_path, end):
    rows = [row(i, "good.jpg") for i in range(300)]
    path = packed(tmp_path / f"rows.jsonl{end}", b"\n".join(json.dumps(r).encode() for r in rows))
    assert gate(path, root).accepted == rows
    talk = [{"id": i, "image": "good.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]} for i in range(300)]
    assert list(iter_json(packed(tmp_path / f"talk.json{end}", json.dumps(talk).encode()))) == talk
    if end:
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(UserError, match="cut short"): list(iter_rows(path))


def test_tables(root, tmp_path):
    (tmp_path / "cc3m.tsv").write_text(TSV)
    result = gate(tmp_path / "cc3m.tsv", root)
    assert [(r["id"], caption_of(r["text"]), r["images"]) for r in result.accepted] == [("row0000001", "a red bus", ["good.jpg"])]
    assert result.counts() == {"bad table row": 1, "blank text": 1} and result.rejected[0]["raw"].strip() == "only one cell"
    (tmp_path / "named.tsv").write_text("filepath\ttitle\ngood.png\ta bus\n")
    assert gate(tmp_path / "named.tsv", root).accepted[0]["images"] == ["good.png"]


def test_pictures_inside_rows(root, tmp_path):
    data = picture()
    pq.write_table(pa.Table.from_pylist([{"caption": f"bus {i}", "image": {"bytes": data[:size], "path": "x.jpg"}} for i, size in enumerate((None, 400))]), tmp_path / "s.parquet")
    result = gate(tmp_path / "s.parquet", root)
    assert len(result.accepted) == 1 and "truncated" in result.rejected[0]["reason"] and list(result.pictures.values())[0][:2] == (40, 30)
    accepted, rejected = save_gate(result, tmp_path / "gate")
    assert gate(accepted, root).counts() == {} and gate(rejected, root).counts() == {"truncated or damaged image": 1}, "bytes survive being written"
    tar_of(tmp_path / "s.tar", **{"a.jpg": data, "a.txt": b"a bus", "b.txt": b"no picture", "c.json": b"{", "d.jpg": data, "d.json": b'{"caption": "a sign", "score": 1}'})
    result = gate(tmp_path / "s.tar", root)
    assert [(r["id"], caption_of(r["text"])) for r in result.accepted] == [("a", "a bus"), ("d", "a sign")] and result.accepted[1]["score"] == 1
    assert result.counts() == {"no image": 1, "bad JSON": 1}
    assert gate([row("a", b64encode(data).decode())], root).accepted


@pytest.mark.parametrize("name, data, expected", [
    ("a.xlsx", b"x", "in no format"), ("a.parquet", b"PAR1 no", "not a whole Parquet"), ("a.tar", b"no tar" * 200, "not a whole tar"),
    ("a.json", b'[{"id": 1},\n{"id": ]', "line 2"), ("a.json", b"\xff\xfe", "not UTF-8"), ("a.json", b'{"a": [1]}', "a list of rows"), ("a.jsonl.gz", b"no gz", "cut short"),
    ("a.jsonl.zst", b"no zst", "cut short"),
])
def test_broken_files_are_one_message(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=expected): list(iter_rows(tmp_path / name))


@pytest.mark.parametrize("name, data, captions, reasons", [
    ("a.tsv", b"caption\tcaption\timage\na\tb\tgood.jpg\n", None, "two columns named 'caption'"), ("a.csv", b"Image,image,caption\ngood.jpg,x.jpg,a bus\n", None, "two columns named 'image'"),
    ("b.csv", b"Image, Caption \r\ngood.jpg,a bus\r\n\r\n,,\r\n", ["a bus"], []), ("b.tsv", b"\xef\xbb\xbfCaption\tTEXT\tfilename\na bus\tb\tgood.jpg\n", ["a bus"], []),
    ("flickr.csv", b"image_name| comment_number| comment\ngood.jpg| 0| A bus , red .\n", ["A bus , red ."], []), ("nul.csv", b"caption,image\na\0bus,good.jpg\n", ["a\0bus"], []),
    ("picture.csv", b"caption,image\na bus," + b64encode(picture(size=(600, 500))) + b"\n", ["a bus"], []), ("utf16.tsv", "caption\timage\na\tgood.jpg\n".encode("utf-16"), [], ["not UTF-8", "unreadable file", "bad table row"]),
    ("names.jsonl", b'{"id": 1, "caption": "a bus", "image": "good.jpg"}\n{"file_name": "good.jpg", "caption": "a car"}\n{"image_id": "1", "text": "x", "image": "good.jpg"}\n', ["a bus", "a car"], ["duplicate id"]),
    ("same.jsonl", b"".join(b'{"id": %s, "text": "<image> a", "images": ["good.jpg"]}\n' % i for i in (b"1", b'"1"', b"1.0", b'"\\u0031"', b'"\\u00e9"', b'"e\\u0301"')), ["a", "a", "a"], ["duplicate id", "odd id", "duplicate id"]),
    ("utf16.jsonl", '{"id": 1}\n'.encode("utf-16"), [], ["not UTF-8", "bad JSON"]), ("utf16.json", "[]".encode("utf-16"), None, "not UTF-8"), ("lines.json", b'{"id": 1}\n{"id": 2}\n', None, "named .jsonl"),
    ("two.jsonl.gz", gzip.compress(b'{"id": 1, "caption": "a", "image": "good.jpg"}\n', mtime=0) + gzip.compress(b'{"id": 2, "caption": "b", "image": "good.jpg"}\n', mtime=0) + bytes(9), ["a", "b"], []),
    ("LOUD.JSONL.GZ", gzip.compress(b'{"id": 1, "caption": "a", "image": "good.jpg"}\n', mtime=0), ["a"], []), ("junk.jsonl.gz", gzip.compress(b"{}\n", mtime=0) + b"junk", None, "damaged"),
    ("two.jsonl.zst", pa.compress(b"{}\n", codec="zstd", asbytes=True) * 2, [], ["no id"] * 2), ("junk.jsonl.zst", pa.compress(b"{}\n", codec="zstd", asbytes=True) + b"junk", None, "damaged"),
])
def test_odd_tables_and_lines(root, tmp_path, name, data, captions, reasons):
    (tmp_path / name).write_bytes(data)
    if captions is None:
        with pytest.raises(UserError, match=reasons): gate(tmp_path / name, root)
        return
    result, found = gate(tmp_path / name, root), explore(tmp_path / name, root, "shape", workers=1)
    assert [caption_of(r["text"]) for r in result.accepted] == captions and [r["reason"].split(":")[0] for r in result.rejected] == reasons
    assert (found.rows, found.accepted, dict(found.reasons)) == (result.rows, len(captions), result.counts())


def test_odd_columns_of_parquet(root, tmp_path):
    data, path = picture(), tmp_path / "a.parquet"
    def read(*columns, **named):
        pq.write_table(pa.Table.from_arrays(*columns) if columns else pa.table(named), path)
        result = gate(path, root)
        assert count_parquet(path) == result.rows == len(result.accepted) + len(result.rejected)
        return [caption_of(r["text"]) for r in result.accepted], [r["reason"].split(":")[0] for r in result.rejected]
    two = ["good.jpg"] * 2
    assert read(caption=pa.array(["a", "b"]).dictionary_encode(), image=pa.array(["good.jpg", "gone.jpg"]).dictionary_encode()) == (["a"], ["missing file"])
    assert read(caption=pa.array(["a"], pa.string_view()), image=pa.array([data], pa.binary_view())) == (["a"], [])
    assert read(id=pa.array(["a", "b"], pa.large_string()), text=pa.array([text_of("a"), None]), images=pa.array([two[:1], None], pa.large_list(pa.large_string()))) == (["a"], ["null text"])
    assert read(id=pa.array([0], pa.timestamp("ns", tz="UTC")), caption=["a"], image=two[:1], map=pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), raw_base64=[b"\xff\0"]) == (["a"], [])
    assert read(caption=["a"] * 4, image=[{"bytes": data, "path": None}, {"bytes": None, "path": "good.jpg"}, {"bytes": None, "path": None}, None]) == (["a", "a"], ["image path is not a string", "no image"])
    assert read(caption=[["a", "b"], []], image=two) == ([], ["text is not a string"] * 2) and read(caption=pa.nulls(2), image=two) == ([], ["null text"] * 2)
    assert read(caption=pa.array([b"a", b"\xff", b"b"]).view(pa.string()), image=two + two[:1]) == (["a", "b"], ["not UTF-8"])
    assert read(id=pa.array([2**63, 1], pa.uint64()), caption=["a", "b"], image=two) == (["a", "b"], []) and read(caption=pa.array([], pa.string())) == ([], [])
    with pytest.raises(UserError, match="two columns named 'caption'"): read([pa.array(["a"])] * 2, ["caption", "caption"])


def test_odd_members_of_a_shard(root, tmp_path):
    data = picture()
    def read(*members, name="a.tar", mode="w"):
        with tarfile.open(tmp_path / name, mode) as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                if isinstance(content, tuple): info.type, info.linkname = content
                else: info.size = len(content)
                tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
        result = gate(tmp_path / name, root)
        assert result.rows == len(result.accepted) + len(result.rejected)
        return [(r["id"], caption_of(r["text"]), len(r["images"])) for r in result.accepted], [r["reason"].split(":")[0] for r in result.rejected]
    a = ("a.jpg", data), ("a.txt", b"\xef\xbb\xbfa bus\r\n")
    assert read(*a, name="a.tgz", mode="w:gz") == ([("a", "a bus", 1)], [])
    assert read(("../../e.jpg", data), ("../../e.txt", b"a"), ("/etc/f.jpg", data), ("/etc/f.txt", b"b")) == ([("../../e", "a", 1), ("/etc/f", "b", 1)], []) and not (tmp_path.parent / "e.jpg").exists()
    assert read(*a, ("b.jpg", (tarfile.LNKTYPE, "a.jpg")), ("b.txt", b"b"), ("c.jpg", (tarfile.SYMTYPE, "/etc/passwd")), ("c.txt", b"c")) == ([("a", "a bus", 1)], ["member is no plain file"] * 2)
    assert read(*a, ("a.npy", b"x"), ("a.mp3", b"x"), ("a.mask.png", data), ("._a.jpg", b"\0\5"), (".DS_Store", b"x"), ("d", (tarfile.DIRTYPE, ""))) == ([("a", "a bus", 1)], [])
    assert read(("a.jpg", b""), ("a.txt", b"a"), ("b.jpg", data), ("b.txt", b""), ("c.jpg", data), ("c.jpg", data), ("c.txt", b"c"), ("d.heic", b"no picture"), ("d.txt", b"d")) == (
        [], ["empty file", "blank text", "member is there twice", "not an image"])
    assert read(("x" * 200 + "/\u00e9\n.jpg", data), ("x" * 200 + "/\u00e9\n.json", b'\xef\xbb\xbf{"caption": "a"}')) == ([("x" * 200 + "/\u00e9\n", "a", 1)], []) and read() == ([], [])


@pytest.mark.parametrize("write", [lambda p, k: p.with_suffix(".tsv").write_text(f"bus {k}\tgood.jpg\n"), lambda p, k: p.with_suffix(".jsonl").write_text(json.dumps({"caption": f"bus {k}", "image": "good.jpg"})),
                                   lambda p, k: pq.write_table(pa.table({"caption": [f"bus {k}"], "image": ["good.jpg"]}), p.with_suffix(".parquet"))])
def test_rows_without_ids_get_one_in_every_shard(root, tmp_path, write):
    for k in range(3): write(tmp_path / f"part{k}", k)
    result, found = gate(tmp_path, root), explore(tmp_path, root, "shape", workers=1, folder=tmp_path / "out")
    assert [r["id"] for r in result.accepted] == ["row0000001", "row0000001.1", "row0000001.2"] == pq.read_table(tmp_path / "out" / "rows.parquet")["id"].to_pylist() and found.accepted == 3


def test_shards_of_a_folder(root, tmp_path):
    for k in range(3): write_dj(tmp_path / f"part{k}.jsonl", [row(f"{k}{i}", "good.jpg") for i in range(3)])
    assert len(gate(tmp_path, root).accepted) == 9
    write_parquet(tmp_path / "out" / "a.parquet", gate(tmp_path, root).accepted)
    assert gate(tmp_path / "out", root).accepted == gate(tmp_path, root).accepted
    talk = [{"id": "00", "image": "x.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "old"}]}]
    back = read_llava(write_llava(tmp_path / "talk.json", gate(tmp_path, root).accepted, talk))
    assert len(back) == 9 and back[0]["conversations"][0]["value"] == "<image>\nWhat?" and back[0]["conversations"][1]["value"] == "a bus"


def test_header_says_what_the_whole_file_says():
    with strict_pillow():
        for name, data in GOOD.items(): assert header(data)[:5] == decode(data)[:5], name


def test_pages_and_ends(tmp_path):
    "A later page cut short is found; what follows a GIF's end is nobody's loss; a bomb in a text chunk is refused."
    im = Image.effect_noise((40, 30), 60).convert("RGB")
    def saved(format, **kw):
        buffer = io.BytesIO()
        im.save(buffer, format, **kw)
        return buffer.getvalue()
    pages, gif = saved("TIFF", save_all=True, append_images=[im]), saved("GIF")
    for data in (pages, gif, gif + b"x" * 3000): decode(data)
    for data in (pages[:-200], gif[:-1], saved("MPO", save_all=True, append_images=[im])[:-20]):
        with pytest.raises(Bad, match="truncated"): decode(data)


@pytest.mark.parametrize("name, text, n", [
    ("two.json", '[{"id": 1}] [{"id": 2}]', 1), ("more.json", '{"data": [{"id": 1}], "note": {}} x', 1), ("none.json", "{}", 0)])
def test_nothing_is_left_unread_after_a_list(tmp_path, name, text, n):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError): list(iter_json(tmp_path / name))


def test_lines_and_values_have_a_greatest_length(tmp_path, monkeypatch):
    monkeypatch.setattr("blip2mgm.formats.LONGEST", 1000)
    (tmp_path / "a.jsonl").write_text('{"id": "a"}\n{"id": "' + "x" * 5000 + '"}\n\n{"id": "b"}')
    rows = list(iter_rows(tmp_path / "a.jsonl"))
    assert [problem.split(":")[0] for _, problem in rows] == ["", "line too long", ""] and len(rows[1][0]["raw"]) < 1100


def test_numbers_without_end_are_no_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "n": 1e999}\n{"id": "b", "n": 1e300}')
    assert [bool(problem) for _, problem in iter_rows(tmp_path / "a.jsonl")] == [True, False]


def test_values_of_a_table_as_json_knows_them(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    table = {"id": ["a"], "text": [text_of("a bus")], "images": [["a.png"]], "score": [float("nan")], "when": pa.array([0], pa.timestamp("s"))}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    [row] = gate(tmp_path / "a.parquet", tmp_path).accepted
    assert row["score"] is None and row["when"].startswith("1970-01-01")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match="whole Parquet"): count_parquet(tmp_path / "cut.parquet")


def test_plain_rows_say_what_the_strict_reader_says():
    "Arrow may only be quicker: whatever it takes, the strict reader takes too, and reads the same in it."
    rng = random.Random(0)
    pieces = ['{', '}', '[', ']', '"', ':', ',', '"id"', '"text"', '"images"', '"a"', '"a.jpg"', ': "b"', 'null', 'NaN', '1', '1e999', ' ', '\\u0041', '\\ud800', 'é', '\x01']
    good = '{"id": "a", "text": "a bus", "images": ["a.jpg"]}'
    def broken():
        line = list(good)
        for _ in range(rng.randrange(4)): line[(at := rng.randrange(len(line))):at + rng.randrange(2)] = rng.choice(pieces)
        return "".join(line).strip().encode() or b"{"
    lines = [broken() for _ in range(800)]
    found = plain_rows(as_lines(lines), least=1)
    for line, row in zip(lines, found):
        if row: assert parse_line(line, 1)[0] is not None and tuple(parse_line(line, 1)[0].get(k) for k in ("id", "text", "images")) == row
    assert sum(map(bool, found)) > 100
    for value in ("NaN", "-Infinity", '{"a": NaN}', "[NaN]"):
        for name in ("id", "text", "images", "more"):
            odd = json.dumps({"id": "a", "text": "b", "images": ["c"], "more": 1} | {name: 0}).replace(": 0", f": {value}")
            assert plain_rows(as_lines([odd.encode()])) == [None], odd


def test_lines_are_counted_as_they_are_read(tmp_path):
    rng = random.Random(5)
    for size in (0, 1, 7, 200, 5000):
        text = b"".join(rng.choices([b"\n", b"\r\n", b" ", b"\t", b"{}", b"\xef\xbb\xbf", b"abc", b"\x0c"], k=size))
        (tmp_path / "a.jsonl").write_bytes(text)
        plain = [(n, line.strip(b" \t\r\n")) for n, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1) if line.strip(b" \t\r\n")]
        assert list(numbered_lines(tmp_path / "a.jsonl")) == plain and count_lines(tmp_path / "a.jsonl") == len(plain)
        cut = [rows for rows, _ in batches(tmp_path / "a.jsonl", size=3, room=40)]
        assert [item for rows in cut for item in zip(rows.numbers.tolist(), rows)] == plain and [rows[i] for rows in cut for i in range(len(rows))] == [line for _, line in plain]


def test_the_short_way_through_a_jpeg_says_what_pillow_says():
    rng = random.Random(6)
    for mode in ("L", "RGB"):
        buffer = io.BytesIO()
        Image.radial_gradient("L").resize((70, 50)).convert(mode).save(buffer, "JPEG", comment="a bus", progressive=mode == "L")
        whole = buffer.getvalue()
        assert _plain_jpeg(whole, len(whole))[:5] == (70, 50, "JPEG", mode, len(whole))
        for _ in range(600):
            data = bytearray(whole[:rng.choice([len(whole), rng.randrange(4, len(whole))])])
            for _ in range(rng.randrange(3)): data[rng.randrange(2, min(700, len(data)))] = rng.randrange(256)
            if found := _plain_jpeg(bytes(data), len(data)):
                with Image.open(io.BytesIO(bytes(data))) as im: assert found[:4] == (*im.size, "JPEG", im.mode)
