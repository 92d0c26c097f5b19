"""The evidence: how much sooner a network learns with ReDi, how fast the code is, where z helps.

    python bench.py methods                      # every method on digits: rows, table and figure
    python bench.py speed --official ReDi        # images/s beside the authors' code, a clone of it
    python bench.py losses --ckpt out/ckpt.pt    # losses over time, with z and without
"""
import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import types

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import fid
import model
import pca
import pretrained
import run
import sample
import train
from run import UserError

METHODS = {"none": {"fusion": "none"}, "REPA": {"fusion": "none", "repa": train.REPA_WEIGHT},
           "merged": {"fusion": "merged"}, "separate": {"fusion": "separate"}}
N_SEEDS = {"SiT": {"none": 5, "REPA": 3, "merged": 5, "separate": 3},
           "DiT": {"none": 3, "merged": 3}}
LINES = {"none": ("none", 1.0), "ReDi": ("merged", 1.0), "ReDi + RG 1.5": ("merged", 1.5),
         "ReDi + RG 2": ("merged", 2.0)}             # of the figure: method and w_r
NFE = 250                                            # sampling steps that images/s are said for
TIMES = [k / 20 for k in range(1, 20, 2)]            # of losses, from 0 (noise) to 1 (data)


def flags(settings):
    """Settings as flags of train.py."""
    return [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
            for name, value in settings.items() if value is not None]


