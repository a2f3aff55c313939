"""What `--trial` puts in the place of a GPU, so that a command's whole way runs on a CPU: it measures nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hotloop.harness.tuning.configurations import Candidate, Card, Config
from hotloop.kernels import tuning
from hotloop.kernels.compiling import Launch, recorded, without_driver
from hotloop.kernels.optimizer import muon

__all__ = ["KERNELS"]


class _Scripted(Candidate):
    """Compiles for real, as for an H100; answers and times are made up: the largest tile is the fastest."""

    def run(self, config: Config) -> list[torch.Tensor]:
        return [torch.ones(4)]

    def launches(self, config: Config) -> list[Launch]:
        without_driver(Card.here().capability)
        with tuning.trial(self.kernel, config), recorded() as found:
            self.work()
        return found

    def round(self, config: Config) -> float:
        return 1.0 + (config["TILE"] - self.default["TILE"]) / 512


def _muon() -> Iterator[Candidate]:
    y = torch.zeros(2, 128, 128, dtype=torch.bfloat16)
    space = [{"TILE": tile, "DEPTH": 32, "num_warps": 4, "num_stages": 3} for tile in (32, 64)]
    yield _Scripted("muon_product", "trial", space[0], space, lambda: [muon.product(y, None)])


KERNELS = {"muon_product": _muon}
