"""Fixtures that several rooms share."""

from tests.gang import gang
from tests.s3 import s3_bucket, s3_server, s3_session

__all__ = ["gang", "s3_bucket", "s3_server", "s3_session"]
