"""Contracts of blip2mgm.core beyond what its notebook shows."""
import json
import subprocess
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
from conftest import PYTHON, ROOT

from blip2mgm import core, show, stage as stages
from blip2mgm.core import Config, ConfigError, UserError
from blip2mgm.stage import Stage


@dataclass
class Sample(Config):
    run: str = "runs/smoke"  # where
    data: str = "pictures/smoke"
    lr: float = 3e-4  # how fast
    seeds: int = 2
    deep: bool = False
    arms: list[str] = field(default_factory=lambda: ["raw"])
    limit: int | None = None
    aspect: Literal["pad", "square"] = "pad"
    weights: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize("text, says", [
    ("lr: 3e-4", "write 3.0e-4"),
    ("lr: 3.5e4", "write 3.5e+4"),
    ("lr: fast", "parameter lr expects float, got 'fast' (str)"),
    ("lr: yes", "expects float, got True"),
    ("lr: .nan", "expects float"),
    ("lr: .inf", "expects float"),
    ("lr:", "expects float, got None"),
    ("seeds: 2.0", "parameter seeds expects int"),
    ("seeds: true", "parameter seeds expects int"),
    ("seeds: '2'", "parameter seeds expects int"),
    ("deep: 1", "parameter deep expects bool"),
    ("arms: raw", "parameter arms expects list"),
    ("arms: [raw, 1]", "parameter arms expects str"),
    ("limit: 1.5", "parameter limit expects int or nothing"),
    ("aspect: squre", 'did you mean "square"?'),
    ("weights: {a: b}", "parameter weights expects float"),
    ("seed: 2", 'unknown parameter "seed"; did you mean "seeds"?'),
    ("lr: 1.0\nlr: 2.0", "written twice"),
    ("- lr", "must hold lines like"),
    ("lr: [", "not proper YAML"),
    ("lr: !!python/object/apply:os.system ['true']", "not proper YAML"),
    ("1: 2", 'unknown parameter "1"'),
])
def test_wrong_files_are_refused_with_the_reason(tmp_path, text, says):
    file = tmp_path / "sample.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as e: Sample.load(file)
    assert says in str(e.value) and "sample.yaml" in str(e.value)


def test_a_right_file_and_an_empty_one(tmp_path):
    file = tmp_path / "sample.yaml"
    file.write_text("lr: 1\nlimit: 3\nweights: {a: 2}\naspect: square\n")
    cfg = Sample.load(file, seeds=5)
    assert (cfg.lr, type(cfg.lr), cfg.limit, cfg.weights, cfg.seeds, cfg.deep) == (1.0, float, 3, {"a": 2.0}, 5, False)
    file.write_text("# only a comment\n")
    assert Sample.load(file) == Sample()


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"): Sample.load(tmp_path / "no.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"): Sample.load(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="cannot read"): Sample.load(tmp_path)


def test_config_yaml_can_be_loaded_again(tmp_path):
    cfg = Sample(run=str(tmp_path), lr=1e-5, limit=4)
    stage = Stage("sample", cfg)
    assert Sample.load(stage.dir / "config.yaml") == cfg


def test_from_cell_sees_a_typing_error_of_plain_papermill():
    cell = {"lr": 1e-3, "In": ["", "import x", "lr = 3e-4", "# Parameters\nlr = 0.001\nsedes = 3\n"], "sedes": 3}
    with pytest.raises(ConfigError, match="seeds"): Sample.from_cell(cell)


def test_files_are_whole_or_absent(tmp_path):
    target = core.write_json(tmp_path / "a" / "x.json", {"n": np.int64(3), "x": np.array([1.5, np.nan]), "p": tmp_path, "é": {1, 2}})
    assert json.loads(target.read_text(encoding="utf-8")) == {"n": 3, "x": [1.5, None], "p": tmp_path.as_posix(), "é": [1, 2]}
    before = target.read_text()

    def rows():
        yield {"a": 1}
        raise RuntimeError("stopped")
    with pytest.raises(RuntimeError): core.write_jsonl(target, rows())
    assert target.read_text() == before and [p.name for p in target.parent.iterdir()] == ["x.json"]


def test_jsonl_keeps_line_separators_inside_text(tmp_path):
    rows = [{"text": "a\u2028b\u0085c\nd"}, {"text": ""}]
    assert core.read_jsonl(core.write_jsonl(tmp_path / "x.jsonl", rows)) == rows


@pytest.mark.parametrize("bad", ["../x", "/etc/passwd", "a/../../x", "link/x", "a\0b", "~/../../x/../.."])
def test_data_cannot_name_files_outside(tmp_path, bad):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    with pytest.raises(UserError): core.inside(root, bad)


def test_table_escapes_everything():
    t = show.show_table([{"<b>": "<img src=x onerror=alert(1)>", "y": "&"}])
    assert "<img" not in t._repr_html_() and "<b>" not in t._repr_html_() and "&amp;" in t._repr_html_()
    assert repr(show.show_table([])) == ""


