"""The resources of a job."""

from typing import Literal

from pydantic import Field, model_validator

from tubelet.config import Config


class SlurmConfig(Config):
    """YAML section `slurm`; options of the command line take precedence."""

    partition: str | None = None
    """Partition of the cluster; null: its default."""
    account: str | None = None
    """Account that is charged; null: the user's default."""
    qos: str | None = None
    """Quality of service; null: the default."""
    time: int = Field(4300, ge=2)
    """Time limit in minutes; a run that takes longer is requeued and resumes."""
    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    tasks_per_node: int = Field(1, ge=1)
    """Processes on each node; each has one GPU unless `device` is cpu."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPU cores of each process with its data workers; by default as the cluster is configured."""
    mem_per_gpu: str | None = Field(None, pattern=r"^\d+[KMGT]?$")
    """Host memory for each GPU, e.g. 80G."""
    exclude: str | None = None
    """Nodes that are not used, e.g. n[3-5],n8."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Whether processes use GPUs."""
    warn_seconds: int = Field(300, ge=31)
    """Seconds before the time limit at which the run gets a signal to save and stop. SLURM checks limits every 30 s, so
    it would send a later signal together with the one that ends the job."""
    max_requeues: int = Field(20, ge=0)
    """Number of times that a job may be requeued."""
    sbatch: dict[str, str | int | bool] = {}
    """Other options of sbatch by their long names, e.g. {constraint: a100}."""

    @model_validator(mode="after")
    def _check_consistency(self) -> "SlurmConfig":
        if self.device == "cpu" and self.mem_per_gpu is not None:
            raise ValueError("mem_per_gpu: device is cpu; use sbatch: {mem-per-cpu: 4G} instead")
        if self.time * 60 <= self.warn_seconds:
            raise ValueError(f"time: {self.time} minutes are shorter than warn_seconds: {self.warn_seconds}")
        return self

    @property
    def gpus_per_node(self) -> int:
        return self.tasks_per_node if self.device == "cuda" else 0

    def summary(self) -> str:
        """The resources in one line."""
        parts = [
            f"{self.nodes} node(s) × {self.tasks_per_node} task(s)",
            f"{self.nodes * self.gpus_per_node} GPU(s)",
            f"{self.cpus_per_task or 'default'} CPU core(s) per task",
            f"time limit {self.time} min, stop signal {self.warn_seconds} s before",
            *(f"{name} {value}" for name in ("partition", "account", "qos") if (value := getattr(self, name))),
        ]
        return ", ".join(parts)
