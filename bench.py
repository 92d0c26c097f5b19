"""The README's tables, each by one command.

    python bench.py digits --seeds 0 1 2      # every method on digits
    python bench.py photos methods --data prepared/photos --val DIR     # and on photographs
    python bench.py curves                    # their distances over steps, a picture
    python bench.py sheets --ckpt FILE FILE   # their samples from equal noise, one below the other
    python bench.py losses --ckpt FILE FILE   # their losses over time, with z and without
    python bench.py few_steps --ckpt out/ckpt.pt out/ddpm/ckpt.pt       # solvers over their calls
    python bench.py guidance --ckpt out/ckpt.pt                        # w_r x w_cfg
    python bench.py sampling --official DIR   # samples/s beside the authors' sampler
    python bench.py metrics --images DIR      # fid.py beside torch-fidelity
    python bench.py prepare --images DIR      # reading and writing of photographs, without networks
    python bench.py speed --official DIR      # training and sampling, beside the authors' code
    python bench.py scaling                   # the same over the number of processes
    python bench.py kills                     # does a killed run end as an undisturbed one?

Runs go to runs/digits/NAME, rows to runs/*/rows.jsonl. Killed, it continues; what is there is not
computed again.
"""
import argparse
import contextlib
import copy
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import types

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import fid
import model
import pca
import sample
import train

N_SAMPLES = 1_000                         # samples behind each row
# what a run is trained for -> train.py's settings
METHODS = {name: {"fusion": fusion, "repa": train.REPA_WEIGHT * repa} for name, fusion, repa in (
    ("none", "none", False), ("REPA", "none", True), ("merged", "merged", False),
    ("separate", "separate", False), ("merged+REPA", "merged", True))}


def method_flags(method):
    """The method's settings as flags of train.py."""
    return [f"--{name}={value}" for name, value in METHODS[method].items()]


def method_of(settings):
    """Which of METHODS a run's settings are."""
    return next(name for name, method in METHODS.items() if method.items() <= settings.items())


def digit_jobs(args):
    """(name, train.py's flags, what to sample it with) of the runs on digits. A flag may be a
    function that makes it, for when the run is wanted."""
    for of, flag in (("unconditional", ["--unconditional"]), ("conditional", [])):
        for method in ("none", "REPA", "merged", "separate"):
            weights = (1.0, 1.5) if method in model.FUSIONS[1:] else (1.0,)
            yield (f"{args.family}-{of}-{method}",
                   [f"--model={args.family}-T/2", *method_flags(method), *flag],
                   [{"w_r": w_r} for w_r in weights])


def photo_jobs(args):
    """The same of a table on photographs; a run that two tables share has one name."""
    def job(name, family, method, *flags, hows=({},)):
        channels = [] if METHODS[method]["fusion"] == "none" else [f"--r={args.r}"]
        return (name, [f"--model={family}-{args.size}/2", *method_flags(method), *channels, *flags],
                hows)

    if args.name == "methods":
        for family in ("SiT", "DiT"):
            for method in METHODS:
                yield job(f"{family}-{method}", family, method)
    elif args.name == "unconditional":
        for family in ("DiT", "SiT"):
            yield job(f"{family}-none", family, "none")
            yield job(f"{family}-unconditional-none", family, "none", "--unconditional")
            for suffix, flags in (("", ()), ("-lam_z-0.25", ("--lam_z=0.25",))):
                yield job(f"{family}-unconditional-merged{suffix}", family, "merged",
                          "--unconditional", *flags,
                          hows=[{"w_r": w_r} for w_r in (1.0, 1.1, 1.5, 2.0)])
    elif args.name == "settings":
        yield job("SiT-merged", "SiT", "merged")
        defaults = {"r": args.r, "lam_z": train.DEFAULTS["lam_z"],
                    "p_drop_z": train.DEFAULTS["p_drop_z"]}
        for flag, values in (("r", (1, 2, 4, 8, 16)), ("lam_z", (0.25, 1.0, 4.0)),
                             ("p_drop_z", (0.0, 0.1, 0.2, 0.5))):
            for value in values:
                if value != defaults[flag]:
                    yield job(f"SiT-merged-{flag}-{value:g}", "SiT", "merged", f"--{flag}={value}")
        yield job("SiT-merged-z-of-unit-RMS", "SiT", "merged",
                  lambda: f"--data={unit_rms(args.data, args.r)}")
    elif args.name == "guidance":
        hows = [{"w_cfg": w_cfg, "w_r": w_r} for w_r in (1.0, 1.5)
                for w_cfg in (1.0, 1.5, 2.0, 4.0)]
        hows += [{"w_cfg": w_cfg, "w_r": 1.0, "cfg_on": "both"} for w_cfg in (1.5, 2.0, 4.0)]
        yield job("SiT-merged", "SiT", "merged", hows=hows)
    elif args.name == "features":
        hows = [{}, {"z": "real"}]
        yield job("SiT-merged", "SiT", "merged", hows=hows)
        yield job("SiT-unconditional-merged", "SiT", "merged", "--unconditional", hows=hows)
        if args.two_levels:
            yield job("SiT-merged-two-levels", "SiT", "merged", f"--data={args.two_levels}",
                      hows=hows)


def unit_rms(folder, r):
    """The prepared folder again, beside the first: z divided by the root mean square of the r
    channels that are read; what does not change is linked. Its name, of which a hash of z is a
    part."""
    folder, channels = folder.rstrip("/"), data.Prepared(folder, r).channels
    with open(f"{folder}/meta.json") as file:
        meta = json.load(file)
    out = f"{folder}-unit-{r}-{meta['arrays']['z']['sha256'][:8]}"
    scale = 1 / float(np.sqrt(np.mean(np.square(np.array(meta["z_rms"])[channels]))))
    if os.path.exists(f"{out}/meta.json"):
        return out
    os.makedirs(out, exist_ok=True)
    for name in ("x.npy", "y.npy", "f.npy"):
        if os.path.exists(f"{folder}/{name}") and not os.path.exists(f"{out}/{name}"):
            os.link(f"{folder}/{name}", f"{out}/{name}")
    np.save(f"{out}/z.npy", (np.load(f"{folder}/z.npy").astype(np.float32) * scale)
            .astype(np.float16))
    for name in ("z_std", "z_rms"):
        meta[name] = [value * scale for value in meta[name]]
    for scaled in (meta, *meta["encoders"]):
        scaled["pca_scale" if scaled is meta else "scale"] *= scale
    meta["arrays"]["z"]["sha256"] = f"{scale:.9g} of {meta['arrays']['z']['sha256']}"
    data.write_json(f"{out}/meta.json", meta | {"name": f"{meta['name']}, z of unit RMS"})
    return out


def hardware(device=None):
    """One line: the device that torch computes on; None: a GPU if there is one."""
    if data.pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if "model name" in line), name)
    return f"{torch.get_num_threads()} threads of {name}"


def stamp(device=None):
    return f"{hardware(device)}, {time.strftime('%Y-%m-%d')}"


def rows_of(path):
    """The rows of a .jsonl file, none if it does not exist; a torn last line does not count."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def images_per_s(out):
    """Median training speed over the lines of a run's log."""
    return statistics.median(row["images_per_s"] for row in rows_of(f"{out}/log.jsonl")
                             if "images_per_s" in row)


def training_seconds(out, batch_size):
    """Of a run by its log, without what it spent on samples and checkpoints."""
    rows = [row for row in rows_of(f"{out}/log.jsonl") if "images_per_s" in row]
    return sum((row["step"] - before["step"]) * batch_size / row["images_per_s"]
               for before, row in zip([{"step": 0}, *rows], rows))


def find_row(path, key):
    """The last row of a .jsonl file that says all that key says, or None."""
    return next((row for row in reversed(rows_of(path)) if all(
        name in row and row[name] == value for name, value in key.items())), None)


