"""Fixtures that several rooms share."""

from tests.gang import gang

__all__ = ["gang"]
