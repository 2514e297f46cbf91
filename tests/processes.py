"""Programs in forks of this process: importing torch takes seconds."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from tubelet.runtime import distributed


def run(main, options, processes):
    """`main(options, world)` in each of so many processes, as `--devices cpu --processes N` starts them."""
    context, address = multiprocessing.get_context("fork"), distributed.free_address()
    errors = context.SimpleQueue()
    members = [
        context.Process(target=be_member, args=(rank, processes, address, main, options, errors))
        for rank in range(processes)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(timeout=120)
        assert member.exitcode == 0, "another process failed" if errors.empty() else errors.get()


def be_member(rank, processes, address, main, options, errors):
    torch.set_num_threads(1)
    try:
        main(options, distributed.init(rank, processes, "cpu", address))
    except BaseException:
        errors.put(traceback.format_exc())
        raise
    finally:
        distributed.shutdown()


def run_program(module, *arguments, cwd=None):
    """`python -m module *arguments` in a fork; returns its exit status and its output, both streams together."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "output"
        pid = os.fork()
        if pid == 0:
            if cwd is not None:
                os.chdir(cwd)
            be_program(module, arguments, log)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return subprocess.CompletedProcess(arguments, status, log.read_text(errors="replace"))


def be_program(module, arguments, log):
    """Be `python -m module *arguments`, with a session of its own and the output appended to a file; never return."""
    status = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        original = multiprocessing.get_context
        # Spawned processes would import torch again.
        multiprocessing.get_context = lambda method=None: original("fork" if method == "spawn" else method)
        sys.argv = [module, *map(str, arguments)]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
