"""Manifests that are neither here nor there: good ones, changed in three places with parts of others, good and bad."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from hypothesis import strategies as st

from tests.api.jobs import GONE, change, document
from tests.api.tables import BAD, CHANGES, GOOD

PARTS = [part for changes in (*GOOD.values(), *(bad for bad, _ in BAD.values()), CHANGES) for part in changes.items()]
VALUES = [None if value is GONE else value for _, value in PARTS]
OWN: dict[str, list[Any]] = {
    path: [value for other, value in PARTS if other == path and value is not GONE]
    for path, value in PARTS
    if value is not GONE and (path.startswith("spec.") or path == "metadata.name")
}


@st.composite
def mixed_documents(draw: st.DrawFn) -> dict[str, Any]:
    mixed = document(GOOD[draw(st.sampled_from(sorted(GOOD)))])
    for _ in range(3):
        path = draw(st.sampled_from(sorted(OWN)))
        value = draw(st.sampled_from(OWN[path]) | st.sampled_from(VALUES))
        with contextlib.suppress(AttributeError, TypeError, LookupError):  # no such place after the first change
            change(mixed, path, copy.deepcopy(value))
    return mixed
