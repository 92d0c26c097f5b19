"""Sampling: guided predictions, solvers, decoding, pictures.

    python sample.py --w_r 1.5                     # from out/ckpt.pt, which train.py wrote
    python sample.py --ckpt zelaki/SiT-ReDi-XL-2 --w_cfg 2.4           # the authors' own weights
    torchrun --nproc_per_node=8 sample.py --n_samples 50000 --labels random    # as tables need

Writes DIR/samples.npz: arr_0 uint8 (N, H, W, 3) as in ADM's files, y (N,) and with --save_z z
(N, r, h, w); sheet.png, images above their generated feature maps; and samples.json, how they were
made. Image i depends on (seed, i) alone.
"""
import run


def interval(text):
    """argparse's type of --cfg_interval."""
    lo, hi = map(float, text.split(","))
    if not 0 <= lo <= hi <= 1:
        raise ValueError
    return [lo, hi]


def parser():
    p = run.Parser(description=__doc__)
    p.flag("ckpt", "out/ckpt.pt", "checkpoint of train.py; a file that the authors of ReDi, SiT or "
                                  "DiT publish; or the hub repository that holds it, as OWNER/NAME")
    p.add_argument("--model", metavar="NAME",
                   help="what it is, such as DiT-XL/2: needed for published weights of plain DiT "
                        "and SiT, which look alike (default: as the weights say)")
    p.flag("out", "samples", "output folder", metavar="DIR")
    p.switch("restart", False, "begin anew, and replace the samples in --out")
    p.flag("n_samples", 60, "number of images", type=run.count)
    p.flag("n_sheet", 60, "how many of them sheet.png shows at most", type=run.count)
    p.switch("save_z", False, "the generated features too, in samples.npz")
    p.switch("png", False, "the images as files too, png/000000.png and on")
    p.switch("compare", False, "instead, compare.png: the first --n_sheet images, 10 at most, "
                               "without guidance, with --w_cfg, with --w_r and with both")
    p.switch("trajectory", False, "instead, trajectory.png: what the network takes for the clean "
                                  "image and features on the way from noise to data")
    p.add_argument("--z_from", nargs="+", metavar="IMAGE",
                   help="instead, variations.png: samples from the features of these images, or of "
                        "rows of a prepared folder, as in prepared/digits:3,14,15")
    p.add_argument("--batch_size", type=run.count,
                   help="images a batch (default: --n_samples, at most 64)")
    p.flag("seed", 0, "image i is a function of (seed, i)", type=run.natural)
    p.add_argument("--labels", help="balanced, which is all classes in turn, random, as the tables "
                   "of papers have it, or classes N,N,... in turn (default: balanced)")
    p.add_argument("--solver", choices=["sde", "euler", "heun", "ddpm", "ddim"],
                   help="for SiT sde (Euler-Maruyama, the default), euler or heun (ODE); for DiT "
                        "ddpm (the default) or ddim")
    p.add_argument("--steps", type=run.count, help="sampling steps, network calls per image (NFE) "
                   "(default: the training run's --sample_steps: 250, for digits 40)")
    p.add_argument("--vae", help="VAE that decodes, hub name or local folder (default: the one "
                                 "that made the training data)")
    p.flag("w_cfg", 1.0, "weight of classifier-free guidance, the cfg_scale of others; 1 is off",
           type=run.finite)
    p.flag("w_r", 1.0, "weight of representation guidance; 1 is off", type=run.finite)
    p.flag("cfg_on", "x", "what w_cfg guides: x, or x and z", choices=["x", "both"])
    p.flag("rg_on", "x", "what w_r guides: x, or x and z", choices=["x", "both"])
    p.add_argument("--cfg_interval", type=interval, default=[0.0, 1.0], metavar="LO,HI",
                   help="times, 0 is noise and 1 data, between which w_cfg acts; elsewhere its "
                        "term is not computed (default: 0,1: always)")
    p.device_flags()
    return p


if __name__ == "__main__":     # before torch, which takes seconds: --help and typos are quicker
    args = parser().parse_args()

import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import zipfile

import numpy as np
import torch
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import data
import model
import pca
import pretrained
from run import UserError


