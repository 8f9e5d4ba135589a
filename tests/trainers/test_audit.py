"""What an audit finds, on texts with a known answer and on the real data beside the repository."""

import dataclasses
import itertools
import json
import tracemalloc
from collections.abc import Sequence

import pytest

from trainers.data.audit import (
    Audit,
    AuditSet,
    Finding,
    audit_set,
    audit_sets,
    distribution,
    length_baseline,
    originals,
    overlap_findings,
    read_set_audit,
    set_findings,
    wilson,
)
from trainers.data.overlaps import (
    NEAR,
    IndexedPairs,
    Overlap,
    TextIndex,
    jaccard,
    normalised,
    overlap,
    shingles,
)
from trainers.data.records import Message, Pair, user_prompt
from trainers.data.sources import has_split, read_pairs
from trainers.data.texts import UNKNOWN, language, looks_cut, similarity, token_overlap, words
from trainers.specs import DatasetSpec

ENGLISH = "The committee will meet again on Thursday to discuss how the new library ought to be paid for."
FRENCH = "Le comité se réunira de nouveau jeudi afin de discuter du financement de la nouvelle bibliothèque."
REAL = ("ultrafeedback", "ultrafeedback_paraphrase", "ultrafeedback_french", "rewardmath", "rewardbench_math")


def pair(prompt: str, chosen: str, rejected: str, original: str | None = None) -> Pair:
    return Pair(prompt=user_prompt(prompt), chosen=chosen, rejected=rejected, original_chosen=original)


def numbered(count: int, *, chosen: str = "{0} is right", rejected: str = "{0} is wrong") -> list[Pair]:
    return [pair(f"question {i}", chosen.format(i), rejected.format(i)) for i in range(count)]


def audited(pairs: Sequence[Pair], role: str = "eval", **more: object) -> dict[str, Finding]:
    """Findings by what was found."""
    data = AuditSet(name="set", role=role, pairs=pairs, **more)
    return {finding.what: finding for finding in set_findings(audit_set(data))}


def shared_by(train: Sequence[Pair], evaluated: Sequence[Pair]) -> tuple[Overlap, list[Finding]]:
    found = overlap(IndexedPairs(train), IndexedPairs(evaluated), names=("t", "e"))
    return found, list(overlap_findings(found))


def words_from(start: int, count: int) -> str:
    return " ".join(f"word{number}" for number in range(start, start + count))


@pytest.mark.parametrize(
    ("left", "right"),
    [("What is  2+2?", "what is 2+2?\n"), ("ﬁnd x²", "find x2"), ("Straße", "STRASSE")],
)
def test_case_white_space_and_compatible_characters_make_no_other_text(left: str, right: str):
    assert normalised(left) == normalised(right)
    assert TextIndex([left]).repeats_of(TextIndex(["else", right])).exact == (0,)


def test_a_text_with_a_word_changed_is_nearly_equal_and_another_or_a_short_one_is_not():
    known = TextIndex([words_from(0, 60), "is seven a prime number or not"])
    changed = words_from(0, 60).replace("word30", "other")
    short = "is five a prime number or not"
    found = TextIndex([words_from(500, 60), changed, words_from(0, 60), short]).repeats_of(known)
    assert (found.exact, found.near) == ((2,), (1,))
    assert shingles("one two three four five six seven").size == 0


def test_the_order_of_words_counts():
    text = words_from(0, 40).split()
    assert jaccard(shingles(" ".join(text)), shingles(" ".join(reversed(text)))) == 0.0


def test_minhash_misses_no_text_above_the_threshold():
    base = [words_from(1000 * number, 80) for number in range(200)]
    asked = [text.replace("7 ", "x ", 2) for text in base]
    expected = {
        row
        for row, (old, new) in enumerate(zip(base, asked, strict=True))
        if old != new and jaccard(shingles(old), shingles(new)) >= NEAR
    }
    assert len(expected) > 150
    assert set(TextIndex(asked).repeats_of(TextIndex(base)).near) == expected


def test_an_index_holds_much_less_than_its_texts():
    texts = [words_from(1000 * number, 400) for number in range(200)]
    other = TextIndex([words_from(0, 400)])
    tracemalloc.start()
    index = TextIndex(texts)
    found = other.repeats_of(index), index.repeats_of(other)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [item.exact for item in found] == [(0,), (0,)]
    assert held < sum(map(len, texts)) / 3


