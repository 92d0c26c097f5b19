"""Sampling: guided predictions, solvers, decoding, pictures.

    python sample.py --w_r 1.5                     # from out/ckpt.pt, which train.py wrote
    python sample.py --ckpt zelaki/SiT-ReDi-XL-2 --w_cfg 2.4           # the authors' own weights
    torchrun --nproc_per_node=8 sample.py --n_samples 50000            # as papers' tables need

Writes DIR/samples.npz: arr_0 uint8 (N, H, W, 3) as in ADM's files, y (N,) and with --save_z z
(N, r, h, w); sheet.png, images above their generated feature maps; and samples.json, how they were
made. Image i depends on (seed, i) alone.
"""
import concurrent.futures
import contextlib
import functools
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
import run
from run import UserError


def guided(net, y, w_cfg=1.0, w_r=1.0, cfg_on="x", rg_on="x", cfg_interval=(0.0, 1.0)):
    """predict(state, t) -> a prediction for each part of state, for solvers that know no guidance.

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
        raise UserError(f"{flag} {steps}: the solver {solver} takes {least} to {most}")
    return solver


def image_noise(net, seed, indices, device):
    """Yields (eps_x, eps_z), or (eps_x,) without features, on the device: always new numbers, image
    i's a function of (seed, i) alone, x's the same for every fusion. A thread is one ahead."""
    channels = {"noise of x": net.x_channels} | ({"noise of z": net.r} if net.r else {})
    generators = {name: [run.generator(seed, name, i) for i in indices] for name in channels}

    def draw(_):
        noise = [torch.stack([torch.randn(n, net.x_size, net.x_size, generator=generator)
                              for generator in generators[name]]) for name, n in channels.items()]
        return [part.pin_memory() for part in noise] if device.type == "cuda" else noise

    with contextlib.closing(run.prefetch(draw, itertools.count(), ahead=1)) as draws:
        for noise in draws:
            yield [part.to(device, non_blocking=True) for part in noise]


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


def generate(net, y, steps, solver=None, seed=0, batch_size=64, device="cpu", progress=False,
             **options):
    """A sample for each label of y (n,) -> x (n, C, H, W), z (n, r, H, W) or None, on the CPU.
    The arguments are those of sample_batches()."""
    numbers = tqdm(range(-(-len(y) // batch_size)), "sampling", unit="batch", disable=not progress)
    states = [[part.cpu() for part in state] for _, state in sample_batches(
        net, y, numbers, steps, solver, seed, batch_size, device, **options)]
    x, *z = (torch.cat(parts)[:len(y)] for parts in zip(*states))
    return x, z[0] if z else None


def choose_labels(labels, n, n_classes, seed):
    """Classes (n,). labels: "random" (y_i a function of (seed, i)), "balanced" (i mod n_classes) or
    "3,1,4", cycled; all zeros where n_classes is 0. UserError for classes that do not exist."""
    if n_classes == 0 and labels == "random":
        return torch.zeros(n, dtype=torch.long)
    if labels == "random":
        return torch.cat([torch.randint(n_classes, (1,), generator=run.generator(seed, "label", i))
                          for i in range(n)])
    with run.blamed_on(f"--labels {labels}", "give random, or for models with classes balanced or "
                       f"some of 0 to {n_classes - 1}, such as 3,1,4"):
        y = range(n_classes) if labels == "balanced" else [int(y) for y in labels.split(",")]
        if not y or min(y) < 0 or max(y) >= n_classes:
            raise ValueError(f"the model has {n_classes} classes")
    return torch.tensor(y)[torch.arange(n) % len(y)]


def image_grid(versions, z_std, columns=10, least=48):
    """A PIL image of samples uint8 (n, H, W, 3) above their features z (n, r, H, W) or None, which
    z_std makes equally bright: rows of `columns` images, tiles at least `least` pixels wide.
    versions: [(name, images, z)] of the same samples, which stand one below the other."""
    kinds, names = [], []
    for name, images, z in versions:
        pair = [images] + ([] if z is None else [pca.colours(z, z_std)])
        kinds += pair
        names += [name, ""][:len(pair)]
    size = kinds[0].shape[1]
    return pca.image_grid(kinds, columns, size * -(-least // size),
                          names=names if any(names) else ())


def compare(net, y, w_cfg=1.0, w_r=1.0, **options):
    """[(name, x, z)]: samples without guidance, with each kind and with both, from equal noise."""
    weights = {"no guidance": (1, 1), f"CFG {w_cfg:g}": (w_cfg, 1), f"RG {w_r:g}": (1, w_r)}
    if w_cfg != 1 and w_r != 1:
        weights["both"] = w_cfg, w_r
    return [(name, *generate(net, y, w_cfg=a, w_r=b, **options))
            for name, (a, b) in weights.items() if (a, b) != (1, 1) or name == "no guidance"]


def trajectory(net, y, n=8, **options):
    """[(name, x, z)]: what the network takes for the clean x and z at n of its calls, from noise to
    data, and the samples. z's outlines settle before x's details do."""
    seen = []

    def watched(net, y, **guidance):
        predict = guided(net, y, **guidance)

        def watch(state, t):
            preds = predict(state, t)
            seen.append((net.diffusion.normalised_time(t), [
                net.diffusion.denoised(pred, part, t).cpu() for pred, part in zip(preds, state)]))
            return preds

        return watch

    x, z = generate(net, y, guide=watched, **options | {"batch_size": len(y)})
    chosen = [seen[i] for i in np.linspace(0, len(seen) - 1, n).round().astype(int)]
    return [(f"t = {t:.2f}", denoised[0], denoised[1] if net.r else None)
            for t, denoised in chosen] + [("sample", x, z)]


def check_guidance(metadata, args):
    """UserError where the model cannot be guided as asked; a warning where that is not known."""
    config, settings = metadata["config"], metadata["settings"]
    for flag, dropout, possible in (("w_r", "p_drop_z", config["fusion"] != "none"),
                                    ("w_cfg", "p_drop_y", config["n_classes"] > 0)):
        asked = f"--{flag} {getattr(args, flag):g} needs a model trained with"
        if getattr(args, flag) == 1:
            continue
        if not possible:
            what = "features, not --fusion none" if flag == "w_r" else "classes"
            raise UserError(f"{asked} {what}; {args.ckpt} was not. Use --{flag} 1")
        if settings[dropout] == 0:
            raise UserError(f"{asked} --{dropout} > 0; {args.ckpt} has 0. Retrain, or use "
                            f"--{flag} 1")
        if settings[dropout] is None and flag == "w_r":
            warn(f"{asked} z-dropout; {args.ckpt} does not record whether it was")


def warn(text):
    if run.rank_and_count()[0] == 0:                       # one process speaks for all
        print(f"warning: {text}", file=sys.stderr)


def vae_for(args, metadata, device):
    """The VAE that decodes, None where x are pixels; --vae becomes the metadata's. UserError if it
    does not suit; a warning if it is not the one of the data."""
    config, meta = metadata["config"], metadata["meta"]
    of_data, size = meta["vae_weights"], meta["image_size"]
    if args.vae and not meta["vae"]:
        raise UserError(f"--vae {args.vae}: {args.ckpt} makes pixels, which no VAE decodes")
    if args.vae:
        meta |= {"vae": args.vae, "vae_weights": None, "scale": None, "shift": None}
    vae = pretrained.vae_of(meta, device)
    if vae:
        found = vae.channels, config["x_size"] * vae.factor
        if found != (config["x_channels"], size or found[1]):
            raise UserError(f"--vae {vae.name} makes {found[1]} pixels from {found[0]} channels, "
                            f"the data have {size or 'any'} and {config['x_channels']}; take the "
                            "VAE that made them")
        if of_data and vae.weights != of_data:
            warn(f"--vae {vae.name} is not the VAE that made the data, its weights differ")
    return vae


def make_parts(parts, net, y, meta, n_with_z, **options):
    """Sample the batches that are absent, a part each: images, and z of those that hold one of the
    first n_with_z rows. Decoding and writing overlaps with the next batch."""
    def write(path, rows, state):
        x, *z = (part[:len(rows)] for part in state)
        if not x.isfinite().all():
            raise UserError(f"the samples {rows.start} to {rows.stop - 1} hold NaN or infinity; "
                            "lower --w_cfg and --w_r, try --no-bf16, or an earlier checkpoint")
        arrays = {"images": data.decode(x, meta, options["device"])}
        if z and rows.start < n_with_z:
            arrays["z"] = z[0].float().cpu().numpy()
        run.write_whole(path, lambda file: np.savez(file, **arrays))

    mine = parts.mine()
    with concurrent.futures.ThreadPoolExecutor(1) as writer, tqdm(
            total=len(mine), unit="batch", disable=run.rank_and_count()[0] > 0) as bar:
        writing = writer.submit(int)
        for b, (rows, state) in zip(mine, sample_batches(net, y, mine, **options)):
            writing.result()
            writing = writer.submit(write, parts.paths[b], rows, state)
            bar.update()
        writing.result()
    parts.complete()


def rows_of(parts, name, n):
    """The array of that name in the parts, part by part, up to row n."""
    for path in parts.paths:
        if n > 0:
            with np.load(path) as part:
                rows = part[name][:n]
            yield rows
            n -= len(rows)


def write_samples(path, parts, n, y, with_z):
    """samples.npz from the parts, never more than one of them in memory. y None: no classes."""
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name in ["images", "z"][:1 + with_z]:
                first = next(rows_of(parts, name, n))
                header = {"descr": first.dtype.str, "fortran_order": False,
                          "shape": (n, *first.shape[1:])}
                entry = {"images": "arr_0"}.get(name, name)
                with archive.open(f"{entry}.npy", "w", force_zip64=True) as array:
                    np.lib.format.write_array_header_1_0(array, header)
                    for rows in rows_of(parts, name, n):
                        array.write(rows.tobytes())
            if y is not None:
                with archive.open("y.npy", "w") as array:
                    np.save(array, y)

    run.write_whole(path, write)


def write_pngs(images, folder):
    """000000.png and on, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda i: Image.fromarray(images[i]).save(f"{folder}/{i:06d}.png"),
                          range(len(images))):
            pass


