"""Training and evaluation on a GPU: on fake tensors on any machine, then on a real GPU.

A fake tensor has a shape and a device, but no values. An operation on fake tensors of two devices
is an error, and so is reading a value. Gradients are made up, since autograd needs a CUDA driver.
"""

import math
import signal
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cli
import data
import device as devices
import distributed
import run as runs
import small
import trainer
import utils
from augment import Augmentation
from common import Setting, forward_of, random_dataset, run_of
from evaluation import evaluate, predict
from recipes import RECIPES, Recipe, TrainConfig
from ViT import MultiHeadSelfAttention, ViT, ViTConfig

pytestmark = pytest.mark.timeout(600)  # a GPU's kernels are compiled
GPU = torch.device("cuda:0")
OPTIONS = (
    "demo --policy trivial --accumulate 3",
    "demo --cutmix 1 --mixup 0.8 --resized-crop 0.5",
    "demo --flip alternating",
    "demo --pooling class --positions learned --patch-dropout 0.5",
    "demo --optimizer adamw",
    "demo --attention plain",
)


def run_with(flags, precision="bf16", steps=3, device=GPU):
    """A run of `--recipe` with these flags, cut to two blocks and 40 images, on random images."""
    flags = ["--depth", "2", "--batch-size", "40", "--recipe", *flags.split()]
    command = cli.parse(flags, description="")
    setting = Setting(device, precision, 1)
    return run_of(Recipe("", command.model, command.training), setting, steps)


# ---------------------------------------------------------------------------- a fake GPU


def why_not_fake():
    """Why this build of torch has no fake GPU; empty if it has one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        with FakeTensorMode():
            torch.empty(1, device=GPU)
    except Exception as error:  # its type depends on the version
        return f"FakeTensorMode makes no CUDA tensors: {error}"
    return ""


needs_fake_gpu = pytest.mark.skipif(bool(reason := why_not_fake()), reason=reason)


class EpochEnds(Exception):
    """Raised where the epoch ends and its losses are read."""


class Watch(TorchDispatchMode):
    """Records each operation between the host and the GPU that makes the host wait.

    A copy from pinned memory does not wait. Indexing by a CPU tensor does: it is copied.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.after_step, self.homes = [], [], {}  # homes: generator devices by seed

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        leaves = tree_leaves((args, kwargs, result))
        for each in leaves:
            if isinstance(each, torch.Generator):
                home = self.homes.get(each.initial_seed(), "cpu")
                assert home == result.device.type, f"{operation} on {result.device.type}"
        between = len({each.device.type for each in leaves if isinstance(each, Tensor)}) > 1
        pinned = kwargs.get("non_blocking") and hasattr(args[0], "copied_to_pinned_memory")
        if between and not (operation is torch.ops.aten._to_copy.default and pinned):
            self.waits.append(str(operation))
        return result


