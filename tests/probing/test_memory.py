import pytest

from tubelet.probing.memory import available_bytes

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """`machine(cgroup, files)`: a root folder with 8 GiB available and these files of control groups."""

    def write(cgroup, files):
        contents = {
            "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * 2**20} kB\n",
            "proc/self/cgroup": cgroup,
            **files,
        }
        for name, content in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return write


def test_without_limits_it_is_what_the_machine_has(machine):
    assert available_bytes(machine("0::/job\n", {"sys/fs/cgroup/job/memory.max": "max\n"})) == 8 * GIB


def test_the_limit_of_a_slurm_job_above_the_process(machine):
    job = {
        "memory.max": f"{4 * GIB}\n",
        "memory.current": f"{3 * GIB}\n",
        "memory.stat": f"anon 5\ninactive_file {GIB}\n",
    }
    files = {f"sys/fs/cgroup/job/{name}": content for name, content in job.items()}
    files["sys/fs/cgroup/job/step/task/memory.max"] = "max\n"
    assert available_bytes(machine("0::/job/step/task\n", files)) == 2 * GIB


def test_the_limit_of_a_group_of_version_1(machine):
    """In a container: the path is that of the host, the limit is found at the top."""
    group = {
        "memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory.usage_in_bytes": f"{GIB}\n",
        "memory.stat": "total_inactive_file 0\n",
    }
    files = {f"sys/fs/cgroup/memory/{name}": content for name, content in group.items()}
    assert available_bytes(machine("3:cpu:/\n4:memory:/docker/1\n0::/\n", files)) == GIB


def test_this_machine():
    assert available_bytes() > 0
