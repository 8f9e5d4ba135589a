"""The store in a bucket, on a real S3 server: what readers see, what two writers do, what is refused."""

import json
import pickle
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import moto.settings
import obstore
import pytest

from orchestrator.cli.main import Grid, execute
from orchestrator.cli.options import Gc, Options, Run, Status
from orchestrator.cli.running import StateWriter
from orchestrator.cli.session import USAGE
from orchestrator.run.events import Failed
from orchestrator.run.failures import NextAttempt, classify, next_attempt
from orchestrator.spec.trials import RetryPolicy
from orchestrator.store import leases
from orchestrator.store.artifacts import MANIFEST, Store
from orchestrator.store.gc import evict_weights, garbage, kept_artifacts, remove
from orchestrator.store.leases import Leases, heartbeat, live_drivers
from orchestrator.store.records import Declaration, read_state, write_declaration
from tests.object_store import SECRET
from trainers import storage
from trainers.errors import Damaged, StorageError, Unreachable
from trainers.specs import Placement
from trainers.storage import ObjectPath, matching, parse_uri, publish, replace, require_access

KEY = "0" * 32
CONTENT = {"model/weights.safetensors": b"w" * 5000, "log.parquet": b"l" * 300}


@pytest.fixture
def store(bucket) -> Store:
    return Store(bucket.root)


def write(store: Store, content=CONTENT, key: str = KEY) -> None:
    with store.write("train", key) as attempt:
        for name, data in content.items():
            file = attempt.directory / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)


def read(store: Store, key: str = KEY) -> dict[str, bytes]:
    folder = store.read("train", key)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def elsewhere(monkeypatch, store: Store, tmp_path, name: str) -> Store:
    """The same store as a machine has it that has fetched nothing yet."""
    monkeypatch.setenv("RMSWEEP_CACHE", str(tmp_path / name))
    return pickle.loads(pickle.dumps(store))


def objects(store: Store) -> list[str]:
    return sorted(str(path).removeprefix(f"{store.root}/") for path in store.root.sizes())


def test_what_one_machine_writes_another_reads_and_nothing_stays_where_it_was_made(
    store, tmp_path, monkeypatch
):
    write(store)
    assert list((store.local / "artifacts" / "train" / KEY).glob("*")) == []
    other = elsewhere(monkeypatch, store, tmp_path, "other")
    assert read(other) == CONTENT
    assert other.local != store.root
    assert SECRET.encode() not in pickle.dumps(store)


@pytest.mark.parametrize("fails_at", ["model/weights.safetensors", "log.parquet", MANIFEST])
def test_a_write_that_fails_half_way_leaves_no_artifact_and_the_next_one_succeeds(
    store, fails_at, monkeypatch
):
    put = ObjectPath.upload

    def failing(target, *arguments):
        if str(target).endswith(fails_at):
            raise Unreachable("the line is cut")
        return put(target, *arguments)

    with monkeypatch.context() as cut:
        cut.setattr(ObjectPath, "upload", failing)
        if fails_at == MANIFEST:
            cut.setattr(ObjectPath, "create", failing)
        with pytest.raises(StorageError, match="the line is cut"):
            write(store)
    assert not store.complete("train", KEY)
    assert list((store.local / "artifacts" / "train" / KEY).glob("*")) == []
    store.remove_leftovers("train", KEY)
    assert objects(store) == []
    write(store)
    assert read(store) == CONTENT


def flipped(file) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def gone(file) -> None:
    file.unlink()


@pytest.mark.parametrize("harm", [flipped, cut, gone])
def test_an_object_that_is_not_as_written_is_found_and_written_again(store, tmp_path, monkeypatch, harm):
    write(store)
    attempt = store.manifest("train", KEY)["attempt"]
    harm(store.root / "artifacts" / "train" / KEY / attempt / "log.parquet")
    reader = elsewhere(monkeypatch, store, tmp_path, "reader")
    # The rest of the artifact is sound, and read without it.
    reader.read_file("train", KEY, "model/weights.safetensors")
    with pytest.raises(Damaged, match=r"s3://.*log\.parquet is missing or not what was written") as found:
        reader.read("train", KEY)
    assert not list(reader.local.rglob("log.parquet"))
    reader.discard("train", KEY, found.value.attempt)
    assert not store.complete("train", KEY)
    write(store)
    assert read(reader) == CONTENT


def test_of_many_that_commit_at_once_one_stays_whole_and_the_others_leave_nothing(store):
    gate = threading.Barrier(6)

    def commit(number: int) -> None:
        with Store(store.root).write("train", KEY) as attempt:
            (attempt.directory / "log.parquet").write_bytes(b"%d" % number)
            gate.wait(20)

    with ThreadPoolExecutor(6) as writers:
        list(writers.map(commit, range(6)))
    assert read(store) in [{"log.parquet": b"%d" % number} for number in range(6)]
    assert len(objects(store)) == 2


