"""A real pipeline of processes: the same answers in every bit, and nothing left behind when a worker fails."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from axmoe_lite import models
from axmoe_lite.search.pipeit import Span, chain, links, parallel, run, seams, split, workers

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
ONE, OTHER = CORES[0], CORES[-1]


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process, no memory with a name, no thread, no number of threads changed."""
    memory = Path("/dev/shm")
    before = (set(memory.iterdir()) if memory.exists() else set(), threading.active_count(), torch.get_num_threads())
    yield
    after = (set(memory.iterdir()) if memory.exists() else set(), threading.active_count(), torch.get_num_threads())
    assert not {path for path in after[0] - before[0] if path.name.startswith("torch")}
    assert after[1:] == before[1:] and multiprocessing.active_children() == []
    assert not workers_of_ours()


def workers_of_ours():
    """Processes that were started by this one, or by the server of processes that it has; zombies too."""
    parents, commands = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            parent = next(line for line in status.read_text().splitlines() if line.startswith("PPid"))
            pid = int(status.parent.name)
            parents[pid], commands[pid] = int(parent.split()[1]), status.with_name("cmdline").read_bytes()
    children = {pid for pid, parent in parents.items() if parent == os.getpid()}
    server = {pid for pid in children if b"multiprocessing.forkserver" in commands[pid]}
    tracker = {pid for pid in children if b"resource_tracker" in commands[pid]}
    return (children - server - tracker) | {pid for pid, parent in parents.items() if parent in server}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class InWorker(nn.Module):
    """Does something to a worker that computes a certain image; nothing in the process that only rehearses."""

    def __init__(self, what, at=0.0):
        super().__init__()
        self.what, self.at = what, at

    def forward(self, x):
        if multiprocessing.parent_process() is not None and (x[:, 0] == self.at).any():
            if self.what == "raise":
                raise LookupError("this image is not for me")
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "sleep":
                time.sleep(3600)
            if self.what == "where":
                cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
                return torch.tensor([[len(cores), min(cores), torch.get_num_threads()]]).expand(len(x), -1)
        return x.new_zeros(len(x), 3, dtype=torch.int64) if self.what == "where" else x


# ------------------------------------------------------------------------------ values between processes


def there_and_back(values):
    """Through a slot whose bytes were something else before."""
    note, size = links.pack(values)
    memory = torch.full((size,), 255, dtype=torch.uint8)
    assert links.pack(values, memory) == (note, size)
    return links._unpack(note, memory, [])


def test_a_tensor_keeps_its_strides():
    x = some(2, 3, 4, 5)
    for value in (
        x,
        x.to(memory_format=torch.channels_last),
        x[:, 1:, ::2],
        x.permute(3, 0, 2, 1),
        x[:, :1].expand(2, 7, 4, 5),
        x[0, 0, 0, 0],
        x[:0],
        x > 0,
        (x * 100).to(torch.int64),
        x.to(torch.bfloat16)[:, 0],
    ):
        (got,) = there_and_back((value,))
        assert torch.equal(got, value) and got.dtype == value.dtype and got.stride() == value.stride()
        assert got.data_ptr() != value.data_ptr() or not value.numel()
    windows = x.flatten().unfold(0, 3, 1)  # each number lies in three of them: no strides without gaps or repeats
    (got,) = there_and_back((windows,))
    assert torch.equal(got, windows) and got.is_contiguous()


def test_what_travels_can_be_nested_and_one_tensor_stays_one():
    x, y = some(3, 5), some(2)
    got = there_and_back((x, 7, [y, (x, None)], x.T, torch.Size([3]), "text"))
    assert torch.equal(got[0], x) and got[1] == 7 and torch.equal(got[2][0], y) and got[2][1][1] is None
    assert got[2][1][0] is got[0] and got[3].data_ptr() != got[0].data_ptr()
    assert got[4:] == (torch.Size([3]), "text") and isinstance(got[4], torch.Size) and isinstance(got[2], list)


