"""Each state that an API server, a training operator or a kubelet can show, and the decision that it gets."""

from __future__ import annotations

import pytest

from sft_operator.reconcile import reconcile
from tests.operator.builders import NOW, SETTINGS
from tests.operator.states import ending, placing, preparing, stopping
from tests.operator.states.case import Case

CASES = (*preparing.CASES, *placing.CASES, *ending.CASES, *stopping.CASES)
TABLE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@TABLE
def test_each_state_gets_its_decision(case: Case) -> None:
    case.check(reconcile(case.job, case.observed, SETTINGS, NOW))
