"""Several processes that train one model together, with torch.distributed.

    torchrun --nproc_per_node 2 multitask_classifier.py ...

starts the program twice. Each process has a number (its rank) and a copy of the whole model. In each step:

    batch            every process computes the rows of the step's batch and takes its share of them (`share`)
    gradients        each process computes the gradients of its rows; their sum over the processes is the gradient of
                     the whole batch, because the loss is a sum over examples (`sum_gradients`)
    update           every process makes the same update, so the copies of the model stay equal

So N processes with batches of B/N examples compute what one process does with B. The processes share the batches of
an evaluation, too; afterwards each of them has all predictions (`gather_batches`). Only process 0 writes and prints.
In a single process nothing is exchanged.

Python values travel through gloo, between the CPUs, so that no process waits for its GPU. Gradients travel through
NCCL where there are GPUs. Every process must reach the same exchanges in the same order.

Differs: torch's DistributedDataParallel adds the gradients up during the backward pass, which hides the transfer
behind it, but knows one gradient per parameter. Gradient surgery needs one per task, so it is done after the pass.
"""

import os
import sys
from contextlib import contextmanager, redirect_stdout
from functools import wraps

import torch
import torch.distributed as dist

from errors import InputError, stop

# gradients are added up in pieces of this many numbers, so that packing one piece hides the transfer of another
PIECE = 1 << 23


class ProcessLost(Exception):
    """An exchange failed: another process of the job has ended, or cannot be reached."""


# --- who is who ---------------------------------------------------------------------------------------------------


def several():
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank():
    """The number of this process."""
    return dist.get_rank() if several() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if several() else 1


def on_first(function):
    """Decorator for a function that writes: only process 0 runs it."""

    @wraps(function)
    def first_only(*args, **kwargs):
        return function(*args, **kwargs) if rank() == 0 else None

    return first_only


def progress_bars():
    """Whether to draw progress bars: in process 0, at a terminal."""
    return rank() == 0 and sys.stderr.isatty()


@contextmanager
def processes(use_gpu):
    """Join the processes that torchrun started; without torchrun, nothing.

    A process that loses the others ends with a sentence and exit status 1.
    Raises: InputError where a machine has fewer GPUs than processes.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    cuda, local = use_gpu and torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise InputError(
            f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}: this machine has "
            f"{torch.cuda.device_count()} GPUs: start one process per GPU"
        )
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if rank() == 0 else nowhere):
            yield
    except ProcessLost as lost:
        stop(lost, status=1)
    # not where something went wrong: it would wait for processes that may be gone
    dist.destroy_process_group()


# --- exchanges ----------------------------------------------------------------------------------------------------


@contextmanager
def exchange():
    """Raise ProcessLost if an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:100]
        raise ProcessLost(
            f"process {dist.get_rank()} has lost another one ({reason}): see which one ended; a training run goes on "
            "from its last saved state with --resume"
        ) from error


def gather(value):
    """A value of every process, by rank."""
    if not several():
        return [value]
    values = [None] * world_size()
    with exchange():
        dist.all_gather_object(values, value)
    return values


def from_first(value):
    """Return process 0's value in every process."""
    return gather(value)[0]


def check_same(name, value):
    """Compare a value with that of process 0.

    Raises: InputError, in every process, if they differ.
    """
    values = gather(value)
    for number, other in enumerate(values):
        if other != values[0]:
            raise InputError(f"{name} differ between processes 0 and {number}: start each with the same command")


def copy_from_first(model):
    """Give every process the weights of process 0."""
    if several():
        with exchange():
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)


def add_up(values):
    """The sum of a tensor over the processes."""
    if several():
        with exchange():
            dist.all_reduce(values)
    return values


def any_process(*flags):
    """For each flag, whether it is set in some process."""
    counts = add_up(torch.tensor(flags, dtype=torch.int32))
    return [count > 0 for count in counts.tolist()]


def every_process(flag):
    """Whether a flag (a 0-dim tensor) is set in every process. Waits for the device."""
    return not any_process(not flag)[0]


# --- training and evaluating together -----------------------------------------------------------------------------


def share(count):
    """The positions among `count` rows that this process takes, and their weight in the loss.

    A process takes every n-th row. The rows are sorted by length, so all shares have about the same length. With fewer
    rows than processes, a spare process computes one row with weight 0, so that it still takes part in every exchange.
    """
    if rank() < count:
        return slice(rank(), count, world_size()), 1.0
    return slice(0, 1), 0.0


def sum_gradients(parameters, gradients):
    """The gradients summed over the processes; where none has one, None.

    Shapes: gradients: a tensor like the parameter, or None, for each of the parameters.
    """
    if not several():
        return gradients
    present = any_process(*(gradient is not None for gradient in gradients))
    totals, pieces = [], [[]]
    for parameter, gradient, somewhere in zip(parameters, gradients, present, strict=True):
        if somewhere and gradient is None:
            gradient = torch.zeros_like(parameter)
        totals.append(gradient)
        if somewhere:
            if sum(x.numel() for x in pieces[-1]) >= PIECE:
                pieces.append([])
            pieces[-1].append(gradient)
    # before the exchange: out of memory here is no lost process
    packed = [torch.cat([x.flatten() for x in piece]) for piece in pieces if piece]
    with exchange():
        under_way = [dist.all_reduce(flat, async_op=True) for flat in packed]
        for piece, flat, transfer in zip(pieces, packed, under_way, strict=False):
            transfer.wait()
            parts = flat.split([x.numel() for x in piece])
            torch._foreach_copy_(piece, [part.view_as(x) for part, x in zip(parts, piece, strict=True)])
    return totals


def deal(batches):
    """The batches of an evaluation that this process computes: every n-th."""
    return batches[rank() :: world_size()]


def gather_batches(results):
    """Put the results of all processes for the batches that `deal` gave them back into the order of the batches.

    Shapes: results: a tuple of tensors for each batch; comes back on the CPU.
    """
    if not several():
        return results
    by_rank = gather([tuple(tensor.cpu() for tensor in result) for result in results])
    count = sum(map(len, by_rank))
    return [by_rank[k % world_size()][k // world_size()] for k in range(count)]