def guided(net, y, w_cfg=1.0, w_r=1.0, cfg_on="x", rg_on="x", cfg_interval=(0.0, 1.0)):
    """predict(state, t) -> a prediction for each part of state, for any solver.

    With e(z, y) the network's prediction for x_t, z_t and label y:
        e(z, y) + (w_cfg - 1) [e(z, y) - e(z, null)] + (w_r - 1) [e(z, y) - e(0, y)]
    which is classifier-free guidance for w_r = 1, representation guidance (ReDi, section 3.5) for
    w_cfg = 1 and one plain call for both 1. All its terms are one batch of the network. It acts on
    x's eps or v, and on z's where cfg_on / rg_on is "both"; DiT's variances are those of e(z, y).
    Outside cfg_interval, times from 0 (noise) to 1 (data), w_cfg counts as 1. state: (x_t, z_t), or
    (x_t,) for fusion none; t: one number.
    """
    def predict(state, t):
        lo, hi = cfg_interval
        terms = {"e(z, y)": (y, False)}                               # label, whether z is dropped
        if w_cfg != 1 and lo <= net.diffusion.normalised_time(t) <= hi:
            terms["e(z, null)"] = (torch.full_like(y, net.n_classes), False)
        if w_r != 1:
            terms["e(0, y)"] = (y, True)
        labels = torch.cat([label for label, _ in terms.values()])                      # (n B,)
        dropped = torch.cat([torch.full_like(y, drop, dtype=torch.bool)
                             for _, drop in terms.values()])
        x_t, z_t, *_ = [part.repeat(len(terms), 1, 1, 1) for part in state] + [None]
        preds = net(x_t, model.drop_z(z_t, dropped) if net.r else None,
                    torch.full((len(labels),), t, device=x_t.device), labels)
        results = []
        for name, part, pred in zip("xz", state, preds):
            e = dict(zip(terms, pred.to(part.dtype).chunk(len(terms))))
            plain, channels = e["e(z, y)"], part.shape[1]
            result = plain.clone()
            if "e(z, null)" in e and cfg_on in (name, "both"):
                result[:, :channels] += (w_cfg - 1) * (plain - e["e(z, null)"])[:, :channels]
            if "e(0, y)" in e and rg_on in (name, "both"):
                result[:, :channels] += (w_r - 1) * (plain - e["e(0, y)"])[:, :channels]
            results.append(result)
        return results

    return predict


def given_z(z, guide=guided):
    """A guide for sample_batches(), as `guide`, but with z (n, r, H, W) given: image i sees
    z[i % n], noised to t with the eps that its z_t begins with. The prediction that implies this z
    stands in for the network's: every solver ends in it, the SDE but for 0.04 eps."""
    rows = itertools.count()                               # batches come in order

    def guide_given(net, y, **guidance):
        predict, eps = guide(net, y, **guidance), []
        mine = z[[next(rows) % len(z) for _ in y]].to(y.device)                      # (B, r, H, W)

        def predict_given(state, t):
            eps[:] = eps or state[1:]
            times = torch.full((len(y),), t, device=y.device)
            state[1] = net.diffusion.add_noise(mine, *eps, times)   # whatever noise came on top
            return [predict(state, t)[0], net.diffusion.prediction(mine, *eps)]

        return predict_given

    return guide_given


# solver(predict, diffusion, state, steps, noise) -> state at the data end, from pure noise. state:
# x_t and z_t, or x_t alone; steps: network calls (NFE); noise(): fresh noise, shaped like state.

def euler(predict, diffusion, state, steps, noise):
    """Probability-flow ODE: dx = v dt from t = 0 to 1."""
    dt = 1 / steps
    for k in range(steps):
        state = [part + v * dt for part, v in zip(state, predict(state, k * dt))]
    return state


def heun(predict, diffusion, state, steps, noise):
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


def euler_maruyama(predict, diffusion, state, steps, noise, last=0.04):
    """SiT's reverse SDE: dx = (v + w score) dt + sqrt(2 w) dW with w = sigma_t = 1 - t; steps - 1
    steps to t = 1 - last, one without noise from there. v and score share a network call."""
    dt = (1 - last) / (steps - 1)
    for k in range(steps):
        t = k * dt
        w = 1 - t
        drift = [v + w * diffusion.score(v, part, t) for part, v in zip(state, predict(state, t))]
        if k == steps - 1:
            return [part + d * last for part, d in zip(state, drift)]
        state = [part + d * dt + (2 * w * dt) ** 0.5 * eps
                 for part, d, eps in zip(state, drift, noise())]


