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
from trainers.data.sources import dataset_spec, iter_pairs, read_pairs, splits_of
from trainers.errors import DataError, SpecError
from trainers.specs import DatasetSpec

GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}


def read(source: Path, split: str = "train", left_out: list[str] | None = None, **more):
    return read_pairs(DatasetSpec(name="set", source=str(source), **more), split, left_out)


def jsonl(file: Path, *rows) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def csv_file(file: Path, *rows: list[str]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


def test_every_format_and_row_group_layout_has_one_digest(tmp_path):
    from datasets import Dataset

    rows = [{**GOOD, "prompt": f'why\n{n}, or "so"?'} for n in range(3000)]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=7)
    parquet.write_table(
        table.select(["rejected", "prompt", "chosen"]), tmp_path / "c.parquet", compression="gzip"
    )
    jsonl(tmp_path / "d.jsonl", *rows)
    csv_file(tmp_path / "e.csv", list(GOOD), *(list(row.values()) for row in rows))
    Dataset.from_list(rows).save_to_disk(tmp_path / "f" / "train")
    Dataset.from_list(rows).save_to_disk(tmp_path / "g")
    with pa.OSFile(str(tmp_path / "h.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    mapped = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "x": 1} for row in rows]
    jsonl(tmp_path / "i.jsonl", *mapped)
    columns = (("prompt", "q"), ("chosen", "good"), ("rejected", "bad"))
    digests = {
        name: content_digest(read(tmp_path / name)) for name in ("a.parquet", "b.parquet", "c.parquet")
    }
    digests |= {
        name: content_digest(read(tmp_path / name)) for name in ("d.jsonl", "e.csv", "f", "g", "h.arrow")
    }
    digests["i.jsonl"] = content_digest(read(tmp_path / "i.jsonl", columns=columns))
    assert len(set(digests.values())) == 1, digests


def test_rows_come_one_by_one(tmp_path):
    rows = jsonl(tmp_path / "a.jsonl", GOOD, {**GOOD, "chosen": 3})
    pairs = iter_pairs(DatasetSpec(name="set", source=str(rows)), "train")
    assert next(pairs).chosen == "because"
    with pytest.raises(DataError, match="row 1"):
        next(pairs)


def test_the_formats_that_trl_documents_are_one_pair(tmp_path):
    user, answer, worse = (
        {"role": role, "content": text}
        for role, text in (("user", "The sky is"), ("assistant", "blue."), ("assistant", "green."))
    )
    files = [
        jsonl(tmp_path / "1.jsonl", {"prompt": "The sky is", "chosen": "blue.", "rejected": "green."}),
        jsonl(tmp_path / "2.jsonl", {"prompt": [user], "chosen": [answer], "rejected": [worse]}),
        jsonl(tmp_path / "3.jsonl", {"chosen": [user, answer], "rejected": [user, worse]}),
        # Of texts, the space before the first word that differs is nobody's.
        jsonl(tmp_path / "4.jsonl", {"chosen": "The sky is blue.", "rejected": "The sky is green."}),
    ]
    assert len({content_digest(read(file)) for file in files}) == 1


@pytest.mark.parametrize(
    "row", [{"chosen": "same", "rejected": "same"}, {"chosen": "The sky is", "rejected": "The sky is blue."}]
)
def test_texts_that_leave_no_response_after_what_they_share_are_refused(tmp_path, row):
    with pytest.raises(DataError, match="row 0: column 'chosen' is empty"):
        read(jsonl(tmp_path / "a.jsonl", row))


ASK, YES, NO = Message("user", "why?"), Message("assistant", "yes"), Message("assistant", "no")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
CALLED = Message("assistant", "", '{"tool_calls": [{"function": {"name": "look", "arguments": {}}}]}')
LOOKED = Message("tool", "20 C")


def test_what_a_turn_says_is_no_matter_of_its_notes(tmp_path):
    asked = {"from": "human", "value": "why?", "content": "philosophy", "role_id": 1}
    (pair,) = read(jsonl(tmp_path / "a.jsonl", {**GOOD, "prompt": [asked]}))
    assert pair.prompt[0].as_dict() == {"role": "user", "content": "why?", "role_id": 1}


def noted(text: str, number: int) -> Message:
    return Message("user", text, f'{{"tokens": {number}}}')


def listed(*turns: Message) -> list[dict[str, object]]:
    return [turn.as_dict() for turn in turns]


# A row: its prompt, and the turns of its responses.
CONVERSATIONS = {
    "a system turn before the prompt's": (
        {"prompt": "why?", "chosen": listed(Message("system", "s"), ASK, YES)}
        | {"rejected": listed(Message("system", "s"), ASK, NO)},
        ((Message("system", "s"), ASK), (YES,), (NO,)),
    ),
    "the prompt is the last question of a conversation": (
        {"prompt": "why?", "chosen": listed(LOOKED._replace(role="user"), NO, ASK, YES)}
        | {"rejected": listed(LOOKED._replace(role="user"), NO, ASK, NO)},
        ((LOOKED._replace(role="user"), NO, ASK), (YES,), (NO,)),
    ),
    "a user in the completion who says the same again": (
        {"prompt": "why?", "chosen": listed(NO, ASK, YES), "rejected": listed(YES)},
        ((ASK,), (NO, ASK, YES), (YES,)),
    ),
    "sides that differ before their last turns": (
        {"prompt": "why?", "chosen": listed(YES, ASK, YES), "rejected": listed(YES, ASK, NO, ASK, NO)},
        ((ASK,), (YES, ASK, YES), (YES, ASK, NO, ASK, NO)),
    ),
    "the same without a prompt": (
        {"chosen": listed(ASK, YES, ASK, YES), "rejected": listed(ASK, NO, ASK, NO)},
        ((ASK,), (YES, ASK, YES), (NO, ASK, NO)),
    ),
    "a call and what it gave are of the prompt": (
        {"prompt": "why?", "chosen": [CALL, *listed(LOOKED, YES)], "rejected": [CALL, *listed(LOOKED, NO)]},
        ((ASK, CALLED, LOOKED), (YES,), (NO,)),
    ),
    "a response that only calls": (
        {"prompt": "why?", "chosen": [CALL], "rejected": "no"},
        ((ASK,), (CALLED,), (NO,)),
    ),
    "other names": (
        {"prompt": [{"from": "HUMAN", "value": "why?"}], "chosen": {"from": "gpt", "value": "yes"}}
        | {
            "rejected": {
                "role": "Model",
                "content": [
                    {"type": "text", "text": "n"},
                    {"type": "text", "text": ""},
                    {"type": "text", "text": "o"},
                ],
            }
        },
        ((ASK,), (YES,), (NO,)),
    ),
    "a system column": (
        {**GOOD, "system": "s", "chosen": "yes", "rejected": "no"},
        ((Message("system", "s"), ASK), (YES,), (NO,)),
    ),
    "a system column of a space": (
        {**GOOD, "system": " ", "chosen": "yes", "rejected": "no"},
        ((ASK,), (YES,), (NO,)),
    ),
    "a prompt that the sides repeat with notes and other line ends": (
        {"prompt": "caf\u00e9\r\nwhy? ", "chosen": listed(noted("cafe\u0301\nwhy?", 1), YES)}
        | {"rejected": listed(noted("cafe\u0301\nwhy?", 2), NO)},
        ((noted("cafe\u0301\nwhy?", 1),), (YES,), (NO,)),
    ),
    "a tool that had nothing to say": (
        {"prompt": [*listed(ASK), CALL, {"role": "tool", "content": "", "name": "look"}], "chosen": "yes"}
        | {"rejected": "no"},
        ((ASK, CALLED, Message("tool", "", '{"name": "look"}')), (YES,), (NO,)),
    ),
    "hh-rlhf's with a prompt column": (
        {
            "prompt": "\n\nHuman: why?\n\nAssistant: no\n\nHuman: why?\n\nAssistant:",
            "chosen": " yes",
            "rejected": " no",
        },
        ((ASK, NO, ASK), (YES,), (NO,)),
    ),
    "hh-rlhf's with a prompt column that both sides repeat": (
        {"prompt": "\n\nHuman: why?\n\nAssistant: ", "chosen": "\n\nHuman: why?\n\nAssistant: yes"}
        | {"rejected": "\n\nHuman: why?\n\nAssistant: no"},
        ((ASK,), (YES,), (NO,)),
    ),
    "a transcript by lines": (
        {"chosen": "User: why?\n\nAssistant: no\nUser: why?\nAssistant: yes"}
        | {"rejected": "User: why?\n\nAssistant: no\nUser: why?\nAssistant: no"},
        ((ASK, NO, ASK), (YES,), (NO,)),
    ),
    "hh-rlhf's, with a name in an answer": (
        {
            "chosen": "\n\nHuman: why?\n\nAssistant: a\nHuman: b",
            "rejected": "\n\nHuman: why?\n\nAssistant: no",
        },
        ((ASK,), (Message("assistant", "a\nHuman: b"),), (NO,)),
    ),
    "an answer that is named in a text": (
        {"chosen": "Why is that?\nAssistant: Yes, I do.", "rejected": "Why is that?\nAssistant: Yes, never."},
        (
            (Message("user", "Why is that?\nAssistant:"),),
            (Message("assistant", "Yes, I do."),),
            (Message("assistant", "Yes, never."),),
        ),
    ),
    "an emoji of several characters": (
        {"chosen": "Say hi \U0001f468\u200d\U0001f469", "rejected": "Say hi \U0001f468\u200d\U0001f467"},
        (
            (Message("user", "Say hi"),),
            (Message("assistant", "\U0001f468\u200d\U0001f469"),),
            (Message("assistant", "\U0001f468\u200d\U0001f467"),),
        ),
    ),
    "a word that begins another": (
        {"chosen": "yes I do it", "rejected": "yes I don't"},
        (
            (Message("user", "yes I"),),
            (Message("assistant", "do it"),),
            (Message("assistant", "don't"),),
        ),
    ),
}


@pytest.mark.parametrize("what", CONVERSATIONS)
def test_turns_are_divided_where_the_sides_part(tmp_path, what):
    row, (prompt, chosen, rejected) = CONVERSATIONS[what]
    (pair,) = read(jsonl(tmp_path / "a.jsonl", row))
    assert (pair.prompt, *pair.responses) == (prompt, chosen, rejected)


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
        {**GOOD, "prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "'prompt' holds a part of the type 'image_url'; only text is read",
    ),
    "an image column": (
        {**GOOD, "images": ["x"]},
        "'images' is part of what was asked; only text is read; drop it.",
    ),
    "a history": ({**GOOD, "history": [["a", "b"]]}, "'history' is part of what was asked"),
    "another system turn": (
        {**GOOD, "prompt": listed(Message("system", "a"), ASK), "system": "b"},
        "'system' says something else than the prompt's system turn",
    ),
    "two system turns": (
        {
            **GOOD,
            "prompt": listed(Message("system", "a"), ASK),
            "chosen": listed(Message("system", "b"), ASK, YES),
        },
        "'chosen' begins with a system turn that the prompt does not have",
    ),
    "another question": (
        {"prompt": "how?", "chosen": listed(ASK, YES), "rejected": listed(ASK, NO)},
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
        {"asked": listed(ASK), "chosen": listed(YES), "rejected": listed(NO)},
        "no column 'prompt'; needed are prompt, chosen, rejected; found asked",
    ),
    "a prompt that ends in an answer": (
        {**GOOD, "prompt": listed(ASK, YES)},
        "ends in a turn of the assistant",
    ),
    "a prompt of a system turn": (
        {**GOOD, "prompt": listed(Message("system", "a"))},
        "ends in a turn of the system",
    ),
    "tools that are no list": ({**GOOD, "tools": "{}"}, "'tools' holds no list of tools"),
    "tools that are no JSON": ({**GOOD, "tools": "look"}, "'tools' is no JSON"),
    "two questions in a row": (
        {"chosen": listed(ASK, ASK, YES), "rejected": listed(ASK, Message("user", "how?"), NO)},
        "the turns before the responses differ",
    ),
    "another system turn on each side": (
        {"prompt": "why?", "chosen": listed(Message("system", "a"), ASK, YES)}
        | {"rejected": listed(Message("system", "b"), ASK, NO)},
        "the turns before the responses differ",
    ),
    "another question on each side": (
        {"chosen": listed(ASK, YES), "rejected": listed(Message("user", "how?"), NO)},
        "the turns before the responses differ",
    ),
    "texts without spaces": (
        {"chosen": "日本の首都は東京", "rejected": "日本の首都は京都"},
        "no column 'prompt'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_lost_is_refused_by_name(tmp_path, what):
    row, message = REFUSED[what]
    with pytest.raises(DataError) as raised:
        read(jsonl(tmp_path / "a.jsonl", row))
    assert f"{tmp_path / 'a.jsonl'}, row 0" in str(raised.value)
    assert message in str(raised.value)


ASKED = {"role": "user", "content": "why?"}
FIRST, SECOND = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
A, B = [ASKED, FIRST], [ASKED, SECOND]
TEXTS = ["why?", "yes", "no"]


def with_columns(names: str, *values: object) -> dict[str, object]:
    return dict(zip(names.split(), values, strict=True))


HELPSTEER3 = "context response1 response2 overall_preference"
HELPSTEER2 = "prompt response_1 response_2 preference_strength"
PKU = "prompt response_0 response_1 better_response_id"
POST = {"subreddit": "AskWhy", "title": "Why", "post": "why?", "article": None}
TLDR = "SUBREDDIT: r/AskWhy\n\nTITLE: Why\n\nPOST: why?\n\nTL;DR:"
# Rows as data sets have them, and (chosen, rejected) of their pairs; where the prompt is not "why?", it comes first.
KNOWN_ROWS = {
    "HelpSteer3": ([with_columns(HELPSTEER3, [ASKED], "yes", "no", n) for n in (-2, 0, 3)], ["yn", "ny"]),
    "HelpSteer2": ([with_columns(HELPSTEER2, *TEXTS, n) for n in (-1, 0, 1)], ["yn", "ny"]),
    "a, b and a preference": (
        [with_columns("prompt a b preference", *TEXTS, n) for n in (-1, 0, 1)],
        ["yn", "ny"],
    ),
    "Chatbot Arena": (
        [
            with_columns("conversation_a conversation_b winner", A, B, winner)
            for winner in ("model_a", "model_b", "tie", "tie (bothbad)", "both_bad")
        ],
        ["yn", "ny"],
    ),
    "two responses and a winner": (
        [with_columns("prompt response_a response_b winner", *TEXTS, winner) for winner in ("A", "b", "tie")],
        ["yn", "ny"],
    ),
    "PKU-SafeRLHF, by helpfulness": ([with_columns(PKU, *TEXTS, number) for number in (0, 1)], ["yn", "ny"]),
    "SHP": (
        [with_columns("history human_ref_A human_ref_B labels", *TEXTS, label) for label in (1, 0)],
        ["yn", "ny"],
    ),
    "UltraFeedback": (
        [
            {
                "instruction": "why?",
                "completions": [
                    {"response": text, "overall_score": score}
                    for text, score in (("no", 2.5), ("yes", 7), ("maybe", 2.5))
                ],
            }
        ],
        ["yn", "ym"],
    ),
    "Nectar": (
        [
            {
                "prompt": "\n\nHuman: why?\n\nAssistant: ",
                "answers": [
                    {"answer": text, "rank": rank} for rank, text in enumerate(("yes", "no", "maybe"))
                ],
            }
        ],
        ["yn", "ym", "nm"],
    ),
    "summarize-from-feedback": (
        [
            {"info": POST, "summaries": [{"text": "yes"}, {"text": "no"}], "choice": number}
            for number in (0, 1)
        ],
        ["yn", "ny"],
    ),
    "OpenAI's preferences": (
        [{"input": {"messages": [ASKED]}, "preferred_output": [FIRST], "non_preferred_output": [SECOND]}],
        ["yn"],
    ),
    "ms-swift, rejected messages": ([{"messages": A, "rejected_messages": B}], ["yn"]),
    "ms-swift": ([{"messages": A, "rejected_response": "no"}], ["yn"]),
    "rated generations": (
        [with_columns("instruction generations ratings", "why?", ["no", "yes"], [1, 5])],
        ["yn"],
    ),
    "candidates": (
        [
            {"prompt": "why?", "chosen": ["yes"], "rejected": ["no", "maybe"]},
            {"prompt": "why?", "chosen": "yes", "rejected": ["no"]},
        ],
        ["yn", "ym", "yn"],
    ),
    "instruction, input, chosen and rejected": (
        [with_columns("instruction input chosen rejected", "why?", "", "yes", "no")],
        ["yn"],
    ),
    "Argilla": ([with_columns("instruction chosen_response rejected_response", *TEXTS)], ["yn"]),
    "instruction, chosen and rejected": (
        [with_columns("instruction chosen rejected", *TEXTS)],
        ["yn"],
    ),
    "conversations, chosen and rejected": (
        [
            {
                "conversations": [{"from": "human", "value": "why?"}],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            }
        ],
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
    ranked = len(rows) - (3 if "tie (bothbad)" in str(rows) else len(rows) == 3)
    assert ("with a preference", ranked) in funnel or ranked == len(rows)


def test_every_format_has_a_row_in_this_file():
    assert {known.name for known in FORMATS if known.name not in KNOWN_ROWS} == {
        f"{name}, chosen and rejected"
        for name in ("input", "query", "problem", "conversation", "messages", "dialogue", "trajectory")
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            with_columns("prompt response_a response_b winner", *TEXTS, "c"),
            "read as two responses and a winner: the winner 'c' is none of model_a, model_b, tie",
        ),
        (
            with_columns(PKU, *TEXTS, 2),
            "read as PKU-SafeRLHF, by helpfulness: the values of prompt, response_0, response_1, "
            "better_response_id are not as they should be (KeyError(2.0)); mend the row or drop it",
        ),
        (with_columns(HELPSTEER2, *TEXTS, None), "read as HelpSteer2: the values of"),
        (with_columns(HELPSTEER2, *TEXTS, 10**400), "int too large to convert to float"),
        (with_columns(HELPSTEER2, *TEXTS, float("nan")), "a rating is no number"),
        (with_columns(HELPSTEER2, "why?", "yes", " ", -1), "column 'rejected' is empty"),
        (
            {**with_columns(HELPSTEER2, *TEXTS, 1), "context": "c"},
            "column 'context' is part of what was asked",
        ),
        (
            GOOD,
            "no column 'response_1'; needed are prompt, response_1, response_2, preference_strength; found",
        ),
        (
            {**with_columns(HELPSTEER2, *TEXTS, 1), **GOOD},
            "is prompt, chosen and rejected, and the split's first row is HelpSteer2",
        ),
    ],
)
def test_a_row_that_is_not_as_its_format_has_it_is_named(tmp_path, row, message):
    own = "response_a" in row or "response_0" in row
    file = jsonl(tmp_path / "a.jsonl", *([] if own else [with_columns(HELPSTEER2, *TEXTS, 1)]), row)
    with pytest.raises(DataError) as raised:
        read(file)
    assert f"{file}, row " in str(raised.value)
    assert message in str(raised.value)


def test_rows_that_are_all_ties_say_so(tmp_path):
    with pytest.raises(DataError, match="1 rows were read, 0 of them bad, 1 without a preference"):
        read(jsonl(tmp_path / "a.jsonl", with_columns(HELPSTEER2, *TEXTS, 0)))


def test_ties_are_kept_for_training_where_they_are_asked_for(tmp_path):
    rated = {"instruction": "why?", "generations": ["so", "because", "no"], "ratings": [4, 4, 1]}
    file = jsonl(tmp_path / "rows.jsonl", rated)
    found = {(pair.chosen, pair.rejected, pair.tie) for pair in read(file, ties=True)}
    assert found == {("so", "because", True), ("so", "no", False), ("because", "no", False)}
    spec = DatasetSpec(name="d", source=str(file), ties=True)
    assert not any(pair.tie for pair in iter_pairs(spec, spec.test_split))
    (tie,) = read(jsonl(tmp_path / "one.jsonl", with_columns(HELPSTEER2, *TEXTS, 0)), ties=True)
    assert tie.tie
    # A note of that name on a row of chosen and rejected says nothing.
    (plain,) = read(jsonl(tmp_path / "plain.jsonl", {**GOOD, "tie": True, "rating": 3}), ties=True)
    assert not plain.tie


def test_a_column_about_one_pair_is_not_taken_for_each_of_several_candidates(tmp_path):
    row = {
        "prompt": "why?",
        "chosen": ["yes"],
        "rejected": ["no", "maybe"],
        "margin": 2,
        "rewritten_chosen": "sure",
        "rewritten_rejected": "nope",
    }
    first, second = read(jsonl(tmp_path / "rows.jsonl", row))
    assert (first.margin, second.rewritten) == (None, None)
    with pytest.raises(DataError, match="margin=margin does not say which of the answers it is about"):
        read(tmp_path / "rows.jsonl", columns=(("margin", "margin"),))
    (only,) = read(jsonl(tmp_path / "one.jsonl", {**row, "rejected": ["no"]}))
    assert (only.margin, only.rewritten) == (2, ("sure", "nope"))


def test_names_of_known_columns_may_be_notes_beside_a_pair(tmp_path):
    notes = {"answers": [], "instruction": "x", "messages": B}
    (pair,) = read(jsonl(tmp_path / "a.jsonl", {**GOOD, **notes}))
    assert pair.prompt == (ASK,)
    (pair,) = read(jsonl(tmp_path / "b.jsonl", {"chosen": A, "rejected": B, **notes}))
    assert (pair.prompt, pair.chosen) == ((ASK,), "yes")


def test_the_winner_of_a_csv_and_mapped_columns_are_read(tmp_path):
    rows = [["prompt", "response_a", "response_b", "winner"], ["why?", "yes", "no", "model_b"]]
    assert read(csv_file(tmp_path / "a.csv", *rows))[0].chosen == "no"
    row = with_columns("response_1 response_2 preference_strength ask sys", "yes", "no", -1, "why?", "s")
    columns = (("prompt", "ask"), ("system", "sys"))
    (pair,) = read(jsonl(tmp_path / "a.jsonl", row), columns=columns)
    assert (pair.prompt, pair.chosen) == ((Message("system", "s"), ASK), "yes")


def test_two_answers_and_a_preference_are_read_under_any_names(tmp_path):
    rows = [
        {"q": "why?", "left": "because", "right": "no idea", "verdict": verdict}
        for verdict in (-2, 1, 0, "model_a", "B", "tie")
    ]
    columns = (("prompt", "q"), ("a", "left"), ("b", "right"), ("preference", "verdict"))
    funnel = []
    spec = DatasetSpec(name="set", source=str(jsonl(tmp_path / "rows.jsonl", *rows)), columns=columns)
    pairs = list(iter_pairs(spec, "train", funnel=funnel))
    assert [pair.chosen for pair in pairs] == ["because", "no idea", "because", "no idea"]
    assert funnel == [("rows, read as a, b and a preference", 6), ("with a preference", 4)]
    with pytest.raises(DataError, match=r"row 0.*the winner 'C' is none of model_a, model_b, tie"):
        read(jsonl(tmp_path / "rows.jsonl", {**rows[0], "verdict": "C"}), columns=columns)


def test_only_the_best_rated_answers_are_paired_where_that_is_asked(tmp_path):
    row = {"instruction": "why?", "generations": ["so", "because", "no", "never"], "ratings": [3, 4, 4, 1]}
    file = jsonl(tmp_path / "rows.jsonl", row)
    assert len(read(file)) == 5
    assert {(pair.chosen, pair.rejected) for pair in read(file, ratings="best")} == {
        (best, other) for best in ("because", "no") for other in ("so", "never")
    }


def test_the_best_rated_answer_is_paired_though_a_lower_rated_one_says_the_same(tmp_path):
    row = {"instruction": "why?", "generations": ["so", "so", "no"], "ratings": [5, 3, 1]}
    pairs = read(jsonl(tmp_path / "rows.jsonl", row), ratings="best")
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("so", "so"), ("so", "no")]


def test_margins_are_read_beside_prompts_of_any_name_and_are_the_difference_of_ratings(tmp_path):
    sides = {"chosen": "because", "rejected": "no idea"}
    for number, row in enumerate(
        (
            {"query": "why?", **sides, "far": 2},
            {
                "instruction": "why?",
                "input": "",
                **sides,
                "score_chosen": 3,
                "score_rejected": 1,
                "far": None,
            },
            {"prompt": "why?", "chosen": ["because"], "rejected": ["no idea"], "far": 2},
        )
    ):
        (pair,) = read(jsonl(tmp_path / f"{number}.jsonl", row), columns=(("margin", "far"),))
        assert pair.margin == 2.0
    rated = {"prompt": "why?", "response_1": "a", "response_2": "b", "preference_strength": -2, "margin": 1}
    won = {"prompt": "why?", "response_a": "a", "response_b": "b", "winner": "model_b", "margin": 1}
    for row, margin in ((won, None), (rated, 2.0)):
        (pair,) = read(jsonl(tmp_path / "rated.jsonl", row))
        assert pair.margin == margin
    with pytest.raises(DataError, match="margin=preference_strength does not say which"):
        read(tmp_path / "rated.jsonl", columns=(("margin", "preference_strength"),))


def test_a_split_may_be_named_behind_a_set(tmp_path):
    jsonl(tmp_path / "validation.jsonl", GOOD)
    spec = dataset_spec(f"{tmp_path}:validation")
    assert (spec.source, spec.train_split, spec.test_split) == (str(tmp_path), "validation", "validation")
    odd = jsonl(tmp_path / "odd:name", GOOD)
    assert dataset_spec(str(odd)).source == str(odd)


def test_the_config_folders_of_a_clone_are_taken_or_named(tmp_path):
    (tmp_path / "only").mkdir()
    jsonl(tmp_path / "only" / "train-00000-of-00001.jsonl", GOOD)
    assert len(read(tmp_path)) == 1
    (tmp_path / "other").mkdir()
    jsonl(tmp_path / "other" / "train-00000-of-00001.jsonl", GOOD)
    with pytest.raises(DataError, match="no train split of its own, its folders have: only, other"):
        read(tmp_path)


def test_packed_files_other_endings_and_capitals_are_one_set(tmp_path):
    lines = json.dumps(GOOD).encode() + b"\n"
    tabbed = "\t".join(GOOD).encode() + b"\n" + "\t".join(GOOD.values()).encode()
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as stream:
        stream.write(lines)
    with gzip.open(tmp_path / "c.TSV.GZ", "wb") as stream:
        stream.write(tabbed)
    with pa.output_stream(str(tmp_path / "b.json"), compression="zstd") as stream:
        stream.write(b"[" + lines + b"]")
    (tmp_path / "b.json").rename(tmp_path / "b.json.zst")
    (tmp_path / "d.NDJSON").write_bytes(lines)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "train.tsv").write_bytes(tabbed)
    parquet.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "f.Parquet")
    assert len({content_digest(read(file)) for file in tmp_path.iterdir()}) == 1
    assert dataset_spec(str(tmp_path / "a.jsonl.gz")).name == "a"


