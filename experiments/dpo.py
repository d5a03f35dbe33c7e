"""Direct preference optimisation (arXiv:2305.18290), as an example of a loss of one's own.

    python -m mbfn.train init.hf=DIR data=chat data.path=pairs.jsonl data.preference=pairs optim=adamw_finetune \
        loss=function loss.path=dpo.py:dpo "loss.settings=[beta:0.1]"

Rows come in pairs, the chosen answer and then the rejected one, in one micro-batch. The reference is the model that
the run starts from: a second one without gradients looks at every micro-batch first.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mbfn.config.run import RunConfig
from mbfn.errors import ConfigError
from mbfn.megatron import Loss, MicroBatch, Term, World, looking, summed, token_losses
from mbfn.train.losses import open_hf_model


def dpo(run: RunConfig, world: World, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """The loss of preference pairs; `label_smoothing` is the share of pairs taken to be the wrong way round."""
    if run.init.hf is None:
        raise ConfigError([("init.hf", "expected the model that preferences are learned against, got none")])
    reference, cp = open_hf_model(run, world, run.init.hf), world.groups.cp
    return Loss(
        function=partial(pair_term, cp=cp, beta=beta, label_smoothing=label_smoothing),
        prepare=looking(
            reference, lambda losses, batch: {"reference": answers(losses, batch, cp)}, forward=token_losses
        ),
        metrics=("accuracy", "margin"),
    )


def pair_term(losses: Tensor, batch: MicroBatch, *, cp: dist.ProcessGroup, beta: float, label_smoothing: float) -> Term:
    """The pairs of a micro-batch; context-parallel ranks count an equal share each. Shapes: losses (B, S)."""
    gained = answers(losses, batch, cp) - batch["reference"]
    margin = beta * (gained[0::2] - gained[1::2])
    lost = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    share = 1 / cp.size()
    return Term(
        total=lost.sum() * share,
        weight=losses.new_tensor(len(margin) * share),
        metrics={"accuracy": (margin > 0).sum() * share, "margin": margin.detach().sum() * share},
    )


def answers(losses: Tensor, batch: MicroBatch, cp: dist.ProcessGroup) -> Tensor:
    """The log-probability of each row's trained tokens, wherever they lie. Shapes: losses (B, S) -> (B,)."""
    return -summed((losses.float() * (batch["loss_mask"] > 0)).sum(1), cp)