def ddpm(predict, diffusion, state, steps, noise):
    """Ancestral sampling with learned variance, on `steps` of the 1000 timesteps (2102.09672)."""
    chain = diffusion.respaced(steps)
    for k in reversed(range(steps)):
        preds = predict(state, chain.timesteps[k])
        gaussians = [chain.posterior(pred, part, k) for pred, part in zip(preds, state)]
        if k == 0:
            return [mean for mean, _ in gaussians]
        state = [mean + (0.5 * log_var).exp() * eps
                 for (mean, log_var), eps in zip(gaussians, noise())]


def ddim(predict, diffusion, state, steps, noise):
    """The same chain without noise (2010.02502, eta = 0): the denoised sample, noised again with
    the eps that was predicted; the denoised sample itself at last."""
    chain = diffusion.respaced(steps)
    for k in reversed(range(steps)):
        preds = predict(state, chain.timesteps[k])
        denoised = [chain.denoised(pred, part, k) for pred, part in zip(preds, state)]
        if k == 0:
            return denoised
        alpha, sigma = float(chain.alpha[k - 1]), float(chain.sigma[k - 1])
        state = [alpha * part + sigma * pred[:, :part.shape[1]]
                 for part, pred in zip(denoised, preds)]


# each diffusion's, its default first
SOLVERS = {model.Flow: {"sde": euler_maruyama, "euler": euler, "heun": heun},
           model.DDPM: {"ddpm": ddpm, "ddim": ddim}}


def check_solver(name, solver, steps, flag="--steps"):
    """The solver's name (None: the default), if it suits the model `name` and takes `steps`, else
    UserError."""
    family, _, _ = model.parse_name(name)
    solvers = SOLVERS[model.FAMILIES[family]]
    solver = solver or next(iter(solvers))
    if solver not in solvers:
        raise UserError(f"--solver {solver} is not for {family}; take {' or '.join(solvers)}")
    least = 1 if solver in ("euler", "heun") else 2
    most = model.DDPM.n_timesteps if family == "DiT" else math.inf
    if not least <= steps <= most:
        up_to = f"to {most}" if family == "DiT" else "or more"
        raise UserError(f"{flag} {steps}: the solver {solver} takes {least} {up_to}")
    return solver


def image_noise(net, seed, indices, device):
    """Yields (eps_x, eps_z), or (eps_x,) without features, on the device: always new numbers, image
    i's a function of (seed, i) alone, x's the same for every fusion. A thread is one ahead."""
    channels = {"noise of x": net.x_channels} | ({"noise of z": net.r} if net.r else {})
    generators = {name: [run.generator(seed, name, i) for i in indices] for name in channels}

    def draw(_):
        noise = [torch.stack([torch.randn(n, net.x_size, net.x_size, generator=generator)
                              for generator in generators[name]]) for name, n in channels.items()]
        if device.type == "cuda":
            noise = [part.pin_memory() for part in noise]
        return [part.to(device, non_blocking=True) for part in noise]

    return run.prefetch(draw, itertools.count(), ahead=1)


@torch.no_grad()
def sample_batches(net, y, numbers, steps, solver=None, seed=0, batch_size=64, device="cpu",
                   bf16=False, guide=guided, **guidance):
    """For each b of numbers: the rows of batch b of y (n,), b * batch_size and on, and its final
    state on the device, x (B, C, H, W) and z (B, r, H, W), or x alone. The last batch is padded, so
    that every network always sees the same shapes: it has fewer rows than B.

    solver: a name that SOLVERS has for net.diffusion, None for the first; bf16: the network
    computes under autocast, the solver in float32; guide: makes predict of net, y and guidance.
    """
    device, solvers = torch.device(device), SOLVERS[type(net.diffusion)]
    solve = solvers[solver or next(iter(solvers))]
    padded = torch.cat([y, y[:1].expand(-len(y) % batch_size)]).to(device)
    for b in numbers:
        rows = range(b * batch_size, (b + 1) * batch_size)
        predict = guide(net, padded[rows.start:rows.stop], **guidance)
        with contextlib.closing(image_noise(net, seed, rows, device)) as noise, \
                torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            state = solve(predict, net.diffusion, next(noise), steps, noise.__next__)
        yield rows[:len(y) - rows.start], state


