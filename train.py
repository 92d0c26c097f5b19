"""Trains DiT or SiT with ReDi: the joint loss over image latents x and features z, with z-dropout.

    python train.py                                                 # SiT-T/2 on digits: minutes on a laptop
    torchrun --nproc_per_node=8 train.py --model SiT-XL/2           # the paper's run, on prepared/imagenet256

Writes DIR/ckpt.pt (and ckpt_prev.pt), log.jsonl, preview sheets, at the end sheet.png and, for digits,
results.json. Started again with the same --out it goes on where the checkpoint stands.
"""
import argparse
import contextlib
import copy
import json
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

# What a run uses unless a flag says otherwise. The paper's values (section 4.1 and SiT's), and those for
# size T on digits; sample_steps: network calls per image.
DEFAULTS = {"model": "SiT-T/2", "fusion": "merged", "unconditional": False, "lam_z": 1.0, "p_drop_z": 0.2,
            "p_drop_y": 0.1, "seed": 0}
PAPER = {"lr": 1e-4, "batch_size": 256, "steps": 400_000, "r": 8, "ema": 0.9999, "sample_steps": 250,
         "log_every": 100, "ckpt_every": 5_000, "preview_every": 25_000}
DIGITS = {"lr": 1e-3, "batch_size": 128, "steps": 1_500, "r": 4, "ema": 0.995, "sample_steps": 40,
          "log_every": 25, "ckpt_every": 250, "preview_every": 500}
# a checkpoint decides these for good; a flag that says otherwise is an error
FIXED = ("model", "fusion", "unconditional", "data", "r", "lam_z", "p_drop_z", "p_drop_y", "lr", "batch_size",
         "ema", "seed")
N_JUDGED = 1_000                        # generated digits that the closing numbers are computed on


# ------------------------------------------------------------------ settings

def resolve(given, checkpoint):
    """All settings of a run: flags `given`, then the checkpoint's (or None), then the defaults.
    UserError for flags that contradict each other or the checkpoint."""
    if checkpoint:
        stored = checkpoint["settings"]
        for name in FIXED:
            if name in given and given[name] != stored[name]:
                raise data.UserError(f"--{name} {given[name]} contradicts the checkpoint, which has {stored[name]}; "
                                     "drop the flag, or choose another --out, or --restart")
        return stored | given
    settings = DEFAULTS | given
    try:
        _, size, _ = model.parse_name(settings["model"])
    except ValueError as error:
        raise data.UserError(f"--model: {error}") from None
    settings = {"data": "digits" if size == "T" else data.IMAGENET} | settings
    settings = (DIGITS if size == "T" and settings["data"] == "digits" else PAPER) | settings
    if settings["fusion"] == "none":
        for name in {"r", "lam_z", "p_drop_z"} & set(given):
            raise data.UserError(f"--{name} needs features z; --fusion none has none. Drop one of the two")
        settings |= {"r": 0, "lam_z": 0.0, "p_drop_z": 0.0}
    return settings


def check(settings, n_processes):
    """UserError for a value that no run can have."""
    for name in ("steps", "batch_size", "sample_steps", "log_every", "ckpt_every", "preview_every"):
        if settings[name] < 1:
            raise data.UserError(f"--{name} {settings[name]} must be at least 1")
    for name in ("p_drop_z", "p_drop_y", "ema"):
        if not 0 <= settings[name] <= 1:
            raise data.UserError(f"--{name} {settings[name]} must be between 0 and 1")
    if settings["fusion"] != "none" and settings["r"] < 1:
        raise data.UserError(f"--r {settings['r']} must be at least 1; for no features, --fusion none")
    if not settings["lr"] > 0 or settings["lam_z"] < 0 or settings["seed"] < 0:
        raise data.UserError("--lr must be above 0, --lam_z and --seed not below 0")
    if settings["batch_size"] % n_processes:
        raise data.UserError(f"--batch_size {settings['batch_size']} is for all processes together and must be a "
                             f"multiple of their number, {n_processes}")
    sample.check_solver(settings["model"], None, settings["sample_steps"])


# ------------------------------------------------------------------ one step

def draw(seed, step, batch_size, net):
    """Everything random about a training step, for its whole global batch, as functions of (seed, step):
    u (B,) uniform for the times, eps_x and eps_z of x_t's and z_t's shape (None without features), and u_y
    and u_z (B,), uniform, for what is dropped."""
    def stream(purpose):
        return data.generator(seed, purpose, step)

    size = (net.x_size, net.x_size)
    return (torch.rand(batch_size, generator=stream("t")),
            torch.randn(batch_size, net.x_channels, *size, generator=stream("eps of x")),
            torch.randn(batch_size, net.r, *size, generator=stream("eps of z")) if net.r else None,
            torch.rand(batch_size, generator=stream("drop of y")),
            torch.rand(batch_size, generator=stream("drop of z")))


