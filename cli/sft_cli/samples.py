"""The prepared samples that a person is shown before training: which, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from sft_api.events import PreparedMetrics, PreviewMessage

SHOWN_SAMPLES = 3
SHOWN_CHARACTERS = 600
"""Of one stretch; its beginning and its end are shown, for that is where masks go wrong."""
SHOWN_STRETCHES = 12


def chosen_samples(prepared: Sequence[PreparedMetrics]) -> list[tuple[str, list[PreviewMessage]]]:
    """Three samples with their phase's name, from as many phases as there are; the held-out data is left out."""
    training = [event for event in prepared if event.phase != "validation"]
    turns = zip_longest(*([(event.phase, sample) for sample in event.preview] for event in training))
    return [found for turn in turns for found in turn if found is not None][:SHOWN_SAMPLES]


def shortened(sample: Sequence[PreviewMessage]) -> list[PreviewMessage]:
    """The sample with the middle of long stretches left out, and the middle of long conversations."""
    stretches = [piece.model_copy(update={"text": clipped(piece.text)}) for piece in sample]
    if len(stretches) <= SHOWN_STRETCHES:
        return stretches
    half = SHOWN_STRETCHES // 2
    left_out = PreviewMessage(text=f"\n… {len(stretches) - 2 * half} stretches …\n", trained=False)
    return [*stretches[:half], left_out, *stretches[-half:]]


def clipped(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def marked(sample: Sequence[PreviewMessage]) -> str:
    """The sample as text, what is trained on between ⟦ and ⟧."""
    return "".join(f"⟦{piece.text}⟧" if piece.trained else piece.text for piece in shortened(sample))
