"""The one pydantic base of every API type: camelCase on the wire, unknown fields refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


def camel(name: str) -> str:
    """The field's name on the wire: `max_tokens_per_gpu` is `maxTokensPerGPU`."""
    return to_camel(name).replace("PerGpu", "PerGPU")


class ApiModel(BaseModel):
    model_config = ConfigDict(
        alias_generator=camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        use_enum_values=False,
        validate_default=True,
    )
