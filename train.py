"""Trains DiT or SiT with ReDi: the joint loss over image latents x and features z, with z-dropout.

    python train.py                                         # SiT-T/2 on digits, in minutes
    torchrun --nproc_per_node=8 train.py --model SiT-XL/2   # the paper's, on prepared/imagenet256

Writes DIR/ckpt.pt (the one before it is ckpt_prev.pt), log.jsonl and its curves loss.png, preview
sheets and, at the end, sheet.png and results.json. Started again with the same --out it continues
from ckpt.pt; SIGTERM and Ctrl-C save first.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import glob
import json
import math
import os
import signal
import sys
import time

import run
from run import UserError

REPA_WEIGHT = 0.5                                            # REPA's own
ENCODER_DEPTH = {"T": 2, "S": 4, "B": 4, "L": 8, "XL": 8}    # blocks before REPA's loss; XL: REPA's


# what a run uses unless a flag says otherwise: (the value of ReDi and SiT or our choice, argparse's
# type, meaning)
SETTINGS = {
    "model": ("SiT-T/2", str, "DiT or SiT - size T, S, B, L or XL / patch 2, 4 or 8"),
    "fusion": ("merged", str, "how z joins x: none (plain DiT/SiT), merged or separate tokens"),
    "unconditional": (False, bool, "ignore the classes"),
    "data": ("prepared/imagenet256", str,
             "digits, or a prepared folder; to continue a run it may have moved"),
    "z_channels": (8, run.natural, "r, the PCA components of the features used"),
    "lam_z": (1.0, run.weight, "weight of z's loss; 0 is off"),
    "repa": (0.0, run.weight, f"weight of REPA's loss, REPA's own is {REPA_WEIGHT}; 0 is off"),
    "p_drop_z": (0.2, run.share_of_one,
                 "chance that a sample's z is dropped; 0 is off and rules out --w_r"),
    "p_drop_y": (0.1, run.share_of_one,
                 "chance that its class is dropped; 0 is off and rules out --w_cfg"),
    "batch_size": (256, run.count, "images a step, all processes together"),
    "lr": (1e-4, run.positive, "AdamW's learning rate, constant"),
    "ema": (0.9999, run.share_of_one,
            "decay per step of the averaged weights, ramped up from 0.1; 0 is off"),
    "init": (None, str, "start from these weights: a checkpoint of train.py, or what the authors "
                        "of ReDi, SiT or DiT publish; who continues does not need them"),
    "seed": (0, run.natural, "of initial weights, data order and all noise"),
    "steps": (400_000, run.count, "optimizer steps in all"),
    "grad_clip": (0.0, run.weight, "largest gradient norm; 0 is off"),
    "sample_steps": (250, run.count, "sampling steps (network calls an image, NFE) of sheets"),
    "log_every": (100, run.count, "steps between lines of log.jsonl"),
    "ckpt_every": (5_000, run.count, "steps between checkpoints; two are kept"),
    "keep_every": (0, run.natural,
                   "steps between snapshots of the EMA, kept as ema_STEP.pt; 0 is off"),
    "preview_every": (25_000, run.count, "steps between preview sheets"),
}
ON_DIGITS = {"data": "digits", "z_channels": 4, "batch_size": 128, "lr": 3e-3, "ema": 0.995,
             "steps": 1_400, "sample_steps": 40, "log_every": 25, "ckpt_every": 250,
             "preview_every": 500}      # of size T
CHANGEABLE = {"data", "init", "steps", "grad_clip", "sample_steps", "log_every", "ckpt_every",
              "keep_every", "preview_every"}                 # where a run is continued


def parser():
    p = run.Parser(description=__doc__)
    for name, (default, kind, meaning) in SETTINGS.items():
        digits = f"; {ON_DIGITS[name]} for size T on digits" if name in ON_DIGITS else ""
        options = {"type": kind} if kind is not bool else {"action": argparse.BooleanOptionalAction}
        if name == "repa":
            options |= {"nargs": "?", "const": REPA_WEIGHT}
        p.add_argument(f"--{name}", **options, help=f"{meaning} (default: {default}{digits})")
    p.flag("out", "out", "output folder", metavar="DIR")
    p.switch("restart", False, "start over where DIR holds a run, whose files get names with .old")
    p.add_argument("--micro_batch_size", type=run.count,
                   help="gradient accumulation: images that a process computes at once of its part "
                        "of --batch_size (default: all)")
    p.flag("workers", 4, "threads that load the next batches", type=run.count)
    p.switch("grad_checkpointing", False, "compute activations twice instead of keeping them: less "
                                          "memory, a third more work")
    p.switch("judge", True, "at the end, compare 1,000 generated digits with real ones; of other "
                            "data nothing is measured")
    p.device_flags()
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
import pretrained
import sample


class JointLoss(nn.Module):
    """The losses of a batch, and everything that is trained in one module, as DDP needs it.
    d: channels of the encoder's features for REPA, 0 without."""
    def __init__(self, net, settings, d=0):
        super().__init__()
        self.net, self.settings = net, settings
        _, size, _ = model.parse_name(settings["model"])
        self.encoder_depth = ENCODER_DEPTH[size] if d else None
        self.projector = model.projector(model.SIZES[size][1], d) if d else None

    def forward(self, x, z, y, f, u, eps_x, eps_z):
        """x (B, C, H, W), z (B, r, H, W) or None, y (B,), features f (B, d, h, w) for REPA or None,
        and sample_noise()'s numbers -> losses by name, each (B,): their weighted sum "loss" is what
        is minimised. "kept": whether z was; "time": from 0 (noise) to 1 (data)."""
        net, diffusion, settings = self.net, self.net.diffusion, self.settings
        u_t, u_y, u_z = u.T
        t = diffusion.t_from_uniform(u_t)
        y = torch.where((u_y < settings["p_drop_y"]) | (net.n_classes == 0), net.n_classes, y)
        dropped = u_z < settings["p_drop_z"]
        x_t, z_t = diffusion.add_noise(x, eps_x, t), None
        if net.r:
            z_t = model.drop_z(diffusion.add_noise(z, eps_z, t), dropped)
        pred_x, pred_z, *tokens = net(x_t, z_t, t, y, self.encoder_depth)
        loss_x = diffusion.loss(pred_x.float(), x, eps_x, t)
        loss_z = loss_repa = torch.zeros_like(loss_x)
        if net.r:                           # a dropped sample pays nothing, and counts in the mean
            loss_z = diffusion.loss(pred_z.float(), z, eps_z, t).masked_fill(dropped, 0)
        if self.projector:
            loss_repa = repa_loss(self.projector(*tokens), f)
        loss = loss_x + settings["lam_z"] * loss_z + settings["repa"] * loss_repa
        return {"loss": loss, "loss_x": loss_x, "loss_z": loss_z, "loss_repa": loss_repa,
                "kept": ~dropped, "time": diffusion.normalised_time(t)}


