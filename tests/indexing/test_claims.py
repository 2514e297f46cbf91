import contextlib
import multiprocessing
import os
import socket
import time

from tubelet.indexing.claims import claim


def test_a_claim_excludes_others_until_it_is_released(tmp_path):
    first = claim(tmp_path / "a", 100)
    assert first is not None
    assert claim(tmp_path / "a", 100) is None
    assert claim(tmp_path / "b", 100) is not None
    first.release()
    assert claim(tmp_path / "a", 100) is not None


def test_claims_that_are_not_renewed_or_whose_process_is_gone_are_taken_over(tmp_path):
    assert claim(tmp_path / "a", 100) is not None
    os.utime(tmp_path / "a", (time.time() - 101,) * 2)
    assert claim(tmp_path / "a", 100) is not None
    child = multiprocessing.get_context("fork").Process(target=claim, args=(tmp_path / "b", 100))
    child.start()
    child.join()
    assert (tmp_path / "b").exists()
    assert claim(tmp_path / "b", 100) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def claim_and_release(path, times):
    for _ in range(times):
        claim(path, 100).release()


def test_a_claim_always_names_its_process(tmp_path):
    """Otherwise one whose process is killed right then would be waited for until it is old."""
    child = multiprocessing.get_context("fork").Process(target=claim_and_release, args=(tmp_path / "a", 2000))
    child.start()
    found = set()
    while child.is_alive():
        with contextlib.suppress(FileNotFoundError):
            found.add((tmp_path / "a").read_text())
    assert found == {f"{socket.gethostname()} {child.pid}"}


def test_without_its_folder_nothing_can_be_claimed(tmp_path):
    assert claim(tmp_path / "gone" / "a", 100) is None
