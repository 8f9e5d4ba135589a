"""Preference pairs in other words, by a chat model on this machine: a token-level shift (paper §2) without an endpoint.

Chosen and rejected responses are rewritten independently, prompts are not. Each answer is checked, asked for again where it
is no rewriting, and journaled when it comes: the same command goes on from there.

python sweeps/rewrite.py                                     the tiny world by rule, in seconds
python sweeps/rewrite.py --data FILE --model ID|PATH --rewriting paraphrase french --sample 200
python sweeps/full_grid.py --train-sets FILE --eval-sets french=<storage>/sweeps/rewrite/report/<model>-french
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from orchestrator.cli.analyses import AnalysisOptions, main
from orchestrator.cli.follow_up import SUMMARY
from orchestrator.cli.options import Plan
from orchestrator.cli.session import Session, say_left_out
from orchestrator.spec import selection
from orchestrator.spec.analyses import AnalyseStage, AnalysisInputs
from orchestrator.spec.datasets import DatasetReader
from orchestrator.spec.models import identify_model
from orchestrator.spec.stages import BaseModel
from orchestrator.spec.trials import content_key
from orchestrator.store.artifacts import Attempt, Store
from trainers.data import rewritten
from trainers.data.choosing import Reading, chosen_spec
from trainers.data.hygiene import LANGUAGES
from trainers.data.named import SUBSET_SEED
from trainers.data.records import Pair, read_written_pairs
from trainers.data.rewriting import Terms
from trainers.data.rewritten import PARAPHRASE, Failure
from trainers.data.rules import rewritten_by_rules, rules_digest
from trainers.disk import alone
from trainers.errors import SpecError
from trainers.specs import Precision, clean_name

if TYPE_CHECKING:
    from trainers.data.local_rewriting import Writer

# Raise when the same model and words give other rewritings, or other answers are taken.
VERSION = 1
RULES = "rules:"
SAY_EVERY_S = 20.0


@dataclass(frozen=True, kw_only=True)
class RewriteOptions(AnalysisOptions):
    """The responses of a set, rewritten by a local chat model or by rule."""

    data: Annotated[str, tyro.conf.arg(metavar="NAME|PATH")] = "tiny_world"
    """A known name, a file, a folder or a hub id."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    split: str = "test"
    """Which split."""
    model: Annotated[str, tyro.conf.arg(metavar="[NAME=]ID|PATH|rules:NAME")] = f"{RULES}tiny_world"
    """A chat model: a catalog name, a hub id, a folder or a GGUF file; or rules: rules:english, rules:tiny_world."""
    precision: Precision | None = None
    """Of the model (default: the catalog's, else fp32)."""
    rewriting: Annotated[tuple[str, ...], tyro.conf.arg(metavar="paraphrase|LANGUAGE")] = (PARAPHRASE,)
    """paraphrase, or languages: french, spanish, german, …; one set of each."""
    prompt: Path | None = None
    """File with a prompt of one's own, {response} where the text goes."""
    language: str | None = None
    """Code that the language check expects, where --rewriting is none that is known."""
    sample: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Rewrite N pairs, drawn as in the paper and in the set's order."""
    sample_seed: int = SUBSET_SEED
    """Of that draw."""
    max_tokens: int = 512
    """Of an answer; one that reaches them is cut off."""
    attempts: int = 3
    """Answers that are asked for before a response is listed as failed."""
    temperature: float = 0.7
    """Of the draw of each token; 0 takes the likeliest, and needs --attempts 1."""
    seed: int = 0
    """Of the draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What the rewritten set depends on besides the model; `rules` is what the rules say where there is none."""

    dataset: str
    split: str
    rewriting: str
    sample: int | None
    sample_seed: int
    prompt: str = ""
    language: str | None = None
    max_tokens: int = 0
    attempts: int = 0
    temperature: float = 0.0
    seed: int = 0
    rules: str = ""
    rules_digest: str = ""


def declare(options: RewriteOptions, session: Session) -> Sequence[AnalyseStage]:
    """One stage per rewriting. Raises SpecError, ModelError, DataError."""
    if not options.rewriting or len(set(options.rewriting)) < len(options.rewriting):
        raise SpecError("--rewriting: give one or more, each once.")
    if options.sample is not None and options.sample < 1:
        raise SpecError(f"--sample {options.sample}: give at least 1.")
    ways = [_way(options, rewriting) for rewriting in options.rewriting]
    fetch = not isinstance(options.command, Plan)
    base = None if options.model.startswith(RULES) else _base(options, session, fetch=fetch)
    spec = chosen_spec(options.data, options.reading)
    split = {"train": spec.train_split, "test": spec.test_split}.get(options.split, options.split)
    reader = DatasetReader(session.store, fetch=fetch)
    rows = reader.split(spec, split)
    say_left_out(session, reader.said_left_out())
    if fetch:
        file = session.store.read("dataset", rows.digest) / "pairs.jsonl"
        rewritten.require_texts(read_written_pairs(file))
    return [
        AnalyseStage(
            analysis=clean_name(way["rewriting"]),
            version=VERSION,
            parameters=Parameters(
                dataset=rows.digest,
                split=clean_name(options.split),
                sample=options.sample,
                sample_seed=options.sample_seed,
                **way,
            ),
            base=base,
        )
        for way in ways
    ]


