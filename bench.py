"""The README's tables, each by one command.

    python bench.py digits                    # every fusion and process on digits
    python bench.py prepare --images DIR      # reading and writing of photographs, without networks

Runs go to runs/digits/NAME, rows to runs/digits/rows.jsonl. Killed, it continues; what is there is
not computed again.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

import data
import fid
import model
import sample
import train

N_DIGITS = 1_000                         # samples behind each row


def digit_runs():
    """name -> (train.py's flags, the pairs of solver and w_r that the run is sampled with)."""
    runs = {}
    for fusion in model.FUSIONS:
        weights = (1.0,) if fusion == "none" else (1.0, 1.5, 2.0)
        runs[f"SiT-unconditional-{fusion}"] = (
            ["--model", "SiT-T/2", "--fusion", fusion, "--unconditional"],
            [(solver, w_r) for solver in ("sde", "euler") for w_r in weights])
    for family, solver in (("SiT", "sde"), ("DiT", "ddpm")):
        for fusion in model.FUSIONS:
            runs[f"{family}-conditional-{fusion}"] = (
                ["--model", f"{family}-T/2", "--fusion", fusion], [(solver, 1.0)])
    return runs


def hardware():
    """One line: the device that torch computes on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if "model name" in line), name)
    return f"{torch.get_num_threads()} threads of {name}"


def rows_of(path):
    """The rows of a .jsonl file, none if it does not exist; a torn last line does not count."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def images_per_s(out):
    """Median training speed over the lines of a run's log."""
    return statistics.median(row["images_per_s"] for row in rows_of(f"{out}/log.jsonl"))


def digits(args):
    """Train and judge every run of digit_runs(), then print the table."""
    os.makedirs(args.out, exist_ok=True)
    rows_path, rows = f"{args.out}/rows.jsonl", rows_of(f"{args.out}/rows.jsonl")
    settings = [f"--{name}={value}" for name, value in (("steps", args.steps), ("seed", args.seed))]
    for name, (flags, samplings) in digit_runs().items():
        if args.only and name not in args.only:
            continue
        out = f"{args.out}/{name}-{args.steps}-{args.seed}"
        there = [(row["out"], row["n"], row["solver"], row["w_r"]) for row in rows]
        missing = [sampling for sampling in samplings if (out, args.n, *sampling) not in there]
        if missing and not os.path.exists(f"{out}/results.json"):
            script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
            command = [sys.executable, script, *flags, *settings, "--out", out]
            subprocess.run(command, check=True)
        for solver, w_r in missing:
            checkpoint = sample.load_checkpoint(f"{out}/ckpt.pt")
            net, meta = sample.load_ema(checkpoint), checkpoint["meta"]
            y = sample.choose_labels("balanced" if net.n_classes else "random", args.n,
                                     net.n_classes, 0)
            x, _ = sample.generate(net, y, checkpoint["settings"]["sample_steps"], solver,
                                   batch_size=125, progress=True, w_r=w_r)
            metrics = fid.judge_digits(data.to_images(x),
                                       y.numpy() if net.n_classes else None)
            rows.append({"out": out, "run": name, "solver": solver, "w_r": w_r, "n": args.n,
                         "steps": args.steps, "seed": args.seed, **metrics,
                         "images_per_s": images_per_s(out), "hardware": hardware(),
                         "date": time.strftime("%Y-%m-%d")})
            with open(rows_path, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    wanted = [row for row in rows
              if (row["steps"], row["seed"], row["n"]) == (args.steps, args.seed, args.n)]
    print(f"{args.steps} steps of {train.DIGITS['batch_size']}, {args.n} samples, seed "
          f"{args.seed}; {hardware()}, {time.strftime('%Y-%m-%d')}\n\n"
          "| run | solver | w_r | Fréchet, classifier | Fréchet, pixels | read as asked % | "
          "training images/s |\n|---|---|---|---|---|---|---|")
    for row in wanted:
        shown = [row[next(key for key in row if key.startswith(prefix))]
                 for prefix in ("frechet_classifier", "frechet_pixels")]
        read = f"{row['read_as_asked_percent']:.1f}" if "read_as_asked_percent" in row else ""
        print(f"| {row['run']} | {row['solver']} | {row['w_r']:g} | {shown[0]:.2f} | "
              f"{shown[1]:.2f} | {read} | {row['images_per_s']:.0f} |")


def read_and_write_ours(args, folder):
    """The CPU's part of data.py at 256 pixels: images/s and bytes an image."""
    files, _, _ = data.list_images(args.images)
    files = files[np.random.default_rng(0).permutation(len(files))[:args.n]]
    batches = data.Batches(args.images, files, np.arange(len(files)), 32, 256)
    shapes = {"x": (8, 32, 32), "z": (16, 16, 16)}                  # SD-VAE's, 16 components
    start = time.perf_counter()
    for name, shape in shapes.items():
        data.allocate(f"{folder}/{name}.npy", (len(files), *shape), np.float16)
    data.allocate(f"{folder}/status.npy", (len(files),), np.uint8)
    x, z = (np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float16)
            for shape in shapes.values())
    for rows, images, good in batches.loader(args.workers):
        data.from_uint8(images.permute(0, 3, 1, 2))
        data.write_block(folder, rows.numpy(), x, z, good.numpy())
    seconds = time.perf_counter() - start
    return len(files) / seconds, folder_size(folder) / len(files)


def read_and_write_theirs(args, folder):
    """The same of REPA's preprocessing, which the authors of ReDi use: its own `convert`, then each
    PNG read again as by its `encode`, and a file of mean and std written for it."""
    sys.path.insert(0, args.official)
    import dataset_tools
    files, _, _ = data.list_images(args.images)
    images = f"{folder}/chosen"
    os.mkdir(images)
    for i in np.random.default_rng(0).permutation(len(files))[:args.n]:
        os.symlink(os.path.abspath(os.path.join(args.images, os.fsdecode(files[i]))),
                   f"{images}/{i:08d}.jpg")
    moments = np.random.default_rng(0).normal(size=(8, 32, 32)).astype(np.float32)
    start = time.perf_counter()
    dataset_tools.convert.callback(source=images, dest=f"{folder}/images", max_images=None,
                                   transform="center-crop-dhariwal", resolution=(256, 256))
    _, entries = dataset_tools.open_dataset(f"{folder}/images", max_images=None)
    for i, entry in enumerate(entries):
        torch.tensor(entry.img).permute(2, 0, 1).unsqueeze(0)
        os.makedirs(f"{folder}/vae-sd/{i // 1000:05d}", exist_ok=True)
        np.save(f"{folder}/vae-sd/{i // 1000:05d}/img-mean-std-{i:08d}.npy", moments)
    seconds = time.perf_counter() - start
    size = folder_size(f"{folder}/images") + folder_size(f"{folder}/vae-sd")
    return args.n / seconds, size / args.n


def folder_size(folder):
    return sum(os.path.getsize(os.path.join(path, name))
               for path, _, names in os.walk(folder) for name in names)


def prepare(args):
    """Print images/s and bytes an image of both ways, alternating."""
    ways = {"this code": read_and_write_ours}
    if args.official:
        ways["REPA's preprocessing"] = read_and_write_theirs
    args.n = min(args.n, len(data.list_images(args.images)[0]))
    figures = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=".") as folder:
                figures[name].append(way(args, folder))
    print(f"{args.n} images of {args.images}, {args.rounds} rounds, {args.workers} workers; "
          f"{hardware()}, {time.strftime('%Y-%m-%d')}\n\n"
          "| | images/s: median (least to most) | bytes an image | GB for 1,281,167 images |\n"
          "|---|---|---|---|")
    for name, rounds in figures.items():
        rates, sizes = zip(*rounds)
        print(f"| {name} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | "
              f"{sizes[0]:,.0f} | {sizes[0] * 1_281_167 / 1e9:.1f} |")


