"""The evidence, one section per file: run, model, pca, pretrained, data, train, sample, fid, bench.

    pytest                                   # CPU, no network
    python test_redi.py ReDi DiT TF          # records the peers' numbers anew, from two clones and
                                             # the folder where torch-fidelity is installed
"""
import argparse
import ast
import contextlib
import errno
import functools
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
import types
import zlib

os.environ["CUDA_VISIBLE_DEVICES"] = ""                                 # the claims are for the CPU

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.distributed.run
from PIL import Image

import bench
import data
import fid
import model
import pca
import pretrained
import run
import sample
import train
from run import UserError

HERE = pathlib.Path(__file__).parent
SHARED = HERE.parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"no real images in {SHARED}")
DOUBLE = torch.float64
# starts autograd's threads before an imagined GPU gets one, which no fork would survive
torch.ones(1, requires_grad=True).sum().backward()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def named_weights(name, shape):
    """Random weights that depend on their name alone, so that peers can be given the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.15 * torch.randn(shape, generator=generator)                # GELU bends


def tiny(name="SiT-T/2", fusion="merged", r=3, n_classes=10, x_channels=2, x_size=8, seed=0):
    """A small network whose weights are all random, so that every part of it matters."""
    net = model.build(name, fusion, r, n_classes, x_channels, x_size)
    for i, p in enumerate(net.parameters()):
        p.data = 0.1 * normal(*p.shape, seed=seed + i)
    return net.eval().requires_grad_(False)


def inputs(net, B=4, seed=0):
    """x_t, z_t, t, y for net."""
    size = (net.x_size, net.x_size)
    t = net.diffusion.t_from_uniform(torch.linspace(0.1, 0.9, B))
    z_t = normal(B, net.r, *size, seed=seed + 1) if net.r else None
    y = torch.arange(B) % (net.n_classes or 1)
    return normal(B, net.x_channels, *size, seed=seed), z_t, t, y


class Evil:
    """Unpickled by a reader that runs code, it would make that folder."""
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def main(module, flags):
    """A script's command line in this process: quicker by torch's import."""
    module.main(module.parser().parse_args(flags.split()))


def refused(module, flags, words, capsys=None):
    """The script ends with one line that says so: a UserError, or argparse's, with code 2."""
    with pytest.raises((UserError, SystemExit)) as error:
        main(module, flags)
    said = str(error.value)
    if isinstance(error.value, SystemExit):
        assert said == "2"
        said = capsys.readouterr().err.strip()
    assert "\n" not in said and re.search(words, said), f"{words!r} is not in: {said}"


def start(command, folder):
    """The command as a user types it in `folder`, with one thread."""
    result = subprocess.run([sys.executable, HERE / command.split()[0], *command.split()[1:]],
                            cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr


# run.py

def test_batches_are_read_ahead_in_order():
    made = []
    taken = run.prefetch(lambda step: made.append(step) or step, range(3, 9), ahead=2)
    assert [next(taken), next(taken)] == [3, 4]
    time.sleep(0.2)
    assert sorted(made) == [3, 4, 5, 6] and list(taken) == [5, 6, 7, 8]


def test_a_file_is_whole_whoever_writes_it_and_whatever_fails(tmp_path):
    """Two writers at once and a reader; then a writer that is interrupted."""
    path, contents = tmp_path / "file", [b"a" * 300_000, b"b" * 300_000]

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    writes = run.prefetch(lambda content: run.write_whole(
        path, lambda file: file.writelines([content[:9], content[9:]])), 60 * contents, ahead=2)
    seen = {path.read_bytes() for _ in writes}
    with pytest.raises(KeyboardInterrupt):
        run.write_whole(path, half)
    assert seen | {path.read_bytes()} <= set(contents) and os.listdir(tmp_path) == ["file"]


def test_a_folder_has_one_writer_and_a_mistake_leaves_none(tmp_path):
    with run.locked(tmp_path / "other"):                   # and what it writes is its own
        for name in ("half.0123abcd.part", "film.mkv.part", "other/x.0123abcd.part"):
            (tmp_path / name).touch()
        with run.locked(tmp_path):
            assert sorted(os.listdir(tmp_path)) == [".lock", "film.mkv.part", "other"]
        assert sorted(os.listdir(tmp_path / "other")) == [".lock", "x.0123abcd.part"]
    with pytest.raises(UserError, match="mkv.part cannot be a folder"), \
            run.locked(tmp_path / "film.mkv.part"):
        pass
    with run.locked(tmp_path):
        with pytest.raises(UserError, match=f"another command is writing to {tmp_path}"), \
                run.locked(tmp_path, seconds=0.1):
            pass
    with pytest.raises(UserError), run.locked(tmp_path / "new"):
        raise UserError("a mistake")
    assert not (tmp_path / "new").exists()


def test_parts_are_shared_by_processes_and_who_stops_is_missed(tmp_path, capfd):
    """The first process has made its first part before the second looks which are absent."""
    parts = run.Parts(str(tmp_path), 5)
    run.write_json(parts.paths[1], "made before")

    def work():
        run.begin(argparse.Namespace(device="cpu"))
        rank, _ = run.rank_and_count()
        time.sleep(0.3 * rank)
        for i in parts.mine():
            if (rank, i) == (1, 4):
                sys.exit(3)
            run.write_json(parts.paths[i], rank)
        parts.complete()

    assert in_ranks(work, 2) == [1, 3] and "another process stopped" in capfd.readouterr().err
    made = [json.loads(pathlib.Path(path).read_text()) for path in parts.paths[:4]]
    assert made == [0, "made before", 1, 0]
    with pytest.raises(UserError, match=f"1 of 5 parts are missing, such as {parts.paths[4]}"):
        parts.complete()


@pytest.mark.parametrize("error, blamed, said", [
    (OSError("no\n" + 300 * "t"), r"--vae x \(no t{197}\.\.\.\); try y$", "error: no t{197}"),
    (OSError(errno.ENOSPC, "full"), "", "error: .* full; .* the same command continues"),
    (UserError("--r 1"), "--r 1", "error: --r 1"),
    (torch.OutOfMemoryError("GPU 0"), "GPU 0", r"error: out of memory \(GPU 0\); .*--batch_size"),
    (RuntimeError("can't allocate memory"), "can't", "error: out of memory")])
def test_what_stops_a_command_is_one_line_and_the_machines_trouble_is_no_flags_fault(
        error, blamed, said):
    def stop(_):
        raise error

    with pytest.raises(SystemExit, match=f"^{said}") as stopped:
        run.run_cli(stop, None)
    assert "\n" not in str(stopped.value)
    with pytest.raises(UserError if "--vae" in blamed else type(error), match=f"^{blamed}"), \
            run.blamed_on("--vae x", "try y"):
        raise error


def test_a_command_says_names_that_its_terminal_lacks_and_ends_in_a_line_without_a_reader():
    program = ("import run; run.run_cli(lambda _: print(chr(9731), flush=True),"
               " run.Parser().parse_args())")
    read, closed = os.pipe()
    os.close(read)
    for output, printed, said in (
            (subprocess.PIPE, "\\u2603\n", ""), (closed, None, "error: nobody reads the output "
                                                 "any more; the same command continues\n")):
        done = subprocess.run([sys.executable, "-c", program], stdout=output, cwd=HERE, text=True,
                              env=os.environ | {"PYTHONIOENCODING": "ascii"},
                              stderr=subprocess.PIPE)
        assert (done.stdout, done.stderr) == (printed, said)
    os.close(closed)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "fid.py"])
def test_ctrl_c_while_importing_is_one_line(tmp_path, script):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, HERE / script, *["x", "y"][:2 * (script == "fid.py")]],
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
                          capture_output=True, text=True)
    said = "interrupted; the same command continues, or begins again\n"
    assert done.stderr == said and done.returncode != 0


@pytest.mark.parametrize("parser", [
    *(module.parser() for module in (train, sample, data, fid, pca)),
    *bench.parser()._subparsers._group_actions[0].choices.values()])
def test_no_flag_is_torchruns(parser):
    """torchrun takes what begins one of its own flags, even behind the script's name."""
    torchruns = torch.distributed.run.get_args_parser()
    for flag in {flag for action in parser._actions[1:] for flag in action.option_strings}:
        taken = torchruns.parse_args(["script.py", flag, "1"])
        assert [taken.training_script, *taken.training_script_args] == ["script.py", flag, "1"]


# model.py

def test_names_are_parsed_strictly():
    assert model.parse_name("DiT-XL/8") == ("DiT", "XL", 8)
    for wrong in ("SiT-XL2", "sit-XL/2", "SiT-XL/3", "SiT-H/2", "SiT-XL/2 "):
        with pytest.raises(ValueError, match="choose from: .*SiT-XL/2"):
            model.build(wrong)


@pytest.mark.parametrize("size, published", [("S", 32_883_504), ("XL", 674_890_032)])
def test_parameter_counts_are_the_published_ones_and_a_bias(size, published):
    with torch.device("meta"):
        net = model.build(f"SiT-{size}/2", fusion="merged", r=8)
    assert sum(p.numel() for p in net.parameters()) == published + model.SIZES[size][1]


@pytest.mark.parametrize("name", ["SiT-T/2", "DiT-T/2"])
@pytest.mark.parametrize("fusion", model.FUSIONS)
def test_every_block_is_the_identity_and_the_output_zero_at_initialisation(name, fusion):
    net = model.build(name, fusion, 3, 10, 2, 8)
    x_t, z_t, t, y = inputs(net)
    c, h = net.t_embedder(t) + net.y_embedder(y), normal(4, 16, 128)
    for block in net.blocks:
        assert torch.equal(block(h, c), h)
    for pred in net(x_t, z_t, t, y):
        assert pred is None or (pred == 0).all()
    assert net.x_embedder(x_t).std() > 0.1 and c.std() > 0.01            # not because all is zero


@pytest.mark.parametrize("fusion, tokens", [("none", 16), ("merged", 16), ("separate", 32)])
def test_merged_costs_no_extra_tokens_and_separate_twice(fusion, tokens):
    net, lengths = tiny(fusion=fusion), []
    net.blocks[0].register_forward_hook(lambda block, args, h: lengths.append(h.shape[1]))
    net(*inputs(net))
    assert lengths == [tokens]


@pytest.mark.parametrize("fusion", ["merged", "separate"])
def test_modalities_meet_in_both_predictions_and_tokens_are_patches_in_their_place(fusion):
    """Of x and z or of one: without attention's mixing a change stays in its patch."""
    net = tiny("SiT-T/4", fusion)
    x_t, z_t, t, y = inputs(net)
    plain, z_2 = net(x_t, z_t, t, y), z_t.clone()
    z_2[:, :, 4:, :4] += 1
    for other in (net(x_t + 1, z_t, t, y), net(x_t, z_2, t, y)):
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, other))
    for block in net.blocks:
        block.attn.proj.weight.zero_()
    for a, b, reached in zip(net(x_t, z_t, t, y), net(x_t, z_2, t, y), (fusion == "merged", True)):
        changed = (a != b).any(0).any(0)
        assert changed[4:, :4].all() == reached and changed.sum() == 16 * reached


