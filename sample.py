"""Sampling: guided predictions, solvers, decoding, pictures.

    python sample.py --w_r 1.5                     # from out/ckpt.pt, which train.py wrote
    python sample.py --ckpt zelaki/SiT-ReDi-XL-2 --w_cfg 2.4           # the authors' own weights
    torchrun --nproc_per_node=8 -- sample.py --n 50000     # as papers' tables need (--: see --n)

Writes DIR/samples.npz: arr_0 uint8 (N, H, W, 3) as in ADM's files, y (N,) and with --save_z z
(N, r, h, w); sheet.png, images above their generated feature maps; and samples.json, how they were
made. Killed, the same command goes on. Image i depends on (seed, i) alone.
"""
import argparse
import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import re
import sys
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import data
import model
import pca

PUBLISHED_STEPS = 250                     # network calls an image, in the papers' tables


def guided(net, y, w_cfg=1.0, w_r=1.0, cfg_on="x", rg_on="x", cfg_interval=(0.0, 1.0)):
    """predict(state, t) -> a prediction for each part of state, for solvers that know no guidance.

    With e(z, y) the network's prediction for x_t, z_t and label y:
        e(z, y) + (w_cfg - 1) [e(z, y) - e(z, null)] + (w_r - 1) [e(z, y) - e(0, y)]
    which is classifier-free guidance for w_r = 1, representation guidance (ReDi, section 3.5) for
    w_cfg = 1 and one plain call for both 1. Each weight other than 1 costs a branch; all branches
    are one batch: 2 with one of them, 3 with both. It acts on x's eps or v, and on z's where cfg_on
    / rg_on is "both"; DiT's variances are those of e(z, y). Outside cfg_interval, times from 0
    (noise) to 1 (data), w_cfg counts as 1. state: (x_t, z_t), or (x_t,) for fusion none; t: one
    number.
    """
    cfg = [(w_cfg, cfg_on, torch.full_like(y, net.n_classes), False)] if w_cfg != 1 else []
    rg = [(w_r, rg_on, y, True)] if w_r != 1 else []                  # weight, on, label, z dropped

    def predict(state, t):
        lo, hi = cfg_interval
        nulls = (cfg if lo <= net.process.data_time(t) <= hi else []) + rg
        n = 1 + len(nulls)
        labels = torch.cat([y] + [label for _, _, label, _ in nulls])                      # (n B,)
        x_t, z_t, *_ = [part.repeat(n, 1, 1, 1) for part in state] + [None]
        if net.r:
            z_t = model.drop_z(z_t, torch.cat([torch.full_like(y, drop, dtype=torch.bool)
                                               for *_, drop in [(False,), *nulls]]))
        preds = net(x_t, z_t, torch.full((len(labels),), t, device=x_t.device), labels)
        return [combine(nulls, *pred.to(part.dtype).chunk(n), channels=part.shape[1], name=name)
                for pred, part, name in zip(preds, state, "xz")]

    def combine(nulls, plain, *others, channels, name):
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