def main(args):
    args.table(args)


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = p.add_subparsers(required=True, metavar="TABLE")
    q = tables.add_parser("digits", help="every fusion and process on digits", allow_abbrev=False)
    q.set_defaults(table=digits)
    q.add_argument("--steps", type=int, default=train.DIGITS["steps"],
                   help="training steps of each run (default: %(default)s)")
    q.add_argument("--n", type=int, default=N_DIGITS, help="samples a row (default: %(default)s)")
    q.add_argument("--seed", type=int, default=0, help="of training (default: %(default)s)")
    q.add_argument("--only", nargs="+", choices=list(digit_runs()), metavar="RUN",
                   help=f"just these (default: all): {' '.join(digit_runs())}")
    q.add_argument("--out", default="runs/digits", metavar="DIR",
                   help="runs and rows (default: %(default)s)")
    q = tables.add_parser("prepare", help="reading and writing of photographs, without networks",
                          allow_abbrev=False)
    q.set_defaults(table=prepare)
    q.add_argument("--images", required=True, metavar="DIR", help="as for data.py")
    q.add_argument("--official", metavar="DIR", help="the folder preprocessing of a clone of REPA "
                                                     "(it imports click); without it ours alone")
    q.add_argument("--n", type=int, default=1024, help="images (default: %(default)s)")
    q.add_argument("--rounds", type=int, default=3, help="repetitions (default: %(default)s)")
    q.add_argument("--workers", type=int, default=os.cpu_count(),
                   help="processes that read images (default: %(default)s)")
    return p


if __name__ == "__main__":
    data.run_cli(main, parser().parse_args())