def joint_loss(net, process, x, z, y, t, eps_x, eps_z, dropped):
    """Per-sample losses (B,) of x and of z: ReDi's equation 6. Where `dropped` (B,) is true z_t = 0 is fed
    and z costs nothing. z is None without features, its loss then 0."""
    x_t = process.add_noise(x, eps_x, t)
    z_t = None if z is None else model.drop_z(process.add_noise(z, eps_z, t), dropped)
    pred_x, pred_z = net(x_t, z_t, t, y)
    loss_x = process.loss(pred_x.float(), x, eps_x, t)
    if z is None:
        return loss_x, torch.zeros_like(loss_x)
    return loss_x, process.loss(pred_z.float(), z, eps_z, t).masked_fill(dropped, 0)


@torch.no_grad()
def update_ema(ema, net, decay, step):
    """ema <- d ema + (1 - d) net with d = min(decay, (1 + step) / (10 + step)), so that short runs forget
    their start. step: 0 for the first."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - d)


# ------------------------------------------------------------------ the log

@torch.no_grad()
def tally(loss_x, loss_z, dropped, quarter, lam_z):
    """What a batch adds to the log's running sums: one float64 vector (13,), reduced and read as one."""
    loss, in_quarter = (loss_x + lam_z * loss_z).double(), F.one_hot(quarter, 4).double()
    counts = torch.stack([torch.tensor(len(loss), device=loss.device), (~dropped).sum()]).double()
    sums = torch.stack([loss.sum(), loss_x.double().sum(), loss_z.double().sum()])
    return torch.cat([counts, sums, in_quarter.T @ loss, in_quarter.sum(0)])


def log_entry(step, sums, images_per_s, fusion):
    """One line of log.jsonl. Losses are means since the last line; loss_z over the samples that kept z;
    loss_q1..q4 the joint loss in the quarters of t, q1 the noisiest (null if no sample fell there)."""
    n, kept, loss, loss_x, loss_z, *quarters = sums.tolist()
    entry = {"step": step, "loss": loss / n, "loss_x": loss_x / n}
    if fusion != "none":
        entry["loss_z"] = loss_z / kept if kept else None
    for q in range(4):
        entry[f"loss_q{q + 1}"] = quarters[q] / quarters[4 + q] if quarters[4 + q] else None
    return entry | {"images_per_s": round(images_per_s, 1)}


