"""When a phase's model is exported, and by whom: all ranks gather it, the first writes it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft_api import names
from sft_api.events import Exported
from sft_api.run import RunConfig
from sft_api.spec import Export
from sft_api.status import ExportStatus
from sft_trainer.engine import Engine
from sft_trainer.export import export_model, upload_export
from sft_trainer.heartbeat import Heartbeat
from sft_trainer.ranks import Ranks
from sft_trainer.schedule import Cursor, Schedule
from sft_trainer.signals import Signals
from sft_trainer.store import ObjectMissing, Store


@dataclass(frozen=True)
class Exports:
    """The exported models of a run."""

    config: RunConfig
    store: Store
    ranks: Ranks
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    work: Path
    signals: Signals
    heartbeat: Heartbeat

    def export_what_is_due(self, engine: Engine, schedule: Schedule, cursor: Cursor) -> None:
        """Export the model of the phase that has just ended, unless that was done before a restart; collective."""
        if not schedule.is_phase_end(cursor) or not self._wanted(schedule, cursor):
            return
        phase = schedule.phases[cursor.phase - 1].name
        store = self.store.child(names.export(phase).rstrip("/"))
        is_there = self.ranks.is_first and exported_step(store) == cursor.step
        if self.ranks.gather([is_there])[0, 0]:
            self.signals.know(export=ExportStatus(uri=store.uri))
            return
        started = time.perf_counter()
        self.heartbeat.beat(f"exporting the model of phase {phase}")
        weights = engine.full_state_dict()
        if self.ranks.is_first:
            folder = self.work / "export"
            export_model(weights, self.model, self.tokenizer, folder)
            upload_export(folder, store, {"job": self.config.name, "phase": phase, "step": cursor.step})
            shutil.rmtree(folder)
            seconds = time.perf_counter() - started
            self.signals.emit(Exported(phase=phase, step=cursor.step, uri=store.uri, seconds=seconds))
        self.ranks.gather([0.0])  # nobody trains on while the first writes: its memory is the gang's

    def _wanted(self, schedule: Schedule, cursor: Cursor) -> bool:
        when = self.config.checkpoints.export
        return when is Export.PHASE_END or (when is Export.END and schedule.is_done(cursor))


def exported_step(store: Store) -> int | None:
    """Step of the complete export at `store`; none where there is none."""
    if store.head(names.COMPLETE) is None:
        return None
    try:
        step = json.loads(store.get(names.MANIFEST))["step"]
    except (ObjectMissing, ValueError, KeyError):
        return None
    return int(step)
