"""The benchmarks' peers still run: a release that renames something would otherwise cost the row that it stands in."""

import os
from pathlib import Path

import pytest
import torch

from tests.benchmarks import checkpoints, moshi_peer, transformers_peer
from tests.benchmarks.tasks import TASKS

PEERS = {"moshi": moshi_peer, "transformers": transformers_peer}  # rustymimi reads the published size only
# What transcribes takes minutes, and test_stt calls the same.
SHORT = {name: task for name, task in TASKS.items() if name != "transcribe_45s"}
RUNS = [(name, peer) for name, task in SHORT.items() for peer in task.contenders if peer in PEERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("benchmarks")
    checkpoints.make(made, tiny=True)
    return made


@pytest.fixture(autouse=True)
def torch_as_it_was():
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_grad_enabled(gradients)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("task, peer", RUNS)
def test_a_peer_takes_two_steps(task: str, peer: str, folder: Path):
    step = PEERS[peer].make(task, folder, os.cpu_count() or 1, True)
    step()
    step()
