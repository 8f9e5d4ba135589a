"""Answers that a policy draws to prompts, and the files that keep them: what best of n chooses among."""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainers.data.records import Message, Pair, listed_turns
from trainers.errors import ModelError, OutOfMemory
from trainers.pairs.tokens import tokenize_pairs
from trainers.specs import DrawSpec, SamplingSpec
from trainers.storage import Location, replace

if TYPE_CHECKING:
    from trainers.models.generation import Weights

# Drawn in one piece, and kept in one file until all are there.
ANSWERS_AT_ONCE = 256

Tokens = list[int]
# Takes prompts as tokens and a seed, and returns the answers to each, without the token that ends them.
Draw = Callable[[list[Tokens], int], list[list[Tokens]]]


class Answers(NamedTuple):
    """All answers to one prompt in the order in which they were drawn, and whether each ended before it was cut."""

    prompt: tuple[Message, ...]
    texts: list[str]
    ended: list[bool]


def draw_answers(
    policy: "Weights",
    ends: Sequence[int],
    pairs: Sequence[Pair],
    draw: DrawSpec,
    sampling: SamplingSpec,
    kept: Location,
    report: Callable[[dict[str, Any]], None],
) -> list[Answers]:
    """Ask each distinct prompt of `pairs` that the draw takes. What is drawn stands in `kept` piece by piece.

    Without `ends` the policy's generation config says what ends an answer. A piece has a seed of its own, so that a process that was killed and the next one draw what one would have drawn.
    """
    tokenizer = policy.tokenizer()
    distinct = list({pair.prompt: pair for pair in pairs}.values())
    asked, _ = tokenize_pairs(distinct, tokenizer, draw)
    engine = {"transformers": _transformers, "vllm": _vllm}[sampling.engine]
    loaded = functools.cache(lambda: engine(policy, ends or _ends(policy), sampling))
    a_piece, found = max(1, ANSWERS_AT_ONCE // sampling.samples), list[Answers]()
    for start in range(0, len(asked), a_piece):
        some, file = asked[start : start + a_piece], kept / f"answers-{start}.json"
        if not file.is_file():
            drawn = loaded()([pair.prompt for pair in some], _seed(sampling.sampling_seed, start))
            replace(file, json.dumps(drawn))
        for pair, tokens in zip(some, json.loads(file.read_text()), strict=True):
            texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
            ended = [len(ids) < sampling.max_new_tokens for ids in tokens]
            found.append(Answers(distinct[pair.index].prompt, texts, ended))
        report({"done": len(found), "total": len(asked)})
    return found


def _seed(seed: int, start: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:4])


def _ends(policy: "Weights") -> Sequence[int]:
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(policy.location, revision=policy.revision).eos_token_id
    except (OSError, ValueError) as error:
        raise ModelError(f"the policy {policy.location} has no generation_config.json ({error}).") from error
    if found is None:
        raise ModelError(f"the generation_config.json of the policy {policy.location} names no eos_token_id.")
    return [found] if isinstance(found, int) else found


def _transformers(policy: "Weights", ends: Sequence[int], sampling: SamplingSpec) -> Draw:
    from trainers.models.generation import generate

    model = policy.generator()

    def draw(prompts: list[Tokens], seed: int) -> list[list[Tokens]]:
        at_once = ANSWERS_AT_ONCE
        while True:
            counts = [min(at_once, sampling.samples - done) for done in range(0, sampling.samples, at_once)]
            try:
                parts = [
                    generate(
                        model,
                        prompts,
                        end=ends,
                        samples=count,
                        temperature=sampling.temperature,
                        max_new_tokens=sampling.max_new_tokens,
                        seed=seed + number,
                        batch=at_once,
                    )
                    for number, count in enumerate(counts)
                ]
            except OutOfMemory:
                if at_once == 1:
                    raise
                # Others of the same distribution are drawn then.
                at_once //= 2
                continue
            return [list(itertools.chain(*answers)) for answers in zip(*parts, strict=True)]

    return draw


def _vllm(policy: "Weights", ends: Sequence[int], sampling: SamplingSpec) -> Draw:
    """Draw by vLLM. We have not tried it: it needs a GPU."""
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(
        model=policy.location,
        revision=policy.revision,
        dtype="bfloat16" if policy.precision == "bf16" else "float32",
        trust_remote_code=policy.trust.trust_remote_code,
    )

    def draw(prompts: list[Tokens], seed: int) -> list[list[Tokens]]:
        how = SamplingParams(
            n=sampling.samples,
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=-1,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(ends),
            seed=seed,
            detokenize=False,
        )
        asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        return [
            [
                list(itertools.takewhile(lambda token: token not in ends, one.token_ids))
                for one in each.outputs
            ]
            for each in model.generate(asked, how, use_tqdm=False)
        ]

    return draw


def scored_pairs(answers: Iterable[Answers]) -> Iterator[Pair]:
    """Yield each distinct answer in a pair with the next one, so that each is scored; neither is the better one."""
    for prompt, texts, _ in answers:
        distinct = list(dict.fromkeys(texts))
        for place in range(0, len(distinct), 2):
            two = distinct[place], distinct[(place + 1) % len(distinct)]
            yield Pair(prompt=prompt, chosen=two[0], rejected=two[1])


def write_answers(answers: Iterable[Answers], file: Path) -> None:
    """Write the answers as lines of JSON, one a prompt."""
    rows = ([listed_turns(prompt), texts, ended] for prompt, texts, ended in answers)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_answers(file: Path) -> list[Answers]:
    """Read what `write_answers` wrote."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [Answers(tuple(Message(*turn) for turn in prompt), *rest) for prompt, *rest in rows]