def heun(predict, process, state, steps, noise):
    """The same ODE by the trapezoidal rule: two calls a step, so half as many steps. An odd number
    of calls ends with a step of Euler's."""
    n = -(-steps // 2)
    for k in range(n):
        v = predict(state, k / n)
        if 2 * k + 1 < steps:
            ahead = [part + a / n for part, a in zip(state, v)]
            v = [(a + b) / 2 for a, b in zip(v, predict(ahead, (k + 1) / n))]
        state = [part + a / n for part, a in zip(state, v)]
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


def ddim(predict, process, state, steps, noise):
    """The same chain without noise (2010.02502, eta = 0): x_hat, noised again with the eps that was
    predicted; x_hat itself at last."""
    chain = process.respaced(steps)
    for k in reversed(range(steps)):
        preds = predict(state, chain.timesteps[k])
        hats = [chain.x_hat(pred, part, k) for pred, part in zip(preds, state)]
        if k == 0:
            return hats
        alpha, sigma = chain.alpha[k - 1].item(), chain.sigma[k - 1].item()
        state = [alpha * hat + sigma * pred[:, :hat.shape[1]] for hat, pred in zip(hats, preds)]


# each process's, its default first
SOLVERS = {model.Flow: {"sde": euler_maruyama, "euler": euler, "heun": heun},
           model.DDPM: {"ddpm": ddpm, "ddim": ddim}}


def check_solver(name, solver, steps, flag="--steps"):
    """The solver's name (None: the default), if it suits the model `name` and takes `steps`, else
    UserError."""
    family, _, _ = model.parse_name(name)
    process = model.FAMILIES[family]
    solver = solver or next(iter(SOLVERS[process]))
    if solver not in SOLVERS[process]:
        raise data.UserError(f"--solver {solver} is not for {family}; take "
                             + " or ".join(SOLVERS[process]))
    chain = process is model.DDPM
    least, most = 1 if solver in ("euler", "heun") else 2, process.n_timesteps if chain else None
    if steps < least or most and steps > most:
        limit = f"{least} to {most}" if most else f"at least {least}"
        raise data.UserError(f"{flag} {steps}: the solver {solver} takes {limit}")
    return solver


def image_noise(net, seed, indices, device, threads=None):
    """Yields (eps_x, eps_z), or (eps_x,) without features, on the device: always new numbers, image
    i's a function of (seed, i) alone, x's the same for every fusion. Threads are one ahead, each
    for some of the images: None is one, and four for a GPU, which would wait for one alone."""
    parts = [("noise of x", net.x_channels), ("noise of z", net.r)][:2 if net.r else 1]
    on_gpu = device.type == "cuda"

    def draws(indices):
        generators = [[data.generator(seed, name, i) for i in indices] for name, _ in parts]

        def draw(_):
            noise = [torch.stack([torch.randn(channels, net.x_size, net.x_size, generator=generator)
                                  for generator in of_images])
                     for (_, channels), of_images in zip(parts, generators)]
            return [part.pin_memory() for part in noise] if on_gpu else noise

        return data.prefetch(draw, itertools.count(), ahead=1)

    groups = np.array_split(indices, min(len(indices), threads or (4 if on_gpu else 1)))
    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(contextlib.closing(draws(group))) for group in groups]
        for noise in zip(*groups):
            yield [torch.cat([part.to(device, non_blocking=True) for part in of_groups])
                   for of_groups in zip(*noise)]


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
def sample_batches(net, y, numbers, steps, solver=None, seed=0, batch_size=64, device="cpu",
                   bf16=False, guide=guided, **guidance):
    """For each b of numbers: the rows of batch b of y (n,), b * batch_size and on, and its final
    state on the device, x (B, C, H, W) and z (B, r, H, W), or x alone. The last batch is padded, so
    that every network always sees the same shapes: it has fewer rows than B.

    solver: a name that SOLVERS has for net.process, None for the first; bf16: the network computes
    under autocast, the solver in float32; guide: what makes predict of the net, y and guidance.
    """
    device, solvers = torch.device(device), SOLVERS[type(net.process)]
    solve = solvers[solver or next(iter(solvers))]
    padded = torch.cat([y, y[:1].expand(-len(y) % batch_size)]).to(device)
    for b in numbers:
        rows = range(b * batch_size, (b + 1) * batch_size)
        predict = guide(net, padded[rows.start:rows.stop], **guidance)
        with contextlib.closing(image_noise(net, seed, rows, device)) as noise, \
                torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            state = solve(predict, net.process, next(noise), steps, noise.__next__)
        yield rows[:len(y) - rows.start], state


