"""python -m reclora_dist.cli.train: the CRM, then the adapters, with Ray Train and DeepSpeed."""

from reclora_dist.cli.stage import stage_command

main = stage_command("crm", "adapter")

if __name__ == "__main__":
    main()
