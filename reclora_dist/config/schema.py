"""Every setting of the project: frozen dataclasses, one per component, each field with its documentation.

Plain standard library, so that Spark executors and pure modules can import it. ``config.load`` fills and checks them.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal


def knob(default: Any, text: str, means: bool = True) -> Any:
    """A dataclass field with a default and a sentence of documentation.

    Args:
        means: whether a stage's output means something else under another value; an output stays up to date, and a
            checkpoint is taken up, under any value of a field that says how work is done, not what.
    """
    metadata = {"help": text, "means": means}
    if isinstance(default, dict | list) or callable(default):
        return field(default_factory=default if callable(default) else lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """Base of all sections: an unknown key is an error, a number is a fine string (read by pydantic)."""

    __pydantic_config__: ClassVar[dict[str, str | bool]] = {"extra": "forbid", "coerce_numbers_to_str": True}


@dataclass(frozen=True)
class SynthesiseConfig(Section):
    """The generated log of the demo: planted personal tastes, drift and item text."""

    users: int = knob(1500, "number of users")
    items: int = knob(400, "number of items")
    events_per_user: int = knob(60, "mean number of events per user (power law)")
    days: int = knob(60, "days the log spans")
    topics: int = knob(8, "topics that an item's text names")
    styles: int = knob(3, "hidden styles of items that no text names; only who liked what shows them")
    drift: float = knob(0.3, "share of a user's taste that moves from the first day to the last")
    noise: float = knob(0.5, "standard deviation of the noise on the logit of liking")
    personal: float = knob(1.0, "strength of what users like differently; 0: all like the same")
    truth: bool = knob(False, "publish the probability of liking beside each event, to know the best possible AUC")
    activity_exponent: float = knob(
        2.5, "tail of the users' activity: the share with more than n events falls like n to the minus this; above 1"
    )
    popularity_exponent: float = knob(
        0.6, "the n-th most popular item is drawn in proportion to n to the minus this; 0: all alike, at most 1.5"
    )
    heavy_user: float = knob(0.0, "share of all events that belong to user 1, below 1; 0: it is a user like the others")
    dirt: float = knob(
        0.0, "bad rows added, as a share of the good ones, as many of each kind; ratings and times are text then"
    )
    by_day: bool = knob(False, "put the events of a day (UTC) into a folder date=YYYY-MM-DD")
    seed: int = knob(0, "seed of the generator")


@dataclass(frozen=True)
class SourceConfig(Section):
    """Where the raw log lies and how its columns are named."""

    kind: Literal["movielens_1m", "movielens_100k", "movielens_25m", "goodreads", "columns"] = knob(
        "columns", "layout of the raw log; `columns` takes any CSV, JSON-lines or Parquet by the mapping below"
    )
    path: str = knob("", "folder or URI of the raw log")
    format: Literal["csv", "json", "parquet"] = knob("parquet", "file format of a `columns` source")
    events: str = knob("events", "events file or folder, below path")
    days: tuple[str, str] = knob(
        ("", ""),
        "first and last day to read (YYYY-MM-DD) of events that lie in folders date=YYYY-MM-DD; empty: all there is",
    )
    items: str = knob("items", "items file or folder, below path; empty: items have only their id")
    users: str = knob("", "users file or folder, below path; empty: users have only their id")
    user: str = knob("user_id", "user id column (events and users)")
    item: str = knob("item_id", "item id column (events and items)")
    time: str = knob("timestamp", "event time column; empty: file order is the order")
    time_unit: Literal["s", "ms"] = knob("s", "unit of a numeric event time")
    rating: str = knob("rating", "rating or feedback column (a click column of 0 and 1 works)")
    title: str = knob("title", "item title column")
    item_fields: tuple[str, ...] = knob((), "categorical item columns")
    user_fields: tuple[str, ...] = knob((), "categorical user columns")


@dataclass(frozen=True)
class PrivacyConfig(Section):
    """Which users of a raw log are left out, and under which ids the others appear."""

    hash_users: bool = knob(False, "replace user ids by a keyed hash (HMAC-SHA256, 32 hexadecimal digits)")
    key_file: str = knob("", "file that holds the key; empty: the environment variable RECLORA_USER_KEY")
    delete: str = knob("", "users to leave out: one raw id per line, or *.csv or *.parquet with the column source.user")


@dataclass(frozen=True)
class EventsConfig(Section):
    """Raw logs to canonical events: label rule, k-core, split, quarantine."""

    source: SourceConfig = knob(SourceConfig, "the raw log")
    privacy: PrivacyConfig = knob(PrivacyConfig, "users left out or hidden")
    like_at_least: float = knob(4.0, "a rating of at least this is a like (label 1)")
    rating_levels: tuple[float, ...] = knob((), "the rating scale; empty: the distinct ratings found (64 at most)")
    k_core: int = knob(5, "keep users and items with at least this many events, repeatedly; 0: keep all")
    min_history: int = knob(5, "an event with fewer earlier events of its user is history, never a sample")
    split: Literal["global_time", "per_user", "dates"] = knob(
        "global_time",
        "cut all samples at two moments, each user's samples at two places, or all at cut_dates (days can be added)",
    )
    cut_dates: tuple[str, str] = knob(("", ""), "split=dates: first day of validation, and of test (YYYY-MM-DD)")
    keep: int = knob(
        10_000, "split=dates: newest events of a user that later days may look back on; at least retrieval.candidates"
    )
    fractions: tuple[float, float, float] = knob((0.8, 0.1, 0.1), "shares of training, validation and test samples")
    max_quarantined: float = knob(0.5, "fail if more than this share of the rows is bad")
    item_text: str = knob(
        "Here is an item. Its title is {title}.", "text that is embedded; {title} and item field names are filled in"
    )


@dataclass(frozen=True)
class RetrievalConfig(Section):
    """Which events of a user a sample gets to see; all of them lie strictly before the sample's time."""

    strategy: Literal["semantic", "recent", "random", "category", "simhash"] = knob(
        "semantic",
        "semantic: largest cosine to the target item; recent: newest; random: seeded; category: newest of the target's "
        "category (SIM's hard search); simhash: most equal bits of hashed vectors (ETA)",
    )
    long: int = knob(60, "history length of the CRM (ids)")
    short: int = knob(10, "history length of the language model (text)")
    candidates: int = knob(10_000, "newest events before a sample that are searched; bounds the cost of a sample")
    category: str = knob("", "strategy=category: the item field that is compared; empty: the first")
    bits: int = knob(64, "strategy=simhash: bits of a hashed vector, a multiple of 64")
    seed: int = knob(0, "strategy=random and simhash: seed of the order, of the projections")
    block: int = knob(128, "targets of one user per matrix product; bounds the memory of one step")