def is_finished(args, settings):
    """Whether args.out holds samples.npz of these settings. UserError if it has others, unless
    --restart is to replace them."""
    path = f"{args.out}/samples.json"
    if args.restart or not os.path.exists(path):
        return False
    with run.blamed_on(f"{path} is damaged", "choose another --out, or --restart"), \
            open(path) as file:
        stored = json.load(file)["settings"]
        if not zipfile.is_zipfile(f"{args.out}/samples.npz"):
            raise ValueError("samples.npz is no zip file")
    for key, value in settings.items():
        if stored.get(key) != value:
            raise UserError(f"{args.out} holds samples of another --{key}: {stored.get(key)}, now "
                            f"{value}; choose another --out, or --restart to replace them")
    return True


def show(net, y, meta, args, options):
    """The pictures of --compare and --trajectory."""
    y = y[:min(args.n_sheet, 10)]
    os.makedirs(args.out, exist_ok=True)
    for name, make in (("compare", compare), ("trajectory", trajectory)):
        if getattr(args, name):
            versions = [(title, data.decode(x, meta, options["device"]), z) for title, x, z in
                        make(net, y, **options | {"batch_size": len(y)})]
            run.write_picture(f"{args.out}/{name}.png", image_grid(
                versions, z_std_of(meta, versions[-1][2]), len(y)))
            print(f"{args.out}/{name}.png")


