"""The flags and commands that every file in sweeps/ has, as the dataclasses that tyro reads."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from orchestrator.spec.datasets import ReadingOptions
from trainers.train.stopping import GRACE_S


@dataclass(frozen=True)
class Run:
    """Run what is missing of the sweep (the default command)."""


@dataclass(frozen=True)
class Plan:
    """Say what would run where, how long, in how much memory and at what price; start nothing."""

    price: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """$ per GPU-hour (default: an assumption that is named, or --cluster's @X)."""


@dataclass(frozen=True)
class Status:
    """Say what of the sweep is in the store, what runs and what failed."""

    watch: bool = False
    """Say it again whenever it changes, until the sweep's driver ends."""


@dataclass(frozen=True)
class Report:
    """Write and print the report of what is in the store."""

    compare: Annotated[str | None, tyro.conf.arg(metavar="SWEEP")] = None
    """Another sweep to put beside it: its name in this storage, or its folder <storage>/sweeps/<name>."""


@dataclass(frozen=True)
class Ui:
    """Start MLflow's UI on loopback, on the sweep's store."""

    port: int = 5000


@dataclass(frozen=True)
class Sync:
    """Rebuild the MLflow view from the artifacts."""


@dataclass(frozen=True)
class Retry:
    """Run again what failed, a diverged training included; --only narrows, and the sweep stays as it was declared."""


@dataclass(frozen=True)
class Gc:
    """List what of the store no declared sweep needs or ever needed, and how much room it takes."""

    keep: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Sweeps whose artifacts stay, as they are declared now (default: all that any sweep was ever declared to be)."""
    delete: bool = False
    """Remove what is listed."""


Command = Run | Plan | Status | Report | Ui | Sync | Retry | Gc


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The flags of every file in sweeps/."""

    command: Command = field(default_factory=Run)
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the sweep in the storage (default: the file's name)."""
    storage: Annotated[str | None, tyro.conf.arg(metavar="PATH|s3://…")] = None
    """Folder or bucket that keeps the artifacts (default: $RMSWEEP_STORAGE or ./rmsweep-store)."""
    tracking_uri: Annotated[str | None, tyro.conf.arg(metavar="URI")] = None
    """MLflow server or database (default: $MLFLOW_TRACKING_URI or <storage>/mlflow.db)."""
    json: bool = False
    """Print JSON. Commands plan, status, report and gc have it."""


@dataclass(frozen=True, kw_only=True)
class Options(ReadingOptions, CommonOptions):
    """The flags of every grid of trainings and evaluations."""

    profile: Literal["auto", "paper", "laptop"] = "auto"
    """What the grid is made of. auto: paper where the cluster's GPUs hold it, else laptop."""
    backend: Literal["ray", "inline"] = "ray"
    """inline: the same stages in this process, without Ray."""
    cluster: Annotated[str | None, tyro.conf.arg(metavar="2x8xH100-80GB|YAML")] = None
    """What it may run on (default: what Ray sees, else this machine); with a price per GPU-hour as …@2.50."""
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]ID|PATH")] = ()
    """Catalog names, hub ids, folders or GGUF files."""
    rewards: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Reward types: ex_rm, im_rm, ex_grm, and the ablations ex_rm_mean, im_rm_no_reference (default: the profile's)."""
    train_sets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]NAME|PATH")] = ()
    """Sets trained on: their train split."""
    eval_sets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]NAME|PATH")] = ()
    """Sets evaluated on: their test split."""
    category: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TRAIN/EVAL=VALUE")] = ()
    """Overrides: in-distribution, token-level-shift, domain-shift or training-pairs."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")] = ()
    """Training seeds."""
    max_train_pairs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Train on the first N of a seeded permutation."""
    max_eval_pairs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Evaluate on the first N of a seeded permutation."""
    max_prompt_tokens: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Leave out pairs with a longer prompt, in training and evaluation (default: 1024)."""
    max_response_tokens: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Leave out pairs with a longer response, in training and evaluation (default: 1024)."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Passes over the training pairs."""
    keep_epochs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="N|every")] = ()
    """Keep the weights after these epochs, too, and evaluate them."""
    lr: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """Learning rate."""
    beta: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """β of im_rm."""
    effective_batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Pairs per optimiser step."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=GLOB")] = ()
    """Narrow the grid by model, reward, train or seed."""
    max_trials: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """The grid's first N trials."""
    extend: bool = False
    """Add the grid to what the sweep of this name was declared to be."""
    replace: bool = False
    """Let the sweep's name stand for this grid alone; what it stood for before stays in the storage."""
    checkpoint_steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Optimiser steps between checkpoints (default: one every ten minutes)."""
    grace_s: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = GRACE_S
    """Time for a last checkpoint after SIGINT or SIGTERM; spot machines give 110."""
    allow_pickle: bool = False
    """Read pickled weights where a model has no safetensors. Danger: a pickle can run any code of its author."""
    trust_remote_code: bool = False
    """Run the Python files of a model's folder or hub repository. Danger: any code of its author, with your rights."""
    allow_overlap: bool = False
    """Evaluate on the very rows that are trained on."""
    keep_weights: Literal["all", "best", "none"] = "all"
    """Which trained weights stay when the sweep is evaluated. best: of each model, training set and reward type, one seed's."""
