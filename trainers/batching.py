"""Which pairs are run together, and in which order: pure functions, the same for every reward type at one seed."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from trainers.pairs import TokenPair

# Tokens of a scoring forward: enough to fill a device, little enough for the activations of an 8B model.
_SCORING_TOKENS = 4096


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Order of an epoch's pairs; depends on nothing but these, so reward types at one seed are paired."""
    return [int(i) for i in np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)]


def steps_of_epoch(order: Sequence[int], effective_batch: int) -> list[list[int]]:
    """Effective batches of an epoch; the last may be short, none is dropped."""
    return [list(order[start : start + effective_batch]) for start in range(0, len(order), effective_batch)]


def split_step(
    step: Sequence[int], lengths: Mapping[int, int], *, world_size: int, accumulation: int
) -> list[list[list[int]]]:
    """[rank][forward] → positions: longest first into the forward with the fewest tokens, so that all are even.

    Every rank gets `accumulation` forwards, so collectives match; a forward may be empty.
    """
    forwards = world_size * accumulation
    most_pairs = -(-len(step) // forwards)
    groups: list[list[int]] = [[] for _ in range(forwards)]
    tokens = [0] * forwards
    for position in sorted(step, key=lambda position: (-lengths[position], position)):
        open_groups = (number for number in range(forwards) if len(groups[number]) < most_pairs)
        lightest = min(open_groups, key=lambda number: (tokens[number], number))
        groups[lightest].append(position)
        tokens[lightest] += lengths[position]
    # There and back again, so that no rank always gets the longer one.
    laps = [groups[start : start + world_size] for start in range(0, forwards, world_size)]
    laps = [lap if number % 2 == 0 else lap[::-1] for number, lap in enumerate(laps)]
    return [[lap[rank] for lap in laps] for rank in range(world_size)]


def scoring_groups(pairs: Sequence[TokenPair], tokens: int = _SCORING_TOKENS) -> Iterator[list[TokenPair]]:
    """Groups of pairs of about `tokens` tokens, longest first, so that what does not fit in memory fails at once."""
    group: list[TokenPair] = []
    size = 0
    for pair in sorted(pairs, key=lambda pair: (-pair.tokens, pair.index)):
        if group and size + pair.tokens > tokens:
            yield group
            group, size = [], 0
        group.append(pair)
        size += pair.tokens
    if group:
        yield group
