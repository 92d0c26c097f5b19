"""Sampling: guided predictions, solvers, decoding, pictures.

    python sample.py --w_r 1.5                            # from out/ckpt.pt, which train.py wrote
    python sample.py --n 1000 --labels balanced --w_cfg 2 --out samples/cfg2

Writes DIR/sheet.png (images above their generated feature maps) and DIR/samples.npz: arr_0 uint8
(N, H, W, 3) as in ADM's files, y (N,) and z (N, r, h, w). Image i depends on (seed, i) alone.
"""
import argparse
import os
import pickle
import zipfile

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import model


# ------------------------------------------------------------------ guidance

def guided(net, y, w_cfg=1.0, w_r=1.0, cfg_on="x", rg_on="x"):
    """predict(state, t) -> predictions, for a solver that knows nothing of guidance.

    With e(z, y) the network's prediction for x_t, z_t, label y:
        e(z, y) + (w_cfg - 1) [e(z, y) - e(z, null)] + (w_r - 1) [e(z, y) - e(0, y)]
    which is classifier-free guidance for w_r = 1, representation guidance (ReDi, section 3.5) for w_cfg = 1,
    and one plain call for both 1. A weight other than 1 costs a branch; all branches are one batch.
    It acts on x's eps or v; on z's too where cfg_on / rg_on is "both". DiT's variances are never guided.
    state: (x_t, z_t), or (x_t,) for fusion none; t: one time for all; y (B,).
    """
    def predict(state, t):
        x_t, z_t = state if net.r else (*state, None)
        branches, extra = [(z_t, y)], []
        if w_cfg != 1:
            branches.append((z_t, torch.full_like(y, net.n_classes)))
            extra.append((w_cfg, cfg_on))
        if w_r != 1:
            branches.append((model.drop_z(z_t, torch.ones_like(y, dtype=torch.bool)), y))
            extra.append((w_r, rg_on))
        n = len(branches)
        z_t = torch.cat([z for z, _ in branches]) if net.r else None
        t = torch.full((n * len(y),), t, device=x_t.device)
        preds = net(x_t.repeat(n, 1, 1, 1), z_t, t, torch.cat([y for _, y in branches]))

        def combine(pred, channels, name):
            plain, *others = pred.chunk(n)
            result = plain.clone()
            for (w, on), other in zip(extra, others):
                if on in (name, "both"):
                    result[:, :channels] += (w - 1) * (plain - other)[:, :channels]
            return result

        return tuple(combine(pred, s.shape[1], name) for pred, s, name in zip(preds, state, ("x", "z")))

    return predict


# ------------------------------------------------------------------ solvers
# solver(predict, process, state, steps, noise) -> state at the data end. state: tuple of tensors, pure
# noise at first; steps: network calls; noise(): a tuple of fresh noise shaped like state.

def euler(predict, process, state, steps, noise):
    """Probability-flow ODE: dx = v dt from t = 0 to 1."""
    dt = 1 / steps
    for k in range(steps):
        state = [s + v * dt for s, v in zip(state, predict(state, k * dt))]
    return state


def euler_maruyama(predict, process, state, steps, noise, last=0.04):
    """Reverse SDE of SiT (section 2.4): dx = (v + w score) dt + sqrt(2 w) dW with w_t = sigma_t = 1 - t, to
    t = 1 - last, and from there one step without noise. One network call serves v and score."""
    dt = (1 - last) / (steps - 1)
    for k in range(steps):
        t = k * dt
        w, final = 1 - t, k == steps - 1
        drift = [v + w * process.score(v, s, t) for s, v in zip(state, predict(state, t))]
        if final:
            return [s + d * last for s, d in zip(state, drift)]
        state = [s + d * dt + (2 * w * dt) ** 0.5 * eps for s, d, eps in zip(state, drift, noise())]


def ddpm(predict, process, state, steps, noise):
    """Ancestral sampling with the learned variance, on `steps` of the 1000 timesteps (arXiv 2102.09672)."""
    chain = process.respaced(steps)
    for k in reversed(range(steps)):
        preds = predict(state, chain.timesteps[k])
        moments = [chain.posterior(pred, s, k) for pred, s in zip(preds, state)]
        if k == 0:
            return [mean for mean, _ in moments]
        state = [mean + (0.5 * log_var).exp() * eps for (mean, log_var), eps in zip(moments, noise())]


# of each process, the default first
SOLVERS = {model.Flow: {"sde": euler_maruyama, "euler": euler}, model.DDPM: {"ddpm": ddpm}}


# ------------------------------------------------------------------ images from a network

def image_noise(net, seed, indices, device):
    """noise() -> (eps_x, eps_z), new at every call; image i's numbers depend on (seed, i) and nothing else,
    and x's are the same for every fusion."""
    streams = [("noise of x", net.x_channels)] + [("noise of z", net.r)] * bool(net.r)
    generators = [[data.generator(seed, name, i) for i in indices] for name, _ in streams]

    def noise():
        return tuple(torch.stack([torch.randn(channels, net.x_size, net.x_size, generator=g) for g in gs]).to(device)
                     for gs, (_, channels) in zip(generators, streams))

    return noise