@dataclass(frozen=True)
class ShardsConfig(Section):
    """How samples become training files, and which of them the language model gets."""

    rows_per_file: int = knob(400_000, "rows per Parquet file, about; all files of a split are of one size")
    rows_per_group: int = knob(20_000, "rows per row group, at most; 0: as many as fill 64 MiB")
    text_train: float = knob(0.08, "language-model training samples: a share up to 1, or a number above 1")
    text_validation: float = knob(2000, "language-model validation samples: a share or a number")
    text_test: float = knob(4000, "language-model test samples: a share or a number")
    apart: bool = knob(
        False,
        "keep the language model's training samples out of the CRM's, so that gate and head learn from what the CRM "
        "says of samples whose labels it has not seen",
    )
    seed: int = knob(0, "seed of the row order and of the text samples")
    add: bool = knob(False, "events built by days: keep the shards of earlier days that lie in the output folder")

    @property
    def text(self) -> dict[str, float]:
        """Language-model samples asked for, per split."""
        return {"train": self.text_train, "validation": self.text_validation, "test": self.text_test}


@dataclass(frozen=True)
class QualityConfig(Section):
    """What a build must hold to be trained on; a limit that is crossed fails the build."""

    max_quarantined: float = knob(0.5, "largest share of the event rows that is bad")
    min_users: int = knob(1, "fewest users")
    min_items: int = knob(1, "fewest items")
    min_samples: tuple[int, int, int] = knob(
        (1, 0, 0), "fewest training, validation and test samples; by days: of the splits that they lie in"
    )
    min_label_rate: float = knob(1e-4, "smallest share of likes among the samples")
    max_label_rate: float = knob(0.9999, "largest share of likes among the samples")
    min_mean_history: float = knob(0.0, "smallest mean length of the long histories")
    min_coverage: float = knob(0.0, "smallest mean share of a short history's items that the long one holds")
    max_drift: float = knob(
        0.0,
        "largest population stability index of items, rating levels and labels against the previous build "
        "(0.1 is a small change, 0.25 a large one); 0: off",
    )
    max_row_change: float = knob(
        0.0, "largest relative change of the number of events (by days: per day) since then; 0: off"
    )


