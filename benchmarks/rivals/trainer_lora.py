"""Plain LoRA by the usual recipe: transformers' Trainer, PEFT, padding to the longest, logits of all the vocabulary.

`torchrun --nproc-per-node 2 benchmarks/rivals/trainer_lora.py FOLDER` with FOLDER/settings.json and FOLDER/{train,
validation}.json: token ids and labels of the samples, worded as ours. Prints one JSON object: samples per second of the
training, peak memory of a process, and the binary log loss of the two answers on the validation samples.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def main(folder: Path) -> None:
    """Train, score the validation samples and print."""
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    rows = {split: json.loads((folder / f"{split}.json").read_text()) for split in ("train", "validation")}
    answers = settings["answers"]
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=settings["dtype"])
    lora = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, lora)

    def collate(batch: list[dict]) -> dict:
        """Prompt and answer, padded; only the answer has a loss."""
        ids = [[*row["ids"], answers[row["label"]]] for row in batch]
        longest = max(map(len, ids))
        pad = [[0] * (longest - len(row)) for row in ids]
        return {
            "input_ids": torch.tensor([row + more for row, more in zip(ids, pad, strict=True)]),
            "attention_mask": torch.tensor([[1] * len(row) + more for row, more in zip(ids, pad, strict=True)]),
            "labels": torch.tensor(
                [[-100] * (len(row) - 1) + row[-1:] + [-100] * len(more) for row, more in zip(ids, pad, strict=True)]
            ),
        }

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=settings["per_device"], num_train_epochs=1,
        learning_rate=settings["lr"], warmup_steps=1, lr_scheduler_type="linear", max_grad_norm=1.0, report_to=[],
        save_strategy="no", logging_steps=1000, use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
        ddp_find_unused_parameters=False, disable_tqdm=True, bf16=settings["dtype"] == "bfloat16",
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows["train"])
    first = collate(rows["train"][: settings["per_device"]])
    with torch.no_grad():  # a first forward pass, which our clock leaves out, too
        model(**{key: value.to(model.device) for key, value in first.items()})
    since = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - since
    if arguments.process_index:
        return
    model.eval()
    losses = []
    with torch.no_grad():
        for row in rows["validation"]:
            last = model(input_ids=torch.tensor([row["ids"]]).to(model.device)).logits[0, -1, answers].float().cpu()
            losses.append(F.cross_entropy(last[None], torch.tensor([row["label"]])).item())
    found = {"samples_per_second": round(len(rows["train"]) / seconds, 3), "logloss": sum(losses) / len(losses)}
    gpu = torch.cuda.is_available()
    memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**found, "peak_memory_mib": memory >> 20}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
