"""Ten minutes on one GPU: is what rmsweep computes there right, and how fast is it. Random weights, nothing downloaded.

    python -m benchmarks.gpu_check              on a machine with a GPU
    python -m benchmarks.gpu_check --cpu        every step at a tiny size on the CPU; no figure of it is a speed

Each step is a process of its own and checks its numbers before it measures; the first wrong number ends the command with
exit code 1. `--out` holds what was found, as JSON, after every step. A step whose packages are missing says so and is left
out: `kernels` and `head` need torch and transformers only.

Shapes: H query heads, K key heads, N tokens, D width of a head, M response tokens, V vocabulary.
"""

import contextlib
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
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
from trainers.pairs.packing import PairLayout, Span

# Most seconds of a step; two of them start many processes.
STEP_TIMEOUT_S = 300
SLOW_STEPS_TIMEOUT_S = {"training": 900, "throughput": 900}
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
    "Qwen2.5-1.5B": (12, 2, 128, None, None),
    "Qwen2.5-3B": (16, 2, 128, None, None),
    "Gemma-2-2B": (8, 4, 256, 50.0, None),
    "Gemma-2-2B, window": (8, 4, 256, 50.0, 96),
    "Llama-3.2-1B, short": (32, 8, 64, None, None),
    "Qwen2.5-3B, short": (16, 2, 128, None, None),
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


class NotInstalled(Exception):
    """A package that a step needs is missing."""


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
    """Library versions, the card, and which arithmetic torch uses for fp32 products."""
    names = ("torch", "transformers", "triton", "deepspeed", "ray", "trl", "flash-attn", "liger-kernel")
    found: Figures = {
        name: metadata.version(name) if _is_installed(name) else "not installed" for name in names
    }
    found["fp32 products"] = torch.get_float32_matmul_precision()
    found["NVIDIA_TF32_OVERRIDE"] = os.environ.get("NVIDIA_TF32_OVERRIDE")
    if not check.cpu:
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "gb": card.total_memory / 1e9, "cuda": torch.version.cuda}
        found["capability"] = f"{card.major}.{card.minor}"
    return found


def kernels(check: Check) -> Figures:
    """Attention over packed pairs, values and gradients, against a softmax in fp64."""
    found: Figures = {
        f"{name}, {precision}": _kernel(check, name, precision) for name in HEADS for precision in DTYPES
    }
    found["graphs compiled"] = _graphs()
    return found


def _kernel(check: Check, name: str, precision: str) -> Figures:
    heads, key_heads, width, softcap, window = HEADS[name]
    pairs, lengths = (1, SHORT) if name.endswith("short") else (8, PAIR)
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

    def flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = 1 / math.sqrt(width)
        return attention._flex_attention(query, key, value, layout, scale, rule, softcap).transpose(1, 2)

    dtype, expected = DTYPES[precision], _attended(states, dense, torch.float64)
    what, once = f"attention of {name} in {precision}", _attended(states, packed, dtype)
    figures = _compared(what, once, expected, dtype)
    if check.cpu:
        return figures
    figures |= _measured(lambda: _attended(states, packed, dtype))
    if softcap is None and attention.fits_flash(states[0], states[2]):
        if not all(map(torch.equal, once, _attended(states, packed, dtype))):
            raise WrongNumber(f"{what}: it is another one the second time")
        other = _compared(f"{what} by FlexAttention", _attended(states, flex, dtype), expected, dtype)
        other |= _measured(lambda: _attended(states, flex, dtype))
        figures |= {f"{key} of FlexAttention": value for key, value in other.items()}
    return figures


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
    """Attention pair by pair and response by response, as a textbook writes it."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []
    for span in layout.spans:
        prompt = list(range(span.start, span.start + span.prompt))
        chosen = list(range(span.start + span.prompt, span.rejected_start))
        rejected = list(range(span.rejected_start, span.end))
        for row, new in ((prompt + chosen, 0), (prompt + rejected, span.prompt)):
            at = torch.arange(len(row), device=query.device)
            seen = at[None, :] <= at[:, None]
            if window is not None:
                seen &= at[:, None] - at[None, :] < window
            scores = query[:, :, row] @ key[:, :, row].transpose(2, 3) / math.sqrt(query.shape[-1])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            parts.append((weights @ value[:, :, row])[:, :, new:])
    return torch.cat(parts, 2)


def _graphs() -> int:
    """How many graphs torch has compiled in this process; many mean that it compiles anew for every length."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


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
    return {**figures, **_measured(in_blocks), "waits for the card": _synchronisations(in_blocks)}


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


