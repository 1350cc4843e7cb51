"""The benchmarks' contenders still run: a release that renames something would otherwise cost the row of its peer."""

import os
from pathlib import Path

import pytest
import torch

from tests.benchmarks import checkpoints, moshi_peer, ours_int8, transformers_peer
from tests.benchmarks.tasks import INT8, TASKS

PEERS = {"moshi": moshi_peer, "transformers": transformers_peer}  # rustymimi reads the published size only
OURS = {INT8: ours_int8}  # the code of float32, and one more step
# What transcribes takes minutes, and test_stt calls the same.
SHORT = {name: task for name, task in TASKS.items() if name != "transcribe_45s"}
RUNS = [(name, peer) for name, task in SHORT.items() for peer in task.contenders if peer in PEERS]
RUNS += [(name, INT8) for name, task in SHORT.items() if INT8 in task.contenders and name.endswith("_b1")]


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


@pytest.mark.parametrize("task, contender", RUNS)
def test_a_contender_takes_two_steps(task: str, contender: str, folder: Path):
    step = (PEERS | OURS)[contender].make(task, folder, os.cpu_count() or 1, True)
    step()
    step()
