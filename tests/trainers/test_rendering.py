"""What chat templates make of a conversation: all that its turns say stands in the text, or the row is refused."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from trainers.data.records import Message, Pair
from trainers.errors import DataError, SweepError
from trainers.models.tiny import build_tokenizer
from trainers.pairs.templates import _add_markers
from trainers.pairs.tokens import tokenize_pairs
from trainers.specs import DrawSpec

_TURN = "<|{{ m.role }}|>{{ m.content | trim }}<|end|>"
_ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def loop(body, before=""):
    return f"{before}{{% for m in messages %}}{body}{{% endfor %}}{_ASK}"


_CALLS = (
    "{% for call in m.tool_calls or [] %}"
    '<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>'
    "{% endfor %}"
)
TEMPLATES = {
    # As Qwen 2.5: other roles than these vanish; tools and calls are written.
    "qwen": loop(
        "{% if m.role in ('system', 'user', 'assistant', 'tool') %}"
        f"<|{{{{ m.role }}}}|>{{{{ m.content }}}}{_CALLS}<|end|>{{% endif %}}",
        "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}",
    ),
    # As Llama 3.1: what a tool answers is written as JSON; the text beside a call is not.
    "llama": loop(
        "<|{{ m.role }}|>{% if m.tool_calls %}"
        + _CALLS
        + "{% elif m.role == 'tool' %}{{ m.content | tojson }}"
        "{% else %}{{ m.content | trim }}{% endif %}<|end|>"
    ),
    # As Gemma 2.
    "gemma": loop(
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}" + _TURN
    ),
    # As Mistral: the system turn stands in the last user turn.
    "mistral": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last or loop.index == loop.length - 1 %}"
        "{% for s in messages if s.role == 'system' %}{{ s.content }} {% endfor %}{% endif %}{{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    # As DeepSeek V3: arguments are a text, and reasoning is dropped from every turn.
    "deepseek": loop(
        "<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{% for call in m.tool_calls or [] %}"
        "{{ '<call>' + call.function.name + ' ' + call.function.arguments }}{% endfor %}<|end|>"
    ),
    # As Qwen 3: the reasoning of turns before the last user turn is dropped.
    "reasoning": (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
        "{% endif %}{% endfor %}"
        + loop(
            "<|{{ m.role }}|>{% if m.reasoning_content and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content }}\n"
            "</think>\n{% endif %}{{ m.content.split('</think>')[-1] if loop.index0 < ns.last else m.content }}<|end|>"
        )
    ),
    # The generation prompt begins the reasoning.
    "thinking": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "any": loop(_TURN),
}


def tokenizer_of(template):
    """A token a byte, so that tokens are read back as they were written."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.name_or_path = "some/model"
    tokenizer.chat_template = template
    return tokenizer


def texts_of(template, pair):
    """The prompt and both responses as they are read back from their tokens."""
    tokenizer = tokenizer_of(TEMPLATES[template])
    (tokens,), _ = tokenize_pairs([pair], tokenizer, DrawSpec(max_response_tokens=9999))
    return tuple(tokenizer.decode(ids) for ids in (tokens.prompt, tokens.chosen, tokens.rejected))


ASKED = Message("user", "Warm in Rome?")
ARGUMENTS = {"city": 'the "old"\nZürich', "days": 3, "hourly": True}


def calling(arguments=ARGUMENTS, content=""):
    call = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": arguments}}
    return Message("assistant", content, json.dumps({"tool_calls": [call]}))


def reasoning(text, content="Hello"):
    return Message("assistant", content, json.dumps({"reasoning_content": text}))


TOOLS = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}])
TOOL = Message("tool", '20 C, "dry"\nand still', json.dumps({"name": "weather", "tool_call_id": "c1"}))
AGAIN = Message("user", "Again?")


def pair_of(*prompt, **more):
    return Pair(**{"prompt": prompt, "chosen": "It is.", "rejected": "No idea.", **more})


def responding(*turns):
    return pair_of(ASKED, chosen_turns=turns)


