"""The axes of a sweep: every field of a trial that can change its result, and the values that a command gives them.

The type of a field says how its values are read, and its spec validates them. A field that is added to one of these specs
becomes an axis. Models, reward types, sets and seeds have flags of their own.
"""

import csv
import itertools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from trainers.errors import SpecError, nearest
from trainers.rewards import PAPER_BETA, RewardSpec, reward_types, reward_variants
from trainers.specs import DrawSpec, LoraSpec, LossSpec, ModelSpec, Optimizer, OptimSpec, ValidationSpec

# A TrialSpec, which is defined by what is here.
Trial = Any

NONE = "none"
_ELSEWHERE = {"model": "--models", "reward": "--rewards", "train-set": "--train-sets", "seed": "--seeds"}
# Specs that a trial may lack, with the field that is then 0.
_SWITCHES = {"lora": "rank", "validation": "share"}
# These fields hold for training and evaluation alike.
_OF_BOTH_DRAWS = ("max_prompt_tokens", "max_response_tokens", "system", "reasoning")
# Unused where all pairs are taken.
_OF_A_DRAW = ("seed", "permutation")
# Optimisers that read a field; for any other it stays at its default, so that it tells no trials apart.
_ALL = get_args(Optimizer)
_READ_BY = {"betas": ("adamw",), "eps": ("adamw", "rmsprop"), "momentum": ("sgd", "rmsprop")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A field of the spec that TrialSpec has as `home`."""

    name: str
    home: str
    spec: type[Any]
    field: str

    @property
    def parameter(self) -> str:
        """Its name among a trial's parameters and the flags."""
        return "max_train_pairs" if self.name == "train-pairs" else self.name.replace("-", "_")

    @property
    def flag(self) -> str:
        """The flag that gives every trial one value."""
        return f"--{self.parameter.replace('_', '-')}"

    @property
    def default(self) -> Any:
        """The value that a trial has unless it is set."""
        if _SWITCHES.get(self.home) == self.field:
            return 0
        found = next(item for item in fields(self.spec) if item.name == self.field)
        return None if found.default is MISSING else found.default

    def applies(self, trial: Trial) -> bool:
        """Whether the trial has and reads this field."""
        return not self.unread(trial)

    def unread(self, trial: Trial) -> str:
        """Say why the trial does not have or read this field; "" where it does."""
        if self.home == "reward" and self.field not in trial.reward.type.options:
            having = (kind for kind, reward in reward_types().items() if self.field in reward.options)
            return f"it is an option of {', '.join(having)}"
        if self.home == "loss" and trial.reward.type.own_loss:
            return "the reward type has a loss of its own"
        if self.home == "train_draw" and self.field in _OF_A_DRAW and trial.train_draw.max_pairs is None:
            return "all pairs are taken; give --max-train-pairs"
        if self.home == "optim" and trial.optim.optimizer not in (by := _READ_BY.get(self.field, _ALL)):
            return f"it is read by --optimizer {' or '.join(by)}"
        switch = _SWITCHES.get(self.home, self.field)
        return (
            f"give --{self.home}-{switch}" if switch != self.field and not getattr(trial, self.home) else ""
        )

    def of(self, trial: Trial) -> Any:
        """Return the trial's value; None where the axis does not apply."""
        spec = getattr(trial, self.home)
        return (0 if spec is None else getattr(spec, self.field)) if self.applies(trial) else None

    def read(self, text: str) -> Any:
        """Return the value that a word stands for. Raises SpecError."""
        kind = typing.get_type_hints(self.spec)[self.field]
        try:
            value = _converted(kind, text)
        except ValueError:
            raise SpecError(f"{text!r} is no value of {self.name}; give {_wanted(kind)}.") from None
        if value or _SWITCHES.get(self.home) != self.field:
            # The spec's own validation.
            replace(self._sample(), **{self.field: value})
        return value

    def _sample(self) -> Any:
        if self.spec is RewardSpec:
            return next(s for s in reward_variants(PAPER_BETA).values() if self.field in s.type.options)
        needed: dict[type, dict[str, Any]] = {LoraSpec: {"rank": 1}, ModelSpec: {"name": "m", "source": "m"}}
        return self.spec(**needed.get(self.spec, {}))


def _every(
    home: str, spec: type[Any], prefix: str = "", but: Sequence[str] = (), **renamed: str
) -> list[Axis]:
    return [
        Axis(
            name=renamed.get(item.name, f"{prefix}{item.name.replace('_', '-')}"),
            home=home,
            spec=spec,
            field=item.name,
        )
        for item in fields(spec)
        if item.name not in but
    ]


AXES = {
    axis.name: axis
    for axis in (
        *_every("optim", OptimSpec),
        # --rewards chooses the others.
        *_every("reward", RewardSpec, but=("kind", "pooling", "reference")),
        *_every("loss", LossSpec, kind="loss"),
        *_every("lora", LoraSpec, "lora-"),
        Axis(name="precision", home="model", spec=ModelSpec, field="precision"),
        *_every("train_draw", DrawSpec, max_pairs="train-pairs", seed="draw-seed"),
        *_every("validation", ValidationSpec, "validation-"),
    )
}


def _bare(kind: Any) -> tuple[Any, bool]:
    """Return a type without its None, and whether it had one."""
    if get_origin(kind) in (Union, types.UnionType):
        (bare,) = (item for item in get_args(kind) if item is not type(None))
        return bare, True
    return kind, False


def _converted(kind: Any, text: str) -> Any:
    bare, optional = _bare(kind)
    if optional and text == NONE:
        return None
    if get_origin(bare) is tuple:
        words = [] if text == NONE else text.split("+")
        kinds = get_args(bare)
        kinds = kinds[:1] * len(words) if kinds[-1] is Ellipsis else kinds
        found = tuple(_converted(*item) for item in zip(kinds, words, strict=True))
        # A list of any length is a set: the order of its words makes no other training.
        return tuple(sorted(set(found))) if get_args(bare)[-1] is Ellipsis else found
    if get_origin(bare) is Literal:
        if text not in get_args(bare):
            raise ValueError(text)
        return text
    if bare is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else int("")
    return bare(text)


def _wanted(kind: Any) -> str:
    """Describe how a value of the type is written."""
    bare, optional = _bare(kind)
    more = f", or {NONE}" if optional else ""
    if get_origin(bare) is tuple:
        one, last = get_args(bare)
        return f"{_wanted(one)}; + joins several" + (f", {NONE} is none" if last is Ellipsis else "")
    if get_origin(bare) is Literal:
        return f"one of {', '.join(get_args(bare))}{more}"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(bare, "a word") + more


def plain(value: Any) -> Any:
    """Return a value as JSON and MLflow hold it."""
    return (shown(value) if value else None) if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """Write a value as the command line takes it."""
    if isinstance(value, tuple | list):
        return "+".join(map(shown, value)) or NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return NONE if value is None else str(value)


def in_a_name(axis: str, value: Any) -> str:
    """Return what a value adds to a reward type's name, `_lr=1e-05`: one word, since it names columns of tables."""
    return "_".join(f"_{axis}={shown(value)}".split())


def settled(trial: Trial, values: Mapping[str, Any]) -> Trial:
    """Return the trial with these values, by axis; values of fields that it lacks are ignored. Raises SpecError."""
    homes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        homes.setdefault(AXES[name].home, {})[AXES[name].field] = value
    changes: dict[str, Any] = {}
    if trial.reward.type.own_loss:
        homes.pop("loss", None)
    for home, given in homes.items():
        spec = getattr(trial, home)
        if home == "reward":
            given = {field: value for field, value in given.items() if field in spec.type.options}
        if home in _SWITCHES:
            kind: Any = {"lora": LoraSpec, "validation": ValidationSpec}[home]
            given = {**(asdict(spec) if spec else {}), **given}
            changes[home] = kind(**given) if given.get(_SWITCHES[home]) else None
        else:
            changes[home] = replace(spec, **given)
    if "optim" in changes:
        optim = changes["optim"]
        unread = {field: AXES[field].default for field, by in _READ_BY.items() if optim.optimizer not in by}
        changes["optim"] = replace(optim, **unread)
    if "train_draw" in changes:
        drawn, own = changes["train_draw"], trial.train_set.train_draw
        if "max_pairs" in homes["train_draw"] and own is not None and drawn.max_pairs != own.max_pairs:
            # With another number of pairs than its own, the set is drawn from in the usual way.
            drawn = replace(drawn, **{**_usual_draw(), **homes["train_draw"]})
        changes["train_draw"] = drawn if drawn.max_pairs else replace(drawn, **_usual_draw())
        shared = {field: value for field, value in homes["train_draw"].items() if field in _OF_BOTH_DRAWS}
        changes["eval_draw"] = replace(trial.eval_draw, **shared)
    return replace(trial, **changes)


def _usual_draw() -> dict[str, Any]:
    return {name: getattr(DrawSpec(), name) for name in _OF_A_DRAW}


def varied(
    trial: Trial, values: Mapping[str, Any], given: Mapping[str, Any] = types.MappingProxyType({})
) -> Trial:
    """Return the trial at this point of axes, which its name tells where it reads them; `given` values stay unnamed."""
    # Both at once, since the point decides which given values are read: --axis optimizer=adamw,sgd --momentum 0.9.
    made = settled(trial, {**given, **values})
    names = dict.fromkeys((*dict(trial.axes), *values))
    own = tuple((name, AXES[name].of(made)) for name in names if AXES[name].applies(made))
    return replace(made, axes=own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Values by axis, for the trials with these labels."""

    values: tuple[tuple[str, Any], ...]
    labels: tuple[tuple[str, str], ...] = ()

    def fits(self, trial: Trial) -> bool:
        """Whether the trial has its labels."""
        labels = {"model": trial.model.name, "reward": trial.reward.name, "train": trial.train_set.name}
        return all({**labels, "seed": str(trial.seed)}[key] == value for key, value in self.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Points of which each trial takes one; `said` are the user's words.

    Unless it `varies`, it is one value for all trials and stands in no name. A trial that fits none of the `rows` is left
    out of the sweep.
    """

    said: str
    points: tuple[Point, ...]
    varies: bool = True
    rows: bool = False

    @property
    def names(self) -> set[str]:
        """The axes that it sets."""
        return {name for point in self.points for name, _ in point.values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """All choices of a command: a grid is multiplied by them."""

    choices: tuple[Choice, ...] = ()

    def of(self, trial: Trial) -> list[Trial]:
        """Return a grid's trial at every point.

        Points that differ only in values that the trial does not read are one trial. Raises SpecError where two choices
        set one axis.
        """
        fitting = {choice: [point for point in choice.points if point.fits(trial)] for choice in self.choices}
        if any(choice.rows and not points for choice, points in fitting.items()):
            return []
        fitting = {choice: points for choice, points in fitting.items() if points}
        for one, other in itertools.combinations(fitting, 2):
            if both := sorted(one.names & other.names):
                raise SpecError(
                    f"{one.said} and {other.said} both set {both[0]} of {trial.name}; give all its values at once, or "
                    f"separately for each reward type or model, as in --axis {trial.reward.name}.{both[0]}=…"
                )
        fixed = {
            name: value
            for choice, points in fitting.items()
            if not choice.varies
            for name, value in points[0].values
        }
        varying = [points for choice, points in fitting.items() if choice.varies]
        made = [
            varied(trial, {name: value for point in points for name, value in point.values}, fixed)
            for points in itertools.product(*varying)
        ]
        return list(dict.fromkeys(made))

    def require_use(self, trials: Sequence[Trial]) -> None:
        """Refuse a value that no trial reads. Raises SpecError."""
        for choice in self.choices:
            for point in choice.points:
                meant = [trial for trial in trials if point.fits(trial)]
                where = " ".join(f"{key}={value}" for key, value in point.labels)
                of = f" with {where}" if where else ""
                if not meant:
                    raise SpecError(f"{choice.said}: the sweep has no trial{of}.")
                for name, _ in point.values:
                    axis = AXES[name]
                    if not any(map(axis.applies, meant)):
                        raise SpecError(
                            f"{choice.said}: no trial{of} would use {name}; {axis.unread(meant[0])}."
                        )


NO_AXES = Axes()


def parse_axes(
    options: Any, models: Iterable[str] = (), rewards: Iterable[str] = (), rows: Choice | None = None
) -> Axes:
    """Return the choices of --axis, --zip, --trials (as `rows`) and the flags for single values.

    `models` and `rewards` are the names that may stand before an axis. Raises SpecError.
    """
    labels = {**dict.fromkeys(models, "model"), **dict.fromkeys(rewards, "reward")}
    singles = []
    for axis in AXES.values():
        value = getattr(options, axis.parameter, None)
        if value not in (None, ()):
            said = f"{axis.flag} {shown(value)}"
            values = ((axis.name, axis.read(shown(value))),)
            singles.append(Choice(said=said, points=(Point(values=values),), varies=False))
    choices = [_choice("--axis", [text], labels) for text in options.axis]
    if len(options.zip) == 1:
        raise SpecError(f"--zip {options.zip[0]}: give two axes or more; of one, --axis {options.zip[0]}.")
    zipped = [_choice("--zip", options.zip, labels)] if options.zip else []
    return Axes(choices=(*singles, *([rows] if rows else []), *choices, *zipped))


def axes_of(values: Mapping[str, Sequence[Any]], given: Axes = NO_AXES) -> Axes:
    """Return an experiment's own axes and those `given` on the command line, which override them.

    An axis of one value stands in no name.
    """
    said = {name for choice in given.choices for name in choice.names}
    own = [
        replace(_choice("--axis", [f"{name}={','.join(map(shown, items))}"], {}), varies=len(items) > 1)
        for name, items in values.items()
        if name not in said
    ]
    return Axes(choices=(*given.choices, *own))


def _choice(flag: str, texts: Sequence[str], labels: Mapping[str, str]) -> Choice:
    columns: dict[str, list[Any]] = {}
    scopes: set[str] = set()
    for text in texts:
        head, equals, tail = text.partition("=")
        scope, _, name = head.rpartition(".")
        if not equals:
            raise SpecError(f"{flag} {text}: give NAME=VALUE,VALUE, as in {flag} lr=1e-6,1e-5.")
        name = name.replace("_", "-")
        if name in _ELSEWHERE:
            raise SpecError(f"{flag} {text}: give the values by {_ELSEWHERE[name]}.")
        if name not in AXES:
            raise SpecError(f"{flag} {text}: no axis is called {name!r}; {nearest(name, AXES)}")
        axis = AXES[name]
        if scope and scope not in labels:
            raise SpecError(
                f"{flag} {text}: no model and no reward type of this sweep is {scope}; {nearest(scope, labels)}"
            )
        words = [word.strip() for word in tail.split(",")]
        if not all(words):
            raise SpecError(f"{flag} {text}: a value is empty; give {head}=VALUE,VALUE.")
        found = [_read(axis, word, f"{flag} {text}") for word in words]
        if flag == "--axis" and len(set(found)) < len(found):
            raise SpecError(f"{flag} {text}: a value stands twice.")
        if axis.name in columns:
            raise SpecError(f"{flag} {text}: {axis.name} is given twice.")
        columns[axis.name] = found
        scopes.add(scope)
    counts = {name: len(found) for name, found in columns.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise SpecError(f"{flag} {' '.join(texts)}: {said}; give as many values of each.")
    if len(scopes) > 1:
        raise SpecError(f"{flag} {' '.join(texts)}: give all axes for one model or reward type, or for all.")
    (scope,) = scopes
    points = tuple(
        Point(values=tuple(zip(columns, row, strict=True)), labels=((labels[scope], scope),) if scope else ())
        for row in zip(*columns.values(), strict=True)
    )
    return Choice(said=f"{flag} {' '.join(texts)}", points=points)


def _read(axis: Axis, word: str, where: str) -> Any:
    try:
        return axis.read(word)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


Row = dict[str, str]


def read_rows(file: str | None) -> list[Row]:
    """Return the rows of a --trials file, .csv or .yaml, as words by column. Raises SpecError."""
    if file is None:
        return []
    import yaml  # type: ignore[import-untyped]

    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--trials {file}: it cannot be read ({error}).") from error
    if path.suffix not in (".csv", ".yaml", ".yml"):
        raise SpecError(f"--trials {file}: give a .csv file, or .yaml with a list of trials.")
    try:
        loaded: Any = (
            list(csv.DictReader(text.splitlines())) if path.suffix == ".csv" else yaml.safe_load(text)
        )
    except yaml.YAMLError as error:
        raise SpecError(f"--trials {file}: it is no YAML: {error}") from error
    if not isinstance(loaded, list) or not loaded or not all(isinstance(row, dict) for row in loaded):
        raise SpecError(f"--trials {file}: give one trial a row, such as model, reward, train_set, seed, lr.")
    rows: list[Row] = []
    for number, row in enumerate(loaded, 1):
        if path.suffix == ".csv" and None in (*row, *row.values()):
            raise SpecError(f"--trials {file}, row {number}: it has not as many cells as the first line.")
        words = {str(key).strip().replace("_", "-"): shown(value).strip() for key, value in row.items()}
        words = {key: word for key, word in words.items() if word}
        for key in words.keys() - _ELSEWHERE.keys():
            if key not in AXES:
                raise SpecError(
                    f"--trials {file}, row {number}: no column {key!r}; {nearest(key, [*_ELSEWHERE, *AXES])}"
                )
        if words in rows:
            raise SpecError(f"--trials {file}, row {number}: row {rows.index(words) + 1} is the same.")
        rows.append(words)
    return rows


def column(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    """Return the values of a column, each once."""
    return tuple(dict.fromkeys(row[name] for row in rows if name in row))


def seeds(rows: Sequence[Row]) -> tuple[int, ...]:
    """Return the seeds of the rows. Raises SpecError."""
    words = column(rows, "seed")
    if wrong := [word for word in words if not word.isdecimal()]:
        raise SpecError(f"--trials: a seed of {wrong[0]!r}; give a whole number from 0.")
    return tuple(map(int, words))


def rows_choice(file: str, rows: Sequence[Row], names: Mapping[str, Mapping[str, str]]) -> Choice:
    """Return the rows as points; `names` are those of models, reward types and sets, by column and word."""
    points = []
    for number, row in enumerate(rows, 1):
        labels = []
        for key, known in names.items():
            if key in row:
                if row[key] not in known:
                    raise SpecError(
                        f"--trials {file}, row {number}: {_ELSEWHERE[key]} names no {row[key]}; "
                        f"{nearest(row[key], known)}"
                    )
                labels.append((key.removesuffix("-set"), known[row[key]]))
        where = f"--trials {file}, row {number}"
        values = tuple((key, _read(AXES[key], word, where)) for key, word in row.items() if key in AXES)
        points.append(Point(values=values, labels=tuple(labels)))
    return Choice(said=f"--trials {file}", points=tuple(points), rows=True)
