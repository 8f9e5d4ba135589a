"""The grid command on a real chat model and real preference data, as small as it can be: two short pairs of a set."""

import json
import os
import shutil
from pathlib import Path

import pytest
from pyarrow import parquet

from tests.faults.lives import lived
from trainers.data.sources import read_pairs
from trainers.evaluate.scores import read_pair_scores
from trainers.pairs.templates import load_tokenizer
from trainers.pairs.tokens import tokenize_pairs
from trainers.specs import DatasetSpec, DrawSpec

# Rows of the shortest pairs: a test on one core cannot wait for 500 tokens a response.
SHORT = {
    "ultrafeedback/train": (95, 74),
    "ultrafeedback/test": (94, 191),
    # The same prompts as above.
    "ultrafeedback_paraphrase/test": (94, 191),
    "rewardbench_math/test": (92, 59),
}


@pytest.fixture(scope="module")
def short(shared, tmp_path_factory):
    """The real sets, two short pairs of each."""
    folder = tmp_path_factory.mktemp("short")
    for split, rows in SHORT.items():
        file = folder / f"{split}.parquet"
        file.parent.mkdir(exist_ok=True)
        whole = parquet.read_table(shared / "data" / f"{split}.parquet")
        parquet.write_table(whole.take(list(rows)), file)
    return folder


@pytest.fixture(scope="module")
def swept(smollm2, smollm2_storage, short, tmp_path_factory):
    storage = tmp_path_factory.mktemp("real")
    shutil.copytree(smollm2_storage, storage, copy_function=os.link, dirs_exist_ok=True)
    words = ["run", "--backend", "inline", "--models", f"smollm2={smollm2}"]
    words += ["--train-sets", str(short / "ultrafeedback"), "--eval-sets", str(short / "rewardbench_math")]
    words += [str(short / "ultrafeedback_paraphrase"), "--max-train-pairs", "2", "--effective-batch", "2"]
    words += ["--max-eval-pairs", "2", "--epochs", "1"]
    return storage, lived(storage, words, within_s=1200)


def artifacts(storage: Path, stage: str) -> list[Path]:
    manifests = (storage / "artifacts" / stage).glob("*/manifest.json")
    return [file.parent / json.loads(file.read_text())["attempt"] for file in manifests]


def test_a_gguf_model_is_trained_and_evaluated_on_real_pairs(swept):
    storage, output = swept
    for said in ("token-level shift", "domain shift", "not learned"):
        assert said in output
    assert len(artifacts(storage, "train")) == 2
    # What another test may have converted is what the command would have.
    assert len(artifacts(storage, "convert")) == 1
    for folder in artifacts(storage, "evaluate"):
        scores = read_pair_scores(folder / "scores.parquet")
        assert len(scores.chosen) == len(scores.rejected) == 2
        assert abs(scores.chosen).max() > 0


def test_real_responses_end_their_turn(smollm2_folder, shared):
    tokenizer = load_tokenizer(str(smollm2_folder))
    spec = DatasetSpec(name="ultrafeedback", source=str(shared / "data" / "ultrafeedback"))
    tokens, counts = tokenize_pairs(read_pairs(spec, "test"), tokenizer, DrawSpec(max_response_tokens=512))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert counts.too_long > 0
    for pair in tokens:
        assert pair.chosen.count(end) == pair.rejected.count(end) == 1
        # The template ends a turn with <|im_end|> and a line feed.
        assert pair.chosen[-2] == pair.rejected[-2] == end
        assert pair.prompt[0] == start


def test_a_batch_of_pairs_has_the_tokens_of_whole_conversations_one_by_one(smollm2_folder, shared):
    """What is tokenised is a prompt once, and its end with each response: the tokens must be the whole text's."""
    tokenizer = load_tokenizer(str(smollm2_folder))
    spec = DatasetSpec(name="ultrafeedback", source=str(shared / "data" / "ultrafeedback_french"))
    pairs = read_pairs(spec, "test")
    tokens, _ = tokenize_pairs(pairs, tokenizer, DrawSpec(max_prompt_tokens=9999, max_response_tokens=9999))
    assert len(tokens) == len(pairs)
    for pair, found in zip(pairs, tokens, strict=True):
        for text, ids in ((pair.chosen, found.chosen), (pair.rejected, found.rejected)):
            turns = [*(message._asdict() for message in pair.prompt), {"role": "assistant", "content": text}]
            whole = tokenizer.apply_chat_template(turns, tokenize=False)
            assert found.prompt + ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