def z_std_of(meta, z):
    """The deviations (r,) of the data's z; published weights do not tell them: the samples'."""
    return None if z is None else meta["z_std"] or np.std(np.asarray(z), (0, 2, 3)).tolist()


def make_samples(net, y, meta, args, options, settings):
    """samples.npz and the pictures in args.out, from parts that a killed run left or makes."""
    n, rank = len(y), run.rank_and_count()[0]
    with run.locked(args.out):
        if not run.share(rank == 0 and is_finished(args, settings)):
            key = json.dumps([settings, options["batch_size"], args.n_sheet]).encode()
            parts = run.Parts(f"{args.out}/parts_{hashlib.sha256(key).hexdigest()[:12]}",
                              -(-n // options["batch_size"]), "npz")
            if rank == 0 and run.begins_anew(args):        # continues without --restart, if killed
                shutil.rmtree(parts.folder, ignore_errors=True)
                with contextlib.suppress(FileNotFoundError):
                    os.remove(f"{args.out}/samples.json")
            run.gather(None)
            make_parts(parts, net, y, meta, n if args.save_z else args.n_sheet, **options)
            if rank == 0:
                images, *z = (np.concatenate([*rows_of(parts, name, min(n, args.n_sheet))])
                              for name in ["images", "z"][:1 + bool(net.r)])
                z = z[0] if z else None
                run.write_picture(f"{args.out}/sheet.png", image_grid(
                    [("", images, z)], z_std_of(meta, z)))
                write_samples(f"{args.out}/samples.npz", parts, n,
                              y.numpy() if net.n_classes else None, args.save_z)
                run.write_json(f"{args.out}/samples.json", {"settings": settings, "made_with": {
                    "device": str(options["device"]), "torch": torch.__version__,
                    "compile": args.compile, "processes": run.rank_and_count()[1]}})
                shutil.rmtree(parts.folder)
        if rank == 0 and args.png:
            write_pngs(np.load(f"{args.out}/samples.npz")["arr_0"], f"{args.out}/png")
        run.end()
    if rank == 0:
        print(f"{n} images of {args.ckpt} ({settings['ckpt']}): {args.out}/sheet.png and "
              f"{args.out}/samples.npz{' and png/' * args.png}")


def main(args):
    if args.compare and args.w_cfg == args.w_r == 1:
        raise UserError("--compare shows what guidance does: give --w_cfg, --w_r or both")
    net, metadata = pretrained.load_model(args.ckpt, args.model)
    config, meta = metadata["config"], metadata["meta"]
    steps = args.steps or metadata["settings"]["sample_steps"]
    solver = check_solver(config["name"], args.solver, steps)
    check_guidance(metadata, args)
    if args.save_z and not net.r:
        raise UserError(f"--save_z: {args.ckpt} makes no features, it is of --fusion none")
    y = choose_labels(args.labels, args.n_samples, config["n_classes"], args.seed)
    device = run.begin(args, days=7)                       # until the slowest has made its share
    vae = vae_for(args, metadata, device)
    options = {"steps": steps, "solver": solver} | {name: getattr(args, name) for name in (
        "seed", "bf16", "w_cfg", "w_r", "cfg_on", "rg_on", "cfg_interval")}
    settings = options | {                                 # what decides samples.npz
        "ckpt": f"{config['name']} {pretrained.weights_hash(net)[:16]}", "n_samples": len(y),
        "labels": args.labels, "vae": vae and f"{vae.kind} {vae.weights[:16]}",
        "save_z": args.save_z}
    options |= {"device": device, "batch_size": args.batch_size or min(len(y), 64)}
    net = net.to(device)
    if args.compile:
        for block in net.blocks:                                 # one block's code serves all
            block.compile(dynamic=False)
    if not (args.compare or args.trajectory):
        make_samples(net, y, meta, args, options, settings)
    elif run.rank_and_count()[0] == 0:
        show(net, y, meta, args, options)


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
    p.add_argument("--model", choices=model.NAMES, metavar="NAME",
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
    p.add_argument("--batch_size", type=run.count,
                   help="images a batch (default: --n_samples, at most 64)")
    p.flag("seed", 0, "image i is a function of (seed, i)", type=run.natural)
    p.flag("labels", "random", "random, balanced, or classes N,N,... that are cycled")
    p.add_argument("--solver", choices=[name for solvers in SOLVERS.values() for name in solvers],
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


if __name__ == "__main__":
    run.run_cli(record(main), parser().parse_args())
