"""What goes wrong, and what is then said: a table of bad inputs, each with its one message. `python tests/test_errors.py` writes docs/errors.md."""
import base64
import errno
import io
import json
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from blip2mgm import cli, core
from blip2mgm.core import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[1]
CASES = []


def case(kind, what, *words, status=2):
    "A bad input: a function of an empty folder that gives a command line, or does what fails; `words` must be in the message"
    def keep(f):
        CASES.append(SimpleNamespace(kind=kind, what=what, words=words, do=f, status=status))
        return f
    return keep


def profile(tmp, **files):
    "The command that checks a profile with these parameter files"
    for stage, text in files.items(): core.write_text(tmp / "p" / f"{stage}.yaml", text)
    return ["check", str(tmp / "p")]


def parameter(what, stage, text, *words):
    case("parameters", what, f"{stage}.yaml", *words)(lambda tmp: profile(tmp, **{stage: text}))


def file(tmp, name, content):
    path = tmp / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Parameters
parameter("a parameter that does not exist", "explore", "sampel: 3", 'unknown parameter "sampel"', 'did you mean "sample"')
parameter("text where a number is wanted", "explore", "sample: many", "parameter sample expects int, got 'many'")
parameter("a number that YAML reads as text", "train", "lora_lr: 3e-4", "write 3.0e-4")
parameter("yes where a number is wanted", "explore", "sample: true", "expects int, got True")
parameter("a fraction where a whole number is wanted", "train", "seeds: 2.5", "expects int, got 2.5")
parameter("a number that is none", "train", "clip_norm: .nan", "expects float, got nan")
parameter("an infinite number", "train", "clip_norm: .inf", "expects float, got inf")
parameter("one word where a list is wanted", "train", "arms: raw", "parameter arms expects list")
parameter("a list with something else in it", "train", "arms: [raw, 3]", "parameter arms expects str, got 3")
parameter("nothing where a value is wanted", "explore", "depth:", "parameter depth expects str")
parameter("a key that is written twice", "train", "seeds: 2\nseeds: 3", "the key seeds is written twice")
parameter("a file that is no YAML", "train", "seeds: [1, 2", "is not proper YAML: line 1")
parameter("a list instead of lines `name: value`", "train", "- seeds", "must hold lines like `name: value`")
parameter("Python objects in YAML", "train", "seeds: !!python/object/apply:os.system ['true']", "is not proper YAML")
parameter("a negative sample", "explore", "sample: -1", "sample cannot be below 0, and is -1")
parameter("a depth that does not exist", "explore", "depth: deep", "depth must be one of full, shape, text")
parameter("a share of more than all", "enhance", "mix: 1.5", "mix is a share between 0 and 1, not 1.5")
parameter("no worker", "enhance", "workers: 0", "workers must be at least 1, not 0")
parameter("an arm that does not exist", "enhance", "arms: [raw, blip2_filterd]", 'did you mean "blip2_filtered"')
parameter("a learning rate below nothing", "train", "stage1_lr: -1.0", "stage1_lr must be greater than 0, not -1.0")
parameter("all inputs dropped", "train", "lora_dropout: 1.0", "lora_dropout must be from 0 to below 1")
parameter("an arm named twice", "train", "arms: [raw, raw]", "each once")
parameter("a schedule that does not exist", "train", "schedule: cosin", "schedule must be one of cosine")
parameter("a precision that does not exist", "train", "precision: int8", "precision must be one of fp32")
parameter("an adapter that does not exist", "train", "adapter: loraa", "adapter must be one of lora")
parameter("patience without anything to look at", "train", "patience: 2", "set held_out as well")
parameter("a DeepSpeed file that is not there", "train", "deepspeed: params/deepspeed/zero9.json", "zero9.json")
parameter("DeepSpeed without the feature cache", "train", "deepspeed: params/deepspeed/zero2.json\nfeature_cache: false", "deepspeed needs feature_cache")
parameter("DeepSpeed with fp16", "train", "deepspeed: params/deepspeed/zero2.json\nprecision: fp16", "take bf16 or fp32")
parameter("a benchmark that does not exist", "evaluate", "tasks: [textvq]", 'did you mean "textvqa"')
parameter("no question at all", "evaluate", "tasks: []", "must each name at least one")
parameter("a level that is none", "report", "level: 0.3", "level must be at least 0.5 and below 1")
parameter("two noises of three", "report", "noise: [0.1, 0.2]", "noise must be empty or three numbers")
parameter("an arm compared with itself", "report", "base: raw\narm: raw", "three different arms")


