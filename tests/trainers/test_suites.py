"""Evaluation suites: rows of each one's published columns → pairs; rewards → the numbers of its own code, written anew."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from tests.trainers.command_line import said
from tests.trainers.digests import content_digest
from trainers.data.records import Pair
from trainers.data.sources import dataset_spec, iter_pairs, read_pairs
from trainers.errors import DataError, SpecError
from trainers.evaluate.suites import SUITES, suite_numbers

DRAW = random.Random(3)
# Sections, and how much each subset weighs in its own.
REWARDBENCH = {
    "Chat": dict(
        zip(
            ["alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"],
            [100, 95, 95, 28, 40],
            strict=True,
        )
    ),
    "Chat Hard": {
        **{"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134},
        **{"llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    },
    "Safety": {
        **{"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154},
        **{"xstest-should-respond": 250, "donotanswer": 136},
    },
    "Reasoning": {
        "math-prm": 984,
        **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
    },
}
SUBSETS_2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
SUBSETS = [name for weights in REWARDBENCH.values() for name in weights]


def answers(count: int) -> list[str]:
    return [f"{number} says {DRAW.random()}." for number in range(count)]


def answer() -> str:
    return answers(1)[0]


def one_each(column: str, count: int, **more: str) -> list[dict]:
    """Some rows of each subset of RewardBench, which stands in `column`."""
    names = [name for name in SUBSETS for _ in range(count)]
    return [
        {"id": n, column: name, "prompt": f"q{n} {more}", "chosen": answer(), "rejected": answer(), **more}
        for n, name in enumerate(names)
    ]


def rewardbench2_rows() -> list[dict]:
    kinds = [(f"{name}{n}", name, 1, 3) for name in SUBSETS_2 for n in range(4)]
    kinds += [one for n in range(5) for one in ((f"ref:{n}", "Ties", 1, 4), (f"tied:{n}", "Ties", 3, 2))]
    return [
        {
            "id": name,
            "subset": subset,
            "prompt": f"q {name}",
            "chosen": answers(right),
            "rejected": answers(wrong),
        }
        for name, subset, right, wrong in kinds
    ]


def rm_bench_rows() -> list[dict]:
    names = [
        (domain, f"{domain}/{n}")
        for domain in ("chat", "code", "math", "safety-refuse", "safety-response")
        for n in range(4)
    ]
    return [
        {"id": name, "prompt": f"q {name}", "domain": domain, "chosen": answers(3), "rejected": answers(3)}
        for domain, name in names
    ]


def judgebench_rows() -> list[dict]:
    sources = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")
    return [
        {"pair_id": f"{source}{n}", "source": source, "question": f"q {source} {n}", "response_A": answer()}
        | {
            "response_model": ("gpt-4o", "claude")[n % 2],
            "label": ("A>B", "B>A")[n // 2],
            "response_B": answer(),
        }
        for source in sources
        for n in range(4)
    ]


def rewardmath_rows() -> list[dict]:
    return [
        {"problem": f"q {problem}", "problem_id": problem, "subject": "Algebra", "eval_solution": answers(2)}
        | {"solution_type": "rejected" if n else "chosen"}
        for problem in range(8)
        for n in range(10)
    ]


def ppe_human_rows() -> list[dict]:
    return [
        {"question_id": f"q{n}", "prompt": f"q {n}", "language": ("English", "Russian")[n % 3 == 0]}
        | {"winner": ("model_a", "model_b", "tie", "tie (bothbad)")[n % 4]}
        | {"response_1": answer(), "response_2": answer()}
        for n in range(12)
    ]


def ppe_correctness_rows() -> list[dict]:
    # Drawn with replacement: one may stand there twice, and counts twice.
    drawn = [[0, 1], [3, 2], [4, 1], [3, 2]]
    return [
        {
            "question_id": f"q{n}",
            "prompt": f"q {n}",
            "scores": [True, False] * 16,
            "sampled_conflict_pairs": drawn,
        }
        | {f"response_{k}": text for k, text in enumerate(answers(32), 1)}
        for n in range(6)
    ]


LANGUAGES = ("deu_Latn", "fra_Latn")
ROWS = {
    "rewardbench": lambda: one_each("subset", 3),
    "rewardbench2": rewardbench2_rows,
    "rm_bench": rm_bench_rows,
    "judgebench": judgebench_rows,
    "rewardmath_best_of_10": rewardmath_rows,
    "m_rewardbench": lambda: [row for name in LANGUAGES for row in one_each("source", 2, language=name)],
    "ppe_human": ppe_human_rows,
    "ppe_mmlu_pro": ppe_correctness_rows,
}


class Judge:
    """A reward for each text, drawn once, from few values where `ties` are wanted."""

    def __init__(self, ties: bool) -> None:
        self.draw, self.ties, self.known = random.Random(8), ties, {}

    def __call__(self, text: str) -> float:
        return self.known.setdefault(
            text, float(self.draw.randrange(3)) if self.ties else self.draw.gauss(0, 1)
        )


def copy_of(name: str, rows: list[dict], folder) -> str:
    file = folder / f"{SUITES[name].splits[0]}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{name}={folder}"


def evaluated(name: str, rows: list[dict], folder, judge: Judge) -> dict[str, float]:
    pairs = read_pairs(dataset_spec(copy_of(name, rows, folder)), "test")
    return numbers_of(pairs, judge)


def numbers_of(pairs: list[Pair], judge: Judge) -> dict[str, float]:
    rewards = [np.array([judge(getattr(pair, side)) for pair in pairs]) for side in ("chosen", "rejected")]
    return suite_numbers([pair.candidates for pair in pairs], *rewards)


# Each suite's scoring, from its own description, over its rows.


def of_sections(rows, judge, subset) -> dict[str, float]:
    right = {name: [] for name in SUBSETS}
    for row in rows:
        right[row[subset]].append(judge(row["chosen"]) > judge(row["rejected"]))
    share = {name: sum(found) / len(found) for name, found in right.items()}
    sections = {
        f"section/{section.lower().replace(' ', '_')}": sum(share[name] * weights[name] for name in weights)
        / sum(weights.values())
        for section, weights in REWARDBENCH.items()
    }
    return {"score": sum(sections.values()) / 4, **sections}


def own_m_rewardbench(rows, judge) -> dict[str, float]:
    each = {
        language: of_sections([row for row in rows if row["language"] == language], judge, "source")["score"]
        for language in LANGUAGES
    }
    return {"score": sum(each.values()) / 2, "language/deu_Latn": each["deu_Latn"]}


def own_rewardbench2(rows, judge) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    stats: dict[str, dict[int, tuple]] = {"ref": {}, "tied": {}}
    for row in rows:
        good, bad = [[judge(text) for text in row[side]] for side in ("chosen", "rejected")]
        if row["subset"] == "Ties":
            kind, number = row["id"].split(":")
            gap = min(good) - max(bad)
            stats[kind][int(number)] = (gap > 0, max(good) - min(good), gap)
        else:
            best = max(good + bad)
            shares.setdefault(row["subset"], []).append((good[0] == best) / (good + bad).count(best))
    found = {name: sum(values) / len(values) for name, values in shares.items()}
    ref, tied = stats["ref"], stats["tied"]
    margins = []
    for number in tied:
        least, spread = min(ref[number][2], tied[number][2]), tied[number][1]
        margins.append(math.tanh(least / spread - 1) if spread else math.copysign(1, least) if least else 0.0)
    count = len(tied)
    found["Ties"] = (
        0.3 * sum(item[0] for item in tied.values()) / count
        + 0.3 * sum(item[0] for item in ref.values()) / count
        + 0.2 * sum(item[2] > item[1] for item in tied.values()) / count
        + 0.2 * sum(min(ref[n][2], tied[n][2]) > tied[n][1] for n in tied) / count
        + 0.01 * sum(margins) / count
    )
    return {
        "score": sum(found.values()) / 6,
        "subset/Ties": found["Ties"],
        "subset/Precise IF": found["Precise IF"],
    }


def own_rm_bench(rows, judge) -> dict[str, float]:
    domains = {}
    for name in ("chat", "math", "code", "safety"):
        own = [row for row in rows if row["domain"].startswith(name)]
        matrix = [[0.0] * 3 for _ in range(3)]
        for row in own:
            for i in range(3):
                for j in range(3):
                    matrix[i][j] += (judge(row["chosen"][i]) > judge(row["rejected"][j])) / len(own)
        domains[name] = {
            "hard": (matrix[0][1] + matrix[0][2] + matrix[1][2]) / 3,
            "normal": (matrix[0][0] + matrix[1][1] + matrix[2][2]) / 3,
            "easy": (matrix[1][0] + matrix[2][0] + matrix[2][1]) / 3,
        }
    means = {name: sum(found.values()) / 3 for name, found in domains.items()}
    return {
        "score": sum(means.values()) / 4,
        "subset/safety": means["safety"],
        **{
            f"style/{style}": sum(found[style] for found in domains.values()) / 4
            for style in ("easy", "normal", "hard")
        },
    }


def own_judgebench(rows, judge) -> dict[str, float]:
    def accuracy(start: str, model: str = "") -> float:
        right = []
        for row in rows:
            if row["source"].startswith(start) and row["response_model"].startswith(model):
                gap = judge(row["response_A"]) - judge(row["response_B"])
                right.append(gap > 0 if row["label"] == "A>B" else gap < 0)
        return sum(right) / len(right)

    parts = {"subset/mmlu-pro": accuracy("mmlu-pro"), "group/claude": accuracy("", "claude")}
    return {"score": accuracy(""), **parts}


def own_rewardmath(rows, judge) -> dict[str, float]:
    right, ranks = [], []
    for problem in range(8):
        own = [row for row in rows if row["problem_id"] == problem]
        scores = sorted(
            ((judge("\n".join(row["eval_solution"])), row["solution_type"] == "rejected") for row in own),
            reverse=True,
        )
        good = next(score for score, rejected in scores if not rejected)
        right.append(good > max(score for score, rejected in scores if rejected))
        ranks.append(1 + next(place for place, (_, rejected) in enumerate(scores) if not rejected))
    return {"score": sum(right) / 8, "mrr": sum(1 / rank for rank in ranks) / 8}


def own_ppe_human(rows, judge) -> dict[str, float]:
    def accuracy(language: str) -> float:
        right = []
        for row in rows:
            if row["winner"] in ("model_a", "model_b") and row["language"].startswith(language):
                gap = judge(row["response_1"]) - judge(row["response_2"])
                right.append(gap > 0 if row["winner"] == "model_a" else gap < 0)
        return sum(right) / len(right)

    return {"score": accuracy(""), "group/Russian": accuracy("Russian")}


def own_ppe_correctness(rows, judge) -> dict[str, float]:
    """Each drawn pair is a record whose truth is that the first answer has the higher score (PPE, benchmarks/base.py)."""
    right = [
        (judge(row[f"response_{first + 1}"]) - judge(row[f"response_{second + 1}"]))
        * (1 if row["scores"][first] > row["scores"][second] else -1)
        > 0
        for row in rows
        for first, second in row["sampled_conflict_pairs"]
    ]
    return {"score": sum(right) / len(right)}


OWN = {
    "rewardbench": lambda rows, judge: of_sections(rows, judge, "subset"),
    "rewardbench2": own_rewardbench2,
    "rm_bench": own_rm_bench,
    "judgebench": own_judgebench,
    "rewardmath_best_of_10": own_rewardmath,
    "m_rewardbench": own_m_rewardbench,
    "ppe_human": own_ppe_human,
    "ppe_mmlu_pro": own_ppe_correctness,
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_a_suites_numbers_are_those_of_its_own_scoring(name, ties, tmp_path):
    rows, judge = ROWS[name](), Judge(ties)
    found = evaluated(name, rows, tmp_path, judge)
    assert {key: found[key] for key in OWN[name](rows, judge)} == pytest.approx(OWN[name](rows, judge))
    assert found["left_out"] == 0


def test_every_answer_of_a_prompt_is_scored_and_no_more_often_than_the_longer_side_needs(tmp_path):
    rows = rewardbench2_rows()
    pairs = read_pairs(dataset_spec(copy_of("rewardbench2", rows, tmp_path)), "test")
    assert {pair.chosen for pair in pairs} == {text for row in rows for text in row["chosen"]}
    assert {pair.rejected for pair in pairs} == {text for row in rows for text in row["rejected"]}
    assert len(pairs) == sum(max(len(row["chosen"]), len(row["rejected"])) for row in rows)
    assert [pair.candidates.number for pair in pairs if pair.candidates.item == "tied:1"] == [23, 23, 23]


def test_a_prompt_whose_answers_were_not_all_scored_does_not_count(tmp_path):
    pairs = read_pairs(dataset_spec(copy_of("rm_bench", rm_bench_rows(), tmp_path)), "test")
    judge = Judge(False)
    whole = numbers_of(pairs, judge)
    assert (whole["items"], whole["left_out"]) == (20, 0)
    found = numbers_of(pairs[1:], judge)
    assert (found["items"], found["left_out"]) == (19, 1)
    assert found["subset/chat"] != whole["subset/chat"]
    without_code = numbers_of([pair for pair in pairs if pair.candidates.subset != "code"], judge)
    assert "score" not in without_code
    assert without_code["subset/math"] == whole["subset/math"]


BAD = {
    "judgebench": ({"label": "A=B"}, r"row 2: the label 'A=B' is neither A>B nor B>A"),
    "rm_bench": ({"chosen": ["one"]}, r"row 2: 1 chosen and 3 rejected answers; each has three"),
    "rewardbench2": ({"rejected": "text"}, r"row 2: column 'rejected' holds no list of answers"),
    "rewardmath_best_of_10": (
        {"solution_type": "?"},
        r"row 0: its answer 2: solution_type '\?' is neither chosen nor rejected",
    ),
    "ppe_human": ({"winner": "model_c"}, r"row 2: the winner 'model_c' is none of model_a, model_b, tie"),
    "ppe_mmlu_pro": (
        {"sampled_conflict_pairs": [[0, 2]]},
        r"row 2: the pair \[0, 2\] .* has not one right answer",
    ),
    "rewardbench": ({"chosen": " "}, r"row 2: column 'chosen' is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_its_file_and_can_be_left_out_with_its_prompt(name, tmp_path):
    change, message = BAD[name]
    rows = ROWS[name]()
    rows[2] = {**rows[2], **change}
    spec = dataset_spec(copy_of(name, rows, tmp_path))
    with pytest.raises(DataError, match=message):
        read_pairs(spec, "test")
    left_out: list[str] = []
    kept = list(iter_pairs(replace(spec, skip_bad_rows=True), "test", left_out))
    assert len(left_out) == 1
    assert str(tmp_path) in left_out[0]
    # Where a row holds one answer, its whole prompt is left out.
    assert kept
    assert name != "rewardmath_best_of_10" or {pair.candidates.item for pair in kept} == set("1234567")


def test_a_broken_line_leaves_out_the_whole_prompt_of_a_suite_that_has_a_row_for_each_answer(tmp_path):
    spec = dataset_spec(copy_of("rewardmath_best_of_10", rewardmath_rows(), tmp_path))
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    lines[14] = "{broken\n"
    file.write_text("".join(lines))
    left_out: list[str] = []
    kept = list(iter_pairs(replace(spec, skip_bad_rows=True), "test", left_out))
    assert len(left_out) == 1
    assert {pair.candidates.item for pair in kept} == {str(problem) for problem in range(8) if problem != 1}
    assert {pair.candidates.wrong for pair in kept} == {9}


def test_a_copy_without_a_subset_or_a_column_says_what_is_missing(tmp_path):
    rows = [row for row in rewardbench2_rows() if row["subset"] != "Focus"]
    with pytest.raises(
        DataError, match=r"has no rows of Focus, without which there is no score of rewardbench2"
    ):
        read_pairs(dataset_spec(copy_of("rewardbench2", rows, tmp_path)), "test")
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "p", "chosen": ["a"], "rejected": ["b"]}))
    with pytest.raises(
        DataError, match=r"row 0: no column 'id', which RewardBench 2 has; found prompt, chosen"
    ):
        read_pairs(dataset_spec(f"rewardbench2={tmp_path}"), "test")
    with pytest.raises(DataError, match="has no split train; a suite is only evaluated"):
        read_pairs(dataset_spec(f"rewardbench2={tmp_path}"), "train")
    with pytest.raises((DataError, SpecError), match="nowhere: there is no such file or folder"):
        dataset_spec("rm_bench=nowhere")


def test_a_prepared_suite_is_the_same_suite(tmp_path, capsys):
    rows, judge = rm_bench_rows(), Judge(False)
    source = copy_of("rm_bench", rows, tmp_path)
    assert said(("prepare", source, "--out", tmp_path / "out"), capsys)[0] == 0
    pairs = read_pairs(dataset_spec(str(tmp_path / "out")), "test")
    assert content_digest(pairs) == content_digest(read_pairs(dataset_spec(source), "test"))
    assert numbers_of(pairs, judge)["score"] == pytest.approx(own_rm_bench(rows, judge)["score"])


def test_the_languages_of_a_clone_are_read_from_its_config_folders(tmp_path):
    rows = ROWS["m_rewardbench"]()
    for language in ("deu_Latn", "fra_Latn"):
        (tmp_path / language).mkdir()
        own = [row for row in rows if row["language"] == language]
        (tmp_path / language / "test-00000-of-00001.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in own)
        )
    judge = Judge(False)
    found = numbers_of(read_pairs(dataset_spec(f"m_rewardbench={tmp_path}"), "test"), judge)
    assert found["score"] == pytest.approx(own_m_rewardbench(rows, judge)["score"])