def keep(path, row):
    """Add a row to a .jsonl file."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)                   # tables may be made side by side
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)        # what a full disk left of a row
        file.write(json.dumps(row).encode() + b"\n")


def kept(path, key, make, device="cpu"):
    """find_row()'s; if there is none, make()'s is added, which computes on that device."""
    row = find_row(path, key)
    if row:
        return row
    row = key | make() | {"hardware": hardware(device), "date": time.strftime("%Y-%m-%d")}
    keep(path, row)
    return row


def made_on(rows):
    """Hardware and date of rows, each pair once."""
    return "; ".join(sorted({f"{row['hardware']}, {row['date']}" for row in rows}))


def real_z(z):
    """For sample_batches(): guided(), but the net sees the z_t of real images: z (n, r, H, W),
    noised with what z_t begins with. What x gains by it is lost where z is generated."""
    size = train.JUDGED_AT_ONCE
    batches = iter(torch.cat([z, z[:1].expand(-len(z) % size, -1, -1, -1)]).split(size))

    def guide(net, y, **guidance):
        predict, z, first = sample.guided(net, y, **guidance), next(batches).to(y.device), []

        def of_real(state, t):
            first[:] = first or state
            z_t = net.process.add_noise(z, first[1], torch.full((len(y),), t, device=y.device))
            return predict([state[0], z_t], t)

        return of_real

    return guide


def judge_samples(net, meta, judge, n, device="cpu", y=None, **how):
    """The metrics of n samples, without counts in their names, and the seconds that sampling took;
    y: their classes (None: in turn); how: sample_batches()'s arguments."""
    y = data.classes_in_turn(n, net.n_classes) if y is None or not net.n_classes else y
    size = train.JUDGED_AT_ONCE
    start = time.perf_counter()
    x, _ = sample.generate(net.to(device), y, batch_size=size, device=device, progress=True, **how)
    seconds = time.perf_counter() - start
    seen = np.concatenate([judge.see(data.decode(part, meta, device)) for part in x.split(size)])
    metrics = judge.metrics(seen, y.numpy() if net.n_classes else None)
    return {"seconds": seconds} | {
        name.split(f"_{n}_vs_")[0]: value for name, value in metrics.items()}


def decisive(settings, meta):
    """What of a run's settings, but for train.DEFAULTS, and of its data's meta decides its weights
    and its curve, comparable over machines."""
    free = ("data", "seed", "log_every", "ckpt_every", "preview_every", "keep_every")
    chosen = {name: value for name, value in settings.items()
              if name not in free and value != train.DEFAULTS.get(name)}
    chosen |= {name: os.path.basename(chosen[name])
               for name in ("eval_reference", "eval_weights") if name in chosen}
    arrays = "xy" + "z" * (settings["r"] > 0) + "f" * (settings["repa"] > 0)
    return chosen | {"data": {name: meta["arrays"][name]["sha256"] for name in arrays}}


def train_to_the_end(command):
    """Run train.py, which saves first where SIGTERM or Ctrl-C ends this process. UserError if one
    that outlived its bench.py is still at work there."""
    *_, out = command
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # train.py holds it as long as it is
        except BlockingIOError:
            raise data.UserError(f"{out} is being trained by another process: wait for its end, or "
                                 "end it") from None
        process = subprocess.Popen(command, pass_fds=[lock.fileno()])
    told = []

    def stop(number, _):                                        # may come twice
        told.append(number)
        process.terminate()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    code = process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if told or code - 128 in handlers:
        sys.exit(128 + told[0] if told else code)
    if code:
        raise data.UserError("training failed, as said above; the same command goes on from there")


def train_and_judge(args, jobs, flags, judge):
    """Train the runs of jobs and judge their samples, seed by seed, but for those whose rows are
    there; the rows, by (run, what it was sampled with)."""
    if args.n < 2:
        raise data.UserError(f"--n {args.n}: a distance needs 2 samples at least")
    device = data.pick_device(args.device)
    flags = [*flags, f"--device={args.device}"] if args.device else flags
    jobs = {name: job for name, *job in jobs}
    for name in args.only or ():
        if name not in jobs:
            raise data.UserError(f"--only {name}: this table has {', '.join(jobs)}")
    chosen = []
    for name in args.only or jobs:
        of_run, hows = jobs[name]
        of_run = [*flags, *(flag() if callable(flag) else flag for flag in of_run),
                  f"--steps={args.steps}"]
        settings = train.resolve(train.typed(train.parser().parse_args(of_run)), None)
        source = data.open_data(settings["data"], settings["r"], settings["repa"] > 0)
        chosen.append((name, of_run, hows, decisive(settings, source.meta)))

    rows, script = {}, os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    for seed, (name, of_run, hows, made_with) in itertools.product(args.seeds, chosen):
        out = f"{args.out}/{name}-{args.steps}-{seed}"

        @functools.cache
        def trained():
            _, checkpoint, _ = train.newest_checkpoint(out)
            if checkpoint:
                found = decisive(train.DEFAULTS | checkpoint["settings"], checkpoint["meta"])
                for setting in made_with | found:
                    one, other = (each.get(setting, train.DEFAULTS.get(setting))
                                  for each in (found, made_with))
                    if one != other:
                        raise data.UserError(f"{out} was trained with {setting} {one}, and this "
                                             f"table's is {other}: choose another --out")
            if not os.path.exists(f"{out}/sheet.png"):               # the last that it writes
                train_to_the_end([sys.executable, script, *of_run, f"--seed={seed}", "--out", out])
            return sample.load_model(f"{out}/ckpt.pt")

        def made():
            net, about = trained()
            options = {"steps": about["settings"]["sample_steps"],
                       "bf16": device.type == "cuda"} | how
            if options.pop("z", None) == "real":
                source = data.open_data(about["settings"]["data"], net.r)
                _, z, y, _ = source.batch(source.examples(args.n))
                options |= {"guide": real_z(z), "y": y}
            metrics = judge_samples(net, about["meta"], judge(), args.n, device, **options)
            distances = [[row["step"], next(value for key, value in row.items() if
                                            key.startswith("frechet"))]
                         for row in rows_of(f"{out}/log.jsonl") if "eval_seconds" in row]
            return metrics | {
                "images_per_s": images_per_s(out), "curve": distances,
                "training_seconds": training_seconds(out, about["settings"]["batch_size"])}

        for how in hows:
            key = {"run": name, "seed": seed, "n": args.n, "made_with": made_with, "sampled_with": {
                option: value for option, value in how.items() if value != 1}}     # 1: unguided
            row = kept(f"{args.out}/rows.jsonl", key, made, device)
            rows.setdefault((name, *how.items()), []).append(row)
    return rows


def mean_and_spread(values, sign=""):
    """"mean ± standard deviation", or the one value."""
    mean = statistics.mean(values)
    digits = 2 if abs(mean) < 100 else 0
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:{sign}.{digits}f}{spread}"


def digits(args):
    """Train and judge every method on digits, and print the table."""
    rows = train_and_judge(args, digit_jobs(args), [], lambda: fid.Judge("digits"))
    metrics = ("frechet_classifier", "frechet_pixels", "read_as_asked_percent")
    print("| run | w_r | Fréchet, classifier | minus none's, same seed | minus w_r 1's | "
          "Fréchet, pixels | read as asked % | training images/s |\n|---" + "|---" * 7 + "|")
    for key, of_seeds in rows.items():
        name, (_, w_r) = key
        cells = [mean_and_spread([row[metric] for row in of_seeds]) if metric in of_seeds[0] else ""
                 for metric in metrics]
        others = [(f"{name.rpartition('-')[0]}-none", ("w_r", 1.0)), (name, ("w_r", 1.0))]
        cells[1:1] = [mean_and_spread([row[metrics[0]] - of_other[metrics[0]] for row, of_other
                                       in zip(of_seeds, rows[other])], "+")
                      if other in rows and other != key else "" for other in others]
        speed = statistics.median(row["images_per_s"] for row in of_seeds)
        print(f"| {name} | {w_r:g} | {' | '.join(cells)} | {speed:.0f} |")
    print(f"\n{args.steps} steps of {train.DIGITS['batch_size']}, {args.n} samples; mean ± "
          f"standard deviation of the seeds {args.seeds}; {made_on(sum(rows.values(), []))}")


