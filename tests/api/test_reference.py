from __future__ import annotations

from pathlib import Path

import pytest

from sft_api import generated
from sft_api.reference import FILE, reference
from sft_api.rules import RULES

ROOT = Path(__file__).parents[2]


def test_the_checked_in_reference_is_current() -> None:
    assert (ROOT / FILE).read_text() == reference(), "run `python -m sft_api.reference`"


def test_a_field_stands_with_type_default_bounds_and_meaning() -> None:
    assert (
        "| `gpusPerNode` | whole number | `1` | a whole number from 0 to 16 | GPUs on each node; 0 trains on the CPU. |"
        in reference()
    )


def test_every_rule_stands_with_its_place() -> None:
    lines = reference().splitlines()
    for rule in RULES:
        assert any(line.startswith("- `spec") and line.endswith(f": {rule.message}") for line in lines), rule.message


def test_a_rule_that_an_api_server_cannot_see_is_marked() -> None:
    marked = [line for line in reference().splitlines() if line.startswith("- ") and "`†: " in line]
    assert len(marked) == sum(rule.cel is None for rule in RULES) > 0


def test_a_mapping_and_a_quantity_say_what_they_take() -> None:
    assert (
        "| `sharedMemory` | whole number or text |  | an amount of memory: 16Gi, 512Mi, or bytes | Size of /dev/shm"
        in reference()
    )
    assert "| `nodeSelector` | mapping |  | a mapping of text to text of at most 63 letters" in reference()


def test_the_recipes_stand_with_their_values() -> None:
    assert "| `LAB` | 3840 | 2e-5 | 25 steps | Constant | 10 |" in reference()
    assert "| `none` | required | required | none | Constant | required |" in reference()


def test_what_only_a_cluster_writes_is_not_offered() -> None:
    assert "managedFields" not in reference()


def test_a_generated_file_is_written_and_then_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "docs" / "x.md"
    generated.main(file, "text\n", "sft_api.x", [])
    generated.main(file, "text\n", "sft_api.x", ["--check"])
    assert capsys.readouterr().out == f"{file}\n"


@pytest.mark.parametrize("there", [True, False])
def test_a_generated_file_that_is_not_current_ends_the_check(tmp_path: Path, there: bool) -> None:
    file = tmp_path / "x.md"
    if there:
        file.write_text("old\n")
    with pytest.raises(SystemExit, match=r"is not current; run `python -m sft_api.x`"):
        generated.main(file, "text\n", "sft_api.x", ["--check"])
