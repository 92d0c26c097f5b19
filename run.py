"""What the scripts share and no reader of the method needs: mistakes in one line, flags, processes,
seeds, files written whole, and work in parts that continues after a kill.

torch takes seconds to import, so only the functions that need it do: --help answers at once.
"""
import argparse
import ast
import atexit
import collections
import concurrent.futures
import contextlib
import datetime
import errno
import json
import math
import os
import re
import shutil
import sys
import uuid
import warnings
import zlib


class UserError(ValueError):
    """A mistake of the user's, in one line: what was given, what was needed, what to type."""


def one_line(error, most=200):
    """The message of an exception on one line, at most that many characters of it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."


def is_out_of_memory(error):
    """Of the CPU or of a GPU, whose exceptions all have the word in their names."""
    return "Memory" in type(error).__name__ or "can't allocate memory" in str(error)


def is_the_machines(error):
    """Whether too little memory or a disk or process in trouble is to blame, not a file or flag."""
    troubles = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EMFILE, errno.ENFILE,
                errno.ENOMEM)
    return is_out_of_memory(error) or isinstance(error, OSError) and error.errno in troubles


def run_cli(main, args):
    """main(args). Mistakes, a full disk, too little memory and no compiler end it in one line."""
    try:
        main(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # for what it holds
        sys.exit("error: nobody reads the output any more; the same command continues")
    except OSError as error:
        sys.exit(f"error: {one_line(error)}; finished work is kept: remove the cause (a full "
                 "disk?), and the same command continues")
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(f"error: --compile failed ({one_line(error)}); --no-compile does without")
        if not is_out_of_memory(error):
            raise
        sys.exit(f"error: out of memory ({one_line(error)}); lower --batch_size, or train.py's "
                 "--micro_batch_size")


def say_interrupted(kind, error, trace):
    """sys.excepthook: Ctrl-C is one line, while torch is imported, too."""
    if kind is KeyboardInterrupt:
        print("interrupted; the same command continues, or begins again", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def blamed_on(what, advice):
    """Turn whatever a library raises into one line: `what` was wrong, such as a flag with its
    value, and `advice`. Trouble of the machine is nobody's flag and passes through."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_the_machines(error):
            raise
        raise UserError(f"{what} ({one_line(error)}); {advice}") from None


class Parser(argparse.ArgumentParser):
    """Strict flags; a wrong one ends in one line, without the usage before it."""
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **options)

    def parse_args(self, args=None, namespace=None):
        if args is None:                                   # a command line
            sys.excepthook = say_interrupted
            sys.stdout.reconfigure(errors="backslashreplace")              # for names in unicode
        return super().parse_args(args, namespace)

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help has the list\n")

    def flag(self, name, default, meaning, **options):
        """--name VALUE, of its default's type unless `type` or `choices` is given."""
        if not {"type", "choices"} & set(options):
            options["type"] = type(default)
        self.add_argument(f"--{name}", default=default, help=f"{meaning} (default: %(default)s)",
                          **options)

    def switch(self, name, default, meaning):
        """--name or --no-name; default None: on for CUDA devices, as begin() decides."""
        usual = "on CUDA devices" if default is None else "on" if default else "off"
        self.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default,
                          help=f"{meaning} (default: {usual})")

    def device_flag(self):
        """--device, for pick_device()."""
        self.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")

    def device_flags(self):
        """--device, --bf16 and --compile, for begin()."""
        self.device_flag()
        self.switch("bf16", None, "bfloat16 autocast of the network; weights stay float32")
        self.switch("compile", None, "torch.compile the network's blocks: faster after a minute")


def number(kind, accepts, meaning):
    """A type for argparse: an int or a float that accepts() takes."""
    def convert(text):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} must be {meaning}")
        return value

    convert.__name__ = kind.__name__                       # argparse names it for what is no number
    return convert


count = number(int, lambda n: n >= 1, "at least 1")
natural = number(int, lambda n: 0 <= n < 2 ** 63, "0 or more")
positive = number(float, lambda value: 0 < value < math.inf, "above 0")
weight = number(float, lambda value: 0 <= value < math.inf, "0 or more")
finite = number(float, math.isfinite, "a finite number")
share_of_one = number(float, lambda value: 0 <= value <= 1, "from 0 to 1")


def existing_file(text):
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"no file {text}")
    return text