KEPT = {
    "white space": ("any", pair_of(Message("user", "  Why \n"), chosen="\nSo. ")),
    "a system turn within the last user turn": (
        "mistral",
        pair_of(Message("system", "Be kind."), ASKED, Message("assistant", "Hm."), AGAIN),
    ),
    "text beside a call": ("qwen", pair_of(ASKED, calling(content="I look."), TOOL)),
    "calls with arguments as text": ("qwen", pair_of(ASKED, calling(json.dumps(ARGUMENTS)), TOOL)),
    "calls for a template of texts": ("deepseek", pair_of(ASKED, calling(), TOOL)),
    "tools": ("qwen", pair_of(ASKED, calling(), TOOL, tools=TOOLS)),
    "a tool's answer as JSON": ("llama", pair_of(ASKED, calling(), TOOL)),
    "a response that calls": ("qwen", responding(calling(), TOOL, Message("assistant", "So."))),
    "notes on a turn": ("any", pair_of(ASKED._replace(fields='{"language": "English", "name": "Ada"}'))),
    "earlier reasoning": (
        "deepseek",
        pair_of(ASKED, Message("assistant", "<think>Hm, 3</think>Hello"), AGAIN),
    ),
    "earlier reasoning that another part of the prompt began": (
        "deepseek",
        pair_of(ASKED, Message("assistant", "Hm, 3</think>Hello"), AGAIN),
    ),
    "earlier reasoning in a field": ("reasoning", pair_of(ASKED, reasoning("Hm."), AGAIN)),
    "reasoning that is scored": ("reasoning", responding(reasoning("Hm."))),
    "reasoning that the generation prompt begins": (
        "thinking",
        pair_of(ASKED, chosen="<think>\nHm.</think>So", rejected="<think>\nNo.</think>So"),
    ),
}


@pytest.mark.parametrize(("template", "pair"), KEPT.values(), ids=KEPT)
def test_what_stands_in_the_text_is_no_fault(template, pair):
    prompt, chosen, rejected = texts_of(template, pair)
    last = [turns[-1].content.strip().removeprefix("<think>") for turns in pair.responses]
    assert last[0].strip() in chosen
    assert last[1].strip() in rejected
    if any("tool_calls" in turn.fields for turn in pair.prompt):
        assert '"days": 3' in prompt
    assert ('"parameters"' in prompt) == bool(pair.tools)


LOST = {
    "a role that the template does not know": (
        "qwen",
        pair_of(Message("User", "Why so?")),
        "the text of the User turn: 'Why so?'",
    ),
    "a role that may not be": (
        "gemma",
        pair_of(Message("system", "Be kind."), AGAIN, Message("system", "Be kinder."), ASKED),
        "System role not supp",
    ),
    "a response": ("mistral", responding(Message("tool", "20 C")), "text of the tool turn: '20 C'"),
    "a turn whose words stand elsewhere": (
        "qwen",
        pair_of(Message("model", "Rome?"), ASKED),
        "text of the user turn: 'Warm in",
    ),
    "text beside a call": (
        "llama",
        pair_of(ASKED, calling(content="I look."), TOOL),
        "the text of the assistant turn: 'I look.'",
    ),
    "calls": ("any", pair_of(ASKED, calling(), TOOL), "tool_calls of the assistant turn: 'weather'"),
    "calls of a response": (
        "any",
        responding(calling({"city": "Rome"}), TOOL, Message("assistant", "The weather in Rome")),
        "the text of the tool turn (or the tool_calls before it): '20 C",
    ),
    "calls in another form": (
        "qwen",
        pair_of(ASKED, Message("assistant", "", '{"tool_calls": ["weather"]}')),
        "refuses a conversation of the turns user, assistant",
    ),
    "an older call": (
        "qwen",
        pair_of(
            ASKED, Message("assistant", "Hm", '{"function_call": {"name": "weather", "arguments": "{}"}}')
        ),
        "function_call of the assistant turn: 'weather'",
    ),
    "tools": (
        "llama",
        pair_of(Message("user", "weather?"), tools=TOOLS),
        "leaves out or moves the tool weather",
    ),
    "reasoning that is scored": (
        "deepseek",
        pair_of(ASKED, chosen="<think>Hm</think>So"),
        "the text of the assistant turn: '<think>Hm</think>So'",
    ),
    "reasoning in a field that is scored": (
        "any",
        responding(reasoning("Hm.")),
        "reasoning_content of the assistant turn: 'Hm.'",
    ),
    "reasoning in a field before a user turn that is scored": (
        "reasoning",
        responding(reasoning("Hm."), AGAIN, Message("assistant", "So.")),
        "reasoning_content of the assistant turn: 'Hm.'",
    ),
    "reasoning of this exchange": (
        "any",
        pair_of(ASKED, reasoning("Hm.", "I look."), TOOL),
        "reasoning_content of the assistant turn: 'Hm.'",
    ),
}