class NoDoubles(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a float64 tensor is made, as on Apple's GPUs; numpy's tables may begin so."""
    def __torch_dispatch__(self, function, classes, args=(), options=None):
        result = function(*args, **options or {})
        if function is not torch.ops.aten.lift_fresh.default:
            for part in torch.utils._pytree.tree_leaves(result):
                assert not isinstance(part, torch.Tensor) or part.dtype != DOUBLE, function
        return result


@contextlib.contextmanager
def imagined_gpu():
    """Operations compute shapes, types and devices alone; tensors of two devices do not mix."""
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), NoDoubles():
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(1, device="cuda") + torch.ones(1)
        yield


def test_flow_target_is_the_derivative_of_the_path():
    flow = model.Flow()
    x, eps = (normal(3, 2, 4, 4, seed=seed, dtype=DOUBLE) for seed in range(2))
    t, h = torch.tensor([0.1, 0.5, 0.9], dtype=DOUBLE), 1e-5
    derivative = (flow.add_noise(x, eps, t + h) - flow.add_noise(x, eps, t - h)) / (2 * h)
    assert flow.loss(derivative, x, eps, t).max() < 1e-18
    assert flow.loss(derivative + 2, x, eps, t).allclose(torch.full((3,), 4.0, dtype=DOUBLE))
    for end, expected in ((torch.ones(3), x), (torch.zeros(3), eps)):
        assert torch.equal(flow.add_noise(x, eps, end), expected)


@pytest.mark.parametrize("diffusion, t", [(model.Flow(), 0.3), (model.DDPM(), 300)])
def test_denoised_and_score_follow_from_the_true_prediction(diffusion, t):
    x, eps = normal(2, 3, 4, 4, dtype=DOUBLE), normal(2, 3, 4, 4, seed=1, dtype=DOUBLE)
    x_t = diffusion.add_noise(x, eps, torch.full((2,), t))
    pred = x - eps if diffusion.outputs == 1 else torch.cat([eps, eps], 1)
    assert diffusion.denoised(pred, x_t, t).allclose(x, atol=1e-6)
    if diffusion.outputs == 1:
        assert diffusion.score(pred, x_t, t).allclose(-eps / (1 - t), atol=1e-6)


def test_ddpm_has_the_published_schedule():
    beta, ddpm = np.linspace(1e-4, 0.02, 1000), model.DDPM()
    assert np.allclose(ddpm.alpha ** 2, np.cumprod(1 - beta), rtol=1e-12)
    assert np.allclose(ddpm.beta, beta, rtol=1e-9)
    assert ddpm.normalised_time(torch.tensor([0, 999])).tolist() == [1, 0]
    assert ddpm.t_from_uniform(torch.tensor([0, 0.9999999])).tolist() == [0, 999]


def test_vlb_is_the_kl_of_torch_distributions_and_trains_the_variance_alone():
    """Against KL(Normal, Normal) on the textbook posterior, and exact bins of the CDF at t = 0."""
    ddpm, t = model.DDPM(), torch.tensor([0, 0, 1, 10, 500, 999])
    x, eps, noise, out = (normal(6, 2, 4, 4, seed=s, dtype=DOUBLE) for s in range(4))
    x, pred_eps = x.clamp(-1, 1), eps + 0.1 * noise                      # many in the outer bins
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=DOUBLE)
    bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1), bar[:-1]])
    tilde = beta * (1 - before) / (1 - bar)
    tilde[0] = tilde[1]
    b, a, p, v = (table[t].view(-1, 1, 1, 1) for table in (beta, bar, before, tilde))
    x_t = a.sqrt() * x + (1 - a).sqrt() * eps
    denoised = (x_t - (1 - a).sqrt() * pred_eps) / a.sqrt()
    means = [(p.sqrt() * b * clean + (1 - b).sqrt() * (1 - p) * x_t) / (1 - a)
             for clean in (x, denoised)]
    std = torch.exp(0.5 * ((out + 1) / 2 * b.log() + (1 - out) / 2 * v.log()))
    true, ours = map(torch.distributions.Normal, means, (v.sqrt(), std))
    kl = torch.distributions.kl_divergence(true, ours).mean((1, 2, 3)) / np.log(2)
    upper = ours.cdf(x + 1 / 255).masked_fill(x > 0.999, 1)
    lower = ours.cdf(x - 1 / 255).masked_fill(x < -0.999, 0)
    nll = -(upper - lower).clamp(min=1e-12).log2().mean((1, 2, 3))
    vlb = ddpm.vlb(pred_eps, out, x, eps, t)
    assert vlb[2:].allclose(kl[2:], rtol=1e-6)
    assert vlb[:2].allclose(nll[:2], rtol=2e-3)                          # the CDF's tanh form
    in_float32 = ddpm.vlb(*(part.float() for part in (pred_eps, out, x, eps)), t)
    assert in_float32.allclose(vlb.float(), rtol=1e-4)
    pred = torch.cat([pred_eps, out], 1).requires_grad_()
    ddpm.loss(pred, x, eps, t).sum().backward()
    assert pred.grad[:, :2].allclose(2 * (pred_eps - eps) / 32)          # the squared error's alone
    assert (pred.grad[:, 2:] != 0).any((1, 2, 3)).all()


# pca.py

@pytest.fixture
def features():
    """(500, 6) with correlated channels of very different mean and scale."""
    f = normal(500, 6, dtype=DOUBLE) @ normal(6, 6, seed=1, dtype=DOUBLE)
    return (f * torch.tensor([1, 10, 0.1, 1, 5, 1]) + torch.arange(6) * 20).numpy()


def test_moments_do_not_depend_on_batching(features):
    whole, parts = pca.Moments(6).update(features), pca.Moments(6)
    for part in np.split(features.astype(np.float32), [1, 7, 300]):
        other = pca.Moments(6).update(part)
        parts.merge(other.n, other.sum, other.outer)
    assert np.allclose(whole.mean, features.mean(0)) and np.allclose(whole.cov, np.cov(features.T))
    assert np.allclose(parts.cov, whole.cov, rtol=1e-4) and whole.n == parts.n == 500
    for rows, words in ((np.full((2, 6), np.nan), "NaN"), (features[:1], "2 rows")):
        with pytest.raises(ValueError, match=words):
            pca.Moments(6).update(rows).cov


def test_pca_equals_scikit_learns_also_where_a_channel_is_constant(features):
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler
    features[:, 2] = 1000 / 3                                            # sums of it are inexact
    standard, moments = StandardScaler().fit_transform(features), pca.Moments(6).update(features)
    theirs, ours = PCA(4).fit(standard), pca.fit(moments, 4)
    assert moments.cov[2, 2] != 0
    assert np.allclose(ours.components, theirs.components_, atol=1e-8)
    assert np.allclose(ours.variance, theirs.explained_variance_, rtol=1e-8)
    assert np.allclose(ours.variance / ours.total_variance, theirs.explained_variance_ratio_)
    assert np.allclose(ours.project(features), theirs.transform(standard), atol=1e-8)
    assert np.allclose(ours.project(features).std(0, ddof=1), ours.z_std)


def test_back_projection_undoes_projection(features):
    full = pca.fit(pca.Moments(6).update(features), 6, scale=1.7)
    assert np.allclose(full.back_project(full.project(features)), features)
    assert np.allclose(full.first(2).project(features), full.project(features)[:, :2])
    plain = full.first(6, 1)
    assert np.allclose(full.project(features), 1.7 * plain.project(features))
    least = plain.back_project(plain.project(features, 2))               # optimal of rank 2
    lost = ((least - features) / plain.std).var(0, ddof=1).sum()
    assert np.allclose(lost, plain.variance[2:].sum())


def test_the_file_holds_everything_without_pickle(features, tmp_path):
    fitted = pca.fit(pca.Moments(6).update(features), 3, 0.5, "some encoder", "its hash")
    fitted.save(tmp_path / "pca.npz")
    loaded = pca.load(tmp_path / "pca.npz")
    assert all(np.array_equal(getattr(loaded, name), value) for name, value in vars(fitted).items())
    assert (loaded.n, loaded.encoder, loaded.weights) == (500, "some encoder", "its hash")
    (tmp_path / "half.npz").write_bytes((tmp_path / "pca.npz").read_bytes()[:300])
    np.savez(tmp_path / "code.npz", **vars(fitted) | {"mean": np.array([print])})
    for name in ("half", "code", "none"):
        refused(pca, f"{tmp_path}/{name}.npz", f"{name}.npz is no PCA file")


def test_the_authors_file_is_converted_without_running_it(features, tmp_path):
    """A file made as theirs is, by torch.save of a fitted scikit-learn PCA, projects as theirs."""
    from sklearn.decomposition import PCA
    mean, std = features.mean(0) + 0.1, features.std(0) * 0.9            # theirs are off, too
    theirs = PCA().fit((features - mean) / std)
    stats = {"pca_model": theirs, "mean": mean.astype(np.float32), "std": std.astype(np.float32)}
    torch.save(stats, tmp_path / "official.pth")
    ours = pca.from_official(tmp_path / "official.pth")
    expected = theirs.transform((features - stats["mean"]) / stats["std"])
    assert np.allclose(ours.project(features), expected, atol=1e-5)
    assert np.allclose(ours.z_std, expected.std(0, ddof=1)) and ours.n == 500
    assert ours.encoder == pca.DINOV2 and ours.scale == 1
    for wrong, words in (({"std": 0 * std}, "its arrays do not fit"),
                         ({"mean": Evil(tmp_path / "evil")}, "mkdir, which is not admitted")):
        torch.save(stats | wrong, tmp_path / "official.pth")
        refused(pca, f"--from_official {tmp_path}/official.pth", words)
    assert not (tmp_path / "evil").exists()
    refused(pca, f"--from_official x --out {tmp_path}/official.pth", "is there already")


@needs_shared
def test_the_authors_own_file_has_the_published_spectrum(tmp_path, capsys):
    main(pca, f"--from_official {SHARED}/dino_pca_model.pth --out {tmp_path}/pca.npz --pca_scale 2")
    assert "8 of 768 components" in capsys.readouterr().out
    ours = pca.load(tmp_path / "pca.npz")
    published = [5.77, 4.90, 4.79, 4.20, 4.01, 3.77, 3.68, 3.56]         # std of components 1 to 8
    assert ours.z_std[:8] == pytest.approx(2 * np.array(published), abs=0.012)
    assert ours.n == 309_248 * 256 and ours.total_variance == pytest.approx(990, abs=1)


# pretrained.py

PEERS = {  # every 101st output value of the official class: x's channels, then z's
    ("SiT", "none"): [-3.4723, -6.2168, 3.0955, 5.5687, -6.7286, 4.9432],
    ("SiT", "merged"): [-2.4472, 4.5975, -10.9722, -1.5005, -8.3852, 1.9761, -7.4068, 0.8423,
                        9.8265, 2.8082],
    ("DiT", "none"): [-5.0821, 3.5605, 0.167, 1.5929, 0.2019, 3.2961, -0.7654, 7.2099, 1.7037,
                      3.4968, 3.9123],
    ("DiT", "merged"): [-4.7856, -1.8088, 4.4093, -1.8692, 3.1312, -2.7381, -1.6979, 0.8886,
                        0.4495, -2.0336, 4.5269, -0.7088, 2.995, 1.2172, 0.4467, -7.674, 3.1005,
                        1.5901, 9.9223],
}
PEER_CASES = dict(input_size=8, patch_size=2, hidden_size=128, depth=4, num_heads=4, num_classes=10)


def peer_inputs(family):
    t = torch.tensor([0.13, 0.87]) if family == "SiT" else torch.tensor([13, 870])
    return normal(2, 4, 8, 8), normal(2, 3, 8, 8, seed=1), t, torch.tensor([3, 10])


def thinned(pred_x, pred_z):
    parts = [pred.flatten()[::101] for pred in (pred_x, pred_z) if pred is not None]
    return torch.cat(parts).tolist()


def record_peers(redi_folder, dit_folder):
    """Print PEERS from the official classes: zelaki/ReDi 58c65a8, facebookresearch/DiT ed81ce2."""
    for family, fusion in PEERS:
        folder = redi_folder if family == "SiT" else dit_folder
        spec = importlib.util.spec_from_file_location(family, f"{folder}/models.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        channels, options = 4 if fusion == "none" else 7, {"learn_sigma": family == "DiT"}
        net = getattr(module, family)(in_channels=channels, **PEER_CASES, **options).eval()
        for name, p in net.named_parameters():
            if p.requires_grad:
                p.data = named_weights(name, p.shape)
        x_t, z_t, t, y = peer_inputs(family)
        with torch.no_grad():
            pred = net(torch.cat([x_t, z_t], 1)[:, :channels], t, y)
        pred = pred.view(2, -1, channels, 8, 8)                    # (B, predictions or variances,)
        values = thinned(pred[:, :, :4].flatten(1, 2), pred[:, :, 4:].flatten(1, 2))
        print(f"    {(family, fusion)}: {[round(value, 4) for value in values]},")


def published(family, r, learn_sigma=False):
    """A state dict as the authors publish them, size T/2, for 8 x 8 latents."""
    outputs, channels = 2 if learn_sigma or family == "DiT" else 1, 4 + r
    net = model.build(f"{family}-T/2", "none", 0, 10, 4, 8)
    shapes = {name: p.shape for name, p in net.named_parameters()} | {
        "x_embedder.proj.weight": (128, channels, 2, 2),
        "final_layer.linear.weight": (4 * outputs * channels, 128),
        "final_layer.linear.bias": (4 * outputs * channels,)}
    weights = {name: named_weights(name, shape) for name, shape in shapes.items()}
    return weights | {"pos_embed": net.pos_embed}


@pytest.mark.parametrize("family, fusion", PEERS)
def test_the_network_equals_the_authors(family, fusion):
    net = pretrained.load_published(published(family, 0 if fusion == "none" else 3), family)
    x_t, z_t, t, y = peer_inputs(family)
    with torch.no_grad():
        ours = thinned(*net(x_t, z_t if net.r else None, t, y))
    assert ours == pytest.approx(PEERS[family, fusion], rel=1e-4, abs=1e-4)


def test_what_is_no_published_net_is_said_and_runs_no_code(tmp_path):
    plain, path = published("SiT", 0), str(tmp_path / "weights.pt")
    poor = {name: value for name, value in plain.items() if name != "blocks.0.mlp.fc1.bias"}
    for weights, name, words in (
            (plain, None, "look alike"), (plain, "DiT-T/2", "take SiT"),
            (plain, "SiT-S/2", "is SiT-T/2"), (Evil(tmp_path / "ran"), None, "it holds"),
            (plain | {"blocks.4.attn.qkv.weight": torch.ones(1)}, "SiT-T/2", "5 blocks"),
            ({"ema": None, "step": 3}, None, "found ema, step, needed x_embedder.proj.weight, pos"),
            (poor | {"q": torch.ones(1)}, "SiT-T/2", "found q, needed blocks.0.mlp.fc1.bias")):
        torch.save(weights, path)
        with pytest.raises(UserError, match=words) as error:
            pretrained.load_model(path, name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "net.module._orig_mod."])
@pytest.mark.parametrize("wrap", [
    lambda ours, other: {"ema": None, "model": ours, "optimizer": {"state": {0: other}}},
    lambda ours, other: {"model": other, "ema": ours}, lambda ours, other: {"state_dict": ours},
    lambda ours, other: ours])
def test_weights_are_found_wherever_a_file_has_them(tmp_path, wrap, prefix):
    """Averaged ones before others; without prefixes and REPA's projectors."""
    bare, path = published("SiT", 3), str(tmp_path / "weights.pt")
    ours, other = ({prefix + name.replace("blocks.0.", "blocks.0._orig_mod."): value + change
                    for name, value in bare.items()} for change in (0, 1))
    ours[f"{prefix}projectors.0.0.weight"] = torch.ones(3, 3)
    torch.save(wrap(ours, other), path)
    net, _ = pretrained.load_model(path)
    assert pretrained.weights_hash(net) == pretrained.weights_hash(pretrained.load_published(bare))


@pytest.mark.parametrize("change, words", [
    ({}, ""), ({"config": {"name": "SiT-T/2", "n_classes": 10}}, ""), ({"ema": None}, "no ema"),
    ({"meta": None}, "no meta"), ({"settings": None}, "no settings"),
    ({"config": {"name": "SiT-T/2", "rope": 1, "qk": 2}}, "has rope, qk in its config"),
    ({"config": {"fusion": "merged"}}, "lacks name"),
    ({"config": {"name": "SiT-T/2"}}, "size mismatch for y_embedder")])
def test_our_checkpoints_take_defaults_if_older_and_say_what_does_not_fit(tmp_path, change, words):
    """Their weights may have prefixes, too."""
    net, path = tiny(r=8, x_channels=4, x_size=32), str(tmp_path / "snapshot.pt")
    rest = {"settings": {}, "meta": {"vae": None}, "step": 1}
    weights = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save(rest | {"config": net.config, "ema": weights} | change, path)
    if words:
        with pytest.raises(UserError, match=words):
            pretrained.load_model(path)
    else:
        loaded, metadata = pretrained.load_model(path)
        assert pretrained.weights_hash(loaded) == pretrained.weights_hash(net)
        assert metadata == rest | {"config": net.config}


@pytest.mark.parametrize("family", ["SiT", "DiT"])
def test_a_plain_published_net_goes_on_with_redi_unchanged_at_step_0(tmp_path, family):
    torch.save({"ema": published(family, 0), "opt": 1, "args": argparse.Namespace(lr=1)},
               tmp_path / "weights.pt")
    plain, _ = pretrained.load_model(str(tmp_path / "weights.pt"), f"{family}-T/2")
    net = model.build(f"{family}-T/2", "merged", 3, 10, 4, 8)
    pretrained.load_pretrained(net, plain)
    x_t, z_t, t, y = peer_inputs(family)
    pred_x, pred_z = net(x_t, z_t, t, y)
    assert torch.equal(pred_x, plain(x_t, None, t, y)[0])
    assert not pred_z.any() and not net.z_embedder.proj.weight.any()
    pred_z.sub(1).square().mean().backward()
    assert net.final_layer.linear_z.bias.grad.any()                     # and it learns


def test_a_start_takes_redis_own_weights_and_other_classes():
    redi = pretrained.load_published(published("SiT", 3))
    net = model.build("SiT-T/2", "separate", 3, 7, 4, 16)               # a larger image, too
    fresh = net.y_embedder.embedding_table.weight.clone()
    pretrained.load_pretrained(net, redi)
    table = net.y_embedder.embedding_table.weight
    assert torch.equal(table, torch.cat([fresh[:-1], redi.y_embedder.embedding_table.weight[-1:]]))
    assert torch.equal(net.blocks[3].mlp.fc2.weight, redi.blocks[3].mlp.fc2.weight)
    for name, r, x_channels, words in (
            ("SiT-T/2", 4, 4, "3 channels of z, this run 4: take"),
            ("DiT-T/2", 3, 4, "DiT cannot become SiT"), ("SiT-S/2", 3, 4, "another model than"),
            ("SiT-T/2", 3, 2, "x_embedder.proj.weight is")):
        with pytest.raises(ValueError, match=words):
            pretrained.load_pretrained(model.build(name, "merged", r, 10, x_channels, 8), redi)


def test_the_hub_is_asked_once_for_the_one_file_of_weights(monkeypatch, tmp_path):
    """Online; and without internet in its cache, laid out here as the hub's client does."""
    import huggingface_hub as hub
    import huggingface_hub.constants
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "hub_answers", lambda: True)
        patch.setattr(hub.HfApi, "list_repo_files", lambda *_: ["README.md", "sub/net.pt"])
        patch.setattr(hub, "hf_hub_download", lambda *args: args)
        assert pretrained.from_hub("zelaki/SiT-ReDi-XL-2") == ("zelaki/SiT-ReDi-XL-2", "sub/net.pt")
    tries, hub_answers = [], functools.cache(pretrained.hub_answers.__wrapped__)
    monkeypatch.setattr(pretrained, "hub_answers", hub_answers)
    monkeypatch.setattr(hub, "get_session", lambda: tries.append(1) or 1 / 0)
    repository = tmp_path / "models--someone--net"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text(snapshot.name)
    (snapshot / "net.safetensors").write_text("weights")
    assert pretrained.from_hub("someone/net") == str(snapshot / "net.safetensors")
    start = time.monotonic()                               # its client's own tries take a minute
    for ask, words in (
            (lambda: pretrained.load_model("zelaki/SiT-ReDi-XL-2"),
             "no file here.* the hub .it does not answer.*give their path"),
            (lambda: pretrained.VAE("someone/vae"), "cannot be loaded.*does not answer"),
            (lambda: pretrained.Encoder(pca.DINOV2, 32), "--encoder vit.*used so")):
        with pytest.raises(UserError, match=words):
            ask()
    assert tries == [1] and time.monotonic() - start < 30


def test_a_vae_of_half_precision_alone_is_loaded_in_float32(photos, tmp_path):
    vae = pretrained.VAE(str(photos / "vae")).vae
    whole = {name: part.half().float() for name, part in vae.state_dict().items()}
    vae.half().save_pretrained(tmp_path, variant="fp16")
    loaded = pretrained.VAE(str(tmp_path)).vae.state_dict()
    assert all(part.dtype == torch.float32 and torch.equal(part, whole[name])
               for name, part in loaded.items())


def test_a_vaes_own_scale_and_shift_are_used_once(photos, tmp_path):
    import diffusers
    assert pretrained.VAE(str(photos / "vae")).scale == 1.3              # config.json's
    diffusers.AutoencoderKL(
        block_out_channels=[8], norm_num_groups=4, latent_channels=2, scaling_factor=0.5,
        latents_mean=[1.0, 2.0], latents_std=[4.0, 5.0]).save_pretrained(tmp_path)
    vae, raw = pretrained.VAE(str(tmp_path)), 1 + normal(3, 2, 8, 8)
    assert vae.scale == [0.125, 0.1] and vae.shift == [1.0, 2.0]
    scaled = torch.stack([(raw[:, 0] - 1) * 0.125, (raw[:, 1] - 2) * 0.1], 1)
    assert pretrained.scaled(raw, vae.scale, vae.shift).allclose(scaled)
    with torch.no_grad():
        assert vae.decode(scaled).allclose(vae.vae.decode(raw).sample, atol=1e-4)
    assert data.mean_square(raw.numpy(), False, vae.scale, vae.shift) == pytest.approx(
        scaled.square().mean((0, 2, 3)).numpy(), rel=1e-4)
    with imagined_gpu():                                   # the scale goes where the latents are
        vae.vae.to("cuda")
        decoded = vae.decode(pretrained.scaled(raw.to("cuda"), vae.scale, vae.shift))
        assert decoded.device.type == "cuda" and decoded.shape == (3, 3, 8, 8)


def dino(photos):
    """The encoder of prepare() for images of 32 pixels."""
    return pretrained.Encoder(ENCODER.split()[0], 32, None, str(photos / "encoder.safetensors"),
                              {"depth": 2, "embed_dim": 48, "num_heads": 3})


def test_features_are_timms_patch_tokens_on_its_own_normalisation(photos):
    import timm
    encoder, images = dino(photos), network_inputs(photos)
    assert encoder.input_size == 28 and encoder.grid == [2, 2]           # 14 pixels for 16
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (
        timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD))
    inputs = torch.nn.functional.interpolate(((images + 1) / 2 - mean) / std, 28, mode="bicubic")
    net = timm.create_model(ENCODER.split()[0], depth=2, embed_dim=48, num_heads=3, img_size=28,
                            pretrained=True, num_classes=0, pretrained_cfg_overlay={
                                "file": str(photos / "encoder.safetensors")}).eval()
    with torch.no_grad():
        tokens = net.forward_features(inputs)[:, 5:]              # 1 class token, 4 registers
    theirs = tokens.transpose(1, 2).reshape(11, 48, 2, 2)
    assert encoder.features(images).allclose(theirs, atol=1e-4) and theirs.std() > 0.1


def test_vaes_and_encoders_compute_in_full_precision_and_leave_the_switches(photos):
    def switches():
        return cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic

    cudnn, seen, images = torch.backends.cudnn, [], normal(1, 3, 32, 32)
    vae, encoder = pretrained.VAE(str(photos / "vae")), dino(photos)
    for net in (vae.vae.encoder, encoder.net.patch_embed):
        net.register_forward_pre_hook(lambda *_: seen.append(switches()))
    with cudnn.flags(enabled=False, allow_tf32=True, deterministic=False):
        vae.encode(images)
        encoder.features(images)
        assert switches() == (False, True, False) and seen == [(True, False, True)] * 2


def test_weights_that_do_not_fit_are_refused(photos, tmp_path):
    """Neither timm without a head nor diffusers would say so: the rest would stay random."""
    import safetensors.torch
    import timm
    weights = timm.create_model("mobilenetv2_050").state_dict()
    del weights["blocks.0.0.conv_dw.weight"]
    torch.save(weights, tmp_path / "encoder.pth")
    with pytest.raises(UserError, match="^--encoder mob.*blocks.0.0.conv_dw.weight.*names$"):
        pretrained.Encoder("mobilenetv2_050", 32, 3, str(tmp_path / "encoder.pth"))
    path = shutil.copytree(photos / "vae", tmp_path / "vae") / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["decoder.conv_out.weight"]
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="lack or do not fit decoder.conv_out.weight"):
        pretrained.VAE(str(tmp_path / "vae"))


# data.py

ENCODER = "vit_base_patch14_reg4_dinov2 --encoder_kwargs depth=2 embed_dim=48 num_heads=3"
BAD = ["a/cut.jpg", "b/empty.png", "b/notes.txt", "b/zero.png"]


def in_ranks(work, n_ranks=1):
    """work() in forked processes that find each other as torchrun's do: their exit codes. If one is
    killed so are the others; if one ends with an error they have ten seconds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        _, port = free.getsockname()
    processes = [forked(work, RANK=rank, WORLD_SIZE=n_ranks, LOCAL_WORLD_SIZE=n_ranks,
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(n_ranks)]
    deadline = float("inf")
    while any(process.is_alive() for process in processes):
        codes = [process.exitcode or 0 for process in processes]
        if any(codes):                                                   # a signal's is negative
            deadline = min(deadline, time.monotonic() + 10 * (min(codes) == 0))
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.01)
    return [process.exitcode for process in processes]


def forked(work, **environment):
    """A process, started, that does work() with one thread."""
    def child():
        torch.set_num_threads(1)                                         # OpenMP survives no fork
        data.tqdm.set_lock(threading.RLock())              # else shared: one who is killed keeps it
        os.environ |= {name: str(value) for name, value in environment.items()}
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def torchrun(command):
    """torchrun with two processes, quicker by its own import of torch: its exit code."""
    script, *flags = command.split()
    arguments = ["--standalone", "--nproc_per_node=2", str(HERE / script), *flags]
    process = forked(lambda: torch.distributed.run.main(arguments), OMP_NUM_THREADS=1)
    process.join()
    return process.exitcode


def photo(width, height, seed):
    """Smooth random pixels uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with photos/ of three classes in many formats (and bad/, the same with BAD files
    among them), vae/ and encoder.safetensors: small networks with random weights, in the formats
    that the hubs serve."""
    import diffusers
    import safetensors.torch
    import timm
    folder = tmp_path_factory.mktemp("photos")
    for i, mode in enumerate(["RGB"] * 6 + ["L", "P", "RGBA", "1", "CMYK"]):
        path = folder / "photos" / "abc"[i % 3] / f"{i:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 6                                         # orientation
        image = Image.fromarray(photo(40 + 9 * i, 100 - 4 * i, i)).convert(mode)
        image.save(f"{path}.{'JPEG' if i < 6 else 'png' if i < 10 else 'tiff'}", exif=exif)
    shutil.copytree(folder / "photos", folder / "bad")
    cut = (folder / "photos/a/00.JPEG").read_bytes()[:900]
    for name, content in zip((*BAD, ".DS_Store"), (cut, b"", b"no image", b"", b"hidden")):
        (folder / "bad" / name).write_bytes(content)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 8], norm_num_groups=4, latent_channels=4, scaling_factor=1.3)
    vae.save_pretrained(folder / "vae")
    dino = timm.create_model(ENCODER.split()[0], depth=2, embed_dim=48, num_heads=3)
    for p in dino.parameters():
        p.data += 0.05 * normal(*p.shape, seed=p.numel())
    safetensors.torch.save_file(dino.state_dict(), folder / "encoder.safetensors")
    return folder


def preparing(photos, out, *more):
    return (f"--images {photos / 'photos'} --out {out} --size 32 --vae {photos / 'vae'} --encoder "
            f"{ENCODER} --encoder_weights {photos / 'encoder.safetensors'} --r_keep 6 "
            f"--batch_size 4 --workers 2 --vae_scale 1.5 {' '.join(more)}")


def prepare(photos, out, *more):
    """python data.py --images ... in this process, which has torch, timm and diffusers by now."""
    main(data, preparing(photos, out, *more))
    return data.LatentDataset(str(out))


@pytest.fixture(scope="session")
def prepared(photos):
    return prepare(photos, photos / "prepared")


def content(folder):
    """What a prepared folder keeps: bytes by name."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in pathlib.Path(folder).rglob("*") if path.is_file() and path.name != ".lock"}


