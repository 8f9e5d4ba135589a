"""Tokens, draws, and the split of a step among ranks and forwards."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.data import tiny_world
from trainers.data.records import Pair, user_prompt
from trainers.errors import DataError, ModelError
from trainers.pairs import (
    collate,
    draw_order,
    epoch_order,
    read_tokens,
    split_step,
    steps_of_epoch,
    tokenize_pairs,
    write_tokens,
)
from trainers.specs import DrawSpec
from trainers.tiny import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=40),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_every_pair_of_a_step_is_run_once_and_every_rank_runs_as_many_forwards(
    lengths, world_size, accumulation, micro_batch
):
    effective_batch = world_size * accumulation * micro_batch
    for step in steps_of_epoch(list(range(len(lengths))), effective_batch):
        ranks = split_step(step, lengths, world_size=world_size, accumulation=accumulation)
        assert [len(forwards) for forwards in ranks] == [accumulation] * world_size
        assert max(len(forward) for forwards in ranks for forward in forwards) <= micro_batch
        assert sorted(i for forwards in ranks for forward in forwards for i in forward) == sorted(step)


def test_token_sums_are_even_among_ranks():
    lengths = [1000, 900, 800, 700, 100, 90, 80, 70]
    ranks = split_step(range(8), lengths, world_size=2, accumulation=4)
    sums = [sum(lengths[i] for forward in forwards for i in forward) for forwards in ranks]
    assert max(sums) / min(sums) < 1.1


def test_order_of_an_epoch_is_seeded_and_differs_between_epochs():
    assert epoch_order(50, seed=1, epoch=0) == epoch_order(50, seed=1, epoch=0)
    assert epoch_order(50, seed=1, epoch=0) != epoch_order(50, seed=1, epoch=1)
    assert sorted(epoch_order(50, seed=1, epoch=2)) == list(range(50))


def test_no_pair_is_dropped_at_the_end_of_an_epoch():
    assert [len(step) for step in steps_of_epoch(range(11), 4)] == [4, 4, 3]


def test_a_draw_is_a_prefix_of_a_larger_draw_and_all_pairs_keep_their_order():
    assert draw_order(5, DrawSpec()) == [0, 1, 2, 3, 4]
    small, large = DrawSpec(max_pairs=3, seed=7), DrawSpec(max_pairs=9, seed=7)
    assert draw_order(20, small)[:3] == draw_order(20, large)[:3]
    assert draw_order(20, small) != draw_order(20, DrawSpec(max_pairs=3, seed=8))


def test_tokens_are_those_of_the_whole_conversation(tokenizer):
    pair = tiny_world.pairs("train")[0]
    (tokens,), too_long = tokenize_pairs([pair], tokenizer, DrawSpec())
    whole = tokenizer.apply_chat_template(
        [*(message._asdict() for message in pair.prompt), {"role": "assistant", "content": pair.chosen}],
        tokenize=False,
    )
    assert tokens.prompt + tokens.chosen == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokens.chosen[-1] == tokenizer.eos_token_id
    assert tokens.prompt.count(tokenizer.bos_token_id) == 1
    assert too_long == 0


def test_pairs_over_the_limit_are_left_out_counted_and_replaced(tokenizer):
    short = tiny_world.pairs("train")[:6]
    long = [dataclasses.replace(pair, chosen=" ".join(["yes"] * 50)) for pair in short]
    draw = DrawSpec(max_pairs=6, max_response_tokens=20)
    kept, too_long = tokenize_pairs([*short, *long], tokenizer, draw)
    assert sorted(pair.index for pair in kept) == list(range(6))
    assert 1 <= too_long <= 6


def test_nothing_within_the_limit_is_an_error(tokenizer):
    with pytest.raises(DataError, match="over the limit"):
        tokenize_pairs(tiny_world.pairs("test"), tokenizer, DrawSpec(max_prompt_tokens=1))


def test_a_tokenizer_without_chat_template_is_refused_by_name(tokenizer):
    bare = build_tokenizer()
    bare.chat_template = None
    bare.name_or_path = "some/base-model"
    pair = Pair(prompt=user_prompt("hello"), chosen="yes", rejected="no")
    with pytest.raises(ModelError, match="some/base-model has no chat template"):
        tokenize_pairs([pair], bare, DrawSpec())


def test_tokens_survive_their_file(tokenizer, tmp_path):
    tokens, _ = tokenize_pairs(tiny_world.pairs("test"), tokenizer, DrawSpec())
    write_tokens(tokens, tmp_path / "pairs.parquet")
    assert read_tokens(tmp_path / "pairs.parquet") == tokens


def test_a_micro_batch_marks_responses_and_last_tokens(tokenizer):
    tokens, _ = tokenize_pairs(tiny_world.pairs("test")[:2], tokenizer, DrawSpec())
    batch = collate(tokens, pad_id=0)
    rows = [pair.prompt + pair.chosen for pair in tokens] + [pair.prompt + pair.rejected for pair in tokens]
    for number, row in enumerate(rows):
        assert batch.input_ids_RT[number, : len(row)].tolist() == row
        assert int(batch.last_R[number]) == len(row) - 1
        assert int(batch.attention_mask_RT[number].sum()) == len(row)
    responses = [pair.chosen for pair in tokens] + [pair.rejected for pair in tokens]
    assert batch.response_mask_RT.sum(1).tolist() == [len(response) for response in responses]
    assert torch.equal(
        batch.response_mask_RT & ~batch.attention_mask_RT.bool(), torch.zeros_like(batch.response_mask_RT)
    )
