"""Megatron-core behind values: groups, layer specs, models, optimizer steps, checkpoints. The only importer of it."""

from mbfn.megatron import bootstrap  # first: before every module that imports megatron-core
from mbfn.megatron.build import build, build_model, empty_model, state_dict
from mbfn.megatron.checkpoint import begin_save, load, load_model, save
from mbfn.megatron.decode import Sampling, continuation, generate
from mbfn.megatron.distill import Distillation, distillation
from mbfn.megatron.forward import logits
from mbfn.megatron.frozen import Frozen, looking, open_frozen
from mbfn.megatron.losses import Loss, MicroBatch, Term, scores, summed, token_losses
from mbfn.megatron.meta import meta_states
from mbfn.megatron.optimizer import Models
from mbfn.megatron.saver import Saver
from mbfn.megatron.step import StepResult, eval_step, train_step
from mbfn.megatron.weights import chunk_tensors, device_weights
from mbfn.megatron.world import World, open_world

__all__ = [
    "Distillation",
    "Frozen",
    "Loss",
    "MicroBatch",
    "Models",
    "Sampling",
    "Saver",
    "StepResult",
    "Term",
    "World",
    "begin_save",
    "bootstrap",
    "build",
    "build_model",
    "chunk_tensors",
    "continuation",
    "device_weights",
    "distillation",
    "empty_model",
    "eval_step",
    "generate",
    "load",
    "load_model",
    "logits",
    "looking",
    "meta_states",
    "open_frozen",
    "open_world",
    "save",
    "scores",
    "state_dict",
    "summed",
    "token_losses",
    "train_step",
]