def finished(run, n=1, name="first"):
    cfg = Sample(run=str(run), seeds=n)
    stage = Stage(name, cfg)
    core.write_json(stage.dir / "out" / "n.json", n)
    stage.finish(["out"], rows={"in": n})
    return cfg


def test_a_result_stands_until_something_changes(tmp_path):
    cfg = finished(tmp_path)
    assert stages.stale("first", cfg) is None
    assert stages.stale("first", Sample(run=str(tmp_path), seeds=9)) == "config changed"
    (tmp_path / "first" / "out" / "n.json").write_text("7")
    assert "n.json" in stages.stale("first", cfg)
    (tmp_path / "first" / "out" / "n.json").unlink()
    assert "n.json" in stages.stale("first", cfg)


def test_a_run_folder_can_be_moved(tmp_path):
    finished(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert stages.stale("first", Sample(run=str(tmp_path / "b"), seeds=1)) is None


def test_a_later_stage_notices_an_earlier_one(tmp_path):
    cfg = finished(tmp_path)
    stage = Stage("second", cfg)
    assert stage.upstream("first") == tmp_path / "first"
    stage.finish()
    assert stages.stale("second", cfg) is None
    finished(tmp_path, n=1)  # again, with the same result
    assert stages.stale("second", cfg) is None
    finished(tmp_path, n=2)
    assert stages.stale("second", cfg) == "first changed"


def test_an_unfinished_stage_is_no_upstream(tmp_path):
    cfg = finished(tmp_path)
    Stage("first", cfg)  # started again, and interrupted
    with pytest.raises(UserError, match="--only first"): Stage("second", cfg).upstream("first")


def test_a_file_named_by_a_parameter_counts(tmp_path):
    @dataclass
    class Named(Config):
        run: str = "runs/smoke"
        recipe: str = "params/recipes/x.yaml"
    (tmp_path / "recipe.yaml").write_text("a")
    cfg = Named(run=str(tmp_path / "run"), recipe=str(tmp_path / "recipe.yaml"))
    Stage("named", cfg).finish()
    assert stages.stale("named", cfg) is None
    (tmp_path / "recipe.yaml").write_text("b")
    assert stages.stale("named", cfg) == "files changed"


def test_data_of_ones_own_counts(tmp_path):
    data = tmp_path / "data"
    core.write_jsonl(data / "captions.jsonl", [{"id": 1}])
    cfg = Sample(run=str(tmp_path / "run"), data=str(data))
    Stage("first", cfg).finish()
    assert stages.stale("first", cfg) is None
    core.write_jsonl(data / "captions.jsonl", [{"id": 2}])
    assert stages.stale("first", cfg) == "data changed"
    with pytest.raises(UserError, match="not there"): stages.data_root(Sample(data=str(tmp_path / "no")))


def test_missing_output_is_an_error(tmp_path):
    with pytest.raises(UserError, match="was not made"): Stage("first", Sample(run=str(tmp_path))).finish(["nothing.json"])


def test_record_says_what_it_must(tmp_path):
    finished(tmp_path)
    record = stages.record_of(tmp_path, "first")
    assert {"config", "code", "data", "upstream", "outputs", "rows", "start", "seconds", "peak_memory_mib", "versions", "machine"} <= set(record)
    assert record["versions"]["torch"] and record["machine"]["cores"] >= 1 and str(tmp_path) not in json.dumps(record)


def test_code_hash_follows_imports_and_ignores_comments(tmp_path, monkeypatch):
    package = tmp_path / "blip2mgm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f():\n    from .b import g\n    return g()\n")
    (package / "b.py").write_text("def g(): return 1\n")
    (package / "c.py").write_text("x = 1\n")
    script = "import sys; sys.path[:0] = ['.']; from importlib.util import spec_from_file_location, module_from_spec as m; s = spec_from_file_location('core', sys.argv[1]); k = m(s); sys.modules['core'] = k; s.loader.exec_module(k); print(k.code_hash('a'))"
    def now(): return subprocess.run([PYTHON, "-c", script, str(ROOT / "blip2mgm" / "core.py")], cwd=tmp_path, text=True, capture_output=True, check=True).stdout
    first = now()
    (package / "b.py").write_text("# a comment\ndef g():\n    return 1\n")
    (package / "c.py").write_text("x = 2\n")
    assert now() == first
    (package / "b.py").write_text("def g(): return 2\n")
    assert now() != first


def test_track_writes_the_progress_file(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2MGM_PROGRESS", str(tmp_path / "p.json"))
    assert list(show.track([1, 2, 3], "three things")) == [1, 2, 3]
    found = core.read_json(tmp_path / "p.json")
    assert (found["step"], found["done"], found["total"]) == ("three things", 3, 3)
    with pytest.raises(ZeroDivisionError): [1 / 0 for _ in show.track(range(3), "broken")]


def test_light_import():
    script = "import sys; import blip2mgm, blip2mgm.core, blip2mgm.cli; print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib', 'papermill', 'nbconvert') if m in sys.modules])"
    assert subprocess.run([PYTHON, "-c", script], text=True, capture_output=True, check=True, cwd="/").stdout.strip() == "[]"
