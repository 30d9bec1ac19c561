"""The jobs a user runs: specs, plans and the command line; composes tasks, owns no maths."""

if __name__ != "bitdgdm.pipelines":
    raise ImportError(f"this folder is bitdgdm.pipelines, not {__name__!r}: import it as bitdgdm.pipelines")
