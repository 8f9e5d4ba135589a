"""Ten minutes on one GPU: is what rmsweep computes there right, and how fast is it. Random weights, nothing downloaded.

    python -m benchmarks.gpu_check              on a machine with a GPU
    python -m benchmarks.gpu_check --cpu        every step at a tiny size on the CPU; no figure of it is a speed

Each step is a process of its own and checks its numbers before it measures; the first wrong number ends the command with
exit code 1. `--out` holds what was found, as JSON, after every step. A step whose packages are missing is left out:
`kernels` and `head` need torch and transformers only.

Shapes: H query heads, K key heads, N tokens, D width of a head, M response tokens, V vocabulary.
"""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from trainers.models import attention
from trainers.models.attention import MaskRule, pair_attention
from trainers.models.products import settle_products
from trainers.models.unembedding import Unembedding
from trainers.pairs.packing import CHOSEN, PROMPT, REJECTED, PairLayout, Span

SEED = 0
# Tokens of the prompt and of the two responses: UltraFeedback's test pairs have 515 on the mean.
PAIR = (135, 190, 190)
# Shorter than one block of the kernel.
SHORT = (40, 30, 30)
# Query heads, key heads, width of a head, soft cap, window: the models of the paper's grid, and the narrowest one built in.
HEADS: Mapping[str, tuple[int, int, int, float | None, int | None]] = {
    "Llama-3.2-1B": (32, 8, 64, None, None),
    "Llama-3.2-1B, window": (32, 8, 64, None, 96),
    "Llama-3.2-3B": (24, 8, 128, None, None),
    "Llama-3.1-8B": (32, 8, 128, None, None),
    "Qwen2.5-3B": (16, 2, 128, None, None),
    "Gemma-2-2B": (8, 4, 256, 50.0, None),
    "Gemma-2-2B, window": (8, 4, 256, 50.0, 96),
    "Llama-3.2-1B, short": (32, 8, 64, None, None),
    "llama-48": (4, 4, 12, None, None),
}
# The largest error of a tensor relative to its size: that of one product in this precision, times a few.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Losses of ten steps of fp32 training may differ by this much between devices.
LOSS_TOLERANCE = 1e-4
# Of a training that is also stopped and resumed.
RESUMED = ("--zero-stage=3", "--checkpointing")


class WrongNumber(Exception):
    """A number that was computed differs from what it has to be; the message says which and by how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Check and measure this machine's GPU."""

    cpu: bool = False
    """Run every step at a tiny size on the CPU."""
    out: Path = Path("gpu_check.json")
    """Where the figures are written after every step."""
    only: tuple[str, ...] = ()
    """Steps to run (default: all)."""

    @property
    def device(self) -> str:
        return "cpu" if self.cpu else "cuda"


Figures = dict[str, Any]


def versions(check: Check) -> Figures:
    """Library versions and the card."""
    installed = {item.name.lower(): item.version for item in metadata.distributions()}
    names = ("torch", "transformers", "triton", "deepspeed", "ray", "trl")
    found: Figures = {name: installed.get(name, "not installed") for name in names}
    if not check.cpu:
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "gb": card.total_memory / 1e9, "cuda": torch.version.cuda}
    return found


def kernels(check: Check) -> Figures:
    """Attention over packed pairs, values and gradients, against a softmax in fp64."""
    return {f"{name}, {precision}": _kernel(check, name, precision) for name in HEADS for precision in DTYPES}


def _kernel(check: Check, name: str, precision: str) -> Figures:
    heads, key_heads, width, softcap, window = HEADS[name]
    pairs, lengths = (1, SHORT) if name.endswith("short") else (4, PAIR)
    if check.cpu:
        pairs, lengths, window = 2, (9, 7, 5), window and 6
        heads, key_heads = heads // 4, max(1, key_heads // 4)
    layout = PairLayout(tuple(Span(number * sum(lengths), *lengths) for number in range(pairs)))
    states = _drawn_states(heads, key_heads, pairs * sum(lengths), width, DTYPES[precision], check.device)

    rule = MaskRule(causal_mask_function, causal=True)
    if window is not None:
        rule = MaskRule(sliding_window_causal_mask_function(window))

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        module = torch.nn.Module()
        output, _ = pair_attention(module, query, key, value, rule, pair_layout=layout, softcap=softcap)
        return output.transpose(1, 2)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _dense(query, key, value, layout, window, softcap)

    dtype, expected = DTYPES[precision], _attended(states, dense, torch.float64)
    what, once = f"attention of {name} in {precision}", _attended(states, packed, dtype)
    figures = _compared(what, once, expected, dtype)
    if check.cpu:
        return figures
    fast = softcap is None and attention.fits_flash(states[0], states[2])
    if fast and not all(map(torch.equal, once, _attended(states, packed, dtype))):
        raise WrongNumber(f"{what}: it is another one the second time")
    return figures | _measured(lambda: _attended(states, packed, dtype))


