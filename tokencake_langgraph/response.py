"""What does vLLM answer that `ChatOpenAI` drops?

The model's reasoning, and the `tokencake` object in which the engine says what it did with the hint (the proxy puts it
at the top; a bare engine has no other place than `kv_transfer_params`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from langchain_core.outputs import ChatGenerationChunk, ChatResult
from openai import BaseModel

RESPONSE_KEY: Final = "tokencake"
REASONING_KEY: Final = "reasoning_content"
_REASONING_FIELDS: Final = ("reasoning_content", "reasoning")
"""vLLM's old and new name for it."""


def lift_result(response: dict[str, Any] | BaseModel, result: ChatResult) -> None:
    """Add to `result` what it lacks of `response`."""
    report = _report(response)
    choices: Any = response["choices"] if isinstance(response, dict) else getattr(response, "choices", ())
    for choice, generation in zip(choices, result.generations, strict=False):
        message = generation.message
        answer = choice["message"] if isinstance(choice, dict) else choice.message
        if (reasoning := _reasoning(answer)) is not None:
            message.additional_kwargs[REASONING_KEY] = reasoning
        if report is not None:
            message.response_metadata[RESPONSE_KEY] = report


def lift_chunk(chunk: Mapping[str, Any], generation: ChatGenerationChunk) -> None:
    """The same for one chunk of a stream."""
    inner = chunk.get("chunk")  # the events of a stream with a response format wrap it
    chunk = inner if isinstance(inner, Mapping) else chunk
    for choice in chunk.get("choices") or ():
        if (reasoning := _reasoning(choice.get("delta"))) is not None:
            generation.message.additional_kwargs[REASONING_KEY] = reasoning
    if (report := _report(chunk)) is not None:
        generation.message.response_metadata[RESPONSE_KEY] = report


class OncePerStream:
    """Lets the engine's report through once: LangChain adds up the chunks, and two reports do not add up."""

    def __init__(self) -> None:
        self._is_seen = False

    def __call__(self, generation: ChatGenerationChunk) -> ChatGenerationChunk:
        """`generation`, without its report if the stream has had one."""
        metadata = generation.message.response_metadata
        if RESPONSE_KEY in metadata:
            if self._is_seen:
                del metadata[RESPONSE_KEY]
            self._is_seen = True
        return generation


def _report(response: Mapping[str, Any] | BaseModel) -> Any:
    fields = _unknown_to_openai(response)
    if not fields:
        return None
    report = fields.get(RESPONSE_KEY)
    params = fields.get("kv_transfer_params")
    return params.get(RESPONSE_KEY) if report is None and isinstance(params, Mapping) else report


def _reasoning(message: Any) -> str | None:
    fields = _unknown_to_openai(message)
    if not fields:
        return None
    texts = (fields.get(name) for name in _REASONING_FIELDS)
    return next((text for text in texts if isinstance(text, str) and text), None)


def _unknown_to_openai(answer: Any) -> Mapping[str, Any] | None:
    """The fields that OpenAI's own models do not have; of JSON, all."""
    if isinstance(answer, BaseModel):
        return answer.model_extra
    return answer if isinstance(answer, Mapping) else None