def image_files(photos):
    """Every photograph, in the order of the prepared rows."""
    return sorted((photos / "photos").rglob("*.*"))


def network_inputs(photos):
    """Every photograph as the networks see it, in the order of the prepared rows."""
    images = np.stack([data.load_image(path, 32) for path in image_files(photos)])
    return data.from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2))


def test_imports_go_one_way():
    """And model.py knows neither files nor the hub, and no file what one system alone has."""
    order = ["run model", "pca", "pretrained", "data", "sample fid", "train", "bench"]
    rank = {name: i for i, names in enumerate(order) for name in names.split()}
    for name in rank:
        nodes = list(ast.walk(ast.parse((HERE / f"{name}.py").read_text())))
        imports = {node.module for node in nodes if isinstance(node, ast.ImportFrom)} | {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert all(rank[other] < rank[name] for other in imports & set(rank)), (name, imports)
        used = imports | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not used & {"fcntl", "O_DSYNC", "posix_fallocate"}, name
        assert name != "model" or imports == {"math", "numpy", "torch", "torch.nn.functional",
                                              "torch.utils.checkpoint"}


def test_held_out_digits_are_in_no_prepared_row(digits):
    x, y, held_out = data.digits()
    assert held_out.sum() == 179 and digits.n == 1797 - 179 and -1 == x.min() and x.max() == 1
    stored = digits.read(torch.arange(digits.n))
    rows_x, _, rows_y, _ = digits.unpack(stored)
    assert stored[1].float().square().mean() == pytest.approx(1, abs=1e-3)    # z like x
    assert torch.equal(rows_x, x[~held_out]) and torch.equal(rows_y, y[~held_out])
    encoder = data.DigitEncoder.load(f"{digits.folder}/encoder.safetensors")
    with torch.no_grad():                                               # it reads what it never saw
        assert (encoder(x[held_out]).argmax(1) == y[held_out]).float().mean() > 0.95


def test_z_is_its_first_channels_resized_bilinearly_without_aligned_corners(digits):
    rows = torch.tensor([5, 900])
    stored = digits.read(rows)
    z, grid = digits.unpack(stored)[1], stored[1].float()
    assert np.array_equal(grid, digits.open_shard(0)["z"][rows, :4]) and z.shape == (2, 4, 8, 8)
    # output pixel i sits at (i + 0.5) / 2 - 0.5 of the 4 x 4 grid: weights 3/4 and 1/4
    row = 0.75 * grid[:, :, 1] + 0.25 * grid[:, :, 2]
    assert z[:, :, 3, 3].allclose(0.75 * row[:, :, 1] + 0.25 * row[:, :, 2], atol=1e-5)
    assert z[:, :, 0, 0].allclose(grid[:, :, 0, 0], atol=1e-5)


def test_every_epoch_visits_every_row_once_in_another_order():
    n, B = 10, 4
    stream = torch.cat([data.rows_of_step(0, step, B, n) for step in range(5)])
    first, second = stream[:n], stream[n:]
    assert first.sort()[0].tolist() == second.sort()[0].tolist() == list(range(n))
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([data.rows_of_step(0, step, 5, n) for step in range(4)]), stream)
    assert not torch.equal(data.rows_of_step(1, 0, n, n), first)


def test_uint8_rounds_as_adm_does():
    x = torch.linspace(-1.2, 1.2, 1000)
    adm = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)                # guided-diffusion
    dit = torch.clamp(127.5 * x + 128.0, 0, 255).to(torch.uint8)         # DiT, which we follow
    assert torch.equal(data.to_uint8(x), dit) and (dit.int() - adm.int()).abs().max() <= 1
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.from_uint8(every)), every)


def test_images_are_upright_rgb_and_cropped_as_adm_does(photos, tmp_path):
    def load(image):
        Image.fromarray(image).save(tmp_path / "image.png")
        return data.load_image(tmp_path / "image.png", 32)

    path = photos / "photos/c/02.JPEG"                                   # said to be upside down
    assert np.array_equal(data.load_image(path, 32), load(np.array(Image.open(path))[::-1, ::-1]))
    # halved by 2 x 2 means while the short side is 2 * size or more, then bicubic, then the middle
    square = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    means = square.reshape(32, 4, 32, 4, 3).mean((1, 3))                 # Pillow rounds four times
    assert np.abs(load(square) - means).max() <= 2
    wide = photo(90, 32, 1)                                              # nothing to resize
    assert np.array_equal(load(wide), wide[:, 29:61])


def test_values_of_other_ranges_are_scaled_or_refused_by_name(tmp_path):
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    for name in ("16.png", "16.tiff"):
        Image.fromarray(deep).save(tmp_path / name)
    (tmp_path / "16.pgm").write_bytes(b"P5 32 32 65535\n" + deep.astype(">u2").tobytes())
    for path in tmp_path.iterdir():
        assert np.array_equal(data.load_image(path)[..., 1], deep >> 8), path
    Image.frombytes("L", (48, 32), b"\xab\xca\xbc" * 512).save(tmp_path / "12.tiff")
    tiff = bytearray((tmp_path / "12.tiff").read_bytes())
    tiff[18], tiff[42] = 32, 12                            # its width, and bits of each value 0xabc
    (tmp_path / "12.tiff").write_bytes(tiff)
    assert np.array_equal(data.load_image(tmp_path / "12.tiff"), np.full((32, 32, 3), 0xab))
    for dtype, mode in ((np.int32, "I"), (np.float32, "F")):
        Image.fromarray(deep.astype(dtype)).save(tmp_path / "wide.tiff")
        with pytest.raises(ValueError, match=f"TIFF of mode {mode} does not say"):
            data.load_image(tmp_path / "wide.tiff")


def test_damaged_metadata_spoil_no_image(tmp_path):
    exif, rng, pixels = Image.Exif(), np.random.default_rng(0), photo(40, 30, 0)
    exif.update({0x0112: 6, 0x010f: "maker", 0x011a: 72.0, 0x8769: {0x9003: "2020"}})
    for kind in ("png", "jpeg"):
        shapes = []
        for _ in range(200):
            damaged = bytearray(exif.tobytes())
            damaged[rng.integers(6, len(damaged))] = rng.integers(256)
            Image.fromarray(pixels).save(tmp_path / f"0.{kind}", exif=bytes(damaged))
            shapes.append(data.load_image(tmp_path / f"0.{kind}").shape)
        assert set(shapes) == {(40, 30, 3), (30, 40, 3)} and shapes.count((40, 30, 3)) > 150


def test_a_tar_and_a_tar_of_tars_are_read_as_the_folder_is(photos, tmp_path):
    files, y, classes = data.list_images(str(photos / "photos"))
    with tarfile.open(tmp_path / "flat.tar", "w") as flat, \
            tarfile.open(tmp_path / "nested.tar", "w") as nested, \
            tarfile.open(tmp_path / "small.tar.gz", "w:gz") as packed:
        for archive in (flat, packed):
            archive.add(photos / "photos", "data/train")
        flat.add(photos / "bad/.DS_Store", "data/train/a/._00.JPEG")
        for name in "bca":                                               # ImageNet's: one a class
            with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                inner.add(photos / "photos" / name, ".")
            nested.add(tmp_path / f"{name}.tar", f"./{name}.tar")
    for path in (tmp_path / "flat.tar", tmp_path / "nested.tar"):
        names, of_tar, named, read = data.open_images(str(path))
        assert (names.tolist(), of_tar.tolist(), named) == (files.tolist(), y.tolist(), classes)
        for name, file in zip(names, image_files(photos), strict=True):
            assert read(name).getvalue() == file.read_bytes()
    (tmp_path / "cut.tar").write_bytes((tmp_path / "flat.tar").read_bytes()[:5000])
    with tarfile.open(tmp_path / "roots.tar", "w") as archive:
        for name in "/a", "a":
            archive.addfile(tarfile.TarInfo(name))
    for name in ("cut.tar", "small.tar.gz", "roots.tar"):
        refused(data, preparing(photos, tmp_path / "no", f"--images {tmp_path / name}"),
                f"{name} is no folder")


def test_a_hub_data_set_is_read_as_the_folder_is(photos, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="no dependency: pip install datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names, y, classes, read = data.open_images(f"hfds/{photos / 'photos'}")
    assert classes == ["a", "b", "c"] and sorted(y) == [0] * 4 + [1] * 4 + [2] * 3
    first = data.load_image(photos / "photos/a/00.JPEG")
    assert np.array_equal(data.load_image(read(names[0])), first)
    refused(data, preparing(photos, tmp_path / "out", f"--images hfds/{photos / 'none'}"),
            "none .*; hfds/NAME is a data set")


def test_a_hub_data_set_needs_its_package(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(data, preparing(photos, tmp_path / "out", "--images hfds/cifar10"),
            "needs a package: pip install datasets")


@pytest.mark.parametrize("grey", ["", "--grey"])
def test_without_a_vae_x_are_the_pixels(photos, tmp_path, grey):
    given = preparing(photos, tmp_path / "out", "--vae none --size 20", grey)
    main(data, given.replace("--vae_scale 1.5", ""))
    ours = data.LatentDataset(str(tmp_path / "out"))
    x, z, _, _ = ours.unpack(ours.read(range(11)))
    images = np.stack([data.load_image(path, 20, bool(grey)) for path in image_files(photos)])
    assert np.array_equal(data.decode(x, ours.meta), images) and z.shape == (11, 6, 20, 20)
    assert x.shape == (11, 1 if grey else 3, 20, 20)
    assert (images[..., :1] == images).all() == bool(grey)
    assert np.array_equal(data.encode_images(image_files(photos), ours)[0], images)


def test_z_of_new_images_is_made_as_the_stored_ones_were(photos, prepared, digits, tmp_path):
    """Of photographs, and of digits after their folder has moved."""
    four, files = data.LatentDataset(prepared.folder, 4), image_files(photos)
    images, z = data.encode_images(files, four)
    assert np.array_equal(images[1], data.load_image(files[1], 32)) and z.dtype == torch.float32
    assert z.allclose(four.unpack(four.read(range(11)))[1], atol=0.02) and z.std() > 1
    moved = shutil.copytree(digits.folder, tmp_path / "moved")
    ours = data.LatentDataset(str(moved), 3)
    x, stored, _, _ = ours.unpack(ours.read([5, 900]))
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, image in zip(paths, data.to_images(x)):
        Image.fromarray(image).save(path)
    images, z = data.encode_images(paths, ours)
    assert np.array_equal(images, data.to_images(x)) and z.allclose(stored, atol=0.1)
    ours.meta["encoders"][0]["weights"] = "other"
    with pytest.raises(UserError, match="weights of the digits' convnet are not those that made"):
        data.encode_images(paths, ours)


def test_digits_may_lie_anywhere_and_are_known_by_what_they_are(
        photos, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "train_digit_encoder", lambda x, y: data.DigitEncoder().eval())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "write_shard", lambda *args: signal.raise_signal(signal.SIGINT))
        main(data, f"--out {tmp_path}/here")
    for _ in range(2):
        main(data, f"--out {tmp_path}/here")
    assert "here: 1,618 images of 10 classes" in capsys.readouterr().out
    assert data.open_data(f"{tmp_path}/here", 4).meta["name"] == "digits"
    main(data, f"--pca_scale 2 --out {tmp_path}/scaled")
    main(data, f"--out {tmp_path}/scaled")                               # taken as they are
    refused(data, f"--pca_scale 3 --out {tmp_path}/scaled", "another --pca_scale: 2.0, now 3.0")
    refused(data, f"--size 64 --out {tmp_path}/here", "--size is for --images")
    assert prepared.meta["name"] == "images of photos"                   # so photos/digits is none
    refused(data, f"--out {photos}/prepared", "another --images: 11 files .*, now scikit-learn's")


def test_classes_are_sorted_folders_and_links_in_a_circle_are_followed_once(photos, tmp_path):
    files, y, classes = data.list_images(str(photos / "photos"))
    assert classes == ["a", "b", "c"] and y.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert [os.fsdecode(name) for name in files] == [
        str(path.relative_to(photos / "photos")) for path in image_files(photos)]
    files, y, classes = data.list_images(str(photos / "photos/a"))
    assert classes == [] and y.tolist() == [0] * 4
    mixed = shutil.copytree(photos / "photos", tmp_path / "mixed")
    (mixed / "README.txt").write_text("not an image, not a class")
    for link, target in (("a/self", mixed / "a"), ("d", photos / "photos/b"), ("a/1.png", "none")):
        (mixed / link).symlink_to(target)
    files, _, classes = data.list_images(str(mixed))
    assert len(files) == 11 + 4 + 1 and classes == ["a", "b", "c", "d"]
    shutil.copy(photos / "photos/a/00.JPEG", mixed)
    with pytest.raises(UserError, match="00.JPEG.*move them"):
        data.list_images(str(mixed))


def test_x_is_what_diffusers_pipeline_makes(photos, prepared):
    """Stored are mean and std of the posterior of VaeImageProcessor's input, unscaled; batches
    draw from it and scale once."""
    import diffusers
    vae = diffusers.AutoencoderKL.from_pretrained(photos / "vae", low_cpu_mem_usage=False)
    image = Image.fromarray(data.load_image(photos / "photos/b/01.JPEG", 32))
    processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=4)
    stored, eps = prepared.read([4]), normal(1, 4, 8, 8)                 # b is rows 4 to 7
    mean, std = stored[0].float().chunk(2, 1)
    x, _, y, _ = prepared.unpack(stored, eps)
    with torch.no_grad():
        posterior = vae.encode(processor.preprocess(image)).latent_dist
        decoded = vae.decode(x / 1.5).sample
    assert mean.allclose(posterior.mean, atol=2e-3) and std.allclose(posterior.std, atol=2e-3)
    assert x.allclose(1.5 * (mean + std * eps), atol=1e-5) and y.item() == 1
    assert prepared.unpack(stored)[0].allclose(1.5 * mean, atol=1e-5)
    theirs = processor.postprocess(decoded, output_type="np") * 255
    assert np.abs(data.decode(x, prepared.meta) - theirs).max() <= 1.01
    with pytest.raises(UserError, match="not the one that made the data.*--vae"):
        pretrained.vae_of(prepared.meta | {"vae_weights": "another"})


def test_z_is_the_pca_of_the_features_of_all_images(photos, prepared):
    """The arrays, made again the long way: every feature at once, scikit-learn's PCA."""
    from sklearn.decomposition import PCA
    f = dino(photos).features(network_inputs(photos)).permute(0, 2, 3, 1).double().numpy()
    rows = ((f - f.mean((0, 1, 2))) / f.std((0, 1, 2))).reshape(-1, 48)
    theirs = PCA(6).fit(rows).transform(rows).reshape(11, 2, 2, 6)
    ours = prepared.read(range(11))[1].double().numpy().transpose(0, 2, 3, 1)
    sign = np.sign((ours * theirs).sum((0, 1, 2)))
    assert np.abs(ours - sign * theirs).max() < 0.02 and ours.std() > 1
    assert prepared.meta["z_rms"] == pytest.approx(np.sqrt((theirs ** 2).mean((0, 1, 2))), rel=1e-2)


def test_a_prepared_folder_names_its_images_shows_them_and_has_its_shards_hash(photos, prepared):
    out, first_image = photos / "prepared", data.load_image(image_files(photos)[0], 32)
    assert set(content(out)) == {"shards/00000.npy", "shards/00000.json", "meta.json", "pca.npz",
                                 "files.txt", "skipped.txt", "sheet.png"}
    names = (out / "files.txt").read_text().splitlines()
    assert [photos / "photos" / name for name in names] == image_files(photos)
    digest = hashlib.sha256(np.load(out / "shards/00000.npy").tobytes()).hexdigest()
    assert prepared.meta["sha256"] == hashlib.sha256(digest.encode()).hexdigest()
    sheet = np.asarray(Image.open(out / "sheet.png"))       # image, decoded, z 1-3, z 4-6
    first = sheet[2:130, sheet.shape[1] - 1300:][:, :128].reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert sheet.shape[0] == 4 * 130 + 2 and np.abs(first - first_image).mean() < 3


@pytest.mark.parametrize("n_ranks, calls", [(1, [-1, 4, -3, 4, 5, -8]), (2, [4, -3, 4, -5])])
def test_killed_at_any_moment_the_folder_ends_with_the_same_bytes(
        photos, tmp_path, monkeypatch, n_ranks, calls):
    """Killed after so many calls of write_whole, or (negative) within that one."""
    monkeypatch.setattr(data, "SHARD", 2)

    def work():
        die = torn_write if call < 0 else kill
        ends_at(monkeypatch, run, "write_whole", abs(call) - (call < 0), die)
        prepare(photos, tmp_path / "out")

    for call in calls:
        assert min(in_ranks(work, n_ranks)) == -signal.SIGKILL
        with pytest.raises(UserError, match="not finished|no prepared data"):
            data.LatentDataset(str(tmp_path / "out"))
    call = 1000
    assert in_ranks(work, n_ranks) == [0] * n_ranks
    whole = content(prepare(photos, tmp_path / "whole").folder)
    assert content(tmp_path / "out") == whole
    assert len(whole) == 2 * 6 + 5 and "shards/00005.npy" in whole       # no moments are left


def test_two_commands_at_once_leave_one_whole_folder(photos, prepared, tmp_path):
    processes = [forked(lambda: prepare(photos, tmp_path / "out")) for _ in range(2)]
    for process in processes:
        process.join()
    codes = {process.exitcode for process in processes}
    assert 0 in codes and codes <= {0, 1}                                # 1: refused
    assert content(tmp_path / "out") == content(photos / "prepared")


def test_bad_files_are_left_out_and_named_but_not_for_the_disks_trouble(
        photos, prepared, tmp_path, monkeypatch):
    """Of two to a shard one or both are bad."""
    monkeypatch.setattr(data, "SHARD", 2)
    given = preparing(photos, tmp_path / "out", f"--images {photos / 'bad'}")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(data, "load_image", broken_disk)
        main(data, f"{given} --max_bad 1")
    refused(data, f"{given} --max_bad 0.26", "4 of 15 files .*--max_bad 0.26 .*cut.jpg: .*truncat")
    main(data, f"{given} --max_bad 0.27")
    ours = data.LatentDataset(str(tmp_path / "out"))
    assert ours.meta["shards"] == [2, 2, 1, 2, 1, 0, 2, 1] and ours.n == 11
    named = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in named] == BAD
    assert (tmp_path / "out/files.txt").read_text() == (photos / "prepared/files.txt").read_text()
    for part, good in zip(ours.read(range(11))[:3], prepared.read(range(11))):
        assert (part.double() - good.double()).abs().max() < 0.05


