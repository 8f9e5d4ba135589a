"""Where a response begins and ends under templates like the public ones, and what --system and --reasoning do."""

import json

import pytest

from tests.trainers.test_rendering import AGAIN, ASKED, pair_of, reasoning, tokenizer_of
from trainers.data.records import Message
from trainers.errors import DataError, ModelError, SpecError
from trainers.pairs.templates import choose_template, given_template, load_tokenizer, without_reasoning
from trainers.pairs.tokens import tokenize_pairs
from trainers.specs import DrawSpec


def turns(body, ask, before=""):
    user = "{% if m.role != 'assistant' %}<|user|>{{ m.content }}{% else %}"
    loop = f"{{% for m in messages %}}{user}{body}{{% endif %}}{{% endfor %}}"
    return f"{before}{loop}{{% if add_generation_prompt %}}{ask}{{% endif %}}"


_SAID = "{% set said = m.content.split('</think>')[-1] %}"
_THOUGHT = (
    "{% set thought = m.reasoning_content if m.reasoning_content else (m.content.split('</think>')[0].split('<think>')[-1]"
    " if '</think>' in m.content else '') %}"
)
LIKE = {
    # It asks for reasoning, and writes none of it.
    "r1-distill": turns(_SAID + "<|bot|>{{ said }}<|end|>", "<|bot|><think>\n"),
    # It closes reasoning that was not asked for.
    "deepseek-v3": turns(_SAID + "<|bot|></think>{{ said }}<|end|>", "<|bot|><think>"),
    # It asks for reasoning, and closes it where there is none.
    "nemotron-3": turns(
        _SAID + _THOUGHT + "<|bot|>\n<think>{{ '\n' + thought + '\n' if thought }}</think>{{ said }}<|end|>",
        "<|bot|>\n<think>\n",
    ),
    "minimax-m2": turns(
        _SAID
        + _THOUGHT
        + "<|bot|>\n{% if thought %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}<|end|>",
        "<|bot|>\n<think>\n",
    ),
    # A finished answer begins with empty reasoning that the generation prompt does not ask for.
    "qwen3": turns(
        _SAID + _THOUGHT + "<|bot|>\n<think>\n{{ thought }}\n</think>\n\n{{ said }}<|end|>", "<|bot|>\n"
    ),
    "glm-4.6": turns(
        _SAID + _THOUGHT + "<|bot|>\n<think>{{ thought }}</think>\n{{ said }}<|end|>", "<|bot|>"
    ),
    "gpt-oss": turns(
        "{% if m.thinking %}<|bot|><|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|bot|><|channel|>final<|message|>{{ m.content }}<|return|>",
        "<|bot|>",
    ),
}


def spans(name, pair, tags=("<think>", "</think>"), **draw):
    tokenizer = tokenizer_of(LIKE[name])
    tokenizer.add_tokens(list(tags))
    (tokens,), _ = tokenize_pairs([pair], tokenizer, DrawSpec(**draw))
    return tuple(tokenizer.decode(ids) for ids in (tokens.prompt, tokens.chosen, tokens.rejected))


PROMPT = "<|user|>Warm in Rome?<|bot|>"
THINKING = pair_of(ASKED, chosen_turns=(reasoning("Hm.", "Yes."),))
PLAIN = {
    "r1-distill": ("", "It is.<|end|>"),
    "deepseek-v3": ("</think>", "It is.<|end|>"),
    "nemotron-3": ("\n<think></think>", "It is.<|end|>"),
    "minimax-m2": ("\n", "It is.<|end|>"),
    "qwen3": ("\n", "<think>\n\n</think>\n\nIt is.<|end|>"),
    "glm-4.6": ("", "\n<think></think>\nIt is.<|end|>"),
    "gpt-oss": ("", "<|channel|>final<|message|>It is.<|return|>"),
}


@pytest.mark.parametrize("name", LIKE)
def test_a_response_begins_where_finished_turns_part(name):
    start, answer = PLAIN[name]
    expected = (PROMPT + start, answer, answer.replace("It is.", "No idea."))
    assert spans(name, pair_of(ASKED)) == expected