def generate(net, y, steps, solver=None, seed=0, batch_size=None, device="cpu", progress=False,
             **options):
    """A sample for each label of y (n,) -> x (n, C, H, W), z (n, r, H, W) or None, on the CPU.
    The arguments are those of sample_batches(); batch_size None: all at once, but 64 at most."""
    batch_size = batch_size or min(len(y), 64)
    numbers = tqdm(range(math.ceil(len(y) / batch_size)), "sampling", unit="batch",
                   disable=not progress)
    states = [[part.cpu() for part in state] for _, state in sample_batches(
        net, y, numbers, steps, solver, seed, batch_size, device, **options)]
    x, *z = (torch.cat(parts)[:len(y)] for parts in zip(*states))
    return x, z[0] if z else None


def choose_labels(labels, n, n_classes, seed):
    """Classes (n,). labels: "balanced" (i mod n_classes), "random" (y_i a function of (seed, i); 0
    where n_classes is 0) or "3,1,4", in turn. UserError for classes that do not exist."""
    if labels == "random":
        return torch.cat([torch.randint(n_classes or 1, (1,), generator=run.generator(
            seed, "label", i)) for i in range(n)])
    with run.blamed_on(f"--labels {labels}", "give random, or for models with classes balanced or "
                       f"some of 0 to {n_classes - 1}, such as 3,1,4"):
        y = range(n_classes) if labels == "balanced" else [int(y) for y in labels.split(",")]
        if not y or min(y) < 0 or max(y) >= n_classes:
            raise ValueError(f"the model has {n_classes} classes")
    return torch.tensor(y)[torch.arange(n) % len(y)]


def versions_grid(versions, z_std=None, columns=10):
    """A PIL image of samples uint8 (n, H, W, 3) above their features z (n, r, H, W) or None: rows
    of `columns` images, tiles at least 48 pixels wide. versions: [(name, images, z)], which stand
    one below the other. z_std (r,): the data's, for equal brightness; None: of these z."""
    kinds, names = [], []
    for name, images, z in versions:
        kinds.append(images)
        names.append(name)
        if z is not None:
            std = z_std or np.concatenate([z for *_, z in versions if z is not None]).std((0, 2, 3))
            kinds.append(pca.colours(z, std))
            names.append("")
    size = kinds[0].shape[1]
    return pca.image_grid(kinds, columns, size * math.ceil(48 / size),
                          names=names if any(names) else ())


def sheet(images, z=None, y=None, classes=(), z_std=None, columns=10):
    """versions_grid() of samples of classes y (n,), class by class, or as they come if
    these are more than `columns`; the name of a row's class, or of its first and last, on the left."""
    if y is None:
        return versions_grid([("", images, z)], z_std, columns)
    groups = [np.flatnonzero(y == k) for k in np.unique(y)]
    if len(groups) > columns:
        groups = [np.arange(len(y))]
    versions = []
    for group in groups:
        for row in np.split(group, range(columns, len(group), columns)):
            ends = dict.fromkeys(str(classes[y[i]]) for i in (row[0], row[-1]))
            versions.append((" ... ".join(ends), images[row], None if z is None else z[row]))
    return versions_grid(versions, z_std, columns)


def compare(net, y, w_cfg=1.0, w_r=1.0, **options):
    """[(name, x, z)]: samples without guidance, with each kind and with both, from equal noise."""
    names = {(w_cfg, w_r): "both", (1, w_r): f"RG {w_r:g}", (w_cfg, 1): f"CFG {w_cfg:g}",
             (1, 1): "no guidance"}                        # of equal weights the last name holds
    return [(name, *generate(net, y, w_cfg=a, w_r=b, **options))
            for (a, b), name in reversed(names.items())]


