"""python -m mbfn.generate: the same text from every form of a model, at every layout, and every mistake in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mbfn.config.parallel import ParallelConfig
from mbfn.data.tokenizer import train_bpe
from mbfn.errors import MbfnError
from mbfn.generate.options import GenerateConfig
from mbfn.generate.text import write_text
from tests.megatron.tiny import VARIANTS

PROMPT = "the cat, the dog"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mbfn.generate", "device=cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def text(*arguments: str) -> dict:
    done = run(*arguments, "format=json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with a tokenizer and a chat template."""
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    model = VARIANTS["llama"]()
    model.resize_token_embeddings(300)
    model.config.vocab_size = 300
    model.save_pretrained(place)
    documents = ["the cat and the dog and the bird" * 20]
    train_bpe(documents, 280).save(str(place / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


def _expected(directory: Path, count: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return made[0, ids.size(1) :].tolist()


def test_greedy_text_is_transformers(directory: Path) -> None:
    found = text(f"hf={directory}", PROMPT, "max_tokens=8", "ignore_eos=true")
    assert found["tokens"] == _expected(directory, 8)


@pytest.mark.slow
def test_every_source_and_layout_makes_the_same_text(directory: Path, tmp_path: Path) -> None:
    expected = _expected(directory, 8)
    convert = [sys.executable, "-m", "mbfn.convert", f"hf={directory}", f"out={tmp_path / 'dist'}", "parallel=tp2"]
    subprocess.run(convert, check=True, capture_output=True, timeout=120)
    checkpoint = f"megatron={tmp_path / 'dist'}"
    for where in (("parallel=tp2",), ("parallel=pp2",)):
        for source in (f"hf={directory}", checkpoint):
            found = text(source, PROMPT, "max_tokens=8", "ignore_eos=true", f"tokenizer={directory}", *where)
            assert found["tokens"] == expected, (source, where)


@pytest.mark.slow
def test_drawing_follows_the_seed_and_a_chat_its_template(directory: Path) -> None:
    drawn = [
        text(f"hf={directory}", "the", "max_tokens=12", "temperature=1.5", "top_k=50", f"seed={seed}")["tokens"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    chat = text(f"hf={directory}", PROMPT, "chat=true", "system=be brief", "max_tokens=2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(chat["prompt_tokens"]) == f"<system>be brief<user>{PROMPT}<a>"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hf": None}, "hf: give one model: hf=DIR, megatron=DIR or run=DIR"),
        ({"prompt": ""}, "prompt: give the text to continue"),
        ({"top_k": 3}, "temperature: top_k and top_p are for drawing"),
        ({"parallel": ParallelConfig(tp=3)}, "does not divide by tp=3"),
        ({"max_tokens": 900}, "max_tokens: 5 tokens of prompt and 900 new ones are beyond the model's 128 positions"),
        ({"hf": None, "run": "DIR"}, "expected the directory of a run, with its config.yaml"),
        ({"tokenizer": "/nowhere"}, "tokenizer: no tokenizer.json in /nowhere; give tokenizer=DIR"),
        ({"system": "be brief"}, "system: is a turn of a chat: give it with chat=true"),
    ],
)
def test_a_mistake_is_named(directory: Path, fields: dict, expected: str) -> None:
    given = {"hf": "DIR", "prompt": PROMPT, **fields}
    named = {key: str(directory) if value == "DIR" else value for key, value in given.items()}
    with pytest.raises(MbfnError) as caught:
        write_text(GenerateConfig(device="cpu", **named))
    assert expected in str(caught.value)
