"""The report of a job: one HTML page that stands alone, made from what the job's attempts said."""

from sft_trainer.report.history import History, merge, read_attempts, read_prepared
from sft_trainer.report.page import ReportData, render

__all__ = ["History", "ReportData", "merge", "read_attempts", "read_prepared", "render"]