def variations(net, y, z, seed=0, n=4, **options):
    """[(name, x, None)]: samples from the given z (len(y), r, H, W), with n seeds."""
    return [(f"seed {each}", generate(net, y, seed=each, guide=given_z(z), **options)[0], None)
            for each in range(seed, seed + n)]


def trajectory(net, y, n=8, **options):
    """[(name, x, z)]: what the network takes for the clean x and z at n of its calls, from noise to
    data, and the samples. z's outlines settle before x's details do."""
    seen = []

    def watched(net, y, **guidance):
        predict = guided(net, y, **guidance)

        def watch(state, t):
            preds = predict(state, t)
            x, *z = (net.diffusion.denoised(pred, part, t).cpu()
                     for pred, part in zip(preds, state))
            seen.append((f"t = {net.diffusion.normalised_time(t):.2f}", x, z[0] if z else None))
            return preds

        return watch

    sample = generate(net, y, guide=watched, **options | {"batch_size": len(y)})
    chosen = np.linspace(0, len(seen) - 1, n).round().astype(int)
    return [*(seen[i] for i in chosen), ("sample", *sample)]


def check_guidance(metadata, args):
    """UserError where the model cannot be guided as asked; a warning where that is not known."""
    config, settings = metadata["config"], metadata["settings"]
    for weight, dropout, n, what in (
            ("w_r", "p_drop_z", config["r"], "features, but --fusion none"),
            ("w_cfg", "p_drop_y", config["n_classes"], "classes")):
        value, share = getattr(args, weight), settings.get(dropout)
        if value == 1:
            continue
        needs = f"--{weight} {value:g} needs a model trained with --{dropout} > 0; {args.ckpt}"
        if n == 0:
            raise UserError(f"{needs} has no {what}. Use --{weight} 1")
        if share == 0:
            raise UserError(f"{needs} has 0. Retrain, or use --{weight} 1")
        if share is None and weight == "w_r":              # published CFG is known to work
            warn(f"{needs} does not record it")


def warn(text):
    if run.rank_and_count()[0] == 0:                       # one process speaks for all
        print(f"warning: {text}", file=sys.stderr)


def vae_for(args, metadata, device):
    """The VAE that decodes, None where x are pixels; --vae becomes the metadata's. UserError if it
    does not suit; a warning if it is not the one of the data."""
    config, meta = metadata["config"], metadata["meta"]
    of_data = meta["vae_weights"]
    if args.vae and not meta["vae"]:
        raise UserError(f"--vae {args.vae}: {args.ckpt} makes pixels, which no VAE decodes")
    if args.vae:
        meta |= {"vae": args.vae, "vae_weights": None, "scale": None, "shift": None}
    vae = pretrained.vae_of(meta, device)
    if vae:
        channels, size = config["x_channels"], config["x_size"] * vae.factor
        if (vae.channels, size) != (channels, meta["image_size"] or size):
            raise UserError(f"--vae {vae.name} makes {size} pixels from {vae.channels} channels, "
                            f"the data have {meta['image_size'] or 'any'} and {channels}; take the "
                            "VAE that made them")
        if of_data and vae.weights != of_data:
            warn(f"--vae {vae.name} is not the VAE that made the data, its weights differ")
    return vae


def check_finite(x, what):
    if not x.isfinite().all():
        raise UserError(f"{what} hold NaN or infinity; lower --w_cfg and --w_r, try --no-bf16, or "
                        "an earlier checkpoint")


def make_parts(parts, net, y, meta, n_z, **options):
    """Sample the batches that are absent, a part each: arr_0, the images, y and, of the first n_z,
    z, where the net has them. Decoding and writing overlaps with the next batch."""
    def write(part):
        path, (rows, state) = part
        x, *z = (each[:len(rows)] for each in state)
        check_finite(x, f"the samples {rows.start} to {rows.stop - 1}")
        arrays = {"arr_0": data.decode(x, meta, options["device"])}
        arrays |= {"y": y[rows.start:rows.stop].numpy()} if net.n_classes else {}
        arrays |= {"z": z[0].float().cpu().numpy()} if net.r and rows.start < n_z else {}
        run.write_whole(path, lambda file: np.savez(file, **arrays))

    mine = parts.mine()
    made = zip([parts.paths[b] for b in mine], sample_batches(net, y, mine, **options))
    for _ in tqdm(run.prefetch(write, made, ahead=1), total=len(mine), unit="batch",
                  disable=run.rank_and_count()[0] > 0):
        pass
    parts.complete()


