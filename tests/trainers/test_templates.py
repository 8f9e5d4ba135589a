"""Tokenizers with and without a chat template, the rows of marker tokens, padding, and the question of EX-GRM."""

import dataclasses
import datetime

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from tests.trainers.architectures import word_tokenizer
from tests.trainers.trainings import load
from trainers.data.records import Message, Pair, user_prompt
from trainers.errors import DataError, ModelError
from trainers.models.saving import folder_files, save_model
from trainers.pairs.templates import ASSISTANT_MARKER, USER_MARKER, load_tokenizer, padding_token, render
from trainers.pairs.tokens import tokenize_pairs
from trainers.specs import DrawSpec

WORDS = [
    *("<unk>", "<s>", "</s>", "<pad>"),
    *"abcdefgh",
    *("Yes", "No", "Question:", "Answer:", "Verification:", "Is", "the", "answer", "correct"),
]
TURNS = (Message("user", "a b"), Message("assistant", "c"), Message("user", "d"))
PAIR = Pair(prompt=TURNS, chosen="e f", rejected="g")


def with_bos_added():
    """As Llama 2's base model: the tokenizer itself begins with its BOS."""
    tokenizer = word_tokenizer(WORDS, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def with_bos_unused():
    """As GPT-2: it has a BOS but does not write it."""
    return word_tokenizer(WORDS, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def without_bos():
    return word_tokenizer(WORDS, unk_token="<unk>", eos_token="</s>")


def without_eos():
    return word_tokenizer(WORDS, unk_token="<unk>", bos_token="<s>")


TEMPLATELESS = {
    "bos added": (with_bos_added, ["<s>"], ["</s>"]),
    "bos unused": (with_bos_unused, [], ["</s>"]),
    "no bos": (without_bos, [], ["</s>"]),
    "no eos": (without_eos, [], []),
}


def reloaded(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


def marked(kind, folder):
    return reloaded(TEMPLATELESS[kind][0](), folder)


@pytest.mark.parametrize("kind", TEMPLATELESS)
def test_a_templateless_tokenizer_marks_turns_with_two_tokens_that_are_added_once(kind, tmp_path):
    tokenizer = marked(kind, tmp_path / "first")
    (tokens,), _ = tokenize_pairs([PAIR], tokenizer, DrawSpec())
    _, begin, end = TEMPLATELESS[kind]
    user, assistant = [USER_MARKER], [ASSISTANT_MARKER]
    turns = [*user, "a", "b", *assistant, "c", *end, *user, "d", *assistant]
    assert tokenizer.convert_ids_to_tokens(tokens.prompt) == [*begin, *turns]
    assert tokenizer.convert_ids_to_tokens(tokens.chosen) == ["e", "f", *end]
    assert tokenizer.convert_ids_to_tokens(tokens.rejected) == ["g", *end]
    again = reloaded(tokenizer, tmp_path / "second")
    assert len(tokenizer) == len(again) == len(WORDS) + 2
    assert tokenize_pairs([PAIR], again, DrawSpec())[0] == [tokens]


def test_a_tokenizer_keeps_its_own_special_tokens(tmp_path):
    bare = word_tokenizer(WORDS, unk_token="<unk>", eos_token="</s>", additional_special_tokens=["h"])
    found = reloaded(bare, tmp_path)
    assert "h" in found.all_special_tokens
    assert USER_MARKER in found.all_special_tokens


def test_a_template_is_left_as_it_is_and_there_is_one_bos_where_the_tokenizer_writes_one_too(tmp_path):
    bare = with_bos_added()
    bare.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m['content'] }} {{ eos_token }}{% endfor %}"
    )
    found = reloaded(bare, tmp_path)
    assert (found.chat_template, len(found)) == (bare.chat_template, len(WORDS))
    (tokens,), _ = tokenize_pairs([PAIR], found, DrawSpec())
    assert tokens.prompt.count(bare.bos_token_id) == 1
    assert bare.bos_token_id not in tokens.chosen


class Tomorrow(datetime.datetime):
    """A clock that is a day ahead."""

    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(days=1)


DATED = {
    "date_string": "{{ date_string }}",
    "the date of Llama 3": (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}"
    ),
    "strftime_now": "{{ strftime_now('%d %b %Y') }}",
}


@pytest.mark.parametrize("template", DATED.values(), ids=DATED)
def test_a_date_in_a_template_is_always_the_same(template, monkeypatch):
    tokenizer = with_bos_added()
    tokenizer.chat_template = template
    today = render(tokenizer, TURNS, add_generation_prompt=True)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert render(tokenizer, TURNS, add_generation_prompt=True) == today