def test_a_damaged_packed_file_is_named(tmp_path):
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"bad\.jsonl\.gz cannot be read as jsonl"):
        read(tmp_path / "bad.jsonl.gz")


def test_a_mapped_column_is_there_in_every_row(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {**GOOD, "sys": "s"}, GOOD)
    pairs = iter_pairs(DatasetSpec(name="set", source=str(file), columns=(("system", "sys"),)), "train")
    assert next(pairs).prompt[0] == Message("system", "s")
    with pytest.raises(DataError, match="row 1: no column 'sys'"):
        next(pairs)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (GOOD, {"chosen": "why? yes", "rejected": "why? no"}, "row 1: no column 'prompt'"),
        (
            {"chosen": "why? yes", "rejected": "why? no"},
            GOOD,
            "row 1: is prompt, chosen and rejected, and the split's first row is chosen and rejected, which both begin",
        ),
    ],
)
def test_whether_there_are_prompts_is_decided_once(tmp_path, first, second, message):
    with pytest.raises(DataError, match=message):
        read(jsonl(tmp_path / "a.jsonl", first, second))


def test_a_bad_first_row_does_not_decide_how_the_others_are_read(tmp_path):
    left_out: list[str] = []
    file = jsonl(tmp_path / "a.jsonl", {"version": 1}, {"answers": 1, "prompt": ""}, GOOD, GOOD)
    assert len(read(file, skip_bad_rows=True, left_out=left_out)) == 2
    assert len(left_out) == 2


