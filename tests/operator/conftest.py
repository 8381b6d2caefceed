"""Fixtures of the operator's tests."""

from tests.operator.api_server import api

__all__ = ["api"]