def repa_loss(projected, f):
    """REPA's loss per sample (2410.06940, equation 8): minus the cosine between projected tokens
    (B, L, d) and the encoder's features f (B, d, h, w) on their grid, mean over the tokens."""
    f = data.resize_z(f, math.isqrt(projected.shape[1])).flatten(2).transpose(1, 2)
    return -F.cosine_similarity(projected.float(), f, -1).mean(1)


@torch.no_grad()
def update_ema(ema, net, decay, step):
    """ema <- d ema + (1 - d) net with d = min(decay, (1 + step) / (10 + step)), step 0 the first: a
    short run must forget its start."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - d)


def sample_noise(seed, step, batch_size, mine, net, from_vae=False):
    """Everything random about the samples `mine` (a slice) of a step's global batch: u (B, 3),
    uniform, for the times, the classes and the z that are dropped; eps_x, eps_z of x_t's and z_t's
    shape; eps_vae of x's, for drawing x from its mean and standard deviation (if from_vae).

    Each sample has a generator of its own, a function of (seed, step, its place in the batch): a
    process draws its own samples alone, and how many processes there are changes nothing.
    """
    seeds = run.seeds(seed, "draws", step, batch_size)[mine]
    channels = {"eps_x": net.x_channels, "eps_vae": net.x_channels * from_vae, "eps_z": net.r}
    u, generator = torch.empty(len(seeds), 3), torch.Generator()
    eps = {name: torch.empty(len(seeds), n, net.x_size, net.x_size) for name, n in channels.items()}
    for i, of_sample in enumerate(seeds):
        generator.manual_seed(of_sample)
        u[i].uniform_(generator=generator)
        for part in eps.values():                # x's first, so that it is the same for any fusion
            part[i].normal_(generator=generator)
    return {"u": u} | eps


class Trainer:
    """A run but for its loop: data, networks, optimizer, steps. args: the flags that are no
    SETTINGS; checkpoint: where to continue, or None. UserError if that does not fit."""
    def __init__(self, settings, args, device, checkpoint=None):
        rank, n_processes = run.rank_and_count()
        repa = settings["repa"] > 0
        self.settings, self.args, self.device = settings, args, device
        self.dataset = data.open_data(settings["data"], settings["z_channels"], repa)
        meta = self.meta = self.dataset.meta
        self.n = settings["batch_size"] // n_processes               # this process's of a batch
        self.mine = slice(rank * self.n, (rank + 1) * self.n)
        torch.manual_seed(settings["seed"])                          # for the initial weights alone
        n_classes = 0 if settings["unconditional"] else len(meta["classes"])
        with run.blamed_on("no such network", "change --model, --fusion or --z_channels"):
            net = self.net = model.build(
                settings["model"], settings["fusion"], settings["z_channels"], n_classes,
                meta["x_channels"], meta["x_size"])
        self.loss = JointLoss(net, settings, meta["d"] if repa else 0)
        if settings["init"] and not checkpoint:
            try:
                init, _ = pretrained.load_model(settings["init"], settings["model"])
                pretrained.load_pretrained(net, init)
            except ValueError as error:
                raise UserError(f"--init {settings['init']}: {error}") from None
        if checkpoint:                           # what the data are binds it, not where they lie
            before, now = checkpoint["meta"] | checkpoint["config"], meta | net.config
            differ = [name for name in [*net.config, "sha256", "scale", "shift", "classes"]
                      if before.get(name) != now[name]]
            if differ:
                raise UserError(
                    f"{self.dataset.folder} is not the data that {args.out} was trained on, "
                    f"{', '.join(differ)} differ: copy that folder from the machine where the run "
                    "began, or give its place with --data; or choose another --out")
        self.ema = copy.deepcopy(net).eval().requires_grad_(False).to(device)
        self.params = list(self.loss.to(device).parameters())
        self.optimizer = torch.optim.AdamW(self.params, lr=settings["lr"], betas=(0.9, 0.999),
                                           weight_decay=0, fused=True)
        # what has a state to save, by its name in a checkpoint
        self.parts = {"net": net, "ema": self.ema, "optimizer": self.optimizer}
        if self.loss.projector:
            self.parts["projector"] = self.loss.projector
        self.step, self.sums, self.tallies = 0, np.zeros((2, len(LOGGED))), []
        if checkpoint:
            self.step = checkpoint["step"]
            with run.blamed_on(f"the checkpoint in {args.out} does not fit this code",
                               "take the code that began it, or choose another --out"):
                for name, part in self.parts.items():
                    state = checkpoint[name]             # AdamW would use the file's pages
                    part.load_state_dict(copy.deepcopy(state) if name == "optimizer" else state)
                self.sums += np.array(checkpoint["sums"]) * (rank == 0)
        net.grad_checkpointing = args.grad_checkpointing
        if args.compile:
            torch._dynamo.config.optimize_ddp = False    # it would cut the blocks into pieces
            net.compile_blocks()
        self.parallel = self.loss
        if n_processes > 1:
            self.parallel = DistributedDataParallel(self.loss, broadcast_buffers=False,
                                                    gradient_as_bucket_view=True)

    def load_batch(self, step):
        """This process's part of a step: rows of the data, as they are stored, and noise, on the
        CPU; pinned if they are for a GPU."""
        seed, size = self.settings["seed"], self.settings["batch_size"]
        rows = data.rows_of_step(seed, step, size, self.dataset.n)[self.mine]
        noise = sample_noise(seed, step, size, self.mine, self.net, self.dataset.has_std)
        batch = dict(zip("xzyf", self.dataset.read(rows))) | noise
        pin = self.device.type == "cuda"
        return {name: part.pin_memory() if pin else part
                for name, part in batch.items() if part is not None}

    def training_step(self, batch):
        """One step on load_batch()'s part of it: the gradient of the mean loss over all processes,
        the optimizer, the EMA."""
        batch = {name: part.to(self.device, non_blocking=True) for name, part in batch.items()}
        size = self.args.micro_batch_size or self.n
        self.optimizer.zero_grad()
        for start in range(0, self.n, size):
            part = {name: values[start:start + size] for name, values in batch.items()}
            accumulate = dist.is_initialized() and start + size < self.n
            with self.parallel.no_sync() if accumulate else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                    xzyf = self.dataset.unpack([part.get(name) for name in "xzyf"],
                                               part["eps_vae"])
                    losses = self.parallel(*xzyf, part["u"], part["eps_x"], part["eps_z"])
                (losses["loss"].sum() / self.n).backward()
            self.tallies.append(tally(losses))
        norm = nn.utils.get_total_norm([param.grad for param in self.params])
        if self.settings["grad_clip"]:
            nn.utils.clip_grads_with_norm_(self.params, self.settings["grad_clip"], norm)
        self.tallies[-1][:, -1] = torch.stack([norm, torch.ones_like(norm)])
        self.optimizer.step()
        update_ema(self.ema, self.net, self.settings["ema"], self.step)
        self.step += 1

    def total_sums(self):
        """tally()'s over all processes and steps since the last line of the log, kept by rank 0.
        UserError if a loss or a gradient was not finite."""
        if self.tallies:
            self.sums += torch.stack(self.tallies).cpu().numpy().astype(np.float64).sum(0)
            self.tallies.clear()
        total = sum(run.gather(self.sums))
        self.sums = total * (run.rank_and_count()[0] == 0)
        if not np.isfinite(total).all():
            first = self.step - (self.step - 1) % self.settings["log_every"]
            raise UserError(
                f"the loss or its gradient became NaN or infinite in steps {first} to {self.step}; "
                "no checkpoint has it. Look with --log_every 1; continue with --grad_clip 1 or "
                "--no-bf16, or start over with a lower --lr")
        return total

    def state(self):
        """A checkpoint, as pretrained.load_checkpoint describes it."""
        return {"config": self.net.config, "settings": self.settings, "meta": self.meta,
                "step": self.step, "sums": self.sums.tolist()} | {
                    name: part.state_dict() for name, part in self.parts.items()}


LOGGED = ("loss", "loss_x", "loss_z", "loss_repa", *(f"loss_q{q}" for q in range(4)), "grad_norm")


@torch.no_grad()
def tally(losses):
    """(2, 9): sums of what is LOGGED over JointLoss's losses of a batch, and over how many samples
    each is; of the gradient's norm nothing yet. NaN and infinity stay in the sums."""
    loss = losses["loss"]
    every, none = torch.ones_like(loss), torch.zeros_like(loss)
    in_quarter = F.one_hot((4 * losses["time"]).long().clamp(max=3), 4).T.to(loss.dtype)  # (4, B)
    sums = [*(losses[name] for name in LOGGED[:4]), *(in_quarter * loss), none]
    counts = [every, every, losses["kept"].to(loss.dtype), every, *in_quarter, none]
    return torch.stack([*sums, *counts]).sum(1).view(2, -1)