def test_tools_are_the_same_as_a_list_as_text_and_in_parquet(tmp_path):
    more = {"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "string"}}}}
    rows = [{**GOOD, "tools": [more]}, {**GOOD, "tools": [{"type": "function", "function": {"name": "g"}}]}]
    texts = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [
        [pair.tools for pair in read(file)]
        for file in (
            jsonl(tmp_path / "a.jsonl", *rows),
            jsonl(tmp_path / "b.jsonl", *texts),
            tmp_path / "a.parquet",
        )
    ]
    assert found[0] == found[1] == found[2] == [row["tools"] for row in texts]


def test_messages_in_csv_are_json_and_other_brackets_text(tmp_path):
    said, route = json.dumps(listed(YES)), '{"from": "Rome", "to": "Milan"}'
    for cell, chosen in (
        (said, "yes"),
        ("[1] is a note", "[1] is a note"),
        ('{"a": 1}', '{"a": 1}'),
        (route, route),
    ):
        (pair,) = read(csv_file(tmp_path / "a.csv", list(GOOD), ["why?", cell, "no"]))
        assert pair.chosen == chosen
    with pytest.raises(DataError, match=r"row 0: column 'chosen' begins as chat messages, and is no JSON"):
        read(csv_file(tmp_path / "a.csv", list(GOOD), ["why?", str(listed(YES)), "no"]))


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "train.jsonl"),
        ("train.csv", "train-00000-of-00001.csv"),
        ("train.jsonl", "data/train.jsonl"),
        ("train.parquet", "train/data-00000-of-00001.arrow"),
    ],
)
def test_a_split_that_is_there_twice_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="holds the train split more than once") as raised:
        read(tmp_path)
    assert all(name in str(raised.value) for name in names)