def test_other_settings_overwrite_nothing_and_latents_have_rms_1(photos, prepared, tmp_path):
    import safetensors.torch
    out, before = photos / "prepared", content(photos / "prepared")
    for flags, words in (("--size 64", "another --size: 32, now 64"), ("--bf16", "other --bf16"),
                         (f"--images {photos / 'bad'}", "another --images: 11 files")):
        refused(data, preparing(photos, out, flags), f"{words}.*choose another --out")
    with run.locked(out):
        refused(data, preparing(photos, out), "another command is writing")
    prepare(photos, out)                                                 # complete: nothing to do
    assert content(out) == before
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(data, preparing(photos, tmp_path), "not empty and holds no prepared data")
    assert content(tmp_path) == {"thesis.tex": b"years of work"}
    better = 1.5 / np.sqrt(np.square(prepared.meta["x_rms"]).mean())     # a scale of RMS 1
    refused(data, preparing(photos, tmp_path / "out", "--vae_scale 9"),
            f"have RMS .*: take --vae_scale {better:.4g}, and another --out")
    broken = safetensors.torch.load_file(photos / "encoder.safetensors")
    torch.save(broken | {"norm.weight": broken["norm.weight"] * np.nan}, tmp_path / "nan.pth")
    refused(data, preparing(photos, tmp_path / "nan", f"--encoder_weights {tmp_path}/nan.pth"),
            "--encoder vit_base.*NaN.*damaged")


@pytest.mark.parametrize("flags, words", [
    ("--images nowhere", "nowhere is no folder"), ("--size 36", "multiple of 8"),
    ("--encoder_layer 7", "cannot be used so"), ("--r_keep 49", "48 channels"),
    ("--encoder_kwargs depth=2", "got 2"), ("--encoder_kwargs depth", "KEY=VALUE"),
    ("--r_kee 4", "--r_kee 4; .* --help has the list"), ("--grey", "--grey is for --vae none"),
    ("--vae none", "--grey is for --vae none, and --vae_scale for another"),
    ("--out {photos}/photos/out", "inside --images"), ("--pca {photos}/other.npz", "PCA of some")])
def test_mistakes_in_preparing_are_one_line(photos, tmp_path, capsys, flags, words):
    pca.fit(pca.Moments(48).update(normal(99, 48).numpy()), 6, 1, "some other").save(
        photos / "other.npz")
    refused(data, preparing(photos, tmp_path / "out", flags.format(photos=photos)), words, capsys)
    assert not (tmp_path / "out").exists()