def test_reasoning_on_one_side_begins_that_side_and_no_tag_is_cut():
    assert spans("nemotron-3", THINKING) == (
        f"{PROMPT}\n<think>",
        "\nHm.\n</think>Yes.<|end|>",
        "</think>No idea.<|end|>",
    )
    started = pair_of(ASKED, chosen="<thin air")
    assert spans("minimax-m2", started)[:2] == (f"{PROMPT}\n", "<thin air<|end|>")
    assert spans("minimax-m2", THINKING)[:2] == (f"{PROMPT}\n", "<think>\nHm.\n</think>\n\nYes.<|end|>")


@pytest.mark.parametrize(
    ("without", "side", "expected"),
    [
        # Both sides share a part of their tags.
        ("</think>", "chosen", ("<think>Hm.Yes.", "</think>No idea.")),
        # Only one begins with a tag.
        ("<thus>", "chosen", ("<think>Hm.Yes.", "<thus>No idea.")),
        ("<thus>", "rejected", ("<thus>It is.", "<think>Hm.Yes.")),
    ],
)
def test_a_tag_that_both_sides_share_in_part_stays_whole(without, side, expected):
    said = f"<|bot|>{{{{ '<think>Hm.' if m.reasoning_content else '{without}' }}}}{{{{ m.content }}}}"
    tokenizer = tokenizer_of(turns(said, "<|bot|><think>"))
    tokenizer.add_tokens(["<think>", *(["</think>"] if without == "</think>" else [])])
    pair = pair_of(ASKED, **{f"{side}_turns": (reasoning("Hm.", "Yes."),)})
    (tokens,), _ = tokenize_pairs([pair], tokenizer, DrawSpec())
    assert tokenizer.decode(tokens.prompt) == PROMPT
    assert tuple(map(tokenizer.decode, (tokens.chosen, tokens.rejected))) == expected


DROPPED = {
    "in a field": THINKING,
    "in the text": pair_of(ASKED, chosen="<think>Hm.</think>\n\nYes."),
    "in a text whose beginning was asked for": pair_of(ASKED, chosen="Hm.</think>Yes."),
}


@pytest.mark.parametrize("pair", DROPPED.values(), ids=DROPPED)
@pytest.mark.parametrize("name", ["r1-distill", "qwen3", "nemotron-3"])
def test_reasoning_is_dropped_where_the_flag_says_so(name, pair):
    found = spans(name, pair, reasoning="drop")
    start, answer = PLAIN[name]
    assert found == (PROMPT + start, answer.replace("It is.", "Yes."), answer.replace("It is.", "No idea."))


@pytest.mark.parametrize("name", [name for name in LIKE if name not in ("r1-distill", "deepseek-v3")])
def test_reasoning_that_is_kept_is_read_and_the_answer_alone_is_scored(name):
    field = "thinking" if name == "gpt-oss" else "reasoning_content"
    turn = Message("assistant", "Yes.", json.dumps({field: "Yes."}))
    tokenizer = tokenizer_of(LIKE[name])
    tokenizer.add_tokens(["<think>", "</think>"])
    for pair in (pair_of(ASKED, chosen_turns=(turn,)), pair_of(ASKED, chosen="<think>Yes.</think>\n\nYes.")):
        (kept,), _ = tokenize_pairs([pair], tokenizer, DrawSpec(reasoning="keep"))
        (scored,), _ = tokenize_pairs([pair], tokenizer, DrawSpec())
        assert (kept.prompt, kept.chosen, kept.rejected) == (scored.prompt, scored.chosen, scored.rejected)
        end = PLAIN[name][1].partition("It is.")[2]
        assert [tokenizer.decode(ids) for ids in kept.scored] == [f"Yes.{end}", f"No idea.{end}"]
        assert scored.scored == (scored.chosen, scored.rejected)


def test_reasoning_between_calls_of_tools_cannot_be_kept():
    looks = Message("tool", "20 C")
    pair = pair_of(ASKED, chosen_turns=(reasoning("Hm.", "I look."), looks, reasoning("So.", "Yes.")))
    with pytest.raises(
        DataError, match=r"row 0: a response thinks again after its first turn.*score or drop"
    ):
        spans("qwen3", pair, reasoning="keep")
    assert spans("qwen3", pair, reasoning="drop")


def test_reasoning_that_a_template_leaves_out_names_the_flag():
    with pytest.raises(DataError, match=r"row 0: .*leaves out or moves .*--reasoning drop"):
        spans("r1-distill", pair_of(ASKED, chosen="<think>Hm.</think>Yes."))


