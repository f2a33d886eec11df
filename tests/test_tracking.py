"""Steps in MLflow's store: all of them, as they come, and one message where MLflow is missing."""
import sys
from types import SimpleNamespace

import pytest

from blip2mgm.core import ConfigError, UserError, write_jsonl
from blip2mgm.tracking import new_rows, tracked
from blip2mgm.jobs import TrainConfig


def job_of(folder, n):
    write_jsonl(folder / "stage1/steps.jsonl", [dict(stage=1, step=k, loss=3.0 - k, seconds=k) for k in range(n)])
    write_jsonl(folder / "stage2/steps.jsonl", [dict(stage=2, step=k, loss=1.0, grad_norms=dict(LoRA=0.5), seconds=k) for k in range(n - 1)])
    return SimpleNamespace(folder=str(folder), arm="raw", seed=1, cfg=TrainConfig())


def test_without_mlflow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="pip install mlflow-skinny"): tracked("mlflow", tmp_path / "run")
    assert tracked("", tmp_path / "run", len) is len


def test_a_wrong_name_is_refused():
    with pytest.raises(ConfigError, match="tracking can be mlflow"): TrainConfig(tracking="wandb")


def test_a_training_that_goes_back_is_sent_again(tmp_path):
    sent = {}
    assert len(new_rows(job_of(tmp_path, 3), sent)) == 5
    assert new_rows(job_of(tmp_path, 2), sent) == []
    assert [r["step"] for r in new_rows(job_of(tmp_path, 4), sent)] == [2, 3, 1, 2]


def test_the_store_holds_parameters_and_every_step(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="MLflow is optional, and not installed here")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    seen = []
    send = tracked("mlflow", tmp_path / "runs/mine", seen.append)
    send([job_of(tmp_path / "job", 2)])
    send([job_of(tmp_path / "job", 3)])
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs/mlflow.db'}")
    run, = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "raw seed 1" and run.data.params["lora_r"] == "16" and len(seen) == 2
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "stage1/loss")] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert len(client.get_metric_history(run.info.run_id, "stage2/grad_norms/LoRA")) == 2
