"""python -m reclora_dist.cli.embed: item texts to vectors, on Ray."""

from reclora_dist.cli.stage import stage_command

main = stage_command("backbone", "vectors")

if __name__ == "__main__":
    main()
