"""Products that are never older than the weights, attention's among them, and the memory of a step."""

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from derived import random
from torch import nn

from axmoe_lite import approximate, assignment_of, layers, models, multiplier, restore
from axmoe_lite.quant import quantise

# ----------------------------------------------------------------- products follow the weights


def changes():
    def through_data(network, optimiser):
        network[0].weight.data.mul_(-1.5)

    def one_value_through_data(network, optimiser):
        network[2].weight.data[0, 0] += 1.0

    def bias_in_place(network, optimiser):
        with torch.no_grad():
            network[0].bias.add_(1.0)

    def new_memory(network, optimiser):
        network[0].weight.data = network[0].weight.data.flip(0).clone()

    def step(network, optimiser):
        network(random(2, 3, 6, 6)).square().sum().backward()
        optimiser.step()

    def load(network, optimiser):
        state = {name: value * 1.5 for name, value in network.state_dict().items()}
        network.load_state_dict(state)

    def assign(network, optimiser):
        state = {name: value * 1.5 for name, value in network.state_dict().items()}
        network.load_state_dict(state, assign=True)

    def scale(network, optimiser):
        network[0].scale_x.mul_(2)

    def other_multiplier(network, optimiser):
        network[0].multiplier = multiplier("mul8s_1L2L")

    return [
        through_data,
        one_value_through_data,
        bias_in_place,
        new_memory,
        step,
        load,
        assign,
        scale,
        other_multiplier,
    ]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_no_product_is_older_than_the_weights(change, training, grad):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    x = random(2, 3, 6, 6)
    approximate(network, {"0": "mul8s_1L2J", "2": "mul8s_1KVA"}, calibration=x).train(training)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    with torch.set_grad_enabled(grad):
        before = network(x)
        assert torch.equal(network(x), before)
    change(network, optimiser)
    fresh = copy.deepcopy(network)  # a copy has no products yet
    with torch.set_grad_enabled(grad):
        after = network(x)
        assert torch.equal(after, fresh(x)) and not torch.equal(after, before)
        network.train(not training)
        assert torch.equal(network(x), after)


def test_evaluation_between_two_steps_sees_both():
    # train, eval, train, eval: what evaluation keeps must not outlive the step.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    x = random(2, 3, 6, 6)
    approximate(network, "mul8s_1L2J", calibration=x)
    optimiser, seen = torch.optim.SGD(network.parameters(), lr=0.5), []
    for _ in range(3):
        network.train()(x).square().sum().backward()
        optimiser.step()
        seen.append(network.eval()(x))
        assert torch.equal(seen[-1], copy.deepcopy(network)(x))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles_of_approximate_layers(used):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2)).eval()
    x = random(2, 3, 6, 6)
    approximate(network, {"0": "mul8s_1L2J", "2": "mul8s_1KVA", "3": "drum(4)"}, calibration=x)
    y = network(x) if used else copy.deepcopy(network)(x)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    twins = [
        copy.deepcopy(network),
        copy.copy(network),
        pickle.loads(pickle.dumps(network)),
        torch.load(file, weights_only=False),
    ]
    for twin in twins:
        assert torch.equal(twin(x), y) and assignment_of(twin) == assignment_of(network)
        twin(x).sum().backward()
        twin.zero_grad()
    for twin in (twins[0], *twins[2:]):
        with torch.no_grad():
            twin[0].weight.zero_()
        assert torch.equal(network(x), y) and not torch.equal(twin(x), y)
        assert type(restore(twin)[0]) is nn.Conv2d and not twin[0].weight.any()


# --------------------------------------------------------------------------------------- attention


def test_attention_by_dotted_name():
    network = models.ViT(dim=12, depth=2, heads=3, classes=4, image_size=8, patch=4).eval()
    x = random(5, 3, 8, 8)
    before, modules = network(x), list(network.modules())
    assert not any(name.endswith((".qk", ".av")) for name in layers.default_layers(network))
    approximate(network, {"blocks.0.attn.qk": "mul8s_1L12"}, calibration=x)
    assert assignment_of(network) == {"blocks.0.attn.qk": "mul8s_1L12"}
    qk = network.blocks[0].attn.qk
    assert isinstance(qk, layers.ApproxMatmul) and isinstance(network.blocks[1].attn.qk, layers.Matmul)
    assert not torch.equal(network(x), before)
    # The product by its law, on what attention gives it: [5, 3, T, 4] times [5, 3, 4, T], T = 1 + 2 * 2.
    a, b = random(5, 3, 5, 4), random(5, 3, 5, 4, seed=1).mT
    codes = quantise(a, qk.scale_a), quantise(b, qk.scale_b)
    table = multiplier("mul8s_1L12").table
    sums = table[codes[0].long().unsqueeze(-1) + 128, codes[1].long().unsqueeze(-3) + 128].sum(-2)
    assert torch.equal(qk(a, b), sums.float() * (qk.scale_a * qk.scale_b))
    # Training goes through it, and restoring gives back the very modules.
    network.train()(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    assert list(restore(network.eval()).modules()) == modules and torch.equal(network(x), before)
    both = {f"blocks.{i}.attn.{part}": "mul8s_1KVA" for i in (0, 1) for part in ("qk", "av")}
    approximate(network, {**both, "blocks.1.mlp.fc1": "mul8s_1L2J"}, calibration=x, gradient="smoothed")
    assert len(assignment_of(network)) == 5
    network(x).sum().backward()
    assert torch.equal(restore(network)(x), before)


# ------------------------------------------------------------------------------------------ memory

STEP = """
import sys
import torch
from axmoe_lite import approximate, models

def memory(line):
    return int(open("/proc/self/status").read().split(line)[1].split()[0])

torch.manual_seed(0)
network = models.resnet20(classes=10).train()
if sys.argv[1] != "float32":
    approximate(network, "mul8s_1L2J", calibration=torch.randn(8, 3, 32, 32), gradient=sys.argv[1])
optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

def step(n):
    optimiser.zero_grad()
    x = torch.randn(n, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    network(x).square().sum().backward()
    optimiser.step()

for _ in range(2):
    step(2)  # compiles, prepares and allocates what does not grow with the batch
open("/proc/self/clear_refs", "w").write("5")  # the peak starts at what is resident now
before = memory("VmRSS:")
for _ in range(2):
    step(64)
print(memory("VmHWM:") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux resets a process's peak")
@pytest.mark.parametrize("gradient", ["straight-through", "smoothed"])
def test_a_training_step_takes_little_more_memory_than_in_float32(gradient):
    def peak_kib(kind):
        # Large blocks go back to the system when they are freed, so that the peak is what was in use.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", STEP, kind]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    # A map of the first stage has 64 * 16 * 32 * 32 floats, 4 MiB; ResNet-20 keeps dozens of them.
    base, ours = peak_kib("float32"), peak_kib(gradient)
    print(f"\n{gradient}: {ours / 1024:.0f} MiB, float32 {base / 1024:.0f} MiB, ratio {ours / base:.2f}")
    assert base > 20 * 4096 and ours <= 1.5 * base
