"""What a run can be asked over HTTP, and what its metrics file holds while it goes on."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from sft_api import names
from sft_api.events import CheckpointCommitted, Exported, PhasePlan, Started, StepMetrics
from sft_api.report import TrainerReport
from sft_api.status import ExportStatus, PhaseStatus
from sft_trainer.model import ModelNumbers
from sft_trainer.progress import Reporter, read_report
from sft_trainer.signals import Monitor, Signals, peak_flops, training_flops
from sft_trainer.store import Store


def a_step(number: int, **changes: object) -> StepMetrics:
    facts: dict[str, object] = {
        "step": number,
        "phase": "one",
        "epoch": 1,
        "loss": 2.0 / number,
        "grad_norm": 0.5,
        "learning_rate": 2e-5,
        "samples": 8 * number,
        "tokens": 100 * number,
        "loss_tokens": 40 * number,
        "samples_digest": "d",
        "seconds": 2.0,
        "tokens_per_second": 50.0,
        "mfu": None,
        "packing_efficiency": 0.99,
        "packing_bound": 1.0,
        "micro_batches": 3,
        "data_wait_seconds": 0.01,
        "checkpoint_stall_seconds": 0.25,
        "memory_bytes": 1000,
        "time": 1000.0 + 2.0 * number,
    }
    return StepMetrics.model_validate(facts | changes, by_name=True)


STARTED = Started(
    attempt=3,
    total_steps=10,
    phases=[PhasePlan(name="one", samples=40, epochs=1, steps=5), PhasePlan(name="two", samples=40, epochs=1, steps=5)],
    resumed_from_step=4,
    world_size=2,
    zero_stage=1,
    precision="FP32",
    attention="sample_sdpa",
    attention_reason="CPU",
    packing="Packed",
    parameters=1,
    device="CPU",
)


def make_signals(folder: Path) -> Signals:
    reporter = Reporter(3, folder)
    return Signals(Store.open(f"file://{folder}"), 3, Monitor("granite", reporter), reporter)


@pytest.fixture
def signals(tmp_path: Path) -> Signals:
    """Of an attempt that is about to take its first step."""
    signals = make_signals(tmp_path)
    signals.monitor.observe(STARTED)
    signals.reporter.observe(STARTED)
    return signals


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
        return str(answer.read().decode())


def test_every_figure_of_a_step_is_in_prometheus_form(signals: Signals) -> None:
    port = signals.monitor.serve(0, "127.0.0.1")
    signals.emit(a_step(1, mfu=0.41))
    metrics = get(port, "/metrics")
    for name, value in {
        "loss": 2.0,
        "grad_norm": 0.5,
        "learning_rate": 2e-5,
        "tokens_per_second": 50.0,
        "mfu": 0.41,
        "packing_efficiency": 0.99,
        "packing_bound": 1.0,
        "data_wait_seconds": 0.01,
        "checkpoint_stall_seconds": 0.25,
        "memory_bytes": 1000.0,
        "step": 1.0,
        "loss_tokens": 40.0,
    }.items():
        assert f'sft_{name}{{job="granite",phase="one"}} {value}\n' in metrics
    assert 'sft_total_steps{job="granite"} 10.0' in metrics
    signals.close()


def told(port: int) -> TrainerReport:
    return TrainerReport.model_validate_json(get(port, "/progress"))


def test_progress_is_answered_before_there_is_any(tmp_path: Path) -> None:
    signals = make_signals(tmp_path)
    port = signals.monitor.serve(0, "127.0.0.1")
    assert told(port) == TrainerReport(attempt=3)
    assert get(port, "/healthz") == "ok\n"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(port, "/elsewhere")
    signals.close()


def test_progress_has_figures_for_a_column_and_the_metrics_have_them_whole(signals: Signals) -> None:
    port = signals.monitor.serve(0, "127.0.0.1")
    signals.emit(a_step(5, loss=0.013735193472642165, tokens_per_second=12380.623154709112))
    progress = told(port).progress
    assert progress is not None
    assert (progress.loss, progress.tokens_per_second) == (0.013735, 12381.0)
    assert "0.013735193472642165" in get(port, "/metrics")
    signals.close()


def test_progress_says_how_far_it_is_and_how_long_it_will_take(signals: Signals, tmp_path: Path) -> None:
    port = signals.monitor.serve(0, "127.0.0.1")
    signals.know(productive_seconds=100.0)
    signals.emit(a_step(5))  # the first of this attempt, which went on from step 4
    signals.emit(a_step(6, phase="two"))
    report = told(port)
    assert report.resumed_from_step == 4
    assert report.phase == PhaseStatus(name="two", index=1, count=2)
    assert report.productive_seconds == 104.0
    assert not report.complete
    progress = json.loads(get(port, "/progress"))["progress"]
    assert progress == {
        "step": 6,
        "totalSteps": 10,
        "epoch": 1,
        "samples": 48,
        "tokens": 600,
        "percent": 60,
        "etaSeconds": 8,
        "loss": 0.33333,
        "gradNorm": 0.5,
        "learningRate": 2e-5,
        "tokensPerSecond": 50.0,
        "mfu": None,
        "packingEfficiency": 0.99,
        "heartbeat": "1970-01-01T00:16:52Z",
    }
    assert read_report(tmp_path) == report
    signals.close()


def test_the_report_has_the_newest_checkpoint_and_what_keeps_the_next_from_being_it(signals: Signals) -> None:
    port = signals.monitor.serve(0, "127.0.0.1")
    signals.know(checkpoint_problem="writing s3://b/k: SlowDown")
    assert told(port).checkpoint_problem == "writing s3://b/k: SlowDown"
    uri = "s3://b/ckpt/00000006/3"
    signals.emit(CheckpointCommitted(step=6, phase="one", uri=uri, bytes=1, seconds=1, stall_seconds=0, time=1.9))
    signals.emit(Exported(phase="one", step=6, uri="s3://b/export/one", seconds=1))
    signals.know(complete=True)
    report = told(port)
    assert report.checkpoint_problem is None
    assert report.checkpoint is not None
    assert report.checkpoint.model_dump(mode="json") == {
        "uri": uri,
        "step": 6,
        "phase": "one",
        "time": "1970-01-01T00:00:01Z",
        "verified": True,
    }
    assert report.export == ExportStatus(uri="s3://b/export/one")
    assert report.complete
    signals.close()


def test_steps_and_other_events_are_in_the_store_as_soon_as_they_are_flushed(signals: Signals, tmp_path: Path) -> None:
    signals.emit(a_step(1))
    signals.flush()
    signals.emit(a_step(2))
    assert len((tmp_path / names.metrics(3)).read_text().splitlines()) == 1
    signals.flush()
    lines = [json.loads(line) for line in (tmp_path / names.metrics(3)).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["gradNorm"] == 0.5
    assert not (tmp_path / names.events(3)).exists()
    signals.close()


def test_what_was_emitted_is_in_the_store_after_the_close(signals: Signals, tmp_path: Path) -> None:
    signals.emit(a_step(1))
    signals.close()
    assert len((tmp_path / names.metrics(3)).read_text().splitlines()) == 1


def test_a_store_that_refuses_the_metrics_is_a_warning_until_a_checkpoint_needs_them(
    signals: Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics").write_text("a file where the folder should be")
    signals.emit(a_step(1))
    signals.close()
    assert "warning: the metrics could not be written yet" in capsys.readouterr().out


def test_training_flops_are_six_a_parameter_and_token_and_those_of_causal_attention() -> None:
    numbers = ModelNumbers(
        parameters=12, matrix_parameters=10, layers=2, width=4, hidden=4, vocabulary=5, quadratic_length=1.25
    )
    assert training_flops(numbers, tokens=3, squared_lengths=5) == 6 * 10 * 3 + 6 * 2 * 4 * 5


def test_no_peak_is_made_up_for_a_cpu() -> None:
    assert peak_flops(torch.device("cpu")) is None