def _compared(what: str, found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> Figures:
    """The largest error of a tensor relative to its size, both as norms. Raises WrongNumber where it is too large."""
    errors = [
        float((mine.double() - right.double()).norm() / right.double().norm())
        for mine, right in zip(found, expected, strict=True)
    ]
    if not max(errors) <= TOLERANCE[dtype]:
        raise WrongNumber(f"{what}: relative error {max(errors):.1e}")
    return {"relative error": max(errors)}


def _drawn_states(
    heads: int, key_heads: int, tokens: int, width: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Queries, keys and values, [1, H or K, N, D], which have the same values in every precision."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = [(1, count, tokens, width) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _attended(
    states: Sequence[Tensor], attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The output, [1, H, N, D], and the gradients of queries, keys and values where its gradient is its own index."""
    leaves = [state.detach().to(dtype).requires_grad_() for state in states]
    output = attend(*leaves)
    slope = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float32)
    output.backward(slope.view(output.shape).to(dtype))
    return [output.detach(), *_gradients(*leaves)]


def _dense(
    query: Tensor, key: Tensor, value: Tensor, layout: PairLayout, window: int | None, softcap: float | None
) -> Tensor:
    """Attention as a textbook writes it, of every token to what is before it in its pair but for the other response."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    places = [
        (number, part, position)
        for number, span in enumerate(layout.spans)
        for part, start, length in (
            (PROMPT, 0, span.prompt),
            (CHOSEN, span.prompt, span.chosen),
            (REJECTED, span.prompt, span.rejected),
        )
        for position in range(start, start + length)
    ]
    pair_N, part_N, at_N = torch.tensor(places, device=query.device).T
    seen_NN = (pair_N[:, None] == pair_N) & (at_N <= at_N[:, None])
    seen_NN &= (part_N == PROMPT) | (part_N == part_N[:, None])
    if window is not None:
        seen_NN &= at_N[:, None] - at_N < window
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen_NN, -math.inf).softmax(-1) @ value


def head(check: Check) -> Figures:
    """Log-probabilities of tokens without logits of the whole vocabulary, against log_softmax in fp64."""
    return {precision: _head(check, precision) for precision in DTYPES}


def _head(check: Check, precision: str) -> Figures:
    tokens, width, vocabulary = (24, 16, 500) if check.cpu else (2048, 2048, 128_256)
    dtype, generator = DTYPES[precision], torch.Generator().manual_seed(SEED)
    hidden_MD = torch.randn(tokens, width, generator=generator).to(check.device, dtype)
    target_M = torch.randint(vocabulary, (tokens,), generator=generator).to(check.device)
    # Logits of some size, so that some tokens are likely: the gradients of the others are seen, too.
    weight_VD = (3 * torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)).to(
        check.device, dtype
    )
    others_V = ~torch.isin(torch.arange(vocabulary, device=check.device), target_M)
    layer = Unembedding(width, vocabulary, bias=False)
    layer.weight = torch.nn.Parameter(weight_VD)

    def found(log_prob_M: Tensor, *leaves: Tensor) -> list[Tensor]:
        log_prob_M.sum().backward()
        of_hidden_MD, of_weight_VD = _gradients(*leaves)
        return [log_prob_M.detach(), of_hidden_MD, of_weight_VD, of_weight_VD[others_V]]

    def in_blocks() -> list[Tensor]:
        leaf_MD, layer.weight.grad = hidden_MD.detach().requires_grad_(), None
        return found(layer(leaf_MD, target_M), leaf_MD, layer.weight)

    def whole() -> list[Tensor]:
        leaf_MD, wide_VD = hidden_MD.double().requires_grad_(), weight_VD.double().requires_grad_()
        log_prob_MV = (leaf_MD @ wide_VD.T).log_softmax(-1)
        return found(log_prob_MV.gather(1, target_M[:, None])[:, 0], leaf_MD, wide_VD)

    figures = _compared(f"log-probabilities in {precision}", in_blocks(), whole(), dtype)
    if check.cpu:
        return figures
    return figures | _measured(in_blocks)