@pytest.fixture
def watch(monkeypatch):
    """Runs a test on a fake GPU, with stand-ins for what needs a CUDA driver."""
    watch, put, after_step = Watch(), monkeypatch.setattr, trainer.after_step

    def built_there(config):
        with GPU:
            return ViT(config)

    def generator_for(*key, device="cpu"):
        watch.homes[seed := utils.seed_for(*key)] = torch.device(device).type
        return torch.Generator().manual_seed(seed)

    def pin_memory(tensor):
        pinned = tensor.clone()
        pinned.copied_to_pinned_memory = True
        return pinned

    def backward(loss):
        """Gives a gradient to each weight that the loss depends on."""
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            if (node := nodes.pop()) and node not in seen:
                seen.add(node)
                nodes += [function for function, _ in node.next_functions]
                if hasattr(node, "variable"):
                    node.variable.grad = torch.empty_like(node.variable)

    def after_step_noted(run, state, bar):
        after_step(run, state, bar)
        watch.after_step.append(len(watch.waits))

    def epoch_ends(run, state):
        raise EpochEnds

    for module in ("utils", "augment", "run"):
        put(f"{module}.generator_for", generator_for)
    put(ViT, "initialize", lambda model: None)  # it reads what it draws
    put(ViT, "to", lambda model, device: model)  # a fake weight cannot be moved
    put("common.ViT", built_there)
    put(torch.Tensor, "pin_memory", pin_memory)
    put(torch.Tensor, "backward", backward)
    put(torch.cuda, "default_generators", (torch.Generator(),))
    put(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    put("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    put(distributed.World, "any", lambda world, *wishes: list(wishes))  # it reads a CPU tensor
    put(runs.Run, "totals", epoch_ends)
    put(trainer, "after_step", after_step_noted)
    data._pixel_scale.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield watch
    data._pixel_scale.cache_clear()  # its tensors are fake


def train_and_predict(watch, flags):
    """Three steps and two evaluations, of which only the first step may wait for the GPU."""
    (run, state), split = run_with(flags), random_dataset(600, GPU).train
    with pytest.raises(EpochEnds):
        trainer.train_epoch(run, state, run.parallel)
    assert state.step == len(watch.after_step) == 3
    for precision in ("fp32", "bf16"):
        logits = predict(state.model, split, run.dataset.preprocessing, precision=precision)
        assert (logits.device, logits.shape, logits.dtype) == (GPU, (600, 10), torch.float32)
    assert watch.waits[watch.after_step[0] :] == []
    return run, state


@needs_fake_gpu
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # deepcopy's
@pytest.mark.parametrize("flags", [*RECIPES, *OPTIONS])
def test_a_step_stays_on_the_gpu_and_does_not_wait_for_it(watch, flags):
    run, state = train_and_predict(watch, flags)
    states = [each.state[weight] for each in state.optimizers for weight in each.state]
    assert len(states) == sum(weight.requires_grad for weight in state.model.parameters())
    kept = [*state.sums.values(), run.augment.coins, *tree_leaves(states)]
    kept += [*state.model.parameters(), *state.model.buffers()]
    assert {tensor.device for tensor in kept} == {GPU}


@needs_fake_gpu
def test_a_fault_is_caught(watch, monkeypatch):
    with pytest.raises(AssertionError, match=r"rand\.generator on cuda"):
        torch.rand(3, generator=torch.Generator(), device=GPU)  # the CPU's generator
    augment = Augmentation.__call__

    def waiting(self, images, *rest):
        torch.zeros(3).to(images.device, non_blocking=True)  # from memory that is not pinned
        return augment(self, images, *rest)

    monkeypatch.setattr(Augmentation, "__call__", waiting)
    with pytest.raises(AssertionError, match="_to_copy"):
        train_and_predict(watch, "demo")


# ---------------------------------------------------------------------------- a real GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def real_run(flags, steps=3):
    torch.compiler.reset()  # or one process would soon have too many models to compile
    return run_with(flags, devices.resolve_precision("auto", GPU), steps)


@pytest.fixture
def no_waits_after_a_step(monkeypatch):
    """CUDA raises if an operation waits between the first step's end and the epoch's."""
    after_step, totals = trainer.after_step, runs.Run.totals

    def wrapped(run, state, bar):
        after_step(run, state, bar)
        torch.cuda.set_sync_debug_mode("error")

    def reading(run, state):
        torch.cuda.set_sync_debug_mode("default")
        return totals(run, state)

    monkeypatch.setattr(trainer, "after_step", wrapped)
    monkeypatch.setattr(runs.Run, "totals", reading)
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.usefixtures("no_waits_after_a_step")
@pytest.mark.parametrize("mode", ["off", "on", "graphs"])
@pytest.mark.parametrize("name", RECIPES)
def test_three_steps_of_a_recipe(name, mode):
    run, state = real_run(f"{name} --compile {mode}")
    forward = forward_of(run, state, "eager" if mode == "off" else "compiled")
    assert (forward is run.parallel) == (mode == "off")  # also true if compiling fails
    trainer.train_epoch(run, state, forward)
    assert state.step == 3
    assert state.history[0].train_loss == pytest.approx(math.log(10), abs=1)
    logits = predict(state.model, run.dataset.train, run.dataset.preprocessing)
    assert logits.device == GPU and logits.isfinite().all()
    assert logits.std() > 0  # the head starts at zero


@needs_gpu
@pytest.mark.parametrize("D_h", [16, 32, 64])
@pytest.mark.parametrize("T", [8, 16, 17, 32, 64, 65, 128, 256])
def test_attention_in_bf16_is_that_of_the_equations(T, D_h):
    """Outputs and gradients of the kernel that torch chooses, against Eqs. 6-7 in float32."""
    torch.manual_seed(0)
    attention = MultiHeadSelfAttention(ViTConfig(width=4 * D_h, heads=4)).to(GPU)
    z, weights = torch.randn(2, 64, T, 4 * D_h, device=GPU)
    found = []
    for attention.implementation, precision in (("auto", "bf16"), ("plain", "fp32")):
        leaves = [(3 * z).requires_grad_(), *attention.parameters()]
        with devices.autocast(precision, GPU):
            heads = attention(leaves[0]).float()
        found.append([heads, *torch.autograd.grad((heads * weights).sum(), leaves)])
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).norm() < 0.02 * expected.norm()


@needs_gpu
@pytest.mark.parametrize(
    "change", [{"policy": "trivial"}, {"resized_crop": 0.5}, {"cutmix": 1.0}, {"mixup": 0.8}]
)
def test_augmented_images_are_those_of_the_cpu(monkeypatch, change):
    """With the same random draws, all made on the host."""
    rand, put = torch.rand, monkeypatch.setattr

    def of_the_host(*shape, generator, device="cpu"):
        return rand(*shape, generator=generator).to(device)

    put("augment.generator_for", lambda *key, device="cpu": utils.generator_for(*key))
    put(torch, "rand", of_the_host)
    images = torch.randint(256, (500, 3, 32, 32), generator=small.generator(0)).to(torch.uint8)
    config, rows = TrainConfig(flip="off", crop_padding=0, **change), torch.arange(500)
    cpu, gpu = (
        Augmentation(config, ViTConfig(), 500, device)(
            images.to(device), rows.to(device) % 10, rows.to(device), 0, 7
        )
        for device in (torch.device("cpu"), GPU)
    )
    assert (cpu.images != images).float().mean() > 0.1
    assert (cpu.images != gpu.images.cpu()).float().mean() < 1e-3
    torch.testing.assert_close(cpu.targets, gpu.targets.cpu())


@needs_gpu
def test_float32_steps_and_an_evaluation_are_those_of_the_cpu():
    found = []
    for device in (torch.device("cpu"), GPU):
        torch.manual_seed(0)
        flags = "demo --flip off --crop-padding 0 --optimizer sgd --learning-rate 0.1"
        run, state = run_with(flags, "fp32", device=device)
        trainer.train_epoch(run, state, run.parallel)
        result = evaluate(state.model, run.dataset.train, run.dataset.preprocessing)
        found.append([state.history[0].train_loss, result.loss, result.top1])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0][1] != found[0][0]


