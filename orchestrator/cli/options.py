"""The commands and flags of every file in sweeps/, as the dataclasses that tyro reads: their docstrings are the help."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from orchestrator.spec.datasets import ReadingOptions
from trainers.specs import Loss, Optimizer, Part, Precision, Reasoning, Schedule, System
from trainers.train.stopping import GRACE_S


def flag(metavar: str, default: str = "") -> Any:
    """Describe a flag that is None or empty unless it is given; `default` says what that means."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "")


OF_PROFILE = "the profile's"


@dataclass(frozen=True)
class Run:
    """Run what is not complete, then write and print the report. This is the default command."""


@dataclass(frozen=True)
class Plan:
    """Print what would run, on which devices, for how long and at what price. Nothing is started."""

    price: Annotated[
        float | None, flag("X", "the price in --cluster, else an assumption that is printed")
    ] = None
    """$ per GPU-hour."""


@dataclass(frozen=True)
class Status:
    """Print which trials are complete, running, failed or missing."""

    watch: bool = False
    """Print again whenever something changes, until the sweep ends."""
    paths: bool = False
    """Print also the place of each trial's weights."""


@dataclass(frozen=True)
class Report:
    """Write the report of what is complete, and print its tables."""

    compare: Annotated[str | None, flag("SWEEP")] = None
    """Compare with another sweep: its name in this storage, or its folder <storage>/sweeps/<name>."""
    baseline: Annotated[str | None, flag("REWARD", "that of the last report, or the sweep's first")] = None
    """Reward type that the others are compared with: differences are baseline − other."""
    by: Annotated[str | None, flag("AXIS")] = None
    """Print accuracies by the values of an axis that the sweep varies, and the best by held-out pairs."""
    ensemble: bool = False
    """Print accuracies of the mean reward of all seeds, beside those of a seed alone."""
    price: Annotated[float | None, flag("X", "that of the last report")] = None
    """$ per GPU-hour: the report then says what the sweep cost."""


@dataclass(frozen=True)
class Ui:
    """Start MLflow's web interface on this machine, and print the address of the sweep's runs."""

    port: int = 5000
    """Port of the web interface."""


@dataclass(frozen=True)
class Sync:
    """Write the sweep's runs to MLflow again, from the artifacts."""


@dataclass(frozen=True)
class Retry:
    """Run the failed trials again, also those whose training diverged. --only chooses among them."""


@dataclass(frozen=True)
class Gc:
    """List the files in the storage that no sweep needs, with their sizes."""

    drop: Annotated[tuple[str, ...], flag("SWEEP")] = ()
    """Sweeps that are no longer needed: list also what only they need."""
    drop_earlier: bool = False
    """List also what sweeps needed only before --replace."""
    delete: bool = False
    """Delete what is listed."""