def photo_reference(args, meta, space):
    """The moments of the validation photographs in a Space: the file that has them."""
    files, _, _ = data.list_images(args.val)
    sizes = [b"%d" % os.path.getsize(os.path.join(args.val, os.fsdecode(file))) for file in files]
    which = hashlib.sha256(b"\n".join([*files, *sizes, space.weights.encode()])).hexdigest()[:8]
    path = f"{args.out}/reference-{space.name}-{meta['image_size']}-{which}.npz"
    if not os.path.exists(path):
        batches = data.Batches(args.val, files, np.arange(len(files)), 32, meta["image_size"])
        readable = (images[good].permute(0, 3, 1, 2) for _, images, good in batches.loader(2))
        measured = fid.measure(readable, len(files), space, args.val, keep=False)
        os.makedirs(args.out, exist_ok=True)
        fid.save_statistics(path, measured, space)
    return path


def probe(args, path, device):
    """Accuracy on real z of the photographs in args.val_data of two linear classifiers: one has
    learned from as many generated z with the classes that were asked for, one from real z."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    net, about = sample.load_model(path)
    source, val = (data.Prepared(folder, net.r) for folder in (args.data, args.val_data))
    for key in ("z_std", "classes", "z_size"):
        if source.meta[key] != val.meta[key]:
            raise data.UserError(f"--val_data {args.val_data} has another {key} than {args.data}: "
                                 f"prepare it with data.py --pca {args.data}/pca.npz")
    y = data.classes_in_turn(args.n, net.n_classes)
    _, generated = sample.generate(net.to(device), y, about["settings"]["sample_steps"],
                                   batch_size=train.JUDGED_AT_ONCE, device=device, progress=True)
    real, test = (each.batch(each.examples(min(n, each.n)))[1:3]
                  for each, n in ((source, args.n), (val, val.n)))

    def accuracy(z, y):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        classifier.fit(flat(z), y.numpy())
        return 100 * classifier.score(flat(test[0]), test[1].numpy())

    def flat(z):                                           # from x's grid to z's own
        return F.adaptive_avg_pool2d(z, source.meta["z_size"]).flatten(1).numpy()

    return {"from_generated_z": accuracy(generated, y), "from_real_z": accuracy(*real)}


def print_photos(rows, features, n, points):
    """A table of rows on photographs: the Fréchet distance at these steps and at the end."""
    header = " | ".join(f"{step:,} steps" for step in points)
    print(f"| run | sampled with | {header} | at the end, {n:,} samples | training images/s | "
          f"sampling images/s |\n|---|---|{'---|' * len(points)}---|---|---|")
    for (name, *how), of_seeds in rows.items():
        curves = [dict(row["curve"]) for row in of_seeds]
        unguided = all(value == 1 for _, value in how)     # as the curve's samples
        cells = [mean_and_spread([curve[step] for curve in curves])
                 if unguided and all(step in curve for curve in curves) else "" for step in points]
        cells += [mean_and_spread([row[f"frechet_{features}"] for row in of_seeds])]
        training = statistics.median(row["images_per_s"] for row in of_seeds)
        sampling = statistics.median(n / row["seconds"] for row in of_seeds)
        print(f"| {name} | {', '.join(f'{key} {value}' for key, value in how)} | "
              f"{' | '.join(cells)} | {training:.0f} | {sampling:.1f} |")
    print()


def photos(args):
    """Train and judge the runs of a table on photographs, and print it."""
    if args.name == "features" and not args.val_data:
        raise data.UserError("features needs --val_data, to test the generated features")
    device, meta = data.pick_device(args.device), data.Prepared(args.data).meta
    if args.name == "features" and args.two_levels:
        x, other = (each["arrays"]["x"]["sha256"]
                    for each in (meta, data.Prepared(args.two_levels).meta))
        if x != other:
            raise data.UserError(f"--two_levels {args.two_levels} has other x than {args.data}: "
                                 "prepare it from the same images, with the same codec and size")
    space = fid.Space(args.features, args.weights,
                      data.key_values(args.features_kwargs, "features_kwargs"), device)
    if space.with_head in [each["weights"] for each in meta["encoders"]]:
        raise data.UserError(f"--weights {args.weights}: this network made the z of {args.data}; "
                             "let another one measure the samples")
    reference = photo_reference(args, meta, space)
    every = max(args.steps // 5, 1)
    flags = [f"--{name}={value}" for name, value in {
        "data": args.data, "batch_size": args.batch_size, "lr": args.lr, "eval_every": every,
        "ckpt_every": max(args.steps // 20, 1), "preview_every": args.steps,
        "log_every": max(args.steps // 50, 1),
        "sample_steps": args.sample_steps, "eval_n": args.eval_n, "eval_reference": reference,
        "eval_features": args.features, "eval_weights": args.weights}.items() if value is not None]
    flags += ["--eval_features_kwargs", *args.features_kwargs] if args.features_kwargs else []
    rows = train_and_judge(args, photo_jobs(args), flags, functools.cache(
        lambda: fid.Judge(fid.stored_statistics(reference, space), space)))
    tables = [{key: of_seeds for key, of_seeds in rows.items()
               if key[0] == "SiT-merged" or key[0].startswith(f"SiT-merged-{setting}-")}
              for setting in ("r", "lam_z", "p_drop_z", "z")]
    tables = [table for table in tables
              if args.name == "settings" and set(table) - {("SiT-merged",)}] or [rows]
    for table in tables:
        print_photos(table, args.features, args.n, [k * every for k in range(1, 6)])
    if args.name == "features" and ("SiT-merged",) in rows:
        name, row = f"SiT-merged-{args.steps}-{args.seeds[0]}", rows["SiT-merged",][0]
        found = kept(f"{args.out}/rows.jsonl", {
            "probe": name, "n": args.n, "made_with": row["made_with"],
            "val_data": data.Prepared(args.val_data).meta["arrays"]["z"]["sha256"]},
            lambda: probe(args, f"{args.out}/{name}/ckpt.pt", device), device)
        print(f"Classes of real validation z, by linear classifiers of {args.n:,} images: from "
              f"generated z {found['from_generated_z']:.1f} % right, from real z "
              f"{found['from_real_z']:.1f} %\n")
    print(f"Fréchet distances in the space of {args.features} "
          f"{os.path.basename(args.weights or '')}, against {args.val}, of {args.eval_n:,} samples "
          f"while training; z of {', '.join(each['encoder'] for each in meta['encoders'])}; batch "
          f"{args.batch_size}, lr {args.lr:g}, {args.sample_steps} calls a sample, seeds "
          f"{args.seeds}; {made_on(sum(rows.values(), []))}")


def curves(args):
    """Draw the Fréchet distance over training steps and over seconds: at the speed that rows of
    --speed say of the method, or the run's own median."""
    try:
        import matplotlib
    except ImportError:
        raise data.UserError("curves need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    runs = {}
    for row in rows_of(args.rows):
        if row.get("curve") and (not args.only or row["run"] in args.only):
            settings = json.dumps(row["made_with"])
            runs.setdefault((row["run"], settings), {})[row["seed"]] = row
    if not runs:
        raise data.UserError(f"{args.rows} has no curves; make some with: bench.py photos methods")
    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
    for i, ((name, settings), of_seeds) in enumerate(runs.items()):
        steps, distances = np.mean([row["curve"] for row in of_seeds.values()], 0).T
        made_with = train.DEFAULTS | json.loads(settings)
        rate = statistics.median(row["images_per_s"] for row in of_seeds.values())
        if args.speed:
            key = made_with["model"], method_of(made_with), made_with["batch_size"]
            rates = [row["images_per_s"] for row in rows_of(args.speed)
                     if (row["model"], row["run"], row["batch_size"]) == key]
            if len(rates) != 1:
                raise data.UserError(
                    f"{args.speed} has {len(rates)} rows of {key[0]} {key[1]} with batches of "
                    f"{key[2]}, one is needed: make a file with bench.py speed --rows, or leave "
                    "out --speed")
            rate, = rates
        style = {"marker": "o", "markersize": 3, "color": f"C{i % 10}", "label": name,
                 "linestyle": "-" if name.startswith("SiT") else "--"}
        panels[0].plot(steps, distances, **style)
        panels[1].plot(steps * made_with["batch_size"] / rate, distances, **style)
    for panel, label in zip(panels, ("training steps", "training seconds")):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(args.label)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=120)
    print(f"{args.out}: {', '.join(name for name, _ in runs)}")


def run_of(path):
    """The name of the folder that a checkpoint lies in."""
    return os.path.basename(os.path.dirname(os.path.abspath(path)))