@case("parameters", "a parameter file in another encoding", "explore.yaml", "cannot read the parameter file", "save it as UTF-8")
def _(tmp):
    file(tmp, "p/explore.yaml", b"run: z\xfcrich")
    return ["check", str(tmp / "p")]


@case("parameters", "a file that belongs to no stage", "trian.yaml belongs to no stage", 'did you mean "train"')
def _(tmp): return profile(tmp, trian="")


@case("parameters", "a profile that does not exist", "there is no profile demmo", 'did you mean "demo"')
def _(tmp): return ["run", "demmo"]


@case("parameters", "a profile without files", "holds no parameter files", "copy params/demo")
def _(tmp):
    (tmp / "p").mkdir()
    return ["run", str(tmp / "p")]


@case("parameters", "stages that disagree about the run folder", "disagree about run: explore says runs/a, enhance says runs/b")
def _(tmp): return profile(tmp, explore="run: runs/a", enhance="run: runs/b")


@case("parameters", "stages that disagree about the data", "disagree about data")
def _(tmp): return profile(tmp, explore="data: pictures/smoke", enhance="data: pictures/demo")


@case("parameters", "a stage whose earlier stage is left out", "evaluate builds on train, and there is no", "train.yaml")
def _(tmp): return profile(tmp, evaluate="")


@case("parameters", "a benchmark for the verdict that nobody is asked", 'endpoint is "textvqa"', "not among the tasks of evaluate", 'choose from: gqa')
def _(tmp): return profile(tmp, explore="", enhance="", train="", evaluate="tasks: [gqa]", report="")


@case("parameters", "an arm that is asked and never trained", 'evaluate asks for the arm "random", which train does not make')
def _(tmp): return profile(tmp, explore="", enhance="", train="arms: [raw, blip2_filtered]", evaluate="arms: [raw, blip2_filtered, random]", report="")


@case("parameters", "more seeds asked than trained", "evaluate asks for 3 seeds, and train trains 2")
def _(tmp): return profile(tmp, explore="", enhance="", train="", evaluate="seeds: 3", report="")


@case("parameters", "a stage that the profile does not have", "this profile has no stage trian", 'did you mean "train"')
def _(tmp): return ["run", "demo", "--only", "trian"]


@case("parameters", "one stage before the one that it needs", "evaluate needs the result of train", "not finished")
def _(tmp): return ["run", "demo", "--run", str(tmp / "r"), "--only", "evaluate"]


# Data
@case("data", "a picture world that does not exist", 'there is no picture world "demmo"', 'did you mean "demo"')
def _(tmp): return profile(tmp, explore="data: pictures/demmo")


@case("data", "a data folder that is not there", "the data folder", "nowhere is not there", "blip2mgm init PATH makes one")
def _(tmp): return profile(tmp, explore=f"data: {tmp}/nowhere")


@case("data", "a data folder without captions", "holds no captions.jsonl", "the parameter captions")
def _(tmp):
    (tmp / "d").mkdir()
    return profile(tmp, explore=f"data: {tmp}/d")


@case("data", "a data folder without instructions and questions", "holds no instructions.json", "holds no questions of textvqa")
def _(tmp):
    file(tmp, "d/captions.jsonl", "")
    return profile(tmp, **{s: f"data: {tmp}/d\n" for s in ("explore", "enhance", "train", "evaluate")})


def explore(what, name, content, *words):
    case("files", what, *words)(lambda tmp: ["explore", str(file(tmp, name, content))])


