"""Who models and data sets are, which shift is which, and that every fault is said at once."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from orchestrator.spec.datasets import DatasetReader, pairs_of
from orchestrator.spec.declaration import declare
from orchestrator.spec.models import ending_tokens, identify_model
from orchestrator.spec.resolve import ResolvedSweep, resolve
from orchestrator.spec.trials import PlacementRule
from orchestrator.store.artifacts import Store
from orchestrator.store.gc import garbage, remove
from tests.loopback import Loopback, Quiet, ask_at
from tests.model_files import write_gguf, write_model
from tests.orchestrator.sweep_samples import (
    HAMILTONIAN,
    LLAMA,
    PARAPHRASE,
    TINY_WORLD,
    dataset_folder,
    rows,
    sweep,
    write_jsonl,
)
from trainers.data.sources import read_pairs
from trainers.errors import DataError, ModelError, SpecError, StorageError
from trainers.pairs.tokens import draw_order
from trainers.specs import DatasetSpec, DrawSpec, LoraSpec, ModelSpec, Trust

HUB_MODEL = ModelSpec(name="acme", source="acme/tiny-model")
REVISION = "0123456789abcdef0123456789abcdef01234567"


def category(resolved: ResolvedSweep, evaluated: DatasetSpec) -> str:
    ((train, _),) = [pair for pair in resolved.categories if pair[1] == evaluated.name]
    return resolved.categories[train, evaluated.name]


def test_layers_that_a_model_has_not_are_refused_before_it_is_loaded(store: Store, tmp_path: Path):
    numbers = dict.fromkeys(("num_hidden_layers", "intermediate_size", "num_attention_heads"), 1)
    neox = write_model(tmp_path / "neox", model_type="gpt_neox", **numbers)
    whole = sweep([TINY_WORLD], [TINY_WORLD], models=[LLAMA, ModelSpec(name="neox", source=str(neox))])
    lora = LoraSpec(rank=1, targets=("q_proj", "v_proj"))
    adapted = replace(whole, trials=tuple(replace(item, lora=lora) for item in whole.trials))
    with pytest.raises(
        ModelError, match=r"neox: .* no linear layers called q_proj, v_proj; .* query_key_value"
    ):
        resolve(adapted, store)
    resolve(replace(adapted, trials=adapted.trials[:1]), store)


@pytest.mark.parametrize(
    ("trained", "evaluated", "expected"),
    [
        (TINY_WORLD, TINY_WORLD, "in-distribution"),
        (TINY_WORLD, replace(TINY_WORLD, name="mine"), "in-distribution"),
        (TINY_WORLD, PARAPHRASE, "token-level shift"),
        (HAMILTONIAN, PARAPHRASE, "domain shift"),
        (TINY_WORLD, HAMILTONIAN, "domain shift"),
    ],
    ids=lambda item: getattr(item, "name", item),
)
def test_a_set_has_its_category_by_what_it_is_made_of(
    store: Store, trained: DatasetSpec, evaluated: DatasetSpec, expected: str
):
    assert category(resolve(sweep([trained], [evaluated]), store), evaluated) == expected


def test_a_mixture_has_the_shares_of_its_sets_and_the_nearest_of_their_categories(
    store: Store, tmp_path: Path
):
    mine = dataset_folder(tmp_path / "data", train=rows(9, "mine"), test=rows(3, "test"))
    other = dataset_folder(tmp_path / "other", train=rows(40, "other"))
    mixture = DatasetSpec(name="mix", source="mine:0.3+other:0.7", mixture=((mine, 0.3), (other, 0.7)))
    resolved = resolve(sweep([mixture], [mine, HAMILTONIAN]), store)
    split = resolved.plans[0].train.prepared.split
    prompts = [pair.prompt[0].content for pair in pairs_of(store, split.digest)]
    assert [sum(name in prompt for prompt in prompts) for name in ("mine", "other")] == [9, 21]
    assert resolved.categories == {
        ("mix", mine.name): "in-distribution",
        ("mix", "hamiltonian"): "domain shift",
    }
    shares = replace(mixture, mixture=((mine, 0.5), (other, 0.5)))
    assert resolve(sweep([shares], [mine]), store).plans[0].train.key != resolved.plans[0].train.key
    little = replace(mixture, mixture=((mine, 0.99), (other, 0.01)))
    with pytest.raises(DataError, match="9 pairs has none of a set"):
        resolve(sweep([little], [mine]), store)
    copied = dataset_folder(tmp_path / "copied", train=rows(9, "mine"))
    with pytest.raises(DataError, match="data, copied hold the same rows; name each set once"):
        resolve(sweep([replace(mixture, mixture=((mine, 0.5), (copied, 0.5)))], [other]), store)
    trained_on = replace(other, name="seen", test_split="train")
    with pytest.raises(SpecError, match="seen holds the very rows that mix trains on"):
        resolve(sweep([mixture], [trained_on]), store)
    both = replace(sweep([other, mixture], [trained_on]), categories=(("mix", "seen", "training pairs"),))
    with pytest.raises(SpecError, match=f"seen holds the very rows that {other.name} trains on"):
        resolve(both, store)
    # gc keeps the sets that are mixed, so that the hub is not asked for them again.
    parts = [DatasetReader(store).split(part, "train").digest for part in (mine, other)]
    assert {f"dataset/{digest}" for digest in parts} <= {*declare(resolved).artifacts}
    hub = replace(mixture, mixture=((mine, 0.3), (DatasetSpec(name="far", source="acme/far"), 0.7)))
    unknown = resolve(sweep([hub], [mine]), store, fetch=False).plans[0].train.prepared.split
    assert unknown.digest.startswith("not fetched")
    # A set with its own draw gives the pairs of that draw.
    draw = DrawSpec(max_pairs=6, seed=875, permutation="torch")
    drawn = replace(mixture, mixture=((replace(mine, train_draw=draw), 0.5), (other, 0.5)))
    split = resolve(sweep([drawn], [mine]), store).plans[0].train.prepared.split
    alone = [pair.chosen for pair in read_pairs(mine, "train")]
    mixed = [pair.chosen for pair in pairs_of(store, split.digest)]
    assert (len(mixed), mixed[:6]) == (12, [alone[row] for row in sorted(draw_order(9, draw)[:6])])


def test_one_source_spelt_in_two_ways_is_in_distribution_and_other_rows_of_it_are_not(
    store: Store, tmp_path: Path
):
    both = [*rows(3, "math", kind="math"), *rows(3, "code", kind="code")]
    folder = dataset_folder(tmp_path / "data", train=both, test=rows(4, "new", kind="code"))
    spelt = replace(folder, name="again", source=str(tmp_path / "data" / ".." / "data"))
    maths = replace(folder, name="maths", keep=(("kind", "math*"),))
    code = replace(folder, name="code", keep=(("kind", "code*"),))
    assert category(resolve(sweep([folder], [spelt]), store), spelt) == "in-distribution"
    resolved = resolve(sweep([maths], [code]), store)
    assert category(resolved, code) == "domain shift"
    assert resolved.plans[0].train.prepared.split.rows == 3


@pytest.mark.parametrize(
    ("original", "expected"),
    [("train good", "token-level shift"), ("test good", "token-level shift"), ("foreign", "domain shift")],
)
def test_a_set_whose_rows_carry_the_training_sets_responses_is_a_token_level_shift(
    store: Store, tmp_path: Path, original: str, expected: str
):
    trained = dataset_folder(tmp_path / "data", train=rows(4, "train"), test=rows(4, "test"))
    rewritten = rows(4, "rewritten", orig_chosen=f"{original} answer")
    evaluated = dataset_folder(tmp_path / "rewritten", test=rewritten)
    assert category(resolve(sweep([trained], [evaluated]), store), evaluated) == expected


def test_a_bad_row_among_the_originals_is_refused_and_makes_no_domain_shift(store: Store, tmp_path: Path):
    trained = dataset_folder(tmp_path / "data", train=rows(4, "train"), test=rows(4, "test"))
    evaluated = dataset_folder(
        tmp_path / "rewritten", test=rows(4, "rewritten", orig_chosen="test good answer")
    )
    (file,) = (tmp_path / "data").glob("test.*")
    file.write_text(file.read_text() + "{broken\n")
    with pytest.raises(DataError, match=r"test\.jsonl"):
        resolve(sweep([trained], [evaluated]), store)


def test_a_category_can_be_overridden_for_one_pair_alone(store: Store):
    overridden = (("tiny_world", "tiny_world_paraphrase", "domain shift"),)
    found = resolve(sweep([TINY_WORLD], [PARAPHRASE, TINY_WORLD], categories=overridden), store).categories
    assert found["tiny_world", "tiny_world_paraphrase"] == "domain shift"
    assert found["tiny_world", "tiny_world"] == "in-distribution"


def test_evaluating_on_the_training_rows_is_refused_unless_allowed(store: Store, tmp_path: Path):
    file = write_jsonl(tmp_path / "rows.jsonl", rows(4, "same"))
    same = DatasetSpec(name="rows", source=str(file))
    with pytest.raises(SpecError, match=r"rows.*--category rows/rows=training-pairs"):
        resolve(sweep([same], [same]), store)
    declared = sweep([same], [same], categories=(("rows", "rows", "training pairs"),))
    assert category(resolve(declared, store), same) == "training pairs"


def keys(source: Path, store: Store) -> tuple[str, str]:
    """Digest of the training split, and the key of its prepared pairs."""
    data = DatasetSpec(name="data", source=str(source))
    stage = resolve(sweep([data], [TINY_WORLD]), store).plans[0].train.prepared
    return stage.split.digest, stage.key


def test_a_data_sets_key_is_its_rows_not_its_file_format_or_layout(store: Store, tmp_path: Path):
    lines = rows(11, "é")
    table = pa.Table.from_pylist(lines)
    folders = [
        tmp_path / name for name in ("jsonl", "whole", "groups", "shards", "file.parquet", "reordered")
    ]
    for folder in folders:
        (folder if folder.suffix == "" else folder.parent).mkdir(exist_ok=True)
    jsonl, whole, groups, shards, file, reordered = folders
    write_jsonl(jsonl / "train.jsonl", lines)
    parquet.write_table(table, whole / "train.parquet")
    parquet.write_table(table, groups / "train.parquet", row_group_size=2, compression="zstd")
    parquet.write_table(table.slice(0, 5), shards / "train-00000-of-00002.parquet")
    parquet.write_table(table.slice(5), shards / "train-00001-of-00002.parquet")
    parquet.write_table(table, file)
    parquet.write_table(table.select(["rejected", "prompt", "chosen"]), reordered / "train.parquet")
    assert len({keys(folder, store) for folder in folders}) == 1


@pytest.mark.parametrize("change", [{"prompt": "x"}, {"chosen": "x"}, {"rejected": "x"}, None], ids=str)
def test_a_data_sets_key_changes_with_any_text_in_it_and_their_order(
    store: Store, tmp_path: Path, change: dict[str, str] | None
):
    lines = rows(3, "text")
    other = [*lines[:2], {**lines[2], **change}] if change else lines[::-1]
    before, after = (
        keys(write_jsonl(tmp_path / f"{name}.jsonl", made), store)
        for name, made in (("a", lines), ("b", other))
    )
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_the_placement_is_in_no_key(store: Store):
    plain = sweep([TINY_WORLD], [HAMILTONIAN])
    gang = replace(plain, placements=(PlacementRule(match=(), world_size=2, zero_stage=3),))
    assert resolve(plain, store).plans == resolve(gang, store).plans


def test_all_faults_of_data_sets_or_models_are_in_one_message(store: Store, tmp_path: Path):
    good = dataset_folder(tmp_path / "good", train=rows(3, "good"), test=rows(3, "fine"))
    no_split = dataset_folder(tmp_path / "no_split", test=rows(3, "x"))
    no_column = dataset_folder(tmp_path / "no_column", train=[{"prompt": "x", "chosen": "y"}])
    nowhere = DatasetSpec(name="nowhere", source="manual:somewhere.org")
    with pytest.raises(DataError) as raised:
        resolve(sweep([good, no_split, no_column, nowhere], [good, no_column]), store)
    found = ("no train split", "no column 'rejected'", "no file or folder manual:somewhere.org")
    assert all(said in str(raised.value) for said in (*found, "no test split"))
    assert len(str(raised.value).splitlines()) == 4
    (tmp_path / "notes.txt").write_text("x")
    models = [ModelSpec(name=name, source=str(tmp_path / name)) for name in ("good", "notes.txt", "gone")]
    with pytest.raises(ModelError) as wrong:
        resolve(sweep([TINY_WORLD], [TINY_WORLD], models=models), store)
    assert all(said in str(wrong.value) for said in ("config.json", "notes.txt", "gone"))


def test_two_sets_under_one_name_are_refused(store: Store, tmp_path: Path):
    one = dataset_folder(tmp_path / "a" / "data", train=rows(3, "a"), test=rows(3, "b"))
    two = dataset_folder(tmp_path / "b" / "data", train=rows(3, "c"), test=rows(3, "d"))
    for asked in (sweep([TINY_WORLD], [one, two]), sweep([one], [two])):
        with pytest.raises(SpecError, match="two data sets of one name: data"):
            resolve(asked, store)


def folder_model(folder: Path, **changes: Any) -> ModelSpec:
    write_model(folder, **changes)
    (folder / "README.md").write_text(folder.name)
    return ModelSpec(name=folder.name, source=str(folder))


@pytest.mark.parametrize(
    ("change", "same_model", "same_tokenizer"),
    [
        ({}, True, True),
        ({"seed": 1}, False, True),
        ({"rms_norm_eps": 1e-5}, False, True),
        ({"tokenizer": "u"}, True, False),
    ],
    ids=str,
)
def test_a_local_model_is_its_files_wherever_they_lie(
    tmp_path: Path, change: dict[str, Any], same_model: bool, same_tokenizer: bool
):
    one, two = (
        identify_model(folder_model(tmp_path / name, **more)) for name, more in (("one", {}), ("two", change))
    )
    assert (one.key == two.key, one.tokenizer_key == two.tokenizer_key) == (same_model, same_tokenizer)


def test_code_is_part_of_the_keys_only_where_it_may_run(tmp_path: Path):
    spec = folder_model(tmp_path / "one")
    trusted = replace(spec, trust=Trust(allow_pickle=True, trust_remote_code=True))
    plain = identify_model(spec)
    assert identify_model(trusted).key == plain.key
    (tmp_path / "one" / "parts").mkdir()
    code = tmp_path / "one" / "parts" / "layer.py"
    keys = [plain.key, plain.tokenizer_key]
    for text in ("", "x = 1"):
        code.write_text(text)
        base = identify_model(trusted)
        keys += [base.key, base.tokenizer_key]
        assert identify_model(spec).key == plain.key
    assert len(set(keys)) == 6


def test_a_pickle_is_a_model_only_where_it_is_allowed_and_then_part_of_its_key(store: Store, tmp_path: Path):
    spec = folder_model(tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").unlink()
    (tmp_path / "one" / "pytorch_model.bin").write_bytes(b"1")
    with pytest.raises(ModelError, match="--allow-pickle"):
        identify_model(spec)
    allowed = replace(spec, trust=Trust(allow_pickle=True))
    before = identify_model(allowed).key
    (tmp_path / "one" / "pytorch_model.bin").write_bytes(b"2")
    assert identify_model(allowed).key != before


def test_code_of_its_own_is_refused_and_that_of_another_repository_even_if_trusted(
    store: Store, tmp_path: Path
):
    own = folder_model(tmp_path / "own", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    with pytest.raises(ModelError, match="--trust-remote-code"):
        identify_model(own)
    trusted = Trust(trust_remote_code=True)
    assert identify_model(replace(own, trust=trusted)).key
    foreign = folder_model(tmp_path / "foreign", auto_map={"AutoConfig": "acme/code--mine.Config"})
    with pytest.raises(ModelError, match="another repository"):
        identify_model(replace(foreign, trust=trusted))


def test_a_folder_with_several_gguf_files_asks_for_one(store: Store, tmp_path: Path):
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).write_text(name)
    with pytest.raises(ModelError, match=r"q4\.gguf, q8\.gguf"):
        identify_model(ModelSpec(name="m", source=str(tmp_path)))


def test_a_gguf_model_is_its_file_and_its_folder_alike(store: Store, tmp_path: Path):
    write_gguf(tmp_path / "q4.gguf")
    file = identify_model(ModelSpec(name="m", source=str(tmp_path / "q4.gguf")))
    folder = identify_model(ModelSpec(name="m", source=str(tmp_path)))
    assert file == folder
    assert file.origin.kind == "convert"


class Hub(Loopback):
    """A hub on loopback: answers for one model, notes which models it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(Quiet):
            def do_GET(self) -> None:
                if not self.path.startswith("/api/models/"):
                    # huggingface_hub also asks who is calling it; that is its own affair.
                    self.send_error(404)
                    return
                asked.append(self.path)
                known = self.path.split("?")[0] == f"/api/models/{HUB_MODEL.source}"
                body = json.dumps(
                    {"id": HUB_MODEL.source, "sha": REVISION, "siblings": [], "tags": []}
                    if known
                    else {"error": "Repository not found"}
                ).encode()
                self.send_response(200 if known else 404)
                if not known:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        super().__init__(Handler)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()
    ask_at(served.url, monkeypatch)
    yield served
    served.close()


