import pytest

from benchmarks import start_up


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["index", "list"])
def test_a_million_rows_start_in_three_seconds_and_300_megabytes(kind, tmp_path):
    *_, base = start_up.measure(kind, start_up.write(kind, tmp_path, 10), num_workers=4)
    _, cpu_seconds, size = start_up.measure(kind, start_up.write(kind, tmp_path, 1_000_000), num_workers=4)
    assert cpu_seconds < 3
    assert size - base < 300e6