def test_a_fitted_pca_is_used_as_it_is(photos, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(data.Preparation, "fit_pca", None)               # must not be called
    given = f"--pca {photos / 'prepared/pca.npz'} --r_keep 4"
    z = prepare(photos, tmp_path / "out", given).read(range(11))[1]
    assert torch.equal(z, prepared.read(range(11))[1][:, :4])
    refused(data, preparing(photos, tmp_path / "out", given, "--pca_scale 2"), "other --pca_scale")
    twice = prepare(photos, tmp_path / "twice", given, "--pca_scale 2")
    assert (twice.read(range(11))[1].float() - 2 * z.float()).abs().max() < 0.02
    assert twice.meta["z_std"][0] == 2 * prepared.meta["z_std"][0]


def test_several_encoders_of_other_grids_share_z_and_the_firsts_features_are_kept(
        photos, prepared, tmp_path):
    import timm
    weights, images = str(tmp_path / "mobilenet.pth"), network_inputs(photos)
    net = timm.create_model("mobilenetv2_050")
    config = timm.data.resolve_model_data_config(net)
    normalise = timm.data.create_transform(**config).transforms[-1]
    torch.save(net.state_dict(), weights)
    ours = prepare(photos, tmp_path / "out", f"--encoder {ENCODER.split()[0]} mobilenetv2_050 "
                   f"--encoder_weights {photos / 'encoder.safetensors'} {weights} "
                   "--encoder_layer last 2 --encoder_kwargs --keep_features")
    z = ours.read(range(11))[1]
    assert z.shape == (11, 12, 2, 2) and torch.equal(z[:, :6], prepared.read(range(11))[1])
    with torch.no_grad():                                  # on timm's own normalisation
        f = net.eval().forward_intermediates(normalise((images + 1) / 2), indices=[2],
                                             intermediates_only=True)[0]
    second = pca.load(tmp_path / "out/pca_2.npz").project(f.permute(0, 2, 3, 1).numpy())
    means = second.reshape(11, 2, 2, 2, 2, 6).mean((2, 4)).transpose(0, 3, 1, 2)    # halved
    assert np.abs(z[:, 6:].numpy() - means).max() < 0.02 and means.std() > 0.5
    four = data.LatentDataset(str(tmp_path / "out"), 4, features=True)
    assert four.meta["z_std"] == [ours.meta["z_std"][c] for c in (0, 1, 6, 7)]
    _, z_4, _, f = four.read(range(11))
    assert torch.equal(z_4, z[:, [0, 1, 6, 7]]) and f.std() > 0.1
    assert f.float().allclose(dino(photos).features(images), atol=0.01)


@pytest.mark.parametrize("name, spoil, options, words", [
    ("shards/00000.npy", lambda b: b[:len(b) // 2], {}, "00000.npy is damaged.*prepare it again"),
    ("meta.json", lambda b: b[:50], {}, "meta.json is damaged.*prepare it again"),
    ("meta.json", lambda b: b"[]", {}, "has format None.*prepare it again"),
    ("meta.json", lambda b: b.replace(b'"format": 3', b'"format": 2'), {}, "format 2.*remove it"),
    ("meta.json", lambda b: b.replace(b"11\n ]", b"12\n ]"), {}, "11 records, not 12"),
    ("meta.json", bytes, {"r": 7}, "--z_channels 7 .* the 6 that"),
    ("meta.json", bytes, {"features": True}, "data.py --keep_features")])
def test_damaged_older_and_poor_folders_are_refused_in_one_line(
        photos, prepared, tmp_path, name, spoil, options, words):
    shutil.copytree(photos / "prepared", tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(spoil((tmp_path / name).read_bytes()))
    with pytest.raises(UserError, match=words) as error:
        data.LatentDataset(str(tmp_path), **options).read([0])
    assert "\n" not in str(error.value)


def test_opening_opens_no_shard_and_reading_those_it_needs_one_at_a_time(prepared, monkeypatch):
    """Python 3.11 fails where two threads parse .npy headers (AST recursion depth mismatch)."""
    opened, alone, records = [], threading.Lock(), prepared.open_shard(0)

    def load(path, mmap_mode):
        assert alone.acquire(blocking=False) and mmap_mode == "r"
        time.sleep(0.01)
        alone.release()
        opened.append(path[-9:])
        return records

    monkeypatch.setattr(np, "load", load)
    dataset = data.LatentDataset(prepared.folder, meta=prepared.meta | {
        "n": 11_000, "shards": [11] * 1000})
    assert not opened
    x, *_ = dataset.read([0, 5500, 10_999])
    assert len(x) == 3 and opened == ["00000.npy", "00500.npy", "00999.npy"]
    assert len(list(run.prefetch(dataset.open_shard, range(8)))) == 8


# train.py

FLAGS = "--steps 8 --ckpt_every 4 --log_every 2 --sample_steps 4 --batch_size 16"
torch.set_num_threads(1)                                  # sums of other threads are other bits


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A folder where `python train.py` has just run, briefly: prepared/digits and out are there.
    From here on their encoder learns for 4 epochs and few digits are judged, for speed."""
    folder = tmp_path_factory.mktemp("work")
    train.finish.__defaults__ = 25,
    data.train_digit_encoder.__defaults__ = 4, 64, 0
    with contextlib.chdir(folder):
        data.prepare_digits()
        main(train, FLAGS)
    return folder


@pytest.fixture
def there(workdir, monkeypatch):
    """The same, as the working directory."""
    monkeypatch.chdir(workdir)
    return workdir


@pytest.fixture
def out(there, tmp_path):
    """A copy of its folder out."""
    return shutil.copytree("out", tmp_path / "out")


@pytest.fixture
def digits(workdir):
    return data.LatentDataset(str(workdir / "prepared/digits"), 4)


def watch(patch, owner, name, see):
    """From here on, see() is called before that function, with its arguments."""
    function = getattr(owner, name)

    def seen(*args, **options):
        see(*args, **options)
        return function(*args, **options)

    patch.setattr(owner, name, seen)


def joint_loss(net, d=0, **settings):
    """train.JointLoss of size T."""
    torch.manual_seed(0)
    return train.JointLoss(net, {"model": "SiT-T/2", "p_drop_y": 0.0, "p_drop_z": 0.0,
                                 "lam_z": 1.0, "repa": 0.0} | settings, d)


def batch_for(net):
    """Arguments of JointLoss for 4 samples, of which 1 and 3 lose z if --p_drop_z is 0.5."""
    x, z, _, y = inputs(net)
    noise = train.sample_noise(0, 0, 4, slice(None), net)
    del noise["eps_vae"]
    noise["u"][:, 2] = torch.tensor([0.9, 0.1, 0.5, 0.4])
    return {"x": x, "z": z, "y": y, "f": None} | noise


@pytest.mark.parametrize("name", ["SiT-T/2", "DiT-T/2"])
def test_z_is_dropped_per_sample_in_input_loss_and_gradient(name, monkeypatch):
    net, seen, gradients = tiny(name).requires_grad_(True), [], []
    batch, dropped = batch_for(net), torch.tensor([False, True, False, True])
    kept = joint_loss(net)(**batch)
    watch(monkeypatch, net, "forward", lambda x_t, z_t, *_: seen.append(z_t))
    for other in (0, 100):
        net.zero_grad()
        batch["z"] += other * dropped.view(-1, 1, 1, 1)
        losses = joint_loss(net, p_drop_z=0.5)(**batch)
        losses["loss"].mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    for is_dropped in (seen[-1].flatten(1) == 0).all(1), losses["loss_z"] == 0, ~losses["kept"]:
        assert torch.equal(is_dropped, dropped)
    assert losses["loss"][~dropped].allclose(kept["loss"][~dropped])
    assert not losses["loss_x"][dropped].allclose(kept["loss_x"][dropped])
    assert (losses["loss_x"] > 0).all() and (kept["loss_z"] > 0).all() and kept["kept"].all()


def test_lam_z_weighs_z_and_a_dropped_class_is_the_null():
    net = tiny()
    batch = batch_for(net)
    losses = joint_loss(net, lam_z=0.5, p_drop_y=1)(**batch)
    null = joint_loss(net)(**batch | {"y": torch.full((4,), 10)})
    assert losses["loss"].allclose(null["loss_x"] + 0.5 * null["loss_z"])
    assert not losses["loss_x"].allclose(joint_loss(net)(**batch)["loss_x"])


@pytest.mark.parametrize("fusion", model.FUSIONS)
def test_repa_aligns_xs_tokens_after_block_2_of_size_t(fusion):
    """Its loss is 1 - half the squared distance of unit vectors, less 1; z dropped or not."""
    net, f, seen = tiny(fusion=fusion), normal(4, 6, 2, 2, seed=9), []
    batch, both = batch_for(net), joint_loss(net, d=6, repa=0.5, p_drop_z=0.5)
    net.blocks[1].register_forward_hook(lambda block, given, out: seen.append(out))
    alone = joint_loss(net, p_drop_z=0.5)(**batch)["loss"]
    losses = both(**batch | {"f": f})
    tokens = both.projector(seen[0][:, :16])                            # x's come first
    wanted = torch.nn.functional.interpolate(f, size=(4, 4), mode="bilinear").flatten(2).mT
    unit = [part / part.norm(dim=-1, keepdim=True) for part in (tokens, wanted)]
    repa = (unit[0] - unit[1]).square().sum(-1).mean(1) / 2 - 1
    assert losses["loss_repa"].allclose(repa, atol=1e-5)
    assert losses["loss"].allclose(alone + 0.5 * repa, atol=1e-5)


def test_noise_is_a_function_of_seed_step_and_place_alone():
    net, parts = tiny(), {"u": 3, "eps_x": 2, "eps_vae": 2, "eps_z": 3}
    one, other = (train.sample_noise(0, step, 6, slice(None), net, True) for step in (3, 4))
    part = train.sample_noise(0, 3, 6, slice(2, 4), net, True)         # another process's, alone
    for name, channels in parts.items():
        assert one[name].shape[:2] == (6, channels) and torch.equal(one[name][2:4], part[name])
        assert not torch.equal(one[name], other[name])
        assert (one[name].min() >= 0) == (one[name].max() < 1) == (name == "u")
    assert one["u"].unique().numel() == 18 and not torch.equal(one["eps_x"], one["eps_vae"])
    for fusion in model.FUSIONS:                                       # x's for every fusion
        none = train.sample_noise(0, 3, 6, slice(None), tiny(fusion=fusion))
        assert none["eps_vae"].numel() == 0 and torch.equal(none["eps_x"], one["eps_x"])


def test_the_log_divides_z_by_kept_samples_and_splits_by_quarter():
    losses = {"loss": torch.tensor([6.0, 2, 13, 4]), "loss_x": torch.tensor([1.0, 2, 3, 4]),
              "loss_z": torch.tensor([10.0, 0, 20, 0]), "loss_repa": torch.full((4,), -0.5),
              "kept": torch.tensor([True, False, True, False]),
              "time": torch.tensor([0.0, 0.1, 0.3, 1.0])}               # quarter 0: the noisiest
    sums = train.tally(losses)
    sums[:, -1] = torch.tensor([3, 1])                                  # the gradient's norm, once
    entry = train.log_entry(7, sums + sums, {"fusion": "merged", "repa": 0.5}, 12.34, 0.0512)
    assert entry == {"step": 7, "loss": 6.25, "loss_x": 2.5, "loss_z": 15.0, "loss_repa": -0.5,
                     "loss_q0": 4.0, "loss_q1": 13.0, "loss_q2": None, "loss_q3": 4.0,
                     "grad_norm": 3.0, "images_per_s": 12.3, "waited_percent": 5.1}
    entry = train.log_entry(7, sums, {"fusion": "none", "repa": 0}, 1, 0)
    assert "loss_z" not in entry and "loss_repa" not in entry


def settings_for(flags, checkpoint=None):
    return train.resolve(train.parser().parse_args(flags.split()), checkpoint)


def test_defaults_are_the_papers_but_for_size_t_on_digits_by_their_meta(there, tmp_path):
    paper = {"data": "prepared/imagenet256", "lr": 1e-4, "batch_size": 256, "steps": 400_000,
             "z_channels": 8, "sample_steps": 250, "fusion": "merged", "lam_z": 1, "p_drop_z": 0.2,
             "p_drop_y": 0.1, "ema": 0.9999, "repa": 0}
    assert paper.items() <= settings_for("--model SiT-XL/2").items()
    few = {"model": "SiT-T/2", "batch_size": 128, "z_channels": 4, "steps": 1400}
    assert (few | {"data": "digits"}).items() <= settings_for("").items()
    copy = shutil.copytree("prepared/digits", tmp_path / "copy")
    assert few.items() <= settings_for(f"--data {copy}/").items()
    assert settings_for(f"--data {copy} --model SiT-S/2")["steps"] == 400_000
    run.write_json(copy / "meta.json", data.read_meta(copy) | {"name": "images of digits"})
    assert settings_for(f"--data {copy}")["steps"] == 400_000
    assert settings_for("--repa")["repa"] == 0.5 and settings_for("--repa 2")["repa"] == 2


def test_who_continues_is_bound_by_the_checkpoints_settings_and_older_ones_by_defaults():
    stored = settings_for("--seed 3 --lam_z 0.5")
    assert settings_for("--steps 9 --seed 3", {"settings": stored}) == stored | {"steps": 9}
    older = {name: stored[name] for name in stored if name not in ("grad_clip", "lr", "p_drop_y")}
    assert settings_for("", {"settings": older}) == stored
    for flags, of in (("--seed 0", stored), ("--lam_z 1", stored), ("--model SiT-T/4", stored),
                      ("--fusion none", stored), ("--unconditional", stored), ("--repa", stored),
                      ("--lr 1", stored), ("--batch_size 2", stored), ("--p_drop_y 0.5", older)):
        with pytest.raises(UserError, match=f"{flags.split()[0]} .*contradicts the checkpoint's "):
            settings_for(flags, {"settings": of})
    with pytest.raises(UserError, match="out was trained with dropout, which this code does not"):
        settings_for("", {"settings": stored | {"dropout": 0.1}})


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(out):
    """The comparable part of log.jsonl by line and name: steps and losses."""
    return {(k, name): value for k, row in enumerate(rows_of(out / "log.jsonl"))
            for name, value in row.items() if name not in ("images_per_s", "waited_percent")}


def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def torn_write(path, write):
    """A power cut in the middle of a write."""
    with open(f"{path}.0123abcd.part", "wb") as file:
        write(file)
    os.truncate(file.name, 1000)
    kill()


def ends_at(patch, owner, name, k=0, die=kill):
    """From here on, call k of that function, 0 the first, is the process's end, or what die is."""
    calls = itertools.count()
    watch(patch, owner, name, lambda *args, **_: next(calls) >= k and die(*args))


def train_together(out, flags="", n_ranks=1, at_call=None):
    """The exit codes of ranks that train with FLAGS and more; at_call: ends_at()'s arguments."""
    def work():
        if at_call:
            ends_at(pytest.MonkeyPatch(), *at_call)
        main(train, f"{FLAGS} --out {out} {flags}")

    return in_ranks(work, n_ranks)


def mark(path):
    """Add to the file path_RANK."""
    with open(f"{path}_{run.rank_and_count()[0]}", "a") as file:
        file.write("x")


@pytest.mark.parametrize("n_ranks, flags", [(1, "--fusion none --repa --micro_batch_size 8"),
                                            (2, "--micro_batch_size 4")])
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(
        there, tmp_path, monkeypatch, n_ranks, flags):
    """In an epoch's middle, in gradient accumulation, between the last renames of a checkpoint, in
    the write of one or of a line of the log, before results.json; 16 of 40 rows a step, so that
    the third begins another epoch. One process reads the checksums."""
    rows_of_step, whole, out = data.rows_of_step, tmp_path / "whole", tmp_path / "out"
    monkeypatch.setattr(data, "rows_of_step", lambda *args: rows_of_step(*args[:-1], 40))
    watch(monkeypatch, pretrained.zipfile.ZipFile, "testzip", lambda _: mark(tmp_path / "read_by"))
    flags += " --ckpt_every 2 --keep_every 3"
    assert train_together(whole, flags, n_ranks) == [0] * n_ranks
    for at_call in ((train.JointLoss, "forward", 1), (train.JointLoss, "forward", 7),
                    (os, "replace", 3), (run, "write_whole", 1, torn_write),
                    (train, "update_ema", 1), (train, "finish")):
        codes = train_together(out, flags, n_ranks, at_call)
        assert -signal.SIGKILL in codes, (at_call, codes)
        with open(out / "log.jsonl", "a") as file:
            file.write('{"step": 3}')                                    # its line end is missing
    assert train_together(out, flags, n_ranks) == [0] * n_ranks
    assert losses(out) == losses(whole) and losses(out)[3, "step"] == 8
    one, two = (pretrained.load_checkpoint(f"{folder}/ckpt.pt") for folder in (out, whole))
    for part in ("net", "ema", "projector")[:4 - n_ranks]:
        torch.testing.assert_close(one[part], two[part], rtol=0, atol=0)
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole)) == [
        ".lock", "ckpt.pt", "ckpt_prev.pt", "ema_0000003.pt", "ema_0000006.pt", "log.jsonl",
        "loss.png", "results.json", "sheet.png"]
    net, metadata = pretrained.load_model(str(out / "ema_0000006.pt"))
    before = pretrained.load_checkpoint(str(out / "ckpt_prev.pt"))["ema"]    # of step 6, too
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())
    assert metadata["step"] == 6 and [*tmp_path.glob("read_by*")] == [tmp_path / "read_by_0"]


@pytest.mark.parametrize("n_ranks, micro", [(1, 4), (2, 8), (2, 2)])
def test_processes_and_micro_batches_change_a_step_by_its_summation_order_alone(
        there, tmp_path, monkeypatch, n_ranks, micro):
    """Gradients of several processes meet once a step."""
    watch(monkeypatch, train.DistributedDataParallel, "no_sync", lambda _: mark(tmp_path / "apart"))
    assert train_together(tmp_path, f"--micro_batch_size {micro}", n_ranks) == [0] * n_ranks
    assert losses(tmp_path) == pytest.approx(losses(there / "out"), rel=1e-4)
    calls = [len(path.read_text()) for path in tmp_path.glob("apart_*")]
    assert calls == [8 * (8 // micro - 1)] * 2 * (n_ranks == 2 and micro < 8)


@pytest.mark.parametrize("flags, calls_a_step", [
    ("--repa --grad_clip 0.01 --micro_batch_size 8", 8), ("--model DiT-T/2", 4),
    ("--model DiT-T/2 --grad_checkpointing", 8)])
def test_a_step_clips_averages_and_checkpoints_as_told_on_its_device_without_float64(
        there, flags, calls_a_step):
    """The logged norm is that before clipping, the average's decay grows; the forward pass runs on
    an imagined GPU, too."""
    args = train.parser().parse_args(f"--no-bf16 --no-compile --batch_size 16 {flags}".split())
    trainer, calls = train.Trainer(train.resolve(args), args, torch.device("cpu")), []
    for block in trainer.net.blocks:
        block.register_forward_pre_hook(lambda *args: calls.append(1))
    weight, average = (net.final_layer.linear.weight for net in (trainer.net, trainer.ema))
    expected = weight.detach().clone()
    for k, decay in enumerate((1 / 10, 2 / 11)):
        batch = trainer.load_batch(k)
        with NoDoubles():
            trainer.training_step(batch)
            sums = trainer.total_sums()
        trainer.sums[:] = 0
        expected = decay * expected + (1 - decay) * weight.detach()
        norm = torch.cat([param.grad.flatten() for param in trainer.params]).double().norm().item()
        logged = train.log_entry(1, sums, trainer.settings, 1, 0)["grad_norm"]
        assert logged > 0.1 and norm == pytest.approx(args.grad_clip or logged, rel=1e-3)
    assert average.allclose(expected, rtol=1e-5) and not average.allclose(weight, rtol=1e-5)
    assert len(calls) == 2 * calls_a_step
    with imagined_gpu():
        trainer.loss.to("cuda")
        batch = {name: values.to("cuda") for name, values in batch.items()}
        xzyf = trainer.dataset.unpack([batch.get(name) for name in "xzyf"], batch["eps_vae"])
        losses = trainer.loss(*xzyf, batch["u"], batch["eps_x"], batch["eps_z"])
        assert {loss.device.type for loss in [*losses.values(), train.tally(losses)]} == {"cuda"}


@pytest.mark.parametrize("number, times", [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_to_one_process_saves_at_the_next_step_and_says_so(
        there, tmp_path, monkeypatch, capfd, number, times):
    """SIGTERM twice: both processes end, rank 1 not before rank 0 has saved, and continuing ends
    where the undisturbed run does."""
    def send(*args):
        for _ in range(times * run.rank_and_count()[0]):
            os.kill(os.getpid(), number)

    path, flags = tmp_path / "ckpt.pt", "--ckpt_every 100"
    watch(monkeypatch, train, "save_checkpoint", lambda *_: time.sleep(0.5))
    watch(monkeypatch, train.dist, "destroy_process_group",
          lambda: mark(tmp_path / f"saved_{path.exists()}"))
    codes = train_together(tmp_path, flags, 2, (train.Trainer, "training_step", 3, send))
    assert codes == [128 + signal.SIGTERM, 128 + number]
    assert sorted(path.name[6:] for path in tmp_path.glob("saved_*")) == ["True_0", "True_1"]
    saved = pretrained.load_checkpoint(str(path))["step"]
    said = f"SIGTERM: saved {path} at step {saved}; the same command continues"
    assert 3 <= saved <= 5 and said in capfd.readouterr().err
    assert train_together(tmp_path, flags, 2) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(there / "out"), rel=1e-4)


def test_a_full_disk_leaves_the_checkpoints(out):
    """Files that may not grow beyond 1 MB are one, for torch's own writer, too."""
    import resource
    limit, before = resource.RLIMIT_FSIZE, [path.read_bytes() for path in sorted(out.glob("*.pt"))]
    resource.setrlimit(limit, (1_000_000, resource.getrlimit(limit)[1]))
    try:
        with pytest.raises(SystemExit, match="File too large.*is kept.*same command"):
            run.run_cli(train.main, train.parser().parse_args(["--steps", "9", f"--out={out}"]))
    finally:
        resource.setrlimit(limit, (resource.getrlimit(limit)[1],) * 2)
    assert [path.read_bytes() for path in sorted(out.glob("*.pt*"))] == before


def broken_disk(*args):
    raise OSError(errno.EIO, "Input/output error")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used_but_not_for_a_disks_trouble(
        there, out, monkeypatch, capsys):
    whole = bytearray((out / "ckpt.pt").read_bytes())
    whole[whole.index(b"/data/") + 50_000] ^= 1
    (out / "ckpt.pt").write_bytes(whole)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(pretrained.zipfile, "is_zipfile", broken_disk)
        main(train, f"--out {out}")
    main(train, f"{FLAGS} --out {out}")
    said = capsys.readouterr().err
    assert "ckpt.pt is damaged" in said and "continuing from that, step 4" in said
    assert losses(out) == losses(there / "out") and (out / "ckpt.pt.damaged").exists()
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (out / name).write_bytes(b"nothing")
    refused(train, f"--out {out}", "damaged")


@pytest.mark.parametrize("what, k, n_ranks, every, steps", [("loss", 4, 1, 3, "5 to 6"),
                                                            ("gradient", 2, 2, 1, "3 to 3")])
def test_what_is_not_finite_stops_the_run_everywhere_and_no_checkpoint_has_it(
        there, tmp_path, capfd, what, k, n_ranks, every, steps):
    """A loss of one sample, by a NaN in its noise; a gradient, in one process of two alone."""
    def spoil(trainer, batch):
        if what == "loss":
            batch["eps_x"][3] = float("nan")
        elif run.rank_and_count()[0] == 1:
            trainer.params[0].register_hook(lambda grad: grad * float("inf"))

    codes = train_together(tmp_path, f"--ckpt_every {every}", n_ranks,
                           (train.Trainer, "training_step", k, spoil))
    assert codes == [1] * n_ranks
    assert capfd.readouterr().err.count(f"NaN or infinite in steps {steps}; no ") == n_ranks
    saved = pretrained.load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert saved["step"] == 4 - n_ranks and losses(tmp_path)[2 - n_ranks, "step"] == 6 - 2 * n_ranks
    assert all(weight.isfinite().all() for weight in saved["net"].values())


def test_disks_must_be_shared(there, tmp_path, capfd):
    """Rank 1 sees other digits."""
    copy = shutil.copytree("prepared", tmp_path / "prepared") / "digits"
    run.write_json(copy / "meta.json", data.read_meta(copy) | {"sha256": "another"})
    move = lambda *args: run.rank_and_count()[0] == 1 and os.chdir(tmp_path)
    assert train_together(tmp_path / "two", "", 2, (train, "check", 0, move)) == [1, 1]
    assert "see different checkpoints, flags or data" in capfd.readouterr().err


def test_what_the_data_are_binds_a_run_not_where_they_lie(there, out, tmp_path, monkeypatch):
    """To another working directory, then its data twice, then to where the digits are others."""
    shutil.copytree("prepared/digits", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run.write_json("moved/meta.json", data.read_meta("moved") | {"vae": None, "versions": {}})
    main(train, "--steps 9 --data moved/")
    os.rename("moved", "again")
    refused(train, "--steps 10", "data of out are no longer in moved/: give their .* with --data")
    with run.locked("out"):
        refused(train, "--data again", "another command is writing to out")
    main(train, "--steps 10 --data ./again --no-judge")
    assert data.read_json("out/results.json") == {"step": 10}
    run.write_json("again/meta.json", data.read_meta("again") | {"sha256": "another"})
    refused(train, "--steps 11", "again is not the data .* trained on, sha256 differ: copy that "
            "folder from the machine where the run began")


def test_results_json_says_whether_a_run_is_finished_and_restart_keeps_it(
        there, out, monkeypatch):
    """torchrun's own restart of --restart continues."""
    kept, results = content(out), data.read_json(out / "results.json")
    assert losses(out)[3, "loss"] < losses(out)[0, "loss"]
    assert {"step", "n_images", "frechet_pixels_25_vs_179", "classifier_accuracy_percent"} <= set(
        results) and results["step"] == 8
    os.utime(out / "ckpt.pt", (2e9, 2e9))                                # the date of no file does
    for unfinished in ("", '{"step": 4}'):
        refused(train, f"--out {out}", "out is done, with 8 steps: raise --steps, or --restart")
        (out / "results.json").write_text(unfinished)
        main(train, f"--out {out}")
        assert data.read_json(out / "results.json").keys() == results.keys()
    assert all(content(out)[name] == kept[name] for name in ("ckpt.pt", "log.jsonl"))
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        refused(train, f"--out {out} --restart", "is done, with 8 steps")
    (out / "other").mkdir()
    checkpoint = pretrained.load_checkpoint(str(out / "ckpt.pt"))
    torch.save(checkpoint | {"sums": [0] * 15}, out / "other/ckpt.pt")   # as older code logged
    refused(train, f"--out {out}/other --steps 9", "the checkpoint in .* does not fit this code")
    names = ["ckpt.pt", "ckpt_prev.pt", "log.jsonl", "results.json"]
    kept = content(out)
    refused(train, f"--restart --lr 1e30 --steps 6 --batch_size 8 --out {out}", "became NaN")
    assert all((out / f"{name}.old1").read_bytes() == kept[name] for name in names)
    assert not set(names) & set(os.listdir(out))
    (out / "ckpt.pt").write_bytes(b"second")
    refused(train, f"--restart --lr 1e30 --steps 6 --batch_size 8 --out {out}", "became NaN")
    assert (out / "ckpt.pt.old1").read_bytes() == kept["ckpt.pt"]
    assert (out / "ckpt.pt.old2").read_bytes() == b"second"


def test_init_starts_from_the_average_and_is_not_needed_afterwards(there, tmp_path, capsys):
    torch.save(published("SiT", 3), tmp_path / "redi.pt")
    path = shutil.copy("out/ckpt.pt", tmp_path / "start.pt")
    flags = f"--batch_size 2 --sample_steps 2 --lr 1e-12 --out {tmp_path}/out --init"
    refused(train, f"{flags} {tmp_path}/redi.pt", "--init .*redi.pt: it has 3 channels of z, this")
    refused(train, f"{flags} {tmp_path}/none.pt", "--init .*none.pt: no checkpoint at")
    main(train, f"--steps 1 {flags} {path}")
    started = pretrained.load_checkpoint(f"{tmp_path}/out/ckpt.pt")["net"]
    for name, weight in pretrained.load_checkpoint(path)["ema"].items():
        assert started[name].allclose(weight, atol=1e-9)
    os.remove(path)
    assert "was not read" not in capsys.readouterr().out
    main(train, f"--steps 2 {flags} elsewhere.pt")
    assert "--init elsewhere.pt was not read: " in capsys.readouterr().out
    assert pretrained.load_checkpoint(f"{tmp_path}/out/ckpt.pt")["settings"]["init"] == str(path)


@pytest.mark.parametrize("fusion", model.FUSIONS)
def test_prepared_photos_train_and_sample_through_their_vae(
        prepared, tmp_path, monkeypatch, fusion):
    """x is drawn anew at every step, by noise of the sample's own."""
    drawn, out = [], tmp_path / "out"
    watch(monkeypatch, data.LatentDataset, "unpack", lambda *args: drawn.append(args[-1]))
    main(train, f"--data {prepared.folder} --fusion {fusion} --steps 3 --batch_size 4 "
                f"--sample_steps 3 --out {out}{' --z_channels 4' * (fusion != 'none')}")
    net = tiny(fusion=fusion, r=4, x_channels=4)
    for step, eps in zip(range(3), drawn, strict=True):
        noise = train.sample_noise(0, step, 4, slice(None), net, from_vae=True)
        assert torch.equal(eps, noise["eps_vae"])
    main(sample, f"--ckpt {out}/ckpt.pt --n_samples 4 --out {tmp_path}/samples")
    images = np.load(tmp_path / "samples/samples.npz")["arr_0"]
    assert images.shape == (4, 32, 32, 3) and images.std() > 1
    assert (out / "sheet.png").exists() and data.read_json(out / "results.json") == {"step": 3}


def test_what_cannot_be_drawn_is_said_once_and_the_time_it_takes(prepared, tmp_path, monkeypatch,
                                                                 capsys):
    """Without its VAE and matplotlib training ends well."""
    train.say_once.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    gone = shutil.copytree(prepared.folder, tmp_path / "prepared")
    run.write_json(gone / "meta.json", prepared.meta | {"vae": "gone"})
    main(train, f"--data {gone} --z_channels 4 --steps 12 --batch_size 4 --sample_steps 2 "
                f"--preview_every 5 --log_every 1 --out {tmp_path / 'out'}")
    said = capsys.readouterr().out
    for name in ("sheet_0000005.png", "sheet_0000010.png", "sheet.png"):
        assert f"no {name}: --vae gone" in said
    assert said.count("no loss.png, it needs matplotlib") == 1 and "out is complete" in said
    assert re.search(r"the other 2 steps take about 0:00:\d\d at this speed", said)


def test_loss_png_has_the_logs_numbers_over_steps(tmp_path, monkeypatch):
    figures, log = [], [{"step": 2, "loss_x": 3, "loss_z": 5, "images_per_s": 7},
                        {"step": 4, "loss_x": 2, "loss_z": None, "images_per_s": 9}]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda figure, file, format: figures.append(figure))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    train.draw_log(tmp_path, ["loss_x", "loss_z", "images_per_s"])
    drawn = {axes.get_ylabel(): axes.lines[0].get_xydata().tolist() for axes in figures[0].axes}
    assert drawn == {"loss_x": [[2, 3], [4, 2]], "loss_z": [[2, 5]],
                     "images_per_s": [[2, 7], [4, 9]]}
    with open(tmp_path / "log.jsonl", "a") as file:           # from outside; torn
        file.write('\n[1]\n"step"\n{"steps": 1}\n{"step": 3}\n{"step": 5}\n{"step"')
    train.truncate_log(tmp_path / "log.jsonl", 4)
    kept = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [*map(json.loads, kept)] == [*log, {"step": 3}]
    train.draw_log(tmp_path, ["loss_x", "images_per_s"])      # as of another method
    (tmp_path / "log.jsonl").write_text("")                   # all of it after a checkpoint
    train.draw_log(tmp_path, ["loss_x", "images_per_s"])


@pytest.mark.filterwarnings("error:.*mkldnn")
@pytest.mark.parametrize("flags, words", [
    ("--model SiT-XL2", "SiT-XL/2"), ("--model SiT-XL/2", "python data.py --images"),
    *((f"--fusion none --{flag}", f"--{flag.split()[0]} is about features")
      for flag in ("z_channels 4", "lam_z 1", "p_drop_z 0.2")),
    ("--z_channels 0", "r >= 1"), ("--z_channels 99", "--z_channels 99 must be at most the 16"),
    ("--lr 0", "--lr"), ("--p_drop_z 1.5", "--p_drop_z"), ("--seed -1", "--seed"),
    ("--batch_size 9 --micro_batch_size 4", "--batch_size 9.*--micro_batch_size"),
    ("--model DiT-T/2 --sample_steps 1", "--sample_steps 1"),
    *((f"--device {name}", "cannot be used") for name in ("x", "meta", "cuda:9", "mkldnn")),
    ("--data none/", "no prepared data in none/"), ("--seed 5 --out out", "--seed 5 contradicts")])
def test_mistakes_in_training_are_one_line_and_write_nothing(there, capsys, flags, words):
    before = content(there)
    refused(train, flags if "--out" in flags else f"{flags} --out new", words, capsys)
    assert content(there) == before


@pytest.mark.parametrize("command, code, absent", [
    (["-c", "import train"], 0, {"timm", "diffusers"}), (["train.py", "--help"], 0, {"torch"}),
    (["sample.py", "--help"], 0, {"torch"}), (["sample.py", "--stepz", "3"], 2, {"torch"}),
    (["fid.py", "--help"], 0, {"torch", "PIL"}), (["bench.py", "speed", "--help"], 0, {"torch"})])
def test_help_and_typos_wait_for_no_import_and_training_not_for_timm(command, code, absent):
    done = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=HERE,
                          capture_output=True, text=True)
    imported = {line.split()[-1] for line in done.stderr.splitlines()}
    assert done.returncode == code and "argparse" in imported and not imported & absent


def test_the_process_that_dies_is_in_torchruns_summary_with_its_error(tmp_path, capfd):
    """And its line stands alone, before the summary."""
    assert torchrun(f"train.py --z_channels 4 --data {tmp_path}/none --out {tmp_path}/out") == 1
    said = capfd.readouterr().err
    assert "\nerror: no prepared data in" in f"\n{said}"
    assert "UserError" in said and "exitcode  : 1" in said, said


@pytest.mark.slow
def test_compiled_training_takes_the_same_steps(there, tmp_path):
    """By inductor: forward, backward, twice computed activations, and two processes."""
    start(f"train.py {FLAGS} --compile --grad_checkpointing --out {tmp_path}/one", there)
    assert torchrun(f"train.py {FLAGS} --compile --micro_batch_size 4 --out {tmp_path}/two") == 0
    for out in ("one", "two"):
        assert losses(tmp_path / out) == pytest.approx(losses(there / "out"), rel=1e-3)
    pretrained.load_model(str(tmp_path / "two/ckpt.pt"))                # no _orig_mod, no module


@pytest.mark.slow
@pytest.mark.parametrize("command", [f"train.py {FLAGS}", "sample.py"])
def test_without_a_compiler_one_line_names_no_compile(there, tmp_path, command):
    script, *flags = command.split()
    done = subprocess.run(
        [sys.executable, HERE / script, *flags, "--compile", "--out", tmp_path / "out"],
        capture_output=True, text=True, env=os.environ | {
            "CC": "none", "CXX": "none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    last = done.stderr.splitlines()[-1]
    assert re.match("error: --compile failed .*compiler.*; --no-compile does without", last), last
    assert done.returncode == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_main_job_makes_digits_that_read_as_asked(tmp_path):
    start("train.py", tmp_path)
    assert data.read_json(tmp_path / "out/results.json")["classifier_accuracy_percent"] >= 98


# sample.py

STATE = 0.4, 5                                                          # t for flow, step for DDPM


def call(net, y, **guidance):
    x_t, z_t, *_ = inputs(net)
    state = (x_t, z_t) if net.r else (x_t,)
    return sample.guided(net, y, **guidance)(state, STATE[net.diffusion.outputs - 1])


def plain(net, y, z_factor=1):
    x_t, z_t, *_ = inputs(net)
    t = torch.full((4,), STATE[net.diffusion.outputs - 1])
    preds = net(x_t, None if z_t is None else z_factor * z_t, t, y)
    return [pred for pred in preds if pred is not None]


@pytest.mark.parametrize("name", ["SiT-T/2", "DiT-T/2"])
def test_guidance_is_the_documented_formula(name):
    """Each alone, both together, on x or on both; variances and the other modality stay."""
    net, y = tiny(name), torch.arange(4)
    e, no_y, no_z = plain(net, y), plain(net, torch.full((4,), 10)), plain(net, y, z_factor=0)
    for w_cfg, w_r, cfg_on, rg_on in [
            (3, 1, "x", "x"), (1, 1.5, "x", "x"), (2, 1.5, "x", "x"), (2, 1.5, "both", "x"),
            (2, 1.5, "x", "both"), (0, 0, "x", "x")]:
        preds = call(net, y, w_cfg=w_cfg, w_r=w_r, cfg_on=cfg_on, rg_on=rg_on)
        for k, (pred, n) in enumerate(zip(preds, (net.x_channels, net.r))):
            wanted = e[k] + (w_cfg - 1) * (e[k] - no_y[k]) * (k == 0 or cfg_on == "both") \
                + (w_r - 1) * (e[k] - no_z[k]) * (k == 0 or rg_on == "both")
            assert pred[:, :n].allclose(wanted[:, :n], atol=1e-4)
            assert pred[:, n:].allclose(e[k][:, n:], atol=1e-5)          # DiT's variances


@pytest.mark.parametrize("name", ["SiT-T/2", "DiT-T/2"])
@pytest.mark.parametrize("fusion", model.FUSIONS)
def test_guidance_costs_a_branch_per_weight_and_none_outside_its_interval(name, fusion):
    """STATE is t = 0.4 for SiT; step 5 of 999, so 0.995 in flow time, for DiT."""
    net, y, sizes = tiny(name, fusion), torch.arange(4), []
    net.blocks[0].register_forward_hook(lambda block, args, h: sizes.append(len(h)))
    at = 0.4 if name[0] == "S" else 1 - 5 / 999
    for interval, acts in (((0, 1), True), ((at, at), True), ((0, at - 1e-4), False),
                           ((at + 1e-4, 1), False)):
        for w_r in (1, 1.5)[:1 + (net.r > 0)]:
            sizes.clear()
            result = call(net, y, w_cfg=3, w_r=w_r, cfg_interval=interval)
            assert sizes == [4 * (1 + acts + (w_r != 1))]
            for a, b in zip(result, call(net, y, w_cfg=3 if acts else 1, w_r=w_r), strict=True):
                assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(call(net, y), plain(net, y), strict=True))


@pytest.mark.parametrize("solver, order", [(sample.euler, 1), (sample.heun, 2)])
def test_twice_the_steps_divide_the_odes_error_by_2_to_the_order(solver, order):
    """Of data N(mean, std^2), whose exact velocity is known; it maps noise to mean + std noise. An
    odd number of calls ends with a step of Euler's."""
    noise, mean, std = normal(100, 1, 1, 1, dtype=DOUBLE), 0.7, 0.3

    def velocity(state, t):
        return [mean + (t * std ** 2 - (1 - t)) * (part - t * mean) / (
            t ** 2 * std ** 2 + (1 - t) ** 2) for part in state]

    a, b, c, odd = ((solver(velocity, model.Flow(), [noise], steps, None)[0] - mean
                     - std * noise).abs().max() for steps in (80, 160, 320, 321))
    assert a / b == pytest.approx(2 ** order, rel=0.1) == b / c and odd < 10 * c


@pytest.mark.parametrize("steps", [1000, 250, 7, 2])
@pytest.mark.parametrize("solver", [sample.ddim, sample.ddpm])
def test_ddim_and_ddpm_equal_diffusers_from_the_same_noise(solver, steps, monkeypatch):
    """Its DPM-Solver of order 1 is DDIM (2206.00927), and takes any timesteps."""
    from diffusers.schedulers import scheduling_ddpm, scheduling_dpmsolver_multistep
    if solver is sample.ddpm:
        scheduler = scheduling_ddpm.DDPMScheduler(
            1000, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=False,
            timestep_spacing="linspace")
        scheduler.set_timesteps(steps)
    else:
        scheduler = scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler(
            1000, 1e-4, 0.02, "linear", solver_order=1, final_sigmas_type="zero")
        scheduler.set_timesteps(timesteps=[round(i * 999 / (steps - 1))
                                           for i in range(steps)][::-1])
    noises = [normal(2, 3, 4, 4, seed=s, dtype=DOUBLE) for s in range(steps)]
    mix, theirs = 0.3 * normal(6, 3, dtype=DOUBLE), noises[-1]

    def predict(state, t):
        out = torch.einsum("oc,bchw->bohw", mix, state[0].tanh() + t / 1000).tanh()
        return [torch.cat([out[:, :3] + 0.5 * state[0], out[:, 3:]], 1)]

    played = iter(noises)
    ours, = solver(predict, model.DDPM(), [theirs], steps, lambda: [next(played)])
    played = iter(noises)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(played))
    for t in scheduler.timesteps:
        pred = predict([theirs], t.item())[0][:, :6 if solver is sample.ddpm else 3]
        theirs = scheduler.step(pred, t, theirs).prev_sample
    assert ours.abs().max() > 1 and (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


# every 202nd value of the authors' SDE sampler: x and z from sde_noise(), 8 steps
SDE_PEERS = {
    "w_cfg": [-3.3404, 0.2055, -3.296, -7.5711, 6.3333],
    "w_cfg both": [-3.4856, 0.2066, -2.9159, -8.7725, 6.603],
    "w_r both": [-4.2048, -1.3741, -5.256, -7.9823, 6.7101]}


def sde_noise(n=8):
    return [normal(2, 7, 8, 8, seed=100 + i) for i in range(n)]


def record_sde_peers(redi_folder):
    """Print SDE_PEERS from zelaki/ReDi 58c65a8: the sampler of its sample_ddp.py, 7 steps to 0.96
    and one of 0.04, with CFG of x alone, CFG of all and representation guidance."""
    sys.modules.setdefault("torchdiffeq", types.SimpleNamespace(odeint=None))    # not used here
    sys.path.insert(0, redi_folder)
    from models import SiT
    from transport import Sampler, create_transport
    net = SiT(in_channels=7, learn_sigma=True, **PEER_CASES).eval()
    net.load_state_dict(published("SiT", 3, learn_sigma=True))
    solve = Sampler(create_transport()).sample_sde(diffusion_form="sigma", num_steps=8)
    y, null = torch.tensor([3, 9]), torch.tensor([10, 10])
    for name, function, labels, scale in (
            ("w_cfg", net.forward_with_cfg_vae, null, {"cfg_scale": 2.4}),
            ("w_cfg both", net.forward_with_cfg, null, {"cfg_scale": 2.4}),
            ("w_r both", net.forward_with_rg, y, {"rg_scale": 1.5})):
        first, *noise = [part.repeat(2, 1, 1, 1) for part in sde_noise()]
        played, torch_randn = iter(noise), torch.randn
        torch.randn = lambda *shape, **options: next(played)
        with torch.no_grad():
            state = solve(first, function, y=torch.cat([y, labels]), **scale)[-1][:2]
        torch.randn = torch_randn
        values = thinned(state[:, :4], state[:, 4:])[::2]
        print(f'    "{name}": {[round(value, 4) for value in values]},')


@pytest.mark.parametrize("peer", SDE_PEERS)
def test_the_sde_with_guidance_equals_the_authors(peer):
    """Their forward_with_cfg_vae, forward_with_cfg and forward_with_rg under their sampler."""
    net = pretrained.load_published(published("SiT", 3, learn_sigma=True)).requires_grad_(False)
    weight, _, both = peer.partition(" ")
    guidance = {weight: 2.4 if weight == "w_cfg" else 1.5,
                "cfg_on": both or "x", "rg_on": both or "x"}
    played = (list(noise.split([4, 3], 1)) for noise in sde_noise())
    state = sample.euler_maruyama(sample.guided(net, torch.tensor([3, 9]), **guidance),
                                  net.diffusion, next(played), 8, played.__next__)
    assert thinned(*state)[::2] == pytest.approx(SDE_PEERS[peer], rel=1e-4, abs=1e-4)


EVERY_SOLVER = pytest.mark.parametrize("name, solver", [
    ("SiT-T/2", "sde"), ("SiT-T/2", "euler"), ("SiT-T/2", "heun"), ("DiT-T/2", "ddpm"),
    ("DiT-T/2", "ddim")])


@EVERY_SOLVER
def test_sampling_stays_on_its_device_without_float64(name, solver, monkeypatch):
    """On an imagined GPU; its noise is made there, as other threads imagine nothing."""
    def noise(net, seed, rows, device):
        while True:
            yield [torch.randn(len(rows), n, 8, 8, device=device) for n in (2, 3)]

    monkeypatch.setattr(sample, "image_noise", noise)
    net = tiny(name)
    with imagined_gpu():
        (rows, state), = sample.sample_batches(
            net.to("cuda"), torch.arange(3), [0], 5, solver, batch_size=4, device="cuda",
            w_cfg=2.0, w_r=1.5, cfg_on="both")
    assert rows == range(3) and [part.shape for part in state] == [(4, 2, 8, 8), (4, 3, 8, 8)]
    assert {(part.device.type, part.dtype) for part in state} == {("cuda", torch.float32)}


@EVERY_SOLVER
def test_given_z_is_noised_with_one_eps_and_is_where_every_solver_ends(name, solver):
    """After as many calls as steps, in each of two batches."""
    net, z, seen = tiny(name), normal(2, 3, 8, 8), []
    how = {"w_cfg": 2.0, "w_r": 1.5, "cfg_on": "both"}

    def watched(net, y, **guidance):
        predict = sample.guided(net, y, **guidance)
        return lambda state, t: seen.append((t, state, preds := predict(state, t))) or preds

    _, ends = sample.generate(net, torch.arange(3), 7, solver, batch_size=2,
                              guide=sample.given_z(z, watched), **how)
    assert ends.allclose(z[[0, 1, 0]], atol=0.2 if solver == "sde" else 1e-4) and len(seen) == 14
    for b in (0, 1):
        _, eps = next(sample.image_noise(net, 0, range(2 * b, 2 * b + 2), torch.device("cpu")))
        predict = sample.guided(net, torch.tensor([[0, 1], [2, 0]][b]), **how)
        for t, (x_t, z_t), preds in seen[7 * b:7 * b + 7]:
            assert torch.equal(z_t, net.diffusion.add_noise(z, eps, torch.tensor([t, t])))
            assert torch.equal(predict([x_t, z_t], t)[0], preds[0])


@pytest.mark.parametrize("name", ["SiT-T/2", "DiT-T/2"])
def test_image_i_depends_on_seed_and_i_alone(name):
    """To one grey level; to the bit where the batch size is the same."""
    net, y, how = tiny(name), torch.arange(7), {"steps": 5, "w_cfg": 2, "w_r": 1.5}
    whole = sample.generate(net, y, batch_size=7, **how)
    for n, batch_size in ((7, 3), (5, 4), (6, 7)):
        for part, expected in zip(sample.generate(net, y[:n], batch_size=batch_size, **how), whole):
            grey, wanted = (data.to_uint8(values).int() for values in (part, expected[:n]))
            assert (grey - wanted).abs().max() <= 1
            assert batch_size != 7 or torch.equal(part, expected[:n])
    assert not torch.equal(whole[0], sample.generate(net, y, batch_size=7, seed=1, **how)[0])


def test_noise_of_x_is_the_same_for_every_fusion_and_never_again():
    noises = [sample.image_noise(tiny(fusion=fusion), 0, range(7), torch.device("cpu"))
              for fusion in model.FUSIONS]
    draws = [[next(noise) for noise in noises] for _ in range(2)]
    for none, merged, separate in draws:
        assert torch.equal(none[0], merged[0]) and torch.equal(merged[0], separate[0])
        assert len(none) == 1 and not torch.equal(merged[0], merged[1][:, :2])
    distinct = torch.cat([draws[0][0][0], draws[1][0][0]]).flatten(1)
    assert torch.cdist(distinct, distinct).fill_diagonal_(9).min() > 5


def test_bf16_is_the_networks_alone():
    net, y, samples = tiny(), torch.arange(4), []
    net.blocks[0].register_forward_hook(lambda block, args, h: kinds.add(block.mlp.fc1(h).dtype))
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        kinds = set()
        samples.append(sample.generate(net, y, 5, bf16=bf16))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):       # the solver's arithmetic
            state = [*samples[-1], *call(net, y, w_cfg=2)]
        assert kinds == {dtype} and {part.dtype for part in state} == {torch.float32}
    exact, rounded = (x for x, _ in samples)
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_labels_are_balanced_random_or_listed():
    few, many = (sample.choose_labels("random", n, 10, 0) for n in (5, 500))
    assert torch.equal(few, many[:5]) and set(many.tolist()) == set(range(10))
    assert sample.choose_labels("balanced", 12, 10, 0).tolist() == [*range(10), 0, 1]
    assert sample.choose_labels("3,1", 5, 10, 0).tolist() == [3, 1, 3, 1, 3]
    assert sample.choose_labels("random", 2, 0, 0).tolist() == [0, 0]
    for n, n_classes, y in ((11, 10, [*range(10), 0]), (5, 10, [0, 2, 4, 6, 8]), (2, 0, [0, 0])):
        assert data.classes_in_turn(n, n_classes).tolist() == y          # not the first five
    for labels, n_classes in (("10", 10), ("-1", 10), ("cat", 10), ("balanced", 0), ("0", 0)):
        with pytest.raises(UserError, match="--labels"):
            sample.choose_labels(labels, 3, n_classes, 0)


def test_the_sheet_has_each_image_above_its_features_beside_its_class():
    x, z = torch.full((3, 1, 8, 8), 1.0), np.zeros((3, 4, 8, 8))
    z[1, 0] = 4                                                         # two deviations: full red
    images = data.to_images(x)
    picture = np.asarray(sample.sheet(images, z, None, (), [2.0, 1.0, 1.0, 1.0], columns=2))
    assert picture.shape == (2 * (2 * 50 + 4) - 2, 2 * 50 + 2, 3)
    assert (picture[10, 10] == 255).all() and (picture[60, 10] == 128).all()
    assert picture[60, 60].tolist() == [255, 128, 128]
    z = normal(3, 4, 8, 8).numpy()
    assert sample.sheet(images, z) == sample.sheet(images, z, z_std=z.std((0, 2, 3)).tolist())
    images = images // 5 * np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)     # 0, 51 and 102
    picture = np.asarray(sample.sheet(images, y=np.array([7, 1, 7]), classes=range(9)))
    assert picture.shape[0] == 2 * 50 + 2                               # a row for 1 and one for 7
    assert [picture[row, column, 0] for row, column in ((25, -75), (75, -75), (75, -25))] == [
        51, 0, 102] and picture[25, -25, 0] == 255
    assert all(picture[row:row + 50, :-102].min() < 128 for row in (0, 50))     # their names
    rows = sample.sheet(np.zeros((24, 8, 8, 3), np.uint8), y=np.arange(24), classes="a" * 24)
    assert rows.height == 3 * 50 + 2                                    # more classes than columns


def test_compare_and_trajectory_name_their_rows_and_start_from_the_same_noise(there, tmp_path):
    main(sample, "--n_sheet 3 --w_cfg 2 --w_r 1.5 --steps 4 --compare --trajectory "
                 f"--out {tmp_path}")
    assert sorted(os.listdir(tmp_path)) == ["compare.png", "trajectory.png"]
    for name, versions in (("compare", 4), ("trajectory", 9)):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert picture.shape[0] == 2 * versions * 50 + 2
        left = picture[:, :-3 * 50 - 2]
        for i in range(versions):                                       # beside images alone
            assert left[100 * i + 2:100 * i + 50].min() < 128
            assert left[100 * i + 54:100 * i + 98].min() == 255
    net, _ = pretrained.load_model("out/ckpt.pt")
    y, how = torch.arange(3), {"steps": 4, "batch_size": 3}
    versions = sample.compare(net, y, 2.0, 1.5, **how)
    assert [name for name, *_ in versions] == ["no guidance", "CFG 2", "RG 1.5", "both"]
    refused(sample, f"--w_r 1e38 --steps 4 --compare --out {tmp_path}", "samples RG 1e.38 hold NaN")
    for (_, *state), (w_cfg, w_r) in zip(versions, ((1, 1), (2, 1), (1, 1.5), (2, 1.5))):
        wanted = sample.generate(net, y, w_cfg=w_cfg, w_r=w_r, **how)
        assert all(torch.equal(a, b) for a, b in zip(state, wanted))
    assert [name for name, *_ in sample.compare(net, y, w_r=2, **how)] == ["no guidance", "RG 2"]


@pytest.mark.parametrize("name, solver, last", [("SiT-T/2", "euler", 0.95), ("DiT-T/2", "ddim", 1)])
def test_the_trajectory_shows_clean_estimates_and_ends_in_the_sample(name, solver, last):
    """The last step of Euler's method and of DDIM goes to the estimate itself."""
    net, y, how = tiny(name), torch.arange(3), {"steps": 20, "solver": solver, "batch_size": 3}
    first, early, *_, estimate, end = sample.trajectory(net, y, n=5, **how)
    assert (first[0], estimate[0], end[0]) == ("t = 0.00", f"t = {last:.2f}", "sample")
    for of_last, of_end, plain in zip(estimate[1:], end[1:], sample.generate(net, y, **how)):
        assert torch.equal(of_end, plain) and of_last.allclose(of_end, atol=1e-4)
    assert not early[1].allclose(end[1], atol=0.1)


def made(folder):
    """samples.npz and sheet.png in bytes."""
    return [(folder / name).read_bytes() for name in ("samples.npz", "sheet.png")]


FEW = "--n_samples 22 --steps 3 --batch_size 4"


@pytest.fixture(scope="session")
def whole(workdir, tmp_path_factory):
    """Where `sample.py FEW` made six batches in one go."""
    folder = tmp_path_factory.mktemp("whole")
    start(f"sample.py {FEW} --out {folder}", workdir)
    return folder


@pytest.fixture
def make(whole, there, tmp_path):
    """A function: sample.py FEW with flags into tmp_path/out -> made()."""
    def make(flags=""):
        main(sample, f"{FEW} --out {tmp_path / 'out'} {flags}")
        return made(tmp_path / "out")

    return make


def test_z_and_pngs_are_kept_if_asked_and_what_is_finished_stays(make, whole, tmp_path):
    out = tmp_path / "out"
    make("--save_z --png")
    with np.load(out / "samples.npz") as kept, np.load(whole / "samples.npz") as plain:
        assert set(plain) == {"arr_0", "y"} and set(kept) == {"arr_0", "y", "z"}
        net, _ = pretrained.load_model("out/ckpt.pt")
        x, z = sample.generate(net, torch.arange(22) % 10, 3, batch_size=4)
        assert (kept["z"] == z.numpy()).all() and (kept["y"] == np.arange(22) % 10).all()
        assert all((file["arr_0"] == data.to_images(x)).all() for file in (kept, plain))
        pngs = np.stack([Image.open(out / f"png/{i:06d}.png") for i in range(22)])
        assert (kept["arr_0"] == pngs).all()
    assert sorted(os.listdir(out)) == [".lock", "png", "samples.json", "samples.npz", "sheet.png"]
    theirs = [out / "png/photo.png", out / "parts/chapter.tex"]
    (out / "parts").mkdir()
    for path in theirs:
        path.write_text("the user's")
    before = content(out)
    for flags in ("--n_samples 3", "--seed 1", "--w_r 1.5", "--n_sheet 3", "--labels random"):
        with pytest.raises(UserError, match=f"another {flags.split()[0]}: .*--restart to replace"):
            make(f"--save_z {flags}")
    make("--save_z")                                       # nothing to do
    assert content(out) == before
    for npz, json_is_there in ((b"damaged", True), (before["samples.npz"], False)):
        (out / "samples.npz").write_bytes(npz)
        json_is_there or os.remove(out / "samples.json")
        with pytest.raises(UserError, match="samples.npz or .*json is damaged.*--restart"):
            make("--save_z")
    assert make("--restart --png --n_samples 2") and len(os.listdir(out / "png")) == 3
    assert make("--restart") == made(whole) and all(path.exists() for path in theirs)


def no_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("batch, rows", [(0, "0 to 3"), (5, "20 to 21")])
def test_after_nan_a_full_disk_or_another_command_nothing_is_in_the_way(
        make, whole, tmp_path, monkeypatch, batch, rows):
    """A batch that is there is not made again; two commands at once do not mix."""
    asked, spoil = [], lambda net, *_: next(net.parameters()).fill_(np.nan)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{rows} hold NaN"):
        ends_at(patch, sample, "image_noise", batch, spoil)
        make("--w_r 3")
    with run.locked(tmp_path / "out"), pytest.raises(UserError, match="another command is writing"):
        make()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        ends_at(patch, run, "write_whole", batch, no_disk)
        make()
    assert not (tmp_path / "out/samples.npz").exists()
    watch(monkeypatch, sample, "sample_batches", lambda net, y, mine, **_: asked.extend(mine))
    assert make() == made(whole) and asked == [*range(batch, 6)]


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_killed_at_any_moment_sampling_ends_in_the_same_bytes(make, whole, tmp_path, n_ranks):
    """In parts, at the sheet, samples.npz, samples.json and after that, at random; also a run that
    replaces other samples; the end by another number of processes."""
    def until_killed(flags, moment):
        if moment < 1:
            signal.setitimer(signal.ITIMER_REAL, moment)                 # no handler: it ends
        else:
            ends_at(pytest.MonkeyPatch(), run, "write_whole", moment)
        make(flags)

    make("--seed 1")
    for flags, moment in (("--restart", 2), ("", 2), ("", np.random.uniform(0, 0.5)), ("", 6),
                          ("", 1)):
        print(flags, moment, in_ranks(lambda: until_killed(flags, moment), n_ranks))
    assert in_ranks(make, 3 - n_ranks) == [0] * (3 - n_ranks)
    assert made(tmp_path / "out") == made(whole)


@pytest.fixture
def saved(workdir, tmp_path, monkeypatch):
    """A function: a network as a checkpoint of digits in tmp_path, the working directory."""
    meta = pretrained.load_checkpoint(f"{workdir}/out/ckpt.pt")["meta"]
    monkeypatch.chdir(tmp_path)

    def save(net, meta=meta, **settings):
        settings = {"sample_steps": 2, "p_drop_z": 0.2, "p_drop_y": 0.1} | settings
        torch.save({"config": net.config, "settings": settings, "meta": meta, "step": 1,
                    "ema": net.state_dict()}, "ckpt.pt")

    return save


@pytest.mark.parametrize("family", ["SiT", "DiT"])
@pytest.mark.parametrize("fusion", model.FUSIONS)
def test_every_kind_of_network_samples_unconditionally(saved, family, fusion):
    saved(tiny(f"{family}-T/2", fusion, 4, 0, 1))
    main(sample, "--ckpt ckpt.pt --n_samples 3")
    with np.load("samples/samples.npz") as file:           # no classes, and z with --save_z alone
        assert set(file) == {"arr_0"} and file["arr_0"].shape == (3, 8, 8, 3)
    assert Image.open("samples/sheet.png").height == (52 if fusion == "none" else 102)
    refused(sample, "--ckpt ckpt.pt --labels balanced --out new", "--labels balanced")
    if fusion == "none":
        refused(sample, "--ckpt ckpt.pt --save_z --out new", "no features.* --fusion none")
        refused(sample, "--ckpt ckpt.pt --z_from x.png --out new", "--z_from needs a model of z")
    assert not os.path.exists("new")


@pytest.mark.parametrize("name, solver, steps, words", [
    ("SiT-T/2", "ddpm", 9, "--solver ddpm is not for SiT; take sde or euler or heun"),
    ("DiT-T/2", "heun", 9, "not for DiT; take ddpm or ddim"),
    ("SiT-T/2", None, 1, "--steps 1: the solver sde takes 2 or more"),
    ("DiT-T/2", None, 1001, "the solver ddpm takes 2 to 1000"), ("DiT-T/2", "ddim", 1, "2 to 1")])
def test_solvers_that_do_not_suit_are_refused(name, solver, steps, words):
    with pytest.raises(UserError, match=words):
        sample.check_solver(name, solver, steps)
    assert sample.check_solver("SiT-T/2", "euler", 1) == "euler"


@pytest.mark.parametrize("fusion, n_classes, settings, flag, words", [
    ("merged", 10, {"p_drop_z": 0}, "w_r", "--p_drop_z > 0; ckpt.pt has 0. Retrain"),
    ("none", 10, {"p_drop_z": 0}, "w_r", "has no features, but --fusion none"),
    ("merged", 0, {}, "w_cfg", "has no classes. Use --w_cfg 1"),
    ("merged", 10, {"p_drop_y": 0}, "w_cfg", "--p_drop_y > 0; ckpt.pt has 0")])
def test_guidance_that_the_model_was_not_trained_for_is_refused(saved, fusion, n_classes, settings,
                                                                flag, words):
    saved(tiny(fusion=fusion, r=4, n_classes=n_classes, x_channels=1), **settings)
    refused(sample, f"--ckpt ckpt.pt --{flag} 2", f"--{flag} 2 needs a model .*{words}")
    main(sample, f"--ckpt ckpt.pt --{flag} 1 --n_samples 2")


def test_published_weights_sample_through_a_vae(photos, tmp_path, monkeypatch, capsys):
    import safetensors.torch
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": published("SiT", 3, learn_sigma=True), "opt": 1}, "redi.pt")
    safetensors.torch.save_file(published("SiT", 3, learn_sigma=True), "redi.safetensors")
    torch.save(published("DiT", 0), "plain.pt")
    few = f"--vae {photos / 'vae'} --n_samples 3 --steps 2 --w_cfg 2 --ckpt"
    warnings = []
    for out, flags in (("a", "redi.pt --w_r 1.5"), ("b", "redi.safetensors --w_r 1.5"),
                       ("c", "plain.pt --model DiT-T/2")):
        main(sample, f"{few} {flags} --out {out}")
        warnings.append(re.findall("warning.*", capsys.readouterr().err))
    assert "--w_r 1.5 needs" in warnings[0][0] and "redi.pt does not record" in warnings[0][0]
    assert [len(each) for each in warnings] == [1, 1, 0]
    assert made(tmp_path / "a") == made(tmp_path / "b")
    assert np.load("a/samples.npz")["arr_0"].shape == (3, 32, 32, 3)    # the VAE's factor is 4
    assert [data.read_json(f"{out}/samples.json")["settings"]["solver"]
            for out in "ac"] == ["sde", "ddpm"]
    for flags, words in (("redi.pt --labels 10", "some of 0 to 9"),
                         ("redi.pt --z_from x", "encoder"),
                         ("plain.pt --model SiT-T/2 --w_r 2", "--fusion none"),
                         ("redi.pt --model SiT-XXL/2", "there are DiT-T/2")):
        refused(sample, f"{few} {flags} --out d", words)
    assert not os.path.exists("d")


def test_another_vae_is_warned_of_and_one_of_other_shapes_refused(saved, photos, prepared, capsys):
    import diffusers
    saved(tiny(r=4, x_channels=4), prepared.meta)
    for name, levels, channels in (("same", 3, 4), ("wide", 3, 5), ("small", 2, 4)):
        diffusers.AutoencoderKL(
            norm_num_groups=4, block_out_channels=[8] * levels, latent_channels=channels,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels).save_pretrained(name)
    flags = "--ckpt ckpt.pt --n_samples 2"
    for again in ("", f"--restart --vae {photos / 'vae'}"):             # the same, said or not
        main(sample, f"{flags} {again}")
        assert "warning" not in capsys.readouterr().err
    main(sample, f"{flags} --vae same --out other")
    assert "same is not the VAE that made the data" in capsys.readouterr().err
    for vae, words in (("wide", "32 pixels from 5 channels, the data have 32 and 4"),
                       ("small", "16 pixels from 4"), ("nowhere", "--vae nowhere: no config.json")):
        refused(sample, f"{flags} --vae {vae} --out new", words)


@pytest.mark.parametrize("flags, words", [
    ("--ckpt nowhere.pt", "no checkpoint at nowhere.pt"), ("--n_samples 0", "--n_samples"),
    ("--w_cfg nan", "--w_cfg"), ("--cfg_interval 0.9,0.1", "--cfg_interval"),
    ("--compare", "--compare shows"), ("--vae there", "pixels, which no VAE"),
    ("--device nonsense", "--device nonsense"),
    ("--ckpt prepared/digits/meta.json", "neither a checkpoint of train.py nor"),
    ("--z_from x.png", "x.png is no image"),
    *((f"--z_from prepared/digits:{rows}", "rows are 0 to 1617") for rows in ("1,1618", "-1"))])
def test_mistakes_in_sampling_are_one_line_and_write_nothing(there, capsys, flags, words):
    refused(sample, f"{flags} --out new", words, capsys)
    assert not os.path.exists("new")


def test_variations_have_the_z_of_the_given_images_and_their_classes(saved, there, tmp_path,
                                                                     monkeypatch):
    """Rows of a prepared folder or files, which have no class; none of other encoders."""
    asked, pictures = [], []
    watch(monkeypatch, sample, "generate",
          lambda net, y, **options: asked.append((y.tolist(), options["seed"])))
    dataset = data.open_data("digits", 4)
    x, z, y, _ = dataset.unpack(dataset.read([3, 1500]))
    for name, image in zip(("a.png", "b.png"), data.to_images(x)):
        Image.fromarray(image).save(tmp_path / name)
    for given in ("prepared/digits:3,1500", f"{tmp_path}/a.png {tmp_path}/b.png",
                  "prepared/digits:3 --labels 7"):
        main(sample, f"--steps 3 --out {tmp_path} --z_from {given}")
        pictures.append(np.asarray(Image.open(tmp_path / "variations.png")).astype(int)[:, -102:])
    assert asked == [(of, seed) for of in (y.tolist(), [10, 10], [7]) for seed in range(4)]
    assert len(pictures[0]) == 6 * 50 + 2                   # given, its z and four samples
    assert np.abs(pictures[0] - pictures[1])[:100].max() <= 2            # stored as float16
    alone = sample.versions_grid([("", data.to_images(x), z)], dataset.meta["z_std"])
    assert np.abs(pictures[0][:100] - np.asarray(alone).astype(int)[:100]).max() <= 1
    assert not (pictures[0][100:150] == pictures[0][150:200]).all()
    saved(tiny(r=4, x_channels=1), dataset.meta | {"z_size": 5})
    refused(sample, f"--ckpt ckpt.pt --z_from prepared/digits:1",
            "digits has z_size 4; ckpt.pt was trained with 5")


# fid.py

def test_frechet_distance_is_scipys_and_exact_where_covariances_are_singular():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(50, 6)), rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6)) + 1
    mu, cov, mu_2, cov_2 = moments = [one.mean(0), np.cov(one.T), two.mean(0), np.cov(two.T)]
    root = scipy.linalg.sqrtm(cov @ cov_2).real
    wanted = ((mu - mu_2) ** 2).sum() + np.trace(cov + cov_2 - 2 * root)
    assert fid.frechet_distance(*moments) == pytest.approx(wanted, rel=1e-9)
    assert fid.distance_of_features(one, two) == pytest.approx(wanted, rel=1e-9)
    for wrong, words in (((mu, cov, mu, cov[:5, :5]), "different spaces"),
                         ((mu, cov * np.nan, mu, cov), "NaN")):
        with pytest.raises(ValueError, match=words):
            fid.frechet_distance(*wrong)
    d, rank = 400, 40                                                   # fewer images than channels
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    few, var = rng.normal(size=(50, d)), rng.random(d) * (np.arange(d) < rank)
    mu, cov, diagonal = few.mean(0), np.cov(few.T), basis * var @ basis.T
    assert fid.frechet_distance(mu, cov, mu, cov) < 1e-10 * np.trace(cov)
    cross = np.linalg.norm(scipy.linalg.svdvals((few - mu) @ basis * np.sqrt(var)), 1)
    assert fid.frechet_distance(mu, cov, 0 * mu, diagonal) == pytest.approx(
        (mu ** 2).sum() + np.trace(cov) + var.sum() - 2 * cross / 7, rel=1e-9)


