"""The record of a campaign on storage, for anyone who reads it.

Guarantees: `campaign.json` names the resolved spec, the model by content digest, the fingerprint and where it was
submitted (law L4); the model file and the known molecules lie beside it under names made of their content.
Knows nothing of: how a campaign is started or continued (submit.py), Ray, networks.

Layout under --out:  campaign.json  model-<digest>.safetensors  reference-<digest>.npy  data/<2 hex>/part-*.parquet
                     commits/*.json  quarantine/*.json  manifest.json  _SUCCESS  report.html
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bitdgdm.infra.errors import BadInput, CampaignNotFound
from bitdgdm.infra.storage import Store, open_store
from bitdgdm.infra.version import VERSION
from bitdgdm.pipelines.plan import unit_count
from bitdgdm.pipelines.spec import CampaignSpec

CAMPAIGN_FILE = "campaign.json"
SCHEMA_VERSION = 1


class Campaign(BaseModel):
    """The record in campaign.json. `spec` has every default filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    campaign: str
    fingerprint: str
    spec: CampaignSpec
    model: dict[str, Any]
    identity: dict[str, Any]
    provenance: dict[str, Any]
    code_version: str

    @property
    def units(self) -> int:
        assert self.spec.unit_size is not None
        return unit_count(self.spec.first_id, self.spec.count, self.spec.unit_size)


def model_key(digest: str) -> str:
    """Return where a campaign keeps its model; named by content, so a half-started campaign can't leave a wrong one."""
    return f"model-{digest[:16]}.safetensors"


def reference_key(digest: str) -> str:
    """Return where a campaign keeps the hashes of known molecules."""
    return f"reference-{digest[:16]}.npy"


def load_campaign(url: str) -> Campaign:
    """Return the campaign at `url` for reading. Raises: CampaignNotFound, StorageRefused."""
    return read_campaign(open_store(url))


def read_campaign(store: Store) -> Campaign:
    """Return the campaign in `store`. Raises: CampaignNotFound, BadInput for a record of another version."""
    try:
        campaign = Campaign.model_validate_json(store.read(CAMPAIGN_FILE))
    except FileNotFoundError as e:
        raise CampaignNotFound(store.url) from e
    except ValidationError as e:
        raise BadInput(
            f"{store.path(CAMPAIGN_FILE)} can't be read by bitdgdm {VERSION}: {str(e).splitlines()[0]}. "
            "Use the version that wrote it, or a new --out"
        ) from e
    here = campaign.spec.model_copy(update={"out": store.url})  # it may have been moved or copied since
    return campaign.model_copy(update={"spec": here})