def kept(path, key, make=dict):
    """The row of a .jsonl file that says all that key says. If there is none, key | make(), which
    is appended in one write: processes may share the file."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        *lines, torn = file.read().split(b"\n")
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):            # a kill tore it
                row = json.loads(line)
                if key.items() <= row.items():
                    return row
        row = key | make()
        file.write(b"\n" * bool(torn) + json.dumps(row).encode() + b"\n")
    return row


# methods

def planned(args):
    """{folder of a training run: the keys of its rows}. seed: of training and of the samples'
    noise; z: "real" where the network sees the z of real images, which no sampler has."""
    plan = {}
    for family, conditional in itertools.product(args.families, (False, True)):
        setting = f"{family} {'conditional' if conditional else 'unconditional'}"
        for method in args.methods or N_SEEDS[family]:
            kinds = [(step, 1.0, None) for step in args.points]
            if setting == "SiT unconditional" and method == "merged":
                kinds += [(step, w_r, None) for w_r in (1.5, 2.0) for step in args.points[-3:]]
            if METHODS[method]["fusion"] != "none":
                kinds += [(args.points[-1], 1.0, "real")]
            for seed in args.seeds or range(N_SEEDS[family].get(method, 3)):
                name = f"{setting} {method} {seed}".replace(" ", "-")
                plan[f"runs/digits/{name}"] = [
                    {"family": family, "conditional": conditional, "method": method, "seed": seed,
                     "step": step, "w_r": w_r, "z": z, "n_samples": args.n_samples,
                     "sample_steps": args.sample_steps, "setting": setting}
                    for step, w_r, z in kinds if args.only in name]
    return {out: keys for out, keys in plan.items() if keys}


def real_z(batches):
    """A guide for sample_batches(): guided(), but the network sees the z_t of real images, whose z
    (B, r, H, W) the batches are, noised with what z_t begins with."""
    def guide(net, y, **guidance):
        predict, z, eps = sample.guided(net, y, **guidance), next(batches).to(y.device), []

        def of_real(state, t):
            eps[:] = eps or state[1:]
            z_t = net.diffusion.add_noise(z, *eps, torch.full((len(y),), t, device=y.device))
            return predict([state[0], z_t], t)

        return of_real

    return guide


def judged(path, key, batch_size=125):
    """The metrics of samples of a snapshot: distances to all 1,797 digits, and judge_digits()'s,
    which are to the held-out ones."""
    net, _ = pretrained.load_model(path)
    n, options = key["n_samples"], {"w_r": key["w_r"]}
    y = data.classes_in_turn(n, net.n_classes)
    if key["z"] == "real":
        dataset = data.open_data("digits", net.r)
        rows = torch.arange(-(-n // batch_size) * batch_size) % dataset.n
        _, z, of_z, _ = dataset.unpack(dataset.read(rows))
        y, options["guide"] = of_z[:n] if net.n_classes else y, real_z(iter(z.split(batch_size)))
    x, _ = sample.generate(net, y, key["sample_steps"], None, key["seed"], batch_size, **options)
    images, digits = data.to_images(x), data.to_images(data.digits()[0])
    return (fid.digit_distances(images, digits)
            | fid.judge_digits(images, y.numpy() if net.n_classes else None))


def make_rows(args, planned_run):
    """The rows of a training run; what of it is not there is trained and judged."""
    out, keys = planned_run
    every, last = math.gcd(*args.points), args.points[-1]
    paths = {step: f"{out}/ema_{step:07d}.pt" for step in range(every, last + 1, every)}

    def make(key):
        if not all(os.path.exists(paths[step]) for step in args.points):
            settings = METHODS[key["method"]] | {
                "model": f"{key['family']}-T/2", "unconditional": not key["conditional"],
                "seed": key["seed"], "steps": last, "keep_every": every, "preview_every": last,
                "sample_steps": args.sample_steps, "device": "cpu", "out": out}
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
                    contextlib.redirect_stderr(nowhere):   # the bars of several runs
                train.main(train.parser().parse_args(flags(settings)))
            for step in set(paths) - set(args.points):
                os.remove(paths[step])
        return judged(paths[key["step"]], key)

    return [kept(args.out, key, functools.partial(make, key)) for key in keys]


def start_worker():
    """Ctrl-C is for the parent, whose SIGTERM lets train.py save; a dead parent ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def methods(args):
    """Make all rows, the table and the figure; what is there is not made again."""
    with run.blamed_on("methods draws a figure", "pip install matplotlib"):
        import matplotlib.figure                           # before hours of work
    args.points = sorted(set(args.points))
    for family in args.families:
        sample.check_solver(f"{family}-T/2", None, args.sample_steps, "--sample_steps")
    plan, rows, floor = planned(args), [], []
    if not plan:
        raise UserError(f"--only {args.only} is in no run's name")
    digits = data.to_images(data.digits()[0])
    for seed in range(5):                                  # what a perfect sampler would come to
        one, other = np.array_split(np.random.default_rng(seed).permutation(digits), 2)
        key = dict.fromkeys(("family", "conditional", "step", "w_r")) | {
            "method": "floor", "seed": seed, "n_samples": len(one)}
        floor.append(kept(args.out, key, lambda: fid.digit_distances(one, other)))
    data.prepare_digits()                                  # by one process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["OMP_NUM_THREADS"] = "1"                    # in each worker
    with multiprocessing.get_context("spawn").Pool(args.jobs, start_worker) as pool:
        for of_run in pool.imap(functools.partial(make_rows, args), plan.items()):
            rows += of_run
            print(f"{len(rows)} of {sum(map(len, plan.values()))} rows", flush=True)
    figure = summary(rows, [row["frechet_classifier"] for row in floor], matplotlib.figure.Figure)
    run.write_whole(os.path.join(os.path.dirname(args.out), "methods.png"), figure.savefig)


