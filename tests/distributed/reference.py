"""The same training by a plain loop, which every mesh must equal.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from dayzero.config import Method, Train
from dayzero.engine.model import build_model

from tests.distributed.trainers import EPS, LR, batches_of, seed_of, settings, source_of, teacher_of


def reference(job: dict[str, Any]) -> dict[str, Any]:
    """The same training by a plain loop: one process, all logits, one mean over the whole batch, no engine code but
    the model's construction and the loader."""
    train, method = settings(job)
    source = source_of(job)
    model = build_model(source, source.config(), method, seed=seed_of(job), meta=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    embeddings = {id(model.get_input_embeddings().weight)}
    groups = [
        {"params": [p for p in parameters if p.ndim > 1 and id(p) not in embeddings], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2 or id(p) in embeddings], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=EPS, foreach=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    teacher = teacher_of(job)
    if teacher is not None:
        teacher = build_model(teacher, teacher.config(), Method(name="none"), seed=0, meta=False).eval()
    losses, norms, router_losses, kls = [], [], [], []
    coefficient = train.router_aux_loss_coef
    whole = Train(**{**train.model_dump(), "local_batch_size": train.global_batch_size})
    batches = batches_of(job, whole, 0, 0, 1)
    decay = batches.num_steps - 2
    for batch in batches:
        step = batch.step + 1
        lr = LR * (step / 2 if step <= 2 else 0.5 * (1 + math.cos(math.pi * (step - 3) / decay)))
        for group in groups:
            group["lr"] = lr
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        (micro,) = batch.micro_batches
        logits = model(input_ids=micro["input_ids"], position_ids=micro["position_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), micro["labels"].flatten(), ignore_index=-100)
        if train.z_loss:
            supervised = logits[micro["labels"] != -100]
            loss = loss + train.z_loss * supervised.exp().sum(-1).log().square().mean()
        if teacher is not None:
            kd, supervised = method.kd, micro["labels"] != -100
            with torch.no_grad():
                taught = teacher(input_ids=micro["input_ids"], position_ids=micro["position_ids"], use_cache=False)
            p, q = ((x[supervised].double() / kd.temperature).softmax(-1) for x in (taught.logits, logits))
            kls.append((kd.temperature**2 * (p * (p / q).log()).sum(-1).mean()).item())
            loss = loss + kd.weight * kd.temperature**2 * (p * (p / q).log()).sum(-1).mean()
        if coefficient:
            router_loss = plain_router_loss(model, micro)
            router_losses.append(router_loss.item())
            loss = loss + coefficient * router_loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if train.ema:
            for name, parameter in model.named_parameters():
                if name in averages:
                    averages[name] = train.ema.decay * averages[name] + (1 - train.ema.decay) * parameter.detach()
    return {
        "kls": kls,
        "averages": {k: t.detach() for k, t in averages.items()} if train.ema else {},
        "losses": losses,
        "grad_norms": norms,
        "router_losses": router_losses,
        "before": before,
        "weights": dict(model.state_dict()),
    }


def plain_router_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' own load balancing loss of each row alone, without padding, averaged over the rows."""
    row_losses = []
    for b, length in enumerate(batch["lengths"].tolist()):
        if not length:
            continue
        row = {name: batch[name][b : b + 1, :length] for name in ("input_ids", "position_ids")}
        row_losses.append(model(**row, use_cache=False, output_router_logits=True).aux_loss)
    return torch.stack(row_losses).mean()
