"""The session of a command: its options, storage and terminal; its exit codes; and the grid that its flags select."""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.cli.options import CommonOptions, Gc, Options, Retry, Run, Sync, Ui
from orchestrator.cli.terminal import console_on, say
from orchestrator.plan import placement
from orchestrator.plan.hardware import Node
from orchestrator.spec import axes, catalog, selection
from orchestrator.spec.catalog import Profile, Profiles
from orchestrator.spec.datasets import read_as
from orchestrator.spec.redaction import redacted, take_credentials
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import FollowUp
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, read_declaration
from trainers.data.sources import suite_spec
from trainers.errors import SpecError, StorageError
from trainers.pairs.templates import given_template
from trainers.specs import DrawSpec, Trust, given_name
from trainers.storage import SCHEME, Location, ObjectPath, parse_uri, require_access

DEFECT, USAGE, HOLES, INTERRUPTED = 1, 2, 3, 130
PIPE_WIDTH = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The options, storage, tracking server and terminal of one command."""

    options: Options
    sweep_name: str
    store: Store
    tracking_uri: str
    folder: Path
    console: Console
    command: tuple[str, ...] = ()
    profiles: Profiles = field(default_factory=lambda: catalog.PROFILES)
    follow_up: FollowUp | None = None

    @property
    def driver_log(self) -> Path:
        """The log of what libraries print; logs of failed trials are beside it."""
        return self.store.local_sweep_dir(self.sweep_name) / "logs" / "driver.log"

    def declaration(self) -> Declaration:
        """Return the sweep's declaration. Raises SpecError where there is none, or one without trials."""
        found = read_declaration(self.sweep_name, self.store)
        if not found.trials:
            raise SpecError(
                f"{self.sweep_name} in {self.store.root} has analyses and no trials; ask the file in sweeps/ that ran it."
            )
        return found

    def say(self, *lines: str, style: str | None = None) -> None:
        """Print each line as it is."""
        say(self.console, *lines, style=style)

    def warn(self, *lines: str) -> None:
        """Print each line in yellow."""
        say(self.console, *lines, style="yellow")


def set_flags(options: Any, besides: Sequence[str] = ()) -> list[str]:
    """Return the flags of a dataclass that are not at their defaults, without those of the fields `besides`."""
    given = (item.name for item in fields(options) if getattr(options, item.name) != item.default)
    return [f"--{name.replace('_', '-')}" for name in given if name not in besides]


def require_price(price: float | None) -> None:
    """Raise SpecError for a price per GPU-hour that none can be."""
    if price is not None and not 0 <= price < math.inf:
        raise SpecError(f"--price {price}: give $ per GPU-hour, 0 or more.")


def dump_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def open_session(
    options: CommonOptions, name: str, folder: Path, command: Sequence[str] | None = None
) -> Session:
    """Open the storage and the tracking server that the options name. Raises StorageError, SpecError.

    `command` is the command line, if it is not this process's.
    """
    from orchestrator.tracking.database import default_uri

    store = Store(storage_root(options.storage))
    uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    writes = isinstance(options.command, Run | Retry | Sync)
    if not uri and (isinstance(store.root, Path) or writes or isinstance(options.command, Ui)):
        uri = default_uri(store)
    if isinstance(store.root, ObjectPath):
        deletes = isinstance(options.command, Gc) and options.command.delete
        require_access(store.root, write=writes or deletes)
    if not isinstance(options, Options):
        # An analysis has none of a grid's flags.
        options = Options(**{item.name: getattr(options, item.name) for item in fields(CommonOptions)})
    # A file, a pipe or a notebook gets wide lines.
    console, wide = console_on(sys.stdout), console_on(sys.stdout, PIPE_WIDTH)
    return Session(
        options=options,
        sweep_name=name if options.name is None else given_name("--name", options.name),
        store=store,
        tracking_uri=take_credentials(uri),
        folder=folder,
        console=console if console.is_terminal or "COLUMNS" in os.environ else wide,
        command=tuple(map(redacted, sys.argv if command is None else command)),
    )


def by_rmsweep() -> bool:
    """Whether this process was called as `rmsweep EXPERIMENT`."""
    return Path(*sys.orig_argv[1:2]).name == "rmsweep"


