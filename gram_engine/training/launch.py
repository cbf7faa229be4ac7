"""Starts a training script under torchrun; flags of torchrun and of the trainer may be mixed on the command line.

    python -m gram_engine.training.launch examples/pretrain_gram.sh --nnodes 2 --node-rank 0 \
        --rdzv-endpoint host:29500 --lr 1e-5

torchrun itself needs its flags before the script and the trainer's after it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from typing import Sequence

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from gram_engine.platform.device import gpu_count

# Flags of torchrun that change what is run, not where.
_NOT_PASSED = {"--help", "--module", "--no-python", "--run-path"}
REPORTED_EXIT_CODES = (2, 3, 4)
"""Exit codes of trainers that have printed what is wrong: a mistake of the user, non-finite numerics, a hang."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `SCRIPT FLAGS...` under torchrun with --nproc-per-node processes (default: NPROC_PER_NODE, else one per GPU)."""
    script, *flags = sys.argv[1:] if argv is None else argv
    if "-h" in flags or "--help" in flags:
        os.execv(sys.executable, [sys.executable, script, "--help"])
    for_torchrun, for_script = split_flags(flags)
    command = [*with_defaults(for_torchrun), script, *for_script]
    arguments = run.parse_args(command)
    processes = arguments.nproc_per_node
    forward_signals(arguments)
    if "OMP_NUM_THREADS" not in os.environ and processes.isdigit():
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(processes)))
    try:
        run.run(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode not in REPORTED_EXIT_CODES:
            print(error.format_msg(), file=sys.stderr)
        sys.exit(max(1, failure.exitcode))


def forward_signals(arguments: argparse.Namespace) -> None:
    """Forward SIGTERM and SIGUSR1 to the trainers, which save and exit with status 0; torchrun would kill them on SIGTERM."""
    handled = arguments.signals_to_handle.split(",")
    arguments.signals_to_handle = ",".join(name for name in handled if name not in ("SIGTERM", "SIGUSR1"))

    def forward(number: int, _frame) -> None:
        for trainer in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                trainer.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)


def split_flags(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """(torchrun's flags with their values, all others), each in the given order; `--node_rank` is taken as `--node-rank`."""
    known = _torchrun_flags()
    for_torchrun: list[str] = []
    for_script: list[str] = []
    arguments = iter(flags)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        name = name.replace("_", "-")
        if name not in known:
            for_script.append(argument)
            continue
        for_torchrun.append(argument)
        if known[name] and not equals:
            for_torchrun.extend(value for value in [next(arguments, None)] if value is not None)
    return for_torchrun, for_script


def with_defaults(for_torchrun: Sequence[str]) -> list[str]:
    """torchrun's flags, completed with a number of processes and, on a single node, --standalone (a free port)."""
    given = {flag.partition("=")[0].replace("_", "-") for flag in for_torchrun}
    flags = list(for_torchrun)
    if "--nproc-per-node" not in given:
        flags = ["--nproc-per-node", os.environ.get("NPROC_PER_NODE") or str(max(1, gpu_count())), *flags]
    one_node = not given & {"--nnodes", "--rdzv-endpoint", "--master-addr", "--master-port"}
    if one_node and "--standalone" not in given:
        flags = ["--standalone", *flags]
    return flags


def _torchrun_flags() -> dict[str, bool]:
    """{long flag of torchrun: whether it takes a value}"""
    actions = run.get_args_parser()._option_string_actions.items()
    return {
        name: action.nargs != 0
        for name, action in actions
        if name.startswith("--") and name.replace("_", "-") not in _NOT_PASSED
    }


if __name__ == "__main__":
    main()