def test_an_unknown_revision_is_asked_of_the_hub_once_and_locked(store: Store, tmp_path: Path, hub: Hub):
    lock = tmp_path / "sweeps" / "revisions.lock.json"
    assert not identify_model(HUB_MODEL, lock=lock, fetch=False).fetched
    assert identify_model(replace(HUB_MODEL, revision="given"), lock=lock).revision == "given"
    assert hub.asked == []
    lock.parent.mkdir()
    lock.write_text(json.dumps({"other/model": "f" * 40}))
    first = resolve(sweep([TINY_WORLD], [TINY_WORLD], models=[HUB_MODEL]), store, lock=lock)
    assert first.plans[0].train.base.revision == REVISION
    assert json.loads(lock.read_text()) == {"other/model": "f" * 40, HUB_MODEL.source: REVISION}
    second = resolve(sweep([TINY_WORLD], [TINY_WORLD], models=[HUB_MODEL]), store, lock=lock, fetch=False)
    assert second.plans == first.plans
    assert len(hub.asked) == 1


def test_a_hub_that_does_not_know_a_model_or_does_not_answer_is_a_model_error(
    store: Store, tmp_path: Path, hub: Hub
):
    lock = tmp_path / "lock.json"
    with pytest.raises(ModelError, match="acme/unknown"):
        identify_model(ModelSpec(name="mine", source="acme/unknown"), lock=lock)
    hub.close()
    models = [HUB_MODEL, ModelSpec(name="second", source="acme/second")]
    with pytest.raises(ModelError) as raised:
        resolve(sweep([TINY_WORLD], [TINY_WORLD], models=models), store, lock=lock)
    assert all(word in str(raised.value) for model in models for word in (model.name, model.source))
    assert not lock.exists()