def shell_words(script: str) -> list[str]:
    """Return the words that run an experiment's file in a shell, as this process was run."""
    if not by_rmsweep():
        return [os.path.relpath(sys.executable), script]
    typed = sys.orig_argv[1]
    return ["rmsweep" if shutil.which("rmsweep") == typed else os.path.relpath(typed), Path(script).stem]


def storage_root(given: str | None) -> Location:
    """Return the folder or the place in a bucket that --storage or the environment names. Raises StorageError."""
    storage = given or os.environ.get("RMSWEEP_STORAGE") or "rmsweep-store"
    if storage.startswith(SCHEME):
        return parse_uri(storage)
    if "://" in storage:
        scheme = storage.partition("://")[0]
        raise StorageError(f"--storage {scheme}://… is not known; give a folder or s3://BUCKET/PREFIX.")
    try:
        path = Path(storage).expanduser()
        # This fails for names that are too long or hold a NUL byte.
        path.lstat()
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError, ValueError) as error:
        raise StorageError(
            f"--storage {storage[:200]!r} cannot be a folder ({error}); choose another."
        ) from error
    return path


def profile_for(
    options: Options, capacity: Sequence[Node], profiles: Profiles = catalog.PROFILES
) -> tuple[Profile, str]:
    """Return the profile and, with --profile auto, why it was chosen."""
    if options.profile != "auto":
        return profiles[options.profile], ""
    if placement.fits_gpus(profiles["paper"].models, capacity):
        return profiles["paper"], "profile paper: these GPUs hold its largest model"
    gpus = sum(node.gpus for node in capacity)
    return profiles["laptop"], f"profile laptop: {gpus} GPUs here do not hold the paper's models"


def select(options: Options, profile: Profile, name: str) -> Selection:
    """Return the profile's choices, overridden by the flags. Raises SpecError."""
    rows = axes.read_rows(options.trials)
    words = options.train_sets or axes.column(rows, "train-set")
    train_sets = tuple(selection.parse_dataset(text, "--train-sets") for text in words)
    eval_sets = tuple(selection.parse_dataset(text, "--eval-sets") for text in options.eval_sets)
    train_sets, eval_sets = train_sets or profile.train_sets, eval_sets or profile.eval_sets
    train_sets, eval_sets = read_as(train_sets, eval_sets, options, options.suites)
    suites = (suite_spec(*text.partition("=")[::2]) for text in options.suites)
    eval_sets += tuple(dataclasses.replace(suite, skip_bad_rows=options.skip_bad_rows) for suite in suites)

    words = options.models or axes.column(rows, "model")
    models = tuple(selection.parse_model(text) for text in words) or profile.models
    trust = Trust(allow_pickle=options.allow_pickle, trust_remote_code=options.trust_remote_code)
    template = given_template(options.template)
    lengths = ("max_prompt_tokens", "max_response_tokens")
    for name_of in ("max_trials", "checkpoint_steps", "max_train_pairs", "max_eval_pairs", *lengths):
        if (value := getattr(options, name_of)) is not None and value < 1:
            raise SpecError(f"--{name_of.replace('_', '-')} {value}: give at least 1.")
    if not 0 <= options.grace_s < math.inf:
        raise SpecError(f"--grace-s {options.grace_s}: give seconds.")
    # Refused if they are no numbers, also where --seeds chooses among the rows.
    of_rows = selection.row_seeds(rows)
    chosen = Selection(
        name=name,
        models=tuple(dataclasses.replace(model, trust=trust, template=template) for model in models),
        rewards=selection.parse_rewards(options.rewards or axes.column(rows, "reward") or profile.rewards),
        train_sets=train_sets,
        eval_sets=eval_sets,
        seeds=selection.unique("--seeds", options.seeds) or of_rows or profile.seeds,
        train_draw=DrawSpec(max_pairs=profile.max_train_pairs),
        eval_draw=DrawSpec(max_pairs=options.max_eval_pairs or profile.max_eval_pairs),
        recipe=profile.recipe,
        categories=selection.parse_categories(
            options.category, [spec.name for spec in train_sets], [spec.name for spec in eval_sets]
        ),
        only=selection.parse_only(options.only),
        max_trials=options.max_trials,
        placements=profile.placements,
        keep_epochs=selection.parse_keep_epochs(options.keep_epochs) or profile.keep_epochs,
    )
    return dataclasses.replace(chosen, axes=selection.chosen_axes(options, chosen, rows))
