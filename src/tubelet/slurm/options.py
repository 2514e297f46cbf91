"""What a cluster is asked for."""

from typing import Literal

from pydantic import Field, model_validator

from tubelet.config import Config


class SlurmConfig(Config):
    """YAML section `slurm`; options of the command line win."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: int = Field(4300, ge=2)
    """Limit of one stay on the nodes, in minutes; a run that needs longer is requeued and goes on."""
    nodes: int = Field(1, ge=1)
    tasks_per_node: int = Field(1, ge=1)
    """Processes on each node; each has a GPU unless `device` is cpu."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPU cores of a process with its data workers; by default what the cluster gives."""
    mem_per_gpu: str | None = Field(None, pattern=r"^\d+[KMGT]?$")
    """Host memory for each GPU, as 80G."""
    exclude: str | None = None
    """Nodes not to use, as n[3-5],n8."""
    device: Literal["cuda", "cpu"] = "cuda"
    warn_seconds: int = Field(300, ge=31)
    """How long before the limit the run is told to save and stop. SLURM looks every 30 s only: a warning that came
    within the same look as the limit itself would be none."""
    max_requeues: int = Field(20, ge=0)
    """A job that has been started again so often is not started once more."""
    sbatch: dict[str, str | int | bool] = {}
    """Any other options of sbatch by their long names, as {constraint: a100}."""

    @model_validator(mode="after")
    def _fits_together(self) -> "SlurmConfig":
        if self.device == "cpu" and self.mem_per_gpu is not None:
            raise ValueError("mem_per_gpu: device is cpu; say sbatch: {mem-per-cpu: 4G} instead")
        if self.time * 60 <= self.warn_seconds:
            raise ValueError(f"time: {self.time} minutes are over before the warning, {self.warn_seconds} s ahead")
        return self

    @property
    def gpus_per_node(self) -> int:
        return self.tasks_per_node if self.device == "cuda" else 0

    def said(self) -> str:
        """In one line, for people."""
        parts = [
            f"{self.nodes} node(s) × {self.tasks_per_node} task(s)",
            f"{self.nodes * self.gpus_per_node} GPU(s)",
            f"{self.cpus_per_task or 'default'} CPU core(s) a task",
            f"at most {self.time} min a stay, warned {self.warn_seconds} s before",
            *(f"{name} {value}" for name in ("partition", "account", "qos") if (value := getattr(self, name))),
        ]
        return ", ".join(parts)
