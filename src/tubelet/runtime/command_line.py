"""Command lines of the form `python -m <module> --fname FILE [options] [key.path=value …]`.

FILE is a path, or the name of a shipped configuration: `--fname demo`, or in other words `--config demo`.
"""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tubelet import config
from tubelet.config import ConfigError, UserError, shipped
from tubelet.config.reading import Schema
from tubelet.runtime import run_lock, start_up

TYPED: dict[str, str] = {}
"""Module -> the command that the user has typed to run it, where it is not `python -m <module>`."""


def typed(module: str) -> str:
    """Return the command that runs a module, as the user has typed it."""
    return TYPED.get(module, f"python -m {module}")


def make_parser(
    module: str,
    description: str | None,
    *,
    options: str = "",
    epilog: str | None = None,
    required: bool = True,
    configs: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """A parser with `--fname`, for `parse`.

    Args:
        module: What is run with `python -m`.
        options: The other options as they appear in the usage line.
        required: Whether `--fname` must be given.
        configs: Folders of `configs` in which the name of a shipped configuration is looked up first.
    """
    usage = " ".join(["%(prog)s --config FILE", *filter(None, [options]), "[key.path=value …]"])
    parser = argparse.ArgumentParser(prog=typed(module), usage=usage, description=description, epilog=epilog)
    parser.add_argument(
        "--fname",
        "--config",
        metavar="FILE",
        required=required,
        type=config_file(configs),
        help="the YAML file with the configuration, or the name of a shipped one, such as demo",
    )
    return parser


def add_help_config(parser: argparse.ArgumentParser) -> None:
    """Add the option `--help-config`; see `print_options`."""
    parser.add_argument(
        "--help-config", action="store_true", help="print all options of the configuration, with their documentation"
    )


def print_options(schema: type[config.Config], fname: str, overrides: Sequence[str]) -> None:
    """Print the options of a program and of the parts that the configuration names."""
    from tubelet.config import reference

    print(reference.as_text(reference.options(schema, config.read(fname, overrides))))


def config_file(configs: Sequence[str]) -> Callable[[str], str]:
    """Return the type of an argument that names a configuration, see `make_parser`. Paths are checked when read."""

    def find(fname: str) -> str:
        if fname.endswith(".yaml"):
            return fname
        try:
            return str(shipped.find(fname, configs))
        except ConfigError as error:
            sys.exit(f"error: {error}")

    return find


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `argv`, by default the program's arguments; `overrides` of the result are the `key.path=value` arguments.

    Overrides may stand anywhere, also after an option that takes several values. The value of an option that takes
    exactly one is never an override, even if it contains a "=".
    """
    takes_one = {option for action in parser._actions if action.nargs is None for option in action.option_strings}
    overrides: list[str] = []
    rest: list[str] = []
    for argument in sys.argv[1:] if argv is None else argv:
        is_override = "=" in argument and not argument.startswith("-") and not takes_one.intersection(rest[-1:])
        (overrides if is_override else rest).append(argument)
    return argparse.Namespace(**vars(parser.parse_args(rest)), overrides=overrides)


@contextlib.contextmanager
def exit_on_error(stopped: str = "stopped") -> Iterator[None]:
    """End the program with one line instead of a traceback: on a UserError (status 1) and on Ctrl-C (status 130)."""
    start_up.finished()
    try:
        yield
    except UserError as error:
        sys.exit(1 if error.printed_elsewhere else f"error: {error}")
    except KeyboardInterrupt:
        if stopped:
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(130)


def _check_program(raw: Mapping[str, Any], module: str, fname: str) -> None:
    """Raise ConfigError where `app:` of a file names another program of the package, instead of all unknown keys."""
    package, _, own = module.rpartition(".")
    given = raw.get("app")
    if not isinstance(given, str) or given == own or not given.isidentifier():
        return
    if importlib.util.find_spec(f"{package}.{given}") is None:
        return  # the check of the options reports it
    alone = importlib.util.find_spec(f"{package}.{given}.__main__") is not None
    command = typed(f"{package}.{given}" if alone else f"{package}.main")
    raise ConfigError(f"{fname}: app: '{given}' is another program; run it with {command} --config {fname}")


def run(
    module: str,
    description: str | None,
    schema: type[Schema],
    main: Callable[[Schema], None],
    configs: Sequence[str] = (),
) -> None:
    """Run `main` with the options that the command line's file and overrides give; see `make_parser`."""
    parser = make_parser(module, description, options="[--help-config]", configs=configs)
    add_help_config(parser)
    arguments = parse(parser)
    with exit_on_error("stopped; the same command continues"):
        if arguments.help_config:
            print_options(schema, arguments.fname, arguments.overrides)
            return
        raw = config.read(arguments.fname, arguments.overrides)
        _check_program(raw, module, arguments.fname)
        options = config.check(raw, schema, arguments.fname)
        with run_lock.holding(run_lock.locks_of(options)):
            main(options)
