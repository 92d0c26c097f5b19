"""The evidence: how much sooner a network learns with ReDi, how fast the code is, where z helps.

    torchrun --nproc_per_node=2 bench.py methods     # every method on digits: table and figure
    python bench.py speed --official ReDi            # images/s beside the authors' code, a clone
    python bench.py losses --ckpt out/ckpt.pt        # losses over time, with z and without
"""
import argparse
import contextlib
import copy
import glob
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import types

import run
from run import UserError

METHODS = {"none": {"fusion": "none"}, "merged": {}, "separate": {"fusion": "separate"},
           "REPA": {"fusion": "none", "repa": 0.5}}
# of merged, whose own are 1 and 1: z's unit and the weight of its loss
SWEEP = {f"merged, z RMS {rms:g}, lam_z {lam_z:g}": {"z_rms": rms, "lam_z": lam_z}
         for rms in (0.3, 1.0, 3.0) for lam_z in (0.25, 1.0, 4.0) if rms != 1 or lam_z != 1}
REAL_Z = "merged, real z"                    # rows of merged that see the z of real images
PLAN = [("SiT", False, ("none", "merged"), 5),       # family, conditional, methods, seeds: the most
        ("SiT", True, ("none", "merged"), 5),        # telling first
        ("SiT", False, SWEEP, 1),
        ("SiT", False, ("separate", "REPA"), 3),
        ("SiT", True, ("separate", "REPA"), 3),
        ("DiT", False, ("none", "merged"), 3),
        ("DiT", True, ("none", "merged"), 3)]
LINES = {"none": ("none", 1.0, "gray"), "ReDi": ("merged", 1.0, "tab:blue"),
         "ReDi + RG": ("merged", 1.5, "tab:red")}    # of the figure: method, w_r, colour
METRICS = "frechet_classifier", "frechet_pixels"     # of a table each, the first of the figure
NFE = 250                                            # sampling steps that images/s are said for
TIMES = [k / 20 for k in range(1, 20, 2)]            # of losses, from 0 (noise) to 1 (data)


def parser():
    p, several = run.Parser(description=__doc__), run.number(int, lambda n: n > 1, "2 or more")
    commands = p.add_subparsers(required=True, dest="command", metavar="COMMAND",
                                parser_class=run.Parser)
    q = commands.add_parser("methods", help="every method on digits: rows, table and figure")
    q.flag("points", [100, 200, 400, 800, 1400, 2800], "training steps after which samples are "
                                                       "judged", nargs="+", type=run.count)
    q.flag("only", "", "runs with this in their name, such as SiT-unconditional-merged-0")
    q.flag("n_samples", 1_000, "samples a row", type=several)
    q.flag("sample_steps", 25, "sampling steps of the SDE, or of DiT's chain", type=several)
    q.flag("out", "results/digits.jsonl", "the rows, those that are there are not made again; the "
           "table goes beside them, as .md", metavar="FILE")
    q.flag("figure", "assets/methods.png", "the figure", metavar="FILE")
    q.device_flag()
    q = commands.add_parser("speed", help="training and sampling images/s, on random numbers")
    q.flag("models", [f"SiT-{size}/2" for size in ("S", "B", "L", "XL")], "which networks",
           nargs="+", type=str, metavar="MODEL")
    q.flag("methods", ["none", "merged", "separate"], "which ways to use z", nargs="+",
           choices=["none", "merged", "separate"])
    q.add_argument("--official", metavar="DIR", help="a clone of zelaki/ReDi, to compare with")
    q.flag("batch_size", 256, "images a step", type=run.count)
    q.add_argument("--micro_batch_size", type=run.count, help="as for train.py")
    q.flag("steps", 10, "training steps a round", type=run.count)
    q.flag("rounds", 5, "repetitions, after one that warms up", type=run.count)
    q.flag("sample_steps", 4, f"sampling steps a round; images/s are for {NFE}", type=several)
    q.flag("rows", os.devnull, "append the rows to this .jsonl file", metavar="FILE")
    q.device_flags()
    q = commands.add_parser("losses", help="losses over time, with z and without")
    q.flag("ckpt", ["out/ckpt.pt"], "checkpoints of train.py", nargs="+", type=str, metavar="FILE")
    q.add_argument("--data", metavar="DIR", help="other images, prepared with the same PCA "
                                                 "(default: the training data)")
    q.flag("n_images", 512, "images", type=run.count)
    q.device_flag()
    return p


