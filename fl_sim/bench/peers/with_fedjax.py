"""FedJAX on a workload of dense layers: python with_fedjax.py FOLDER. Its `jit` backend, in one process."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import fedjax
import jax
import jax.numpy as jnp
import numpy as np


def logits(layers: list[list[object]], params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """Outputs of a network of linear layers and ReLU; parameters as PyTorch names and shapes them."""
    outputs = inputs.reshape(len(inputs), -1)
    for number, (kind, *_) in enumerate(layers):
        if kind == "Linear":
            outputs = outputs @ params[f"{number}.weight"].T + params[f"{number}.bias"]
        elif kind == "ReLU":
            outputs = jnp.maximum(outputs, 0)
        elif kind != "Flatten":
            raise ValueError(f"layer {kind!r}: allowed: Linear, ReLU, Flatten")
    return outputs


def main(place: Path) -> None:
    """Run the rounds."""
    work, data = json.loads((place / "work.json").read_text()), np.load(place / "data.npz")
    inputs, targets = data["inputs"], data["targets"].astype(np.int32)

    def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array], rng: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(logits(work["layers"], params, batch["x"]))
        return -jnp.mean(jnp.take_along_axis(scores, batch["y"][:, None], axis=1))

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.sgd(work["lr"]),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=work["batch"], skip_shuffle=True),
    )
    clients = [
        (str(user).encode(), fedjax.ClientDataset({"x": inputs[user], "y": targets[user]}), jax.random.PRNGKey(user))
        for user in range(len(inputs))
    ]
    state = algorithm.init({name: jnp.asarray(value) for name, value in np.load(place / "initial.npz").items()})
    for number in range(work["warmup"] + work["rounds"]):
        cohort = [clients[(number * work["cohort"] + i) % len(clients)] for i in range(work["cohort"])]
        start = time.perf_counter()
        state, trained = algorithm.apply(state, cohort)
        jax.block_until_ready(state.params)
        print("ROUND", json.dumps({"fits": len(trained), "seconds": time.perf_counter() - start}), flush=True)
    np.savez(place / "answer.npz", **{name: np.asarray(value) for name, value in state.params.items()})  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