@case("files", "a file that is not there", "captions.jsonl is not there", "give a file or a folder of shards")
def _(tmp): return ["explore", str(tmp / "captions.jsonl")]


explore("a format that is not read", "captions.xlsx", b"PK", "captions.xlsx is in no format that is read here", ".csv")
explore("broken JSON", "captions.json", '[{"id": 1},\n {"id": }]', "captions.json", "line 2", "repair the file there")
explore("JSON that ends too soon", "captions.json", '[{"id": 1}', "captions.json", "the end of the file")
explore("JSON that is no list of rows", "captions.json", '{"info": 1}', "captions.json", "a list of rows is expected")
explore("a number that JSON does not know", "captions.json", '[{"id": NaN}]', "captions.json", "NaN is not JSON")
explore("JSON in another encoding", "captions.json", '[{"id": "ü"}]'.encode("latin-1"), "captions.json is not UTF-8")
explore("gzip cut short", "captions.jsonl.gz", __import__("gzip").compress(b'{"id": "a"}\n' * 99)[:-12], "captions.jsonl.gz is damaged or cut short", "fetch it again")
explore("something else under the name of gzip", "captions.jsonl.gz", b"no gzip", "is damaged or cut short", "fetch it again")
explore("something else under the name of zstandard", "captions.jsonl.zst", b"no zstandard at all", "is damaged or cut short", "fetch it again")
explore("something else under the name of Parquet", "captions.parquet", b"PAR1 is how it begins", "is not a whole Parquet file")
explore("something else under the name of tar", "shard.tar", b"no tar" * 200, "is not a whole tar file")


@case("files", "a folder without a file that is read", "holds no file that is read here")
def _(tmp):
    file(tmp, "d/notes.md", "hello")
    return ["explore", str(tmp / "d")]


@case("files", "a folder of pictures that is not there", "the data root", "is not a folder")
def _(tmp): return ["explore", str(file(tmp, "a.jsonl", "{}")), "--root", str(tmp / "pictures")]


# Pictures of one's own
@case("files", "init: a folder that is not there", "photos is not there", "give a folder of pictures with captions")
def _(tmp): return ["init", str(tmp / "photos")]


@case("files", "init: a folder without pictures or captions", "holds neither pictures", "nor a file with captions")
def _(tmp):
    (tmp / "photos").mkdir()
    return ["init", str(tmp / "photos")]


@case("files", "init: several files that may be the captions", "one.csv, two.csv", "name one with --captions")
def _(tmp):
    for name in ("one", "two"): file(tmp, f"photos/{name}.csv", "file,caption\n")
    return ["init", str(tmp / "photos")]


@case("files", "init: a captions file that is not there", "there is no file captoins.csv", "captions.csv")
def _(tmp):
    file(tmp, "photos/captions.csv", "file,caption\n")
    return ["init", str(tmp / "photos"), "--captions", "captoins.csv"]


@case("files", "init: pictures that are somewhere else", "missing file: 'a.jpg'", "--root")
def _(tmp):
    file(tmp, "photos/captions.csv", "file,caption\na.jpg,a bus\n")
    return ["init", str(tmp / "photos"), "--to", str(tmp / "mine")]


@case("files", "init: pictures without captions", "no caption: a.txt is not there")
def _(tmp):
    file(tmp, "photos/a.jpg", PIXEL)
    return ["init", str(tmp / "photos"), "--to", str(tmp / "mine")]


@case("files", "init: too few pictures", "1 usable pictures with captions are too few", "16 and 8 are needed")
def _(tmp):
    file(tmp, "photos/a.png", PIXEL), file(tmp, "photos/a.txt", "a red dot")
    return ["init", str(tmp / "photos"), "--to", str(tmp / "mine")]


@case("files", "init: a profile that is there already", "is there already", "--to")
def _(tmp):
    file(tmp, "photos/a.png", PIXEL), file(tmp, "mine/explore.yaml", "")
    return ["init", str(tmp / "photos"), "--to", str(tmp / "mine")]


