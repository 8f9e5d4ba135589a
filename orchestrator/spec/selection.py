"""Turns the words of a command line into the models, data sets and draws of a grid. Every fault is a SpecError."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from orchestrator.spec import catalog
from orchestrator.spec.axes import NO_AXES, Axes, Row, axes_of, column, parse_axes, rows_choice
from orchestrator.spec.trials import KeepEpochs, PlacementRule, Recipe, Sweep, TrialSpec, grid, only
from orchestrator.store.records import CATEGORIES, Category
from trainers.data.files import file_stem
from trainers.data.known import DATASETS, PERSONA
from trainers.data.sources import HUB_ID, split_off
from trainers.errors import SpecError, nearest
from trainers.evaluate.suites import SUITES
from trainers.rewards import PAPER_BETA, RewardSpec, reward_variants
from trainers.specs import DatasetSpec, DrawSpec, ModelSpec, clean_name, given_name

# What a grid is made of, by the names of the selection's fields.
_OF_GRID = (
    *("models", "rewards", "train_sets", "eval_sets", "seeds"),
    *("recipe", "train_draw", "eval_draw", "keep_epochs"),
)
_NAMED = re.compile(r"([^\W_][^\s=/\\:]*)=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The parts from which an experiment builds its sweep: the profile's choices, overridden by flags."""

    name: str
    models: tuple[ModelSpec, ...]
    rewards: tuple[RewardSpec, ...]
    train_sets: tuple[DatasetSpec, ...]
    eval_sets: tuple[DatasetSpec, ...]
    seeds: tuple[int, ...]
    train_draw: DrawSpec
    eval_draw: DrawSpec
    recipe: Recipe
    categories: tuple[tuple[str, str, Category], ...]
    only: tuple[tuple[str, str], ...]
    max_trials: int | None
    placements: tuple[PlacementRule, ...]
    keep_epochs: KeepEpochs = ()
    axes: Axes = NO_AXES

    def trials(
        self,
        *,
        axes: Mapping[str, Sequence[Any]] = MappingProxyType({}),
        **changes: Any,
    ) -> tuple[TrialSpec, ...]:
        """Return every model with every reward type on every training set at every seed, at every point of the axes.

        Flags override the experiment's own `axes`. `changes` replace fields of the selection.
        """
        chosen = {**{name: getattr(self, name) for name in _OF_GRID}, **changes}
        return grid(axes=axes_of(axes, self.axes), **chosen)

    def sweep(
        self, trials: Iterable[TrialSpec], categories: Iterable[tuple[str, str, Category]] = ()
    ) -> Sweep:
        """Return the sweep of the trials that --only and --max-trials leave; --category overrides `categories`.

        Raises SpecError for a flag's value that no trial uses.
        """
        trials = tuple(trials)
        self.axes.require_use(trials)
        given = {(train_set, eval_set) for train_set, eval_set, _ in self.categories}
        return Sweep(
            name=self.name,
            trials=only(trials, self.only)[: self.max_trials],
            categories=(*(item for item in categories if item[:2] not in given), *self.categories),
            placements=self.placements,
        )


def parse_model(text: str, flag: str = "--models") -> ModelSpec:
    """Read `[NAME=]ID|PATH`, where ID is a catalog name or a hub id."""
    name, source = _split_name(text)
    if source in catalog.MODELS:
        return dataclasses.replace(catalog.MODELS[source], name=name or source)
    path = _path_or_id(source, flag, "model", catalog.MODELS)
    if path is not None:
        stem = path.absolute().stem if path.is_file() else path.absolute().name
        return ModelSpec(name=name or clean_name(stem), source=str(path))
    return ModelSpec(name=name or clean_name(source.split("/")[-1].lower()), source=source)


def parse_gold(text: str) -> ModelSpec:
    """`[NAME=]ID|PATH` of a model with a reward head. A folder of another model is refused."""
    gold = parse_model(text, "--gold")
    config = Path(gold.source) / "config.json"
    if config.is_file() and "ForSequenceClassification" not in config.read_text():
        raise SpecError(
            f"--gold {text}: {config} is of no sequence classifier, so it gives an answer no reward; give the folder of an "
            "EX-RM, or the name of a trial of this sweep."
        )
    return gold


def parse_dataset(text: str, flag: str) -> DatasetSpec:
    """Read `[NAME=]NAME|PATH|ID[:SPLIT]`, or a mixture of training sets, `[NAME=]SET:SHARE+SET:SHARE`.

    A catalog NAME before a path keeps what the catalog declares of the set.
    """
    if re.search(r":[\d.]+\+|\+.*:[\d.]+$", text) and _found(text) is None:
        return _parse_mixture(text, flag)
    whole, split = split_off(text)
    if split:
        spec = parse_dataset(whole, flag)
        if flag.startswith("--train-set"):
            return dataclasses.replace(spec, train_split=split)
        return dataclasses.replace(spec, test_split=split)
    name, source = _split_name(text)
    given = name
    known = {spec.name: spec for spec in DATASETS}
    if source in known:
        return dataclasses.replace(known[source], name=name or source)
    path = _path_or_id(source, flag, "data set", known)
    if not name:
        name = clean_name(file_stem(path or Path(source)).lower())
    if path is not None and (given in SUITES or (name in known and known[name].selection == PERSONA)):
        return dataclasses.replace(known[name], source=str(path))
    rewriting_of = known[name].rewriting_of if name in known else None
    # A folder may have the name of a catalog set by chance.
    train_draw = known[name].train_draw if given in known else None
    return DatasetSpec(
        name=name,
        source=source if path is None else str(path),
        rewriting_of=rewriting_of,
        train_draw=train_draw,
    )