@dataclass(frozen=True)
class SparkConfig(Section):
    """How the pipeline starts its Spark jobs."""

    master: str = knob("local[*]", "Spark master URL")
    conf: dict[str, str] = knob(dict, "further Spark properties, as with `spark-submit --conf`")
    driver_memory: str = knob("1g", "memory of the driver (with a local master: of all of Spark's JVM)")
    shuffle_partitions: int = knob(8, "partitions of a shuffle; about 3 per core of the cluster")


@dataclass(frozen=True)
class TinyConfig(Section):
    """The embedded default backbone: a small LLaMA trained here on the item texts and histories."""

    hidden: int = knob(96, "hidden size")
    layers: int = knob(3, "layers")
    heads: int = knob(4, "attention heads")
    vocabulary: int = knob(1500, "tokenizer entries, at most")
    steps: int = knob(200, "pretraining steps")
    batch_size: int = knob(16, "sequences per pretraining step")
    sequence: int = knob(128, "tokens per pretraining sequence")
    lr: float = knob(3e-3, "peak learning rate of the pretraining")


@dataclass(frozen=True)
class BackboneConfig(Section):
    """The language model under the adapters."""

    kind: Literal["tiny", "causal", "encoder"] = knob(
        "tiny", "tiny: trained by the `backbone` stage; causal or encoder: any transformers model"
    )
    path: str = knob("", "local folder or hub id of the model; empty for tiny")
    dtype: Literal["float32", "bfloat16", "float16"] = knob(
        "float32", "type of the frozen weights and of the computation; float16 needs DeepSpeed, which scales the loss"
    )
    targets: tuple[str, ...] = knob(
        ("q_proj", "v_proj"),
        "linear layers that get an adapter: last names or ends of full names (self_attn.q_proj); all-linear: all of "
        "the stack; empty: the query and value projections, whatever they are called",
    )
    top_layers: int = knob(0, "adapt only the last n layers; 0: all")
    gradient_checkpointing: bool = knob(False, "run the layers again in backward: less memory, more time", means=False)
    answers: tuple[str, str] = knob(("No", "Yes"), "answer words of a causal model, for label 0 and 1")
    tiny: TinyConfig = knob(TinyConfig, "the embedded model, if kind is tiny")
    seed: int = knob(0, "seed of everything that is initialised here")


@dataclass(frozen=True)
class PromptConfig(Section):
    """How a sample is worded. Field names in braces are filled in; pure ids stay out."""

    profile: str = knob("", "opening line; user field names in braces, e.g. 'The user is a {gender}.'")
    history: str = knob("The user rated these items in the past, oldest first:", "line before the history")
    event: str = knob(" {title} ({rating} stars);", "one event of the history")
    question: str = knob(" Will the user like {title}?", "the question about the target item")
    answer: str = knob(" Answer Yes or No:", "last words of a causal model's prompt")
    max_tokens: int = knob(256, "the oldest events are left out of longer prompts")


@dataclass(frozen=True)
class EmbedConfig(Section):
    """Item text to vectors."""

    path: str = knob("", "encoder folder or hub id; empty: the backbone itself")
    dimension: int = knob(64, "PCA components, fitted on items with training events; 0: no PCA")
    batch_size: int = knob(64, "texts per forward pass")
    max_tokens: int = knob(64, "longer texts are cut")
    previous: str = knob(
        "", "folder of the vectors of an earlier day: they stay, only items that came since are embedded"
    )


