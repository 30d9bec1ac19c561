"""docs/spec.md: the keys of a campaign spec, from the schema that checks them.

Guarantees: the page is a function of `CampaignSpec` and the command line; a test compares it with the file.
Knows nothing of: what the keys do beyond their descriptions.

Make it again: make docs
"""

import json
from typing import Any

from bitdgdm.pipelines.spec import IDENTITY, CampaignSpec

EXAMPLE = """\
model: models:/digress-qm9@champion
out: s3://bucket/campaign-7
count: 100000
seed: 7
score: qed
"""

_HEAD = f"""\
# The campaign spec

A campaign is described by a YAML or JSON file, by flags, or by both; flags override the file. A key that isn't
listed here is an error, and so is a value that doesn't fit. This page is made from the schema: `make docs`.

```yaml
{EXAMPLE}```

    bitdgdm generate campaign.yaml
    bitdgdm generate campaign.yaml --count 1000 --out trial/

| key | flag | type | default | same data? | meaning |
|---|---|---|---|---|---|
"""

_TAIL = """
**Same data?** "decides": the shards depend on it, so a campaign can't be resumed under another value. "speed": it
changes how fast the rows are made and where, never what they say; it may differ at each resume. The defaults of `steps`,
`unit_size`, `micro_batch`, `device`, `engine` and `precision` are filled in once, at submit, and kept in `campaign.json`.

The rows also depend on the versions of bitdgdm, torch, RDKit and pyarrow and on the kind of hardware; see
[formats.md](formats.md). An alias such as `@champion` is resolved once, at submit.

## JSON schema

For editors and for checks before submitting:

```json
"""


def spec_page() -> str:
    """Return the text of docs/spec.md."""
    schema = CampaignSpec.model_json_schema()
    rows = [_row(key, field, key in schema["required"]) for key, field in schema["properties"].items()]
    return _HEAD + "".join(rows) + _TAIL + json.dumps(schema, indent=1) + "\n```\n"


def _row(key: str, field: dict[str, Any], required: bool) -> str:
    flag = f"`--{key.replace('_', '-')}`" + (" `--no-alerts`" if key == "alerts" else "")
    default = "required" if required else _default(field["default"])
    decides = "decides" if key in (*IDENTITY, "model") else "speed" if key != "out" else ""
    return f"| `{key}` | {flag} | {_type(field)} | {default} | {decides} | {field['description']} |\n"


def _default(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value).strip(chr(34))}`"


def _type(field: dict[str, Any]) -> str:
    """Return the type with its limits, as in "integer 1 to 65536" or "auto, cpu or cuda"."""
    options = field.get("anyOf", [field])
    kinds = [_one_type(option) for option in options if option.get("type") != "null"]
    return " or ".join(kinds) + (" or null" if len(kinds) < len(options) else "")


def _one_type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(field["enum"][:-1]) + " or " + field["enum"][-1]
    low = field.get("minimum", field.get("exclusiveMinimum"))
    if field["type"] == "integer" and "exclusiveMinimum" in field:
        low = field["exclusiveMinimum"] + 1
    high = field.get("maximum")
    above = "above " if field["type"] == "number" and "exclusiveMinimum" in field else ""
    limits = (
        "" if low is None else f" {above}{_short(low)} to {_short(high)}" if high else f" from {_short(low)}"
    )
    return field["type"] + limits


def _short(number: float) -> str:
    power = int(number).bit_length() - 1
    if number >= 2**20:
        return f"2^{power}" if number == 2**power else f"2^{power + 1} - 1"
    return f"{number:g}"


if __name__ == "__main__":
    print(spec_page(), end="")