def test_tensors_are_aligned_and_slots_are_freed():
    sender, receiver = links.link(size=200, slots=2)
    sender.send((some(3), some(5, seed=1)))
    sender.send((some(3, seed=2),))
    slot, (a, b) = receiver.receive()
    assert (slot, a.data_ptr() % 64, b.data_ptr() % 64, b.data_ptr() - a.data_ptr()) == (0, 0, 0, 64)
    (later := threading.Timer(0.05, receiver.free, [slot])).start()
    sender.send((some(3, seed=3),))  # waits for the slot, and writes into it
    later.join()
    assert torch.equal(a, some(3, seed=3))
    assert [receiver.receive()[0] for _ in range(2)] == [1, 0]
    with pytest.raises(ValueError, match=r"shape \[9, 9\] ends at byte 324; there is room for 256"):
        receiver.free(1)
        sender.send((some(9, 9),))
    sender.close()
    receiver.free(0)  # nobody there to take it
    with pytest.raises(links.Gone):
        receiver.receive()
    receiver.close()


# ------------------------------------------------------------------------------ pipelines


def test_a_pipeline_answers_like_the_network(one_thread):
    """Three stages, with residuals that skip one; 11 images in batches of 4, 4 and 3; one may wait between stages."""
    network, images = models.resnet8(classes=5, width=0.5, shortcut="pad"), some(11, 3, 16, 16)
    kept = images.clone()
    stages = split(network, images[:4], [0, 2, 4, 8])
    assert any(node.op == "output" and len(node.args[0]) == 2 for node in stages[0].graph.nodes), "a residual"
    ran = run(stages, images, cores=[[ONE], [OTHER], [ONE]], batch=4, queue=1, warm_up=2)
    with torch.no_grad():
        alone = torch.cat([network.eval()(part) for part in images.split(4)])
        assert torch.equal(ran.answers, alone) and torch.equal(images, kept)
    assert not ran.answers.is_shared() and ran.pinned == hasattr(os, "sched_setaffinity")
    assert [(s.stage, s.batch) for s in ran.spans] == [(stage, batch) for stage in range(3) for batch in range(3)]
    at = {(s.stage, s.batch): s for s in ran.spans}
    assert all(0 <= s.start_s <= s.end_s <= min(s.sent_s, ran.seconds) for s in ran.spans)
    for stage, batch in at:
        if stage:
            assert at[stage, batch].start_s >= at[stage - 1, batch].end_s, "nothing is computed before it is there"
        if batch:
            assert at[stage, batch].start_s >= at[stage, batch - 1].sent_s, "one batch after the other"
        if batch >= 2 and stage < 2:  # two slots: the one that is written and the one that waits or is read
            assert at[stage, batch].sent_s >= at[stage + 1, batch - 2].sent_s, "a queue of one"
    # Seven images after the first batch, between the last stage's first answer and its last.
    assert ran.images_per_s == pytest.approx(7 / (at[2, 2].sent_s - at[2, 0].sent_s))
    assert ran.seconds == at[2, 2].sent_s and min(s.start_s for s in ran.spans) == at[0, 0].start_s == 0


def test_the_same_cores_without_a_pipeline(one_thread):
    network, images = models.vit_small(classes=5, image_size=16, patch=8, width=0.125), some(10, 3, 16, 16)
    ran = parallel(network, images, cores=[[ONE], [OTHER]], batch=3, warm_up=0)
    with torch.no_grad():
        assert torch.equal(ran.answers, torch.cat([network.eval()(part) for part in images.split(3)]))
    assert sorted(s.batch for s in ran.spans) == [0, 1, 2, 3] and {s.stage for s in ran.spans} <= {0, 1}
    assert ran.images_per_s == pytest.approx(10 / ran.seconds)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_workers_are_bound_to_their_cores():
    for own in ([OTHER], sorted({ONE, OTHER})):
        ran = run([InWorker("where")], torch.zeros(3, 2), cores=[own], batch=2, warm_up=0)
        assert ran.answers.tolist() == [[len(own), own[0], len(own)]] * 3


