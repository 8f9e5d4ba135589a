"""Answers of a policy: a process that is killed loses none, and which judges know which prompts."""

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from trainers import versions
from trainers.data import worlds
from trainers.data.records import Pair, user_prompt
from trainers.data.verifiers import VERIFIERS
from trainers.errors import ModelError, OutOfMemory, SpecError
from trainers.evaluate import sampling
from trainers.evaluate.sampling import draw_answers, read_answers, scored_pairs, write_answers
from trainers.models import generation
from trainers.models.generation import Weights
from trainers.models.tiny import build_tokenizer
from trainers.specs import UNTRUSTED, DrawSpec, SamplingSpec

PAIRS = worlds.candidate_pairs("test")[:60]
ASKED = SamplingSpec(samples=5, max_new_tokens=4, temperature=1.5)
ALL = DrawSpec()
END = build_tokenizer().eos_token_id


@pytest.fixture
def policy(tiny_model):
    return Weights(location=str(tiny_model), revision=None, precision="fp32", trust=UNTRUSTED)


def drawn(policy, folder, asked=ASKED, draw=ALL, ends=(END,)):
    return draw_answers(policy, ends, PAIRS, draw, asked, folder, lambda row: None)


def test_sampling_that_was_killed_goes_on_and_writes_the_same_bytes(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "ANSWERS_AT_ONCE", 10)
    write_answers(drawn(policy, tmp_path / "whole"), tmp_path / "whole.jsonl")
    calls, generate = [], generation.generate

    def killed(*words, **more):
        calls.append(words)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*words, **more)

    monkeypatch.setattr(generation, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        drawn(policy, tmp_path / "broken")
    # Ten prompts of six pairs each, two prompts a piece: two pieces of five are there.
    kept = sorted((tmp_path / "broken").iterdir())
    assert len(kept) == 2
    # The second was cut: it is drawn again.
    kept[1].write_bytes(kept[1].read_bytes()[:-5])
    write_answers(drawn(policy, tmp_path / "broken"), tmp_path / "again.jsonl")
    assert len(calls) == 3 + 4
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    found = read_answers(tmp_path / "whole.jsonl")
    assert [item.prompt for item in found] == list(dict.fromkeys(pair.prompt for pair in PAIRS))
    assert {len(item.texts) for item in found} == {5}


def test_the_same_version_draws_the_same_answers(policy, tmp_path):
    golden = {
        2: [
            ["i 1 7 gladly", "no fetch join 4", "frankly edges usually fetch", "", "welcome sometimes"],
            [
                "frankly 2 tools mend",
                "0 sure 2 hardly",
                "5 join 0",
                "no blankets usually tea",
                "i carry no send",
            ],
        ]
    }
    found = drawn(policy, tmp_path, draw=DrawSpec(max_pairs=2))
    assert [item.texts for item in found] == golden[versions.SAMPLE]


def test_a_seed_draws_answers_of_its_own(policy, tmp_path):
    seeded = replace(ASKED, sampling_seed=1)
    first, other = (drawn(policy, tmp_path / str(asked.sampling_seed), asked) for asked in (ASKED, seeded))
    assert [item.texts for item in other] != [item.texts for item in first]


def test_where_memory_is_short_fewer_answers_are_drawn_at_once(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "ANSWERS_AT_ONCE", 10)
    asked, generate = list[int](), generation.generate

    def in_little_memory(model, prompts, *, samples, batch, **more):
        asked.append(batch)
        if batch > 3:
            raise OutOfMemory("too little")
        return generate(model, prompts, samples=samples, batch=batch, **more)

    monkeypatch.setattr(generation, "generate", in_little_memory)
    found = drawn(policy, tmp_path, draw=DrawSpec(max_pairs=2))
    # 5 answers of each by 2, 2 and 1.
    assert asked == [10, 5, 2, 2, 2]
    assert {len(item.texts) for item in found} == {5}


def test_vllm_ends_answers_where_transformers_does_and_no_two_share_a_seed(policy, tmp_path, monkeypatch):
    """A stand-in that does what vLLM's source says of what it is asked: it seeds the answers to a prompt by seed, seed + 1, …"""
    seeds, word = list[int](), 7

    class Model:
        def __init__(self, model, *, revision, dtype, trust_remote_code):
            assert (model, dtype) == (policy.location, "float32")

        def generate(self, prompts, params, *, use_tqdm):
            assert all(asked.ignore_eos and asked.stop_token_ids == [END] for asked in params)
            seeds.extend(asked.seed + at for asked in params for at in range(asked.n))
            said = SimpleNamespace(token_ids=(word, END, word))
            return [SimpleNamespace(outputs=[said] * asked.n) for asked in params]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Model, SamplingParams=SimpleNamespace))
    found = drawn(policy, tmp_path, asked=SamplingSpec(samples=5, engine="vllm"))
    assert len(set(seeds)) == len(found) * 5
    assert {text for item in found for text in item.texts} == {policy.tokenizer().decode([word])}