def log_entry(step, sums, settings, images_per_s, waited):
    """A line of log.jsonl. Losses are means since the last line; loss_z over the samples that kept
    z; loss_q0..q3 the joint loss by quarter of t, 0 the noisiest (null where no sample fell);
    grad_norm before clipping; waited_percent the share of time in which the next batch was not
    there yet."""
    absent = {"loss_z": settings["fusion"] == "none", "loss_repa": not settings["repa"]}
    means = {name: value / count if count else None
             for name, value, count in zip(LOGGED, *sums.tolist()) if not absent.get(name)}
    return {"step": step} | means | {"images_per_s": round(images_per_s, 1),
                                     "waited_percent": round(100 * waited, 1)}


def train(trainer, out):
    """To settings["steps"], with checkpoints, previews and log lines in out. Returns the signal
    that ended it before, or None."""
    settings, first, rank = trainer.settings, trainer.step, run.rank_and_count()[0]
    steps, log_every = settings["steps"], min(settings["log_every"], settings["steps"])
    n_timed = seconds = waited = 0                       # since the last line of the log
    batches = run.prefetch(trainer.load_batch, range(first, steps), trainer.args.workers)
    with noted_signals() as signals, contextlib.closing(batches), tqdm(
            total=steps, initial=first, unit="step", disable=rank > 0, mininterval=1) as bar:
        for step in range(first + 1, steps + 1):
            begun = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - begun
            trainer.training_step(batch)
            bar.update()
            stop_requested = any(run.gather(bool(signals)))
            if step == first + 10:
                trainer.tallies[-1].tolist()             # wait for a GPU that is behind
            if step % log_every == 0:
                sums = trainer.total_sums()
            seconds += time.perf_counter() - begun
            n_timed += 1

            if rank == 0 and step == first + 10 < steps:
                left = datetime.timedelta(seconds=round(seconds / n_timed * (steps - step)))
                bar.write(f"the other {steps - step:,} steps take about {left} at this speed")
            if step % log_every == 0:
                if rank == 0:
                    speed = n_timed * settings["batch_size"] / seconds
                    entry = log_entry(step, sums, settings, speed, waited / seconds)
                    with open(f"{out}/log.jsonl", "a") as file:
                        file.write(json.dumps(entry) + "\n")
                    bar.set_postfix_str(f"loss {entry['loss']:.4f}")
                trainer.sums[:] = 0
            if step % log_every == 0 or step == first + 1:           # the first one compiles
                n_timed = seconds = waited = 0

            keep = settings["keep_every"] > 0 and step % settings["keep_every"] == 0
            if stop_requested or step == steps or keep or step % settings["ckpt_every"] == 0:
                trainer.total_sums()                                 # are they finite?
                if rank == 0:
                    save_checkpoint(out, trainer.state(), keep)
            if stop_requested and step < steps:
                return (signals or [signal.SIGTERM])[0]
            if rank == 0 and step % settings["preview_every"] == 0 and step < steps:
                preview(trainer, out, f"sheet_{step:07d}.png")


