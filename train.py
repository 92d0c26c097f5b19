"""Trains DiT or SiT with ReDi: the joint loss over image latents x and features z, with z-dropout.

    python train.py                                         # SiT-T/2 on digits, in minutes
    torchrun --nproc_per_node=8 train.py --model SiT-XL/2   # the paper's, on prepared/imagenet256

Writes DIR/ckpt.pt (the one before it is ckpt_prev.pt), log.jsonl, preview sheets and, at the end,
sheet.png and for digits results.json. Started again with the same --out it goes on from ckpt.pt.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import model
import sample
from pca import write_whole

# What a run uses unless a flag says otherwise. PAPER: ReDi's and SiT's values; DIGITS: size T on
# digits. ema: decay per step; sample_steps: network calls per image; *_every: steps.
DEFAULTS = {"model": "SiT-T/2", "fusion": "merged", "unconditional": False, "lam_z": 1.0,
            "p_drop_z": 0.2, "p_drop_y": 0.1, "seed": 0}
PAPER = {"lr": 1e-4, "batch_size": 256, "steps": 400_000, "r": 8, "ema": 0.9999,
         "sample_steps": 250, "log_every": 100, "ckpt_every": 5_000, "preview_every": 25_000}
DIGITS = {"lr": 3e-3, "batch_size": 128, "steps": 1_400, "r": 4, "ema": 0.995,
          "sample_steps": 40, "log_every": 25, "ckpt_every": 250, "preview_every": 500}
# a checkpoint decides these for good; a flag that says otherwise is an error
FIXED = ("model", "fusion", "unconditional", "data", "r", "lam_z", "p_drop_z", "p_drop_y", "lr",
         "batch_size", "ema", "seed")
N_JUDGED = 1_000                        # generated digits behind the closing numbers


def resolve(given, checkpoint):
    """All settings of a run: the flags `given`, then the checkpoint's (or None), then the defaults.
    UserError for flags that contradict each other or the checkpoint."""
    if checkpoint:
        stored = checkpoint["settings"]
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
    settings = {"data": "digits" if size == "T" else data.IMAGENET} | settings
    small = size == "T" and settings["data"] == "digits"
    settings = (DIGITS if small else PAPER) | settings
    if settings["fusion"] == "none":
        for name in ("r", "lam_z", "p_drop_z"):
            if name in given:
                raise data.UserError(f"--{name} is about features z, and --fusion none has none; "
                                     "drop one of the two")
        settings |= {"r": 0, "lam_z": 0.0, "p_drop_z": 0.0}
    return settings


def check(settings, n_processes):
    """UserError for a value that no run can have."""
    def need(name, good, what):
        if not good(settings[name]):
            raise data.UserError(f"--{name} {settings[name]} must be {what}")

    for name in ("steps", "batch_size", "log_every", "ckpt_every", "preview_every"):
        need(name, lambda value: value >= 1, "at least 1")
    for name in ("p_drop_z", "p_drop_y", "ema"):
        need(name, lambda value: 0 <= value <= 1, "between 0 and 1")
    need("lam_z", lambda value: 0 <= value < math.inf, "0 or more")
    need("seed", lambda seed: 0 <= seed < 2 ** 63, "between 0 and 2^63")
    need("lr", lambda lr: 0 < lr < math.inf, "above 0")
    if settings["fusion"] != "none":
        need("r", lambda r: r >= 1, "at least 1; for no features, use --fusion none")
    need("batch_size", lambda n: n % n_processes == 0,
         f"a multiple of the number of processes, {n_processes}: it is for all of them together")
    sample.check_solver(settings["model"], None, settings["sample_steps"], "--sample_steps")


def draw(seed, step, batch_size, net, from_codec=False):
    """Everything random about a step, for its whole global batch, as functions of (seed, step):
    u (B,) uniform, for the times; eps_x, eps_z of x_t's and z_t's shape (None without features);
    u_y, u_z (B,) uniform, for what is dropped; eps_vae of x's shape, for drawing x from its mean
    and standard deviation (None unless from_codec)."""
    def stream(purpose):
        return data.generator(seed, purpose, step)

    size = (net.x_size, net.x_size)
    eps_x = torch.randn(batch_size, net.x_channels, *size, generator=stream("eps of x"))
    eps_z = torch.randn(batch_size, net.r, *size, generator=stream("eps of z")) if net.r else None
    u, u_y, u_z = (torch.rand(batch_size, generator=stream(purpose))
                   for purpose in ("t", "drop of y", "drop of z"))
    eps_vae = torch.randn(eps_x.shape, generator=stream("draw of x")) if from_codec else None
    return u, eps_x, eps_z, u_y, u_z, eps_vae


def joint_loss(net, process, x, z, y, t, eps_x, eps_z, dropped):
    """ReDi's joint loss, per sample: (B,) for x and (B,) for z. Where `dropped` (B,) is true,
    z_t = 0 is fed and z costs nothing. z None: no features, and 0 for them."""
    x_t = process.add_noise(x, eps_x, t)
    z_t = None if z is None else model.drop_z(process.add_noise(z, eps_z, t), dropped)
    pred_x, pred_z = net(x_t, z_t, t, y)
    loss_x = process.loss(pred_x.float(), x, eps_x, t)
    if z is None:
        return loss_x, torch.zeros_like(loss_x)
    return loss_x, process.loss(pred_z.float(), z, eps_z, t).masked_fill(dropped, 0)


def batch_loss(net, parallel, x, z, y, draws, settings):
    """The loss to minimise for a batch and its draws (draw()'s), and what tally() wants of it.
    parallel: net, or what wraps it for several processes."""
    u, eps_x, eps_z, u_y, u_z, _ = draws
    t = net.process.draw_t(u)
    y = torch.where((u_y < settings["p_drop_y"]) | (net.n_classes == 0), net.n_classes, y)
    dropped = u_z < settings["p_drop_z"]
    loss_x, loss_z = joint_loss(parallel, net.process, x, z, y, t, eps_x, eps_z, dropped)
    loss = (loss_x + settings["lam_z"] * loss_z).mean()              # z: sum over kept / all of B
    return loss, t, tally(loss_x, loss_z, dropped, net.process.data_time(t), settings["lam_z"])


@torch.no_grad()
def update_ema(ema, net, decay, step):
    """ema <- d ema + (1 - d) net with d = min(decay, (1 + step) / (10 + step)), step 0 the first: a
    short run must forget its start."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - d)


@torch.no_grad()
def tally(loss_x, loss_z, dropped, data_time, lam_z):
    """What a batch adds to the log's running sums: one float64 vector (13,), read as a whole.
    data_time (B,): 0 for noise, 1 for data; its quarter 0 is the noisiest."""
    loss = (loss_x + lam_z * loss_z).double()
    in_quarter = F.one_hot((4 * data_time).long().clamp(max=3), 4).double()         # (B, 4)
    totals = torch.stack([torch.ones_like(loss), (~dropped).double(), loss, loss_x, loss_z]).sum(1)
    return torch.cat([totals, in_quarter.T @ loss, in_quarter.sum(0)])


def log_entry(step, sums, images_per_s, fusion):
    """A line of log.jsonl. Losses are means since the last line; loss_z over the samples that kept
    z; loss_q0..q3 the joint loss by quarter of t (null where no sample fell)."""
    n, kept, loss, loss_x, loss_z, *quarters = sums.tolist()
    entry = {"step": step, "loss": loss / n, "loss_x": loss_x / n}
    if fusion != "none":
        entry["loss_z"] = loss_z / kept if kept else None
    for q, (total, count) in enumerate(zip(quarters[:4], quarters[4:])):
        entry[f"loss_q{q}"] = total / count if count else None
    return entry | {"images_per_s": round(images_per_s, 1)}


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


def save_checkpoint(out, checkpoint):
    """out/ckpt.pt, as sample.load_checkpoint describes it; what was there becomes ckpt_prev.pt."""
    path, new = f"{out}/ckpt.pt", f"{out}/ckpt_new.pt"
    write_whole(new, lambda file: torch.save(checkpoint, file))
    if os.path.exists(path):
        os.replace(path, f"{out}/ckpt_prev.pt")
    os.replace(new, path)


def generate(ema, n, settings, batch_size, device, progress=False):
    """n samples from the EMA, its first ten classes in turn, from the same noise at every call:
    x, z, y."""
    y = torch.arange(n) % (min(ema.n_classes, 10) or 1)
    x, z = sample.generate(ema, y, settings["sample_steps"], batch_size=batch_size, device=device,
                           progress=progress)
    return x, z, y


def preview(ema, settings, meta, device, path, rows=4):
    """Save a sheet of samples from the EMA; up to ten classes, one a column."""
    columns = min(ema.n_classes, 10) or 10
    x, z, _ = generate(ema, columns * rows, settings, columns * rows // 2, device)
    picture = sample.sheet(x, z, meta, columns, device=device)
    write_whole(path, lambda file: picture.save(file, "PNG"))


def finish(ema, settings, meta, out, device):
    """The closing sheet and, for digits, the numbers of results.json."""
    if settings["data"] == "digits":
        import fid                       # brings scikit-learn and SciPy: not before they are used
        x, _, y = generate(ema, N_JUDGED, settings, 125, device, progress=True)
        images = data.to_images(x)
        metrics = fid.judge_digits(images, y.numpy() if ema.n_classes else None)
        results = {"step": settings["steps"], "n_images": N_JUDGED} | metrics
        text = json.dumps(results, indent=1).encode()
        write_whole(f"{out}/results.json", lambda file: file.write(text))
        print("\n".join(f"{name:32s} {value:.2f}" for name, value in metrics.items()))
    try:
        preview(ema, settings, meta, device, f"{out}/sheet.png")
        print(f"{out}/sheet.png: generated images above their feature maps")
    except data.UserError as error:                                  # no codec: nothing is lost
        print(f"{out}/ckpt.pt is complete, but there is no sheet.png: {error}")


def stop_if_not_finite(watched):
    """UserError if the loss in (step, loss, t, rows) is NaN or infinite."""
    if watched is None:
        return
    step, loss, t, rows = watched
    if not torch.isfinite(loss):
        raise data.UserError(
            f"the loss is {loss.item()} at step {step} (t from {t.min().item():.4g} to "
            f"{t.max().item():.4g}, rows {rows[:4].tolist()} and on); nothing was saved since. "
            "Lower --lr, or look at those images")


def train(settings, checkpoint, out, device, bf16, rank, n_processes):
    """From the checkpoint (or None) to settings["steps"]; returns the EMA and the data's meta."""
    source = data.open_data(settings["data"], settings["r"])
    meta, batch_size = source.meta, settings["batch_size"]
    arch = {"name": settings["model"], "fusion": settings["fusion"], "r": settings["r"],
            "n_classes": 0 if settings["unconditional"] else len(meta["classes"]),
            "x_channels": meta["x_channels"], "x_size": meta["x_size"]}
    if checkpoint and (checkpoint["arch"] != arch or checkpoint["meta"] != meta):
        raise data.UserError(f"{settings['data']} is not the data that {out} was trained on, its "
                             "meta.json differs; choose another --out, or --restart")
    torch.manual_seed(settings["seed"])                              # for the initial weights alone
    try:
        net = model.build(**arch).to(device)
    except ValueError as error:
        raise data.UserError(str(error)) from None
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings["lr"], betas=(0.9, 0.999),
                                  weight_decay=0, fused=True)
    step, sums = 0, torch.zeros(13, dtype=torch.float64, device=device)
    if checkpoint:
        net.load_state_dict(checkpoint["net"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
        if rank == 0:
            sums += checkpoint["sums"].to(device)
    parallel = DistributedDataParallel(net) if n_processes > 1 else net
    mine = slice(rank * batch_size // n_processes, (rank + 1) * batch_size // n_processes)
    if rank == 0:
        n_params = sum(p.numel() for p in net.parameters())
        print(f"{settings['model']} {settings['fusion']}, {n_params:,} parameters, on {source.n:,} "
              f"images: steps {step} to {settings['steps']}, {n_processes} process(es) on {device}"
              f"{' in bfloat16' * bf16}, writing {out}\nsettings: {json.dumps(settings)}",
              flush=True)
        truncate_log(f"{out}/log.jsonl", step)

    first, watched = step, None
    clock, logged = time.perf_counter(), step                        # when and where the log stands

    def read(step):
        """The numbers of a step's images, the images and the step's draws: this process's part."""
        numbers = data.rows_of_step(settings["seed"], step, batch_size, source.n)[mine]
        draws = draw(settings["seed"], step, batch_size, net, source.has_std)
        return numbers, source.read(numbers), [d if d is None else d[mine] for d in draws]

    batches = data.prefetch(read, range(step, settings["steps"]))
    with tqdm(total=settings["steps"], initial=step, unit="step", disable=rank > 0,
              mininterval=1) as bar:
        while True:
            done, paused = step >= settings["steps"], time.perf_counter()
            if step > first and (done or step % settings["ckpt_every"] == 0):
                if n_processes > 1:
                    dist.all_reduce(watched[1])                      # NaN for one is NaN for all
                    dist.reduce(sums, 0)                             # rank 0 has them from here on
                stop_if_not_finite(watched)
                if rank == 0:
                    save_checkpoint(out, {"arch": arch, "settings": settings, "meta": meta,
                                          "step": step, "sums": sums.cpu(),
                                          "net": net.state_dict(), "ema": ema.state_dict(),
                                          "optimizer": optimizer.state_dict()})
                else:
                    sums.zero_()
            if done:
                break
            if rank == 0 and step > first and step % settings["preview_every"] == 0:
                try:
                    preview(ema, settings, meta, device, f"{out}/sheet_{step:07d}.png")
                except data.UserError as error:                      # no codec: no reason to stop
                    bar.write(f"no preview: {error}")
            clock += time.perf_counter() - paused

            numbers, stored, draws = next(batches)
            draws = [part if part is None else part.to(device) for part in draws]
            x, z, y = source.unpack(stored, device, eps=draws[-1])
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, t, counts = batch_loss(net, parallel, x, z, y, draws, settings)
            optimizer.zero_grad()
            loss.backward()
            stop_if_not_finite(watched)                                  # of the step before
            watched = (step, loss.detach().clone(), t, source.rows(numbers.numpy()))
            optimizer.step()
            update_ema(ema, net, settings["ema"], step)
            sums += counts
            step += 1
            bar.update()

            if step % min(settings["log_every"], settings["steps"]) == 0:
                stop_if_not_finite(watched)
                if n_processes > 1:
                    dist.reduce(sums, 0)
                if rank == 0:
                    rate = (step - logged) * batch_size / (time.perf_counter() - clock)
                    entry = log_entry(step, sums, rate, settings["fusion"])
                    with open(f"{out}/log.jsonl", "a") as file:
                        file.write(json.dumps(entry) + "\n")
                    bar.set_postfix_str(f"loss {entry['loss']:.4f}")
                sums.zero_()
                clock, logged = time.perf_counter(), step
    return ema, meta


def main(args):
    ours = ("out", "restart", "device", "bf16")
    given = {name: value for name, value in vars(args).items()
             if value is not None and name not in ours}
    rank, n_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    checkpoint, sheet = None, f"{args.out}/sheet.png"
    # a run killed while it saved may have left the checkpoint before alone
    saved = [path for path in (f"{args.out}/ckpt.pt", f"{args.out}/ckpt_prev.pt")
             if os.path.exists(path) and not args.restart]
    if saved:
        checkpoint = sample.load_checkpoint(saved[0])
    settings = resolve(given, checkpoint)
    check(settings, n_processes)
    if checkpoint:
        finished = os.path.exists(sheet) and os.path.getmtime(sheet) > os.path.getmtime(saved[0])
        if checkpoint["step"] >= settings["steps"] + (not finished):
            raise data.UserError(f"{args.out} is done, with {checkpoint['step']} steps: raise "
                                 "--steps, or --restart")
    device = data.pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
    if n_processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank == 0:
        data.open_data(settings["data"], settings["r"])              # made by one, if need be
        os.makedirs(args.out, exist_ok=True)
        for name in ("ckpt.pt", "ckpt_prev.pt", "log.jsonl"):        # --restart keeps the old ones
            if args.restart and os.path.exists(f"{args.out}/{name}"):
                os.replace(f"{args.out}/{name}", f"{args.out}/{name}.old")
    if n_processes > 1:
        dist.barrier()
    ema, meta = train(settings, checkpoint, args.out, device, bf16, rank, n_processes)
    if n_processes > 1:
        dist.destroy_process_group()
    if rank == 0:
        finish(ema, settings, meta, args.out, device)


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
    setting("fusion", "how z joins x: none (plain DiT/SiT), merged or separate tokens", str,
            choices=model.FUSIONS)
    p.add_argument("--unconditional", action=argparse.BooleanOptionalAction,
                   help="ignore the classes (default: off)")
    setting("data", "digits, or a prepared folder", str,
            default=f"{data.IMAGENET}; digits for size T")
    setting("r", "channels of z: PCA components of the features that are used", int)
    setting("lam_z", "weight of z's loss; 0 is off", float)
    setting("p_drop_z", "chance that a sample's z is dropped; 0 is off and rules out --w_r", float)
    setting("p_drop_y", "chance that its class is dropped; 0 is off and rules out --w_cfg", float)
    setting("steps", "optimizer steps in all", int)
    setting("batch_size", "images a step, all processes together", int)
    setting("lr", "AdamW's learning rate, constant", float)
    setting("ema", "decay of the averaged weights per step, ramped up from 0.1; 0 is off", float)
    setting("seed", "of the initial weights, the data order and every draw", int)
    setting("sample_steps", "network calls per image, for sheets and closing numbers", int)
    setting("log_every", "steps between lines of log.jsonl", int)
    setting("ckpt_every", "steps between checkpoints", int)
    setting("preview_every", "steps between preview sheets", int)
    p.add_argument("--out", default="out", metavar="DIR", help="output folder (default: out)")
    p.add_argument("--restart", action="store_true",
                   help="start over where DIR holds a checkpoint, which becomes ckpt.pt.old")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                   help="bfloat16 autocast, weights and losses in float32 (default: on GPUs)")
    p.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    return p


if __name__ == "__main__":
    data.run_cli(main, parser().parse_args())
