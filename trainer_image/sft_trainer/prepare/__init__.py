"""Text to token ids and loss masks: read, rendered, masked, tokenised, written once per fingerprint.

sources ─▶ records ─▶ conversations ─▶ masks ─▶ samples        pool: the middle three in many processes
job: prepare()        writer: Arrow in the store               dataset: what training reads
"""

from sft_trainer.prepare.dataset import Dataset, held_out_samples, training_samples
from sft_trainer.prepare.job import PreparedJob, prepare

__all__ = ["Dataset", "PreparedJob", "held_out_samples", "prepare", "training_samples"]