@contextlib.contextmanager
def noted_signals():
    """A list that gets SIGTERM and SIGINT (Ctrl-C), for the loop to save and end when it sees one.
    A second Ctrl-C ends the process at once; SIGTERM may come twice, of cluster and torchrun."""
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


def save_checkpoint(out, checkpoint, keep):
    """out/ckpt.pt, whole or not at all; what was there becomes ckpt_prev.pt. keep: ema_STEP.pt too,
    and first, or a kill would skip it."""
    def save(name, content):
        run.write_whole(f"{out}/{name}", lambda file: torch.save(content, file))

    if keep:
        save(f"ema_{checkpoint['step']:07d}.pt",
             {name: checkpoint[name] for name in pretrained.SNAPSHOT})
    save("ckpt_new.pt", checkpoint)
    if os.path.exists(f"{out}/ckpt.pt"):
        os.replace(f"{out}/ckpt.pt", f"{out}/ckpt_prev.pt")
    os.replace(f"{out}/ckpt_new.pt", f"{out}/ckpt.pt")


def newest_checkpoint(out):
    """The path of the newest whole checkpoint in out, None if there is none. One that is damaged is
    named, and becomes ckpt.pt.damaged if the one before it is whole. UserError if that is not."""
    found = [path for path in (f"{out}/ckpt.pt", f"{out}/ckpt_prev.pt") if os.path.exists(path)]
    try:
        if found:
            pretrained.load_checkpoint(found[0])
    except UserError as error:
        if len(found) < 2:
            raise
        step = pretrained.load_checkpoint(found[1])["step"]
        print(f"{error}: continuing from that, step {step}", file=sys.stderr)
        os.replace(found[0], f"{found[0]}.damaged")
        return found[1]
    return found[0] if found else None