def test_shards_are_one_split_and_json_may_be_lines(tmp_path):
    jsonl(tmp_path / "train-00000-of-00002.json", GOOD, GOOD)
    (tmp_path / "train-00001-of-00002.json").write_text(json.dumps([GOOD], indent=1))
    assert len(read(tmp_path)) == 3


@pytest.mark.parametrize("folder", [".", "train"])
def test_a_folder_that_spark_wrote_is_a_split(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "_SUCCESS").touch()
    for part in ("part-00000-3f.json", "part-00001-3f.json"):
        jsonl(tmp_path / folder / part, GOOD)
    assert len(read(tmp_path)) == 2


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


def test_a_column_map_that_cannot_be_meant_is_refused():
    with pytest.raises(SpecError, match="'question' is not one of prompt, chosen"):
        DatasetSpec(name="a", source="a", columns=(("question", "prompt"),))
    with pytest.raises(SpecError, match="mapped twice"):
        DatasetSpec(name="a", source="a", columns=(("prompt", "a"), ("prompt", "b")))
    with pytest.raises(SpecError, match="give a test share"):
        DatasetSpec(name="a", source="a", group_by="problem")


def problems(folder: Path, count: int = 400) -> Path:
    rows = [
        {**GOOD, "prompt": f"{n} {side}", "chosen": f"right {n}", "problem": n}
        for n in range(count)
        for side in "abc"
    ]
    return jsonl(folder / "a.jsonl", *rows)


