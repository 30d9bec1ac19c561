"""Run: pytest tests/infra/test_storage.py"""

import errno
import os
import pickle
import threading
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bitdgdm.infra.errors import CreateOnlyUnsupported, StorageRefused, StorageUnavailable
from bitdgdm.infra.storage import Store, open_store, probe_create_only


def test_what_is_written_is_read_listed_and_deleted(store):
    store.write("data/a", b"one")
    store.write("data/a", b"three")
    store.write("data/sub/b", b"")
    store.write("database", b"x")
    assert store.read("data/a") == store.open_input("data/a").read() == b"three"
    assert store.list() == {"data/a": 5, "data/sub/b": 0, "database": 1}
    assert store.list("data/") == {"data/a": 5, "data/sub/b": 0}
    assert store.list("data") == store.list()
    assert store.list("none/") == {}
    assert store.exists("data/a") and not store.exists("data") and not store.exists("data/")
    store.delete("data/a")
    store.delete("data/a")
    with pytest.raises(FileNotFoundError):
        store.read("data/a")
    with pytest.raises(FileNotFoundError):
        store.open_input("data/a").read()


def test_a_store_sees_nothing_of_a_neighbour_with_a_longer_name(store):
    neighbour = Store(store.url + "2")
    neighbour.write("data/a", b"theirs")
    assert store.list() == {} and store.list("data/") == {}


def test_an_input_can_be_read_from_any_place(store):
    store.write("part", bytes(range(200)))
    with store.open_input("part") as file:
        file.seek(-10, os.SEEK_END)
        assert file.read(3) == bytes([190, 191, 192])
        file.seek(5)
        assert file.read(2) == bytes([5, 6])


def test_create_succeeds_once_and_keeps_the_first_content(store):
    assert store.create("commits/1", b"first") is True
    assert store.create("commits/1", b"second") is False
    assert store.read("commits/1") == b"first"


@pytest.fixture
def gap_in_memory(monkeypatch):
    """fsspec's memory looks for an object and then writes it; make room between the two for other threads."""
    look = MemoryFileSystem.exists

    def slow_look(*arguments, **options):
        found = look(*arguments, **options)
        threading.Event().wait(0.01)
        return found

    monkeypatch.setattr(MemoryFileSystem, "exists", slow_look)


def test_of_many_threads_that_create_one_object_one_wins(store, gap_in_memory):
    gate, winners = threading.Barrier(8), []

    def attempt(number: int) -> None:
        gate.wait()
        if store.create("commits/1", b"%d" % number):
            winners.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1 and store.read("commits/1") == b"%d" % winners[0]


def test_the_probe_accepts_a_store_that_honours_create_only_and_leaves_nothing(store):
    probe_create_only(store)
    assert store.list() == {}


def test_a_store_is_its_url_and_survives_pickling(store):
    store.write("a", b"x")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"x"  # noqa: S301
    assert open_store(store.url) == store
    assert store.path("a") == f"{store.url}/a"


@pytest.mark.parametrize("key", ["/etc/passwd", "../outside", "data/../../outside"])
def test_a_key_cannot_leave_its_store(store, key):
    with pytest.raises(ValueError, match="leaves its store"):
        store.read(key)


# -- local disk ---------------------------------------------------------------------------------------------


def test_a_relative_path_stays_the_same_place_after_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store("out/run")
    monkeypatch.chdir("/")
    store.write("a", b"x")
    assert (tmp_path / "out/run/a").read_bytes() == b"x"
    assert open_store((tmp_path / "out/run").as_uri()) == store


def test_opening_a_folder_that_is_not_there_makes_nothing(tmp_path):
    assert open_store(tmp_path / "typo").list() == {}
    assert not (tmp_path / "typo").exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """At every system call that a write or a create makes, the target is absent, old or complete."""
    store, seen = open_store(tmp_path), set()

    def spy(name: str) -> None:
        original = getattr(os, name)

        def call(*arguments, **options):
            seen.add((tmp_path / "a").read_bytes() if (tmp_path / "a").exists() else None)
            seen.update(store.list())
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "link", "replace", "unlink"):
        spy(name)
    store.create("a", b"new")
    store.write("a", b"newer")
    assert seen == {None, "a", b"new", b"newer"}


