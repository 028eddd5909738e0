"""RecLoRA on your own logs: Spark shards, Ray Train with DeepSpeed, Ray Serve, Prometheus."""

__version__ = "0.1.0"