def truncate_log(path, step):
    """Drop what a killed run logged after its checkpoint of that step, and what is no line of a
    log, such as a torn one."""
    def is_kept(line):
        with contextlib.suppress(ValueError, LookupError, TypeError):
            return line.endswith(b"\n") and json.loads(line)["step"] <= step

    if os.path.exists(path):
        with open(path, "rb") as file:
            kept = list(filter(is_kept, file))
        run.write_whole(path, lambda file: file.writelines(kept))


say_once = functools.cache(tqdm.write)                   # beside the progress bar


def preview(trainer, out, name):
    """Save a sheet of samples from the EMA, from the same noise at every call, up to ten classes,
    one a column; and the log's curves. What cannot be drawn it says: no reason to stop."""
    ema, meta, columns = trainer.ema, trainer.meta, min(trainer.ema.n_classes, 10) or 10
    y = data.classes_in_turn(4 * columns, min(ema.n_classes, 10))
    x, z = sample.generate(ema, y, trainer.settings["sample_steps"], batch_size=2 * columns,
                           device=trainer.device, bf16=trainer.args.bf16)
    try:
        images = data.decode(x, meta, trainer.device)
        run.write_picture(f"{out}/{name}",
                          sample.versions_grid([("", images, z)], meta["z_std"], columns))
    except UserError as error:
        say_once(f"no {name}: {error}")
    if os.path.exists(f"{out}/log.jsonl"):
        draw_log(out, ["loss_x", *["loss_z"] * (ema.r > 0), "images_per_s"])