def key_value(text):
    """KEY=VALUE -> (key, value), the value a Python literal or a word."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text} must be KEY=VALUE")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return key, value


def pick_device(name=None):
    """The torch device of that name; None: this process's GPU if there is one, else the CPU.
    UserError if it cannot be used."""
    import torch
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with blamed_on(f"--device {name} cannot be used", "try --device cpu"), \
            warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'mkldnn'")                     # the error says the same
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))    # torchrun's
        torch.empty(1, device=device).cpu()
    return device


def rank_and_count():
    """This process's rank, and how many there are: as torchrun says, or 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def begin(args, days=1 / 24):
    """The device of args.device. Resolves args.bf16 and args.compile for it, where args have them,
    and joins the other processes, which may wait for each other for that many days."""
    import torch
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    for name in ("bf16", "compile"):
        if getattr(args, name, 0) is None:
            setattr(args, name, on_gpu)
    if rank_and_count()[1] > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                             timeout=datetime.timedelta(days=days))
        atexit.register(torch.distributed.destroy_process_group)       # its threads outlive errors
    return device


def gather(value):
    """Every process's value, by rank, for all of them: numbers, arrays, whatever pickles. It is a
    message between hosts: no GPU waits. UserError if another process has ended."""
    n_processes = rank_and_count()[1]
    if n_processes == 1:
        return [value]
    import torch.distributed as dist
    values = [None] * n_processes
    try:
        dist.all_gather_object(values, value)
    except RuntimeError:                                   # that one's own message says why
        raise UserError("another process stopped") from None
    return values


def share(value):
    """Rank 0's value, for all processes."""
    return gather(value)[0]


def end():
    """Wait for the other processes, and part from them."""
    if len(gather(None)) > 1:
        import torch
        atexit.unregister(torch.distributed.destroy_process_group)
        torch.distributed.destroy_process_group()


def restart_requested(args):
    """Whether --restart was given, unless torchrun starts the command again after a failure."""
    return args.restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def prefetch(make, steps, ahead=4):
    """make(step) for each of the steps, in order, computed by that many threads ahead of use."""
    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(ahead) as pool:
        for step in steps:
            waiting.append(pool.submit(make, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def seeds(seed, purpose, index=0, n=1):
    """n integers for (seed >= 0, purpose, index >= 0), and for nothing else in the program."""
    import numpy as np
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index])
    return key.generate_state(n, np.uint64).tolist()


def generator(seed, purpose, index=0):
    """A CPU generator for (seed, purpose, index), and for nothing else in the program."""
    import torch
    return torch.Generator().manual_seed(*seeds(seed, purpose, index))


def write_whole(path, write):
    """write(file), so that path holds the old content or the new, never a part of it. Several
    processes may write the same path: the last one wins. OSError if it cannot be written."""
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):         # a full disk, which torch.save hides
            raise error.__context__ from None
        raise
    finally:
        with contextlib.suppress(OSError):                 # it is there where the write failed
            os.remove(part)


def write_json(path, value):
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def write_picture(path, picture):
    """A PIL image as PNG."""
    write_whole(path, lambda file: picture.save(file, "PNG"))


@contextlib.contextmanager
def locked(folder, seconds=2):
    """Hold the folder, made if need be, for rank 0 of one command. It is free as soon as its holder
    has died. UserError if it is not within so many seconds."""
    if rank_and_count()[0] > 0:
        yield
        return
    import filelock                                        # comes with torch
    with blamed_on(f"{folder} cannot be a folder", "choose another --out"):
        os.makedirs(folder, exist_ok=True)
    try:
        lock = filelock.FileLock(f"{folder}/.lock").acquire(timeout=seconds)
    except filelock.Timeout:
        raise UserError(f"another command is writing to {folder}: wait for its end, or choose "
                        "another --out") from None
    with lock:
        for top, folders, names in os.walk(folder):        # of write_whole() in a killed command
            folders[:] = [name for name in folders         # but not of another, that may live
                          if not os.path.exists(f"{top}/{name}/.lock")]
            for name in names:
                if re.search(r"\.[0-9a-f]{8}\.part$", name):
                    os.remove(f"{top}/{name}")
        try:
            yield
        finally:
            if os.listdir(folder) == [".lock"]:            # a mistake: nothing was written
                shutil.rmtree(folder, ignore_errors=True)


class Parts:
    """n independent parts of a job, each one file in `folder`, whole or absent. A killed job makes
    the absent ones when it is started again, with any number of processes."""
    def __init__(self, folder, n, extension="npy"):
        self.folder, self.paths = folder, [f"{folder}/{i:05d}.{extension}" for i in range(n)]

    def mine(self):
        """The numbers of the absent parts that this process is to make, as rank 0 sees them."""
        rank, n_processes = rank_and_count()
        os.makedirs(self.folder, exist_ok=True)
        absent = [i for i, path in enumerate(self.paths) if not os.path.exists(path)]
        return share(absent)[rank::n_processes]

    def complete(self):
        """Wait until all processes have made theirs. UserError if a part is absent even so."""
        gather(None)
        absent = [path for path in self.paths if not os.path.exists(path)]
        if absent:
            raise UserError(f"{len(absent)} of {len(self.paths)} parts are missing, such as "
                            f"{absent[0]}; the same command makes them")