def mean_and_spread(values):
    """"mean ± standard deviation", or the one value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" if values else ""


def steps_to(distance, curve):
    """Steps after which the best so far of a curve {step: distance} is as low; between points, a
    straight line on logarithmic axes."""
    steps, distances = np.log(sorted(curve.items())).T
    return float(np.exp(np.interp(-np.log(distance), -np.minimum.accumulate(distances), steps)))


def steps_fewer(none, redi):
    """How many times fewer steps ReDi needs, seed by seed of two {seed: {step: distance}}: for the
    distance that both reach, the greater of their last ones."""
    pairs = [(none[seed], redi[seed]) for seed in none if seed in redi]
    reached = [max(curve[max(curve)] for curve in pair) for pair in pairs]
    return [steps_to(distance, of_none) / steps_to(distance, of_redi)
            for distance, (of_none, of_redi) in zip(reached, pairs)]


def summary(rows, floor, figure):
    """Print the distances, and how many times fewer steps ReDi needs; a figure of the former."""
    curves = {}                            # {(setting, method, w_r, z): {seed: {step: distance}}}
    for row in rows:
        kind = row["setting"], row["method"], row["w_r"], row["z"]
        curve = curves.setdefault(kind, {}).setdefault(row["seed"], {})
        curve[row["step"]] = row["frechet_classifier"]
    points, settings = (sorted({row[name] for row in rows}) for name in ("step", "setting"))
    print(f"Fréchet distance in classifier space of {rows[0]['n_samples']:,} samples of "
          f"{rows[0]['sample_steps']} steps to all digits; the digits' halves: "
          f"{mean_and_spread(floor)}\n\n| run | w_r | z | "
          + " | ".join(f"{step:,} steps" for step in points) + " |\n|---|---|---"
          + "|---" * len(points) + "|")
    for (setting, method, w_r, z), of_seeds in curves.items():
        cells = [mean_and_spread([curve[step] for curve in of_seeds.values() if step in curve])
                 for step in points]
        print(f"| {setting} {method} | {w_r:g} | {z or ''} | {' | '.join(cells)} |")
    figure = figure(figsize=(4 * len(settings), 3.5), layout="constrained")
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for setting, panel in zip(settings, panels):
        of_lines = {name: curves.get((setting, *line, None), {}) for name, line in LINES.items()}
        ratios = steps_fewer(of_lines["none"], of_lines["ReDi"])
        if ratios:
            print(f"{setting}: none needs {mean_and_spread(ratios)} times ReDi's steps for the "
                  "distance that both reach")
        for name, of_seeds in of_lines.items():
            if of_seeds:
                distances = np.array([[*curve.values()] for curve in of_seeds.values()])
                steps = [*next(iter(of_seeds.values()))]
                panel.errorbar(steps, distances.mean(0), distances.std(0), label=name)
        panel.axhline(np.mean(floor), color="grey", label="the digits' halves")
        panel.set(title=setting, xscale="log", yscale="log", xlabel="training steps")
    panels[0].set_ylabel("Fréchet distance")
    panels[0].legend()
    return figure


# speed

def random_data(folder, n=1024, r=8):
    """A prepared folder of random numbers with the shapes of ImageNet's at 256 pixels."""
    rng, path = np.random.default_rng(0), f"{folder}/shards/00000"
    os.mkdir(f"{folder}/shards")
    data.write_shard(f"{path}.npy", {
        "x": rng.normal(size=(n, 8, 32, 32)).astype(np.float16),
        "z": rng.normal(size=(n, r, 16, 16)).astype(np.float16), "y": rng.integers(0, 1000, n)})
    pca.fit(pca.Moments(r).update(rng.normal(size=(100, r))), r).save(f"{folder}/pca.npz")
    run.write_json(f"{folder}/meta.json", data.describe(
        folder, [data.read_json(f"{path}.json")], [{"name": "random"}], {
            "name": "random", "classes": [str(i) for i in range(1000)], "image_size": 256,
            "vae": None, "vae_weights": None, "scale": 0.18215, "shift": 0.0, "has_std": True,
            "settings": {}}))


def ours(args, device, name, method, folder):
    """(config of a method's network, a function that makes n training steps, one that makes n
    samples), as train.py and sample.py do."""
    of_run = train.parser().parse_args(flags(METHODS[method] | {
        "model": name, "data": folder, "batch_size": args.batch_size, "bf16": args.bf16,
        "micro_batch_size": args.micro_batch_size, "compile": args.compile}))
    settings = train.resolve(of_run)
    train.check(settings, args.micro_batch_size)
    trainer = train.Trainer(settings, of_run, device)
    batches = run.prefetch(trainer.load_batch, itertools.count(), of_run.workers)

    def train_steps(n):
        for batch in itertools.islice(batches, n):
            trainer.training_step(batch)
        trainer.total_sums()                               # as for each line of the log

    def make_samples(n):
        y = data.classes_in_turn(n, trainer.ema.n_classes)
        sample.generate(trainer.ema, y, args.sample_steps, batch_size=n, device=device,
                        bf16=args.bf16)

    return trainer.config, train_steps, make_samples


