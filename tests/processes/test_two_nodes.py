"""Two machines, each a network of its own: torchrun trains over both, and one of them is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from forked import peftlight
from processes.ranks import fit, trouble

pytestmark = pytest.mark.slow


class Node:
    """A network namespace with one end of the cable between two of them, and a host name."""

    def __init__(self, number: int) -> None:
        self.number, self.space = number, f"peftlight-{os.getpid()}-{number}"
        self.cable, self.address = f"pl{os.getpid()}-{number}", f"10.77.0.{number + 1}"

    def torchrun(self, arguments: list[str], folder: Path, count: int = 1) -> None:
        """Start this node's half of a training with so many processes on each."""
        meeting = ["--nnodes", "2", "--node-rank", str(self.number), "--nproc-per-node", str(count),
                   "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500", "--local-addr", self.address,
                   "--rdzv-conf", f"is_host={1 - self.number},join_timeout=300"]  # fmt: skip
        named = ["unshare", "--uts", "sh", "-c", f'hostname node-{self.number}; exec "$@"', "sh"]
        command = ["ip", "netns", "exec", self.space, *named, sys.executable, "-W", "ignore", "-m",
                   "torch.distributed.run", *meeting, "-m", "peftlight", *arguments]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "PYTHONFAULTHANDLER": "1",
                       "GLOO_SOCKET_IFNAME": self.cable}  # fmt: skip
        self.output = folder / f"{self.space}.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)

    def said(self) -> str:
        """What its processes have said."""
        return self.output.read_text()

    def lose(self, by: int = signal.SIGKILL) -> None:
        """Kill everything that runs there."""
        for process in ip("netns", "pids", self.space).split():
            os.kill(int(process), by)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    both = [Node(0), Node(1)]
    try:
        for node in both:
            ip("netns", "add", node.space)
        ip("link", "add", both[0].cable, "netns", both[0].space,
           "type", "veth", "peer", "name", both[1].cable, "netns", both[1].space)  # fmt: skip
        for node in both:
            ip("-n", node.space, "addr", "add", f"{node.address}/24", "dev", node.cable)
            for device in ("lo", node.cable):
                ip("-n", node.space, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr}")
    else:
        yield both
    finally:
        for node in both:
            if node.space in ip("netns", "list").split():
                node.lose()
                ip("netns", "delete", node.space)
            if hasattr(node, "process"):
                node.process.wait()


def test_one_node_is_lost_and_the_run_goes_on_to_what_one_process_gets(
    nodes: list[Node], tmp_path: Path, encoder: Path
) -> None:
    settings: dict[str, object] = {"model.strategy.dropout": 0, "trainer.max_epochs": 2, "optimizer.lr": 0.01}
    alone = tmp_path / "alone"
    code, said = peftlight(fit(alone, encoder, **settings | {"data.batch_size": 4}), alone)
    assert code == 0, said

    arguments = [*fit(tmp_path, encoder, **settings), *trouble("step", 1, "once", at=8), "--trainer.num_nodes=2"]
    for node in nodes:
        node.torchrun(arguments, tmp_path)
    wait_for((tmp_path / "when").exists, nodes)
    nodes[1].lose()
    lost = time.monotonic()
    assert ended(nodes) == [1, -signal.SIGKILL], nodes[0].said()
    assert time.monotonic() - lost < 60
    said = nodes[0].said()
    assert "peftlight: error: process 1 on node-1 is gone without a word" in said
    assert "2 rows each" not in said
    assert "4 rows each (2 x 1 accumulated x 2 processes on 2 machines)" in said
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "run.json").read_text())["state"] == "failed"

    for node in nodes:
        node.torchrun(["fit", "--resume", str(run)], tmp_path)
    assert ended(nodes) == [0, 0], [node.said() for node in nodes]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]
    (reference,) = (alone / "runs").iterdir()
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (reference, run))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    assert any(tensor.abs().max() > 1e-3 for name, tensor in one.items() if "lora_B" in name)


@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_before_all_have_met_ends_both_nodes_with_its_text(
    failing: int, nodes: list[Node], tmp_path: Path, encoder: Path
) -> None:
    """Of processes 0 and 1 on the first node, 2 and 3 on the second."""
    arguments = [*fit(tmp_path, encoder), *trouble("start", failing), "--trainer.num_nodes=2", "--trainer.devices=2"]
    for node in nodes:
        node.torchrun(arguments, tmp_path, count=2)
    assert ended(nodes) == [1, 1]
    here, there = (nodes[failing // 2].said(), nodes[1 - failing // 2].said())
    assert here.count("peftlight: error: the start went wrong\n") == 1, here
    failure = f"process {failing} on node-{failing // 2} failed, and with it the whole run: the start went wrong\n"
    assert failure not in here
    assert f"peftlight: error: {failure}" in there, there
    assert "exitcode  : 2" in there
    assert not list((tmp_path / "runs").glob("*"))


def test_a_signal_ends_a_node_that_waits_for_the_other(nodes: list[Node], tmp_path: Path, encoder: Path) -> None:
    for node in nodes:
        node.torchrun([*fit(tmp_path, encoder), *trouble("start", 1, "once"), "--trainer.num_nodes=2"], tmp_path)
    wait_for(lambda: "Initializing distributed" in nodes[0].said(), nodes)
    time.sleep(1)  # it is in torch by now
    signalled = time.monotonic()
    nodes[0].process.send_signal(signal.SIGTERM)
    nodes[0].process.wait(timeout=300)
    assert time.monotonic() - signalled < 25  # after 30 s torchrun kills
    nodes[1].lose()
    assert "peftlight: ended by SIGTERM, before all processes had come" in nodes[0].said()
    assert not list((tmp_path / "runs").glob("*"))


def wait_for(condition: Callable[[], bool], nodes: list[Node]) -> None:
    """Until it holds, while both nodes run."""
    until = time.monotonic() + 300
    while not condition():
        assert [node.process.poll() for node in nodes] == [None, None], [node.said() for node in nodes]
        assert time.monotonic() < until
        time.sleep(0.1)


def ended(nodes: list[Node]) -> list[int]:
    """The exit codes of both nodes."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        codes = [node.process.poll() for node in nodes]
        if None not in codes:
            return [code for code in codes if code is not None]
        time.sleep(0.1)
    for node in nodes:
        node.lose(signal.SIGABRT)  # each Python says where it was
    time.sleep(5)
    pytest.fail("\n\n".join(node.said() for node in nodes))
