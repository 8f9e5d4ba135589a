"""A chat model's turn ends where its template ends it; texts that it cannot read are named and not asked about."""

from types import SimpleNamespace

import pytest
import torch

from trainers.data.journal import Journal
from trainers.data.local_rewriting import Drawing, Writer, rewrite_locally, turn_ends
from trainers.data.rewriting import Terms
from trainers.templates import load_tokenizer

CHATML = (
    "{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model):
    found = load_tokenizer(str(tiny_model))
    found.add_special_tokens({"additional_special_tokens": ["<turn>", "</turn>"]})
    found.chat_template = CHATML
    return found


def test_a_turn_ends_with_its_closing_token_and_not_with_the_line_break_behind_it(tokenizer):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 9]))
    closing = tokenizer.convert_tokens_to_ids("</turn>")
    assert turn_ends(model, tokenizer) == {7, 9, closing, tokenizer.eos_token_id} - {None}


def test_texts_over_the_models_length_are_named_and_the_others_asked(tokenizer, tmp_path, monkeypatch):
    batches = []

    def generated(model, prompts, **more):
        batches.append(len(prompts))
        return [[[5]] for _ in prompts]

    monkeypatch.setattr("trainers.data.local_rewriting.generate", generated)
    model = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=60), device=torch.device("cpu"), generation_config=None
    )
    writer = Writer(model=model, tokenizer=tokenizer, ends=frozenset({1}))
    terms = Terms(prompt="{response}", model="m", max_tokens=20)
    texts = ["a b", " ".join(["a"] * 60)]
    with Journal(tmp_path / "journal.jsonl") as journal:
        why = rewrite_locally(
            texts, terms, Drawing(temperature=1.0, seed=0), journal, lambda: writer, lambda *_: None
        )
        assert journal.accepted(terms.key(texts[0]))
    assert batches == [1]
    assert list(why) == [terms.key(texts[1])]
    assert "over the model's 60" in why[terms.key(texts[1])]


def test_where_nothing_is_missing_no_model_is_loaded(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        terms, drawing = Terms(prompt="{response}", model="m"), Drawing(temperature=1.0, seed=0)
        assert not rewrite_locally(
            [], terms, drawing, journal, lambda: pytest.fail("loaded"), lambda *_: None
        )
