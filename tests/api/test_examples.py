from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_api.crd import custom_resource_definition
from sft_api.manifest import parse_job
from sft_api.recipes import resolve
from tests.api.api_server import ApiServer

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.yaml"))


def read(path: Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_there_are_examples() -> None:
    assert Path("examples/lab-three-phases.yaml") in EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_an_example_is_valid_here_and_in_a_cluster(path: Path) -> None:
    document = read(path)
    assert resolve(parse_job(document)).phases
    assert ApiServer(custom_resource_definition()).refusals(document) == []


def test_the_three_phases_of_lab_can_be_stacked_and_phased() -> None:
    document = read(Path("examples/lab-three-phases.yaml"))
    stacked = resolve(parse_job(document))
    document["spec"]["strategy"] = "Phased"
    phased = resolve(parse_job(document))
    assert [phase.name for phase in stacked.phases] == ["stacked"]
    assert [phase.name for phase in phased.phases] == ["instruct", "knowledge", "skills"]
    assert stacked.phases[0].data_paths == [path for phase in phased.phases for path in phase.data_paths]
    assert {(phase.batch.effective_batch_size, phase.epochs) for phase in phased.phases} == {(3840, 10)}