@pytest.mark.parametrize("text", ["", "{", "[]"], ids=["empty", "open", "list"])
def test_a_broken_lock_file_is_an_error_that_names_it(store: Store, tmp_path: Path, hub: Hub, text: str):
    lock = tmp_path / "lock.json"
    lock.write_text(text)
    with pytest.raises(ModelError, match=r"lock\.json"):
        identify_model(HUB_MODEL, lock=lock)


def test_rows_are_in_the_store_after_resolving_and_not_after_planning(store: Store, tmp_path: Path):
    plain = sweep([TINY_WORLD], [HAMILTONIAN])
    planned = resolve(plain, store, fetch=False)
    assert not store.root.exists()
    resolved = resolve(plain, store)
    assert resolved.plans == planned.plans
    for stage in (resolved.plans[0].train.prepared, resolved.plans[0].evaluations[0].prepared):
        assert store.manifest("dataset", stage.split.digest)["info"]["rows"] == stage.split.rows


def test_a_hub_data_set_is_remembered_and_asked_for_again_where_gc_has_removed_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """The one stand-in: the hub's answer, as rows with what they rewrite."""
    from trainers.data import sources
    from trainers.data.files import Located

    asked: list[str] = []
    answers = {
        "acme/prefs": [Located("hub", i, row) for i, row in enumerate(rows(4, "plain"))],
        "acme/rewritten": [
            Located("hub", i, row) for i, row in enumerate(rows(4, "new", orig_chosen="plain good answer"))
        ],
    }
    monkeypatch.setattr(
        sources, "_hub_rows", lambda spec, split: asked.append(spec.source) or iter(answers[spec.source])
    )
    monkeypatch.setattr(sources, "resolved_revision", lambda spec: "c0ffee")
    trained = DatasetSpec(name="prefs", source="acme/prefs")
    evaluated = DatasetSpec(name="rewritten", source="acme/rewritten")
    first = resolve(sweep([trained], [evaluated]), store)
    remove(store, garbage(store, frozenset()))
    again = resolve(sweep([trained], [evaluated]), store, fetch=False)
    assert sorted(asked) == ["acme/prefs", "acme/rewritten"]
    assert again.plans == first.plans
    assert again.categories == first.categories == {("prefs", "rewritten"): "token-level shift"}
    assert resolve(sweep([trained], [evaluated]), store).plans == first.plans
    split = first.plans[0].train.prepared.split
    assert (store.read("dataset", split.digest) / "pairs.jsonl").is_file()
    assert len(asked) == 4
    records = [json.loads(file.read_text()) for file in (store.root / "sources").iterdir()]
    (record,) = [record for record in records if record["source"] == "acme/prefs"]
    assert (record["revision"], record["rows"], record["digest"]) == ("c0ffee", 4, split.digest)
    for file in (store.root / "sources").iterdir():
        file.write_text("{}")
    with pytest.raises(StorageError, match="delete it to fetch the data set again"):
        resolve(sweep([trained], [evaluated]), store, fetch=False)
    # Another filter is another source.
    filtered = replace(trained, keep=(("subset", "a"),))
    assert not DatasetReader(store, fetch=False).split(filtered, "train").fetched