def sheets(args):
    """A picture: samples of every checkpoint, of equal classes and noise, above their features."""
    names, images, features = [], [], []
    for path in args.ckpt:
        net, about = sample.load_model(path)
        y, device = data.classes_in_turn(args.n, net.n_classes), data.pick_device(args.device)
        z_std = about["meta"]["z_std"]
        for w_r in args.w_r if net.r else [1.0]:
            sample.check_guidance(about, argparse.Namespace(ckpt=path, w_r=w_r, w_cfg=1))
            x, z = sample.generate(net.to(device), y, about["settings"]["sample_steps"], w_r=w_r,
                                   seed=args.seed, batch_size=args.n, device=device)
            names.append(run_of(path) + f", RG {w_r:g}" * (w_r != 1))
            images.append(data.decode(x, about["meta"], device))
            features.append(None if z is None else z.numpy() / np.reshape(z_std, (-1, 1, 1)))
    widest = max([1] + [z.shape[1] for z in features if z is not None])
    sample.sheet(images, features, np.ones(widest), args.n, names).save(args.out)
    print(f"{args.out}: {', '.join(names)}")


@torch.no_grad()
def losses_over_time(net, source, n, device):
    """The training losses of a network on n images of a Prepared folder, with the same noise at
    every time and for every network of as many channels: {"x": {time from 0, noise, to 1, data:
    mean}} and, of networks with z, the same of "x, z null" and "z"."""
    x, z, y, _ = source.batch(source.examples(n))
    generator = torch.Generator().manual_seed(0)
    eps_x, eps_z = (None if part is None else torch.randn(part.shape, generator=generator)
                    for part in (x, z))                              # x's first: the same for all
    y = y if net.n_classes else torch.zeros_like(y)
    found = {}
    for u in np.arange(0.05, 1, 0.1):
        t = net.process.draw_t(torch.full((n,), u))
        time_to_data = f"{net.process.data_time(t[0]).item():.2f}"
        for dropped in (False, True)[:1 + bool(net.r)]:
            batch = (x, z, y, t, eps_x, eps_z, torch.full((n,), dropped))
            of_batches = [train.joint_loss(net, net.process, *train.of_each(
                batch, lambda part: part[rows].to(device))) for rows in torch.arange(n).split(64)]
            of_x, of_z = (torch.cat(parts).mean().item() for parts in zip(*of_batches))
            found.setdefault("x, z null" if dropped else "x", {})[time_to_data] = of_x
            if net.r and not dropped:
                found.setdefault("z", {})[time_to_data] = of_z
    return {name: dict(sorted(found[name].items())) for name in sorted(found)}


def losses(args):
    """Print where in time z helps a checkpoint to denoise x, and what z itself costs."""
    if args.n < 1:
        raise data.UserError(f"--n {args.n}: the mean of the losses needs an image")
    device, rows = data.pick_device(args.device), []
    for path in args.ckpt:
        net, about = sample.load_model(path)
        source = data.open_data(args.data or about["settings"]["data"], net.r)
        for key in ("codec", "scale", "shift", "x_size", "z_std"):
            if source.meta[key] != about["meta"][key]:
                raise data.UserError(f"{path} was trained on data with another {key}")
        key = {"run": run_of(path), "net": data.weights_hash(net)[:16], "n": args.n,
               "data": {name: source.meta["arrays"][name]["sha256"]
                        for name in ("xz" if net.r else "x")}}
        rows.append(kept(args.rows, key, lambda: {
            "losses": losses_over_time(net.to(device), source, args.n, device)}, device))
        of_run = rows[-1]["losses"]
        if len(rows) == 1:
            print(f"| run | loss of | {' | '.join(f't = {t}' for t in of_run['x'])} |\n|---|---"
                  + "|---" * len(of_run["x"]) + "|")
        for name, over_time in of_run.items():
            cells = " | ".join(f"{loss:.3f}" for loss in over_time.values())
            print(f"| {run_of(path)} | {name} | {cells} |", flush=True)
    print(f"\n{args.n} images; {made_on(rows)}")


def judged(args, path, how):
    """The row of n digits that the checkpoint `path` makes with sample_batches()'s arguments `how`:
    made, judged and kept if it is not there."""
    net, about = sample.load_model(path)
    sample.check_guidance(about, argparse.Namespace(**{"ckpt": path, "w_r": 1, "w_cfg": 1} | how))
    if about["meta"]["name"] != "digits":
        raise data.UserError(f"{path}: these tables judge digits, and it was trained on "
                             f"{about['meta']['name']}")
    key = {"ckpt": f"{about['arch']['name']} {data.weights_hash(net)[:16]}", "n": args.n} | how
    return kept(f"{args.out}/rows.jsonl", key, lambda: judge_samples(
        net, about["meta"], fid.Judge("digits"), args.n, **how))


def few_steps(args):
    """Print quality and time of every solver of the checkpoints over its network calls."""
    print("| model | solver | calls | Fréchet, classifier | Fréchet, pixels | read as asked % | "
          "seconds |\n|---|---|---|---|---|---|---|")
    rows = []
    for path in args.ckpt:
        _, about = sample.load_model(path)
        name = about["arch"]["name"]
        for solver in sample.SOLVERS[model.FAMILIES[model.parse_name(name)[0]]]:
            for steps in args.calls:
                row = judged(args, path, {"solver": solver, "steps": steps})
                rows.append(row)
                read = row.get("read_as_asked_percent", math.nan)
                print(f"| {name} | {solver} | {steps} | {row['frechet_classifier']:.2f} | "
                      f"{row['frechet_pixels']:.2f} | {read:.1f} | {row['seconds']:.1f} |",
                      flush=True)
    print(f"\n{args.n} samples; {made_on(rows)}")


def guidance(args):
    """Print w_r x w_cfg: Fréchet distance in classifier space / read as asked %."""
    path = args.ckpt[0]
    _, about = sample.load_model(path)
    steps = about["settings"]["sample_steps"]
    print(f"| w_r | {' | '.join(f'w_cfg {w:g}' for w in args.w_cfg)} |\n|---"
          + "|---" * len(args.w_cfg) + "|")
    rows = []
    for w_r in args.w_r:
        cells = [judged(args, path, {"steps": steps, "w_cfg": w_cfg, "w_r": w_r})
                 for w_cfg in args.w_cfg]
        print(f"| {w_r:g} | " + " | ".join(
            f"{row['frechet_classifier']:.2f} / {row.get('read_as_asked_percent', math.nan):.1f}"
            for row in cells) + " |", flush=True)
        rows += cells
    print(f"\n{args.n} samples, {steps} calls; {made_on(rows)}")


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
        data.write_block(folder, rows.numpy(), {"x": x, "z": z}, good.numpy())
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
          f"{stamp()}\n\n"
          "| | images/s: median (least to most) | bytes an image | GB for 1,281,167 images |\n"
          "|---|---|---|---|")
    for name, rounds in figures.items():
        rates, sizes = zip(*rounds)
        print(f"| {name} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | "
              f"{sizes[0]:,.0f} | {sizes[0] * 1_281_167 / 1e9:.1f} |")


