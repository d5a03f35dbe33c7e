"""Tokenisation beside `datasets.map` with the same tokenizer, documents and number of processes.

    python -m tests.bench.tokenising [megabytes=20] [workers=2] [repeat=3]

Each act runs in a process of its own, in turn, `repeat` times; medians and their ratio are printed. `datasets.map` is
given batches, the Rust tokenizer, and its Arrow output, which is what its users write. Nothing is asserted.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = "import sys; from tests.bench.tokenising import ours; ours(*sys.argv[1:])"
THEIRS = "import sys; from tests.bench.tokenising import theirs; theirs(*sys.argv[1:])"


def main() -> None:
    """Make the documents and the tokenizer, time both, print the ratio."""
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    workers = options.get("workers", str(len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory(prefix="mbfn-bench-") as scratch:
        root = Path(scratch)
        size = write_documents(root / "texts.jsonl", int(float(options.get("megabytes", "20")) * 1e6))
        write_tokenizer(root / "tokenizer")
        seconds: dict[str, list[float]] = {"mbfn.tokenize": [], "datasets.map": []}
        for _ in range(int(options.get("repeat", "3"))):
            for name, code in (("mbfn.tokenize", OURS), ("datasets.map", THEIRS)):
                seconds[name].append(timed(code, root, workers))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:16}{median:8.2f} s{size / median / 1e6:8.2f} MB/s   {workers} workers")
    print(f"mbfn.tokenize is {medians['datasets.map'] / medians['mbfn.tokenize']:.2f} times as fast")


def timed(code: str, root: Path, workers: str) -> float:
    """Wall seconds of one act in a fresh interpreter, its start included."""
    for made in root.glob("out*"):
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "out-cache")}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), workers], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started


def ours(root: str, workers: str) -> None:
    """What `python -m mbfn.tokenize` does."""
    from mbfn.data.tokenise import order_of, tokenise
    from mbfn.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(Path(root) / "tokenizer")
    source, out = f"{root}/texts.jsonl", f"{root}/out"
    tokenise(
        order_of(source, out, tokenizer, text_key="text", bos=False, eod=True, bad_rows="error", workers=int(workers))
    )


def theirs(root: str, workers: str) -> None:
    """What a script with `datasets` does."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(f"{root}/tokenizer")
    rows = datasets.load_dataset("json", data_files=f"{root}/texts.jsonl", split="train")
    mapped = rows.map(
        lambda batch: {"input_ids": tokenizer(batch["text"], return_attention_mask=False)["input_ids"]},
        batched=True,
        num_proc=int(workers),
        remove_columns=["text"],
    )
    mapped.save_to_disk(f"{root}/out-dataset")


def write_documents(path: Path, size: int) -> int:
    """Pieces of the language reference that ships with Python, of 50 to 3,000 characters."""
    from mbfn.data.text import BUILTIN, read_documents

    text, rng, written = read_documents(BUILTIN)[0], random.Random(0), 0
    with path.open("w") as out:
        while written < size:
            start = rng.randrange(len(text) - 3000)
            written += out.write(json.dumps({"text": text[start : start + rng.randint(50, 3000)]}) + "\n")
    return written


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of 8,192 entries."""
    from mbfn.data.text import BUILTIN, read_documents
    from mbfn.data.tokenizer import END_OF_TEXT, train_bpe

    directory.mkdir()
    train_bpe(read_documents(BUILTIN), 8192).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
