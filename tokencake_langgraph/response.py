"""The fields of vLLM's response that `ChatOpenAI` drops, copied to the message.

They are the model's reasoning, and the report `kv_transfer_params.tokencake` in which the engine says what it did with
the hint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from langchain_core.outputs import ChatGenerationChunk, ChatResult
from openai import BaseModel

RESPONSE_KEY: Final = "tokencake"
REASONING_KEY: Final = "reasoning_content"
_REASONING_FIELDS: Final = ("reasoning_content", "reasoning")
"""vLLM's old and new name of the field."""


def copy_vllm_fields(response: dict[str, Any] | BaseModel, result: ChatResult) -> None:
    """Add the reasoning and the engine's report of `response` to the messages of `result`."""
    report = _report(response)
    choices: Any = response["choices"] if isinstance(response, dict) else getattr(response, "choices", ())
    for choice, generation in zip(choices, result.generations, strict=False):
        message = generation.message
        answer = choice["message"] if isinstance(choice, dict) else choice.message
        if (reasoning := _reasoning(answer)) is not None:
            message.additional_kwargs[REASONING_KEY] = reasoning
        if report is not None:
            message.response_metadata[RESPONSE_KEY] = report


def copy_vllm_chunk_fields(chunk: Mapping[str, Any], generation: ChatGenerationChunk) -> None:
    """The same for one chunk of a stream."""
    inner = chunk.get("chunk")  # the events of a stream with a response format contain it
    chunk = inner if isinstance(inner, Mapping) else chunk
    for choice in chunk.get("choices") or ():
        if (reasoning := _reasoning(choice.get("delta"))) is not None:
            generation.message.additional_kwargs[REASONING_KEY] = reasoning
    if (report := _report(chunk)) is not None:
        generation.message.response_metadata[RESPONSE_KEY] = report


class ReportOncePerStream:
    """Passes the engine's report once per stream: LangChain adds the chunks up, and two reports cannot be added."""

    def __init__(self) -> None:
        self._is_seen = False

    def __call__(self, generation: ChatGenerationChunk) -> ChatGenerationChunk:
        """`generation`, without its report if an earlier chunk had one."""
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
    params = fields.get("kv_transfer_params")
    return params.get(RESPONSE_KEY) if isinstance(params, Mapping) else None


def _reasoning(message: Any) -> str | None:
    fields = _unknown_to_openai(message)
    if not fields:
        return None
    texts = (fields.get(name) for name in _REASONING_FIELDS)
    return next((text for text in texts if isinstance(text, str) and text), None)


def _unknown_to_openai(answer: Any) -> Mapping[str, Any] | None:
    """The fields of an `answer` that OpenAI's own classes lack; all fields of plain JSON."""
    if isinstance(answer, BaseModel):
        return answer.model_extra
    return answer if isinstance(answer, Mapping) else None