def inception_weights():
    """Random weights in the format of pt_inception-2015-12-05-6726825d.pth, by name."""
    import timm
    with torch.device("meta"):
        shapes = timm.create_model("inception_v3", num_classes=1008).state_dict()
    weights = {}
    for name, meta in shapes.items():
        part = named_weights(name, meta.shape) / 0.15
        if name.endswith("conv.weight"):
            part *= (2 / part[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            part = 1 + 0.2 * part.clamp(-3, 3)
        weights[name] = part if part.ndim else torch.tensor(0)          # num_batches_tracked
    return weights


INCEPTION_PEER = {  # size: torch-fidelity's features of random images, pool, spatial, logits
    32: [26.155, 9.7621, 0.63621, 3.4469, 3.2613, 0.0, 70.309, -113.91, -807.87],
    320: [26.647, 10.396, 0.64225, 2.9656, 3.247, 0.0, 67.342, -133.96, -843.71],
}


def random_images(size):
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)


def thin_features(features):
    return [value for part in features for value in part.flatten()[::len(part.flatten()) // 3][:3]
            .tolist()]


def record_inception_peer(folder):
    """Print INCEPTION_PEER from torch-fidelity 0.4.0, in that folder."""
    sys.path.insert(0, folder)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(inception_weights(), file.name)
        net = FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], file.name)
    spatial = []
    net.Mixed_6d.register_forward_hook(lambda block, args, h: spatial.append(h[:, :7].flatten(1)))
    for size in (32, 320):
        pool, logits = net(random_images(size))
        values = thin_features([pool, spatial.pop(), logits])
        print(f"    {size}: {[float(f'{value:.5g}') for value in values]},")