def _synchronisations(run: Callable[[], object]) -> int:
    """How often a run makes the host wait for the card."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(item.message) for item in caught)


def training(check: Check) -> Figures:
    """Ten steps of built-in models by `python -m trainers.train`: on the card as on the CPU, at every ZeRO stage."""
    _require("deepspeed")
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


def memory(check: Check) -> Figures:
    """A step that is too large fails by name, and the same process goes on with one that fits."""
    from trainers.errors import OutOfMemory
    from trainers.models.memory import memory_named

    if check.cpu:
        return {"left out": "a CPU's memory ends by its own rules"}
    free, total = torch.cuda.mem_get_info()
    try:
        with memory_named("too large"):
            torch.empty(2 * total, dtype=torch.uint8, device="cuda")
        raise WrongNumber("twice the card's memory was given")
    except OutOfMemory:
        pass
    torch.empty(free // 2, dtype=torch.uint8, device="cuda").zero_()
    return {"GB": total / 1e9, "GB free": free / 1e9}


def streaming(check: Check) -> Figures:
    """Log-probabilities by a model whose layers come from host memory one after another: those of the whole one, bit for bit."""
    from benchmarks.data import random_draw
    from orchestrator.spec.catalog import ARCHITECTURES
    from trainers.evaluate.scoring import compute_reference
    from trainers.models.loading import load_model
    from trainers.models.streaming import stream_layers
    from trainers.pairs.templates import load_tokenizer

    found: list[Any] = []
    figures: Figures = {}
    ways: dict[str, Callable[[Any, str], Any]] = {
        "streamed": stream_layers,
        "whole": lambda model, device: model.to(device),
    }
    with tempfile.TemporaryDirectory() as folder:
        config = _llama(ARCHITECTURES["meta-llama/Llama-3.2-1B-Instruct"], check)
        pairs = random_draw(Path(folder), config, (9, 7, 5) if check.cpu else PAIR, 16).pairs
        tokenizer = load_tokenizer(folder)
        for name, place in ways.items():
            model = load_model(folder, tokenizer=tokenizer, output="unembedding", precision="fp32")
            if not check.cpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            model = place(model, check.device)
            compute_reference(model, pairs, report=lambda row: None)
            began = time.perf_counter()
            found.append(compute_reference(model, pairs, report=lambda row: None))
            if not check.cpu:
                figures |= {f"s, {name}": time.perf_counter() - began}
                figures |= {f"GB, {name}": torch.cuda.max_memory_allocated() / 1e9}
    if found[0] != found[1] or figures.get("GB, streamed", 0) >= figures.get("GB, whole", 1):
        raise WrongNumber(f"layers from host memory are not a whole model's, or take as much: {figures}")
    return figures


def sweep(check: Check) -> Figures:
    """A small sweep on Ray, from reference to report; afterwards no process of theirs holds the card."""
    _require("ray", "deepspeed", "mlflow")
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
    """An optimiser step at the shape of Llama-3.2-1B, and of a part of the 8B: ours, the naive recipe, TRL; speed, memory.

    `mfu` is the share of the card's dense peak rate that the operations of the definition take: recomputation and padding
    do not count. `planned GB` is what `plan` would reserve.
    """
    _require("deepspeed")
    from transformers import LlamaConfig

    from benchmarks.data import random_draw
    from benchmarks.turns import COMPILED, OURS, Job, measure, ratio_to_ours
    from orchestrator.spec.catalog import ARCHITECTURES
    from trainers.models.architecture import of_config

    contenders = [OURS, "naive"]
    if not check.cpu:
        contenders += [COMPILED, *(["trl"] if _is_installed("trl") else [])]
    precisions = ("fp32",) if check.cpu else ("bf16", "tf32", "fp32")
    batch, repetitions = (2, 1) if check.cpu else (8, 5)
    small, large = (ARCHITECTURES[f"meta-llama/Llama-3.{name}"] for name in ("2-1B", "1-8B-Instruct"))
    models = [("1B", small, [*itertools.product(precisions, ("ex_rm", "im_rm"))], contenders)]
    # Eight of its 32 layers: 45 GB of weights, gradients and moments.
    if not check.cpu and torch.cuda.mem_get_info()[1] > 75e9:
        models.append(("8B cut to 8 layers", replace(large, layers=8), [("bf16", "im_rm")], [OURS]))
    found: Figures = {}
    for name, sizes, cells, names in models:
        config = _llama(sizes, check)
        with tempfile.TemporaryDirectory() as folder:
            lengths = (9, 7, 5) if check.cpu else PAIR
            drawn = random_draw(Path(folder), config, lengths, batch * (repetitions + 1))
            shapes = of_config(LlamaConfig.from_pretrained(folder).to_dict())
            for precision, kind in cells:
                jobs = [
                    Job(contender=one, task="train", kind=kind, drawn=drawn, precision=precision, batch=batch)
                    for one in names
                ]
                measured = measure(jobs, repetitions)
                seconds = {one: turns.seconds() for one, turns in measured.items()}
                values = [turns.value for turns in measured.values()]
                # Contenders that compute the same step agree on its loss, within the precision.
                if not max(values) - min(values) <= (1e-4 if precision == "fp32" else 2e-2):
                    raise WrongNumber(f"{name} {precision} {kind}: the contenders' losses are {values}")
                own = statistics.median(seconds[OURS])
                found[f"{name} {precision} {kind}"] = {
                    "pairs/s": batch / own,
                    "peak GB": measured[OURS].peak_bytes / 1e9,
                    **{f"times {one}": ratio_to_ours(seconds, one) for one in names[1:]},
                    **_planned(shapes, kind, precision, batch, own, check),
                    **_profiled(jobs[0], check),
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


def _profiled(job: Any, check: Check) -> Figures:
    """How many kernels (on a CPU operations) a step of ours runs, and how much of its time the card waits for them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.contenders import Ours
    from trainers.train.engine import process_group

    activity, kind = ProfilerActivity.CUDA, DeviceType.CUDA
    if check.cpu:
        activity, kind = ProfilerActivity.CPU, DeviceType.CPU
    with process_group():
        ours = Ours(job)
        ours.step(job.pairs_of(0))
        began = time.perf_counter()
        with profile(activities=[activity]) as profiled:
            # It ends by reading the loss from the card.
            ours.step(job.pairs_of(1))
            seconds = time.perf_counter() - began
    kernels = [event for event in profiled.events() if event.device_type == kind]
    figures: Figures = {"kernels a step": len(kernels)}
    if not check.cpu:
        figures["idle share"] = 1 - sum(event.time_range.elapsed_us() for event in kernels) / 1e6 / seconds
    return figures


