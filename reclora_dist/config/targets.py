"""What each stage of a run is to make: where, from which configuration and datasets, and whether it is there already.

Light on purpose: a run that has nothing to do asks here, and imports no model library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from reclora_dist.config.run import folder, manifest
from reclora_dist.config.schema import Config, Section
from reclora_dist.contract.manifest import FileEntry, Format, Manifest, commit, digest, is_current
from reclora_dist.contract.schema import ADAPTER, BACKBONE, CRM, EVALUATION, EVENTS, SERVICE, SHARDS, VECTORS
from reclora_dist.contract.storage import Folder


@dataclass(frozen=True)
class Target:
    """The output of a stage, under this configuration and made from these parents."""

    folder: Folder
    format: Format
    config_digest: str
    parents: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One digest of configuration and parents."""
        return digest([self.config_digest, dict(self.parents)])

    @property
    def is_current(self) -> bool:
        """Whether it is there."""
        return is_current(self.folder, self.format, self.config_digest, self.parents)

    def commit(self, files: Sequence[FileEntry], facts: Mapping[str, Any] | None = None) -> Manifest:
        """Publish the files that were written to the folder."""
        form = self.format
        return commit(
            self.folder,
            Manifest(form.name, form.version, self.config_digest, self.parents, tuple(files), dict(facts or {})),
        )


def meaning(section: Section) -> dict[str, Any]:
    """The settings of a section that say what is made; the others (see ``knob``) say how."""
    return {f.name: getattr(section, f.name) for f in fields(section) if f.metadata["means"]}  # type: ignore[arg-type]


def backbone_target(config: Config) -> Target:
    """The tiny backbone."""
    parents = _digests(config, {"events": EVENTS})
    used = digest([meaning(config.backbone), config.prompt, config.retrieval.short])
    return Target(folder(config, "backbone"), BACKBONE, used, parents)


def vectors_target(config: Config) -> Target:
    """The item vectors."""
    tiny = config.backbone.kind == "tiny"
    parents = {"events": EVENTS} | ({"backbone": BACKBONE} if tiny and not config.embed.path else {})
    model = config.embed.path or ("" if tiny else config.backbone.path)
    return Target(folder(config, "vectors"), VECTORS, digest([config.embed, model]), _digests(config, parents))


def crm_target(config: Config) -> Target:
    """The trained CRM, whatever the number of workers: it decides only in which order the samples come.

    The text samples are none of its inputs: with more or fewer of them it stays up to date.
    """
    used = digest([config.crm, meaning(config.crm_train)])
    samples = manifest(config, "shards", SHARDS).part_digest("crm/")
    return Target(folder(config, "crm"), CRM, used, {**_digests(config, {"events": EVENTS}), "shards/crm": samples})


def adapter_target(config: Config, name: str) -> Target:
    """The trained adapter ``name``, whatever the engine and the number of workers.

    Events, whose texts it reads, and vectors are among the parents because the adapter refers to them: scorer and
    service refuse it beside others. The balance loss is that of a forward pass: with it, the passes' sizes say what is
    trained.
    """
    parents = {"events": EVENTS, "vectors": VECTORS, "shards": SHARDS, "crm": CRM}
    parents |= {"backbone": BACKBONE} if config.backbone.kind == "tiny" else {}
    lora, train = config.adapters[name], config.training(name)
    parents |= {f"adapters/{other}": ADAPTER for other in (lora.start, lora.teacher) if other}
    passes = [[train.micro_batch, train.micro_tokens, train.packing]] if lora.balance else []
    used = digest([name, meaning(lora), meaning(config.backbone), config.prompt, meaning(train), *passes])
    return Target(folder(config, f"adapters/{name}"), ADAPTER, used, _digests(config, parents))


def evaluation_target(config: Config) -> Target:
    """The evaluation of all models."""
    parents = {"events": EVENTS, "shards": SHARDS, "crm": CRM, "vectors": VECTORS} | _adapters(config)
    used = digest([config.evaluate, config.compare, list(config.adapters), config.retrieval])
    return Target(folder(config, "evaluation"), EVALUATION, used, _digests(config, parents))


def service_target(config: Config) -> Target:
    """The checked service of these adapters."""
    used = digest([config.serve.adapter, config.compare])
    return Target(folder(config, "service"), SERVICE, used, _digests(config, _adapters(config)))


def _adapters(config: Config) -> dict[str, Format]:
    return {f"adapters/{name}": ADAPTER for name in config.adapters}


def _digests(config: Config, formats: Mapping[str, Format]) -> dict[str, str]:
    return {name: manifest(config, name, form).content_digest for name, form in formats.items()}
