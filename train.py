"""Trains DiT or SiT with ReDi: the joint loss over image latents x and features z, with z-dropout.

    python train.py                                         # SiT-T/2 on digits, in minutes
    torchrun --nproc_per_node=8 train.py --model SiT-XL/2   # the paper's, on prepared/imagenet256

Writes DIR/ckpt.pt (the one before it is ckpt_prev.pt), log.jsonl, preview sheets and, at the end,
sheet.png and for digits results.json. Started again with the same --out it goes on from ckpt.pt;
SIGTERM and Ctrl-C save first.
"""
import argparse
import contextlib
import copy
import functools
import glob
import json
import math
import os
import shutil
import signal
import sys
import time

# What a run uses unless a flag says otherwise. PAPER: ReDi's and SiT's values; DIGITS: size T on
# digits. ema: decay per step; sample_steps: network calls per image; *_every: steps.
DEFAULTS = {"model": "SiT-T/2", "fusion": "merged", "unconditional": False, "lam_z": 1.0,
            "repa": 0.0, "p_drop_z": 0.2, "p_drop_y": 0.1, "grad_clip": 0.0, "init": None,
            "seed": 0, "keep_every": 0, "eval_every": 0, "eval_n": 1_000, "eval_reference": None,
            "eval_features": "inception", "eval_weights": None, "eval_features_kwargs": []}
PAPER = {"lr": 1e-4, "batch_size": 256, "steps": 400_000, "r": 8, "ema": 0.9999,
         "sample_steps": 250, "log_every": 100, "ckpt_every": 5_000, "preview_every": 25_000}
DIGITS = {"lr": 3e-3, "batch_size": 128, "steps": 1_400, "r": 4, "ema": 0.995,
          "sample_steps": 40, "log_every": 25, "ckpt_every": 250, "preview_every": 500}
# a checkpoint decides these for good; a flag that says otherwise is an error
FIXED = ("model", "fusion", "unconditional", "data", "r", "lam_z", "repa", "p_drop_z", "p_drop_y",
         "lr", "batch_size", "ema", "init", "seed")
# flags about where and how a run computes: recorded, but they bind nobody who goes on
OF_THE_MACHINE = ("out", "restart", "device", "bf16", "compile", "grad_checkpointing",
                  "micro_batch_size", "workers")
