"""The evidence, one section per file: model, data, pca, train, sample, fid, command lines.

    pytest                                   # CPU, no network
    python test_redi.py ReDi DiT TF          # records the peers' numbers anew, from two clones and
                                             # the folder where torch-fidelity is installed
"""
import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
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
import sample
import train

HERE = pathlib.Path(__file__).parent
ALL = slice(None)
train.N_JUDGED = train.JUDGED_AT_ONCE = 25                              # seldom looked at here
DOUBLE = torch.float64


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny(name="SiT-T/2", fusion="merged", r=3, n_classes=10, x_channels=2, x_size=8, seed=0):
    """A small network whose weights are all random, so that every part of it matters."""
    net = model.build(name, fusion, r, n_classes, x_channels, x_size)
    for i, p in enumerate(net.parameters()):
        p.data = 0.1 * normal(*p.shape, seed=seed + i)
    return net.eval().requires_grad_(False)


def inputs(net, B=4, seed=0):
    """x_t, z_t, t, y for net."""
    size = (net.x_size, net.x_size)
    t = net.process.draw_t(torch.linspace(0.1, 0.9, B))
    z_t = normal(B, net.r, *size, seed=seed + 1) if net.r else None
    y = torch.arange(B) % (net.n_classes or 1)
    return normal(B, net.x_channels, *size, seed=seed), z_t, t, y


# model.py

def test_names_are_parsed_strictly():
    assert model.parse_name("DiT-XL/8") == ("DiT", "XL", 8)
    assert len(model.NAMES) == len(set(model.NAMES)) == 2 * 5 * 3
    for wrong in ("SiT-XL2", "sit-XL/2", "SiT-XL/3", "SiT-H/2", "UNet", "SiT-XL/2 "):
        with pytest.raises(ValueError, match="SiT-XL/2"):
            model.build(wrong)


@pytest.mark.parametrize("size, published", [("S", 32_883_504), ("B", 130_352_688),
                                             ("L", 457_889_840), ("XL", 674_890_032)])
def test_parameter_counts_are_the_published_ones_and_a_bias(size, published):
    with torch.device("meta"):
        net = model.build(f"SiT-{size}/2", fusion="merged", r=8)
    width = model.SIZES[size][1]
    assert sum(p.numel() for p in net.parameters()) == published + width


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
    net, seen = tiny(fusion=fusion), []
    net.blocks[0].register_forward_hook(lambda block, args, h: seen.append(h.shape[1]))
    net(*inputs(net))
    assert seen == [tokens]


@pytest.mark.parametrize("fusion", ["merged", "separate"])
def test_each_modality_reaches_both_predictions(fusion):
    net = tiny(fusion=fusion)
    x_t, z_t, t, y = inputs(net)
    plain = net(x_t, z_t, t, y)
    for other in (net(x_t + 1, z_t, t, y), net(x_t, z_t + 1, t, y)):
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, other))


def test_a_token_is_a_patch_of_x_and_of_z_in_its_place():
    """Without attention's mixing a change of one patch changes the prediction there only."""
    net = tiny("SiT-T/4")
    for block in net.blocks:
        block.attn.proj.weight.zero_()
    x_t, z_t, t, y = inputs(net)
    z_2 = z_t.clone()
    z_2[:, :, 4:, :4] += 1
    for a, b in zip(net(x_t, z_t, t, y), net(x_t, z_2, t, y)):
        changed = (a != b).any(0).any(0)
        assert changed[4:, :4].all() and changed.sum() == 16


def test_unconditional_nets_have_one_label_and_fusion_none_no_z():
    net = model.build("DiT-T/2", "none", r=8, n_classes=0, x_channels=1, x_size=8)
    assert net.y_embedder.embedding_table.weight.shape == (1, 128) and net.r == 0
    pred_x, pred_z = net(normal(2, 1, 8, 8), None, torch.tensor([0, 999]), torch.zeros(2).long())
    assert pred_x.shape == (2, 2, 8, 8) and pred_z is None


def test_flow_target_is_the_derivative_of_the_path():
    flow = model.Flow()
    x, eps = (normal(3, 2, 4, 4, seed=seed, dtype=DOUBLE) for seed in range(2))
    t, h = torch.tensor([0.1, 0.5, 0.9], dtype=DOUBLE), 1e-5
    derivative = (flow.add_noise(x, eps, t + h) - flow.add_noise(x, eps, t - h)) / (2 * h)
    assert flow.loss(derivative, x, eps, t).max() < 1e-18
    assert flow.loss(derivative + 2, x, eps, t).allclose(torch.full((3,), 4.0, dtype=DOUBLE))
    one, zero = torch.ones(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    assert torch.equal(flow.add_noise(x, eps, one), x)
    assert torch.equal(flow.add_noise(x, eps, zero), eps)


@pytest.mark.parametrize("process, t", [(model.Flow(), 0.3), (model.DDPM(), 300)])
def test_x_hat_and_score_follow_from_the_true_prediction(process, t):
    x, eps = normal(2, 3, 4, 4, dtype=DOUBLE), normal(2, 3, 4, 4, seed=1, dtype=DOUBLE)
    x_t = process.add_noise(x, eps, torch.full((2,), t))
    pred = x - eps if process.outputs == 1 else torch.cat([eps, eps], 1)
    sigma = 1 - t if process.outputs == 1 else process.sigma[t]
    assert process.x_hat(pred, x_t, t).allclose(x, atol=1e-6)
    assert process.score(pred, x_t, t).allclose(-eps / sigma, atol=1e-6)


def test_ddpm_has_the_published_schedule():
    beta = np.linspace(1e-4, 0.02, 1000)
    ddpm = model.DDPM()
    assert np.allclose(ddpm.alpha.numpy() ** 2, np.cumprod(1 - beta), rtol=1e-12)
    assert np.allclose(ddpm.beta.numpy(), beta, rtol=1e-9)
    assert ddpm.data_time(torch.tensor([0, 999])).tolist() == [1, 0]
    assert model.DDPM().draw_t(torch.tensor([0, 0.9999999])).tolist() == [0, 999]


def test_vlb_is_the_kl_of_torch_distributions():
    """Against KL(Normal, Normal) on the textbook posterior, and exact bins of the CDF at t = 0."""
    t = torch.tensor([0, 0, 1, 10, 500, 999])
    x, eps, noise = (normal(6, 2, 4, 4, seed=s, dtype=DOUBLE) for s in range(3))
    x = x.clamp(-1, 1)                                                   # many in the outer bins
    pred_eps, out = eps + 0.1 * noise, normal(6, 2, 4, 4, seed=3, dtype=DOUBLE)
    ddpm = model.DDPM()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=DOUBLE)
    bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1), bar[:-1]])
    tilde = beta * (1 - before) / (1 - bar)
    tilde[0] = tilde[1]
    b, a, p, v = (table[t].view(-1, 1, 1, 1) for table in (beta, bar, before, tilde))
    x_t = a.sqrt() * x + (1 - a).sqrt() * eps
    x_hat = (x_t - (1 - a).sqrt() * pred_eps) / a.sqrt()

    def posterior(x):
        return (p.sqrt() * b * x + (1 - b).sqrt() * (1 - p) * x_t) / (1 - a)

    std = torch.exp(0.5 * ((out + 1) / 2 * b.log() + (1 - out) / 2 * v.log()))
    true, ours = (torch.distributions.Normal(m, s) for m, s in ((posterior(x), v.sqrt()),
                                                                 (posterior(x_hat), std)))
    kl = torch.distributions.kl_divergence(true, ours).mean((1, 2, 3)) / np.log(2)
    lower = torch.where(x > 0.999, 1 - ours.cdf(x - 1 / 255), -ours.cdf(x - 1 / 255))
    bins = torch.where(x > 0.999, 0, ours.cdf(x + 1 / 255)) + torch.where(x < -0.999, 0, lower)
    nll = -bins.clamp(min=1e-12).log2().mean((1, 2, 3))
    vlb = ddpm.vlb(pred_eps, out, x, eps, t)
    assert vlb[2:].allclose(kl[2:], rtol=1e-6)
    assert vlb[:2].allclose(nll[:2], rtol=2e-3)                          # the CDF's tanh form
    in_float32 = ddpm.vlb(*(part.float() for part in (pred_eps, out, x, eps)), t)
    assert in_float32.allclose(vlb.float(), rtol=1e-4)


def test_the_bound_trains_the_variance_alone():
    ddpm, x, eps = model.DDPM(), normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    pred, t = normal(2, 2, 4, 4, seed=2).requires_grad_(), torch.tensor([0, 400])
    ddpm.loss(pred, x, eps, t).sum().backward()
    assert pred.grad[:, :1].allclose(2 * (pred[:, :1] - eps) / 16)       # the squared error's alone
    assert (pred.grad[:, 1:] != 0).all()


def named_weights(name, shape):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.15 * torch.randn(shape, generator=generator)                # GELU bends


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
        channels = 4 if fusion == "none" else 7
        options = {"learn_sigma": False} if family == "SiT" else {}
        net = getattr(module, family)(in_channels=channels, **PEER_CASES, **options).eval()
        for name, p in net.named_parameters():
            if p.requires_grad:
                p.data = named_weights(name, p.shape)
        x_t, z_t, t, y = peer_inputs(family)
        with torch.no_grad():
            pred = net(x_t if fusion == "none" else torch.cat([x_t, z_t], 1), t, y)
        pred = pred.view(2, -1, channels, 8, 8)                    # (B, predictions or variances,)
        pred_x, pred_z = pred[:, :, :4].flatten(1, 2), pred[:, :, 4:].flatten(1, 2)
        values = thinned(pred_x, None if fusion == "none" else pred_z)
        print(f"    {(family, fusion)}: {[round(value, 4) for value in values]},")


# the same of 8 steps of the authors' SDE sampler: x and z from sde_noise(), SiT with features
SDE_PEERS = {
    "w_cfg": [-3.3404, 9.8652, 0.2055, 6.4317, -3.296, -3.4396, -7.5711, 8.0689, 6.3333, 7.7033],
    "w_cfg both": [-3.4856, 10.3463, 0.2066, 6.8752, -2.9159, -3.2351, -8.7725, 8.5578, 6.603,
                   9.0966],
    "w_r both": [-4.2048, 9.1862, -1.3741, 5.1272, -5.256, -2.7983, -7.9823, 8.8805, 6.7101,
                 8.3147],
}


def sde_noise(n=8):
    return [normal(2, 7, 8, 8, seed=100 + i) for i in range(n)]


def record_sde_peers(redi_folder):
    """Print SDE_PEERS from zelaki/ReDi 58c65a8: the sampler of its sample_ddp.py, 7 steps to 0.96
    and one of 0.04, with CFG of x alone, CFG of all and representation guidance."""
    bench.import_theirs(redi_folder)
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
        values = thinned(state[:, :4], state[:, 4:])
        print(f'    "{name}": {[round(value, 4) for value in values]},')


def published(family, r, learn_sigma=False, n_classes=10):
    """A state dict as the authors publish them, size T/2, for 8 x 8 latents."""
    outputs, channels = 2 if learn_sigma or family == "DiT" else 1, 4 + r
    net = model.build(f"{family}-T/2", "none", 0, n_classes, 4, 8)
    shapes = {name: p.shape for name, p in net.named_parameters()} | {
        "x_embedder.proj.weight": (128, channels, 2, 2),
        "final_layer.linear.weight": (4 * outputs * channels, 128),
        "final_layer.linear.bias": (4 * outputs * channels,)}
    weights = {name: named_weights(name, shape) for name, shape in shapes.items()}
    return weights | {"pos_embed": net.pos_embed}


@pytest.mark.parametrize("family, fusion", PEERS)
def test_the_network_equals_the_authors(family, fusion):
    net = model.load_published(published(family, 0 if fusion == "none" else 3), family)
    x_t, z_t, t, y = peer_inputs(family)
    with torch.no_grad():
        ours = thinned(*net(x_t, z_t if net.r else None, t, y))
    assert ours == pytest.approx(PEERS[family, fusion], rel=1e-4, abs=1e-4)


# data.py

BRIEF = "train.py --steps 8 --ckpt_every 4 --log_every 2 --sample_steps 4 --batch_size 16"


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A folder where `python train.py` has just run, briefly: prepared/digits and out are there."""
    folder, here, threads = tmp_path_factory.mktemp("work"), os.getcwd(), torch.get_num_threads()
    os.chdir(folder)
    data.prepare_digits()
    torch.set_num_threads(1)                             # sums of other threads are other bits
    main(train, BRIEF.removeprefix("train.py "))
    os.chdir(here)
    torch.set_num_threads(threads)
    return folder


def run(command, folder, ok=True, threads=1):
    """The command as a user types it in `folder`; its stdout, or if not ok its stderr."""
    script, *flags = command.split()
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run([sys.executable, str(HERE / script), *flags], cwd=folder, env=env,
                            capture_output=True, text=True, timeout=1200)
    assert (result.returncode == 0) == ok, result.stdout + result.stderr
    return result.stdout if ok else result.stderr


def main(module, flags):
    """The same without a process of its own: quicker by torch's import."""
    module.main(module.parser().parse_args(flags.split()))


@pytest.fixture
def digits(workdir):
    return data.Prepared(str(workdir / "prepared/digits"), 4)


def test_held_out_digits_are_in_no_prepared_row(digits):
    x, y, held_out = data.digits()
    assert held_out.sum() == 179 and digits.n == 1797 - 179
    rows_x, _, rows_y, _ = digits.batch(torch.arange(digits.n))
    assert torch.equal(rows_x, x[~held_out]) and torch.equal(rows_y, y[~held_out])
    assert -1 == x.min() and x.max() == 1


def test_z_is_resized_bilinearly_without_aligned_corners(digits):
    _, z, _, _ = digits.batch(torch.tensor([5, 900]))
    grid = torch.from_numpy(digits.z[[5, 900]][:, :4].astype(np.float32))
    assert z.shape == (2, 4, 8, 8)
    # output pixel i sits at (i + 0.5) / 2 - 0.5 of the 4 x 4 grid: weights 3/4 and 1/4
    row = 0.75 * grid[:, :, 1] + 0.25 * grid[:, :, 2]
    assert z[:, :, 3, 3].allclose(0.75 * row[:, :, 1] + 0.25 * row[:, :, 2], atol=1e-5)
    assert z[:, :, 0, 0].allclose(grid[:, :, 0, 0], atol=1e-5)


def test_fewer_channels_of_z_are_its_first(workdir, digits):
    rows = torch.arange(7)
    _, z, _, _ = data.Prepared(str(workdir / "prepared/digits"), 2).batch(rows)
    assert torch.equal(z, digits.batch(rows)[1][:, :2])
    assert data.Prepared(str(workdir / "prepared/digits"), 0).batch(rows)[1] is None


def test_the_encoder_reads_digits_it_never_saw(workdir):
    x, y, held_out = data.digits()
    encoder = data.train_digit_encoder(x[~held_out], y[~held_out], epochs=6)
    with torch.no_grad():
        assert (encoder(x[held_out]).argmax(1) == y[held_out]).float().mean() > 0.95


def test_every_epoch_visits_every_row_once_in_another_order():
    n, B = 10, 4
    stream = torch.cat([data.rows_of_step(0, step, B, n) for step in range(5)])
    first, second = stream[:n], stream[n:]
    assert first.sort()[0].tolist() == second.sort()[0].tolist() == list(range(n))
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([data.rows_of_step(0, step, 5, n) for step in range(4)]), stream)
    assert not torch.equal(data.rows_of_step(1, 0, n, n), first)


def test_generators_of_different_purposes_are_apart():
    keys = [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0)]
    draws = [torch.rand(3, generator=data.generator(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == 4
    assert draws[1] == torch.rand(3, generator=data.generator(*keys[1])).tolist()


def test_uint8_rounds_as_adm_does():
    x = torch.linspace(-1.2, 1.2, 1000)
    adm = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)                # guided-diffusion
    dit = torch.clamp(127.5 * x + 128.0, 0, 255).to(torch.uint8)         # DiT, which we follow
    assert torch.equal(data.to_uint8(x), dit) and (dit.int() - adm.int()).abs().max() <= 1
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.from_uint8(every)), every)


@pytest.mark.parametrize("name, spoil, words", [
    ("x.npy", lambda b: b[:len(b) // 2], "damaged"), ("z.npy", lambda b: b"", "damaged"),
    ("meta.json", lambda b: b[:50], "damaged"), ("meta.json", lambda b: b"[]", "damaged"),
    ("meta.json", lambda b: b.replace(b"classes", b"klasses"), "not whole"),
    ("meta.json", lambda b: b.replace(b'"format": 2', b'"format": 99'), "format 99"),
    ("meta.json", lambda b: b.replace(b'"n": 1618', b'"n": 1619'), "meta.json says")])
def test_damaged_prepared_data_is_named(workdir, tmp_path, name, spoil, words):
    for file in (workdir / "prepared/digits").iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(spoil(content) if file.name == name else content)
    with pytest.raises(data.UserError, match=words) as error:
        data.Prepared(str(tmp_path), 4)
    assert "prepare it again" in str(error.value) and "\n" not in str(error.value)


def test_missing_data_and_too_large_r_say_what_to_type(workdir):
    with pytest.raises(data.UserError, match="python data.py --images"):
        data.Prepared("nowhere", 4)
    with pytest.raises(data.UserError, match="lower --r"):
        data.Prepared(str(workdir / "prepared/digits"), 17)


# data.py: folders of images

ENCODER = "vit_base_patch14_reg4_dinov2 --encoder_kwargs depth=2 embed_dim=48 num_heads=3"
BAD = ["a/cut.jpg", "b/empty.png", "b/notes.txt"]


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
    for i in range(11):
        path = folder / "photos" / "abc"[i % 3] / f"{i:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(photo(40 + 9 * i, 100 - 4 * i, i))
        if i < 6:
            exif = Image.Exif()
            exif[0x0112] = 1 + i                                         # orientation
            image.save(f"{path}.JPEG", exif=exif)
        else:
            mode = ["L", "P", "RGBA", "1", "CMYK"][i - 6]
            image.convert(mode).save(f"{path}.{'tiff' if mode == 'CMYK' else 'png'}")
    shutil.copytree(folder / "photos", folder / "bad")
    (folder / "bad" / BAD[0]).write_bytes((folder / "bad/a/00.JPEG").read_bytes()[:900])
    (folder / "bad" / BAD[1]).write_bytes(b"")
    (folder / "bad" / BAD[2]).write_text("no image")
    (folder / "bad/.DS_Store").write_bytes(b"hidden")
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


def prepare(photos, out, *more, images="photos", kwargs=ENCODER.partition(" ")[2]):
    """python data.py --images ... in this process, which has torch, timm and diffusers by now."""
    flags = (f"--images {photos / images} --out {out} --size 32 --vae {photos / 'vae'} --encoder "
             f"{ENCODER.split()[0]} {kwargs} --encoder_weights {photos / 'encoder.safetensors'} "
             "--r_keep 6 --batch_size 4 --workers 0 --vae_scale 1.5")
    data.main(data.parser().parse_args(flags.split() + " ".join(more).split()))
    return data.Prepared(str(out))


@pytest.fixture(scope="session")
def prepared(photos):
    return prepare(photos, photos / "prepared")


def content(folder, pattern="*.np*"):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).glob(pattern)}


def test_images_are_upright_rgb_and_cropped_as_adm_does(photos):
    upright = Image.open(photos / "photos/c/02.JPEG")                    # turned by 180 degrees
    turned = data.load_image(photos / "photos/c/02.JPEG", 32)
    assert upright.getexif()[0x0112] == 3
    plain = upright.copy()
    plain.getexif().clear()
    plain.rotate(180).save(photos / "plain.png")
    assert np.array_equal(turned, data.load_image(photos / "plain.png", 32))
    # halved by 2 x 2 means while the short side is 2 * size or more, then bicubic, then the middle
    square = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(square).save(photos / "square.png")
    means = square.reshape(32, 4, 32, 4, 3).mean((1, 3))                 # Pillow rounds four times
    assert np.abs(data.load_image(photos / "square.png", 32) - means).max() <= 2
    wide = photo(90, 32, 1)                                              # nothing to resize
    Image.fromarray(wide).save(photos / "wide.png")
    assert np.array_equal(data.load_image(photos / "wide.png", 32), wide[:, 29:61])
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(deep).save(photos / "deep.png")                      # 16 bits: not clipped
    assert np.array_equal(data.load_image(photos / "deep.png", 32)[..., 1], deep >> 8)
    for path in (photos / "photos").rglob("*.*"):
        image = data.load_image(path, 16)
        assert image.shape == (16, 16, 3) and image.dtype == np.uint8


def test_classes_are_sorted_folders_and_flat_folders_have_none(photos, tmp_path):
    files, y, classes = data.list_images(str(photos / "photos"))
    assert classes == ["a", "b", "c"] and y.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert files.tolist() == sorted(files) and files[0] == b"a/00.JPEG"
    files, y, classes = data.list_images(str(photos / "photos/a"))
    assert classes == [] and y.tolist() == [0] * 4
    with pytest.raises(data.UserError, match="no files"):
        data.list_images(str(tmp_path))
    with pytest.raises(data.UserError, match="no folder"):
        data.list_images(str(tmp_path / "nowhere"))
    shutil.copytree(photos / "photos", tmp_path / "mixed")
    (tmp_path / "mixed/README.txt").write_text("not an image, not a class")
    assert len(data.list_images(str(tmp_path / "mixed"))[0]) == 11
    shutil.copy(photos / "photos/a/00.JPEG", tmp_path / "mixed")
    with pytest.raises(data.UserError, match="00.JPEG.*move them"):
        data.list_images(str(tmp_path / "mixed"))


def test_x_is_what_diffusers_pipeline_makes(photos, prepared):
    """Rows of x.npy are mean and std of the posterior of VaeImageProcessor's input, unscaled;
    batches draw from it anew and scale once."""
    import diffusers
    vae = diffusers.AutoencoderKL.from_pretrained(photos / "vae", low_cpu_mem_usage=False)
    image = Image.fromarray(data.load_image(photos / "photos/b/01.JPEG", 32))
    processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=4)
    with torch.no_grad():
        posterior = vae.encode(processor.preprocess(image)).latent_dist
    row = torch.from_numpy(prepared.x[4].astype(np.float32))             # b is rows 4 to 7
    mean, std = row.chunk(2)
    assert mean.allclose(posterior.mean[0], atol=2e-3) and std.allclose(posterior.std[0], atol=2e-3)
    assert prepared.meta["scale"] == 1.5 and prepared.meta["settings"]["vae_scale"] == 1.5
    eps = normal(1, 4, 8, 8)
    x, _, y, _ = prepared.batch(torch.tensor([4]), eps=eps)
    assert x.allclose(1.5 * (mean + std * eps), atol=1e-5) and y.item() == 1
    assert prepared.batch(torch.tensor([4]))[0].allclose(1.5 * mean, atol=1e-5)
    with torch.no_grad():
        decoded = vae.decode(x / 1.5).sample
    theirs = processor.postprocess(decoded, output_type="np") * 255
    assert np.abs(data.decode(x, prepared.meta) - theirs).max() <= 1.01


