"""Sampling: guided predictions, solvers, decoding, pictures.

    python sample.py --w_r 1.5                     # from out/ckpt.pt, which train.py wrote
    python sample.py --n 1000 --labels balanced --w_cfg 2 --out samples/cfg2

Writes DIR/sheet.png (images above their generated feature maps) and DIR/samples.npz: arr_0 uint8
(N, H, W, 3) as in ADM's files, y (N,), z (N, r, h, w). Image i depends on (seed, i) alone.
"""
import argparse
import math
import os

import numpy as np
import torch
from tqdm import tqdm

import data
import model
import pca


def guided(net, y, w_cfg=1.0, w_r=1.0, cfg_on="x", rg_on="x"):
    """predict(state, t) -> a prediction for each part of state, for solvers that know no guidance.

    With e(z, y) the network's prediction for x_t, z_t and label y:
        e(z, y) + (w_cfg - 1) [e(z, y) - e(z, null)] + (w_r - 1) [e(z, y) - e(0, y)]
    which is classifier-free guidance for w_r = 1, representation guidance (ReDi, section 3.5) for
    w_cfg = 1 and one plain call for both 1. Each weight other than 1 costs a branch; all branches
    are one batch. It acts on x's eps or v, and on z's where cfg_on / rg_on is "both"; DiT's
    variances are those of e(z, y). state: (x_t, z_t), or (x_t,) for fusion none; t: one number.
    """
    nulls = []                                        # (weight, acts on, z dropped?, label)
    if w_cfg != 1:
        nulls.append((w_cfg, cfg_on, False, torch.full_like(y, net.n_classes)))
    if w_r != 1:
        nulls.append((w_r, rg_on, True, y))
    n = 1 + len(nulls)
    labels = torch.cat([y] + [label for *_, label in nulls])
    dropped = torch.tensor([False] + [drop for _, _, drop, _ in nulls], device=y.device)
    dropped = dropped.repeat_interleave(len(y))                           # (n B,), as are labels

    def predict(state, t):
        x_t, z_t = (part.repeat(n, 1, 1, 1) for part in state) if net.r else (
            state[0].repeat(n, 1, 1, 1), None)
        if net.r:
            z_t = model.drop_z(z_t, dropped)
        preds = net(x_t, z_t, torch.full((len(labels),), t, device=x_t.device), labels)
        return [combine(pred, part.shape[1], name) for pred, part, name in zip(preds, state, "xz")]

    def combine(pred, channels, name):
        plain, *others = pred.chunk(n)
        result = plain.clone()
        for (w, acts_on, *_), other in zip(nulls, others):
            if acts_on in (name, "both"):
                result[:, :channels] += (w - 1) * (plain - other)[:, :channels]
        return result

    return predict


# solver(predict, process, state, steps, noise) -> state at the data end, from pure noise. state:
# x_t and z_t, or x_t alone; steps: network calls; noise(): fresh noise, shaped like state.

def euler(predict, process, state, steps, noise):
    """Probability-flow ODE: dx = v dt from t = 0 to 1."""
    dt = 1 / steps
    for k in range(steps):
        state = [part + v * dt for part, v in zip(state, predict(state, k * dt))]
    return state


def euler_maruyama(predict, process, state, steps, noise, last=0.04):
    """SiT's reverse SDE: dx = (v + w score) dt + sqrt(2 w) dW with w = sigma_t = 1 - t; steps - 1
    steps to t = 1 - last, one without noise from there. v and score share a network call."""
    dt = (1 - last) / (steps - 1)
    for k in range(steps):
        t = k * dt
        w = 1 - t
        drift = [v + w * process.score(v, part, t) for part, v in zip(state, predict(state, t))]
        if k == steps - 1:
            return [part + d * last for part, d in zip(state, drift)]
        state = [part + d * dt + (2 * w * dt) ** 0.5 * eps
                 for part, d, eps in zip(state, drift, noise())]


def ddpm(predict, process, state, steps, noise):
    """Ancestral sampling with learned variance, on `steps` of the 1000 timesteps (2102.09672)."""
    chain = process.respaced(steps)
    for k in reversed(range(steps)):
        preds = predict(state, chain.timesteps[k])
        gaussians = [chain.posterior(pred, part, k) for pred, part in zip(preds, state)]
        if k == 0:
            return [mean for mean, _ in gaussians]
        state = [mean + (0.5 * log_var).exp() * eps
                 for (mean, log_var), eps in zip(gaussians, noise())]


# each process's, its default first
SOLVERS = {model.Flow: {"sde": euler_maruyama, "euler": euler}, model.DDPM: {"ddpm": ddpm}}


def check_solver(name, solver, steps, flag="--steps"):
    """UserError unless that solver (None: the default) suits the model `name` and takes `steps`."""
    family, _, _ = model.parse_name(name)
    solvers = SOLVERS[model.FAMILIES[family]]
    solver = solver or next(iter(solvers))
    if solver not in solvers:
        raise data.UserError(f"--solver {solver} is not for {family}; take {' or '.join(solvers)}")
    least = 1 if solver == "euler" else 2
    most = model.DDPM.n_timesteps if solver == "ddpm" else float("inf")
    if not least <= steps <= most:
        limit = f"{least} to {most}" if solver == "ddpm" else f"at least {least}"
        raise data.UserError(f"{flag} {steps}: the solver {solver} takes {limit}")