@dataclass(frozen=True)
class CrmConfig(Section):
    """The conventional recommendation model."""

    kind: Literal["sim", "din", "gru4rec", "sasrec", "deepfm", "dcnv2"] = knob(
        "sim",
        "sim: DIN's attention on the retrieved history; din: the same network, on the newest events; gru4rec, sasrec: "
        "the history in time order; deepfm, dcnv2: products of fields and the mean history",
    )
    embedding: int = knob(16, "width of an embedding")
    item_rows: int = knob(
        0,
        "rows of the items' embeddings, at most: items are hashed to two rows each where they are more; 0: a row per "
        "item. The fields of all items are held all the same",
    )
    user_rows: int = knob(0, "user_id: rows of the users' embeddings, at most, in the same way; 0: a row per user")
    attention: tuple[int, ...] = knob((64, 32), "sim, din: hidden widths of the attention MLP")
    layers: int = knob(2, "gru4rec, sasrec, dcnv2: recurrent layers, blocks, cross layers")
    heads: int = knob(2, "sasrec: attention heads; embedding is a multiple of it")
    positions: int = knob(200, "sasrec: positions that are told apart, from the newest; older ones share the last")
    dnn: tuple[int, ...] = knob((256, 256, 256), "hidden widths of the DNN; the last is the state that gates read")
    dropout: float = knob(0.1, "dropout of the DNN and of sasrec's blocks")
    embedding_dropout: float = knob(0.0, "dropout of the embeddings")
    user_id: bool = knob(False, "embed the user's id (useless where test users are new)")
    statistics: bool = knob(True, "read the running statistics of item and user")
    ignore: tuple[str, ...] = knob(
        (), "fields of users and items that are not read; one that is nearly an id is best ignored where users are new"
    )


@dataclass(frozen=True)
class TrainConfig(Section):
    """One training run."""

    batch_size: int = knob(1024, "samples per optimiser step, over all workers")
    micro_batch: int = knob(
        0, "samples per forward pass of a worker, at most; 0: all that a worker has of a step", means=False
    )
    micro_tokens: int = knob(
        0,
        "fine-tuning: padded tokens per forward pass of a worker, at most, of samples of similar length, also in "
        "validation; 0: no bound",
        means=False,
    )
    packing: bool = knob(
        False,
        "fine-tuning of a causal model: the samples of a forward pass in one row, each attending to itself alone, "
        "without padding",
        means=False,
    )
    epochs: int = knob(1, "passes over the training split")
    lr: float = knob(2e-3, "peak learning rate")
    bank_lr: float = knob(0.0, "peak learning rate of the meta-LoRAs; 0: lr")
    gate_lr: float = knob(0.0, "peak learning rate of the gates; 0: lr")
    weight_decay: float = knob(0.0, "AdamW's decoupled weight decay")
    warmup: float = knob(0.02, "share of the steps with rising learning rate")
    final_lr: float = knob(0.1, "learning rate at the last step, as a share of the peak (linear decay)")
    clip: float = knob(1.0, "largest gradient norm; 0: unbounded")
    validate_every: int = knob(0, "steps between validations; 0: once per epoch")
    patience: int = knob(0, "end after so many validations without a better AUC; 0: never")
    checkpoint_every: int = knob(200, "steps between checkpoints", means=False)
    keep: int = knob(2, "newest checkpoints that are kept; each holds the best parameters so far, too", means=False)
    storage_patience: float = knob(
        300.0, "seconds for which a checkpoint that cannot be written is tried again", means=False
    )
    log_every: int = knob(20, "steps between log lines and metrics", means=False)
    seed: int = knob(0, "seed of initialisation, order and dropout")