if __name__ == "__main__":     # before torch, which takes seconds: --help and typos are quicker
    args = parser().parse_args()

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import fid
import model
import pca
import pretrained
import sample
import train


def train_args(settings):
    """train.py's flags, with these set."""
    return argparse.Namespace(**vars(train.parser().parse_args([])) | settings)


def read_rows(path, keys):
    """For each of the keys the row of a .jsonl file that says all that it says, or None."""
    rows = []
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):            # a kill tore it
                rows.append(json.loads(line))
    return [next((row for row in rows if key.items() <= row.items()), None) for key in keys]


def append_row(path, row):
    """In one write, since processes share the file; a line that a kill tore is ended."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def device_name(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


# methods

def planned(args):
    """{a run's name: (its settings, the keys of its rows)}. seed: of training and of the samples'
    noise; z_rms: of z in the data."""
    plan = {}
    for family, conditional, methods, n_seeds in PLAN:
        setting = f"{family} {'conditional' if conditional else 'unconditional'}"
        for seed, method in itertools.product(range(n_seeds), methods):
            kinds = [(method, step, 1.0) for step in args.points]
            if method == "merged":
                kinds.append((REAL_Z, args.points[-1], 1.0))
            if (setting, method) == ("SiT unconditional", "merged"):
                kinds += itertools.product([method], args.points[-3:], (1.5, 2.0))
            name = f"{setting} {method} {seed}".replace(",", "").replace(" ", "-")
            own = SWEEP.get(method, {})
            plan[name] = {"model": f"{family}-T/2", "unconditional": not conditional,
                          "seed": seed} | METHODS.get(method, {}) | own, [
                {"family": family, "conditional": conditional, "method": kind, "seed": seed,
                 "step": step, "w_r": w_r, "n_samples": args.n_samples,
                 "sample_steps": args.sample_steps, "setting": setting} | own
                for kind, step, w_r in kinds]
    return plan


def judged(path, key, device, batch_size=125):
    """The metrics of samples of a snapshot: distances to all 1,797 digits, and judge_digits()'s,
    which are to the held-out ones."""
    net, _ = pretrained.load_model(path)
    n, options = key["n_samples"], {"w_r": key["w_r"]}
    y = data.classes_in_turn(n, net.n_classes)
    if key["method"] == REAL_Z:
        dataset = data.open_data("digits", net.r)
        rows = torch.arange(n) % dataset.n
        _, z, of_z, _ = dataset.unpack(dataset.read(rows))
        y, options["guide"] = of_z if net.n_classes else y, sample.given_z(z)
    x, _ = sample.generate(net.to(device), y, key["sample_steps"], None, key["seed"], batch_size,
                           device, **options)
    images, digits = data.to_images(x), data.to_images(data.digits()[0])
    return (fid.digit_distances(images, digits)
            | fid.judge_digits(images, y.numpy() if net.n_classes else None))


def make_rows(args, name, settings, keys):
    """What is not there of a run: its training, and its rows."""
    out, last, rows = f"runs/digits/{name}", args.points[-1], read_rows(args.out, keys)
    paths = {step: f"{out}/ema_{step:07d}.pt" for step in args.points}
    if not all(rows) and not all(map(os.path.exists, paths.values())):
        rms = settings.get("z_rms")
        if rms:
            settings = settings | {"data": f"prepared/digits_z_rms_{rms:g}"}
            unit = data.open_data("digits", 0).meta["encoders"][0]["scale"]
            data.prepare_digits(settings["data"], scale=rms * unit)
        train.main(train_args(settings | {
            "steps": last, "keep_every": math.gcd(*args.points), "preview_every": last,
            "sample_steps": args.sample_steps, "judge": False, "device": args.device,
            "bf16": False, "compile": False, "out": out}))
        for path in {*glob.glob(f"{glob.escape(out)}/ema_*.pt")} - {*paths.values()}:
            os.remove(path)
    device = run.pick_device(args.device)
    for key, row in zip(keys, rows):
        if not row:
            append_row(args.out, key | judged(paths[key["step"]], key, device)
                       | {"device": device_name(device)})


def methods(args):
    """Make the rows that are not there, the table and the figure. Of torchrun's processes each
    takes runs of its own."""
    with run.blamed_on("methods draws a figure", "pip install matplotlib"):
        import matplotlib.figure  # noqa: F401, before hours of work
    args.points = sorted(set(args.points))
    plan, digits = planned(args), data.to_images(data.digits()[0])
    names = [name for name in plan if args.only in name]
    if not names:
        raise UserError(f"--only {args.only} is in no run's name, such as {next(iter(plan))}")
    rank, n_processes = run.rank_and_count()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}         # a run knows of no other process
    torch.set_num_threads(1)                               # faster for so small a network
    os.makedirs(os.path.dirname(args.figure) or ".", exist_ok=True)
    data.prepare_digits()
    halves = []                                            # what a perfect sampler would come to
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(digits)
        halves.append(fid.digit_distances(*np.array_split(shuffled, 2)))
    keys = [key for _, keys in plan.values() for key in keys]
    for name in names[rank::n_processes]:
        make_rows(args, name, *plan[name])
        rows = [row for row in read_rows(args.out, keys) if row]
        text = "\n".join(table(rows, halves, metric) for metric in METRICS)
        run.write_whole(f"{os.path.splitext(args.out)[0]}.md",
                        lambda file: file.write(text.encode()))
        run.write_whole(args.figure, figure(rows, halves).savefig)
        print(f"{name}: {len(rows)} of {len(keys)} rows are in {args.out}", flush=True)


def values(rows, metric, setting, method, w_r=1.0):
    """The rows' {seed: {step: metric}}."""
    found = {}
    for row in rows:
        if (row["setting"], row["method"], row["w_r"]) == (setting, method, w_r):
            found.setdefault(row["seed"], {})[row["step"]] = row[metric]
    return found


def at(step, curves):
    return [curve[step] for curve in curves.values() if step in curve]


def mean_and_spread(values):
    """"mean ± standard deviation", or the one value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" if values else ""


def steps_to(distance, curve):
    """Steps after which the best so far of a curve {step: distance} is as low; between points, a
    straight line on logarithmic axes."""
    steps, distances = np.log(sorted(curve.items())).T
    return float(np.exp(np.interp(-np.log(distance), -np.minimum.accumulate(distances), steps)))


def steps_fewer(none, redi, step):
    """How many times fewer steps ReDi needs, seed by seed of two {seed: {step: distance}}, for the
    distance that both have reached by that step. [] where one was there before its first point."""
    ratios = []
    for seed in none.keys() & redi.keys():
        pair = none[seed], redi[seed]
        reached = max(min(curve[k] for k in curve if k <= step) for curve in pair)
        if any(curve[min(curve)] < reached for curve in pair):
            return []
        ratios.append(steps_to(reached, none[seed]) / steps_to(reached, redi[seed]))
    return ratios


def table(rows, halves, metric):
    """In markdown: means ± standard deviations over the seeds."""
    points = sorted({row["step"] for row in rows})
    lines = [f"{metric} of {rows[0]['n_samples']:,} samples to all digits; * is further than none's"
             f"\n\n| run | w_r | seeds | {' | '.join(f'{step:,} steps' for step in points)} |",
             "|---" * (3 + len(points)) + "|"]
    for setting, method, w_r in dict.fromkeys(
            (row["setting"], row["method"], row["w_r"]) for row in rows):
        curves = values(rows, metric, setting, method, w_r)
        none = values(rows, metric, setting, "none")
        cells = []
        for step in points:
            found, plain = at(step, curves), at(step, none)
            behind = found and plain and statistics.mean(found) > statistics.mean(plain)
            cells.append(mean_and_spread(found) + "*" * bool(behind))
        lines.append(f"| {setting} {method} | {w_r:g} | {len(curves)} | {' | '.join(cells)} |")
        if (method, w_r) == ("merged", 1):
            cells = [mean_and_spread(steps_fewer(none, curves, step)) for step in points]
            lines.append("| times fewer steps than none for the same distance | | "
                         f"{len(none.keys() & curves.keys())} | {' | '.join(cells)} |")
    cells = [mean_and_spread([row[metric] for row in halves])] * len(points)
    lines.append(f"| half of the digits to the other | | {len(halves)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(rows, halves, metric=METRICS[0]):
    """Distances over steps, a panel for each of the first two settings."""
    import matplotlib.figure
    settings = list(dict.fromkeys(row["setting"] for row in rows))[:2]
    points = sorted({row["step"] for row in rows})
    picture = matplotlib.figure.Figure(figsize=(10, 4), dpi=150, layout="constrained")
    panels = picture.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for setting, panel in zip(settings, panels):
        for label, (method, w_r, colour) in LINES.items():
            curves = values(rows, metric, setting, method, w_r)
            steps = [step for step in points if at(step, curves)]
            found = [at(step, curves) for step in steps]
            mean = np.array([np.mean(each) for each in found])
            spread = np.array([np.std(each, ddof=len(each) > 1) for each in found])
            panel.plot(steps, mean, "o-", color=colour, label=label)
            panel.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2)
        panel.axhline(statistics.mean(row[metric] for row in halves), color="black",
                      linestyle=":", label="half of the digits to the other")
        none, redi = (values(rows, metric, setting, method) for method in ("none", "merged"))
        for step in points:
            ratios = steps_fewer(none, redi, step)
            panel.text(step, 0.96, f"{statistics.mean(ratios):.1f}×" if ratios else "", va="top",
                       ha="center", transform=panel.get_xaxis_transform())
        panel.set(xscale="log", yscale="log", title=setting,
                  xlabel="training steps (on top: how many times fewer ReDi needs)")
        panel.set_xticks(points, [f"{step:,}" for step in points])
        panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.margins(y=0.15)
    panels[0].set_ylabel("Fréchet distance to the digits")
    panels[0].legend(loc="lower left")
    return picture


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
    of_run = train_args(METHODS[method] | {"model": name, "data": folder} | {key: getattr(
        args, key) for key in ("batch_size", "micro_batch_size", "bf16", "compile")})
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

    return trainer.net.config, train_steps, make_samples


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
    """Up to the end of what it started on a GPU."""
    moments = []
    for do in (lambda: None, work):
        do()
        if device.type == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
    return moments[1] - moments[0]


def speed_of(args, device, name, folder):
    """The rows of a model: its methods and, with --official, the authors' code, in turn round by
    round: median, least and most."""
    on_gpu, n = device.type == "cuda", min(args.batch_size, 64)
    dtype, size = torch.bfloat16 if args.bf16 else torch.float32, 8192 if on_gpu else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    peak = max(2 * size ** 3 / seconds_of(lambda: a @ b, device) for _ in range(6))
    codes, memory, rates = {}, {}, {}
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
            rates.setdefault(method, []).append((args.batch_size * args.steps / training,
                                                 n * args.sample_steps / NFE / sampling))
    for method, of_rounds in rates.items():
        training, sampling = ([statistics.median(each), min(each), max(each)]
                              for each in zip(*of_rounds))
        flop = 3 * forward_flop(codes[method][0])          # of a training step, an image
        yield {"model": name, "method": method, "training_images_per_s": training,
               "sampling_images_per_s": sampling, "peak_flop_per_s": peak,
               "mfu_percent": 100 * flop * training[0] / peak, "memory_gb": memory[method] / 1e9,
               "date": time.strftime("%Y-%m-%d"),
               "device": device_name(device)}
    torch._dynamo.reset()                                  # code for another width


def speed(args):
    """Print and keep what every model and method does a second, and how well it uses the device."""
    device, settings = run.begin(args), dict(vars(args))
    print("| model | method | training images/s: median (least to most) | MFU % | memory GB | "
          f"sampling images/s, {NFE} steps |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        random_data(folder)
        for name in args.models:
            for row in speed_of(args, device, name, folder):
                training, sampling = (
                    "{:.4g} ({:.4g} to {:.4g})".format(*row[f"{kind}_images_per_s"])
                    for kind in ("training", "sampling"))
                print(f"| {name} | {row['method']} | {training} | {row['mfu_percent']:.1f} | "
                      f"{row['memory_gb']:.1f} | {sampling} |", flush=True)
                append_row(args.rows, settings | row)


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
    {"methods": methods, "speed": speed, "losses": losses}[args.command](args)


if __name__ == "__main__":
    run.run_cli(main, args)
