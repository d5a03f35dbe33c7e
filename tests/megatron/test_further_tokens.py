"""Layers that predict further tokens (MTP) train as the same network written out in torch, at every cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.convert import to_hf
from tests.megatron.mixtures import mixture
from tests.megatron.tiny import config_of, gradients_of, loss_mask, rows, run_config, train, weights_of
from tests.ranks import run_ranks

STEPS = 5
SCALE = 0.1  # Megatron's weight of the added loss


class Further(nn.Module):
    """The layer of DeepSeek-V3's report, section 2.2: norms, a joining projection, a decoder layer, a norm."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        config = base.config
        self.enorm, self.hnorm, self.norm = (DeepseekV3RMSNorm(config.hidden_size) for _ in range(3))
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DeepseekV3DecoderLayer(config, layer_idx=config.num_hidden_layers)

    def forward(self, base: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Scores for the token after the next. Shapes: hidden (B, S, H), tokens (B, S) the next ones -> (B, S, V)."""
        places = torch.arange(tokens.size(1))[None]
        joined = torch.cat([self.enorm(base.model.embed_tokens(tokens)), self.hnorm(hidden)], dim=-1)
        causal = torch.full((tokens.size(1), tokens.size(1)), -torch.inf).triu(1)[None, None]
        turned = base.model.rotary_emb(hidden, places)
        out = self.layer(self.eh_proj(joined), attention_mask=causal, position_ids=places, position_embeddings=turned)
        return base.lm_head(self.norm(out[0] if isinstance(out, tuple) else out))


@pytest.fixture(scope="module")
def both() -> tuple[nn.Module, Further]:
    base = mixture("deepseek_v3")
    torch.manual_seed(11)
    further = Further(base).float()
    with torch.no_grad():
        for name, weight in further.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.05 + (1.0 if "norm" in name else 0.0))
    return base, further


def test_one_process_trains_as_written_out(both: tuple[nn.Module, Further]) -> None:
    base, further = both
    model, weights = _model(base), _weights(base, further)
    ((results, state),) = run_ranks(1, train, run_config(model, ParallelConfig()), weights, steps=range(STEPS))
    exported = dict(to_hf({0: state}, model, parallel=ParallelConfig(), form="stacked"))
    expected = _plain_loop(base, further)
    assert [r.loss for r in results] == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    assert [r.grad_norm for r in results] == pytest.approx([norm for _, norm in expected], rel=1e-4)
    for name, value in _weights(base, further).items():
        assert torch.allclose(exported[name], value, atol=1e-4), name


def _model(base: nn.Module) -> ModelConfig:
    model = config_of(base)
    assert model.moe is not None
    return replace(model, mtp_num_layers=1, moe=replace(model.moe, moe_router_bias_update_rate=0.0))


def _weights(base: nn.Module, further: Further) -> dict[str, Tensor]:
    """Names of files on the Hub, the embedding and output layer once more included; experts stacked."""
    own = f"model.layers.{base.config.num_hidden_layers}."
    names = {"norm.": "shared_head.norm.", "layer.": ""}
    weights = {name: value.detach().clone() for name, value in weights_of(base).items()}
    for name, value in further.state_dict().items():
        start = next((start for start in names if name.startswith(start)), "")
        weights[own + names.get(start, "") + name.removeprefix(start)] = value.detach().clone()
    weights[own + "embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    weights[own + "shared_head.head.weight"] = weights["lm_head.weight"]
    return weights


@pytest.mark.parametrize("layout", ["single", pytest.param("cp2", marks=pytest.mark.slow)])
def test_further_tokens_of_packed_samples_stay_inside_them(both: tuple[nn.Module, Further], layout: str) -> None:
    model = _model(both[0])
    assert model.moe is not None
    model = replace(model, moe=replace(model.moe, moe_aux_loss_coeff=0.0))  # a mean over rows, padding among them
    parallel = ParallelConfig(cp=2) if layout == "cp2" else ParallelConfig()
    alone, packed = (run_config(model, replace(where, sharding="none")) for where in (ParallelConfig(), parallel))
    tokens, lengths = rows(1)[0], (12, 20)
    parts = [tokens[:13], tokens[12:]]
    names = {"tokens": slice(0, -1), "labels": slice(1, None)}
    row = {name: torch.cat([part[cut] for part in parts])[None] for name, cut in names.items()}
    row |= {"loss_mask": torch.ones(1, 32), "cu_seqlens": torch.tensor([0, 12, 32], dtype=torch.int32)}
    row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    padded = {name: torch.stack([F.pad(x[cut], (0, 33 - len(x))) for x in parts]) for name, cut in names.items()}
    padded["position_ids"] = torch.arange(32).expand(2, 32)
    padded["loss_mask"] = torch.stack([(torch.arange(32) < length).float() for length in lengths])
    weights = _weights(*both)
    ((expected, gradients),) = run_ranks(1, gradients_of, alone, weights, [padded])
    found, own = run_ranks(parallel.world_size, gradients_of, packed, weights, [row])[0]
    assert found.mean == pytest.approx(expected.mean, abs=1e-6)
    apart = {name: float((own[name] - gradients[name]).norm()) for name in gradients}
    assert max(apart.values()) < 1e-5 * max(float(gradient.norm()) for gradient in gradients.values()), apart


def _plain_loop(base: nn.Module, further: Further) -> list[tuple[float, float]]:
    """Main losses and gradient norms with torch's AdamW; the added loss is a mean over each micro-batch of 2."""
    optim, mask = run_config(config_of(base), ParallelConfig()).optim, loss_mask()
    params = [*base.parameters(), *further.parameters()]
    decayed, rest = [p for p in params if p.dim() > 1], [p for p in params if p.dim() == 1]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    betas = (optim.beta1, optim.beta2)
    adam = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay)
    found = []
    for step in range(STEPS):
        batch = rows(step)
        tokens, labels = batch[:, :-1], batch[:, 1:]
        hidden = base.model(tokens).last_hidden_state
        main = (_losses(base.lm_head(hidden), labels) * mask).sum() / mask.sum()
        ahead = _losses(further(base, hidden, _shifted(tokens)), _shifted(labels)) * _shifted(mask)
        added = sum(
            own.sum() * seen.sum() / _shifted(seen).sum()
            for own, seen in zip(ahead.split(2), mask.split(2), strict=True)
        )
        adam.zero_grad()
        (main + SCALE * added / mask.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, optim.clip_grad)
        adam.step()
        found.append((main.item(), norm.item()))
    return found


def _losses(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.transpose(1, 2), labels, reduction="none")


def _shifted(x: Tensor) -> Tensor:
    """One place to the left, zero at the end."""
    return F.pad(x[:, 1:], (0, 1))