def image_noise(net, seed, indices, device):
    """noise() -> (eps_x, eps_z), or (eps_x,) without features: new numbers at every call, image i's
    a function of (seed, i) alone, x's the same for every fusion."""
    parts = [("noise of x", net.x_channels), ("noise of z", net.r)][:2 if net.r else 1]
    generators = [[data.generator(seed, name, i) for i in indices] for name, _ in parts]

    def noise():
        return [torch.stack([torch.randn(channels, net.x_size, net.x_size, generator=generator)
                             for generator in of_images]).to(device)
                for (_, channels), of_images in zip(parts, generators)]

    return noise


def choose_labels(labels, n, n_classes, seed):
    """Classes (n,). labels: "random" (y_i a function of (seed, i)), "balanced" (i mod n_classes) or
    "3,1,4", cycled; all zeros where n_classes is 0. UserError for classes that do not exist."""
    if n_classes == 0:
        if labels != "random":
            raise data.UserError(f"--labels {labels}: this model is unconditional; leave it out")
        return torch.zeros(n, dtype=torch.long)
    if labels == "random":
        return torch.cat([torch.randint(n_classes, (1,), generator=data.generator(seed, "label", i))
                          for i in range(n)])
    if labels == "balanced":
        return torch.arange(n) % n_classes
    try:
        classes = torch.tensor([int(label) for label in labels.split(",")])
    except ValueError:
        raise data.UserError(f"--labels {labels}: give random, balanced or classes such as 3,1,4"
                             ) from None
    if classes.min() < 0 or classes.max() >= n_classes:
        raise data.UserError(f"--labels {labels}: the model has classes 0 to {n_classes - 1}")
    return classes[torch.arange(n) % len(classes)]


@torch.no_grad()
def generate(net, y, steps, solver=None, seed=0, batch_size=64, device="cpu", progress=False,
             **guidance):
    """A sample for each label of y (n,) -> x (n, C, H, W), z (n, r, H, W) or None, on the CPU.

    solver: a name that SOLVERS has for net.process, None for the first; guidance: guided()'s. The
    last batch is padded, so that the network always sees the same shapes.
    """
    solvers = SOLVERS[type(net.process)]
    solve = solvers[solver or next(iter(solvers))]
    padded = torch.cat([y, y[:1].expand(-len(y) % batch_size)])
    batches = []
    for start in tqdm(range(0, len(y), batch_size), "sampling", unit="batch", disable=not progress):
        batch = range(start, start + batch_size)
        noise = image_noise(net, seed, batch, device)
        predict = guided(net, padded[batch.start:batch.stop].to(device), **guidance)
        state = solve(predict, net.process, noise(), steps, noise)
        batches.append([part.cpu() for part in state])
    x, *z = (torch.cat(parts)[:len(y)] for parts in zip(*batches))
    return x, z[0] if z else None