def model_folder(folder, *, tied, spare_rows=0):
    config = LlamaConfig(
        vocab_size=len(WORDS) + spare_rows,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    with_bos_added().save_pretrained(folder)
    return folder


def rows_of(model):
    return model.get_input_embeddings().weight.detach()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_markers_get_rows_the_same_in_every_load_and_output(tmp_path, tied):
    folder = model_folder(tmp_path, tied=tied)
    base = LlamaForCausalLM.from_pretrained(folder)
    first, second = (load(folder, "unembedding") for _ in range(2))
    head = load(folder, "head", head_seed=0)
    assert rows_of(first).shape[0] == len(WORDS) + 2
    assert torch.equal(rows_of(first)[: len(WORDS)], rows_of(base))
    assert torch.equal(rows_of(first), rows_of(second))
    assert torch.equal(rows_of(first), rows_of(head))
    unembedding = first.get_output_embeddings().weight
    assert torch.equal(unembedding, second.get_output_embeddings().weight)
    assert torch.equal(unembedding[: len(WORDS)], base.get_output_embeddings().weight)
    assert (unembedding is first.get_input_embeddings().weight) == tied
    assert first.config.vocab_size == len(WORDS) + 2
    for weight in (rows_of(first), unembedding.detach()):
        old, new = weight.split([len(WORDS), 2])
        assert not torch.equal(new[0], new[1])
        assert 0.5 < float(new.std() / old.std()) < 2


def test_a_saved_model_keeps_the_rows_of_its_markers(tmp_path):
    model = load(model_folder(tmp_path / "base", tied=True), "unembedding")
    with torch.no_grad():
        model.get_input_embeddings().weight[-2:] += 1
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_model(weights, folder_files(model, load_tokenizer(str(tmp_path / "base"))), tmp_path / "saved")
    assert torch.equal(rows_of(load(tmp_path / "saved", "unembedding")), rows_of(model))


def test_a_model_with_rows_to_spare_is_left_as_it_is(tmp_path):
    folder = model_folder(tmp_path, tied=True, spare_rows=10)
    assert torch.equal(
        rows_of(load(folder, "unembedding")), rows_of(LlamaForCausalLM.from_pretrained(folder))
    )


ENDED = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
UNENDED = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
UNKNOWN, END, PAD = {"unk_token": "<unk>"}, {"eos_token": "</s>"}, {"pad_token": "<pad>"}
SPECIALS = {
    "pad is eos": {**UNKNOWN, **END, "pad_token": "</s>"},
    "pad is eos and unk": {"unk_token": "</s>", **END, "pad_token": "</s>"},
    "pad is the end of a turn": {**UNKNOWN, "eos_token": "<s>", "pad_token": "</s>"},
    "no pad": {**UNKNOWN, **END},
    "no special token": {},
}


@pytest.mark.parametrize("template", [ENDED, UNENDED], ids=["ended", "unended"])
@pytest.mark.parametrize("specials", SPECIALS.values(), ids=SPECIALS)
def test_the_padding_token_ends_no_turn(specials, template):
    tokenizer = word_tokenizer(WORDS, **specials)
    tokenizer.chat_template = template
    turn_end = tokenizer(render(tokenizer, TURNS[:2], add_generation_prompt=False))["input_ids"][-1]
    assert padding_token(tokenizer) not in (turn_end, tokenizer.eos_token_id)
    assert 0 <= padding_token(tokenizer) < len(tokenizer)


@pytest.mark.parametrize("response", ["a", "b", "unheard"])
def test_the_padding_token_ends_no_response_where_nothing_ends_a_turn(tmp_path, response):
    tokenizer = marked("no eos", tmp_path)
    pair = Pair(prompt=user_prompt("d"), chosen=response, rejected="g")
    (tokens,), _ = tokenize_pairs([pair], tokenizer, DrawSpec())
    assert padding_token(tokenizer) != tokens.chosen[-1]


def test_a_padding_token_of_its_own_is_kept_even_where_its_id_is_0():
    for words, expected in ((WORDS, 3), (["<pad>", *[word for word in WORDS if word != "<pad>"]], 0)):
        tokenizer = word_tokenizer(words, **UNKNOWN, **END, **PAD)
        tokenizer.chat_template = ENDED
        assert padding_token(tokenizer) == expected


QUESTION = "Question: d Answer: {} Verification: Is the answer correct (Yes/No)?"


def verification_pairs(count=6):
    texts = ["a", "a b", "a b c", "d e f g h a b c", "e", "f f"]
    return [
        Pair(prompt=user_prompt(texts[i]), chosen=texts[(i + 1) % 6], rejected=texts[(i + 2) % 6])
        for i in range(count)
    ]


def verify(pairs, tokenizer, draw=None):
    return tokenize_pairs(pairs, tokenizer, draw or DrawSpec(), rendering="verification")


@pytest.fixture
def asking(tmp_path):
    words = [*WORDS, "(Yes/No)?"]
    return reloaded(word_tokenizer(words, unk_token="<unk>", eos_token="</s>"), tmp_path / "asking")


def test_a_verification_asks_after_each_response_and_ends_in_its_answer(asking):
    (tokens,), _ = verify([PAIR], asking)
    yes, no = asking.convert_tokens_to_ids(["Yes", "No"])
    for response, text, answer in ((tokens.chosen, "e f", yes), (tokens.rejected, "g", no)):
        *asked, last = tokens.prompt + response
        assert last == answer
        words = ["<|user|>", "a", "b", "<|assistant|>", "c", "</s>", "<|user|>"]
        assert asking.convert_ids_to_tokens(asked) == [
            *words,
            *QUESTION.format(text).split(),
            "<|assistant|>",
        ]


@pytest.mark.parametrize(("chosen", "rejected"), [("e f", "e f"), ("e", "e e"), ("a", "b")])
def test_the_prompt_of_a_verification_is_what_both_begin_with_but_for_their_answers(asking, chosen, rejected):
    pair = Pair(prompt=user_prompt("d"), chosen=chosen, rejected=rejected)
    (tokens,), _ = verify([pair], asking)
    assert (tokens.chosen[-1], tokens.rejected[-1]) == tuple(asking.convert_tokens_to_ids(["Yes", "No"]))
    assert tokens.chosen[0] != tokens.rejected[0]
    words = asking.convert_ids_to_tokens(tokens.prompt + tokens.chosen)
    assert words[1:-2] == QUESTION.format(chosen).split()


def test_like_responses_are_identical_though_their_verifications_end_in_different_answers(asking):
    sides = [("e f", "e f"), ("e", "e  "), ("e", "f"), ("e f", "e f e f e f")]
    pairs = [Pair(prompt=user_prompt("d"), chosen=chosen, rejected=rejected) for chosen, rejected in sides]
    assert verify(pairs, asking, DrawSpec(max_response_tokens=6))[1].identical == 2


@pytest.mark.parametrize("most", [None, 3])
def test_every_rendering_draws_the_same_pairs(asking, most):
    draw = DrawSpec(max_pairs=most, seed=5, max_prompt_tokens=6, max_response_tokens=4)
    asked, counted_asked = verify(verification_pairs(), asking, draw)
    answered, counted = tokenize_pairs(verification_pairs(), asking, draw)
    assert [pair.index for pair in asked] == [pair.index for pair in answered]
    assert counted_asked.too_long == counted.too_long
    assert counted.too_long > 0 or most is not None


def test_a_tokenizer_that_cannot_tell_yes_from_no_is_refused(tmp_path):
    words = [word for word in WORDS if word not in ("Yes", "No")]
    tokenizer = reloaded(word_tokenizer(words, unk_token="<unk>", eos_token="</s>"), tmp_path)
    with pytest.raises(ModelError, match='one token for "Yes" and "No"'):
        verify([PAIR], tokenizer)


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{{ strftime_now(messages[0]['content']) }}", ModelError, "format of its own making"),
        (
            "{{ raise_exception('no assistant here') }}",
            DataError,
            r"user, assistant, user.*no assistant here",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template, error, message):
    tokenizer = with_bos_added()
    tokenizer.chat_template = template
    with pytest.raises(error, match=message):
        tokenize_pairs([PAIR], tokenizer, DrawSpec())


def test_a_prompt_without_tokens_is_refused():
    tokenizer = with_bos_added()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="row 0: its prompt has no tokens"):
        tokenize_pairs([dataclasses.replace(PAIR, prompt=user_prompt(" "))], tokenizer, DrawSpec())