@case("files", "init: nearly all pictures held out", "share of pictures held out is 0.9", "from 0.05 to 0.5")
def _(tmp):
    file(tmp, "photos/a.png", PIXEL)
    return ["init", str(tmp / "photos"), "--held-out", "0.9"]


# Questions
from PIL import Image  # noqa: E402

Image.new("RGB", (8, 8), "red").save(_out := io.BytesIO(), "PNG")
PIXEL = _out.getvalue()
CELL = base64.b64encode(PIXEL).decode()


def ask(tmp, task, model="nowhere"): return ["evaluate", str(model), "--tasks", task, "--data", str(tmp / "d"), "--out", str(tmp / "out")]


def question(what, task, name, content, *words):
    case("data", what, *words)(lambda tmp: (file(tmp, f"d/{name}", content), ask(tmp, task))[1])


question("TextVQA's words of an OCR system not there", "textvqa", "textvqa/TextVQA_0.5.1_val.json", '{"data": []}', "TextVQA_Rosetta_OCR_v0.2_val.json is missing")
question("TextVQA's file with something else in it", "textvqa", "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", "[1]", 'has no list "data"')
question("MMBench's file not there", "mmbench", "x", "", "mmbench_dev_20230712.tsv is missing")
question("MMBench without a column", "mmbench", "mmbench/mmbench_dev_20230712.tsv", f"index\tquestion\tA\tB\timage\n1\twhat?\tx\ty\t{CELL}\n", "has no column answer")
question("MMBench with a picture that is none", "mmbench", "mmbench/mmbench_dev_20230712.tsv", "index\tquestion\tA\tB\tanswer\timage\n1\twhat?\tx\ty\tA\t~~~\n", "a picture cannot be read")
question("MMBench without a row", "mmbench", "mmbench/mmbench_dev_20230712.tsv", "index\tquestion\tA\tB\tanswer\timage\n", "mmbench has no questions")
question("VQAv2's file not there", "vqav2", "x", "", "VQAv2 is read from its questions and annotations")
question("a question of GQA without its answer", "gqa", "gqa/testdev_balanced_questions.json", '{"1": {"question": "what?", "imageId": "a"}}', "a question lacks 'answer'")
question("a picture of GQA that is not there", "gqa", "gqa/testdev_balanced_questions.json", '{"1": {"question": "what?", "imageId": "a", "answer": "x"}}', "1 pictures are missing", "a.jpg")
question("a picture's name that leads out of the data folder", "gqa", "gqa/testdev_balanced_questions.json", '{"1": {"question": "what?", "imageId": "../../../etc/hostname", "answer": "x"}}', "leads out of its data folder")
question("questions that are no JSON", "gqa", "gqa/testdev_balanced_questions.json", "{", "is not proper JSON")


@case("data", "a benchmark named on the command line that does not exist", "unknown task 'textvq'", "there is textvqa")
def _(tmp):
    (tmp / "d").mkdir()
    return ask(tmp, "textvq")


# Models
def good(tmp): return file(tmp, "d/mmbench/mmbench_dev_20230712.tsv", f"index\tquestion\tA\tB\tanswer\timage\n1\twhat?\tx\ty\tA\t{CELL}\n")


def model(what, files, *words, extra=()):
    @case("models", what, *words)
    def _(tmp):
        good(tmp), (tmp / "m").mkdir()
        for name, content in files.items(): file(tmp, f"m/{name}", content)
        return [*ask(tmp, "mmbench", tmp / "m"), *extra]


@case("models", "a model folder that is not there", "there is no model folder nowhere", "owner/name")
def _(tmp):
    good(tmp)
    return ask(tmp, "mmbench")


model("a folder that holds no model", {"a.txt": ""}, "holds neither adapter_config.json nor config.json")
model("an MGM without a tokenizer", {"config.json": '{"model_type": "mgm_gemma"}'}, "holds no tokenizer", "copy it from the model's base")
@case("models", "weights in a pickle file", "no safetensors weights in m", "pytorch_model.bin is a pickle file", "convert it")
def _(tmp):
    from blip2mgm.published import read_original
    file(tmp, "m/pytorch_model.bin", b"\x80")
    read_original(tmp / "m")