@dataclass(frozen=True)
class LoraConfig(Section):
    """A bank of meta-LoRAs and its gate; plain LoRA is experts=1 with gate=none."""

    experts: int = knob(16, "meta-LoRAs per matrix (K)")
    rank: int = knob(8, "rank of each (in `outputs` mode: split over the experts)")
    alpha: float = knob(16.0, "scale: the update is multiplied by alpha / rank")
    dropout: float = knob(0.0, "dropout of the adapter's input")
    mode: Literal["weights", "outputs", "matrix"] = knob(
        "weights",
        "weights: mix A and B (RecLoRA); outputs: mix the experts' outputs (iLoRA); matrix: one pair and an r x r "
        "matrix of the gate in between (CFLoRA)",
    )
    gate: Literal["crm", "user", "id", "random", "uniform", "none"] = knob(
        "crm",
        "who sets the mixture: the CRM's state of (user, target, history), its state without the target, a learned row "
        "per user, a fixed random row per user, all equal, nobody",
    )
    shared_gate: bool = knob(False, "one gate for all matrices (iLoRA) in place of one per matrix")
    top_k: int = knob(0, "keep only the k largest weights of a mixture; 0: all")
    balance: float = knob(
        0.0,
        "weight of the load-balance loss, which rewards the even use of the experts; 0: none. It is that of a forward "
        "pass: small passes, and more workers, push the single samples' mixtures to even weights as well",
    )
    temperature: float = knob(5.0, "divides the gate's logits (not in mode `matrix`, which has no softmax)")
    gate_hidden: int = knob(60, "hidden width of a gate")
    gate_dropout: float = knob(0.1, "dropout of a gate's hidden layer")
    state_dropout: float = knob(0.0, "dropout of the state that the gate reads")
    state_noise: float = knob(0.0, "standard deviation of noise on that state (after its normalisation), in training")
    head: Literal["answers", "offset", "fusion", "blend"] = knob(
        "answers",
        "how the score is made: the backbone's answers; these plus the CRM's logit; a small MLP on the pooled state "
        "and the CRM's state (late fusion); or a mean of the answers' and the CRM's logit, where the answers are "
        "trained alone",
    )
    blend: float = knob(0.25, "share of the answers in the mean of head `blend`; choose it on validation")
    start: str = knob(
        "",
        "adapter of the run, listed before this one, whose weights the training starts from; a single pair starts all "
        "experts, each with a little noise",
    )
    teacher: str = knob(
        "",
        "adapter of the run, listed before this one, whose scores of the training samples are learned in place of "
        "their labels",
    )
    train: dict[str, bool | int | float] = knob(
        dict, "settings of lora_train that are others for this adapter", means=False
    )  # those that mean something are part of ``Config.training``

    @property
    def mixture_width(self) -> int:
        """Numbers that the gate sets per sample and matrix."""
        return self.rank**2 if self.mode == "matrix" else self.experts

    @property
    def personal(self) -> bool:
        """Whether these numbers can differ between samples."""
        return self.gate not in ("uniform", "none") and self.mixture_width > 1

    @property
    def weighs(self) -> bool:
        """Whether they are weights of experts, so that there is something to say about the experts' use."""
        return self.personal and self.mode != "matrix"

    def training(self, common: "TrainConfig") -> "TrainConfig":
        """How it is trained: like all adapters, but for its own settings."""
        own: dict[str, Any] = self.train
        return replace(common, **own)


@dataclass(frozen=True)
class FinderConfig(Section):
    """The range test of learning rates (``cli.learning_rate``)."""

    stage: str = knob("crm", "crm, or the name of an adapter")
    low: float = knob(1e-6, "first learning rate")
    high: float = knob(1.0, "last learning rate; it ends before, when the loss has grown fourfold")
    steps: int = knob(100, "steps from the one to the other, in equal ratios")