@needs_gpu
@pytest.mark.parametrize("mode", ["on", "graphs"])
def test_the_compiled_model_gives_the_same_logits(mode):
    run, state = real_run(f"demo --compile {mode}")
    nn.init.normal_(state.model.head.weight, std=run.model_config.width**-0.5)
    compiled = forward_of(run, state, "compiled")
    assert compiled is not run.parallel
    images = run.dataset.train.take(torch.arange(40, device=GPU)).images
    with devices.autocast(run.precision, GPU):
        inputs = run.normalize(images)
        logits, expected = compiled(inputs, None).float(), state.model(inputs).float()
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05)


@needs_gpu
def test_a_deterministic_run_repeats_and_resumes_bit_for_bit(request, tmp_path):
    """In separate processes, since cuBLAS reads its setting only once, when it starts."""
    flags = "--recipe demo --epochs 2 --depth 2 --deterministic --no-test --policy trivial "
    flags += f"--patch-dropout 0.5 --dropout 0.1 --output-dir {tmp_path} --name "

    def start(flags):
        program = str(small.ROOT / "src/trainer.py")
        process = subprocess.Popen([sys.executable, program, "--device", "cuda", *flags.split()])
        request.addfinalizer(process.kill)
        return process

    for name in ("first", "again"):
        assert start(flags + name).wait(small.PATIENCE) == 0
    stopped = start(f"{flags}stopped --save-minutes 0")
    small.wait_for((tmp_path / "stopped/last.pt").exists, lambda: stopped.poll() is None)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(small.PATIENCE) == 128 + signal.SIGTERM
    assert start(f"--no-test --resume {tmp_path}/stopped").wait(small.PATIENCE) == 0
    for name in ("again", "stopped"):
        assert small.differing(tmp_path / "first", tmp_path / name) == 0


@needs_gpu
def test_an_allocation_that_does_not_fit_is_one_line(monkeypatch, tmp_path, capsys):
    def too_large(self, images, *_):
        return torch.empty(2**50, dtype=torch.uint8, device=images.device)

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: random_dataset(80, GPU))
    monkeypatch.setattr(Augmentation, "__call__", too_large)
    assert small.status_of("--device cuda", tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory; instead of --batch-size 40 --accumulate 1, try --accumulate 2" in line
