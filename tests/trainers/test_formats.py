"""The user's own data: formats, column maps, splits, and rows that cannot be read."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.trainers.digests import content_digest
from trainers.data.formats import FORMATS, MAX_CHARACTERS
from trainers.data.records import Digest, Message, read_written_pairs, write_pairs
from trainers.data.sources import dataset_spec, has_split, iter_pairs, read_pairs, splits_of
from trainers.errors import DataError, SpecError
from trainers.specs import DatasetSpec

GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}


def read(source: Path, split: str = "train", left_out: list[str] | None = None, **more):
    return read_pairs(DatasetSpec(name="set", source=str(source), **more), split, left_out)


def jsonl(file: Path, *rows) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture
def read_rows(tmp_path):
    """Read the pairs of these rows in a file."""
    return lambda *rows, **how: read(jsonl(tmp_path / "rows.jsonl", *rows), **how)


def csv_file(file: Path, *rows: list[str]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


def test_every_format_and_row_group_layout_has_one_digest(tmp_path):
    from datasets import Dataset

    rows = [{**GOOD, "prompt": f'why\n{n}, or "so"?'} for n in range(3000)]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    parquet.write_table(
        table.select(["rejected", "prompt", "chosen"]), tmp_path / "b.parquet", row_group_size=7
    )
    jsonl(tmp_path / "d.jsonl", *rows)
    csv_file(tmp_path / "e.csv", list(GOOD), *(list(row.values()) for row in rows))
    Dataset.from_list(rows).save_to_disk(tmp_path / "f" / "train")
    Dataset.from_list(rows).save_to_disk(tmp_path / "g")
    with pa.OSFile(str(tmp_path / "h.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    digests = {content_digest(read(file)) for file in tmp_path.iterdir()}
    mapped = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "x": 1} for row in rows]
    columns = (("prompt", "q"), ("chosen", "good"), ("rejected", "bad"))
    assert digests == {content_digest(read(jsonl(tmp_path / "i.jsonl", *mapped), columns=columns))}


def test_packed_files_other_endings_capitals_and_a_byte_order_mark_are_one_set(tmp_path):
    lines = json.dumps(GOOD).encode() + b"\r\n"
    tabbed = "\t".join(GOOD).encode() + b"\n" + "\t".join(GOOD.values()).encode()
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as stream:
        stream.write(lines)
    with pa.output_stream(str(tmp_path / "b"), compression="zstd") as stream:
        stream.write(b"[" + lines + b"]")
    (tmp_path / "b").rename(tmp_path / "b.json.zst")
    (tmp_path / "d.NDJSON").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "train.tsv").write_bytes(tabbed)
    parquet.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "f.Parquet")
    assert len({content_digest(read(file)) for file in tmp_path.iterdir()}) == 1
    assert dataset_spec(str(tmp_path / "a.jsonl.gz")).name == "a"


ASK, YES, NO = Message("user", "why?"), Message("assistant", "yes"), Message("assistant", "no")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
CALLED = Message("assistant", "", '{"tool_calls": [{"function": {"name": "look", "arguments": {}}}]}')
LOOKED, BE = Message("tool", "20 C"), Message("system", "s")
SUN, LATER = Message("user", "The sky is"), Message("user", "and then?")


def noted(text: str, number: int) -> Message:
    return Message("user", text, f'{{"tokens": {number}}}')


def listed(*turns: Message) -> list[dict[str, object]]:
    return [turn.as_dict() for turn in turns]


def row(prompt: object, chosen: object, rejected: object, **more: object) -> dict[str, object]:
    """A row; without a prompt if that is None, and with tuples of turns as messages."""
    sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}
    return {
        name: listed(*value) if isinstance(value, tuple) else value
        for name, value in sides.items()
        if value is not None
    }


def said(*texts: str) -> tuple[Message, ...]:
    return tuple(Message("assistant", text) for text in texts)


PARTS = [{"type": "text", "text": text} for text in ("n", "", "o")]
HH = "\n\nHuman: why?\n\nAssistant:"
TALK = "User: why?\n\nAssistant: no\nUser: why?\nAssistant: "
CALLS = [*listed(ASK), CALL, {"role": "tool", "content": "", "name": "look"}]
YES_NO = ((ASK,), (YES,), (NO,))
# A row: its prompt, and the turns of its responses.
CONVERSATIONS = {
    "the same as text": (row("why?", "yes", "no"), YES_NO),
    "whole conversations": (row(None, (ASK, YES), (ASK, NO)), YES_NO),
    "texts that begin alike": (
        row(None, "The sky is blue.", "The sky is green."),
        ((SUN,), said("blue."), said("green.")),
    ),
    "a system turn before the prompt's": (
        row("why?", (BE, ASK, YES), (BE, ASK, NO)),
        ((BE, ASK), (YES,), (NO,)),
    ),
    "the prompt is the last question of a conversation": (
        row("why?", (SUN, NO, ASK, YES), (SUN, NO, ASK, NO)),
        ((SUN, NO, ASK), (YES,), (NO,)),
    ),
    "a user in the completion who says the same again": (
        row("why?", (NO, ASK, YES), (YES,)),
        ((ASK,), (NO, ASK, YES), (YES,)),
    ),
    "sides that differ before their last turns, without a prompt": (
        row(None, (ASK, YES, ASK, YES), (ASK, NO, ASK, NO)),
        ((ASK,), (YES, ASK, YES), (NO, ASK, NO)),
    ),
    "sides that differ in a later question, without a prompt": (
        row(None, (ASK, YES, ASK, YES), (ASK, YES, LATER, NO)),
        ((ASK,), (YES, ASK, YES), (YES, LATER, NO)),
    ),
    "a call and what it gave are of the prompt": (
        row("why?", [CALL, *listed(LOOKED, YES)], [CALL, *listed(LOOKED, NO)]),
        ((ASK, CALLED, LOOKED), (YES,), (NO,)),
    ),
    "a response that only calls": (row("why?", [CALL], "no"), ((ASK,), (CALLED,), (NO,))),
    "a tool that had nothing to say": (
        row(CALLS, "yes", "no"),
        ((ASK, CALLED, Message("tool", "", '{"name": "look"}')), (YES,), (NO,)),
    ),
    "other names": (
        row(
            [{"from": "HUMAN", "value": "why?"}],
            {"from": "gpt", "value": "yes"},
            {"role": "Model", "content": PARTS},
        ),
        YES_NO,
    ),
    "a system column": (row("why?", "yes", "no", system="s"), ((BE, ASK), (YES,), (NO,))),
    "a system column of a space": (row("why?", "yes", "no", system=" "), YES_NO),
    "a prompt that the sides repeat with notes and other line ends": (
        row("caf\u00e9\r\nwhy? ", (noted("cafe\u0301\nwhy?", 1), YES), (noted("cafe\u0301\nwhy?", 2), NO)),
        ((noted("cafe\u0301\nwhy?", 1),), (YES,), (NO,)),
    ),
    "hh-rlhf's with a prompt column": (
        row(f"\n\nHuman: why?\n\nAssistant: no{HH}", " yes", " no"),
        ((ASK, NO, ASK), (YES,), (NO,)),
    ),
    "hh-rlhf's with a prompt column that both sides repeat": (row(f"{HH} ", f"{HH} yes", f"{HH} no"), YES_NO),
    "hh-rlhf's, with a name in an answer": (
        row(None, f"{HH} a\nHuman: b", f"{HH} no"),
        ((ASK,), said("a\nHuman: b"), (NO,)),
    ),
    "a transcript by lines": (row(None, f"{TALK}yes", f"{TALK}no"), ((ASK, NO, ASK), (YES,), (NO,))),
    "an answer that is named in a text": (
        row(None, "Why is that?\nAssistant: Yes, I do.", "Why is that?\nAssistant: Yes, never."),
        ((Message("user", "Why is that?\nAssistant:"),), said("Yes, I do."), said("Yes, never.")),
    ),
    "an emoji of several characters": (
        row(None, "Say hi \U0001f468\u200d\U0001f469", "Say hi \U0001f468\u200d\U0001f467"),
        (
            (Message("user", "Say hi"),),
            said("\U0001f468\u200d\U0001f469"),
            said("\U0001f468\u200d\U0001f467"),
        ),
    ),
    "names of known columns as notes": (
        row("why?", "yes", "no", answers=[], instruction="x", messages=[]),
        YES_NO,
    ),
    "the same beside conversations": (row(None, (ASK, YES), (ASK, NO), instruction="x", messages=[]), YES_NO),
}


@pytest.mark.parametrize("what", CONVERSATIONS)
def test_turns_are_divided_where_the_sides_part(read_rows, what):
    found, (prompt, chosen, rejected) = CONVERSATIONS[what]
    (pair,) = read_rows(found)
    assert (pair.prompt, *pair.responses) == (prompt, chosen, rejected)


def test_what_a_turn_says_is_no_matter_of_its_notes(read_rows):
    asked = {"from": "human", "value": "why?", "content": "philosophy", "role_id": 1}
    (pair,) = read_rows({**GOOD, "prompt": [asked]})
    assert pair.prompt[0].as_dict() == {"role": "user", "content": "why?", "role_id": 1}


OTHER = Message("user", "how?")
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
# A row that would lose something, or could be read in two ways, and what is said of it.
REFUSED = {
    "an unknown role": (
        {**GOOD, "chosen": [{"role": "narrator", "content": "a"}]},
        "role 'narrator'; known are",
    ),
    "no role": (
        {**GOOD, "chosen": [{"content": "a"}]},
        "'chosen' holds a turn without a role; found content",
    ),
    "an image": (
        {**GOOD, "prompt": PICTURE},
        "'prompt' holds a part of the type 'image_url'; only text is read",
    ),
    "an image column": ({**GOOD, "images": ["x"]}, "'images' is part of what was asked"),
    "a history": ({**GOOD, "history": [["a", "b"]]}, "'history' is part of what was asked"),
    "another system turn": (
        {**row((BE, ASK), "a", "b"), "system": "b"},
        "'system' says something else than the",
    ),
    "two system turns": (
        row((BE, ASK), (Message("system", "b"), ASK, YES), "no"),
        "'chosen' begins with a system turn that the prompt does not have",
    ),
    "another question": (
        row("how?", (ASK, YES), (ASK, NO)),
        "'chosen' begins with a user turn that the prompt does not have",
    ),
    "words under another name": (
        {**GOOD, "prompt": [{"role": "user", "text": "why?"}]},
        "'prompt' holds NoneType, not text",
    ),
    "a note in the place of words": (
        {**GOOD, "chosen": [{"role": "assistant", "content": "", "weight": 1}]},
        "'chosen' is empty",
    ),
    "answers whose prompt has another name": (
        {"asked": "why?", **row(None, (YES,), (NO,))},
        "found asked",
    ),
    "a prompt that ends in an answer": (row((ASK, YES), "a", "b"), "ends in a turn of the assistant"),
    "tools that are no list": ({**GOOD, "tools": "{}"}, "'tools' holds no list of tools"),
    "tools that are no JSON": ({**GOOD, "tools": "look"}, "'tools' is no JSON"),
    "two questions in a row": (
        row(None, (ASK, ASK, YES), (ASK, OTHER, NO)),
        "the turns before the responses differ",
    ),
    "another question on each side": (
        row(None, (ASK, YES), (OTHER, NO)),
        "the turns before the responses differ",
    ),
    "another system turn on each side": (
        row("why?", (BE, ASK, YES), (Message("system", "b"), ASK, NO)),
        "the turns before the responses differ",
    ),
    "texts without spaces": (row(None, "日本の首都は東京", "日本の首都は京都"), "no column 'prompt'"),
    "the same text twice": (row(None, "same", "same"), "column 'chosen' is empty"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_lost_is_refused_by_name(tmp_path, what):
    found, message = REFUSED[what]
    with pytest.raises(DataError) as raised:
        read(jsonl(tmp_path / "a.jsonl", found))
    assert f"{tmp_path / 'a.jsonl'}, row 0" in str(raised.value)
    assert message in str(raised.value)


TEXTS = ["why?", "yes", "no"]
A, B = listed(ASK, YES), listed(ASK, NO)


def each(names: str, *rows: list[object]) -> list[dict[str, object]]:
    """A row of these columns for each list of values."""
    return [dict(zip(names.split(), values, strict=True)) for values in rows]


HELPSTEER2 = "prompt response_1 response_2 preference_strength"
PKU = "prompt response_0 response_1 better_response_id"
WINNER = "prompt response_a response_b winner"
POST = {"subreddit": "AskWhy", "title": "Why", "post": "why?", "article": None}
TLDR = "SUBREDDIT: r/AskWhy\n\nTITLE: Why\n\nPOST: why?\n\nTL;DR:"
SUMMARIES = [{"text": "yes"}, {"text": "no"}]
RATED = [
    {"response": text, "overall_score": score} for text, score in (("no", 2.5), ("yes", 7), ("maybe", 2.5))
]
RANKED = [{"answer": text, "rank": rank} for rank, text in enumerate(("yes", "no", "maybe"))]
# Rows as data sets have them, and the first letters of (chosen, rejected) of their pairs.
KNOWN_ROWS = {
    "HelpSteer3": (
        each(
            "context response1 response2 overall_preference",
            *([listed(ASK), "yes", "no", n] for n in (-2, 0, 3)),
        ),
        ["yn", "ny"],
    ),
    "HelpSteer2": (each(HELPSTEER2, *([*TEXTS, n] for n in (-1, 0, 1))), ["yn", "ny"]),
    "a, b and a preference": (
        each("prompt a b preference", *([*TEXTS, n] for n in (-1, 0, 1))),
        ["yn", "ny"],
    ),
    "Chatbot Arena": (
        each(
            "conversation_a conversation_b winner",
            *([A, B, name] for name in ("model_a", "model_b", "tie (bothbad)")),
        ),
        ["yn", "ny"],
    ),
    "two responses and a winner": (
        each(WINNER, *([*TEXTS, name] for name in ("A", "b", "tie"))),
        ["yn", "ny"],
    ),
    "PKU-SafeRLHF, by helpfulness": (each(PKU, [*TEXTS, 0], [*TEXTS, 1]), ["yn", "ny"]),
    "SHP": (each("history human_ref_A human_ref_B labels", [*TEXTS, 1], [*TEXTS, 0]), ["yn", "ny"]),
    "UltraFeedback": (each("instruction completions", ["why?", RATED]), ["yn", "ym"]),
    "Nectar": (each("prompt answers", [f"{HH} ", RANKED]), ["yn", "ym", "nm"]),
    "summarize-from-feedback": (
        each("info summaries choice", *([POST, SUMMARIES, n] for n in (0, 1))),
        ["yn", "ny"],
    ),
    "OpenAI's preferences": (
        each(
            "input preferred_output non_preferred_output",
            [{"messages": listed(ASK)}, listed(YES), listed(NO)],
        ),
        ["yn"],
    ),
    "ms-swift, rejected messages": (each("messages rejected_messages", [A, B]), ["yn"]),
    "ms-swift": (each("messages rejected_response", [A, "no"]), ["yn"]),
    "rated generations": (each("instruction generations ratings", ["why?", ["no", "yes"], [1, 5]]), ["yn"]),
    "candidates": (
        each("prompt chosen rejected", ["why?", ["yes"], ["no", "maybe"]], ["why?", "yes", ["no"]]),
        ["yn", "ym", "yn"],
    ),
    "instruction, input, chosen and rejected": (
        each("instruction input chosen rejected", ["why?", "", "yes", "no"]),
        ["yn"],
    ),
    "Argilla": (each("instruction chosen_response rejected_response", TEXTS), ["yn"]),
    "instruction, chosen and rejected": (each("instruction chosen rejected", TEXTS), ["yn"]),
    "conversations, chosen and rejected": (
        each("conversations chosen rejected", [listed(ASK), *TEXTS[1:]]),
        ["yn"],
    ),
}


@pytest.mark.parametrize("name", KNOWN_ROWS)
def test_rows_that_people_have_are_recognised_by_their_columns(tmp_path, name):
    rows, expected = KNOWN_ROWS[name]
    spec = DatasetSpec(name="set", source=str(jsonl(tmp_path / "a.jsonl", *rows)))
    funnel: list[tuple[str, int]] = []
    pairs = list(iter_pairs(spec, "train", funnel=funnel))
    assert [pair.chosen[0] + pair.rejected[0] for pair in pairs] == expected
    assert not any(pair.chosen_turns or pair.rejected_turns for pair in pairs)
    asked = TLDR if name == "summarize-from-feedback" else "why?"
    assert {pair.prompt for pair in pairs} == {(Message("user", asked),)}
    assert funnel[0] == (f"rows, read as {name}", len(rows))
    # Of three rows one is a tie.
    assert (("with a preference", 2) in funnel) == (len(rows) == 3)


def test_every_format_has_a_row_in_this_file():
    assert {known.name for known in FORMATS if known.name not in KNOWN_ROWS} == {
        f"{name}, chosen and rejected"
        for name in ("input", "query", "problem", "conversation", "messages", "dialogue", "trajectory")
    }


(GRADED,) = each(HELPSTEER2, [*TEXTS, 1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            each(WINNER, [*TEXTS, "c"]),
            "read as two responses and a winner: the winner 'c' is none of model_a, model_b",
        ),
        (
            each(PKU, [*TEXTS, 2]),
            "better_response_id are not as they should be (KeyError(2.0)); mend the row",
        ),
        ([GRADED, *each(HELPSTEER2, [*TEXTS, None])], "read as HelpSteer2: the values of"),
        ([GRADED, *each(HELPSTEER2, [*TEXTS, 10**400])], "int too large to convert to float"),
        ([GRADED, *each(HELPSTEER2, [*TEXTS, float("nan")])], "a rating is no number"),
        (each("prompt a b preference", [*TEXTS, False]), "the preference False does not say which"),
        ([GRADED, {**GRADED, "context": "c"}], "column 'context' is part of what was asked"),
        ([GRADED, GOOD], "no column 'response_1'; needed are prompt, response_1"),
        (
            [GRADED, {**GRADED, **GOOD}],
            "is prompt, chosen and rejected, and the split's first row is HelpSteer2",
        ),
        ([GOOD, row(None, "why? yes", "why? no")], "row 1: no column 'prompt'"),
        ([row(None, "why? yes", "why? no"), GOOD], "first row is chosen and rejected, which both begin"),
    ],
)
def test_a_row_that_is_not_as_its_format_has_it_is_named(read_rows, rows, message):
    with pytest.raises(DataError) as raised:
        read_rows(*rows)
    assert f"rows.jsonl, row {len(rows) - 1}" in str(raised.value)
    assert message in str(raised.value)


def test_a_bad_first_row_does_not_decide_how_the_others_are_read_and_rows_come_one_by_one(tmp_path):
    left_out: list[str] = []
    file = jsonl(
        tmp_path / "a.jsonl", {"version": 1}, {"answers": 1, "prompt": ""}, GOOD, {**GOOD, "chosen": 3}
    )
    assert len(read(file, skip_bad_rows=True, left_out=left_out)) == 1
    assert len(left_out) == 3
    pairs = iter_pairs(DatasetSpec(name="set", source=str(jsonl(file, GOOD, {**GOOD, "chosen": 3}))), "train")
    assert next(pairs).chosen == "because"
    with pytest.raises(DataError, match="row 1"):
        next(pairs)


GENERATED = "instruction generations ratings"


def test_ties_are_kept_for_training_where_they_are_asked_for(tmp_path):
    rated = each(GENERATED, ["why?", ["so", "because", "no"], [4, 4, 1]])
    file = jsonl(tmp_path / "rows.jsonl", *rated)
    found = {(pair.chosen, pair.rejected, pair.tie) for pair in read(file, ties=True)}
    assert found == {("so", "because", True), ("so", "no", False), ("because", "no", False)}
    spec = DatasetSpec(name="d", source=str(file), ties=True)
    assert not any(pair.tie for pair in iter_pairs(spec, spec.test_split))
    # A note of that name on a row of chosen and rejected says nothing.
    (plain,) = read(jsonl(tmp_path / "plain.jsonl", {**GOOD, "tie": True, "rating": 3}), ties=True)
    assert not plain.tie
    with pytest.raises(DataError, match="1 rows were read, 0 of them bad, 1 without a preference"):
        read(jsonl(tmp_path / "ties.jsonl", {**GRADED, "preference_strength": 0}))


def test_only_the_best_rated_answers_are_paired_where_that_is_asked(tmp_path):
    rated = each(GENERATED, ["why?", ["so", "because", "no", "never"], [3, 4, 4, 1]])
    file = jsonl(tmp_path / "rows.jsonl", *rated)
    assert len(read(file)) == 5
    assert {(pair.chosen, pair.rejected) for pair in read(file, ratings="best")} == {
        (best, other) for best in ("because", "no") for other in ("so", "never")
    }
    # A lower rated answer may say the same as the best one.
    pairs = read(jsonl(file, *each(GENERATED, ["why?", ["so", "so", "no"], [5, 3, 1]])), ratings="best")
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("so", "so"), ("so", "no")]


def test_a_column_about_one_pair_is_not_taken_for_each_of_several_candidates(read_rows):
    rewritten = {"rewritten_chosen": "sure", "rewritten_rejected": "nope"}
    found = {"prompt": "why?", "chosen": ["yes"], "rejected": ["no", "maybe"], "margin": 2, **rewritten}
    first, second = read_rows(found)
    assert (first.margin, second.rewritten) == (None, None)
    with pytest.raises(DataError, match="margin=margin does not say which of the answers it is about"):
        read_rows(found, columns=(("margin", "margin"),))
    (only,) = read_rows({**found, "rejected": ["no"]})
    assert (only.margin, only.rewritten) == (2, ("sure", "nope"))


@pytest.mark.parametrize(
    ("found", "margin"),
    [
        ({"query": "why?", "chosen": "a", "rejected": "b", "margin": 2}, 2.0),
        ({**GOOD, "far": 2}, 2.0),
        ({**GOOD, "score_chosen": 3, "score_rejected": 1}, 2.0),
        ({**GRADED, "preference_strength": -2, "margin": 1}, 2.0),
        ({**each(WINNER, [*TEXTS, "model_b"])[0], "margin": 1}, None),
    ],
)
def test_margins_are_a_column_of_any_name_or_the_difference_of_ratings(read_rows, found, margin):
    (pair,) = read_rows(found, columns=(("margin", "far"),) if "far" in found else ())
    assert pair.margin == margin


def test_two_answers_and_a_preference_are_read_under_any_names(read_rows):
    rows = each("q left right verdict", *([*TEXTS, verdict] for verdict in (-2, 1, 0, "model_a", "B", "tie")))
    columns = (("prompt", "q"), ("a", "left"), ("b", "right"), ("preference", "verdict"))
    assert [pair.chosen for pair in read_rows(*rows, columns=columns)] == ["yes", "no", "yes", "no"]
    system = each("response_1 response_2 preference_strength ask sys", ["yes", "no", -1, "why?", "s"])
    (pair,) = read_rows(*system, columns=(("prompt", "ask"), ("system", "sys")))
    assert (pair.prompt, pair.chosen) == ((BE, ASK), "yes")
    with pytest.raises(DataError, match="row 1: no column 'sys'"):
        read_rows({**GOOD, "sys": "s"}, GOOD, columns=(("system", "sys"),))


def test_the_winner_of_a_csv_is_read(tmp_path):
    (pair,) = read(csv_file(tmp_path / "a.csv", WINNER.split(), [*TEXTS, "model_b"]))
    assert pair.chosen == "no"


def test_tools_are_the_same_as_a_list_as_text_and_in_parquet(tmp_path, read_rows):
    more = {"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "string"}}}}
    rows = [{**GOOD, "tools": [more]}, {**GOOD, "tools": [{"type": "function", "function": {"name": "g"}}]}]
    texts = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for pairs in (read_rows(*rows), read_rows(*texts), read(tmp_path / "a.parquet")):
        assert [pair.tools for pair in pairs] == [row["tools"] for row in texts]


def test_messages_in_csv_are_json_and_other_brackets_text(tmp_path):
    route = '{"from": "Rome", "to": "Milan"}'
    for cell, chosen in (
        (json.dumps(listed(YES)), "yes"),
        ("[1] is a note", "[1] is a note"),
        (route, route),
    ):
        (pair,) = read(csv_file(tmp_path / "a.csv", list(GOOD), ["why?", cell, "no"]))
        assert pair.chosen == chosen
    with pytest.raises(DataError, match=r"row 0: column 'chosen' begins as chat messages, and is no JSON"):
        read(csv_file(tmp_path / "a.csv", list(GOOD), ["why?", str(listed(YES)), "no"]))


# Splits.


def test_a_split_may_be_named_behind_a_set(tmp_path):
    jsonl(tmp_path / "validation.jsonl", GOOD)
    spec = dataset_spec(f"{tmp_path}:validation")
    assert (spec.source, spec.train_split, spec.test_split) == (str(tmp_path), "validation", "validation")
    odd = jsonl(tmp_path / "odd:name", GOOD)
    assert dataset_spec(str(odd)).source == str(odd)


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "train.jsonl"),
        ("train.jsonl", "train.JSONL"),
        ("train.csv", "train-00000-of-00001.csv"),
        ("train.jsonl", "data/train.jsonl"),
        ("train.parquet", "train/data-00000-of-00001.arrow"),
    ],
)
def test_a_split_that_is_there_twice_is_refused(tmp_path, names):
    for name in names:
        jsonl(tmp_path / name)
    with pytest.raises(DataError, match="holds the train split more than once") as raised:
        read(tmp_path)
    assert all(name in str(raised.value) for name in names)
    with pytest.raises(DataError, match=r"no test split: expected test\.parquet.*found .*train"):
        read(tmp_path, "test")


def test_shards_are_one_split_and_json_may_be_lines(tmp_path):
    jsonl(tmp_path / "train-00000-of-00002.json", GOOD, GOOD)
    (tmp_path / "train-00001-of-00002.json").write_text(json.dumps([GOOD], indent=1))
    assert len(read(tmp_path)) == 3


@pytest.mark.parametrize("folder", [".", "train"])
def test_a_folder_that_spark_wrote_is_a_split(tmp_path, folder):
    for part in ("part-00000-3f.json", "part-00001-3f.json", "_SUCCESS"):
        jsonl(tmp_path / folder / part, GOOD)
    assert len(read(tmp_path)) == 2


def test_the_config_folders_of_a_clone_are_taken_or_named(tmp_path):
    jsonl(tmp_path / "only" / "train-00000-of-00001.jsonl", GOOD)
    spec = dataset_spec(str(tmp_path))
    assert len(read(tmp_path)) == 1
    assert splits_of(spec) == ("train",)
    jsonl(tmp_path / "test.jsonl", GOOD)
    assert splits_of(spec) == ("test",), "a folder with a split of its own is no such clone"
    (tmp_path / "test.jsonl").unlink()
    jsonl(tmp_path / "other" / "train-00000-of-00001.jsonl", GOOD)
    with pytest.raises(DataError, match="no train split of its own, its folders have: only, other"):
        read(tmp_path)


def test_caches_beside_saved_shards_are_no_data_and_a_missing_shard_is_named(tmp_path):
    from datasets import Dataset

    Dataset.from_list([GOOD, GOOD]).save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "cache-1f.arrow").write_bytes(b"of a map")
    assert len(read(tmp_path)) == 2
    (tmp_path / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(
        DataError, match=r"has 1 files of its train split, and .* says that there are 2: fetch those"
    ):
        read(tmp_path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"columns": (("question", "prompt"),)}, "'question' is not one of prompt, chosen"),
        ({"columns": (("prompt", "a"), ("prompt", "b"))}, "mapped twice"),
        ({"group_by": "problem"}, "give a test share"),
    ],
)
def test_what_cannot_be_meant_of_a_set_is_refused(how, message):
    with pytest.raises(SpecError, match=message):
        DatasetSpec(name="a", source="a", **how)


def test_a_set_is_split_by_problem_and_a_problem_stays_where_it_is_when_rows_are_added(tmp_path):
    rows = [
        {**GOOD, "prompt": f"{n} {side}", "chosen": f"{n}", "problem": n}
        for n in range(400)
        for side in "abc"
    ]
    file, how = jsonl(tmp_path / "a.jsonl", *rows), {"group_by": "problem", "test_share": 0.25}
    halves = {split: read(file, split, **how) for split in ("train", "test")}
    by_problem = {split: {pair.chosen for pair in pairs} for split, pairs in halves.items()}
    assert not by_problem["train"] & by_problem["test"]
    assert all(len(pairs) == 3 * len(by_problem[split]) for split, pairs in halves.items())
    assert len(by_problem["train"] | by_problem["test"]) == 400
    assert len(by_problem["test"]) == pytest.approx(100, abs=30)
    few = {pair.chosen for pair in read(jsonl(tmp_path / "b.jsonl", *rows[:120]), "test", **how)}
    assert few == by_problem["test"] & {f"{n}" for n in range(40)}
    assert {pair.chosen for pair in read(file, "test", split_seed=1, **how)} != by_problem["test"]
    assert splits_of(DatasetSpec(name="a", source=str(file), test_share=0.25)) == ("train", "test")
    jsonl(file, {**GOOD, "problem": 1}, {**GOOD, "problem": None})
    with pytest.raises(DataError, match=r"a\.jsonl, row 1: no value in the group column 'problem'"):
        read(file, "train", group_by="problem", test_share=0.01)


def test_without_a_group_column_pairs_of_one_prompt_stay_together(tmp_path):
    rows = [{**GOOD, "prompt": f"p{n}", "chosen": f"{n} {side}"} for n in range(100) for side in "ab"]
    jsonl(tmp_path / "train.jsonl", *rows)
    train, test = (read(tmp_path, split, test_share=0.5) for split in ("train", "test"))
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in test}
    assert len(train) + len(test) == 200


# Bad rows and files.


def line(**more: object) -> bytes:
    return json.dumps({**GOOD, **more}).encode()


BAD_LINES = {
    "a number": (line(chosen=3), "column 'chosen' holds int"),
    "a null row": (b"null", "expected an object, found NoneType"),
    "empty": (line(chosen=" "), "column 'chosen' is empty"),
    "no UTF-8": (b'{"prompt": "a", "chosen": "\xff\xfe", "rejected": "b"}', "byte 0xff at 27 is no UTF-8"),
    "a million characters": (
        line(chosen="x" * 1_000_000),
        f"column 'chosen' has 1,000,000 characters; at most {MAX_CHARACTERS:,}",
    ),
    "a name twice": (
        b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        "'chosen' stands twice",
    ),
    "cut off": (b'{"prompt": "a", "chos', "cannot be read as JSON"),
    "a column missing": (b'{"prompt": "a", "chosen": "b"}', "no column 'rejected'"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_row_is_named_or_left_out_and_listed(tmp_path, what):
    bad, message = BAD_LINES[what]
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b"\n".join([line(), bad, b"", line()]))
    with pytest.raises(DataError) as raised:
        read(file)
    left_out: list[str] = []
    assert len(read(file, skip_bad_rows=True, left_out=left_out)) == 2
    for found in (str(raised.value), *left_out):
        assert f"{file}, row 1" in found
        assert message in found
    assert len(left_out) == 1


def test_bytes_that_are_no_utf8_in_parquet_are_named_by_row(tmp_path):
    texts = pa.array([b"fine", b"\xff\xfe", b"fine"], pa.binary())
    broken = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    fine = pa.array(["a", "b", "c"])
    parquet.write_table(
        pa.table({"prompt": fine, "chosen": broken, "rejected": fine}), tmp_path / "bad.parquet"
    )
    with pytest.raises(DataError, match=r"bad\.parquet, row 1: .*Invalid UTF8 sequence"):
        read(tmp_path / "bad.parquet")
    assert len(read(tmp_path / "bad.parquet", skip_bad_rows=True)) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.csv", b"prompt,chosen,chosen\na,b,c\n", r"bad\.csv: column 'chosen' stands twice"),
        ("bad.csv", b"prompt,chosen,rejected\na,b\n", r"bad\.csv, row 0: 2 cells under 3 column names"),
        ("bad.csv", b"prompt,chosen,rejected\na,b," + b"c" * 600_000, "'rejected' has 600,000 characters"),
        ("bad.csv", b"prompt,chosen,rejected\n", "holds no pairs"),
        ("bad.csv", b"prompt,chosen,rejected\na,b,c\na,\xff,c\n", r"bad\.csv, row 1: .*no UTF-8"),
        ("bad.csv", b'prompt,chosen,rejected\na,"b,c\n', r"bad\.csv cannot be read as csv"),
        ("bad.parquet", b"PAR1 nonsense", r"bad\.parquet cannot be read as parquet"),
        ("bad.jsonl.gz", b"no gzip", r"bad\.jsonl\.gz cannot be read as jsonl"),
        ("bad.txt", b"a", r"\.txt is not read; use \.parquet, \.jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_rows_are_kept_by_column_and_nothing_left_says_what_was_read(read_rows):
    rows = {**GOOD, "subset": "hep-cpp"}, {**GOOD, "chosen": 3, "subset": "math-prm"}
    assert len(read_rows(*rows, keep=(("subset", "hep*"),))) == 1
    with pytest.raises(DataError, match=r"holds no pairs\. 2 rows were read, 0 of them bad\."):
        read_rows(*rows, keep=(("subset", "c"),))
    with pytest.raises(DataError, match=r"1 rows were read, 0 of them bad, none in this split with a test"):
        read_rows(rows[0], split="test", test_share=1e-9)
    with pytest.raises(
        DataError, match=r"2 rows were read, 1 of them bad\. The first: .*row 1: column 'chosen'"
    ):
        read_rows(*rows, keep=(("subset", "math*"),), skip_bad_rows=True)


def test_a_real_rewriting_says_what_it_rewrites(shared):
    rewritten = read(shared / "data" / "ultrafeedback_paraphrase", "test")
    originals = {pair.chosen for pair in read(shared / "data" / "ultrafeedback", "test")}
    assert len(rewritten) == 200
    assert {pair.original_chosen for pair in rewritten} <= originals


def test_written_pairs_are_read_in_any_order(tmp_path):
    pairs = read(jsonl(tmp_path / "a.jsonl", *({**GOOD, "prompt": f"é\n{n}"} for n in range(20))))
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    found = read_written_pairs(tmp_path / "pairs.jsonl")
    assert list(found) == pairs
    assert [found[n] for n in (19, 0, -1)] == [pairs[n] for n in (19, 0, -1)]
    assert found[3:5] == pairs[3:5]
    digest = Digest()
    for pair in found:
        digest.add(pair)
    assert (digest.hexdigest(), digest.rows) == (content_digest(pairs), 20)
    with pytest.raises(IndexError):
        found[20]


def test_folders_beside_a_folders_own_splits_are_none_of_it(tmp_path):
    for name in ("train.jsonl", "backup/test.json", "backup/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / name, GOOD)
    spec = DatasetSpec(name="mine", source=str(tmp_path))
    assert [has_split(spec, split) for split in ("train", "test")] == [True, False]