def _gradients(*leaves: Tensor) -> list[Tensor]:
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def _measured(run: Callable[[], object]) -> Figures:
    """Median milliseconds of five runs on the card after a first one, and the most memory that they hold."""
    run()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return {"ms": statistics.median(times), "peak GB": torch.cuda.max_memory_allocated() / 1e9}


def training(check: Check) -> Figures:
    """Ten steps of built-in models by `python -m trainers.train`: on the card as on the CPU, at every ZeRO stage."""
    import deepspeed  # noqa: F401

    found: Figures = {}
    with _tiny_world(("llama-64", "qwen2-64", "gemma2-64")) as folder:
        for model in ("llama-64",) if check.cpu else ("llama-64", "qwen2-64", "gemma2-64"):
            for reward in ("im_rm",) if check.cpu else ("ex_rm", "im_rm"):
                right = _losses(folder, model, reward, cpu=True)
                for flags in _layouts(check, model):
                    losses = _losses(folder, model, reward, *flags, cpu=check.cpu)
                    name = " ".join((model, reward, *flags))
                    found[name] = _alike(name, losses, right, LOSS_TOLERANCE)
                    if flags == RESUMED:
                        again = _losses(folder, model, reward, *flags, cpu=check.cpu, stop=True)
                        # On a card sums of log-probabilities are added in any order.
                        tolerance = 0.0 if check.cpu else LOSS_TOLERANCE / 100
                        found[f"{name}, resumed"] = _alike(f"{name}, resumed", again, losses, tolerance)
    return found


def _alike(name: str, losses: Sequence[float], right: Sequence[float], tolerance: float) -> Figures:
    error = max(abs(mine - other) for mine, other in zip(losses, right, strict=True))
    if not error <= tolerance:
        raise WrongNumber(f"the losses of {name} differ by {error:.1e} from what they have to be")
    return {"largest difference of a loss": error}


def _layouts(check: Check, model: str) -> list[tuple[str, ...]]:
    """The flags of the trainings that have to agree: every ZeRO stage for the first model, one for the others."""
    if check.cpu:
        return [RESUMED]
    if model != "llama-64":
        return [("--zero-stage=0",)]
    return [*((f"--zero-stage={stage}",) for stage in range(4)), RESUMED]


@contextlib.contextmanager
def _tiny_world(models: Sequence[str]) -> Iterator[Path]:
    """A folder with built-in models, as drawn and not pretrained, and pairs of the tiny world for ten steps."""
    from trainers.data.sources import read_pairs
    from trainers.models.tiny import TINY_MODELS, pretrain
    from trainers.specs import BUILTIN, DatasetSpec

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in models:
            pretrain(replace(TINY_MODELS[model], steps=2), folder / model, lambda row: None)
        pairs = read_pairs(DatasetSpec(name="tiny_world", source=f"{BUILTIN}tiny_world"), "train")
        rows = [
            {"prompt": pair.prompt[0].content, "chosen": pair.chosen, "rejected": pair.rejected}
            for pair in itertools.islice(pairs, 80)
        ]
        (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        yield folder


def _losses(folder: Path, model: str, reward: str, *more: str, cpu: bool, stop: bool = False) -> list[float]:
    """The losses of ten steps of eight pairs; where it is to stop, in two runs, the second from a checkpoint on."""
    from pyarrow import parquet

    with tempfile.TemporaryDirectory() as out:
        words = (
            f"-m trainers.train --model {folder / model} --data {folder / 'train.jsonl'} --reward {reward}"
        )
        words += f" --out {out}/trained --effective-batch=8 --epochs=1 --lr=1e-4"
        command = [sys.executable, *words.split(), *more]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})}
        if stop:
            with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as first:
                assert first.stderr is not None
                for line in first.stderr:
                    if line.startswith("step 5/"):
                        first.send_signal(signal.SIGTERM)
            if not list(Path(out).glob("trained/checkpoints/*.json")):
                raise WrongNumber(f"stopped after five steps, {' '.join(command[2:])} left no checkpoint")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise WrongNumber(f"{' '.join(command[2:])} ended with {done.returncode}: {done.stderr[-2000:]}")
        return [float(loss) for loss in parquet.read_table(f"{out}/trained/log.parquet")["loss"].to_pylist()]