def generate(net, y, steps, solver=None, seed=0, batch_size=64, device="cpu", progress=False,
             **options):
    """A sample for each label of y (n,) -> x (n, C, H, W), z (n, r, H, W) or None, on the CPU.
    The arguments are those of sample_batches()."""
    numbers = tqdm(range(-(-len(y) // batch_size)), "sampling", unit="batch", disable=not progress)
    states = [[part.cpu() for part in state] for _, state in sample_batches(
        net, y, numbers, steps, solver, seed, batch_size, device, **options)]
    x, *z = (torch.cat(parts)[:len(y)] for parts in zip(*states))
    return x, z[0] if z else None


def sheet(images, z, z_std, columns=10, names=(), least=48):
    """A PIL image of samples uint8 (n, H, W, 3) above their features z (n, r, H, W) or None, which
    z_std makes equally bright: rows of `columns` images. Tiles are at least `least` pixels wide.
    images and z may be lists: several versions of the same samples, which stand one below the
    other, with their names."""
    if not isinstance(images, list):
        images, z = [images], [z]
    kinds, labels = [], []
    for pictures, features, name in zip(images, z, names or [""] * len(images)):
        pair = [pictures] + ([] if features is None else [pca.colours(np.asarray(features), z_std)])
        kinds += pair
        labels += [name, ""][:len(pair)]
    size = kinds[0].shape[1]
    return data.contact_sheet(kinds, columns, size * -(-least // size),
                              names=labels if names else ())


def compare(net, y, w_cfg=1.0, w_r=1.0, **options):
    """[(name, x, z)]: samples without guidance, with each kind and with both, from equal noise."""
    versions = [("no guidance", 1, 1)] + [(f"CFG {w_cfg:g}", w_cfg, 1)] * (w_cfg != 1)
    versions += [(f"RG {w_r:g}", 1, w_r)] * (w_r != 1)
    versions += [("both", w_cfg, w_r)] * (w_cfg != 1 and w_r != 1)
    return [(name, *generate(net, y, w_cfg=a, w_r=b, **options)) for name, a, b in versions]


def trajectory(net, y, n=8, **options):
    """[(name, x, z)]: what the network takes for the clean x and z at n of its calls, from noise to
    data, and the samples. z's outlines settle before x's details do."""
    noted = []

    def watched(net, y, **guidance):
        predict = guided(net, y, **guidance)

        def watch(state, t):
            preds = predict(state, t)
            noted.append((net.process.data_time(t), [net.process.x_hat(pred, part, t).cpu()
                                                     for pred, part in zip(preds, state)]))
            return preds

        return watch

    x, z = generate(net, y, guide=watched, **options | {"batch_size": len(y)})
    chosen = [noted[i] for i in np.linspace(0, len(noted) - 1, n).round().astype(int)]
    return [(f"t = {t:.2f}", hats[0], hats[1] if net.r else None) for t, hats in chosen] + [
        ("sample", x, z)]


def load_weights(path):
    """What a file of weights holds, on the CPU. UserError if it is missing or damaged."""
    if not os.path.isfile(path):
        raise data.UserError(f"no checkpoint at {path}; make one with: python train.py, or give a "
                             "file that the authors of ReDi, SiT or DiT publish")
    try:
        return model.read_weights(path)
    except ValueError as error:
        raise unusable(path, error) from None


def unusable(path, error):
    before = os.path.join(os.path.dirname(path), "ckpt_prev.pt")
    return data.UserError(
        f"{path} is damaged, or neither a checkpoint of train.py nor weights that the authors of "
        f"ReDi, SiT or DiT publish ({error})"
        + f"; the checkpoint before it is {before}" * os.path.exists(before))


def load_checkpoint(path):
    """A checkpoint of train.py, on the CPU: arch (model.build's arguments), settings, meta (the
    data's), step, net, ema, projector (with --repa), optimizer, sums, machine. UserError if it is
    missing, damaged or not one."""
    checkpoint = load_weights(path)
    lacks = {"arch", "settings", "meta", "step", "net", "ema", "optimizer", "sums"}
    lacks -= set(checkpoint) if isinstance(checkpoint, dict) else set()
    if lacks:
        raise unusable(path, f"no {', '.join(sorted(lacks))}")
    return checkpoint


def load_model(path, name=None):
    """The network to sample from, in eval mode on the CPU, and what is known of it: a checkpoint of
    train.py without its weights, or what stands for one.

    path: such a checkpoint; a file that the authors of ReDi, SiT or DiT publish, or the hub
    repository that holds it. name: the model's, as --model says it, which tells plain DiT from
    plain SiT; None: whatever it is. UserError if it cannot be had, or is another model.
    """
    if data.is_hub_name(path) and not path.endswith(model.WEIGHT_FILES):
        try:
            path = model.from_hub(path)
        except ValueError as error:
            raise data.UserError(f"{path}: {error}") from None
    content = load_weights(path)
    if isinstance(content, dict) and {"arch", "ema"} <= set(content):
        about = {key: content[key] for key in ("arch", "settings", "meta", "step")}
        net = load_ema(content)
    else:
        try:
            net = model.load_published(content, name and model.parse_name(name)[0])
        except ValueError as error:
            raise unusable(path, error) from None
        about = {"arch": net.arch, "step": None,
                 "settings": {"sample_steps": PUBLISHED_STEPS, "p_drop_z": None, "p_drop_y": None},
                 "meta": {"codec": data.VAE, "codec_weights": None, "scale": None, "shift": None,
                          "image_size": None, "z_std": None}}
    if name and about["arch"]["name"] != name:
        raise data.UserError(f"--model {name}: {path} is {about['arch']['name']}")
    return net.requires_grad_(False), about


def load_ema(checkpoint, device="cpu"):
    """The network with its averaged weights, ready to sample from."""
    net = model.build(**checkpoint["arch"])
    net.load_state_dict(checkpoint["ema"])
    return net.eval().requires_grad_(False).to(device)


def check_guidance(about, args):
    """UserError where the model cannot be guided as asked; a warning where that is not known."""
    arch, settings = about["arch"], about["settings"]
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
        if settings[dropout] is None and flag == "w_r":
            warn(f"{asked} with z-dropout; {args.ckpt} does not record whether it was")


def warn(text):
    if data.rank_and_count()[0] == 0:                      # one process speaks for all
        print(f"warning: {text}", file=sys.stderr)


def codec_for(args, about, device):
    """The codec that decodes, None where x are pixels, and the images' size. about["meta"] is told
    of --vae. UserError if it does not suit; a warning if it is not the one of the data."""
    arch, meta = about["arch"], about["meta"]
    of_data = meta["codec_weights"]
    if args.vae and not meta["codec"]:
        raise data.UserError(f"--vae {args.vae}: the samples of {args.ckpt} are pixels, which no "
                             "codec decodes; leave it out")
    if args.vae:
        meta |= {"codec": args.vae, "codec_weights": None, "scale": None, "shift": None}
    codec = data.codec_of(meta, device)
    if not codec:
        return None, arch["x_size"]
    size = arch["x_size"] * codec.factor
    if (codec.channels, size) != (arch["x_channels"], meta["image_size"] or size):
        raise data.UserError(
            f"--vae {codec.name} makes images of {size} pixels from {codec.channels} channels, the "
            f"model's data are of {meta['image_size'] or 'any'} pixels and {arch['x_channels']} "
            "channels; take the codec that made them")
    if of_data and codec.weights != of_data:
        warn(f"--vae {codec.name} is not the codec that made the data, its weights differ")
    return codec, size


class Store:
    """The samples of one run in the folder `out`: while they are made images.npy, z.npy of models
    with features, done.npy (n,), 1 for what is there, and progress.json; then samples.npz and
    samples.json. Any number of processes fill it, whole batches each.

    settings: what decides the samples; image: its shape, z: its shape or None; both of one image.
    """
    def __init__(self, out, settings, image, z=None):
        self.out, self.settings, n = out, settings, settings["n"]
        self.arrays = {"images": ((n, *image), np.uint8), "done": ((n,), np.uint8)}
        self.arrays |= {"z": ((n, *z), np.float32)} if z else {}

    def open(self, with_z, restart=False):
        """Make or find the files. The mask (n,) of the images that are there; None if samples.npz
        is, with_z or not. UserError if they are part of another run's."""
        progress, finished, npz = (f"{self.out}/{name}" for name in (
            "progress.json", "samples.json", "samples.npz"))
        stored = {} if restart else read_settings(progress)
        if stored:
            difference = self.difference(stored)
            if difference:
                raise data.UserError(f"{self.out} holds part of a run with another {difference}; "
                                     "that one's command finishes it, this one needs another "
                                     "--out, or --restart")
            if not all(os.path.exists(self.path(name)) for name in self.arrays):
                stored = {}                                # somebody removed some of it
        elif os.path.exists(npz) and not restart:
            difference = self.difference(read_settings(finished))
            with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(npz) as file:
                if not difference and (not with_z or "z.npy" in file.namelist()):
                    self.clear()
                    return None
            print(f"{npz} will be replaced"
                  + f": it has another {difference}" * bool(difference), flush=True)
        if not stored:
            os.makedirs(self.out, exist_ok=True)
            self.clear()
        for name, (shape, dtype) in self.arrays.items():
            data.allocate(self.path(name), shape, dtype)
        if not stored:
            data.write_json(progress, {"settings": self.settings})
        return self["done"].astype(bool)

    def difference(self, stored):
        """The first setting that is not as stored, in words; none: ""."""
        for key, value in self.settings.items():
            if stored.get(key, "unknown") != value:
                return f"--{key}: {stored.get(key, 'unknown')}, now {value}"
        return ""

    def path(self, name):
        return f"{self.out}/{name}.npy"

    def __getitem__(self, name):
        return np.load(self.path(name), mmap_mode="r")

    def write(self, rows, **arrays):
        """Images and z (>= len(rows), ...) of these rows; done when they are on the disk."""
        for name, array in arrays.items():
            data.write_rows(self.path(name), rows.start, array[:len(rows)])
        data.write_rows(self.path("done"), rows.start, np.ones(len(rows), np.uint8))

    def finish(self, y, with_z, made_with):
        """samples.npz, whole or not at all, written piece by piece; then samples.json. y None: no
        classes."""
        arrays = {"arr_0": self["images"]} | ({} if y is None else {"y": y})
        arrays |= {"z": self["z"]} if with_z else {}
        pca.write_whole(f"{self.out}/samples.npz", lambda file: np.savez(file, **arrays))
        data.write_json(f"{self.out}/samples.json", {"settings": self.settings,
                                                     "made_with": made_with})
        self.clear()

    def clear(self):
        for path in (f"{self.out}/progress.json", *map(self.path, ("images", "done", "z"))):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def read_settings(path):
    """The settings in a .json file of a Store; {} if there is none."""
    try:
        with open(path) as file:
            return json.load(file)["settings"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise data.UserError(f"{path} is damaged ({error}); choose another --out, or --restart"
                             ) from None


def write_pngs(images, folder, rank=0, n_ranks=1):
    """000000.png and on; this process's share of them. Rank 0 removes what others left there."""
    for name in os.listdir(folder) if rank == 0 and os.path.isdir(folder) else ():
        if re.fullmatch(r"\d{6,}\.png", name) and int(name[:-4]) >= len(images):
            os.remove(f"{folder}/{name}")

    def write(i):
        picture = data.Image.fromarray(images[i])
        pca.write_whole(f"{folder}/{i:06d}.png", lambda file: picture.save(file, "PNG"))

    if len(images):
        os.makedirs(folder, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in pool.map(write, range(rank, len(images), n_ranks)):
            pass


def check(args):
    """Refuse, before anything slow, values that cannot be."""
    for name, least in (("n", 1), ("n_sheet", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise data.UserError(f"--{name} {value} must be at least {least}")
    for name in ("w_cfg", "w_r"):
        if not math.isfinite(getattr(args, name)):
            raise data.UserError(f"--{name} {getattr(args, name)} must be a finite number")
    lo, hi = args.cfg_interval
    if not 0 <= lo <= hi <= 1:
        raise data.UserError(f"--cfg_interval {lo:g},{hi:g}: give two times from 0 (noise) to 1 "
                             "(data), the lower first")
    if args.compare and args.w_cfg == args.w_r == 1:
        raise data.UserError("--compare shows what guidance does: give --w_cfg, --w_r or both")


def write_batch(store, rows, state, meta, device):
    """Decode a batch and keep it."""
    x, *z = state
    if not x[:len(rows)].isfinite().all():
        raise data.UserError(f"the samples {rows.start} to {rows.stop - 1} hold NaN or infinity; "
                             "lower --w_cfg and --w_r, try --no-bf16, or an earlier checkpoint")
    z = {"z": z[0].float().cpu().numpy()} if "z" in store.arrays else {}
    store.write(rows, images=data.decode(x, meta, device), **z)


def fill(store, numbers, net, y, meta, device, quiet, **options):
    """Sample these batches and keep them; options: sample_batches()'s. Decoding and writing a batch
    overlaps with the next one."""
    for name in store.arrays:
        data.wait_for(store.path(name))                    # on a shared disk it may come later
    done = store["done"]
    with concurrent.futures.ThreadPoolExecutor(1) as writer, tqdm(
            total=len(y), initial=np.count_nonzero(done), unit="image", disable=quiet) as bar:
        writing = writer.submit(lambda: None)
        for rows, state in sample_batches(net, y, numbers, device=device, **options):
            writing.result()
            bar.update(np.count_nonzero(done) - bar.n)
            writing = writer.submit(write_batch, store, rows, state, meta, device)
        writing.result()
        bar.update(np.count_nonzero(done) - bar.n)


def show(net, y, meta, args, options):
    """The pictures of --compare and --trajectory."""
    y = y[:min(args.n_sheet, 10)]
    os.makedirs(args.out, exist_ok=True)
    for name, make in (("compare", compare), ("trajectory", trajectory)):
        if getattr(args, name):
            names, x, z = zip(*make(net, y, **options | {"batch_size": len(y)}))
            images = [data.decode(part, meta, options["device"]) for part in x]
            picture = sheet(images, z, z_std_of(meta, z[-1]), len(y), names)
            pca.write_whole(f"{args.out}/{name}.png", lambda file: picture.save(file, "PNG"))
            print(f"{args.out}/{name}.png")


def z_std_of(meta, z):
    """The deviations (r,) of the data's z; published weights do not tell them: the samples'."""
    return None if z is None else meta["z_std"] or np.std(np.asarray(z), (0, 2, 3)).tolist()


def make(store, net, y, meta, args, options):
    """Fill the store, where it is not full yet, and make samples.npz and the pictures."""
    rank, n_ranks = data.rank_and_count()
    size, png = options["batch_size"], f"{args.out}/png"
    done = data.share(store.open(args.save_z, data.begins_anew(args)) if rank == 0 else None)
    if done is None:
        if rank == 0:
            if args.png:
                write_pngs(np.load(f"{args.out}/samples.npz")["arr_0"], png)
            print(f"{args.out}/samples.npz is there already, made with these settings; --restart "
                  "makes it again")
        return
    missing = [b for b in range(-(-len(y) // size)) if not done[b * size:(b + 1) * size].all()]
    fill(store, missing[rank::n_ranks], net, y, meta, quiet=rank > 0, **options)
    data.barrier()
    write_pngs(store["images"] if args.png else [], png, rank, n_ranks)
    data.barrier()
    if rank == 0:
        lacking = np.count_nonzero(store["done"] == 0)
        if lacking:                                        # a process was lost without a word
            raise data.UserError(f"{lacking} of {len(y)} images in {args.out} are not there; "
                                 f"{data.same_command(args)} makes them")
        images = store["images"][:args.n_sheet]
        z = store["z"][:args.n_sheet] if net.r else None
        picture = sheet(images, z, z_std_of(meta, z))
        pca.write_whole(f"{args.out}/sheet.png", lambda file: picture.save(file, "PNG"))
        store.finish(y.numpy() if net.n_classes else None, args.save_z, {
            "batch_size": size, "processes": n_ranks, "device": str(options["device"]),
            "compile": args.compile, "torch": torch.__version__})
        print(f"{len(y)} images of {args.ckpt} ({store.settings['ckpt']}): {args.out}/sheet.png "
              f"and {args.out}/samples.npz{' and png/' * args.png}")


def main(args):
    check(args)
    rank, n_ranks = data.rank_and_count()
    net, about = load_model(args.ckpt, args.model)
    arch, meta = about["arch"], about["meta"]
    steps = about["settings"]["sample_steps"] if args.steps is None else args.steps
    solver = check_solver(arch["name"], args.solver, steps)
    check_guidance(about, args)
    if args.save_z and not net.r:
        raise data.UserError(f"--save_z: {args.ckpt} makes no features, it is of --fusion none")
    y = choose_labels(args.labels, args.n, arch["n_classes"], args.seed)
    device = data.begin(args, n_ranks, days=7)             # until the slowest has made its share
    codec, size = codec_for(args, about, device)
    options = {"steps": steps, "solver": solver} | {name: getattr(args, name) for name in (
        "seed", "bf16", "w_cfg", "w_r", "cfg_on", "rg_on", "cfg_interval")}
    settings = options | {
        "ckpt": f"{arch['name']} {data.weights_hash(net)[:16]}", "n": args.n, "labels": args.labels,
        "vae": codec and f"{codec.kind} {codec.weights[:16]}"}
    options |= {"device": device, "batch_size": args.batch_size or min(args.n, 64)}
    net = net.to(device)
    if args.compile:
        for block in net.blocks:                                 # one block's code serves all
            block.compile(dynamic=False)
    if args.compare or args.trajectory:
        if rank == 0:
            show(net, y, meta, args, options)
    else:
        with data.clear_errors(args, f"the images that are made are in {args.out}",
                               "a smaller --batch_size helps"):
            z = (net.r, net.x_size, net.x_size) if net.r else None
            make(Store(args.out, settings, (size, size, 3), z), net, y, meta, args, options)
    if n_ranks > 1:
        dist.destroy_process_group()


def interval(text):
    """argparse's type of --cfg_interval."""
    lo, hi = map(float, text.split(","))
    return [lo, hi]


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(name, default, meaning, **options):
        if "choices" not in options:
            options.setdefault("type", type(default))
        p.add_argument(f"--{name}", default=default, help=f"{meaning} (default: %(default)s)",
                       **options)

    def switch(name, default, meaning):
        usual = "on for GPUs" if default is None else "off"
        p.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default,
                       help=f"{meaning} (default: {usual})")

    flag("ckpt", "out/ckpt.pt", "checkpoint of train.py; a file that the authors of ReDi, SiT or "
                                "DiT publish; or the hub repository that holds it, as OWNER/NAME")
    p.add_argument("--model", choices=model.NAMES, metavar="NAME",
                   help="what it is, such as DiT-XL/2: needed for published weights of plain DiT "
                        "and SiT, which look alike (default: as the weights say)")
    flag("out", "samples", "output folder", metavar="DIR")
    switch("restart", False, "begin anew in --out, whatever it holds")
    flag("n", 60, "number of images; under Python 3.11 torchrun takes --n for a flag of its own, "
                  "unless -- stands before sample.py")
    flag("n_sheet", 60, "how many of them the sheet shows at most")
    switch("save_z", False, "the generated features too, in samples.npz")
    switch("png", False, "the images as files too, png/000000.png and on")
    switch("compare", False, "instead, compare.png: the first --n_sheet images, 10 at most, "
                             "without guidance, with --w_cfg, with --w_r and with both")
    switch("trajectory", False, "instead, trajectory.png: what the network takes for the clean "
                                "image and features on the way from noise to data")
    p.add_argument("--batch_size", type=int, help="images a batch (default: n, at most 64)")
    flag("seed", 0, "image i is a function of (seed, i)")
    flag("labels", "random", "random, balanced, or classes N,N,... that are cycled")
    p.add_argument("--solver", choices=[name for solvers in SOLVERS.values() for name in solvers],
                   help="for SiT sde (Euler-Maruyama, the default), euler or heun (ODE); for DiT "
                        "ddpm (the default) or ddim")
    p.add_argument("--steps", type=int, help="network calls per image (default: the training run's "
                                             "--sample_steps: 250, for digits 40)")
    p.add_argument("--vae", help="codec that decodes, hub name or local folder (default: the one "
                                 "that made the training data)")
    flag("w_cfg", 1.0, "weight of classifier-free guidance, 1 is off")
    flag("w_r", 1.0, "weight of representation guidance, 1 is off")
    flag("cfg_on", "x", "what w_cfg guides: x, or x and z", choices=["x", "both"])
    flag("rg_on", "x", "what w_r guides: x, or x and z", choices=["x", "both"])
    p.add_argument("--cfg_interval", type=interval, default=[0.0, 1.0], metavar="LO,HI",
                   help="times, 0 is noise and 1 data, between which w_cfg acts; elsewhere its "
                        "branch is not computed (default: 0,1: always)")
    switch("bf16", None, "bfloat16 autocast of the network")
    switch("compile", None, "compile the network's blocks")
    p.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    return p


if __name__ == "__main__":
    data.run_cli(record(main), parser().parse_args())
