"""Addresses of remote files, and how they are shown: without credentials."""

import re

REMOTE = re.compile(r"(s3|s3a|gs|gcs|hf|https?)://", re.IGNORECASE)
"""Start of an address that is read through fsspec."""

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://([^/\s?#'\"]*)([^\s?#'\"]*)([?#][^\s'\"]*)?", re.IGNORECASE)


def is_remote(path: str) -> bool:
    """Whether `path` is an address such as `s3://bucket/file.mp4`, and not a path."""
    return REMOTE.match(path) is not None


def public(path: str) -> str:
    """Return a path or address without user name, password and, for http(s), query, which may hold a signature."""
    if not is_remote(path):
        return path
    scheme, _, rest = path.partition("://")
    if scheme.lower().startswith("http"):
        rest = re.sub(r"^([^?#]*)\?[^#]*", r"\1?…", rest)
    host, slash, name = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{name}"


def public_text(text: str) -> str:
    """Return a text in which every address is shown without credentials."""

    def shown(match: re.Match[str]) -> str:
        scheme, host, name, query = match.groups()
        return f"{scheme}://{host.rpartition('@')[2]}{name}{'?…' if query else ''}"

    return _ADDRESS.sub(shown, text)


def has_credentials(path: str) -> bool:
    """Whether `path` is an address with a user name, a password or a query."""
    return public(path) != path