model("a model of another kind", {"config.json": '{"model_type": "bert"}'}, "cannot be opened as an image-text-to-text model")
model("a config that is no JSON", {"config.json": "{"}, "config.json is not proper JSON")
model("an MGM in four bits", {"config.json": '{"model_type": "mgm_gemma"}'}, "is not loaded in 4 bits", extra=("--bits", "4"))


@case("models", "an adapter folder that is not there", "runs/x/train/raw/seed0", "adapter")
def _(tmp): return ["check-adapter", "runs/x/train/raw/seed0"]


@case("models", "an adapter without its config", "holds no", "config.json")
def _(tmp):
    file(tmp, "a/adapter_model.safetensors", b"")
    return ["check-adapter", str(tmp / "a")]


@case("models", "a captioning model that is none", "m cannot be used as a captioning model")
def _(tmp):
    file(tmp, "m/config.json", '{"model_type": "bert"}')
    from blip2mgm.speaker import load_model
    load_model(tmp / "m")


@case("models", "the captioner's folder not there", "enhance.yaml", "models/none is not there", "hub id such as Salesforce/blip2-opt-2.7b")
def _(tmp): return profile(tmp, enhance="captioner: models/none")


@case("models", "a model to train without its parts", "train.yaml", "holds no gemma, clip, convnext", "safetensors")
def _(tmp): return profile(tmp, enhance="", train="model: models/none")


@case("models", "a captioner of another kind", "enhance.yaml", "is a bert model, not one of blip-2")
def _(tmp):
    file(tmp, "m/config.json", '{"model_type": "bert"}')
    return profile(tmp, enhance=f"captioner: {tmp}/m")


@case("models", "a model to train with a part of another kind", "train.yaml", "m/gemma is a llama model, not a gemma")
def _(tmp):
    for part, kind in (("gemma", "llama"), ("clip", "clip_vision_model"), ("convnext", "convnext")): file(tmp, f"m/{part}/config.json", json.dumps({"model_type": kind}))
    return profile(tmp, enhance="", train=f"model: {tmp}/m")


@case("models", "a recipe that is not there", "recipe params/recipes/none.yaml", "No such file")
def _(tmp): return profile(tmp, enhance="recipe: params/recipes/none.yaml")


@case("models", "a recipe without operators", "needs `process:`, a list of operators")
def _(tmp):
    file(tmp, "r.yaml", "np: 2")
    return profile(tmp, enhance=f"recipe: {tmp}/r.yaml")


# Environment
@case("environment", "two runs in one folder", "another `blip2mgm run` is at work", "wait for it or stop it")
def _(tmp):
    from blip2mgm.runner import only_one
    with only_one(tmp / "r"), only_one(tmp / "r"): pass