def _parse_mixture(text: str, flag: str) -> DatasetSpec:
    name, source = _split_name(text)
    found = [re.fullmatch(r"(.+):(\d*\.?\d+)", word) for word in source.split("+")]
    if not flag.startswith("--train-set"):
        raise SpecError(f"{flag} {text}: only sets that are trained on are mixed; name each set by itself.")
    mixture = tuple((parse_dataset(match[1], flag), float(match[2])) for match in found if match)
    shares, sets = [share for _, share in mixture], [(part.source, part.train_split) for part, _ in mixture]
    if None in found or len(set(sets)) < len(sets) or not all(shares) or not math.isclose(sum(shares), 1):
        raise SpecError(
            f"{flag} {text}: a mixture names each set once, with a share above 0, and its shares sum to 1, as in "
            f"a:0.7+b:0.3; these sum to {sum(shares):g}."
        )
    own = "_".join(f"{part.name}_{100 * share:g}" for part, share in mixture)
    return DatasetSpec(name=name or clean_name(own), source=source, mixture=mixture)


def _split_name(text: str) -> tuple[str, str]:
    if not text.strip():
        raise SpecError("an empty word names no model and no data set; is a shell variable unset?")
    match = _NAMED.fullmatch(text)
    if match is None or _found(text) is not None:
        return "", text
    return given_name("NAME", match[1]), match[2]


def _found(text: str) -> Path | None:
    """Find a file or folder; None where there is none."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _path_or_id(source: str, flag: str, what: str, known: Iterable[str]) -> Path | None:
    """Find the file or folder; None for a hub id. Raises SpecError if it is neither."""
    path = _found(source)
    like_path = source.startswith(("/", "./", "../", "~")) or source.count("/") > 1
    if path is None and (like_path or not HUB_ID.fullmatch(source)):
        raise SpecError(
            f"{flag} {source}: no such file or folder, and no known {what}; {nearest(source, known)}"
        )
    return path


def parse_rewards(kinds: Sequence[str]) -> tuple[RewardSpec, ...]:
    """Return reward types and variants such as `ex_rm_mean` by name, with the paper's β."""
    known = reward_variants(PAPER_BETA)
    for kind in kinds:
        if kind not in known:
            raise SpecError(f"--rewards {kind}: {nearest(kind, known)}")
    return tuple(spec for name, spec in known.items() if name in kinds)


def parse_categories(
    texts: Sequence[str], train_names: Iterable[str], eval_names: Iterable[str]
) -> tuple[tuple[str, str, Category], ...]:
    """Read `TRAIN/EVAL=VALUE`, where VALUE is a category with spaces or hyphens."""
    by_text: Mapping[str, Category] = {category.replace(" ", "-"): category for category in CATEGORIES}
    known = (("trains on", set(train_names)), ("evaluates on", set(eval_names)))
    parsed: dict[tuple[str, str], Category] = {}
    for text in texts:
        pair, _, value = text.rpartition("=")
        train, slash, evaluated = pair.partition("/")
        category = by_text.get(value.strip().replace(" ", "-"))
        if not slash or category is None or (train, evaluated) in parsed:
            raise SpecError(
                f"--category {text}: give each pair once, as TRAIN/EVAL=VALUE, VALUE one of {', '.join(by_text)}."
            )
        for name, (role, names) in zip((train, evaluated), known, strict=True):
            if name not in names:
                raise SpecError(
                    f"--category {text}: no set that this sweep {role} is {name}; {nearest(name, names)}"
                )
        parsed[train, evaluated] = category
    return tuple((train, evaluated, category) for (train, evaluated), category in parsed.items())


def parse_only(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    patterns = []
    for text in texts:
        key, equals, glob = text.partition("=")
        if not equals or not glob:
            raise SpecError(f"--only {text}: give KEY=GLOB, as in --only model=llama*.")
        patterns.append((key, glob))
    return tuple(patterns)


def parse_keep_epochs(texts: Sequence[str]) -> KeepEpochs:
    if list(texts) == ["every"]:
        return "every"
    if not all(text.isdecimal() and int(text) >= 1 for text in texts):
        raise SpecError(f"--keep-epochs {' '.join(texts)}: give epochs from 1, or the one word every.")
    return unique("--keep-epochs", [int(text) for text in texts])


def row_seeds(rows: Sequence[Row]) -> tuple[int, ...]:
    """Return the seeds of the rows of --trials. Raises SpecError."""
    words = column(rows, "seed")
    if wrong := [word for word in words if not word.isdecimal()]:
        raise SpecError(f"--trials: a seed of {wrong[0]!r}; give a whole number from 0.")
    return tuple(map(int, words))


def chosen_axes(options: Any, chosen: Selection, rows: Sequence[Row]) -> Axes:
    """Return the axes that the flags and the rows of --trials give a selection. Raises SpecError."""
    models, sets, rewards = (
        [spec.name for spec in specs] for specs in (chosen.models, chosen.train_sets, chosen.rewards)
    )
    # A row may have a flag's word, or the name that the flag gave.
    names: dict[str, Callable[[str], str]] = {
        "model": lambda word: word if word in models else parse_model(word).name,
        "train-set": lambda word: word if word in sets else parse_dataset(word, "--train-sets").name,
        "reward": str,
        "seed": lambda word: str(int(word)),
    }
    choice = rows_choice(options.trials, rows, names) if rows else None
    return parse_axes(options, models, rewards, choice)


def unique(what: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return the values. Raises SpecError where one stands twice."""
    if len(set(values)) != len(values):
        raise SpecError(f"{what} {' '.join(map(str, values))}: a value stands twice.")
    return tuple(values)
