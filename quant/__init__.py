"""Recipes, decompositions, quantizers, QuantLinear and the artifact format, for any torch module."""

if __name__ != "bitdgdm.quant":
    raise ImportError(f"this folder is bitdgdm.quant, not {__name__!r}: import it as bitdgdm.quant")
