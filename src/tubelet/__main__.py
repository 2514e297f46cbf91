"""The command `tubelet`: it runs the programs of the library, of `app`, `evals` and `benchmarks`.

`tubelet train …` is `python -m app.main …`, which works in a checkout only. Nothing is imported before a command is
known, so that `--help` is fast.
"""

import os
import runpy
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A module that is run as with `python -m`, and the arguments that precede those of the user."""

    module: str
    help: str
    arguments: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("app.main", "pretrain, train with labels, or predict frames: tubelet train --config demo"),
    "eval": Command("evals.main", "measure a frozen encoder: tubelet eval --config demo pretrain.folder=runs/demo"),
    "submit": Command("app.main_distributed", "train as a SLURM job; also shows and cancels jobs"),
    "submit eval": Command("evals.main_distributed", "measure a frozen encoder as a SLURM job"),
    "study": Command("app.study", "compare objectives with each other and with baselines: tubelet study --config demo"),
    "zoo": Command("app.zoo", "compare encoders: tubelet zoo --config zoo"),
    "comparison": Command(
        "app.comparison", "compare models of language and sound: tubelet comparison --config language"
    ),
    "plan": Command("benchmarks.plan", "estimate memory and time of a pretraining on a GPU cluster"),
    "report": Command("tubelet.report", "write the report of a run, or of several runs side by side"),
    "clips": Command("tubelet.data.generated", "generate the labelled clips of the demo"),
    "index": Command("app.main", "index folders of videos", ("--config", "data/index")),
    "pack": Command("app.main", "pack videos into shards", ("--config", "data/pack")),
}


def main(argv: list[str] | None = None) -> None:
    """Run a command line, by default that of this process."""
    words = sys.argv[1:] if argv is None else argv
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else " ".join(words[:1])
    if name not in COMMANDS:
        _help_or_exit(words)
    _run(name, words[len(name.split()) :])


def _run(name: str, arguments: list[str]) -> None:
    from tubelet.runtime import start_up

    command = COMMANDS[name]
    if command.module.startswith(("app.", "evals.")):
        start_up.begin()

    from tubelet.config import shipped
    from tubelet.runtime import command_line

    sys.path.insert(0, os.getcwd())  # as with `python -m`, modules of the current folder can be imported
    shipped.add_programs_to_path()
    command_line.TYPED[command.module] = f"tubelet {name}"
    sys.argv[1:] = [*command.arguments, *arguments]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


def _help_or_exit(words: list[str]) -> None:
    from tubelet import __version__

    if words[:1] in (["--version"], ["-V"]):
        print(f"tubelet {__version__}")
    elif not words or words[0] in ("-h", "--help", "help"):
        print(_help())
    else:
        import difflib

        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Commands: {', '.join(COMMANDS)}."
        sys.exit(f"error: tubelet {words[0]}: no such command. {hint}")
    sys.exit()


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tubelet COMMAND [--config NAME | FILE] [options] [key.path=value …]",
            "",
            "Self-supervised pretraining of video encoders.",
            "",
            *lines,
            "",
            "`tubelet COMMAND --help` has the options of a command, `tubelet train --config demo --help-config`",
            "those of a configuration.",
        ]
    )


if __name__ == "__main__":
    main()
