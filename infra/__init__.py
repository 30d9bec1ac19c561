"""Storage, commit protocol, registry, cluster, lineage, errors and logging; no torch, no chemistry."""

if __name__ != "bitdgdm.infra":
    raise ImportError(f"this folder is bitdgdm.infra, not {__name__!r}: import it as bitdgdm.infra")