def test_a_candidate_below_the_threshold_is_not_nearly_equal():
    """Three of eighteen shingles differ: 15 of 21, which MinHash alone lets pass."""
    base = [words_from(100 * number, 20) for number in range(20)]
    asked = [f"{text.rpartition(' ')[0].replace('5 ', 'x ', 1)} end" for text in base]
    assert all(0.5 < jaccard(shingles(a), shingles(b)) < NEAR for a, b in zip(asked, base, strict=True))
    assert TextIndex(asked).repeats_of(TextIndex(base)).near == ()


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_has_the_published_intervals(successes: int, n: int, low: float, high: float):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_a_length_baseline_counts_ties_one_half():
    found = length_baseline([3, 1, 2, 5], [1, 3, 2, 4], "words")
    assert (found.longer_wins, found.shortcut, found.better) == (0.625, 0.625, "longer wins")
    assert not found.significant
    assert length_baseline([1] * 20, [2] * 20, "words").significant


def test_a_distribution_has_its_quantiles():
    names = ("mean", "least", "quartile_1", "median", "quartile_3", "percentile_95", "most")
    assert distribution(range(101)) == dict(zip(names, (50, 0, 25, 50, 75, 95, 100), strict=True))


def test_token_overlap_is_the_chance_that_two_drawn_tokens_are_equal():
    left, right = words("a a b"), words("a c")
    both = list(itertools.product(["<s>", *left], ["<s>", *right]))
    assert token_overlap(left, right) == sum(x == y for x, y in both) / len(both) == 3 / 12
    assert token_overlap(words("a b c"), words("d e f")) == 1 / 16, "only the begin token"


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (ENGLISH * 2, False),
        (ENGLISH * 2 + " And then", True),
        (ENGLISH * 2 + " And then,", True),
        ("And then", False),
        (ENGLISH * 2 + "\n- the last entry", False),
        (ENGLISH * 2 + " = 42", False),
        (ENGLISH * 2 + "\n```", False),
    ],
)
def test_a_long_text_without_an_end_looks_cut(text: str, cut: bool):
    assert looks_cut(text) is cut


def test_similarity_is_that_of_matching_blocks():
    assert similarity(ENGLISH, ENGLISH) == 1.0
    assert similarity("a b c", "d e f") == 0.0
    assert similarity("def f(x): return x + 1", "def f(x): return x - 1") == pytest.approx(18 / 20)
    assert similarity("a b c d", "b c d e") == pytest.approx(0.75)


def test_languages_are_told_where_there_is_text_to_tell_them_by():
    assert (language(ENGLISH), language(FRENCH)) == ("en", "fr")
    assert language("x = 3") == language("2 + 2 = 4, 3 + 3 = 6, " * 20) == UNKNOWN


def test_a_leak_is_a_prompt_or_a_long_response_that_training_has():
    train = [pair("What is two plus two?", "four", "five"), pair("else", words_from(0, 40), "no")]
    evaluated = [
        pair("what is two plus two? ", "4", "5"),
        pair("a new question", "four", "five"),
        pair("another new question", "yes", words_from(0, 40)),
        pair("a third one", words_from(0, 40), "no"),
    ]
    found, findings = shared_by(train, evaluated)
    assert found.leaked == (0, 3), "a short response says nothing; a long one that was chosen does"
    assert (found.prompts_exact, found.chosen_exact, found.rejected_exact) == (1, 2, 2)
    assert [finding.severity for finding in findings] == ["error"]
    assert "2 of 4 pairs" in findings[0].number
    found, findings = shared_by([pair("question 0", "a", "b")], numbered(30))
    assert (found.leaked, findings[0].severity) == ((0,), "warn"), "a single one of many"


def test_what_training_rejects_and_the_evaluation_prefers_is_found():
    train = [pair("a", "yes", words_from(0, 40))]
    found, findings = shared_by(train, [pair("b", words_from(0, 40), "no")])
    assert (found.chosen_as_rejected, found.leaked) == (1, ())
    assert findings[0].what == "label flipped"


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("{0} is right", "{0} is wrong"),
        # Longer in characters alone, which is no shortcut for a reader of tokens.
        ("{0} extraordinarily", "{0} no"),
        # Longer in characters and shorter in words.
        ("incomprehensibilities {0}", "a b c {0}"),
    ],
)
def test_a_set_without_faults_has_no_findings(chosen: str, rejected: str):
    assert audited(numbered(40, chosen=chosen, rejected=rejected)) == {}


