"""Our side of `training_step.py`, in its own process to measure memory; the counterpart of `torch_training.py`.

Compiler and allocator have the settings of `flax-qformer train`. With the third argument "scan", layers are scanned.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

import flax_qformer as fq
from flax_qformer.checkpoints.loading import initialise
from flax_qformer.compilation import compiler_options, kept_memory, share_heap
from flax_qformer.training import TrainState, make_optimizer, make_train_step


def main() -> None:
    share_heap()
    model, params = initialise(sys.argv[1], fq.Blip2ForPreTraining)
    with np.load(sys.argv[2]) as file:
        batch = jax.device_put(dict(file))
    optimizer = make_optimizer(model.config, 1e-4, clip_norm=0.0)
    if sys.argv[3:] == ["scan"]:
        model, params = model.clone(config=dataclasses.replace(model.config, scan_layers=True)), fq.stack_layers(params)
    state = TrainState.create(params, optimizer)
    del params
    with kept_memory():  # whose end returns to the system what compiling leaves
        step = make_train_step(model, optimizer, compiler_options=compiler_options()).lower(state, batch).compile()
    with kept_memory():
        for _ in sys.stdin:
            Path("/proc/self/clear_refs").write_text("5")
            start = time.perf_counter()
            state, metrics = step(state, batch)
            loss = float(metrics["loss"])
            jax.block_until_ready(state)
            took = time.perf_counter() - start
            peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
            print(json.dumps({"seconds": took, "memory": peak, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