# ------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise", r"^Stage 1 of 0..2 failed: LookupError: this image is not for me\n(.|\n)*Traceback"),
        ("die", r"^Stage 1 of 0..2 was ended by SIGKILL while running"),
    ],
)
def test_one_that_fails_ends_all(what, message):
    """At image 50 of 100,000: the stages before and after must not wait for ever, nor go on without it."""
    stages = [nn.Identity(), InWorker(what, at=50.0), nn.Identity()]
    images = torch.arange(100_000.0)[:, None].expand(-1, 2)
    with pytest.raises(RuntimeError, match=message):
        run(stages, images, cores=[[ONE]] * 3, warm_up=1)


def test_time_can_be_limited():
    with pytest.raises(TimeoutError, match=r"timeout_s is over \(Worker 0: \w+\)"):
        parallel(InWorker("sleep"), torch.zeros(3, 2), cores=[[ONE]], timeout_s=0.01)


def test_interrupting_ends_all(monkeypatch):
    """Ctrl-C while the workers start."""

    def interrupted(connections, timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parallel(nn.Identity(), torch.zeros(3, 2), cores=[[ONE]])


def test_errors_come_before_any_process(monkeypatch):
    monkeypatch.setattr(workers, "_all", lambda *_: pytest.fail("a process was started"))
    x, two = some(5, 2), [nn.Linear(2, 3), nn.Linear(3, 4)]

    class Local(nn.Module):
        def forward(self, x):
            return x

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    def go(stages=two, images=x, cores=([ONE], [ONE]), **options):
        return run(stages, images, cores=cores, **options)

    for message, call in {
        "at least one stage, and each must be an nn.Module": lambda: go([]),
        "each must be an nn.Module, as split": lambda: go([torch.relu, torch.relu]),
        "There are 2 stages and 1 lists of cores": lambda: go(cores=[[ONE]]),
        rf"cores has \[4096\] for one process; it takes at least one of \[{CORES[0]}": lambda: go(
            cores=[[ONE], [4096]]
        ),
        r"cores has \[\] for one process": lambda: go(cores=[[ONE], []]),
        rf"cores has \[{ONE}, {ONE}\] for one process": lambda: go(cores=[[ONE], [ONE, ONE]]),
        "cores is empty": lambda: parallel(two[0], x, cores=[]),
        "batch is 0; it is at least 1": lambda: go(batch=0),
        "queue is 0; at least 1 batch": lambda: go(queue=0),
        "warm_up is -1; it is at least 0": lambda: go(warm_up=-1),
        "timeout_s is 0; it is a number of seconds above 0": lambda: go(timeout_s=0),
        r"images is \[0, 2\] on cpu; it must be": lambda: go(images=x[:0]),
        "images is list; it must be": lambda: go(images=[1]),
        "Stage 1 of 2 failed on the first 1 images, before any process was started: RuntimeError": (
            lambda: go([nn.Linear(2, 3), nn.Linear(2, 4)])
        ),
        # The rest of two images is tried too.
        "Stage 0 of 1 failed on the first 2 images": lambda: go([nn.Unflatten(0, (3, 1))], cores=[[ONE]], batch=3),
        r"The last stage gives a tuple for 1 images; it must give a tensor \[1": lambda: go([Pair()], cores=[[ONE]]),
        r"The last stage gives a tensor \[4\] for 2 images": lambda: go([nn.Flatten(0)], cores=[[ONE]], batch=2),
        "Stage 0 cannot be sent to another process: .*Local": lambda: go([Local(), Local()]),
        "The model cannot be sent to another process: .*Local": lambda: parallel(Local(), x, cores=[[ONE]]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_system_that_cannot_bind_says_so(monkeypatch):
    monkeypatch.setattr(workers, "_can_pin", lambda: False)
    monkeypatch.setattr(workers, "_all", lambda *_: [Span(0, 0, 0.0, 1.0, 2.0)])
    with pytest.warns(UserWarning, match="does not bind processes to cores"):
        ran = run([nn.Identity()], some(4, 2), cores=[[0]], batch=4)
    assert not ran.pinned and ran.images_per_s == 2


def test_stages_take_turns_where_cores_are_few_in_this_process_too():
    """What a reader can do without processes: the same stages, one after the other."""
    network, x = models.resnet8(classes=5, width=0.25), some(2, 3, 16, 16)
    stages = split(network, x, seams(network, x))
    assert len(stages) == 8 and torch.equal(chain(stages, x), network.eval()(x))
