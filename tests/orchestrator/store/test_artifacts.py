"""The artifact store: all or nothing, first writer wins, digests checked."""

import threading
from pathlib import Path

import pytest

from orchestrator.store import artifacts, gc
from orchestrator.store.artifacts import MANIFEST, Store
from trainers.errors import StorageError
from trainers.storage import publish, replace

KEY = "0" * 32


def write(store: Store, text: str = "content", key: str = KEY) -> None:
    with store.write("train", key, seed=1) as attempt:
        (attempt.directory / "nested").mkdir()
        (attempt.directory / "nested" / "file.txt").write_text(text)
        attempt.info["pairs"] = 3


def folder_of(store: Store) -> Path:
    return store.root / "artifacts" / "train" / KEY


def test_an_artifact_holds_what_was_written_and_its_manifest_says_from_what(store: Store):
    write(store)
    assert (store.read("train", KEY) / "nested" / "file.txt").read_text() == "content"
    assert store.complete("train", KEY)
    manifest = store.manifest("train", KEY)
    assert (manifest["inputs"], manifest["info"]) == ({"seed": 1}, {"pairs": 3})
    assert list(manifest["files"]) == ["nested/file.txt"]
    assert manifest["files"]["nested/file.txt"]["size"] == len("content")
    assert manifest["seconds"] >= 0


def test_what_another_one_removes_or_replaces_while_it_is_read_is_not_taken_for_damaged(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    def removed_first(file: Path, digest: str) -> bool:
        store.discard("train", KEY)
        return False

    write(store)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "is_written", removed_first)
        assert store.found("train", KEY) is None
    write(store, "old")

    def replaced_first(file: Path, digest: str) -> bool:
        monkeypatch.undo()
        store.discard("train", KEY)
        write(store, "new")
        return False

    monkeypatch.setattr(artifacts, "is_written", replaced_first)
    assert (store.read("train", KEY) / "nested" / "file.txt").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_passes_through_and_leaves_nothing(store: Store, error: type[BaseException]):
    def half() -> None:
        with store.write("train", KEY) as attempt:
            (attempt.directory / "file.txt").write_text("half")
            raise error

    with pytest.raises(error):
        half()
    assert not store.complete("train", KEY)
    assert list(folder_of(store).iterdir()) == []


def test_of_many_writers_at_once_one_stays_whole(tmp_path: Path):
    stores = [Store(tmp_path) for _ in range(8)]
    gate = threading.Barrier(len(stores))

    def write_at_once(number: int) -> None:
        with stores[number].write("train", KEY) as attempt:
            (attempt.directory / "file.txt").write_text(str(number))
            gate.wait()

    threads = [threading.Thread(target=write_at_once, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = Store(tmp_path).read("train", KEY)
    assert (folder / "file.txt").read_text() in {str(number) for number in range(len(stores))}
    assert sorted(item.name for item in folder.parent.iterdir()) == sorted([MANIFEST, folder.name])


@pytest.mark.parametrize(
    "harm", [lambda file: file.write_text("contemt"), Path.unlink], ids=["flipped", "lost"]
)
def test_a_damaged_file_is_noticed_when_read_and_named_and_a_listing_reads_none(store: Store, harm):
    write(store)
    harm(store.read("train", KEY) / "nested" / "file.txt")
    assert Store(store.root).complete("train", KEY)
    with pytest.raises(StorageError, match=r"file\.txt"):
        Store(store.root).read("train", KEY)


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", '{"attempt": ', "[]", "{}", '{"attempt": "x"}'])
def test_a_manifest_that_is_none_is_an_error_that_names_it(store: Store, text: str):
    write(store)
    (folder_of(store) / MANIFEST).write_text(text)
    for ask in (store.manifest, Store(store.root).read):
        with pytest.raises(StorageError, match=MANIFEST):
            ask("train", KEY)


def test_a_root_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="--storage"):
        write(Store(tmp_path / "file" / "store"))


def test_publish_says_whether_it_was_first_and_replace_replaces_and_neither_leaves_a_draft(tmp_path: Path):
    file = tmp_path / "new" / "sweep.json"
    assert publish(file, "first")
    assert not publish(file, "second")
    assert file.read_text() == "first"
    replace(file, "é new")
    assert file.read_text(encoding="utf-8") == "é new"
    assert list(file.parent.iterdir()) == [file]


def test_what_is_published_can_be_read_by_others(tmp_path: Path):
    publish(tmp_path / "manifest.json", "x")
    replace(tmp_path / "sweep.json", "x")
    plain = tmp_path / "plain"
    plain.write_text("x")
    modes = {file.name: oct(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_drafts_of_a_killed_driver_go_and_notes_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(gc.time, "sleep", lambda seconds: None)
    store = Store(tmp_path)
    folders = [tmp_path, tmp_path / "leases", tmp_path / "sources", tmp_path / "audits"]
    folders += [store.sweep_dir("demo"), store.sweep_dir("demo") / "report" / "tables"]
    for folder in folders:
        replace(folder / "note", "{}")
        (folder / ".draft-0a").write_text("{")
    (tmp_path / "scratch" / "demo-1" / "tune").mkdir(parents=True)
    (tmp_path / "drivers").mkdir()
    another = tmp_path / "drivers" / "another"
    another.write_text("machine 1 1 1")
    gc.clear_up(store, "demo")
    assert all((folder / ".draft-0a").is_file() for folder in folders)
    assert list((tmp_path / "scratch").iterdir())
    another.unlink()
    gc.clear_up(store, "demo")
    for folder in folders:
        # A lease of nobody is no note.
        left = [file.name for file in folder.iterdir() if file.is_file()]
        assert left == ["note"] * (folder.name != "leases")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_an_attempt_that_another_driver_removed_is_not_committed_without_its_files(store: Store):
    with pytest.raises(StorageError, match="another driver"), store.write("train", KEY):
        store.remove_leftovers("train", KEY)
    assert not store.complete("train", KEY)
    with store.write("train", KEY):
        store.remove_leftovers("train", KEY)
        with Store(store.root).write("train", KEY) as other:
            (other.directory / "log").write_text("of the one that took it over")
    assert store.read_file("train", KEY, "log").is_file()