def spaced_tokenizer():
    """As SentencePiece models: what begins a text gets a space in front, what goes on after a word does not."""
    words = ["<unk>", "</s>", "\u2581[", "]", "x", "\u2581x", "y", "\u2581y", "z", "\u2581z"]
    backend = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' if m['role'] == 'user' else '' }}{{ m['content'] }}"
        "{{ ']' if m['role'] == 'user' else '' }}{% endfor %}"
    )
    return tokenizer


def test_a_response_gets_no_space_that_the_conversation_has_not():
    tokenizer = spaced_tokenizer()
    pair = Pair(prompt=user_prompt("x"), chosen="y", rejected="z")
    (tokens,), _ = tokenize_pairs([pair], tokenizer, DrawSpec())
    for response, text in ((tokens.chosen, "[x]y"), (tokens.rejected, "[x]z")):
        assert tokens.prompt + response == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", TEMPLATELESS)
def test_prompt_tokens_begin_the_whole_conversation(kind, tmp_path):
    tokenizer = marked(kind, tmp_path)
    (tokens,), _ = tokenize_pairs([PAIR], tokenizer, DrawSpec())
    whole = render(tokenizer, (*TURNS, Message("assistant", PAIR.chosen)), add_generation_prompt=False)
    assert tokens.prompt + tokens.chosen == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_with_several_templates_uses_its_default():
    tokenizer = with_bos_added()
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "nothing"}
    assert render(tokenizer, TURNS, add_generation_prompt=True) == TURNS[0].content