def test_a_set_is_split_by_problem(tmp_path):
    file = problems(tmp_path)
    halves = {split: read(file, split, group_by="problem", test_share=0.25) for split in ("train", "test")}
    by_problem = {split: {pair.chosen for pair in pairs} for split, pairs in halves.items()}
    assert not by_problem["train"] & by_problem["test"]
    assert len(halves["train"]) + len(halves["test"]) == 1200
    assert all(len(pairs) == 3 * len(by_problem[split]) for split, pairs in halves.items())
    assert len(by_problem["test"]) == pytest.approx(100, abs=30)
    other = read(file, "test", group_by="problem", test_share=0.25, split_seed=1)
    assert {pair.chosen for pair in other} != by_problem["test"]
    assert splits_of(DatasetSpec(name="a", source=str(file), test_share=0.25)) == ("train", "test")


def test_a_problem_stays_where_it_is_when_rows_are_added(tmp_path):
    few = {pair.chosen for pair in read(problems(tmp_path, 40), "test", group_by="problem", test_share=0.5)}
    many = {pair.chosen for pair in read(problems(tmp_path, 80), "test", group_by="problem", test_share=0.5)}
    assert few == many & {f"right {n}" for n in range(40)}


def test_without_a_group_column_pairs_of_one_prompt_stay_together(tmp_path):
    rows = [{**GOOD, "prompt": f"p{n}", "chosen": f"{n} {side}"} for n in range(100) for side in "ab"]
    file = jsonl(tmp_path / "a.jsonl", *rows)
    train, test = (read(file, split, test_share=0.5) for split in ("train", "test"))
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in test}
    assert len(train) + len(test) == 200