def streaming(check: Check) -> Figures:
    """Log-probabilities by a model whose layers come from host memory one after another: those of the whole one, bit for bit."""
    from benchmarks.data import random_draw
    from orchestrator.spec.catalog import ARCHITECTURES
    from trainers.evaluate.scoring import compute_reference
    from trainers.models.loading import load_model
    from trainers.models.streaming import stream_layers
    from trainers.pairs.templates import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        config = _llama(ARCHITECTURES["meta-llama/Llama-3.2-1B-Instruct"], check)
        pairs = random_draw(Path(folder), config, (9, 7, 5) if check.cpu else PAIR, 16).pairs
        whole, streamed = (
            load_model(folder, tokenizer=load_tokenizer(folder), output="unembedding", precision="fp32")
            for _ in range(2)
        )
    models = {"whole": whole.to(check.device), "streamed": stream_layers(streamed, check.device)}
    sums, figures = [], dict[str, Any]()
    for name, model in models.items():
        began = time.perf_counter()
        sums.append(compute_reference(model, pairs, report=lambda row: None))
        figures[f"s, {name}"] = time.perf_counter() - began
    if sums[0] != sums[1]:
        raise WrongNumber("log-probabilities with layers from host memory are not those of the whole model")
    return figures


def sweep(check: Check) -> Figures:
    """A small sweep on Ray, from reference to report; afterwards no process of theirs holds the card."""
    import deepspeed  # noqa: F401
    import mlflow  # noqa: F401
    import ray  # noqa: F401

    before = _on_the_card(check)
    with tempfile.TemporaryDirectory() as storage:
        words = "sweeps/full_grid.py --profile laptop --models llama-64 --train-sets tiny_world --max-trials"
        words += " 1 --backend inline" if check.cpu else " 2"
        command = [sys.executable, *words.split(), "--storage", storage]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise WrongNumber(
                f"the sweep ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
            )
        found: Figures = {"seconds": time.perf_counter() - began}
    if left := _on_the_card(check) - before:
        raise WrongNumber(f"after the sweep the card is still held by {', '.join(sorted(left))}")
    return found


def _on_the_card(check: Check) -> set[str]:
    """What the driver lists as processes on the card; in a container it may list none."""
    if check.cpu:
        return set()
    listed = ["nvidia-smi", "--query-compute-apps=pid,name", "--format=csv,noheader"]
    done = subprocess.run(listed, capture_output=True, text=True, check=False)
    return {line.strip() for line in done.stdout.splitlines() if line.strip()}


def throughput(check: Check) -> Figures:
    """An optimiser step at the shape of Llama-3.2-1B: ours, ours with compiled layers, the naive recipe, TRL; speed, memory.

    `planned GB` is what `plan` would reserve.
    """
    import deepspeed  # noqa: F401
    from transformers import LlamaConfig

    from benchmarks.data import random_draw
    from benchmarks.turns import COMPILED, OURS, Job, measure, ratio_to_ours
    from orchestrator.spec.catalog import ARCHITECTURES
    from trainers.models.architecture import of_config

    contenders = [OURS, "naive"]
    if not check.cpu:
        contenders += [COMPILED, *(["trl"] if find_spec("trl") else [])]
    batch, repetitions, lengths = (2, 1, (9, 7, 5)) if check.cpu else (8, 5, PAIR)
    found: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        config = _llama(ARCHITECTURES["meta-llama/Llama-3.2-1B"], check)
        drawn = random_draw(Path(folder), config, lengths, batch * (repetitions + 1))
        shapes = of_config(LlamaConfig.from_pretrained(folder).to_dict())
        for precision, kind in itertools.product(
            ("fp32",) if check.cpu else ("bf16", "tf32", "fp32"), ("ex_rm", "im_rm")
        ):
            jobs = [
                Job(contender=one, task="train", kind=kind, drawn=drawn, precision=precision, batch=batch)
                for one in contenders
            ]
            measured = measure(jobs, repetitions)
            seconds = {one: turns.seconds() for one, turns in measured.items()}
            values = [turns.value for turns in measured.values()]
            # Contenders that compute the same step agree on its loss, within the precision.
            if not max(values) - min(values) <= (1e-4 if precision == "fp32" else 2e-2):
                raise WrongNumber(f"{precision} {kind}: the contenders' losses are {values}")
            own = statistics.median(seconds[OURS])
            found[f"1B {precision} {kind}"] = {
                "pairs/s": batch / own,
                "peak GB": measured[OURS].peak_bytes / 1e9,
                "planned GB": _planned_gb(shapes, kind, precision, batch, lengths),
                **{f"times {one}": ratio_to_ours(seconds, one) for one in contenders[1:]},
            }
    return found