def test_a_codecs_own_scale_and_shift_are_used_once(photos):
    import diffusers
    assert data.Codec(str(photos / "vae")).scale == 1.3                  # config.json's
    diffusers.AutoencoderKL(
        block_out_channels=[8], norm_num_groups=4, latent_channels=2, scaling_factor=0.5,
        latents_mean=[1.0, 2.0], latents_std=[4.0, 5.0]).save_pretrained(photos / "vae_2")
    codec = data.Codec(str(photos / "vae_2"))
    assert codec.scale == [0.125, 0.1] and codec.shift == [1.0, 2.0]
    raw = 1 + normal(3, 2, 8, 8)
    with torch.no_grad():
        plain = codec.vae.decode(raw).sample
    scaled = torch.stack([(raw[:, 0] - 1) * 0.125, (raw[:, 1] - 2) * 0.1], 1)
    assert codec.decode(scaled).allclose(plain, atol=1e-4)
    assert data.mean_square(raw.numpy(), False, codec.scale, codec.shift) == pytest.approx(
        (scaled ** 2).mean((0, 2, 3)).numpy(), rel=1e-4)


def test_a_wrong_latent_scale_stops_the_run_and_names_the_right_one(photos, tmp_path):
    with pytest.raises(data.UserError, match="have RMS .*--vae_scale") as error:
        prepare(photos, tmp_path / "out", "--vae_scale 9")
    better = str(error.value).split("--vae_scale ")[1].split()[0]
    assert not (tmp_path / "out").exists()
    rms = prepare(photos, tmp_path / "out", "--vae_scale", better).meta["x_rms"]
    assert np.sqrt(np.square(rms).mean()) == pytest.approx(1, abs=0.1)


def test_features_are_timms_patch_tokens_on_its_own_normalisation(photos):
    import timm
    encoder = data.Encoder(ENCODER.split()[0], 32, None, str(photos / "encoder.safetensors"),
                           {"depth": 2, "embed_dim": 48, "num_heads": 3})
    assert encoder.input_size == 28 and encoder.grid == [2, 2]           # 14 pixels for 16
    images = data.from_uint8(torch.from_numpy(photo(32, 32, 5)).permute(2, 0, 1)[None])
    mean = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    std = torch.tensor(timm.data.IMAGENET_DEFAULT_STD).view(3, 1, 1)
    inputs = torch.nn.functional.interpolate(((images + 1) / 2 - mean) / std, 28, mode="bicubic")
    net = timm.create_model(ENCODER.split()[0], depth=2, embed_dim=48, num_heads=3, img_size=28,
                            pretrained=True, num_classes=0, pretrained_cfg_overlay={
                                "file": str(photos / "encoder.safetensors")}).eval()
    with torch.no_grad():
        tokens = net.forward_features(inputs)[:, 5:]              # 1 class token, 4 registers
    theirs = tokens.transpose(1, 2).reshape(1, 48, 2, 2)
    assert encoder.features(images).allclose(theirs, atol=1e-4) and theirs.std() > 0.1


def test_a_convnets_level_is_timms_intermediate_of_its_own_pipeline(photos):
    import timm
    torch.manual_seed(0)
    net = timm.create_model("mobilenetv2_050", pad_type="same", bn_eps=1e-3).eval()
    torch.save(net.state_dict(), photos / "mobilenet.pth")
    encoder = data.Encoder("mobilenetv2_050", 64, 3, str(photos / "mobilenet.pth"),
                           {"pad_type": "same", "bn_eps": 1e-3})
    image = photo(64, 64, 3)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net) | {
        "input_size": (3, 64, 64), "crop_pct": 1})
    with torch.no_grad():
        theirs = net.forward_intermediates(transform(Image.fromarray(image))[None], indices=[3],
                                           intermediates_only=True)[0]
    images = data.from_uint8(torch.from_numpy(image).permute(2, 0, 1)[None])
    assert theirs.shape == (1, 48, 4, 4) and encoder.grid == [4, 4]
    assert encoder.features(images).allclose(theirs, atol=1e-4)
    other = data.Encoder("mobilenetv2_050", 64, 3, str(photos / "mobilenet.pth"),
                         {"pad_type": "same", "bn_eps": 1e-3, "mean": 0.5, "std": 0.5})
    assert not other.features(images).allclose(theirs, atol=1e-2)
    assert other.name == "mobilenetv2_050 level 3 bn_eps=0.001 mean=0.5 pad_type=same std=0.5"


def test_z_is_the_pca_of_the_features_of_all_images(photos, prepared):
    """The arrays, made again the long way: every feature at once, scikit-learn's PCA."""
    from sklearn.decomposition import PCA
    encoder = data.Encoder(ENCODER.split()[0], 32, None, str(photos / "encoder.safetensors"),
                           {"depth": 2, "embed_dim": 48, "num_heads": 3})
    files, _, _ = data.list_images(str(photos / "photos"))
    images = np.stack([data.load_image(photos / "photos" / os.fsdecode(file), 32)
                       for file in files])
    f = encoder.features(data.from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2)))
    f = f.permute(0, 2, 3, 1).double().numpy()                           # (11, 2, 2, 48)
    rows = (f - f.mean((0, 1, 2))) / f.std((0, 1, 2))
    theirs = PCA(6).fit(rows.reshape(-1, 48)).transform(rows.reshape(-1, 48)).reshape(11, 2, 2, 6)
    ours = prepared.z.astype(float).transpose(0, 2, 3, 1)
    sign = np.sign((ours * theirs).sum((0, 1, 2)))
    assert np.abs(ours - sign * theirs).max() < 0.02 and ours.std() > 1
    assert prepared.meta["z_rms"] == pytest.approx(np.sqrt((theirs ** 2).mean((0, 1, 2))), rel=1e-2)


def test_meta_json_says_what_is_there(photos, prepared):
    m = prepared.meta
    assert m["arrays"]["x"]["shape"] == [11, 8, 8, 8] == list(prepared.x.shape)
    assert (m["x_channels"], m["x_has_std"], m["image_size"], m["n"]) == (4, True, 32, 11)
    for name in "xzy":
        digest = hashlib.sha256((photos / "prepared" / f"{name}.npy").read_bytes()).hexdigest()
        assert m["arrays"][name]["sha256"] == digest
    assert m["classes"] == ["a", "b", "c"] and prepared.y.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert set(m["versions"]) >= {"torch", "timm", "diffusers"} and m["bad_rows"] == []
    left = {path.name for path in (photos / "prepared").iterdir()}
    assert left == {"x.npy", "z.npy", "y.npy", "meta.json", "pca.npz", "sheet.png"}
    assert Image.open(photos / "prepared/sheet.png").size == (10 * 130 + 2, 3 * 130 + 2)


