"""Token ids of prompts, such that vLLM's prefix cache finds what calls really share.

A prompt is a list of chunks. Two chunks with one key are the same text; a key never repeats with another length.
Answers are chunks too: the fake runner utters them, and the calls that follow contain them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Final

import numpy as np

from tokencake_sim.workload.graph import topological, waits_for

if TYPE_CHECKING:
    from tokencake_sim.workload.model import App

FIRST_TOKEN: Final = 1_000
"""Ids below are left to the special tokens of real vocabularies."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of text: same key, same ids."""

    key: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Texts:
    """What one node reads and says."""

    prompt: tuple[Chunk, ...]
    answer: Chunk | None
    """None for a local node."""
    context: tuple[Chunk, ...]
    """What a successor builds on: prompt, answer where it is kept, result of the tool."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return sum(chunk.tokens for chunk in self.prompt)


def texts_of(app: App) -> dict[str, Texts]:
    """The texts of every node of `app`."""
    by_id = {node.id: node for node in app.nodes}
    texts: dict[str, Texts] = {}
    for name in topological(waits_for(app.nodes)):
        node = by_id[name]
        own = f"{app.id}/{name}"
        prompt = _join([texts[predecessor].context for predecessor in node.predecessors])
        if node.prefix is not None:
            prompt = (Chunk(node.prefix.key, node.prefix.tokens), *prompt)
        if node.new_tokens:
            prompt = (*prompt, Chunk(f"{own}/new", node.new_tokens))
        answer = None if node.is_local else Chunk(f"{own}/answer", node.output_tokens)
        context = (*prompt, answer) if answer is not None and node.keeps_answer else prompt
        if node.tool is not None and node.tool.result_tokens:
            context = (*context, Chunk(f"{own}/result", node.tool.result_tokens))
        texts[name] = Texts(prompt, answer, context)
    return texts


def _join(contexts: list[tuple[Chunk, ...]]) -> tuple[Chunk, ...]:
    if not contexts:
        return ()
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*contexts, strict=False)))
    joined = contexts[0][:shared]
    for context in contexts:
        joined += context[shared:]
    return joined


@lru_cache(maxsize=65_536)
def token_ids(chunk: Chunk, vocabulary: int) -> tuple[int, ...]:
    """The ids of `chunk`: a function of its key alone, drawn evenly from the vocabulary."""
    stream = hashlib.shake_256(chunk.key.encode()).digest(4 * chunk.tokens)
    drawn = np.frombuffer(stream, dtype="<u4") % (vocabulary - FIRST_TOKEN) + FIRST_TOKEN
    return tuple(drawn.tolist())


def prompt_ids(texts: Texts, vocabulary: int) -> list[int]:
    """The ids of a whole prompt, a fresh list: vLLM keeps it."""
    ids: list[int] = []
    for chunk in texts.prompt:
        ids += token_ids(chunk, vocabulary)
    return ids
