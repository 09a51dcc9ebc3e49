"""A case of a gloo run, see gloo_worker.py: greedy decoding through a module planned for inference, beside the eager model."""

from __future__ import annotations

import copy

import torch
from test_inference import eager_decode, full, language_model, prefilled
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from netmind_autopar import autoparallelize
from netmind_autopar.tracer.signature import flatten


@torch.no_grad()
def decode(case: dict) -> dict[str, float]:
    """The worst relative error of the logits, whether all tokens agree, and of the cache: its error, and pieces that lie split."""
    model = language_model(case["decode"])
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