Command = Run | Plan | Status | Report | Ui | Sync | Retry | Gc


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The flags of every file in sweeps/."""

    command: Command = field(default_factory=Run)
    name: Annotated[str | None, flag("NAME", "the file's name")] = None
    """Name of the sweep in the storage."""
    storage: Annotated[str | None, flag("PATH|s3://…", "$RMSWEEP_STORAGE or ./rmsweep-store")] = None
    """Folder or bucket that keeps the artifacts."""
    tracking_uri: Annotated[str | None, flag("URI", "$MLFLOW_TRACKING_URI or <storage>/mlflow.db")] = None
    """MLflow server or database."""
    json: bool = False
    """Print JSON (plan, status, report and gc)."""


@dataclass(frozen=True, kw_only=True)
class Options(ReadingOptions, CommonOptions):
    """The flags of every grid of trainings and evaluations."""

    profile: Literal["auto", "paper", "laptop"] = "auto"
    """Models, data and hyperparameters of the grid. auto: paper if the cluster's GPUs hold its models, else laptop."""
    backend: Literal["ray", "inline"] = "ray"
    """inline: run in this process, without Ray."""
    cluster: Annotated[
        str | None, flag("2x8xH100-80GB|YAML", "the running Ray cluster, else this machine")
    ] = None
    """Nodes to run or plan on; …@2.50 adds a price per GPU-hour."""
    models: Annotated[tuple[str, ...], flag("[NAME=]ID|PATH", OF_PROFILE)] = ()
    """Base models: catalog names, hub ids, folders or GGUF files."""
    rewards: Annotated[tuple[str, ...], flag("NAME", OF_PROFILE)] = ()
    """Reward types: ex_rm, im_rm, ex_grm, the ablations ex_rm_mean and im_rm_no_reference, and remedies for IM-RM:
    im_rm_hybrid, im_rm_length_normalised and im_rm_logits."""
    train_sets: Annotated[tuple[str, ...], flag("[NAME=]NAME|PATH", OF_PROFILE)] = ()
    """Sets to train on; their train split is used. A:0.7+B:0.3 mixes two in these shares."""
    eval_sets: Annotated[tuple[str, ...], flag("[NAME=]NAME|PATH", OF_PROFILE)] = ()
    """Sets to evaluate on; their test split is used."""
    suites: Annotated[tuple[str, ...], flag("NAME[=PATH]")] = ()
    """Evaluation suites besides the sets, from the hub or a copy: rewardbench, rewardbench2, rm_bench, judgebench, …"""
    category: Annotated[tuple[str, ...], flag("TRAIN/EVAL=VALUE")] = ()
    """Set the category of a pair of sets: in-distribution, token-level-shift, domain-shift or training-pairs."""
    seeds: Annotated[tuple[int, ...], flag("N", OF_PROFILE)] = ()
    """Training seeds."""
    max_train_pairs: Annotated[int | None, flag("N", OF_PROFILE)] = None
    """Train on the first N pairs of a seeded permutation."""
    max_eval_pairs: Annotated[int | None, flag("N", OF_PROFILE)] = None
    """Evaluate on the first N pairs of a seeded permutation."""
    max_prompt_tokens: Annotated[int | None, flag("N", "1024")] = None
    """Leave out pairs with a longer prompt, in training and evaluation."""
    max_response_tokens: Annotated[int | None, flag("N", "1024")] = None
    """Leave out pairs with a longer response, in training and evaluation."""
    template: Annotated[str | None, flag("NAME|FILE", "the model's own")] = None
    """Chat template: the name of one that the tokenizers have, or a Jinja file."""
    system: Annotated[System | None, flag("fold|drop|refuse", "fold")] = None
    """A system turn where a template takes none: fold it into the first user turn, drop it, or refuse the row."""
    reasoning: Annotated[Reasoning | None, flag("score|keep|drop", "score")] = None
    """Reasoning before a response's answer: score it like the rest, keep it as context of what is scored, or drop it."""
    keep_epochs: Annotated[tuple[str, ...], flag("N|every", OF_PROFILE)] = ()
    """Keep and evaluate the weights also after these epochs, not only after the last."""
    axis: Annotated[tuple[str, ...], flag("[MODEL.|REWARD.]NAME=V1,V2")] = ()
    """Vary any field of a trial, as in lr=1e-6,1e-5 beta=0.01,0.1: every value with every other one."""
    zip: Annotated[tuple[str, ...], flag("NAME=V1,V2")] = ()
    """Vary these together: the first value of each, then the second of each."""
    trials: Annotated[str | None, flag("FILE.csv|FILE.yaml")] = None
    """Run these trials: a row for each, with columns model, reward, train_set, seed and any axis."""
    epochs: Annotated[int | None, flag("N", OF_PROFILE)] = None
    """Passes over the training pairs."""
    lr: Annotated[float | None, flag("X", OF_PROFILE)] = None
    """Learning rate."""
    beta: Annotated[float | None, flag("X", "0.01")] = None
    """β of im_rm."""
    effective_batch: Annotated[int | None, flag("N", OF_PROFILE)] = None
    """Pairs in an optimiser step."""
    precision: Annotated[Precision | None, flag("NAME", "the model's")] = None
    """Precision of the weights while they are trained."""
    optimizer: Annotated[Optimizer | None, flag("NAME", "adamw")] = None
    """The optimiser: adamw, sgd or rmsprop."""
    momentum: Annotated[float | None, flag("X", "0")] = None
    """Momentum of sgd and rmsprop."""
    schedule: Annotated[Schedule | None, flag("NAME", "constant")] = None
    """Learning rate after the warm-up: constant, linear or cosine."""
    warmup_steps: Annotated[int | None, flag("N", "0")] = None
    """Optimiser steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float | None, flag("X", "0")] = None
    """Weight decay."""
    clip: Annotated[float | None, flag("X", "none")] = None
    """Largest norm of a gradient."""
    freeze: Annotated[tuple[Part, ...], flag("PART", "none")] = ()
    """Parts that keep their values: backbone, embeddings or unembedding."""
    loss: Annotated[Loss | None, flag("NAME", "bradley_terry")] = None
    """Loss of a pair: bradley_terry, hinge or ipo."""
    label_smoothing: Annotated[float | None, flag("X", "0")] = None
    """Probability that a label is wrong."""
    margin: Annotated[float | None, flag("X", "0")] = None
    """The reward margin of a pair must exceed this number times the pair's own margin."""
    centring: Annotated[float | None, flag("X", "0")] = None
    """Add this number times the squared sum of a pair's rewards to the loss, which centres rewards on 0."""
    consistency: Annotated[float | None, flag("X", "0")] = None
    """Add this number times the squared differences to the rewards of a pair's rewritings to the loss."""
    lora_rank: Annotated[int | None, flag("N", "0, no adapter")] = None
    """Train a low-rank adapter instead of the backbone."""
    lora_alpha: Annotated[float | None, flag("X", "16")] = None
    """Scale of the adapter, times its rank."""
    lora_targets: Annotated[tuple[str, ...], flag("LAYER", "all linear layers")] = ()
    """Names of the layers that the adapter is added to."""
    validation_share: Annotated[float | None, flag("X", OF_PROFILE)] = None
    """Share of the training pairs that is held out, and scored after every epoch."""
    only: Annotated[tuple[str, ...], flag("KEY=GLOB")] = ()
    """Run a part of the grid, by model, reward, train, seed or any axis."""
    max_trials: Annotated[int | None, flag("N")] = None
    """Run the first N trials of the grid."""
    until: Annotated[float | None, flag("X")] = None
    """Run the grid, then add seeds and evaluation pairs until half of the 95 % interval of each difference is X or less."""
    budget: Annotated[str | None, flag("40gpuh|2cpuh|'$200'")] = None
    """Run the grid seed by seed, then add what narrows the differences most, until the sweep has cost this much."""
    extend: bool = False
    """Add this grid to the trials that the sweep of this name already has."""
    replace: bool = False
    """Replace the sweep of this name by this grid. Artifacts of its earlier trials stay in the storage."""
    checkpoint_steps: Annotated[int | None, flag("N", "one checkpoint every ten minutes")] = None
    """Optimiser steps between checkpoints."""
    compile: bool = False
    """Compile the layers of models that train without ZeRO 3: takes minutes at the first step, speeds up later ones."""
    grace_s: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = GRACE_S
    """Time for a last checkpoint after SIGINT or SIGTERM; give 110 on spot machines."""
    allow_pickle: bool = False
    """Read pickled weights of models without safetensors. Danger: a pickle can run any code of its author."""
    trust_remote_code: bool = False
    """Run the Python files of a model's folder or hub repository. Danger: they can do anything that you can."""
    keep_weights: Literal["all", "best", "none"] = "all"
    """Trained weights to keep after evaluation. best: one seed for each model, training set and reward type."""