def in_ranks(work, n_ranks=1):
    """work() in forked processes that find each other as torchrun's do, one thread each: their exit
    codes. If one is killed so are the others; if one ends with an error they have ten seconds."""
    port = bench.free_port()
    pids = [forked(work, {"RANK": str(rank), "WORLD_SIZE": str(n_ranks), "MASTER_PORT": str(port),
                          "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(n_ranks)})
            for rank in range(n_ranks)]
    codes = {}
    while len(codes) < n_ranks:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        others = set(pids) - set(codes)
        if codes[pid]:
            for _ in range(100 if codes[pid] > 0 else 0):
                others -= {other for other in others
                           if os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT | os.WNOHANG)}
                time.sleep(0.1 if others else 0)
            for other in others:
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def forked(work, environment):
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)                                         # OpenMP survives no fork
        os.environ |= environment
        work()
        os._exit(0)
    except SystemExit as error:
        os._exit(error.code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def torchrun(command):
    """torchrun with two processes, quicker by its own import of torch: its exit code."""
    script, *flags = command.split()
    arguments = ["--standalone", "--nproc_per_node=2", "--", str(HERE / script), *flags]
    pid = forked(lambda: torch.distributed.run.main(arguments), {"OMP_NUM_THREADS": "1"})
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_killed_and_started_again_the_arrays_are_byte_identical(photos, tmp_path, n_ranks):
    """Killed at five moments: within y, x, z and status, of the first and of later blocks."""
    def attempt(out, calls):
        write, left = data.write_rows, [calls]

        def write_or_die(path, start, rows):
            left[0] -= 1
            if left[0] == 0:
                write(path, start, np.full_like(rows[:len(rows) // 2], 7))   # torn, and wrong
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, start, rows)

        def work():
            data.write_rows = write_or_die
            prepare(photos, out)

        return min(in_ranks(work, n_ranks))                              # a signal's is negative

    assert attempt(tmp_path / "whole", 0) == 0
    for calls in (1, 3, 5, 4, 2):
        assert attempt(tmp_path / "out", calls) == -signal.SIGKILL
        with pytest.raises(data.UserError, match="not finished"):
            data.Prepared(str(tmp_path / "out"))
    assert attempt(tmp_path / "out", 0) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {"x.npy", "z.npy", "y.npy", "pca.npz"} == set(content(tmp_path / "whole"))


def test_a_killed_pca_adds_what_is_missing(photos, tmp_path, monkeypatch):
    """Chunks of partial sums are kept, and the total does not depend on who made them."""
    monkeypatch.setattr(data, "PCA_CHUNK", 4)
    out, seen = tmp_path / "out", []
    features = data.Encoder.features

    def interrupted(self, images):
        seen.append(len(images))
        if len(seen) == 3:                                               # after black and one chunk
            raise KeyboardInterrupt
        return features(self, images)

    monkeypatch.setattr(data.Encoder, "features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(photos, out)
    assert (out / "moments_00000.npz").exists() and not (out / "moments_00001.npz").exists()
    prepare(photos, out)
    assert len(seen) == 3 + 1 + 2 + 3                                    # black, 2 chunks, 3 blocks
    prepare(photos, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_bad_files_are_skipped_named_and_never_trained_on(photos, tmp_path, capsys):
    with pytest.raises(data.UserError, match="3 of 14 files .*--max_bad 0.2.*cut.jpg") as error:
        prepare(photos, tmp_path / "out", "--max_bad 0.2", images="bad")
    assert "\n" not in str(error.value)
    named = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in named] == BAD and "truncated" in named[0]
    ours = prepare(photos, tmp_path / "out", "--max_bad 0.22", images="bad")
    assert "3 files skipped, see" in capsys.readouterr().out.splitlines()[-1]
    assert ours.n == 11 and ours.meta["n"] == 14 and ours.meta["bad_rows"] == [4, 9, 10]
    rows = ours.rows(np.arange(11))
    assert rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 11, 12, 13]
    assert not ours.x[[4, 9, 10]].any() and (ours.x[rows] != 0).any((1, 2, 3)).all()
    _, _, y, _ = ours.batch(torch.arange(11))
    assert y.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    good = prepare(photos, tmp_path / "good")
    assert np.abs(ours.x[rows].astype(float) - good.x).max() < 0.01


def test_a_mended_file_is_read_when_the_run_goes_on(photos, tmp_path):
    shutil.copytree(photos / "bad", tmp_path / "images")
    with pytest.raises(data.UserError, match="3 of 14"):
        prepare(photos, tmp_path / "out", "--max_bad 0.1", f"--images {tmp_path / 'images'}")
    for name in BAD[1:]:                                                 # the first is still bad
        shutil.copy(photos / "photos/a/00.JPEG", tmp_path / "images" / name)
    ours = prepare(photos, tmp_path / "out", "--max_bad 0.1", f"--images {tmp_path / 'images'}")
    assert ours.meta["bad_rows"] == [4]
    assert np.abs(ours.x[9].astype(float) - ours.x[0]).max() < 0.01
    assert len((tmp_path / "out/skipped.txt").read_text().splitlines()) == 1


def test_trouble_of_the_disk_is_no_bad_file(photos, tmp_path, monkeypatch):
    load = data.load_image

    def busy(path, size):
        if os.fsencode(path).endswith(b"04.JPEG"):
            raise OSError(errno.EIO, "Input/output error")
        return load(path, size)

    monkeypatch.setattr(data, "load_image", busy)
    with pytest.raises(data.UserError, match="Input/output error.*goes on where it was"):
        prepare(photos, tmp_path / "out", "--max_bad 1")
    monkeypatch.undo()
    assert prepare(photos, tmp_path / "out", "--max_bad 1").n == 11


def test_dying_while_it_finishes_loses_nothing(photos, prepared, tmp_path, monkeypatch):
    """A disk that is full for the picture, for meta.json, or after it."""
    write = pca.write_whole

    def full_at(name):
        def write_or_fail(path, what):
            if path.endswith(name):
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, what)
        return write_or_fail

    for name in ("pca.npz", "sheet.png", "meta.json"):
        monkeypatch.setattr(pca, "write_whole", full_at(name))
        with pytest.raises(data.UserError, match="No space left.*goes on where it was"):
            prepare(photos, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(data, "clear_up", lambda out: os.kill(0, 0))     # killed after meta.json
    prepare(photos, tmp_path / "out")
    monkeypatch.undo()
    prepare(photos, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "x.npy", "z.npy", "y.npy", "meta.json", "pca.npz", "sheet.png"}
    assert content(tmp_path / "out") == content(photos / "prepared")


def test_weights_that_do_not_fit_are_refused(photos, tmp_path):
    """Neither timm without a head nor diffusers would say so: the rest would stay random."""
    import safetensors.torch
    import timm
    weights = timm.create_model("mobilenetv2_050").state_dict()
    del weights["blocks.0.0.conv_dw.weight"]
    torch.save(weights, tmp_path / "encoder.pth")
    with pytest.raises(data.UserError, match="blocks.0.0.conv_dw.weight") as error:
        data.Encoder("mobilenetv2_050", 32, 3, str(tmp_path / "encoder.pth"))
    assert "\n" not in str(error.value)
    shutil.copytree(photos / "vae", tmp_path / "vae")
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["decoder.conv_out.weight"]
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(data.UserError, match="lack or do not fit decoder.conv_out.weight"):
        data.Codec(str(tmp_path / "vae"))


def test_a_codec_that_changed_or_went_is_refused_but_training_ends_well(
        photos, prepared, tmp_path, capsys):
    meta = prepared.meta | {"codec_weights": "another"}
    with pytest.raises(data.UserError, match="not the one that made the data.*--vae"):
        data.codec_of(meta)
    gone = tmp_path / "prepared"
    shutil.copytree(photos / "prepared", gone)
    (gone / "meta.json").write_text(json.dumps(prepared.meta | {"codec": "gone"}))
    main(train, f"--data {gone} --model SiT-T/2 --r 4 --steps 2 --batch_size 4 --sample_steps 2 "
                f"--preview_every 1 --out {tmp_path / 'out'}")
    shown = capsys.readouterr()
    assert "no preview: --vae gone" in shown.out + shown.err
    assert "is complete, but there is no sheet.png" in shown.out


def test_links_in_a_circle_are_followed_once(photos, tmp_path):
    shutil.copytree(photos / "photos", tmp_path / "images")
    (tmp_path / "images/a/self").symlink_to(tmp_path / "images/a")
    (tmp_path / "images/d").symlink_to(photos / "photos/b")
    (tmp_path / "images/a/broken.png").symlink_to("nowhere")
    files, _, classes = data.list_images(str(tmp_path / "images"))
    assert len(files) == 11 + 4 + 1 and classes == ["a", "b", "c", "d"]
    with pytest.raises(data.UserError, match="is inside --images"):
        prepare(photos, tmp_path / "images/out", f"--images {tmp_path / 'images'}")


def test_features_are_kept_as_they_are_for_repa(photos, tmp_path, capsys):
    """In the encoder's own units; their PCA is z."""
    out = tmp_path / "out"
    prepare(photos, out, "--keep_features")
    assert "f.npy, the features of --keep_features, takes 4.22e-06 GB" in capsys.readouterr().out
    assert 11 * 48 * 2 * 2 * 2 == 4224
    kept = data.Prepared(str(out), features=True)
    _, z, _, f = kept.unpack(kept.read(torch.arange(11)))
    assert f.shape == (11, 48, 2, 2) and f.dtype == torch.float32
    encoder = data.Encoder(ENCODER.split()[0], 32, None, str(photos / "encoder.safetensors"),
                           {"depth": 2, "embed_dim": 48, "num_heads": 3})
    files, _, _ = data.list_images(str(photos / "photos"))
    image = data.load_image(os.path.join(os.fsencode(photos / "photos"), files[6]), 32)
    image = data.from_uint8(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
    assert encoder.features(image)[0].allclose(f[6], atol=0.01) and f.std() > 0.1
    projected = pca.load(f"{out}/pca.npz").project(f.permute(0, 2, 3, 1).numpy())
    assert np.abs(projected - kept.z.transpose(0, 2, 3, 1)).max() < 0.05
    main(train, f"--data {out} --model SiT-T/2 --r 4 --repa 1 --steps 1 --batch_size 4 "
                f"--sample_steps 2 --out {tmp_path / 'run'}")
    assert "loss_repa" in losses(tmp_path / "run")[0]


def test_what_is_there_stays_when_settings_differ(photos, prepared, tmp_path):
    before = content(photos / "prepared")
    for flags, words in [("--size 64", "another --size: 32, now 64"),
                         ("--r_keep 5", "another --r_keep"), ("--seed 1", "another --seed")]:
        with pytest.raises(data.UserError, match=words):
            prepare(photos, photos / "prepared", flags)
    with pytest.raises(data.UserError, match="another --images: 11 files"):
        prepare(photos, photos / "prepared", images="bad")
    prepare(photos, photos / "prepared")                                 # complete: nothing to do
    assert content(photos / "prepared") == before
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(data.UserError, match="not empty and holds no prepared data"):
        prepare(photos, tmp_path)


@pytest.mark.parametrize("flags, words", [
    ("--images nowhere", "nowhere is no folder"), ("--size 36", "multiple of 8"),
    ("--vae nowhere", "--vae nowhere"), ("--encoder resnetx", "--encoder resnetx"),
    ("--encoder_weights nowhere.pth", "nowhere.pth: no such file"), ("--r_keep 49", "48 channels"),
    ("--encoder_layer 7", "cannot be used so"), ("--encoder_layer top", "a number from 0"),
    ("--encoder_kwargs depth=2", "one for each; got 2 for 1"),
    ("--encoder a b --encoder_kwargs depth", "KEY=VALUE"), ("--max_bad 2", "a share"),
    ("--pca nowhere.npz", "no PCA file"), ("--pca {photos}/other.npz", "is the PCA of some other")])
def test_mistakes_in_preparing_are_one_line(photos, tmp_path, flags, words):
    pca.fit(pca.Moments(48).update(normal(99, 48).numpy()), 6, 1, "some other").save(
        photos / "other.npz")
    with pytest.raises(data.UserError, match=words) as error:
        prepare(photos, tmp_path / "out", flags.format(photos=photos))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_full_disk_is_found_out_before_the_work(photos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(data.UserError, match="x.npy needs .* GB .*No space left.*make room"):
        prepare(photos, tmp_path / "out")
    monkeypatch.undo()
    assert prepare(photos, tmp_path / "out").n == 11


def test_a_fitted_pca_is_used_as_it_is(photos, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(data.Source, "fit_pcas", None)                   # must not be called
    given = f"--pca {photos / 'prepared/pca.npz'} --r_keep 4"
    ours = prepare(photos, tmp_path / "out", given)
    assert np.array_equal(ours.z, prepared.z[:, :4])
    with pytest.raises(data.UserError, match="another --pca_scale"):
        prepare(photos, tmp_path / "out", given, "--pca_scale 2")
    twice = prepare(photos, tmp_path / "twice", given, "--pca_scale 2")
    assert np.abs(twice.z.astype(float) - 2 * ours.z.astype(float)).max() < 0.02
    assert twice.meta["pca_scale"] == 2 and twice.meta["z_std"][0] == 2 * ours.meta["z_std"][0]


def test_several_encoders_share_z(photos, prepared, tmp_path):
    second = "--encoder_kwargs depth=2 embed_dim=48 num_heads=3 mean=0.5"
    flags = (f"--encoder {ENCODER.split()[0]} {ENCODER.split()[0]} {second}")
    ours = prepare(photos, tmp_path / "out", flags)
    assert ours.z.shape == (11, 12, 2, 2) and np.array_equal(ours.z[:, :6], prepared.z)
    assert not np.array_equal(ours.z[:, 6:], prepared.z)
    four = data.Prepared(str(tmp_path / "out"), 4)
    assert four.channels.tolist() == [0, 1, 6, 7]
    assert four.meta["z_std"] == [ours.meta["z_std"][c] for c in (0, 1, 6, 7)]
    stored = torch.from_numpy(ours.z[[2], :][:, [0, 1, 6, 7]].astype(np.float32))
    assert four.read(torch.tensor([2]))[1].float().equal(stored)
    with pytest.raises(data.UserError, match="multiple of 2"):
        data.Prepared(str(tmp_path / "out"), 3)


def test_encoders_of_other_grids_are_resized_to_the_firsts(photos, prepared, tmp_path):
    import timm
    torch.save(timm.create_model("mobilenetv2_050").state_dict(), tmp_path / "mobilenet.pth")
    ours = prepare(photos, tmp_path / "out", f"--encoder {ENCODER.split()[0]} mobilenetv2_050 "
                   f"--encoder_weights {photos / 'encoder.safetensors'} {tmp_path}/mobilenet.pth "
                   "--encoder_layer last 2 --encoder_kwargs")             # 2 x 2 and 4 x 4
    alone = prepare(photos, tmp_path / "alone", "--encoder mobilenetv2_050 --encoder_layer 2 "
                    f"--encoder_weights {tmp_path}/mobilenet.pth", kwargs="")
    assert alone.z.shape == (11, 6, 4, 4) and np.array_equal(ours.z[:, :6], prepared.z)
    means = alone.z.astype(float).reshape(11, 6, 2, 2, 2, 2).mean((3, 5))  # bilinear, halved
    assert np.abs(ours.z[:, 6:] - means).max() < 0.02


@pytest.mark.parametrize("fusion", model.FUSIONS)
def test_prepared_photos_train_and_sample_through_their_codec(photos, prepared, tmp_path, fusion):
    r = "" if fusion == "none" else "--r 4"
    main(train, f"--data {photos / 'prepared'} --model SiT-T/2 --fusion {fusion} {r} --steps 3 "
                f"--batch_size 4 --sample_steps 3 --out {tmp_path / 'out'}")
    main(sample, f"--ckpt {tmp_path / 'out/ckpt.pt'} --n 4 --out {tmp_path / 'samples'}")
    images = np.load(tmp_path / "samples/samples.npz")["arr_0"]
    assert images.shape == (4, 32, 32, 3) and images.std() > 1
    assert (tmp_path / "out/sheet.png").exists()
    with pytest.raises(data.UserError, match="--vae nowhere"):
        main(sample, f"--ckpt {tmp_path / 'out/ckpt.pt'} --vae nowhere --out {tmp_path / 'none'}")


def test_another_codec_is_warned_of_and_one_of_other_shapes_refused(photos, prepared, tmp_path,
                                                                   capsys):
    import diffusers
    net = tiny(r=4, x_channels=4)
    torch.save({"arch": net.arch, "settings": {"sample_steps": 2, "p_drop_z": 0, "p_drop_y": 0},
                "meta": data.Prepared(str(photos / "prepared"), 4).meta, "step": 1,
                "ema": net.state_dict()}, tmp_path / "ckpt.pt")
    options = dict(norm_num_groups=4, block_out_channels=[8] * 3, latent_channels=4,
                   down_block_types=["DownEncoderBlock2D"] * 3,
                   up_block_types=["UpDecoderBlock2D"] * 3)
    for name, change in (("same", {}), ("wide", {"latent_channels": 5}), (
            "small", {key: value[:2] for key, value in options.items() if type(value) is list})):
        diffusers.AutoencoderKL(**options | change).save_pretrained(tmp_path / name)
    flags = f"--ckpt {tmp_path / 'ckpt.pt'} --n 2 --out {tmp_path / 'out'}"
    for again in ("", f"--restart --vae {photos / 'vae'}"):              # the same, said or not
        main(sample, f"{flags} {again}")
        assert "warning" not in capsys.readouterr().err
    main(sample, f"{flags} --vae {tmp_path / 'same'}")
    assert "same is not the codec that made the data" in capsys.readouterr().err
    for name, words in (("wide", "32 pixels from 5 channels"), ("small", "16 pixels from 4")):
        with pytest.raises(data.UserError, match=f"{words}.* are of 32 pixels and 4 channels"):
            main(sample, f"{flags} --vae {tmp_path / name}")


def test_x_is_drawn_anew_at_every_step(photos, prepared, tmp_path, monkeypatch):
    drawn, unpack = [], data.Prepared.unpack

    def spy(self, stored, eps):
        drawn.append(eps)
        return unpack(self, stored, eps)

    monkeypatch.setattr(data.Prepared, "unpack", spy)
    main(train, f"--data {photos / 'prepared'} --model SiT-T/2 --r 4 --steps 3 --batch_size 4 "
                f"--sample_steps 2 --out {tmp_path}")
    net = tiny(r=4, x_channels=4)
    expected = [train.draw(0, step, 4, ALL, net, from_codec=True)[-1]
                for step in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected)) and len(drawn) == 3
    assert not torch.equal(drawn[0], drawn[1])


def test_opening_and_reading_cost_the_same_for_a_million_images(prepared, tmp_path):
    """Sparse files, in which nobody has written: what is mapped is not read."""
    def peak(n):
        for name in "xzy":
            shape = (n, *getattr(prepared, name).shape[1:])
            np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+",
                                      getattr(prepared, name).dtype, shape).flush()
        (tmp_path / "meta.json").write_text(json.dumps(prepared.meta | {"n": n}))
        tracemalloc.start()
        source = data.Prepared(str(tmp_path))
        source.batch(torch.tensor([0, n // 2, n - 1]))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    small = peak(1_000)
    assert peak(1_000_000) < 1.5 * small + 10_000


def test_batches_are_read_ahead_in_order():
    made = []
    taken = data.prefetch(lambda step: made.append(step) or step, range(3, 9), ahead=2)
    assert [next(taken), next(taken)] == [3, 4]
    time.sleep(0.2)
    assert sorted(made) == [3, 4, 5, 6] and list(taken) == [5, 6, 7, 8]


# pca.py

@pytest.fixture
def features():
    """(500, 6) with correlated channels of very different mean and scale."""
    f = normal(500, 6, dtype=DOUBLE) @ normal(6, 6, seed=1, dtype=DOUBLE)
    return (f * torch.tensor([1, 10, 0.1, 1, 5, 1]) + torch.arange(6) * 20).numpy()


def test_moments_do_not_depend_on_batching(features):
    whole = pca.Moments(6).update(features)
    parts = pca.Moments(6)
    for part in np.split(features.astype(np.float32), [1, 7, 300]):
        parts.update(part)
    assert whole.n == parts.n == 500
    assert np.allclose(whole.mean, features.mean(0)) and np.allclose(whole.cov, np.cov(features.T))
    assert np.allclose(parts.cov, whole.cov, rtol=1e-4)
    with pytest.raises(ValueError, match="NaN"):
        whole.update(np.full((1, 6), np.nan))
    with pytest.raises(ValueError, match="2 rows"):
        pca.Moments(6).update(features[:1]).cov


def test_pca_equals_scikit_learns(features):
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler
    standard = StandardScaler().fit_transform(features)
    theirs = PCA(4).fit(standard)
    ours = pca.fit(pca.Moments(6).update(features), 4)
    assert np.allclose(ours.components, theirs.components_, atol=1e-8)
    assert np.allclose(ours.variance, theirs.explained_variance_, rtol=1e-8)
    assert np.allclose(ours.variance / ours.total_variance, theirs.explained_variance_ratio_)
    assert np.allclose(ours.project(features), theirs.transform(standard), atol=1e-8)
    assert np.allclose(ours.project(features).std(0, ddof=1), ours.z_std)


def test_back_projection_undoes_projection(features):
    full = pca.fit(pca.Moments(6).update(features), 6, scale=1.7)
    assert np.allclose(full.back_project(full.project(features)), features)
    assert np.allclose(full.project(features, 2), full.project(features)[:, :2])
    plain = pca.fit(pca.Moments(6).update(features), 6)
    assert np.allclose(full.project(features), 1.7 * plain.project(features))
    least = plain.back_project(plain.project(features, 2))               # optimal of rank 2
    lost = ((least - features) / plain.std).var(0, ddof=1).sum()
    assert np.allclose(lost, plain.variance[2:].sum())


def test_a_constant_channel_gives_no_nan(features):
    features[:, 2] = 1000 / 3                                            # sums of it are inexact
    moments = pca.Moments(6).update(features)
    assert abs(moments.cov[2, 2]) > 0
    fitted = pca.fit(moments, 3)
    assert np.isfinite(fitted.project(features)).all()
    assert np.allclose(fitted.components[:, 2], 0, atol=1e-6)


def test_the_file_holds_everything_without_pickle(features, tmp_path):
    path = str(tmp_path / "pca.npz")
    fitted = pca.fit(pca.Moments(6).update(features), 3, 0.5, "some encoder")
    fitted.save(path)
    loaded = pca.load(path)
    assert (loaded.encoder, loaded.scale, loaded.n) == ("some encoder", 0.5, 500)
    assert np.array_equal(loaded.project(features), fitted.project(features))
    (tmp_path / "half.npz").write_bytes((tmp_path / "pca.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match="half.npz"):
        pca.load(str(tmp_path / "half.npz"))


def test_the_authors_file_is_converted_without_running_it(features, tmp_path):
    """A file made as theirs is, by torch.save of a fitted scikit-learn PCA, projects as theirs."""
    from sklearn.decomposition import PCA
    mean, std = features.mean(0) + 0.1, features.std(0) * 0.9            # theirs are off, too
    theirs = PCA().fit((features - mean) / std)
    stats = {"pca_model": theirs, "mean": mean.astype(np.float32), "std": std.astype(np.float32)}
    torch.save(stats, tmp_path / "official.pth")
    ours = pca.from_official(str(tmp_path / "official.pth"))
    expected = theirs.transform((features - stats["mean"]) / stats["std"])
    assert np.allclose(ours.project(features), expected, atol=1e-5)
    assert np.allclose(ours.z_std, expected.std(0, ddof=1)) and ours.n == 500
    assert ours.encoder == pca.DINOV2 and ours.scale == 1


def test_the_authors_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"pca_model": Evil(), "mean": 0, "std": 1}, tmp_path / "evil.pth")
    for content, words in ((None, "mkdir, which is not admitted"), (b"PK", "evil.pth is not")):
        if content:
            (tmp_path / "evil.pth").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            pca.from_official(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "evil").exists()


SHARED = HERE.parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"no real images in {SHARED}")


@needs_shared
def test_the_authors_own_file_has_the_published_spectrum():
    ours = pca.from_official(str(SHARED / "dino_pca_model.pth"))
    published = [5.77, 4.90, 4.79, 4.20, 4.01, 3.77, 3.68, 3.56]         # std of components 1 to 8
    assert ours.z_std[:8] == pytest.approx(published, abs=0.006)
    assert ours.n == 309_248 * 256 and ours.total_variance == pytest.approx(990, abs=1)


def test_pca_py_fits_and_shows(photos, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(pca, f"--images {photos / 'photos'} --size 32 --encoder {ENCODER} --encoder_weights "
              f"{photos / 'encoder.safetensors'} --r_keep 6 --batch_size 4 --workers 0")
    assert (tmp_path / "pca.npz").read_bytes() == (photos / "prepared/pca.npz").read_bytes()
    assert os.listdir(tmp_path) == ["pca.npz"] and "6 of 48 components" in capsys.readouterr().out
    main(pca, str(photos / "prepared"))
    shown = capsys.readouterr().out
    assert "fitted on 44 feature vectors" in shown and "z.png: an image a column" in shown
    picture = np.asarray(Image.open(photos / "prepared/z.png"))
    assert picture.shape == (2 * 98 + 2, 10 * 98 + 2, 3)                 # 6 components: two rows
    (photos / "prepared/z.png").unlink()
    z, z_std = prepared.z[prepared.rows(prepared.examples(10).numpy())], prepared.meta["z_std"]
    assert (picture[98 + 50, 98 + 50] == pca.colours(z[1:2, 3:], z_std[3:])[0, 1, 1]).all()


# train.py

def loss_inputs(net, B=4):
    x_t, z_t, t, y = inputs(net, B)
    eps_z = normal(*z_t.shape, seed=8) if net.r else None
    return x_t, z_t, y, t, normal(*x_t.shape, seed=7), eps_z


@pytest.mark.parametrize("name", ["SiT-T/2", "DiT-T/2"])
def test_z_is_dropped_per_sample_in_the_input_and_in_the_loss(name):
    net = tiny(name)
    x, z, y, t, eps_x, eps_z = loss_inputs(net)
    dropped, seen = torch.tensor([False, True, False, True]), []

    def spy(x_t, z_t, t, y):
        seen.append(z_t)
        return net(x_t, z_t, t, y)

    loss_x, loss_z = train.joint_loss(spy, net.process, x, z, y, t, eps_x, eps_z, dropped)
    assert (seen[0].flatten(1) == 0).all(1).tolist() == (loss_z == 0).tolist() == dropped.tolist()
    kept_x, kept_z = train.joint_loss(net, net.process, x, z, y, t, eps_x, eps_z, dropped & False)
    assert loss_z[~dropped].allclose(kept_z[~dropped])
    assert loss_x[~dropped].allclose(kept_x[~dropped])
    assert not loss_x[dropped].allclose(kept_x[dropped])
    assert (loss_x > 0).all() and (kept_z > 0).all()


def test_a_dropped_samples_z_reaches_no_gradient():
    net = tiny().requires_grad_(True)
    x, z, y, t, eps_x, eps_z = loss_inputs(net)
    gradients = []
    for other in (0, 100):
        net.zero_grad()
        loss_x, loss_z = train.joint_loss(net, net.process, x, z + other, y, t, eps_x, eps_z,
                                          torch.ones(4, dtype=torch.bool))
        (loss_x + loss_z).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_dropout_and_guidance_null_z_through_one_function(monkeypatch):
    net, calls, drop_z = tiny(), [], model.drop_z
    monkeypatch.setattr(model, "drop_z",
                        lambda z, dropped: calls.append(len(z)) or drop_z(z, dropped))
    x, z, y, t, eps_x, eps_z = loss_inputs(net)
    train.joint_loss(net, net.process, x, z, y, t, eps_x, eps_z, torch.zeros(4, dtype=torch.bool))
    sample.guided(net, y, w_r=2)((x, z), 0.5)
    assert calls == [4, 8]


def objective(net, d=0, **settings):
    """train.Objective of size T, its random weights ours."""
    settings = {"model": "SiT-T/2", "p_drop_y": 0.0, "p_drop_z": 0.0, "lam_z": 1.0,
                "repa": 0.0} | settings
    torch.manual_seed(0)
    return train.Objective(net, settings, d)


def test_a_batchs_loss_drops_and_weighs_as_the_settings_say():
    net = tiny()
    x, z, y, t, *_ = loss_inputs(net)
    draws = (t, *train.draw(0, 0, 4, ALL, net)[1:-1])

    def loss(y=y, z=z, **settings):
        return objective(net, **settings)(x, z, y, None, *draws)[0].mean()

    x_alone = loss(lam_z=0)
    assert loss(lam_z=0.5).item() == pytest.approx((x_alone + loss()).item() / 2)
    assert loss(p_drop_y=1) == loss(y=torch.full_like(y, 10)) != loss()
    assert loss(p_drop_z=1) == loss(p_drop_z=1, z=z + 1) and loss(p_drop_z=1) < loss()
    _, _, counts = objective(net, p_drop_z=0.5)(x, z, y, None, *draws)
    assert counts[1] == (draws[2] >= 0.5).sum()                         # kept


@pytest.mark.parametrize("fusion", model.FUSIONS)
def test_repa_aligns_xs_tokens_after_block_2_of_size_t(fusion):
    """Its loss is 1 - half the squared distance of unit vectors, less 1; z dropped or not."""
    net, f = tiny(fusion=fusion), normal(4, 6, 2, 2, seed=9)
    x, z, y, t, *_ = loss_inputs(net)
    draws = (t, *train.draw(0, 0, 4, ALL, net)[1:-1])
    both = objective(net, d=6, repa=0.5, p_drop_z=0.5)
    seen = []
    net.blocks[1].register_forward_hook(lambda block, given, out: seen.append(out))
    alone = objective(net, p_drop_z=0.5)(x, z, y, None, *draws)[0]
    loss, _, counts = both(x, z, y, f, *draws)
    tokens = both.projector(seen[0][:, :16])                            # x's come first
    wanted = torch.nn.functional.interpolate(f, size=(4, 4), mode="bilinear").flatten(2).mT
    unit = [part / part.norm(dim=-1, keepdim=True) for part in (tokens, wanted)]
    repa = (unit[0] - unit[1]).square().sum(-1).mean(1) / 2 - 1
    assert loss.allclose(alone + 0.5 * repa, atol=1e-5)
    assert counts[5].item() == pytest.approx(repa.sum().item(), rel=1e-5)
    assert [layer.weight.shape for layer in both.projector[::2]] == [
        (2048, 128), (2048, 2048), (6, 2048)]


def test_draws_are_functions_of_seed_and_step_and_place():
    net = tiny()
    one, again, other = (train.draw(0, step, 6, ALL, net) for step in (3, 3, 4))
    *one, none = one
    assert none is None                                               # no codec, nothing to draw
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert all(not torch.equal(a, b) for a, b in zip(one, other))
    part = train.draw(0, 3, 6, slice(2, 4), net)                      # another process's, alone
    assert all(torch.equal(a[2:4], b) for a, b in zip(one, part))
    u, u_y, u_z, eps_x, eps_z = one
    *_, eps_vae = train.draw(0, 3, 6, ALL, net, from_codec=True)
    assert eps_vae.shape == eps_x.shape and not torch.equal(eps_vae, eps_x)
    assert eps_x.shape == (6, 2, 8, 8) and eps_z.shape == (6, 3, 8, 8)
    assert len({*u.tolist(), *u_y.tolist(), *u_z.tolist()}) == 18 and u.shape == (6,)
    assert eps_x.flatten(1).unique(dim=0).shape == (6, 128)           # no two samples' are alike
    none = train.draw(0, 3, 6, ALL, tiny(fusion="none"))
    assert none[4] is None and torch.equal(none[3], eps_x)            # x's noise for every fusion


def test_draws_are_uniform_and_normal():
    u, u_y, u_z, eps_x, eps_z, _ = train.draw(0, 0, 512, ALL, tiny())
    for numbers, cdf in ((u, "uniform"), (u_y, "uniform"), (u_z, "uniform"), (eps_x, "norm"),
                         (eps_z, "norm")):
        assert scipy.stats.kstest(numbers.flatten().numpy(), cdf).pvalue > 1e-3
    assert eps_x.mean(0).abs().max() < 5 / 512 ** 0.5                 # generators, too, are apart


def test_ema_ramps_up_and_averages():
    net, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    expected = 0.0
    with torch.no_grad():
        for p in ema.parameters():
            p.zero_()
        for step in range(20):
            for p in net.parameters():
                p.fill_(step)
            train.update_ema(ema, net, 0.9, step)
            decay = min(0.9, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * step
    assert ema.weight.item() == pytest.approx(expected, rel=1e-5) and 15 < expected < 19


def test_the_log_divides_z_by_kept_samples_and_splits_by_quarter():
    loss_x, loss_z = torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 0, 20, 0])
    dropped, time = torch.tensor([False, True, False, True]), torch.tensor([0.0, 0.1, 0.3, 1.0])
    loss_repa = torch.full((4,), -0.5)
    sums = train.tally(loss_x + 0.5 * loss_z, loss_x, loss_z, loss_repa, dropped, time)
    sums = torch.cat([sums, torch.tensor([4 * 3.0])])                    # norm 3, for 4 samples
    entry = train.log_entry(7, sums + sums, {"fusion": "merged", "repa": 0.5}, 12.34, 0.0512)
    assert entry == {"step": 7, "loss": 6.25, "loss_x": 2.5, "loss_z": 15.0, "loss_repa": -0.5,
                     "loss_q0": 4.0, "loss_q1": 13.0, "loss_q2": None, "loss_q3": 4.0,
                     "grad_norm": 3.0, "images_per_s": 12.3, "waited_percent": 5.1}
    entry = train.log_entry(7, sums, {"fusion": "none", "repa": 0}, 1, 0)
    assert "loss_z" not in entry and "loss_repa" not in entry


def test_quarter_0_is_the_noisiest_for_both_processes():
    flow, ddpm = model.Flow(), model.DDPM()
    assert flow.data_time(torch.tensor([0.1])) < 0.25 and ddpm.data_time(torch.tensor([990])) < 0.25
    x, eps = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert flow.add_noise(x, eps, torch.tensor([0.1])) < 0.2
    assert ddpm.add_noise(x, eps, torch.tensor([990])) < 0.2


def settings_for(*flags, checkpoint=None):
    given = vars(train.parser().parse_args(flags))
    return train.resolve({k: v for k, v in given.items() if v is not None and k not in
                          train.OF_THE_MACHINE}, checkpoint)


def test_defaults_are_the_papers_but_for_size_t_on_digits():
    xl = settings_for("--model", "SiT-XL/2")
    assert (xl["data"], xl["lr"], xl["batch_size"], xl["steps"], xl["r"], xl["sample_steps"]) == (
        "prepared/imagenet256", 1e-4, 256, 400_000, 8, 250)
    assert (xl["fusion"], xl["lam_z"], xl["p_drop_z"], xl["p_drop_y"], xl["ema"]) == (
        "merged", 1, 0.2, 0.1, 0.9999)
    digits = settings_for()
    assert (digits["model"], digits["data"], digits["batch_size"], digits["r"]) == (
        "SiT-T/2", "digits", 128, 4)
    assert settings_for("--data", "elsewhere")["lr"] == 1e-4


@pytest.mark.parametrize("flags, words", [
    ("--model SiT-Q/2", "SiT-T/2"), ("--fusion none --r 4", "--r"), ("--r 0", "--r"),
    ("--fusion none --lam_z 1", "--lam_z"), ("--fusion none --p_drop_z 0.2", "--p_drop_z"),
    ("--steps 0", "--steps"), ("--lr nan", "--lr"), ("--p_drop_z 1.5", "--p_drop_z"),
    ("--batch_size 3", "--batch_size"), ("--model DiT-T/2 --sample_steps 1", "--sample_steps")])
def test_impossible_settings_are_refused(flags, words):
    with pytest.raises(data.UserError, match=words):
        train.check(settings_for(*flags.split()), n_processes=2)


def test_flags_that_contradict_the_checkpoint_are_refused():
    checkpoint = {"settings": settings_for("--seed", "3", "--lam_z", "0.5")}
    assert settings_for("--steps", "9", checkpoint=checkpoint)["lam_z"] == 0.5
    assert settings_for("--seed", "3", checkpoint=checkpoint)["seed"] == 3
    for flags in ("--seed 0", "--lam_z 1", "--model SiT-T/4", "--fusion none", "--r 2", "--lr 1",
                  "--unconditional", "--data x", "--batch_size 2", "--ema 0", "--p_drop_z 0",
                  "--p_drop_y 0"):
        with pytest.raises(data.UserError, match=f"{flags.split()[0]} .*contradicts"):
            settings_for(*flags.split(), checkpoint=checkpoint)


def losses(out):
    """The comparable part of log.jsonl: steps and losses."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in ("images_per_s", "waited_percent")}
            for line in lines if "loss" in line]


def evaluations(out):
    """The lines of --eval_every, without their time."""
    rows = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    return [{name: row[name] for name in row if name != "eval_seconds"}
            for row in rows if "eval_seconds" in row]


def same_weights(out_1, out_2, parts=("net", "ema")):
    one, two = (sample.load_checkpoint(str(out / "ckpt.pt")) for out in (out_1, out_2))
    return all(torch.equal(one[part][name], two[part][name])
               for part in parts for name in one[part])


@pytest.fixture
def one_thread():
    """As run() computes: sums of other threads are other bits."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def train_together(out, flags="", n_ranks=1, at_call=None, die=None):
    """The exit codes of ranks that train as BRIEF says and more; at_call: (owner, name, k) is a
    function whose k-th call is the end: by die(), or SIGKILL in the middle of it."""
    def work():
        if at_call:
            owner, name, k = at_call
            function, calls = getattr(owner, name), iter(range(k))

            def last_call(*args, **kwargs):
                if next(calls, None) is None:
                    (die or (lambda *args: os.kill(os.getpid(), signal.SIGKILL)))(*args)
                return function(*args, **kwargs)

            setattr(owner, name, last_call)
        main(train, f"{BRIEF.removeprefix('train.py ')} --out {out} {flags}")

    return in_ranks(work, n_ranks)


def torn_write(path, write):
    """A power cut in the middle of a write."""
    with open(f"{path}.part", "wb") as file:
        write(file)
    os.truncate(f"{path}.part", 1000)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(
        workdir, tmp_path, monkeypatch, n_ranks):
    """In an epoch's middle, in gradient accumulation, between the last renames of a checkpoint, in
    the write of one; 16 of 40 rows a step, so that the third step begins another epoch."""
    monkeypatch.chdir(workdir)
    rows_of_step = data.rows_of_step
    monkeypatch.setattr(data, "rows_of_step", lambda *args: rows_of_step(*args[:-1], 40))
    flags = f"--micro_batch_size {8 // n_ranks} --ckpt_every 2 --keep_every 3"
    assert train_together(tmp_path / "whole", flags, n_ranks) == [0] * n_ranks
    moments = [((train.Objective, "forward", 1), None), ((train.Objective, "forward", 7), None),
               ((os, "replace", 3), None), ((train, "write_whole", 1), torn_write),
               ((train.Trainer, "update", 1), None)]
    for at_call, die in moments:
        codes = train_together(tmp_path / "out", flags, n_ranks, at_call=at_call, die=die)
        assert -signal.SIGKILL in codes, (at_call, codes)
    assert train_together(tmp_path / "out", flags, n_ranks) == [0] * n_ranks
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "out")) == 4 and same_weights(tmp_path / "out", tmp_path / "whole")
    kept = {path.name for path in (tmp_path / "out").glob("ckpt*")}
    assert kept == {"ckpt.pt", "ckpt_prev.pt", "ckpt_0000003.pt", "ckpt_0000006.pt"}


def test_quality_is_measured_once_at_each_point_however_often_the_run_is_killed(
        workdir, tmp_path, monkeypatch):
    """Killed in a measurement, told to stop in one, killed after one whose checkpoint is there,
    told to stop as the last step ends; by two processes, which share the samples. At the end it is
    what anybody measures."""
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(train, "JUDGED_AT_ONCE", 17)
    stop = lambda *args: os.kill(os.getpid(), signal.SIGTERM)
    flags = "--eval_every 3 --eval_n 50 --steps 6 --ckpt_every 100"
    assert train_together(tmp_path / "whole", flags) == [0]
    for at_call, die, code, saved in (
            ((fid.Judge, "see", 1), None, -signal.SIGKILL, 3),
            ((fid.Judge, "see", 0), stop, 128 + signal.SIGTERM, 3),
            ((train.Trainer, "update", 1), None, -signal.SIGKILL, 3),
            ((train.Trainer, "gradients", 1), stop, 128 + signal.SIGTERM, 6)):
        codes = train_together(tmp_path / "out", flags, 2, at_call=at_call, die=die)
        assert code in codes
        assert sample.load_checkpoint(str(tmp_path / "out/ckpt.pt"))["step"] == saved
    see = fid.Judge.see

    def noted(self, images):
        with open(tmp_path / f"seen_by_{os.environ['RANK']}", "a") as file:
            file.write(f"{len(images)} ")
        return see(self, images)

    monkeypatch.setattr(fid.Judge, "see", noted)
    assert train_together(tmp_path / "out", flags, 2) == [0, 0]
    assert (tmp_path / "seen_by_1").read_text() == "17 "                 # the other has 17 and 16
    measured = evaluations(tmp_path / "out")
    assert [row["step"] for row in measured] == [3, 6]
    for one, other in zip(evaluations(tmp_path / "whole"), measured, strict=True):
        assert other == pytest.approx(one, rel=1e-3)
    net, about = sample.load_model(str(tmp_path / "out/ckpt.pt"))
    x, _ = sample.generate(net, torch.arange(50) % 10, about["settings"]["sample_steps"])
    expected = fid.judge_digits(data.to_images(x), np.arange(50) % 10)
    assert measured[1] == pytest.approx({"step": 6} | expected, rel=1e-3)


def test_photographs_are_measured_against_training_images_or_a_given_reference(
        photos, prepared, tmp_path, capsys, monkeypatch):
    """By every 50th value of the pixels, for the sake of time."""
    monkeypatch.setattr(fid.Space, "__call__", lambda self, images: (images.flatten(1)[:, ::50],))
    folder = str(photos / "prepared")
    flags = (f"--data {folder} --model SiT-T/2 --r 4 --steps 2 --batch_size 4 --sample_steps 3 "
             f"--eval_every 2 --eval_n 6 --eval_features pixels --out {tmp_path}/")
    source = data.Prepared(folder, 4)
    images = data.decode(source.batch(source.examples(6))[0], source.meta)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    for name, reference in (("a", ""), ("b", f"--eval_reference {tmp_path / 'reference.npz'}")):
        main(train, f"{flags}{name} {reference}")
    net, _ = sample.load_model(str(tmp_path / "a/ckpt.pt"))
    x, _ = sample.generate(net, torch.arange(6) % net.n_classes, 3)
    seen = [each.transpose(0, 3, 1, 2).reshape(6, -1)[:, ::50]
            for each in (data.decode(x, source.meta), images)]
    key, expected = "frechet_pixels_6_vs_6", fid.distance_of_features(*seen)
    (row,), (other,) = evaluations(tmp_path / "a"), evaluations(tmp_path / "b")
    assert set(row) == {"step", key} and row == other
    assert row[key] == pytest.approx(expected, rel=1e-3)
    assert f"step 2: {key} {row[key]:.2f}" in capsys.readouterr().out
    for wrong, words in (("--eval_reference digits", "give images"), ("--eval_n 1", "at least 2"),
                         ("--eval_features nonsense", "--eval_features nonsense cannot be had"),
                         ("--eval_reference nowhere", "--eval_reference nowhere: no such file"),
                         ("--eval_weights nowhere", "--eval_weights nowhere: no such file")):
        with pytest.raises(data.UserError, match=words):
            main(train, f"{flags}c {wrong}")


def test_a_torn_log_line_is_dropped_and_what_is_there_is_repeated(workdir, tmp_path, monkeypatch,
                                                                  one_thread):
    """Killed while it saved step 8: the log goes beyond step 4's checkpoint, its end is torn."""
    for file in ("ckpt_prev.pt", "log.jsonl"):
        (tmp_path / file).write_bytes((workdir / "out" / file).read_bytes())
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3}')                                        # its line end is missing
    assert sample.load_checkpoint(str(tmp_path / "ckpt_prev.pt"))["step"] == 4
    monkeypatch.chdir(workdir)
    main(train, f"{BRIEF.removeprefix('train.py ')} --out {tmp_path}")
    assert losses(tmp_path) == losses(workdir / "out") and len(losses(tmp_path)) == 4
    assert same_weights(tmp_path, workdir / "out")


@pytest.mark.parametrize("n_ranks, micro", [(1, 4), (2, 8), (2, 2)])
def test_processes_and_micro_batches_change_a_step_by_its_summation_order_alone(
        workdir, tmp_path, monkeypatch, n_ranks, micro):
    monkeypatch.chdir(workdir)
    flags = f"--micro_batch_size {micro}"
    assert train_together(tmp_path, flags, n_ranks) == [0] * n_ranks
    for one, other in zip(losses(workdir / "out"), losses(tmp_path), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_gradients_of_several_processes_meet_once_a_step(workdir, tmp_path, monkeypatch):
    """Counted where they meet, in the bucket's hook."""
    monkeypatch.chdir(workdir)
    wrap = train.DistributedDataParallel

    def counting(module, **options):
        parallel = wrap(module, **options)

        def hook(process_group, bucket):
            with open(tmp_path / f"meetings_{train.dist.get_rank()}", "a") as file:
                file.write(f"{bucket.is_last()}\n")
            return train.dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(
                lambda future: future.value()[0])

        parallel.register_comm_hook(None, hook)
        return parallel

    monkeypatch.setattr(train, "DistributedDataParallel", counting)
    assert train_together(tmp_path, "--micro_batch_size 2", 2) == [0, 0]
    for rank in (0, 1):
        assert (tmp_path / f"meetings_{rank}").read_text().count("True") == 8


def test_checkpointed_activations_are_computed_twice_to_the_same_bits(workdir):
    figures = []
    for flag in ("--no-grad_checkpointing", "--grad_checkpointing"):
        trainer = train.Trainer(settings_for("--data", str(workdir / "prepared/digits")),
                                train.parser().parse_args(["--no-bf16", flag]), torch.device("cpu"))
        calls = []
        for block in trainer.net.blocks:
            block.register_forward_pre_hook(lambda *args: calls.append(1))
        loss, _, norm = trainer.gradients(trainer.assemble(0)[1])
        figures.append((len(calls), loss.tolist(), norm.item()))
    assert [calls for calls, *_ in figures] == [4, 8] and figures[0][1:] == figures[1][1:]


def test_a_trainers_average_ramps_up_with_its_steps(workdir):
    trainer = train.Trainer(settings_for("--data", str(workdir / "prepared/digits")),
                            train.parser().parse_args(["--no-bf16"]), torch.device("cpu"))
    weight, average = trainer.net.blocks[0].mlp.fc1.weight, trainer.ema.blocks[0].mlp.fc1.weight
    expected = weight.detach().clone()
    for decay in (1 / 10, 2 / 11, 3 / 12):
        trainer.gradients(trainer.assemble(trainer.step)[1])
        trainer.update()
        expected = decay * expected + (1 - decay) * weight.detach()
    assert average.allclose(expected, rtol=1e-5) and not average.allclose(weight, rtol=1e-5)


@pytest.mark.slow
def test_compiled_training_takes_the_same_steps(workdir, tmp_path, monkeypatch):
    """By inductor: forward, backward, twice computed activations, and two processes."""
    monkeypatch.chdir(workdir)
    run(f"{BRIEF} --compile --grad_checkpointing --out {tmp_path / 'one'}", workdir)
    assert torchrun(f"{BRIEF} --compile --micro_batch_size 4 --out {tmp_path / 'two'}") == 0
    for out in ("one", "two"):
        for plain, compiled in zip(losses(workdir / "out"), losses(tmp_path / out), strict=True):
            assert compiled == pytest.approx(plain, rel=1e-3)
    checkpoint = sample.load_checkpoint(str(tmp_path / "two/ckpt.pt"))
    assert set(checkpoint["net"]) == set(model.build(**checkpoint["arch"]).state_dict())


def test_the_gradients_norm_is_logged_before_clipping(workdir):
    trainer = train.Trainer(settings_for("--data", str(workdir / "prepared/digits")),
                            train.parser().parse_args(["--no-bf16"]), torch.device("cpu"))
    trainer.settings["grad_clip"] = 0.01
    _, _, norm = trainer.gradients(trainer.assemble(0)[1])
    grads = torch.cat([param.grad.flatten() for param in trainer.params])
    assert norm > 0.1 and grads.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert (trainer.sums[-1] / trainer.sums[0]).item() == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("number, times", [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_saves_at_the_next_step_and_says_so(
        workdir, tmp_path, monkeypatch, capfd, number, times):
    """To one process of two, SIGTERM twice: both end, the other not before the checkpoint is there,
    and going on ends where the undisturbed run does."""
    monkeypatch.chdir(workdir)
    save, destroy = train.save_checkpoint, train.dist.destroy_process_group

    def slowly(*args):
        time.sleep(0.5)
        save(*args)

    def send(*args):
        if os.environ["RANK"] == "1":
            for _ in range(times):
                os.kill(os.getpid(), number)

    def look_and_destroy():
        there = (tmp_path / "ckpt.pt").exists()
        (tmp_path / f"seen_by_{os.environ['RANK']}").write_text(str(there))
        destroy()

    monkeypatch.setattr(train, "save_checkpoint", slowly)
    monkeypatch.setattr(train.dist, "destroy_process_group", look_and_destroy)
    codes = train_together(tmp_path, "--ckpt_every 100", 2,
                           at_call=(train.Trainer, "gradients", 3), die=send)
    assert codes[0] == 128 + signal.SIGTERM and codes[1] == 128 + number
    assert [(tmp_path / f"seen_by_{rank}").read_text() for rank in "01"] == ["True", "True"]
    saved = sample.load_checkpoint(str(tmp_path / "ckpt.pt"))["step"]
    said = f"SIGTERM: saved {tmp_path}/ckpt.pt at step {saved}; the same command goes on"
    assert 3 <= saved <= 5 and said in capfd.readouterr().err
    assert train_together(tmp_path, "--ckpt_every 100", 2) == [0, 0]
    for one, other in zip(losses(workdir / "out"), losses(tmp_path), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(
        workdir, tmp_path, monkeypatch, capsys, one_thread):
    """Cut short, and with one wrong byte, which its checksum finds out."""
    monkeypatch.chdir(workdir)
    for i, damage in enumerate((lambda whole: whole[:len(whole) // 2], flip_a_byte)):
        shutil.copytree(workdir / "out", tmp_path / str(i))
        path = tmp_path / str(i) / "ckpt.pt"
        path.write_bytes(damage(path.read_bytes()))
        main(train, f"{BRIEF.removeprefix('train.py ')} --out {tmp_path / str(i)}")
        said = capsys.readouterr().err
        assert "ckpt.pt is damaged" in said and "going on from" in said and "step 4" in said
        assert losses(tmp_path / str(i)) == losses(workdir / "out")
        assert (tmp_path / str(i) / "ckpt.pt.damaged").exists()
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / "0" / name).write_bytes(b"nothing")
    shutil.copy(workdir / "out/ckpt.pt", tmp_path / "0/ckpt_0000008.pt")
    with pytest.raises(data.UserError, match="ckpt.pt is damaged.*ckpt_prev.pt .*ckpt_0000008.pt"):
        main(train, f"--out {tmp_path / '0'}")


def test_trouble_in_reading_a_checkpoint_is_no_damage(workdir, tmp_path, monkeypatch):
    shutil.copytree(workdir / "out", tmp_path / "out")

    def broken_disk(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(model.zipfile, "ZipFile", broken_disk)
    with pytest.raises(OSError, match="Input/output"):
        main(train, f"--out {tmp_path / 'out'}")
    assert (tmp_path / "out/ckpt.pt").exists()


def flip_a_byte(whole):
    at = whole.index(b"/data/") + 50_000
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]


def test_a_full_disk_leaves_the_checkpoints_whole(workdir, tmp_path, monkeypatch):
    """Files that may not grow beyond 1 MB behave like it, torch's own writer included."""
    monkeypatch.chdir(workdir)
    shutil.copytree(workdir / "out", tmp_path / "out")
    before = content(tmp_path / "out", "*.pt")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(data.UserError, match="File too large.*whole: .*goes on"):
            main(train, f"--out {tmp_path / 'out'} --steps 12 --ckpt_every 100")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path / "out", "*.pt") == before
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_loss_that_is_not_finite_names_the_images_and_no_checkpoint_has_it(
        workdir, tmp_path, monkeypatch):
    """Row 5 is NaN: the run ends at the step that reads it, or the next."""
    monkeypatch.chdir(workdir)
    read, seen = data.Prepared.read, []

    def spoiled(self, numbers):
        x, *others = read(self, numbers)
        x[torch.from_numpy(self.rows(numbers.numpy())) == 5] = float("nan")
        return x, *others

    monkeypatch.setattr(data.Prepared, "read", spoiled)
    update = train.Trainer.update
    monkeypatch.setattr(train.Trainer, "update",
                        lambda self: seen.append(self.step) or update(self))
    order = torch.cat([data.rows_of_step(0, step, 128, 1618) for step in range(13)])
    step = order.tolist().index(5) // 128
    with pytest.raises(data.UserError, match=fr"^step {step} is not finite: the loss of row 5 at t "
                                             r"0\.\d+; the last"):
        main(train, f"--steps 20 --ckpt_every 1 --out {tmp_path}")
    assert max(seen) == step                                              # and no step after it
    saved = sample.load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert saved["step"] == step and all(w.isfinite().all() for w in saved["net"].values())


def test_a_gradient_that_is_not_finite_stops_the_run_everywhere(
        workdir, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(workdir)

    def spoil(trainer, parts):
        if os.environ["RANK"] == "1" and trainer.step == 2:
            trainer.params[0].register_hook(lambda grad: grad * float("inf"))

    codes = train_together(tmp_path, "--ckpt_every 1", 2, at_call=(train.Trainer, "gradients", 2),
                           die=spoil)
    assert codes == [1, 1]
    said = capfd.readouterr().err
    assert said.count("step 2 is not finite: the gradient's norm is") == 2
    assert sample.load_checkpoint(str(tmp_path / "ckpt.pt"))["step"] == 2


def test_machines_that_do_not_share_a_disk_are_found_out(workdir, tmp_path, monkeypatch, capfd):
    """Rank 1 looks for the checkpoint in another place."""
    shutil.copytree(workdir / "out", tmp_path / "a/out")
    (tmp_path / "b").mkdir()
    for folder in "ab":
        os.symlink(workdir / "prepared", tmp_path / folder / "prepared")
    monkeypatch.chdir(tmp_path / "a")

    def elsewhere(*args):
        if os.environ["RANK"] == "1":
            os.chdir(tmp_path / "b")

    codes = train_together("out", "--steps 12", 2, at_call=(train, "newest_checkpoint", 0),
                           die=elsewhere)
    assert codes == [1, 1]
    assert "different checkpoints (steps 8, 0), flags or data" in capfd.readouterr().err


def start_weights(tmp_path, weights):
    torch.save(weights, tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


@pytest.mark.parametrize("family", ["SiT", "DiT"])
def test_a_plain_published_net_goes_on_with_redi_unchanged_at_step_0(tmp_path, family):
    path = start_weights(tmp_path, {"ema": published(family, 0), "opt": 1,
                                    "args": argparse.Namespace(lr=1)})
    net = model.build(f"{family}-T/2", "merged", 3, 10, 4, 8).eval()
    model.adopt(net, sample.load_model(path, f"{family}-T/2")[0])
    x_t, z_t, t, y = peer_inputs(family)
    with torch.no_grad():
        pred_x, pred_z = net(x_t, z_t, t, y)
        assert torch.equal(pred_x, model.load_published(published(family, 0), family)(
            x_t, None, t, y)[0])
    assert not pred_z.any() and not net.z_embedder.proj.weight.any()
    net(x_t, z_t, t, y)[1].sub(1).square().mean().backward()
    assert net.final_layer.linear_z.bias.grad.any()                     # and it learns


def test_init_takes_our_checkpoint_redis_own_and_other_classes(workdir, tmp_path):
    saved = sample.load_checkpoint(str(workdir / "out/ckpt.pt"))
    net = model.build(**saved["arch"])
    model.adopt(net, sample.load_model(str(workdir / "out/ckpt.pt"))[0])
    assert all(torch.equal(w, net.state_dict()[name]) for name, w in saved["ema"].items())
    path = start_weights(tmp_path, published("SiT", 3))
    net = model.build("SiT-T/2", "separate", 3, 7, 4, 16)               # a larger image, too
    fresh = net.y_embedder.embedding_table.weight.clone()
    model.adopt(net, sample.load_model(path)[0])
    table = net.y_embedder.embedding_table.weight
    assert torch.equal(table[:-1], fresh[:-1])
    assert torch.equal(table[-1], published("SiT", 3)["y_embedder.embedding_table.weight"][-1])
    for args, words in ((("SiT-T/2", "merged", 4, 10, 4, 8), "3 channels of z, this run 4: take"),
                        (("DiT-T/2", "merged", 3, 10, 4, 8), "DiT cannot become SiT"),
                        (("SiT-S/2", "merged", 3, 10, 4, 8), "another model than"),
                        (("SiT-T/2", "merged", 3, 10, 2, 8), "x_embedder.proj.weight is")):
        with pytest.raises(ValueError, match=words):
            model.adopt(model.build(*args), sample.load_model(path)[0])
    digits = f"--data {workdir}/prepared/digits --out {tmp_path}/run --init"
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    for flags, words in ((f"{digits} {path}", f"--init {path}: it has 3 channels of z, this run 8"),
                         (f"{digits} {tmp_path}/broken.pt", "broken.pt is damaged, or neither"),
                         (f"{digits} {tmp_path}/none", "none: no such file")):
        with pytest.raises(data.UserError, match=words):
            main(train, flags)
    brief = f"{BRIEF.removeprefix('train.py ')} --data {workdir}/prepared/digits --out {tmp_path}/b"
    main(train, f"{brief} --r 4 --init {shutil.copy(workdir / 'out/ckpt.pt', tmp_path / 'a.pt')}")
    (tmp_path / "a.pt").unlink()                                        # not needed any more
    main(train, f"{brief} --steps 10 --init {tmp_path / 'a.pt'}")


def test_a_pickle_that_runs_code_is_no_weights(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(data.UserError, match="no plain weights are in it but posix.mkdir"):
        sample.load_model(start_weights(tmp_path, {"ema": Evil()}), "SiT-T/2")
    assert not (tmp_path / "ran").exists()


def test_published_variances_are_left_out_and_plain_nets_must_be_named():
    with_sigma = published("SiT", 3, learn_sigma=True)
    net = model.load_published(with_sigma)
    assert type(net.process) is model.Flow and net.r == 3
    rows = with_sigma["final_layer.linear.weight"].view(4, 14, 128)
    assert torch.equal(net.final_layer.linear.weight.view(4, 4, 128), rows[:, :4])
    assert torch.equal(net.final_layer.linear_z.weight.view(4, 3, 128), rows[:, 4:7])
    plain = published("SiT", 0)
    for weights, family, words in (
            (plain, None, "look alike"), (plain, "DiT", "take SiT"), ({"a": 1}, None, "lack"),
            (plain | {"blocks.4.attn.qkv.weight": 1}, "SiT", "5 blocks")):
        with pytest.raises(ValueError, match=words):
            model.load_published(weights, family)


def test_repa_without_kept_features_is_refused(photos, prepared, tmp_path):
    with pytest.raises(data.UserError, match="--repa needs .*--keep_features"):
        main(train, f"--data {photos / 'prepared'} --model SiT-T/2 --repa --out {tmp_path}")


def test_repa_instead_of_redi_goes_on_bit_for_bit(workdir, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(workdir)
    flags = f"{BRIEF.removeprefix('train.py ')} --fusion none --repa --batch_size 4 "
    main(train, flags + f"--out {tmp_path / 'whole'}")
    main(train, flags + f"--steps 4 --out {tmp_path / 'out'}")
    main(train, f"--out {tmp_path / 'out'} --steps 8")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "out", tmp_path / "whole", ("net", "ema", "projector"))
    main(sample, f"--ckpt {tmp_path / 'out/ckpt.pt'} --n 2 --out {tmp_path / 'samples'}")


def test_compiled_blocks_compute_the_same():
    net = tiny()
    expected = net(*inputs(net))
    for block in net.blocks:
        block.compile(backend="aot_eager")
    assert all(a.allclose(b, atol=1e-6) for a, b in zip(net(*inputs(net)), expected))
    assert not any("_orig_mod" in name for name in net.state_dict())


def test_training_imports_neither_timm_nor_diffusers_and_help_not_even_torch(workdir):
    program = ("import runpy, sys; sys.argv = {argv}\n"
               "try:\n    runpy.run_path({path!r}, run_name='__main__')\nfinally:\n"
               "    print([m for m in ('torch', 'timm', 'diffusers') if m in sys.modules])")
    for argv, loaded in ((["train.py", "--help"], "[]"), (
            f"{BRIEF} --data prepared/digits --batch_size 2 --steps 1 --out {workdir}/imports"
            .split(), "['torch']")):
        said = subprocess.run([sys.executable, "-c", program.format(
            argv=argv, path=str(HERE / "train.py"))], cwd=workdir, capture_output=True, text=True)
        assert said.stdout.splitlines()[-1] == loaded, said


def test_the_process_that_dies_is_in_torchruns_summary_with_its_error(tmp_path, capfd):
    """And its line stands alone, before the summary."""
    assert torchrun(f"train.py --data {tmp_path}/nothing --batch_size 4 --out {tmp_path}/out") == 1
    said = capfd.readouterr().err
    assert "error: no prepared data in" in said
    assert "UserError" in said and "exitcode  : 1" in said, said


# sample.py

STATE = 0.4, 5                                                          # t for flow, step for DDPM


def call(net, y, **guidance):
    x_t, z_t, *_ = inputs(net)
    state = (x_t, z_t) if net.r else (x_t,)
    return sample.guided(net, y, **guidance)(state, STATE[net.process.outputs - 1])


def plain(net, y, z_factor=1):
    x_t, z_t, *_ = inputs(net)
    t = torch.full((4,), STATE[net.process.outputs - 1])
    preds = net(x_t, None if z_t is None else z_factor * z_t, t, y)
    return [pred for pred in preds if pred is not None]


@pytest.mark.parametrize("name", ["SiT-T/2", "DiT-T/2"])
@pytest.mark.parametrize("fusion", model.FUSIONS)
def test_weights_of_one_are_one_plain_call(name, fusion):
    net, y, sizes = tiny(name, fusion), torch.arange(4), []
    net.blocks[0].register_forward_hook(lambda block, args, h: sizes.append(len(h)))
    guided = call(net, y)
    assert sizes == [4]
    assert all(torch.equal(a, b) for a, b in zip(guided, plain(net, y), strict=True))


@pytest.mark.parametrize("name", ["SiT-T/2", "DiT-T/2"])
def test_guidance_is_the_documented_formula(name):
    """Each alone, both together, on x or on both; variances and the other modality stay."""
    net, y = tiny(name), torch.arange(4)
    e, no_y, no_z = plain(net, y), plain(net, torch.full((4,), 10)), plain(net, y, z_factor=0)
    C = net.x_channels
    for w_cfg, w_r, cfg_on, rg_on in [
            (3, 1, "x", "x"), (1, 1.5, "x", "x"), (2, 1.5, "x", "x"), (2, 1.5, "both", "x"),
            (2, 1.5, "x", "both"), (0, 0, "x", "x")]:
        x, z = call(net, y, w_cfg=w_cfg, w_r=w_r, cfg_on=cfg_on, rg_on=rg_on)
        wanted = e[0] + (w_cfg - 1) * (e[0] - no_y[0]) + (w_r - 1) * (e[0] - no_z[0])
        assert x[:, :C].allclose(wanted[:, :C], atol=1e-4)
        assert x[:, C:].allclose(e[0][:, C:], atol=1e-5)                 # DiT's variances
        wanted = e[1] + (w_cfg - 1) * (cfg_on == "both") * (e[1] - no_y[1]) \
            + (w_r - 1) * (rg_on == "both") * (e[1] - no_z[1])
        assert z[:, :net.r].allclose(wanted[:, :net.r], atol=1e-4)
        assert z[:, net.r:].allclose(e[1][:, net.r:], atol=1e-5)
    without_z, _ = call(net, y, w_r=0)
    assert without_z[:, :C].allclose(no_z[0][:, :C], atol=1e-5)          # w_r = 0: e(x_t) alone


@pytest.mark.parametrize("name", ["SiT-T/2", "DiT-T/2"])
def test_cfg_has_no_branch_outside_its_interval_and_rg_goes_on(name):
    """STATE is t = 0.4 for SiT; step 5 of 999, so 0.995 in flow time, for DiT."""
    net, y, sizes = tiny(name), torch.arange(4), []
    net.blocks[0].register_forward_hook(lambda block, args, h: sizes.append(len(h)))
    at = 0.4 if name[0] == "S" else 1 - 5 / 999
    for interval, acts in (((0, 1), True), ((at, at), True), ((0, at - 1e-4), False),
                           ((at + 1e-4, 1), False)):
        for w_r in (1, 1.5):
            sizes.clear()
            result = call(net, y, w_cfg=3, w_r=w_r, cfg_interval=interval)
            assert sizes == [4 * (1 + acts + (w_r != 1))]
            for a, b in zip(result, call(net, y, w_cfg=3 if acts else 1, w_r=w_r)):
                assert torch.equal(a, b)


def test_guidance_costs_a_branch_per_weight_in_one_batch():
    net, sizes = tiny(), []
    net.blocks[0].register_forward_hook(lambda block, args, h: sizes.append(len(h)))
    for weights in ({"w_cfg": 2}, {"w_r": 2}, {"w_cfg": 2, "w_r": 2}):
        call(net, torch.arange(4), **weights)
    assert sizes == [8, 8, 12]


MEAN, STD, N = 0.7, 0.3, 20_000                                         # of a Gaussian "data set"


def gaussian_prediction(process):
    """The exact network for data N(MEAN, STD^2)."""
    def predict(state, t):
        flow, preds = process.outputs == 1, []
        a, s = (t, 1 - t) if flow else (process.alpha[t].item(), process.sigma[t].item())
        for x_t in state:
            away = (x_t - a * MEAN) / (a ** 2 * STD ** 2 + s ** 2)
            x_hat, eps = MEAN + a * STD ** 2 * away, s * away
            preds.append(x_hat - eps if flow else torch.cat([eps, -torch.ones_like(eps)], 1))
        return preds
    return predict


@pytest.mark.parametrize("solver, steps, tolerance", [
    (sample.euler, 100, 0.01), (sample.heun, 20, 0.01), (sample.heun, 21, 0.02),
    (sample.euler_maruyama, 250, 0.02), (sample.ddpm, 250, 0.02), (sample.ddim, 250, 0.02)])
def test_solvers_recover_a_gaussian(solver, steps, tolerance):
    process = model.DDPM() if solver in (sample.ddpm, sample.ddim) else model.Flow()
    seeds = iter(range(10_000))

    def noise():
        return [normal(N, 1, 1, 1, seed=next(seeds)) for _ in range(2)]

    x, z = solver(gaussian_prediction(process), process, noise(), steps, noise)
    for part in (x, z):
        assert part.mean().item() == pytest.approx(MEAN, abs=tolerance)
        assert part.std().item() == pytest.approx(STD, abs=tolerance)


@pytest.mark.parametrize("steps", [50, 7])
def test_every_solver_makes_as_many_calls_as_asked(steps):
    for process, solvers in sample.SOLVERS.items():
        for solver in solvers.values():
            times, predict, start = [], gaussian_prediction(process()), [normal(2, 1, 1, 1)]
            solver(lambda state, t: times.append(t) or predict(state, t), process(), start, steps,
                   lambda: start)
            assert len(times) == steps
            assert times == sorted(times, reverse=process is model.DDPM)
            assert times[0] == (999 if process is model.DDPM else 0)
    assert times[-1] == 0                                               # DDPM's chain ends there


@pytest.mark.parametrize("solver, order", [(sample.euler, 1), (sample.heun, 2)])
def test_twice_the_steps_divide_the_odes_error_by_2_to_the_order(solver, order):
    """The exact map of the Gaussian's flow is noise -> MEAN + STD * noise."""
    noise = normal(100, 1, 1, 1, dtype=DOUBLE)
    errors = [(solver(gaussian_prediction(model.Flow()), model.Flow(), [noise], steps, None)[0]
               - MEAN - STD * noise).abs().max() for steps in (80, 160, 320)]
    for a, b in zip(errors, errors[1:]):
        assert a / b == pytest.approx(2 ** order, rel=0.1)


@pytest.mark.parametrize("steps", [1000, 50, 10, 2])
def test_ddim_equals_diffusers_first_order_solver(steps):
    """DPM-Solver of order 1 is DDIM (2206.00927); this scheduler takes any timesteps."""
    from diffusers import DPMSolverMultistepScheduler
    scheduler = DPMSolverMultistepScheduler(1000, 1e-4, 0.02, "linear", solver_order=1,
                                            final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=[round(i * 999 / (steps - 1)) for i in range(steps)][::-1])
    start = normal(2, 3, 4, 4, dtype=DOUBLE)
    mix = 0.3 * normal(6, 3, dtype=DOUBLE)

    def predict(state, t):
        return [torch.einsum("oc,bchw->bohw", mix, state[0].tanh() + t / 1000).tanh()]

    ours, = sample.ddim(predict, model.DDPM(), (start,), steps, None)
    theirs = start
    for t in scheduler.timesteps:
        theirs = scheduler.step(predict([theirs], t.item())[0][:, :3], t, theirs).prev_sample
    assert ours.abs().max() > 1 and (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("steps", [1000, 250, 7])
def test_ddpm_equals_diffusers_from_the_same_noise(steps, monkeypatch):
    from diffusers.schedulers import scheduling_ddpm
    scheduler = scheduling_ddpm.DDPMScheduler(
        1000, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=False,
        timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    shape = (2, 3, 4, 4)
    noises = [normal(*shape, seed=s, dtype=DOUBLE) for s in range(steps)]
    mix = 0.3 * normal(6, 3, dtype=DOUBLE)

    def predict(state, t):
        out = torch.einsum("oc,bchw->bohw", mix, state[0].tanh() + t / 1000).tanh()
        return [torch.cat([out[:, :3] + 0.5 * state[0], out[:, 3:]], 1)]

    played = iter(noises)
    ours, = sample.ddpm(predict, model.DDPM(), (noises[-1],), steps, lambda: [next(played)])
    theirs, played = noises[-1], iter(noises)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(played))
    for t in scheduler.timesteps:
        theirs = scheduler.step(predict([theirs], t.item())[0], t, theirs).prev_sample
    assert ours.abs().max() > 1 and (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("peer", SDE_PEERS)
def test_the_sde_with_guidance_equals_the_authors(peer):
    """Their forward_with_cfg_vae, forward_with_cfg and forward_with_rg under their sampler."""
    net = model.load_published(published("SiT", 3, learn_sigma=True)).requires_grad_(False)
    weight, _, both = peer.partition(" ")
    guidance = {weight: 2.4 if weight == "w_cfg" else 1.5,
                "cfg_on": both or "x", "rg_on": both or "x"}
    played = (list(noise.split([4, 3], 1)) for noise in sde_noise())
    state = sample.euler_maruyama(sample.guided(net, torch.tensor([3, 9]), **guidance),
                                  net.process, next(played), 8, played.__next__)
    assert thinned(*state) == pytest.approx(SDE_PEERS[peer], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["SiT-T/2", "DiT-T/2"])
def test_image_i_does_not_depend_on_the_batch_size_or_on_n(name):
    net, y = tiny(name), torch.arange(7)

    def grey_levels(n, batch_size):
        parts = sample.generate(net, y[:n], 5, batch_size=batch_size)
        return [data.to_uint8(part).int() for part in parts]

    whole = grey_levels(7, 7)
    for n, batch_size in ((7, 3), (5, 4)):
        for part, expected in zip(grey_levels(n, batch_size), whole):
            assert (part - expected[:n]).abs().max() <= 1
    draws = sample.image_noise(tiny(fusion="none"), 0, range(7), torch.device("cpu"))
    by_three = sample.image_noise(tiny(), 0, range(7), torch.device("cpu"), threads=3)
    for _ in range(3):
        noise, = next(draws)
        assert torch.equal(noise, next(by_three)[0])
    assert torch.cdist(noise.flatten(1), noise.flatten(1)).fill_diagonal_(9).min() > 5


def test_equal_batch_sizes_give_equal_bits():
    net, y = tiny(), torch.arange(6)
    x, z = sample.generate(net, y, 4, batch_size=4, w_cfg=2, w_r=1.5)
    x_2, z_2 = sample.generate(net, y[:3], 4, batch_size=4, w_cfg=2, w_r=1.5)
    assert torch.equal(x[:3], x_2) and torch.equal(z[:3], z_2)
    assert not torch.equal(x, sample.generate(net, y, 4, batch_size=4, w_cfg=2, w_r=1.5, seed=1)[0])


def test_the_noise_of_x_is_the_same_for_every_fusion():
    nets = [tiny(fusion=fusion) for fusion in model.FUSIONS]
    noises = [sample.image_noise(net, 0, range(3), torch.device("cpu")) for net in nets]
    first, second = ([next(noise) for noise in noises] for _ in range(2))
    for draws in (first, second):
        assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[1][0], draws[2][0])
    assert not torch.equal(first[0][0], second[0][0]) and len(first[0]) == 1
    assert not torch.equal(first[1][0], first[1][1][:, :2])


def test_bf16_is_the_networks_alone():
    net, y = tiny(), torch.arange(4)
    net.blocks[0].register_forward_hook(lambda block, args, h: kinds.add(
        (h.dtype, block.mlp.fc1(h).dtype)))
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        kinds = set()
        x, z = sample.generate(net, y, 5, bf16=bf16)
        assert x.dtype == z.dtype == torch.float32 and {inner for _, inner in kinds} == {dtype}
        if not bf16:
            exact = x
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):       # the solver's arithmetic
            assert {part.dtype for part in call(net, y, w_cfg=2)} == {torch.float32}
    assert 0 < (x - exact).abs().max() < 0.1 * exact.abs().max()


def test_labels_are_random_balanced_or_listed():
    few, many = (sample.choose_labels("random", n, 10, 0) for n in (5, 500))
    assert torch.equal(few, many[:5]) and set(many.tolist()) == set(range(10))
    assert sample.choose_labels("balanced", 12, 10, 0).tolist() == [*range(10), 0, 1]
    assert sample.choose_labels("3,1", 5, 10, 0).tolist() == [3, 1, 3, 1, 3]
    assert sample.choose_labels("random", 3, 0, 0).tolist() == [0, 0, 0]
    assert data.classes_in_turn(12, 10).tolist() == [*range(10), 0, 1]
    assert data.classes_in_turn(5, 10).tolist() == [0, 2, 4, 6, 8]       # not the first five
    assert data.classes_in_turn(2, 0).tolist() == [0, 0]
    for labels, n_classes in (("10", 10), ("-1", 10), ("cat", 10), ("balanced", 0), ("0", 0)):
        with pytest.raises(data.UserError, match="--labels"):
            sample.choose_labels(labels, 3, n_classes, 0)


def test_the_sheet_has_each_image_above_its_features():
    x, z = torch.full((3, 1, 8, 8), 1.0), torch.zeros(3, 4, 8, 8)
    z[1, 0] = 4                                                         # two deviations: full red
    images, z_std = data.to_images(x), [2.0, 1.0, 1.0, 1.0]
    picture = np.asarray(sample.sheet(images, z, z_std, columns=2))
    assert picture.shape == (2 * (2 * 50 + 4) - 2, 2 * 50 + 2, 3)
    assert (picture[10, 10] == 255).all() and (picture[60, 10] == 128).all()
    assert picture[60, 60].tolist() == [255, 128, 128]
    assert np.asarray(sample.sheet(images, None, None, columns=3)).shape == (52, 152, 3)
    for r in (1, 2):
        assert pca.colours(z[:, :r], z_std[:r]).shape == (3, 8, 8, 3)


def test_the_versions_of_compare_start_from_the_same_noise():
    net, y, how = tiny(), torch.arange(3), {"steps": 4, "seed": 1, "batch_size": 3}
    versions = sample.compare(net, y, 2.0, 1.5, **how)
    assert [name for name, *_ in versions] == ["no guidance", "CFG 2", "RG 1.5", "both"]
    for (_, x, z), (w_cfg, w_r) in zip(versions, ((1, 1), (2, 1), (1, 1.5), (2, 1.5))):
        for a, b in zip((x, z), sample.generate(net, y, w_cfg=w_cfg, w_r=w_r, **how)):
            assert torch.equal(a, b)
    assert [name for name, *_ in sample.compare(net, y, w_r=1.5, **how)] == ["no guidance",
                                                                            "RG 1.5"]
    assert sample.z_std_of({"z_std": None}, z) == pytest.approx(z.numpy().std((0, 2, 3)))
    assert sample.z_std_of({"z_std": [1, 2]}, z) == [1, 2] and not sample.z_std_of({}, None)


def test_the_pictures_of_the_command_line_name_their_rows(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(workdir)
    main(sample, f"--n 3 --w_cfg 2 --w_r 1.5 --steps 4 --compare --trajectory --out {tmp_path}")
    assert sorted(os.listdir(tmp_path)) == ["compare.png", "trajectory.png"]
    for name, versions in (("compare", 4), ("trajectory", 9)):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert picture.shape[0] == 2 * versions * 50 + 2 and picture.shape[1] > 3 * 50 + 20
        left = picture[:, :-3 * 50 - 2]
        for i in range(versions):                                       # beside images alone
            assert left[100 * i + 2:100 * i + 50].min() < 128
            assert left[100 * i + 54:100 * i + 98].min() == 255
    bottom = np.asarray(Image.open(tmp_path / "compare.png"))[302:402, -150:]
    x, z = sample.generate(sample.load_model("out/ckpt.pt")[0],
                           sample.choose_labels("random", 3, 10, 0), 4, w_cfg=2, w_r=1.5,
                           batch_size=3)
    alone = sample.sheet(data.to_images(x), z, data.Prepared("prepared/digits", 4).meta["z_std"])
    assert np.abs(bottom - np.asarray(alone).astype(int)[2:, -150:]).max() <= 1


@pytest.mark.parametrize("name, solver", [("SiT-T/2", "euler"), ("DiT-T/2", "ddim")])
def test_the_trajectory_shows_clean_estimates_and_ends_in_the_sample(name, solver):
    """The last step of Euler's method and of DDIM goes to the estimate itself."""
    net, y, how = tiny(name), torch.arange(3), {"steps": 20, "solver": solver, "batch_size": 3}
    steps = sample.trajectory(net, y, n=5, **how)
    assert [step[0] for step in steps] == (
        ["t = 0.00", "t = 0.25", "t = 0.50", "t = 0.70", "t = 0.95", "sample"] if name[0] == "S"
        else ["t = 0.00", "t = 0.26", "t = 0.53", "t = 0.74", "t = 1.00", "sample"])
    for last, end, plain in zip(steps[-2][1:], steps[-1][1:], sample.generate(net, y, **how)):
        assert torch.equal(end, plain) and last.allclose(end, atol=1e-4)
    assert not steps[1][1].allclose(steps[-1][1], atol=0.1)


def made(folder):
    """samples.npz and sheet.png in bytes: np.savez writes no dates."""
    return [(folder / name).read_bytes() for name in ("samples.npz", "sheet.png")]


@pytest.fixture
def many(workdir, tmp_path, monkeypatch):
    """A function: sample.py on workdir's checkpoint with flags, into a folder of that name; and
    what six batches of four made there in one go, as bytes."""
    monkeypatch.chdir(workdir)
    torch.set_num_threads(1)

    def make(out, flags="", batch_size=4):
        main(sample, f"--n 22 --steps 3 --batch_size {batch_size} --out {tmp_path / out} {flags}")
        return made(tmp_path / out)

    yield make, make("whole"), tmp_path
    torch.set_num_threads(2)


@contextlib.contextmanager
def stopped_after(monkeypatch, n):
    """The n-th writing of a batch stops the run in its middle: the images, but not their mark."""
    left, write_rows = [n], data.write_rows

    def write_or_stop(path, start, rows):
        if path.endswith("done.npy"):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        write_rows(path, start, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "write_rows", write_or_stop)
        yield


def test_an_interrupted_run_goes_on_to_the_same_bytes(many, monkeypatch, capsys):
    make, whole, folder = many
    batches, rows = sample.sample_batches, []
    with stopped_after(monkeypatch, 3):
        make("out")
    assert np.load(folder / "out/done.npy").tolist() == [1] * 8 + [0] * 14
    assert not (folder / "out/samples.npz").exists()
    for flags, words in (("--w_r 1.5", "another --w_r: 1.0, now 1.5"), ("--seed 3", "--seed: 0"),
                         ("--steps 4", "--steps: 3, now 4")):
        with pytest.raises(data.UserError, match=words):
            make("out", flags)
    monkeypatch.setattr(sample, "sample_batches", lambda net, y, numbers, **options: (
        rows.extend(numbers) or batches(net, y, numbers, **options)))
    assert make("out") == whole and rows == [2, 3, 4, 5]                # of six; no other twice
    assert sorted(os.listdir(folder / "out")) == ["samples.json", "samples.npz", "sheet.png"]
    rows.clear()
    assert make("out") == whole and rows == []                          # nothing to do any more
    assert make("out", "--restart") == whole and len(rows) == 6
    capsys.readouterr()
    assert make("out", "--w_r 1.5")[0] != whole[0]                      # a finished one is replaced
    assert "will be replaced: it has another --w_r: 1.0, now 1.5" in capsys.readouterr().out
    made_with = json.loads((folder / "out/samples.json").read_text())["made_with"]
    assert made_with["batch_size"] == 4 and made_with["torch"] == torch.__version__


def test_a_run_goes_on_with_another_batch_size_and_restarts_if_told(many, monkeypatch):
    make, whole, folder = many

    def off(folder_of_others):
        images, others = (np.load(folder / out / "samples.npz")["arr_0"].astype(int)
                          for out in ("whole", folder_of_others))
        return abs(images - others).max((1, 2, 3))

    for out, flags, batch_size in (("seven", "", 7), ("anew", "--seed 1 --restart", 4)):
        with stopped_after(monkeypatch, 4):
            make(out)
        assert np.load(folder / out / "done.npy").sum() == 12           # a batch of 7 and a part
        make(out, flags, batch_size)
    assert (off("seven") <= 1).all() and (off("anew") > 1).all()
    make("whole_seven", batch_size=7)
    assert (off("whole_seven") <= 1).all()


def test_any_number_of_processes_make_the_same_images(many):
    make, whole, folder = many
    flags = f"--n 22 --steps 3 --batch_size 4 --out {folder / 'three'} --png"
    assert in_ranks(lambda: main(sample, flags), 3) == [0, 0, 0]
    images = np.load(folder / "three/samples.npz")
    assert (images["arr_0"] == np.load(folder / "whole/samples.npz")["arr_0"]).all()
    assert torchrun(f"sample.py --n 22 --steps 3 --batch_size 4 --out {folder / 'two'}") == 0
    assert made(folder / "two") == whole
    for i, image in enumerate(images["arr_0"]):
        assert (np.asarray(Image.open(folder / f"three/png/{i:06d}.png")) == image).all()
    assert len(os.listdir(folder / "three/png")) == 22
    main(sample, f"--n 3 --steps 3 --out {folder / 'three'} --png")     # fewer: the rest goes
    assert len(os.listdir(folder / "three/png")) == 3
    main(sample, f"--n 3 --steps 3 --seed 1 --out {folder / 'three'}")  # other images: all go
    assert not os.listdir(folder / "three/png")
    main(sample, f"--n 3 --steps 3 --seed 1 --out {folder / 'three'} --png")    # of samples.npz
    image = np.load(folder / "three/samples.npz")["arr_0"][2]
    assert (np.asarray(Image.open(folder / "three/png/000002.png")) == image).all()


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_killed_sampling_goes_on_with_any_number_of_processes(many, n_ranks):
    make, whole, folder = many
    flags = f"--n 22 --steps 3 --batch_size 4 --out {folder / 'out'}"

    def until_killed():
        write_rows, left = data.write_rows, [5 if n_ranks == 1 else 4]

        def write_or_die(*args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)                    # images are there, no mark
            write_rows(*args)

        data.write_rows = write_or_die
        main(sample, flags)

    assert -signal.SIGKILL in in_ranks(until_killed, n_ranks)
    done = np.load(folder / "out/done.npy")
    assert done.any() and not done.all()
    assert in_ranks(lambda: main(sample, flags), 3 - n_ranks) == [0] * (3 - n_ranks)
    assert made(folder / "out") == whole


def test_all_processes_end_when_one_refuses(many, monkeypatch):
    make, _, folder = many
    with stopped_after(monkeypatch, 3):
        make("out")

    def work():
        with pytest.raises(data.UserError) as error:
            main(sample, f"--n 22 --steps 3 --w_r 2 --out {folder / 'out'}")
        (folder / f"said_{os.environ['RANK']}").write_text(str(error.value))

    assert in_ranks(work, 2) == [0, 0]
    assert "another --w_r" in (folder / "said_0").read_text()
    assert (folder / "said_1").read_text() == "another process stopped"


def test_what_is_lost_or_left_over_is_noticed(many, monkeypatch):
    make, whole, folder = many
    with stopped_after(monkeypatch, 3):
        make("out")
    (folder / "out/images.npy").unlink()                                # not black images instead
    assert make("out") == whole
    (folder / "out/images.npy").write_bytes(b"killed while clearing up")
    assert make("out") == whole and not (folder / "out/images.npy").exists()
    (folder / "out/samples.npz").write_bytes(b"damaged")
    assert make("out") == whole
    (folder / "out/samples.json").write_text("{}")
    with pytest.raises(data.UserError, match="samples.json is damaged.*--restart"):
        make("out")


def test_z_is_kept_if_asked(many):
    make, whole, folder = many
    make("out", "--n_sheet 5")
    make("out", "--save_z --n_sheet 5")                                 # not there without z
    with np.load(folder / "out/samples.npz") as file, np.load(folder / "whole/samples.npz") as all:
        net, about = sample.load_model("out/ckpt.pt")
        x, z = sample.generate(net, torch.from_numpy(file["y"]), 3, batch_size=4)
        assert file["z"].dtype == np.float32 and (file["z"] == z.numpy()).all()
        assert (file["arr_0"] == all["arr_0"]).all() and (all["arr_0"] == data.to_images(x)).all()
    few = np.asarray(Image.open(folder / "out/sheet.png"))
    assert (few == np.asarray(Image.open(folder / "whole/sheet.png"))[:102, :252]).all()


@pytest.mark.parametrize("batch, rows", [(0, "0 to 3"), (5, "20 to 21")])
def test_samples_that_are_not_finite_are_said_and_not_kept(many, monkeypatch, batch, rows):
    make, _, folder = many
    solve, factors = sample.euler_maruyama, iter([1] * batch + [np.nan] * 9)
    monkeypatch.setitem(sample.SOLVERS[model.Flow], "sde", lambda *args: (
        lambda factor: [part * factor for part in solve(*args)])(next(factors)))
    with pytest.raises(data.UserError, match=f"samples {rows} hold NaN or infinity"):
        make("out")
    assert np.load(folder / "out/done.npy").sum() == 4 * batch
    assert not (folder / "out/samples.npz").exists()


def test_a_disk_that_fills_up_loses_no_image(many, monkeypatch):
    make, whole, folder = many

    def full(path, write):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pca, "write_whole", full)
        patch.setattr(data, "write_json", lambda path, value: pathlib.Path(path).write_text(
            json.dumps(value)))
        with pytest.raises(data.UserError, match="No space left.*images.*in .*out.*same command"):
            make("out")
    assert np.load(folder / "out/done.npy").all()
    assert make("out") == whole


def test_published_weights_are_sampled_with_their_codec(photos, tmp_path, monkeypatch, capsys):
    import safetensors.torch
    import huggingface_hub
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": published("SiT", 3, learn_sigma=True), "opt": 1}, "redi.pt")
    safetensors.torch.save_file(published("SiT", 3, learn_sigma=True), "redi.safetensors")
    torch.save(published("DiT", 0), "plain.pt")
    few = f"--vae {photos / 'vae'} --n 3 --steps 2 --w_cfg 2"
    main(sample, f"--ckpt redi.pt --out a --w_r 1.5 {few}")
    warning, = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "--w_r 1.5 needs" in warning and "redi.pt does not record" in warning
    main(sample, f"--ckpt redi.safetensors --out b --w_r 1.5 {few}")
    assert "warning" not in capsys.readouterr().err.replace("warning: --w_r 1.5 needs", "")
    assert made(tmp_path / "a") == made(tmp_path / "b")
    assert np.load("a/samples.npz")["arr_0"].shape == (3, 32, 32, 3)    # the codec's factor is 4
    assert sample.read_settings("a/samples.json")["solver"] == "sde"
    main(sample, f"--ckpt plain.pt --out c --model DiT-T/2 {few}")
    assert sample.read_settings("c/samples.json")["solver"] == "ddpm"
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for flags, words in (("plain.pt", "say which they are"), ("empty", "no checkpoint at empty"),
                         ("redi.pt --model SiT-S/2", "--model SiT-S/2: redi.pt is SiT-T/2"),
                         ("plain.pt --model SiT-T/2 --w_r 2", "--fusion none"),
                         ("plain.pt --model SiT-T/2 --save_z", "--save_z"),
                         ("redi.pt --labels 10", "classes 0 to 9"),
                         ("redi.pt --solver ddim", "sde or euler or heun")):
        with pytest.raises(data.UserError, match=words):
            main(sample, f"--ckpt {flags} --out d --vae {photos / 'vae'}")
    assert not os.path.exists("d")

    cache = tmp_path / "hub/models--someone--net"                      # as the hub's client lays it
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    (cache / "snapshots/abc").mkdir(parents=True)
    (cache / "snapshots/abc/README.md").write_text("weights")
    shutil.copy("redi.pt", cache / "snapshots/abc/net.pt")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    main(sample, f"--ckpt someone/net --out e --w_r 1.5 {few}")
    assert made(tmp_path / "e") == made(tmp_path / "a")
    shutil.copy("redi.pt", cache / "snapshots/abc/net_2.pt")
    for name, words in (("someone/net", "2 files of weights"),
                        ("zelaki/SiT-ReDi-XL-2", "no such file here.*of the hub.*give the path")):
        with pytest.raises(data.UserError, match=words) as error:
            main(sample, f"--ckpt {name} --out f")
        assert "\n" not in str(error.value)


def test_the_hub_is_asked_for_the_one_file_of_weights(monkeypatch, tmp_path):
    import types
    import huggingface_hub
    names = [types.SimpleNamespace(rfilename=name) for name in ("README.md", "sub/net.pt")]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options:
                        types.SimpleNamespace(siblings=names))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: args)
    assert model.from_hub("zelaki/SiT-ReDi-XL-2") == ("zelaki/SiT-ReDi-XL-2", "sub/net.pt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: 1 / 0)
    with pytest.raises(ValueError, match="division by zero.*give the path"):
        model.from_hub("zelaki/SiT-ReDi-XL-2")
    names.pop()
    with pytest.raises(ValueError, match="0 files of weights"):
        model.from_hub("zelaki/SiT-ReDi-XL-2")


def test_solvers_that_do_not_suit_are_refused():
    for name, solver, steps in (
            ("SiT-T/2", "ddpm", 9), ("DiT-T/2", "sde", 9), ("DiT-T/2", "euler", 9),
            ("DiT-T/2", None, 1001), ("SiT-T/2", "sde", 1), ("SiT-T/2", "euler", 0),
            ("SiT-T/2", "ddim", 9), ("DiT-T/2", "heun", 9), ("DiT-T/2", "ddim", 1),
            ("DiT-T/2", "ddim", 1001), ("SiT-T/2", "heun", 0)):
        with pytest.raises(data.UserError, match="--s"):
            sample.check_solver(name, solver, steps)
    assert sample.check_solver("SiT-T/2", "euler", 1) == "euler"
    assert sample.check_solver("DiT-T/2", None, 1000) == "ddpm"


@pytest.mark.parametrize("fusion, n_classes, p_drop_z, p_drop_y, flags, words", [
    ("merged", 10, 0, 0.1, "--w_r 1.5", "--p_drop_z > 0"),
    ("none", 10, 0, 0.1, "--w_r 1.5", "--fusion none"),
    ("merged", 0, 0.2, 0.1, "--w_cfg 2", "--unconditional"),
    ("merged", 10, 0.2, 0, "--w_cfg 2", "--p_drop_y > 0")])
def test_guidance_that_the_model_was_not_trained_for_is_refused(
        fusion, n_classes, p_drop_z, p_drop_y, flags, words):
    checkpoint = {"arch": {"fusion": fusion, "n_classes": n_classes},
                  "settings": {"p_drop_z": p_drop_z, "p_drop_y": p_drop_y}}
    with pytest.raises(data.UserError, match=words):
        sample.check_guidance(checkpoint, sample.parser().parse_args(flags.split()))
    sample.check_guidance(checkpoint, sample.parser().parse_args([]))


# fid.py

def test_frechet_distance_has_the_closed_form_of_commuting_gaussians():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    mu_1, mu_2, var_1, var_2 = rng.normal(size=8), rng.normal(size=8), rng.random(8), rng.random(8)
    var_1[:3] = 0                                                       # singular
    distance = fid.frechet_distance(mu_1, basis * var_1 @ basis.T, mu_2, basis * var_2 @ basis.T)
    wanted = ((mu_1 - mu_2) ** 2).sum() + ((np.sqrt(var_1) - np.sqrt(var_2)) ** 2).sum()
    assert distance == pytest.approx(wanted, rel=1e-6)


def test_the_distance_is_exact_where_covariances_are_singular():
    """Fewer samples than channels: (sum of the roots' products)^2 in the closed form of commuting
    covariances, and 0 for the same one."""
    d, rank = 400, 40
    basis = np.linalg.qr(normal(d, d, seed=1, dtype=DOUBLE).numpy())[0]
    one, two = (np.r_[normal(rank, seed=seed, dtype=DOUBLE).numpy() ** 2, np.zeros(d - rank)]
                for seed in (2, 3))
    covs = [basis * values @ basis.T for values in (one, two)]
    expected = np.square(np.sqrt(one) - np.sqrt(two)).sum()
    mu = np.zeros(d)
    assert fid.frechet_distance(mu, covs[0], mu, covs[1]) == pytest.approx(expected, rel=1e-9)
    few = normal(50, d, seed=4, dtype=DOUBLE).numpy()
    cov = np.cov(few.T)
    assert fid.frechet_distance(mu, cov, mu, cov) < 1e-10 * np.trace(cov)
    cross = np.linalg.norm(scipy.linalg.svdvals((few - few.mean(0)) @ basis * np.sqrt(one)), 1)
    apart = fid.frechet_distance(mu, cov, mu, covs[0])                    # they do not commute
    assert apart == pytest.approx(np.trace(cov) + one.sum() - 2 * cross / 7, rel=1e-9)


def test_frechet_distance_equals_scipys_square_root():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(50, 6)), rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6)) + 1
    moments = [one.mean(0), np.cov(one.T), two.mean(0), np.cov(two.T)]
    root = scipy.linalg.sqrtm(moments[1] @ moments[3]).real
    wanted = ((moments[0] - moments[2]) ** 2).sum() + np.trace(moments[1] + moments[3] - 2 * root)
    assert fid.frechet_distance(*moments) == pytest.approx(wanted, rel=1e-9)
    assert fid.distance_of_features(one, two) == pytest.approx(wanted, rel=1e-9)
    assert fid.distance_of_features(one, one[::-1]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_refuses_nan_and_other_spaces():
    mu, cov = np.zeros(3), np.eye(3)
    for wrong in ((mu, cov, np.zeros(2), np.eye(2)), (mu, cov * np.nan, mu, cov)):
        with pytest.raises(ValueError):
            fid.frechet_distance(*wrong)


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


def test_inception_equals_torch_fidelitys():
    net = fid.Inception(inception_weights())
    for size, peer in INCEPTION_PEER.items():
        features = net(random_images(size))
        assert [part.shape for part in features] == [(2, 2048), (2, 2023), (2, 1008)]
        assert thin_features(features) == pytest.approx(peer, rel=1e-4)
    for wrong in ({}, "nowhere.pth"):
        with pytest.raises((ValueError, OSError)):
            fid.Inception(wrong)


def test_other_weights_than_the_published_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"weights")
    assert not fid.is_published(tmp_path / "a.pth")
    monkeypatch.setattr(fid, "INCEPTION", "https://there/b-" + hashlib.sha256(
        b"weights").hexdigest()[:8] + ".pth")
    assert fid.is_published(tmp_path / "a.pth")


def test_a_space_is_a_network_with_its_weights_and_settings(sets, tmp_path, capsys, monkeypatch):
    """Features are timm's own pooled ones; moments of another pooling are of another space, and
    weights of another network none."""
    import timm
    torch.manual_seed(0)
    nets = {name: timm.create_model(name).eval() for name in ("test_vit", "test_resnet")}
    for name, net in nets.items():
        torch.save(net.state_dict(), f"{name}.pth")
    net, images = nets["test_vit"], torch.from_numpy(sets[0]).permute(0, 3, 1, 2)
    plain, large = (fid.Space("test_vit", "test_vit.pth", settings)
                    for settings in (None, {"img_size": 192}))
    mean, most = (fid.Space("test_resnet", "test_resnet.pth", settings)
                  for settings in (None, {"global_pool": "max"}))
    other = fid.Space("test_vit", "test_vit.pth", {"mean": 0.5, "std": 0.25})
    config = timm.data.resolve_model_data_config(net)
    x = torch.nn.functional.interpolate(images / 255, config["input_size"][1:], mode="bicubic",
                                        antialias=True).clamp(0, 1)
    timms = [torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std")]
    for space, (shift, scale) in ((plain, timms), (other, (0.5, 0.25))):
        with torch.no_grad():
            expected = net.forward_head(net.forward_features((x - shift) / scale), pre_logits=True)
        assert space(images)[0] == pytest.approx(expected.numpy(), abs=1e-5)
    assert len({plain.weights, large.weights, other.weights}) == 3 and large.size == 192
    assert mean.weights != most.weights
    assert not torch.allclose(most(images)[0], mean(images)[0])
    flags = "--features test_resnet --weights test_resnet.pth"
    row = metrics_of(f"a.npz b.npz {flags} --save_stats kept.npz", capsys)
    assert metrics_of(f"a.npz kept.npz {flags}", capsys) == row | {"reference": "kept.npz"}
    for wrong, words in (
            (f"a.npz kept.npz {flags} --features_kwargs global_pool=max", "give its images, or"),
            ("a.npz b.npz --features test_vit --weights test_resnet.pth", "cannot be had"),
            (f"a.npz b.npz {flags} --save_stats kept.npz", "is there already"),
            (f"a.npz b.npz {flags} --save_stats kept", "must end in .npz"),
            (f"a.npz b.npz {flags} --save_stats no/kept.npz", "no folder no"),
            ("a.npz b.npz --features pixels --weights test_vit.pth", "means nothing"),
            ("a.npz digits --features pixels", "judges of its own")):
        with pytest.raises(data.UserError, match=words), monkeypatch.context() as early:
            early.setattr(fid, "measure", None)                          # before any work
            main(fid, wrong)
    torch.save(inception_weights(), "inception.pth")
    space = fid.Space("inception", "inception.pth")
    assert "inception.pth is not pt_inception" in capsys.readouterr().err
    assert [part.shape[1] for part in space(images[:1])] == [2048, 2023, 1008]


def test_images_are_enlarged_as_tensorflow_1_did():
    """Pixel i of the result lies at i * n / size: a ramp stays one, up to its last pixel."""
    ramp = torch.arange(5.0).expand(1, 3, 4, 5)
    at = (torch.arange(20) * 5 / 20).clamp(max=4)
    assert fid.tf1_resize(ramp, 20)[0, 2, 7].allclose(at)
    assert fid.tf1_resize(ramp.mT, 20)[0, 1, :, 3].allclose(at)
    assert torch.equal(fid.tf1_resize(ramp[..., :4], 4), ramp[..., :4])


def test_inception_score_is_the_exponent_of_the_mean_kl_per_split(monkeypatch):
    monkeypatch.setattr(fid, "SPLIT", 30)
    logits = 3 * normal(70, 10).numpy()
    score = fid.InceptionScore()
    for start in range(0, 70, 8):
        score.update(logits[start:start + 8])
    expected = []
    for part in (logits[:30], logits[30:60], logits[60:]):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        expected.append(np.exp(np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p])))
    assert score.score == pytest.approx(np.mean(expected), rel=1e-9)
    certain = fid.InceptionScore()                                      # of ten classes
    certain.update(100 * np.eye(10))
    assert certain.score == pytest.approx(10)


def test_precision_and_recall_are_those_of_scikit_learns_neighbours():
    from sklearn.neighbors import NearestNeighbors
    samples, reference = normal(80, 4), 1.5 * normal(60, 4, seed=1) + 0.5

    def inside(points, centres):
        distances, _ = NearestNeighbors(n_neighbors=4).fit(centres).kneighbors(centres)
        away = np.linalg.norm(points[:, None] - centres[None], axis=2)
        return (away <= distances[:, 3]).any(1).mean()                  # 0 is the point itself

    expected = inside(samples.numpy(), reference.numpy()), inside(reference.numpy(),
                                                                  samples.numpy())
    for block in (7, 512):
        assert fid.precision_and_recall(samples, reference, block=block) == pytest.approx(expected)
    assert 0.3 < expected[1] < expected[0] < 1
    assert fid.precision_and_recall(samples, samples) == (1, 1)
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_and_recall(samples, reference[:3])


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


def test_images_are_the_same_from_every_kind_of_source(sets, capsys):
    a, b = sets
    for path in ("a.npz", "a.npy", "a"):
        images = fid.Images(path)
        assert (images.n, images.size) == (12, (9, 8))
        for workers in (0, 2):
            parts = list(images.batches(5, workers))
            assert [len(part) for part in parts] == [5, 5, 2]
            assert (torch.cat(parts).permute(0, 2, 3, 1).numpy() == a).all()
    expected = fid.distance_of_features(*(part.reshape(12, -1) / 127.5 - 1 for part in (a, b)))
    shuffled = np.random.default_rng(1).permutation(a)
    np.save("shuffled.npy", shuffled)
    for path in ("a.npz", "a.npy", "a", "shuffled.npy"):
        row = metrics_of(f"{path} b.npz --features pixels --batch_size 5", capsys)
        assert row["frechet_pixels_12_vs_12"] == pytest.approx(expected, rel=1e-4)
    assert metrics_of("a a.npz --features pixels", capsys)[
        "frechet_pixels_12_vs_12"] == pytest.approx(0, abs=1e-3)
    row = metrics_of("a.npz b.npz --features pixels --save_stats b_stats.npz", capsys)
    again = metrics_of("a.npz b_stats.npz --features pixels", capsys)
    assert again["frechet_pixels_12_vs_12"] == row["frechet_pixels_12_vs_12"]


def test_all_five_metrics_in_adms_layout(sets, capsys, monkeypatch):
    """On an extractor that is quick; the reference stores moments, and images for the manifold."""
    a, b = sets
    mix = [normal(216, d, seed=d) / 300 for d in (6, 5, 10)]

    class Quick:
        name, weights, device = "inception", "abc", "cpu"

        def __call__(self, images):
            return [images.flatten(1).float() @ part for part in mix]

    monkeypatch.setattr(fid, "Space", lambda *args: Quick())
    row = metrics_of("a.npz b.npz", capsys)
    f_a, f_b = ([part.numpy() for part in Quick()(torch.from_numpy(x).permute(0, 3, 1, 2))]
                for x in (a, b))
    assert row["fid"] == pytest.approx(fid.distance_of_features(f_a[0], f_b[0]), rel=1e-4)
    assert row["sfid"] == pytest.approx(fid.distance_of_features(f_a[1], f_b[1]), rel=1e-4)
    both = fid.precision_and_recall(torch.tensor(f_a[0]), torch.tensor(f_b[0]))
    assert (row["precision"], row["recall"]) == both and 0 < min(both) and both[0] != both[1]
    score = fid.InceptionScore()
    score.update(f_a[2])
    assert row["inception_score"] == pytest.approx(score.score) and row["n_samples"] == 12
    moments = {"mu": f_b[0].mean(0), "sigma": np.cov(f_b[0].T), "mu_s": f_b[1].mean(0),
               "sigma_s": np.cov(f_b[1].T)}
    np.savez("adm.npz", arr_0=b[:6], **moments)                         # as VIRTUAL_imagenet256
    adm = metrics_of("a.npz adm.npz", capsys)
    assert adm["fid"] == pytest.approx(row["fid"], rel=1e-6) and adm["sfid"] == pytest.approx(
        row["sfid"], rel=1e-6)
    assert adm["recall"] == fid.precision_and_recall(torch.tensor(f_a[0]),
                                                     torch.tensor(f_b[0][:6]))[1]
    score = fid.InceptionScore()
    score.update(Quick()(torch.from_numpy(b[:6]).permute(0, 3, 1, 2))[2])
    as_samples = metrics_of("adm.npz b.npz", capsys)
    assert as_samples["inception_score"] == pytest.approx(score.score)
    assert as_samples["inception_score_splits"] == [6] and as_samples["fid"] < 1e-6
    main(fid, "a.npz adm.npz")
    assert "12 samples: below 50,000" in capsys.readouterr().out
    np.savez("moments.npz", **moments)
    kept = metrics_of("a.npz moments.npz --save_stats kept.npz", capsys)
    assert metrics_of("a.npz kept.npz", capsys)["fid"] == kept["fid"]    # of an unknown number
    assert "precision" not in metrics_of("a.npz moments.npz", capsys)
    np.savez("wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(data.UserError, match="different spaces"):
        main(fid, "a.npz wrong.npz")


def test_images_that_are_none_are_one_line(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)     # not 5 s
    a, b = sets
    np.savez("floats.npz", arr_0=a / 255)
    np.savez("one.npz", arr_0=a[:1])
    np.savez("objects.npz", arr_0=np.array([{}, {}], object))
    np.savez("other.npz", images=a)
    (tmp_path / "text.npz").write_text("text")
    os.mkdir("empty")
    for name, mode, size in (("grey", "L", (8, 9)), ("clear", "RGBA", (8, 9)),
                             ("mixed", "RGB", (9, 9))):
        shutil.copytree("a", name)
        Image.new(mode, size).save(f"{name}/000003.png")
    shutil.copytree("a", "text")
    (tmp_path / "text/000002.png").write_text("text")
    shutil.copytree("a", "broken")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(
        "broken/000002.png")                                            # in more than one piece
    png = (tmp_path / "broken/000002.png").read_bytes()
    last = png.rindex(b"IDAT")
    (tmp_path / "broken/000002.png").write_bytes(png[:last] + b"!!!!" + png[last + 4:])
    np.savez("flipped.npz", arr_0=np.tile(a, (8, 1, 1, 1)))
    stored = bytearray((tmp_path / "flipped.npz").read_bytes())
    stored[len(stored) // 2] ^= 1                                       # seen as its end is read
    (tmp_path / "flipped.npz").write_bytes(stored)
    np.savez("means.npz", mu=np.zeros(3), space="pixels", weights="")
    np.savez("nan.npz", mu=np.full(216, np.nan), sigma=np.eye(216), space="pixels", weights="")
    for path, words in (("means.npz", "means without their covariances"), ("nan.npz", "NaN")):
        with pytest.raises(data.UserError, match=words):
            main(fid, f"a.npz {path} --features pixels")
    for path, words in (
            ("broken", "000002.png is no image"), ("flipped.npz", "flipped.npz cannot be read"),
            ("floats.npz", "got float64"), ("one.npz", "holds 1 image"), ("objects.npz", "object"),
            ("other.npz", "arr_0"), ("text.npz", "not a zip"), ("nowhere.npz", "No such file"),
            ("empty", "empty holds no files"), ("grey", "000003.png has the mode L"),
            ("clear", "000003.png has the mode RGBA"), ("text", "000002.png is no image"),
            ("mixed", r"000003.png is of \(9, 9\) pixels, the first of \(9, 8\)")):
        for workers in (0, 1) if path == "grey" else (0,):
            with pytest.raises(data.UserError, match=words) as error:
                main(fid, f"{path} a.npz --features pixels --workers {workers}")
            assert "\n" not in str(error.value)
    for flags, words in (("--weights nowhere", "no such file"), ("--features no_net", "no_net"),
                         ("--batch_size 0", "--batch_size 0"), ("--workers -1", "--workers -1")):
        with pytest.raises(data.UserError, match=words):
            main(fid, f"a.npz b.npz {flags}")


def test_the_judges_read_real_digits_and_not_noise():
    images, y = fid.held_out_digits()
    real = fid.judge_digits(images, y)
    assert real["read_as_asked_percent"] == real["real_read_right_percent"] > 98
    assert max(value for name, value in real.items() if "frechet" in name) < 1e-6
    rng = np.random.default_rng(0)
    noise = np.repeat(rng.integers(0, 256, (400, 8, 8, 1), np.uint8), 3, -1)
    judged = fid.judge_digits(noise, rng.integers(0, 10, 400))
    assert judged["read_as_asked_percent"] < 30 and judged["frechet_pixels_400_vs_179"] > 5


# bench.py

def test_flop_are_the_published_ones():
    """6.06 and 118.64 GMAC a forward pass at 256 tokens (shared facts), 2 FLOP each."""
    small = {"name": "SiT-S/2", "fusion": "merged", "r": 8}
    flop = bench.forward_flop(small)
    assert flop / 2e9 == pytest.approx(6.06, rel=0.01)
    assert bench.forward_flop(small | {"name": "SiT-XL/2"}) / 2e9 == pytest.approx(118.64, rel=0.01)
    assert 2 < bench.forward_flop(small | {"fusion": "separate"}) / flop < 2.25   # attention: 4


def test_speed_counts_images_of_its_own_steps(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr(bench, "random_data", functools.partial(bench.random_data, n=8))
    command = f"speed --models SiT-T/2 --batch_size 2 --steps 2 --rounds 2 --calls 2 --rows {rows}"
    main(bench, command)
    none, merged, separate = (json.loads(line) for line in rows.read_text().splitlines())
    assert none["ratio"] == 1 and separate["ratio"] < none["ratio"] and separate["mfu_percent"] > 0
    for row in (none, merged, separate):
        flop = bench.forward_flop({"name": "SiT-T/2", "fusion": row["run"], "r": 8})
        assert row["mfu_percent"] == pytest.approx(
            300 * flop * row["images_per_s"] / row["peak_flop_per_s"])
        assert row["least"] <= row["images_per_s"] <= row["most"]
        assert row["sampling_least"] <= row["sampling_images_per_s"] <= row["sampling_most"]
    shown = capsys.readouterr().out
    assert f"| SiT-T/2 separate | {separate['images_per_s']:.4g} (" in shown
    monkeypatch.setattr(bench, "speed_of", None)                       # nothing is measured again
    main(bench, command)
    assert capsys.readouterr().out == shown
    lines = rows.read_text().splitlines(True)
    assert len(lines) == 3
    rows.write_text("".join(lines[:2]))                    # killed: a ratio is to its own round
    fresh = {row["run"]: row | {"images_per_s": 1} for row in (none, merged, separate)}
    monkeypatch.setattr(bench, "speed_of", lambda *args: fresh)
    main(bench, command)
    assert [row["images_per_s"] for row in bench.rows_of(rows)][2:] == [1, 1, 1]
    assert capsys.readouterr().out.count(" | 1 (") == 3
    with pytest.raises(data.UserError, match="--calls 1: the solver sde takes at least 2"):
        main(bench, "speed --models SiT-T/2 --calls 1")


def test_judged_rows_are_made_once_and_are_the_samplers_own(workdir, tmp_path, capsys, monkeypatch):
    path = workdir / "out/ckpt.pt"
    monkeypatch.setattr(train, "JUDGED_AT_ONCE", 10)
    commands = [f"few_steps --ckpt {path} --n 10 --calls 2 3 --out {tmp_path}",
                f"guidance --ckpt {path} --n 10 --w_cfg 1 2 --w_r 1 1.5 --out {tmp_path}"]
    for command in commands:
        main(bench, command)
    shown, rows = capsys.readouterr().out, bench.rows_of(tmp_path / "rows.jsonl")
    assert [(row["solver"], row["steps"]) for row in rows[:6]] == [
        (solver, steps) for solver in ("sde", "euler", "heun") for steps in (2, 3)]
    assert [(row["w_cfg"], row["w_r"]) for row in rows[6:]] == [(1, 1), (2, 1), (1, 1.5), (2, 1.5)]
    x, _ = sample.generate(sample.load_model(str(path))[0], torch.arange(10), 4, w_r=1.5)
    expected = fid.judge_digits(data.to_images(x))["frechet_pixels_10_vs_179"]
    assert rows[8]["frechet_pixels"] == pytest.approx(expected, rel=0.02)
    assert f"| SiT-T/2 | heun | 3 | {rows[5]['frechet_classifier']:.2f} | " in shown
    monkeypatch.setattr(sample, "generate", None)                       # nothing is made again
    for command in commands:
        main(bench, command)
    assert capsys.readouterr().out == shown and len(bench.rows_of(tmp_path / "rows.jsonl")) == 10
    checkpoint = torch.load(path)
    checkpoint["settings"]["p_drop_z"] = 0.0
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(data.UserError, match="--w_r 2 needs a model trained with --p_drop_z > 0"):
        main(bench, f"guidance --ckpt {tmp_path / 'ckpt.pt'} --n 10 --w_cfg 1 --w_r 2 "
                    f"--out {tmp_path}")


@pytest.fixture
def photo_table(photos, prepared, tmp_path, monkeypatch):
    """bench.py photos on the photographs with networks of random weights, judged by every 50th
    value of their pixels; it returns the names of the runs that were trained for it."""
    monkeypatch.setattr(fid.Space, "__call__", lambda self, images: (images.flatten(1)[:, ::50],))
    monkeypatch.setattr(train, "JUDGED_AT_ONCE", 8)

    def table(name, flags=""):
        trained = []

        def in_process(command):
            trained.append(command[-1].split("/")[-1])
            main(train, " ".join(command[2:]))

        monkeypatch.setattr(bench, "train_to_the_end", in_process)
        main(bench, f"photos {name} --data {photos / 'prepared'} --val {photos / 'bad'} "
                    "--size T --steps 5 --batch_size 4 --sample_steps 2 --eval_n 4 --n 8 "
                    f"--features pixels --r 4 --out {tmp_path} {flags}")
        return trained

    return table


def distance_in_table(x, about, folder):
    """The Fréchet distance of latents to photo_table's reference."""
    seen = fid.Judge(None, fid.Space("pixels")).see(data.decode(x, about["meta"]))
    reference, = folder.glob("reference-pixels-32-*.npz")
    with np.load(reference) as reference:
        assert reference["n"] == 11
        moments = pca.Moments(seen.shape[1]).update(seen)
        return fid.frechet_distance(moments.mean, moments.cov, reference["mu"], reference["sigma"])


def test_every_row_on_photographs_is_a_job_that_is_made_once(photos, photo_table, tmp_path, capsys):
    """A run that two tables share is trained once, a row that is there not even judged."""
    merged = "SiT-unconditional-merged"
    assert photo_table("unconditional", f"--only SiT-none {merged}") == [
        "SiT-none-5-0", f"{merged}-5-0"]
    assert photo_table("methods", "--only SiT-none --seeds 0 1") == ["SiT-none-5-1"]
    rows = bench.rows_of(f"{tmp_path}/rows.jsonl")
    assert [(row["run"], row["seed"], row["sampled_with"].get("w_r")) for row in rows] == [
        ("SiT-none", 0, None), *[(merged, 0, w_r) for w_r in (None, 1.1, 1.5, 2)],
        ("SiT-none", 1, None)]
    assert [step for step, _ in rows[3]["curve"]] == [1, 2, 3, 4, 5]
    net, about = sample.load_model(f"{tmp_path}/{merged}-5-0/ckpt.pt")
    x, _ = sample.generate(net, torch.zeros(8, dtype=torch.long), 2, w_r=1.5)
    expected = distance_in_table(x, about, tmp_path)
    assert rows[3]["frechet_pixels"] == pytest.approx(expected, rel=1e-5)    # w_r moves it by more
    assert len({row["frechet_pixels"] for row in rows}) == 6
    capsys.readouterr()
    assert photo_table("methods", "--only SiT-none --seeds 0 1") == []
    with pytest.raises(data.UserError, match="--only SiT-non: this table has SiT-none, SiT-REPA"):
        photo_table("methods", "--only SiT-non")
    values = [rows[i]["frechet_pixels"] for i in (0, 5)]
    spread = f"{np.mean(values):.0f} ± {np.std(values, ddof=1):.0f}"
    assert f"| {spread} |" in capsys.readouterr().out
    assert len(bench.rows_of(f"{tmp_path}/rows.jsonl")) == 6
    with pytest.raises(data.UserError, match="was trained with lr 0.0001, and this table's is 0.5"):
        photo_table("methods", "--only SiT-none --lr 0.5")
    with pytest.raises(data.UserError, match="--n 1: a distance needs 2"):
        photo_table("methods", "--n 1")
    with open(tmp_path / "rows.jsonl", "a") as file:                      # a disk was full
        file.write('{"run": "Si')
    photo_table("methods", "--only SiT-none --n 6")
    assert [row["n"] for row in bench.rows_of(f"{tmp_path}/rows.jsonl")] == [8] * 6 + [6]


def test_a_table_goes_on_with_a_run_that_was_killed(photo_table, tmp_path, monkeypatch, one_thread):
    """To the row of an undisturbed one, and without the steps that it had made."""
    flags, update, steps = "--only SiT-none", train.Trainer.update, []

    def killed(trainer):
        if trainer.step == 2:
            raise KeyboardInterrupt
        update(trainer)

    monkeypatch.setattr(train.Trainer, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        photo_table("methods", flags)
    assert not (tmp_path / "rows.jsonl").exists()
    monkeypatch.setattr(train.Trainer, "update", lambda trainer: (
        steps.append(trainer.step), update(trainer)))
    assert photo_table("methods", flags) == ["SiT-none-5-0"] and steps == [2, 3, 4]
    steps.clear()
    photo_table("methods", f"{flags} --out {tmp_path}/whole")
    (row,), (whole,) = (bench.rows_of(f"{folder}/rows.jsonl") for folder in (
        tmp_path, tmp_path / "whole"))
    assert steps == [0, 1, 2, 3, 4] and row["curve"] == whole["curve"] and len(row["curve"]) == 5
    assert row["frechet_pixels"] == whole["frechet_pixels"]


@pytest.mark.slow
def test_every_row_of_every_table_on_photographs_can_be_made(photos, photo_table, tmp_path):
    """REPA's features and two encoders' z among them."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    name, _, _ = ENCODER.partition(" ")
    prepare(photos, once, "--r_keep 16 --keep_features")
    prepare(photos, twice, f"--r_keep 16 --encoder {name} {name} --encoder_layer 0 last")
    made = {name: photo_table(name, f"--data {once} {more} --r 2") for name, more in (
        ("methods", ""), ("unconditional", ""), ("settings", ""), ("guidance", ""),
        ("features", f"--val_data {once} --two_levels {twice}"))}
    rows = bench.rows_of(f"{tmp_path}/rows.jsonl")
    assert all(np.isfinite(row["frechet_pixels"]) for row in rows if "run" in row)
    assert [len(runs) for runs in made.values()] == [10, 6, 10, 0, 1] and len(rows) == 53


def test_real_z_is_noised_with_the_samplers_own_noise(monkeypatch):
    """And dropped for the branch that representation guidance adds; the last batch is padded."""
    monkeypatch.setattr(train, "JUDGED_AT_ONCE", 2)
    for name in ("SiT-T/2", "DiT-T/2"):
        net, seen = tiny(name), []
        net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        z, y = normal(3, 3, 8, 8, seed=9), torch.arange(3)
        sample.generate(net, y, 4, w_r=2.0, batch_size=2, guide=bench.real_z(z))
        assert len(seen) == 8
        for i, (_, z_t, t, labels) in enumerate(seen):
            rows = [(0, 1), (2, 0)][i // 4]
            numbers = [(0, 1), (2, 3)][i // 4]
            assert labels[:2].tolist() == list(rows)
            _, eps = next(sample.image_noise(net, 0, numbers, torch.device("cpu")))
            assert torch.equal(z_t[:2], net.process.add_noise(z[list(rows)], eps, t[:2]))
            assert not z_t[2:].any()


def test_tables_train_and_sample_as_their_rows_say(photos, photo_table, tmp_path, monkeypatch):
    sampled, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args, **kwargs: (
        sampled.append([kwargs.get(name) for name in ("w_cfg", "w_r", "cfg_on")]),
        generate(*args, **kwargs))[1])
    assert photo_table("guidance") == ["SiT-merged-5-0"]
    assert sampled[-11:] == [
        *([w_cfg, w_r, None] for w_r in (1, 1.5) for w_cfg in (1, 1.5, 2, 4)),
        *([w_cfg, 1, "both"] for w_cfg in (1.5, 2, 4))]
    shutil.copytree(photos / "prepared", tmp_path / "a")
    here = f"--data {tmp_path}/a"
    photo_table("settings", f"{here} --only SiT-merged-z-of-unit-RMS")
    unit = sample.load_checkpoint(f"{tmp_path}/SiT-merged-z-of-unit-RMS-5-0/ckpt.pt")
    folder, meta = unit["settings"]["data"], (tmp_path / "a/meta.json").read_text()
    assert unit["meta"]["name"] == f"{json.loads(meta)['name']}, z of unit RMS"
    with pytest.raises(data.UserError, match="was trained with data"):
        photo_table("guidance", f"--data {folder}")
    (tmp_path / "a/meta.json").write_text(meta.replace(unit["meta"]["arrays"]["x"]["sha256"], "-"))
    with pytest.raises(data.UserError, match="has other x than"):
        photo_table("features", f"{here} --two_levels {folder} --val_data {tmp_path}/a")


def test_settings_are_a_table_each(photo_table, monkeypatch, capsys):
    row = {"curve": [], "frechet_pixels": 1, "images_per_s": 2, "seconds": 3, "hardware": "",
           "date": ""}
    rows = {(f"SiT-merged{suffix}",): [row] for suffix in ("", "-r-1", "-r-2", "-z-of-unit-RMS")}
    monkeypatch.setattr(bench, "train_and_judge", lambda *args: rows)
    photo_table("settings")
    tables = capsys.readouterr().out.split("\n\n")[:-1]
    assert [[line.split(" | ")[0] for line in table.splitlines()[2:]] for table in tables] == [
        ["| SiT-merged", "| SiT-merged-r-1", "| SiT-merged-r-2"],
        ["| SiT-merged", "| SiT-merged-z-of-unit-RMS"]]
    photo_table("methods")
    assert len(capsys.readouterr().out.split("\n\n")[0].splitlines()) == 6


def test_a_run_that_outlives_its_table_is_not_trained_twice(tmp_path):
    """SIGTERM to the table ends the run, which takes its time, or is not ready for it, or done;
    SIGKILL leaves it at work."""
    for number, at_sigterm, code in (
            (signal.SIGTERM, "lambda *_: (time.sleep(0.5), sys.exit(143))", 143),
            (signal.SIGTERM, "signal.SIG_DFL", 143),
            (signal.SIGTERM, "lambda *_: sys.exit(0)", 143),
            (signal.SIGKILL, "signal.SIG_DFL", -signal.SIGKILL)):
        run = [sys.executable, "-c", "import os, signal, sys, time\n"
               f"signal.signal(signal.SIGTERM, {at_sigterm})\n"
               "open(sys.argv[1] + '/pid', 'w').write(f'{os.getpid()} ')\n"
               "time.sleep(60)", str(tmp_path)]
        (tmp_path / "pid").unlink(missing_ok=True)
        table = forked(lambda: bench.train_to_the_end(run), {})
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith(" "):
            time.sleep(0.02)
        os.kill(table, number)
        assert os.waitstatus_to_exitcode(os.waitpid(table, 0)[1]) == code
        pid = int((tmp_path / "pid").read_text())
        if number == signal.SIGTERM:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
    with pytest.raises(data.UserError, match="is being trained by another process"):
        bench.train_to_the_end(run)
    os.kill(pid, signal.SIGKILL)
    with open(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                                # the killed one's is gone
    bench.train_to_the_end([sys.executable, "-c", "", str(tmp_path)])


def test_a_net_does_not_judge_the_samples_of_its_own_z(photos, prepared, tmp_path):
    name, _, kwargs = ENCODER.partition(" ")
    assert fid.Space(name, str(photos / "encoder.safetensors"), data.key_values(
        kwargs.split()[1:], "")).with_head == prepared.meta["encoders"][0]["weights"]
    with pytest.raises(data.UserError, match="this network made the z of .*; let another one"):
        bench.main(bench.parser().parse_args(
            f"photos methods --data {photos / 'prepared'} --val {photos / 'bad'} --features {name} "
            f"--weights {photos / 'encoder.safetensors'} --features_kwargs "
            f"{' '.join(kwargs.split()[1:])} --out {tmp_path}".split()))


@pytest.mark.parametrize("table", ["digits", "methods", "unconditional", "settings", "guidance",
                                   "features"])
def test_runs_of_equal_names_have_equal_settings_and_of_others_others(table):
    args = argparse.Namespace(name=table, family="SiT", size="S", r=8, two_levels="two")
    jobs = bench.digit_jobs(args) if table == "digits" else bench.photo_jobs(args)
    settings = {}
    for name, flags, hows in [*jobs, *bench.photo_jobs(argparse.Namespace(
            name="methods", size="S", r=8))]:
        flags = [flag if isinstance(flag, str) else "--data=unit" for flag in flags]
        of_run = train.resolve(train.typed(train.parser().parse_args(flags)), None)
        assert settings.setdefault(name, of_run) == of_run and hows
        assert of_run["unconditional"] == ("-unconditional-" in name)
        assert (of_run["data"] == "two") == name.endswith("-two-levels")
        assert ("merged" in name or "separate" in name) == (of_run["r"] > 0)
        *_, setting, value = name.split("-")
        assert setting not in ("r", "lam_z", "p_drop_z") or of_run[setting] == float(value)
    assert len({json.dumps(of_run) for of_run in settings.values()}) == len(settings)


def test_the_table_of_digits_has_means_and_spreads_of_seeds(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(bench, "train_to_the_end",
                        lambda command: main(train, " ".join(command[2:])))
    for name in ("JUDGED_AT_ONCE", "N_JUDGED"):
        monkeypatch.setattr(train, name, 10)
    monkeypatch.setitem(train.DIGITS, "sample_steps", 2)
    name = "SiT-conditional-merged"
    main(bench, f"digits --steps 1 --n 10 --seeds 0 1 --only {name} --out {tmp_path}")
    rows = bench.rows_of(tmp_path / "rows.jsonl")
    assert [(row["seed"], row["sampled_with"]) for row in rows] == [
        (0, {}), (0, {"w_r": 1.5}), (1, {}), (1, {"w_r": 1.5})]
    assert not any(row["made_with"].get("unconditional") for row in rows)
    assert all("read_as_asked_percent" in row for row in rows)
    values = np.reshape([row["frechet_classifier"] for row in rows], (2, 2))
    changes = values[:, 1] - values[:, 0]
    assert (f"| {name} | 1.5 | {values[:, 1].mean():.0f} ± {values[:, 1].std(ddof=1):.0f} |  | "
            f"{changes.mean():+.2f} ± {changes.std(ddof=1):.2f} | " in capsys.readouterr().out)
    assert rows[0]["made_with"]["lr"] == 3e-3 and rows[0]["training_seconds"] == pytest.approx(
        128 / rows[0]["images_per_s"])


def test_digits_are_compared_seed_by_seed(tmp_path, monkeypatch, capsys):
    """The mean of differences is that of the pairs, their spread is not that of the means."""
    def rows(*distances):
        return [{"frechet_classifier": distance, "frechet_pixels": 1, "images_per_s": 1,
                 "hardware": "", "date": ""} for distance in distances]

    table = {("SiT-conditional-none", ("w_r", 1.0)): rows(1, 2),
             ("SiT-conditional-merged", ("w_r", 1.0)): rows(1.5, 2.7),
             ("SiT-conditional-merged", ("w_r", 1.5)): rows(1.4, 2.2)}
    monkeypatch.setattr(bench, "train_and_judge", lambda *args: table)
    main(bench, f"digits --seeds 0 1 --out {tmp_path}")
    lines = [line.split(" | ")[1:5] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert lines == [["1", "1.50 ± 0.71", "", ""], ["1", "2.10 ± 0.85", "+0.60 ± 0.14", ""],
                     ["1.5", "1.80 ± 0.57", "+0.30 ± 0.14", "-0.30 ± 0.28"]]


def test_curves_are_means_of_seeds_over_steps_and_over_seconds(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    rows = [{"run": run, "seed": seed, "made_with": {"batch_size": 64}, "images_per_s": rate,
             "curve": [[1, 10 + seed], [2, 8 - seed]]}
            for run, seed, rate in (("merged", 0, 24), ("merged", 1, 40), ("none", 0, 128))]
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn, plot = [], axes.plot
    monkeypatch.setattr(axes, "plot", lambda self, x, y, label, **style: (
        drawn.append((label, list(x), list(y))), plot(self, x, y, label=label, **style)))
    main(bench, f"curves --rows {tmp_path}/rows --out {tmp_path}/curves.png")
    assert drawn == [("merged", [1, 2], [10.5, 7.5]), ("merged", [2, 4], [10.5, 7.5]),
                     ("none", [1, 2], [10, 8]), ("none", [0.5, 1], [10, 8])]
    with pytest.raises(data.UserError, match="has no curves"):
        main(bench, f"curves --rows {tmp_path}/rows --only None")
    drawn.clear()
    (tmp_path / "speed").write_text("".join(json.dumps(
        {"model": "SiT-T/2", "run": run, "batch_size": batch_size, "images_per_s": rate}) + "\n"
        for run, batch_size, rate in (("none", 64, 64), ("none", 32, 8), ("merged", 64, 32))))
    made = [{"fusion": "none", "batch_size": 64}, {"repa": 0.5, "batch_size": 64}]
    command = f"curves --rows {tmp_path}/rows --speed {tmp_path}/speed --out {tmp_path}/curves.png"
    (tmp_path / "rows").write_text("".join(json.dumps(row | {"made_with": made[0]}) + "\n"
                                           for row in rows[2:]))
    main(bench, command)
    assert drawn == [("none", [1, 2], [10, 8]), ("none", [1, 2], [10, 8])]
    (tmp_path / "rows").write_text(json.dumps(rows[0] | {"made_with": made[1]}) + "\n")
    with pytest.raises(data.UserError, match=r"has 0 rows of SiT-T/2 merged\+REPA with"):
        main(bench, command)


def test_generated_features_are_probed_on_real_ones(photos, photo_table, tmp_path, capsys,
                                                    monkeypatch):
    """Perfect "generated" features, those of the photographs, teach what real ones do; the
    network's own after five steps do not."""
    flags = f"--val_data {photos / 'prepared'} --lr 0.01"       # so that classes matter
    assert photo_table("features", flags) == ["SiT-merged-5-0", "SiT-unconditional-merged-5-0"]
    generated, real = [row for row in bench.rows_of(f"{tmp_path}/rows.jsonl")
                       if row.get("run") == "SiT-merged"]
    assert generated["sampled_with"] == {} and real["sampled_with"] == {"z": "real"}
    folder = str(photos / "prepared")
    args = argparse.Namespace(data=folder, val_data=folder, n=11)
    path = f"{tmp_path}/SiT-merged-5-0/ckpt.pt"
    (net, about), source = sample.load_model(path), data.Prepared(folder, 4)
    _, z, y, _ = source.batch(source.examples(8))
    x, _ = sample.generate(net, y, 2, guide=bench.real_z(z), batch_size=train.JUDGED_AT_ONCE)
    assert real["frechet_pixels"] == pytest.approx(distance_in_table(x, about, tmp_path), rel=1e-7)
    assert real["frechet_pixels"] != pytest.approx(generated["frechet_pixels"], rel=1e-6)
    own = bench.probe(args, path, "cpu")
    x, z, y, _ = source.batch(torch.arange(11))
    order = torch.tensor([(y == label).nonzero()[i // 3 % 3, 0] for i, label in
                          enumerate(torch.arange(11) % 3)])
    monkeypatch.setattr(sample, "generate", lambda *args, **kwargs: (x[order], z[order]))
    perfect = bench.probe(args, path, "cpu")
    shutil.copytree(folder, tmp_path / "noise")
    stored = np.load(tmp_path / "noise/z.npy")
    np.save(tmp_path / "noise/z.npy", np.random.default_rng(0).normal(
        size=stored.shape).astype(stored.dtype))
    args.val_data = f"{tmp_path}/noise"
    assert bench.probe(args, path, "cpu")["from_real_z"] < 80 < perfect["from_generated_z"]
    assert perfect["from_real_z"] == 100 == own["from_real_z"]
    assert perfect["from_generated_z"] > 80 > own["from_generated_z"]
    with pytest.raises(data.UserError, match="--val_data"):
        photo_table("features")


def test_losses_over_time_are_mean_squares_with_and_without_z(workdir, digits, tmp_path, capsys,
                                                              monkeypatch):
    path = str(workdir / "out/ckpt.pt")
    command = (f"losses --ckpt {path} --n 70 --data {workdir / 'prepared/digits'} "    # 64 and 6
               f"--rows {tmp_path}/rows")
    main(bench, command)
    shown = capsys.readouterr().out
    monkeypatch.setattr(bench, "losses_over_time", None)                # kept, not computed again
    main(bench, command)
    assert capsys.readouterr().out == shown and len(bench.rows_of(tmp_path / "rows")) == 1
    header, _, *lines = [line.split(" | ") for line in shown.splitlines()]
    assert [line[:2] for line in lines[:3]] == [["| out", name] for name in ("x", "x, z null", "z")]
    net, _ = sample.load_model(path)
    x, z, y, _ = digits.batch(digits.examples(70))
    generator = torch.Generator().manual_seed(0)
    eps_x, eps_z = (torch.randn(part.shape, generator=generator) for part in (x, z))
    t = torch.full((70,), 0.35)
    x_t, z_t = 0.35 * x + 0.65 * eps_x, 0.35 * z + 0.65 * eps_z
    with torch.no_grad():
        (pred_x, pred_z), (null_x, _) = (net(x_t, fed, t, y) for fed in (z_t, 0 * z_t))
    expected = [(pred - target).square().mean().item() for pred, target in (
        (pred_x, x - eps_x), (null_x, x - eps_x), (pred_z, z - eps_z))]
    found = [float(line[header.index("t = 0.35")]) for line in lines[:3]]
    assert found == pytest.approx(expected, abs=6e-4)
    with pytest.raises(data.UserError, match="with another codec"):
        checkpoint = torch.load(path)
        checkpoint["meta"]["codec"] = "another"
        torch.save(checkpoint, tmp_path / "ckpt.pt")
        main(bench, f"losses --ckpt {tmp_path / 'ckpt.pt'} --data {workdir / 'prepared/digits'}")


def test_sheets_show_checkpoints_from_equal_noise(workdir, tmp_path, capsys):
    path, out = str(workdir / "out/ckpt.pt"), f"{tmp_path}/sheets.png"
    main(bench, f"sheets --ckpt {path} {path} --w_r 1 3 --n 3 --seed 5 --out {out}")
    assert capsys.readouterr().out == f"{out}: out, out, RG 3, out, out, RG 3\n"
    net, about = sample.load_model(path)
    x, z = zip(*(sample.generate(net, torch.tensor([0, 3, 6]), about["settings"]["sample_steps"],
                                 seed=5, w_r=w_r, batch_size=3) for w_r in (1, 3, 1, 3)))
    expected = sample.sheet([data.to_images(part) for part in x], list(z), about["meta"]["z_std"],
                            3, ["out", "out, RG 3"] * 2)
    with Image.open(out) as picture:
        assert np.abs(np.int16(picture) - np.int16(expected)).max() <= 1


def test_z_of_unit_rms_is_the_same_z_but_for_its_scale(photos, prepared, tmp_path):
    shutil.copytree(photos / "prepared", tmp_path / "a")
    out = bench.unit_rms(f"{tmp_path}/a/", 3)
    one, unit = (data.Prepared(folder) for folder in (f"{tmp_path}/a", out))
    scale = unit.z[:].astype(np.float64) / one.z
    assert np.square(unit.z[:, :3].astype(np.float64)).mean() == pytest.approx(1, rel=1e-2)
    assert scale == pytest.approx(np.full_like(scale, np.median(scale)), rel=1e-2)
    assert np.array_equal(one.x, unit.x) and unit.meta["z_std"] == pytest.approx(
        np.array(one.meta["z_std"]) * np.median(scale), rel=1e-2)
    assert unit.meta["encoders"][0]["scale"] == pytest.approx(
        one.meta["encoders"][0]["scale"] * np.median(scale), rel=1e-2)
    stamp = os.stat(f"{out}/z.npy").st_mtime_ns
    assert bench.unit_rms(f"{tmp_path}/a", 3) == out                      # found, not made again
    assert os.stat(f"{out}/z.npy").st_mtime_ns == stamp
    assert bench.unit_rms(f"{tmp_path}/a", 2) != out


def test_metrics_are_timed_on_photographs_cut_to_one_size(photos, capsys, monkeypatch):
    seen = []

    def statistics(path, *args):
        images = fid.Images(path)
        seen.append((path.split("/")[-1], images.n, images.size))
        return fid.Statistics(5, (np.zeros(3), np.eye(3)), pool=normal(5, 3, seed=len(seen)))

    monkeypatch.setattr(fid, "Space", lambda *args: argparse.Namespace(name="inception",
                                                                       device="cpu"))
    monkeypatch.setattr(fid, "statistics_of", statistics)
    monkeypatch.setattr(fid, "frechet_distance", lambda *args: 1.25)      # of 2,048: seconds
    main(bench, f"metrics --images {photos / 'photos'} --n 5 --size 24 --large 40 --rounds 1 "
                f"--weights {photos / 'encoder.safetensors'}")
    assert seen == [("samples", 5, (24, 24)), ("reference", 5, (24, 24))]
    shown = capsys.readouterr().out
    assert "| fid.py | 1.25 |" in shown and "recall against 8: " in shown


# command lines, as a user types them

def test_train_writes_what_the_readme_says(workdir, monkeypatch):
    out = workdir / "out"
    assert {path.name for path in out.iterdir()} == {
        "ckpt.pt", "ckpt_prev.pt", "log.jsonl", "sheet.png", "results.json"}
    lines = losses(out)
    assert [line["step"] for line in lines] == [2, 4, 6, 8] and lines[-1]["loss"] < lines[0]["loss"]
    assert {"loss", "loss_x", "loss_z", "loss_q0", "loss_q3"} <= set(lines[0])
    results = json.loads((out / "results.json").read_text())
    n = train.N_JUDGED
    assert results["n_images"] == n and results[f"frechet_pixels_{n}_vs_179"] > 0
    monkeypatch.chdir(workdir)
    with pytest.raises(data.UserError, match="out is done.*--steps"):
        main(train, "")


def test_sample_writes_a_sheet_and_adms_layout(workdir, capsys):
    run("sample.py --w_r 1.5 --save_z", workdir)
    with np.load(workdir / "samples/samples.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (60, 8, 8, 3)
        assert file["y"].shape == (60,) and file["z"].shape == (60, 4, 8, 8)
    assert (workdir / "samples/sheet.png").exists()
    main(fid, f"{workdir}/samples/samples.npz digits")
    shown = capsys.readouterr().out
    assert "frechet_classifier_60_vs_179" in shown and "read_as_asked_percent" in shown
    same = f"{workdir}/samples/samples.npz {workdir}/samples/samples.npz --features pixels"
    assert metrics_of(same, capsys)["frechet_pixels_60_vs_60"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["SiT", "DiT"])
@pytest.mark.parametrize("fusion", ["none", "separate"])
def test_all_train_and_sample_unconditionally(workdir, tmp_path, monkeypatch, capsys, family,
                                              fusion):
    monkeypatch.chdir(workdir)
    main(train, f"--model {family}-T/4 --fusion {fusion} --unconditional --steps 3 --batch_size 8 "
                f"--sample_steps 3 --out {tmp_path}")
    main(sample, f"--ckpt {tmp_path}/ckpt.pt --n 3 --out {tmp_path}")
    with np.load(tmp_path / "samples.npz") as file:
        assert set(file) == {"arr_0"}                     # no classes, and z with --save_z alone
    arch = sample.load_checkpoint(f"{tmp_path}/ckpt.pt")["arch"]
    assert arch["n_classes"] == 0 and arch["r"] == (0 if fusion == "none" else 4)
    capsys.readouterr()
    main(fid, f"{tmp_path}/samples.npz digits")
    shown = capsys.readouterr().out
    assert "frechet_pixels_3_vs_179" in shown and "read_as_asked" not in shown


def test_data_and_pca_describe_what_is_there(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    main(data, "")
    main(pca, "prepared/digits/pca.npz")
    shown = capsys.readouterr().out
    assert "1,618 images of 10 classes" in shown and "16 of 64 components" in shown
    assert run("pca.py nowhere.npz", workdir, ok=False) == "error: no PCA file at nowhere.npz\n"


@pytest.fixture
def broken(workdir):
    """workdir with a checkpoint cut short, as truncated.pt and truncated/ckpt.pt; and its files."""
    half = (workdir / "out/ckpt.pt").read_bytes()[:100_000]
    (workdir / "truncated").mkdir(exist_ok=True)
    for path in (workdir / "truncated.pt", workdir / "truncated/ckpt.pt"):
        path.write_bytes(half)
    return workdir, lambda: {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def test_a_mistake_is_one_line_on_stderr_and_overwrites_nothing(broken, monkeypatch):
    folder, content = broken
    monkeypatch.chdir(folder)
    before = content()
    with pytest.raises(SystemExit, match="^error: .*contradicts.*$") as error:
        data.run_cli(train.main, train.parser().parse_args(["--seed=5"]))
    assert "\n" not in str(error.value) and content() == before


@pytest.mark.parametrize("module, flags, words", [
    (sample, "--ckpt nowhere.pt", "no checkpoint at nowhere.pt"),
    (sample, "--ckpt truncated.pt", "damaged"),
    (sample, "--labels 3,10", "classes 0 to 9"), (sample, "--n 0", "--n 0"),
    (sample, "--solver ddpm", "sde or euler"), (sample, "--steps 1", "--steps 1"),
    (sample, "--w_cfg nan", "--w_cfg nan"), (sample, "--cfg_interval 0.9,0.1", "--cfg_interval"),
    (sample, "--compare", "--compare shows"), (sample, "--vae there", "pixels, which no codec"),
    (sample, "--device nonsense", "--device nonsense"),
    (sample, "--ckpt prepared/digits/x.npy", "neither a checkpoint of train.py nor"),
    (train, "--steps 7", "done"), (fid, "prepared/digits/x.npy digits", "images must be uint8"),
    (train, "--out truncated", "damaged"), (train, "--model SiT-XL2 --out new", "SiT-XL/2"),
    (train, "--model SiT-XL/2 --out new", "python data.py --images"),
    (train, "--r 99 --out new", "lower --r")])
def test_mistakes_are_found_before_anything_is_written(broken, monkeypatch, module, flags, words):
    folder, content = broken
    monkeypatch.chdir(folder)
    before = content()
    with pytest.raises(data.UserError, match=words) as error:
        main(module, flags)
    assert content() == before and "\n" not in str(error.value)


@pytest.mark.parametrize("module, good, short", [
    (train, "--steps 1", "--step 1"), (sample, "--steps 1", "--step 1"), (data, "", "--x"),
    (fid, "a b --no-labels", "--no-label"), (pca, "a", "--x"), (bench, "digits --n 1", "--ste 1")])
def test_flags_are_strict(module, good, short):
    module.parser().parse_args(good.split())
    with pytest.raises(SystemExit):
        module.parser().parse_args([*good.split(), *short.split()])


def test_the_averaged_weights_are_what_is_sampled(workdir):
    checkpoint = sample.load_checkpoint(str(workdir / "out/ckpt.pt"))
    weights = sample.load_ema(checkpoint).state_dict()
    assert all(torch.equal(weights[name], checkpoint["ema"][name]) for name in weights)
    assert any(not torch.equal(weights[name], checkpoint["net"][name]) for name in weights)


def test_a_run_goes_on_with_its_own_data_only(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("prepared/digits", "out"):
        (tmp_path / folder).mkdir(parents=True)
        for file in (workdir / folder).iterdir():
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    meta = json.loads((tmp_path / "prepared/digits/meta.json").read_text())
    meta["arrays"]["z"]["sha256"] = "another"
    (tmp_path / "prepared/digits/meta.json").write_text(json.dumps(meta))
    with pytest.raises(data.UserError, match="not the data"):
        main(train, "--steps 9")


def test_restart_keeps_the_old_run(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(workdir)
    (tmp_path / "ckpt.pt").write_bytes(b"old")
    (tmp_path / "log.jsonl").write_text("old")
    (tmp_path / "ckpt_0000100.pt").write_bytes(b"kept")
    with pytest.raises(data.UserError, match="is not finite"):
        main(train, f"--restart --lr 1e30 --steps 6 --batch_size 8 --out {tmp_path}")
    assert not (tmp_path / "ckpt.pt").exists() and not (tmp_path / "log.jsonl").exists()
    assert (tmp_path / "ckpt.pt.old").read_bytes() == b"old"
    assert (tmp_path / "log.jsonl.old").read_text() == "old"
    assert (tmp_path / "ckpt_0000100.pt.old").read_bytes() == b"kept"


def test_torchruns_own_restart_of_a_restarted_run_goes_on(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(data.UserError, match="is done, with 8 steps"):
        main(train, f"{BRIEF.removeprefix('train.py ')} --restart")


@needs_shared
@pytest.mark.slow
def test_the_default_route_on_64_photographs(tmp_path):
    """SD-VAE's and DINOv2-B's architectures, with random weights in the hubs' formats, against
    diffusers' and timm's own pipelines."""
    import diffusers
    import safetensors.torch
    import timm
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(                                       # sd-vae-ft-ema's config
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4).eval()
    vae.save_pretrained(tmp_path / "vae")
    dino = timm.create_model(pca.DINOV2)                                 # 518 pixels, as on the hub
    for name, p in dino.named_parameters():
        p.data += 0.02 * normal(*p.shape, seed=p.numel() % 1000)
    safetensors.torch.save_file(dino.state_dict(), tmp_path / "dino.safetensors")
    chosen = sorted((SHARED / "imagenette/val").rglob("*.JPEG"))[::61][:64]
    for path in chosen:
        target = tmp_path / "images" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    command = (f"data.py --images images --out out --vae vae --encoder_weights {tmp_path}/"
               "dino.safetensors")
    error = run(command, tmp_path, ok=False, threads=os.cpu_count())     # a random VAE's scale
    assert "have RMS" in error
    better = error.split("--vae_scale ")[1].split()[0]
    run(f"{command} --vae_scale {better}", tmp_path, threads=os.cpu_count())
    ours = data.Prepared(str(tmp_path / "out"))
    assert ours.x.shape == (64, 8, 32, 32) and ours.z.shape == (64, 16, 16, 16)
    bytes_an_image = sum((tmp_path / f"out/{name}.npy").stat().st_size for name in "xzy") / 64
    assert bytes_an_image < 25_000
    row, path = 10, sorted((tmp_path / "images").rglob("*.JPEG"))[10]
    image = Image.fromarray(data.load_image(path, 256))
    processor = diffusers.image_processor.VaeImageProcessor()
    with torch.no_grad():
        posterior = vae.encode(processor.preprocess(image)).latent_dist
    mean, std = torch.from_numpy(ours.x[row].astype(np.float32)).chunk(2)
    assert mean.allclose(posterior.mean[0], atol=1e-3 * posterior.mean.std().item(), rtol=2e-3)
    assert std.allclose(posterior.std[0], atol=1e-3, rtol=2e-3)
    net = timm.create_model(pca.DINOV2, img_size=224, num_classes=0, pretrained=True,
                            pretrained_cfg_overlay={"file": f"{tmp_path}/dino.safetensors"}).eval()
    config = timm.data.resolve_model_data_config(net)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    inputs = torch.nn.functional.interpolate((pixels - mean) / std, 224, mode="bicubic")
    with torch.no_grad():
        tokens = net.forward_features(inputs)[0, net.num_prefix_tokens:].double().numpy()
    z = pca.load(str(tmp_path / "out/pca.npz")).project(tokens).T.reshape(16, 16, 16)
    assert np.abs(z - ours.z[row]).max() < 0.02 and z.std() > 1


@pytest.mark.slow
def test_the_main_job_makes_digits_that_read_as_asked(tmp_path):
    run("train.py", tmp_path)
    assert json.loads((tmp_path / "out/results.json").read_text())["read_as_asked_percent"] >= 98


if __name__ == "__main__":
    redi, dit, torch_fidelity = sys.argv[1:]
    record_peers(redi, dit)
    record_sde_peers(redi)
    record_inception_peer(torch_fidelity)