def test_a_manifest_whose_answer_was_lost_is_ours_and_its_files_stay(store, monkeypatch):
    """The request is repeated and then finds what it has itself put."""
    create = ObjectPath.create

    def twice(path, text):
        return create(path, text) and create(path, text)

    monkeypatch.setattr(ObjectPath, "create", twice)
    write(store)
    assert read(store) == CONTENT


def test_a_large_file_goes_up_in_parts_and_comes_back(store, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    content = {"model/weights.safetensors": random.Random(0).randbytes(12 * 2**20), "empty": b""}
    write(store, content)
    assert read(elsewhere(monkeypatch, store, tmp_path, "other")) == content


def test_a_bucket_that_is_gone_is_named(store):
    gone = ObjectPath("no-such-bucket", "x", store.root.endpoint, store.root.region)
    for act in (lambda: replace(gone, "x"), lambda: publish(gone, "x"), lambda: matching(gone, "*")):
        with pytest.raises(Unreachable, match=r"s3://no-such-bucket/x .* \(NoSuchBucket"):
            act()
    gone.unlink()


def test_credentials_are_found_in_a_profile(store, tmp_path, monkeypatch):
    file = tmp_path / "credentials"
    file.write_text(f"[mine]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {SECRET}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    with pytest.raises(StorageError, match=r"cannot be used .*AWS_ACCESS_KEY_ID"):
        require_access(store.root, write=False)
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(StorageError, match=r"config profile \(none\) could not be found"):
        require_access(store.root, write=False)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    require_access(store.root, write=True)


@pytest.mark.parametrize("name", ["s p ace.json", "偏好.json", "50%.json", "a+b=c#d?.json"])
def test_names_are_as_they_were_given(store, name):
    replace(store.root / "sweeps" / "demo" / name, "x")
    (found,) = matching(store.root / "sweeps", "*/*.json")
    assert (found.name, found.read_text(), objects(store)) == (name, "x", [f"sweeps/demo/{name}"])
    (store.root / "sweeps").remove_below()
    assert objects(store) == []


def test_drivers_on_a_bucket_see_each_other_and_take_over_from_the_dead(store, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_S", 0.5)
    replace(store.root / "drivers" / "far", "another 1 1 7")
    assert Leases(store.root, "far").take("x")
    with heartbeat(store.root) as near:
        assert not near.take("x")
        assert near.forget_dead() == {"far"}
        time.sleep(0.6)
        assert near.take("x")
        near.release("x")
        assert near.forget_dead() == set()
        assert live_drivers(store.root) == {near.driver}
    assert objects(store) == []


def test_a_bucket_that_does_not_answer_makes_nobody_dead_and_is_not_asked_for_ever(store, monkeypatch):
    failed = [classify(Unreachable("s3://bucket/x cannot be written"))]
    placement = Placement(forward_tokens=1)
    assert next_attempt(failed, placement, RetryPolicy()) == NextAttempt(wait_s=5.0, placement=placement)
    assert next_attempt(failed * 4, placement, RetryPolicy()) is None
    replace(store.root / "drivers" / "far", "another 1 1 1")
    monkeypatch.setattr(type(store.root), "read_text", unreachable)
    assert Leases(store.root, "near").alive("far")


def unreachable(path):
    raise Unreachable(f"{path} cannot be read")


def test_what_a_sweep_does_is_read_by_another_process(store):
    writer = StateWriter("demo", store, "driver", ["run"], ["a"])
    writer.on_event(Failed(trial="a", cause="Diverged", message="not finite"))
    writer.close()
    note = read_state("demo", Store(store.root)).trials["a"]
    assert (note.state, note.cause) == ("failed", "Diverged")


def test_names_below_a_place(store):
    for name in ("drivers/a.json", "drivers/b.json", "drivers/c.txt", "artifacts/train/k/manifest.json"):
        replace(store.root / name, "x")
    assert [path.stem for path in matching(store.root / "drivers", "*.json")] == ["a", "b"]
    assert [path.name for path in matching(store.root / "artifacts", "*/*/")] == ["k"]
    assert matching(store.root / "nothing", "*") == []
    assert not (store.root / "drivers").is_file()


def test_garbage_is_listed_without_a_change_and_then_removed(store):
    write(store)
    write(store, key="1" * 32)
    for name in ("checkpoints/old/step1/shard.pt", f"artifacts/train/{KEY}/20200101T000000-dead/half.bin"):
        replace(store.root / name, "x" * 10)
    kept = Declaration(sweep="demo", trials=(), artifacts=(f"train/{KEY}",))
    write_declaration(kept, store)
    before = objects(store)
    items = garbage(store, kept_artifacts(store))
    assert {(item.kind, item.path) for item in items} == {
        ("artifact", f"artifacts/train/{'1' * 32}"),
        ("attempt", f"artifacts/train/{KEY}/20200101T000000-dead"),
        ("checkpoint", "checkpoints/old"),
    }
    assert min(item.bytes for item in items) == 10
    assert objects(store) == before
    assert len(remove(store, items)) == 3
    left = [name for name in objects(store) if name.startswith(("artifacts", "checkpoints"))]
    assert {name.split("/")[2] for name in left} == {KEY}
    assert read(Store(store.root)) == CONTENT
    assert garbage(store, kept_artifacts(store)) == []


def test_evicted_weights_free_their_room_and_the_log_is_read(store, tmp_path, monkeypatch):
    write(store)
    with store.write("weights", KEY) as attempt:
        (attempt.directory / "model.safetensors").write_bytes(b"w" * 5000)
    assert evict_weights(store, "demo", [KEY]) == 5000
    assert not [name for name in objects(store) if name.startswith("artifacts/weights")]
    other = elsewhere(monkeypatch, store, tmp_path, "other")
    assert other.read_file("train", KEY, "log.parquet").read_bytes() == CONTENT["log.parquet"]
    with pytest.raises(StorageError, match="were evicted"):
        other.read("weights", KEY)


def refused(capsys, tmp_path, **options) -> str:
    """What a command says that exits 2, having started nothing."""
    assert execute(Grid(build=started), Options(**options), tmp_path / "full_grid.py") == USAGE
    said = capsys.readouterr().err
    assert SECRET not in said
    return said


def started(selection):
    raise AssertionError("it must be refused before anything starts")


def test_a_bucket_without_a_tracking_server_is_refused(bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = refused(capsys, tmp_path, command=Run(), storage=bucket.uri)
    assert "--tracking-uri" in said
    assert "MLFLOW_TRACKING_URI" in said
    # Who only looks needs none; there is no sweep yet, which is what is wrong.
    assert "knows no sweep" in refused(capsys, tmp_path, command=Status(), storage=bucket.uri)


@pytest.mark.parametrize("command", [Run(), Status(), Gc()])
def test_a_bucket_that_is_not_there_is_refused(bucket, tmp_path, capsys, command):
    where = {"storage": "s3://no-such-bucket/x"}
    if isinstance(command, Run):
        where["tracking_uri"] = "sqlite:///x"
    said = refused(capsys, tmp_path, command=command, **where)
    for word in ("no-such-bucket", bucket.endpoint, "NoSuchBucket", "AWS_ACCESS_KEY_ID"):
        assert word in said, said


def test_credentials_that_are_wrong_are_refused_and_not_shown(bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    said = refused(capsys, tmp_path, storage=bucket.uri, tracking_uri="sqlite:///x")
    assert bucket.name in said
    assert bucket.endpoint in said
    assert "InvalidAccessKeyId" in said
    assert bucket.environment["AWS_ACCESS_KEY_ID"] not in said


def test_a_bucket_that_may_only_be_read_is_refused_to_who_writes(store, monkeypatch):
    def denied(path, text):
        raise Unreachable(f"{path} cannot be written (AccessDenied: Access Denied)")

    monkeypatch.setattr(type(store.root), "write_bytes", denied)
    require_access(store.root, write=False)
    with pytest.raises(StorageError, match="AccessDenied"):
        require_access(store.root, write=True)


def test_an_endpoint_where_nobody_answers_is_refused(bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("trainers.storage.RETRIES", 1)
    said = refused(capsys, tmp_path, storage=bucket.uri, tracking_uri="sqlite:///x")
    assert "http://127.0.0.1:1" in said
    assert "Connection refused" in said


@pytest.mark.parametrize(
    "uri",
    [
        "s3://",
        "s3:///prefix",
        "s3://Not_A_Bucket/x",
        "s3://bucket/a/../b",
        "s3://bucket/a//b",
        "gs://bucket/x",
        f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/x",
        f"s3://bucket/x?secret_key={SECRET}",
    ],
)
def test_a_storage_that_names_no_bucket_is_refused(tmp_path, capsys, uri):
    assert "s3://" in refused(capsys, tmp_path, storage=uri, tracking_uri="sqlite:///x")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "http://", f"http://key:{SECRET}@host"])
def test_an_endpoint_that_is_no_address_is_refused(monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL must be") as found:
        parse_uri("s3://bucket/x")
    assert SECRET not in str(found.value)


def test_what_is_gone_or_rotten_on_this_machine_is_fetched_again(store):
    write(store)
    store.read_file("train", KEY, "log.parquet").write_bytes(b"rotten")
    assert read(Store(store.root)) == CONTENT
    shutil.rmtree(store.local)
    assert read(store) == CONTENT
    store.forget_fetched("train", KEY)
    assert not (store.local / "artifacts" / "train" / KEY).exists()
    assert read(store) == CONTENT


def requests_of(monkeypatch, method: str) -> list[str]:
    """The keys of objects that this process asks for from now on."""
    asked: list[str] = []
    real = getattr(obstore, method)
    monkeypatch.setattr(
        obstore, method, lambda client, key, *a, **k: asked.append(key) or real(client, key, *a, **k)
    )
    return asked


def test_of_many_artifacts_one_listing_spares_the_requests(store, monkeypatch):
    keys = [str(number) * 32 for number in range(10)]
    for key in keys[:-1]:
        write(store, key=key)
    other = Store(store.root)
    other.look(train=keys)
    asked = requests_of(monkeypatch, "get")
    again = Store(store.root)
    again.look(train=keys)
    for looked in (other, again):
        assert [looked.complete("train", key) for key in keys] == [True] * 9 + [False]
    # What has come since is asked for.
    assert asked == [f"{store.root.key}/artifacts/train/{keys[-1]}/{MANIFEST}"] * 2
    write(store, key=keys[-1])
    assert other.complete("train", keys[-1])


def test_what_has_gone_or_been_made_anew_since_the_listing_is_found_out(store):
    keys = [str(number) * 32 for number in range(10)]
    for key in keys[:3]:
        write(store, key=key)
    looked, other = Store(store.root), Store(store.root)
    looked.look(train=keys)
    for key in keys[:2]:
        other.discard("train", key, other.manifest("train", key)["attempt"])
        other.remove_leftovers("train", key)
    write(other, key=keys[1])
    assert looked.found("train", keys[0]) is None
    assert read(looked, keys[1]) == CONTENT
    looked.discard("train", keys[2], looked.manifest("train", keys[2])["attempt"])
    assert not looked.complete("train", keys[2])


def test_a_later_look_forgets_what_has_gone_since_the_first(store, monkeypatch):
    write(store)
    looked = Store(store.root)
    with monkeypatch.context() as early:
        early.setattr("orchestrator.store.artifacts.LOOK_S", 0.0)
        looked.look(train=[KEY])
    store.discard("train", KEY)
    looked.look(train=[KEY])
    assert not looked.complete("train", KEY)


@pytest.mark.parametrize("act", ["discard", "clear"])
def test_what_was_made_anew_since_the_listing_stays(store, act):
    write(store)
    looked, other = Store(store.root), Store(store.root)
    looked.look(train=[KEY])
    earlier = looked.manifest("train", KEY)["attempt"]
    other.discard("train", KEY)
    other.remove_leftovers("train", KEY)
    write(other)
    if act == "discard":
        looked.discard("train", KEY, earlier)
    else:
        looked.remove_leftovers("train", KEY)
    assert read(Store(store.root)) == CONTENT


def test_a_bucket_of_many_more_objects_is_not_listed(store, monkeypatch):
    write(store)
    asked = requests_of(monkeypatch, "get")
    assert (store.root / "artifacts").e_tags(2) == {}
    looked = Store(store.root)
    monkeypatch.setattr(ObjectPath, "e_tags", lambda self, most: {})
    looked.look(train=[KEY])
    assert looked.complete("train", KEY)
    assert len(asked) == 1


def test_a_remembered_manifest_that_is_damaged_is_read_again(store):
    write(store)
    Store(store.root).look(train=[KEY])
    index = store.local / "manifests.json"
    said = json.loads(index.read_text())
    said = {name: [e_tag, text.replace("log.parquet", "lug.parquet")] for name, (e_tag, text) in said.items()}
    index.write_text(json.dumps(said))
    looked = Store(store.root)
    looked.look(train=[KEY])
    assert looked.complete("train", KEY)


def test_what_the_listing_says_of_a_file_spares_its_reading(store, monkeypatch):
    """Where it says that the file is another one, its bytes are read; what others have read of manifests is shared."""
    keys = [str(number) * 32 for number in range(3)]
    for key in keys:
        write(store, key=key)
    monkeypatch.setattr("orchestrator.store.artifacts.MANY", 2)
    Store(store.root).look(train=keys)
    shutil.rmtree(store.local)
    asked, looked = requests_of(monkeypatch, "get"), Store(store.root)
    looked.look(train=keys)
    assert [looked.sound("train", key, "log.parquet")["key"] for key in keys] == keys
    assert asked == [f"{store.root.key}/manifests.json"]
    damaged = (
        store.root / f"artifacts/train/{keys[0]}/{looked.manifest('train', keys[0])['attempt']}/log.parquet"
    )
    damaged.write_bytes(b"another")
    again = Store(store.root)
    again.look(train=keys)
    with pytest.raises(Damaged):
        again.sound("train", keys[0], "log.parquet")