def _way(options: RewriteOptions, rewriting: str) -> dict[str, Any]:
    """How it is rewritten, as parameters. Raises SpecError."""
    if options.model.startswith(RULES):
        rules = options.model.removeprefix(RULES)
        if rewriting != PARAPHRASE:
            raise SpecError(f"--rewriting {rewriting}: rules paraphrase only; give a chat model as --model.")
        return {"rewriting": rewriting, "rules": rules, "rules_digest": rules_digest(rules)}
    from trainers.data.local_rewriting import Drawing, require_drawable

    way = {
        "rewriting": rewriting,
        "prompt": rewritten.prompt_for(rewriting, options.prompt, "--rewriting"),
        "language": options.language or LANGUAGES.get(rewriting),
        "max_tokens": options.max_tokens,
        "attempts": options.attempts,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    terms = Terms(
        prompt=str(way["prompt"]), model="", max_tokens=options.max_tokens, attempts=options.attempts
    )
    require_drawable(terms, Drawing(temperature=options.temperature, seed=options.seed))
    return way


def _base(options: RewriteOptions, session: Session, *, fetch: bool) -> BaseModel:
    spec = selection.parse_model(options.model)
    if options.precision is not None:
        spec = replace(spec, precision=options.precision)
    return identify_model(spec, session.store, lock=session.folder / "revisions.lock.json", fetch=fetch)


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """The rewritten pairs, what each is like, and what has no usable rewriting."""
    parameters: Parameters = stage.parameters
    folder = attempt.directory
    rows = read_written_pairs(inputs.store.read("dataset", parameters.dataset) / "pairs.jsonl")
    pairs = rewritten.sampled(rows, parameters.sample, parameters.sample_seed)
    texts = rewritten.responses_of(pairs)
    why: dict[str, str] = {}
    if inputs.base is None:
        answers = {text: rewritten_by_rules(text, parameters.rules) for text in texts}
    else:
        answers, why = _asked(texts, parameters, inputs, inputs.base)
    kept = rewritten.whole(pairs, answers)
    failed = rewritten.failures(pairs, answers, lambda text: why.get(text, "not asked"))
    means: dict[str, float] = {}
    if kept:
        file = folder / f"{parameters.split}.parquet"
        means = rewritten.write_rewritten(file, folder / "hygiene.jsonl", kept, answers.__getitem__)
    if failed:
        rewritten.write_lines(folder / "failures.jsonl", failed)
    results = {
        "name": stage.label,
        "pairs": len(pairs),
        "rewritten": len(kept),
        "holes": len(failed),
        **means,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    (folder / SUMMARY).write_text(_summary(stage, pairs, kept, failed, means))
    attempt.info.update(results=results)


def _asked(
    texts: Sequence[str], parameters: Parameters, inputs: AnalysisInputs, base: BaseModel
) -> tuple[dict[str, str], dict[str, str]]:
    """(rewriting of each text that has one, why each of the others has none)."""
    from trainers.data import hygiene
    from trainers.data.journal import Journal
    from trainers.data.local_rewriting import Drawing, rewrite_locally

    terms = Terms(
        prompt=parameters.prompt,
        model=content_key("writer", VERSION, model=base.key, precision=base.precision),
        max_tokens=parameters.max_tokens,
        attempts=parameters.attempts,
    )
    drawing = Drawing(temperature=parameters.temperature, seed=parameters.seed)

    def check(text: str, answer: str, cut: bool) -> str | None:
        return hygiene.fault(text, answer, wanted=parameters.language, cut=cut)

    file = _journal_file(inputs.store, terms, drawing)
    with alone(file), Journal(file) as journal:
        why = rewrite_locally(
            texts, terms, drawing, journal, lambda: _writer(inputs, base), check, _now_and_then(inputs.say)
        )
        answers = {text: found.text for text in texts if (found := journal.accepted(terms.key(text)))}
    return answers, {text: why[terms.key(text)] for text in texts if terms.key(text) in why}


def _journal_file(store: Store, terms: Terms, drawing: Any) -> Path:
    """Every answer of this model to these words; other rows and more attempts go on from it."""
    key = content_key(
        "rewriting", VERSION, model=terms.model, prompt=terms.prompt, tokens=terms.max_tokens, drawing=drawing
    )
    return store.local / "rewritings" / f"{key}.jsonl"


def _writer(inputs: AnalysisInputs, base: BaseModel) -> "Writer":
    from trainers.data.local_rewriting import Writer, turn_ends
    from trainers.generation import load_generator
    from trainers.templates import load_tokenizer

    tokenizer = load_tokenizer(inputs.location, base.revision, base.trust)
    model = load_generator(
        inputs.location, revision=base.revision, precision=base.precision, trust=base.trust
    )
    return Writer(model=model, tokenizer=tokenizer, ends=turn_ends(model, tokenizer))


def _now_and_then(say: Callable[[str], None]) -> Callable[[int, int], None]:
    last = time.monotonic()

    def said(done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SAY_EVERY_S:
            last = time.monotonic()
            say(f"{done} of {of} responses are settled")

    return said


def _summary(
    stage: AnalyseStage,
    pairs: Sequence[tuple[int, Pair]],
    kept: Sequence[tuple[int, Pair]],
    failed: Sequence[Failure],
    means: Mapping[str, float],
) -> str:
    parameters: Parameters = stage.parameters
    who = stage.base.name if stage.base else f"the rules {parameters.rules}"
    lines = [f"# {parameters.rewriting} by {who}", ""]
    lines += [
        f"{len(kept)} of {len(pairs)} pairs are rewritten"
        + (f": {rewritten.said_means(means)}." if means else "."),
        "",
    ]
    if kept:
        lines += [
            f"{parameters.split}.parquet is a data set: give it, or its folder, to --eval-sets or prepare.",
            "",
        ]
    if failed:
        lines += [
            f"{len(failed)} responses have no usable rewriting ({rewritten.said_failures(failed)}); all are in "
            "failures.jsonl, and their pairs are left out. More --attempts, or another --model, may rewrite them.",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(RewriteOptions, "rewrite", declare, compute, Path(__file__).parent)