def draw_log(out, names):
    """loss.png: what log.jsonl has of these names, over steps."""
    try:
        from matplotlib.figure import Figure             # no dependency of ours
    except ImportError:
        return say_once("no loss.png, it needs matplotlib: pip install matplotlib")
    with open(f"{out}/log.jsonl") as file:
        log = [json.loads(line) for line in file]
    figure = Figure(layout="constrained")
    for axes, name in zip(figure.subplots(len(names), sharex=True), names):
        points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        axes.plot(*zip(*points), marker=".")
        axes.set_ylabel(name)
    axes.set_xlabel("step")
    run.write_whole(f"{out}/loss.png", lambda file: figure.savefig(file, format="png"))


def finish(trainer, out, n_judged=1_000):
    """The closing sheet and, last, results.json: for digits with metrics of generated ones."""
    results = {"step": trainer.step}
    if trainer.args.judge and trainer.meta["name"] == "digits":
        import fid                           # brings scikit-learn: not before it is used
        y = data.classes_in_turn(n_judged, trainer.ema.n_classes)
        x, _ = sample.generate(trainer.ema, y, trainer.settings["sample_steps"], batch_size=125,
                               device=trainer.device, bf16=trainer.args.bf16, progress=True)
        metrics = fid.judge_digits(data.to_images(x), y.numpy() if trainer.ema.n_classes else None)
        print("\n".join(f"{name:36s} {value:.2f}" for name, value in metrics.items()))
        results |= {"n_images": n_judged} | metrics
    preview(trainer, out, "sheet.png")
    print(f"{out} is complete: ckpt.pt, log.jsonl, results.json and pictures")
    run.write_json(f"{out}/results.json", results)


def is_finished(out, step):
    """Whether finish() has ended at that step."""
    with contextlib.suppress(OSError, ValueError, TypeError), open(f"{out}/results.json") as file:
        return json.load(file)["step"] == step
    return False