def choose_labels(labels, n, n_classes, seed):
    """(n,) classes. labels: "random" (y_i from (seed, i)), "balanced" (i mod n_classes) or "3,1,4", cycled.
    UserError for classes that do not exist; an unconditional model takes "random" and has only y = 0."""
    if n_classes == 0:
        if labels != "random":
            raise data.UserError(f"--labels {labels} needs a class-conditional model; this one is unconditional")
        return torch.zeros(n, dtype=torch.long)
    if labels == "random":
        return torch.cat([torch.randint(n_classes, (1,), generator=data.generator(seed, "label", i)) for i in range(n)])
    if labels == "balanced":
        return torch.arange(n) % n_classes
    try:
        classes = torch.tensor([int(label) for label in labels.split(",")])
    except ValueError:
        raise data.UserError(f"--labels {labels}: give random, balanced or class numbers such as 3,1,4") from None
    if not ((0 <= classes) & (classes < n_classes)).all():
        raise data.UserError(f"--labels {labels}: the model has classes 0 to {n_classes - 1}")
    return classes[torch.arange(n) % len(classes)]


@torch.no_grad()
def generate(net, y, steps, solver=None, seed=0, batch_size=64, device="cpu", progress=False, **guidance):
    """One image for each label of y (n,) -> x (n, C, H, W) and z (n, r, H, W) or None, both on the CPU.

    solver: a name of SOLVERS that fits net.process, None for its default; guidance: guided()'s arguments.
    The last batch is padded, so that every call of the network has the same shape.
    """
    solvers = SOLVERS[type(net.process)]
    solve = solvers[solver or next(iter(solvers))]
    padded = torch.cat([y, y[:1].expand(-len(y) % batch_size)])
    batches = []
    for start in tqdm(range(0, len(y), batch_size), "sampling", unit="batch", disable=not progress):
        indices = range(start, start + batch_size)
        noise = image_noise(net, seed, indices, device)
        predict = guided(net, padded[start:start + batch_size].to(device), **guidance)
        batches.append([s.cpu() for s in solve(predict, net.process, noise(), steps, noise)])
    x, z = (torch.cat(parts)[:len(y)] for parts in zip(*batches)) if net.r else (torch.cat([b[0] for b in batches])[:len(y)], None)
    return x, z


# ------------------------------------------------------------------ pictures

def z_colours(z, z_std):
    """z (n, r, h, w) -> uint8 (n, h, w, 3): its first three components as red, green, blue, from -2 to +2
    of their standard deviation over the data, so that a colour means the same in every picture."""
    rgb = z[:, :3] / (2 * torch.tensor(z_std[:z[:, :3].shape[1]]).view(1, -1, 1, 1))
    if rgb.shape[1] == 1:
        rgb = rgb.expand(-1, 3, -1, -1)                                              # grey
    elif rgb.shape[1] == 2:
        rgb = torch.cat([rgb, torch.zeros_like(rgb[:, :1])], 1)
    return data.to_uint8(rgb).permute(0, 2, 3, 1).numpy()


