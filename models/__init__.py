"""The diffusion models: networks, transitions, features, samplers, decoding, checkpoint import, engines."""

if __name__ != "bitdgdm.models":
    raise ImportError(f"this folder is bitdgdm.models, not {__name__!r}: import it as bitdgdm.models")
