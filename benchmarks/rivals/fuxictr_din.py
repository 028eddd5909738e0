"""FuxiCTR's DIN on the same samples: `python benchmarks/rivals/fuxictr_din.py FOLDER`, data in the layout of LongCTR.

FuxiCTR's own model, data loader, training loop and evaluation, with the widths, batch size and learning rate given in
FOLDER/settings.json. Prints one JSON object: seconds and samples per second of each epoch (evaluation not counted),
validation AUC after each.
"""

import json
import sys
import time
from pathlib import Path

import torch
from fuxictr.features import FeatureMap
from model_zoo.LongCTR.DIN.DIN import DIN
from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader


class Timed(DIN):
    """Notes the time and the AUC of every epoch."""

    def train_epoch(self, data_generator):
        """Train an epoch and note its seconds without the evaluation's."""
        self.spent, self.since = 0.0, time.perf_counter()
        super().train_epoch(data_generator)
        self.epochs.append({"seconds": self.spent, "auc": self.last["AUC"]})

    def eval_step(self):
        """Stop the clock during the evaluation."""
        self.spent += time.perf_counter() - self.since
        super().eval_step()
        self.since = time.perf_counter()

    def evaluate(self, data_generator, metrics=None):
        """Keep the metrics."""
        self.last = super().evaluate(data_generator, metrics)
        return self.last


def main(folder: Path) -> None:
    """Train and print."""
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    features = FeatureMap("log", str(folder))
    features.load(str(folder / "feature_map.json"), {"embedding_dim": settings["embedding"]})
    model = Timed(
        features,
        dnn_hidden_units=settings["dnn"],
        attention_hidden_units=settings["attention"],
        attention_hidden_activations="ReLU",
        learning_rate=settings["lr"],
        embedding_dim=settings["embedding"],
        net_dropout=settings["dropout"],
        optimizer="adam", loss="binary_crossentropy", metrics=["AUC", "logloss"], model_root=str(folder), verbose=0,
        early_stop_patience=99, reduce_lr_on_plateau=False,
    )  # fmt: skip
    (folder / "log").mkdir(exist_ok=True)
    model.epochs = []

    def loader(split: str, shuffle: bool) -> LongCTRDataLoader:
        return LongCTRDataLoader(
            features, str(folder / split), str(folder / "user_info.parquet"), str(folder / "item_info.parquet"),
            batch_size=settings["batch_size"], shuffle=shuffle, num_workers=settings["loaders"],
            max_len=settings["long"], padding="pre",
        )  # fmt: skip

    train = loader("train", True)
    model.fit(train, epochs=settings["epochs"], validation_data=loader("validation", False), max_gradient_norm=1.0)
    rows = train.num_samples
    epochs = [{**epoch, "samples_per_second": round(rows / epoch["seconds"])} for epoch in model.epochs]
    print(json.dumps({"epochs": epochs, "parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