def _llama(sizes: Any, check: Check) -> dict[str, Any]:
    """The config of a llama of that shape, tiny on a CPU."""
    return {
        "vocab_size": 512 if check.cpu else sizes.vocabulary,
        "hidden_size": 32 if check.cpu else sizes.hidden,
        "intermediate_size": 64 if check.cpu else sizes.intermediate,
        "num_hidden_layers": 2 if check.cpu else sizes.layers,
        "num_attention_heads": 4 if check.cpu else sizes.heads,
        "num_key_value_heads": 2 if check.cpu else sizes.key_heads,
        "max_position_embeddings": 4096,
    }


def _planned_gb(shapes: Any, kind: str, precision: str, batch: int, lengths: tuple[int, int, int]) -> float:
    from orchestrator.plan.memory import PairTokens, Training, footprint
    from trainers.rewards import RewardSpec
    from trainers.specs import OptimSpec, Placement

    training = Training(
        architecture=shapes,
        reward=RewardSpec(kind=kind, beta=0.01 if kind == "im_rm" else None),
        optim=OptimSpec(effective_batch=batch),
        precision=precision,
        pair=PairTokens(**dict(zip(("prompt", "chosen", "rejected"), lengths, strict=True))),
    )
    return footprint(training, Placement(device="cuda", forward_tokens=batch * sum(lengths))).total


STEPS: Mapping[str, Callable[[Check], Figures]] = {
    step.__name__: step for step in (versions, kernels, head, training, streaming, sweep, throughput)
}


def main(check: Check) -> None:
    """Run the steps, each in a process of its own; write what was found after each."""
    if not check.cpu and not torch.cuda.is_available():
        sys.exit("no GPU is here; `--cpu` runs every step at a tiny size on the CPU.")
    unknown = [name for name in check.only if name not in STEPS]
    if unknown:
        sys.exit(f"no step {', '.join(unknown)}; there are {', '.join(STEPS)}.")
    found: Figures = {"date": time.strftime("%Y-%m-%d"), "device": check.device}
    for name in check.only or STEPS:
        began = time.perf_counter()
        done = _in_a_process(check, name)
        found[name] = {**done, "seconds": round(time.perf_counter() - began, 1)}
        check.out.write_text(json.dumps(found, indent=1))
        print(f"{name}: {done.get('wrong') or done.get('left out') or 'right'}", flush=True)
        if "wrong" in done:
            sys.exit(1)


def _in_a_process(check: Check, name: str) -> Figures:
    """Run one step in a fresh process, so that it finds an empty card, and return its figures."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(one_step, check, name).result()
        except BrokenProcessPool as error:
            return {"wrong": str(error)}


def one_step(check: Check, name: str) -> Figures:
    """Return the figures of a step, or what is `wrong`, or why it is `left out`."""
    # As a training does before its first product.
    settle_products("fp32")
    try:
        return STEPS[name](check)
    except ModuleNotFoundError as error:
        return {"left out": f"{error.name} is not installed"}
    except WrongNumber as error:
        return {"wrong": str(error)}
    except Exception:
        return {"wrong": traceback.format_exc()[-2000:]}


if __name__ == "__main__":
    main(tyro.cli(Check))
