"""A model pretrained here learns to talk like a sailor through LoRA, as a user would have it, and PEFT hears it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mbfn.storage import open_hf
from tests.data.families import BY_NAME, build_tokenizer
from tests.train.command import SMALL, records, train

CHATS = Path(__file__).parent / "chats.jsonl"
BATCH = ("train.seq_length=96", "train.global_batch_size=16", "train.micro_batch_size=16", "log.sample_prompt=")


@pytest.mark.slow
def test_lora_on_conversations_from_pretraining_to_generation_in_peft(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(BY_NAME["qwen25"], tmp_path / "tokenizer")
    fields = (*BATCH, f"data.tokenizer={tokenizer}")
    train(tmp_path / "base", *SMALL, *fields, "train.steps=150", "train.eval_interval=50")
    base = tmp_path / "base" / "hf"
    before = {name: tensor.clone() for name, tensor in open_hf(base).items()}
    tuned = ("data=chat", f"data.path={CHATS}", "data.valid_fraction=0.125", f"init.hf={base}", "peft=lora_canonical")
    said = train(
        tmp_path / "lora", *fields, *tuned, "peft.rank=16", "train.steps=60", "optim.lr=0.01", "train.eval_interval=5"
    )
    assert "adapters for PEFT" in said
    held_out = [record["valid_loss"] for record in records(tmp_path / "lora") if "valid_loss" in record]
    assert held_out[-1] < 0.7 * held_out[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in open_hf(base).items())
    words = AutoTokenizer.from_pretrained(tokenizer)
    question = [{"role": "user", "content": "What do you know of the bottle?"}]  # of no conversation
    asked = words.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    frozen = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    talks = [_answer(frozen, asked, words)]
    adapted = PeftModel.from_pretrained(frozen, tmp_path / "lora" / "adapter").eval()
    talks.append(_answer(adapted, asked, words))
    assert not talks[0].startswith("Ahoy"), talks
    assert talks[1].startswith("Ahoy, captain, the "), talks
    assert json.loads((tmp_path / "lora" / "adapter" / "adapter_config.json").read_text())["r"] == 16


def _answer(model: torch.nn.Module, asked: dict, words: AutoTokenizer) -> str:
    with torch.inference_mode():
        made = model.generate(**asked, max_new_tokens=40, do_sample=False, pad_token_id=0)
    return words.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