def test_a_note_on_a_turn_outlives_the_reasoning_that_is_dropped():
    turn = Message("assistant", "Y", '{"reasoning_content": "H", "name": "Ada"}')
    assert json.loads(without_reasoning(turn).fields) == {"name": "Ada"}


@pytest.mark.parametrize("name", LIKE)
def test_a_verification_finds_its_answer_behind_what_the_template_begins_with(name):
    tokenizer = tokenizer_of(LIKE[name])
    tokenizer.add_tokens(["<think>", "</think>"])
    (tokens,), _ = tokenize_pairs([pair_of(ASKED)], tokenizer, DrawSpec(), rendering="verification")
    start, answer = PLAIN[name]
    before = f"(Yes/No)?<|bot|>{start}{answer.partition('It is.')[0]}"
    for ids, text, letter in ((tokens.chosen, "It is.", "Y"), (tokens.rejected, "No idea.", "N")):
        assert tokenizer.decode(tokens.prompt + ids).endswith(before + letter)
        assert f"Answer: {text}\n" in tokenizer.decode(tokens.prompt + ids)


GEMMA = turns(
    "<|bot|>{{ m.content }}",
    "<|bot|>",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
)
UNSAID = "{% set messages = messages | selectattr('role', 'ne', 'system') | list %}" + turns(
    "<|bot|>{{ m.content }}", "<|bot|>"
)
KIND = pair_of(Message("system", "Be kind."), Message("system", "Be short."), ASKED)
SYSTEM = {"fold": "Be kind.\n\nBe short.\n\nWarm in Rome?", "drop": "Warm in Rome?"}


@pytest.mark.parametrize("system", SYSTEM)
@pytest.mark.parametrize("template", [GEMMA, UNSAID], ids=["refuses", "leaves out"])
def test_a_system_turn_that_a_template_does_not_take_is_folded_or_dropped_and_counted(template, system):
    tokenizer = tokenizer_of(template)
    (tokens, _), counts = tokenize_pairs([KIND, pair_of(ASKED)], tokenizer, DrawSpec(system=system))
    assert tokenizer.decode(tokens.prompt) == f"<|user|>{SYSTEM[system]}<|bot|>"
    assert counts.without_system == 1


def test_a_system_turn_is_left_to_a_template_that_takes_it_and_refused_where_it_must_be():
    (tokens,), counts = tokenize_pairs([KIND], tokenizer := tokenizer_of(LIKE["qwen3"]), DrawSpec())
    assert tokenizer.decode(tokens.prompt).startswith("<|user|>Be kind.<|user|>Be short.<|user|>Warm")
    assert counts.without_system == 0
    # Without a user turn to take it.
    untaken = pair_of(Message("system", "Be kind."), Message("assistant", "Hi."), AGAIN)
    for pair, system in ((KIND, "refuse"), (untaken, "fold")):
        with pytest.raises(DataError, match=r"row 0: .*no system role"):
            tokenize_pairs([pair], tokenizer_of(GEMMA), DrawSpec(system=system))


def test_a_template_of_parts_gets_parts():
    parts = (
        "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content if part.type == 'text' %}{{ part.text }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = tokenizer_of(parts)
    (tokens,), _ = tokenize_pairs([pair_of(ASKED)], tokenizer, DrawSpec())
    assert tokenizer.decode(tokens.prompt) == "<|user|>Warm in Rome?<|assistant|>"
    assert tokenizer.decode(tokens.chosen) == "It is."


NAMED = {"chat": "{{ messages[0].content }} chat", "rag": "{{ messages[0].content }} rag"}


def test_a_template_is_chosen_by_name_or_file(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }} own", "utf-8")
    tokenizer_of(NAMED).save_pretrained(tmp_path / "model")
    inline = "{{ messages[0].content }} " + "text" * 100
    for given, said in (("rag", "rag"), (str(file), "own"), (inline, "text" * 100)):
        tokenizer = load_tokenizer(str(tmp_path / "model"), template=given_template(given))
        assert (
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == f"a {said}"
        )
    with pytest.raises(ModelError, match=r"several chat templates; name one of its own, chat, rag"):
        load_tokenizer(str(tmp_path / "model"))
    with pytest.raises(ModelError, match=r"no chat template 'tools'; .*chat, rag.*--template"):
        choose_template(tokenizer_of(NAMED), "tools")
    with pytest.raises(SpecError, match=r"--template .*none\.jinja: it cannot be read"):
        given_template(str(tmp_path / "none.jinja"))
