from hypothesis import given
from hypothesis import strategies as st
from vllm.utils.hashing import sha256

from tokencake_sim import App, Node, Prefix, Tool
from tokencake_sim.workload.tokens import FIRST_TOKEN, Chunk, prompt_ids, texts_of, token_ids


@given(st.text(max_size=20), st.integers(1, 300), st.integers(1_200, 200_000))
def test_a_chunk_has_its_length_stays_in_the_vocabulary_and_depends_on_its_key_alone(key, tokens, vocabulary):
    ids = token_ids(Chunk(key, tokens), vocabulary)

    assert len(ids) == tokens
    assert all(FIRST_TOKEN <= token < vocabulary for token in ids)
    assert ids == token_ids(Chunk(key, tokens), vocabulary)


def test_different_texts_differ_within_their_first_block():
    assert token_ids(Chunk("a", 16), 32_000) != token_ids(Chunk("b", 16), 32_000)


def test_a_join_reads_what_its_branches_share_once_and_then_each_branch_in_order():
    nodes = (
        Node("root", "r", 10, 4, tool=Tool("t", 1.0, 3)),
        Node("left", "l", 1, 5, ("root",)),
        Node("right", "r", 2, 6, ("root",)),
        Node("join", "j", 7, 8, ("left", "right")),
    )
    texts = texts_of(App("a", "k", 0.0, nodes))

    assert texts["join"].prompt_tokens == (10 + 4 + 3) + (1 + 5) + (2 + 6) + 7
    assert prompt_ids(texts["join"], 32_000)[: 17 + 6] == prompt_ids(texts["left"], 32_000) + list(
        token_ids(texts["left"].answer, 32_000)
    )


def test_one_prefix_key_is_the_same_text_in_every_application():
    first, second = (
        prompt_ids(texts_of(App(name, "k", 0.0, (Node("n", "n", 5, 5, prefix=Prefix("shared", 40)),)))["n"], 32_000)
        for name in ("a", "b")
    )

    assert first[:40] == second[:40]
    assert first[40:] != second[40:]
    assert sha256(tuple(first)) != sha256(tuple(second))