def test_a_full_disk_is_reported_and_leaves_no_partial_file(tmp_path, monkeypatch, one_line):
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = open_store(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(StorageUnavailable) as caught:
        patch.setattr(os, "fsync", no_space)
        store.write("data", b"x" * 100)
    assert "No space left" in one_line(caught.value) and caught.value.exit_code == 75
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links_is_refused(tmp_path, monkeypatch, one_line):
    def no_link(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(StorageRefused) as caught:
        probe_create_only(open_store(tmp_path))
    assert "hard links" in one_line(caught.value)


def test_a_link_whose_answer_was_lost_counts_as_made(tmp_path, monkeypatch):
    """What NFS does when it repeats a request: the link exists, the call reports that the name is taken."""
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link)
    assert open_store(tmp_path).create("a", b"mine") is True


def test_a_place_that_cannot_hold_files_is_refused(tmp_path, one_line):
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", "/proc/none"):
        with pytest.raises(StorageRefused) as caught:
            probe_create_only(open_store(place))
        assert str(place) in one_line(caught.value) and caught.value.exit_code == 2


def test_partial_files_of_killed_writers_are_hidden_and_old_ones_removed(tmp_path):
    store = open_store(tmp_path)
    store.write("data/00/part", b"x")
    old, young = (tmp_path / "data/00" / f".part.{name}.partial" for name in ("old", "young"))
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert list(store.list()) == ["data/00/part"]
    store.remove_partials()
    assert not old.exists() and young.exists()


# -- what can't be opened -----------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "s3://", "s3:/bucket/x", "nosuch://place/x"])
def test_what_is_not_a_place_is_refused(url, one_line):
    with pytest.raises(StorageRefused) as caught:
        open_store(url)
    assert caught.value.exit_code == 2
    one_line(caught.value)


def test_a_store_for_reading_only_is_refused_by_the_probe(one_line):
    with pytest.raises(StorageRefused) as caught:
        probe_create_only(open_store("http://127.0.0.1:1/folder"))
    one_line(caught.value)


# -- S3 and its faults --------------------------------------------------------------------------------------


def test_a_missing_bucket_is_named_with_the_command_that_makes_it(s3_endpoint, aws, one_line):
    aws(s3_endpoint)
    with pytest.raises(StorageRefused) as caught:
        open_store("s3://no-such-bucket/run")
    assert "aws s3 mb s3://no-such-bucket" in one_line(caught.value)
    gone = Store("s3://no-such-bucket/run")
    for act in (gone.list, lambda: gone.read("a"), lambda: gone.create("a", b""), lambda: gone.delete("a")):
        with pytest.raises(StorageRefused, match="no bucket 'no-such-bucket'"):
            act()


def test_a_store_that_ignores_create_only_puts_is_refused(rclone, aws, one_line):
    aws(rclone, "rightkey", "rightsecret")
    store = open_store("s3://bucket/run")
    with pytest.raises(CreateOnlyUnsupported) as caught:
        probe_create_only(store)
    assert "If-None-Match" in one_line(caught.value) and caught.value.exit_code == 2
    assert store.list() == {}


@pytest.mark.parametrize(("key", "secret"), [("wrongkey", "rightsecret"), ("rightkey", "wrongsecret")])
def test_wrong_credentials_are_refused(rclone, aws, key, secret, one_line):
    aws(rclone, key, secret)
    with pytest.raises(StorageRefused) as caught:
        open_store("s3://bucket/run")
    assert "AWS_SECRET_ACCESS_KEY" in one_line(caught.value) and secret not in str(caught.value)


def test_missing_credentials_are_refused(s3_endpoint, aws, monkeypatch, tmp_path, one_line):
    aws(s3_endpoint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageRefused) as caught:
        open_store("s3://bucket/run")
    assert "AWS_ACCESS_KEY_ID" in one_line(caught.value)


def test_forbidden_requests_are_refused(faulty_s3, aws, one_line):
    aws(faulty_s3(always=403)[0])
    with pytest.raises(StorageRefused) as caught:
        open_store("s3://bucket/run")
    assert "AccessDenied" in one_line(caught.value)


def test_an_endpoint_where_nothing_listens_is_unavailable(aws, unused_port, one_line):
    aws(f"http://127.0.0.1:{unused_port}")
    with pytest.raises(StorageUnavailable) as caught:
        open_store("s3://bucket/run")
    assert "AWS_ENDPOINT_URL" in one_line(caught.value) and caught.value.exit_code == 75


def test_an_endpoint_that_is_not_a_url_is_refused(aws, one_line):
    aws("localhost:9000")
    with pytest.raises(StorageRefused) as caught:
        open_store("s3://bucket/run")
    assert "localhost:9000" in one_line(caught.value)


def test_a_server_in_trouble_is_unavailable(faulty_s3, aws, monkeypatch, one_line):
    aws(faulty_s3(always=500)[0])
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageUnavailable) as caught:
        open_store("s3://bucket/run")
    one_line(caught.value)


def test_a_conflict_of_two_puts_under_way_is_tried_again(faulty_s3, aws):
    endpoint, objects = faulty_s3("409", "409")
    aws(endpoint)
    assert open_store("s3://bucket/run").create("commits/1", b"mine") is True
    assert objects["/bucket/run/commits/1"] == b"mine"


def test_a_conflict_that_stays_is_unavailable(faulty_s3, aws, monkeypatch, one_line):
    monkeypatch.setattr("bitdgdm.infra.storage.time.sleep", lambda _: None)
    endpoint, objects = faulty_s3(*["409"] * 100)
    aws(endpoint)
    with pytest.raises(StorageUnavailable) as caught:
        open_store("s3://bucket/run").create("commits/1", b"mine")
    assert "409" in one_line(caught.value) and not objects


def test_a_server_that_does_not_know_create_only_puts_is_refused(faulty_s3, aws):
    aws(faulty_s3(always=501)[0])
    with pytest.raises(CreateOnlyUnsupported):
        probe_create_only(Store("s3://bucket/commits"))


def test_another_environment_is_another_connection(s3_endpoint, faulty_s3, aws):
    aws(s3_endpoint)
    store = open_store("s3://bucket/switch")
    store.write("a", b"moto")
    endpoint, objects = faulty_s3()
    aws(endpoint)
    store.write("a", b"other")
    aws(s3_endpoint)
    assert store.read("a") == b"moto" and objects["/bucket/switch/a"] == b"other"
