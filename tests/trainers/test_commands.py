"""`python -m trainers.train` under torchrun and deepspeed, `python -m trainers.evaluate`; without Ray and MLflow."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.cluster.machine import free_port
from tests.conftest import made_once
from tests.trainers.command_line import said
from trainers.errors import ModelError, SpecError, SweepError
from trainers.evaluate.__main__ import Evaluate, run_evaluate, use_device
from trainers.evaluate.metrics import ensemble
from trainers.evaluate.scores import read_pair_scores
from trainers.models.loading import load_model
from trainers.specs import OptimSpec
from trainers.train import __main__ as training

# What a machine without them answers to an import, and to the question whether they are there.
BLOCK = 'import sys; sys.modules["ray"] = sys.modules["mlflow"] = None'
TRAIN = (training.Train, training.run, "trainers.train")
EVALUATE = (Evaluate, run_evaluate, "trainers.evaluate")
NORM = "model.norm.weight"
SMALL = ["--effective-batch", "4", "--epochs", "2", "--lr", "1e-3", "--max-pairs", "10"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(BLOCK)
    return {**os.environ, "PYTHONPATH": f"{folder}:{Path.cwd()}", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(environment, *words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def train_words(model):
    return ["-m", "trainers.train", "--model", model, "--reward", "im_rm", "--data", "tiny_world", *SMALL]


@pytest.fixture(scope="module")
def trained(environment, tiny_model, tmp_path_factory):
    """The same training alone, under torchrun and under the deepspeed launcher."""
    words = train_words(tiny_model)
    words += ["--beta", "0.1", "--forward-tokens", "1"]

    def train(out):
        # In this process, which has paid for the imports.
        optim = OptimSpec(effective_batch=4, epochs=2, lr=1e-3)
        here = {"model": str(tiny_model), "reward": "im_rm", "beta": 0.1, "data": "tiny_world"}
        training.run(training.Train(**here, optim=optim, max_pairs=10, forward_tokens=1, out=out / "alone"))
        gang = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = run(environment, *gang, *words, "--out", out / "torchrun", "--zero-stage", "2")
        (out / "printed.json").write_text(done.stdout)
        launcher = ["-m", "deepspeed.launcher.launch", "--world_info", "eyJsb2NhbGhvc3QiOiBbMCwgMV19"]
        # By itself it takes the same port each time.
        launcher += [f"--master_port={free_port()}", "--module"]
        run(environment, *launcher, *words[1:], "--out", out / "deepspeed", "--zero-stage", "3")

    return made_once(tmp_path_factory, "launched", train)


def test_launchers_train_the_same_model_and_leave_it_and_its_log_alone(trained):
    names = ("alone", "torchrun", "deepspeed")
    alone, *others = (load_file(trained / name / "model" / "model.safetensors") for name in names)
    for other in others:
        assert alone.keys() == other.keys()
        assert all((alone[name] - other[name]).norm() <= 1e-3 * alone[name].norm() for name in alone)
    for name in names:
        assert sorted(path.name for path in (trained / name).iterdir()) == ["log.parquet", "model"]
    assert json.loads((trained / "printed.json").read_text())["train_accuracy"] == 1.0
    log = parquet.read_table(trained / "alone" / "log.parquet").to_pylist()
    assert (len(log), len(log[0]["indices"])) == (6, 4)
    assert log[-1]["loss"] < log[0]["loss"]


def test_scores_carry_their_metrics(environment, trained, tiny_model, tmp_path):
    out = tmp_path / "deep" / "scores.parquet"
    words = ["--model", trained / "torchrun" / "model", "--reference", tiny_model, "--reward", "im_rm"]
    words += ["--beta", "0.1", "--data", "tiny_world", "--out", out]
    done = run(environment, "-m", "trainers.evaluate", *words)
    printed = json.loads(done.stdout)
    metrics = json.loads(parquet.read_table(out).schema.metadata[b"metrics"])
    assert metrics["accuracy"] == pytest.approx(printed["accuracy"], abs=1e-6)
    scores = read_pair_scores(out)
    chosen, rejected = scores.chosen, scores.rejected
    assert printed["n"] == len(chosen) == 40
    right = ((chosen > rejected) + 0.5 * (chosen == rejected)).mean()
    assert printed["accuracy"] == pytest.approx(right, abs=1e-6)
    assert abs(chosen).max() > 0
    assert "100%" in done.stderr


@pytest.mark.parametrize(
    ("of", "more", "message"),
    [
        (EVALUATE, ["--out", "scores.parquet"], "has no head"),
        (TRAIN, ["--out", "out", "--lr", "5"], "error: --lr 5"),
        (TRAIN, ["--out", "."], "is there already"),
        (TRAIN, ["--out", "model/file"], "there can be no folder model/file"),
        (EVALUATE, ["--out", "model/file/scores.parquet"], "there can be no folder"),
        (
            TRAIN,
            ["--out", "out", "--momentum", "0.9"],
            "adamw has none; give --optimizer sgd or rmsprop, too",
        ),
        (TRAIN, ["--out", "out", "--seed", "-1"], "a seed of -1"),
    ],
)
def test_wrong_usage_is_said_in_one_line(tiny_model, tmp_path, monkeypatch, capsys, of, more, message):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/file").touch()
    words = ["--model", tiny_model, "--reward", "ex_rm", "--data", "tiny_world", *more]
    code, _, error = said(words, capsys, of)
    assert code == 2
    assert message in error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def train_here(model, tmp_path, **options):
    words = {"model": str(model), "reward": "ex_rm", "data": "tiny_world", "max_pairs": 4}
    training.run(training.Train(**words, out=tmp_path / "out", **options))


def test_options_of_an_adapter_are_refused_where_it_could_not_be_kept(tiny_model, tmp_path, monkeypatch):
    """A GGUF file's folder is gone after the training, so an adapter could not name its base model."""
    for options in ({"merge": True}, {"lora_targets": ("q_proj",)}, {"lora_alpha": 8.0}):
        with pytest.raises(SpecError, match="give --lora-rank, too"):
            train_here(tmp_path / "none", tmp_path, **options)
    monkeypatch.setattr(
        "trainers.models.loading.convert_gguf", lambda _, out: shutil.copytree(tiny_model, out)
    )
    (tmp_path / "model.gguf").touch()
    with pytest.raises(SpecError, match="GGUF file, which an adapter cannot name as its base; give --merge"):
        train_here(tmp_path / "model.gguf", tmp_path, lora_rank=2)
    train_here(tmp_path / "model.gguf", tmp_path, lora_rank=2, merge=True, optim=OptimSpec(epochs=1))
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("needs --reference", {"reward": "im_rm"}),
        ("has no beta", {"reward": "ex_rm", "beta": 0.1}),
        ("is not one of", {"reward": "dpo"}),
        ("holds no pairs", {"reward": "ex_rm", "data": "empty.jsonl"}),
        ("--max-pairs: of a part", {"reward": "ex_rm", "data": "m_rewardbench=suite.jsonl", "max_pairs": 1}),
        (
            "rewards of 40 of 40 pairs are no finite numbers",
            {"reward": "im_rm_no_reference", "model": ("broken",)},
        ),
        ("--device cuda:99", {"reward": "ex_grm", "device": "cuda:99"}),
        ("name one model, or several different", {"reward": "ex_grm", "model": ("base", "base")}),
        ("name a file that ends in .parquet", {"reward": "ex_grm", "out": Path("scores.json")}),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny_model, tmp_path, monkeypatch, message, options):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    shutil.copytree(tiny_model, "broken")
    weights = load_file("broken/model.safetensors")
    save_file(
        {**weights, NORM: weights[NORM] * torch.nan}, "broken/model.safetensors", metadata={"format": "pt"}
    )
    row = {"id": "1", "prompt": "p", "chosen": "a", "rejected": "b", "source": "s", "language": "l"}
    Path("suite.jsonl").write_text(json.dumps(row))
    values = {
        "model": (str(tiny_model),),
        "data": "tiny_world",
        "out": tmp_path / "scores.parquet",
        **options,
    }
    with pytest.raises(SweepError, match=message):
        run_evaluate(Evaluate(**values))


