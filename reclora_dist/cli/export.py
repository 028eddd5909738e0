"""python -m reclora_dist.cli.export export.adapter=FOLDER export.user=ID export.out=FOLDER: an adapter for PEFT."""

from reclora_dist.cli.compose import command
from reclora_dist.config.schema import Config, ExportConfig


@command
def main(config: Config) -> None:
    """Write one user's adapter as a PEFT LoRA folder."""
    export_user(config.export)
    print(f"export: {config.export.out}", flush=True)


def export_user(config: ExportConfig) -> None:
    """Write the adapter of ``config.user``, as the service would score for this user now, to the folder ``config.out``.

    Raises:
        ContractError: the adapter or what it refers to is missing or damaged.
        ValueError: a setting is empty, the user is unknown, or the adapter is no fixed LoRA for a user.
    """
    from reclora_dist.contract.storage import Folder
    from reclora_dist.data.collate import crm_batch
    from reclora_dist.evaluate.scorer import Scorer, feature_store
    from reclora_dist.lora.adapter import read_adapter_config, resolved_backbone
    from reclora_dist.lora.export import Origin, check_exportable, write_peft

    folder = Folder(config.adapter)
    adapter, manifest = read_adapter_config(folder)
    check_exportable(adapter)
    _check(config, adapter.lora.gate)
    scorer = Scorer.from_pretrained(config.adapter, device="cpu")
    store = feature_store(config.adapter, adapter)
    item, user = next(iter(store.items)), config.user or next(iter(store.users))  # such a gate reads no target item
    mixture = scorer.model.mixture(crm_batch(store.rows([item], adapter.retrieval, user=user)))
    own = None if mixture is None else mixture[:, 0].detach()
    origin = Origin(manifest.content_digest, manifest.parents, config.user)
    write_peft(Folder(config.out), adapter, resolved_backbone(folder, adapter), scorer.model, own, origin)


def _check(config: ExportConfig, gate: str) -> None:
    if not config.out:
        raise ValueError("export.out is empty; give a folder to write")
    if not config.user and gate not in ("uniform", "none"):
        raise ValueError(f"export.user is empty, but gate {gate!r} differs from user to user; give the id of one")


if __name__ == "__main__":
    main()
