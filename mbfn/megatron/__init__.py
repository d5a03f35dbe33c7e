"""Megatron-core behind values: groups, layer specs, models, optimizer steps, checkpoints. The only importer of it."""

from mbfn.megatron import bootstrap  # first: before every module that imports megatron-core
from mbfn.megatron.build import build, build_model, state_dict
from mbfn.megatron.checkpoint import load, load_model, save
from mbfn.megatron.forward import generate, logits
from mbfn.megatron.meta import meta_states
from mbfn.megatron.optimizer import Models
from mbfn.megatron.step import StepResult, eval_step, train_step
from mbfn.megatron.weights import chunk_tensors
from mbfn.megatron.world import World, open_world

__all__ = [
    "Models",
    "StepResult",
    "World",
    "bootstrap",
    "build",
    "build_model",
    "chunk_tensors",
    "eval_step",
    "generate",
    "load",
    "load_model",
    "logits",
    "meta_states",
    "open_world",
    "save",
    "state_dict",
    "train_step",
]