def test_inception_equals_torch_fidelitys(tmp_path, monkeypatch):
    """Its distance is FID if its file has the published one's sha256, and only then."""
    path = tmp_path / "weights.pth"
    torch.save(inception_weights(), path)
    space = fid.Space("inception", path)
    for size, peer in INCEPTION_PEER.items():
        features = space(random_images(size).permute(0, 2, 3, 1).numpy())
        assert [part.shape for part in features] == [(2, 2048), (2, 2023), (2, 1008)]
        assert thin_features(features) == pytest.approx(peer, rel=1e-4)
    assert not space.published and not fid.is_published(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(fid, "INCEPTION", f"https://there/b-{digest[:8]}.pth")
    assert fid.is_published(path)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """a.npz, a.npy, a/ hold the same 12 images; b.npz others."""
    monkeypatch.chdir(tmp_path)
    a, b = np.random.default_rng(0).integers(0, 256, (2, 12, 9, 8, 3), np.uint8)
    b = (0.9 * b + 10).astype(np.uint8)
    np.savez("a.npz", arr_0=a, y=np.zeros(12, int))
    np.savez_compressed("b.npz", arr_0=b)
    np.save("a.npy", a)
    os.mkdir("a")
    for i, image in enumerate(a):
        Image.fromarray(image).save(f"a/{i:06d}.png")
    return a, b


def metrics_of(flags, capsys):
    capsys.readouterr()
    main(fid, flags)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def timms(sets):
    """Two small networks of timm's by name, their weights in NAME.pth, beside sets."""
    import timm
    nets = {name: timm.create_model(name).eval() for name in ("test_vit", "test_resnet")}
    for name, net in nets.items():
        torch.save(net.state_dict(), f"{name}.pth")
    return nets


def test_a_space_has_timms_pooled_features_of_its_weights_and_settings_in_float32(
        sets, timms, monkeypatch):
    """On GPUs, too."""
    net, images = timms["test_vit"], torch.from_numpy(sets[0]).permute(0, 3, 1, 2)
    plain, large, other = (fid.Space("test_vit", "test_vit.pth", settings) for settings in (
        None, {"img_size": 192}, {"mean": 0.5, "std": 0.25}))
    x = torch.nn.functional.interpolate(images / 255, (160, 160), mode="bicubic", antialias=True)
    own = [torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std")]
    for space, (shift, scale) in ((plain, own), (other, (0.5, 0.25))):
        h = net.forward_features((x.clamp(0, 1) - shift) / scale)
        expected = net.forward_head(h, pre_logits=True).detach().numpy()
        assert space(sets[0])[0] == pytest.approx(expected, abs=1e-5)
    assert len({plain.weights, large.weights, other.weights}) == 3 and large.size == 192
    seen, cudnn = [], torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    plain.net.register_forward_hook(lambda *_: seen.append((cudnn.enabled, cudnn.allow_tf32)))
    plain(sets[0])
    assert seen == [(True, False)]
    with imagined_gpu():
        for name in ("mean", "std"):
            setattr(plain, name, getattr(plain, name).to("cuda"))
        plain.net.to("cuda")
        features, = plain.features(images.to("cuda"))
        assert (features.device.type, features.dtype) == ("cuda", torch.float32)


def test_moments_are_kept_and_of_one_space_and_flags_that_do_not_fit_refused(
        sets, timms, capsys, monkeypatch):
    """Moments of another pooling are of another space. Before any image is measured."""
    flags = "--features test_resnet --weights test_resnet.pth"
    row = metrics_of(f"a.npz b.npz {flags} --save_stats kept", capsys)
    assert metrics_of(f"a.npz kept {flags}", capsys) == row | {"reference": "kept"}
    np.savez("stranger", mu=np.zeros(216), sigma=np.eye(216), space="pixels", weights=5)
    monkeypatch.setattr(fid, "measure", None)
    for wrong, words in (
            (f"kept {flags} --features_kwargs global_pool=max", "give its images, or"),
            (f"b.npz {flags} --features_kwargs global_pool=", "not .B, d."),
            ("b.npz --features test_vit --weights test_resnet.pth", "cannot be had"),
            ("b.npz --weights test_resnet.pth", "not the weights of the 2015 Inception"),
            ("b.npz --weights nowhere", "no file nowhere"),
            ("b.npz --save_stats kept", "kept is there already"),
            ("b.npz --features pixels --weights test_vit.pth", "--weights means nothing"),
            ("digits --features pixels", "judges of its own"),
            ("digits --device x", "judges of its own"),
            ("stranger.npz --features pixels", "holds moments of pixels 5, not of pixels"),
            ("digits", r"images of \(9, 8\)")):
        refused(fid, f"a.npz {wrong}", words, capsys)


def test_precision_and_recall_are_those_of_scikit_learns_neighbours():
    from sklearn.neighbors import NearestNeighbors
    samples, reference = normal(80, 4), 1.5 * normal(60, 4, seed=1) + 0.5

    def inside(points, centres):
        distances, _ = NearestNeighbors(n_neighbors=4).fit(centres).kneighbors(centres)
        away = np.linalg.norm(points[:, None] - centres[None], axis=2)
        return (away <= distances[:, 3]).any(1).mean()                  # 0 is the point itself

    expected = [inside(*(pair.numpy() for pair in pairs))
                for pairs in ((samples, reference), (reference, samples))]
    for block in (7, 1024):
        assert fid.precision_and_recall(samples, reference, block=block) == pytest.approx(expected)
    assert 0.3 < expected[1] < expected[0] < 1
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_and_recall(samples, reference[:3])
    with NoDoubles():
        fid.precision_and_recall(samples.float(), reference.float())


def test_images_are_the_same_from_every_kind_of_source(sets, capsys):
    """What a file is, its content says, not its name; and it is read in batches."""
    a, b = sets
    expected = fid.distance_of_features(*(part.reshape(12, -1) / 127.5 - 1 for part in (a, b)))
    for path, copy in (("a.npz", "a.NPY"), ("a.npy", "images"), ("b.npz", "b.pt")):
        shutil.copy(path, copy)
    for path in ("a.npz", "a.NPY", "a.npy", "images", "a"):
        parts = list(fid.ImageSet(path).batches(5, workers=2))
        assert [len(part) for part in parts] == [5, 5, 2] and (np.concatenate(parts) == a).all()
        row = metrics_of(f"{path} b.pt --features pixels --batch_size 5", capsys)
        assert row["frechet_pixels_12_vs_12"] == pytest.approx(expected, rel=1e-4)
    np.savez_compressed("large.npz", arr_0=np.zeros((300, 256, 256, 3), np.uint8))    # 60 MB
    tracemalloc.start()
    assert sum(len(part) for part in fid.ImageSet("large.npz").batches(10)) == 300
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10e6


class Quick:
    """A space as inception is, of its three features quickly made."""
    name, weights, device, published = "inception", "abc", "cpu", True
    mix = [normal(216, d, seed=d).numpy() / 300 for d in (6, 5, 10)]

    def __call__(self, images):
        x = images.transpose(0, 3, 1, 2).reshape(len(images), -1).astype(np.float32)
        return [x @ part for part in self.mix]


def test_all_five_metrics_in_adms_layout(sets, capsys, monkeypatch):
    """The reference stores moments of all images, and some of these for the manifold. FID is what
    the published Inception says of 50,000 samples: no other weights, and no fewer."""
    a, b = sets
    space = Quick()
    monkeypatch.setattr(fid, "Space", lambda *args: space)
    monkeypatch.setattr(fid, "SPLIT", 5)
    row, f_a, f_b = metrics_of("a.npz b.npz --batch_size 3", capsys), space(a), space(b)
    for name, *both in (("fid", f_a[0], f_b[0]), ("sfid", f_a[1], f_b[1])):
        assert row[f"{name}_12_vs_12"] == pytest.approx(fid.distance_of_features(*both), rel=1e-6)
    assert 0.5 < row["precision"] < row["recall"] and (row["precision"], row["recall"]) == (
        fid.precision_and_recall(torch.tensor(f_a[0]), torch.tensor(f_b[0])))
    splits = [scipy.special.softmax(part.astype(float), 1) for part in np.split(f_a[2], [5, 10])]
    scores = [np.exp(np.mean([scipy.stats.entropy(p, split.mean(0)) for p in split]))
              for split in splits]                                      # exp of the mean KL
    assert row["inception_score"] == pytest.approx(np.mean(scores), rel=1e-9)
    moments = {"mu": f_b[0].mean(0), "sigma": np.cov(f_b[0].T), "mu_s": f_b[1].mean(0),
               "sigma_s": np.cov(f_b[1].T)}
    np.savez("adm.npz", arr_0=b[:6], **moments)                         # as VIRTUAL_imagenet256
    adm = metrics_of("a.npz adm.npz --save_stats kept", capsys)
    for name in ("fid", "sfid"):
        assert adm[f"{name}_12_vs_stored"] == pytest.approx(row[f"{name}_12_vs_12"], rel=1e-6)
    assert adm["recall"] == fid.precision_and_recall(*map(torch.tensor, (f_a[0], f_b[0][:6])))[1]
    assert metrics_of("a.npz kept", capsys) == adm | {"reference": "kept"}
    for wrong, words in (({"mu": np.zeros(3), "sigma": np.eye(3)}, "different spaces"),
                         (moments | {"pool": np.zeros(9)}, "cannot be compared")):
        np.savez("wrong.npz", **wrong)
        refused(fid, "wrong.npz a.npz", words)
    for space.published, n, expected in (
            (True, 50_000, ["fid", "sfid"]), (True, 49_999, ["fid_49999_vs_7", "sfid_49999_vs_7"]),
            (False, 50_000, [f"frechet_inception{part}_50000_vs_7" for part in ("", "_spatial")])):
        assert list(fid.metrics_between(moments | {"n": n}, moments | {"n": 7}, space)) == expected


def test_images_that_are_none_are_one_line(sets):
    a, _ = sets
    moments = {"mu": np.full(216, np.nan), "space": "pixels", "weights": ""}
    for name, arrays, words in (
            ("floats", {"arr_0": a / 255}, "got float64"), ("one", {"arr_0": a[:1]}, "two or more"),
            ("other", {"images": a}, "arr_0"), ("means", moments, "moments .*sigma"),
            ("objects", {"arr_0": np.array([{}, {}], object)}, "object"),
            ("large", {"arr_0": np.zeros((2, 60, 60, 3), np.uint8)}, "d at most"),
            ("nan", moments | {"sigma": np.eye(216)}, "NaN")):
        np.savez(f"{name}.npz", **arrays)
        refused(fid, f"{name}.npz a.npz --features pixels", words)
    torch.save({"a": torch.zeros(3)}, "weights.pt")
    for name in ("broken", "mixed"):
        shutil.copytree("a", name)
    npz, npy, png = (pathlib.Path(name).read_bytes() for name in ("a.npz", "a.npy", "a/000002.png"))
    at = len(npz) // 2
    for name, content in (("flipped", npz[:at] + bytes([npz[at] ^ 1]) + npz[at + 1:]),    # its end
                          ("text", b"text"), ("short", npz[:900]), ("short.npy", npy[:900]),
                          ("broken/000002.png", png[:len(png) // 2])):
        pathlib.Path(name).write_bytes(content)
    Image.new("L", (9, 9)).save("mixed/000003.png")
    os.mkdir("empty")
    for path, words in (
            *((name, f"{name} cannot be read") for name in (
                "flipped", "text", "short", "short.npy", "a/000002.png", "nowhere")),
            ("broken", "2.png is no image"), ("weights.pt", "arr_0"), ("empty", "holds no files"),
            ("mixed", r"000003.png has \(9, 9\) pixels, .* the first's \(9, 8\)")):
        refused(fid, f"{path} a.npz --features pixels", words)
    refused(fid, "a.npz mixed --features pixels", "to the size of square samples")


def test_a_reference_folder_is_cropped_as_training_images_are(tmp_path, monkeypatch, capsys):
    """Grey, CMYK, RGBA and photographs of any size; the report says how many. Samples are not."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("photos")
    for i, (mode, size) in enumerate([("RGB", (16, 16)), ("L", (40, 16)), ("CMYK", (16, 37)),
                                      ("RGBA", (90, 50)), ("RGB", (16, 16))]):
        image = Image.fromarray(photo(*size, seed=i)).convert(mode)
        image.save(f"photos/{i}.{'tif' if mode == 'CMYK' else 'png'}")
    cropped = np.stack([data.load_image(f"photos/{name}", 16)
                        for name in sorted(os.listdir("photos"))])
    np.savez("cropped", arr_0=cropped)
    row = metrics_of("cropped.npz photos --features pixels --save_stats kept", capsys)
    assert row["frechet_pixels_5_vs_5"] < 1e-6 and (row["n_cropped"], row["cropped_to"]) == (3, 16)
    refused(fid, "photos cropped.npz --features pixels", r"\(16, 40\) pixels")
    refused(fid, "kept photos --features pixels", r"\(16, 40\) pixels")  # nothing says what size
    os.mkdir("grey")
    for i, image in enumerate(cropped):
        Image.fromarray(image).convert("L").save(f"grey/{i}.png")
    assert "n_cropped" not in metrics_of("grey grey --features pixels", capsys)


def test_the_judges_read_real_digits_and_not_noise(tmp_path, capsys):
    x, y, held_out = data.digits()
    images, y = data.to_images(x[held_out]), y[held_out].numpy()
    np.savez(tmp_path / "real", arr_0=images, y=y)
    real = metrics_of(f"{tmp_path}/real.npz digits", capsys)
    assert real["classifier_accuracy_percent"] == real["classifier_accuracy_on_real_percent"] > 98
    assert max(real[f"frechet_{name}_179_vs_179"] for name in ("pixels", "classifier")) < 1e-6
    rng = np.random.default_rng(0)
    noise = np.repeat(rng.integers(0, 256, (400, 8, 8, 1), np.uint8), 3, -1)
    judged = fid.judge_digits(noise, rng.integers(0, 10, 400))
    assert judged["classifier_accuracy_percent"] < 30 and judged["frechet_pixels_400_vs_179"] > 5
    assert judged.items() >= {f"{name}_400_vs_179": distance for name, distance in
                              fid.digit_distances(noise, images).items()}.items()
    assert not any("accuracy" in name for name in fid.judge_digits(noise))         # without classes
    _, mlp = fid.digit_classifiers()
    last = fid.hidden_layer(images) @ mlp.coefs_[1] + mlp.intercepts_[1]
    assert (last.argmax(1) == mlp.predict(fid.grey_pixels(images))).all()
    np.savez(tmp_path / "real", arr_0=images, y=y[1:])
    refused(fid, f"{tmp_path}/real.npz digits", "y cannot be read")


# bench.py

def test_flop_are_the_published_ones():
    """6.06 and 118.64 GMAC a forward pass at 256 tokens, 2 FLOP each."""
    for name, gmac in (("SiT-S/2", 6.06), ("SiT-XL/2", 118.64)):
        flop = bench.forward_flop({"name": name, "fusion": "merged", "r": 8})
        assert flop / 2e9 == pytest.approx(gmac, rel=0.01)


def test_speed_counts_images_of_its_own_steps(tmp_path, monkeypatch, capsys):
    """When everything takes half a second; MFU follows from FLOP, the first round warms up."""
    done = []
    monkeypatch.setattr(bench, "random_data", functools.partial(bench.random_data, n=8))
    monkeypatch.setattr(bench, "seconds_of", lambda work, device: (work(), 0.5)[1])
    watch(monkeypatch, train.Trainer, "training_step", lambda _, part: done.append(len(part["x"])))
    watch(monkeypatch, sample, "generate", lambda net, y, steps, **_: done.append((len(y), steps)))
    main(bench, "speed --models SiT-T/2 --methods none merged --batch_size 4 --steps 2 --rounds 2 "
                f"--sample_steps 3 --micro_batch_size 2 --device cpu --rows {tmp_path}/rows")
    assert done == [4, 4, (4, 3)] * 3 * 2
    for row, method in zip(rows_of(tmp_path / "rows"), ("none", "merged"), strict=True):
        flop = bench.forward_flop({"name": "SiT-T/2", "fusion": method, "r": 8})
        assert row["training_images_per_s"] == [16.0] * 3                # 2 steps of 4 in 0.5 s
        assert row["sampling_images_per_s"] == pytest.approx([4 * 3 / 250 / 0.5] * 3)
        assert row["mfu_percent"] == pytest.approx(100 * 3 * flop * 16 / (2 * 2048 ** 3 / 0.5))
    assert "| SiT-T/2 | merged | 16 (16 to 16) |" in capsys.readouterr().out
    refused(bench, f"speed --models SiT-T/2 --device cpu --official {tmp_path}", "clone of zelaki")


METHOD = ("methods --points 2 3 --only SiT-unconditional-merged-1 --n_samples 10 "
          "--sample_steps 2 --out r/rows.jsonl")


@pytest.fixture
def beside(workdir, tmp_path, monkeypatch):
    """An empty working directory, but for the prepared digits."""
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared/digits").symlink_to(workdir / "prepared/digits")
    monkeypatch.chdir(tmp_path)


def test_methods_makes_each_row_once_also_where_it_was_killed(beside, monkeypatch):
    """Rows are what sampling and judging give directly. Processes share the runs."""
    calls = []
    monkeypatch.setattr(fid, "digit_distances", lambda images, reference: {   # cheaper, as telling
        f"frechet_{name}": float(images.mean(dtype=float)) for name in ("classifier", "pixels")}
        | {"n_reference": len(reference)})
    watch(monkeypatch, train, "main", lambda args: calls.append("train"))
    watch(monkeypatch, bench, "judged", lambda path, key, device: (
        calls.append(key) if len(calls) != 3 else 1 / 0))
    with pytest.raises(ZeroDivisionError):                                # the third is not judged
        main(bench, METHOD)
    rows = pathlib.Path("r/rows.jsonl")
    rows.write_text(rows.read_text() + '{"family": "SiT", "cond')         # nor a fourth written
    calls.append("killed")
    main(bench, METHOD)
    name = METHOD.split()[5]
    _, plan = bench.planned(bench.parser().parse_args(METHOD.split()))[name]
    assert calls == ["train", *plan[:2], "killed", *plan[2:]] and len(plan) == 7
    lines = rows.read_text().splitlines()
    made = [json.loads(line) for line in lines if line.endswith("}")]
    assert len(lines) == len(made) + 1 and made[0]["n_reference"] == 1797
    net, _ = pretrained.load_model(f"runs/digits/{name}/ema_0000003.pt")
    for row, key in zip(made, plan, strict=True):
        assert key.items() <= row.items() and row["frechet_pixels_10_vs_179"] > 0
        if (row["step"], row["method"]) == (3, "merged"):
            y = torch.zeros(10, dtype=torch.long)
            x, _ = sample.generate(net, y, 2, seed=1, w_r=row["w_r"], batch_size=125)
            assert row["frechet_classifier"] == data.to_images(x).mean(dtype=float)
    assert len([*pathlib.Path(f"runs/digits/{name}").glob("ema_*")]) == 2
    assert os.path.exists("assets/methods.png") and "3 steps" in open("r/rows.md").read()
    shutil.rmtree("runs")                                                 # rows are enough
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, command in ((0, METHOD), (1, METHOD.replace("merged", "separate"))):
        monkeypatch.setenv("RANK", str(rank))                             # the only run is rank 0's
        main(bench, command)
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(calls) == 9                                                # nothing is made again
    refused(bench, "methods --only SiT-0", "in no run's name")


def test_the_plan_of_methods_has_every_run_and_row_the_most_telling_first():
    plan = bench.planned(bench.parser().parse_args(["methods"]))
    keys = [key for _, keys in plan.values() for key in keys]
    assert len(plan) == 44 + 8 and len({json.dumps(key) for key in keys}) == len(keys)
    assert len(keys) == 52 * 6 + 5 * 2 * 3 + 2 * (5 + 3)                 # points, RG, real z
    assert [(settings["seed"], settings.get("fusion"), settings["unconditional"])
            for settings, _ in plan.values()][:20] == [
        (seed, fusion, unconditional) for unconditional in (True, False)
        for seed in range(5) for fusion in ("none", None)]


def test_the_sweep_trains_on_z_of_another_unit(beside, monkeypatch):
    """Its z is the digits' own, but for one factor."""
    args, seen = bench.parser().parse_args(METHOD.split()), []
    monkeypatch.setattr(bench, "judged", lambda *_: {})
    monkeypatch.setattr(train, "main", seen.append)                       # it trains elsewhere
    name = "SiT-unconditional-merged-z-RMS-3-lam_z-0.25-0"
    settings, keys = bench.planned(args)[name]
    bench.make_rows(args, name, settings, keys)
    z, unit = (data.open_data(folder, 4).read(range(9))[1].float()
               for folder in (seen[0].data, "digits"))
    assert z.numpy() == pytest.approx(3 * unit.numpy(), rel=2e-3) and seen[0].lam_z == 0.25


def test_the_figure_and_the_steps_fewer_of_curves_with_a_known_answer():
    """Distance 1000 / steps without ReDi, 2 or 3 times less with it: as many times fewer steps."""
    points = np.array([100, 200, 400, 800])
    rows = [{"setting": "SiT conditional", "method": method, "seed": seed, "step": int(step),
             "w_r": 1.0, "n_samples": 9, "frechet_pixels": 1 + (method == "merged"),
             "frechet_classifier": 1000 / step / (2 + seed if method == "merged" else 1)}
            for method in ("none", "merged") for seed in (0, 1) for step in points]
    halves = [{"frechet_classifier": 0.5}, {"frechet_classifier": 0.7}]
    shown = bench.table(rows, halves, "frechet_classifier")
    assert "| SiT conditional merged | 1 | 2 | 4.17 ± 1.18 | 2.08 ± 0.59 |" in shown
    assert "for the same distance | | 2 |  |  | 2.50 ± 0.71 | 2.50 ± 0.71 |" in shown
    assert "other | | 2 | 0.60 ± 0.14 |" in shown
    assert "merged | 1 | 2 | 2.00 ± 0.00* |" in bench.table(
        rows, [{"frechet_pixels": 0}], "frechet_pixels")
    panel, = bench.figure(rows, halves).axes
    assert [text.get_text() for text in panel.texts] == ["", "", "2.5×", "2.5×"]
    assert panel.lines[1].get_xydata() == pytest.approx(
        np.stack([points, 1000 / points * 5 / 12], 1))                    # the mean of 1/2 and 1/3
    assert bench.steps_to(3, {10: 9, 20: 4, 40: 5, 80: 1}) == pytest.approx(
        40 * 2 ** (np.log(4 / 3) / np.log(4)))
    assert bench.steps_fewer({0: {1: 2, 4: 1}}, {0: {1: 4, 4: 2}}, 4) == [0.25]         # ReDi lags


def test_losses_over_time_are_mean_squares_with_and_without_z(there, digits, capsys):
    main(bench, "losses --n_images 70 --device cpu --data prepared/digits")             # 64 and 6
    header, _, *lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ["x", "z", "x, z dropped"]
    net, _ = pretrained.load_model("out/ckpt.pt")
    x, z, y, _ = digits.unpack(digits.read(digits.examples(70)))
    noise = train.sample_noise(0, 0, 70, slice(None), net)
    t, eps_x, eps_z = torch.full((70,), 0.35), noise["eps_x"], noise["eps_z"]
    x_t, z_t = 0.35 * x + 0.65 * eps_x, 0.35 * z + 0.65 * eps_z
    (pred_x, pred_z), (null_x, _) = (net(x_t, seen, t, y) for seen in (z_t, 0 * z_t))
    expected = [(pred - target).square().mean().item() for pred, target in (
        (pred_x, x - eps_x), (pred_z, z - eps_z), (null_x, x - eps_x))]
    assert [float(line[header.index("t = 0.35")]) for line in lines] == pytest.approx(
        expected, abs=6e-4)


if __name__ == "__main__":
    redi, dit, torch_fidelity = sys.argv[1:]
    record_peers(redi, dit)
    record_sde_peers(redi)
    record_inception_peer(torch_fidelity)
