"""Drawing a policy's answers to prompts, and the files that keep them. Best of n chooses among these answers."""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainers.data.records import Message, Pair, listed_turns
from trainers.errors import ModelError, OutOfMemory
from trainers.models.architecture import ANSWERS_AT_ONCE
from trainers.pairs.tokens import tokenize_pairs
from trainers.specs import DrawSpec, SamplingSpec
from trainers.storage import Location, replace

if TYPE_CHECKING:
    from trainers.models.generation import Weights

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
    """Answer the distinct prompts of the drawn `pairs`. Pieces that are drawn are kept in `kept`.

    Without `ends`, the policy's generation config names the tokens that end an answer. Every piece has its own seed, so a
    run that was killed and resumed draws the same answers as one that was not.
    """
    tokenizer = policy.tokenizer()
    distinct = list({pair.prompt: pair for pair in pairs}.values())
    asked, _ = tokenize_pairs(distinct, tokenizer, draw)
    engine = {"transformers": _transformers, "vllm": _vllm}[sampling.engine]
    loaded = functools.cache(lambda: engine(policy, ends or _ends(policy), sampling))
    a_piece, found = max(1, ANSWERS_AT_ONCE // sampling.samples), list[Answers]()
    for start in range(0, len(asked), a_piece):
        some, file = asked[start : start + a_piece], kept / f"answers-{start}.json"
        try:
            drawn = json.loads(file.read_text())
        except (FileNotFoundError, ValueError):
            digest = hashlib.sha256(f"{sampling.sampling_seed} {start}".encode()).digest()
            drawn = loaded()([pair.prompt for pair in some], int.from_bytes(digest[:4]))
            replace(file, json.dumps(drawn))
        for pair, tokens in zip(some, drawn, strict=True):
            texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
            ended = [len(ids) < sampling.max_new_tokens for ids in tokens]
            found.append(Answers(distinct[pair.index].prompt, texts, ended))
        report({"done": len(found), "total": len(asked)})
    return found


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
                # Smaller batches draw other answers, of the same distribution.
                at_once //= 2
                continue
            return [list(itertools.chain(*answers)) for answers in zip(*parts, strict=True)]

    return draw


def _vllm(policy: "Weights", ends: Sequence[int], sampling: SamplingSpec) -> Draw:
    """Draw by vLLM, written against its source of 2026-11. Untested: it needs a GPU."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=policy.location,
        revision=policy.revision,
        dtype="bfloat16" if policy.precision == "bf16" else "float32",
        trust_remote_code=policy.trust.trust_remote_code,
    )

    def draw(prompts: list[Tokens], seed: int) -> list[list[Tokens]]:
        # vLLM seeds the answers to a prompt by seed, seed + 1, …; no two answers may share theirs. Its defaults draw from
        # the full distribution. The end token of the tokenizer, which it would add to `ends`, may be another one.
        how = [
            SamplingParams(
                n=sampling.samples,
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(ends),
                ignore_eos=True,
                seed=seed + number * sampling.samples,
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        drawn = model.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
        return [
            [
                list(itertools.takewhile(lambda token: token not in ends, one.token_ids))
                for one in each.outputs
            ]
            for each in drawn
        ]

    return draw


def scored_pairs(answers: Iterable[Answers]) -> Iterator[Pair]:
    """Yield pairs of distinct answers such that every answer is scored. Neither of a pair is the better one."""
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
    # Answers may hold U+2028 and the like, at which str.splitlines would break a line.
    rows = map(json.loads, file.read_text(encoding="utf-8").split("\n")[:-1])
    return [Answers(tuple(Message(*turn) for turn in prompt), *rest) for prompt, *rest in rows]