@pytest.mark.parametrize(("name", "current"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_a_device_that_is_named_becomes_the_current_one(monkeypatch, name, current):
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    use_device(name)
    assert chosen == current


def test_results_stand_beside_the_scores_as_rewardbench_writes_them(tiny_model, tmp_path, capsys):
    sources = ("mmlu-pro-law", "livebench-math", "livebench-reasoning", "livecodebench")
    row = {"question": "i often share bread at home", "response_model": "m"}
    row |= {"response_A": "honestly yes", "response_B": "apparently no"}
    rows = [
        {**row, "pair_id": n, "source": source, "label": label}
        for n, (source, label) in enumerate(itertools.product(sources, ("A>B", "B>A")))
    ]
    (tmp_path / "gpt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"model": (str(tiny_model),), "reward": "im_rm_no_reference", "data": f"judgebench={tmp_path}"}
    run_evaluate(Evaluate(**words, out=tmp_path / "scores.parquet"))
    printed = json.loads(capsys.readouterr().out)
    results = json.loads((tmp_path / "scores.json").read_text())
    assert results["accuracy"] == printed["suite/score"] == 0.5
    assert (results["num_prompts"], results["model"]) == (8, str(tiny_model))
    assert results["extra_results"].keys() == {"mmlu-pro", *sources[1:]}
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["results"] for line in lines] in ([0, 1] * 4, [1, 0] * 4)
    assert lines[1]["text_chosen"][-1] == {"role": "assistant", "content": "apparently no"}
    assert lines[0]["scores_chosen"] == pytest.approx(lines[1]["scores_rejected"])


def test_several_models_are_one_of_their_mean_rewards_on_the_pairs_that_all_read(
    tiny_model, tmp_path, capsys
):
    models, alone = [], []
    for seed in range(3):
        models.append(str(tmp_path / str(seed)))
        torch.manual_seed(seed)
        head = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
        torch.nn.init.normal_(head.score.weight)
        head.save_pretrained(models[-1])
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        if seed == 1:
            tokenizer.chat_template = "bread bread bread" + tokenizer.chat_template
        tokenizer.save_pretrained(models[-1])
    answers = [("honestly yes", "apparently no"), ("yes", "no"), ("honestly no", "yes")]
    pairs = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt in ("bread", "i rarely offer blankets for friends")
        for chosen, rejected in answers
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    words = {"reward": "ex_rm", "data": str(tmp_path / "pairs.jsonl"), "max_prompt_tokens": 10}
    for number, model in enumerate(models):
        run_evaluate(Evaluate(**words, model=(model,), out=tmp_path / f"{number}.parquet"))
        alone.append(parquet.read_table(tmp_path / f"{number}.parquet").to_pandas().set_index("index"))
    capsys.readouterr()
    run_evaluate(Evaluate(**words, model=tuple(models), out=tmp_path / "all.parquet"))
    printed = json.loads(capsys.readouterr().out)
    found = parquet.read_table(tmp_path / "all.parquet").to_pandas().set_index("index")
    assert (len(alone[0]), len(alone[1]), list(found.index)) == (6, 3, [0, 1, 2])
    alone = [table.loc[found.index] for table in alone]
    margins = [table.chosen_reward - table.rejected_reward for table in alone]
    assert found.chosen_reward.to_numpy() == pytest.approx(sum(table.chosen_reward for table in alone) / 3)
    assert found.margin_spread.to_numpy() == pytest.approx(pd.concat(margins, axis=1).std(axis=1).to_numpy())
    assert printed["models"] == 3
    assert printed["margin_spread"] == pytest.approx(found.margin_spread.mean(), abs=1e-6)
    single = [((margin > 0) + 0.5 * (margin == 0)).mean() for margin in margins]
    assert (printed["accuracy_alone"], printed["accuracy_spread"]) == pytest.approx(
        (sum(single) / 3, pd.Series(single).std()), abs=1e-6
    )
    assert json.loads((tmp_path / "all.json").read_text())["model"] == ", ".join(models)


def test_a_constant_of_one_model_changes_no_spread_and_no_margin():
    chosen, rejected = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).double().numpy()
    before = ensemble(chosen, rejected)
    level = [[0.0], [6.0], [0.0]]
    after = ensemble(chosen + level, rejected + level)
    assert after.chosen == pytest.approx(before.chosen + 2)
    for name, spread in before.spreads.items():
        assert after.spreads[name] == pytest.approx(spread)


def test_a_classifier_of_several_labels_is_refused_by_name(tiny_model, tmp_path):
    folder = tmp_path / "labels"
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    words = {"model": (str(folder),), "reward": "ex_rm", "data": "tiny_world"}
    with pytest.raises(SweepError, match=r"labels is no reward model: .* \(num_labels > 1\)"):
        run_evaluate(Evaluate(**words, out=tmp_path / "scores.parquet"))


def test_a_head_of_another_name_is_the_head(tiny_model, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights.pop("score.weight")
    for name in ("v_head.summary.weight", "value_head.weight", "head.weight"):
        save_file({**weights, name: head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        options = {"tokenizer": tokenizer, "output": "head", "precision": "fp32"}
        if name == "head.weight":
            with pytest.raises(ModelError, match=r"It has head\.weight, a head of another kind"):
                load_model(str(tmp_path), **options)
        else:
            assert torch.equal(load_model(str(tmp_path), **options).score.weight, head)


def test_rows_of_the_same_tokens_twice_are_ties(shared, tiny_model, tmp_path, capsys):
    words = {"model": (str(tiny_model),), "reward": "im_rm", "reference": str(tiny_model)}
    data = str(shared / "cases" / "identical")
    run_evaluate(Evaluate(**words, data=data, split="train", out=tmp_path / "scores.parquet"))
    printed = capsys.readouterr()
    metrics = json.loads(printed.out)
    assert metrics["n"] == 12
    assert (metrics["accuracy"], metrics["loss"], metrics["abs_margin"]) == (0.5, 0.693147, 0.0)
    assert f"chosen = rejected in tokens, read by {tiny_model}: 12 of 12 pairs" in printed.err
    # The tiny world has a word for none of these.
    assert f"unknown tokens, read by {tiny_model}: " in printed.err


def test_a_reference_of_another_vocabulary_is_refused(trained, tiny_model, tmp_path):
    other, out = tmp_path / "other", tmp_path / "scores.parquet"
    shutil.copytree(tiny_model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    values = {"model": (str(trained / "alone" / "model"),), "reference": str(other), "reward": "im_rm"}
    with pytest.raises(ModelError, match="another vocabulary"):
        run_evaluate(Evaluate(**values, data="tiny_world", out=out))
    assert not out.exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_pairs_left_out_and_ties_are_said_once(tiny_model, tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    pair = {"prompt": "bread", "chosen": "yes"}
    lines = [{**pair, "rejected": text} for text in ("no", "yes ", "no " * 20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = {"model": (str(tiny_model),), "reward": "im_rm_no_reference", "data": str(tmp_path / "a.jsonl")}
    run_evaluate(Evaluate(**words, out=tmp_path / "scores.parquet", max_response_tokens=9))
    said = capsys.readouterr().err
    assert ("1 pairs left out: over 1024 prompt or 9 response tokens" in said) == (rank == "0")
    assert (": 1 of 2 pairs. The model reads the same twice" in said) == (rank == "0")


@pytest.mark.parametrize(("terminal", "rank"), [(True, "0"), (True, "1"), (False, "0")])
def test_downloads_are_seen_on_a_terminal_once_and_no_other_bar_of_the_libraries(monkeypatch, terminal, rank):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    from trainers.command import _quieten_transformers

    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("RANK", rank)
    _quieten_transformers()
    assert not transformers_logging.is_progress_bar_enabled()
    assert are_progress_bars_disabled() == (not terminal or rank == "1")


def test_a_process_that_only_trains_imports_deepspeed_without_mlflow():
    code = (
        "import sys; from trainers.train.engine import import_deepspeed; import_deepspeed();"
        "print('deepspeed' in sys.modules, 'mlflow' in sys.modules); import mlflow; print(mlflow.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["True False", "mlflow"]
