"""Which attention a run takes: the fastest backend that is seen, at start, to keep packed samples apart.

Models accept the arguments that say where samples begin without complaint, and some ignore them: only `self_test`,
run on the very model and device, tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from sft_api.run import ExitCode, RunError
from sft_api.spec import Attention
from sft_trainer.attention_backends import packed_arguments, register_backends, varlen_attn

BACKENDS: dict[Attention, tuple[str, ...]] = {
    Attention.FLASH_ATTENTION_4: ("flash_attention_4",),
    Attention.FLASH_ATTENTION_3: ("flash_attention_3",),
    Attention.FLASH_ATTENTION_2: ("flash_attention_2",),
    Attention.VARLEN: ("varlen",),
    Attention.SDPA: ("sample_sdpa", "sample_softcap", "masked_sdpa"),
}
"""For each name in a manifest, the names in transformers that it stands for; all from the fastest to the slowest."""

PACKED_BACKENDS = frozenset(name for names in BACKENDS.values() for name in names)

_IS_INSTALLED: dict[str, Callable[[], bool]] = {
    "flash_attention_4": is_flash_attn_4_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_2": is_flash_attn_2_available,
    "varlen": lambda: varlen_attn is not None,
}
_SELF_TEST_LENGTHS = (17, 60, 23, 41)
_SELF_TEST_WINDOW = 16


class AttentionChoice(NamedTuple):
    """A backend by its name in transformers, and why it was taken in one sentence."""

    backend: str
    reason: str

    @property
    def keeps_samples_apart(self) -> bool:
        """Whether packed micro-batches are safe. If not, the model can only be trained padded, one sample a row."""
        return self.backend in PACKED_BACKENDS


@dataclass(frozen=True)
class SelfTest:
    """What packing does to a model's logits, relative to the largest logit."""

    passed: bool
    packed_error: float
    """Largest difference between packed logits and those of the same samples one by one under stock attention."""
    leak: float
    """Largest change of a sample's logits when another sample changes, or of the gradient across samples."""
    detail: str


def choose_attention(
    model: PreTrainedModel, requested: Attention | None, device: torch.device | str
) -> AttentionChoice:
    """Sets the fastest backend that passes the self-test on this model and device, and says why.

    Where none does, the model is left with the stock attention that `padded_attention` would take:
    `keeps_samples_apart` is then False. Raises RunError(CONFIGURATION) where `requested` is absent or fails.
    """
    device = torch.device(device)
    register_backends()
    failures: list[str] = []
    for name in _candidates(requested, device):
        result = _try_backend(model, name, device)
        if result.passed:
            return AttentionChoice(name, _reason(name, requested, result, failures))
        failures.append(f"{name}: {result.detail}")
    if requested is not None:
        raise RunError(
            ExitCode.CONFIGURATION,
            f"attention {requested.value} does not work for {type(model).__name__} on {device.type} "
            f"({'; '.join(failures)}). Leave it out to take the fastest backend that works here, or choose one of "
            f"{', '.join(a.value for a in Attention if a != requested)}.",
            path="spec.trainer.attention",
        )
    stock = padded_attention(model)
    return AttentionChoice(stock.backend, f"no backend keeps packed samples apart ({'; '.join(failures)})")


def padded_attention(model: PreTrainedModel, requested: Attention | None = None) -> AttentionChoice:
    """Sets attention as transformers ships it, for micro-batches of one sample a row.

    Raises RunError(CONFIGURATION) where `requested` cannot take padded rows, or is not installed.
    """
    name = _stock(model) if requested in (None, Attention.SDPA) else BACKENDS[requested][0]
    if name == "varlen" or not _IS_INSTALLED.get(name, lambda: True)():
        why = "takes packed batches only" if name == "varlen" else "is not installed"
        raise RunError(
            ExitCode.CONFIGURATION,
            f"this job trains on padded batches, and {name} {why}. Leave the attention out, or choose SDPA.",
            path="spec.trainer.attention",
        )
    _set_backend(model, name)
    return AttentionChoice(name, "padded batches, one sample a row")


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """For the time of a block the model attends as transformers ships it: what `generate` needs."""
    before = _current(model)
    _set_backend(model, _stock(model))
    try:
        yield
    finally:
        _set_backend(model, before)


# --------------------------------------------------------------------------------------------- self-test


def self_test(model: PreTrainedModel, device: torch.device | str) -> SelfTest:
    """Whether the attention that is set keeps packed samples apart, on this very model.

    Packed logits must equal those of each sample alone under stock attention; nothing of one sample may reach
    another, forward or backward: not a bit in fp32 on the CPU, less than 5e-4 elsewhere, where kernels may tile
    differently. Sliding windows are shortened for the test, so that it sees them at work.
    """
    device = torch.device(device)
    samples = _test_samples(model, device)
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(_short_windows(model, _SELF_TEST_WINDOW))
        with torch.no_grad(), stock_attention(model):
            # Ids alone: a model that reads explicit positions in a way of its own (OPT) fails, as it should.
            separate = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in samples])
        packed, gradient_leak = _packed_with_gradient(model, samples)
        changed = [ids.roll(1) if i == 1 else ids for i, ids in enumerate(samples)]
        with torch.no_grad():
            packed_changed = _logits(model, changed)
    scale = separate.abs().max().clamp_min(1e-30)
    others = _outside(samples, 1)
    leak = max(gradient_leak, float((packed_changed - packed)[others].abs().max() / scale))
    return _verdict(
        packed_error=float((packed - separate).abs().max() / scale), leak=leak, dtype=_dtype(model), device=device
    )


