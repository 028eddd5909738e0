"""python -m reclora_dist.cli.prepare: raw logs to shards (Spark jobs, backbone and item vectors)."""

from reclora_dist.cli.stage import stage_command

main = stage_command("synthesise", "events", "backbone", "vectors", "histories", "shards")

if __name__ == "__main__":
    main()