def sheet(x, z, meta, columns=10, least=48, device="cpu"):
    """A PIL image of samples x, z (or None) of the data that meta describes: rows of `columns`
    images, each row above its features. Tiles are at least `least` pixels wide."""
    kinds = [data.decode(x, meta, device)]
    if z is not None:
        kinds.append(pca.colours(z.numpy(), meta["z_std"]))
    tile = meta["image_size"] * max(1, -(-least // meta["image_size"]))
    return data.contact_sheet(kinds, columns, tile)


def load_checkpoint(path):
    """A checkpoint of train.py, on the CPU: arch (model.build's arguments), settings, meta (the
    data's), step, net, ema, projector (with --repa), optimizer, sums, machine. UserError if it is
    missing, damaged or not one."""
    if not os.path.exists(path):
        raise data.UserError(f"no checkpoint at {path}; make one with: python train.py")
    try:
        checkpoint = model.read_weights(path)
        lacks = {"arch", "settings", "meta", "step", "net", "ema", "optimizer", "sums"}
        lacks -= set(checkpoint)
        if lacks:
            raise ValueError(f"no {', '.join(sorted(lacks))}")
    except (ValueError, TypeError) as error:
        before = os.path.join(os.path.dirname(path), "ckpt_prev.pt")
        advice = f"the one before it is {before}" if os.path.exists(before) else "train again"
        raise data.UserError(f"{path} is damaged or no checkpoint of train.py ({error}); "
                             + advice) from None
    return checkpoint


def load_net(path, family=None):
    """The network of a file: the averaged weights of train.py's checkpoint, or those published by
    the authors of ReDi, SiT or DiT (family: model.load_published's). UserError if it is neither."""
    if not os.path.exists(path):
        raise data.UserError(f"no weights at {path}; give a checkpoint of train.py, or a file that "
                             "the authors of ReDi, SiT or DiT publish")
    try:
        content = model.read_weights(path)
        if isinstance(content, dict) and {"arch", "ema"} <= set(content):
            return load_ema(content)
        return model.load_published(content, family)
    except ValueError as error:
        raise data.UserError(f"{path} holds no weights that are known here ({error})") from None


def load_ema(checkpoint, device="cpu"):
    """The network with its averaged weights, ready to sample from."""
    net = model.build(**checkpoint["arch"])
    net.load_state_dict(checkpoint["ema"])
    return net.eval().requires_grad_(False).to(device)


def check_guidance(checkpoint, args):
    """UserError where the model cannot be guided as asked."""
    arch, settings = checkpoint["arch"], checkpoint["settings"]
    for flag, dropout, possible, what in (
            ("w_r", "p_drop_z", arch["fusion"] != "none", "with features, not --fusion none"),
            ("w_cfg", "p_drop_y", arch["n_classes"] > 0, "with classes, not --unconditional")):
        asked = f"--{flag} {getattr(args, flag):g} needs a model trained"
        if getattr(args, flag) == 1:
            continue
        if not possible:
            raise data.UserError(f"{asked} {what} as {args.ckpt} was. Use --{flag} 1")
        if settings[dropout] == 0:
            raise data.UserError(f"{asked} with --{dropout} > 0; {args.ckpt} has 0. Retrain, or "
                                 f"use --{flag} 1")


def main(args):
    for name, least in (("n", 1), ("n_sheet", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise data.UserError(f"--{name} {value} must be at least {least}")
    for name in ("w_cfg", "w_r"):
        if not math.isfinite(getattr(args, name)):
            raise data.UserError(f"--{name} {getattr(args, name)} must be a finite number")
    device = data.pick_device(args.device)
    checkpoint = load_checkpoint(args.ckpt)
    arch, meta = checkpoint["arch"], checkpoint["meta"]
    steps = checkpoint["settings"]["sample_steps"] if args.steps is None else args.steps
    check_solver(arch["name"], args.solver, steps)
    check_guidance(checkpoint, args)
    if args.vae:
        meta |= {"codec": args.vae, "codec_weights": None}
    codec = data.codec_of(meta, device)
    if codec and codec.channels != arch["x_channels"]:
        raise data.UserError(f"--vae {args.vae} has {codec.channels} channels, the model "
                             f"{arch['x_channels']}; take the codec that made its data")
    y = choose_labels(args.labels, args.n, arch["n_classes"], args.seed)
    os.makedirs(args.out, exist_ok=True)
    x, z = generate(load_ema(checkpoint, device), y, steps, args.solver, args.seed,
                    args.batch_size or min(args.n, 64), device, progress=True,
                    w_cfg=args.w_cfg, w_r=args.w_r, cfg_on=args.cfg_on, rg_on=args.rg_on)
    if not x.isfinite().all():
        raise data.UserError("the samples hold NaN or infinity; lower --w_cfg and --w_r, or use an "
                             "earlier checkpoint")
    arrays = {"arr_0": data.decode(x, meta, device), "y": y.numpy()}
    if z is not None:
        arrays["z"] = z.numpy()
    with open(f"{args.out}/samples.npz.part", "wb") as file:
        np.savez(file, **arrays)
    os.replace(f"{args.out}/samples.npz.part", f"{args.out}/samples.npz")
    shown = slice(args.n_sheet)
    sheet(x[shown], z if z is None else z[shown], meta, device=device).save(f"{args.out}/sheet.png")
    print(f"{args.n} images of {args.ckpt} ({arch['name']}, step {checkpoint['step']}): "
          f"{args.out}/sheet.png and {args.out}/samples.npz")


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(name, default, meaning, **options):
        if "choices" not in options:
            options.setdefault("type", type(default))
        p.add_argument(f"--{name}", default=default, help=f"{meaning} (default: %(default)s)",
                       **options)

    flag("ckpt", "out/ckpt.pt", "checkpoint of train.py")
    flag("out", "samples", "output folder", metavar="DIR")
    flag("n", 60, "number of images")
    flag("n_sheet", 60, "how many of them the sheet shows at most")
    p.add_argument("--batch_size", type=int, help="images a batch (default: n, at most 64)")
    flag("seed", 0, "image i is a function of (seed, i)")
    flag("labels", "random", "random, balanced, or classes N,N,... that are cycled")
    p.add_argument("--solver", choices=[name for solvers in SOLVERS.values() for name in solvers],
                   help="for SiT sde (Euler-Maruyama, the default) or euler (ODE); for DiT ddpm")
    p.add_argument("--steps", type=int, help="network calls per image (default: the training run's "
                                             "--sample_steps: 250, for digits 40)")
    p.add_argument("--vae", help="codec that decodes, hub name or local folder (default: the one "
                                 "that made the training data)")
    flag("w_cfg", 1.0, "weight of classifier-free guidance, 1 is off")
    flag("w_r", 1.0, "weight of representation guidance, 1 is off")
    flag("cfg_on", "x", "what w_cfg guides: x, or x and z", choices=["x", "both"])
    flag("rg_on", "x", "what w_r guides: x, or x and z", choices=["x", "both"])
    p.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    return p


if __name__ == "__main__":
    data.run_cli(main, parser().parse_args())