def write_npz(path, parts, names, n):
    """The n rows of these arrays of the parts as one file, never more than a part in memory."""
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                first = np.load(parts.paths[0])[name]
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array_header_1_0(entry, {
                        "descr": first.dtype.str, "fortran_order": False,
                        "shape": (n, *first.shape[1:])})
                    for path in parts.paths:
                        entry.write(np.load(path)[name].tobytes())

    run.write_whole(path, write)


def write_pngs(images, folder):
    """000000.png and on, instead of those of earlier samples."""
    os.makedirs(folder, exist_ok=True)
    for path in glob.glob(f"{glob.escape(folder)}/{6 * '[0-9]'}.png"):
        os.remove(path)
    for _ in run.prefetch(lambda i: Image.fromarray(images[i]).save(f"{folder}/{i:06d}.png"),
                          range(len(images)), os.cpu_count()):
        pass


def remove_parts(out):
    """Those of make_samples(), of any settings."""
    for folder in glob.glob(f"{glob.escape(out)}/parts/{12 * '[0-9a-f]'}"):
        shutil.rmtree(folder)
    with contextlib.suppress(OSError):                     # none, or it holds other things
        os.rmdir(f"{out}/parts")


def is_finished(args, settings):
    """Whether args.out holds samples of these settings. UserError if it has others, unless
    --restart is to replace them."""
    npz, about = (f"{args.out}/samples.{kind}" for kind in ("npz", "json"))
    if args.restart or not os.path.exists(npz):
        return False
    with run.blamed_on(f"{npz} or {about} is damaged", "choose another --out, or --restart"), \
            open(about) as file:
        zipfile.ZipFile(npz).close()
        stored = json.load(file)["settings"]
    for key, value in settings.items():
        if stored.get(key) != value:
            raise UserError(f"{args.out} holds samples of another --{key}: {stored.get(key)}, now "
                            f"{value}; choose another --out, or --restart to replace them")
    return True


def save_versions(path, versions, meta, device, above=()):
    """Draw versions [(name, x, z)], below those `above` of [(name, images, z)]."""
    for name, x, _ in versions:
        check_finite(x, f"the samples {name}")
    drawn = [(name, data.decode(x, meta, device), z) for name, x, z in versions]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    run.write_picture(path, versions_grid([*above, *drawn], meta["z_std"]))
    print(path)


def read_given(args, net, metadata, device):
    """--z_from's images uint8 (n, H, W, 3); their z (n, r, H, W), on x's grid; classes y (n,) to
    sample, n_classes where none are known. UserError if the network's z are others."""
    meta, names = metadata["meta"], args.z_from
    if not (net.r and meta.get("encoders")):
        raise UserError(f"--z_from needs a model of z whose encoder is known; {args.ckpt} is none")
    folder, _, rows = names[0].rpartition(":")
    of_rows = len(names) == 1 and os.path.isdir(folder)
    dataset = data.open_data(folder if of_rows else metadata["settings"]["data"], net.r)
    for key in ("encoders", "z_std", "z_size", "x_size"):
        wanted, found = (run.one_line(each[key]) for each in (meta, dataset.meta))
        if wanted != found:
            raise UserError(f"--z_from: {dataset.folder} has {key} {found}; {args.ckpt} was "
                            f"trained with {wanted}")
    if of_rows:
        with run.blamed_on(f"--z_from {names[0]}", f"rows are 0 to {dataset.n - 1}"):
            x, z, y, _ = dataset.unpack(dataset.read([run.natural(row) for row in rows.split(",")]))
        images = data.decode(x, dataset.meta, device)
    else:
        images, z = data.encode_images(names, dataset, device)
    if args.labels:
        y = choose_labels(args.labels, len(z), net.n_classes, args.seed)
    elif not (of_rows and net.n_classes):
        y = torch.full((len(z),), net.n_classes)
    return images, z, y


