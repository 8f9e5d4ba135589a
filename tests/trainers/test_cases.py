"""Small inputs as the field has them (../shared/cases): each is read as it should be, or refused by name with exit 2."""

import json
import re
from pathlib import Path

import pytest

from tests.trainers.command_line import said

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def turn(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def asked(*texts: str) -> list[dict[str, object]]:
    """Turns of the user and the assistant."""
    return [turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]


def liked(thing: str, *before: dict[str, object]) -> tuple[object, ...]:
    return [*before, *asked(f"Do you like {thing}?")], f"Yes, {thing} is very good.", "No, never."


def good(thing: str, *before: dict[str, object]) -> tuple[object, ...]:
    return [*before, *asked(f"About {thing}?")], f"{thing} is good.", "No."


def measured(thing: str) -> tuple[object, ...]:
    called = [*asked(f"How warm is {thing}?", "Let me look."), turn("tool", "20 C")]
    return [turn("system", "Be kind."), *called], "It is 20 C.", "No idea."


def told(thing: str) -> tuple[object, ...]:
    before = asked(f"What is good about {thing}?", "It is useful.", f"Tell me more about {thing}.")
    return before, f"I would be glad to say more about {thing}.", "I would rather not."


WEATHER = (
    [
        *asked("Weather in Rome?"),
        turn("assistant", "Calling.", tool_calls=[CALL]),
        turn("tool", "20 C", name="weather"),
    ],
    "It is 20 C.",
    "I do not know.",
)
KIND = turn("system", "Be kind.")
BREAD, TRAINS = asked("About bread?"), asked("About trains?")
LIKES = (12, liked("bread"), liked("trains"))
GOODS = (12, good("bread"), good("trains"))
# How many pairs, and the first two of them.
READ = {
    "multiturn_completion/train": (12, measured("bread"), measured("trains")),
    "prompt_and_convo/train": (12, liked("bread", KIND), liked("trains", KIND)),
    "role_case/train": (4, (asked("Q0?"), "Yes.", "No."), (asked("Q1?"), "Yes.", "No.")),
    "tool_calls_text/train": (4, WEATHER, WEATHER),
    "hh_rlhf/train": (12, told("bread"), told("trains")),
    "implicit_midword/train": (
        12,
        (asked("The sum of 1 and 0 is"), "10.", "11."),
        (asked("The sum of 1 and 1 is"), "11.", "12."),
    ),
    "question_col/train": (
        20,
        (asked("What is 0?"), "Sure, here it is 0.", "Sure, here it is or 1."),
        (asked("What is 1?"), "The answer is no 1.", "Yes or 2."),
    ),
    "orca_dpo/train": (12, good("bread", turn("system", "You are helpful.")), good("trains")),
    "chosen_dict/train": GOODS,
    "parts/train": (12, (BREAD, "bread is good", "No"), (TRAINS, "trains is good", "No")),
    "csv_messages/train": LIKES,
    "json_array/train": LIKES,
    "validation_split/train": LIKES,
    "validation_split/validation": LIKES,
    "helpsteer3/train": (10, *GOODS[1:]),
    "rewardbench2/test": (36, good("bread"), (BREAD, "bread is good.", "Never.")),
    "identical/train": (12, (BREAD, "same", "same"), (TRAINS, "same", "same")),
}
REFUSED = {
    "hh_rlhf/test": "row 13: column 'rejected' is empty",
    "last_turn_user/train": "row 0: column 'chosen' ends in a user turn",
    "both_formats/train": "holds the train split more than once (train.jsonl, train.parquet): which is meant?",
    "validation_split/test": "Its validation split is not taken for a test split",
}


def show(folder: Path, case: str, capsys, *more: str, pairs: int = 2) -> tuple[object, str, str]:
    name, split = case.split("/")
    return said(["show", folder / "cases" / name, "--split", split, "--pairs", str(pairs), *more], capsys)


def rows_of(out: str) -> tuple[str, list[dict[str, object]]]:
    """What is said of the set, and the pairs that are shown."""
    head, *texts = re.split("── [0-9]+ ──", out)
    return head, [json.loads(text) for text in texts]


def test_what_is_right_is_said_of_every_case(shared):
    cases = {path.name for path in (shared / "cases").iterdir() if path.is_dir()}
    assert cases == {case.split("/")[0] for case in {**READ, **REFUSED}}


@pytest.mark.parametrize("case", READ)
def test_a_case_is_read(shared, case, capsys):
    code, out, error = show(shared, case, capsys)
    assert code == 0, error
    (head, rows), (count, *pairs) = rows_of(out), READ[case]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == pairs
    assert f": {count} pairs, content" in head


@pytest.mark.parametrize("case", REFUSED)
def test_a_case_is_refused(shared, case, capsys):
    code, _, error = show(shared, case, capsys)
    assert code == 2
    assert REFUSED[case] in error
    assert len(error.strip().splitlines()) == 1


def test_dialogues_that_differ_before_their_last_turns_are_scored_from_there_on(shared, capsys):
    _, out, _ = show(shared, "hh_rlhf/test", capsys, "--skip-bad-rows", pairs=13)
    head, rows = rows_of(out)
    assert ": 13 pairs, content" in head
    assert "1 bad rows left out:" in head
    assert rows[-1] == {
        "prompt": asked("What is good about maps?"),
        "chosen": asked("", "Maps show roads.", "And rivers?", "Yes.")[1:],
        "rejected": "Maps are flat.",
    }