def resolve(args, checkpoint=None):
    """All settings of a run: flags that were given, then the checkpoint's, then the table's.
    UserError for flags that contradict each other or the checkpoint."""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    stored = checkpoint["settings"] if checkpoint else {}
    unknown = sorted(stored.keys() - SETTINGS.keys())
    if unknown:
        raise UserError(f"{args.out} was trained with {', '.join(unknown)}, which this code does "
                        "not know: take the code that began it, or choose another --out")
    if checkpoint:
        given.pop("init", None)
        folder = stored.get("data", "digits")
        if "data" not in given and folder != "digits" and not os.path.isdir(folder):
            raise UserError(f"the data of {args.out} are no longer in {folder}: give their new "
                            "place with --data")
    defaults = {name: default for name, (default, _, _) in SETTINGS.items()}
    chosen = defaults | {"data": "digits"} | stored | given
    with run.blamed_on(f"--model {chosen['model']}", "the paper's is SiT-XL/2"):
        _, size, _ = model.parse_name(chosen["model"])
    is_tiny = size == "T" and (chosen["data"] == "digits" or
                               data.read_meta(chosen["data"]).get("name") == "digits")
    settings = defaults | (ON_DIGITS if is_tiny else {}) | stored
    for name in given:
        if checkpoint and name not in CHANGEABLE and given[name] != settings[name]:
            raise UserError(f"--{name} {given[name]} contradicts the checkpoint's "
                            f"{settings[name]}; drop the flag, choose another --out, or --restart")
    settings |= given
    if settings["fusion"] == "none":
        off = {"z_channels": 0, "lam_z": 0.0, "p_drop_z": 0.0}
        for name in off:
            if given.get(name):
                raise UserError(f"--{name} is about features z, and --fusion none has none; drop "
                                "one of the two")
        settings |= off
    return settings


def check(settings, micro_batch_size):
    """UserError for settings that do not go together."""
    each, rest = divmod(settings["batch_size"], run.rank_and_count()[1])
    if rest or each % (micro_batch_size or 1):
        raise UserError(f"--batch_size {settings['batch_size']}, of all processes together, must "
                        "be a multiple of their number, and each part of --micro_batch_size")
    sample.check_solver(settings["model"], None, settings["sample_steps"], "--sample_steps")


def main(args):
    rank, n_processes = run.rank_and_count()
    out, device = args.out, run.begin(args)
    with run.locked(out):
        anew = run.restart_requested(args)
        path = run.share(None if rank or anew else newest_checkpoint(out))
        checkpoint = pretrained.load_checkpoint(path, check=False) if path else None
        settings = resolve(args, checkpoint)
        check(settings, args.micro_batch_size)
        done = checkpoint["step"] if checkpoint else 0
        if done > settings["steps"] or done == settings["steps"] and is_finished(out, done):
            raise UserError(f"{out} is done, with {done} steps: raise --steps, or --restart")
        if rank == 0:
            data.open_data(settings["data"], settings["z_channels"])         # made by one
        run.gather(None)
        trainer = Trainer(settings, args, device, checkpoint)
        del checkpoint
        seen = run.gather([trainer.step, settings, trainer.meta])
        if any(other != seen[0] for other in seen):
            raise UserError("the processes see different checkpoints, flags or data: --out and "
                            "--data must be on a disk that all machines share")
        if rank == 0:
            if anew:                                       # the old runs are kept
                olds = {name.rpartition(".")[2] for name in glob.glob("*.old*", root_dir=out)}
                for pattern in ("ckpt*.pt", "ema_*.pt", "log.jsonl", "results.json"):
                    for name in glob.glob(pattern, root_dir=out):
                        os.replace(f"{out}/{name}", f"{out}/{name}.old{len(olds) + 1}")
            n_params = sum(param.numel() for param in trainer.net.parameters())
            print(f"{settings['model']} {settings['fusion']}, {n_params:,} parameters, on "
                  f"{trainer.dataset.n:,} images: steps {trainer.step} to {settings['steps']}, "
                  f"{n_processes} process(es) on {device}{' in bfloat16' * args.bf16}"
                  f"{', compiled' * args.compile}, writing {out}\nsettings: "
                  f"{json.dumps(settings)}", flush=True)
            if path and args.init:
                print(f"--init {args.init} was not read: {out} continues from its checkpoint")
            truncate_log(f"{out}/log.jsonl", trainer.step)
        ended_by = train(trainer, out)
        run.end()                                          # when rank 0 has saved
        if ended_by:
            if rank == 0:
                print(f"{signal.Signals(ended_by).name}: saved {out}/ckpt.pt at step "
                      f"{trainer.step}; the same command{' without --restart' * args.restart} "
                      "continues from there", file=sys.stderr)
            sys.exit(128 + ended_by)                       # as shells report a signal
        if rank == 0:
            finish(trainer, out)


if __name__ == "__main__":
    run.run_cli(record(main), args)