def _planned(shapes: Any, kind: str, precision: str, batch: int, step_s: float, check: Check) -> Figures:
    """The share of the card's peak rate that a step of that many seconds used, and the memory that `plan` expects."""
    from benchmarks.utilisation import step_flops
    from orchestrator.plan.durations import peak_tflops
    from orchestrator.plan.hardware import listed_kind
    from orchestrator.plan.memory import PairTokens, Training, footprint
    from trainers.pairs.tokens import TokenPair
    from trainers.rewards import RewardSpec
    from trainers.specs import OptimSpec, Placement

    if check.cpu:
        return {}
    pair = PairTokens(prompt=PAIR[0], chosen=PAIR[1], rejected=PAIR[2])
    training = Training(
        architecture=shapes,
        reward=RewardSpec(kind=kind, beta=0.01 if kind == "im_rm" else None),
        optim=OptimSpec(effective_batch=batch),
        precision=precision,
        pair=pair,
    )
    prompt, chosen, rejected = ([0] * length for length in PAIR)
    mean_pair = TokenPair(index=0, prompt=prompt, chosen=chosen, rejected=rejected)
    flops = step_flops(shapes, kind, [mean_pair] * batch)
    placement = Placement(device="cuda", forward_tokens=batch * sum(PAIR))
    figures: Figures = {"planned GB": footprint(training, placement).total, "TFLOP/s": flops / step_s / 1e12}
    card = listed_kind(torch.cuda.get_device_name(0))
    if card is not None:
        figures["mfu"] = figures["TFLOP/s"] / peak_tflops(card, precision)
    return figures


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _require(*packages: str) -> None:
    for package in packages:
        if not _is_installed(package):
            raise NotInstalled(f"{package} is not installed")


STEPS: Mapping[str, Callable[[Check], Figures]] = {
    step.__name__: step for step in (versions, kernels, head, training, memory, streaming, sweep, throughput)
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
    code = "import sys; from benchmarks.gpu_check import one_step; one_step(sys.argv[1], sys.argv[2])"
    limit_s = SLOW_STEPS_TIMEOUT_S.get(name, STEP_TIMEOUT_S)
    # A session of its own: what it starts ends with it, and leaves the card.
    with subprocess.Popen(
        [sys.executable, "-c", code, name, check.device],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            said, trouble = running.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"left out": f"it took more than {limit_s} s, so nothing is said of it"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    if running.returncode:
        return {"wrong": f"it ended with {running.returncode}: {trouble[-2000:]}"}
    answer: Figures = json.loads(said.splitlines()[-1])
    return answer


def one_step(name: str, device: str) -> None:
    """Run a step, and print its figures as the last line."""
    check = Check(cpu=device == "cpu")
    # As a training does before its first product.
    settle_products("fp32")
    try:
        answer = STEPS[name](check)
    except WrongNumber as error:
        answer = {"wrong": str(error)}
    except NotInstalled as error:
        answer = {"left out": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    # Ended from outside, it still ends its step.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main(tyro.cli(Check))