@pytest.mark.parametrize(("said", "ends"), [(None, None), ("{}", None), ('{"eos_token_id": [3, 2]}', (2, 3))])
def test_a_policy_in_a_folder_must_say_what_ends_an_answer(tmp_path: Path, said: str | None, ends: Any):
    base = identify_model(folder_model(tmp_path / "policy"))
    if said is not None:
        (tmp_path / "policy" / "generation_config.json").write_text(said)
    if ends is None:
        with pytest.raises(ModelError, match="does not say what ends an answer"):
            ending_tokens(base)
    else:
        assert ending_tokens(base) == ends


@pytest.mark.parametrize("said", [None, "{}", '{"eos_token_id": 2}', "offline"])
def test_a_policy_of_the_hub_must_say_what_ends_an_answer(said, tmp_path, monkeypatch):
    """The revision is in its key, so the tokens are not; a plan does not ask the hub."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from orchestrator.spec.models import ending_tokens
    from orchestrator.spec.stages import BaseModel

    def download(model, name, *, revision):
        assert (model, name, revision) == ("org/policy", "generation_config.json", "abc")
        if said == "offline":
            raise LocalEntryNotFoundError("no network")
        if said is None:
            raise EntryNotFoundError("404", None)
        (tmp_path / name).write_text(said)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    base = BaseModel(
        name="policy", key="k", tokenizer_key="k", precision="fp32", location="org/policy", revision="abc"
    )
    assert ending_tokens(base, fetch=False) == ()
    if said in (None, "{}"):
        with pytest.raises(ModelError, match="does not say what ends an answer"):
            ending_tokens(base)
    else:
        assert ending_tokens(base) == ()