REPA_WEIGHT = 0.5                       # REPA's own
REPA_BLOCK = {"T": 2, "S": 4, "B": 4, "L": 8, "XL": 8}      # whose output is aligned; XL: REPA's
N_JUDGED = 1_000                        # generated digits behind the closing numbers
JUDGED_AT_ONCE = 125                    # samples a batch, for those and for --eval_every


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)

    def setting(name, meaning, kind=None, **options):
        """A flag whose default is the checkpoint's value, or else the tables' above."""
        default = options.pop("default", None) or (DEFAULTS | PAPER)[name]
        digits = f"; {DIGITS[name]} for size T on digits" if name in DIGITS else ""
        p.add_argument(f"--{name}", type=kind, help=f"{meaning} (default: {default}{digits})",
                       **options)

    setting("model", "DiT or SiT - size T, S, B, L or XL / patch 2, 4 or 8", str)
    setting("fusion", "how z joins x: none (plain DiT/SiT), merged or separate tokens", str)
    p.add_argument("--unconditional", action=argparse.BooleanOptionalAction,
                   help="ignore the classes (default: off)")
    setting("data", "digits, or a prepared folder", str,
            default="digits for size T, else where data.py writes")
    setting("r", "channels of z: PCA components of the features that are used; under Python 3.11 "
                 "torchrun needs -- before train.py to leave it alone", int)
    setting("lam_z", "weight of z's loss; 0 is off", float)
    setting("repa", f"weight of REPA's loss, beside or, with --fusion none, instead of ReDi; "
                    f"without a number {REPA_WEIGHT}, 0 is off", float, nargs="?",
            const=REPA_WEIGHT)
    setting("p_drop_z", "chance that a sample's z is dropped; 0 is off and rules out --w_r", float)
    setting("p_drop_y", "chance that its class is dropped; 0 is off and rules out --w_cfg", float)
    setting("steps", "optimizer steps in all", int)
    setting("batch_size", "images a step, all processes together", int)
    setting("lr", "AdamW's learning rate, constant", float)
    setting("grad_clip", "largest norm of the gradient; 0 is off", float)
    setting("ema", "decay of the averaged weights per step, ramped up from 0.1; 0 is off", float)
    setting("init", "start from these weights: a checkpoint of train.py, or weights that the "
                    "authors of ReDi, SiT or DiT publish", str, metavar="FILE",
            default="random ones")
    setting("seed", "of the initial weights, the data order and every draw", int)
    setting("sample_steps", "network calls per image, for sheets and closing numbers", int)
    setting("log_every", "steps between lines of log.jsonl", int)
    setting("ckpt_every", "steps between checkpoints; two are kept", int)
    setting("keep_every", "steps between checkpoints that are kept for good, as ckpt_STEP.pt; 0 is "
                          "off", int)
    setting("preview_every", "steps between preview sheets", int)
    setting("eval_every", "steps between measurements of the EMA's samples, which log.jsonl gets; "
                          "0 is off", int)
    setting("eval_n", "samples that are measured, from the same noise every time", int)
    setting("eval_reference", "what they are compared with: images, or moments that fid.py "
                              "--save_stats kept, or train: as many training images, decoded; "
                              "images are measured at each start",
            str, default="train; for --data digits held-out ones, by their own judges")
    setting("eval_features", "space of the Fréchet distance, as fid.py's --features", str)
    setting("eval_weights", "its weights, as fid.py's --weights", str, metavar="FILE",
            default="downloaded")
    setting("eval_features_kwargs", "as fid.py's --features_kwargs", str, nargs="*",
            metavar="KEY=VALUE", default="none")
    p.add_argument("--out", default="out", metavar="DIR", help="output folder (default: out)")
    p.add_argument("--restart", action="store_true",
                   help="start over where DIR holds a checkpoint, which becomes ckpt.pt.old")
    p.add_argument("--micro_batch_size", type=int,
                   help="images that a process computes at once: the gradients of its part of "
                        "--batch_size add up (default: the whole part)")
    p.add_argument("--workers", type=int, default=4,
                   help="threads that assemble the next batches (default: %(default)s)")
    p.add_argument("--grad_checkpointing", action=argparse.BooleanOptionalAction, default=False,
                   help="compute activations twice instead of keeping them: less memory, a third "
                        "more work (default: off)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="torch.compile the blocks: faster after a minute (default: on GPUs)")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                   help="bfloat16 autocast, weights and losses in float32 (default: on GPUs)")
    p.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    return p


if __name__ == "__main__":     # before torch, which takes seconds: --help and typos are quicker
    args = parser().parse_args()

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import model
import sample
from pca import write_whole


def typed(args):
    """The settings among the flags: those that were given."""
    return {name: value for name, value in vars(args).items()
            if value is not None and name not in OF_THE_MACHINE}


def resolve(given, checkpoint):
    """All settings of a run: the flags `given`, then the checkpoint's (or None), then the defaults.
    UserError for flags that contradict each other or the checkpoint."""
    if checkpoint:
        stored = DEFAULTS | checkpoint["settings"]
        for name in FIXED:
            if given.get(name, stored[name]) != stored[name]:
                raise data.UserError(f"--{name} {given[name]} contradicts the checkpoint's "
                                     f"{stored[name]}; drop the flag, choose another --out, or "
                                     "--restart")
        return stored | given
    settings = DEFAULTS | given
    try:
        _, size, _ = model.parse_name(settings["model"])
    except ValueError as error:
        raise data.UserError(f"--model: {error}") from None
    if settings["fusion"] not in model.FUSIONS:
        raise data.UserError(f"--fusion {settings['fusion']}: choose from "
                             f"{', '.join(model.FUSIONS)}")
    settings = {"data": "digits" if size == "T" else data.IMAGENET} | settings
    small = size == "T" and settings["data"] == "digits"
    settings = (DIGITS if small else PAPER) | settings
    if settings["fusion"] == "none":
        for name in ("r", "lam_z", "p_drop_z"):
            if name in given:
                raise data.UserError(f"--{name} is about features z, and --fusion none has none; "
                                     "drop one of the two")
        settings |= {"r": 0, "lam_z": 0.0, "p_drop_z": 0.0}
    if settings["init"] and not os.path.exists(settings["init"]):    # needed at the start alone
        raise data.UserError(f"--init {settings['init']}: no such file")
    return settings


def check(settings, n_processes, micro_batch_size=None, workers=1):
    """UserError for a value that no run can have."""
    def need(name, good, what):
        if not good(settings[name]):
            raise data.UserError(f"--{name} {settings[name]} must be {what}")

    for name in ("steps", "batch_size", "log_every", "ckpt_every", "preview_every"):
        need(name, lambda value: value >= 1, "at least 1")
    for name in ("keep_every", "eval_every"):
        need(name, lambda value: value >= 0, "0 or more")
    for name, words in (("eval_reference", ("train", "digits")), ("eval_weights", ())):
        if settings[name] and settings[name] not in words and not os.path.exists(settings[name]):
            raise data.UserError(f"--{name} {settings[name]}: no such file")
    need("eval_n", lambda n: n >= 2, "at least 2, as a covariance needs them")
    for name in ("p_drop_z", "p_drop_y", "ema"):
        need(name, lambda value: 0 <= value <= 1, "between 0 and 1")
    for name in ("lam_z", "repa", "grad_clip"):
        need(name, lambda value: 0 <= value < math.inf, "0 or more")
    need("seed", lambda seed: 0 <= seed < 2 ** 63, "between 0 and 2^63")
    need("lr", lambda lr: 0 < lr < math.inf, "above 0")
    if settings["fusion"] != "none":
        need("r", lambda r: r >= 1, "at least 1; for no features, use --fusion none")
    need("batch_size", lambda n: n % n_processes == 0,
         f"a multiple of the number of processes, {n_processes}: it is for all of them together")
    each = settings["batch_size"] // n_processes
    if micro_batch_size is not None and (micro_batch_size < 1 or each % micro_batch_size):
        raise data.UserError(f"--micro_batch_size {micro_batch_size} must divide the {each} images "
                             "that a process has of --batch_size")
    if workers < 1:
        raise data.UserError(f"--workers {workers} must be at least 1")
    sample.check_solver(settings["model"], None, settings["sample_steps"], "--sample_steps")


def draw(seed, step, batch_size, mine, net, from_codec=False):
    """Everything random about the samples `mine` (a slice) of a step's global batch: u, u_y, u_z
    (B,), uniform, for the times and for what is dropped; eps_x, eps_z of x_t's and z_t's shape
    (None without features); eps_vae of x's shape, for drawing x from its mean and standard
    deviation (None unless from_codec).

    Each sample has a generator of its own, a function of (seed, step, its place in the batch): a
    process draws its own samples alone, and how many processes there are changes nothing.
    """
    seeds = data.seeds(seed, "draws", step, batch_size)[mine]
    u = torch.empty(len(seeds), 3)
    eps_x, eps_vae, eps_z = (torch.empty(len(seeds), channels, net.x_size, net.x_size)
                             for channels in (net.x_channels, net.x_channels * from_codec, net.r))
    generator = torch.Generator()
    for i, of_sample in enumerate(seeds):
        generator.manual_seed(of_sample)
        torch.rand(3, generator=generator, out=u[i])
        for eps in (eps_x, eps_vae, eps_z):                  # x's first: the same for every fusion
            torch.randn(eps.shape[1:], generator=generator, out=eps[i])
    return *u.T.contiguous(), eps_x, eps_z if net.r else None, eps_vae if from_codec else None


def joint_loss(net, process, x, z, y, t, eps_x, eps_z, dropped, **tap):
    """ReDi's joint loss, per sample: (B,) for x and (B,) for z; with tap=k, the net's tokens after
    block k as a third. Where `dropped` (B,) is true, z_t = 0 is fed and z costs nothing. z None: no
    features, and 0 for them."""
    x_t = process.add_noise(x, eps_x, t)
    z_t = None if z is None else model.drop_z(process.add_noise(z, eps_z, t), dropped)
    pred_x, pred_z, *tokens = net(x_t, z_t, t, y, **tap)
    loss_x = process.loss(pred_x.float(), x, eps_x, t)
    if z is None:
        return loss_x, torch.zeros_like(loss_x), *tokens
    return loss_x, process.loss(pred_z.float(), z, eps_z, t).masked_fill(dropped, 0), *tokens


def repa_loss(projected, f):
    """REPA's loss per sample (2410.06940, equation 8): minus the cosine between projected tokens
    (B, L, d) and the encoder's features f (B, d, h, w) on their grid, mean over the tokens."""
    f = data.resize_z(f, math.isqrt(projected.shape[1])).flatten(2).transpose(1, 2)
    return -F.cosine_similarity(projected.float(), f, -1).mean(1)


class Objective(nn.Module):
    """What is minimised, with everything that is trained in one module, as several processes need
    it. d: channels of the features for REPA, 0 without."""
    def __init__(self, net, settings, d=0):
        super().__init__()
        self.net, self.settings = net, settings
        _, size, _ = model.parse_name(settings["model"])
        self.tap = {"tap": REPA_BLOCK[size]} if d else {}
        self.projector = model.projector(model.SIZES[size][1], d) if d else None

    def forward(self, x, z, y, f, u, u_y, u_z, eps_x, eps_z):
        """A batch and its draws (draw()'s) -> the loss (B,) per sample, t (B,), tally()'s sums."""
        net, settings = self.net, self.settings
        t = net.process.draw_t(u)
        y = torch.where((u_y < settings["p_drop_y"]) | (net.n_classes == 0), net.n_classes, y)
        dropped = u_z < settings["p_drop_z"]
        loss_x, loss_z, *tokens = joint_loss(net, net.process, x, z, y, t, eps_x, eps_z, dropped,
                                             **self.tap)
        loss_repa = torch.zeros_like(loss_x)
        if self.projector:
            loss_repa = repa_loss(self.projector(*tokens), f)
        # dropped samples count in the mean, with no loss_z: z's part is a sum over kept / all of B
        loss = loss_x + settings["lam_z"] * loss_z + settings["repa"] * loss_repa
        counts = tally(loss, loss_x, loss_z, loss_repa, dropped, net.process.data_time(t))
        return loss, t, counts


@torch.no_grad()
def update_ema(ema, net, decay, step):
    """ema <- d ema + (1 - d) net with d = min(decay, (1 + step) / (10 + step)), step 0 the first: a
    short run must forget its start."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - d)


@torch.no_grad()
def tally(loss, loss_x, loss_z, loss_repa, dropped, data_time):
    """What a batch adds to the log's running sums: one float64 vector (14,), read as a whole.
    data_time (B,): 0 for noise, 1 for data; its quarter 0 is the noisiest."""
    in_quarter = F.one_hot((4 * data_time).long().clamp(max=3), 4).double()         # (B, 4)
    totals = torch.stack([torch.ones_like(loss), ~dropped, loss, loss_x, loss_z, loss_repa])
    return torch.cat([totals.double().sum(1), in_quarter.T @ loss.double(), in_quarter.sum(0)])


N_SUMS = 15                             # tally's, and last the gradient norm


def log_entry(step, sums, settings, images_per_s, waited):
    """A line of log.jsonl. Losses are means since the last line; loss_z over the samples that kept
    z; loss_q0..q3 the joint loss by quarter of t (null where no sample fell); grad_norm before
    clipping; waited_percent the share of time in which the next batch was not there yet, at most
    which a GPU has waited for it."""
    n, kept, loss, loss_x, loss_z, loss_repa, *quarters, grad_norm = sums.tolist()
    entry = {"step": step, "loss": loss / n, "loss_x": loss_x / n}
    if settings["fusion"] != "none":
        entry["loss_z"] = loss_z / kept if kept else None
    if settings["repa"]:
        entry["loss_repa"] = loss_repa / n
    for q, (total, count) in enumerate(zip(quarters[:4], quarters[4:])):
        entry[f"loss_q{q}"] = total / count if count else None
    return entry | {"grad_norm": grad_norm / n, "images_per_s": round(images_per_s, 1),
                    "waited_percent": round(100 * waited, 1)}


def truncate_log(path, step):
    """Drop what a killed run logged after its checkpoint of that step, and a torn last line."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path) as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    kept.append(line)
    write_whole(path, lambda file: file.write("".join(kept).encode()))


def newest_checkpoint(out):
    """The newest whole checkpoint in out: its path, its content, and what is wrong with one that
    is newer ("" if none is); three None if there is none. UserError if all are damaged."""
    # a run killed while it saved may have left the one before alone
    paths = [path for path in (f"{out}/ckpt.pt", f"{out}/ckpt_prev.pt") if os.path.exists(path)]
    trouble = []
    for path in paths:
        try:
            return path, sample.load_checkpoint(path), "; ".join(trouble)
        except data.UserError as error:
            trouble.append(str(error))
    if trouble:
        kept = glob.glob(f"{glob.escape(out)}/ckpt_[0-9]*.pt")
        raise data.UserError(f"{'; '.join(trouble)}; to go on from one that was kept, copy it to "
                             f"{paths[0]}: {max(kept)}" if kept else "; ".join(trouble))
    return None, None, None


def save_checkpoint(out, checkpoint, keep=False):
    """out/ckpt.pt, as sample.load_checkpoint describes it; what was there becomes ckpt_prev.pt.
    keep: as ckpt_STEP.pt too. OSError if it cannot be written; what was there stays."""
    def write(file):
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:                    # how torch says that the disk is full
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    path, new = f"{out}/ckpt.pt", f"{out}/ckpt_new.pt"
    write_whole(new, write)
    if keep:
        kept = f"{out}/ckpt_{checkpoint['step']:07d}.pt"
        try:
            os.link(new, kept + ".part")                 # the same bytes on the disk
        except OSError:                                  # a file system without links
            shutil.copyfile(new, kept + ".part")
        os.replace(kept + ".part", kept)
    if os.path.exists(path):
        os.replace(path, f"{out}/ckpt_prev.pt")
    os.replace(new, path)


def preview(ema, settings, meta, device, bf16, path, rows=4):
    """Save a sheet of samples from the EMA, from the same noise at every call; up to ten classes,
    one a column."""
    columns = min(ema.n_classes, 10) or 10
    y = data.classes_in_turn(columns * rows, min(ema.n_classes, 10))
    x, z = sample.generate(ema, y, settings["sample_steps"], batch_size=columns * rows // 2,
                           device=device, bf16=bf16)
    picture = sample.sheet(data.decode(x, meta, device), z, meta["z_std"], columns)
    write_whole(path, lambda file: picture.save(file, "PNG"))


def judge_of(settings, source, device, rank=0):
    """The fid.Judge that --eval_* ask for; only the first process's has a reference. UserError if
    its space or reference cannot be had, or the codec, without which there are no images."""
    import fid                           # brings scikit-learn and SciPy: not before they are used
    reference = settings["eval_reference"] or ("digits" if settings["data"] == "digits" else
                                               "train")
    if reference == "digits":
        if settings["data"] != "digits":
            raise data.UserError("--eval_reference digits: the data are others; give images")
        for name in ("eval_features", "eval_weights", "eval_features_kwargs"):
            if settings[name] != DEFAULTS[name]:
                raise data.UserError(f"--{name} needs --eval_reference: digits' own judges know "
                                     "their space")
        return fid.Judge(reference)
    data.codec_of(source.meta, device)
    of_model = data.key_values(settings["eval_features_kwargs"], "eval_features_kwargs")
    space = fid.Space(settings["eval_features"], settings["eval_weights"], of_model, device,
                      flags="eval_")
    if rank > 0:
        return fid.Judge(None, space)
    if reference != "train":
        return fid.Judge(fid.statistics_of(reference, space, batch_size=JUDGED_AT_ONCE), space)
    n = min(settings["eval_n"], source.n)
    latents = (source.batch(part)[0] for part in source.examples(n).split(JUDGED_AT_ONCE))
    images = (torch.from_numpy(data.decode(x, source.meta, device)).permute(0, 3, 1, 2)
              for x in latents)
    return fid.Judge(fid.measure(images, n, space, "training images", keep=False), space)


def evaluate(net, judge, n, meta, device, rank=0, n_processes=1, told=(), **how):
    """The judge's metrics of n samples, classes in turn, from the same noise at every call; how:
    sample_batches()'s arguments. All processes make some of them, and those but the first return
    {}; None if one was told to stop meanwhile."""
    y = data.classes_in_turn(n, net.n_classes)
    seen, batches = {}, range(rank, -(-n // JUDGED_AT_ONCE), n_processes)
    with tqdm(total=len(batches), desc="judging", unit="batch", disable=rank > 0,
              leave=False) as bar:
        for rows, (x, *_) in sample.sample_batches(
                net, y, batches, batch_size=JUDGED_AT_ONCE, device=device, **how):
            seen[rows.start] = judge.see(data.decode(x[:len(rows)], meta, device))
            bar.update()
            if told:
                break
    found = [seen]
    if dist.is_initialized():
        found = [None] * n_processes
        dist.all_gather_object(found, seen)
    seen = {start: rows for of_rank in found for start, rows in of_rank.items()}
    seen = np.concatenate([seen[start] for start in sorted(seen)])
    if len(seen) < n:
        return None
    return {} if rank > 0 else judge.metrics(seen, y.numpy() if net.n_classes else None)


def finish(ema, settings, meta, out, device, bf16):
    """The closing sheet and, for digits, the numbers of results.json."""
    if settings["data"] == "digits":
        import fid
        metrics = evaluate(ema, fid.Judge("digits"), N_JUDGED, meta, device,
                           steps=settings["sample_steps"], bf16=bf16)
        results = {"step": settings["steps"], "n_images": N_JUDGED} | metrics
        text = json.dumps(results, indent=1).encode()
        write_whole(f"{out}/results.json", lambda file: file.write(text))
        print("\n".join(f"{name:32s} {value:.2f}" for name, value in metrics.items()))
    try:
        preview(ema, settings, meta, device, bf16, f"{out}/sheet.png")
        print(f"{out}/sheet.png: generated images above their feature maps")
    except data.UserError as error:                                  # no codec: nothing is lost
        print(f"{out}/ckpt.pt is complete, but there is no sheet.png: {error}")


@contextlib.contextmanager
def noted_signals():
    """A list that gets SIGTERM and SIGINT (Ctrl-C), which end nothing meanwhile: the loop saves and
    ends when it sees one. A second Ctrl-C ends the process at once; SIGTERM may come twice, from
    the cluster and from torchrun."""
    def note(number, frame):
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    noted = []
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StepCheck:
    """Whether a step went well everywhere, and whether any process was told to stop: asked at once
    and read a step later, so that nobody waits for the device."""
    def __init__(self, step, loss, t, rows, norm, told):
        self.step, self.loss, self.t, self.rows, self.norm = step, loss, t, rows, norm
        bad = ~(loss.isfinite().all() & norm.isfinite())
        flags = torch.stack([bad.float(), torch.full_like(norm, bool(told))])
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.flags, self.copied = flags.to("cpu", non_blocking=True), None
        if flags.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def told_to_stop(self):
        """Whether a process was. UserError, the same everywhere, if the step's loss or gradient
        was not finite."""
        if self.copied:
            self.copied.synchronize()
        bad, told = self.flags.tolist()
        if bad:
            found = [self.blame()]
            if dist.is_initialized():
                found = [None] * dist.get_world_size()
                dist.all_gather_object(found, self.blame())
            raise data.UserError(
                f"step {self.step} is not finite: {'; '.join(filter(None, found)) or self.batch()};"
                " the last checkpoint is from before. Look at those images; go on with --grad_clip "
                "1, or start over with a lower --lr")
        return told > 0

    def blame(self):
        """The samples of this process whose loss is not finite, "" if there are none."""
        bad = ~self.loss.isfinite()
        pairs = [f"row {row} at t {t:.4g}"
                 for row, t in zip(self.rows[bad.cpu().numpy()], self.t[bad].tolist())]
        more = f" and {len(pairs) - 4} more" if len(pairs) > 4 else ""
        return f"the loss of {', '.join(pairs[:4])}{more}" if pairs else ""

    def batch(self):
        return (f"the gradient's norm is {self.norm.item()}, with finite losses (t from "
                f"{self.t.min().item():.4g} to {self.t.max().item():.4g}, rows "
                f"{self.rows[:4].tolist()} and on)")


def of_each(parts, function):
    """function(part) of each part, None of None."""
    return [None if part is None else function(part) for part in parts]


class Trainer:
    """What a run consists of in one process, but for the loop: data, networks, optimizer. args: the
    flags OF_THE_MACHINE; checkpoint: where to go on, or None. UserError if that does not fit."""
    def __init__(self, settings, args, device, checkpoint=None, rank=0, n_processes=1):
        self.settings, self.args, self.device = settings, args, device
        self.source = data.open_data(settings["data"], settings["r"], settings["repa"] > 0)
        meta = self.meta = self.source.meta
        self.arch = {
            "name": settings["model"], "fusion": settings["fusion"], "r": settings["r"],
            "n_classes": 0 if settings["unconditional"] else len(meta["classes"]),
            "x_channels": meta["x_channels"], "x_size": meta["x_size"]}
        if checkpoint and (checkpoint["arch"] != self.arch or checkpoint["meta"] != meta):
            raise data.UserError(f"{settings['data']} is not the data that {args.out} was trained "
                                 "on, its meta.json differs; choose another --out, or --restart")
        self.n = settings["batch_size"] // n_processes               # this process's of a batch
        self.mine = slice(rank * self.n, (rank + 1) * self.n)
        self.micro = args.micro_batch_size or self.n
        torch.manual_seed(settings["seed"])                          # for the initial weights alone
        try:
            net = self.net = model.build(**self.arch)
        except ValueError as error:
            raise data.UserError(str(error)) from None
        d = self.source.f.shape[1] if settings["repa"] else 0
        self.objective = Objective(net, settings, d)
        if settings["init"] and not checkpoint:
            given, _ = sample.load_model(settings["init"], settings["model"])
            try:
                model.adopt(net, given)
            except ValueError as error:
                raise data.UserError(f"--init {settings['init']}: {error}") from None
        self.ema = copy.deepcopy(net).eval().requires_grad_(False).to(device)
        self.params = list(self.objective.to(device).parameters())
        self.optimizer = torch.optim.AdamW(self.params, lr=settings["lr"], betas=(0.9, 0.999),
                                           weight_decay=0, fused=True)
        self.step, self.sums = 0, torch.zeros(N_SUMS, dtype=torch.float64, device=device)
        if checkpoint:
            self.step = checkpoint["step"]
            for name, part in self.parts().items():      # copied: AdamW would use the file's pages
                part.load_state_dict(copy.deepcopy(checkpoint[name]))
            if rank == 0:
                self.sums += checkpoint["sums"].to(device)
        net.grad_checkpointing = args.grad_checkpointing
        if args.compile:
            torch._dynamo.config.optimize_ddp = False    # it would cut the blocks into pieces
            for block in net.blocks:                                 # one block's code serves all
                block.compile(dynamic=False)
        self.parallel = self.objective
        if n_processes > 1:
            self.parallel = DistributedDataParallel(self.objective, broadcast_buffers=False,
                                                    gradient_as_bucket_view=True)

    def parts(self):
        """What has a state to save, by its name in a checkpoint."""
        parts = {"net": self.net, "ema": self.ema, "optimizer": self.optimizer}
        return parts | ({"projector": self.objective.projector} if self.settings["repa"] else {})

    def checkpoint(self):
        """What sample.load_checkpoint describes."""
        machine = {name: getattr(self.args, name) for name in OF_THE_MACHINE}
        return {"arch": self.arch, "settings": self.settings, "machine": machine,
                "meta": self.meta, "step": self.step, "sums": self.sums.cpu()} | {
                    name: part.state_dict() for name, part in self.parts().items()}

    def assemble(self, step):
        """This process's part of a step: the rows of its images, they and their draws, on the CPU:
        pinned if they are for a GPU."""
        settings, source = self.settings, self.source
        numbers = data.rows_of_step(settings["seed"], step, settings["batch_size"], source.n)
        draws = draw(settings["seed"], step, settings["batch_size"], self.mine, self.net,
                     source.has_std)
        parts = [*source.read(numbers[self.mine]), *draws]
        if self.device.type == "cuda":
            parts = of_each(parts, torch.Tensor.pin_memory)
        return source.rows(numbers[self.mine].numpy()), parts

    def gradients(self, parts):
        """Fill the gradients of the mean loss over all processes, and add to the sums; parts:
        assemble()'s. Returns this process's loss (B,) and t (B,), and the gradients' norm before
        they are clipped."""
        parts = of_each(parts, lambda part: part.to(self.device, non_blocking=True))
        self.optimizer.zero_grad()
        losses, ts = [], []
        for start in range(0, self.n, self.micro):
            *stored, u, u_y, u_z, eps_x, eps_z, eps_vae = of_each(
                parts, lambda part: part[start:start + self.micro])
            last = start + self.micro == self.n              # gradients meet once a step
            with contextlib.nullcontext() if last or not dist.is_initialized() \
                    else self.parallel.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                    loss, t, counts = self.parallel(*self.source.unpack(stored, eps_vae),
                                                    u, u_y, u_z, eps_x, eps_z)
                (loss.sum() / self.n).backward()
            losses.append(loss.detach())
            ts.append(t)
            self.sums[:-1] += counts
        norm = nn.utils.get_total_norm([param.grad for param in self.params])
        if self.settings["grad_clip"]:
            nn.utils.clip_grads_with_norm_(self.params, self.settings["grad_clip"], norm)
        self.sums[-1] += self.n * norm
        return torch.cat(losses), torch.cat(ts), norm

    def update(self):
        """Take the step that the gradients say."""
        self.optimizer.step()
        update_ema(self.ema, self.net, self.settings["ema"], self.step)
        self.step += 1


def is_evaluated(path, step):
    """Whether log.jsonl has a measurement of that step."""
    if not os.path.exists(path):
        return False
    with open(path) as file:
        return any(row["step"] == step and "eval_seconds" in row for row in map(json.loads, file))


def append(path, entry):
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def train(trainer, out, rank, n_processes, judge=None):
    """To settings["steps"], with checkpoints, previews and log lines in out; judge: for
    --eval_every. Returns None, or the signal that ended it before."""
    settings, device, sums = trainer.settings, trainer.device, trainer.sums
    log = f"{out}/log.jsonl"
    evaluated = data.share(rank == 0 and is_evaluated(log, trainer.step))    # it was killed since
    first, steps, check = trainer.step, settings["steps"], None
    clock, logged, waited = time.perf_counter(), first, 0.0          # when and where the log stands
    batches = data.prefetch(trainer.assemble, range(first, steps), trainer.args.workers)
    with noted_signals() as told, contextlib.closing(batches), tqdm(
            total=steps, initial=first, unit="step", disable=rank > 0, mininterval=1) as bar:
        stopping, metrics = False, {}
        while True:
            step, ending = trainer.step, stopping or trainer.step >= steps
            keep = settings["keep_every"] > 0 and step % settings["keep_every"] == 0
            to_judge = (judge and step % settings["eval_every"] == 0 and step > 0
                        and (step > first or not evaluated))
            due = step > first and (ending or keep or to_judge
                                    or step % settings["ckpt_every"] == 0)
            if due:
                check.told_to_stop()                                 # is it finite?
            paused = time.perf_counter()
            if due:
                if n_processes > 1:
                    dist.reduce(sums, 0)                             # rank 0 has them from here on
                if rank == 0:
                    save_checkpoint(out, trainer.checkpoint(), keep)
                else:
                    sums.zero_()
            if to_judge:                                             # saved first: it takes long
                start = time.perf_counter()
                metrics = evaluate(trainer.ema, judge, settings["eval_n"], trainer.meta, device,
                                   rank, n_processes, told, steps=settings["sample_steps"],
                                   bf16=trainer.args.bf16)
                if metrics is None:                                  # it is made on going on
                    break
                if rank == 0:
                    append(log, {"step": step} | metrics | {
                        "eval_seconds": round(time.perf_counter() - start, 1)})
                    bar.write(f"step {step}: " + ", ".join(
                        f"{name} {value:.2f}" for name, value in metrics.items()))
            if ending:
                break
            if rank == 0 and step > first and step % settings["preview_every"] == 0:
                try:
                    preview(trainer.ema, settings, trainer.meta, device, trainer.args.bf16,
                            f"{out}/sheet_{step:07d}.png")
                except data.UserError as error:                      # no codec: no reason to stop
                    bar.write(f"no preview: {error}")
            clock += time.perf_counter() - paused

            waiting = time.perf_counter()
            rows, parts = next(batches)
            waited += time.perf_counter() - waiting
            loss, t, norm = trainer.gradients(parts)
            if check:
                stopping = check.told_to_stop()                      # of the step before
            check = StepCheck(step, loss, t, rows, norm, told)
            trainer.update()
            step += 1
            bar.update()

            if step % min(settings["log_every"], steps) == 0:
                stopping = check.told_to_stop() or stopping
                if n_processes > 1:
                    dist.reduce(sums, 0)
                if rank == 0:
                    seconds = time.perf_counter() - clock
                    entry = log_entry(step, sums, settings,
                                      (step - logged) * settings["batch_size"] / seconds,
                                      waited / seconds)
                    append(log, entry)
                    bar.set_postfix_str(f"loss {entry['loss']:.4f}")
                sums.zero_()
                clock, logged, waited = time.perf_counter(), step, 0.0
    return (told or [signal.SIGTERM])[0] if step < steps or metrics is None else None


def main(args):
    rank, n_processes = data.rank_and_count()
    restart = data.begins_anew(args)
    path, checkpoint, trouble = (None, None, None) if restart else newest_checkpoint(args.out)
    settings, sheet = resolve(typed(args), checkpoint), f"{args.out}/sheet.png"
    check(settings, n_processes, args.micro_batch_size, args.workers)
    if checkpoint:
        finished = os.path.exists(sheet) and os.path.getmtime(sheet) > os.path.getmtime(path)
        if checkpoint["step"] >= settings["steps"] + (not finished):
            raise data.UserError(f"{args.out} is done, with {checkpoint['step']} steps: raise "
                                 "--steps, or --restart")
    device = data.begin(args, n_processes, "nccl")
    if rank == 0:
        data.open_data(settings["data"], settings["r"], settings["repa"] > 0)   # made by one
        os.makedirs(args.out, exist_ok=True)
        if trouble:
            print(f"{trouble}: going on from {path}, step {checkpoint['step']}", file=sys.stderr)
            os.replace(f"{args.out}/ckpt.pt", f"{args.out}/ckpt.pt.damaged")
        elif restart:                                      # keeps the old run's
            for old in glob.glob(f"{glob.escape(args.out)}/ckpt*.pt") + [f"{args.out}/log.jsonl"]:
                if os.path.exists(old):
                    os.replace(old, f"{old}.old")
    if n_processes > 1:
        dist.barrier()
    clear_errors = functools.partial(data.clear_errors, args,
                                     f"the checkpoints in {args.out} are whole",
                                     "a smaller --micro_batch_size helps, and --grad_checkpointing")
    with clear_errors():
        trainer = Trainer(settings, args, device, checkpoint, rank, n_processes)
    del checkpoint
    if n_processes > 1:
        seen = [None] * n_processes
        dist.all_gather_object(seen, [trainer.step, settings, trainer.meta])
        if any(other != seen[0] for other in seen):
            raise data.UserError(f"the processes see different checkpoints (steps "
                                 f"{', '.join(str(step) for step, *_ in seen)}), flags or data: "
                                 "--out and --data must be on a disk that all machines share")
    if rank == 0:
        n_params = sum(param.numel() for param in trainer.net.parameters())
        print(f"{settings['model']} {settings['fusion']}, {n_params:,} parameters, on "
              f"{trainer.source.n:,} images: steps {trainer.step} to {settings['steps']}, "
              f"{n_processes} process(es) on {device}{' in bfloat16' * args.bf16}"
              f"{', compiled' * args.compile}, writing {args.out}\n"
              f"settings: {json.dumps(settings)}, with "
              f"{json.dumps({name: getattr(args, name) for name in OF_THE_MACHINE})}", flush=True)
        truncate_log(f"{args.out}/log.jsonl", trainer.step)
    with clear_errors():
        judge = None
        if settings["eval_every"]:
            judge = judge_of(settings, trainer.source, device, rank)
        ended_by = train(trainer, args.out, rank, n_processes, judge)
    if n_processes > 1:
        dist.barrier()                                     # until rank 0 has saved
        dist.destroy_process_group()
    if ended_by:
        if rank == 0:
            print(f"{signal.Signals(ended_by).name}: saved {args.out}/ckpt.pt at step "
                  f"{trainer.step}; {data.same_command(args)} goes on from there", file=sys.stderr)
        sys.exit(128 + ended_by)                           # as shells report a signal
    if rank == 0:
        finish(trainer.ema, settings, trainer.meta, args.out, device, args.bf16)


if __name__ == "__main__":
    data.run_cli(record(main), args)
