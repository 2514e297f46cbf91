"""YAML section `data.storage`."""

from pydantic import Field

from tubelet.config import Config

KB, MB = 1 << 10, 1 << 20


class StorageConfig(Config):
    """How remote files (`s3://`, `gs://`, `hf://`, `https://`) are read; local files need none of this.

    Credentials, endpoints and the like are not set here, where they would be written into the run's folder, but in the
    environment or the files of each service, or of fsspec: docs/cluster_data.md.
    """

    retries: int = Field(5, ge=0)
    """Further attempts of a request that may succeed later: throttling, a server error, a broken connection, a
    truncated answer or none in time. What is missing or forbidden is not tried again."""
    timeout: float = Field(30, gt=0)
    """Seconds that an attempt may take. Keep (retries + 1) × timeout well below `worker_timeout`."""
    backoff: float = Field(0.5, ge=0)
    """Seconds before the first retry. They double with each one, up to `max_backoff`; between half and all of them are
    waited, at random, so that processes do not retry in step."""
    max_backoff: float = Field(20, ge=0)
    """Longest wait before a retry, in seconds."""
    block_size: int = Field(256 * KB, ge=512)
    """Bytes of the smallest request."""
    read_ahead: int = Field(4 * MB, ge=0)
    """Largest request: while a file is read in order, each request is twice as long as the one before."""
    whole_file: int = Field(2 * MB, ge=0)
    """Files up to this size are read in a single request."""
    cache_size: int = Field(32 * MB, ge=0)
    """Bytes of an open file that are kept in memory."""


DEFAULT_STORAGE = StorageConfig()