def make_samples(net, y, meta, args, options, settings):
    """samples.npz and the pictures in args.out, from parts that a killed run left or makes."""
    out, n, rank = args.out, len(y), run.rank_and_count()[0]
    size = args.batch_size or min(n, 64)
    key = hashlib.sha256(json.dumps([settings, size]).encode()).hexdigest()[:12]
    parts = run.Parts(f"{out}/parts/{key}", math.ceil(n / size), "npz")
    with run.locked(out):
        if not run.share(rank == 0 and is_finished(args, settings)):
            if rank == 0 and run.restart_requested(args):  # if killed: continues without --restart
                remove_parts(out)
                for name in ("json", "npz"):
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(f"{out}/samples.{name}")
            run.gather(None)
            make_parts(parts, net, y, meta, n if args.save_z else args.n_sheet, batch_size=size,
                       **options)
            if rank == 0:
                shown = parts.paths[:math.ceil(args.n_sheet / size)]
                first = [dict(np.load(path)) for path in shown]
                images, z, y = (np.concatenate([part[name] for part in first])[:args.n_sheet]
                                if name in first[0] else None for name in ("arr_0", "z", "y"))
                run.write_picture(f"{out}/sheet.png", sheet(
                    images, z, y, meta.get("classes") or range(net.n_classes), meta["z_std"]))
                names = [name for name in first[0] if name != "z" or args.save_z]
                run.write_json(f"{out}/samples.json", {"settings": settings, "made_with": {
                    "device": str(options["device"]), "torch": torch.__version__,
                    "compile": args.compile, "processes": run.rank_and_count()[1]}})
                write_npz(f"{out}/samples.npz", parts, names, n)
                remove_parts(out)
        if rank == 0 and args.png:
            write_pngs(np.load(f"{out}/samples.npz")["arr_0"], f"{out}/png")
        run.end()
    if rank == 0:
        print(f"{n} images of {args.ckpt} ({settings['ckpt']}), labels {settings['labels']}: "
              f"{out}/sheet.png and {out}/samples.npz{' and png/' * args.png}")


def main(args):
    if args.compare and args.w_cfg == args.w_r == 1:
        raise UserError("--compare shows what guidance does: give --w_cfg, --w_r or both")
    net, metadata = pretrained.load_model(args.ckpt, args.model)
    config, meta = metadata["config"], metadata["meta"]
    steps = args.steps or metadata["settings"].get("sample_steps", pretrained.PUBLISHED_STEPS)
    solver = check_solver(config["name"], args.solver, steps)
    check_guidance(metadata, args)
    if args.save_z and not net.r:
        raise UserError(f"--save_z: {args.ckpt} makes no features, it is of --fusion none")
    labels = args.labels or ("balanced" if net.n_classes else "random")
    y = choose_labels(labels, args.n_samples, net.n_classes, args.seed)
    device = run.begin(args, days=7)                       # until the slowest has made its share
    vae = vae_for(args, metadata, device)
    options = {"steps": steps, "solver": solver} | {name: getattr(args, name) for name in (
        "seed", "bf16", "w_cfg", "w_r", "cfg_on", "rg_on", "cfg_interval")}
    settings = options | {                                 # what decides the files in --out
        "ckpt": f"{config['name']} {pretrained.weights_hash(net)[:16]}", "n_samples": len(y),
        "labels": labels, "n_sheet": args.n_sheet, "save_z": args.save_z,
        "vae": vae and f"{vae.kind} {vae.weights[:16]}"}
    options["device"] = device
    net = net.to(device)
    if args.compile:
        net.compile_blocks()
    if not (args.compare or args.trajectory or args.z_from):
        make_samples(net, y, meta, args, options, settings)
    elif run.rank_and_count()[0] == 0:
        y = y[:min(args.n_sheet, 10)]
        if args.compare:
            save_versions(f"{args.out}/compare.png", compare(net, y, **options), meta, device)
        if args.trajectory:
            save_versions(f"{args.out}/trajectory.png", trajectory(net, y, **options), meta, device)
        if args.z_from:
            images, z, y = read_given(args, net, metadata, device)
            save_versions(f"{args.out}/variations.png", variations(net, y, z, **options), meta,
                          device, [("given", images, z)])


if __name__ == "__main__":
    run.run_cli(record(main), args)