def truncate_log(path, step):
    """Drop what a killed run logged after its checkpoint of that step, a torn last line included."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path) as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
    write_whole(path, "".join(kept).encode())


# ------------------------------------------------------------------ files

def write_whole(path, content):
    """Write bytes so that path holds the old content or the new, never a part."""
    with open(path + ".part", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


def save_checkpoint(out, checkpoint):
    """out/ckpt.pt, the one before it kept as ckpt_prev.pt; plain tensors and dicts only."""
    path = f"{out}/ckpt.pt"
    with open(path + ".part", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    if os.path.exists(path):
        os.replace(path, f"{out}/ckpt_prev.pt")
    os.replace(path + ".part", path)


# ------------------------------------------------------------------ previews and closing numbers

def preview(ema, settings, meta, device, path, rows=4):
    """A sheet of samples from the EMA at path: one column a class for up to ten classes, fixed noise."""
    columns = min(ema.n_classes, 10) or 10
    y = sample.choose_labels("balanced" if ema.n_classes else "random", columns * rows, ema.n_classes, 0)
    x, z = sample.generate(ema, y, settings["sample_steps"], batch_size=min(len(y), 32), device=device)
    sample.sheet_of(x, z, meta, columns=columns).save(path)


def judge(ema, settings, meta, device):
    """Metrics, by name, of N_JUDGED digits from the EMA."""
    import fid                           # scikit-learn and SciPy: only where they are used
    y = sample.choose_labels("balanced" if ema.n_classes else "random", N_JUDGED, ema.n_classes, 0)
    x, _ = sample.generate(ema, y, settings["sample_steps"], batch_size=125, device=device, progress=True)
    return fid.judge_digits(data.decode(x, meta["codec"]), y.numpy() if ema.n_classes else None)


# ------------------------------------------------------------------ the run

def train(settings, checkpoint, out, device, bf16, rank, n_processes):
    """From the checkpoint (or None) to settings["steps"]; returns the EMA network and the data's meta."""
    torch.manual_seed(settings["seed"])                                     # the initial weights, nothing else
    source = data.Prepared(data.PREPARED.get(settings["data"], settings["data"]), settings["r"])
    meta = source.meta
    arch = {"name": settings["model"], "fusion": settings["fusion"], "r": settings["r"],
            "n_classes": 0 if settings["unconditional"] else len(meta["classes"]),
            "x_channels": meta["x_channels"], "x_size": meta["x_size"]}
    if checkpoint and checkpoint["arch"] != arch:
        raise data.UserError(f"{settings['data']} does not fit {out}/ckpt.pt: {arch} against {checkpoint['arch']}; "
                             "choose another --out, or --restart")
    try:
        net = model.build(**arch).to(device)
    except ValueError as error:
        raise data.UserError(str(error)) from None
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings["lr"], betas=(0.9, 0.999), weight_decay=0, fused=True)
    step, sums = 0, torch.zeros(13, dtype=torch.float64, device=device)
    if checkpoint:
        net.load_state_dict(checkpoint["net"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, sums = checkpoint["step"], checkpoint["sums"].to(device)
    process, lam_z, batch_size = net.process, settings["lam_z"], settings["batch_size"]
    parallel = DistributedDataParallel(net) if n_processes > 1 else net
    mine = slice(rank * batch_size // n_processes, (rank + 1) * batch_size // n_processes)
    if rank == 0:
        n_params = sum(p.numel() for p in net.parameters())
        print(f"{settings['model']} {settings['fusion']}, {n_params:,} parameters, on {source.n:,} images of "
              f"{settings['data']}: step {step} to {settings['steps']}, {n_processes} process(es), {device}, writing {out}")
        print("settings: " + json.dumps(settings), flush=True)
        truncate_log(f"{out}/log.jsonl", step)

    def save():
        total = sums.clone()
        if n_processes > 1:
            dist.reduce(total, 0)
        if rank == 0:
            save_checkpoint(out, {"arch": arch, "settings": settings, "meta": meta, "step": step, "net": net.state_dict(),
                                  "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "sums": total})
        if rank > 0:
            sums.zero_()                                                    # rank 0 carries them from here on
        else:
            sums.copy_(total)

    bar = tqdm(total=settings["steps"], initial=step, unit="step", disable=rank > 0, mininterval=0.5)
    first, started, loss_check = step, time.perf_counter(), None
    since_log, paused = step, 0.0
    while True:
        at_end = step == settings["steps"]
        if step > first and (at_end or step % settings["ckpt_every"] == 0):
            stop_if_not_finite(loss_check)
            pause = time.perf_counter()
            save()
            paused += time.perf_counter() - pause
        if rank == 0 and step > first and not at_end and step % settings["preview_every"] == 0:
            pause = time.perf_counter()
            preview(ema, settings, meta, device, f"{out}/sheet_{step:07d}.png")
            paused += time.perf_counter() - pause
        if at_end:
            break

        rows = data.rows_of_step(settings["seed"], step, batch_size, source.n)[mine]
        x, z, y = source.batch(rows, device)
        u, eps_x, eps_z, u_y, u_z = (None if d is None else d[mine].to(device)
                                     for d in draw(settings["seed"], step, batch_size, net))
        t = process.draw_t(u)
        dropped = u_z < settings["p_drop_z"]
        if settings["unconditional"]:
            y = torch.zeros_like(y)                                         # the one row of the label table
        y = y.masked_fill(u_y < settings["p_drop_y"], net.n_classes)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss_x, loss_z = joint_loss(parallel, process, x, z, y, t, eps_x, eps_z, dropped)
        loss = (loss_x + lam_z * loss_z).mean()                             # loss_z: summed over kept, divided by all
        optimizer.zero_grad()
        loss.backward()
        stop_if_not_finite(loss_check)                                      # the step before's: no wait for this one
        loss_check = (step, loss.detach(), t, rows)
        optimizer.step()
        update_ema(ema, net, settings["ema"], step)
        sums += tally(loss_x, loss_z, dropped, (4 * process.data_time(t)).long().clamp(max=3), lam_z)
        step += 1
        bar.update()

        if step % settings["log_every"] == 0:
            if n_processes > 1:
                dist.reduce(sums, 0)
            if rank == 0:
                seconds = time.perf_counter() - started - paused
                entry = log_entry(step, sums, (step - since_log) * batch_size / seconds, settings["fusion"])
                with open(f"{out}/log.jsonl", "a") as file:
                    file.write(json.dumps(entry) + "\n")
                bar.set_postfix_str(f"loss {entry['loss']:.4f}")
            sums.zero_()
            started, since_log, paused = time.perf_counter(), step, 0.0
    bar.close()
    return ema, meta


def stop_if_not_finite(loss_check):
    """UserError if the loss of (step, loss, t, rows) is NaN or infinite."""
    if loss_check is None:
        return
    step, loss, t, rows = loss_check
    if not torch.isfinite(loss):
        raise data.UserError(f"the loss is {loss.item()} at step {step} (t {t.min().item():.4g} to {t.max().item():.4g}, "
                             f"rows {rows[:4].tolist()}...); checkpoints before it are whole. Lower --lr, or check the data")


def finish(ema, settings, meta, out, device):
    """The closing sheet and, for digits, results.json."""
    if settings["data"] == "digits":
        metrics = {"step": settings["steps"], "n_images": N_JUDGED} | judge(ema, settings, meta, device)
        write_whole(f"{out}/results.json", (json.dumps(metrics, indent=1) + "\n").encode())
        print("\n".join(f"{name:34s} {value:.2f}" for name, value in metrics.items() if isinstance(value, float)))
    preview(ema, settings, meta, device, f"{out}/sheet.png")
    print(f"{out}/sheet.png: images above their feature maps. More: python sample.py --ckpt {out}/ckpt.pt --w_r 1.5")


def main(args):
    given = {name: value for name, value in vars(args).items()
             if value is not None and name not in ("out", "restart", "device", "bf16")}
    rank, n_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    checkpoint = None
    if not args.restart and os.path.exists(f"{args.out}/ckpt.pt"):
        checkpoint = sample.load_checkpoint(f"{args.out}/ckpt.pt")
    settings = resolve(given, checkpoint)
    check(settings, n_processes)
    if n_processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank == 0:
        data.open_data(settings["data"], settings["r"])                     # made, if need be, by one process
        os.makedirs(args.out, exist_ok=True)
    if n_processes > 1:
        dist.barrier()
    done = checkpoint and checkpoint["step"] >= settings["steps"]
    if done and os.path.exists(f"{args.out}/sheet.png"):
        raise data.UserError(f"{args.out} is done: it has {checkpoint['step']} steps. Raise --steps, or --restart")
    bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
    ema, meta = train(settings, checkpoint, args.out, device, bf16, rank, n_processes)
    if n_processes > 1:
        dist.destroy_process_group()
    if rank == 0:
        finish(ema, settings, meta, args.out, device)


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(name, kind, text):
        """A setting; its default is the checkpoint's value, or else the one in the tables above."""
        defaults = [table[name] for table in (DEFAULTS, PAPER) if name in table]
        shown = f"{defaults[0]}" + (f"; digits: {DIGITS[name]}" if name in DIGITS else "") if defaults else text
        p.add_argument(f"--{name}", type=kind, help=f"{text} (default: {shown})" if defaults else text)

    flag("model", str, "DiT- or SiT-, size T, S, B, L or XL, /patch")
    p.add_argument("--fusion", choices=model.FUSIONS,
                   help="how z joins x: none (a plain DiT/SiT), merged or separate tokens (default: merged)")
    p.add_argument("--unconditional", action=argparse.BooleanOptionalAction, help="ignore the classes (default: off)")
    flag("data", str, "digits, or a prepared folder (default: digits for size T, else " + data.IMAGENET + ")")
    flag("r", int, "channels of z: PCA components of the features that are used")
    flag("lam_z", float, "weight of z's loss, 0 switches it off")
    flag("p_drop_z", float, "probability that a sample's z_t is 0 and costs nothing; 0 is off, and rules out --w_r")
    flag("p_drop_y", float, "probability that a sample's class is the null class; 0 is off, and rules out --w_cfg")
    flag("steps", int, "optimizer steps in all")
    flag("batch_size", int, "images a step, all processes together")
    flag("lr", float, "AdamW's learning rate, constant")
    flag("ema", float, "decay of the averaged weights per step, ramped up from 0.1; 0 is off")
    flag("seed", int, "of the initial weights, the data order and every draw")
    flag("sample_steps", int, "network calls per image of sheets and closing numbers")
    flag("log_every", int, "steps between lines of log.jsonl")
    flag("ckpt_every", int, "steps between checkpoints")
    flag("preview_every", int, "steps between preview sheets")
    p.add_argument("--out", default="out", metavar="DIR", help="where everything is written (default: %(default)s)")
    p.add_argument("--restart", action="store_true", help="start over, also if DIR holds a checkpoint")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on GPUs only)")
    p.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    return p


if __name__ == "__main__":
    data.run_cli(main, parser().parse_args())