def test_equal_contradicting_and_repeated_pairs_are_counted():
    same = pair("same", "text", "text")
    pairs = [*numbered(20), same, pair("p", "a", "b"), pair("P ", "b", "a"), pair("q", "c", "d")]
    found = audited([*pairs, pair("q", "c", "d")])
    assert found["chosen = rejected"].number == "1 of 25 pairs"
    assert found["contradicting pairs"].number == "2 of 25 pairs"
    assert found["repeated pairs"].number == "1 of 25 pairs"
    assert found["repeated prompts"].number == "23 prompts in 25 pairs"


def test_repeated_prompts_and_markers_of_templates_in_texts_are_found():
    asked = "How do I bake a loaf of bread at home without an oven, and how long will it take me to do all of that?"
    good = Pair(prompt=user_prompt(asked), chosen="In a pot.", rejected="Buy one.")
    repeated = Pair(prompt=good.prompt, chosen=f"{asked}\n\nIn a pot.", rejected=f"{asked}\n\nBuy one.")
    marked = Pair(prompt=user_prompt("<|im_start|>user\nhow?<|im_end|>"), chosen="[INST] so", rejected="no")
    found = audit_set(AuditSet(name="set", role="train", pairs=[good, repeated, marked]))
    assert (found.prompt_repeated, found.templated) == (1, 2)


def test_rows_that_are_no_pair_are_an_error():
    found = audited(numbered(9), unreadable=["file.jsonl, row 3: column 'chosen' is empty."])
    assert found["rows that are no pair"].severity == "error"
    assert "1 of 10 rows" in found["rows that are no pair"].number
    assert "row 3" in found["rows that are no pair"].number


@pytest.mark.parametrize(
    ("longer", "role", "severity"), [(40, "eval", "error"), (27, "eval", "warn"), (27, "train", "info")]
)
def test_a_length_shortcut_is_judged_by_its_strength_and_the_sets_role(longer: int, role: str, severity: str):
    pairs = [pair(f"q {i}", "one two three" if i < longer else "one", "one two") for i in range(40)]
    assert audited(pairs, role)["length shortcut"].severity == severity


def test_cut_responses_are_worse_on_one_side():
    cut, whole = f"{ENGLISH} {ENGLISH} and then", f"{ENGLISH} {ENGLISH}"
    found = audited([pair(f"q {i}", cut if i < 9 else whole, whole) for i in range(30)])
    assert found["unfinished responses"].severity == "warn"
    assert found["unfinished responses"].number == "9 of 30 chosen, 0 of 30 rejected"


def test_with_a_tokenizer_lengths_and_overlaps_are_in_tokens_too():
    data = AuditSet(name="set", role="eval", pairs=[pair("p q", "abc", "de")], rewrites=[("abc", "de")])
    found = audit_set(data, tokenize=lambda text: [ord(letter) for letter in text])
    assert {column: units["tokens"]["mean"] for column, units in found.lengths.items()} == {
        "prompt": 3,
        "chosen": 3,
        "rejected": 2,
    }
    assert [item.unit for item in found.baselines] == ["characters", "words", "tokens"]
    # Four different tokens and three, the begin token among them.
    assert found.rewriting.itself == pytest.approx((4 / 16 + 3 / 9) / 2)


def test_responses_in_two_languages_are_found():
    found = audited([pair(f"q {i}", FRENCH, ENGLISH) for i in range(10)])
    assert found["responses in two languages"].number == "10 of 10 pairs looked at"


def test_a_rewriting_is_compared_with_its_originals():
    pairs = numbered(10, chosen="{0} entirely other words here", rejected="{0} nothing of it stays")
    before = [(f"{i} was said in this way", f"{i} came about like that") for i in range(10)]
    found = audited(pairs, rewrites=before)["token overlap with the original"]
    assert (found.severity, "0 of 20 responses unchanged" in found.number) == ("info", True)
    copied = [(item.chosen, item.rejected) for item in pairs]
    assert audited(pairs, rewrites=copied)["token overlap with the original"].severity == "warn"


def test_originals_are_found_by_the_rows_own_word_or_by_the_prompt():
    known = [pair("a", "A+", "A-"), pair("b", "B+", "B-"), pair("c", "C1", "C-"), pair("c", "C2", "C-")]
    told = [pair("a", "x", "y", "A+"), pair("a", "x", "y", "elsewhere"), pair("b", "x", "y")]
    assert originals(told, known, declared=False) == [("A+", "A-"), ("elsewhere", ""), None]
    declared = [pair("b", "x", "y"), pair("c", "x", "y"), pair("d", "x", "y")]
    assert originals(declared, known, declared=True) == [("B+", "B-"), None, None]


