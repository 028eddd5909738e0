"""python -m reclora_dist.cli.evaluate: metrics on validation and, once, on test."""

from reclora_dist.cli.stage import stage_command

main = stage_command("evaluation")

if __name__ == "__main__":
    main()