@case("environment", "two notebooks at work on one stage", "another process is at work in", "a notebook's kernel counts")
def _(tmp):
    import fcntl
    from blip2mgm.stage import hold
    with open(tmp / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        hold(tmp)


@case("environment", "a file where the run folder should be", "a folder is needed where a file is", "--run")
def _(tmp): return ["run", "smoke", "--run", str(file(tmp, "r", ""))]


@case("environment", "a full disk", "the disk is full", "what was complete is kept")
def _(tmp):
    with open("/dev/full", "w") as f: f.write("x" * 10000)


def told(what, error, *words): case("environment", what, *words)(lambda tmp: throw(error))


def throw(error): raise error


told("a file system that is read-only", OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/runs/x"), "cannot write in /data/runs/x", "read-only", "--run")
told("no permission", PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/runs/x"), "no permission to read or write in /data/runs/x", "change its owner or mode")
told("a quota used up", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/data/x"), "the disk is full in /data/x")
told("too many open files", OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n")
told("no network", ConnectionError("HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded with url: /x"), "there is no network", "params/offline")


@case("environment", "a package that is not installed", "the package no_such_package is not installed in", "pip install -r requirements.txt")
def _(tmp): import no_such_package.part  # noqa: F401


@case("environment", "the memory of the GPU used up", "memory of the GPU is used up", "halve micro_batch", "params/24gb")
def _(tmp):
    import torch
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB")


@case("environment", "the memory used up", "the memory is used up", "fewer workers")
def _(tmp): bytearray(1 << 60)


@case("environment", "a run without its enhancement", "lineage.parquet is missing", "blip2mgm run makes it")
def _(tmp): return ["trace", "c000001", "--run", str(tmp)]


@case("environment", "one run to compare", "name two runs or more")
def _(tmp): return ["compare", "runs/one"]


@case("environment", "a folder to remove that no run has made", "does not look like a run folder", "left alone")
def _(tmp): return ["clean", "demo", "--run", str(tmp), "--yes"]


@case("environment", "nothing to remove", "is not there: nothing to remove")
def _(tmp): return ["clean", "demo", "--run", str(tmp / "none"), "--yes"]


def outcome(c, tmp, debug=False):
    "Exit status and what is said of a case"
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
        try:
            argv = c.do(tmp)
            status = cli.main([*argv, *["--debug"] * debug]) if argv else None
        except Exception as e: status = cli._tell(e, False)
    return status, re.sub(r".*\r", "", err.getvalue())  # a progress line removes itself


@pytest.mark.parametrize("c", CASES, ids=lambda c: f"{c.kind}: {c.what}")
def test_one_message_that_says_what_where_and_what_to_do(c, tmp_path):
    status, said = outcome(c, tmp_path)
    assert status == c.status, said
    assert said.startswith("blip2mgm: ") and said.count("blip2mgm: ") == 1 and said.strip() == said.strip("\n")
    assert "Traceback" not in said and "should not happen" not in said and 'File "' not in said
    assert [w for w in c.words if w not in said] == [], said


def test_there_are_many_and_each_is_another():
    assert len(CASES) >= 60 and len({c.what for c in CASES}) == len(CASES)
    assert {c.kind for c in CASES} == {"parameters", "files", "data", "models", "environment"}


def test_a_traceback_is_shown_when_asked_for(tmp_path):
    c = next(c for c in CASES if c.what == "a parameter that does not exist")
    with pytest.raises(ConfigError): cli.main([*c.do(tmp_path), "--debug"])


def test_a_bug_says_that_it_is_one(capsys, monkeypatch):
    monkeypatch.setattr(cli, "profile_table", lambda: 1 / 0)
    assert cli.main(["list"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and "should not happen; --debug" in err and "Traceback" not in err


def page():
    "docs/errors.md: the table as it is today"
    import tempfile
    lines = ["# What goes wrong, and what is then said", "",
             "Every line below is tried by the tests (`tests/test_errors.py`, which also writes this page). A message names the thing, says where it is and what to do; "
             "with `--debug` the whole traceback is shown. In the messages, FOLDER stands for the folder it was tried in.", ""]
    for kind in dict.fromkeys(c.kind for c in CASES):
        lines += [f"## {kind.title()}", "", "| what | message |", "|---|---|"]
        for c in (c for c in CASES if c.kind == kind):
            with tempfile.TemporaryDirectory() as tmp:
                said = outcome(c, Path(tmp))[1].strip().removeprefix("blip2mgm: ")
                for path, name in ((os.path.realpath(tmp), "FOLDER"), (tmp, "FOLDER"), (str(ROOT) + "/", ""), (sys.executable, "python")): said = said.replace(path, name)
            lines.append(f"| {c.what} | {said.replace('|', chr(92) + '|').replace(chr(10), '<br>')} |")
        lines.append("")
    return "\n".join(lines)


def test_the_page_names_every_case():
    text = (ROOT / "docs" / "errors.md").read_text()
    assert [c.what for c in CASES if f"| {c.what} | " not in text] == [], "run python tests/test_errors.py"
    assert len(re.findall(r"^\| (?!what \|)[^-].* \| .+ \|$", text, re.M)) == len(CASES)


if __name__ == "__main__": print(core.write_text(ROOT / "docs" / "errors.md", page()))