def test_a_row_without_a_group_is_named(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {**GOOD, "problem": 1}, {**GOOD, "problem": None})
    with pytest.raises(DataError, match=r"a\.jsonl, row 1: no value in the group column 'problem'"):
        read(file, "train", group_by="problem", test_share=0.01)


BAD_LINES = {
    "a number": (json.dumps({**GOOD, "chosen": 3}).encode(), "column 'chosen' holds int"),
    "a null": (json.dumps({**GOOD, "rejected": None}).encode(), "column 'rejected' holds NoneType"),
    "a null row": (b"null", "expected an object, found NoneType"),
    "empty": (json.dumps({**GOOD, "chosen": " "}).encode(), "column 'chosen' is empty"),
    "no UTF-8": (b'{"prompt": "a", "chosen": "\xff\xfe", "rejected": "b"}', "byte 0xff at 27 is no UTF-8"),
    "a million characters": (
        json.dumps({**GOOD, "chosen": "x" * 1_000_000}).encode(),
        f"column 'chosen' has 1,000,000 characters; at most {MAX_CHARACTERS:,}",
    ),
    "a name twice": (
        b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        "'chosen' stands twice",
    ),
    "cut off": (b'{"prompt": "a", "chos', "cannot be read as JSON"),
    "messages and text": (
        json.dumps(
            {**GOOD, "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        ).encode(),
        "column 'chosen' begins with a user turn that the prompt does not have",
    ),
    "a column missing": (b'{"prompt": "a", "chosen": "b"}', "no column 'rejected'"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_row_is_named_or_left_out_and_listed(tmp_path, what):
    line, message = BAD_LINES[what]
    file = tmp_path / "bad.jsonl"
    good = json.dumps(GOOD).encode()
    file.write_bytes(b"\n".join([good, line, b"", good]))
    with pytest.raises(DataError) as raised:
        read(file)
    assert f"{file}, row 1" in str(raised.value)
    assert message in str(raised.value)
    left_out: list[str] = []
    assert len(read(file, skip_bad_rows=True, left_out=left_out)) == 2
    (said,) = left_out
    assert f"{file}, row 1" in said
    assert message in said


def test_bytes_that_are_no_utf8_in_parquet_are_named_by_row(tmp_path):
    texts = pa.array([b"fine", b"\xff\xfe", b"fine"], pa.binary())
    broken = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    fine = pa.array(["a", "b", "c"])
    table = pa.table({"prompt": fine, "chosen": broken, "rejected": fine})
    parquet.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet, row 1: column 'chosen': Invalid UTF8 sequence"):
        read(tmp_path / "bad.parquet")
    left_out: list[str] = []
    assert len(read(tmp_path / "bad.parquet", skip_bad_rows=True, left_out=left_out)) == 2
    assert len(left_out) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["prompt", "chosen", "chosen"], ["a", "b", "c"]], r"bad\.csv: column 'chosen' stands twice"),
        ([list(GOOD), ["a", "b"]], r"bad\.csv, row 0: 2 cells under 3 column names"),
        ([list(GOOD), ["a", "b", "c" * 600_000]], r"row 0: column 'rejected' has 600,000 characters"),
        ([list(GOOD)], "holds no pairs"),
    ],
)
def test_a_bad_csv_is_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read(csv_file(tmp_path / "bad.csv", *rows))


