"""One process of a gloo run: greedy decoding through a module planned for inference, beside the eager model.

Started by `tests/test_gloo_decode.py` as `python gloo_decode.py RANK WORLD STORE OUT CASES`, as gloo_worker.py is.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))

from test_inference import eager_decode, full, language_model, prefilled

from netmind_autopar import autoparallelize
from netmind_autopar.tracer.signature import flatten


@torch.no_grad()
def decode(case: dict) -> dict[str, float]:
    """The worst relative error of the logits, whether all tokens agree, and of the cache: its error, and pieces that lie split."""
    model = language_model(case["model"])
    eager = eager_decode(model, "static")
    token, cache = prefilled(model, "static")
    sizes = tuple(case["mesh"])
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple("abc"[: len(sizes)]))
    inputs = {"input_ids": token, "past_key_values": cache}
    pm = autoparallelize(model, inputs, mesh, mode="inference", inputs=case["inputs"], random_costs=case["random_costs"])
    truth = copy.deepcopy(cache)
    worst, tokens = 0.0, 1.0
    given = {"input_ids": token, "past_key_values": cache}
    if case["inputs"] == "local":
        _, given = pm.shard_inputs(**given)
    for _, logits in eager:
        result = pm(**given)
        have = full(result.logits)
        model(input_ids=token, past_key_values=truth)
        worst = max(worst, float((have - logits).abs().max() / logits.abs().max()))
        token = have[:, -1].argmax(-1, keepdim=True)
        tokens = min(tokens, float(torch.equal(token, logits[:, -1].argmax(-1, keepdim=True))))
        if case["inputs"] == "local":
            assert all(a is b for (_, a), (_, b) in zip(leaves(result.past_key_values), leaves(given["past_key_values"]), strict=True))
            _, given = pm.shard_inputs(input_ids=token, past_key_values=result.past_key_values)
        else:  # the caller's own tensors are written into
            given = {"input_ids": token, "past_key_values": cache}
    pairs = zip(leaves(given["past_key_values"]), leaves(truth), strict=True)
    error = max(float((full(a) - b).abs().max() / b.abs().max()) for (_, a), (_, b) in pairs)
    split = sum(isinstance(t, DTensor) and t._local_tensor.numel() < t.numel() for _, t in leaves(given["past_key_values"]))
    return {"logits": worst, "cache": error, "tokens": tokens, "split": split}


def leaves(cache: object) -> list[tuple[str, torch.Tensor]]:
    return flatten(cache)[1]


def main() -> None:
    rank, world, store, out, cases = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), json.loads(sys.argv[5])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    results = []
    for case in cases:
        try:
            results.append(decode(case))
        except Exception:
            results.append({"error": traceback.format_exc()})
            break
    if rank == 0 or "error" in results[-1]:
        out.with_suffix(f".{rank}").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
