"""What a run can be asked while it goes on: lines in the store, Prometheus metrics, /progress, /healthz."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterable
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, make_wsgi_app

from sft_api import names
from sft_api.events import CheckpointCommitted, Event, Message, Started, StepMetrics, ValidationMetrics
from sft_api.run import RunError
from sft_trainer.model import ModelNumbers
from sft_trainer.progress import Reporter
from sft_trainer.store import Store
from sft_trainer.voice import say

UPLOAD_SECONDS = 5.0
"""How old the metrics object in the store may grow while the run goes on; a commit writes it at once."""

PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
"""Dense bf16 peak by a part of the device's name, from the vendor's data sheets; the first that fits counts."""


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or none where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def training_flops(numbers: ModelNumbers, tokens: int, squared_lengths: int) -> float:
    """FLOPs of forward and backward: Σ (6·N·l + 6·layers·width·l²) over the samples, recomputation not counted."""
    return 6.0 * numbers.matrix_parameters * tokens + 6.0 * numbers.layers * numbers.width * squared_lengths


def peak_memory(device: torch.device) -> float:
    """Peak bytes of this rank: allocated on the device, on the CPU resident in the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Signals:
    """Where events go: to stdout, to the store, the monitor and the report, from the first rank alone."""

    def __init__(self, store: Store, attempt: int, monitor: Monitor, reporter: Reporter):
        self.monitor, self.reporter = monitor, reporter
        self._steps = MetricsFile(store, names.metrics(attempt))
        self._events = MetricsFile(store, names.events(attempt))

    def emit(self, event: Event) -> None:
        say(event)
        (self._steps if isinstance(event, StepMetrics) else self._events).add(event)
        self.monitor.observe(event)
        self.reporter.observe(event)

    def know(self, **facts: object) -> None:
        """Take over fields of the report that no event tells."""
        self.reporter.know(**facts)

    def flush(self) -> None:
        """Bring what was emitted into the store, now: a checkpoint is committed only after the steps it stands for."""
        self._steps.flush()
        self._events.flush()

    def close(self) -> None:
        self._steps.close()
        self._events.close()
        self.monitor.close()


class NoSignals(Signals):
    """What every rank but the first has."""

    def __init__(self) -> None:
        return

    def emit(self, event: Event) -> None:
        return

    def know(self, **facts: object) -> None:
        return

    def flush(self) -> None:
        return

    def close(self) -> None:
        return


class MetricsFile:
    """JSON lines in the store. Object stores cannot append: the whole object is written again now and then."""

    def __init__(self, store: Store, key: str):
        self.store, self.key = store, key
        self._lines: list[str] = []
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._keep_writing, name="metrics", daemon=True)
        self._thread.start()

    def add(self, event: Event) -> None:
        self._lines.append(event.model_dump_json(by_alias=True))
        self._changed.set()

    def flush(self) -> None:
        """Write what is there, now; errors of the store are raised."""
        with self._writing:
            if self._changed.is_set():
                self._changed.clear()
                self.store.put(self.key, ("\n".join(self._lines) + "\n").encode())

    def close(self) -> None:
        """Write the rest. What the store refuses now was warned of, and a checkpoint does not depend on it."""
        self._closed.set()
        self._thread.join()
        self._flush_or_warn()

    def _keep_writing(self) -> None:
        while not self._closed.wait(UPLOAD_SECONDS):
            self._flush_or_warn()

    def _flush_or_warn(self) -> None:
        try:
            self.flush()
        except RunError as error:  # the next commit flushes as well, and there it counts
            self._changed.set()
            say(Message(level="warning", text=f"the metrics could not be written yet: {error}"))


class Monitor:
    """Prometheus gauges of the newest step, and an HTTP server for them and the report where a port is given."""

    GAUGES = {
        "loss": "Mean cross-entropy over the loss tokens of the newest step",
        "grad_norm": "Global gradient norm before clipping",
        "learning_rate": "Learning rate",
        "tokens_per_second": "Tokens over the wall time of the newest step",
        "mfu": "Model FLOPs utilisation",
        "packing_efficiency": "Cost utilisation of the newest step's plan",
        "packing_bound": "Best cost utilisation any plan could reach",
        "micro_batches": "Largest number of micro-batches on a rank",
        "data_wait_seconds": "How long the newest step waited for its batches",
        "checkpoint_stall_seconds": "How long training stood still for the newest save",
        "memory_bytes": "Largest peak memory of a rank",
        "seconds": "Wall time of the newest step",
        "step": "Optimizer steps done",
        "samples": "Samples trained on since the job began",
        "tokens": "Tokens trained on since the job began",
        "loss_tokens": "Loss tokens trained on since the job began",
        "epoch": "Pass over the phase's data",
    }

    def __init__(self, job: str, reporter: Reporter):
        self.registry = CollectorRegistry()
        self._job, self._reporter = job, reporter
        self._gauges = {
            name: Gauge(f"sft_{name}", text, ["job", "phase"], registry=self.registry)
            for name, text in self.GAUGES.items()
        }
        self._total = Gauge("sft_total_steps", "Optimizer steps of the whole job", ["job"], registry=self.registry)
        self._validation = Gauge("sft_validation_loss", "Held-out loss", ["job"], registry=self.registry)
        self._accuracy = Gauge("sft_validation_accuracy", "Held-out token accuracy", ["job"], registry=self.registry)
        self._checkpoint = Gauge("sft_checkpoint_step", "Newest committed checkpoint", ["job"], registry=self.registry)
        self._checkpoints = Counter("sft_checkpoints", "Checkpoints committed", ["job"], registry=self.registry)
        self._server: WSGIServer | None = None

    def observe(self, event: Event) -> None:
        match event:
            case Started():
                self._total.labels(self._job).set(event.total_steps)
            case StepMetrics():
                self._observe_step(event)
            case ValidationMetrics():
                self._validation.labels(self._job).set(event.loss)
                self._accuracy.labels(self._job).set(event.accuracy)
            case CheckpointCommitted():
                self._checkpoint.labels(self._job).set(event.step)
                self._checkpoints.labels(self._job).inc()

    def _observe_step(self, metrics: StepMetrics) -> None:
        for name, gauge in self._gauges.items():
            value = getattr(metrics, name)
            if value is not None:
                gauge.labels(self._job, metrics.phase).set(value)

    def serve(self, port: int, address: str) -> int:
        """Serve /metrics, /progress and /healthz; returns the port (0 asks for a free one)."""
        self._server = make_server(address, port, self._respond, handler_class=QuietHandler)
        threading.Thread(target=self._server.serve_forever, name="monitor", daemon=True).start()
        return self._server.server_port

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _respond(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                answer: Iterable[bytes] = make_wsgi_app(self.registry)(environ, start_response)
                return answer
            case "/progress":
                start_response("200 OK", [("Content-Type", "application/json")])
                return [self._reporter.report.model_dump_json(by_alias=True).encode()]
            case "/healthz":
                start_response("200 OK", [("Content-Type", "text/plain")])
                return [b"ok\n"]
            case _:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"this server has /metrics, /progress and /healthz\n"]


class QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return
