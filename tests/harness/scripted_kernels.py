"""A table of kernels for `hotloop tune` whose times are given, and which fault and hang where they are told to.

Read by the processes that the command starts; what they run is noted in the file TRACE.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import torch

from hotloop.harness.tuning.configurations import Candidate, Config
from hotloop.kernels.compiling import Launch

RATIOS = {1: 0.8, 2: 1.3, 3: 1.1, 4: 9.0, 5: 9.0, 6: 9.0, 7: 0.9}  # 4 faults, 5 hangs, 6 is wrong


class Scripted(Candidate):
    def run(self, config: Config) -> list[torch.Tensor]:
        with open(os.environ["TRACE"], "a") as f:
            f.write(f"{self.name} {config['SIZE']}\n")
        if config["SIZE"] == 4:
            print("CUDA error: an illegal memory access was encountered", flush=True)
            os._exit(1)
        if config["SIZE"] == 5:
            time.sleep(600)
        return [torch.full((4,), 2.0 if config["SIZE"] == 6 else 1.0)]

    def launches(self, config: Config) -> list[Launch]:
        return []

    def round(self, config: Config) -> float:
        time.sleep(float(os.environ.get("ROUND_S", "0")))
        return RATIOS[config["SIZE"]]


def _of(name: str, *keys: str, without: tuple[int, ...] = ()) -> Iterator[Candidate]:
    for key in keys:
        yield Scripted(name, key, {"SIZE": 0}, [{"SIZE": i} for i in RATIOS if i not in without], lambda: [])


KERNELS = {"fatal": lambda: _of("fatal", "all"), "tame": lambda: _of("tame", "small", "large", without=(4, 5))}