@dataclass(frozen=True)
class EngineConfig(Section):
    """The optimiser engine of the fine-tuning."""

    kind: Literal["deepspeed", "torch"] = knob("deepspeed", "DeepSpeed ZeRO, or plain torch with DDP")
    zero_stage: Literal[0, 1, 2, 3] = knob(2, "ZeRO stage; 2 while the frozen base fits one device; 0: float32 only")
    offload_optimizer: Literal["none", "cpu", "nvme"] = knob(
        "none",
        "where the optimiser's state lives: with the model, in the host's memory (ZeRO 1 to 3), on disk (ZeRO 3)",
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = knob(
        "none", "ZeRO 3: where a worker's share of the parameters lives between its uses"
    )
    nvme_path: str = knob("", "folder on a local NVMe disk for what is offloaded there")


@dataclass(frozen=True)
class RayConfig(Section):
    """The cluster and the workers of a training run."""

    address: str = knob("", "address of a running cluster; empty: RAY_ADDRESS, else a cluster for this process")
    workers: int = knob(2, "training workers; 0: in this process, without Ray (for debugging)")
    min_workers: int = knob(
        0,
        "go on with as few workers as this when nodes are lost, and with more when they are back; 0: always `workers`",
    )
    max_failures: int = knob(3, "failures in a row without a new checkpoint after which training gives up")
    cpus_per_worker: float = knob(1, "CPUs reserved per worker")
    gpus_per_worker: float = knob(0, "GPUs reserved per worker")
    threads: int = knob(1, "torch threads per worker")
    metrics_port: int = knob(0, "port of the node's Prometheus endpoint, for a cluster started here; 0: any free")
    object_store_mib: int = knob(256, "object store of a cluster started here, MiB")


@dataclass(frozen=True)
class ReaderConfig(Section):
    """How training reads shards."""

    kind: Literal["arrow", "petastorm"] = knob("arrow", "row-group reader")
    prefetch: int = knob(2, "row groups read ahead, and steps of batches made ahead, by threads; 0: none")
    storage_patience: float = knob(300.0, "seconds for which a read that fails is tried again")
    crm_states: Literal["computed", "stored"] = knob(
        "computed",
        "fine-tuning: ask the CRM for every batch, or for all text samples in one pass before the first step, whose "
        "answers stay in memory",
    )


@dataclass(frozen=True)
class TrackingConfig(Section):
    """Who is told of a training's course, beside Prometheus and the log."""

    tensorboard: bool = knob(True, "write event files to tensorboard/ of the run")
    mlflow: str = knob("", "tracking URI of an MLflow server or folder (needs the extra `mlflow`); empty: none")


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """Metrics and their intervals."""

    batch_size: int = knob(256, "samples per forward pass, at most")
    bootstrap: int = knob(1000, "bootstrap resamples of users")
    calibration_bins: int = knob(15, "bins of the expected calibration error")
    shuffled: bool = knob(
        False, "score each gated adapter also with the mixtures of other samples, as the model `<name> (shuffled)`"
    )
    rare: int = knob(20, "items with at most this many training events are reported as rare")
    history_bands: tuple[int, ...] = knob(
        (10, 30, 100), "bounds of the bands of history length that are reported apart, ascending; empty: no bands"
    )
    ranking_users: int = knob(
        0, "test users, at most, whose next liked item is ranked among 20 fixed candidates (iLoRA's task); 0: off"
    )
    seed: int = knob(0, "seed of the resamples, of that shuffle, and of the users and candidates of the ranking")


@dataclass(frozen=True)
class ServeConfig(Section):
    """The scoring service."""

    host: str = knob("127.0.0.1", "address of the HTTP endpoint")
    port: int = knob(8000, "port of the HTTP endpoint")
    replicas: int = knob(1, "model replicas")
    max_batch: int = knob(64, "requests scored together, at most")
    batch_wait_ms: float = knob(5.0, "how long a request waits for company")
    max_candidates: int = knob(1000, "candidates per request, at most")
    max_history: int = knob(10_000, "events in a request's explicit history, at most")
    threads: int = knob(1, "torch threads per replica")
    adapter: str = knob("", "adapter folder to serve; empty: the best one of the run (the first of `compare`)")
    check: bool = knob(False, "the pipeline ends by asking the service over HTTP and scraping the metrics")
    gpus: float = knob(0, "GPUs reserved per replica and per evaluation")


@dataclass(frozen=True)
class StudyConfig(Section):
    """A grid of runs that answers a question (``cli.study``), in ``paths.run``: a folder per point and seed."""

    question: str = knob("", "what the study asks, in one sentence")
    points: dict[str, tuple[str, ...]] = knob(dict, "overrides of each point, by its name; empty: the axes make them")
    axes: dict[str, tuple[str, ...]] = knob(
        dict, "a key or group and its values; every combination is a point (of each of `points`, if there are some)"
    )
    seeds: tuple[int, ...] = knob((0, 1, 2), "every point is run with each of them")
    seeded: tuple[str, ...] = knob(
        ("synthesise", "shards", "backbone", "crm_train", "lora_train", "evaluate"), "sections whose `seed` is set"
    )
    commands: tuple[Literal["pipeline", "prepare", "train", "evaluate"], ...] = knob(
        ("pipeline",), "what a run is made of: commands of reclora_dist.cli, one after the other"
    )
    split: str = knob(
        "test", "what tables and plots show: test, validation, or training (pace and seconds of the stages)"
    )
    metrics: tuple[str, ...] = knob(("auc", "logloss", "acc"), "metrics of the tables; the plots show the first")
    compare: tuple[tuple[str, str], ...] = knob(
        (), "pairs whose difference is reported, better one first: `model` (in every point) or `model@point`"
    )
    parallel: int = knob(1, "runs at a time; the training workers of all share the cluster's CPUs and GPUs")


@dataclass(frozen=True)
class ExportConfig(Section):
    """One user's adapter as a PEFT folder."""

    adapter: str = knob("", "adapter folder; its gate must not read the target item")
    user: str = knob("", "id of a user of the log; empty is possible where the mixture is the same for all")
    out: str = knob("", "folder to write")


@dataclass(frozen=True)
class PathsConfig(Section):
    """Where everything of a run lies."""

    run: str = knob("runs/demo", "folder of the run; every stage has a sub-folder")
    shards: str = knob(
        "",
        "folder of shards that Spark has written there, as those of a log that grows day by day; empty: the run's own. "
        "If set, the run has its events and vectors already, and the pipeline begins with the training",
    )


@dataclass(frozen=True)
class Config(Section):
    """Everything."""

    paths: PathsConfig = knob(PathsConfig, "folders")
    synthesise: SynthesiseConfig | None = knob(None, "generate the raw log first (the demo does)")
    events: EventsConfig = knob(EventsConfig, "raw logs to events")
    retrieval: RetrievalConfig = knob(RetrievalConfig, "histories")
    shards: ShardsConfig = knob(ShardsConfig, "training files")
    quality: QualityConfig = knob(QualityConfig, "limits of a build")
    spark: SparkConfig = knob(SparkConfig, "Spark")
    backbone: BackboneConfig = knob(BackboneConfig, "language model")
    prompt: PromptConfig = knob(PromptConfig, "wording")
    embed: EmbedConfig = knob(EmbedConfig, "item vectors")
    crm: CrmConfig = knob(CrmConfig, "conventional model")
    crm_train: TrainConfig = knob(TrainConfig, "its training")
    adapters: dict[str, LoraConfig] = knob(dict, "the adapters to fine-tune, by name")
    lora_train: TrainConfig = knob(TrainConfig, "their training")
    finder: FinderConfig = knob(FinderConfig, "range test of learning rates")
    engine: EngineConfig = knob(EngineConfig, "DeepSpeed")
    ray: RayConfig = knob(RayConfig, "cluster and workers")
    reader: ReaderConfig = knob(ReaderConfig, "shard reader")
    tracking: TrackingConfig = knob(TrackingConfig, "course of a training")
    evaluate: EvaluateConfig = knob(EvaluateConfig, "metrics")
    compare: tuple[tuple[str, str], ...] = knob((), "pairs of models whose difference is reported, better one first")
    serve: ServeConfig = knob(ServeConfig, "service")
    export: ExportConfig = knob(ExportConfig, "export to PEFT")
    study: StudyConfig = knob(StudyConfig, "grid of runs; only cli.study reads it")

    def training(self, name: str) -> TrainConfig:
        """How ``name``, ``crm`` or an adapter's, is trained."""
        return self.crm_train if name == "crm" else self.adapters[name].training(self.lora_train)
