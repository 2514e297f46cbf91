"""A program on several processes of this machine, as `--devices cpu --processes N` starts them."""

import multiprocessing
import traceback

import torch

from tubelet.runtime import distributed


def run(main, options, processes):
    """`main(options, world)` in each of so many processes. Forked: importing torch takes seconds."""
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