def _verdict(packed_error: float, leak: float, dtype: torch.dtype, device: torch.device) -> SelfTest:
    is_exact = dtype == torch.float32 and device.type == "cpu"
    # bf16 rounds at 4e-3, and two kernels round differently in every layer; a neighbour in sight makes 3e-2 to 1.
    error_limit = 1e-4 if dtype == torch.float32 else 2.5e-2
    leak_limit = 0.0 if is_exact else 5e-4
    figures = f"packed logits differ by {packed_error:.1e}, leak {leak:.1e}"
    if not math.isfinite(packed_error) or packed_error > error_limit:
        return SelfTest(False, packed_error, leak, f"{figures}; at most {error_limit:.1e} is allowed of the first")
    if not leak <= leak_limit:
        return SelfTest(False, packed_error, leak, f"samples see each other: {figures}")
    return SelfTest(True, packed_error, leak, figures)


def _try_backend(model: PreTrainedModel, name: str, device: torch.device) -> SelfTest:
    """The self-test with the backend set. Whatever a library raises on the way is a failure of this backend."""
    if not _IS_INSTALLED.get(name, lambda: True)():
        return SelfTest(False, math.nan, math.nan, "not installed")
    if name == "varlen" and getattr(model.config, "attention_dropout", 0.0) > 0:
        return SelfTest(False, math.nan, math.nan, "it has no attention dropout, which the model's config asks for")
    try:
        _set_backend(model, name)
        return self_test(model, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return SelfTest(False, math.nan, math.nan, _one_line(error))


def _test_samples(model: PreTrainedModel, device: torch.device) -> list[Tensor]:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(min(vocabulary, 1000), (n,), generator=generator) for n in _SELF_TEST_LENGTHS]
    return [x.to(device) for x in ids]


def _logits(model: PreTrainedModel, samples: Sequence[Tensor]) -> Tensor:
    """fp32 `[tokens, vocabulary]` of the samples packed into one row, as training packs them."""
    lengths = [len(ids) for ids in samples]
    ids = torch.cat(list(samples))
    starts = torch.tensor([0, *lengths], device=ids.device).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
    output = model(input_ids=ids[None], position_ids=positions[None], **packed_arguments(starts, max(lengths), lengths))
    logits: Tensor = output.logits[0].float()
    return logits


def _packed_with_gradient(model: PreTrainedModel, samples: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Packed logits, and what share of the gradient of sample 1's logits lands on other samples' embeddings."""
    embedded: list[Tensor] = []
    embeddings = model.get_input_embeddings()

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.requires_grad_())
        return output

    handle = embeddings.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            packed = _logits(model, samples)
            others = _outside(samples, 1)
            (gradient,) = torch.autograd.grad(packed[~others].square().sum(), embedded[0])
    finally:
        handle.remove()
    size = gradient.float().abs().amax(-1).reshape(-1)
    return packed.detach(), float(size[others].max() / size.max().clamp_min(1e-30))


def _outside(samples: Sequence[Tensor], index: int) -> Tensor:
    """Bool `[tokens]`: True where a token is of another sample than `index`."""
    return torch.cat([torch.full_like(ids, i != index, dtype=torch.bool) for i, ids in enumerate(samples)])


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _short_windows(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Shortens every sliding window and attention chunk: at 4,096 tokens no test this short would see one."""
    changed: list[tuple[Any, str, int]] = []
    places = [*model.modules(), model.config, model.config.get_text_config()]
    for place in places:
        for name in ("sliding_window", "attention_chunk_size"):
            before = place.__dict__.get(name)
            if type(before) is int and before > length:
                changed.append((place, name, before))
                setattr(place, name, length)
    try:
        yield
    finally:
        for place, name, before in reversed(changed):
            setattr(place, name, before)


# ----------------------------------------------------------------------------------------------- details


def _candidates(requested: Attention | None, device: torch.device) -> Iterator[str]:
    for attention, names in BACKENDS.items():
        if requested == attention or (requested is None and (device.type == "cuda" or attention == Attention.SDPA)):
            yield from names


def _reason(name: str, requested: Attention | None, result: SelfTest, failures: Sequence[str]) -> str:
    why = "asked for, and passes the self-test" if requested else "the fastest that passes the self-test"
    passed_over = f"; passed over: {'; '.join(failures)}" if failures else ""
    return f"{why} ({result.detail}{passed_over})"


def _current(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation)


def _stock(model: PreTrainedModel) -> str:
    return str(model.get_correct_attn_implementation(None))


def _set_backend(model: PreTrainedModel, name: str) -> None:
    if _current(model) == name:
        return
    model.set_attn_implementation(name)
    if _current(model) != name:
        raise ValueError(f"{type(model).__name__} has attention of its own that cannot be exchanged")


def _dtype(model: PreTrainedModel) -> torch.dtype:
    dtype: torch.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return dtype


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