def test_an_audit_read_back_is_the_same():
    data = AuditSet(name="set", role="eval", pairs=numbered(12), rewrites=[("a", "b")] * 12)
    found = audit_set(data)
    record = json.loads(json.dumps(dataclasses.asdict(found)))
    assert read_set_audit(record, "set", "eval") == found
    assert read_set_audit(record, "other", "train").name == "other"


def real_set(shared, name: str, role: str) -> AuditSet | None:
    spec, split = (
        DatasetSpec(name=name, source=str(shared / "data" / name)),
        "train" if role == "train" else "test",
    )
    if not has_split(spec, split):
        return None
    pairs = read_pairs(spec, split)
    return AuditSet(
        name=name,
        role=role,
        pairs=pairs,
        rewrites=originals(pairs, read_pairs_of_ultrafeedback(shared), declared=False),
    )


def read_pairs_of_ultrafeedback(shared) -> list[Pair]:
    spec = DatasetSpec(name="ultrafeedback", source=str(shared / "data" / "ultrafeedback"))
    return [*read_pairs(spec, "train"), *read_pairs(spec, "test")]


@pytest.fixture(scope="module")
def real(shared) -> Audit:
    """The audit of everything in ../shared/data."""
    sets = {
        role: [found for name in REAL if (found := real_set(shared, name, role))]
        for role in ("train", "eval")
    }
    return audit_sets(sets["train"], sets["eval"])


def test_real_leaks_are_found(real):
    between = {(item.train, item.evaluated): item for item in real.between}
    math = between["rewardmath", "rewardmath"]
    assert (math.prompts_exact, math.chosen_exact, math.rejected_exact) == (198, 198, 0)
    bench = between["rewardmath", "rewardbench_math"]
    assert bench.prompts_exact == 181
    assert 181 <= len(bench.leaked) <= 183
    clean = [item for pair, item in between.items() if "ultrafeedback" in pair]
    assert clean
    assert not any(item.leaked for item in clean)
    errors = [item.where for item in real.findings if item.what == "leak"]
    assert errors == [
        "rewardmath evaluated, rewardmath trained on",
        "rewardbench_math evaluated, rewardmath trained on",
    ]


def test_real_length_shortcuts_are_found(real):
    baselines = {item.name: item.baselines[0] for item in real.sets if item.role == "eval"}
    assert 1 - baselines["rewardbench_math"].longer_wins == pytest.approx(0.945)
    assert 1 - baselines["rewardmath"].longer_wins == pytest.approx(0.6375)
    assert baselines["ultrafeedback"].longer_wins == pytest.approx(0.5775)
    shortcuts = [item for item in real.findings if item.what == "length shortcut"]
    found = {item.where: item for item in shortcuts if item.severity != "info"}
    assert "0.945" in found["rewardbench_math"].number
    assert "0.638" in found["rewardmath"].number
    assert (found["rewardmath"].severity, found["rewardbench_math"].severity) == ("warn", "error")
    assert "0.578 in characters" in found["ultrafeedback"].number


def test_responses_that_say_the_same_and_call_other_tools_are_not_identical():
    called = [
        Message("assistant", "a", f'{{"tool_calls": [{{"function": {{"name": "{name}"}}}}]}}')
        for name in "fg"
    ]
    same = pair("q", "a", "a")
    others = dataclasses.replace(same, chosen_turns=(called[0],), rejected_turns=(called[1],))
    assert audit_set(AuditSet(name="set", role="eval", pairs=[same, others])).identical == 1


def test_the_real_identical_pair_and_cut_translations_are_found(real):
    sets = {(item.name, item.role): item for item in real.sets}
    assert {name: item.identical for name, item in sets.items() if item.identical} == {
        (name, "train"): 1 for name in ("ultrafeedback", "ultrafeedback_paraphrase", "ultrafeedback_french")
    }
    french = sets["ultrafeedback_french", "eval"]
    assert french.cut["chosen"] > french.cut["rejected"] > sets["ultrafeedback", "eval"].cut["rejected"]
    assert (next(iter(french.languages["prompt"])), next(iter(french.languages["chosen"]))) == ("en", "fr")


def test_real_rewritings_share_half_the_tokens_that_an_original_shares_with_itself(real):
    """Paper §2 has 0.048, 0.023 and 0.019 with Llama's tokenizer; words have more repetitions."""
    for name in ("ultrafeedback_paraphrase", "ultrafeedback_french"):
        found = next(item.rewriting for item in real.sets if (item.name, item.role) == (name, "eval"))
        assert found.responses > 390
        assert found.itself == pytest.approx(0.057, abs=0.003)
        assert 0.4 < found.overlap / found.itself < 0.6