def theirs(args, device, name, with_encoder):
    """The same of the authors' code, on tensors that lie on the device: train_redi.py's step, with
    DINOv2 (random weights) in it as there, or without; the SDE of sample_ddp.py."""
    with run.blamed_on(f"--official {args.official} has no {name}",
                       "give a clone of zelaki/ReDi, and --models of SiT, S to XL"):
        sys.modules.setdefault("torchdiffeq", types.SimpleNamespace(odeint=None))    # not used here
        sys.path.insert(0, args.official)
        import timm
        import train_redi as official
        from transport import Sampler, create_transport
        net = official.SiT_models[name](input_size=32, in_channels=12, learn_sigma=False)
    net = net.to(device)
    ema, transport, n = copy.deepcopy(net).eval(), create_transport(), args.batch_size
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0)
    encoder = with_encoder and timm.create_model(pca.DINOV2, img_size=224).to(device).eval()
    moments, z, images = (torch.randn(n, *shape, device=device)
                          for shape in ((8, 32, 32), (8, 32, 32), (3, 256, 256)))
    y = torch.arange(n, device=device) % 1000

    def train_steps(n):
        for _ in range(n):
            if with_encoder:
                with torch.no_grad():
                    encoder.forward_features(official.preprocess_raw_image(images))
            x = official.sample_posterior(moments, latents_scale=0.18215)
            losses = transport.training_losses(net, torch.cat([x, z], 1), {"y": y},
                                               dino_drop_prob=0.2)
            optimizer.zero_grad()
            losses["loss"].mean().backward()
            optimizer.step()
            official.update_ema(ema, net)
            losses["loss"].mean().item()

    @torch.no_grad()
    def make_samples(n):
        solve = Sampler(transport).sample_sde(diffusion_form="sigma", num_steps=args.sample_steps)
        solve(torch.randn(n, 12, 32, 32, device=device), ema.forward, y=y[:n])

    return {"name": name, "fusion": "merged", "r": 8}, train_steps, make_samples


