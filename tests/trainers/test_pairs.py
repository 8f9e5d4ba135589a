"""Tokens, draws, and micro-batches."""

import dataclasses
import pickle

import pytest

from trainers.data import worlds
from trainers.errors import DataError
from trainers.models.tiny import build_tokenizer
from trainers.pairs.packing import collate
from trainers.pairs.tokens import TokenFile, draw_order, tokenize_pairs, write_tokens
from trainers.specs import DrawSpec


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_a_draw_is_a_prefix_of_a_larger_draw_and_all_pairs_keep_their_order():
    assert draw_order(5, DrawSpec()) == [0, 1, 2, 3, 4]
    small, large = DrawSpec(max_pairs=3, seed=7), DrawSpec(max_pairs=9, seed=7)
    assert draw_order(20, small)[:3] == draw_order(20, large)[:3]
    assert draw_order(20, small) != draw_order(20, DrawSpec(max_pairs=3, seed=8))


def test_pairs_over_the_limit_are_left_out_counted_and_replaced(tokenizer):
    short = worlds.tiny_pairs("train")[:6]
    long = [dataclasses.replace(pair, chosen=" ".join(["yes"] * 50)) for pair in short]
    draw = DrawSpec(max_pairs=6, max_response_tokens=20)
    kept, counts = tokenize_pairs([*short, *long], tokenizer, draw)
    assert sorted(pair.index for pair in kept) == list(range(6))
    assert 1 <= counts.too_long <= 6


def test_pairs_of_the_same_tokens_and_words_that_are_unknown_are_counted(tokenizer):
    """The tiny template trims, so that one side's spaces are no tokens; pairs that are left out are not counted."""
    pair = worlds.tiny_pairs("train")[0]
    sides = [
        ("yes", "yes"),
        ("yes", "yes  "),
        ("yes", "no"),
        ("yes", "zebra quark"),
        ("yes yes yes", "yes yes yes"),
    ]
    pairs = [dataclasses.replace(pair, chosen=a, rejected=b) for a, b in sides]
    tokens, counts = tokenize_pairs(pairs, tokenizer, DrawSpec(max_response_tokens=3))
    whole = [row.prompt + row.chosen + row.rejected for row in tokens]
    assert (counts.identical, counts.too_long, counts.tokens) == (2, 1, sum(map(len, whole)))
    assert counts.unknown_tokens == sum(row.count(tokenizer.unk_token_id) for row in whole) >= 2
    # A token that ends a text is no unknown word.
    bare = build_tokenizer()
    bare.unk_token = bare.eos_token
    assert tokenize_pairs(worlds.tiny_pairs("test"), bare, DrawSpec())[1].unknown_tokens == 0
    with pytest.raises(DataError, match="over the limit"):
        tokenize_pairs(worlds.tiny_pairs("test"), tokenizer, DrawSpec(max_prompt_tokens=1))


def test_tokens_survive_their_file(tokenizer, tmp_path):
    tokens, _ = tokenize_pairs(worlds.tiny_pairs("test"), tokenizer, DrawSpec())
    tokens[1] = dataclasses.replace(tokens[1], unscored=[1, 0])
    write_tokens(tokens, tmp_path / "pairs.arrow")
    found = TokenFile(tmp_path / "pairs.arrow")
    assert list(found) == tokens
    assert isinstance(found, TokenFile)
    assert list(pickle.loads(pickle.dumps(found))) == tokens
    assert found.mean_tokens() == {
        part: sum(len(getattr(pair, part)) for pair in tokens) / len(tokens)
        for part in ("prompt", "chosen", "rejected")
    }


def parts_of(batch, count):
    """(the tokens before each response token, the response tokens) of every response, read from the row."""
    ids_N = batch.input_ids_BT.flatten()
    for number in range(count):
        mine = batch.owner_M == number
        yield ids_N[batch.predictor_M[mine]].tolist(), ids_N[batch.response_M[mine]].tolist()


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_a_micro_batch_knows_its_response_tokens_and_what_comes_before_them(tokenizer, layout):
    tokens, _ = tokenize_pairs(worlds.tiny_pairs("test")[:3], tokenizer, DrawSpec())
    tokens[1] = dataclasses.replace(tokens[1], unscored=[2, 1])
    batch = collate(tokens, layout=layout, pad_id=0)
    sides = [(pair, side) for side in (0, 1) for pair in tokens]
    # What is not scored stands before the response, as a prompt of its own would.
    halves = [
        (pair.prompt + whole[: pair.unscored[side]], pair.scored[side])
        for pair, side in sides
        for whole in [(pair.chosen, pair.rejected)[side]]
    ]
    found = list(parts_of(batch, len(halves)))
    assert found == [([prompt[-1], *response[:-1]], response) for prompt, response in halves]
    assert batch.target_M.tolist() == [token for _, response in halves for token in response]
    ids_N = batch.input_ids_BT.flatten()
    assert ids_N[batch.last_R].tolist() == [response[-1] for _, response in halves]
    assert batch.indices == tuple(pair.index for pair in tokens)


def test_a_packed_row_is_each_prompt_once_and_its_two_responses_with_positions_that_start_after_it(tokenizer):
    tokens, _ = tokenize_pairs(worlds.tiny_pairs("test")[:3], tokenizer, DrawSpec())
    batch = collate(tokens)
    rows = [pair.prompt + pair.chosen + pair.rejected for pair in tokens]
    assert batch.input_ids_BT.tolist() == [[token for row in rows for token in row]]
    assert batch.tokens == sum(pair.tokens for pair in tokens) == batch.input_ids_BT.numel()
    positions = []
    for pair in tokens:
        after = len(pair.prompt)
        positions += [*range(after + len(pair.chosen)), *range(after, after + len(pair.rejected))]
    assert batch.position_ids_BT.tolist() == [positions]
    assert batch.attention_mask_BT is None


def test_padded_rows_are_each_whole_conversation(tokenizer):
    tokens, _ = tokenize_pairs(worlds.tiny_pairs("test")[:3], tokenizer, DrawSpec())
    batch = collate(tokens, layout="rows", pad_id=7)
    rows = [pair.prompt + pair.chosen for pair in tokens] + [pair.prompt + pair.rejected for pair in tokens]
    width = max(map(len, rows))
    assert batch.input_ids_BT.tolist() == [row + [7] * (width - len(row)) for row in rows]
    assert batch.attention_mask_BT.sum(1).tolist() == [len(row) for row in rows]
    assert batch.tokens == sum(map(len, rows))
    assert batch.layout is None