def sheet(images, z_maps=None, columns=10, min_tile=48, gap=2):
    """PIL image: rows of `columns` images uint8 (n, H, W, 3), each row above its z maps uint8 (n, h, w, 3)."""
    tile = max(1, -(-min_tile // images.shape[1])) * images.shape[1]
    kinds = [images] if z_maps is None else [images, z_maps]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (tile + gap) + gap, rows * (len(kinds) * (tile + gap) + 2 * gap) + gap), "white")
    for i in range(len(images)):
        for k, kind in enumerate(kinds):
            picture = Image.fromarray(kind[i]).resize((tile, tile), Image.Resampling.NEAREST)
            top = gap + (i // columns) * (len(kinds) * (tile + gap) + 2 * gap) + k * (tile + gap)
            canvas.paste(picture, (gap + (i % columns) * (tile + gap), top))
    return canvas


def sheet_of(x, z, meta, **layout):
    """The sheet of samples x, z of a model whose data `meta` describes."""
    return sheet(data.decode(x, meta["codec"]), None if z is None else z_colours(z, meta["z_std"]), **layout)


# ------------------------------------------------------------------ checkpoints, as train.py writes them

def load_checkpoint(path):
    """The dict of a checkpoint, on the CPU: arch (model.build's arguments), settings and meta (dicts), step,
    net, ema and optimizer. UserError if the file is missing, damaged or something else."""
    if not os.path.exists(path):
        raise data.UserError(f"no checkpoint at {path}; train one with: python train.py, or name one with --ckpt")
    try:
        with zipfile.ZipFile(path) as archive:                                       # torch's format; has CRCs
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong checksum in {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise data.UserError(f"{path} is damaged or no checkpoint ({str(error).splitlines()[0]}); use ckpt_prev.pt "
                             "beside it, or train again") from None
    missing = {"arch", "settings", "meta", "step", "net", "ema"} - set(checkpoint)
    if missing:
        raise data.UserError(f"{path} is no checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def load_ema(checkpoint, device="cpu"):
    """The network with its averaged weights, ready to sample from."""
    net = model.build(**checkpoint["arch"])
    net.load_state_dict(checkpoint["ema"])
    return net.eval().requires_grad_(False).to(device)


# ------------------------------------------------------------------ command line

def check_guidance(checkpoint, args):
    """UserError where the model cannot be guided or solved as asked."""
    arch, p_drop_z = checkpoint["arch"], checkpoint["settings"].get("p_drop_z")
    if args.w_r != 1 and arch["fusion"] == "none":
        raise data.UserError(f"--w_r {args.w_r:g} needs a model with features; {args.ckpt} was trained with --fusion none")
    if args.w_r != 1 and p_drop_z == 0:
        raise data.UserError(f"--w_r {args.w_r:g} needs a model trained with --p_drop_z > 0; {args.ckpt} has 0. "
                             "Retrain, or use --w_r 1")
    if args.w_cfg != 1 and arch["n_classes"] == 0:
        raise data.UserError(f"--w_cfg {args.w_cfg:g} needs a class-conditional model; {args.ckpt} is unconditional")
    if args.w_cfg != 1 and checkpoint["settings"].get("p_drop_y") == 0:
        raise data.UserError(f"--w_cfg {args.w_cfg:g} needs a model trained with --p_drop_y > 0; {args.ckpt} has 0. "
                             "Retrain, or use --w_cfg 1")


def check_solver(name, solver, steps):
    """UserError unless the solver fits the model `name` and takes that many steps."""
    family, _, _ = model.parse_name(name)
    solvers = SOLVERS[model.FAMILIES[family]]
    if solver and solver not in solvers:
        raise data.UserError(f"--solver {solver} is not for {family}; choose from: {', '.join(solvers)}")
    least, most = (1, None) if solver == "euler" else (2, 1000 if family == "DiT" else None)
    if steps < least or most and steps > most:
        raise data.UserError(f"--steps {steps}: {solver or next(iter(solvers))} takes "
                             f"{f'{least} to {most}' if most else f'at least {least}'}")


def main(args):
    for name in ("n", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise data.UserError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.seed < 0:
        raise data.UserError(f"--seed {args.seed} must not be negative")
    checkpoint = load_checkpoint(args.ckpt)
    arch, meta = checkpoint["arch"], checkpoint["meta"]
    steps = checkpoint["settings"]["sample_steps"] if args.steps is None else args.steps
    check_solver(arch["name"], args.solver, steps)
    check_guidance(checkpoint, args)
    y = choose_labels(args.labels, args.n, arch["n_classes"], args.seed)
    net = load_ema(checkpoint, args.device)
    x, z = generate(net, y, steps, args.solver, args.seed, args.batch_size or min(args.n, 64), args.device, True,
                    w_cfg=args.w_cfg, w_r=args.w_r, cfg_on=args.cfg_on, rg_on=args.rg_on)
    os.makedirs(args.out, exist_ok=True)
    arrays = {"arr_0": data.decode(x, meta["codec"]), "y": y.numpy()} | ({} if z is None else {"z": z.numpy()})
    with open(f"{args.out}/samples.npz.part", "wb") as file:
        np.savez(file, **arrays)
    os.replace(f"{args.out}/samples.npz.part", f"{args.out}/samples.npz")
    shown = slice(args.n_sheet)
    sheet_of(x[shown], None if z is None else z[shown], meta).save(f"{args.out}/sheet.png")
    print(f"{args.out}/samples.npz: {args.n} images of {arch['name']}, step {checkpoint['step']}; {args.out}/sheet.png")


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out/ckpt.pt", help="checkpoint of train.py (default: %(default)s)")
    p.add_argument("--out", default="samples", metavar="DIR", help="output folder (default: %(default)s)")
    p.add_argument("--n", type=int, default=60, help="number of images (default: %(default)s)")
    p.add_argument("--n_sheet", type=int, default=60, help="at most so many of them on the sheet (default: %(default)s)")
    p.add_argument("--batch_size", type=int, help="images a batch (default: n, at most 64)")
    p.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) (default: %(default)s)")
    p.add_argument("--labels", default="random", help="random, balanced, or class numbers N,N,..., cycled (default: %(default)s)")
    p.add_argument("--solver", choices=["sde", "euler", "ddpm"],
                   help="sde (Euler-Maruyama) or euler (ODE) for SiT, ddpm for DiT (default: sde, ddpm)")
    p.add_argument("--steps", type=int, help="network calls per image (default: 250, 40 for digits)")
    p.add_argument("--w_cfg", type=float, default=1.0, help="classifier-free guidance weight, 1 is off (default: %(default)s)")
    p.add_argument("--w_r", type=float, default=1.0, help="representation guidance weight, 1 is off (default: %(default)s)")
    p.add_argument("--cfg_on", choices=["x", "both"], default="x", help="what w_cfg guides: x, or both x and z (default: %(default)s)")
    p.add_argument("--rg_on", choices=["x", "both"], default="x", help="what w_r guides: x, or both x and z (default: %(default)s)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (default: %(default)s)")
    return p


if __name__ == "__main__":
    data.run_cli(main, parser().parse_args())