def forward_flop(config):
    """FLOP of one image's pass, counted by torch: 2 a multiplication with addition."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = model.build(**config)
        x_t, z_t = (torch.empty(1, channels, net.x_size, net.x_size) if channels else None
                    for channels in (net.x_channels, net.r))
        net(x_t, z_t, torch.empty(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def seconds_of(work, device):
    """Of the slowest process, up to the end of what it started on its GPU."""
    moments = []
    for do in (lambda: None, work):
        do()
        if device.type == "cuda":
            torch.cuda.synchronize()
        run.gather(None)
        moments.append(time.perf_counter())
    return moments[1] - moments[0]


def speed_of(args, device, name, folder):
    """The rows of a model: its methods and, with --official, the authors' code, in turn round by
    round. Images/s are those of all processes: median, least and most."""
    n_processes, on_gpu = run.rank_and_count()[1], device.type == "cuda"
    dtype, size = torch.bfloat16 if args.bf16 else torch.float32, 8192 if on_gpu else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    peak = n_processes * max(2 * size ** 3 / seconds_of(lambda: a @ b, device) for _ in range(6))
    n, codes, memory, rates = min(args.batch_size, 64), {}, {}, {}
    official = ["official", "official with encoder"] if args.official else []
    for method in [*args.methods, *official]:
        before = torch.cuda.memory_allocated()
        codes[method] = (theirs(args, device, name, method == official[1]) if method in official
                         else ours(args, device, name, method, folder))
        memory[method] = torch.cuda.memory_allocated() - before
    for k, method in itertools.product(range(args.rounds + 1), codes):
        _, train_steps, make_samples = codes[method]
        torch.backends.cuda.matmul.allow_tf32 = method in official           # as they have it
        before = torch.cuda.memory_allocated()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        training = seconds_of(lambda: train_steps(args.steps), device)
        if k == 0:                                         # warms up
            memory[method] += torch.cuda.max_memory_allocated() - before
        sampling = seconds_of(lambda: make_samples(n), device)
        if k > 0:
            rates.setdefault(method, []).append((
                args.batch_size * args.steps / training,
                n_processes * n * args.sample_steps / NFE / sampling))
    for method, of_rounds in rates.items():
        training, sampling = ([statistics.median(each), min(each), max(each)]
                              for each in zip(*of_rounds))
        flop = 3 * forward_flop(codes[method][0])          # of a training step, an image
        yield {"model": name, "method": method, "n_processes": n_processes,
               "training_images_per_s": training, "sampling_images_per_s": sampling,
               "peak_flop_per_s": peak, "mfu_percent": 100 * flop * training[0] / peak,
               "memory_gb": memory[method] / 1e9, "date": time.strftime("%Y-%m-%d"),
               "device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    torch._dynamo.reset()                                  # code for another width


def speed(args):
    """Print and keep what every model and method does a second, and how well it uses the device."""
    rank, n_processes = run.rank_and_count()
    if args.official and (args.data or n_processes > 1):
        raise UserError("--official is for one process, and without --data")
    for name in args.models:
        sample.check_solver(name, None, args.sample_steps, "--sample_steps")
    device = run.begin(args)
    if rank == 0:
        print("| model | method | training images/s: median (least to most) | MFU % | memory GB | "
              f"sampling images/s, {NFE} steps |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            random_data(folder)
        for row in itertools.chain(*(speed_of(args, device, name, args.data or folder)
                                     for name in args.models)):
            if rank > 0:
                continue
            training, sampling = ("{:.4g} ({:.4g} to {:.4g})".format(*row[f"{kind}_images_per_s"])
                                  for kind in ("training", "sampling"))
            print(f"| {row['model']} | {row['method']} | {training} | {row['mfu_percent']:.1f} | "
                  f"{row['memory_gb']:.1f} | {sampling} |", flush=True)
            if args.rows:
                kept(args.rows, row | {key: getattr(args, key) for key in (
                    "batch_size", "micro_batch_size", "bf16", "compile", "sample_steps", "data")})
    run.end()


# losses

@torch.no_grad()
def losses_over_time(net, dataset, n, device):
    """The means over n images of x's loss, of x's where z is dropped, and of z's, at each of TIMES:
    {name: [10 losses]}. Images and noise are the same at all times and for all networks."""
    joint = train.JointLoss(net.to(device), {"model": net.config["name"], "p_drop_y": 0.0,
                                             "p_drop_z": 0.5, "lam_z": 1.0, "repa": 0.0})
    rows, means = dataset.examples(n), {}
    noise = train.sample_noise(0, 0, len(rows), slice(None), net, dataset.has_std)
    for part in torch.arange(len(rows)).split(64):
        eps = {name: noise[name][part].to(device) for name in ("eps_x", "eps_vae", "eps_z")}
        stored = [each if each is None else each.to(device) for each in dataset.read(rows[part])]
        xzyf = dataset.unpack(stored, eps.pop("eps_vae"))
        for (k, t), keeps_z in itertools.product(enumerate(TIMES), (True, False)):
            u = [t if isinstance(net.diffusion, model.Flow) else 1 - t, 1.0, float(keeps_z)]
            losses = joint(*xzyf, torch.tensor(u, device=device).expand(len(part), 3), **eps)
            names = {"x": "loss_x", "z": "loss_z"} if keeps_z else {"x, z dropped": "loss_x"}
            for name, loss in names.items():
                means.setdefault(name, [0.0] * len(TIMES))
                means[name][k] += losses[loss].sum().item() / len(rows)
    return means if net.r else {"x": means["x"]}


def losses(args):
    """Print where in time z helps a network to denoise x, and what z itself costs."""
    device = run.pick_device(args.device)
    print(f"| checkpoint | loss of | {' | '.join(f't = {t:.2f}' for t in TIMES)} |\n|---|---"
          + "|---" * len(TIMES) + "|")
    for path in args.ckpt:
        net, metadata = pretrained.load_model(path)
        name = args.data or metadata["settings"].get("data")
        if not name:
            raise UserError(f"{path} does not say what it was trained on: give --data DIR")
        dataset = data.open_data(name, net.r)
        for key in ("vae_weights", "scale", "shift", "z_std"):
            if metadata["meta"][key] not in (None, dataset.meta[key]):
                raise UserError(f"{path} was trained on data of another {key} than {name}'s")
        for kind, means in losses_over_time(net, dataset, args.n_images, device).items():
            print(f"| {path} | {kind} | {' | '.join(f'{mean:.3f}' for mean in means)} |")


def main(args):
    args.command(args)


def parser():
    p = run.Parser(description=__doc__)
    commands = p.add_subparsers(required=True, metavar="COMMAND", parser_class=run.Parser)
    q = commands.add_parser("methods", help="every method on digits: rows, table and figure")
    q.set_defaults(command=methods)
    q.flag("families", [*N_SEEDS], "which networks", nargs="+", choices=[*N_SEEDS])
    q.flag("methods", None, "which ways to use z; None: SiT all, DiT none and merged", nargs="+",
           choices=[*METHODS])
    q.flag("seeds", None, "of training and samples; None: 0 to 4 for SiT none and merged, 0 to 2 "
                          "for the others", nargs="+", type=run.natural)
    q.flag("points", [100, 200, 400, 800, 1400, 2800], "training steps after which samples are "
                                                       "judged", nargs="+", type=run.count)
    q.flag("only", "", "runs with this in their name, such as SiT-unconditional-merged-0")
    q.flag("n_samples", 1_000, "samples a row", type=run.number(int, lambda n: n > 1, "2 or more"))
    q.flag("sample_steps", 25, "sampling steps of the SDE, or of DiT's chain", type=run.count)
    q.flag("jobs", 2, "runs at once, one thread each", type=run.count)
    q.flag("out", "results/digits.jsonl", "the rows; what is there is not made again. The figure, "
           "methods.png, is put beside it", metavar="FILE")
    q = commands.add_parser("speed", help="training and sampling images/s")
    q.set_defaults(command=speed)
    q.flag("models", [f"SiT-{size}/2" for size in ("S", "B", "L", "XL")], "which networks",
           nargs="+", choices=model.NAMES, metavar="MODEL")
    q.flag("methods", [*model.FUSIONS], "which ways to use z", nargs="+", choices=model.FUSIONS)
    q.add_argument("--data", metavar="DIR", help="a prepared folder (default: random numbers of "
                                                 "ImageNet's shapes)")
    q.add_argument("--official", metavar="DIR", help="a clone of zelaki/ReDi, to compare with")
    q.flag("batch_size", 256, "images a step, all processes together", type=run.count)
    q.add_argument("--micro_batch_size", type=run.count, help="as for train.py")
    q.flag("steps", 10, "training steps a round", type=run.count)
    q.flag("rounds", 5, "repetitions, after one that warms up", type=run.count)
    q.flag("sample_steps", 4, f"sampling steps a round; images/s are for {NFE}", type=run.count)
    q.add_argument("--rows", metavar="FILE", help="append the rows to this .jsonl file")
    q.device_flags()
    q = commands.add_parser("losses", help="losses over time, with z and without")
    q.set_defaults(command=losses)
    q.flag("ckpt", ["out/ckpt.pt"], "checkpoints of train.py", nargs="+", type=str, metavar="FILE")
    q.add_argument("--data", metavar="DIR", help="other images, prepared with the same PCA "
                                                 "(default: the training data)")
    q.flag("n_images", 512, "images", type=run.count)
    q.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    return p


if __name__ == "__main__":
    run.run_cli(main, parser().parse_args())