def test_every_distinct_answer_is_in_a_pair_and_read_as_it_was_written(tmp_path):
    texts = [["a"], ["a", "a", "b"], ["a", "b", "c\u2028\x85", "a"], ["line\nline\r\n", '"']]
    answers = [
        sampling.Answers(user_prompt(f"\u2029{at}"), said, [True] * len(said))
        for at, said in enumerate(texts)
    ]
    pairs = [(pair.chosen, pair.rejected) for pair in scored_pairs(answers[:3])]
    assert pairs == [("a", "a"), ("a", "b"), ("a", "b"), ("c\u2028\x85", "a")]
    write_answers(answers, tmp_path / "answers.jsonl")
    assert read_answers(tmp_path / "answers.jsonl") == answers


def test_what_could_not_be_sampled_is_refused(policy, tmp_path, tiny_model):
    for change, said in (
        ({"samples": 1}, "--samples 1"),
        ({"temperature": 0.0}, "all answers to a prompt are one"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
    ):
        with pytest.raises(SpecError, match=said):
            SamplingSpec(**change)
    # A policy that does not say what ends an answer.
    shutil.copytree(tiny_model, tmp_path / "mute", ignore=shutil.ignore_patterns("generation_config.json"))
    mute = replace(policy, location=str(tmp_path / "mute"))
    with pytest.raises(ModelError, match="no generation_config"):
        drawn(mute, tmp_path / "answers", ends=())


GRAPH = worlds.hamiltonian_pairs("test")[0]


@pytest.mark.parametrize(
    ("name", "prompt", "right", "wrong"),
    [
        ("hamiltonian", GRAPH.prompt[0].content, [GRAPH.chosen], [GRAPH.rejected, "", "0 1 1"]),
        ("arithmetic", "What is 12 + 3 * 4?", ["24", "12 + 12 = 24", "It is 24.0."], ["", "25", "24, or 25"]),
        ("arithmetic", "Compute 1.5 × 2 - 10", ["-7", "−8? No, −7"], ["7"]),
        ("arithmetic", "What is 1,000 + 05 − 2?", ["1,003", "It is 01003."], ["3", "1000"]),
        (
            "tiny_world",
            "i often share bread at home",
            ["frankly yes", "seemingly certainly"],
            ["frankly no", "yes", "frankly yes yes", "yes frankly", ""],
        ),
    ],
)
def test_a_verifier_knows_its_prompts_and_tells_right_from_wrong(name, prompt, right, wrong):
    verifier = VERIFIERS[name]
    assert [known for known in VERIFIERS if VERIFIERS[known].knows(prompt)] == [name]
    assert [verifier.right(answer, prompt) for answer in right] == [True] * len(right)
    assert [verifier.right(answer, prompt) for answer in wrong] == [False] * len(wrong)


@pytest.mark.parametrize(
    "prompt",
    ["What is 12 / 4 + 3?", "(2 + 3) * 4?", "2 + 3 * (4 - 1)", "2 + 3 × 4 ÷ 2", "2 + 3 x 4", "50% of 2 + 2^3", "1 + 2 and 3 + 4"],
)  # fmt: skip
def test_a_part_of_a_longer_expression_is_not_known(prompt):
    assert not VERIFIERS["arithmetic"].knows(prompt)


def test_every_pair_of_a_built_in_set_is_judged_as_it_is_labelled():
    pairs: list[tuple[str, Pair]] = [("tiny_world", pair) for pair in worlds.request_pairs("test")]
    pairs += [("hamiltonian", pair) for pair in worlds.hamiltonian_pairs("test")]
    for name, pair in pairs:
        prompt = pair.prompt[0].content
        assert VERIFIERS[name].knows(prompt)
        assert VERIFIERS[name].right(pair.chosen, prompt)
        assert not VERIFIERS[name].right(pair.rejected, prompt)