def test_bytes_that_are_no_utf8_in_csv_are_named_by_row(tmp_path):
    (tmp_path / "bad.csv").write_bytes(b"prompt,chosen,rejected\na,b,c\na,\xff,c\n")
    with pytest.raises(DataError, match=r"bad\.csv, row 1: column 'chosen' holds .* no UTF-8"):
        read(tmp_path / "bad.csv")


def test_a_quote_that_never_ends_is_named(tmp_path):
    (tmp_path / "bad.csv").write_text('prompt,chosen,rejected\na,"b,c\n')
    with pytest.raises(DataError, match=r"bad\.csv cannot be read as csv"):
        read(tmp_path / "bad.csv")


def test_nothing_left_says_what_was_read(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {**GOOD, "subset": "a"}, {**GOOD, "chosen": 3, "subset": "b"})
    with pytest.raises(DataError, match=r"holds no pairs\. 2 rows were read, 0 of them bad"):
        read(file, keep=(("subset", "c"),))
    with pytest.raises(
        DataError, match=r"2 rows were read, 1 of them bad\. The first: .*row 1: column 'chosen'"
    ):
        read(file, keep=(("subset", "b"),), skip_bad_rows=True)


@pytest.mark.parametrize(
    ("folder", "split", "count"),
    [
        ("ultrafeedback", "train", 200),
        ("ultrafeedback", "test", 200),
        ("ultrafeedback_paraphrase", "test", 200),
        ("rewardbench_math", "test", 200),
    ],
)
def test_real_sets_are_read_whole(shared, folder, split, count):
    pairs = read(shared / "data" / folder, split)
    assert len(pairs) == count
    assert all(pair.prompt[0].role == "user" and pair.chosen.strip() for pair in pairs)


def test_a_rewriting_says_what_it_rewrites(shared):
    rewritten = read(shared / "data" / "ultrafeedback_paraphrase", "test")
    originals = {pair.chosen for pair in read(shared / "data" / "ultrafeedback", "test")}
    assert {pair.original_chosen for pair in rewritten} <= originals


def test_rows_are_kept_by_column(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {**GOOD, "subset": "hep-cpp"}, {**GOOD, "subset": "math-prm"})
    assert len(read(file, keep=(("subset", "hep*"),))) == 1


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read as parquet"):
        read(tmp_path / "bad.parquet")


def test_a_folder_without_the_split_says_what_it_holds(tmp_path):
    jsonl(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no test split: expected test\.parquet.*found train\.jsonl"):
        read(tmp_path, "test")


def test_a_bom_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert content_digest(read(tmp_path / "a.jsonl")) == content_digest(
        read(jsonl(tmp_path / "b.jsonl", GOOD))
    )


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