@pytest.mark.parametrize(("template", "pair", "message"), LOST.values(), ids=LOST)
def test_what_a_template_leaves_out_is_refused_by_row_and_words(template, pair, message):
    tokenizer = tokenizer_of(TEMPLATES[template])
    with pytest.raises(DataError) as refused:
        tokenize_pairs([pair_of(ASKED), pair], tokenizer, DrawSpec())
    assert str(refused.value).startswith("row 1: the chat template of some/model ")
    assert message in str(refused.value)


def test_a_response_of_several_turns_is_all_that_the_template_adds():
    turns = (calling({"city": "Rome"}), Message("tool", "20 C"), Message("assistant", "It is 20 C."))
    prompt, chosen, rejected = texts_of("qwen", responding(*turns))
    assert prompt == "<|user|>Warm in Rome?<|end|><|assistant|>"
    call = '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call>'
    assert chosen == f"{call}<|end|><|tool|>20 C<|end|><|assistant|>It is 20 C.<|end|>"
    assert rejected == "No idea.<|end|>"


ROLES = st.sampled_from(["system", "user", "assistant", "tool", "User", "model"])
# No template writes these letters itself.
LETTERS = "QZé"
WORDS = st.text(st.sampled_from(f'{LETTERS}"\\<>{{ \n'), max_size=12)


def letters(text):
    return Counter(letter for letter in text if letter in LETTERS)


@settings(max_examples=60, deadline=None)
@given(
    template=st.sampled_from(sorted(TEMPLATES)),
    turns=st.lists(st.builds(Message, ROLES, WORDS), min_size=1, max_size=4),
    chosen=WORDS,
)
def test_every_text_stands_in_the_tokens_or_the_row_is_refused(template, turns, chosen):
    try:
        prompt, response, _ = texts_of(template, pair_of(*turns, chosen=chosen))
    except SweepError:
        return
    assert letters("".join(turn.content for turn in turns)) <= letters(prompt)
    assert letters(chosen) <= letters(response)


def test_marker_tokens_take_every_role_and_no_calls():
    tokenizer = tokenizer_of(None)
    _add_markers(tokenizer)
    pair = pair_of(Message("system", "Be kind."), ASKED, Message("tool", "20 C"))
    (tokens,), _ = tokenize_pairs([pair], tokenizer, DrawSpec())
    assert tokenizer.decode(tokens.prompt) == (
        "<|user|>Be kind.<|user|>Warm in Rome?<|user|>20 C<|assistant|>"
    )
    with pytest.raises(DataError, match="leaves out or moves tool_calls"):
        tokenize_pairs([pair_of(ASKED, calling(), TOOL)], tokenizer, DrawSpec())


def test_a_tiny_model_has_no_token_for_a_tool():
    with pytest.raises(DataError, match=r"of the built-in tiny models .* no token for the role tool"):
        tokenize_pairs([pair_of(ASKED, Message("tool", "20 C"))], build_tokenizer(), DrawSpec())


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            pair_of(ASKED, calling(), TOOL),
            "row 0: ex_grm asks about the answer to a user turn, and .* a tool turn",
        ),
        (responding(calling(content="I look.")), "row 0: ex_grm asks about a response's text, .* tool_calls"),
    ],
)
def test_a_verification_asks_for_no_less_than_the_pair_says(pair, message):
    if pair.chosen_turns:
        pair = Pair(prompt=pair.prompt, chosen="I look.", rejected="No.", chosen_turns=pair.chosen_turns)
    with pytest.raises(DataError, match=message):
        tokenize_pairs([pair], tokenizer_of(TEMPLATES["qwen"]), DrawSpec(), rendering="verification")
