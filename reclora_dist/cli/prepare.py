"""python -m reclora_dist.cli.prepare: raw logs to checked shards (Spark jobs, backbone and item vectors)."""

from reclora_dist.cli.stage import stage_command

main = stage_command("synthesise", "events", "backbone", "vectors", "histories", "shards", "quality")

if __name__ == "__main__":
    main()