def metrics(args):
    """Print what fid.py and torch-fidelity say of the same photographs, and how long they take."""
    files, _, _ = data.list_images(args.images)
    files = files[np.random.default_rng(0).permutation(len(files))[:2 * args.n]]
    n = len(files) // 2

    def ours(sets, weights, folder):
        start = time.perf_counter()
        space = fid.Space("inception", weights)
        statistics = [fid.statistics_of(path, space, True, 32, args.workers) for path in sets]
        middle = time.perf_counter()
        found = fid.compare(*statistics, space)
        return found, middle - start, time.perf_counter() - middle

    def theirs(sets, weights, folder):
        """The second call finds its features in the cache: metrics alone."""
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            found = torch_fidelity.calculate_metrics(
                input1=sets[0], input2=sets[1], input1_cache_name="one", input2_cache_name="two",
                cache=True, cache_root=folder, feature_extractor="inception-v3-compat",
                feature_extractor_weights_path=weights, cuda=False, fid=True, isc=True, prc=True,
                isc_splits=1, samples_shuffle=False, batch_size=32, verbose=False)
            seconds.append(time.perf_counter() - start)
        names = {"frechet_inception_distance": "fid", "inception_score_mean": "inception_score"}
        found = {names.get(name, name): value for name, value in found.items()}
        return found, seconds[0] - seconds[1], seconds[1]

    ways = {"fid.py": ours}
    if args.official:
        sys.path.insert(0, args.official)
        import torch_fidelity
        ways["torch-fidelity"] = theirs
    seconds, found = {name: [] for name in ways}, {}
    with tempfile.TemporaryDirectory() as folder:
        sets, weights = [f"{folder}/samples", f"{folder}/reference"], args.weights
        for i, file in enumerate(files[:2 * n]):
            os.makedirs(sets[i // n], exist_ok=True)
            image = data.load_image(os.path.join(args.images, os.fsdecode(file)), args.size)
            data.Image.fromarray(image).save(f"{sets[i // n]}/{i:06d}.png")
        if not weights:
            import timm
            torch.manual_seed(0)
            net = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
            for part in net.modules():                     # timm's would explode without training
                if isinstance(part, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            weights = f"{folder}/random.pth"
            torch.save(net.state_dict(), weights)
        for _ in range(args.rounds):
            for name, way in ways.items():
                with tempfile.TemporaryDirectory(dir=folder) as cache:
                    found[name], *took = way(sets, weights, cache)
                seconds[name].append(took)
    shown = ("fid", "sfid", "inception_score", "precision", "recall")
    print(f"| {n} + {n} images of {args.size} pixels | {' | '.join(shown)} | features, images/s: "
          "median (least to most) | metrics, s |\n|---|---|---|---|---|---|---|---|")
    for name, rounds in seconds.items():
        cells = [f"{found[name][key]:.6g}" if key in found[name] else "" for key in shown]
        extraction, of_metrics = zip(*rounds)
        rates = sorted(2 * n / each for each in extraction)
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(rates):.3g} ({rates[0]:.3g} to "
              f"{rates[-1]:.3g}) | {statistics.median(of_metrics):.1f} |")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(args.large, 2048, generator=generator)
    start = time.perf_counter()
    moments = pca.Moments(2048)
    for part in features.split(fid.ROWS):
        moments.update(part.numpy())
    mean, cov, middle = moments.mean, moments.cov, time.perf_counter()
    fid.frechet_distance(mean, cov, mean + 0.01, cov)
    end = time.perf_counter()
    reference = torch.randn(args.large // 5, 2048, generator=generator)
    fid.precision_and_recall(features, reference)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"\n{args.large:,} x 2,048: moments {middle - start:.1f} s, Fréchet distance "
          f"{end - middle:.1f} s; precision and recall against {args.large // 5:,}: "
          f"{time.perf_counter() - end:.0f} s; the process held {most:.1f} GiB at most, networks "
          f"included; on the CPU: {torch.get_num_threads()} threads; "
          f"{stamp('cpu')}")


def allocated():
    """Bytes on this process's GPU, 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def random_data(folder, n=1024, r=8):
    """A prepared folder of random numbers with the shapes of ImageNet's at 256 pixels."""
    rng = np.random.default_rng(0)
    for name, array in {"x": rng.normal(size=(n, 8, 32, 32)).astype(np.float16),
                        "z": rng.normal(size=(n, r, 16, 16)).astype(np.float16),
                        "y": rng.integers(0, 1000, n)}.items():
        np.save(f"{folder}/{name}.npy", array)
    some = pca.Moments(r).update(rng.normal(size=(100, r)))
    data.write_json(f"{folder}/meta.json", data.describe(folder, {
        "name": "random", "classes": [str(i) for i in range(1000)], "image_size": 256,
        "codec": None, "codec_weights": None, "scale": 0.18215, "shift": 0.0, "x_channels": 4,
        "x_has_std": True, "settings": {}}, [pca.fit(some, r)]))


class Ours:
    """train.py's own steps, on batches that are assembled ahead as there."""
    def __init__(self, args, folder, name, method, rank, n_processes):
        flags = [f"--{flag}={getattr(args, flag)}" for flag in ("batch_size", "micro_batch_size")
                 if getattr(args, flag)]
        flags += [f"--{'' if getattr(args, flag) else 'no-'}{flag}" for flag in ("bf16", "compile")]
        of_run = train.parser().parse_args(["--model", name, "--data", folder,
                                            *method_flags(method), *flags])
        before = allocated()
        self.trainer = train.Trainer(train.resolve(train.typed(of_run), None), of_run, args.dev,
                                     None, rank, n_processes)
        self.arch = self.trainer.arch
        self.check, self.batches = None, data.prefetch(self.trainer.assemble, range(10 ** 9))
        self.resident = allocated() - before

    def steps(self, n):
        trainer = self.trainer
        for rows, parts in itertools.islice(self.batches, n):
            loss, t, norm = trainer.gradients(parts)
            if self.check:
                self.check.told_to_stop()
            self.check = train.StepCheck(trainer.step, loss, t, rows, norm, told=False)
            trainer.update()

    def sample(self, n, calls):
        """n images of so many network calls, without decoding."""
        ema = self.trainer.ema
        sample.generate(ema, data.classes_in_turn(n, ema.n_classes), calls, batch_size=n,
                        device=self.trainer.device, bf16=self.trainer.args.bf16)


def import_theirs(folder):
    """Make a clone of zelaki/ReDi importable, also where packages are missing that it imports but
    does not need here."""
    for module, part in (("torchdiffeq", "odeint"), ("diffusers.models", "AutoencoderKL")):
        parent = module.split(".")[0]
        if parent not in sys.modules and not importlib.util.find_spec(parent):
            sys.modules[parent] = types.ModuleType(parent)
            sys.modules[module] = types.ModuleType(module)
            setattr(sys.modules[module], part, None)
    if folder not in sys.path:
        sys.path.insert(0, folder)


@contextlib.contextmanager
def tf32():
    """As the authors' code computes, convolutions and matrix products; ours the former alone."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


class Theirs:
    """The authors' step: their network, loss and averaging, from a clone of zelaki/ReDi, on tensors
    that lie on the device. encoder: DINOv2 (timm's, random weights) and the PCA run in the step, as
    in their trainer; without it z is there already."""
    def __init__(self, args, name, encoder=False):
        import_theirs(args.official)
        import train_redi as theirs                # allows TF32 for its own matrices: see tf32()
        from transport import create_transport
        torch.backends.cuda.matmul.allow_tf32 = False                  # it allowed it at import
        self.theirs, self.transport = theirs, create_transport()
        before = allocated()
        self.net = theirs.SiT_models[name](input_size=32, in_channels=12, learn_sigma=False)
        self.net = self.net.to(args.dev).train()
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, weight_decay=0)
        n = args.batch_size
        self.moments, self.z, self.raw = (torch.randn(n, *shape, device=args.dev) for shape in (
            (8, 32, 32), (8, 32, 32), (3, 256, 256)))
        self.y, self.encoder = torch.arange(n, device=args.dev) % 1000, None
        if encoder:
            import timm
            self.encoder = timm.create_model("vit_base_patch14_reg4_dinov2", img_size=224,
                                             num_classes=0).to(args.dev).eval()
            self.components = torch.randn(8, 768, device=args.dev)
        self.resident = allocated() - before

    @tf32()
    def steps(self, n):
        for _ in range(n):
            z = self.z
            if self.encoder:
                with torch.no_grad():
                    images = self.theirs.preprocess_raw_image(self.raw)
                    z = self.encoder.forward_features(images)[:, 5:] @ self.components.T
                    z = z.transpose(1, 2).reshape(-1, 8, 16, 16)
                    z = F.interpolate(z, size=(32, 32), mode="bilinear")
            x = self.theirs.sample_posterior(self.moments, latents_scale=0.18215)
            losses = self.transport.training_losses(self.net, torch.cat([x, z], 1),
                                                    {"y": self.y}, dino_drop_prob=0.2)
            self.optimizer.zero_grad()
            losses["loss"].mean().backward()
            self.optimizer.step()
            self.theirs.update_ema(self.ema, self.net)
            losses["loss"].mean().item()


def forward_flop(arch):
    """FLOP of one image's pass, counted by torch: 2 a multiplication with addition."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = model.build(**arch)
        x_t, z_t = (torch.empty(1, channels, net.x_size, net.x_size) if channels else None
                    for channels in (net.x_channels, net.r))
        net(x_t, z_t, torch.empty(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def matmul_peak(device, dtype, size):
    """FLOP/s of square matrices, the best of six products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return max(2 * size ** 3 / seconds_of(lambda: a @ b, device) for _ in range(6))


def seconds_of(work, device):
    """Of the slowest process, up to the end of what it started on its GPU."""
    def together():
        if device.type == "cuda":
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()

    together()
    start = time.perf_counter()
    work()
    together()
    return time.perf_counter() - start


def speed_of(args, name, keys, rank, n_processes):
    """{run: row} of the model of that name: the runs of keys in turn, round by round."""
    on_gpu, rates, sampling_rates, memory = args.dev.type == "cuda", {}, {}, {}
    peak = n_processes * matmul_peak(args.dev, torch.bfloat16 if args.bf16 else torch.float32,
                                     8192 if on_gpu else 2048)
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            random_data(folder)
        runs = {run: Theirs(args, name, encoder="encoder" in run) if "official" in run else
                Ours(args, args.data or folder, name, run, rank, n_processes) for run in keys}
        for i in range(args.rounds + 1):                             # the first warms up
            for run, of_run in runs.items():
                if on_gpu:                                           # all runs' weights lie there
                    torch.cuda.reset_peak_memory_stats()
                    before = allocated()
                seconds = seconds_of(lambda: of_run.steps(args.steps), args.dev)
                if on_gpu:
                    memory[run] = torch.cuda.max_memory_allocated() - before + of_run.resident
                if i:
                    rates.setdefault(run, []).append(args.batch_size * args.steps / seconds)
                if isinstance(of_run, Ours) and args.calls:
                    n = min(args.batch_size, 64)
                    seconds = seconds_of(lambda: of_run.sample(n, args.calls), args.dev)
                    if i:
                        sampling_rates.setdefault(run, []).append(
                            n_processes * n * args.calls / seconds / 250)
        rows = {}
        for run, key in keys.items():
            arch = {"name": name, "fusion": "merged", "r": 8}        # theirs
            flop = forward_flop(getattr(runs[run], "arch", arch))
            rate = statistics.median(rates[run])
            rows[run] = key | {
                "images_per_s": rate, "least": min(rates[run]), "most": max(rates[run]),
                "ratio": rate / statistics.median(rates[args.methods[0]]),
                "mfu_percent": 100 * 3 * flop * rate / peak, "peak_flop_per_s": peak,
                "memory_gb": memory[run] / 1e9 if on_gpu else None,
                "date": time.strftime("%Y-%m-%d")}
            if run in sampling_rates:
                of_run = sampling_rates[run]
                rows[run] |= {"sampling_images_per_s": statistics.median(of_run),
                              "sampling_least": min(of_run), "sampling_most": max(of_run)}
    torch._dynamo.reset()                                # code for another width
    return rows


def speed(args):
    """Print training and sampling images/s of every method and, given their code, the authors'."""
    rank, n_processes = data.rank_and_count()
    if args.official and (n_processes > 1 or args.data):
        raise data.UserError("--official is for one process, without --data; leave it out")
    for name in args.models if args.calls else ():
        sample.check_solver(name, None, args.calls, "--calls")
    args.dev = data.begin(args, n_processes, "nccl")
    on_gpu = args.dev.type == "cuda"

    def say(text):
        if rank == 0:
            print(text, flush=True)

    tokens = (data.Prepared(args.data).meta["x_size"] if args.data else 32) ** 2 // 4
    precision = "bfloat16" if args.bf16 else "float32"
    say(f"batch {args.batch_size}, {tokens} tokens at patch 2, {precision}"
        f"{', compiled' * args.compile}; {n_processes} process(es); {args.rounds} alternating "
        f"rounds of {args.steps} steps; "
        f"torch {torch.__version__}; sampling not compiled, by {args.calls} calls, images/s for "
        f"250\n\n"
        f"| | training images/s: median (least to most) | MFU % | ratio | "
        f"{'memory GB | ' * on_gpu}sampling images/s: median (least to most) |\n"
        f"|---|---|---|---|---|{'---|' * on_gpu}")
    theirs = ["official", "official, with its encoder"][:bool(args.official) * (1 + args.encoder)]
    runs, all_rows = [*args.methods, *theirs], []
    settings = {name: getattr(args, name) for name in (
        "batch_size", "micro_batch_size", "steps", "rounds", "calls", "bf16", "compile")}
    for name in args.models:
        keys = {run: {"model": name, "run": run, "beside": runs, "n_processes": n_processes,
                      "tokens": tokens, "hardware": hardware(args.dev)} | settings for run in runs}
        rows = [find_row(args.rows, key) if args.rows else None for key in keys.values()]
        if not data.share(all(rows)):                    # a ratio is to what ran beside it
            rows = list(speed_of(args, name, keys, rank, n_processes).values())
            for row in rows if rank == 0 and args.rows else ():
                keep(args.rows, row)
        for row in rows:
            trained, sampled = (
                f"{row[rate]:.4g} ({row[f'{least}least']:.4g} to {row[f'{least}most']:.4g})"
                if rate in row else "" for rate, least in (("images_per_s", ""),
                                                           ("sampling_images_per_s", "sampling_")))
            say(f"| {name} {row['run']} | {trained} | {row['mfu_percent']:.1f} | "
                f"{row['ratio']:.3f} | " + (f"{row['memory_gb']:.1f} | " if on_gpu else "")
                + f"{sampled} |")
        all_rows += rows
    peaks = {row["model"]: f"{row['peak_flop_per_s'] / 1e12:.3g}" for row in all_rows}
    say(f"\nMFU is of a matrix product's TFLOP/s, measured with each model: "
        f"{', '.join(f'{peak} ({name})' for name, peak in peaks.items())}; {made_on(all_rows)}")
    if n_processes > 1:
        dist.destroy_process_group()


def sampling(args):
    """Print samples/s of sample.py and of the authors' sample_ddp.py loop: equal weights, steps and
    guidance, decoded and written as PNG files; and how far equal noise takes them apart."""
    args.dev = data.begin(args, 1)
    import_theirs(args.official)
    from models import SiT_models
    from transport import Sampler, create_transport
    torch.manual_seed(0)
    theirs = SiT_models[args.model](input_size=32, in_channels=12, learn_sigma=True).eval()
    for p in theirs.parameters():                        # zero at first, some of them
        p.data += 0.02 * p.requires_grad * torch.randn_like(p)
    nets = {"float32": model.load_published(theirs.state_dict()).to(args.dev)}
    theirs = theirs.to(args.dev)
    if args.compile or args.bf16:
        name = "bf16" * args.bf16 + ", " * (args.bf16 and args.compile) + "compiled" * args.compile
        nets[name] = copy.deepcopy(nets["float32"])
        for block in nets[name].blocks if args.compile else ():
            block.compile(dynamic=False)
    meta = {"codec": args.vae, "codec_weights": None, "scale": None, "shift": None}
    codec, n = data.codec_of(meta, args.dev), args.batch_size
    solve = Sampler(create_transport()).sample_sde(diffusion_form="sigma", num_steps=args.steps)
    y = torch.arange(n * args.batches) % 1000

    def their_latents(noise, labels):
        labels = torch.cat([labels, torch.full_like(labels, 1000)])
        return solve(torch.cat([noise, noise]), theirs.forward_with_cfg_vae, y=labels,
                     cfg_scale=args.w_cfg)[-1][:n]

    @torch.no_grad()
    @tf32()
    def official(folder):
        for b, labels in enumerate(y.to(args.dev).split(n)):
            latents = their_latents(torch.randn(n, 12, 32, 32, device=args.dev), labels)
            images = codec.decode(latents[:, :4])
            images = (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1)
            for i, image in enumerate(images.to("cpu", torch.uint8).numpy()):
                data.Image.fromarray(image).save(f"{folder}/{b * n + i:06d}.png")

    def ours(folder, name):
        size = 32 * codec.factor
        store = sample.Store(folder, {"n": len(y)}, (size, size, 3))
        store.open(with_z=False)
        sample.fill(store, range(args.batches), nets[name], y, meta, args.dev, quiet=True,
                    steps=args.steps, batch_size=n, w_cfg=args.w_cfg, bf16="bf16" in name)
        sample.write_pngs(store["images"], folder)

    runs = {"official": official} | {
        f"ours, {name}": functools.partial(ours, name=name) for name in nets}
    seconds = {name: [] for name in runs}
    for i in range(args.rounds + 1):                                     # the first warms up
        for name, make in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                took = seconds_of(lambda: make(folder), args.dev)
            if i:
                seconds[name].append(took)
    print(f"| {args.model}, {args.steps} steps, w_cfg {args.w_cfg:g}, batch {n} | images/s | "
          "ratio |\n|---|---|---|")
    theirs_took = statistics.median(seconds["official"])
    for name, took in seconds.items():
        middle = statistics.median(took)
        print(f"| {name} | {len(y) / middle:.4g} ({len(y) / max(took):.4g} to "
              f"{len(y) / min(took):.4g}) | {theirs_took / middle:.2f} |")
    noises = [torch.randn(n, 12, 32, 32) for _ in range(args.steps)]     # the same for both, now
    played, randn = iter(noises[1:]), torch.randn
    torch.randn = lambda *shape, **options: next(played).repeat(2, 1, 1, 1)
    with torch.no_grad():
        latents = their_latents(noises[0].to(args.dev), y[:n].to(args.dev))
    torch.randn = randn
    played = ([part.to(args.dev) for part in noise.split([4, 8], 1)] for noise in noises)
    with torch.no_grad():
        state = sample.euler_maruyama(
            sample.guided(nets["float32"], y[:n].to(args.dev), args.w_cfg), model.Flow(),
            next(played), args.steps, played.__next__)
    rms, apart = latents.square().mean().sqrt(), (torch.cat(state, 1) - latents).abs().max()
    print(f"\nEqual noise, float32: x and z, of RMS {rms:.3g}, differ by at most {apart:.1e}. "
          f"{stamp()}")


def scaling(args):
    """Print how images/s grow with the number of processes, each with as many images a step."""
    here, rates = os.path.abspath(__file__), {n: [] for n in args.processes}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.rounds):
            for n in args.processes:
                rows = f"{folder}/{i}-{n}.jsonl"
                subprocess.run(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone",
                     f"--nproc_per_node={n}", here, "speed", "--models", args.model, "--methods",
                     "merged", f"--batch_size={n * args.batch_size}", f"--steps={args.steps}",
                     "--rounds=1", "--calls=0", f"--rows={rows}"], check=True,
                    stdout=subprocess.DEVNULL, env={"OMP_NUM_THREADS": "1"} | os.environ)
                rates[n].append(rows_of(rows)[0]["images_per_s"])
    print(f"{args.model} merged, {args.batch_size} images a process and step, {args.rounds} "
          f"alternating rounds of {args.steps} steps; a CPU's processes have one thread each; "
          f"{stamp()}\n\n"
          "| processes | images/s: median (least to most) | of ideal % |\n|---|---|---|")
    alone = statistics.median(rates[args.processes[0]]) / args.processes[0]
    for n, rounds in rates.items():
        rate = statistics.median(rounds)
        print(f"| {n} | {rate:.4g} ({min(rounds):.4g} to {max(rounds):.4g}) | "
              f"{100 * rate / n / alone:.0f} |")


def kills(args):
    """Kill training at random moments and let it go on, until it has been killed n times; then
    compare losses and weights with an undisturbed run's, bit by bit."""
    chance, here = random.Random(args.seed), os.path.dirname(os.path.abspath(__file__))
    data.open_data("digits", 0)

    def start(out):
        """As torchrun starts them, each of one thread."""
        port = free_port()
        return [subprocess.Popen(
            [sys.executable, f"{here}/train.py", "--steps", str(args.steps), "--out", out,
             *"--batch_size 32 --micro_batch_size 8 --ckpt_every 3 --log_every 2".split(),
             *"--sample_steps 2".split()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                              "WORLD_SIZE": str(args.processes), "MASTER_ADDR": "127.0.0.1",
                              "MASTER_PORT": str(port)}) for rank in range(args.processes)]

    def end(ranks):
        for process in ranks:
            _, error = process.communicate()
            if process.returncode and b"is done" not in error:       # killed as it ended
                sys.exit(f"a run failed: {error.decode()[-1000:]}")

    def kill(ranks, out, seconds):
        """That long after it took up training; False if it ends before."""
        size, moment = log_size(out), math.inf
        while time.perf_counter() < moment:
            if any(process.poll() is not None for process in ranks):
                return False
            if moment == math.inf and log_size(out) > size:
                moment = time.perf_counter() + seconds
            time.sleep(0.001)
        for process in ranks:
            process.kill()
        for process in ranks:
            process.communicate()
        return True

    def log_size(out):
        return os.path.getsize(f"{out}/log.jsonl") if os.path.exists(f"{out}/log.jsonl") else 0

    def compare(out):
        one, two = (sample.load_checkpoint(f"{folder}/ckpt.pt") for folder in (whole, out))
        logs = [[{name: row[name] for name in row if not name.endswith(("per_s", "percent"))}
                 for row in rows_of(f"{folder}/log.jsonl")] for folder in (whole, out)]
        return logs[0] == logs[1] and all(torch.equal(one[part][name], two[part][name])
                                          for part in ("net", "ema") for name in one[part])

    with tempfile.TemporaryDirectory() as folder:
        whole, done, equal, runs = f"{folder}/whole", 0, 0, 0
        end(start(whole))
        seconds = args.steps * 32 / images_per_s(whole)
        while done < args.n:
            out, runs = f"{folder}/{runs}", runs + 1
            while done < args.n:
                ranks = start(out)
                if not kill(ranks, out, chance.uniform(0, 0.6) * seconds):
                    break
                done += 1
                print(f"kill {done}, of run {runs}: after step "
                      f"{rows_of(f'{out}/log.jsonl')[-1]['step']} of {args.steps}", flush=True)
            else:
                ranks = start(out)
            end(ranks)
            equal += compare(out)
    print(f"{done} kills of {args.processes} process(es), {runs} runs of {args.steps} steps: "
          f"{runs - equal} differ from the undisturbed one; {stamp()}")


def main(args):
    args.table(args)


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = p.add_subparsers(required=True, metavar="TABLE")

    def runs(q, steps, out):
        q.add_argument("--steps", type=int, default=steps,
                       help="training steps of each run (default: %(default)s)")
        q.add_argument("--n", type=int, default=N_SAMPLES,
                       help="samples a row (default: %(default)s)")
        q.add_argument("--seeds", type=int, nargs="+", default=[0],
                       help="of training, a run for each (default: 0)")
        q.add_argument("--only", nargs="+", metavar="RUN", help="just these, as the table names "
                                                                "them (default: all)")
        q.add_argument("--out", default=out, metavar="DIR",
                       help="runs and rows (default: %(default)s)")
        q.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")

    q = tables.add_parser("digits", help="methods on digits", allow_abbrev=False)
    q.set_defaults(table=digits)
    q.add_argument("--family", default="SiT", choices=list(model.FAMILIES),
                   help="default: %(default)s")
    runs(q, train.DIGITS["steps"], "runs/digits")
    q = tables.add_parser("photos", help="methods, settings and guidance on photographs",
                          allow_abbrev=False)
    q.set_defaults(table=photos)
    q.add_argument("name", choices=["methods", "unconditional", "settings", "guidance",
                                     "features"], help="which table")
    q.add_argument("--data", required=True, metavar="DIR", help="photographs that data.py prepared")
    q.add_argument("--val", required=True, metavar="DIR", help="other photographs: the reference")
    q.add_argument("--val_data", metavar="DIR", help="those of --val, prepared with the same PCA: "
                                                     "for features")
    q.add_argument("--two_levels", metavar="DIR", help="the photographs of --data, prepared with "
                                                       "two feature levels: for features")
    q.add_argument("--features", default="inception", help="as for fid.py")
    q.add_argument("--weights", metavar="FILE", help="as for fid.py")
    q.add_argument("--features_kwargs", nargs="*", default=[], metavar="KEY=VALUE",
                   help="as for fid.py")
    q.add_argument("--size", default="S", choices=list(model.SIZES),
                   help="of the networks (default: %(default)s)")
    q.add_argument("--r", type=int, default=train.PAPER["r"],
                   help="channels of z (default: %(default)s)")
    q.add_argument("--batch_size", type=int, default=256, help="default: %(default)s")
    q.add_argument("--lr", type=float, default=1e-4, help="default: %(default)s")
    q.add_argument("--sample_steps", type=int, default=50, help="default: %(default)s")
    q.add_argument("--eval_n", type=int, default=N_SAMPLES,
                   help="samples at each point of the curves (default: %(default)s)")
    runs(q, 2_500, "runs/photos")
    q = tables.add_parser("curves", help="a picture of photos' curves (needs matplotlib)",
                          allow_abbrev=False)
    q.set_defaults(table=curves)
    q.add_argument("--rows", default="runs/photos/rows.jsonl", metavar="FILE",
                   help="of photos (default: %(default)s)")
    q.add_argument("--only", nargs="+", metavar="RUN", help="just these (default: all)")
    q.add_argument("--speed", metavar="FILE", help="rows of speed, by method and model, for the "
                                                   "panel over seconds (default: each run's log)")
    q.add_argument("--label", default="Fréchet distance", help="default: %(default)s")
    q.add_argument("--out", default="curves.png", metavar="FILE", help="default: %(default)s")
    for table, text in ((sheets, "a picture of samples from equal noise"),
                        (losses, "losses over time, with z and without")):
        q = tables.add_parser(table.__name__, help=text, allow_abbrev=False)
        q.set_defaults(table=table)
        q.add_argument("--ckpt", nargs="+", required=True, metavar="FILE", help="of train.py")
        q.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
        if table is sheets:
            q.add_argument("--w_r", type=float, nargs="+", default=[1.0],
                           help="of nets with z, a version for each (default: 1)")
            q.add_argument("--n", type=int, default=10, help="samples (default: %(default)s)")
            q.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
            q.add_argument("--out", default="sheets.png", metavar="FILE",
                           help="picture (default: %(default)s)")
        else:
            q.add_argument("--data", metavar="DIR", help="other images, prepared with the same "
                                                         "PCA (default: the training data)")
            q.add_argument("--rows", default="runs/losses/rows.jsonl", metavar="FILE",
                           help="where they are kept (default: %(default)s)")
            q.add_argument("--n", type=int, default=512, help="images (default: %(default)s)")
    for table, text in ((few_steps, "solvers over their network calls, on digits"),
                        (guidance, "w_r x w_cfg, on digits")):
        q = tables.add_parser(table.__name__, help=text, allow_abbrev=False)
        q.set_defaults(table=table)
        q.add_argument("--ckpt", nargs="+" if table is few_steps else 1, default=["out/ckpt.pt"],
                       metavar="FILE", help="of train.py on digits (default: out/ckpt.pt)")
        q.add_argument("--n", type=int, default=N_SAMPLES, help="samples (default: %(default)s)")
        q.add_argument("--out", default=f"runs/{table.__name__}", metavar="DIR",
                       help="where rows.jsonl is (default: %(default)s)")
        if table is few_steps:
            q.add_argument("--calls", type=int, nargs="+", default=[10, 25, 50, 250],
                           help="network calls an image (default: 10 25 50 250)")
        else:
            q.add_argument("--w_cfg", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0],
                           help="default: 1 1.5 2 3")
            q.add_argument("--w_r", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0],
                           help="default: 1 1.25 1.5 2")
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
    q = tables.add_parser("metrics", help="fid.py beside torch-fidelity", allow_abbrev=False)
    q.set_defaults(table=metrics)
    q.add_argument("--images", required=True, metavar="DIR", help="photographs, as for data.py")
    q.add_argument("--official", metavar="DIR", help="where torch-fidelity is installed (pip "
                                                     "install --no-deps --target DIR); without it "
                                                     "ours alone")
    q.add_argument("--weights", metavar="FILE", help="Inception's (default: random ones)")
    q.add_argument("--n", type=int, default=200, help="images a side (default: %(default)s)")
    q.add_argument("--size", type=int, default=256, help="their pixels (default: %(default)s)")
    q.add_argument("--large", type=int, default=50_000,
                   help="random features for the rest (default: %(default)s)")
    q.add_argument("--rounds", type=int, default=3, help="repetitions (default: %(default)s)")
    q.add_argument("--workers", type=int, default=os.cpu_count(),
                   help="processes that read images for fid.py (default: %(default)s)")
    q = tables.add_parser("speed", help="training and sampling images/s", allow_abbrev=False)
    q.set_defaults(table=speed)
    q.add_argument("--models", nargs="+", choices=model.NAMES, metavar="MODEL",
                   default=[f"SiT-{size}/2" for size in ("S", "B", "L", "XL")],
                   help="default: SiT, patch 2, all published sizes")
    q.add_argument("--methods", nargs="+", choices=METHODS, default=model.FUSIONS,
                   help=f"ratios are to the first, REPA needs --data (default: "
                        f"{' '.join(model.FUSIONS)})")
    q.add_argument("--data", metavar="DIR", help="a prepared folder (default: random numbers of "
                                                 "ImageNet's shapes)")
    q.add_argument("--official", metavar="DIR", help="a clone of zelaki/ReDi, to compare with")
    q.add_argument("--encoder", action=argparse.BooleanOptionalAction, default=True,
                   help="theirs also with the encoder in the step (default: on)")
    q.add_argument("--batch_size", type=int, default=256, help="images a step (default: 256)")
    q.add_argument("--micro_batch_size", type=int, help="as for train.py")
    q.add_argument("--steps", type=int, default=10, help="steps a round (default: %(default)s)")
    q.add_argument("--rounds", type=int, default=5, help="repetitions (default: %(default)s)")
    q.add_argument("--calls", type=int, default=4,
                   help="network calls that sampling is measured by; 0 is off (default: "
                        "%(default)s; images/s are for 250)")
    q.add_argument("--rows", metavar="FILE", help="keep the rows in a .jsonl file; those that are "
                                                  "there are not measured again")
    q.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    q.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    q.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    q = tables.add_parser("sampling", help="samples/s beside the authors' sampler",
                          allow_abbrev=False)
    q.set_defaults(table=sampling)
    q.add_argument("--official", required=True, metavar="DIR", help="a clone of zelaki/ReDi")
    q.add_argument("--model", default="SiT-XL/2", metavar="MODEL",
                   help="of random weights (default: %(default)s)")
    q.add_argument("--vae", default=data.VAE, help="as for sample.py (default: %(default)s)")
    q.add_argument("--batch_size", type=int, default=64, help="images a batch (default: 64)")
    q.add_argument("--batches", type=int, default=2, help="a round (default: %(default)s)")
    q.add_argument("--steps", type=int, default=250, help="of the SDE (default: %(default)s)")
    q.add_argument("--w_cfg", type=float, default=2.4, help="default: %(default)s")
    q.add_argument("--rounds", type=int, default=3, help="repetitions (default: %(default)s)")
    q.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    q.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    q.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    q = tables.add_parser("scaling", help="images/s over the number of processes",
                          allow_abbrev=False)
    q.set_defaults(table=scaling)
    q.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    q.add_argument("--model", default="SiT-S/2", choices=model.NAMES, metavar="MODEL",
                   help="default: %(default)s")
    q.add_argument("--batch_size", type=int, default=8,
                   help="images a process and step (default: %(default)s)")
    q.add_argument("--steps", type=int, default=4, help="steps a round (default: %(default)s)")
    q.add_argument("--rounds", type=int, default=3, help="repetitions (default: %(default)s)")
    q = tables.add_parser("kills", help="kill training at random moments, compare how it ends",
                          allow_abbrev=False)
    q.set_defaults(table=kills)
    q.add_argument("--n", type=int, default=20, help="kills (default: %(default)s)")
    q.add_argument("--processes", type=int, default=1, help="of the run (default: %(default)s)")
    q.add_argument("--steps", type=int, default=60, help="of each run (default: %(default)s)")
    q.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    return p


if __name__ == "__main__":
    data.run_cli(main, parser().parse_args())
