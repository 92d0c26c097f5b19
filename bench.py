"""The README's and RESULTS.md's tables, each by one command.

    python bench.py digits           # every fusion and process on digits: about an hour on 2 cores

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
import time

import torch

import data
import fid
import sample
import train

# name: (train.py's flags, the representation guidance weights it is sampled with)
DIGIT_RUNS = {
    f"{family}-{'unconditional' if unconditional else 'conditional'}-{fusion}":
    (["--model", f"{family}-T/2", "--fusion", fusion] + ["--unconditional"] * unconditional,
     [1.0, 1.5, 2.0] if unconditional and fusion != "none" else [1.0])
    for unconditional, family in [(True, "SiT"), (False, "SiT"), (False, "DiT")]
    for fusion in ("none", "merged", "separate")}
N_DIGITS = 2_000                         # samples behind each row


def hardware():
    """One line: the device that torch computes on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        names = {line.split(":")[1].strip() for line in file if line.startswith("model name")}
    return f"{torch.get_num_threads()} threads of {', '.join(names) or platform.machine()}"


def rows_of(path):
    """The rows of a .jsonl file that exists, or none."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]


def images_per_s(out):
    """Median training speed over the lines of a run's log."""
    return statistics.median(row["images_per_s"] for row in rows_of(f"{out}/log.jsonl"))


def digits(args):
    """Train and judge every run of DIGIT_RUNS, then print the table."""
    os.makedirs(args.out, exist_ok=True)
    rows_path, rows = f"{args.out}/rows.jsonl", rows_of(f"{args.out}/rows.jsonl")
    settings = [f"--{name}={value}" for name, value in (("steps", args.steps), ("seed", args.seed))]
    for name, (flags, weights) in DIGIT_RUNS.items():
        out = f"{args.out}/{name}-{args.steps}-{args.seed}"
        missing = [w_r for w_r in weights if not any(
            (row["out"], row["w_r"], row["n"]) == (out, w_r, args.n) for row in rows)]
        if missing and not os.path.exists(f"{out}/results.json"):
            command = [sys.executable, "train.py", *flags, *settings, "--out", out]
            subprocess.run(command, check=True)
        for w_r in missing:
            checkpoint = sample.load_checkpoint(f"{out}/ckpt.pt")
            net, meta = sample.load_ema(checkpoint), checkpoint["meta"]
            y = sample.choose_labels("balanced" if net.n_classes else "random", args.n,
                                     net.n_classes, 0)
            x, _ = sample.generate(net, y, checkpoint["settings"]["sample_steps"], batch_size=125,
                                   progress=True, w_r=w_r)
            metrics = fid.judge_digits(data.decode(x, meta["codec"]),
                                       y.numpy() if net.n_classes else None)
            rows.append({"out": out, "run": name, "w_r": w_r, "n": args.n, "steps": args.steps,
                         "seed": args.seed, "images_per_s": images_per_s(out), **metrics,
                         "hardware": hardware(), "date": time.strftime("%Y-%m-%d")})
            with open(rows_path, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    wanted = [row for row in rows
              if (row["steps"], row["seed"], row["n"]) == (args.steps, args.seed, args.n)]
    print(f"{args.steps} steps of {train.DIGITS['batch_size']}, {args.n} samples, seed "
          f"{args.seed}; {hardware()}, {time.strftime('%Y-%m-%d')}\n\n"
          "| run | w_r | Fréchet, classifier | Fréchet, pixels | read as asked % | training "
          "images/s |\n|---|---|---|---|---|---|")
    for row in wanted:
        shown = [row[next(key for key in row if key.startswith(prefix))]
                 for prefix in ("frechet_classifier", "frechet_pixels")]
        read = f"{row['read_as_asked_percent']:.1f}" if "read_as_asked_percent" in row else ""
        print(f"| {row['run']} | {row['w_r']:g} | {shown[0]:.2f} | {shown[1]:.2f} | {read} | "
              f"{row['images_per_s']:.0f} |")


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
    q.add_argument("--out", default="runs/digits", metavar="DIR",
                   help="runs and rows (default: %(default)s)")
    return p


if __name__ == "__main__":
    data.run_cli(main, parser().parse_args())
